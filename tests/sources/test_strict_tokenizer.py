"""What the full engine says of a tokenizer that is not right."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import BYTES, TOY_FILE, dumps, encoding_with, parts, repr_bomb, write

from microvllm.sources.strict import StrictTokenizer, open_tokenizer


def test_a_file_far_too_large_is_not_even_read(tmp_path):
    file = write(tmp_path, b"")
    os.truncate(file, 1 << 40)  # sparse: a terabyte of nothing
    with pytest.raises(ValueError, match="1,099,511,627,776 bytes"):
        open_tokenizer(file)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(TOY_FILE.read_bytes()) - 1), st.integers(0, 255))
def test_a_damaged_tokenizer_is_refused_or_still_one(tmp_path_factory, position, byte):
    data = bytearray(TOY_FILE.read_bytes())
    data[position] = byte
    file = write(tmp_path_factory.getbasetemp(), bytes(data))
    try:
        tokenizer = open_tokenizer(file)
    except ValueError as error:
        assert str(file) in str(error)
    else:  # the byte was part of a token or of the pattern
        assert tokenizer.decode(tokenizer.encode("some text")) == "some text"


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"name": 5}, "name and pat_str must be strings"),
        ({"pat_str": b"."}, "name and pat_str must be strings"),
        ({"pat_str": "("}, "parenthesis"),
        ({"pat_str": ""}, "cannot be split|pat_str loses text"),
        ({"pat_str": "[a-z]+"}, "pat_str loses text"),
        ({"mergeable_ranks": {}}, "special_tokens must use each id from 0 to 0"),
        ({"mergeable_ranks": [b"a"]}, "the pickle instruction EMPTY_LIST"),
        ({"mergeable_ranks": "ab"}, "mergeable_ranks is str"),
        ({"mergeable_ranks": BYTES | {"text": 256}}, "mergeable_ranks must map bytes to int"),
        ({"mergeable_ranks": BYTES | {b"ab": "256"}}, "mergeable_ranks must map bytes to int"),
        ({"mergeable_ranks": BYTES | {b"ab": 255}}, "each id from 0 to 256 once"),
        ({"mergeable_ranks": BYTES | {b"ab": 257}}, "each id from 0 to 256 once"),
        (
            {
                "mergeable_ranks": {bytes([i + 1]): i for i in range(255)},
                "special_tokens": {"<|bos|>": 255},
            },
            "no token for the single byte 0",
        ),
        ({"special_tokens": {}}, r"no <\|bos\|> token"),
        ({"special_tokens": {"<|endoftext|>": 256}}, r"no <\|bos\|> token"),
        ({"special_tokens": {b"<|bos|>": 256}}, "special_tokens must map str to int"),
        ({"special_tokens": {"<|bos|>": 255}}, "special_tokens must use each id from 256 to 256"),
        ({"special_tokens": {"<|bos|>": 256, "<|x|>": 258}}, "each id from 256 to 257"),
    ],
)
def test_a_vocabulary_that_does_not_fit_together_is_refused(changes, complaint, tmp_path):
    file = write(tmp_path, dumps(encoding_with(parts(**changes))))
    with pytest.raises(ValueError, match=complaint) as e:
        open_tokenizer(file)
    assert str(file) in str(e.value)


def test_a_name_that_is_a_bomb_is_never_printed(tmp_path):
    with pytest.raises(ValueError, match="name and pat_str must be strings"):
        open_tokenizer(write(tmp_path, dumps(encoding_with(parts(name=repr_bomb())))))


def test_blanks_are_counted_in_a_run():
    """A million of them in many runs are a text as any other."""
    tokenizer = StrictTokenizer(**parts())
    assert len(tokenizer.encode((" " * 600_000 + "a") * 2)) == 1_200_002
    for text in (" " * 999_000, "a" + "\t " * 499_500, "\u00a0" * 999_000):
        with pytest.raises(ValueError, match="999,000 blanks in a row"):
            tokenizer.encode(text)
