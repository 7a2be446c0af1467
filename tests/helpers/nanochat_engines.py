"""nanochat's Engine on small modules, its tokenizers, and the code of docs/NANOCHAT.md."""

import re

from microvllm.checkpoint import load_model
from microvllm.nanochat import Engine
from microvllm.tokenizer import Tokenizer, load_tokenizer

from .goldens import ERAS, ROOT

PAGE = (ROOT / "docs" / "NANOCHAT.md").read_text(encoding="utf-8")
CHAIN = ERAS / "tool_chain" / "chatsft_checkpoints" / "d1"
TOOLS = load_tokenizer(ERAS / "tokenizer")
BOOKS = load_tokenizer(ROOT / "models" / "tokenizer")
STORY = BOOKS.encode("Once upon a time", bos=True)


def code_blocks(language: str) -> list[str]:
    """The code blocks of the page in one language."""
    return re.findall(rf"^```{language}\n(.+?)^```", PAGE, re.M | re.S)


class Methods:
    """A tokenizer with nanochat's methods, and nothing else of nanochat's or ours."""

    def __init__(self, tokenizer: Tokenizer):
        self.inner = tokenizer

    def encode_special(self, name):
        return self.inner.special_tokens[name]

    def get_bos_token_id(self):
        return self.inner.bos_id

    def encode(self, text, prepend=None):
        return ([] if prepend is None else [self.encode_special(prepend)]) + self.inner.encode(text)

    def decode(self, ids):
        return self.inner.decode(ids)

    def render_for_completion(self, conversation):
        return self.inner.render_for_completion(conversation["messages"])


def chain(**options) -> Engine:
    """An Engine on nanochat's fixture that calls the calculator."""
    return Engine(load_model(CHAIN), TOOLS, **options)


def rows_of(columns: list) -> list[tuple[list, list]]:
    """Tokens and masks of each sample, from what `generate` yields."""
    rows = [[*zip(*part, strict=True)] for part in zip(*columns, strict=True)]
    return [([*tokens], [*masks]) for tokens, masks in zip(*rows, strict=True)]
