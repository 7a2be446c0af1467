"""Step 4: continuous batching: the batch changes at every call. The page: 04-continuous.md.

A text leaves the batch in the call after which it has ended, and a waiting one takes its place.
The rows need no rectangle: only attention asks which text a row is of.
"""

from collections import deque
from functools import partial

import torch

import common
from common import PoolFull


class Text:
    """One sample of a request: its tokens, and a cache as long as it may become."""

    def __init__(self, request, sample):
        self.request, self.sample, self.tokens = request, sample, list(request.prompt)
        self.length, self.computed = request.max_length, 0

    def reserve(self):
        shape = common.LAYERS, self.length, common.KV_HEADS, common.HEAD_DIM
        self.k, self.v = torch.zeros(shape), torch.zeros(shape)


def attend_chunks(chunks, layer, q, k, v):
    """The rows [start, stop) of each text: keep their K and V, then look at all of that text."""
    out, row = torch.empty_like(q), 0
    for text, start, stop in chunks:
        rows = slice(row, row := row + stop - start)
        text.k[layer, start:stop], text.v[layer, start:stop] = k[rows], v[rows]
        keys, values = text.k[layer, :stop], text.v[layer, :stop]
        out[rows] = common.attention(q[rows], keys, values, start)
    return out


def serve(model, requests, meter, memory=common.MEMORY):
    """Answer all requests in one loop; memory: tokens whose K and V there is room for."""
    waiting, running, reserved = deque(), [], 0
    waiting += [Text(request, i) for request in requests for i in range(request.n)]
    while waiting or running:
        # the new ones: all whose longest possible text fits into what is left of the memory
        new = []
        while waiting and reserved + waiting[0].length <= memory:
            text = waiting.popleft()
            text.reserve()
            reserved += text.length
            new.append(text)
            running.append(text)
        # a call for the prompts of the new ones, else one for the next token of all
        chunks = [(text, text.computed, len(text.tokens)) for text in new or running]
        if not chunks:
            raise PoolFull(f"request {waiting[0].request.id} needs more than the whole memory")
        logits = model(
            [(text.tokens, start, stop) for text, start, stop in chunks],
            partial(attend_chunks, chunks),
        )
        for text, _, stop in chunks:
            text.computed = stop
        rows = sum(stop - start for _, start, stop in chunks)
        meter.step(rows, 0, len(running), reserved, sum(text.computed for text in running))
        for (text, _, stop), row in zip(chunks, logits, strict=True):
            text.tokens.append(common.pick(row, text.request, text.sample, stop))
            meter.token(text.request, text.sample, text.tokens)
        for text in [text for text in running if text.request.is_done(text.tokens)]:
            running.remove(text)
            reserved -= text.length


def main(**options):
    problem = "of {rows computed} rows in step 3, {idle rows} are idle."
    return common.compare(serve, "step03_static_batch", common.questions, problem, **options)


if __name__ == "__main__":
    main()
