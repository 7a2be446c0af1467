"""How a KV cache was managed before paging, with the same methods as BlockManager.

A sequence gets one stretch of slots when it is admitted, as long as it may ever need, from a buddy
allocator (Knowlton, 1965), as the paper assumes of Orca (Yu et al., 2022). The Scheduler works as
ever: `admit` reserves, `grow` always succeeds.
"""

from __future__ import annotations

from collections.abc import Callable

from microvllm.blocks import BlockManager, BlockPool
from microvllm.scheduler import Sequence

from .world import CONTEXT


def power(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


# what is reserved for a request whose true length only the oracle knows
RESERVE: dict[str, Callable[[Sequence], int]] = {
    "Orca Max": lambda seq: CONTEXT,
    "Orca Pow2": lambda seq: min(CONTEXT, seq.num_prompt + power(seq.params.max_tokens)),
    "Orca Oracle": lambda seq: seq.max_length,
}


class Buddy:
    """Hands out stretches of memory whose sizes are powers of two.

    A stretch is split into two halves until it is just large enough; when both halves (buddies: the
    address of one is that of the other with one bit flipped) are free, they are one again.
    """

    def __init__(self, size: int):
        self.free: dict[int, set[int]] = {1 << bit: set() for bit in range(size.bit_length())}
        start = 0
        for chunk in sorted(self.free, reverse=True):  # a pool of 11 is 8 + 2 + 1
            if size & chunk:
                self.free[chunk].add(start)
                start += chunk

    def take(self, size: int) -> int | None:
        """The address of a free stretch; None if there is none, though enough may be free."""
        size = power(size)
        chunk = next((c for c in self.free if c >= size and self.free[c]), None)
        if chunk is None:
            return None
        start = min(self.free[chunk])
        self.free[chunk].remove(start)
        while chunk > size:
            chunk //= 2
            self.free[chunk].add(start + chunk)
        return start

    def give(self, start: int, size: int) -> None:
        """Take a stretch back, and put together what belongs together."""
        size = power(size)
        while start ^ size in self.free.get(size, ()):
            self.free[size].remove(start ^ size)
            start, size = min(start, start ^ size), 2 * size
        self.free[size].add(start)


class Contiguous(BlockManager):
    """Memory for a sequence's whole life, in one stretch.

    slots: tokens that the pool holds; reserve: how many of them a sequence needs.
    """

    def __init__(self, slots: int, reserve: Callable[[Sequence], int]):
        super().__init__(BlockPool(1), 1, enable_prefix_caching=False)
        self.buddy = Buddy(slots)
        self.reserve = reserve
        self.held: dict[Sequence, tuple[int, int]] = {}  # (address, size before it was rounded)

    def admit(self, seq: Sequence, max_new_tokens: int, reserve_tokens: int = 0) -> bool:
        size = self.reserve(seq)
        start = self.buddy.take(size)
        if start is None:
            return False
        self.held[seq] = (start, size)
        seq.block_table.append(0)  # a running sequence has a table; this one leads to no slot
        return True

    def grow(self, seq: Sequence, start: int, stop: int) -> bool:
        return True

    def free(self, seq: Sequence) -> None:
        if seq in self.held:
            self.buddy.give(*self.held.pop(seq))
        seq.reset_blocks()
