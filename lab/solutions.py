"""Solutions of exercises.py; a test checks them. Try the exercises first."""

from __future__ import annotations

from collections.abc import Iterable

from microvllm.blocks import BlockManager, BlockPool
from microvllm.scheduler import Scheduler, Sequence

from .exercises import Unchained  # noqa: F401, exercise 5 does not change it


# 1. the last token is never an input, so its K and V are not needed
def blocks_needed(num_prompt: int, max_tokens: int, block_size: int) -> int:
    return -(-(num_prompt + max_tokens - 1) // block_size)


# 2
def slot_of(table: list[int], position: int, block_size: int) -> int:
    return table[position // block_size] * block_size + position % block_size


# 3. it only appends new blocks, and does not check whether other tables contain the last one
class Forgetful(BlockManager):
    def grow(self, seq: Sequence, start: int, stop: int) -> bool:
        num_new = self.blocks_for(stop) - len(seq.block_table)
        if num_new > self.pool.num_free:
            return False
        for _ in range(num_new):
            seq.block_table.append(self.pool.allocate())
        return True


# 4. the last token is always computed, because its logits are needed. with one token more, four
# full blocks come before it
def two_prompts() -> tuple[list[int], list[int]]:
    return list(range(65)), list(range(65))


# 5. equal tokens after different prefixes have different K and V. the second block of the first
# prompt is the first block of the second prompt
def misled() -> tuple[list[int], list[int]]:
    return [1] * 16 + [3] * 17, [3] * 17


# 6
def pool_without_preemption(requests: list[tuple[int, int]], block_size: int) -> int:
    most = 0
    for step in range(1, 1 + max(new for _, new in requests)):  # each has step - 1 new tokens
        alive = [prompt + step - 1 for prompt, new in requests if new >= step]
        most = max(most, sum(-(-tokens // block_size) for tokens in alive))
    return most + 1


# 7. the fewest tokens to compute again for each freed block; a shared block is not freed
def victim(scheduler: Scheduler, seq: Sequence) -> Sequence:
    def price(seq: Sequence) -> float:
        ref_count = scheduler.blocks.pool.ref_count
        num_freed = sum(ref_count[block] == 1 for block in seq.block_table)
        return seq.num_computed / num_freed if num_freed else float("inf")

    return min(scheduler.running, key=price)


# 8. the shortest first, but waiting sequences count as shorter: by a twelfth of a token for each
# token that the engine generated in the meantime, so that none waits forever
arrivals: dict[Sequence, int] = {}


def admission(scheduler: Scheduler) -> Sequence:
    now = scheduler.num_output_tokens
    for seq in scheduler.waiting:
        arrivals.setdefault(seq, now)
    return min(scheduler.waiting, key=lambda s: s.max_length - (now - arrivals[s]) / 12)


# 9. the block that is needed last (Belady 1966). among the blocks of one text, this is the last
# one, which comes first in `cached`
def eviction(pool: BlockPool, future: list[set[bytes]]) -> int:
    def next_use(block: int) -> int:
        block_hash = pool.hash_of[block]
        return next((i for i, hashes in enumerate(future) if block_hash in hashes), len(future))

    return max(pool.cached, key=next_use)


# 10. the next token, at position num_computed, attends to positions from num_computed - window on
def freed_by_window(table: Iterable[int], num_computed: int, window: int, size: int) -> list[int]:
    return list(table)[: max(0, num_computed - window) // size]


# 11. step 1 computes 32 tokens of the first prompt, and step 2 its last 8. then the sequence forks.
# in step 3, both samples write into the third block, and one of them copies it. 30 tokens are left
# for the second prompt; they need two blocks
def third_step() -> dict:
    return {"decodes": [0, 1], "prefills": [(2, 0, 30)], "copies": 1, "fresh": 2}


# 12. step 1 computes 60 tokens, so step 6 writes position 64. both sequences need a fifth block,
# and one is left: the older sequence gets it. the younger one is admitted again when the older one
# has ended, after its 40th token in step 40. until then, the older one took two more blocks, for
# positions 80 and 96: the last two blocks of the younger one
def preemption() -> dict:
    return {"seq": 1, "step": 6, "back": 41, "found": 32}


# 13. block 1 was evicted in step 18, blocks 2 and 3 in step 12, and other requests wrote into them
def wrong_hit() -> dict:
    return {"step": 20, "blocks": [1, 2, 3], "mistake": "hash"}
