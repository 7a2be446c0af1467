"""Weights as integers of 8, 6, 5 or 4 bits, and how those of less than 8 are packed.

A weight is rounded in the rotated basis (see `rotate`), with one scale for each row. In 4 bits each
32 inputs of a row have a factor as well, an integer from -15 to 15: so integers times factors are
int8, and a product of any of these has sums of integers alone. What rounds better than
`round_plainly` gives its `Quantised` to a layer in place of the float weights.

    inputs of a row   0 1 2 3 | 4 5 6 7 | ... | 28 29 30 31 | 32 ...
    operands             0    |    1    | ... |      7      |         4 bytes in 32 bits each
    step              <---- packed into 4, 5 or 6 words ---->         of 32 bits

A step of TILE rows is stored together, word by word: one load of a word of several rows gives,
after masks and shifts, the operands of the instruction that multiplies bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 32  # inputs that are packed together; in 4 bits also those of one factor
MOST = 15  # the largest factor: 15 * -8 is a byte
# quantization: bits of the layers' weights, and of the head's, which four bits cost the most
BITS = {"int8": (8, 8), "int6": (6, 6), "int5": (5, 5), "int4": (4, 6)}
# of each word of a step the parts: (operand, how far its bits are moved up, which bits these are).
# 5 and 6 bits leave 3 and 2 at the top of each byte, where the other operands are in pieces
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
    factors: Tensor | None = None  # (rows, groups) int8 of each 32 inputs, in 4 bits alone

    @property
    def shape(self) -> torch.Size:
        return self.integers.shape


def rotate(x: Tensor) -> Tensor:
    """x (T, C) times a Hadamard matrix of +-1 over 32 channels each, that lie C / 32 apart.

    A few channels of the residual stream are far larger than all others, and a scale that fits them
    leaves little of the rest: so each number is spread over 32 (Ashkboos et al. 2024, QuaRot).
    Inputs and weights turned alike have the same product, but for a factor min(32, C & -C).
    """
    size = min(32, x.shape[1] & -x.shape[1])
    half, y = x.shape[1] // 2, x
    while half >= x.shape[1] // size:
        a, b = y.reshape(len(x), -1, 2, half).unbind(2)
        y, half = torch.stack((a + b, a - b), 2), half // 2
    return y.reshape(x.shape)


def grouped(bits: int) -> bool:
    """Have each 32 inputs of a row a factor?"""
    return bits == 4


def factor(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of groups (rows, groups), none of them 0, as a row's scale (rows, 1) and integers."""
    whole = scale.abs().amax(1, keepdim=True) / MOST
    least = scale.sign()
    return whole, torch.where(scale.abs() < whole, least, (scale / whole).round_())


def round_plainly(weight: Tensor, bits: int) -> Quantised:
    """The nearest integers to a float matrix (rows, in), which is rotated here.

    The largest number of those with one scale is the lowest integer, of which there is one more
    than above zero (as in llama.cpp's Q4_0), so that a scale may be negative; in 8 bits it is
    +-127.
    """
    rows, width = weight.shape
    whole = rotate(weight.to(torch.float32))
    whole /= min(32, width & -width)  # what rotating both has multiplied by
    size = STEP if grouped(bits) else width
    parts, factors = F.pad(whole, (0, -width % size)).view(rows, -1, size), None
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
    """The parts of a layer, float matrices or `Quantised` ones, as one matrix of that many bits.
    Raises ValueError for a `Quantised` that is none, or of other bits."""
    made = []
    for part in parts:
        if isinstance(part, Quantised):
            check(part, bits)
        else:
            part = round_plainly(part, bits)
        made.append(part)
    integers, scale = (torch.cat(own) for own in list(zip(*made, strict=True))[:2])
    factors = torch.cat([part.factors for part in made]) if grouped(bits) else None
    return Quantised(integers, scale, bits, factors)


def check(part: Quantised, bits: int) -> None:
    """Raises ValueError for numbers that a layer of this number of bits cannot have."""
    rows, width = part.shape
    if part.bits != bits:
        raise ValueError(f"weights of {part.bits} bits are given where the layer has {bits}")
    groups = -(-width // STEP) if grouped(bits) else None
    given = None if part.factors is None else part.factors.shape[1]
    if part.integers.dtype != torch.int8 or part.scale.shape != (rows, 1) or given != groups:
        raise ValueError(
            f"weights of {bits} bits, {rows} x {width}, are int8 with a scale for each row and "
            f"{groups} factors, not {part.integers.dtype} with {tuple(part.scale.shape)} scales "
            f"and {given} factors"
        )
    top = 2 ** (bits - 1)
    given = ("integers", part.integers, -top, top - 1), ("factors", part.factors, -MOST, MOST)
    for what, numbers, least, most in given:
        low, high = map(int, numbers.aminmax()) if numbers is not None and len(numbers) else (0, 0)
        if low < least or high > most:
            raise ValueError(f"{what} of {bits} bits are {least} to {most}, not {low} to {high}")


def as_bytes(part: Quantised) -> Tensor:
    """(rows, in) int8: integers times factors."""
    if part.factors is None:
        return part.integers
    return part.integers * part.factors.repeat_interleave(STEP, 1)[:, : part.shape[1]]


def dequantised(part: Quantised) -> Tensor:
    """(rows, in) float32, in the rotated basis: what its products multiply by."""
    return as_bytes(part) * part.scale


def step_size(bits: int, tile_rows: int) -> int:
    """Numbers of 32 bits that one step of `tile_rows` rows takes, with its factors, a byte each."""
    return len(LAYOUT[bits]) * tile_rows + (tile_rows // 4 if grouped(bits) else 0)


def pack(weight: Quantised, tile_rows: int) -> Tensor:
    """(tiles, steps, step_size) int32: steps of `tile_rows` rows, the last tile padded with zeros.

    In each step the words of all rows and then, in 4 bits, the rows' factors of this step. Integers
    are stored plus 2^(bits - 1): without a sign they are cheaper to take out.
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
        own = F.pad(weight.factors, (0, 0, 0, fill[1])).view(-1, tile_rows, steps).transpose(1, 2)
        factors = torch.empty(own.shape, dtype=torch.int8).copy_(own)
        packed[:, :, -(tile_rows // 4) :] = factors.view(torch.int32)
    return packed
