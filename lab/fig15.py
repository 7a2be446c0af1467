"""Figure 15: the memory saved when the n samples of a request share its prompt.

At every tenth step, the program counts the blocks in all tables, and the distinct blocks among
them. The difference is the saving. Samples share the full blocks of the prompt until they end, and
its part-filled last block until all samples except one have copied it. The figure's other half,
beam search, is not part of this program.
"""

from __future__ import annotations

import math

from microvllm.cli.terminal import positive
from microvllm.scheduler import Scheduler

from . import world

PAPER = {"alpaca": {2: 6.09, 4: 8.53, 6: 9.79}, "sharegpt": {2: 16.2, 6: 30.5}}
COUNTS = [2, 4, 6]
WHY = """
Mostly full blocks of prompts are shared. So the saving depends on how many prompts have at least 16
tokens, and on the length of outputs relative to prompts. We know only the means of these two
distributions. For ShareGPT the paper gives the ends of a range, which we take as n = 2 and n = 6.
Here all samples of a request are equally long. If they were not, the last sample of a request would
share nothing at the end. Each sample writes its own text. If the texts were equal, a preempted
sample would find the blocks of the others by hash, and with ShareGPT's lengths the saving would be
1.5 times as large."""


def measure(kind: str, n: int, args) -> float:
    """The percentage of blocks that sharing saves, over all steps."""
    blocks = world.make_blocks(world.SLOTS // 16 + 1)
    scheduler = Scheduler(blocks, 256, 2560)
    num_entries = num_blocks = turn = 0

    def watch(step, step_seconds):
        nonlocal num_entries, num_blocks, turn
        turn += 1
        if turn % 10 == 0:
            num_entries += sum(len(seq.block_table) for seq in scheduler.running)
            num_blocks += blocks.pool.num_usable - blocks.pool.num_free

    requests = world.traffic(kind, args.requests, math.inf, args.seed, args.sharegpt, n)
    world.replay(scheduler, requests, watch, lambda seq, position: seq.index)
    return 100 * (1 - num_blocks / num_entries)


def main(argv: list[str] | None = None) -> None:
    parser = world.Parser(__doc__, "fig15", lengths=True)
    parser.add_argument("--requests", type=positive, default=300, metavar="N")
    args = parser.parse_args(argv)
    results = {kind: {n: measure(kind, n, args) for n in COUNTS} for kind in PAPER}
    rows = [
        [f"{kind}, n = {n}", PAPER[kind].get(n, "-"), results[kind][n]]
        for kind in PAPER
        for n in COUNTS
    ]
    print(world.table(["% of the blocks saved", "paper", "ours"], rows) + "\n" + WHY)

    def draw(plt):
        figure, panels = plt.subplots(1, 2, figsize=(8, 3.2))
        for axes, kind in zip(panels, PAPER, strict=True):
            counts = [n for n in COUNTS if n in PAPER[kind]]
            axes.bar([n - 0.35 for n in counts], [PAPER[kind][n] for n in counts], 0.7,
                     color="#CCCCCC", label="paper")  # fmt: skip
            axes.bar([n + 0.35 for n in COUNTS], results[kind].values(), 0.7,
                     color="#0072B2", label="ours")  # fmt: skip
            axes.set(title=f"lengths like {kind}", xlabel="samples per prompt", xticks=COUNTS)
            axes.set_ylabel("% of the blocks saved")
            axes.legend(frameon=False)
        figure.tight_layout()
        return figure

    world.finish(args, {"paper": PAPER, "ours": results}, draw)
