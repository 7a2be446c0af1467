"""The memory and processors available to this process, and how to install a missing package.

A container sees the memory and the processors of its whole host. Control groups (cgroups), version
1 or 2, limit what it may use; only Linux has them. Groups are nested, and the limits of all
enclosing groups apply:

    /proc/self/cgroup     version 2: 0::/user/job        version 1: 4:memory:/user/job
    limits                /sys/fs/cgroup/user/job        /sys/fs/cgroup/memory/user/job
                          /sys/fs/cgroup/user            /sys/fs/cgroup/memory/user
                          /sys/fs/cgroup                 /sys/fs/cgroup/memory

In a container these paths are often the host's, and only the last folder exists. It is the
container's own group.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:  # importing torch takes a second, and parts of the command line do not need it
    import torch

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


# memory -------------------------------------------------------------------------------------------


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process may allocate: on the GPU, or in RAM within the limits of
    the process (`ulimit -v`) and of its control groups."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    free = [psutil.virtual_memory().available, *_free_addresses(), *_free_in_cgroups()]
    return max(min(free), 0)


def _free_addresses() -> Iterator[int]:
    """Yield the bytes left in the process's address space, if it has a limit."""
    process = psutil.Process()
    if hasattr(process, "rlimit"):  # Linux and FreeBSD
        limit, _ = process.rlimit(psutil.RLIMIT_AS)
        if limit != psutil.RLIM_INFINITY:
            yield limit - process.memory_info().vms


def _free_in_cgroups() -> Iterator[int]:
    """Yield the bytes left in each control group that has a limit. Cached files count as free, as
    in MemAvailable: the kernel drops them when memory is needed."""
    for group in _cgroups("memory"):
        limit = _number(group / "memory.max")
        used = _number(group / "memory.current")
        prefix = ""
        if limit is None:  # version 1; values with this prefix include nested groups
            limit = _number(group / "memory.limit_in_bytes")
            used = _number(group / "memory.usage_in_bytes")
            prefix = "total_"
        if limit is not None and used is not None:
            yield limit - max(used - _cached_bytes(group, prefix), 0)


def _cached_bytes(group: Path, prefix: str) -> int:
    """Return the bytes of cached files in a control group, active and inactive ones. The lines
    "file" and "cache" are not used: they include tmpfs, which the kernel cannot drop."""
    lines = re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", _text(group / "memory.stat"), re.M)
    return sum(int(line) for line in lines)


# processors ---------------------------------------------------------------------------------------


def available_cpus() -> int:
    """Return how many processors this process may use at once, at least 1. A control group's quota
    of processor time may reduce it; a quota of 1.5 processors counts as 2."""
    return min([_allowed_cpus(), *_cpu_quotas()])


def _allowed_cpus() -> int:
    """Return the number of processors that this process may run on (`taskset`)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):  # Windows
        return len(process.cpu_affinity())
    return os.cpu_count() or 1


def _cpu_quotas() -> Iterator[int]:
    """Yield the quota of each control group that has one, in processors, rounded up."""
    for group in _cgroups("cpu"):
        quota = _number(group / "cpu.cfs_quota_us")  # version 1; -1: no quota
        period = _number(group / "cpu.cfs_period_us")
        words = _text(group / "cpu.max").split()  # version 2: "150000 100000", or "max 100000"
        if len(words) == 2 and all(word.isdigit() for word in words):
            quota, period = map(int, words)
        if quota and period and quota > 0:
            yield -(-quota // period)


def limit_threads() -> None:
    """Limit torch to `available_cpus()` threads. More threads would take turns and wait for each
    other at the end of each operation. A number that the user chose is kept: by the environment
    (OMP_NUM_THREADS, MKL_NUM_THREADS), or by torch.set_num_threads if torch would not choose the
    same number itself."""
    import torch

    if "OMP_NUM_THREADS" in os.environ or "MKL_NUM_THREADS" in os.environ:
        return
    logical = os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or logical
    allowed = _allowed_cpus()
    # torch starts with a thread for each logical or physical processor, of all or of the allowed
    # ones, depending on how it was built
    chosen_by_torch = {logical, physical, allowed, allowed * physical // logical}
    num_threads = torch.get_num_threads()
    num_available = available_cpus()
    if num_threads > num_available and num_threads in chosen_by_torch:
        torch.set_num_threads(num_available)


# control groups -----------------------------------------------------------------------------------


def _cgroups(controller: str) -> Iterator[Path]:
    """Yield the folders of the control groups that limit this process, its own first. controller:
    "memory" or "cpu"."""
    for line in _text(PROC / "self" / "cgroup").splitlines():
        words = line.split(":", 2)
        if len(words) < 3:
            continue
        _, names, path = words
        if not names:  # version 2, with all controllers in one tree
            mount = CGROUPS
        elif controller in names.split(","):
            mount = CGROUPS / names
            if not mount.is_dir():  # the folder of "cpu,cpuacct" may be named after one of them
                mount = CGROUPS / controller
        else:
            continue
        parts = [part for part in path.split("/") if part]
        if ".." in parts:  # a group outside of the container's view
            parts = []
        for count in range(len(parts), -1, -1):
            yield mount.joinpath(*parts[:count])


def _text(file: Path) -> str:
    """Return the content of a file, "" if it cannot be read."""
    try:
        return file.read_text()
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    """Return the number in a file, or None if it has another word, such as "max", or is missing."""
    text = _text(file).strip()
    return int(text) if text.lstrip("-").isdigit() else None


# packages -----------------------------------------------------------------------------------------

# microvllm is on no package index and is installed from a clone. Editable (-e), as in the README,
# since a copy would replace an editable installation
REINSTALL = "reinstall microvllm (pip install -e . in a complete clone of it)"


def how_to_install(extra: str) -> str:
    """Return the command that installs an optional package. extra: its name in pyproject.toml."""
    return f"pip install -e '.[{extra}]' in the clone of microvllm"
