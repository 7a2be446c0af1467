"""kv_cache_dtype="int8" on the GPU's kernels, in whole engines."""

import pytest
import torch
from helpers.goldens import FIXTURES
from helpers.gpu_kernels import CUDA, DEVICE

from microvllm import LLM, SamplingParams, loading
from microvllm.gpu.backend import Int8TritonBackend


@pytest.fixture(autouse=True)
def kernels_run_here(monkeypatch, one_thread):
    for place in ("microvllm.gpu", "microvllm.gpu.backend"):
        monkeypatch.setattr(f"{place}.has_triton", lambda device: True)


def test_int8_is_for_triton():
    made = loading.pick_backend("triton", DEVICE, torch.float32, kv_cache_dtype="int8")
    assert type(made) is Int8TritonBackend


@pytest.mark.slow
def test_an_engine_draws_the_tokens_of_the_plain_functions():
    """Prompts in chunks, windows, forks, preemption, and a prefix that is found again."""
    fixture = FIXTURES["era5"]
    options = {"tokenizer_path": fixture.tokenizer, "num_blocks": 14, "block_size": 4}
    options |= {"dtype": "float32", "kv_cache_dtype": "int8", "max_batched_tokens": 24}
    params = [SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)] * 2
    params.append(SamplingParams(temperature=0.9, seed=3, max_tokens=6, ignore_eos=True, n=2))
    prompts = [[1, 2, 3], [*range(9, 30)], [5, 6, 7, 8, 9, 10]]
    outputs = []
    for attention in ("sdpa", "triton"):
        device = "cuda" if CUDA and attention == "triton" else "cpu"
        with LLM(fixture.directory, device=device, attention=attention, **options) as llm:
            assert llm.cache.data.dtype == torch.int8
            for _ in range(2):
                found = llm.generate(prompts, params, use_tqdm=False)
                outputs.append([[s["token_ids"] for s in out["samples"]] for out in found])
    assert outputs[0] == outputs[1] == outputs[2] == outputs[3]
