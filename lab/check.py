"""Check: which exercises of EXERCISES.md are solved?

microvllm lab start DIR   copies the exercises to a folder
microvllm lab check       checks all of them
microvllm lab check 3 4   checks exercises 3 and 4

The file to change is DIR/exercises.py. The exit status is 0 if all checked exercises are solved.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from microvllm.blocks import BlockManager, BlockPool
from microvllm.cli import learn, terminal
from microvllm.cli.terminal import Parser, positive
from microvllm.scheduler import Scheduler, Sequence

from . import scenes, solutions, world


def serve(blocks: BlockManager, requests: list[world.Request], limit: int = 32, **policies) -> dict:
    """Run requests to their end, at most `limit` at once.

    Returns completions (one for each sequence), num_recomputed (tokens computed again), and
    num_hits (prompt tokens found in the cache).
    """
    scheduler = Scheduler(blocks, limit, 512, **policies)
    reached: dict[Sequence, int] = {}
    num_recomputed = 0

    def watch(plan, seconds):
        nonlocal num_recomputed
        for seq, start, stop, _ in plan.chunks:
            num_recomputed += max(0, min(stop, reached.get(seq, 0)) - start)
            reached[seq] = max(stop, reached.get(seq, 0))

    # the samples of a request write different texts
    completions = world.replay(scheduler, requests, watch, lambda seq, position: seq.index)
    blocks.check([])
    num_hits = sum(c.seq.num_cached or 0 for c in completions)
    return {
        "completions": completions,
        "num_recomputed": num_recomputed,
        "num_hits": num_hits,
    }


def one_request(prompt: list[int]) -> list[world.Request]:
    """A list with one request, which generates one token."""
    return [world.Request(0.0, Sequence(0, list(prompt), world.Params(1)))]


# each check returns a message about the mistake, or None ------------------------------------------


def blocks_needed(work: ModuleType) -> str | None:
    for prompt, new, size in [(1, 1, 16), (16, 1, 16), (16, 2, 16), (30, 3, 16), (7, 40, 4)]:
        blocks = world.make_blocks(99, size)
        scheduler = Scheduler(blocks, 1, 512)
        num_held = 0
        scheduler.add(Sequence(0, [1] * prompt, world.Params(new)))
        while scheduler.waiting or scheduler.running:
            plan = scheduler.schedule()
            num_held = blocks.pool.num_usable - blocks.pool.num_free
            scheduler.update(plan, [0] * len(plan.draws))
        answer = work.blocks_needed(prompt, new, size)
        if answer != num_held:
            case = f"prompt {prompt}, new {new}, block size {size}"
            return f"{case}: expected {num_held}, got {answer}"
    return None


def slot_of(work: ModuleType) -> str | None:
    table = [7, 3, 12]
    for position, slot in [(0, 28), (3, 31), (4, 12), (6, 14), (11, 51)]:
        answer = work.slot_of(table, position, 4)
        if answer != slot:
            return f"table {table}, blocks of 4: position {position} is not in slot {answer}"
    return None


def forgetful(work: ModuleType) -> str | None:
    blocks = work.Forgetful(BlockPool(40), 4)
    scheduler = Scheduler(blocks, 8, 64)
    scheduler.add(Sequence(0, [1, 2, 3, 4, 5, 6], world.Params(6, n=2)))
    for turn in range(6):
        plan = scheduler.schedule()
        if plan.copies:
            return "it still copies"
        scheduler.update(plan, [2 * turn, 2 * turn + 1][: len(plan.draws)])
        try:
            blocks.check(scheduler.running)
        except AssertionError as error:
            return None if "two texts" in str(error) else f"check() found another mistake: {error}"
    return "check() found nothing"


def two_prompts(work: ModuleType) -> str | None:
    blocks = world.make_blocks(99)
    first, second = work.two_prompts()
    serve(blocks, one_request(first))
    num_hits = serve(blocks, one_request(second))["num_hits"]
    if num_hits != 64:
        return f"the second prompt finds {num_hits} tokens, not 64"
    return None


def misled(work: ModuleType) -> str | None:
    first, second = work.misled()
    pairs = zip(first, second, strict=False)
    common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
    blocks = work.Unchained(BlockPool(99), 16)
    for prompt in (first, second):
        scheduler = Scheduler(blocks, 1, 512)
        seq = Sequence(0, list(prompt), world.Params(1))
        scheduler.add(seq)
        scheduler.update(scheduler.schedule(), [0])
    if seq.num_cached <= common:
        return f"the second finds {seq.num_cached} tokens, and {common} are their common prefix"
    return None


def preempts(sizes: list[tuple[int, int]], num_blocks: int) -> bool:
    """Is a sequence preempted if all requests are admitted at once into num_blocks blocks?"""
    blocks = world.make_blocks(num_blocks, 8, enable_prefix_caching=False)
    scheduler = Scheduler(blocks, 8, 10_000)
    for i, (prompt, new) in enumerate(sizes):
        seq = Sequence(i, [1] * prompt, world.Params(new))
        if not blocks.admit(seq, prompt):
            return True
        scheduler.running.append(seq)
    while scheduler.running and not scheduler.num_preemptions:
        plan = scheduler.schedule()
        scheduler.update(plan, [0] * len(plan.draws))
    return scheduler.num_preemptions > 0


def pool_without_preemption(work: ModuleType) -> str | None:
    rng = random.Random(0)
    for _ in range(3):
        sizes = [(rng.randint(1, 60), rng.randint(1, 60)) for _ in range(6)]
        num_blocks = work.pool_without_preemption(list(sizes), 8)
        if num_blocks < 2 or preempts(sizes, num_blocks):
            return f"{num_blocks} blocks of 8 are too few for {sizes}"
        if not preempts(sizes, num_blocks - 1):
            return f"{num_blocks} blocks of 8 are more than necessary for {sizes}"
    return None


def families() -> list[world.Request]:
    """Prompts of various lengths that share nothing; a third of them have six samples."""
    rng = random.Random(0)
    requests = []
    for i in range(60):
        n = rng.choice([1, 1, 6])
        prompt = [i + 1] * rng.randint(1, 300)
        params = world.Params(rng.randint(10, 150), n)
        requests.append(world.Request(0.0, Sequence(i, prompt, params)))
    return requests


def count_recomputed(**policies) -> int:
    """The number of tokens computed again when `families` runs in a pool that is too small."""
    blocks = world.make_blocks(150, enable_prefix_caching=False)
    return serve(blocks, families(), **policies)["num_recomputed"]


def victim(work: ModuleType) -> str | None:
    num_recomputed = count_recomputed(victim=work.victim)
    default = count_recomputed()
    if 3 * num_recomputed > default:
        return f"{num_recomputed} tokens are computed again; with the default {default}"
    return None


def stream() -> list[world.Request]:
    """Requests of various lengths that arrive a little faster than they can be served."""
    rng = random.Random(0)
    clock = 0.0
    requests = []
    for i in range(200):
        clock += rng.expovariate(8)
        seq = Sequence(i, [i + 1] * rng.randint(1, 400), world.Params(rng.randint(1, 120)))
        requests.append(world.Request(clock, seq))
    return requests


def times(**policies) -> tuple[float, float]:
    """(mean time, longest time) of the requests of `stream`, in seconds."""
    completions = serve(world.make_blocks(800), stream(), 16, **policies)["completions"]
    latencies = [c.latency for c in completions]
    return sum(latencies) / len(latencies), max(latencies)


def admission(work: ModuleType) -> str | None:
    mean, longest = times(admission=work.admission)
    default_mean, default_longest = times()
    if mean > 0.9 * default_mean or longest > 1.5 * default_longest:
        seconds = f"a request takes {mean:.2f} s on average, and the slowest {longest:.1f} s"
        return f"{seconds}; with the default {default_mean:.2f} s and {default_longest:.1f} s"
    return None


def eviction(work: ModuleType) -> str | None:
    # 40 different prompts of ten blocks in random order, and a pool for 15 of them
    rng = random.Random(0)
    texts = [[rng.randrange(40)] * 161 for _ in range(120)]

    def count_hits(policy) -> int:
        blocks = world.make_blocks(151)
        blocks.pool.eviction = lambda pool: policy(pool, future)
        hashes = [{*blocks.hashes(one_request(text)[0].seq, 10)} for text in texts]
        num_hits = 0
        for turn, text in enumerate(texts):
            future = hashes[turn + 1 : turn + 41]
            num_hits += serve(blocks, one_request(text))["num_hits"]
        return num_hits

    num_hits = count_hits(work.eviction)
    best = count_hits(solutions.eviction)
    if num_hits < 0.99 * best:
        return f"{num_hits} of {160 * len(texts)} tokens are found; {best} are possible"
    return None


def freed_by_window(work: ModuleType) -> str | None:
    for computed, window, size in [(0, 8, 4), (20, 8, 4), (21, 8, 4), (37, 5, 16), (64, 32, 16)]:
        table = [5 + 3 * i for i in range(-(-computed // size))]
        in_window = {p // size for p in range(max(0, computed - window), computed)}
        expected = [block for i, block in enumerate(table) if i not in in_window]
        answer = work.freed_by_window(table, computed, window, size)
        if answer != expected:
            case = f"table {table}, {computed} tokens, window {window}, blocks of {size}"
            return f"{case}: {answer} is wrong"
    return None


def make_prediction_check(number: int) -> Callable[[ModuleType], str | None]:
    """The check of a prediction: run the engine, and compare its trace."""
    name = scenes.ANSWERS[number].__name__

    def check(work: ModuleType) -> str | None:
        answer = getattr(work, name)()
        folder = Path(work.__file__).parent
        if work is solutions:
            folder = Path(tempfile.mkdtemp())
        events, page = scenes.record(number, folder)
        expected = scenes.ANSWERS[number](events)
        wrong_keys = [
            key
            for key, value in expected.items()
            if without_tuples(answer.get(key)) != without_tuples(value)
        ]
        if not wrong_keys:
            return None
        return f"wrong: {', '.join(wrong_keys)}. Look at {page}" + (", step 3" * (number == 11))

    check.__name__ = name
    return check


def without_tuples(value):
    """Convert nested tuples to lists, to compare them."""
    return [without_tuples(v) for v in value] if isinstance(value, (list, tuple)) else value


CHECKS = [blocks_needed, slot_of, forgetful, two_prompts, misled, pool_without_preemption, victim,
          admission, eviction, freed_by_window,
          *map(make_prediction_check, scenes.ANSWERS)]  # fmt: skip


def verdict(number: int, work: ModuleType) -> str | None:
    """The mistake in an exercise; None if it is solved."""
    try:
        return CHECKS[number - 1](work)
    except Exception as error:  # the reader's own code may raise anything
        return f"it raised {type(error).__name__}: {error}"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="microvllm lab check", description=__doc__)
    numbers = range(1, len(CHECKS) + 1)
    parser.add_argument("number", nargs="*", type=positive, metavar="N")
    parser.add_argument("--solutions", action="store_true", help="check solutions.py instead")
    args = parser.parse_args(argv)
    if set(args.number) - set(numbers):
        parser.error(f"the exercises are 1 to {len(CHECKS)}")
    with terminal.user_errors(args):
        work = solutions if args.solutions else learn.load_exercises("lab")
    has_failed = False
    for number in args.number or numbers:
        mistake = verdict(number, work)
        has_failed |= mistake is not None
        if not args.solutions:
            learn.mark("lab", "solved", number, mistake is None)
        verdict_text = "solved" if mistake is None else f"not yet: {mistake}"
        print(f"{number:2} {CHECKS[number - 1].__name__:24}{verdict_text}", flush=True)
    sys.exit(has_failed)
