"""Weights on their way to a GPU. A file's float32 becomes bfloat16 on the CPU, in several threads,
in pinned memory, from which the card reads by itself: while it does, the next piece is converted.

    CPU     piece 1 -> buffer 0 | piece 2 -> buffer 1 | piece 3 -> buffer 0 |
    card                        | buffer 0            | buffer 1            | buffer 0
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..environment import available_cpus

PIECE = 2**24  # bytes of a buffer
THREADS = 8  # at most: a few cores read memory as fast as all


class Uploader:
    """Copies tensors from the CPU to a device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.buffers = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.read: list[torch.cuda.Event | None] = [None, None]  # when the card has read a buffer
        self.threads = min(THREADS, available_cpus())
        self.pool = ThreadPoolExecutor(self.threads)

    def fill(self, target: Tensor, source: Tensor) -> None:
        """target (contiguous, on the device) = source, in the target's dtype. The host does not
        wait for the end."""
        size, source = PIECE // target.itemsize, source.detach().reshape(-1)  # threads have grad
        parts = zip(target.view(-1).split(size), source.split(size), strict=True)
        for there, here in parts:
            buffer, event = self.buffers.pop(0), self.read.pop(0)
            if event is not None:
                event.synchronize()
            pinned = buffer.view(target.dtype)[: len(here)]
            pairs = [x.chunk(self.threads) for x in (pinned, here)]
            list(self.pool.map(Tensor.copy_, *pairs))
            there.copy_(pinned, non_blocking=True)
            self.buffers.append(buffer)
            self.read.append(torch.cuda.current_stream(self.device).record_event())
