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
    """Requests that come, and what the fake model answers."""

    requests: list[world.Request]
    texts: list[list[int]]  # of each request by its number: the prompt, and the answer
    blocks: int  # of 16 tokens, in the pool


def made(turns: list[tuple[float, list[int], list[int]]], blocks: int) -> Workload:
    """A workload of (arrival, prompt, prompt and answer)s."""
    turns.sort(key=lambda turn: turn[0])
    requests = [
        world.Request(at, Sequence(i, prompt, world.Params(len(text) - len(prompt))))
        for i, (at, prompt, text) in enumerate(turns)
    ]
    return Workload(requests, [text for _, _, text in turns], blocks)


def talk(rng: random.Random, at: float, text: list[int], token: int, turns: int, think: float):
    """The turns of one conversation that begins with `text`: each carries all that was said, and
    comes about `think` seconds after the last answer. token: what its questions are made of."""
    for _ in range(turns):
        num_question, num_answer = next(world.lengths("sharegpt", rng))
        if len(text) + num_question + num_answer > world.CONTEXT:
            break
        prompt = [*text, *[token] * num_question]
        text = [*prompt, *rng.choices(range(100), k=num_answer)]
        yield at, prompt, text
        at += 0.06 * num_answer + rng.expovariate(1 / think)


def prompts_of(rng: random.Random, number: int) -> tuple[list[list[int]], list[float]]:
    """System prompts of 100 to 800 tokens, and how often each is used: the first twice as often as
    the second, three times as often as the third."""
    texts = [[100 + k] * rng.randint(100, 800) for k in range(number)]
    return texts, [1 / rank for rank in range(1, 1 + number)]


def bursts(seed: int, scale: float) -> Workload:
    """Every 40 s thirty conversations begin at once, behind one of 16 system prompts; half of them
    end with the first turn. The queue is long, then short, and the pool too small for either."""
    rng, turns = random.Random(seed), []
    texts, weights = prompts_of(rng, 16)
    for number in range(round(240 * scale)):
        at, (text,) = number // 30 * 40 + 2 * rng.random(), rng.choices(texts, weights)
        turns += talk(rng, at, text, 1000 + number, rng.choice([1, 3]), 5)
    return made(turns, 700)


def conversations(seed: int, scale: float) -> Workload:
    """Conversations that begin one by one, over one of four short system prompts. Every other one
    ends with the first turn, the others come back after seconds."""
    rng, at, turns = random.Random(seed), 0.0, []
    for number in range(round(300 * scale)):
        at += rng.expovariate(0.65)
        count = rng.randint(2, 6) if number % 2 else 1
        turns += talk(rng, at, [number % 4] * 200, 100 + number, count, 20)
    return made(turns, 700)


def shared(seed: int, scale: float) -> Workload:
    """Single questions that come only once, each behind one of 24 system prompts."""
    rng, at, turns = random.Random(seed), 0.0, []
    texts, weights = prompts_of(rng, 24)
    for number in range(round(600 * scale)):
        at += rng.expovariate(2.0)
        num_question, num_answer = next(world.lengths("alpaca", rng))
        prompt = rng.choices(texts, weights)[0] + [1000 + number] * max(16, num_question)
        turns.append((at, prompt, prompt + rng.choices(range(100), k=num_answer)))
    return made(turns, 300)


def circle(seed: int, scale: float) -> Workload:
    """A circular scan: forty texts of ten blocks, one after the other, over and over, while the
    pool holds thirty."""
    numbers = [i % 40 for i in range(round(400 * scale))]
    return made([(5.0 * i, [n] * 161, [n] * 162) for i, n in enumerate(numbers)], 301)


WORKLOADS: dict[str, Callable[[int, float], Workload]] = {
    function.__name__: function for function in (bursts, conversations, shared, circle)
}
DEFAULT = {kind: find_policy(kind, name) for kind, name in KINDS.items()}
COLORS = {"": "#767676", "victim": "#0072B2", "admission": "#C77C02", "eviction": "#009E73"}
WHY = """
Computed are the tokens of prompts that were not found in the cache, and what was computed again
after a preemption. The traffic is the same in every row, and so is what is said."""


def measure(workload: Workload, policies: dict[str, Callable]) -> dict[str, float]:
    """The workload under these policies: what the report's columns say."""
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
    """(kind, name, policy) of each word of --only: a kind for all of it, or KIND=POLICY. Raises
    ValueError for what there is not."""
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
    what = f"of {', '.join(WORKLOADS)} (bursts, where each kind of policy matters)"
    add("--workload", nargs="+", default=["bursts"], choices=WORKLOADS, metavar="NAME", help=what)
    what = "rows besides the defaults: a kind, or KIND=NAME or KIND=FILE:FUNCTION (all)"
    add("--only", nargs="+", default=[*KINDS], metavar="KIND[=POLICY]", help=what)
    add("--scale", type=float, default=1.0, metavar="X", help="times as long (%(default)s)")
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
