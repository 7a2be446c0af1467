"""The lines of a trace: kept in memory, or written to a file that is complete after every step."""

import json
import logging
import os
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

from .replay import encode, read

logger = logging.getLogger("microvllm")
# events with a time
TIMED = {"arrive", "admit", "begin", "end", "preempt", "finish", "abort", "reset"}


class EventLog:
    """Events in the order of their addition. path: the file; None: keep them in memory.

    Raises TypeError if `path` is not a path. `open` raises OSError if it cannot open the file.
    """

    def __init__(self, path: str | Path | None):
        if path is not None and not isinstance(path, (str, Path)):
            raise TypeError(f"the path of a trace must be a str or Path, got {path!r:.80}")
        self.path = path
        self.file = None
        self.lines: deque[str] = deque()  # lines not yet in the file, or all lines
        self.start = time.perf_counter()

    def open(self) -> None:
        """Open the file, if there is one."""
        if self.path is not None:
            self.file = open(self.path, "w", encoding="ascii")

    def add(self, name: str, **facts) -> None:
        """Add an event: its name and its fields."""
        event: dict[str, object] = {"e": name}
        if name in TIMED:
            event["t"] = round(time.perf_counter() - self.start, 6)
        event.update(facts)
        self.lines.append(encode(event) + "\n")

    def flush(self) -> bool:
        """Write all lines. Returns False if that failed, as on a full disk; then the file is closed
        and later lines are dropped."""
        if self.file is None:
            if self.path is not None:
                self.lines.clear()
            return True
        try:
            while self.lines:  # write and drop each line in one call, so that none is cut
                self.lines.append("")
                self.file.writelines(iter(self.lines.popleft, ""))
            self.file.flush()
            return True
        except OSError as error:
            logger.warning("the trace %s ends here: %s", self.path, error)
            with suppress(OSError):  # close() tries to write once more
                self.file.close()
            self.file = None
            self.lines.clear()
            return False

    def close(self) -> None:
        """Write the remaining lines, and close the file."""
        self.flush()
        if self.file is not None:
            self.file.close()
            self.file = None

    @property
    def num_bytes(self) -> int:
        """The size of all events so far, in bytes."""
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
