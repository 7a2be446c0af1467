"""The cost of a trace.

    python benchmarks/trace.py                      # 512 instructions x 64 tokens, on and off
    python benchmarks/trace.py --baseline ../other  # also run another checkout, without a trace

Each turn runs the same prompts with a trace to a file and without a trace. With --baseline, it also
runs them in the engine of that checkout. The order changes in every turn. All engines are in one
process, so that changes of the machine's speed affect all. A ratio is the median of the ratios of
the turns. It is printed for wall time and for processor time, which excludes the time of other
programs. The last line of the output has all results as JSON.
"""

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


LOADED: dict[Path, dict] = {}  # folder of a checkout -> the modules of its package


def use(root: Path):
    """Make `import` find the package of a checkout, also for late imports (numba finds its cached
    kernels by module names). Modules of another checkout are moved to LOADED."""
    names = [name for name in sys.modules if name.split(".")[0] == "microvllm"]
    if others := {name: sys.modules.pop(name) for name in names}:
        LOADED[Path(others["microvllm"].__file__).parents[1]] = others
    source = root / "src" if (root / "src").is_dir() else root  # older checkouts have no src
    sys.modules.update(LOADED.get(source, {}))
    sys.path.insert(0, str(source))
    package = importlib.import_module("microvllm")
    sys.path.remove(str(source))
    assert Path(package.__file__).parents[1] == source, package.__file__
    return package


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-prompts", type=int, default=512, help="(default: %(default)s)")
    text = "new tokens for each prompt (default: %(default)s)"
    parser.add_argument("--max-tokens", type=int, default=64, help=text)
    parser.add_argument("--turns", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--baseline", type=Path, help="another checkout of the project")
    args = parser.parse_args()

    sides = {"baseline": args.baseline.resolve()} if args.baseline else {}
    engines = {}
    for side, root in {**sides, "off": ROOT}.items():
        package = use(root)
        llm = package.LLM(ROOT / "models" / "oldbooks-d6", device="cpu")
        params = package.SamplingParams(
            temperature=0.7, max_tokens=args.max_tokens, ignore_eos=True, seed=1
        )
        engines[side] = root, llm, params
    bench = importlib.import_module("microvllm.cli.bench")  # from this checkout, the last one used
    prompts = [
        llm.tokenizer.render_for_completion([{"role": "user", "content": prompt}])
        for prompt in bench.read_prompts(bench.BUNDLED)[: args.num_prompts]
    ]
    engines["on"] = engines["off"]
    folder = tempfile.TemporaryDirectory()
    file = Path(folder.name) / "run.jsonl"

    def seconds(side: str) -> tuple[float, float]:
        root, llm, params = engines[side]
        use(root)
        llm.reset_prefix_cache()
        start, cpu = time.perf_counter(), time.process_time()
        if side == "on":
            with llm.tracing(file):
                llm.generate(prompts, params, use_tqdm=False)
        else:
            llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start, time.process_time() - cpu

    times = {side: [] for side in engines}
    order = list(times)
    for turn in range(1 + args.turns):
        for side in order:
            times[side].append(seconds(side))
        order.append(order.pop(0))
        print(f"turn {turn} of {args.turns}", file=sys.stderr)
    steps = sum('"e":"begin"' in line for line in file.open())
    results = {
        "prompts": len(prompts),
        "max_tokens": args.max_tokens,
        "turns": args.turns,
        "cores": os.cpu_count(),
        "steps": steps,
        "trace_bytes": file.stat().st_size,
    }
    times = {side: values[1:] for side, values in times.items()}  # the first turn warms up
    for side, values in times.items():
        results[f"{side}_seconds"] = round(statistics.median(wall for wall, _ in values), 3)
    for side in times.keys() - {"off"}:
        for column, clock in enumerate(("wall", "processor")):
            pairs = zip(times[side], times["off"], strict=True)
            ratios = [a[column] / b[column] for a, b in pairs]
            middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
            results[f"{side}_over_off_{clock}"] = round(middle, 4)
            print(f"{side} / off, {clock} time: {middle:.4f} ({low:.4f} to {high:.4f})")
    print(json.dumps(results))
    folder.cleanup()


if __name__ == "__main__":
    main()
