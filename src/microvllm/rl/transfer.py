"""Did the weights arrive as they were sent?

    the trainer's process     weights, checksums(weights)  ---->   weights, checksums
    the engine's process      check_transfer(weights, checksums), then llm.update_weights(weights)

A checksum covers dtype, shape and bytes, so it also detects a tensor that was cast or transposed on
the way.
"""

from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor

MAX_NAMES = 5  # in an error


def checksums(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """A checksum of 128 bits (XXH3) of each tensor of a state dict, as a hexadecimal number. Raises
    TypeError for a value that is not a tensor."""
    return {name: checksum(name, weight) for name, weight in weights.items()}


def checksum(name: str, tensor: Tensor) -> str:
    """The checksum of one tensor, on any device. name: for the error."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"weights[{name!r}] must be a tensor, got {type(tensor).__name__}")
    digest = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    # a tensor without dimensions cannot be viewed as bytes
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def check_transfer(weights: Mapping[str, Tensor], expected: Mapping[str, str]) -> None:
    """Compare received weights with the sender's checksums. Raises ValueError with the names of
    missing, unknown or different tensors, and TypeError for a value that is not a tensor."""
    problems = {
        "missing": sorted(expected.keys() - weights.keys()),
        "unknown": sorted(weights.keys() - expected.keys()),
        "different": [
            name
            for name, weight in weights.items()
            if name in expected and checksum(name, weight) != expected[name]
        ],
    }
    parts = [describe(problem, names) for problem, names in problems.items() if names]
    if parts:
        raise ValueError(
            f"the weights are not those that were sent: {'; '.join(parts)}. Send them again; the "
            "trainer must not change them before they have arrived"
        )


def describe(problem: str, names: list[str]) -> str:
    """A problem, with the names of the tensors that have it."""
    first_names = ", ".join(names[:MAX_NAMES])
    rest = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"{problem}: {first_names}{rest}"
