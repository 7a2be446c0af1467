"""The core engine against a naive loop over the same model."""

import importlib
import re

import pytest
from helpers.engine_cases import BundledCases, EngineCases
from helpers.engines import (
    GROWING,
    MIXED,
    SHARED,
    Counters,
    assert_idle,
    build,
    finish,
    greedy,
    ids,
    sampled,
    serve,
)
from helpers.goldens import FIXTURES, MODEL
from helpers.naive import assert_naive, naive

from microvllm import engine
from microvllm.runner import Extension, Hooks, Watcher

pytestmark = pytest.mark.usefixtures("one_thread")


class TestCore(EngineCases, BundledCases):
    build = staticmethod(build)

    @staticmethod
    def build_bundled(**options):
        return engine.LLM(MODEL, device="cpu", **options)


@pytest.mark.parametrize("name", ["era1_padded", "era3", "era5"])
def test_the_naive_loop_itself_has_nanochats_tokens(name):
    prompt = next(p for p in FIXTURES[name].json["prompts"] if p["length"] == 17)
    tokens = naive(name).complete(prompt["ids"], greedy(12))
    assert tokens == prompt["greedy_tokens"][:12]


@pytest.mark.parametrize("name", FIXTURES)
def test_every_era_has_nanochats_tokens(name):
    prompts = FIXTURES[name].json["prompts"]
    with build(name, max_model_len=500) as llm:  # some prompts are longer than the context
        work = [(p["ids"], greedy(min(16, len(p["greedy_tokens"])))) for p in prompts]
        for output, prompt in zip(serve(llm, work), prompts, strict=True):
            assert output["token_ids"] == prompt["greedy_tokens"][: len(output["token_ids"])]


def test_one_pool_serves_one_workload_after_another():
    with build(block_size=4, num_blocks=50, max_batched_tokens=16) as llm:
        outputs = []
        for work in (SHARED, MIXED[:6], GROWING, SHARED):
            outputs += serve(llm, work)
            assert_naive(outputs[-len(work) :], work)
        assert llm.scheduler.num_preemptions > 0
        assert any(output["num_cached_tokens"] for output in outputs)


def test_the_core_counts_its_blocks_to_the_last():
    limits = {"block_size": 4, "max_batch_size": 2, "max_model_len": 19}
    with build(num_blocks=None, **limits) as llm:
        assert llm.scheduler.blocks.pool.num_usable == 2 * 5  # two of 19 tokens
        assert llm.config.num_blocks == 11
    with build(num_blocks=5, **limits) as llm:  # 4 and the null block
        work = [(ids(7), greedy(10))]  # 16 slots: the last token is never fed back
        assert_naive(serve(llm, work), work)
        with pytest.raises(ValueError, match="5 blocks are needed, but the pool has 4"):
            llm.add_request(ids(7), greedy(11))


def test_rotary_tables_are_no_longer_than_a_sequence_that_fits():
    with build(num_blocks=5, block_size=4) as llm:
        assert llm.max_positions == 17 == len(llm.model.cos)
    with build(num_blocks=200, max_model_len=50) as llm:
        assert llm.max_positions == 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 9}, "9 samples, but max_batch_size is 4"),
        ({"max_tokens": 99}, "7 blocks are needed, but the pool has 6"),
    ],
)
def test_a_request_that_can_never_run_is_refused(options, message):
    with build(max_batch_size=4, num_blocks=7) as llm:
        with pytest.raises(ValueError, match=re.escape(message)):
            llm.generate([ids(3), ids(4)], engine.SamplingParams(**options))
        with pytest.raises(ValueError, match=r"prompts\[1\]: 400 prompt tokens, but max_model_len"):
            llm.generate([ids(3), ids(400)], greedy(2))
        with pytest.raises(ValueError, match="2 prompts but 1 sampling_params"):
            llm.generate([ids(3), ids(4)], [greedy(2)])
        with pytest.raises(TypeError, match="unknown argument 'tools': there are none"):
            llm.generate([ids(3)], greedy(2), tools=True)
        assert_idle(llm)


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match="they do not belong together; give tokenizer_path"):
        engine.LLM(
            FIXTURES["era5"].directory, tokenizer_path=MODEL.parent / "tokenizer", device="cpu"
        )


def test_the_described_names_are_in_the_engines_module():
    module = importlib.import_module("microvllm.engine")
    names = "LLM BlockManager PagedKVCache Scheduler SequenceKVView load_model _find_last_step"
    assert all(hasattr(module, name) for name in names.split())
    assert "_find_last_step" not in module.__all__


# hooks --------------------------------------------------------------------------------------------


class Recorder(Extension):
    """Notes which hooks are called."""

    options = ("color",)

    def __init__(self):
        self.calls = []

    def on_request(self, request):
        self.calls.append(("request", request.options.get("color")))
        request.needs_text = True

    def on_queue(self, request):
        self.calls.append("queue")

    def on_begin(self):
        self.calls.append("begin")

    def on_plan(self, plan):
        self.calls.append("plan")

    def on_batch(self, plan, batch):
        self.calls.append("batch")

    def on_hidden(self, plan, hidden):
        self.calls.append(("hidden", len(hidden)))

    def on_sampled(self, plan, batch, logits, token_ids):
        assert len(logits) == len(token_ids) == len(plan.draws)
        self.calls.append("sampled")

    def on_results(self, plan):
        self.calls.append("results")

    def on_step(self, plan):
        self.calls.append("step")

    def watch(self, request, seq, text):
        recorder = self

        class Seen(Watcher):
            def on_token(self, seq, token_id, new_text):
                recorder.calls.append("token")

        return Seen()

    def on_sample_output(self, request, seq, output):
        output["index"] = seq.index

    def on_output(self, request, output):
        output["color"] = request.options["color"]

    def on_reset(self):
        self.calls.append("reset")

    def on_close(self):
        self.calls.append("close")


def test_hooks_are_called_in_the_order_of_a_step():
    step = ["begin", "plan", "batch", ("hidden", 1), "sampled", "results", "token", "step"]
    with build() as llm:
        recorder = Recorder()
        llm.add_extension(recorder)
        (output,) = llm.generate([ids(5)], greedy(2), color="red")
        assert recorder.calls == [("request", "red"), "queue", *step, *step]
        assert output["color"] == "red" and output["samples"][0]["index"] == 0
        recorder.calls.clear()
        llm.guard.perform(llm.reset)
        llm.remove_extension(recorder)
        llm.remove_extension(recorder)
        llm.generate([ids(5)], greedy(2))
        assert recorder.calls == ["reset"] and llm.extensions == ()
        llm.add_extension(recorder)
    assert recorder.calls == ["reset", "close"]


def test_only_hooks_that_an_extension_overrides_are_called():
    class One(Extension):
        def on_plan(self, plan):
            """Nothing."""

    one, none = One(), Extension()
    hooks = Hooks([none, one, none])
    assert hooks.on_plan == [one.on_plan]
    lists = [value for name, value in vars(hooks).items() if name not in ("extensions", "on_plan")]
    assert lists == [[]] * len(lists)
    assert hooks.extensions == (none, one, none)


def test_an_engine_is_freed_with_its_last_user():
    import gc
    import weakref

    gc.disable()
    try:
        llm = build()
        llm.generate([ids(5)], greedy(3))
        next(llm.stream([ids(5)], greedy(3)))
        cache = weakref.ref(llm.cache)
        del llm
        assert cache() is None
    finally:
        gc.enable()


def test_counters_count_what_is_computed():
    with build() as llm:
        counters = Counters.of(llm)
        serve(llm, [(ids(9), greedy(4)), (ids(9), greedy(4))])
        assert (counters.num_steps, counters.num_prefill_tokens) == (4, 18)


def test_sample_index_selects_one_of_the_samples_of_a_seed():
    with build() as llm:
        prompt = ids(20, 3)
        together = serve(llm, [(prompt, sampled(8, seed=4, n=3))])[0]["samples"]
        texts = [sample["token_ids"] for sample in together]
        assert len({tuple(token_ids) for token_ids in texts}) == 3
        for index, token_ids in enumerate(texts):
            params = sampled(8, seed=4, sample_index=index)
            assert serve(llm, [(prompt, params)])[0]["token_ids"] == token_ids


def test_after_an_error_a_request_waits_for_all_its_samples():
    prompt = ids(20, 3)
    with build() as llm:
        whole = serve(llm, [(prompt, sampled(8, seed=4, n=2))])[0]["samples"]
        first, second = [sample["token_ids"] for sample in whole]
        stop = next(token_id for token_id in first[1:4] if token_id not in second)
        params = sampled(8, seed=4, n=2, stop_token_ids=[stop])
        request_id = llm.add_request(prompt, params)
        sequences = llm.requests[request_id].sequences
        while sequences[0].finish_reason is None:
            assert not llm.step()
        with pytest.raises(ZeroDivisionError):
            llm.guard.perform(lambda: 1 / 0)
        output = finish(llm)[request_id]
    expected = [first[: first.index(stop) + 1], second]
    assert [sample["token_ids"] for sample in output["samples"]] == expected
    reasons = [sample["finish_reason"] for sample in output["samples"]]
    assert reasons == ["stop", "length"]


class Reader(Extension):
    """Notes the tokens that its watchers see."""

    def __init__(self):
        self.token_ids = []

    def on_request(self, request):
        request.needs_text = True

    def watch(self, request, seq, text):
        watcher = Watcher()
        watcher.on_token = lambda seq, token_id, new_text: self.token_ids.append(token_id)
        return watcher


def test_every_watcher_of_a_sample_sees_each_token():
    with build() as llm:
        readers = [Reader(), Reader()]
        for reader in readers:
            llm.add_extension(reader)
        output = serve(llm, [(ids(9), greedy(5))])[0]
    assert [reader.token_ids for reader in readers] == [output["token_ids"]] * 2


def test_a_stop_token_of_the_request_is_no_part_of_the_text():
    with build() as llm:
        prompt = ids(9)
        token_ids = serve(llm, [(prompt, greedy(8))])[0]["token_ids"]
        stop = next(t for i, t in enumerate(token_ids[1:], 1) if t not in token_ids[:i])
        params = greedy(8, stop_token_ids=[stop])
        assert llm.tokenizer.decode([stop])
        kept = token_ids[: token_ids.index(stop)]
        (output,) = serve(llm, [(prompt, params)])
        events = list(llm.stream([prompt], params))
        assert output["token_ids"] == [*kept, stop] == sum([e.token_ids for e in events], [])
        text = llm.tokenizer.decode(kept)
        assert output["text"] == text == "".join([event.text for event in events])


def test_the_text_of_an_aborted_request_has_all_its_tokens():
    with build() as llm:
        request_id = llm.add_request(ids(9), greedy(20))
        for _ in range(6):
            assert not llm.step()
        llm.abort(request_id)
        output = finish(llm)[request_id]
        assert output["finish_reason"] == "abort" and len(output["token_ids"]) == 6
        assert output["text"] == llm.tokenizer.decode(output["token_ids"])
