"""Low-bit weights, rounded such that the model loses as little as possible.

Rounding takes minutes and runs once, in `microvllm quantize`. Loading the resulting folder needs no
rounding. The layout of the weights is in packing.py, their products are in cpu/low_bit_gemm.py.

    checkpoint -> texts that the model writes itself      calibration.py
               -> layer by layer: second moments of the inputs of each matrix
               -> integers and scales                     gptq.py
               -> a folder                                folder.py
"""

from __future__ import annotations

from .calibration import LayerByLayer
from .gptq import round_by_gptq
from .packing import Quantised


def quantize(
    config, recipe, weights: dict, texts: list[list[int]], bits_of
) -> dict[str, Quantised]:
    """Round each matrix of a linear layer. Return them by name, without .weight.

    weights: a checked state dict; texts: token ids of the calibration texts; bits_of(name): the
    bits of a matrix. Raises ValueError for a model with numbers that are not finite.
    """
    from tqdm import tqdm

    def matrix(name: str, weight, moments) -> Quantised:
        if not (weight.isfinite().all() and moments.isfinite().all()):
            raise ValueError(f"{name} or its inputs are NaN or infinite: the model is broken")
        return round_by_gptq(weight, moments, bits_of(name))

    layers = LayerByLayer(config, recipe, weights, texts)
    total = 6 * config.n_layer + 1
    return dict(tqdm(layers.round(matrix), "rounding", total, unit="matrix", disable=None))
