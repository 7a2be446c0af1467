"""Attention over the block table against a dense loop that reads K and V through SequenceKVView."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.attention_cases import (
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
from helpers.batches import slots_of

from microvllm import attention
from microvllm.attention import PagedKVCache, sdpa_attention
from microvllm.model import GPTConfig


@pytest.mark.parametrize("window", [-1, 0, 1, 7, 16, 39, 1000])
@pytest.mark.parametrize("block_size", [1, 4, 16, 64])
def test_a_mixed_batch_in_scattered_blocks(window, block_size):
    Case(MIXED, block_size=block_size).check(sdpa_attention, window)


@pytest.mark.parametrize("sequences", [DECODES, MIXED[4:], [(1, 1)], [(64, 64)], [(3, 700)]])
@pytest.mark.parametrize("window", [-1, 20])
def test_decodes_alone_and_chunks_alone(sequences, window):
    Case(sequences).check(sdpa_attention, window)


@pytest.mark.parametrize("n_head, n_kv_head, head_dim", HEADS)
def test_query_heads_that_share_kv_heads(n_head, n_kv_head, head_dim):
    case = Case(MIXED, n_head, n_kv_head, head_dim, block_size=8)
    for window in (-1, 11):
        case.check(sdpa_attention, window)


def test_the_window_has_both_ends_inside():
    check_both_ends_of_the_window(sdpa_attention)


def test_scores_of_any_size_neither_overflow_nor_vanish():
    check_scores_of_any_size(sdpa_attention)


def test_a_sequence_does_not_depend_on_what_shares_its_batch():
    check_sequences_alone_and_together(sdpa_attention)


def test_only_the_output_is_written():
    check_only_the_output_is_written(sdpa_attention)


def test_half_precision_keeps_the_softmax_in_float32():
    check_half_precision_softmax(sdpa_attention)


def test_a_view_reads_a_sequence_in_its_own_order():
    case = Case([(1, 9), (1, 20)], block_size=4)
    for view in case.views:
        slots = slots_of(view)
        assert len(slots) == len(set(slots)) == view.num_tokens
        keys, values = view.gather()
        assert keys.shape == values.shape == (2, view.num_tokens, 16)
        for p, slot in enumerate(slots):
            assert slot // 4 == view.block_table[p // 4] and slot % 4 == p % 4
            assert torch.equal(keys[:, p], case.k[slot // 4, :, slot % 4])
            assert torch.equal(values[:, p], case.v[slot // 4, :, slot % 4])


def test_a_cache_that_was_released_has_no_memory():
    config = GPTConfig(64, 9, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
    cache = PagedKVCache(config, num_blocks=5, block_size=4, dtype=torch.float32, device="cpu")
    assert cache.data.shape == (2, 2, 5, 1, 4, 16) and not cache.data.any()
    cache.release()
    assert cache.data.nbytes == 0 and not list(cache.layers(None))


def test_attention_on_macs_gets_what_torch_does_right(monkeypatch):
    torch.manual_seed(0)
    q = torch.randn(2, 3, 4, 16).transpose(1, 2)  # (2, 4, 3, 16)
    keys, values = torch.randn(2, 2, 5, 2, 16).transpose(2, 3)
    real, seen = F.scaled_dot_product_attention, []

    def watched(q, keys, values, attn_mask=None, **options):
        seen.append((q, keys, values, attn_mask))
        assert not options and q.shape[1] == keys.shape[1] == values.shape[1]
        assert attn_mask.dtype == q.dtype and attn_mask.shape == (2, 4, 3, 5)
        assert all(x.is_contiguous() for x in seen[-1])
        return real(q, keys, values, attn_mask=attn_mask)

    for mask in (torch.ones(3, 5).tril(2).bool(), torch.ones(2, 1, 1, 5).bool()):
        expected = attention.attend_masked(q, keys, values, mask)
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", watched)
            out = attention.attend_on_mps(q, keys, values, mask)
        torch.testing.assert_close(out, expected)
    assert len(seen) == 2
    monkeypatch.setattr(attention, "attend_on_mps", lambda *tensors: "there")
    on_mac = SimpleNamespace(device=SimpleNamespace(type="mps"))
    assert attention.attend_masked(on_mac, None, None, None) == "there"
