"""The draw in numba, without a sort.

torch would go through memory for each of the steps (cap, softmax, sort, running sum, search), its
threads meeting after each: that is more than half of a decode step. And nothing is sorted here: a
pass over a row in the cache takes so little that the smallest logit to stay is found by bisection.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from ..fused.backend import NO_FILTERS
from .products import FAST, keep_compiled, one_at_a_time, threads_for
from .steps import exp2, float_key, float_of, largest

_f32 = np.float32
_LOG2E = _f32(1 / math.log(2))
_BLOCK = 256  # weights that are summed before one of them is looked for


@numba.njit(**FAST)
def _least(values, counting, limit, low, high):
    """The least of the values that stay: those for which all larger ones together hold less than
    `limit`, each holding what it is or, if counting, 1. It lies between low and high."""
    first, last = np.int64(float_key(low)), np.int64(float_key(high))
    while first < last:
        middle = (first + last) >> 1
        bound, held = float_of(np.int32(middle)), _f32(0)
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
    return float_of(np.int32(first))


@numba.njit(**FAST)
def _weigh(x, scale, softcap, top_k, top_p, min_p, w):
    """w (V,) = 2**(scale * (x - the largest)), x being capped, and 0 for what the filters drop."""
    top = largest(x)
    kth = _f32(-np.inf)
    if 0 < top_k < x.size:
        kth = _least(x, True, top_k, kth, top)
    if softcap > 0:
        # tanh(z) = (1 - t) / (1 + t), where t = e**-2z. a loop of its own, else registers run out
        slope = _f32(-2) * _LOG2E / softcap
        for i in range(x.size):
            t = exp2(abs(x[i]) * slope)
            capped = softcap * ((_f32(1) - t) / (_f32(1) + t))
            w[i] = capped if x[i] > 0 else -capped
    else:
        w[:] = x
    top = largest(w)
    for i in range(x.size):
        exponent = (w[i] - top) * scale
        # 0 where float32 has no smaller number
        w[i] = exp2(exponent) if exponent >= -126 and x[i] >= kth else _f32(0)
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
    top = largest(x)
    for i in range(x.size):
        if x[i] == top:
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
    logits: Tensor, temperature: Tensor, uniform: Tensor, softcap: float, filters=None
) -> Tensor:
    """A token for each row of logits (R, V), float32: what ../sampler.py says, with its arguments.

    filters: (R, 3), top_k, top_p and min_p of each row, see `filter_values`; None: all are off.
    Returns (R,) int64.
    """
    R, V = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    stride = logits.stride(0)  # rows may be longer than V, or all the same
    flat = logits.as_strided(((R - 1) * stride + V,), (1,))
    T, tokens = temperature.numpy(), torch.empty(R, dtype=torch.int64)
    scale = np.divide(_LOG2E, T, out=np.zeros_like(T), where=T > 0)
    filters = np.tile(np.array(NO_FILTERS), (R, 1)) if filters is None else np.asarray(filters)
    with one_at_a_time:
        threads = threads_for(R)
        _sample(
            flat.numpy(), V, stride, uniform.numpy(), scale, _f32(softcap),
            filters, threads, tokens.numpy(),
        )  # fmt: skip
    return tokens


keep_compiled(_sample)
