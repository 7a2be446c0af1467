"""What the scheduler itself costs, whatever runs, waits or lies in the pool.

Microseconds of schedule() and update() for each token they schedule, while all running sequences
decode: as the number of these grows, the queue behind them, and the pool (of which all that is free
is cached, so that a new block means an eviction). Medians over the steps. Only the first curve may
move, and only down.
"""

from __future__ import annotations

import statistics
import time

from microvllm.cli.terminal import positive
from microvllm.scheduler import Scheduler, Sequence

from . import world

GOAL = 1000.0  # microseconds a step, of 512 sequences that decode
CURVES = {  # what grows, and to which sizes
    "running": [1, 4, 16, 64, 256, 512, 1024],
    "waiting": [0, 10, 100, 1_000, 10_000, 100_000],
    "blocks": [10_000, 30_000, 100_000, 300_000, 1_000_000],
}
BASE = {"running": 512, "waiting": 0, "blocks": 40_000}


def measure(running: int, waiting: int, blocks: int, steps: int) -> dict[str, float]:
    """Median microseconds of a step: in schedule, in update, and a token of both."""
    manager = world.make_blocks(blocks + 1)
    fill = Sequence(0, [0] * 16 * blocks, world.Params(1))
    fill.block_hashes = [i.to_bytes(4, "big") for i in range(blocks)]  # quick, and good enough
    assert manager.admit(fill, 16 * blocks)
    manager.publish(fill, 16 * blocks)
    manager.free(fill)
    scheduler = Scheduler(manager, running, 64 * running)
    for i in range(running + waiting):  # of different lengths: each step a sixteenth needs a block
        scheduler.add(Sequence(i, [i + 1] * (33 + i % 16), world.Params(10**6)))
    schedule_times = []
    update_times = []
    for turn in range(steps + 2):  # the first steps compute the prompts
        began = time.perf_counter()
        plan = scheduler.schedule()
        planned = time.perf_counter()
        scheduler.update(plan, [0] * len(plan.draws))
        if turn >= 2:
            assert len(plan.chunks) == len(plan.draws) == running, "not all of them decode"
            schedule_times.append(1e6 * (planned - began))
            update_times.append(1e6 * (time.perf_counter() - planned))
    assert len(scheduler.waiting) == waiting and not scheduler.num_preemptions
    schedule = statistics.median(schedule_times)
    update = statistics.median(update_times)
    return {"schedule": schedule, "update": update, "a token": (schedule + update) / running}


def main(argv: list[str] | None = None) -> None:
    parser = world.Parser(__doc__, "cost")
    parser.add_argument("--steps", type=positive, default=200, metavar="N", help="(%(default)s)")
    args = parser.parse_args(argv)
    found = {}
    for key, sizes in CURVES.items():
        points = [measure(**BASE | {key: size}, steps=args.steps) for size in sizes]
        found[key] = {"size": sizes, **{k: [p[k] for p in points] for k in points[0]}}
        rows = [[f"{size:,}", *p.values()] for size, p in zip(sizes, points, strict=True)]
        print(world.table([f"{key}; microseconds", *points[0]], rows), end="\n\n")
    at = found["running"]["size"].index(512)
    step = found["running"]["schedule"][at] + found["running"]["update"][at]
    print(f"a step of 512 that decode: {step:,.0f} microseconds, and the goal is {GOAL:,.0f}")

    def draw(plt):
        figure, panels = plt.subplots(1, 3, figsize=(11, 3.2), sharey=True)
        for axes, (key, got) in zip(panels, found.items(), strict=True):
            axes.plot(got["size"], got["a token"], "o-", ms=4, color="#0072B2")
            axes.set_xscale("symlog" if key == "waiting" else "log")
            axes.set(xlabel=key, ylim=(0, None))
            axes.axhline(GOAL / 512, color="#999999", lw=0.8, ls="--")
        panels[0].set_ylabel("microseconds a scheduled token")
        panels[1].set_title("dashed: the goal, 1 ms for 512")
        figure.tight_layout()
        return figure

    world.finish(args, found, draw)
