"""Smaller weights on a CPU: int8 products, bfloat16 products and cache, and what they cost."""

import json
import math

import pytest
import torch
from conftest import ERAS, MODEL, ROOT

from microvllm import LLM, SamplingParams
from microvllm.checkpoint import load_model
from microvllm.fused.linear import Float8, Int8, fp8_rows, rotate

SMALLER = [{"quantization": "int8"}, {"dtype": "bfloat16"}]
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
    linear = Int8(parts, torch.device("cpu"), torch.float32, rows=70)
    x = torch.randn(rows, channels)
    x[:, 3] *= 100  # a channel that is far larger than all others
    exact = x @ torch.cat(parts).T[:, :70]
    y = linear(x)
    assert y.shape == (rows, 70)
    assert (y - exact).norm() / exact.norm() < 0.02
    # the same inputs without the rotation lose most of what is in the other channels
    x[:, 3] = 0
    assert (linear(x) - x @ torch.cat(parts).T[:, :70]).norm() / exact.norm() < 0.02


def test_its_weights_can_be_told():
    parts = [torch.randn(n, 64) for n in (40, 8)]
    linear = Int8(parts, torch.device("cpu"), torch.float32)
    for kept, given in zip(linear.dense(), parts, strict=True):
        assert kept.shape == given.shape
        # half a step of the rotated matrix in each of 32 places that are added up
        assert (kept - given).norm() / given.norm() < 0.01


def perplexity(**options) -> float:
    """Of the bundled answers."""
    rows = json.loads((ROOT / "models" / "prompts" / "oldbooks_instructions.json").read_text())
    rows = [row for row in rows if row["output"]][:80]
    with LLM(MODEL, num_blocks=400, device="cpu", **options) as llm:
        render = llm.tokenizer.render_for_completion
        prompts = [render([{"role": "user", "content": row["instruction"]}]) for row in rows]
        found = sum(llm.score(prompts, [row["output"] for row in rows]), [])
    assert len(found) > 4000
    return math.exp(-sum(found) / len(found))


@pytest.mark.parametrize("options", SMALLER, ids=str)
def test_perplexity_stays_within_one_percent(options):
    exact = perplexity()
    assert perplexity(**options) != exact
    assert abs(perplexity(**options) / exact - 1) < 0.01


@pytest.mark.parametrize("options", SMALLER, ids=str)
def test_what_is_stored_is_smaller(options):
    with LLM(MODEL, num_blocks=40, **options) as llm:
        assert llm.cache.data.dtype == torch.bfloat16
        assert llm.model.dtype == torch.float32
        cold = llm.generate(["Who wrote Dracula?"] * 2, GREEDY)
        assert len(cold[0]["token_ids"]) == 12 or cold[0]["finish_reason"] == "stop"
        assert cold[0]["token_ids"] == cold[1]["token_ids"]
        llm.scheduler.blocks.check(llm.scheduler.running)


@pytest.mark.parametrize("options", SMALLER, ids=str)
@pytest.mark.parametrize("era", ["era1_padded", "era3", "era5"])
def test_every_kind_of_layer_has_it(era, options):
    (file,) = (ERAS / era).rglob("model_*.pt")
    exact, small = load_model(file.parent).weights, load_model(file.parent, **options).weights
    assert exact.keys() == small.keys()
    for name, weight in exact.items():
        assert (small[name].float() - weight).norm() <= 0.02 * weight.norm(), name


@pytest.mark.parametrize("options", SMALLER, ids=str)
def test_weights_are_swapped(options):
    with LLM(MODEL, num_blocks=40, **options) as llm, LLM(MODEL, num_blocks=40) as other:
        state = {name: w.clone() for name, w in other.model.weights.items()}
        before = llm.generate(["Once upon a time"], GREEDY)[0]["token_ids"]
        torch.manual_seed(0)
        llm.update_weights({name: w + 0.3 * torch.randn_like(w) for name, w in state.items()})
        assert llm.generate(["Once upon a time"], GREEDY)[0]["token_ids"] != before
        llm.update_weights(state)
        assert llm.generate(["Once upon a time"], GREEDY)[0]["token_ids"] == before


# float8 is for GPUs: here the same products (torch._scaled_mm: float8 times float8, sums in
# float32, a scale for each row and each output) on the CPU, which the engine itself refuses


@pytest.fixture
def fp8_here(monkeypatch):
    monkeypatch.setattr("microvllm.checkpoint._check_fp8", lambda *_: None)


@pytest.mark.parametrize("rows", [1, 17])
def test_a_float8_product_is_what_its_numbers_say(rows):
    torch.manual_seed(0)
    parts = [torch.randn(n, 64) * 3 for n in (48, 16, 20)]  # 84 outputs: no multiple of 16
    parts[0][5] *= 100
    linear = Float8(parts, torch.device("cpu"), torch.float32, rows=70)
    x = torch.randn(rows, 64)
    (x8, worth), weight = fp8_rows(x), torch.cat(linear.dense())
    assert weight.shape == (84, 64) and linear.weight.dtype == x8.dtype == torch.float8_e4m3fn
    exact = (x8.float() * worth) @ weight.T[:, :70]
    y = linear(x)
    assert y.shape == (rows, 70) and (y - exact).norm() < 4e-3 * exact.norm()  # bfloat16's rounding
    # every weight within half a step of 3 bits of fraction, whatever the size of its row
    assert ((weight - torch.cat(parts)).norm(dim=1) < 0.04 * torch.cat(parts).norm(dim=1)).all()
    before = linear.weight.data_ptr(), linear.scale.data_ptr()
    linear.load([2 * part for part in parts])  # in place: recorded steps read it there
    assert before == (linear.weight.data_ptr(), linear.scale.data_ptr())
    assert torch.equal(linear(x), 2 * y)


def test_perplexity_in_float8(fp8_here):
    change = perplexity(quantization="fp8") / perplexity() - 1
    assert 0 < abs(change) < 0.02, change


def test_where_float8_is_refused(monkeypatch):
    from microvllm.checkpoint import _check_fp8
    from microvllm.model import GPTConfig

    card = torch.device("cuda", 0)
    config = GPTConfig(64, 100, 1, 2, 1, 64)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    _check_fp8(config, card, torch.bfloat16, False)
    for words, *asked in (
        ("not torch.float32 on cuda", config, card, torch.float32, False),
        ("on a CPU there is 'int8'", config, torch.device("cpu"), torch.bfloat16, False),
        ("widths in steps of 16, not 40", GPTConfig(64, 100, 1, 2, 1, 40), card, torch.bfloat16, 0),
        ("has no deterministic=True", config, card, torch.bfloat16, True),
    ):
        with pytest.raises(ValueError, match=words):
            _check_fp8(*asked)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ValueError, match="compute capability 8.9 or newer"):
        _check_fp8(config, card, torch.bfloat16, False)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="quantization must be .*'int8' or 'fp8', got 'int3'"):
        LLM(MODEL, quantization="int3")
    with pytest.raises(ValueError, match="quantization='int8' is for float32 on a CPU"):
        LLM(MODEL, quantization="int8", dtype="bfloat16")
