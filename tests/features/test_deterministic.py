"""deterministic=True: what the model makes of a text does not depend on how it got there.

Logits, bit for bit: alone or in a batch, cold or with a prefix from the cache, in one chunk or in
many, as a decode or as part of a prompt, after a preemption.
"""

import os

import numpy as np
import pytest
import torch
from helpers.goldens import MODEL, Fixture, era_fixtures
from helpers.records import Record

from microvllm import LLM, SamplingParams
from microvllm.cpu.backend import CpuBackend
from microvllm.fused.linear import Linear

pytestmark = pytest.mark.usefixtures("one_thread")

ERAS = {name: Fixture(*found) for name, found in era_fixtures().items()}

HEAVY = pytest.mark.skipif(not os.environ.get("FUZZ"), reason="compiles for long: set FUZZ")


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def texts(vocabulary: int, lengths: list[int]) -> list[list[int]]:
    """Prompts of these lengths, all with the same beginning but for a few."""
    random = np.random.default_rng(0)
    shared = random.integers(vocabulary, size=max(lengths)).tolist()
    tails = [random.integers(vocabulary, size=max(lengths)).tolist() for _ in lengths]
    return [
        shared[: n // 2] + tail[: n - n // 2] if n % 5 else tail[:n]
        for n, tail in zip(lengths, tails, strict=True)
    ]


def go_every_way(build, vocabulary: int, lengths: list[int], max_tokens: int) -> None:
    """One text at a time; all at once; again, with everything in the cache; with a continuation
    that was decoded as a prompt; in chunks of odd sizes; sent away in between."""
    record, params = Record(), greedy(max_tokens)
    prompts = texts(vocabulary, lengths)
    llm = record.watch(build(enable_prefix_caching=False))
    alone = [llm.generate([p], params, False)[0]["token_ids"] for p in prompts]
    known = len(record.bits)
    llm = record.watch(build())
    for _ in range(2):
        found = llm.generate(prompts, params, False)
        assert [output["token_ids"] for output in found] == alone
    assert llm.stats()["cached_tokens"] > 0
    # turns of a conversation: the prompt is what was decoded before
    turns = [p + a[:-1] for p, a in zip(prompts, alone, strict=True)]
    for engine in (llm, record.watch(build(enable_prefix_caching=False))):
        assert [o["token_ids"] for o in engine.generate(turns, greedy(1), False)] == [
            a[-1:] for a in alone
        ]
    llm = record.watch(build(max_batched_tokens=7))
    assert [o["token_ids"] for o in llm.generate(prompts, params, False)] == alone
    llm = record.watch(build())
    ids = [llm.add_request(p, params) for p in prompts]
    found = {}
    while not llm.is_finished():
        if llm.stats()["steps"] % 2:  # someone is sent back to the queue
            llm.scheduler.preempt(llm.scheduler.running[-1])
        found |= {output["request_id"]: output["token_ids"] for output in llm.step()}
    assert [found[i] for i in ids] == alone and llm.stats()["preemptions"] > 1
    assert len(record.bits) == known == sum(len(a) for a in alone)
    assert record.num_seen > 4 * known


@pytest.mark.parametrize("era", ["era1_padded", "era2", "era5"])
def test_every_era(era):
    fixture = ERAS[era]

    def build(**options):
        options = {"num_blocks": 200, "block_size": 4, "device": "cpu"} | options
        return LLM(
            fixture.directory, tokenizer_path=fixture.tokenizer, deterministic=True, **options
        )

    vocabulary = build().model.config.vocab_size
    go_every_way(build, vocabulary, [1, 3, 18, 19, 20, 30, 33, 35], 9)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"block_size": 6, "max_batch_size": 7},
        pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({"quantization": "int8"}, marks=pytest.mark.slow),
        pytest.param({"quantization": "int4"}, marks=[pytest.mark.slow, HEAVY]),
    ],
    ids=str,
)  # fmt: skip
def test_a_model_of_a_size_that_has_products_of_several_kinds(options):
    options = {"num_blocks": 400, "device": "cpu"} | options

    def build(**more):
        return LLM(MODEL, deterministic=True, **options | more)

    go_every_way(build, 4000, [1, 2, 17, 40, 64, 65, 100, 101], 6)


def test_scores_and_log_probabilities_as_well():
    """With a vocabulary that is no multiple of anything: torch computes the odd end otherwise."""
    fixture = ERAS["era1_padded"]
    options = {"num_blocks": 200, "tokenizer_path": fixture.tokenizer, "device": "cpu"}
    with LLM(fixture.directory, deterministic=True, **options) as llm:
        vocabulary = llm.model.config.vocab_size
        prompts, tails = texts(vocabulary, [5, 20, 33, 50]), texts(vocabulary, [9, 1, 12, 4])
        params = SamplingParams(max_tokens=5, seed=1, logprobs=3, ignore_eos=True)
        alone = [llm.score([p], [t])[0] for p, t in zip(prompts, tails, strict=True)]
        drawn = [llm.generate([p], params, False)[0]["samples"] for p in prompts]
        llm.reset_prefix_cache()
        assert llm.score(prompts, tails) == alone
        assert [o["samples"] for o in llm.generate(prompts, params, False)] == drawn


def test_where_equal_rows_get_other_bits_a_product_is_done_a_row_at_a_time():
    weight, x = torch.randn(8, 8), torch.randn(5, 8)
    backend = CpuBackend(torch.device("cpu"), torch.float32, deterministic=True)
    assert Linear([weight], backend, torch.float32).slice == 16
    backend.product = lambda x, w: x @ w.T * torch.linspace(1, 2, len(x))[:, None]
    odd = Linear([weight], backend, torch.float32)
    assert odd.slice == 1
    assert all(torch.equal(odd(x)[i], odd(x[i : i + 1])[0]) for i in range(5))


def test_it_is_refused_where_nothing_vouches_for_it():
    for options, words in (
        ({"attention": "sdpa"}, "deterministic=True is for attention='numba' on a CPU .*'triton'"),
        ({"dtype": "float16"}, "deterministic=True is for attention='numba'"),
    ):
        with pytest.raises(ValueError, match=words):
            LLM(MODEL, device="cpu", deterministic=True, **options)
    with pytest.raises(TypeError, match="deterministic must be True or False, got 1"):
        LLM(MODEL, deterministic=1)
