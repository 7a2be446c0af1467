"""Smaller weights on a CPU: int8 products, bfloat16 products and cache, and what they cost."""

import math

import pytest
import torch
from helpers.cpu_kernels import CPU, perplexity
from helpers.goldens import ERAS, MODEL

from microvllm import LLM, SamplingParams
from microvllm.checkpoint import find_step, read_checkpoint
from microvllm.cpu.backend import CpuBackend
from microvllm.cpu.gemm import Int8, rotate
from microvllm.fused.linear import Linear
from microvllm.loading import build_model

pytestmark = pytest.mark.usefixtures("one_thread")
SMALLER = [  # each compiles kernels
    pytest.param({"quantization": "int8"}, marks=pytest.mark.slow),
    pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.slow),
]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def test_rotating_twice_multiplies_by_the_size_of_the_groups():
    for channels, size in ((32, 32), (768, 32), (80, 16), (33, 1)):
        x = torch.randn(5, channels)
        torch.testing.assert_close(rotate(rotate(x)), size * x, atol=1e-4, rtol=1e-4)
        assert math.isclose(rotate(x).norm(), size**0.5 * x.norm(), rel_tol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 16, 70])
@pytest.mark.parametrize("channels", [64, 80, 256])
def test_an_int8_product_is_as_near_as_its_steps_allow(rows, channels):
    torch.manual_seed(0)
    parts = [torch.randn(n, channels) for n in (48, 16, 16)]
    linear = Int8(parts, CpuBackend(CPU, torch.float32), torch.float32, rows=70)
    x = torch.randn(rows, channels)
    x[:, 3] *= 100  # a channel that is far larger than all others
    bound = 0.02 * 127 / linear.levels  # some processors have steps of twice the size
    exact = x @ torch.cat(parts).T[:, :70]
    y = linear(x)
    assert y.shape == (rows, 70)
    assert (y - exact).norm() / exact.norm() < bound
    # the same inputs without the rotation lose most of what is in the other channels
    x[:, 3] = 0
    assert (linear(x) - x @ torch.cat(parts).T[:, :70]).norm() / exact.norm() < bound


@pytest.mark.parametrize("options", SMALLER, ids=str)
def test_perplexity_stays_within_one_percent(options):
    change = perplexity(**options) / perplexity() - 1
    assert 0 < abs(change) < 0.01, change


@pytest.mark.parametrize("options", SMALLER, ids=str)
def test_what_is_stored_is_smaller(options):
    with LLM(MODEL, num_blocks=40, **options) as llm:
        assert llm.cache.data.dtype == torch.bfloat16
        assert llm.model.dtype == torch.float32
        cold = llm.generate(["Who wrote Dracula?"] * 2, GREEDY)
        assert len(cold[0]["token_ids"]) == 12 or cold[0]["finish_reason"] == "stop"
        assert cold[0]["token_ids"] == cold[1]["token_ids"]
        llm.scheduler.blocks.check(llm.scheduler.running)


def weight_of(linear: Linear) -> torch.Tensor:
    """What it multiplies by, (rows, in), as its products tell."""
    eye = torch.eye(linear.width)
    if linear.relu2:
        return (linear(eye).sqrt() - linear(-eye).sqrt()).T
    return linear(eye).T


def checkpoint_in(directory):
    """Config, recipe and weights."""
    return read_checkpoint(directory, find_step(directory, None))


@pytest.mark.parametrize("options", SMALLER, ids=str)
@pytest.mark.parametrize("era", ["era1_padded", "era3", "era5"])
def test_every_kind_of_layer_has_it(era, options):
    (file,) = (ERAS / era).rglob("model_*.pt")
    *shape, weights = checkpoint_in(file.parent)
    small = build_model(*shape, weights, CPU, **options)
    names = [name for names in small.linears for name in names]
    assert {*small.tensors, *(f"{name}.weight" for name in names)} == weights.keys()
    for names, linear in small.linears.items():
        exact = torch.cat([weights[f"{name}.weight"] for name in names])[: linear.rows].float()
        error = (weight_of(linear) - exact).norm() / exact.norm()
        assert 0 < error < 0.02, names  # half a step in each of 32 places that are added up
    for name, tensor in small.tensors.items():
        assert (tensor.float() - weights[name]).norm() <= 0.01 * weights[name].norm(), name


@pytest.mark.parametrize("options", SMALLER, ids=str)
def test_weights_are_swapped(options):
    state = {name: w.float() for name, w in checkpoint_in(MODEL)[2].items()}
    with LLM(MODEL, num_blocks=40, **options) as llm:
        before = llm.generate(["Once upon a time"], GREEDY)[0]["token_ids"]
        torch.manual_seed(0)
        llm.update_weights({name: w + 0.3 * torch.randn_like(w) for name, w in state.items()})
        assert llm.generate(["Once upon a time"], GREEDY)[0]["token_ids"] != before
        llm.update_weights(state)
        assert llm.generate(["Once upon a time"], GREEDY)[0]["token_ids"] == before


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="quantization must be .*'int4' or 'fp8', got 'int3'"):
        LLM(MODEL, quantization="int3")
    with pytest.raises(ValueError, match="quantization='int8' is for float32 on a CPU"):
        LLM(MODEL, quantization="int8", dtype="bfloat16", device="cpu")
    with pytest.raises(ValueError, match="quantization='int8' .* attention='numba'"):
        LLM(MODEL, quantization="int8", attention="sdpa")
    with pytest.raises(ValueError, match="on a CPU there is 'int8'"):
        LLM(MODEL, quantization="fp8", device="cpu")
