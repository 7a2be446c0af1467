"""The exercises of EXERCISES.md: which of them are solved?

microvllm lab check       all ten
microvllm lab check 3 4   these

The file to touch is exercises.py. The exit status is 0 if all that were asked for are solved.
"""

from __future__ import annotations

import random
import sys
from types import ModuleType

from microvllm.cli.terminal import Parser, positive
from microvllm.scheduler import BlockManager, Scheduler, Sequence

from . import exercises, solutions, world


def serve(blocks: BlockManager, prompts: list[tuple[list[int], int]], **policies) -> dict:
    """Run (prompt, new tokens) pairs, all there from the start, to their end.

    Returns done (who ended, and when), preemptions, again (tokens computed more than once), and
    hits (tokens of prompts that were found). check() looks at every step.
    """
    scheduler = Scheduler(blocks, 32, 512, **policies)
    reached: dict[Sequence, int] = {}
    again = 0

    def watch(step, took):
        nonlocal again
        blocks.check(scheduler.running)
        for seq, start, stop in step.chunks:
            again += max(0, min(stop, reached.get(seq, 0)) - start)
            reached[seq] = max(stop, reached.get(seq, 0))

    requests = [
        world.Request(0.0, Sequence(i, list(prompt), world.Params(new)))
        for i, (prompt, new) in enumerate(prompts)
    ]
    done = world.replay(scheduler, requests, watch)
    hits = sum(d.seq.num_cached for d in done)
    return {"done": done, "again": again, "hits": hits, "preemptions": scheduler.num_preemptions}


def mixture(count: int) -> list[tuple[list[int], int]]:
    """Prompts of all lengths that share nothing."""
    rng = random.Random(0)
    return [([i + 1] * rng.randint(1, 400), rng.randint(1, 120)) for i in range(count)]


# each returns what is wrong, or None --------------------------------------------------------------


def blocks_needed(work: ModuleType) -> str | None:
    for prompt, new, size in [(1, 1, 16), (16, 1, 16), (16, 2, 16), (30, 3, 16), (7, 40, 4)]:
        blocks = BlockManager(99, size)
        scheduler, held = Scheduler(blocks, 1, 512), []
        scheduler.add(Sequence(0, [1] * prompt, world.Params(new)))
        while scheduler.waiting or scheduler.running:
            step = scheduler.schedule()
            held.append(blocks.num_usable - blocks.num_free)
            scheduler.update(step, [0] * len(step.samples))
        if (told := work.blocks_needed(prompt, new, size)) != held[-1]:
            return f"{prompt} tokens and {new} more, in blocks of {size}: {held[-1]}, not {told}"
    return None


def slot_of(work: ModuleType) -> str | None:
    table = [7, 3, 12]
    for position, slot in [(0, 28), (3, 31), (4, 12), (6, 14), (11, 51)]:
        if (told := work.slot_of(table, position, 4)) != slot:
            return f"table {table}, blocks of 4: position {position} does not lie in slot {told}"
    return None


def forgetful(work: ModuleType) -> str | None:
    blocks = work.Forgetful(40, 4)
    scheduler = Scheduler(blocks, 8, 64)
    scheduler.add(Sequence(0, [1, 2, 3, 4, 5, 6], world.Params(6, n=2)))
    for turn in range(6):
        step = scheduler.schedule()
        if step.copies:
            return "it still copies"
        scheduler.update(step, [2 * turn, 2 * turn + 1][: len(step.samples)])
        try:
            blocks.check(scheduler.running)
        except AssertionError as error:
            return None if "two texts" in str(error) else f"check() found another fault: {error}"
    return "check() found nothing"


def two_prompts(work: ModuleType) -> str | None:
    blocks = BlockManager(99, 16)
    first, second = work.two_prompts()
    serve(blocks, [(first, 1)])
    if (found := serve(blocks, [(second, 1)])["hits"]) != 64:
        return f"the second prompt finds {found} tokens"
    return None


def misled(work: ModuleType) -> str | None:
    first, second = work.misled()
    pairs = zip(first, second, strict=False)
    common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
    blocks = work.Unchained(99, 16)
    for prompt in (first, second):
        scheduler = Scheduler(blocks, 1, 512)
        seq = Sequence(0, list(prompt), world.Params(1))
        scheduler.add(seq)
        scheduler.update(scheduler.schedule(), [0])
    if seq.num_cached <= common:
        return f"they have {common} tokens in common, and the second is given {seq.num_cached}"
    return None


def preempts(sizes: list[tuple[int, int]], num_blocks: int) -> bool:
    """Do these sequences, all admitted at once, need more blocks than there are?"""
    blocks = BlockManager(num_blocks, 8, enable_prefix_caching=False)
    scheduler = Scheduler(blocks, 8, 10_000)
    for i, (prompt, new) in enumerate(sizes):
        seq = Sequence(i, [1] * prompt, world.Params(new))
        if not blocks.admit(seq, [], prompt):
            return True
        scheduler.running.append(seq)
    while scheduler.running and not scheduler.num_preemptions:
        step = scheduler.schedule()
        scheduler.update(step, [0] * len(step.samples))
    return scheduler.num_preemptions > 0


def pool_without_preemption(work: ModuleType) -> str | None:
    rng = random.Random(0)
    for _ in range(3):
        sizes = [(rng.randint(1, 60), rng.randint(1, 60)) for _ in range(6)]
        told = work.pool_without_preemption(list(sizes), 8)
        if told < 2 or preempts(sizes, told):
            return f"{told} blocks of 8 are too few for {sizes}"
        if not preempts(sizes, told - 1):
            return f"{told} blocks of 8 are more than it takes for {sizes}"
    return None


def victim(work: ModuleType) -> str | None:
    before = serve(BlockManager(150, 16, False), mixture(100))["again"]
    after = serve(BlockManager(150, 16, False), mixture(100), victim=work.victim)["again"]
    if after > 2 / 3 * before:
        return f"{after} tokens are computed again; with the default it is {before}"
    return None


def admission(work: ModuleType) -> str | None:
    def mean(**policies):
        done = serve(BlockManager(300, 16), mixture(200), **policies)["done"]
        return sum(d.latency for d in done) / len(done)

    before, after = mean(), mean(admission=work.admission)
    if after > 0.8 * before:
        return f"a request takes {after:.1f} s; with the default it is {before:.1f}"
    return None


def eviction(work: ModuleType) -> str | None:
    circle = [([i % 40] * 161, 1) for i in range(200)]  # 40 texts of ten blocks, in a pool of 300
    blocks = BlockManager(301, 16, eviction=work.eviction)
    hits = sum(serve(blocks, [turn])["hits"] for turn in circle)
    if hits < 0.4 * 160 * len(circle):
        return f"{hits} of {160 * len(circle)} tokens are found again; 40 % would do"
    return None


def freed_by_window(work: ModuleType) -> str | None:
    for computed, window, size in [(0, 8, 4), (20, 8, 4), (21, 8, 4), (37, 5, 16), (64, 32, 16)]:
        table = [5 + 3 * i for i in range(-(-computed // size))]
        seen = {p // size for p in range(max(0, computed - window), computed)}
        wanted = [block for i, block in enumerate(table) if i not in seen]
        if (told := work.freed_by_window(table, computed, window, size)) != wanted:
            return (
                f"table {table}, {computed} tokens, window {window}, blocks of {size}: not {told}"
            )
    return None


CHECKS = [blocks_needed, slot_of, forgetful, two_prompts, misled, pool_without_preemption, victim,
          admission, eviction, freed_by_window]  # fmt: skip


def verdict(number: int, work: ModuleType) -> str | None:
    """What is wrong with an exercise, None if it is solved."""
    try:
        return CHECKS[number - 1](work)
    except Exception as error:  # the reader's own code may raise anything
        return f"it raised {type(error).__name__}: {error}"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="microvllm lab check", description=__doc__)
    every = range(1, len(CHECKS) + 1)
    parser.add_argument("number", nargs="*", type=positive, metavar="N")
    parser.add_argument("--solutions", action="store_true", help="check solutions.py instead")
    args = parser.parse_args(argv)
    if set(args.number) - set(every):
        parser.error(f"the exercises are 1 to {len(CHECKS)}")
    failed = False
    for number in args.number or every:
        wrong = verdict(number, solutions if args.solutions else exercises)
        failed |= wrong is not None
        told = "solved" if wrong is None else f"not yet: {wrong}"
        print(f"{number:2} {CHECKS[number - 1].__name__:24}{told}")
    sys.exit(failed)
