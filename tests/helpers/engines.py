"""Core engines on small models, requests, and what holds for any engine after each step."""

import random

from microvllm import engine
from microvllm.runner import Extension
from microvllm.sampler import SamplingParams
from microvllm.scheduler import Plan

from .goldens import FIXTURES


def build(name: str = "era5", **options) -> engine.LLM:
    """A core engine over the fixture of an era."""
    fixture = FIXTURES[name]
    options = {"num_blocks": 200, "device": "cpu"} | fixture.overrides | options
    return engine.LLM(fixture.directory, tokenizer_path=fixture.tokenizer, **options)


class Counters(Extension):
    """Counts what an engine computes. Works with any engine: `counters = Counters.of(llm)`."""

    def __init__(self):
        self.num_steps = 0
        self.num_prefill_tokens = 0  # tokens of prompts that were computed
        self.peak_blocks = 0  # most blocks in use at once
        self.most_running = 0
        self.most_tokens = 0  # in one step

    @classmethod
    def of(cls, llm: engine.LLM) -> "Counters":
        """Counters of what an engine does from now on."""
        counters = cls()
        llm.add_extension(counters)
        return counters

    def on_plan(self, plan: Plan) -> None:
        if not plan.chunks:
            return
        pool = self.engine.scheduler.blocks.pool
        self.num_steps += 1
        self.peak_blocks = max(self.peak_blocks, pool.num_usable - pool.num_free)
        self.most_running = max(self.most_running, len(self.engine.scheduler.running))
        self.most_tokens = max(self.most_tokens, plan.num_tokens)
        for chunk in plan.chunks:
            num_rest = chunk.seq.num_prompt - chunk.start
            self.num_prefill_tokens += max(0, min(chunk.num_tokens, num_rest))


def check(llm: engine.LLM) -> None:
    """What holds after every step."""
    scheduler = llm.scheduler
    scheduler.blocks.check(scheduler.running)
    assert len(scheduler.running) <= llm.max_batch_size
    assert not any(len(seq.block_table) for seq in scheduler.waiting)


def assert_idle(llm: engine.LLM) -> None:
    """No request is left, and every block is free again."""
    pool = llm.scheduler.blocks.pool
    assert llm.is_finished() and not llm.scheduler.running and not llm.scheduler.waiting
    assert pool.num_free == pool.num_usable and not any(pool.ref_count)


def finish(llm: engine.LLM) -> dict[int, dict]:
    """Step until all requests are done, with a check of each step. Outputs by request id."""
    outputs = {}
    num_steps = 0
    while not llm.is_finished():
        for output in llm.step():
            outputs[output["request_id"]] = output
        check(llm)
        num_steps += 1
        assert num_steps < 5000, "no end in sight"
    assert_idle(llm)
    return outputs


def serve(llm: engine.LLM, work: list[tuple[list[int], SamplingParams]]) -> list[dict]:
    """All requests at once, step by step."""
    ids = [llm.add_request(prompt, params) for prompt, params in work]
    outputs = finish(llm)
    return [outputs[request_id] for request_id in ids]


# requests


def ids(length: int, seed: int = 0) -> list[int]:
    """A prompt of `length` token ids, another one for each seed."""
    return random.Random(seed).choices(range(256), k=length)


def greedy(max_tokens: int, **options) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **options)


def sampled(max_tokens: int, seed: int, **options) -> SamplingParams:
    options = {"temperature": 1.0, "ignore_eos": True} | options
    return SamplingParams(max_tokens=max_tokens, seed=seed, **options)


def question(llm: engine.LLM, text: str) -> list[int]:
    """The prompt of a conversation that begins with a question."""
    return llm.tokenizer.render_for_completion([{"role": "user", "content": text}])


# prompts shorter and longer than a block and than the short window, greedy rows among sampled ones
MIXED = [
    (ids(1, 1), greedy(12)),
    (ids(2, 2), sampled(12, seed=5)),
    (ids(3, 3), greedy(1)),
    (ids(15, 4), greedy(9)),
    (ids(16, 5), sampled(5, seed=6, temperature=0.7, top_k=5)),
    (ids(17, 6), greedy(17)),
    (ids(33, 7), sampled(1, seed=7)),
    (ids(48, 8), greedy(2)),
    (ids(64, 9), sampled(14, seed=8, top_k=20)),
    (ids(140, 10), greedy(10)),
    (ids(127, 11), sampled(6, seed=9, temperature=1.5)),
]
# beginnings in common, one prompt twice, one that ends where a block ends
SHARED = [
    (ids(40, 1), greedy(9)),
    (ids(40, 1), greedy(9)),
    (ids(40, 1)[:32], greedy(12)),
    (ids(40, 1)[:32] + ids(7, 2), sampled(9, seed=1)),
    (ids(40, 1)[:17] + ids(20, 3), greedy(9)),
    (ids(64, 4), greedy(4)),
    (ids(64, 4), sampled(4, seed=2)),
]


def growing(shortest: int) -> list:
    """Many that grow, for pools that do not hold them all."""
    lengths = range(shortest, shortest + 28, 4)
    return [
        (ids(n, 20 + i), greedy(40) if i % 2 else sampled(36, seed=i))
        for i, n in enumerate(lengths)
    ]


GROWING = growing(3)
SAMPLED = [(ids(5 + 6 * i, 40 + i), sampled(24, seed=i, temperature=1 + i / 5)) for i in range(5)]
