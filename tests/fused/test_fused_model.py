"""The fused model against nanochat's own numbers, and against the core's model."""

import numpy as np
import pytest
import torch
from helpers.golden_model import (
    TOLERANCE,
    Steps,
    assert_near,
    check_every_position,
    check_half_precision,
    check_kv_heads_written_out,
    check_prompts_and_tokens,
    read,
)

from microvllm import LLM, SamplingParams, checkpoint
from microvllm.attention import SequenceKVView
from microvllm.loading import build_model

# the fused model in torch, in numba's kernels, and as their one compiled call
BLOCK_SIZES = {"torch": 16, "loop": 3, "compiled": 1}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=list(BLOCK_SIZES))
def form(request) -> str:
    return request.param


def build(form, *parts, **options):
    """A model of a form from config, recipe and weights."""
    options = {"max_len": 500} | options
    if form == "core":
        return checkpoint.make_model(*parts, **options)
    attention = "sdpa" if form == "torch" else "numba"
    model = build_model(*parts, torch.device("cpu"), attention=attention, **options)
    if form == "loop":
        model.compiled = None
    elif form == "compiled" and not model.compiled:
        pytest.skip("the widths of its matrices are no multiples of a packed tile")
    return model


def load(era, form, **options):
    return build(form, *read(era), **era.overrides | options)


def test_eight_prompts_in_one_batch_give_nanochats_logits_and_tokens(era, form):
    check_prompts_and_tokens(era, load(era, form))


def test_every_position_of_prompts_that_come_whole_and_in_chunks(era, form):
    check_every_position(era, load(era, form), BLOCK_SIZES[form])


def test_greedy_tokens_through_the_engine(era):
    """All prompts at once, in steps of 50 tokens: long ones come in pieces among decodes."""
    prompts = era.json["prompts"]
    with LLM(
        era.directory, device="cpu", block_size=5, max_batched_tokens=50, max_model_len=500,
        **era.overrides,
    ) as llm:  # fmt: skip
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        outputs = llm.generate([p["ids"] for p in prompts], params, use_tqdm=False)
    for output, prompt in zip(outputs, prompts, strict=True):
        assert output["token_ids"] == prompt["greedy_tokens"], prompt["name"]


def test_all_forms_are_one_model(era):
    """Chunks and decodes, within and beyond the windows: the core's model, the fused one in torch
    and in numba, and its one compiled call give the same logits; and leave the same keys and
    values, whether the prompt came whole or in chunks."""
    prompt = era.json["prompts"][-1]  # longer than all windows but one
    length, ids, seen = prompt["length"], prompt["ids"], {}
    for form in ("core", *BLOCK_SIZES):
        try:
            model = load(era, form)
        except pytest.skip.Exception:
            continue
        steps = Steps(model, [length, length], block_size=4)
        whole = steps.step((0, ids, 0, length))
        parts = [steps.step((1, ids, p, min(p + 47, length)))[0] for p in range(0, length, 47)]
        both = steps.step((0, ids, length - 1, length), (1, ids, length - 9, length))
        views = [
            [x for k, v in steps.cache.data for x in SequenceKVView(k, v, table, length).gather()]
            for table in steps.tables
        ]
        for a, b in zip(*views, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        assert_near(np.concatenate(parts), whole[0])
        seen[form] = [*whole, *both, *(x.numpy() for x in views[0])]
    assert len(seen) >= 3
    for form, found in seen.items():
        for ours, core in zip(found, seen["core"], strict=True):
            assert np.abs(ours - core).max() < TOLERANCE, form


@pytest.mark.parametrize("era", ["era1_unpadded", "era3", "era5"], indirect=True)
def test_as_many_kv_heads_as_query_heads(era, form):
    check_kv_heads_written_out(era, lambda *parts: build(form, *parts))


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.5), ("float16", 0.06)])
def test_half_precision_stays_near(era, dtype, tolerance):
    check_half_precision(era, load(era, "torch", dtype=dtype), tolerance)
