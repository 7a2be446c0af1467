"""The exercises of EXERCISES.md: which of them are solved?

microvllm lab start DIR   copies them to a folder of yours
microvllm lab check       judges all
microvllm lab check 3 4   judges these

The file to touch is DIR/exercises.py. The exit status is 0 if all that were asked for are solved.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from microvllm.cli import learn, terminal
from microvllm.cli.terminal import Parser, positive
from microvllm.scheduler import BlockManager, Scheduler, Sequence

from . import scenes, solutions, world


def serve(blocks: BlockManager, requests: list[world.Request], most: int = 32, **policies) -> dict:
    """Run requests to their end, at most so many at once.

    Returns done (who ended, and when), again (tokens computed more than once), and hits (tokens of
    prompts that were found).
    """
    scheduler = Scheduler(blocks, most, 512, **policies)
    reached: dict[Sequence, int] = {}
    again = 0

    def watch(step, took):
        nonlocal again
        for seq, start, stop in step.chunks:
            again += max(0, min(stop, reached.get(seq, 0)) - start)
            reached[seq] = max(stop, reached.get(seq, 0))

    # the samples of a request write different texts
    done = world.replay(scheduler, requests, watch, lambda seq, at: seq.sample_id)
    blocks.check([])
    hits = sum(d.seq.num_cached or 0 for d in done)
    return {"done": done, "again": again, "hits": hits}


def single(prompt: list[int]) -> list[world.Request]:
    """One request for one token."""
    return [world.Request(0.0, Sequence(0, list(prompt), world.Params(1)))]


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
    serve(blocks, single(first))
    if (found := serve(blocks, single(second))["hits"]) != 64:
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


def families() -> list[world.Request]:
    """Prompts of all lengths that share nothing, a third of them for six samples."""
    rng, found = random.Random(0), []
    for i in range(60):
        n, prompt, new = rng.choice([1, 1, 6]), rng.randint(1, 300), rng.randint(10, 150)
        found.append(world.Request(0.0, Sequence(i, [i + 1] * prompt, world.Params(new, n))))
    return found


def again(**policies) -> int:
    """Tokens that `families` compute again in a pool that is too small for them."""
    return serve(BlockManager(150, 16, False), families(), **policies)["again"]


def victim(work: ModuleType) -> str | None:
    after, before = again(victim=work.victim), again()
    if 3 * after > before:
        return f"{after} tokens are computed again; with the default it is {before}"
    return None


def stream() -> list[world.Request]:
    """Requests of all lengths that come somewhat faster than they can be served."""
    rng, clock, found = random.Random(0), 0.0, []
    for i in range(200):
        clock += rng.expovariate(8)
        seq = Sequence(i, [i + 1] * rng.randint(1, 400), world.Params(rng.randint(1, 120)))
        found.append(world.Request(clock, seq))
    return found


def times(**policies) -> tuple[float, float]:
    """Seconds that the mean request of `stream`, and the slowest, take."""
    taken = [d.latency for d in serve(BlockManager(800, 16), stream(), 16, **policies)["done"]]
    return sum(taken) / len(taken), max(taken)


def admission(work: ModuleType) -> str | None:
    (mean, worst), (before, slowest) = times(admission=work.admission), times()
    if mean > 0.9 * before or worst > 1.5 * slowest:
        told = f"the mean request takes {mean:.2f} s and the slowest {worst:.1f}"
        return f"{told}; with the default it is {before:.2f} and {slowest:.1f}"
    return None


def eviction(work: ModuleType) -> str | None:
    rng = random.Random(0)  # prompts of ten blocks, any of 40; the pool holds 15
    texts = [[rng.randrange(40)] * 161 for _ in range(120)]

    def hits(policy) -> int:
        blocks, found = BlockManager(151, 16, eviction=lambda blocks: policy(blocks, coming)), 0
        hashed = [{*blocks.compute_hashes(single(text)[0].seq, 10)} for text in texts]
        for turn, text in enumerate(texts):
            coming = hashed[turn + 1 : turn + 41]
            found += serve(blocks, single(text))["hits"]
        return found

    found, best = hits(work.eviction), hits(solutions.eviction)
    if found < 0.99 * best:
        return f"{found} of {160 * len(texts)} tokens are found again; {best} can be"
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


def compared(number: int) -> Callable[[ModuleType], str | None]:
    """The check of a prediction: the engine does it, and its trace is compared."""
    name = scenes.ANSWERS[number].__name__

    def check(work: ModuleType) -> str | None:
        told, folder = getattr(work, name)(), Path(work.__file__).parent
        if work is solutions:
            folder = Path(tempfile.mkdtemp())
        events, page = scenes.record(number, folder)
        happened = scenes.ANSWERS[number](events)
        wrong = [key for key, value in happened.items() if tidy(told.get(key)) != tidy(value)]
        if not wrong:
            return None
        return f"not so: {', '.join(wrong)}. Look at {page}" + (", step 3" * (number == 11))

    check.__name__ = name
    return check


def tidy(value):
    """Lists and tuples of lists and tuples, in one form."""
    return [tidy(v) for v in value] if isinstance(value, (list, tuple)) else value


CHECKS = [blocks_needed, slot_of, forgetful, two_prompts, misled, pool_without_preemption, victim,
          admission, eviction, freed_by_window, *map(compared, scenes.ANSWERS)]  # fmt: skip


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
    with terminal.user_errors(args):
        work = solutions if args.solutions else learn.load_exercises("lab")
    failed = False
    for number in args.number or every:
        wrong = verdict(number, work)
        failed |= wrong is not None
        if not args.solutions:
            learn.mark("lab", "solved", number, wrong is None)
        told = "solved" if wrong is None else f"not yet: {wrong}"
        print(f"{number:2} {CHECKS[number - 1].__name__:24}{told}", flush=True)
    sys.exit(failed)
