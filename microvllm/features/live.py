"""Live nanochat modules: an engine on the weights of a GPT that is being trained, and new weights
for an engine that runs."""

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
        raise TypeError(f"model must be a nanochat GPT module, got {type(module).__name__}")
    source = f"the module {type(module).__name__}"
    config = strict.make_config(given, source)
    weights = strict.without_prefix(module.state_dict(), source)
    return config, strict.recognise_strictly(weights, config, source, given), weights


def wrap_tokenizer(tokenizer: object) -> Tokenizer:
    """A Tokenizer for what is one already, nanochat's own tokenizer object, or a tiktoken.Encoding.
    Raises TypeError for anything else."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    encoding = getattr(tokenizer, "enc", tokenizer)
    if not isinstance(encoding, tiktoken.Encoding):
        kinds = "microvllm's, nanochat's or a tiktoken.Encoding"
        raise TypeError(f"tokenizer must be {kinds}, got {type(tokenizer).__name__}")
    parts = encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens
    return strict.StrictTokenizer(encoding.name, *parts)


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
