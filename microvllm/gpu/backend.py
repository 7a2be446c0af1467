"""What a GPU offers to the fused model."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..fused.backend import Backend, filter_values
from ..sampler import on
from . import has_triton
from .layouts import Float8


class GpuBackend(Backend):
    """Triton's steps and draw, where it runs, and float8; attention in torch."""

    def __init__(self, device: torch.device, dtype: torch.dtype, deterministic: bool = False):
        super().__init__(device, dtype, deterministic)
        self.kernels = has_triton(device)
        if self.kernels:
            from . import steps

            self.add_norm, self.relu2 = steps.add_norm, steps.relu2
            self.rope_store = steps.rope_store

    def check_quantization(self, quantization: str, config) -> None:
        # where torch._scaled_mm has a product of scaled rows
        card = torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else ()
        here = card >= (8, 9) and not torch.version.hip and self.dtype == torch.bfloat16
        if quantization != "fp8" or not here:
            super().check_quantization(quantization, config)
        if config.n_embd % 16 or config.n_kv_head * config.head_dim % 16:
            raise ValueError(f"quantization='fp8' needs widths in steps of 16, not {config.n_embd}")
        if self.deterministic:
            raise ValueError(
                "quantization='fp8' has no deterministic=True: cuBLAS does its products"
            )

    def linear_class(self, quantization: str | None, shared: bool, width: int, dtype) -> type:
        if quantization == "fp8":
            return Float8
        return super().linear_class(quantization, shared, width, dtype)

    def sample(self, logits: Tensor, params, temperature, uniform, softcap: float) -> Tensor:
        if not self.kernels:
            return super().sample(logits, params, temperature, uniform, softcap)
        from . import sampler

        filters = filter_values(params)
        if filters is not None:
            filters = on(logits.device, np.ascontiguousarray(filters.T, np.float32))
        return sampler.sample(logits, temperature, uniform, softcap, filters)


class TritonBackend(GpuBackend):
    """Triton's attention as well and, where it is asked for, a product whose rows do not depend on
    their batch."""

    name = "triton"

    def __init__(self, device: torch.device, dtype: torch.dtype, deterministic: bool = False):
        super().__init__(device, dtype, deterministic)
        from . import attention, steps

        self.attend = attention.paged_attention
        if deterministic:
            self.attend, self.product = attention.fixed_attention, steps.linear

    def check(self) -> None:
        if not has_triton(self.device):
            raise ValueError(
                "attention='triton' needs a GPU (of NVIDIA's, Ampere or newer) and triton, and the "
                f"device is {self.device}; use 'auto'"
            )
