"""The parts of an engine on a GPU: Triton kernels, FlashAttention, recorded decode steps, and the
size of the KV cache. The loop that runs one step ahead is in loops/ahead.py."""

import functools
import importlib.util
import subprocess
import sys
import warnings
from contextlib import suppress

import torch


def say(line: str) -> None:
    """Print a line to stderr that tells the user why a call takes long."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):  # stderr is closed
            print(f"microvllm: {line}", file=sys.stderr, flush=True)


def has_triton(device: torch.device) -> bool:
    """Can the Triton kernels run on a device? They need an NVIDIA card from Ampere on or an AMD
    card, and a working compiler. Warns once if only the compiler is missing."""
    if not takes_triton(device):
        return False
    problem = compiler_problem(device)
    if problem is not None:
        warn_of_compiler(problem)
    return problem is None


@functools.cache
def takes_triton(device: torch.device) -> bool:
    """Is Triton installed, and do the kernels support the device?"""
    if device.type != "cuda" or not importlib.util.find_spec("triton"):
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def compiler_problem(device: torch.device) -> str | None:
    """Compile and run a small kernel. Returns the reason if this fails, else None. Triton compiles
    C for each launcher, with the system's compiler and Python's headers."""
    try:
        from .launch import try_compiler

        try_compiler(device)
    except Exception as error:  # of Triton, its libraries, the C compiler or the driver
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, subprocess.CalledProcessError):
            reason = f"the C compiler failed with status {error.returncode}"
        return (
            f"Triton cannot compile here ({reason:.300}): it needs gcc and Python's headers "
            "(apt-get install gcc python3-dev, or dnf install gcc python3-devel)"
        )
    return None


@functools.cache  # once
def warn_of_compiler(problem: str) -> None:
    """Warn that the kernels are not used."""
    warnings.warn(f"{problem}; until then plain torch is used, which is slower", stacklevel=2)
