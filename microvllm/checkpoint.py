"""Where models come from: checkpoint files, their metas, and the places nanochat keeps them.

Everything here distrusts its input: weights are loaded as tensors only, strictly, and every refusal
names the file and what is wrong with it.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .attention import pick_backend
from .model import GPT, RECIPES, GPTConfig, Recipe
from .sampler import check_int
from .tokenizer import Tokenizer, load_tokenizer

# the largest that anyone needs, the tokenizer.json of a large vocabulary, takes about 30 MB
_MAX_JSON_BYTES = 256 * 1024 * 1024


def _find_last_step(directory: Path) -> int:
    """The highest step of the model_<step>.pt files, compared as numbers: 1000000 comes after
    999999."""
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is not a directory: give one with model_<step>.pt in it, a place in "
            "nanochat's tree (sft, base:d20, rl:d20:650), or owner/name on the Hugging Face hub"
        )
    steps = [
        int(m[1]) for f in directory.iterdir() if (m := re.fullmatch(r"model_(\d+)\.pt", f.name))
    ]
    if not steps:
        raise FileNotFoundError(f"{directory} has no model_<step>.pt, and no config.json")
    return max(steps)


def find_checkpoint(name, step=None) -> tuple[Path, int | None]:
    """The directory and the step of a checkpoint; the step is None in Hugging Face's format.

    name: a directory with model_<step>.pt and meta_<step>.json, or with config.json and
    model.safetensors; or, where no such directory exists, source[:tag[:step]] in nanochat's own
    tree ("sft", "base:d20", "rl:d20:650", see find_nanochat), or owner/name[/folder] on the Hugging
    Face hub, which is fetched into its cache. step: by default the last one.

    Raises FileNotFoundError or ValueError naming what is not there, ConnectionError where the hub
    is out of reach.
    """
    if step is not None:
        check_int("step", step, 0)
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(f"model_path must be a string or a path, got {name!r:.80}")
    directory = Path(os.path.abspath(os.path.expanduser(name)))
    if isinstance(name, str) and not directory.exists():
        if place := re.fullmatch(r"(base|mid|sft|rl)(?::([^:]*)(?::(\d+))?)?", name):
            directory = find_nanochat(place[1], place[2] or None)
            if place[3] and step not in (None, int(place[3])):
                raise ValueError(f"{name!r} and step={step} ask for two steps, give one of them")
            step = int(place[3]) if place[3] else step
        elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)+", name):
            from .sources.huggingface import fetch

            directory = fetch(name, step)
    if (directory / "config.json").is_file() and not any(directory.glob("model_*.pt")):
        if step is not None:
            raise ValueError(f"{directory} is in Hugging Face's format, without steps: {step=}")
        return directory, None
    last = _find_last_step(directory)
    step = last if step is None else step
    for file in (directory / f"model_{step:06d}.pt", directory / f"meta_{step:06d}.json"):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing (the last step in {directory} is {last})")
    return directory, step


def read_checkpoint(
    directory: Path, step: int | None
) -> tuple[GPTConfig, Recipe, dict[str, Tensor]]:
    """Config, recipe and weights (memory-mapped) of what find_checkpoint found, of any era.

    Raises ValueError naming the file and what is wrong with it.
    """
    if step is None:
        from .sources.huggingface import read_folder

        return read_folder(directory)
    meta_file = directory / f"meta_{step:06d}.json"
    meta = read_json(meta_file)
    if "model_config" not in meta:
        raise ValueError(f"{meta_file} has no model_config")
    config = GPTConfig.from_meta(meta["model_config"], str(meta_file))
    file = directory / f"model_{step:06d}.pt"
    weights = _load_weights(file)
    return config, _recognise_strictly(weights, config, file), weights


def read_json(file: Path) -> dict:
    """The JSON object in a file. Raises ValueError naming the file."""
    if (size := file.stat().st_size) > _MAX_JSON_BYTES:
        raise ValueError(f"{file} is not valid JSON for us: {size:,} bytes are far too many")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object: {found!r:.80}")
    return found


# layouts that existed for days on branches of nanochat; named so that the refusal says what it saw.
_UNSUPPORTED = {
    "v0_lambdas": "an experiment of 2026-01-16 with v0_lambdas (ungated value embeddings)",
    "bigram_lambdas": "the hashed bigram embeddings (engram) of 2026-01-25 to 01-28",
    ".moe.": "a mixture of experts (branch moe)",
    ".mlp.router.": "a mixture of experts (branch moe3)",
    ".mlp.experts.": "a mixture of experts (branch moe3)",
    ".mlp.shared_expert.": "a mixture of experts (branch moe3)",
}


def recognise(weights: dict[str, Tensor]) -> Recipe:
    """The recipe of a state dict (keys already without `_orig_mod.`), told by the keys it has.

    Raises ValueError for layouts that no released nanochat had, naming what was seen.
    """
    for key in weights:
        for mark, what in _UNSUPPORTED.items():
            if mark in f".{key}." or key == mark:
                raise ValueError(f"unsupported checkpoint: {key!r} belongs to {what}")
    gates = {
        w.shape[-1] for key, w in weights.items() if key.endswith("attn.ve_gate.weight") and w.ndim
    }
    if {"smear_gate.weight", "smear_lambda", "backout_lambda"} & weights.keys():
        return RECIPES["5"]
    if gates or any(key.startswith("value_embeds.") for key in weights):
        if gates in ({12}, {32}):
            return RECIPES["4" if gates == {12} else "3"]
        raise ValueError(
            f"unsupported checkpoint: value embeddings, gates of {sorted(gates) or 'no'} channels; "
            "nanochat's eras have 32 (era 3) or 12 (eras 4 and 5)"
        )
    return RECIPES["2" if {"resid_lambdas", "x0_lambdas"} & weights.keys() else "1"]


def expected_shapes(config: GPTConfig, recipe: Recipe, rows: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint; `rows` is the (padded) vocabulary."""
    c, kv = config.n_embd, config.n_kv_head * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (rows, c),
        "lm_head.weight": (rows, c),
    }
    for i in range(config.n_layer):
        block = f"transformer.h.{i}."
        shapes[block + "attn.c_q.weight"] = shapes[block + "attn.c_proj.weight"] = (c, c)
        shapes[block + "attn.c_k.weight"] = shapes[block + "attn.c_v.weight"] = (kv, c)
        shapes[block + "mlp.c_fc.weight"] = (4 * c, c)
        shapes[block + "mlp.c_proj.weight"] = (c, 4 * c)
        if recipe.gate_channels and i % 2 == (config.n_layer - 1) % 2:
            shapes[f"value_embeds.{i}.weight"] = (rows, kv)
            shapes[block + "attn.ve_gate.weight"] = (config.n_kv_head, recipe.gate_channels)
    if recipe.lambdas:
        shapes["resid_lambdas"] = shapes["x0_lambdas"] = (config.n_layer,)
    if recipe.smear:
        shapes["smear_gate.weight"] = (1, 24)
        shapes["smear_lambda"] = shapes["backout_lambda"] = (1,)
    return shapes


def check_weights(weights: dict[str, Tensor], config: GPTConfig, recipe: Recipe) -> None:
    """Strict: no missing, no extra, no misshapen tensor. Raises ValueError naming them."""
    if config.n_layer > len(weights):  # a million layers would take a while to list
        raise ValueError(f"n_layer is {config.n_layer}, but there are {len(weights)} tensors")
    wte = weights.get("transformer.wte.weight")
    rows = wte.shape[0] if wte is not None and wte.ndim == 2 else config.vocab_size
    if rows < config.vocab_size:
        raise ValueError(f"the embedding has {rows} rows, but vocab_size is {config.vocab_size}")
    expected = expected_shapes(config, recipe, rows)
    misshapen = [
        f"{k} is {tuple(weights[k].shape)}, not {shape}"
        for k, shape in expected.items()
        if k in weights and tuple(weights[k].shape) != shape
    ]
    unusable = [k for k in expected if k in weights and not weights[k].is_floating_point()]
    # a sparse one, one on the device "meta", or one number that claims to be a whole matrix
    hollow = [
        k
        for k, w in weights.items()
        if w.layout != torch.strided
        or w.is_meta
        or w.untyped_storage().nbytes() < w.numel() * w.itemsize
    ]
    problems = {
        "missing": [k for k in expected if k not in weights],
        "unexpected": [k for k in weights if k not in expected],
        "misshapen": misshapen,
        "not floating point": unusable,
        "not stored in full": hollow,
    }
    found = [
        f"{len(v)} {what} ({', '.join(v[:3])}{' ...' * (len(v) > 3)})"
        for what, v in problems.items()
        if v
    ]
    if found:
        raise ValueError(f"not a complete checkpoint of era {recipe.era}: " + "; ".join(found))


def _recognise_strictly(weights: dict[str, Tensor], config: GPTConfig, source) -> Recipe:
    """The recipe of a state dict that is complete and has nothing else."""
    try:
        recipe = recognise(weights)
        check_weights(weights, config, recipe)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return recipe


def load_model(model_path, step=None, device="cpu", dtype="auto", **options) -> GPT:
    """Load a checkpoint of any era, strictly; model_path and step: see find_checkpoint, options:
    see _build.

    Raises FileNotFoundError or ValueError naming the file and what is wrong with it.
    """
    parts = read_checkpoint(*find_checkpoint(model_path, step))
    return _build(*parts, False, device, dtype, **options)


def wrap_model(module, device="cpu", dtype="auto", **options) -> GPT:
    """A GPT on the weights of a live nanochat module, shared where device and dtype are the same
    (and, but for matrices, the tensor is contiguous); options: see _build.

    Raises TypeError for what is no nanochat GPT, ValueError for one of an unknown era.
    """
    return _build(*from_module(module), True, device, dtype, **options)


def _build(
    config, recipe, weights, share, device, dtype, *, attention="auto", max_len=None,
    quantization=None, deterministic=False, ranks=None, **overrides,
) -> GPT:  # fmt: skip
    """The GPT that LLM's options ask for (max_len is its max_model_len). Raises ValueError for an
    option that cannot be here, TypeError for an override that is no constant of the recipe."""
    device = torch.device(device)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if bf16 else torch.float32
    if isinstance(dtype, str):
        dtype = dtypes.get(dtype, dtype)
    if dtype not in dtypes.values():
        raise ValueError(f"dtype must be 'auto', {', '.join(map(repr, dtypes))}, got {dtype!r}")
    if max_len is not None and max_len > 10 * config.sequence_len:
        raise ValueError(
            f"max_model_len={max_len} is beyond the rotary tables: {10 * config.sequence_len} at "
            f"most, ten times the sequence_len of {config.sequence_len}"
        )
    if quantization not in (None, "int8", "fp8"):
        raise ValueError(f"quantization must be None, 'int8' or 'fp8', got {quantization!r:.80}")
    if quantization == "fp8":
        _check_fp8(config, device, dtype, deterministic)
    if quantization == "int8" and (device.type != "cpu" or dtype != torch.float32):
        raise ValueError(f"quantization='int8' is for float32 on a CPU, not {dtype} on {device}")
    if quantization == "int8" and not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        raise ValueError("quantization='int8' needs a torch with oneDNN, which this one lacks")
    recipe = recipe.override(**overrides)
    attend = pick_backend(attention, device, dtype, deterministic)
    store = {None: None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[quantization]
    if dtype == torch.bfloat16 and attend.__module__.endswith("cpu.kernels"):
        dtype, store = torch.float32, torch.bfloat16  # a CPU saves memory's time, not arithmetic's
    if ranks and (quantization == "fp8" or (deterministic and ranks.size > 2)):
        raise ValueError(
            "tensor_parallel has no quantization='fp8' yet, and deterministic=True for 2 processes "
            "at most: in which order the sums of more are made depends on the batch"
        )
    options = max_len, share, store, deterministic, ranks
    size = sum(weight.numel() for weight in weights.values()) * dtype.itemsize
    with fits(f"weights of {size:,} bytes in {dtype}", device):
        return GPT(config, recipe, weights, attend, device, dtype, *options)


def _check_fp8(config: GPTConfig, device: torch.device, dtype, deterministic: bool) -> None:
    """Raises ValueError where torch._scaled_mm has no product of scaled rows."""
    card = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if card < (8, 9) or torch.version.hip or dtype != torch.bfloat16:
        raise ValueError(
            "quantization='fp8' is for bfloat16 on an NVIDIA card of compute capability 8.9 or "
            f"newer (Ada, Hopper), not {dtype} on {device}; on a CPU there is 'int8'"
        )
    if config.n_embd % 16 or config.n_kv_head * config.head_dim % 16:
        raise ValueError(f"quantization='fp8' needs widths in steps of 16, not {config.n_embd}")
    if deterministic:
        raise ValueError("quantization='fp8' has no deterministic=True: cuBLAS does its products")


def from_module(module) -> tuple[GPTConfig, Recipe, dict[str, Tensor]]:
    """Config, recipe and weights (not copied) of a live nanochat GPT, compiled or not.

    Raises TypeError for what is no nanochat GPT, ValueError for one of an unknown era.
    """
    config = getattr(module, "config", None)
    given = vars(config) if hasattr(config, "__dict__") else {}
    # other families' modules have a config too
    if not isinstance(module, torch.nn.Module) or "n_embd" not in given:
        raise TypeError(f"model must be a nanochat GPT module, got {type(module).__name__}")
    source = f"the module {type(module).__name__}"
    config = GPTConfig.from_meta(given, source)
    weights = _without_prefix(module.state_dict(), source)
    return config, _recognise_strictly(weights, config, source), weights


def _load_weights(file: Path) -> dict[str, Tensor]:
    """The state dict of a .pt file, memory-mapped; only tensors are ever built from it
    (weights_only)."""
    try:
        if zipped := zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if any(record.compress_type for record in archive.infolist()):
                    raise ValueError("its records are compressed, and may have any size")
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises a different type for every way a file can be broken
        asked = re.search(r"GLOBAL (\S+)", str(error))
        # only its first sentence: the rest is advice to trust the file
        why = f"it asks for {asked[1]}, nothing of it was run" if asked else str(error)
        raise ValueError(
            f"{file} is not a readable checkpoint (truncated, or no state dict of tensors): "
            f"{why.splitlines()[0].split('. ')[0] if why else type(error).__name__:.200}"
        ) from None
    if not isinstance(weights, dict) or not all(
        isinstance(k, str) and isinstance(w, Tensor) for k, w in weights.items()
    ):
        raise ValueError(f"{file} holds no state dict (names and tensors)")
    return _without_prefix(weights, file)


def _without_prefix(weights: dict[str, Tensor], source) -> dict[str, Tensor]:
    """A compiled module's weights under their plain names; all have its prefix, or none has."""
    prefix = "_orig_mod."
    if len({key.startswith(prefix) for key in weights}) > 1:
        raise ValueError(f"{source}: some names begin with {prefix} and others do not")
    return {key.removeprefix(prefix): weight for key, weight in weights.items()}


def nanochat_base() -> Path:
    """nanochat's base directory: $NANOCHAT_BASE_DIR, or ~/.cache/nanochat."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or os.path.expanduser("~/.cache/nanochat"))


def find_tokenizer(directory, tokenizer_path=None) -> Path:
    """Where the tokenizer of the checkpoint in `directory` is: a directory with tokenizer.pkl or
    tokenizer.json, or what tokenizer_path says.

    Raises FileNotFoundError listing every place that was tried.
    """
    if tokenizer_path is not None:
        return Path(os.path.expanduser(tokenizer_path))
    model = Path(os.path.abspath(os.path.expanduser(directory)))
    # published checkpoints have it beside the weights, nanochat in its base directory
    beside = [model.parent, model.parent.parent, nanochat_base(), Path.home() / ".cache/nanochat"]
    places = [model, *(folder / "tokenizer" for folder in beside)]
    for place in places:
        if (place / "tokenizer.pkl").is_file() or (place / "tokenizer.json").is_file():
            return place
    tried = ", ".join(map(str, dict.fromkeys(places)))
    raise FileNotFoundError(f"no tokenizer.pkl in {tried}: give tokenizer_path")


def open_tokenizer(directory, tokenizer_path=None) -> Tokenizer:
    """The tokenizer that find_tokenizer finds; tokenizer.json counts where there is no
    tokenizer.pkl."""
    place = find_tokenizer(directory, tokenizer_path)
    other = place / "tokenizer.json" if place.is_dir() else place
    if other.suffix == ".json" and other.is_file() and not (place / "tokenizer.pkl").is_file():
        from .sources.huggingface import read_tokenizer

        return read_tokenizer(other)
    return load_tokenizer(place)


def find_nanochat(source: str, model_tag: str | None = None) -> Path:
    """The checkpoint directory as nanochat lays them out; model_tag: by default the largest
    d<number>, else the newest."""
    folders = {"base": "base", "mid": "mid", "sft": "chatsft", "rl": "chatrl"}
    if source not in folders:
        raise ValueError(f"source must be one of {', '.join(folders)}, got {source!r}")
    directory = nanochat_base() / f"{folders[source]}_checkpoints"
    tags = [d for d in directory.iterdir() if d.is_dir()] if directory.is_dir() else []
    if not tags:
        raise FileNotFoundError(
            f"{directory} has no checkpoints (NANOCHAT_BASE_DIR names the base directory)"
        )
    if model_tag is None:
        numbered = [(int(m[1]), d) for d in tags if (m := re.match(r"d(\d+)", d.name))]
        return max(numbered)[1] if numbered else max(tags, key=lambda d: d.stat().st_mtime)
    if directory / model_tag not in tags:
        raise FileNotFoundError(
            f"{directory} has no {model_tag!r}, only {', '.join(sorted(d.name for d in tags))}"
        )
    return directory / model_tag


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
    if device.type == "cuda" and device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device {name!r}: there are {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)  # kernels are launched on the current one
    if device.type == "cuda":  # the name that its tensors have: "cuda" is not equal to "cuda:0"
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def pick_devices(name: str | torch.device, tensor_parallel: int) -> tuple[torch.device, object]:
    """This process's device and, if there are more than one, the parallel.Ranks of its model's."""
    if check_int("tensor_parallel", tensor_parallel, 1) == 1:
        return pick_device(name), None
    from .features.parallel import Ranks

    ranks = Ranks(tensor_parallel, name)
    return ranks.device, ranks


@contextmanager
def fits(what: str, device: torch.device) -> Iterator[None]:
    """Raises ValueError with the numbers if there is no memory for what is made inside."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise ValueError(
            f"no memory for {what}: {free_memory(device):,} bytes are free on {device}; lower "
            "max_batched_tokens or use a smaller model"
        ) from None


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
