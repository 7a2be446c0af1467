"""How the Triton kernels of this folder are launched. All of them

- need no value from the device on the host: grids follow from shapes and host integers, and the
  kernels read lengths. So a CUDA graph can capture a launch once and replay it;
- compute in float32, with bfloat16, float16 or float32 in memory;
- call `begin` (or `release`, and later `wait`) before they access memory that another kernel may
  have written. So with `early_start`, when the previous kernel has ended, all kernels before it
  have ended, too. `_few_rows` reads weights before it waits, because no kernel writes them.

With `TRITON_INTERPRET=1` they run on the CPU, slowly, as in the tests.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import triton
import triton.language as tl

from ..resources import on_device

TRITON_34 = hasattr(tl.extra.cuda, "gdc_wait")  # or newer

MAX_AT_ONCE = 32  # programs that any multiprocessor runs at once

# Arguments that change between steps or layers. They are views into larger tensors, whose addresses
# may or may not be multiples of 16: a kernel is not compiled a second time for that.
VARIES = (
    "ids positions slots tables seq_lens cu_seqlens temperatures us sums lows top_ks top_ps min_ps "
    "a b table_stride h_stride window first_sequence num_sequences splits rows"
).split()

# Are decode steps timed with `early_start`, too? Its benefit is not measured.
TRIES_EARLY_START = os.environ.get("MICROVLLM_EARLY_START") == "1"

starts_early = ContextVar("starts_early", default=False)  # are we inside `early_start`?


@contextmanager
def early_start(on: bool = True) -> Iterator[None]:
    """Launches inside use programmatic dependent launch, if `can_start_early`: a kernel starts
    before the previous one has ended, and waits for its end in `begin`. Only for steps of a few
    rows (graphs.py)."""
    before = starts_early.set(on)
    try:
        yield
    finally:
        starts_early.reset(before)


def can_start_early(device: torch.device) -> bool:
    """Does a torch device support `early_start`?"""
    if device.type != "cuda" or torch.version.hip is not None or not TRITON_34:
        return False
    # on consumer Blackwell (12) other projects report that it breaks the capture of graphs
    return torch.cuda.get_device_properties(device).major in (9, 10)


def card(device: torch.device) -> tuple[int, int, dict]:
    """(multiprocessors, bytes of shared memory per program, launch options) of a torch device."""
    return _card(device, starts_early.get())


@functools.lru_cache
def _card(device: torch.device, early: bool) -> tuple[int, int, dict]:
    if device.type != "cuda":  # the interpreter
        return 8, 2**16, {"PDL": False}
    properties = torch.cuda.get_device_properties(device)
    default = 99 * 1024 if torch.version.hip is None else 2**16
    memory = getattr(properties, "shared_memory_per_block_optin", default)
    # a * b + c is rounded once. triton 3.9 warns that this will not be the default
    options = {"enable_fp_fusion": True, "PDL": False}
    if early and can_start_early(device):
        options.update(PDL=True, launch_pdl=True)
    return properties.multi_processor_count, memory, options


def programs_at_once(device: torch.device, kernel, num_warps: int) -> int:
    """The number of programs of a compiled kernel that a multiprocessor runs at once. Its
    registers, shared memory and threads limit them. After Triton's tutorial of the softmax."""
    if torch.version.hip is not None:
        return 8
    kernel._init_handles()  # loads the kernel and reads its number of registers
    properties = torch.cuda.get_device_properties(device)
    # registers are allocated to a warp in units of 256, and a quarter of a multiprocessor has a
    # quarter of them
    warp_registers = -(-kernel.n_regs // 8) * 256
    warps = properties.regs_per_multiprocessor // 4 // warp_registers * 4
    threads = properties.max_threads_per_multi_processor
    by_memory = properties.shared_memory_per_multiprocessor // (kernel.metadata.shared + 1024)
    limits = (warps // num_warps, threads // (32 * num_warps), by_memory, MAX_AT_ONCE)
    return max(1, min(limits))


def options(device: torch.device) -> dict:
    """The options of every launch on the device."""
    return card(device)[2]


@triton.jit
def _write_seven(x):
    tl.store(x, 7)


def try_compiler(device: torch.device) -> None:
    """Compile a kernel and run it. Raises the compiler's or the driver's exception."""
    x = torch.zeros(1, dtype=torch.int32, device=device)
    with on_device(device):
        _write_seven[(1,)](x)
    if x.item() != 7:
        raise RuntimeError(f"a kernel that writes 7 has written {x.item()}")


@triton.jit
def _nothing():
    pass


# older versions of Triton also look up names in branches that are not taken
_release = getattr(tl.extra.cuda, "gdc_launch_dependents", _nothing)
_wait = getattr(tl.extra.cuda, "gdc_wait", _nothing)


@triton.jit
def release(PDL: tl.constexpr):
    if PDL:  # the next kernel may start as soon as there are resources for it
        _release()


@triton.jit
def wait(PDL: tl.constexpr):
    if PDL:  # until the previous kernel has ended and its writes are visible
        _wait()


@triton.jit
def begin(PDL: tl.constexpr):
    release(PDL)  # the next kernel waits here, too
    wait(PDL)
