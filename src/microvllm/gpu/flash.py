"""attention="flash": torch's FlashAttention (Dao et al., 2022) with a block table.

It takes K and V as (blocks, slots, heads, D). Only the last axis must be contiguous, so it reads
the layout of this project with two axes exchanged, without a copy.
"""

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from .backend import GpuBackend


class FlashBackend(GpuBackend):
    """torch's FlashAttention; the other operations in Triton, where it runs."""

    name = "flash"
    block_step = 256
    block_step_reason = (
        "torch's FlashAttention needs blocks of 256 tokens: use block_size=256 or "
        "attention='triton'"
    )

    def check(self) -> None:
        """Raises ValueError if torch has no FlashAttention with a block table here."""
        if self.deterministic:
            raise ValueError("deterministic=True is for attention='triton' on a GPU, not 'flash'")
        half = self.dtype in (torch.float16, torch.bfloat16)
        if self.device.type != "cuda" or torch.version.hip or not half:
            raise ValueError(
                "attention='flash' is for float16 and bfloat16 on an NVIDIA GPU, not "
                f"{self.dtype} on {self.device}; use 'auto'"
            )
        major, minor = torch.cuda.get_device_capability(self.device)
        if major < 8:
            raise ValueError(
                "attention='flash' needs a card of compute capability 8.0 or newer, not "
                f"{major}.{minor}; use 'auto'"
            )
        self.attend = partial(attend, find_varlen_attn())


def find_varlen_attn() -> Callable[..., Tensor]:
    """Return torch's varlen_attn. Raises ValueError if it takes no block table."""
    with suppress(ImportError):  # torch 2.9 or older
        from torch.nn.attention.varlen import varlen_attn

        if "block_table" in inspect.signature(varlen_attn).parameters:
            return varlen_attn
    raise ValueError(
        "attention='flash' needs a FlashAttention with a block table: pip install 'torch>=2.12' "
        f"(not {torch.__version__}), or use attention='triton'"
    )


def attend(varlen_attn, q: Tensor, k: Tensor, v: Tensor, batch, window: int) -> Tensor:
    """Attention as attention.py describes it, by torch's function."""
    # the function requires the running sum of the lengths, but its kernel reads seqused_k. one
    # split: with more, only the rows of the first sequence are written (pytorch/pytorch#194167)
    sums = torch.nn.functional.pad(batch.seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
    return varlen_attn(
        q, k.transpose(1, 2), v.transpose(1, 2), batch.cu_seqlens, sums, batch.max_query_len,
        batch.max_seq_len, window_size=(window, 0), enable_gqa=True, seqused_k=batch.seq_lens,
        block_table=batch.block_tables, num_splits=1,
    )  # fmt: skip
