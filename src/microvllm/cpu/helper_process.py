"""A helper process, `python -I helper_process.py ARGUMENTS`: it compiles kernels, and ends.

It imports nothing of the package before it has taken the lowest priority, since the imports alone
take seconds. ARGUMENTS, in JSON, are those of compilation.start:

    path, package   where the starting process found its modules, and the package of this file
    kind, lock      what to compile, and the descriptor that holds the lock (or null)
    role            BACKGROUND, or what a closed stdin means: FOREGROUND, ATTACHED
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from contextlib import suppress

BACKGROUND = "background"  # of the lowest priority; outlives the process that started it
FOREGROUND = "foreground"  # an engine waits for it; without that engine it is a background one
ATTACHED = "attached"  # ends with the process that started it
SECONDS = 15 * 60  # a helper ends after so long, done or not
BYTES = 3 << 30  # of memory that a helper may have; 0.7 GB are usual
UNKEPT = 3  # exit status: compiled, but what was made could not be written


def lower_priority() -> None:
    """Take only time that no other process wants, on the processor and on the disk."""
    if not hasattr(os, "setpriority"):  # Windows: compilation.start has asked for it
        return
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 19)
    with suppress(OSError):  # Linux has priorities for threads, and these may have begun
        for thread in map(int, os.listdir("/proc/self/task")):
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, thread, 19)
                os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


def limit_memory() -> None:
    """Let allocations fail beyond BYTES; where memory runs out, let this process be ended first."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = min([BYTES, *(x for x in (soft, hard) if x != resource.RLIM_INFINITY)])
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def follow(said: dict) -> None:
    """Wait until no process holds the other end of stdin: the one that started this has ended."""
    with suppress(OSError):
        os.read(0, 1)
    if said["role"] == ATTACHED:
        os._exit(1)  # also in the midst of a kernel
    said["role"] = BACKGROUND
    lower_priority()


def description(kind: str, role: str, pid: int) -> dict:
    """What a helper says of itself. done: kernels that it has compiled or found, before `now`."""
    said = {"pid": pid, "kind": kind, "role": role, "since": time.time()}
    return said | {"done": 0, "now": ""}


def describe(lock: int, said: dict) -> None:
    """Write that to the lock's file, and so touch it. See process_lock.holder."""
    text = json.dumps(said).encode()
    with suppress(OSError):  # a full disk
        os.pwrite(lock, text, 0)
        os.ftruncate(lock, len(text))


def watch(lock: int | None, said: dict) -> None:
    """Describe this process each second, and end it after SECONDS."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if lock is not None:
            describe(lock, said)
        time.sleep(1)
    os._exit(1)


def main(path: list[str], package: str, kind: str, lock: int | None, role: str) -> None:
    """Compile the kernels of a kind."""
    said = description(kind, role, os.getpid())
    if role == BACKGROUND:
        lower_priority()
    else:
        threading.Thread(target=follow, args=(said,), daemon=True).start()
    threading.Thread(target=watch, args=(lock, said), daemon=True).start()
    limit_memory()
    sys.path[:] = path
    backend = importlib.import_module(f"{package}.backend")
    compilation = importlib.import_module(f"{package}.compilation")
    with suppress(OSError):
        os.chdir("/")  # the current folder may be removed, or unmounted
    compilation.serve(backend.CpuBackend, kind, said)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
