"""Tokenizers that are objects, not files: nanochat's own, a tiktoken.Encoding, or any object with
nanochat's methods, such as the byte tokenizer of a test."""

from operator import index

import tiktoken

from ..sources import strict
from ..tokenizer import Tokenizer

METHODS = "encode", "decode", "encode_special", "get_bos_token_id"  # of nanochat's tokenizers
# and its special tokens but <|bos|>, those of a conversation first
ROLES = "user", "assistant", "python", "output"
MARKS = [f"<|{role}_{edge}|>" for role in ROLES for edge in ("start", "end")]


def wrap_tokenizer(tokenizer: object, vocab_size: int) -> Tokenizer:
    """A Tokenizer for what is one already, nanochat's own tokenizer object, a tiktoken.Encoding, or
    any object with nanochat's methods; vocab_size: the model's. Raises TypeError for all else."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    encoding = getattr(tokenizer, "enc", tokenizer)
    if isinstance(encoding, tiktoken.Encoding):
        parts = encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens
        # the caller's own object, which splits texts with this pattern already
        return strict.StrictTokenizer(encoding.name, *parts, trust=True)
    if missing := [name for name in METHODS if not callable(getattr(tokenizer, name, None))]:
        kinds = "microvllm's, nanochat's, a tiktoken.Encoding, or an object with nanochat's methods"
        got = f"{type(tokenizer).__name__}, which has no {', '.join(missing)}"
        raise TypeError(f"tokenizer must be {kinds}; got {got}")
    return ForeignTokenizer(tokenizer, vocab_size)


class ForeignTokenizer(Tokenizer):
    """A Tokenizer around an object with nanochat's methods, whose text and ids it gives unchanged.
    What `get_vocab_size` says, if it is there, goes before the model's vocab_size. Of the special
    tokens it has those of nanochat that `encode_special` knows."""

    def __init__(self, tokenizer: object, vocab_size: int):
        self._tokenizer = tokenizer
        self.vocab_size = getattr(tokenizer, "get_vocab_size", lambda: vocab_size)()
        self.special_tokens = {}
        for name in MARKS:
            try:
                self.special_tokens[name] = index(tokenizer.encode_special(name))
            except Exception:  # each kind has its own way to say that there is none; None is one
                continue
        self.bos_id = self.special_tokens["<|bos|>"] = index(tokenizer.get_bos_token_id())
        end = self.special_tokens.get("<|assistant_end|>", self.bos_id)
        self.eos_ids = frozenset([self.bos_id, end])
        self.num_ordinary = self.vocab_size - len(self.special_tokens)
        self.has_chat = self.special_tokens.keys() >= {*MARKS[:4]}

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of `text`, see Tokenizer.encode."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, not {type(text).__name__}")
        return [self.bos_id] * bos + [*map(index, self._tokenizer.encode(text))]

    def token_bytes(self, token_id: int, skip_special: bool = False) -> bytes:
        """Bytes of one token's text: of one that ends inside a character, those of U+FFFD."""
        return self.decode([token_id], skip_special).encode()

    def decode(self, ids, skip_special: bool = False) -> str:
        """Text of `ids`, see Tokenizer.decode."""
        special = self.special_tokens.values() if skip_special else ()
        return self._tokenizer.decode([i for i in ids if i not in special])

    def decoder(self) -> "ForeignDecoder":
        """A fresh decoder for one stream of ids."""
        return ForeignDecoder(self)


class ForeignDecoder:
    """An IncrementalDecoder that knows no bytes: tokens wait until their text is whole. It is if
    its last character is no U+FFFD; and a character has four tokens at most."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._waiting = tokenizer, []

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        self._waiting.append(token_id)
        text = self._tokenizer.decode(self._waiting, True)
        if text.endswith("\ufffd") and len(self._waiting) < 4:
            return ""
        self._waiting = []
        return text

    def flush(self) -> str:
        """At the end of the sequence: what waits."""
        waiting, self._waiting = self._waiting, []
        return self._tokenizer.decode(waiting, True)
