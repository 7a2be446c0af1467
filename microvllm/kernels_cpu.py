"""Paged attention on the CPU: numba walks the block table, nothing is gathered.

Gathering a paged cache before torch's attention costs more than all matrix products of a step. Here
every block is read where it lies, once for all query heads that share it, so a step of decodes runs
at about the speed of the memory. The idea is PagedAttention (Kwon et al. 2023), the softmax the
plain two-pass one: all scores of a few rows fit in the cache, there is no need for an online one.

The first call ever compiles for a few seconds; numba keeps the result on disk for later processes.
"""

from __future__ import annotations

import math
import threading

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

# numba's OpenMP layer finds the OpenMP library that torch has loaded before it, and so the kernel
# runs on torch's own threads. A pool of its own would fight for the cores with torch's workers,
# which spin for milliseconds after each matrix product in the hope of the next one.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
_one_at_a_time = threading.Lock()  # where OpenMP is missing, numba aborts on concurrent launches

_f32 = np.float32
# sums may be reordered, or nothing vectorises; but a NaN stays a NaN, except in finding a maximum
_SUMS = {"reassoc", "contract", "nsz"}
_jit = numba.njit(fastmath=_SUMS, error_model="numpy", nogil=True)
_EXP2 = tuple(_f32(math.log(2) ** n / math.factorial(n)) for n in range(8))  # Taylor, error 5e-9


@intrinsic
def _prefetch(typing_context, array, offset):
    """Ask for the cache line of array[offset] (flat), which must be contiguous.

    The blocks of a sequence lie anywhere, so the hardware cannot guess which one comes next.
    """

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        pointer = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        call = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type])
        i32 = ir.IntType(32)  # to read, keep in all cache levels, data
        builder.call(call, [pointer, i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(array, offset), codegen


@_jit
def _score(q, k, scores, following):
    """scores (n, m) = q (n, D) @ k (m, D).T, while the block that follows is being fetched."""
    n, D = q.shape
    m = k.shape[0]
    # 4 keys by 2 queries share their loads, and 8 independent sums keep the multipliers busy
    for x in range(0, m - 3, 4):
        for d in range(x * D, (x + 4) * D, 16):
            _prefetch(following, d)
        k0, k1, k2, k3 = k[x], k[x + 1], k[x + 2], k[x + 3]
        for i in range(0, n - 1, 2):
            q0, q1 = q[i], q[i + 1]
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = _f32(0)
            for d in range(D):
                a0 += q0[d] * k0[d]
                a1 += q0[d] * k1[d]
                a2 += q0[d] * k2[d]
                a3 += q0[d] * k3[d]
                b0 += q1[d] * k0[d]
                b1 += q1[d] * k1[d]
                b2 += q1[d] * k2[d]
                b3 += q1[d] * k3[d]
            s0, s1 = scores[i, x:], scores[i + 1, x:]
            s0[0], s0[1], s0[2], s0[3] = a0, a1, a2, a3
            s1[0], s1[1], s1[2], s1[3] = b0, b1, b2, b3
        if n % 2:
            q0, s0 = q[n - 1], scores[n - 1, x:]
            a0 = a1 = a2 = a3 = _f32(0)
            for d in range(D):
                a0 += q0[d] * k0[d]
                a1 += q0[d] * k1[d]
                a2 += q0[d] * k2[d]
                a3 += q0[d] * k3[d]
            s0[0], s0[1], s0[2], s0[3] = a0, a1, a2, a3
    for x in range(m // 4 * 4, m):
        k0 = k[x]
        for i in range(n):
            q0 = q[i]
            a0 = _f32(0)
            for d in range(D):
                a0 += q0[d] * k0[d]
            scores[i, x] = a0


@numba.njit(fastmath={"nnan", "nsz"}, nogil=True)
def _largest(scores):
    largest = _f32(-np.inf)
    for j in range(scores.size):
        largest = scores[j] if scores[j] > largest else largest
    return largest


@_jit
def _exp2(x):
    """2**x for x <= 0 to 1e-7; never smaller than 2**-126. LLVM knows no vector exp, but this."""
    x = _f32(-126) if x < _f32(-126) else x
    whole = np.floor(x + _f32(0.5))
    r = x - whole
    y = ((_EXP2[7] * r + _EXP2[6]) * r + _EXP2[5]) * r + _EXP2[4]
    y = (((y * r + _EXP2[3]) * r + _EXP2[2]) * r + _EXP2[1]) * r + _EXP2[0]
    return y * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@_jit
def _softmax(scores):
    """In place, not yet divided by the sum, which is returned."""
    largest = _largest(scores)
    total = _f32(0)
    for j in range(scores.size):
        p = _exp2(scores[j] - largest)
        scores[j] = p
        total += p
    return total


@_jit
def _mix(p, v, out, following):
    """out (n, D) += p (n, m) @ v (m, D), while the block that follows is being fetched."""
    n, m = p.shape
    D = v.shape[1]
    for x in range(0, m - 3, 4):
        for d in range(x * D, (x + 4) * D, 16):
            _prefetch(following, d)
        v0, v1, v2, v3 = v[x], v[x + 1], v[x + 2], v[x + 3]
        for i in range(n):
            y, pi = out[i], p[i, x:]
            p0, p1, p2, p3 = pi[0], pi[1], pi[2], pi[3]
            for d in range(D):
                y[d] += p0 * v0[d] + p1 * v1[d] + p2 * v2[d] + p3 * v3[d]
    for x in range(m // 4 * 4, m):
        vx = v[x]
        for i in range(n):
            y, p0 = out[i], p[i, x]
            for d in range(D):
                y[d] += p0 * vx[d]


@numba.njit(parallel=True, fastmath=_SUMS, error_model="numpy", nogil=True, cache=True)
def _attend(q, k, v, cu_seqlens, seq_lens, block_tables, window, rows, scratch, out):
    """Work item: `rows` rows of one sequence, with all query heads of one kv head."""
    n_head, D = q.shape[1:]
    n_kv_head, block_size = k.shape[1:3]
    group = n_head // n_kv_head
    scale = _f32(1 / (math.sqrt(D) * math.log(2)))  # of exp2
    tiles = 0
    for b in range(seq_lens.size):
        tiles += (cu_seqlens[b + 1] - cu_seqlens[b] + rows - 1) // rows
    tile = np.empty((tiles, 2), np.int64)  # sequence, first row
    tiles = 0
    for b in range(seq_lens.size):
        for r in range(cu_seqlens[b], cu_seqlens[b + 1], rows):
            tile[tiles, 0], tile[tiles, 1] = b, r
            tiles += 1
    threads = scratch.shape[0]
    for thread in numba.prange(threads):
        # every so-manieth item, not a run of them: long sequences and chunks lie side by side
        for item in range(thread, tiles * n_kv_head, threads):
            b, first = tile[item // n_kv_head]
            h = item % n_kv_head
            count = min(rows, cu_seqlens[b + 1] - first)
            position = seq_lens[b] - cu_seqlens[b + 1] + first
            start = max(0, position - window) if window >= 0 else 0
            stop = position + count  # keys [start, stop) are seen by some row of the item
            n = count * group
            qs = scratch[thread, :n, :D]
            y = scratch[thread, :n, D : 2 * D]
            scores = scratch[thread, :n, 2 * D :]
            for i in range(n):
                qi = q[first + i // group, h * group + i % group]
                for d in range(D):
                    qs[i, d] = qi[d] * scale
                    y[i, d] = 0
            lo, hi = start // block_size, (stop - 1) // block_size
            for j in range(lo, hi + 1):
                x0, x1 = max(start - j * block_size, 0), min(stop - j * block_size, block_size)
                following = k[block_tables[b, j + 1], h] if j < hi else v[block_tables[b, lo], h]
                at = j * block_size + x0 - start
                _score(qs, k[block_tables[b, j], h, x0:x1], scores[:, at:], following)
            for i in range(n):
                right = position + i // group + 1 - start
                left = max(0, right - 1 - window) if window >= 0 else 0
                scores[i, :left] = 0
                scores[i, right : stop - start] = 0
                qs[i, 0] = 1 / _softmax(scores[i, left:right])  # the query has done its work
            for j in range(lo, hi + 1):
                x0, x1 = max(start - j * block_size, 0), min(stop - j * block_size, block_size)
                following = v[block_tables[b, min(j + 1, hi)], h]
                at = j * block_size + x0 - start
                p = scores[:, at : at + x1 - x0]
                _mix(p, v[block_tables[b, j], h, x0:x1], y, following)
            for i in range(n):
                yi = out[first + i // group, h * group + i % group]
                for d in range(D):
                    yi[d] = y[i, d] * qs[i, 0]


def paged_attention(q: Tensor, k: Tensor, v: Tensor, batch, window: int) -> Tensor:
    group = q.shape[1] // k.shape[1]
    rows = max(1, min(batch.max_query, 16 // group))
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    D = q.shape[2]
    width = ((batch.max_seq + 2 * D + 15) // 16 | 1) * 16
    scratch = torch.empty(threads, rows * group, width)
    out = torch.empty_like(q)
    with _one_at_a_time:
        numba.set_num_threads(threads)
        _attend(q.numpy(), k.numpy(), v.numpy(), batch.cu_seqlens.numpy(), batch.seq_lens.numpy(),
            batch.block_tables.numpy(), window, rows, scratch.numpy(), out.numpy())
    return out
