"""The loop one step ahead, so that the device never waits for the host.

    plain    host    plan 1 |            read 1, plan 2 |            read 2, plan 3 |
             device         |   step 1   |              |   step 2   |              |  step 3

    ahead    host    plan 1 | plan 2  | read 1, plan 3 | read 2, plan 4 |
             device         |  step 1  |  step 2  |  step 3  |  step 4

A step is planned and launched before the tokens of the one before are known. Where it computes such
a token, the token's id is taken from the device's memory (`AheadRunner.upload`). A sequence that
turns out to have ended is in the next step by mistake, and `Scheduler.update` drops what it drew.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ..engine import LLM, Batch, Runner
from ..sampler import on
from ..scheduler import Plan

# bytes of blocks that are copied at a time: a copy takes as much memory again while it runs,
# gigabytes for 500 samples that diverge in one step
COPY_BYTES = 2**28


@contextmanager
def placeholders(flight: Plan | None) -> Iterator[None]:
    """While the next step is planned and launched, each token of `flight` that it may compute
    stands in its sequence as ~row, the row of `flight` that draws it. At all other times
    `Sequence.tokens` holds known tokens only."""
    waiting = []
    try:
        for row, (_, seq, position) in enumerate(flight.samples if flight else ()):
            # else it has ended, a tool wrote there, or this token is its last
            if not seq.finish_reason and len(seq.tokens) == position < seq.max_length - 1:
                waiting.append(seq)
                seq.tokens.append(~row)
        yield
    finally:
        for seq in waiting:
            if seq.tokens[-1] < 0:  # an interrupt may have come before it was there
                seq.tokens.pop()


class AheadLLM(LLM):
    """An LLM whose loop is one step ahead on a GPU; its Runner must be an AheadRunner."""

    overlap = False  # is it ahead?
    _flight: Plan | None = None  # the step that was launched and not yet read

    def _assemble(self, *args, **options) -> None:
        super()._assemble(*args, **options)
        self.overlap = self.device.type == "cuda"

    def _advance(self) -> None:
        self._advance_ahead() if self.overlap else super()._advance()

    @torch.inference_mode()
    def _advance_ahead(self) -> None:
        """One turn of the loop: plan and launch a step, then read the one before."""
        if self._flight is None:  # else a step's time begins where the last one was read
            self._clock = time.perf_counter()
        self.scheduler.blocks.events.lap("outside")
        try:
            params = self._flight.params if self._flight else ()
            if True in [getattr(p, "needs_history", False) for p in params]:
                self._settle()  # what is drawn next depends on the tokens of the last step
            flight = self._flight
            with placeholders(flight):
                plan = self.scheduler.schedule()
                if plan.chunks:
                    self.runner.launch(plan)
            self._flight = plan if plan.chunks else None
            if flight:
                self._land(flight)
        except BaseException as error:
            self._flight = None
            self._recover(error)
            raise

    def _settle(self) -> None:
        """Read the step that is under way, if one is; if that fails, it never was."""
        flight, self._flight = self._flight, None
        if flight:
            try:
                self._land(flight)
            except BaseException:
                self.scheduler.reset()
                raise

    def close(self) -> None:
        super().close()
        self._flight = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class AheadRunner(Runner):
    """Launches a step whose ids may be placeholders, and does not wait for its results."""

    last: Tensor | None = None  # (R,) tokens of the step that was launched last, on the device

    def launch(self, plan: Plan) -> None:
        super().launch(plan)
        self.last = plan.results["tokens"]
        # copies in the order of the stream: before the next step can overwrite what they read
        for name, result in plan.results.items():
            if result is not None:
                plan.results[name] = result.to("cpu", non_blocking=True, copy=True)
        if self.model.device.type == "cuda":
            plan.results["arrived"] = torch.cuda.Event()
            plan.results["arrived"].record()

    def copy(self, copies: list[tuple[int, int]]) -> None:
        if not copies:
            return
        data = self.cache.data
        size = max(1, COPY_BYTES // (data[:, :, 0].numel() * data.itemsize))
        for part in on(data.device, copies).split(size):
            source, target = part.T
            data[:, :, target] = data[:, :, source]

    def upload(self, batch: Batch) -> Batch:
        """The arrays in one copy, for which the host does not wait; then views into it."""
        assert not (batch.prev_ids < 0).any(), "a chunk begins behind a token that is not known"
        arrays = {name: x for name, x in batch._asdict().items() if isinstance(x, np.ndarray)}
        flat = np.concatenate([x.ravel().view(np.int32) for x in arrays.values()])
        parts = on(self.model.device, flat).split([x.size for x in arrays.values()])
        there = {
            name: part.view(torch.float32 if x.dtype == np.float32 else torch.int32).view(x.shape)
            for (name, x), part in zip(arrays.items(), parts, strict=True)
        }
        if (batch.ids < 0).any():
            # -1 says that nothing could be drawn: an id like any other, whose row will be dropped
            known = self.last[(~there["ids"]).clamp(min=0)].clamp(min=0).to(torch.int32)
            there["ids"] = torch.where(there["ids"] < 0, known, there["ids"])
        return batch._replace(**there)

    def read(self, plan: Plan) -> list[int]:
        if event := plan.results.pop("arrived", None):
            event.synchronize()
        return super().read(plan)


PARTS = {"llm": AheadLLM, "runner": AheadRunner}
