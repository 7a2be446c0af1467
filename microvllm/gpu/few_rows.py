"""Matrix products of a few rows, with the norm before them or the addition and relu^2 after them.

Such a product is little more than reading the weights once, and these kernels ask for all of theirs
before the kernel in front has ended.
"""

import torch
import triton
import triton.language as tl

from . import launch
from .launch import VARIES, release, wait


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
    release(PDL)
    at = w + n.to(tl.int64)[:, None] * K + c
    tiles = ()
    for t in tl.static_range(TILES):
        live = (n < N)[:, None] & (t * BLOCK_K + c < K)
        tiles = tiles + (tl.load(at + t * BLOCK_K, live, 0.0, eviction_policy="evict_first"),)
    wait(PDL)
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
        outputs, block_k, triton.cdiv(k, block_k), num_warps=warps, **launch.options(x.device),
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
