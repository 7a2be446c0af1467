"""What the full engine says of a tokenizer that is not right."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import BYTES, TOY_FILE, dumps, encoding_with, parts, repr_bomb, write

from microvllm.sources.strict import _PATTERN, StrictTokenizer, open_tokenizer


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


@pytest.mark.parametrize("most", range(1, 10))
def test_nanochats_pattern_is_admitted(most):
    pattern = _PATTERN.replace("{1,2}", f"{{1,{most}}}")
    assert pattern.count(f"N}}{{1,{most}}}") == 1
    tokenizer = StrictTokenizer(**parts(pat_str=pattern))
    assert tokenizer.decode(tokenizer.encode("In 1984, it's  so\n\n ")) == "In 1984, it's  so\n\n "


@pytest.mark.parametrize(
    "pattern", [r"\s+|\S+", r"(?i:a{1,1000})|[\s\S]", r" ?\p{L}+|\p{N}+|\s+|[^\s\p{L}\p{N}]+"]
)
def test_a_short_pattern_of_a_linear_engine_is_admitted(pattern):
    assert StrictTokenizer(**parts(pat_str=pattern)).encode("aé")


@pytest.mark.parametrize(
    "pattern, what",
    [
        (r"(?<=a{1,10000000})b|[\s\S]", "repeats"),  # took 1.6 GB
        (r"(?<=a{1,1000000000})b|[\s\S]", "repeats"),  # was killed
        (r"((a{100}){100}){100}|[\s\S]", "repeats"),
        (r"a{1001}|[\s\S]", "repeats"),
        (r"(?!([\s\S]{0,9})([\s\S]{0,9})\1\2~)[\s\S]", "lookaround"),  # slow at each character
        (r"(?<=a)b|[\s\S]", "lookaround"),
        (r"(?<!a)b|[\s\S]", "lookaround"),
        (r"(?=a)a|[\s\S]", "lookaround"),
        (r"(?>a+)|[\s\S]", "lookaround"),
        (r"(?P<x>a)(?P=x)|[\s\S]", "lookaround"),
        (r"(a)\1|[\s\S]", "a backreference"),
        (r"(a)\k<1>|[\s\S]", "a backreference"),
        (r"a++|[\s\S]", "a possessive"),
        (r"a{1,2}+|[\s\S]", "a possessive"),
        (r"(?x: a{1,2} +)|[\s\S]", "a possessive"),
        (_PATTERN + "|(?<=a)b", "lookaround"),
        (_PATTERN.replace("{1,2}", "{1,99999}"), "repeats"),
        ("a|" * 600 + r"[\s\S]", "1,206 characters"),
    ],
)
def test_a_pattern_that_may_take_any_memory_or_time_is_refused(pattern, what, tmp_path):
    file = write(tmp_path, dumps(encoding_with(parts(pat_str=pattern))))
    with pytest.raises(ValueError, match=f"pat_str is not nanochat's, and has .*{what}") as error:
        open_tokenizer(file)
    assert str(file) in str(error.value) and len(str(error.value)) < 600


def test_a_special_tokens_name_of_megabytes_is_refused(tmp_path):
    """5 MB of it took 2 GB."""
    names = {"<|bos|>": 256, "<|" + "x" * 65_000 + "|>": 257}
    assert StrictTokenizer(**parts(special_tokens=names)).vocab_size == 258
    names["<|" + "y" * 5_000_000 + "|>"] = 258
    with pytest.raises(ValueError, match="5,065,015 characters"):
        open_tokenizer(write(tmp_path, dumps(encoding_with(parts(special_tokens=names)))))
