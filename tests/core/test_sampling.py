"""The parameters of every draw: against a naive loop over one row, by their frequencies, and
mixed."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from microvllm import SamplingParams, sampler
from microvllm.full import pick_backend
from microvllm.sampler import noise, on

pytestmark = pytest.mark.usefixtures("one_thread")

V = 60


@pytest.fixture(params=["numba", "sdpa"])
def backend(request):
    """What a CPU does, and the plain torch of other devices, which is the core's."""
    return pick_backend(request.param, torch.device("cpu"), torch.float32)


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
    """Noise that covers [0, 1) evenly."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


# a row, the slow and obvious way ------------------------------------------------------------------


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
    """Noise on a grid: what a token is drawn for is its probability, to a step at either end.
    draw: of so many equal rows of logits (1, V) and their noise."""
    count = 4000
    shares = np.bincount(draw(logits.expand(count, -1), grid(count)).numpy(), minlength=V) / count
    np.testing.assert_allclose(shares, expected, rtol=0, atol=1.1 / count)
    # what has no probability is never drawn, and what has some is
    assert not shares[expected == 0].any() and shares[expected > 2 / count].all()


def assert_fair(draw, logits, expected, count: int = 30_000) -> None:
    """The same with the engine's noise: Pearson's statistic of so many draws, within 4 standard
    deviations of its mean."""
    uniform = torch.from_numpy(noise([77] * count, [0] * count, range(count)))
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


@pytest.mark.parametrize("name", FILTERS)
def test_each_filter_gives_the_frequencies_of_a_naive_row(backend, name):
    params = SamplingParams(**FILTERS[name])

    def draw(logits, uniform):
        return run(backend, logits, [params] * len(logits), uniform)

    for seed in range(3):
        logits = logits_of(1, seed=seed)
        expected = naive_probabilities(logits[0].double().tolist(), params)
        assert_naive_frequencies(draw, logits, expected)
    assert_fair(draw, logits, expected)


def test_rows_with_different_filters_are_as_they_are_alone(backend):
    """All of them twice in one batch, shuffled, greedy ones among them: no row sees another."""
    params = [SamplingParams(**given) for given in FILTERS.values()] * 2
    params += [replace(p, temperature=0.0) for p in params]
    params = [params[i] for i in np.random.default_rng(1).permutation(len(params))]
    logits = logits_of(len(params))
    uniform = noise(range(len(params)), [0] * len(params), [3] * len(params))
    together = run(backend, logits, params, uniform, softcap=15.0).tolist()
    for i, p in enumerate(params):
        row = slice(i, i + 1)
        assert run(backend, logits[row], [p], uniform[row], softcap=15.0).tolist() == [together[i]]


def test_both_backends_draw_the_same():
    params = [SamplingParams(**given) for given in FILTERS.values()] * 20
    logits = logits_of(len(params), seed=9)
    uniform = noise(range(len(params)), [1] * len(params), [4] * len(params))
    numba, torchs = (
        run(pick_backend(name, logits.device, logits.dtype), logits, params, uniform, softcap=15.0)
        for name in ("numba", "sdpa")
    )
    assert torch.equal(numba, torchs)


def test_greedy_rows_tell_logits_apart_that_the_cap_makes_equal(backend):
    """Among rows that are sampled as when all are greedy."""
    logits = logits_of(4)
    logits[:, 20], logits[:, 40] = 200.0, 201.0  # tanh is 1 for both
    greedy, hot = SamplingParams(temperature=0), SamplingParams(temperature=5.0)
    assert run(backend, logits, [greedy] * 4, [0.9] * 4, softcap=15.0).tolist() == [40] * 4
    mixed = run(backend, logits, [greedy, hot] * 2, [0.9] * 4, softcap=15.0)
    assert mixed[[0, 2]].tolist() == [40, 40]


# what is not used ---------------------------------------------------------------------------------


def refuse(*_):
    raise AssertionError("nobody asked for this")


@pytest.fixture
def plain_torch():
    return pick_backend("sdpa", torch.device("cpu"), torch.float32)


def test_greedy_rows_go_through_no_filter(plain_torch, monkeypatch):
    """Nor do those whose argmax survives it."""
    for name in ("truncate", "cap_logits"):
        monkeypatch.setattr(sampler, name, refuse)
    params = [SamplingParams(temperature=0), SamplingParams(temperature=0, top_k=3, top_p=0.5)]
    run(plain_torch, logits_of(2), params, [0.5] * 2, softcap=15.0)


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
def test_a_filter_that_no_row_uses_does_not_run(plain_torch, monkeypatch, name):
    monkeypatch.setattr(sampler, f"keep_{name}", refuse)
    params = [SamplingParams(**given) for given in FILTERS.values() if name not in given]
    run(plain_torch, logits_of(len(params)), params, [0.5] * len(params))
    with pytest.raises(AssertionError, match="nobody asked"):
        params[0] = SamplingParams(**FILTERS["all three"])
        run(plain_torch, logits_of(len(params)), params, [0.5] * len(params))


def test_only_the_rows_that_use_a_filter_go_through_it(plain_torch, monkeypatch):
    seen = []
    keep = sampler.keep_top_p
    monkeypatch.setattr(sampler, "keep_top_p", lambda x, p: seen.append((len(x), p)) or keep(x, p))
    params = [SamplingParams(top_p=0.5), SamplingParams(), SamplingParams(0.0, top_p=0.5)]
    run(plain_torch, logits_of(4), [*params, SamplingParams(top_p=0.25)], [0.5] * 4)
    assert seen == [(2, [0.5, 0.25])]


def test_what_drops_tokens_is_known_beforehand():
    neutral = {"top_k": 0, "top_p": 1, "min_p": 0}
    for off in ({}, neutral, {"temperature": 0, "top_k": 5, "top_p": 0.5, "min_p": 0.5}):
        assert not SamplingParams(**off).truncated
    for used in ({"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5}):
        assert SamplingParams(**used).truncated


# large --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 1000, 65536])
@pytest.mark.parametrize("padding", [0, 13])
def test_the_last_token_of_any_vocabulary_can_be_drawn(backend, vocab, padding):
    """Also where the rows of the logits are longer than the vocabulary."""
    logits = torch.full((3, vocab + padding), 30.0)[:, :vocab]
    top = [1 - 2.0**-24] * 3
    params = [SamplingParams(), SamplingParams(top_k=vocab), SamplingParams(top_p=0.999, min_p=0.5)]
    assert run(backend, logits, params, top).tolist() == [vocab - 1] * 3
    assert run(backend, logits, params, [0.0] * 3).tolist() == [0] * 3
    assert run(backend, logits, [SamplingParams(0.0)] * 3, top).tolist() == [0] * 3


def test_ties_at_the_border_stay(backend):
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, -5.0]])
    for given in ({"top_k": 1}, {"top_k": 2}, {"top_p": 0.3}, {"top_p": 0.01}, {"min_p": 1.0}):
        params = [SamplingParams(**given)] * 300
        assert set(run(backend, logits.expand(300, -1), params, grid(300)).tolist()) == {1, 2, 4}, (
            given
        )


def test_on_a_gpu_an_upload_is_pinned_and_asynchronous(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: calls.append("pin") or t)
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *to, **how: calls.append((*to, how)) or t)
    on(torch.device("cuda", 0), [1, 2])
    assert calls == ["pin", (torch.device("cuda", 0), {"non_blocking": True})]
