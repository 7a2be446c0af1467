"""A folder of matrices in 8, 6, 5 or 4 bits: config.json, model.safetensors, tokenizer.pkl.

`microvllm quantize` writes such folders. Tensors have nanochat's names. A matrix NAME.weight of a
linear layer is stored as NAME.scale and

    8 bits  NAME.integers (rows, in) int8, from -127 to 127
    6 bits  NAME.low (rows, in / 2) uint8 and NAME.high (rows, in / 4) uint8
    5 bits  NAME.low, and NAME.high (rows, in / 8) uint8
    4 bits  NAME.low, and NAME.factors (rows, in / 32) int8, from -15 to 15

An integer i of b < 8 bits is stored as the code i + 2^(b - 1). `low` holds the four lower bits of
each code, with even inputs in the lower half of a byte. `high` holds the other bits, with the first
input in the lowest bits. In 4 bits, 32 adjacent inputs share a factor. Scales are (rows, 1)
float32. Inputs and weights are rotated, see lowbit/packing.py.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import empty_model
from ..model import RECIPES
from ..sources import huggingface, strict

FORMAT = 1  # version of the format described above
BITS = 8, 6, 5, 4
GROUP = 32  # inputs that share a factor in 4 bits
_MATRICES = r"lm_head|transformer\.h\.\d+\.(attn\.c_(q|k|v|proj)|mlp\.c_(fc|proj))"
_DTYPES = {"integers": torch.int8, "factors": torch.int8, "scale": torch.float32}  # others: uint8
_CONSTANTS = "eps gate_scale qk_scale rope_base short_window round_rotary softcap".split()
_FACTS = {"format": int, "bits": int, "seed": int, "tokens": int, "base": bool} | dict.fromkeys(
    "version command source calibration".split(), str
)


def is_matrix(name: str) -> bool:
    """Return whether NAME.weight is a matrix of a linear layer, and therefore low-bit."""
    return bool(re.fullmatch(_MATRICES, name))


def bits_of(name: str, bits: int) -> int:
    """Return the bits of a matrix in a folder of `bits` bits. In 4 bits the head would lose most,
    so it has 6."""
    return 6 if bits == 4 and name == "lm_head" else bits


def pack(integers: Tensor, bits: int) -> dict[str, Tensor]:
    """Return the planes of int8 integers (rows, in) in a file, by the last part of their names."""
    if bits == 8:
        return {"integers": integers.contiguous()}
    codes = (integers + 2 ** (bits - 1)).to(torch.uint8)
    low = codes & 15
    planes = {"low": low[:, ::2] | low[:, 1::2] << 4}
    if bits > 4:
        size = bits - 4  # bits of each input in the plane "high"
        parts = (codes >> 4).unflatten(1, (-1, 8 // size)).unbind(2)
        planes["high"] = sum(part << (size * i) for i, part in enumerate(parts))
    return planes


def unpack(planes: dict[str, Tensor], bits: int) -> Tensor:
    """Return the integers (rows, in) int8 of these planes, the inverse of `pack`."""
    if bits == 8:
        return planes["integers"]
    low = planes["low"]
    codes = torch.stack((low & 15, low >> 4), 2).flatten(1)
    if bits > 4:
        size, high = bits - 4, planes["high"]
        parts = [high >> (size * i) & (2**size - 1) for i in range(8 // size)]
        codes |= torch.stack(parts, 2).flatten(1) << 4
    return codes.to(torch.int8) - 2 ** (bits - 1)


class Stored:
    """A matrix as stored in a file, mapped into memory, with a tensor's methods for its size."""

    ndim = 2

    def __init__(self, planes: dict[str, Tensor], bits: int):
        self.planes, self.bits = planes, bits
        rows, width = next(iter(planes.values())).shape
        self.shape = torch.Size((rows, width if bits == 8 else 2 * width))
        self.nbytes = sum(plane.nbytes for plane in planes.values())

    def numel(self) -> int:
        return self.shape.numel()

    def quantised(self):
        """Return the matrix for low-bit products, see lowbit/packing.py."""
        from .packing import Quantised

        integers, planes = unpack(self.planes, self.bits), self.planes
        return Quantised(integers, planes["scale"], self.bits, planes.get("factors"))

    def dense(self) -> Tensor:
        """Return the weight (rows, in) in float32, for layers without low-bit products."""
        from .packing import dequantised, rotate

        return rotate(dequantised(self.quantised()))


def facts(directory: Path) -> dict | None:
    """Return the folder's record of its quantization, or None if it is not a quantised folder.
    Raises ValueError for a folder of another version."""
    file = directory / "config.json"
    value = strict.read_json(file).get("quantization") if file.is_file() else None
    if value is None:
        return None
    record = value if isinstance(value, dict) else {}
    remedy = "write the folder again with `microvllm quantize`"
    if record.get("format") != FORMAT:
        problem = f"format {record.get('format')!r:.40}, but this version reads {FORMAT}"
        raise ValueError(f"{file}: quantization has {problem}: {remedy}")
    wrong = [name for name, kind in _FACTS.items() if type(record.get(name)) is not kind]
    if wrong or record["bits"] not in BITS:
        name = (wrong or ["bits"])[0]
        raise ValueError(f"{file}: quantization has {name}={record.get(name)!r:.80}: {remedy}")
    return record


def read_folder(directory: Path) -> strict.Checkpoint:
    """Read a folder that `write_folder` wrote. Its matrices are Stored. Raises ValueError with the
    file and the tensor."""
    file, bits = directory / "config.json", facts(directory)["bits"]
    content = strict.read_json(file)
    shape = {name: content[name] for name in ("sequence_len", "vocab_size", "n_layer", "n_head",
             "n_kv_head", "n_embd", "window_pattern") if name in content}  # fmt: skip
    config = strict.make_config(shape, str(file))
    constants = content.get("recipe")
    if not isinstance(constants, dict) or set(constants) != {"era", *_CONSTANTS}:
        raise ValueError(f"{file}: recipe must have era, {', '.join(_CONSTANTS)}")
    constants = dict(constants)
    if not isinstance(era := constants.pop("era"), str) or era not in RECIPES:
        raise ValueError(f"{file}: recipe has era={era!r:.40}: choose {', '.join(RECIPES)}")
    source = directory / "model.safetensors"
    tensors = huggingface.read_safetensors(source)
    try:
        recipe = strict.replace(RECIPES[era], **constants)
        weights = _checked(tensors, config, recipe, bits)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return config, recipe, weights


def _checked(tensors: dict[str, Tensor], config, recipe, bits: int) -> dict:
    """Return the weights of these tensors. Raises ValueError unless they are exactly the tensors
    of the model, with the right shapes, dtypes and values."""
    if config.n_layer > len(tensors):  # before allocating a model of a million layers
        raise ValueError(f"n_layer is {config.n_layer}, but there are {len(tensors)} tensors")
    wte = tensors.get("transformer.wte.weight")
    rows = len(wte) if wte is not None and wte.ndim == 2 else config.vocab_size
    if rows < config.vocab_size:
        raise ValueError(f"the embedding has {rows} rows, but vocab_size is {config.vocab_size}")
    weights, rest = {}, dict(tensors)

    def take(name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        if name not in rest:
            raise ValueError(f"the tensor {name} is missing")
        tensor = rest.pop(name)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, not {shape}")
        if tensor.dtype != dtype if dtype else tensor.dtype not in strict.FLOATS:
            expected = str(dtype)[6:] if dtype else "floating point"
            raise ValueError(f"{name} is {str(tensor.dtype)[6:]}, not {expected}")
        return tensor

    for name, like in empty_model(config, recipe, rows).state_dict().items():
        part = name.removesuffix(".weight")
        if not is_matrix(part):
            weights[name] = take(name, tuple(like.shape), None)
            continue
        outputs, width = like.shape
        part_bits = bits_of(part, bits)
        check_width(width, bits)
        # name of each plane: how many inputs share one of its numbers
        divisors = {8: {"integers": 1}, 6: {"low": 2, "high": 4}, 5: {"low": 2, "high": 8},
                    4: {"low": 2, "factors": GROUP}}[part_bits] | {"scale": width}  # fmt: skip
        planes = {
            k: take(f"{part}.{k}", (outputs, width // n), _DTYPES.get(k, torch.uint8))
            for k, n in divisors.items()
        }
        if not planes["scale"].isfinite().all():
            raise ValueError(f"{part}.scale has a number that is NaN or infinite")
        for plane, most in ("integers", 127), ("factors", 15):
            if plane in planes and planes[plane].numel():
                low, high = map(int, planes[plane].aminmax())
                if low < -most or high > most:
                    raise ValueError(
                        f"{part}.{plane} has numbers from {low} to {high}, not from -{most} to "
                        f"{most}"
                    )
        weights[name] = Stored(planes, part_bits)
    if rest:
        more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
        raise ValueError(f"the tensor {min(rest):.80}{more} does not belong to this model")
    return weights


def check_width(width: int, bits: int) -> None:
    """Raise ValueError if matrices of this width cannot be stored in this number of bits."""
    if bits < 8 and width % GROUP:
        raise ValueError(f"{bits} bits need a width divisible by {GROUP}, not {width}: use 8 bits")


def check_source(checkpoint: strict.Checkpoint, directory: Path, bits: int) -> None:
    """Raise ValueError if a checkpoint cannot be written in this number of bits."""
    config, recipe, weights = checkpoint
    if any(isinstance(weight, Stored) for weight in weights.values()):
        raise ValueError(f"{directory} is quantised: use the checkpoint that it was made from")
    if isinstance(recipe, strict.Questionable):
        raise ValueError(recipe.why)
    try:
        check_width(config.n_embd, bits)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


def write_folder(
    checkpoint: strict.Checkpoint, matrices: dict, tokenizer, record: dict, folder: Path
):
    """Write a checkpoint into an existing folder. matrices: Quantised of each matrix, by its name
    without .weight; record: what `facts` returns, without the format."""
    config, recipe, weights = checkpoint
    tensors = {}
    for name, weight in weights.items():
        part = name.removesuffix(".weight")
        if not is_matrix(part):
            tensors[name] = weight.detach().contiguous()
            continue
        integers, scale, bits, factors = matrices[part]
        planes = pack(integers, bits) | {"scale": scale}
        planes |= {} if factors is None else {"factors": factors}
        tensors |= {f"{part}.{plane}": tensor.contiguous() for plane, tensor in planes.items()}
    save = huggingface.import_safetensors(folder).save_file
    save(tensors, folder / "model.safetensors", {"format": "pt"})
    constants = {name: getattr(recipe, name) for name in ("era", *_CONSTANTS)}
    content = {"architectures": ["NanochatForCausalLM"], "model_type": "nanochat"} | vars(config)
    content |= {"recipe": constants, "quantization": {"format": FORMAT} | record}
    (folder / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(tokenizer._encoding, 4))
    # the package creates the file with permissions for its owner only
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
