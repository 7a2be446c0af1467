"""Which model is in these files, and is it complete?

model_<step>.pt is nanochat's state dict, meta_<step>.json the model's shape. The era follows from
the names of the tensors, which must have exactly the names and shapes of an empty model's of that
era. Nothing in a file is run. At the end: dtype and device.
"""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .environment import free_memory
from .model import GPT, RECIPES, GPTConfig, Recipe, rotary_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    model_path, step=None, device="cpu", dtype="auto", *, max_len: int | None = None, **overrides
) -> GPT:
    """Load the checkpoint of a training step (by default the last) of any era as a core GPT.
    max_len: positions that the rotary tables cover, by default the context; overrides: constants of
    the recipe. Raises FileNotFoundError or ValueError naming the file and what is wrong with it."""
    directory = Path(os.path.expanduser(model_path))
    config, recipe, weights = read_checkpoint(directory, find_step(directory, step))
    return make_model(config, recipe, weights, device, dtype, max_len=max_len, **overrides)


def _find_last_step(directory: Path) -> int:
    """The highest step of the model_<step>.pt files, as a number: 1000000 comes after 999999."""
    names = [file.name for file in directory.glob("model_*.pt")]
    steps = [int(m[1]) for name in names if (m := re.fullmatch(r"model_(\d+)\.pt", name))]
    if not steps:
        raise FileNotFoundError(f"{directory} has no model_<step>.pt, and no config.json")
    return max(steps)


def find_step(directory: Path, step: int | None) -> int:
    """The step asked for, or the last. Raises FileNotFoundError if one of its files is missing."""
    last = _find_last_step(directory)
    step = last if step is None else step
    for file in (directory / f"model_{step:06d}.pt", directory / f"meta_{step:06d}.json"):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing (the last step in {directory} is {last})")
    return step


def read_checkpoint(directory: Path, step: int) -> tuple[GPTConfig, Recipe, dict[str, Tensor]]:
    """Config, recipe and weights (memory-mapped) of a step that `find_step` found, of any era.
    Raises ValueError naming the file."""
    file = directory / f"meta_{step:06d}.json"
    try:
        config = GPTConfig.from_meta(json.loads(file.read_text(encoding="utf-8"))["model_config"])
        file = directory / f"model_{step:06d}.pt"
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if all(name.startswith("_orig_mod.") for name in weights):  # torch.compile's prefix
            weights = {name.removeprefix("_orig_mod."): w for name, w in weights.items()}
        rows = len(weights["transformer.wte.weight"])
        if config.n_layer > len(weights) or config.vocab_size > rows:  # before a model is built
            given = f"{config.n_layer} layers and a vocabulary of {config.vocab_size}"
            raise ValueError(f"{len(weights)} tensors, {rows} rows of vocabulary for {given}")
        if sum(w.nbytes for w in weights.values()) > file.stat().st_size:
            raise ValueError("its tensors share memory, and are larger than the file")
        recipe = recognise(weights)
        empty_model(config, recipe, rows).load_state_dict(weights, assign=True)  # checks them all
    except Exception as error:  # torch raises a different type for every way a file can be broken
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} is not a whole checkpoint of nanochat: {what}") from None
    return config, recipe, weights


def recognise(weights: dict[str, Tensor]) -> Recipe:
    """The recipe of a state dict, recognised by the names in it and by how many channels its gates
    read. Raises ValueError for gates that no released nanochat had."""
    gates = [w for name, w in weights.items() if name.endswith("attn.ve_gate.weight") and w.ndim]
    widths = {gate.shape[-1] for gate in gates}
    if {"smear_gate.weight", "smear_lambda", "backout_lambda"} & weights.keys():
        return RECIPES["5"]
    if widths or any(name.startswith("value_embeds.") for name in weights):
        if widths in ({12}, {32}):
            return RECIPES["4" if widths == {12} else "3"]
        what = f"value embeddings, gates of {sorted(widths) or 'no'} channels"
        raise ValueError(f"unsupported checkpoint: {what}; nanochat's eras have 32 or 12")
    return RECIPES["2" if {"resid_lambdas", "x0_lambdas"} & weights.keys() else "1"]


def empty_model(config: GPTConfig, recipe: Recipe, rows: int) -> GPT:
    """A GPT of shapes without memory (torch's meta device); rows: of the padded vocabulary."""
    if config.n_embd < (channels := max(recipe.gate_channels, 24 * recipe.smear)):
        raise ValueError(f"n_embd is {config.n_embd}, but a gate reads {channels} channels")
    with torch.device("meta"):
        return GPT(config, recipe, rows)


def make_model(
    config: GPTConfig, recipe: Recipe, weights: dict[str, Tensor], device="cpu", dtype="auto", *,
    max_len: int | None = None, **overrides,
) -> GPT:  # fmt: skip
    """The core's GPT on copies of checked weights, lambdas in float32. Others: see `load_model`."""
    device = torch.device(device)
    dtype = pick_dtype(dtype, device)
    rows = len(weights["transformer.wte.weight"])
    model = empty_model(config, replace(recipe, **overrides), rows)
    numel, length = sum(w.numel() for w in weights.values()), max_len or config.sequence_len
    wanted, free = numel * dtype.itemsize + rotary_bytes(config, length), free_memory(device)
    what = f"weights in {dtype} and rotary tables of {length} positions"
    require_memory(what, wanted, free, "use a smaller model or lower max_model_len")
    # one tensor at a time: the file is memory-mapped, so only the copies take memory
    copies = {
        name: w.detach().to(device, torch.float32 if "lambdas" in name else dtype, copy=True)
        for name, w in weights.items()
    }
    model.load_state_dict(copies, assign=True)
    model.init_rotary(length)
    return model.requires_grad_(False)


def find_tokenizer(directory, tokenizer_path=None, names=("tokenizer.pkl",)) -> Path:
    """tokenizer_path, or the first directory that has a file of these names for the checkpoint in
    `directory`. Raises FileNotFoundError listing those that were tried."""
    if tokenizer_path is not None:
        return Path(os.path.abspath(os.path.expanduser(tokenizer_path)))
    model = Path(os.path.abspath(os.path.expanduser(directory)))
    # published checkpoints have it beside the weights, nanochat in its base directory
    beside = [model.parent, model.parent.parent, nanochat_base(), Path.home() / ".cache/nanochat"]
    places = [model, *(folder / "tokenizer" for folder in beside)]
    for place in places:
        if any((place / name).is_file() for name in names):
            return place
    tried = ", ".join(map(str, dict.fromkeys(places)))
    raise FileNotFoundError(f"no tokenizer.pkl in {tried}: give tokenizer_path")


def nanochat_base() -> Path:
    """nanochat's base directory: $NANOCHAT_BASE_DIR, or ~/.cache/nanochat."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or os.path.expanduser("~/.cache/nanochat"))


def pick_dtype(dtype, device: torch.device) -> torch.dtype:
    """The torch.dtype of a name; "auto" is bfloat16 on a GPU that computes in it, else float32."""
    if dtype == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bf16 else torch.float32
    found = DTYPES.get(dtype, dtype) if isinstance(dtype, (str, torch.dtype)) else None
    if found not in DTYPES.values():
        raise ValueError(f"dtype must be 'auto', {', '.join(map(repr, DTYPES))}, got {dtype!r}")
    return found


def pick_device(name: str | torch.device) -> torch.device:
    """The device called `name`; "auto" is cuda, then mps, then cpu."""
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        # with its index, as its tensors have it: torch.device("cuda") != torch.device("cuda:0")
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def require_memory(what: str, wanted: int, free: int, remedy: str) -> None:
    """Raises ValueError with the numbers if more bytes are wanted than are free. Whatever has a
    size that a file claims is compared here before it is made; free: see `free_memory`, or what is
    left of it."""
    if wanted > free:
        raise ValueError(f"no memory for {what}: {wanted:,} bytes, and {free:,} are free; {remedy}")
