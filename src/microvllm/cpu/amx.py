"""Matrix products of bfloat16 or int8 on the matrix unit (AMX) of Intel's processors since 2023.

Its registers are tiles of up to 16 rows of 16 words with 32 bits each. A word holds two bfloat16 or
four bytes, as in the packed weight tiles (gemm.py). One instruction multiplies 16 words of 16 rows
with 16 words of 16 outputs, and adds the products to a tile of sums, 16 rows by 16 outputs:

    w, a tile:     6      7       16 words of 16 outputs each, read one after the other
    x:  16 rows 4  0      1       sums of 32 rows and 32 outputs: four products load four tiles;
        16 rows 5  2      3       with one tile of sums, each product would load two

A row's sums are always added in the same order, as in gemm.py. Even a single row takes only as long
as loading the weights from memory. So a few rows need no separate code, which would give other
bits.
"""

from __future__ import annotations

import numba
from llvmlite import ir
from numba.core import cgutils, types

from .simd import AMX, LANES, VIEWS, vectorised

WORDS = 16  # words of a row in a tile
ROWS = 32  # rows of x at a time, in two tiles
MANY = 512  # rows at a time: they stay in the second-level cache
_SOON = 64  # prefetch distance in words: 8 KB of weights


@vectorised(types.boolean)
def fits(b, x, w):
    """Return whether x @ w uses tiles. This requires full tiles of words. A few rows of int8 do not
    use tiles: both ways are exact, and vector instructions are a little faster."""
    if not AMX or x.data.type.pointee != b.i32:
        return b.i1(0)
    rows, words = (b.extract_value(x.shape, i) for i in (0, 1))
    is_full = b.icmp_signed("==", b.urem(words, b.i64(WORDS)), b.i64(0))
    least = 4 if w.data.type.pointee == b.i32 else 1
    return b.and_(is_full, b.icmp_signed(">=", rows, b.i64(least)))


@vectorised()
def configure(b, n):
    """Configure the tiles for n rows of x, from 1 to ROWS. This clears the sums."""
    if not AMX:
        return
    two = b.icmp_signed(">", n, b.i64(16))
    first = b.trunc(b.select(two, b.i64(16), n), b.i8)
    # an unused tile gets one row, because the number of rows must not be 0
    second = b.trunc(b.select(two, b.sub(n, b.i64(16)), b.i64(1)), b.i8)
    byte = [0] * 64
    byte[0] = 1  # palette 1: 16 bits for the bytes of a row, 8 bits for the number of rows
    byte[16:32:2], byte[54:56] = [4 * WORDS] * 8, [16, 16]
    config = ir.Constant(ir.VectorType(b.i8, 64), byte)
    for tile in range(6):
        rows = first if tile in (0, 1, 4) else second
        config = b.insert_element(config, rows, b.i32(48 + tile))
    place = cgutils.alloca_once(b, config.type)
    b.store(config, place)
    b.call_intrinsic("llvm.x86.ldtilecfg", ir.VoidType(), b.bitcast(place, b.i8.as_pointer()))


@vectorised()
def release(b):
    """Release the tiles, so that the system does not have to save them."""
    if AMX:
        b.call_intrinsic("llvm.x86.tilerelease", ir.VoidType())


@vectorised()
def multiply_tiles(
    b, n, K, x, x_at, w, w_at, y, row, column, ahead, ahead_at, near, add, square, offset, w_scale,
    x_scale,
):  # fmt: skip
    """Compute gemm._multiply for the n rows that the tiles are configured for. K: number of words,
    a multiple of 16; near: words of `ahead` to prefetch for every 16 words; add: only for
    bfloat16."""
    if not AMX or x.data.type.pointee != b.i32:
        return
    integers = w.data.type.pointee == b.i32
    x_stride, y_stride = (b.extract_value(a.shape, 1) for a in (x, y))
    outputs = 2 * LANES
    xs, ws = b.at(x.data, x_at), b.at(b.words(w.data), w_at)
    ys, aheads = b.at(y.data, (row, y_stride), column), b.at(b.words(ahead.data), ahead_at)
    nothing, pointer = ir.VoidType(), b.i8.as_pointer()

    def move(tile, place, stride, name="tileloadd64"):
        stride = b.mul(stride, b.i64(4))
        b.call_intrinsic(f"llvm.x86.{name}", nothing, b.i8(tile), b.bitcast(place, pointer), stride)

    def multiply(blocks):
        sums = [(2 * i + j, b.at(ys, (y_stride, 16 * i), 16 * j)) for i in blocks for j in (0, 1)]
        with b.if_else(add) as (then, otherwise):
            with then:
                for tile, place in sums:
                    move(tile, place, y_stride)
            with otherwise:
                for tile, _ in sums:
                    b.call_intrinsic("llvm.x86.tilezero", nothing, b.i8(tile))
        with cgutils.for_range_slice(b, b.i64(0), K, b.i64(WORDS), b.i64) as (k, _):
            for j in (0, 1):
                move(6 + j, b.at(ws, (k, outputs), 16 * j), b.i64(outputs))
            for i in blocks:
                move(4 + i, b.at(xs, (x_stride, 16 * i), k), x_stride)
                for j in (0, 1):
                    tiles = (b.i8(tile) for tile in (2 * i + j, 4 + i, 6 + j))
                    name = "llvm.x86.tdpbusd" if integers else "llvm.x86.tdpbf16ps"
                    b.call_intrinsic(name, nothing, *tiles)
            start = b.at(aheads, (b.mul(b.udiv(k, b.i64(WORDS)), near), outputs))
            with cgutils.for_range(b, near, intp=b.i64) as loop:
                for line in range(0, outputs, 16):
                    b.start_loading(b.at(start, (loop.index, outputs), line))
        for tile, place in sums:
            move(tile, place, y_stride, "tilestored64")

    with b.if_else(b.icmp_signed(">", n, b.i64(16))) as (then, otherwise):
        with then:
            multiply((0, 1))
        with otherwise:
            multiply((0,))
    with b.if_then(b.i1(1) if integers else square):
        with cgutils.for_range(b, n, intp=b.i64) as loop:
            for j in (0, 1):
                place = b.at(ys, (y_stride, loop.index), LANES * j)
                value = b.read(place)
                if integers:
                    places = (b.at(a.data, column, LANES * j) for a in (offset, w_scale))
                    offsets, scales = map(b.read, places)
                    value = b.sub(b.bitcast(value, offsets.type), offsets)
                    value = b.fmul(b.sitofp(value, scales.type), scales)
                    value = b.fmul(value, b.splat(b.load(b.at(x_scale.data, row, loop.index))))
                b.write(b.select(square, b.relu2(value), value), place)


@numba.njit(**VIEWS)
def multiply_weight_tile(
    x, w, at, scaling, square, t0, t1, column, source, start, near, configured, y
):
    """Compute rows t0 to t1 of one weight tile, into y from `column` on. The weight tile begins at
    w's flat index `at`. near: see multiply_tiles; configured: number of rows that the tiles are
    configured for. Return the new number of these rows. After the last weight tile, the caller
    releases the tiles."""
    K, (offset, w_scale, x_scale) = x.shape[1], scaling
    for r0 in range(t0, t1, ROWS):
        n = min(ROWS, t1 - r0)
        if n != configured:
            configure(n)
            configured = n
        multiply_tiles(
            n, K, x, r0 * K, w, at, y, r0, column, source, start, near, False, square, offset,
            w_scale, x_scale,
        )  # fmt: skip
        start += near * K // WORDS * 2 * LANES
    return configured


@numba.njit(**VIEWS)
def multiply_weight_tiles(x, w, scaling, square, first, end, following, ahead, y):
    """Compute gemm._multiply_tiles with the matrix unit."""
    T, K, outputs = len(y), w.shape[1], 2 * LANES
    blocks, configured = -(-T // MANY), 0
    for block in range(blocks):
        t0, t1 = T * block // blocks, T * (block + 1) // blocks
        tiles = -(-(t1 - t0) // ROWS)
        near = -(-WORDS // tiles)  # words of the next weights to prefetch for every 16 words
        for p in range(first, end):
            source = w
            if tiles == 1:  # these weights come from memory: prefetch later ones of the tile
                start = (p * K + _SOON) * outputs
            elif p + 1 < end:
                start = (p + 1) * K * outputs
            elif block + 1 < blocks:
                start = first * K * outputs
            else:
                source, start = following, ahead
            configured = multiply_weight_tile(
                x, w, p * K * outputs, scaling, square, t0, t1, p * outputs, source, start, near,
                configured, y,
            )  # fmt: skip
    if configured:
        release()
