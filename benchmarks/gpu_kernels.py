"""The speed of each GPU kernel, compared with the limits of the card.

    python benchmarks/gpu_kernels.py                          # all parts
    python benchmarks/gpu_kernels.py --only decode,few-rows   # some of them
    python benchmarks/gpu_kernels.py --compile                # first compile in several processes

The shapes are those of nanochat's d34 (34 layers, 2,176 channels, 17 heads of 128, vocabulary
65,536), in bfloat16. A CUDA graph of many launches is timed. Each launch uses other memory, so that
no cache helps. The bytes of a launch are those that it must read and write, and its FLOPs are those
of its products. The speeds are compared with those of a copy and of a matrix product in the same
run. "default" is the package's own launch; the lines after it have other tiles, warps and splits.
The last line of the output has all results as JSON.

The parts:
    decode    paged attention of sequences with one row each
    chunk     paged attention of prompts
    fused     the steps between the matrix products
    sample    from logits to tokens
    few-rows  products of a few rows fused with norm, add and relu2, compared with cuBLAS; and a
              full decode step of one row with each of them, with and without an early start of
              kernels (an engine times the same choices when it starts, see graphs.py)

It needs a CUDA device: without one it prints a message and exits with 2.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # runs from a clone

import torch

if __name__ == "__main__" and not torch.cuda.is_available():  # triton may be missing, too
    print("benchmarks/gpu_kernels.py needs a CUDA device, and torch finds none", file=sys.stderr)
    sys.exit(2)

import torch.nn.functional as F
import triton
from gpu import copy_bandwidth, describe, free_memory, median_seconds, product_peak, say

from microvllm.gpu import attention, elementwise, launch, sampler
from microvllm.gpu.elementwise import linear_add, norm_linear
from microvllm.gpu.prefixes import SharedPrefixes

LAYERS, WIDTH, HEADS, DIM, VOCAB, BLOCK_SIZE = 34, 2176, 17, 128, 65536, 16
EPS, SCALE = 2.0**-23, math.log2(math.e) / math.sqrt(DIM)
BEYOND_CACHE = 300_000_000  # bytes between two uses of the same memory


class Case(NamedTuple):
    """A kernel launch to time."""

    name: str
    launch: Callable[[int], object]  # the i-th launch, with the i-th memory
    amount: float  # bytes or FLOPs of one launch
    unit: str = "TB/s"  # or "TFLOP/s"
    launches: int = 20  # launches in the timed graph


# inputs -------------------------------------------------------------------------------------------


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def options() -> dict:
    """Arguments of every launch of the package's kernels."""
    return launch.options(device())


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device()).normal_(0, scale)


def ints(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=device())


class Paged:
    """A batch and its KV cache. sequences: (rows, tokens in the cache) of each, decodes first;
    layers: number of layers in the cache; shared: length of the prefix whose blocks are shared."""

    def __init__(
        self, sequences: list[tuple[int, int]], layers: int | None = None, shared: int = 0
    ):
        rows, lengths = zip(*sequences, strict=True)
        self.kv_bytes = sum(lengths) * HEADS * DIM * 4
        self.layers = layers or max(1, min(LAYERS, BEYOND_CACHE // self.kv_bytes))
        blocks = [-(-n // BLOCK_SIZE) for n in lengths]
        self.cache = random(self.layers, 2, sum(blocks) + 1, HEADS, BLOCK_SIZE, DIM)
        # block 0 is the null block; the blocks of a sequence are not adjacent
        order = torch.randperm(sum(blocks)) + 1
        tables = torch.zeros(len(rows), max(blocks), dtype=torch.int32)
        for b, part in enumerate(order.split(blocks)):
            tables[b, : len(part)] = part
        tables[:, : shared // BLOCK_SIZE] = tables[0, : shared // BLOCK_SIZE]
        firsts = [sum(rows[:i]) for i in range(len(rows) + 1)]
        positions = [p for r, n in sequences for p in range(n - r, n)]
        owners = [b for b, r in enumerate(rows) for _ in range(r)]
        slots = [int(tables[b, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE
                 for b, p in zip(owners, positions, strict=True)]  # fmt: skip
        self.batch = SimpleNamespace(
            token_ids=ints([5] * sum(rows)), positions=ints(positions), slots=ints(slots),
            cu_seqlens=ints(firsts), seq_lens=ints(lengths), block_tables=tables.to(device()),
            num_decodes=rows.count(1), max_query_len=max(rows), max_seq_len=max(lengths),
        )  # fmt: skip
        self.q = random(sum(rows), HEADS, DIM)
        self.out, self.counts = torch.empty_like(self.q), attention.make_counts(device())

    def layer(self, i: int) -> torch.Tensor:
        return self.cache[i % self.layers]

    def attend(self, i: int, prefixes: SharedPrefixes | None = None) -> None:
        attention.paged_attention(
            self.q, *self.layer(i), self.batch, -1, counts=self.counts, prefixes=prefixes
        )

    def decode(self, tile: int, warps: int, splits: int, units: bool, i: int) -> None:
        (k, v), batch, count = self.layer(i), self.batch, len(self.q)
        parts = lse = None
        if splits > 1:
            shape = (count, HEADS, splits)
            parts = torch.empty((*shape, DIM), dtype=torch.float32, device=k.device)
            lse = torch.empty(shape, dtype=torch.float32, device=k.device)
        attention._decode[(HEADS, count, splits)](
            self.q, k, v, batch.block_tables, batch.seq_lens, self.out, parts, lse, self.counts,
            None, 0, batch.block_tables.stride(0), k.stride(0), SCALE, -1,
            HEADS, 1, DIM, BLOCK_SIZE, DIM, 16 if units else 1, tile, False,
            num_warps=warps, num_stages=5, **options(),
        )  # fmt: skip

    def chunk(self, block_m: int, tile: int, warps: int, stages: int, i: int) -> None:
        (k, v), batch, count = self.layer(i), self.batch, len(self.batch.seq_lens)
        attention._chunk[(HEADS, len(self.q) // block_m + count)](
            self.q, k, v, batch.block_tables, batch.seq_lens, batch.cu_seqlens, self.out, 0, count,
            batch.block_tables.stride(0), k.stride(0), SCALE, -1, HEADS, 1, DIM, BLOCK_SIZE, DIM, 1,
            block_m, tile, num_warps=warps, num_stages=stages, **options(),
        )  # fmt: skip


# the parts ----------------------------------------------------------------------------------------


def decode_cases() -> Iterator[Case]:
    many = [(16, 1, 1), (32, 1, 1), (32, 2, 1), (64, 2, 1), (64, 4, 1), (32, 4, 1)]
    some = [(16, 1, 1), (16, 1, 2), (16, 1, 4), (32, 1, 4), (32, 2, 1), (32, 2, 4), (64, 4, 4)]
    few = [(16, 1, 1), (16, 1, 4), (16, 1, 8), (16, 1, 16), (32, 1, 8), (32, 2, 8), (64, 4, 4)]
    long = [(16, 1, 16), (16, 1, 32), (32, 1, 16), (32, 2, 16), (32, 2, 32), (64, 4, 8)]
    for count, longest, sizes in (
        (512, 88, many), (512, 512, many), (64, 1024, some), (1, 256, few), (1, 2000, long)
    ):  # fmt: skip
        least = longest if count == 1 else longest // 2
        lengths = torch.randint(least, longest + 1, (count,)).tolist()
        paged = Paged([(1, n) for n in lengths])
        name = f"{count} x {longest}"
        yield Case(f"{name} default", paged.attend, paged.kv_bytes)
        for tile, warps, splits in sizes:
            for units in (False, True):  # with the matrix units; one query fills 1 of their 16 rows
                yield Case(
                    f"{name} tile {tile} warps {warps} splits {splits}{' matrix unit' * units}",
                    partial(paged.decode, tile, warps, splits, units),
                    paged.kv_bytes,
                )

    for count, longest, shared in (512, 320, 256), (64, 1024, 768), (8, 2000, 1900):
        paged = Paged([(1, longest)] * count, shared=shared)
        shared_prefixes = SharedPrefixes()
        shared_prefixes.find(paged.batch, BLOCK_SIZE, 64)  # once for all layers of a step
        for prefixes in None, shared_prefixes:
            name = f"{count} x {longest} shared {shared}{' read once' * (prefixes is not None)}"
            yield Case(name, partial(paged.attend, prefixes=prefixes), paged.kv_bytes)


def chunk_cases() -> Iterator[Case]:
    large = [(64, 64, 4, 3), (64, 64, 4, 5), (128, 64, 8, 3), (128, 64, 8, 5), (128, 128, 8, 3)]
    small = [(16, 32, 1, 3), (16, 64, 4, 3), (32, 32, 2, 3), (32, 32, 4, 3), (32, 32, 4, 5)]
    prompts = torch.randint(6, 41, (256,)).tolist()
    for name, sequences, sizes in (
        ("1 x 2048", [(2048, 2048)], large),
        ("4 x 2048", [(2048, 2048)] * 4, large),
        ("256 x 23", [(n, n) for n in prompts], small),
    ):
        paged = Paged(sequences)
        pairs = sum(rows * n - rows * (rows - 1) // 2 for rows, n in sequences)
        flops = 4 * HEADS * DIM * pairs  # two products, each with a multiplication and an addition
        yield Case(f"{name} default", paged.attend, flops, "TFLOP/s")
        for block_m, tile, warps, stages in sizes:
            yield Case(
                f"{name} rows {block_m} tile {tile} warps {warps} stages {stages}",
                partial(paged.chunk, block_m, tile, warps, stages),
                flops,
                "TFLOP/s",
            )


def fused_cases() -> Iterator[Case]:
    one = torch.ones((), device=device())
    for rows in (1, 512, 4096):
        x = random(4, rows, WIDTH)
        x0, y, x_new, h = (random(rows, WIDTH) for _ in range(4))
        wide, qkv = random(4, rows, 4 * WIDTH), random(4, rows, 3 * WIDTH)
        # add_norm reads three arrays and writes two

        def add_norm(i, x=x, y=y, x0=x0):
            elementwise.add_norm(x[i % 4], y, x0, one, one, EPS)

        def add_norm_with(warps, i, x=x, y=y, x0=x0, x_new=x_new, h=h):
            elementwise._add_norm[(len(x0),)](
                x[i % 4], y, x0, one, one, x_new, h, EPS, WIDTH, triton.next_power_of_2(WIDTH),
                num_warps=warps, **options(),
            )  # fmt: skip

        yield Case(f"add_norm {rows} default", add_norm, rows * WIDTH * 10)
        for warps in (4, 8, 16):
            name = f"add_norm {rows} warps {warps}"
            yield Case(name, partial(add_norm_with, warps), rows * WIDTH * 10)

        def relu2(i, wide=wide):
            elementwise.relu2(wide[i % 4])

        def relu2_with(block, warps, i, wide=wide):
            count = wide[0].numel()
            grid = (triton.cdiv(count, block),)
            elementwise._relu2[grid](wide[i % 4], count, block, num_warps=warps, **options())

        yield Case(f"relu2 {rows} default", relu2, rows * WIDTH * 16)
        for block, warps in ((1024, 4), (2048, 4), (4096, 4), (4096, 8)):
            name = f"relu2 {rows} block {block} warps {warps}"
            yield Case(name, partial(relu2_with, block, warps), rows * WIDTH * 16)

        paged = Paged([(1, 1)] * rows, layers=1)
        ve, gate = random(VOCAB, WIDTH), random(HEADS, 32)
        cos, sin = torch.rand(2, 1, DIM // 2, device=device())

        def rope_store(ve, gate, i, paged=paged, qkv=qkv, h=h, cos=cos, sin=sin):
            k, v = paged.layer(0)
            elementwise.rope_store(
                qkv[i % 4], h, ve, gate, cos, sin, paged.batch, k, v, HEADS, 1.2, 3.0, EPS
            )

        yield Case(f"rope_store {rows}", partial(rope_store, None, None), rows * WIDTH * 12)
        name = f"rope_store {rows} value embeddings"  # of one token, so they are in the cache
        yield Case(name, partial(rope_store, ve, gate), rows * WIDTH * 12)


def sample_cases() -> Iterator[Case]:
    default = sampler.SAMPLE_CHUNK

    def sample(chunk, logits, temperature, u, i, drop=None):
        sampler.SAMPLE_CHUNK = chunk
        sampler.sample(logits[i % len(logits)], temperature, u, 15.0, drop)
        sampler.SAMPLE_CHUNK = default

    for rows in (1, 512):
        logits = random(3, rows, VOCAB, scale=3.0)
        inputs = logits, torch.full((rows,), 0.7, device=device()), torch.rand(rows).to(device())
        for chunk in (default, 1024, 4096):
            name = f"{rows} rows chunk {chunk}{' default' * (chunk == default)}"
            yield Case(name, partial(sample, chunk, *inputs), rows * VOCAB * 2)
        for name, *filters in ("top_k 50", 50, 1, 0), ("top_p 0.9", 0, 0.9, 0):
            drop = torch.tensor(filters, device=device())[:, None].expand(3, rows).contiguous()
            run = partial(sample, default, *inputs, drop=drop)
            yield Case(f"{rows} rows {name} default", run, rows * VOCAB * 2)


def few_rows_cases() -> Iterator[Case]:
    def cublas(x, w, i):
        F.linear(x, w[i % len(w)])

    def run_norm_linear(x, w, relu2, tiles, i):
        norm_linear(x, w[i % len(w)], EPS, relu2=relu2, **tiles)

    def run_linear_add(x, w, stream, tiles, i):
        linear_add(x, w[i % len(w)], stream, **tiles)

    tile_sizes = [(1, 1), (2, 1), (4, 1), (8, 2), (8, 4)]
    for name, n, k, norm, sizes in (
        ("qkv", 3 * WIDTH, WIDTH, True, tile_sizes),
        ("proj", WIDTH, WIDTH, False, tile_sizes),
        ("fc", 4 * WIDTH, WIDTH, True, tile_sizes),
        ("mlp", WIDTH, 4 * WIDTH, False, [(1, 2), (1, 4), (2, 4), (2, 8), (4, 4)]),
        ("head", VOCAB, WIDTH, True, tile_sizes),
    ):
        w = random(max(2, BEYOND_CACHE // (2 * n * k)), n, k)
        for rows in (1, 2, 4, 8):
            x, stream = random(rows, k), random(rows, n)
            if norm:
                launch = partial(run_norm_linear, x, w, name == "fc")
            else:
                launch = partial(run_linear_add, x, w, stream)
            label = f"{name} {rows} row{'s' * (rows > 1)}"
            yield Case(f"{label} cublas", partial(cublas, x, w), 2 * n * k)
            yield Case(f"{label} few-rows", partial(launch, {}), 2 * n * k)
            for outputs, warps in sizes if rows == 1 else ():
                tiles = {"outputs": outputs, "warps": warps}
                case = f"{label} few-rows outputs {outputs} warps {warps}"
                yield Case(case, partial(launch, tiles), 2 * n * k)
    yield from step_cases()


def step_cases() -> Iterator[Case]:
    """A decode step of one row at context 192: all layers, the head and the sampler."""
    shapes = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]
    weights = [[random(*shape, scale=0.02) for shape in shapes] for _ in range(LAYERS)]
    head, x_in = random(VOCAB, WIDTH, scale=0.02), random(1, WIDTH)
    paged = Paged([(1, 192)], LAYERS)
    paged.batch.max_seq_len = 2048  # as in a graph, for which the length is not known
    cos, sin = torch.rand(2, 192, DIM // 2, device=device())
    temperature, u = torch.full((1,), 0.7, device=device()), torch.rand(1).to(device())

    def attend(qkv, h, i):
        rest = (HEADS, 1.0, 1.0, EPS)
        k, v = paged.layer(i)
        q = elementwise.rope_store(qkv, h, None, None, cos, sin, paged.batch, k, v, *rest)
        y = attention.paged_attention(q, k, v, paged.batch, -1, counts=paged.counts)
        return y.view(1, WIDTH)

    def with_cublas():
        x, y = x_in, None
        for i, (qkv, proj, fc, mlp) in enumerate(weights):
            x, h = elementwise.add_norm(x, y, None, None, None, EPS)
            y = F.linear(attend(F.linear(h, qkv), h, i), proj)
            x, h = elementwise.add_norm(x, y, None, None, None, EPS)
            y = F.linear(elementwise.relu2(F.linear(h, fc)), mlp)
        return F.linear(elementwise.add_norm(x, y, None, None, None, EPS)[1], head)

    def with_few_rows(outputs):  # per program: of all products, and of the MLP's second one
        x, tiles, mlp_tiles = x_in, *({"outputs": n} for n in outputs)
        for i, (qkv, proj, fc, mlp) in enumerate(weights):
            x = linear_add(attend(*norm_linear(x, qkv, EPS, **tiles), i), proj, x, **tiles)
            x = linear_add(norm_linear(x, fc, EPS, relu2=True, **tiles)[0], mlp, x, **mlp_tiles)
        return norm_linear(x, head, EPS, **tiles)[0]

    def step(logits, early, i):
        with launch.early_start(early):
            sampler.sample(logits(), temperature, u, 15.0)

    bytes_read = 2 * (LAYERS * 12 * WIDTH * WIDTH + VOCAB * WIDTH)
    outputs = (4, 1), (4, 4), (2, 1), (2, 2), (1, 1)  # the package uses the first
    variants = {f"few-rows outputs {n}": partial(with_few_rows, n) for n in outputs}
    for name, logits in {"cublas": with_cublas, **variants}.items():
        for early in (False, True):
            case = f"step {name}{' early start' * early}"
            yield Case(case, partial(step, logits, early), bytes_read, launches=1)


PARTS = {
    "decode": decode_cases, "chunk": chunk_cases, "fused": fused_cases, "sample": sample_cases,
    "few-rows": few_rows_cases,
}  # fmt: skip


# execution ----------------------------------------------------------------------------------------


def compile_share(parts: list[str], share: int, shares: int) -> None:
    """Launch every shares-th case once, so that its kernels are compiled and kept on disk."""
    for part in parts:
        for i, case in enumerate(PARTS[part]()):
            if i % shares == share:
                case.launch(0)
        free_memory()


def compile_all(parts: list[str]) -> None:
    shares = min(8, os.cpu_count() or 1)  # each process has its own inputs of about 5 GB
    with ProcessPoolExecutor(shares, get_context("spawn")) as pool:
        for done in [pool.submit(compile_share, parts, i, shares) for i in range(shares)]:
            done.result()


def measure(case: Case, ceilings: dict[str, float]) -> dict:
    """Time one case and print its line."""

    def run():
        for i in range(case.launches):
            case.launch(i)

    seconds = median_seconds(run, device()) / case.launches
    speed = case.amount / seconds
    share = speed / ceilings[case.unit]
    say(f"{case.name:45} {seconds * 1e6:9.1f} us {speed / 1e12:8.2f} {case.unit:8} {share:6.1%}")
    return {"case": case.name, "us": round(seconds * 1e6, 2), "unit": case.unit,
            "speed": round(speed / 1e12, 3), "share": round(share, 3)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help=f"parts to run, of {','.join(PARTS)} (default: all)")
    parser.add_argument("--compile", action="store_true", help="first compile in several processes")
    args = parser.parse_args()
    parts = args.only.split(",") if args.only else list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; use {', '.join(PARTS)}")
    facts = describe(device())
    say(", ".join(f"{name} {value}" for name, value in facts.items()))
    if args.compile:
        compile_all(parts)
    ceilings = {
        "TB/s": copy_bandwidth(device()),
        "TFLOP/s": product_peak(8192, device(), torch.bfloat16),
    }
    free_memory()
    say(", ".join(f"ceiling {value / 1e12:.2f} {unit}" for unit, value in ceilings.items()))
    results = {}
    for part in parts:
        say(f"\n{part}")
        torch.manual_seed(0)
        results[part] = [measure(case, ceilings) for case in PARTS[part]()]
        free_memory()
    measured = {unit: round(value / 1e12, 3) for unit, value in ceilings.items()}
    say(json.dumps({"benchmark": "kernels"} | facts | {"ceilings": measured} | results))


if __name__ == "__main__":
    main()
