"""Traces in tests: what a replay must be like, and a simulation that is traced and replayed."""

import json
from collections import Counter

from microvllm.blocks import BlockManager, BlockPool
from microvllm.features.scoring import ScoredSequence
from microvllm.features.windows import GroupedBlockManager
from microvllm.scheduler import DrawList, Plan, Scheduler, Sequence
from microvllm.trace import Replay, Trace

from .simulation import Params, Simulation


def filled(replay: Replay) -> dict[int, int]:
    """How many tokens each block in use holds: the rest of it is internal fragmentation."""
    num_filled: dict[int, int] = {}
    for life in replay.seqs.values():
        for index, block in enumerate(life.table):
            start = index // replay.num_groups * replay.block_size
            held = min(replay.block_size, life.computed - start)
            if block:
                num_filled[block] = max(num_filled.get(block, 0), held)
    return num_filled


def compare(replay: Replay, scheduler: Scheduler) -> None:
    """The replay is the live pool: each block, its count and hash, and the tables that hold it."""
    blocks = scheduler.blocks
    pool = blocks.pool
    assert [replay.ref_count[block] for block in range(pool.num_blocks)] == pool.ref_count
    hashes = {block: content_hash.hex() for block, content_hash in pool.hash_of.items()}
    assert replay.hash_of == hashes
    assert list(replay.cached) == list(pool.cached), "another order of eviction"
    blank = {block for block in range(pool.num_blocks) if replay.state(block) == "blank"}
    assert blank == set(pool.blank)
    assert replay.num_used == pool.num_usable - pool.num_free
    lives = sorted(replay.seqs.values(), key=lambda life: (life.request, life.sample))
    paused = list(scheduler.paused)
    with_blocks = [*scheduler.running, *[seq for seq in paused if seq.block_table]]
    without_blocks = [*scheduler.waiting, *[seq for seq in paused if not seq.block_table]]
    for states, sequences in (
        (("running",), with_blocks),
        (("waiting", "preempted"), without_blocks),
    ):
        replayed = [facts_of_life(life) for life in lives if life.state in states]
        assert replayed == sorted(map(facts, sequences), key=lambda values: values[:2])
    held = set()
    for seq in with_blocks:
        for index, block in enumerate(seq.block_table):
            start = index // replay.num_groups * blocks.block_size
            for position in range(start, min(seq.num_computed, start + blocks.block_size)):
                if block:
                    held.add((block, position))
    assert sum(filled(replay).values()) == len(held)


def facts_of_life(life) -> tuple:
    return (life.request, life.sample, life.table, life.computed, life.tokens)


def facts(seq: Sequence) -> tuple:
    # without the placeholder of a step in flight
    tokens = [token for token in seq.token_ids if token >= 0]
    return (seq.request_id, seq.index, seq.block_table.tolist(), seq.num_computed, tokens)


class FeatureSimulation(Simulation):
    """A simulation with groups of layers and sequences that are scored. windows: of each group of
    layers that has blocks of its own."""

    def __init__(self, windows=(-1,), **sizes):
        self.windows = list(windows)
        super().__init__(**sizes)

    def make_blocks(self, usable: int, block_size: int, caching: bool) -> BlockManager:
        if self.windows == [-1]:
            return super().make_blocks(usable, block_size, caching)
        return GroupedBlockManager(BlockPool(usable + 1), block_size, caching, self.windows)

    def slots_of(self, seq: Sequence, position: int) -> list[int]:
        size = self.blocks.block_size
        num_groups = len(self.windows)
        start = position // size * num_groups
        return [
            block * size + position % size for block in seq.block_table[start : start + num_groups]
        ]

    def first_seen(self, group: int, position: int) -> int:
        window = self.windows[group]
        return 0 if window < 0 else max(0, position - window)

    def hash(self, tokens: tuple[int, ...], group: int = 0) -> bytes:
        return super().hash(tokens) + (bytes([group]) if group else b"")

    def add_scored(self, prompt: list[int], targets: list[int]) -> Sequence:
        request_id = len(self.samples)
        return self.add_sequence(ScoredSequence(request_id, prompt, Params(len(targets)), targets))

    def wanted(self, seq: Sequence) -> list[int]:
        if isinstance(seq, ScoredSequence):
            return seq.targets[:-1]
        return super().wanted(seq)

    def on_plan(self, plan: Plan) -> None:
        plan.draws = DrawList(d for d in plan.draws if not isinstance(d.seq, ScoredSequence))

    def on_read(self, plan: Plan) -> None:
        for seq, _, stop, _ in plan.chunks:
            is_scored = isinstance(seq, ScoredSequence) and stop == len(seq.token_ids)
            if is_scored and seq.finish_reason is None:
                self.scheduler.finish(seq, "length", None)


class Traced(FeatureSimulation):
    """A simulation whose trace is replayed, and compared with it, at every check."""

    def __init__(self, **sizes):
        self.met: Counter[str] = Counter()  # events
        self.replay = Replay()
        self.num_replayed = 0
        super().__init__(**sizes)
        self.trace = Trace()
        self.trace.begin(self.scheduler)

    def add_sequence(self, seq: Sequence) -> Sequence:
        super().add_sequence(seq)
        self.trace.recorder.arrive(seq)
        return seq

    def on_plan(self, plan: Plan) -> None:
        super().on_plan(plan)
        self.trace.on_plan(plan)

    def on_read(self, plan: Plan) -> None:
        super().on_read(plan)
        self.trace.on_step(plan)

    def reset(self) -> None:
        self.in_flight = None
        self.slots.clear()
        self.scheduler.reset()
        self.trace.on_reset()
        self.check()
        self.check_hashes()

    def check(self, plan: Plan | None = None) -> None:
        super().check(plan)
        if plan is None:
            self.trace.recorder.catch_up()
        lines = [*self.trace.log.lines]
        for line in lines[self.num_replayed :]:
            event = json.loads(line)
            self.replay.apply(event)
            self.met[event["e"]] += 1
        self.num_replayed = len(lines)
        compare(self.replay, self.scheduler)
