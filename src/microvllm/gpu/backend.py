"""What a GPU provides for the fused model, and weights in float8."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..fused.backend import Backend, filter_values
from ..fused.linear import Linear
from ..sampler import to_device
from . import has_triton
from .upload import Uploader


class GpuBackend(Backend):
    """Triton's elementwise kernels and draw, where it runs, and float8; attention in torch."""

    draw: Callable[..., Tensor] | None = None  # the kernels of `sample`
    uploader: Uploader | None = None

    def __init__(self, device: torch.device, dtype: torch.dtype, deterministic: bool = False):
        super().__init__(device, dtype, deterministic)
        if has_triton(device):
            from . import elementwise, sampler

            self.add_norm = elementwise.add_norm
            self.relu2 = elementwise.relu2
            self.rope_store = elementwise.rope_store
            self.draw = sampler.sample

    def fill(self, target: Tensor, source: Tensor) -> None:
        is_upload = target.device.type == "cuda" and source.device.type == "cpu"
        if not is_upload or source.numel() < 2**16:
            super().fill(target, source)
            return
        if self.uploader is None:
            self.uploader = Uploader(self.device)
        self.uploader.fill(target, source)

    def check_quantization(self, quantization: str, config) -> None:
        # where torch._scaled_mm has a product of scaled rows
        is_cuda = self.device.type == "cuda"
        capability = torch.cuda.get_device_capability(self.device) if is_cuda else (0, 0)
        is_able = capability >= (8, 9) and not torch.version.hip
        if quantization != "fp8" or not is_able or self.dtype != torch.bfloat16:
            super().check_quantization(quantization, config)
        if config.n_embd % 16 or config.n_kv_head * config.head_dim % 16:
            raise ValueError(f"quantization='fp8' needs widths in steps of 16, not {config.n_embd}")
        if self.deterministic:
            raise ValueError(
                "quantization='fp8' has no deterministic=True: cuBLAS does its products"
            )

    def linear_class(self, quantization: str | None, **layout) -> type[Linear]:
        return Float8 if quantization == "fp8" else super().linear_class(quantization, **layout)

    def sample(self, logits: Tensor, params, temperature, uniform, softcap: float) -> Tensor:
        if self.draw is None:
            return super().sample(logits, params, temperature, uniform, softcap)
        filters = filter_values(params)
        if filters is not None:
            filters = to_device(np.ascontiguousarray(filters.T, np.float32), logits.device)
        return self.draw(logits, temperature, uniform, softcap, filters)


class TritonBackend(GpuBackend):
    """Triton's attention as well and, with deterministic=True, a product whose rows do not depend
    on their batch."""

    name = "triton"

    def __init__(self, device: torch.device, dtype: torch.dtype, deterministic: bool = False):
        super().__init__(device, dtype, deterministic)
        from . import attention, elementwise

        counts = attention.make_counts(device)
        self.attend = partial(attention.paged_attention, counts=counts)
        if deterministic:
            self.attend = attention.fixed_attention
            self.product = elementwise.linear

    def check(self) -> None:
        if not has_triton(self.device):
            raise ValueError(
                "attention='triton' needs a GPU (of NVIDIA's, Ampere or newer) and triton, and the "
                f"device is {self.device}; use 'auto'"
            )


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, C) as float8 (4 bits of exponent, 3 of fraction, 448 at most), and what 1 is worth in
    each row, (T, 1) float32."""
    if has_triton(x.device):
        from . import elementwise

        return elementwise.fp8_rows(x)
    scale = x.abs().amax(-1, keepdim=True).float().clamp_(min=1e-30) / 448
    return (x / scale).to(torch.float8_e4m3fn), scale


class Float8(Linear):
    """float8, the inputs of each product as well, one scale for each row of either."""

    def load(self, parts: list[Tensor]) -> None:
        # rows of padding: the product wants outputs in steps of 16
        whole = torch.cat([*parts, parts[0].new_zeros(-sum(self.sizes) % 16, self.width)])
        weight, scale = fp8_rows(whole.to(self.device, torch.float32))
        if self.weight is None:
            self.weight = weight
            self.scale = scale
        else:  # where recorded steps read them
            self.weight.copy_(weight)
            self.scale.copy_(scale)

    def multiply(self, x: Tensor) -> Tensor:
        # both scales are applied to the float32 sums, which are then rounded to bfloat16
        rows, row_scale = fp8_rows(x)
        y = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=row_scale,
            scale_b=self.scale.t(),
            out_dtype=torch.bfloat16,
        )
        return y[:, : self.rows].to(x.dtype)
