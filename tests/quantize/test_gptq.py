"""Rounding by second moments, against rounding each number to the nearest."""

import pytest
import torch

from microvllm.cpu import packed
from microvllm.quantize import gptq
from microvllm.quantize.calibration import natural

BITS = 8, 6, 5, 4


def made_up_layer(rows: int = 40, width: int = 96, tokens: int = 400):
    """A weight, and the second moments of correlated inputs, a few of them much larger."""
    torch.manual_seed(0)
    x = torch.randn(tokens, width // 4) @ torch.randn(width // 4, width)
    x += 0.1 * torch.randn(tokens, width)
    x[:, 5] *= 30
    return torch.randn(rows, width), x.T @ x


@pytest.mark.parametrize("bits", BITS)
def test_the_products_change_less_than_by_rounding_plainly(bits):
    weight, moments = made_up_layer()
    found = gptq.round_by_gptq(weight, moments, bits)
    assert found.integers.dtype == torch.int8 and found.integers.shape == weight.shape
    assert found.scale.dtype == torch.float32
    assert found.scale.shape == (40, 1) and found.bits == bits
    packed.check(found, bits)  # factors are there in 4 bits, and what they may be
    low, high = gptq.limits(bits)
    assert low <= found.integers.min() and found.integers.max() <= high
    plain = gptq.error_of(packed.round_plainly(weight, bits), weight, moments)
    assert 0 < gptq.error_of(found, weight, moments) < 0.5 * plain
    # the error is that of the products in the basis of the model, too
    change = natural(found) - weight
    same = float(((change @ moments) * change).sum())
    assert same == pytest.approx(gptq.error_of(found, weight, moments), rel=0.01)


def test_fitting_in_turns_makes_gptqs_error_smaller(monkeypatch):
    weight, moments = made_up_layer()
    better = gptq.error_of(gptq.round_by_gptq(weight, moments, 4), weight, moments)
    monkeypatch.setattr(gptq, "_TURNS", 0)
    alone = gptq.error_of(gptq.round_by_gptq(weight, moments, 4), weight, moments)
    assert better < 0.98 * alone


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_zeros_and_inputs_that_never_come(bits):
    weight, moments = made_up_layer()
    weight[3] = 0
    moments[7], moments[:, 7] = 0, 0
    for given in (moments, torch.zeros_like(moments)):
        found = gptq.round_by_gptq(weight, given, bits)
        assert not found.integers[3].any() and found.scale.isfinite().all()
        assert (natural(found) - weight).norm() < 0.2 * weight.norm()


def test_a_matrix_is_done_in_parts(monkeypatch):
    weight, moments = made_up_layer()
    whole = gptq.round_by_gptq(weight, moments, 5)
    monkeypatch.setattr(gptq, "_NUMBERS", 7 * 96)
    parts = gptq.round_by_gptq(weight, moments, 5)
    assert (whole.integers != parts.integers).float().mean() < 0.01
    torch.testing.assert_close(whole.scale, parts.scale, rtol=1e-3, atol=0)


def test_widths_that_no_rotation_fits():
    weight, moments = made_up_layer(width=44)
    found = gptq.round_by_gptq(weight, moments, 8)
    assert (natural(found) - weight).norm() < 0.02 * weight.norm()
