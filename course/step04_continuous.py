"""Step 4: continuous batching: the batch changes at every call. The page: 04-continuous.md.

A text leaves the batch as soon as it has ended, and a waiting text takes its place. The rows need
no rectangle: only attention needs to know which text a row belongs to.
"""

from collections import deque
from functools import partial

import torch

import common
from common import PoolFull


class Sequence:
    """One sample of a request: its tokens, and a cache for its largest possible length."""

    def __init__(self, request, sample):
        self.request, self.sample, self.tokens = request, sample, list(request.prompt)
        self.length, self.num_computed = request.max_length, 0

    def reserve(self):
        shape = common.LAYERS, self.length, common.KV_HEADS, common.HEAD_DIM
        self.k, self.v = torch.zeros(shape), torch.zeros(shape)


def attend_chunks(chunks, layer, q, k, v):
    """Store K and V of the rows [start, stop) of each text, then attend to all rows of the text."""
    out, row = torch.empty_like(q), 0
    for seq, start, stop in chunks:
        rows = slice(row, row := row + stop - start)
        seq.k[layer, start:stop], seq.v[layer, start:stop] = k[rows], v[rows]
        keys, values = seq.k[layer, :stop], seq.v[layer, :stop]
        out[rows] = common.attention(q[rows], keys, values, start)
    return out


def serve(model, requests, meter, memory=common.MEMORY):
    """Answer all requests in one loop; memory: number of tokens whose K and V fit."""
    waiting, running, reserved = deque(), [], 0
    waiting += [Sequence(request, i) for request in requests for i in range(request.n)]
    while waiting or running:
        # new texts: start them while their largest possible length fits into the free memory
        new = []
        while waiting and reserved + waiting[0].length <= memory:
            seq = waiting.popleft()
            seq.reserve()
            reserved += seq.length
            new.append(seq)
            running.append(seq)
        # one call for the prompts of the new texts; if there are none, for the next token of all
        chunks = [(seq, seq.num_computed, len(seq.tokens)) for seq in new or running]
        if not chunks:
            raise PoolFull(f"request {waiting[0].request.id} needs more than the whole memory")
        logits = model(
            [(seq.tokens, start, stop) for seq, start, stop in chunks],
            partial(attend_chunks, chunks),
        )
        for seq, _, stop in chunks:
            seq.num_computed = stop
        rows = sum(stop - start for _, start, stop in chunks)
        meter.step(rows, 0, len(running), reserved, sum(seq.num_computed for seq in running))
        for (seq, _, stop), row in zip(chunks, logits, strict=True):
            seq.tokens.append(common.pick(row, seq.request, seq.sample, stop))
            meter.token(seq.request, seq.sample, seq.tokens)
        for seq in [seq for seq in running if seq.request.is_done(seq.tokens)]:
            running.remove(seq)
            reserved -= seq.length


def main(**options):
    problem = "of {rows computed} rows in step 3, {idle rows} are idle."
    return common.compare(serve, "step03_static_batch", common.questions, problem, **options)


if __name__ == "__main__":
    main()
