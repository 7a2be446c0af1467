"""The calculator in the loop of an engine, on a model that calls it. For what it computes see
test_tools.py."""

import pytest
import torch
from helpers.full_engines import TOOL_GOLDENS, build, chain, everything_is_free, set_overlap

from microvllm import SamplingParams
from microvllm.features.calculator import Calculator, ToolCalls
from microvllm.features.tools import ToolDecoder, find_marks

pytestmark = pytest.mark.usefixtures("one_thread")

RUNS = TOOL_GOLDENS["runs"]
PARAMS = SamplingParams(temperature=0, max_tokens=60)


def run_with_a_call() -> dict:
    """A conversation whose answer has forced tokens."""
    return next(run for run in RUNS if 0 in run["masks"])


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_batched_tokens": 3}, {"num_blocks": 9}])
def test_the_calculator_answers_inside_the_loop_as_nanochats_does(overlap, options):
    with chain(**options) as llm:
        set_overlap(llm, overlap)
        prompts = [run["prompt"] for run in RUNS]
        params = SamplingParams(temperature=0, max_tokens=60)
        outputs = llm.generate(prompts, params, tools=True)
        for run, output in zip(RUNS, outputs, strict=True):
            assert output["token_ids"] == run["tokens"]
            assert output["mask"] == run["masks"] and 0 in output["mask"]
        plain = llm.generate(prompts, params)
        assert all(0 not in output["mask"] for output in plain)
        assert plain[0]["token_ids"] != outputs[0]["token_ids"]
        assert everything_is_free(llm)


def test_chat_calls_the_calculator_unless_tools_is_false():
    params = SamplingParams(temperature=0, max_tokens=60)
    with chain() as llm:
        for run in RUNS:
            (answer,) = llm.chat(run["messages"], params)
            assert (answer["token_ids"], answer["mask"]) == (run["tokens"], run["masks"])
            (plain,) = llm.chat(run["messages"], params, tools=False)
            assert plain["token_ids"] != answer["token_ids"] and 0 not in plain["mask"]
            # nor where the text is looked at for another reason
            pieces = [e["token_ids"] for e in llm.stream([run["prompt"]], params)]
            assert sum(pieces, []) == plain["token_ids"]


def test_a_text_shows_each_call_and_its_result():
    run = run_with_a_call()
    params = SamplingParams(temperature=0, max_tokens=60)
    with chain() as llm:
        (answer,) = llm.chat(run["messages"], SamplingParams(temperature=0, max_tokens=60, n=2))
        for sample in (answer, *answer["samples"]):
            assert sample["text"] == "So:`7*6` = 42  yes!"
            assert sample["tool_calls"] == [{"call": "7*6", "result": "42"}]
        (plain,) = llm.chat(run["messages"], params, tools=False)
        assert plain["tool_calls"] == [] and "`" not in plain["text"]


@pytest.mark.parametrize("era", ["era1_padded", "era1_unpadded", "era2", "era3", "era4", "era5"])
def test_the_era_of_a_checkpoint_does_not_change_a_result(era):
    with build(era, plain=True, num_blocks=20) as llm:
        special = llm.tokenizer.special_tokens
        call = llm.tokenizer.encode("20/2")
        script = [special["<|python_start|>"], *call, special["<|python_end|>"]]

        def write_script(token_ids, logits):
            mask = torch.zeros(logits.shape, dtype=torch.bool)
            mask[script[len(token_ids) - 1]] = True
            return mask

        prompt = [[llm.tokenizer.bos_id]]
        params = SamplingParams(max_tokens=len(script), logits_processor=write_script)
        for tools, result in ((True, "10.0"), ([Calculator(writes_whole=True)], "10")):
            (output,) = llm.generate(prompt, params, use_tqdm=False, tools=tools)
            assert output["tool_calls"][0]["result"] == result


def test_a_call_without_an_answer_is_listed_without_a_result():
    with chain() as llm:
        special = llm.tokenizer.special_tokens
        start, end = special["<|python_start|>"], special["<|python_end|>"]
        tool_calls = ToolCalls(llm.tokenizer)
        forced = [tool_calls.push(i) for i in [start, *llm.tokenizer.encode("1/0"), end]]
        assert not any(forced) and tool_calls.calls == [{"call": "1/0", "result": None}]


@pytest.mark.parametrize("stop", [(), " yes", "42", " = ", "`", "7*6"])
@pytest.mark.parametrize("max_tokens", [60, 11, 9, 8])
def test_streams_and_texts_agree_and_each_token_of_an_event_has_a_mask(stop, max_tokens):
    run = run_with_a_call()
    params = SamplingParams(temperature=0, max_tokens=max_tokens, stop=stop)
    with chain() as llm:
        (output,) = llm.generate([run["prompt"]], params, tools=True)
        assert output["text"] == "So:`7*6` = 42  yes!"[: len(output["text"])]
        assert not stop or stop not in output["text"]
        events = [*llm.stream([run["prompt"]], params, tools=True)]
        assert "".join(event["text"] for event in events) == output["text"]
        assert all(len(event["mask"]) == len(event["token_ids"]) for event in events)
        assert sum([event["mask"] for event in events], []) == output["mask"]
        assert len(output["mask"]) == len(output["token_ids"])
        plain = [*llm.stream([run["prompt"]], params)]
        assert all(event["mask"] == [1] * len(event["token_ids"]) for event in plain)


def test_a_character_that_a_call_cuts_off_is_shown_before_the_call():
    with chain() as llm:
        mark = llm.tokenizer.special_tokens["<|python_start|>"]
        decoder = ToolDecoder(llm.tokenizer, [find_marks(Calculator(), llm.tokenizer)])
        ids = [0xF0, 0x9F, mark, ord("1")]  # a toy vocabulary: the first ids are bytes
        assert "".join(map(decoder.push, ids)) == "\ufffd`1"


def test_forced_tokens_count_towards_max_tokens_and_are_cut_by_it():
    run = run_with_a_call()
    first = run["masks"].index(0)
    with chain() as llm:
        for more in range(3):
            params = SamplingParams(temperature=0, max_tokens=first + more)
            (output,) = llm.generate([run["prompt"]], params, tools=True)
            assert output["token_ids"] == run["tokens"][: first + more]
            assert output["mask"] == run["masks"][: first + more]
            assert output["finish_reason"] == "length"


def test_a_token_that_was_forced_stops_nothing():
    run = run_with_a_call()
    last = len(run["masks"]) - 1 - run["masks"][::-1].index(0)  # the end of a tool's answer
    assert last < len(run["tokens"]) - 1
    stop = (run["tokens"][last],)
    params = SamplingParams(temperature=0, max_tokens=60, stop_token_ids=stop)
    with chain() as llm:
        number = llm.add_request(run["prompt"], params, tools=True)
        while not llm.is_finished():
            for output in llm.step():
                assert (output["request_id"], output["token_ids"]) == (number, run["tokens"])
            # nor when all is made again right after it was forced
            llm.guard.perform(llm.recover)
