"""Copies weights to a GPU. The CPU converts a piece of a file to the dtype of the model, in pinned
memory. While the card reads this piece, the CPU converts the next one.

    CPU     piece 1 -> buffer 0 | piece 2 -> buffer 1 | piece 3 -> buffer 0 |
    card                        | buffer 0            | buffer 1            | buffer 0
"""

import torch
from torch import Tensor

BUFFER_BYTES = 2**24


class Uploader:
    """Copies tensors from the CPU to a device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.buffers = [
            torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)
        ]
        # recorded when the card has read a buffer
        self.events: list[torch.cuda.Event | None] = [None, None]

    def fill(self, target: Tensor, source: Tensor) -> None:
        """Copy source to target (contiguous, on the device), in the dtype of target. The host does
        not wait for the last copies."""
        piece_len = BUFFER_BYTES // target.itemsize
        targets = target.view(-1).split(piece_len)
        sources = source.detach().reshape(-1).split(piece_len)
        for target_piece, source_piece in zip(targets, sources, strict=True):
            buffer = self.buffers.pop(0)
            event = self.events.pop(0)
            if event is not None:
                event.synchronize()
            pinned = buffer.view(target.dtype)[: len(source_piece)]
            pinned.copy_(source_piece)  # in torch's threads
            target_piece.copy_(pinned, non_blocking=True)
            self.buffers.append(buffer)
            self.events.append(torch.cuda.current_stream(self.device).record_event())
