"""The model against nanochat's own numbers: every era, every position, whole and in chunks."""

import tracemalloc

import pytest
import torch
from helpers.golden_model import (
    check_every_position,
    check_half_precision,
    check_kv_heads_written_out,
    check_prompts_and_tokens,
    read,
)

from microvllm.checkpoint import make_model
from microvllm.engine import LLM
from microvllm.model import GPT, RECIPES, GPTConfig, layer_windows
from microvllm.sampler import SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")


def build(config, recipe, weights, **options) -> GPT:
    return make_model(config, recipe, weights, **{"max_len": 500} | options)


def load(era, **options) -> GPT:
    return build(*read(era), **era.overrides | options)


# nanochat's own numbers --------------------------------------------------------------------------


def test_eight_prompts_in_one_batch_give_nanochats_logits_and_tokens(era):
    check_prompts_and_tokens(era, load(era))


def test_every_position_of_prompts_that_come_whole_and_in_chunks(era):
    check_every_position(era, load(era), block_size=7)


def test_greedy_tokens_through_the_engine(era):
    """All prompts at once, in steps of 50 tokens: long ones come in pieces among decodes."""
    prompts = era.json["prompts"]
    with LLM(
        era.directory, device="cpu", block_size=5, max_batched_tokens=50, max_model_len=500,
        **era.overrides,
    ) as llm:  # fmt: skip
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        outputs = llm.generate([p["ids"] for p in prompts], params)
    for output, prompt in zip(outputs, prompts, strict=True):
        assert output["token_ids"] == prompt["greedy_tokens"], prompt["name"]


# the recipe --------------------------------------------------------------------------------------


def test_the_recipe_has_nanochats_constants(era):
    model, expect = load(era), era.json["expect"]
    recipe, windows = model.recipe, era.json["window_left"]
    assert recipe.softcap == expect["logit_softcap"]
    assert recipe.rope_base == expect["rope_base"]
    assert recipe.round_rotary == expect["rope_cos_sin_rounded_to_bf16"]
    assert recipe.qk_scale == expect["qk_scale"]
    gate = f"{recipe.gate_scale:g}*sigmoid, {recipe.gate_channels} channels"
    assert expect["ve_gate"] == (gate if recipe.gate_channels else None)
    assert recipe.smear == expect["smear"]
    assert model.windows == (windows or [-1] * model.config.n_layer)
    assert expect["backout_after_block"] == (model.config.n_layer // 2 if recipe.smear else None)


def config(sequence_len, pattern="SSSL", n_layer=6) -> GPTConfig:
    shape = {"vocab_size": 311, "n_layer": n_layer, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
    return GPTConfig.from_meta({"sequence_len": sequence_len, "window_pattern": pattern} | shape)


@pytest.mark.parametrize(
    "sequence_len, era23, era4, era5",
    [
        (100, 50, 128, 128),  # the short window is not clamped to the long one
        (200, 100, 128, 128),
        (256, 128, 128, 128),
        (400, 200, 256, 128),
        (512, 256, 256, 128),
        (1024, 512, 384, 256),
        (2048, 1024, 768, 512),
    ],
)
def test_short_and_long_windows(sequence_len, era23, era4, era5):
    long = sequence_len
    for era, short in {"2": era23, "3": era23, "4": era4, "5": era5}.items():
        windows = layer_windows(config(sequence_len), RECIPES[era])
        assert windows == [short, short, short, long, short, long], era
    assert layer_windows(config(sequence_len), RECIPES["1"]) == [-1] * 6


def test_a_pattern_of_megabytes_is_read_where_a_layer_is_and_never_tiled():
    size, n_layer = 2**22, 200
    tracemalloc.start()
    try:
        shape = config(200, "LS" * (size // 2), n_layer)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        windows = layer_windows(shape, RECIPES["3"])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert windows == [200, 100] * (n_layer // 2 - 1) + [200, 200]
    assert peak - before < 2**16
    with pytest.raises(ValueError, match="no GPT has this shape") as error:
        config(200, "SLX" * size)
    assert len(str(error.value)) < 500


def test_the_pattern_is_tiled_and_the_last_layer_is_always_long():
    for pattern, n_layer, expected in [
        ("S", 3, [100, 100, 200]),
        ("S", 1, [200]),
        ("LS", 4, [200, 100, 200, 200]),
        ("ssl", 5, [100, 100, 200, 100, 200]),
        ("SSSSSSSSL", 3, [100, 100, 200]),
        (None, 2, [200, 200]),
    ]:
        assert layer_windows(config(200, pattern, n_layer), RECIPES["2"]) == expected


def test_a_missing_pattern_means_long_layers():
    meta = {
        "sequence_len": 64,
        "vocab_size": 311,
        "n_layer": 3,
        "n_head": 2,
        "n_kv_head": 1,
        "n_embd": 32,
    }
    for era in "2345":
        assert layer_windows(GPTConfig.from_meta(meta), RECIPES[era]) == [64] * 3


# shapes of heads and numbers ---------------------------------------------------------------------


@pytest.mark.parametrize("era", ["era1_unpadded", "era3", "era5"], indirect=True)
def test_as_many_kv_heads_as_query_heads(era):
    check_kv_heads_written_out(era, build)


def test_rotary_tables_have_the_precision_of_their_era(era):
    rounded = load(era, round_rotary=True)
    exact = load(era, round_rotary=False)
    assert torch.equal(rounded.cos, exact.cos.bfloat16().float())
    assert torch.equal(rounded.sin, exact.sin.bfloat16().float())
    assert not torch.equal(rounded.cos, exact.cos)
    # in a half-precision run the tables have the compute dtype, as nanochat's do
    half = load(era, round_rotary=False, dtype="float16")
    assert torch.equal(half.cos, exact.cos.half().float())
    assert torch.equal(half.sin, exact.sin.half().float())


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.5), ("float16", 0.06)])
def test_half_precision_stays_near(era, dtype, tolerance):
    check_half_precision(era, load(era, dtype=dtype), tolerance)
