"""Paged attention in numba, over the block table.

Gathering a paged cache before torch's attention costs more than all matrix products of a step. Here
every block is read where it lies, once for all the query heads that share it, at about the speed of
the memory. Block tables are PagedAttention's (Kwon et al. 2023), the softmax is the plain one: the
scores of a few rows fit in the processor's cache, nothing is online.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from numba.core import cgutils
from torch import Tensor

from .steps import array_of, exp2, largest
from .vectors import EXACT, FAST, LANES, kept, one_at_a_time, threads_for, vectorised

_f32 = np.float32


@vectorised()
def _fetch(b, x, start, D):
    """Start loading four rows of D numbers from x's flat index `start` on: the next block of a
    sequence may lie anywhere, the hardware cannot guess where."""
    line = b.i64(32 if x.data.type.pointee == b.i16 else 16)
    start, count = b.at(x.data, start), b.mul(D, b.i64(4))
    with cgutils.for_range_slice(b, b.i64(0), count, line, b.i64) as (d, _):
        b.start_loading(b.at(start, d))


@vectorised()
def _dot4(b, q, q_at, k, at0, at1, at2, at3, D, s, s_at):
    """s (4,) = q (D,) times each of four keys (D,), all at flat indices: four independent sums."""
    q, s = b.at(q.data, q_at), b.at(s.data, s_at)
    keys = [b.at(k.data, i) for i in (at0, at1, at2, at3)]
    width = b.i64(LANES)
    whole = b.mul(b.udiv(D, width), width)

    def add(sums, d, lanes):
        value = b.read(b.at(q, d), lanes)
        for each, key in zip(sums, keys, strict=True):
            b.store(b.multiply_add(value, b.read(b.at(key, d), lanes), b.load(each)), each)

    sums = [cgutils.alloca_once(b, b.kind(b.f32), zfill=True) for _ in keys]
    with cgutils.for_range_slice(b, b.i64(0), whole, width, b.i64) as (d, _):
        add(sums, d, LANES)
    name, totals = f"llvm.vector.reduce.fadd.v{LANES}f32", []
    for each in sums:
        total = b.ask(name, b.f32, b.f32(0), b.load(each), fastmath=("reassoc",))
        totals.append(cgutils.alloca_once_value(b, total))
    with cgutils.for_range_slice(b, whole, D, b.i64(1), b.i64) as (d, _):
        add(totals, d, 1)
    for i, total in enumerate(totals):
        b.write(b.load(total), b.at(s, i))


@vectorised()
def _mix(b, p, p_at, m, v, v_at, D, y, y_at):
    """y (D,) += p (m,) @ v (m, D), all at flat indices; a part of y stays in registers."""
    p, v, y = b.at(p.data, p_at), b.at(v.data, v_at), b.at(y.data, y_at)
    start = b.i64(0)
    for count, lanes in ((4, LANES), (1, LANES), (1, 1)):
        sums = [cgutils.alloca_once(b, b.kind(b.f32, lanes)) for _ in range(count)]
        size = b.i64(count * lanes)
        stop = b.mul(b.udiv(D, size), size)
        with cgutils.for_range_slice(b, start, stop, size, b.i64) as (d, _):
            for i, each in enumerate(sums):
                b.store(b.read(b.at(y, d, (i, lanes)), lanes), each)
            with cgutils.for_range(b, m, intp=b.i64) as loop:
                weight = b.splat(b.load(b.at(p, loop.index)), lanes)
                row = b.at(v, (loop.index, D), d)
                for i, each in enumerate(sums):
                    value = b.read(b.at(row, (i, lanes)), lanes)
                    b.store(b.multiply_add(weight, value, b.load(each)), each)
            for i, each in enumerate(sums):
                b.write(b.load(each), b.at(y, d, (i, lanes)))
        start = stop


@numba.njit(**FAST)
def _softmax(scores):
    """In place, but for the division by the sum, which is returned."""
    top = largest(scores)
    total = _f32(0)
    for j in range(scores.size):
        scores[j] = exp2(scores[j] - top)
        total += scores[j]
    return total


@numba.njit(**EXACT)
def _attend_tile(q, k, v, h, table, position, window, qs, ys, scores, out):
    """Some rows of one sequence, the first at `position`, against kv head h: q, out (count, n_head,
    D), table (M,); scratch: qs, ys (n, D), scores (n, width), n = count * the query heads of h."""
    n, D = qs.shape
    n_kv_head, block_size = k.shape[1:3]
    group, width = q.shape[1] // n_kv_head, scores.shape[1]
    scale = _f32(1 / (math.sqrt(D) * math.log(2)))  # powers of 2, not of e
    for i in range(n):
        qi, qs_i, yi = q[i // group, h * group + i % group], qs[i], ys[i]
        for d in range(D):
            qs_i[d] = qi[d] * scale
            yi[d] = 0
    start = max(0, position - window) if window >= 0 else 0
    # keys are read four at a time: the same four whatever row of the tile comes first, so that the
    # bits of a row do not depend on it
    start -= start % block_size % 4
    stop = position + q.shape[0]  # some row sees the keys [start, stop)
    first, blocks = start // block_size, (stop - 1) // block_size + 1
    for b in range(first, blocks):
        at = b * block_size - start  # of the block's first key among the seen
        x0, x1 = max(-at, 0), min(stop - start - at, block_size)
        base = (table[b] * n_kv_head + h) * block_size
        near = (table[min(b + 1, blocks - 1)] * n_kv_head + h) * block_size
        for x in range(x0, x1, 4):
            _fetch(k, (near + x) * D, D)
            last = (base + x1 - 1) * D
            k0 = (base + x) * D
            k1, k2, k3 = min(k0 + D, last), min(k0 + 2 * D, last), min(k0 + 3 * D, last)
            for i in range(n):
                # where the block ends the last key comes again, to be overwritten
                _dot4(qs, i * D, k, k0, k1, k2, k3, D, scores, i * width + at + x)
    for i in range(n):
        right = position + i // group + 1 - start
        left = max(0, right - 1 - window) if window >= 0 else 0
        scores[i, :left] = 0
        scores[i, right : stop - start] = 0
        qs[i, 0] = 1 / _softmax(scores[i, left:right])  # the query is not needed any more
    for b in range(first, blocks):
        at = b * block_size - start
        x0, x1 = max(-at, 0), min(stop - start - at, block_size)
        base = (table[b] * n_kv_head + h) * block_size
        near = (table[min(b + 1, blocks - 1)] * n_kv_head + h) * block_size
        for x in range(x0, x1, 4):
            _fetch(v, (near + x) * D, D)
            for i in range(n):
                _mix(scores, i * width + at + x, min(4, x1 - x), v, (base + x) * D, D, ys, i * D)
    for i in range(n):
        out_i, yi = out[i // group, h * group + i % group], ys[i]
        for d in range(D):
            out_i[d] = yi[d] * qs[i, 0]


@kept(parallel=True, **FAST)
def attend_rows(q, k, v, cu_seqlens, seq_lens, block_tables, window, rows, scratch, out):
    """Tiles of up to `rows` rows and one kv head are dealt to the threads like cards: a batch may
    begin with decodes and end with long chunks."""
    D, n_kv_head, threads = q.shape[2], k.shape[1], scratch.shape[0]
    most = rows * (q.shape[1] // n_kv_head)  # queries in a tile
    for thread in numba.prange(threads):
        mine = scratch[thread]
        qs = mine[: most * D].reshape(most, D)
        ys = mine[most * D : 2 * most * D].reshape(most, D)
        scores = mine[2 * most * D :].reshape(most, -1)
        turn = 0
        for b in range(seq_lens.size):
            end = cu_seqlens[b + 1]
            for r in range(cu_seqlens[b], end, rows):
                stop = min(r + rows, end)
                n, position = (stop - r) * (most // rows), seq_lens[b] - end + r
                for h in range(n_kv_head):
                    if turn == thread:
                        _attend_tile(
                            q[r:stop], k, v, h, block_tables[b], position, window,
                            qs[:n], ys[:n], scores[:n], out[r:stop],
                        )  # fmt: skip
                    turn = (turn + 1) % threads


def tile(batch, group: int) -> tuple[int, int]:
    """Rows of one sequence that are done together, and how long a row of scores is."""
    # 16 queries read a block of keys together: their scores still fit in the second-level cache
    rows = max(1, min(batch.max_query, 16 // group))
    # an odd number of cache lines per row, else the same column of all rows falls into one set
    return rows, ((batch.max_seq + 3 + 15) // 16 | 1) * 16  # + 3: keys come by four


def paged_attention(q: Tensor, k: Tensor, v: Tensor, batch, window: int) -> Tensor:
    """Attention as ../attention.py describes it: q in float32, k and v in float32 or bfloat16.

    Chunks come here too, of any length: a gather and torch's attention take 5 to 8 times as long
    for 64 prompts of 23 tokens, 1.4 to 2.4 times for one of 512, 0.9 to 1.3 times for 2,048.
    """
    group, D = q.shape[1] // k.shape[1], q.shape[2]
    rows, width = tile(batch, group)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    where = batch.cu_seqlens, batch.seq_lens, batch.block_tables
    arrays = [array_of(x) for x in (q.contiguous(), k, v, *where)]
    with one_at_a_time:
        threads = threads_for(len(q) * k.shape[1])
        scratch = torch.empty(threads, rows * group * (2 * D + width))
        attend_rows(*arrays, window, rows, scratch.numpy(), out.numpy())
    return out
