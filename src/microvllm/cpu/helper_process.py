"""A helper process, `python -I helper_process.py ARGUMENTS`, that compiles kernels and then ends.

It lowers its priority before it imports anything from the package, since the imports alone take
seconds. ARGUMENTS are those of compilation.start, in JSON:

    path, package   the module folders of the starting process, and the package of this file
    kind, lock      the kind to compile, and the descriptor that holds the lock (or null)
    role            BACKGROUND, FOREGROUND or ATTACHED; what a closed stdin means, for the last two
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from contextlib import suppress

BACKGROUND = "background"  # lowest priority; outlives the process that started it
FOREGROUND = "foreground"  # an engine waits for it; becomes a background helper without that engine
ATTACHED = "attached"  # ends with the process that started it
SECONDS = 15 * 60  # time limit of a helper
BYTES = 3 << 30  # memory limit of a helper; 0.7 GB are usual
UNKEPT = 3  # exit status: the kernels were compiled, but could not be written


def lower_priority() -> None:
    """Use only processor time and disk time that no other process needs."""
    if not hasattr(os, "setpriority"):  # Windows: compilation.start has set the priority
        return
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 19)
    with suppress(OSError):  # Linux has one priority per thread, and threads may already run
        for thread in map(int, os.listdir("/proc/self/task")):
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, thread, 19)
                os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


def limit_memory() -> None:
    """Let allocations beyond BYTES fail. If memory runs out, let the system kill this process
    first."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = min([BYTES, *(x for x in (soft, hard) if x != resource.RLIM_INFINITY)])
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def follow(said: dict) -> None:
    """Wait until stdin is closed, which means that the starting process has ended."""
    with suppress(OSError):
        os.read(0, 1)
    if said["role"] == ATTACHED:
        os._exit(1)  # also while a kernel is being compiled
    said["role"] = BACKGROUND
    lower_priority()


def description(kind: str, role: str, pid: int) -> dict:
    """Return a helper's description. done: number of kernels compiled or found so far; now: the
    kernel that is being compiled."""
    said = {"pid": pid, "kind": kind, "role": role, "since": time.time()}
    return said | {"done": 0, "now": ""}


def describe(lock: int, said: dict) -> None:
    """Write the description to the lock file, which also updates the file's time. See
    process_lock.holder."""
    text = json.dumps(said).encode()
    with suppress(OSError):  # a full disk
        os.pwrite(lock, text, 0)
        os.ftruncate(lock, len(text))


def watch(lock: int | None, said: dict) -> None:
    """Write the description each second. End the process after SECONDS."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if lock is not None:
            describe(lock, said)
        time.sleep(1)
    os._exit(1)


def main(path: list[str], package: str, kind: str, lock: int | None, role: str) -> None:
    """Compile the kernels of a kind. The arguments are explained at the top of this file."""
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
        os.chdir("/")  # the current folder may later be removed or unmounted
    compilation.serve(backend.CpuBackend, kind, said)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
