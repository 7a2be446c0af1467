"""The parameters of every draw: against a naive loop over one row, by their frequencies, and
mixed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.sampling import (
    FILTERS,
    assert_fair,
    assert_naive_frequencies,
    grid,
    logits_of,
    naive_probabilities,
    refuse,
    run,
)

from microvllm import SamplingParams, sampler
from microvllm.loading import pick_backend
from microvllm.sampler import to_device, uniform_numbers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["numba", "sdpa"])
def backend(request):
    """What a CPU does, and the plain torch of other devices, which is the core's."""
    return pick_backend(request.param, torch.device("cpu"), torch.float32)


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
    uniform = uniform_numbers(range(len(params)), [0] * len(params), [3] * len(params))
    together = run(backend, logits, params, uniform, softcap=15.0).tolist()
    for i, p in enumerate(params):
        row = slice(i, i + 1)
        assert run(backend, logits[row], [p], uniform[row], softcap=15.0).tolist() == [together[i]]


def test_both_backends_draw_the_same():
    params = [SamplingParams(**given) for given in FILTERS.values()] * 20
    logits = logits_of(len(params), seed=9)
    uniform = uniform_numbers(range(len(params)), [1] * len(params), [4] * len(params))
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


@pytest.fixture
def plain_torch():
    return pick_backend("sdpa", torch.device("cpu"), torch.float32)


def test_greedy_rows_go_through_no_filter(plain_torch, monkeypatch):
    """Nor do those whose argmax survives it."""
    for name in ("drop_tokens", "cap_logits"):
        monkeypatch.setattr(sampler, name, refuse)
    params = [SamplingParams(temperature=0), SamplingParams(temperature=0, top_k=3, top_p=0.5)]
    run(plain_torch, logits_of(2), params, [0.5] * 2, softcap=15.0)


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
def test_a_filter_that_no_row_uses_does_not_run(plain_torch, monkeypatch, name):
    monkeypatch.setattr(sampler, f"keep_{name}", refuse)
    params = [SamplingParams(**given) for given in FILTERS.values() if name not in given]
    run(plain_torch, logits_of(len(params)), params, [0.5] * len(params))
    with pytest.raises(AssertionError, match="not needed here"):
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
        assert not SamplingParams(**off).drops_tokens
    for used in ({"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5}):
        assert SamplingParams(**used).drops_tokens


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
    to_device([1, 2], torch.device("cuda", 0))
    assert calls == ["pin", (torch.device("cuda", 0), {"non_blocking": True})]
