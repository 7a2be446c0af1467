"""Batches that are spelled out row by row, without an engine."""

from itertools import accumulate
from types import SimpleNamespace

import torch


class HandMadeBatch(SimpleNamespace):
    """A batch with those fields of attention.Batch that a model reads."""

    def _replace(self, **changes):
        return HandMadeBatch(**{**vars(self), **changes})


def hand_made_batch(chunks: list[tuple], block_size: int) -> HandMadeBatch:
    """What make_batch makes for layers of one group, with the logits of every row.

    chunks: (token_ids, start, stop, block_table) each: the tokens [start, stop) of a sequence;
    those of a single token first.
    """

    def ints(values) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int32)

    lengths = [stop - start for _, start, stop, _ in chunks]
    assert lengths == sorted(lengths, key=lambda n: n > 1), "decodes come first"
    rows = [(ids, p, table) for ids, start, stop, table in chunks for p in range(start, stop)]
    width = 1 + max(len(table) for *_, table in chunks)  # a column more than is used
    return HandMadeBatch(
        token_ids=ints(ids[p] for ids, p, _ in rows),
        prev_token_ids=ints(ids[p - 1] if p else 0 for ids, p, _ in rows),
        positions=ints(p for _, p, _ in rows),
        slots=ints(table[p // block_size] * block_size + p % block_size for _, p, table in rows),
        cu_seqlens=ints(accumulate(lengths, initial=0)),
        seq_lens=ints(stop for _, _, stop, _ in chunks),
        block_tables=ints([*table, *[0] * (width - len(table))] for *_, table in chunks),
        hidden_rows=ints(range(len(rows))),
        num_decodes=lengths.count(1),
        max_query_len=max(lengths),
        max_seq_len=max(stop for _, _, stop, _ in chunks),
    )


def slots_of(view) -> list[int]:
    """For each token of a SequenceKVView, where its K and V are: block * block_size + offset."""
    block_size = view.k.shape[2]
    block_table = view.block_table.tolist()
    return [
        block_table[p // block_size] * block_size + p % block_size for p in range(view.num_tokens)
    ]
