"""The speed of an evaluation in one batch with shared prefixes.

    python benchmarks/evals.py                      # the bundled model
    python benchmarks/evals.py --model base:d12 --questions 200 --shots 600
    python benchmarks/evals.py --questions 3 --shots 20 --turns 1  # only a test

Multiple choice with random tokens: all questions follow the same solved examples, and each has four
choices. The choices are scored one by one without a prefix cache, one by one with it, and all at
once, in turns. A number is the median of --turns. Tokens per second count the tokens of all
contexts and choices, even if they are found in the cache. The last line of the output has all
results as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # runs from a clone

import torch

from microvllm import LLM

WAYS = {"one by one": (False, False), "with the cache": (True, False), "at once": (True, True)}


def measure(args: argparse.Namespace, prompts: list, tails: list, caching: bool, at_once: bool):
    """(tokens per second, share of the prompt tokens found in the cache)"""
    with LLM(args.model, device=args.device, enable_prefix_caching=caching) as llm:
        llm.score(prompts[-1:], tails[-1:])  # kernels are compiled
        llm.reset_prefix_cache()
        before, began = llm.stats(), time.perf_counter()
        if at_once:
            llm.score(prompts, tails)
        else:
            for pair in zip(prompts, tails, strict=True):
                llm.score(*([ids] for ids in pair))
        seconds, stats = time.perf_counter() - began, llm.stats()
    hits, asked = (stats[name] - before[name] for name in ("cached_tokens", "prompt_tokens"))
    return (asked + sum(map(len, tails))) / seconds, hits / asked


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--model", default=str(root / "models" / "oldbooks-d6"))
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--shots", type=int, default=400, help="tokens of the solved examples")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    draw = random.Random(0)
    shots, prompts, tails = draw.choices(range(250), k=args.shots), [], []
    for _ in range(args.questions):
        prompts += [shots + draw.choices(range(250), k=40)] * 4
        tails += [draw.choices(range(250), k=5) for _ in range(4)]
    card = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine()
    facts = {"hardware": card, "threads": torch.get_num_threads(), **vars(args)}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    found = {name: [] for name in WAYS}
    for _ in range(args.turns):
        for name, way in WAYS.items():
            found[name].append(measure(args, prompts, tails, *way))
    results = {
        name: [statistics.median(column) for column in zip(*turns, strict=True)]
        for name, turns in found.items()
    }
    for name, (speed, hits) in results.items():
        times = speed / results["one by one"][0]
        print(f"{name:14s} {speed:10,.0f} tokens/s ({times:.1f} times), {hits:.0%} cached")
    print(json.dumps({**facts, "results": results}))


if __name__ == "__main__":
    main()
