"""The full engine: the core, with every feature and room that is installed.

This is the one place where parts are put together. A feature or a room is a file or a folder that
may be deleted: then what it gives is refused, by name, and everything else goes on.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from pathlib import Path

import torch

from . import checkpoint, engine, sampler
from .checkpoint import find_tokenizer, free_memory, make_model, pick_device, pick_dtype
from .engine import RequestOutput as RequestOutput
from .scheduler import first_come, least_recently_used, youngest
from .tokenizer import load_tokenizer

log = logging.getLogger("microvllm")

# the order in which features wrap each other, the outermost first
FEATURES = (
    "guard stats checks progress nanochat live parallel scoring stop_strings calculator lookup "
    "logits windows"
).split()

# what can be asked for, and where it is
PLACES = {
    "score": "features.scoring",
    "update_weights": "features.live", "model": "features.live", "tokenizer": "features.live",
    "generate_batch": "features.nanochat", "prompt_lookup": "features.lookup",
    "tensor_parallel": "features.parallel", "tools": "features.calculator",
    "stop": "features.stop_strings", "from_nanochat": "sources.places", "tracing": "trace",
    "trace": "trace", "int8": "cpu.backend", "numba": "cpu.backend", "fp8": "gpu.backend",
    "triton": "gpu.backend", "flash": "gpu.flash", "sdpa": "fused.backend",
    "deterministic": "fused.backend",
    **dict.fromkeys(
        (
            "repetition_penalty presence_penalty frequency_penalty min_tokens logprobs logit_bias "
            "allowed_token_ids bad_words logits_processor"
        ).split(),
        "features.logits",
    ),
}  # fmt: skip


@cache
def optional(name: str):
    """The module microvllm.<name>, or the exception that says which module is not there. What is
    there and broken raises its own error."""
    try:
        return import_module(f".{name}", __package__)
    except ModuleNotFoundError as error:
        return error


def needed(what: str, name: str | None = None):
    """The module that gives `what`. Raises ImportError, naming it and the remedy, if it is not
    there."""
    name = name or PLACES[what]
    module = optional(name)
    if not isinstance(module, ImportError):
        return module
    place = f"microvllm/{name.replace('.', '/')}"
    gone = module.name or ""
    if gone.startswith(f"{__package__}."):
        why = "is not there: reinstall microvllm (pip install --force-reinstall microvllm)"
        if not f"{__package__}.{name}".startswith(gone):  # another one, that it imports
            why = f"needs {gone.replace('.', '/')}, which {why}"
    else:
        why = f"needs the package {gone}: pip install {gone}"
    raise ImportError(f"{what} is in {place}, which {why}", name=gone) from None


def has(name: str) -> bool:
    return not isinstance(optional(name), ImportError)


def parts(kind: str) -> tuple[type, ...]:
    """The classes of one kind that the installed features add, the outermost first."""
    modules = (optional(f"features.{name}") for name in FEATURES if has(f"features.{name}"))
    return tuple(module.PARTS[kind] for module in modules if kind in module.PARTS)


@cache
def compose(*classes: type) -> type:
    """A class of these classes' methods, the first ones' first."""
    return type(classes[-1].__name__, classes, {"__doc__": classes[-1].__doc__})


@dataclass(frozen=True)
class SamplingParams(*parts("params"), sampler.SamplingParams):
    """How one request is sampled. Raises ValueError or TypeError when built with a value that makes
    no sense. The parameters are described in sampler.py, features/logits.py and
    features/stop_strings.py."""

    def __new__(cls, *_, **given):
        for name in given.keys() & PLACES.keys() - cls.__dataclass_fields__.keys():
            needed(name)
        return super().__new__(cls)


def pick_backend(name: str, device: torch.device, dtype: torch.dtype, deterministic: bool = False):
    """The Backend called `name`; "auto" is the fastest one that runs on `device`.

    Raises ValueError for an unknown name, or for a backend that cannot run here, saying why.
    """
    if name == "auto":
        if has("gpu") and optional("gpu").has_triton(device):
            name = "triton"
        elif device.type == "cpu" and dtype != torch.float16 and has("cpu.backend"):
            name = "numba"
        else:
            name = "sdpa"
    classes = {
        "sdpa": "Backend", "numba": "CpuBackend", "triton": "TritonBackend",
        "flash": "FlashBackend",
    }  # fmt: skip
    if name not in classes:
        raise ValueError(
            f"attention must be 'auto', 'sdpa', 'numba', 'triton' or 'flash', got {name!r}"
        )
    if name == "sdpa" and device.type == "cuda" and has("gpu.backend"):
        return optional("gpu.backend").GpuBackend(device, dtype, deterministic)
    return getattr(needed(name), classes[name])(device, dtype, deterministic)


def build_model(
    config, recipe, weights, device, dtype="auto", *, share=False, attention="auto", max_len=None,
    quantization=None, deterministic=False, ranks=None, **overrides,
):  # fmt: skip
    """The FusedGPT that LLM's options ask for (max_len is its max_model_len) on checked weights.

    Raises ValueError for an option that cannot be here, TypeError for an override that is no
    constant of the recipe.
    """
    dtype = pick_dtype(dtype, device)
    check_length(max_len, config, device)
    if quantization not in (None, "int8", "fp8"):
        raise ValueError(f"quantization must be None, 'int8' or 'fp8', got {quantization!r:.80}")
    recipe = recipe.override(**overrides)
    backend = pick_backend(attention, device, dtype, deterministic)
    if quantization:
        needed(quantization)
        backend.check_quantization(quantization, config)
    if ranks:
        ranks.check(quantization, deterministic)
    store = quantization
    if dtype == torch.bfloat16 and backend.name == "numba":
        dtype, store = torch.float32, "bfloat16"  # a CPU saves memory's time, not arithmetic's
    size = sum(weight.numel() for weight in weights.values()) * dtype.itemsize
    options = dtype, max_len, share, store, ranks
    with fits(f"weights of {size:,} bytes in {dtype}", device):
        return optional("fused.model").FusedGPT(config, recipe, weights, backend, *options)


def fits(what: str, device: torch.device):
    """A context that raises ValueError with the numbers if there is no memory for what is made
    inside."""
    if device.type != "cuda":
        return nullcontext()
    return needed("triton", "gpu.memory").fits(what, device)


def load_model(model_path, step=None, device="cpu", dtype="auto", **options):
    """Load a checkpoint of any era and any place, strictly; options: see `build_model`.

    Raises FileNotFoundError or ValueError naming the file and what is wrong with it.
    """
    found = find_checkpoint(model_path, step)
    return build_model(*read_checkpoint(*found), torch.device(device), dtype, **options)


def find_checkpoint(name, step=None) -> tuple[Path, int | None]:
    """Where a checkpoint is: see sources/places.py; without it, directories alone are known."""
    if has("sources.places"):
        return optional("sources.places").find_checkpoint(name, step)
    directory = Path(name).expanduser().absolute()
    if not any(directory.glob("model_*.pt")):
        what = f"{name!r} has no model_<step>.pt; what finds other formats and places"
        needed(what, "sources.places")
    return directory, checkpoint.find_step(directory, step)


def read_checkpoint(directory: Path, step: int | None):
    """Config, recipe and weights of what `find_checkpoint` found."""
    places = optional("sources.places") if has("sources.places") else checkpoint
    return places.read_checkpoint(directory, step)


def open_tokenizer(directory, tokenizer_path=None):
    """The tokenizer of a checkpoint."""
    if has("sources.places"):
        return optional("sources.places").open_tokenizer(directory, tokenizer_path)
    return load_tokenizer(find_tokenizer(directory, tokenizer_path))


GPU = [optional(f"gpu.{name}").PARTS["llm"] for name in ("memory", "ahead") if has(f"gpu.{name}")]


class LLM(*parts("llm"), *GPU, engine.LLM):
    """A nanochat model ready to generate.

    model_path: directory with model_<step>.pt and meta_<step>.json (step: None is the last one), a
    place in nanochat's tree ("sft", "base:d20", "rl:d20:650"), a Hugging Face folder, or owner/name
    on its hub; tokenizer_path: directory or tokenizer.pkl, by default looked for next to the model
    and in nanochat's base directory; device: "auto" is cuda, then mps, then cpu; num_blocks,
    block_size: the KV pool, by default what memory allows, in blocks of 16 tokens; max_batch_size:
    sequences that run at once; dtype: "auto" is float32 on a CPU and bfloat16 on CUDA;
    max_batched_tokens: tokens of one step; max_model_len: prompt plus output of a request, by
    default the checkpoint's context, at most ten times that; attention: "auto", "numba", "triton",
    "flash" or "sdpa"; seed: of requests that bring none; model, tokenizer: a live nanochat GPT
    module, whose weights are shared where device and dtype allow it, and its tokenizer, instead of
    paths; gpu_memory_utilization: share of the free GPU memory for the cache; cuda_graphs: replay
    decode steps; quantization: on a CPU "int8", of the matrices and the inputs of all products (K
    and V are bfloat16), on a GPU "fp8"; deterministic: logits, and so tokens, bit for bit the same
    alone or in a batch, cold or warm, slower where the products are a library's; prompt_lookup: on
    a CPU, tokens that a sequence's text lets guess, at most so many a step, and kept if they are
    what is drawn: the same output, sooner where it repeats itself and few run (features/lookup.py);
    tensor_parallel: torchrun's processes, which share the model and all do the same; trace: a file
    to write events to, see trace/; victim, admission, eviction: policies, such as those in
    scheduler.py; plain: run the core's own model and attention, slowly, so that a breakpoint in
    model.py is reached; any constant of model.Recipe may be overridden by name (softcap=20 for a
    checkpoint of era 3b).

    Beside what RequestOutput names, outputs have mask (0 for the tokens that a tool forced, else 1)
    and, where asked for, logprobs (of each token a dict of token_id, logprob: the model's,
    sampler_logprob: after temperature and filters, top: alternatives; None for forced tokens);
    stop_reason may be a stop string.

    Raises FileNotFoundError, ValueError or TypeError, naming what is wrong and what to do.
    """

    ranks = None  # the processes that share the model

    def __init__(
        self, model_path=None, step=None, tokenizer_path=None, device="auto", num_blocks=None,
        block_size=16, max_batch_size=None, *, dtype="auto", max_batched_tokens=None,
        max_model_len=None, enable_prefix_caching=True, attention="auto", seed=0, model=None,
        tokenizer=None, gpu_memory_utilization=0.9, cuda_graphs=True, quantization=None,
        deterministic=False, prompt_lookup=0, tensor_parallel=1, trace=None, victim=youngest,
        admission=first_come, eviction=least_recently_used, plain=False, **overrides,
    ):  # fmt: skip
        policies = {"victim": victim, "admission": admission, "eviction": eviction}
        if has("features.checks"):
            checks = optional("features.checks")
            checks.check_arguments(locals())
            policies = checks.checked_policies(**policies)
        asked = {
            "prompt_lookup": prompt_lookup, "tensor_parallel": tensor_parallel > 1,
            "model": model is not None, "tokenizer": tokenizer is not None,
            "trace": trace is not None, "deterministic": deterministic,
        }  # fmt: skip
        for name in asked:
            if asked[name]:
                needed(name)
        self.gpu_memory_utilization, self.cuda_graphs = gpu_memory_utilization, cuda_graphs
        if tensor_parallel > 1:
            self.ranks = optional("features.parallel").Ranks(tensor_parallel, device)
            device = self.ranks.device
        device = pick_device(device)
        self.prompt_lookup = check_lookup(prompt_lookup, device)
        if model is None:
            model_path, step = find_checkpoint(model_path, step)
            found = read_checkpoint(model_path, step)
        else:
            found = optional("features.live").from_module(model)
        own = {
            "attention": attention, "quantization": quantization, "deterministic": deterministic,
            "ranks": self.ranks,
        }  # fmt: skip
        if plain or not has("fused.model"):
            check_plain(plain, own)
            check_length(max_model_len, found[0], device)
            self.model = make_model(*found, device, dtype, max_len=max_model_len, **overrides)
        else:
            own |= {"share": model is not None, "max_len": max_model_len}
            self.model = build_model(*found, device, dtype, **own, **overrides)
            step_size = self.model.backend.block_step
            if block_size % step_size:
                reason = self.model.backend.block_step_reason
                raise ValueError(f"block_size={block_size}: {reason}")
        if tokenizer is not None:
            tokenizer = optional("features.live").wrap_tokenizer(tokenizer)
        else:
            tokenizer = open_tokenizer(model_path, tokenizer_path)
        self.name = Path(model_path).name if model_path else type(model).__name__
        self.parts = self._pick_parts()
        limits = max_batch_size, max_batched_tokens, max_model_len
        memory = num_blocks, block_size, enable_prefix_caching
        self._assemble(self.model, tokenizer, *limits, *memory, seed, **policies)
        if hasattr(self.runner, "record"):
            self.runner.record(self.max_batch_size, self.max_model_len)
        log.info(
            "%s: era %s, %d layers, %s on %s; %d blocks of %d tokens (%.1f MB)",
            model_path or self.name, self.model.recipe.era, self.model.config.n_layer,
            str(self.model.dtype)[6:], device, self.stats()["num_blocks"] + 1, block_size,
            self.cache.data.nbytes / 1e6,
        )  # fmt: skip
        if trace is not None:
            optional("trace").attach(self, trace)

    def _pick_parts(self) -> engine.Parts:
        """The classes that this engine is made of."""
        runners, guessers = [*parts("runner")], []
        if not self.ranks and has("features.parallel"):  # a call less in every step
            runners.remove(optional("features.parallel").PARTS["runner"])
        if self.model.device.type == "cuda" and has("gpu.ahead"):
            runners.insert(0, optional("gpu.ahead").AheadRunner)
            backend = getattr(self.model, "backend", None)
            if backend and backend.name == "triton" and self.cuda_graphs and not self.ranks:
                runners.append(optional("gpu.graphs").GraphRunner)
        if hasattr(self.model, "backend"):
            runners.append(optional("fused.runner").FusedRunner)
        if self.prompt_lookup:
            guesser = optional("features.lookup").PARTS["guesser"]
            guessers.append(type("Guesser", (guesser,), {"num_guesses": self.prompt_lookup}))
        return engine.Parts(
            scheduler=compose(*guessers, *parts("scheduler"), engine.Scheduler),
            runner=compose(*runners, engine.Runner),
            text=compose(*parts("text"), engine.Text),
            params=SamplingParams,
        )

    @classmethod
    def from_nanochat(
        cls, source: str = "sft", model_tag: str | None = None, step: int | None = None, **kwargs
    ):
        """Find a checkpoint the way nanochat lays them out under $NANOCHAT_BASE_DIR
        (~/.cache/nanochat). source: "base", "mid", "sft" or "rl"; model_tag: see find_nanochat."""
        places = needed("from_nanochat")
        return cls(places.find_nanochat(source, model_tag), step, **kwargs)

    @contextmanager
    def tracing(self, path=None):
        """Trace what is done inside: `with llm.tracing() as t: ...`, then t.page("run.html").

        path: a file to write events to, by default they are kept in memory. Raises ValueError if
        there is a trace already.
        """
        trace = needed("tracing").attach(self, path)
        try:
            yield trace
        finally:
            try:
                self._settle()
            finally:
                trace.close()

    def _check(self, prompt, params):
        if type(params) is sampler.SamplingParams:  # the core's own
            params = upgrade(params)
        return super()._check(prompt, params)

    def _check_options(self, options: dict) -> None:
        for name in options.keys() & PLACES.keys() - self.request_options:
            if options[name]:
                needed(name)
        super()._check_options(options)

    def close(self) -> None:
        """Drop the weights and the cache; whatever is unfinished is aborted."""
        super().close()
        events = self.scheduler.blocks.events
        if hasattr(events, "close"):
            events.close()

    def __getattr__(self, name: str):
        if name in PLACES and not name.startswith("_"):
            needed(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def upgrade(params: sampler.SamplingParams) -> SamplingParams:
    """The core's parameters as the full engine's."""
    given = {f.name: getattr(params, f.name) for f in fields(params) if f.init}
    return SamplingParams(**given)


def check_lookup(prompt_lookup: int, device: torch.device) -> int:
    """Raises ValueError where nothing can be guessed."""
    if prompt_lookup and device.type == "cuda":
        raise ValueError(
            f"prompt_lookup={prompt_lookup} is for the loop of a CPU: on {device} a step "
            "is planned before the last one's tokens are known, and there is nothing to guess "
            "from; leave it 0, or give device='cpu'"
        )
    return int(prompt_lookup)


def check_length(max_len: int | None, config, device: torch.device) -> None:
    """Raises ValueError for a context beyond ten times that of the training, or one for which there
    is no memory."""
    length, most = max_len or config.sequence_len, 10 * config.sequence_len
    if length > most:
        raise ValueError(
            f"max_model_len={max_len} is beyond the rotary tables: {most} at most, ten times the "
            f"sequence_len of {config.sequence_len}"
        )
    # angles, cosines and sines in float32, two of them rounded for a while
    if 10 * length * config.head_dim > free_memory(device):
        raise ValueError(
            f"no memory for rotary tables of {length} positions: give a smaller max_model_len"
        )


def check_plain(plain: bool, options: dict) -> None:
    """Raises for options that the core's own path does not have."""
    for name, value in options.items():
        if value not in (None, False, "auto"):
            if not plain:
                needed(name, "fused.model")
            raise ValueError(f"plain=True runs the core alone, which has no {name}: leave it out")
