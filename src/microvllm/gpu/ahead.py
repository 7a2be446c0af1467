"""The loop one step ahead, so that the device never waits for the host.

    plain    host    plan 1 |            read 1, plan 2 |            read 2, plan 3 |
             device         |   step 1   |              |   step 2   |              |  step 3

    ahead    host    plan 1 | plan 2  | read 1, plan 3 | read 2, plan 4 |
             device         |  step 1  |  step 2  |  step 3  |  step 4

A step is planned and launched before the tokens of the one before are known. Where it computes such
a token, the token's id is taken from the device's memory (`AheadRunner.upload`). A sequence that
turns out to have ended is in the next step by mistake, and `Scheduler.update` drops what it drew.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ..engine import LLM, Batch, Runner
from ..sampler import on
from ..scheduler import Plan


@contextmanager
def placeholders(flight: Plan | None) -> Iterator[None]:
    """While the next step is planned and launched, each token of `flight` that it may compute
    stands in its sequence as ~row, the row of `flight` that draws it."""
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

    _flight: Plan | None = None  # the step that was launched and not yet read

    def _assemble(self, *args, **options) -> None:
        super()._assemble(*args, **options)
        self.overlap = self.device.type == "cuda"  # is it ahead?

    def _advance(self) -> None:
        self._advance_ahead() if self.overlap else super()._advance()

    @torch.inference_mode()
    def _advance_ahead(self) -> None:
        """One turn of the loop: plan and launch a step, then read the one before."""
        self.scheduler.blocks.events.lap("outside")
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

    def _settle(self) -> None:
        """Read the step that is under way, if one is."""
        flight, self._flight = self._flight, None
        if flight:
            self._land(flight)

    def _recover(self, error: BaseException | None = None) -> None:
        """As in the core; the step that is under way never was."""
        self._flight = None
        for request in self._requests.values():
            for seq in request.samples:
                if seq.tokens[-1] < 0:
                    seq.tokens.pop()
        super()._recover(error)

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
            plan.results["arrived"] = torch.cuda.current_stream(self.model.device).record_event()

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
