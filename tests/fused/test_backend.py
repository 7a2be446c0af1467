"""Attention of the backends against a dense loop, and which backend is chosen."""

import pytest
import torch
import torch.nn.functional as F
from helpers.attention_cases import (
    CPU,
    DECODES,
    HEADS,
    MIXED,
    Case,
    check_both_ends_of_the_window,
    check_half_precision_softmax,
    check_only_the_output_is_written,
    check_scores_of_any_size,
    check_sequences_alone_and_together,
)

from microvllm.fused import backend as fused
from microvllm.loading import pick_backend

BACKENDS = ["sdpa", "numba"]


def attend_of(name: str):
    return pick_backend(name, CPU, torch.float32).attend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [-1, 0, 1, 7, 16, 39, 1000])
@pytest.mark.parametrize("block_size", [1, 4, 16, 64])
def test_a_mixed_batch_in_scattered_blocks(backend, window, block_size):
    Case(MIXED, block_size=block_size).check(attend_of(backend), window)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sequences", [DECODES, MIXED[4:], [(1, 1)], [(64, 64)], [(3, 700)]])
@pytest.mark.parametrize("window", [-1, 20])
def test_decodes_alone_and_chunks_alone(backend, sequences, window):
    Case(sequences).check(attend_of(backend), window)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_head, n_kv_head, head_dim", HEADS)
def test_query_heads_that_share_kv_heads(backend, n_head, n_kv_head, head_dim):
    case = Case(MIXED, n_head, n_kv_head, head_dim, block_size=8)
    for window in (-1, 11):
        case.check(attend_of(backend), window)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_window_has_both_ends_inside(backend):
    check_both_ends_of_the_window(attend_of(backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_of_any_size_neither_overflow_nor_vanish(backend):
    check_scores_of_any_size(attend_of(backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_does_not_depend_on_what_shares_its_batch(backend):
    check_sequences_alone_and_together(attend_of(backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_output_is_written(backend):
    check_only_the_output_is_written(attend_of(backend))


def test_half_precision_keeps_the_softmax_in_float32():
    check_half_precision_softmax(attend_of("sdpa"))


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
    whole = case.run(attend_of("sdpa"), window)
    longest = 13 * case.k[0].numel()  # what the longest, of 200 tokens, has in its 13 blocks
    monkeypatch.setattr(fused, "GATHERED", 3 * longest)
    sizes, attend = [], F.scaled_dot_product_attention

    def watch(q, keys, *rest, **options):
        sizes.append(keys.numel())
        return attend(q, keys, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    parts = case.run(attend_of("sdpa"), window)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-6)
    assert len(sizes) == 3 + 1 and max(sizes) == 3 * longest  # 8 decodes by threes, one chunk
