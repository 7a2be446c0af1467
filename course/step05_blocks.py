"""Step 5: blocks of memory, and a block table for each text. The page: 05-blocks.md.

A text needs no memory for future tokens. So divide the memory into blocks of 16 tokens, and give a
text one more block when its last block is full. The block table says where its tokens are.
"""

from collections import deque
from functools import partial

import torch

import common
from common import BLOCK, PoolFull


class Sequence:
    """One sample of a request: its tokens, and the blocks with their K and V."""

    def __init__(self, request, sample):
        self.request, self.sample, self.tokens = request, sample, list(request.prompt)
        self.table, self.num_computed = [], 0

    def slots(self, stop):
        """The slots in the pool of the tokens before `stop`."""
        return torch.tensor([self.table[i // BLOCK] * BLOCK + i % BLOCK for i in range(stop)])


class Pool:
    """The memory of all texts, divided into blocks."""

    def __init__(self, num_blocks):
        shape = common.LAYERS, num_blocks * BLOCK, common.KV_HEADS, common.HEAD_DIM
        self.k, self.v = torch.zeros(shape), torch.zeros(shape)
        self.num_blocks, self.free = num_blocks, list(range(num_blocks))

    def allocate(self):
        if not self.free:
            raise PoolFull(f"all of {self.num_blocks} blocks are in use")
        return self.free.pop()

    def grow(self, seq):
        """Give a text the blocks for all of its tokens."""
        while len(seq.table) * BLOCK < len(seq.tokens):
            seq.table.append(self.allocate())

    def release(self, seq):
        self.free += seq.table
        seq.table = []


def attend_chunks(chunks, pool, layer, q, k, v):
    """Store K and V of the rows [start, stop) of each text, then attend to all rows of the text."""
    out, row = torch.empty_like(q), 0
    for seq, start, stop in chunks:
        rows, slots = slice(row, row := row + stop - start), seq.slots(stop)
        pool.k[layer, slots[start:]], pool.v[layer, slots[start:]] = k[rows], v[rows]
        keys, values = pool.k[layer, slots], pool.v[layer, slots]
        out[rows] = common.attention(q[rows], keys, values, start)
    return out


def serve(model, requests, meter, memory=common.MEMORY):
    """Answer all requests in one loop; memory: number of tokens whose K and V fit."""
    waiting, running = deque(), []
    waiting += [Sequence(request, i) for request in requests for i in range(request.n)]
    pool = Pool(memory // BLOCK)
    while waiting or running:
        # new texts: start them while their prompt fits, with one more block for each running text
        new = []
        while waiting:
            seq = waiting[0]
            fresh = -(-len(seq.tokens) // BLOCK)
            if fresh + (len(running) + 1 if running else 0) > len(pool.free):
                break
            new.append(waiting.popleft())
            running.append(seq)
            pool.grow(seq)
        # one call for the prompts of the new texts; if there are none, for the next token of all
        chunks = [(seq, seq.num_computed, len(seq.tokens)) for seq in new or running]
        for seq in [] if new else running:  # new texts have their blocks already
            pool.grow(seq)
        if not chunks:
            raise PoolFull(f"request {waiting[0].request.id} needs more than the whole pool")
        logits = model(
            [(seq.tokens, start, stop) for seq, start, stop in chunks],
            partial(attend_chunks, chunks, pool),
        )
        for seq, _, stop in chunks:
            seq.num_computed = stop
        rows = sum(stop - start for _, start, stop in chunks)
        reserved = (pool.num_blocks - len(pool.free)) * BLOCK
        meter.step(rows, 0, len(running), reserved, sum(seq.num_computed for seq in running))
        for (seq, _, stop), row in zip(chunks, logits, strict=True):
            seq.tokens.append(common.pick(row, seq.request, seq.sample, stop))
            meter.token(seq.request, seq.sample, seq.tokens)
        for seq in [seq for seq in running if seq.request.is_done(seq.tokens)]:
            running.remove(seq)
            pool.release(seq)


def main(**options):
    problem = (
        "step 4 runs {peak texts at once} texts at once in a memory of 512 tokens, and wastes "
        "{mean KV waste, %} % of the memory that it reserves."
    )
    return common.compare(serve, "step04_continuous", common.questions, problem, **options)


if __name__ == "__main__":
    main()
