"""The model against nanochat's own numbers: every era, every position, whole and in chunks."""

import random
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import hand_made_batch

from microvllm import LLM, SamplingParams, checkpoint, full
from microvllm.attention import PagedKVCache, SequenceKVView
from microvllm.model import RECIPES, GPTConfig, layer_windows
from microvllm.sampler import cap_logits

TOLERANCE = 1e-4  # absolute, in float32 logits: nanochat's own two paths differ by up to 1.6e-5

# the core's model; the fused one in torch, in numba's kernels, and as their one compiled call
FORMS = ["core", "torch", "loop", "compiled"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=FORMS)
def form(request) -> str:
    return request.param


class Runner:
    """Drives a GPT over hand-made steps. Each sequence owns blocks scattered over the pool, and
    every slot that nobody has written holds rubbish."""

    def __init__(self, model, lengths: list[int], block_size: int = 16):
        counts = [-(-n // block_size) for n in lengths]
        blocks = random.Random(0).sample(range(1, 1 + sum(counts)), sum(counts))
        self.tables = [[blocks.pop() for _ in range(n)] for n in counts]
        self.model, self.block_size = model, block_size
        shape = 1 + sum(counts), block_size
        self.cache = PagedKVCache(model.config, *shape, model.dtype, "cpu")
        self.cache.data.fill_(50.0)

    def step(self, *chunks: tuple[int, list[int], int, int]) -> list[np.ndarray]:
        """chunks: (sequence, ids, start, stop), single rows first. Logits (stop - start, V) of
        each."""
        spelled = [(ids, start, stop, self.tables[i]) for i, ids, start, stop in chunks]
        batch = hand_made_batch(spelled, self.block_size)
        with torch.inference_mode():
            logits = self.model.logits(self.model.forward(batch, self.cache))
            logits = cap_logits(logits, self.model.recipe.softcap)
        assert logits.dtype == torch.float32
        return [x.numpy() for x in logits.split([stop - start for _, _, start, stop in chunks])]


def build(form, *parts, **options):
    """A model of a form from config, recipe and weights."""
    options = {"max_len": 500} | options
    if form == "core":
        return checkpoint.make_model(*parts, **options)
    attention = "sdpa" if form == "torch" else "numba"
    model = full.build_model(*parts, torch.device("cpu"), attention=attention, **options)
    if form == "loop":
        model.compiled = None
    elif form == "compiled" and not model.compiled:
        pytest.skip("the widths of its matrices are no multiples of a panel")
    return model


def read(era):
    """Config, recipe and weights of an era's checkpoint."""
    return checkpoint.read_checkpoint(era.directory, era.json["checkpoint"]["step"])


def load(era, form="core", **options):
    return build(form, *read(era), **era.overrides | options)


def assert_near(logits, golden):
    assert logits.shape == golden.shape
    assert np.abs(logits - golden).max() < TOLERANCE


def assert_golden_positions(era, length, logits):
    """logits (length, V): every position of the prompt of that length."""
    arrays = era.arrays
    if f"all_logits_len{length:03d}" in arrays:
        assert_near(logits, arrays[f"all_logits_len{length:03d}"])
    else:
        assert_near(logits[:, arrays["cols"]], arrays[f"all_logits_cols_len{length}"])
        assert (logits.argmax(-1) == arrays[f"all_argmax_len{length}"]).all()
        logsumexp = torch.logsumexp(torch.from_numpy(logits), -1).numpy()
        assert_near(logsumexp, arrays[f"all_logsumexp_len{length}"])


def golden_lengths(era) -> list[int]:
    """Prompts whose logits nanochat wrote down at every position."""
    names = [name for name in era.arrays if name.startswith(("all_logits_len", "all_argmax_len"))]
    return sorted(int(name[-3:]) for name in names)


# nanochat's own numbers --------------------------------------------------------------------------


def test_eight_prompts_in_one_batch_give_nanochats_logits_and_tokens(era, form):
    """Prefill all at once, then 40 greedy tokens each, feeding back what the model itself chose."""
    prompts = era.json["prompts"]
    texts = [list(p["ids"]) for p in prompts]
    runner = Runner(load(era, form), [len(ids) + 40 for ids in texts])
    prefill = runner.step(*[(i, ids, 0, len(ids)) for i, ids in enumerate(texts)])
    last = np.stack([logits[-1] for logits in prefill])
    assert_near(last, era.arrays["last_logits"])
    for _ in range(39):
        for ids, token in zip(texts, last.argmax(-1).tolist(), strict=True):
            ids.append(token)
        rows = [(i, ids, len(ids) - 1, len(ids)) for i, ids in enumerate(texts)]
        last = np.concatenate(runner.step(*rows))
    assert_near(last, era.arrays["engine_step40_logits"])
    for ids, token, prompt in zip(texts, last.argmax(-1).tolist(), prompts, strict=True):
        assert [*ids[prompt["length"] :], token] == prompt["greedy_tokens"], prompt["name"]


def test_every_position_of_prompts_that_come_whole_and_in_chunks(era, form):
    """The same prompt five times, in chunks of 1, 3, 7 and 64 tokens and as a whole: smear, windows
    and causality across every chunk border. Single tokens start late in the longest prompt."""
    lengths = golden_lengths(era)
    if not lengths:
        assert era.json["nanochat_commit"] == "1076f97"
        pytest.skip("these goldens have the last positions only")
    model, block_size = load(era, form), {"core": 7, "torch": 16, "loop": 3, "compiled": 1}[form]
    for prompt in era.json["prompts"]:
        length, ids = prompt["length"], prompt["ids"]
        if length not in lengths:
            continue
        runner = Runner(model, [length] * 5, block_size)
        sizes, done = [1, 3, 7, 64, length], [0] * 5
        pieces = [[], [], [], [], []]
        if length > 60:
            done[0] = length - 60
            pieces[0] += runner.step((0, ids, 0, done[0]))
        while any(start < length for start in done):
            chunks = [(i, ids, done[i], min(length, done[i] + sizes[i])) for i in range(5)]
            chunks = [chunk for chunk in chunks if chunk[2] < length]
            chunks.sort(key=lambda chunk: chunk[3] - chunk[2] > 1)
            for (i, *_, stop), logits in zip(chunks, runner.step(*chunks), strict=True):
                pieces[i].append(logits)
                done[i] = stop
        for piece in pieces:
            assert_golden_positions(era, length, np.concatenate(piece))


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
    for form in FORMS:
        try:
            model = load(era, form)
        except pytest.skip.Exception:
            continue
        runner = Runner(model, [length, length], block_size=4)
        whole = runner.step((0, ids, 0, length))
        parts = [runner.step((1, ids, p, min(p + 47, length)))[0] for p in range(0, length, 47)]
        both = runner.step((0, ids, length - 1, length), (1, ids, length - 9, length))
        views = [
            [x for k, v in runner.cache.data for x in SequenceKVView(k, v, table, length).gather()]
            for table in runner.tables
        ]
        for a, b in zip(*views, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        assert_near(np.concatenate(parts), whole[0])
        seen[form] = [*whole, *both, *(x.numpy() for x in views[0])]
    assert len(seen) >= 3
    for form, found in seen.items():
        for ours, core in zip(found, seen["core"], strict=True):
            assert np.abs(ours - core).max() < TOLERANCE, form


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
def test_as_many_kv_heads_as_query_heads(era, form):
    """Each kv head written out twice is the same model without sharing."""
    c, recipe, weights = read(era)
    group = c.n_head // c.n_kv_head
    assert group == 2
    for key in weights:
        if key.endswith(("c_k.weight", "c_v.weight")):
            w = weights[key].unflatten(0, (c.n_kv_head, c.head_dim))
            weights[key] = w.repeat_interleave(group, 0).flatten(0, 1)
        elif key.endswith("ve_gate.weight"):
            weights[key] = weights[key].repeat_interleave(group, 0)
        elif key.startswith("value_embeds."):
            w = weights[key].unflatten(1, (c.n_kv_head, c.head_dim))
            weights[key] = w.repeat_interleave(group, 1).flatten(1, 2)
    meta = era.json["model_config"] | {"n_kv_head": c.n_head}
    model = build(form, GPTConfig.from_meta(meta), recipe, weights)
    ids = era.json["prompts"][5]["ids"]
    (logits,) = Runner(model, [len(ids)]).step((0, ids, 0, len(ids)))
    assert_near(logits, era.arrays["all_logits_len033"])


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
@pytest.mark.parametrize("form", ["core", "torch"])
def test_half_precision_stays_near(era, form, dtype, tolerance):
    """Logits reach +-15 here. One wrong constant costs 0.8 and more at nearly every prompt."""
    prompts = era.json["prompts"]
    runner = Runner(load(era, form, dtype=dtype), [p["length"] for p in prompts])
    prefill = runner.step(*[(i, p["ids"], 0, p["length"]) for i, p in enumerate(prompts)])
    error = np.abs(np.stack([logits[-1] for logits in prefill]) - era.arrays["last_logits"])
    print(f"{dtype}: largest error {error.max():.3f}, mean {error.mean():.4f}")
    assert error.max() < tolerance
