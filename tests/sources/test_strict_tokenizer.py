"""What the full engine says of a tokenizer that is not right."""

import os

import pytest
import tiktoken
from helpers.goldens import Fixture, era_fixtures
from helpers.tokenizer_files import (
    BYTES,
    TOY_FILE,
    dumps,
    encoding_with,
    parts,
    repr_bomb,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from microvllm import LLM, cli
from microvllm.sources.strict import PATTERN, StrictTokenizer, open_tokenizer
from microvllm.tokenizer import load_tokenizer


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
        ({"pat_str": "("}, "not one of nanochat's"),
        ({"pat_str": ""}, "not one of nanochat's"),
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
    pattern = PATTERN.replace("{1,2}", f"{{1,{most}}}")
    assert pattern.count(f"N}}{{1,{most}}}") == 1
    tokenizer = StrictTokenizer(**parts(pat_str=pattern))
    assert tokenizer.decode(tokenizer.encode("In 1984, it's  so\n\n ")) == "In 1984, it's  so\n\n "


LINEAR = r"\s+|\S+", r"(?i:a{1,1000})|[\s\S]", r" ?\p{L}+|\p{N}+|\s+|[^\s\p{L}\p{N}]+"
QUADRATIC = r"(?s:.*?\x01)|[\s\S]", r"(?:.*?x){1,30}|[\s\S]"  # no rule of syntax tells these apart
OTHERS = [
    *LINEAR, *QUADRATIC,
    r"(?<=a{1,10000000})b|[\s\S]",  # took 1.6 GB
    r"(?<=a{1,1000000000})b|[\s\S]",  # was killed
    r"((a{100}){100}){100}|[\s\S]",
    r"(?!([\s\S]{0,9})([\s\S]{0,9})\1\2~)[\s\S]",  # slow at each character
    r"(a)\1|[\s\S]",
    r"a++|[\s\S]",
    PATTERN + "|(?<=a)b",
    PATTERN + " ",
    PATTERN.replace("{1,2}", "{1,99999}"),
    PATTERN.replace("{1,2}", "{1,10}"),
    "a|" * 600_000 + r"[\s\S]",
]  # fmt: skip


@pytest.mark.parametrize("pattern", OTHERS, ids=lambda pattern: pattern[:20])
def test_a_pattern_that_is_none_of_nanochats_is_refused_unless_it_is_trusted(pattern, tmp_path):
    file = write(tmp_path, dumps(encoding_with(parts(pat_str=pattern))))
    with pytest.raises(ValueError, match="not one of nanochat's.*trust_tokenizer=True") as error:
        open_tokenizer(file)
    assert str(file) in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("pattern", [*LINEAR, *QUADRATIC, r"a++|[\s\S]", PATTERN + "|(?<=a)b"])
def test_a_pattern_of_any_kind_is_taken_if_it_is_trusted_and_loses_no_text(pattern, tmp_path):
    file = write(tmp_path, dumps(encoding_with(parts(pat_str=pattern))))
    tokenizer = open_tokenizer(file, trust=True)
    assert tokenizer.decode(tokenizer.encode("aé 12")) == "aé 12"
    for wrong in ("[a-z]+", "", "("):
        file = write(tmp_path, dumps(encoding_with(parts(pat_str=wrong))))
        with pytest.raises(ValueError, match="pat_str loses text|cannot be split|parenthesis"):
            open_tokenizer(file, trust=True)


def test_the_engine_and_the_commands_take_other_patterns_where_they_are_told_to(
    tmp_path, capsys, monkeypatch
):
    fixture = Fixture(*era_fixtures()["era1_padded"])
    encoding = load_tokenizer(fixture.tokenizer)._encoding
    own = {"pat_str": r"\s+|\S+", "mergeable_ranks": encoding._mergeable_ranks}
    given = parts(**own, special_tokens=encoding._special_tokens)
    file = write(tmp_path, dumps(encoding_with(given)))
    options = {"tokenizer_path": file, "device": "cpu", "num_blocks": 20, "attention": "sdpa"}
    with pytest.raises(ValueError, match="trust_tokenizer=True.*--trust-tokenizer"):
        LLM(fixture.directory, **options)
    with LLM(fixture.directory, **options, trust_tokenizer=True) as llm:
        expected = llm.tokenizer.encode("ab cd")
        assert expected == encoding_of(given).encode_ordinary("ab cd")
    with pytest.raises(TypeError, match="trust_tokenizer must be True or False"):
        LLM(fixture.directory, **options, trust_tokenizer=1)
    # an object is the caller's own, and splits with its pattern already
    with LLM(fixture.directory, tokenizer=encoding_of(given), device="cpu", num_blocks=20) as llm:
        assert llm.tokenizer.encode("ab cd") == expected
    output = tmp_path / "out"
    convert = ["convert", str(fixture.directory), "--tokenizer-dir", str(file), "-o", str(output)]
    with pytest.raises(SystemExit) as stop:
        cli.main(convert)
    assert stop.value.code == 2 and "--trust-tokenizer" in capsys.readouterr().err
    cli.main([*convert, "--trust-tokenizer"])
    assert (output / "tokenizer.pkl").is_file()


def encoding_of(given: dict) -> tiktoken.Encoding:
    return tiktoken.Encoding(**given)


def test_a_special_tokens_name_of_megabytes_is_refused(tmp_path):
    """5 MB of it took 2 GB."""
    names = {"<|bos|>": 256, "<|" + "x" * 65_000 + "|>": 257}
    assert StrictTokenizer(**parts(special_tokens=names)).vocab_size == 258
    names["<|" + "y" * 5_000_000 + "|>"] = 258
    with pytest.raises(ValueError, match="5,065,015 characters"):
        open_tokenizer(write(tmp_path, dumps(encoding_with(parts(special_tokens=names)))))
