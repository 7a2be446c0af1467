"""Stop strings, with the bundled model."""

from dataclasses import replace

import pytest
from helpers.engine_cases import assert_stream_is_generate
from helpers.engines import question
from helpers.full_engines import everything_is_free, set_overlap
from helpers.goldens import MODEL

from microvllm import LLM, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def llm():
    with LLM(MODEL, num_blocks=400) as llm:
        yield llm


def test_a_stop_string_may_straddle_tokens_and_is_cut_off(llm):
    prompt = question(llm, "Who wrote Dracula?")
    text = llm.generate([prompt], GREEDY)[0]["text"]
    assert text == "Dracula was written by Bram Stoker."
    for stop in ("ula w", "Stok", "by Bram S", "."):
        params = SamplingParams(temperature=0, max_tokens=24, stop=stop)
        output = llm.generate([prompt], params)[0]
        assert output["text"] == text[: text.index(stop)]
        assert (output["finish_reason"], output["stop_reason"]) == ("stop", stop)
        shown = llm.tokenizer.decode(output["token_ids"])
        assert stop in shown and not llm.tokenizer.decode(output["token_ids"][:-1]).count(stop)
        # nor does a stream let the beginning of a stop string out
        assert "".join(e["text"] for e in llm.stream([prompt], params)) == output["text"]


def test_of_several_stop_strings_the_first_in_the_text_ends_it(llm):
    prompt = question(llm, "Who wrote Dracula?")
    # " written" is one token, and completes all of these at once
    for stops, ends in ((("tt", "ri"), "ri"), (("en", "s wr", "it"), "s wr")):
        params = SamplingParams(temperature=0, max_tokens=24, stop=stops)
        assert llm.generate([prompt], params)[0]["stop_reason"] == ends, stops


@pytest.mark.parametrize("stop", [("the",), (" t", "and the"), ("\ufffd",)])
def test_a_stream_lets_nothing_out_that_is_cut_off(llm, stop):
    assert_stream_is_generate(llm, SamplingParams, stop=stop)


def test_the_loop_that_runs_one_step_ahead_makes_the_same_tokens():
    prompts = ["Once upon a time", "The", "A ship", "Whence", "I saw"]
    params = [
        SamplingParams(temperature=t, max_tokens=m, seed=7, n=n, stop=stop)
        for t, m, n, stop in [
            (0.9, 30, 1, ()),
            (0, 1, 1, ()),
            (0.7, 17, 3, ()),
            (1, 25, 1, ("e",)),
            (0, 30, 1, ()),
        ]
    ]
    outputs = []
    for overlap in (False, True):
        for num_blocks in (400, 7):
            with LLM(MODEL, num_blocks=num_blocks, max_batch_size=4) as llm:
                set_overlap(llm, overlap)
                outputs.append([o["samples"] for o in llm.generate(prompts, params)])
                assert everything_is_free(llm)
                assert (llm.stats()["preemptions"] > 0) == (num_blocks == 7)
    assert all(o == outputs[0] for o in outputs[1:])


@pytest.mark.parametrize("how", ["generate", "stream"])
def test_min_tokens_holds_back_stop_strings_too(llm, how):
    prompt = question(llm, "Who wrote Dracula?")
    plain = llm.generate([prompt], replace(GREEDY, ignore_eos=True))[0]
    pieces = [llm.tokenizer.decode([token]) for token in plain["token_ids"]]
    stop = pieces[1]  # in the text from the beginning
    for least in (0, 2, 5, 24):
        params = replace(GREEDY, ignore_eos=True, stop=stop, min_tokens=least)
        if how == "stream":
            events = list(llm.stream([prompt], params))
            text, ids = (
                "".join(e["text"] for e in events),
                sum([e["token_ids"] for e in events], []),
            )
        else:
            output = llm.generate([prompt], params)[0]
            text, ids = output["text"], output["token_ids"]
        assert len(ids) >= least
        assert llm.tokenizer.decode(ids, skip_special=True).startswith(text)
        assert plain["token_ids"][: len(ids)] == ids
        assert len(ids) > least or least == 24, "a stop string ends no text of min_tokens"
        if least == 0:
            assert len(ids) == 2 and stop not in text


def test_stop_strings_are_bounded_and_a_long_one_is_found():
    with pytest.raises(ValueError, match="100 strings of at most 1,000 characters, got 101"):
        SamplingParams(stop=[str(i) for i in range(101)])
    with pytest.raises(ValueError, match="100 strings of at most 1,000 characters, got 1:"):
        SamplingParams(stop="x" * 1001)
    with LLM(MODEL, num_blocks=200) as llm:
        prompt = question(llm, "Tell me a story.")
        params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
        text = llm.generate([prompt], params)[0]["text"]
        long = text[20 : 20 + min(400, len(text) - 40)]
        params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, stop=long)
        output = llm.generate([prompt], params)[0]
        assert (output["text"], output["stop_reason"]) == (text[:20], long)
        assert "".join(e["text"] for e in llm.stream([prompt], params)) == text[:20]
