"""Callers in event loops: one thread runs the steps for all of them.

    event loops                                     stepping thread
    requests are prepared in a worker thread
    a Call is added           ------------------>   queues its requests
                                                    runs a step for the requests of all callers
    `async for` continues     <------------------   puts the news into Call.items, wakes the loop
    the Call is left early    ------------------>   aborts its requests

An event loop never waits for a step, nor for a lock that is held during one. The thread starts with
the first call, and ends as soon as no call is left. Threads that call `generate` or `stream` run
steps too, and all requests share the same batches.

A consumer may be slower than the engine. Then MOST_ITEMS events wait for it, and no further ones
are made: what the next event says grows instead, since it has all text since the last one. So the
memory of a slow consumer is bounded, nothing is lost, and the other consumers do not wait.
"""

import asyncio
import atexit
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import takewhile

from ..engine import LLM, Request, RequestOutput

MOST_ITEMS = 16  # events of a call that wait for its consumer before they are merged
EXIT_SECONDS = 10  # the interpreter waits so long, at its end, for a step that is under way

_threads: set[threading.Thread] = set()  # those that run steps in this process
_is_ending = threading.Event()  # is the interpreter at its end?

# gives what is new about these requests since it was called last
Reader = Callable[[Iterable[Request]], list]


def read_nothing(requests: Iterable[Request]) -> list:
    """The Reader of a call that waits for outputs only."""
    return []


class Call:
    """Requests for which a task waits: an asynchronous iterator over their news.

    It is made in the event loop, which also iterates. The stepping thread calls `deliver` and
    `fail`. requests: all of the call; read: see Reader, it runs in the stepping thread.
    """

    def __init__(self, requests: list[Request], read: Reader = read_nothing):
        self.pending = deque(requests)  # the first one that may have news, and all that follow
        self.items: deque = deque()  # news that the consumer has not taken yet
        self.is_queued = False  # does the engine know the requests?
        self.is_over = not requests  # no items will follow
        self.is_left = False  # the consumer wants no more
        self.error: BaseException | None = None  # why there are no more
        self._read = read
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._is_waking = (
            False  # a wake-up is on its way: a loop that is blocked gets one, not many
        )

    # in the event loop

    def __aiter__(self) -> "Call":
        return self

    async def __anext__(self):
        while True:
            is_over = self.is_over  # read before the items: the last ones come before it is set
            if self.items:
                return self.items.popleft()
            if is_over:
                if self.error is not None:
                    raise self.error
                raise StopAsyncIteration
            await self._arrived.wait()
            self._arrived.clear()
            self._is_waking = False

    # in the stepping thread

    def is_abandoned(self) -> bool:
        """Has the consumer left, or its event loop been closed?"""
        return self.is_left or self._loop.is_closed()

    def is_done(self) -> bool:
        """Has each request its output?"""
        return all(request.output is not None for request in self.pending)

    def deliver(self) -> None:
        """Hand over what is new. While too much waits, only the end is."""
        is_done = self.is_done()
        if not is_done and len(self.items) >= MOST_ITEMS:
            return
        num_done = len([*takewhile(lambda request: request.output is not None, self.pending)])
        news = self._read(self.pending)
        for _ in range(num_done):
            self.pending.popleft()
        self.items.extend(news)
        self.is_over = is_done
        if news or is_done:
            self._wake()

    def fail(self, error: BaseException) -> None:
        """End the call by an exception, which its consumer gets after what arrived before."""
        self.error = error
        self.is_over = True
        self._wake()

    def _wake(self) -> None:
        if self._is_waking:
            return
        self._is_waking = True
        try:
            self._loop.call_soon_threadsafe(self._arrived.set)
        except RuntimeError:  # the loop was closed in this moment
            self.is_left = True


@atexit.register
def end_threads() -> None:
    """End the stepping threads after their present step: a daemon thread that is in a function of
    C++ when the interpreter goes ends the process by a signal."""
    _is_ending.set()
    for thread in [*_threads]:
        thread.join(EXIT_SECONDS)


class Stepper:
    """The thread that runs the steps of an engine for all of its calls, while there are any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of the next two; never held during a step
        self._new: list[Call] = []  # calls that the thread has not seen yet
        self._thread: threading.Thread | None = None

    def add(self, llm: LLM, call: Call) -> None:
        """Have the call's requests served. Raises RuntimeError if no thread can be started."""
        with self._lock:
            self._new.append(call)
            if self._thread is not None:
                return
            # it keeps the engine alive, and this object must not: an engine has no cycle
            thread = threading.Thread(
                target=self._run, args=(llm,), name="microvllm steps", daemon=True
            )
            self._thread = thread
            try:
                thread.start()
            except BaseException:
                self._new.remove(call)
                self._thread = None
                raise

    def join(self) -> None:
        """Wait for the end of the thread, after the engine was closed."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self, llm: LLM) -> None:
        """What the thread does. An exception of a step ends the calls that wait now; later calls
        are served."""
        calls: list[Call] = []
        _threads.add(threading.current_thread())
        while self._take(calls) and not _is_ending.is_set():
            try:
                run_turn(llm, calls)
            except BaseException as error:
                end_calls(calls, error)
        _threads.discard(threading.current_thread())

    def _take(self, calls: list[Call]) -> bool:
        """Add the new calls to the thread's own; False, and the thread ends, if there are none."""
        with self._lock:
            calls.extend(self._new)
            self._new.clear()
            if not calls and self._thread is threading.current_thread():
                self._thread = None
            return bool(calls)


def run_turn(llm: LLM, calls: list[Call]) -> None:
    """Drop calls that are over or left, with what they have unfinished; queue the requests of new
    ones; run a step for all, and hand over its news."""
    waiting = []
    for call in calls:
        if call.is_over or call.is_abandoned():
            request_ids = [request.id for request in call.pending] if call.is_queued else []
            call.pending.clear()
            llm.abort(*request_ids)
            continue
        waiting.append(call)
        if not call.is_queued:
            call.is_queued = True
            with failing(call):
                llm._queue([*call.pending])
    calls[:] = waiting
    if calls:
        llm._step()
    deliver_news(calls)


def deliver_news(calls: list[Call]) -> None:
    """Hand over what is new to the calls that wait; an exception in one's reader is its own."""
    for call in calls:
        if not call.is_over and not call.is_abandoned():
            with failing(call):
                call.deliver()


def end_calls(calls: list[Call], error: BaseException) -> None:
    """Give the exception to each call that waits, but for those that have all of their outputs:
    these need no step."""
    deliver_news(calls)
    for call in calls:
        if not call.is_over:
            call.fail(error)


@contextmanager
def failing(call: Call) -> Iterator[None]:
    """An exception inside ends this call, and no other one."""
    try:
        yield
    except BaseException as error:
        call.fail(error)


class AsyncLLM(LLM):
    """An engine that is called from event loops, any number of them, and from threads meanwhile."""

    def _assemble(self, *args, **options) -> None:
        super()._assemble(*args, **options)
        self._stepper = Stepper()

    @contextmanager
    def serve_async(self, requests: list[Request], read: Reader = read_nothing) -> Iterator[Call]:
        """Serve requests that were made with owned=True: `_steps` for event loops. The context is
        an asynchronous iterator over what `read` gives after a step. To leave it before its end, as
        a cancelled task does, aborts what is unfinished."""
        call = Call(requests, read)
        if requests:
            self._stepper.add(self, call)
        try:
            yield call
        finally:
            # no more than this: the garbage collector may end a coroutine anywhere, under any lock
            call.is_left = True

    async def agenerate(self, prompts, sampling_params=None, **options) -> list[RequestOutput]:
        """`generate` for event loops, with its arguments but for use_tqdm. To cancel it aborts the
        requests. Raises what `generate` raises."""
        prepare = partial(self._prepare, prompts, sampling_params, **options)
        requests = await asyncio.to_thread(prepare)
        with self.serve_async(requests) as call:
            async for _ in call:
                pass
        return [request.output for request in requests]

    async def astream(
        self, prompts, sampling_params=None, **options
    ) -> AsyncIterator[RequestOutput]:
        """`stream` for event loops, with its arguments and events. A consumer that is slower than
        the engine gets fewer and longer pieces. To leave the loop early, to close the generator
        (`aclose`) or to cancel the task aborts what is unfinished."""
        prepare = partial(self._prepare, prompts, sampling_params, streamed=True, **options)
        requests = await asyncio.to_thread(prepare)
        index = {request.id: i for i, request in enumerate(requests)}

        def read(pending: Iterable[Request]) -> list[RequestOutput]:
            try:
                news = self._news(pending)
            except RuntimeError:
                if self.runner is not None:
                    raise
                news = LLM._news(self, pending)  # closed: nothing changes while this looks
            return [RequestOutput(index=index[request.id], **event) for request, event in news]

        with self.serve_async(requests, read) as call:
            async for event in call:
                yield event

    async def achat(self, messages, sampling_params=None, **options) -> list[RequestOutput]:
        """`chat` for event loops, with its arguments but for use_tqdm."""
        if "tools" in self.request_options:
            options.setdefault("tools", True)  # as `chat` has it
        prompts = await asyncio.to_thread(self._render, messages)
        return await self.agenerate(prompts, sampling_params, **options)

    def warm(self) -> None:
        """Compile or load the kernels, and answer two tiny requests, so that the first request of
        a server waits for neither. It takes as long as these do: half a minute once on a machine
        with a CPU, then about a second. Call it before the event loop starts, or in it as
        `await asyncio.to_thread(llm.warm)`. The requests count in `stats`."""
        blocks = self.scheduler.blocks
        room = blocks.num_usable // blocks.width * blocks.block_size
        length = max(1, min(32, room - 1, self.max_model_len - 2))
        limits = {"max_tokens": min(2, room), "seed": 0, "ignore_eos": True}
        params = [
            self.params_class(temperature=0.0, **limits),
            self.params_class(temperature=1.0, top_k=2, **limits),
        ]
        prompt = [self.tokenizer.bos_id] * length
        self.generate([prompt, prompt], params, use_tqdm=False)

    def close(self) -> None:
        """As in the core; what tasks wait for ends with the finish_reason "abort"."""
        super().close()
        self._stepper.join()


PARTS = {"llm": AsyncLLM}
