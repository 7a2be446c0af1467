"""Fused operations between the matrix products (`add_norm`, `rope_store` and `relu2` of
fused.backend.Backend), a product whose rows do not depend on their batch, and products of a few
rows with the norm before them or the addition or relu^2 after them."""

import torch
import triton
import triton.language as tl

from . import launch
from .launch import VARIES, begin, release, wait


@triton.jit(do_not_specialize=VARIES)
def _add_norm(
    x, y, x0, a, b, x_new, h, eps, C: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    c = tl.arange(0, BLOCK)
    i = tl.program_id(0).to(tl.int64) * C + c
    begin(PDL)
    z = tl.load(x + i, c < C, 0.0).to(tl.float32)
    if y is not None:
        z += tl.load(y + i, c < C, 0.0).to(tl.float32)
    if a is not None:
        z = tl.load(a) * z + tl.load(b) * tl.load(x0 + i, c < C, 0.0).to(tl.float32)
    if x_new is not None:
        tl.store(x_new + i, z, c < C)
    tl.store(h + i, z * tl.rsqrt(tl.sum(z * z) / C + eps), c < C)


def add_norm(x, y, x0, a, b, eps):
    """Backend.add_norm in one pass over the residual stream. Returns x itself if it is
    unchanged."""
    (T, C), h = x.shape, torch.empty_like(x)
    x_new = None if y is None and a is None else torch.empty_like(x)
    _add_norm[(T,)](
        x, y, x0, a, b, x_new, h, eps, C, triton.next_power_of_2(C),
        num_warps=4 if C <= 1024 else 8, **launch.options(x.device),
    )  # fmt: skip
    return (x if x_new is None else x_new), h


@triton.jit
def _relu2(x, n, BLOCK: tl.constexpr, PDL: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    begin(PDL)
    z = tl.maximum(tl.load(x + i, i < n, 0.0).to(tl.float32), 0.0)
    tl.store(x + i, z * z, i < n)


def relu2(x):
    """Backend.relu2. x: contiguous, any shape."""
    n = x.numel()
    _relu2[(triton.cdiv(n, 2048),)](x, n, 2048, num_warps=4, **launch.options(x.device))
    return x


@triton.jit
def _store_int8(x, slot, lo, hi, is_here, D: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    # write heads and their scales in the layout of fused/int8_cache.py. lo, hi (HEADS, HALF): the
    # halves of the heads; x: their place in the slot's block; is_here (HEADS, 1): are they stored?
    half = tl.arange(0, lo.shape[1])[None, :]
    live = is_here & (half < D // 2)
    largest = tl.max(tl.maximum(tl.abs(lo), tl.abs(hi)), 1)[:, None]
    largest += 0.0 * tl.sum(lo + hi, 1)[:, None]  # tl.max may ignore a NaN
    bits = (tl.maximum(largest, 1e-30) / 127.0).to(tl.int32, bitcast=True)
    bits = tl.where(largest == largest, bits, 0x7FC00000)
    bits = (bits + 0xFFFF) >> 16  # the bfloat16 that is equal or next above
    scale = (bits << 16).to(tl.float32, bitcast=True)
    # adding MAGIC rounds half to even, because a float32 of this size has no fraction
    MAGIC: tl.constexpr = 12582912.0
    offset = slot % BLOCK_SIZE
    at = x + offset * D + half
    tl.store(at, ((lo / scale + MAGIC) - MAGIC).to(tl.int8), live)
    tl.store(at + D // 2, ((hi / scale + MAGIC) - MAGIC).to(tl.int8), live)
    at = (x + BLOCK_SIZE * D).to(tl.pointer_type(tl.int16)) + offset
    tl.store(at, bits.to(tl.int16), is_here)


@triton.jit(do_not_specialize=VARIES)
def _rope_store(
    qkv, h, ve, ve_gate, cos, sin, ids, positions, slots, k, v, q,
    h_stride, block_stride, qk_scale, gate_scale, eps,
    N_HEAD: tl.constexpr, N_KV: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    C: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # HEADS neighbouring heads of one row, q, k or v: the results for all three are computed, and
    # the right one is stored for each head
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    half = tl.arange(0, HALF)[None, :]
    live = (head < N_HEAD + 2 * N_KV) & (half < D // 2)
    is_q = head < N_HEAD
    is_v = head >= N_HEAD + N_KV
    kv_head = head - N_HEAD - is_v.to(tl.int32) * N_KV
    begin(PDL)
    position = tl.load(positions + row)
    slot = tl.load(slots + row)
    source = qkv + row * ((N_HEAD + 2 * N_KV) * D) + head * D + half
    lo = tl.load(source, live, 0.0).to(tl.float32)
    hi = tl.load(source + D // 2, live, 0.0).to(tl.float32)
    c = tl.load(cos + position * (D // 2) + half, half < D // 2, 0.0)
    s = tl.load(sin + position * (D // 2) + half, half < D // 2, 0.0)
    lo_r = lo * c + hi * s
    hi_r = hi * c - lo * s
    scale = qk_scale * tl.rsqrt(tl.sum(lo_r * lo_r + hi_r * hi_r, 1) / D + eps)[:, None]
    if ve is not None:
        channel = tl.arange(0, triton.next_power_of_2(C))[None, :]
        w = tl.load(ve_gate + kv_head * C + channel, is_v & (kv_head < N_KV) & (channel < C), 0.0)
        x = tl.load(h + row * h_stride + channel, channel < C, 0.0)
        gate = gate_scale * tl.sigmoid(tl.sum(w.to(tl.float32) * x.to(tl.float32), 1))[:, None]
        e = ve + (tl.load(ids + row).to(tl.int64) * N_KV + kv_head) * D + half
        lo += gate * tl.load(e, live & is_v, 0.0).to(tl.float32)
        hi += gate * tl.load(e + D // 2, live & is_v, 0.0).to(tl.float32)
    lo = tl.where(is_v, lo, lo_r * scale)
    hi = tl.where(is_v, hi, hi_r * scale)
    to_q = q + (row * N_HEAD + head) * D + half
    tl.store(to_q, lo, live & is_q)
    tl.store(to_q + D // 2, hi, live & is_q)
    is_k = live & ~(is_q | is_v)
    to_kv = (slot // BLOCK_SIZE).to(tl.int64) * block_stride
    if k.dtype.element_ty == tl.int8:
        to_kv += kv_head * (BLOCK_SIZE * (D + 2))
        in_kv = kv_head < N_KV
        _store_int8(k + to_kv, slot, lo, hi, in_kv & ~(is_q | is_v), D, BLOCK_SIZE)
        _store_int8(v + to_kv, slot, lo, hi, in_kv & is_v, D, BLOCK_SIZE)
    else:
        to_kv += (kv_head * BLOCK_SIZE + slot % BLOCK_SIZE) * D + half
        tl.store(k + to_kv, lo, is_k)
        tl.store(k + to_kv + D // 2, hi, is_k)
        tl.store(v + to_kv, lo, live & is_v)
        tl.store(v + to_kv + D // 2, hi, live & is_v)


def rope_store(qkv, h, ve, ve_gate, cos, sin, batch, k, v, n_head, qk_scale, gate_scale, eps):
    """Backend.rope_store: from the QKV product to attention's input in one kernel."""
    n_kv, block_size = k.shape[1:3]
    T = qkv.shape[0]
    D = qkv.shape[1] // (n_head + 2 * n_kv)  # in int8 k has two bytes more for a scale
    q = torch.empty((T, n_head, D), dtype=qkv.dtype, device=qkv.device)
    heads, c = 4, 1 if ve is None else ve_gate.shape[1]
    _rope_store[(T, triton.cdiv(n_head + 2 * n_kv, heads))](
        qkv, h, ve, ve_gate, cos, sin, batch.token_ids, batch.positions, batch.slots, k, v, q,
        h.stride(0), k.stride(0), qk_scale, gate_scale, eps,
        n_head, n_kv, D, block_size, c, heads, triton.next_power_of_2(D // 2),
        num_warps=1, **launch.options(qkv.device),
    )  # fmt: skip
    return q


@triton.jit
def _fp8_rows(x, y, scales, C: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    c = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    begin(PDL)
    z = tl.load(x + row * C + c, c < C, 0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(z), 0), 1e-30) / 448
    tl.store(scales + row, scale)
    tl.store(y + row * C + c, (z / scale).to(y.dtype.element_ty), c < C)


def fp8_rows(x):
    """backend.fp8_rows in one pass."""
    T, C = x.shape
    assert x.is_contiguous(), x.stride()
    y = torch.empty((T, C), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((T, 1), dtype=torch.float32, device=x.device)
    _fp8_rows[(T,)](
        x, y, scales, C, triton.next_power_of_2(C),
        num_warps=4 if C <= 1024 else 8, **launch.options(x.device),
    )  # fmt: skip
    return y, scales


NARROW = 4096  # the most outputs for which `linear` has narrow tiles


@triton.jit(do_not_specialize=VARIES)
def _linear(
    x, w, y, rows, X_STRIDE: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    begin(PDL)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + m[:, None] * X_STRIDE + k, (m < rows)[:, None] & (k < K), 0.0)
        b = tl.load(w + n[:, None] * K + k, (n < N)[:, None] & (k < K), 0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    tl.store(y + m[:, None] * N + n, acc, (m < rows)[:, None] & (n < N))


def linear(x, w):
    """x (T, K) @ w.T (K, N) in tiles of one size and sums of one order. So the bits of a row depend
    on the row alone. cuBLAS uses different kernels for different T."""
    (T, K), N = x.shape, len(w)
    assert x.stride(1) == 1 and w.is_contiguous(), (x.stride(), w.stride())
    y = torch.empty((T, N), dtype=x.dtype, device=x.device)
    # the width depends on N alone. with 32, a row of 2,176 outputs has 68 programs instead of 34,
    # which use more of the card
    width = 32 if N <= NARROW else 64
    _linear[(triton.cdiv(N, width), triton.cdiv(T, 64))](
        x, w, y, T, x.stride(0), N, K, 64, width, 64 if x.element_size() == 2 else 32,
        num_warps=4, num_stages=4, **launch.options(x.device),
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=VARIES)
def _few_rows(
    x, w, scales, y, h, stream, x0, a, b, eps, rows, N, K: tl.constexpr, RELU2: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr, ONE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_K)[None, :]
    # the time of this product is that of reading the weights. a program loads all of its weights at
    # once into registers. the previous kernel does not write weights, so they are loaded before it
    # has ended, also while rope and attention leave the memory idle
    release(PDL)
    at = w + n.to(tl.int64)[:, None] * K + c
    tiles = ()
    for t in tl.static_range(TILES):
        live = (n < N)[:, None] & (t * BLOCK_K + c < K)
        tiles = tiles + (tl.load(at + t * BLOCK_K, live, 0.0, eviction_policy="evict_first"),)
    if PDL:
        wait(PDL)
    else:  # otherwise the compiler would move loads down, between the products
        tl.debug_barrier()
    for row in range(1 if ONE else rows):
        xs = ()
        for t in tl.static_range(TILES):
            i = row * K + t * BLOCK_K + c
            inside = t * BLOCK_K + c < K
            z = tl.load(x + i, inside, 0.0)
            if h is not None and a is not None:
                z0 = tl.load(x0 + i, inside, 0.0)
                z = (tl.load(a) * z + tl.load(b) * z0).to(x.dtype.element_ty)
            xs = xs + (z,)
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        squares = tl.zeros((1, BLOCK_K), tl.float32)
        for t in tl.static_range(TILES):
            z = xs[t].to(tl.float32)
            squares += z * z
            acc += tiles[t].to(tl.float32) * z
        out = tl.sum(acc, 1)
        if scales is not None:
            out *= tl.load(scales + n, n < N, 0.0)
        if h is not None:
            # the norm has no weights: one factor, applied to the sums
            factor = tl.rsqrt(tl.sum(squares) / K + eps)
            out *= factor
            H: tl.constexpr = 32 if K > 32 else K
            if tl.program_id(0) == 0:
                tl.store(h + row * H + c, xs[0].to(tl.float32) * factor, c < H)
        else:
            old = tl.load(stream + row * N + n, n < N, 0.0).to(tl.float32)
            if a is not None:
                old0 = tl.load(x0 + row * N + n, n < N, 0.0).to(tl.float32)
                old = tl.load(a) * old + tl.load(b) * old0
            out += old
        if RELU2:
            out = tl.maximum(out, 0.0)
            out *= out
        tl.store(y + row * N + n, out, n < N)


def _launch_few_rows(x, w, scales, h, stream, x0, a, b, eps, relu2, outputs, warps, y=None):
    (rows, k), n = x.shape, w.shape[0]
    y = torch.empty((rows, n), dtype=x.dtype, device=x.device) if y is None else y
    # up to 80 registers of a thread hold weights, 16 bytes per load. then the programs of a
    # multiprocessor have about 70 KB in flight, or 140 KB for one row, whose kernel has no loop and
    # half the registers. less does not saturate the memory, and more registers spill.
    # weights in float8 take half the warps for one row. for two rows a loop keeps them as float32
    threads_share = 512 if w.element_size() == 1 and rows == 1 else 256
    warps = warps or triton.next_power_of_2(triton.cdiv(k * outputs, 20 * threads_share))
    warps = min(warps, triton.next_power_of_2(triton.cdiv(k, 256)), 32)
    block_k = 256 * warps
    _few_rows[(triton.cdiv(n, outputs),)](
        x, w, scales, y, h, stream, x0, a, b, eps, rows, n, k, relu2,
        outputs, block_k, triton.cdiv(k, block_k), rows == 1,
        num_warps=warps, **launch.options(x.device),
    )  # fmt: skip
    return y


def norm_linear(
    x, w, eps, x0=None, a=None, b=None, relu2=False, outputs=4, warps=None, out=None, scales=None
):
    """rms(x) @ w.T in one launch, for a few rows: returns (y (T, N), h (T, 32)).

    x (T, K), w (N, K). With a, b (0-dim float32) and x0 (T, K), a * x + b * x0 replaces x first.
    relu2: y = relu(.)^2. h: the first 32 channels of the normed x, which `rope_store` reads.
    outputs: of a program, a power of two; warps: of a program; None: chosen from the shapes; out:
    the tensor for y; scales (N, 1): float32, of w in float8.
    """
    h = torch.empty((x.shape[0], min(32, x.shape[1])), dtype=x.dtype, device=x.device)
    y = _launch_few_rows(x, w, scales, h, None, x0, a, b, eps, relu2, outputs, warps, out)
    return y, h


def linear_add(x, w, stream, x0=None, a=None, b=None, outputs=4, warps=None, scales=None):
    """stream + x @ w.T in one launch, for a few rows. x (T, K), w (N, K), stream and result (T, N).

    With a, b and x0 (T, N), a * stream + b * x0 replaces the stream first. `norm_linear` does the
    same and does not write the result. outputs, warps, scales: see `norm_linear`.
    """
    return _launch_few_rows(x, w, scales, None, stream, x0, a, b, 0.0, False, outputs, warps)
