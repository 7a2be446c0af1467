"""A naive loop over the same model, with which engines are compared."""

import functools
from dataclasses import replace

import numpy as np
import torch

from microvllm.attention import PagedKVCache
from microvllm.checkpoint import load_model
from microvllm.sampler import SamplingParams, cap_logits, uniform_numbers

from .batches import hand_made_batch
from .engines import sampled
from .goldens import FIXTURES


class TooClose(AssertionError):
    """A test must not depend on a rounding: this one needs another prompt or seed."""


def capped(model, hidden: torch.Tensor) -> torch.Tensor:
    """(R, C) rows of a model's forward to (R, V) capped logits."""
    return cap_logits(model.logits(hidden), model.recipe.softcap)


class Naive:
    """One sequence at a time, all of it computed again for every token, sampled in float64."""

    def __init__(self, directory, overrides=None):
        self.model = load_model(directory, **(overrides or {}))
        self.known: dict[tuple, np.ndarray] = {}  # text -> logits of what follows

    def forward(self, tokens: list[int], num_rows: int) -> np.ndarray:
        """(num_rows, V) float64: the logits that follow the last num_rows tokens."""
        table = range(1, 2 + len(tokens) // 16)
        batch = hand_made_batch([(tokens, 0, len(tokens), table)], 16)
        batch.hidden_rows = batch.hidden_rows[-num_rows:]
        model = self.model
        cache = PagedKVCache(model.config, 1 + len(table), 16, model.dtype, model.device)
        with torch.inference_mode():
            return capped(model, model.forward(batch, cache)).double().numpy()

    def logits(self, tokens: list[int]) -> np.ndarray:
        """(V,) float64, of the token after these."""
        key = tuple(tokens)
        if key not in self.known:
            self.known[key] = self.forward(tokens, 1)[0]
        return self.known[key]

    def follow(self, tokens: list[int]) -> None:
        """Know the logits that follow every beginning of these tokens, from one forward."""
        rows = self.forward(tokens, len(tokens))
        self.known |= {tuple(tokens[: i + 1]): row for i, row in enumerate(rows)}

    def pick(self, logits: np.ndarray, params: SamplingParams, uniform: float) -> int:
        """The next token, by the definition of each parameter."""
        keep = 1 if params.temperature == 0 else params.top_k or len(logits)
        ranked = [*np.sort(logits)[::-1], -np.inf]
        if ranked[keep - 1] - ranked[keep] < 1e-4:
            raise TooClose
        if keep == 1:
            return int(logits.argmax())
        logits = np.where(logits < ranked[keep - 1], -np.inf, logits)
        p = np.exp((logits - logits.max()) / params.temperature)
        cdf = p.cumsum() / p.sum()
        if np.abs(cdf - uniform).min() < 1e-6:
            raise TooClose
        return int(np.searchsorted(cdf, uniform, side="right"))

    def complete(self, prompt, params: SamplingParams, index=0, stop=frozenset()) -> list[int]:
        """The tokens of a sample, up to and with the first one of `stop`."""
        tokens = list(prompt)
        stop = stop | {*params.stop_token_ids}
        limit = min(len(tokens) + params.max_tokens, self.model.config.sequence_len)
        while len(tokens) < limit:
            (uniform,) = uniform_numbers([params.seed or 0], [index], [len(tokens)])
            tokens.append(self.pick(self.logits(tokens), params, float(uniform)))
            if tokens[-1] in stop:
                break
        return tokens[len(prompt) :]


@functools.cache
def naive(name: str) -> Naive:
    """The naive loop over the model of an era."""
    return Naive(FIXTURES[name].directory, FIXTURES[name].overrides)


def assert_naive(outputs: list[dict], work, name: str = "era5", eos=frozenset()) -> None:
    """The outputs have the tokens of the naive loop."""
    for output, (prompt, params) in zip(outputs, work, strict=True):
        assert output["prompt_token_ids"] == prompt
        assert len(output["samples"]) == params.n
        stop = frozenset() if params.ignore_eos else eos
        for i, sample in enumerate(output["samples"]):
            wanted = naive(name).complete(prompt, params, i, stop)
            assert sample["token_ids"] == wanted, (len(prompt), params, i)
            ended = wanted[-1] in stop | {*params.stop_token_ids}
            assert sample["finish_reason"] == ("stop" if ended else "length")


def ending(prompt: list[int], index: int, eos: frozenset[int], **options) -> SamplingParams:
    """Params whose seed makes the naive loop sample its first end token as token `index`."""
    for seed in range(5000):
        params = sampled(20, seed, temperature=3.0, ignore_eos=False, **options)
        try:
            tokens = naive("era5").complete(prompt, replace(params, max_tokens=index + 1), stop=eos)
        except TooClose:
            continue
        if len(tokens) == index + 1 and tokens[-1] in eos:
            return params
    raise AssertionError("no seed")
