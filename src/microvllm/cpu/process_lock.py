"""A lock for one process per folder: an open file that contains a description of its holder.

The system frees the lock when its holder ends, even by a crash. The holder also writes to the file
each second. If it has not written for a minute, it is regarded as hung and its lock is ignored:
the next process replaces the file. Only the file's owner can open it, because a process that can
read a file can lock it. On systems without such locks (Windows, some network file systems),
each process gets the lock at once and sees no other holder.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TIMEOUT = 60.0  # seconds without a write after which a holder is regarded as hung
_TRIES = 5  # a try only fails if another process replaces the file at the same time


def take(path: Path) -> int | None:
    """Take the lock without waiting. Return the file's descriptor, which holds the lock until all
    copies of the descriptor are closed, or None if another process has the lock. Raises OSError if
    the file cannot be created."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    for tries_left in reversed(range(_TRIES)):
        descriptor = os.open(path, flags, 0o600)
        # the last try accepts any mode: some file systems give all files the same mode
        if _is_private(descriptor) or not tries_left:
            if _lock(descriptor):
                if _is_at(descriptor, path):
                    with suppress(OSError, NotImplementedError, TypeError):  # Windows
                        os.utime(descriptor)
                    return descriptor
            elif not _hangs(descriptor):
                os.close(descriptor)
                return None
        if _is_at(descriptor, path):
            path.unlink(missing_ok=True)
        os.close(descriptor)
    return None


def holder(path: Path) -> dict | None:
    """Return the description written by a lock's holder, or {} if none is written yet. Return None
    if no process has the lock, or if its holder hangs."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if not _is_private(descriptor) or _hangs(descriptor) or _lock(descriptor, shared=True):
            return None
        description = json.loads(os.read(descriptor, 4096))
        return description if isinstance(description, dict) else {}
    except (OSError, ValueError):
        return {}
    finally:
        os.close(descriptor)


def _is_private(descriptor: int) -> bool:
    status = os.fstat(descriptor)
    return fcntl is None or (status.st_uid == os.getuid() and not status.st_mode & 0o077)


def _hangs(descriptor: int) -> bool:
    """Return whether the file was not written for TIMEOUT seconds. This is checked twice, because a
    process may have taken the lock and not written yet."""
    for wait in 0.0, 0.05:
        time.sleep(wait)
        if time.time() - os.fstat(descriptor).st_mtime <= TIMEOUT:
            return False
    return True


def _lock(descriptor: int, shared: bool = False) -> bool:
    """Lock the file and return True, or return False if another process has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether `path` still names the open file."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False
