"""What was done so far, where the time went, and how full the pool was."""

import time

from ..engine import LLM, Request
from ..scheduler import Plan

COUNTERS = "requests aborted_requests prompt_tokens cached_tokens prefill_tokens steps peak_blocks"


class StatsLLM(LLM):
    """An engine that counts."""

    def _assemble(self, *args, **policies) -> None:
        super()._assemble(*args, **policies)
        self._stats: dict[str, float] = dict.fromkeys(COUNTERS.split(), 0)
        self._stats |= {"prefill_seconds": 0.0, "decode_seconds": 0.0, "decode_steps": 0.0}
        self._clock = 0.0  # when the step began that is read next

    def _queue(self, requests: list[Request]) -> None:
        super()._queue(requests)
        self._stats["prompt_tokens"] += sum([len(request.prompt) for request in requests])

    def _advance(self) -> None:
        if getattr(self, "_flight", None) is None:  # else it began where the last one was read
            self._clock = time.perf_counter()
        super()._advance()

    def _land(self, plan: Plan) -> None:
        """A step and its time are split between prefill and decode by their rows."""
        blocks, stats = self.scheduler.blocks, self._stats
        used = blocks.num_usable - blocks.num_free  # before those that end give theirs back
        super()._land(plan)
        prompts = [(s, start, stop) for s, start, stop in plan.chunks if start < s.num_prompt]
        new = sum([min(stop, s.num_prompt) - start for s, start, stop in prompts])
        rows = sum([stop - start for _, start, stop in plan.chunks])
        began, self._clock = self._clock, time.perf_counter()
        stats["prefill_seconds"] += (self._clock - began) * new / rows
        stats["decode_seconds"] += (self._clock - began) * (rows - new) / rows
        stats["decode_steps"] += (rows - new) / rows
        stats["prefill_tokens"] += new
        stats["steps"] += 1
        stats["peak_blocks"] = max(stats["peak_blocks"], used)

    def _finish(self, request: Request) -> None:
        super()._finish(request)
        self._stats["requests"] += 1
        self._stats["aborted_requests"] += "abort" in [s.finish_reason for s in request.samples]
        self._stats["cached_tokens"] += request.output["num_cached_tokens"]

    def stats(self) -> dict:
        """Counters since the start (of the requests that ended, aborted_requests were aborted; of
        the prompts' tokens, cached_tokens came from the prefix cache and prefill_tokens were
        computed; decode_steps: of the steps, the share of rows that are no prompt's; of
        guessed_tokens, accepted_tokens were right), and the present state of the pool, without the
        sink; cache_bytes: what K and V take, with it."""
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        return self._stats | {
            "output_tokens": scheduler.num_tokens, "preemptions": scheduler.num_preemptions,
            "guessed_tokens": getattr(scheduler, "num_guessed", 0),
            "accepted_tokens": getattr(scheduler, "num_accepted", 0),
            "block_size": blocks.block_size, "num_blocks": blocks.num_usable // blocks.width,
            "free_blocks": blocks.num_free // blocks.width,
            "peak_blocks": -(-self._stats["peak_blocks"] // blocks.width),
            "running": len(scheduler.running), "waiting": len(scheduler.waiting),
            "cache_bytes": getattr(getattr(self.cache, "data", None), "nbytes", 0),  # asleep: none
        }  # fmt: skip


PARTS = {"llm": StatsLLM}
