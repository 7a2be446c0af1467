"""An engine's use of the machine: memory, torch's threads, and its device."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import torch

from .environment import free_memory

# parts of torch's messages about memory; other errors are not changed
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUDA error: out of memory")

RELEASED_BYTES = 2**26  # see FilePages


@contextmanager
def fits(purpose: str, device: torch.device) -> Iterator[None]:
    """Convert out-of-memory errors in the block to a ValueError with the numbers.

    Sizes beyond the free memory are rejected earlier. But a limit of the address space (ulimit -v),
    or memory that other processes take on a GPU in the meantime, shows only here.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise ValueError(
            f"not enough memory for {purpose}: {free_memory(device):,} bytes are free on {device}; "
            "lower max_batch_size, max_batched_tokens or num_blocks, or use a smaller model"
        ) from None
    except (MemoryError, RuntimeError) as error:  # from numpy and C++; from torch
        is_of_torch = isinstance(error, RuntimeError)
        if is_of_torch and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        raise ValueError(
            f"not enough memory for {purpose}: {free_memory(device):,} bytes are free on {device}, "
            f"but the system refused more ({error or 'out of memory'!s:.80}); use a smaller "
            "model, lower num_blocks or max_batched_tokens, or raise the process's limit (ulimit "
            "-v)"
        ) from None


def on_device(device: torch.device) -> AbstractContextManager:
    """Return a context that directs kernels and events to the device. CUDA has a current device per
    thread, which belongs to the user: there may be other cards and other engines."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class TorchThreads:
    """Sets the number of torch's threads while an engine computes.

    count: this engine's number; None keeps torch's number. It is set for the thread that computes,
    and applies to CPU kernels too. Afterwards torch has its previous number again.
    """

    def __init__(self, count: int | None):
        self.count = count

    @contextmanager
    def active(self) -> Iterator[None]:
        """Set the number for the block. A number set inside the block becomes this engine's number
        from then on (a backend leaves a thread to the compiler for a while)."""
        if self.count is None:
            yield
            return
        previous = torch.get_num_threads()
        try:
            set_torch_threads(self.count)
            yield
        finally:
            self.count = torch.get_num_threads()
            set_torch_threads(previous)


def set_torch_threads(count: int) -> None:
    """Set the number of torch's threads if it differs, since setting it empties torch's caches."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


class FilePages:
    """Releases the memory of mapped files while their tensors are read. Otherwise all pages
    of a checkpoint would be in memory in addition to the model's weights: twice the memory."""

    def __init__(self):
        self.tensors: list[torch.Tensor] = []  # read since the last release
        self.num_bytes = 0

    def done_with(self, tensor: torch.Tensor) -> None:
        """Register a tensor that is not needed at the moment. From time to time the memory of such
        tensors is released; a later read gets the content from the file. Tensors that are not
        mapped are ignored, and so are mappings with written pages, whose content is in no file.
        Linux only.
        """
        if sys.platform != "linux" or tensor.device.type != "cpu":
            return
        self.tensors.append(tensor)
        self.num_bytes += tensor.nbytes
        if self.num_bytes < RELEASED_BYTES:
            return
        stop = 0
        for address in sorted(tensor.data_ptr() for tensor in self.tensors):
            if address >= stop:
                start, stop = clean_file_mapping(address)
                if start > 0:
                    size = ctypes.c_size_t(stop - start)
                    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), size, mmap.MADV_DONTNEED)
        self.tensors = []
        self.num_bytes = 0


def clean_file_mapping(address: int) -> tuple[int, int]:
    """Return the first address of the file mapping that contains an address, and the address after
    its last. Returns (0, 0) if there is none, or if any of its pages was written."""
    start = stop = 0
    with suppress(OSError, ValueError), open("/proc/self/smaps", "rb") as lines:
        for line in lines:
            name, *fields = line.split()
            if b"-" in name:  # a line of addresses, rights, offset, device, inode, path
                if stop > 0:
                    return start, stop  # the next mapping begins
                first, last = (int(part, 16) for part in name.split(b"-"))
                if first <= address < last and fields[3] != b"0":
                    start, stop = first, last
            elif stop > 0 and name == b"Anonymous:" and fields[0] != b"0":
                return 0, 0  # a page was written: its content is not in the file
    return start, stop


def release_freed_memory(device: torch.device) -> None:
    """Return freed memory to the system. torch's GPU allocator keeps it, and the C library may do
    so too; Linux's glibc has a function that releases it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with suppress(AttributeError):  # a C library without malloc_trim
            ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


_computing_process: int | None = None  # the process that made an engine with several threads


def check_process(num_threads: int | None = None) -> None:
    """Raise RuntimeError in a fork of a process that has an engine with several threads. The fork
    has none of these threads, and torch would wait for them forever. num_threads: the new engine's
    (default: torch's number)."""
    global _computing_process
    if (num_threads or torch.get_num_threads()) <= 1:
        return
    if _computing_process is None:
        _computing_process = os.getpid()
    if _computing_process != os.getpid():
        raise RuntimeError(
            f"an LLM was made in process {_computing_process}, whose threads a fork does not have: "
            "start processes with 'spawn' or 'forkserver' (multiprocessing.get_context)"
        )


@contextmanager
def naming_package(feature: str) -> Iterator[None]:
    """Convert a ModuleNotFoundError in the block to an ImportError with the remedy."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{feature} needs the package {error.name}: pip install {error.name}", name=error.name
        ) from None


@contextmanager
def computing(device: torch.device, threads: TorchThreads) -> Iterator[None]:
    """The context of everything that an engine computes."""
    with on_device(device):
        with threads.active():
            yield
