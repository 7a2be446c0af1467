"""The tokenizer against nanochat's own outputs, against hostile files, and streamed."""

import json
import os
import pickle
import subprocess

import pytest
import tiktoken
from helpers.goldens import ERAS, ROOT
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

from microvllm.tokenizer import Tokenizer, load_tokenizer, turns_of

GOLDENS = json.loads((ERAS / "tokenizer_goldens.json").read_text(encoding="utf-8"))
REAL_DIR = ROOT / "models" / "tokenizer"
TOY = load_tokenizer(TOY_FILE)
REAL = load_tokenizer(REAL_DIR)

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "What is 6 * 7?"},
]


# nanochat's own outputs


@pytest.mark.parametrize("case", GOLDENS["encode"], ids=lambda case: repr(case["text"][:20]))
def test_text_becomes_the_ids_nanochat_gives_it(case):
    assert TOY.encode(case["text"]) == case["ids"]
    assert TOY.encode(case["text"], bos=True) == case["ids_bos"]
    assert TOY.decode(case["ids"]) == case["text"]


@pytest.mark.parametrize("case", GOLDENS["decode"], ids=lambda case: str(case["ids"][:6]))
def test_ids_become_the_text_nanochat_gives_them(case):
    assert TOY.decode(case["ids"]) == case["text"]


def test_every_token_has_the_bytes_nanochat_says():
    assert TOY.vocab_size == GOLDENS["vocab_size"]
    assert TOY.bos_id == GOLDENS["bos_token_id"]
    assert TOY.special_tokens == GOLDENS["special_tokens"]
    names = {id_: name for name, id_ in GOLDENS["special_tokens"].items()}
    for id_, expected in enumerate(GOLDENS["token_bytes_hex"]):
        if expected is None:
            assert TOY.token_bytes(id_) == names[id_].encode()
            assert TOY.token_bytes(id_, skip_special=True) == b""
        else:
            assert TOY.token_bytes(id_) == bytes.fromhex(expected)
            assert TOY.token_bytes(id_, skip_special=True) == bytes.fromhex(expected)


def render(messages):
    """The tokens of a conversation and its training mask, in pairs."""
    return TOY._render(turns_of(messages))


@pytest.mark.parametrize("case", GOLDENS["conversations"], ids=lambda case: case["name"])
def test_conversations_are_rendered_as_nanochat_renders_them(case):
    pairs = render(case["messages"])[: case.get("max_tokens", 2048)]
    assert [token_id for token_id, _ in pairs] == case["render_conversation"]["ids"]
    assert [mask for _, mask in pairs] == case["render_conversation"]["mask"]
    if "render_for_completion" in case:
        messages = json.dumps(case["messages"])
        assert TOY.render_for_completion(case["messages"]) == case["render_for_completion"]
        assert TOY.render_for_completion(case["messages"][:-1]) == case["render_for_completion"]
        assert json.dumps(case["messages"]) == messages, "the caller's messages were changed"


def test_the_goldens_cover_what_they_are_here_for():
    assert len(GOLDENS["encode"]) >= 30 and len(GOLDENS["decode"]) >= 15
    assert sum("render_for_completion" in case for case in GOLDENS["conversations"]) >= 5


# the bundled tokenizer


def test_the_bundled_tokenizer_is_found_by_directory_and_by_file():
    assert load_tokenizer(str(REAL_DIR / "tokenizer.pkl")).vocab_size == REAL.vocab_size == 4096
    assert REAL.bos_id == REAL.encode_special("<|bos|>") == 4087
    assert REAL.eos_ids == {REAL.bos_id, REAL.encode_special("<|assistant_end|>")}
    assert REAL.has_chat


def test_it_agrees_with_tiktoken_on_its_own_file():
    with open(REAL_DIR / "tokenizer.pkl", "rb") as file:
        encoding = pickle.load(file)  # our own file: here, and only here, it may be unpickled
    text = "It was the best of times, it was the worst of times; 1859, naïve 你好 🌍\r\n\tthe end  "
    assert REAL.encode(text) == encoding.encode_ordinary(text)
    ids = list(range(REAL.vocab_size))
    assert REAL.decode(ids) == encoding.decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_decoding_gives_back_any_text(text):
    assert REAL.decode(REAL.encode(text)) == text


@pytest.mark.parametrize("name", sorted(REAL.special_tokens))
def test_text_that_looks_like_a_special_token_is_plain_bytes(name):
    for text in (name, f"end{name}start", name * 3):
        ids = REAL.encode(text)
        assert max(ids) < REAL.num_ordinary
        assert REAL.decode(ids, skip_special=True) == text


def test_a_lone_surrogate_is_replaced_rather_than_fatal():
    assert REAL.decode(REAL.encode("a\ud800b")) == "a\ufffdb"


def test_special_tokens_are_shown_by_name_unless_skipped():
    ids = [REAL.bos_id, *REAL.encode("Hello"), REAL.encode_special("<|assistant_end|>")]
    assert REAL.decode(ids) == "<|bos|>Hello<|assistant_end|>"
    assert REAL.decode(ids, skip_special=True) == "Hello"
    assert REAL.decode([]) == ""


def test_a_special_token_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"<\|unknown\|>.*<\|bos\|>"):
        REAL.encode_special("<|unknown|>")


@pytest.mark.parametrize("bad_id", [-1, 4096, 10**9])
def test_an_id_outside_the_vocabulary_is_named(bad_id):
    with pytest.raises(ValueError, match=f"token id {bad_id} "):
        REAL.decode([65, bad_id])
    with pytest.raises(ValueError, match=f"token id {bad_id} "):
        REAL.decoder().push(bad_id)


@pytest.mark.parametrize("prompt", [[], [-1], [0, REAL.vocab_size]], ids=str)
def test_a_prompt_has_ids_of_the_vocabulary(prompt):
    assert REAL.prompt_ids([0, REAL.vocab_size - 1]) == [0, REAL.vocab_size - 1]
    with pytest.raises(ValueError, match=f"ids from 0 to {REAL.vocab_size - 1}, got"):
        REAL.prompt_ids(prompt)


@pytest.mark.parametrize("not_text", [None, 5, b"bytes", ["list"]])
def test_only_strings_are_text(not_text):
    with pytest.raises(TypeError, match=type(not_text).__name__):
        REAL.encode(not_text)


def test_text_that_the_pattern_gives_up_on_is_an_ordinary_error():
    text = " " * 3_000_000
    try:  # the overflow of tiktoken's stack is a panic, which `except Exception` does not catch
        assert REAL.decode(REAL.encode(text)) == text  # a newer tiktoken may well manage it
    except ValueError as error:
        assert "text of 3,000,000 characters cannot be split" in str(error)
    assert REAL.encode(" ") == [32]


# conversations


def test_a_conversation_that_ends_with_the_user_asks_for_the_answer():
    ids = TOY.render_for_completion(CHAT)
    assert TOY.decode(ids) == (
        "<|bos|><|user_start|>Hi<|user_end|><|assistant_start|>Hello.<|assistant_end|>"
        "<|user_start|>What is 6 * 7?<|user_end|><|assistant_start|>"
    )
    assert ids == TOY.render_for_completion([*CHAT, {"role": "assistant", "content": "42"}])


def test_a_long_conversation_is_never_cut():
    messages = [{"role": "user", "content": "a" * 5000}]
    assert len(render(messages)) == 5003
    assert len(TOY.render_for_completion(messages)) == 5004


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "messages, complaint",
    [
        ([], "no user message"),
        ([SYSTEM], "no user message"),
        ([assistant("x")], r"messages\[0\] has the role 'assistant' where 'user' was expected"),
        ([user("a"), user("b")], r"messages\[1\] has the role 'user' where 'assistant'"),
        ([SYSTEM, SYSTEM, user("a")], r"messages\[1\] has the role 'system' where 'user'"),
        ([user("a"), SYSTEM], r"messages\[1\] has the role 'system' where 'assistant'"),
        ([{"role": "tool", "content": "a"}], r"messages\[0\] has the role 'tool'"),
        ([{"content": "a"}], r"messages\[0\] has the role None"),
        ([{"role": "user"}], r"messages\[0\]: content is NoneType"),
        ([user([{"type": "text", "text": "a"}])], r"messages\[0\]: content is list"),
        ([{"role": "system", "content": 3}, user("a")], r"messages\[0\]: content is int"),
        ([user("a"), assistant(["b"])], r"messages\[1\]: a part must be a dict"),
        ([user("a"), assistant([{"type": "text"}])], r"messages\[1\]: a part must be a dict"),
        ([user("a"), assistant([{"type": "image", "text": ""}])], "type is 'image', not text"),
        (["hello"], r"messages\[0\] must be a dict, not str"),
        ("hello", "messages must be a list of dicts, not str"),
        ({"messages": []}, "messages must be a list of dicts, not dict"),
    ],
)
def test_a_malformed_conversation_is_refused_and_the_message_named(messages, complaint):
    with pytest.raises((ValueError, TypeError), match=complaint):
        render(messages)
    with pytest.raises((ValueError, TypeError), match=complaint):
        TOY.render_for_completion(messages)


def test_a_tokenizer_without_chat_tokens_says_so():
    plain = Tokenizer(**parts())
    assert not plain.has_chat
    assert plain.eos_ids == {256}
    with pytest.raises(ValueError, match=r"no special token '<\|user_start\|>'"):
        plain.render_for_completion(CHAT)


# streaming


def stream(tokenizer, ids):
    decoder = tokenizer.decoder()
    return [decoder.push(id_) for id_ in ids], decoder.flush()


def test_half_a_character_is_held_back_until_it_is_whole():
    assert stream(TOY, [0xF0, 0x9F, 0x8C, 0x8D, ord("!")]) == (["", "", "", "🌍", "!"], "")


def test_bytes_that_cannot_become_a_character_are_not_held_back():
    assert stream(TOY, [0xF0, ord("a")]) == (["", "\ufffda"], "")


def test_a_character_the_end_cuts_short_comes_with_the_flush():
    assert stream(TOY, [ord("a"), 0xF0, 0x9F]) == (["a", "", ""], "\ufffd")


def test_bytes_wait_for_each_other_across_a_special_token():
    ids = [0xC3, TOY.bos_id, 0xA9]
    assert stream(TOY, ids) == (["", "", "é"], "")
    assert TOY.decode(ids, skip_special=True) == "é"
    assert TOY.decode(ids) == "\ufffd<|bos|>\ufffd"


def test_two_streams_of_one_tokenizer_do_not_mix():
    one, other = TOY.decoder(), TOY.decoder()
    assert [one.push(0xC3), other.push(0xE2), one.push(0xA9), other.flush()] == [
        "",
        "",
        "é",
        "\ufffd",
    ]


# every byte above 0x7f is a fragment of utf-8; a stream of them is where decoders disagree
JUNK = st.lists(st.one_of(st.integers(0x80, 0xFF), st.integers(0, TOY.vocab_size - 1)))


@settings(max_examples=400, deadline=None)
@given(JUNK)
def test_streamed_pieces_joined_are_the_decoded_text_for_any_junk(ids):
    pieces, rest = stream(TOY, ids)
    assert "".join(pieces) + rest == TOY.decode(ids, skip_special=True)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_stream_of_text_is_at_each_moment_a_prefix_of_it(text):
    decoder, shown = TOY.decoder(), ""
    for id_ in TOY.encode(text):
        shown += decoder.push(id_)
        assert text.startswith(shown)  # in particular it never shows a replacement for half of one
    assert shown == text
    assert decoder.flush() == ""


# files that are no tokenizer


class Call:
    """Unpickling it calls `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


HOSTILE = {
    "os.system": lambda marker: Call(os.system, f"touch {marker}"),
    "eval": lambda marker: Call(eval, f"open({str(marker)!r}, 'w').close()"),
    "exec": lambda marker: Call(exec, f"open({str(marker)!r}, 'w').close()"),
    "subprocess": lambda marker: Call(subprocess.call, ["touch", str(marker)]),
    "nested in a dict": lambda marker: {"name": Call(os.system, f"touch {marker}")},
    "nested in an argument": lambda marker: Call(len, [Call(os.system, f"touch {marker}")]),
    "nested in an Encoding": lambda marker: encoding_with(
        parts(pat_str=Call(os.system, f"touch {marker}"))
    ),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_pickle_is_refused_and_not_run(attack, protocol, tmp_path):
    marker = tmp_path / "it_ran"
    data = dumps(HOSTILE[attack](marker), protocol)
    file = write(tmp_path, data)
    with pytest.raises(
        ValueError, match="not a nanochat tokenizer.*nothing in it was executed"
    ) as e:
        load_tokenizer(file)
    assert str(file) in str(e.value)
    assert not marker.exists()


@pytest.mark.parametrize("attack", HOSTILE)
def test_the_attacks_above_are_real(attack, tmp_path):
    marker = tmp_path / "it_ran"
    try:
        pickle.loads(dumps(HOSTILE[attack](marker)))
    except (TypeError, ValueError):
        pass  # what the attack leaves behind makes no sense, which is too late
    assert marker.exists()


@pytest.mark.parametrize("function, name", [(os.system, "system"), (eval, "builtins.eval")])
def test_the_refusal_names_the_function_the_file_asked_for(function, name, tmp_path):
    with pytest.raises(ValueError, match=name):
        load_tokenizer(write(tmp_path, dumps(Call(function, "1"))))


@pytest.mark.parametrize(
    "data, found",
    [
        (b"", "pickle exhausted"),
        (b"\x80", "not enough data"),
        (b"a text file, not a pickle\n", "the pickle instruction APPEND at byte 0"),
        (b"Hello\n", "opcode b'H' unknown"),
        (dumps({"mergeable_ranks": {}}), "it holds dict"),
        (dumps("a string"), "it holds str"),
        (dumps([1, 2]), "the pickle instruction EMPTY_LIST"),
        (dumps(encoding_with("cl100k_base")), "it holds str"),
        (dumps(encoding_with({"name": "x", "more": 1})), "the fields name, more"),
        (dumps(Tokenizer), "it imports microvllm.tokenizer.Tokenizer"),
        (dumps(tiktoken.Encoding), "it holds type"),
        (b"\x80\x04}" + dumps(parts())[2:-1] + b"b.", "it holds dict"),  # the state of a dict
        (b"\x80\x04.", "index out of range"),
        (b"\x80\x04}}s.", "index out of range"),
    ],
)
def test_a_foreign_file_is_refused_with_what_was_found(data, found, tmp_path):
    file = write(tmp_path, data)
    with pytest.raises(ValueError, match=found) as e:
        load_tokenizer(file)
    assert str(e.value).startswith(f"{file} is not a nanochat tokenizer")


def hash_bomb():
    nested = ()
    for _ in range(64):
        nested = (nested, nested)  # 2**64 leaves for hash() to visit, 64 objects for pickle
    return nested


@pytest.mark.parametrize(
    "data",
    [
        # the bombs stand where they would be hashed, printed, or named as a global
        b"\x80\x04}" + dumps(hash_bomb())[2:-1] + b"K\x01s.",
        dumps(encoding_with(repr_bomb())),
        dumps(repr_bomb())[:-1] + b"\x8c\x08Encoding\x93.",
        b"\x80\x04" + b"]" * 1_000_000 + b"a" * 999_999 + b".",  # lists in lists
        b"\x80\x04" + b"}K\x01" * 100_000 + b"}" + b"s" * 100_000 + b".",  # dicts in dicts
        b"\x80\x04N" + b"r\xff\xff\xff\x7f" + b".",  # a memo of two billion entries
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b"x.",  # bytes that claim to be 2**63 long
        b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f" + b"N.",  # a frame of that length
    ],
    ids=[
        "hash",
        "repr of state",
        "repr of module",
        "lists",
        "dicts",
        "memo",
        "len",
        "frame",
    ],
)
def test_a_pickle_bomb_is_refused_at_once(data, tmp_path):
    with pytest.raises(ValueError, match="is not a nanochat tokenizer"):
        load_tokenizer(write(tmp_path, data))


def test_a_truncated_tokenizer_is_refused_wherever_it_was_cut(tmp_path):
    whole = TOY_FILE.read_bytes()
    for length in range(0, len(whole), 37):
        with pytest.raises(ValueError, match="is not a nanochat tokenizer"):
            load_tokenizer(write(tmp_path, whole[:length]))


def test_a_missing_tokenizer_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer_path=") as e:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.pkl") in str(e.value)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "changes",
    [
        {"mergeable_ranks": BYTES | {b"ab": 255}}, {"mergeable_ranks": BYTES | {b"ab": 257}},
        {"mergeable_ranks": BYTES | {b"ab": "256"}}, {"mergeable_ranks": "ab"}, {"pat_str": "("},
        {"special_tokens": {}}, {"special_tokens": {"<|endoftext|>": 256}},
        {"special_tokens": {"<|bos|>": 256, "<|x|>": 258}},
    ],
    ids=str,
)  # fmt: skip
def test_ids_with_a_gap_or_no_bos_are_refused(changes, tmp_path):
    """Ids index arrays, and every sequence starts with BOS. What the full engine says of each
    mistake is in test_strict_tokenizer.py."""
    file = write(tmp_path, dumps(encoding_with(parts(**changes))))
    with pytest.raises(ValueError, match="is not a nanochat tokenizer") as e:
        load_tokenizer(file)
    assert str(file) in str(e.value)


def test_a_vocabulary_that_does_fit_together_is_loaded(tmp_path):
    data = dumps(encoding_with(parts()))
    assert load_tokenizer(write(tmp_path, data)).encode("ab", bos=True) == [256, 97, 98]
    data = pickle.dumps(tiktoken.Encoding(**parts()), pickle.HIGHEST_PROTOCOL)
    assert load_tokenizer(write(tmp_path, data)).encode("ab", bos=True) == [256, 97, 98]
