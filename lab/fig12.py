"""Figures 12 and 13: how many requests a second a server bears, and how many it has in a batch.

Requests come in a Poisson process, with lengths like ShareGPT's or Alpaca's. As their rate rises,
the time that a request takes, divided by the length of its output (the paper's normalized latency,
a mean over all requests), first rises slowly; past what the memory can batch the queue grows
without end. A system bears the rate at which that is half a second, between two that were tried.
"""

from __future__ import annotations

import time

from microvllm.cli.terminal import positive
from microvllm.scheduler import Scheduler

from . import world
from .orca import RESERVE, Contiguous

SYSTEMS = [*RESERVE, "paged"]
COLORS = dict(zip(SYSTEMS, ["#D55E00", "#E69F00", "#009E73", "#0072B2"], strict=True))
RATES = {
    "sharegpt": [0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3],
    "alpaca": [1, 2, 4, 7, 10, 15, 20, 30, 40, 50],
}
MINUTES = {"sharegpt": 10, "alpaca": 2}
LIMIT = 0.5  # seconds a token
# figure 13: requests in a batch, at this rate
BATCHED = {
    "sharegpt": (2, {"Orca Max": 7.00, "Orca Pow2": 9.81, "Orca Oracle": 13.62, "paged": 30.42}),
    "alpaca": (30, {"Orca Max": 7.00, "Orca Pow2": 43.24, "Orca Oracle": 72.75, "paged": 132.44}),
}
# figure 12: how many times the rate paging bears, over three sizes of OPT
TIMES = {("sharegpt", "Orca Oracle"): "1.7 to 2.7 x", ("sharegpt", "Orca Max"): "2.7 to 8 x"}
WHY = """
The paper's ranges go over three sizes of OPT, of which this is the smallest; for Alpaca it
gives none. The time of a step was fitted to the paged bars of figure 13; all else follows from it
and from the lengths, whose spread is ours. Traffic is minutes where the paper has an hour, and a
queue that cannot grow as long looks shorter: with --minutes 60 every system bears a little less.
The Scheduler is ours for all four systems, so prompts are computed in chunks, beside the decodes.
"""


def measure(system: str, kind: str, rate: float, args) -> dict[str, float]:
    """Mean normalized latency, and sequences in a step (an average over time)."""
    if system in RESERVE:
        blocks = Contiguous(world.SLOTS, RESERVE[system])
    else:
        blocks = world.make_blocks(world.SLOTS // 16 + 1, enable_prefix_caching=False)
    scheduler = Scheduler(blocks, 256, 2560)
    minutes = args.minutes or MINUTES[kind]
    busy = total = 0.0

    def watch(step, took):
        nonlocal busy, total
        if total < 60 * minutes:  # then the last ones are left alone
            busy += len(step.chunks) * took
            total += took

    requests = world.traffic(kind, round(60 * minutes * rate), rate, args.seed, args.sharegpt)
    done = world.replay(scheduler, requests, watch)
    return {
        "latency": sum(d.per_token for d in done) / len(done),
        "batched": busy / total,
        "hours": done[-1].end / 3600,
    }


def borne(rates: list[float], points: list[dict]) -> float:
    """The rate at which the latency reaches LIMIT, between two that were tried."""
    pairs = list(zip(rates, [p["latency"] for p in points], strict=True))
    for (r0, a), (r1, b) in zip(pairs, pairs[1:], strict=False):
        if a <= LIMIT < b:
            return r0 + (r1 - r0) * (LIMIT - a) / (b - a)
    return pairs[-1][0]


def main(argv: list[str] | None = None) -> None:
    parser = world.Parser(__doc__, "fig12", lengths=True)
    what = "of traffic at each rate (10 of ShareGPT's, 2 of Alpaca's; a day is 1440)"
    parser.add_argument("--minutes", type=positive, metavar="N", help=what)
    parser.add_argument("--traffic", choices=RATES, help="one of the two alone")
    parser.add_argument("--rates", type=float, nargs="+", metavar="R", help="a second, rising")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, metavar="NAME")
    args = parser.parse_args(argv)
    kinds = [args.traffic] if args.traffic else list(RATES)
    found, began = {}, time.perf_counter()
    for kind in kinds:
        rates, (at, paper) = args.rates or RATES[kind], BATCHED[kind]
        curves, rows = {}, []
        for system in args.systems:
            points = []
            for rate in rates:  # past the limit it only gets worse
                points.append(measure(system, kind, rate, args))
                if points[-1]["latency"] > 2 * LIMIT:
                    break
            curves[system] = {"rates": rates[: len(points)], "points": points}
            curves[system]["borne"] = borne(curves[system]["rates"], points)
            curves[system]["batched"] = measure(system, kind, at, args)["batched"]
        best = curves[args.systems[-1]]["borne"]
        for system, curve in curves.items():
            ratio = best / curve["borne"]
            times = [TIMES.get((kind, system), "-"), f"{ratio:.2g} x"]
            rows.append([system, curve["borne"], *times, paper[system], curve["batched"]])
        columns = [kind, "requests/s", "paging bears: paper", "ours"]
        head = [*columns, f"batched at {at}/s: paper", "ours"]
        print(world.table(head, rows), end="\n\n")
        found[kind] = curves
    hours = sum(p["hours"] for c in found.values() for curve in c.values() for p in curve["points"])
    took = time.perf_counter() - began
    print(f"{hours:.1f} hours of traffic in {took:.0f} s\n{WHY.rstrip()}")

    def draw(plt):
        figure, rows = plt.subplots(len(kinds), 2, figsize=(10, 3.6 * len(kinds)), squeeze=False)
        for (curve, bars), kind in zip(rows, kinds, strict=True):
            for system in args.systems:
                got = found[kind][system]
                latency = [p["latency"] for p in got["points"]]
                curve.plot(got["rates"], latency, "o-", ms=4, color=COLORS[system], label=system)
            curve.set(ylim=(0, 1), xlabel="requests a second", ylabel="seconds a token",
                      title=f"Figure 12, lengths like {kind}")  # fmt: skip
            curve.axhline(LIMIT, color="#999999", lw=0.8, ls="--")
            curve.set_xlim(0, 1.15 * max(max(found[kind][s]["rates"]) for s in args.systems))
            curve.legend(frameon=False, loc="lower right")
            at, paper = BATCHED[kind]
            places = range(len(args.systems))
            ours = [found[kind][s]["batched"] for s in args.systems]
            colors = [COLORS[s] for s in args.systems]
            bars.bar([p - 0.2 for p in places], [paper[s] for s in args.systems], 0.4,
                     color="#CCCCCC")  # fmt: skip
            bars.bar([p + 0.2 for p in places], ours, 0.4, color=colors)
            bars.set(title=f"Figure 13, in a batch at {at}/s (grey: paper)", ylabel="requests")
            bars.set_xticks(places, args.systems)
        figure.tight_layout()
        return figure

    world.finish(args, {"limit": LIMIT, "ours": found}, draw)
