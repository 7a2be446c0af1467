"""The tokens that may follow in a grammar: llguidance, in this process or in a helper process.

llguidance limits the size of its data, but not its time: `(a?){5000}a{5000}` needs seconds for one
token, and no signal is handled during this time. So grammars that may be expensive run in a helper
process. The system ends this process if it takes too much processor time or memory.

    Reader           the position of one text in a grammar: `allowed` reads tokens, returns a mask
    RemoteReader     the same, in a helper
    Helper           this process's connection to a helper: starts it, and restarts it if it ended
    Server           runs in the helper

The helper runs this file as a script. It imports nothing of the package, so it starts in less than
a tenth of a second. All of its state can be rebuilt: a helper that ended is replaced, and the new
one reads the tokens again.
"""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# llguidance's own limits: they bound a matcher's memory and, for small guides, the time
LIMITS = {
    "max_items_in_row": 2_000,
    "step_max_items": 50_000,
    "max_grammar_size": 100_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "max_lexer_states": 50_000,
    "precompute_large_lexemes": True,
    "verbose_errors": False,
}
# processor seconds in a helper: for a grammar and its first mask, and on average for each further
# token
PREPARE = 1.0
EACH = 0.01
MEMORY = 2**30  # bytes of address space of a helper
TIMED_OUT = -getattr(signal, "SIGPROF", 0) or 1  # exit status of a helper that took too long
REMEDY = "give smaller bounds, fewer properties or choices, no large multipleOf"


def llguidance():
    """Return the package. Raises ImportError with the install command."""
    try:
        import llguidance
    except ModuleNotFoundError:
        from ..environment import how_to_install  # a helper has the package, and skips this

        remedy = how_to_install("guided")
        raise ImportError(f"guide needs the package llguidance: {remedy}") from None
    return llguidance


def limits():
    """Return LIMITS in llguidance's form."""
    return llguidance().LLParserLimits(**LIMITS)


@contextmanager
def panics_named() -> Iterator[None]:
    """Convert a Rust panic, which is not an Exception, to a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        problem = f"llguidance cannot work with the guide: {first_line(str(error))}"
        raise ValueError(problem) from None


def check(grammar: str) -> None:
    """Raise ValueError with the problem of a grammar, if it has one."""
    validate = llguidance().LLMatcher.validate_grammar_with_warnings
    with panics_named():
        failed, messages = validate(grammar, limits=limits())
    if failed:
        raise ValueError(first_line(messages[0]))


def first_line(message: str) -> str:
    """Return the message of an llguidance error. For a regular expression it comes after a drawing
    of the position."""
    for line in message.splitlines():
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    return message.partition("\n")[0]


class Reader:
    """The position of one text in a grammar. matcher: llguidance's, at the start of the text; the
    reader works on a copy."""

    def __init__(self, matcher):
        self.start = matcher
        self.restart()

    def restart(self) -> None:
        """Go back to the start of the text."""
        self.matcher = self.start.deep_copy()
        self.read: list[int] = []  # tokens that the matcher has read

    def allowed(self, output: list[int]) -> tuple[int, bytes]:
        """Move to the end of these tokens. The last ones may differ from those of the previous
        call. Returns how many of them match, and a mask of the tokens that may follow: a bit for
        each token of the vocabulary, the lowest first. Raises ValueError if none may follow, or if
        a limit is reached."""
        num_kept = len(self.read)
        while self.read[:num_kept] != output[:num_kept]:  # a draft token was rejected
            num_kept -= 1
        with panics_named():
            self.matcher.rollback(len(self.read) - num_kept)
            num_new = self.matcher.try_consume_tokens(output[num_kept:])
            self.read = output[: num_kept + num_new]
            bits = self.matcher.compute_bitmask()
        error = self.matcher.get_error()
        if error:
            self.restart()  # the matcher is unusable now, and this may have been a draft token
            if error.startswith("NoExtension"):
                raise ValueError("no text fits the guide")
            raise ValueError(f"the guide is too complex here: {first_line(error)}")
        return len(self.read), bits


def open_grammar(tokenizer, grammar: str) -> Reader:
    """Return a reader at the start of a text. tokenizer: llguidance's. Raises ValueError for a
    grammar that no text matches, or that is too complex."""
    with panics_named():
        matcher = llguidance().LLMatcher(tokenizer, grammar, log_level=0, limits=limits())
    reader = Reader(matcher)
    Reader(matcher).allowed([])
    return reader


# in the helper ------------------------------------------------------------------------------------


def send(file, message: tuple) -> None:
    """Write a message of JSON values."""
    data = json.dumps(message).encode()
    file.write(len(data).to_bytes(8, "little") + data)
    file.flush()


def receive(file) -> list:
    """Read the next message. Raises EOFError if the other process has ended."""
    head = file.read(8)
    size = int.from_bytes(head, "little")
    data = file.read(size) if len(head) == 8 else b""
    if len(head) < 8 or len(data) < size:
        raise EOFError
    return json.loads(data)


class Words:
    """A vocabulary in llguidance's form. The other process encodes its texts."""

    def __init__(self, requests, answers, tokens: list[bytes], special: list[int], bos: int):
        self.requests = requests
        self.answers = answers
        self.tokens = tokens
        self.special_token_ids = special
        self.bos_token_id = bos
        self.eos_token_id = bos

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("text must be a string")
        send(self.answers, ("encode", text))
        return receive(self.requests)[0]


class Server:
    """The state of a helper, keyed by numbers from the other process."""

    def __init__(self, requests, answers):
        self.requests = requests
        self.answers = answers
        self.vocabularies: dict[int, object] = {}
        self.grammars: dict[int, Reader] = {}  # at the start of a text
        self.readers: dict[int, Reader] = {}
        self.seconds: dict[int, float] = {}  # time that each reader has used

    def run(self) -> None:
        """Answer messages (kind, number, ...) until there are no more. An answer is (None, result)
        or (error,)."""
        while True:
            kind, *arguments = receive(self.requests)
            try:
                answer = (None, getattr(self, kind)(*arguments))
            except ValueError as error:
                answer = (str(error),)
            except BaseException as error:  # also Rust's panics
                answer = (f"{error!r:.300}",)
            limit_time(None)
            send(self.answers, answer)

    def drop(self, *numbers: int) -> None:
        for number in numbers:
            self.vocabularies.pop(number, None)
            self.grammars.pop(number, None)
            self.readers.pop(number, None)
            self.seconds.pop(number, None)

    def check(self, number: int, grammar: str) -> None:
        limit_time(PREPARE)
        check(grammar)

    def vocabulary(self, number: int, tokens: list, special: list, bos: int, ends: list) -> None:
        tokens = [bytes.fromhex(token) for token in tokens]
        words = Words(self.requests, self.answers, tokens, special, bos)
        wrapper = llguidance().TokenizerWrapper(words)
        self.vocabularies[number] = llguidance().LLTokenizer(wrapper, eos_token=ends)

    def grammar(self, number: int, vocabulary: int, grammar: str) -> None:
        limit_time(PREPARE)
        self.grammars[number] = open_grammar(self.vocabularies[vocabulary], grammar)

    def allowed(self, number: int, grammar: int, output: list[int]) -> tuple[int, str]:
        start = time.process_time()
        before = self.seconds.get(number, 0)
        limit_time(PREPARE + EACH * len(output) - before)
        if number not in self.readers:
            self.readers[number] = Reader(self.grammars[grammar].start)
        num_read, bits = self.readers[number].allowed(output)
        self.seconds[number] = before + time.process_time() - start
        return num_read, bits.hex()


def limit_time(seconds: float | None) -> None:
    """End the process after this much more processor time; None removes the limit."""
    if hasattr(signal, "setitimer"):  # nothing catches SIGPROF here, so it ends the process
        signal.setitimer(signal.ITIMER_PROF, 0 if seconds is None else max(seconds, 0.001))
        return
    import faulthandler  # on Windows: wall-clock time

    faulthandler.cancel_dump_traceback_later()
    if seconds is not None:
        faulthandler.dump_traceback_later(max(10 * seconds, 1), exit=True)


def prepare_limits() -> None:
    """Let SIGPROF end this process, even if its parent ignores it, and limit its memory if the
    system supports that. The process leaves no core file."""
    if hasattr(signal, "pthread_sigmask"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        largest = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = MEMORY if largest == resource.RLIM_INFINITY else min(MEMORY, largest)
        resource.setrlimit(resource.RLIMIT_AS, (limit, largest))
    except (ImportError, OSError, ValueError):
        pass


def main() -> None:
    """Run as a helper: read messages from stdin, and write answers to stdout."""
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keeps output of libraries out of the answers
    try:
        sys.path[:] = receive(requests)[0]
        prepare_limits()
        Server(requests, answers).run()
    except (EOFError, OSError):  # the other process has ended
        pass


# in the process that uses a helper ----------------------------------------------------------------

numbers = itertools.count(1)  # identify vocabularies, grammars and readers in helpers


def end(process: subprocess.Popen, owner: int) -> None:
    """End a helper. A fork of the process that started it does nothing."""
    if os.getpid() == owner:
        process.kill()
        for pipe in (process.stdin, process.stdout):
            try:
                pipe.close()
            except OSError:  # the pipe has data that the helper did not read
                pass
        process.wait()


class Helper:
    """A helper process, started on first use. Threads may share it."""

    def __init__(self):
        self.lock = threading.RLock()
        self.process: subprocess.Popen | None = None
        self.is_ready = False  # False within a message, and after an exception there
        self.sent: set[int] = set()  # numbers of the objects in the process
        self.dropped: list[int] = []  # numbers of objects that it can delete
        self.stop: Callable[[], object] = lambda: None

    def ask(self, message: tuple, parts: tuple = (), encode: Callable | None = None):
        """Return the answer to a message. parts: messages that the helper must have received
        before; encode: a tokenizer's method. Raises ValueError with the helper's error, or if a
        limit ends it."""
        with self.lock:
            is_new = not self.is_ready
            try:
                error, *result = self._exchange(message, parts, encode)
            except (EOFError, OSError) as problem:
                limit_name = self._why_it_ended(problem)
                if not limit_name:
                    raise
                if is_new or limit_name == "time":
                    raise ValueError(too_complex(limit_name)) from None
                # other guides may have filled its memory
                return self.ask(message, parts, encode)
        if error is not None:
            raise ValueError(error)
        return result[0]

    def _start(self) -> None:
        """Start the process. Raises ValueError if that is impossible."""
        self.stop()
        self.sent.clear()
        if getattr(sys, "frozen", False):
            raise ValueError("the guide needs a helper process, but this program is not Python")
        command = [sys.executable or "python", "-I", os.path.abspath(__file__)]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C in the terminal is for the engine
            )
        except OSError as error:
            raise ValueError(f"the guide needs a helper process: {error}") from None
        self.stop = weakref.finalize(self, end, self.process, os.getpid())
        send(self.process.stdin, ([path for path in sys.path if path],))

    def _exchange(self, message: tuple, parts: tuple, encode: Callable | None) -> list:
        """Send the missing parts, and the message. Returns (None, result) or (error,)."""
        if not self.is_ready:
            self._start()
        self.is_ready = False
        answer: list = []
        dropped = [self.dropped.pop() for _ in range(len(self.dropped))]
        if dropped:
            self.sent.difference_update(dropped)
            answer = self._answer(("drop", *dropped), encode)
        for part in (*parts, message):
            if part is message or part[1] not in self.sent:
                answer = self._answer(part, encode)
                if answer[0] is not None:
                    break
                self.sent.add(part[1])
        self.is_ready = True
        return answer

    def _answer(self, message: tuple, encode: Callable | None) -> list:
        send(self.process.stdin, message)
        answer = receive(self.process.stdout)
        while answer[0] == "encode":
            send(self.process.stdin, (encode(answer[1]),))
            answer = receive(self.process.stdout)
        return answer

    def _why_it_ended(self, problem: Exception) -> str:
        """Return the limit that ended the helper, "time" or "memory", or "" if it has not ended."""
        if not isinstance(problem, EOFError) and problem.errno not in (errno.EPIPE, errno.EINVAL):
            return ""  # for example, the TimeoutError of a signal handler
        try:
            code = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return ""
        return "time" if code == TIMED_OUT else "memory"


def too_complex(limit_name: str) -> str:
    """Return the error message for a guide that ended its helper."""
    causes = {
        "time": f"it takes more than {PREPARE:g} s, or {EACH:g} s a token",
        "memory": f"it takes more than {MEMORY >> 20:,} MiB, or ends its process",
    }
    return f"the guide is too complex: {causes[limit_name]}; {REMEDY}"


class RemoteReader:
    """A Reader in a helper. grammar: its number; parts, encode: see `ask`."""

    def __init__(self, helper: Helper, grammar: int, parts: tuple, encode: Callable):
        self.helper = helper
        self.grammar = grammar
        self.parts = parts
        self.encode = encode
        self.number = next(numbers)
        weakref.finalize(self, helper.dropped.append, self.number).atexit = False

    def allowed(self, output: list[int]) -> tuple[int, bytes]:
        """See Reader."""
        message = ("allowed", self.number, self.grammar, output)
        num_read, bits = self.helper.ask(message, self.parts, self.encode)
        return num_read, bytes.fromhex(bits)


if __name__ == "__main__":
    main()
