"""Chooses the model and the kernels for a checkpoint.

find_checkpoint    a name, a place in nanochat's tree, or a folder      -> folder and step
read_checkpoint    reads and checks config, recipe and weights
pick_backend       chooses kernels for the device                       -> Backend
build_model        arranges the weights in the layout of the kernels    -> FusedGPT
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

QUANTIZATIONS = ("int8", "int6", "int5", "int4", "fp8")  # the last one is for GPUs
# bits of a stored number
BITS = {"int8": 8, "int6": 6, "int5": 5, "int4": 4, "fp8": 8, "bfloat16": 16}
BACKENDS = "'auto', 'sdpa', 'numba', 'triton' or 'flash'"


@dataclass(frozen=True)
class ModelOptions:
    """How a FusedGPT computes. attention, quantization, kv_cache_dtype, deterministic: see LLM;
    share: use the given tensors instead of copies where device and dtype allow it; max_len:
    positions of the rotary tables (default: the checkpoint's context); ranks: the processes that
    share the model; block_size: the KV cache's, since kernels are compiled for it."""

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
    """Makes the model of an engine, and makes it again when its weights have moved. overrides:
    constants of the recipe; is_plain: make the core's model; max_model_len: see LLM."""

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
                    f"plain=True runs the core's model, which has no {name}: leave it out"
                )

    def build(self, config: GPTConfig, recipe: Recipe, weights: dict) -> GPT | FusedGPT:
        """Make a model from checked weights. Its rotary tables come later (engine.py)."""
        check_length(self.max_model_len, config)
        if self.is_plain:
            recipe = strict.replace(recipe, **self.overrides)
            with fits("weights", self.device):
                weights = dense(weights)
                # no rotary tables yet: the engine makes them, as long as its pool allows
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
    """Load a checkpoint of any era from any place, strictly. options: see `build_model`. Raises
    FileNotFoundError or ValueError that names the file and the problem."""
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
    """Make a FusedGPT from checked weights. options: fields of ModelOptions, and constants of the
    recipe. Raises ValueError for an option that is not supported here, TypeError for an override
    that is not a constant of the recipe."""
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
    """`build_model` with a ModelOptions object."""
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
        dtype = torch.float32  # on a CPU, bfloat16 saves memory traffic; arithmetic is float32
        store = "bfloat16"
    warn_of_nan(weights)
    stored = store or dtype  # the number format of matrices; tables may have more bits
    bits = BITS[stored] if isinstance(stored, str) else 8 * stored.itemsize
    num_bytes = sum(weight.numel() for weight in weights.values()) * bits // 8
    purpose = f"weights of {num_bytes:,} bytes in {stored}"
    check_memory(purpose, config, num_bytes, device, options)
    with fits(purpose, device):
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
    """Return the Backend called `name`; "auto" is the fastest one for `device`. Raises ValueError
    for an unknown name, or for settings that are not supported here, with the reason; ImportError,
    with the remedy, for a package that is not installed."""
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
    """Return the name of the fastest backend that runs on the device."""
    from .gpu import has_triton

    if has_triton(device):
        return "triton"
    if device.type == "cpu" and dtype != torch.float16 and has_numba():
        return "numba"
    return "sdpa"


def has_numba() -> bool:
    """Return whether the compiler of the CPU kernels is installed, without importing it."""
    return find_spec("numba") is not None


def choose_backend(name: str, device: torch.device) -> type[Backend]:
    """Return the class of the backend called `name`."""
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
    """Compare the GPU kernels that an engine of a checkpoint uses with plain torch. Returns the
    card, the versions, and for each kernel the problem ("" if there is none). Raises ValueError if
    there are no kernels."""
    from .gpu import has_triton

    if device.type != "cuda":
        raise ValueError(f"--check compares the kernels of a GPU, but the device is {device}")
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
    """Raise ValueError for an unknown quantization."""
    if quantization not in (None, *QUANTIZATIONS):
        words = ", ".join(map(repr, QUANTIZATIONS[:-1]))
        raise ValueError(
            f"quantization must be None, {words} or {QUANTIZATIONS[-1]!r}, got {quantization!r:.80}"
        )


def choose_quantization(
    options: ModelOptions, weights: dict, backend: Backend, config: GPTConfig, dtype: torch.dtype
) -> str | None:
    """Return the number format of the matrices: the one of a quantised folder, or the one to round
    to while loading. Raises ValueError if it is not supported."""
    quantization = options.quantization
    stored = stored_as(weights)
    if stored is None:
        if quantization is not None:
            backend.check_quantization(quantization, config)
            advise(quantization)
        return quantization
    if quantization not in (None, stored):
        raise ValueError(
            f"quantization={quantization!r}, but the folder has {stored}: leave it out, or "
            "give the checkpoint that the folder was made from"
        )
    if backend.takes(stored) and options.ranks is None:
        return stored
    log.info("no %s kernels for this device: the matrices are converted to %s", stored, dtype)
    return None


def stored_as(weights: dict) -> str | None:
    """Return int8, int6, int5 or int4 for weights of a quantised folder (lowbit/folder.py)."""
    bits = [weight.bits for weight in weights.values() if not isinstance(weight, torch.Tensor)]
    return f"int{min(bits)}" if bits else None


@cache  # once
def advise(quantization: str) -> None:
    """Warn that rounding weights at load time costs more than quantizing them once."""
    if quantization in ("int6", "int5", "int4"):
        log.warning(
            "quantization=%r rounds the weights to nearest at load time; `microvllm quantize` "
            "rounds them once, with a much smaller loss",
            quantization,
        )


def dense(weights: dict) -> dict[str, torch.Tensor]:
    """Return the weights with all matrices as floats. Raises ValueError if they are too large."""
    low_bit = [w for w in weights.values() if not isinstance(w, torch.Tensor)]
    num_bytes = sum(4 * weight.numel() for weight in low_bit)
    num_free = free_memory(torch.device("cpu"))
    require_memory(
        "low-bit matrices in float32", num_bytes, num_free, "keep them low-bit: use a CPU"
    )
    return {
        name: weight if isinstance(weight, torch.Tensor) else weight.dense()
        for name, weight in weights.items()
    }


# checks -------------------------------------------------------------------------------------------


def check_length(max_len: int | None, config: GPTConfig) -> None:
    """Raise ValueError for a context beyond ten times the training context."""
    length = max_len or config.sequence_len
    longest = 10 * config.sequence_len
    if length > longest:
        limit = f"at most {longest}, ten times the sequence_len of {config.sequence_len}"
        raise ValueError(f"max_model_len={max_len} exceeds the rotary tables: {limit}")


def check_memory(
    purpose: str,
    config: GPTConfig,
    num_bytes: int,
    device: torch.device,
    options: ModelOptions,
) -> None:
    """Raise ValueError with the numbers if weights of num_bytes do not fit."""
    length = options.max_len or config.sequence_len
    num_ranks = 1 if options.ranks is None else options.ranks.size
    num_new_bytes = 0 if options.share else num_bytes // num_ranks
    require_memory(
        f"{purpose}, and rotary tables of {length} positions",
        num_new_bytes + rotary_bytes(config, length),
        free_memory(device),
        "use a smaller model, fewer bits (quantization) or a smaller max_model_len",
    )


def warn_of_float16(dtype: torch.dtype) -> None:
    """Warn that the exponent range of float16 is too small for these models."""
    if dtype == torch.float16:
        log.warning(
            "float16 ends at 65,504: relu(x)^2 of a trained nanochat exceeds that and becomes "
            "infinite, then NaN; use dtype='bfloat16' or 'float32'"
        )


def warn_of_nan(weights: dict) -> None:
    """Warn of weights that are not finite."""
    pages = FilePages()
    broken = []
    for name, weight in weights.items():
        if isinstance(weight, torch.Tensor):
            if not weight.sum(dtype=torch.float32).isfinite():
                broken.append(name)
            pages.done_with(weight)
    if broken:
        log.warning("NaN or infinite weights: %s; no token can be drawn", ", ".join(broken))
