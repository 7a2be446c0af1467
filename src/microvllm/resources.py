"""What may an engine take of the machine: memory, threads of torch, and its place on a device."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import torch

from .environment import free_memory

# of messages of torch that are about memory; other errors keep their own words
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUDA error: out of memory")

RELEASED_BYTES = 2**26  # see FilePages


@contextmanager
def fits(what: str, device: torch.device) -> Iterator[None]:
    """Raises ValueError with the numbers if there is no memory for what is made inside.

    More than is free is refused before; but a limit of addresses (ulimit -v) is met here, and on a
    GPU what other processes take meanwhile.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise ValueError(
            f"no memory for {what}: {free_memory(device):,} bytes are free on {device}; lower "
            "max_batch_size, max_batched_tokens or num_blocks, or use a smaller model"
        ) from None
    except (MemoryError, RuntimeError) as error:  # numpy's and C++'s; torch's
        is_of_torch = isinstance(error, RuntimeError)
        if is_of_torch and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        raise ValueError(
            f"no memory for {what}: {free_memory(device):,} bytes are free on {device}, but this "
            f"process gets no more ({error or 'out of memory'!s:.80}); use a smaller model, lower "
            "num_blocks or max_batched_tokens, or raise the process's limit (ulimit -v)"
        ) from None


def on_device(device: torch.device) -> AbstractContextManager:
    """A context in which kernels and events go to the device: CUDA has a current one for each
    thread, and that is the user's choice: there may be other cards and other engines."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class TorchThreads:
    """The number of threads that torch has while an engine computes.

    count: the number of this engine; None leaves torch's number alone. Torch has the number in the
    thread that computes, and the kernels of a CPU have it too; after it torch has its former one.
    """

    def __init__(self, count: int | None):
        self.count = count

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, torch has this number. A number that is set inside (a backend leaves a thread to
        the compiler for a while) is this engine's from then on."""
        if self.count is None:
            yield
            return
        former = torch.get_num_threads()
        try:
            set_torch_threads(self.count)
            yield
        finally:
            self.count = torch.get_num_threads()
            set_torch_threads(former)


def set_torch_threads(count: int) -> None:
    """Let torch use `count` threads, unless it does: to set its number empties its caches."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


class FilePages:
    """The memory of files that tensors are mapped from, which is released while they are read: all
    of a checkpoint's pages beside the model's own weights would be twice the memory."""

    def __init__(self):
        self.tensors: list[torch.Tensor] = []  # read since memory was last released
        self.num_bytes = 0

    def read(self, tensor: torch.Tensor) -> None:
        """Count a tensor that is not needed for the moment. Now and then the system gets the memory
        of such tensors: what is read again comes from the file. Nothing happens to tensors that are
        not mapped, nor to a mapping that was written to, whose content is in no file. For Linux."""
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
    """The first address of the mapping of a file around an address, and the one behind its last.
    (0, 0) if there is none, or if any of its pages was written to."""
    start = stop = 0
    with suppress(OSError, ValueError), open("/proc/self/smaps", "rb") as lines:
        for line in lines:
            name, *fields = line.split()
            if b"-" in name:  # addresses, rights, offset, device, inode, path
                if stop > 0:
                    return start, stop  # the next mapping begins
                first, last = (int(part, 16) for part in name.split(b"-"))
                if first <= address < last and fields[3] != b"0":
                    start, stop = first, last
            elif stop > 0 and name == b"Anonymous:" and fields[0] != b"0":
                return 0, 0  # a page was written to: it is this process's, and not the file's
    return start, stop


def release_freed_memory(device: torch.device) -> None:
    """Give the system the memory that tensors no longer have: torch's allocator of a GPU keeps it,
    and so may the C library's, which Linux's glibc can be told to release."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


_computing_process: int | None = None  # the one in which an engine with several threads was made


def check_process(num_threads: int | None = None) -> None:
    """Raises RuntimeError in a fork of a process that has an engine with several threads: the child
    has none of them, and torch would wait for them for ever. num_threads: of the new engine, by
    default torch's number."""
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
    """Raises ImportError with the remedy, for a package that an import inside does not find."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{feature} needs the package {error.name}: pip install {error.name}", name=error.name
        ) from None


@contextmanager
def computing(device: torch.device, threads: TorchThreads) -> Iterator[None]:
    """The context of all that an engine computes."""
    with on_device(device):
        with threads.active():
            yield
