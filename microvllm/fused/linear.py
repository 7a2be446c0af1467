"""Weight matrices and their products.

`Linear` keeps a weight as torch does. The other classes keep it in a layout of their own, or in
smaller numbers, where that is faster; `pick` says where.
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import has_triton


def in_slices(function, x: Tensor, rows: int = 16) -> Tensor:
    """function(x) of x (T, C), always of `rows` rows at a time, the last of them padding: what
    becomes of a row then follows from the row, not from how many others there are."""
    whole = F.pad(x, (0, 0, 0, -len(x) % rows))
    return torch.cat([function(part) for part in whole.split(rows)])[: len(x)]


class Linear:
    """A weight matrix (out, in) and its product, as torch has them.

    parts: matrices of a checkpoint, one on top of the other: q, k and v are one product; rows: how
    many outputs are wanted, the others are padding; squared: relu2 comes after it; ops: the module
    whose relu2 that is; product: of x and a weight; sliced: the bits of a row may not depend on the
    rows beside it, see `in_slices`.
    """

    fixed = False  # True: they never do, there is no need to slice
    squares = False  # True: `multiply` does the relu2, too, if there is to be one

    def __init__(
        self, parts: list[Tensor], device, dtype, *, rows: int | None = None,
        squared: bool = False, ops=None, product=F.linear, sliced: bool = False,
    ):  # fmt: skip
        self.sizes, self.width = [len(part) for part in parts], parts[0].shape[1]
        self.rows = rows or sum(self.sizes)
        self.device, self.dtype, self.product = device, dtype, product
        self.squared, self.ops = squared, ops
        self.weight = None
        self.load(parts)
        self.slice = 0
        if sliced and not self.fixed:
            # do equal rows get equal bits wherever they are? else one is done at a time
            y = self.multiply(torch.arange(self.width).sin().expand(16, -1).contiguous())
            self.slice = 16 if torch.equal(y, y[:1].expand_as(y)) else 1

    def load(self, parts: list[Tensor]) -> None:
        """Take the weights of `parts`; in place where there were others before."""
        if self.weight is None:
            shape = sum(self.sizes), self.width
            self.weight = torch.empty(shape, dtype=self.dtype, device=self.device)
        for view, part in zip(self.weight.split(self.sizes), parts, strict=True):
            view.copy_(part)

    def dense(self) -> list[Tensor]:
        """The parts again; views where the layout allows it."""
        return list(self.weight.split(self.sizes))

    def multiply(self, x: Tensor) -> Tensor:
        """x (T, in) @ weight.T: (T, rows), in x's dtype."""
        return self.product(x.to(self.dtype), self.weight[: self.rows]).to(x.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """The same; if `squared`, relu2 of it."""
        y = in_slices(self.multiply, x, self.slice) if self.slice else self.multiply(x)
        return self.ops.relu2(y) if self.squared and not self.squares else y


def pick(device, dtype, store, shared: bool, width: int, ops) -> type[Linear]:
    """The class for a weight matrix of `width` inputs. device, dtype: where it is kept and as what;
    store: see GPT; shared: the given tensors can be used as they are; ops: the module with the
    device's kernels."""
    if store == torch.float8_e4m3fn:
        return Float8
    if store == torch.int8:
        return Int8Panels if getattr(ops, "PANEL8", 0) and width % 4 == 0 else Int8
    if shared:
        return Shared
    if device.type != "cpu":
        return Linear
    if getattr(ops, "PANEL", 0) and dtype == torch.float32:
        return Panels
    # on an x86 processor oneDNN's own layout is faster, at some numbers of rows twice as fast
    if platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available():
        has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported  # the instructions for it
        if dtype == torch.float32 or (dtype == torch.bfloat16 and has_bf16()):
            return Packed
    return Linear


class Shared(Linear):
    """The parts as they are, a live module's: not a copy, and what is trained is what runs."""

    def load(self, parts: list[Tensor]) -> None:
        if self.weight is None:
            self.weight = parts
        for old, new in zip(self.weight, parts, strict=True):
            if old.data_ptr() != new.data_ptr():
                old.copy_(new)

    def dense(self) -> list[Tensor]:
        return self.weight

    def multiply(self, x: Tensor) -> Tensor:
        given, x = x.dtype, x.to(self.dtype)
        if len(self.weight) == 1:
            return self.product(x, self.weight[0][: self.rows]).to(given)
        return torch.cat([self.product(x, part) for part in self.weight], dim=-1).to(given)


def _stack(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class Packed(Linear):
    """In the layout of oneDNN, torch's library for CPUs."""

    def load(self, parts: list[Tensor]) -> None:
        whole = _stack(parts).to(dtype=self.dtype).contiguous()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(whole, 64)

    def dense(self) -> list[Tensor]:
        return list(self.weight.to_dense().split(self.sizes))

    def multiply(self, x: Tensor) -> Tensor:
        given, x = x.dtype, x.to(self.dtype)
        y = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return y[:, : self.rows].to(given)


class Panels(Linear):
    """In panels, for our own product, see products_cpu.py."""

    fixed = squares = True

    def load(self, parts: list[Tensor]) -> None:
        whole = _stack(parts).to(dtype=self.dtype).contiguous()
        self.weight = self.ops.panels(whole, self.weight)

    def dense(self) -> list[Tensor]:
        return list(self.weight.transpose(1, 2).flatten(0, 1)[: sum(self.sizes)].split(self.sizes))

    def multiply(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight, self.rows, self.squared)


# int8 --------------------------------------------------------------------------------------------


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


def quantize_rows(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """x (T, C), rotated, as integers from -levels to levels, stored plus 128: (T, C) uint8, and
    what one of them is worth in each row, (T, 1) float32. kernels_cpu.py has it, too, fused."""
    x = rotate(x)
    scale = x.abs().amax(-1, keepdim=True).clamp_(min=1e-30) / levels
    return (x / scale).round_().add_(128).to(torch.uint8), scale


def _int8(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A weight, rotated, as int8 (out, in), and what 1 is worth in each row, (out,) float32."""
    whole, width = rotate(torch.cat(parts).to(torch.float32)), parts[0].shape[1]
    whole /= min(32, width & -width)  # what rotating both has multiplied by
    scale = whole.abs().amax(-1).clamp_(min=1e-30) / 127
    return (whole / scale[:, None]).round_().to(torch.int8), scale


class Int8(Linear):
    """int8, the inputs of each product as well, one scale for each row of either: oneDNN's."""

    squares = True

    def load(self, parts: list[Tensor]) -> None:
        whole, self.scale = _int8(parts)
        self.zeros = torch.zeros(len(whole), dtype=torch.int64)
        self.weight = torch.ops.onednn.qlinear_prepack(whole, None)
        # without the instructions for them, sums of two products of int8 are held in 16 bits
        self.levels = 127 if torch.cpu._is_vnni_supported() else 63

    def dense(self) -> list[Tensor]:
        # there is no way back from its layout: multiply it out
        return list(self._product(torch.eye(self.width)).T.split(self.sizes))

    def multiply(self, x: Tensor) -> Tensor:
        return self._product(x, self.squared)[:, : self.rows]

    def _product(self, x: Tensor, squared: bool = False) -> Tensor:
        quantize = getattr(self.ops, "quantize_rows", quantize_rows)
        x, scale = quantize(x, self.levels)
        alone = len(x) == 1  # a row's scale can go along, those of several cannot
        y = torch.ops.onednn.qlinear_pointwise(
            x, scale.item() if alone else 1.0, 128, self.weight, self.scale, self.zeros, None, 1.0,
            0, torch.float32, "relu" if squared else "none", [], "",
        )  # fmt: skip
        y = y if alone else y.mul_(scale)
        return y.square_() if squared else y


class Int8Panels(Linear):
    """The same by our own product."""

    fixed = squares = True

    def load(self, parts: list[Tensor]) -> None:
        whole, scale = _int8(parts)
        whole = F.pad(whole, (0, 0, 0, -len(whole) % self.ops.PANEL8))
        offset = 128 * whole.sum(1, dtype=torch.int32)  # of inputs that are stored plus 128
        scale = F.pad(scale, (0, len(whole) - len(scale)))
        if self.weight is None:
            self.weight = self.ops.panels(whole.view(torch.int32)), offset, scale
        else:  # where the compiled layers read them
            self.ops.panels(whole.view(torch.int32), self.weight[0])
            self.weight[1].copy_(offset), self.weight[2].copy_(scale)

    def dense(self) -> list[Tensor]:
        whole = self.ops.linear8(torch.eye(self.width), self.weight, sum(self.sizes))
        return list(whole.T.split(self.sizes))

    def multiply(self, x: Tensor) -> Tensor:
        return self.ops.linear8(x, self.weight, self.rows, self.squared)


# float8 ------------------------------------------------------------------------------------------


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, C) as float8 (4 bits of exponent, 3 of fraction, 448 at most), and what 1 is worth in
    each row, (T, 1) float32."""
    if has_triton(x.device):
        from ..gpu import kernels as kernels_gpu

        return kernels_gpu.fp8_rows(x)
    scale = x.abs().amax(-1, keepdim=True).float().clamp_(min=1e-30) / 448
    return (x / scale).to(torch.float8_e4m3fn), scale


class Float8(Linear):
    """float8, the inputs of each product as well, one scale for each row of either."""

    def load(self, parts: list[Tensor]) -> None:
        # a row of padding more or less: the product wants outputs in steps of 16
        whole = torch.cat([*parts, parts[0].new_zeros(-sum(self.sizes) % 16, self.width)])
        new = fp8_rows(whole.to(self.device, torch.float32))
        if self.weight is None:
            self.weight, self.scale = new
        else:  # where recorded steps read them
            self.weight.copy_(new[0]), self.scale.copy_(new[1])

    def dense(self) -> list[Tensor]:
        whole = self.weight.to(torch.float32) * self.scale
        return list(whole[: sum(self.sizes)].split(self.sizes))

    def multiply(self, x: Tensor) -> Tensor:
        # both scales are applied to the float32 sums, which are then rounded to bfloat16
        rows, scale = fp8_rows(x)
        weight, scales = self.weight.t(), (scale, self.scale.t())
        y = torch._scaled_mm(rows, weight, *scales, out_dtype=torch.bfloat16)
        return y[:, : self.rows].to(x.dtype)
