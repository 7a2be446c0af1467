"""Triton kernels: the fused steps of model.py, paged attention, and the sampler.

`add_norm`, `rope_store` and `relu2` have the names and the meaning of the plain torch functions in
model.py; `paged_attention` has the signature every attention backend has. All of them

- never look at the device from the host: grids follow from shapes and host integers alone, lengths
  are read by the kernels. So they can be captured in a CUDA graph once and replayed for ever;
- do their arithmetic in float32 and keep bfloat16, float16 or float32 in memory;
- call `_begin` (or `_release`, and later `_wait`) before they touch anything another kernel may
  have written, so that `early_start` is right: "the kernel before me has ended" then implies that
  all before it have. `_few_rows` reads weights before it waits: no kernel here writes those.

Under `TRITON_INTERPRET=1` everything here runs on the CPU, slowly: that is how the tests run.
"""

import functools
import math
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import triton
import triton.language as tl

WARPS_PER_PROCESSOR = 32  # what paged decoding aims at when it splits contexts
SAMPLE_CHUNK = 2048  # vocabulary entries per program of the sampler: fixed, so sums do not vary
SAMPLE_TILE = 4096  # entries that `_truncate` reads at a time: the more, the fewer waits for memory

TRITON_34 = hasattr(tl.extra.cuda, "gdc_wait")  # or newer

# arguments that change from step to step or from layer to layer. they are views into something
# larger, so their addresses divide by 16 or do not: no second variant of a kernel for that
VARIES = (
    "ids positions slots tables seq_lens cu_seqlens temperatures us sums lows top_ks top_ps min_ps "
    "a b table_stride h_stride window first_sequence num_sequences splits rows"
).split()


_early = ContextVar("_early", default=False)


@contextmanager
def early_start(on: bool = True):
    """Launches in here use programmatic dependent launch, where `can_start_early`: a kernel starts
    before the one in front of it has ended, and waits for that in `_begin`. graphs.py tries it for
    a few rows; for all others it is off, since nobody has measured it."""
    before = _early.set(on)
    try:
        yield
    finally:
        _early.reset(before)


def can_start_early(device) -> bool:
    """Has a torch device what `early_start` takes?"""
    if device.type != "cuda" or torch.version.hip is not None or not TRITON_34:
        return False
    # on consumer Blackwell (12) others saw it break a graph's capture
    return torch.cuda.get_device_properties(device).major in (9, 10)


@functools.lru_cache
def _options(device, early):
    if device.type != "cuda":  # the interpreter
        return 8, 2**16, {"PDL": False}
    card, hip = torch.cuda.get_device_properties(device), torch.version.hip is not None
    memory = getattr(card, "shared_memory_per_block_optin", 2**16 if hip else 99 * 1024)
    # a * b + c rounded once: triton 3.9 warns that one day it will not unless it is told to
    options = {"enable_fp_fusion": True, "PDL": False}
    if early and can_start_early(device):
        options.update(PDL=True, launch_pdl=True)
    return card.multi_processor_count, memory, options


def _device(device):
    """(multiprocessors, bytes of shared memory per program, launch options) of a torch device."""
    return _options(device, _early.get())


if TRITON_34:

    @triton.jit
    def _release(PDL: tl.constexpr):
        # let the next kernel start as soon as there is room for it
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()

    @triton.jit
    def _wait(PDL: tl.constexpr):
        # until the kernel before has ended and its writes can be seen
        if PDL:
            tl.extra.cuda.gdc_wait()

else:  # which looks names up in branches that are not taken as well

    @triton.jit
    def _release(PDL: tl.constexpr):
        pass

    @triton.jit
    def _wait(PDL: tl.constexpr):
        pass


@triton.jit
def _begin(PDL: tl.constexpr):
    _release(PDL)  # the next one will wait here as well
    _wait(PDL)


# -------------------------------------------------------------------------------------------------
# fused steps of a layer


@triton.jit(do_not_specialize=VARIES)
def _add_norm(
    x, y, x0, a, b, x_new, h, eps, C: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    c = tl.arange(0, BLOCK)
    i = tl.program_id(0).to(tl.int64) * C + c
    _begin(PDL)
    z = tl.load(x + i, c < C, 0.0).to(tl.float32)
    if y is not None:
        z += tl.load(y + i, c < C, 0.0).to(tl.float32)
    if a is not None:
        z = tl.load(a) * z + tl.load(b) * tl.load(x0 + i, c < C, 0.0).to(tl.float32)
    if x_new is not None:
        tl.store(x_new + i, z, c < C)
    tl.store(h + i, z * tl.rsqrt(tl.sum(z * z) / C + eps), c < C)


def add_norm(x, y, x0, a, b, eps):
    """model.py's, in one pass over the residual stream; x itself where nothing is added or
    scaled."""
    h = torch.empty_like(x)
    x_new = None if y is None and a is None else torch.empty_like(x)
    T, C = x.shape
    _add_norm[(T,)](
        x, y, x0, a, b, x_new, h, eps, C, triton.next_power_of_2(C),
        num_warps=4 if C <= 1024 else 8, **_device(x.device)[2],
    )  # fmt: skip
    return (x if x_new is None else x_new), h


@triton.jit
def _relu2(x, n, BLOCK: tl.constexpr, PDL: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _begin(PDL)
    z = tl.maximum(tl.load(x + i, i < n, 0.0).to(tl.float32), 0.0)
    tl.store(x + i, z * z, i < n)


def relu2(x):
    """model.py's. x: contiguous, any shape."""
    n = x.numel()
    _relu2[(triton.cdiv(n, 2048),)](x, n, 2048, num_warps=4, **_device(x.device)[2])
    return x


@triton.jit(do_not_specialize=VARIES)
def _rope_store(
    qkv, h, ve, ve_gate, cos, sin, ids, positions, slots, k, v, q,
    h_stride, block_stride, qk_scale, gate_scale, eps,
    N_HEAD: tl.constexpr, N_KV: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    C: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # a program owns HEADS neighbouring heads of one row, be they q, k or v: it computes all three
    # ways and stores each head where it belongs
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    half = tl.arange(0, HALF)[None, :]
    live = (head < N_HEAD + 2 * N_KV) & (half < D // 2)
    is_q = head < N_HEAD
    is_v = head >= N_HEAD + N_KV
    kv_head = head - N_HEAD - is_v.to(tl.int32) * N_KV
    _begin(PDL)
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
    to_kv = (slot // BLOCK_SIZE).to(tl.int64) * block_stride
    to_kv += (kv_head * BLOCK_SIZE + slot % BLOCK_SIZE) * D + half
    is_k = live & ~(is_q | is_v)
    tl.store(k + to_kv, lo, is_k)
    tl.store(k + to_kv + D // 2, hi, is_k)
    tl.store(v + to_kv, lo, live & is_v)
    tl.store(v + to_kv + D // 2, hi, live & is_v)


def rope_store(qkv, h, ve, ve_gate, cos, sin, batch, k, v, n_head, qk_scale, gate_scale, eps):
    """model.py's: from the QKV product to attention's input in one kernel."""
    n_kv, block_size, D = k.shape[1:]
    T = qkv.shape[0]
    q = torch.empty((T, n_head, D), dtype=qkv.dtype, device=qkv.device)
    heads, c = 4, 1 if ve is None else ve_gate.shape[1]
    _rope_store[(T, triton.cdiv(n_head + 2 * n_kv, heads))](
        qkv, h, ve, ve_gate, cos, sin, batch.ids, batch.positions, batch.slots, k, v, q,
        h.stride(0), k.stride(0), qk_scale, gate_scale, eps,
        n_head, n_kv, D, block_size, c, heads, triton.next_power_of_2(D // 2),
        num_warps=1, **_device(qkv.device)[2],
    )  # fmt: skip
    return q


@triton.jit
def _fp8_rows(x, y, scales, C: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    c = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    _begin(PDL)
    z = tl.load(x + row * C + c, c < C, 0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(z), 0), 1e-30) / 448
    tl.store(scales + row, scale)
    tl.store(y + row * C + c, (z / scale).to(y.dtype.element_ty), c < C)


def fp8_rows(x):
    """`linear.fp8_rows` in one pass: x (T, C) as float8_e4m3fn, and the rows' scales, (T, 1)
    float32."""
    T, C = x.shape
    assert x.is_contiguous(), x.stride()
    y = torch.empty((T, C), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((T, 1), dtype=torch.float32, device=x.device)
    _fp8_rows[(T,)](
        x, y, scales, C, triton.next_power_of_2(C),
        num_warps=4 if C <= 1024 else 8, **_device(x.device)[2],
    )  # fmt: skip
    return y, scales


@triton.jit(do_not_specialize=VARIES)
def _linear(
    x, w, y, rows, X_STRIDE: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    _begin(PDL)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + m[:, None] * X_STRIDE + k, (m < rows)[:, None] & (k < K), 0.0)
        b = tl.load(w + n[:, None] * K + k, (n < N)[:, None] & (k < K), 0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    tl.store(y + m[:, None] * N + n, acc, (m < rows)[:, None] & (n < N))


def linear(x, w):
    """x (T, K) @ w.T (K, N), in tiles of one size and sums of one order: unlike in cuBLAS, which
    has another kernel for another T, the bits of a row depend on nothing but the row. Returns
    (T, N).
    """
    (T, K), N = x.shape, len(w)
    assert x.stride(1) == 1 and w.is_contiguous(), (x.stride(), w.stride())
    y = torch.empty((T, N), dtype=x.dtype, device=x.device)
    _linear[(triton.cdiv(N, 64), triton.cdiv(T, 64))](
        x, w, y, T, x.stride(0), N, K, 64, 64, 64 if x.element_size() == 2 else 32,
        num_warps=4, num_stages=4, **_device(x.device)[2],
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=VARIES)
def _few_rows(
    x, w, y, h, stream, x0, a, b, eps, rows, N,
    K: tl.constexpr, H: tl.constexpr, NORM: tl.constexpr, RELU2: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_K)[None, :]
    # all the weights this program needs, asked for at once and kept in registers. the kernel in
    # front does not write weights: they are on their way before it has ended, and so are those of
    # the products after this one, while rope and attention leave the memory idle
    _release(PDL)
    at = w + n.to(tl.int64)[:, None] * K + c
    tiles = ()
    for t in tl.static_range(TILES):
        live = (n < N)[:, None] & (t * BLOCK_K + c < K)
        tiles = tiles + (tl.load(at + t * BLOCK_K, live, 0.0, eviction_policy="evict_first"),)
    _wait(PDL)
    for row in range(rows):
        xs = ()
        for t in tl.static_range(TILES):
            i = row * K + t * BLOCK_K + c
            inside = t * BLOCK_K + c < K
            z = tl.load(x + i, inside, 0.0)
            if NORM and a is not None:
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
        if NORM:  # rms has no weight, it is one factor: it can wait until the sums are there
            factor = tl.rsqrt(tl.sum(squares) / K + eps)
            out *= factor
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


def _launch_few_rows(x, w, h, stream, x0, a, b, eps, relu2, outputs, warps=None):
    (rows, k), n = x.shape, w.shape[0]
    y = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    # up to 80 registers of a thread are for weights, 16 bytes a load: then all programs of a
    # multiprocessor have about 70 KB on their way. fewer cannot fill the memory's pipe, more spill
    warps = warps or triton.next_power_of_2(triton.cdiv(k * outputs, 20 * 256))
    warps = min(warps, triton.next_power_of_2(triton.cdiv(k, 256)), 32)
    block_k = 256 * warps
    _few_rows[(triton.cdiv(n, outputs),)](
        x, w, y, h, stream, x0, a, b, eps, rows, n,
        k, 0 if h is None else h.shape[1], h is not None, relu2,
        outputs, block_k, triton.cdiv(k, block_k), num_warps=warps, **_device(x.device)[2],
    )  # fmt: skip
    return y


def norm_linear(x, w, eps, x0=None, a=None, b=None, relu2=False, outputs=4, warps=None):
    """rms(x) @ w.T in one launch, for a few rows: returns (y (T, N), h (T, 32)).

    x (T, K), w (N, K). With a, b (0-dim float32) and x0 (T, K), x is a * x + b * x0 first. relu2:
    y = relu(.)^2. h: the first 32 channels of the normed x, all that `rope_store` wants to see.
    outputs: how many a program computes, a power of two; warps: of a program, None: as they fit.
    """
    h = torch.empty((x.shape[0], min(32, x.shape[1])), dtype=x.dtype, device=x.device)
    return _launch_few_rows(x, w, h, None, x0, a, b, eps, relu2, outputs, warps), h


def linear_add(x, w, stream, x0=None, a=None, b=None, outputs=4, warps=None):
    """stream + x @ w.T in one launch, for a few rows. x (T, K), w (N, K), stream and result (T, N).

    With a, b and x0 (T, N), the stream is a * stream + b * x0 first: the same lambdas that
    `norm_linear` applied to what it read, so that no one has to write the scaled stream down.
    outputs, warps: as there.
    """
    return _launch_few_rows(x, w, None, stream, x0, a, b, 0.0, False, outputs, warps)


# -------------------------------------------------------------------------------------------------
# attention


@triton.jit
def _keys(
    k, v, table, tile, stop, block_stride,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # keys and values (TILE, BLOCK_D) of the positions from `tile` on, a multiple of TILE; 0 from
    # `stop` on
    within = tl.arange(0, TILE)
    d = tl.arange(0, BLOCK_D)[None, :]
    if BLOCK_SIZE % TILE == 0:  # all in one block: one look-up, then a base and constant offsets
        block = tl.load(table + tile // BLOCK_SIZE, tile < stop, 0)
        base = block.to(tl.int64) * block_stride + tile % BLOCK_SIZE * D
        k += base
        v += base
        at = within[:, None] * D + d
    else:  # one look-up per position, not per block: any size of tile, whatever the block's
        position = tile + within
        block = tl.load(table + position // BLOCK_SIZE, position < stop, 0)
        at = (block.to(tl.int64) * block_stride + position % BLOCK_SIZE * D)[:, None] + d
    inside = (tile + within < stop)[:, None] & (d < D)
    return tl.load(k + at, inside, 0.0), tl.load(v + at, inside, 0.0)


@triton.jit(do_not_specialize=VARIES)
def _decode(
    q, k, v, tables, seq_lens, out, lse, table_stride, block_stride, scale, window,
    N_KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # one program: the query of one sequence, all query heads of one kv head, one split of the keys
    head, sequence, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(2)  # not a constexpr: there would be a kernel for each count
    d = tl.arange(0, BLOCK_D)
    _begin(PDL)
    seq_len = tl.load(seq_lens + sequence)
    # the keys seen are start .. seq_len - 1; tiles lie on a fixed grid, splits are whole tiles
    start = tl.where(window < 0, 0, tl.maximum(seq_len - 1 - window, 0))
    first = start // TILE * TILE
    tiles = tl.cdiv(seq_len - first, TILE)
    lo = first + tl.cdiv(tiles, splits) * TILE * split
    hi = tl.minimum(lo + tl.cdiv(tiles, splits) * TILE, seq_len)
    query_head = (sequence * N_KV + head) * GROUP
    g = tl.arange(0, BLOCK_G)  # BLOCK_G is 1, or a multiple of 16 that the matrix units take
    rows = query_head + g
    live = (g < GROUP)[:, None] & (d < D)[None, :]
    query = tl.load(q + rows[:, None] * D + d[None, :], live, 0.0)
    table = tables + sequence.to(tl.int64) * table_stride
    k += head * (BLOCK_SIZE * D)
    v += head * (BLOCK_SIZE * D)
    m = tl.full((BLOCK_G,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    within = tl.arange(0, TILE)
    if BLOCK_G == 1:
        # ask for a tile before the one in hand is worked on. left to itself, the compiler waits for
        # memory several times in every tile
        key2, value2 = _keys(k, v, table, lo, hi, block_stride, D, BLOCK_SIZE, BLOCK_D, TILE)
    for tile in range(lo, hi, TILE):
        position = tile + within
        if BLOCK_G == 1:
            key, value, ahead = key2, value2, tile + TILE
            key2, value2 = _keys(k, v, table, ahead, hi, block_stride, D, BLOCK_SIZE, BLOCK_D, TILE)
        else:  # a loop around matrix products is pipelined by the compiler
            key, value = _keys(k, v, table, tile, hi, block_stride, D, BLOCK_SIZE, BLOCK_D, TILE)
        seen = (position >= start) & (position < hi)
        if BLOCK_G == 1:  # nothing to share: plain multiply and add, memory is the limit
            score = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1)[None, :] * scale
        else:
            score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, -1e30)
        m_new = tl.maximum(m, tl.max(score, 1))
        weight = tl.exp2(score - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        total = total * shrink + tl.sum(weight, 1)
        if BLOCK_G == 1:
            column = tl.reshape(weight, (TILE, 1))
            acc = acc * shrink[:, None] + tl.sum(column * value.to(tl.float32), 0)[None, :]
        else:
            acc = acc * shrink[:, None]
            acc = tl.dot(weight.to(value.dtype), value, acc, input_precision="ieee")
        m = m_new
    # a split without keys (or a sequence of length 0) has total 0: it writes 0, and no NaN
    divisor = tl.where(total > 0, total, 1.0)
    acc = acc / divisor[:, None]
    part = rows * splits + split
    tl.store(out + part[:, None].to(tl.int64) * D + d[None, :], acc, live)
    if lse is not None:
        tl.store(lse + part, tl.where(total > 0, m, -1e30) + tl.log2(divisor), g < GROUP)


@triton.jit(do_not_specialize=VARIES)
def _combine(
    parts, lse, out, splits, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # each split brought its own softmax: out_s, and lse_s = log2 of the sum it divided by. over all
    # keys the divisor is the sum of 2^lse_s, so split s counts with 2^lse_s / sum(2^lse)
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    _begin(PDL)
    size = tl.load(lse + row * splits + s, s < splits, -1e30)
    weight = tl.where(s < splits, tl.exp2(size - tl.max(size, 0)), 0.0)
    live = (s < splits)[:, None] & (d < D)[None, :]
    part = tl.load(parts + (row * splits + s)[:, None] * D + d[None, :], live, 0.0)
    tl.store(out + row * D + d, tl.sum(weight[:, None] * part, 0) / tl.sum(weight, 0), d < D)


@triton.jit(do_not_specialize=VARIES)
def _chunk(
    q, k, v, tables, seq_lens, cu_seqlens, out, first_sequence, num_sequences,
    table_stride, block_stride, scale, window,
    N_KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_Q neighbouring queries of one sequence and all query heads of one kv head.
    # the last queries see the most keys, so they start first and the short ones fill up the end
    BLOCK_Q: tl.constexpr = BLOCK_M // BLOCK_G
    head = tl.program_id(0)
    program = tl.num_programs(1) - 1 - tl.program_id(1)
    _begin(PDL)
    # the host does not know the lengths one by one. sequence i of the chunks, starting at row c_i,
    # gets the programs from c_i // BLOCK_Q + i on: always enough, at most one too many each.
    # binary search for the last i that starts at or before this program
    cu_seqlens += first_sequence
    row0 = tl.load(cu_seqlens)
    i = 0
    end = num_sequences
    while end - i > 1:
        middle = (i + end) // 2
        inside = (tl.load(cu_seqlens + middle) - row0) // BLOCK_Q + middle <= program
        i = tl.where(inside, middle, i)
        end = tl.where(inside, end, middle)
    row = tl.load(cu_seqlens + i)
    num_queries = tl.load(cu_seqlens + i + 1) - row
    first_query = (program - (row - row0) // BLOCK_Q - i) * BLOCK_Q
    if first_query >= num_queries:
        return
    sequence = (first_sequence + i).to(tl.int64)
    seq_len = tl.load(seq_lens + sequence)
    r = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    query = first_query + r // BLOCK_G
    at = ((row + query) * N_KV + head) * GROUP + r % BLOCK_G
    live = ((query < num_queries) & (r % BLOCK_G < GROUP))[:, None] & (d < D)[None, :]
    at = at[:, None].to(tl.int64) * D + d[None, :]
    x = tl.load(q + at, live, 0.0)
    query += seq_len - num_queries  # from here on a position
    first = first_query + seq_len - num_queries
    stop = tl.minimum(first + BLOCK_Q, seq_len)
    lo = tl.where(window < 0, 0, tl.maximum(first - window, 0)) // TILE * TILE
    left = tl.where(window < 0, 0, query - window)
    table = tables + sequence * table_stride
    k += head * (BLOCK_SIZE * D)
    v += head * (BLOCK_SIZE * D)
    # masked scores are a finite -1e30: a row whose first tiles hold no key it sees collects
    # nonsense there, which its first real key then multiplies by 2^-huge = 0
    m = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for tile in range(lo, stop, TILE):
        position = tile + tl.arange(0, TILE)
        key, value = _keys(k, v, table, tile, stop, block_stride, D, BLOCK_SIZE, BLOCK_D, TILE)
        score = tl.dot(x, tl.trans(key), input_precision="ieee") * scale
        seen = (position[None, :] <= query[:, None]) & (position[None, :] >= left[:, None])
        score = tl.where(seen, score, -1e30)
        m_new = tl.maximum(m, tl.max(score, 1))
        weight = tl.exp2(score - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weight.to(value.dtype), value, acc, input_precision="ieee")
        m = m_new
    tl.store(out + at, acc / total[:, None], live)


def fixed_attention(q, k, v, batch, window):
    """`paged_attention` in which the bits of a row depend neither on who shares its batch nor on
    where its chunk begins, nor on whether it is a decode: all rows go through one kernel."""
    return paged_attention(q, k, v, batch, window, fixed=True)


def paged_attention(q, k, v, batch, window, num_splits=None, fixed=False):
    """A backend as attention.py describes it; decodes go to one kernel, chunks to another.

    num_splits: programs that share the context of one decoding sequence; None: as many as fill the
    card. fixed: see fixed_attention.
    The online softmax and the split of the context are FlashAttention's (Dao et al., 2022) and
    Flash-Decoding's (Dao et al., 2023), the block table PagedAttention's (Kwon et al., 2023).
    """
    T, n_head, D = q.shape
    n_kv, block_size = k.shape[1:3]
    assert k.stride()[1:] == (block_size * D, D, 1), k.stride()
    group, size = n_head // n_kv, q.element_size()
    block_d = max(16, triton.next_power_of_2(D))
    decodes = 0 if fixed else batch.num_decodes
    chunks = batch.seq_lens.shape[0] - decodes
    processors, memory, options = _device(q.device)
    scale = math.log2(math.e) / math.sqrt(D)  # exp2 is what the hardware has
    tables, table_stride = batch.block_tables, batch.block_tables.stride(0)
    out = torch.empty_like(q)
    if decodes:
        if group == 1:  # one warp with 4 KB of keys at a time: many small programs fill the card
            block_g, warps, tile = 1, 1, max(4096 // (block_d * size), 1)
        else:
            block_g, warps = max(16, triton.next_power_of_2(group)), 4
            tile = 16 if size == 4 else min(8192 // block_d, 64)
        splits = num_splits
        if splits is None:
            wanted = WARPS_PER_PROCESSOR // warps * processors // (decodes * n_kv)
            splits = max(1, min(wanted, triton.cdiv(batch.max_seq, 64), 64))
        parts, lse = out, None
        if splits > 1:
            shape = (decodes, n_head, splits)
            parts = torch.empty((*shape, D), dtype=torch.float32, device=q.device)
            lse = torch.empty(shape, dtype=torch.float32, device=q.device)
        _decode[(n_kv, decodes, splits)](
            q, k, v, tables, batch.seq_lens, parts, lse, table_stride, k.stride(0), scale, window,
            n_kv, group, D, block_size, block_d, block_g, tile, num_warps=warps, **options,
        )  # fmt: skip
        if splits > 1:
            block_s = triton.next_power_of_2(splits)
            _combine[(decodes * n_head,)](
                parts, lse, out, splits, D, block_d, block_s, num_warps=4, **options
            )
    if chunks:
        block_g = triton.next_power_of_2(group)
        # small blocks for short prompts, and for float32, which has no matrix units and spills
        mean = (T - decodes) // chunks * block_g
        short = size == 4 or mean <= 32
        block_m, tile, warps = (32, 32, 4) if short else (128, 64, 8)
        if fixed and size < 4:
            block_m, tile, warps = 64, 64, 4
        if block_d > 128:
            block_m, tile, warps = min(block_m, 64), tile // 2, 8
        block_m = max(block_m, block_g)
        # two K and two V tiles beside the queries, three where products run by themselves (Hopper
        # and later), a little for the look-ups, and weights if warps share rows
        tiles = 6 if memory > 200_000 else 4
        spilt = block_m * size * (16 * warps > block_m)  # per key
        while tile > 16 and (
            (tiles * tile + block_m) * block_d * size + tile * spilt + 1024 > memory
        ):
            tile //= 2
        blocks = (T - decodes) // (block_m // block_g) + chunks
        _chunk[(n_kv, blocks)](
            q, k, v, tables, batch.seq_lens, batch.cu_seqlens, out, decodes, chunks,
            table_stride, k.stride(0), scale, window,
            n_kv, group, D, block_size, block_d, block_g, block_m, tile,
            # a look-up, then a load: two steps of the compiler's pipeline. only from 5 stages on is
            # a tile on its way while another is worked on; with 3 or 4 each is waited for at once
            num_warps=warps, num_stages=5, **options,
        )  # fmt: skip
    return out


# -------------------------------------------------------------------------------------------------
# sampling


@triton.jit
def _cap(x, softcap):
    # softcap * tanh(x / softcap); 0: none. -inf becomes -softcap: callers mask it themselves
    c = tl.where(softcap > 0, softcap, 1.0)
    return tl.where(softcap > 0, c - 2.0 * c / (tl.exp(2.0 * x / c) + 1.0), x)


@triton.jit
def _chunk_weights(x, top, temperature, softcap):
    # exp((cap(x) - cap(top)) / temperature): relative to the chunk's own top, so the sum is >= 1
    weight = tl.exp((_cap(x, softcap) - _cap(top, softcap)) / temperature)
    return tl.where(x > float("-inf"), weight, 0.0)


@triton.jit(do_not_specialize=VARIES)
def _sample_chunks(
    logits, temperatures, tops, ids, sums, softcap, V, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    _begin(PDL)
    temperature = tl.load(temperatures + row)
    x = tl.load(logits + row * V + i, i < V, float("-inf")).to(tl.float32)
    top = tl.max(x, 0)
    to = row * tl.num_programs(1) + chunk
    tl.store(tops + to, top)
    tl.store(ids + to, tl.min(tl.where(x == top, i, V - 1), 0))
    if temperature > 0:
        tl.store(sums + to, tl.sum(_chunk_weights(x, top, temperature, softcap), 0))


@triton.jit
def _key(x, SHIFT: tl.constexpr):
    # float32 as integers of the same order, both zeros as one. SHIFT: low bits to drop, 16 for
    # bfloat16, whose lower half as a float32 is zero
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, ~bits, bits | 0x80000000) >> SHIFT


@triton.jit
def _least(
    logits, low, limit, top, temperature, softcap, V,
    COUNT: tl.constexpr, TILE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    # the smallest key such that all larger ones together weigh less than `limit`. a key weighs 1 if
    # COUNT, else its share of the probability (0 below `low`). found from the highest bit down, two
    # bits in a pass
    least = tl.full((), 0, tl.uint32)
    for shift in range(30 - SHIFT, -1, -2):
        step = tl.full((), 1, tl.uint32) << shift
        held1 = tl.zeros((TILE,), tl.float32)
        held2, held3 = held1, held1
        for start in range(0, V, TILE):
            i = start + tl.arange(0, TILE)
            x = tl.load(logits + i, i < V, float("-inf")).to(tl.float32)
            key = _key(x, SHIFT)
            if COUNT:
                weight = tl.where(x > float("-inf"), 1.0, 0.0)
            else:
                weight = _chunk_weights(x, top, temperature, softcap)
                weight = tl.where(key >= low, weight, 0.0)
            held1 += tl.where(key >= least + step, weight, 0.0)
            held2 += tl.where(key >= least + 2 * step, weight, 0.0)
            held3 += tl.where(key >= least + 3 * step, weight, 0.0)
        passed = (tl.sum(held1, 0) >= limit).to(tl.uint32) + (tl.sum(held2, 0) >= limit)
        least += step * (passed + (tl.sum(held3, 0) >= limit))
    return least


@triton.jit(do_not_specialize=VARIES)
def _truncate(
    logits, temperatures, top_ks, top_ps, min_ps, tops, sums, lows, softcap, V, CHUNKS,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # a program finds what the filters leave of a row: the keys from lows[row] on, since each of
    # them keeps what is likeliest. then it weighs the row's chunks again
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    _begin(PDL)
    temperature = tl.load(temperatures + row)
    top_k, top_p, min_p = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row)
    low = tl.full((), 0, tl.uint32)
    if (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0)):
        logits += row * V
        tops += row * CHUNKS
        top = tl.max(tl.load(tops + j, j < CHUNKS, float("-inf")), 0)
        if top_k > 0:
            low = _least(logits, low, top_k, top, temperature, softcap, V, True, TILE, SHIFT)
        if (top_p < 1) | (min_p > 0):
            total = tl.zeros((TILE,), tl.float32)
            least = tl.full((TILE,), 0xFFFFFFFF, tl.uint32)
            for start in range(0, V, TILE):
                i = start + tl.arange(0, TILE)
                x = tl.load(logits + i, i < V, float("-inf")).to(tl.float32)
                key, weight = _key(x, SHIFT), _chunk_weights(x, top, temperature, softcap)
                total += tl.where(key >= low, weight, 0.0)
                least = tl.minimum(least, tl.where(weight >= min_p, key, least))
            if top_p < 1:
                limit = top_p * tl.sum(total, 0)
                low = _least(logits, low, limit, top, temperature, softcap, V, False, TILE, SHIFT)
            if min_p > 0:
                low = tl.maximum(low, tl.min(least, 0))
        for first in range(0, CHUNKS, TILE // CHUNK):
            chunk = first + tl.arange(0, TILE // CHUNK)
            i = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
            x = tl.load(logits + i, i < V, float("-inf")).to(tl.float32)
            unit = tl.load(tops + chunk, chunk < CHUNKS, 0.0)[:, None]
            weight = _chunk_weights(x, unit, temperature, softcap)
            weight = tl.where(_key(x, SHIFT) >= low, weight, 0.0)
            tl.store(sums + row * CHUNKS + chunk, tl.sum(weight, 1), chunk < CHUNKS)
    tl.store(lows + row, low.to(tl.int32, bitcast=True))


@triton.jit
def _first(weight, index, target):
    # (the first index whose running sum exceeds target, the sum before it). only an index with a
    # weight can be it, and if rounding leaves none past the target, the last with a weight is
    running = tl.cumsum(weight, 0)
    last = tl.max(tl.where(weight > 0, index, 0), 0)
    found = tl.min(tl.where((running > target) & (weight > 0), index, last), 0)
    return found, tl.sum(tl.where(index < found, weight, 0.0), 0)


@triton.jit(do_not_specialize=VARIES)
def _sample_pick(
    logits, temperatures, us, tops, ids, sums, lows, tokens, softcap, V, CHUNKS,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    _begin(PDL)
    temperature = tl.load(temperatures + row)
    top = tl.load(tops + row * CHUNKS + j, j < CHUNKS, float("-inf"))
    best = tl.max(top, 0)
    if temperature > 0:
        share = tl.load(sums + row * CHUNKS + j, j < CHUNKS, 0.0)
        share *= _chunk_weights(top, best, temperature, softcap)
        target = tl.load(us + row) * tl.sum(share, 0)
        chunk, before = _first(share, j, target)
        # the same question inside the chunk, in units of its own largest weight
        i = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + row * V + i, i < V, float("-inf")).to(tl.float32)
        unit = tl.load(tops + row * CHUNKS + chunk)
        target = (target - before) / _chunk_weights(unit, best, temperature, softcap)
        weight = _chunk_weights(x, unit, temperature, softcap)
        if lows is not None:
            low = tl.load(lows + row).to(tl.uint32, bitcast=True)
            weight = tl.where(_key(x, SHIFT) >= low, weight, 0.0)
        token, _ = _first(weight, i, target)
        tl.store(tokens + row, token)
    else:  # chunks lie in id order: the first that holds the maximum holds the lowest such id
        chunk = tl.min(tl.where(top == best, j, CHUNKS - 1), 0)
        tl.store(tokens + row, tl.load(ids + row * CHUNKS + chunk))


def sample(logits, temperature, u, softcap, filters=None):
    """One token per row: the first id whose cumulative probability exceeds u. Returns (R,) int32.

    logits (R, V) before the softcap; softcap: a float, 0 for none. temperature (R,) float32, 0 for
    the most likely token (the lowest id of equals). u (R,) float32 in [0, 1). filters: top_k, top_p
    and min_p, each (R,) float32, 0, 1 and 0 being off; None: all are. An id whose logit is -inf, or
    whose probability is 0, is never returned. Reads the logits once, and the one chunk of the
    vocabulary in which the answer lies a second time; of rows with filters, up to 20 times (a
    float32's key has more digits than a bfloat16's: 36 times), mostly from the cache.
    """
    R, V = logits.shape
    logits = logits.contiguous()
    chunks = triton.cdiv(V, SAMPLE_CHUNK)
    tops, sums = torch.empty((2, R, chunks), dtype=torch.float32, device=logits.device)
    ids = torch.empty((R, chunks), dtype=torch.int32, device=logits.device)
    tokens = torch.empty((R,), dtype=torch.int32, device=logits.device)
    options = _device(logits.device)[2]
    _sample_chunks[(R, chunks)](
        logits, temperature, tops, ids, sums, softcap, V, SAMPLE_CHUNK, num_warps=4, **options
    )
    block, lows = triton.next_power_of_2(chunks), None
    shift = 16 if logits.dtype == torch.bfloat16 else 0
    if filters is not None:
        lows = torch.empty((R,), dtype=torch.int32, device=logits.device)
        _truncate[(R,)](
            logits, temperature, *filters, tops, sums, lows, softcap, V, chunks,
            SAMPLE_CHUNK, SAMPLE_TILE, block, shift, num_warps=16, **options,
        )  # fmt: skip
    _sample_pick[(R,)](
        logits, temperature, u, tops, ids, sums, lows, tokens, softcap, V, chunks,
        SAMPLE_CHUNK, block, shift, num_warps=8, **options,
    )  # fmt: skip
    return tokens
