"""Policies: compare rules for preemption, admission and eviction.

Each row changes one of three policies. The defaults are `youngest` and `first_come` of scheduler.py
and `least_recently_used` of blocks.py. Write your own policy, a function with the same
arguments, into a file, and compare it:

microvllm lab policies --only eviction eviction=mine.py:oldest

`run`, `batch` and `bench` also accept it (--eviction mine.py:oldest), and so does LLM(eviction=).
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, OrderedDict
from itertools import count

from microvllm.blocks import BlockPool
from microvllm.scheduler import HEADROOM, Scheduler, Sequence

# victims: the sequence of scheduler.running to preempt, so that `seq` can grow --------------------


def largest(scheduler: Scheduler, seq: Sequence) -> Sequence:
    """The sequence with the most blocks: one victim frees blocks for many others."""
    return max(scheduler.running, key=lambda s: sum(map(bool, s.block_table)))


def cheapest(scheduler: Scheduler, seq: Sequence) -> Sequence:
    """The sequence with the fewest tokens to compute again."""
    return min(scheduler.running, key=lambda s: s.num_computed)


def furthest(scheduler: Scheduler, seq: Sequence) -> Sequence:
    """The sequence that may generate the most tokens, and so would keep its blocks longest."""
    return max(scheduler.running, key=lambda s: s.max_length - len(s.token_ids))


# admission: the next sequence of scheduler.waiting. with these policies, one may wait forever -----


def shortest(scheduler: Scheduler) -> Sequence:
    """The sequence with the smallest total length, which may end first."""
    return min(scheduler.waiting, key=lambda s: s.max_length)


def best_cached(scheduler: Scheduler) -> Sequence:
    """The sequence with the longest prefix in the cache: it runs before the prefix is evicted."""
    find_prefix = scheduler.blocks.find_prefix
    return max(scheduler.waiting, key=lambda s: len(find_prefix(s)))


def first_fit(scheduler: Scheduler) -> Sequence:
    """The first sequence whose prompt fits into the free blocks; a large one delays no others."""
    blocks = scheduler.blocks
    num_free = blocks.pool.num_free - blocks.blocks_for(HEADROOM * len(scheduler.running))
    fits = (s for s in scheduler.waiting if blocks.blocks_for(len(s.token_ids)) <= num_free)
    return next(fits, scheduler.waiting[0])


# eviction: the block of pool.cached to use for a new text -----------------------------------------


def most_recently_used(pool: BlockPool) -> int:
    """The block that became free last: good for texts that repeat in a circle."""
    return next(reversed(pool.cached))


def first_published(pool: BlockPool) -> int:
    """The block that was published first, no matter how often it was used (first in, first out)."""
    return next(block for block in pool.hash_of if block in pool.cached)


dice = random.Random(0)


def by_chance(pool: BlockPool) -> int:
    """A random block of the thousand least recently used."""
    oldest = [block for block, _ in zip(pool.cached, range(1000), strict=False)]
    return dice.choice(oldest)


class Ranked(OrderedDict):
    """A replacement for `pool.cached` that ranks blocks, for the three policies below.

    A policy sees only the current state, but these policies need the history. So the first eviction
    replaces the plain dict by a Ranked. The pool uses it like a dict: it sets a block that becomes
    free, and deletes a block that is evicted or found again. Blocks that become free one after the
    other are one text, its end first. No block has a lower priority than a later block of its text,
    because a prompt cannot find the later block without it.
    """

    def __init__(self, pool: BlockPool):
        super().__init__()
        self.pool = pool
        self.uses: Counter[int] = Counter()  # how often each block was found again while free
        self.age = 0.0  # the priority of the last evicted block
        self.heap: list[tuple] = []  # (priority, turn, block); some blocks are no longer free
        self.turn, self.turns = count(), {}  # the turn of each block's valid entry in the heap
        self.row: list[int] = []  # blocks that became free since the last deletion
        for block in pool.cached:  # for these, only the order is known
            self[block] = None
            self.settle()

    def priority(self, block: int, size: int) -> float:
        """The priority of keeping a block. size: number of blocks that became free with it. This
        is LFUDA: uses plus the priority of the last evicted block, so that new blocks overtake
        blocks that were used often long ago."""
        return self.age + 1 + self.uses[block]

    def __setitem__(self, block: int, value: None) -> None:
        super().__setitem__(block, value)
        self.row.append(block)

    def __delitem__(self, block: int) -> None:
        self.settle()
        super().__delitem__(block)
        del self.turns[block]
        self.uses[block] += 1

    def settle(self) -> None:
        """Rank the blocks that became free in a row."""
        least = float("-inf")
        for block in self.row:
            least = max(least, self.priority(block, len(self.row)))
            self.turns[block] = next(self.turn)
            heapq.heappush(self.heap, (least, self.turns[block], block))
        self.row.clear()
        if len(self.heap) > 4 * len(self) + 64:
            self.heap = [entry for entry in self.heap if self.turns.get(entry[2]) == entry[1]]
            heapq.heapify(self.heap)

    def pop_least(self) -> int:
        """The block with the lowest priority; of equal ones, the first that became free."""
        self.settle()
        while self.turns.get(self.heap[0][2]) != self.heap[0][1]:
            heapq.heappop(self.heap)
        least, _, block = self.heap[0]
        self.age = max(self.age, least)
        self.uses[block] = -1  # its deletion follows, and resets this to 0
        return block


BLOCK_SIZE = 16  # tokens in a block, the default


class Costed(Ranked):
    """GDSF: uses times the cost of computing a block again, averaged over its text."""

    def priority(self, block: int, size: int) -> float:
        # attention to 6 * width keys takes as long as the matrix products. in a text of n tokens, a
        # token attends to n / 2 keys on average, so it costs 1 + n / (12 * width); width is 384
        return self.age + (1 + self.uses[block]) * (1 + size * BLOCK_SIZE / (12 * 384))


class Shadow(OrderedDict):
    """The texts that a pool of `size` blocks would have under one rule. first=False: new texts are
    evicted last; first=True: new texts are evicted first, except one in 32."""

    def __init__(self, size: int, first: bool):
        super().__init__()
        self.size, self.first, self.dice = size, first, random.Random(0)

    def find_or_add(self, text: bytes) -> bool:
        """Was the text in the pool? If not, it is added."""
        is_cached = text in self
        if not is_cached and len(self) >= self.size:
            self.popitem(last=False)
        self[text] = None
        self.move_to_end(text, last=is_cached or not self.first or self.dice.random() < 1 / 32)
        return is_cached


class Dueling(Ranked):
    """DIP: new texts are evicted last or first, whichever rule would have found more so far."""

    def __init__(self, pool: BlockPool):
        self.shadows = [Shadow(pool.num_usable, first) for first in (False, True)]
        self.lead = 0
        self.rows = count(1)
        self.dice = random.Random(0)
        super().__init__(pool)

    def settle(self) -> None:
        for block in self.row:
            text = self.pool.hash_of[block]
            last, first = (shadow.find_or_add(text) for shadow in self.shadows)
            self.lead = max(-1024, min(1024, self.lead + first - last))
        self.newest = -next(self.rows)  # the newest text has the lowest priority
        super().settle()

    def priority(self, block: int, size: int) -> float:
        if self.lead > 0 and not self.uses[block] and self.dice.random() > 1 / 32:
            return self.newest
        return super().priority(block, size)


def ranked(pool: BlockPool, kind: type[Ranked]) -> int:
    """The block that a Ranked of this kind evicts."""
    if type(pool.cached) is not kind:  # at the first eviction, or after a reset
        pool.cached = kind(pool)
    return pool.cached.pop_least()


def aged_frequency(pool: BlockPool) -> int:
    """The least frequently used block, with dynamic aging (LFUDA: Arlitt et al. 2000)."""
    return ranked(pool, Ranked)


def cost_aware(pool: BlockPool) -> int:
    """Aged frequency times the cost of computing a block again (GDSF: Cherkasova 1998)."""
    return ranked(pool, Costed)


def dueling(pool: BlockPool) -> int:
    """Aged frequency; in a scan, the newest block (dynamic insertion, DIP: Qureshi et al. 2007)."""
    return ranked(pool, Dueling)


OTHERS = {
    "victim": [largest, cheapest, furthest],
    "admission": [shortest, best_cached, first_fit],
    "eviction": [
        most_recently_used, first_published, by_chance, aged_frequency, cost_aware, dueling,
    ],
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    from .contest import main  # not at the top, since this file is also loaded alone

    main(argv)
