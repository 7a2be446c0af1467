"""deterministic=True: what the model makes of a text does not depend on how it got there.

Logits, bit for bit: alone or in a batch, cold or with a prefix from the cache, in one chunk or in
many, as a decode or as part of a prompt, after a preemption.
"""

import os

import numpy as np
import pytest
import torch
from conftest import MODEL, Fixture, era_fixtures

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from microvllm import LLM, SamplingParams  # noqa: E402

ERAS = {name: Fixture(*found) for name, found in era_fixtures().items()}


class Record(dict):
    """The logits of every text that an engine was asked to continue; equal texts, equal bits."""

    def watch(self, llm: LLM) -> LLM:
        launch, logits = llm._launch, llm.model.logits

        def watched_launch(plan):
            guesses = {index: guessed for index, _, guessed in plan.guessed}
            self.texts = []
            for index, seq, position in plan.samples:
                known = seq.tokens[: plan.chunks[index][2] - len(guesses.get(index, ()))]
                self.texts.append(tuple([*known, *guesses.get(index, ())][:position]))
            return launch(plan)

        def watched_logits(h):
            out = logits(h)
            for text, row in zip(self.texts, out, strict=True):
                bits = row.float().cpu().numpy().tobytes()
                assert self.setdefault(text, bits) == bits, f"{len(text)} tokens, other logits"
                self.seen += 1
            return out

        llm._launch, llm.model.logits = watched_launch, watched_logits
        return llm

    seen = 0


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
    known = len(record)
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
            llm.scheduler._preempt(llm.scheduler.running[-1])
        found |= {output["request_id"]: output["token_ids"] for output in llm.step()}
    assert [found[i] for i in ids] == alone and llm.stats()["preemptions"] > 1
    assert len(record) == known == sum(len(a) for a in alone) and record.seen > 4 * known


@pytest.mark.parametrize("era", ["era1_padded", "era2", "era5"])
def test_every_era(era, one_thread):
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
    [{}, {"dtype": "bfloat16"}, {"quantization": "int8"}, {"block_size": 6, "max_batch_size": 7}],
    ids=str,
)
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
        llm.update_weights(llm.model.weights)  # forget the cache
        assert llm.score(prompts, tails) == alone
        assert [o["samples"] for o in llm.generate(prompts, params, False)] == drawn


def test_where_equal_rows_get_other_bits_a_product_is_done_a_row_at_a_time():
    from microvllm.fused.linear import Linear

    def product(x, weight):
        return F.linear(x, weight) * torch.linspace(1, 2, len(x))[:, None]

    F = torch.nn.functional
    weight = torch.randn(8, 8)
    parts = [weight], torch.device("cpu"), torch.float32
    x = torch.randn(5, 8)
    assert Linear(*parts, sliced=True).slice == 16
    odd = Linear(*parts, product=product, sliced=True)
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


# the GPU's kernels --------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    """The kernels; in the interpreter with a matrix unit that, like the real ones, treats all rows
    of a tile alike: numpy's product does not."""
    pytest.importorskip("triton", reason="the GPU kernels need triton (pip install triton)")
    from triton.runtime import interpreter

    from microvllm.gpu import kernels as kernels_gpu

    def dot(self, a, b, d, *_):
        rows = [(row[:, None] * b.data).sum(0, dtype=d.data.dtype) for row in a.data]
        return interpreter.TensorHandle(np.stack(rows) + d.data, d.dtype.scalar)

    if not CUDA:
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    return kernels_gpu


def test_the_tiled_product_is_a_product_and_its_rows_do_not_know_each_other(kernels):
    device = torch.device("cuda" if CUDA else "cpu")
    for dtype, error in ((torch.float32, 2e-6), (torch.float16, 1e-3)):
        for K, N in ((24, 1), (136, 70), (64, 130)):
            x, w = (torch.randn(n, K + 8).to(device, dtype)[:, :K] for n in (70, N))
            w = w.contiguous()
            y = kernels.linear(x, w)
            exact = x.float() @ w.float().T
            assert (y.float() - exact).norm() < error * exact.norm()
            for first, last in ((0, 1), (3, 4), (5, 69), (64, 70)):
                assert torch.equal(kernels.linear(x[first:last], w), y[first:last])


def test_a_row_of_attention_is_the_same_as_a_decode_or_in_any_chunk(kernels):
    from test_kernels_gpu import attention_case, chunk_of

    for group, window in ((1, -1), (3, 20)):
        q, _, (k, v), batch = attention_case([(1, 9), (40, 70)], group, 1, 16, 4, torch.float32)
        whole = kernels.fixed_attention(q, k, v, batch, window)
        for start, stop in ((0, 1), (0, 27), (27, 40), (39, 40)):
            alone = chunk_of(batch, 1, start, stop)
            out = kernels.fixed_attention(q[1 + start : 1 + stop], k, v, alone, window)
            assert torch.equal(out, whole[1 + start : 1 + stop])
        alone = chunk_of(batch, 0, 0, 1)
        assert torch.equal(kernels.fixed_attention(q[:1], k, v, alone, window), whole[:1])


def test_an_engine_on_the_gpus_kernels(kernels, one_thread, monkeypatch):
    from microvllm import model
    from microvllm.fused.linear import Linear

    fixture = ERAS["era5"]

    def build(**options):
        options = {"num_blocks": 60, "block_size": 4, "dtype": "float32"} | options
        options |= {"device": "cuda" if CUDA else "cpu", "tokenizer_path": fixture.tokenizer}
        if not CUDA:
            monkeypatch.setattr(model, "pick", lambda *_: Linear)
        llm = LLM(fixture.directory, deterministic=True, **options)
        if not CUDA:
            llm.model.sliced, llm.model.product = False, kernels.linear
            llm.model.ops, llm.model.attend = kernels, kernels.fixed_attention
            for linear in llm.model.linears.values():
                linear.slice, linear.product = 0, kernels.linear
        return llm

    record, params = Record(), greedy(3)
    llm = record.watch(build(max_batched_tokens=9))
    prompts = texts(60, [1, 6, 9])
    alone = [llm.generate([p], params, False)[0]["token_ids"] for p in prompts[1:]]
    cold = record.watch(build(enable_prefix_caching=False))
    for engine in (llm, cold):
        found = engine.generate(prompts, params, False)
        assert [output["token_ids"] for output in found[1:]] == alone
    turn = cold.generate([prompts[2] + alone[1][:-1]], greedy(1), False)
    assert turn[0]["token_ids"] == alone[1][-1:] and record.seen > 2 * len(record)
