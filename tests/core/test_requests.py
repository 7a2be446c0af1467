"""Requests come and go, fail, and are answered; everybody gets the tokens of the naive loop."""

import time

import numpy as np
import pytest
from test_engine import (
    FIXTURES,
    GROWING,
    MIXED,
    SHARED,
    assert_idle,
    assert_naive,
    both_loops,
    build,
    check,
    ending,
    finish,
    greedy,
    ids,
    naive,
    sampled,
    serve,
)

from microvllm import LLM, SamplingParams, engine
from microvllm.scheduler import WaitingQueue

pytestmark = pytest.mark.usefixtures("one_thread")


# requests come and go -----------------------------------------------------------------------------


@both_loops
def test_requests_may_arrive_at_any_time(overlap):
    with build(block_size=4, num_blocks=30, max_batched_tokens=16, overlap=overlap) as llm:
        arrivals, outputs = list(GROWING), {}
        while arrivals or not llm.is_finished():
            if arrivals and llm.stats()["steps"] % 5 < 2:
                llm.add_request(*arrivals.pop(0))
            for output in llm.step():
                outputs[output["request_id"]] = output
            check(llm)
        assert_naive([outputs[i] for i in range(len(GROWING))], GROWING)


def aborted_after(llm, steps: int, params: SamplingParams) -> tuple[dict, dict]:
    """Outputs of a request that goes on and of one that is aborted after so many steps."""
    other = llm.add_request(ids(7, 1), greedy(15))
    victim = llm.add_request(ids(40, 2), params)
    outputs = {}
    for _ in range(steps):
        outputs |= {o["request_id"]: o for o in llm.step()}
    llm.abort(victim)
    check(llm)
    llm.abort(victim)  # and it is gone: nothing happens
    llm.abort(12345)
    outputs |= finish(llm)
    return outputs[other], outputs[victim]


@both_loops
@pytest.mark.parametrize("n", [1, 3])
def test_a_request_may_be_aborted_at_any_stage(n, overlap):
    # 40 tokens at 16 a step: it waits, is computed in part, generates, has split into samples
    params, whole = (
        sampled(20, seed=3, n=n),
        [naive("era5").complete(ids(40, 2), sampled(20, 3), i) for i in range(n)],
    )
    with build(max_batched_tokens=16, enable_prefix_caching=False, overlap=overlap) as llm:
        for steps in [0, 1, 2, 3, 4, 6, 12]:
            other, victim = aborted_after(llm, steps, params)
            assert_naive([other], [(ids(7, 1), greedy(15))])
            assert victim["finish_reason"] == "abort"
            assert victim["prompt_token_ids"] == ids(40, 2)
            for sample, wanted in zip(victim["samples"], whole, strict=False):
                assert sample["token_ids"] == wanted[: len(sample["token_ids"])]
                assert sample["finish_reason"] == "abort" and len(sample["token_ids"]) < 20
            assert (len(victim["token_ids"]) > 0) == (steps > 3 + overlap)


@both_loops
def test_a_request_with_one_sample_done_may_be_aborted(overlap):
    prompt = ids(9, 3)
    with build(overlap=overlap) as llm:
        eos = llm.tokenizer.eos_ids
        params = ending(prompt, 1, eos, n=2)
        request = llm.add_request(prompt, params)
        for _ in range(6):
            assert llm.step() == []
        assert llm.stats()["running"] == 1
        llm.abort(request)
        outputs = finish(llm)
    first, second = outputs[request]["samples"]
    assert first["finish_reason"] == "stop" and second["finish_reason"] == "abort"
    assert first["token_ids"] == naive("era5").complete(prompt, params, 0, eos)


def test_thousands_that_wait_are_aborted_without_a_walk_for_each(monkeypatch):
    walks = []
    monkeypatch.setattr(WaitingQueue, "__iter__", lambda queue: walks.append(1) or iter(()))
    with build(plain=True, max_batch_size=2) as llm:
        numbers = [llm.add_request(ids(4), greedy(2)) for _ in range(1000)]
        llm.step()
        for number in numbers[500:]:
            llm.abort(number)
        llm.abort(*numbers)
        assert not walks
        outputs = finish(llm)
        assert {outputs[number]["finish_reason"] for number in numbers} == {"abort"}
        assert llm.scheduler.blocks.num_free == llm.scheduler.blocks.num_usable


def test_the_cores_own_abort_refuses_what_is_no_id():
    fixture = FIXTURES["era1_padded"]
    with engine.LLM(fixture.directory, tokenizer_path=fixture.tokenizer, num_blocks=50) as llm:
        number = llm.add_request(ids(4), SamplingParams(max_tokens=2, temperature=0))
        with pytest.raises(TypeError, match="request ids are integers"):
            llm.abort([number])
        assert not llm.is_finished()
        llm.abort(number)
        assert [output["finish_reason"] for output in llm.step()] == ["abort"]


def test_close_aborts_what_is_unfinished():
    llm = build()
    llm.add_request(ids(9), greedy(9))
    llm.step()
    llm.close()
    assert llm.scheduler.blocks.num_free == llm.scheduler.blocks.num_usable


@both_loops
def test_outputs_of_strangers_wait_for_the_next_step(overlap):
    work = MIXED[:4]
    with build(overlap=overlap) as llm:
        strangers = [llm.add_request(*request) for request in work[:2]]
        own = llm.generate([work[3][0]], [work[3][1]])
        assert_naive(own, work[3:])
        late = llm.add_request(*work[2])
        outputs = finish(llm)
        assert set(outputs) == {*strangers, late}
        assert_naive([outputs[i] for i in [*strangers, late]], work[:3])


def test_generate_returns_outputs_in_the_order_asked():
    work = MIXED[::-1]  # the longest first, and the shortest is done first
    with build(max_batch_size=3) as llm:
        outputs = llm.generate([p for p, _ in work], [params for _, params in work])
        assert_naive(outputs, work)
        assert_idle(llm)
        assert llm.step() == []


# failures -----------------------------------------------------------------------------------------


def fail_once(llm: LLM, monkeypatch, at: int, error: BaseException) -> None:
    """Let the forward number `at` leave rubbish all over the cache, and raise."""
    forward, calls = llm.model.forward, []

    def failing(batch, cache):
        calls.append(batch)
        if len(calls) == at:
            cache.data.fill_(7.0)
            raise error
        return forward(batch, cache)

    monkeypatch.setattr(llm.model, "forward", failing)


@both_loops
@pytest.mark.parametrize(
    ("at", "error"),
    [(1, KeyboardInterrupt()), (2, RuntimeError("no memory")), (9, KeyboardInterrupt())],
)
def test_a_failed_step_takes_generates_own_requests_and_no_others(at, error, overlap, monkeypatch):
    with build(max_batched_tokens=40, overlap=overlap) as llm:
        shared = ids(32, 1)
        serve(llm, [(shared, greedy(1))])  # cached, and stale after the failure
        work = [(shared + ids(3, 2), greedy(12)), (ids(50, 3), sampled(9, seed=1, n=2))]
        strangers = [llm.add_request(*request) for request in work]
        quick = llm.add_request(ids(3, 4), greedy(2))  # done before the later failures
        fail_once(llm, monkeypatch, at, error)
        with pytest.raises(type(error)) as caught:
            llm.generate([ids(10, 5), shared], sampled(30, seed=2))
        assert caught.value is error
        check(llm)
        assert llm.scheduler.blocks.num_free == llm.scheduler.blocks.num_usable
        outputs = finish(llm)
        assert set(outputs) == {*strangers, quick}
        assert_naive([outputs[i] for i in [*strangers, quick]], [*work, (ids(3, 4), greedy(2))])
        assert_naive(serve(llm, SHARED), SHARED)  # and it goes on as if nothing had been


@both_loops
def test_a_failed_step_in_a_crowded_pool(overlap, monkeypatch):
    for at in (3, 14, 31):
        with build(block_size=4, num_blocks=19, overlap=overlap) as llm:
            fail_once(llm, monkeypatch, at, RuntimeError("no memory"))
            requests = [llm.add_request(*request) for request in GROWING]
            outputs = {}
            with pytest.raises(RuntimeError, match="no memory"):
                while True:
                    outputs |= {o["request_id"]: o for o in llm.step()}
            outputs |= finish(llm)
            assert_naive([outputs[i] for i in requests], GROWING)


# too large ----------------------------------------------------------------------------------------


def test_a_request_that_can_never_fit_is_refused_with_the_numbers():
    with build(num_blocks=5) as llm:  # 4 blocks of 16 and the sink
        with pytest.raises(ValueError) as refusal:
            llm.add_request(ids(60), greedy(10))
        # 69 slots: the last token is never fed back
        for number in ("60 prompt", "max_tokens=10", "5 blocks", "has 4", "5 tokens too many"):
            assert number in str(refusal.value)
        assert "num_blocks" in str(refusal.value)
        assert_idle(llm)
        work = [(ids(60), greedy(5))]
        assert_naive(serve(llm, work), work)


# outputs, numbers, progress -----------------------------------------------------------------------


def test_prompts_are_texts_or_token_ids():
    with build() as llm:
        bos = llm.tokenizer.bos_id
        hello = llm.tokenizer.encode("hello")
        params = greedy(4)
        outputs = llm.generate(["hello", [bos, *hello], np.array([bos, *hello]), ""], params)
        assert [o["prompt_token_ids"] for o in outputs] == [[bos, *hello]] * 3 + [[bos]]
        assert len({tuple(o["token_ids"]) for o in outputs[:3]}) == 1
        (alone,) = llm.generate("hello", params)
        assert alone["token_ids"] == outputs[0]["token_ids"]
        assert llm.generate([], params) == []
        assert alone.text == alone["text"] == llm.tokenizer.decode(alone["token_ids"])
        with pytest.raises(AttributeError):
            alone.no_such_key  # noqa: B018


def test_special_tokens_are_not_shown():
    prompt = ids(9, 3)
    with build() as llm:
        (output,) = serve(llm, [(prompt, ending(prompt, 1, llm.tokenizer.eos_ids))])
        assert output["text"] == llm.tokenizer.decode(output["token_ids"][:-1])


def test_stats_add_up():
    with build(num_blocks=60) as llm:
        start = time.perf_counter()
        outputs = serve(llm, SHARED)
        seconds, stats = time.perf_counter() - start, llm.stats()
        total = sum(len(prompt) for prompt, _ in SHARED)
        assert stats["prompt_tokens"] == total
        assert stats["output_tokens"] == sum(len(o["token_ids"]) for o in outputs)
        assert stats["cached_tokens"] == sum(o["num_cached_tokens"] for o in outputs) > 0
        assert stats["prefill_tokens"] == total - stats["cached_tokens"]
        assert stats["steps"] == max(params.max_tokens for _, params in SHARED)
        assert stats["preemptions"] == stats["waiting"] == 0
        assert (stats["num_blocks"], stats["block_size"]) == (59, 16)
        assert stats["prefill_seconds"] > 0 and stats["decode_seconds"] > 0
        assert stats["prefill_seconds"] + stats["decode_seconds"] <= seconds


def test_an_output_that_is_computed_again_is_no_prefill():
    with build(enable_prefix_caching=False) as llm:
        llm.add_request(ids(9), greedy(6))
        for _ in range(3):
            llm.step()
        llm.scheduler.preempt(*llm.scheduler.running)
        llm.step()
        assert llm.stats()["prefill_tokens"] == 9 + 9
