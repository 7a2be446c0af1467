"""Figure 15: the memory that is saved when the n samples of a request share its prompt.

At every tenth step the blocks in all tables are counted, and the different ones among them. The
rest is what sharing saves: full blocks of the prompt for the whole life of the samples, its last,
part-filled block until all but one have copied it. (The paper's other half, beam search, is not in
this engine.)
"""

from __future__ import annotations

import math

from microvllm.cli.terminal import positive
from microvllm.scheduler import Scheduler

from . import world

PAPER = {"alpaca": {2: 6.09, 4: 8.53, 6: 9.79}, "sharegpt": {2: 16.2, 6: 30.5}}
COUNTS = [2, 4, 6]
WHY = """
What is saved is the share that whole blocks of prompts have in all that is kept, so it hangs on how
many prompts have 16 tokens at all, and on how long outputs are beside them: on two histograms whose
means we know. For ShareGPT the paper gives the two ends of a range, which we take to be n = 2 and
n = 6. Here all samples of a request are equally long; of those that are not, the last one shares
nothing. Each writes a text of its own: where they were equal, a preempted one would find the blocks
of the others by hash, and with ShareGPT's lengths half as much again would be saved."""


def measure(kind: str, n: int, args) -> float:
    """Percent of the blocks that sharing saves, over all steps."""
    blocks = world.make_blocks(world.SLOTS // 16 + 1)
    scheduler = Scheduler(blocks, 256, 2560)
    held = used = turn = 0

    def watch(step, took):
        nonlocal held, used, turn
        turn += 1
        if turn % 10 == 0:
            held += sum(len(seq.block_table) for seq in scheduler.running)
            used += blocks.pool.num_usable - blocks.pool.num_free

    requests = world.traffic(kind, args.requests, math.inf, args.seed, args.sharegpt, n)
    world.replay(scheduler, requests, watch, lambda seq, position: seq.index)
    return 100 * (1 - used / held)


def main(argv: list[str] | None = None) -> None:
    parser = world.Parser(__doc__, "fig15", lengths=True)
    parser.add_argument("--requests", type=positive, default=300, metavar="N")
    args = parser.parse_args(argv)
    found = {kind: {n: measure(kind, n, args) for n in COUNTS} for kind in PAPER}
    rows = [
        [f"{kind}, n = {n}", PAPER[kind].get(n, "-"), found[kind][n]]
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
            axes.bar([n + 0.35 for n in COUNTS], found[kind].values(), 0.7,
                     color="#0072B2", label="ours")  # fmt: skip
            axes.set(title=f"lengths like {kind}", xlabel="samples of a prompt", xticks=COUNTS)
            axes.set_ylabel("% of the blocks saved")
            axes.legend(frameon=False)
        figure.tight_layout()
        return figure

    world.finish(args, {"paper": PAPER, "ours": found}, draw)
