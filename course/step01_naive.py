"""Step 1: a token at a time, and all of it computed again. The page: 01-naive.md.

A language model gives, for a text, one number for each word that may come next: the logits. To
write a text is to call it, to take a word, to put the word at the end, and to call it again.
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
    """All tokens of the text are rows, so all keys are here."""
    return common.attention(q, k, v, start=0)


def main(**options):
    problem = "to write {tokens made} tokens, this loop computes {rows computed} rows."
    return common.compare(serve, None, common.questions, problem, **options)


if __name__ == "__main__":
    main()
