"""A model in hand-made steps, compared with what nanochat itself computed."""

import random

import numpy as np
import pytest
import torch

from microvllm import checkpoint
from microvllm.attention import PagedKVCache
from microvllm.model import GPTConfig
from microvllm.sampler import cap_logits

from .batches import hand_made_batch

TOLERANCE = 1e-4  # absolute, in float32 logits: nanochat's own two paths differ by up to 1.6e-5


class Steps:
    """Drives a GPT over hand-made steps. Each sequence owns blocks scattered over the pool, and
    every slot that was not written holds large numbers."""

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


def read(era):
    """Config, recipe and weights of an era's checkpoint."""
    return checkpoint.read_checkpoint(era.directory, era.json["checkpoint"]["step"])


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


def check_prompts_and_tokens(era, model) -> None:
    """Eight prompts in one batch, then 40 greedy tokens each, feeding back what the model chose."""
    prompts = era.json["prompts"]
    texts = [list(p["ids"]) for p in prompts]
    steps = Steps(model, [len(ids) + 40 for ids in texts])
    prefill = steps.step(*[(i, ids, 0, len(ids)) for i, ids in enumerate(texts)])
    last = np.stack([logits[-1] for logits in prefill])
    assert_near(last, era.arrays["last_logits"])
    for _ in range(39):
        for ids, token in zip(texts, last.argmax(-1).tolist(), strict=True):
            ids.append(token)
        rows = [(i, ids, len(ids) - 1, len(ids)) for i, ids in enumerate(texts)]
        last = np.concatenate(steps.step(*rows))
    assert_near(last, era.arrays["engine_step40_logits"])
    for ids, token, prompt in zip(texts, last.argmax(-1).tolist(), prompts, strict=True):
        assert [*ids[prompt["length"] :], token] == prompt["greedy_tokens"], prompt["name"]


def check_every_position(era, model, block_size: int) -> None:
    """The same prompt five times, in chunks of 1, 3, 7 and 64 tokens and as a whole: smear, windows
    and causality across every chunk border. Single tokens start late in the longest prompt."""
    lengths = golden_lengths(era)
    if not lengths:
        assert era.json["nanochat_commit"] == "1076f97"
        pytest.skip("these goldens have the last positions only")
    for prompt in era.json["prompts"]:
        length, ids = prompt["length"], prompt["ids"]
        if length not in lengths:
            continue
        steps = Steps(model, [length] * 5, block_size)
        sizes, done = [1, 3, 7, 64, length], [0] * 5
        pieces = [[], [], [], [], []]
        if length > 60:
            done[0] = length - 60
            pieces[0] += steps.step((0, ids, 0, done[0]))
        while any(start < length for start in done):
            chunks = [(i, ids, done[i], min(length, done[i] + sizes[i])) for i in range(5)]
            chunks = [chunk for chunk in chunks if chunk[2] < length]
            chunks.sort(key=lambda chunk: chunk[3] - chunk[2] > 1)
            for (i, *_, stop), logits in zip(chunks, steps.step(*chunks), strict=True):
                pieces[i].append(logits)
                done[i] = stop
        for piece in pieces:
            assert_golden_positions(era, length, np.concatenate(piece))


def check_kv_heads_written_out(era, build) -> None:
    """Each kv head written out twice is the same model without sharing. build: makes a model of
    config, recipe and weights."""
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
    model = build(GPTConfig.from_meta(meta), recipe, weights)
    ids = era.json["prompts"][5]["ids"]
    (logits,) = Steps(model, [len(ids)]).step((0, ids, 0, len(ids)))
    assert_near(logits, era.arrays["all_logits_len033"])


def check_half_precision(era, model, tolerance: float) -> None:
    """Logits reach +-15 here. One wrong constant costs 0.8 and more at nearly every prompt."""
    prompts = era.json["prompts"]
    steps = Steps(model, [p["length"] for p in prompts])
    prefill = steps.step(*[(i, p["ids"], 0, p["length"]) for i, p in enumerate(prompts)])
    error = np.abs(np.stack([logits[-1] for logits in prefill]) - era.arrays["last_logits"])
    print(f"{model.dtype}: largest error {error.max():.3f}, mean {error.mean():.4f}")
    assert error.max() < tolerance
