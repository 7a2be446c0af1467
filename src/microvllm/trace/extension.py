"""Trace: the extension that records the events of an engine, and shows them."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

from torch import Tensor

from ..attention import Batch, HostBatch
from ..engine import LLM, Request
from ..runner import Extension
from ..scheduler import Plan, Scheduler
from .formats import make_frame, write_chrome, write_page
from .log import EventLog
from .recorder import Recorder

MAX_NOTEBOOK_BYTES = 2**22  # largest trace to show in a notebook, which stores it in its file
# the phases of a step that are timed
PHASES = ("outside", "schedule", "batch", "forward", "sample", "wait", "update")


class Trace(Extension):
    """Records the events of an engine, from `attach` to `close`.

    path: file to write; None: keep events in memory. The file is complete after every step, so the
    trace of a killed run can be read. decode: returns the text of a token id; model: name of the
    model, for the first event. `after_step`, if set, is called at the end of every step. `attach`
    raises OSError if the file cannot be opened. If it cannot be written later, as on a full disk,
    the trace ends with a warning, and the engine continues.

    It must be the last extension of its engine, so that the others have finished their part of a
    step. To trace a scheduler without an engine, call `begin`; on_plan, on_step and on_reset after
    its schedule, update and reset; and recorder.arrive after its add.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        decode: Callable[[int], str] | None = None,
        model: str = "",
    ):
        self.path = path
        self.log = EventLog(path)
        self.decode = decode
        self.model = model
        self.after_step: Callable[[], None] | None = None
        self.recorder: Recorder | None = None  # from `begin` to `close`
        self.engine: LLM | None = None
        self.step_numbers = count(1)
        # (number, milliseconds by phase) of each planned step that has not ended: two steps, if the
        # loop is one step ahead
        self.under_way: deque[tuple[int, dict[str, float]]] = deque()
        self.phase_start = time.perf_counter()
        self.outside_ms = 0.0  # time before the step that is being planned

    def attach(self, engine: LLM) -> None:
        """Begin the trace, after the steps in flight have ended."""
        engine.loop.drain()
        self.engine = engine
        self.begin(engine.scheduler, model=self.model, device=str(engine.device))

    def begin(self, scheduler: Scheduler, **facts) -> None:
        """Begin with the current state of the scheduler and its pool. No step may be in flight.
        facts: more fields of the first event."""
        self.log.open()
        self.recorder = Recorder(scheduler, self.log, self.decode, **facts)

    def close(self) -> None:
        """Write the remaining events, and detach from the scheduler. May be called again."""
        if self.recorder is not None:
            self.recorder.catch_up()
        self.end()
        self.log.close()

    def end(self) -> None:
        """Write no more events."""
        if self.recorder is not None:
            self.recorder.stop()
        self.recorder = None
        self.under_way.clear()

    # for users

    @property
    def events(self) -> list[dict]:
        """All events so far."""
        if self.engine is not None and self.recorder is not None:
            self.engine.guard.submit(self.recorder.catch_up)  # add events since the last step
        return self.log.events

    def page(self, path: str | Path) -> None:
        """Write the web page of the trace."""
        write_page(self.events, path)

    def chrome(self, path: str | Path) -> None:
        """Write the trace in the format of Chrome's trace viewer, which Perfetto opens."""
        write_chrome(self.events, path)

    def _repr_html_(self) -> str:
        """The page in a frame. For a large trace, how to write the page to a file."""
        num_bytes = self.log.num_bytes
        if num_bytes > MAX_NOTEBOOK_BYTES:
            return (
                f"<p>This trace has {num_bytes:,} bytes; a notebook shows at most "
                f"{MAX_NOTEBOOK_BYTES:,}. Write its page to a file with "
                "<code>.page(&quot;run.html&quot;)</code> and open that in a browser.</p>"
            )
        return make_frame(self.events)

    # hooks: they do nothing before `begin` and after `end`

    def on_queue(self, request: Request) -> None:
        if self.recorder is not None:
            self.recorder.arrive(request.sequences[0])

    def on_begin(self) -> None:
        self.outside_ms = self.end_phase()

    def on_plan(self, plan: Plan) -> None:
        if self.recorder is None:
            return
        schedule_ms = self.end_phase()
        step = 0
        if plan.chunks:
            step = next(self.step_numbers)
            self.under_way.append((step, {"outside": self.outside_ms, "schedule": schedule_ms}))
        self.recorder.begin_step(plan, step)

    def on_batch(self, plan: Plan, batch: Batch | HostBatch) -> None:
        self.note_phase("batch")

    def on_hidden(self, plan: Plan, hidden: Tensor) -> None:
        self.note_phase("forward")

    def on_sampled(self, plan: Plan, batch: Batch, logits: Tensor, token_ids: Tensor) -> None:
        self.note_phase("sample")

    def on_results(self, plan: Plan) -> None:
        if self.under_way:
            _, milliseconds = self.under_way[0]  # the oldest step: its results are read
            # a step that is computed in one call with others has no batch of its own
            phase = "wait" if "batch" in milliseconds else "forward"
            milliseconds[phase] = self.end_phase()

    def on_step(self, plan: Plan) -> None:
        if self.recorder is None or not self.under_way:
            return
        step, milliseconds = self.under_way.popleft()
        self.recorder.end_step(plan, step)
        milliseconds["update"] = self.end_phase()
        self.log.add("end", step=step, ms={name: milliseconds.get(name, 0.0) for name in PHASES})
        if not self.log.flush():
            self.end()
        if self.after_step is not None:
            self.after_step()

    def on_reset(self) -> None:
        self.under_way.clear()
        if self.recorder is not None:
            self.recorder.reset()

    def on_close(self) -> None:
        self.close()

    def end_phase(self) -> float:
        """Milliseconds since the last phase ended."""
        before = self.phase_start
        self.phase_start = time.perf_counter()
        return round(1000 * (self.phase_start - before), 3)

    def note_phase(self, name: str) -> None:
        """Assign the time since the last phase to this phase of the newest step."""
        if self.under_way:
            _, milliseconds = self.under_way[-1]
            milliseconds[name] = self.end_phase()


def current_trace(llm: LLM) -> Trace | None:
    """The trace of an engine that has not ended, or None."""
    for extension in llm.extensions:
        if isinstance(extension, Trace) and extension.recorder is not None:
            return extension
    return None


def make_trace(llm: LLM, path: str | Path | None) -> Trace:
    """Make a trace of an engine; `attach` begins it. If ranks share a model, one of them writes the
    file."""
    token_bytes = llm.tokenizer.token_bytes
    is_other_rank = llm.ranks is not None and llm.ranks.rank > 0
    return Trace(
        path=os.devnull if path and is_other_rank else path,
        decode=lambda token_id: token_bytes(token_id).decode("utf-8", "surrogateescape"),
        model=llm.name,
    )


def attach(llm: LLM, trace: Trace) -> None:
    """Begin a trace of an engine. Raises ValueError if the engine has a trace already."""
    present = current_trace(llm)
    if present is not None:
        raise ValueError(f"the engine has a trace already, to {present.path or 'memory'}: end it")
    llm.add_extension(trace)


def detach(llm: LLM, trace: Trace) -> None:
    """End a trace of an engine, after the steps in flight have ended."""
    try:
        if trace.recorder is not None:
            llm.guard.perform(partial(drain_and_close, llm, trace))
    finally:
        trace.close()
        if not llm.guard.is_closed:
            llm.remove_extension(trace)


def drain_and_close(llm: LLM, trace: Trace) -> None:
    llm.loop.drain()
    trace.close()


@contextmanager
def tracing(llm: LLM, path: str | Path | None = None) -> Iterator[Trace]:
    """Trace the engine in the body of a `with` statement. path: a file to write; None: keep the
    events in memory. Raises ValueError if the engine has a trace already."""
    trace = make_trace(llm, path)
    try:
        attach(llm, trace)
        yield trace
    finally:
        detach(llm, trace)
