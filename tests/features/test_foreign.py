"""Tokenizers that are objects: what such an object does wrong ends no step."""

import logging
import signal

import pytest
from helpers.full_engines import everything_is_free
from helpers.nanochat_engines import BOOKS, CHAIN, TOOLS, Methods

from microvllm import LLM, SamplingParams
from microvllm.checkpoint import load_model
from microvllm.features.calculator import Calculator
from microvllm.features.foreign import wrap_tokenizer
from microvllm.features.tools import ToolDecoder, find_marks

pytestmark = pytest.mark.usefixtures("one_thread")


class Broken(Methods):
    """It cannot decode one of the ids."""

    def __init__(self, tokenizer, bad: int):
        super().__init__(tokenizer)
        self.bad = bad

    def decode(self, ids):
        if self.bad in ids:
            raise KeyError(f"no bytes for {self.bad}")
        return super().decode(ids)


def test_ids_that_cannot_be_decoded_are_replaced_and_logged_once(caplog):
    bad = TOOLS.encode("b")[0]
    tokenizer = wrap_tokenizer(Broken(TOOLS, bad), 311)
    with caplog.at_level(logging.WARNING, "microvllm"):
        assert tokenizer.decode(TOOLS.encode("abc")) == "a\ufffdc"
        assert tokenizer.decode([bad, bad]) == "\ufffd\ufffd"
        assert tokenizer.token_bytes(bad) == "\ufffd".encode()
        decoder = tokenizer.decoder()
        pieces = [decoder.push(token_id) for token_id in TOOLS.encode("abcdefg")]
        assert "".join(pieces) + decoder.flush() == "a\ufffdcdefg"
    (record,) = caplog.records
    assert "the tokenizer Broken cannot decode some ids" in record.message
    assert f"KeyError: 'no bytes for {bad}'" in record.message


def test_a_decode_that_returns_no_text_is_no_text(caplog):
    class Bytes(Methods):
        def decode(self, ids):
            return super().decode(ids).encode()

    with caplog.at_level(logging.WARNING, "microvllm"):
        assert wrap_tokenizer(Bytes(TOOLS), 311).decode(TOOLS.encode("ab")) == "\ufffd\ufffd"
    assert "decode must return a string, got bytes" in caplog.text


def test_an_exception_from_outside_is_not_taken_for_the_tokenizers():
    class Slow(Methods):
        is_first = True

        def decode(self, ids):
            if self.is_first:
                self.is_first = False
                signal.raise_signal(signal.SIGTERM)
            return super().decode(ids)

    def stop(*_):
        raise TimeoutError("from outside")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        tokenizer = wrap_tokenizer(Slow(TOOLS), 311)
        with pytest.raises(TimeoutError, match="from outside"):
            tokenizer.decode(TOOLS.encode("ab"))
        assert tokenizer.decode(TOOLS.encode("ab")) == "ab"
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("options", [{}, {"stop": "no such text"}], ids=["at the end", "watched"])
def test_a_text_that_cannot_be_decoded_harms_no_other_request(options):
    params = SamplingParams(temperature=5.0, max_tokens=20, seed=2, ignore_eos=True, **options)
    prompts = ["one text", "another"]
    with LLM(model=load_model(CHAIN), tokenizer=Methods(TOOLS), plain=True) as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
    bad = expected[0]["token_ids"][3]
    with LLM(model=load_model(CHAIN), tokenizer=Broken(TOOLS, bad), plain=True) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
        assert [o.finish_reason for o in outputs] == ["length", "length"]
        assert "\ufffd" in outputs[0].text
        events = [*llm.stream(prompts, params)]
        for i, output in enumerate(outputs):
            text = "".join(event["text"] for event in events if event["index"] == i)
            assert text.count("\ufffd") >= output["token_ids"].count(bad)
        assert everything_is_free(llm)


def test_a_call_shows_whole_characters_with_any_tokenizer():
    tokenizer = wrap_tokenizer(Methods(BOOKS), BOOKS.vocab_size)
    ids = BOOKS.encode("né – 中文")
    decoder = ToolDecoder(tokenizer, [find_marks(Calculator(), tokenizer)])
    start, end = (BOOKS.encode_special(f"<|python_{edge}|>") for edge in ("start", "end"))
    pieces = [decoder.push(token_id) for token_id in [*ids, start, *ids, end]]
    assert "".join(pieces) + decoder.flush() == "né – 中文`né – 中文`"
