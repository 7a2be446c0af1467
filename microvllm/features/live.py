"""Live nanochat modules: an engine on the weights of a GPT that is being trained, and new weights
for an engine that runs."""

from operator import index

import tiktoken
import torch
from torch import Tensor

from ..engine import LLM
from ..model import GPTConfig, Recipe
from ..sources import strict
from ..tokenizer import Tokenizer


def from_module(module) -> tuple[GPTConfig, Recipe, dict[str, Tensor]]:
    """Config, recipe and weights (not copied) of a live nanochat GPT, compiled or not. Raises
    TypeError for what is no nanochat GPT, ValueError for one of an unknown era."""
    config = getattr(module, "config", None)
    given = vars(config) if hasattr(config, "__dict__") else {}
    # other families' modules have a config too
    if not isinstance(module, torch.nn.Module) or "n_embd" not in given:
        what = "with its config and weights (a forward alone has no K and V to page)"
        raise TypeError(f"model must be a nanochat GPT module {what}, got {type(module).__name__}")
    source = f"the module {type(module).__name__}"
    config = strict.make_config(given, source)
    weights = strict.without_prefix(module.state_dict(), source)
    return config, strict.recognise_strictly(weights, config, source, given), weights


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
        return strict.StrictTokenizer(encoding.name, *parts)
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


class LiveLLM(LLM):
    """An engine whose weights can be swapped."""

    def update_weights(self, weights) -> None:
        """Swap the weights in place: a state dict of the same shapes, or a module that has one. The
        prefix cache is emptied and running requests recompute what they have. Raises ValueError,
        and changes nothing, if a tensor is missing or misshapen."""
        self._change(self._settle)
        state = weights.state_dict() if hasattr(weights, "state_dict") else weights
        if not isinstance(state, dict) or not all(isinstance(w, Tensor) for w in state.values()):
            raise TypeError(f"weights must be a state dict, or a module, got {weights!r:.80}")
        state = {k.removeprefix("_orig_mod."): w for k, w in state.items()}
        strict.check_weights(state, self.model.config, self.model.recipe)

        def swap() -> None:
            self._settle()
            self.model.load_state_dict(state)
            self.scheduler.reset()

        self._change(swap)


PARTS = {"llm": LiveLLM}
