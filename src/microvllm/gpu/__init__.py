"""What a GPU has of its own: kernels in Triton, FlashAttention, recorded decode steps, and a cache
as large as the card allows. Its loop, one step ahead, is in loops/ahead.py."""

import functools
import importlib.util
import subprocess
import sys
import warnings
from contextlib import suppress

import torch


def say(line: str) -> None:
    """Tell a person who waits."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):  # closed
            print(f"microvllm: {line}", file=sys.stderr, flush=True)


def has_triton(device: torch.device) -> bool:
    """Do the Triton kernels run there: an NVIDIA card from Ampere on, or one of AMD's, with a
    compiler that works? Warns once if there is all but the compiler."""
    if not takes_triton(device):
        return False
    problem = compiler_problem(device)
    if problem is not None:
        warn_of_compiler(problem)
    return problem is None


@functools.cache
def takes_triton(device: torch.device) -> bool:
    """Is Triton installed, and the device one that its kernels are written for?"""
    if device.type != "cuda" or not importlib.util.find_spec("triton"):
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def compiler_problem(device: torch.device) -> str | None:
    """Why Triton cannot compile here, None if it can; a small kernel is compiled and run. For a
    launch Triton compiles C, with the system's compiler and Python's headers."""
    try:
        from .launch import try_compiler

        try_compiler(device)
    except Exception as error:  # of Triton, its libraries, the C compiler or the driver
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, subprocess.CalledProcessError):
            reason = f"the C compiler failed with status {error.returncode}"
        return (
            f"Triton cannot compile here ({reason:.300}): it needs gcc and Python's headers "
            "(apt-get install gcc python3-dev, or gcc and python3-devel)"
        )
    return None


@functools.cache  # once
def warn_of_compiler(problem: str) -> None:
    """Say that the kernels are not used."""
    warnings.warn(f"{problem}; until then plain torch computes, slower", stacklevel=2)
