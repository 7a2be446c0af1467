"""Who runs in a step, and in which blocks? Sequence, BlockManager, Scheduler.

The KV cache is a pool of blocks, each for the K and V of block_size tokens (PagedAttention: Kwon et
al. 2023). This file imports no torch. "Seam": what a feature overrides. With blocks of 4 tokens:

    naive      a request reserves its longest possible text: the cat sat on . . . . . . . . . . . .
    paged      a table of blocks, the last part-filled       A.table = [3, 7]
                                                             3: the cat sat on   7: a mat _ _
    fork       a second sample shares the blocks ...         A.table = [3, 7]  B.table = [3, 7]
    copy       ... until one writes into the part-filled     A.table = [3, 9]  B.table = [3, 7]
               one, of which it gets a copy first            copies: 7 -> 9
    hit        A and B are done; block 3 is free, but keeps K, V and the hash of its text: a prompt
               that begins with "the cat sat on" finds it, and computes the rest only
    eviction   if each free block has a hash, the least recently used one loses it and is reused
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice, takewhile
from typing import TYPE_CHECKING

import numpy as np
import xxhash

if TYPE_CHECKING:
    from .sampler import SamplingParams


class Sequence:
    """One sample of one request: its tokens, how many of them are computed, and its block table."""

    def __init__(
        self, request_id: int, prompt: list[int], params: SamplingParams, max_length: int = 0,
        stop_ids: Iterable[int] = (),
    ):  # fmt: skip
        self.request_id, self.sample_id, self.params = request_id, 0, params  # sample 0 of n
        self.tokens, self.num_prompt = list(prompt), len(prompt)  # prompt and output, all known
        self.num_given = len(prompt)  # the prompt, or up to what a tool wrote: none of it ends it
        self.stop_ids = stop_ids  # each later one of these does
        self.max_length = max_length or self.num_prompt + params.max_tokens  # it ends with so many
        self.forks = params.n - 1  # further samples, made when the prompt is computed
        self.num_cached: int | None = None  # tokens found in the prefix cache at first admission
        self.hashes: list[bytes] = []  # of the full blocks, each with its predecessor's hash in it
        self.finish_reason: str | None = None  # "stop", "length", "abort", "error"
        self.stop_reason: int | str | None = None  # the stop token, limit, or error in question
        self.samples = [self]  # all samples of the request that were made so far, the first first
        self.forget()

    output = property(lambda self: self.tokens[self.num_prompt :])
    # so many may come from the prefix cache (seam): not the last, of which the logits are needed
    cacheable = property(lambda self: len(self.tokens) - 1)

    def forget(self) -> None:
        """Start without blocks: all of it is to be computed."""
        self.table = array("i")  # block numbers, in the order of the tokens
        self.num_computed = 0  # tokens whose K and V are in the cache, or will be after this step
        self.num_published = 0  # the first so many blocks are in the prefix cache
        self.num_writable = 0  # the first so many tokens need no `BlockManager.grow` to be written


# Three policies, the defaults of LLM(eviction=, victim=, admission=). None changes any token.
def least_recently_used(blocks: BlockManager) -> int:
    """Eviction: which of `blocks.cached` loses its content, so that a sequence can write to it."""
    return next(iter(blocks.cached))


def youngest(scheduler: Scheduler, seq: Sequence) -> Sequence:
    """Victim: which of `scheduler.running` is preempted when `seq`, maybe itself, needs a block."""
    return scheduler.running[-1]


def first_come(scheduler: Scheduler) -> Sequence:
    """Admission: which of `scheduler.waiting` is next. The others wait until it has room."""
    return scheduler.waiting[0]


class Events:
    """What happens: the core calls these methods, which do nothing here.

    arrive(seq), admit(seq, num_hits), allocate(seq, count), copy(seq, index, source), evict(block),
    publish(seq, block), fork(seq, twin), free(seq), preempt(seq), finish(seq), reset(), plan(plan),
    update(plan, changed); lap(phase): the host has finished this part of a step; end(): the step is
    over; force(seq), note(name, seq, blocks): features call these. Seam: `BlockManager.events`.
    """

    def ignore(self, *facts) -> None: ...

    arrive = admit = allocate = copy = evict = publish = fork = force = free = ignore
    preempt = finish = reset = plan = update = lap = end = note = ignore


class BlockManager:
    """Hands out the blocks of the pool, shares them, and finds them again by content.

    num_blocks: blocks in the pool. Block 0 is the sink, never handed out: padding is written there.
    block_size: tokens in a block; eviction: a policy. Every other block is in exactly one state:

        state      what it is                        kept in
        blank      free, nothing worth keeping       blank
        cached     free, findable by its hash        cached, the least recently used first
        in use     in at least one block table       ref_count, in how many

    Seam: a subclass that keeps `width` blocks for the same tokens (one for each group of layers)
    overrides the methods of block tables, below those of single blocks.
    """

    width = 1  # table entries for each block_size tokens; here a token has one block

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True,
        eviction: Callable[[BlockManager], int] = least_recently_used,
    ):  # fmt: skip
        self.num_blocks, self.num_usable = num_blocks, num_blocks - 1  # without the sink
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.eviction = eviction
        self.events = Events()
        self.clear()

    def clear(self) -> None:
        """Begin anew: every block is blank, whatever was in it and in any table."""
        self.ref_count = [0] * self.num_blocks
        self.blank = list(range(self.num_usable, 0, -1))  # a stack: pop() gives block 1 first
        # ordered by use; a plain dict finds its first key by a walk over all deleted entries
        self.cached: OrderedDict[int, None] = OrderedDict()
        self.hash_of: dict[int, bytes] = {}  # of each findable block, cached or in use
        self.block_of: dict[bytes, int] = {}  # the same pairs: this is the prefix cache
        self.copies: list[tuple[int, int]] = []  # (source, destination), due before the forward

    num_free = property(lambda self: len(self.blank) + len(self.cached))

    def take(self) -> int:
        """A free block: a blank one if there is any, else the cached one that the policy evicts."""
        if self.blank:
            block = self.blank.pop()
        else:
            block = self.eviction(self)
            del self.cached[block]
            del self.block_of[self.hash_of.pop(block)]
            self.events.evict(block)
        self.ref_count[block] = 1
        return block

    def share(self, block: int) -> None:
        """Count one more table that has the block, which may have been cached."""
        if self.ref_count[block] == 0:
            del self.cached[block]
        self.ref_count[block] += 1

    def release(self, block: int) -> None:
        """Count one table fewer that has the block; with the last one it becomes free."""
        self.ref_count[block] -= 1
        assert self.ref_count[block] >= 0, block
        if self.ref_count[block] == 0:
            if block in self.hash_of:
                self.cached[block] = None
            else:
                self.blank.append(block)

    def blocks_for(self, num_tokens: int) -> int:
        """Table entries for so many tokens: whole blocks, so -(-a // b) rounds up."""
        return -(-num_tokens // self.block_size) * self.width

    def most_blocks(self, num_tokens: int, chunk: int) -> int:
        """Blocks that a sequence holds at most on its way to so many tokens, `chunk` a step. Seam:
        fewer, where blocks are given back on the way."""
        return self.blocks_for(num_tokens)

    def longest(self, limit: int, chunk: int) -> int:
        """Tokens, `limit` at most, of the longest sequence that the pool can hold."""
        most = partial(self.most_blocks, chunk=chunk)  # grows with the tokens
        return bisect_right(range(limit + 1), self.num_usable, key=most) - 1

    def block_tables(self, seqs: list[Sequence]) -> np.ndarray:
        """(B, M) int32: the tables as rows, padded with 0, the sink; joined as bytes for speed."""
        lengths = np.array([len(seq.table) for seq in seqs])
        tables = np.zeros((len(seqs), lengths.max()), np.int32)
        rows = b"".join([seq.table for seq in seqs])
        tables[np.arange(tables.shape[1]) < lengths[:, None]] = np.frombuffer(rows, np.int32)
        return tables

    def compute_hashes(self, seq: Sequence, count: int) -> list[bytes]:
        """The hashes of its first `count` full blocks; each is computed once and kept."""
        size = self.block_size
        for i in range(len(seq.hashes), count):
            # with the predecessor's hash in it, an equal hash means equal text from the start on
            h = xxhash.xxh3_128(seq.hashes[-1] if i else b"")
            h.update(array("i", seq.tokens[i * size : (i + 1) * size]))
            seq.hashes.append(h.digest())
        return seq.hashes[:count]

    def match(self, seq: Sequence, num_tokens: int) -> list[int]:
        """Cache hits: the blocks of the longest prefix of its first `num_tokens` that are found."""
        if not self.enable_prefix_caching:
            return []
        hashes = self.compute_hashes(seq, num_tokens // self.block_size)
        return [self.block_of[h] for h in takewhile(self.block_of.__contains__, hashes)]

    def admit(self, seq: Sequence, hits: list[int], stop: int, reserve: int = 0) -> bool:
        """Give a waiting sequence its hits (some may be free now) and fresh blocks up to token
        `stop`. False, and nothing done, if fewer than `reserve` free blocks would be left."""
        fresh = self.blocks_for(stop) - len(hits)
        free_hits = [self.ref_count[block] for block in hits if block].count(0)  # the sink is none
        if self.num_free - free_hits - fresh < reserve:
            return False
        for block in hits:
            self.share(block)
        seq.table.extend(hits)
        seq.table.extend([self.take() for _ in range(fresh)])
        seq.num_published = len(hits) // self.width
        seq.num_computed = seq.num_published * self.block_size
        self.events.admit(seq, len(hits))
        return True

    def grow(self, seq: Sequence, start: int, stop: int) -> bool:
        """Make the tokens [start, stop) writable: take fresh blocks, copy a part-filled one that
        another sample holds too (copy-on-write). False, and nothing done, if too few are free."""
        table, width = seq.table, self.width
        fresh = -(-stop // self.block_size) * width - len(table)
        first = start // self.block_size * width  # only its block may be part-filled and shared
        num_copies = width if first < len(table) and self.ref_count[table[first]] > 1 else 0
        if max(fresh, 0) + num_copies > self.num_free:
            return False
        for i in range(first, first + num_copies):
            source, target = table[i], self.take()
            self.copies.append((source, target))
            table[i] = target
            self.release(source)
            self.events.copy(seq, i, source)
        if fresh > 0:
            table.extend([self.take() for _ in range(fresh)])
            self.events.allocate(seq, fresh)
        seq.num_writable = len(table) // width * self.block_size
        return True

    def publish(self, seq: Sequence, num_tokens: int) -> None:
        """Let the full blocks among the first `num_tokens` be found by their hash from now on."""
        count = num_tokens // self.block_size
        if self.enable_prefix_caching and count > seq.num_published:
            hashes = self.compute_hashes(seq, count)
            for i in range(seq.num_published, count):
                self.set_hash(seq, seq.table[i], hashes[i])
            seq.num_published = count

    def set_hash(self, seq: Sequence, block: int, h: bytes) -> None:
        """Let a block be found by its text's hash, unless it or another one already is."""
        if h not in self.block_of:
            self.block_of[h] = block
            self.hash_of[block] = h
            self.events.publish(seq, block)

    def fork(self, seq: Sequence, sample_id: int) -> Sequence:
        """Another sample: the same tokens on the same blocks."""
        seq.num_writable = 0  # two tables have the last block now: `grow` has to copy it
        twin = copy(seq)
        twin.sample_id, twin.forks = sample_id, 0
        twin.tokens, twin.table, twin.hashes = seq.tokens[:], seq.table[:], seq.hashes[:]
        seq.samples.append(twin)
        for block in twin.table:
            self.share(block)
        self.events.fork(seq, twin)
        return twin

    def free(self, seq: Sequence) -> None:
        """Release all blocks, the last first: it is evicted first, and prompts rarely share it."""
        for block in reversed(seq.table):
            self.release(block)
        seq.forget()
        if self.copies:  # not into blocks freed here: a later copy may get the same destination
            self.copies = [c for c in self.copies if self.ref_count[c[1]]]
        self.events.free(seq)

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Assert what must always hold, given all sequences that have a table."""
        counts, texts = [0] * self.num_blocks, {}
        for seq in sequences:
            self.check_table(seq, texts)
            for block in filter(None, seq.table):
                counts[block] += 1
        assert counts == self.ref_count, "reference counts differ from the tables"
        used = [block for block, count in enumerate(counts) if count]
        states = sorted([*self.blank, *self.cached, *used])
        assert states == list(range(1, self.num_blocks)), "a block is lost, or in two states"
        assert {b: h for h, b in self.block_of.items()} == self.hash_of, "hash tables differ"
        findable = self.hash_of.keys()
        assert self.cached.keys() <= findable and findable.isdisjoint(self.blank)

    def check_table(self, seq: Sequence, texts: dict) -> None:
        """`check` for one table; texts: of the shared blocks in the tables seen so far."""
        size, sizes = self.block_size, (len(seq.table), seq.num_computed, seq.num_published)
        for i, block in enumerate(seq.table):
            assert block, f"entry {i} is the sink"
            if self.ref_count[block] > 1:  # the sequences that share it must have one text there
                text = seq.tokens[i * size : min((i + 1) * size, seq.num_computed)]
                assert texts.setdefault(block, text) == text, f"block {block} has two texts"
        next_block = seq.table[seq.num_computed // size :][:1]
        assert seq.num_computed >= seq.num_writable or self.ref_count[next_block[0]] == 1, sizes
        assert len(seq.table) >= self.blocks_for(seq.num_computed), sizes
        assert seq.num_published <= seq.num_computed // size or not seq.table, sizes


@dataclass
class Plan:
    """What one step does, as plain data, and its results."""

    chunks: list[tuple[Sequence, int, int]]  # tokens [start, stop) to compute; one-token ones first
    samples: list[tuple[int, Sequence, int]]  # (index into chunks, sequence, position of new token)
    copies: list[tuple[int, int]]  # (source, destination), blocks to copy first
    results: dict = field(default_factory=dict)  # the Runner's "tokens", one a sample; features add

    @cached_property
    def params(self) -> list[SamplingParams]:
        return [seq.params for _, seq, _ in self.samples]


class WaitingQueue:
    """The sequences that wait, in their order: a deque whose `remove` and `in` take the same time
    at any length, since a long queue may be aborted one request at a time."""

    def __init__(self, seqs: Iterable[Sequence] = ()):
        self._seqs: OrderedDict[Sequence, None] = OrderedDict.fromkeys(seqs)

    def append(self, seq: Sequence) -> None:
        """Put a sequence at the end."""
        self._seqs[seq] = None

    def appendleft(self, seq: Sequence) -> None:
        """Put a sequence at the front."""
        self._seqs[seq] = None
        self._seqs.move_to_end(seq, last=False)

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out. Raises KeyError if it does not wait."""
        del self._seqs[seq]

    def __getitem__(self, index: int) -> Sequence:
        """The first sequence is found at once, others by a walk."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"waiting[{index}], and {len(self)} sequences wait")
        if index < 0:
            return next(islice(reversed(self._seqs), -index - 1, None))
        return next(islice(self._seqs, index, None))

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._seqs

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._seqs)

    def __len__(self) -> int:
        return len(self._seqs)


class Scheduler:
    """Decides which tokens of which sequences are computed in a step. There is no prefill phase and
    no decode phase: of a sequence's tokens some are computed, and the rest must be. max_batch_size:
    sequences that run at once; max_batched_tokens: of a step; victim, admission: policies."""

    def __init__(
        self, blocks: BlockManager, max_batch_size: int, max_batched_tokens: int,
        victim: Callable[[Scheduler, Sequence], Sequence] = youngest,
        admission: Callable[[Scheduler], Sequence] = first_come,
    ):  # fmt: skip
        self.blocks, self.victim, self.admission = blocks, victim, admission
        self.max_batch_size, self.max_batched_tokens = max_batch_size, max_batched_tokens
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0
        self.num_tokens = 0  # tokens that `update` has appended so far

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(seq)
        self.blocks.events.arrive(seq)

    def schedule(self) -> Plan:
        """Plan the next step, and count it as done: `num_computed` grows now, and a sequence of
        which then all is computed forks into its n samples."""
        chunks, total = self.choose()
        if total > len(chunks):  # some are of more than one token
            chunks.sort(key=lambda c: c[2] - c[1] > 1)  # stable: one-token chunks first
        for seq, _, stop in chunks:
            seq.num_computed = stop
        plan = Plan(chunks, self.samples(chunks), self.blocks.copies)
        self.blocks.copies = []
        self.blocks.events.plan(plan)
        return plan

    def choose(self) -> tuple[list[tuple[Sequence, int, int]], int]:
        """The chunks of the next step, and their number of tokens: running sequences first, then,
        unless one was preempted, waiting ones. Seam: chunks with speculative tokens too."""
        blocks, chunks, budget = self.blocks, [], self.max_batched_tokens
        num_preemptions = self.num_preemptions
        for seq in self.running[:]:
            start = seq.num_computed
            stop = min(len(seq.tokens), start + budget)
            if start >= stop or not seq.table:  # its last token is in flight, or it was preempted
                continue
            while seq.table and stop > seq.num_writable and not blocks.grow(seq, start, stop):
                victim = self.victim(self, seq)
                self.preempt(victim)
                for chunk in [c for c in chunks if c[0] is victim]:  # already in the plan
                    chunks.remove(chunk)
                    budget += chunk[2] - chunk[1]
            if seq.table:
                chunks.append((seq, start, stop))
                budget -= stop - start
        if self.waiting and budget and self.num_preemptions == num_preemptions:
            budget = self.admit(chunks, budget)
        return chunks, self.max_batched_tokens - budget

    def admit(self, chunks: list[tuple[Sequence, int, int]], budget: int) -> int:
        """Add the first chunks of waiting sequences, where there is room; gives the budget left."""
        blocks = self.blocks
        capacity = self.max_batch_size - sum([1 + seq.forks for seq in self.running])
        while self.waiting and budget:
            seq = self.admission(self)
            hits = blocks.match(seq, seq.cacheable)
            start = len(hits) // blocks.width * blocks.block_size
            stop = min(len(seq.tokens), start + budget)
            # room for 16 more tokens of each running sequence, or seq might be preempted at once
            reserve = blocks.blocks_for(16 * len(self.running))
            if 1 + seq.forks > capacity or not blocks.admit(seq, hits, stop, reserve):
                break
            self.waiting.remove(seq)
            self.running.append(seq)
            if seq.num_cached is None:  # after a preemption it hits its own blocks: not counted
                seq.num_cached = start
            capacity -= 1 + seq.forks
            chunks.append((seq, start, stop))
            budget -= stop - start
            # published before it is computed: the step writes all K and V of a layer before any row
            # reads them, so equal prompts of one step share their blocks already
            blocks.publish(seq, stop)
        return budget

    def samples(self, chunks: list[tuple[Sequence, int, int]]) -> list[tuple[int, Sequence, int]]:
        """What is sampled after these chunks: the next token of each sequence of which all tokens
        are computed; it forks here. Seam: also after speculative tokens."""
        samples = []
        for index, (seq, _, stop) in enumerate(chunks):
            if stop == len(seq.tokens):
                samples.append((index, seq, stop))
                for sample_id in range(1, 1 + seq.forks):
                    self.running.append(self.blocks.fork(seq, sample_id))
                    samples.append((index, self.running[-1], stop))
                seq.forks = 0
        return samples

    def update(self, plan: Plan, token_ids: list[int]) -> list[Sequence]:
        """Publish the blocks that are full now, append a token for each of plan.samples (-1 if none
        could be drawn), end what is done. Returns the sequences that got a token or ended."""
        size = self.blocks.block_size
        for seq, _, stop in plan.chunks:
            # less than planned, if it was preempted or its speculative tokens were rejected
            if stop // size > seq.num_published:
                self.blocks.publish(seq, min(stop, seq.num_computed, len(seq.tokens)))
        changed: list[Sequence] = []
        for (_, seq, position), token in zip(plan.samples, token_ids, strict=True):
            # since the step was planned it was ended, or a feature appended a token of its own
            if seq.finish_reason or position != len(seq.tokens):
                continue
            if not changed or changed[-1] is not seq:  # features may sample several of a sequence
                changed.append(seq)
            if token < 0:
                self.finish(seq, "error", seq.stop_reason or "no token is left to draw")
                continue
            seq.tokens.append(token)
            self.num_tokens += 1
        self.end(changed)
        self.blocks.events.update(plan, changed)
        return changed

    def end(self, seqs: Iterable[Sequence]) -> None:
        """Finish those of which the last output token is the last of all."""
        for seq in seqs:
            if seq.finish_reason:
                continue
            if len(seq.tokens) > seq.num_given and seq.tokens[-1] in seq.stop_ids:
                self.finish(seq, "stop", seq.tokens[-1])
            elif len(seq.tokens) >= seq.max_length:
                at_limit = len(seq.tokens) == seq.num_prompt + seq.params.max_tokens
                self.finish(seq, "length", "max_tokens" if at_limit else "max_model_len")

    def finish(self, seq: Sequence, reason: str, cause: int | str | None = None) -> None:
        """End a sequence for a finish_reason and a stop_reason, and free its blocks."""
        seq.finish_reason, seq.stop_reason = reason, cause
        if seq.table:
            self.blocks.publish(seq, min(seq.num_computed, len(seq.tokens)))
            self.blocks.free(seq)
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        self.blocks.events.finish(seq)

    def abort(self, *seqs: Sequence) -> list[Sequence]:
        """End those of these sequences that have not ended; returns them. The time does not depend
        on how many others wait."""
        ended = []
        for seq in seqs:
            if seq.finish_reason is None:
                self.finish(seq, "abort")
                ended.append(seq)
        return ended

    def preempt(self, seq: Sequence) -> None:
        """Free a running sequence's blocks; it keeps its tokens and goes first in the queue."""
        self.running.remove(seq)
        self.blocks.free(seq)
        self.waiting.appendleft(seq)
        self.num_preemptions += 1
        self.blocks.events.preempt(seq)

    def reset(self, sequences: Iterable[Sequence] | None = None) -> list[Sequence]:
        """After new weights, or a step that failed: forget all K and V; these sequences (by default
        all) wait again, or end, if the step was left before they did. Returns them."""
        sequences = self.running + [*self.waiting] if sequences is None else [*sequences]
        self.running, self.waiting = [], WaitingQueue(sequences)
        self.blocks.clear()
        for seq in sequences:
            seq.forget()
            seq.hashes, seq.finish_reason, seq.stop_reason = [], None, None
        self.blocks.events.reset()
        self.end(sequences)
        return sequences
