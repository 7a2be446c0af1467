"""The lines of a trace: kept in memory, or written to a file that is whole after every step."""

import json
import logging
import os
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

from .replay import encode, read

logger = logging.getLogger("microvllm")
# events that have a time
TIMED = {"arrive", "admit", "begin", "end", "preempt", "finish", "abort", "reset"}


class EventLog:
    """Events in the order in which they were added. path: the file; None: memory.

    Raises TypeError for what is no path. `open` opens the file, and raises OSError if it cannot.
    """

    def __init__(self, path: str | Path | None):
        if path is not None and not isinstance(path, (str, Path)):
            raise TypeError(f"a trace is written to a file's path, not to {path!r:.80}")
        self.path = path
        self.file = None
        self.lines: deque[str] = deque()  # those that are not in the file yet, or all of them
        self.start = time.perf_counter()

    def open(self) -> None:
        """Begin the file, if there is one."""
        if self.path is not None:
            self.file = open(self.path, "w", encoding="ascii")

    def add(self, name: str, **facts) -> None:
        """One more event: its name, and its fields."""
        event: dict[str, object] = {"e": name}
        if name in TIMED:
            event["t"] = round(time.perf_counter() - self.start, 6)
        event.update(facts)
        self.lines.append(encode(event) + "\n")

    def flush(self) -> bool:
        """Write all lines. False if that failed, as on a full disk: then the file is closed, and
        later lines are dropped."""
        if self.file is None:
            if self.path is not None:
                self.lines.clear()
            return True
        try:
            while self.lines:  # each is written and dropped in one call, not to be cut in two
                self.lines.append("")
                self.file.writelines(iter(self.lines.popleft, ""))
            self.file.flush()
            return True
        except OSError as error:
            logger.warning("the trace %s ends here: %s", self.path, error)
            with suppress(OSError):  # it tries once more to write
                self.file.close()
            self.file = None
            self.lines.clear()
            return False

    def close(self) -> None:
        """Write what is left, and close the file."""
        self.flush()
        if self.file is not None:
            self.file.close()
            self.file = None

    @property
    def num_bytes(self) -> int:
        """The size of all events so far."""
        if self.path is None:
            return sum(map(len, [*self.lines]))
        self.flush()
        return os.path.getsize(self.path)

    @property
    def events(self) -> list[dict]:
        """All events so far."""
        if self.path is None:
            return list(map(json.loads, [*self.lines]))
        self.flush()
        return read(self.path)
