"""Step 10: the engine: the same ten ideas in the core's files. The page: 10-engine.md.

The core does what step 9 does, and handles the special cases that a toy leaves out. Its scheduler
makes a plan, which is plain data. The plan becomes one batch of arrays, and the model computes it.
`microvllm.LLM` is the same core with kernels: functions that combine many small operations.
"""

import time
from pathlib import Path

import common
from common import BLOCK, MODEL_DIR
from microvllm import LLM as FullLLM
from microvllm import SamplingParams
from microvllm.engine import LLM
from microvllm.runner import Extension
from microvllm.trace import Trace, attach

BUDGET = 32  # the largest number of rows in a step, as in step 9
PAGE = Path("lab-results/step10.html")  # a page with every block, to open in a browser


class Count(Extension):
    """An extension of the engine: it counts the rows and tokens of each step."""

    def __init__(self, meter, requests):
        self.meter, self.requests = meter, requests

    def on_plan(self, plan):
        filled = {}  # a shared block counts once
        running = self.engine.scheduler.running
        for seq in running:
            for i, block in enumerate(seq.block_table):
                filled[block] = max(filled.get(block, 0), min(BLOCK, seq.num_computed - i * BLOCK))
        reserved, used = len(filled) * BLOCK, sum(filled.values())
        self.meter.step(plan.num_tokens, 0, len(running), reserved, used)

    def on_step(self, plan):
        for draw in plan.draws:
            seq = draw.seq
            self.meter.token(self.requests[seq.request_id], seq.index, seq.token_ids)


def count_blocks(events, counts):
    """Count events of blocks in the trace, which is an extension, too."""
    counts["rows found in the cache"] = sum(
        len(event["blocks"]) * BLOCK for event in events if event["e"] == "hit"
    )
    counts["blocks evicted"] = sum(event["e"] == "evict" for event in events)
    counts["preemptions"] = sum(event["e"] == "preempt" for event in events)


def ask_engine(llm, requests, meter):
    """Pass the requests to an engine, and step until all have ended. Decoding is greedy."""
    ids = {}  # the engine's number of a request -> the request
    meter.start = time.perf_counter()  # after the engine was loaded
    if meter.trace:
        llm.add_extension(Count(meter, ids))
        attach(llm, meter.trace)
    for request in requests:
        params = SamplingParams(temperature=0, max_tokens=request.max_tokens)
        ids[llm.add_request(request.prompt, params)] = request
    while not llm.is_finished():
        for output in llm.step():
            meter.ended[ids[output.request_id].id, 0] = output.token_ids
    meter.seconds = time.perf_counter() - meter.start


def serve(model, requests, meter, memory=common.MEMORY):
    """Answer all requests with the core's engine; memory: tokens, without the null block."""
    limits = {"num_blocks": 1 + memory // BLOCK, "block_size": BLOCK, "max_batched_tokens": BUDGET}
    meter.ended = {}
    with LLM(MODEL_DIR, device="cpu", **limits) as llm:
        meter.trace = Trace(decode=lambda id: llm.tokenizer.decode([id]), model=MODEL_DIR.name)
        ask_engine(llm, requests, meter)
    count_blocks(meter.trace.events, meter.counts)
    assert meter.ended == meter.outputs, "the tokens of the extension and the outputs differ"


def kernels(requests, engine, **options):
    """(tokens by request and sample, seconds) of an engine without limits. The second of two runs
    counts, so that the time excludes the compilation of kernels."""
    with engine(MODEL_DIR, device="cpu", enable_prefix_caching=False, **options) as llm:
        for _ in range(2):
            meter = common.Meter()
            meter.trace, meter.ended = None, {}
            ask_engine(llm, requests, meter)
    return meter.ended, meter.seconds


def main(model=None):
    model = model or common.Model()
    problem = "step 9 is a toy for one model: it generates {tokens per second} tokens per second."
    meters = common.compare(
        serve, "step09_no_phases", common.shared_beginning, problem, model, memory=512
    )
    requests = common.shared_beginning(model)
    (plain, slow), (fast, quick) = (kernels(requests, e, num_blocks=200) for e in (LLM, FullLLM))
    assert plain == fast == meters[1].outputs, "the engine's tokens differ"
    count = sum(map(len, plain.values()))
    print(f"\nThe core: {count / slow:.0f} tokens per second. With kernels: {count / quick:.0f},")
    print(f"{slow / quick:.1f} times as many. The tokens are the same.")
    PAGE.parent.mkdir(exist_ok=True)
    meters[1].trace.page(PAGE)
    print(f"\nThe core's run as a page, with every block: {PAGE.absolute()}")
    return meters


if __name__ == "__main__":
    main()
