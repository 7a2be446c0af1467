"""The model against nanochat's own numbers: every era, every position, whole and in chunks."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import hand_made_batch

from microvllm import LLM, SamplingParams
from microvllm.attention import PagedKVCache, SequenceKVView
from microvllm.checkpoint import load_model
from microvllm.model import GPT, RECIPES, GPTConfig, layer_windows

TOLERANCE = 1e-4  # absolute, in float32 logits: nanochat's own two paths differ by up to 1.6e-5


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["sdpa", "numba"])
def attention(request) -> str:
    return request.param


class Runner:
    """Drives a GPT over hand-made steps. Each sequence owns blocks scattered over the pool, and
    every slot that nobody has written holds rubbish."""

    def __init__(self, model, lengths: list[int], block_size: int = 16):
        counts = [-(-n // block_size) for n in lengths]
        blocks = random.Random(0).sample(range(1, 1 + sum(counts)), sum(counts))
        self.tables = [[blocks.pop() for _ in range(n)] for n in counts]
        self.model, self.block_size = model, block_size
        self.cache = PagedKVCache(model.config, 1 + sum(counts), block_size, model.dtype, "cpu")
        self.cache.data.fill_(50.0)

    def step(self, *chunks: tuple[int, list[int], int, int]) -> list[np.ndarray]:
        """chunks: (sequence, ids, start, stop), single rows first. Logits (stop - start, V) of
        each."""
        spelled = [(ids, start, stop, self.tables[i]) for i, ids, start, stop in chunks]
        batch = hand_made_batch(spelled, self.block_size)
        with torch.inference_mode():
            logits = self.model.head(self.model.forward(batch, self.cache))
        assert logits.dtype == torch.float32
        return [x.numpy() for x in logits.split([stop - start for _, _, start, stop in chunks])]


def load(era, attention="sdpa", **kwargs):
    kwargs = {"max_len": 500} | era.overrides | kwargs
    return load_model(era.directory, attention=attention, **kwargs)


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


def test_eight_prompts_in_one_batch_give_nanochats_logits_and_tokens(era, attention):
    """Prefill all at once, then 40 greedy tokens each, feeding back what the model itself chose."""
    prompts = era.json["prompts"]
    texts = [list(p["ids"]) for p in prompts]
    runner = Runner(load(era, attention), [len(ids) + 40 for ids in texts])
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


def test_every_position_of_a_whole_prompt(era, attention):
    lengths = golden_lengths(era)
    if not lengths:
        assert era.json["nanochat_commit"] == "1076f97"
        pytest.skip("these goldens have the last positions only")
    model = load(era, attention)
    for prompt in era.json["prompts"]:
        if prompt["length"] in lengths:
            runner = Runner(model, [prompt["length"]], block_size=7)
            (logits,) = runner.step((0, prompt["ids"], 0, prompt["length"]))
            assert_golden_positions(era, prompt["length"], logits)


@pytest.mark.parametrize("block_size", [1, 16])
def test_every_position_of_prompts_that_come_in_chunks(era, attention, block_size):
    """The same prompt four times in one batch, in chunks of 1, 3, 7 and 64 tokens: smear, windows
    and causality across every chunk border. Single tokens start late in the longest prompt."""
    lengths = golden_lengths(era)
    if not lengths:
        assert era.json["nanochat_commit"] == "1076f97"
        pytest.skip("these goldens have the last positions only")
    model = load(era, attention)
    for prompt in era.json["prompts"]:
        length, ids = prompt["length"], prompt["ids"]
        if length not in lengths:
            continue
        runner = Runner(model, [length] * 4, block_size)
        sizes, done = [1, 3, 7, 64], [0] * 4
        pieces = [[], [], [], []]
        if length > 100:
            done[0] = length - 100
            pieces[0] += runner.step((0, ids, 0, done[0]))
        while any(start < length for start in done):
            chunks = [(i, ids, done[i], min(length, done[i] + sizes[i])) for i in range(4)]
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


def test_a_prompt_in_chunks_leaves_the_same_keys_and_values_as_whole(era, attention):
    prompt = era.json["prompts"][6]
    length, ids = prompt["length"], prompt["ids"]
    runner = Runner(load(era, attention), [length, length], block_size=4)
    runner.step((0, ids, 0, length))
    for start in range(0, length, 9):
        runner.step((1, ids, start, min(start + 9, length)))
    whole, pieces = (SequenceKVView(runner.cache, table, length) for table in runner.tables)
    for layer in range(runner.model.config.n_layer):
        for a, b in zip(whole.gather(layer), pieces.gather(layer), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


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
def test_as_many_kv_heads_as_query_heads(era, attention):
    """Each kv head written out twice is the same model without sharing."""
    shared = load(era, attention)
    c = shared.config
    weights = torch.load(era.directory / f"model_{era.json['checkpoint']['step']:06d}.pt")
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
    model = GPT(GPTConfig.from_meta(meta), shared.recipe, weights, shared.attend, max_len=500)
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
def test_half_precision_stays_near(era, dtype, tolerance):
    """Logits reach +-15 here. One wrong constant costs 0.8 and more at nearly every prompt."""
    prompts = era.json["prompts"]
    runner = Runner(load(era, dtype=dtype), [p["length"] for p in prompts])
    prefill = runner.step(*[(i, p["ids"], 0, p["length"]) for i, p in enumerate(prompts)])
    error = np.abs(np.stack([logits[-1] for logits in prefill]) - era.arrays["last_logits"])
    print(f"{dtype}: largest error {error.max():.3f}, mean {error.mean():.4f}")
    assert error.max() < tolerance


def test_scores_are_computed_in_slices_of_64_mb_of_logits():
    """Of a vocabulary of 4 million, that is; the numbers themselves are few."""
    h, targets, sizes = torch.randn(10, 7), torch.arange(10) % 7, []

    def head(rows):
        sizes.append(len(rows))
        return rows

    model = SimpleNamespace(config=SimpleNamespace(vocab_size=2**22), head=head, at_once=None)
    found = GPT.logprobs(model, h, targets)
    assert sizes == [4, 4, 2]
    torch.testing.assert_close(found, h.log_softmax(-1)[range(10), targets])
