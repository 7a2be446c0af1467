"""Where do K and V lie, how does a plan become arrays, and how does a query find its keys?

An attention function is called as `sdpa_attention`, the reference with which tests compare others
(seam: GPT takes another as `attend`):

    attend(q, k, v, batch, window) -> (T, H, D)    T tokens, H query heads of D channels, N blocks

q (T, H, D): the batch's queries, rotated, normed and scaled. k, v (N, Hkv, block_size, D), of q's
or a smaller dtype: one layer's blocks, in which the batch's own K and V are. A query at position p
sees the keys j of its sequence with p - window <= j <= p (window < 0: all j <= p). Scores are
divided by sqrt(D). Query head n reads kv head n // (H // Hkv).

    what a sequence is                          where it lies, with blocks of 4 tokens
    position   0 1 2 3 | 4 5 6 7 | 8 9          block 0   the sink, for padding
    table      5         2         7            block 2   positions 4 to 7
                                                block 5   positions 0 to 3
    slot of position 6 = 2 * 4 + 2 = 10         block 7   positions 8 and 9, two slots free
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .sampler import noise, on

if TYPE_CHECKING:
    from .scheduler import BlockManager, Plan


COPY_BYTES = 2**28  # copied in one go, which takes as much memory again while it runs


class Batch(NamedTuple):
    """A step as arrays, numpy's until `to`: T rows, one a token, of B sequences, and R samples."""

    ids: Tensor  # (T,) int32 token ids; sequences with one row first
    prev_ids: Tensor  # (T,) int32 the id one position earlier (0 at position 0), for GPT.embed
    positions: Tensor  # (T,) int32 index of the token in its sequence
    slots: Tensor  # (T,) int32 block * block_size + offset, where K and V of the row go
    cu_seqlens: Tensor  # (B + 1,) int32 first row of each sequence, and at the end T
    seq_lens: Tensor  # (B,) int32 tokens of each sequence in the cache after this step
    block_tables: Tensor  # (B, M) int32 block numbers, shorter tables padded with 0, the sink
    logit_rows: Tensor  # (R,) int32 rows of which logits are computed
    temperature: Tensor  # (R,) float32
    noise: Tensor  # (R,) float32 in [0, 1), see sampler.noise
    num_decodes: int  # the first so many sequences have one row each
    max_query: int  # most rows of a sequence
    max_seq: int  # largest of seq_lens

    def to(self, device: torch.device) -> Batch:
        """The batch as tensors on the device."""
        put = torch.as_tensor
        return Batch(*[x if isinstance(x, int) else put(x, device=device) for x in self])


def make_batch(plan: Plan, blocks: BlockManager) -> Batch:
    """Turn a plan into a batch of numpy arrays."""
    starts = np.array([start for _, start, _ in plan.chunks], np.int32)
    stops = np.array([stop for _, _, stop in plan.chunks], np.int32)
    rows = stops - starts
    cu_seqlens = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(rows, out=cu_seqlens[1:])
    first_rows, num_rows = cu_seqlens[:-1], int(cu_seqlens[-1])
    chunk_of_row = np.repeat(np.arange(len(rows)), rows)
    positions = np.arange(num_rows, dtype=np.int32) + (starts - first_rows)[chunk_of_row]
    tokens = [seq.tokens[start:stop] for seq, start, stop in plan.chunks]
    ids = np.fromiter(chain.from_iterable(tokens), np.int32, num_rows)
    prev_ids = np.empty_like(ids)
    prev_ids[1:] = ids[:-1]
    prev_ids[first_rows] = [seq.tokens[start - 1] if start else 0 for seq, start, _ in plan.chunks]
    # (B, M), and slots (T,); a feature with G groups of layers has (G, B, M) and (G, T)
    tables, size = blocks.block_tables([seq for seq, _, _ in plan.chunks]), blocks.block_size
    slots = tables[..., chunk_of_row, positions // size] * size + positions % size
    chunk_of_sample = np.array([i for i, _, _ in plan.samples], np.int64)
    new_positions = np.array([position for _, _, position in plan.samples], np.int32)
    sample_ids = [seq.params.sample_index + seq.sample_id for _, seq, _ in plan.samples]
    return Batch(
        ids, prev_ids, positions, slots.astype(np.int32, "C"), cu_seqlens, stops, tables,
        # the new token at a position is sampled from the row one position earlier
        ((first_rows - starts)[chunk_of_sample] + new_positions - 1).astype(np.int32),
        np.array([p.temperature for p in plan.params], np.float32),
        noise([p.seed for p in plan.params], sample_ids, new_positions),
        int((rows == 1).sum()), int(rows.max()), int(stops.max()),
    )  # fmt: skip


class PagedKVCache:
    """K and V of all layers in one allocation, cut into blocks: (layers, 2, num_blocks, Hkv,
    block_size, D). One head's keys of a block are contiguous, which a CPU reads a quarter faster
    than [slot, kv_head, dim]; a GPU reads both alike. It begins as zeros: a masked key has weight
    0, but 0 times a NaN in an unused slot would be NaN."""

    def __init__(self, config, num_blocks: int, block_size: int, dtype, device):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.data = self.allocate(config, config.n_layer, dtype, torch.device(device))
        self.kv = [tuple(layer) for layer in self.data]  # k and v of each layer

    def allocate(self, config, num_layers: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeros of the shape above."""
        block = config.n_kv_head, self.block_size, config.head_dim
        shape = num_layers, 2, self.num_blocks, *block
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        # memory of numpy's zeros is used only once it is written; torch.zeros would write it all
        zeros = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
        return torch.from_numpy(zeros).view(dtype).view(shape)

    def layers(self, batch) -> Iterator[tuple[Tensor, Tensor, object]]:
        """Of each layer k, v and the batch. Seam: its slots and block tables may be the layer's."""
        for k, v in self.kv:
            yield k, v, batch

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy blocks of all layers, given as (source, destination), in their order: a later pair
        may overwrite a source that was freed in between."""
        if not copies:
            return
        size = max(1, COPY_BYTES // (self.data[:, :, 0].numel() * self.data.itemsize))
        for pairs in on(self.data.device, copies).split(size):
            source, target = pairs.T
            self.data[:, :, target] = self.data[:, :, source]


class SequenceKVView:
    """K and V of one sequence and one layer in the order of the tokens, wherever its blocks are.
    k, v (N, Hkv, block_size, D): the layer's blocks; table: the sequence's block numbers."""

    def __init__(self, k: Tensor, v: Tensor, table: Iterable[int], num_tokens: int):
        self.k, self.v, self.num_tokens = k, v, num_tokens
        self.table = torch.as_tensor(table, device=k.device)[: -(-num_tokens // k.shape[2])]

    def gather(self) -> tuple[Tensor, Tensor]:
        """k and v, each (Hkv, num_tokens, D), copied out of the blocks."""
        # (blocks, Hkv, block_size, D) -> (Hkv, blocks * block_size, D)
        k, v = (x[self.table].transpose(0, 1).flatten(1, 2) for x in (self.k, self.v))
        return k[:, : self.num_tokens], v[:, : self.num_tokens]


def store(k: Tensor, v: Tensor, new_k: Tensor, new_v: Tensor, slots: Tensor) -> None:
    """Write the batch's keys and values (T, Hkv, D) to their slots in a layer's blocks."""
    block_size = k.shape[2]
    blocks, offsets = slots // block_size, slots % block_size
    k[blocks, :, offsets] = new_k.to(k.dtype)
    v[blocks, :, offsets] = new_v.to(v.dtype)


def visible(positions: Tensor, keys: Tensor, window: int) -> Tensor:
    """(..., Q, K) bool: may the query at positions[..., q] see the key at position keys[k]?"""
    distance = positions[..., None] - keys
    return (distance >= 0) if window < 0 else (distance >= 0) & (distance <= window)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, batch, window: int) -> Tensor:
    """The reference: of each sequence gather K and V, then call torch's own attention."""
    out = torch.empty_like(q)
    first_rows, lengths = batch.cu_seqlens.tolist(), batch.seq_lens.tolist()
    for b, length in enumerate(lengths):
        rows = slice(first_rows[b], first_rows[b + 1])
        keys, values = SequenceKVView(k, v, batch.block_tables[b], length).gather()
        mask = visible(batch.positions[rows], torch.arange(length, device=q.device), window)
        y = F.scaled_dot_product_attention(
            q[rows].transpose(0, 1)[None], keys[None].to(q.dtype), values[None].to(q.dtype), mask,
            enable_gqa=True,
        )  # fmt: skip
        out[rows] = y[0].transpose(0, 1)
    return out
