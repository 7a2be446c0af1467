"""Failures on purpose: whatever fails in a step, the exception reaches the caller or its request
says so, everybody else gets the tokens of a run in which nothing failed, and no block is lost."""

import signal
from contextlib import contextmanager, nullcontext
from itertools import count
from unittest import mock

import pytest
from test_engine import (
    FIXTURES,
    assert_idle,
    assert_naive,
    both_loops,
    build,
    check,
    finish,
    greedy,
    ids,
    naive,
    sampled,
    serve,
)

from microvllm import SamplingParams, engine
from microvllm.checkpoint import load_model
from microvllm.features.logits import Sampled
from microvllm.model import rotary_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


class Fault(Exception):
    """What an injected failure raises."""


# where a step can fail: the owner of a function, and its name, which is looked up at every call
PLACES = {
    "schedule": lambda llm: (llm.scheduler, "samples"),
    "allocate": lambda llm: (llm.scheduler.blocks, "take"),
    "hash": lambda llm: (llm.scheduler.blocks, "compute_hashes"),
    "make_batch": lambda llm: (engine, "make_batch"),
    "upload": lambda llm: (llm.runner, "upload"),
    "copy": lambda llm: (llm.cache, "copy_blocks"),
    "forward": lambda llm: (llm.model, "forward"),
    "sample": lambda llm: (llm.runner, "sample"),
    "read": lambda llm: (llm.runner, "read"),
    "update": lambda llm: (llm.scheduler, "update"),
    "logprobs": lambda llm: (Sampled, "logprobs"),
}


@contextmanager
def failing(llm, place: str, at: int | None, error: BaseException | None = None):
    """Inside, call number `at` (from 0) of a place raises a Fault, or what is given. Yields how
    often the place was called, as a list of one number."""
    owner, name = PLACES[place](llm)
    real, calls = getattr(owner, name), [0]

    def call(*args, **kwargs):
        calls[0] += 1
        if calls[0] - 1 == at:
            raise error or Fault(place)
        return real(*args, **kwargs)

    with mock.patch.object(owner, name, call):
        yield calls


# samples that split and copy blocks, chunks, log-probabilities, an aborted one, in a small pool
WORK = [
    (ids(18, 1), sampled(7, seed=3, n=3)),
    (ids(18, 1), greedy(9, logprobs=2)),
    (ids(9, 2), sampled(12, seed=4, top_k=20)),
    (ids(26, 3), greedy(5)),
]


def live(llm, place: str, at: int | None, error=None) -> int:
    """WORK, step by step, with one failure; returns how often its place was called."""
    with failing(llm, place, at, error) as calls:
        requests = [llm.add_request(*request) for request in WORK]
        extra, outputs, failed = llm.add_request(ids(30, 4), greedy(20)), {}, 0
        steps = llm.stats()["steps"]
        for turn in count():
            if llm.is_finished():
                break
            assert turn < 300, "somebody waits for ever"
            try:
                outputs |= {output["request_id"]: output for output in llm.step()}
            except (Fault, MemoryError):
                failed += 1
            check(llm)
            if llm.stats()["steps"] == steps + 8:
                llm.abort(extra)
        assert failed == (at is not None)
    assert_idle(llm)
    assert outputs.pop(extra)["finish_reason"] == "abort"
    assert_naive([outputs[i] for i in requests], WORK)
    entries = outputs[requests[1]]["logprobs"]
    assert [entry["token_id"] for entry in entries] == outputs[requests[1]]["token_ids"]
    return calls[0]


@both_loops
@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_step_fails_everybody_gets_the_right_tokens(place, overlap):
    options = {"block_size": 4, "num_blocks": 22, "max_batched_tokens": 16, "overlap": overlap}
    with build(**options) as llm:
        assert (count := live(llm, place, None))
    for at in {0, count // 2, count - 1}:
        with build(**options) as llm:
            live(llm, place, at, MemoryError() if at else None)


@both_loops
@pytest.mark.parametrize("place", ["forward", "update"])
def test_a_failure_while_scores_and_streams_are_made_ends_those_and_no_others(place, overlap):
    with build(overlap=overlap, max_batched_tokens=16) as llm:
        stranger = llm.add_request(*WORK[2])
        with failing(llm, place, 1), pytest.raises(Fault):
            llm.score([ids(20, 5)], [ids(40, 6)])
        with failing(llm, place, 3), pytest.raises(Fault):
            list(llm.stream([ids(20, 5)], greedy(9)))
        check(llm)
        assert_naive([finish(llm)[stranger]], [WORK[2]])


@both_loops
def test_new_weights_are_in_place_when_the_step_under_way_fails(overlap):
    # it kept the keys and values of the old weights, and forgot that a token was on its way
    weights = load_model(FIXTURES["era5"].directory).state_dict()
    with build(overlap=overlap) as llm:
        request = llm.add_request(*WORK[3])
        for _ in range(3):
            llm.step()
        known = len(llm.scheduler.running[0].tokens) - 26
        with failing(llm, "update", 0 if overlap else None):
            with pytest.raises(Fault) if overlap else nullcontext():
                llm.update_weights({k: w * 1.5 for k, w in weights.items()})
        check(llm)
        tokens = finish(llm)[request]["token_ids"]
        (alone,) = serve(llm, [(ids(26, 3) + tokens[:known], greedy(5 - known))])
        assert tokens[known:] == alone["token_ids"]


# what fails for one request alone -----------------------------------------------------------------


@contextmanager
def unreadable(llm, token: int):
    """Inside, the tokenizer fails on this token."""
    real = llm.tokenizer.token_bytes

    def token_bytes(token_id, skip_special=False):
        if token_id == token:
            raise KeyError(f"no bytes for {token_id}")
        return real(token_id, skip_special)

    with mock.patch.object(llm.tokenizer, "token_bytes", token_bytes):
        yield


@both_loops
@pytest.mark.parametrize("watched", [{}, {"stop": "no such text"}], ids=["at the end", "watched"])
def test_a_request_whose_text_cannot_be_made_says_so_and_no_other_suffers(watched, overlap):
    # it was lost: is_finished() was never true again
    tokens = [naive("era5").complete(prompt, params) for prompt, params in WORK]
    bad = next(t for t in tokens[3] if not any(t in other for other in tokens[1:3]))
    work = [*WORK[1:3], (WORK[3][0], greedy(5, **watched))]
    with build(overlap=overlap) as llm, unreadable(llm, bad):
        *others, failed = serve(llm, work)
        assert_naive(others, work[:2])
        assert failed["finish_reason"] == "error"
        assert failed["stop_reason"] == f"tokenizer: KeyError: 'no bytes for {bad}'"
        known = len(failed["token_ids"])
        assert failed["token_ids"] == tokens[3][:known] and bad in failed["token_ids"]
        if watched:  # up to where it could be read
            at = tokens[3].index(bad)
            assert (known, failed["text"]) == (at + 1, llm.tokenizer.decode(tokens[3][:at]))
        request = llm.add_request(*work[-1])
        outputs = llm.step()
        llm.abort(request)  # it has failed already, or its text as far as it goes cannot be made
        (output,) = outputs + llm.step()
        assert output["finish_reason"] in ("error", "abort")
        assert_idle(llm)


@both_loops
def test_a_stream_is_told_that_its_text_cannot_be_made(overlap):
    tokens = naive("era5").complete(*WORK[3])
    with build(overlap=overlap) as llm, unreadable(llm, tokens[2]):
        events = list(llm.stream([WORK[3][0], WORK[2][0]], [WORK[3][1], WORK[2][1]]))
        last = [[e for e in events if e["index"] == i][-1] for i in (0, 1)]
        assert last[0]["finish_reason"] == "error" and "tokenizer: KeyError" in last[0].stop_reason
        assert last[1]["finish_reason"] == "length"
        assert_idle(llm)


@both_loops
def test_a_processor_fails_among_rows_with_every_filter_and_log_probabilities(overlap):
    # top_p looked for the last likely token of a row that had none left: everybody's step failed
    def fails(tokens, logits):
        raise KeyError("no rule")

    def params(**more):
        return SamplingParams(0.9, 6, seed=1, ignore_eos=True, top_p=0.8, logprobs=3, **more)

    with build(overlap=overlap) as llm:
        bad, good, other = serve(
            llm,
            [
                (ids(9, 1), params(logits_processor=fails, min_p=0.1, top_k=9)),
                (ids(9, 1), params()),
                (ids(9, 1), params(repetition_penalty=1.5, n=2)),
            ],
        )
        assert bad["stop_reason"] == "logits_processor: KeyError: 'no rule'"
        assert len(good["logprobs"]) == 6 and len(other["samples"]) == 2


# interruptions while requests come and go ---------------------------------------------------------


@pytest.mark.parametrize("at", [0, 2])
def test_requests_are_queued_all_or_none(at, monkeypatch):
    with build() as llm:
        add, calls = llm.scheduler.add, []

        def interrupted(seq):
            calls.append(seq)
            if len(calls) == at + 1:
                signal.raise_signal(signal.SIGINT)
            add(seq)

        monkeypatch.setattr(llm.scheduler, "add", interrupted)
        for call in (
            lambda: llm.generate([ids(5)] * 4, greedy(4)),
            lambda: llm.score([ids(5)] * 4, [ids(4)] * 4),
            lambda: list(llm.stream([ids(5)] * 4, greedy(4))),
        ):
            calls.clear()
            with pytest.raises(KeyboardInterrupt):
                call()
            assert_idle(llm)
            assert llm.step() == []


# memory is counted at the start -------------------------------------------------------------------


def test_a_pool_beyond_the_free_memory_is_refused_at_the_start_with_the_numbers(monkeypatch):
    # a CPU gave the addresses, and the system ended the process when they were written to
    with build(num_blocks=100) as llm:
        size = llm.cache.data.nbytes
    monkeypatch.setattr(engine, "free_memory", lambda device: size - 1)
    with pytest.raises(ValueError, match=f"num_blocks=100 .*, and {size - 1:,} are free"):
        build(num_blocks=100)
    with build(num_blocks=None) as llm:  # what is not asked for is made to fit, and half is left
        tables = rotary_bytes(llm.model.config, llm.max_model_len)
        assert size // 2 - size // 50 - tables < llm.cache.data.nbytes <= size // 2 - tables
    monkeypatch.setattr(engine, "free_memory", lambda device: 2**60)  # slots are counted in int32
    with pytest.raises(ValueError, match=f"num_blocks={2**27 + 1} .* more than 2..31 slots"):
        build(num_blocks=2**27 + 1, block_size=16)
    monkeypatch.setattr(engine, "free_memory", lambda device: 100)
    with pytest.raises(
        ValueError, match="no memory for a KV cache of num_blocks=2 .*and 50 are free"
    ):
        build(num_blocks=None)
