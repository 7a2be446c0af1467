"""The time of sampling, compared with the matrix products of a decode step.

    python benchmarks/sampler.py                        # nanochat's d12: 12 layers, 768 wide
    python benchmarks/sampler.py --rows 256 --vocab 4096 --layers 6 --width 256
    python benchmarks/sampler.py --rows 5 --vocab 99 --layers 1 --width 16 --turns 1  # only a test

The time of the step is that of its matrix products alone, in the layout that the model uses. It
excludes attention and norms, so the percentages are a little too high. Each number is a median of
--turns. The logits are normally distributed with standard deviation --spread. With a small one,
top_p keeps tens of thousands of tokens, and with a large one a few. The program also times guides
on the host, with the tokenizer of the bundled model: the compilation, and for each token the
computation and application of the mask. The last line of the output has all results as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # runs from a clone

import torch

from microvllm import LLM, SamplingParams
from microvllm.features.logits import LogitsExtension
from microvllm.loading import pick_backend
from microvllm.sampler import uniform_numbers
from microvllm.scheduler import Chunk, Plan, Sequence

SETTINGS = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.05},
    "all three": {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "logprobs": {"logprobs": 5},
}
BOOK = {"title": {"type": "string"}, "year": {"type": "integer"}, "kind": {"enum": ["a", "b"]}}
GUIDES = {
    "json": {"json": {"type": "object", "properties": BOOK, "required": [*BOOK]}},
    "regex": {"regex": r"([A-Z]\w+ ){50}"},
    "choices": {"choices": [f"number {i}" for i in range(1000)]},
}
MODEL = Path(__file__).resolve().parents[1] / "models" / "oldbooks-d6"


def products(rows: int, args: argparse.Namespace, backend):
    """A function that computes the matrix products of a step, and returns the input of the head."""
    C, V, device, dtype = args.width, args.vocab, backend.device, backend.dtype
    layer = ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C))
    shapes = [*layer * args.layers, (V, C)]
    linear_class = backend.linear_class(None, False, C, dtype)
    weights = [linear_class([torch.randn(shape)], backend, dtype) for shape in shapes]
    inputs = {size: torch.randn(rows, size, device=device, dtype=dtype) for size in (C, 4 * C)}
    return lambda: [
        linear(inputs[size]) for linear, (_, size) in zip(weights, shapes, strict=True)
    ][-1]


def seconds(run, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(rows: int, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Milliseconds of the products, and of sampling with each of SETTINGS."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    backend = pick_backend("auto", device, dtype)
    runs = {"products": products(rows, args, backend)}
    logits = (args.spread * torch.randn(rows, args.vocab)).to(device, dtype)
    uniform = torch.from_numpy(uniform_numbers(range(rows), [0] * rows, [0] * rows)).to(device)
    ids = torch.randint(args.vocab, (rows, 512)).tolist()
    model = SimpleNamespace(backend=backend, recipe=SimpleNamespace(softcap=15.0))
    extension = LogitsExtension()
    extension.attach(SimpleNamespace(model=model, runner=SimpleNamespace(sample=backend.sample)))

    def pick(plan: Plan, temperature: torch.Tensor) -> torch.Tensor:
        """Process logits as the runner and the extension do."""
        batch = SimpleNamespace(temperature=temperature, uniform=uniform)
        tokens = backend.sample(logits, plan.params, temperature, uniform, model.recipe.softcap)
        extension.on_sampled(plan, batch, logits, tokens)
        return tokens

    for name, setting in SETTINGS.items():
        params = [SamplingParams(**{"temperature": 0.8, **setting}) for _ in range(rows)]
        temperature = torch.tensor([p.temperature for p in params], device=device)
        plan = Plan()
        for i, p in enumerate(params):
            seq = Sequence(i, ids[i][:256], p, seed=i, max_length=1024)
            seq.token_ids = ids[i]
            plan.chunks.append(Chunk(seq, 511, 512, ()))
            plan.draws.append(i, seq, 512)
        runs[name] = partial(pick, plan, temperature)
    times = {name: [] for name in runs}
    for _ in range(1 + args.turns):
        for name, run in runs.items():
            times[name].append(1000 * seconds(run, device))
    return {name: statistics.median(t[1:]) for name, t in times.items()}  # the first warms up


def guide_costs(num_texts: int) -> dict[str, dict[str, float]]:
    """For each of GUIDES: milliseconds to compile it, microseconds per token of random texts."""
    costs = {}
    with LLM(MODEL, num_blocks=40, device="cpu") as llm:
        llm.check("a", SamplingParams(guide={"choices": ["a"]}))  # make the tree of the vocabulary
        for name, guide in GUIDES.items():
            began, times = time.perf_counter(), []
            _, params = llm.check("a", SamplingParams(guide=guide))
            compiled = time.perf_counter() - began
            for _ in range(num_texts):
                follow, ids = params.logits_processor.begin([]), []
                while len(ids) < 100 and not (ids and ids[-1] in llm.tokenizer.eos_ids):
                    logits = torch.randn(llm.tokenizer.vocab_size)
                    began = time.perf_counter()
                    masked = follow(ids, logits)
                    times.append(time.perf_counter() - began)
                    ids.append(int(masked.argmax()))
            median = 1e6 * statistics.median(times)
            costs[name] = {"compile_ms": 1000 * compiled, "token_us": median}
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = "numbers of rows to sample, separated by commas (default: %(default)s)"
    parser.add_argument("--rows", default="64,512", help=text)
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--spread", type=float, default=3.0)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    card = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    facts = {"device": f"{device.type}, {card}", "threads": torch.get_num_threads(), **vars(args)}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    results = {}
    with torch.inference_mode():
        for rows in map(int, args.rows.split(",")):
            results[rows] = times = measure(rows, args, device)
            for name, ms in times.items():
                share = f"{ms / times['products']:8.1%} of the products" * (name != "products")
                print(f"{rows:5d} rows  {name:10s} {ms:9.2f} ms {share}")
        guides = guide_costs(args.turns)
    for name, cost in guides.items():
        times = f"{cost['token_us']:9.1f} us per token, {cost['compile_ms']:.1f} ms to compile"
        print(f"guide      {name:10s} {times}")
    print(json.dumps({**facts, "milliseconds": results, "guides": guides}))


if __name__ == "__main__":
    main()
