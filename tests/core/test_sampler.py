"""Sampling: the parameters, where the randomness comes from, and that draws are fair."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from microvllm.sampler import (
    SamplingParams,
    draw_tokens,
    keep_top_k,
    keep_top_p,
    sample,
    uniform_numbers,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LARGEST = 1 - 2.0**-24  # of the uniform numbers


def chi_square(counts, probabilities) -> float:
    """How many standard deviations Pearson's statistic is above its mean (Wilson-Hilferty)."""
    expected = np.asarray(probabilities) * counts.sum()
    assert expected.min() >= 5, "too few draws for the statistic"
    k = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))


def pick(logits, params, uniform):
    """sample() with the tensors the engine would make."""
    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float32)
    tokens = sample(logits, params, temperature, torch.tensor(uniform, dtype=torch.float32))
    assert tokens.shape == (len(params),)
    return tokens.tolist()


def grid(count):
    """Numbers that cover [0, 1) evenly: each stands for 1/count of all draws."""
    return ((torch.arange(count, dtype=torch.float64) + 0.5) / count).float()


# the parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", 1e39),
        ("max_tokens", 0), ("max_tokens", 2**31), ("n", 0), ("top_k", -1), ("top_p", 0),
        ("top_p", 1.01), ("min_p", -0.1), ("min_p", 1.5), ("seed", -1), ("seed", 2**64),
        ("sample_index", -1),
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused_by_name(name, value):
    """What the full engine says of wrong types is in tests/features/test_params.py."""
    with pytest.raises(ValueError, match=f"{name} must be between .*, got"):
        SamplingParams(**{name: value})


def test_params_are_hashable_and_stay_what_they_were():
    params = SamplingParams(0.5, 10, 3, True, stop_token_ids=[3, 4])
    assert params.stop_token_ids == (3, 4)
    again = replace(params, seed=3)
    assert again.seed == 3 and replace(again, seed=None) == params
    assert len({params, again, replace(params)}) == 2
    with pytest.raises(TypeError, match="positional"):
        SamplingParams(0.5, 10, 3, True, 2)


def test_filters_matter_only_where_they_drop_a_token():
    for filters in ({"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}):
        assert SamplingParams(**filters).drops_tokens
        assert not SamplingParams(temperature=0, **filters).drops_tokens
    assert not SamplingParams(top_k=0, top_p=1.0, min_p=0.0).drops_tokens


# the uniform numbers -----------------------------------------------------------------------------


def test_the_number_depends_on_seed_sample_and_position_alone():
    rows = [(s, k, p) for s in (0, 1, 2**64 - 1) for k in (0, 1, 7) for p in (0, 1, 1000)]
    together = uniform_numbers(*zip(*rows, strict=True))
    assert together.dtype == np.float32 and together.shape == (27,)
    assert [uniform_numbers([s], [k], [p])[0] for s, k, p in rows] == together.tolist()
    shuffled = np.random.default_rng(0).permutation(27)
    again = uniform_numbers(*zip(*[rows[i] for i in shuffled], strict=True))
    assert (again == together[shuffled]).all()
    assert len(set(together.tolist())) == 27  # none of the three is ignored
    assert len(uniform_numbers([], [], [])) == 0


def test_the_number_is_the_same_tomorrow():
    """A seed written down in a paper must give the same text in the next version."""
    values = uniform_numbers([0, 7, 2**63], [0, 1, 2], [0, 100, 2**20])
    assert (values * 2**24).tolist() == FROZEN_NUMBERS


FROZEN_NUMBERS = [2327157, 6437919, 10114958]


@pytest.mark.parametrize("varied", ["seed", "sample", "position"])
def test_the_number_is_uniform_along_each_of_its_arguments(varied):
    count = 100_000
    rows = {"seed": [11] * count, "sample": [0] * count, "position": [5] * count}
    rows[varied] = range(count)
    u = uniform_numbers(*rows.values())
    assert 0 <= u.min() and u.max() <= LARGEST
    assert (u * 2.0**24 == np.round(u * 2.0**24)).all()  # 24 bits: evenly spaced
    bins = np.bincount((u * 256).astype(int), minlength=256)
    assert abs(chi_square(bins, np.full(256, 1 / 256))) < 4
    low_bits = np.bincount((u * 2**24).astype(int) % 256, minlength=256)
    assert abs(chi_square(low_bits, np.full(256, 1 / 256))) < 4
    # neighbours, on a 16 x 16 board
    pairs = (u[:-1] * 16).astype(int) * 16 + (u[1:] * 16).astype(int)
    assert abs(chi_square(np.bincount(pairs, minlength=256), np.full(256, 1 / 256))) < 4


def test_samples_of_one_seed_are_independent():
    """Sample 0 and sample 1 of a request, at the same positions; seeds next to each other too."""
    positions = range(100_000)
    size = len(positions)
    base = uniform_numbers([3] * size, [0] * size, positions)
    for seed, index in [(3, 1), (4, 0), (2, 1)]:
        other = uniform_numbers([seed] * size, [index] * size, positions)
        pairs = (base * 16).astype(int) * 16 + (other * 16).astype(int)
        assert abs(chi_square(np.bincount(pairs, minlength=256), np.full(256, 1 / 256))) < 4
    # sums of the arguments must not matter: (3, 1, p) is not (3, 0, p + 1)
    assert (
        uniform_numbers([3] * 99, [1] * 99, range(99))
        != uniform_numbers([3] * 99, [0] * 99, range(1, 100))
    ).all()


# the draw ----------------------------------------------------------------------------------------


def test_draws_follow_the_softmax():
    """100,000 draws with the engine's own numbers, of one seed."""
    count = 100_000
    logits = torch.linspace(-3, 3, 23)[torch.randperm(23, generator=torch.manual_seed(0))]
    u = uniform_numbers([42] * count, [0] * count, range(count))
    params = [SamplingParams(temperature=0.8)] * count
    tokens = np.array(pick(logits.expand(count, -1), params, u))
    expected = torch.softmax(logits.double() / 0.8, -1).numpy()
    assert abs(chi_square(np.bincount(tokens, minlength=23), expected)) < 4


def test_a_token_owns_its_slice_of_the_numbers():
    """Tokens in the order of their ids, each as long as it is likely, to one part in 100,000."""
    logits = torch.randn(50, generator=torch.manual_seed(1)) * 2
    tokens = draw_tokens(logits.expand(100_000, -1), grid(100_000))
    assert (tokens.diff() >= 0).all()
    shares = torch.bincount(tokens, minlength=50) / 100_000
    torch.testing.assert_close(shares, torch.softmax(logits, -1), rtol=0, atol=1.1e-5)


def test_the_first_id_whose_cumulative_probability_exceeds_the_number():
    logits = torch.tensor([0.25, 0.0, 0.5, 0.25]).log()  # the second has no probability
    below = float(np.nextafter(np.float32(0.25), np.float32(0)))
    for u, token in [(0, 0), (below, 0), (0.25, 2), (0.7499, 2), (0.75, 3), (LARGEST, 3)]:
        assert pick(logits[None], [SamplingParams()], [u]) == [token], u


@pytest.mark.parametrize("vocab", [2, 7, 311, 65536])
def test_tokens_without_probability_are_never_drawn(vocab):
    """Leading, trailing and scattered ones, with numbers at both ends and wherever the sum of the
    probabilities may round to less than 1."""
    generator = torch.manual_seed(vocab)
    ends = [0.0, 2.0**-24, 2.0**-23, 0.5, 1 - 2.0**-20, 1 - 2.0**-22, 1 - 2.0**-23, LARGEST]
    for _ in range(8):
        logits = torch.randn(len(ends), vocab, generator=generator) * 3
        off = torch.rand(logits.shape, generator=generator) < 0.5
        off[:, 0] = off[:, -1] = True
        off[:, vocab // 2] = False
        logits[off] = -torch.inf
        tokens = draw_tokens(logits, torch.tensor(ends))
        assert not off.gather(1, tokens[:, None]).any()
        # probabilities that are not masked but so small that they are 0 in float32
        logits[off] = -1000.0
        tokens = draw_tokens(logits, torch.tensor(ends))
        assert not off.gather(1, tokens[:, None]).any()


def test_top_k_keeps_the_largest_and_their_ties():
    logits = torch.tensor([1.0, 3.0, 2.0, 3.0, 0.0])
    for k, kept in [
        (1, {1, 3}),
        (2, {1, 3}),
        (3, {1, 2, 3}),
        (4, {0, 1, 2, 3}),
        (5, set(range(5))),
    ]:
        masked = keep_top_k(logits[None], [k])[0]
        assert set(masked.isfinite().nonzero()[:, 0].tolist()) == kept
        assert (masked[list(kept)] == logits[list(kept)]).all()
        drawn = pick(logits.expand(2000, -1), [SamplingParams(top_k=k)] * 2000, grid(2000).tolist())
        assert set(drawn) == kept


def test_top_p_keeps_no_more_than_hold_exactly_so_much():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    held = torch.softmax(logits, -1).cumsum(-1) - torch.softmax(logits, -1)  # by all likelier ones
    for count in (1, 2, 3):
        kept = keep_top_p(logits, [held[0, count].item()]).isfinite()
        assert kept.sum() == count and kept[0, :count].all()


def test_top_k_beyond_the_vocabulary_or_0_is_off():
    logits = torch.randn(5, 6, generator=torch.manual_seed(0))
    uniform = [0.1, 0.3, 0.5, 0.7, 0.9]
    plain = pick(logits, [SamplingParams()] * 5, uniform)
    for k in (0, 6, 7, 2**31 - 1):
        assert pick(logits, [SamplingParams(top_k=k)] * 5, uniform) == plain
    # each row has its own, whatever the others want
    params = [SamplingParams(top_k=k) for k in (None, 0, 6, 100, 1)]
    assert pick(logits, params, uniform) == plain[:4] + [int(logits[4].argmax())]


def test_draws_among_the_top_k_follow_their_softmax():
    logits = torch.randn(40, generator=torch.manual_seed(3)) * 2
    params = [SamplingParams(top_k=5, temperature=1.5)] * 100_000
    tokens = torch.tensor(pick(logits.expand(100_000, -1), params, grid(100_000).tolist()))
    top = logits.topk(5)
    expected = torch.zeros(40).index_put((top.indices,), torch.softmax(top.values / 1.5, -1))
    shares = torch.bincount(tokens, minlength=40) / 100_000
    torch.testing.assert_close(shares, expected, rtol=0, atol=1.1e-5)


def test_greedy_is_the_exact_argmax_alone_and_among_sampled_rows():
    """Neighbouring floats: dividing them by a temperature, or a softmax, would make them equal."""
    a = np.float32(14.999)
    logits = torch.randn(6, 100, generator=torch.manual_seed(0))
    logits[0, 70], logits[0, 20] = float(np.nextafter(a, np.float32(99))), float(a)
    logits[2, 30] = logits[2, 60] = 50.0  # a tie: the lowest id
    logits[4] = 0.0
    greedy, hot = SamplingParams(temperature=0), SamplingParams(temperature=100.0, top_k=50)
    expected = logits.argmax(-1).tolist()
    assert expected[0] == 70 and expected[2] == 30 and expected[4] == 0
    uniform = [0.999, 0.3, 0.999, 0.6, 0.999, 0.9]
    assert pick(logits, [greedy] * 6, uniform) == expected
    mixed = pick(logits, [greedy, hot] * 3, uniform)
    assert mixed[::2] == expected[::2]
    assert mixed[1::2] == pick(logits[1::2], [hot] * 3, uniform[1::2])


def test_rows_do_not_depend_on_each_other():
    logits = torch.randn(12, 200, generator=torch.manual_seed(5)) * 3
    params = [
        SamplingParams(temperature=t, top_k=k)
        for t in (0, 1e-50, 0.7, 3.0) for k in (None, 1, 20)
    ]  # fmt: skip
    logits[:, 3] = logits[:, 9] = 20.0  # a tie at the top
    uniform = uniform_numbers(range(12), [0] * 12, [9] * 12).tolist()
    uniform[3] = uniform[4] = 0.9
    together = pick(logits, params, uniform)
    alone = [pick(logits[i : i + 1], params[i : i + 1], uniform[i : i + 1])[0] for i in range(12)]
    assert together == alone


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-30, 1e-10])
def test_a_tiny_temperature_takes_the_largest(temperature):
    logits = torch.randn(9, 50, generator=torch.manual_seed(0)) * 4
    logits[:, 7] = -torch.inf
    params = [SamplingParams(temperature=temperature)] * 9
    for u in (0.0, 0.5, LARGEST):
        assert pick(logits, params, [u] * 9) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e4, 1e30, 1e38])
def test_a_huge_temperature_is_fair_to_all(temperature):
    logits = torch.linspace(-15, 15, 10)
    params = [SamplingParams(temperature=temperature)] * 1000
    tokens = pick(logits.expand(1000, -1), params, grid(1000).tolist())
    shares = torch.bincount(torch.tensor(tokens), minlength=10) / 1000
    torch.testing.assert_close(shares, torch.full((10,), 0.1), rtol=0, atol=2e-3)
    # and top_k still knows which are the largest
    params = [SamplingParams(temperature=temperature, top_k=3)] * 1000
    tokens = pick(logits.expand(1000, -1), params, grid(1000).tolist())
    assert set(tokens) == {7, 8, 9}
