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
    """Requests, and the answers of the fake model."""

    requests: list[world.Request]
    texts: list[list[int]]  # prompt and answer of each request, by its number
    blocks: int  # blocks of 16 tokens in the pool


def made(turns: list[tuple[float, list[int], list[int]]], blocks: int) -> Workload:
    """A workload from a list of (arrival, prompt, prompt + answer)."""
    turns.sort(key=lambda turn: turn[0])
    requests = [
        world.Request(at, Sequence(i, prompt, world.Params(len(text) - len(prompt))))
        for i, (at, prompt, text) in enumerate(turns)
    ]
    return Workload(requests, [text for _, _, text in turns], blocks)


def talk(rng: random.Random, at: float, text: list[int], token: int, turns: int, think: float):
    """The turns of one conversation that begins with `text`. Each turn contains the conversation so
    far, and arrives about `think` seconds after the last answer. token: the questions repeat it."""
    for _ in range(turns):
        num_question, num_answer = next(world.lengths("sharegpt", rng))
        if len(text) + num_question + num_answer > world.CONTEXT:
            break
        prompt = [*text, *[token] * num_question]
        text = [*prompt, *rng.choices(range(100), k=num_answer)]
        yield at, prompt, text
        at += 0.06 * num_answer + rng.expovariate(1 / think)


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
        turns += talk(rng, at, text, 1000 + number, rng.choice([1, 3]), 5)
    return made(turns, 700)


def conversations(seed: int, scale: float) -> Workload:
    """Conversations that begin one by one, each with one of four short system prompts. Every other
    one ends after the first turn; the others continue some seconds later."""
    rng, at, turns = random.Random(seed), 0.0, []
    for number in range(round(300 * scale)):
        at += rng.expovariate(0.65)
        count = rng.randint(2, 6) if number % 2 else 1
        turns += talk(rng, at, [number % 4] * 200, 100 + number, count, 20)
    return made(turns, 700)


def shared(seed: int, scale: float) -> Workload:
    """Single questions without repetition, each after one of 24 system prompts."""
    rng, at, turns = random.Random(seed), 0.0, []
    texts, weights = prompts_of(rng, 24)
    for number in range(round(600 * scale)):
        at += rng.expovariate(2.0)
        num_question, num_answer = next(world.lengths("alpaca", rng))
        prompt = rng.choices(texts, weights)[0] + [1000 + number] * max(16, num_question)
        turns.append((at, prompt, prompt + rng.choices(range(100), k=num_answer)))
    return made(turns, 300)


def circle(seed: int, scale: float) -> Workload:
    """A circular scan: forty texts of ten blocks, one after the other, again and again, in a pool
    for thirty texts."""
    numbers = [i % 40 for i in range(round(400 * scale))]
    return made([(5.0 * i, [n] * 161, [n] * 162) for i, n in enumerate(numbers)], 301)


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
    reached = dict.fromkeys((r.seq for r in workload.requests), 0)  # tokens computed once
    again = steps = 0

    def watch(plan, seconds):
        nonlocal again, steps
        steps += 1
        for seq, start, stop, _ in plan.chunks:
            again += max(0, min(stop, reached[seq]) - start)
            reached[seq] = max(stop, reached[seq])

    texts = workload.texts
    done = world.replay(
        scheduler, workload.requests, watch, lambda seq, at: texts[seq.request_id][at]
    )
    blocks.check([])
    num_cached = sum(d.seq.num_cached for d in done)
    num_prompt = sum(d.seq.num_prompt for d in done)
    waits = [d.first - d.arrival for d in done]
    times = [d.latency for d in done]
    return {
        "computed": num_prompt - num_cached + again,
        "recomputed": again,
        "hit rate %": 100 * num_cached / num_prompt,
        "preempted": scheduler.num_preemptions,
        "steps": steps,
        "first token p50 s": world.percentile(waits, 0.5),
        "request p50 s": world.percentile(times, 0.5),
        "request p99 s": world.percentile(times, 0.99),
    }


def chosen(words: list[str]) -> list[tuple[str, str, Callable]]:
    """(kind, name, policy) for the words of --only: a kind for all its policies, or KIND=POLICY.
    Raises ValueError for an unknown kind or policy."""
    found = []
    for word in words:
        kind, _, name = word.partition("=")
        if kind not in KINDS:
            raise ValueError(f"--only {word}: give {', '.join(KINDS)}, or KIND=NAME|FILE:FUNCTION")
        for each in [name] if name else [*names(kind)][1:]:  # without the default
            policy = find_policy(kind, each)
            found.append((kind, f"{kind}={each.rpartition(':')[2]}", policy))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = world.Parser(policies.__doc__, "policies")
    add = parser.add_argument
    what = f"traffic: {', '.join(WORKLOADS)} (default: bursts, where each kind of policy matters)"
    add("--workload", nargs="+", default=["bursts"], choices=WORKLOADS, metavar="NAME", help=what)
    what = "rows beside the defaults: KIND, KIND=NAME or KIND=FILE:FUNCTION (default: all)"
    add("--only", nargs="+", default=[*KINDS], metavar="KIND[=POLICY]", help=what)
    what = "factor of the traffic's length (default: %(default)s)"
    add("--scale", type=float, default=1.0, metavar="X", help=what)
    args = parser.parse_args(argv)
    with terminal.user_errors(args):
        rows = [("", "the defaults", None), *chosen(args.only)]
    found = {}
    for name in args.workload:
        found[name] = {}
        for kind, label, policy in rows:
            workload = WORKLOADS[name](args.seed, args.scale)
            found[name][label] = measure(workload, DEFAULT | ({kind: policy} if kind else {}))
        heads = list(found[name]["the defaults"])
        lines = [[label, *row.values()] for label, row in found[name].items()]
        print(world.table([name, *heads], lines), end="\n\n")
    print(WHY.strip())

    def draw(plt):
        shown = ["computed", "hit rate %", "preempted", "steps", "request p50 s", "request p99 s"]
        size = 16, 1.2 + 0.24 * len(rows) * len(found)
        figure, panels = plt.subplots(len(found), len(shown), figsize=size, sharey=True,
                                      squeeze=False)  # fmt: skip
        for line, (name, got) in zip(panels, found.items(), strict=True):
            for axes, key in zip(line, shown, strict=True):
                values = [row[key] for row in got.values()]
                axes.barh(list(got), values, color=[COLORS[kind] for kind, _, _ in rows])
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

    world.finish(args, found, draw)
