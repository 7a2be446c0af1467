"""Every sampling parameter: against a naive loop over one row, by its frequencies, and mixed."""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from microvllm import SamplingParams, sampler
from microvllm.cpu import kernels as kernels_cpu
from microvllm.sampler import History, Sampled, is_plain, noise, on, sample

V = 60
STOP_IDS = frozenset({7, 8})
BACKENDS = ["numba", "torch"]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """What a CPU does, and the plain torch that other devices do."""
    if request.param == "torch":
        monkeypatch.setattr(sampler.importlib.util, "find_spec", lambda name: None)
    return request.param


def logits_of(rows: int, vocab: int = V, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.manual_seed(seed)) * 3


def history_of(rows: int, seed: int = 0, num_prompt: int = 6, length: int = 16) -> list[History]:
    """Texts with many repetitions, and behind each what must not be looked at."""
    rng = np.random.default_rng(seed)
    texts = rng.integers(0, 12, (rows, length)).tolist()
    return [History([*text, ~0], num_prompt, length, STOP_IDS) for text in texts]


def run(logits, params, uniform, history=None, softcap=0.0):
    """sample() with the tensors that the engine would make."""
    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float32)
    uniform = torch.as_tensor(uniform, dtype=torch.float32)
    before = logits.clone()
    result = sample(logits, params, temperature, uniform, softcap, history)
    assert torch.equal(before, logits), "the model's logits were changed"
    return result


def flat(scores: dict) -> list[float]:
    row = (scores["token_id"], scores["logprob"], scores["sampler_logprob"])
    return [number for entry in (row, *scores["top"]) for number in entry]


def grid(count):
    """Noise that covers [0, 1) evenly."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


# a row, the slow and obvious way -----------------------------------------------------------------


def naive_edits(logits: list[float], p: SamplingParams, h: History | None) -> list[float]:
    x = list(logits)
    if p.allowed_token_ids is not None:
        x = [v if i in p.allowed_token_ids else -math.inf for i, v in enumerate(x)]
    for i, bias in (p.logit_bias or {}).items():
        x[i] += bias
    if h is None:
        return x
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


def naive_probabilities(logits: list[float], p: SamplingParams, h: History | None) -> np.ndarray:
    x = np.array(naive_edits(logits, p, h))
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


def ban_even(tokens, logits):
    logits[::2] = -torch.inf
    return logits


def favour_the_last(tokens, logits):
    return logits + 4.0 * torch.nn.functional.one_hot(torch.tensor(tokens[-1]), len(logits))


WORDS = ((3,), (1, 4), (2, 0, 5))
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
    "allowed": {"allowed_token_ids": (5, 9, 11, 30, 59)},
    "bias": {"logit_bias": {0: 3.5, 59: 2.0, 17: -100.0}},
    "bad words": {"bad_words": WORDS},
    "min_tokens": {"min_tokens": 11},
    "enough tokens": {"min_tokens": 10},
    "repetition": {"repetition_penalty": 1.8},
    "reward of repetition": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.8},
    "processor": {"logits_processor": ban_even},
    "processor that looks": {"logits_processor": favour_the_last},
    "everything": {
        "temperature": 1.2, "top_k": 25, "top_p": 0.93, "min_p": 0.01, "repetition_penalty": 1.2,
        "presence_penalty": -0.4, "frequency_penalty": 0.3, "min_tokens": 12,
        "logit_bias": {4: 2.0, 8: 50.0}, "allowed_token_ids": tuple(range(0, 60, 3)) + (4, 7, 8),
        "bad_words": WORDS, "logits_processor": favour_the_last,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FILTERS)
def test_each_filter_gives_the_frequencies_of_a_naive_row(backend, name):
    """Noise on a grid: what a token is drawn for is its probability, to a step at either end."""
    params, count = SamplingParams(**FILTERS[name]), 4000
    for seed in range(3):
        logits, history = logits_of(1, seed=seed), history_of(1, seed=seed)
        tokens = run(logits.expand(count, -1), [params] * count, grid(count), history * count)
        expected = naive_probabilities(logits[0].double().tolist(), params, history[0])
        shares = np.bincount(tokens.numpy(), minlength=V) / count
        np.testing.assert_allclose(shares, expected, rtol=0, atol=1.1 / count)
        # what has no probability is never drawn, and what has some is
        assert not shares[expected == 0].any() and shares[expected > 2 / count].all()


@pytest.mark.parametrize("name", FILTERS)
def test_frequencies_follow_the_filtered_softmax_with_the_engines_noise(name):
    """Pearson's statistic of 30,000 draws, within 4 standard deviations of its mean."""
    params, count = SamplingParams(**FILTERS[name]), 30_000
    logits, history = logits_of(1, seed=5), history_of(1, seed=5)
    uniform = noise([77] * count, [0] * count, range(count))
    tokens = run(logits.expand(count, -1), [params] * count, uniform, history * count)
    expected = count * naive_probabilities(logits[0].double().tolist(), params, history[0])
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


def test_rows_with_different_filters_are_as_they_are_alone(backend):
    """All of them twice in one batch, shuffled, greedy ones among them: no row sees another."""
    params = [SamplingParams(**given) for given in FILTERS.values()] * 2
    params += [replace(p, temperature=0.0) for p in params]
    params += [replace(p, logprobs=2) for p in params[::3]]
    order = np.random.default_rng(1).permutation(len(params))
    params = [params[i] for i in order]
    logits, history = logits_of(len(params)), history_of(len(params))
    uniform = noise(range(len(params)), [0] * len(params), [3] * len(params))
    together = run(logits, params, uniform, history, softcap=15.0)
    scores = together.logprobs()
    assert scores.keys() == {i for i, p in enumerate(params) if p.logprobs == 2}
    for i, p in enumerate(params):
        row = slice(i, i + 1)
        alone = run(logits[row], [p], uniform[row], history[row], softcap=15.0)
        if p.logprobs is None:
            assert alone.tolist() == [together.tokens[i]]
        else:
            assert alone.tokens.tolist() == [together.tokens[i]]
            assert flat(alone.logprobs()[0]) == pytest.approx(flat(scores[i]), abs=1e-5)


def test_both_backends_draw_the_same(monkeypatch):
    params = [SamplingParams(**given) for given in FILTERS.values()] * 20
    logits, history = logits_of(len(params), seed=9), history_of(len(params), seed=9)
    uniform = noise(range(len(params)), [1] * len(params), [4] * len(params))
    numba = run(logits, params, uniform, history, softcap=15.0)
    monkeypatch.setattr(sampler.importlib.util, "find_spec", lambda name: None)
    assert torch.equal(numba, run(logits, params, uniform, history, softcap=15.0))


def test_asking_for_log_probabilities_does_not_change_the_tokens(backend):
    params = [SamplingParams(**given) for given in FILTERS.values()]
    params += [replace(p, temperature=0.0) for p in params]
    logits, history = logits_of(len(params)), history_of(len(params))
    uniform = noise(range(len(params)), [0] * len(params), [8] * len(params))
    tokens = run(logits, params, uniform, history, softcap=15.0)
    asking = [replace(p, logprobs=0) for p in params]
    assert torch.equal(run(logits, asking, uniform, history, softcap=15.0).tokens, tokens)


@pytest.mark.parametrize("name", FILTERS)
def test_greedy_is_the_argmax_after_the_edits(backend, name):
    params = replace(SamplingParams(**FILTERS[name]), temperature=0.0)
    logits, history = logits_of(20), history_of(20)
    logits[:, 50] = logits[:, 10] = logits.max(-1).values  # the lowest id of equals
    tokens = run(logits, [params] * 20, torch.rand(20), history).tolist()
    expected = [naive_edits(x.tolist(), params, h) for x, h in zip(logits, history, strict=True)]
    assert tokens == [int(np.argmax(np.array(x, np.float32))) for x in expected]


def test_greedy_rows_tell_logits_apart_that_the_cap_makes_equal(backend):
    """Among rows that are sampled, edited or scored as when all are greedy."""
    logits = logits_of(4)
    logits[:, 20], logits[:, 40] = 200.0, 201.0  # tanh is 1 for both
    greedy, score = SamplingParams(temperature=0), SamplingParams(temperature=0, logprobs=1)
    hot, biased = SamplingParams(temperature=5.0), SamplingParams(logit_bias={3: 1.0})
    assert run(logits, [greedy] * 4, [0.9] * 4, softcap=15.0).tolist() == [40] * 4
    mixed = run(logits, [greedy, hot, score, biased], [0.9] * 4, softcap=15.0)
    assert mixed.tokens[[0, 2]].tolist() == [40, 40]


# what is not used --------------------------------------------------------------------------------


def refuse(*_):
    raise AssertionError("nobody asked for this")


def test_plain_rows_go_through_no_filter(monkeypatch):
    """Nor do greedy ones whose argmax survives them, and no history is needed."""
    for name in ("edit", "truncate", "finish", "banned", "cap_logits"):
        monkeypatch.setattr(sampler, name, refuse)
    params = [SamplingParams(), SamplingParams(temperature=0, top_k=3), SamplingParams(top_p=1)]
    assert is_plain(params)
    run(logits_of(3), params, [0.5] * 3, softcap=15.0)


@pytest.mark.parametrize(
    "function, uses",
    [
        ("keep_top_k", ["top_k"]),
        ("keep_top_p", ["top_p"]),
        ("keep_min_p", ["min_p"]),
        ("banned", ["bad_words", "min_tokens"]),
    ],
)
def test_a_filter_that_no_row_uses_does_not_run(monkeypatch, function, uses):
    monkeypatch.setattr(sampler.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sampler, function, refuse)
    others = [given for given in FILTERS.values() if not given.keys() & set(uses)]
    params = [SamplingParams(**given) for given in others]
    run(logits_of(len(params)), params, [0.5] * len(params), history_of(len(params)))
    with pytest.raises(AssertionError, match="nobody asked"):
        params[0] = SamplingParams(**FILTERS["everything"])
        run(logits_of(len(params)), params, [0.5] * len(params), history_of(len(params)))


def test_only_the_rows_that_use_a_filter_go_through_it(monkeypatch):
    seen = []
    keep = sampler.keep_top_p
    monkeypatch.setattr(sampler.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sampler, "keep_top_p", lambda x, p: seen.append((len(x), p)) or keep(x, p))
    params = [SamplingParams(top_p=0.5), SamplingParams(), SamplingParams(0.0, top_p=0.5)]
    run(logits_of(4), [*params, SamplingParams(top_p=0.25)], [0.5] * 4)
    assert seen == [(2, [0.5, 0.25])]


def test_what_a_step_asks_of_each_row_is_known_beforehand():
    def flags(**given):
        p = SamplingParams(**given)
        return "".join(
            letter
            for letter, flag in zip(
                "pehT", (p.plain, p.edited, p.needs_history, p.truncated), strict=True
            )
            if flag
        )

    neutral = {"top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "logit_bias": {}}
    assert flags() == flags(**neutral) == flags(bad_words=[], presence_penalty=0.0) == "p"
    assert flags(stop="x", stop_token_ids=[3], n=4, seed=1, ignore_eos=True) == "p"
    assert flags(temperature=0, top_k=5, top_p=0.5, min_p=0.5) == "p"
    assert flags(top_k=5) == flags(top_p=0.5) == flags(min_p=0.5) == "pT"
    assert flags(logprobs=0) == ""
    assert flags(logit_bias={1: 1}) == flags(allowed_token_ids=[1]) == flags(min_tokens=1) == "e"
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert flags(**{name: 0.5}) == "eh"
    assert flags(bad_words=["a"]) == flags(logits_processor=ban_even) == "eh"
    assert flags(min_tokens=1, allowed_token_ids=[1]) == "eh"  # no token may be left
    assert is_plain([SamplingParams()] * 3) and is_plain([])
    assert is_plain([SamplingParams(top_k=1)])
    assert not is_plain([SamplingParams(), SamplingParams(logprobs=0)])


# nothing left ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"allowed_token_ids": [3], "bad_words": [[3]]},
        {"allowed_token_ids": [7, 8], "min_tokens": 100},
        {"logits_processor": lambda tokens, logits: torch.full_like(logits, -torch.inf)},
        {"logits_processor": lambda tokens, logits: logits * torch.nan},
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_any_token_gets_minus_one_and_the_others_theirs(backend, given, temperature):
    params = [SamplingParams(), SamplingParams(temperature, **given), SamplingParams(0.0)]
    logits, history = logits_of(3), history_of(3)
    tokens = run(logits, params, [0.5] * 3, history).tolist()
    alone = [run(logits[i : i + 1], [params[i]], [0.5]).tolist()[0] for i in (0, 2)]
    assert tokens == [alone[0], -1, alone[1]]
    scored = run(logits, [replace(p, logprobs=1) for p in params], [0.5] * 3, history)
    assert scored.tokens.tolist() == tokens


def test_a_processor_that_returns_no_logits_is_named():
    for result, words in [(None, "None"), (torch.zeros(3), r"\(3,\)"), ([0.0] * V, "0.0")]:
        params = SamplingParams(logits_processor=lambda tokens, logits, result=result: result)
        with pytest.raises(TypeError, match=rf"logits_processor must return .*\({V},\).*{words}"):
            run(logits_of(1), [params], [0.5], history_of(1))


def test_a_processor_sees_the_tokens_so_far_and_float32_logits():
    seen = []

    def look(tokens, logits):
        seen.append((tokens, logits.clone()))
        return logits

    history = history_of(2)
    logits = logits_of(2).bfloat16()
    params = [SamplingParams(logits_processor=look), SamplingParams(logits_processor=look)]
    run(logits, params, [0.5] * 2, history, softcap=15.0)
    for (tokens, given), h, row in zip(seen, history, logits, strict=True):
        assert tokens == h.tokens[:16] and isinstance(tokens, list)
        torch.testing.assert_close(given, 15 * torch.tanh(row.float() / 15), rtol=0, atol=5e-6)


def test_bad_words_span_prompt_and_output():
    """The first token of a word may be the prompt's last; a word longer than the text is none."""
    params = SamplingParams(temperature=0, bad_words=[[1, 2], [9] * 9])
    logits = torch.zeros(1, V)
    logits[0, 2] = 5.0
    assert run(logits, [params], [0.5], [History([0, 1], 2, 2)]).tolist() == [0]
    assert run(logits, [params], [0.5], [History([1, 0], 2, 2)]).tolist() == [2]
    logits[0, 9] = 6.0
    assert run(logits, [params], [0.5], [History([9] * 7, 2, 7)]).tolist() == [9]
    assert run(logits, [params], [0.5], [History([9] * 8, 2, 8)]).tolist() == [2]


# log-probabilities -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_log_probabilities_of_the_model_and_of_the_sampler(backend, name, temperature):
    params = replace(SamplingParams(**FILTERS[name]), temperature=temperature, logprobs=4)
    logits, history = logits_of(6), history_of(6)
    result = run(logits, [params] * 6, torch.rand(6), history, softcap=15.0)
    assert isinstance(result, Sampled)
    capped = 15 * torch.tanh(logits.double() / 15)
    model = torch.log_softmax(capped, -1)
    listed = result.logprobs()
    assert list(listed) == list(range(6))
    for i, row in listed.items():
        token, top = row["token_id"], row["top"]
        assert token == result.tokens[i]
        with np.errstate(divide="ignore"):
            drawn = np.log(naive_probabilities(capped[i].tolist(), params, history[i]))
        likely = [int(t) for t in model[i].argsort(descending=True) if t != token][:4]
        assert [t for t, _, _ in top] == likely
        for t, logprob, sampler_logprob in [(token, row["logprob"], row["sampler_logprob"]), *top]:
            assert logprob == pytest.approx(float(model[i, t]), abs=1e-5)
            assert sampler_logprob == pytest.approx(drawn[t], abs=2e-5)
        assert temperature > 0 or row["sampler_logprob"] == 0


def test_each_row_gets_as_many_alternatives_as_it_asks_for():
    params = [SamplingParams(logprobs=k) for k in (0, None, 3, 1, 2**31 - 1)]
    result = run(logits_of(5), params, [0.5] * 5)
    listed = result.logprobs()
    assert {row: len(entry["top"]) for row, entry in listed.items()} == {0: 0, 2: 3, 3: 1, 4: V - 1}
    ids = [t for t, _, _ in listed[4]["top"]]
    assert sorted([*ids, listed[4]["token_id"]]) == list(range(V))
    total = sum(math.exp(lp) for _, lp, _ in listed[4]["top"]) + math.exp(listed[4]["logprob"])
    assert total == pytest.approx(1, abs=1e-5)
    assert isinstance(run(logits_of(1), [SamplingParams()], [0.5]), torch.Tensor)


# large -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.3, 3.0, 10.0])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999])
def test_top_p_over_a_large_vocabulary_keeps_what_a_sort_keeps(spread, top_p):
    """16 rows that keep from one token to tens of thousands, 64 draws of each."""
    logits = torch.randn(16, 65536, generator=torch.manual_seed(3)) * spread
    weights = torch.softmax(logits.double(), -1)
    ordered = weights.sort(-1, descending=True).values
    above = ordered.cumsum(-1) - ordered
    uniform = grid(64).repeat(16)
    params = [SamplingParams(top_p=top_p)] * 1024
    tokens = run(logits.repeat_interleave(64, 0), params, uniform).view(16, 64)
    # float32 knows where the border is to 1e-6 of the whole, and makes ties of near neighbours
    rounding, border = 1e-6, (above < top_p).sum(-1, keepdim=True)
    furthest = (above < top_p + rounding).sum(-1, keepdim=True) - 1
    assert (weights.gather(1, tokens) >= ordered.gather(1, furthest) * (1 - rounding)).all()
    # and the draws are those of the renormalised rest, in the order of ids, in rows where these two
    # do not matter or move the border by little
    last, first = ordered.gather(1, border - 1), ordered.gather(1, border)
    nearest = (above < top_p - rounding).sum(-1, keepdim=True) - 1
    clear = (nearest == furthest) & (first < last * (1 - rounding)) | (last < rounding)
    assert clear.sum() >= 8
    kept = weights * (weights >= last)
    after = kept.cumsum(-1).gather(1, tokens)
    before, target = after - kept.gather(1, tokens), uniform.view(16, 64) * kept.sum(-1)[:, None]
    right = (before < target + 3 * rounding) & (target < after + 3 * rounding)
    assert (right | ~clear).all()


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 1000, 65536])
@pytest.mark.parametrize("padding", [0, 13])
def test_the_last_token_of_any_vocabulary_can_be_drawn(backend, vocab, padding):
    """Also where the rows of the logits are longer than the vocabulary."""
    logits = torch.full((3, vocab + padding), 30.0)[:, :vocab]
    top = [1 - 2.0**-24] * 3
    params = [SamplingParams(), SamplingParams(top_k=vocab), SamplingParams(top_p=0.999, min_p=0.5)]
    assert run(logits, params, top).tolist() == [vocab - 1] * 3
    assert run(logits, params, [0.0] * 3).tolist() == [0] * 3
    assert run(logits, [SamplingParams(0.0)] * 3, top).tolist() == [0] * 3


def test_noise_at_the_border_of_two_blocks_of_ids(backend):
    """256 ids are one block of the search: half the noise is before the second, half in it."""
    for count, u, token in [(512, 0.5, 256), (1024, 0.25, 256), (1024, 0.75, 768)]:
        below = float(np.nextafter(np.float32(u), np.float32(0)))
        tokens = run(torch.zeros(2, count), [SamplingParams()] * 2, [below, u])
        assert tokens.tolist() == [token - 1, token]


def test_a_block_whose_sum_was_rounded_up_gives_no_token_without_weight():
    """1 + 3/4 of a step of float32 is summed as a step more, and the noise falls between."""
    step = np.float32(2.0**-23)
    w = np.zeros(512, np.float32)
    w[0], w[1], w[300] = 1, 0.75 * step, 1
    sums = np.zeros(2, np.float32)
    u = (1 + 0.9 * float(step)) / (2 + float(step))
    assert kernels_cpu._draw(w, sums, u) == 1
    assert sums[0] == 1 + step


def test_ties_at_the_border_stay(backend):
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, -5.0]])
    for given in ({"top_k": 1}, {"top_k": 2}, {"top_p": 0.3}, {"top_p": 0.01}, {"min_p": 1.0}):
        params = [SamplingParams(**given)] * 300
        assert set(run(logits.expand(300, -1), params, grid(300)).tolist()) == {1, 2, 4}, given


def test_the_benchmark_runs():
    flags = "--rows 3,5 --vocab 99 --layers 1 --width 16 --turns 1 --device cpu".split()
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "sampler.py"
    output = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    *lines, last = output.stdout.splitlines()
    times = json.loads(last)["milliseconds"]
    assert times.keys() == {"3", "5"} and times["3"].keys() == times["5"].keys()
    assert len(lines) == 1 + 2 * len(times["3"]) and min(times["5"].values()) > 0


def test_a_device_is_never_waited_for(monkeypatch):
    """On the device "meta", which has no numbers: to read one, or to ask how many are true, is an
    error there. And whatever goes up, goes through `on`, from pinned memory."""
    sent, uploads = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            devices = [t.device.type for t in tree_leaves((args, out)) if torch.is_tensor(t)]
            uploads.extend([func] * ("cpu" in devices and "meta" in devices))
            return out

    monkeypatch.setattr(sampler, "on", lambda *args: sent.append(args) or on(*args))
    params = [
        SamplingParams(),
        SamplingParams(top_k=3, top_p=0.5, min_p=0.1, logprobs=2, logit_bias={3: 1.0}),
        SamplingParams(repetition_penalty=1.2, presence_penalty=0.1, frequency_penalty=0.2),
        SamplingParams(bad_words=((3, 4),), min_tokens=5, allowed_token_ids=[1, 2], logprobs=1),
        SamplingParams(temperature=0, logits_processor=lambda token_ids, logits: 2 * logits),
    ]
    history = [History([1, 2, 3, 4, 5], 2, 5, (7,))] * len(params)
    numbers = torch.empty(len(params), device="meta")
    with Watch():
        drawn = sample(torch.empty(len(params), 90, device="meta"), params, numbers, numbers, 15.0,
                       history)  # fmt: skip
    assert drawn.tokens.shape == (5,) and drawn.packed.shape == (2, 3, 4)
    assert len(uploads) == len(sent) > 20
    with pytest.raises(NotImplementedError):
        numbers[numbers > 0]


def test_on_a_gpu_an_upload_is_pinned_and_asynchronous(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: calls.append("pin") or t)
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *to, **how: calls.append((*to, how)) or t)
    on(torch.device("cuda", 0), [1, 2])
    assert calls == ["pin", (torch.device("cuda", 0), {"non_blocking": True})]
