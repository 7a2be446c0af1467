"""The order in which blocks were given back: Release, find_releases and in_order."""

from array import array
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from ..blocks import NULL_BLOCK
from ..scheduler import Plan, Sequence


@dataclass(slots=True, eq=False)
class Record:
    """A sequence as the events describe it."""

    number: int  # the number of the sequence in events
    num_tokens: int
    table: array = field(default_factory=lambda: array("i"))  # empty while it waits
    num_computed: int = 0
    num_published: int = 0


class Kind(Enum):
    """The reason why a table has lost blocks."""

    END = "the sequence has given back all blocks"
    WINDOW = "the blocks have left the window of their layers"
    REJECTED = "draft tokens were rejected, or planned steps with blocks were dropped"


@dataclass(slots=True, eq=False)
class Release:
    """Blocks that a table has lost since the last comparison, in the order of their release."""

    kind: Kind
    seq: Sequence
    record: Record
    blocks: list[int]


def find_releases(seq: Sequence, record: Record, plan: Plan) -> list[Release]:
    """Compare a table with its record. plan: the plan that was just made."""
    table = seq.block_table
    if not table:
        return [Release(Kind.END, seq, record, record.table[::-1].tolist())]
    sources = {target: source for source, target in plan.copies}
    window = []
    num_kept = min(len(table), len(record.table))
    for index in range(num_kept):
        before = record.table[index]
        now = table[index]
        if now == NULL_BLOCK and before != NULL_BLOCK:
            window.append(before)
        elif now != before and sources.get(now) != before:
            num_kept = index  # from here on, blocks were given back and replaced by others
            break
    rejected = record.table[num_kept:][::-1].tolist()
    releases = []
    if window:
        releases.append(Release(Kind.WINDOW, seq, record, window))
    if rejected or seq.num_computed < record.num_computed:
        releases.append(Release(Kind.REJECTED, seq, record, rejected))
    return releases


def in_order(releases: list[Release], cached: Iterable[int]) -> list[Release]:
    """Sort releases by time. cached: the released blocks that are cached now, in the order in which
    they became cached.

    A block becomes free with its last release. So the blocks of the last release that are still
    cached are at the end of the list. Without them, the same holds for the release before.
    """
    free = list(cached)
    left = set(free)
    releases_of: dict[int, list[Release]] = defaultdict(list)
    for release in releases:
        for block in release.blocks:
            if block in left:
                releases_of[block].append(release)
    last_first: list[Release] = []
    waiting = dict.fromkeys(releases)
    while free:
        candidates = [release for release in releases_of[free[-1]] if release in waiting]
        last = next((r for r in candidates if is_last(r, free, left)), None)
        if last is None:
            last = candidates[-1]
            if last.kind is Kind.END:
                earlier = separate_window(last, free, left)
                waiting[earlier] = None
                for block in earlier.blocks:
                    releases_of[block].append(earlier)
        del waiting[last]
        last_first.append(last)
        left.difference_update(last.blocks)
        while free and free[-1] not in left:
            free.pop()
    return [*waiting, *reversed(last_first)]  # the others have no cached block: any order is right


def is_last(release: Release, free: list[int], left: set[int]) -> bool:
    """Are the remaining blocks of a release at the end of `free`? Blocks that left a window have no
    fixed order: this sorts them as they are in `free`."""
    blocks = [block for block in release.blocks if block in left]
    end = free[len(free) - len(blocks) :]
    if release.kind is Kind.WINDOW and set(blocks) == set(end):
        release.blocks = [block for block in release.blocks if block not in left] + end
        return True
    return blocks == end


def separate_window(release: Release, free: list[int], left: set[int]) -> Release:
    """Split off the blocks of an ended sequence that had left their window just before: they are
    not at the end of `free`, unlike the others. Returns their release."""
    blocks = [block for block in release.blocks if block in left]
    num_last = 1
    while num_last < len(blocks):
        end = free[len(free) - num_last - 1 :]
        if [block for block in blocks if block in end] != end:
            break
        num_last += 1
    end = free[len(free) - num_last :]
    window = [block for block in blocks if block not in end]
    release.blocks = [block for block in release.blocks if block not in window]
    return Release(Kind.WINDOW, release.seq, release.record, window)
