"""Step 3: a batch of texts in each call, and its padding. The page: 03-static-batch.md.

A call of the model reads all weights, no matter how many rows it has. So several texts share a
call. The rows of a batch form a rectangle: shorter prompts are padded, and a text that has ended
keeps its row until all texts of the batch have ended.
"""

import torch

import common

BATCH = 4  # texts in a batch


class Cache:
    """K and V of a batch: each text has space for the largest possible length in the batch."""

    def __init__(self, batch, length):
        shape = common.LAYERS, batch, length, common.KV_HEADS, common.HEAD_DIM
        self.k, self.v = torch.zeros(shape), torch.zeros(shape)
        self.reserved = batch * length
        self.starts, self.width = [0] * batch, 0  # in this call: first positions, rows per text

    def attend(self, layer, q, k, v):
        """Store K and V of `width` rows of each text, then attend to all rows of the text."""
        out = torch.empty_like(q)
        for b, start in enumerate(self.starts):
            rows, stop = slice(b * self.width, (b + 1) * self.width), start + self.width
            self.k[layer, b, start:stop], self.v[layer, b, start:stop] = k[rows], v[rows]
            keys, values = self.k[layer, b, :stop], self.v[layer, b, :stop]
            out[rows] = common.attention(q[rows], keys, values, start)
        return out


def serve(model, requests, meter):
    """Answer one batch after the other."""
    samples = [(request, sample) for request in requests for sample in range(request.n)]
    for i in range(0, len(samples), BATCH):
        serve_batch(model, samples[i : i + BATCH], meter)


def serve_batch(model, batch, meter):
    texts = [list(request.prompt) for request, _ in batch]
    lengths = [len(text) for text in texts]
    cache = Cache(len(batch), max(request.max_length for request, _ in batch))
    # the prompts; the next token of a text overwrites a padded position
    cache.width = max(lengths)
    padded = [(text + [0] * (cache.width - len(text)), 0, cache.width) for text in texts]
    last = torch.tensor([b * cache.width + n - 1 for b, n in enumerate(lengths)])
    logits = model(padded, cache.attend, last)
    idle = cache.width * len(batch) - sum(lengths)
    live = [True] * len(batch)
    while any(live):
        meter.step(len(batch) * cache.width, idle, sum(live), cache.reserved, sum(lengths))
        for b, (request, sample) in enumerate(batch):
            if live[b]:
                texts[b].append(common.pick(logits[b], request, sample, lengths[b]))
                meter.token(request, sample, texts[b])
                live[b] = not request.is_done(texts[b])
        if any(live):  # one row of each text, even if it has ended
            cache.width, idle = 1, live.count(False)
            cache.starts = [len(text) - 1 for text in texts]
            logits = model([(text, len(text) - 1, len(text)) for text in texts], cache.attend)
            lengths = [n + on for n, on in zip(lengths, live, strict=True)]


def main(**options):
    problem = "step 2 calls the model {calls of the model} times for {tokens generated} tokens."
    return common.compare(serve, "step02_kv_cache", common.questions, problem, **options)


if __name__ == "__main__":
    main()
