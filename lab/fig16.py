"""Figure 16: requests that all begin with the same examples, computed and kept once.

Translation, as in the paper: each prompt is 80 tokens of one example, or 341 tokens of five, which
all requests share, and a sentence of its own. All are there from the start; what is compared is how
many a second come out: of Orca Oracle, of paging that does not look for shared beginnings, and of
paging that does.
"""

from __future__ import annotations

import math
import random

from microvllm.cli.terminal import positive
from microvllm.scheduler import Scheduler, Sequence

from . import world
from .orca import RESERVE, Contiguous

PREFIX = {"one example": 80, "five examples": 341}
PAPER = {"one example": 1.67, "five examples": 3.58}  # times the throughput of Orca Oracle
SYSTEMS = {"Orca Oracle": "#009E73", "paged": "#56B4E9", "paged, shared": "#0072B2"}
SENTENCE = (32, 0.5)  # mean tokens of a sentence, and of its translation; spread. ours
WHY = """
The paper's lengths of a sentence and of its translation are not given, nor the time that its host
took: ours are 32 tokens each (log-normal), and the host of figure 13. Most of a sentence's prefill
is the examples, so what sharing saves is computing as much as memory: the column between shows how
little of it is due to paging alone."""


def measure(system: str, length: int, args) -> dict[str, float]:
    """Requests a second, and how many were in a step (an average over time)."""
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

    def watch(step, took):
        nonlocal busy, total
        busy += len(step.chunks) * took
        total += took

    done = world.replay(scheduler, requests, watch)
    return {"rate": len(done) / done[-1].end, "batched": busy / total}


def main(argv: list[str] | None = None) -> None:
    parser = world.Parser(__doc__, "fig16")
    parser.add_argument("--requests", type=positive, default=1500, metavar="N")
    args = parser.parse_args(argv)
    found = {
        name: {system: measure(system, length, args) for system in SYSTEMS}
        for name, length in PREFIX.items()
    }
    rows, head = [], ["", "requests/s", "in a batch", "times Oracle: paper", "ours"]
    for name, systems in found.items():
        base = systems["Orca Oracle"]["rate"]
        for system, got in systems.items():
            expected = PAPER[name] if system == "paged, shared" else "-"
            rows.append([f"{name}: {system}", *got.values(), expected, got["rate"] / base])
    print(world.table(head, rows) + "\n" + WHY)

    def draw(plt):
        figure, axes = plt.subplots(figsize=(6, 3.5))
        for shift, (system, color) in enumerate(SYSTEMS.items()):
            heights = [s[system]["rate"] / s["Orca Oracle"]["rate"] for s in found.values()]
            places = [i + 0.27 * (shift - 1) for i in range(len(found))]
            axes.bar(places, heights, 0.25, color=color, label=system)
        for i, name in enumerate(found):
            axes.plot([i + 0.14, i + 0.4], [PAPER[name]] * 2, "k--", lw=1.5,
                      label=None if i else "paper: vLLM")  # fmt: skip
        axes.set_xticks(range(len(found)), [f"{k}, {v} tokens" for k, v in PREFIX.items()])
        axes.set_ylabel("requests a second, times Orca Oracle's")
        axes.set_title("Prompts that begin alike")
        axes.legend(frameon=False)
        return figure

    world.finish(args, {"paper": PAPER, "ours": found}, draw)
