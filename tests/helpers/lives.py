"""Random lives of requests in a small pool, with groups of layers and scored sequences, traced.

Hypothesis draws the pool, the requests and the order of events, and shrinks a failure to the
shortest story that shows it. The simulation checks every step.
"""

import random
from collections import Counter

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from .simulation import VOCAB, text
from .traces import Traced

STOP = 7
SHARED = [text(40, seed) for seed in (1, 2)]  # beginnings that prompts have in common
# of groups of layers: one that sees all, some that do not, none that does
WINDOWS = [(-1,), (-1, 6, 6), (4,), (-1, 0), (9, -1, 3)]


class Life(RuleBasedStateMachine):
    """A traced scheduler that requests, steps, aborts and failures happen to."""

    sim: Traced | None = None

    @initialize(
        usable=st.integers(3, 24),
        block_size=st.integers(1, 5),
        max_batch_size=st.integers(1, 6),
        max_batched_tokens=st.integers(1, 24),
        caching=st.booleans(),
        windows=st.sampled_from(WINDOWS),
        guesses=st.booleans(),
    )
    def start(self, **sizes):
        self.sim = Traced(**sizes)
        self.known: dict[int, tuple] = {}  # id(sequence): itself, and the tokens it had last
        self.met: Counter[str] = Counter()

    def is_busy(self) -> bool:
        return self.sim is not None and self.sim.is_busy()

    @rule(
        shared=st.sampled_from(SHARED),
        length=st.integers(0, 30),
        tail=st.lists(st.integers(0, VOCAB - 1), max_size=3),
        max_tokens=st.integers(1, 12),
        n=st.integers(1, 3),
        stops=st.booleans(),
        tools=st.booleans(),
    )
    def add(self, shared, length, tail, max_tokens, n, stops, tools):
        room = self.sim.room  # a larger request is refused when it comes
        prompt = (shared[:length] + tail)[:room] or [0]
        max_tokens = min(max_tokens, room - len(prompt) + 1)
        n = min(n, self.sim.scheduler.max_batch_size)
        self.sim.add(prompt, max_tokens, n, {STOP} if stops else (), tools)

    @rule(shared=st.sampled_from(SHARED), length=st.integers(1, 30), count=st.integers(1, 8))
    def add_to_score(self, shared, length, count):
        length = min(length, self.sim.room)
        count = min(count, self.sim.room - length + 1)
        self.sim.add_scored(shared[:length], shared[length : length + count])

    @rule(orders=st.lists(st.booleans(), min_size=1, max_size=8))
    def step(self, orders):
        for ahead in orders:
            plan = self.sim.step_ahead() if ahead else self.sim.step()
            self.met["slid"] += any(0 in chunk.seq.block_table for chunk in plan.chunks)
            self.nothing_generated_is_lost()

    @precondition(is_busy)
    @rule(choice=st.integers(0, 99))
    def abort(self, choice):
        scheduler = self.sim.scheduler
        unfinished = [*scheduler.running, *scheduler.waiting]
        ids = sorted({seq.request_id for seq in unfinished})
        self.sim.abort(*self.sim.samples[ids[choice % len(ids)]])

    @precondition(is_busy)
    @rule(planned=st.booleans())
    def fail(self, planned):
        """A step fails: one that was planned just now, or one that was planned before."""
        if planned:
            with self.sim.placeholders():
                self.sim.plan()
        self.sim.reset()

    @rule(ahead=st.booleans())
    def drain(self, ahead):
        self.sim.drain(ahead)

    @invariant()
    def nothing_generated_is_lost(self):
        if self.sim is None:
            return
        self.sim.check()
        for seq in [*self.sim.scheduler.running, *self.sim.scheduler.waiting]:
            known = self.sim.known(seq)
            _, before = self.known.get(id(seq), (seq, []))
            assert known[: len(before)] == before
            self.known[id(seq)] = (seq, known)

    def teardown(self):
        if self.sim is not None:
            self.sim.drain()


def long_life(seed: int, guesses: bool = False) -> Life:
    """The same events with a fixed seed, to the end of all requests."""
    rng = random.Random(seed)
    life = Life()
    life.start(
        usable=rng.randint(8, 24),
        block_size=rng.randint(2, 5),
        max_batch_size=rng.randint(3, 6),
        max_batched_tokens=rng.randint(4, 24),
        caching=seed % 4 > 0,
        windows=WINDOWS[seed % len(WINDOWS)],
        guesses=guesses,
    )
    for _ in range(60):
        event = rng.random()
        shared = rng.choice(SHARED)
        tail = text(rng.randint(0, 3), rng.random())
        if event < 0.4:
            sizes = (rng.randint(0, 30), tail, rng.randint(1, 12), rng.randint(1, 3))
            life.add(shared, *sizes, rng.random() < 0.5, rng.random() < 0.5)
        elif event < 0.45:
            life.add_to_score(shared, rng.randint(1, 30), rng.randint(1, 8))
        elif event < 0.9 or not life.sim.scheduler.running:
            life.step([rng.random() < 0.7 for _ in range(rng.randint(1, 8))])
        elif event < 0.97:
            life.abort(rng.randint(0, 99))
        else:
            life.fail(rng.random() < 0.5)
    life.teardown()
    return life
