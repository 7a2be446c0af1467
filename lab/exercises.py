"""Ten exercises: replace what each function returns. EXERCISES.md explains them.

`microvllm lab check 3` says whether the third is solved.
"""

from __future__ import annotations

from collections.abc import Iterable

from microvllm.scheduler import (
    BlockManager,
    Scheduler,
    Sequence,
    first_come,
    least_recently_used,
    youngest,
)


# 1
def blocks_needed(num_prompt: int, max_tokens: int, block_size: int) -> int:
    """How many blocks does a request hold when it ends?"""
    return -1


# 2
def slot_of(table: list[int], position: int, block_size: int) -> int:
    """Where in the pool are K and V of the token at this position? Slots are counted from 0, all
    of block 0 first."""
    return -1


# 3
class Forgetful(BlockManager):
    """A BlockManager that forgets to copy before it writes into a shared block."""


# 4
def two_prompts() -> tuple[list[int], list[int]]:
    """Prompts of which the second finds 64 tokens in the cache that the first has left there."""
    return list(range(64)), list(range(64))


# 5
class Unchained(BlockManager):
    """Hashes each block on its own. What can go wrong? Leave this class as it is."""

    def compute_hashes(self, seq: Sequence, count: int) -> list[bytes]:
        size = self.block_size
        blocks = [seq.tokens[i * size : (i + 1) * size] for i in range(count)]
        seq.hashes = [repr(block).encode() for block in blocks]
        return seq.hashes


def misled() -> tuple[list[int], list[int]]:
    """Prompts of which the second is given blocks of the first that are not its own beginning."""
    return [1, 2, 3], [4, 5, 6]


# 6
def pool_without_preemption(requests: list[tuple[int, int]], block_size: int) -> int:
    """The fewest blocks, with the sink, in which these requests (prompt, new tokens), all admitted
    in the first step, run to their end without a preemption."""
    return 1000


# 7
def victim(scheduler: Scheduler, seq: Sequence) -> Sequence:
    """Who is sent away: so that a third less is computed again than with the default."""
    return youngest(scheduler, seq)


# 8
def admission(scheduler: Scheduler) -> Sequence:
    """Who is next: so that the mean request takes a fifth less time than with the default."""
    return first_come(scheduler)


# 9
def eviction(blocks: BlockManager) -> int:
    """Which block is evicted: so that texts that come round in a circle are found again."""
    return least_recently_used(blocks)


# 10
def freed_by_window(table: Iterable[int], num_computed: int, window: int, size: int) -> list[int]:
    """The blocks of a table that no layer will read again, if each token sees itself and the
    `window` tokens before it."""
    return []
