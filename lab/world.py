"""Code that the programs of the lab share: traffic, a simulated device, and reports.

The simulated device is one A100 with 40 GB that serves OPT-13B in float16, as in section 6.2 of the
paper. The time of a step is the sum of three parts: reading the weights or computing, whichever
takes longer; reading the K and V of every token in the batch; and the time of the host. HOST was
chosen so that the paged system has about as many requests in a batch as in the paper's figure 13,
at the two rates given there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from microvllm.blocks import BlockManager, BlockPool
from microvllm.cli import terminal
from microvllm.environment import how_to_install
from microvllm.scheduler import Plan, Scheduler, Sequence

KV_BYTES = 2 * 40 * 5120 * 2  # per token: K and V, 40 layers, 5120 channels, two bytes each
SLOTS = 12 * 2**30 // KV_BYTES  # tokens in the paper's cache of 12 GB: 15,728
CONTEXT = 2048  # the context length of OPT
BANDWIDTH = 1.555e12  # bytes per second, from the data sheet
FLOPS = 312e12 / 2  # dense float16 per second: half of the data sheet's value is reached
PARAMETERS = 13e9
HOST = (0.0116, 0.00031)  # seconds per step, and seconds per sequence in it


def seconds(plan: Plan) -> float:
    """The time of a step on the simulated device."""
    num_context = sum(chunk.stop for chunk in plan.chunks)
    weights = 2 * PARAMETERS / BANDWIDTH
    arithmetic = 2 * PARAMETERS * plan.num_tokens / FLOPS
    host = HOST[0] + HOST[1] * len(plan.chunks)
    return max(weights, arithmetic) + num_context * KV_BYTES / BANDWIDTH + host


def make_blocks(num_blocks: int, block_size: int = 16, **options) -> BlockManager:
    """A block manager with its own pool. num_blocks includes the null block; options: for
    BlockManager."""
    return BlockManager(BlockPool(num_blocks), block_size, **options)


# traffic ------------------------------------------------------------------------------------------


class Params(NamedTuple):
    """The fields of SamplingParams that the scheduler reads, without importing torch."""

    max_tokens: int
    n: int = 1


# (mean, spread) of prompts and of outputs. the distribution is log-normal, and the spread is the
# standard deviation of the logarithm. a pair that exceeds the context is drawn again; after that,
# the means are those of the paper (figure 11): 161.31 and 337.99, 19.31 and 58.45. the spread of
# ShareGPT's outputs is chosen so that Orca Max keeps 457 tokens per request, as in the paper (7
# requests in 20.4 % of 15,728 slots): averaged over its time, a request holds its prompt and half
# its output, and longer requests have more weight. the other three spreads are our choice
FITS = {
    "sharegpt": ((172.4, 1.1), (363.5, 0.879)),
    "alpaca": ((19.31, 0.6), (58.45, 0.9)),
}


def lengths(name: str, rng: random.Random, pairs: list | None = None) -> Iterator[tuple[int, int]]:
    """An endless iterator over (prompt tokens, output tokens) of requests.

    name: "sharegpt" or "alpaca", log-normal with the constants in FITS. pairs: lengths from a real
    file, which replace the distribution of "sharegpt". No pair exceeds the context.
    """
    pairs = pairs if name == "sharegpt" else None
    while True:
        if pairs:
            prompt, output = rng.choice(pairs)
        else:
            prompt, output = (
                max(1, round(rng.lognormvariate(math.log(mean) - spread**2 / 2, spread)))
                for mean, spread in FITS[name]
            )
        if prompt + output <= CONTEXT:
            yield prompt, output


def read_sharegpt(path: str) -> list[tuple[int, int]]:
    """The lengths of the first question of each conversation and of its answer, with four bytes per
    token, about the ratio of OPT's tokenizer for English.

    The file: [{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", ...}]}, ...].
    Raises argparse.ArgumentTypeError, which the user sees as one line.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        conversations = [
            [(turn["from"], len(turn["value"].encode(errors="replace"))) for turn in turns]
            for turns in (row["conversations"] for row in rows)
        ]
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        message = f"{path} is not in ShareGPT's JSON format: {error!r}"
        raise argparse.ArgumentTypeError(message) from None
    pairs = []
    for turns in conversations:
        for (role, question), (_, answer) in zip(turns, turns[1:], strict=False):
            if role in ("human", "user"):
                pair = [-(-size // 4) for size in (question, answer)]
                pairs += [tuple(pair)] if all(pair) and sum(pair) <= CONTEXT else []
                break
    if not pairs:
        message = f"{path} has no question that fits, with its answer, into {CONTEXT} tokens"
        raise argparse.ArgumentTypeError(message)
    return pairs


class Request(NamedTuple):
    """A sequence and its arrival in seconds."""

    arrival: float
    seq: Sequence


def traffic(
    name: str, count: int, rate: float, seed: int = 0, pairs: list | None = None, n: int = 1
) -> list[Request]:
    """`count` requests without shared prefixes, in a Poisson process of `rate` requests per second
    (math.inf: all at once), with n samples each. name, pairs: see `lengths`."""
    rng = random.Random(seed)
    clock = 0.0
    requests = []
    source = lengths(name, rng, pairs)
    for i in range(count):
        prompt, output = next(source)
        clock += rng.expovariate(rate) if rate < math.inf else 0
        # each prompt repeats a token of its own, so no two prompts share a prefix
        requests.append(Request(clock, Sequence(i, [i + 1] * prompt, Params(output, n))))
    return requests


# running ------------------------------------------------------------------------------------------


class Completion(NamedTuple):
    """A finished sequence, and the times in seconds of its arrival, first token and end."""

    seq: Sequence
    arrival: float
    first: float
    end: float

    @property
    def latency(self) -> float:
        return self.end - self.arrival

    @property
    def per_token(self) -> float:
        """The paper's normalized latency: seconds per output token."""
        return self.latency / len(self.seq.output)


def replay(
    scheduler: Scheduler,
    requests: list[Request],
    watch: Callable[[Plan, float], None] = lambda plan, seconds: None,
    model: Callable[[Sequence, int], int] = lambda seq, position: 0,
) -> list[Completion]:
    """Run the traffic through a scheduler in simulated time. Returns the finished sequences, the
    first to end first.

    watch: called with each plan and the seconds of its step; model: returns the token of a sequence
    at a position.
    """
    clock = 0.0
    completions = []
    pending = deque(requests)
    arrivals = {r.seq.request_id: r.arrival for r in requests}
    first: dict[Sequence, float] = {}
    while pending or scheduler.waiting or scheduler.running:
        if not (scheduler.waiting or scheduler.running):
            clock = max(clock, pending[0].arrival)
        while pending and pending[0].arrival <= clock:
            scheduler.add(pending.popleft().seq)
        plan = scheduler.schedule()
        assert plan.chunks, "no sequence can continue"
        step_seconds = seconds(plan)
        watch(plan, step_seconds)
        clock += step_seconds
        token_ids = [model(draw.seq, draw.position) for draw in plan.draws]
        for seq in scheduler.update(plan, token_ids):
            first.setdefault(seq, clock)
            if seq.finish_reason:
                arrival = arrivals[seq.request_id]
                completions.append(Completion(seq, arrival, first.pop(seq), clock))
        scheduler.finished.clear()
    return completions


def percentile(values: list[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


# reports ------------------------------------------------------------------------------------------


class Parser(terminal.Parser):
    """A parser with the flags of all programs of the lab. doc: the help text; lengths: whether the
    program draws lengths, for --sharegpt."""

    def __init__(self, doc: str, name: str, lengths: bool = False):
        super().__init__(prog=f"microvllm lab {name}", description=doc)
        self.name = name
        if lengths:
            help_text = "lengths from a file in ShareGPT's JSON format"
            self.add_argument("--sharegpt", type=read_sharegpt, metavar="FILE", help=help_text)
        help_text = "random seed (default: %(default)s)"
        self.add_argument("--seed", type=int, default=0, metavar="N", help=help_text)
        help_text = "folder for NAME.png and NAME.json (default: %(default)s)"
        self.add_argument("--out", type=Path, default="lab-results", metavar="DIR", help=help_text)
        self.add_argument("--no-plot", action="store_true", help="only numbers, no matplotlib")

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        if not args.no_plot and importlib.util.find_spec("matplotlib") is None:
            self.error(f"plots need matplotlib: {how_to_install('lab')}, or give --no-plot")
        args.name = self.name
        return args


def table(head: list[str], rows: list[list]) -> str:
    """Align a head and rows in columns; floats have three significant digits."""
    cells = [head, *[[f"{v:,.3g}" if isinstance(v, float) else str(v) for v in r] for r in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[v.rjust(w) for v, w in zip(row, widths, strict=True)] for row in cells]
    for line, row in zip(lines, cells, strict=True):
        line[0] = row[0].ljust(widths[0])
    return "\n".join(map("  ".join, lines))


def finish(args: argparse.Namespace, results: dict, draw: Callable) -> None:
    """Write the numbers to a file, and plot the figure that draw(pyplot) returns."""
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    paths = [str(path)]
    if not args.no_plot:
        import matplotlib

        matplotlib.use("Agg")  # no window
        import matplotlib.pyplot as plt

        figure = draw(plt)
        path = args.out / f"{args.name}.png"
        figure.savefig(path, dpi=120, bbox_inches="tight")
        plt.close(figure)
        paths.append(str(path))
    print(f"\nwritten: {', '.join(paths)}")
