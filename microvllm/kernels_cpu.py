"""The CPU's kernels in numba: the fused steps of model.py, paged attention, and the draw.

Gathering a paged cache before torch's attention costs more than all matrix products of a step. Here
every block is read where it lies, once for all the query heads that share it, and a step of decodes
runs at about the speed of the memory. Block tables are PagedAttention's (Kwon et al. 2023), the
softmax is the plain one: the scores of a few rows fit in the processor's cache, nothing is online.

The very first call compiles for some seconds; numba keeps the result on disk for later processes.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Sequence as Seq
from functools import partial

import numba
import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload
from torch import Tensor

# numba's OpenMP layer binds to the OpenMP library that torch has loaded before it, so the kernel
# runs on torch's own threads. A second pool fights for the cores: torch's workers keep spinning
# for milliseconds after a matrix product, in case another one follows. But as it starts it sets
# that library's number of threads and allows nested teams, and with these torch's own attention
# takes 6 to 140 times as long. So both are put back.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
_openmp = ctypes.CDLL(None) if os.name == "posix" else None  # without it, int() does nothing
_threads, _nested = torch.get_num_threads(), getattr(_openmp, "omp_get_nested", int)()
numba.set_num_threads(1)  # starts the layer
torch.set_num_threads(_threads)
getattr(_openmp, "omp_set_nested", int)(_nested)
_one_at_a_time = threading.Lock()  # the workqueue layer aborts the process on concurrent launches


def _threads_for(jobs: int) -> int:
    """Set and return how many threads share so many jobs: torch's number, or fewer."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, jobs)
    numba.set_num_threads(threads)
    return threads


_f32 = np.float32
# sums may be reordered, else nothing is vectorised; but NaN stays NaN (see _largest)
_fast = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy", "nogil": True}
_EXP2 = tuple(_f32(math.log(2) ** n / math.factorial(n)) for n in range(8))  # Taylor, error 5e-9


# numbers of the cache ----------------------------------------------------------------------------

# K and V are float32, or bfloat16, which numpy does not know: uint16 with the upper half of the
# float32's bits. all arithmetic is in float32


def _array(x: Tensor) -> np.ndarray:
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def _load(x, i):
    """x[i] as a float32."""


@overload(_load, jit_options=_fast, inline="always")
def _load_of(x, i):
    if x.dtype == types.uint16:
        return lambda x, i: np.uint32(x[i] << np.uint32(16)).view(np.float32)
    return lambda x, i: x[i]


def _store(x, i, value):
    """x[i] = value, a float32, rounded to the nearest, of two equally near to the even one."""


@overload(_store, jit_options=_fast, inline="always")
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


@numba.njit(**_fast)
def _rms_scale(x, eps):
    total = _f32(0)
    for c in range(x.size):
        total += x[c] * x[c]
    return _f32(1) / np.sqrt(total / _f32(x.size) + eps)


@numba.njit(parallel=True, **_fast)
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
    with _one_at_a_time:
        threads = _threads_for(1 + len(x) // 8)  # waking one takes as long as a few rows
        _add_norm(*arrays, a, b, _f32(eps), adds, mixes, threads, x_new.numpy(), h.numpy())
    return x_new, h


@numba.njit(**_fast)
def _rotate(x, cos, sin, qk_scale, eps, z, y):
    """y (D,) = qk_scale * the norm of x (D,) rotated; z (D,) is scratch."""
    half = cos.size
    for j in range(half):
        z[j] = x[j] * cos[j] + x[half + j] * sin[j]
        z[half + j] = x[half + j] * cos[j] - x[j] * sin[j]
    scale = _rms_scale(z, eps) * qk_scale
    for j in range(y.size):
        _store(y, j, z[j] * scale)


@numba.njit(parallel=True, **_fast)
def _rope_store(
    qkv, h, e, ve_gate, gated, cos, sin, positions, slots, k, v,
    qk_scale, gate_scale, eps, threads, q,
):  # fmt: skip
    T, n_head = q.shape[:2]
    n_kv_head, block_size, D = k.shape[1:]
    for thread in numba.prange(threads):
        z = np.empty(D, np.float32)
        for t in range(T * thread // threads, T * (thread + 1) // threads):
            c, s = cos[positions[t]], sin[positions[t]]
            block, slot = slots[t] // block_size, slots[t] % block_size
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
                        _store(to, j, vi[j] + gate * e[t, i, j])
                else:
                    for j in range(D):
                        _store(to, j, vi[j])


def rope_store(
    qkv, h, ve, ve_gate, cos, sin, batch, k, v, n_head, qk_scale, gate_scale, eps
) -> Tensor:
    """Rotate, norm and scale q and k, mix the value embedding into v, write k and v to their
    slots; arguments and result as in model.py."""
    n_kv_head, _, D = k.shape[1:]
    q, gated = torch.empty(len(qkv), n_head, D), ve is not None
    if gated:
        e = F.embedding(batch.ids, ve).float().view(-1, n_kv_head, D)
    else:  # a kernel takes arrays, never None: any of their shapes will do
        e, ve_gate = q, h
    arrays = [x.numpy() for x in (qkv.view(len(qkv), -1, D), h, e, ve_gate)]
    tensors = cos, sin, batch.positions, batch.slots, k, v
    with _one_at_a_time:
        _rope_store(
            *arrays, gated, *[_array(x) for x in tensors], _f32(qk_scale), _f32(gate_scale),
            _f32(eps), _threads_for(1 + len(qkv) // 4), q.numpy(),
        )  # fmt: skip
    return q


@numba.njit(parallel=True, **_fast)
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
    """x (T, C), rotated, in steps that fit the row, as in model.py."""
    q, scale = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x), 1)
    with _one_at_a_time:
        threads = _threads_for(1 + len(x) // 8)
        _quantize_rows(x.numpy(), _f32(levels), threads, q.numpy(), scale.numpy())
    return q, scale


def relu2(x: Tensor) -> Tensor:
    """relu(x)^2, in place."""
    return x.relu_().square_()  # there is nothing to fuse: torch's two passes are as fast as one


# vectors -----------------------------------------------------------------------------------------

# numba leaves it to the compiler to make vectors of a loop; where that does less than the processor
# can, here is what it is made of, in the compiler's own language (llvmlite.ir)

_cpu = binding.get_host_cpu_features()
# numbers in a register
LANES = 16 if _cpu.get("avx512f") else 8 if _cpu.get("avx2") and _cpu.get("fma") else 4
_i32, _i64, _float32 = ir.IntType(32), ir.IntType(64), ir.FloatType()


def _kind(item, lanes: int):
    return ir.VectorType(item, lanes) if lanes > 1 else item


def _splat(builder, value, lanes: int):
    """A vector of equal numbers."""
    if lanes == 1:
        return value
    vector = builder.insert_element(
        ir.Constant(_kind(_float32, lanes), ir.Undefined), value, _i32(0)
    )
    return builder.shuffle_vector(vector, vector, ir.Constant(_kind(_i32, lanes), [0] * lanes))


def _multiply_add(builder, a, b, c):
    """a * b + c, rounded once where the processor can."""
    name = f"v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "f32"
    kind = ir.FunctionType(a.type, [a.type] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.{name}")
    return builder.call(function, [a, b, c])


def _read(builder, start, lanes: int = LANES):
    """Numbers of the cache, float32 or bfloat16, from a pointer on, as float32."""
    item = start.type.pointee
    value = builder.load(builder.bitcast(start, _kind(item, lanes).as_pointer()))
    value.align = 4 if item == _float32 else 2
    if item == _float32:
        return value
    shift = ir.Constant(_kind(_i32, lanes), [16] * lanes if lanes > 1 else 16)
    value = builder.shl(builder.zext(value, _kind(_i32, lanes)), shift)
    return builder.bitcast(value, _kind(_float32, lanes))


def _write(builder, value, start):
    builder.store(value, builder.bitcast(start, value.type.as_pointer())).align = 4


def _at(builder, start, *counts):
    """The address of start[the sum of a * b for these (a, b)]."""
    for a, b in counts:
        a, b = (_i64(z) if isinstance(z, int) else z for z in (a, b))
        start = builder.gep(start, [builder.mul(a, b)])
    return start


def _start_loading(builder, start):
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _i32, _i32, _i32])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
    # for reading; into the second-level cache; data
    builder.call(prefetch, [builder.bitcast(start, byte), _i32(0), _i32(2), _i32(1)])


# matrix products ---------------------------------------------------------------------------------

# of few rows: the weights come from memory, are used once, and a library that reads them as it gets
# to them waits. Here, while one panel of them is multiplied, the next one is on its way to the
# second-level cache: for up to 64 rows 1.2 times as fast as oneDNN, for more the same. And a row's
# sums are always added up in one order, whatever rows there are beside it

# outputs whose weights lie together: two registers of them, so many rows, and the registers that
# are left hold the sums. 0: a processor without the instructions that this is made for
PANEL = 2 * LANES if LANES > 4 else 0
_ROWS = 12 if LANES == 16 else 6
_DEPTH = 512  # inputs at a time: the weights of a panel for them stay in the cache
_MANY = 240  # rows at a time: they stay there, too


@intrinsic
def _multiply(context, n, wide, K, x, x_at, w, w_at, y, y_at, ahead, every, add, square):
    """y (n, PANEL) = x (n, K) @ w (K, PANEL), n being 1 to _ROWS; if `add`, more by that.

    These parts of the arrays, all contiguous, begin at the flat indices x_at, w_at and y_at: a
    slice takes as long as a few rows do. wide: of two panels, for up to half as many rows, which
    loads less often; square: then relu(y)^2; ahead: where in w to start loading, PANEL numbers at
    each (2^every)-th input.
    """

    def codegen(context, builder, signature, args):
        n, wide, K, _, x_at, _, w_at, _, y_at, ahead, every, add, square = args
        arrays = [
            context.make_array(signature.args[i])(context, builder, args[i]) for i in (3, 5, 7)
        ]
        at, (xs, ws, ys) = partial(_at, builder), (array.data for array in arrays)
        x_stride, w_stride, y_stride = (builder.extract_value(a.shape, 1) for a in arrays)
        w_stride = builder.mul(w_stride, _i64(PANEL))
        xs, ws, aheads, ys = (
            at(xs, (x_at, 1)),
            at(ws, (w_at, 1)),
            at(ws, (ahead, 1)),
            at(ys, (y_at, 1)),
        )
        vector = _kind(_float32, LANES)
        zero = ir.Constant(vector, [0.0] * LANES)
        sums = [cgutils.alloca_once(builder, vector) for _ in range(2 * _ROWS)]

        def multiply(n, panels):
            rows, mine = [at(xs, (x_stride, i)) for i in range(n)], sums[: 2 * panels * n]
            for each in mine:
                builder.store(zero, each)
            with cgutils.for_range(builder, K, intp=_i64) as loop:
                k, weights = loop.index, []
                for panel in range(panels):
                    start = at(ws, (w_stride, panel), (k, PANEL))
                    weights += [_read(builder, start), _read(builder, at(start, (LANES, 1)))]
                for i, row in enumerate(rows):
                    value = _splat(builder, builder.load(at(row, (k, 1))), LANES)
                    for weight, each in zip(weights, mine[len(weights) * i :], strict=False):
                        more = _multiply_add(builder, weight, value, builder.load(each))
                        builder.store(more, each)
                skipped = builder.and_(k, builder.not_(builder.shl(_i64(-1), every)))
                with builder.if_then(builder.icmp_unsigned("==", skipped, _i64(0))):
                    for panel in range(panels):
                        start = at(aheads, (w_stride, panel), (builder.lshr(k, every), PANEL))
                        for line in range(0, PANEL, 16):
                            _start_loading(builder, at(start, (line, 1)))
            places = [
                at(ys, (y_stride, i), (LANES, j)) for i in range(n) for j in range(2 * panels)
            ]
            with builder.if_then(add):
                for each, place in zip(mine, places, strict=True):
                    builder.store(builder.fadd(builder.load(each), _read(builder, place)), each)
            with builder.if_then(square):
                for each in mine:
                    value = builder.load(each)
                    negative = builder.fcmp_ordered("<", value, zero)  # a NaN is not
                    value = builder.select(negative, zero, value)
                    builder.store(builder.fmul(value, value), each)
            for each, place in zip(mine, places, strict=True):
                _write(builder, builder.load(each), place)

        done = builder.append_basic_block("done")
        case = builder.add(n, builder.select(wide, _i64(_ROWS), _i64(0)))
        switch = builder.switch(case, done)
        for panels, most in ((1, _ROWS), (2, _ROWS // 2)):
            for i in range(1, most + 1):
                block = builder.append_basic_block(f"{i}_rows_{panels}_panels")
                switch.add_case(_i64(i + (panels - 1) * _ROWS), block)
                builder.position_at_end(block)
                multiply(i, panels)
                builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    kinds = n, wide, K, x, x_at, w, w_at, y, y_at, ahead, every, add, square
    return types.void(*kinds), codegen


@numba.njit(parallel=True, **_fast)
def _linear(x, w, square, threads, y):
    T, N = y.shape
    panels, K, width = w.shape
    blocks, parts = -(-T // _MANY), -(-K // _DEPTH)
    wide = T >= 128
    rows, step = (_ROWS // 2, 2) if wide else (_ROWS, 1)
    for thread in numba.prange(threads):
        first, end = panels * thread // threads, panels * (thread + 1) // threads
        for turn in range(blocks * parts):
            block, part = turn // parts, turn % parts
            t0, t1 = T * block // blocks, T * (block + 1) // blocks
            k0, k1 = K * part // parts, K * (part + 1) // parts
            tiles = -(-(t1 - t0) // rows)
            every = 0  # what one tile does not ask for, the next one does
            while 2 << every <= tiles:
                every += 1
            size = ((k1 - k0) >> every) * width
            for p in range(first, end, step):
                both = p + step <= end and wide
                near = (min(p + step, end - 1) * K + k0) * width
                for i in range(tiles):
                    r0, r1 = t0 + (t1 - t0) * i // tiles, t0 + (t1 - t0) * (i + 1) // tiles
                    _multiply(
                        r1 - r0, both, k1 - k0, x, r0 * K + k0, w, (p * K + k0) * width,
                        y, r0 * N + p * width, near + min(i, (1 << every) - 1) * size,
                        every, part > 0, square and part == parts - 1,
                    )  # fmt: skip


def panels(weight: Tensor) -> Tensor:
    """A matrix (out, in), float32, as panels of PANEL outputs, (panels, in, PANEL), the last one
    filled up with zeros."""
    whole, rest = divmod(len(weight), PANEL)
    # numpy asks the system for large pages, torch does not: few rows are a fifth faster with them.
    # but it does not begin at a cache line
    shape = whole + (rest > 0), weight.shape[1], PANEL
    packed = np.empty(math.prod(shape) + 16, np.float32)
    start = -packed.ctypes.data % 64 // packed.itemsize
    packed = torch.from_numpy(packed[start : start + math.prod(shape)]).view(shape)
    packed[:whole] = weight[: whole * PANEL].view(whole, PANEL, -1).transpose(1, 2)
    if rest:
        packed[-1] = 0
        packed[-1, :, :rest] = weight[whole * PANEL :].T
    return packed


def linear(x: Tensor, packed: Tensor, rows: int, square: bool = False) -> Tensor:
    """x (T, in) @ the first `rows` outputs of a packed weight, transposed: (T, rows); square: then
    relu(y)^2."""
    y = torch.empty(len(x), packed.shape[0] * PANEL)
    with _one_at_a_time:
        threads = _threads_for(len(packed))
        _linear(x.contiguous().numpy(), packed.numpy(), square, threads, y.numpy())
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
        start, count = builder.gep(array.data, [args[1]]), builder.mul(args[2], _i64(4))
        with cgutils.for_range_slice(builder, _i64(0), count, _i64(line), _i64) as (d, _):
            _start_loading(builder, builder.gep(start, [d]))
        return context.get_dummy_value()

    return types.void(x, start, D), codegen


@intrinsic
def _dot4(context, q, q_at, k, at0, at1, at2, at3, D, s, s_at):
    """s (4,) = q (D,) times each of four keys (D,), all at flat indices: four independent sums."""

    def codegen(context, builder, signature, args):
        q, k, s = (
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2, 8)
        )
        at, D = partial(_at, builder), args[7]
        q, s = at(q, (args[1], 1)), at(s, (args[9], 1))
        keys = [at(k, (i, 1)) for i in args[3:7]]
        whole, totals = builder.mul(builder.udiv(D, _i64(LANES)), _i64(LANES)), []

        def add(sums, d, lanes):
            value = _read(builder, at(q, (d, 1)), lanes)
            for each, key in zip(sums, keys, strict=True):
                product = value, _read(builder, at(key, (d, 1)), lanes), builder.load(each)
                builder.store(_multiply_add(builder, *product), each)

        vector = _kind(_float32, LANES)
        sums = [cgutils.alloca_once(builder, vector) for _ in keys]
        for each in sums:
            builder.store(ir.Constant(vector, [0.0] * LANES), each)
        with cgutils.for_range_slice(builder, _i64(0), whole, _i64(LANES), _i64) as (d, _):
            add(sums, d, LANES)
        kind, name = (
            ir.FunctionType(_float32, [_float32, vector]),
            f"llvm.vector.reduce.fadd.v{LANES}f32",
        )
        reduce = cgutils.get_or_insert_function(builder.module, kind, name)
        for each in sums:
            total = builder.call(reduce, [_float32(0), builder.load(each)], fastmath=("reassoc",))
            totals.append(cgutils.alloca_once_value(builder, total))
        with cgutils.for_range_slice(builder, whole, D, _i64(1), _i64) as (d, _):
            add(totals, d, 1)
        for i, total in enumerate(totals):
            _write(builder, builder.load(total), at(s, (i, 1)))
        return context.get_dummy_value()

    return types.void(q, q_at, k, at0, at1, at2, at3, D, s, s_at), codegen


@intrinsic
def _mix(context, p, p_at, m, v, v_at, D, y, y_at):
    """y (D,) += p (m,) @ v (m, D), all at flat indices; a part of y stays in registers."""

    def codegen(context, builder, signature, args):
        p, v, y = (
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 3, 6)
        )
        at, m, D = partial(_at, builder), args[2], args[5]
        p, v, y = at(p, (args[1], 1)), at(v, (args[4], 1)), at(y, (args[7], 1))
        start = _i64(0)
        for count, lanes in ((4, LANES), (1, LANES), (1, 1)):
            sums = [cgutils.alloca_once(builder, _kind(_float32, lanes)) for _ in range(count)]
            size = _i64(count * lanes)
            stop = builder.mul(builder.udiv(D, size), size)
            with cgutils.for_range_slice(builder, start, stop, size, _i64) as (d, _):
                for i, each in enumerate(sums):
                    builder.store(_read(builder, at(y, (d, 1), (i, lanes)), lanes), each)
                with cgutils.for_range(builder, m, intp=_i64) as loop:
                    weight = _splat(builder, builder.load(at(p, (loop.index, 1))), lanes)
                    row = at(v, (loop.index, D), (d, 1))
                    for i, each in enumerate(sums):
                        value = _read(builder, at(row, (i, lanes)), lanes)
                        more = _multiply_add(builder, weight, value, builder.load(each))
                        builder.store(more, each)
                for i, each in enumerate(sums):
                    _write(builder, builder.load(each), at(y, (d, 1), (i, lanes)))
            start = stop
        return context.get_dummy_value()

    return types.void(p, p_at, m, v, v_at, D, y, y_at), codegen


@numba.njit(**_fast)
def _key(x):
    """An integer for a float, in the same order; a NaN comes after all numbers or before them."""
    bits = _f32(x).view(np.int32)
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


@numba.njit(**_fast)
def _float(key):
    return np.int32(key ^ ((key >> 31) & np.int32(0x7FFFFFFF))).view(np.float32)


@numba.njit(**_fast)
def _largest(x):
    """Integers, since the compiler makes no vectors of the maximum of floats: 12 times faster."""
    bits, largest = x.view(np.int32), np.int32(-(2**31))
    for i in range(bits.size):
        largest = max(largest, bits[i] ^ ((bits[i] >> 31) & np.int32(0x7FFFFFFF)))
    return _float(largest)


@numba.njit(**_fast)
def _exp2(x):
    """2**x for x <= 0, to 1e-7 of it. LLVM has no vector exp of its own, this it vectorises."""
    x = _f32(-126) if x < _f32(-126) else x  # the smallest power that has an exponent's bits
    whole = np.floor(x + _f32(0.5))
    r = x - whole
    y = ((_EXP2[7] * r + _EXP2[6]) * r + _EXP2[5]) * r + _EXP2[4]
    y = (((y * r + _EXP2[3]) * r + _EXP2[2]) * r + _EXP2[1]) * r + _EXP2[0]
    return y * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@numba.njit(**_fast)
def _softmax(scores):
    """In place, but for the division by the sum, which is returned."""
    largest = _largest(scores)
    total = _f32(0)
    for j in range(scores.size):
        scores[j] = _exp2(scores[j] - largest)
        total += scores[j]
    return total


@numba.njit(**_fast)
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


@numba.njit(parallel=True, **_fast)
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


def paged_attention(q: Tensor, k: Tensor, v: Tensor, batch, window: int) -> Tensor:
    """Attention of a flat batch over the paged cache, as attention.py describes it. Float32.

    q (T, n_head, D); k, v (num_blocks, n_kv_head, block_size, D), which may be bfloat16; returns
    (T, n_head, D).

    Chunks come here too, of any length: a gather and torch's attention take 5 to 8 times as long
    for 64 prompts of 23 tokens, 1.4 to 2.4 times for one of 512, 0.9 to 1.3 times for 2,048.
    """
    group, D = q.shape[1] // k.shape[1], q.shape[2]
    # 16 queries read a block of keys together: their scores still fit in the second-level cache
    rows = max(1, min(batch.max_query, 16 // group))
    # an odd number of cache lines per row, else the same column of all rows falls into one set
    width = ((batch.max_seq + 3 + 15) // 16 | 1) * 16  # + 3: see _score
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    tensors = q.contiguous(), k, v, batch.cu_seqlens, batch.seq_lens, batch.block_tables
    arrays = [_array(x) for x in tensors]
    with _one_at_a_time:
        threads = _threads_for(len(q) * k.shape[1])
        scratch = torch.empty(threads, rows * group * (2 * D + width))
        _attend(*arrays, window, rows, scratch.numpy(), out.numpy())
    return out


# the sampler -------------------------------------------------------------------------------------

# torch would go through memory for each of the steps (cap, softmax, sort, running sum, search),
# its threads meeting after each: that is more than half of a decode step. And nothing is sorted
# here: a pass over a row in the cache takes so little that the smallest logit to stay is found by
# bisection.

_LOG2E = _f32(1 / math.log(2))
_BLOCK = 256  # weights that are summed before one of them is looked for


@numba.njit(**_fast)
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


@numba.njit(**_fast)
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


@numba.njit(**_fast)
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


@numba.njit(**_fast)
def _argmax(x):
    largest = _largest(x)
    for i in range(x.size):
        if x[i] == largest:
            return i
    return 0  # NaN


@numba.njit(parallel=True, **_fast)
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
    with _one_at_a_time:
        threads = _threads_for(R)
        _sample(
            flat.numpy(), V, stride, uniform.numpy(), scale, _f32(softcap),
            filters, threads, tokens.numpy(),
        )  # fmt: skip
    return tokens


try:
    for _kernel in (_add_norm, _rope_store, _quantize_rows, _linear, _attend, _sample):
        _kernel.enable_caching()
except RuntimeError:  # neither the package's folder nor the user's cache can be written
    pass
