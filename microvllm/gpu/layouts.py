"""Weights in float8, see fused/linear.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..fused.linear import Linear
from . import has_triton


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, C) as float8 (4 bits of exponent, 3 of fraction, 448 at most), and what 1 is worth in
    each row, (T, 1) float32."""
    if has_triton(x.device):
        from . import steps

        return steps.fp8_rows(x)
    scale = x.abs().amax(-1, keepdim=True).float().clamp_(min=1e-30) / 448
    return (x / scale).to(torch.float8_e4m3fn), scale


class Float8(Linear):
    """float8, the inputs of each product as well, one scale for each row of either."""

    def load(self, parts: list[Tensor]) -> None:
        # rows of padding: the product wants outputs in steps of 16
        whole = torch.cat([*parts, parts[0].new_zeros(-sum(self.sizes) % 16, self.width)])
        new = fp8_rows(whole.to(self.device, torch.float32))
        if self.weight is None:
            self.weight, self.scale = new
        else:  # where recorded steps read them
            self.weight.copy_(new[0]), self.scale.copy_(new[1])

    def multiply(self, x: Tensor) -> Tensor:
        # both scales are applied to the float32 sums, which are then rounded to bfloat16
        rows, scale = fp8_rows(x)
        weight, scales = self.weight.t(), (scale, self.scale.t())
        y = torch._scaled_mm(rows, weight, *scales, out_dtype=torch.bfloat16)
        return y[:, : self.rows].to(x.dtype)
