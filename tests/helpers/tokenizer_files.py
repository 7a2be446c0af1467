"""Files of tokenizers, right and wrong ones."""

import copyreg
import io
import pickle
from pathlib import Path

import tiktoken

from .goldens import ERAS

TOY_FILE = ERAS / "tokenizer" / "tokenizer.pkl"
BYTES = {bytes([i]): i for i in range(256)}
# nanochat's, which splits text into words, numbers of at most two digits, and blanks
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)


def parts(**changes):
    """The arguments of a valid little tokenizer, some of them changed."""
    return {
        "name": "bytes",
        "pat_str": PATTERN,
        "mergeable_ranks": dict(BYTES),
        "special_tokens": {"<|bos|>": 256},
    } | changes


def write(tmp_path, data: bytes) -> Path:
    file = tmp_path / "tokenizer.pkl"
    file.write_bytes(data)
    return file


def encoding_with(state) -> tiktoken.Encoding:
    """An Encoding that `dumps` pickles with this state instead of its own."""
    encoding = tiktoken.Encoding.__new__(tiktoken.Encoding)
    encoding.state = state
    return encoding


def dumps(thing, protocol: int = 4) -> bytes:
    """pickle.dumps, as nanochat would call it, but for the states of Encodings."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol)
    pickler.dispatch_table = {
        tiktoken.Encoding: lambda made: (copyreg.__newobj__, (tiktoken.Encoding,), made.state)
    }
    pickler.dump(thing)
    return buffer.getvalue()


def repr_bomb():
    nested = {}
    for _ in range(64):
        nested = {"a": nested, "b": nested}
    return nested
