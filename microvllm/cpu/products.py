"""Matrix products of few rows on a CPU, in float32; and what all the CPU's kernels are made of.

numba compiles them, its threads are torch's, and where the compiler makes less of a loop than the
processor can do, the loop is written in vectors, in the compiler's own language. The engine is
right without this file, with torch's products.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from functools import partial
from pathlib import Path

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic
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
one_at_a_time = threading.Lock()  # the workqueue layer aborts the process on concurrent launches


def threads_for(jobs: int) -> int:
    """Set and return how many threads share so many jobs: torch's number, or fewer."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, jobs)
    numba.set_num_threads(threads)
    return threads


# sums may be reordered, else nothing is vectorised; but NaN stays NaN (see steps.largest)
FAST = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy", "nogil": True}
# for what is in vectors already, where one row could get other bits; a caller's would be inherited
EXACT = {"fastmath": False, "error_model": "numpy", "nogil": True}


# vectors -----------------------------------------------------------------------------------------

# numba leaves it to the compiler to make vectors of a loop; where that does less than the processor
# can, here is what it is made of, in the compiler's own language (llvmlite.ir)

# what numba compiles for: this processor, or less where it was told so (NUMBA_CPU_NAME=generic)
_cpu = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
# numbers in a register
LANES = 16 if "+avx512f" in _cpu else 8 if "+avx2" in _cpu and "+fma" in _cpu else 4
i32, i64, f32 = ir.IntType(32), ir.IntType(64), ir.FloatType()


def kind_of(item, lanes: int):
    return ir.VectorType(item, lanes) if lanes > 1 else item


def splat(builder, value, lanes: int):
    """A vector of equal numbers."""
    if lanes == 1:
        return value
    vector = ir.Constant(kind_of(value.type, lanes), ir.Undefined)
    vector = builder.insert_element(vector, value, i32(0))
    return builder.shuffle_vector(vector, vector, ir.Constant(kind_of(i32, lanes), [0] * lanes))


def multiply_add(builder, a, b, c):
    """a * b + c, rounded once where the processor can."""
    name = f"v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "f32"
    kind = ir.FunctionType(a.type, [a.type] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.{name}")
    return builder.call(function, [a, b, c])


def read(builder, start, lanes: int = LANES):
    """Numbers from a pointer on; those of 16 bits are bfloat16, and become float32."""
    item = start.type.pointee
    value = builder.load(builder.bitcast(start, kind_of(item, lanes).as_pointer()))
    value.align = 2 if item == ir.IntType(16) else 4
    if item != ir.IntType(16):
        return value
    shift = ir.Constant(kind_of(i32, lanes), [16] * lanes if lanes > 1 else 16)
    value = builder.shl(builder.zext(value, kind_of(i32, lanes)), shift)
    return builder.bitcast(value, kind_of(f32, lanes))


def write(builder, value, start):
    builder.store(value, builder.bitcast(start, value.type.as_pointer())).align = 4


def address(builder, start, *counts):
    """The address of start[the sum of a * b for these (a, b)]."""
    for a, b in counts:
        a, b = (i64(z) if isinstance(z, int) else z for z in (a, b))
        start = builder.gep(start, [builder.mul(a, b)])
    return start


def start_loading(builder, start):
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
    # for reading; into the second-level cache; data
    builder.call(prefetch, [builder.bitcast(start, byte), i32(0), i32(2), i32(1)])


# matrix products ---------------------------------------------------------------------------------

# of few rows: the weights come from memory, are used once, and a library that reads them as it gets
# to them waits. Here, while one panel of them is multiplied, the next one is on its way to the
# second-level cache: for up to 64 rows 1.2 times as fast as oneDNN, for more the same. And a row's
# sums are always added up in one order, whatever rows there are beside it

# outputs whose weights lie together: two registers of them, so many rows, and the registers that
# are left hold the sums. 0: a processor without the instructions that this is made for
PANEL = 2 * LANES if LANES > 4 else 0
# the same, for int8: the instruction that multiplies four bytes in each lane
PANEL8 = PANEL if ("+avx512vnni" if LANES == 16 else "+avxvnni") in _cpu else 0
_ROWS = 12 if LANES == 16 else 6
_SOON = 768 // PANEL if PANEL else 0  # inputs whose weights are 3 KB
_DEPTH = 1024  # inputs at a time: the weights of a panel for them stay in the cache
_MANY = 240  # rows at a time: they stay there, too


def _dot(builder, x, w, c):
    """In each lane c plus the products of four unsigned bytes of x and four signed ones of w."""
    kind = ir.FunctionType(c.type, [c.type] * 3)
    name = f"llvm.x86.avx512.vpdpbusd.{32 * LANES}"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [c, x, w])


@intrinsic
def _multiply(
    context, n, wide, K, x, x_at, w, w_at, y, row, column, ahead, ahead_at, every, add, square,
    offset, w_scale, x_scale,
):  # fmt: skip
    """y (n, PANEL) = x (n, K) @ w (K, PANEL), n being 1 to _ROWS; if `add`, more by that.

    These parts of the arrays, all contiguous, begin at the flat indices x_at and w_at, and at the
    row and column of y: a slice takes as long as a few rows do. wide: of two panels, for up to half
    as many rows, which loads less often; square: then relu(y)^2; ahead: weights to start loading,
    PANEL of them at each `every`-th input. If x and w are int32, each is four int8, of x plus 128:
    y = (x @ w - offset (N,)) * w_scale (N,) * x_scale (T,).
    """

    def codegen(context, builder, signature, args):
        n, wide, K, _, x_at, _, w_at, _, row, column, _, ahead_at, every, add, square = args[:15]
        x, w, y, ahead, *scaling = (
            context.make_array(signature.args[i])(context, builder, args[i])
            for i in (3, 5, 7, 10, 15, 16, 17)
        )
        at, integers = partial(address, builder), signature.args[5].dtype == types.int32
        x_stride, w_stride, y_stride = (builder.extract_value(a.shape, 1) for a in (x, w, y))
        w_stride = builder.mul(w_stride, i64(PANEL))
        xs, ws, aheads = at(x.data, (x_at, 1)), at(w.data, (w_at, 1)), at(ahead.data, (ahead_at, 1))
        ys = at(y.data, (row, y_stride), (column, 1))
        floats, vector = kind_of(f32, LANES), kind_of(i32 if integers else f32, LANES)
        sums = [cgutils.alloca_once(builder, vector) for _ in range(2 * _ROWS)]
        results = [cgutils.alloca_once(builder, floats) for _ in sums] if integers else sums
        due, fetched = (cgutils.alloca_once(builder, kind) for kind in (i64, aheads.type))
        multiplied = _dot if integers else multiply_add

        def multiply(n, panels):
            rows, mine = [at(xs, (x_stride, i)) for i in range(n)], sums[: 2 * panels * n]
            for each in mine:
                builder.store(ir.Constant(vector, [0] * LANES), each)
            builder.store(i64(0), due), builder.store(aheads, fetched)
            with cgutils.for_range(builder, K, intp=i64) as loop:
                k, weights = loop.index, []
                for panel in range(panels):
                    start = at(ws, (w_stride, panel), (k, PANEL))
                    weights += [read(builder, start), read(builder, at(start, (LANES, 1)))]
                for i, place in enumerate(rows):
                    value = splat(builder, builder.load(at(place, (k, 1))), LANES)
                    for weight, each in zip(weights, mine[len(weights) * i :], strict=False):
                        more = multiplied(builder, value, weight, builder.load(each))
                        builder.store(more, each)
                with builder.if_then(builder.icmp_unsigned("==", k, builder.load(due))):
                    builder.store(builder.add(k, every), due)
                    start = builder.load(fetched)
                    builder.store(at(start, (PANEL, 1)), fetched)
                    for panel in range(panels):
                        for line in range(0, PANEL, 16):
                            start_loading(builder, at(start, (w_stride, panel), (line, 1)))
            columns = range(2 * panels)
            if integers:
                offsets, w_scales = (
                    [read(builder, at(a.data, (column, 1), (LANES, j))) for j in columns]
                    for a in scaling[:2]
                )
                for i in range(n):
                    scale = builder.load(at(scaling[2].data, (row, 1), (i, 1)))
                    scale = splat(builder, scale, LANES)
                    for j in columns:
                        at_j = i * len(columns) + j
                        value = builder.sub(builder.load(mine[at_j]), offsets[j])
                        value = builder.fmul(builder.sitofp(value, floats), w_scales[j])
                        builder.store(builder.fmul(value, scale), results[at_j])
            places = [at(ys, (y_stride, i), (LANES, j)) for i in range(n) for j in columns]
            done = results[: len(places)]
            with builder.if_then(add):
                for each, place in zip(done, places, strict=True):
                    builder.store(builder.fadd(builder.load(each), read(builder, place)), each)
            with builder.if_then(square):
                nothing = ir.Constant(floats, [0.0] * LANES)
                for each in done:
                    value = builder.load(each)
                    negative = builder.fcmp_ordered("<", value, nothing)  # a NaN is not
                    value = builder.select(negative, nothing, value)
                    builder.store(builder.fmul(value, value), each)
            for each, place in zip(done, places, strict=True):
                write(builder, builder.load(each), place)

        done = builder.append_basic_block("done")
        case = builder.add(n, builder.select(wide, i64(_ROWS), i64(0)))
        switch = builder.switch(case, done)
        for panels, most in ((1, _ROWS), (2, _ROWS // 2)):
            for i in range(1, most + 1):
                block = builder.append_basic_block(f"{i}_rows_{panels}_panels")
                switch.add_case(i64(i + (panels - 1) * _ROWS), block)
                builder.position_at_end(block)
                multiply(i, panels)
                builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    kinds = (
        n, wide, K, x, x_at, w, w_at, y, row, column, ahead, ahead_at, every, add, square, offset,
        w_scale, x_scale,
    )  # fmt: skip
    return types.void(*kinds), codegen


@numba.njit(**EXACT)
def _multiply_panels(x, w, scaling, square, first, end, following, ahead, y):
    """y (T, N) of the panels from `first` to `end`; following, ahead: which weights come after, and
    where they begin."""
    T, (_, K, width) = len(y), w.shape
    offset, w_scale, x_scale = scaling
    blocks, parts = -(-T // _MANY), 1 if offset.size else -(-K // _DEPTH)
    wide = T >= 128
    rows, step = (_ROWS // 2, 2) if wide else (_ROWS, 1)
    for turn in range(blocks * parts):
        block, part, after = turn // parts, turn % parts, (turn + 1) % parts
        t0, t1 = T * block // blocks, T * (block + 1) // blocks
        k0, k1 = K * part // parts, K * (part + 1) // parts
        tiles = -(-(t1 - t0) // rows)
        share = -(-(k1 - k0) // tiles) * width  # of what comes next, that each of them asks for
        for p in range(first, end, step):
            source = w
            if tiles == 1:  # all of it comes from memory now: load what is needed soon
                near = (p * K + k0 + _SOON) * width
            elif p + step < end:
                near = ((p + step) * K + k0) * width
            elif turn + 1 < blocks * parts:
                near = (first * K + K * after // parts) * width
            else:
                source, near = following, ahead
            for i in range(tiles):
                r0, r1 = t0 + (t1 - t0) * i // tiles, t0 + (t1 - t0) * (i + 1) // tiles
                _multiply(
                    r1 - r0, wide and p + step <= end, k1 - k0, x, r0 * K + k0,
                    w, (p * K + k0) * width, y, r0, p * width, source, near + i * share,
                    tiles, part > 0, square and part == parts - 1, offset, w_scale, x_scale,
                )  # fmt: skip


@numba.njit(parallel=True, **EXACT)
def multiply(x, w, scaling, square, following, threads, y):
    """y (T, N) = x (T, K) @ w.T, of panels; square: then relu(y)^2; following: the weights of the
    product that comes next, whose beginning is to be loaded; scaling: of int8, see _multiply."""
    panels, later = len(w), len(following)
    size = following.shape[1] * following.shape[2]
    for thread in numba.prange(threads):
        _multiply_panels(
            x, w, scaling, square, panels * thread // threads, panels * (thread + 1) // threads,
            following, later * thread // threads * size, y,
        )  # fmt: skip


NOT_SCALED = np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.float32)


def panels(weight: Tensor, out: Tensor | None = None) -> Tensor:
    """A matrix (out, in) as panels of PANEL outputs, (panels, in, PANEL), the last one filled up
    with zeros; written over `out`, where it was made of another one before."""
    whole, rest = divmod(len(weight), PANEL)
    if out is None:
        # numpy asks the system for large pages, torch does not: a few rows are a tenth faster with
        # them. but it does not begin at a cache line
        shape = whole + (rest > 0), weight.shape[1], PANEL
        flat = np.empty(math.prod(shape) + 16, weight.numpy().dtype)
        start = -flat.ctypes.data % 64 // flat.itemsize
        out = torch.from_numpy(flat[start : start + math.prod(shape)]).view(shape)
    out[:whole] = weight[: whole * PANEL].view(whole, PANEL, weight.shape[1]).transpose(1, 2)
    if rest:
        out[-1] = 0
        out[-1, :, :rest] = weight[whole * PANEL :].T
    return out


def linear(x: Tensor, packed: Tensor, rows: int, square: bool = False) -> Tensor:
    """x (T, in) @ the first `rows` outputs of a packed weight, transposed: (T, rows); square: then
    relu(y)^2."""
    y = torch.empty(len(x), packed.shape[0] * PANEL)
    with one_at_a_time:
        threads = threads_for(len(packed))
        weights = packed.numpy()
        x = x.contiguous().numpy()
        multiply(x, weights, NOT_SCALED, square, weights, threads, y.numpy())
    return y if rows == y.shape[1] else y[:, :rows].contiguous()


def stamp() -> tuple:
    """What tells these sources from others: when each of the room's files was written, its size."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return tuple((file.stat().st_mtime, file.stat().st_size) for file in files)


def keep_compiled(*kernels) -> None:
    """Let numba write what it compiles to disk, for later processes."""
    try:
        for kernel in kernels:
            kernel.enable_caching()
            # numba looks whether a kernel's own file has changed; it is made of several of ours
            kernel._cache._cache_file._source_stamp = stamp()
    except (RuntimeError, OSError):
        pass  # neither the package's folder nor the user's cache can be written


keep_compiled(multiply)
