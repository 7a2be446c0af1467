"""Thirteen exercises: replace the return value of each function. EXERCISES.md explains them.

Write into a copy: `microvllm lab start DIR` makes it. `microvllm lab check 3` checks exercise 3,
and `microvllm lab hint 3` shows its next hint.
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
    """The slot in the pool with K and V of the token at this position. Slots are numbered from 0,
    beginning with block 0."""
    return -1


# 3
class Forgetful(BlockManager):
    """A BlockManager that forgets to copy before it writes into a shared block."""


# 4
def two_prompts() -> tuple[list[int], list[int]]:
    """Two prompts. The second must find 64 tokens of the first in the cache."""
    return list(range(64)), list(range(64))


# 5
class Unchained(BlockManager):
    """Hashes each block separately. What can go wrong? Do not change this class."""

    def hashes(self, seq: Sequence, num_full: int) -> list[bytes]:
        size = self.block_size
        texts = [seq.token_ids[i * size : (i + 1) * size] for i in range(num_full)]
        seq.block_hashes = [repr(text).encode() for text in texts]
        return seq.block_hashes


def misled() -> tuple[list[int], list[int]]:
    """Two prompts. The second must get blocks of the first that are not its own prefix."""
    return [1, 2, 3], [4, 5, 6]


# 6
def pool_without_preemption(requests: list[tuple[int, int]], block_size: int) -> int:
    """The smallest number of blocks, including the null block, in which these requests (prompt, new
    tokens) run to their end without a preemption. All are admitted in the first step."""
    return 1000


# 7
def victim(scheduler: Scheduler, seq: Sequence) -> Sequence:
    """The sequence to preempt. The number of tokens computed again must be at most a third of the
    number with the default. Some requests have six samples that share the blocks of their prompt.
    The prefix cache is off."""
    return youngest(scheduler, seq)


# 8
def admission(scheduler: Scheduler) -> Sequence:
    """The next sequence. The mean time of a request must be at most 0.9 times that of the default,
    and the time of the slowest request at most 1.5 times."""
    return first_come(scheduler)


# 9
def eviction(pool: BlockPool, future: list[set[bytes]]) -> int:
    """The block to evict if the future is known. future: the hashes of the full blocks of each of
    the next 40 prompts, the next prompt first. As many prompt tokens must be found in the cache as
    with the best possible policy."""
    return least_recently_used(pool)


# 10
def freed_by_window(table: Iterable[int], num_computed: int, window: int, size: int) -> list[int]:
    """The blocks of a table that no layer will read again, if each token attends to itself and the
    `window` tokens before it."""
    return []


# 11. the engine has 29 blocks of 16 tokens, and computes at most 32 tokens in a step. before step
# 1, a prompt of 40 tokens arrives for two samples of 8 new tokens each. before step 3, another
# prompt of 50 tokens arrives. sequences are numbered from 0, and the second sample has its own
# number
def third_step() -> dict:
    """What does step 3 do? decodes: the sequences that compute one token each; prefills: (sequence,
    start, stop) of the prompt tokens that are computed; copies: the number of blocks that are
    copied before a write; fresh: the number of other blocks that are allocated."""
    return {"decodes": [], "prefills": [], "copies": -1, "fresh": -1}


# 12. the engine has 9 blocks of 16 tokens, and computes at most 256 tokens in a step. before step
# 1, two prompts of 60 tokens arrive. they share nothing, and each gets 40 new tokens
def preemption() -> dict:
    """What happens when the pool is full? seq: the sequence that is preempted; step: the step of
    its preemption; back: the step in which it is admitted again; found: the number of its tokens
    that it then finds in the cache."""
    return {"seq": -1, "step": -1, "back": -1, "found": -1}


# 13. `microvllm lab start` has written exercise-13.html beside this file: the run of an engine with
# a bug in its BlockPool. use only the page
def wrong_hit() -> dict:
    """In which step does a request get blocks with another text, and which blocks? What is the
    mistake? "copy": a sample writes into a shared block; "free": a block of a finished request is
    not freed; "hash": an evicted block is still found by its old text; "count": a block is evicted
    while it is in use; "full": a part-filled block is found."""
    return {"step": -1, "blocks": [], "mistake": ""}
