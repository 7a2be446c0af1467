"""The workloads of `microvllm lab policies`, and its report."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from microvllm.cli import terminal
from microvllm.cli.policies import KINDS, find_policy, names
from microvllm.scheduler import Scheduler, Sequence

from . import policies, world


class Workload(NamedTuple):
    """Requests, and the answers that a fake model gives to them."""

    requests: list[world.Request]
    texts: list[list[int]]  # prompt and answer of each request, by its number
    blocks: int  # blocks of 16 tokens in the pool


def make_workload(turns: list[tuple[float, list[int], list[int]]], blocks: int) -> Workload:
    """A workload from a list of (arrival, prompt, prompt + answer)."""
    turns.sort(key=lambda turn: turn[0])
    requests = [
        world.Request(at, Sequence(i, prompt, world.Params(len(text) - len(prompt))))
        for i, (at, prompt, text) in enumerate(turns)
    ]
    return Workload(requests, [text for _, _, text in turns], blocks)


def conversation(
    rng: random.Random, at: float, text: list[int], token: int, num_turns: int, pause: float
):
    """The turns of one conversation that begins with `text`. Each turn contains the conversation so
    far, and arrives about `pause` seconds after the last answer. token: questions consist of it."""
    for _ in range(num_turns):
        num_question, num_answer = next(world.lengths("sharegpt", rng))
        if len(text) + num_question + num_answer > world.CONTEXT:
            break
        prompt = [*text, *[token] * num_question]
        text = [*prompt, *rng.choices(range(100), k=num_answer)]
        yield at, prompt, text
        at += 0.06 * num_answer + rng.expovariate(1 / pause)


def prompts_of(rng: random.Random, number: int) -> tuple[list[list[int]], list[float]]:
    """(system prompts of 100 to 800 tokens, their weights). The first prompt is used twice as often
    as the second, and three times as often as the third."""
    texts = [[100 + k] * rng.randint(100, 800) for k in range(number)]
    return texts, [1 / rank for rank in range(1, 1 + number)]


def bursts(seed: int, scale: float) -> Workload:
    """Every 40 s, thirty conversations begin at once, each with one of 16 system prompts. Half of
    them end after the first turn. The queue is long, then short, and the pool is always too
    small."""
    rng, turns = random.Random(seed), []
    texts, weights = prompts_of(rng, 16)
    for number in range(round(240 * scale)):
        at, (text,) = number // 30 * 40 + 2 * rng.random(), rng.choices(texts, weights)
        turns += conversation(rng, at, text, 1000 + number, rng.choice([1, 3]), 5)
    return make_workload(turns, 700)


def conversations(seed: int, scale: float) -> Workload:
    """Conversations that begin one by one, each with one of four short system prompts. Every other
    one ends after the first turn; the others continue some seconds later."""
    rng, at, turns = random.Random(seed), 0.0, []
    for number in range(round(300 * scale)):
        at += rng.expovariate(0.65)
        num_turns = rng.randint(2, 6) if number % 2 else 1
        turns += conversation(rng, at, [number % 4] * 200, 100 + number, num_turns, 20)
    return make_workload(turns, 700)


def shared(seed: int, scale: float) -> Workload:
    """Different questions, each after one of 24 system prompts."""
    rng, at, turns = random.Random(seed), 0.0, []
    texts, weights = prompts_of(rng, 24)
    for number in range(round(600 * scale)):
        at += rng.expovariate(2.0)
        num_question, num_answer = next(world.lengths("alpaca", rng))
        prompt = rng.choices(texts, weights)[0] + [1000 + number] * max(16, num_question)
        turns.append((at, prompt, prompt + rng.choices(range(100), k=num_answer)))
    return make_workload(turns, 300)


def circle(seed: int, scale: float) -> Workload:
    """A circular scan: forty texts of ten blocks, one after the other, again and again, in a pool
    with space for thirty texts."""
    numbers = [i % 40 for i in range(round(400 * scale))]
    turns = [(5.0 * i, [n] * 161, [n] * 162) for i, n in enumerate(numbers)]
    return make_workload(turns, 301)


WORKLOADS: dict[str, Callable[[int, float], Workload]] = {
    function.__name__: function for function in (bursts, conversations, shared, circle)
}
DEFAULT = {kind: find_policy(kind, name) for kind, name in KINDS.items()}
COLORS = {"": "#767676", "victim": "#0072B2", "admission": "#C77C02", "eviction": "#009E73"}
WHY = """
"computed" counts prompt tokens that were not found in the cache, and tokens computed again after a
preemption. The requests and answers are the same in every row."""


def measure(workload: Workload, policies: dict[str, Callable]) -> dict[str, float]:
    """Run the workload with these policies. Returns the columns of the report."""
    blocks = world.make_blocks(workload.blocks)
    blocks.pool.eviction = policies["eviction"]
    scheduler = Scheduler(
        blocks, 256, 2560, victim=policies["victim"], admission=policies["admission"]
    )
    reached = dict.fromkeys((r.seq for r in workload.requests), 0)  # the most tokens so far
    num_recomputed = steps = 0

    def watch(plan, seconds):
        nonlocal num_recomputed, steps
        steps += 1
        for seq, start, stop, _ in plan.chunks:
            num_recomputed += max(0, min(stop, reached[seq]) - start)
            reached[seq] = max(stop, reached[seq])

    texts = workload.texts
    completions = world.replay(
        scheduler, workload.requests, watch, lambda seq, at: texts[seq.request_id][at]
    )
    blocks.check([])
    num_cached = sum(c.seq.num_cached for c in completions)
    num_prompt = sum(c.seq.num_prompt for c in completions)
    waits = [c.first - c.arrival for c in completions]
    times = [c.latency for c in completions]
    return {
        "computed": num_prompt - num_cached + num_recomputed,
        "recomputed": num_recomputed,
        "hit rate %": 100 * num_cached / num_prompt,
        "preempted": scheduler.num_preemptions,
        "steps": steps,
        "first token p50 s": world.percentile(waits, 0.5),
        "request p50 s": world.percentile(times, 0.5),
        "request p99 s": world.percentile(times, 0.99),
    }


def select_policies(words: list[str]) -> list[tuple[str, str, Callable]]:
    """(kind, name, policy) for the words of --only: a kind for all its policies, or KIND=POLICY.
    Raises ValueError for an unknown kind or policy."""
    rows = []
    for word in words:
        kind, _, name = word.partition("=")
        if kind not in KINDS:
            raise ValueError(f"--only {word}: give {', '.join(KINDS)}, or KIND=NAME|FILE:FUNCTION")
        for each in [name] if name else [*names(kind)][1:]:  # without the default
            policy = find_policy(kind, each)
            rows.append((kind, f"{kind}={each.rpartition(':')[2]}", policy))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = world.Parser(policies.__doc__, "policies")
    add = parser.add_argument
    help_text = f"traffic: {', '.join(WORKLOADS)} (default: bursts, where all policies matter)"
    default = ["bursts"]
    add("--workload", nargs="+", default=default, choices=WORKLOADS, metavar="NAME", help=help_text)
    help_text = "rows after the defaults: KIND, KIND=NAME or KIND=FILE:FUNCTION (default: all)"
    add("--only", nargs="+", default=[*KINDS], metavar="KIND[=POLICY]", help=help_text)
    help_text = "factor for the length of the traffic (default: %(default)s)"
    add("--scale", type=float, default=1.0, metavar="X", help=help_text)
    args = parser.parse_args(argv)
    with terminal.user_errors(args):
        rows = [("", "the defaults", None), *select_policies(args.only)]
    results = {}
    for name in args.workload:
        results[name] = {}
        for kind, label, policy in rows:
            workload = WORKLOADS[name](args.seed, args.scale)
            results[name][label] = measure(workload, DEFAULT | ({kind: policy} if kind else {}))
        heads = list(results[name]["the defaults"])
        lines = [[label, *row.values()] for label, row in results[name].items()]
        print(world.table([name, *heads], lines), end="\n\n")
    print(WHY.strip())

    def draw(plt):
        columns = ["computed", "hit rate %", "preempted", "steps", "request p50 s", "request p99 s"]
        size = 16, 1.2 + 0.24 * len(rows) * len(results)
        figure, panels = plt.subplots(len(results), len(columns), figsize=size, sharey=True,
                                      squeeze=False)  # fmt: skip
        for line, (name, measured) in zip(panels, results.items(), strict=True):
            for axes, key in zip(line, columns, strict=True):
                values = [row[key] for row in measured.values()]
                axes.barh(list(measured), values, color=[COLORS[kind] for kind, _, _ in rows])
                axes.axvline(values[0], color="#333333", lw=0.8, ls="--")
                axes.set_title(key)
                axes.locator_params(axis="x", nbins=3)
                axes.xaxis.set_major_formatter(
                    lambda value, place: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"
                )
                axes.set_xlim(0, 1.1 * max(values) or 1)
            line[0].set_ylabel(name)
        panels[0][0].invert_yaxis()
        figure.tight_layout()
        return figure

    world.finish(args, results, draw)
