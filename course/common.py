"""Code that all ten steps share: how to call the model, and attention.

A step has a function `serve(model, requests, meter)` that answers requests. It calls the model:

    logits = model(chunks, attend)      chunks: [(tokens, start, stop), ...]

This computes the tokens [start, stop) of each text, all as rows of one matrix. T rows, C channels,
D = head_dim, H query heads, Hkv key and value heads, B chunks, V tokens in the vocabulary.
Attention is the only part where a row needs other rows. The model calls the step's function for it:

    attend(layer, q, k, v) -> (T, H, D)         q (T, H, D); k, v (T, Hkv, D), of these rows

The step decides where to keep the K and V of earlier tokens. The course is about this decision.

A request has a `prompt` of token ids, and needs `n` samples of at most `max_tokens` new tokens.
`request.is_done(tokens)` tells whether a text has ended. `meter` only counts: `meter.step` is for
each call of the model, `meter.token` for each new token.

You need not read three files: transformer.py (the model), prompts.py (the requests), and
figures.py (counts, seconds, and the table that a step prints).
"""

from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from figures import Meter, PoolFull, compare, counts, run  # noqa: F401, for the steps
from prompts import ask, long_prompt, questions, samples, shared_beginning  # noqa: F401
from transformer import HEAD_DIM, KV_HEADS, LAYERS, MODEL_DIR, Model  # noqa: F401

MEMORY = 512  # from step 4 on, the number of tokens whose K and V fit into memory
# the reader's functions for exercises 8 and 9; `microvllm learn N --mine` sets them
mine = SimpleNamespace(victim=None, shares=None)


def attention(q, k, v, start):
    """Rows of one text: q (T, H, D) are the positions from `start` on, and k, v (L, Hkv, D) are
    positions 0 to L - 1. A row attends to the keys at and before its own position."""
    mask = torch.arange(len(k)) <= torch.arange(start, start + len(q))[:, None]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)[0].transpose(0, 1)


def pick(logits, request, sample, position):
    """The next token of a sample. Sample 0 takes the most likely one; others draw one. The random
    numbers depend only on request, sample and position, so all steps draw the same tokens."""
    if sample == 0:
        return int(logits.argmax())
    generator = torch.Generator().manual_seed(1000 * (1000 * request.id + sample) + position)
    exponential = torch.empty_like(logits).exponential_(generator=generator)
    logits = 15 * torch.tanh(logits / 15) / 0.8  # the model's softcap, and a temperature
    return int((logits - exponential.log()).argmax())


# code of step 5, for the steps after it -----------------------------------------------------------

BLOCK = 16  # tokens in a block


class Sequence:
    """One sample of a request: its tokens, and the blocks with their K and V."""

    def __init__(self, request, sample=0):
        self.request, self.sample, self.tokens = request, sample, list(request.prompt)
        self.table, self.num_computed = [], 0
        self.num_forks = request.n - 1  # samples to fork once the prompt is computed

    def slots(self, stop):
        """The slots in the memory of the tokens before `stop`."""
        return torch.tensor([self.table[i // BLOCK] * BLOCK + i % BLOCK for i in range(stop)])


class Memory:
    """K and V of num_blocks blocks, in all layers."""

    def __init__(self, num_blocks):
        shape = LAYERS, num_blocks * BLOCK, KV_HEADS, HEAD_DIM
        self.k, self.v = torch.zeros(shape), torch.zeros(shape)

    def copy(self, source, target):
        """Write the content of one block into another."""
        for x in (self.k, self.v):
            blocks = x.view(LAYERS, -1, BLOCK, KV_HEADS, HEAD_DIM)
            blocks[:, target] = blocks[:, source]

    def attend(self, chunks, layer, q, k, v):
        """`attend_chunks` of step 5."""
        out, row = torch.empty_like(q), 0
        for seq, start, stop in chunks:
            rows, slots = slice(row, row := row + stop - start), seq.slots(stop)
            self.k[layer, slots[start:]], self.v[layer, slots[start:]] = k[rows], v[rows]
            out[rows] = attention(q[rows], self.k[layer, slots], self.v[layer, slots], start)
        return out


def call(model, memory, chunks, running, meter):
    """Compute the rows [start, stop) of each text. Returns the logits of each text's last row."""
    rows = [(seq.tokens, start, stop) for seq, start, stop in chunks]
    logits = model(rows, partial(memory.attend, chunks))
    for seq, _, stop in chunks:
        seq.num_computed = stop
    filled = {}  # a shared block counts once
    for seq in running:
        for i, block in enumerate(seq.table):
            filled[block] = max(filled.get(block, 0), min(BLOCK, seq.num_computed - i * BLOCK))
    count = sum(1 + seq.num_forks for seq in running)
    num_rows = sum(stop - start for _, start, stop in chunks)
    meter.step(num_rows, 0, count, len(filled) * BLOCK, sum(filled.values()))
    return logits


# decisions that exercises 8 and 9 may replace ----------------------------------------------------


def choose_victim(pool, running):
    """The index in `running` of the sequence to preempt: the youngest, or the reader's choice."""
    if mine.victim is None:
        return len(running) - 1
    needs = []
    for seq in running:
        num_found = 0  # leading blocks that can be found again by their hashes
        while num_found < len(seq.table) and seq.table[num_found] in pool.hash_of:
            num_found += 1
        num_freed = sum(pool.ref_count[block] == 1 for block in seq.table)
        findable = min(seq.num_computed, num_found * BLOCK)
        needs.append((seq.num_computed, findable, num_freed))
    return mine.victim(needs)


def divide(running, budget):
    """[(sequence, its rows in this call), ...]. The oldest gets all rows it needs first, unless
    the reader's function divides the budget."""
    needs = [len(seq.tokens) - seq.num_computed for seq in running]
    if mine.shares is not None:
        rows = mine.shares(list(needs), budget)
    else:
        rows = []
        for need in needs:
            rows.append(min(need, budget - sum(rows)))
    return list(zip(running, rows, strict=True))
