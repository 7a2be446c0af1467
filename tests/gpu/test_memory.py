"""What a GPU's steps take is measured before the cache gets the rest."""

from types import SimpleNamespace

import pytest
import torch
from conftest import MODEL

from microvllm import LLM, SamplingParams, full
from microvllm.checkpoint import find_step, read_checkpoint
from microvllm.gpu import memory
from microvllm.model import rotary_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_step_that_is_measured_is_as_large_as_any(monkeypatch):
    # as many rows as a step takes, and as many samples as run at once, with every filter
    with LLM(MODEL, device="cpu", num_blocks=300, max_batch_size=30, max_batched_tokens=64) as llm:
        rows, samples = [], []
        forward, draw = llm.model.forward, llm.model.backend.sample

        def computed(batch, kv):
            rows.append(len(batch.ids))
            return forward(batch, kv)

        def sample(logits, params, *more):
            samples.append((len(logits), params[0]))
            return draw(logits, params, *more)

        monkeypatch.setattr(llm.model, "forward", computed)
        monkeypatch.setattr(llm.model.backend, "sample", sample)
        llm._warm_up(16)
        (short, measured), ((_, first), (count, params), *_) = rows, samples
        assert short == 2 and params.truncated and params.edited and params.logprobs
        assert first.plain and not first.truncated  # another kernel, which a first request wants
        many = [
            SamplingParams(max_tokens=4, seed=i, top_p=0.9, logprobs=3, ignore_eos=True)
            for i in range(40)
        ]
        llm.generate([[1 + i, 2, 3, 4, 5, 6, 7] for i in range(40)], many, False)
        assert measured >= max(rows) and count >= max(n for n, _ in samples) == 30
        assert not llm.cache.data[:, :, 0].any()  # it had a cache of its own


def test_what_does_not_fit_is_refused_with_the_numbers(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1234)
    with pytest.raises(ValueError, match="no memory for a thing: 1,234 bytes are free on cuda:0"):
        with memory.fits("a thing", torch.device("cuda", 0)):
            raise torch.cuda.OutOfMemoryError


@pytest.mark.parametrize(
    "max_batched_tokens, max_model_len, max_batch_size, rows",
    [(100, 31, 9, 100), (100, 61, 9, 100), (61, 31, 9, 61), (20, 61, 9, 20), (100, 31, 2, 60)],
)
def test_the_largest_step_is_tried_and_no_larger_one(
    max_batched_tokens, max_model_len, max_batch_size, rows
):
    with LLM(
        MODEL, num_blocks=20, device="cpu", max_batched_tokens=max_batched_tokens,
        max_model_len=max_model_len, max_batch_size=max_batch_size,
    ) as llm:  # fmt: skip
        seen, forward = [], llm.model.forward
        llm.model.forward = lambda batch, cache: seen.append(batch) or forward(batch, cache)
        llm._warm_up(16)
        short, batch = seen
        assert len(short.ids) == 2
        assert len(batch.ids) == rows and len(batch.logit_rows) == max_batch_size
        lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()
        assert max(lengths) < max_model_len and 1 not in lengths[batch.num_decodes :]


def test_the_cache_takes_what_the_largest_step_leaves(monkeypatch):
    """Of a card with so much free, 0.9 is for us; 3 MB is what activations took, and the recorded
    steps have as much again."""
    with LLM(MODEL, device="cpu", max_batch_size=8) as llm:
        # a block of all layers is three of two layers each. 1,024 tokens are in 64 blocks, of the
        # layers with a window of 256 in 17 twice: no more than all sequences can fill
        assert llm.stats()["num_blocks"] == -(-8 * (64 + 2 * 17) // 3)
        free, block = 200_000_000, 3 * llm.cache.data.nbytes // llm.cache.num_blocks
        llm.device = torch.device("cuda", 0)  # from here on only its numbers
        monkeypatch.setattr(llm, "_warm_up", lambda block_size: None)
        for name, value in {
            "memory_allocated": 7_000_000, "max_memory_allocated": 10_000_000,
            "reset_peak_memory_stats": None, "empty_cache": None, "mem_get_info": (free, 0),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        tables = rotary_bytes(llm.model.config, 1024)
        assert (
            llm._pool_size(None, 2000, 16, block)
            == (180_000_000 - 6_000_000 - tables) // (block + 48)
            < 2000
        )
        llm.gpu_memory_utilization = 0.01
        with pytest.raises(
            ValueError, match="no memory for .* num_blocks=2 .*and -4,000,000 are free"
        ):
            llm._pool_size(None, 2000, 16, block)
        llm.gpu_memory_utilization = 0.9
        assert llm._pool_size(None, 20, 16, block) == 20

        def no_room(block_size):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

        monkeypatch.setattr(llm, "_warm_up", no_room)
        with pytest.raises(ValueError, match="no memory for steps of max_batched_tokens=1024: .*"):
            llm._pool_size(None, 2000, 16, block)
        llm.device = torch.device("cpu")


def test_a_cache_that_does_not_fit_is_told_and_other_errors_are_themselves(monkeypatch):
    """A device's error (an assert of a kernel before, say) comes to light in any later call."""

    def failing(error):
        monkeypatch.setattr("microvllm.engine.PagedKVCache.__init__", error)
        monkeypatch.setattr("microvllm.features.windows.GroupedCache.__init__", error)
        return LLM(MODEL, device="cpu", num_blocks=20)

    def no_room(*_, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    def asserted(*_, **kwargs):
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(ValueError, match="no memory for the KV cache: [0-9,]+ bytes are free"):
        failing(no_room)
    with pytest.raises(RuntimeError, match="device-side assert"):
        failing(asserted)


def test_weights_that_do_not_fit_are_told_in_bytes(monkeypatch):
    def no_room(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr("microvllm.fused.model.FusedGPT", no_room)
    monkeypatch.setattr(full, "pick_backend", lambda *_: SimpleNamespace(name="sdpa"))
    monkeypatch.setattr(memory, "free_memory", lambda device: 1_234_567)
    monkeypatch.setattr(full, "free_memory", lambda device: 10**9)  # enough for rotary tables
    found = read_checkpoint(MODEL, find_step(MODEL, None))
    with pytest.raises(
        ValueError,
        match=r"no memory for weights of [\d,]{9,} bytes in torch.float32: 1,234,567 bytes are",
    ):
        full.build_model(*found, torch.device("cuda", 0), "float32")
