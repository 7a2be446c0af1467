"""How does text become token ids, and how do ids become text while they arrive?

The vocabulary is byte-level BPE, and tiktoken splits text into its tokens: any text has tokens, and
a token may end inside a character. Special tokens (such as `<|bos|>`) are added by name only; text
that contains such a name is encoded as plain bytes, so no prompt can forge the end of a turn.

    tokens of "né!"   [n]   [C3]   [A9 !]     é is two bytes, here in two tokens
    text so far        n     n      né!       the decoder holds C3 back until A9 comes
"""

import codecs
import pickletools
from collections.abc import Iterable, Sequence
from operator import index
from pathlib import Path

import tiktoken

# the kinds of parts of an assistant's message, and the special tokens around each
_PART_MARKS = {
    "text": (), "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}  # fmt: skip


def load_tokenizer(path: str | Path, kind: type | None = None) -> "Tokenizer":
    """Open nanochat's tokenizer.pkl; path: the file or its directory; kind: subclass of Tokenizer.
    Raises FileNotFoundError if there is none, ValueError if it holds anything but a tokenizer."""
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "tokenizer.pkl"
    if not file.is_file():
        what = "give tokenizer_path=, nanochat's tokenizer.pkl or the directory it is in"
        raise FileNotFoundError(f"no tokenizer at {file}: {what}")
    try:
        return (kind or Tokenizer)(**_read_pickled_encoding(file.read_bytes()))
    # what a malformed pickle raises while its instructions are run
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{file} is not a nanochat tokenizer: {error}") from error


def _read_pickled_encoding(data: bytes) -> dict:
    """The four arguments of the one tiktoken.Encoding of which `data` is a pickle: a program for a
    small stack machine, dangerous by its instructions to import and to call. An Encoding needs only
    those below (protocol 4), which are run here without an import or a call; others are refused.
    Each costs no more than its own items: without tuples there are no keys that nest, whose hash
    may take forever."""
    stack, memo, marks, state = [], [], [], None
    for op, arg, position in pickletools.genops(data):
        match op.name:
            case "PROTO" | "FRAME" | "EMPTY_TUPLE" | "NEWOBJ" | "STOP":
                pass  # the caller builds the Encoding, from the checked state
            case ("BININT" | "BININT1" | "BININT2" | "SHORT_BINBYTES" | "BINBYTES"
                  | "SHORT_BINUNICODE" | "BINUNICODE"):  # fmt: skip
                stack.append(arg)
            case "EMPTY_DICT":
                stack.append({})
            case "MEMOIZE":
                memo.append(stack[-1])
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "MARK":
                marks.append(len(stack))
            case "SETITEMS" | "SETITEM":  # all that follows the mark, or one key and its value
                start = marks.pop() if op.name == "SETITEMS" else len(stack) - 2
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
            case _:
                found = op.name if arg is None else f"{op.name} {arg!r:.80}"
                what = f"it has the pickle instruction {found} at byte {position}"
                raise ValueError(f"{what}, which no tokenizer needs; nothing of it was run")
    if stack != [tiktoken.Encoding] or not isinstance(state, dict):
        found = type(stack[-1] if state is None else state).__name__
        raise ValueError(f"it holds {found}, not a tiktoken.Encoding with its vocabulary")
    if set(state) != {"name", "pat_str", "mergeable_ranks", "special_tokens"}:
        raise ValueError(f"its Encoding has the fields {', '.join(map(str, state)):.200}")
    return state


class Tokenizer:
    """A vocabulary: `num_ordinary` byte strings, then the special tokens. The arguments are those
    of a tiktoken.Encoding. pat_str: the regular expression of the pieces of text within which bytes
    are merged; mergeable_ranks: bytes of each ordinary token -> its id, from 0 on; special_tokens:
    name -> id, from num_ordinary on. Raises ValueError for other ids, or without `<|bos|>`."""

    def __init__(self, name: str, pat_str: str, mergeable_ranks: dict, special_tokens: dict):
        ids = [*sorted(mergeable_ranks.values()), *sorted(special_tokens.values())]
        if ids != list(range(len(ids))) or "<|bos|>" not in special_tokens:
            raise ValueError("its ids are not 0, 1, ..., special ones last, <|bos|> among them")
        self._encoding = tiktoken.Encoding(
            name, pat_str=pat_str, mergeable_ranks=mergeable_ranks, special_tokens=special_tokens
        )
        self.special_tokens: dict[str, int] = dict(special_tokens)
        self.num_ordinary, self.vocab_size = len(mergeable_ranks), len(ids)
        self.bos_id = special_tokens["<|bos|>"]
        # the ids that end a generation: the turn is over, or a new document begins
        ends = {"<|bos|>", "<|assistant_end|>"} & special_tokens.keys()
        self.eos_ids = frozenset(special_tokens[end] for end in ends)
        turn_marks = {f"<|{r}_{edge}|>" for r in ("user", "assistant") for edge in ("start", "end")}
        self.has_chat = turn_marks <= special_tokens.keys()  # can conversations be rendered?
        ordinary = sorted(mergeable_ranks, key=mergeable_ranks.get)
        special = sorted(special_tokens, key=special_tokens.get)
        self._token_bytes = ordinary + [mark.encode() for mark in special]  # by id

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of `text`, none of them special but the `<|bos|>` that `bos=True` puts in front.
        Raises TypeError if `text` is no string, ValueError if the pattern cannot split it."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, not {type(text).__name__}")
        try:
            ids = self._encoding.encode_ordinary(text)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # tiktoken's, a BaseException
                raise
            raise ValueError(f"text of {len(text):,} characters cannot be split: {error}") from None
        return [self.bos_id, *ids] if bos else ids

    def prompt_ids(self, prompt: str | Iterable[int]) -> list[int]:
        """The token ids of a prompt: of a text, with BOS in front; a list of ids is unchanged.
        Raises TypeError if it is neither, ValueError if it is empty or an id is out of range."""
        if isinstance(prompt, str):
            return self.encode(prompt, bos=True)
        ids = [index(token) for token in prompt]
        if ids and min(ids) >= 0 and max(ids) < self.vocab_size:
            return ids
        raise ValueError(f"a prompt needs ids from 0 to {self.vocab_size - 1}, got {ids!r:.80}")

    def encode_special(self, name: str) -> int:
        """Id of the special token `name`, such as `<|user_start|>`; ValueError if there is none."""
        if name in self.special_tokens:
            return self.special_tokens[name]
        known = ", ".join(self.special_tokens)
        raise ValueError(f"the tokenizer has no special token {name!r}, it has {known}")

    def token_bytes(self, token_id: int, skip_special: bool = False) -> bytes:
        """Bytes of one token; a special one is its name, or nothing with `skip_special`. Raises
        ValueError if the id is outside the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is not in the vocabulary of {self.vocab_size}")
        if skip_special and token_id >= self.num_ordinary:
            return b""
        return self._token_bytes[token_id]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`: their bytes joined, U+FFFD where these are not UTF-8. skip_special leaves
        special tokens out first, so the bytes before and after one may make a character."""
        return b"".join(self.token_bytes(i, skip_special) for i in ids).decode("utf-8", "replace")

    def decoder(self) -> "IncrementalDecoder":
        """A fresh decoder for one stream of ids."""
        return IncrementalDecoder(self)

    def render_for_completion(self, messages: Sequence[dict]) -> list[int]:
        """The prompt for the assistant's next message: messages are {"role": ..., "content": ...},
        user and assistant in turn. A system message may come first and is merged into the user's,
        an assistant's at the end is left out, and its content may be a list of {"type": "text" |
        "python" | "python_output", "text": ...}. Unlike nanochat's prompt it is never cut: the
        engine refuses one that is too long. Raises ValueError or TypeError, naming the message."""
        turns = turns_of(messages)
        if turns[-1][0] == "assistant":
            turns.pop()
        ids = [token for token, _ in self._render(turns)]
        return [*ids, self.encode_special("<|assistant_start|>")]

    def _render(self, turns: list[tuple[str, list[dict]]]) -> list[tuple[int, int]]:
        """The tokens of a conversation, each with its value in the training mask."""
        pairs = [(self.bos_id, 0)]
        for role, parts in turns:
            learned = int(role == "assistant")
            pairs.append((self.encode_special(f"<|{role}_start|>"), 0))
            for part in parts:
                mask = 0 if part["type"] == "python_output" else learned  # not by the model
                marks = [self.encode_special(mark) for mark in _PART_MARKS[part["type"]]]
                tokens = [*marks[:1], *self.encode(part["text"]), *marks[1:]]
                pairs += [(token, mask) for token in tokens]
            pairs.append((self.encode_special(f"<|{role}_end|>"), learned))
        return pairs


def turns_of(messages: Sequence[dict]) -> list[tuple[str, list[dict]]]:
    """Check a conversation; its turns as (role, parts), the system message merged into one."""
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
                what = f"a part must be a dict with a text, not {part!r:.80}"
                raise TypeError(f"messages[{i}]: {what}")
            if part.get("type") not in _PART_MARKS:
                what = f"a part's type is {part.get('type')!r}, not {', '.join(_PART_MARKS)}"
                raise ValueError(f"messages[{i}]: {what}")
        turns.append((role, content))
    if not turns:
        raise ValueError("messages has no user message")
    return turns


class IncrementalDecoder:
    """The text of a growing sequence, in pieces of whole characters: the bytes of an unfinished one
    wait for the rest. Joined, with the flush, they equal `tokenizer.decode(ids, True)`."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes, often none or more than one."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id, skip_special=True))

    def flush(self) -> str:
        """At the end of the sequence: U+FFFD if a character is unfinished, or ""."""
        return self._utf8.decode(b"", final=True)


class Text:
    """One sample's text while it grows, for streams and features; other samples are decoded at the
    end. seq, scheduler: of scheduler.py; request: of engine.py, whose options features read."""

    def __init__(self, tokenizer: Tokenizer, request):
        self.tokenizer, self.request = tokenizer, request
        self.num_sent = self.num_sent_tokens = 0  # characters and tokens in a stream's events
        self.ended = False  # was the last event made?
        self.restart()

    def restart(self) -> None:
        """Read all tokens again, the first time or after a step that failed."""
        self.decoder, self.text = self.tokenizer.decoder(), ""
        self.num_read = 0  # output tokens that are in the text

    def read(self, seq, scheduler) -> None:
        """Add the text of the sequence's new tokens."""
        unread = seq.num_prompt + (seq.finish_reason == "stop")  # prompt and stop token are no text
        while self.num_read < len(seq.tokens) - unread:  # `react` may change how many there are
            token = seq.tokens[seq.num_prompt + self.num_read]
            self.num_read += 1
            self.text += self.decoder.push(token)
            self.react(seq, token, scheduler)
        if seq.finish_reason:
            self.text += self.decoder.flush()

    def react(self, seq, token: int, scheduler) -> None:
        """Called after each token. Seam: a feature may end the sequence here, or append tokens."""

    def certain(self, seq) -> int:
        """How many characters of the text are final. Seam: fewer, if the end may be cut (stops)."""
        return len(self.text)

    def event(self, seq) -> dict | None:
        """The next event of a stream: all that is final and was not sent; None if that is none."""
        certain = self.certain(seq)
        if self.ended or certain <= self.num_sent and not seq.finish_reason:
            return None
        self.ended = seq.finish_reason is not None
        text = self.text[self.num_sent : certain]
        token_ids = seq.tokens[seq.num_prompt + self.num_sent_tokens :]
        self.num_sent, self.num_sent_tokens = certain, len(seq.tokens) - seq.num_prompt
        return {
            "sample": seq.sample_id, "text": text, "token_ids": token_ids,
            "finish_reason": seq.finish_reason, "stop_reason": seq.stop_reason,
        }  # fmt: skip
