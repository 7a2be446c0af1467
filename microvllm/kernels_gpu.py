"""
Triton kernels: the fused steps of model.py, paged attention, and the sampler.

`add_norm`, `rope_store` and `relu2` have the names and the meaning of the plain torch functions in
model.py; `paged_attention` has the signature every attention backend has. All of them

- never look at the device from the host: grids follow from shapes and host integers alone, lengths
  are read by the kernels. So they can be captured in a CUDA graph once and replayed for ever;
- do their arithmetic in float32 and keep bfloat16, float16 or float32 in memory;
- on Hopper and later start before the kernel in front of them has ended (programmatic dependent
  launch). The rule that keeps this right: every kernel calls `_begin` before it touches anything
  another kernel may have written, so "the kernel before me has ended" implies all before it have.

Under `TRITON_INTERPRET=1` everything here runs on the CPU, slowly: that is how the tests run.
"""

import functools
import math

import torch
import triton
import triton.language as tl

SPLIT_WAVES = 4  # programs per multiprocessor that paged decoding aims at when it splits contexts
SAMPLE_CHUNK = 2048  # vocabulary entries per program of the sampler: fixed, so sums do not vary


@functools.lru_cache
def _device(device):
    """(multiprocessors, bytes of shared memory per program, launch options) of a torch device."""
    if device.type != "cuda":  # the interpreter
        return 8, 2**16, {"PDL": False}
    card = torch.cuda.get_device_properties(device)
    memory = getattr(card, "shared_memory_per_block_optin", 2**16)
    if torch.version.hip is None and card.major >= 9:
        return card.multi_processor_count, memory, {"PDL": True, "launch_pdl": True}
    return card.multi_processor_count, memory, {"PDL": False}


@triton.jit
def _begin(PDL: tl.constexpr):
    # let the next kernel start as soon as there is room for it (it will wait here as well), then
    # wait until the one before has ended and its writes can be seen
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


# -------------------------------------------------------------------------------------------------
# fused steps of a layer


@triton.jit
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
    """
    One pass over the residual stream: x_new = a * (x + y) + b * x0, h = rms(x_new). All (T, C).

    y None: nothing to add. a None: no lambdas (a and b are 0-dim float32 tensors). Returns
    (x_new, h); x_new is x itself when nothing was added or scaled.
    """
    h = torch.empty_like(x)
    x_new = None if y is None and a is None else torch.empty_like(x)
    T, C = x.shape
    options = _device(x.device)[2]
    warps = 4 if C <= 1024 else 8
    _add_norm[(T,)](
        x, y, x0, a, b, x_new, h, eps, C, triton.next_power_of_2(C), num_warps=warps, **options
    )
    return (x if x_new is None else x_new), h


@triton.jit
def _relu2(x, out, n, BLOCK: tl.constexpr, PDL: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _begin(PDL)
    z = tl.maximum(tl.load(x + i, i < n, 0.0).to(tl.float32), 0.0)
    tl.store(out + i, z * z, i < n)


def relu2(x):
    """relu(x)^2, in place. x: contiguous, any shape."""
    n = x.numel()
    _relu2[(triton.cdiv(n, 2048),)](x, x, n, 2048, num_warps=4, **_device(x.device)[2])
    return x


@triton.jit
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


def rope_store(
    qkv, h, ve, ve_gate, cos, sin, batch, k, v, n_head, qk_scale, gate_scale, eps
):  # fmt: skip
    """
    From the QKV product to attention's input: rotate, norm and scale q and k, mix the gated value
    embedding into v, write k and v into their slots. Returns q (T, n_head, D).

    qkv (T, (n_head + 2 * n_kv_head) * D) with the q, then the k, then the v heads. h (T, >= c): the
    block's normed input, of which the gate reads the first c channels. ve (V, n_kv_head * D) or
    None, ve_gate (n_kv_head, c). cos, sin (max_positions, D // 2) float32. k, v: one layer's caches
    (num_blocks, n_kv_head, block_size, D).
    """
    n_kv, block_size, D = k.shape[1:]
    T = qkv.shape[0]
    q = torch.empty((T, n_head, D), dtype=qkv.dtype, device=qkv.device)
    heads = 4
    c = 1 if ve is None else ve_gate.shape[1]
    _rope_store[(T, triton.cdiv(n_head + 2 * n_kv, heads))](
        qkv, h, ve, ve_gate, cos, sin, batch.ids, batch.positions, batch.slots, k, v, q,
        h.stride(0), k.stride(0), qk_scale, gate_scale, eps,
        n_head, n_kv, D, block_size, c, heads, triton.next_power_of_2(D // 2),
        num_warps=1, **_device(qkv.device)[2],
    )  # fmt: skip
    return q


# -------------------------------------------------------------------------------------------------
# matrix products of a few rows: reading the weights is all the work, the rest hides behind it


@triton.jit
def _linear(
    x, w, y, h, stream, x0, a, b, eps, ROWS, N,
    K: tl.constexpr, H: tl.constexpr, NORM: tl.constexpr, RELU2: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_K)[None, :]
    # all the weights this program needs, asked for at once and kept in registers. no kernel writes
    # weights: they are on their way before the kernel in front has ended, and with them the bytes
    # of this layer's next products, while rope and attention leave the memory idle
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    at = w + n.to(tl.int64)[:, None] * K + c
    tiles = ()
    for t in tl.static_range(TILES):
        live = (n < N)[:, None] & (t * BLOCK_K + c < K)
        tiles = tiles + (tl.load(at + t * BLOCK_K, live, 0.0, eviction_policy="evict_first"),)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for row in range(ROWS):
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


def _launch_linear(x, w, h, stream, x0, a, b, eps, relu2):
    (rows, K), N = x.shape, w.shape[0]
    y = torch.empty((rows, N), dtype=x.dtype, device=x.device)
    # up to 5 tiles of 4 rows, 16 bytes a thread each: 80 registers of weights, and 130 KB on their
    # way to every multiprocessor. fewer in flight cannot fill the memory's pipe, more spill
    warps = triton.next_power_of_2(triton.cdiv(K, 5 * 256))
    block_k = 256 * warps
    _linear[(triton.cdiv(N, 4),)](
        x, w, y, h, stream, x0, a, b, eps, rows, N,
        K, 0 if h is None else h.shape[1], h is not None, relu2, 4, block_k, triton.cdiv(K, block_k),
        num_warps=warps, **_device(x.device)[2],
    )  # fmt: skip
    return y


def norm_linear(x, w, eps, x0=None, a=None, b=None, relu2=False):
    """
    rms(x) @ w.T in one launch, for a few rows: returns (y (T, N), h (T, 32)).

    x (T, K), w (N, K). With a, b (0-dim float32) and x0 (T, K), x is a * x + b * x0 first. relu2:
    y = relu(.)^2. h: the first 32 channels of the normed x, all that `rope_store` wants to see.
    """
    h = torch.empty((x.shape[0], min(32, x.shape[1])), dtype=x.dtype, device=x.device)
    return _launch_linear(x, w, h, None, x0, a, b, eps, relu2), h


def linear_add(x, w, stream, x0=None, a=None, b=None):
    """
    stream + x @ w.T in one launch, for a few rows. x (T, K), w (N, K), stream (T, N): returns (T, N).

    With a, b and x0 (T, N), the stream is a * stream + b * x0 first: the same lambdas that
    `norm_linear` applied to what it read, so that no one has to write the scaled stream down.
    """
    return _launch_linear(x, w, None, stream, x0, a, b, 0.0, False)


# -------------------------------------------------------------------------------------------------
# attention


@triton.jit
def _slots(table, position, seq_len, block_stride, D: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    # where in the cache (in elements, head 0) the keys of these positions lie. one table look-up
    # per position, not per block: a tile of keys may then have any size, whatever the block's
    block = tl.load(table + position // BLOCK_SIZE, position < seq_len, 0)
    return block.to(tl.int64) * block_stride + position % BLOCK_SIZE * D


# windows take a handful of values: do not compile a variant for each kind of number
@triton.jit(do_not_specialize=["window"])
def _decode(
    q, k, v, tables, seq_lens, out, lse, table_stride, block_stride, scale, window,
    N_KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # one program: the query of one sequence, all query heads of one kv head, one split of the keys
    head, sequence, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, BLOCK_D)
    _begin(PDL)
    seq_len = tl.load(seq_lens + sequence)
    # the keys seen are start .. seq_len - 1; tiles lie on a fixed grid, splits are whole tiles
    start = tl.where(window < 0, 0, tl.maximum(seq_len - 1 - window, 0))
    first = start // TILE * TILE
    tiles = tl.cdiv(seq_len - first, TILE)
    lo = first + tl.cdiv(tiles, SPLITS) * TILE * split
    hi = tl.minimum(lo + tl.cdiv(tiles, SPLITS) * TILE, seq_len)
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
    for tile in range(lo, hi, TILE):
        position = tile + tl.arange(0, TILE)
        seen = (position >= start) & (position < seq_len)
        at = _slots(table, position, seq_len, block_stride, D, BLOCK_SIZE)[:, None] + d[None, :]
        key = tl.load(k + at, seen[:, None] & (d < D)[None, :], 0.0)
        value = tl.load(v + at, seen[:, None] & (d < D)[None, :], 0.0)
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
    part = rows * SPLITS + split
    tl.store(out + part[:, None].to(tl.int64) * D + d[None, :], acc, live)
    if SPLITS > 1:
        tl.store(lse + part, tl.where(total > 0, m, -1e30) + tl.log2(divisor), g < GROUP)


@triton.jit
def _combine(
    parts, lse, out, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # each split brought its own softmax: out_s, and lse_s = log2 of the sum it divided by. over all
    # keys the divisor is the sum of 2^lse_s, so split s counts with 2^lse_s / sum(2^lse)
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    _begin(PDL)
    size = tl.load(lse + row * SPLITS + s, s < SPLITS, -1e30)
    weight = tl.where(s < SPLITS, tl.exp2(size - tl.max(size, 0)), 0.0)
    live = (s < SPLITS)[:, None] & (d < D)[None, :]
    part = tl.load(parts + (row * SPLITS + s)[:, None] * D + d[None, :], live, 0.0)
    tl.store(out + row * D + d, tl.sum(weight[:, None] * part, 0) / tl.sum(weight, 0), d < D)


@triton.jit(do_not_specialize=["window", "first_sequence", "num_sequences"])
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
        inside = (position < stop)[:, None] & (d < D)[None, :]
        slot = _slots(table, position, stop, block_stride, D, BLOCK_SIZE)[:, None] + d[None, :]
        key = tl.load(k + slot, inside, 0.0)
        value = tl.load(v + slot, inside, 0.0)
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


def paged_attention(q, k, v, batch, window, num_splits=None):
    """
    Causal attention of a flat batch over the block tables. Returns (T, n_head, D), q's dtype.

    q (T, n_head, D): rotated, normed and scaled. k, v (num_blocks, n_kv_head, block_size, D), which
    already hold the batch's own rows. A query at position p sees keys p - window .. p; window < 0:
    all of them. The first `batch.num_decodes` rows go to one kernel, the chunks to another.
    num_splits: programs that share the context of one decoding sequence (None: as many as it takes
    to fill the card, from the batch's size alone).
    The online softmax and the split of the context are FlashAttention's (Dao et al., 2022) and
    Flash-Decoding's (Dao et al., 2023), the block table PagedAttention's (Kwon et al., 2023).
    """
    T, n_head, D = q.shape
    n_kv, block_size = k.shape[1:3]
    assert k.stride()[1:] == (block_size * D, D, 1), k.stride()
    group = n_head // n_kv
    block_d = max(16, triton.next_power_of_2(D))
    decodes, chunks = batch.num_decodes, batch.seq_lens.shape[0] - batch.num_decodes
    sms, memory, options = _device(q.device)
    scale = math.log2(math.e) / math.sqrt(D)  # exp2 is what the hardware has
    tables, table_stride = batch.block_tables, batch.block_tables.stride(0)
    out = torch.empty_like(q)
    if decodes:
        programs = decodes * n_kv
        if num_splits is None:
            num_splits = max(
                1, min(SPLIT_WAVES * sms // programs, triton.cdiv(batch.max_seq, 64), 64)
            )
        block_g = 1 if group == 1 else max(16, triton.next_power_of_2(group))
        tile = 16
        parts, lse = out, None
        if num_splits > 1:
            shape = (decodes, n_head, num_splits)
            parts = torch.empty((*shape, D), dtype=torch.float32, device=q.device)
            lse = torch.empty(shape, dtype=torch.float32, device=q.device)
        _decode[(n_kv, decodes, num_splits)](
            q, k, v, tables, batch.seq_lens, parts, lse, table_stride, k.stride(0), scale, window,
            n_kv, group, D, block_size, block_d, block_g, tile, num_splits,
            num_warps=1 if block_g == 1 else 4, **options,
        )  # fmt: skip
        if num_splits > 1:
            block_s = triton.next_power_of_2(num_splits)
            _combine[(decodes * n_head,)](
                parts, lse, out, D, block_d, num_splits, block_s, num_warps=4, **options
            )
    if chunks:
        block_g = triton.next_power_of_2(group)
        block_m = min(max(64, triton.next_power_of_2(batch.max_query * block_g)), 128)
        # K and V tiles, double-buffered, next to the queries
        tile = 64
        while tile > 16 and (4 * tile + block_m) * block_d * q.element_size() > memory:
            tile //= 2
        blocks = (T - decodes) // (block_m // block_g) + chunks
        _chunk[(n_kv, blocks)](
            q, k, v, tables, batch.seq_lens, batch.cu_seqlens, out, decodes, chunks,
            table_stride, k.stride(0), scale, window,
            n_kv, group, D, block_size, block_d, block_g, block_m, tile,
            num_warps=8 if block_m == 128 else 4, num_stages=2, **options,
        )  # fmt: skip
    return out


# -------------------------------------------------------------------------------------------------
# sampling


@triton.jit
def _cap(x, softcap):
    # softcap * tanh(x / softcap); 0: none. -inf becomes -softcap: callers mask it themselves
    bounded = softcap - 2.0 * softcap / (
        tl.exp(2.0 * x / tl.where(softcap > 0, softcap, 1.0)) + 1.0
    )
    return tl.where(softcap > 0, bounded, x)


@triton.jit
def _chunk_weights(x, top, temperature, softcap):
    # exp((cap(x) - cap(top)) / temperature): relative to the chunk's own top, so the sum is >= 1
    weight = tl.exp((_cap(x, softcap) - _cap(top, softcap)) / temperature)
    return tl.where(x > float("-inf"), weight, 0.0)


@triton.jit
def _sample_chunks(
    logits, temperatures, tops, ids, sums, softcap, V,
    CHUNK: tl.constexpr, PDL: tl.constexpr,
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
def _first(weight, index, target):
    # (the first index whose running sum exceeds target, the sum before it). only an index with a
    # weight can be it, and if rounding leaves none past the target, the last with a weight is
    running = tl.cumsum(weight, 0)
    last = tl.max(tl.where(weight > 0, index, 0), 0)
    found = tl.min(tl.where((running > target) & (weight > 0), index, last), 0)
    return found, tl.sum(tl.where(index < found, weight, 0.0), 0)


@triton.jit
def _sample_pick(
    logits, temperatures, us, tops, ids, sums, tokens, softcap, V, CHUNKS,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
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
        token, _ = _first(_chunk_weights(x, unit, temperature, softcap), i, target)
        tl.store(tokens + row, token)
    else:  # chunks lie in id order: the first that holds the maximum holds the lowest such id
        chunk = tl.min(tl.where(top == best, j, CHUNKS - 1), 0)
        tl.store(tokens + row, tl.load(ids + row * CHUNKS + chunk))


def sample(logits, temperature, u, softcap):
    """
    One token per row: the first id whose cumulative probability exceeds u. Returns (R,) int32.

    logits (R, V) before the softcap; softcap: a float, 0 for none. temperature (R,) float32, 0 for
    the most likely token (the lowest id of equals). u (R,) float32 in [0, 1). An id whose logit is
    -inf, or whose probability is 0, is never returned. Reads the logits once, and the one chunk of
    the vocabulary in which the answer lies a second time.
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
    _sample_pick[(R,)](
        logits, temperature, u, tops, ids, sums, tokens, softcap, V, chunks,
        SAMPLE_CHUNK, triton.next_power_of_2(chunks), num_warps=8, **options,
    )  # fmt: skip
    return tokens
