"""The throughput of `LLM.generate` on a GPU, compared with the limit of the card.

    python benchmarks/gpu.py                          # all parts, nanochat's d34
    python benchmarks/gpu.py --only headline,single --checkpoint /tmp/d34    # keep the model
    python benchmarks/gpu.py --device cpu --depth 2 --width 64 --head-dim 32 --vocab 512 \\
        --shrink 32 --num-blocks 512                  # only test that it runs

Every number is printed as soon as it is known. The last line of the output has all of them as JSON.
The model is a random checkpoint made by checkpoint.py. Prompts are random ids, drawn again for each
repeat, so that no repeat finds its prompts in the prefix cache. All tokens are sampled at
temperature 0.7, and end tokens are ignored. A number is the median of --repeats, by wall time.
card_seconds in the JSON is the time between two CUDA events around the last repeat.

The limit. A step in which r rows are computed and s of them sampled takes at least

    body(r) + head(s) + kv / copy bandwidth

body and head: the matrix products of all layers and of the output head, timed here in a CUDA graph
for some numbers of rows, with linear interpolation. kv: the bytes of K and V that the sequences of
the step attend to, read once; of n tokens, each layer attends to min(n, window + 1). The limit of a
workload is the sum over the steps of an ideal schedule: first come first served, at most
--max-batch-size sequences at once, a finished sequence is replaced at once, a prompt is computed
completely in one step, and the pool is unlimited. Norms, softmax, sampling, launches and Python
cost nothing in it, so 100 % cannot be reached. For one stream, the products are replaced by the
bytes of the weights divided by the copy bandwidth, which is stricter.

The parts:
    startup   from the start of a process to its first token, without and with compiled kernels
    headline  512 prompts of 6 to 77 tokens (mean 23), 64 new tokens each
    single    one prompt of 128, 128 new
    filtered  headline and single with top_k=50, as the command line samples by default
    mixed     1,000 requests of log-normal lengths, with means of 135 in and 306 out, at most 1,024;
              as in recorded chats, the spread of prompts (sigma 0.9) is larger than that of answers
              (0.55)
    prefill   one prompt of 2,048 tokens, one new token
    prefix    128 prompts that share 256 tokens and own 16, 32 new: without the prefix cache; with
              it and a new prefix; and with it and a cached prefix
    deterministic  headline and single with deterministic=True
    quantized headline and single in float8 (int8 on a CPU), relative to the limit of products that
              are not quantized; and the perplexity of the bundled answers by the bundled model
    peers     other programs: generate and generate_batch of transformers, if transformers and
              psutil are installed; and an eager loop like nanochat's Engine, which runs one prompt
              at a time, or ("samples") 512 samples of one prompt
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # runs from a clone

import numpy as np
import torch
import torch.nn.functional as F
from checkpoint import SPECIAL, add_shape_arguments, make_checkpoint, shape
from cpu import perplexity
from gpu_peers import TEMPERATURE, EagerLoop, synchronize, transformers_peer

from microvllm import LLM, SamplingParams
from microvllm.model import RECIPES, GPTConfig, layer_windows

ROOT = Path(__file__).resolve().parents[1]
PARTS = (
    "startup", "headline", "single", "filtered", "mixed", "prefill", "prefix", "deterministic",
    "quantized", "peers",
)  # fmt: skip
ROWS = (1, 32, 128, 256, 512, 1024, 2048, 4096)  # numbers of rows whose matrix products are timed
STATS = (
    "steps", "preemptions", "cached_tokens", "prefill_tokens", "prefill_seconds", "decode_seconds",
)  # fmt: skip

Request = tuple[int, int]  # tokens of the prompt, new tokens

say = partial(print, flush=True)  # so that results are visible if rented time ends early


# limits of the card -------------------------------------------------------------------------------


def median_seconds(run: Callable, device: torch.device, graph: bool = True) -> float:
    """Seconds of one run(), from events around 20 replays of its CUDA graph; by clock on a CPU."""
    for _ in range(3):
        run()
    if device.type != "cuda":
        times = []
        for _ in range(5):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        return statistics.median(times)
    torch.cuda.synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        run = captured.replay
        run()
    # all are queued before the first ends, so that no launch delays them
    events = []
    for _ in range(20):
        start = mark(device)
        run()  # the result is dropped, so that the next run reuses its memory
        events.append((start, mark(device)))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) / 1000 for start, stop in events)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy too large for any cache."""
    a = torch.ones(
        (1 << 30) if device.type == "cuda" else (1 << 26), dtype=torch.uint8, device=device
    )
    b = torch.empty_like(a)
    return 2 * a.nbytes / median_seconds(lambda: b.copy_(a), device, graph=False)


def product_peak(n: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of an n x n x n product of random numbers. A product of zeros would take less power
    and be faster."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / median_seconds(lambda: a @ b, device, graph=False)


class Ceilings:
    """Copy bandwidth, peak FLOP/s, and the times of the matrix products in a step of the model."""

    def __init__(self, config: GPTConfig, era: str, device: torch.device, dtype: torch.dtype):
        c, kv = config.n_embd, config.n_kv_head * config.head_dim
        # shapes (out, in) of a layer's weights: q, k and v together; attention's output; the MLP's
        self.matrices = [(c + 2 * kv, c), (c, c), (4 * c, c), (c, 4 * c)]
        self.layers, self.head_matrix = config.n_layer, (config.vocab_size, c)
        self.body_size = self.layers * sum(out * into for out, into in self.matrices)  # weights
        self.head_size = config.vocab_size * c
        self.attention_size = config.n_layer * c  # channels of q over all layers
        self.bytes_each = dtype.itemsize
        self.token_bytes = 2 * kv * self.bytes_each  # K and V of one token in one layer
        self.windows = Counter(layer_windows(config, RECIPES[era]))  # window: layers that have it
        self.device, self.dtype = device, dtype
        self.body_times: dict[int, float] = {}
        self.head_times: dict[int, float] = {}

    def measure(self) -> dict:
        """Measure bandwidth (bytes/s), peak (FLOP/s), body_times and head_times (s, by rows).

        Returns the same in other units: TB/s, TFLOP/s, milliseconds of all products by rows.
        """
        device, dtype = self.device, self.dtype
        if device.type != "cuda":
            say("ceilings: on a CPU, timed by the clock and without graphs")
        self.bandwidth = copy_bandwidth(device)
        say(f"ceilings: copy {self.bandwidth / 1e12:.3f} TB/s, read + write")
        n = 8192 if device.type == "cuda" else 512
        self.peak = product_peak(n, device, dtype)
        say(f"ceilings: {n} x {n} x {n} product {self.peak / 1e12:.1f} TFLOP/s in {dtype}")

        def weight(out: int, into: int) -> torch.Tensor:
            return (torch.randn(out, into, device=device) * into**-0.5).to(dtype)

        # each layer has its own weights; the cache of the card would have shared ones
        layers = [[weight(*size) for size in self.matrices] for _ in range(self.layers)]
        head = weight(*self.head_matrix)
        size, width = self.body_size + self.head_size, self.head_matrix[1]

        def body(x: torch.Tensor, wide: torch.Tensor) -> None:
            for qkv, proj, up, down in layers:
                F.linear(x, qkv), F.linear(x, proj), F.linear(x, up), F.linear(wide, down)

        for rows in ROWS:
            x, wide = (torch.randn(rows, n, device=device).to(dtype) for n in (width, 4 * width))
            self.body_times[rows] = median_seconds(partial(body, x, wide), device)
            self.head_times[rows] = median_seconds(partial(F.linear, x, head), device)
            total = self.body_times[rows] + self.head_times[rows]
            say(
                f"ceilings: {rows:4} rows {self.body_times[rows] * 1e3:7.3f} ms + head "
                f"{self.head_times[rows] * 1e3:6.3f} = {total * 1e3:7.3f} ms: "
                f"{2 * rows * size / total / 1e12:5.1f} TFLOP/s, weights read at "
                f"{size * self.bytes_each / total / 1e12:.2f} TB/s"
            )
        return {
            "copy_tb_per_s": round(self.bandwidth / 1e12, 4),
            "peak_tflops": round(self.peak / 1e12, 1),
            "products_ms": {
                n: round(1e3 * (self.body_times[n] + self.head_times[n]), 4) for n in ROWS
            },
        }

    def body(self, rows: int) -> float:
        return interpolate(self.body_times, rows)

    def head(self, rows: int) -> float:
        return interpolate(self.head_times, rows)

    def kv_bytes(self, context: int) -> int:
        """Bytes of K and V that a sequence of `context` tokens attends to, over all layers."""
        tokens = sum(
            n * (context if w < 0 else min(context, w + 1)) for w, n in self.windows.items()
        )
        return tokens * self.token_bytes

    def batch_seconds(self, requests: list[Request], max_batch: int) -> float:
        """The limit of a batch of requests: see the docstring of this file."""
        longest = max(sum(request) for request in requests)
        kv = [self.kv_bytes(context) for context in range(longest + 1)]
        waiting, running, seconds = deque(requests), [], 0.0  # running: [context, tokens to come]
        while waiting or running:
            kv_bytes, rows, sampled = 0, len(running), len(running)
            for sequence in running:
                sequence[0] += 1
                sequence[1] -= 1
                kv_bytes += kv[sequence[0]]
            while waiting and len(running) < max_batch:
                prompt, new = waiting.popleft()
                rows, sampled = rows + prompt, sampled + 1
                kv_bytes += kv[prompt]
                running.append([prompt, new - 1])
            seconds += self.body(rows) + self.head(sampled) + kv_bytes / self.bandwidth
            running = [sequence for sequence in running if sequence[1]]
        return seconds

    def stream_seconds(self, prompt: int, new: int) -> float:
        """The limit of a single sequence: each token reads all weights and its K and V once."""
        weights = (self.body_size + self.head_size) * self.bytes_each
        kv = sum(self.kv_bytes(prompt + i) for i in range(new))
        return (weights * new + kv) / self.bandwidth

    def prefill_flops(self, prompt: int) -> tuple[float, float]:
        """FLOPs of one prompt: of its products (the head for one row) and of causal attention."""
        products = 2 * (prompt * self.body_size + self.head_size)
        attention = 0
        for w, n in self.windows.items():
            reach = prompt if w < 0 else min(prompt, w + 1)
            pairs = reach * (reach + 1) // 2 + (prompt - reach) * reach
            attention += 4 * pairs * n * self.attention_size // self.layers
        return products, attention


def interpolate(times: dict[int, float], rows: int) -> float:
    """Seconds for any number of rows, interpolated linearly. Beyond the largest measured number,
    they are in proportion to it."""
    last = max(times)
    if rows > last:
        return times[last] * rows / last
    return float(np.interp(rows, list(times), list(times.values())))


# the engine ---------------------------------------------------------------------------------------


class Bench:
    """State that the parts share: options, shape, limits, the engine, and the results so far."""

    def __init__(self, args: argparse.Namespace, config: GPTConfig, path: Path, scratch: Path):
        self.args, self.config, self.path, self.scratch = args, config, path, scratch
        self.device = torch.device(args.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.ceilings = Ceilings(config, args.era, self.device, self.dtype)
        self.rng = np.random.default_rng(args.seed)
        self.results: dict[str, dict] = {}
        self.llm: LLM | None = None
        self.options = {
            "model_path": str(path), "tokenizer_path": str(path), "device": args.device,
            "num_blocks": args.num_blocks, "block_size": args.block_size,
            "max_batch_size": args.max_batch_size, "max_batched_tokens": args.max_batched_tokens,
            "max_model_len": args.max_model_len, "attention": args.attention, "seed": args.seed,
        }  # fmt: skip

    def run(self) -> None:
        """Run the selected parts. Start-up is first, because its processes need the whole card."""
        parts = [part for part in PARTS if part in self.args.parts]
        if "startup" in parts:
            self.attempt("startup")
        if inside := [part for part in parts if part not in ("startup", "peers")]:
            # all parts need these two, so their errors are not caught
            self.results["ceilings"] = self.ceilings.measure()
            free_memory()
            self.start_engine()
            for part in inside:
                self.attempt(part)
            self.stop_engine()
        if "peers" in parts:
            self.attempt("peers")

    def attempt(self, part: str) -> None:
        """Run one part. If it fails, report it and continue with the next part."""
        try:
            getattr(self, part)()
        except Exception as error:
            traceback.print_exc()
            self.report(part, f"failed, {error!r:.300}", error=f"{error!r:.300}")

    def shrunk(self, size: int) -> int:
        return max(1, size // self.args.shrink)

    def report(self, part: str, text: str, **numbers: object) -> None:
        """Print a result, and keep the numbers for the line of JSON."""
        say(f"{part}: {text}")
        rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in numbers.items()}
        self.results.setdefault(part, {}).update(rounded)

    def prompt(self, length: int) -> list[int]:
        """Random ids, none of them special."""
        return self.rng.integers(0, self.config.vocab_size - len(SPECIAL), length).tolist()

    def start_engine(self, name: str = "engine", **options) -> None:
        """Replace the engine by a new one, and warm up its kernels and graphs."""
        self.stop_engine()
        start = time.perf_counter()
        self.llm = LLM(**self.options | options)
        built = time.perf_counter() - start
        if (era := self.llm.model.recipe.era) != self.args.era:
            raise SystemExit(f"{self.path} is of era {era}, but --era is {self.args.era}")
        # a batch whose sequences end one by one, to warm up all batch sizes; a batch of long
        # contexts; the longest prompt alone
        size, long = self.shrunk(512), self.shrunk(1024)
        falling = [1 + i // 8 + max(0, i - (size - 8)) for i in range(size)]
        for count, length, new in ((size, 16, falling), (32, long, [4] * 32), (1, 2 * long, [2])):
            self.generate([self.prompt(length) for _ in range(count)], new)
        warm, stats = time.perf_counter() - start, self.llm.stats()
        tokens = stats["num_blocks"] * stats["block_size"]
        gb = self.llm.cache.data.nbytes / 1e9
        ways = recorded_ways(self.llm)
        kernels = "".join(f"; {size} rows: {way}" for size, way in ways.items())
        self.report(
            name,
            f"built in {built:.1f} s, warm after {warm:.1f}; KV budget {tokens:,} tokens in blocks "
            f"of {stats['block_size']}, {gb:.2f} GB{kernels}",
            built_s=built, kv_tokens=tokens, kv_gb=gb, block_size=stats["block_size"], ways=ways,
        )  # fmt: skip

    def stop_engine(self) -> None:
        if self.llm is not None:
            self.llm.close()
        self.llm = None
        free_memory()

    def generate(self, prompts: list[list[int]], new: list[int], **sampling) -> tuple[float, dict]:
        """Seconds of one `LLM.generate` by wall time, and the increase of the engine's statistics.
        On a GPU, they include card_seconds, the time between two events around the call."""
        sampling |= {"temperature": TEMPERATURE, "ignore_eos": True}
        params = [SamplingParams(max_tokens=n, **sampling) for n in new]
        before = self.llm.stats()
        synchronize(self.device)
        start, first = time.perf_counter(), mark(self.device)
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        last = mark(self.device)
        synchronize(self.device)
        seconds = time.perf_counter() - start
        counts = [len(output["token_ids"]) for output in outputs]
        if counts != new:
            raise RuntimeError(
                f"expected {sum(new)} tokens, got {sum(counts)}: the speed would be wrong"
            )
        after = self.llm.stats()
        stats = {name: after[name] - before[name] for name in STATS}
        if first:
            stats["card_seconds"] = first.elapsed_time(last) / 1000
        return seconds, stats

    def batch(self, part: str, requests: list[Request], limit: float, **sampling) -> None:
        """Time the requests with new prompts, `repeats` times; limit: in seconds."""
        news = [new for _, new in requests]
        runs = [
            self.generate([self.prompt(length) for length, _ in requests], news, **sampling)
            for _ in range(self.args.repeats)
        ]
        rates = [sum(news) / seconds for seconds, _ in runs]
        rate, bound, stats = statistics.median(rates), sum(news) / limit, runs[-1][1]
        self.report(
            part,
            f"{rate:,.0f} tokens/s ({min(rates):,.0f} to {max(rates):,.0f}), {rate / bound:.1%} of "
            f"the limit {bound:,.0f}; {sum(news):,} tokens in {sum(news) / rate:.3f} s, "
            f"{stats['steps']} steps, {stats['preemptions']} preemptions",
            tokens_per_s=rate, limit_tokens_per_s=bound, share=rate / bound,
            repeats=[round(r, 1) for r in rates], new_tokens=sum(news),
            prompt_tokens=sum(length for length, _ in requests), **stats,
        )  # fmt: skip

    def headline_requests(self) -> list[Request]:
        count, new = self.shrunk(512), self.shrunk(64)
        return [(n, new) for n in lengths(count, mean=23, sigma=0.55, low=6, high=77, seed=1)]

    # the parts, in the order of execution

    def startup(self) -> None:
        with open(self.path / "model_000000.pt", "rb") as file:
            while file.read(1 << 26):  # into the page cache
                pass
        for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH"):
            # empty for the first process; the main engine starts later and finds these kernels
            os.environ[name] = str(self.scratch / name.lower())
        for kind in ("uncached", "cached"):
            argv = [repr(time.time()), json.dumps(self.options)]
            done = subprocess.run(
                [sys.executable, "-c", FIRST_TOKEN, *argv],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=300,
            )
            if done.returncode:
                raise RuntimeError(f"the timed process failed:\n{done.stderr[-3000:]}")
            at = json.loads(done.stdout.splitlines()[-1])
            self.report(
                "startup",
                f"kernels {kind}: first token after {at['first']:.2f} s (torch imported at "
                f"{at['torch']:.2f}, LLM built at {at['built']:.2f}); 16 more tokens at "
                f"{at['more']:.2f}",
                **{f"{kind}_{moment}_s": seconds for moment, seconds in at.items()},
            )

    def headline(self, name: str = "headline", **sampling) -> None:
        requests = self.headline_requests()
        limit = self.ceilings.batch_seconds(requests, self.args.max_batch_size)
        self.batch(name, requests, limit, **sampling)

    def single(self, name: str = "single", **sampling) -> None:
        request = (self.shrunk(128), self.shrunk(128))
        self.batch(name, [request], self.ceilings.stream_seconds(*request), **sampling)

    def filtered(self) -> None:
        self.headline("filtered", top_k=50)
        self.single("filtered single", top_k=50)

    def mixed(self) -> None:
        count, most = self.shrunk(1000), self.shrunk(2048)
        prompt_lengths = lengths(count, self.shrunk(135), sigma=0.9, low=1, high=most // 2, seed=2)
        new_lengths = lengths(count, self.shrunk(306), sigma=0.55, low=1, high=most // 2, seed=3)
        say(
            f"mixed: {count} requests, {statistics.mean(prompt_lengths):.1f} in (longest "
            f"{max(prompt_lengths)}), {statistics.mean(new_lengths):.1f} out (longest "
            f"{max(new_lengths)})"
        )
        requests = list(zip(prompt_lengths, new_lengths, strict=True))
        limit = self.ceilings.batch_seconds(requests, self.args.max_batch_size)
        self.batch("mixed", requests, limit)

    def prefill(self) -> None:
        size, card = self.shrunk(2048), self.ceilings
        runs = [self.generate([self.prompt(size)], [1]) for _ in range(3 * self.args.repeats)]
        times, (_, stats) = [seconds for seconds, _ in runs], runs[-1]
        seconds, limit = statistics.median(times), card.body(size) + card.head(1)
        products, attention = card.prefill_flops(size)
        products_share = products / seconds / card.peak
        total_share = (products + attention) / seconds / card.peak
        self.report(
            "prefill",
            f"{size} tokens in {seconds * 1e3:.2f} ms ({min(times) * 1e3:.2f} to "
            f"{max(times) * 1e3:.2f}): {products_share:.1%} of the peak FLOP/s in the matrix "
            f"products, {total_share:.1%} including attention; {limit / seconds:.1%} of the limit "
            f"{limit * 1e3:.2f} ms",
            ms=seconds * 1e3, limit_ms=limit * 1e3, share=limit / seconds,
            share_of_peak_products=products_share, share_of_peak_with_attention=total_share,
            **stats,
        )  # fmt: skip

    def prefix(self) -> None:
        """Compare prompts with a new prefix, with a cached one, and in a second engine without a
        prefix cache."""
        count, shared, own, new = (self.shrunk(n) for n in (128, 256, 16, 32))
        rows = count * (shared + own)

        def run(start: list[int]) -> tuple[float, int]:
            prompts = [start + self.prompt(own) for _ in range(count)]
            seconds, stats = self.generate(prompts, [new] * count)
            return seconds, stats["cached_tokens"]

        runs: dict[str, list] = {"new": [], "cached": [], "without": []}
        for _ in range(self.args.repeats):
            start = self.prompt(shared)
            runs["new"].append(run(start))
            runs["cached"].append(run(start))
        self.start_engine("engine without prefix cache", enable_prefix_caching=False)
        runs["without"] = [run(self.prompt(shared)) for _ in range(self.args.repeats)]
        middle = {name: sorted(times)[len(times) // 2] for name, times in runs.items()}
        without, _ = middle.pop("without")
        for name, (seconds, cached) in middle.items():
            predicted = self.ceilings.body(rows) - self.ceilings.body(rows - cached)
            self.report(
                "prefix",
                f"{count} prompts with a {name} prefix of {shared} tokens: {seconds * 1e3:.1f} ms, "
                f"{without * 1e3:.1f} without the cache, gain {without / seconds:.2f}; the "
                f"products of {cached:,} cached tokens of {rows:,} take {predicted * 1e3:.1f} ms, "
                f"which predicts a gain of {without / (without - predicted):.2f}",
                **{"without_cache_ms": without * 1e3, f"{name}_prefix_ms": seconds * 1e3,
                   f"{name}_prefix_gain": without / seconds,
                   f"{name}_prefix_cached_tokens": cached,
                   f"{name}_prefix_predicted_gain": without / (without - predicted)},
            )  # fmt: skip

    def deterministic(self) -> None:
        """This part needs another engine. Not every backend supports it."""
        self.start_engine("deterministic", deterministic=True, attention="auto")
        self.headline("deterministic headline")
        self.single("deterministic single")

    def quantized(self) -> None:
        """This part needs another engine, which it closes before it computes the perplexities."""
        kind = "fp8" if self.device.type == "cuda" else "int8"
        try:
            self.start_engine(f"engine in {kind}", quantization=kind)
        except ValueError as error:  # the card does not support it
            say(f"quantized: skipped, {error}")
            return
        self.headline(f"headline in {kind}")
        self.single(f"single in {kind}")
        self.stop_engine()
        count, options = self.shrunk(512), {"device": self.args.device}
        exact = perplexity(count, options)
        small = perplexity(count, options | {"quantization": kind})["perplexity"]
        plain, tokens = exact["perplexity"], exact["tokens"]
        self.report(
            "quantized",
            f"perplexity of {tokens:,} tokens {plain:.3f} in {self.dtype}, {small:.3f} in {kind}: "
            f"{small / plain - 1:+.2%}",
            kind=kind, perplexity=small, plain_perplexity=plain, tokens=tokens,
        )  # fmt: skip

    # peers ----------------------------------------------------------------------------------------

    def peers(self) -> None:
        """Time other programs with the same workloads and random weights of the same shape. This
        engine is closed by then."""
        if self.args.era != "1":
            say("peers: skipped, transformers and the eager loop support only the first era")
            return
        self.eager_peer()
        free_memory()
        try:
            import transformers
        except ImportError:
            say("peers: transformers skipped, because it is not installed")
            return
        transformers_peer(self, transformers)
        free_memory()

    def peer(self, name: str, part: str, tokens: int, seconds: float) -> None:
        rate, own_rate = tokens / seconds, self.results.get(part, {}).get("tokens_per_s")
        speedup = f"; microvllm is {own_rate / rate:.1f} times as fast" if own_rate else ""
        text = f"{name}, {part}: {rate:,.1f} tokens/s{speedup}"
        self.report("peers", text, **{f"{name}_{part}_tokens_per_s": rate})

    @torch.inference_mode()
    def eager_peer(self) -> None:
        loop = EagerLoop(self.config, self.device, self.dtype)
        stream, new = self.shrunk(128), self.shrunk(64)
        few = [length for length, _ in self.headline_requests()[:4]]  # one by one: four are enough
        for part, prompt_lengths, samples, count in (
            ("single", [stream], 1, stream),
            ("headline", few, 1, new),
            ("samples", [23], self.shrunk(512), new),
        ):
            prompts = [self.prompt(length) for length in prompt_lengths]
            loop.generate(prompts[0], samples, 2)
            synchronize(self.device)
            start = time.perf_counter()
            for prompt in prompts:
                loop.generate(prompt, samples, count)
            synchronize(self.device)
            self.peer("eager", part, len(prompts) * samples * count, time.perf_counter() - start)


def recorded_ways(llm: LLM) -> dict[int, str]:
    """The kernels that were chosen for steps of a few rows, by number of rows."""
    if llm.device.type != "cuda":
        return {}
    from microvllm.gpu.graphs import GraphRunner  # needs triton

    if not isinstance(llm.runner, GraphRunner):
        return {}
    return dict(sorted(llm.runner.graphs.ways.items()))


# a user's first program, timed; argv: time of its start, arguments of LLM
FIRST_TOKEN = """
import json, sys, time
at, began = {}, float(sys.argv[1])
import torch
at["torch"] = time.time() - began
from microvllm import LLM, SamplingParams
llm = LLM(**json.loads(sys.argv[2]))
at["built"] = time.time() - began
llm.generate([[1, 2, 3, 4]], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
at["first"] = time.time() - began
llm.generate([[5, 6, 7, 8]], SamplingParams(max_tokens=16, ignore_eos=True), use_tqdm=False)
at["more"] = time.time() - began
print(json.dumps(at))
"""


def lengths(count: int, mean: float, sigma: float, low: int, high: int, seed: int) -> list[int]:
    """Log-normal whole numbers from low to high, with about this mean."""
    draws = np.random.default_rng(seed).lognormal(0.0, sigma, count)
    scale = mean / draws.mean()
    for _ in range(20):  # correct the mean, which clipping changes
        sizes = np.clip(np.rint(draws * scale), low, high)
        scale *= mean / sizes.mean()
    return sizes.astype(int).tolist()


def mark(device: torch.device) -> torch.cuda.Event | None:
    """A CUDA event at the current point of the stream; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe(device: torch.device) -> dict:
    """The hardware and the versions."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    facts = {"device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
             "torch": torch.__version__, "triton": triton}  # fmt: skip
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts["device"] = card.name
        facts["memory_gb"] = round(card.total_memory / 1e9, 1)
        facts["multiprocessors"] = card.multi_processor_count
    return facts


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help=f"parts to run, of {','.join(PARTS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=3)
    text = "folder of the model; it is kept, and made if it is missing"
    parser.add_argument("--checkpoint", type=Path, help=text)
    text = "cpu: only to test the benchmark, with a small model"
    parser.add_argument("--device", default="cuda", help=text)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shrink", type=int, default=1, help="divide all counts and lengths, for a test"
    )
    add_shape_arguments(parser)
    engine = parser.add_argument_group("engine")
    engine.add_argument("--max-batch-size", type=int, default=512)
    engine.add_argument("--max-batched-tokens", type=int)
    # one token more than the longest prompt, in whole blocks
    engine.add_argument("--max-model-len", type=int, default=2064)
    engine.add_argument("--num-blocks", type=int)
    engine.add_argument("--block-size", type=int, default=16)
    backends = ("auto", "triton", "flash", "sdpa", "numba")
    engine.add_argument("--attention", choices=backends, default="auto")
    args = parser.parse_args(words)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; use --device cpu to test the benchmark")
    parts = args.only.split(",") if args.only else list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; use {', '.join(PARTS)}")
    args.parts = parts
    try:
        args.config = shape(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    facts = describe(device)
    say(", ".join(f"{name} {value}" for name, value in facts.items()))
    with tempfile.TemporaryDirectory() as scratch:
        path = args.checkpoint or Path(scratch) / "model"
        start = time.perf_counter()
        if not (path / "meta_000000.json").exists():
            make_checkpoint(path, args, args.device)
            free_memory()
        model_config = json.loads((path / "meta_000000.json").read_text())["model_config"]
        if model_config != args.config:
            raise SystemExit(
                f"{path} has a model of another model_config: {model_config}, not {args.config}"
            )
        config = GPTConfig(**model_config)
        size, seconds = (path / "model_000000.pt").stat().st_size, time.perf_counter() - start
        say(
            f"checkpoint: era {args.era}, {config.n_layer} layers, {config.n_embd} wide, "
            f"{config.n_head} heads of {config.head_dim}, {config.n_kv_head} kv heads, vocabulary "
            f"{config.vocab_size}; {size / 1e9:.2f} GB, ready after {seconds:.1f} s"
        )
        bench = Bench(args, config, path, Path(scratch))
        bench.run()
    model = model_config | {"era": args.era, "file_gb": round(size / 1e9, 2)}
    say(json.dumps({"benchmark": "gpu"} | facts | {"model": model} | bench.results))
    if any("error" in part for part in bench.results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
