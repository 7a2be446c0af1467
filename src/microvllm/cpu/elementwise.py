"""The steps between the matrix products, and the draw, in numba. In torch: see fused/backend.py.

torch reads and writes memory for each addition and norm, and for each operation of a draw: cap,
softmax, sort, running sum and search. Here rows stay in the cache. Nothing is sorted: bisection
finds the smallest logit to keep, because one pass over the logits takes little time.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import overload
from torch import Tensor

from ..fused.backend import NO_FILTERS, filter_values
from .simd import (
    EXACT,
    VIEWS,
    above,
    dot,
    kept,
    row_parts,
    share,
    total,
    vectorised,
)
from .team import SIZE, end_list, job, one_at_a_time, team_of

_f32 = np.float32
_EXP2 = tuple(_f32(math.log(2) ** n / math.factorial(n)) for n in range(8))  # Taylor, error 5e-9
_LOG2E = _f32(1 / math.log(2))
_SMALLEST = _f32(1e-30).view(np.int32)  # rows with a smaller maximum are written as zeros
_BLOCK = 256  # weights in a block: a draw finds the block by its sum, then the token in it


def array_of(x: Tensor) -> np.ndarray:
    """Return x as an array. numpy lacks bfloat16, which becomes uint16. Arithmetic is in
    float32."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


@vectorised(types.float32)
def load(b, x, i):
    """Return x[i] as float32."""
    return b.read(b.at(x.data, i), 1)


@vectorised()
def store(b, x, i, value):
    """Store a float32 in x[i], rounded to nearest, ties to even."""
    place = b.at(x.data, i)
    if place.type.pointee == b.i16:
        bits = b.bitcast(value, b.i32)
        odd = b.and_(b.lshr(bits, b.i32(16)), b.i32(1))
        bits = b.add(b.add(bits, b.i32(0x7FFF)), odd)
        value = b.trunc(b.lshr(bits, b.i32(16)), b.i16)
    b.store(value, place)


@numba.njit(**VIEWS)
def flipped(bits):
    """Map the bits of a float to an integer with the same order, or back. NaNs are at both ends."""
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


@numba.njit(**VIEWS)
def largest(x):
    """Return the largest of x (n,). It compares integers, because the compiler does not vectorize a
    maximum of floats."""
    bits, most = x.view(np.int32), np.int32(-(2**31))
    for i in range(bits.size):
        most = max(most, flipped(bits[i]))
    return np.int32(flipped(most)).view(np.float32)


def exp2_of(b, x, lanes: int):
    """Return 2**x for x <= 0, with a relative error of 1e-7. LLVM has no vectorized exp."""

    def number(value):
        return b.splat(b.f32(value), lanes)

    least = number(-126)  # the exponent of the smallest normal number
    x = b.select(b.fcmp_ordered("<", x, least), least, x)
    integer = b.floor(b.fadd(x, number(0.5)))
    r, y = b.fsub(x, integer), number(_EXP2[7])
    for factor in _EXP2[6::-1]:
        y = b.multiply_add(y, r, number(factor))
    exponent = b.add(b.fptosi(integer, b.ir_type(b.i32, lanes)), b.splat(b.i32(127), lanes))
    return b.fmul(y, b.bitcast(b.shl(exponent, b.splat(b.i32(23), lanes)), y.type))


exp2 = vectorised(types.float32)(lambda b, x: exp2_of(b, x, 1))


@numba.njit(**VIEWS)
def _rms_scale(x, eps):
    return _f32(1) / np.sqrt(dot(x, x, x.size) / _f32(x.size) + eps)


@job
@numba.njit(**VIEWS)
def _add_norm_part(worker, part, parts, x, y, x0, a, b, eps, adds, mixes, x_new, h):
    first, end = share(len(x), part, parts)
    for t in range(first, end):
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


@kept(**EXACT)
def add_norm_rows(x, y, x0, a, b, eps, adds, mixes, team, x_new, h):
    runs, parts = row_parts(len(x), team[SIZE])
    arguments = x, y, x0, a, b, eps, adds, mixes, x_new, h
    _add_norm_part(team, runs, parts, arguments)


def add_norm(x: Tensor, y, x0, a, b, eps: float) -> tuple[Tensor, Tensor]:
    """Compute Backend.add_norm."""
    h, adds, mixes = torch.empty_like(x), y is not None, a is not None
    x_new = torch.empty_like(x) if adds or mixes else x
    arrays = [z.numpy() for z in (x, y if adds else x, x0 if mixes else x)]
    a, b = (_f32(a), _f32(b)) if mixes else (_f32(1), _f32(0))
    with one_at_a_time:
        add_norm_rows(*arrays, a, b, _f32(eps), adds, mixes, team_of(), x_new.numpy(), h.numpy())
    return x_new, h


@numba.njit(**VIEWS)
def _quantize(x, scale, head, slot):
    """Quantize x (D,) times scale into a slot of head (block_size, D + 2). The layout and the
    rounding are those of fused/int8_cache.py, to the bit."""
    bits, most = x.view(np.int32), np.int32(_SMALLEST)
    for j in range(bits.size):
        most = max(most, bits[j] & np.int32(0x7FFFFFFF))
    exact = np.int32(most).view(np.float32) * scale / _f32(127)
    up = min(np.float32(exact).view(np.int32), np.int32(0x7FC00000)) + 0xFFFF >> 16
    flat, D = head.reshape(-1), x.size
    flat[len(head) * D :].view(np.uint16)[slot] = up
    step = np.int32(up << 16).view(np.float32)
    row = flat[slot * D : slot * D + D]
    for j in range(D):
        # the low bits of the sum are the nearest integer; ties are rounded to even
        row[j] = np.float32(x[j] * scale / step + _f32(1.5 * 2**23)).view(np.int32)


def write_row(x, scale, rows, i):
    """Store x (D,) times scale in rows[i], in the dtype of rows."""


@overload(write_row, jit_options=VIEWS)
def _write_row_of(x, scale, rows, i):
    def floats(x, scale, rows, i):
        row = rows[i]
        for j in range(x.size):
            store(row, j, x[j] * scale)

    def integers(x, scale, rows, i):
        _quantize(x, scale, rows, i)

    return integers if rows.dtype == types.int8 else floats


@numba.njit(**VIEWS)
def _embed_some(
    ids, prev_ids, positions, wte, smear_gate, smear_lambda, eps, first, end, previous, x
):  # fmt: skip
    """Compute the rows from `first` to `end`. previous (C,): scratch for the previous token's
    embedding."""
    for t in range(first, end):
        _embed(wte[ids[t]], eps, x[t])
        if smear_gate.size and positions[t] > 0:  # position 0 has no previous token
            _embed(wte[prev_ids[t]], eps, previous)
            gate = smear_lambda[0] / (_f32(1) + np.exp(-dot(x[t], smear_gate, smear_gate.size)))
            for c in range(previous.size):
                x[t, c] += gate * previous[c]


@job
@numba.njit(**EXACT)
def _embed_part(
    worker, part, parts, ids, prev_ids, positions, wte, smear_gate, smear_lambda, eps, x
):  # fmt: skip
    first, end = share(len(x), part, parts)
    previous = np.empty(x.shape[1], np.float32)
    _embed_some(
        ids, prev_ids, positions, wte, smear_gate, smear_lambda, eps, first, end, previous, x
    )  # fmt: skip


@numba.njit(**EXACT)
def embed_rows(ids, prev_ids, positions, wte, smear_gate, smear_lambda, eps, team, x):
    """Compute FusedGPT.embed. smear_gate is empty for a model without smear."""
    runs, parts = row_parts(len(x), team[SIZE])
    arguments = ids, prev_ids, positions, wte, smear_gate, smear_lambda, eps, x
    _embed_part(team, runs, parts, arguments)


@numba.njit(**VIEWS)
def _embed(row, eps, x):
    """Store the normed row of a table in x (C,)."""
    for c in range(x.size):
        x[c] = load(row, c)
    scale = _rms_scale(x, eps)
    for c in range(x.size):
        x[c] *= scale


@numba.njit(**VIEWS)
def _rotate(x, cos, sin, qk_scale, eps, z, rows, i):
    """Rotate and norm x (D,), multiply it by qk_scale, and store it in rows[i] (D,). z (D,):
    scratch."""
    half = cos.size
    for j in range(half):
        z[j] = x[j] * cos[j] + x[half + j] * sin[j]
        z[half + j] = x[half + j] * cos[j] - x[j] * sin[j]
    write_row(z, _rms_scale(z, eps) * qk_scale, rows, i)


@numba.njit(**VIEWS)
def _rope_store_some(
    qkv, h, ids, ve, ve_gate, gated, cos, sin, positions, slots, k, v,
    qk_scale, gate_scale, eps, first, end, z, q,
):  # fmt: skip
    """Compute the rows from `first` to `end`. z (D,): scratch."""
    (_, n_head, D), (n_kv_head, block_size) = q.shape, k.shape[1:3]
    for t in range(first, end):
        c, s = cos[positions[t]], sin[positions[t]]
        block, slot = slots[t] // block_size, slots[t] % block_size
        e = ve[ids[t] if gated else 0]
        for i in range(n_head):
            _rotate(qkv[t, i], c, s, qk_scale, eps, z, q[t], i)
        for i in range(n_kv_head):
            _rotate(qkv[t, n_head + i], c, s, qk_scale, eps, z, k[block, i], slot)
            vi = qkv[t, n_head + n_kv_head + i]
            if gated:
                gate = gate_scale / (_f32(1) + np.exp(-dot(h[t], ve_gate[i], ve_gate.shape[1])))
                for j in range(D):
                    z[j] = vi[j] + gate * load(e, i * D + j)
                vi = z
            write_row(vi, _f32(1), v[block, i], slot)


@job
@numba.njit(**EXACT)
def _rope_store_part(
    worker, part, parts, qkv, h, ids, ve, ve_gate, gated, cos, sin, positions, slots, k, v,
    qk_scale, gate_scale, eps, q,
):  # fmt: skip
    first, end = share(len(q), part, parts)
    z = np.empty(q.shape[2], np.float32)
    _rope_store_some(
        qkv, h, ids, ve, ve_gate, gated, cos, sin, positions, slots, k, v,
        qk_scale, gate_scale, eps, first, end, z, q,
    )  # fmt: skip


@kept(**EXACT)
def rope_store_rows(
    qkv, h, ids, ve, ve_gate, gated, cos, sin, positions, slots, k, v,
    qk_scale, gate_scale, eps, team, q,
):  # fmt: skip
    runs, parts = row_parts(len(q), team[SIZE])
    arguments = (
        qkv, h, ids, ve, ve_gate, gated, cos, sin, positions, slots, k, v,
        qk_scale, gate_scale, eps, q,
    )  # fmt: skip
    _rope_store_part(team, runs, parts, arguments)


def rope_store(
    qkv, h, ve, ve_gate, cos, sin, batch, k, v, n_head, qk_scale, gate_scale, eps
) -> Tensor:
    """Compute Backend.rope_store."""
    D, gated = 2 * cos.shape[1], ve is not None
    q = torch.empty(len(qkv), n_head, D)
    if not gated:  # kernels do not accept None: pass any arrays of the right types
        ve, ve_gate = cos if k.dtype == torch.int8 else k[0, 0], h
    ids = batch.token_ids if gated else batch.slots
    tensors = ids, ve, ve_gate, cos, sin, batch.positions, batch.slots, k, v
    ids, ve, ve_gate, *others = [array_of(x) for x in tensors]
    with one_at_a_time:
        rope_store_rows(
            qkv.view(len(qkv), -1, D).numpy(), h.numpy(), ids, ve, ve_gate, gated,
            *others, _f32(qk_scale), _f32(gate_scale), _f32(eps), team_of(), q.numpy(),
        )  # fmt: skip
    return q


@job
@numba.njit(**VIEWS)
def _back_out_part(worker, part, parts, x, factor, middle):
    first, end = share(len(x), part, parts)
    for t in range(first, end):
        for c in range(x.shape[1]):
            x[t, c] -= factor * middle[t, c]


@numba.njit(**EXACT)
def back_out(x, factor, middle, team):
    """Compute x (T, C) -= factor * middle."""
    runs, parts = row_parts(len(x), team[SIZE])
    _back_out_part(team, runs, parts, (x, factor, middle))


@job
@numba.njit(**VIEWS)
def _add_part(worker, part, parts, x, y, z):
    first, end = share(len(x), part, parts)
    for t in range(first, end):
        for c in range(x.shape[1]):
            z[t, c] = x[t, c] + y[t, c]


@numba.njit(**EXACT)
def add_rows(x, y, team, z):
    """Compute z (T, C) = x + y."""
    runs, parts = row_parts(len(x), team[SIZE])
    _add_part(team, runs, parts, (x, y, z))


@job
@numba.njit(**VIEWS)
def _take_part(worker, part, parts, x, rows, y):
    first, end = share(len(rows), part, parts)
    for t in range(first, end):
        for c in range(x.shape[1]):
            y[t, c] = x[rows[t], c]


@numba.njit(**EXACT)
def take_rows(x, rows, team, y):
    """Compute y (R, C) = x[rows]."""
    runs, parts = row_parts(len(rows), team[SIZE])
    _take_part(team, runs, parts, (x, rows, y))


@numba.njit(**VIEWS)
def _least(values, counting, limit, low, high):
    """Return the smallest value to keep, which lies between low and high. A value is kept if the
    sum of all larger values, or their number if `counting`, is below `limit`."""
    first = np.int64(flipped(_f32(low).view(np.int32)))
    last = np.int64(flipped(_f32(high).view(np.int32)))
    while first < last:
        middle = (first + last) >> 1
        bound = np.int32(flipped(middle)).view(np.float32)
        if above(values, values.size, bound, counting) < limit:
            last = middle
        else:
            first = middle + 1
    return np.int32(flipped(first)).view(np.float32)


@numba.njit(**VIEWS)
def _weigh(x, scale, softcap, top_k, top_p, min_p, w):
    """Compute w (V,) = 2**(scale * (x - max(x))) of the capped x, and 0 for filtered tokens."""
    top = largest(x)
    kth = _f32(-np.inf)
    if 0 < top_k < x.size:
        kth = _least(x, True, top_k, kth, top)
    if softcap > 0:
        # tanh(z) = (1 - t) / (1 + t), where t = e**-2z. This is a separate loop, because a common
        # loop would need too many registers
        slope = _f32(-2) * _LOG2E / softcap
        for i in range(x.size):
            t = exp2(abs(x[i]) * slope)
            capped = softcap * ((_f32(1) - t) / (_f32(1) + t))
            w[i] = capped if x[i] > 0 else -capped
    else:
        for i in range(x.size):  # w[:] = x would compile an error message and double compile time
            w[i] = x[i]
    top = largest(w)
    for i in range(x.size):
        exponent = (w[i] - top) * scale
        # 0 below the smallest normal float32
        w[i] = exp2(exponent) if exponent >= -126 and x[i] >= kth else _f32(0)
    if top_p < 1:
        weight_sum = total(w, w.size)
        # all tokens with at most this weight are at most 1 - p of the sum: top_p drops them
        low = (1 - top_p) * weight_sum / x.size
        min_p = max(min_p, _least(w, False, top_p * weight_sum, low, _f32(1)))
    if min_p > 0:
        for i in range(x.size):
            w[i] = w[i] if w[i] >= min_p else _f32(0)


@numba.njit(**VIEWS)
def _draw(w, sums, u):
    """Return the first index at which the running sum of w exceeds u times the total."""
    weight_sum = 0.0
    for b in range(sums.size):
        sums[b] = total(w[b * _BLOCK : (b + 1) * _BLOCK], _BLOCK)
        weight_sum += sums[b]
    # u is below 1, so some block exceeds the target, and this block has a weight above 0
    target, running, b = u * weight_sum, 0.0, 0
    while b < sums.size - 1 and running + sums[b] <= target:
        running += sums[b]
        b += 1
    token = -1  # if no weight is above 0, for example if all are NaN
    for i in range(b * _BLOCK, (b + 1) * _BLOCK):
        if w[i] > 0:
            running += w[i]
            token = i
            if running > target:
                break
    return token


@numba.njit(**VIEWS)
def _argmax(x):
    top = largest(x)
    if top > -np.inf:  # also excludes NaN
        for i in range(x.size):
            if x[i] == top:
                return i
    return -1


@job
@numba.njit(**VIEWS)
def _sample_part(
    worker, part, parts, logits, V, stride, u, scale, softcap, filters, w, sums, step, tokens
):  # fmt: skip
    """Draw a token for a part of the rows. Row r begins at logits[r * stride]. Scratch: w (threads,
    at least V), sums (threads, blocks of a row)."""
    weights, block_sums = w[worker], sums[worker]
    row_tokens, uniform = tokens[step[0]], u[step[0]]
    first, end = share(row_tokens.size, part, parts)
    for r in range(first, end):
        x, (top_k, top_p, min_p) = logits[r * stride : r * stride + V], filters[r]
        if scale[r] == 0:
            row_tokens[r] = _argmax(x)
        else:
            _weigh(x, scale[r], softcap, top_k, top_p, _f32(min_p), weights[:V])
            row_tokens[r] = _draw(weights, block_sums, uniform[r])


@kept(**EXACT)
def sample_rows(logits, V, stride, u, scale, softcap, filters, w, sums, step, team, tokens):
    """Draw a token for each row, into tokens[step[0]]. Row r begins at logits[r * stride]. w, sums:
    from draw_space."""
    rows = tokens.shape[1]
    runs = min(team[SIZE], rows)
    parts = runs * max(1, min(8, rows // runs)) if runs > 1 else 1
    arguments = logits, V, stride, u, scale, softcap, filters, w, sums, step, tokens
    _sample_part(team, runs, parts, arguments)


def draw_space(V: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the threads' scratch for a draw among V tokens: weights, and their sums by blocks."""
    blocks = -(-V // _BLOCK)  # the last block may extend beyond the row, where w is zero
    w = np.zeros((threads, blocks * _BLOCK), np.float32)
    return w, np.empty((threads, blocks), np.float32)


@job
@numba.njit(**VIEWS)
def _advance_part(
    worker, part, parts, team, ids, prev_ids, positions, seq_lens, slots, tables, size, stops,
    step, tokens,
):  # fmt: skip
    row_tokens, ends = tokens[step[0]], False
    step[0] += 1
    for t in range(len(row_tokens)):
        token, position = row_tokens[t], positions[t] + 1
        ends |= token < 0
        for stop in stops[t]:
            ends |= token == stop
        prev_ids[t], ids[t] = ids[t], max(token, 0)
        positions[t] = position
        seq_lens[t] += 1
        if step[0] < len(tokens):
            for g in range(len(slots)):
                slots[g, t] = tables[g, t, position // size] * size + position % size
    if ends:
        end_list(team)


@numba.njit(**EXACT)
def advance_rows(
    ids, prev_ids, positions, seq_lens, slots, tables, size, stops, step, team, tokens
):  # fmt: skip
    """Advance a batch of one row per sequence to the next step, with the tokens in tokens[step[0]].
    A stop token ends the list of jobs."""
    arguments = (
        team, ids, prev_ids, positions, seq_lens, slots, tables, size, stops, step, tokens
    )  # fmt: skip
    _advance_part(team, 1, 1, arguments)


def draw_values(params, T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors of the logits for powers of 2, (R,) float32, 0 for greedy rows, and the
    filters (R, 3). T (R,): temperatures."""
    filters = filter_values(params)
    filters = np.tile(np.array(NO_FILTERS), (len(T), 1)) if filters is None else filters
    return np.divide(_LOG2E, T, out=np.zeros_like(T), where=T > 0), filters


def sample(logits: Tensor, params, temperature: Tensor, uniform: Tensor, softcap: float) -> Tensor:
    """Draw a token for each row of logits (R, V). Return (R,). The arguments are those of
    ../sampler.py."""
    (R, V), logits = logits.shape, logits.float()
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    stride = logits.stride(0)  # rows may be further apart than V, or all be the same row
    flat = logits.as_strided(((R - 1) * stride + V,), (1,))
    tokens, values = torch.empty(1, R, dtype=torch.int64), draw_values(params, temperature.numpy())
    with one_at_a_time:
        team = team_of()
        sample_rows(
            flat.numpy(), V, stride, uniform.numpy()[None], values[0], _f32(softcap), values[1],
            *draw_space(V, int(team[SIZE])), np.zeros(1, np.int64), team,
            tokens.numpy(),
        )  # fmt: skip
    return tokens[0]
