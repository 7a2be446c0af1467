"""Rounds a matrix such that its products change least, not its numbers.

Numbers are rounded one input at a time, and the remaining inputs compensate for the change in the
products (Frantar et al. 2022, GPTQ). For a row w, the error is e H e^T. Here e is the change of w,
and H holds the second moments of the inputs: the sum of x^T x over many tokens. Afterwards the
row's scale is fitted to the integers, and the integers to the scale and to each other, in turns
(Behdin et al. 2023, QuantEase). This reduces the error further.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import STEP, Quantised, dequantised, grouped, rotate
from .packing import factor as as_factors

DAMPING = 0.01  # times the mean of H's diagonal is added to it, because inputs may be dependent
_INPUTS = 128  # inputs that are rounded before one product updates all later ones
_NUMBERS = 2**23  # numbers of a matrix that are rounded at a time
_TURNS = 2  # rounds of fitting scales and integers


def limits(bits: int) -> tuple[int, int]:
    """Return the smallest and the largest integer of this number of bits."""
    return (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def in_rotated_basis(weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight (rows, in) and second moments (in, in) for rotated inputs."""
    width = weight.shape[1]
    rotated = rotate(weight.to(torch.float32)) / min(32, width & -width)
    return rotated, rotate(rotate(moments).T.contiguous())


def error_of(matrix: Quantised, weight: Tensor, moments: Tensor) -> float:
    """Return the squared change of the products, summed over the tokens of the moments."""
    rotated, moments = in_rotated_basis(weight, moments)
    change = rotated - dequantised(matrix)
    return float(((change @ moments) * change).sum(dtype=torch.float64))


def round_by_gptq(weight: Tensor, moments: Tensor, bits: int) -> Quantised:
    """Round a weight (rows, in) whose inputs have the second moments (in, in). Both arguments are
    those of the model, without rotation."""
    rotated, moments = in_rotated_basis(weight, moments)
    diagonal = moments.diagonal().clone()
    mean = float(diagonal.mean())
    if not mean > 0:  # all inputs are zero: any numbers work, so use the nearest ones
        moments, mean = torch.eye(len(moments)), 1.0
    moments.diagonal().add_(DAMPING * mean)
    # the most important inputs come first, while all others can still compensate for them
    order = diagonal.argsort(descending=True, stable=True)
    inverse = torch.linalg.inv(moments[order][:, order].to(torch.float64))
    factor = torch.linalg.cholesky(inverse, upper=True).to(torch.float32)
    del inverse
    parts = []
    for rows in rotated.split(max(1, _NUMBERS // rotated.shape[1])):
        scale = find_scale(rows, diagonal, bits)
        if grouped(bits):
            row_scale, factors = as_factors(scale)
            scale = row_scale * factors
        integers = _round(rows, scale, factor, order, bits)
        for _ in range(_TURNS):
            scale = _fit_scale(rows, integers, scale, moments)
            integers = _fit_integers(rows, integers, scale, moments, order, bits)
        scale = _fit_scale(rows, integers, scale, moments)
        if grouped(bits):
            scale, factors = (scale / factors).mean(1, keepdim=True), factors.to(torch.int8)
            parts.append((integers.to(torch.int8), scale, factors))
        else:
            parts.append((integers.to(torch.int8), scale))
    integers, scale, *factors = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Quantised(integers, scale, bits, *factors)


def find_scale(weight: Tensor, importance: Tensor, bits: int) -> Tensor:
    """Return the scales (rows, groups) with the smallest sum of importance (in,) times squared
    error, if each number is rounded to the nearest. In few bits, some large numbers are clipped."""
    low, high = limits(bits)
    parts = weight.view(len(weight), -1, STEP if grouped(bits) else weight.shape[1])
    weights = importance.view(1, parts.shape[1], -1) + 1e-12
    size = parts.abs().amax(-1).clamp_(min=1e-30)
    least, best = torch.full_like(size, torch.inf), size
    # there is one more integer below 0 than above it, and the scale's sign chooses its side
    for sign in (1.0,) if bits == 8 else (1.0, -1.0):
        for share in torch.linspace(1.0, 0.4, 25).tolist():
            scale = size * (sign * share / -low)
            steps = (parts / scale[..., None]).round_().clamp_(low, high)
            error = ((steps * scale[..., None] - parts).square_() * weights).sum(-1)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, scale, best)
    return best


def _round(weight: Tensor, scale: Tensor, factor: Tensor, order: Tensor, bits: int) -> Tensor:
    """Return the integers (rows, in). factor: upper Cholesky factor of the moments' inverse, with
    the inputs in `order`."""
    low, high = limits(bits)
    rest, size = weight[:, order].T.contiguous(), weight.shape[1] // scale.shape[1]
    integers = torch.empty_like(rest)
    for start in range(0, len(rest), _INPUTS):
        stop = min(start + _INPUTS, len(rest))
        part, block = rest[start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(part)
        for j, column in enumerate(order[start:stop].tolist()):
            step = scale[:, column // size]
            integers[start + j] = (part[j] / step).round_().clamp_(low, high)
            errors[j] = (part[j] - integers[start + j] * step) / block[j, j]
            part[j:] -= block[j, j:, None] * errors[j]
        rest[stop:] -= factor[start:stop, stop:].T @ errors
    result = torch.empty_like(weight)
    result[:, order] = integers.T
    return result


def _times(integers: Tensor, scale: Tensor) -> Tensor:
    """Return the integers times the scales (rows, groups) of their groups, (rows, in)."""
    return (integers.view(*scale.shape, -1) * scale[..., None]).view_as(integers)


def _fit_scale(weight: Tensor, integers: Tensor, scale: Tensor, moments: Tensor) -> Tensor:
    """Return the scales, multiplied by the number for each row that minimizes the error of these
    integers."""
    rounded = _times(integers, scale)
    target = ((weight @ moments) * rounded).sum(1, keepdim=True)
    ratio = target / ((rounded @ moments) * rounded).sum(1, keepdim=True)
    # if all integers are 0, the scale does not matter
    return torch.where(ratio.isfinite() & (ratio > 0), scale * ratio, scale)


def _fit_integers(weight, integers, scale, moments, order, bits: int) -> Tensor:
    """Set each integer in turn to the value with the smallest error, while the others stay."""
    low, high = limits(bits)
    size, change = weight.shape[1] // scale.shape[1], weight - _times(integers, scale)
    integers = integers.T.contiguous()
    slope = (change @ moments).T.contiguous()  # H times the missing change of each number
    for columns in order.split(_INPUTS):
        part, part_moments = slope[columns], moments[columns][:, columns]
        steps = torch.empty_like(part)
        for j, column in enumerate(columns.tolist()):
            step, before = scale[:, column // size], integers[column]
            after = (before + part[j] / (part_moments[j, j] * step)).round_().clamp_(low, high)
            steps[j] = (after - before) * step
            integers[column] = after
            part -= part_moments[j, :, None] * steps[j]
        slope -= moments[:, columns] @ steps
    return integers.T.contiguous()
