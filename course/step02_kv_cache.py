"""Step 2: the KV cache, contiguous memory for each text. The page: 02-kv-cache.md.

A row attends only to itself and the rows before it. So the keys and values of a token do not change
when more tokens are appended. Keep them, and compute one row for each new token.
"""

import torch

import common


class Cache:
    """K and V of one text, with space for its largest possible length."""

    def __init__(self, length):
        shape = common.LAYERS, length, common.KV_HEADS, common.HEAD_DIM
        self.k, self.v = torch.zeros(shape), torch.zeros(shape)
        self.length, self.num_computed = length, 0  # tokens that fit; tokens with K and V

    def attend(self, layer, q, k, v):
        """The rows are the next tokens: store their K and V, then attend to all stored ones."""
        start, stop = self.num_computed, self.num_computed + len(q)
        self.k[layer, start:stop], self.v[layer, start:stop] = k, v
        return common.attention(q, self.k[layer, :stop], self.v[layer, :stop], start)


def serve(model, requests, meter):
    """Answer one request after the other, each sample by itself."""
    for request in requests:
        for sample in range(request.n):
            tokens = list(request.prompt)
            cache = Cache(request.max_length)
            while not request.is_done(tokens):
                logits = model([(tokens, cache.num_computed, len(tokens))], cache.attend)
                rows = len(tokens) - cache.num_computed  # first the prompt, then one token each
                cache.num_computed = len(tokens)
                meter.step(rows, reserved=cache.length, used=cache.num_computed)
                tokens.append(common.pick(logits[0], request, sample, len(tokens)))
                meter.token(request, sample, tokens)


def main(**options):
    problem = "to generate {tokens generated} tokens, step 1 computes {rows computed} rows."
    return common.compare(serve, "step01_naive", common.questions, problem, **options)


if __name__ == "__main__":
    main()
