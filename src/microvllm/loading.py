"""Which model computes a checkpoint, and with which kernels?

find_checkpoint    a name, a place in nanochat's tree, a folder         -> folder and step
read_checkpoint    config, recipe and weights, checked
pick_backend       kernels for the device                               -> Backend
build_model        weights in the layout of the kernels                 -> FusedGPT
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from .checkpoint import make_model, pick_dtype, require_memory
from .environment import free_memory
from .fused.model import FusedGPT
from .model import GPT, GPTConfig, Recipe, rotary_bytes
from .resources import FilePages, fits, naming_package
from .sources import strict
from .sources.places import find_checkpoint, read_checkpoint

if TYPE_CHECKING:
    from .features.parallel import Ranks
    from .fused.backend import Backend

log = logging.getLogger("microvllm")

QUANTIZATIONS = ("int8", "int6", "int5", "int4", "fp8")  # the last one is a GPU's
# bits of a stored number
BITS = {"int8": 8, "int6": 6, "int5": 5, "int4": 4, "fp8": 8, "bfloat16": 16}
BACKENDS = "'auto', 'sdpa', 'numba', 'triton' or 'flash'"


@dataclass(frozen=True)
class ModelOptions:
    """How a FusedGPT computes. attention, quantization, kv_cache_dtype, deterministic: as LLM takes
    them; share: use given tensors where device and dtype allow it, instead of copies; max_len:
    positions of the rotary tables, by default the checkpoint's context; ranks: the processes that
    share the model; block_size: of the KV cache, for which kernels are compiled."""

    attention: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    deterministic: bool = False
    share: bool = False
    max_len: int | None = None
    ranks: Ranks | None = None
    block_size: int = 16


@dataclass(frozen=True)
class ModelBuilder:
    """Makes the model of an engine, again when its weights have moved. overrides: constants of the
    recipe; is_plain: make the core's model; max_model_len: as LLM takes it."""

    device: torch.device
    dtype: str | torch.dtype = "auto"
    options: ModelOptions = ModelOptions()
    overrides: dict[str, Any] = field(default_factory=dict)
    is_plain: bool = False
    max_model_len: int | None = None

    def __post_init__(self):
        if not self.is_plain:
            return
        for name in ("attention", "quantization", "deterministic", "kv_cache_dtype", "ranks"):
            if getattr(self.options, name) not in (None, False, "auto"):
                raise ValueError(
                    f"plain=True runs the core alone, which has no {name}: leave it out"
                )

    def build(self, config: GPTConfig, recipe: Recipe, weights: dict) -> GPT | FusedGPT:
        """A model on checked weights. Its rotary tables are yet to be made, see
        engine.make_rotary_tables."""
        check_length(self.max_model_len, config)
        if self.is_plain:
            recipe = strict.replace(recipe, **self.overrides)
            with fits("weights", self.device):
                weights = dense(weights)
                return make_model(config, recipe, weights, self.device, self.dtype, max_len=1)
        options = replace(self.options, max_len=1)
        return build_fused(
            config,
            strict.replace(recipe, **self.overrides),
            weights,
            self.device,
            pick_dtype(self.dtype, self.device),
            options,
        )


def load_model(model_path, step=None, device="cpu", dtype="auto", **options) -> FusedGPT:
    """Load a checkpoint of any era and any place, strictly; options: see `build_model`. Raises
    FileNotFoundError or ValueError naming the file and what is wrong with it."""
    directory, step = find_checkpoint(model_path, step)
    parts = read_checkpoint(directory, step)
    return build_model(*parts, torch.device(device), dtype, **options)


def build_model(
    config: GPTConfig,
    recipe: Recipe,
    weights: dict,
    device: torch.device,
    dtype: str | torch.dtype = "auto",
    **options,
) -> FusedGPT:
    """The FusedGPT on checked weights. options: fields of ModelOptions, and constants of the
    recipe. Raises ValueError for an option that cannot be here, TypeError for an override that is
    no constant of the recipe."""
    names = {option.name for option in fields(ModelOptions)}
    overrides = {name: value for name, value in options.items() if name not in names}
    chosen = ModelOptions(**{name: options[name] for name in names & options.keys()})
    recipe = strict.replace(recipe, **overrides)
    return build_fused(config, recipe, weights, device, pick_dtype(dtype, device), chosen)


def build_fused(
    config: GPTConfig,
    recipe: Recipe,
    weights: dict,
    device: torch.device,
    dtype: torch.dtype,
    options: ModelOptions,
) -> FusedGPT:
    """The FusedGPT of `build_model`."""
    warn_of_float16(dtype)
    check_length(options.max_len, config)
    check_quantization(options.quantization)
    backend = pick_backend(
        options.attention, device, dtype, options.deterministic, options.kv_cache_dtype
    )
    backend.block_size = options.block_size
    quantization = choose_quantization(options, weights, backend, config, dtype)
    if options.ranks is not None:
        weights = dense(weights)
        options.ranks.check(quantization, options.deterministic)
    store = quantization
    if dtype == torch.bfloat16 and backend.name == "numba":
        dtype = torch.float32  # a CPU saves memory's time, not arithmetic's
        store = "bfloat16"
    warn_of_nan(weights)
    num_values = sum(weight.numel() for weight in weights.values())
    what = f"weights of {num_values * dtype.itemsize:,} bytes in {dtype}"
    check_memory(what, config, num_values, store or dtype, device, options)
    with fits(what, device):
        return FusedGPT(
            config,
            recipe,
            weights,
            backend,
            dtype=dtype,
            max_len=options.max_len,
            share=options.share,
            store=store,
            ranks=options.ranks,
        )


def pick_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    deterministic: bool = False,
    kv_cache_dtype: str = "auto",
) -> Backend:
    """The Backend called `name`; "auto" is the fastest one that runs on `device`. Raises ValueError
    for an unknown name, or for what cannot be here, saying why; ImportError, with the remedy, for a
    package that is not installed."""
    if kv_cache_dtype not in ("auto", "int8"):
        raise ValueError(f"kv_cache_dtype must be 'auto' or 'int8', got {kv_cache_dtype!r:.80}")
    if name == "auto":
        name = fastest_backend(device, dtype)
    backend_class = choose_backend(name, device)
    if kv_cache_dtype == "int8" and backend_class.name == "triton":
        from .gpu.backend import Int8TritonBackend

        backend_class = Int8TritonBackend
    elif kv_cache_dtype == "int8":
        from .fused.int8_cache import with_int8_cache

        backend_class = with_int8_cache(backend_class, device)
    return backend_class(device, dtype, deterministic)


def fastest_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the fastest backend that runs on the device."""
    from .gpu import has_triton

    if has_triton(device):
        return "triton"
    if device.type == "cpu" and dtype != torch.float16 and has_numba():
        return "numba"
    return "sdpa"


def has_numba() -> bool:
    """Is the package installed that compiles the kernels of a CPU? It is not imported yet."""
    return find_spec("numba") is not None


def choose_backend(name: str, device: torch.device) -> type[Backend]:
    """The class of the backend called `name`."""
    if name == "numba":
        with naming_package("attention='numba'"):
            from .cpu.backend import CpuBackend

            return CpuBackend
    if name == "triton":
        with naming_package("attention='triton'"):
            from .gpu.backend import TritonBackend

            return TritonBackend
    if name == "flash":
        with naming_package("attention='flash'"):
            from .gpu.flash import FlashBackend

            return FlashBackend
    if name != "sdpa":
        raise ValueError(f"attention must be {BACKENDS}, got {name!r}")
    if device.type == "cuda":
        from .gpu.backend import GpuBackend

        return GpuBackend
    from .fused.backend import Backend

    return Backend


def compare_kernels(
    config: GPTConfig, recipe: Recipe, device: torch.device, dtype: str, kv_cache_dtype: str
) -> dict[str, Any]:
    """Compare the kernels that an engine of a checkpoint has on a GPU with plain torch, now.
    Returns the card and the versions, and for each kernel what is wrong, "" if nothing is. Raises
    ValueError where there are none."""
    from .gpu import has_triton

    if device.type != "cuda":
        raise ValueError(f"--check compares the kernels of a GPU, and the device is {device}")
    if not has_triton(device):
        raise ValueError(f"no kernels run on {device}: plain torch computes there")
    from .gpu import self_check

    dtype = pick_dtype(dtype, device)
    backend = pick_backend("auto", device, dtype, kv_cache_dtype=kv_cache_dtype)
    shapes = self_check.Shapes(config, config, recipe, backend.kv_layout(config, dtype), 16)
    setting = self_check.describe_setting(backend, shapes)
    results = self_check.check_kernels(backend, shapes, fresh=True)
    return {"card": setting["card"], "versions": setting["versions"], "kernels": results}


# quantization -------------------------------------------------------------------------------------


def check_quantization(quantization: str | None) -> None:
    """Raises ValueError for a word that is not known."""
    if quantization not in (None, *QUANTIZATIONS):
        words = ", ".join(map(repr, QUANTIZATIONS[:-1]))
        raise ValueError(
            f"quantization must be None, {words} or {QUANTIZATIONS[-1]!r}, got {quantization!r:.80}"
        )


def choose_quantization(
    options: ModelOptions, weights: dict, backend: Backend, config: GPTConfig, dtype: torch.dtype
) -> str | None:
    """In how many bits the matrices are kept: as the folder has them, or as they are rounded while
    they are loaded. Raises ValueError where this cannot be."""
    quantization = options.quantization
    stored = stored_as(weights)
    if stored is None:
        if quantization is not None:
            backend.check_quantization(quantization, config)
            advise(quantization)
        return quantization
    if quantization not in (None, stored):
        raise ValueError(
            f"quantization={quantization!r}, and the folder has {stored}: leave it out, or "
            "give the checkpoint that the folder was made from"
        )
    if backend.takes(stored) and options.ranks is None:
        return stored
    log.info("no products of %s here: its matrices become %s", stored, dtype)
    return None


def stored_as(weights: dict) -> str | None:
    """int8, int6, int5 or int4, if the weights are of a quantised folder (lowbit/folder.py)."""
    bits = [weight.bits for weight in weights.values() if not isinstance(weight, torch.Tensor)]
    return f"int{min(bits)}" if bits else None


@cache  # once
def advise(quantization: str) -> None:
    """Say what costs less, where weights are rounded as they are loaded."""
    if quantization in ("int6", "int5", "int4"):
        log.warning(
            "quantization=%r: weights are rounded to the nearest while they are loaded; rounded "
            "once by `microvllm quantize` they lose much less",
            quantization,
        )


def dense(weights: dict) -> dict[str, torch.Tensor]:
    """The same with all matrices as floats. Raises ValueError if these are too large."""
    low_bit = [w for w in weights.values() if not isinstance(w, torch.Tensor)]
    wanted = sum(4 * weight.numel() for weight in low_bit)
    free = free_memory(torch.device("cpu"))
    require_memory("low-bit matrices in float32", wanted, free, "run them on a CPU as they are")
    return {
        name: weight if isinstance(weight, torch.Tensor) else weight.dense()
        for name, weight in weights.items()
    }


# checks -------------------------------------------------------------------------------------------


def check_length(max_len: int | None, config: GPTConfig) -> None:
    """Raises ValueError for a context beyond ten times that of the training."""
    length = max_len or config.sequence_len
    longest = 10 * config.sequence_len
    if length > longest:
        limit = f"{longest} at most, ten times the sequence_len of {config.sequence_len}"
        raise ValueError(f"max_model_len={max_len} is beyond the rotary tables: {limit}")


def check_memory(
    what: str,
    config: GPTConfig,
    num_values: int,
    stored: str | torch.dtype,
    device: torch.device,
    options: ModelOptions,
) -> None:
    """Raises ValueError with the numbers if the weights do not fit. num_values: of all weights;
    stored: what a matrix's numbers are kept as (tables and cache may have more bits)."""
    length = options.max_len or config.sequence_len
    num_ranks = 1 if options.ranks is None else options.ranks.size
    bits = BITS[stored] if isinstance(stored, str) else 8 * stored.itemsize
    num_bytes = 0 if options.share else num_values * bits // 8 // num_ranks
    require_memory(
        f"{what}, and rotary tables of {length} positions",
        num_bytes + rotary_bytes(config, length),
        free_memory(device),
        "use a smaller model, fewer bits (quantization) or a smaller max_model_len",
    )


def warn_of_float16(dtype: torch.dtype) -> None:
    """Say that the dtype has too few exponents for these models."""
    if dtype == torch.float16:
        log.warning(
            "float16 ends at 65,504: relu(x)^2 of a trained nanochat is larger, becomes infinite "
            "and then NaN; dtype='bfloat16' or 'float32' is right"
        )


def warn_of_nan(weights: dict) -> None:
    """Say which weights are no finite numbers."""
    pages = FilePages()
    broken = []
    for name, weight in weights.items():
        if isinstance(weight, torch.Tensor):
            if not weight.sum(dtype=torch.float32).isfinite():
                broken.append(name)
            pages.read(weight)
    if broken:
        log.warning("NaN or infinite weights, %s: the model can draw no token", ", ".join(broken))
