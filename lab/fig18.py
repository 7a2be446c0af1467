"""Figure 18b: the size of a block, and the memory that it wastes.

Large blocks leave more empty slots at the end of a sequence. Small blocks make long tables. The
table shows, for each size: the percentage of empty slots among the slots in use; the number of
sequences in a batch when all requests arrive at the start; and the time of a request at a rate that
the paged server of figure 12 sustains.
"""

from __future__ import annotations

import math

from microvllm.cli.terminal import positive
from microvllm.scheduler import Scheduler

from . import world

SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
RATES = {"sharegpt": 1.5, "alpaca": 30.0}
BEST = {"sharegpt": (16, 128), "alpaca": (16, 32)}  # the paper's best sizes, for the last column
COLORS = {"sharegpt": "#0072B2", "alpaca": "#E69F00"}
WHY = """
Paper: with ShareGPT's lengths, sizes 16 to 128 are best; with Alpaca's, 16 and 32. Larger
blocks are longer than many sequences. This simulation models only memory: blocks of one token
waste nothing and have no disadvantage. On a GPU, small blocks make the attention kernel read small
pieces of memory. So the curves of the paper, and of a real engine, also rise to the left."""


def measure(kind: str, size: int, args, rate: float) -> dict[str, float]:
    """The percentage of empty slots among the slots in use and the number of sequences in a step
    (averaged over time), and the mean time of a request in seconds."""
    blocks = world.make_blocks(world.SLOTS // size + 1, size, enable_prefix_caching=False)
    scheduler = Scheduler(blocks, 256, 2560)
    slots = tokens = batched = total = 0.0
    turn = 0

    def watch(step, step_seconds):
        nonlocal slots, tokens, batched, total, turn
        turn += 1
        if turn % 10 == 0 and (scheduler.waiting or rate < math.inf):
            slots += step_seconds * (blocks.pool.num_usable - blocks.pool.num_free) * size
            tokens += step_seconds * sum(seq.num_computed for seq in scheduler.running)
            batched += step_seconds * len(step.chunks)
            total += step_seconds

    requests = world.traffic(kind, args.requests, rate, args.seed, args.sharegpt)
    completions = world.replay(scheduler, requests, watch)
    if not total:
        args.error(f"--requests {args.requests} does not fill the pool: give more")
    return {
        "empty": 100 * (1 - tokens / slots),
        "batched": batched / total,
        "latency": sum(c.latency for c in completions) / len(completions),
    }


def main(argv: list[str] | None = None) -> None:
    parser = world.Parser(__doc__, "fig18", lengths=True)
    parser.add_argument("--requests", type=positive, default=600, metavar="N")
    args = parser.parse_args(argv)
    results = {}
    for kind, rate in RATES.items():
        at_once = [measure(kind, size, args, math.inf) for size in SIZES]
        at_rate = [measure(kind, size, args, rate) for size in SIZES]
        results[kind] = {
            "size": SIZES,
            "empty": [m["empty"] for m in at_once],
            "batched": [m["batched"] for m in at_once],
            "latency": [m["latency"] for m in at_rate],
        }
        head = [f"{kind}: block", "% empty", "in a batch", f"seconds at {rate:g}/s", "paper"]
        low, high = BEST[kind]
        rows = [list(row) for row in zip(*results[kind].values(), strict=True)]
        print(world.table(head, [[*r, "best" if low <= r[0] <= high else "-"] for r in rows]))
        print()
    print(WHY.strip())

    def draw(plt):
        figure, panels = plt.subplots(1, 3, figsize=(11, 3.2))
        labels = {"empty": "% of the used slots are empty", "batched": "requests in a batch",
                  "latency": "seconds per request"}  # fmt: skip
        for axes, (key, label) in zip(panels, labels.items(), strict=True):
            for kind, curves in results.items():
                axes.plot(SIZES, curves[key], "o-", ms=4, color=COLORS[kind], label=kind)
            axes.set_xscale("log", base=2)
            axes.set(xlabel="tokens in a block", ylabel=label, ylim=(0, None))
            axes.set_xticks(SIZES, SIZES)
            axes.legend(frameon=False)
        for kind, (low, high) in BEST.items():
            panels[2].plot([low, high], [min(results[kind]["latency"]) - 1] * 2, "|-", ms=9,
                           color=COLORS[kind], alpha=0.6)  # fmt: skip
        panels[2].set_title("horizontal bars: the paper's best sizes", fontsize=10)
        figure.tight_layout()
        return figure

    world.finish(args, results, draw)
