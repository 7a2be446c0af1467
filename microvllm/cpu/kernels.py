"""The CPU's kernels in numba: model.py's steps, paged attention, a whole model, the draw.

Gathering a paged cache before torch's attention costs more than all matrix products of a step. Here
every block is read where it lies, once for all the query heads that share it, and a step of decodes
runs at about the speed of the memory. Block tables are PagedAttention's (Kwon et al. 2023), the
softmax is the plain one: the scores of a few rows fit in the processor's cache, nothing is online.

The very first call compiles for a while; numba keeps the result on disk for later processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from functools import partial
from itertools import chain

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload
from torch import Tensor

from ..model import relu2 as relu2  # nothing to fuse: torch's two passes are as fast as one
from .products import (
    EXACT,
    FAST,
    LANES,
    PANEL8,
    address,
    f32,
    i64,
    keep_compiled,
    kind_of,
    multiply,
    multiply_add,
    one_at_a_time,
    read,
    splat,
    start_loading,
    threads_for,
    write,
)
from .products import PANEL as PANEL  # what linear.py asks for here
from .products import linear as linear
from .products import panels as panels

_f32 = np.float32
_EXP2 = tuple(_f32(math.log(2) ** n / math.factorial(n)) for n in range(8))  # Taylor, error 5e-9


# numbers of the cache ----------------------------------------------------------------------------

# K and V are float32, or bfloat16, which numpy does not know: uint16 with the upper half of the
# float32's bits. all arithmetic is in float32


def _array(x: Tensor) -> np.ndarray:
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def _load(x, i):
    """x[i] as a float32."""


@overload(_load, jit_options=FAST, inline="always")
def _load_of(x, i):
    if x.dtype == types.uint16:
        return lambda x, i: np.uint32(x[i] << np.uint32(16)).view(np.float32)
    return lambda x, i: x[i]


def _store(x, i, value):
    """x[i] = value, a float32, rounded to the nearest, of two equally near to the even one."""


@overload(_store, jit_options=FAST, inline="always")
def _store_of(x, i, value):
    if x.dtype == types.uint16:

        def store(x, i, value):
            bits = _f32(value).view(np.uint32)
            x[i] = np.uint32(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16

    else:

        def store(x, i, value):
            x[i] = value

    return store


# fused steps of a layer --------------------------------------------------------------------------

# what model.py's functions of these names do, in one pass over the rows. torch would go through
# memory once for each addition, product and norm


@numba.njit(**FAST)
def _rms_scale(x, eps):
    total = _f32(0)
    for c in range(x.size):
        total += x[c] * x[c]
    return _f32(1) / np.sqrt(total / _f32(x.size) + eps)


@numba.njit(parallel=True, **FAST)
def _add_norm(x, y, x0, a, b, eps, adds, mixes, threads, x_new, h):
    for thread in numba.prange(threads):
        for t in range(len(x) * thread // threads, len(x) * (thread + 1) // threads):
            xt, yt, x0t, zt, ht = x[t], y[t], x0[t], x_new[t], h[t]
            if adds:
                for c in range(xt.size):
                    zt[c] = xt[c] + yt[c]
                xt = zt
            if mixes:
                for c in range(xt.size):
                    zt[c] = a * xt[c] + b * x0t[c]
                xt = zt
            scale = _rms_scale(xt, eps)
            for c in range(xt.size):
                ht[c] = xt[c] * scale


def add_norm(x: Tensor, y, x0, a, b, eps: float) -> tuple[Tensor, Tensor]:
    """x_new = a * (x + y) + b * x0 and its norm, all (T, C); y, or a and b, may be None."""
    h, adds, mixes = torch.empty_like(x), y is not None, a is not None
    x_new = torch.empty_like(x) if adds or mixes else x
    arrays = [z.numpy() for z in (x, y if adds else x, x0 if mixes else x)]
    a, b = (_f32(a), _f32(b)) if mixes else (_f32(1), _f32(0))
    with one_at_a_time:
        threads = threads_for(1 + len(x) // 8)  # waking one takes as long as a few rows
        _add_norm(*arrays, a, b, _f32(eps), adds, mixes, threads, x_new.numpy(), h.numpy())
    return x_new, h


@numba.njit(**FAST)
def _rotate(x, cos, sin, qk_scale, eps, z, y):
    """y (D,) = qk_scale * the norm of x (D,) rotated; z (D,) is scratch."""
    half = cos.size
    for j in range(half):
        z[j] = x[j] * cos[j] + x[half + j] * sin[j]
        z[half + j] = x[half + j] * cos[j] - x[j] * sin[j]
    scale = _rms_scale(z, eps) * qk_scale
    for j in range(y.size):
        _store(y, j, z[j] * scale)


@numba.njit(parallel=True, **FAST)
def _rope_store(
    qkv, h, ids, ve, ve_gate, gated, cos, sin, positions, slots, k, v,
    qk_scale, gate_scale, eps, threads, q,
):  # fmt: skip
    T, n_head = q.shape[:2]
    n_kv_head, block_size, D = k.shape[1:]
    for thread in numba.prange(threads):
        z = np.empty(D, np.float32)
        for t in range(T * thread // threads, T * (thread + 1) // threads):
            c, s = cos[positions[t]], sin[positions[t]]
            block, slot = slots[t] // block_size, slots[t] % block_size
            e = ve[ids[t] if gated else 0]
            for i in range(n_head):
                _rotate(qkv[t, i], c, s, qk_scale, eps, z, q[t, i])
            for i in range(n_kv_head):
                _rotate(qkv[t, n_head + i], c, s, qk_scale, eps, z, k[block, i, slot])
                vi, to = qkv[t, n_head + n_kv_head + i], v[block, i, slot]
                if gated:
                    dot = _f32(0)
                    for j in range(ve_gate.shape[1]):
                        dot += h[t, j] * ve_gate[i, j]
                    gate = gate_scale / (_f32(1) + np.exp(-dot))
                    for j in range(D):
                        _store(to, j, vi[j] + gate * _load(e, i * D + j))
                else:
                    for j in range(D):
                        _store(to, j, vi[j])


def rope_store(
    qkv, h, ve, ve_gate, cos, sin, batch, k, v, n_head, qk_scale, gate_scale, eps
) -> Tensor:
    """Rotate, norm and scale q and k, mix the value embedding into v, write k and v to their
    slots; arguments and result as in model.py."""
    q, gated = torch.empty(len(qkv), n_head, k.shape[3]), ve is not None
    if not gated:  # a kernel takes arrays, never None: any of their kind will do
        ve, ve_gate = k[0, 0], h
    ids = batch.ids if gated else batch.slots
    tensors = ids, ve, ve_gate, cos, sin, batch.positions, batch.slots, k, v
    ids, ve, ve_gate, *others = [_array(x) for x in tensors]
    with one_at_a_time:
        _rope_store(
            qkv.view(len(qkv), -1, k.shape[3]).numpy(), h.numpy(), ids, ve, ve_gate, gated,
            *others, _f32(qk_scale), _f32(gate_scale), _f32(eps), threads_for(1 + len(qkv) // 4),
            q.numpy(),
        )  # fmt: skip
    return q


@numba.njit(parallel=True, **FAST)
def _quantize_rows(x, levels, threads, q, scale):
    C = x.shape[1]
    for thread in numba.prange(threads):
        xt = np.empty(C, np.float32)
        for t in range(len(x) * thread // threads, len(x) * (thread + 1) // threads):
            qt = q[t]
            xt[:] = x[t]
            half = C // 2
            while half >= C // min(32, C & -C):
                for start in range(0, C, 2 * half):
                    a, b = xt[start : start + half], xt[start + half : start + 2 * half]
                    for c in range(half):
                        a[c], b[c] = a[c] + b[c], a[c] - b[c]
                half //= 2
            bits, largest = xt.view(np.int32), np.int32(0)
            for c in range(xt.size):  # without the sign they are in the order of the floats
                largest = max(largest, bits[c] & np.int32(0x7FFFFFFF))
            most = max(_float(largest), _f32(1e-30))
            scale[t, 0] = most / levels
            steps = levels / most
            for c in range(xt.size):
                qt[c] = np.uint8(np.int32(xt[c] * steps + _f32(128.5)))


def quantize_rows(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """x (T, C), rotated, in steps that fit the row, as in linear.py."""
    q, scale = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x), 1)
    with one_at_a_time:
        threads = threads_for(1 + len(x) // 8)
        _quantize_rows(x.numpy(), _f32(levels), threads, q.numpy(), scale.numpy())
    return q, scale


def _product(x, weight, square, following, threads, y):
    """y = x times a weight: (panels, offset, scale), the latter two empty unless it is int8."""


@overload(_product, jit_options=FAST)
def _product_of(x, weight, square, following, threads, y):
    if weight[0].dtype == types.int32:

        def product(x, weight, square, following, threads, y):
            w, offset, w_scale = weight
            T, C = x.shape
            q, scale = np.empty((T, C), np.uint8), np.empty((T, 1), np.float32)
            _quantize_rows(x, _f32(127), min(threads, 1 + T // 8), q, scale)
            scaling = offset, w_scale, scale.reshape(T)
            multiply(q.view(np.int32), w, scaling, square, following, threads, y)

    else:

        def product(x, weight, square, following, threads, y):
            w, offset, w_scale = weight
            multiply(x, w, (offset, w_scale, w_scale), square, following, threads, y)

    return product


@numba.njit(**FAST)
def _linear8(x, weight, square, threads, y):
    _product(x, weight, square, weight[0], threads, y)


def linear8(x: Tensor, packed, rows: int, square: bool = False) -> Tensor:
    """x (T, in) times the first `rows` outputs of an int8 matrix, transposed: (T, rows); square:
    then relu(y)^2. packed: its panels, of four int8 each; 128 times the sums of its rows; what one
    of its steps is worth in each."""
    weight = tuple(part.numpy() for part in packed)
    y = torch.empty(len(x), len(weight[0]) * PANEL8)
    with one_at_a_time:
        threads = threads_for(len(weight[0]))
        _linear8(x.contiguous().numpy(), weight, square, threads, y.numpy())
    return y if rows == y.shape[1] else y[:, :rows].contiguous()


# attention ---------------------------------------------------------------------------------------


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
def _key(x):
    """An integer for a float, in the same order; a NaN comes after all numbers or before them."""
    bits = _f32(x).view(np.int32)
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


@numba.njit(**FAST)
def _float(key):
    return np.int32(key ^ ((key >> 31) & np.int32(0x7FFFFFFF))).view(np.float32)


@numba.njit(**FAST)
def _largest(x):
    """Integers, since the compiler makes no vectors of the maximum of floats: 12 times faster."""
    bits, largest = x.view(np.int32), np.int32(-(2**31))
    for i in range(bits.size):
        largest = max(largest, bits[i] ^ ((bits[i] >> 31) & np.int32(0x7FFFFFFF)))
    return _float(largest)


@numba.njit(**FAST)
def _exp2(x):
    """2**x for x <= 0, to 1e-7 of it. LLVM has no vector exp of its own, this it vectorises."""
    x = _f32(-126) if x < _f32(-126) else x  # the smallest power that has an exponent's bits
    whole = np.floor(x + _f32(0.5))
    r = x - whole
    y = ((_EXP2[7] * r + _EXP2[6]) * r + _EXP2[5]) * r + _EXP2[4]
    y = (((y * r + _EXP2[3]) * r + _EXP2[2]) * r + _EXP2[1]) * r + _EXP2[0]
    return y * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@numba.njit(**FAST)
def _softmax(scores):
    """In place, but for the division by the sum, which is returned."""
    largest = _largest(scores)
    total = _f32(0)
    for j in range(scores.size):
        scores[j] = _exp2(scores[j] - largest)
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
def _attend(q, k, v, cu_seqlens, seq_lens, block_tables, window, rows, scratch, out):
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


def _tile(batch, group: int) -> tuple[int, int]:
    """Rows of one sequence that are done together, and how long a row of scores is."""
    # 16 queries read a block of keys together: their scores still fit in the second-level cache
    rows = max(1, min(batch.max_query, 16 // group))
    # an odd number of cache lines per row, else the same column of all rows falls into one set
    return rows, ((batch.max_seq + 3 + 15) // 16 | 1) * 16  # + 3: keys come by four


def paged_attention(q: Tensor, k: Tensor, v: Tensor, batch, window: int) -> Tensor:
    """Attention of a flat batch over the paged cache, as attention.py describes it. Float32.

    q (T, n_head, D); k, v (num_blocks, n_kv_head, block_size, D), which may be bfloat16; returns
    (T, n_head, D).

    Chunks come here too, of any length: a gather and torch's attention take 5 to 8 times as long
    for 64 prompts of 23 tokens, 1.4 to 2.4 times for one of 512, 0.9 to 1.3 times for 2,048.
    """
    group, D = q.shape[1] // k.shape[1], q.shape[2]
    rows, width = _tile(batch, group)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    tensors = q.contiguous(), k, v, batch.cu_seqlens, batch.seq_lens, batch.block_tables
    arrays = [_array(x) for x in tensors]
    with one_at_a_time:
        threads = threads_for(len(q) * k.shape[1])
        scratch = torch.empty(threads, rows * group * (2 * D + width))
        _attend(*arrays, window, rows, scratch.numpy(), out.numpy())
    return out


# all layers in one call --------------------------------------------------------------------------

# a call from Python takes 30 to 100 microseconds between two products, since the weights that have
# just gone through the caches have swept out what Python needs. model.py's loop over the layers has
# ten such calls in each; here is the same loop once more, compiled


@intrinsic
def _pointer(context, number, like):
    """A pointer from an address, to numbers such as the array `like` has."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(number, like), codegen


VE = 12  # where a layer's value embeddings are, and its gate: after four weights of three parts


@numba.njit(**FAST)
def _tensor(addresses, shapes, i, kind, like):
    shape = shapes[kind, 0], shapes[kind, 1], shapes[kind, 2]
    return numba.carray(_pointer(addresses[i, kind], like), shape)


@numba.njit(**FAST)
def _weight(addresses, shapes, i, kind, head):
    """The panels, offset and scale of layer i's qkv, proj, fc or mlp_proj, of the head's types."""
    w = _tensor(addresses, shapes, i, 3 * kind, head[0])
    offset = _tensor(addresses, shapes, i, 3 * kind + 1, head[1])
    return w, offset[0, 0], _tensor(addresses, shapes, i, 3 * kind + 2, head[2])[0, 0]


@numba.njit(**FAST)
def _layers(
    x0, ids, positions, cu_seqlens, seq_lens, logit_rows, slots, tables, cache, depths, groups,
    windows, addresses, shapes, head, wte, resid, first, backout, cos, sin, qk_scale, gate_scale,
    eps, rows, width, threads,
):  # fmt: skip
    T, C = x0.shape
    n_layer, n_kv_head, D = len(windows), cache.shape[3], cache.shape[5]
    n_head, mixes, smear = C // D, resid.size > 0, backout.size > 0
    few = min(threads, 1 + T // 8)  # waking one takes as long as a few rows
    x, spare, y, h, middle = x0.copy(), np.empty_like(x0), np.empty_like(x0), np.empty_like(x0), x0
    q, seen = np.empty((T, n_head, D), np.float32), np.empty((T, n_head, D), np.float32)
    qkv, wide = np.empty((T, C + 2 * n_kv_head * D), np.float32), np.empty((T, 4 * C), np.float32)
    scratch = np.empty((threads, rows * (n_head // n_kv_head) * (2 * D + width)), np.float32)
    one, none = _f32(1), _f32(0)
    # no constants, or numba would compile each kernel for them once more
    yes, no = threads > 0, threads < 0
    for i in range(n_layer):
        a, b = (resid[i], first[i]) if mixes else (one, none)
        _add_norm(x, y, x0, a, b, eps, i > 0, mixes, few, spare, h)
        if i > 0 or mixes:
            x, spare = spare, x
        proj = _weight(addresses, shapes, i, 1, head)
        fc = _weight(addresses, shapes, i, 2, head)
        _product(h, _weight(addresses, shapes, i, 0, head), no, proj[0], threads, qkv)
        k, v, group = cache[depths[i], 0], cache[depths[i], 1], groups[i]
        gated = addresses[i, VE] != 0
        ve = _tensor(addresses, shapes, i, VE, wte)[0] if gated else wte
        ve_gate = _tensor(addresses, shapes, i, VE + 1, x0)[0] if gated else x0
        _rope_store(
            qkv.reshape(T, -1, D), h, ids, ve, ve_gate, gated, cos, sin, positions, slots[group],
            k, v, qk_scale, gate_scale, eps, few, q,
        )  # fmt: skip
        _attend(q, k, v, cu_seqlens, seq_lens, tables[group], windows[i], rows, scratch, seen)
        if i == n_layer - 1:
            T = len(logit_rows)
            if T == 0:
                return y[:0]
            few = min(threads, 1 + T // 8)
            x, seen = x[logit_rows], seen[logit_rows]
            spare, y, h = np.empty_like(x), np.empty_like(x), np.empty_like(x)
            wide = np.empty((T, 4 * C), np.float32)
            if smear and i > n_layer // 2:
                middle = middle[logit_rows]
        _product(seen.reshape(T, C), proj, no, fc[0], threads, y)
        _add_norm(x, y, x, one, none, eps, yes, no, few, spare, h)
        x, spare = spare, x
        mlp_proj = _weight(addresses, shapes, i, 3, head)
        _product(h, fc, yes, mlp_proj[0], threads, wide)
        # the head comes after the last
        following = head[0] if i == n_layer - 1 else _weight(addresses, shapes, i + 1, 0, head)[0]
        _product(wide, mlp_proj, no, following, threads, y)
        if smear and i == n_layer // 2:
            middle = x + y
    _add_norm(x, y, x, one, none, eps, yes, no, few, spare, h)
    if smear:
        spare -= backout[0] * middle
        _add_norm(spare, y, x, one, none, eps, no, no, few, x, h)
    return h


def _parts(linear) -> tuple[Tensor, Tensor, Tensor]:
    """The panels, offset and scale of a weight."""
    w = linear.weight
    return w if isinstance(w, tuple) else (w, torch.empty(0, dtype=torch.int32), torch.empty(0))


class Layers:
    """All layers of a model whose weights are in panels, on a batch: see GPT.forward."""

    def __init__(self, model):
        recipe, kinds = model.recipe, []
        for layer in model.layers:
            linears = layer.qkv, layer.proj, layer.fc, layer.mlp_proj
            parts = chain.from_iterable(map(_parts, linears))
            kinds.append([*parts, layer.ve, layer.ve_gate])
        # the same for all layers, but that some have no value embeddings
        some = [next((x for x in kind if x is not None), None) for kind in zip(*kinds, strict=True)]
        shapes = [(0,) * 3 if x is None else (1,) * (3 - x.ndim) + x.shape for x in some]
        addresses = [[0 if x is None else x.data_ptr() for x in layer] for layer in kinds]
        self.weights = np.array(addresses, np.int64), np.array(shapes, np.int64)
        self.windows = np.array([layer.window for layer in model.layers])
        self.head = tuple(part.numpy() for part in _parts(model.lm_head))
        self.wte = _array(model.wte)
        names, none = ("resid_lambdas", "x0_lambdas", "backout_lambda"), torch.empty(0)
        numbers = [model.tensors.get(name, none) for name in names]
        self.numbers = [x.numpy() for x in (*numbers, model.cos, model.sin)]
        self.scales = [_f32(x) for x in (recipe.qk_scale, recipe.gate_scale, recipe.eps)]
        self.group = model.config.n_head // model.config.n_kv_head

    def __call__(self, x: Tensor, batch, cache) -> Tensor:
        """x (T, C), the embeddings; returns (R, C), the normed rows of the head."""
        names = "ids", "positions", "cu_seqlens", "seq_lens", "logit_rows", "slots", "block_tables"
        *arrays, slots, tables = [getattr(batch, name).numpy() for name in names]
        slots = slots.reshape(cache.num_groups, len(x))
        tables = tables.reshape(cache.num_groups, len(batch.seq_lens), -1)
        with one_at_a_time:
            threads = threads_for(len(self.head[0]))
            h = _layers(
                x.numpy(), *arrays, slots, tables, _array(cache.data), cache.depth_of,
                cache.group_of, self.windows, *self.weights, self.head, self.wte, *self.numbers,
                *self.scales, *_tile(batch, self.group), threads,
            )  # fmt: skip
        return torch.from_numpy(h)


# the sampler -------------------------------------------------------------------------------------

# torch would go through memory for each of the steps (cap, softmax, sort, running sum, search),
# its threads meeting after each: that is more than half of a decode step. And nothing is sorted
# here: a pass over a row in the cache takes so little that the smallest logit to stay is found by
# bisection.

_LOG2E = _f32(1 / math.log(2))
_BLOCK = 256  # weights that are summed before one of them is looked for


@numba.njit(**FAST)
def _least(values, counting, limit, low, high):
    """The least of the values that stay: those for which all larger ones together hold less than
    `limit`, each holding what it is or, if counting, 1. It lies between low and high."""
    first, last = np.int64(_key(low)), np.int64(_key(high))
    while first < last:
        middle = (first + last) >> 1
        bound, held = _float(np.int32(middle)), _f32(0)
        if counting:
            for i in range(values.size):
                held += _f32(1) if values[i] > bound else _f32(0)
        else:
            for i in range(values.size):
                held += values[i] if values[i] > bound else _f32(0)
        if held < limit:
            last = middle
        else:
            first = middle + 1
    return _float(np.int32(first))


@numba.njit(**FAST)
def _weigh(x, scale, softcap, top_k, top_p, min_p, w):
    """w (V,) = 2**(scale * (x - the largest)), x being capped, and 0 for what the filters drop."""
    top = _largest(x)
    kth = _f32(-np.inf)
    if 0 < top_k < x.size:
        kth = _least(x, True, top_k, kth, top)
    if softcap > 0:
        # tanh(z) = (1 - t) / (1 + t), where t = e**-2z. a loop of its own, else registers run out
        slope = _f32(-2) * _LOG2E / softcap
        for i in range(x.size):
            t = _exp2(abs(x[i]) * slope)
            capped = softcap * ((_f32(1) - t) / (_f32(1) + t))
            w[i] = capped if x[i] > 0 else -capped
    else:
        w[:] = x
    top = _largest(w)
    for i in range(x.size):
        exponent = (w[i] - top) * scale
        # 0 where float32 has no smaller number
        w[i] = _exp2(exponent) if exponent >= -126 and x[i] >= kth else _f32(0)
    if top_p < 1:
        total = _f32(0)
        for i in range(w.size):  # w.sum() makes no vectors
            total += w[i]
        # tokens that weigh no more than this weigh 1 - p of it together at most: none can stay
        low = (1 - top_p) * total / x.size
        min_p = max(min_p, _least(w, False, top_p * total, low, _f32(1)))
    if min_p > 0:
        for i in range(x.size):
            w[i] = w[i] if w[i] >= min_p else _f32(0)


@numba.njit(**FAST)
def _draw(w, sums, u):
    """The first index at which the running sum of w exceeds u of the whole."""
    total = 0.0
    for b in range(sums.size):
        block, s = w[b * _BLOCK : (b + 1) * _BLOCK], _f32(0)
        for i in range(_BLOCK):
            s += block[i]
        sums[b] = s
        total += s
    # u is below 1, so one block passes the target, and that one has a weight above 0
    target, running, b = u * total, 0.0, 0
    while b < sums.size - 1 and running + sums[b] <= target:
        running += sums[b]
        b += 1
    token = 0
    for i in range(b * _BLOCK, (b + 1) * _BLOCK):
        if w[i] > 0:
            running += w[i]
            token = i
            if running > target:
                break
    return token


@numba.njit(**FAST)
def _argmax(x):
    largest = _largest(x)
    for i in range(x.size):
        if x[i] == largest:
            return i
    return 0  # NaN


@numba.njit(parallel=True, **FAST)
def _sample(logits, V, stride, u, scale, softcap, filters, threads, tokens):
    """Rows dealt to the threads; that of number r begins at logits[r * stride]."""
    for thread in numba.prange(threads):
        sums = np.empty(-(-V // _BLOCK), np.float32)
        w = np.zeros(sums.size * _BLOCK, np.float32)  # the last block may be longer than the row
        for r in range(thread, tokens.size, threads):
            x, (top_k, top_p, min_p) = logits[r * stride : r * stride + V], filters[r]
            if scale[r] == 0:
                tokens[r] = _argmax(x)
            else:
                _weigh(x, scale[r], softcap, top_k, top_p, _f32(min_p), w[:V])
                tokens[r] = _draw(w, sums, u[r])


def sample(
    logits: Tensor,
    temperature: Tensor,
    uniform: Tensor,
    softcap: float,
    filters: Seq[tuple[int, float, float]] | None = None,
) -> Tensor:
    """A token for each row of logits (R, V), float32: what sampler.py says, with its arguments.

    filters: top_k, top_p and min_p of each row, 0, 1 and 0 being off; None: all are. Returns (R,)
    int64.
    """
    R, V = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    stride = logits.stride(0)  # rows may be longer than V, or all the same
    flat = logits.as_strided(((R - 1) * stride + V,), (1,))
    T, tokens = temperature.numpy(), torch.empty(R, dtype=torch.int64)
    scale = np.divide(_LOG2E, T, out=np.zeros_like(T), where=T > 0)
    filters = np.array(filters) if filters else np.tile([0.0, 1.0, 0.0], (R, 1))
    with one_at_a_time:
        threads = threads_for(R)
        _sample(
            flat.numpy(), V, stride, uniform.numpy(), scale, _f32(softcap),
            filters, threads, tokens.numpy(),
        )  # fmt: skip
    return tokens


keep_compiled(_add_norm, _rope_store, _quantize_rows, _attend, _sample, _layers, _linear8)
