"""FlashAttention with a paged cache: attention="flash".

Three packages have it, each by another name. All take K and V as (blocks, slots, heads, D), of
which only the last has to be contiguous: ours, with two axes exchanged, are read as they lie.
"""

import inspect
from contextlib import suppress
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from .backend import GpuBackend


class FlashBackend(GpuBackend):
    """The best FlashAttention that is installed and runs on this card."""

    name = "flash"
    block_step_reason = (
        "torch's FlashAttention wants blocks of 256 tokens: block_size=256, or attention='triton', "
        "or pip install flash-attn-4 or kernels, which take any"
    )

    def check(self) -> None:
        """Takes the first of PACKAGES that can be had; raises ValueError if there is none."""
        if self.deterministic:
            raise ValueError("deterministic=True is for attention='triton' on a GPU, not 'flash'")
        half = self.dtype in (torch.float16, torch.bfloat16)
        if self.device.type != "cuda" or torch.version.hip or not half:
            raise ValueError(
                "attention='flash' is for float16 and bfloat16 on a GPU of NVIDIA's, not "
                f"{self.dtype} on {self.device}; use 'auto'"
            )
        major, minor = torch.cuda.get_device_capability(self.device)
        for place, name, call, cards, step in PACKAGES:
            # it may not be there, be too old for a block table, or its hub be out of reach
            with suppress(Exception):
                if major in cards:
                    self.attend, self.block_step = partial(call, find(place, name)), step
                    return
        raise ValueError(
            "attention='flash' found no FlashAttention with a block table for a card of compute "
            f"capability {major}.{minor}: pip install 'torch>=2.12' (8.0 or newer), or "
            "flash-attn-4 or kernels>=0.12 (9.0); attention='triton' needs none of them"
        )


def find(place: str | int, name: str):
    """A function of a module, or of a version of FlashAttention-3 on the Hugging Face hub. Raises
    whatever comes if there is none with a block table."""
    if isinstance(place, int):
        hub = import_module("kernels")
        return getattr(hub.get_kernel("kernels-community/flash-attn3", version=place), name)
    found = getattr(import_module(place), name)
    if name == "varlen_attn" and "block_table" not in inspect.signature(found).parameters:
        raise AttributeError("block_table")
    return found


def flash3(flash, q, k, v, batch, window: int) -> Tensor:
    """FlashAttention-3 (Shah et al. 2024), blocks of any size. https://github.com/Dao-AILab/
    flash-attention, hopper/flash_attn_interface.py."""
    return flash(
        q, k.transpose(1, 2), v.transpose(1, 2), cache_seqlens=batch.seq_lens,
        page_table=batch.block_tables, cu_seqlens_q=batch.cu_seqlens,
        max_seqlen_q=batch.max_query_len, causal=True, window_size=(window, min(window, 0)),
    )  # fmt: skip


def flash4(flash, q, k, v, batch, window: int) -> Tensor:
    """FlashAttention-4, blocks of any size; None is no limit of a window. The same repository,
    flash_attn/cute/interface.py."""
    out = flash(
        q, k.transpose(1, 2), v.transpose(1, 2), cu_seqlens_q=batch.cu_seqlens,
        max_seqlen_q=batch.max_query_len, max_seqlen_k=batch.max_seq_len, seqused_k=batch.seq_lens,
        page_table=batch.block_tables, causal=True,
        window_size=(window, 0) if window >= 0 else (None, None),
    )  # fmt: skip
    return out[0] if isinstance(out, tuple) else out


def flash_of_torch(flash, q, k, v, batch, window: int) -> Tensor:
    """torch's own, FlashAttention-2 unless another was activated: blocks of a multiple of 256."""
    # its kernel wants the keys' running sum, too, and then reads the lengths. one split: with more
    # the rows after the first sequence's stay unwritten (pytorch/pytorch#194167)
    sums = torch.nn.functional.pad(batch.seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
    return flash(
        q, k.transpose(1, 2), v.transpose(1, 2), batch.cu_seqlens, sums, batch.max_query_len,
        batch.max_seq_len, window_size=(window, 0), enable_gqa=True, seqused_k=batch.seq_lens,
        block_table=batch.block_tables, num_splits=1,
    )  # fmt: skip


# the best first: where it is, its name, how it is called, on which cards it runs (their major
# number), and of what number blocks must be a multiple
PACKAGES = (
    ("flash_attn_interface", "flash_attn_with_kvcache", flash3, (9,), 1),
    ("flash_attn.cute", "flash_attn_varlen_func", flash4, (9, 10), 1),
    # 2 is built for every torch from 2.9 on, 1 for each of them up to 2.12
    (2, "flash_attn_with_kvcache", flash3, (9,), 1),
    (1, "flash_attn_with_kvcache", flash3, (9,), 1),
    ("torch.nn.attention.varlen", "varlen_attn", flash_of_torch, (8, 9, 10, 11, 12), 256),
)
