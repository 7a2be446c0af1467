"""Exceptions from outside at a chosen line: a signal's handler, a time limit, no memory."""

import os
import signal
import sys
from collections import Counter
from pathlib import Path

import microvllm

PACKAGE = str(Path(microvllm.__file__).parent)
ALL = bool(os.environ.get("FUZZ"))  # strike at every line, else at every seventh one
SIGNAL = getattr(signal, "SIGUSR1", signal.SIGTERM)


class Struck(Exception):
    """What comes from outside."""


class Strike:
    """While it calls functions, the lines of the package that they run are counted, and at one of
    them, the first time it comes, a signal arrives whose handler raises. at: (file, line), or the
    number of the event."""

    def __init__(self, at=None, opcodes: bool = False):
        self.at = at
        self.opcodes = opcodes
        self.lines: Counter = Counter()
        self.count = 0
        self.struck = False
        # the same object for all frames, as long as this lives: CPython 3.11 has called the trace
        # function once more after the exception in it had freed it
        self.tracer = self.trace

    def __call__(self, function, *args):
        def strike(*_):
            raise Struck(self.at)

        outer = sys.gettrace()
        before = signal.signal(SIGNAL, strike)
        sys.settrace(self.tracer)
        try:
            return function(*args)
        except Struck as error:
            self.kept = error  # as a caller may, with all frames that it went through
            return []
        finally:
            sys.settrace(outer)
            signal.signal(SIGNAL, before)

    def trace(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = self.opcodes
        if event == ("opcode" if self.opcodes else "line"):
            line = frame.f_code.co_filename[len(PACKAGE) + 1 :], frame.f_lineno
            self.lines[line] += 1
            self.count += 1
            if not self.struck and self.at in (line, self.count):
                self.struck = True
                signal.raise_signal(SIGNAL)
        return self.tracer


def release_lock(llm) -> None:
    """A trace function may strike where no signal can: between a lock and the block of its `with`.
    Then the lock stays."""
    while llm.guard.lock._is_owned():
        llm.guard.lock.release()
