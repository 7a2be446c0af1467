"""How any engine must behave. A test file makes a class of each kind of cases for its engine:

class TestCore(EngineCases):
    build = staticmethod(build)
"""

import contextlib
import itertools
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from microvllm.sampler import SamplingParams
from microvllm.scheduler import WaitingQueue

from .engines import (
    GROWING,
    MIXED,
    SAMPLED,
    SHARED,
    Counters,
    assert_idle,
    check,
    finish,
    greedy,
    growing,
    ids,
    question,
    sampled,
    serve,
)
from .failures import PLACES, Fault, fail_once, failing
from .goldens import MODEL
from .naive import Naive, assert_naive, ending, naive


class Cases:
    """What all kinds of cases need to know about an engine."""

    build: Callable  # (name="era5", **options) -> LLM, over the fixture of an era
    lag = 0  # steps until the tokens of a step are read: 1 in a loop one step ahead


class EngineCases(Cases):
    """The engine against a naive loop over the same model: whatever the pool, the budget, the batch
    and the cache do, every request gets the tokens it would get alone."""

    @pytest.mark.parametrize("name", ["era1_padded", "era3", "era5"])
    def test_mixed_lengths(self, name):
        with self.build(name) as llm:
            assert_naive(serve(llm, MIXED), MIXED, name)

    @pytest.mark.parametrize("caching", [True, False])
    @pytest.mark.parametrize("block_size", [1, 4, 16, 64])
    def test_block_sizes_with_a_cold_and_a_warm_cache(self, block_size, caching):
        with self.build(
            block_size=block_size, num_blocks=1024 // block_size, enable_prefix_caching=caching
        ) as llm:
            for turn in range(2):
                for work in (SHARED, MIXED):
                    outputs = serve(llm, work)
                    assert_naive(outputs, work)
                    for output, (prompt, _) in zip(outputs, work, strict=True):
                        num_full = (len(prompt) - 1) // block_size * block_size
                        hit = num_full if turn and caching else 0
                        assert output["num_cached_tokens"] >= hit
                        assert caching or output["num_cached_tokens"] == 0

    @pytest.mark.parametrize("budget", [1, 7, None])
    def test_token_budgets(self, budget, monkeypatch):
        work = SHARED + MIXED[:9]
        with self.build(max_batched_tokens=budget) as llm:
            counters = Counters.of(llm)
            forward, rows = llm.model.forward, []
            monkeypatch.setattr(
                llm.model,
                "forward",
                lambda batch, kv: rows.append(len(batch.token_ids)) or forward(batch, kv),
            )
            assert_naive(serve(llm, work), work)
            assert max(rows) == min(budget or 1024, counters.num_prefill_tokens)

    @pytest.mark.parametrize(
        ("block_size", "num_blocks", "caching"),
        [(1, 70, True), (4, 19, True), (4, 19, False), (16, 6, True), (64, 4, False)],
    )
    def test_pools_so_small_that_sequences_are_preempted(self, block_size, num_blocks, caching):
        with self.build(
            block_size=block_size, num_blocks=num_blocks, enable_prefix_caching=caching
        ) as llm:
            counters = Counters.of(llm)
            work = growing(3 if block_size < 64 else 36)
            for _ in range(2):
                assert_naive(serve(llm, work), work)
            assert llm.scheduler.num_preemptions > 0
            assert counters.peak_blocks == llm.scheduler.blocks.pool.num_usable

    @pytest.mark.parametrize("max_batch_size", [1, 3])
    def test_never_more_than_max_batch_size_run_at_once(self, max_batch_size):
        with self.build(max_batch_size=max_batch_size) as llm:
            counters = Counters.of(llm)
            assert_naive(serve(llm, MIXED[:8]), MIXED[:8])
        assert counters.most_running == max_batch_size

    def test_everything_at_once(self):
        work = [
            (ids(18, 1), sampled(9, seed=3, n=3)),
            (ids(18, 1), greedy(20)),
            *GROWING[:4],
            (ids(18, 1)[:16], sampled(20, seed=4, n=2)),
        ]
        with self.build(block_size=4, num_blocks=20, max_batched_tokens=7, max_batch_size=5) as llm:
            num_cached = 0
            for _ in range(2):
                outputs = serve(llm, work)
                assert_naive(outputs, work)
                num_cached += sum(output["num_cached_tokens"] for output in outputs)
            assert llm.scheduler.num_preemptions > 0 and num_cached > 0

    # sampling

    def test_a_seed_gives_the_same_tokens_in_any_company(self):
        with self.build() as llm:
            together = serve(llm, SAMPLED)
            assert_naive(together, SAMPLED)
            wanted = [output["token_ids"] for output in together]
            # with a warm cache, and in the other order
            again = serve(llm, SAMPLED[::-1])
            assert [output["token_ids"] for output in again] == wanted[::-1]
            assert any(output["num_cached_tokens"] for output in again)
            # alone
            assert [serve(llm, [request])[0]["token_ids"] for request in SAMPLED] == wanted
        # preempted and computed again
        with self.build(block_size=4, num_blocks=15) as llm:
            assert [o["token_ids"] for o in serve(llm, SAMPLED)] == wanted
            assert llm.scheduler.num_preemptions > 0
        # in pieces
        with self.build(max_batched_tokens=3) as llm:
            assert [o["token_ids"] for o in serve(llm, SAMPLED)] == wanted

    def test_samples_of_a_prompt_are_computed_from_one_prefill(self):
        prompt, params = ids(21, 1), sampled(9, seed=7, n=4)
        with self.build() as llm:
            counters = Counters.of(llm)
            (output,) = serve(llm, [(prompt, params)])
            assert_naive([output], [(prompt, params)])
            assert counters.num_prefill_tokens == 21
        samples = [sample["token_ids"] for sample in output["samples"]]
        assert len({tuple(tokens) for tokens in samples}) == 4
        assert output["token_ids"] == samples[0]  # the first is also at the top level

    def test_a_sample_depends_on_its_seed_and_index_and_on_nothing_else(self):
        prompt = ids(21, 1)
        work = [
            (prompt, sampled(9, seed=7, n=3)),
            (prompt, sampled(9, seed=7)),
            (prompt, sampled(9, seed=8, n=3)),
            (prompt, sampled(9, seed=7, n=2)),
        ]
        with self.build() as llm:
            outputs = serve(llm, work)
        a, b, c, d = ([sample["token_ids"] for sample in output["samples"]] for output in outputs)
        assert b == a[:1] and d == a[:2]  # the same seed and index: the same tokens
        assert len({tuple(tokens) for tokens in a + c}) == 6  # another seed or index: others

    def test_greedy_samples_are_all_the_same(self):
        with self.build(block_size=4) as llm:
            (output,) = serve(llm, [(ids(6, 1), greedy(9, n=3))])
        assert len({tuple(sample["token_ids"]) for sample in output["samples"]}) == 1
        assert_naive([output], [(ids(6, 1), greedy(9, n=3))])

    @pytest.mark.parametrize("num_blocks", [8, 9, 11, 14])
    def test_samples_under_memory_pressure(self, num_blocks):
        work = [(ids(6, 1), sampled(20, seed=1, n=4)), (ids(9, 2), sampled(12, seed=2, n=2))]
        with self.build(block_size=4, num_blocks=num_blocks) as llm:
            assert_naive(serve(llm, work), work)
            assert llm.scheduler.num_preemptions > 0

    def test_top_k_1_is_greedy_at_any_temperature(self):
        hot = sampled(9, 1, top_k=1, temperature=9.0)
        with self.build() as llm:
            a, b = serve(llm, [(ids(9), greedy(9)), (ids(9), hot)])
        assert a["token_ids"] == b["token_ids"]

    def test_the_order_of_temperatures_in_a_batch_is_kept(self):
        temperatures = [0, 2.0, 0, 0.1]
        work = [(ids(9, i), sampled(6, i, temperature=t)) for i, t in enumerate(temperatures)]
        with self.build() as llm:
            assert_naive(serve(llm, work), work)

    # how requests end

    def test_an_end_token_ends_a_request_unless_it_is_ignored(self):
        prompt = ids(9, 3)
        with self.build() as llm:
            eos = llm.tokenizer.eos_ids
            params = ending(prompt, 1, eos)
            work = [(prompt, params), (prompt, replace(params, ignore_eos=True)), MIXED[3]]
            outputs = serve(llm, work)
            assert_naive(outputs, work, eos=eos)
            stopped, ignored, _ = outputs
        assert len(stopped["token_ids"]) == 2 and stopped["finish_reason"] == "stop"
        assert stopped["stop_reason"] == stopped["token_ids"][-1] in eos
        assert len(ignored["token_ids"]) == 20 and ignored["finish_reason"] == "length"
        assert ignored["token_ids"][:2] == stopped["token_ids"]
        assert ignored["stop_reason"] == "max_tokens"

    def test_an_end_token_in_the_prompt_ends_nothing(self):
        with self.build() as llm:
            eos = llm.tokenizer.eos_ids
            prompt = [*ids(5), *eos, *ids(5, 1), *eos]
            params = SamplingParams(temperature=0, max_tokens=6)
            outputs = serve(llm, [(prompt, params)])
            assert_naive(outputs, [(prompt, params)], eos=eos)
            assert len(outputs[0]["token_ids"]) == 6

    def test_stop_token_ids_end_a_request_with_ignore_eos_too(self):
        prompt = ids(9, 3)
        tokens = naive("era5").complete(prompt, sampled(12, 1))
        stop = next(t for i, t in enumerate(tokens) if i > 3 and t not in tokens[:i])
        params = sampled(12, 1, stop_token_ids=(stop,))
        work = [(prompt, params), *MIXED[:4]]
        with self.build() as llm:
            outputs = serve(llm, work)
            assert_naive(outputs, work)
        assert outputs[0]["token_ids"] == tokens[: tokens.index(stop) + 1]
        assert outputs[0]["stop_reason"] == stop

    @pytest.mark.parametrize("length", [1, 15, 16, 17])
    def test_max_tokens_1(self, length):
        work = [(ids(length, i), params) for i, params in enumerate([greedy(1), sampled(1, 3)])]
        with self.build() as llm:
            counters = Counters.of(llm)
            outputs = serve(llm, work)
            assert_naive(outputs, work)
            assert llm.scheduler.num_output_tokens == 2
            assert counters.peak_blocks == llm.scheduler.blocks.blocks_for(length) * 2

    def test_the_context_ends_at_max_model_len(self):
        with self.build(max_model_len=40) as llm:
            work = [(ids(length, length), greedy(30)) for length in (1, 30, 39)]
            outputs = serve(llm, work)
            assert [len(o["token_ids"]) for o in outputs] == [30, 10, 1]
            assert [o["finish_reason"] for o in outputs] == ["length"] * 3
            assert [o["stop_reason"] for o in outputs] == ["max_tokens"] + ["max_model_len"] * 2
            with pytest.raises(ValueError, match=r"40 .*tokens.* max_model_len"):
                llm.add_request(ids(40))
            assert_idle(llm)

    def test_a_context_longer_than_the_checkpoints(self):
        with self.build(max_model_len=600) as llm:  # 400 in the checkpoint
            (output,) = serve(llm, [(ids(390), greedy(30))])
            assert len(output["token_ids"]) == 30


class BundledCases:
    """The model that comes with the project. build_bundled(**options) -> LLM."""

    build_bundled: Callable

    def test_the_bundled_model(self):
        with self.build_bundled(num_blocks=30, max_batched_tokens=16) as llm:
            prompts = ["Who wrote Moby Dick?", "The capital of France", ""]
            work = [(llm.tokenizer.encode(p, bos=True), greedy(10)) for p in prompts]
            outputs = llm.generate(prompts, greedy(10))
            check(llm)
            assert_idle(llm)
        loop = Naive(MODEL)
        for output, (prompt, params) in zip(outputs, work, strict=True):
            assert output["token_ids"] == loop.complete(prompt, params)
            assert output["prompt_token_ids"] == prompt


class RequestCases(Cases):
    """Requests come and go, fail, and are answered; all get the tokens of the naive loop."""

    def test_requests_may_arrive_at_any_time(self):
        with self.build(block_size=4, num_blocks=30, max_batched_tokens=16) as llm:
            counters = Counters.of(llm)
            arrivals, outputs = list(GROWING), {}
            while arrivals or not llm.is_finished():
                if arrivals and counters.num_steps % 5 < 2:
                    llm.add_request(*arrivals.pop(0))
                for output in llm.step():
                    outputs[output["request_id"]] = output
                check(llm)
            assert_naive([outputs[i] for i in range(len(GROWING))], GROWING)

    @pytest.mark.parametrize("n", [1, 3])
    def test_a_request_may_be_aborted_at_any_stage(self, n):
        # 40 tokens at 16 a step: it waits, is computed in part, generates, has forked
        params = sampled(20, seed=3, n=n)
        whole = [naive("era5").complete(ids(40, 2), sampled(20, 3), i) for i in range(n)]
        with self.build(max_batched_tokens=16, enable_prefix_caching=False) as llm:
            for num_steps in [0, 1, 2, 3, 4, 6, 12]:
                other, victim = self.aborted_after(llm, num_steps, params)
                assert_naive([other], [(ids(7, 1), greedy(15))])
                assert victim["finish_reason"] == "abort"
                assert victim["prompt_token_ids"] == ids(40, 2)
                for sample, wanted in zip(victim["samples"], whole, strict=False):
                    assert sample["token_ids"] == wanted[: len(sample["token_ids"])]
                    assert sample["finish_reason"] == "abort" and len(sample["token_ids"]) < 20
                assert (len(victim["token_ids"]) > 0) == (num_steps > 3 + self.lag)

    def aborted_after(self, llm, num_steps: int, params: SamplingParams) -> tuple[dict, dict]:
        """Outputs of a request that goes on and of one that is aborted after some steps."""
        other = llm.add_request(ids(7, 1), greedy(15))
        victim = llm.add_request(ids(40, 2), params)
        outputs = {}
        for _ in range(num_steps):
            outputs |= {o["request_id"]: o for o in llm.step()}
        llm.abort(victim)
        check(llm)
        llm.abort(victim)  # and it is gone: nothing happens
        llm.abort(12345)
        outputs |= finish(llm)
        return outputs[other], outputs[victim]

    def test_a_request_with_one_sample_done_may_be_aborted(self):
        prompt = ids(9, 3)
        with self.build() as llm:
            eos = llm.tokenizer.eos_ids
            params = ending(prompt, 1, eos, n=2)
            request = llm.add_request(prompt, params)
            for _ in range(6):
                assert llm.step() == []
            assert len(llm.scheduler.running) == 1
            llm.abort(request)
            outputs = finish(llm)
        first, second = outputs[request]["samples"]
        assert first["finish_reason"] == "stop" and second["finish_reason"] == "abort"
        assert first["token_ids"] == naive("era5").complete(prompt, params, 0, eos)

    def test_thousands_that_wait_are_aborted_without_a_walk_for_each(self, monkeypatch):
        walks = []
        monkeypatch.setattr(WaitingQueue, "__iter__", lambda queue: walks.append(1) or iter(()))
        with self.build(max_batch_size=2) as llm:
            numbers = [llm.add_request(ids(4), greedy(2)) for _ in range(1000)]
            llm.step()
            for number in numbers[500:]:
                llm.abort(number)
            llm.abort(*numbers)
            assert not walks
            outputs = finish(llm)
            assert {outputs[number]["finish_reason"] for number in numbers} == {"abort"}

    def test_abort_refuses_what_is_no_id(self):
        with self.build("era1_padded", num_blocks=50) as llm:
            number = llm.add_request(ids(4), greedy(2))
            with pytest.raises(TypeError, match="request ids are integers"):
                llm.abort([number])
            assert not llm.is_finished()
            llm.abort(number)
            assert [output["finish_reason"] for output in llm.step()] == ["abort"]

    def test_close_aborts_what_is_unfinished(self):
        llm = self.build()
        llm.add_request(ids(9), greedy(9))
        llm.step()
        llm.close()
        pool = llm.scheduler.blocks.pool
        assert pool.num_free == pool.num_usable

    def test_a_closed_engine_says_so(self):
        llm = self.build()
        events = llm.stream([ids(9)], greedy(9))
        next(events)
        llm.close()
        llm.close()  # again: nothing happens
        for call in (
            lambda: llm.generate([ids(5)], greedy(2)),
            lambda: llm.add_request(ids(5), greedy(2)),
            lambda: list(llm.stream([ids(5)], greedy(2))),
            lambda: llm.step(),
        ):
            with pytest.raises(RuntimeError, match="this LLM was closed: create a new one"):
                call()
        llm.abort(0)
        events.close()
        assert llm.is_finished() or llm.outputs

    def test_outputs_of_others_wait_for_the_next_step(self):
        work = MIXED[:4]
        with self.build() as llm:
            others = [llm.add_request(*request) for request in work[:2]]
            own = llm.generate([work[3][0]], [work[3][1]])
            assert_naive(own, work[3:])
            late = llm.add_request(*work[2])
            outputs = finish(llm)
            assert set(outputs) == {*others, late}
            assert_naive([outputs[i] for i in [*others, late]], work[:3])

    def test_generate_returns_outputs_in_the_order_of_the_prompts(self):
        work = MIXED[::-1]  # the longest first, and the shortest is done first
        with self.build(max_batch_size=3) as llm:
            outputs = llm.generate([p for p, _ in work], [params for _, params in work])
            assert_naive(outputs, work)
            assert_idle(llm)
            assert llm.step() == []

    @pytest.mark.parametrize(
        ("at", "error"),
        [(1, KeyboardInterrupt()), (2, RuntimeError("no memory")), (9, KeyboardInterrupt())],
    )
    def test_a_failed_step_ends_generates_own_requests_and_no_others(self, at, error, monkeypatch):
        with self.build(max_batched_tokens=40) as llm:
            shared = ids(32, 1)
            serve(llm, [(shared, greedy(1))])  # cached, and stale after the failure
            work = [(shared + ids(3, 2), greedy(12)), (ids(50, 3), sampled(9, seed=1, n=2))]
            others = [llm.add_request(*request) for request in work]
            quick = llm.add_request(ids(3, 4), greedy(2))  # done before the later failures
            fail_once(llm, monkeypatch, at, error)
            with pytest.raises(type(error)) as caught:
                llm.generate([ids(10, 5), shared], sampled(30, seed=2))
            assert caught.value is error
            check(llm)
            pool = llm.scheduler.blocks.pool
            assert pool.num_free == pool.num_usable
            outputs = finish(llm)
            assert set(outputs) == {*others, quick}
            wanted = [*work, (ids(3, 4), greedy(2))]
            assert_naive([outputs[i] for i in [*others, quick]], wanted)
            assert_naive(serve(llm, SHARED), SHARED)  # and it goes on as if nothing had been

    @pytest.mark.parametrize("at", [3, 14, 31])
    def test_a_failed_step_in_a_crowded_pool(self, at, monkeypatch):
        with self.build(block_size=4, num_blocks=19) as llm:
            fail_once(llm, monkeypatch, at, RuntimeError("no memory"))
            requests = [llm.add_request(*request) for request in GROWING]
            outputs = {}
            with pytest.raises(RuntimeError, match="no memory"):
                while True:
                    outputs |= {o["request_id"]: o for o in llm.step()}
            outputs |= finish(llm)
            assert_naive([outputs[i] for i in requests], GROWING)

    def test_a_request_that_can_never_fit_is_refused_with_the_numbers(self):
        with self.build(num_blocks=5) as llm:  # 4 blocks of 16 and the null block
            # 69 slots: the last token is never fed back
            with pytest.raises(ValueError, match="5 blocks.* has 4"):
                llm.add_request(ids(60), greedy(10))
            assert_idle(llm)
            work = [(ids(60), greedy(5))]
            assert_naive(serve(llm, work), work)

    def test_prompts_are_texts_or_token_ids(self):
        with self.build() as llm:
            bos = llm.tokenizer.bos_id
            hello = llm.tokenizer.encode("hello")
            params = greedy(4)
            prompts = ["hello", [bos, *hello], np.array([bos, *hello]), ""]
            outputs = llm.generate(prompts, params)
            assert [o["prompt_token_ids"] for o in outputs] == [[bos, *hello]] * 3 + [[bos]]
            assert len({tuple(o["token_ids"]) for o in outputs[:3]}) == 1
            (alone,) = llm.generate("hello", params)
            assert alone["token_ids"] == outputs[0]["token_ids"]
            assert llm.generate([], params) == []
            assert alone.text == alone["text"] == llm.tokenizer.decode(alone["token_ids"])
            with pytest.raises(AttributeError, match="it has .*finish_reason"):
                alone.no_such_key  # noqa: B018

    def test_special_tokens_are_not_shown(self):
        prompt = ids(9, 3)
        with self.build() as llm:
            (output,) = serve(llm, [(prompt, ending(prompt, 1, llm.tokenizer.eos_ids))])
            assert output["text"] == llm.tokenizer.decode(output["token_ids"][:-1])


# samples that fork and copy blocks, chunks, in a small pool
WORK = [
    (ids(18, 1), sampled(7, seed=3, n=3)),
    (ids(18, 1), greedy(9)),
    (ids(9, 2), sampled(12, seed=4, top_k=20)),
    (ids(26, 3), greedy(5)),
]


def run_work(llm, place: str, at: int | None, error=None, work=WORK, places=PLACES):
    """The work, step by step, and an aborted request, with one failure. Returns how often its place
    was called, and the outputs of the work."""
    counters = Counters.of(llm)
    with failing(llm, place, at, error, places) as calls:
        requests = [llm.add_request(*request) for request in work]
        extra = llm.add_request(ids(30, 4), greedy(20))
        outputs, num_failed = {}, 0
        for turn in itertools.count():
            if llm.is_finished():
                break
            assert turn < 300, "no end in sight"
            try:
                outputs |= {output["request_id"]: output for output in llm.step()}
            except (Fault, MemoryError):
                num_failed += 1
            check(llm)
            if counters.num_steps == 8:
                llm.abort(extra)
        assert num_failed == (at is not None)
    assert_idle(llm)
    assert outputs.pop(extra)["finish_reason"] == "abort"
    assert_naive([outputs[i] for i in requests], work)
    return calls[0], [outputs[i] for i in requests]


class FailureCases(Cases):
    """Whatever fails in a step, the exception reaches the caller, all requests get the tokens of a
    run in which nothing failed, and no block is lost."""

    @pytest.mark.parametrize("place", PLACES)
    def test_wherever_a_step_fails_all_get_the_right_tokens(self, place):
        options = {"block_size": 4, "num_blocks": 22, "max_batched_tokens": 16}
        with self.build(**options) as llm:
            count, _ = run_work(llm, place, None)
            assert count
        for at in {0, count // 2, count - 1}:
            with self.build(**options) as llm:
                run_work(llm, place, at, MemoryError() if at else None)

    @pytest.mark.parametrize("place", ["forward", "update"])
    def test_a_failure_during_a_stream_ends_the_stream_and_nothing_else(self, place):
        with self.build(max_batched_tokens=16) as llm:
            other = llm.add_request(*WORK[2])
            with failing(llm, place, 3), pytest.raises(Fault):
                list(llm.stream([ids(20, 5)], greedy(9)))
            check(llm)
            assert_naive([finish(llm)[other]], [WORK[2]])

    @pytest.mark.parametrize("at", [0, 2])
    def test_requests_are_queued_all_or_none(self, at, monkeypatch):
        with self.build() as llm:
            add, calls = llm.scheduler.add, []

            def interrupted(seq):
                calls.append(seq)
                if len(calls) == at + 1:
                    signal.raise_signal(signal.SIGINT)
                add(seq)

            monkeypatch.setattr(llm.scheduler, "add", interrupted)
            for call in (
                lambda: llm.generate([ids(5)] * 4, greedy(4)),
                lambda: list(llm.stream([ids(5)] * 4, greedy(4))),
            ):
                calls.clear()
                with pytest.raises(KeyboardInterrupt):
                    call()
                assert_idle(llm)
                assert llm.step() == []

    @pytest.mark.parametrize("at", range(0, 60, 7))
    def test_a_stream_goes_on_where_it_was_after_another_threads_step_failed(self, at):
        # the texts are read again; events that were sent are not sent twice
        work = [(ids(9, 1), sampled(9, seed=3, n=2)), (ids(20, 2), greedy(12))]
        prompts, params = [list(column) for column in zip(*work, strict=True)]
        with self.build(max_batched_tokens=16) as llm:
            whole = llm.generate(prompts, params)
            texts: dict[tuple, str] = {}
            for count, event in enumerate(llm.stream(prompts, params)):
                key = (event["index"], event["sample"])
                texts[key] = texts.get(key, "") + event["text"]
                if count == at:  # a step of another caller fails
                    with failing(llm, "forward", 0), contextlib.suppress(Fault):
                        llm.step()
            for i, output in enumerate(whole):
                for k, sample in enumerate(output["samples"]):
                    assert texts[i, k] == sample["text"]


# streams and texts, with the bundled model


def everything_is_free(llm) -> bool:
    blocks = llm.scheduler.blocks
    blocks.check(llm.scheduler.running)
    return blocks.pool.num_free == blocks.pool.num_usable and llm.is_finished()


def assert_stream_is_generate(llm, params_class=SamplingParams, **options) -> None:
    """Prompts with two samples each: the pieces of a stream, joined, are the text of generate."""
    prompts = [question(llm, "Tell me a story in the manner of Charles Dickens."), "Once", ""]
    params = [
        params_class(temperature=0.9, max_tokens=40, seed=seed, n=2, **options)
        for seed in (3, 4, 5)
    ]
    whole = llm.generate(prompts, params)
    texts, tokens, reasons = {}, {}, {}
    for event in llm.stream(prompts, params):
        key = event["index"], event["sample"]
        assert key not in reasons, "an event after the last"
        texts[key] = texts.get(key, "") + event["text"]
        tokens[key] = tokens.get(key, []) + event["token_ids"]
        if event["finish_reason"]:
            reasons[key] = event["finish_reason"], event["stop_reason"]
    for i, output in enumerate(whole):
        for k, sample in enumerate(output["samples"]):
            assert texts[i, k] == sample["text"]
            assert tokens[i, k] == sample["token_ids"]
            assert reasons[i, k] == (sample["finish_reason"], sample["stop_reason"])
    assert everything_is_free(llm)


GREEDY = SamplingParams(temperature=0, max_tokens=24)


class TextCases:
    """Streams, chats and texts. A test class has a fixture `llm`: the bundled model."""

    def test_the_pieces_of_a_stream_joined_are_the_text_of_generate(self, llm):
        assert_stream_is_generate(llm)

    def test_a_stream_that_is_left_early_frees_its_blocks(self, llm):
        prompts = ["Once upon a time", "Then"]
        for event in llm.stream(prompts, SamplingParams(max_tokens=50, seed=1)):
            assert event["text"] is not None
            break
        assert everything_is_free(llm)

    def test_two_streams_and_a_request_of_its_own_can_interleave(self, llm):
        params = SamplingParams(temperature=0.8, max_tokens=20, seed=9)
        alone = [llm.generate([p], params)[0]["text"] for p in ("One", "Two", "Three")]
        own = llm.add_request("Three", params)
        streams: list[Iterator | None] = [llm.stream([p], params) for p in ("One", "Two")]
        texts = ["", ""]
        while streams != [None, None]:
            for i, stream in enumerate(streams):
                event = next(stream, None) if stream else None
                if event is None:
                    streams[i] = None
                else:
                    texts[i] += event["text"]
        outputs = []
        while not llm.is_finished():
            outputs += llm.step()
        assert texts == alone[:2]
        assert [(o["request_id"], o["text"]) for o in outputs] == [(own, alone[2])]

    def test_a_stop_token_is_in_the_ids_and_not_in_the_text(self, llm):
        prompt = question(llm, "Who wrote Dracula?")
        plain = llm.generate([prompt], GREEDY)[0]
        token = plain["token_ids"][4]
        params = SamplingParams(temperature=0, max_tokens=24, stop_token_ids=(token,))
        output = llm.generate([prompt], params)[0]
        assert output["token_ids"] == plain["token_ids"][:5]
        assert output["text"] == llm.tokenizer.decode(plain["token_ids"][:4])
        assert (output["finish_reason"], output["stop_reason"]) == ("stop", token)

    def test_an_aborted_request_says_so_and_frees_its_blocks(self, llm):
        params = SamplingParams(max_tokens=100, ignore_eos=True, n=2)
        request = llm.add_request("Once upon", params)
        for _ in range(5):
            assert llm.step() == []
        llm.abort(request)
        (output,) = llm.step()
        assert output["finish_reason"] == "abort"
        assert [len(s["token_ids"]) for s in output["samples"]] == [5, 5]
        assert everything_is_free(llm)

    def test_chat_renders_the_conversation_and_stops_at_the_end_of_the_turn(self, llm):
        messages = [
            {"role": "system", "content": "Who wrote Emma?"},
            {"role": "user", "content": "Who wrote Dracula?"},
        ]
        (output,) = llm.chat(messages, GREEDY)
        assert output["prompt_token_ids"] == llm.tokenizer.render_for_completion(messages)
        assert output["token_ids"][-1] == llm.tokenizer.special_tokens["<|assistant_end|>"]
        assert output["text"] == llm.tokenizer.decode(output["token_ids"][:-1])
        both = llm.chat([messages, messages[1:]], GREEDY)
        assert both[0]["token_ids"] == output["token_ids"] and len(both) == 2

    def test_sample_i_of_n_can_be_drawn_on_its_own(self, llm):
        def draw(**options):
            params = SamplingParams(max_tokens=8, temperature=1.0, seed=11, **options)
            output = llm.generate(["The sea was"], params)[0]
            return [sample["token_ids"] for sample in output["samples"]]

        together = draw(n=4)
        assert len(set(map(tuple, together))) > 1
        assert [draw(sample_index=i)[0] for i in range(4)] == together
        assert draw(sample_index=1, n=3) == together[1:]
