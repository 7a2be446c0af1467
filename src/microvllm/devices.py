"""Checks whether this torch can compute on a device, and says what to do if it cannot."""

from __future__ import annotations

import functools
import logging
import os
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import torch

from .checkpoint import pick_device

log = logging.getLogger("microvllm")

DEV = Path("/dev")
PROC = Path("/proc")

# Each major version of NVIDIA's driver supports CUDA up to one major version, and torch is built
# for one (https://docs.nvidia.com/deploy/cuda-compatibility)
WHEELS = "--index-url https://download.pytorch.org/whl"
CUDA_12 = f"pip install 'torch<2.15' {WHEELS}/cu126"  # 2.14 is the last one; all cards from 5.0 on
CUDA_13 = f"pip install torch {WHEELS}/cu130"
DRIVERS = ((580, 13, CUDA_13), (525, 12, CUDA_12))  # (driver, newest CUDA, remedy)


def find_device(name: str | torch.device) -> torch.device:
    """Return the device called `name`, see checkpoint.pick_device. Raises ValueError if this torch
    cannot compute on it. Warns if "auto" selects the CPU although there is an NVIDIA card."""
    device = pick_device(name)
    if name == "auto" and device.type == "cpu":
        warn_of_cuda()
    check_support(device)
    return device


def check_support(device: torch.device) -> None:
    """Raise ValueError if this torch fails on a device, or computes wrong results."""
    if device.type == "cuda":
        _check_card(device)
    if device.type == "mps":
        _check_mps()


def _check_card(device: torch.device) -> None:
    """Raise ValueError if this torch has no kernels for an NVIDIA card."""
    architectures = torch.cuda.get_arch_list()
    if torch.version.hip is not None or not architectures:
        return
    capability = torch.cuda.get_device_capability(device)
    if any(_runs_on(name, capability) for name in architectures):
        return
    remedy = "install a newer torch"
    if (5, 0) <= capability < (7, 5):
        remedy = CUDA_12
    major, minor = capability
    raise ValueError(
        f"device {str(device)!r} is a {torch.cuda.get_device_name(device)} of compute capability "
        f"{major}.{minor}, but torch {torch.__version__} has kernels only for "
        f"{', '.join(architectures)}: {remedy}, or give device='cpu'"
    )


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Return whether a card runs code compiled for an architecture. sm_86 is machine code for 8.6
    and later 8.x, compute_90 is compiled at run time for cards from 9.0 on, sm_90a is for 9.0 only.
    """
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if match is None:
        return False
    kind, major, minor, suffix = match.groups()
    compiled = (int(major), int(minor))
    if suffix == "a":
        return compiled == capability
    return compiled <= capability and (kind == "compute" or compiled[0] == capability[0])


def _check_mps() -> None:
    """Raise ValueError for a torch whose attention is wrong on Apple's GPUs. attention.py works
    around the errors of other versions. Warns that nothing was tested on such a GPU."""
    version = tuple(int(number) for number in torch.__version__.split(".")[:2])
    if (2, 8) <= version <= (2, 10):  # pytorch/pytorch#169222, #174861
        raise ValueError(
            f"device='mps': the attention of torch {torch.__version__} reads beyond keys and "
            "values on Apple's GPUs, and its results are wrong: pip install 'torch>=2.11', or give "
            "device='cpu'"
        )
    _warn("device='mps': nothing was tested or measured on Apple's GPUs; device='cpu' was tested")


def warn_of_cuda() -> None:
    """Warn once if the engine computes on the CPU although there is an NVIDIA card."""
    problem = cuda_problem()
    if problem is not None:
        _warn(f"{problem}; until then the engine computes on the CPU")


@functools.cache
def _warn(line: str) -> None:  # once
    log.warning("%s", line)


def cuda_problem() -> str | None:
    """Return why CUDA does not work although there is an NVIDIA driver, with a remedy. Returns None
    if it works, if there is no driver, or if the cards are hidden from this process."""
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles")
    if is_hidden or torch.cuda.is_available():
        return None
    driver = _nvidia_driver()
    if driver is None:
        return None
    wheels = [(cuda, wheel) for first, cuda, wheel in DRIVERS if int(driver.split(".")[0]) >= first]
    newest, wheel = wheels[0] if wheels else (0, "update the driver to version 525 or newer")
    built = torch.version.cuda
    if built is None:
        return f"an NVIDIA driver ({driver}) is here, but this torch is built without CUDA: {wheel}"
    if int(built.split(".")[0]) > newest:
        update = f", or update the driver to {DRIVERS[0][0]} or newer" if wheels else ""
        return (
            f"the NVIDIA driver ({driver}) is too old for this torch, which is built for CUDA "
            f"{built}: {wheel}{update}"
        )
    try:
        torch.cuda.init()
        reason = "torch finds no card"
    except Exception as error:  # from the driver
        reason = f"{error!s:.200}"
    return f"an NVIDIA driver ({driver}) is here, but CUDA does not work: {reason}; see nvidia-smi"


def _nvidia_driver() -> str | None:
    """Return the version of NVIDIA's driver, or None if there is none. In a container without cards
    the host's version can be read, but there is no device file."""
    with suppress(OSError):
        text = (PROC / "driver" / "nvidia" / "version").read_text(errors="replace")
        match = re.search(r"NVRM version:.*?\s(\d{3,}\.\d[\d.]*)", text)
        if match is not None:
            return match[1] if (DEV / "nvidiactl").exists() else None
    program = shutil.which("nvidia-smi")  # on Windows, and on Linux inside Windows
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    match = re.match(r"\d{3,}\.\d[\d.]*", result.stdout)
    return None if match is None else match[0]
