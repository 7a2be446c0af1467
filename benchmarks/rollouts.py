"""The speed of rollouts from a module in training, and the cost of following its weights.

    python benchmarks/rollouts.py                             # the bundled model
    python benchmarks/rollouts.py --model /tmp/models/d12     # a directory, era 1 or 5
    python benchmarks/rollouts.py --nanochat ~/nanochat       # its Engine, random weights
    python benchmarks/rollouts.py --groups 1 --samples 2 --tokens 4 --turns 1  # only a test

Each of --groups prompts has --samples answers of --tokens tokens, drawn at temperature 1. Variants:

    nanochat     nanochat's Engine, one prompt after the other (only with --nanochat)
    one by one   this engine on the live module, one prompt and one sample per call; only four
                 samples
    groups       the same, with all samples of a prompt in one call
    live         the same, with all prompts in one list
    copy         the same, in an engine with copy=True

The variants run in turns. A number is the median of --turns, in new tokens per second. Before
each turn a weight changes, as by an optimiser, so that no turn uses results of earlier ones. The
program also measures the time of the check for changed weights, with and without running sequences,
and the time of a decode of 1 and of --samples sequences. The last line of the output has all
results as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of examples/
sys.path.insert(0, f"{sys.path[0]}/src")

import torch

from examples.gpt import load
from microvllm import SamplingParams
from microvllm.nanochat import Engine
from microvllm.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def load_nanochat(checkout: Path, config, tokenizer: Path):
    """nanochat's own module of this size with random weights, a tokenizer, and its Engine class."""
    sys.path.insert(0, str(checkout.expanduser()))
    from nanochat.engine import Engine as NanochatEngine
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.tokenizer import RustBPETokenizer

    fields = GPTConfig.__dataclass_fields__
    with torch.device("meta"):
        module = GPT(GPTConfig(**{name: x for name, x in vars(config).items() if name in fields}))
    module.to_empty(device="cpu")
    module.init_weights()
    return module.float().eval(), RustBPETokenizer.from_directory(tokenizer), NanochatEngine


def median_seconds(run, times: int) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def time_checks(llm, samples: int) -> dict[str, float]:
    """Seconds of the two checks of the weights, and of a decode of 1 and of `samples` sequences."""
    llm.generate(["Once"], SamplingParams(max_tokens=1))  # notices the changes of the weights
    seconds = {
        "check in a step": median_seconds(lambda: llm.live.snapshot.differs(False), 50),
        "thorough check": median_seconds(lambda: llm.live.snapshot.differs(True), 50),
    }
    for n in sorted({1, samples}):
        params = SamplingParams(max_tokens=60, ignore_eos=True)
        ids = [llm.add_request("Once upon a time", params) for _ in range(n)]
        llm.step(), llm.step()
        seconds[f"decode of {n}"] = median_seconds(llm.step, 50)
        llm.abort(*ids)
        llm.step()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT / "models" / "oldbooks-d6"))
    parser.add_argument("--nanochat", type=Path, help="a checkout of nanochat")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    path = Path(args.model)
    tokenizer_path = path if (path / "tokenizer.pkl").exists() else path.parent / "tokenizer"
    module, tokenizer = load(path), load_tokenizer(tokenizer_path)
    texts = (f"What comes after {number}, and why?" for number in range(args.groups))
    render = tokenizer.render_for_completion
    prompts = [render([{"role": "user", "content": text}]) for text in texts]
    engines = {}
    if args.nanochat:
        module, tokenizer, engine = load_nanochat(args.nanochat, module.config, tokenizer_path)
        engines["nanochat"] = engine(module, tokenizer)
    live, copied = Engine(module, tokenizer), Engine(module, tokenizer, copy=True)
    engines |= dict.fromkeys(["one by one", "groups", "live"], live) | {"copy": copied}
    options = {"max_tokens": args.tokens, "temperature": 1.0}

    def roll_out(name: str, seed: int) -> int:
        """Run a variant; returns the number of new tokens."""
        engine, n, requests = engines[name], args.samples, prompts
        if name == "one by one":
            requests, n = [prompts[0]] * min(n, 4), 1  # enough to measure a rate
        if name in ("live", "copy"):
            groups = engine.generate_batch(prompts, num_samples=n, seed=seed, **options)[0]
        else:
            groups = [
                engine.generate_batch(ids, num_samples=n, seed=seed + i, **options)[0]
                for i, ids in enumerate(requests)
            ]
        pairs = zip(requests, groups, strict=True)
        return sum(len(row) - len(ids) for ids, rows in pairs for row in rows)

    facts = {"hardware": platform.machine(), "threads": torch.get_num_threads(), **vars(args)}
    facts["nanochat"] = str(args.nanochat or "")
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    speeds = {name: [] for name in engines}
    for turn in range(-1, args.turns):  # the first turn compiles kernels
        for name in engines:
            with torch.no_grad():
                next(module.parameters()).mul_(1.0)
            began = time.perf_counter()
            tokens = roll_out(name, 1000 * turn + 1000)
            if turn >= 0:
                speeds[name].append(tokens / (time.perf_counter() - began))
    first = "nanochat" if args.nanochat else "one by one"
    results = {name: statistics.median(turns) for name, turns in speeds.items()}
    for name, speed in results.items():
        print(f"{name:11s} {speed:10,.0f} tokens/s ({speed / results[first]:.2f} times {first})")
    checks = {
        kind: time_checks(engine.llm, args.samples)
        for kind, engine in {"live": live, "copy": copied}.items()
    }
    for kind, times in checks.items():
        print(f"{kind}: " + ", ".join(f"{name} {1e6 * s:,.0f} us" for name, s in times.items()))
    print(json.dumps({**facts, "results": results, "seconds": checks}))


if __name__ == "__main__":
    main()
