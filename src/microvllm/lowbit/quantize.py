"""Low-bit weights: how are they rounded so that a model loses least?

Rounding takes minutes and runs once, by `microvllm quantize`, and what it makes runs without it.
Their layout is in packing.py, products of them in cpu/low_bit_gemm.py.

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
    """Each matrix of a linear layer, by its name without .weight, rounded with the texts (token
    ids) as its input. weights: a checked state dict; bits_of(name): the bits of a matrix. Raises
    ValueError for a model whose numbers are not finite.
    """
    from tqdm import tqdm

    def matrix(name: str, weight, moments) -> Quantised:
        if not (weight.isfinite().all() and moments.isfinite().all()):
            raise ValueError(f"{name} or its inputs are NaN or infinite: the model is broken")
        return round_by_gptq(weight, moments, bits_of(name))

    layers = LayerByLayer(config, recipe, weights, texts)
    total = 6 * config.n_layer + 1
    return dict(tqdm(layers.round(matrix), "rounding", total, unit="matrix", disable=None))
