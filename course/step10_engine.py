"""Step 10: the engine: the same ten ideas in the core's files. The page: 10-engine.md.

The core does what step 9 does, and what a toy may leave out. Its scheduler makes a plan, which is
plain data; the plan becomes one batch of arrays; the model runs it. `microvllm.LLM` is the same
core with kernels: functions that compute many small steps of the model in a few large ones.
"""

import time
from pathlib import Path

import common
from common import BLOCK, MODEL_DIR
from microvllm import LLM as FullLLM
from microvllm import SamplingParams
from microvllm.engine import LLM
from microvllm.trace import Trace

BUDGET = 32  # rows of a step, at most, as in step 9
PAGE = Path("lab-results/step10.html")  # what happened to each block, to be opened in a browser


class Watch(Trace):
    """Hears of all that the core does, and tells the meter; a Trace keeps it for a page as well."""

    def __init__(self, llm, meter, requests):
        super().__init__(decode=lambda token: llm.tokenizer.decode([token]))
        self.scheduler, self.meter, self.requests = llm.scheduler, meter, requests
        self.attach(llm.scheduler, model=MODEL_DIR.name, device="cpu")

    def plan(self, plan):
        super().plan(plan)
        filled = {}  # a block that several sequences have counts once
        for seq in self.scheduler.running:
            for i, block in enumerate(seq.table):
                filled[block] = max(filled.get(block, 0), min(BLOCK, seq.num_computed - i * BLOCK))
        rows = sum(stop - start for _, start, stop in plan.chunks)
        running = len(self.scheduler.running)
        self.meter.step(rows, 0, running, len(filled) * BLOCK, sum(filled.values()))

    def update(self, plan, changed):
        super().update(plan, changed)
        for seq in changed:
            self.meter.token(self.requests[seq.request_id], seq.sample_id, seq.tokens)

    def admit(self, seq, num_hits):
        super().admit(seq, num_hits)
        self.meter.counts["rows found in the cache"] += num_hits * BLOCK

    def evict(self, block):
        super().evict(block)
        self.meter.counts["blocks evicted"] += 1

    def preempt(self, seq):
        super().preempt(seq)
        self.meter.counts["preemptions"] += 1


def ask_engine(llm, requests, meter):
    """Give an engine the requests, and step until all have ended. Their tokens are greedy ones."""
    ids = {}  # the engine's number of a request -> the request
    meter.start = time.perf_counter()  # not counting how long the engine took to load
    for request in requests:
        params = SamplingParams(temperature=0, max_tokens=request.max_tokens)
        ids[llm.add_request(request.prompt, params)] = request
    if meter.watched:
        meter.watch = Watch(llm, meter, ids)
    while not llm.is_finished():
        for output in llm.step():
            meter.ended[ids[output.request_id].id, 0] = output.token_ids
    meter.seconds = time.perf_counter() - meter.start


def serve(model, requests, meter, memory=common.MEMORY):
    """Answer all requests with the core's engine; memory: tokens, and one more block, the sink."""
    limits = {"num_blocks": 1 + memory // BLOCK, "block_size": BLOCK, "max_batched_tokens": BUDGET}
    meter.watched, meter.ended = True, {}
    with LLM(MODEL_DIR, device="cpu", **limits) as llm:
        ask_engine(llm, requests, meter)
    assert meter.ended == meter.outputs, "the events tell of other tokens than the outputs"


def kernels(requests, engine, **options):
    """(tokens by request and sample, seconds) of an engine without limits, after a first run in
    which kernels are compiled and caches are filled with nothing."""
    with engine(MODEL_DIR, device="cpu", enable_prefix_caching=False, **options) as llm:
        for _ in range(2):
            meter = common.Meter()
            meter.watched, meter.ended = False, {}
            ask_engine(llm, requests, meter)
    return meter.ended, meter.seconds


def main(model=None):
    model = model or common.Model()
    problem = "step 9 makes {tokens per second} tokens per second, and who would run it in earnest?"
    found = common.compare(
        serve, "step09_no_phases", common.shared_beginning, problem, model, memory=512
    )
    requests = common.shared_beginning(model)
    (plain, slow), (fast, quick) = (kernels(requests, e, num_blocks=200) for e in (LLM, FullLLM))
    assert plain == fast == found[1].outputs, "the engine's tokens differ"
    count = sum(map(len, plain.values()))
    print(f"\nThe core: {count / slow:.0f} tokens per second; with kernels {count / quick:.0f}:")
    print(f"{slow / quick:.1f} times as many, and the same tokens.")
    PAGE.parent.mkdir(exist_ok=True)
    found[1].watch.page(PAGE)
    print(f"\nThe core's run as a page, with every block: {PAGE.absolute()}")
    return found


if __name__ == "__main__":
    main()
