"""Attention over a paged KV cache: one function, several backends.

Every backend has the signature of `sdpa_attention`, the reference that all of them are compared
with:

    attend(q, k, v, batch, window) -> (T, H, D)

q (T, H, D) are the batch's queries, rotated, normed and scaled; k, v (N, Hkv, block_size, D) one
layer's cache, in which the batch's own rows are already written. A query at position p sees the
keys j of its own sequence with p - window <= j <= p (window < 0: all j <= p), scores are divided by
sqrt(D), query head n reads kv head n // (H // Hkv). k and v may be of a smaller dtype than q.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def pick_backend(
    name: str, device: torch.device, dtype: torch.dtype, deterministic: bool = False
) -> Callable[..., Tensor]:
    """The backend called `name`; "auto" is the fastest one that runs on `device`.

    deterministic: the bits of a row may depend on nothing but its sequence up to there. Raises
    ValueError for an unknown name, or for a backend that cannot run here, saying why.
    """
    if name == "auto":
        if device.type == "cuda" and importlib.util.find_spec("triton"):
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
        from . import kernels_cpu

        return kernels_cpu.paged_attention
    if name == "triton":
        if device.type != "cuda":
            raise ValueError(
                f"attention='triton' needs a GPU, and the device is {device}; use 'auto'"
            )
        from . import kernels_gpu

        return kernels_gpu.fixed_attention if deterministic else kernels_gpu.paged_attention
    raise ValueError(f"attention must be 'auto', 'sdpa', 'numba' or 'triton', got {name!r}")


def visible(positions: Tensor, keys: Tensor, window: int) -> Tensor:
    """(..., Q, K) bool: may the query at positions[..., q] see the key at position keys[k]?"""
    distance = positions[..., None] - keys
    return (distance >= 0) if window < 0 else (distance >= 0) & (distance <= window)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, batch, window: int) -> Tensor:
    """The reference: gather K and V through the block table, then torch's own attention.

    All decodes in one padded call, each longer chunk in one of its own.
    """
    out = torch.empty_like(q)
    block_size = k.shape[2]
    n = batch.num_decodes
    if n:
        # (n, blocks, Hkv, block_size, D) -> (n, Hkv, keys, D)
        tables = batch.block_tables[:n, : -(-batch.max_seq // block_size)]
        keys, values = (x[tables].transpose(1, 2).flatten(2, 3).to(q.dtype) for x in (k, v))
        seen = torch.arange(keys.shape[2], device=q.device)
        mask = visible(batch.positions[:n, None], seen, window)[:, None]
        y = F.scaled_dot_product_attention(q[:n, :, None], keys, values, mask, enable_gqa=True)
        out[:n] = y[:, :, 0]
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
