"""What a GPU's steps take is measured before the cache gets the rest."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.goldens import FIXTURES, MODEL, ROOT

from microvllm import LLM, SamplingParams, engine, loading, resources
from microvllm.checkpoint import find_step, read_checkpoint
from microvllm.features import logits
from microvllm.features.windows import make_memory
from microvllm.gpu import memory
from microvllm.model import GPTConfig, rotary_bytes
from microvllm.parts import choose_batch_size, make_runner
from microvllm.runner import Runner

pytestmark = pytest.mark.usefixtures("one_thread")


def warm_up(llm: LLM) -> None:
    """Run what is measured, with the engine's model and limits."""
    cache, blocks = make_memory(llm.model, replace(llm.config, num_blocks=1))
    memory.warm_up(make_runner(llm.model, Runner, cache, blocks), llm.config, SamplingParams)


def test_the_step_that_is_measured_is_as_large_as_any(monkeypatch):
    # as many rows as a step takes, and as many draws as run at once, with every filter
    with LLM(MODEL, device="cpu", num_blocks=300, max_batch_size=30, max_batched_tokens=64) as llm:
        rows, draws = [], []
        forward, draw = llm.model.forward, llm.model.backend.sample

        def computed(batch, cache):
            rows.append(len(batch.token_ids))
            return forward(batch, cache)

        def sample(logits, params, *more):
            draws.append((len(logits), params[0]))
            return draw(logits, params, *more)

        monkeypatch.setattr(llm.model, "forward", computed)
        monkeypatch.setattr(llm.model.backend, "sample", sample)
        monkeypatch.setattr(llm.runner, "sample", sample)
        warm_up(llm)
        (short, measured), ((_, first), (count, params), *_) = rows, draws
        assert short == 2 and params.drops_tokens and params.edits_logits and params.logprobs
        assert (
            first.has_plain_logits and not first.drops_tokens
        )  # another kernel for a first request
        many = [
            SamplingParams(max_tokens=4, seed=i, top_p=0.9, logprobs=3, ignore_eos=True)
            for i in range(40)
        ]
        llm.generate([[1 + i, 2, 3, 4, 5, 6, 7] for i in range(40)], many, False)
        assert measured >= max(rows) and count >= max(n for n, _ in draws) == 30
        assert not llm.cache.data[:, :, 0].any()  # it had a cache of its own


def test_what_does_not_fit_is_refused_with_the_numbers(monkeypatch):
    monkeypatch.setattr(resources, "free_memory", lambda device: 1234)
    with pytest.raises(
        ValueError, match="enough memory for a thing: 1,234 bytes are free on cuda:0"
    ):
        with resources.fits("a thing", torch.device("cuda", 0)):
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
        llm.model.init_rotary(max_model_len)
        warm_up(llm)
        short, batch = seen
        assert len(short.token_ids) == 2
        assert len(batch.token_ids) == rows and len(batch.hidden_rows) == max_batch_size
        lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()
        assert max(lengths) < max_model_len and 1 not in lengths[batch.num_decodes :]


def test_the_cache_takes_what_the_largest_step_leaves(monkeypatch):
    """Of a card with so much free, 0.9 is for us; 3 MB is what activations took. Recorded steps
    have memory of their own: some of a full batch's activations, and its logits."""
    with LLM(MODEL, device="cpu", max_batch_size=8) as llm:
        # a block of all layers is three of two layers each. 1,024 tokens are in 64 blocks, of the
        # layers with a window of 256 in 17 twice: no more than all sequences can fill
        assert llm.stats()["num_blocks"] == -(-8 * (64 + 2 * 17) // 3)
        free, block_bytes = 200_000_000, 3 * llm.cache.data.nbytes // llm.cache.num_blocks
        numbers = {
            "memory_allocated": 7_000_000, "max_memory_allocated": 10_000_000,
            "reset_peak_memory_stats": None, "empty_cache": None, "mem_get_info": (free, 0),
        }  # fmt: skip
        for name, value in numbers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        card = torch.device("cuda", 0)
        model = SimpleNamespace(
            device=card, config=llm.model.config, init_rotary=lambda max_len: None,
            dtype=torch.float32,
        )  # fmt: skip
        monkeypatch.setattr(memory, "warm_up", lambda *_: None)
        measure = partial(
            memory.gpu_cache_bytes,
            model,
            replace(llm.config, num_blocks=None),
            make_memory=lambda *_: (None, None),
            make_runner=lambda *_: None,
            params_class=SamplingParams,
            is_recorded=False,
        )
        assert measure(0.9) == 180_000_000 - 3_000_000
        recorded = 8 * 4 * (llm.model.config.vocab_size + 12 * llm.model.config.n_embd)
        assert measure(0.9, is_recorded=True) == 177_000_000 - recorded

        def num_blocks(utilization: float, num_wanted: int = 2000) -> int:
            config = replace(llm.config, num_blocks=None, cache_bytes=measure(utilization))
            return choose_num_blocks(model, config, num_wanted, block_bytes)

        tables = rotary_bytes(llm.model.config, 1024)
        assert num_blocks(0.9) == (177_000_000 - tables) // (block_bytes + 48) < 2000
        with pytest.raises(
            ValueError, match="not enough memory for .* num_blocks=2 .*but -1,000,000 are free"
        ):
            num_blocks(0.01)
        assert num_blocks(0.9, num_wanted=20) == 20

        def no_room(*_):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

        monkeypatch.setattr(memory, "warm_up", no_room)
        with pytest.raises(ValueError, match="of max_batched_tokens=1024 and max_batch_size=8: .*"):
            measure(0.9)


def choose_num_blocks(model, config, num_wanted: int, block_bytes: int) -> int:
    return engine.choose_num_blocks(
        model, config, num_wanted=num_wanted, block_bytes=block_bytes, tokens_per_block=16
    )


def test_a_cache_that_does_not_fit_is_refused_and_other_errors_are_themselves(monkeypatch):
    """A device's error (an assert of a kernel before, say) comes to light in any later call."""

    def failing(error):
        monkeypatch.setattr("microvllm.engine.PagedKVCache.__init__", error)
        monkeypatch.setattr("microvllm.features.windows.GroupedKVCache.__init__", error)
        return LLM(MODEL, device="cpu", num_blocks=20)

    def no_room(*_, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    def asserted(*_, **kwargs):
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(ValueError, match="enough memory for the KV cache: [0-9,]+ bytes are free"):
        failing(no_room)
    with pytest.raises(RuntimeError, match="device-side assert"):
        failing(asserted)


def test_weights_that_do_not_fit_are_refused_in_bytes(monkeypatch):
    def no_room(*_, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(loading, "FusedGPT", no_room)
    monkeypatch.setattr(loading, "pick_backend", lambda *_: SimpleNamespace(name="sdpa"))
    monkeypatch.setattr(resources, "free_memory", lambda device: 1_234_567)
    monkeypatch.setattr(loading, "free_memory", lambda device: 10**9)  # enough for rotary tables
    found = read_checkpoint(MODEL, find_step(MODEL, None))
    with pytest.raises(
        ValueError,
        match=r"enough memory for weights of [\d,]{9,} bytes in torch.float32: 1,234,567 bytes are",
    ):
        loading.build_model(*found, torch.device("cuda", 0), "float32")


def peak_bytes(runner: Runner, num_rows: int, num_draws: int, **params) -> int:
    """Bytes that a step allocates, as far as they exist at the same time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        memory.compute(runner, [num_rows], SamplingParams(seed=0, **params), num_draws)
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(np.cumsum(sizes))


def test_the_formulas_are_what_a_step_takes(monkeypatch):
    """In plain torch, whose steps take more than Triton's; attention on a GPU gathers nothing."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(logits, "CACHED_LOGITS", logits.EDITED_LOGITS)  # as on a GPU
    assert memory.EDITED_LOGITS == logits.EDITED_LOGITS
    fixture = FIXTURES["era5"]  # which keeps the middle layer's, too
    options = {"tokenizer_path": fixture.tokenizer, "attention": "sdpa", "device": "cpu"}
    with LLM(fixture.directory, num_blocks=300, max_batched_tokens=256, **options) as llm:
        monkeypatch.setattr(llm.model.backend, "attend", lambda q, *_: torch.empty_like(q))
        cache, blocks = make_memory(llm.model, replace(llm.config, num_blocks=1))
        runner = make_runner(llm.model, Runner, cache, blocks)
        compute = partial(peak_bytes, runner)
        shape = llm.model.config
        compute(2, 1)  # what only the first one makes
        assert 0.6 < compute(250, 1) / memory.forward_bytes(shape, 250, 4) <= 1
        # a kernel draws on a GPU, and makes no copies
        runner.sample = lambda logits, *_: torch.zeros(len(logits), dtype=torch.int32)
        assert 0.6 < compute(2, 64, **memory.ALL_FILTERS) / memory.draw_bytes(shape, 64, 4) <= 1
        # of more draws than are edited at a time only the logits grow
        monkeypatch.setattr(logits, "CACHED_LOGITS", 20 * shape.vocab_size)
        monkeypatch.setattr(memory, "EDITED_LOGITS", 20 * shape.vocab_size)
        assert 0.6 < compute(2, 90, **memory.ALL_FILTERS) / memory.draw_bytes(shape, 90, 4) <= 1


def test_the_batch_is_as_large_as_there_is_memory_for(monkeypatch):
    model = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    model.config = GPTConfig(2048, 65536, 20, 10, 10, 1280)
    model.kv_layout = model.config, torch.bfloat16
    config = engine.EngineConfig()
    for free, expected in ((2**30, 16), (6 * 2**30, 176), (2**36, 512)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
        assert choose_batch_size(model, config, None).max_batch_size == expected
        ranks = SimpleNamespace(least=lambda size: size // 2)
        assert choose_batch_size(model, config, ranks).max_batch_size == expected // 2
    given = replace(config, max_batch_size=700)
    assert choose_batch_size(model, given, None) is given
    model.device = torch.device("cpu")
    assert choose_batch_size(model, config, None) is config


def test_the_table_of_cards_is_what_the_formulas_say():
    """Era 1 in bfloat16, 2,048 tokens in a sequence at most; half a GiB is for CUDA itself."""
    rows = []
    for depth, width in ((12, 768), (20, 1280), (26, 1664), (34, 2176)):
        shape = GPTConfig(2048, 65536, depth, width // 128, width // 128, width)
        weights = 2 * (2 * 65536 * width + 12 * depth * width**2)
        cells = []
        for gibibytes in (8, 12, 16, 24, 80):
            free = gibibytes * 2**30 - 2**29 - weights
            size = memory.choose_batch_size(shape, 2, 8192, free)
            tokens = memory.expected_tokens(shape, 2, 8192, size, free)
            tokens = min(tokens, size * 2048)  # more cannot be filled
            cells.append(f"{tokens // 1000:,},000; {size}")
        rows.append(f"| d{depth} | {weights / 1e9:.1f} GB | {' | '.join(cells)} |")
    numbers = (ROOT / "docs" / "PERFORMANCE.md").read_text(encoding="utf-8")
    assert all(row in numbers for row in rows)
