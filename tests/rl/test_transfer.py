"""Weights that arrive as they were sent, or are refused by name."""

import pytest
import torch
from helpers.standin import GPT

from microvllm.rl import check_transfer, checksums


def test_a_checksum_is_of_dtype_shape_and_bytes():
    weights = {
        "matrix": torch.arange(12.0).view(3, 4),
        "transposed": torch.arange(12.0).view(4, 3).T,
        "flat": torch.arange(12.0),
        "half": torch.arange(12.0).view(3, 4).bfloat16(),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    sums = checksums(weights)
    assert len(set(sums.values())) == len(weights)
    assert all(len(digest) == 32 for digest in sums.values())
    copies = {name: weight.detach().clone() for name, weight in weights.items()}
    assert checksums(copies) == sums
    check_transfer(copies, sums)
    # a view with other strides has the same bytes in order
    assert checksums({"matrix": torch.arange(24.0).view(3, 8)[:, ::2] / 2}) != sums["matrix"]
    assert checksums({"a": weights["matrix"].T.contiguous().T})["a"] == sums["matrix"]


def test_one_wrong_bit_a_missing_and_an_unknown_tensor_are_named():
    weights = GPT().state_dict()
    sums = checksums(weights)
    check_transfer(weights, sums)
    received = {name: weight.clone() for name, weight in weights.items()}
    received["lm_head.weight"].view(torch.int32)[3, 5] ^= 1
    received["transformer.wte.weight"] = received["transformer.wte.weight"].bfloat16()
    received["extra"] = received.pop("smear_lambda")
    with pytest.raises(ValueError) as error:
        check_transfer(received, sums)
    message = str(error.value)
    assert "missing: smear_lambda" in message and "unknown: extra" in message
    assert "different: transformer.wte.weight, lm_head.weight" in message
    with pytest.raises(ValueError, match=r"missing: .* and \d+ more"):
        check_transfer({}, sums)
    with pytest.raises(TypeError, match=r"weights\['a'\] must be a tensor, got list"):
        check_transfer({"a": [1.0]}, {"a": "0"})
