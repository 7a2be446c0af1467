"""Layers in groups: blocks whose every token has left the attention window are given back.

A block table has an entry for each group, side by side, and the sink takes the place of a block
that was given back. With two groups, the second with a window, at a sequence's fourth place:

    place      0        1        2        3
    table     [5 0]    [2 0]    [8 6]    [9 4]
               | `- group 1: the window has moved on, the block serves another text
               `--- group 0: sees all
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from ..attention import PagedKVCache
from ..engine import LLM
from ..scheduler import BlockManager, Sequence


def group_layers(windows: list[int], length: int) -> list[tuple[int, list[int]]]:
    """Layers of one window that share a block table: (window, layers) of each group, those that see
    all (-1) first.

    Since a block of any group takes the same memory, that of the largest one, a single pool serves
    them all (the idea of vLLM's hybrid KV cache manager). Taken is the size that needs least of it
    for a sequence of `length` tokens. Where windows save nothing, all layers are one group.
    """
    kinds: dict[int, list[int]] = {}
    for i, window in enumerate(windows):
        kinds.setdefault(window if 0 <= window < length - 1 else -1, []).append(i)
    parts = sorted(kinds.items())

    def cost(groups) -> int:  # a window begins and ends anywhere in a block, of 16 as a rule
        tokens = sum(min(w + 32, length) if w >= 0 else length for w, _ in groups)
        return tokens * max(len(layers) for _, layers in groups)

    options = [[(-1, list(range(len(windows))))]]
    for size in range(len(windows), 0, -1):
        options.append([(w, of[i : i + size]) for w, of in parts for i in range(0, len(of), size)])
    # every group's table goes to the device in each step: four are enough for SSSL
    return min((groups for groups in options if len(groups) <= 4), key=cost)


def most_blocks(windows: Iterable[int], block_size: int, num_tokens: int, chunk: int = 1) -> int:
    """Blocks that a sequence holds at most on its way to so many tokens, if a step computes up to
    `chunk` of them; windows: of the groups."""
    full = -(-num_tokens // block_size)
    # a chunk and the window before it, wherever in a block they begin
    spans = (-(-(w + chunk - 1) // block_size) + 1 if w >= 0 else full for w in windows)
    return sum(min(full, span) for span in spans)


class GroupedBlocks(BlockManager):
    """A BlockManager with tables of one block a group; windows: how many tokens back each group's
    layers see, -1 is all."""

    def __init__(self, *args, windows: Iterable[int] = (-1,)):
        super().__init__(*args)
        self.windows = tuple(windows)
        self.reach = [w if w >= 0 else 2**31 for w in self.windows]  # a window that nothing leaves
        self.width = len(self.windows)
        # what a text's hash is followed by where a group's block is looked for
        self.marks = [b"", *(bytes([group]) for group in range(1, self.width))]

    def share(self, block: int) -> None:
        if block:  # the sink, which stands for what has left its window, belongs to nobody
            super().share(block)

    def release(self, block: int) -> None:
        if block:
            super().release(block)

    def most_blocks(self, num_tokens: int, chunk: int) -> int:
        return most_blocks(self.windows, self.block_size, num_tokens, chunk)

    def block_tables(self, seqs: list[Sequence]) -> np.ndarray:
        """(G, B, M) int32."""
        tables = super().block_tables(seqs).reshape(len(seqs), -1, self.width)
        return np.ascontiguousarray(tables.transpose(2, 0, 1))

    def first_seen(self, position: int) -> list[int]:
        """The first place of a table that a token there sees, for each group."""
        return [max(0, position - w) // self.block_size for w in self.reach]

    def match(self, seq: Sequence, num_tokens: int) -> list[int]:
        """Entries for the longest beginning of which the blocks that the next token sees are
        there."""
        if not self.enable_prefix_caching:
            return []
        count = num_tokens // self.block_size
        hashes, found = self.compute_hashes(seq, count), self.block_of.get
        rows = [[found(h + mark, 0) for h in hashes] for mark in self.marks]
        while True:  # a gap is seen by all that is longer than up to there
            seen = list(zip(rows, self.first_seen(count * self.block_size), strict=True))
            gaps = [row.index(0, first) for row, first in seen if 0 in row[first:count]]
            if not gaps:
                return [row[i] if i >= first else 0 for i in range(count) for row, first in seen]
            count = min(gaps)

    def admit(self, seq: Sequence, hits: list[int], stop: int, reserve: int = 0) -> bool:
        seq.slides_at = 0  # the position whose step may give blocks back
        return super().admit(seq, hits, stop, reserve)

    def grow(self, seq: Sequence, start: int, stop: int) -> bool:
        """As in the core; before it, blocks that have left their window are given back."""
        if start >= seq.slides_at:
            self.slide(seq, start)
        grown = super().grow(seq, start, stop)
        seq.num_writable = min(seq.num_writable, seq.slides_at)
        return grown

    def slide(self, seq: Sequence, start: int) -> None:
        """Give back the blocks that no token from `start` on sees; what is nearer is worth less."""
        gone, firsts = [], self.first_seen(start)
        leaves = [w + (i + 1) * self.block_size for w, i in zip(self.reach, firsts, strict=True)]
        seq.slides_at = min(leaves)
        for group, first in enumerate(firsts):
            for i in range((first - 1) * self.width + group, -1, -self.width):
                if not seq.table[i]:
                    break
                gone.append(seq.table[i])
                seq.table[i] = 0
                self.release(gone[-1])
        if gone:
            self.events.note("window", seq, gone)

    def publish(self, seq: Sequence, num_tokens: int) -> None:
        count = num_tokens // self.block_size
        if not self.enable_prefix_caching or count <= seq.num_published:
            return
        hashes = self.compute_hashes(seq, count)
        for i in range(seq.num_published * self.width, count * self.width):
            if seq.table[i]:
                h = hashes[i // self.width] + self.marks[i % self.width]
                self.set_hash(seq, seq.table[i], h)
        seq.num_published = count

    def check_table(self, seq: Sequence, texts: dict) -> None:
        size, first_seen = self.block_size, self.first_seen(seq.num_computed)
        for entry, block in enumerate(seq.table):
            i, group = divmod(entry, self.width)
            if block == 0:
                assert i < first_seen[group], f"the next token sees entry {entry}, the sink"
                continue
            assert self.reach[group] + (i + 1) * size >= seq.slides_at, "a block stayed"
            if self.ref_count[block] > 1:
                text = group, seq.tokens[i * size : min((i + 1) * size, seq.num_computed)]
                assert texts.setdefault(block, text) == text, f"block {block} has two texts"
        at = seq.num_computed // size * self.width
        holders = {self.ref_count[block] for block in seq.table[at : at + self.width]}
        assert len(holders) <= 1, f"some groups share what is written next: {holders}"
        held = len(seq.table), seq.num_computed, seq.num_published
        assert len(seq.table) >= self.blocks_for(seq.num_computed), held
        assert seq.num_published <= seq.num_computed // size or not seq.table, held


class GroupedCache(PagedKVCache):
    """K and V with as many layers in memory as the largest group has: the same memory is the first
    layer's of any group, and which group a block serves its owner knows. groups: the layers of
    each; places: of each layer, its group and where in `data` it is."""

    def __init__(self, config, num_blocks: int, block_size: int, dtype, device, groups):
        self.num_blocks, self.block_size, self.num_groups = num_blocks, block_size, len(groups)
        places = {i: (g, j) for g, group in enumerate(groups) for j, i in enumerate(group)}
        self.places = [places[i] for i in range(len(places))]
        depth = max(map(len, groups))
        self.data = self.allocate(config, depth, dtype, torch.device(device))
        self.kv = [tuple(self.data[j]) for _, j in self.places]

    def layers(self, batch) -> Iterator[tuple[Tensor, Tensor, object]]:
        each = zip(batch.slots, batch.block_tables, strict=True)
        views = [batch._replace(slots=slots, block_tables=tables) for slots, tables in each]
        for (k, v), (group, _) in zip(self.kv, self.places, strict=True):
            yield k, v, views[group]


class WindowsLLM(LLM):
    """An engine whose memory is in groups, where the model's windows make that worth it."""

    def _make_memory(self, num_blocks: int | None, block_size: int, *options):
        groups = group_layers(self.model.windows, self.max_model_len)
        windows, layers = zip(*groups, strict=True)
        if windows == (-1,):
            return super()._make_memory(num_blocks, block_size, *options)
        config, dtype = self.model.kv_layout
        # what the user calls a block, of all layers, is one of each group and as much memory
        places = len(layers) * max(map(len, layers))
        numbers = 2 * places * config.n_kv_head * config.head_dim * block_size
        longest = most_blocks(windows, block_size, self.max_model_len)
        wanted = -(-self.max_batch_size * longest // len(windows)) + 1
        # a sequence may be longer than the pool if no group sees all of it
        reach = len(windows) * block_size if -1 in windows else self.max_model_len
        bytes_each = numbers * dtype.itemsize
        num_blocks = self._pool_size(num_blocks, wanted, block_size, bytes_each, reach)
        pool = (num_blocks - 1) * len(windows) + 1
        cache = GroupedCache(config, pool, block_size, dtype, self.device, layers)
        return cache, GroupedBlocks(pool, block_size, *options, windows=windows)


PARTS = {"llm": WindowsLLM}
