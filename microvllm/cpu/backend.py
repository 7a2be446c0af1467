"""What a CPU with numba offers to the fused model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..fused.backend import Backend, filter_values
from . import products, sampler, steps
from .attention import paged_attention
from .layers import Layers
from .layouts import Int8, Int8Panels, Panels


class CpuBackend(Backend):
    """Kernels in numba, float32 in and out; matrices, tables, K and V may be in bfloat16."""

    name = "numba"
    attend = staticmethod(paged_attention)
    add_norm = staticmethod(steps.add_norm)
    rope_store = staticmethod(steps.rope_store)

    def check(self) -> None:
        if self.device.type != "cpu" or self.dtype == torch.float16:
            raise ValueError(
                "attention='numba' runs in float32 and bfloat16 on a CPU, not "
                f"{self.dtype} on {self.device}"
            )

    def check_quantization(self, quantization: str, config) -> None:
        if quantization != "int8" or self.dtype != torch.float32:
            super().check_quantization(quantization, config)
        if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
            raise ValueError("quantization='int8' needs a torch with oneDNN, which this one lacks")

    def linear_class(self, quantization: str | None, shared: bool, width: int, dtype) -> type:
        if quantization == "int8":
            return Int8Panels if products.PANEL8 and width % 4 == 0 else Int8
        if not shared and products.PANEL and dtype == torch.float32:
            return Panels
        return super().linear_class(quantization, shared, width, dtype)

    def compile(self, model) -> Callable | None:
        """One call, if all weights are in panels, whole ones where outputs lie side by side."""
        layers = [w for x in model.layers for w in (x.qkv, x.proj, x.fc, x.mlp_proj)]
        if all(isinstance(w, (Panels, Int8Panels)) for w in (*layers, model.lm_head)):
            if all(sum(w.sizes) % products.PANEL == 0 for w in layers):
                return Layers(model)
        return None

    def sample(self, logits: Tensor, params, temperature, uniform, softcap: float) -> Tensor:
        filters = filter_values(params)
        return sampler.sample(logits.float(), temperature, uniform, softcap, filters)
