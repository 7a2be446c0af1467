"""Random lives of requests in a small pool: whatever happens, in any order, the state is right.

Hypothesis draws the pool, the requests and the order of events, and shrinks a failure to the
shortest story that shows it. `Simulation` checks every step: the state of every block, which
sequences run, what every slot holds, and every token.
"""

import random
from collections import Counter

import hypothesis.strategies as st
from helpers.simulation import VOCAB, Simulation, text
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

STOP = 7
SHARED = [text(40, seed) for seed in (1, 2)]  # beginnings that prompts have in common


class Engine(RuleBasedStateMachine):
    """A scheduler that requests, steps, aborts and failures happen to."""

    @initialize(
        usable=st.integers(3, 24),
        block_size=st.integers(1, 5),
        max_batch_size=st.integers(1, 6),
        max_batched_tokens=st.integers(1, 24),
        caching=st.booleans(),
        guesses=st.booleans(),
    )
    def start(self, **sizes):
        self.sim = Simulation(**sizes)
        self.known: dict[int, tuple] = {}  # id(sequence): itself, and the tokens it had last
        self.met = Counter()

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

    @rule(orders=st.lists(st.booleans(), min_size=1, max_size=8))
    def step(self, orders):
        for ahead in orders:
            step = self.sim.step_ahead() if ahead else self.sim.step()
            self.met["copies"] += len(step.copies)
            self.met["mixed"] += len({chunk.num_tokens > 1 for chunk in step.chunks}) == 2
            self.met["shared"] += max(self.sim.pool.ref_count) > 1
            self.met["drafts"] += sum([len(chunk.draft) > 0 for chunk in step.chunks])
            self.nothing_generated_is_lost()

    @precondition(lambda self: self.sim.scheduler.running or self.sim.scheduler.waiting)
    @rule(choice=st.integers(0, 99))
    def abort(self, choice):
        scheduler = self.sim.scheduler
        ids = sorted({seq.request_id for seq in [*scheduler.running, *scheduler.waiting]})
        unfinished = [*scheduler.running, *scheduler.waiting]
        expected = {seq for seq in unfinished if seq.request_id == ids[choice % len(ids)]}
        request_id = next(iter(expected)).request_id
        victims = self.sim.abort(*self.sim.samples[request_id])
        assert {*victims} == expected and all(seq.finish_reason == "abort" for seq in victims)
        self.met["aborted under way"] += self.sim.in_flight is not None

    @precondition(lambda self: self.sim.scheduler.running or self.sim.scheduler.waiting)
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
        self.sim.check()
        for seq in [*self.sim.scheduler.running, *self.sim.scheduler.waiting]:
            known = self.sim.known(seq)
            _, before = self.known.get(id(seq), (seq, []))
            assert known[: len(before)] == before
            self.known[id(seq)] = (seq, known)

    def teardown(self):
        if hasattr(self, "sim"):
            self.sim.drain()


def test_whatever_happens_the_state_is_right():
    run_state_machine_as_test(
        Engine, settings=settings(max_examples=60, stateful_step_count=30, deadline=None)
    )


def long_life(seed: int, guesses: bool = False) -> Engine:
    """The same events with a fixed seed, to the end of all requests."""
    rng, life = random.Random(seed), Engine()
    life.start(
        usable=rng.randint(8, 24),
        block_size=rng.randint(2, 5),
        max_batch_size=rng.randint(3, 6),
        max_batched_tokens=rng.randint(4, 24),
        caching=seed % 4 > 0,
        guesses=guesses,
    )
    for _ in range(60):
        event, busy = rng.random(), life.sim.scheduler.running
        shared, tail = rng.choice(SHARED), text(rng.randint(0, 3), rng.random())
        if event < 0.4:
            sizes = rng.randint(0, 30), tail, rng.randint(1, 12), rng.randint(1, 3)
            life.add(shared, *sizes, rng.random() < 0.5, rng.random() < 0.5)
        elif event < 0.9 or not busy:
            life.step([rng.random() < 0.7 for _ in range(rng.randint(1, 8))])
        elif event < 0.97:
            life.abort(rng.randint(0, 99))
        else:
            life.fail(rng.random() < 0.5)
    life.teardown()
    return life


def test_long_lives_meet_everything_there_is_to_meet():
    # proof that the machine above does get to the hard places
    met = Counter()
    for seed in range(24):
        life = long_life(seed % 12, guesses=seed >= 12)
        met += life.met
        if seed >= 12:
            scheduler = life.sim.scheduler
            met["accepted"] += scheduler.num_accepted_tokens
            met["rejected"] += scheduler.num_draft_tokens - scheduler.num_accepted_tokens
        met["preemptions"] += life.sim.scheduler.num_preemptions
        met["stopped"] += sum(seq.finish_reason == "stop" for seq in life.sim.finished)
        met["tools"] += sum(bool(seq.forced) for seq in life.sim.finished)
        met["hits"] += sum(bool(seq.num_cached) for seq in life.sim.finished)
    wanted = "copies mixed shared preemptions stopped tools hits drafts accepted rejected".split()
    assert all(met[name] > 20 for name in wanted) and met["aborted under way"], met
