"""Tokenizers that are objects instead of files: nanochat's own, a tiktoken.Encoding, or any object
with nanochat's methods, such as a test's byte tokenizer."""

import logging
from collections.abc import Iterable
from operator import index

import tiktoken

from ..sources import strict
from ..tokenizer import Tokenizer

log = logging.getLogger("microvllm")

METHODS = ("encode", "decode", "encode_special", "get_bos_token_id")  # of nanochat's tokenizers
# nanochat's special tokens except <|bos|>, the ones of conversations first
ROLES = ("user", "assistant", "python", "output")
MARKS = [f"<|{role}_{edge}|>" for role in ROLES for edge in ("start", "end")]

UNKNOWN = "\ufffd"  # an incomplete or unreadable character
MAX_CHARACTER_TOKENS = 4  # a character has at most four bytes


def wrap_tokenizer(tokenizer: object, vocab_size: int) -> Tokenizer:
    """Return a Tokenizer for a Tokenizer, nanochat's own tokenizer object, a tiktoken.Encoding, or
    any object with nanochat's methods. vocab_size: the model's. Raises TypeError for other objects.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    encoding = getattr(tokenizer, "enc", tokenizer)  # the attribute of nanochat's tokenizer
    if isinstance(encoding, tiktoken.Encoding):
        return strict.StrictTokenizer(
            encoding.name,
            encoding._pat_str,
            encoding._mergeable_ranks,
            encoding._special_tokens,
            trust=True,  # the caller's own object already splits texts by this pattern
        )
    missing = [name for name in METHODS if not callable(getattr(tokenizer, name, None))]
    if missing:
        kinds = "microvllm's, nanochat's, a tiktoken.Encoding, or an object with nanochat's methods"
        description = f"{type(tokenizer).__name__}, which has no {', '.join(missing)}"
        raise TypeError(f"tokenizer must be {kinds}; got {description}")
    return ForeignTokenizer(tokenizer, vocab_size)


class ForeignTokenizer(Tokenizer):
    """A Tokenizer around an object with nanochat's methods, whose texts and ids are not changed. If
    the object has get_vocab_size, its result is used instead of vocab_size. The special tokens are
    those of nanochat's that `encode_special` knows.

    Its decode never raises, since many requests share a step: each id that the object cannot decode
    becomes U+FFFD, and the first error of each type is logged.
    """

    def __init__(self, tokenizer, vocab_size: int):
        self.tokenizer = tokenizer
        self.logged: set[type] = set()  # types of logged errors
        get_vocab_size = getattr(tokenizer, "get_vocab_size", lambda: vocab_size)
        self.vocab_size = get_vocab_size()
        self.special_tokens = {}
        for name in MARKS:
            try:
                self.special_tokens[name] = index(tokenizer.encode_special(name))
            except Exception:  # objects report a missing one in various ways; some return None
                continue
        self.bos_id = index(tokenizer.get_bos_token_id())
        self.special_tokens["<|bos|>"] = self.bos_id
        end_id = self.special_tokens.get("<|assistant_end|>", self.bos_id)
        self.eos_ids = frozenset([self.bos_id, end_id])
        self.num_ordinary = self.vocab_size - len(self.special_tokens)
        self.has_chat = self.special_tokens.keys() >= {*MARKS[:4]}

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """See Tokenizer.encode."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, not {type(text).__name__}")
        ids = [index(token_id) for token_id in self.tokenizer.encode(text)]
        return [self.bos_id, *ids] if bos else ids

    def token_bytes(self, token_id: int, skip_special: bool = False) -> bytes:
        """Return the bytes of one token's text: U+FFFD if it ends inside a character."""
        return self.decode([token_id], skip_special).encode()

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """See Tokenizer.decode."""
        special = self.special_tokens.values() if skip_special else ()
        shown_ids = [token_id for token_id in ids if token_id not in special]
        try:
            return self.decode_shown(shown_ids)
        except Exception:
            try:
                self.decode_shown(shown_ids)
            except Exception as error:
                self.log_once(error)
                if len(shown_ids) == 1:
                    return UNKNOWN
                return "".join([self.decode([token_id]) for token_id in shown_ids])
            raise  # the error came from outside, such as a signal handler: the retry succeeded

    def decode_shown(self, ids: list[int]) -> str:
        """Call the object's decode, which may raise anything."""
        text = self.tokenizer.decode(ids)
        if not isinstance(text, str):
            raise TypeError(f"decode must return a string, got {type(text).__name__}")
        return text

    def log_once(self, error: Exception) -> None:
        """Warn that the object cannot decode some ids, once for each type of error."""
        if type(error) not in self.logged:
            self.logged.add(type(error))
            kind = type(self.tokenizer).__name__
            problem = f"{type(error).__name__}: {error}"
            log.warning(
                "the tokenizer %s cannot decode some ids, shown as U+FFFD: %s", kind, problem
            )

    def decoder(self) -> "ForeignDecoder":
        """Return a new decoder for one stream of ids."""
        return ForeignDecoder(self)


class ForeignDecoder:
    """An IncrementalDecoder without access to bytes. Tokens are kept until their text is complete:
    its last character is not U+FFFD, or a character cannot have more tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.waiting_ids: list[int] = []

    def push(self, token_id: int) -> str:
        """Return the characters that this token completes."""
        self.waiting_ids.append(token_id)
        text = self.tokenizer.decode(self.waiting_ids, skip_special=True)
        if text.endswith(UNKNOWN) and len(self.waiting_ids) < MAX_CHARACTER_TOKENS:
            return ""
        self.waiting_ids = []
        return text

    def flush(self) -> str:
        """At the end of the sequence, return the text of the kept tokens."""
        text = self.tokenizer.decode(self.waiting_ids, skip_special=True)
        self.waiting_ids = []
        return text
