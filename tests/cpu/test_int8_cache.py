"""K and V in 8 bits: the kernels against the plain reading of the same bytes, and what it costs."""

import itertools
import os
import random
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.cpu_kernels import (
    CPU,
    MIXED,
    attention_case,
    dense_attention,
    perplexity,
)
from helpers.goldens import MODEL, Fixture, era_fixtures

from microvllm import LLM, SamplingParams
from microvllm.attention import SequenceKVView
from microvllm.cpu import elementwise
from microvllm.cpu.attention import paged_attention
from microvllm.fused.int8_cache import Int8CacheBackend, Int8Heads, round_up
from microvllm.loading import pick_backend
from microvllm.model import GPTConfig
from microvllm.trace import Replay

REFERENCE = Int8CacheBackend(CPU, torch.float32)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

pytestmark = pytest.mark.usefixtures("one_thread")
COMPILES = pytest.mark.slow  # the first of them, for ten seconds; those of engines for longer
HEAVY = pytest.mark.skipif(not os.environ.get("FUZZ"), reason="compiles for a minute: set FUZZ")


def packed(x):
    """x (N, Hkv, block_size, D) as int8, and what that stands for."""
    *shape, D = x.shape
    data = torch.zeros(*shape, D + 2, dtype=torch.int8)
    heads = Int8Heads(data)
    heads[torch.arange(len(x))] = x
    return data, heads[torch.arange(len(x))]


# what is stored -----------------------------------------------------------------------------------


def test_a_row_is_within_half_a_step_of_what_was_written():
    torch.manual_seed(0)
    x = torch.randn(7, 3, 5, 20) * torch.logspace(-20, 20, 7)[:, None, None, None]
    x[0, 0, 0] = 0
    found = packed(x)[1]
    step = x.abs().amax(-1, keepdim=True) / 127
    # a scale that is rounded up to 8 bits of precision is larger by a 128th at most
    assert ((found - x).abs() <= 0.5 * step * (1 + 2**-7) * (1 + 1e-5)).all()
    assert not found[0, 0, 0].any()


def test_scales_are_rounded_up():
    x = torch.tensor([0.0, 1.0, 1.0 + 2**-7, 1.0 + 2**-8, 3e38, 1e-42, torch.inf])
    found = round_up(x).float()
    assert (found >= x).all() and torch.equal(found[:3], x[:3]) and found[3] == 1 + 2**-7
    nans = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF], dtype=torch.int32)
    assert round_up(nans.view(torch.float32)).isnan().all()


def test_a_block_has_its_scales_in_it():
    """A copy of a block copies them, too."""
    data, worth = packed(torch.randn(4, 2, 3, 8))
    data[1] = data[2]
    assert torch.equal(Int8Heads(data)[torch.tensor([1])], worth[2:3])


def test_a_view_gathers_what_the_bytes_stand_for():
    data, worth = packed(torch.randn(4, 2, 3, 8))
    k, _ = SequenceKVView(Int8Heads(data), Int8Heads(data), [3, 1], 5).gather()
    assert torch.equal(k, torch.cat([worth[3], worth[1]], 1)[:, :5])


# kernels ------------------------------------------------------------------------------------------


@COMPILES
@pytest.mark.parametrize(
    "block_size, window, shape",
    [(16, -1, {}), (16, 7, {}), (1, -1, {}), (3, 9, {"n_head": 6}), (64, 16, {"n_kv_head": 1}),
     (4, 0, {"head_dim": 20}), (16, -1, {"head_dim": 128, "n_kv_head": 4}),
     (5, 20, {"head_dim": 2, "n_head": 20, "n_kv_head": 1})],
)  # fmt: skip
def test_attention_reads_the_numbers_that_the_bytes_stand_for(block_size, window, shape):
    torch.manual_seed(0)
    q, *given, batch = attention_case(MIXED, block_size=block_size, **shape)
    # what no live token wrote is NaN, in its scales as well
    (k8, k), (v8, v) = map(packed, given)
    got, want = paged_attention(q, k8, v8, batch, window), dense_attention(q, k, v, batch, window)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-6)
    # torch's own attention reads masked slots as well, which in an engine are zeros at first
    clean = (packed(x.nan_to_num(0))[0] for x in given)
    plain = REFERENCE.attend(q, *clean, batch, window)
    torch.testing.assert_close(plain.double(), want, rtol=0, atol=3e-6)


@COMPILES
@pytest.mark.parametrize("window", [-1, 20])
@pytest.mark.parametrize("n_kv_head", [1, 4])
def test_the_bits_of_a_row_follow_from_that_row(n_kv_head, window):
    """Keys become floats once for many queries, or for each of few: alone, as a decode, and in
    chunks of any size it is the same."""
    q, k, v, batch = attention_case([(60, 60)], n_kv_head=n_kv_head)
    k, v = packed(k)[0], packed(v)[0]
    table = batch.block_tables[0].tolist()

    def rows(start, stop):
        batch = one_sequence(start, stop, table)
        return paged_attention(q[start:stop], k, v, batch, window)

    whole = rows(0, 60)
    for size in (1, 2, 3, 7, 16):
        parts = [rows(start, min(start + size, 60)) for start in range(0, 60, size)]
        assert torch.equal(torch.cat(parts), whole), size


def one_sequence(start: int, stop: int, table: list[int]) -> SimpleNamespace:
    """A batch of its tokens [start, stop)."""
    return SimpleNamespace(
        cu_seqlens=torch.tensor([0, stop - start], dtype=torch.int32),
        seq_lens=torch.tensor([stop], dtype=torch.int32),
        block_tables=torch.tensor([table], dtype=torch.int32),
        positions=torch.arange(start, stop, dtype=torch.int32),
        max_query_len=stop - start, max_seq_len=stop,
    )  # fmt: skip


@COMPILES
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dim, block_size", [(32, 16), (20, 3), (128, 1)])
def test_rope_store_writes_what_the_reference_writes(dim, block_size, gated):
    torch.manual_seed(0)
    rows, n_head, n_kv_head, num_blocks = 9, 4, 2, 20
    qkv, h = torch.randn(rows, (n_head + 2 * n_kv_head) * dim), torch.randn(rows, 40)
    qkv[3] *= 1e-3
    qkv.view(rows, -1, dim)[4, -1] = 0  # a head of V
    angle = torch.randn(50, dim // 2)
    ve = torch.randn(11, n_kv_head * dim) if gated else None
    ve_gate = torch.randn(n_kv_head, 12) if gated else None
    batch = SimpleNamespace(
        token_ids=torch.randint(11, (rows,), dtype=torch.int32),
        positions=torch.randint(50, (rows,), dtype=torch.int32),
        slots=torch.randperm(num_blocks * block_size)[:rows].int(),
    )
    shape = 2, num_blocks, n_kv_head, block_size, dim + 2
    ours, plain = (torch.full(shape, 77, dtype=torch.int8) for _ in range(2))
    given = qkv, h, ve, ve_gate, angle.cos(), angle.sin(), batch
    q = elementwise.rope_store(*given, *ours, n_head, 1.2, 3.0, 1e-3)
    q_plain = REFERENCE.rope_store(*given, *plain, n_head, 1.2, 3.0, 1e-3)
    torch.testing.assert_close(q, q_plain, atol=5e-6, rtol=5e-6)
    for mine, theirs in zip(ours, plain, strict=True):
        a, b = Int8Heads(mine), Int8Heads(theirs)
        # an integer or the last bit of a scale may fall to the other side of a rounding; what was
        # not written is the same, to the bit
        off = (a.values.int() - b.values.int()).abs()
        assert off.max() <= 1 and (off > 0).float().mean() < 0.01
        torch.testing.assert_close(a.scales.float(), b.scales.float(), rtol=2**-7, atol=0)
    if not gated:  # V as it was: the same bytes
        assert torch.equal(ours[1], plain[1])


@COMPILES
def test_a_nan_is_written_as_one():
    """An engine then says that no token can be drawn, as with K and V of floats."""
    qkv = torch.randn(1, 3 * 16)
    qkv[0, 20] = qkv[0, 40] = torch.nan
    batch = SimpleNamespace(positions=torch.zeros(1).int(), slots=torch.ones(1).int())
    ours, plain = torch.zeros(2, 2, 1, 1, 4, 18, dtype=torch.int8)
    angle = torch.randn(1, 8)
    for backend, cache in ((elementwise, ours), (REFERENCE, plain)):
        backend.rope_store(
            qkv, qkv, None, None, angle.cos(), angle.sin(), batch, *cache, 1, 1.0, 2.0, 1e-6
        )
        for data in cache:
            row = Int8Heads(data)[0, 0, 1]
            assert row.isnan().all()


# engines ------------------------------------------------------------------------------------------


def build(name: str = "era5", **options) -> LLM:
    """An engine over a fixture, K and V in int8."""
    fixture = Fixture(*era_fixtures()[name])
    options = {"num_blocks": 200, "device": "cpu", "kv_cache_dtype": "int8"} | options
    options.setdefault("attention", "sdpa")  # which compiles nothing
    options |= {"tokenizer_path": fixture.tokenizer} | fixture.overrides
    return LLM(fixture.directory, **options)


def words(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(256), k=length)


def tokens(outputs) -> list[list[list[int]]]:
    return [[sample["token_ids"] for sample in output["samples"]] for output in outputs]


def run(llm: LLM, prompts, params) -> list[list[list[int]]]:
    """The tokens of each sample of each request; the engine is checked after every step."""
    requests, outputs = [llm.add_request(prompt, params) for prompt in prompts], {}
    while not llm.is_finished():
        outputs |= {output["request_id"]: output for output in llm.step()}
        llm.scheduler.blocks.check(llm.scheduler.running)
    return tokens([outputs[number] for number in requests])


@HEAVY
@pytest.mark.parametrize("name", ["era5", "era1_padded", "era3"])
def test_an_engines_tokens_are_those_of_the_reference(name):
    """All layers in one call or not, against torch's attention on what SequenceKVView gathers:
    chunks, forks whose block is copied, windows that slide, texts that begin alike."""
    prompts = [words(90)[:length] for length in (90, 70, 33)] + [words(5, 1)]
    found = []
    for attention in ("numba", "sdpa"):
        sizes = {"block_size": 4, "max_batched_tokens": 50, "num_blocks": 400}
        with build(name, attention=attention, **sizes) as llm:
            assert llm.cache.data.dtype == torch.int8
            found.append(run(llm, prompts, replace(GREEDY, n=2, max_tokens=40)))
    assert found[0] == found[1]


@HEAVY
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"quantization": "int8"}], ids=str)
def test_nothing_but_the_text_decides(options):
    """Forks, copies on write, a warm prefix, preemption and windows: bit for bit, so the same
    tokens, in a pool that is too small and in one that is not."""
    prompts = [words(150)[:length] for length in (150, 149, 130)] + [words(9, 2)]
    params = SamplingParams(temperature=1, max_tokens=24, ignore_eos=True, seed=3, n=3)
    options = options | {
        "deterministic": True,
        "attention": "numba",
        "block_size": 4,
        "max_batched_tokens": 40,
    }
    with build(num_blocks=400, **options) as llm:
        wanted = [run(llm, [prompt], params)[0] for prompt in prompts]
        assert run(llm, prompts, params) == wanted and llm.stats()["cached_tokens"]
        assert llm.scheduler.blocks.width > 1, "windows, in groups of layers"
        llm.sleep()
        assert llm.stats()["cache_bytes"] == 0
        assert run(llm, prompts, params) == wanted and llm.cache.data.dtype == torch.int8
    with build(num_blocks=68, **options) as llm:
        assert run(llm, prompts, params) == wanted and llm.stats()["preemptions"]


def test_a_step_that_fails_is_done_again(monkeypatch):
    params = replace(GREEDY, n=2)
    with build() as llm:
        wanted = run(llm, [words(30)], params)
        llm.reset_prefix_cache()
        calls, forward = itertools.count(), llm.runner.forward

        def failing(*args):
            h = forward(*args)  # K and V are written
            if next(calls) == 4:
                raise MemoryError("once")
            return h

        monkeypatch.setattr(llm.runner, "forward", failing)
        request, outputs = llm.add_request(words(30), params), []
        while not llm.is_finished():
            with suppress(MemoryError):
                outputs += llm.step()
        assert next(calls) > 5 and request == outputs[0]["request_id"]
        assert tokens(outputs) == wanted


def test_a_trace_of_it_replays():
    with build(block_size=4) as llm:
        with llm.tracing() as trace:
            run(llm, [words(30), words(33)], replace(GREEDY, n=2))
        replay = Replay(trace.events)
        assert {"fork", "copy"} <= {event["e"] for event in trace.events}
        blocks = llm.scheduler.blocks
        assert [replay.ref_count[i] for i in range(blocks.pool.num_blocks)] == blocks.pool.ref_count
        assert list(replay.cached) == list(blocks.pool.cached)


# what it takes ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_perplexity_stays_within_a_thousandth():
    plain = {"attention": "sdpa"}
    change = perplexity(kv_cache_dtype="int8", **plain) / perplexity(**plain) - 1
    assert 0 < abs(change) < 1e-3, change


def test_the_memory_is_counted_with_its_scales():
    sizes = {}
    for kind in ({}, {"dtype": "bfloat16"}, {"kv_cache_dtype": "int8"}):
        with LLM(MODEL, device="cpu", num_blocks=40, attention="sdpa", **kind) as llm:
            sizes[str(kind)] = llm.stats()["cache_bytes"]
            config = llm.model.config
            assert llm.stats()["cache_bytes"] == llm.cache.data.nbytes
            held = llm.cache.num_blocks * llm.cache.block_size * len(llm.cache.data)
            bits = llm.cache.data.itemsize * config.head_dim + 2 * ("kv_cache_dtype" in kind)
            assert llm.cache.data.nbytes == 2 * held * config.n_kv_head * bits
    exact, half, small = sizes.values()
    # heads of 64: 66 bytes where there were 128 and 256
    assert half * 2 == exact and small * 128 == half * 66


def test_as_much_memory_holds_more_blocks(monkeypatch):
    found = []
    for kind in ("auto", "int8"):
        monkeypatch.setattr("microvllm.engine.free_memory", lambda device: 2**25)
        with LLM(MODEL, device="cpu", kv_cache_dtype=kind, attention="sdpa") as llm:
            found.append(llm.stats()["num_blocks"])
            assert llm.cache.data.nbytes <= 2**24
    assert 3.8 < found[1] / found[0] < 3.95  # 256 / 66, rounded down to whole blocks


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="kv_cache_dtype must be 'auto' or 'int8', got 'int4'"):
        LLM(MODEL, device="cpu", kv_cache_dtype="int4")
    with pytest.raises(ValueError, match="'int8' is for a CPU, .* not for 'sdpa' on cuda:0"):
        pick_backend("sdpa", torch.device("cuda", 0), torch.bfloat16, kv_cache_dtype="int8")
    with pytest.raises(ValueError, match="plain=True .* has no kv_cache_dtype"):
        LLM(MODEL, device="cpu", kv_cache_dtype="int8", plain=True)


def test_the_layout_is_that_of_wider_heads():
    config = GPTConfig(64, 100, 3, 6, 2, 96)
    wider, dtype = REFERENCE.kv_layout(config, torch.float32)
    assert (wider.head_dim, wider.n_kv_head, wider.n_layer) == (18, 2, 3) and dtype == torch.int8
