"""Paged attention on the CPU against dense attention written out, on random mixed batches.

Every slot of the cache that belongs to no live token is NaN, so that whatever reads it shows.
"""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.batches import hand_made_batch
from helpers.cpu_kernels import MIXED, attention_case, check_attention, dense_attention
from helpers.goldens import MODEL

from microvllm.attention import sdpa_attention
from microvllm.cpu import elementwise
from microvllm.cpu.attention import attend_rows, paged_attention
from microvllm.cpu.gemm import quantize_rows, rotate
from microvllm.cpu.simd import AMX
from microvllm.fused.backend import Backend
from microvllm.loading import load_model

HALF = pytest.param(torch.bfloat16, marks=pytest.mark.slow)  # a kernel of its own is compiled
REFERENCE = Backend(torch.device("cpu"), torch.float32)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    "block_size, window",
    [(1, -1), (1, 3), (3, 16), (3, 0), (4, 10_000), (4, -1), (16, 3), (16, 0), (64, 16), (64, -1)],
)
def test_mixed_batch_of_decodes_and_chunks(block_size, window):
    check_attention(MIXED, window, block_size=block_size)


@pytest.mark.parametrize("n_head, n_kv_head", [(1, 1), (3, 3), (4, 2), (4, 1), (6, 2), (20, 1)])
@pytest.mark.parametrize("window", [-1, 7])
def test_query_heads_share_kv_heads(n_head, n_kv_head, window):
    check_attention(MIXED, window, n_head=n_head, n_kv_head=n_kv_head)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128])
def test_head_dims(head_dim):
    check_attention(MIXED, -1, head_dim=head_dim)


@pytest.mark.parametrize("work", [[(1, 1)], [(1, 300)], [(1, 5), (1, 9)], [(23, 23)] * 3])
def test_small_batches(work):
    check_attention(work, -1)


@pytest.mark.parametrize("window", [-1, 50, 700])
def test_long_chunks(window):
    """More queries than are done together, and more keys than scores are kept of."""
    check_attention([(1, 30), (1, 1100), (250, 250), (230, 1300)], window)


@pytest.mark.parametrize("n_head, n_kv_head, block_size", [(4, 4, 16), (3, 1, 6), (12, 2, 16)])
@pytest.mark.parametrize("window", [-1, 9, 600])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_the_bits_of_a_row_follow_from_that_row(n_head, n_kv_head, block_size, window, dtype):
    """Alone, which reads K and V where they are, or among few or many others, which copy them."""
    q, k, v, batch = attention_case([(1100, 1100)], n_head, n_kv_head, block_size=block_size)
    k, v = k.to(dtype), v.to(dtype)
    whole, table = paged_attention(q, k, v, batch, window), batch.block_tables[0].tolist()
    for start in (0, 509, 1070):
        for size in (1, 2, 3, 5, 30):
            rows = slice(start, start + size)
            part = hand_made_batch([([0] * 1100, start, start + size, table)], block_size)
            got = paged_attention(q[rows].contiguous(), k, v, part, window)
            assert torch.equal(got, whole[rows]), (start, size)


def test_a_prompt_in_chunks_is_the_prompt_at_once():
    """Each row gets the same answer wherever the borders of the chunks fall."""
    q, k, v, whole = attention_case([(60, 60)])
    table = whole.block_tables[0].tolist()
    want = paged_attention(q, k, v, whole, 20)
    for size in (1, 7, 16, 59):
        for start in range(0, 60, size):
            stop = min(60, start + size)
            chunk = hand_made_batch([([0] * 60, start, stop, table)], 16)
            got = paged_attention(q[start:stop], k, v, chunk, 20)
            torch.testing.assert_close(got, want[start:stop], rtol=0, atol=1e-6)


def test_extra_columns_of_the_table_and_larger_bounds_change_nothing():
    """As in buffers of a fixed size, made for a larger batch."""
    q, k, v, batch = attention_case(MIXED)
    want = paged_attention(q, k, v, batch, -1)
    batch.block_tables = torch.nn.functional.pad(batch.block_tables, (0, 5))
    batch.max_seq_len, batch.max_query_len = 500, 100
    assert torch.equal(paged_attention(q, k, v, batch, -1), want)


def test_agrees_with_the_sdpa_reference():
    """The reference multiplies what it masks by zero, so here the unused slots are zero."""
    q, k, v, batch = attention_case(MIXED)
    k, v = k.nan_to_num(), v.nan_to_num()
    for window in (-1, 9):
        want = sdpa_attention(q, k, v, batch, window)
        got = paged_attention(q, k, v, batch, window)
        torch.testing.assert_close(got, want, rtol=0, atol=3e-6)


def test_large_scores_do_not_overflow():
    """One key wins by hundreds of units: its value comes out, the losers weigh next to nothing."""
    q, k, v, batch = attention_case([(1, 40), (6, 20)])
    q, k = q * 30, k * 30
    torch.testing.assert_close(
        paged_attention(q, k, v, batch, -1).double(),
        dense_attention(q, k, v, batch, -1),
        rtol=0,
        atol=1e-3,
    )


def test_a_nan_shows_in_its_own_sequence_only():
    q, k, v, batch = attention_case([(1, 20), (1, 20), (4, 9)])
    q[1] = torch.nan  # a broken row must not turn into a plausible answer
    block = batch.block_tables[2, 0]
    k[block, :, 0] = torch.nan
    out = paged_attention(q, k, v, batch, -1)
    assert not out[0].isnan().any() and out[1:].isnan().all()


def test_rows_of_a_wider_tensor():
    """q may be a slice of the fused projection; that is not worth a second compilation."""
    q, k, v, batch = attention_case(MIXED)
    wide = torch.cat((q, torch.randn(len(q), 4, q.shape[2])), dim=1)
    want = paged_attention(q, k, v, batch, -1)
    compiled = len(attend_rows.signatures)
    assert torch.equal(paged_attention(wide[:, : q.shape[1]], k, v, batch, -1), want)
    assert len(attend_rows.signatures) == compiled


@pytest.mark.slow
def test_a_second_process_compiles_nothing_and_starts_no_threads_of_numba():
    """And two Python threads may call at once."""
    check_attention([(1, 5)], -1)  # now the kernel is on disk
    script = """
import threading, numba, torch
torch.set_num_threads(1)
from microvllm.cpu.attention import attend_rows
assert torch.get_num_threads() == 1
torch.set_num_threads(2)
from helpers.cpu_kernels import check_attention
def call():
    for _ in range(20):
        check_attention([(1, 5)], -1)
callers = [threading.Thread(target=call) for _ in "ab"]
[t.start() for t in callers], [t.join() for t in callers]
stats = attend_rows.stats
assert sum(stats.cache_hits.values()) == 1 and not stats.cache_misses, stats
try:
    numba.threading_layer()
except ValueError:  # it is not initialised
    pass
else:
    raise AssertionError("numba has started a pool of threads")
"""
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join([os.path.dirname(here), os.environ["PYTHONPATH"]])
    env = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# the fused steps of a layer -----------------------------------------------------------------------

ROWS = pytest.mark.parametrize("rows", [1, 7, 8, 65])  # alone, and split between threads


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """New memory is NaN, so that what a kernel forgets to write is seen."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a: empty(*a).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **kw: empty_like(*a, **kw).fill_(torch.nan))


@pytest.mark.slow
@pytest.mark.parametrize("window", [-1, 20])
def test_a_bfloat16_cache_is_read_as_the_float32_it_stands_for(window):
    """To float32's rounding, as the others: not to the bit, since this is a kernel of its own, and
    which sums the compiler reorders is its affair. Heads of 20 make no whole tiles."""
    check_attention(MIXED, window, torch.bfloat16, n_head=6, n_kv_head=2, head_dim=20)


@pytest.mark.slow
@pytest.mark.parametrize(
    "work, shape",
    [(MIXED, {"block_size": 3, "n_head": 6}), (MIXED, {"n_head": 20, "n_kv_head": 1}),
     (MIXED, {"head_dim": 128}), ([(1, 30), (1, 1100), (250, 250), (230, 1300)], {})],
)  # fmt: skip
@pytest.mark.parametrize("window", [-1, 0, 20, 700])
def test_tiles_of_a_bfloat16_cache(work, shape, window):
    check_attention(work, window, torch.bfloat16, tiles=AMX, **shape)


def test_rope_store_rounds_to_a_bfloat16_cache_as_torch_does():
    qkv, cos, sin = torch.randn(9, 8 * 32), torch.randn(50, 16), torch.randn(50, 16)
    batch = SimpleNamespace(positions=torch.arange(9).int(), slots=torch.arange(16, 25).int())
    caches = torch.zeros(2, 4, 2, 16, 32)
    small = caches.bfloat16()
    for k, v in (caches, small):
        elementwise.rope_store(qkv, qkv, None, None, cos, sin, batch, k, v, 4, 1.2, 3.0, 1e-3)
    assert torch.equal(small[1], caches[1].bfloat16())  # v: nothing was computed
    # k: rounded to the nearest, but for the last bit of what was rounded, which may differ
    torch.testing.assert_close(small[0].float(), caches[0], rtol=1.001 * 2**-8, atol=0)


def quantized(x):
    """x (T, C), rotated, as uint8 in steps of a 127th of its row's largest number, plus 128."""
    x = rotate(x)
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (x / scale).round().add(128).to(torch.uint8), scale


@pytest.mark.usefixtures("two_threads")
@ROWS
@pytest.mark.parametrize("channels", [33, 64, 80, 256, 768])
def test_quantize_rows_is_the_reference(rows, channels):
    x = torch.randn(rows, channels) * torch.logspace(-3, 3, rows)[:, None]
    x[-1] = 0
    ours, scale = quantize_rows(x, 127)
    reference, scale_ref = quantized(x)
    torch.testing.assert_close(scale, scale_ref, rtol=1e-6, atol=0)
    # each is the nearest integer; float32's rounding decides where two are equally near
    exact = rotate(x.double()) / scale.double()
    for found in (ours, reference):
        assert (found.double() - 128 - exact).abs().max() <= 0.5 + 1e-4
    # they say what x was, up to half a step of the rotated one
    error = (ours.float() - 128) * scale - rotate(x)
    assert (error.abs() <= 0.5001 * scale).all()


@pytest.mark.usefixtures("two_threads")
@ROWS
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("mixes", [False, True])
def test_add_norm_is_the_reference(rows, adds, mixes, poisoned_outputs):
    x, y, x0 = torch.randn(3, rows, 136)
    given = x.clone()
    a, b = (torch.tensor(z) if mixes else None for z in (0.7, -0.4))
    rest = y if adds else None, x0, a, b, 1e-3
    for ours, reference in zip(
        elementwise.add_norm(x, *rest), REFERENCE.add_norm(x, *rest), strict=True
    ):
        torch.testing.assert_close(ours, reference, atol=2e-6, rtol=2e-6)
    assert torch.equal(x, given)  # x0 of the next layers may be this very tensor


@pytest.mark.usefixtures("two_threads")
@ROWS
@pytest.mark.parametrize(
    "n_head, n_kv_head, dim, block_size, channels",
    [(3, 3, 32, 4, 12), (8, 1, 16, 1, 0), (4, 2, 128, 16, 32), (6, 3, 20, 64, 12)],
)
def test_rope_store_is_the_reference(
    rows, n_head, n_kv_head, dim, block_size, channels, poisoned_outputs
):
    num_blocks, vocab, positions = 70, 11, 50
    qkv, h = torch.randn(rows, (n_head + 2 * n_kv_head) * dim), torch.randn(rows, 40)
    ve = torch.randn(vocab, n_kv_head * dim) if channels else None
    ve_gate = torch.randn(n_kv_head, channels) if channels else None
    angle = torch.randn(positions, dim // 2)
    batch = SimpleNamespace(
        token_ids=torch.randint(vocab, (rows,), dtype=torch.int32),
        positions=torch.randint(positions, (rows,), dtype=torch.int32),
        slots=torch.randperm(num_blocks * block_size)[:rows].int(),
    )
    k, v = torch.randn(2, num_blocks, n_kv_head, block_size, dim)
    k_ref, v_ref = k.clone(), v.clone()
    given = qkv, h, ve, ve_gate, angle.cos(), angle.sin(), batch
    rest = n_head, 1.2, 3.0, 1e-3
    q = elementwise.rope_store(*given, k, v, *rest)
    q_ref = REFERENCE.rope_store(*given, k_ref, v_ref, *rest)
    # the whole caches: nothing else was touched
    for ours, reference in ((q, q_ref), (k, k_ref), (v, v_ref)):
        torch.testing.assert_close(ours, reference, atol=5e-6, rtol=5e-6)


def test_the_fused_steps_come_with_the_attention():
    ours = load_model(MODEL).backend
    assert ours.attend is paged_attention
    assert (ours.add_norm, ours.rope_store) == (elementwise.add_norm, elementwise.rope_store)
    assert type(load_model(MODEL, attention="sdpa").backend) is Backend  # all of the reference
