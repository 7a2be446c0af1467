"""A soak test of the engine: random stories of requests, each token compared with a naive loop.

    python benchmarks/soak.py                           # an hour
    python benchmarks/soak.py --seconds 30 --seed 7
    python benchmarks/soak.py --seed 7 --case 123       # repeat one story

A story is a random test case: a small engine and a list of events. The engine has a random era of
nanochat, block size, token budget and policy, with or without a prefix cache and prompt lookup, in
the plain loop or in the loop that runs one step ahead. Its pool is often just large enough for the
longest request. Events are: requests arrive, and are aborted, streamed or scored; a stream is
closed early; weights change; steps fail. `check()` is called after each step. At the end, the naive
loop of the tests checks every output: each token must be the one that the request's parameters
choose from the logits of a plain forward pass.

A token whose choice depends on the rounding of logits is counted as a tie, and is not a failure.
After a failure, the program searches for the shortest story that still fails, prints it, and exits
with status 1. The last line of the output has all results as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from copy import copy
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of lab/
sys.path.append(f"{sys.path[0]}/tests")  # the folder of helpers/
sys.path.insert(0, f"{sys.path[0]}/src")

import numpy as np
import torch
from helpers.failures import PLACES, Fault, failing
from helpers.full_engines import assert_idle, build, check, ids
from helpers.goldens import FIXTURES
from helpers.naive import Naive, naive
from helpers.sampling import (
    History,
    ban_even,
    favour_the_last,
    naive_edits,
    naive_probabilities,
)
from helpers.traces import compare

from lab import policies
from microvllm import SamplingParams, blocks, scheduler
from microvllm.cli.terminal import Parser, positive
from microvllm.features.calculator import Calculator, ToolCalls
from microvllm.features.tools import ToolDecoder, find_marks
from microvllm.loops.ahead import AheadLoop
from microvllm.sampler import uniform_numbers
from microvllm.trace import Replay, attach, make_trace

ROUNDING = 1e-3  # largest difference of a logit between the engine and the naive loop


def fail_sometimes(tokens, logits):
    """A logits_processor that raises at positions that depend on the text."""
    if sum(tokens) % 11 == 0:
        raise KeyError("no rule for this")
    return logits


def forbid_all_sometimes(tokens, logits):
    """A logits_processor that allows no token at positions that depend on the text."""
    return logits - torch.inf if sum(tokens) % 9 == 0 else logits


PROCESSORS = {f.__name__: f for f in (ban_even, favour_the_last, fail_sometimes)}
PROCESSORS["forbid_all_sometimes"] = forbid_all_sometimes
VICTIMS = scheduler.youngest, policies.largest, policies.cheapest, policies.furthest
ADMISSIONS = scheduler.first_come, policies.shortest, policies.best_cached, policies.first_fit
EVICTIONS = blocks.least_recently_used, policies.most_recently_used, policies.first_published


# a story, as plain data ---------------------------------------------------------------------------


def some_params(rng: random.Random, max_tokens: int, tools: bool) -> dict:
    """Random keywords of SamplingParams, each with the same random probability."""
    probability = rng.choice([0, 0.1, 0.3, 0.8])

    def rarely() -> bool:
        return rng.random() < probability

    params = {"temperature": rng.choice([0, 0, 0.3, 0.8, 1, 2.5]), "max_tokens": max_tokens}
    params["seed"] = None if rng.random() < 0.1 else rng.getrandbits(rng.choice([3, 32, 64]))
    params["ignore_eos"] = rng.random() < 0.6
    choices = {
        "top_k": lambda: rng.choice([0, 1, 2, 20, 1000]),
        "top_p": lambda: rng.choice([1e-6, 0.3, 0.9, 0.999]),
        "min_p": lambda: rng.choice([0.01, 0.2, 1.0]),
        "repetition_penalty": lambda: rng.choice([0.7, 1.2, 2.0]),
        "presence_penalty": lambda: rng.choice([-1.0, 0.7]),
        "frequency_penalty": lambda: rng.choice([-0.3, 0.5]),
        "min_tokens": lambda: rng.randint(0, max_tokens),
        "stop": lambda: [rng.choice(["e", "a ", "th", "\ufffd", "12", "0"]) for _ in range(2)],
        "stop_token_ids": lambda: rng.choices(range(311), k=rng.choice([1, 20])),
        "sample_index": lambda: rng.choice([1, 7, 2**31 - 1]),
        "logprobs": lambda: rng.choice([0, 1, 5, 1000]),
        "logit_bias": lambda: {rng.randrange(311): rng.choice([-100, -1, 2, 9]) for _ in range(5)},
        "allowed_token_ids": lambda: rng.sample(range(311), rng.choice([1, 2, 50])),
        "bad_words": lambda: ["e", [rng.randrange(311)], rng.choices(range(311), k=2)],
        "logits_processor": lambda: rng.choice(list(PROCESSORS)),
    }
    params |= {name: choice() for name, choice in choices.items() if rarely()}
    if tools and rng.random() < 0.7:  # make it call the calculator repeatedly
        params["allowed_token_ids"] = [*b"12+*/", 307, 308]
        params["temperature"] = 3.0
    return params


def make_story(seed: str) -> dict:
    """The arguments of an engine, and the events of a story."""
    rng = random.Random(seed)
    longest = rng.choice([6, 20, 60, 60, 200])  # tokens of a request, prompt and output
    batch = rng.choice([1, 2, 3, 5, 8])
    size = rng.choice([1, 2, 3, 4, 5, 8, 16, 16, 64])
    story = {
        "era": rng.choice(sorted(FIXTURES)),
        "overlap": rng.random() < 0.5,
        "trace": rng.random() < 0.2,
        "options": {
            "block_size": size,
            "num_blocks": 1 + -(-(longest - 1) // size) + rng.choice([0, 0, 1, 2, 5, 20]),
            "max_batch_size": batch,
            "max_batched_tokens": rng.choice([1, 2, 3, 7, 16, 64, 1024]),
            "max_model_len": rng.choice([None, longest, max(2, longest - 5)]),
            "enable_prefix_caching": rng.random() < 0.75,
            "attention": rng.choice(["numba", "numba", "sdpa"]),
            "seed": rng.randrange(100),
        },
        "policies": [rng.choice([0, 0, 0, 1, 2, 3]) for _ in range(2)] + [rng.choice([0, 0, 1, 2])],
    }
    if not story["overlap"]:  # drafts need the plain loop; nothing else changes
        story["options"]["prompt_lookup"] = random.Random(f"{seed}:guess").choice([0, 1, 3, 8])
    texts = [ids(longest, rng.randrange(10_000)) for _ in range(rng.choice([1, 2, 5]))]
    add_share = rng.choice([0.25, 0.4, 0.6])  # the share of arrivals among the events

    def prompt(length: int) -> list[int]:
        length = max(1, length)
        text = rng.choice(texts)[: rng.choice([length, length // size * size or length, length])]
        if rng.random() < 0.5:
            cut = rng.randint(0, len(text) - 1)
            text = text[:cut] + ids(len(text) - cut, rng.randrange(10_000))
        if rng.random() < 0.05:
            text[rng.randrange(len(text))] = 306  # an end token in the prompt
        return text

    def request() -> dict:
        max_tokens = rng.randint(1, max(1, longest - 1))
        tools = rng.random() < 0.25
        params = some_params(rng, max_tokens, tools)
        if rng.random() < 0.25:
            params["n"] = rng.randint(1, batch)
        return {"prompt": prompt(longest - max_tokens), "params": params, "tools": tools}

    events: list[tuple] = []
    for _ in range(rng.choice([5, 20, 60])):
        dice = rng.random()
        if dice < add_share:
            events.append(("add", request()))
        elif dice < 0.84:
            events.append(("step", rng.choice([1, 1, 2, 5, 20])))
        elif dice < 0.89:
            events.append(("abort", rng.randrange(1000)))
        elif dice < 0.92:
            requests = [request() for _ in range(rng.randint(1, 3))]
            events.append(("stream", requests, rng.choice([None, None, rng.randint(0, 20)])))
        elif dice < 0.94:
            events.append(("generate", [request() for _ in range(rng.randint(0, 4))]))
        elif dice < 0.96:
            tails = [rng.randint(1, max(1, longest // 2)) for _ in range(rng.randint(1, 4))]
            pairs = [(prompt(longest - n), ids(n, rng.randrange(10_000))) for n in tails]
            events.append(("score", pairs))
        elif dice < 0.97:
            events.append(("weights", rng.randrange(2)))
        else:
            events.append(("fail", rng.choice(sorted(PLACES)), rng.choice([0, 1, 5])))
    story["events"] = events
    return story


# the expected output of a request -----------------------------------------------------------------


class Reference:
    """The naive loop of the tests with the model of an era, and two sets of weights."""

    def __init__(self, era: str):
        fixture, draw = FIXTURES[era], torch.Generator().manual_seed(0)
        self.loops = [naive(era), Naive(fixture.directory, fixture.overrides)]
        model = self.loops[1].model
        self.weights = [{name: w.clone() for name, w in model.state_dict().items()}, {}]
        for name, w in self.weights[0].items():
            self.weights[1][name] = w * (1 + 0.2 * torch.randn(w.shape, generator=draw))
        model.load_state_dict(self.weights[1])

    def logits(self, tokens: list[int], weights: int) -> np.ndarray:
        """The logits (V,) float64 after these tokens."""
        return self.loops[weights].logits(tokens)

    def follow(self, tokens: list[int], weights: int) -> None:
        """Compute the logits after every prefix of these tokens in one forward pass."""
        self.loops[weights].follow(tokens)

    def forget(self) -> None:
        for loop in self.loops:
            loop.known.clear()


class Reader:
    """Compares an output with the naive loop."""

    def __init__(self, llm, reference: Reference, counts: Counter):
        self.tokenizer, self.max_model_len = llm.tokenizer, llm.max_model_len
        self.reference, self.counts = reference, counts

    def params(self, keywords: dict) -> SamplingParams:
        """SamplingParams for a sampler without a tokenizer: `bad_words` are token ids."""
        keywords = dict(keywords)
        if name := keywords.get("logits_processor"):
            keywords["logits_processor"] = PROCESSORS[name]
        if "bad_words" in keywords:
            encode, words = self.tokenizer.encode, []
            for word in keywords["bad_words"]:
                texts = [word, " " + word] if isinstance(word, str) else []
                words += [encode(text) for text in texts] or [word]
            keywords["bad_words"] = words
        return SamplingParams(**keywords)

    def agree(self, token: int | None, logits, params, sample: int, history) -> dict:
        """Assert that `token` (None: no token) is the right choice. Returns its log-probability of
        the sampler, and whether the choice does not depend on rounding ("exact")."""
        index = params.sample_index + sample
        uniform = float(uniform_numbers([params.seed], [index], [history.position])[0])
        try:
            edited = np.array(naive_edits(list(logits), params, history))
        except KeyError:  # a logits_processor that fails
            edited = np.full(len(logits), np.nan)
        if not (edited > -np.inf).any():
            assert token is None, f"{token} was drawn although no token was allowed"
            return {}
        assert token is not None, "no token was drawn although one was allowed"
        for turn in range(6):  # the logits, then five other roundings of them
            moved = logits
            if turn:
                draw = np.random.default_rng(turn)
                moved = logits + draw.uniform(-ROUNDING, ROUNDING, len(logits))
            p = naive_probabilities(naive_edits(list(moved), params, history), params)
            slack, after = (0, 2e-3)[turn > 0], p.cumsum()
            before = after[token] - p[token]
            low, high = before - slack, after[token] + slack
            if p[token] > 0 and low <= uniform * after[-1] <= high:
                self.counts["ties"] += turn > 0
                return {"sampler": float(np.log(p[token])), "exact": not turn}
        if params.temperature == 0 and edited.max() - edited[token] < ROUNDING:
            self.counts["ties"] += 1
            return {"sampler": 0.0, "exact": False}
        raise AssertionError(
            f"token {token} at position {history.position} of sample {sample}: probability "
            f"{p[token]:.3g}, number {uniform:.6f} outside {low:.6f} to {high:.6f}; {params}"
        )

    def check_sample(self, request: dict, params, number: int, sample: dict, swaps: list) -> None:
        """Assert that a sample is right, as far as it was generated.

        sample: of an output, or the concatenated events of its stream; swaps: (index of an output
        token, weights): from this token on, the engine had these weights.
        """
        prompt, output = request["prompt"], sample["token_ids"]
        stops = set(params.stop_token_ids)
        stops |= set() if params.ignore_eos else self.tokenizer.eos_ids
        limit = min(len(prompt) + params.max_tokens, self.max_model_len)
        for first, weights in swaps:
            if first <= len(output):
                self.reference.follow(prompt + output, weights)
        tool = ToolCalls(self.tokenizer) if request["tools"] else None
        push = self.tokenizer.decoder()
        if tool:
            push = ToolDecoder(self.tokenizer, [find_marks(Calculator(), self.tokenizer)])
        text, tokens, forced = "", list(prompt), []
        ended, reason, held = None, None, 0
        finish_reason = sample["finish_reason"]
        for i, token in enumerate([*output, *[None] * (finish_reason == "error")]):
            assert ended is None, f"{len(output) - i} tokens after its end by {ended}: {reason!r}"
            is_forced = bool(forced) and token is not None
            if is_forced:
                assert token == forced.pop(0), "differs from the calculator"
                self.counts["forced tokens"] += 1
            else:
                weights = [w for first, w in swaps if first <= i][-1]
                history = History(tokens, len(prompt), len(tokens), stops)
                logits = self.reference.logits(tokens, weights)
                choice = self.agree(token, logits, params, number, history)
                self.counts["tokens"] += 1
                if params.logprobs is not None and token is not None and "logprobs" in sample:
                    self.check_logprobs(sample["logprobs"][i], token, logits, params, choice)
            if "mask" in sample and token is not None:
                assert sample["mask"][i] == 1 - is_forced
            if token is None:
                ended, reason = "error", sample["stop_reason"]
                break
            tokens.append(token)
            if not is_forced and token in stops:
                ended, reason = "stop", token
                continue
            text += push.push(token)
            if len(tokens) == limit and not forced:
                ended = "length"
                full = len(tokens) - len(prompt) == params.max_tokens
                reason = "max_tokens" if full else "max_model_len"
            if tool and (answer := tool.push(token)) and ended is None:
                forced = answer[: limit - len(tokens)]
                self.counts["tool calls"] += 1
            if i < params.min_tokens:
                held = len(text)  # a stop string must end after this text
                continue
            places = [(text.find(s, max(0, held - len(s) + 1)), s) for s in params.stop]
            if hits := [(at, stop) for at, stop in places if at >= 0]:
                at, reason = min(hits)
                text, ended, forced = text[:at], "stop", []
                self.counts["stop strings"] += 1
        self.counts[f"ended: {finish_reason}"] += 1
        if finish_reason == "abort":
            assert ended is None, f"ended by {reason!r}, but reported as aborted"
            return
        assert (finish_reason, sample["stop_reason"]) == (ended, reason), (ended, reason)
        if not (ended == "stop" and isinstance(reason, str)):
            text += push.flush()
        assert sample["text"] == text, f"{sample['text']!r} is not {text!r}"

    def check_logprobs(self, entry: dict, token: int, logits, params, choice: dict) -> None:
        logprobs = logits - np.logaddexp.reduce(logits)
        assert entry["token_id"] == token and abs(entry["logprob"] - logprobs[token]) < 5 * ROUNDING
        if not params.temperature:
            assert entry["sampler_logprob"] == 0.0
        elif choice["exact"] and not params.drops_tokens:
            slack = ROUNDING * 5 * (1 + max(1, params.repetition_penalty) / params.temperature)
            assert abs(entry["sampler_logprob"] - choice["sampler"]) < slack, (entry, choice)
        best = np.sort(logprobs)[::-1]
        assert len(entry["top"]) <= params.logprobs
        for rank, (other, model, _) in enumerate(entry["top"]):
            assert abs(model - logprobs[other]) < 5 * ROUNDING
            assert model <= best[rank] + 5 * ROUNDING
        self.counts["log-probabilities"] += 1 + len(entry["top"])


# running a story ----------------------------------------------------------------------------------


class Run:
    """A story that runs in an engine."""

    def __init__(self, story: dict, reference: Reference, counts: Counter):
        victim, admission, eviction = story["policies"]
        self.counts, self.reference = counts, reference
        self.llm = build(
            story["era"], story["overlap"], **story["options"], victim=VICTIMS[victim],
            admission=ADMISSIONS[admission], eviction=EVICTIONS[eviction],
        )  # fmt: skip
        self.reader = Reader(self.llm, reference, counts)
        self.requests: dict[int, dict] = {}  # request id -> the request
        self.outputs: list[dict] = []
        self.weights = 0  # the current weights
        self.seeds = random.Random(story["options"]["seed"])  # of requests without a seed
        self.trace = make_trace(self.llm, None) if story["trace"] else None
        if self.trace:
            attach(self.llm, self.trace)
        self.replay = Replay()
        perform = self.llm.guard.perform

        def checked(change):
            try:
                perform(change)
            finally:
                self.check()

        self.llm.guard.perform = checked

    def check(self) -> None:
        check(self.llm)
        self.counts["steps"] += 1
        if self.trace and self.trace.recorder:  # none once the engine is closed
            is_between_steps = not self.has_step_in_flight()
            if is_between_steps:
                self.trace.recorder.catch_up()
            while self.trace.log.lines:
                self.replay.apply(json.loads(self.trace.log.lines.popleft()))
            if is_between_steps:
                compare(self.replay, self.llm.scheduler)

    def has_step_in_flight(self) -> bool:
        loop = self.llm.loop.inner_loop
        return isinstance(loop, AheadLoop) and loop.in_flight is not None

    def remember(self, request_id: int, request: dict) -> dict:
        params = dict(request["params"])
        if params["seed"] is None:
            params["seed"] = self.seeds.getrandbits(63)
        record = {**request, "params": params, "swaps": [({}, self.weights)]}
        self.requests[request_id] = record
        return record

    def make_params(self, request: dict) -> SamplingParams:
        keywords = dict(request["params"])
        if name := keywords.get("logits_processor"):
            keywords["logits_processor"] = PROCESSORS[name]
        return SamplingParams(**keywords)

    def fits(self, request: dict) -> bool:
        """Does the engine accept the request? It may reject one only for its length."""
        try:
            self.llm.check(request["prompt"], self.make_params(request))
        except ValueError as error:
            assert "blocks" in str(error) or "max_model_len" in str(error), error
            self.counts["rejected"] += 1
            return False
        return True

    def verify(self, request_id: int, samples: list[dict]) -> None:
        request = self.requests.pop(request_id)
        params = self.reader.params(request["params"])
        aborted = any(s["finish_reason"] == "abort" for s in samples)
        assert len(samples) == params.n or aborted
        self.counts["requests"] += 1
        for number, sample in enumerate(samples):
            swaps = [(counts.get(number, 0), w) for counts, w in request["swaps"]]
            self.reader.check_sample(request, params, number, sample, swaps)

    def step(self) -> bool:
        """Run one step; returns whether it succeeded."""
        try:
            self.outputs += self.llm.step()
        except Fault:
            self.counts["failed steps"] += 1
            return False
        return True

    def run_event(self, event: tuple) -> None:
        llm, (kind, *args) = self.llm, event
        if kind == "add" and self.fits(args[0]):
            request = args[0]
            number = llm.add_request(
                request["prompt"], self.make_params(request), tools=request["tools"]
            )
            self.remember(number, request)
        elif kind == "step":
            for _ in range(args[0]):
                self.step()
        elif kind == "abort" and self.requests:
            victims = sorted(self.requests)
            llm.abort(victims[args[0] % len(victims)], -1)
            check(llm)
        elif kind == "stream":
            self.stream([request for request in args[0] if self.fits(request)], args[1])
        elif kind == "generate":
            self.generate([request for request in args[0] if self.fits(request)])
        elif kind == "score":
            self.score(args[0])
        elif kind == "weights":
            try:
                llm.update_weights(self.reference.weights[args[0]])
            except Fault:  # the step in flight was lost, and nothing changed
                self.counts["failed steps"] += 1
                return check(llm)
            self.weights = args[0]
            check(llm)
            for number in self.requests.keys() & llm.requests.keys():  # unfinished requests
                sequences = llm.requests[number].sequences
                counts = {seq.index: 2**31 for seq in sequences if seq.finish_reason}
                for seq in [*llm.scheduler.running, *llm.scheduler.waiting]:
                    if seq.request_id == number:
                        counts[seq.index] = len(seq.output)
                self.requests[number]["swaps"].append((counts, args[0]))
            self.counts["new weights"] += 1

    def stream(self, requests: list[dict], leave: int | None) -> None:
        first, tools = next(copy(self.llm._request_ids)), bool(requests) and requests[0]["tools"]
        for i, request in enumerate(requests):
            self.remember(first + i, {**request, "tools": tools})
        samples: dict[tuple, dict] = {}
        events = self.llm.stream(
            [request["prompt"] for request in requests],
            [self.make_params(request) for request in requests],
            tools=tools,
        )
        try:
            with closing(events):
                for count, event in enumerate(events):
                    if count == leave:
                        break
                    empty = {"text": "", "token_ids": []}
                    so_far = samples.setdefault((event["index"], event["sample"]), empty)
                    so_far["text"] += event["text"]
                    so_far["token_ids"] += event["token_ids"]
                    assert not so_far.get("finish_reason"), "an event after the last"
                    so_far |= {k: event[k] for k in ("finish_reason", "stop_reason")}
                else:
                    for i, request in enumerate(requests):
                        n = request["params"].get("n", 1)
                        self.verify(first + i, [samples[i, k] for k in range(n)])
                    self.counts["streams"] += 1
        except Fault:
            self.counts["failed streams"] += 1
        check(self.llm)
        for i in range(len(requests)):
            self.requests.pop(first + i, None)

    def generate(self, requests: list[dict]) -> None:
        first = next(copy(self.llm._request_ids))
        for i, request in enumerate(requests):
            self.remember(first + i, {**request, "tools": True})
        try:
            outputs = self.llm.generate(
                [request["prompt"] for request in requests],
                [self.make_params(request) for request in requests],
                use_tqdm=False,
                tools=True,
            )
        except Fault:
            self.counts["failed generates"] += 1
            outputs = []
        for i in range(len(requests)):
            if outputs:
                self.verify(first + i, outputs[i]["samples"])
            self.requests.pop(first + i, None)

    def score(self, pairs: list[tuple]) -> None:
        prompts, tails = zip(*pairs, strict=True)
        try:
            scores = self.llm.score(prompts, tails)
        except Fault:
            self.counts["failed scores"] += 1
            return
        except ValueError as error:
            assert "blocks" in str(error) or "max_model_len" in str(error), error
            self.counts["rejected"] += 1
            return
        for prompt, tail, logprobs in zip(prompts, tails, scores, strict=True):
            assert len(logprobs) == len(tail)
            self.reference.follow(prompt + tail, self.weights)
            for i, token in enumerate(tail):
                logits = self.reference.logits(prompt + tail[:i], self.weights)
                expected = logits[token] - np.logaddexp.reduce(logits)
                assert abs(logprobs[i] - expected) < 5 * ROUNDING, (logprobs[i], expected)
            self.counts["scored tokens"] += len(tail)

    def run(self, events: list[tuple]) -> None:
        """Run all events, then steps until the last output."""
        llm = self.llm
        for i, event in enumerate(events):
            if event[0] == "fail":  # one failure, in any of the later events
                with failing(llm, event[1], event[2]) as calls:
                    self.finish(events[i + 1 :])
                self.counts["faults"] += calls[0] > event[2]
                break
            self.run_event(event)
        else:
            self.finish([])
        stats = llm.stats()
        names = "preemptions cached_tokens prefill_tokens guessed_tokens accepted_tokens"
        for name in names.split():
            self.counts[name] += stats[name]

    def finish(self, events: list[tuple]) -> None:
        """Run the remaining events, then steps until the last output, and verify all outputs."""
        for event in events:
            if event[0] != "fail":
                self.run_event(event)
        steps = 0
        while not self.llm.is_finished():
            self.step()
            steps += 1
            assert steps < 20_000, "the story does not end"
        assert_idle(self.llm)
        for output in self.outputs:
            self.verify(output["request_id"], output["samples"])
        self.counts["aborted"] += sum(o["finish_reason"] == "abort" for o in self.outputs)
        assert not self.requests, f"requests without an output: {sorted(self.requests)}"


def run_story(story: dict, references: dict, counts: Counter) -> None:
    """Run a story in an engine. Raises the first error."""
    era = story["era"]
    if era not in references:
        references[era] = Reference(era)
    references[era].forget()
    torch.manual_seed(0)
    run = Run(story, references[era], counts)
    run.run(story["events"])
    run.llm.close()


def simpler(event: tuple) -> Iterator[Callable[[tuple], tuple]]:
    """Functions that make an event smaller: with fewer requests, or with fewer parameters."""
    kind, *rest = event
    if kind in ("stream", "generate", "score"):
        for k in reversed(range(len(rest[0]))):
            yield lambda e, k=k: (e[0], e[1][:k] + e[1][k + 1 :], *e[2:])
    names = {name for request in requests_of(event) for name in request["params"]}
    for name in sorted(names - {"max_tokens", "seed"}):

        def without(e: tuple, name: str = name) -> tuple:
            requests = [
                {**a, "params": {n: v for n, v in a["params"].items() if n != name}}
                for a in requests_of(e)
            ]
            return (e[0], requests[0] if e[0] == "add" else requests, *e[2:])

        yield without


def requests_of(event: tuple) -> list[dict]:
    kind, *rest = event
    return [rest[0]] if kind == "add" else rest[0] if kind in ("stream", "generate") else []


def smallest(story: dict, references: dict, seconds: float) -> dict:
    """The shortest story that still fails, as far as it can be found in `seconds`."""
    until = time.perf_counter() + seconds

    def fails(shorter: dict) -> bool:
        try:
            run_story(shorter, references, Counter())
        except Exception:
            return True
        return False

    size = max(1, len(story["events"]) // 2)
    while time.perf_counter() < until:
        at, before = 0, len(story["events"])
        while at < len(story["events"]) and time.perf_counter() < until:
            shorter = {**story, "events": story["events"][:at] + story["events"][at + size :]}
            if fails(shorter):
                story = shorter
            else:
                at += size
        if size == 1 and before == len(story["events"]):
            break
        size = max(1, size // 2)
    for i, event in enumerate(story["events"]):  # then simplify the remaining events
        for simplify in simpler(event):
            smaller = simplify(story["events"][i])
            events = [*story["events"][:i], smaller, *story["events"][i + 1 :]]
            if time.perf_counter() < until and fails({**story, "events": events}):
                story = {**story, "events": events}
    for name in ("trace", "overlap"):
        if story[name] and time.perf_counter() < until and fails({**story, name: False}):
            story = {**story, name: False}
    plain = {**story, "options": {**story["options"], "prompt_lookup": 0}}
    if story["options"].get("prompt_lookup") and time.perf_counter() < until and fails(plain):
        story = plain
    return story


def soak(
    seed: int,
    seconds: float,
    first: int = 0,
    cases: float = math.inf,
    shrink: float = 60,
    say=print,
) -> dict:
    """Run stories from number `first` on, for `seconds` or until `cases` are run. Returns counts.
    If a story failed, they have `failure`: seed, case, error, and the shortest failing story found
    in `shrink` seconds."""
    began, counts, references = time.perf_counter(), Counter(), {}
    torch.set_num_threads(1)
    number, last_report = first, began
    while True:
        story = make_story(f"{seed}:{number}")
        try:
            run_story(story, references, counts)
        except Exception as error:
            say("".join(traceback.format_exception(error)))
            shortest = smallest(story, references, shrink)
            again = f"python benchmarks/soak.py --seed {seed} --case {number}"
            say(f"case {number} of seed {seed} failed: {again}\n{shortest}")
            counts["failures"] += 1
            failure = {"seed": seed, "case": number, "error": repr(error)[:300]}
            return {**report(counts, began, seed), "failure": {**failure, "story": shortest}}
        counts["cases"] += 1
        counts["ahead" if story["overlap"] else "plain"] += 1
        counts["smallest pools"] += story["options"]["num_blocks"] <= 3
        number += 1
        now = time.perf_counter()
        if counts["cases"] >= cases or now - began > seconds:
            return report(counts, began, seed)
        if now - last_report > 60:
            last_report = now
            names = ("cases", "requests", "tokens", "ties")
            say(f"{now - began:6.0f} s: { {name: counts[name] for name in names} }")


def report(counts: Counter, began: float, seed: int) -> dict:
    return {"seed": seed, "seconds": round(time.perf_counter() - began, 1), **dict(counts)}


def main() -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    text = "duration (default: %(default)s)"
    parser.add_argument("--seconds", type=positive, default=3600, help=text)
    text = "random seed of the stories (default: %(default)s)"
    parser.add_argument("--seed", type=int, default=0, help=text)
    parser.add_argument("--case", type=int, help="number of a story to repeat")
    args: argparse.Namespace = parser.parse_args()
    choice = {} if args.case is None else {"first": args.case, "cases": 1}
    result = soak(args.seed, args.seconds, **choice, say=lambda text: print(text, flush=True))
    for name, count in sorted(result.items()):
        if name != "failure":
            print(f"{name:24} {count}")
    print(json.dumps(result))
    sys.exit("failure" in result)


if __name__ == "__main__":
    main()
