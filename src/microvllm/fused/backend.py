"""What a device offers to the fused model, in plain torch, with which kernels are compared."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import sdpa_attention, store, visible
from ..model import GPTConfig, norm, rotate
from ..sampler import SamplingParams, sample
from .linear import Linear, Packed, Shared, has_onednn

# numbers that are gathered at a time, of K and of V each: 256 MB of float32. With all decodes at
# once, padded to the longest, a few long sequences in a full batch would take gigabytes in mid-run
GATHERED = 2**26
NO_FILTERS = 0, 1.0, 0.0  # top_k, top_p and min_p that drop nothing


def filter_values(params: Seq[SamplingParams]) -> np.ndarray | None:
    """(R, 3) top_k, top_p and min_p of each row, None if all of them are off."""
    if True not in [p.truncated for p in params]:
        return None
    return np.array([(p.top_k or 0, p.top_p, p.min_p) for p in params], np.float64)


class Backend:
    """Functions on the tensors of one device. Raises ValueError for what cannot be here.

    deterministic: the bits of a row may depend on nothing but its sequence up to there. Seam: cpu/,
    gpu/ override what they have kernels for.
    """

    name = "sdpa"
    block_step = 1  # block_size must be a multiple of it
    block_step_reason = ""  # why
    product = staticmethod(F.linear)  # of x and a weight
    sample = staticmethod(sample)  # see sampler.py

    def __init__(self, device: torch.device, dtype: torch.dtype, deterministic: bool = False):
        self.device, self.dtype, self.deterministic = device, dtype, deterministic
        # rows of library products that are done together, so that they all get the same bits
        self.sliced = deterministic and device.type == "cpu"
        self.check()

    def check(self) -> None:
        """Raises ValueError if this backend cannot run here, saying why."""
        if self.deterministic:
            raise ValueError(
                "deterministic=True is for attention='numba' on a CPU (pip install numba, float32 "
                "or bfloat16) and 'triton' on a GPU (pip install triton), not 'sdpa' on "
                f"{self.device}"
            )

    def check_quantization(self, quantization: str, config) -> None:
        """Raises ValueError if weights of so few bits cannot be here."""
        if quantization != "fp8":
            raise ValueError(
                f"quantization={quantization!r} is for float32 on a CPU with attention='numba', "
                f"not {self.dtype} on {self.device} with {self.name!r}"
            )
        raise ValueError(
            "quantization='fp8' is for bfloat16 on an NVIDIA card of compute capability 8.9 or "
            f"newer (Ada, Hopper), not {self.dtype} on {self.device}; on a CPU there is 'int8', "
            "and 'int6', 'int5' and 'int4'"
        )

    def takes(self, quantization: str) -> bool:
        """Are there products with a matrix that a folder has in so few bits? Else it becomes one of
        floats."""
        return False

    def linear_class(
        self, quantization: str | None, shared: bool, width: int, dtype, head: bool = False
    ) -> type:
        """The class for a weight matrix of `width` inputs. quantization: None, or the name of fewer
        bits; shared: the given tensors can be used as they are; dtype: in which it is kept; head:
        it is lm_head, which may need more bits."""
        if shared:
            return Shared
        return Packed if self.device.type == "cpu" and has_onednn(dtype) else Linear

    def fill(self, target: Tensor, source: Tensor) -> None:
        """Write a weight to where it is kept. Seam: the way from a file to a device's memory."""
        target.copy_(source)

    def kv_layout(self, config: GPTConfig, dtype) -> tuple[GPTConfig, torch.dtype]:
        """The shape and dtype of K and V in memory, of a model that computes them as given."""
        return config, dtype

    def compile(self, model) -> Callable | None:
        """All layers of the model as one function of (batch, cache), where there is one."""
        return None

    def prepare(self, model) -> None:
        """Called when a model is complete. Seam: kernels that take long to compile."""

    def is_ready(self) -> bool:
        """Asked at the beginning of each step: may the function of `compile` be called?"""
        return True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch, window: int) -> Tensor:
        """sdpa_attention with fewer calls: decodes in padded batches, as many at a time as GATHERED
        allows, longer chunks one by one."""
        block_size, n = k.shape[2], batch.num_decodes
        if not n:
            return sdpa_attention(q, k, v, batch, window)
        out = torch.empty_like(q)
        width = -(-batch.max_seq // block_size)  # columns of the block tables
        keys_at = torch.arange(width * block_size, device=q.device)
        size = max(1, GATHERED // (k[0].numel() * width))
        for first in range(0, n, size):
            rows = slice(first, min(first + size, n))
            # (rows, blocks, Hkv, block_size, D) -> (rows, Hkv, keys, D)
            tables = batch.block_tables[rows, :width]
            keys, values = (x[tables].transpose(1, 2).flatten(2, 3).to(q.dtype) for x in (k, v))
            mask = visible(batch.positions[rows, None], keys_at, window)[:, None]
            queries = q[rows, :, None]
            y = F.scaled_dot_product_attention(queries, keys, values, mask, enable_gqa=True)
            out[rows] = y[:, :, 0]
        if n < len(batch.seq_lens):
            rest = batch._replace(
                positions=batch.positions[n:], cu_seqlens=batch.cu_seqlens[n:] - n,
                seq_lens=batch.seq_lens[n:], block_tables=batch.block_tables[n:],
            )  # fmt: skip
            out[n:] = sdpa_attention(q[n:], k, v, rest, window)
        return out

    def add_norm(self, x, y, x0, a, b, eps: float) -> tuple[Tensor, Tensor]:
        """Add a branch to the residual stream and norm it for the next one: a * (x + y) + b * x0,
        or x + y without lambdas, and its norm. x, x0 (T, C), y (T, C) or None; a, b: the layer's
        resid and x0 lambdas (0-dim) or None."""
        if y is not None:
            x = x + y
        if a is not None:
            x = a * x + b * x0
        return x, norm(x, eps)

    def rope_store(
        self, qkv, h, ve, ve_gate, cos, sin, batch, k, v, n_head, qk_scale, gate_scale, eps
    ) -> Tensor:
        """Rotate, norm and scale q and k, mix the value embedding into v, write k and v to their
        slots in the layer's k, v (N, Hkv, block_size, D), return q (T, H, D).

        qkv (T, (H + 2 Hkv) D): query, key and value heads side by side; h (T, C) what they were
        computed from (the gate reads its first channels); ve (V, Hkv D) and ve_gate (Hkv, channels)
        or None; cos, sin (positions, D/2).
        """
        qkv = qkv.view(len(qkv), -1, k.shape[3])
        n_kv_head = (qkv.shape[1] - n_head) // 2
        qk, new_v = qkv[:, : n_head + n_kv_head], qkv[:, n_head + n_kv_head :]
        qk = norm(rotate(qk, cos[batch.positions, None], sin[batch.positions, None]), eps)
        if qk_scale != 1.0:
            qk = qk * qk_scale
        if ve is not None:
            gate = gate_scale * torch.sigmoid(F.linear(h[:, : ve_gate.shape[1]], ve_gate))
            new_v = new_v + gate[:, :, None] * F.embedding(batch.ids, ve).view_as(new_v).to(h.dtype)
        store(k, v, qk[:, n_head:], new_v, batch.slots)
        return qk[:, :n_head]

    def relu2(self, x: Tensor) -> Tensor:
        """relu(x)^2, in place."""
        return x.relu_().square_()
