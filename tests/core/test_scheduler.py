"""BlockManager and Scheduler, driven without a model: who runs, on which blocks, and in what order.

The model here is a function of the text, and the device a dict that holds, for every slot, the text
its K and V would depend on. So a block that is shared, copied, evicted or written wrongly is seen
as a slot that holds another text than the sequence that reads it.
"""

import random
import subprocess
import sys
import zlib
from collections import deque
from typing import NamedTuple

import pytest

from microvllm import scheduler
from microvllm.scheduler import (
    BlockManager,
    Scheduler,
    Sequence,
    Step,
    first_come,
    most_blocks,
)

VOCAB = 8
TOOL, RESULT = 6, [5, 1, 3]  # where tools are on, this token is followed by these, unsampled


class Params(NamedTuple):
    """SamplingParams without torch: the scheduler reads the first two, a batch the others."""

    max_tokens: int = 8
    n: int = 1
    temperature: float = 0.0
    seed: int = 0
    sample_index: int = 0


def next_token(text: list[int], sample_id: int) -> int:
    """The fake model: sample `sample_id` of a text goes on with this token."""
    return zlib.crc32(bytes([*text, 255, sample_id])) % VOCAB


def score(text: list[int], target: int) -> float:
    """The fake model's log-probability of a token after a text."""
    return -float(zlib.crc32(bytes([*text, 254, target])))


def complete(
    prompt: list[int], max_tokens: int, sample_id: int = 0, stop=(), tools: bool = False
) -> list[int]:
    """What a sequence must have generated in the end, whatever happened to it meanwhile."""
    text, limit = list(prompt), len(prompt) + max_tokens
    while len(text) < limit:
        text.append(next_token(text, sample_id))
        if text[-1] in stop:
            break
        if tools and text[-1] == TOOL:
            text += RESULT[: limit - len(text)]
    return text[len(prompt) :]


class Guesser:
    """Guesses, in place of a Lookup: most of them are right, so that long ones are kept too."""

    def __init__(self, ends: set[int], sample_id: int = 0):
        self.ends, self.sample_id, self.forks = ends, sample_id, 0

    def fork(self):
        self.forks += 1
        return Guesser(self.ends, self.forks)

    def guess(self, tokens: list[int], room: int) -> list[int]:
        draw, found = random.Random(len(tokens)), []
        for _ in range(draw.randint(0, room)):
            right = next_token([*tokens, *found], self.sample_id)
            found.append(right if draw.random() < 0.8 else draw.randrange(VOCAB))
            if found[-1] in self.ends:
                return found[:-1]
        return found

    def learn(self, guessed: int, accepted: int) -> None:
        assert 0 <= accepted <= guessed > 0


class Simulation:
    """A scheduler with its pool, the fake device, and the loop around them.

    `step` plans, runs and reads a step; `step_ahead` plans and runs one before it reads the last,
    as the loop on a GPU does. Both assert what must hold in every step.
    """

    def __init__(
        self, usable=40, block_size=4, max_batch_size=8, max_batched_tokens=64, caching=True,
        windows=(-1,), guesses=False,
    ):  # fmt: skip
        self.guesses = guesses  # are tokens guessed? then all steps are those of the plain loop
        self.blocks = BlockManager(usable + 1, block_size, caching, windows=windows)
        self.scheduler = Scheduler(self.blocks, max_batch_size, max_batched_tokens)
        # which group of layers a slot has K and V of, and the text they were made from
        self.slots: dict[int, tuple[int, tuple[int, ...]]] = {}
        self.flight: tuple[Step, list[int], list[float]] | None = None  # run, and not yet read
        self.requests = 0
        self.tools: set[int] = set()  # requests that a tool writes into
        self.finished: list[Sequence] = []
        self.hashes: dict[tuple[int, ...], bytes] = {}
        self.started: list[int] = []  # requests in the order of their first token

    def add(self, prompt, max_tokens=8, n=1, stop=(), tools=False, targets=None) -> Sequence:
        params = Params(len(targets) if targets else max_tokens, n)
        seq = Sequence(self.requests, prompt, params, 0, frozenset(stop), targets)
        if self.guesses and targets is None:
            seq.lookup = Guesser({*stop, TOOL} if tools else {*stop})
        if tools:
            self.tools.add(self.requests)
        self.requests += 1
        self.scheduler.add(seq)
        return seq

    def wanted(self, seq: Sequence) -> list[int]:
        """What must stand after the prompt in the end."""
        if seq.targets is not None:
            return seq.targets[:-1]
        prompt, tools = seq.tokens[: seq.num_prompt], seq.request_id in self.tools
        return complete(prompt, seq.params.max_tokens, seq.sample_id, seq.stop_ids, tools)

    def need(self, num_tokens: int) -> int:
        """Blocks of a request of so many tokens; it is refused if the pool has fewer."""
        blocks, chunk = self.blocks, self.scheduler.max_batched_tokens
        return most_blocks(blocks.windows, blocks.block_size, num_tokens, chunk)

    @property
    def room(self) -> int:
        """Tokens of the longest request."""
        return max(n for n in range(200) if self.need(n) <= self.blocks.num_usable)

    def slot(self, seq: Sequence, position: int, group: int = 0) -> int:
        size, groups = self.blocks.block_size, self.blocks.num_groups
        return seq.table[position // size * groups + group] * size + position % size

    def plan(self) -> Step:
        """schedule(), and what every plan must be."""
        scheduler = self.scheduler
        preemptions, running = scheduler.num_preemptions, list(scheduler.running)
        step = scheduler.schedule()
        lengths = [stop - start for _, start, stop in step.chunks]
        assert all(lengths) and sum(lengths) <= scheduler.max_batched_tokens
        assert lengths == sorted(lengths, key=lambda n: n > 1), "one-token chunks come first"
        assert len({id(seq) for seq, _, _ in step.chunks}) == len(step.chunks)
        for seq, _, stop in step.chunks:
            assert seq in scheduler.running and seq.num_computed == stop
            # who was sent away to make room is not let in again by the same step
            assert seq in running or scheduler.num_preemptions == preemptions
        self.started += sorted({seq.request_id for seq, _, _ in step.chunks} - {*self.started})
        if scheduler.admission is first_come:
            assert self.started == sorted(self.started), "a request overtook an earlier one"
        self.check()
        return step

    def run(self, step: Step) -> tuple[list[int], list[float]]:
        """The device: copy blocks, write the new slots, read every sequence's context, sample and
        score."""
        size = self.blocks.block_size
        assert step.chunks or not step.copies
        moved = {  # all sources are read before any target is written
            target * size + i: self.slots.get(source * size + i)
            for source, target in step.copies
            for i in range(size)
        }
        assert len(moved) == len(step.copies) * size, "a block is the target of two copies"
        written = set()
        for source, target in step.copies:  # which the device may do a few at a time
            assert source not in written, f"{source} is copied on, after a copy to it"
            written.add(target)
        self.slots.update(moved)
        last = self.flight[1] if self.flight else []
        texts, written = [], []
        guesses = {index: tokens for index, _, tokens in step.guessed}
        for index, (seq, start, stop) in enumerate(step.chunks):
            guessed = guesses.get(index, [])
            # a negative token is ~row of the last step's tokens, which only the device knows
            known = seq.tokens[: stop - len(guessed)]
            text = [token if token >= 0 else last[~token] for token in known] + guessed
            for position in range(start, stop):
                for group in range(self.blocks.num_groups):
                    written.append(self.slot(seq, position, group))
                    self.slots[written[-1]] = group, tuple(text[: position + 1])
            texts.append(text)
        assert len(set(written)) == len(written), "two sequences write one slot"
        assert not {slot // size for slot in written} & {0}, "the sink was written"
        for (seq, start, stop), text in zip(step.chunks, texts, strict=True):
            for group, window in enumerate(self.blocks.windows):
                for position in range(max(0, start - window) if window >= 0 else 0, stop):
                    held = self.slots.get(self.slot(seq, position, group))
                    wanted = group, tuple(text[: position + 1])
                    assert held == wanted, (seq.table, group, position, held, text)
        tokens = [
            next_token(texts[index][:position], seq.sample_id)
            for index, seq, position in step.samples
        ]
        scores = []
        for index, seq, first, stop in step.scored:
            for position in range(first, stop):
                target = seq.targets[position + 1 - seq.num_prompt]
                scores.append(score(texts[index][: position + 1], target))
        return tokens, scores

    def read(self, flight: tuple[Step, list[int], list[float]]) -> None:
        """update(): only now the scheduler learns a step's tokens."""
        for seq in self.scheduler.update(*flight):
            called = seq.request_id in self.tools and seq.tokens[seq.num_known - 1] == TOOL
            if called and not seq.finish_reason:
                self.scheduler.force(seq, RESULT)
            if seq.finish_reason:
                self.finished.append(seq)
        self.check()

    def step(self) -> Step:
        self.land()
        busy = bool(self.scheduler.running or self.scheduler.waiting)
        step = self.plan()
        assert bool(step.chunks) == busy, "a step without work, and there is work"
        self.read((step, *self.run(step)))
        self.check_hashes()
        return step

    def step_ahead(self) -> Step:
        if self.guesses:
            return self.step()
        step = self.plan()
        flight = (step, *self.run(step)) if step.chunks else None
        flight, self.flight = self.flight, flight
        if flight:
            self.read(flight)
        self.check_hashes()
        return step

    def land(self) -> None:
        """Read the step that is under way, if one is."""
        flight, self.flight = self.flight, None
        if flight:
            self.read(flight)

    def reset(self) -> None:
        """A step failed: what it left in the cache is not to be trusted, and never read."""
        self.flight = None
        self.slots.clear()
        self.scheduler.reset()
        self.check()

    def check(self) -> None:
        scheduler = self.scheduler
        self.blocks.check(scheduler.running)
        assert len(scheduler.running) <= scheduler.max_batch_size
        assert not any(seq.table or seq.num_computed for seq in scheduler.waiting)
        for seq in scheduler.running:
            assert sum(map(bool, seq.table)) <= self.need(len(seq.tokens))
        for seq in [*scheduler.running, *scheduler.waiting, *self.finished]:
            known, wanted = seq.tokens[seq.num_prompt : seq.num_known], self.wanted(seq)
            assert known == wanted[: len(known)], (seq.request_id, known, wanted)

    def check_hashes(self) -> None:
        """A hash names a full block of computed tokens that are known, and all before them."""
        size = self.blocks.block_size
        for block, named in self.blocks.hash_of.items():
            group, held = self.slots[block * size + size - 1]
            assert len(held) % size == 0 and named == self.hash(held) + self.blocks.marks[group]
        for seq in [*self.scheduler.running, *self.scheduler.waiting]:
            ends = [(i + 1) * size for i in range(len(seq.hashes))]
            assert seq.hashes == [self.hash(tuple(seq.tokens[:end])) for end in ends]

    def hash(self, text: tuple[int, ...]) -> bytes:
        """Of the last block of a text."""
        if text not in self.hashes:
            assert min(text) >= 0, "a token that is not known is in a hash"
            whole = Sequence(0, list(text), Params())
            self.hashes[text] = self.blocks._hashes(whole, len(text) // self.blocks.block_size)[-1]
        return self.hashes[text]

    def drain(self, ahead: bool = False) -> None:
        """Run to the end: everyone has got all tokens, every block is free again."""
        steps = 0
        while self.scheduler.running or self.scheduler.waiting or self.flight:
            self.step_ahead() if ahead else self.step()
            steps += 1
            assert steps < 5000, "no end in sight"
        assert self.blocks.num_free == self.blocks.num_usable
        assert sum(self.blocks.ref_count) == 0
        for seq in self.finished:
            wanted, text = self.wanted(seq), list(seq.tokens)
            assert text[seq.num_prompt :] == wanted
            stopped = seq.targets is None and wanted[-1] in seq.stop_ids
            assert seq.finish_reason == ("stop" if stopped else "length")
            for i, target in enumerate(seq.targets or ()):
                assert seq.scores[i] == score(text[: seq.num_prompt + i], target)


def text(length: int, seed: int = 0) -> list[int]:
    """A prompt of so many tokens, another one for each seed."""
    return random.Random(seed).choices(range(VOCAB), k=length)


# who runs -----------------------------------------------------------------------------------------


def test_requests_start_in_the_order_they_came():
    sim = Simulation(max_batch_size=2)
    for i in range(6):
        sim.add(text(5 + i, i), max_tokens=3 + i)
    sim.drain()
    assert sim.started == list(range(6))


def test_a_small_request_does_not_overtake_a_large_one_that_waits_for_room():
    sim = Simulation(usable=12)
    sim.add(text(20, 1), max_tokens=8)
    sim.step()
    large, small = sim.add(text(30, 2), max_tokens=2), sim.add(text(2, 3), max_tokens=2)
    sim.step()
    assert list(sim.scheduler.waiting) == [large, small]  # though `small` would fit
    sim.drain()
    assert sim.started == [0, 1, 2]


def test_a_steady_stream_of_requests_starves_nobody():
    sim = Simulation(usable=10, max_batch_size=3, max_batched_tokens=6)
    first = sim.add(text(30, 0), max_tokens=9)
    for i in range(1, 40):
        sim.add(text(1 + i % 7, i), max_tokens=1 + i % 5)
        sim.step()
    assert first.finish_reason == "length"
    sim.drain()


def test_a_long_prompt_shares_its_steps_with_those_that_decode():
    sim = Simulation(max_batched_tokens=8)
    old = sim.add(text(3, 1), max_tokens=9)
    sim.step()
    long = sim.add(text(20, 2))
    shares = []
    while long.num_computed < 20:
        step = sim.step()
        shares.append([(seq is long, stop - start) for seq, start, stop in step.chunks])
    # seven rows a step for the prompt, one for the sequence that goes on generating beside it
    assert shares == [[(False, 1), (True, 7)]] * 2 + [[(False, 1), (True, 6)]]
    assert old.num_known == 3 + 4


def test_one_token_chunks_come_first_even_if_they_are_the_youngest():
    sim = Simulation(max_batched_tokens=8)
    long, short = sim.add(text(10, 1)), sim.add(text(1, 2))
    sim.step()
    assert long.num_computed == 8 and short in sim.scheduler.waiting
    assert [seq for seq, _, _ in sim.step().chunks] == [short, long]


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 64])
def test_no_step_has_more_tokens_than_its_budget(budget):
    sim = Simulation(max_batched_tokens=budget)
    for i in range(5):
        sim.add(text(4 * i + 1, i), max_tokens=3, n=1 + i % 2)
    sizes = []
    while sim.scheduler.running or sim.scheduler.waiting:
        sizes.append(sum(stop - start for _, start, stop in sim.step().chunks))
    assert max(sizes) == min(budget, sum(4 * i + 1 for i in range(5)))
    sim.drain()


@pytest.mark.parametrize("max_batch_size", [1, 2, 3])
def test_never_more_sequences_run_than_max_batch_size(max_batch_size):
    sim = Simulation(max_batch_size=max_batch_size)
    for i in range(8):
        sim.add(text(3, i), max_tokens=4)
    running = []
    while sim.scheduler.running or sim.scheduler.waiting:
        running.append(len(sim.step().chunks))
    assert max(running) == max_batch_size
    sim.drain()


def test_the_samples_a_prompt_will_split_into_have_their_seats_from_the_start():
    sim = Simulation(max_batch_size=4, max_batched_tokens=4)
    three, two = sim.add(text(6, 1), n=3), sim.add(text(2, 2), n=2)
    sim.step()
    assert sim.scheduler.running == [three] and list(sim.scheduler.waiting) == [two]
    sim.step()  # the prompt is done: three seats are taken, one is left, and `two` needs two
    assert len(sim.scheduler.running) == 3 and list(sim.scheduler.waiting) == [two]
    sim.drain()
    assert len(sim.finished) == 5


def test_a_newcomer_leaves_room_for_those_who_run():
    sim = Simulation(usable=8)
    old = sim.add(text(8, 1), max_tokens=20)
    sim.step()
    assert sim.blocks.num_free == 6
    young = sim.add(text(9, 2), max_tokens=2)  # 3 blocks: 3 would be left, and 16 tokens are 4
    sim.step()
    assert young in sim.scheduler.waiting
    sim.drain()
    assert sim.scheduler.num_preemptions == 0 and old.finish_reason == young.finish_reason


# preemption ---------------------------------------------------------------------------------------


def crowded(caching: bool = True) -> tuple[Simulation, list[Sequence]]:
    """Three sequences that grow in a pool that holds two of them."""
    sim = Simulation(usable=16, max_batch_size=3, caching=caching)
    seqs = [sim.add(text(8, i), max_tokens=20) for i in range(3)]
    return sim, seqs


def test_the_youngest_makes_room_and_comes_back_first():
    sim, (a, b, c) = crowded()
    sim.step()
    assert sim.scheduler.running == [a, b, c]
    d = sim.add(text(3, 9))
    while not sim.scheduler.num_preemptions:
        sim.step()
    assert sim.scheduler.running == [a, b] and list(sim.scheduler.waiting) == [c, d]
    generated = c.tokens[8:]
    assert len(generated) > 1  # it had begun, and keeps what it has
    while c in sim.scheduler.waiting:
        assert d in sim.scheduler.waiting
        sim.step()
    assert c.tokens[8 : 8 + len(generated)] == generated
    sim.drain()


def test_several_victims_come_back_oldest_first():
    sim = Simulation(usable=12, block_size=2, max_batch_size=4, max_batched_tokens=4)
    seqs = [sim.add(text(1, i), max_tokens=20) for i in range(4)]
    orders = set()
    while sim.scheduler.running or sim.scheduler.waiting:
        sim.step()
        waiting = [seqs.index(seq) for seq in sim.scheduler.waiting]
        assert waiting == sorted(waiting)
        orders.add(tuple(waiting))
    assert max(map(len, orders)) >= 2
    sim.drain()


def test_nobody_is_admitted_in_a_step_in_which_someone_was_sent_away():
    # with 8 tokens a step the first part of the victim would fit at once, and be sent away again
    sim = Simulation(usable=14, max_batched_tokens=8, caching=False)
    old, young = sim.add(text(8, 1), max_tokens=40), sim.add(text(36, 2))
    while not sim.scheduler.num_preemptions:
        step = sim.step()
    assert list(sim.scheduler.waiting) == [young] and sim.blocks.num_free > 8
    assert step.chunks == [(old, old.num_computed - 1, old.num_computed)]
    sim.drain()


def test_a_preempted_sequence_finds_its_own_blocks_again():
    sim = Simulation()
    seq = sim.add(text(9), max_tokens=10)
    for _ in range(6):
        sim.step()
    sim.scheduler._preempt(seq)
    held = seq.num_known
    assert held == 9 + 6
    step = sim.step()
    assert step.chunks == [(seq, 12, held)]
    assert seq.num_cached == 0  # what the prompt found when it came, not what it finds again
    sim.drain()


@pytest.mark.parametrize("ahead", [False, True])
def test_preempted_sequences_go_on_with_the_same_tokens(ahead):
    sim, seqs = crowded()
    sim.drain(ahead)
    assert sim.scheduler.num_preemptions and len(sim.finished) == len(seqs)


def test_a_preempted_sequence_without_a_cache_is_computed_again_from_the_start():
    sim, _ = crowded(caching=False)
    sim.drain()
    assert sim.scheduler.num_preemptions and len(sim.finished) == 3


def test_the_last_one_standing_always_fits():
    # two samples and one request more, in a pool that just holds one sample's whole length
    sim = Simulation(usable=5, block_size=4)
    sim.add(text(10, 1), max_tokens=11, n=3)
    sim.add(text(10, 2), max_tokens=11)
    sim.drain()
    assert len(sim.finished) == 4 and sim.scheduler.num_preemptions


# the prefix cache ---------------------------------------------------------------------------------


def served(sim: Simulation, prompt: list[int], max_tokens: int = 1) -> Sequence:
    """Run one request to its end, alone."""
    seq = sim.add(prompt, max_tokens)
    sim.drain()
    return seq


@pytest.mark.parametrize(
    ("length", "hit"), [(1, 0), (3, 0), (4, 0), (5, 4), (7, 4), (8, 4), (9, 8), (12, 8), (13, 12)]
)
def test_a_hit_covers_full_blocks_and_never_the_last_token(length, hit):
    sim = Simulation()
    prompt = text(13)
    served(sim, prompt)
    again = sim.add(prompt[:length], max_tokens=1)
    step = sim.step()
    assert again.num_cached == hit
    assert step.chunks == [(again, hit, length)]


def test_a_prompt_of_whole_blocks_that_is_fully_cached_computes_its_last_block():
    sim = Simulation()
    prompt = text(16)
    served(sim, prompt, 5)
    seq = sim.add(prompt, max_tokens=5)
    step = sim.step()
    assert step.chunks == [(seq, 12, 16)] and len(step.samples) == 1
    sim.drain()
    assert sim.finished[0].tokens == sim.finished[1].tokens


@pytest.mark.parametrize("ahead", [False, True])
def test_the_cache_outlives_its_requests_and_holds_what_they_generated(ahead):
    sim = Simulation()
    first = sim.add(text(6), max_tokens=7)
    sim.drain(ahead)
    follow_up = sim.add(first.tokens + text(3, 1), max_tokens=2)
    sim.step()
    assert follow_up.num_cached == 12  # all of the 13 tokens but the last, which was never fed back
    sim.drain()


def test_the_same_prompt_twice_in_one_batch_shares_its_full_blocks():
    sim = Simulation()
    a, b = sim.add(text(10)), sim.add(text(10))
    step = sim.step()
    assert step.chunks == [(a, 0, 10), (b, 8, 10)]
    assert a.table[:2] == b.table[:2] and a.table[2] != b.table[2]
    assert [sim.blocks.ref_count[block] for block in a.table] == [2, 2, 1]
    sim.drain()


def test_the_same_short_prompt_twice_shares_nothing():
    sim = Simulation()
    a, b = sim.add(text(3)), sim.add(text(3))
    sim.step()
    assert not set(a.table) & set(b.table)
    sim.drain()


def test_a_block_that_is_not_computed_yet_is_not_found():
    sim = Simulation(max_batched_tokens=6)
    sim.add(text(12)), sim.add(text(12))
    sim.step()
    assert len(sim.blocks.block_of) == 1  # six tokens: one block is full, the second is not
    sim.drain()


def test_equal_blocks_after_different_beginnings_are_different():
    sim = Simulation()
    tail = text(8, 5)
    served(sim, text(4, 1) + tail)
    seq = sim.add(text(4, 2) + tail, max_tokens=1)
    sim.step()
    assert seq.num_cached == 0
    sim.drain()


def test_two_sequences_that_come_to_the_same_text_on_their_own_keep_one_of_two_blocks():
    sim = Simulation()
    prompt = text(5)
    output = complete(prompt, 8)
    sim.add(prompt, 8)
    sim.step()
    sim.add(prompt + output[:2], 6)  # no full block of it is computed beyond the first
    sim.drain()
    assert sim.finished[0].tokens == sim.finished[1].tokens
    assert len(sim.blocks.cached) == 3  # 12 of 13 tokens computed, once
    assert len(sim.blocks.blank) == sim.blocks.num_usable - 3


def test_without_a_prefix_cache_nothing_is_shared_or_kept():
    sim = Simulation(caching=False)
    a, b = sim.add(text(10)), sim.add(text(10))
    sim.step()
    assert not set(a.table) & set(b.table)
    sim.drain()
    assert not sim.blocks.cached and not sim.blocks.block_of
    assert served(sim, text(10)).num_cached == 0


def test_the_least_recently_used_block_goes_first_and_the_end_of_a_text_before_its_beginning():
    sim = Simulation(usable=6)
    a, b = text(9, 1), text(9, 2)
    served(sim, a), served(sim, b)
    tables = {name: [sim.blocks.block_of[h] for h in seq.hashes] for name, seq in
              zip("ab", sim.finished, strict=True)}  # fmt: skip
    assert list(sim.blocks.cached) == tables["a"][::-1] + tables["b"][::-1]
    served(sim, a)  # used again: now b is the oldest
    assert list(sim.blocks.cached) == tables["b"][::-1] + tables["a"][::-1]
    # two blocks are blank; a request that needs four takes the two oldest of the cached ones
    assert len(sim.blocks.blank) == 2
    served(sim, text(15, 3))
    assert set(tables["a"]) <= sim.blocks.hash_of.keys()
    assert not set(tables["b"]) & set(sim.blocks.match(sim.add(b)))
    assert sim.blocks.match(Sequence(9, a, Params())) == tables["a"]


def test_an_evicted_beginning_makes_the_rest_of_the_text_unfindable_but_not_wrong():
    sim = Simulation(usable=4)
    served(sim, text(13, 1))
    served(sim, text(4, 2))  # takes the blank block
    served(sim, text(8, 3))  # and evicts from the end of the first text
    again = sim.add(text(13, 1), max_tokens=1)
    sim.step()
    assert 0 < again.num_cached < 12
    sim.drain()


def test_forget_empties_the_table_and_loses_no_block():
    sim = Simulation()
    served(sim, text(12, 1))
    running = sim.add(text(12, 2), max_tokens=9)
    sim.step()
    assert sim.blocks.cached and sim.blocks.block_of
    free = sim.blocks.num_free
    sim.blocks.forget()
    assert not sim.blocks.cached and not sim.blocks.block_of and not sim.blocks.hash_of
    assert sim.blocks.num_free == free
    for seed in (1, 2):
        assert sim.blocks.match(Sequence(9, text(12, seed), Params())) == []
    sim.drain()
    assert running.finish_reason == "length"


# samples of one prompt ----------------------------------------------------------------------------


def test_samples_share_the_prompt_and_copy_its_part_filled_block_before_they_write():
    sim = Simulation()
    first = sim.add(text(6), max_tokens=5, n=3)
    sim.step()
    a, b, c = sim.scheduler.running
    assert a is first and [s.sample_id for s in (a, b, c)] == [0, 1, 2]
    shared = a.table[1]
    assert a.table == b.table == c.table and sim.blocks.ref_count[shared] == 3
    step = sim.step()
    # two copies are enough: the last one writes in place
    assert [source for source, _ in step.copies] == [shared, shared]
    assert len({s.table[1] for s in (a, b, c)}) == 3 and c.table[1] == shared
    assert a.table[0] == b.table[0] == c.table[0]
    sim.drain()
    assert len({tuple(seq.tokens) for seq in sim.finished}) == 3


def test_samples_of_a_prompt_of_whole_blocks_need_no_copy():
    sim = Simulation()
    sim.add(text(8), max_tokens=5, n=3)
    copies = []
    while sim.scheduler.running or sim.scheduler.waiting:
        copies += sim.step().copies
    assert copies == []
    sim.drain()


@pytest.mark.parametrize("usable", [6, 7, 8, 9, 10])
@pytest.mark.parametrize("ahead", [False, True])
def test_samples_copy_rightly_when_memory_is_short(usable, ahead):
    sim = Simulation(usable=usable, max_batch_size=6)
    sim.add(text(14, 1), max_tokens=9, n=4)
    sim.add(text(6, 2), max_tokens=9, n=2)
    sim.drain(ahead)
    assert len(sim.finished) == 6 and sim.scheduler.num_preemptions


def test_a_sample_that_is_the_last_to_hold_a_block_writes_in_place():
    sim = Simulation()
    sim.add(text(6), max_tokens=5, n=2)
    sim.step()
    a, b = sim.scheduler.running
    sim.scheduler.finish(b, "abort")
    assert sim.step().copies == [] and len(a.table) == 2
    sim.drain()


def test_samples_finish_one_by_one():
    prompt = next(
        text(6, seed)
        for seed in range(100)
        if len({len(complete(text(6, seed), 12, i, {7})) for i in range(3)}) == 3
    )
    sim = Simulation()
    sim.add(prompt, max_tokens=12, n=3, stop={7})
    sim.drain()
    assert len({len(seq.tokens) for seq in sim.finished}) == 3


# how a sequence ends ------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [False, True])
def test_one_that_finishes_does_not_shift_the_tokens_of_the_others(ahead):
    sim = Simulation()
    for i, max_tokens in enumerate([9, 1, 9, 2, 2, 9, 3]):
        sim.add(text(5, i), max_tokens=max_tokens)
    sim.drain(ahead)
    lengths = {seq.request_id: len(seq.tokens) - 5 for seq in sim.finished}
    assert [lengths[i] for i in range(7)] == [9, 1, 9, 2, 2, 9, 3]


@pytest.mark.parametrize("ahead", [False, True])
def test_max_tokens_1_gives_one_token(ahead):
    sim = Simulation()
    seq = sim.add(text(8), max_tokens=1)
    sim.drain(ahead)
    assert len(seq.tokens) == 9 and seq.finish_reason == "length"


@pytest.mark.parametrize("ahead", [False, True])
def test_a_stop_token_ends_a_sequence_at_its_first_token_too_but_not_in_the_prompt(ahead):
    prompt = next(p for p in map(text, [8] * 99, range(99)) if next_token(p, 0) in p)
    stop = next_token(prompt, 0)
    sim = Simulation()
    seq = sim.add(prompt, stop={stop})
    sim.drain(ahead)
    assert seq.tokens == [*prompt, stop] and seq.finish_reason == "stop"


def test_a_sequence_takes_no_block_for_its_last_token():
    # 6 + 3 tokens, the last of which is never fed back: two blocks of four
    for ahead in (False, True):
        sim = Simulation(usable=2)
        sim.add(text(6), max_tokens=3)
        sim.drain(ahead)
        assert len(sim.finished) == 1


def test_one_step_ahead_the_token_after_the_end_is_dropped():
    prompt = text(8)
    output = complete(prompt, 8)
    stop = next(t for i, t in enumerate(output) if 1 < i < 6 and t not in output[:i])
    sim = Simulation()
    seq, other = sim.add(prompt, stop={stop}), sim.add(text(5, 1), max_tokens=9)
    extra = 0
    while not seq.finish_reason:
        step = sim.step_ahead()
        extra = sum(s is seq for s, _, _ in step.chunks)
    assert extra == 1 and sim.flight  # it is in the step that runs already
    assert seq.tokens == prompt + output[: output.index(stop) + 1]
    assert not seq.table
    sim.land()
    assert seq.tokens == prompt + output[: output.index(stop) + 1]
    sim.drain(ahead=True)
    assert other.finish_reason == "length"


def test_one_step_ahead_nobody_is_planned_beyond_max_tokens():
    sim = Simulation()
    sim.add(text(5), max_tokens=3)
    rows = []
    while sim.scheduler.running or sim.scheduler.waiting or sim.flight:
        rows.append(sum(stop - start for _, start, stop in sim.step_ahead().chunks))
    assert rows == [5, 1, 1, 0]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_sequence_sent_away_with_its_last_token_under_way_still_ends(ahead):
    for usable in range(4, 12):
        sim = Simulation(usable=usable, block_size=2, max_batch_size=4)
        for i in range(4):
            sim.add(text(2, i), max_tokens=5 + i % 2, stop={7})
        sim.drain(ahead)
        assert len(sim.finished) == 4


# tokens that nobody samples -----------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("usable", [8, 9, 40])
def test_a_tool_writes_into_the_sequence_that_called_it(usable, ahead):
    sim = Simulation(usable=usable, max_batch_size=4)
    for i in range(6):
        sim.add(text(5, i), max_tokens=5 + 3 * i, tools=True)
    sim.drain(ahead)
    assert sum(TOOL in seq.tokens[5:] for seq in sim.finished) > 2
    assert (sim.scheduler.num_preemptions > 0) == (usable < 40)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("budget", [1, 3, 64])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 9])
def test_a_continuation_is_scored_from_the_last_token_of_its_prompt_on(length, budget, ahead):
    sim = Simulation(max_batched_tokens=budget, max_batch_size=3)
    for turn in range(2):  # with a cold and with a warm cache
        for count in (1, 2, 8):
            sim.add(text(length), targets=text(count, count))
        sim.add(text(6, 1), max_tokens=6)
        sim.drain(ahead)
        assert len(sim.finished) == 4 * (turn + 1)


# aborts and failures ------------------------------------------------------------------------------


def stages(ahead: bool):
    """Simulations with request 0 in every stage of its life, one of them with two samples."""
    names = ["waiting", "prefill", "decoding", "forked", "preempted"]
    for name in names:
        sim = Simulation(usable=14, max_batched_tokens=6, max_batch_size=3)
        target = sim.add(text(10), max_tokens=16, n=2 if name == "forked" else 1)
        others = [sim.add(text(7, 1), max_tokens=9)]
        step = sim.step_ahead if ahead else sim.step
        count = {"waiting": 0, "prefill": 1, "decoding": 5, "forked": 4, "preempted": 4}[name]
        for _ in range(count):
            step()
        if name == "preempted":
            while sim.scheduler.running:
                sim.scheduler._preempt(sim.scheduler.running[-1])
        yield name, sim, target, others


@pytest.mark.parametrize("ahead", [False, True])
def test_a_request_may_be_aborted_at_any_stage(ahead):
    seen = set()
    for name, sim, target, others in stages(ahead):
        seen.add((name, target.running, target.num_known > 10))
        victims = sim.scheduler.abort(0)
        assert len(victims) == (2 if name == "forked" else 1)
        for seq in victims:
            assert seq.finish_reason == "abort" and not seq.running and not seq.table
            output = seq.tokens[10:]
            assert output == complete(text(10), 16, seq.sample_id)[: len(output)]
            assert seq not in sim.scheduler.running and seq not in sim.scheduler.waiting
        sim.check()
        sim.drain(ahead)
        assert [seq.request_id for seq in sim.finished] == [seq.request_id for seq in others]
    assert len({name for name, _, _ in seen}) == 5
    assert {(running, begun) for _, running, begun in seen} == {
        (False, False), (True, False), (True, True), (False, True)
    }  # fmt: skip


def test_many_requests_are_aborted_in_one_walk_over_the_queue():
    """One walk for each, and a Ctrl-C behind a long queue would be felt."""

    class Queue(deque):
        walks = 0

        def __iter__(self):
            Queue.walks += 1
            return super().__iter__()

    scheduler = Scheduler(BlockManager(20, 4), 8, 64)
    for i in range(300):
        scheduler.add(Sequence(i, text(5), Params()))
    scheduler.schedule()
    scheduler.waiting = Queue(scheduler.waiting)
    victims = scheduler.abort(*range(10, 300), 999)
    assert sorted(seq.request_id for seq in victims) == list(range(10, 300))
    assert Queue.walks == 2  # to find them, and to keep the others
    assert {seq.request_id for seq in (*scheduler.running, *scheduler.waiting)} == set(range(10))
    scheduler.blocks.check(scheduler.running)


@pytest.mark.parametrize("ahead", [False, True])
def test_after_a_failed_step_everyone_goes_on_from_the_tokens_they_have(ahead):
    for _, sim, target, _ in stages(ahead):
        known = target.tokens[: target.num_known]
        queue = [*sim.scheduler.running, *sim.scheduler.waiting]
        sim.reset()
        assert list(sim.scheduler.waiting) == queue
        assert not sim.scheduler.running and sim.blocks.num_free == sim.blocks.num_usable
        assert not sim.blocks.cached and not sim.blocks.copies
        for seq in sim.scheduler.waiting:
            assert min(seq.tokens) >= 0, "a token is awaited from a step that failed"
        assert target.tokens == known
        sim.drain(ahead)
        assert {seq.request_id for seq in sim.finished} == {0, 1}


def test_a_failed_step_that_sent_someone_away_leaves_no_token_awaited():
    sim, _ = crowded()
    while not sim.scheduler.num_preemptions:
        sim.step_ahead()
    assert any(seq.tokens[-1] < 0 for seq in sim.scheduler.waiting) or sim.flight
    sim.reset()
    sim.drain(ahead=True)
    assert len(sim.finished) == 3


def test_a_step_that_fails_right_after_it_sent_someone_away():
    sim, _ = crowded()
    while not sim.scheduler.num_preemptions:
        step = sim.plan()
        if not sim.scheduler.num_preemptions:
            flight, sim.flight = sim.flight, (step, *sim.run(step))
            if flight:
                sim.read(flight)
    assert any(seq.tokens[-1] < 0 for seq in sim.scheduler.waiting)
    sim.reset()  # planned, never run; and the one before it never read
    assert all(min(seq.tokens) >= 0 for seq in sim.scheduler.waiting)
    sim.drain()
    assert len(sim.finished) == 3


# the block manager on its own ---------------------------------------------------------------------


def test_the_sink_is_never_handed_out():
    sim = Simulation(usable=5)
    seq = sim.add(text(20), max_tokens=1)
    sim.step()
    assert sim.blocks.num_free == 5 and seq.finish_reason == "length"
    blocks = BlockManager(6, 4)
    whole = Sequence(0, text(20), Params())
    assert blocks.admit(whole, [], 20) and sorted(whole.table) == [1, 2, 3, 4, 5]


def test_an_allocation_that_fails_changes_nothing():
    blocks = BlockManager(6, 4)
    a, b = Sequence(0, text(12, 1), Params()), Sequence(1, text(12, 2), Params())
    assert blocks.admit(a, [], 12)
    blank, counts = list(blocks.blank), list(blocks.ref_count)
    assert not blocks.admit(b, [], 12)
    assert not blocks.admit(b, [], 8, reserve=1)
    assert not blocks.grow(a, 12, 24)
    assert blocks.blank == blank and blocks.ref_count == counts
    assert not b.table and b.num_computed == 0 and len(a.table) == 3 and not blocks.copies
    blocks.check([a, b])


def test_a_hit_is_not_counted_as_a_free_block_twice():
    # three cached blocks that are hits, and one blank: a prompt of five blocks does not fit
    blocks = BlockManager(5, 4)
    a = Sequence(0, text(12, 1), Params())
    assert blocks.admit(a, [], 12)
    blocks.publish(a, 12)
    blocks.free(a)
    b = Sequence(1, text(12, 1) + text(8, 2), Params())
    hits = blocks.match(b)
    assert len(hits) == 3
    assert not blocks.admit(b, hits, 20)
    assert blocks.num_free == 4 and not b.table
    assert blocks.admit(b, hits, 16) and list(b.table[:3]) == hits
    blocks.check([b])


@pytest.mark.parametrize(
    "damage",
    [
        lambda blocks, seq: blocks.blank.append(seq.table[0]),
        lambda blocks, seq: blocks.blank.pop(),
        lambda blocks, seq: blocks.blank.append(0),
        lambda blocks, seq: blocks.ref_count.__setitem__(seq.table[0], 3),
        lambda blocks, seq: seq.table.pop(),
        lambda blocks, seq: blocks.hash_of.popitem(),
        lambda blocks, seq: blocks.block_of.popitem(),
        lambda blocks, seq: blocks.cached.popitem(),
        lambda blocks, seq: blocks.cached.__setitem__(seq.table[0], None),
        lambda blocks, seq: seq.table.append(0),
        lambda blocks, seq: seq.tokens.__setitem__(2, 99),
    ],
)
def test_check_sees_damage(damage):
    sim = Simulation()
    served(sim, text(12, 1))
    seq, _ = sim.add(text(12, 2)), sim.add(text(12, 2))  # they share two blocks
    sim.step()
    sim.check()
    damage(sim.blocks, seq)
    with pytest.raises(AssertionError):
        sim.blocks.check(sim.scheduler.running)


class Stack(list):
    """A list that only does what takes the same time at any length."""

    def _slow(self, *_):
        raise AssertionError("an operation that takes longer in a larger pool")

    remove = insert = index = count = sort = reverse = copy = _slow
    __iter__ = __contains__ = __delitem__ = __reversed__ = _slow

    def pop(self):
        return super().pop()


def lines_run(function) -> int:
    """Lines of scheduler.py that a call executes: its operations, counted."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if frame.f_code.co_filename != scheduler.__file__:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def test_operations_take_the_same_time_in_a_pool_of_a_hundred_thousand_blocks():
    def life(num_blocks: int) -> list[int]:
        """Lines run by each call in a sequence's life, in a pool whose blocks are all cached."""
        blocks = BlockManager(num_blocks + 1, 4)
        filler = Sequence(0, [7] * (4 * num_blocks), Params())
        filler.hashes = [i.to_bytes(4, "big") for i in range(num_blocks)]
        assert blocks.admit(filler, [], 4 * num_blocks)
        blocks.publish(filler, 4 * num_blocks)
        blocks.free(filler)
        assert len(blocks.cached) == num_blocks and not blocks.blank
        blocks.blank = Stack()
        seq, again = (Sequence(i, text(10), Params()) for i in (1, 2))
        twins = []
        calls = [
            lambda: blocks.match(seq),
            lambda: blocks.admit(seq, [], 10),
            lambda: blocks.publish(seq, 10),
            lambda: twins.append(blocks.fork(seq, 1)),
            lambda: blocks.grow(seq, 10, 13),
            lambda: blocks.admit(again, blocks.match(again), 10),
            lambda: blocks.free(seq),
            lambda: blocks.free(twins[0]),
            lambda: blocks.free(again),
        ]
        counts = [lines_run(call) for call in calls]
        assert again.tokens == seq.tokens and blocks.num_free == num_blocks
        return counts

    small, large = life(100), life(100_000)
    assert small == large and all(small)


def test_a_step_takes_the_same_time_whatever_waits_and_however_large_the_pool():
    def steps(waiting: int, num_blocks: int) -> list[int]:
        """Lines run by a few steps of eight sequences that decode."""
        lab = Scheduler(BlockManager(num_blocks, 4), 8, 64)
        for i in range(8 + waiting):
            lab.add(Sequence(i, [i], Params(max_tokens=99)))
        lab.blocks.blank = Stack(lab.blocks.blank)
        counts = []
        for _ in range(9):
            plans = []
            counts.append(lines_run(lambda: plans.append(lab.schedule())))  # noqa: B023
            counts.append(lines_run(lambda: lab.update(plans[0], [3] * 8)))  # noqa: B023
        assert len(lab.running) == 8 and len(lab.waiting) == waiting
        return counts

    assert steps(1, 100) == steps(100_000, 100) == steps(1, 1_000_000)


def test_the_free_lists_are_a_stack_and_an_ordered_dict():
    # a plain dict finds its first key by walking over all the deleted ones before it
    blocks = BlockManager(10, 4)
    assert type(blocks.blank) is list and type(blocks.cached).__name__ == "OrderedDict"


def test_the_decisions_need_no_torch_and_no_numpy():
    code = "import sys; sys.modules.update(torch=None, numpy=None); import microvllm.scheduler"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
