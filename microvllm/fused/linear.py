"""Weight matrices and their products. `Linear` keeps a weight as torch does, other classes in a
layout of their own, or in smaller numbers; a Backend says which (`linear_class`)."""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor


def in_slices(function, x: Tensor, rows: int = 16) -> Tensor:
    """function(x) of x (T, C), always of `rows` rows at a time, the last of them padding: what
    becomes of a row then follows from the row, not from how many others there are."""
    whole = F.pad(x, (0, 0, 0, -len(x) % rows))
    return torch.cat([function(part) for part in whole.split(rows)])[: len(x)]


def stack(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The parts as one dense matrix; not copied where that can be helped."""
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return whole.to(dtype=dtype).contiguous()


def has_onednn(dtype: torch.dtype) -> bool:
    """Is oneDNN's own layout of a weight faster here? On x86, with some numbers of rows twice."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if not x86 or not torch.backends.mkldnn.is_available():
        return False
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported  # the instructions for it
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_bf16())


class Linear:
    """A weight matrix (out, in) and its product, as torch has them.

    parts: matrices of a checkpoint, one on top of the other; backend: whose product and relu2 it
    is; dtype: in which the weight is kept; rows: how many outputs are wanted, None: all, the others
    are padding; relu2: it comes after the product.
    """

    row_exact = False  # True: a row's bits never depend on the rows beside it
    fuses_relu2 = False  # True: `multiply` does the relu2 as well, if there is to be one

    def __init__(self, parts: list[Tensor], backend, dtype, *, rows=None, relu2: bool = False):
        self.sizes, self.width = [len(part) for part in parts], parts[0].shape[1]
        self.rows = rows or sum(self.sizes)
        self.backend, self.device, self.dtype, self.relu2 = backend, backend.device, dtype, relu2
        self.weight = None
        self.load(parts)
        self.slice = 0  # rows that are multiplied together; 0: all of them
        if backend.sliced and not self.row_exact:
            # do equal rows get equal bits wherever they are? else one is done at a time
            y = self.multiply(torch.arange(self.width).sin().expand(16, -1).contiguous())
            self.slice = 16 if torch.equal(y, y[:1].expand_as(y)) else 1

    def load(self, parts: list[Tensor]) -> None:
        """Take the weights of `parts`; in place where there were others before."""
        if self.weight is None:
            shape = sum(self.sizes), self.width
            self.weight = torch.empty(shape, dtype=self.dtype, device=self.device)
        for view, part in zip(self.weight.split(self.sizes), parts, strict=True):
            self.backend.fill(view, part)

    def multiply(self, x: Tensor) -> Tensor:
        """x (T, in) @ weight.T: (T, rows), in x's dtype."""
        return self.backend.product(x.to(self.dtype), self.weight[: self.rows]).to(x.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """The same; with `relu2`, that of it."""
        y = in_slices(self.multiply, x, self.slice) if self.slice else self.multiply(x)
        return self.backend.relu2(y) if self.relu2 and not self.fuses_relu2 else y


class Shared(Linear):
    """The parts as they are, a live module's: not a copy, and what is trained is what runs."""

    def load(self, parts: list[Tensor]) -> None:
        self.weight = parts

    def multiply(self, x: Tensor) -> Tensor:
        given, x, product = x.dtype, x.to(self.dtype), self.backend.product
        if len(self.weight) == 1:
            return product(x, self.weight[0][: self.rows]).to(given)
        return torch.cat([product(x, part) for part in self.weight], dim=-1).to(given)


class Packed(Linear):
    """In the layout of oneDNN, torch's library for CPUs."""

    def load(self, parts: list[Tensor]) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(stack(parts, self.dtype), 64)

    def multiply(self, x: Tensor) -> Tensor:
        given, x = x.dtype, x.to(self.dtype)
        y = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return y[:, : self.rows].to(given)
