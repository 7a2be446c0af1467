"""The logits of every text that engines were asked to continue."""

from torch import Tensor

from microvllm import engine
from microvllm.attention import Batch
from microvllm.runner import Extension
from microvllm.scheduler import Plan


class Record(Extension):
    """Asserts that equal texts have logits of equal bits, in all engines that it watches."""

    def __init__(self):
        self.bits: dict[tuple[int, ...], bytes] = {}  # of the logits after a text
        self.num_seen = 0

    def watch(self, llm: engine.LLM) -> engine.LLM:
        llm.add_extension(self)
        # no hook sees the logits of several steps in one call
        llm.runner.choose_num_steps = lambda seqs: 0
        return llm

    def on_sampled(self, plan: Plan, batch: Batch, logits: Tensor, token_ids: Tensor) -> None:
        for draw, row in zip(plan.draws, logits, strict=True):
            text = tuple(plan.text_before(draw))
            bits = row.float().cpu().numpy().tobytes()
            known = self.bits.setdefault(text, bits)
            assert known == bits, f"{len(text)} tokens, other logits"
            self.num_seen += 1
