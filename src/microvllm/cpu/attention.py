"""Paged attention in numba, over the block table.

Gathering a paged cache before torch's attention costs more than all matrix products of a step.
These kernels read every block in place, once for all query heads that share it, at about memory
speed. Block tables are those of PagedAttention (Kwon et al. 2023), the softmax is that of
FlashAttention (Dao et al. 2022): it keeps the scores of a few hundred keys at a time, and rescales
the earlier sums when a larger score occurs. The groups of keys and the order of a row's sums do not
depend on the other rows of the batch.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from torch import Tensor

from .attention_tiles import TILE, find_keys, fits, round_up, tile_scores, tile_values, to_bfloat16
from .elementwise import array_of, exp2, exp2_of, largest
from .simd import EXACT, LANES, VIEWS, fetch, kept, share, sum_of, vectorised
from .team import MAX_PARTS, SIZE, job, one_at_a_time, team_of

_f32 = np.float32
_KEYS = 512  # keys whose scores are kept at a time
# numbers of a row of scores: an odd number of cache lines, because with 32 lines a column of all
# rows would map to few cache sets
_WIDTH = _KEYS + 16
_KEYS_AT_ONCE = 64  # keys that are multiplied at a time: they stay in the first-level cache
_QUERIES = 192  # queries that read a block together: their scores fit in the second-level cache
_SHARED = 64  # minimum number of positions that several sequences read together
_MIN_QUERIES = 12  # minimum of a halved tile: packing a key costs as much as several queries
_READ = 16  # cost of reading a key from memory, in products of a query and a key
_SOON = 4096  # prefetch distance in bytes
_BEGIN = 1024  # bytes of a block prefetched by instruction; the hardware prefetches the rest


def _totals(b, vectors):
    """Sum each vector's lanes. Return the sums in the lanes of one vector. Each addition handles
    halves of two vectors. The order of a sum does not depend on the number of vectors."""
    found = [(vector, [i] * LANES) for i, vector in enumerate(vectors)]
    size, indices = LANES, b.ir_type(b.i32)
    while size > 1:
        # the instructions shuffle either within groups of four lanes, or whole groups of four
        chunk, pairs = max(size, 4), []
        starts = [(at, source) for at in range(0, LANES, chunk) for source in (0, LANES)]
        low = [
            source + part + lane
            for at, source in starts
            for part in range(at, at + chunk, size)
            for lane in range(size // 2)
        ]
        high = [lane + size // 2 for lane in low]
        for i in range(0, len(found), 2):
            (x, of_x), (y, of_y) = found[i], found[min(i + 1, len(found) - 1)]
            halves = [b.shuffle_vector(x, y, ir.Constant(indices, each)) for each in (low, high)]
            pairs.append((b.fadd(*halves), [(of_x + of_y)[lane] for lane in low]))
        found, size = pairs, size // 2
    (total, owners), count = found[0], len(vectors)
    order = [owners.index(i) for i in range(count)]
    return b.shuffle_vector(total, total, ir.Constant(b.ir_type(b.i32, count), order))


def _dots(rows: int):
    """Return a function that computes s (rows, m) = q (rows, D) @ k (m, D).T for four keys at a
    time. All parts begin at flat indices, and the rows of s are `stride` apart. The last key is
    repeated, so that s is written up to a multiple of four keys."""

    @vectorised()
    def function(b, q, q_at, k, k_at, m, D, s, s_at, stride):
        q, k, s = b.at(q.data, q_at), b.at(k.data, k_at), b.at(s.data, s_at)
        width, last = b.i64(LANES), b.sub(m, b.i64(1))
        rest = b.mul(b.udiv(D, width), width)
        queries = [b.at(q, (D, i)) for i in range(rows)]
        sums = [cgutils.alloca_once(b, b.ir_type(b.f32)) for _ in range(4 * rows)]
        with cgutils.for_range_slice(b, b.i64(0), m, b.i64(4), b.i64) as (x, _):
            keys = []
            for i in range(4):
                j = b.add(x, b.i64(i))
                j = b.select(b.icmp_unsigned("<", j, last), j, last)
                keys.append(b.at(k, (D, j)))
            for each in sums:
                b.store(b.ir_type(b.f32)(None), each)
            with cgutils.for_range_slice(b, b.i64(0), rest, width, b.i64) as (d, _):
                values = [b.read(b.at(query, d)) for query in queries]
                for j, key in enumerate(keys):
                    other = b.read(b.at(key, d))
                    for each, value in zip(sums[j * rows :], values, strict=False):
                        b.store(b.multiply_add(value, other, b.load(each)), each)
            totals = _totals(b, [b.load(each) for each in sums])
            for i in range(rows):
                # sums are ordered by key, then by row
                of_row = ir.Constant(b.ir_type(b.i32, 4), [j * rows + i for j in range(4)])
                part = cgutils.alloca_once_value(b, b.shuffle_vector(totals, totals, of_row))
                with cgutils.for_range_slice(b, rest, D, b.i64(1), b.i64) as (d, _):
                    value = b.splat(b.load(b.at(queries[i], d)), 4)
                    others = ir.Constant(b.ir_type(b.f32, 4), ir.Undefined)
                    for j, key in enumerate(keys):
                        others = b.insert_element(others, b.read(b.at(key, d), 1), b.i32(j))
                    b.store(b.multiply_add(value, others, b.load(part)), part)
                b.write(b.load(part), b.at(s, (stride, i), x))

    return function


def _mixes(rows: int):
    """Return a function that computes y (rows, D) += p (rows, m) @ v (m, D). All parts begin at
    flat indices, and the rows of p are `stride` apart. A part of y stays in registers."""

    @vectorised()
    def function(b, p, p_at, stride, m, v, v_at, D, y, y_at):
        p, v, y = b.at(p.data, p_at), b.at(v.data, v_at), b.at(y.data, y_at)
        weights, start = [b.at(p, (stride, i)) for i in range(rows)], b.i64(0)
        for count, lanes in ((4, LANES), (1, LANES), (1, 1)):
            sums = [cgutils.alloca_once(b, b.ir_type(b.f32, lanes)) for _ in range(count * rows)]
            size = b.i64(count * lanes)
            stop = b.mul(b.udiv(D, size), size)
            with cgutils.for_range_slice(b, start, stop, size, b.i64) as (d, _):
                at = [b.at(y, (D, i), d, (j, lanes)) for i in range(rows) for j in range(count)]
                for each, place in zip(sums, at, strict=True):
                    b.store(b.read(place, lanes), each)
                with cgutils.for_range(b, m, intp=b.i64) as loop:
                    row = b.at(v, (loop.index, D), d)
                    values = [b.read(b.at(row, (j, lanes)), lanes) for j in range(count)]
                    for i, place in enumerate(weights):
                        weight = b.splat(b.load(b.at(place, loop.index)), lanes)
                        for value, each in zip(values, sums[i * count :], strict=False):
                            b.store(b.multiply_add(weight, value, b.load(each)), each)
                for each, place in zip(sums, at, strict=True):
                    b.write(b.load(each), place)
            start = stop

    return function


_ROWS = LANES // 4  # queries multiplied together: with four keys, each register contains one sum
_FEW = 4  # fewer queries than this read K and V in place
_dot, _mix, _dot_rows, _mix_rows = _dots(1), _mixes(1), _dots(_ROWS), _mixes(_ROWS)
_TWO = min(2, _ROWS)  # queries multiplied together if there are few
_dot_two, _mix_two = _dots(_TWO), _mixes(_TWO)


@vectorised()
def _unpack(b, x, start, count, y, y_at):
    """Copy `count` numbers of x, from its flat index `start` on, to y as float32."""
    x, y, start = b.at(x.data, start), b.at(y.data, y_at), b.i64(0)
    for lanes in (LANES, 1):
        stop = b.mul(b.udiv(count, b.i64(lanes)), b.i64(lanes))
        with cgutils.for_range_slice(b, start, stop, b.i64(lanes), b.i64) as (i, _):
            b.write(b.read(b.at(x, i), lanes), b.at(y, i))
        start = stop


@vectorised()
def _rescale(b, s, s_at, x, start, skip, count):
    """If x is an int8 cache, multiply s, from its flat index s_at on, by `count` scales of a head.
    The head's scales begin at x's flat index `start`, and the first `skip` scales are skipped."""
    if x.data.type.pointee != b.i8:
        return
    scales = b.bitcast(b.at(x.data, start), b.i16.as_pointer())
    scales, s, start = b.at(scales, skip), b.at(s.data, s_at), b.i64(0)
    for lanes in (LANES, 1):
        stop = b.mul(b.udiv(count, b.i64(lanes)), b.i64(lanes))
        with cgutils.for_range_slice(b, start, stop, b.i64(lanes), b.i64) as (i, _):
            b.write(b.fmul(b.read(b.at(s, i), lanes), b.read(b.at(scales, i), lanes)), b.at(s, i))
        start = stop


@vectorised(types.float32)
def _powers(b, x, n, top):
    """Replace the first n of x by 2**(x - top). Return their sum."""

    def add(sums, i, lanes):
        place = b.at(x.data, i)
        value = exp2_of(b, b.fsub(b.read(place, lanes), b.splat(top, lanes)), lanes)
        b.write(value, place)
        return b.fadd(sums, value)

    return sum_of(b, n, add)


@numba.njit(**VIEWS)
def _softmax(scores, before):
    """Compute the softmax in place, without the division by the sum. Return the largest score, at
    least `before`, and the sum."""
    top = largest(scores)
    top = before if before > top else top  # keeps a NaN
    return top, _powers(scores, scores.size, top)


@numba.njit(**VIEWS)
def _begin(q, count, h, group, qs, ys, sums):
    """Write the scaled queries of kv head h to qs, padded with copies of the last query. Reset ys
    and sums."""
    scale = _f32(1 / (math.sqrt(q.shape[2]) * math.log(2)))  # for powers of 2 instead of e
    for i in range(len(qs)):
        qi, qs_i, yi = q[min(i, count - 1) // group, h * group + i % group], qs[i], ys[i]
        for d in range(qi.size):
            qs_i[d] = qi[d] * scale
            yi[d] = 0
        sums[i, 0], sums[i, 1] = -np.inf, 0


@numba.njit(**VIEWS)
def _add_keys(scores, sums, y):
    """Turn the scores of a query and some keys into weights, in place. sums: the largest score so
    far, and the sum of all weights. For a new largest score, this rescales the sum and y (D,), the
    weighted sum of values."""
    before = sums[0]
    sums[0], added = _softmax(scores, before)
    factor = exp2(before - sums[0])
    sums[1] = sums[1] * factor + added
    for d in range(y.size):
        y[d] *= factor


@numba.njit(**VIEWS)
def _write_means(ys, sums, count, h, group, out):
    """Divide the first `count` weighted sums of values by their sums of weights, into out."""
    for i in range(count):
        out_i, yi = out[i // group, h * group + i % group], ys[i]
        factor = 1 / sums[i, 1]
        for d in range(yi.size):
            out_i[d] = yi[d] * factor


@numba.njit(**VIEWS)
def _gather(x, table, h, start, stop, D, spare):
    """Copy the numbers of kv head h in x (K or V), positions start to stop, to spare
    (stop - start, D)."""
    n_kv_head, block_size, numbers = x.shape[1:]
    for b in range(start // block_size, (stop - 1) // block_size + 1):
        at = b * block_size
        x0, x1 = max(start - at, 0), min(stop - at, block_size)
        base = (table[b] * n_kv_head + h) * block_size * numbers
        _unpack(x, base + x0 * D, (x1 - x0) * D, spare, (at + x0 - start) * D)


@numba.njit(**VIEWS)
def _share(start, stop, i, n):
    """Return the part of the positions start to stop that is prefetched while _ROWS of n rows, from
    row i on, are computed."""
    return start + (stop - start) * i // n, start + (stop - start) * min(i + _ROWS, n) // n


@numba.njit(**VIEWS)
def _fetch_some(x, table, h, start, stop):
    """Start loading kv head h of x at positions start to stop."""
    n_kv_head, block_size, numbers = x.shape[1:]
    for at in range(start, stop):
        row = (table[at // block_size] * n_kv_head + h) * block_size + at % block_size
        fetch(x, row * numbers, numbers)


@numba.njit(**VIEWS)
def _rescale_rows(scores, zero, n, x, table, h, start, stop, D):
    """Multiply the first n rows of scores by the int8 scales of x, from position `start` to `stop`.
    The first number of each row belongs to position `zero`."""
    n_kv_head, block_size, numbers = x.shape[1:]
    for b in range(start // block_size, (stop - 1) // block_size + 1):
        at = b * block_size
        x0, x1 = max(start - at, 0), min(stop - at, block_size)
        scales = ((table[b] * n_kv_head + h) * numbers + D) * block_size
        for i in range(n):
            s = i * scores.shape[1] + at + x0 - zero
            _rescale(scores, s, x, scales, x0, x1 - x0)


@numba.njit(**VIEWS)
def _read_few(mixes, ys, scores, zero, x, other, table, h, start, stop, last):
    """Compute scores = ys @ x.T, or if `mixes` ys += scores @ x, for positions start to stop of x,
    read in place. The first number of a row of scores belongs to position `zero`.

    Meanwhile later positions of x are prefetched, and then positions of `other`: the same ones of V
    after K, or the next ones of K after V."""
    n, D = ys.shape
    n_kv_head, block_size, numbers = x.shape[1:]
    size, first, blocks = block_size * numbers, start // block_size, (stop - 1) // block_size + 1
    few = min(size, _BEGIN // x.itemsize)
    for b in range(first, blocks):
        at, near = b * block_size, b + max(1, _SOON // (size * x.itemsize))
        base = (table[b] * n_kv_head + h) * size
        soon = near if mixes or near < blocks else first + near - blocks
        soon = (table[min(soon, (last - 1) // block_size)] * n_kv_head + h) * size
        if near < blocks:
            fetch(x, soon, few)
        else:
            fetch(other, soon, few)
        j, row = max(start - at, 0), scores.shape[1]
        m, s, base = min(stop - at, block_size) - j, at + j - zero, base + j * D
        for i in range(0, n - _TWO + 1, _TWO):
            if mixes:
                _mix_two(scores, i * row + s, row, m, x, base, D, ys, i * D)
            else:
                _dot_two(ys, i * D, x, base, m, D, scores, i * row + s, row)
        i = n - 1
        if n % _TWO and mixes:
            _mix(scores, i * row + s, row, m, x, base, D, ys, i * D)
        elif n % _TWO:
            _dot(ys, i * D, x, base, m, D, scores, i * row + s, row)


@numba.njit(**VIEWS)
def _read_many(mixes, ys, scores, zero, x, table, h, start, stop, position, group, spare):
    """Compute the same as _read_few for more rows. Parts of x are copied to `spare`."""
    (n, D), row = ys.shape, scores.shape[1]
    for at in range(start, stop, _KEYS_AT_ONCE):
        end, soon = min(at + _KEYS_AT_ONCE, stop), min(at + 2 * _KEYS_AT_ONCE, stop)
        _gather(x, table, h, at, end, D, spare)
        for i in range(0, n, _ROWS):
            _fetch_some(x, table, h, *_share(end, soon, i, n))
            # up to the last key that the last of these rows attends to
            m, s = min(end, position + (i + _ROWS - 1) // group + 1) - at, i * row + at - zero
            if m > 0 and mixes:
                _mix_rows(scores, s, row, m, spare, 0, D, ys, i * D)
            elif m > 0:
                _dot_rows(ys, i * D, spare, 0, m, D, scores, s, row)


@numba.njit(**VIEWS)
def attend_tile(q, k, v, h, table, position, window, scratch, out):
    """Compute attention of some rows of one sequence, the first at `position`, to kv head h.

    q, out: (count, n_head, D); table: (M,); scratch: scratch_size(count * query heads of h, D)
    numbers. A few rows read K and V in place. More rows read float32 copies, which stay in the
    first-level cache. The bits of a row are the same either way. With the matrix unit, all rows are
    computed in the same way, see attention_tiles.py.
    """
    D, group, row = q.shape[2], q.shape[1] // k.shape[1], _WIDTH
    count = q.shape[0] * group
    n, (spare, scratch) = (
        padded(count),
        (scratch[: _KEYS_AT_ONCE * D], scratch[_KEYS_AT_ONCE * D :]),
    )
    places, scratch = scratch[: 4 * _KEYS].view(np.int64), scratch[4 * _KEYS :]
    qs, ys = scratch[: n * D].reshape(n, D), scratch[n * D : 2 * n * D].reshape(n, D)
    scores = scratch[2 * n * D : n * (2 * D + row)].reshape(n, row)
    sums = scratch[n * (2 * D + row) : n * (2 * D + row + 2)].reshape(n, 2)
    tiled = fits(k, D)
    _begin(q, count, h, group, qs, ys, sums)
    if tiled:
        for i in range(n):
            to_bfloat16(qs, i * D, D)
    last = position + q.shape[0]  # the rows attend to keys before `last`, from `first` on
    first = max(0, position - window) if window >= 0 else 0
    start = first // TILE * TILE if tiled else first  # the same tiles for all rows
    while start < last:
        stop = min(last, (start // _KEYS + 1) * _KEYS)
        width = round_up(stop - start) if tiled else stop - start
        if tiled:
            find_keys(k, table, h, start, stop, first, last, places)
            tile_scores(qs, k, v, table, h, places, start, stop, position, group, scores, spare)
        elif n < _FEW:
            _read_few(False, qs, scores, start, k, v, table, h, start, stop, last)
        else:
            _read_many(
                False, qs, scores, start, k, table, h, start, stop, position, group, spare
            )  # fmt: skip
        _rescale_rows(scores, start, n, k, table, h, start, stop, D)
        for i in range(n):
            right = max(0, min(position + i // group + 1, stop) - start)
            left = max(0, position + i // group - window - start) if window >= 0 else 0
            scores[i, : min(left, right)] = 0
            scores[i, right:width] = 0
            if left < right:
                _add_keys(scores[i, left:right], sums[i], ys[i])
            if tiled:
                to_bfloat16(scores, i * row, width)
        _rescale_rows(scores, start, n, v, table, h, start, stop, D)
        if tiled:
            tile_values(scores, k, v, places, start, stop, position, group, ys, spare)
        elif n < _FEW:
            _read_few(True, ys, scores, start, v, k, table, h, start, stop, last)
        else:
            _read_many(
                True, ys, scores, start, v, table, h, start, stop, position, group, spare
            )  # fmt: skip
        start = stop
    _write_means(ys, sums, count, h, group, out)


@numba.njit(**VIEWS)
def _read_shared(
    mixes, ys, scores, zero, x, other, tables, h, stop, shared, seq_lens, group, spare
):  # fmt: skip
    """Compute the same as _read_few for one row of each of several sequences, from position `zero`
    to `stop`. All sequences share the blocks before position `shared`, which are read once. The
    other blocks are read row by row."""
    D, both = ys.shape[1], min(stop, shared)
    if zero < both:
        if mixes:
            _rescale_rows(scores, zero, len(ys), x, tables[0], h, zero, both, D)
        if len(ys) < _FEW:
            _read_few(mixes, ys, scores, zero, x, other, tables[0], h, zero, both, shared)
        else:
            _read_many(
                mixes, ys, scores, zero, x, tables[0], h, zero, both, both, group, spare
            )  # fmt: skip
        if not mixes:
            _rescale_rows(scores, zero, len(ys), x, tables[0], h, zero, both, D)
    for r in range(len(seq_lens)):
        start, end, last = max(zero, shared), min(stop, seq_lens[r]), seq_lens[r]
        row_ys, row_scores = ys[r * group : (r + 1) * group], scores[r * group : (r + 1) * group]
        if start >= end:
            continue
        if mixes:
            _rescale_rows(row_scores, zero, group, x, tables[r], h, start, end, D)
        if group < _FEW:
            _read_few(
                mixes, row_ys, row_scores, zero, x, other, tables[r], h, start, end, last
            )  # fmt: skip
        else:
            _read_many(
                mixes, row_ys, row_scores, zero, x, tables[r], h, start, end, end, group, spare
            )  # fmt: skip
        if not mixes:
            _rescale_rows(row_scores, zero, group, x, tables[r], h, start, end, D)


@numba.njit(**VIEWS)
def attend_shared(q, k, v, h, tables, seq_lens, shared, window, scratch, out):
    """Compute attention of the last row of each of several sequences to kv head h. The sequences
    share their blocks before position `shared`.

    q, out: (B, n_head, D); tables: (B, M); seq_lens: (B,); scratch: as in attend_tile. The bits of
    a row are those of attend_tile."""
    D, group, row = q.shape[2], q.shape[1] // k.shape[1], _WIDTH
    count = q.shape[0] * group
    n, (spare, scratch) = (
        padded(count),
        (scratch[: _KEYS_AT_ONCE * D], scratch[_KEYS_AT_ONCE * D :]),
    )
    scratch = scratch[4 * _KEYS :]
    qs, ys = scratch[: n * D].reshape(n, D), scratch[n * D : 2 * n * D].reshape(n, D)
    scores = scratch[2 * n * D : n * (2 * D + row)].reshape(n, row)
    sums = scratch[n * (2 * D + row) : n * (2 * D + row + 2)].reshape(n, 2)
    _begin(q, count, h, group, qs, ys, sums)
    shortest, longest = seq_lens[0], seq_lens[0]
    for length in seq_lens:
        shortest, longest = min(shortest, length), max(longest, length)
    start = max(0, shortest - 1 - window) if window >= 0 else 0
    while start < longest:
        stop = min(longest, (start // _KEYS + 1) * _KEYS)
        _read_shared(
            False, qs, scores, start, k, v, tables, h, stop, shared, seq_lens, group, spare
        )  # fmt: skip
        for i in range(n):
            length = seq_lens[min(i, count - 1) // group]
            right = max(0, min(length, stop) - start)
            left = max(0, length - 1 - window - start) if window >= 0 else 0
            scores[i, : min(left, right)] = 0
            scores[i, right : stop - start] = 0
            if left < right:
                _add_keys(scores[i, left:right], sums[i], ys[i])
        _read_shared(
            True, ys, scores, start, v, k, tables, h, stop, shared, seq_lens, group, spare
        )  # fmt: skip
        start = stop
    _write_means(ys, sums, count, h, group, out)


@numba.njit(**VIEWS)
def padded(n):
    """Return the number of scratch rows for n queries."""
    return n if n < _FEW else -(-n // _ROWS) * _ROWS


def scratch_size(queries: int, D: int) -> int:
    """Return the number of float32 that a tile needs for spare and places, and for the qs, ys,
    scores and sums of all queries."""
    size = _KEYS_AT_ONCE * D + 4 * _KEYS + padded(queries) * (2 * D + _WIDTH + 2)
    return -(-size // 16) * 16  # so that no two threads write to one cache line


@numba.njit(**VIEWS)
def _work(count, position, window, group):
    """Return the cost of `count` rows from `position` on, in products of a query and a key.
    Reading a key from memory counts as _READ of them."""
    earlier = min(position, window) if window >= 0 else position
    return group * (count * earlier + count * (count + 1) // 2) + _READ * (earlier + count)


@numba.njit(**EXACT)
def _cut_decodes(seq_lens, tables, block_size, n_kv_head, group, threads, tiled):
    """Return the tiles of sequences with one row each. Neighbours with the same first blocks
    (usually samples of one prompt) form one tile, unless that would leave fewer than two parts for
    each thread."""
    tiles, n, b, count = np.empty((seq_lens.size, 4), np.int64), 0, 0, seq_lens.size
    most = min(_QUERIES // group, -(-count * n_kv_head // (2 * threads)))
    while b < count:
        end, blocks = b + 1, (seq_lens[b] - 1) // block_size
        while end < min(b + most, count) and not tiled:
            same, limit = 0, min(blocks, (seq_lens[end] - 1) // block_size)
            while same < limit and tables[b, same] == tables[end, same]:
                same += 1
            # a sequence that shares less starts a new tile, possibly with others like it
            least = 3 * blocks // 4 if end > b + 1 else 0
            if same * block_size < _SHARED or same < least:
                break
            end, blocks = end + 1, same
        tiles[n, 0], tiles[n, 1], tiles[n, 2] = b, b, end
        tiles[n, 3] = blocks * block_size if end > b + 1 else 0
        n, b = n + 1, end
    return tiles[:n]


@numba.njit(**EXACT)
def cut_tiles(
    cu_seqlens, seq_lens, tables, block_size, window, n_kv_head, group, rows, threads, tiled
):  # fmt: skip
    """Cut the sequences into tiles of up to `rows` rows. Return (tiles, 4): the sequence, the first
    row, the end row, and the number of positions with shared blocks. The last is 0 unless the tile
    has one row of each of several sequences.

    Later rows attend to more keys, and a batch may begin with decodes and end with long chunks. So
    tiles are halved until they have at most half of a thread's mean share of the work, or fewer
    than 2 * _MIN_QUERIES queries. The largest tiles come first, because threads take them in order.
    """
    if cu_seqlens[seq_lens.size] == seq_lens.size:  # decodes: one row per tile
        return _cut_decodes(seq_lens, tables, block_size, n_kv_head, group, threads, tiled)
    total, count = 0, 0
    for b in range(seq_lens.size):
        first, end = cu_seqlens[b], cu_seqlens[b + 1]
        for r in range(first, end, rows):
            n = min(rows, end - r)
            total += n_kv_head * _work(n, seq_lens[b] - end + r, window, group)
    most, sizes = total // (2 * threads), np.empty(seq_lens.size, np.int64)
    for b in range(seq_lens.size):
        length = cu_seqlens[b + 1] - cu_seqlens[b]
        size = min(rows, length)
        while (
            size * group >= 2 * _MIN_QUERIES
            and _work(size, seq_lens[b] - size, window, group) > most
        ):
            size = (size + 1) // 2
        sizes[b] = size
        count += -(-length // max(size, 1))
    found, works = np.zeros((count, 4), np.int64), np.empty(count, np.int64)
    i, level = 0, 0
    for b in range(seq_lens.size):
        end = cu_seqlens[b + 1]
        for r in range(cu_seqlens[b], end, max(sizes[b], 1)):
            stop = min(r + sizes[b], end)
            found[i, 0], found[i, 1], found[i, 2] = b, r, stop
            works[i] = _work(stop - r, seq_lens[b] - end + r, window, group)
            level = max(level, works[i])
            i += 1
    tiles, n = np.empty((count, 4), np.int64), 0
    # first the tiles with more than half of the largest tile's work, then more than a quarter, ...
    while level > 0:
        for i in range(count - 1, -1, -1):
            if level // 2 < works[i] <= level:
                tiles[n] = found[i]
                n += 1
        level //= 2
    return tiles


@job
@numba.njit(**VIEWS)
def _attend_part(
    worker, part, parts, tiles, q, k, v, cu_seqlens, seq_lens, block_tables, window, scratch, out
):  # fmt: skip
    n_kv_head = k.shape[1]
    first, end = share(len(tiles) * n_kv_head, part, parts)
    for each in range(first, end):
        i, h = each // n_kv_head, each % n_kv_head
        b, r, stop = tiles[i, 0], tiles[i, 1], tiles[i, 2]
        rows, space, shared = slice(r, stop), scratch[worker], tiles[i, 3]
        if shared:
            tables, lengths = block_tables[rows], seq_lens[rows]
            attend_shared(q[rows], k, v, h, tables, lengths, shared, window, space, out[rows])
        else:
            position = seq_lens[b] - cu_seqlens[b + 1] + r
            table = block_tables[b]
            attend_tile(q[rows], k, v, h, table, position, window, space, out[rows])


@numba.njit(**EXACT)
def num_parts(tiles, n_kv_head, threads):
    """Return the number of parts of a job. A few per thread balance tiles of different sizes."""
    return min(tiles * n_kv_head, 16 * threads if threads > 1 else 1, MAX_PARTS)


@kept(**EXACT)
def attend_rows(q, k, v, cu_seqlens, seq_lens, block_tables, window, rows, team, scratch, out):
    """Compute attention in tiles of up to `rows` rows and one kv head. Threads take the tiles in
    order. scratch: (threads, scratch_size)."""
    n_kv_head, group, tiled = k.shape[1], q.shape[1] // k.shape[1], fits(k, q.shape[2])
    tiles = cut_tiles(
        cu_seqlens, seq_lens, block_tables, k.shape[2], window, n_kv_head, group, rows,
        team[SIZE], tiled,
    )  # fmt: skip
    attend_tiles(
        tiles, q, k, v, cu_seqlens, seq_lens, block_tables, window, team, scratch, out
    )  # fmt: skip


@numba.njit(**EXACT)
def attend_tiles(
    tiles, q, k, v, cu_seqlens, seq_lens, block_tables, window, team, scratch, out
):  # fmt: skip
    """Compute attention in tiles that are already cut."""
    parts = num_parts(len(tiles), k.shape[1], team[SIZE])
    arguments = tiles, q, k, v, cu_seqlens, seq_lens, block_tables, window, scratch, out
    _attend_part(team, 1, parts, arguments)


def tile(batch, group: int, D: int) -> tuple[int, int]:
    """Return how many rows of a sequence are computed together, and a thread's scratch size."""
    # many queries read a block of keys together, as long as their scores fit the second-level cache
    most = max(1, _QUERIES // group)
    rows = max(1, min(batch.max_query_len, most))
    is_decode = len(batch.seq_lens) == len(batch.positions)
    queries = min(most, len(batch.seq_lens)) if is_decode else rows
    return rows, scratch_size(queries * group, D)


def paged_attention(q: Tensor, k: Tensor, v: Tensor, batch, window: int) -> Tensor:
    """Compute attention as described in ../attention.py. q is float32; k and v are float32,
    bfloat16, or int8 as in ../fused/int8_cache.py. Sequences may have chunks of any length."""
    group, D = q.shape[1] // k.shape[1], q.shape[2]
    rows, size = tile(batch, group, D)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    where = batch.cu_seqlens, batch.seq_lens, batch.block_tables
    arrays = [array_of(x) for x in (q.contiguous(), k, v, *where)]
    with one_at_a_time:
        team = team_of()
        scratch = torch.empty(team[SIZE], size)
        attend_rows(*arrays, window, rows, team, scratch.numpy(), out.numpy())
    return out
