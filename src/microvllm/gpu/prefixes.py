r"""Decodes with the same first blocks read these blocks once: n samples of a prompt, questions
after one system prompt, few-shot evaluations.

    rows of a step   0   1   2   3   4   5
    block tables     3   3   3   7   7   8      rows 0 to 2 share two blocks,
                     4   4   4   9   9   1      rows 3 and 4 share three,
                     5   6   2  10  10  11      row 5 shares none
                    \_________/ \_____/  |
    tiles                2       3    none

The first launch computes, for each tile, the attention of all its queries over the shared blocks.
The second launch computes the other keys of each row, and merges both parts by the logarithms of
their sums, as Hydragen (Juravsky et al., 2024) and FlashInfer's cascade (Ye et al., 2025) do.
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..attention import Batch

LEAST = 64  # the fewest tokens that a tile shares


def shares_prefixes() -> bool:
    """Return whether decodes read shared blocks once. This is off by default, because its benefit
    is not measured on a GPU."""
    return os.environ.get("MICROVLLM_SHARED_PREFIXES") == "1"


class SharedPrefixes:
    """The tiles of each step. They are computed on the device, once for each block table."""

    def __init__(self):
        self.by_tables = WeakIdKeyDictionary()

    def find(self, batch: Batch, block_size: int, max_rows: int) -> Tensor:
        """Return the result of `find_shared` for the decodes of a batch."""
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
    """Group neighbouring rows with the same first blocks into tiles of up to max_rows rows. The
    host does not wait for the device.

    tables (B, M), seq_lens (B,). Returns (2, B) int32: for each row the number of tokens that its
    tile shares (0 for a row alone), and for the first row of a tile its number of rows (0 for the
    other rows).
    """
    num_rows, num_columns = tables.shape
    rows = torch.arange(num_rows, device=tables.device)
    columns = torch.arange(num_columns, device=tables.device)
    # the newest token is in a block of its own row, which may not be full
    num_full = (seq_lens - 1).clamp(min=0) // block_size
    limits = torch.minimum(num_full[1:], num_full[:-1])
    is_same = (tables[1:] == tables[:-1]) & (columns < limits[:, None])
    same = F.pad(
        is_same.long().cumprod(1).sum(1), (1, 0)
    )  # number of first blocks equal to those of the previous row
    # a tile shares the blocks that all its rows share. so a row starts a new tile if it shares much
    # less with the previous row than either of them shares with its other neighbour
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
