"""A helper process, `python -I helper_process.py ARGUMENTS`, that compiles kernels and then ends.

A background helper lowers its priority before it imports anything from the package, because the
imports alone take seconds. ARGUMENTS are those of compilation.start, in JSON:

    path, package   the module folders of the starting process, and the package of this file
    kind, lock      the kind to compile, and the descriptor that holds the lock (or null)
    role            BACKGROUND, FOREGROUND or ATTACHED; for the last two, a closed stdin means that
                    the starting process has ended
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from contextlib import suppress

BACKGROUND = "background"  # lowest priority; continues after the starting process has ended
FOREGROUND = "foreground"  # an engine waits for it; becomes BACKGROUND when that engine ends
ATTACHED = "attached"  # ends with the starting process
SECONDS = 15 * 60  # time limit of a helper
BYTES = 3 << 30  # memory limit of a helper, several times the usual use
NOT_STORED = 3  # exit status: the kernels were compiled, but could not be written


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


def follow(description: dict) -> None:
    """Wait until stdin is closed, which means that the starting process has ended."""
    with suppress(OSError):
        os.read(0, 1)
    if description["role"] == ATTACHED:
        os._exit(1)  # also while a kernel is being compiled
    description["role"] = BACKGROUND
    lower_priority()


def new_description(kind: str, role: str, pid: int) -> dict:
    """Return a helper's description. done: number of kernels compiled or loaded so far; now: the
    kernel that is being compiled."""
    description = {"pid": pid, "kind": kind, "role": role, "since": time.time()}
    return description | {"done": 0, "now": ""}


def write_description(lock: int, description: dict) -> None:
    """Write the description to the lock file, which also updates the file's time. See
    process_lock.holder."""
    text = json.dumps(description).encode()
    with suppress(OSError):  # the disk is full
        os.pwrite(lock, text, 0)
        os.ftruncate(lock, len(text))


def watch(lock: int | None, description: dict) -> None:
    """Write the description each second. End the process after SECONDS."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if lock is not None:
            write_description(lock, description)
        time.sleep(1)
    os._exit(1)


def main(path: list[str], package: str, kind: str, lock: int | None, role: str) -> None:
    """Compile the kernels of a kind. The arguments are explained at the top of this file."""
    description = new_description(kind, role, os.getpid())
    if role == BACKGROUND:
        lower_priority()
    else:
        threading.Thread(target=follow, args=(description,), daemon=True).start()
    threading.Thread(target=watch, args=(lock, description), daemon=True).start()
    limit_memory()
    sys.path[:] = path
    backend = importlib.import_module(f"{package}.backend")
    compilation = importlib.import_module(f"{package}.compilation")
    with suppress(OSError):
        os.chdir("/")  # the current folder may later be removed or unmounted
    compilation.serve(backend.CpuBackend, kind, description)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
