"""Nothing is lost, whoever calls the engine and whatever interrupts it.

Threads: whoever waits for a request runs steps, for the requests of all, one thread at a time.
Exceptions from outside (a signal's handler, PyThreadState_SetAsyncExc, no memory) may strike at any
instruction: if the last change of the books did not come to its end, they are made again before the
next one. Requests and aborts that come while a step is under way, from a policy, a user's function,
the garbage collector or another thread, wait for its end.
"""

import os
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ..engine import LLM, Request, RequestOutput, check_request_ids

pressed: list[bool] = []  # was Ctrl-C, since it was held back?


def hold(*_) -> None:
    """The handler of SIGINT inside `uninterrupted`."""
    pressed.append(True)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let a Ctrl-C take effect at the end only: of a step whose end is near nothing is lost, not
    even what is in the prefix cache. A handler of the user's own is left alone."""
    usual = signal.getsignal(signal.SIGINT) in (signal.default_int_handler, hold)
    ours = usual and threading.current_thread() is threading.main_thread()
    try:
        if ours:
            signal.signal(signal.SIGINT, hold)
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if pressed:  # also where the step raised: not in some later step
                pressed.clear()
                raise KeyboardInterrupt


class GuardLLM(LLM):
    """An engine that any thread may call at any time."""

    def _assemble(self, *args, **options) -> None:
        super()._assemble(*args, **options)
        self._lock, self._callers, self._pid = threading.RLock(), set(), os.getpid()
        self._changing: FrameType | None = None  # the call of `_try` that is under way, or was left
        # what arrived, and ids to abort: each is dropped once it is done, or fails twice
        self._inbox: deque[Request | tuple[int, ...]] = deque()
        self._latest = threading.local()  # requests: of the thread's last call, if it was left

    def _check(self, prompt, params) -> tuple:
        self._check_usable()
        return super()._check(prompt, params)

    def _check_usable(self) -> None:
        """Raises RuntimeError for an engine that was closed, or that another process has made."""
        if self.runner is None:
            raise RuntimeError("this LLM was closed: make a new one")
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"this LLM was made by process {self._pid}, whose threads a fork does not have: "
                "start processes with 'spawn' or 'forkserver', and make an LLM in each"
            )

    # changes of the books

    def _change(self, change: Callable[[], object]) -> None:
        if not self._try(change):
            raise RuntimeError(
                "a step cannot be asked for inside a step (in a logits_processor, a policy, a "
                "trace or a signal's handler): add_request, abort and stats can"
            )
        self._deliver()  # what came after the inbox was read

    def _try(self, change: Callable[[], object]) -> bool:
        """Change the books; False, and nothing done, inside another change by this thread."""
        self._check_usable()
        with self._lock:
            left, frame = self._changing, sys._getframe().f_back  # its own would be a cycle
            while left and frame:
                if frame is left:
                    return False
                frame = frame.f_back
            self._changing = sys._getframe()
            try:
                if left:  # by an exception, before the books were in order
                    self._recover()
                change()
            except BaseException as error:
                self._recover(error)
                self._changing = None
                raise
            self._changing = None
        return True

    def _read_inbox(self) -> None:
        """Do what the items of the inbox ask for. An item is dropped once it is done, or if it
        fails twice in a row: else each later call would fail with it. An exception that does not
        come again is from outside, and loses nothing."""
        while self._inbox:
            item = self._inbox[0]
            try:
                self._receive(item)
            except Exception as error:
                self._recover(error)
                try:
                    self._receive(item)
                except Exception as again:
                    self._inbox.popleft()
                    self._refuse(item, again)
                    raise
                self._inbox.popleft()
                raise
            self._inbox.popleft()

    def _receive(self, item: Request | tuple[int, ...]) -> None:
        """Abort the requests of these ids, or queue a request that is not here yet."""
        if isinstance(item, tuple):
            super().abort(*item)
        elif item.output is None and item.id not in self._requests:
            super()._queue([item])

    def _refuse(self, item: Request | tuple[int, ...], error: Exception) -> None:
        """End a request that cannot be queued: a caller may wait for its output."""
        if isinstance(item, Request) and item.output is None:
            self._requests[item.id] = item
            seq = item.samples[0]
            seq.finish_reason, seq.stop_reason = "error", f"{type(error).__name__}: {error}"
            self._finish(item)

    def _deliver(self) -> None:
        """Read the inbox, unless another thread is in a step: then that one does, at its end. To
        wait here could be for ever: the garbage collector aborts a stream under any lock."""
        if self.runner is None:  # closed: nobody is served any more
            self._inbox.clear()
        if self._inbox and self._lock._is_owned():
            self._try(self._read_inbox)
            return
        while self._inbox:
            try:
                if not self._lock.acquire(blocking=False):
                    return
                self._try(self._read_inbox)
            finally:
                try:
                    self._lock.release()
                except RuntimeError:  # another thread has it
                    pass

    def _queue(self, requests: list[Request]) -> None:
        self._check_usable()
        self._inbox.extend(requests)
        self._deliver()

    def _steps(self, requests: list[Request], *args) -> Iterator:
        """As in the core; what nobody wants is aborted even if an exception strikes the abort, and
        is kept, with its traceback: the generator itself is gone as soon as the call is left."""
        steps = super()._steps(requests, *args)
        weakref.finalize(steps, self.abort, *[request.id for request in requests])
        return steps

    def _run(self, requests: list[Request], use_tqdm: bool = False) -> list[RequestOutput]:
        self._latest.requests = requests  # from the beginning: an exception may come at any line
        outputs = super()._run(requests, use_tqdm)
        self._latest.requests = []
        return outputs

    def partial_outputs(self) -> list[RequestOutput]:
        """What a call of `generate`, `chat` or `judge` had made when an exception, such as a
        Ctrl-C, ended it: an output for each of its prompts, the unfinished ones with the
        finish_reason "abort" and the tokens that they had. [] if the last such call of this thread
        returned. Kept until the thread's next call, also by an engine that was closed."""
        requests: list[Request] = getattr(self._latest, "requests", [])
        outputs: list[RequestOutput] = self.list_class()

        def look() -> None:
            self._read_inbox()  # an abort may wait there for the end of another thread's step
            outputs.extend([self._output_so_far(request) for request in requests])

        if self.runner is None:
            outputs.extend([self._output_so_far(request) for request in requests])
        elif requests:
            self._change(look)
        return outputs

    def _output_so_far(self, request: Request) -> RequestOutput:
        if request.output is not None:
            return request.output
        if request.id not in self._requests:  # the exception came before it was queued
            for seq in request.samples:
                seq.finish_reason = "abort"
        return self.output_class(self.output(request))

    def abort(self, *request_ids: int) -> None:
        """As in the core; while a step is under way, at its end."""
        request_ids = check_request_ids(request_ids)  # now, and for the caller to see
        if request_ids and self.runner is not None:
            self._inbox.append(request_ids)
            self._deliver()

    # steps

    def _turn(self) -> None:
        if self._inbox:
            self._read_inbox()
        self._advance()
        if self._inbox:
            self._read_inbox()

    @uninterrupted()
    def _step(self, request: Request | None = None) -> None:
        """Run a step, or wait while other threads do, until the request has its output."""
        me = threading.get_ident()
        try:
            self._callers.add(me)
            with self._lock:
                self._callers.discard(me)
                if request is None or request.output is None:
                    self._change(self._turn)
        finally:
            self._callers.discard(me)
        self._deliver()  # what came before the lock was free
        if self._callers:
            time.sleep(1e-4)  # else this thread would take the lock again at once

    def step(self) -> list[RequestOutput]:
        """As in the core; an output is returned once, to the first thread that asks."""
        finished: dict[int, RequestOutput] = {}
        try:
            self._step()
            with self._lock:
                finished, self._finished = self._finished, {}
            return [*finished.values()]
        except BaseException:
            with self._lock:
                self._finished = finished | self._finished  # nobody got them
            raise

    def _news(self, requests) -> list:
        found: list = []  # texts grow while other threads run steps
        self._change(lambda: found.extend(super(GuardLLM, self)._news(requests)))
        return found

    def is_finished(self) -> bool:
        """As in the core."""
        self._deliver()  # what an exception kept in the inbox
        return not self._inbox and super().is_finished()

    def close(self) -> None:
        """As in the core; waits for the step of another thread."""
        if self.runner is not None:
            self.abort(*self._requests)
            self._change(super().close)


PARTS = {"llm": GuardLLM}
