r"""Decodes that share their first blocks read these once: n samples of a prompt, questions behind
one system prompt, few-shot evaluations.

    rows of a step   0   1   2   3   4   5
    block tables     3   3   3   7   7   8      rows 0 to 2 share two blocks,
                     4   4   4   9   9   1      rows 3 and 4 share three,
                     5   6   2  10  10  11      row 5 shares none
                    \_________/ \_____/  |
    tiles                2       3    none

A launch computes for each tile the partial attention of all its queries over the shared blocks; the
next one computes what each row has of its own, and merges both by the logarithms of their sums:
Hydragen (Juravsky et al., 2024), and the cascade of FlashInfer (Ye et al., 2025).
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..attention import Batch

LEAST = 64  # tokens that a tile shares, at least


def shares_prefixes() -> bool:
    """Is it switched on? No card has shown yet where it pays."""
    return os.environ.get("MICROVLLM_SHARED_PREFIXES") == "1"


class SharedPrefixes:
    """The tiles of each step, found on the device once for all layers of the same block tables."""

    def __init__(self):
        self.by_tables = WeakIdKeyDictionary()

    def find(self, batch: Batch, block_size: int, max_rows: int) -> Tensor:
        """`find_shared` of the batch's decodes."""
        shared = self.by_tables.get(batch.block_tables)
        if shared is None:
            num_decodes = batch.num_decodes
            shared = find_shared(
                batch.block_tables[:num_decodes],
                batch.seq_lens[:num_decodes],
                block_size,
                max_rows,
            )
            self.by_tables[batch.block_tables] = shared
        return shared


def find_shared(tables: Tensor, seq_lens: Tensor, block_size: int, max_rows: int) -> Tensor:
    """Neighbours with the same first blocks as tiles of up to max_rows rows. The host does not wait
    for the device.

    tables (B, M), seq_lens (B,). Returns (2, B) int32: for each row how many tokens its tile
    shares, 0 for a row alone; for the first row of a tile how many rows the tile has, for others 0.
    """
    num_rows, num_columns = tables.shape
    rows = torch.arange(num_rows, device=tables.device)
    columns = torch.arange(num_columns, device=tables.device)
    # the newest token is in a block of its own row, which may not be full
    num_full = (seq_lens - 1).clamp(min=0) // block_size
    limits = torch.minimum(num_full[1:], num_full[:-1])
    is_same = (tables[1:] == tables[:-1]) & (columns < limits[:, None])
    same = F.pad(is_same.long().cumprod(1).sum(1), (1, 0))  # blocks as the row before has them
    # a tile shares what any two neighbours in it share. so a row that shares much less with the
    # row before it than either of them shares with its other neighbour begins another tile
    most = torch.maximum(F.pad(same[:-1], (1, 0)), F.pad(same[1:], (0, 1)))
    joins = (same * block_size >= LEAST) & (4 * same >= 3 * most)
    starts = torch.where(joins, 0, rows).cummax(0).values
    first = starts + (rows - starts) // max_rows * max_rows  # of each row's tile
    counts = torch.zeros_like(rows).scatter_add(0, first, torch.ones_like(rows))
    shared = torch.where(first == rows, num_columns, same)
    least = torch.full_like(rows, num_columns).scatter_reduce(0, first, shared, "amin")
    has_others = counts > 1  # at the first row of a tile
    num_shared = torch.where(has_others, least * block_size, 0)[first]
    return torch.stack([num_shared, torch.where(has_others, counts, 0)]).int()
