"""Sampling: what a parameter may be, where the noise comes from, and that draws are fair."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from microvllm import SamplingParams
from microvllm.sampler import draw, keep_top_k, keep_top_p, noise, sample

pytestmark = pytest.mark.usefixtures("one_thread")

LARGEST = 1 - 2.0**-24  # of the noise


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
    """Noise that covers [0, 1) evenly: each value stands for 1/count of all draws."""
    return ((torch.arange(count, dtype=torch.float64) + 0.5) / count).float()


# the parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value, error, words",
    [
        ("temperature", -0.1, ValueError, ["-0.1", "0"]),
        ("temperature", -0.0001, ValueError, ["-0.0001"]),
        ("temperature", math.nan, ValueError, ["nan"]),
        ("temperature", math.inf, ValueError, ["inf", "finite"]),
        ("temperature", -math.inf, ValueError, ["inf"]),
        ("temperature", 1e39, ValueError, ["1e+39"]),  # infinite in float32
        pytest.param("temperature", 10**400, ValueError, ["1000"], id="10**400"),
        ("temperature", "0.7", TypeError, ["'0.7'", "number"]),
        ("temperature", None, TypeError, ["None"]),
        ("temperature", True, TypeError, ["True"]),
        ("temperature", [1.0], TypeError, ["[1.0]"]),
        ("temperature", 1j, TypeError, ["1j"]),
        ("temperature", np.complex64(1), TypeError, []),
        ("max_tokens", 0, ValueError, ["1", "got 0"]),
        ("max_tokens", -3, ValueError, ["-3"]),
        ("max_tokens", 2**31, ValueError, [str(2**31)]),
        ("max_tokens", 1.0, TypeError, ["1.0", "integer"]),
        ("max_tokens", math.nan, TypeError, ["nan"]),
        ("max_tokens", math.inf, TypeError, ["inf"]),
        ("max_tokens", "16", TypeError, ["'16'"]),
        ("max_tokens", True, TypeError, ["True"]),
        ("top_k", -1, ValueError, ["-1"]),
        ("top_k", 2.0, TypeError, ["2.0"]),
        ("top_k", math.nan, TypeError, ["nan"]),
        ("top_k", "5", TypeError, ["'5'"]),
        ("top_k", True, TypeError, ["True"]),
        ("n", 0, ValueError, ["got 0"]),
        ("n", -1, ValueError, ["-1"]),
        ("n", 1.5, TypeError, ["1.5"]),
        ("n", "2", TypeError, ["'2'"]),
        ("n", True, TypeError, ["True"]),
        ("seed", -1, ValueError, ["-1"]),
        ("seed", 2**64, ValueError, [str(2**64)]),
        ("seed", 0.5, TypeError, ["0.5"]),
        ("seed", math.nan, TypeError, ["nan"]),
        ("seed", "0", TypeError, ["'0'"]),
        ("seed", False, TypeError, ["False"]),
        ("ignore_eos", 1, TypeError, ["got 1"]),
        ("ignore_eos", "yes", TypeError, ["'yes'"]),
        ("ignore_eos", None, TypeError, ["None"]),
        ("stop_token_ids", "12", TypeError, ["'12'"]),
        ("stop_token_ids", b"12", TypeError, []),
        ("stop_token_ids", 12, TypeError, ["12"]),
        ("stop_token_ids", [-1], ValueError, ["-1"]),
        ("stop_token_ids", [1.0], TypeError, ["1.0"]),
        ("stop_token_ids", ["1"], TypeError, ["'1'"]),
        ("stop_token_ids", [3, True], TypeError, ["True"]),
        ("top_p", 0, ValueError, ["between 1e-06 and 1", "got 0"]),
        ("top_p", 1.01, ValueError, ["1.01"]),
        ("top_p", math.nan, ValueError, ["nan"]),
        ("n", None, TypeError, ["integer", "None"]),
        ("min_p", -0.1, ValueError, ["between 0 and 1", "-0.1"]),
        ("min_p", 1.5, ValueError, ["1.5"]),
        ("min_p", True, TypeError, ["True"]),
        ("repetition_penalty", 0, ValueError, ["1e-06", "1e+06", "got 0"]),
        ("repetition_penalty", math.inf, ValueError, ["finite", "inf"]),
        ("presence_penalty", -math.inf, ValueError, ["finite", "-inf"]),
        ("presence_penalty", "1", TypeError, ["'1'"]),
        ("frequency_penalty", math.nan, ValueError, ["nan"]),
        ("frequency_penalty", 1e7, ValueError, ["1e+06", "10000000"]),
        ("min_tokens", -1, ValueError, ["-1"]),
        ("min_tokens", 1.0, TypeError, ["1.0"]),
        ("min_tokens", 257, ValueError, ["257", "max_tokens", "256"]),
        ("logprobs", -1, ValueError, ["-1"]),
        ("logprobs", True, TypeError, ["True"]),
        ("logprobs", 2.0, TypeError, ["2.0"]),
        ("stop", "", ValueError, ["empty"]),
        ("stop", ["a", ""], ValueError, ["empty"]),
        ("stop", [1], TypeError, ["got 1"]),
        ("stop", b"a", TypeError, ["b'a'"]),
        ("logit_bias", [(1, 2.0)], TypeError, ["dict", "[(1, 2.0)]"]),
        ("logit_bias", {"1": 2.0}, TypeError, ["integer", "'1'"]),
        ("logit_bias", {-1: 2.0}, ValueError, ["-1"]),
        ("logit_bias", {1: "a"}, TypeError, ["number", "'a'"]),
        ("logit_bias", {1: -math.inf}, ValueError, ["finite", "-inf"]),
        ("allowed_token_ids", [], ValueError, ["empty"]),
        ("allowed_token_ids", 3, TypeError, ["got 3"]),
        ("allowed_token_ids", "3", TypeError, ["'3'"]),
        ("allowed_token_ids", [1.0], TypeError, ["1.0"]),
        ("allowed_token_ids", [-2], ValueError, ["-2"]),
        ("bad_words", "word", TypeError, ["list", "'word'"]),
        ("bad_words", [""], ValueError, ["empty"]),
        ("bad_words", [[]], ValueError, ["empty"]),
        ("bad_words", [3], TypeError, ["got 3"]),
        ("bad_words", [[3, "a"]], TypeError, ["'a'"]),
        ("bad_words", [[-3]], ValueError, ["-3"]),
        ("logits_processor", 3, TypeError, ["callable", "got 3"]),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(field, value, error, words):
    with pytest.raises(error) as info:
        SamplingParams(**{field: value})
    for word in [field, *words]:
        assert word in str(info.value)


def test_unknown_parameters_are_refused():
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.5)


def test_values_at_the_edge_are_taken():
    SamplingParams(temperature=0, max_tokens=1, top_k=0, n=1, seed=0)
    SamplingParams(temperature=1e30, top_k=2**31 - 1, seed=2**64 - 1)
    SamplingParams(temperature=5e-324)
    assert SamplingParams() == SamplingParams(temperature=1.0, max_tokens=256, top_k=None)
    assert SamplingParams().ignore_eos is False


def test_numpy_numbers_become_python_numbers():
    """A prompt of 40 tokens and np.int8(100) more would end at token -116."""
    given = {
        "max_tokens": np.int8(100),
        "top_k": np.uint8(200),
        "n": np.int16(2),
        "seed": np.uint64(7),
    }
    params = SamplingParams(temperature=np.float32(0.5), stop_token_ids=np.array([3, 4]), **given)
    assert type(params.max_tokens) is int and 40 + params.max_tokens == 140
    assert params == SamplingParams(0.5, 100, 200, n=2, seed=7, stop_token_ids=(3, 4))
    assert all(type(token) is int for token in params.stop_token_ids)


def test_stop_tokens_may_come_from_any_collection():
    for ids in ([3, 4], (3, 4), {3: "", 4: ""}, iter([3, 4]), (i for i in (3, 4))):
        assert SamplingParams(stop_token_ids=ids).stop_token_ids == (3, 4)


def test_params_are_normal_hashable_and_stay_what_they_were():
    bias, allowed = {np.int64(3): np.float32(1.5), 4: -2}, [np.int32(5), 6]
    params = SamplingParams(
        0.5, 10, 3, True, top_p=np.float64(0.5), min_p=0, stop="end", logit_bias=bias,
        allowed_token_ids=allowed, bad_words=["a b", np.array([1, 2])], min_tokens=np.int8(10),
    )  # fmt: skip
    assert (params.temperature, params.max_tokens, params.top_k, params.ignore_eos) == (
        0.5, 10, 3, True,
    )  # fmt: skip
    assert params.stop == ("end",) and params.bad_words == ("a b", (1, 2))
    assert params.logit_bias == {3: 1.5, 4: -2.0} and params.allowed_token_ids == (5, 6)
    assert type(params.min_p) is float and type(params.min_tokens) is int
    bias[9] = 1.0
    allowed.append(9)
    assert params.logit_bias == {3: 1.5, 4: -2.0} and params.allowed_token_ids == (5, 6)
    again = replace(params, seed=3)
    assert again.seed == 3 and replace(again, seed=None) == params
    assert len({params, again, replace(params)}) == 2
    with pytest.raises(TypeError, match="positional"):
        SamplingParams(0.5, 10, 3, True, 2)


def test_token_ids_outside_the_vocabulary_are_named():
    for field, value in {
        "stop_token_ids": [5, 60], "allowed_token_ids": [60], "logit_bias": {60: 1.0},
        "bad_words": [[3, 60], [2]],
    }.items():  # fmt: skip
        params = SamplingParams(**{field: value})
        params.check_vocabulary(61)
        with pytest.raises(ValueError, match=rf"{field} \[60\] are outside the vocabulary of 60"):
            params.check_vocabulary(60)
    SamplingParams(bad_words=["a word that is yet to become ids"]).check_vocabulary(1)


# the noise ---------------------------------------------------------------------------------------


def test_noise_depends_on_seed_sample_and_position_alone():
    rows = [(s, k, p) for s in (0, 1, 2**64 - 1) for k in (0, 1, 7) for p in (0, 1, 1000)]
    together = noise(*zip(*rows, strict=True))
    assert together.dtype == np.float32 and together.shape == (27,)
    assert [noise([s], [k], [p])[0] for s, k, p in rows] == together.tolist()
    shuffled = np.random.default_rng(0).permutation(27)
    again = noise(*zip(*[rows[i] for i in shuffled], strict=True))
    assert (again == together[shuffled]).all()
    assert len(set(together.tolist())) == 27  # none of the three is ignored
    assert len(noise([], [], [])) == 0


def test_noise_is_the_same_tomorrow():
    """A seed written down in a paper must give the same text in the next version."""
    values = noise([0, 7, 2**63], [0, 1, 2], [0, 100, 2**20])
    assert (values * 2**24).tolist() == FROZEN_NOISE


FROZEN_NOISE = [2327157, 6437919, 10114958]


@pytest.mark.parametrize("varied", ["seed", "sample", "position"])
def test_noise_is_uniform_along_each_of_its_arguments(varied):
    count = 100_000
    rows = {"seed": [11] * count, "sample": [0] * count, "position": [5] * count}
    rows[varied] = range(count)
    u = noise(*rows.values())
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
    base = noise([3] * size, [0] * size, positions)
    for seed, index in [(3, 1), (4, 0), (2, 1)]:
        other = noise([seed] * size, [index] * size, positions)
        pairs = (base * 16).astype(int) * 16 + (other * 16).astype(int)
        assert abs(chi_square(np.bincount(pairs, minlength=256), np.full(256, 1 / 256))) < 4
    # sums of the arguments must not matter: (3, 1, p) is not (3, 0, p + 1)
    assert (noise([3] * 99, [1] * 99, range(99)) != noise([3] * 99, [0] * 99, range(1, 100))).all()


# the draw ----------------------------------------------------------------------------------------


def test_draws_follow_the_softmax():
    """100,000 draws with the engine's own noise, of one seed."""
    count = 100_000
    logits = torch.linspace(-3, 3, 23)[torch.randperm(23, generator=torch.manual_seed(0))]
    u = noise([42] * count, [0] * count, range(count))
    params = [SamplingParams(temperature=0.8)] * count
    tokens = np.array(pick(logits.expand(count, -1), params, u))
    expected = torch.softmax(logits.double() / 0.8, -1).numpy()
    assert abs(chi_square(np.bincount(tokens, minlength=23), expected)) < 4


def test_a_token_owns_its_slice_of_the_noise():
    """Tokens in the order of their ids, each as long as it is likely, to one part in 100,000."""
    logits = torch.randn(50, generator=torch.manual_seed(1)) * 2
    tokens = draw(logits.expand(100_000, -1), grid(100_000))
    assert (tokens.diff() >= 0).all()
    shares = torch.bincount(tokens, minlength=50) / 100_000
    torch.testing.assert_close(shares, torch.softmax(logits, -1), rtol=0, atol=1.1e-5)


def test_the_first_id_whose_cumulative_probability_exceeds_the_noise():
    logits = torch.tensor([0.25, 0.0, 0.5, 0.25]).log()  # the second has no probability
    below = float(np.nextafter(np.float32(0.25), np.float32(0)))
    for u, token in [(0, 0), (below, 0), (0.25, 2), (0.7499, 2), (0.75, 3), (LARGEST, 3)]:
        assert pick(logits[None], [SamplingParams()], [u]) == [token], u


@pytest.mark.parametrize("vocab", [2, 7, 311, 65536])
def test_tokens_without_probability_are_never_drawn(vocab):
    """Leading, trailing and scattered ones, with noise at both ends and wherever the sum of the
    probabilities may round to less than 1."""
    generator = torch.manual_seed(vocab)
    ends = [0.0, 2.0**-24, 2.0**-23, 0.5, 1 - 2.0**-20, 1 - 2.0**-22, 1 - 2.0**-23, LARGEST]
    for _ in range(8):
        logits = torch.randn(len(ends), vocab, generator=generator) * 3
        off = torch.rand(logits.shape, generator=generator) < 0.5
        off[:, 0] = off[:, -1] = True
        off[:, vocab // 2] = False
        logits[off] = -torch.inf
        tokens = draw(logits, torch.tensor(ends))
        assert not off.gather(1, tokens[:, None]).any()
        # probabilities that are not masked but so small that they are 0 in float32
        logits[off] = -1000.0
        tokens = draw(logits, torch.tensor(ends))
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
    uniform = noise(range(12), [0] * 12, [9] * 12).tolist()
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
