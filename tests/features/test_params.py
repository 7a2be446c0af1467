"""Sampling parameters: which values they take, and how they refuse the others."""

import math
from dataclasses import replace

import numpy as np
import pytest

from microvllm import SamplingParams


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
