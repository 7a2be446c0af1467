"""Matrix products on a CPU in float32, bfloat16 or int8, and the layouts of their weights.

With few rows, the weights come from memory and are used once. A library that reads weights only
when it needs them has to wait. Here, the next tile of weights is loaded into the second-level cache
while one tile is multiplied. docs/PERFORMANCE.md compares the speed with that of a library. A row's
sums are always added in the same order, and this order does not depend on the other rows.
"""

from __future__ import annotations

import math
import sys
from itertools import accumulate
from typing import NamedTuple

import numba
import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import overload
from torch import Tensor

from ..fused.linear import Linear, Shared, stack
from ..lowbit.packing import quantised
from ..lowbit.packing import rotate as rotate
from . import amx
from .elementwise import array_of, store
from .simd import (
    EXACT,
    EXCESS,
    INTEGERS,
    LANES,
    NEON,
    TWO_HALVES,
    VIEWS,
    kept,
    lane_sums,
    multiply_add,
    piece_parts,
    row_cuts,
    row_parts,
    share,
    vectorised,
)
from .team import (
    MAX_THREADS,
    SIZE,
    job,
    one_at_a_time,
    scratch_array,
    start_after,
    team_of,
)

_f32 = np.float32

# outputs whose weights are stored together in a tile. The weights of one input fill two registers,
# and the sums of _ROWS rows fill the others. 0: the processor lacks the required instructions
TILE = 2 * LANES if LANES > 4 or NEON else 0
# the same for floats; 0 on Apple's processors, whose library has a special unit for floats
FLOAT_TILE = 0 if sys.platform == "darwin" else TILE
# the same for int8; needs an instruction that adds up products of integers
INT8_TILE = TILE if INTEGERS else 0
_ROWS = 12 if LANES == 16 or NEON else 6
_SOON = 768 // TILE if TILE else 0  # prefetch distance in inputs: 3 KB of weights
_DEPTH = 1024  # inputs at a time: a tile's weights for them stay in the cache
_MANY = 240  # rows at a time: they also stay in the cache
# for weights that are not packed: columns and rows at a time, whose sums fit in the registers; and
# the number of rows up to which this is faster than packing tiles first
_DENSE_COLUMNS = 4
_DENSE_ROWS = 4 if LANES == 16 or NEON else 2
UNPACKED_ROWS = 48


@vectorised()
def _multiply(
    b, n, wide, K, x, x_at, w, w_at, y, row, column, ahead, ahead_at, every, add, square, offset,
    w_scale, x_scale,
):  # fmt: skip
    """Compute y (n, TILE) = x (n, K) @ w (K, TILE), for n from 1 to _ROWS; if `add`, add that to y.

    All arrays are contiguous. Their parts begin at the flat indices x_at and w_at, and at a row and
    column of y, because making a slice takes as long as computing a few rows.

    wide: compute two tiles, for at most half as many rows, so that each input is loaded less often;
    square: then apply relu(y)^2; ahead: weights to prefetch, TILE of them for every `every` inputs.
    If x and w are int32, each number contains four int8, those of x plus 128, and
    y = (x @ w - offset (N,)) * w_scale (N,) * x_scale (T,). If w is bfloat16 (uint16), K counts
    pairs of weights and of inputs. A pair of inputs is two bfloat16 in one int32, or two float32.
    """
    integers, bfloat16s = (w.data.type.pointee == kind for kind in (b.i32, b.i16))
    pairs = bfloat16s and x.data.type.pointee == b.f32
    x_stride, w_stride, y_stride = (b.extract_value(a.shape, 1) for a in (x, w, y))
    w_stride = b.mul(w_stride, b.i64(TILE))
    xs = b.at(x.data, (x_at, 2 if pairs else 1))
    ws, aheads = b.at(b.words(w.data), w_at), b.at(b.words(ahead.data), ahead_at)
    ys = b.at(y.data, (row, y_stride), column)
    floats, vector = b.ir_type(b.f32), b.ir_type(b.i32 if integers else b.f32)
    due, fetched = (cgutils.alloca_once(b, kind) for kind in (b.i64, aheads.type))
    multiply_add = b.multiply_add8 if integers else b.multiply_add
    multiply_add = b.multiply_add_bf16 if bfloat16s else multiply_add

    def multiply(n, tiles):
        rows, columns = [b.at(xs, (x_stride, i)) for i in range(n)], range(2 * tiles)
        sums = [cgutils.alloca_once(b, vector, zfill=True) for _ in rows for _ in columns]
        b.store(b.i64(0), due), b.store(aheads, fetched)
        with cgutils.for_range(b, K, intp=b.i64) as loop:
            k, weights = loop.index, []
            for tile in range(tiles):
                start = b.at(ws, (w_stride, tile), (k, TILE))
                weights += [b.read(start), b.read(b.at(start, LANES))]
            for i, place in enumerate(rows):
                if pairs:
                    value = tuple(b.splat(b.load(b.at(place, (k, 2), j))) for j in (0, 1))
                else:
                    value = b.splat(b.load(b.at(place, k)))
                for weight, each in zip(weights, sums[len(weights) * i :], strict=False):
                    b.store(multiply_add(value, weight, b.load(each)), each)
            with b.if_then(b.icmp_unsigned("==", k, b.load(due))):
                b.store(b.add(k, every), due)
                start = b.load(fetched)
                b.store(b.at(start, TILE), fetched)
                for tile in range(tiles):
                    for line in range(0, TILE, 16):
                        b.start_loading(b.at(start, (w_stride, tile), line))
        if integers:
            integer_sums, sums = sums, []
            offsets, w_scales = (
                [b.read(b.at(a.data, column, (LANES, j))) for j in columns]
                for a in (offset, w_scale)
            )
            for i in range(n):
                scale = b.splat(b.load(b.at(x_scale.data, row, i)))
                for j in columns:
                    value = b.sub(b.load(integer_sums[i * len(columns) + j]), offsets[j])
                    value = b.fmul(b.sitofp(value, floats), w_scales[j])
                    sums.append(cgutils.alloca_once_value(b, b.fmul(value, scale)))
        places = [b.at(ys, (y_stride, i), (LANES, j)) for i in range(n) for j in columns]
        with b.if_then(add):
            for each, place in zip(sums, places, strict=True):
                b.store(b.fadd(b.load(each), b.read(place)), each)
        with b.if_then(square):
            for each in sums:
                b.store(b.relu2(b.load(each)), each)
        for each, place in zip(sums, places, strict=True):
            b.write(b.load(each), place)

    done = b.append_basic_block("done")
    switch = b.switch(b.add(n, b.select(wide, b.i64(_ROWS), b.i64(0))), done)
    for tiles, most in ((1, _ROWS), (2, _ROWS // 2)):
        for i in range(1, most + 1):
            block = b.append_basic_block(f"{i}_rows_{tiles}_tiles")
            switch.add_case(b.i64(i + (tiles - 1) * _ROWS), block)
            b.position_at_end(block)
            multiply(i, tiles)
            b.branch(done)
    b.position_at_end(done)


@numba.njit(**VIEWS)
def _multiply_tiles(x, w, scaling, square, first, end, following, ahead, y):
    """Compute y (T, N) of the tiles from `first` to `end`. following, ahead: weights to prefetch
    at the end, and their first index."""
    T, K = len(y), w.shape[1]
    offset, w_scale, x_scale = scaling
    blocks, parts = -(-T // _MANY), 1 if offset.size else -(-K // _DEPTH)
    wide = T >= 128
    rows, step = (_ROWS // 2, 2) if wide else (_ROWS, 1)
    for turn in range(blocks * parts):
        block, part, after = turn // parts, turn % parts, (turn + 1) % parts
        t0, t1 = T * block // blocks, T * (block + 1) // blocks
        k0, k1 = K * part // parts, K * (part + 1) // parts
        row_tiles = -(-(t1 - t0) // rows)
        share = -(-(k1 - k0) // row_tiles) * TILE  # of the next weights, to prefetch in each call
        for p in range(first, end, step):
            source = w
            if row_tiles == 1:  # these weights come from memory: prefetch later ones of the tile
                near = (p * K + k0 + _SOON) * TILE
            elif p + step < end:
                near = ((p + step) * K + k0) * TILE
            elif turn + 1 < blocks * parts:
                near = (first * K + K * after // parts) * TILE
            else:
                source, near = following, ahead
            for i in range(row_tiles):
                r0, r1 = t0 + (t1 - t0) * i // row_tiles, t0 + (t1 - t0) * (i + 1) // row_tiles
                _multiply(
                    r1 - r0, wide and p + step <= end, k1 - k0, x, r0 * K + k0,
                    w, (p * K + k0) * TILE, y, r0, p * TILE, source, near + i * share,
                    row_tiles, part > 0, square and part == parts - 1, offset, w_scale, x_scale,
                )  # fmt: skip


@job
@numba.njit(**VIEWS)
def _multiply_part(
    worker, part, parts, x, w, offset, w_scale, x_scale, square, following, cuts, runs, y
):  # fmt: skip
    tiles, rows, each = len(w), len(y), parts // runs
    first, end = share(tiles * cuts, part, parts)
    # weights to prefetch at the end: the next part of this run, or the next product
    later, ahead = w, end % tiles * w.shape[1] * TILE
    if (part + 1) % each == 0:
        later = following
        ahead = share(len(following), part // each, runs)[0] * following.shape[1] * TILE
    # first all tiles for the first rows, then for the next rows: a thread's weights are adjacent
    for cut in range(first // tiles, -(-end // tiles)):
        t0, t1 = share(rows, cut, cuts)
        p0, p1 = max(first - cut * tiles, 0), min(end - cut * tiles, tiles)
        scales = offset, w_scale, x_scale[t0:t1]
        xs, ys = x[t0:t1], y[t0:t1]
        if amx.fits(x, w):
            amx.multiply_weight_tiles(xs, w, scales, square, p0, p1, later, ahead, ys)
        else:
            _multiply_tiles(xs, w, scales, square, p0, p1, later, ahead, ys)


@kept(**EXACT)
def multiply(x, w, scaling, square, following, team, y):
    """Compute y (T, N) = x (T, K) @ w.T, with w packed in tiles.

    square: then apply relu(y)^2; following: weights of the next product, whose beginning is
    prefetched; scaling: offset, w_scale and x_scale of int8, see _multiply."""
    offset, w_scale, x_scale = scaling
    least = amx.ROWS // 2 if amx.fits(x, w) else _ROWS
    cuts = row_cuts(len(w), len(y), least, team[SIZE])
    runs, parts = piece_parts(len(w) * cuts, team[SIZE])
    arguments = x, w, offset, w_scale, x_scale, square, following, cuts, runs, y
    _multiply_part(team, runs, parts, arguments)


@vectorised()
def _multiply_dense(b, n, K, x, x_at, w, w_at, y, y_at, square):
    """Compute y (n, _DENSE_COLUMNS) = x (n, K) @ w.T, for n from 1 to _DENSE_ROWS; square: then
    apply relu(y)^2.

    The parts of the arrays begin at the flat indices x_at, w_at and y_at."""
    y_stride = b.extract_value(y.shape, 1)
    xs, ws, ys = b.at(x.data, x_at), b.at(w.data, w_at), b.at(y.data, y_at)
    done = b.append_basic_block("done")
    switch = b.switch(n, done)
    for num_rows in range(1, _DENSE_ROWS + 1):
        block = b.append_basic_block(f"{num_rows}_rows")
        switch.add_case(b.i64(num_rows), block)
        b.position_at_end(block)
        places = [(i, j) for i in range(num_rows) for j in range(_DENSE_COLUMNS)]
        sums = {place: cgutils.alloca_once(b, b.ir_type(b.f32), zfill=True) for place in places}
        with cgutils.for_range_slice(b, b.i64(0), K, b.i64(LANES), b.i64) as (k, _):
            weights = [b.read(b.at(ws, (K, j), k)) for j in range(_DENSE_COLUMNS)]
            values = [b.read(b.at(xs, (K, i), k)) for i in range(num_rows)]
            for (i, j), each in sums.items():
                b.store(b.multiply_add(values[i], weights[j], b.load(each)), each)
        for i in range(num_rows):
            value = lane_sums(b, [b.load(sums[i, j]) for j in range(_DENSE_COLUMNS)])
            b.write(b.select(square, b.relu2(value), value), b.at(ys, (y_stride, i)))
        b.branch(done)
    b.position_at_end(done)


@job
@numba.njit(**VIEWS)
def _multiply_dense_part(worker, part, parts, x, w, column, square, y):
    T, K = x.shape
    first, end = share(len(w) // _DENSE_COLUMNS, part, parts)
    for piece in range(first, end):  # its weights are read from memory once, then from the cache
        for t in range(0, T, _DENSE_ROWS):
            n = min(T - t, _DENSE_ROWS)
            y_at = t * y.shape[1] + column + _DENSE_COLUMNS * piece
            _multiply_dense(n, K, x, t * K, w, _DENSE_COLUMNS * piece * K, y, y_at, square)


@vectorised()
def _pack_tile(b, w, w_at, w_stride, K, tile, tile_at):
    """Transpose TILE rows of w, w_stride apart, into tile (K, TILE). K must be a multiple of LANES.
    Both parts begin at flat indices."""
    source, target = b.at(w.data, w_at), b.at(tile.data, tile_at)
    halves = range(0, LANES, LANES // 2)
    places = [[half + i // 2 + LANES * (i % 2) for i in range(LANES)] for half in halves]
    low, high = (ir.Constant(ir.VectorType(b.i32, LANES), lanes) for lanes in places)
    with cgutils.for_range_slice(b, b.i64(0), K, b.i64(LANES), b.i64) as (k, _):
        for column in range(0, TILE, LANES):
            rows = [b.read(b.at(source, (w_stride, column + i), k)) for i in range(LANES)]
            for _ in range(LANES.bit_length() - 1):  # each pass interleaves pairs of rows
                pairs = list(zip(rows[: LANES // 2], rows[LANES // 2 :], strict=True))
                rows = [b.shuffle_vector(*pair, half) for pair in pairs for half in (low, high)]
            for i, row in enumerate(rows):
                b.write(row, b.at(target, (k, TILE), (TILE, i), column))


@job
@numba.njit(**VIEWS)
def _multiply_packing_part(worker, part, parts, x, w, column, square, space, y):
    T, K = x.shape
    first, end = share(len(w) // TILE, part, parts)
    tile = space[worker]
    none, cuts = tile[:0], -(-K // _DEPTH)
    for p in range(first, end, 2):
        tiles = min(end - p, 2)
        rows = _ROWS // tiles
        turns = -(-T // rows)
        for cut in range(cuts):
            k0, k1 = share(K // LANES, cut, cuts)
            k0, k1 = LANES * k0, LANES * k1
            packed = tile[: 2 * (k1 - k0) * TILE].reshape(2, k1 - k0, TILE)
            for i in range(tiles):
                w_at = (p + i) * TILE * K + k0
                _pack_tile(w, w_at, K, k1 - k0, packed, i * (k1 - k0) * TILE)
            # the rows of w after these are adjacent: each call prefetches a part of them
            near = ((p + tiles) * K + tiles * k0) * TILE
            step = -(-(k1 - k0) // turns) * TILE
            for turn in range(turns):
                t0, t1 = share(T, turn, turns)
                _multiply(
                    t1 - t0, tiles == 2, k1 - k0, x, t0 * K + k0, packed, 0, y, t0,
                    column + p * TILE, w, near + turn * step, turns, cut > 0,
                    square and cut + 1 == cuts, none, none, none,
                )  # fmt: skip


@kept(**EXACT)
def multiply_dense(x, w, column, square, team, y):
    """Compute y[:, column:] (T, N) = x (T, K) @ w (N, K).T; square: then apply relu(y)^2.

    The weights have torch's layout. N must be a multiple of _DENSE_COLUMNS and K of LANES. For many
    rows each thread packs two tiles at a time, in scratch memory.
    """
    num_tiles = len(w) // TILE if len(x) > UNPACKED_ROWS else 0
    if num_tiles:
        shape = team[SIZE], 2 * min(w.shape[1], _DEPTH) * TILE
        space = scratch_array(team, 0, shape, np.float32)
        runs, parts = piece_parts(num_tiles, team[SIZE])
        _multiply_packing_part(team, runs, parts, (x, w, column, square, space, y))
    rest = w[num_tiles * TILE :]
    if len(rest):
        runs, parts = piece_parts(len(rest) // _DENSE_COLUMNS, team[SIZE])
        arguments = x, rest, column + num_tiles * TILE, square, y
        _multiply_dense_part(team, runs, parts, arguments)


@numba.njit(**VIEWS)
def quantize_row(x, levels, q, xt):
    """Rotate x (C,) and quantize it to integers from -levels to levels. Store each integer plus
    levels + 1 in the first C bytes of q (uint8). Return the value of one step. xt (C,): scratch."""
    C = x.size
    for c in range(C):
        xt[c] = x[c]
    half = C // 2
    while half >= C // min(32, C & -C):
        for start in range(0, C, 2 * half):
            a, b = xt[start : start + half], xt[start + half : start + 2 * half]
            for c in range(half):
                a[c], b[c] = a[c] + b[c], a[c] - b[c]
        half //= 2
    bits, greatest = xt.view(np.int32), np.int32(0)
    for c in range(C):  # without their sign, float bits are ordered like the floats
        greatest = max(greatest, bits[c] & np.int32(0x7FFFFFFF))
    most = max(np.int32(greatest).view(np.float32), _f32(1e-30))
    steps, zero = levels / most, levels + _f32(1.5)
    for c in range(C):
        q[c] = np.uint8(np.int32(multiply_add(xt[c], steps, zero)))
    return most / levels


@job
@numba.njit(**VIEWS)
def _round_part(worker, part, parts, x, q):
    first, end = share(len(x), part, parts)
    for t in range(first, end):
        xt, qt = x[t], q[t]
        for c in range(xt.size):
            store(qt, c, xt[c])


@numba.njit(**EXACT)
def round_rows_into(x, team, q):
    """Store x in q as bfloat16, with dtype uint16."""
    runs, parts = row_parts(len(x), team[SIZE])
    _round_part(team, runs, parts, (x, q))


@numba.njit(**VIEWS)
def _quantize_some(x, levels, first, end, xt, q, scale):
    for t in range(first, end):
        scale[t, 0] = quantize_row(x[t], levels, q[t], xt)


@job
@numba.njit(**EXACT)
def _quantize_part(worker, part, parts, x, levels, q, scale):
    first, end = share(len(x), part, parts)
    _quantize_some(x, levels, first, end, np.empty(x.shape[1], np.float32), q, scale)


@kept(**EXACT)
def quantize_rows_into(x, levels, team, q, scale):
    """Quantize the rows of x, see quantize_rows."""
    runs, parts = row_parts(len(x), team[SIZE])
    _quantize_part(team, runs, parts, (x, levels, q, scale))


def quantize_rows(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Rotate x (T, C) and quantize it to integers from -levels to levels. Return them plus
    levels + 1, (T, C) uint8, and the value of one step for each row, (T, 1) float32."""
    q, scale = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x), 1)
    with one_at_a_time:
        quantize_rows_into(x.numpy(), _f32(levels), team_of(), q.numpy(), scale.numpy())
    return q, scale


def scratch_bytes(rows: int, width: int, threads: int) -> int:
    """Return the scratch bytes that a product of `rows` rows of `width` inputs needs at most: the
    inputs as integers, their scales and sums, and unpacked or packed weights of each thread."""
    return rows * (3 * width + 256) + threads * 8 * (width + 64) * max(TILE, 1) + 4096


class Dense(NamedTuple):
    """A weight in torch's layout, of up to three stacked matrices. Each is float32
    (N, K); a missing one is (0, K)."""

    first: np.ndarray
    second: np.ndarray
    third: np.ndarray


def product(x, weight, square, following, team, y):
    """Compute y = x @ weight.T. The weight is a Dense, one of low_bit_gemm.py, or (tiles, offset,
    scale), where offset and scale are empty unless the weight is int8."""


@overload(product, jit_options=EXACT)
def _product_of(x, weight, square, following, team, y):
    def floats(x, weight, square, following, team, y):
        w, offset, w_scale = weight
        multiply(x, w, (offset, w_scale, w_scale), square, following, team, y)

    def integers(x, weight, square, following, team, y):
        w, offset, w_scale = weight
        T, C = x.shape
        q = scratch_array(team, 0, (T, C), np.uint8)
        scale = scratch_array(team, start_after(0, q), (T, 1), np.float32)
        quantize_rows_into(x, _f32(127), team, q, scale)
        scaling = offset, w_scale, scale.reshape(T)
        multiply(q.view(np.int32), w, scaling, square, following, team, y)

    def bfloat16s(x, weight, square, following, team, y):
        w, offset, w_scale = weight
        q = scratch_array(team, 0, x.shape, np.uint16)
        round_rows_into(x, team, q)
        scaling = offset, w_scale, w_scale
        multiply(q.view(np.int32), w, scaling, square, following, team, y)

    def dense(x, weight, square, following, team, y):
        column = 0
        for part in weight:
            if len(part):
                multiply_dense(x, part, column, square, team, y)
            column += len(part)

    if isinstance(weight, types.BaseNamedTuple):  # low_bit_gemm.py handles the other types
        return dense if weight.instance_class is Dense else None
    if weight[0].dtype == types.int32:
        return integers
    return bfloat16s if weight[0].dtype == types.uint16 and TWO_HALVES else floats


@kept(**EXACT)
def _linear(x, weight, square, team, y):
    product(x, weight, square, weight[0], team, y)


def aligned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a new tensor of 32-bit numbers that begins at a cache line. numpy allocates it: numpy
    requests large pages and torch does not, and products of a few rows are faster with them."""
    count = math.prod(shape)
    flat = np.empty(count + 16, np.int32)
    start = -flat.ctypes.data % 64 // flat.itemsize
    return torch.from_numpy(flat[start : start + count]).view(dtype).view(shape)


_space = np.empty(0, np.float32)


def workspace(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Return float32 arrays that a kernel needs until it returns, always in the same memory. The
    system would take as long to clear new pages as a kernel takes to fill them."""
    global _space
    sizes = [math.prod(shape) for shape in shapes]
    *starts, end = accumulate([-(-size // 16) * 16 for size in sizes], initial=0)  # cache lines
    space = _space
    if end > len(space):
        space = _space = aligned((end,), torch.float32).numpy()
    places = zip(starts, sizes, shapes, strict=True)
    return [space[at : at + size].reshape(shape) for at, size, shape in places]


class KernelLinear(Linear):
    """A weight for our own matrix product. `plain` uses torch until the kernel is compiled."""

    fuses_relu2 = True
    arrays: tuple  # the weight that `product` takes
    num_columns: int  # output columns of a product, including padding

    @property
    def is_compiled(self) -> bool:
        return not self.backend.awaited

    def multiply(self, x: Tensor) -> Tensor:
        if not self.is_compiled:
            y = self.plain(x)[:, : self.rows]
            return y.relu().square_() if self.relu2 else y
        y = torch.empty(len(x), self.num_columns)
        with one_at_a_time:
            team = team_of(scratch=scratch_bytes(*x.shape, MAX_THREADS))
            _linear(x.contiguous().numpy(), self.arrays, self.relu2, team, y.numpy())
        return y if self.rows == y.shape[1] else y[:, : self.rows].contiguous()


class PackedLinear(KernelLinear):
    """A weight packed in tiles of TILE outputs.

    weight: (tiles, in, TILE), the last tile padded with zeros. For int8, four weights are packed
    into one number, and two more arrays follow: 128 times the sums of the rows, and the step of
    each row.
    """

    row_exact = True

    @property
    def num_columns(self) -> int:
        return len(self.arrays[0]) * TILE

    def load(self, parts: list[Tensor]) -> None:
        none = torch.empty(0, dtype=torch.int32), torch.empty(0)
        self.fill(stack(parts, self.dtype), *none)

    def fill(self, matrix: Tensor, *scaling: Tensor) -> None:
        """Write the matrix over the old weights, at the addresses that the compiled layers read."""
        (rows, width), full = matrix.shape, len(matrix) // TILE
        if self.weight is None:
            shape = -(-rows // TILE), width, TILE
            self.weight = aligned(shape, matrix.dtype), *map(torch.empty_like, scaling)
            self.arrays = tuple(part.numpy() for part in self.weight)
        tiles, *others = self.weight
        tiles = tiles.view(matrix.dtype)
        tiles[:full] = matrix[: full * TILE].view(full, TILE, width).transpose(1, 2)
        tiles[full:] = 0
        tiles[full:, :, : rows % TILE] = matrix[full * TILE :].T
        for old, new in zip(others, scaling, strict=True):
            old.copy_(new)

    def plain(self, x: Tensor) -> Tensor:
        """Compute the product with torch from the packed weights, without a second copy."""
        y = torch.bmm(x.expand(len(self.weight[0]), -1, -1), self.weight[0])  # (tiles, T, TILE)
        return y.transpose(0, 1).flatten(1)


class SharedFloat32(KernelLinear, Shared):
    """A live module's weights in float32.

    torch's own product is as fast, but it runs in torch's threads, and switching between two sets
    of threads takes time.
    """

    def load(self, parts: list[Tensor]) -> None:
        super().load(parts)
        self.num_columns = sum(self.sizes)
        # whether our own product supports these shapes
        self.is_supported = self.width % LANES == 0 and all(
            len(part) % _DENSE_COLUMNS == 0 and part.is_contiguous() for part in parts
        )
        matrices = [part.detach().numpy() for part in parts]
        missing = [np.empty((0, self.width), np.float32)] * (3 - len(matrices))
        self.arrays = Dense(*matrices, *missing)

    @property
    def is_compiled(self) -> bool:
        return self.is_supported and super().is_compiled

    def plain(self, x: Tensor) -> Tensor:
        return Shared.multiply(self, x)


class PackedBfloat16(PackedLinear):
    """PackedLinear in bfloat16: (tiles, in / 2, 2 * TILE), with two inputs of each output adjacent.

    The inputs of a product are rounded to bfloat16 if the processor can multiply bfloat16.
    """

    def load(self, parts: list[Tensor]) -> None:
        none = torch.empty(0, dtype=torch.int32), torch.empty(0)
        self.fill(stack(parts, torch.bfloat16).view(torch.int32), *none)
        self.weight = self.weight[0].view(torch.bfloat16), *self.weight[1:]
        self.arrays = tuple(map(array_of, self.weight))

    def plain(self, x: Tensor) -> Tensor:
        pairs = self.weight[0].unflatten(2, (TILE, 2)).transpose(1, 2)  # (tiles, TILE, in/2, 2)
        return F.linear(x.to(torch.bfloat16), pairs.reshape(-1, self.width)).to(x.dtype)


class PackedInt8(PackedLinear):
    """PackedLinear in int8, with int8 inputs. Each row of weights and of inputs has one scale."""

    def load(self, parts: list[Tensor]) -> None:
        matrix, scale = quantised(parts, 8)[:2]
        scale = scale[:, 0]
        matrix = F.pad(matrix, (0, 0, 0, -len(matrix) % INT8_TILE))
        offset = EXCESS * matrix.sum(1, dtype=torch.int32)  # because inputs are stored plus 128
        self.fill(matrix.view(torch.int32), offset, F.pad(scale, (0, len(matrix) - len(scale))))


class Int8(Linear):
    """int8 weights and inputs in oneDNN. Each row of weights and of inputs has one scale."""

    fuses_relu2 = True

    def load(self, parts: list[Tensor]) -> None:
        matrix, scale = quantised(parts, 8)[:2]
        self.scale = scale[:, 0].contiguous()
        self.zeros = torch.zeros(len(matrix), dtype=torch.int64)
        self.weight = torch.ops.onednn.qlinear_prepack(matrix, None)
        # without VNNI, two products of bytes are added in 16 bits, and the sum fits only if the
        # inputs have seven bits
        self.levels = 127 if torch.cpu._is_vnni_supported() else 63

    def multiply(self, x: Tensor) -> Tensor:
        x, scale = quantize_rows(x, self.levels)
        is_single_row = len(x) == 1  # oneDNN takes only one scale for all rows
        y = torch.ops.onednn.qlinear_pointwise(
            x, scale.item() if is_single_row else 1.0, self.levels + 1, self.weight, self.scale,
            self.zeros, None, 1.0, 0, torch.float32, "relu" if self.relu2 else "none", [], "",
        )  # fmt: skip
        y = y if is_single_row else y.mul_(scale)
        return (y.square_() if self.relu2 else y)[:, : self.rows]
