"""The story of a request: how prompts become tokens through a paged KV cache.

    LLM.generate -> Scheduler.schedule -> make_batch -> GPT.forward -> sample -> Scheduler.update ->
    ...

The order below is the order of the story. A Sequence owns tokens and a block table; the
BlockManager hands out blocks, shares them by hash and takes them back; the Scheduler decides who
runs in a step; the PagedKVCache holds the numbers. Sequence, BlockManager and Scheduler are plain
Python and import no torch of their own: they decide, tensors obey. The paper is Kwon et al.,
"Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023.
"""

from __future__ import annotations

import logging
import random
import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from .checkpoint import (
    find_nanochat,
    find_tokenizer,
    free_memory,
    load_model,
    pick_device,
)
from .model import GPTConfig
from .sampler import SamplingParams, check_int, noise, sample
from .tokenizer import load_tokenizer

log = logging.getLogger("microvllm")

UNKNOWN = -1  # a token that has been scheduled and not yet been sampled


class Sequence:
    """One sample of one request: its tokens, how many of them are computed, and its block table."""

    __slots__ = (
        "request_id", "sample_id", "params", "tokens", "num_prompt", "max_length", "num_computed",
        "num_cached", "table", "hashes", "num_published", "stop_ids", "running", "finish_reason",
        "forks",
    )  # fmt: skip

    def __init__(
        self,
        request_id: int,
        prompt: list[int],
        params: SamplingParams,
        max_length=None,
        stop_ids=(),
    ):
        self.request_id = request_id
        self.sample_id = 0  # which of the request's n samples
        self.params = params
        self.tokens = list(
            prompt
        )  # prompt and output; the last may be UNKNOWN while it is computed
        self.num_prompt = len(prompt)
        self.max_length = (
            max_length or self.num_prompt + params.max_tokens
        )  # it ends at so many tokens
        self.num_computed = 0  # tokens whose K and V are in the cache (or will be after this step)
        self.num_cached: int | None = (
            None  # prompt tokens that the prefix cache served, once admitted
        )
        self.table = array(
            "i"
        )  # block of tokens [0, block_size), of [block_size, 2 block_size), ...
        self.hashes: list[bytes] = []  # of the full blocks, each chained over its predecessors
        self.num_published = 0  # blocks of the table that the prefix cache was told of
        self.stop_ids = stop_ids  # tokens that end the sequence
        self.running = False
        self.finish_reason: str | None = None  # "stop", "length" or "abort" once it is over
        self.forks = params.n - 1  # samples that will split off when the prompt is computed

    @property
    def num_known(self) -> int:
        """Tokens whose value is known: all, but for one that is being computed."""
        return len(self.tokens) - (self.tokens[-1] == UNKNOWN)

    def fork(self, sample_id: int) -> Sequence:
        """Another sample: the same tokens and the same blocks (the caller counts them)."""
        twin = Sequence(self.request_id, [], self.params, self.max_length, self.stop_ids)
        twin.sample_id, twin.forks, twin.running = sample_id, 0, self.running
        twin.tokens, twin.num_prompt = self.tokens.copy(), self.num_prompt
        twin.num_computed, twin.num_cached = self.num_computed, self.num_cached
        twin.table, twin.hashes = self.table[:], self.hashes.copy()
        twin.num_published = self.num_published
        return twin


class BlockManager:
    """Hands out the blocks of the pool, shares them between sequences, and finds them again by
    content.

    num_blocks: blocks in the pool, of which block 0 is a sink for padding and never handed out;
    block_size: tokens in a block. Every other block is in exactly one of three states:

        blank       free, nothing worth keeping          blank
        cached      free, still findable by its hash     cached, oldest first: the next to be
        evicted in use      in ref_count[block] tables           ref_count[block] >= 1
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.enable_prefix_caching = enable_prefix_caching
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

    @property
    def num_free(self) -> int:
        return len(self.blank) + len(self.cached)

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1  # without the sink

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _take(self) -> int:
        """A free block, blank if there is one, else the one least recently used."""
        if self.blank:
            block = self.blank.pop()
        else:
            block, _ = self.cached.popitem(last=False)
            del self.block_of[self.hash_of.pop(block)]
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
        """The blocks that already hold the sequence's beginning. Never its last token: its logits
        are needed."""
        hits: list[int] = []
        if self.enable_prefix_caching:
            count = (len(seq.tokens) - 1) // self.block_size
            for h in self._hashes(seq, count)[:count]:
                block = self.block_of.get(h)
                if block is None:
                    break
                hits.append(block)
        return hits

    def admit(self, seq: Sequence, hits: list[int], stop: int, reserve: int = 0) -> bool:
        """Give a new sequence its hits and fresh blocks up to token `stop`. False, and nothing
        done, if that would leave fewer than `reserve` free blocks."""
        fresh = self.blocks_for(stop) - len(hits)
        free_hits = sum(self.ref_count[b] == 0 for b in hits)
        if self.num_free - free_hits - fresh < reserve:
            return False
        for block in hits:
            if self.ref_count[block] == 0:
                del self.cached[block]
            self.ref_count[block] += 1
        seq.table.extend(hits)
        seq.table.extend([self._take() for _ in range(fresh)])
        seq.num_computed = len(hits) * self.block_size
        seq.num_published = len(hits)
        return True

    def grow(self, seq: Sequence, start: int, stop: int) -> bool:
        """Make the tokens [start, stop) writable: fresh blocks at the end, and a copy of a
        part-filled block that another sample also holds (copy-on-write). False, and nothing done,
        if too few are free.
        """
        fresh = -(-stop // self.block_size) - len(seq.table)
        first = start // self.block_size
        shared = first < len(seq.table) and self.ref_count[seq.table[first]] > 1
        if fresh <= 0 and not shared:
            return True
        if max(fresh, 0) + shared > self.num_free:
            return False
        if shared:
            source, target = seq.table[first], self._take()
            self.copies.append((source, target))
            seq.table[first] = target
            self._release(source)
        for _ in range(fresh):
            seq.table.append(self._take())
        return True

    def publish(self, seq: Sequence, num_tokens: int) -> None:
        """Let the full blocks among the first `num_tokens` be found by their hash from now on."""
        count = num_tokens // self.block_size
        if not self.enable_prefix_caching or count <= seq.num_published:
            return
        hashes = self._hashes(seq, count)
        for i in range(seq.num_published, count):
            # of two blocks with one content the first is findable; a shared block has its hash
            # already
            if hashes[i] not in self.block_of and seq.table[i] not in self.hash_of:
                self.block_of[hashes[i]] = seq.table[i]
                self.hash_of[seq.table[i]] = hashes[i]
        seq.num_published = count

    def fork(self, seq: Sequence, sample_id: int) -> Sequence:
        """A twin of the sequence on the same blocks."""
        twin = seq.fork(sample_id)
        for block in twin.table:
            self.ref_count[block] += 1
        return twin

    def free(self, seq: Sequence) -> None:
        """Give all blocks back, the last first: the beginning of a text is worth keeping
        longest."""
        for block in reversed(seq.table):
            self._release(block)
        seq.table = array("i")
        seq.num_computed = seq.num_published = 0

    def forget(self) -> None:
        """Empty the prefix cache: new weights, or a step that failed, make every K and V stale."""
        self.blank.extend(reversed(self.cached))
        self.cached.clear()
        self.hash_of.clear()
        self.block_of.clear()

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Assert what must always hold, given all sequences that have a table."""
        counts = [0] * self.num_blocks
        for seq in sequences:
            for block in seq.table:
                counts[block] += 1
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


class Scheduler:
    """Decides which tokens of which sequences are computed in a step.

    There is no prefill phase and no decode phase: a sequence has tokens, some of them computed, and
    needs the rest. max_batch_size: sequences that run at once; max_batched_tokens: tokens of a
    step.
    """

    def __init__(self, blocks: BlockManager, max_batch_size: int, max_batched_tokens: int):
        self.blocks = blocks
        self.max_batch_size, self.max_batched_tokens = max_batch_size, max_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def schedule(self) -> Step:
        """Plan the next step: running sequences first, then, if nobody had to make room, new ones.

        Commits the plan: `num_computed` moves on, a sequence whose last token is computed gets an
        UNKNOWN one, and a prompt that is done splits into its n samples. `update` fills in the
        tokens.
        """
        blocks, chunks, budget = self.blocks, [], self.max_batched_tokens
        preempted = False
        i = 0
        while i < len(self.running) and budget:
            seq = self.running[i]
            start = seq.num_computed
            stop = min(len(seq.tokens), start + budget)
            if len(seq.tokens) >= seq.max_length:  # its last token is on the way
                i += 1
                continue
            while not blocks.grow(seq, start, stop):
                victim = self.running[-1]  # the youngest: the oldest has waited longest
                self._preempt(victim)
                preempted = True
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
            seq = self.waiting[0]
            hits = blocks.match(seq)
            start = len(hits) * blocks.block_size
            stop = min(len(seq.tokens), start + budget)
            if 1 + seq.forks > seats or not blocks.admit(seq, hits, stop, reserve):
                break
            self.waiting.popleft()
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
        chunks.sort(key=lambda c: c[2] - c[1] > 1)  # stable: one-token chunks first
        samples = []
        for index, (seq, _, stop) in enumerate(chunks):
            seq.num_computed = stop
            blocks.publish(seq, min(stop, seq.num_known))
            if stop == len(seq.tokens):
                twins = [blocks.fork(seq, k) for k in range(1, 1 + seq.forks)]
                self.running.extend(twins)
                seq.forks = 0
                for s in (seq, *twins):
                    samples.append((index, s, stop))
                    s.tokens.append(UNKNOWN)
        copies, blocks.copies = blocks.copies, []
        return Step(chunks, samples, copies)

    def update(self, step: Step, token_ids: list[int]) -> list[Sequence]:
        """Write the step's tokens into their sequences and end those that are done.

        token_ids: one per entry of step.samples. Returns the sequences that got a token.
        """
        changed = []
        for (_, seq, position), token in zip(step.samples, token_ids, strict=True):
            if seq.finish_reason:  # ended while this step was under way: its token is dropped
                continue
            seq.tokens[position] = token
            changed.append(seq)
            if token in seq.stop_ids:
                self.finish(seq, "stop")
            elif position + 1 >= seq.max_length:
                self.finish(seq, "length")
        return changed

    def finish(self, seq: Sequence, reason: str) -> None:
        """End a sequence and free its blocks; tokens not yet known are cut off."""
        seq.finish_reason = reason
        if UNKNOWN in seq.tokens[-2:]:
            del seq.tokens[seq.tokens.index(UNKNOWN, len(seq.tokens) - 2) :]
        if seq.running:
            self.blocks.publish(seq, min(seq.num_computed, len(seq.tokens)))
            self.blocks.free(seq)
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        seq.running = False

    def abort(self, request_id: int) -> list[Sequence]:
        """End all samples of a request, wherever they are."""
        victims = [s for s in chain(self.running, self.waiting) if s.request_id == request_id]
        for seq in victims:
            self.finish(seq, "abort")
        return victims

    def reset(self) -> None:
        """After a step that failed: send everyone back to the queue with all known tokens, forget
        all K and V."""
        while self.running:
            seq = self.running[-1]
            if seq.tokens[-1] == UNKNOWN:
                del seq.tokens[-1]
            self._preempt(seq)
        self.blocks.copies.clear()
        self.blocks.forget()

    def _preempt(self, seq: Sequence) -> None:
        """Take the last running sequence's blocks away; it keeps its tokens and is first in the
        queue."""
        assert self.running.pop() is seq
        self.blocks.free(seq)
        seq.running = False
        self.waiting.appendleft(seq)
        self.num_preemptions += 1


class PagedKVCache:
    """K and V of all layers in one allocation, cut into blocks.

    Inside a block the order is [kv_head, slot, dim]: one head's keys of a block are contiguous,
    which a CPU reads a quarter faster than [slot, kv_head, dim]; a GPU does not mind. Zeroed, since
    a masked score of 0 times a NaN left in an unused slot would be NaN.
    """

    def __init__(self, config: GPTConfig, num_blocks: int, block_size: int, dtype, device):
        shape = (config.n_layer, 2, num_blocks, config.n_kv_head, block_size, config.head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.num_blocks, self.block_size = num_blocks, block_size
        self.layers = [(kv[0], kv[1]) for kv in self.data]

    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        """k, v of layer i, each (num_blocks, n_kv_head, block_size, head_dim)."""
        return self.layers[i]

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """(source, destination) pairs, all layers at once."""
        source, target = torch.tensor(copies, device=self.data.device).T
        self.data[:, :, target] = self.data[:, :, source]


class SequenceKVView:
    """The logical picture of one sequence: its K and V in order, wherever its blocks lie."""

    def __init__(self, cache: PagedKVCache, table: Iterable[int], num_tokens: int):
        self.cache, self.table, self.num_tokens = cache, list(table), num_tokens

    def slots(self, start: int = 0, stop: int | None = None) -> list[int]:
        """Physical slots (block * block_size + offset) of the tokens [start, stop)."""
        size = self.cache.block_size
        stop = self.num_tokens if stop is None else stop
        return [self.table[p // size] * size + p % size for p in range(start, stop)]

    def gather(self, layer: int) -> tuple[Tensor, Tensor]:
        """k and v of one layer, each (num_tokens, n_kv_head, head_dim), copied out of the
        blocks."""
        return tuple(
            x[self.table].transpose(1, 2).flatten(0, 1)[: self.num_tokens]
            for x in self.cache.layer(layer)
        )


class Batch(NamedTuple):
    """A step as tensors, all on the device: T rows (tokens) of B sequences, R of them sampled."""

    ids: Tensor  # (T,) int32 token ids; sequences with one row first
    prev_ids: Tensor  # (T,) int32 the id one position earlier (0 at position 0), for the smear
    positions: Tensor  # (T,) int32
    slots: Tensor  # (T,) int32 block * block_size + offset, where K and V of the row go
    cu_seqlens: Tensor  # (B + 1,) int32 first row of each sequence
    seq_lens: Tensor  # (B,) int32 tokens of each sequence in the cache after this step
    block_tables: Tensor  # (B, M) int32, unused columns are 0, the sink
    logit_rows: Tensor  # (R,) int32 rows that reach the head; one row may serve several samples
    temperature: Tensor  # (R,) float32
    noise: Tensor  # (R,) float32 in [0, 1)
    num_decodes: int  # the first so many sequences have one row each
    max_query: int  # rows of the longest sequence
    max_seq: int  # largest of seq_lens


def make_batch(step: Step, block_size: int, device: torch.device) -> Batch:
    """Turn a plan into tensors. Everything is one int32 array on the host and one upload."""
    seqs = [seq for seq, _, _ in step.chunks]
    starts = np.array([start for _, start, _ in step.chunks], np.int32)
    stops = np.array([stop for _, _, stop in step.chunks], np.int32)
    rows = stops - starts
    num_seqs, num_rows, max_seq = len(seqs), int(rows.sum()), int(stops.max())
    cu_seqlens = np.zeros(num_seqs + 1, np.int32)
    np.cumsum(rows, out=cu_seqlens[1:])
    firsts = cu_seqlens[:-1]
    owner = np.repeat(np.arange(num_seqs), rows)
    positions = (np.arange(num_rows, dtype=np.int32) - firsts[owner]) + starts[owner]
    ids = np.fromiter(
        chain.from_iterable([seq.tokens[start:stop] for seq, start, stop in step.chunks]),
        np.int32,
        num_rows,
    )
    prev_ids = np.empty_like(ids)
    prev_ids[1:] = ids[:-1]
    prev_ids[firsts] = [seq.tokens[start - 1] if start else 0 for seq, start, _ in step.chunks]
    # tables are of unequal length: laid end to end, then dealt out to the rows of a padded matrix
    lengths = np.array([len(seq.table) for seq in seqs])
    tables = np.zeros((num_seqs, int(lengths.max())), np.int32)
    tables[np.arange(tables.shape[1]) < lengths[:, None]] = np.frombuffer(
        b"".join([seq.table for seq in seqs]), np.int32
    )
    slots = tables[owner, positions // block_size] * block_size + positions % block_size
    logit_rows = [cu_seqlens[index + 1] - 1 for index, _, _ in step.samples]
    params = [seq.params for _, seq, _ in step.samples]
    temperature = np.array([p.temperature for p in params], np.float32)
    u = noise(
        [p.seed for p in params],
        [s.sample_id for _, s, _ in step.samples],
        [p for _, _, p in step.samples],
    )
    parts = [ids, prev_ids, positions, slots, cu_seqlens, stops, tables.ravel()]
    parts += [np.array(logit_rows, np.int32), temperature.view(np.int32), u.view(np.int32)]
    flat = torch.from_numpy(np.concatenate(parts, dtype=np.int32)).to(device, non_blocking=True)
    tensors = list(flat.split([len(part) for part in parts]))
    tensors[6] = tensors[6].view(tables.shape)
    tensors[8:] = [t.view(torch.float32) for t in tensors[8:]]
    return Batch(*tensors, int((rows == 1).sum()), int(rows.max()), max_seq)


class RequestOutput(dict):
    """What became of a request; reads as a dict, and its keys as attributes too.

    text (special tokens not shown), token_ids (as generated, with the stop token if it ended
    there), prompt_token_ids, finish_reason ("stop" | "length" | "abort"), stop_reason (the stop
    token's id, or which limit was met), num_cached_tokens, request_id, and samples: a dict of text,
    token_ids, finish_reason and stop_reason for each of the n samples, the first of which is also
    at the top level.
    """

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class LLM:
    """A nanochat model ready to generate.

    model_path: directory with model_<step>.pt and meta_<step>.json; step: None is the last one;
    tokenizer_path: directory or tokenizer.pkl, by default looked for next to the model and in
    nanochat's base directory; device: "auto" is cuda, then mps, then cpu; num_blocks, block_size:
    the KV pool, by default what memory allows, in blocks of 16 tokens; max_batch_size: sequences
    that run at once; dtype: "auto" is float32 on a CPU and bfloat16 on CUDA; max_batched_tokens:
    tokens of one step; max_model_len: prompt plus output of a request, by default the checkpoint's
    context, at most ten times that; attention: a backend of attention.py; seed: of requests that
    bring none; any constant of model.Recipe may be overridden by name (softcap=20 for a checkpoint
    of era 3b).

    Raises FileNotFoundError, ValueError or TypeError, naming what is wrong and what to do.
    """

    def __init__(
        self, model_path, step=None, tokenizer_path=None, device="auto", num_blocks=None,
        block_size=16, max_batch_size=None, *, dtype="auto", max_batched_tokens=None,
        max_model_len=None, enable_prefix_caching=True, attention="auto", seed=0, **overrides,
    ):  # fmt: skip
        check_int("block_size", block_size, 1)
        check_int("seed", seed, 0)
        check_optional = {"num_blocks": (num_blocks, 2), "max_model_len": (max_model_len, 2)}
        check_optional["max_batch_size"] = (max_batch_size, 1)
        check_optional["max_batched_tokens"] = (max_batched_tokens, 1)
        for name, (value, least) in check_optional.items():
            if value is not None:
                check_int(name, value, least)
        self.device = pick_device(device)
        cuda = self.device.type == "cuda"
        self.model = load_model(
            model_path,
            step,
            self.device,
            dtype,
            attention=attention,
            max_len=max_model_len,
            **overrides,
        )
        config = self.model.config
        self.tokenizer = load_tokenizer(find_tokenizer(model_path, tokenizer_path))
        if self.tokenizer.vocab_size != config.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens and the model "
                f"{config.vocab_size}: "
                "they do not belong together; give tokenizer_path"
            )
        self.max_model_len = max_model_len or config.sequence_len
        self.max_batch_size = max_batch_size or (512 if cuda else 256)
        self.max_batched_tokens = max_batched_tokens or (8192 if cuda else 1024)
        block_bytes = 2 * config.n_layer * config.n_kv_head * block_size * config.head_dim
        block_bytes *= self.model.dtype.itemsize
        if num_blocks is None:
            # all the sequences that may run at once, at full length; as much of that as memory
            # allows
            wanted = self.max_batch_size * -(-self.max_model_len // block_size) + 1
            num_blocks = min(
                wanted, int(free_memory(self.device) * (0.9 if cuda else 0.5)) // block_bytes
            )
            if num_blocks < 2:
                raise ValueError(f"no memory for a KV cache: a block takes {block_bytes:,} bytes")
        self.cache = PagedKVCache(config, num_blocks, block_size, self.model.dtype, self.device)
        blocks = BlockManager(num_blocks, block_size, enable_prefix_caching)
        self.scheduler = Scheduler(blocks, self.max_batch_size, self.max_batched_tokens)
        self._seeds = random.Random(seed)
        self._next_id = 0
        self._requests: dict[
            int, list[Sequence]
        ] = {}  # the finished samples of unfinished requests
        self._finished: list[RequestOutput] = []  # outputs that no step() has returned yet
        self._stats = dict.fromkeys(
            (
                "prompt_tokens",
                "output_tokens",
                "cached_tokens",
                "prefill_tokens",
                "steps",
                "peak_blocks",
            ),
            0,
        )
        self._stats.update(prefill_seconds=0.0, decode_seconds=0.0)
        log.info(
            "%s: era %s, %d layers, %s on %s; %d blocks of %d tokens (%.1f MB)", model_path,
            self.model.recipe.era, config.n_layer, str(self.model.dtype)[6:], self.device,
            num_blocks, block_size, num_blocks * block_bytes / 1e6,
        )  # fmt: skip

    @classmethod
    def from_nanochat(
        cls, source: str = "sft", model_tag: str | None = None, step: int | None = None, **kwargs
    ):
        """Find a checkpoint the way nanochat lays them out under $NANOCHAT_BASE_DIR
        (~/.cache/nanochat).

        source: "base", "mid", "sft" or "rl"; model_tag: by default the largest d<number>, else the
        newest.
        """
        path, base = find_nanochat(source, model_tag)
        kwargs.setdefault("tokenizer_path", base / "tokenizer")
        return cls(path, step, **kwargs)

    # requests ------------------------------------------------------------------------------------

    def generate(self, prompts, sampling_params=None, use_tqdm: bool = True) -> list[RequestOutput]:
        """Complete the prompts: one string, or a list of strings and lists of token ids.

        sampling_params: one SamplingParams for all, or a list with one per prompt. Returns one
        RequestOutput per prompt, in order. A bad prompt is refused before any work is done.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        if not isinstance(prompts, (list, tuple)):
            raise TypeError(f"prompts must be a string or a list, got {type(prompts).__name__}")
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if not isinstance(sampling_params, (list, tuple)):
            raise TypeError(
                f"sampling_params must be SamplingParams or a list, got {sampling_params!r:.80}"
            )
        if len(sampling_params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(sampling_params)} sampling_params")
        checked = []
        for i, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
            try:
                checked.append(self._check(prompt, params))
            except (TypeError, ValueError) as error:
                raise type(error)(f"prompts[{i}]: {error}") from None
        ids = [self._add(*request) for request in checked]
        outputs: dict[int, RequestOutput] = {}
        strangers = []  # requests of add_request that finish meanwhile: kept for the next step()
        wanted = set(ids)
        bar = None
        if use_tqdm and ids:
            from tqdm import tqdm

            bar = tqdm(
                total=len(ids), desc="generating", unit="prompt", disable=None
            )  # None: only on a terminal
        began, first = time.perf_counter(), self._stats["output_tokens"]
        try:
            while len(outputs) < len(ids):
                for output in self.step():
                    if output["request_id"] in wanted:
                        outputs[output["request_id"]] = output
                        if bar is not None:
                            bar.update()
                    else:
                        strangers.append(output)
                if bar is not None:
                    rate = (self._stats["output_tokens"] - first) / (time.perf_counter() - began)
                    bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        except BaseException:
            for request_id in wanted - outputs.keys():
                self.abort(request_id)
            self._finished = [o for o in self._finished if o["request_id"] not in wanted]
            raise
        finally:
            self._finished[:0] = strangers
            if bar is not None:
                bar.close()
        return [outputs[request_id] for request_id in ids]

    def add_request(self, prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queue one prompt (a string or token ids) and return the id its output will carry."""
        return self._add(*self._check(prompt, sampling_params))

    def abort(self, request_id: int) -> None:
        """End a request now, wherever it is; its output says "abort". Unknown ids are ignored."""
        if request_id in self._requests:
            for seq in self.scheduler.abort(request_id):
                self._requests[request_id].append(seq)
            self._finish(request_id)

    def is_finished(self) -> bool:
        """True when no request is queued or running and every output was returned by step()."""
        return not self._requests and not self._finished

    def _check(self, prompt, params: SamplingParams | None) -> tuple[list[int], SamplingParams]:
        """Token ids and params of a request. Raises TypeError or ValueError if it can never be
        served."""
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(
                f"sampling_params must be a SamplingParams, got {type(params).__name__}"
            )
        vocab = self.model.config.vocab_size
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, bos=True)
        elif isinstance(prompt, (list, tuple, np.ndarray)):
            ids = list(prompt)
            for token in ids:
                if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
                    raise TypeError(f"a prompt of token ids must hold integers, got {token!r:.80}")
                if not 0 <= token < vocab:
                    raise ValueError(f"token id {token} is outside the vocabulary of {vocab}")
            ids = [int(token) for token in ids]
            if not ids:
                raise ValueError(
                    "a prompt of token ids needs at least one (the text '' is BOS alone)"
                )
        else:
            raise TypeError(
                f"a prompt is a string or a list of token ids, got {type(prompt).__name__}"
            )
        if bad := [t for t in params.stop_token_ids if not 0 <= t < vocab]:
            raise ValueError(f"stop_token_ids {bad} are outside the vocabulary of {vocab}")
        if params.n > self.max_batch_size:
            raise ValueError(
                f"n={params.n} samples do not fit max_batch_size={self.max_batch_size}"
            )
        if len(ids) >= self.max_model_len:
            limit = 10 * self.model.config.sequence_len
            raise ValueError(
                f"the prompt has {len(ids)} tokens and max_model_len is {self.max_model_len}: "
                f"{len(ids) + 1 - self.max_model_len} too many (it may be raised to {limit})"
            )
        blocks = self.scheduler.blocks
        # the last token is never fed back, so it needs no slot
        slots = min(len(ids) + params.max_tokens, self.max_model_len) - 1
        if (need := blocks.blocks_for(slots)) > blocks.num_usable:
            room = blocks.num_usable * blocks.block_size
            raise ValueError(
                f"{len(ids)} prompt tokens with max_tokens={params.max_tokens} need {need} blocks "
                f"and the pool has {blocks.num_usable}: {slots - room} tokens too many; raise "
                "num_blocks or lower max_tokens"
            )
        return ids, params

    def _add(self, ids: list[int], params: SamplingParams) -> int:
        request_id, self._next_id = self._next_id, self._next_id + 1
        if params.seed is None:
            params = replace(params, seed=self._seeds.getrandbits(63))
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self.tokenizer.eos_ids
        max_length = min(len(ids) + params.max_tokens, self.max_model_len)
        self.scheduler.add(Sequence(request_id, ids, params, max_length, stop_ids))
        self._requests[request_id] = []
        self._stats["prompt_tokens"] += len(ids)
        return request_id

    # the loop ------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Run the model once over whatever is due; returns the requests that finished."""
        scheduler = self.scheduler
        if scheduler.waiting or scheduler.running:
            began = time.perf_counter()
            plan = scheduler.schedule()
            try:
                batch = make_batch(plan, self.cache.block_size, self.device)
                if plan.copies:
                    self.cache.copy_blocks(plan.copies)
                h = self.model.forward(batch, self.cache)
                token_ids = []
                if plan.samples:
                    params = [seq.params for _, seq, _ in plan.samples]
                    logits = self.model.head(h)
                    token_ids = sample(logits, params, batch.temperature, batch.noise).tolist()
            except BaseException:
                scheduler.reset()
                raise
            changed = scheduler.update(plan, token_ids)
            self._count(plan, batch, len(changed), time.perf_counter() - began)
            for seq in changed:
                if seq.finish_reason:
                    self._requests[seq.request_id].append(seq)
                    if len(self._requests[seq.request_id]) == seq.params.n:
                        self._finish(seq.request_id)
        finished, self._finished = self._finished, []
        return finished

    def _count(self, plan: Step, batch: Batch, new_tokens: int, seconds: float) -> None:
        """Keep the books. A step with any prompt chunk in it counts as prefill."""
        stats, blocks = self._stats, self.scheduler.blocks
        stats["steps"] += 1
        stats["output_tokens"] += new_tokens
        prefill = sum(
            min(stop, s.num_prompt) - start
            for s, start, stop in plan.chunks
            if start < s.num_prompt
        )
        stats["prefill_tokens"] += prefill
        stats["prefill_seconds" if prefill else "decode_seconds"] += seconds
        stats["peak_blocks"] = max(stats["peak_blocks"], blocks.num_usable - blocks.num_free)

    def _finish(self, request_id: int) -> None:
        """Turn a request's finished samples into its output."""
        seqs = sorted(self._requests.pop(request_id), key=lambda s: s.sample_id)
        samples = []
        for seq in seqs:
            token_ids = seq.tokens[seq.num_prompt :]
            reason = None
            if seq.finish_reason == "stop":
                reason = token_ids[-1]
            elif seq.finish_reason == "length":
                full = len(token_ids) == seq.params.max_tokens
                reason = "max_tokens" if full else "max_model_len"
            samples.append(
                {
                    "text": self.tokenizer.decode(token_ids, skip_special=True),
                    "token_ids": token_ids,
                    "finish_reason": seq.finish_reason,
                    "stop_reason": reason,
                }
            )
        cached = seqs[0].num_cached or 0
        self._stats["cached_tokens"] += cached
        self._finished.append(
            RequestOutput(
                samples[0],
                request_id=request_id,
                prompt_token_ids=seqs[0].tokens[: seqs[0].num_prompt],
                num_cached_tokens=cached,
                samples=samples,
            )
        )

    def stats(self) -> dict:
        """Counters since the start: tokens, seconds, preemptions, and the pool as it is now.

        prompt_tokens asked, output_tokens made, cached_tokens of prompts that the prefix cache
        served (of finished requests), prefill_tokens computed (again after a preemption), steps,
        preemptions, prefill_seconds (steps with any prompt token in them), decode_seconds (the
        others), peak_blocks in use, num_blocks and free_blocks (without the sink), block_size,
        running, waiting.
        """
        blocks = self.scheduler.blocks
        return {
            **self._stats,
            "preemptions": self.scheduler.num_preemptions,
            "num_blocks": blocks.num_usable,
            "free_blocks": blocks.num_free,
            "block_size": blocks.block_size,
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
        }

    def close(self) -> None:
        """Drop the weights and the cache; whatever is unfinished is aborted."""
        for request_id in list(self._requests):
            self.abort(request_id)
        self.model = self.cache = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_) -> None:
        self.close()
