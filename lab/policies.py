"""Policies: who is preempted, who is admitted, which free block is evicted; side by side.

The workload: conversations over four system prompts, whose next turn comes seconds after the last
answer and carries all of it, among single questions that nobody asks again, in a pool too small to
keep them all. Each row changes one of the three policies of scheduler.py. Write your own as a
function of the same arguments, add it below, and run it; `LLM(..., victim=...)` takes it as well.
"""

from __future__ import annotations

import random

from microvllm.cli.terminal import positive
from microvllm.scheduler import (
    BlockManager,
    Scheduler,
    Sequence,
    first_come,
    least_recently_used,
    youngest,
)

from . import world

# victims: which of scheduler.running gives its blocks back so that `seq` can grow -----------------


def largest(scheduler: Scheduler, seq: Sequence) -> Sequence:
    """Who holds the most blocks: one such victim makes room for many."""
    return max(scheduler.running, key=lambda s: sum(map(bool, s.table)))


def cheapest(scheduler: Scheduler, seq: Sequence) -> Sequence:
    """Who has the least to compute again."""
    return min(scheduler.running, key=lambda s: s.num_computed)


def furthest(scheduler: Scheduler, seq: Sequence) -> Sequence:
    """Who may still write the most tokens, and so would hold its blocks longest."""
    return max(scheduler.running, key=lambda s: s.max_length - len(s.tokens))


# admission: which of scheduler.waiting is next. all three may let one wait forever ----------------


def shortest(scheduler: Scheduler) -> Sequence:
    """Who may end first: the fewest tokens to compute and to write."""
    return min(scheduler.waiting, key=lambda s: s.max_length)


def best_cached(scheduler: Scheduler) -> Sequence:
    """Whose beginning is in the cache, the most of it, before it is evicted."""
    match = scheduler.blocks.match
    return max(scheduler.waiting, key=lambda s: len(match(s, s.cacheable)))


def first_fit(scheduler: Scheduler) -> Sequence:
    """The first whose prompt fits into the free blocks; a large one does not hold up the others."""
    room = scheduler.blocks.num_free - scheduler.blocks.blocks_for(16 * len(scheduler.running))
    fits = (s for s in scheduler.waiting if scheduler.blocks.blocks_for(len(s.tokens)) <= room)
    return next(fits, scheduler.waiting[0])


# eviction: which of blocks.cached is given to a new text ------------------------------------------


def most_recently_used(blocks: BlockManager) -> int:
    """The last one that became free: right where texts come round in a circle."""
    return next(reversed(blocks.cached))


def first_published(blocks: BlockManager) -> int:
    """The one whose text is the oldest, however often it was used since (first in, first out)."""
    return next(block for block in blocks.hash_of if block in blocks.cached)


dice = random.Random(0)


def by_chance(blocks: BlockManager) -> int:
    """Any of the thousand least recently used."""
    few = [block for block, _ in zip(blocks.cached, range(1000), strict=False)]
    return dice.choice(few)


DEFAULT = {"victim": youngest, "admission": first_come, "eviction": least_recently_used}
OTHERS = {
    "victim": [largest, cheapest, furthest],
    "admission": [shortest, best_cached, first_fit],
    "eviction": [most_recently_used, first_published, by_chance],
}

# the workload and its report ----------------------------------------------------------------------


def conversations(count: int, seed: int) -> tuple[list[world.Request], list[list[int]]]:
    """The turns of `count` conversations (every other one ends with its first turn), and the whole
    text of each request: what is not prompt is what the fake model will say."""
    rng, clock, found = random.Random(seed), 0.0, []
    for talk in range(count):
        clock += rng.expovariate(0.65)
        arrival, text = clock, [talk % 4] * 200  # one of four system prompts
        for _ in range(rng.randint(2, 6) if talk % 2 else 1):
            prompt, output = next(world.lengths("sharegpt", rng))
            if len(text) + prompt + output > world.CONTEXT:
                break
            asked = [*text, *[100 + talk] * prompt]
            text = [*asked, *rng.choices(range(100), k=output)]
            found.append((arrival, asked, text))
            arrival += 0.06 * output + rng.expovariate(1 / 20)  # read it, think, write
    found.sort(key=lambda turn: turn[0])
    requests = [
        world.Request(at, Sequence(i, asked, world.Params(len(text) - len(asked))))
        for i, (at, asked, text) in enumerate(found)
    ]
    return requests, [text for _, _, text in found]


def measure(policies: dict, args) -> dict[str, float]:
    """The workload under these policies: what the report's columns say."""
    blocks = BlockManager(args.blocks, 16, eviction=policies["eviction"])
    scheduler = Scheduler(
        blocks, 256, 2560, victim=policies["victim"], admission=policies["admission"]
    )
    requests, texts = conversations(args.conversations, args.seed)
    reached = dict.fromkeys((r.seq for r in requests), 0)  # tokens that were computed once
    again = 0

    def watch(step, took):
        nonlocal again
        for seq, start, stop in step.chunks:
            again += max(0, min(stop, reached[seq]) - start)
            reached[seq] = max(stop, reached[seq])

    done = world.replay(scheduler, requests, watch, lambda seq, at: texts[seq.request_id][at])
    tokens = sum(len(d.seq.tokens) - d.seq.num_prompt for d in done)
    hits = sum(d.seq.num_cached for d in done)
    waits, times = [d.first - d.arrival for d in done], [d.latency for d in done]
    return {
        "tokens/s": tokens / done[-1].end,
        "first token p50 s": world.percentile(waits, 0.5),
        "first token p99 s": world.percentile(waits, 0.99),
        "request p50 s": world.percentile(times, 0.5),
        "request p90 s": world.percentile(times, 0.9),
        "request p99 s": world.percentile(times, 0.99),
        "preempted": scheduler.num_preemptions,
        "recomputed": again,
        "hit rate %": 100 * hits / sum(d.seq.num_prompt for d in done),
    }


def main(argv: list[str] | None = None) -> None:
    parser = world.Parser(__doc__, "policies")
    add = parser.add_argument
    add("--conversations", type=positive, default=300, metavar="N", help="(%(default)s)")
    add("--blocks", type=positive, default=700, metavar="N", help="of 16 tokens (%(default)s)")
    args = parser.parse_args(argv)
    found = {"the defaults": measure(DEFAULT, args)}
    for kind, functions in OTHERS.items():
        for function in functions:
            name = f"{kind}={function.__name__}"
            found[name] = measure(DEFAULT | {kind: function}, args)
    heads = list(found["the defaults"])
    print(world.table(["", *heads], [[name, *row.values()] for name, row in found.items()]))

    def draw(plt):
        shown = [key for key in found["the defaults"] if "p90" not in key]
        figure, panels = plt.subplots(1, len(shown), figsize=(16, 3.6), sharey=True)
        for axes, key in zip(panels, shown, strict=True):
            values = [row[key] for row in found.values()]
            axes.barh(list(found), values, color=["#333333", *["#0072B2"] * 3, *["#E69F00"] * 3,
                                                  *["#009E73"] * 3])  # fmt: skip
            axes.axvline(values[0], color="#333333", lw=0.8, ls="--")
            axes.set_title(key)
        panels[0].invert_yaxis()
        figure.tight_layout()
        return figure

    world.finish(args, found, draw)
