"""deterministic=True on the GPU's kernels: a row's bits do not depend on the rows beside it."""

import numpy as np
import pytest
import torch
from helpers.full_engines import set_overlap
from helpers.goldens import FIXTURES
from helpers.gpu_kernels import CUDA, attention_case, chunk_of
from helpers.records import Record
from triton.runtime import interpreter

from microvllm import LLM, SamplingParams
from microvllm.engine import Loop
from microvllm.gpu import elementwise
from microvllm.gpu.attention import fixed_attention
from microvllm.gpu.elementwise import linear


@pytest.fixture(autouse=True)
def matrix_unit(monkeypatch):
    """In the interpreter, one that like the real ones treats all rows of a tile alike: numpy's
    product does not."""

    def dot(self, a, b, d, *_):
        rows = [(row[:, None] * b.data).sum(0, dtype=d.data.dtype) for row in a.data]
        return interpreter.TensorHandle(np.stack(rows) + d.data, d.dtype.scalar)

    if not CUDA:
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def test_the_tiled_product_is_a_product_and_its_rows_do_not_know_each_other(monkeypatch):
    monkeypatch.setattr(elementwise, "NARROW", 100)  # so that there are both sizes of tiles
    rows = 300 if CUDA else 70
    device = torch.device("cuda" if CUDA else "cpu")
    for dtype, error in ((torch.float32, 2e-6), (torch.float16, 1e-3)):
        for K, N in ((24, 1), (136, 70), (64, 130)):
            x, w = (torch.randn(n, K + 8).to(device, dtype)[:, :K] for n in (rows, N))
            w = w.contiguous()
            y = linear(x, w)
            exact = x.float() @ w.float().T
            assert (y.float() - exact).norm() < error * exact.norm()
            for first, last in ((0, 1), (3, 4), (5, 69), (64, rows)):
                assert torch.equal(linear(x[first:last], w), y[first:last])


def test_a_row_of_attention_is_the_same_as_a_decode_or_in_any_chunk():
    for group, window in ((1, -1), (3, 20)):
        q, _, (k, v), batch = attention_case([(1, 9), (40, 70)], group, 1, 16, 4, torch.float32)
        whole = fixed_attention(q, k, v, batch, window)
        for start, stop in ((0, 1), (0, 27), (27, 40), (39, 40)):
            alone = chunk_of(batch, 1, start, stop)
            out = fixed_attention(q[1 + start : 1 + stop], k, v, alone, window)
            assert torch.equal(out, whole[1 + start : 1 + stop])
        alone = chunk_of(batch, 0, 0, 1)
        assert torch.equal(fixed_attention(q[:1], k, v, alone, window), whole[:1])


@pytest.mark.slow
def test_an_engine_on_the_gpus_kernels(one_thread, monkeypatch):
    fixture = FIXTURES["era5"]
    if not CUDA:
        monkeypatch.setattr("microvllm.gpu.backend.has_triton", lambda device: True)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)

    def build(**options):
        options = {"num_blocks": 60, "block_size": 4, "dtype": "float32"} | options
        options |= {"device": "cuda" if CUDA else "cpu", "tokenizer_path": fixture.tokenizer}
        options |= {"attention": "triton", "cuda_graphs": False, "deterministic": True}
        llm = LLM(fixture.directory, **options)
        assert llm.model.backend.attend is fixed_attention
        for matrix in llm.model.linears.values():
            assert matrix.backend.product is linear
            matrix.slice = 0  # which is for libraries on a CPU
        set_overlap(llm, overlap=not CUDA)
        llm.loop.inner_loop = Loop(llm.loop.engine)  # the plain one: all texts are known
        return llm

    def greedy(prompts, max_tokens, llm) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        return [output["token_ids"] for output in llm.generate(prompts, params, False)]

    record, random = Record(), np.random.default_rng(0)
    shared, *tails = random.integers(60, size=(3, 9)).tolist()
    prompts = [shared[:1], shared[:3] + tails[0][:3], shared[:4] + tails[1][:5]]
    llm = record.watch(build(max_batched_tokens=9))
    length = 3 if CUDA else 2  # the interpreter is slow
    alone = [greedy([prompt], length, llm)[0] for prompt in prompts[1:]]
    cold = record.watch(build(enable_prefix_caching=False))
    for engine in (llm, cold):
        assert greedy(prompts, length, engine)[1:] == alone
    assert greedy([prompts[2] + alone[1][:-1]], 1, cold) == [alone[1][-1:]]
    if CUDA:  # a batch for which a library would take another kernel, in chunks of its own
        crowd = random.integers(60, size=(298, 9)).tolist()
        many = record.watch(build(num_blocks=3000, max_batched_tokens=500))
        assert greedy(prompts[1:] + crowd, length, many)[:2] == alone
    assert record.num_seen > 2 * len(record.bits)
