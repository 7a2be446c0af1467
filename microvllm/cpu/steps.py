"""The small steps of a layer in numba, as fused/backend.py has them in torch; int8 rows and their
products.

torch would go through memory once for each addition, product and norm; here it is one pass over the
rows. The very first call compiles for a while; numba keeps the result on disk for later processes.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import overload
from torch import Tensor

from .products import FAST, PANEL8, keep_compiled, multiply, one_at_a_time, threads_for

_f32 = np.float32
_EXP2 = tuple(_f32(math.log(2) ** n / math.factorial(n)) for n in range(8))  # Taylor, error 5e-9


# numbers of the cache ----------------------------------------------------------------------------

# K and V are float32, or bfloat16, which numpy does not know: uint16 with the upper half of the
# float32's bits. all arithmetic is in float32


def array_of(x: Tensor) -> np.ndarray:
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def load(x, i):
    """x[i] as a float32."""


@overload(load, jit_options=FAST, inline="always")
def _load_of(x, i):
    if x.dtype == types.uint16:
        return lambda x, i: np.uint32(x[i] << np.uint32(16)).view(np.float32)
    return lambda x, i: x[i]


def store(x, i, value):
    """x[i] = value, a float32, rounded to the nearest, of two equally near to the even one."""


@overload(store, jit_options=FAST, inline="always")
def _store_of(x, i, value):
    if x.dtype == types.uint16:

        def write(x, i, value):
            bits = _f32(value).view(np.uint32)
            x[i] = np.uint32(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16

    else:

        def write(x, i, value):
            x[i] = value

    return write


@numba.njit(**FAST)
def float_key(x):
    """An integer for a float, in the same order; a NaN comes after all numbers or before them."""
    bits = _f32(x).view(np.int32)
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


@numba.njit(**FAST)
def float_of(key):
    return np.int32(key ^ ((key >> 31) & np.int32(0x7FFFFFFF))).view(np.float32)


@numba.njit(**FAST)
def largest(x):
    """Integers, since the compiler makes no vectors of the maximum of floats: 12 times faster."""
    bits, most = x.view(np.int32), np.int32(-(2**31))
    for i in range(bits.size):
        most = max(most, bits[i] ^ ((bits[i] >> 31) & np.int32(0x7FFFFFFF)))
    return float_of(most)


@numba.njit(**FAST)
def exp2(x):
    """2**x for x <= 0, to 1e-7 of it. LLVM has no vector exp of its own, this it vectorises."""
    x = _f32(-126) if x < _f32(-126) else x  # the smallest power that has an exponent's bits
    whole = np.floor(x + _f32(0.5))
    r = x - whole
    y = ((_EXP2[7] * r + _EXP2[6]) * r + _EXP2[5]) * r + _EXP2[4]
    y = (((y * r + _EXP2[3]) * r + _EXP2[2]) * r + _EXP2[1]) * r + _EXP2[0]
    return y * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


# fused steps of a layer --------------------------------------------------------------------------

# what Backend's methods of these names do, in one pass over the rows. torch would go through
# memory once for each addition, product and norm


@numba.njit(**FAST)
def _rms_scale(x, eps):
    total = _f32(0)
    for c in range(x.size):
        total += x[c] * x[c]
    return _f32(1) / np.sqrt(total / _f32(x.size) + eps)


@numba.njit(parallel=True, **FAST)
def add_norm_rows(x, y, x0, a, b, eps, adds, mixes, threads, x_new, h):
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
        add_norm_rows(*arrays, a, b, _f32(eps), adds, mixes, threads, x_new.numpy(), h.numpy())
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
        store(y, j, z[j] * scale)


@numba.njit(parallel=True, **FAST)
def rope_store_rows(
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
                        store(to, j, vi[j] + gate * load(e, i * D + j))
                else:
                    for j in range(D):
                        store(to, j, vi[j])


def rope_store(
    qkv, h, ve, ve_gate, cos, sin, batch, k, v, n_head, qk_scale, gate_scale, eps
) -> Tensor:
    """Rotate, norm and scale q and k, mix the value embedding into v, write k and v to their
    slots; arguments and result as in fused/backend.py."""
    q, gated = torch.empty(len(qkv), n_head, k.shape[3]), ve is not None
    if not gated:  # a kernel takes arrays, never None: any of their kind will do
        ve, ve_gate = k[0, 0], h
    ids = batch.ids if gated else batch.slots
    tensors = ids, ve, ve_gate, cos, sin, batch.positions, batch.slots, k, v
    ids, ve, ve_gate, *others = [array_of(x) for x in tensors]
    with one_at_a_time:
        rope_store_rows(
            qkv.view(len(qkv), -1, k.shape[3]).numpy(), h.numpy(), ids, ve, ve_gate, gated,
            *others, _f32(qk_scale), _f32(gate_scale), _f32(eps), threads_for(1 + len(qkv) // 4),
            q.numpy(),
        )  # fmt: skip
    return q


@numba.njit(parallel=True, **FAST)
def quantize_rows_into(x, levels, threads, q, scale):
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
            bits, greatest = xt.view(np.int32), np.int32(0)
            for c in range(xt.size):  # without the sign they are in the order of the floats
                greatest = max(greatest, bits[c] & np.int32(0x7FFFFFFF))
            most = max(float_of(greatest), _f32(1e-30))
            scale[t, 0] = most / levels
            steps = levels / most
            for c in range(xt.size):
                qt[c] = np.uint8(np.int32(xt[c] * steps + _f32(128.5)))


def quantize_rows(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """x (T, C), rotated as in layouts.py, as integers from -levels to levels, stored plus 128: (T,
    C) uint8, and what one of them is worth in each row, (T, 1) float32."""
    q, scale = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x), 1)
    with one_at_a_time:
        threads = threads_for(1 + len(x) // 8)
        quantize_rows_into(x.numpy(), _f32(levels), threads, q.numpy(), scale.numpy())
    return q, scale


def product(x, weight, square, following, threads, y):
    """y = x times a weight: (panels, offset, scale), the latter two empty unless it is int8."""


@overload(product, jit_options=FAST)
def _product_of(x, weight, square, following, threads, y):
    if weight[0].dtype == types.int32:

        def compute(x, weight, square, following, threads, y):
            w, offset, w_scale = weight
            T, C = x.shape
            q, scale = np.empty((T, C), np.uint8), np.empty((T, 1), np.float32)
            quantize_rows_into(x, _f32(127), min(threads, 1 + T // 8), q, scale)
            scaling = offset, w_scale, scale.reshape(T)
            multiply(q.view(np.int32), w, scaling, square, following, threads, y)

    else:

        def compute(x, weight, square, following, threads, y):
            w, offset, w_scale = weight
            multiply(x, w, (offset, w_scale, w_scale), square, following, threads, y)

    return compute


@numba.njit(**FAST)
def _linear8(x, weight, square, threads, y):
    product(x, weight, square, weight[0], threads, y)


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


keep_compiled(add_norm_rows, rope_store_rows, quantize_rows_into, _linear8)
