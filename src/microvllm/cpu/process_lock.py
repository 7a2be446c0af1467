"""A lock for one process of a folder: a file that its holder keeps open, and describes itself in.

The system frees the lock when its holder ends, in whatever way. The holder also writes to the file
each second. One that has not done so for a minute hangs, and its lock counts no more: the next
process makes a new file in its place. Only the user can open the file, since another user
could hold any file that he can read. Where there are no such locks (Windows, some network file
systems), each process gets the lock at once and sees no other holder.
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

HANGS = 60.0  # seconds after the holder last wrote
_TRIES = 5  # each one fails only if other processes replace the file meanwhile


def take(path: Path) -> int | None:
    """Take the lock, without waiting. Returns the file's descriptor, which holds it until all of
    its copies are closed; None where another process has the lock. Raises OSError where the file
    cannot be made."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    for left in reversed(range(_TRIES)):
        descriptor = os.open(path, flags, 0o600)
        # on the last try: a file system that gives all files one mode
        if _is_private(descriptor) or not left:
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
    """What the holder of a lock says of itself, {} if nothing yet; None if no process has the lock,
    or one that hangs."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if not _is_private(descriptor) or _hangs(descriptor) or _lock(descriptor, shared=True):
            return None
        said = json.loads(os.read(descriptor, 4096))
        return said if isinstance(said, dict) else {}
    except (OSError, ValueError):
        return {}
    finally:
        os.close(descriptor)


def _is_private(descriptor: int) -> bool:
    about = os.fstat(descriptor)
    return fcntl is None or (about.st_uid == os.getuid() and not about.st_mode & 0o077)


def _hangs(descriptor: int) -> bool:
    """Was the file last touched long ago? A process that has just got the lock may be about to."""
    for wait in 0.0, 0.05:
        time.sleep(wait)
        if time.time() - os.fstat(descriptor).st_mtime <= HANGS:
            return False
    return True


def _lock(descriptor: int, shared: bool = False) -> bool:
    """Lock the file, unless another process has it."""
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
    """Is the file still the one of that name?"""
    with suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False
