"""What a user asks of generation beyond plain completions, with the bundled model."""

import pytest
from conftest import MODEL

from microvllm import LLM, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def llm():
    with LLM(MODEL, num_blocks=400) as llm:
        yield llm


def question(llm, text):
    return llm.tokenizer.render_for_completion([{"role": "user", "content": text}])


def everything_is_free(llm):
    blocks = llm.scheduler.blocks
    blocks.check(llm.scheduler.running)
    return blocks.num_free == blocks.num_usable and llm.is_finished()


def assert_stream_is_generate(llm, **kwargs):
    """Prompts with two samples each: the pieces of a stream, joined, are the text of generate."""
    prompts = [question(llm, "Tell me a story in the manner of Charles Dickens."), "Once", ""]
    params = [
        SamplingParams(temperature=0.9, max_tokens=40, seed=seed, n=2, **kwargs)
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


# streaming ----------------------------------------------------------------------------------------


def test_the_pieces_of_a_stream_joined_are_the_text_of_generate(llm):
    assert_stream_is_generate(llm)


def test_a_stream_that_is_left_early_gives_its_blocks_back(llm):
    for event in llm.stream(["Once upon a time", "Then"], SamplingParams(max_tokens=50, seed=1)):
        assert event["text"] is not None
        break
    assert everything_is_free(llm)


def test_two_streams_and_a_request_of_its_own_can_interleave(llm):
    params = SamplingParams(temperature=0.8, max_tokens=20, seed=9)
    alone = [llm.generate([p], params)[0]["text"] for p in ("One", "Two", "Three")]
    own = llm.add_request("Three", params)
    streams = [llm.stream([p], params) for p in ("One", "Two")]
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


# other requests -----------------------------------------------------------------------------------


def test_a_stop_token_is_in_the_ids_and_not_in_the_text(llm):
    prompt = question(llm, "Who wrote Dracula?")
    plain = llm.generate([prompt], GREEDY)[0]
    token = plain["token_ids"][4]
    params = SamplingParams(temperature=0, max_tokens=24, stop_token_ids=(token,))
    output = llm.generate([prompt], params)[0]
    assert output["token_ids"] == plain["token_ids"][:5]
    assert output["text"] == llm.tokenizer.decode(plain["token_ids"][:4])
    assert (output["finish_reason"], output["stop_reason"]) == ("stop", token)


def test_an_aborted_request_says_so_and_frees_its_blocks(llm):
    request = llm.add_request("Once upon", SamplingParams(max_tokens=100, ignore_eos=True, n=2))
    for _ in range(5):
        assert llm.step() == []
    llm.abort(request)
    (output,) = llm.step()
    assert output["finish_reason"] == "abort"
    assert [len(s["token_ids"]) for s in output["samples"]] == [5, 5]
    assert everything_is_free(llm)


def test_chat_renders_the_conversation_and_stops_at_the_end_of_the_turn(llm):
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


def test_sample_i_of_n_can_be_asked_for_on_its_own(llm):
    def draw(**kwargs):
        params = SamplingParams(max_tokens=8, temperature=1.0, seed=11, **kwargs)
        return [s["token_ids"] for s in llm.generate(["The sea was"], params)[0]["samples"]]

    together = draw(n=4)
    assert len(set(map(tuple, together))) > 1
    assert [draw(sample_index=i)[0] for i in range(4)] == together
    assert draw(sample_index=1, n=3) == together[1:]
