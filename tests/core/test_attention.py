"""Attention over the block table against a dense loop that reads K and V through SequenceKVView."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import hand_made_batch, slots_of

from microvllm.attention import PagedKVCache, SequenceKVView, sdpa_attention
from microvllm.full import pick_backend
from microvllm.fused import backend as fused
from microvllm.model import GPTConfig

BACKENDS = [
    "core",
    "sdpa",
    "numba",
]  # the first two are torch's, one by one and all decodes at once
CPU = torch.device("cpu")


def attend_of(backend: str):
    return sdpa_attention if backend == "core" else pick_backend(backend, CPU, torch.float32).attend


# (rows, tokens in the cache after them): decodes, whole prompts, chunks; more than one of each
MIXED = [(1, 1), (1, 17), (1, 70), (1, 33), (2, 2), (40, 40), (5, 33), (17, 80), (7, 8)]
DECODES = [(1, n) for n in (1, 2, 15, 16, 17, 64, 65, 200)]


class Case:
    """Random queries, and sequences whose blocks lie scattered in the second layer of a cache."""

    def __init__(self, sequences, n_head=4, n_kv_head=2, head_dim=16, block_size=16, seed=0):
        self.random = np.random.default_rng(seed)
        shape = {"sequence_len": 256, "vocab_size": 9, "n_layer": 2}
        heads = {"n_head": n_head, "n_kv_head": n_kv_head, "n_embd": n_head * head_dim}
        needed = [-(-length // block_size) for _, length in sequences]
        num_blocks = sum(needed) + 4
        self.cache = PagedKVCache(
            GPTConfig(**shape, **heads), num_blocks, block_size, torch.float32, CPU
        )
        # what no sequence owns must not matter: large, so that a leak shows at once
        self.cache.data.copy_(torch.from_numpy(self.normal(*self.cache.data.shape) * 1e4))
        blocks = self.random.permutation(num_blocks - 1)[: sum(needed)] + 1
        tables = [part.tolist() for part in np.split(blocks, np.cumsum(needed)[:-1])]
        self.lengths = [length for _, length in sequences]
        self.rows = [rows for rows, _ in sequences]
        k, v = self.k, self.v = self.cache.data[1]
        self.views = [
            SequenceKVView(k, v, table, length)
            for table, length in zip(tables, self.lengths, strict=True)
        ]
        for view in self.views:
            for slot in slots_of(view):
                for x in (k, v):
                    x[slot // block_size, :, slot % block_size] = torch.from_numpy(
                        self.normal(n_kv_head, head_dim)
                    )
        chunks = [
            ([0] * length, length - rows, length, table)
            for (rows, length), table in zip(sequences, tables, strict=True)
        ]
        self.batch = hand_made_batch(chunks, block_size)
        self.q = torch.from_numpy(self.normal(sum(self.rows), n_head, head_dim))

    def normal(self, *shape):
        return self.random.standard_normal(shape).astype(np.float32)

    def attend(self, backend, window):
        return attend_of(backend)(self.q, self.k, self.v, self.batch, window)

    def expected(self, window):
        """Row by row and head by head in float64, from the definition."""
        n_head, dim = self.q.shape[1:]
        out = []
        queries = iter(self.q.double().numpy())
        for view, rows, length in zip(self.views, self.rows, self.lengths, strict=True):
            k, v = (x.double().numpy() for x in view.gather())  # (Hkv, length, D)
            group = n_head // len(k)
            for p in range(length - rows, length):
                seen = [j for j in range(length) if j <= p and (window < 0 or p - j <= window)]
                q = next(queries)
                for head in range(n_head):
                    scores = k[head // group, seen] @ q[head] / np.sqrt(dim)
                    weights = np.exp(scores - scores.max())
                    out.append(weights / weights.sum() @ v[head // group, seen])
        return torch.from_numpy(np.array(out)).view(self.q.shape)

    def check(self, backend, window):
        out = self.attend(backend, window)
        assert out.shape == self.q.shape and out.dtype == self.q.dtype
        torch.testing.assert_close(out.double(), self.expected(window), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [-1, 0, 1, 7, 16, 39, 1000])
@pytest.mark.parametrize("block_size", [1, 4, 16, 64])
def test_a_mixed_batch_in_scattered_blocks(backend, window, block_size):
    Case(MIXED, block_size=block_size).check(backend, window)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sequences", [DECODES, MIXED[4:], [(1, 1)], [(64, 64)], [(3, 700)]])
@pytest.mark.parametrize("window", [-1, 20])
def test_decodes_alone_and_chunks_alone(backend, sequences, window):
    Case(sequences).check(backend, window)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "n_head, n_kv_head, head_dim",
    [
        (4, 4, 16),
        (4, 1, 16),
        (6, 3, 8),
        (6, 2, 20),
        (1, 1, 64),
        (2, 1, 128),
        (10, 2, 6),
        (20, 1, 4),
    ],
)
def test_query_heads_that_share_kv_heads(backend, n_head, n_kv_head, head_dim):
    case = Case(MIXED, n_head, n_kv_head, head_dim, block_size=8)
    for window in (-1, 11):
        case.check(backend, window)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_window_has_both_ends_inside(backend):
    """w + 1 keys: the query itself and the w before it. Each value names its own position."""
    case = Case([(1, 30), (30, 30)], n_head=1, n_kv_head=1, head_dim=16, block_size=4)
    k, v = case.k, case.v
    k.zero_()  # so that all visible keys weigh the same
    for view in case.views:
        for p, slot in enumerate(slots_of(view)):
            v[slot // 4, :, slot % 4] = 2.0**p
    for window in (0, 3, 29, 30):
        out = case.attend(backend, window)
        for row, p in enumerate([29, *range(30)]):
            seen = range(max(0, p - window), p + 1)
            expected = sum(2.0**j for j in seen) / len(seen)
            torch.testing.assert_close(out[row], torch.full((1, 16), expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_of_any_size_neither_overflow_nor_vanish(backend):
    case = Case(MIXED, block_size=4)
    case.q *= 1000.0  # scores in the thousands: exp() of them is infinite
    out = case.attend(backend, -1)
    assert out.isfinite().all()
    # the scores are themselves good to 1e-4 or so here, and one key takes nearly all the weight
    torch.testing.assert_close(out.double(), case.expected(-1), rtol=0, atol=5e-3)
    case.q *= 0.0  # equal weights
    case.check(backend, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_does_not_depend_on_who_shares_its_batch(backend):
    case = Case(MIXED, block_size=4)
    together = case.attend(backend, 25)
    first = 0
    for view, rows, length in zip(case.views, case.rows, case.lengths, strict=True):
        batch = hand_made_batch([([0] * length, length - rows, length, view.table.tolist())], 4)
        alone = attend_of(backend)(case.q[first : first + rows], case.k, case.v, batch, 25)
        torch.testing.assert_close(alone, together[first : first + rows], rtol=0, atol=1e-6)
        first += rows


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_output_is_written(backend):
    case = Case(MIXED)
    before = case.cache.data.clone(), case.q.clone()
    case.attend(backend, 9)
    assert torch.equal(case.cache.data, before[0]) and torch.equal(case.q, before[1])


@pytest.mark.parametrize("backend", ["core", "sdpa"])
def test_half_precision_keeps_the_softmax_in_float32(backend):
    """300 equal keys: sums of weights of 1/300 would be off by a percent in bfloat16."""
    case = Case([(1, 300), (300, 300)])
    reference = case.attend(backend, -1)
    k, v = case.k.bfloat16(), case.v.bfloat16()
    out = attend_of(backend)(case.q.bfloat16(), k, v, case.batch, -1)
    assert out.dtype == torch.bfloat16
    assert (out.float() - reference).norm() / reference.norm() < 8e-3


def test_a_view_reads_a_sequence_in_its_own_order():
    case = Case([(1, 9), (1, 20)], block_size=4)
    for view in case.views:
        slots = slots_of(view)
        assert len(slots) == len(set(slots)) == view.num_tokens
        keys, values = view.gather()
        assert keys.shape == values.shape == (2, view.num_tokens, 16)
        for p, slot in enumerate(slots):
            assert slot // 4 == view.table[p // 4] and slot % 4 == p % 4
            assert torch.equal(keys[:, p], case.k[slot // 4, :, slot % 4])
            assert torch.equal(values[:, p], case.v[slot // 4, :, slot % 4])


# choosing one ------------------------------------------------------------------------------------


def test_auto_is_the_fastest_that_runs_here():
    for dtype, name in (("float32", "numba"), ("bfloat16", "numba"), ("float16", "sdpa")):
        assert pick_backend("auto", CPU, getattr(torch, dtype)).name == name
    assert pick_backend("sdpa", CPU, torch.float32).name == "sdpa"


@pytest.mark.parametrize(
    "name, dtype, words",
    [
        ("flush", torch.float32, ["attention", "'flush'", "'auto'", "'sdpa'", "'numba'"]),
        ("flash", torch.float32, ["attention='flash'", "float16", "GPU", "float32 on cpu"]),
        (None, torch.float32, ["attention", "None", "'auto'"]),
        ("numba", torch.float16, ["numba", "float32", "bfloat16", "float16"]),
        ("triton", torch.float32, ["triton", "GPU", "cpu"]),
    ],
)
def test_a_backend_that_cannot_run_is_refused(name, dtype, words):
    with pytest.raises(ValueError) as error:
        pick_backend(name, CPU, dtype)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("window", [-1, 20])
def test_what_is_gathered_at_a_time_has_a_limit(window, monkeypatch):
    """Or a full batch with one long sequence in it would take gigabytes in mid-run."""
    case = Case(DECODES + [(3, 40)])
    whole = case.attend("sdpa", window)
    longest = 13 * case.k[0].numel()  # what the longest, of 200 tokens, has in its 13 blocks
    monkeypatch.setattr(fused, "GATHERED", 3 * longest)
    sizes, attend = [], F.scaled_dot_product_attention

    def watch(q, keys, *rest, **options):
        sizes.append(keys.numel())
        return attend(q, keys, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    parts = case.attend("sdpa", window)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-6)
    assert len(sizes) == 3 + 1 and max(sizes) == 3 * longest  # 8 decodes by threes, one chunk
