"""The backends of a GPU for the fused model, and weights in float8."""

import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..fused.backend import Backend, filter_values
from ..fused.int8_cache import Int8CacheBackend
from ..fused.linear import Linear
from ..sampler import to_device
from . import compiler_problem, has_triton, takes_triton
from .prefixes import SharedPrefixes, shares_prefixes
from .upload import Uploader


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round x (T, C) to float8 (4 bits of exponent, 3 of fraction, 448 at most). Returns it and the
    scale of each row, (T, 1) float32."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp_(min=1e-30) / 448
    return (x / scale).to(torch.float8_e4m3fn), scale


class GpuBackend(Backend):
    """Attention in torch; elementwise kernels and the draw in Triton, if it runs here; float8."""

    draw: Callable[..., Tensor] | None = None  # launches the kernels of `sample`
    fp8_rows = staticmethod(fp8_rows)  # of the inputs of a product
    uploader: Uploader | None = None

    def __init__(self, device: torch.device, dtype: torch.dtype, deterministic: bool = False):
        super().__init__(device, dtype, deterministic)
        if has_triton(device):
            from . import elementwise, sampler

            self.add_norm = elementwise.add_norm
            self.relu2 = elementwise.relu2
            self.rope_store = elementwise.rope_store
            self.draw = sampler.sample
            self.fp8_rows = elementwise.fp8_rows

    def prepare(self, model) -> None:
        """Compare the kernels with plain torch, and use only those that agree."""
        has_blocks = self.block_size % self.block_step == 0  # other sizes are rejected later
        if self.device.type == "cuda" and has_triton(self.device) and has_blocks:
            from .self_check import check_kernels

            self.use_plain(check_kernels(self, shapes_of(model)))

    def use_plain(self, results: dict[str, str]) -> None:
        """Replace wrong kernels by plain torch, with a warning. results: those of `check_kernels`.
        With deterministic=True it raises ValueError, because plain torch does not fix the bits."""
        from .self_check import FORMS

        wrong = {title: error for title, error in results.items() if error}
        if not wrong:
            return
        errors = "; ".join(f"{title} ({error})" for title, error in wrong.items())
        report = "please report what `microvllm info --check` prints"
        if self.deterministic:
            raise ValueError(
                f"deterministic=True does not work on {self.device}, because kernels failed their "
                f"check: {errors}; leave it out, and {report}"
            )
        attributes = {FORMS[title].attribute for title in wrong}
        for attribute in attributes:
            vars(self).pop(attribute, None)  # so that the function of the class is used
        if "prefixes" in attributes and "attend" in vars(self):
            self.attend = partial(self.attend, prefixes=None)
        if not attributes <= {"few_rows", "fp8_rows", "prefixes"}:
            self.can_record = False  # a plain function may wait for the device
        warnings.warn(
            f"kernels failed their check on {self.device}, so plain torch replaces them, which is "
            f"slower: {errors}; {report}",
            stacklevel=2,
        )

    def fill(self, target: Tensor, source: Tensor) -> None:
        is_upload = target.device.type == "cuda" and source.device.type == "cpu"
        if not is_upload or source.numel() < 2**16:
            super().fill(target, source)
            return
        if self.uploader is None:
            self.uploader = Uploader(self.device)
        self.uploader.fill(target, source)

    def check_quantization(self, quantization: str, config) -> None:
        # torch._scaled_mm multiplies rows with scales only on these cards
        is_cuda = self.device.type == "cuda"
        capability = torch.cuda.get_device_capability(self.device) if is_cuda else (0, 0)
        is_able = capability >= (8, 9) and not torch.version.hip
        if quantization != "fp8" or not is_able or self.dtype != torch.bfloat16:
            super().check_quantization(quantization, config)
        kv_width = config.n_kv_head * config.head_dim
        if config.n_embd % 16 or kv_width % 16:
            raise ValueError(
                "quantization='fp8' needs widths that are multiples of 16, and this model has "
                f"{config.n_embd}, and {kv_width} for K and V"
            )
        if self.deterministic:
            raise ValueError(
                "quantization='fp8' does not support deterministic=True, because cuBLAS computes "
                "its products"
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
    """Attention in Triton as well. With deterministic=True, the matrix products are in Triton too:
    their rows do not depend on the batch."""

    name = "triton"
    can_record = True
    prefixes: SharedPrefixes | None = None  # set if shared blocks are read once for several decodes

    def __init__(self, device: torch.device, dtype: torch.dtype, deterministic: bool = False):
        super().__init__(device, dtype, deterministic)
        from . import attention, elementwise, launch

        if shares_prefixes() and not deterministic:
            self.prefixes = SharedPrefixes()
        counts = attention.make_counts(device)
        self.attend = partial(attention.paged_attention, counts=counts, prefixes=self.prefixes)
        if launch.TRITON_34 and torch.version.hip is None and not deterministic:
            self.few_rows = True
        if deterministic:
            self.attend = attention.fixed_attention
            self.product = elementwise.linear

    def check(self) -> None:
        problem = compiler_problem(self.device) if takes_triton(self.device) else None
        if problem is not None:
            raise ValueError(f"attention='triton': {problem}, or use 'auto'")
        if not has_triton(self.device):
            raise ValueError(
                "attention='triton' needs a GPU (NVIDIA Ampere or newer, or AMD) and triton, and "
                f"the device is {self.device}; use 'auto'"
            )


class Int8TritonBackend(TritonBackend, Int8CacheBackend):
    """TritonBackend with K and V in 8 bits. The kernels recognise them by the dtype."""


def shapes_of(model):
    """The shapes for which the kernels of a model are compiled."""
    from .self_check import Shapes

    return Shapes(
        config=model.config,
        local=model.local,
        recipe=model.recipe,
        cache=model.kv_layout,
        block_size=model.backend.block_size,
        is_fp8=model.store == "fp8",
    )


class Float8(Linear):
    """Weights and inputs of each product in float8, with a scale for each row of both."""

    def load(self, parts: list[Tensor]) -> None:
        # padding rows: the product needs a multiple of 16 outputs
        padded = torch.cat([*parts, parts[0].new_zeros(-sum(self.sizes) % 16, self.width)])
        weight, scale = fp8_rows(padded.to(self.device, torch.float32))
        if self.weight is None:
            self.weight = weight
            self.scale = scale
        else:  # in place, because recorded steps read these addresses
            self.weight.copy_(weight)
            self.scale.copy_(scale)

    def multiply(self, x: Tensor) -> Tensor:
        # both scales are applied to the float32 sums, which are then rounded to bfloat16
        rows, row_scale = self.backend.fp8_rows(x)
        y = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=row_scale,
            scale_b=self.scale.t(),
            out_dtype=torch.bfloat16,
        )
        return y[:, : self.rows].to(x.dtype)
