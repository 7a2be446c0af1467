"""Figure 16: the throughput with a prefix that all requests share.

The task is translation, as in the paper. Each prompt is a prefix of one example (80 tokens) or five
examples (341 tokens), which all requests share, and a sentence of its own. All requests arrive at
the start. The program compares requests per second of Orca Oracle, of paging without a prefix
cache, and of paging with it.
"""

from __future__ import annotations

import math
import random

from microvllm.cli.terminal import positive
from microvllm.scheduler import Scheduler, Sequence

from . import world
from .orca import RESERVE, Contiguous

PREFIX = {"one example": 80, "five examples": 341}
PAPER = {"one example": 1.67, "five examples": 3.58}  # throughput relative to Orca Oracle
SYSTEMS = {"Orca Oracle": "#009E73", "paged": "#56B4E9", "paged, shared": "#0072B2"}
SENTENCE = (32, 0.5)  # mean tokens of a sentence and of its translation, and spread; our choice
WHY = """
The paper gives neither the lengths of a sentence and its translation nor the time of the host. We
use 32 tokens each (log-normal), and the host of figure 13. Most of a prompt is the examples, so
sharing saves computation as well as memory. The rows "paged" show the part of the gain that comes
from paging alone."""


def measure(system: str, length: int, args) -> dict[str, float]:
    """Requests per second, and requests in a step (averaged over time)."""
    if system in RESERVE:
        blocks = Contiguous(world.SLOTS, RESERVE[system])
    else:
        blocks = world.make_blocks(world.SLOTS // 16 + 1, enable_prefix_caching="shared" in system)
    scheduler = Scheduler(blocks, 256, 2560)
    rng, requests = random.Random(args.seed), []
    mean, spread = SENTENCE
    for i in range(args.requests):
        prompt, output = (
            max(1, round(rng.lognormvariate(math.log(mean) - spread**2 / 2, spread)))
            for _ in range(2)
        )
        text = [0] * length + [i + 1] * prompt
        requests.append(world.Request(0.0, Sequence(i, text, world.Params(output))))
    busy = total = 0.0

    def watch(step, step_seconds):
        nonlocal busy, total
        busy += len(step.chunks) * step_seconds
        total += step_seconds

    completions = world.replay(scheduler, requests, watch)
    return {"rate": len(completions) / completions[-1].end, "batched": busy / total}


def main(argv: list[str] | None = None) -> None:
    parser = world.Parser(__doc__, "fig16")
    parser.add_argument("--requests", type=positive, default=1500, metavar="N")
    args = parser.parse_args(argv)
    results = {
        name: {system: measure(system, length, args) for system in SYSTEMS}
        for name, length in PREFIX.items()
    }
    rows, head = [], ["", "requests/s", "in a batch", "relative to Oracle: paper", "ours"]
    for name, systems in results.items():
        base = systems["Orca Oracle"]["rate"]
        for system, measured in systems.items():
            expected = PAPER[name] if system == "paged, shared" else "-"
            ratio = measured["rate"] / base
            rows.append([f"{name}: {system}", *measured.values(), expected, ratio])
    print(world.table(head, rows) + "\n" + WHY)

    def draw(plt):
        figure, axes = plt.subplots(figsize=(6, 3.5))
        for shift, (system, color) in enumerate(SYSTEMS.items()):
            heights = [s[system]["rate"] / s["Orca Oracle"]["rate"] for s in results.values()]
            places = [i + 0.27 * (shift - 1) for i in range(len(results))]
            axes.bar(places, heights, 0.25, color=color, label=system)
        for i, name in enumerate(results):
            axes.plot([i + 0.14, i + 0.4], [PAPER[name]] * 2, "k--", lw=1.5,
                      label=None if i else "paper: vLLM")  # fmt: skip
        axes.set_xticks(range(len(results)), [f"{k}, {v} tokens" for k, v in PREFIX.items()])
        axes.set_ylabel("requests per second, relative to Orca Oracle")
        axes.set_title("Prompts with a shared prefix")
        axes.legend(frameon=False)
        return figure

    world.finish(args, {"paper": PAPER, "ours": results}, draw)
