"""Windows: the memory that layers with limited attention windows save.

In nanochat's pattern SSSL, three of four layers attend to a quarter of the context; the fourth and
the last layer attend to all of it. One table for all layers keeps every token in every layer. With
a table for each group of layers, a group keeps only the tokens in its window. Both variants serve
the same requests in a pool of equal size in bytes. All requests arrive at once, and each fills the
context.
"""

from __future__ import annotations

import math

from microvllm.blocks import BlockPool
from microvllm.cli.terminal import positive
from microvllm.features.windows import GroupedBlockManager, group_layers, most_blocks
from microvllm.scheduler import Scheduler, Sequence

from . import world

DEPTHS = [6, 12, 20, 26, 34]
SIZE = 16  # tokens in a block


def windows_of(depth: int, context: int) -> list[int]:
    """The window of each layer in tokens: a quarter of the context, in steps of 128, or all."""
    short = 128 * math.ceil(context / 512)
    return [short if i % 4 < 3 and i < depth - 1 else context for i in range(depth)]


def serve(groups: list[tuple[int, list[int]]], args) -> dict[str, float]:
    """The memory of a full-length sequence, in slots of one layer's K and V, and counts of the
    run."""
    windows = [window for window, _ in groups]
    depth = max(len(layers) for _, layers in groups)
    num_needed = most_blocks(windows, SIZE, args.context)
    # as many bytes as args.sequences sequences take without windows
    pool = args.sequences * -(-args.context // SIZE) * args.layers // depth
    blocks = GroupedBlockManager(BlockPool(pool + 1), SIZE, windows=windows)
    scheduler = Scheduler(blocks, 10**6, 512)
    for i in range(4 * args.sequences):
        prompt = [i + 1] * args.prompt  # so that no two share a prefix
        scheduler.add(Sequence(i, prompt, world.Params(args.context - args.prompt)))
    steps = 0
    while scheduler.waiting or scheduler.running:
        plan = scheduler.schedule()
        scheduler.update(plan, [0] * len(plan.draws))
        steps += 1
    blocks.check([])
    return {
        "slots": num_needed * SIZE * depth,
        "fit": pool // num_needed,
        "steps": steps,
        "preempted": scheduler.num_preemptions,
    }


def main(argv: list[str] | None = None) -> None:
    parser = world.Parser(__doc__, "windows")
    add = parser.add_argument
    help_text = "tokens of a sequence (default: %(default)s)"
    add("--context", type=positive, default=2048, metavar="N", help=help_text)
    help_text = "tokens of its prompt (default: %(default)s)"
    add("--prompt", type=positive, default=512, metavar="N", help=help_text)
    help_text = "sequences that fit into the pool without windows; four times as many arrive "
    help_text += "(default: %(default)s)"
    add("--sequences", type=positive, default=8, metavar="N", help=help_text)
    args = parser.parse_args(argv)
    if args.prompt >= args.context:
        parser.error("argument --prompt: must be less than the context")
    results = {}
    for args.layers in DEPTHS:
        windows = windows_of(args.layers, args.context)
        groups = group_layers(windows, args.context)
        results[args.layers] = {
            "windows": windows,
            "groups": groups,
            "followed": serve(groups, args),
            "uniform": serve([(-1, list(range(args.layers)))], args),
            "seen": sum(min(w + 1, args.context) for w in windows),  # the smallest possible memory
        }
    rows = []
    for depth, row in results.items():
        a, b = row["uniform"], row["followed"]
        sizes = " ".join(f"{len(layers)}{'L' if w < 0 else 'S'}" for w, layers in row["groups"])
        share, least = (100 * n / a["slots"] for n in (b["slots"], row["seen"]))
        numbers = [f"{a[key]:,} > {b[key]:,}" for key in ("fit", "preempted", "steps")]
        rows.append([f"d{depth}", sizes, share, least, *numbers])
    head = ["", "groups", "% of the memory", "% in windows", "sequences that fit"]
    print(world.table([*head, "preempted", "steps"], rows))
    print("\nLeft of >: one table for all layers. Right: groups of layers, in an equal pool.")

    def draw(plt):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2))
        for axes, key in ((left, "fit"), (right, "steps")):
            for shift, kind, color in ((-0.2, "uniform", "#999999"), (0.2, "followed", "#0072B2")):
                values = [row[kind][key] for row in results.values()]
                axes.bar([i + shift for i in range(len(DEPTHS))], values, 0.4, color=color,
                         label={"uniform": "one table", "followed": "groups"}[kind])  # fmt: skip
            axes.set_xticks(range(len(DEPTHS)), [f"d{depth}" for depth in DEPTHS])
        left.yaxis.get_major_locator().set_params(integer=True)
        left.set_ylabel("full-length sequences in the pool")
        right.set_ylabel(f"steps for {4 * args.sequences} requests")
        figure.tight_layout()
        # above the plots, so that it covers no bar
        names = left.get_legend_handles_labels()
        figure.legend(*names, loc="lower center", bbox_to_anchor=(0.5, 1), ncol=2, frameon=False)
        return figure

    world.finish(args, {f"d{depth}": row for depth, row in results.items()}, draw)
