"""Cost: the time of the scheduler, for growing numbers of sequences and blocks.

The program measures schedule() and update() in microseconds per scheduled token, while all running
sequences decode. It varies the number of running sequences, of waiting sequences, and of blocks in
the pool. All free blocks are cached, so each new block needs an eviction. Values are medians over
the steps. The time per token should not depend on the queue and the pool, and should fall with the
number of running sequences.
"""

from __future__ import annotations

import statistics
import time

from microvllm.cli.terminal import positive
from microvllm.scheduler import Scheduler, Sequence

from . import world

GOAL = 1000.0  # microseconds for a step of 512 decoding sequences
CURVES = {  # the varied number, and its values
    "running": [1, 4, 16, 64, 256, 512, 1024],
    "waiting": [0, 10, 100, 1_000, 10_000, 100_000],
    "blocks": [10_000, 30_000, 100_000, 300_000, 1_000_000],
}
BASE = {"running": 512, "waiting": 0, "blocks": 40_000}


def measure(running: int, waiting: int, blocks: int, steps: int) -> dict[str, float]:
    """Medians in microseconds: of schedule and update for a step, and of both per token."""
    manager = world.make_blocks(blocks + 1)
    fill = Sequence(0, [0] * 16 * blocks, world.Params(1))
    fill.block_hashes = [i.to_bytes(4, "big") for i in range(blocks)]  # no real hashes, but fast
    assert manager.admit(fill, 16 * blocks)
    manager.publish(fill, 16 * blocks)
    manager.free(fill)
    scheduler = Scheduler(manager, running, 64 * running)
    for i in range(running + waiting):  # 16 lengths: in each step, 1 of 16 needs a block
        scheduler.add(Sequence(i, [i + 1] * (33 + i % 16), world.Params(10**6)))
    schedule_times = []
    update_times = []
    for turn in range(steps + 2):  # the first steps compute the prompts
        start = time.perf_counter()
        plan = scheduler.schedule()
        middle = time.perf_counter()
        scheduler.update(plan, [0] * len(plan.draws))
        end = time.perf_counter()
        if turn >= 2:
            assert len(plan.chunks) == len(plan.draws) == running, "not all sequences decode"
            schedule_times.append(1e6 * (middle - start))
            update_times.append(1e6 * (end - middle))
    assert len(scheduler.waiting) == waiting and not scheduler.num_preemptions
    schedule = statistics.median(schedule_times)
    update = statistics.median(update_times)
    return {"schedule": schedule, "update": update, "per token": (schedule + update) / running}


def main(argv: list[str] | None = None) -> None:
    parser = world.Parser(__doc__, "cost")
    help_text = "measured steps for each value (default: %(default)s)"
    parser.add_argument("--steps", type=positive, default=200, metavar="N", help=help_text)
    args = parser.parse_args(argv)
    curves = {}
    for key, sizes in CURVES.items():
        points = [measure(**BASE | {key: size}, steps=args.steps) for size in sizes]
        curves[key] = {"size": sizes, **{k: [p[k] for p in points] for k in points[0]}}
        rows = [[f"{size:,}", *p.values()] for size, p in zip(sizes, points, strict=True)]
        print(world.table([f"{key}; microseconds", *points[0]], rows), end="\n\n")
    at = curves["running"]["size"].index(512)
    step = curves["running"]["schedule"][at] + curves["running"]["update"][at]
    print(f"a step of 512 decoding sequences: {step:,.0f} microseconds; the goal is {GOAL:,.0f}")

    def draw(plt):
        figure, panels = plt.subplots(1, 3, figsize=(11, 3.2), sharey=True)
        for axes, (key, curve) in zip(panels, curves.items(), strict=True):
            axes.plot(curve["size"], curve["per token"], "o-", ms=4, color="#0072B2")
            axes.set_xscale("symlog" if key == "waiting" else "log")
            axes.set(xlabel=key, ylim=(0, None))
            axes.axhline(GOAL / 512, color="#999999", lw=0.8, ls="--")
        panels[0].set_ylabel("microseconds per scheduled token")
        panels[1].set_title("dashed: the goal, 1 ms for 512")
        figure.tight_layout()
        return figure

    world.finish(args, curves, draw)
