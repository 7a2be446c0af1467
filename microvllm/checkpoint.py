"""Where models come from: checkpoint files, their metas, and the places nanochat keeps them.

Everything here distrusts its input: weights are loaded as tensors only, strictly, and every refusal
names the file and what is wrong with it.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from .attention import pick_backend
from .model import GPT, GPTConfig, check_weights, recognise
from .sampler import check_int


def _find_last_step(directory: Path) -> int:
    """The highest step of the model_<step>.pt files, compared as numbers: 1000000 comes after
    999999."""
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is not a directory: give one with model_<step>.pt in it"
        )
    steps = [
        int(m[1]) for f in directory.iterdir() if (m := re.fullmatch(r"model_(\d+)\.pt", f.name))
    ]
    if not steps:
        raise FileNotFoundError(f"{directory} has no model_<step>.pt")
    return max(steps)


def load_model(
    model_path,
    step=None,
    device="cpu",
    dtype="auto",
    *,
    attention="auto",
    max_len=None,
    **overrides,
) -> GPT:
    """Load model_<step>.pt and meta_<step>.json of any nanochat era, strictly.

    Raises FileNotFoundError or ValueError naming the file and what is wrong with it; TypeError for
    an override that is no constant of the recipe.
    """
    device, directory = torch.device(device), Path(os.path.abspath(os.path.expanduser(model_path)))
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = dtypes.get(dtype, dtype)
    if dtype not in dtypes.values():
        raise ValueError(f"dtype must be 'auto', {', '.join(map(repr, dtypes))}, got {dtype!r}")
    last = _find_last_step(directory)
    step = last if step is None else step
    check_int("step", step, 0)
    model_file, meta_file = directory / f"model_{step:06d}.pt", directory / f"meta_{step:06d}.json"
    for file in (model_file, meta_file):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing (the last step in {directory} is {last})")
    try:
        meta = json.loads(meta_file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{meta_file} is not valid JSON: {error}") from None
    if not isinstance(meta, dict) or "model_config" not in meta:
        raise ValueError(f"{meta_file} has no model_config")
    config = GPTConfig.from_meta(meta["model_config"], str(meta_file))
    if max_len is not None and max_len > 10 * config.sequence_len:
        raise ValueError(
            f"max_model_len={max_len} is beyond the rotary tables: {10 * config.sequence_len} at "
            f"most, ten times the sequence_len of {config.sequence_len}"
        )
    weights = _load_weights(model_file)
    try:
        recipe = recognise(weights).override(**overrides)
        check_weights(weights, config, recipe)
    except ValueError as error:
        raise ValueError(f"{model_file}: {error}") from None
    attend = pick_backend(attention, device, dtype)
    return GPT(config, recipe, weights, attend, device, dtype, max_len)


def _load_weights(file: Path) -> dict[str, Tensor]:
    """The state dict of a .pt file, memory-mapped; only tensors are ever built from it
    (weights_only)."""
    try:
        weights = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except Exception as error:  # torch raises a different type for every way a file can be broken
        raise ValueError(
            f"{file} is not a readable checkpoint (truncated, or no state dict of tensors): "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0]:.200}"
        ) from None
    if not isinstance(weights, dict) or not all(
        isinstance(k, str) and isinstance(w, Tensor) for k, w in weights.items()
    ):
        raise ValueError(f"{file} holds no state dict (names and tensors)")
    return {key.removeprefix("_orig_mod."): weight for key, weight in weights.items()}


def nanochat_base() -> Path:
    """nanochat's base directory: $NANOCHAT_BASE_DIR, or ~/.cache/nanochat."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or os.path.expanduser("~/.cache/nanochat"))


def find_tokenizer(model_path, tokenizer_path=None) -> Path:
    """Where the tokenizer is. Raises FileNotFoundError listing every place that was tried."""
    if tokenizer_path is not None:
        return Path(os.path.expanduser(tokenizer_path))
    model = Path(os.path.abspath(os.path.expanduser(model_path)))
    # beside the weights as published checkpoints have it, next to the model, in nanochat's base
    # directory
    places = [
        model,
        model.parent / "tokenizer",
        model.parent.parent / "tokenizer",
        nanochat_base() / "tokenizer",
    ]
    places.append(Path(os.path.expanduser("~/.cache/nanochat/tokenizer")))
    for place in places:
        if (place / "tokenizer.pkl").is_file():
            return place
    tried = ", ".join(map(str, dict.fromkeys(places)))
    raise FileNotFoundError(f"no tokenizer.pkl in {tried}: give tokenizer_path")


def find_nanochat(source: str, model_tag: str | None = None) -> tuple[Path, Path]:
    """(checkpoint directory, base directory) as nanochat lays them out."""
    folders = {"base": "base", "mid": "mid", "sft": "chatsft", "rl": "chatrl"}
    if source not in folders:
        raise ValueError(f"source must be one of {', '.join(folders)}, got {source!r}")
    base = nanochat_base()
    directory = base / f"{folders[source]}_checkpoints"
    tags = [d for d in directory.iterdir() if d.is_dir()] if directory.is_dir() else []
    if not tags:
        raise FileNotFoundError(
            f"{directory} has no checkpoints (NANOCHAT_BASE_DIR names the base directory)"
        )
    if model_tag is None:
        numbered = [(int(m[1]), d) for d in tags if (m := re.match(r"d(\d+)", d.name))]
        return (max(numbered)[1] if numbered else max(tags, key=lambda d: d.stat().st_mtime)), base
    if directory / model_tag not in tags:
        raise FileNotFoundError(
            f"{directory} has no {model_tag!r}, only {', '.join(sorted(d.name for d in tags))}"
        )
    return directory / model_tag, base


# the machine
# -----------------------------------------------------------------------------


def pick_device(name: str | torch.device) -> torch.device:
    """The device called `name`; "auto" is cuda, then mps, then cpu. Raises ValueError if it is not
    there."""
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device must be 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps', got {name!r}"
        ) from None
    if not {"cuda": has_cuda, "mps": has_mps, "cpu": True}.get(device.type, False):
        raise ValueError(
            f"device {name!r} is not available here; device='auto' takes what there is"
        )
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that are free for us: on the GPU, or on the machine within its container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if (meminfo := Path("/proc/meminfo")).exists():
        free = int(re.search(r"MemAvailable:\s*(\d+)", meminfo.read_text())[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return max(free, 0)
