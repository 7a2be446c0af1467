"""Paged attention in numba, over the block table.

Gathering a paged cache before torch's attention costs more than all matrix products of a step. Here
every block is read where it lies, once for all the query heads that share it, and a step of decodes
runs at about the speed of the memory. Block tables are PagedAttention's (Kwon et al. 2023), the
softmax is the plain one: the scores of a few rows fit in the processor's cache, nothing is online.
"""

from __future__ import annotations

import math
from functools import partial

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from .products import (
    EXACT,
    FAST,
    LANES,
    address,
    f32,
    i64,
    keep_compiled,
    kind_of,
    multiply_add,
    one_at_a_time,
    read,
    splat,
    start_loading,
    threads_for,
    write,
)
from .steps import array_of, exp2, largest

_f32 = np.float32


@intrinsic
def _fetch(context, x, start, D):
    """Start loading four rows of D numbers from x's flat index `start` on, which are read later.

    The next block of a sequence may lie anywhere, the hardware cannot guess where.
    """

    def codegen(context, builder, signature, args):
        array = context.make_array(signature.args[0])(context, builder, args[0])
        line = 64 // (context.get_abi_sizeof(array.data.type.pointee))
        start, count = builder.gep(array.data, [args[1]]), builder.mul(args[2], i64(4))
        with cgutils.for_range_slice(builder, i64(0), count, i64(line), i64) as (d, _):
            start_loading(builder, builder.gep(start, [d]))
        return context.get_dummy_value()

    return types.void(x, start, D), codegen


@intrinsic
def _dot4(context, q, q_at, k, at0, at1, at2, at3, D, s, s_at):
    """s (4,) = q (D,) times each of four keys (D,), all at flat indices: four independent sums."""

    def codegen(context, builder, signature, args):
        q, k, s = (
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2, 8)
        )
        at, D = partial(address, builder), args[7]
        q, s = at(q, (args[1], 1)), at(s, (args[9], 1))
        keys = [at(k, (i, 1)) for i in args[3:7]]
        whole, totals = builder.mul(builder.udiv(D, i64(LANES)), i64(LANES)), []

        def add(sums, d, lanes):
            value = read(builder, at(q, (d, 1)), lanes)
            for each, key in zip(sums, keys, strict=True):
                product = value, read(builder, at(key, (d, 1)), lanes), builder.load(each)
                builder.store(multiply_add(builder, *product), each)

        vector = kind_of(f32, LANES)
        sums = [cgutils.alloca_once(builder, vector) for _ in keys]
        for each in sums:
            builder.store(ir.Constant(vector, [0.0] * LANES), each)
        with cgutils.for_range_slice(builder, i64(0), whole, i64(LANES), i64) as (d, _):
            add(sums, d, LANES)
        kind, name = (
            ir.FunctionType(f32, [f32, vector]),
            f"llvm.vector.reduce.fadd.v{LANES}f32",
        )
        reduce = cgutils.get_or_insert_function(builder.module, kind, name)
        for each in sums:
            total = builder.call(reduce, [f32(0), builder.load(each)], fastmath=("reassoc",))
            totals.append(cgutils.alloca_once_value(builder, total))
        with cgutils.for_range_slice(builder, whole, D, i64(1), i64) as (d, _):
            add(totals, d, 1)
        for i, total in enumerate(totals):
            write(builder, builder.load(total), at(s, (i, 1)))
        return context.get_dummy_value()

    return types.void(q, q_at, k, at0, at1, at2, at3, D, s, s_at), codegen


@intrinsic
def _mix(context, p, p_at, m, v, v_at, D, y, y_at):
    """y (D,) += p (m,) @ v (m, D), all at flat indices; a part of y stays in registers."""

    def codegen(context, builder, signature, args):
        p, v, y = (
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 3, 6)
        )
        at, m, D = partial(address, builder), args[2], args[5]
        p, v, y = at(p, (args[1], 1)), at(v, (args[4], 1)), at(y, (args[7], 1))
        start = i64(0)
        for count, lanes in ((4, LANES), (1, LANES), (1, 1)):
            sums = [cgutils.alloca_once(builder, kind_of(f32, lanes)) for _ in range(count)]
            size = i64(count * lanes)
            stop = builder.mul(builder.udiv(D, size), size)
            with cgutils.for_range_slice(builder, start, stop, size, i64) as (d, _):
                for i, each in enumerate(sums):
                    builder.store(read(builder, at(y, (d, 1), (i, lanes)), lanes), each)
                with cgutils.for_range(builder, m, intp=i64) as loop:
                    weight = splat(builder, builder.load(at(p, (loop.index, 1))), lanes)
                    row = at(v, (loop.index, D), (d, 1))
                    for i, each in enumerate(sums):
                        value = read(builder, at(row, (i, lanes)), lanes)
                        more = multiply_add(builder, weight, value, builder.load(each))
                        builder.store(more, each)
                for i, each in enumerate(sums):
                    write(builder, builder.load(each), at(y, (d, 1), (i, lanes)))
            start = stop
        return context.get_dummy_value()

    return types.void(p, p_at, m, v, v_at, D, y, y_at), codegen


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
    """Some consecutive rows of one sequence, the first at `position`, against kv head h.

    q, out (count, n_head, D) and table (M,) are the batch's; qs, ys (n, D) and scores (n, width)
    are scratch, n being count times the query heads of h.
    """
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


@numba.njit(parallel=True, **FAST)
def attend_rows(q, k, v, cu_seqlens, seq_lens, block_tables, window, rows, scratch, out):
    """Tiles of up to `rows` rows and one kv head, dealt to the threads like cards.

    Dealt, since a batch may begin with decodes and end with long chunks.
    """
    D = q.shape[2]
    n_kv_head = k.shape[1]
    most = rows * (q.shape[1] // n_kv_head)  # queries in a tile
    threads = scratch.shape[0]
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
                n = (stop - r) * (most // rows)
                position = seq_lens[b] - end + r
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
    """Attention of a flat batch over the paged cache, as ../attention.py describes it. Float32.

    q (T, n_head, D); k, v (num_blocks, n_kv_head, block_size, D), which may be bfloat16; returns
    (T, n_head, D).

    Chunks come here too, of any length: a gather and torch's attention take 5 to 8 times as long
    for 64 prompts of 23 tokens, 1.4 to 2.4 times for one of 512, 0.9 to 1.3 times for 2,048.
    """
    group, D = q.shape[1] // k.shape[1], q.shape[2]
    rows, width = tile(batch, group)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    tensors = q.contiguous(), k, v, batch.cu_seqlens, batch.seq_lens, batch.block_tables
    arrays = [array_of(x) for x in tensors]
    with one_at_a_time:
        threads = threads_for(len(q) * k.shape[1])
        scratch = torch.empty(threads, rows * group * (2 * D + width))
        attend_rows(*arrays, window, rows, scratch.numpy(), out.numpy())
    return out


keep_compiled(attend_rows)
