"""Measure a run, compare it with the run of the step before, and print a table."""

import importlib
import time
from collections import Counter

from transformer import TOKEN_BYTES, Model

TIMES = ("mean time to first token, ms", "longest time between tokens, ms", "tokens per second")


class PoolFull(Exception):
    """A text needs a block, and no block is free."""


class Meter:
    """The results of a run: counts, which are the same on every machine, and seconds."""

    def __init__(self):
        self.counts, self.waste, self.times, self.rows = Counter(), [], {}, {}
        self.outputs: dict[tuple[int, int], list[int]] = {}  # (request, sample) -> new tokens
        self.start = time.perf_counter()

    def step(self, rows, idle=0, running=1, reserved=0, used=0):
        """Count a call of the model. rows: its rows; idle: rows of them without use; running: texts
        in progress; reserved: tokens with reserved memory; used: tokens with K and V."""
        counts = self.counts
        counts["calls of the model"] += 1
        counts["rows computed"] += rows
        counts["idle rows"] += idle
        for name, value in (
            ("rows of the largest call", rows),
            ("peak texts at once", running),
            ("peak KV bytes reserved", reserved * TOKEN_BYTES),
        ):
            counts[name] = max(counts[name], value)
        self.waste += [1 - used / reserved] if reserved else []

    def token(self, request, sample, tokens):
        """Count a new token of a sample; tokens: its whole text."""
        key = request.id, sample
        self.times.setdefault(key, []).append(time.perf_counter() - self.start)
        self.outputs[key] = tokens[len(request.prompt) :]
        self.counts["tokens generated"] += 1
        # rows computed since its last token: work for other texts should not delay a text
        name, rows = "most rows between two tokens", self.counts["rows computed"]
        waited = rows - self.rows.get(key, rows)
        self.counts[name], self.rows[key] = max(self.counts[name], waited), rows

    def table(self):
        """name -> number, in the order of printing."""
        seconds = max(max(times) for times in self.times.values())
        firsts = [times[0] for times in self.times.values()]
        gaps = [b - a for t in self.times.values() for a, b in zip(t, t[1:], strict=False)]
        numbers = dict(self.counts)
        if self.waste:
            numbers["mean KV waste, %"] = 100 * sum(self.waste) / len(self.waste)
        mean, wait = sum(firsts) / len(firsts), max(gaps, default=0)
        times = 1000 * mean, 1000 * wait, self.counts["tokens generated"] / seconds
        return numbers | dict(zip(TIMES, times, strict=True))


def run(serve, model, requests, **limits):
    """Serve the requests and return the meter."""
    meter = Meter()
    serve(model, requests, meter, **limits)
    return meter


def compare(serve, before, requests, problem, model=None, memory=None):
    """Run the step before and this step on the same requests, check that the tokens are equal, and
    print the problem and a table.

    before: file name of the step before, None for the first step; requests: a function that makes
    the requests for a model; problem: a sentence with placeholders for counts of the step before;
    memory: size in tokens. If the step before stops in it, it runs again in four times as much.
    """
    model = model or Model()
    requests = requests(model)
    model([(requests[0].prompt, 0, 1)], lambda layer, q, k, v: q)  # warm up torch
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
    print("The problem:", problem.format_map(numbers | {"stopped": stopped}), end="\n\n")
    if stopped:
        print(f"The table shows the step before in a memory of {4 * memory:,} tokens.\n")
    print(f"{'':36}{'step before' if old else '':>14}{'this step':>14}{'ratio' if old else '':>9}")
    for name, a, b in rows(old, new):
        ratio = f"{b / a:9.2f}" if a else ""
        print(f"{name:36}{f'{a:,.0f}' if old else '':>14}{b:14,.0f}{ratio}")
    print("\nThe same tokens as the step before:" if old else "\nThe first answers:")
    for (i, sample), tokens in list(new.outputs.items())[:4]:
        print(f"  request {i}, sample {sample}: {model.tokenizer.decode(tokens, True)[:60]!r}")
    return old, new


def rows(old, new):
    """(name, value of the step before, value of this step) for each line of the table."""
    old_table, new_table = old.table() if old else {}, new.table()
    order = [*new_table, *old_table]
    names = sorted(old_table | new_table, key=lambda name: (name in TIMES, order.index(name)))
    table = [(name, old_table.get(name, 0), new_table.get(name, 0)) for name in names]
    return [line for line in table if line[1] or line[2]]


def counts(old, new):
    """The lines of the table that are the same on every machine, in the format of a page."""
    lines = [(name, a, b) for name, a, b in rows(old, new) if name not in TIMES]
    if old:
        return [f"| {name} | {a:,.0f} | {b:,.0f} |" for name, a, b in lines]
    return [f"| {name} | {b:,.0f} |" for name, _, b in lines]
