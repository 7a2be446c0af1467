"""attention="flash" without a card: a stand-in that has the signature of torch's function, insists
on what its kernel insists on, and computes with the reference. And, on a card, the real one."""

import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers.goldens import MODEL
from helpers.gpu_kernels import CUDA, attention_case

from microvllm import LLM
from microvllm.attention import sdpa_attention
from microvllm.gpu import has_triton
from microvllm.gpu.flash import FlashBackend
from microvllm.loading import pick_backend

# (rows, tokens in the cache after them): decodes, whole prompts, chunks; more than one of each
MIXED = [(1, 1), (1, 17), (1, 70), (1, 33), (2, 2), (40, 40), (5, 33), (17, 80), (7, 8)]
DECODES = [(1, n) for n in (1, 2, 15, 16, 17, 64, 65, 200)]

CARD = torch.device("cuda", 0)


def case(sequences, *shape: int):
    """Queries, K and V of sequences whose blocks lie scattered, and their batch. Slots that no
    sequence owns have NaN."""
    q, _, (k, v), batch = attention_case(sequences, *shape, torch.bfloat16)
    return q, k, v, batch


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """torch's, with FlashAttention-2 behind it: a running sum of keys, blocks of 256, one split."""
    T, n_head, dim = query.shape
    _, block_size, n_kv_head, _ = key.shape
    assert key.shape == value.shape and key.shape[3] == dim and n_head % n_kv_head == 0
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == block_table.stride(-1) == 1
    assert all(n * 2 % 16 == 0 for x in (query, key, value) for n in x.stride()[:-1])
    assert dim % 8 == 0 and dim <= 256 and block_size % 256 == 0
    for x in (cu_seq_q, cu_seq_k, seqused_k, block_table):
        assert x.dtype == torch.int32
    assert cu_seq_q.is_contiguous() and seqused_k.is_contiguous()
    assert cu_seq_k.tolist()[1:] == seqused_k.cumsum(0).tolist() and num_splits == 1 and enable_gqa
    n = len(seqused_k)
    assert cu_seq_q.shape == (n + 1,) and block_table.shape[0] == n and int(cu_seq_q[-1]) == T
    assert max_q == int(cu_seq_q.diff().max()) and max_k >= int(seqused_k.max())
    assert window_size[0] >= -1 and window_size[1] == 0
    ends = zip(cu_seq_q.diff().tolist(), seqused_k.tolist(), strict=True)
    batch = SimpleNamespace(
        positions=torch.cat([torch.arange(length - rows, length) for rows, length in ends]),
        cu_seqlens=cu_seq_q, seq_lens=seqused_k, block_tables=block_table, max_seq_len=max_k,
        num_decodes=cu_seq_q.diff().tolist().count(1),
    )  # fmt: skip
    # back to our layout: the same memory, read as it lies
    k, v = (x.transpose(1, 2) for x in (key, value))
    assert k.is_contiguous() and v.is_contiguous()
    return sdpa_attention(query.float(), k.float(), v.float(), batch, window_size[0]).bfloat16()


@pytest.fixture
def install(monkeypatch):
    """install(function, capability): a card, and what torch has for it: None is nothing."""

    def install(function=varlen_attn, capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr("microvllm.gpu.backend.has_triton", lambda device: False)
        module = ModuleType("varlen")
        module.varlen_attn = function
        place = "torch.nn.attention.varlen"
        monkeypatch.setitem(sys.modules, place, module if function else None)

    return install


@pytest.mark.parametrize("window", [-1, 0, 20])
@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (8, 1)], ids=str)
def test_it_is_called_as_it_wants_to_be(install, heads, window):
    install()
    flash = pick_backend("flash", CARD, torch.bfloat16)
    assert flash.name == "flash" and flash.block_step == 256
    for sequences in (MIXED, DECODES):
        q, k, v, batch = case(sequences, *heads, 16, 256)
        out = flash.attend(q, k, v, batch, window)
        wanted = sdpa_attention(q.float(), k.float(), v.float(), batch, window)
        assert out.shape == q.shape and out.dtype == q.dtype
        torch.testing.assert_close(out.float(), wanted, rtol=0, atol=2e-2)


def test_torchs_signature_is_the_one_that_is_installed():
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch 2.12 or newer")
    real = inspect.signature(varlen.varlen_attn).parameters
    if "block_table" not in real:
        pytest.skip("torch 2.12 or newer has a block table")
    ours = inspect.signature(varlen_attn).parameters
    assert [(p.name, p.kind, p.default) for p in real.values()] == [
        (p.name, p.kind, p.default) for p in ours.values()
    ]


def test_what_is_missing_is_said(install):
    for older in (None, lambda query, key: None):
        install(older)
        with pytest.raises(ValueError, match="needs a FlashAttention with a block table: pip inst"):
            FlashBackend(CARD, torch.float16)
    install(capability=(7, 5))
    with pytest.raises(ValueError, match="compute capability 8.0 or newer, not 7.5"):
        FlashBackend(CARD, torch.float16)
    with pytest.raises(ValueError, match="float16 and bfloat16 on an NVIDIA GPU"):
        FlashBackend(CARD, torch.float32)
    with pytest.raises(ValueError, match="deterministic=True is for attention='triton'"):
        FlashBackend(CARD, torch.float16, deterministic=True)


def test_blocks_that_torch_cannot_take_are_refused(install, monkeypatch):
    install()
    flash = FlashBackend(CARD, torch.bfloat16)
    flash.device = torch.device("cpu")  # where its weights can be
    monkeypatch.setattr("microvllm.loading.pick_backend", lambda *_: flash)
    with pytest.raises(
        ValueError, match="block_size=16: .*use block_size=256 or attention='triton'"
    ):
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
        out = flash.attend(q, k, v, batch, window)
        wanted = sdpa_attention(q.float(), k.float(), v.float(), batch, window)
        torch.testing.assert_close(out.float(), wanted, rtol=0, atol=2e-2)
