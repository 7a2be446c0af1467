"""Who runs, and who makes room: BlockManager and Scheduler, driven without a model.

The model here is a function of the text, and the device a dict that holds, for every slot, the text
its K and V would depend on. So a block that is shared, copied, evicted or written wrongly is seen
as a slot that holds another text than the sequence that reads it.
"""

import random
import zlib
from typing import NamedTuple

import pytest

from microvllm.features.calculator import CalculatorScheduler
from microvllm.features.lookup import LookupScheduler
from microvllm.features.scoring import ScoredSequence, ScoringScheduler
from microvllm.features.windows import GroupedBlocks
from microvllm.gpu.ahead import placeholders
from microvllm.scheduler import BlockManager, Plan, Sequence, first_come

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

    def __init__(self, seq: Sequence):
        self.sample_id = seq.sample_id
        self.ends = {*seq.stop_ids, *getattr(seq, "tool_ids", ())}

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


class Featured(ScoringScheduler, CalculatorScheduler):
    """What the full engine makes of a Scheduler."""


class Guessing(LookupScheduler, Featured):
    """The same with prompt lookup."""

    def lookup(self, seq: Sequence) -> Guesser:
        return self.lookups.setdefault(seq, Guesser(seq))


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
        self.windows = tuple(windows)  # of each group of layers that has blocks of its own
        if self.windows == (-1,):
            self.blocks = BlockManager(usable + 1, block_size, caching)
        else:
            self.blocks = GroupedBlocks(usable + 1, block_size, caching, windows=windows)
        kind = Guessing if guesses else Featured
        self.scheduler = kind(self.blocks, max_batch_size, max_batched_tokens)
        # which group of layers a slot has K and V of, and the text they were made from
        self.slots: dict[int, tuple[int, tuple[int, ...]]] = {}
        self.flight: tuple[Plan, list[int]] | None = None  # run, and not yet read
        self.requests = 0
        self.finished: list[Sequence] = []
        self.hashes: dict[tuple[int, ...], bytes] = {}
        self.started: list[int] = []  # requests in the order of their first token

    def add(self, prompt, max_tokens=8, n=1, stop=(), tools=False, targets=None) -> Sequence:
        if targets is not None:
            seq = ScoredSequence(self.requests, prompt, Params(len(targets)), targets)
        else:
            seq = Sequence(self.requests, prompt, Params(max_tokens, n), 0, frozenset(stop))
            seq.tool_ids = frozenset([TOOL] if tools else [])  # what calls a tool
        self.requests += 1
        self.scheduler.add(seq)
        return seq

    def wanted(self, seq: Sequence) -> list[int]:
        """What must stand after the prompt in the end."""
        if isinstance(seq, ScoredSequence):
            return seq.targets[:-1]
        prompt, tools = seq.tokens[: seq.num_prompt], bool(seq.tool_ids)
        return complete(prompt, seq.params.max_tokens, seq.sample_id, seq.stop_ids, tools)

    def known(self, seq: Sequence) -> list[int]:
        """Its tokens without those at their end that are guessed or on their way while a step is
        planned and run."""
        known = self.scheduler.known if self.guesses else {}
        guessed = len(seq.tokens) - known.get(seq, len(seq.tokens))
        awaited = seq.tokens[-1] < 0
        return seq.tokens[: len(seq.tokens) - guessed - awaited]

    def need(self, num_tokens: int) -> int:
        """Blocks of a request of so many tokens; it is refused if the pool has fewer."""
        return self.blocks.most_blocks(num_tokens, self.scheduler.max_batched_tokens)

    @property
    def room(self) -> int:
        """Tokens of the longest request."""
        return max(n for n in range(200) if self.need(n) <= self.blocks.num_usable)

    def slot(self, seq: Sequence, position: int, group: int = 0) -> int:
        size, width = self.blocks.block_size, self.blocks.width
        return seq.table[position // size * width + group] * size + position % size

    def ahead(self):
        """The context in which a step is planned and run one step ahead of what is read."""
        return placeholders(self.flight and self.flight[0])

    def plan(self) -> Plan:
        """schedule(), and what every plan must be."""
        scheduler = self.scheduler
        preemptions, running = scheduler.num_preemptions, list(scheduler.running)
        step = scheduler.schedule()
        known = scheduler.known if self.guesses else {}
        step.guessed = {seq: len(seq.tokens) - count for seq, count in known.items()}
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

    def run(self, step: Plan) -> list[int]:
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
        for seq, start, stop in step.chunks:
            # a negative token is ~row of the last step's tokens, which only the device knows
            text = [token if token >= 0 else last[~token] for token in seq.tokens[:stop]]
            for position in range(start, stop):
                for group in range(self.blocks.width):
                    written.append(self.slot(seq, position, group))
                    self.slots[written[-1]] = group, tuple(text[: position + 1])
            texts.append(text)
        assert len(set(written)) == len(written), "two sequences write one slot"
        assert not {slot // size for slot in written} & {0}, "the sink was written"
        for (seq, start, stop), text in zip(step.chunks, texts, strict=True):
            for group, window in enumerate(self.windows):
                for position in range(max(0, start - window) if window >= 0 else 0, stop):
                    held = self.slots.get(self.slot(seq, position, group))
                    wanted = group, tuple(text[: position + 1])
                    assert held == wanted, (seq.table, group, position, held, text)
        step.results["scores"] = [
            score(texts[index][: position + 1], seq.targets[position + 1 - seq.num_prompt])
            for index, seq, first, stop in step.scored
            for position in range(first, stop)
        ]
        return [
            next_token(texts[index][:position], seq.sample_id)
            for index, seq, position in step.samples
        ]

    def read(self, step: Plan, token_ids: list[int]) -> None:
        """update(): only now the scheduler learns a step's tokens."""
        for seq in self.scheduler.update(step, token_ids):
            if seq.tokens[-1] in getattr(seq, "tool_ids", ()) and not seq.finish_reason:
                self.scheduler.force(seq, RESULT)
            if seq.finish_reason:
                self.finished.append(seq)
        self.check()

    def step(self) -> Plan:
        self.land()
        busy = bool(self.scheduler.running or self.scheduler.waiting)
        step = self.plan()
        assert bool(step.chunks) == busy, "a step without work, and there is work"
        self.read(step, self.run(step))
        self.check_hashes()
        return step

    def step_ahead(self) -> Plan:
        if self.guesses:
            return self.step()
        with self.ahead():
            step = self.plan()
            flight = (step, self.run(step)) if step.chunks else None
        flight, self.flight = self.flight, flight
        if flight:
            self.read(*flight)
        self.check_hashes()
        return step

    def land(self) -> None:
        """Read the step that is under way, if one is."""
        flight, self.flight = self.flight, None
        if flight:
            self.read(*flight)

    def reset(self) -> None:
        """A step failed: what it left in the cache is not to be trusted, and never read."""
        self.flight = None
        self.slots.clear()
        self.scheduler.reset()
        self.check()
        self.check_hashes()

    def check(self) -> None:
        scheduler = self.scheduler
        self.blocks.check(scheduler.running)
        assert len(scheduler.running) <= scheduler.max_batch_size
        assert all(seq.table for seq in scheduler.running)
        assert not any(seq.table or seq.num_computed for seq in scheduler.waiting)
        for seq in scheduler.running:
            assert sum(map(bool, seq.table)) <= self.need(len(seq.tokens))
        for seq in [*scheduler.running, *scheduler.waiting, *self.finished]:
            known, wanted = self.known(seq)[seq.num_prompt :], self.wanted(seq)
            assert known == wanted[: len(known)], (seq.request_id, known, wanted)

    def check_hashes(self) -> None:
        """A hash names a full block of computed tokens that are known, and all before them."""
        size, marks = self.blocks.block_size, getattr(self.blocks, "marks", [b""])
        for block, named in self.blocks.hash_of.items():
            group, held = self.slots[block * size + size - 1]
            assert len(held) % size == 0 and named == self.hash(held) + marks[group]
        for seq in [*self.scheduler.running, *self.scheduler.waiting]:
            assert min(seq.tokens) >= 0, "a token is awaited, and no step is being planned"
            ends = [(i + 1) * size for i in range(len(seq.hashes))]
            assert seq.hashes == [self.hash(tuple(seq.tokens[:end])) for end in ends]

    def hash(self, text: tuple[int, ...]) -> bytes:
        """Of the last block of a text."""
        if text not in self.hashes:
            assert min(text) >= 0, "a token that is not known is in a hash"
            whole, count = Sequence(0, list(text), Params()), len(text) // self.blocks.block_size
            self.hashes[text] = self.blocks.compute_hashes(whole, count)[-1]
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
        for kept in ("known", "lookups", "judged"):
            assert not getattr(self.scheduler, kept, ()), f"{kept} are kept of those who are gone"
        for seq in self.finished:
            wanted, text = self.wanted(seq), list(seq.tokens)
            assert text[seq.num_prompt :] == wanted
            stopped = wanted and wanted[-1] in seq.stop_ids
            assert seq.finish_reason == ("stop" if stopped else "length")
            for i, target in enumerate(getattr(seq, "targets", ())):
                assert seq.scores[i] == score(text[: seq.num_prompt + i], target)


def text(length: int, seed: int = 0) -> list[int]:
    """A prompt of so many tokens, another one for each seed."""
    return random.Random(seed).choices(range(VOCAB), k=length)


def served(sim: Simulation, prompt: list[int], max_tokens: int = 1) -> Sequence:
    """Run one request to its end, alone."""
    seq = sim.add(prompt, max_tokens)
    sim.drain()
    return seq


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
    assert len(old.tokens) == 3 + 4


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
    sim = Simulation(max_batch_size=4)  # whose step has tokens left for `two`, and no seats
    sim.add(text(6, 1), n=3)
    two = sim.add(text(2, 2), n=2)
    sim.step()
    assert len(sim.scheduler.running) == 3 and list(sim.scheduler.waiting) == [two]


@pytest.mark.parametrize(("usable", "room"), [(9, False), (10, True)])
def test_a_newcomer_leaves_room_for_those_who_run(usable, room):
    sim = Simulation(usable=usable)
    old = sim.add(text(8, 1), max_tokens=20)
    sim.step()
    assert sim.blocks.num_free == usable - 2
    # it takes 3 blocks, the other one its third: 3 would be left of 9, and 16 tokens are 4
    young = sim.add(text(9, 2), max_tokens=2)
    sim.step()
    assert (young in sim.scheduler.running) == room
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
    sim.scheduler.preempt(seq)
    held = len(seq.tokens)
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
