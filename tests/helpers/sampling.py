"""Draws of rows of logits, and the same the slow and obvious way."""

import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from microvllm.params import SamplingParams
from microvllm.sampler import uniform_numbers

V = 60


def logits_of(rows: int, vocab: int = V, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.manual_seed(seed)) * 3


def run(backend, logits, params, uniform, softcap=0.0) -> torch.Tensor:
    """A backend's sample() with the tensors that the engine would make."""
    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float32)
    uniform = torch.as_tensor(uniform, dtype=torch.float32)
    before = logits.clone()
    tokens = backend.sample(logits, params, temperature, uniform, softcap)
    assert torch.equal(before, logits), "the model's logits were changed"
    return tokens


def grid(count):
    """Numbers that cover [0, 1) evenly."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def naive_probabilities(logits: list[float], p: SamplingParams) -> np.ndarray:
    x = np.array(logits)
    if p.temperature == 0:
        return np.eye(len(x))[x.argmax()]
    weights = np.exp((x - x.max()) / p.temperature)
    by_weight = sorted(range(len(x)), key=lambda i: -weights[i])
    if p.top_k:
        weights[by_weight[p.top_k :]] = 0
    if p.top_p < 1:
        kept, mass = [], 0.0
        for i in by_weight:
            if mass < p.top_p * weights.sum():
                kept.append(i)
                mass += weights[i]
        weights[[i for i in range(len(x)) if i not in kept]] = 0
    weights[weights < p.min_p * weights.max()] = 0
    return weights / weights.sum()


FILTERS = {
    "none": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "tiny top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.1},
    "min_p of 1": {"min_p": 1.0},
    "top_k and top_p": {"top_k": 5, "top_p": 0.7},
    "top_p and min_p": {"top_p": 0.95, "min_p": 0.2},
    "all three": {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "temperature": 1.7},
}


def assert_naive_frequencies(draw, logits, expected) -> None:
    """Uniform numbers on a grid: the share for which a token is drawn is its probability, to a step
    at either end. draw: of equal rows of logits (1, V) and their numbers."""
    count = 4000
    shares = np.bincount(draw(logits.expand(count, -1), grid(count)).numpy(), minlength=V) / count
    np.testing.assert_allclose(shares, expected, rtol=0, atol=1.1 / count)
    # what has no probability is never drawn, and what has some is
    assert not shares[expected == 0].any() and shares[expected > 2 / count].all()


def assert_fair(draw, logits, expected, count: int = 30_000) -> None:
    """The same with the engine's numbers: Pearson's statistic of these draws, within 4 standard
    deviations of its mean."""
    uniform = torch.from_numpy(uniform_numbers([77] * count, [0] * count, range(count)))
    tokens, expected = draw(logits.expand(count, -1), uniform), count * expected
    counts = np.bincount(tokens.numpy(), minlength=V).astype(float)
    rare = expected < 10  # too few for the statistic one by one: together
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    assert (counts[expected == 0] == 0).all()
    counts, expected = counts[expected > 0], expected[expected > 0]
    if (k := len(counts) - 1) == 0:
        return
    statistic = ((counts - expected) ** 2 / expected).sum() / k
    deviations = (statistic ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
    assert abs(deviations) < 4


def refuse(*_):
    raise AssertionError("this is not needed here")


class History(NamedTuple):
    """What edits of logits need to know of a row's sequence."""

    tokens: list[int]  # from `position` on they are not looked at
    num_prompt: int
    position: int  # of the token to be sampled
    stop_ids: frozenset[int] = frozenset()


def naive_edits(logits: list[float], p: SamplingParams, h: History) -> list[float]:
    """Edited logits, by the definition of each parameter."""
    x = list(logits)
    if p.allowed_token_ids is not None:
        x = [v if i in p.allowed_token_ids else -math.inf for i, v in enumerate(x)]
    for i, bias in (p.logit_bias or {}).items():
        x[i] += bias
    past = h.tokens[: h.position]
    output = Counter(past[h.num_prompt :])
    for word in p.bad_words:
        if past[len(past) - len(word) + 1 :] == list(word[:-1]) or len(word) == 1:
            x[word[-1]] = -math.inf
    if sum(output.values()) < p.min_tokens:
        for i in h.stop_ids:
            x[i] = -math.inf
    for i in set(past):
        x[i] = x[i] / p.repetition_penalty if x[i] > 0 else x[i] * p.repetition_penalty
    for i, count in output.items():
        x[i] -= p.presence_penalty + p.frequency_penalty * count
    if p.logits_processor:
        x = p.logits_processor(past, torch.tensor(x)).tolist()
    return x


def ban_even(tokens, logits):
    logits[::2] = -torch.inf
    return logits


def favour_the_last(tokens, logits):
    return logits + 4.0 * torch.nn.functional.one_hot(torch.tensor(tokens[-1]), len(logits))
