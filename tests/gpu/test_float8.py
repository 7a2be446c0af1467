"""float8 is for GPUs: here the same products (torch._scaled_mm: float8 times float8, sums in
float32, a scale for each row and each output) on the CPU, which the engine itself refuses."""

import json
import math

import pytest
import torch
from helpers.goldens import MODEL, ROOT

from microvllm import LLM
from microvllm.gpu.backend import Float8, GpuBackend, fp8_rows
from microvllm.model import GPTConfig

CPU = torch.device("cpu")


def dense(linear: Float8) -> torch.Tensor:
    """The weight again, without padding."""
    return (linear.weight.float() * linear.scale)[: sum(linear.sizes)]


@pytest.mark.parametrize("rows", [1, 17])
def test_a_float8_product_is_what_its_numbers_say(rows):
    torch.manual_seed(0)
    parts = [torch.randn(n, 64) * 3 for n in (48, 16, 20)]  # 84 outputs: no multiple of 16
    parts[0][5] *= 100
    linear = Float8(parts, GpuBackend(CPU, torch.float32), torch.float32, rows=70)
    x = torch.randn(rows, 64)
    (x8, worth), weight = fp8_rows(x), dense(linear)
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


def perplexity(**options) -> float:
    """Of the bundled answers."""
    rows = json.loads((ROOT / "models" / "prompts" / "oldbooks_instructions.json").read_text())
    rows = [row for row in rows if row["output"]][:80]
    with LLM(MODEL, num_blocks=400, device="cpu", attention="sdpa", **options) as llm:
        render = llm.tokenizer.render_for_completion
        prompts = [render([{"role": "user", "content": row["instruction"]}]) for row in rows]
        found = sum(llm.score(prompts, [row["output"] for row in rows]), [])
    assert len(found) > 4000
    return math.exp(-sum(found) / len(found))


@pytest.mark.slow
def test_perplexity_in_float8(monkeypatch):
    exact = perplexity()
    monkeypatch.setattr(GpuBackend, "check_quantization", lambda *_: None)
    monkeypatch.setattr(
        "microvllm.loading.pick_backend", lambda name, *where, **more: GpuBackend(*where[:3])
    )
    change = perplexity(quantization="fp8") / exact - 1
    assert 0 < abs(change) < 0.02, change


def test_where_float8_is_refused(monkeypatch):
    card = torch.device("cuda", 0)
    config = GPTConfig(64, 100, 1, 2, 1, 64)
    monkeypatch.setattr("microvllm.gpu.backend.has_triton", lambda device: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def check(config, device, dtype, deterministic=False):
        backend = GpuBackend(device, dtype)
        backend.deterministic = deterministic
        backend.check_quantization("fp8", config)

    check(config, card, torch.bfloat16)
    for words, *asked in (
        ("not torch.float32 on cuda", config, card, torch.float32),
        ("on a CPU there is 'int8'", config, CPU, torch.bfloat16),
        (
            "multiples of 16, and this model has 40, and 20 for K and V",
            GPTConfig(64, 100, 1, 2, 1, 40),
            card,
            torch.bfloat16,
        ),
        ("does not support deterministic=True", config, card, torch.bfloat16, True),
    ):
        with pytest.raises(ValueError, match=words):
            check(*asked)
    with pytest.raises(ValueError, match="quantization='int8' is for float32 on a CPU"):
        GpuBackend(card, torch.bfloat16).check_quantization("int8", config)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ValueError, match="compute capability 8.9 or newer"):
        check(config, card, torch.bfloat16)
