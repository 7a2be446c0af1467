"""FlashAttention with a paged cache: attention="flash".

Three packages have it, each by another name. All take K and V as (blocks, slots, heads, D), of
which only the last has to be contiguous: ours, with two axes exchanged, are read as they lie.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import GpuBackend

FLASH3 = "kernels-community/flash-attn3"  # on the Hugging Face hub


class FlashBackend(GpuBackend):
    """The best FlashAttention that is installed and runs on this card."""

    name = "flash"
    block_step_reason = (
        "torch's FlashAttention wants blocks of 256 tokens: block_size=256, or attention='triton', "
        "or pip install flash-attn-4 or kernels, which take any"
    )

    def __init__(self, device: torch.device, dtype: torch.dtype, deterministic: bool = False):
        super().__init__(device, dtype, deterministic)
        self.attend, self.block_step = pick_flash(device, dtype)

    def check(self) -> None:
        if self.deterministic:
            raise ValueError("deterministic=True is for attention='triton' on a GPU, not 'flash'")


def pick_flash(device: torch.device, dtype: torch.dtype) -> tuple[Callable[..., Tensor], int]:
    """A function with the signature of `sdpa_attention`, and of what number its block size must be
    a multiple. Raises ValueError saying what is missing."""
    if device.type != "cuda" or torch.version.hip or dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            "attention='flash' is for float16 and bfloat16 on a GPU of NVIDIA's, not "
            f"{dtype} on {device}; use 'auto'"
        )
    card = torch.cuda.get_device_capability(device)
    for name, cards, block_step, load in (
        ("flash_attn_interface", (9,), 1, _flash3),
        ("flash_attn.cute", (9, 10), 1, _flash4),
        # 2 is built for every torch from 2.9 on, 1 for each of them up to 2.12
        *(
            ("kernels", (9,), 1, lambda hub, i=i: _flash3(hub.get_kernel(FLASH3, version=i)))
            for i in (2, 1)
        ),
        ("torch.nn.attention.varlen", (8, 9, 10, 11, 12), 256, _flash_of_torch),
    ):
        if card[0] in cards:
            try:
                return load(importlib.import_module(name)), block_step
            except Exception:  # not there, too old for a block table, or its hub out of reach
                continue
    raise ValueError(
        "attention='flash' found no FlashAttention with a block table for a card of compute "
        f"capability {card[0]}.{card[1]}: pip install 'torch>=2.12' (8.0 or newer), or "
        "flash-attn-4 or kernels>=0.12 (9.0); attention='triton' needs none of them"
    )


def _flash3(module) -> Callable[..., Tensor]:
    """FlashAttention-3 (Shah et al. 2024), blocks of any size. https://github.com/Dao-AILab/
    flash-attention, hopper/flash_attn_interface.py."""
    flash = module.flash_attn_with_kvcache

    def attend(q, k, v, batch, window):
        return flash(
            q, k.transpose(1, 2), v.transpose(1, 2), cache_seqlens=batch.seq_lens,
            page_table=batch.block_tables, cu_seqlens_q=batch.cu_seqlens,
            max_seqlen_q=batch.max_query, causal=True, window_size=(window, min(window, 0)),
        )  # fmt: skip

    return attend


def _flash4(module) -> Callable[..., Tensor]:
    """FlashAttention-4, blocks of any size; None is no limit of a window. The same repository,
    flash_attn/cute/interface.py."""
    flash = module.flash_attn_varlen_func

    def attend(q, k, v, batch, window):
        out = flash(
            q, k.transpose(1, 2), v.transpose(1, 2), cu_seqlens_q=batch.cu_seqlens,
            max_seqlen_q=batch.max_query, max_seqlen_k=batch.max_seq, seqused_k=batch.seq_lens,
            page_table=batch.block_tables, causal=True,
            window_size=(window, 0) if window >= 0 else (None, None),
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    return attend


def _flash_of_torch(module) -> Callable[..., Tensor]:
    """torch's own, FlashAttention-2 unless another was activated: blocks of a multiple of 256."""
    flash = module.varlen_attn
    if "block_table" not in inspect.signature(flash).parameters:
        raise AttributeError

    def attend(q, k, v, batch, window):
        # its kernel wants the keys' running sum, too, and then reads the lengths. one split: with
        # more the rows after the first sequence's stay unwritten (pytorch/pytorch#194167)
        sums = F.pad(batch.seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
        return flash(
            q, k.transpose(1, 2), v.transpose(1, 2), batch.cu_seqlens, sums, batch.max_query,
            batch.max_seq, window_size=(window, 0), enable_gqa=True, seqused_k=batch.seq_lens,
            block_table=batch.block_tables, num_splits=1,
        )  # fmt: skip

    return attend
