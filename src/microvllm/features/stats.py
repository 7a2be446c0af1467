"""What was done so far, where the time went, and how full the pool was."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ..engine import LLM, Request
from ..scheduler import Plan, Sequence

COUNTERS = "requests aborted_requests prompt_tokens cached_tokens prefill_tokens steps peak_blocks"


class SampleTimes(NamedTuple):
    """When the tokens of a sample were known, in seconds of time.perf_counter()."""

    queued: float  # its request arrived
    first: float  # the first token of the sample
    last: float
    num_tokens: int


class Stopwatch:
    """Measures each sample that begins and ends while `StatsLLM.timing` lasts."""

    def __init__(self):
        self.queued: dict[int, float] = {}  # by request_id
        self.first: dict[tuple[int, int], float] = {}  # by request_id and sample_id
        self.times: list[SampleTimes] = []  # of the samples that ended

    def tokens_came(self, seqs: Iterable[Sequence], now: float) -> None:
        """These sequences got tokens, or ended."""
        for seq in seqs:
            key, num_tokens = (seq.request_id, seq.sample_id), len(seq.tokens) - seq.num_prompt
            if num_tokens and seq.request_id in self.queued:
                first = self.first.setdefault(key, now)
                if seq.finish_reason:
                    queued = self.queued[seq.request_id]
                    self.times.append(SampleTimes(queued, first, now, num_tokens))


class StatsLLM(LLM):
    """An engine that counts."""

    _stopwatch: Stopwatch | None = None

    def _assemble(self, *args, **policies) -> None:
        super()._assemble(*args, **policies)
        self.reset_stats()
        self._clock = 0.0  # when the step began that is read next

    def reset_stats(self) -> None:
        """Begin to count from zero; the peak of used blocks, too."""
        self._stats: dict[str, float] = dict.fromkeys(COUNTERS.split(), 0)
        self._stats |= {"prefill_seconds": 0.0, "decode_seconds": 0.0, "decode_steps": 0.0}
        self._before = self._totals()

    def _totals(self) -> dict[str, int]:
        """What the scheduler has counted since it was made."""
        scheduler = self.scheduler
        return {
            "output_tokens": scheduler.num_tokens, "preemptions": scheduler.num_preemptions,
            "guessed_tokens": getattr(scheduler, "num_guessed", 0),
            "accepted_tokens": getattr(scheduler, "num_accepted", 0),
        }  # fmt: skip

    @contextmanager
    def timing(self) -> Iterator[list[SampleTimes]]:
        """Measure each sample of the requests that arrive inside: the list grows as they end."""
        self._stopwatch = Stopwatch()
        try:
            yield self._stopwatch.times
        finally:
            self._stopwatch = None

    def _collect(self, changed: Iterable[Sequence]) -> None:
        now, changed = time.perf_counter(), [*changed]
        super()._collect(changed)
        if self._stopwatch:
            self._stopwatch.tokens_came(changed, now)

    def _queue(self, requests: list[Request]) -> None:
        super()._queue(requests)
        if self._stopwatch:
            now = time.perf_counter()
            self._stopwatch.queued |= {request.id: now for request in requests}
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
        """Counters since the start or the last `reset_stats` (of the requests that ended,
        aborted_requests were aborted; of the prompts' tokens, cached_tokens came from the prefix
        cache and prefill_tokens were computed; decode_steps: of the steps, the share of rows that
        are no prompt's; of guessed_tokens, accepted_tokens were right), and the present state of
        the pool, without the sink; cache_bytes: what K and V take, with it."""
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        counted = {name: count - self._before[name] for name, count in self._totals().items()}
        return self._stats | counted | {
            "block_size": blocks.block_size, "num_blocks": blocks.num_usable // blocks.width,
            "free_blocks": blocks.num_free // blocks.width,
            "peak_blocks": -(-self._stats["peak_blocks"] // blocks.width),
            "running": len(scheduler.running), "waiting": len(scheduler.waiting),
            "cache_bytes": getattr(getattr(self.cache, "data", None), "nbytes", 0),  # asleep: none
        }  # fmt: skip


PARTS = {"llm": StatsLLM}
