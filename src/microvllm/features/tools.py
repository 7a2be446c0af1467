"""Tools that a model calls: functions of a user, and nanochat's calculator (calculator.py).

A model calls a tool by writing a text between two marks. The tool's result follows the call, as
forced tokens between two other marks, and the model continues from there:

    token drawn           ... <|python_start|> 4 5 + 5 4 <|python_end|>
    tokens forced                                         <|output_start|> 9 9 <|output_end|>
    mask                  ... 1                3         1                0
    text of the output    ... `                45+54     ` =               99

The text of a call is decoded from its tokens, and the text of a result is encoded once. No token
is decoded and encoded again.

A slow function runs in a thread, while other samples decode. Meanwhile its sequence is paused, and
keeps its blocks unless other sequences need them:

    sample A   | step | step | call ........................ answer | step | step |
    sample B   | step | step | step | step | step | step | step | step | step | step |
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from collections.abc import Sequence as List
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

from ..engine import Request
from ..runner import Extension, Watcher
from ..sampler import SamplingParams
from ..scheduler import Plan, Sequence
from ..tokenizer import TextStream, Tokenizer
from . import check_list, check_number

log = logging.getLogger("microvllm")

# nanochat's four marks of a call, and the characters that replace them in a text: `45+54` = 99
MARKS = {
    "<|python_start|>": "`",
    "<|python_end|>": "`",
    "<|output_start|>": " = ",
    "<|output_end|>": " ",
}
MAX_ERROR = 200  # characters of an exception in the text
CHARACTERS_PER_TOKEN = 64  # a longer result is cut before it is encoded
CANCEL_SECONDS = 1.0  # time for coroutines to end when the engine is closed
WAIT_SECONDS = 0.02  # longest wait of a step while all sequences wait for tools

Mark = str | List[int]
Result = str | List[int] | None
ToolFunction = Callable[[str], Result | Awaitable[Result]]


class ToolRequest(NamedTuple):
    """The sample for which a session begins."""

    request_id: int
    prompt_token_ids: List[int]
    params: SamplingParams
    sample: int  # index among the request's samples
    seed: int  # of the request; seed and `sample` together can seed a session


class ToolSession:
    """A function with a state, for the calls of one sample. Tool.begin may return one."""

    def __call__(self, call: str) -> Result | Awaitable[Result]:
        """The result of a call: a text, token ids, or None, which adds nothing to the text."""
        raise NotImplementedError

    def close(self) -> None:
        """Called once, between two steps, when the sample has ended or a call took too long. A call
        may still run. This must return quickly."""


@dataclass(eq=False, kw_only=True)
class Tool:
    """A tool: `llm.generate(prompts, params, tools=[Tool(name="clock", function=get_time)])`.

    name: of the tool, in output["tool_calls"] and in errors.
    function: takes the text of a call, and returns its result: a text, token ids, or None, which
        adds nothing. It may be a coroutine function; all coroutines run in one event loop, other
        functions in threads. An exception is a result, too: the text "error: ", its type and its
        message. A subclass may override `begin` instead, for one function per sample.
    call_start, call_end: the marks around a call. Each is the name of a special token, or a list of
        token ids.
    result_start, result_end: marks that are forced around a result; () for no mark.
    timeout: seconds after which the result of a call is an error. A thread cannot be ended: it
        continues, and its return value is dropped. A coroutine is cancelled.
    max_result_tokens: the result is cut to this number of tokens, not counting its marks.
    max_concurrent: the largest number of calls of this tool that run at once. Further calls wait,
        and their timeout begins when they run.
    is_inline: whether the function runs within the step, for functions that take microseconds. It
        has no time limit, and is called a second time after an exception.

    Raises TypeError or ValueError, with the name of the argument.
    """

    name: str
    function: ToolFunction | None = None
    call_start: Mark = "<|python_start|>"
    call_end: Mark = "<|python_end|>"
    result_start: Mark = "<|output_start|>"
    result_end: Mark = "<|output_end|>"
    timeout: float = 30.0
    max_result_tokens: int = 256
    max_concurrent: int = 64
    is_inline: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"name must be a text, got {self.name!r:.80}")
        has_begin = type(self).begin is not Tool.begin
        if not callable(self.function) and not has_begin:
            raise TypeError(f"function of tool {self.name!r} must be callable: {self.function!r}")
        if self.is_inline and inspect.iscoroutinefunction(self.function):
            raise ValueError(f"is_inline of tool {self.name!r}: a step cannot wait for a coroutine")
        self.timeout = check_number("timeout", self.timeout, 0.001, threading.TIMEOUT_MAX)
        for name in ("max_result_tokens", "max_concurrent"):
            check_number(name, vars(self)[name], 1)

    def begin(self, request: ToolRequest) -> ToolFunction | ToolSession:
        """The function that answers the calls of one sample. Called before the sample's first call,
        in the same thread; an exception is the result of that call."""
        return self.function


class Marks(NamedTuple):
    """The marks of a tool as token ids."""

    call_start: tuple[int, ...]
    call_end: tuple[int, ...]
    result_start: tuple[int, ...]
    result_end: tuple[int, ...]


def find_marks(tool: Tool, tokenizer: Tokenizer) -> Marks:
    """The marks of a tool. Raises ValueError if the tokenizer lacks one, or if call_start or
    call_end is empty."""
    marks = []
    for name in Marks._fields:
        mark = vars(tool)[name]
        where = f"{name} of tool {tool.name!r}"
        if isinstance(mark, str):
            if mark not in tokenizer.special_tokens:
                known = ", ".join(tokenizer.special_tokens)
                remedy = f"give token ids, or one of {known}"
                raise ValueError(f"{where} is {mark!r:.80}, which is no special token: {remedy}")
            marks.append((tokenizer.special_tokens[mark],))
            continue
        token_ids = check_list(where, mark)
        if max(token_ids, default=0) >= tokenizer.vocab_size:
            size = tokenizer.vocab_size
            raise ValueError(f"{where} {token_ids} is outside the vocabulary of {size}")
        if not token_ids and name.startswith("call"):
            raise ValueError(f"{where} is empty: give the token ids between which a call is")
        marks.append(token_ids)
    return Marks(*marks)


class CallReader:
    """Finds the calls of a tool among the tokens of one sample. As in nanochat, a sample begins
    outside a call, whatever its prompt contains, and a start mark inside a call restarts it."""

    def __init__(self, marks: Marks):
        self.start = list(marks.call_start)
        self.end = list(marks.call_end)
        self.latest: list[int] = []  # tokens, as many as the start mark has
        self.call_ids: list[int] | None = None  # of the open call; None outside of one

    def push(self, token_id: int) -> list[int] | None:
        """Read the next token. Returns the token ids of the call that it completes, if any."""
        self.latest = [*self.latest, token_id][-len(self.start) :]
        if self.latest == self.start:
            self.call_ids = []
            return None
        if self.call_ids is None:
            return None
        self.call_ids.append(token_id)
        if self.call_ids[-len(self.end) :] != self.end:
            return None
        call_ids = self.call_ids[: -len(self.end)]
        self.call_ids = None
        return call_ids


@dataclass(eq=False)
class Call:
    """One call of a tool, from its last token on."""

    tool: Tool
    marks: Marks
    text: str
    is_done: bool = False
    result: Result = None
    has_failed: bool = False
    thread: threading.Thread | None = None
    deadline: float = float("inf")  # time.monotonic()
    coroutine: Future | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def finish(self, result: Result, has_failed: bool = False) -> None:
        """Set the result, unless it is set already."""
        with self.lock:
            if self.is_done:
                return
            self.result = result
            self.has_failed = has_failed
            self.is_done = True  # last, because other threads read it without the lock

    def fail(self, error: BaseException) -> None:
        """Make an exception the result."""
        try:
            message = str(error)[:MAX_ERROR]
        except Exception:  # of its __str__
            message = ""
        self.finish(f"error: {type(error).__name__}: {message}".rstrip(": "), has_failed=True)

    def cancel(self) -> None:
        """Drop the result, and cancel the coroutine."""
        self.finish(None)
        if self.coroutine is not None:
            self.coroutine.cancel()

    def output_ids(self, tokenizer: Tokenizer) -> list[int]:
        """The tokens that are forced after the call."""
        result = self.result
        if result is None:
            return []
        limit = self.tool.max_result_tokens
        if isinstance(result, str):
            result = tokenizer.encode(result[: limit * CHARACTERS_PER_TOKEN])
        return [*self.marks.result_start, *result[:limit], *self.marks.result_end]

    def shown_result(self, tokenizer: Tokenizer) -> str | None:
        """The result as a text, for the output."""
        if self.result is None or isinstance(self.result, str):
            return self.result
        return tokenizer.decode(self.result)


@dataclass(eq=False)
class SampleTools:
    """The sessions and the calls of one sample. They are kept after an error, when all tokens are
    read again, so that no tool is called twice."""

    request: ToolRequest
    is_named: bool  # whether outputs have the name of the tool
    calls: dict[int, Call] = field(default_factory=dict)  # by the number of tokens before a result
    sessions: dict[Tool, ToolFunction | ToolSession] = field(default_factory=dict)

    def answer(self, call: Call) -> Result | Awaitable[Result]:
        """Call the tool's function for this sample. The first call begins its session."""
        session = self.sessions.get(call.tool)
        if session is None:
            session = call.tool.begin(self.request)
            with call.lock:
                is_late = call.is_done
                if not is_late:
                    self.sessions[call.tool] = session
            if is_late:  # the call was cancelled, and `close` was called before the session existed
                close_session(call.tool, session)
                return None
        return session(call.text)

    def close(self, tool: Tool) -> None:
        """End the session of a tool; a later call begins another one."""
        close_session(tool, self.sessions.pop(tool, None))


def close_session(tool: Tool, session: ToolFunction | ToolSession | None) -> None:
    """End a ToolSession; functions have nothing to end. An exception is logged."""
    if isinstance(session, ToolSession):
        try:
            session.close()
        except Exception:
            log.exception("tool %r: the session did not close", tool.name)


class BackgroundCalls:
    """Runs calls while steps are computed: functions in threads, coroutines in one event loop."""

    def __init__(self) -> None:
        self.progress = threading.Condition()
        self.loop: asyncio.AbstractEventLoop | None = None

    def start(self, call: Call, sample: SampleTools, vocab_size: int) -> None:
        """Start a call and its timeout."""
        call.deadline = time.monotonic() + call.tool.timeout
        call.thread = threading.Thread(
            target=self.run,
            args=(call, sample, vocab_size),
            name=f"microvllm tool {call.tool.name}",
            daemon=True,
        )
        try:
            call.thread.start()
        except RuntimeError as error:  # the system has no more threads
            call.fail(error)

    def run(self, call: Call, sample: SampleTools, vocab_size: int) -> None:
        """Call the function, in the thread of the call."""
        try:
            result = sample.answer(call)
            if inspect.isawaitable(result):
                self.run_coroutine(call, result, vocab_size)
                return
            call.finish(check_result(call.tool, result, vocab_size))
        except BaseException as error:  # the thread is the tool's: SystemExit ends only the call
            call.fail(error)
        self.notify()

    def run_coroutine(self, call: Call, result: Awaitable[Result], vocab_size: int) -> None:
        """Let the event loop complete a call."""

        async def complete() -> None:
            try:
                call.finish(check_result(call.tool, await result, vocab_size))
            except BaseException as error:
                call.fail(error)
            self.notify()

        call.coroutine = asyncio.run_coroutine_threadsafe(complete(), self.open_loop())

    def open_loop(self) -> asyncio.AbstractEventLoop:
        """The event loop, in a thread of its own."""
        with self.progress:
            if self.loop is None:
                self.loop = asyncio.new_event_loop()
                thread = threading.Thread(
                    target=run_loop, args=(self.loop,), name="microvllm tools", daemon=True
                )
                thread.start()
                weakref.finalize(self, stop_loop, self.loop)
            return self.loop

    def notify(self) -> None:
        """Wake a step that waits for results."""
        with self.progress:
            self.progress.notify_all()

    def wait(self, seconds: float, calls: Iterable[Call]) -> None:
        """Wait until one of the calls has its result, at most this number of seconds."""
        with self.progress:
            self.progress.wait_for(lambda: any(call.is_done for call in calls), seconds)

    def stop(self) -> None:
        """End the event loop."""
        with self.progress:
            if self.loop is not None:
                stop_loop(self.loop)
                self.loop = None


def run_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Run an event loop, in its thread."""
    loop.run_forever()
    loop.close()


def stop_loop(loop: asyncio.AbstractEventLoop) -> None:
    """End an event loop that runs in another thread, and cancel its coroutines."""

    async def end() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=CANCEL_SECONDS)
        loop.stop()

    if loop.is_running():
        asyncio.run_coroutine_threadsafe(end(), loop)


def check_result(tool: Tool, result: object, vocab_size: int) -> Result:
    """Check a tool's result. Raises TypeError or ValueError for anything but a text, token ids or
    None."""
    if result is None or isinstance(result, str):
        return result
    token_ids = check_list(f"the result of tool {tool.name!r}", result)
    unknown = [token_id for token_id in token_ids if token_id >= vocab_size]
    if unknown:
        raise ValueError(f"token ids {unknown[:3]} are outside the vocabulary of {vocab_size}")
    return list(token_ids)


class ToolCalling(Extension):
    """Runs the tools of requests: tools=True, the default tools, or tools=[...].

    Where the marks are special tokens, the text shows each call and its result as `45+54` = 99, and
    stop strings are searched in that text. The output of each sample lists its calls in
    "tool_calls": {"call": "45+54", "result": "99"}, with the tool's name in "tool" if the request
    has a list of tools. The result is complete, even if the sample ended before all of it was
    written. It is None if the tool returned none.

    default_tools: the tools of tools=True. A tool is not called if the tokenizer lacks its marks.
    is_alone: False for one of several ranks. All ranks must have the same tokens, so their tools
    must be inline.
    """

    options = ("tools",)

    def __init__(self, default_tools: Iterable[Tool] = (), is_alone: bool = True):
        self.default_tools = tuple(default_tools)
        self.is_alone = is_alone
        # the last tokens of calls: a result follows them, so a draft must not go beyond them
        self.end_ids: set[int] = set()
        self.background = BackgroundCalls()
        self.samples: WeakKeyDictionary[Sequence, SampleTools] = WeakKeyDictionary()
        self.pending: dict[Sequence, Call] = {}  # paused sequences, and their open calls

    def attach(self, engine) -> None:
        super().attach(engine)
        for tool in self.default_tools:
            if self.can_call(tool):
                self.end_ids.add(find_marks(tool, engine.tokenizer).call_end[-1])

    def can_call(self, tool: Tool) -> bool:
        """Does the tokenizer have all marks of a default tool?"""
        special_tokens = self.engine.tokenizer.special_tokens
        return all(vars(tool)[name] in special_tokens for name in Marks._fields)

    def tools_of(self, request: Request) -> List[Tool]:
        """The tools of a request. Raises TypeError if the option is not a list or a bool."""
        tools = request.options.get("tools") or ()
        if tools is True:
            return [tool for tool in self.default_tools if self.can_call(tool)]
        if isinstance(tools, (str, bytes)) or not isinstance(tools, Iterable):
            raise TypeError(f"tools must be True, False or a list of Tool, got {tools!r:.80}")
        return list(tools)

    def on_request(self, request: Request) -> None:
        tools = self.tools_of(request)
        if request.options.get("tools"):
            request.needs_text = True
            if request.options["tools"] is not True:
                request.options["tools"] = tools
        starts = set()
        for tool in tools:
            if not isinstance(tool, Tool):
                raise TypeError(f"tools must be a list of Tool, got {tool!r:.80} in it")
            if not self.is_alone and not tool.is_inline:
                raise ValueError(
                    f"tool {tool.name!r}: with tensor_parallel, is_inline must be True"
                )
            marks = find_marks(tool, self.engine.tokenizer)
            if marks.call_start in starts:
                raise ValueError(f"tool {tool.name!r} has the call_start of another tool")
            starts.add(marks.call_start)
            self.end_ids.add(marks.call_end[-1])

    def watch(self, request: Request, seq: Sequence, text: TextStream) -> Watcher | None:
        if not request.options.get("tools"):
            return None
        tools = self.tools_of(request)
        if seq not in self.samples:
            tool_request = ToolRequest(request.id, request.prompt, seq.params, seq.index, seq.seed)
            is_named = request.options["tools"] is not True
            self.samples[seq] = SampleTools(tool_request, is_named)
        marks = [find_marks(tool, self.engine.tokenizer) for tool in tools]
        text.decoder = ToolDecoder(self.engine.tokenizer, marks)
        return CallWatcher(self, self.samples[seq], dict(zip(tools, marks, strict=True)))

    # a call

    def serve(self, seq: Sequence, call: Call) -> None:
        """Write the result of the call that a sequence ends with, or pause the sequence."""
        if call.tool.is_inline and not call.is_done:
            self.answer_inline(seq, call)
        if call.is_done:
            self.engine.scheduler.force(seq, call.output_ids(self.engine.tokenizer))
        else:
            self.engine.scheduler.pause(seq)
            self.pending[seq] = call

    def answer_inline(self, seq: Sequence, call: Call) -> None:
        """Call the function of an inline tool. An exception that it raises twice is the result. One
        that it raises only once came from outside, for example from a signal handler."""
        vocab_size = self.engine.tokenizer.vocab_size
        sample = self.samples[seq]
        try:
            result = check_result(call.tool, sample.answer(call), vocab_size)
        except Exception:
            try:
                check_result(call.tool, sample.answer(call), vocab_size)
            except Exception as error:
                call.fail(error)
                return
            raise
        call.finish(result)

    def on_begin(self) -> None:
        if self.pending:
            self.advance_calls()

    def advance_calls(self) -> None:
        """Start calls that wait, and write the results of calls that have ended."""
        now = time.monotonic()
        has_news = False
        running = Counter(call.tool for call in self.pending.values() if is_running(call, now))
        for seq, call in list(self.pending.items()):
            if seq.finish_reason is not None:
                del self.pending[seq]  # on_output cancels its call
            elif call.is_done or now > call.deadline:
                # else a step in flight has drawn a token after the call: loops/ahead.py
                if seq.token_ids[-1] >= 0:
                    self.write_result(seq, call)
                    has_news = True
            elif call.thread is None and running[call.tool] < call.tool.max_concurrent:
                running[call.tool] += 1
                sample = self.samples[seq]
                self.background.start(call, sample, self.engine.tokenizer.vocab_size)
        if has_news:
            self.engine.collect_finished()

    def write_result(self, seq: Sequence, call: Call) -> None:
        """Force the result of a call that has ended, and resume its sequence."""
        if not call.is_done:
            seconds = f"{call.tool.timeout:g} s"
            call.finish(f"error: no result within {seconds}", has_failed=True)
            call.cancel()
            # the call may still use it
            self.samples[seq].close(call.tool)
        token_ids = call.output_ids(self.engine.tokenizer)
        del self.pending[seq]
        if token_ids:
            self.engine.scheduler.force(seq, token_ids)
        if seq.finish_reason is None:
            self.engine.scheduler.resume(seq)
        self.engine.find_or_open_text(seq).read(seq)

    def on_plan(self, plan: Plan) -> None:
        if self.pending and not plan.chunks:  # there is nothing else to do
            nearest = min([call.deadline for call in self.pending.values()])
            seconds = min(WAIT_SECONDS, max(0.0, nearest - time.monotonic()))
            self.background.wait(seconds, list(self.pending.values()))

    # outputs, and the end

    def on_sample_output(self, request: Request, seq: Sequence, output: dict) -> None:
        output["tool_calls"] = []
        sample = self.samples.get(seq)
        if sample is None:
            return
        for call in sample.calls.values():
            entry = {"call": call.text, "result": call.shown_result(self.engine.tokenizer)}
            if sample.is_named:
                entry["tool"] = call.tool.name
            output["tool_calls"].append(entry)

    def on_output(self, request: Request, output: dict) -> None:
        for seq in request.sequences:
            sample = self.samples.get(seq)
            if sample is not None and seq.finish_reason is not None:
                self.pending.pop(seq, None)
                for call in sample.calls.values():
                    call.cancel()
                for tool in list(sample.sessions):
                    sample.close(tool)

    def on_reset(self) -> None:
        self.pending.clear()  # texts are read again next, which finds their calls

    def on_close(self) -> None:
        self.background.stop()


def is_running(call: Call, now: float) -> bool:
    """Is a call running, with time left?"""
    return call.thread is not None and not call.is_done and now <= call.deadline


class CallWatcher(Watcher):
    """Finds the calls in one sample."""

    def __init__(self, tool_calling: ToolCalling, sample: SampleTools, tools: dict[Tool, Marks]):
        self.tool_calling = tool_calling
        self.sample = sample
        self.tools = tools
        self.num_tokens = 0  # output tokens read so far
        self.begin_outside()

    def begin_outside(self) -> None:
        """Reset the readers, so that no call is open."""
        self.readers = {tool: CallReader(marks) for tool, marks in self.tools.items()}

    def on_token(self, seq: Sequence, token_id: int, new_text: str) -> None:
        self.num_tokens += 1
        length = seq.num_prompt + self.num_tokens
        if length - 1 in seq.forced:  # a result calls no tool
            return
        for tool, reader in self.readers.items():
            call_ids = reader.push(token_id)
            if call_ids is not None:
                self.serve(seq, length, tool, call_ids)
                self.begin_outside()
                return

    def serve(self, seq: Sequence, length: int, tool: Tool, call_ids: list[int]) -> None:
        """Serve the call at the end of the first `length` tokens of a sequence."""
        if length not in self.sample.calls:
            # special tokens decode to their names, so they spoil an expression, as in nanochat
            text = self.tool_calling.engine.tokenizer.decode(call_ids)
            self.sample.calls[length] = Call(tool, self.tools[tool], text)
        call = self.sample.calls[length]
        # after an error, all tokens are read again, and the result may be among them
        if length < len(seq.token_ids):
            return
        if seq.finish_reason is None:
            self.tool_calling.serve(seq, call)
        elif tool.is_inline and not call.is_done:  # no token can follow; the output lists the call
            self.tool_calling.answer_inline(seq, call)


class ToolDecoder:
    """A decoder that shows the calls and results of tools, if their marks are special tokens.
    all_marks: the marks of the tools."""

    def __init__(self, tokenizer: Tokenizer, all_marks: Iterable[Marks]):
        self.decoder = tokenizer.decoder()
        self.signs: dict[int, str] = {}
        for marks in all_marks:
            for mark, sign in zip(marks, MARKS.values(), strict=True):
                if len(mark) == 1 and mark[0] >= tokenizer.num_ordinary:
                    self.signs[mark[0]] = sign

    def push(self, token_id: int) -> str:
        """The characters that this token completes. A mark ends an unfinished character, and
        becomes the characters in MARKS."""
        if token_id in self.signs:
            return self.decoder.flush() + self.signs[token_id]
        return self.decoder.push(token_id)

    def flush(self) -> str:
        """The unfinished character at the end of the sequence."""
        return self.decoder.flush()
