"""Who runs in a step, and in which blocks: Sequence, BlockManager, Scheduler.

Plain Python that imports no torch: it decides, tensors obey. So a laptop can drive it with a fake
model over a million blocks. The paper is Kwon et al., "Efficient Memory Management for Large
Language Model Serving with PagedAttention", 2023.
"""

from __future__ import annotations

from array import array
from bisect import bisect
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, islice
from math import inf
from typing import TYPE_CHECKING, NamedTuple

import xxhash

if TYPE_CHECKING:
    from .features.lookup import Lookup
    from .sampler import SamplingParams
    from .trace import Trace

FEW_ROWS = 8  # a step of so many takes little longer than one of a single row


class Sequence:
    """One sample of one request: its tokens, how many of them are computed, and its block table."""

    __slots__ = (
        "request_id", "sample_id", "params", "tokens", "num_prompt", "max_length", "stop_ids",
        "targets", "scores", "num_computed", "num_cached", "table", "slides_at", "hashes",
        "num_published", "running", "finish_reason", "forks", "lookup",
    )  # fmt: skip

    def __init__(
        self, request_id: int, prompt: list[int], params: SamplingParams, max_length: int = 0,
        stop_ids: Iterable[int] = (), targets: list[int] | None = None,
        lookup: Lookup | None = None,
    ):  # fmt: skip
        self.request_id = request_id
        self.sample_id = 0  # which of the request's n samples
        self.params = params
        # prompt and output. a negative one is on its way: ~row of its step's samples
        self.tokens = list(prompt)
        self.num_prompt = len(prompt)
        self.max_length = max_length or self.num_prompt + params.max_tokens  # it ends at so many
        self.stop_ids = stop_ids  # tokens that end it
        # a continuation to be scored, not written: nothing is sampled, the log-probability of each
        # of these is wanted, given all before it. the last is never computed, so it is no token
        self.targets = targets
        self.scores: list[float] = [0.0] * len(targets or ())
        self.tokens.extend(targets[:-1] if targets else ())
        self.num_computed = 0  # tokens whose K and V are in the cache (or will be after this step)
        self.num_cached: int | None = None  # of the prompt, by the prefix cache, once admitted
        # the block of tokens [0, block_size), of the next as many, ... where layers are in groups,
        # one for each group, side by side. 0 is one that has left the group's window
        self.table = array("i")
        self.slides_at: float = 0  # the position whose step may give such a block back
        self.hashes: list[bytes] = []  # of the full blocks, each chained over its predecessors
        self.num_published = 0  # blocks of the table that the prefix cache was told of
        self.running = False
        self.finish_reason: str | None = None  # "stop", "length", "abort", "error"
        self.forks = params.n - 1  # samples that will split off when the prompt is computed
        self.lookup = lookup  # who guesses what comes next, if anybody does

    @property
    def num_known(self) -> int:
        """Tokens whose value is known: all, but for those still on their way."""
        count = len(self.tokens)
        while self.tokens[count - 1] < 0:
            count -= 1
        return count

    def fork(self, sample_id: int) -> Sequence:
        """Another sample: the same tokens and the same blocks (the caller counts them)."""
        twin = Sequence(self.request_id, [], self.params, self.max_length, self.stop_ids)
        twin.sample_id, twin.forks, twin.running = sample_id, 0, self.running
        twin.tokens, twin.num_prompt = self.tokens.copy(), self.num_prompt
        twin.num_computed, twin.num_cached = self.num_computed, self.num_cached
        twin.table, twin.slides_at = self.table[:], self.slides_at
        twin.hashes, twin.num_published = self.hashes.copy(), self.num_published
        twin.lookup = self.lookup and self.lookup.fork()
        return twin


# policies -----------------------------------------------------------------------------------------
# the three choices of the engine, each a function of the one who asks. these are the defaults, all
# O(1); lab/policies.py has others. a choice costs time, never a token


def least_recently_used(blocks: BlockManager) -> int:
    """Eviction: which of `blocks.cached`, free but findable, is given to a new text."""
    return next(iter(blocks.cached))


def youngest(scheduler: Scheduler, seq: Sequence) -> Sequence:
    """Victim: who of `scheduler.running` gives its blocks back, so that `seq` (or, if it is `seq`
    itself, the others) can go on. The oldest has waited longest."""
    return scheduler.running[-1]


def first_come(scheduler: Scheduler) -> Sequence:
    """Admission: who of `scheduler.waiting` is next. If there is no room for it, nobody is let
    in."""
    return scheduler.waiting[0]


def group_layers(windows: list[int], length: int) -> list[tuple[int, list[int]]]:
    """Layers that share a block table, for sequences of up to `length` tokens: (window, layers) of
    each group, those that see all (-1) first.

    A group has layers of one window. Since a block of any group takes the same memory, that of the
    largest one, a single pool serves them all (the idea of vLLM's hybrid KV cache manager). Taken
    is the size that needs least of it for a sequence of that length. Where windows save nothing,
    all layers are one group.
    """
    kinds: dict[int, list[int]] = {}
    for i, window in enumerate(windows):
        kinds.setdefault(window if 0 <= window < length - 1 else -1, []).append(i)

    def split(size: int) -> list[tuple[int, list[int]]]:
        parts = sorted(kinds.items())
        return [(w, of[i : i + size]) for w, of in parts for i in range(0, len(of), size)]

    def cost(groups) -> int:  # a window begins and ends anywhere in a block, of 16 as a rule
        tokens = sum(min(w + 32, length) if w >= 0 else length for w, _ in groups)
        return tokens * max(len(layers) for _, layers in groups)

    options = [[(-1, list(range(len(windows))))], *map(split, range(len(windows), 0, -1))]
    # every group's table goes to the device in each step: four are enough for SSSL
    return min((groups for groups in options if len(groups) <= 4), key=cost)


def most_blocks(windows: Iterable[int], block_size: int, num_tokens: int, chunk: int = 1) -> int:
    """Blocks that a sequence holds at most on its way to so many tokens, if a step computes up to
    `chunk` of them; windows: as BlockManager has them."""
    full = -(-num_tokens // block_size)
    # a chunk and the window before it, wherever in a block they begin
    spans = (-(-(w + chunk - 1) // block_size) + 1 if w >= 0 else full for w in windows)
    return sum(min(full, span) for span in spans)


class BlockManager:
    """Hands out the blocks of the pool, shares them between sequences, and finds them again by
    content.

    num_blocks: blocks in the pool, of which block 0 is a sink for padding and never handed out;
    block_size: tokens in a block; eviction: a policy; windows: how many tokens back a layer sees,
    -1 is all, of each group of layers that has blocks of its own (`group_layers`). A block of
    which no token is seen any more is given back, and the sink takes its place in the table. Every
    other block is in exactly one of three states:

        state      what it is                        kept in
        blank      free, nothing worth keeping       blank
        cached     free, findable by its hash        cached, the least recently used first
        in use     in at least one block table       ref_count, in how many
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True,
        eviction: Callable[[BlockManager], int] = least_recently_used,
        windows: Iterable[int] = (-1,),
    ):  # fmt: skip
        self.num_blocks, self.block_size, self.windows = num_blocks, block_size, tuple(windows)
        self.num_groups = len(self.windows)
        # what a text's hash is followed by where a group's block is looked for
        self.marks = [b"", *(bytes([group]) for group in range(1, self.num_groups))]
        self.enable_prefix_caching, self.eviction = enable_prefix_caching, eviction
        self.ref_count = [0] * num_blocks
        self.blank = list(range(num_blocks - 1, 0, -1))  # a stack: pop() gives block 1 first
        # OrderedDict, since a plain dict walks over all its deleted entries to find the first live
        # one
        self.cached: OrderedDict[int, None] = OrderedDict()
        self.hash_of: dict[int, bytes] = {}
        self.block_of: dict[bytes, int] = {}
        self.copies: list[
            tuple[int, int]
        ] = []  # (source, destination) to be done before the forward
        self.trace: Trace | None = None  # who is told what happens to the blocks, and who runs

    @property
    def num_free(self) -> int:
        return len(self.blank) + len(self.cached)

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1  # without the sink

    def blocks_for(self, num_tokens: int) -> int:
        """Entries in the table of so many tokens."""
        return -(-num_tokens // self.block_size) * self.num_groups

    def longest(self, chunk: int) -> int:
        """Tokens of the longest sequence that the pool can hold, computed `chunk` at a time."""
        need = partial(most_blocks, self.windows, self.block_size, chunk=chunk)
        return bisect(range(2**31), self.num_usable, key=need) - 1

    def _first_seen(self, position: int) -> list[int]:
        """The first block, in the order of the text, that a token there sees, for each group."""
        return [max(0, position - w) // self.block_size if w >= 0 else 0 for w in self.windows]

    def _take(self) -> int:
        """A free block, blank if there is one, else the one that the policy gives up."""
        if self.blank:
            block = self.blank.pop()
        else:
            block = self.eviction(self)
            if block not in self.cached:
                raise ValueError(f"eviction gave {block!r:.80}: return one of blocks.cached")
            del self.cached[block]
            del self.block_of[self.hash_of.pop(block)]
            if self.trace:
                self.trace.evict(block)
        self.ref_count[block] = 1
        return block

    def _release(self, block: int) -> None:
        self.ref_count[block] -= 1
        assert self.ref_count[block] >= 0, block
        if self.ref_count[block] == 0:
            if block in self.hash_of:
                self.cached[block] = None
            else:
                self.blank.append(block)

    def _hashes(self, seq: Sequence, count: int) -> list[bytes]:
        """The hashes of the first `count` full blocks; each is computed once and kept on the
        sequence."""
        size = self.block_size
        for i in range(len(seq.hashes), count):
            # 128 bits and the predecessor's hash: equal hashes mean equal text from the start on
            h = xxhash.xxh3_128(seq.hashes[-1] if i else b"")
            h.update(array("i", seq.tokens[i * size : (i + 1) * size]))
            seq.hashes.append(h.digest())
        return seq.hashes

    def match(self, seq: Sequence) -> list[int]:
        """A table for as much of the sequence's beginning as the blocks are there for: all blocks,
        or those that the next token sees. Never the last token, nor the last of a prompt with a
        continuation to score: their logits are needed."""
        if not self.enable_prefix_caching:
            return []
        length = len(seq.tokens) if seq.targets is None else seq.num_prompt
        count = (length - 1) // self.block_size
        hashes, found = self._hashes(seq, count)[:count], self.block_of.get
        rows = [[found(h + mark, 0) for h in hashes] for mark in self.marks]
        while True:  # a gap is seen by all that is longer than up to there
            seen = list(zip(rows, self._first_seen(count * self.block_size), strict=True))
            gaps = [row.index(0, first) for row, first in seen if 0 in row[first:count]]
            if not gaps:
                return [row[i] if i >= first else 0 for i in range(count) for row, first in seen]
            count = min(gaps)

    def admit(self, seq: Sequence, hits: list[int], stop: int, reserve: int = 0) -> bool:
        """Give a new sequence its hits and fresh blocks up to token `stop`. False, and nothing
        done, if that would leave fewer than `reserve` free blocks."""
        fresh, held = self.blocks_for(stop) - len(hits), [b for b in hits if b]
        free_hits = sum(self.ref_count[b] == 0 for b in held)
        if self.num_free - free_hits - fresh < reserve:
            return False
        for block in held:
            if self.ref_count[block] == 0:
                del self.cached[block]
            self.ref_count[block] += 1
        seq.table.extend(hits)
        for _ in range(fresh):
            seq.table.append(self._take())
        seq.num_published = len(hits) // self.num_groups
        seq.num_computed = seq.num_published * self.block_size
        if self.trace:
            self.trace.admit(seq, len(hits))
        return True

    def grow(self, seq: Sequence, start: int, stop: int) -> bool:
        """Make the tokens [start, stop) writable: fresh blocks at the end, and a copy of a
        part-filled block that another sample also holds (copy-on-write). Before that, blocks that
        have left their window are given back. False, and nothing else done, if too few are free.
        """
        if start >= seq.slides_at:
            self._slide(seq, start)
        table, size, groups = seq.table, self.block_size, self.num_groups
        fresh = -(-stop // size) * groups - len(table)
        first = start // size * groups
        # what holds for one group's block here holds for all: check() asserts it
        shared = first < len(table) and self.ref_count[table[first]] > 1
        if fresh <= 0 and not shared:
            return True
        if max(fresh, 0) + shared * groups > self.num_free:
            return False
        for i in range(first, first + shared * groups):
            source, target = table[i], self._take()
            self.copies.append((source, target))
            table[i] = target
            self._release(source)
            if self.trace:
                self.trace.copy(seq, i, source)
        for _ in range(fresh):
            table.append(self._take())
        if self.trace and fresh > 0:
            self.trace.allocate(seq, fresh)
        return True

    def _slide(self, seq: Sequence, start: int) -> None:
        """Give back the blocks that no token from `start` on sees; what is nearer is worth less."""
        gone, seq.slides_at = [], inf
        for group, first in enumerate(self._first_seen(start)):
            if self.windows[group] >= 0:
                leaves = self.windows[group] + (first + 1) * self.block_size
                seq.slides_at = min(seq.slides_at, leaves)
            for i in range((first - 1) * self.num_groups + group, -1, -self.num_groups):
                if not seq.table[i]:
                    break
                gone.append(seq.table[i])
                seq.table[i] = 0
                self._release(gone[-1])
        if self.trace and gone:
            self.trace.window(seq, gone)

    def shrink(self, seq: Sequence, num_tokens: int) -> None:
        """Only the first `num_tokens` count as computed, what came after them was guessed wrongly:
        blocks that hold nothing else are given back."""
        count = self.blocks_for(num_tokens)
        gone = seq.table[count:].tolist()
        del seq.table[count:]
        seq.num_computed = num_tokens
        for block in reversed(gone):
            self._release(block)
        if self.trace:
            self.trace.reject(seq, gone)

    def publish(self, seq: Sequence, num_tokens: int) -> None:
        """Let the full blocks among the first `num_tokens` be found by their hash from now on."""
        count = num_tokens // self.block_size
        if not self.enable_prefix_caching or count <= seq.num_published:
            return
        hashes, groups = self._hashes(seq, count), self.num_groups
        for i in range(seq.num_published * groups, count * groups):
            block, key = seq.table[i], hashes[i // groups] + self.marks[i % groups]
            # of two blocks with one content the first is findable; a shared block has its hash
            # already
            if block and key not in self.block_of and block not in self.hash_of:
                self.block_of[key] = block
                self.hash_of[block] = key
                if self.trace:
                    self.trace.publish(seq, block)
        seq.num_published = count

    def fork(self, seq: Sequence, sample_id: int) -> Sequence:
        """A twin of the sequence on the same blocks."""
        twin = seq.fork(sample_id)
        for block in filter(None, twin.table):
            self.ref_count[block] += 1
        if self.trace:
            self.trace.fork(seq, twin)
        return twin

    def free(self, seq: Sequence) -> None:
        """Give all blocks back, the last first: the beginning of a text is worth keeping
        longest."""
        for block in filter(None, reversed(seq.table)):
            self._release(block)
        seq.table = array("i")
        seq.num_computed = seq.num_published = seq.slides_at = 0
        if self.trace:
            self.trace.free(seq)

    def forget(self) -> None:
        """Empty the prefix cache: new weights, or a step that failed, make every K and V stale."""
        self.blank.extend(reversed(self.cached))
        self.cached.clear()
        self.hash_of.clear()
        self.block_of.clear()
        if self.trace:
            self.trace.forget()

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Assert what must always hold, given all sequences that have a table."""
        counts, texts, size = [0] * self.num_blocks, {}, self.block_size
        for seq in sequences:
            first_seen = self._first_seen(seq.num_computed)
            for entry, block in enumerate(seq.table):
                i, group = divmod(entry, self.num_groups)
                if block == 0:
                    assert i < first_seen[group], f"the next token sees entry {entry}, the sink"
                    continue
                window = self.windows[group]
                assert window < 0 or window + (i + 1) * size >= seq.slides_at, "a block stayed"
                counts[block] += 1
                if self.ref_count[block] > 1:  # or someone wrote where others read
                    text = group, seq.tokens[i * size : min((i + 1) * size, seq.num_computed)]
                    assert texts.setdefault(block, text) == text, f"block {block} has two texts"
            at = seq.num_computed // size * self.num_groups
            holders = {self.ref_count[block] for block in seq.table[at : at + self.num_groups]}
            assert len(holders) <= 1, f"some groups share what is written next: {holders}"
            assert len(seq.table) >= self.blocks_for(seq.num_computed), (
                seq.table,
                seq.num_computed,
            )
            assert seq.num_published <= seq.num_computed // self.block_size or not seq.table
        assert counts == self.ref_count, "reference counts differ from the tables"
        assert counts[0] == 0, "the sink was handed out"
        blank, cached = set(self.blank), set(self.cached)
        used = {b for b in range(1, self.num_blocks) if counts[b]}
        assert len(blank) == len(self.blank), "a block is twice in the blank list"
        assert not (blank & cached or blank & used or cached & used), "a block in two states"
        assert blank | cached | used == set(range(1, self.num_blocks)), "a block is lost"
        assert {b: h for h, b in self.block_of.items()} == self.hash_of, "hash tables differ"
        assert cached <= self.hash_of.keys() and not blank & self.hash_of.keys()


class Step(NamedTuple):
    """What one forward does, as plain data."""

    chunks: list[tuple[Sequence, int, int]]  # (sequence, start, stop), those of one token first
    samples: list[
        tuple[int, Sequence, int]
    ]  # (index into chunks, sequence, position of the new token)
    copies: list[tuple[int, int]]  # blocks to copy first
    # (index into chunks, sequence, first, stop): the positions whose next token is scored
    scored: list[tuple[int, Sequence, int, int]] = []
    # (index into chunks, index into samples, guesses): tokens at the end of a chunk that nobody
    # knows yet, and the first of the samples that decide on them
    guessed: list[tuple[int, int, list[int]]] = []


class Scheduler:
    """Decides which tokens of which sequences are computed in a step.

    There is no prefill phase and no decode phase: a sequence has tokens, some of them computed, and
    needs the rest. max_batch_size: sequences that run at once; max_batched_tokens: tokens of a
    step; victim, admission: policies.
    """

    def __init__(
        self, blocks: BlockManager, max_batch_size: int, max_batched_tokens: int,
        victim: Callable[[Scheduler, Sequence], Sequence] = youngest,
        admission: Callable[[Scheduler], Sequence] = first_come,
    ):  # fmt: skip
        self.blocks, self.victim, self.admission = blocks, victim, admission
        self.max_batch_size, self.max_batched_tokens = max_batch_size, max_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0
        self.num_guessed = self.num_accepted = 0  # tokens

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)
        if self.blocks.trace:
            self.blocks.trace.arrive(seq)

    def schedule(self) -> Step:
        """Plan the next step: running sequences first, then, if nobody had to make room, new ones.

        Commits the plan: `num_computed` moves on, a prompt that is done splits into its n samples,
        and a sequence whose last token is computed gets a placeholder for the next, ~row of
        `Step.samples`. So the next step can be planned before this one's tokens are read; `update`
        fills them in. Where tokens were guessed, there is a placeholder for each of them as well:
        what is guessed is in the step alone, and gone with it.
        """
        blocks, chunks, budget = self.blocks, [], self.max_batched_tokens
        preempted = False
        i = 0
        while i < len(self.running) and budget:
            seq = self.running[i]
            start = seq.num_computed
            stop = min(len(seq.tokens), start + budget)
            # nothing left to compute: its last token, or score, is on the way
            if start == len(seq.tokens) or len(seq.tokens) >= seq.max_length:
                i += 1
                continue
            while not blocks.grow(seq, start, stop):
                victim = self.victim(self, seq)
                if victim not in self.running:
                    raise ValueError(f"victim gave {victim!r:.80}: return one of scheduler.running")
                at = self.running.index(victim)
                self._preempt(victim)
                preempted = True
                if at < i:  # it was planned already: plan anew. what `grow` has granted stays
                    chunks, budget, i = [], self.max_batched_tokens, 0
                    break
                if victim is seq:
                    break
            else:
                chunks.append((seq, start, stop))
                budget -= stop - start
                i += 1
        seats = self.max_batch_size - sum(1 + seq.forks for seq in self.running)
        # whoever runs should be able to go on for a while before the newcomer is sent away again
        reserve = blocks.blocks_for(16 * len(self.running)) if self.running else 0
        while self.waiting and budget and not preempted:
            seq = self.admission(self)
            if seq not in self.waiting:
                raise ValueError(f"admission gave {seq!r:.80}: return one of scheduler.waiting")
            hits = blocks.match(seq)
            start = len(hits) // blocks.num_groups * blocks.block_size
            stop = min(len(seq.tokens), start + budget)
            if 1 + seq.forks > seats or not blocks.admit(seq, hits, stop, reserve):
                break
            self.waiting.remove(seq)
            self.running.append(seq)
            seq.running = True
            if seq.num_cached is None:  # re-admitted ones hit their own blocks: not counted
                seq.num_cached = start
            seats -= 1 + seq.forks
            reserve = blocks.blocks_for(16 * len(self.running))
            chunks.append((seq, start, stop))
            budget -= stop - start
            # published before it is computed: the step writes all K and V of a layer before any row
            # reads them, so equal prompts of one step share their blocks already
            blocks.publish(seq, stop)
        guesses, budget = self._guess(chunks, budget)
        if self.max_batched_tokens - budget > len(chunks):  # some are of more than one token
            chunks.sort(key=lambda c: c[2] - c[1] > 1)  # stable: one-token chunks first
        samples, scored, guessed = [], [], []
        for index, (seq, start, stop) in enumerate(chunks):
            seq.num_computed = stop
            if stop // blocks.block_size > seq.num_published:
                blocks.publish(seq, min(stop, seq.num_known))
            if seq.targets is not None:
                if stop >= seq.num_prompt:
                    scored.append((index, seq, max(start, seq.num_prompt - 1), stop))
            elif stop >= len(seq.tokens):
                group = [seq]
                if seq in guesses:
                    guessed.append((index, len(samples), guesses[seq]))
                if seq.forks:
                    group += [blocks.fork(seq, k) for k in range(1, 1 + seq.forks)]
                    self.running += group[1:]
                    seq.forks = 0
                for s in group:
                    for position in range(len(s.tokens), stop + 1):  # one, if nothing is guessed
                        s.tokens.append(~len(samples))
                        samples.append((index, s, position))
        copies, blocks.copies = blocks.copies, []
        if blocks.trace and chunks:
            blocks.trace.begin(chunks)
        return Step(chunks, samples, copies, scored, guessed)

    def _guess(
        self, chunks: list[tuple[Sequence, int, int]], budget: int
    ) -> tuple[dict[Sequence, list[int]], int]:
        """Let sequences that decode guess what comes next, and make their chunks longer by it; only
        in a step of few rows, and in blocks that nobody else wants. Returns the guesses, and what
        is left of the token budget."""
        guesses: dict[Sequence, list[int]] = {}
        rows = self.max_batched_tokens - budget
        able = [
            i
            for i, (seq, start, stop) in enumerate(chunks if rows < FEW_ROWS else ())
            if seq.lookup and stop - start == 1 and stop == len(seq.tokens) and not seq.forks
        ]
        room = min(FEW_ROWS - rows, budget)
        for left, i in zip(range(len(able), 0, -1), able, strict=True):
            seq, start, stop = chunks[i]
            most = min(room // left, seq.max_length - 1 - stop)  # the last is never fed back
            found = seq.lookup.guess(seq.tokens, most) if most > 0 else []
            if found and self.blocks.grow(seq, start, stop + len(found)):
                guesses[seq] = found
                chunks[i] = seq, start, stop + len(found)
                room -= len(found)
                budget -= len(found)
        return guesses, budget

    def update(
        self, step: Step, token_ids: list[int], scores: Iterable[float] = ()
    ) -> list[Sequence]:
        """Write the step's results into their sequences and end those that are done.

        token_ids: one per entry of step.samples; scores: one per position in step.scored. Returns
        the sequences that got a token or are done.
        """
        for guess in step.guessed:
            self._compare(step, *guess, token_ids)
        changed = []
        for (_, seq, position), token in zip(step.samples, token_ids, strict=True):
            # it ended, or a tool wrote this token, while the step was under way, or a guess before
            # it was wrong
            if seq.finish_reason or position >= len(seq.tokens) or seq.tokens[position] >= 0:
                continue
            if not changed or changed[-1] is not seq:
                changed.append(seq)
            if token < 0:  # the filters left nothing to draw
                self.finish(seq, "error")
                continue
            seq.tokens[position] = token
            if token in seq.stop_ids:
                self.finish(seq, "stop")
            elif position + 1 >= seq.max_length:
                self.finish(seq, "length")
        scores = iter(scores)
        for _, seq, first, stop in step.scored:
            at = first - (seq.num_prompt - 1)  # position p scores target p - num_prompt + 1
            seq.scores[at : at + stop - first] = islice(scores, stop - first)
            if stop == len(seq.tokens) and not seq.finish_reason:
                changed.append(seq)
                self.finish(seq, "length")
        if self.blocks.trace and step.chunks:
            self.blocks.trace.tokens(changed)
        return changed

    def _compare(
        self, step: Step, index: int, row: int, guesses: list[int], token_ids: list[int]
    ) -> None:
        """Cut a sequence off behind the first token that was guessed wrongly.

        Nothing has to be drawn again for the text to be as likely as without guesses: a token is a
        function of its logits and of the noise of its position, so the one that stands here is the
        one that would have been drawn alone. In the usual scheme (Leviathan et al. 2023) a guess
        that is made without a doubt is kept with the probability that the model gives it, and else
        replaced by a draw among all others: here too, with the same noise for both.
        """
        seq, start, _ = step.chunks[index]
        if seq.finish_reason:
            return
        pairs = zip(guesses, token_ids[row : row + len(guesses)], strict=True)
        accepted = next((i for i, (a, b) in enumerate(pairs) if a != b), len(guesses))
        self.num_guessed += len(guesses)
        self.num_accepted += accepted
        seq.lookup.learn(len(guesses), accepted)
        if accepted < len(guesses):
            last = start + 1 + accepted  # where the first token is that differs
            del seq.tokens[last + 1 :]
            self.blocks.shrink(seq, last)

    def force(self, seq: Sequence, token_ids: list[int]) -> int:
        """Continue a sequence with tokens that nobody samples, as far as its length allows; they
        are computed like a chunk of prompt. Returns how many there was room for."""
        del seq.tokens[seq.num_known :]  # a sampled one may be on its way: `update` will drop it
        token_ids = token_ids[: seq.max_length - len(seq.tokens)]
        seq.tokens.extend(token_ids)
        if self.blocks.trace:
            self.blocks.trace.force(seq)
        if len(seq.tokens) == seq.max_length:
            self.finish(seq, "length")
        return len(token_ids)

    def finish(self, seq: Sequence, reason: str) -> None:
        """End a sequence and free its blocks; tokens not yet known are cut off."""
        seq.finish_reason = reason
        del seq.tokens[seq.num_known :]
        if seq.running:
            self.blocks.publish(seq, min(seq.num_computed, len(seq.tokens)))
            self.blocks.free(seq)
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        seq.running = False
        if self.blocks.trace:
            self.blocks.trace.finish(seq)

    def abort(self, *request_ids: int) -> list[Sequence]:
        """End all samples of these requests, wherever they are, in one walk over the queue."""
        gone = set(request_ids)
        victims = [s for s in chain(self.running, self.waiting) if s.request_id in gone]
        self.waiting = deque(s for s in self.waiting if s.request_id not in gone)
        for seq in victims:
            self.finish(seq, "abort")
        return victims

    def reset(self) -> None:
        """After a step that failed: send everyone back to the queue with all known tokens, forget
        all K and V."""
        while self.running:
            self._preempt(self.running[-1])
        for seq in self.waiting:  # also those whom the failed step had just sent away, or let in
            del seq.tokens[seq.num_known :]
            self.blocks.free(seq)
        self.blocks.copies.clear()
        if self.blocks.trace:
            self.blocks.trace.reset()
        self.blocks.forget()

    def _preempt(self, seq: Sequence) -> None:
        """Take a running sequence's blocks away; it keeps its tokens and is first in the queue."""
        self.running.remove(seq)
        self.blocks.free(seq)
        # a block it has just got for a copy is free again, and may be the next one's for another
        self.blocks.copies = [c for c in self.blocks.copies if self.blocks.ref_count[c[1]]]
        seq.running = False
        self.waiting.appendleft(seq)
        self.num_preemptions += 1
        if self.blocks.trace:
            self.blocks.trace.preempt(seq)
