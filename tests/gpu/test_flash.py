"""attention="flash" without its packages: stand-ins that have their signatures, insist on what
their kernels insist on, and compute with the reference. And, on a card, the packages themselves."""

import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers.batches import hand_made_batch
from helpers.goldens import MODEL

from microvllm import LLM
from microvllm.attention import sdpa_attention
from microvllm.gpu import has_triton
from microvllm.gpu.flash import FlashBackend
from microvllm.loading import pick_backend

# (rows, tokens in the cache after them): decodes, whole prompts, chunks; more than one of each
MIXED = [(1, 1), (1, 17), (1, 70), (1, 33), (2, 2), (40, 40), (5, 33), (17, 80), (7, 8)]
DECODES = [(1, n) for n in (1, 2, 15, 16, 17, 64, 65, 200)]

CARD = torch.device("cuda", 0)
CUDA = torch.cuda.is_available()


def case(sequences, n_head: int, n_kv_head: int, dim: int, block_size: int):
    """Queries, K and V of sequences whose blocks lie scattered, and their batch."""
    blocks = [-(-length // block_size) for _, length in sequences]
    order = torch.randperm(sum(blocks) + 3) + 1  # block 0 is the sink
    chunks = [
        ([0] * length, length - rows, length, table.tolist())
        for (rows, length), table in zip(sequences, order[:-3].split(blocks), strict=True)
    ]
    # what no sequence owns must not matter: large, so that a leak shows at once
    k, v = torch.full((2, len(order) + 1, n_kv_head, block_size, dim), 1e4).bfloat16()
    for _, _, length, table in chunks:
        for p in range(length):
            for x in (k, v):
                x[table[p // block_size], :, p % block_size] = torch.randn(n_kv_head, dim)
    q = torch.randn(sum(rows for rows, _ in sequences), n_head, dim).bfloat16()
    return q, k, v, hand_made_batch(chunks, block_size)


def attend(q, k, v, cu_seqlens, seq_lens, tables, max_query, max_seq, left, right, step=1):
    """What all three compute, after the checks that all three make."""
    T, n_head, dim = q.shape
    blocks, block_size, n_kv_head, _ = k.shape
    assert k.shape == v.shape and k.shape[3] == dim and n_head % n_kv_head == 0
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == tables.stride(-1) == 1
    assert all(stride * 2 % 16 == 0 for x in (q, k, v) for stride in x.stride()[:-1])
    assert dim % 8 == 0 and dim <= 256 and block_size % step == 0
    for x in (cu_seqlens, seq_lens, tables):
        assert x.dtype == torch.int32
    assert cu_seqlens.is_contiguous() and seq_lens.is_contiguous()
    n = len(seq_lens)
    assert cu_seqlens.shape == (n + 1,) and tables.shape[0] == n and int(cu_seqlens[-1]) == T
    assert max_query == int(cu_seqlens.diff().max()) and max_seq >= int(seq_lens.max())
    assert right == 0 and (left is None or left >= -1)
    ends = zip(cu_seqlens[1:].tolist(), cu_seqlens.diff().tolist(), seq_lens.tolist(), strict=True)
    batch = SimpleNamespace(
        positions=torch.cat([torch.arange(length - rows, length) for _, rows, length in ends]),
        cu_seqlens=cu_seqlens, seq_lens=seq_lens, block_tables=tables, max_seq_len=max_seq,
        num_decodes=cu_seqlens.diff().tolist().count(1),
    )  # fmt: skip
    # back to our layout: the same memory, read as it lies
    k, v = (x.transpose(1, 2) for x in (k, v))
    assert k.is_contiguous() and v.is_contiguous()
    left = -1 if left is None else left
    return sdpa_attention(q.float(), k.float(), v.float(), batch, left).to(q.dtype)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
    cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None,
    cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None,
    q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
):  # fmt: skip
    """FlashAttention-3, hopper/flash_attn_interface.py; causal makes the right side 0."""
    assert causal and k is None and window_size[1] in (-1, 0)
    room = page_table.shape[1] * k_cache.shape[1]
    return attend(
        q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, page_table, max_seqlen_q, room,
        window_size[0], 0,
    )  # fmt: skip


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    seqused_q=None, seqused_k=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
    deterministic=False, score_mod=None, mask_mod=None, block_sparse_tensors=None,
    cu_total_m_blocks=None, cu_total_n_blocks=None, aux_tensors=None, return_lse=False,
):  # fmt: skip
    """FlashAttention-4, flash_attn/cute/interface.py: no running sum of keys with a page table."""
    assert causal and cu_seqlens_k is None and window_size[0] != -1
    out = attend(
        q, k, v, cu_seqlens_q, seqused_k, page_table, max_seqlen_q, max_seqlen_k, window_size[0], 0
    )
    return out, None


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """torch's, with FlashAttention-2 behind it: a running sum of keys, blocks of 256, one split."""
    assert cu_seq_k.dtype == torch.int32 and cu_seq_k.tolist()[1:] == seqused_k.cumsum(0).tolist()
    assert num_splits == 1 and (enable_gqa or query.shape[1] == key.shape[2])
    return attend(
        query, key, value, cu_seq_q, seqused_k, block_table, max_q, max_k, *window_size, 256
    )


PLACES = {
    "flash_attn_interface": flash_attn_with_kvcache,
    "flash_attn.cute": flash_attn_varlen_func,
    "torch.nn.attention.varlen": varlen_attn,
}


@pytest.fixture
def install(monkeypatch):
    """install(names, capability, versions): a card, on its machine these packages alone, and in
    the hub's repository these versions. Returns the versions that are asked for."""

    def install(names, capability=(9, 0), versions=(1,)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr("microvllm.gpu.backend.has_triton", lambda device: False)
        hub, in_hub = ModuleType("kernels"), ModuleType("hub's")
        in_hub.flash_attn_with_kvcache = flash_attn_with_kvcache
        asked = []

        def get_kernel(name, *, version):  # as kernels 0.17 has it: without a version it raises
            asked.append(version)
            assert name == "kernels-community/flash-attn3"
            return dict.fromkeys(versions, in_hub)[version]

        hub.get_kernel = get_kernel
        for place, function in PLACES.items():
            module = ModuleType(place)
            setattr(module, function.__name__, function)
            monkeypatch.setitem(sys.modules, place, module if place in names else None)
        monkeypatch.setitem(sys.modules, "kernels", hub if "kernels" in names else None)
        return asked

    return install


@pytest.mark.parametrize("window", [-1, 0, 20])
@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (8, 1)], ids=str)
@pytest.mark.parametrize(
    "package, block_size",
    [("flash_attn_interface", 16), ("flash_attn.cute", 4), ("kernels", 16)]
    + [("torch.nn.attention.varlen", 256)],
)
def test_each_is_called_as_it_wants_to_be(install, package, block_size, heads, window):
    install([package])
    flash = pick_backend("flash", CARD, torch.bfloat16)
    assert flash.name == "flash" and flash.block_step == (256 if "varlen" in package else 1)
    for sequences in (MIXED, DECODES):
        q, k, v, batch = case(sequences, *heads, 16, block_size)
        out = flash.attend(q, k, v, batch, window)
        wanted = sdpa_attention(q.float(), k.float(), v.float(), batch, window)
        assert out.shape == q.shape and out.dtype == q.dtype
        torch.testing.assert_close(out.float(), wanted, rtol=0, atol=2e-2)


@pytest.mark.parametrize("versions, asked", [((1, 2), [2]), ((1,), [2, 1]), ((2,), [2])])
def test_the_hubs_newer_version_is_asked_for_first(install, versions, asked):
    seen = install(["kernels"], versions=versions)
    assert FlashBackend(CARD, torch.bfloat16).attend and seen == asked


def test_torchs_signature_is_the_one_that_is_installed():
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch 2.12 or newer")
    real = inspect.signature(varlen.varlen_attn).parameters
    if "block_table" not in real:
        pytest.skip("torch 2.12 or newer has a block table")
    ours = inspect.signature(varlen_attn).parameters
    assert [(p.name, p.kind, p.default) for p in real.values()] == [
        (p.name, p.kind, p.default) for p in ours.values()
    ]


def test_the_best_that_runs_on_the_card_is_taken(install):
    def chosen():
        return FlashBackend(CARD, torch.float16).attend.func.__name__

    everything = [*PLACES, "kernels"]
    install(everything)
    assert chosen() == "flash3"
    install(everything, (10, 0))
    assert chosen() == "flash4"
    install(everything, (8, 6))
    assert chosen() == "flash_of_torch"
    install(["kernels", "torch.nn.attention.varlen"])
    assert chosen() == "flash3"


def test_what_is_missing_is_said(install):
    install(["flash_attn_interface", "flash_attn.cute"], (8, 6))
    with pytest.raises(ValueError, match="card of compute capability 8.6: pip install 'torch>="):
        FlashBackend(CARD, torch.float16)
    install([*PLACES], (7, 5))
    with pytest.raises(ValueError, match="found no FlashAttention .* 7.5"):
        FlashBackend(CARD, torch.float16)
    with pytest.raises(ValueError, match="float16 and bfloat16 on a GPU"):
        FlashBackend(CARD, torch.float32)
    with pytest.raises(ValueError, match="deterministic=True is for attention='triton'"):
        FlashBackend(CARD, torch.float16, deterministic=True)


def test_blocks_that_torch_cannot_take_are_refused(install, monkeypatch):
    install(["torch.nn.attention.varlen"], (8, 0))
    flash = FlashBackend(CARD, torch.bfloat16)
    flash.device = torch.device("cpu")  # where its weights can be
    monkeypatch.setattr("microvllm.loading.pick_backend", lambda *_: flash)
    with pytest.raises(ValueError, match="block_size=16: .*block_size=256, or attention='triton'"):
        LLM(MODEL, num_blocks=20, device="cpu", attention="flash")


def test_older_cards_go_without_triton(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("microvllm.gpu.attention.make_counts", lambda device: None)  # no such card
    for place in ("microvllm.gpu", "microvllm.gpu.backend"):
        monkeypatch.setattr(f"{place}.compiler_problem", lambda device: None)
    for index, (capability, here) in enumerate([((7, 5), False), ((8, 0), True), ((9, 0), True)]):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        device = torch.device("cuda", 90 + index)  # it asks once for each card
        assert has_triton(device) == here
        name = "triton" if here else "sdpa"
        assert pick_backend("auto", device, torch.float32).name == name
    with pytest.raises(ValueError, match="Ampere"):
        pick_backend("triton", torch.device("cuda", 90), torch.float32)
    assert not has_triton(torch.device("cpu"))


@pytest.mark.skipif(not CUDA, reason="needs a card, and a FlashAttention for it")
@pytest.mark.parametrize("window", [-1, 20])
def test_the_real_one(window):
    try:
        flash = FlashBackend(CARD, torch.bfloat16)
    except ValueError as error:
        pytest.skip(str(error))
    for sequences in (MIXED, DECODES):
        q, k, v, batch = case(sequences, 4, 2, 64, 256)
        there = SimpleNamespace(
            **{n: x.to(CARD) if hasattr(x, "to") else x for n, x in vars(batch).items()}
        )
        out = flash.attend(q.to(CARD), k.to(CARD), v.to(CARD), there, window)
        wanted = sdpa_attention(q.float(), k.float(), v.float(), batch, window)
        torch.testing.assert_close(out.float().cpu(), wanted, rtol=0, atol=2e-2)
