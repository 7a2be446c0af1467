"""The paged KV cache, and attention over it: one function, several backends.

Every backend has the signature of `sdpa_attention`, the reference that all of them are compared
with:

    attend(q, k, v, batch, window) -> (T, H, D)

q (T, H, D) are the batch's queries, rotated, normed and scaled; k, v (N, Hkv, block_size, D) one
layer's cache, in which the batch's own rows are already written. A query at position p sees the
keys j of its own sequence with p - window <= j <= p (window < 0: all j <= p), scores are divided by
sqrt(D), query head n reads kv head n // (H // Hkv). k and v may be of a smaller dtype than q.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# of blocks, at a time: a copy takes as much memory again while it runs, gigabytes for 500 samples
# that diverge in one step
COPY_BYTES = 2**28


class PagedKVCache:
    """K and V of all layers in one allocation, cut into blocks.

    groups: (window, layers) of those that share block tables, see scheduler.group_layers, by
    default all do. A block serves one group, and which one its owner knows: the same memory is the
    first layer's of any group.

    Inside a block the order is [kv_head, slot, dim]: one head's keys of a block are contiguous,
    which a CPU reads a quarter faster than [slot, kv_head, dim]; a GPU does not mind. Zeroed, since
    a masked score of 0 times a NaN left in an unused slot would be NaN.
    """

    def __init__(self, config, num_blocks: int, block_size: int, dtype, device, groups=None):
        groups = [layers for _, layers in groups or [(-1, range(config.n_layer))]]
        depth = max(map(len, groups))
        shape = (depth, 2, num_blocks, config.n_kv_head, block_size, config.head_dim)
        if torch.device(device).type == "cpu":
            # numpy's zeros are pages that exist only once they are written; torch would write them
            zeros = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
            self.data = torch.from_numpy(zeros).view(dtype).view(shape)
        else:
            self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.num_blocks, self.block_size, self.num_groups = num_blocks, block_size, len(groups)
        places = sorted((i, g, j) for g, group in enumerate(groups) for j, i in enumerate(group))
        # of each layer: its group, and where in `data` it is
        self.group_of, self.depth_of = (np.array([p[i] for p in places]) for i in (1, 2))
        self.layers = [(self.data[j, 0], self.data[j, 1]) for _, _, j in places]

    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        """k, v of layer i, each (num_blocks, n_kv_head, block_size, head_dim)."""
        return self.layers[i]

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """(source, destination) pairs, all layers of their group at once. A source may be a later
        pair's destination (it was freed in between), never the other way round."""
        pairs = torch.tensor(copies)
        if self.data.is_cuda:  # pinned, so that the host does not wait for the running step
            pairs = pairs.pin_memory()
        size = max(1, COPY_BYTES // (self.data[:, :, 0].numel() * self.data.itemsize))
        for part in pairs.to(self.data.device, non_blocking=True).split(size):
            source, target = part.T
            self.data[:, :, target] = self.data[:, :, source]


class SequenceKVView:
    """The logical picture of one sequence: its K and V in order, wherever its blocks lie. The sink
    stands for what has left a window."""

    def __init__(self, cache: PagedKVCache, table: Iterable[int], num_tokens: int):
        self.cache, self.table, self.num_tokens = cache, list(table), num_tokens

    def slots(self, start: int = 0, stop: int | None = None, group: int = 0) -> list[int]:
        """Physical slots (block * block_size + offset) of the tokens [start, stop)."""
        size, table = self.cache.block_size, self.table[group :: self.cache.num_groups]
        stop = self.num_tokens if stop is None else stop
        return [table[p // size] * size + p % size for p in range(start, stop)]

    def gather(self, layer: int) -> tuple[Tensor, Tensor]:
        """k and v of one layer, each (num_tokens, n_kv_head, head_dim), copied out of the
        blocks."""
        table = self.table[self.cache.group_of[layer] :: self.cache.num_groups]
        return tuple(
            x[table].transpose(1, 2).flatten(0, 1)[: self.num_tokens]
            for x in self.cache.layer(layer)
        )


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Do the Triton kernels run there: an NVIDIA card from Ampere on, or one of AMD's?"""
    if device.type != "cuda" or not importlib.util.find_spec("triton"):
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def pick_backend(
    name: str, device: torch.device, dtype: torch.dtype, deterministic: bool = False
) -> Callable[..., Tensor]:
    """The backend called `name`; "auto" is the fastest one that runs on `device`.

    deterministic: the bits of a row may depend on nothing but its sequence up to there. Raises
    ValueError for an unknown name, or for a backend that cannot run here, saying why.
    """
    if name == "auto":
        if has_triton(device):
            name = "triton"
        elif device.type == "cpu" and dtype != torch.float16 and importlib.util.find_spec("numba"):
            name = "numba"
        else:
            name = "sdpa"
    if name == "sdpa":
        if deterministic:
            raise ValueError(
                "deterministic=True is for attention='numba' on a CPU (pip install numba, float32 "
                f"or bfloat16) and 'triton' on a GPU (pip install triton), not 'sdpa' on {device}"
            )
        return sdpa_attention
    if name == "numba":
        if device.type != "cpu" or dtype == torch.float16:
            raise ValueError(
                f"attention='numba' runs in float32 and bfloat16 on a CPU, not {dtype} on {device}"
            )
        from .cpu import kernels as kernels_cpu

        return kernels_cpu.paged_attention
    if name == "triton":
        if not has_triton(device):
            raise ValueError(
                "attention='triton' needs a GPU (of NVIDIA's, Ampere or newer) and triton, and the "
                f"device is {device}; use 'auto'"
            )
        from .gpu import kernels as kernels_gpu

        return kernels_gpu.fixed_attention if deterministic else kernels_gpu.paged_attention
    if name == "flash":
        if deterministic:
            raise ValueError("deterministic=True is for attention='triton' on a GPU, not 'flash'")
        return _pick_flash(device, dtype)
    raise ValueError(
        f"attention must be 'auto', 'sdpa', 'numba', 'triton' or 'flash', got {name!r}"
    )


# FlashAttention with a paged cache ----------------------------------------------------------------

# three packages have it, each by another name. all take K and V as (blocks, slots, heads, D), of
# which only the last has to be contiguous: ours, with two axes exchanged, are read as they lie


def _pick_flash(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The best FlashAttention that is installed and runs on this card. Raises ValueError saying
    what is missing."""
    if device.type != "cuda" or torch.version.hip or dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            "attention='flash' is for float16 and bfloat16 on a GPU of NVIDIA's, not "
            f"{dtype} on {device}; use 'auto'"
        )
    card = torch.cuda.get_device_capability(device)
    for name, cards, load in (
        ("flash_attn_interface", (9,), _flash3),
        ("flash_attn.cute", (9, 10), _flash4),
        # 2 is built for every torch from 2.9 on, 1 for each of them up to 2.12
        *(
            ("kernels", (9,), lambda hub, i=i: _flash3(hub.get_kernel(FLASH3, version=i)))
            for i in (2, 1)
        ),
        ("torch.nn.attention.varlen", (8, 9, 10, 11, 12), _flash_of_torch),
    ):
        if card[0] in cards:
            try:
                return load(importlib.import_module(name))
            except Exception:  # not there, too old for a block table, or its hub out of reach
                continue
    raise ValueError(
        "attention='flash' found no FlashAttention with a block table for a card of compute "
        f"capability {card[0]}.{card[1]}: pip install 'torch>=2.12' (8.0 or newer), or "
        "flash-attn-4 or kernels>=0.12 (9.0); attention='triton' needs none of them"
    )


FLASH3 = "kernels-community/flash-attn3"  # on the Hugging Face hub


def _flash3(module) -> Callable[..., Tensor]:
    """FlashAttention-3 (Shah et al. 2024), blocks of any size. https://github.com/Dao-AILab/
    flash-attention, hopper/flash_attn_interface.py."""
    flash = module.flash_attn_with_kvcache

    def attend(q, k, v, batch, window):
        return flash(
            q, k.transpose(1, 2), v.transpose(1, 2), cache_seqlens=batch.seq_lens,
            page_table=batch.block_tables, cu_seqlens_q=batch.cu_seqlens,
            max_seqlen_q=batch.max_query, causal=True, window_size=(window, min(window, 0)),
        )  # fmt: skip

    return attend


def _flash4(module) -> Callable[..., Tensor]:
    """FlashAttention-4, blocks of any size; None is no limit of a window. The same repository,
    flash_attn/cute/interface.py."""
    flash = module.flash_attn_varlen_func

    def attend(q, k, v, batch, window):
        out = flash(
            q, k.transpose(1, 2), v.transpose(1, 2), cu_seqlens_q=batch.cu_seqlens,
            max_seqlen_q=batch.max_query, max_seqlen_k=batch.max_seq, seqused_k=batch.seq_lens,
            page_table=batch.block_tables, causal=True,
            window_size=(window, 0) if window >= 0 else (None, None),
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    return attend


def _flash_of_torch(module) -> Callable[..., Tensor]:
    """torch's own, FlashAttention-2 unless another was activated: blocks of a multiple of 256."""
    flash = module.varlen_attn
    if "block_table" not in inspect.signature(flash).parameters:
        raise AttributeError

    def attend(q, k, v, batch, window):
        """torch's FlashAttention wants blocks of 256 tokens: block_size=256, or attention='triton',
        or pip install flash-attn-4 or kernels, which take any"""
        # its kernel wants the keys' running sum, too, and then reads the lengths. one split: with
        # more the rows after the first sequence's stay unwritten (pytorch/pytorch#194167)
        sums = F.pad(batch.seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
        return flash(
            q, k.transpose(1, 2), v.transpose(1, 2), batch.cu_seqlens, sums, batch.max_query,
            batch.max_seq, window_size=(window, 0), enable_gqa=True, seqused_k=batch.seq_lens,
            block_table=batch.block_tables, num_splits=1,
        )  # fmt: skip

    attend.block_step = 256
    return attend


def visible(positions: Tensor, keys: Tensor, window: int) -> Tensor:
    """(..., Q, K) bool: may the query at positions[..., q] see the key at position keys[k]?"""
    distance = positions[..., None] - keys
    return (distance >= 0) if window < 0 else (distance >= 0) & (distance <= window)


# numbers that are gathered at a time, of K and of V each: 256 MB of float32. with all decodes at
# once, padded to the longest, a few long sequences in a full batch would take gigabytes in mid-run
GATHERED = 2**26


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, batch, window: int) -> Tensor:
    """The reference: gather K and V through the block table, then torch's own attention.

    Decodes in padded calls, as many at a time as GATHERED allows, each longer chunk in one of its
    own.
    """
    out = torch.empty_like(q)
    block_size, n = k.shape[2], batch.num_decodes
    width = -(-batch.max_seq // block_size)  # columns of the block tables
    seen = torch.arange(width * block_size, device=q.device)
    size = max(1, GATHERED // (k[0].numel() * width))
    for first in range(0, n, size):
        rows = slice(first, min(first + size, n))
        # (rows, blocks, Hkv, block_size, D) -> (rows, Hkv, keys, D)
        tables = batch.block_tables[rows, :width]
        keys, values = (x[tables].transpose(1, 2).flatten(2, 3).to(q.dtype) for x in (k, v))
        mask = visible(batch.positions[rows, None], seen, window)[:, None]
        y = F.scaled_dot_product_attention(q[rows, :, None], keys, values, mask, enable_gqa=True)
        out[rows] = y[:, :, 0]
    firsts, lengths = batch.cu_seqlens.tolist(), batch.seq_lens.tolist()
    for b in range(n, len(lengths)):
        rows, length = slice(firsts[b], firsts[b + 1]), lengths[b]
        table = batch.block_tables[b, : -(-length // block_size)]
        keys, values = (
            x[table].transpose(0, 1).flatten(1, 2)[:, :length].to(q.dtype) for x in (k, v)
        )
        mask = visible(batch.positions[rows], torch.arange(length, device=q.device), window)
        y = F.scaled_dot_product_attention(
            q[rows].transpose(0, 1)[None], keys[None], values[None], mask, enable_gqa=True
        )
        out[rows] = y[0].transpose(0, 1)
    return out
