"""The engine's methods for event loops. One thread runs the steps for all of them.

    event loops                                     stepping thread
    requests are prepared in a worker thread
    a Call is added           ------------------>   queues its requests
                                                    runs a step for the requests of all calls
    `async for` continues     <------------------   puts results into Call.items, wakes the loop
    the Call is left early    ------------------>   aborts its requests

An event loop never waits for a step, nor for a lock that is held during a step. The thread starts
with the first call, and ends when no calls are left. Threads that call `generate` or `stream` run
steps as well. All requests share the same batches.

A consumer may be slower than the engine. Then at most MAX_ITEMS events wait for it, and no further
events are made until it continues: the next event contains all text since the last one. So the
memory of a slow consumer is bounded, nothing is lost, and other consumers are not delayed.
"""

import asyncio
import atexit
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial

from ..engine import LLM, Request, RequestOutput

MAX_ITEMS = 16  # waiting events of a call, before further ones are merged
EXIT_SECONDS = 10  # at exit, the interpreter waits this long for a step in progress

stepping_threads: set[threading.Thread] = set()  # all that run in this process
is_ending = threading.Event()  # set when the interpreter exits

# returns the news about a call's requests since its last call
Reader = Callable[[], list]


def read_nothing() -> list:
    """The Reader of a call that only waits for outputs."""
    return []


class Call:
    """Requests that a task waits for, as an asynchronous iterator over their news.

    The event loop creates it and iterates over it. The stepping thread calls `deliver` and `fail`.
    requests: all requests of the call; read: see Reader, runs in the stepping thread.
    """

    def __init__(self, requests: list[Request], read: Reader = read_nothing):
        self.pending = deque(requests)  # the first one without an output, and all after it
        self.read = read
        self.items: deque = deque()  # news that the consumer has not taken yet
        self.is_queued = False  # whether the requests are in the engine
        self.is_over = not requests  # no items will follow
        self.is_left = False  # the consumer has left
        self.error: BaseException | None = None  # the reason if the call failed
        self.loop = asyncio.get_running_loop()
        self.arrived = asyncio.Event()
        self.is_waking = False  # a wake-up is scheduled: a blocked loop needs only one

    # in the event loop

    def __aiter__(self) -> "Call":
        return self

    async def __anext__(self):
        while True:
            is_over = self.is_over  # read before the items, since the last items come before it
            if self.items:
                return self.items.popleft()
            if is_over:
                if self.error is not None:
                    raise self.error
                raise StopAsyncIteration
            await self.arrived.wait()
            self.arrived.clear()
            self.is_waking = False

    # in the stepping thread

    def is_abandoned(self) -> bool:
        """Return whether the consumer has left or its event loop is closed."""
        return self.is_left or self.loop.is_closed()

    def deliver(self) -> None:
        """Deliver the news. If too many items are waiting, deliver only the end of the call."""
        while self.pending and self.pending[0].output is not None:
            self.pending.popleft()
        is_done = not self.pending
        if not is_done and len(self.items) >= MAX_ITEMS:
            return
        news = self.read()
        self.items.extend(news)
        self.is_over = is_done
        if news or is_done:
            self.wake()

    def fail(self, error: BaseException) -> None:
        """End the call with an exception. Its consumer first gets the items that are waiting."""
        self.error = error
        self.is_over = True
        self.wake()

    def wake(self) -> None:
        """Let the event loop resume the consumer."""
        if self.is_waking:
            return
        self.is_waking = True
        try:
            self.loop.call_soon_threadsafe(self.arrived.set)
        except RuntimeError:  # the loop was closed at this moment
            self.is_left = True


@atexit.register
def end_threads() -> None:
    """End the stepping threads after their current step. A daemon thread that runs C++ code when
    the interpreter exits would end the process by a signal."""
    is_ending.set()
    for thread in list(stepping_threads):
        thread.join(EXIT_SECONDS)


class Stepper:
    """The thread that runs an engine's steps as long as there are calls."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # protects the next two; never held during a step
        self.new_calls: list[Call] = []  # not seen by the thread yet
        self.thread: threading.Thread | None = None

    def add(self, engine: LLM, call: Call) -> None:
        """Serve the requests of a call. Raises RuntimeError if no thread can be started."""
        with self.lock:
            self.new_calls.append(call)
            if self.thread is not None:
                return
            # the thread holds the engine; this object does not, since that would be a cycle
            thread = threading.Thread(
                target=self.run, args=(engine,), name="microvllm steps", daemon=True
            )
            self.thread = thread
            try:
                thread.start()
            except BaseException:
                self.new_calls.remove(call)
                self.thread = None
                raise

    def join(self) -> None:
        """Wait for the end of the thread, after the engine was closed."""
        thread = self.thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def run(self, engine: LLM) -> None:
        """The thread's main function. An exception in a step ends all present calls; later calls
        are served."""
        calls: list[Call] = []
        stepping_threads.add(threading.current_thread())
        while self.take_new(calls) and not is_ending.is_set():
            try:
                serve_calls(engine, calls)
            except BaseException as error:
                end_calls(calls, error)
        stepping_threads.discard(threading.current_thread())

    def take_new(self, calls: list[Call]) -> bool:
        """Add new calls to the thread's list. If it stays empty, return False and end the
        thread."""
        with self.lock:
            calls.extend(self.new_calls)
            self.new_calls.clear()
            if not calls and self.thread is threading.current_thread():
                self.thread = None
            return bool(calls)


def serve_calls(engine: LLM, calls: list[Call]) -> None:
    """Drop calls that are over or left, and abort their unfinished requests. Queue the requests of
    new calls, run a step for all, and deliver the news."""
    waiting = []
    for call in calls:
        if call.is_over or call.is_abandoned():
            request_ids = [request.id for request in call.pending] if call.is_queued else []
            call.pending.clear()
            engine.abort(*request_ids)
            continue
        waiting.append(call)
        if not call.is_queued:
            call.is_queued = True
            with failing(call):
                engine.submit_requests(list(call.pending))
    calls[:] = waiting
    if calls:
        engine.guard.perform(engine.loop.advance)
    deliver_news(calls)


def deliver_news(calls: list[Call]) -> None:
    """Deliver the news to all calls that wait. An exception in a reader ends only its own call."""
    for call in calls:
        if not call.is_over and not call.is_abandoned():
            with failing(call):
                call.deliver()


def end_calls(calls: list[Call], error: BaseException) -> None:
    """Fail all calls that wait, except those that have all of their outputs and need no step."""
    deliver_news(calls)
    for call in calls:
        if not call.is_over:
            call.fail(error)


@contextmanager
def failing(call: Call) -> Iterator[None]:
    """Let an exception in the block end only this call."""
    try:
        yield
    except BaseException as error:
        call.fail(error)


class AsyncApi:
    """An engine's methods for event loops. Several loops and threads may use them at once."""

    def __init__(self, engine: LLM):
        self.get_engine = weakref.ref(engine)  # the engine holds this object: avoids a cycle
        self.stepper = Stepper()

    @contextmanager
    def serve_async(self, requests: list[Request], read: Reader = read_nothing) -> Iterator[Call]:
        """Serve requests that were made with is_owned=True: `LLM.serve` for event loops. The
        context manager returns an asynchronous iterator over the result of `read` after each step.
        Leaving it early, as a cancelled task does, aborts unfinished requests."""
        call = Call(requests, read)
        if requests:
            self.stepper.add(self.get_engine(), call)
        try:
            yield call
        finally:
            # nothing more here: the garbage collector may end a coroutine anywhere, under any lock
            call.is_left = True

    async def agenerate(self, prompts, sampling_params=None, **options) -> list[RequestOutput]:
        """`generate` for event loops, with its arguments except use_tqdm. Cancellation aborts the
        requests. Raises what `generate` raises."""
        engine = self.get_engine()
        prepare = partial(engine.make_requests, prompts, sampling_params, **options)
        requests = await asyncio.to_thread(prepare)
        with self.serve_async(requests) as call:
            async for _ in call:
                pass
        return [request.output for request in requests]

    async def astream(
        self, prompts, sampling_params=None, **options
    ) -> AsyncIterator[RequestOutput]:
        """`stream` for event loops, with the same arguments and events. A consumer that is slower
        than the engine gets fewer, longer pieces. Leaving the loop early, closing the generator
        (`aclose`) or cancelling the task aborts unfinished requests."""
        engine = self.get_engine()
        prepare = partial(
            engine.make_requests, prompts, sampling_params, needs_text=True, **options
        )
        requests = await asyncio.to_thread(prepare)
        read = partial(new_events_now, engine, dict(enumerate(requests)))
        with self.serve_async(requests, read) as call:
            async for event in call:
                yield event

    async def achat(self, messages, sampling_params=None, **options) -> list[RequestOutput]:
        """`chat` for event loops, with its arguments except use_tqdm."""
        prompts = await asyncio.to_thread(self.get_engine().render_conversations, messages)
        return await self.agenerate(prompts, sampling_params, **options)

    def warm(self) -> None:
        """Compile or load the kernels, and answer two tiny requests, so that the first request of a
        server waits for neither. On a CPU the first run on a machine takes 15 to 60 seconds,
        later ones about a second. Call it before the event loop starts, or in the loop by `await
        asyncio.to_thread(llm.warm)`. The requests count in `stats`."""
        engine = self.get_engine()
        engine.guard.check_open()
        blocks = engine.scheduler.blocks
        # blocks_for(1): one token takes a block of each window group
        num_slots = blocks.pool.num_usable // blocks.blocks_for(1) * blocks.block_size
        prompt_length = max(1, min(32, num_slots - 1, engine.config.max_model_len - 2))
        limits = {"max_tokens": min(2, num_slots), "seed": 0, "ignore_eos": True}
        params = [
            engine.params_class(temperature=0.0, **limits),
            engine.params_class(temperature=1.0, top_k=2, **limits),
        ]
        prompt = [engine.tokenizer.bos_id] * prompt_length
        engine.generate([prompt, prompt], params, use_tqdm=False)

    def join(self) -> None:
        """Wait for the end of the stepping thread, after the engine was closed."""
        self.stepper.join()


def new_events_now(engine: LLM, unfinished: dict[int, Request]) -> list[RequestOutput]:
    """Return the events of a stream since the last call, even from a closed engine."""
    events: list[RequestOutput] = []
    try:
        engine.guard.perform(partial(engine.new_events_now, unfinished, events))
    except RuntimeError:
        if not engine.guard.is_closed:
            raise
    if engine.guard.is_closed:  # no other thread changes the state any more
        engine.new_events_now(unfinished, events)
    return events
