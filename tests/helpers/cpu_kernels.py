"""What tests of the CPU's kernels share."""

import json
import math
from functools import cache

import numpy as np
import pytest
import torch

from microvllm import LLM
from microvllm.attention import PagedKVCache
from microvllm.checkpoint import find_step, read_checkpoint
from microvllm.cpu import gemm, low_bit_gemm
from microvllm.cpu.attention import paged_attention
from microvllm.cpu.backend import CpuBackend
from microvllm.cpu.gemm import Int8, PackedBfloat16, PackedInt8, PackedLinear, rotate

from .batches import hand_made_batch
from .goldens import MODEL, ROOT

CPU = torch.device("cpu")
BACKEND = CpuBackend(CPU, torch.float32)
has_tiles = pytest.mark.skipif(not gemm.TILE, reason="this processor has neither AVX2 nor AVX-512")
has_int8 = pytest.mark.skipif(not gemm.INT8_TILE, reason="this processor has no such instructions")
KINDS = [  # the latter two compile kernels that no test of the fast ones needs
    pytest.param(None, marks=has_tiles),
    pytest.param("bfloat16", marks=[has_tiles, pytest.mark.slow]),
    pytest.param("int8", marks=[has_int8, pytest.mark.slow]),
]


# matrix products


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed_linear(weight: torch.Tensor, **options) -> PackedLinear:
    return PackedLinear([weight], BACKEND, torch.float32, **options)


def halves(weight: torch.Tensor, **options) -> PackedBfloat16:
    return PackedBfloat16([weight], BACKEND, torch.bfloat16, **options)


def int8(parts, kind=PackedInt8, **options) -> PackedInt8 | Int8:
    return kind(parts, BACKEND, torch.float32, **options)


def unpacked_weight(tiles: torch.Tensor, rows: int) -> torch.Tensor:
    """The first rows of the matrix (out, in) that tiles (n, in, TILE) hold."""
    return tiles.transpose(1, 2).flatten(0, 1)[:rows]


def low_bit_linear(bits: int, parts: list, kind=None, **options):
    return (kind or low_bit_gemm.class_of(bits))(parts, BACKEND, torch.float32, **options)


def plain_low_bit(bits: int) -> type:
    """The class for processors without the instructions."""
    return type("Plain", (low_bit_gemm.PlainLowBit,), {"bits": bits})


def check_low_bit() -> None:
    """With other registers, or none: the rest of the module is not run there."""
    parts, x = [random(40, 100)], random(9, 100, seed=2)
    linear = low_bit_linear(4, parts)
    assert isinstance(
        linear, low_bit_gemm.PackedLowBit if gemm.INT8_TILE else low_bit_gemm.PlainLowBit
    )
    for rows in (1, 3, 9):
        torch.testing.assert_close(
            linear(x[:rows]), low_bit_linear(4, parts, plain_low_bit(4))(x[:rows])
        )


def check_rows_of_bfloat16(inputs) -> None:
    """What infinity and NaN make of a row stays in it, too."""
    packed, x = halves(random(200, inputs)), random(250, inputs, seed=2)
    alone = torch.cat([packed(x[i : i + 1]) for i in range(250)])
    for rows in (2, 7, 13, 16, 17, 32, 33, 64, 128, 250):
        assert torch.equal(packed(x[:rows]), alone[:rows]), rows
    x[1::2], x[3, 0] = torch.nan, torch.inf
    assert torch.equal(packed(x)[::2], alone[::2]) and packed(x)[1::2].isnan().all()


def check_rows_of_int8() -> None:
    made, x = int8([random(200, 1504)]), random(300, 1504, seed=2)
    alone = torch.cat([made(x[i : i + 1]) for i in range(300)])
    for rows in (2, 7, 12, 13, 64, 127, 128, 300):
        assert torch.equal(made(x[:rows]), alone[:rows]), rows


def check_int8_tiles() -> None:
    parts = [random(40, 64), random(24, 64, seed=1)]
    ours, theirs = int8(parts, rows=50), int8(parts, Int8, rows=50)
    x = random(9, 64, seed=2)
    if theirs.levels == 127:
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    else:  # oneDNN has steps of twice the size on this processor
        assert (ours(x) - theirs(x)).norm() < 0.03 * ours(x).norm()
    whole, _, scale = ours.weight
    integers = unpacked_weight(whole, 64).contiguous().view(torch.int8)
    kept = rotate(integers * scale[:64, None])
    torch.testing.assert_close(kept, torch.cat(parts), rtol=0, atol=0.1)
    ours.load([part + 1 for part in parts])
    exact = x @ (torch.cat(parts) + 1).T[:, :50]
    assert (ours(x) - exact).norm() / exact.norm() < 0.02


# attention

# (rows in this step, tokens in the cache after it): decodes, then chunks that begin at 0 and later
MIXED = [(1, 1), (1, 2), (1, 77), (1, 16), (1, 17), (5, 5), (16, 16), (17, 40), (33, 70), (2, 64)]


def attention_case(work, n_head=4, n_kv_head=2, head_dim=32, block_size=16):
    """Random q, k, v and a batch whose blocks lie anywhere in a cache that is otherwise NaN."""
    counts = [-(-length // block_size) for _, length in work]
    free = (1 + torch.randperm(sum(counts))).tolist()  # block 0 is the null block
    k, v = torch.full((2, 1 + sum(counts), n_kv_head, block_size, head_dim), torch.nan)
    chunks = []
    for (rows, length), count in zip(work, counts, strict=True):
        table = [free.pop() for _ in range(count)]
        chunks.append(([0] * length, length - rows, length, table))
        for i, block in enumerate(table):
            used = min(block_size, length - i * block_size)
            k[block, :, :used], v[block, :, :used] = torch.randn(2, n_kv_head, used, head_dim)
    q = torch.randn(sum(rows for rows, _ in work), n_head, head_dim)
    return q, k, v, hand_made_batch(chunks, block_size)


def dense_attention(q, k, v, batch, window):
    """Row by row in float64: gather what the row may see, score, softmax, average."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    out, block_size, group = np.empty_like(q), k.shape[2], q.shape[1] // k.shape[1]
    for b, length in enumerate(batch.seq_lens.tolist()):
        at = np.arange(length)
        blocks = batch.block_tables[b].numpy()[at // block_size]
        keys, values = (x[blocks, :, at % block_size].repeat(group, axis=1) for x in (k, v))
        first, stop = batch.cu_seqlens[b : b + 2].tolist()
        for row in range(first, stop):
            p = length - stop + row
            seen = slice(0 if window < 0 else max(0, p - window), p + 1)
            scores = np.einsum("hd,jhd->hj", q[row], keys[seen]) / math.sqrt(q.shape[2])
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            out[row] = np.einsum("hj,jhd->hd", weights, values[seen])
    return torch.from_numpy(out)


def check_attention(work, window, dtype=torch.float32, tiles=False, **shape):
    """tiles: the matrix unit rounds scaled queries, and then weights, to 8 bits of precision."""
    (q, k, v, batch), atol = attention_case(work, **shape), 3e-6
    k, v = k.to(dtype), v.to(dtype)
    got = paged_attention(q, k, v, batch, window)
    assert got.shape == q.shape and got.dtype == torch.float32 and got.is_contiguous()
    if tiles:
        scale = 1 / (math.sqrt(q.shape[2]) * math.log(2))
        q, atol = (
            (q * scale).bfloat16().double() / scale,
            atol + 2**-9 * v.nan_to_num().abs().max().item(),
        )
    torch.testing.assert_close(
        got.double(), dense_attention(q, k, v, batch, window), rtol=0, atol=atol
    )


# models


def weights_of(era) -> dict[str, torch.Tensor]:
    return read_checkpoint(era.directory, find_step(era.directory, None))[2]


def run(model, chunks, block_size: int = 16, hidden_rows=None):
    """(R, C) rows of the head, and the cache they leave."""
    cache = PagedKVCache(model.config, 12, block_size, model.cache_dtype, CPU)
    batch = hand_made_batch(chunks, block_size)
    if hidden_rows is not None:
        batch.hidden_rows = torch.tensor(hidden_rows, dtype=torch.int32)
    return model.forward(batch, cache), cache.data


@cache
def perplexity(model=MODEL, **options) -> float:
    """Of the bundled answers. model: the folder of a checkpoint."""
    rows = json.loads((ROOT / "models" / "prompts" / "oldbooks_instructions.json").read_text())
    rows = [row for row in rows if row["output"]][:40]
    with LLM(model, num_blocks=400, device="cpu", **options) as llm:
        render = llm.tokenizer.render_for_completion
        prompts = [render([{"role": "user", "content": row["instruction"]}]) for row in rows]
        found = sum(llm.score(prompts, [row["output"] for row in rows]), [])
    assert len(found) > 2000
    return math.exp(-sum(found) / len(found))
