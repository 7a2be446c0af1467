"""From logits to tokens: SamplingParams, the noise, and `sample`, each parameter next to its line.

The noise of a row is one number in [0, 1), a function of (seed, sample index, position) and of
nothing else. So a request with a seed gives the same tokens alone, in a full batch, after a
preemption, and as sample i of n. The token is the first whose cumulative probability exceeds the
noise: one number a row is all the randomness there is, made on the host and uploaded with the
batch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def check_int(name: str, value: object, least: int, most: int = 2**31 - 1) -> int:
    """The value as an int. Raises TypeError or ValueError, naming the argument, unless it is an
    integer in range."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r:.80}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be between {least} and {most}, got {value}")
    return int(value)  # numpy's small integers would overflow when they are added to a length


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Raises ValueError or TypeError when built with a value that makes
    no sense."""

    temperature: float = 1.0  # 0 is greedy: exact argmax
    max_tokens: int = 256  # new tokens at most
    top_k: int | None = None  # sample among the k largest logits; None or 0 is off
    ignore_eos: bool = False  # do not stop at the tokenizer's end tokens
    n: int = 1  # samples of the prompt; the prefill is done once and shared
    seed: int | None = None  # None: the engine draws one
    stop: tuple[str, ...] = ()  # strings that end the text and are cut off
    stop_token_ids: tuple[int, ...] = ()  # further tokens that end the text, also with ignore_eos

    def __post_init__(self):
        def put(name, value):
            object.__setattr__(self, name, value)

        numbers = (int, float, np.integer, np.floating)
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, numbers):
            raise TypeError(f"temperature must be a number, got {self.temperature!r:.80}")
        if not 0 <= self.temperature <= 1e38:  # float32's range; a NaN fails both
            raise ValueError(
                "temperature must be 0 (greedy) or more and finite, 1e38 at most, got "
                f"{self.temperature!r:.80}"
            )
        # below what float32 can divide by it is greedy, for every row and on every device
        put("temperature", float(self.temperature) if self.temperature >= 1e-30 else 0.0)
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        put("max_tokens", check_int("max_tokens", self.max_tokens, 1))
        put("n", check_int("n", self.n, 1))
        if self.top_k is not None:
            put("top_k", check_int("top_k", self.top_k, 0))
        if self.seed is not None:
            put("seed", check_int("seed", self.seed, 0, 2**64 - 1))
        strings = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in strings):
            raise TypeError(f"stop must be a string or a list of them, got {self.stop!r:.80}")
        put("stop", strings)
        stops = self.stop_token_ids
        if isinstance(stops, (str, bytes)) or not isinstance(stops, Iterable):
            raise TypeError(f"stop_token_ids must be a list of integers, got {stops!r:.80}")
        put("stop_token_ids", tuple(check_int("stop_token_ids", t, 0) for t in stops))


def noise(seeds: Seq[int], samples: Seq[int], positions: Seq[int]) -> np.ndarray:
    """(R,) float32 in [0, 1), one per row, from the row's seed, sample index and position alone.

    Each of the three goes through a round of splitmix64 (Steele, Lea and Flood, 2014), so
    neighbouring values share nothing. The top 24 bits are kept: all a float32 below 1 can hold
    evenly.
    """
    x = np.zeros(len(seeds), np.uint64)
    for part in (seeds, samples, positions):
        x = (x ^ np.array(part, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def sample(
    logits: Tensor,
    params: Seq[SamplingParams],
    temperature: Tensor,
    uniform: Tensor,
    softcap: float = 0.0,
) -> Tensor:
    """Pick a token for each row.

    logits (R, V), to be capped at +-softcap unless it is 0; temperature, uniform (R,) float32, on
    the device: params[i].temperature and the row's noise. Returns (R,) integers.
    """
    if logits.is_cuda and is_plain(params) and importlib.util.find_spec("triton"):
        from . import kernels_gpu

        return kernels_gpu.sample(logits, temperature, uniform, softcap)
    sampled = [p.temperature > 0 for p in params]
    if not any(sampled):  # the cap keeps their order
        return logits.argmax(-1)
    logits = cap_logits(logits, softcap)
    logits_over_t = logits / temperature.clamp(min=1e-30)[:, None]
    if any(p.top_k for p in params):
        logits_over_t = keep_top_k(logits_over_t, [p.top_k or 0 for p in params])
    drawn = draw(logits_over_t, uniform)
    if all(sampled):
        return drawn
    # greedy rows are the argmax of the logits themselves: no division, no rounding, no noise
    return torch.where(temperature > 0, drawn, logits.argmax(-1))


def is_plain(params: Seq[SamplingParams]) -> bool:
    """Does temperature alone decide? Then no filter is worth a pass over the vocabulary."""
    return not any(p.top_k for p in params)


def cap_logits(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap) in float32; 0 is no cap.

    tanh(x) is 2 sigmoid(2x) - 1, and torch's sigmoid takes a CPU a fifth of its tanh's time; the
    difference is below 4e-6.
    """
    logits = logits.float()
    if not softcap:
        return logits
    return torch.sigmoid(logits * (2 / softcap)).mul_(2 * softcap).sub_(softcap)


def keep_top_k(logits: Tensor, top_k: Seq[int]) -> Tensor:
    """Mask all but the k largest logits of each row (0: keep all). Ties with the k-th stay."""
    largest = min(max(top_k), logits.shape[1])
    ks = torch.tensor([min(k, largest) if k else largest for k in top_k], device=logits.device)
    kth = logits.topk(largest).values.gather(1, ks[:, None] - 1)
    off = torch.tensor([k == 0 for k in top_k], device=logits.device)
    return logits.masked_fill((logits < kth) & ~off[:, None], -torch.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Invert the CDF in the order of token ids: (R,) the first id with cumulative probability >
    uniform."""
    cdf = torch.softmax(logits, -1).cumsum(-1)
    # the last value is 1 only up to rounding: scale the noise by it, so that a token of probability
    # 0 can not be reached. cdf > target holds first at a token that raised it.
    target = uniform[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)
