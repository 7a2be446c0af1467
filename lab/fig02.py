"""Figure 2: how much of the KV memory holds tokens, with contiguous memory and with paging.

All requests arrive at the start, so each system fills the pool as far as it can. There are five
kinds of slots:

    tokens     it holds a token
    reserved   it is reserved for a token that comes later
    internal   it is reserved for a token that never comes
    rounded    it was added to round the size up to a power of two
    free       it is not reserved, but the next request does not fit
"""

from __future__ import annotations

import math

from microvllm.cli.terminal import positive
from microvllm.scheduler import Scheduler

from . import world
from .orca import RESERVE, Contiguous, power

PAPER = {"Orca Max": 20.4, "Orca Pow2": 26.8, "Orca Oracle": 38.2, "paged": 96.3}
KINDS = {"tokens": "#0072B2", "reserved": "#56B4E9", "internal": "#D55E00", "rounded": "#E69F00",
         "free": "#BBBBBB"}  # fmt: skip
WHY = """
Without --sharegpt, the spread of the output lengths is chosen so that Orca Max agrees with the
paper; the other systems follow from it. The paper does not say how the size that Pow2 reserves is
rounded. Here the buddy allocator rounds the sum of prompt and output up to a power of two. In the
row "paged", "free" is the reserve that our scheduler keeps for running sequences (16 tokens each),
so that they are not preempted soon; "internal" is about half a block per sequence.
"""


def shares(scheduler: Scheduler) -> dict[str, float]:
    """The current percentage of each kind of slot."""
    blocks = scheduler.blocks
    running = scheduler.running
    tokens = sum(seq.num_computed for seq in running)
    if isinstance(blocks, Contiguous):
        final = sum(seq.max_length - 1 for seq in running)  # the last token is never an input
        reserved = sum(size for _, size in blocks.allocations.values())
        allocated = sum(power(size) for _, size in blocks.allocations.values())
        limits = [tokens, final, reserved, allocated, world.SLOTS]
    else:
        allocated = (blocks.pool.num_usable - blocks.pool.num_free) * blocks.block_size
        limits = [tokens, tokens, allocated, allocated, world.SLOTS]
    sizes = [b - a for a, b in zip([0, *limits[:-1]], limits, strict=True)]
    return {kind: 100 * size / world.SLOTS for kind, size in zip(KINDS, sizes, strict=True)}


def measure(name: str, args) -> dict[str, float]:
    """The percentages for one system, averaged over the time while requests wait."""
    if name in RESERVE:
        blocks = Contiguous(world.SLOTS, RESERVE[name])
    else:
        blocks = world.make_blocks(world.SLOTS // 16 + 1, enable_prefix_caching=False)
    scheduler = Scheduler(blocks, 256, 2560)
    sums, total, turn = dict.fromkeys(KINDS, 0.0), 0.0, 0

    def watch(step, step_seconds):
        nonlocal total, turn
        turn += 1
        if turn % 20 == 0 and scheduler.waiting:
            total += step_seconds
            for kind, share in shares(scheduler).items():
                sums[kind] += share * step_seconds

    requests = world.traffic("sharegpt", args.requests, math.inf, args.seed, args.sharegpt)
    world.replay(scheduler, requests, watch)
    if not total:
        args.error(f"--requests {args.requests} does not fill the pool: give more")
    return {kind: share / total for kind, share in sums.items()}


def main(argv: list[str] | None = None) -> None:
    parser = world.Parser(__doc__, "fig02", lengths=True)
    parser.add_argument("--requests", type=positive, default=1000, metavar="N")
    args = parser.parse_args(argv)
    results = {name: measure(name, args) for name in PAPER}
    rows = [[name, PAPER[name], *shares.values()] for name, shares in results.items()]
    print(world.table(["% of the slots", "paper: tokens", *KINDS], rows) + "\n" + WHY)

    def draw(plt):
        figure, axes = plt.subplots(figsize=(7, 3.5))
        left = [0.0] * len(results)
        for kind, color in KINDS.items():
            widths = [shares[kind] for shares in results.values()]
            axes.barh(list(results), widths, left=left, color=color, label=kind, edgecolor="white")
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for row, name in enumerate(results):
            axes.plot([PAPER[name]] * 2, [row - 0.4, row + 0.4], "k--", lw=1.5,
                      label="tokens, paper" if row == 0 else None)  # fmt: skip
        axes.invert_yaxis()
        axes.set(xlim=(0, 100), xlabel="% of the KV slots", title="Use of the KV memory")
        axes.legend(ncol=6, loc="upper center", bbox_to_anchor=(0.45, -0.2), frameon=False)
        return figure

    world.finish(args, {"paper": PAPER, "ours": results}, draw)
