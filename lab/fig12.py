"""Figures 12 and 13: the request rate that a server sustains, and the size of its batches.

Requests arrive in a Poisson process, with lengths like ShareGPT's or Alpaca's. The paper's
normalized latency is the time of a request divided by the length of its output, as a mean over all
requests. It grows slowly with the rate, until memory limits the batch and the queue grows without
end. The sustained rate is the rate at which the normalized latency is half a second, interpolated
between two measured rates.
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
LIMIT = 0.5  # seconds per token
# figure 13: the rate, and the requests in a batch at this rate
BATCHED = {
    "sharegpt": (2, {"Orca Max": 7.00, "Orca Pow2": 9.81, "Orca Oracle": 13.62, "paged": 30.42}),
    "alpaca": (30, {"Orca Max": 7.00, "Orca Pow2": 43.24, "Orca Oracle": 72.75, "paged": 132.44}),
}
# figure 12: the sustained rate of paging divided by that of the system, over three sizes of OPT
TIMES = {("sharegpt", "Orca Oracle"): "1.7 to 2.7 x", ("sharegpt", "Orca Max"): "2.7 to 8 x"}
WHY = """
The paper's ranges are over three sizes of OPT; ours is the smallest. The paper gives no ranges for
Alpaca. The time of a step was fitted to the paged bars of figure 13. Everything else follows from
this time and from the lengths, whose spread is our choice. Our traffic lasts minutes,
the paper's an hour. In a shorter run the queue has less time to grow: with --minutes 60 every
system sustains a little less.
All four systems use our Scheduler, which computes prompts in chunks, together with decodes.
"""


def measure(system: str, kind: str, rate: float, args) -> dict[str, float]:
    """Mean normalized latency, sequences in a step (averaged over time), and hours of traffic."""
    if system in RESERVE:
        blocks = Contiguous(world.SLOTS, RESERVE[system])
    else:
        blocks = world.make_blocks(world.SLOTS // 16 + 1, enable_prefix_caching=False)
    scheduler = Scheduler(blocks, 256, 2560)
    minutes = args.minutes or MINUTES[kind]
    busy = total = 0.0

    def watch(step, step_seconds):
        nonlocal busy, total
        if total < 60 * minutes:  # later, no new requests arrive
            busy += len(step.chunks) * step_seconds
            total += step_seconds

    requests = world.traffic(kind, round(60 * minutes * rate), rate, args.seed, args.sharegpt)
    completions = world.replay(scheduler, requests, watch)
    return {
        "latency": sum(c.per_token for c in completions) / len(completions),
        "batched": busy / total,
        "hours": completions[-1].end / 3600,
    }


def sustained_rate(rates: list[float], points: list[dict]) -> float:
    """The rate at which the latency reaches LIMIT, interpolated between measured rates."""
    pairs = list(zip(rates, [p["latency"] for p in points], strict=True))
    for (r0, a), (r1, b) in zip(pairs, pairs[1:], strict=False):
        if a <= LIMIT < b:
            return r0 + (r1 - r0) * (LIMIT - a) / (b - a)
    return pairs[-1][0]


def main(argv: list[str] | None = None) -> None:
    parser = world.Parser(__doc__, "fig12", lengths=True)
    help_text = "minutes of traffic at each rate (default: 10 for sharegpt, 2 for alpaca)"
    parser.add_argument("--minutes", type=positive, metavar="N", help=help_text)
    parser.add_argument("--traffic", choices=RATES, help="run only this traffic (default: both)")
    help_text = "requests per second, in rising order"
    parser.add_argument("--rates", type=float, nargs="+", metavar="R", help=help_text)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, metavar="NAME")
    args = parser.parse_args(argv)
    kinds = [args.traffic] if args.traffic else list(RATES)
    results, start = {}, time.perf_counter()
    for kind in kinds:
        rates, (at, paper) = args.rates or RATES[kind], BATCHED[kind]
        curves, rows = {}, []
        for system in args.systems:
            points = []
            for rate in rates:  # stop past the limit: the latency only grows
                points.append(measure(system, kind, rate, args))
                if points[-1]["latency"] > 2 * LIMIT:
                    break
            curves[system] = {"rates": rates[: len(points)], "points": points}
            curves[system]["sustained"] = sustained_rate(curves[system]["rates"], points)
            curves[system]["batched"] = measure(system, kind, at, args)["batched"]
        best = curves[args.systems[-1]]["sustained"]
        for system, curve in curves.items():
            ratio = best / curve["sustained"]
            times = [TIMES.get((kind, system), "-"), f"{ratio:.2g} x"]
            rows.append([system, curve["sustained"], *times, paper[system], curve["batched"]])
        columns = [kind, "requests/s", "paging sustains: paper", "ours"]
        head = [*columns, f"batched at {at}/s: paper", "ours"]
        print(world.table(head, rows), end="\n\n")
        results[kind] = curves
    all_curves = [curve for curves in results.values() for curve in curves.values()]
    hours = sum(point["hours"] for curve in all_curves for point in curve["points"])
    seconds = time.perf_counter() - start
    print(f"{hours:.1f} hours of traffic in {seconds:.0f} s\n{WHY.rstrip()}")

    def draw(plt):
        figure, rows = plt.subplots(len(kinds), 2, figsize=(10, 3.6 * len(kinds)), squeeze=False)
        for (curve, bars), kind in zip(rows, kinds, strict=True):
            for system in args.systems:
                measured = results[kind][system]
                latency = [p["latency"] for p in measured["points"]]
                color = COLORS[system]
                curve.plot(measured["rates"], latency, "o-", ms=4, color=color, label=system)
            curve.set(ylim=(0, 1), xlabel="requests per second", ylabel="seconds per token",
                      title=f"Figure 12, lengths like {kind}")  # fmt: skip
            curve.axhline(LIMIT, color="#999999", lw=0.8, ls="--")
            rates = [rate for system in args.systems for rate in results[kind][system]["rates"]]
            curve.set_xlim(0, 1.15 * max(rates))
            curve.legend(frameon=False, loc="lower right")
            at, paper = BATCHED[kind]
            places = range(len(args.systems))
            ours = [results[kind][s]["batched"] for s in args.systems]
            colors = [COLORS[s] for s in args.systems]
            bars.bar([p - 0.2 for p in places], [paper[s] for s in args.systems], 0.4,
                     color="#CCCCCC")  # fmt: skip
            bars.bar([p + 0.2 for p in places], ours, 0.4, color=colors)
            bars.set(title=f"Figure 13, batch size at {at}/s (grey: paper)", ylabel="requests")
            bars.set_xticks(places, args.systems)
        figure.tight_layout()
        return figure

    world.finish(args, {"limit": LIMIT, "ours": results}, draw)
