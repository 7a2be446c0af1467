"""Solutions of exercises.py; a test checks that they are. Try first."""

from __future__ import annotations

from collections.abc import Iterable

from microvllm.scheduler import BlockManager, Scheduler, Sequence

from .exercises import Unchained  # noqa: F401, exercise 5 leaves it as it is


# 1. the last token is never fed back, so nobody needs its K and V
def blocks_needed(num_prompt: int, max_tokens: int, block_size: int) -> int:
    return -(-(num_prompt + max_tokens - 1) // block_size)


# 2
def slot_of(table: list[int], position: int, block_size: int) -> int:
    return table[position // block_size] * block_size + position % block_size


# 3. only new blocks at the end: who holds the last one beside us is not asked
class Forgetful(BlockManager):
    def grow(self, seq: Sequence, start: int, stop: int) -> bool:
        fresh = self.blocks_for(stop) - len(seq.table)
        if fresh > self.num_free:
            return False
        for _ in range(fresh):
            seq.table.append(self.take())
        return True


# 4. the last token's logits are needed, so it is always computed: one token more makes four blocks
def two_prompts() -> tuple[list[int], list[int]]:
    return list(range(65)), list(range(65))


# 5. equal tokens after another beginning have other K and V: what is the first block of one is the
# second of the other
def misled() -> tuple[list[int], list[int]]:
    return [1] * 16 + [3] * 17, [3] * 17


# 6
def pool_without_preemption(requests: list[tuple[int, int]], block_size: int) -> int:
    most = 0
    for step in range(1, 1 + max(new for _, new in requests)):  # in step s: s - 1 tokens fed back
        alive = [prompt + step - 1 for prompt, new in requests if new >= step]
        most = max(most, sum(-(-tokens // block_size) for tokens in alive))
    return most + 1


# 7. who has least to lose
def victim(scheduler: Scheduler, seq: Sequence) -> Sequence:
    return min(scheduler.running, key=lambda s: s.num_computed)


# 8. the shortest first
def admission(scheduler: Scheduler) -> Sequence:
    return min(scheduler.waiting, key=lambda s: s.max_length)


# 9. the most recently used: in a circle it is the last that will be needed
def eviction(blocks: BlockManager) -> int:
    return next(reversed(blocks.cached))


# 10. the next token, at position num_computed, sees from num_computed - window on
def freed_by_window(table: Iterable[int], num_computed: int, window: int, size: int) -> list[int]:
    return list(table)[: max(0, num_computed - window) // size]
