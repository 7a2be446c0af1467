"""A scheduler driven without a model.

The model here is a function of the text, and the device a dict that holds, for every slot, the text
its K and V would depend on. So a block that is shared, copied, evicted or written wrongly is seen
as a slot that holds another text than the sequence that reads it.
"""

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from microvllm.blocks import BlockManager, BlockPool
from microvllm.scheduler import DraftProposer, Plan, Scheduler, Sequence, first_come

VOCAB = 8
TOOL = 6  # where tools are on, this token calls one ...
RESULT = [5, 1, 3]  # ... and these are forced after it


class Params(NamedTuple):
    """SamplingParams without torch: the scheduler reads the first two, a batch the others."""

    max_tokens: int = 8
    n: int = 1
    temperature: float = 0.0
    seed: int = 0
    sample_index: int = 0


def next_token(text: list[int], index: int) -> int:
    """The fake model: sample `index` of a text goes on with this token."""
    return zlib.crc32(bytes([*text, 255, index])) % VOCAB


def complete(
    prompt: list[int], max_tokens: int, index: int = 0, stop=(), tools: bool = False
) -> list[int]:
    """What a sequence must have generated in the end, whatever happened to it meanwhile."""
    tokens = list(prompt)
    limit = len(prompt) + max_tokens
    while len(tokens) < limit:
        tokens.append(next_token(tokens, index))
        if tokens[-1] in stop:
            break
        if tools and tokens[-1] == TOOL:
            tokens += RESULT[: limit - len(tokens)]
    return tokens[len(prompt) :]


def text(length: int, seed: int = 0) -> list[int]:
    """A prompt of `length` tokens, another one for each seed."""
    return random.Random(seed).choices(range(VOCAB), k=length)


def make_blocks(num_usable: int, block_size: int = 4, caching: bool = True) -> BlockManager:
    """A block manager with num_usable blocks and the null block."""
    return BlockManager(BlockPool(num_usable + 1), block_size, caching)


class Proposer(DraftProposer):
    """A draft proposer whose guesses are mostly right, so that long drafts are accepted, too."""

    max_rows = 1000

    def __init__(self, simulation: "Simulation"):
        self.simulation = simulation

    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        draw = random.Random(len(seq.token_ids))
        draft: list[int] = []
        for _ in range(draw.randint(0, min(max_tokens, 6))):
            right = next_token([*seq.token_ids, *draft], seq.index)
            draft.append(right if draw.random() < 0.8 else draw.randrange(VOCAB))
            if draft[-1] in seq.stop_token_ids or (self.simulation.calls_tools(seq, draft[-1])):
                return draft[:-1]
        return draft

    def learn(self, seq: Sequence, draft: list[int], num_accepted: int) -> None:
        assert 0 <= num_accepted <= len(draft) > 0


class Simulation:
    """A scheduler with its pool, the fake device, and the loop around them.

    `step` plans, runs and reads a step; `step_ahead` plans and runs one before it reads the last,
    as the loop on a GPU does. Both assert what must hold in every step. Subclasses add features:
    they override make_blocks, slots, wanted, on_plan, on_run, on_read.
    """

    def __init__(
        self,
        usable=40,
        block_size=4,
        max_batch_size=8,
        max_batched_tokens=64,
        caching=True,
        guesses=False,
    ):
        self.guesses = guesses  # are there drafts? then all steps are those of the plain loop
        self.blocks = self.make_blocks(usable, block_size, caching)
        self.scheduler = Scheduler(
            self.blocks,
            max_batch_size,
            max_batched_tokens,
            proposer=Proposer(self) if guesses else None,
        )
        # each slot: the group of layers that it serves, and the text that its K and V depend on
        self.slots: dict[int, tuple[int, tuple[int, ...]]] = {}
        self.in_flight: tuple[Plan, list[int]] | None = None  # run, and not yet read
        self.samples: dict[int, list[Sequence]] = {}  # by request
        self.tool_requests: set[int] = set()
        self.finished: list[Sequence] = []  # without those that were aborted
        self.known_hashes: dict[tuple[int, ...], bytes] = {}
        self.started: list[int] = []  # requests in the order of their first token

    def make_blocks(self, usable: int, block_size: int, caching: bool) -> BlockManager:
        return make_blocks(usable, block_size, caching)

    @property
    def pool(self) -> BlockPool:
        return self.blocks.pool

    # requests

    def add(self, prompt, max_tokens=8, n=1, stop=(), tools=False) -> Sequence:
        params = Params(max_tokens, n)
        request_id = len(self.samples)
        seq = Sequence(request_id, prompt, params, stop_token_ids=frozenset(stop))
        if tools:
            self.tool_requests.add(request_id)
        return self.add_sequence(seq)

    def add_sequence(self, seq: Sequence) -> Sequence:
        self.samples[seq.request_id] = [seq]
        self.scheduler.add(seq)
        return seq

    def served(self, prompt: list[int], max_tokens: int = 1) -> Sequence:
        """Run one request to its end, alone."""
        seq = self.add(prompt, max_tokens)
        self.drain()
        return seq

    def abort(self, *seqs: Sequence) -> list[Sequence]:
        """Abort sequences. Returns those that had not finished."""
        self.scheduler.abort(seqs)
        victims = self.scheduler.finished
        self.scheduler.finished = []
        return victims

    def calls_tools(self, seq: Sequence, token_id: int) -> bool:
        return token_id == TOOL and seq.request_id in self.tool_requests

    def wanted(self, seq: Sequence) -> list[int]:
        """What must come after the prompt in the end."""
        prompt = seq.token_ids[: seq.num_prompt]
        tools = seq.request_id in self.tool_requests
        return complete(prompt, seq.params.max_tokens, seq.index, seq.stop_token_ids, tools)

    def known(self, seq: Sequence) -> list[int]:
        """Its tokens without a placeholder at the end."""
        return seq.token_ids[:-1] if seq.token_ids[-1] < 0 else list(seq.token_ids)

    def need(self, num_tokens: int) -> int:
        """Blocks of a request of this number of tokens; it is refused if the pool has fewer."""
        return self.blocks.max_blocks(num_tokens, self.scheduler.max_batched_tokens)

    @property
    def room(self) -> int:
        """Tokens of the longest request."""
        return self.blocks.longest(199, self.scheduler.max_batched_tokens)

    def is_busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    # the device

    def slots_of(self, seq: Sequence, position: int) -> list[int]:
        """The slot of a token in each group of layers: here there is one."""
        size = self.blocks.block_size
        return [seq.block_table[position // size] * size + position % size]

    def first_seen(self, group: int, position: int) -> int:
        """The first position that a token sees in a group of layers."""
        return 0

    def run(self, plan: Plan) -> list[int]:
        """Copy blocks, write the new slots, read every sequence's context, and draw."""
        assert plan.chunks or not plan.copies
        self.copy_blocks(plan.copies)
        texts = []
        written = []
        for seq, start, stop, draft in plan.chunks:
            tokens = [self.resolve(token) for token in seq.token_ids] + list(draft)
            tokens = tokens[:stop]
            for position in range(start, stop):
                for group, slot in enumerate(self.slots_of(seq, position)):
                    written.append(slot)
                    self.slots[slot] = (group, tuple(tokens[: position + 1]))
            texts.append(tokens)
        assert len(set(written)) == len(written), "two sequences write one slot"
        null_block = range(self.blocks.block_size)
        assert not any(slot in null_block for slot in written), "the null block was written"
        for (seq, start, stop, _), tokens in zip(plan.chunks, texts, strict=True):
            self.read_context(seq, start, stop, tokens)
        self.on_run(plan, texts)
        return [
            next_token(texts[draw.chunk_index][: draw.position], draw.seq.index)
            for draw in plan.draws
        ]

    def resolve(self, token: int) -> int:
        """A token; a negative one is ~row of the step in flight, whose tokens the device has."""
        return token if token >= 0 else self.in_flight[1][~token]

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        size = self.blocks.block_size
        moved = {}  # all sources are read before any target is written
        for source, target in copies:
            for offset in range(size):
                moved[target * size + offset] = self.slots.get(source * size + offset)
        assert len(moved) == len(copies) * size, "a block is the target of two copies"
        targets = set()
        for source, target in copies:  # the device may make a few at a time
            assert source not in targets, f"{source} is copied on, after a copy to it"
            targets.add(target)
        self.slots.update(moved)

    def read_context(self, seq: Sequence, start: int, stop: int, tokens: list[int]) -> None:
        """Every key that the tokens [start, stop) see is in its slot."""
        num_groups = len(self.slots_of(seq, start))
        for group in range(num_groups):
            for position in range(self.first_seen(group, start), stop):
                held = self.slots.get(self.slots_of(seq, position)[group])
                wanted = (group, tuple(tokens[: position + 1]))
                assert held == wanted, (seq.block_table, group, position, held, tokens)

    # the loop

    def plan(self) -> Plan:
        """schedule(), and what holds for every plan."""
        scheduler = self.scheduler
        num_preemptions = scheduler.num_preemptions
        running = list(scheduler.running)
        plan = scheduler.schedule()
        for fork in plan.forks:
            self.samples[fork.request_id].append(fork)
        self.on_plan(plan)
        lengths = [chunk.num_tokens for chunk in plan.chunks]
        assert all(lengths) and sum(lengths) <= scheduler.max_batched_tokens
        assert lengths == sorted(lengths, key=lambda n: n > 1), "one-token chunks come first"
        assert len({id(chunk.seq) for chunk in plan.chunks}) == len(plan.chunks)
        for seq, _, stop, _ in plan.chunks:
            assert seq in scheduler.running and seq.num_computed == stop
            # a sequence that was preempted is not admitted in the same step
            assert seq in running or scheduler.num_preemptions == num_preemptions
        self.started += sorted({chunk.seq.request_id for chunk in plan.chunks} - {*self.started})
        if scheduler.admission is first_come:
            assert self.started == sorted(self.started), "a request overtook an earlier one"
        self.check(plan)
        return plan

    def read(self, plan: Plan, token_ids: list[int]) -> None:
        """update(): only now the scheduler has a step's tokens. Then tools answer."""
        for seq in self.scheduler.update(plan, token_ids):
            if self.calls_tools(seq, seq.token_ids[-1]) and seq.finish_reason is None:
                self.scheduler.force(seq, RESULT)
        self.on_read(plan)
        self.finished += self.scheduler.finished
        self.scheduler.finished = []
        self.check()

    def on_plan(self, plan: Plan) -> None:
        """For features."""

    def on_run(self, plan: Plan, texts: list[list[int]]) -> None:
        """For features. texts: the tokens up to the end of each chunk."""

    def on_read(self, plan: Plan) -> None:
        """For features."""

    def step(self) -> Plan:
        self.land()
        is_busy = self.is_busy()
        plan = self.plan()
        assert bool(plan.chunks) == is_busy, "a step without work, and there is work"
        self.read(plan, self.run(plan))
        self.check_hashes()
        return plan

    def step_ahead(self) -> Plan:
        if self.guesses:
            return self.step()
        with self.placeholders():
            plan = self.plan()
            new = (plan, self.run(plan)) if plan.chunks else None
        old = self.in_flight
        self.in_flight = new
        if old is not None:
            self.read(*old)
        self.check_hashes()
        return plan

    @contextmanager
    def placeholders(self) -> Iterator[None]:
        """While a step is planned and run, ~row stands for each token that the step in flight
        draws, and that is not the last of its sequence."""
        waiting = []
        draws = self.in_flight[0].draws if self.in_flight else []
        for row, draw in enumerate(draws):
            seq = draw.seq
            is_next = draw.position == len(seq.token_ids) < seq.max_length - 1
            if seq.finish_reason is None and is_next:
                seq.token_ids.append(~row)
                waiting.append(seq)
        try:
            yield
        finally:
            for seq in waiting:
                assert seq.token_ids.pop() < 0

    def land(self) -> None:
        """Read the step in flight, if there is one."""
        old = self.in_flight
        self.in_flight = None
        if old is not None:
            self.read(*old)

    def reset(self) -> None:
        """A step failed: what it left in the cache is never read."""
        self.in_flight = None
        self.slots.clear()
        self.scheduler.reset()
        self.check()
        self.check_hashes()

    def drain(self, ahead: bool = False) -> None:
        """Run to the end: every sequence has all its tokens, every block is free again."""
        num_steps = 0
        while self.is_busy() or self.in_flight:
            if ahead:
                self.step_ahead()
            else:
                self.step()
            num_steps += 1
            assert num_steps < 5000, "no end in sight"
        assert self.pool.num_free == self.pool.num_usable
        assert sum(self.pool.ref_count) == 0
        for seq in self.finished:
            wanted = self.wanted(seq)
            assert seq.output == wanted
            stopped = wanted and wanted[-1] in seq.stop_token_ids
            assert seq.finish_reason == ("stop" if stopped else "length")

    # what always holds

    def check(self, plan: Plan | None = None) -> None:
        """plan: if one was planned and not read yet, whose draft tokens may have blocks."""
        scheduler = self.scheduler
        self.blocks.check([*scheduler.running, *scheduler.paused])
        assert len(scheduler.running) <= scheduler.max_batch_size
        assert all(seq.block_table for seq in scheduler.running)
        assert not any(seq.block_table or seq.num_computed for seq in scheduler.waiting)
        num_drafts = {chunk.seq: len(chunk.draft) for chunk in plan.chunks} if plan else {}
        for seq in scheduler.running:
            num_tokens = len(seq.token_ids) + num_drafts.get(seq, 0)
            num_blocks = sum([block != 0 for block in seq.block_table])
            assert num_blocks <= self.need(num_tokens)
        for seq in [*scheduler.running, *scheduler.waiting, *self.finished]:
            known = self.known(seq)[seq.num_prompt :]
            wanted = self.wanted(seq)
            assert known == wanted[: len(known)], (seq.request_id, known, wanted)

    def check_hashes(self) -> None:
        """A hash names a full block of computed tokens that are known, and all before them."""
        size = self.blocks.block_size
        for block, content_hash in self.pool.hash_of.items():
            group, held = self.slots[block * size + size - 1]
            assert len(held) % size == 0 and content_hash == self.hash(held, group)
        for seq in [*self.scheduler.running, *self.scheduler.waiting]:
            assert min(seq.token_ids) >= 0, "a placeholder, and no step is being planned"
            ends = [(i + 1) * size for i in range(len(seq.block_hashes))]
            assert seq.block_hashes == [self.hash(tuple(seq.token_ids[:end])) for end in ends]

    def hash(self, tokens: tuple[int, ...], group: int = 0) -> bytes:
        """Of the last block of a text, in a group of layers."""
        if tokens not in self.known_hashes:
            assert min(tokens) >= 0, "a placeholder is in a hash"
            whole = Sequence(0, list(tokens), Params())
            num_full = len(tokens) // self.blocks.block_size
            self.known_hashes[tokens] = self.blocks.hashes(whole, num_full)[-1]
        return self.known_hashes[tokens]


def crowded(caching: bool = True) -> tuple[Simulation, list[Sequence]]:
    """Three sequences that grow in a pool that holds two of them."""
    sim = Simulation(usable=16, max_batch_size=3, caching=caching)
    seqs = [sim.add(text(8, i), max_tokens=20) for i in range(3)]
    return sim, seqs
