"""Weights as integers of 8, 6, 5 or 4 bits, and the packing of those below 8 bits.

A weight is rounded in the rotated basis (see `rotate`), with one scale for each row. In 4 bits each
32 inputs of a row also have a factor, an integer from -15 to 15. Integers times factors are int8,
so the sums of all products are sums of integers. Code that rounds better than `round_plainly`
passes its `Quantised` to a layer in place of the float weights.

    inputs of a row   0 1 2 3 | 4 5 6 7 | ... | 28 29 30 31 | 32 ...
    operands             0    |    1    | ... |      7      |         4 bytes in 32 bits each
    step              <---- packed into 4, 5 or 6 words ---->         of 32 bits

A step of TILE rows is stored together, word by word. One load of a word of several rows gives,
after masks and shifts, the operands of the instruction that multiplies bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 32  # inputs that are packed together; in 4 bits also the inputs that share a factor
MOST = 15  # the largest factor: 15 * -8 fits in a byte
# name of a format -> bits of the layers' weights, and of the head's, which lose most in four bits
BITS = {"int8": (8, 8), "int6": (6, 6), "int5": (5, 5), "int4": (4, 6)}
# the parts of each word of a step: (operand, left shift of its bits, mask of these bits). 5 and 6
# bits leave 3 and 2 bits at the top of each byte, which hold the other operands in pieces
LAYOUT = {
    4: [[(2 * i, 0, 0x0F), (2 * i + 1, 4, 0x0F)] for i in range(4)],
    5: [
        [(0, 0, 0x1F), (5, 5, 0x07)],
        [(1, 0, 0x1F), (5, 2, 0x18), (7, 4, 0x08)],
        [(2, 0, 0x1F), (6, 5, 0x07)],
        [(3, 0, 0x1F), (6, 2, 0x18), (7, 3, 0x10)],
        [(4, 0, 0x1F), (7, 5, 0x07)],
    ],
    6: [
        [(first + i, 0, 0x3F), (first + 3, (6, 4, 2)[i], (0x03, 0x0C, 0x30)[i])]
        for first in (0, 4)
        for i in range(3)
    ],
}


class Quantised(NamedTuple):
    """A weight matrix as integers times scales: about rotate(weight) / min(32, in & -in)."""

    integers: Tensor  # (rows, in) int8, from -2^(bits - 1) to 2^(bits - 1) - 1
    scale: Tensor  # (rows, 1) float32
    bits: int
    factors: Tensor | None = None  # (rows, groups) int8 for each 32 inputs, only in 4 bits

    @property
    def shape(self) -> torch.Size:
        return self.integers.shape


def rotate(x: Tensor) -> Tensor:
    """Return x (T, C) times Hadamard matrices of +-1, each over 32 channels that are C / 32 apart.

    A few channels of the residual stream are far larger than all others, and a scale that fits them
    leaves little precision for the rest. So each number is spread over 32 (Ashkboos et al. 2024,
    QuaRot). Inputs and weights that are both rotated have the same product, except for a factor of
    min(32, C & -C).
    """
    size = min(32, x.shape[1] & -x.shape[1])
    half, y = x.shape[1] // 2, x
    while half >= x.shape[1] // size:
        a, b = y.reshape(len(x), -1, 2, half).unbind(2)
        y, half = torch.stack((a + b, a - b), 2), half // 2
    return y.reshape(x.shape)


def grouped(bits: int) -> bool:
    """Return whether each 32 inputs of a row have a factor."""
    return bits == 4


def factor(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Split the scales of groups (rows, groups), none of them 0, into a row's scale (rows, 1) and
    integer factors (rows, groups)."""
    row_scale = scale.abs().amax(1, keepdim=True) / MOST
    least = scale.sign()
    factors = torch.where(scale.abs() < row_scale, least, (scale / row_scale).round_())
    return row_scale, factors


def round_plainly(weight: Tensor, bits: int) -> Quantised:
    """Rotate a float matrix (rows, in) and round it to the nearest integers.

    In each group with one scale, the number with the largest magnitude becomes the lowest integer,
    since there is one more integer below zero than above (as in llama.cpp's Q4_0). So a scale may
    be negative. In 8 bits the number becomes +-127.
    """
    rows, width = weight.shape
    rotated = rotate(weight.to(torch.float32))
    rotated /= min(32, width & -width)  # the factor of a product whose inputs are rotated, too
    size = STEP if grouped(bits) else width
    parts, factors = F.pad(rotated, (0, -width % size)).view(rows, -1, size), None
    top = 2 ** (bits - 1)
    if bits == 8:
        scale = parts.abs().amax(-1).clamp_(min=1e-30) / 127
    else:
        low, high = parts.aminmax(dim=-1)
        most = torch.where(-low > high, low, high)
        scale = most.where(most.abs() > 1e-30, most.new_tensor(1e-30)) / -top
    steps = scale
    if grouped(bits):
        scale, factors = factor(scale)
        steps, factors = scale * factors, factors.nan_to_num_(1).to(torch.int8)
    levels = (parts / steps[..., None]).round_().clamp_(-top, top - 1)
    levels = levels.nan_to_num_(0) if steps.isnan().any() else levels
    return Quantised(levels.view(rows, -1)[:, :width].to(torch.int8), scale, bits, factors)


def quantised(parts: list, bits: int) -> Quantised:
    """Return the parts of a layer, float matrices or `Quantised`, as one matrix of `bits` bits.
    Raises ValueError for a `Quantised` that is invalid or has other bits."""
    matrices = []
    for part in parts:
        if isinstance(part, Quantised):
            check(part, bits)
        else:
            part = round_plainly(part, bits)
        matrices.append(part)
    integers = torch.cat([part.integers for part in matrices])
    scale = torch.cat([part.scale for part in matrices])
    factors = torch.cat([part.factors for part in matrices]) if grouped(bits) else None
    return Quantised(integers, scale, bits, factors)


def check(part: Quantised, bits: int) -> None:
    """Raise ValueError for numbers that a layer of this number of bits cannot have."""
    rows, width = part.shape
    if part.bits != bits:
        raise ValueError(f"the weights have {part.bits} bits, but the layer has {bits}")
    groups = -(-width // STEP) if grouped(bits) else None
    num_factors = None if part.factors is None else part.factors.shape[1]
    if part.integers.dtype != torch.int8 or part.scale.shape != (rows, 1) or num_factors != groups:
        raise ValueError(
            f"weights of {bits} bits, {rows} x {width}, must be int8 with one scale per row and "
            f"{groups} factors, not {part.integers.dtype} with {tuple(part.scale.shape)} scales "
            f"and {num_factors} factors"
        )
    top = 2 ** (bits - 1)
    ranges = ("integers", part.integers, -top, top - 1), ("factors", part.factors, -MOST, MOST)
    for name, numbers, least, most in ranges:
        low, high = map(int, numbers.aminmax()) if numbers is not None and len(numbers) else (0, 0)
        if low < least or high > most:
            raise ValueError(
                f"{name} in {bits} bits must be {least} to {most}, not {low} to {high}"
            )


def as_bytes(part: Quantised) -> Tensor:
    """Return the integers times their factors, (rows, in) int8."""
    if part.factors is None:
        return part.integers
    return part.integers * part.factors.repeat_interleave(STEP, 1)[:, : part.shape[1]]


def dequantised(part: Quantised) -> Tensor:
    """Return the matrix (rows, in) in float32, in the rotated basis, as the products use it."""
    return as_bytes(part) * part.scale


def step_size(bits: int, tile_rows: int) -> int:
    """Return the size of a step of `tile_rows` rows in numbers of 32 bits. A factor is one byte."""
    return len(LAYOUT[bits]) * tile_rows + (tile_rows // 4 if grouped(bits) else 0)


def pack(weight: Quantised, tile_rows: int) -> Tensor:
    """Pack a weight as (tiles, steps, step_size) int32, the last tile padded with zeros.

    Each step holds the words of its `tile_rows` rows and then, in 4 bits, the rows' factors.
    Integers are stored plus 2^(bits - 1), because unsigned numbers are cheaper to unpack.
    """
    rows, width = weight.shape
    levels = weight.integers.to(torch.uint8) + 2 ** (weight.bits - 1)  # modulo 256
    fill = -width % STEP, -rows % tile_rows
    levels = F.pad(levels, (0, fill[0], 0, fill[1]), value=2 ** (weight.bits - 1))
    steps = levels.shape[1] // STEP
    operands = levels.view(torch.int32).view(-1, tile_rows, steps, STEP // 4).permute(3, 0, 2, 1)
    shape = len(levels) // tile_rows, steps, step_size(weight.bits, tile_rows)
    packed = torch.zeros(shape, dtype=torch.int32)
    for i, parts in enumerate(LAYOUT[weight.bits]):
        word = packed[:, :, i * tile_rows : (i + 1) * tile_rows]
        for operand, shift, mask in parts:
            word |= (operands[operand] & mask * 0x01010101) << shift
    if grouped(weight.bits):
        padded = F.pad(weight.factors, (0, 0, 0, fill[1]))
        by_step = padded.view(-1, tile_rows, steps).transpose(1, 2)
        factors = torch.empty(by_step.shape, dtype=torch.int8).copy_(by_step)
        packed[:, :, -(tile_rows // 4) :] = factors.view(torch.int32)
    return packed
