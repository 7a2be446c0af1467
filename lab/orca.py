"""Contiguous KV cache memory, as before paging, with the same methods as BlockManager.

When a sequence is admitted, it gets contiguous slots for its largest possible length. They come
from a buddy allocator (Knowlton, 1965), as the paper assumes for Orca (Yu et al., 2022). The
Scheduler is unchanged: `admit` reserves, and `grow` always succeeds.
"""

from __future__ import annotations

from collections.abc import Callable

from microvllm.blocks import BlockManager, BlockPool
from microvllm.scheduler import Sequence

from .world import CONTEXT


def power(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


# slots reserved for a request; only the oracle knows its true length
RESERVE: dict[str, Callable[[Sequence], int]] = {
    "Orca Max": lambda seq: CONTEXT,
    "Orca Pow2": lambda seq: min(CONTEXT, seq.num_prompt + power(seq.params.max_tokens)),
    "Orca Oracle": lambda seq: seq.max_length,
}


class Buddy:
    """Allocates memory in chunks whose sizes are powers of two.

    A chunk is split into halves until it is just large enough. The two halves are buddies: their
    addresses differ in one bit. When both are free, they are merged again.
    """

    def __init__(self, size: int):
        self.free: dict[int, set[int]] = {1 << bit: set() for bit in range(size.bit_length())}
        start = 0
        for chunk in sorted(self.free, reverse=True):  # a pool of 11 is 8 + 2 + 1
            if size & chunk:
                self.free[chunk].add(start)
                start += chunk

    def take(self, size: int) -> int | None:
        """Allocate a chunk. Returns its address, or None if each free chunk is too small."""
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
        """Free a chunk, and merge it with its buddies."""
        size = power(size)
        while start ^ size in self.free.get(size, ()):
            self.free[size].remove(start ^ size)
            start, size = min(start, start ^ size), 2 * size
        self.free[size].add(start)


class Contiguous(BlockManager):
    """Contiguous memory for the whole life of a sequence.

    slots: number of tokens that the pool holds; reserve: number of slots for a sequence.
    """

    def __init__(self, slots: int, reserve: Callable[[Sequence], int]):
        super().__init__(BlockPool(1), 1, enable_prefix_caching=False)
        self.buddy = Buddy(slots)
        self.reserve = reserve
        self.allocations: dict[Sequence, tuple[int, int]] = {}  # (address, size before rounding)

    def admit(self, seq: Sequence, max_new_tokens: int, reserve_tokens: int = 0) -> bool:
        size = self.reserve(seq)
        start = self.buddy.take(size)
        if start is None:
            return False
        self.allocations[seq] = (start, size)
        seq.block_table.append(0)  # a running sequence needs a table; this one is not used
        return True

    def grow(self, seq: Sequence, start: int, stop: int) -> bool:
        return True

    def free(self, seq: Sequence) -> None:
        if seq in self.allocations:
            self.buddy.give(*self.allocations.pop(seq))
        seq.reset_blocks()
