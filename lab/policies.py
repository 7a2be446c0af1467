"""Policies: what is preempted, what is admitted, which free block is evicted; side by side.

Each row changes one of three policies: `youngest`, `first_come` of scheduler.py, and
`least_recently_used` of blocks.py. Write your own, a function of the same arguments, into a file,
and compare it:

microvllm lab policies --only eviction eviction=mine.py:oldest

`run`, `batch` and `bench` take it as well (--eviction mine.py:oldest), and so does LLM(eviction=).
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, OrderedDict
from itertools import count

from microvllm.blocks import BlockPool
from microvllm.scheduler import HEADROOM, Scheduler, Sequence

# victims: which of scheduler.running gives its blocks back so that `seq` can grow -----------------


def largest(scheduler: Scheduler, seq: Sequence) -> Sequence:
    """The one with the most blocks: one victim of this kind makes room for many."""
    return max(scheduler.running, key=lambda s: sum(map(bool, s.block_table)))


def cheapest(scheduler: Scheduler, seq: Sequence) -> Sequence:
    """The one with the least to compute again."""
    return min(scheduler.running, key=lambda s: s.num_computed)


def furthest(scheduler: Scheduler, seq: Sequence) -> Sequence:
    """The one that may still write the most tokens, and so would hold its blocks longest."""
    return max(scheduler.running, key=lambda s: s.max_length - len(s.token_ids))


# admission: which of scheduler.waiting is next. all three may let one wait forever ----------------


def shortest(scheduler: Scheduler) -> Sequence:
    """The one that may end first: the fewest tokens to compute and to write."""
    return min(scheduler.waiting, key=lambda s: s.max_length)


def best_cached(scheduler: Scheduler) -> Sequence:
    """The one with the longest prefix in the cache, before that is evicted."""
    find_prefix = scheduler.blocks.find_prefix
    return max(scheduler.waiting, key=lambda s: len(find_prefix(s)))


def first_fit(scheduler: Scheduler) -> Sequence:
    """The first whose prompt fits into the free blocks; a large one does not hold up the others."""
    blocks = scheduler.blocks
    room = blocks.pool.num_free - blocks.blocks_for(HEADROOM * len(scheduler.running))
    fits = (s for s in scheduler.waiting if blocks.blocks_for(len(s.token_ids)) <= room)
    return next(fits, scheduler.waiting[0])


# eviction: which of pool.cached is given to a new text --------------------------------------------


def most_recently_used(pool: BlockPool) -> int:
    """The last one that became free: right where texts come round in a circle."""
    return next(reversed(pool.cached))


def first_published(pool: BlockPool) -> int:
    """The one whose text is the oldest, however often it was used since (first in, first out)."""
    return next(block for block in pool.hash_of if block in pool.cached)


dice = random.Random(0)


def by_chance(pool: BlockPool) -> int:
    """Any of the thousand least recently used."""
    few = [block for block, _ in zip(pool.cached, range(1000), strict=False)]
    return dice.choice(few)


class Ranked(OrderedDict):
    """`pool.cached` that knows what each block is worth, for the three policies below.

    A policy sees one moment, and these need to know what was used before. So the first eviction
    puts a Ranked where the plain dict was, and the pool goes on as ever: it sets a block that
    becomes free, and deletes one that is evicted or found again. Blocks that become free in a row
    are a text, its end first. No block is worth less than one behind it, which no prompt could find
    without it.
    """

    def __init__(self, pool: BlockPool):
        super().__init__()
        self.pool = pool
        self.uses: Counter[int] = Counter()  # how often each block was found again while free
        self.age = 0.0  # what the last evicted block was worth
        self.heap: list[tuple] = []  # (worth, turn, block), also of blocks that are free no more
        self.turn, self.turns = count(), {}  # the number of each block's valid entry in the heap
        self.row: list[int] = []  # became free since the last block was deleted
        for block in pool.cached:  # of what was before nothing is known but the order
            self[block] = None
            self.settle()

    def worth(self, block: int, size: int) -> float:
        """To be kept; size: blocks that became free with it. This is LFUDA's: uses, and what was
        evicted last, so that what was used often long ago is passed in the end."""
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
            least = max(least, self.worth(block, len(self.row)))
            self.turns[block] = next(self.turn)
            heapq.heappush(self.heap, (least, self.turns[block], block))
        self.row.clear()
        if len(self.heap) > 4 * len(self) + 64:
            self.heap = [entry for entry in self.heap if self.turns.get(entry[2]) == entry[1]]
            heapq.heapify(self.heap)

    def pop_least(self) -> int:
        """The block that is worth least, of equal ones the first that became free."""
        self.settle()
        while self.turns.get(self.heap[0][2]) != self.heap[0][1]:
            heapq.heappop(self.heap)
        least, _, block = self.heap[0]
        self.age = max(self.age, least)
        self.uses[block] = -1  # it is deleted next, and its text is gone
        return block


BLOCK_SIZE = 16  # tokens in a block, the default


class Costed(Ranked):
    """GDSF: uses times the cost of computing a block again, the mean over its text."""

    def worth(self, block: int, size: int) -> float:
        # attention to 6 * width keys takes as long as the matrices. a text of n tokens has n / 2 on
        # average, so a token of it costs 1 + n / (12 * width): the bundled model is 384 wide
        return self.age + (1 + self.uses[block]) * (1 + size * BLOCK_SIZE / (12 * 384))


class Shadow(OrderedDict):
    """Which texts a pool of `size` blocks would still have, if a new one came in last, or first to
    be evicted but for one in 32."""

    def __init__(self, size: int, first: bool):
        super().__init__()
        self.size, self.first, self.dice = size, first, random.Random(0)

    def has(self, text: bytes) -> bool:
        """Was it still there? It is from now on."""
        found = text in self
        if not found and len(self) >= self.size:
            self.popitem(last=False)
        self[text] = None
        self.move_to_end(text, last=found or not self.first or self.dice.random() < 1 / 32)
        return found


class Dueling(Ranked):
    """DIP: a new text comes in last, or first to be evicted, whichever would have found more."""

    def __init__(self, pool: BlockPool):
        self.shadows = [Shadow(pool.num_usable, first) for first in (False, True)]
        self.lead = 0
        self.rows = count(1)
        self.dice = random.Random(0)
        super().__init__(pool)

    def settle(self) -> None:
        for block in self.row:
            last, first = (shadow.has(self.pool.hash_of[block]) for shadow in self.shadows)
            self.lead = max(-1024, min(1024, self.lead + first - last))
        self.newest = -next(self.rows)  # the newest text is worth least
        super().settle()

    def worth(self, block: int, size: int) -> float:
        if self.lead > 0 and not self.uses[block] and self.dice.random() > 1 / 32:
            return self.newest
        return super().worth(block, size)


def ranked(pool: BlockPool, kind: type[Ranked]) -> int:
    """The block that a Ranked of this kind gives up."""
    if type(pool.cached) is not kind:  # the first eviction, or all was forgotten
        pool.cached = kind(pool)
    return pool.cached.pop_least()


def aged_frequency(pool: BlockPool) -> int:
    """The least frequently used, with dynamic aging (LFUDA: Arlitt et al. 2000)."""
    return ranked(pool, Ranked)


def cost_aware(pool: BlockPool) -> int:
    """Aged frequency times the cost of computing it again (GDSF: Cherkasova 1998)."""
    return ranked(pool, Costed)


def dueling(pool: BlockPool) -> int:
    """Aged frequency, in a scan the newest (dynamic insertion, DIP: Qureshi et al. 2007)."""
    return ranked(pool, Dueling)


OTHERS = {
    "victim": [largest, cheapest, furthest],
    "admission": [shortest, best_cached, first_fit],
    "eviction": [
        most_recently_used, first_published, by_chance, aged_frequency, cost_aware, dueling,
    ],
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    from .contest import main  # not above: this file is loaded alone, too

    main(argv)
