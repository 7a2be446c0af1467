"""Thirteen exercises: replace what each function returns. EXERCISES.md explains them.

Write into a copy: `microvllm lab start DIR` makes it. `microvllm lab check 3` says whether the
third is solved, `microvllm lab hint 3` gives a hint, and another one each time.
"""

from __future__ import annotations

from collections.abc import Iterable

from microvllm.blocks import BlockManager, BlockPool, least_recently_used
from microvllm.scheduler import Scheduler, Sequence, first_come, youngest


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
    """Prompts: the second finds 64 tokens in the cache that the first has left there."""
    return list(range(64)), list(range(64))


# 5
class Unchained(BlockManager):
    """Hashes each block on its own. What can go wrong? Leave this class as it is."""

    def hashes(self, seq: Sequence, num_full: int) -> list[bytes]:
        size = self.block_size
        texts = [seq.token_ids[i * size : (i + 1) * size] for i in range(num_full)]
        seq.block_hashes = [repr(text).encode() for text in texts]
        return seq.block_hashes


def misled() -> tuple[list[int], list[int]]:
    """Prompts: the second gets blocks of the first that are not its own beginning."""
    return [1, 2, 3], [4, 5, 6]


# 6
def pool_without_preemption(requests: list[tuple[int, int]], block_size: int) -> int:
    """The fewest blocks, the null block included, in which these requests (prompt, new tokens), all
    admitted in the first step, run to their end without a preemption."""
    return 1000


# 7
def victim(scheduler: Scheduler, seq: Sequence) -> Sequence:
    """The sequence to preempt: so that a third of what the default costs is computed again. Some
    requests have six samples, which share the blocks of their prompt; nothing is found by hash."""
    return youngest(scheduler, seq)


# 8
def admission(scheduler: Scheduler) -> Sequence:
    """The next sequence: so that the mean request takes a tenth less time than with the default,
    and the slowest of all at most half as long again as the default's slowest."""
    return first_come(scheduler)


# 9
def eviction(pool: BlockPool, coming: list[set[bytes]]) -> int:
    """The block to evict, if the future is known. coming: for each of the next 40 prompts, the next
    one first, the hashes of its full blocks. No policy finds more than the best one that knows
    this; find as much as that."""
    return least_recently_used(pool)


# 10
def freed_by_window(table: Iterable[int], num_computed: int, window: int, size: int) -> list[int]:
    """The blocks of a table that no layer will read again, if each token sees itself and the
    `window` tokens before it."""
    return []


# 11. the engine: 29 blocks of 16 tokens, at most 32 tokens a step. before step 1 comes a prompt of
# 40 tokens for two samples of 8 new ones each; before step 3 another prompt, of 50 tokens. the
# numbers of sequences begin with 0, and a second sample has one of its own
def third_step() -> dict:
    """What does step 3 do? decodes: the sequences that get a token of theirs computed, one each;
    prefills: (sequence, start, stop) of what is computed of prompts; copies: blocks copied before
    a write; fresh: further blocks that are taken."""
    return {"decodes": [], "prefills": [], "copies": -1, "fresh": -1}


# 12. the engine: 9 blocks of 16 tokens, 256 tokens a step. before step 1 come two prompts of 60
# tokens that share nothing, each for 40 new ones
def preemption() -> dict:
    """What happens when the pool is full? seq: the sequence that is preempted; step: when; back:
    the step in which it is admitted again; found: how many of its tokens it then finds cached."""
    return {"seq": -1, "step": -1, "back": -1, "found": -1}


# 13. `microvllm lab start` has written exercise-13.html beside this file: an engine with a mistake
# in its BlockPool. look at the page alone
def wrong_hit() -> dict:
    """In which step does a request get blocks that hold another text, and which blocks? What is the
    mistake? "copy": a sample writes into a block that another one holds, too; "free": a block of a
    request that has ended is not given back; "hash": an evicted block is still found by its old
    text; "count": a block is evicted while it is in use; "full": a part-filled block is found."""
    return {"step": -1, "blocks": [], "mistake": ""}
