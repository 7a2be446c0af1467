"""Weights in panels and in int8, see fused/linear.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fused.linear import Linear, stack
from .products import PANEL8, linear, panels
from .steps import linear8, quantize_rows


class Panels(Linear):
    """In panels, for our own product, see products.py."""

    row_exact = fuses_relu2 = True

    def load(self, parts: list[Tensor]) -> None:
        whole = stack(parts).to(dtype=self.dtype).contiguous()
        self.weight = panels(whole, self.weight)

    def multiply(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.rows, self.relu2)


def rotate(x: Tensor) -> Tensor:
    """x (T, C) times a Hadamard matrix of +-1 over 32 channels each, that lie C / 32 apart.

    A residual stream has a few channels that are far larger than all others, and a scale that fits
    them leaves little of the rest. Here each number is spread over 32 (Ashkboos et al. 2024,
    QuaRot); with inputs and weights turned alike a product does not change, but for a factor: twice
    is x * min(32, C & -C).
    """
    size = min(32, x.shape[1] & -x.shape[1])
    half, y = x.shape[1] // 2, x
    while half >= x.shape[1] // size:
        a, b = y.reshape(len(x), -1, 2, half).unbind(2)
        y, half = torch.stack((a + b, a - b), 2), half // 2
    return y.reshape(x.shape)


def _int8(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A weight, rotated, as int8 (out, in), and what 1 is worth in each row, (out,) float32."""
    whole, width = rotate(torch.cat(parts).to(torch.float32)), parts[0].shape[1]
    whole /= min(32, width & -width)  # what rotating both has multiplied by
    scale = whole.abs().amax(-1).clamp_(min=1e-30) / 127
    return (whole / scale[:, None]).round_().to(torch.int8), scale


class Int8(Linear):
    """int8, the inputs of each product as well, one scale for each row of either: oneDNN's."""

    fuses_relu2 = True

    def load(self, parts: list[Tensor]) -> None:
        whole, self.scale = _int8(parts)
        self.zeros = torch.zeros(len(whole), dtype=torch.int64)
        self.weight = torch.ops.onednn.qlinear_prepack(whole, None)
        # without the instructions for them, sums of two products of int8 are held in 16 bits
        self.levels = 127 if torch.cpu._is_vnni_supported() else 63

    def multiply(self, x: Tensor) -> Tensor:
        return self._product(x, self.relu2)[:, : self.rows]

    def _product(self, x: Tensor, relu2: bool = False) -> Tensor:
        x, scale = quantize_rows(x, self.levels)
        alone = len(x) == 1  # a row's scale can go along, those of several cannot
        y = torch.ops.onednn.qlinear_pointwise(
            x, scale.item() if alone else 1.0, 128, self.weight, self.scale, self.zeros, None, 1.0,
            0, torch.float32, "relu" if relu2 else "none", [], "",
        )  # fmt: skip
        y = y if alone else y.mul_(scale)
        return y.square_() if relu2 else y


class Int8Panels(Linear):
    """The same by our own product."""

    row_exact = fuses_relu2 = True

    def load(self, parts: list[Tensor]) -> None:
        whole, scale = _int8(parts)
        whole = F.pad(whole, (0, 0, 0, -len(whole) % PANEL8))
        offset = 128 * whole.sum(1, dtype=torch.int32)  # of inputs that are stored plus 128
        scale = F.pad(scale, (0, len(whole) - len(scale)))
        if self.weight is None:
            self.weight = panels(whole.view(torch.int32)), offset, scale
        else:  # where the compiled layers read them
            panels(whole.view(torch.int32), self.weight[0])
            self.weight[1].copy_(offset), self.weight[2].copy_(scale)

    def multiply(self, x: Tensor) -> Tensor:
        return linear8(x, self.weight, self.rows, self.relu2)
