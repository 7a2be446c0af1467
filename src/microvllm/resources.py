"""What may an engine take of the machine: memory, threads of torch, and its place on a device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from .environment import free_memory

# of messages of torch that are about memory; other errors keep their own words
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUDA error: out of memory")


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
            "max_batched_tokens or num_blocks, or use a smaller model"
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
