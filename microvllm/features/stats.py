"""Where the time goes, and how full the pool was."""

from __future__ import annotations

import time

from ..engine import LLM
from ..scheduler import Plan


class StatsLLM(LLM):
    """An engine that counts seconds and blocks as well."""

    def _assemble(self, *args, **policies) -> None:
        super()._assemble(*args, **policies)
        self._stats |= {"peak_blocks": 0, "prefill_seconds": 0.0, "decode_seconds": 0.0}

    def _land(self, plan: Plan) -> None:
        blocks = self.scheduler.blocks
        used = blocks.num_usable - blocks.num_free  # before those that end give theirs back
        self._stats["peak_blocks"] = max(self._stats["peak_blocks"], used)
        super()._land(plan)

    def _count(self, plan: Plan, num_new: int) -> None:
        """A step's time is split between prefill and decode by their rows."""
        stats, before = self._stats, self._stats["prefill_tokens"]
        super()._count(plan, num_new)
        began, self._clock = self._clock, time.perf_counter()
        rows = sum([stop - start for _, start, stop in plan.chunks])
        share, seconds = (stats["prefill_tokens"] - before) / rows, self._clock - began
        stats["prefill_seconds"] += seconds * share
        stats["decode_seconds"] += seconds * (1 - share)

    def stats(self) -> dict:
        """As in the core; peak_blocks in use, prefill_seconds and decode_seconds."""
        found, width = super().stats(), self.scheduler.blocks.width
        return found | {"peak_blocks": -(-found["peak_blocks"] // width)}


PARTS = {"llm": StatsLLM}
