"""Rounding by second moments, against rounding each number to the nearest."""

import pytest
import torch
from helpers.batches import hand_made_batch
from helpers.goldens import FIXTURES

from microvllm.attention import PagedKVCache
from microvllm.checkpoint import empty_model
from microvllm.loading import find_checkpoint, read_checkpoint
from microvllm.lowbit import calibration, gptq, packing
from microvllm.lowbit.calibration import to_dense
from microvllm.lowbit.quantize import quantize

BITS = 8, 6, 5, 4


def random_layer(rows: int = 40, width: int = 96, tokens: int = 400):
    """A weight, and the second moments of correlated inputs, a few of them much larger."""
    torch.manual_seed(0)
    x = torch.randn(tokens, width // 4) @ torch.randn(width // 4, width)
    x += 0.1 * torch.randn(tokens, width)
    x[:, 5] *= 30
    return torch.randn(rows, width), x.T @ x


@pytest.mark.parametrize("bits", BITS)
def test_the_products_change_less_than_by_rounding_plainly(bits):
    weight, moments = random_layer()
    found = gptq.round_by_gptq(weight, moments, bits)
    assert found.integers.dtype == torch.int8 and found.integers.shape == weight.shape
    assert found.scale.dtype == torch.float32
    assert found.scale.shape == (40, 1) and found.bits == bits
    packing.check(found, bits)  # factors are there in 4 bits, and what they may be
    low, high = gptq.limits(bits)
    assert low <= found.integers.min() and found.integers.max() <= high
    plain = gptq.error_of(packing.round_plainly(weight, bits), weight, moments)
    assert 0 < gptq.error_of(found, weight, moments) < 0.5 * plain
    # the error is that of the products in the basis of the model, too
    change = to_dense(found) - weight
    same = float(((change @ moments) * change).sum())
    assert same == pytest.approx(gptq.error_of(found, weight, moments), rel=0.01)


def test_fitting_in_turns_makes_gptqs_error_smaller(monkeypatch):
    weight, moments = random_layer()
    better = gptq.error_of(gptq.round_by_gptq(weight, moments, 4), weight, moments)
    monkeypatch.setattr(gptq, "_TURNS", 0)
    alone = gptq.error_of(gptq.round_by_gptq(weight, moments, 4), weight, moments)
    assert better < 0.98 * alone


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_zeros_and_inputs_that_never_come(bits):
    weight, moments = random_layer()
    weight[3] = 0
    moments[7], moments[:, 7] = 0, 0
    for given in (moments, torch.zeros_like(moments)):
        found = gptq.round_by_gptq(weight, given, bits)
        assert not found.integers[3].any() and found.scale.isfinite().all()
        assert (to_dense(found) - weight).norm() < 0.2 * weight.norm()


def test_a_matrix_is_done_in_parts(monkeypatch):
    weight, moments = random_layer()
    whole = gptq.round_by_gptq(weight, moments, 5)
    monkeypatch.setattr(gptq, "_NUMBERS", 7 * 96)
    parts = gptq.round_by_gptq(weight, moments, 5)
    assert (whole.integers != parts.integers).float().mean() < 0.01
    torch.testing.assert_close(whole.scale, parts.scale, rtol=1e-3, atol=0)


def test_widths_that_no_rotation_fits():
    weight, moments = random_layer(width=44)
    found = gptq.round_by_gptq(weight, moments, 8)
    assert (to_dense(found) - weight).norm() < 0.02 * weight.norm()


def test_a_matrix_makes_up_for_what_was_lost_before_it(monkeypatch):
    """For products of exact inputs, and what the residual stream lacks: as least squares do."""
    torch.manual_seed(0)
    exact, weight, stream = torch.randn(400, 24), torch.randn(8, 24), torch.randn(24, 8)
    x = exact + 0.5 * torch.randn(400, 24)
    lost = x @ stream + torch.randn(400, 8)
    goal, given = exact @ weight.T + lost, (x.T @ x, (exact - x).T @ x, lost.T @ x)

    def error(share: float) -> float:
        monkeypatch.setattr(calibration, "_SHARE", share)
        return float((x @ calibration.compensate(weight, *given).T - goal).square().sum())

    least = (x @ torch.linalg.lstsq(x, goal).solution - goal).square().sum()
    assert error(0) > 2 * error(0.5) > 2 * error(1) == pytest.approx(2 * float(least), rel=0.01)
    nothing = calibration.compensate(weight, given[0], torch.zeros(24, 24), None)
    assert torch.equal(nothing, weight)  # where nothing was lost before it


def test_a_model_loses_less_where_layers_make_up_for_others(monkeypatch):
    config, recipe, weights = read_checkpoint(*find_checkpoint(FIXTURES["era5"].directory))
    texts = torch.randint(config.vocab_size, (6, 60), generator=torch.manual_seed(0)).tolist()

    def logits(weights) -> torch.Tensor:
        model = empty_model(config, recipe, len(weights["lm_head.weight"])).requires_grad_(False)
        model.load_state_dict(weights, assign=True)
        model.init_rotary(60)
        batch = hand_made_batch([(ids, 0, 60, [1 + i]) for i, ids in enumerate(texts)], 60)
        cache = PagedKVCache(config, 7, 60, torch.float32, "cpu")
        return model.logits(model.forward(batch, cache))

    def change(share: float) -> float:
        monkeypatch.setattr(calibration, "_SHARE", share)
        new = {name: weight.clone() for name, weight in weights.items()}
        made = quantize(config, recipe, {**new}, texts, lambda name: 4)
        new |= {f"{name}.weight": to_dense(found) for name, found in made.items()}
        return float((logits(new) - exact).square().mean())

    exact = logits(weights)
    assert change(0.5) < 0.9 * change(0)
