"""Decodes that read their shared blocks together, against plain attention in the interpreter."""

from types import SimpleNamespace

import pytest
import torch
from helpers.gpu_kernels import DEVICE, attention_case, ints

from microvllm.attention import sdpa_attention
from microvllm.fused.int8_cache import Int8Heads
from microvllm.gpu import prefixes
from microvllm.gpu.attention import paged_attention
from microvllm.gpu.prefixes import SharedPrefixes, find_shared

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def few_tokens_are_enough(monkeypatch):
    monkeypatch.setattr(prefixes, "LEAST", 8)


def tiles_of(tables, lengths, max_rows=64) -> list[tuple[int, int]]:
    """Rows of each tile, and blocks that they share."""
    num_shared, counts = find_shared(ints(tables), ints(lengths), 4, max_rows).tolist()
    tiles = []
    for row in range(len(tables)):
        if counts[row] or not num_shared[row]:
            tiles.append((max(counts[row], 1), num_shared[row] // 4))
        assert counts[row] or num_shared[row] == num_shared[row - 1] * (num_shared[row] > 0)
    return tiles


def chains(*starts: list[int], width: int = 9) -> list[list[int]]:
    """Block tables that begin with these blocks, and go on with blocks of their own."""
    tables = []
    for row, start in enumerate(starts):
        own = [100 * row + column for column in range(10, 10 + width - len(start))]
        tables.append(start + own)
    return tables


A, B, SYSTEM = [1, 2, 3, 4, 5, 6], [7, 8, 9, 20, 21, 22], [30, 31]


TILES = {
    "samples of two prompts, and one row": ((A, A, A, [50], B, B), [(3, 6), (1, 0), (2, 6)]),
    "one system prompt": ((SYSTEM, SYSTEM, SYSTEM), [(3, 2)]),
    "samples behind one system prompt": ((SYSTEM + A,) * 2 + (SYSTEM + B,) * 2, [(2, 8), (2, 8)]),
    "a little less in common": ((A, A, A[:5], A[:5]), [(4, 5)]),
    "a block is too little": ((A[:1], A[:1]), [(1, 0), (1, 0)]),
    "the same blocks at other places": (([1, *A], A), [(1, 0), (1, 0)]),
    "one row": ((A,), [(1, 0)]),
}


@pytest.mark.parametrize("starts, tiles", TILES.values(), ids=TILES)
def test_neighbours_with_the_same_first_blocks_are_a_tile(starts, tiles):
    assert tiles_of(chains(*starts), [36] * len(starts)) == tiles


def test_a_tile_has_no_block_in_which_a_newest_token_is():
    tables = chains(A, A, A)
    assert tiles_of(tables, [36, 36, 36]) == [(3, 6)]
    assert tiles_of(tables, [36, 25, 36]) == [(3, 6)]
    assert tiles_of(tables, [36, 24, 36]) == [(3, 5)]  # its newest token is in the sixth block
    assert tiles_of(tables, [36, 1, 36]) == [(1, 0)] * 3
    assert tiles_of(chains([0], [0], [0]), [1, 1, 0]) == [(1, 0)] * 3  # padding of a graph


def test_a_tile_has_no_more_rows_than_a_program():
    assert tiles_of(chains(*[A] * 7), [36] * 7, max_rows=3) == [(3, 6), (3, 6), (1, 0)]


# sequences with 14 shared blocks, 6, none, 3 of the sequence before; and a chunk with 5
SEQUENCES = [(1, 61), (1, 70), (1, 58), (1, 9), (1, 33), (1, 30), (1, 41), (1, 0), (7, 60)]
FORKS = [(1, 14), (2, 14), (5, 6), (6, 6), (8, 5)]


def check(case, window, num_splits=2):
    """Compare with plain attention. Returns what the batch's decodes share."""
    q, (k, v), (k_used, v_used), batch = case
    found = SharedPrefixes()
    out = paged_attention(q, k_used, v_used, batch, window, num_splits, prefixes=found)
    (shared,) = found.by_tables.values()
    # torch has no attention without keys
    no_empty = SimpleNamespace(**vars(batch) | {"seq_lens": batch.seq_lens.clamp(min=1)})
    expected = sdpa_attention(q.float(), k.float(), v.float(), no_empty, window)
    assert not out[7].any()  # the row of length 0
    expected[7] = 0
    assert (out.float() - expected).norm() < TOLERANCE[q.dtype] * expected.norm()
    return shared.tolist()


@pytest.mark.parametrize("window", [-1, 0, 3, 14, 30])
@pytest.mark.parametrize("n_head, n_kv", [(2, 2), (6, 2)])
def test_attention_with_shared_blocks(window, n_head, n_kv):
    """Windows that reach all shared keys, some or none; ragged lengths, rows alone, a chunk."""
    case = attention_case(SEQUENCES, n_head, n_kv, 16, 4, torch.float32, FORKS)
    num_shared, counts = check(case, window)
    assert num_shared == [56, 56, 56, 0, 24, 24, 24, 0] and counts == [3, 0, 0, 0, 3, 0, 0, 0]


@pytest.mark.parametrize("num_splits", [None, 1, 32])
def test_any_number_of_programs_shares_a_context(num_splits):
    case = attention_case(SEQUENCES, 3, 1, 20, 2, torch.float16, [(1, 28), (2, 28), (5, 12)])
    check(case, -1, num_splits)


def test_more_rows_than_a_program_has():
    """With 16 queries of 3 heads a tile has 5 rows; if there are 16 heads, 2."""
    sequences = [*[(1, 30)] * 7, (1, 0), *[(1, 30 + i) for i in range(8)]]
    forks = [(b, 7) for b in range(9, 16)]
    _, counts = check(attention_case(sequences, 3, 1, 16, 4, torch.float32, forks), 22)
    assert counts == [0] * 8 + [5, 0, 0, 0, 0, 3, 0, 0]
    _, counts = check(attention_case(sequences, 16, 1, 16, 4, torch.float32, forks[:4]), -1)
    assert counts == [0] * 8 + [2, 0, 2, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("n_head, n_kv", [(2, 2), (6, 2)])
def test_k_and_v_in_int8(n_head, n_kv):
    q, (k, v), _, batch = attention_case(SEQUENCES, n_head, n_kv, 16, 4, torch.float32, FORKS)
    data = torch.zeros(2, *k.shape[:3], 18, dtype=torch.int8, device=DEVICE)
    for heads, numbers in zip(data, (k, v), strict=True):
        Int8Heads(heads)[:] = numbers
    rounded = Int8Heads(data[0])[:], Int8Heads(data[1])[:]
    for window in (-1, 14):
        check((q, rounded, data, batch), window)


def test_tiles_are_found_once_for_a_table(monkeypatch):
    """All layers of a step use the same tensor; the next step has another one."""
    found = SharedPrefixes()
    seen = []
    find = prefixes.find_shared
    monkeypatch.setattr(prefixes, "find_shared", lambda *args: seen.append(1) or find(*args))
    for count in (1, 2):
        *_, batch = attention_case(SEQUENCES, 2, 2, 16, 4, torch.float32, FORKS)
        for _ in range(3):
            shared = found.find(batch, 4, 64)
        assert shared.shape == (2, 8) and len(seen) == count
        del batch
    assert len(found.by_tables) == 0
