"""nanochat's tokenizer: text to token ids and back, conversations to ids, ids to streamed text.

the vocabulary is byte-level BPE (tiktoken merges, we only hold it): any text has tokens, and a
token may be half a character. special tokens (`<|bos|>` and friends) are added by name only; text
that merely looks like one stays plain bytes, so no prompt can forge the end of a turn.
"""

import codecs
import pickletools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tiktoken

# nanochat's own vocabularies (65,536 tokens at most) take about 1 MB
_MAX_FILE_BYTES = 8 * 1024 * 1024

# so many blanks in a row, and tiktoken's pattern gives up, but not without a word on stderr
_MAX_BLANKS = 999_000
_TOO_BLANK = rf"(?<![^\S\r\n])[^\S\r\n]{{{_MAX_BLANKS}}}"

# the kinds of parts an assistant's message may be made of, and the special tokens around each
_PART_MARKS = {
    "text": (),
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """Open nanochat's tokenizer.pkl; `path` is that file or the directory it is in.

    The file is a pickle, but it is never unpickled: see _read_pickled_encoding.
    Raises FileNotFoundError if there is none, ValueError if it holds anything but a tokenizer.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "tokenizer.pkl"
    if not file.is_file():
        raise FileNotFoundError(
            f"no tokenizer at {file}: pass tokenizer_path=, the tokenizer.pkl that nanochat wrote "
            "or the directory it is in"
        )
    if (size := file.stat().st_size) > _MAX_FILE_BYTES:
        raise ValueError(f"{file} is not a nanochat tokenizer: {size:,} bytes are far too many")
    try:
        return Tokenizer(**_read_pickled_encoding(file.read_bytes()))
    # a program of pickle's that makes no sense fails in as many ways as a python one
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{file} is not a nanochat tokenizer: {error}") from error


def wrap_tokenizer(tokenizer: object) -> "Tokenizer":
    """A Tokenizer for what is one already, nanochat's own tokenizer object, or a tiktoken.Encoding.

    Raises TypeError for anything else.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    encoding = getattr(tokenizer, "enc", tokenizer)
    if not isinstance(encoding, tiktoken.Encoding):
        raise TypeError(
            "tokenizer must be microvllm's, nanochat's or a tiktoken.Encoding, "
            f"got {type(tokenizer).__name__}"
        )
    parts = (encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)
    return Tokenizer(encoding.name, *parts)


def _read_pickled_encoding(data: bytes) -> dict:
    """The four arguments of the one tiktoken.Encoding that `data` is a pickle of.

    A pickle is a program for a small stack machine, and its words for importing and calling are
    what makes foreign pickles dangerous. An Encoding needs just the words below (protocol 4), so we
    run these ourselves and refuse every other. Nothing is imported or called, and no word costs
    more than its own items: there are no tuples, so no key whose hash takes forever either.
    """
    stack, memo, marks, state = [], [], [], None
    for word, arg, position in pickletools.genops(data):
        match word.name:
            case "MEMOIZE":
                memo.append(stack[-1])
            case "BININT" | "BININT1" | "BININT2" | "SHORT_BINBYTES" | "BINBYTES":
                stack.append(arg)
            case "SHORT_BINUNICODE" | "BINUNICODE":
                stack.append(arg)
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                marks.append(len(stack))
            case "SETITEMS" | "SETITEM":  # all that follows the mark, or one key and its value
                start = marks.pop() if word.name == "SETITEMS" else len(stack) - 2
                items = stack[start:]
                del stack[start:]
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                asked = ".".join((module, name))  # a TypeError unless both are strings
                if asked != "tiktoken.core.Encoding":
                    raise ValueError(f"it asks for {asked:.80}, nothing of it was run")
                stack.append(tiktoken.Encoding)
            case "BUILD":
                state = stack.pop()
            case "PROTO" | "FRAME" | "EMPTY_TUPLE" | "NEWOBJ" | "STOP":
                pass  # the Encoding that NEWOBJ stands for is made by us, once its state is checked
            case _:
                found = word.name if arg is None else f"{word.name} {arg!r:.80}"
                raise ValueError(
                    f"it has the pickle instruction {found} at byte {position}, which no tokenizer "
                    "needs; nothing of it was run"
                )
    if stack != [tiktoken.Encoding] or not isinstance(state, dict):
        found = type(stack[-1] if state is None else state).__name__
        raise ValueError(f"it holds {found}, not a tiktoken.Encoding with its vocabulary")
    if set(state) != {"name", "pat_str", "mergeable_ranks", "special_tokens"}:
        raise ValueError(f"its Encoding has the fields {', '.join(map(str, state)):.200}")
    return state


def _check_table(what: str, table: dict, key_type: type, first: int) -> None:
    """A table must give its keys the ids first, first + 1, ... each once: ids index arrays."""
    if not isinstance(table, dict):
        raise ValueError(f"{what} is {type(table).__name__} where a dict was expected")
    if not all(type(key) is key_type and type(id_) is int for key, id_ in table.items()):
        raise ValueError(f"{what} must map {key_type.__name__} to int")
    if sorted(table.values()) != list(range(first, first + len(table))):
        raise ValueError(f"{what} must use each id from {first} to {first + len(table) - 1} once")


class Tokenizer:
    """A vocabulary: `num_ordinary` byte strings, then the special tokens.

    The arguments are a tiktoken.Encoding's:
        name: what it is called
        pat_str: regular expression that splits text into the pieces within which bytes are merged
        mergeable_ranks: bytes of each ordinary token -> its id, 0 .. num_ordinary - 1
        special_tokens: name of each special token -> its id, from num_ordinary on
    Raises ValueError if they do not fit together or `<|bos|>` is missing.

    To read: `vocab_size`, `num_ordinary`, `special_tokens`, `bos_id`, `eos_ids` (the ids that end a
    generation), `has_chat` (whether conversations can be rendered).
    """

    def __init__(self, name: str, pat_str: str, mergeable_ranks: dict, special_tokens: dict):
        _check_table("mergeable_ranks", mergeable_ranks, bytes, 0)
        _check_table("special_tokens", special_tokens, str, len(mergeable_ranks))
        if missing := [byte for byte in range(256) if bytes([byte]) not in mergeable_ranks]:
            raise ValueError(f"mergeable_ranks has no token for the single byte {missing[0]}")
        if "<|bos|>" not in special_tokens:
            raise ValueError("it has no <|bos|> token, with which every nanochat sequence starts")
        if not (isinstance(name, str) and isinstance(pat_str, str)):
            raise ValueError("name and pat_str must be strings")
        self._encoding = tiktoken.Encoding(
            name, pat_str=pat_str, mergeable_ranks=mergeable_ranks, special_tokens=special_tokens
        )
        self.special_tokens: dict[str, int] = dict(special_tokens)
        self.num_ordinary = len(mergeable_ranks)
        self.vocab_size = self.num_ordinary + len(special_tokens)
        self.bos_id = special_tokens["<|bos|>"]
        # the turn is over, or a new document begins: nanochat stops at both
        ends = ("<|bos|>", "<|assistant_end|>")
        self.eos_ids = frozenset(special_tokens[end] for end in ends if end in special_tokens)
        turn_marks = {f"<|{r}_{edge}|>" for r in ("user", "assistant") for edge in ("start", "end")}
        self.has_chat = turn_marks <= special_tokens.keys()
        ordinary = sorted(mergeable_ranks, key=mergeable_ranks.get)
        special = sorted(special_tokens, key=special_tokens.get)
        self._token_bytes = ordinary + [mark.encode() for mark in special]  # id -> bytes
        # a pattern may be well formed and still skip some characters, or match nothing at all
        probe = "Every 1 of these, isn't it?\n\n\té\u3000\u200b\x00 "
        if self.decode(self.encode(probe)) != probe:
            raise ValueError(f"pat_str loses text: {pat_str!r:.200}")

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of `text`, none of them special but the `<|bos|>` that `bos=True` puts in front.

        Raises TypeError if `text` is no string, ValueError if the pattern gives up on it (it does
        on a million spaces in a row).
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, not {type(text).__name__}")
        if len(text) >= _MAX_BLANKS and re.search(_TOO_BLANK, text):
            raise ValueError(
                f"text of {len(text):,} characters cannot be split: it has {_MAX_BLANKS:,} blanks "
                "in a row"
            )
        try:
            ids = self._encoding.encode_ordinary(text)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # rust's panic is no Exception in python
                raise
            raise ValueError(f"text of {len(text):,} characters cannot be split: {error}") from None
        return [self.bos_id, *ids] if bos else ids

    def encode_special(self, name: str) -> int:
        """Id of the special token `name`, such as `<|user_start|>`; ValueError if there is none."""
        if name not in self.special_tokens:
            known = ", ".join(self.special_tokens)
            raise ValueError(f"the tokenizer has no special token {name!r}, it has {known}")
        return self.special_tokens[name]

    def token_bytes(self, token_id: int, skip_special: bool = False) -> bytes:
        """Bytes of one token; a special one is its name, or nothing with `skip_special`.

        Raises ValueError if the id is outside the vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is not in the vocabulary of {self.vocab_size}")
        if skip_special and token_id >= self.num_ordinary:
            return b""
        return self._token_bytes[token_id]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`: their bytes joined, U+FFFD where these are not UTF-8.

        `skip_special` leaves special tokens out *before* the bytes are joined, so the bytes on
        their two sides may make one character.
        """
        return b"".join(self.token_bytes(i, skip_special) for i in ids).decode("utf-8", "replace")

    def decoder(self) -> "IncrementalDecoder":
        """A fresh decoder for one stream of ids."""
        return IncrementalDecoder(self)

    def render_conversation(
        self, messages: Sequence[dict], max_tokens: int | None = 2048
    ) -> tuple[list[int], list[int]]:
        """Ids of a conversation and its training mask (1: the assistant is to learn to say this).

        `messages` are `{"role": ..., "content": ...}`, user and assistant in turn; a system message
        may come first and is merged into the user's. The assistant's content may be a list of
        `{"type": "text" | "python" | "python_output", "text": ...}`. Both results are cut to
        `max_tokens`, as nanochat does for training (None: never).
        Raises ValueError or TypeError, with the index of the message, if it is not of this form.
        """
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
        ids, mask = self._render(_turns(messages))
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, messages: Sequence[dict]) -> list[int]:
        """Ids that ask for the assistant's next message: the conversation, then assistant_start.

        An assistant's message at the end is left out: it is the one to be written anew. Unlike
        nanochat's, the prompt is never cut, the engine refuses one that is too long.
        """
        turns = _turns(messages)
        if turns[-1][0] == "assistant":
            turns.pop()
        return [*self._render(turns)[0], self.encode_special("<|assistant_start|>")]

    def _render(self, turns: list[tuple[str, list[dict]]]) -> tuple[list[int], list[int]]:
        ids, mask = [self.bos_id], [0]

        def add(tokens: list[int], learn: bool) -> None:
            ids.extend(tokens)
            mask.extend([int(learn)] * len(tokens))

        for role, parts in turns:
            add([self.encode_special(f"<|{role}_start|>")], False)
            for part in parts:
                marks = [self.encode_special(mark) for mark in _PART_MARKS[part["type"]]]
                tokens = [*marks[:1], *self.encode(part["text"]), *marks[1:]]
                # the output of a tool is read, not said
                add(tokens, role == "assistant" and part["type"] != "python_output")
            add([self.encode_special(f"<|{role}_end|>")], role == "assistant")
        return ids, mask


def _turns(messages: Sequence[dict]) -> list[tuple[str, list[dict]]]:
    """The turns of a conversation as (role, parts), checked, the system message merged."""
    if not isinstance(messages, (list, tuple)):
        raise TypeError(f"messages must be a list of dicts, not {type(messages).__name__}")
    turns, system = [], ""
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise TypeError(f"messages[{i}] must be a dict, not {type(message).__name__}")
        role, content = message.get("role"), message.get("content")
        expected = ("user", "assistant")[len(turns) % 2]
        if role != expected and not (role == "system" and i == 0):
            raise ValueError(
                f"messages[{i}] has the role {role!r} where {expected!r} was expected: user and "
                "assistant take turns, the user first, and only messages[0] may be a system message"
            )
        if not isinstance(content, (str, list) if role == "assistant" else str):
            raise TypeError(f"messages[{i}]: content is {type(content).__name__}, not a string")
        if role == "system":
            system = content + "\n\n"
            continue
        if isinstance(content, str):
            content = [{"type": "text", "text": content if turns else system + content}]
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                raise TypeError(
                    f"messages[{i}]: a part must be a dict with a text, not {part!r:.80}"
                )
            if part.get("type") not in _PART_MARKS:
                kinds = ", ".join(_PART_MARKS)
                raise ValueError(
                    f"messages[{i}]: a part's type is {part.get('type')!r}, not {kinds}"
                )
        turns.append((role, content))
    if not turns:
        raise ValueError("messages has no user message")
    return turns


class IncrementalDecoder:
    """The text of a growing sequence, in pieces of whole characters.

    A token may end inside a character; its bytes wait here for the rest. The pieces and the flush,
    joined, equal `tokenizer.decode(ids, skip_special=True)`, and each token is looked at once.
    Special tokens are not shown and end nothing: waiting bytes go on waiting across them.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes, often none or more than one."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id, skip_special=True))

    def flush(self) -> str:
        """What is left once the sequence has ended: U+FFFD for an unfinished character."""
        return self._utf8.decode(b"", final=True)
