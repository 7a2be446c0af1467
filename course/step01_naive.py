"""Step 1: one token at a time, everything recomputed. The page: 01-naive.md.

For a text, a language model returns the logits: one number for each token that may come next. To
generate text, call the model, choose a token, append it, and call the model again.
"""

import common


def serve(model, requests, meter):
    """Answer one request after the other, each sample by itself."""
    for request in requests:
        for sample in range(request.n):
            tokens = list(request.prompt)
            while not request.is_done(tokens):
                logits = model([(tokens, 0, len(tokens))], attend)
                meter.step(rows=len(tokens))
                tokens.append(common.pick(logits[0], request, sample, len(tokens)))
                meter.token(request, sample, tokens)


def attend(layer, q, k, v):
    """All tokens of the text are rows, so k and v are complete."""
    return common.attention(q, k, v, start=0)


def main(**options):
    problem = "to generate {tokens generated} tokens, this loop computes {rows computed} rows."
    return common.compare(serve, None, common.questions, problem, **options)


if __name__ == "__main__":
    main()
