"""Products of weights of 6, 5 and 4 bits, packed by lowbit/packing.py, with int8 inputs.

For few rows the weights are unpacked in registers as they arrive from memory. For more rows each
tile is unpacked once, as int8, into scratch memory that stays in the cache, and multiplied from
there. All sums are exact integers, so the bits of a row are the same in both ways and do not depend
on the other rows.

    sum of (w - top) * x = sum of w * x - top * (sum of x),   0 <= w < 2^bits, top = 2^(bits - 1)

For few rows a sum therefore starts with -top times the sum of the row's inputs, and w is unsigned.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numba
import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import overload
from torch import Tensor

from ..fused.linear import Linear
from ..lowbit.packing import (
    LAYOUT,
    STEP,
    Quantised,
    as_bytes,
    dequantised,
    grouped,
    pack,
    quantised,
    step_size,
)
from . import amx, gemm
from .gemm import INT8_TILE, TILE, PackedLinear, aligned, product, quantize_row, quantize_rows_into
from .simd import (
    EXACT,
    FOUR_BYTES,
    LANES,
    SIGNED,
    kept,
    piece_parts,
    row_cuts,
    share,
    vectorised,
)
from .team import SIZE, job, scratch_array, start_after

_f32 = np.float32
OPERANDS = STEP // 4  # operands of a step
_ROWS = 12 if LANES == 16 else 6  # rows that are multiplied together by unpacked weights
FEW = _ROWS // 2  # maximum number of rows for weights that are unpacked in registers
_MANY = 240  # rows at a time: they stay in the cache
_SOON = 768  # prefetch distance of a single tile, in numbers of 32 bits


class Weight4(NamedTuple):
    """A layer's weights in 4 bits, for kernels. The type tells kernels how they are packed."""

    tiles: object  # (tiles, steps, step_size) int32
    offset: object  # (N,) int32: 128 times the sum of each row
    scale: object  # (N,) float32


class Weight5(NamedTuple):
    """A layer's weights in 5 bits, see Weight4."""

    tiles: object
    offset: object
    scale: object


class Weight6(NamedTuple):
    """A layer's weights in 6 bits, see Weight4."""

    tiles: object
    offset: object
    scale: object


WEIGHTS = {4: Weight4, 5: Weight5, 6: Weight6}


def _operands(b, layout, start):
    """Yield the operands of the step at `start`, each with its vectors for TILE rows, as soon as
    its bits are complete."""
    last = {operand: i for i, parts in enumerate(layout) for operand, *_ in parts}
    found: dict[int, list] = {}
    for i, parts in enumerate(layout):
        words = [b.read(b.at(start, i * TILE + column * LANES)) for column in range(2)]
        for operand, shift, mask in parts:
            pieces = words
            if shift:
                count = b.splat(b.i32(shift))
                pieces = [b.lshr(word, count) for word in pieces]
            bits = b.splat(b.i32(mask * 0x01010101))
            pieces = [b.and_(piece, bits) for piece in pieces]
            if operand in found:
                pairs = zip(found[operand], pieces, strict=True)
                pieces = [b.or_(*pair) for pair in pairs]
            found[operand] = pieces
            if last[operand] == i:
                yield operand, found.pop(operand)


def _factors(b, layout, start):
    """Return the factors of TILE rows for the step at `start`, in 32 bits each."""
    first = b.bitcast(b.at(start, len(layout) * TILE), b.i8.as_pointer())
    found = []
    for column in range(2):
        value = b.load(b.bitcast(b.at(first, column * LANES), b.ir_type(b.i8).as_pointer()))
        value.align = 1
        found.append(b.sext(value, b.ir_type(b.i32)))
    return found


def _unpacker(bits: int):
    """Return a function that unpacks steps of a tile to int8: integers times any factors."""
    layout, size = LAYOUT[bits], step_size(bits, TILE)

    @vectorised()
    def unpack(b, steps, w, w_at, out):
        ws, outs = b.at(w.data, w_at), out.data
        numbers, shorts = ir.VectorType(b.i8, 4 * LANES), ir.VectorType(b.i16, 2 * LANES)
        top = b.splat(b.i8(2 ** (bits - 1)), 4 * LANES)
        with cgutils.for_range(b, steps, intp=b.i64) as loop:
            source = b.at(ws, (loop.index, size))
            target = b.at(outs, (loop.index, OPERANDS * TILE))
            scaled = []  # for each column: |factor|, sign, and top * |factor| ^ sign
            if grouped(bits):
                for value in _factors(b, layout, source):
                    sign = b.ashr(value, b.splat(b.i32(31)))
                    most = b.sub(b.xor(value, sign), sign)
                    most = b.or_(most, b.shl(most, b.splat(b.i32(16))))  # in both halves
                    twice = b.or_(most, b.shl(most, b.splat(b.i32(8))))
                    less = b.xor(b.shl(twice, b.splat(b.i32(bits - 1))), sign)
                    most = b.bitcast(most, shorts)
                    scaled.append((most, sign, b.bitcast(less, numbers)))
            for operand, vectors in _operands(b, layout, source):
                for column, vector in enumerate(vectors):
                    if scaled:
                        # each 16-bit lane has two products of 4-bit numbers. Subtract
                        # top * |factor| from both, and negate the results for a negative factor
                        most, sign, less = scaled[column]
                        vector = b.bitcast(b.mul(b.bitcast(vector, shorts), most), b.ir_type(b.i32))
                        vector = b.sub(b.bitcast(b.xor(vector, sign), numbers), less)
                    else:
                        vector = b.sub(b.bitcast(vector, numbers), top)
                    b.write(vector, b.at(target, operand * TILE + column * LANES))

    return unpack


def _multiplier(bits: int):
    """Return a function that multiplies up to FEW rows by a tile, which it unpacks in registers."""
    layout, factors, size = LAYOUT[bits], grouped(bits), step_size(bits, TILE)

    @vectorised()
    def multiply(b, x, start, w, p, square, w_scale, x_scale, y):
        """Compute columns of y (T, N) = x @ tile p of w (tiles, steps, size). x: (T, 8 * steps)
        int32, each four int8; start (T, groups): initial values of the integer sums."""
        steps, x_stride, y_stride, groups = (b.extract_value(a.shape, 1) for a in (w, x, y, start))
        column = b.mul(p, b.i64(TILE))
        xs, ws, ys = x.data, b.at(w.data, (b.mul(p, steps), size)), b.at(y.data, column)
        floats, integers = b.ir_type(b.f32), b.ir_type(b.i32)
        shorts = ir.VectorType(b.i16, 2 * LANES)
        # 4-bit sums of a step fit in 16 bits: 8 operands of at most 2 * 15 * 127 in each lane
        narrow = factors and not FOUR_BYTES

        def rows_of(n):
            rows, columns = range(n), range(2)
            places = [b.at(xs, (x_stride, i)) for i in rows]
            sums = [[cgutils.alloca_once(b, integers, zfill=True) for _ in columns] for _ in rows]
            first = [b.at(start.data, (groups, i)) for i in rows]
            if not factors:
                for i in rows:
                    for each in sums[i]:
                        b.store(b.splat(b.load(first[i])), each)
            with cgutils.for_range(b, steps, intp=b.i64) as loop:
                k = loop.index
                begin = b.at(ws, (k, size))
                if narrow:
                    found = [[shorts(None) for _ in columns] for _ in rows]
                elif factors:
                    found = [[b.splat(b.load(b.at(first[i], k)))] * 2 for i in rows]
                else:
                    found = [[b.load(each) for each in sums[i]] for i in rows]
                for operand, vectors in _operands(b, layout, begin):
                    for i in rows:
                        value = b.splat(b.load(b.at(places[i], (k, OPERANDS), operand)))
                        for j in columns:
                            found[i][j] = b.multiply_add7(vectors[j], value, found[i][j])
                step_factors = _factors(b, layout, begin) if factors else ()
                # a sum fits in 16 bits, from -8 * 127 * 32 on, and is multiplied in 16 bits
                step_factors = [
                    b.bitcast(b.and_(value, b.splat(b.i32(0xFFFF))), shorts)
                    for value in step_factors
                ]
                for i in rows:
                    for j in columns:
                        total = found[i][j]
                        if narrow:
                            total = b.widen(total, b.splat(b.load(b.at(first[i], k))))
                        if factors:
                            total = b.bitcast(total, shorts)
                            total = b.multiply_add16(total, step_factors[j], b.load(sums[i][j]))
                        b.store(total, sums[i][j])
                near = b.at(begin, _SOON)
                for line in range(0, size, 16):
                    b.start_loading(b.at(near, line))
            w_scales = [b.read(b.at(w_scale.data, column, (LANES, j))) for j in columns]
            for i in rows:
                scale = b.splat(b.load(b.at(x_scale.data, i)))
                for j in columns:
                    value = b.fmul(b.sitofp(b.load(sums[i][j]), floats), w_scales[j])
                    value = b.fmul(value, scale)
                    value = b.select(square, b.relu2(value), value)
                    b.write(value, b.at(ys, (y_stride, i), (LANES, j)))

        done = b.append_basic_block("done")
        switch = b.switch(b.extract_value(y.shape, 0), done)
        for i in range(1, FEW + 1):
            block = b.append_basic_block(f"{i}_rows")
            switch.add_case(b.i64(i), block)
            b.position_at_end(block)
            rows_of(i)
            b.branch(done)
        b.position_at_end(done)

    return multiply


@job
@numba.njit(**EXACT)
def round_rows(worker, part, parts, x, top, q, scale, start):
    """Rotate few rows x (T, C) and quantize them to int8 in q (T, whole steps), padded with zeros.
    scale: the value of one step in each row; start (T, groups): initial values of the sums."""
    C, each, xt = x.shape[1], q.shape[1] // start.shape[1], np.empty(x.shape[1], np.float32)
    for t in range(len(x)):
        qt = q[t]
        scale[t] = quantize_row(x[t], _f32(127), qt, xt)
        qt[C:] = 128
        for group in range(start.shape[1]):
            total = np.int32(0)
            for c in range(group * each, (group + 1) * each):
                total += np.int32(qt[c]) - np.int32(128)
                qt[c] ^= np.uint8(128)  # from excess 128 to two's complement
            start[t, group] = -top * total


@kept(**EXACT)  # compiled once for all bit widths
def _multiply_unpacked(q, tiles, count, scaling, square, p, ahead, ahead_at, size, y):
    """Compute y (T, N) of tile p, and if `count` is 2 also of the next tile. Both are unpacked to
    int8 in `tiles` (2, K, TILE). ahead: array with `size` numbers to prefetch."""
    T, K = q.shape
    offset, w_scale, x_scale = scaling
    if amx.fits(q, tiles):
        configured, parts = 0, count * -(-T // amx.ROWS) * (K // amx.WORDS)
        near = -(-size // (parts * TILE))  # words that each part prefetches
        for i in range(count):
            configured = amx.multiply_weight_tile(
                q, tiles, i * K * TILE, scaling, square, 0, T, (p + i) * TILE, ahead,
                ahead_at + i * parts // count * near * TILE, near, configured, y,
            )  # fmt: skip
        amx.release()
        return
    wide = count == 2
    row_tiles = -(-T // (_ROWS // 2 if wide else _ROWS))
    every = max(1, row_tiles * K * TILE // size)  # of all inputs in all row tiles
    each = -(-K // every) * TILE
    for i in range(row_tiles):
        r0, r1 = T * i // row_tiles, T * (i + 1) // row_tiles
        gemm._multiply(
            r1 - r0, wide, K, q, r0 * K, tiles, 0, y, r0, p * TILE, ahead, ahead_at + i * each,
            every, False, square, offset, w_scale, x_scale,
        )  # fmt: skip


def _compiled(bits: int, function):
    """Compile a function for a bit width. Kernels are linked by name. If two processes compile
    kernels and a third one loads both from disk, the names must differ."""
    function.__qualname__ += str(bits)
    return numba.njit(**EXACT)(function)


def _product(bits: int):
    """Return a kernel for y (T, N) = x (T, K) @ w.T with weights of this bit width."""
    direct, unpack = _multiplier(bits), _unpacker(bits)
    top, factors = 2 ** (bits - 1), grouped(bits)
    named = partial(_compiled, bits)

    @job
    @named
    def few_part(worker, part, parts, q, start, w, square, w_scale, x_scale, y):
        first, end = share(len(w), part, parts)
        for p in range(first, end):
            direct(q, start, w, p, square, w_scale, x_scale, y)

    @named
    def multiply_few(q, start, scaling, w, square, team, y):
        runs, parts = piece_parts(len(w), team[SIZE])
        few_part(team, runs, parts, (q, start, w, square, scaling[1], scaling[2], y))

    @job
    @named
    def many_part(
        worker, part, parts, q, offset, w_scale, x_scale, w, square, following, cuts, runs, space, y
    ):  # fmt: skip
        tiles, rows, K, each = len(w), len(y), q.shape[1], parts // runs
        size, step = w.shape[1] * w.shape[2], following.shape[1] * following.shape[2]
        first, end = share(tiles * cuts, part, parts)
        later, ahead, soon = w, end % tiles * size, size
        if (part + 1) % each == 0:
            later, soon = following, step
            ahead = share(len(following), part // each, runs)[0] * step
        tiled, buffer = amx.fits(q, w), space[worker]
        skip = -buffer.ctypes.data % 64 // 4  # to the next cache line
        scratch = buffer[skip : skip + 2 * K * TILE].reshape(2, K, TILE)
        for cut in range(first // tiles, -(-end // tiles)):
            c0, c1 = share(rows, cut, cuts)
            p0, p1 = max(first - cut * tiles, 0), min(end - cut * tiles, tiles)
            blocks = -(-(c1 - c0) // (amx.MANY if tiled else _MANY))
            wide = int(tiled or c1 - c0 >= 128)
            for block in range(blocks):
                t0, t1 = share(c1 - c0, block, blocks)
                t0, t1 = c0 + t0, c0 + t1
                for p in range(p0, p1, 1 + wide):
                    beside = min(1 + wide, p1 - p)
                    for i in range(beside):
                        unpack(w.shape[1], w, (p + i) * size, scratch[i])
                    source, near, count = w, (p + beside) * size, beside * size
                    if p + beside == p1:
                        near = p0 * size
                        if t1 == c1:
                            source, near, count = later, ahead, soon
                    scales = offset, w_scale, x_scale[t0:t1]
                    _multiply_unpacked(
                        q[t0:t1], scratch, beside, scales, square, p, source, near, count,
                        y[t0:t1],
                    )  # fmt: skip

    @named
    def multiply_many(q, scaling, w, square, following, team, start, y):
        """Divide the work as gemm.multiply does. start: first byte of free scratch memory."""
        least = amx.ROWS // 2 if amx.fits(q, w) else _ROWS
        cuts = row_cuts(len(w), len(y), least, team[SIZE])
        runs, parts = piece_parts(len(w) * cuts, team[SIZE])
        space = scratch_array(team, start, (team[SIZE], 2 * q.shape[1] * TILE + 16), np.int32)
        offset, w_scale, x_scale = scaling
        arguments = q, offset, w_scale, x_scale, w, square, following, cuts, runs, space, y
        many_part(team, runs, parts, arguments)

    def kernel(x, weight, square, following, team, y):
        w, offset, w_scale = weight
        T, steps = len(x), w.shape[1]
        q = scratch_array(team, 0, (T, steps * STEP), np.uint8)
        scale = scratch_array(team, start_after(0, q), (T, 1), np.float32)
        free = start_after(start_after(0, q), scale)
        scaling = offset, w_scale, scale.reshape(T)
        if T <= FEW:
            start = scratch_array(team, free, (T, steps if factors else 1), np.int32)
            round_rows(team, 1, 1, (x, top, q, scaling[2], start))
            multiply_few(q.view(np.int32), start, scaling, w, square, team, y)
        else:
            quantize_rows_into(x, _f32(127), team, q, scale)
            multiply_many(q.view(np.int32), scaling, w, square, following, team, free, y)

    return kernel


_HAS_PRODUCTS = INT8_TILE and not SIGNED  # packed numbers are multiplied as unsigned bytes
_PRODUCTS = {WEIGHTS[bits]: _product(bits) for bits in WEIGHTS} if _HAS_PRODUCTS else {}


@overload(product, jit_options=EXACT)
def _product_of(x, weight, square, following, team, y):
    if isinstance(weight, types.BaseNamedTuple):
        return _PRODUCTS.get(weight.instance_class)


class PackedLowBit(PackedLinear):
    """Weights of `bits` bits in tiles of TILE outputs, for our own product with int8 inputs.

    weight: (tiles, steps, step_size) int32, see packing.pack; 128 times the sums of the rows; and
    the value of one step in each row.
    """

    bits: int

    def load(self, parts: list) -> None:
        matrix = quantised(parts, self.bits)
        fill = 0, -len(matrix.scale) % TILE
        offset = 128 * as_bytes(matrix).sum(1, dtype=torch.int32)  # inputs are stored plus 128
        new = pack(matrix, TILE), F.pad(offset, fill), F.pad(matrix.scale[:, 0], fill)
        if self.weight is None:
            self.weight = aligned(new[0].shape, torch.int32), *map(torch.empty_like, new[1:])
            self.arrays = WEIGHTS[self.bits](*(part.numpy() for part in self.weight))
        for old, part in zip(self.weight, new, strict=True):
            old.copy_(part)


class PlainLowBit(Linear):
    """PackedLowBit for processors without the instructions: one byte per weight, slow, in torch."""

    bits: int

    def load(self, parts: list) -> None:
        self.weight = quantised(parts, self.bits)

    def multiply(self, x: Tensor) -> Tensor:
        q, scale = gemm.quantize_rows(x.contiguous(), 127)
        x, (integers, scales, bits, factors) = q.float() - 128, self.weight
        factors = factors.split(1024) if grouped(bits) else [None] * -(-len(integers) // 1024)
        parts = zip(integers.split(1024), scales.split(1024), factors, strict=True)
        parts = [x @ dequantised(Quantised(i, s, bits, f)).T for i, s, f in parts]
        return (torch.cat(parts, 1) * scale)[:, : self.rows]


def class_of(bits: int) -> type[Linear]:
    """Return the class for weights of this bit width on this processor."""
    return _CLASSES[bits]


_KIND = PackedLowBit if _HAS_PRODUCTS else PlainLowBit
_CLASSES = {bits: type(f"{_KIND.__name__}{bits}", (_KIND,), {"bits": bits}) for bits in WEIGHTS}
