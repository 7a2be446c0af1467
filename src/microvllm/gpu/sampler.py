"""The draw of microvllm/sampler.py, which reads most logits only once, and its filters without a
sort."""

import torch
import triton
import triton.language as tl

from . import launch
from .launch import VARIES, begin

SAMPLE_CHUNK = 2048  # vocabulary entries per program of the sampler: fixed, so sums do not vary
SAMPLE_TILE = 4096  # entries that `_truncate` reads at a time, and the most that it searches


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
    begin(PDL)
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
    # float32 numbers as integers in the same order; both zeros are equal. SHIFT: low bits to drop,
    # 16 for bfloat16, whose lower half as a float32 is zero
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, ~bits, bits | 0x80000000) >> SHIFT


@triton.jit
def _least(
    logits, low, limit, top, temperature, softcap, V,
    COUNT: tl.constexpr, TILE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    # the smallest key for which all larger keys together weigh less than `limit`. with COUNT a key
    # weighs 1, else its share of the probability (0 below `low`). each pass finds two bits, from
    # the highest down
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


@triton.jit
def _gather(logits, few, num_largest, V, TILE: tl.constexpr, SHIFT: tl.constexpr):
    # write the largest logits, at least `num_largest` if there are as many, to `few`, up to TILE of
    # them. returns their number, which may be above TILE. each lane has the maximum of its logits.
    # the limit is the num_largest-th largest of these maxima, so at least num_largest logits are
    # not below it
    lane = tl.arange(0, TILE)
    best = tl.full((TILE,), float("-inf"), tl.float32)
    for start in range(0, V, TILE):
        x = tl.load(logits + start + lane, start + lane < V, float("-inf")).to(tl.float32)
        best = tl.maximum(best, x)
    tl.store(few + lane, best)
    tl.debug_barrier()  # other threads read these values
    low = tl.full((), 0, tl.uint32)
    low = _least(few, low, num_largest, 0.0, 1.0, 0.0, TILE, True, TILE, SHIFT)
    tl.debug_barrier()
    count = tl.full((), 0, tl.int32)
    for start in range(0, V, TILE):
        x = tl.load(logits + start + lane, start + lane < V, float("-inf")).to(tl.float32)
        chosen = (_key(x, SHIFT) >= low) & (x > float("-inf"))
        at = count + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(few + at, x, chosen & (at < TILE))
        count += tl.sum(chosen.to(tl.int32), 0)
    tl.debug_barrier()
    return count


@triton.jit
def _weigh(
    logits, low, min_p, top, temperature, softcap, V, TILE: tl.constexpr, SHIFT: tl.constexpr
):
    # (the weight of all keys from `low` on, the smallest key that weighs min_p or more)
    total = tl.zeros((TILE,), tl.float32)
    least = tl.full((TILE,), 0xFFFFFFFF, tl.uint32)
    for start in range(0, V, TILE):
        i = start + tl.arange(0, TILE)
        x = tl.load(logits + i, i < V, float("-inf")).to(tl.float32)
        key, weight = _key(x, SHIFT), _chunk_weights(x, top, temperature, softcap)
        total += tl.where(key >= low, weight, 0.0)
        least = tl.minimum(least, tl.where(weight >= min_p, key, least))
    return tl.sum(total, 0), tl.min(least, 0)


@triton.jit(do_not_specialize=VARIES)
def _truncate(
    logits, temperatures, top_ks, top_ps, min_ps, tops, sums, lows, few, softcap, V, CHUNKS,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # each filter keeps the most likely tokens, so the filters of a row keep all keys that are not
    # below one key, lows[row]. a program finds this key, then it weighs the row's chunks again
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    begin(PDL)
    temperature = tl.load(temperatures + row)
    top_k, top_p, min_p = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row)
    low = tl.full((), 0, tl.uint32)
    if (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0)):
        logits += row * V
        tops += row * CHUNKS
        few += row * TILE
        top = tl.max(tl.load(tops + j, j < CHUNKS, float("-inf")), 0)
        # a search reads its numbers once for every two bits, so it reads only the few largest if
        # they are enough
        num_largest = tl.where(top_k > 0, tl.minimum(top_k, TILE // 2), TILE // 2)
        num_few = _gather(logits, few, num_largest, V, TILE, SHIFT)
        source, n = logits, V
        if (top_k > 0) & (top_k <= num_largest) & (num_few <= TILE):
            source, n = few, num_few
        if top_k > 0:
            low = _least(source, low, top_k, top, temperature, softcap, n, True, TILE, SHIFT)
        if (top_p < 1) | (min_p > 0):
            total, least = _weigh(source, low, min_p, top, temperature, softcap, n, TILE, SHIFT)
            if top_p < 1:
                limit, most = top_p * total, tl.minimum(num_few, TILE)
                held, _ = _weigh(few, low, 2.0, top, temperature, softcap, most, TILE, SHIFT)
                if (held >= limit) & (num_few <= TILE):
                    source, n = few, num_few
                low = _least(source, low, limit, top, temperature, softcap, n, False, TILE, SHIFT)
            if min_p > 0:
                low = tl.maximum(low, least)
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
    # (the first index with a weight whose running sum exceeds target, the sum before it). if
    # rounding leaves no such index, it is the last one with a weight
    running = tl.cumsum(weight, 0)
    last = tl.max(tl.where(weight > 0, index, 0), 0)
    first = tl.min(tl.where((running > target) & (weight > 0), index, last), 0)
    return first, tl.sum(tl.where(index < first, weight, 0.0), 0)


@triton.jit(do_not_specialize=VARIES)
def _sample_pick(
    logits, temperatures, us, tops, ids, sums, lows, tokens, softcap, V, CHUNKS,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    begin(PDL)
    temperature = tl.load(temperatures + row)
    top = tl.load(tops + row * CHUNKS + j, j < CHUNKS, float("-inf"))
    best = tl.max(top, 0)
    if temperature > 0:
        share = tl.load(sums + row * CHUNKS + j, j < CHUNKS, 0.0)
        share *= _chunk_weights(top, best, temperature, softcap)
        target = tl.load(us + row) * tl.sum(share, 0)
        chunk, before = _first(share, j, target)
        # the same inside the chunk, in units of its own largest weight
        i = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + row * V + i, i < V, float("-inf")).to(tl.float32)
        unit = tl.load(tops + row * CHUNKS + chunk)
        target = (target - before) / _chunk_weights(unit, best, temperature, softcap)
        weight = _chunk_weights(x, unit, temperature, softcap)
        if lows is not None:
            low = tl.load(lows + row).to(tl.uint32, bitcast=True)
            weight = tl.where(_key(x, SHIFT) >= low, weight, 0.0)
        token, _ = _first(weight, i, target)
    else:  # chunks lie in id order: the first that holds the maximum holds the lowest such id
        chunk = tl.min(tl.where(top == best, j, CHUNKS - 1), 0)
        token = tl.load(ids + row * CHUNKS + chunk)
    tl.store(tokens + row, tl.where(best > float("-inf"), token, -1))  # -1: all are NaN or -inf


def sample(logits, temperature, u, softcap, filters=None):
    """One token per row, (R,) int32: the first id whose cumulative probability exceeds u.

    logits (R, V) before the softcap; softcap: 0 for none. temperature (R,) float32, 0 for the most
    likely token (of equal ones, the lowest id). u (R,) float32 in [0, 1). filters: top_k, top_p and
    min_p, each (R,) float32; 0, 1 and 0 are off; None: all are off. An id of probability 0 is never
    returned; -1 if all logits of a row are NaN or -inf.

    The logits are read once, and the chunk of the drawn token twice. Rows with filters are read
    four or five times, mostly from the cache. If a filter keeps more than about 2,000 logits, the
    row is read up to 23 times (39 times in float32, whose keys have more bits).
    """
    R, V = logits.shape
    logits, device = logits.contiguous(), logits.device
    options, chunks = launch.options(device), triton.cdiv(V, SAMPLE_CHUNK)
    tops, sums = torch.empty((2, R, chunks), dtype=torch.float32, device=device)
    ids = torch.empty((R, chunks), dtype=torch.int32, device=device)
    tokens = torch.empty((R,), dtype=torch.int32, device=device)
    _sample_chunks[(R, chunks)](
        logits, temperature, tops, ids, sums, softcap, V, SAMPLE_CHUNK, num_warps=4, **options
    )
    block, lows = triton.next_power_of_2(chunks), None
    shift = 16 if logits.dtype == torch.bfloat16 else 0
    if filters is not None:
        assert filters[0].stride(0) == 1, "filters are read by their addresses"
        lows, few = tokens.new_empty((R,)), logits.new_empty((R, SAMPLE_TILE))
        _truncate[(R,)](
            logits, temperature, *filters, tops, sums, lows, few, softcap, V, chunks,
            SAMPLE_CHUNK, SAMPLE_TILE, block, shift, num_warps=16, **options,
        )  # fmt: skip
    _sample_pick[(R,)](
        logits, temperature, u, tops, ids, sums, lows, tokens, softcap, V, chunks,
        SAMPLE_CHUNK, block, shift, num_warps=8, **options,
    )  # fmt: skip
    return tokens
