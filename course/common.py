"""What all ten steps share, and what is not their topic: the model, the requests, the figures.

A step has a function `serve(model, requests, meter)` that answers requests. It calls the model, as

    logits = model(chunks, attend)      chunks: [(tokens, start, stop), ...]

which computes the tokens [start, stop) of each text, all of them as rows of one matrix. T rows,
C channels, D = head_dim, H query heads, Hkv key and value heads, B chunks, V words. Attention is
the one part in which a row needs other rows. So the model asks the step for it:

    attend(layer, q, k, v) -> (T, H, D)         q (T, H, D); k, v (T, Hkv, D), of these rows

Where the K and V of earlier tokens are kept is the step's business. It is what the course is about.
"""

import importlib
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

if (Path(__file__).parents[1] / "microvllm").is_dir():  # a clone in which nothing was installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

from microvllm.checkpoint import find_tokenizer, load_model
from microvllm.cli.commands import MODEL_DIR
from microvllm.tokenizer import load_tokenizer

torch.set_num_threads(1)  # the calls are small: a second thread would mostly wait

LAYERS, KV_HEADS, HEAD_DIM = 6, 2, 64  # of the bundled model: 8 million numbers
TOKEN_BYTES = 2 * LAYERS * KV_HEADS * HEAD_DIM * 4  # K and V of one token, in float32
CONTEXT = 256  # tokens: half of the layers see no further back, so the course's texts are shorter
MEMORY = 512  # tokens whose K and V fit into memory, from step 4 on


# the model ----------------------------------------------------------------------------------------


def norm(x):
    return F.rms_norm(x, (x.shape[-1],), eps=2.0**-23)


class Model:
    """nanochat's GPT as plain functions, with the weights of the bundled model, and no cache."""

    def __init__(self):
        gpt = load_model(MODEL_DIR)
        self.config, self.recipe, self.cos, self.sin = gpt.config, gpt.recipe, gpt.cos, gpt.sin
        self.w = gpt.state_dict()  # name -> tensor
        self.tokenizer = load_tokenizer(find_tokenizer(MODEL_DIR))

    @torch.inference_mode()
    def __call__(self, chunks, attend, last=None):
        """Logits (B, V) of the last row of each chunk, or of the rows `last`."""
        w, n = self.w, self.config.n_layer
        places = [(text, i) for text, start, stop in chunks for i in range(start, stop)]
        ids = torch.tensor([text[i] for text, i in places])
        previous = torch.tensor([text[i - 1] if i else 0 for text, i in places])
        positions = torch.tensor([i for _, i in places])
        # a row begins as its token's embedding, and a part of the token's before it (smear)
        x = norm(w["transformer.wte.weight"][ids])
        gate = w["smear_lambda"] * torch.sigmoid(F.linear(x[:, :24], w["smear_gate.weight"]))
        before = norm(w["transformer.wte.weight"][previous])
        x = x0 = x + gate * (positions > 0)[:, None] * before
        for i in range(n):
            x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
            x = x + self.attention(i, norm(x), ids, positions, attend)
            hidden = F.relu(F.linear(norm(x), w[f"transformer.h.{i}.mlp.c_fc.weight"])).square()
            x = x + F.linear(hidden, w[f"transformer.h.{i}.mlp.c_proj.weight"])
            if i == n // 2:
                middle = x
        x = x - w["backout_lambda"] * middle
        if last is None:
            last = torch.tensor([stop - start for _, start, stop in chunks]).cumsum(0) - 1
        return F.linear(norm(x[last]), w["lm_head.weight"])[:, : self.config.vocab_size]

    def attention(self, i, x, ids, positions, attend):
        """Layer i: make queries, keys and values of the rows, and let the step attend."""
        w, name, recipe = self.w, f"transformer.h.{i}.attn.", self.recipe
        q, k, v = (F.linear(x, w[f"{name}c_{c}.weight"]).view(len(x), -1, HEAD_DIM) for c in "qkv")
        if f"value_embeds.{i}.weight" in w:  # a second embedding, added to the values
            gate = torch.sigmoid(F.linear(x[:, : recipe.gate_channels], w[f"{name}ve_gate.weight"]))
            values = w[f"value_embeds.{i}.weight"][ids].view_as(v)
            v = v + recipe.gate_scale * gate[:, :, None] * values
        q, k = (norm(self.rotate(part, positions)) * recipe.qk_scale for part in (q, k))
        return F.linear(attend(i, q, k, v).flatten(1), w[f"{name}c_proj.weight"])

    def rotate(self, x, positions):
        """Rotary embedding: the angle of a pair of channels says where in the text a row is."""
        cos, sin = self.cos[positions, None], self.sin[positions, None]
        left, right = x.chunk(2, dim=-1)
        return torch.cat((left * cos + right * sin, right * cos - left * sin), dim=-1)


def attention(q, k, v, start):
    """Rows of one text: q (T, H, D) are the positions from `start` on, and k, v (L, Hkv, D) are
    positions 0 to L - 1. A row sees the keys at and before its own position."""
    mask = torch.arange(len(k)) <= torch.arange(start, start + len(q))[:, None]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)[0].transpose(0, 1)


def pick(logits, request, sample, position):
    """The next token of a sample. Sample 0 takes the likeliest; others draw one with a noise that
    depends on request, sample and position alone. So every step of the course draws the same."""
    if sample == 0:
        return int(logits.argmax())
    generator = torch.Generator().manual_seed(1000 * (1000 * request.id + sample) + position)
    exponential = torch.empty_like(logits).exponential_(generator=generator)
    logits = 15 * torch.tanh(logits / 15) / 0.8  # the model's softcap, and a temperature
    return int((logits - exponential.log()).argmax())


# requests -----------------------------------------------------------------------------------------


@dataclass
class Request:
    """A prompt, the most new tokens it may get, and how many samples of it are wanted."""

    id: int
    prompt: list[int]
    max_tokens: int
    stop: frozenset[int]
    n: int = 1

    @property
    def max_length(self):
        return len(self.prompt) + self.max_tokens

    def is_done(self, tokens):
        """Has the text ended, by itself or at its limit?"""
        return len(tokens) >= self.max_length or (
            len(tokens) > len(self.prompt) and tokens[-1] in self.stop
        )


def ask(model, questions, n=1, before=""):
    """Requests of (question, max_tokens) pairs, in the form in which the model knows a chat."""
    requests = []
    for i, (question, max_tokens) in enumerate(questions):
        turn = {"role": "user", "content": before + question}
        prompt = model.tokenizer.render_for_completion([turn])
        requests.append(Request(i, prompt, max_tokens, model.tokenizer.eos_ids, n))
        assert requests[-1].max_length <= CONTEXT, f"question {i} and its answer are too long"
    return requests


QUESTIONS = [
    ("Who wrote Moby Dick?", 64),
    ("Describe the sea.", 48),
    ("What is 7+8?", 64),
    ("Tell me a story about a dog.", 64),
    ("Name a book by Jane Austen.", 64),
    ("What is the capital of France?", 48),
    ("Write a poem about the moon.", 40),
    ("Hello!", 64),
    ("Who wrote Dracula?", 64),
    ("Where do whales live?", 56),
    ("What is love?", 64),
    ("Who wrote Emma?", 48),
]

TASK = (
    "You are a small model that has read a shelf of old books. Answer the question that follows in "
    "one sentence, and say nothing of which you are not sure. "
)


def questions(model):
    """Twelve questions."""
    return ask(model, QUESTIONS)


def samples(model):
    """Four questions behind one text, and four answers to each."""
    return ask(model, QUESTIONS[3:5] + QUESTIONS[7:9], n=4, before=TASK)


def shared_beginning(model):
    """Twelve questions behind one text."""
    return ask(model, QUESTIONS, before=TASK)


def long_prompt(model):
    """Four questions, and one that comes with a long text."""
    requests = ask(model, QUESTIONS[:4])
    (late,) = ask(model, [("What is 7+8?", 8)], before=4 * TASK)
    late.id = len(requests)
    return [*requests, late]


# what step 5 spells out, for the steps after it ---------------------------------------------------

BLOCK = 16  # tokens in a block


class PoolFull(Exception):
    """A text needs a block, and no block is free."""


class Text:
    """One sample of a request: its tokens, and the blocks in which their K and V lie."""

    def __init__(self, request, sample=0):
        self.request, self.sample, self.tokens = request, sample, list(request.prompt)
        self.table, self.computed = [], 0
        self.forks = request.n - 1  # samples still to be made, once the prompt is computed

    def slots(self, stop):
        """Where the tokens before `stop` lie in the memory."""
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
        for text, start, stop in chunks:
            rows, slots = slice(row, row := row + stop - start), text.slots(stop)
            self.k[layer, slots[start:]], self.v[layer, slots[start:]] = k[rows], v[rows]
            out[rows] = attention(q[rows], self.k[layer, slots], self.v[layer, slots], start)
        return out


def call(model, memory, chunks, running, meter):
    """Compute the rows [start, stop) of each text: gives the logits of each text's last row."""
    rows = [(text.tokens, start, stop) for text, start, stop in chunks]
    logits = model(rows, partial(memory.attend, chunks))
    for text, _, stop in chunks:
        text.computed = stop
    filled = {}  # a block that several texts have counts once
    for text in running:
        for i, block in enumerate(text.table):
            filled[block] = max(filled.get(block, 0), min(BLOCK, text.computed - i * BLOCK))
    count = sum(1 + text.forks for text in running)
    num_rows = sum(stop - start for _, start, stop in chunks)
    meter.step(num_rows, 0, count, len(filled) * BLOCK, sum(filled.values()))
    return logits


# figures ------------------------------------------------------------------------------------------


TIMES = ("first token after, mean, ms", "longest wait for a next token, ms", "tokens per second")


class Meter:
    """What a run did and took: counts, which are the same on every machine, and seconds."""

    def __init__(self):
        self.counts, self.waste, self.times, self.rows = Counter(), [], {}, {}
        self.outputs: dict[tuple[int, int], list[int]] = {}  # (request, sample) -> new tokens
        self.start = time.perf_counter()

    def step(self, rows, idle=0, running=1, reserved=0, used=0):
        """A call of the model: of so many rows, `idle` of which nobody needs, for `running` texts,
        with memory reserved for the K and V of so many tokens, and used for so many."""
        counts = self.counts
        counts["calls of the model"] += 1
        counts["rows computed"] += rows
        counts["rows nobody needs"] += idle
        for name, value in (
            ("rows of the largest call", rows),
            ("texts at once, at most", running),
            ("KV bytes reserved, at most", reserved * TOKEN_BYTES),
        ):
            counts[name] = max(counts[name], value)
        self.waste += [1 - used / reserved] if reserved else []

    def token(self, request, sample, tokens):
        """The text of a sample has one token more."""
        key = request.id, sample
        self.times.setdefault(key, []).append(time.perf_counter() - self.start)
        self.outputs[key] = tokens[len(request.prompt) :]
        self.counts["tokens made"] += 1
        # how much was computed since its token before: nobody else's work should keep it waiting
        name, rows = "rows between two tokens, at most", self.counts["rows computed"]
        waited = rows - self.rows.get(key, rows)
        self.counts[name], self.rows[key] = max(self.counts[name], waited), rows

    def table(self):
        """name -> number, in the order in which they are printed."""
        seconds = max(max(times) for times in self.times.values())
        firsts = [times[0] for times in self.times.values()]
        gaps = [b - a for t in self.times.values() for a, b in zip(t, t[1:], strict=False)]
        found = dict(self.counts)
        if self.waste:
            found["KV wasted, mean of all calls, %"] = 100 * sum(self.waste) / len(self.waste)
        mean, wait = sum(firsts) / len(firsts), max(gaps, default=0)
        times = 1000 * mean, 1000 * wait, self.counts["tokens made"] / seconds
        return found | dict(zip(TIMES, times, strict=True))


def run(serve, model, requests, **limits):
    """Serve the requests and give the meter."""
    meter = Meter()
    serve(model, requests, meter, **limits)
    return meter


def compare(serve, before, requests, problem, model=None, memory=None):
    """Run the step before and this one on the same requests, see that the tokens are equal, and
    print the problem and the table.

    before: the file of the step before, None for the first; requests: a function that makes them
    for a model; problem: a sentence with figures of the step before in it; memory: tokens, in
    which the step before may stop. Then it is run once more, in four times as many.
    """
    model = model or Model()
    requests = requests(model)
    model([(requests[0].prompt, 0, 1)], lambda layer, q, k, v: q)  # torch prepares itself
    limits = {"memory": memory} if memory else {}
    old, stopped = None, ""
    if before:
        earlier = importlib.import_module(before).serve
        try:
            old = run(earlier, model, requests, **limits)
        except PoolFull as error:
            stopped, old = str(error), run(earlier, model, requests, memory=4 * memory)
    new = run(serve, model, requests, **limits)
    if old:
        assert old.outputs == new.outputs, "the tokens differ from those of the step before"
    numbers = {name: f"{value:,.0f}" for name, value in (old or new).table().items()}
    print("The problem:", problem.format_map(numbers | {"stopped": stopped}), "\n")
    print(f"{'':36}{'step before' if old else '':>14}{'this step':>14}{'ratio' if old else '':>9}")
    for name, a, b in rows(old, new):
        ratio = f"{b / a:9.2f}" if a else ""
        print(f"{name:36}{f'{a:,.0f}' if old else '':>14}{b:14,.0f}{ratio}")
    print("\nThe same tokens as the step before." if old else "")
    for (i, sample), tokens in list(new.outputs.items())[:4]:
        print(f"  request {i}, sample {sample}: {model.tokenizer.decode(tokens, True)[:60]!r}")
    return old, new


def rows(old, new):
    """(name, of the step before, of this one) for each line of the table."""
    before, after = old.table() if old else {}, new.table()
    names = sorted(before | after, key=lambda name: (name in TIMES, [*after, *before].index(name)))
    table = [(name, before.get(name, 0), after.get(name, 0)) for name in names]
    return [line for line in table if line[1] or line[2]]


def counts(old, new):
    """The lines of the table that are the same on every machine, as a page has them."""
    found = [(name, a, b) for name, a, b in rows(old, new) if name not in TIMES]
    if old:
        return [f"| {name} | {a:,.0f} | {b:,.0f} |" for name, a, b in found]
    return [f"| {name} | {b:,.0f} |" for name, _, b in found]
