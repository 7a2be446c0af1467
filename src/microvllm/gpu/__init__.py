"""What a GPU has of its own: kernels in Triton, FlashAttention, recorded decode steps, and a cache
as large as the card allows. Its loop, one step ahead, is in loops/ahead.py."""

import functools
import importlib.util

import torch


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Do the Triton kernels run there: an NVIDIA card from Ampere on, or one of AMD's?"""
    if device.type != "cuda" or not importlib.util.find_spec("triton"):
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
