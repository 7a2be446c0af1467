"""The Triton kernels against the plain torch functions they replace.

Without a GPU they run in Triton's interpreter, on small shapes. Outputs start as NaN, so an element
that a kernel forgets is seen; so do the slots of the cache that belong to no sequence.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.gpu_kernels import CAPABILITY, CUDA, DEVICE, attention_case, chunk_of, ints, randn
from torch.nn.attention import SDPBackend, sdpa_kernel

triton = pytest.importorskip("triton", reason="the GPU kernels need triton (pip install triton)")

from microvllm.attention import sdpa_attention  # noqa: E402
from microvllm.fused.backend import Backend, filter_values  # noqa: E402
from microvllm.gpu import attention, backend, elementwise, launch, sampler  # noqa: E402
from microvllm.gpu.attention import paged_attention  # noqa: E402
from microvllm.gpu.elementwise import linear_add, norm_linear  # noqa: E402
from microvllm.gpu.sampler import sample  # noqa: E402
from microvllm.sampler import SamplingParams, cap_logits, drop_tokens  # noqa: E402

PLAIN = Backend(torch.device("cpu"), torch.float32)  # the functions that kernels replace
EPS = 2.0**-23
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative to the norm
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    print("torch.manual_seed", torch.seed())  # other numbers each time; pytest shows it on failure
    empty, empty_like = torch.empty, torch.empty_like

    def poison(t):
        return t.fill_(torch.nan if t.is_floating_point() else -(2**31))

    monkeypatch.setattr(torch, "empty", lambda *a, **kw: poison(empty(*a, **kw)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **kw: poison(empty_like(*a, **kw)))


def assert_close(out, reference, dtype):
    """reference: float32, computed from the same rounded inputs."""
    assert out.shape == reference.shape
    assert not out.isnan().any()
    error = (out.float() - reference).norm() / reference.norm()
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


# the fused steps ---------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("y, lambdas", [(False, False), (True, False), (False, True), (True, True)])
def test_add_norm(dtype, y, lambdas):
    x, x0 = randn(5, 136, dtype=dtype), randn(5, 136, dtype=dtype)
    y = randn(5, 136, dtype=dtype) if y else None
    a, b = (torch.tensor(z, device=DEVICE) if lambdas else None for z in (0.7, -0.4))
    x_new, h = elementwise.add_norm(x, y, x0, a, b, EPS)
    assert x_new.dtype == h.dtype == dtype
    x_ref, h_ref = PLAIN.add_norm(
        x.float(), None if y is None else y.float(), x0.float(), a, b, EPS
    )
    assert_close(x_new, x_ref, dtype)
    assert_close(h, h_ref, dtype)


@DTYPES
def test_relu2(dtype):
    x = randn(3, 1000, dtype=dtype)
    reference = PLAIN.relu2(x.float())
    assert_close(elementwise.relu2(x), reference, dtype)


# N: what is left over by 2 and by 4 at a time; a program of the interpreter takes its time
@DTYPES
@pytest.mark.parametrize("rows, K, N", [(1, 136, 10), (3, 600, 9), (8, 64, 7), (2, 4200, 5)])
@pytest.mark.parametrize(
    "lambdas, outputs", [(False, 4), pytest.param(True, 1, marks=pytest.mark.slow)]
)
def test_products_of_a_few_rows(dtype, rows, K, N, lambdas, outputs):
    """norm_linear and linear_add are add_norm, F.linear and relu2 in one."""
    a, b = (torch.tensor(z, device=DEVICE) if lambdas else None for z in (0.7, -0.4))
    x, w, x0 = randn(rows, K, dtype=dtype), randn(N, K, dtype=dtype), randn(rows, K, dtype=dtype)
    for relu2 in (False, True):
        y, h = norm_linear(x, w, EPS, x0, a, b, relu2, outputs)
        summed = x.float() if a is None else a * x.float() + b * x0.float()
        # the interpreter cuts bfloat16 off instead of rounding, and a square doubles what it loses
        if dtype == torch.bfloat16 and not CUDA:
            summed = (summed.view(torch.int32) & -65536).view(torch.float32)
        h_ref = F.rms_norm(summed.to(dtype).float(), (K,), eps=EPS)
        # in float64: torch's float32 errs more than the kernel, and relu may leave few numbers
        y_ref = F.linear(h_ref.double(), w.double()).float()
        assert y.dtype == h.dtype == dtype
        assert_close(h, h_ref[:, :32], dtype)
        assert_close(*((y.float().sqrt(), y_ref.relu()) if relu2 else (y, y_ref)), dtype)
    stream, x0 = randn(rows, N, dtype=dtype), randn(rows, N, dtype=dtype)
    out = linear_add(x, w, stream, x0, a, b, outputs)
    old = stream.float() if a is None else a * stream.float() + b * x0.float()
    assert_close(out, old + F.linear(x.double(), w.double()).float(), dtype)


FLOAT8 = pytest.mark.skipif(CAPABILITY < (8, 9), reason="float8 came with capability 8.9")


@FLOAT8
@pytest.mark.parametrize("rows, K, N", [(1, 136, 10), (3, 600, 9), (1, 1100, 5)])
def test_products_of_a_few_rows_with_weights_in_float8(rows, K, N):
    """Of the largest and the smallest numbers, too: they are multiplied as float32."""
    x, stream = randn(rows, K), randn(rows, N)
    weights, scales = backend.fp8_rows(randn(N, K) * torch.logspace(-5, 5, N)[:, None].to(DEVICE))
    y, h = norm_linear(x, weights, EPS, scales=scales)
    normed = F.rms_norm(x, (K,), eps=EPS)
    assert_close(y / scales.T, normed @ weights.float().T, x.dtype)  # all are of one size
    assert_close(h, normed[:, :32], x.dtype)
    out = linear_add(x, weights, stream * scales.T, scales=scales, outputs=1)
    assert_close(out / scales.T, stream + x @ weights.float().T, x.dtype)


@FLOAT8
@DTYPES
@pytest.mark.parametrize("channels", [80, 1000])
def test_fp8_rows(dtype, channels):
    x = randn(5, channels, dtype=dtype)
    x[1], x[2, 3] = 0.0, 300.0  # a row of nothing, and one number far larger than the others
    expected, worth = backend.fp8_rows(x.cpu())
    out, scales = elementwise.fp8_rows(x)
    assert out.dtype == torch.float8_e4m3fn and scales.shape == (5, 1)
    torch.testing.assert_close(scales.cpu(), worth, rtol=1e-6, atol=0)
    if CUDA:  # a division of its own, which may fall on the other side of a border
        assert_close(out.float(), expected.to(DEVICE).float(), torch.bfloat16)
        return
    # the interpreter's own cast to float8 errs at ties and where a power of two is reached
    assert not out.float().isnan().any()
    assert (out.float() != expected.float()).float().mean() < 0.2
    exact = torch.empty(x.shape)
    elementwise._fp8_rows[(5,)](x, exact, scales, channels, 1024, PDL=False)
    assert torch.equal(exact.to(torch.float8_e4m3fn).float(), expected.float())


def test_products_in_float8_take_it_where_it_runs(monkeypatch):
    monkeypatch.setattr(elementwise, "fp8_rows", lambda x: "fused")
    for there in (True, False):
        monkeypatch.setattr(backend, "has_triton", lambda device, there=there: there)
        made = backend.GpuBackend(DEVICE, torch.float32)
        assert (made.fp8_rows(torch.ones(1, 8)) == "fused") == there


@DTYPES
@pytest.mark.parametrize(
    "n_head, n_kv, dim, block_size, channels",
    [(3, 3, 32, 4, 12), (8, 1, 16, 1, 0), (4, 2, 128, 16, 32), (6, 3, 20, 64, 12)],
)
def test_rope_store(dtype, n_head, n_kv, dim, block_size, channels):
    T, num_blocks, vocab, max_positions = 6, 8, 11, 50
    qkv = randn(T, (n_head + 2 * n_kv) * dim, dtype=dtype)
    h = randn(T, 40, dtype=dtype)
    ve = randn(vocab, n_kv * dim, dtype=dtype) if channels else None
    ve_gate = randn(n_kv, channels, dtype=dtype) if channels else None
    angle = randn(max_positions, dim // 2)
    batch = SimpleNamespace(
        token_ids=ints(torch.randint(vocab, (T,)).tolist()),
        positions=ints(torch.randint(max_positions, (T,)).tolist()),
        slots=ints(torch.randperm(num_blocks * block_size)[:T].tolist()),
    )
    layer = randn(2, num_blocks, n_kv, block_size, dim, dtype=dtype)
    k, v = layer[0], layer[1]
    k_ref, v_ref = k.float(), v.float()
    rest = (n_head, 1.2, 3.0, EPS)
    q = elementwise.rope_store(qkv, h, ve, ve_gate, angle.cos(), angle.sin(), batch, k, v, *rest)
    floats = [None if t is None else t.float() for t in (qkv, h, ve, ve_gate)]
    q_ref = PLAIN.rope_store(*floats, angle.cos(), angle.sin(), batch, k_ref, v_ref, *rest)
    assert q.dtype == dtype
    assert_close(q, q_ref, dtype)
    assert_close(k, k_ref, dtype)  # the whole caches: nothing else was touched
    assert_close(v, v_ref, dtype)


# attention ---------------------------------------------------------------------------------------


def check_attention(case, window, dtype, **kw):
    q, (k, v), (k_used, v_used), batch = case
    out = paged_attention(q, k_used, v_used, batch, window, **kw)
    assert out.dtype == dtype
    with sdpa_kernel(SDPBackend.MATH):  # a card's other ways may compute float32 in fewer bits
        reference = sdpa_attention(q.float(), k.float(), v.float(), batch, window)
    assert_close(out, reference, dtype)
    return out


MIXED = [(1, 1), (1, 17), (1, 70), (2, 2), (40, 40), (5, 33), (17, 80)]


@pytest.mark.parametrize("window", [-1, 0, 7, 30])
@pytest.mark.parametrize("block_size", [1, 4, 16, 64])
def test_attention_of_a_mixed_batch(block_size, window):
    case = attention_case(MIXED, 2, 2, 16, block_size, torch.float32)
    check_attention(case, window, torch.float32)


@DTYPES
@pytest.mark.parametrize(
    "n_head, n_kv, dim", [(2, 1, 128), (3, 1, 32), (8, 1, 16), (6, 2, 20), (1, 1, 64)]
)
def test_attention_with_shared_kv_heads(dtype, n_head, n_kv, dim):
    if dtype == torch.bfloat16 and not CUDA:
        pytest.skip("the interpreter's matrix product takes bfloat16 for integers")
    case = attention_case(MIXED[1:5], n_head, n_kv, dim, 8, dtype)
    check_attention(case, 20, dtype)


@pytest.mark.parametrize(
    "group, dim, block_size, window",
    [(1, 64, 1, -1), (2, 96, 2, 0), (3, 128, 4, 5), (4, 192, 8, 21), (5, 256, 16, -1)]
    + [(6, 64, 32, 5), (7, 128, 64, 21), (8, 256, 128, 9), (1, 256, 256, 21)],
)
def test_every_group_head_dimension_and_block_size(group, dim, block_size, window):
    case = attention_case([(1, 37), (1, 3), (3, 35)], 2 * group, 2, dim, block_size, torch.float32)
    for num_splits in (1, 3):
        check_attention(case, window, torch.float32, num_splits=num_splits)


@pytest.mark.parametrize(
    "group, dtype", [(1, torch.float32), (1, torch.bfloat16), (4, torch.float16)]
)
@pytest.mark.parametrize("num_splits", [1, 2, 5, 8])
def test_a_context_split_across_programs(num_splits, group, dtype):
    case = attention_case([(1, 200), (1, 3), (1, 64)], group, 1, 32, 4, dtype)
    for window in (-1, 10):
        check_attention(case, window, dtype, num_splits=num_splits)


@pytest.mark.parametrize("dim", [32, 256])
def test_chunks_long_enough_for_the_large_tiles(dim):
    sequences = [(1, 20), (150, 150), (70, 200), (2, 40)]
    for n_head in (1, 3):
        check_attention(
            attention_case(sequences, n_head, 1, dim, 16, torch.float16), 90, torch.float16
        )


def test_few_sequences_are_split_and_many_are_not(monkeypatch):
    """Seen by the programs that are launched; the count follows from host numbers alone."""
    seen = []
    decode = attention._decode

    class Spy:
        def __getitem__(self, grid):
            seen.append(grid[2])
            return decode[grid]

    monkeypatch.setattr(attention, "_decode", Spy())
    monkeypatch.setattr(launch, "card", lambda device: (8, 2**16, {"PDL": False}))
    check_attention(attention_case([(1, 300)], 1, 1, 16, 16, torch.float32), -1, torch.float32)
    check_attention(attention_case([(1, 9)] * 40, 1, 1, 16, 16, torch.float32), -1, torch.float32)
    assert 1 < seen[0] <= 5 and seen[1:] == [1]


def test_what_the_splits_count_with_is_there_for_the_next_launch():
    q, _, (k, v), batch = attention_case([(1, 200), (1, 3), (1, 64)], 2, 1, 32, 4, torch.float32)
    whole, counts = paged_attention(q, k, v, batch, -1, num_splits=1), ints([0] * 3)
    for num_splits in (3, 11):
        out = paged_attention(q, k, v, batch, -1, num_splits=num_splits, counts=counts)
        assert_close(out, whole, torch.float32)
        assert not counts.any()
    with pytest.raises(AssertionError):
        paged_attention(q, k, v, batch, -1, num_splits=2, counts=counts[:2])


def test_with_fixed_splits_a_row_does_not_depend_on_its_batch():
    q, _, (k, v), batch = attention_case(MIXED, 2, 2, 16, 4, torch.float32)
    together = paged_attention(q, k, v, batch, 20, num_splits=2)
    for b in range(len(MIXED)):
        rows = slice(batch.cu_seqlens[b], batch.cu_seqlens[b + 1])
        alone = chunk_of(batch, b, 0, MIXED[b][0])
        out = paged_attention(q[rows], k, v, alone, 20, num_splits=2)
        assert torch.equal(out, together[rows])


@pytest.mark.parametrize("border", [32, 27])
def test_with_fixed_splits_a_chunk_border_changes_nothing(border):
    q, _, (k, v), batch = attention_case([(40, 70)], 2, 2, 16, 4, torch.float32)
    whole = paged_attention(q, k, v, batch, 20, num_splits=2)
    for start, stop in ((0, border), (border, 40)):
        chunk = chunk_of(batch, 0, start, stop)
        out = paged_attention(q[start:stop], k, v, chunk, 20, num_splits=2)
        if border == 32 or CUDA:  # a row's place in its tile is the same, or does not matter
            assert torch.equal(out, whole[start:stop])
        else:  # in numpy's matrix product it does
            torch.testing.assert_close(out, whole[start:stop], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"num_splits": 1}, {"num_splits": 3}, {"fixed": True}], ids=str
)
def test_padding_rows_of_a_graph_are_harmless(options):
    """Rows of length 1 in the null block, and of length 0, between real ones. A row without keys
    would give a NaN, which a later layer writes to the null block, and tiles read it."""
    q, _, (k, v), batch = attention_case([(1, 30), (1, 30)], 2, 2, 16, 4, torch.float32)
    alone = paged_attention(q, k, v, batch, -1, num_splits=3)
    k[0] = v[0] = 0.0  # the engine zeroes the cache
    padded = SimpleNamespace(
        seq_lens=ints([30, 1, 0, 30]), cu_seqlens=ints(range(5)),
        block_tables=batch.block_tables[[0, 0, 0, 1]].clone(), num_decodes=4, max_query_len=1,
        max_seq_len=4096,  # a graph knows nothing better than max_model_len
    )  # fmt: skip
    padded.block_tables[1:3] = 0
    out = paged_attention(q[[0, 0, 1, 1]], k, v, padded, -1, **options)
    assert not out.isnan().any() and not out[2].any()
    torch.testing.assert_close(out[[0, 3]], alone)


@pytest.mark.parametrize(
    "sequences, tiles",
    [([(23, 23)] * 9, (32, 32)), ([(400, 400)] + [(3, 3)] * 40, (32, 32))]
    + [([(23, 23)] * 300 + [(2048, 2048)], (128, 64)), ([(60, 60)] * 9, (128, 64))],
)
def test_the_tiles_of_chunks_fit_what_most_of_their_scores_are_in(sequences, tiles, monkeypatch):
    seen = []

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **kw: seen.append(args[-2:])

    monkeypatch.setattr(attention, "_chunk", Spy())
    monkeypatch.setattr(launch, "card", lambda device: (132, 232448, {"PDL": False}))
    rows = [r for r, _ in sequences]
    batch = SimpleNamespace(
        block_tables=ints([[0]] * len(rows)), seq_lens=ints(rows), cu_seqlens=None, num_decodes=0,
        max_query_len=max(rows),
    )  # fmt: skip
    k = randn(2, 1, 16, 128, dtype=torch.bfloat16)
    paged_attention(randn(sum(rows), 1, 128, dtype=torch.bfloat16), k, k, batch, -1)
    assert seen == [tiles]


def test_more_chunks_than_a_program_looks_at_in_one_go(monkeypatch):
    if not CUDA:
        monkeypatch.setattr(attention, "SEARCHED", triton.language.constexpr(4))
    lengths = [(1, 7), (40, 40), (2, 3), (33, 50), (5, 5), (2, 2), (3, 9), (70, 70), (2, 80)]
    check_attention(attention_case(lengths, 1, 1, 16, 16, torch.float32), -1, torch.float32)


# sampling ----------------------------------------------------------------------------------------


def check_samples(logits, temperature, u, softcap, tokens):
    """Against float64: the token's own slice of the distribution holds u, up to rounding."""
    assert tokens.dtype == torch.int32
    x = logits.double()
    masked = x == -torch.inf
    x = softcap * torch.tanh(x / softcap) if softcap else x
    x[masked] = -torch.inf
    for row, token in enumerate(tokens.tolist()):
        assert 0 <= token < logits.shape[1]
        if temperature[row] == 0:
            assert token == int(logits[row].float().argmax())
            continue
        p = torch.softmax(x[row] / temperature[row].double(), 0)
        assert p[token] > 0
        end = p[: token + 1].sum()
        assert end - p[token] - 1e-5 <= u[row] <= end + 1e-5


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("vocab", [50, 2048, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sample(dtype, vocab, softcap):
    R = 12
    logits = (4 * torch.randn(R, vocab)).to(DEVICE, dtype)
    u = torch.rand(R, device=DEVICE)
    temperature = torch.rand(R, device=DEVICE) + 0.05
    temperature[::3] = 0.0  # greedy rows among sampled ones
    u[1], u[2] = 0.0, 1.0 - 2.0**-24  # both ends of the distribution
    check_samples(logits, temperature, u, softcap, sample(logits, temperature, u, softcap))


def test_sampled_tokens_follow_the_distribution():
    """With evenly spaced uniform numbers, a token is drawn as often as its probability says."""
    n = 60
    logits = torch.randn(1, 6, device=DEVICE)
    u = (torch.arange(n, device=DEVICE) + 0.5) / n
    tokens = sample(logits.expand(n, 6), torch.full_like(u, 0.8), u, 0.0)
    share = torch.bincount(tokens.long(), minlength=6) / n
    assert (share - torch.softmax(logits[0] / 0.8, 0)).abs().max() < 1.5 / n


def test_greedy_takes_the_lowest_of_equals():
    logits = torch.zeros(3, 4500, device=DEVICE)
    logits[0, [7, 2047, 4400]] = 1.0
    logits[1, [2048, 4499]] = 1e-6
    zero = torch.zeros(3, device=DEVICE)
    assert sample(logits, zero, zero, 15.0).tolist() == [7, 2048, 0]


@pytest.mark.parametrize("softcap", [0.0, 15.0])
def test_masked_and_impossible_tokens_are_never_drawn(softcap):
    """-inf everywhere but two ids, and a temperature so low that all but one id underflow."""
    V = 6000
    logits = torch.full((6, V), -torch.inf, device=DEVICE)
    logits[:, 3000], logits[:, 3001] = 1.0, 1.0
    logits[3:] = torch.randn(3, V, device=DEVICE)
    logits[3:, 4100] = 9.0
    u = torch.tensor([0.0, 0.25, 1.0 - 2.0**-24] * 2, device=DEVICE)
    temperature = torch.tensor([1.0] * 3 + [1e-4] * 3, device=DEVICE)
    tokens = sample(logits, temperature, u, softcap).tolist()
    assert tokens == [3000, 3000, 3001, 4100, 4100, 4100]


@pytest.mark.parametrize("vocab, dtype, tile", [
    (50, torch.float32, 16),  # some searches are among the 16 largest, others not
    (50, torch.bfloat16, 64), (5000, torch.float32, 4096),
])  # fmt: skip
@pytest.mark.slow
def test_sample_with_filters(dtype, vocab, tile, monkeypatch):
    """What top_k, top_p and min_p leave is what the reference leaves, ties and all; mixed with
    greedy rows and rows without any."""
    if not CUDA:
        monkeypatch.setattr(sampler, "SAMPLE_TILE", tile)
        monkeypatch.setattr(sampler, "SAMPLE_CHUNK", min(tile, 2048))
    given = [
        {"top_k": 1}, {"top_k": 5}, {"top_k": vocab}, {"top_k": 2**31 - 1}, {"top_p": 0.3},
        {"top_p": 1e-3}, {"top_p": 0.999}, {"min_p": 0.2}, {"min_p": 1.0}, {},
        {"top_k": 7, "top_p": 0.6}, {"top_k": 20, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 0.0, "top_k": 3, "top_p": 0.5},
    ] * (2 if vocab == 50 or CUDA else 1)  # fmt: skip
    params = [
        SamplingParams(**{"temperature": 0.4 + 0.1 * (i % 7)} | g) for i, g in enumerate(given)
    ]
    R = len(params)
    logits = 3 * torch.randn(R, vocab)
    logits[1::2] = logits[1::2].round()  # many are equal, and there are zeros of both signs
    logits[:, 7], logits[:, 9] = -torch.inf, 5.0
    logits = logits.to(DEVICE, dtype)
    temperature = torch.tensor([p.temperature for p in params], device=DEVICE)
    scaled = cap_logits(logits, 15.0) / temperature.clamp(min=1e-30)[:, None]
    scaled[logits == -torch.inf] = -torch.inf  # which the cap makes finite
    kept = drop_tokens(scaled, params) > -torch.inf
    kept[temperature == 0] = True
    assert (kept.sum(1) == 1).any() and (kept.sum(1) > vocab // 2).any()
    left = logits.masked_fill(~kept, -torch.inf)
    filters = torch.tensor(filter_values(params), dtype=torch.float32, device=DEVICE).T.contiguous()
    ends = torch.zeros(R), torch.full((R,), 1.0 - 2.0**-24)
    for u in (ends[0], torch.rand(R), ends[1]):
        u = u.to(DEVICE)
        tokens = sample(logits, temperature, u, 15.0, filters)
        check_samples(left, temperature, u, 15.0, tokens)
        # the ends of what is left are reached: nothing else was dropped
        if not u.any():
            first = kept.float().argmax(1)
            sampled = temperature > 0
            assert torch.equal(tokens[sampled].long(), first[sampled])


# compiled for a card that is not there ------------------------------------------------------------


@pytest.mark.parametrize(
    "registers, warps, shared, expected",
    [(178, 1, 64, 8), (91, 4, 39168, 5), (96, 4, 72192, 3), (32, 1, 0, 32), (255, 16, 0, 1)],
)
def test_programs_at_once_follow_from_the_kernel_and_the_card(
    registers, warps, shared, expected, monkeypatch
):
    """A Hopper's: 65,536 registers, 2,048 threads, 228 KB."""
    card = SimpleNamespace(
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
        shared_memory_per_multiprocessor=233472,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.version, "hip", None)
    metadata = SimpleNamespace(shared=shared)
    kernel = SimpleNamespace(n_regs=registers, metadata=metadata, _init_handles=lambda: None)
    device = torch.device("cuda", 0)
    assert launch.programs_at_once(device, kernel, warps) == expected


@pytest.mark.parametrize(
    "card, hip, asked, early",
    [(9, None, False, False), (9, None, True, True), (10, None, True, True)]
    + [(8, None, True, False), (12, None, True, False), (9, "6.4", True, False)],
)
def test_kernels_start_early_only_if_asked_to_and_where_it_works(
    card, hip, asked, early, monkeypatch
):
    properties = SimpleNamespace(major=card, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(launch, "_card", launch._card.__wrapped__)
    with launch.early_start(asked):
        options = launch.options(torch.device("cuda", 0))
    assert not launch.options(torch.device("cuda", 0))["PDL"]
    assert options.pop("enable_fp_fusion")
    assert options == ({"PDL": True, "launch_pdl": True} if early else {"PDL": False})


TARGET = """
import re, subprocess, tempfile
from pathlib import Path
from types import SimpleNamespace
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from microvllm.gpu import launch
from microvllm.gpu.attention import fixed_attention, paged_attention
from microvllm.gpu.prefixes import SharedPrefixes
from microvllm.gpu.sampler import sample
from microvllm.gpu.elementwise import (
    add_norm, fp8_rows, linear, linear_add, norm_linear, relu2, rope_store
)

target = GPUTarget("cuda", 90, 32)
card = {"get_current_device": lambda: 0, "get_current_stream": lambda device: 0}
driver.set_active(SimpleNamespace(**card, get_current_target=lambda: target))
options = {"PDL": PDL, "launch_pdl": PDL, "enable_fp_fusion": True}
launch.programs_at_once = lambda device, kernel, num_warps: 5
launch.card = lambda device: (132, 232448, options)
launch, compiled, kind = JITFunction.run, {}, ""

def only_compile(self, *args, **kw):
    kernel = launch(self, *args, **{**kw, "warmup": True})
    compiled.setdefault(self.__name__ + kind, {})[kernel.hash] = kernel.asm

JITFunction.run = only_compile

def bf16(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)
"""

REPORT = """
def resource(cubin, what):
    return re.search(what + r":(\\d+)", cubin)[1]

reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
for name, variants in compiled.items():
    for asm in variants.values():
        before, wait, after = asm["ptx"].partition("griddepcontrol.wait")
        early = before.count("ld.global") + before.count("st.global") + before.count("cp.async")
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"]), file.flush()
            read = [reader, "--dump-resource-usage", file.name]
            used = subprocess.run(read, capture_output=True, text=True).stdout
        found = [resource(used, what) for what in ("REG", "STACK", "LOCAL")]
        print(name, len(variants), len(wait) > 0, early, after.count("griddepcontrol"), *found)
"""


def compile_for_hopper(calls: str, pdl: bool) -> list[list[str]]:
    """Compile what the calls of the package's kernels launch, in a process of its own. One
    entry a kernel: name, variants, does it wait for its predecessor, accesses to memory before,
    instructions of this kind after that, registers, and bytes of stack and of local memory."""
    pytest.importorskip("triton", "3.4", reason="launch_pdl came with triton 3.4")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", f"PDL = {pdl}" + TARGET + calls + REPORT],
        env=env,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return [line.split() for line in run.stdout.splitlines()]


CALLS = """
x = bf16(8, 2176)
for one in torch.zeros(5)[:2]:  # a layer's lambdas
    add_norm(x, x, x, one, one, 1e-7)
relu2(x)
fp8_rows(x)
linear(x, x), linear(x[:1], x)
for one in torch.zeros(5)[:2]:
    norm_linear(x, x, 1e-7, x, one, one), norm_linear(x[:1], x, 1e-7, x, one, one)
linear_add(x[:1], x, bf16(1, 8))
linear_add(bf16(1, 8704), bf16(2176, 8704), x[:1], outputs=1)
kind = "_in_float8"
for rows in (1, 2):
    w, scales = x.to(torch.float8_e4m3fn), torch.zeros(8, 1)
    norm_linear(x[:rows], w, 1e-7, x, one, one, scales=scales)
    w, scales = torch.zeros(2176, 8704, dtype=w.dtype), torch.zeros(2176, 1)
    linear_add(bf16(rows, 8704), w, x[:rows], outputs=1, scales=scales)
kind = ""
tables = torch.zeros(64, 64)
for at in (0, 1, 8):  # where in one upload the batch's arrays lie
    flat = torch.zeros(200, dtype=torch.int32)[at:]
    batch = SimpleNamespace(
        token_ids=flat[:8], positions=flat[8:16], slots=flat[16:24], cu_seqlens=flat[24:28],
        seq_lens=flat[28:31], block_tables=flat[32 : 32 + 3 * (15 + at)].view(3, -1),
        num_decodes=2, max_query_len=6, max_seq_len=99,
    )
    for n_head, n_kv in ((17, 17), (16, 4)) if at == 0 else ((17, 17),):
        k, v = bf16(2, 3, n_kv, 16, 128)
        gate = bf16(64, n_kv * 128), bf16(n_kv, 12)
        qkv = bf16(8, (n_head + 2 * n_kv) * 128)
        h = bf16(8, 12 + at)
        rest = (n_head, 1.2, 3.0, 1e-7)
        q = rope_store(qkv, h, *gate, tables, tables, batch, k, v, *rest)
        paged_attention(q, k, v, batch, 16 + at)
        if at == 0:
            for num_splits in (1, 2, 16):
                paged_attention(q, k, v, batch, -1, num_splits=num_splits)
            decodes = SimpleNamespace(**{**vars(batch), "seq_lens": flat[28:30]})
            kind = "_of_shared_blocks"
            paged_attention(q[:2], k, v, decodes, -1, prefixes=SharedPrefixes())
            kind = "_in_int8"
            for prefixes in (None, SharedPrefixes()):
                k8, v8 = torch.zeros(2, 3, n_kv, 16, 130, dtype=torch.int8)
                paged_attention(q[:2], k8, v8, decodes, -1, num_splits=2, prefixes=prefixes)
            kind = ""
            fixed_attention(q, k, v, batch, -1)
            long = SimpleNamespace(**{**vars(batch), "num_decodes": 0, "seq_lens": flat[28:29]})
            paged_attention(bf16(80, n_head, 128), k, v, long, -1)
    f32 = flat.view(torch.float32)
    sample(bf16(2, 5000), f32[:2], f32[2:4], 15.0)
    sample(bf16(2, 5000), f32[:2], f32[2:4], 15.0, (f32[4:6], f32[6:8], f32[8:10]))
"""


@pytest.mark.skipif(CUDA, reason="a real card has compiled the kernels for itself")
@pytest.mark.slow
@pytest.mark.parametrize("pdl", [False, True])
def test_the_kernels_compile_for_hopper_and_wait_for_the_kernel_before_them(pdl):
    """What the interpreter cannot see: that Triton's compiler takes the kernels, that none spills,
    that each waits for its predecessor before it touches memory if it starts early, and that
    neither where a batch lies in memory nor by how much a context is split makes a new variant."""
    kernels = compile_for_hopper(CALLS, pdl)
    assert {name: int(variants) for name, variants, *_ in kernels} == {
        "_add_norm": 1, "_relu2": 1, "_rope_store": 2, "_decode": 4, "_chunk": 6,
        "_sample_chunks": 1, "_sample_pick": 2, "_truncate": 1, "_linear": 1, "_fp8_rows": 1,
        "_few_rows": 4, "_few_rows_in_float8": 4, "_decode_of_shared_blocks": 4,
        "_decode_in_int8": 6,
    }  # fmt: skip
    # a quarter of a multiprocessor has 16,384 registers, and a warp gets them by 256: of the
    # programs for one row more fit than of that for several, each with as many weights on their way
    registers = [int(kernel[5]) for kernel in kernels if kernel[0] == "_few_rows"]
    warps = sorted(16384 // (-(-number // 8) * 256) for number in registers)
    assert warps[0] == 2 and warps[1] >= 3, registers
    for name, _, waits, early, later, _, *spilled in kernels:
        if name == "_decode_in_int8":  # the form for grouped queries and shared blocks
            assert int(spilled[0]) <= 16 and spilled[1] == "0", spilled
        else:
            assert spilled == ["0", "0"], name
        assert (waits, later) == (str(pdl), "0"), name
        if not pdl:
            continue
        # weights, which no kernel writes
        assert (int(early) > 0) == name.startswith("_few_rows"), name
