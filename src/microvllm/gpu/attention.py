"""Attention over the block table, with the signature that microvllm/attention.py describes."""

import functools
import math
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .launch import VARIES, begin

SEARCHED = tl.constexpr(512)  # sequences that a program of `_chunk` reads at a time
MAX_SPLITS = tl.constexpr(64)


@triton.jit
def _keys(
    k, v, table, tile, stop, block_stride,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # keys and values (TILE, BLOCK_D) from position `tile` = n * TILE on; zeros from `stop` on
    within = tl.arange(0, TILE)
    d = tl.arange(0, BLOCK_D)[None, :]
    if BLOCK_SIZE % TILE == 0:  # one block: one look-up, then a base and constant offsets
        block = tl.load(table + tile // BLOCK_SIZE, tile < stop, 0)
        base = block.to(tl.int64) * block_stride + tile % BLOCK_SIZE * D
        k += base
        v += base
        at = within[:, None] * D + d
    else:  # a look-up for each position: tiles and blocks may have any size
        position = tile + within
        block = tl.load(table + position // BLOCK_SIZE, position < stop, 0)
        at = (block.to(tl.int64) * block_stride + position % BLOCK_SIZE * D)[:, None] + d
    inside = (tile + within < stop)[:, None] & (d < D)
    return tl.load(k + at, inside, 0.0), tl.load(v + at, inside, 0.0)


@triton.jit
def _scales(
    k, v, table, tile, stop, block_stride,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # the scales of keys and of values at these positions, (TILE,) each, as in fused/int8_cache.py:
    # bfloat16, which is the upper half of a float32, after the values of a head in the block
    position = tile + tl.arange(0, TILE)
    live = position < stop
    block = tl.load(table + position // BLOCK_SIZE, live, 0)
    at = (block.to(tl.int64) * block_stride + BLOCK_SIZE * D) // 2 + position % BLOCK_SIZE
    key_bits = tl.load(k.to(tl.pointer_type(tl.int16)) + at, live, 0).to(tl.int32)
    value_bits = tl.load(v.to(tl.pointer_type(tl.int16)) + at, live, 0).to(tl.int32)
    key_scale = (key_bits << 16).to(tl.float32, bitcast=True)
    return key_scale, (value_bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _add_tile(score, value, value_scale, m, total, acc):
    # the online softmax: m is the largest score of each row so far, total and acc are the sums of
    # weights and of weighted values in units of 2^m. masked scores are -1e30 and not -inf: a row
    # that sees no key in its first tiles has wrong sums, which the first visible key scales to 0
    m_new = tl.maximum(m, tl.max(score, 1))
    weight = tl.exp2(score - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    total = total * shrink + tl.sum(weight, 1)
    acc = acc * shrink[:, None]
    if value_scale is not None:  # one scale for each key position
        weight = weight * value_scale[None, :]
    if score.shape[0] == 1:  # a single row: memory is the limit, not arithmetic
        column = tl.reshape(weight, (value.shape[0], 1))
        acc += tl.sum(column * value.to(tl.float32), 0)[None, :]
    else:
        acc = tl.dot(weight.to(value.dtype), value, acc, input_precision="ieee")
    return m_new, total, acc


@triton.jit
def _combine(parts, lse, out, splits, D: tl.constexpr, BLOCK_D: tl.constexpr):
    # each split has its own softmax: out_s, and lse_s = log2 of its divisor. the divisor of all
    # keys is the sum of 2^lse_s, so the weight of split s is 2^lse_s / sum(2^lse)
    every = tl.arange(0, MAX_SPLITS)
    top = tl.max(tl.load(lse + every, every < splits, -1e30, cache_modifier=".cg"), 0)
    d = tl.arange(0, BLOCK_D)
    total, acc = tl.zeros((8,), tl.float32), tl.zeros((8, BLOCK_D), tl.float32)
    for start in range(0, splits, 8):
        s = start + tl.arange(0, 8)
        size = tl.load(lse + s, s < splits, -1e30, cache_modifier=".cg")
        weight = tl.where(s < splits, tl.exp2(size - top), 0.0)
        live = (s < splits)[:, None] & (d < D)[None, :]
        at = s[:, None] * D + d[None, :]
        acc += weight[:, None] * tl.load(parts + at, live, 0.0, cache_modifier=".cg")
        total += weight
    tl.store(out + d, tl.sum(acc, 0) / tl.sum(total, 0), d < D)


@triton.jit(do_not_specialize=VARIES)
def _decode(
    q, k, v, tables, seq_lens, out, parts, lse, counts, shared, other_splits,
    table_stride, block_stride, scale, window,
    N_KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, TILE: tl.constexpr, TOGETHER: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # one program: the query of one sequence, all query heads of one kv head, one split of the keys.
    # shared: None, or the result of prefixes.find_shared. with it there are two launches. in the
    # first (TOGETHER), a program has the queries of a tile of sequences and a split of their shared
    # keys. in the second, it has the query of one sequence and a split of its other keys.
    # other_splits: the number of splits in the other launch. the parts of shared keys come first
    head, sequence, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(2)  # a constexpr would need a kernel for each number
    d = tl.arange(0, BLOCK_D)
    g = tl.arange(0, BLOCK_G)  # BLOCK_G is 1, or a multiple of 16 that the matrix units take
    begin(PDL)
    # the visible keys are start .. seq_len - 1, and those of a row begin at `left`
    if TOGETHER:
        num_rows = tl.load(shared + tl.num_programs(1) + sequence)
        if num_rows == 0:  # another program computes the tile of this row, or it is in no tile
            return
        seq_len = tl.load(shared + sequence)
        row = sequence + g // GROUP
        is_row = g < num_rows * GROUP
        lengths = tl.load(seq_lens + row, is_row, 1 << 30)
        left = tl.where(window < 0, 0, tl.maximum(lengths - 1 - window, 0))
        start = tl.minimum(tl.min(left, 0), seq_len)
        left = left[:, None]
        rows = (row * N_KV + head) * GROUP + g % GROUP
    else:
        seq_len = tl.load(seq_lens + sequence)
        start = tl.where(window < 0, 0, tl.maximum(seq_len - 1 - window, 0))
        if shared is not None:
            num_shared = tl.load(shared + sequence)
            start = tl.maximum(start, num_shared)
        left = start
        rows = (sequence * N_KV + head) * GROUP + g
        is_row = g < GROUP
    # tiles lie on a fixed grid, and splits consist of full tiles
    first = start // TILE * TILE
    tiles = tl.cdiv(seq_len - first, TILE)
    lo = first + tl.cdiv(tiles, splits) * TILE * split
    hi = tl.minimum(lo + tl.cdiv(tiles, splits) * TILE, seq_len)
    live = is_row[:, None] & (d < D)[None, :]
    query = tl.load(q + rows[:, None] * D + d[None, :], live, 0.0)
    table = tables + sequence.to(tl.int64) * table_stride
    INT8: tl.constexpr = k.dtype.element_ty == tl.int8  # a scale of 2 bytes for each position
    WIDTH: tl.constexpr = D + 2 if INT8 else D
    k += head * (BLOCK_SIZE * WIDTH)
    v += head * (BLOCK_SIZE * WIDTH)
    m, total = tl.full((BLOCK_G,), -1e30, tl.float32), tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    if BLOCK_G == 1:
        # load a tile before the previous one is processed. otherwise the compiler waits for memory
        # several times in every tile
        key2, value2 = _keys(k, v, table, lo, hi, block_stride, D, BLOCK_SIZE, BLOCK_D, TILE)
        if INT8:
            ks2, vs2 = _scales(k, v, table, lo, hi, block_stride, D, BLOCK_SIZE, TILE)
    for tile in range(lo, hi, TILE):
        position = tile + tl.arange(0, TILE)
        if BLOCK_G == 1:
            key, value, ahead = key2, value2, tile + TILE
            key2, value2 = _keys(k, v, table, ahead, hi, block_stride, D, BLOCK_SIZE, BLOCK_D, TILE)
            if INT8:
                ks, vs = ks2, vs2
                ks2, vs2 = _scales(k, v, table, ahead, hi, block_stride, D, BLOCK_SIZE, TILE)
        else:  # a loop around matrix products is pipelined by the compiler
            key, value = _keys(k, v, table, tile, hi, block_stride, D, BLOCK_SIZE, BLOCK_D, TILE)
            if INT8:
                ks, vs = _scales(k, v, table, tile, hi, block_stride, D, BLOCK_SIZE, TILE)
        if INT8:
            key, value = key.to(query.dtype), value.to(query.dtype)
        visible = (position[None, :] >= left) & (position < hi)[None, :]
        if BLOCK_G == 1:
            score = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1)[None, :] * scale
        else:
            score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if INT8:
            score = tl.where(visible, score * ks[None, :], -1e30)
            m, total, acc = _add_tile(score, value, vs, m, total, acc)
        else:
            score = tl.where(visible, score, -1e30)
            m, total, acc = _add_tile(score, value, None, m, total, acc)
    # a split without keys (or a sequence of length 0) has total 0: it writes 0, and no NaN
    divisor = tl.where(total > 0, total, 1.0)
    acc = acc / divisor[:, None]
    if lse is None:
        tl.store(out + rows[:, None] * D + d[None, :], acc, live)
    else:
        all_splits = splits + other_splits
        part = rows.to(tl.int64) * all_splits + split
        if not TOGETHER:
            part += other_splits
        tl.store(parts + part[:, None] * D + d[None, :], acc, live)
        tl.store(lse + part, tl.where(total > 0, m, -1e30) + tl.log2(divisor), is_row)
        if not TOGETHER:
            # the last program that reaches this line combines all parts, which saves a launch. the
            # barrier orders the threads of this program, acquire and release order the programs
            tl.debug_barrier()
            count = counts + sequence * N_KV + head
            before = 0
            if splits > 1:
                before = tl.atomic_add(count, 1, sem="acq_rel")
            if before == splits - 1:
                if splits > 1:
                    tl.store(count, 0)  # for the next launch
                skip = 0  # the parts of shared keys, unless this row has such keys
                if shared is not None:
                    skip = tl.where(num_shared > 0, 0, other_splits)
                for i in range(GROUP):
                    row = ((sequence * N_KV + head) * GROUP + i).to(tl.int64)
                    part0 = row * all_splits + skip
                    to = out + row * D
                    _combine(parts + part0 * D, lse + part0, to, all_splits - skip, D, BLOCK_D)


@triton.jit(do_not_specialize=VARIES)
def _chunk(
    q, k, v, tables, seq_lens, cu_seqlens, out, first_sequence, num_sequences,
    table_stride, block_stride, scale, window,
    N_KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_Q neighbouring queries of one sequence and all query heads of one kv head.
    # the last queries see the most keys, so their programs start first
    BLOCK_Q: tl.constexpr = BLOCK_M // BLOCK_G
    head = tl.program_id(0)
    program = tl.num_programs(1) - 1 - tl.program_id(1)
    begin(PDL)
    # the grid depends on the numbers of rows and sequences alone. chunk i starts at row c_i and has
    # the programs from c_i // BLOCK_Q + i on, at most one more than it needs. counting finds the
    # last i that starts at or before this program: a binary search would wait for memory nine times
    cu_seqlens += first_sequence
    row0 = tl.load(cu_seqlens)
    i = -1
    for start in range(0, num_sequences, SEARCHED):
        s = start + tl.arange(0, SEARCHED)
        c = tl.load(cu_seqlens + s, s < num_sequences, 0)
        i += tl.sum(((s < num_sequences) & ((c - row0) // BLOCK_Q + s <= program)).to(tl.int32), 0)
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
    INT8: tl.constexpr = k.dtype.element_ty == tl.int8
    WIDTH: tl.constexpr = D + 2 if INT8 else D
    k += head * (BLOCK_SIZE * WIDTH)
    v += head * (BLOCK_SIZE * WIDTH)
    m, total = tl.full((BLOCK_M,), -1e30, tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for tile in range(lo, stop, TILE):
        position = tile + tl.arange(0, TILE)
        key, value = _keys(k, v, table, tile, stop, block_stride, D, BLOCK_SIZE, BLOCK_D, TILE)
        visible = (position[None, :] <= query[:, None]) & (position[None, :] >= left[:, None])
        if INT8:
            ks, vs = _scales(k, v, table, tile, stop, block_stride, D, BLOCK_SIZE, TILE)
            score = tl.dot(x, tl.trans(key.to(x.dtype)), input_precision="ieee") * scale
            score = tl.where(visible, score * ks[None, :], -1e30)
            m, total, acc = _add_tile(score, value.to(x.dtype), vs, m, total, acc)
        else:
            score = tl.dot(x, tl.trans(key), input_precision="ieee") * scale
            m, total, acc = _add_tile(tl.where(visible, score, -1e30), value, None, m, total, acc)
    # a row of a sequence of length 0 sees no key. it writes 0 and no NaN, which a later layer would
    # write into the null block. tiles that begin before a window read the null block
    tl.store(out + at, acc / tl.where(total > 0, total, 1.0)[:, None], live)


def make_counts(device: torch.device) -> torch.Tensor:
    """The counters of `paged_attention` for one stream; 0 between two launches."""
    size = launch.MAX_AT_ONCE * launch.card(device)[0]
    return torch.zeros(size, dtype=torch.int32, device=device)


@functools.lru_cache
def decodes_at_once(
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    constants: tuple[int, ...],
    options: tuple[int, int],
) -> int:
    """The number of programs of `_decode` that a multiprocessor runs at once, according to the
    compiled kernel and the card. Contexts are split so that about this number runs. dtypes: of the
    queries, and of K and V; constants: of the kernel; options: warps and stages."""
    if device.type != "cuda":  # the interpreter
        return 8
    num_warps, num_stages = options
    x, kv = (torch.empty(16, dtype=dtype, device=device) for dtype in dtypes)
    integers = torch.empty(16, dtype=torch.int32, device=device)
    parts = torch.empty(16, dtype=torch.float32, device=device)
    shared = integers if constants[-1] else None
    kernel = _decode.warmup(
        x, kv, kv, integers, integers, x, parts, parts, integers, shared, 0, 16, 16, 1.0, -1,
        *constants, num_warps=num_warps, num_stages=num_stages, grid=(1,), **launch.options(device),
    )  # fmt: skip
    return launch.programs_at_once(device, kernel, num_warps)


class DecodeLaunch(NamedTuple):
    """How `_decode` is launched: its last constants, warps and stages."""

    block_g: int  # rows of a program, query heads of one kv head
    tile: int  # keys at a time
    together: bool  # the shared keys of several sequences
    warps: int
    stages: int

    @classmethod
    def choose(cls, q, k, block_d: int, together: bool) -> "DecodeLaunch":
        """The best launch for these queries and keys. block_d: D, rounded up to a power of two."""
        group, is_wide = q.shape[1] // k.shape[1], q.element_size() == 4
        if group == 1 and not together:
            # one warp with 4 KB of keys at a time: many small programs fill the card. in int8 it
            # has 2 KB, because each number becomes a float32, and more would spill
            return cls(1, max(4096 // (block_d * max(k.element_size(), 2)), 1), False, 1, 3)
        block_g = max(16, triton.next_power_of_2(group))
        if together:
            # float32 has no matrix units, and more rows would spill
            most = 16 if is_wide else 32 if block_d > 128 else 64
            block_g = max(2 * triton.next_power_of_2(group), most)
        return cls(block_g, 16 if is_wide else min(8192 // block_d, 64), together, 4, 5)

    def num_splits(self, q, k, shape: tuple[int, ...], num_programs: int, longest: int) -> int:
        """The number of parts of a context of up to `longest` keys, so that programs fill the
        card. num_programs: programs without a split."""
        constants = (*shape, self.block_g, self.tile, self.together)
        options = (self.warps, self.stages)
        at_once = decodes_at_once(q.device, (q.dtype, k.dtype), constants, options)
        splits = round(at_once * launch.card(q.device)[0] / num_programs)
        return max(1, min(splits, triton.cdiv(longest, 64)))


def attend_decodes(q, k, v, batch, out, layout, num_splits, counts, prefixes) -> None:
    """Write the attention of the batch's decodes to `out`. layout: the arguments of `_decode` from
    table_stride to BLOCK_D; for the others see `paged_attention`."""
    decodes, n_head, D = batch.num_decodes, *q.shape[1:]
    n_kv, block_size = k.shape[1:3]
    shape = layout[4:]
    per_row = DecodeLaunch.choose(q, k, shape[-1], together=False)
    max_splits = MAX_SPLITS.value
    shared = None
    num_shared = 0  # splits of shared keys
    if prefixes is not None and decodes > 1:
        per_tile = DecodeLaunch.choose(q, k, shape[-1], together=True)
        max_rows = per_tile.block_g // (n_head // n_kv)  # of a tile
        shared = prefixes.find(batch, block_size, max_rows)
        max_splits //= 2
        num_programs = triton.cdiv(decodes, max_rows) * n_kv
        num_shared = per_tile.num_splits(q, k, shape, num_programs, batch.max_seq_len)
        num_shared = min(num_splits or num_shared, max_splits)
    splits = per_row.num_splits(q, k, shape, decodes * n_kv, batch.max_seq_len)
    splits = num_splits or min(splits, max_splits)
    parts = lse = None
    if splits + num_shared > 1:
        shape = (decodes, n_head, splits + num_shared)
        parts = torch.empty((*shape, D), dtype=torch.float32, device=q.device)
        lse = torch.empty(shape, dtype=torch.float32, device=q.device)
        counts = make_counts(q.device) if counts is None else counts
    assert splits + num_shared <= MAX_SPLITS.value, (splits, num_shared)
    assert splits == 1 or decodes * n_kv <= len(counts), (decodes, n_kv)
    launches = [(per_row, splits, num_shared)]
    if shared is not None:
        launches.insert(0, (per_tile, num_shared, splits))
    for choice, num_parts, num_others in launches:
        _decode[(n_kv, decodes, num_parts)](
            q, k, v, batch.block_tables, batch.seq_lens, out, parts, lse, counts, shared,
            num_others, *layout, *choice[:3],
            num_warps=choice.warps, num_stages=choice.stages, **launch.options(q.device),
        )  # fmt: skip


def paged_attention(
    q, k, v, batch, window, num_splits=None, fixed=False, counts=None, prefixes=None
):
    """Attention as attention.py describes it. Decodes go to one kernel, longer chunks to another.

    num_splits: programs that share the context of one decoding sequence, 64 at most; None: as many
    as fill the card. fixed: see fixed_attention. counts: see make_counts; None: new ones. prefixes:
    a SharedPrefixes, if decodes with the same first blocks read these once.
    The online softmax and the split of the context are FlashAttention's (Dao et al., 2022) and
    Flash-Decoding's (Dao et al., 2023), the block table PagedAttention's (Kwon et al., 2023).
    """
    T, n_head, D = q.shape
    n_kv, block_size = k.shape[1:3]
    tables, seq_lens = batch.block_tables, batch.seq_lens
    width = k.shape[3]  # in int8 two bytes for a scale, see fused/int8_cache.py
    assert width == (D + 2 if k.dtype == torch.int8 else D), k.shape
    assert k.stride()[1:] == (block_size * width, width, 1), k.stride()
    assert tables.stride(1) == 1, tables.stride()
    group, size = n_head // n_kv, q.element_size()
    block_d = max(16, triton.next_power_of_2(D))
    decodes = 0 if fixed else batch.num_decodes
    chunks = seq_lens.shape[0] - decodes
    _, memory, options = launch.card(q.device)
    scale = math.log2(math.e) / math.sqrt(D)  # the hardware computes exp2
    layout = tables.stride(0), k.stride(0), scale, window, n_kv, group, D, block_size, block_d
    out = torch.empty_like(q)
    if decodes:
        attend_decodes(q, k, v, batch, out, layout, num_splits, counts, prefixes)
    if chunks:
        block_g = triton.next_power_of_2(group)
        # small blocks for float32, which has no matrix units and spills. also for short prompts, if
        # a large block of 128 x 64 scores for each would compute more than the longest one needs
        longest, mean = batch.max_query_len * block_g, (T - decodes) // chunks * block_g
        short = mean <= 32 and longest * longest <= 128 * 64 * chunks
        block_m, tile, warps = (32, 32, 4) if size == 4 or short else (128, 64, 8)
        if fixed and size < 4:
            block_m, tile, warps = 64, 64, 4
        if block_d == 128 and (size == 4 or (fixed and memory <= 200_000)):
            warps = 8  # 4 warps have too few registers
        if block_d > 128:
            block_m, tile, warps = min(block_m, 64), tile // 2, 8
        block_m = max(block_m, block_g)
        # shared memory has the queries, two tiles of K and of V (three on Hopper and later, where
        # products are asynchronous), the look-ups, and the weights if warps share rows
        per_key = (6 if memory > 200_000 else 4) * block_d + block_m * (16 * warps > block_m)
        while tile > 16 and (tile * per_key + block_m * block_d) * size + 1024 > memory:
            tile //= 2
        blocks = (T - decodes) // (block_m // block_g) + chunks
        _chunk[(n_kv, blocks)](
            q, k, v, tables, seq_lens, batch.cu_seqlens, out, decodes, chunks, *layout,
            block_g, block_m, tile,
            # a look-up and a load are two stages of the compiler's pipeline. a tile is loaded while
            # another is processed only from 5 stages on; with 3 or 4 the kernel waits for each
            num_warps=warps, num_stages=5, **options,
        )  # fmt: skip
    return out


# one kernel for all rows: the bits of a row depend neither on the other rows of the batch nor on
# where its chunk begins, nor on whether it is a decode
fixed_attention = partial(paged_attention, fixed=True)
