"""Mistakes of a user: each is refused by name, and the engine is as it was before."""

import contextlib
import copy
import math
import pickle
import threading
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.goldens import ERAS

from microvllm import LLM, SamplingParams, checkpoint, engine, full, loading, model
from microvllm.features import checks
from microvllm.fused import model as fused_model

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = ERAS / "era5" / "chatsft_checkpoints" / "d4"  # context 400, vocabulary 311
OTHER = ERAS / "era3b" / "chatrl_checkpoints" / "d5"  # context 208
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
GOOD = list(range(1, 30))
TURN = {"role": "user", "content": "a"}


@pytest.fixture(scope="module")
def llm():
    """39 usable blocks of 4: 156 tokens, in a context of 200."""
    with LLM(
        MODEL, device="cpu", attention="sdpa", num_blocks=40, block_size=4, max_model_len=200,
        max_batch_size=8,
    ) as llm:  # fmt: skip
        llm.generate([GOOD], GREEDY, use_tqdm=False)  # so that the prefix cache holds something
        yield llm


@contextmanager
def refused(llm, error, *words):
    """`error` is raised with all the words, and nothing is queued, counted or taken."""
    before, free = llm.stats(), list(llm.scheduler.blocks.pool.cached)
    with pytest.raises(error) as info:
        yield
    assert type(info.value) is error
    for word in words:
        assert str(word) in str(info.value), f"{word!r} is not in: {info.value}"
    assert llm.stats() == before
    assert list(llm.scheduler.blocks.pool.cached) == free
    assert llm.is_finished() and llm.step() == []
    llm.scheduler.blocks.check([])


def assert_still_works(llm):
    (output,) = llm.generate([GOOD], GREEDY, use_tqdm=False)
    assert len(output["token_ids"]) == 10 and output["finish_reason"] == "length"


# prompts -----------------------------------------------------------------------------------------


WRONG_PROMPTS = [
    pytest.param(*case, id=repr(case[0])[:30])
    for case in [
        (None, TypeError, ["NoneType"]),
        (7, TypeError, ["int"]),
        (b"text", TypeError, ["bytes"]),
        ({"role": "user"}, TypeError, ["dict"]),
        ({3, 4}, TypeError, ["set"]),
        (torch.tensor([3.0, 4.0]), TypeError, ["integers", "3.0"]),
        (torch.tensor([[3, 4]]), TypeError, ["integers", "[3, 4]"]),
        (torch.tensor(3), TypeError, ["int"]),
        (torch.tensor([3, 311]), ValueError, ["311"]),
        (torch.tensor([]), ValueError, ["at least one"]),
        ([], ValueError, ["at least one", "''"]),
        ((), ValueError, ["at least one"]),
        (np.array([], dtype=np.int64), ValueError, ["at least one"]),
        ([3, "4"], TypeError, ["integers", "'4'"]),
        ([3, 4.0], TypeError, ["4.0"]),
        ([3, math.nan], TypeError, ["nan"]),
        ([3, None], TypeError, ["None"]),
        ([3, Decimal(4)], TypeError, ["Decimal('4')"]),
        ([3, [4]], TypeError, ["[4]"]),
        ([True, False], TypeError, ["True"]),
        ([3, np.True_], TypeError, ["True"]),
        (np.array([3.0, 4.0]), TypeError, ["3.0"]),
        (np.array([[3, 4]]), TypeError, ["integers"]),
        (["text"], TypeError, ["'text'"]),
        ([3, 311], ValueError, ["311", "vocabulary of 311"]),
        ([3, -1], ValueError, ["-1", "vocabulary"]),
        ([2**80], ValueError, [2**80]),
        (np.array([3, 311]), ValueError, ["311"]),
        ([3] * 500, ValueError, ["500 tokens", "200", "301 too many"]),
    ]
]


@pytest.mark.parametrize("prompt, error, words", WRONG_PROMPTS)
def test_one_wrong_prompt_in_a_list_stops_the_list_before_any_work(llm, prompt, error, words):
    for at in (0, 2):
        prompts = ["good", [3, 4], ""]
        prompts[at] = prompt
        with refused(llm, error, f"prompts[{at}]", *words):
            llm.generate(prompts, GREEDY, use_tqdm=False)
        with refused(llm, error, f"prompts[{at}]", *words):
            next(llm.stream(prompts, GREEDY))
    with refused(llm, error, *words):
        llm.add_request(prompt, GREEDY)


@pytest.mark.parametrize(
    "prompts", [None, 7, b"text", {"a": "b"}, {"a"}, (p for p in "ab")], ids=type
)
def test_prompts_that_are_no_list(llm, prompts):
    with refused(llm, TypeError, "prompts", type(prompts).__name__):
        llm.generate(prompts, GREEDY, use_tqdm=False)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_a_list_of_token_ids_is_one_prompt(llm, kind):
    (expected,) = llm.generate([GOOD], GREEDY, use_tqdm=False)
    for params in (GREEDY, [GREEDY]):
        (output,) = llm.generate(kind(GOOD), params, use_tqdm=False)
        assert output["prompt_token_ids"] == GOOD
        assert output["token_ids"] == expected["token_ids"]
    events = [*llm.stream(kind(GOOD), GREEDY)]
    assert {event["index"] for event in events} == {0}
    assert sum([event["token_ids"] for event in events], []) == expected["token_ids"]
    assert llm.generate(kind([5]), GREEDY, use_tqdm=False)[0]["prompt_token_ids"] == [5]


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_the_rows_of_a_matrix_are_prompts(llm, kind):
    rows = [GOOD[:9], GOOD[9:18]]
    for prompts in (kind(rows), [kind(row) for row in rows], [*kind(rows)]):
        outputs = llm.generate(prompts, [GREEDY] * 2, use_tqdm=False)
        assert [output["prompt_token_ids"] for output in outputs] == rows
        assert all(type(token) is int for o in outputs for token in o["prompt_token_ids"])
    number = llm.add_request(kind(GOOD), GREEDY)
    while not llm.is_finished():
        for output in llm.step():
            assert (output["request_id"], output["prompt_token_ids"]) == (number, GOOD)
    (score,) = llm.score([kind(rows[0])], [kind(rows[1])])
    assert score == llm.score([rows[0]], [rows[1]])[0]


def test_ids_among_texts_and_other_things_are_no_prompt(llm):
    for prompts in ([3, "a"], [3, [4]], [3, 4.0]):
        with refused(llm, TypeError, "prompts[0]", "int", "list of token ids"):
            llm.generate(prompts, GREEDY, use_tqdm=False)
    for prompts in ([True, False], [[[3]]], np.zeros((1, 1, 1), int)):
        with refused(llm, TypeError, "prompts[0]", "integers"):
            llm.generate(prompts, GREEDY, use_tqdm=False)
    with refused(llm, TypeError, "prompts", "int"):
        llm.generate(torch.tensor(3), GREEDY, use_tqdm=False)


def test_no_max_tokens_is_as_far_as_the_context_goes(llm):
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    with LLM(MODEL, device="cpu", num_blocks=40, max_model_len=50) as short:
        (output,) = short.generate(GOOD, params, use_tqdm=False)
    assert len(output["token_ids"]) == 50 - len(GOOD)
    assert (output["finish_reason"], output["stop_reason"]) == ("length", "max_model_len")
    with refused(llm, ValueError, "max_tokens=None", "num_blocks"):  # 156 of 200 fit into the pool
        llm.generate(GOOD, params, use_tqdm=False)


def test_none_is_none_of_a_list_a_filter_or_a_penalty():
    names = "stop stop_token_ids bad_words allowed_token_ids logit_bias logits_processor logprobs"
    names += " top_k top_p min_p min_tokens seed"
    names += " repetition_penalty presence_penalty frequency_penalty"
    assert SamplingParams(**dict.fromkeys(names.split())) == SamplingParams()
    for name in ("temperature", "n", "ignore_eos", "sample_index"):  # what would be none of it?
        with pytest.raises(TypeError, match=name):
            SamplingParams(**{name: None})


def test_a_prompt_too_long_for_the_model_is_told_by_how_much(llm):
    with refused(llm, ValueError, "200 tokens", "max_model_len is 200", "1 too many", "4000"):
        llm.generate([[3] * 200], SamplingParams(max_tokens=1), use_tqdm=False)
    with refused(llm, ValueError, "1001 tokens", "802 too many"):
        llm.add_request([3] * 1001)


def test_a_prompt_too_long_for_the_pool_is_told_by_how_much(llm):
    """156 slots; the last new token is never fed back and needs none."""
    fits = SamplingParams(temperature=0, max_tokens=17, ignore_eos=True)
    (output,) = llm.generate([[5] * 140], fits, use_tqdm=False)
    assert len(output["token_ids"]) == 17 and output["finish_reason"] == "length"
    for max_tokens, over in [(18, 1), (19, 2), (60, 43)]:
        params = SamplingParams(max_tokens=max_tokens)
        with refused(
            llm, ValueError, "140 prompt tokens", f"max_tokens={max_tokens}", "39",
            f": {over} tokens too many", "num_blocks",
        ):  # fmt: skip
            llm.generate([[3], [5] * 140], [GREEDY, params], use_tqdm=False)
    # the context ends at 200: what lies beyond need not fit
    with refused(llm, ValueError, ": 43 tokens too many"):
        llm.add_request([5] * 140, SamplingParams(max_tokens=10_000))
    assert_still_works(llm)


def test_more_samples_than_may_run_at_once(llm):
    with refused(llm, ValueError, "prompts[0]", "n=9", "max_batch_size=8"):
        llm.generate(["a"], SamplingParams(n=9), use_tqdm=False)


def test_stop_tokens_outside_the_vocabulary(llm):
    with refused(llm, ValueError, "stop_token_ids", "[311, 999]", "311"):
        llm.generate(["a"], SamplingParams(stop_token_ids=[5, 311, 999]), use_tqdm=False)


def test_as_many_sampling_params_as_prompts(llm):
    for count in (0, 1, 3):
        with refused(llm, ValueError, "2 prompts", f"{count} sampling_params"):
            llm.generate(["a", "b"], [GREEDY] * count, use_tqdm=False)
    with refused(llm, ValueError, "0 prompts", "1 sampling_params"):
        llm.generate([], [GREEDY], use_tqdm=False)


@pytest.mark.parametrize("params", [0.7, "greedy", {"temperature": 0}, SamplingParams], ids=str)
def test_sampling_params_of_another_type(llm, params):
    with refused(llm, TypeError, "sampling_params"):
        llm.generate(["a"], params, use_tqdm=False)
    with refused(llm, TypeError, "prompts[1]", "sampling_params"):
        llm.generate(["a", "b"], [GREEDY, params], use_tqdm=False)
    with refused(llm, TypeError, "sampling_params"):
        llm.add_request("a", params)


def test_unknown_keywords_of_generate(llm):
    with refused(llm, TypeError, "'temperature'", "did you mean SamplingParams(temperature=...)?"):
        llm.generate(["a"], temperature=0)
    with refused(llm, TypeError, "did you mean use_tqdm?", "sampling_params, tools, use_tqdm"):
        llm.generate(["a"], use_tdqm=False)
    with refused(llm, TypeError, "did you mean tools?"):
        llm.chat([TURN], tool=False)
    with refused(llm, TypeError, "did you mean SamplingParams(max_tokens=...)?"):
        next(llm.stream(["a"], max_token=3))
    with refused(llm, TypeError, "unknown argument 'xyzzy': there are"):
        llm.add_request("a", xyzzy=3)


def test_unknown_parameters_are_told_with_the_nearest_and_all_that_there_are():
    with pytest.raises(TypeError) as info:
        SamplingParams(temprature=0)
    assert "unknown argument 'temprature' (did you mean temperature?): there are" in str(info.value)
    for name in ("stop_token_ids", "logit_bias", "top_p", "max_tokens", "stop"):
        assert f" {name}" in str(info.value)
    with pytest.raises(TypeError, match="'xyzzy': there are"):
        SamplingParams(max_tokens=3, xyzzy=3)


def test_an_unknown_argument_of_the_engine_is_told_with_the_nearest_and_its_own_words():
    for name, near in [("num_block", "num_blocks"), ("soft_cap", "softcap"), ("max_seq_len", "")]:
        with pytest.raises(TypeError) as info:
            LLM(MODEL, **{name: 8})
        said = str(info.value)
        assert f"unknown argument {name!r}" in said and f"did you mean {near}" in said
        for own in ("max_batched_tokens", "victim", "model_path", "softcap", "trace"):
            assert f" {own}" in said.partition("there are")[2]
        assert "self" not in said and "overrides" not in said
    with pytest.raises(TypeError, match=r"did you mean SamplingParams\(temperature=...\)\?"):
        LLM("no/such/place", tempature=1)


def test_nothing_asked_is_nothing_done(llm):
    before = llm.stats()
    assert llm.generate([], use_tqdm=False) == []
    assert llm.generate([], [], use_tqdm=False) == []
    assert llm.generate((), GREEDY, use_tqdm=False) == []
    assert llm.generate([]) == []  # nor a progress bar
    assert llm.stats() == before


def test_empty_text_is_bos_alone(llm):
    for prompts in ("", [""], [[llm.tokenizer.bos_id]]):
        (output,) = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert output["prompt_token_ids"] == [llm.tokenizer.bos_id]
        assert len(output["token_ids"]) == 10
    # text never becomes a special token, not even its name
    (output,) = llm.generate("<|bos|>", GREEDY, use_tqdm=False)
    assert output["prompt_token_ids"].count(llm.tokenizer.bos_id) == 1


def test_text_that_is_no_unicode_is_served(llm):
    """Half a surrogate pair, from a file read with surrogateescape, say."""
    outputs = llm.generate(["\ud800", "caf\udce9", "\0", "\uffff"], GREEDY, use_tqdm=False)
    assert [len(output["token_ids"]) for output in outputs] == [10] * 4


def test_numpy_ids_are_served(llm):
    """As they come out of a data set; the outputs are plain integers again."""
    prompts = [np.array(GOOD, dtype=dtype) for dtype in (np.uint8, np.int16, np.uint64)]
    prompts += [[np.int32(token) for token in GOOD], tuple(GOOD)]
    for output in llm.generate(prompts, GREEDY, use_tqdm=False):
        assert output["prompt_token_ids"] == GOOD
        assert all(type(token) is int for token in output["prompt_token_ids"])
        assert all(type(token) is int for token in output["token_ids"])


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda llm: llm.chat(5), TypeError, ["conversation 0", "int"]),
        (lambda llm: llm.chat(None), TypeError, ["NoneType"]),
        (lambda llm: llm.chat({"role": "user", "content": "a"}), TypeError, ["messages", "dict"]),
        (lambda llm: llm.chat([TURN, 5]), TypeError, ["messages[1]", "int"]),
        (lambda llm: llm.chat([[TURN], [TURN, TURN]]), ValueError, ["conversation 1", "'user'"]),
        (lambda llm: llm.chat([[TURN], "a"]), TypeError, ["conversation 1", "str"]),
        (lambda llm: llm.generate_batch(5), TypeError, ["list of token ids", "int"]),
        (lambda llm: llm.generate_batch([]), ValueError, ["prompts[0]", "at least one"]),
        (lambda llm: llm.generate_batch([5], max_tokens=-1), ValueError, ["max_tokens", "-1"]),
        (lambda llm: llm.score(5, 6), TypeError, ["prompts", "5"]),
        (lambda llm: llm.score("abc", ["d", "e", "f"]), TypeError, ["prompts", "'abc'"]),
        (lambda llm: llm.score(["a"], "b"), TypeError, ["continuations", "'b'"]),
        (lambda llm: llm.score(["a", "b"], ["c", 5]), TypeError, ["continuations[1]", "int"]),
        (lambda llm: llm.update_weights(5), TypeError, ["weights", "5"]),
        (lambda llm: llm.update_weights("sft"), TypeError, ["weights", "'sft'"]),
        (lambda llm: llm.update_weights({"a": np.ones(2)}), TypeError, ["weights", "array"]),
    ],
)
def test_mistakes_in_the_other_calls_are_named_too(llm, call, error, words):
    with refused(llm, error, *words):
        call(llm)


# the engine's own arguments ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("num_threads", 0, ValueError),
        ("num_threads", -1, ValueError),
        ("num_threads", 2**20, ValueError),
        ("num_threads", 1.0, TypeError),
        ("num_threads", True, TypeError),
        ("num_threads", "2", TypeError),
        ("num_blocks", 1, ValueError),
        ("num_blocks", 0, ValueError),
        ("num_blocks", -5, ValueError),
        ("num_blocks", 2.0, TypeError),
        ("num_blocks", "64", TypeError),
        ("num_blocks", True, TypeError),
        ("block_size", 0, ValueError),
        ("block_size", -16, ValueError),
        ("block_size", 16.0, TypeError),
        ("block_size", None, TypeError),
        ("block_size", True, TypeError),
        ("max_batch_size", 0, ValueError),
        ("max_batch_size", -1, ValueError),
        ("max_batch_size", 1.0, TypeError),
        ("max_batch_size", False, TypeError),
        ("max_batched_tokens", 0, ValueError),
        ("max_batched_tokens", "1k", TypeError),
        ("max_batched_tokens", math.nan, TypeError),
        ("max_model_len", 1, ValueError),
        ("max_model_len", 0, ValueError),
        ("max_model_len", 400.0, TypeError),
        ("max_model_len", 4001, ValueError),
        ("seed", -1, ValueError),
        ("seed", 0.5, TypeError),
        ("seed", "7", TypeError),
        ("seed", None, TypeError),
        ("dtype", "float", ValueError),
        ("dtype", torch.int32, ValueError),
        ("device", "gpu0", ValueError),
        ("device", 3.5, ValueError),
        ("attention", "flash", ValueError),
        ("attention", None, ValueError),
        ("attention", "triton", ValueError),
        ("step", 484, FileNotFoundError),
        ("step", -1, ValueError),
        ("step", "483", TypeError),
        ("softcap", "20", ValueError),
        ("round_rotary", 1, ValueError),
        ("temperature", 0.5, TypeError),
    ],
)
def test_an_argument_that_makes_no_sense_is_named_with_its_value(name, value, error):
    with pytest.raises(error) as info:
        LLM(MODEL, **{"device": "cpu"} | {name: value})
    assert type(info.value) is error
    assert name in str(info.value)
    if name != "temperature":  # an unknown name; its value says nothing
        shown = str(value) if error is FileNotFoundError else repr(value)
        assert shown in str(info.value)


def test_a_context_of_up_to_ten_times_the_training_and_no_more():
    """Where the rotary tables of nanochat end."""
    ids = np.random.default_rng(0).integers(0, 311, 2070).tolist()
    with LLM(OTHER, device="cpu", max_model_len=2080, max_batched_tokens=500, softcap=20) as llm:
        (output,) = llm.generate(
            [ids], SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
        )
        assert len(output["token_ids"]) == 10 and output["finish_reason"] == "length"
        with pytest.raises(ValueError, match="2081 tokens.* 2 too many"):
            llm.generate([ids + [0] * 11])
    with pytest.raises(ValueError) as info:
        LLM(OTHER, device="cpu", max_model_len=2081)
    for word in ("max_model_len=2081", "2080", "208", "rotary"):
        assert word in str(info.value)
    # not given, it is the checkpoint's own
    with LLM(OTHER, device="cpu", num_blocks=20) as llm:
        assert llm.max_model_len == 208
        with pytest.raises(ValueError, match="208 tokens, but max_model_len is 208: 1 too many"):
            llm.generate([ids[:208]])


@pytest.mark.parametrize(
    "option, named",
    [
        ({"enable_prefix_caching": "false"}, "enable_prefix_caching"),
        ({"cuda_graphs": 1}, "cuda_graphs"),
        ({"gpu_memory_utilization": 7}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization"),
        ({"num_blocks": 2**31 - 1, "block_size": 2**16}, "num_blocks"),
    ],
)
def test_an_option_of_the_engine_that_makes_no_sense_is_named(option, named):
    with pytest.raises((TypeError, ValueError), match=named):
        LLM(MODEL, **option)


def test_raising_the_limit_is_advised_only_where_it_helps():
    with LLM(MODEL, num_blocks=20, max_model_len=20) as llm:
        with pytest.raises(ValueError, match="may be raised to 4000"):
            llm.generate([[5] * 30])
        with pytest.raises(ValueError, match="3981 too many$"):
            llm.generate([[5] * 4000])


def test_a_context_without_memory_for_its_positions_is_refused_before_any_is_taken(monkeypatch):
    made, real = [], model.rotary

    def rotary(config, recipe, max_len, *where):
        made.append(max_len)
        return real(config, recipe, max_len, *where)

    for module in (model, fused_model):
        monkeypatch.setattr(module, "rotary", rotary)
    need = model.rotary_bytes(checkpoint.load_model(OTHER).config, 400)
    made.clear()
    monkeypatch.setattr(engine, "free_memory", lambda device: need)
    for plain in (False, True):
        with pytest.raises(ValueError, match="KV cache .* and rotary tables.*max_model_len"):
            LLM(OTHER, device="cpu", max_model_len=400, num_blocks=26, plain=plain)
        assert made == [1], "the tables were made before they were compared"
        made.clear()
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: 1000)
    monkeypatch.setattr(loading, "free_memory", lambda device: 1000)
    for load in (checkpoint.load_model, loading.load_model):
        with pytest.raises(
            ValueError, match="enough memory for weights.* positions: [0-9,]+ bytes"
        ):
            load(OTHER)


def test_devices_that_are_none_or_not_here():
    for name in ("gpu", "", "cuda:x", None, 1.5, "xpu", "meta"):
        with pytest.raises(ValueError, match="device.*auto") as info:
            LLM(OTHER, device=name)
        assert repr(name) in str(info.value)
    if not torch.cuda.is_available():
        for name in ("cuda", "cuda:1"):
            with pytest.raises(ValueError, match=f"'{name}' is not available.*auto"):
                LLM(OTHER, device=name)


# the commonest slips -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, told",
    [
        ({"model": "sft"}, "model='sft' is a path, but model takes a live nanochat GPT module"),
        ({"model": Path("a/b")}, f"write model_path={str(Path('a/b'))!r}"),
        ({"model_path": "sft", "tokenizer": "a"}, "tokenizer='a' is a path.*tokenizer_path='a'"),
        (
            {"model_path": torch.nn.Linear(1, 1)},
            "live module .Linear.*LLM.model=..., tokenizer=...",
        ),
    ],
)
def test_a_path_for_a_module_and_a_module_for_a_path(given, told):
    with pytest.raises(TypeError, match=told):
        LLM(**given)


@pytest.mark.parametrize("prompts", [TURN, [TURN], [[TURN]], [[TURN, TURN], [TURN]], (TURN,)])
def test_messages_in_place_of_prompts_are_for_chat(llm, prompts):
    for call in (llm.generate, lambda *args: next(llm.stream(*args))):
        with refused(llm, TypeError, "prompts", "call llm.chat(messages)"):
            call(prompts, GREEDY)
    with refused(llm, TypeError, "call llm.chat(messages)"):
        llm.add_request(prompts[0] if isinstance(prompts, list) else prompts, GREEDY)


def test_a_key_that_an_output_lacks_is_told_with_those_that_it_has(llm):
    (output,) = llm.generate([GOOD], GREEDY, use_tqdm=False)
    with pytest.raises(AttributeError) as info:
        _ = output.outputs  # vLLM's name
    told = str(info.value)
    assert "no attribute 'outputs': it has text, token_ids, " in told and "samples" in told
    assert "output.samples[i]['text']" in told
    assert output.text == output.samples[0]["text"] and not hasattr(output, "outputs")
    event = next(llm.stream([GOOD], GREEDY))
    with pytest.raises(AttributeError, match="no attribute 'outputs': it has index, sample, text"):
        _ = event.outputs
    assert copy.deepcopy(output) == output == pickle.loads(pickle.dumps(output))


# threads -----------------------------------------------------------------------------------------


@pytest.fixture
def two_cpus(monkeypatch):
    """A machine of two CPUs, and a torch that only says so: its threads are not what is tested."""
    number = [2]
    monkeypatch.setattr(checks, "allowed_cpus", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: number[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: number.__setitem__(0, count))
    return number


def test_a_number_of_threads_beyond_the_cpus_is_refused_with_the_numbers(two_cpus):
    with pytest.raises(ValueError) as info:
        LLM(MODEL, num_threads=3)
    told = "num_threads must be between 1 and 2, the CPUs that this process may use, got 3"
    assert str(info.value).startswith(told) and two_cpus == [2]
    assert 1 <= checks.allowed_cpus()


def test_steps_run_with_the_engines_own_number_and_torch_keeps_its_own(two_cpus, monkeypatch):
    seen, plan_step = [], engine.LLM.plan_step

    def step(self):
        seen.append((self.num_threads, torch.get_num_threads()))
        if len(seen) == 2:
            raise RuntimeError("a step that fails")
        return plan_step(self)

    monkeypatch.setattr(engine.LLM, "plan_step", step)
    options = {"device": "cpu", "plain": True, "num_blocks": 20}
    with LLM(MODEL, num_threads=1, **options) as one, LLM(MODEL, **options) as other:
        assert two_cpus == [2]
        one.add_request(GOOD, GREEDY)
        other.add_request(GOOD, GREEDY)
        for llm in (one, other, one):
            with contextlib.suppress(RuntimeError):
                llm.step()
            assert two_cpus == [2]
        one.score([GOOD], [GOOD])
        assert {*seen} == {(1, 1), (None, 2)} and two_cpus == [2]
        two_cpus[0] = 1  # the user's own change
        other.step()
        assert seen[-1] == (None, 1)


def test_the_number_holds_in_each_thread_that_runs_a_step(monkeypatch):
    """Torch has a number for each thread that has used it."""
    monkeypatch.setattr(checks, "allowed_cpus", lambda: 2)
    seen, plan_step = [], engine.LLM.plan_step

    def step(self):
        seen.append(torch.get_num_threads())
        return plan_step(self)

    def other(llm):
        torch.set_num_threads(2)
        llm.step()
        seen.append(torch.get_num_threads())

    monkeypatch.setattr(engine.LLM, "plan_step", step)
    before = torch.get_num_threads()
    try:
        with LLM(MODEL, num_threads=1, device="cpu", plain=True, num_blocks=20) as llm:
            llm.add_request(GOOD, GREEDY)
            thread = threading.Thread(target=other, args=(llm,))
            thread.start()
            thread.join()
    finally:
        torch.set_num_threads(before)  # new threads took the other one's
    assert seen == [1, 2]


def test_a_number_that_a_step_has_set_is_the_engines_from_then_on(two_cpus, monkeypatch):
    """As a backend does while a helper compiles its kernels: it leaves a thread to it."""
    numbers, plan_step = [], engine.LLM.plan_step

    def step(self):
        numbers.append(torch.get_num_threads())
        torch.set_num_threads({2: 1, 1: 2}[numbers[-1]])
        return plan_step(self)

    monkeypatch.setattr(engine.LLM, "plan_step", step)
    with LLM(MODEL, num_threads=2, device="cpu", plain=True, num_blocks=20) as llm:
        llm.add_request(GOOD, GREEDY)
        for _ in range(3):
            llm.step()
            assert two_cpus == [2]
    assert numbers == [2, 1, 2]


def test_loading_runs_with_the_engines_number_and_a_failure_gives_torchs_back(
    two_cpus, monkeypatch
):
    def fails(*_):
        assert torch.get_num_threads() == 1
        raise ValueError("a file that is none")

    monkeypatch.setattr(full, "read_checkpoint", fails)
    with pytest.raises(ValueError, match="a file that is none"):
        LLM(MODEL, num_threads=1, device="cpu")
    assert two_cpus == [2]


def test_tokens_are_the_same_with_one_thread_and_with_torchs(llm):
    (expected,) = llm.generate([GOOD], GREEDY, use_tqdm=False)
    with LLM(MODEL, device="cpu", attention="sdpa", num_blocks=40, num_threads=1) as one:
        (output,) = one.generate([GOOD], GREEDY, use_tqdm=False)
    assert output.token_ids == expected.token_ids


def test_a_card_whose_driver_is_too_old_is_explained(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hints = [(None, "device='auto' takes an available one"), ("the driver is old", "is old")]
    for problem, words in hints:
        monkeypatch.setattr("microvllm.features.checks.cuda_problem", lambda it=problem: it)
        with pytest.raises(ValueError, match=f"device 'cuda' is not available here; .*{words}"):
            checks.check_device("cuda")
