"""Weights of 6, 5 and 4 bits: how they are packed, their products, what a model of them takes."""

import logging
import os

import pytest
import torch
from helpers.cpu_kernels import (
    BACKEND,
    CPU,
    has_int8,
    low_bit_linear,
    perplexity,
    plain_low_bit,
    random,
    run,
    weights_of,
)
from helpers.goldens import MODEL, Fixture, era_fixtures

from microvllm import LLM, SamplingParams, loading
from microvllm.cli import roofline
from microvllm.cpu import compilation, gemm, low_bit_gemm
from microvllm.cpu.gemm import Int8, PackedInt8
from microvllm.fused.model import FusedGPT
from microvllm.lowbit import folder as stored
from microvllm.lowbit import packing
from microvllm.lowbit.packing import BITS, LAYOUT, STEP, Quantised, round_plainly

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = [6, 5, 4]
# kernels are compiled for each
HEAVY = pytest.mark.skipif(not os.environ.get("FUZZ"), reason="compiles for long: set FUZZ")
COMPILED = [4, *(pytest.param(bits, marks=[pytest.mark.slow, HEAVY]) for bits in (6, 5))]
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture
def poisoned(monkeypatch):
    """New memory is NaN, so that what a kernel forgets to write is seen."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(77))


def rounded(bits: int, *shape: int, seed: int = 1) -> Quantised:
    return round_plainly(random(*shape, seed=seed), bits)


def unpacked(tiles: torch.Tensor, bits: int, rows: int, width: int, tile_rows: int) -> torch.Tensor:
    """The integers that tiles hold, taken out bit by bit."""
    operands = torch.zeros(STEP // 4, *tiles.shape[:2], tile_rows, dtype=torch.int32)
    for i, parts in enumerate(LAYOUT[bits]):
        for operand, shift, mask in parts:
            mask *= 0x01010101
            operands[operand] |= (tiles[:, :, i * tile_rows : (i + 1) * tile_rows] >> shift) & mask
    levels = operands.permute(1, 3, 2, 0).contiguous().view(torch.int8)
    return levels.flatten(0, 1).flatten(1)[:rows, :width] - 2 ** (bits - 1)


@pytest.mark.parametrize("tile_rows", [16, 32])
@pytest.mark.parametrize("bits", SMALL)
def test_what_is_packed_is_all_there(bits, tile_rows):
    """Every bit of a byte has one use, and all integers come out again, the lowest as well."""
    for i in range(STEP // 4):
        masks = [mask for parts in LAYOUT[bits] for operand, _, mask in parts if operand == i]
        assert sum(masks) == 2**bits - 1
    assert all(sum(m << s for _, s, m in parts) <= 0xFF for parts in LAYOUT[bits])
    top = 2 ** (bits - 1)
    for rows, width in ((70, 96), (1, 1), (33, 100)):
        groups = -(-width // STEP)
        integers = (torch.arange(rows * width) % (2 * top) - top).to(torch.int8).view(rows, width)
        factors = (torch.arange(rows * groups) % 31 - 15).to(torch.int8).view(rows, groups)
        whole = Quantised(integers, torch.ones(rows, 1), bits, factors if bits == 4 else None)
        tiles = packing.pack(whole, tile_rows)
        assert tiles.shape[:2] == (-(-rows // tile_rows), -(-width // STEP))
        assert tiles.shape[2] == tile_rows * bits + (tile_rows // 4 if bits == 4 else 0)
        assert torch.equal(unpacked(tiles, bits, rows, width, tile_rows), integers)
        if bits == 4:
            found = tiles[:, :, 4 * tile_rows :].contiguous().view(torch.int8)
            assert torch.equal(found.transpose(1, 2).flatten(0, 1)[:rows], factors)


@pytest.mark.parametrize("bits", [8, *SMALL])
def test_rounding_is_to_the_nearest_step(bits):
    weight = random(40, 96)
    weight[3], weight[4, :32] = 0, 0
    found = round_plainly(weight, bits)
    exact, ones = packing.rotate(weight) / 32, torch.ones_like(found.integers)
    step = packing.dequantised(found._replace(integers=ones)).abs()
    error = (packing.dequantised(found) - exact).abs()
    # the one end of the range is a step nearer than the other, in fewer bits than 8; and a factor
    # that is rounded down cuts off the largest numbers
    assert (error <= step * {8: 0.51, 4: 1.6}.get(bits, 1.04)).all()
    assert (error <= 0.51 * step).float().mean() > (0.93 if bits == 4 else 0.97)
    assert found.scale.shape == (40, 1)
    if bits == 4:
        assert found.factors.shape == (40, 3)
        assert found.factors.aminmax() == (-15, 15) and (found.factors != 0).all()
    top = 2 ** (bits - 1)
    low, high = map(int, found.integers.aminmax())
    assert low == (-127 if bits == 8 else -top) and high == top - 1
    assert not packing.dequantised(found)[3].any()


@has_int8
def test_no_two_kernels_have_one_name():
    """Compiled apart and read from disk they are linked by name: those of one number of bits once
    ran in place of another's."""
    cells = [cell for kernel in low_bit_gemm._PRODUCTS.values() for cell in kernel.__closure__]
    inside = [cell.cell_contents for cell in cells if hasattr(cell.cell_contents, "py_func")]
    names = [kernel.py_func.__qualname__ for kernel in inside]
    assert len(names) == len({*names}) == 2 * len(low_bit_gemm._PRODUCTS)


@has_int8
@pytest.mark.parametrize("bits", COMPILED)
def test_a_product_is_that_of_its_integers(bits, poisoned):
    """Sums of integers are exact; what is left is the rounding of three factors."""
    for outputs, inputs in ((1, 64), (33, 100), (130, 1504), (70, 1536), (16, 1)):
        weight = rounded(bits, outputs, inputs)
        linear, squared = low_bit_linear(bits, [weight]), low_bit_linear(bits, [weight], relu2=True)
        same = Quantised(packing.as_bytes(weight), weight.scale, 8)
        whole = low_bit_linear(8, [same], PackedInt8) if inputs % 4 == 0 else None
        for rows in (0, 1, 2, 3, 4, 6, 7, 13, 64, 241):
            x = random(rows, inputs, seed=100 + rows)
            q, scale = gemm.quantize_rows(x, 127)
            exact = (q.double() - 128) @ packing.dequantised(weight).double().T * scale
            y = linear(x)
            assert y.shape == (rows, outputs) and y.is_contiguous()
            most = exact.abs().max().item() if rows else 0
            torch.testing.assert_close(y, exact.float(), rtol=0, atol=1e-6 * most + 1e-30)
            assert torch.equal(squared(x), BACKEND.relu2(y.clone()))
            if whole:  # whatever the number of rows, it has the bits of a product of int8
                assert torch.equal(y, whole(x))


@has_int8
@pytest.mark.parametrize("inputs", [1504, 1536])  # tiles (amx.py) are whole in the latter
@pytest.mark.parametrize("bits", COMPILED)
def test_the_bits_of_a_row_follow_from_that_row(bits, inputs):
    linear, x = low_bit_linear(bits, [random(200, inputs)]), random(260, inputs, seed=2)
    x[7] = torch.nan
    alone = torch.cat([linear(x[i : i + 1]) for i in range(260)])
    assert alone[7].isnan().all() and alone.isnan().sum() == 200
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in (2, 3, 4, 7, 12, 13, 64, 260):
                same = linear(x[:rows]).nan_to_num() == alone[:rows].nan_to_num()
                assert same.all(), (threads, rows)
    finally:
        torch.set_num_threads(before)


@has_int8
@pytest.mark.parametrize("bits", [8, *COMPILED])
def test_the_slow_form_computes_the_same(bits):
    """On processors without the instructions."""
    kind = plain_low_bit(bits)
    parts = [random(40, 100), random(24, 100, seed=3)]
    slow = low_bit_linear(bits, parts, kind, rows=50)
    fast = low_bit_linear(bits, parts, PackedInt8 if bits == 8 else None, rows=50)
    x = random(9, 100, seed=2)
    torch.testing.assert_close(slow(x), fast(x), rtol=1e-5, atol=1e-5)
    slow.load([part + 1 for part in parts])
    assert not torch.allclose(slow(x), fast(x), atol=1)


@pytest.mark.parametrize("kind", [Int8, PackedInt8])
def test_int8_takes_given_integers_as_well(kind):
    if kind is PackedInt8 and not gemm.INT8_TILE:
        pytest.skip("this processor has no such instructions")
    parts = [random(40, 64), random(24, 64, seed=1)]
    given = [round_plainly(part, 8) for part in parts]
    x = random(5, 64, seed=2)
    assert torch.equal(low_bit_linear(8, parts, kind)(x), low_bit_linear(8, given, kind)(x))


@has_int8
@pytest.mark.parametrize("bits", COMPILED)
def test_given_integers_are_what_is_multiplied_by(bits):
    """One part rounded elsewhere, one of floats; replaced where they are, whose address other
    kernels know."""
    parts = [random(40, 64), random(24, 64, seed=1)]
    given = [rounded(bits, 40, 64, seed=0), parts[1]]
    assert given[0].shape == (40, 64)
    x = random(5, 64, seed=2)
    linear = low_bit_linear(bits, given)
    assert torch.equal(linear(x), low_bit_linear(bits, parts)(x))
    where = linear.weight[0].data_ptr()
    assert where % 64 == 0
    linear.load([part + 1 for part in parts])
    assert linear.weight[0].data_ptr() == where
    exact = x @ (torch.cat(parts) + 1).T
    assert (linear(x) - exact).norm() / exact.norm() < 0.2


def test_what_no_layer_can_have_is_refused():
    weight = rounded(6, 8, 64)
    with pytest.raises(ValueError, match="weights of 6 bits are given where the layer has 5"):
        packing.quantised([weight], 5)
    with pytest.raises(ValueError, match="integers of 6 bits are -32 to 31, not .* to 40"):
        weight.integers[0, 0] = 40
        packing.quantised([weight], 6)
    with pytest.raises(ValueError, match="8 x 64, .* and 2 factors, not .* and None factors"):
        packing.quantised([weight._replace(bits=4)], 4)
    weight = rounded(4, 8, 64)
    with pytest.raises(ValueError, match="factors of 4 bits are -15 to 15, not .* to 16"):
        weight.factors[0, 0] = 16
        packing.quantised([weight], 4)


@has_int8
@pytest.mark.parametrize("word", ["int6", "int5", "int4"])
def test_weights_take_as_many_bits_as_the_word_says(word, caplog, monkeypatch):
    """Counted in the memory of the bundled model, whose matrices are whole tiles of whole steps:
    what rows and groups have of their own comes on top. It says what would cost less, once."""
    loading.advise.cache_clear()
    monkeypatch.setattr(compilation, "begin", lambda *args: True)  # no kernel is called
    bits, head = BITS[word]
    with caplog.at_level(logging.WARNING, "microvllm"):
        model = loading.load_model(MODEL, None, CPU, "auto", quantization=word)
        loading.load_model(MODEL, None, CPU, "auto", quantization=word)
    assert sum("microvllm quantize" in r.getMessage() for r in caplog.records) == 1
    assert model.compiled
    total = sum(part.nbytes for linear in model.linears.values() for part in linear.weight)
    assert total == roofline.step_bytes(model.config, roofline.PRECISIONS[word])
    for linear in model.linears.values():
        kept = head if linear is model.lm_head else bits
        weights = sum(linear.sizes) * linear.width
        others = (weights // STEP if kept == 4 else 0) + 8 * sum(linear.sizes)
        assert sum(part.nbytes for part in linear.weight) == weights * kept // 8 + others


@has_int8
@HEAVY
@pytest.mark.slow
def test_all_layers_in_one_call_are_the_loop_over_them():
    era = Fixture(*era_fixtures()["era5"])
    given = {"attention": "numba", "quantization": "int4"}
    model = loading.load_model(era.directory, None, CPU, "auto", **given)
    if not model.compiled:
        pytest.skip("its layers are no whole tiles")
    ids = list(range(1, 40))
    chunks = [(ids, 0, 1, [1]), (ids, 0, 38, [3, 4, 5])]
    found = [run(model, chunks, hidden_rows=rows) for rows in (None, [0], [])]
    weights = {name: w * 1.1 for name, w in weights_of(era).items()}
    model.load_state_dict(weights)
    found.append(run(model, chunks))
    model.load_state_dict(weights_of(era))
    compiled, model.compiled = model.compiled, None
    for (h, cache), rows in zip(found, (None, [0], []), strict=False):
        for ours, loop in zip((h, cache), run(model, chunks, hidden_rows=rows), strict=True):
            torch.testing.assert_close(ours, loop, atol=2e-5, rtol=2e-5)
    model.load_state_dict(weights)
    torch.testing.assert_close(found[-1][0], run(model, chunks)[0], atol=2e-5, rtol=2e-5)
    assert compiled is not None and not torch.allclose(found[0][0], found[-1][0], atol=1e-3)


@has_int8
@HEAVY
@pytest.mark.slow
def test_a_model_of_given_integers_is_that_of_plain_rounding():
    """What a file of rounded weights becomes."""
    era = Fixture(*era_fixtures()["era5"])
    given = {"attention": "numba", "quantization": "int4"}
    model = loading.load_model(era.directory, None, CPU, "auto", **given)
    weights = weights_of(era)
    for names in model.linears:
        bits = BITS["int4"][names == ("lm_head",)]
        for name in names:
            made = round_plainly(weights[f"{name}.weight"], bits)
            planes = stored.pack(made.integers, bits) | {"scale": made.scale}
            planes |= {"factors": made.factors} if bits == 4 else {}
            weights[f"{name}.weight"] = stored.Stored(planes, bits)
    other = FusedGPT(model.config, model.recipe, weights, BACKEND, store="int4")
    chunk = [(list(range(1, 20)), 0, 19, [1, 2])]
    assert torch.equal(run(other, chunk)[0], run(model, chunk)[0])


@has_int8
@HEAVY
@pytest.mark.slow
def test_four_bits_go_every_way():
    """Alone and in a batch, cold and warm, after new weights and after a sleep: the same tokens."""
    options = {"quantization": "int4", "device": "cpu", "num_blocks": 60, "deterministic": True}
    with LLM(MODEL, **options) as llm:
        assert llm.model.dtype == torch.float32 and llm.cache.data.dtype == torch.bfloat16
        prompts = ["Who wrote Dracula?", "It was a dark and stormy night, and " * 3, "Once"]
        alone = [llm.generate([p], GREEDY, False)[0]["token_ids"] for p in prompts]
        together = llm.generate(prompts * 2, GREEDY, False)
        assert [o["token_ids"] for o in together] == alone * 2
        before = llm.score(["Who wrote Dracula?"], [" Bram Stoker"])
        llm.sleep()
        assert llm.score(["Who wrote Dracula?"], [" Bram Stoker"]) == before
        llm.scheduler.blocks.check(llm.scheduler.running)


@has_int8
@HEAVY
@pytest.mark.slow
def test_perplexity_of_four_bits_rounded_plainly():
    assert 0.05 < perplexity(quantization="int4") / perplexity() - 1 < 0.18


def test_other_devices_refuse_by_name():
    with pytest.raises(ValueError, match="quantization='int4' is for float32 on a CPU"):
        LLM(MODEL, quantization="int4", dtype="bfloat16", device="cpu")
    with pytest.raises(ValueError, match="quantization='int6' .* attention='numba'"):
        LLM(MODEL, quantization="int6", attention="sdpa", device="cpu")
