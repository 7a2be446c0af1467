"""Attention of sequences that share their first blocks: read once, with the bits of each alone."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.goldens import MODEL

from microvllm import LLM, SamplingParams
from microvllm.cpu import attention, team
from microvllm.cpu.elementwise import array_of

pytestmark = pytest.mark.slow  # its kernels are compiled
HEAVY = pytest.mark.skipif(not os.environ.get("FUZZ"), reason="compiles for long: set FUZZ")

# lengths, and how many of the first blocks each has in common with the one before
GROUPS = [
    ([97, 98, 99, 100], 6),
    ([1030, 1025, 1100, 1024, 1031], 64),
    ([600, 513, 512, 700, 530, 520, 519, 518, 517], 31),
    ([70, 600], 4),
]


def arrays_of(lengths, shared, n_head, n_kv_head, dtype, block_size=16):
    """q, and a cache in which the sequences share blocks; the same where each has its own copy."""
    generator = torch.Generator().manual_seed(sum(lengths))
    num_blocks = [-(-length // block_size) for length in lengths]
    total = 1 + sum(num_blocks)
    k, v = (torch.randn(total, n_kv_head, block_size, 32, generator=generator) for _ in range(2))
    k, v = k.to(dtype), v.to(dtype)
    own = np.zeros((len(lengths), max(num_blocks)), np.int32)
    common = own.copy()
    free = 1
    for row, count in enumerate(num_blocks):
        own[row, :count] = np.arange(free, free + count)
        common[row, :count] = own[row, :count]
        free += count
        if row > 0:
            common[row, :shared] = common[0, :shared]
            for cache in (k, v):
                cache[own[row, :shared]] = cache[own[0, :shared]]
    q = torch.randn(len(lengths), n_head, 32, generator=generator)
    return q, k, v, own, common


def attend(q, k, v, lengths, tables, window, threads=1):
    seq_lens = np.array(lengths, np.int32)
    starts = np.arange(len(lengths) + 1, dtype=np.int32)
    group = q.shape[1] // k.shape[1]
    size = attention.scratch_size(attention._QUERIES, q.shape[2]) + 16 * group
    scratch = np.zeros((threads, size), np.float32)
    out = np.full(q.shape, np.nan, np.float32)
    with team.one_at_a_time:
        attention.attend_rows(
            array_of(q), array_of(k), array_of(v), starts, seq_lens, tables, window, 1,
            team.team_of(threads), scratch, out,
        )  # fmt: skip
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("window", [-1, 90, 600])
@pytest.mark.parametrize(("lengths", "shared"), GROUPS)
def test_shared_blocks_give_the_bits_of_copies_of_them(lengths, shared, window, heads, dtype):
    q, k, v, own, common = arrays_of(lengths, shared, *heads, dtype)
    want = attend(q, k, v, lengths, own, window)
    assert not np.isnan(want).any()
    for threads in (1, 2):
        got = attend(q, k, v, lengths, common, window, threads)
        assert np.array_equal(got, want), (lengths, shared)


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"kv_cache_dtype": "int8"}, marks=HEAVY), {"dtype": "bfloat16"}],
    ids=str,
)
def test_samples_and_questions_have_the_tokens_that_each_has_alone(options):
    """Samples of one prompt, then questions behind one text, in blocks that all of them read."""
    text = [7 + i % 40 for i in range(150)]
    with LLM(MODEL, num_blocks=300, **options) as llm:
        params = SamplingParams(max_tokens=40, seed=3, n=5, ignore_eos=True)
        (together,) = llm.generate([text], params, use_tqdm=False)
        for i, sample in enumerate(together["samples"]):
            alone = replace(params, n=1, sample_index=i)
            assert (
                llm.generate([text], alone, use_tqdm=False)[0]["token_ids"] == sample["token_ids"]
            )
        questions = [[*text, 50 + i, *range(60, 60 + 3 * i)] for i in range(6)]
        greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        outputs = llm.generate(questions, greedy, use_tqdm=False)
        for question, output in zip(questions, outputs, strict=True):
            (alone,) = llm.generate([question], greedy, use_tqdm=False)
            assert output["token_ids"] == alone["token_ids"]


def cut(lengths, tables, threads=1, n_kv_head=6, block_size=16, tiled=False):
    seq_lens = np.array(lengths, np.int32)
    starts = np.arange(len(lengths) + 1, dtype=np.int32)
    tables = np.array(tables, np.int32)
    return attention.cut_tiles(
        starts, seq_lens, tables, block_size, -1, n_kv_head, 1, 1, threads, tiled
    ).tolist()


def test_neighbours_with_the_same_first_blocks_are_one_tile():
    same = [1, 2, 3, 4, 5]
    tables = [[*same, 10, 0], [*same, 11, 0], [*same, 12, 13], [1, 2, 3, 20, 21, 22, 23]]
    lengths = [96, 90, 97, 100]
    # the last one shares three blocks, which are less than 64 positions
    assert cut(lengths, tables) == [[0, 0, 3, 80], [3, 3, 4, 0]]
    # the block of a sequence's last position is its own, even if the tables say the same
    assert cut([80, 81], [same, same]) == [[0, 0, 2, 64]]
    # no thread has less than two parts
    assert cut(lengths[:2], tables[:2], threads=6) == [[0, 0, 1, 0], [1, 1, 2, 0]]
    assert cut(lengths[:2], tables[:2], tiled=True) == [[0, 0, 1, 0], [1, 1, 2, 0]]


def test_one_that_shares_less_does_not_shrink_what_the_others_share():
    prompt = list(range(1, 41))
    other = [*range(1, 9), *range(60, 92)]
    tables = [[*prompt, 50], [*prompt, 51], [*other, 52], [*other, 53]]
    assert cut([650, 651, 652, 653], tables) == [[0, 0, 2, 640], [2, 2, 4, 640]]
