"""Attention's products on the matrix unit (amx.py), for K and V in bfloat16.

K and V are packed into weight tiles of the unit: K in tiles of 32 keys, V in tiles of 128 keys. A
word of a tile holds two numbers of one key of K, or one number each of two keys of V:

    K  a0 a1 a2 a3 ...  (D numbers)    (a0 a1) (b0 b1) ...  32 keys
       b0 b1 b2 b3 ...                 (a2 a3) (b2 b3) ...
    V  a0 a1 a2 ...                    (a0 b0) (a1 b1) ...  32 of D
       b0 b1 b2 ...                    (c0 d0) (c1 d1) ...

Queries and attention weights are rounded to bfloat16 in place, in the first half of a row of
float32. All rows are computed in this way, even a single one, and keys are paired from position 0
on. So the bits of a row do not depend on the other rows. The exception is a NaN in V, which reaches
all rows of a tile, because 0 times NaN is NaN.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types

from .amx import ROWS, WORDS, configure, multiply_tiles, release
from .simd import AMX, VIEWS, BFloat, fetch, vectorised

TILE = 2 * WORDS  # keys in a tile of K; numbers in a tile of V
_V_KEYS = 4 * TILE  # keys in a tile of V
_FEW = 4  # fewer rows than this read K and V in place
_SOON = 64  # prefetch distance in keys
_NEAR = 32  # the same for a few rows, which may attend to only this number of keys


@vectorised(types.boolean)
def fits(b, k, D):
    """Return whether products with k (K or V) use tiles. This requires full tiles of numbers."""
    if not AMX or k.data.type.pointee != b.i16:
        return b.i1(0)
    return b.icmp_signed("==", b.urem(D, b.i64(TILE)), b.i64(0))


@numba.njit(**VIEWS)
def round_up(keys):
    """Return the number of keys, rounded up to full tiles."""
    return -(-keys // TILE) * TILE


@vectorised()
def to_bfloat16(b, x, start, count):
    """Convert `count` numbers of x, from its flat index `start` on, to bfloat16 in place. They then
    take half of the space."""
    if not AMX:
        return
    x, lanes = b.at(x.data, start), b.i64(WORDS)
    halves = b.bitcast(x, b.i16.as_pointer())
    with cgutils.for_range_slice(b, b.i64(0), count, lanes, b.i64) as (i, _):
        kind = ir.VectorType(BFloat(), WORDS)
        value = b.call_intrinsic("llvm.x86.avx512bf16.cvtneps2bf16.512", kind, b.read(b.at(x, i)))
        value = b.bitcast(value, b.ir_type(b.i16))
        b.store(value, b.bitcast(b.at(halves, i), value.type.as_pointer())).align = 2


@vectorised()
def _transpose_words(b, k, places, first, D, packed, column):
    """Transpose the words of the 16 keys that begin at places[first:] into packed (D / 2, TILE),
    from `column` on."""
    if not AMX or k.data.type.pointee != b.i16:
        return
    starts = [b.words(b.at(k.data, b.load(b.at(places.data, first, i)))) for i in range(WORDS)]
    with cgutils.for_range_slice(b, b.i64(0), b.udiv(D, b.i64(2)), b.i64(WORDS), b.i64) as (w, _):
        rows = [b.read(b.at(start, w)) for start in starts]
        for size in (1, 2, 4, 8):  # swap squares of `size` words with their neighbours
            for i in range(WORDS):
                if not i & size:
                    pair, lanes = (rows[i], rows[i + size]), range(WORDS)
                    masks = (
                        [j if not j & size else WORDS + j - size for j in lanes],
                        [j + size if not j & size else WORDS + j for j in lanes],
                    )
                    kind = b.ir_type(b.i32)
                    swapped = [b.shuffle_vector(*pair, ir.Constant(kind, mask)) for mask in masks]
                    rows[i], rows[i + size] = swapped
        for i, row in enumerate(rows):
            b.write(row, b.at(b.words(packed.data), (b.add(w, b.i64(i)), TILE), column))


@vectorised()
def _pair(b, v, places, first, D, packed, word):
    """Store the numbers of the two keys that begin at places[first:] as word `word` of the tiles
    packed (D / TILE, _V_KEYS / 2, TILE)."""
    if not AMX or v.data.type.pointee != b.i16:
        return
    starts = [b.at(v.data, b.load(b.at(places.data, first, i))) for i in (0, 1)]
    size = b.i64(TILE)
    with cgutils.for_range_slice(b, b.i64(0), D, size, b.i64) as (d, _):
        for part in (0, WORDS):
            low, high = (b.bitcast(b.read(b.at(x, d, part)), b.ir_type(b.i32)) for x in starts)
            place = b.at(b.words(packed.data), (d, _V_KEYS // 2), (word, TILE), part)
            b.write(b.or_(b.lshr(low, b.splat(b.i32(16))), high), place)


@vectorised()
def _configure_column(b):
    """Configure tiles for one row, which is a column here. Tiles 0 and 1 contain sums, 2 and 3
    contain 16 keys each, and 4 contains the row."""
    if not AMX:
        return
    byte = [0] * 64
    byte[0] = 1
    for tile, size in enumerate((4, 4, 4 * WORDS, 4 * WORDS, 4)):
        byte[16 + 2 * tile], byte[48 + tile] = size, 16
    config = cgutils.alloca_once_value(b, ir.Constant(ir.VectorType(b.i8, 64), byte))
    b.call_intrinsic("llvm.x86.ldtilecfg", ir.VoidType(), b.bitcast(config, b.i8.as_pointer()))


def _start_loading(b, x, other, places, key, keys, back, d):
    """Prefetch the cache line of a key that begins at the key's number d. See _fetch_soon."""
    inside = b.icmp_signed("<", key, keys)
    place = b.load(b.at(places.data, b.select(inside, key, b.sub(key, back))))
    b.start_loading(b.at(b.select(inside, x.data, other.data), place, d))


@vectorised()
def _score_column(b, q, q_at, k, v, low, high, D, scores, s_at, places, at, keys):
    """Compute TILE scores, from the flat index s_at on: keys times a row of words of q.

    The keys are read in place. Half of them begin at k's flat index `low`, the other half at
    `high`. Meanwhile the keys that come _NEAR keys after places[at] are prefetched line by line,
    see _fetch_soon."""
    if not AMX or k.data.type.pointee != b.i16:
        return
    nothing, pointer = ir.VoidType(), b.i8.as_pointer()

    def move(tile, place, stride, name="tileloadd64"):
        b.call_intrinsic(f"llvm.x86.{name}", nothing, b.i8(tile), b.bitcast(place, pointer), stride)

    for tile in (0, 1):
        b.call_intrinsic("llvm.x86.tilezero", nothing, b.i8(tile))
    with cgutils.for_range_slice(b, b.i64(0), D, b.i64(TILE), b.i64) as (d, _):
        move(4, b.at(q.data, q_at, b.udiv(d, b.i64(2))), b.i64(4))
        for tile, start in enumerate((low, high)):
            move(2 + tile, b.at(k.data, start, d), b.mul(D, b.i64(2)))
            b.call_intrinsic("llvm.x86.tdpbf16ps", nothing, *map(b.i8, (tile, 2 + tile, 4)))
        with cgutils.for_range(b, b.i64(TILE), intp=b.i64) as loop:
            key = b.add(b.add(at, b.i64(_NEAR)), loop.index)
            _start_loading(b, k, v, places, key, keys, keys, d)
    for tile in (0, 1):
        move(tile, b.at(scores.data, s_at, WORDS * tile), b.i64(4), "tilestored64")


@vectorised()
def _mix_column(b, weights, at, v, k, places, first, keys, D, y, y_at):
    """Add to y, from its flat index y_at on, the weighted numbers of TILE keys in V.

    weights: bfloat16. The order of the additions is that of a product of tiles: even keys and odd
    keys separately, then both sums, then y. Meanwhile later keys are prefetched, as in
    _score_column."""
    if not AMX or v.data.type.pointee != b.i16:
        return
    weights, start = b.at(weights.data, at), b.i64(0)
    for count in (4, 2):
        size = b.i64(count * WORDS)
        stop = b.mul(b.udiv(D, size), size)
        sums = [[cgutils.alloca_once(b, b.ir_type(b.f32)) for _ in range(count)] for _ in (0, 1)]
        with cgutils.for_range_slice(b, start, stop, size, b.i64) as (d, _):
            for each in (*sums[0], *sums[1]):
                b.store(b.ir_type(b.f32)(None), each)
            with cgutils.for_range_slice(b, b.i64(0), b.i64(TILE), b.i64(2), b.i64) as (i, _):
                for odd in (0, 1):
                    weight = b.splat(b.read(b.at(weights, i, odd), 1))
                    row = b.at(v.data, b.load(b.at(places.data, first, i, odd)), d)
                    key = b.add(b.add(first, b.i64(_NEAR + odd)), i)
                    for line in range(0, count * WORDS, TILE):
                        soon = b.add(d, b.i64(line))
                        _start_loading(b, v, k, places, key, keys, b.i64(0), soon)
                    for j, each in enumerate(sums[odd]):
                        value = b.read(b.at(row, j * WORDS))
                        b.store(b.multiply_add(weight, value, b.load(each)), each)
            for j, (even, odd) in enumerate(zip(*sums, strict=True)):
                place = b.at(y.data, y_at, d, j * WORDS)
                b.write(b.fadd(b.read(place), b.fadd(b.load(even), b.load(odd))), place)
        start = stop


@numba.njit(**VIEWS)
def find_keys(k, table, h, start, stop, first, last, places):
    """Store in `places` the flat index in k of each key from position `start` to `stop`, and of the
    later keys that are prefetched. For keys that do not exist or that no row attends to, store the
    index of another key."""
    n_kv_head, block_size, D = k.shape[1:]
    end = start + round_up(stop - start) + _SOON + TILE
    low, high = max(start, first), min(end, last)
    for b in range(low // block_size, (high - 1) // block_size + 1):
        at = b * block_size
        row = (table[b] * n_kv_head + h) * block_size - at
        for key in range(max(low, at), min(high, at + block_size)):
            places[key - start] = (row + key) * D
    for i in range(low - start):
        places[i] = places[low - start]
    for i in range(high - start, end - start):
        places[i] = places[high - start - 1]


@numba.njit(**VIEWS)
def _fetch_soon(x, other, places, at, count, keys, back, D):
    """Start loading `count` keys of x, _SOON keys ahead. After the last key, load keys of `other`
    at places shifted by `back`: the same keys of V after K, or the next keys of K after V."""
    for i in range(at + _SOON, at + _SOON + count):
        if i < keys:
            fetch(x, places[i], D)
        else:
            fetch(other, places[i - back], D)


@numba.njit(**VIEWS)
def tile_scores(qs, k, v, table, h, places, start, stop, position, group, scores, spare):
    """Compute the scores of attend_tile, qs @ K.T, for the keys from position start to stop."""
    (n, D), words, packed, configured = qs.shape, qs.view(np.int32), spare.view(np.uint16), 0
    n_kv_head, size = k.shape[1:3]
    few = n < _FEW and size % WORDS == 0
    if few:
        _configure_column()
    for at in range(0, stop - start, TILE):
        if few:
            low, high = start + at, min(start + at + WORDS, (stop - 1) // WORDS * WORDS)
            low = ((table[low // size] * n_kv_head + h) * size + low % size) * D
            high = ((table[high // size] * n_kv_head + h) * size + high % size) * D
            for i in range(n):
                row = i * scores.shape[1] + at
                _score_column(
                    words, i * D, k, v, low, high, D, scores, row, places, at, stop - start
                )  # fmt: skip
            continue
        _fetch_soon(k, v, places, at, TILE, stop - start, stop - start, D)
        for i in (0, WORDS):
            _transpose_words(k, places, at + i, D, packed, i)
        for i in range(0, n, ROWS):
            count = min(ROWS, n - i)
            # if the last of these rows attends to one of the keys
            if start + at <= position + (i + count - 1) // group:
                if count != configured:
                    configure(count)
                    configured = count
                multiply_tiles(
                    count, D // 2, words, i * D, packed, 0, scores, i, at, packed, 0, 0, False,
                    False, qs, qs, qs,
                )  # fmt: skip
    release()


@numba.njit(**VIEWS)
def tile_values(scores, k, v, places, start, stop, position, group, ys, spare):
    """Compute ys += scores @ V for the keys of tile_scores."""
    (n, D), words, packed, configured = ys.shape, scores.view(np.int32), spare.view(np.uint16), 0
    width, keys = scores.shape[1], round_up(stop - start)
    if n < _FEW:
        for at in range(0, keys, TILE):
            for i in range(n):
                weights = scores.view(np.uint16)
                _mix_column(weights, 2 * i * width + at, v, k, places, at, keys, D, ys, i * D)
        return
    for at in range(0, keys, _V_KEYS):
        size = min(_V_KEYS, keys - at)
        for i in range(at, at + size, 2):
            _fetch_soon(v, k, places, i, 2, keys, 0, D)
            _pair(v, places, i, D, packed, (i - at) // 2)
        for i in range(0, n, ROWS):
            count = min(ROWS, n - i)
            seen = min(size, position + (i + count - 1) // group + 1 - start - at)
            if seen > 0:
                if count != configured:
                    configure(count)
                    configured = count
                for d in range(0, D, TILE):
                    multiply_tiles(
                        count, round_up(seen) // 2, words, i * width + at // 2, packed,
                        d * _V_KEYS // 2, ys, i, d, packed, 0, 0, True, False, ys, ys, ys,
                    )  # fmt: skip
    release()
