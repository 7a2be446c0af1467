"""The full engine: the core, with every feature and room that is installed.

This is the one place where parts are put together. A feature or a room is a file or a folder that
may be deleted: then what it gives is refused, by name, and everything else goes on.
"""

import dataclasses
import logging
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import cache, partial
from importlib import import_module
from pathlib import Path

import torch

from . import checkpoint, engine, sampler
from .checkpoint import (
    find_tokenizer,
    make_model,
    pick_device,
    pick_dtype,
    require_memory,
)
from .environment import REINSTALL, free_memory, limit_threads
from .model import rotary_bytes
from .scheduler import first_come, least_recently_used, youngest
from .tokenizer import load_tokenizer

log = logging.getLogger("microvllm")

QUANTIZATIONS = "int8", "int6", "int5", "int4", "fp8"  # the last one is a GPU's
BITS = {"int8": 8, "int6": 6, "int5": 5, "int4": 4, "fp8": 8, "bfloat16": 16}  # of what is stored

# the order in which features wrap each other, the outermost first
FEATURES = (
    "async_api guard display guided stats checks progress nanochat live parallel scoring "
    "stop_strings calculator lookup logits windows"
).split()

# where it is, and what can be asked for
NAMES = {
    "features.scoring": "score judge", "features.guard": "partial_outputs",
    "features.live": "update_weights model copy sleep wake", "features.foreign": "tokenizer",
    "features.nanochat": "generate_batch generate_columns agenerate_columns",
    "features.async_api": "agenerate astream achat serve_async warm",
    "features.lookup": "prompt_lookup",
    "features.parallel": "tensor_parallel", "features.calculator": "tools", "features.stats":
        "stats",
    "features.stop_strings": "stop", "features.guided": "guide", "features.logits":
        "repetition_penalty presence_penalty frequency_penalty min_tokens logprobs logit_bias "
        "allowed_token_ids bad_words logits_processor",
    "sources.places": "from_nanochat", "trace": "tracing trace", "cpu.backend":
        "int8 int6 int5 int4 numba",
    "gpu.backend": "fp8 triton", "gpu.flash": "flash", "fused.backend": "sdpa deterministic",
    "fused.int8_cache": "kv_cache_dtype",
}  # fmt: skip
PLACES = {name: place for place, names in NAMES.items() for name in names.split()}


@cache
def optional(name: str):
    """The module microvllm.<name>; None if it, or a package that it needs, is not there. What is
    there and broken raises its own error."""
    try:
        return import_module(f".{name}", __package__)
    except ModuleNotFoundError:
        return None


def needed(what: str, name: str | None = None):
    """The module that gives `what`. Raises ImportError with the remedy if it is not there."""
    name = name or PLACES[what]
    try:
        return import_module(f".{name}", __package__)
    except ModuleNotFoundError as error:
        gone = error.name or ""
    if gone.startswith(f"{__package__}."):
        why = f"is not there: {REINSTALL}"
        if not f"{__package__}.{name}".startswith(gone):  # another one, that it imports
            why = f"needs {gone.replace('.', '/')}, which {why}"
    else:
        why = f"needs the package {gone}: pip install {gone}"
    raise ImportError(f"{what} is in microvllm/{name.replace('.', '/')}, which {why}", name=gone)


def parts(kind: str) -> tuple[type, ...]:
    """The classes of one kind that the installed features add, the outermost first."""
    modules = filter(None, [optional(f"features.{name}") for name in FEATURES])
    return tuple(module.PARTS[kind] for module in modules if kind in module.PARTS)


@cache
def compose(*classes: type) -> type:
    """A class of these classes' methods, the first ones' first."""
    return type(classes[-1].__name__, classes, {"__doc__": classes[-1].__doc__})


@dataclass(frozen=True)
class SamplingParams(*parts("params"), sampler.SamplingParams):
    """How one request is sampled. Raises ValueError or TypeError when built with a value that makes
    no sense. The parameters are described in sampler.py, features/logits.py, features/guided.py and
    features/stop_strings.py."""

    def __new__(cls, *_, **given):
        for name in (given.keys() - cls.__dataclass_fields__.keys()) & PLACES.keys():
            needed(name)
        if checks := optional("features.checks"):
            checks.check_names(given, checks.words(cls))
        return super().__new__(cls)


class RequestOutput(*parts("output"), engine.RequestOutput):
    """The result of a request, a dict; its keys, which are attributes too, are described in
    engine.py and below, at LLM. In a notebook it is a table."""


def pick_backend(
    name: str, device: torch.device, dtype: torch.dtype, deterministic=False, kv_cache_dtype="auto"
):  # fmt: skip
    """The Backend called `name`; "auto" is the fastest one that runs on `device`. Raises ValueError
    for an unknown name, or for what cannot be here, saying why."""
    if kv_cache_dtype not in ("auto", "int8"):
        raise ValueError(f"kv_cache_dtype must be 'auto' or 'int8', got {kv_cache_dtype!r:.80}")
    if name == "auto":
        gpu = optional("gpu")
        if gpu and gpu.has_triton(device):
            name = "triton"
        elif device.type == "cpu" and dtype != torch.float16 and optional("cpu.backend"):
            name = "numba"
        else:
            name = "sdpa"
    classes = {"numba": "CpuBackend", "triton": "TritonBackend", "flash": "FlashBackend"}
    if name in classes:
        kind = getattr(needed(name), classes[name])
    elif name != "sdpa":
        names = "'auto', 'sdpa', 'numba', 'triton' or 'flash'"
        raise ValueError(f"attention must be {names}, got {name!r}")
    elif device.type == "cuda" and optional("gpu.backend"):
        kind = optional("gpu.backend").GpuBackend
    else:
        kind = needed(name).Backend
    if kv_cache_dtype == "int8":
        kind = needed("kv_cache_dtype").with_int8_cache(kind, device)
    return kind(device, dtype, deterministic)


@cache  # once
def advise(quantization: str) -> None:
    """Say what costs less, where weights are rounded as they are loaded."""
    if quantization in ("int6", "int5", "int4"):
        log.warning(
            "quantization=%r: weights are rounded to the nearest while they are loaded; rounded "
            "once by `microvllm quantize` they lose much less", quantization,
        )  # fmt: skip


def build_model(
    config, recipe, weights, device, dtype="auto", *, share=False, attention="auto", max_len=None,
    quantization=None, kv_cache_dtype="auto", deterministic=False, ranks=None, **overrides,
):  # fmt: skip
    """The FusedGPT that LLM's options ask for (max_len is its max_model_len) on checked weights.
    Raises ValueError for an option that cannot be here, TypeError for an override that is no
    constant of the recipe."""
    dtype = pick_dtype(dtype, device)
    if dtype == torch.float16:
        log.warning(
            "float16 ends at 65,504: relu(x)^2 of a trained nanochat is larger, becomes infinite "
            "and then NaN; dtype='bfloat16' or 'float32' is right"
        )
    check_length(max_len, config)
    if quantization not in (None, *QUANTIZATIONS):
        words = ", ".join(map(repr, QUANTIZATIONS[:-1]))
        raise ValueError(
            f"quantization must be None, {words} or {QUANTIZATIONS[-1]!r}, got {quantization!r:.80}"
        )
    recipe = (optional("sources.strict") or dataclasses).replace(recipe, **overrides)
    backend = pick_backend(attention, device, dtype, deterministic, kv_cache_dtype)
    if stored := stored_as(weights):
        if quantization not in (None, stored):
            raise ValueError(
                f"quantization={quantization!r}, and the folder has {stored}: leave it out, or "
                "give the checkpoint that the folder was made from"
            )
        quantization = stored if backend.takes(stored) and not ranks else None
        if not quantization:
            log.info("no products of %s here: its matrices become %s", stored, dtype)
        if ranks:
            weights = dense(weights)
    elif quantization:
        needed(quantization)
        backend.check_quantization(quantization, config)
        advise(quantization)
    if ranks:
        ranks.check(quantization, deterministic)
    store = quantization
    if dtype == torch.bfloat16 and backend.name == "numba":
        dtype, store = torch.float32, "bfloat16"  # a CPU saves memory's time, not arithmetic's
    whole = {name: weight for name, weight in weights.items() if isinstance(weight, torch.Tensor)}
    sums = {name: weight.sum(dtype=torch.float32) for name, weight in whole.items()}
    if broken := [name for name, total in sums.items() if not total.isfinite()]:
        log.warning("NaN or infinite weights, %s: the model can draw no token", ", ".join(broken))
    numel, length = sum(w.numel() for w in weights.values()), max_len or config.sequence_len
    what = f"weights of {numel * dtype.itemsize:,} bytes in {dtype}"
    # what is kept at least: tables and cache may have more bits than the matrices
    bits = 0 if share else BITS.get(store, 8 * dtype.itemsize)
    wanted = numel * bits // 8 // (ranks.size if ranks else 1) + rotary_bytes(config, length)
    remedy = "use a smaller model, fewer bits (quantization) or a smaller max_model_len"
    tables = f"{what}, and rotary tables of {length} positions"
    require_memory(tables, wanted, free_memory(device), remedy)
    with fits(what, device):
        options = dtype, max_len, share, store, ranks
        return optional("fused.model").FusedGPT(config, recipe, weights, backend, *options)


def stored_as(weights: dict) -> str | None:
    """int8, int6, int5 or int4, if the weights are of a quantised folder (sources/quantised.py)."""
    bits = [weight.bits for weight in weights.values() if not isinstance(weight, torch.Tensor)]
    return f"int{min(bits)}" if bits else None


def dense(weights: dict) -> dict[str, torch.Tensor]:
    """The same with all matrices as floats. Raises ValueError if these are too large."""
    found = weights.items()
    wanted = sum(4 * w.numel() for w in weights.values() if not isinstance(w, torch.Tensor))
    free = free_memory(torch.device("cpu"))
    require_memory("low-bit matrices in float32", wanted, free, "run them on a CPU as they are")
    return {k: w if isinstance(w, torch.Tensor) else w.dense() for k, w in found}


@contextmanager
def fits(what: str, device: torch.device):
    """Raises ValueError with the numbers if there is no memory for what is made inside: more than
    is free is refused before, but a limit of addresses (ulimit -v) is met here, and on a GPU what
    others take meanwhile."""
    memory = optional("gpu.memory")
    try:
        with memory.fits(what, device) if memory else nullcontext():
            yield
    except (MemoryError, RuntimeError) as error:  # numpy's and C++'s; torch's
        words = "can't allocate memory", "not enough memory"  # other errors are told as they are
        if isinstance(error, RuntimeError) and not any(x in str(error) for x in words):
            raise
        raise ValueError(
            f"no memory for {what}: {free_memory(device):,} bytes are free on {device}, but this "
            f"process gets no more ({error or 'out of memory'!s:.80}); use a smaller model, lower "
            "num_blocks or max_batched_tokens, or raise the process's limit (ulimit -v)"
        ) from None


def on_device(device: torch.device):
    """A context in which kernels and events go to the device: CUDA has a current one for each
    thread, and that is the user's, who may have other cards and other engines."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


_computing: int | None = None  # the process in which an engine with several threads was made


def set_torch_threads(count: int) -> None:
    """Have torch use `count` threads, unless it does: to set its number empties its caches."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


def check_process(num_threads: int | None = None) -> None:
    """Raises RuntimeError in a fork of a process that has an engine with several threads: the child
    has none of them, and torch would wait for them for ever. num_threads: of the new engine, by
    default torch's number."""
    global _computing
    if (num_threads or torch.get_num_threads()) > 1:
        _computing = _computing or os.getpid()
        if _computing != os.getpid():
            raise RuntimeError(
                f"an LLM was made in process {_computing}, whose threads a fork does not have: "
                "start processes with 'spawn' or 'forkserver' (multiprocessing.get_context)"
            )


def check_length(max_len: int | None, config) -> None:
    """Raises ValueError for a context beyond ten times that of the training."""
    length, most = max_len or config.sequence_len, 10 * config.sequence_len
    if length > most:
        limit = f"{most} at most, ten times the sequence_len of {config.sequence_len}"
        raise ValueError(f"max_model_len={max_len} is beyond the rotary tables: {limit}")


def load_model(model_path, step=None, device="cpu", dtype="auto", **options):
    """Load a checkpoint of any era and any place, strictly; options: see `build_model`. Raises
    FileNotFoundError or ValueError naming the file and what is wrong with it."""
    found = find_checkpoint(model_path, step)
    return build_model(*read_checkpoint(*found), torch.device(device), dtype, **options)


def find_checkpoint(name, step=None) -> tuple[Path, int | None]:
    """Where a checkpoint is: see sources/places.py; without it, directories alone are known."""
    if places := optional("sources.places"):
        return places.find_checkpoint(name, step)
    directory = Path(os.path.abspath(os.path.expanduser(name)))
    if not any(directory.glob("model_*.pt")):
        what = f"{name!r} has no model_<step>.pt; what finds other formats and places"
        needed(what, "sources.places")
    return directory, checkpoint.find_step(directory, step)


def read_checkpoint(directory: Path, step: int | None):
    """Config, recipe and weights of what `find_checkpoint` found."""
    return (optional("sources.places") or checkpoint).read_checkpoint(directory, step)


LOOPS = filter(None, map(optional, ("gpu.memory", "cpu.several", "gpu.ahead")))


class LLM(*parts("llm"), *[module.PARTS["llm"] for module in LOOPS], engine.LLM):
    """The core's LLM with every feature; its docstring, in engine.py, has the other arguments.

    model_path: also a place in nanochat's tree ("sft", "base:d20", "rl:d20:650"), a Hugging Face
    folder, or owner/name on its hub; model, tokenizer: instead of paths, a live nanochat GPT
    module, whose weights are shared where device and dtype allow it, and followed when they change
    (features/live.py), and its tokenizer; copy: of that module's weights, which takes their memory
    once more, in the layout that is fastest here; dtype: "auto" is float32 on a CPU and bfloat16 on
    CUDA; max_model_len: at most ten times the checkpoint's context; attention: "auto", "numba",
    "triton", "flash" or "sdpa"; gpu_memory_utilization: share of the free GPU memory for the cache,
    by default 0.9 (beside a live module the default pool of any device is a quarter of that: the
    training has yet to take its part); cuda_graphs: replay decode steps; quantization: on a CPU
    "int8", "int6", "int5" or "int4", of the matrices, whose inputs are int8 then (K and V are
    bfloat16), on a GPU "fp8", and for a folder of `microvllm quantize` what it has;
    kv_cache_dtype: "int8" keeps K and V in 8 bits, on a CPU (fused/int8_cache.py), "auto" as said;
    deterministic: logits, and so tokens, bit for bit the same alone or in a batch, cold or warm,
    slower where the products are a library's; prompt_lookup: on a CPU, at most so many guessed
    tokens a step, sooner done where few texts run and repeat themselves (features/lookup.py);
    tensor_parallel: torchrun's processes, which share the model and all do the same; num_threads:
    CPU threads that this engine's steps and its loading use, from 1 to the CPUs that this process
    may use, by default as many as torch uses (torch.get_num_threads()). Torch has this number while
    the engine runs a step, in the thread that runs it, and its former one again after the step: two
    engines may have different numbers, and a training beside them keeps its own; only a thread that
    uses torch for the first time during a step begins with the step's number. trace: a file to
    write events to, see trace/; plain: run the core's own model and attention, slowly, so that a
    breakpoint in model.py is reached; trust_tokenizer: take a tokenizer's file
    also if its pattern is none of nanochat's (such a pattern may take any time and memory for a
    text).

    Prompts may be one list, array or tensor of token ids, too, or a matrix with a prompt in each
    row. Outputs also have mask (0 for the tokens that a tool forced, else 1; in events of a stream,
    too), tool_calls ({"call": "45+54", "result": "99"} each) and, where asked for, logprobs (of
    each token a dict, see features/logits.py, or None if it was forced); stop_reason may be a stop
    string.
    """

    ranks = None  # the processes that share the model
    params_class, output_class = SamplingParams, RequestOutput

    def __init__(
        self, model_path=None, step=None, tokenizer_path=None, device="auto", num_blocks=None,
        block_size=16, max_batch_size=None, *, dtype="auto", max_batched_tokens=None,
        max_model_len=None, enable_prefix_caching=True, attention="auto", seed=0, model=None,
        tokenizer=None, copy=False, gpu_memory_utilization=None, cuda_graphs=True,
        quantization=None, kv_cache_dtype="auto", deterministic=False, prompt_lookup=0,
        tensor_parallel=1, trace=None, victim=youngest, admission=first_come,
        eviction=least_recently_used, plain=False, num_threads=None, trust_tokenizer=False,
        **overrides,
    ):  # fmt: skip
        given = locals()
        policies = {"victim": victim, "admission": admission, "eviction": eviction}
        if checks := optional("features.checks"):
            policies = checks.check_arguments(given)
        check_process(num_threads)
        self.num_threads = self._threads_now = num_threads
        asked = {
            "prompt_lookup": prompt_lookup, "tensor_parallel": tensor_parallel > 1, "model": model,
            "tokenizer": tokenizer, "copy": copy, "trace": trace, "deterministic": deterministic,
        }  # fmt: skip
        for name, value in asked.items():
            if value not in (None, False):
                needed(name)
        self.gpu_memory_utilization, self.cuda_graphs = gpu_memory_utilization or 0.9, cuda_graphs
        self.modest = model is not None and gpu_memory_utilization is None
        self.prompt_lookup = int(prompt_lookup)
        if tensor_parallel > 1:
            self.ranks = needed("tensor_parallel").Ranks(tensor_parallel, device)
            device = self.ranks.device
        device = pick_device(device)
        if device.type == "cpu":
            limit_threads()
        if prompt_lookup and device.type == "cuda":
            raise ValueError(
                f"prompt_lookup={prompt_lookup} is for the loop of a CPU: on {device} a step "
                "is planned before the last one's tokens are known, and there is nothing to guess "
                "from; leave it 0, or give device='cpu'"
            )
        own = {
            "attention": attention, "quantization": quantization, "deterministic": deterministic,
            "kv_cache_dtype": kv_cache_dtype, "ranks": self.ranks,
        }  # fmt: skip
        if plain or not optional("fused.model"):
            for name, value in own.items():
                if value not in (None, False, "auto"):
                    if not plain:
                        needed(name, "fused.model")
                    what = f"the core alone, which has no {name}"
                    raise ValueError(f"plain=True runs {what}: leave it out")

            def build_here(config, recipe, weights):
                recipe = (optional("sources.strict") or dataclasses).replace(recipe, **overrides)
                with fits("weights", device):
                    weights = dense(weights)
                    return make_model(config, recipe, weights, device, dtype, max_len=1)
        else:
            own |= {"share": model is not None and not copy, "max_len": 1}
            build_here = partial(build_model, device=device, dtype=dtype, **own, **overrides)

        def build(config, recipe, weights):  # with the tables of `_make_tables`
            check_length(max_model_len, config)
            return build_here(config, recipe, weights)

        with on_device(device), self._own_threads():
            if model is None:
                model_path, step = find_checkpoint(model_path, step)
                self.model = build(*read_checkpoint(model_path, step))
            else:
                self.model = self._serve(model, build)
            if backend := getattr(self.model, "backend", None):
                if block_size % backend.block_step:
                    raise ValueError(f"block_size={block_size}: {backend.block_step_reason}")
            if tokenizer is not None:
                wrap = needed("tokenizer").wrap_tokenizer
                tokenizer = wrap(tokenizer, self.model.config.vocab_size)
            elif places := optional("sources.places"):
                tokenizer = places.open_tokenizer(model_path, tokenizer_path, trust_tokenizer)
            else:
                tokenizer = load_tokenizer(find_tokenizer(model_path, tokenizer_path))
            self.name = Path(model_path).name if model_path else type(model).__name__
            self._pick_classes()
            self._assemble(
                self.model, tokenizer, max_batch_size, max_batched_tokens, max_model_len,
                num_blocks, block_size, enable_prefix_caching, seed, **policies,
            )  # fmt: skip
            if hasattr(self.runner, "record"):
                self.runner.record(self.max_batch_size, self.max_positions)
        blocks = self.scheduler.blocks
        log.info(
            "%s: era %s, %d layers, %s on %s; %d blocks of %d tokens, K and V in %s (%.1f MB)",
            model_path or self.name, self.model.recipe.era, self.model.config.n_layer,
            str(self.model.dtype)[6:], device, blocks.num_usable // blocks.width + 1, block_size,
            str(self.cache.data.dtype)[6:], self.cache.data.nbytes / 1e6,
        )  # fmt: skip
        if trace is not None:
            room = needed("trace")
            room.attach(self, room.make_trace(self, trace))

    def _pick_classes(self) -> None:
        """Set the classes that this engine is made of."""
        schedulers, runners = [*parts("scheduler")], [*parts("runner")]
        backend = getattr(self.model, "backend", None)
        if self.ranks:
            runners.insert(0, optional("features.parallel").PARTS["rank"])
        if self.model.device.type == "cuda" and (ahead := optional("gpu.ahead")):
            runners.insert(0, ahead.AheadRunner)
            if backend and backend.name == "triton" and self.cuda_graphs and not self.ranks:
                runners.append(optional("gpu.graphs").GraphRunner)
                schedulers.append(optional("gpu.admission").GroupScheduler)
        if getattr(self.model, "compiled", None) and not self.prompt_lookup:
            runners.append(optional("cpu.several").SeveralRunner)
        if backend:
            runners.append(optional("fused.model").FusedRunner)
        if self.prompt_lookup:
            guesser = optional("features.lookup").PARTS["guesser"]
            schedulers.insert(0, type("Guesser", (guesser,), {"num_guesses": self.prompt_lookup}))
        self.scheduler_class = compose(*schedulers, engine.Scheduler)
        self.runner_class = compose(*runners, engine.Runner)
        self.text_class = compose(*parts("text"), engine.Text)

    @classmethod
    def from_nanochat(cls, source="sft", model_tag=None, step=None, **kwargs):
        """Find a checkpoint the way nanochat lays them out under $NANOCHAT_BASE_DIR
        (~/.cache/nanochat). source: "base", "mid", "sft" or "rl"; model_tag: see find_nanochat."""
        places = needed("from_nanochat")
        return cls(places.find_nanochat(source, model_tag), step, **kwargs)

    @contextmanager
    def _own_threads(self):
        """Inside, torch uses num_threads threads in the calling thread, and the kernels of a CPU
        with it; after it torch's number is the former one. A number that is set inside (a backend
        leaves a thread to the compiler for a while) is this engine's from then on."""
        if self.num_threads is None:
            yield
            return
        before = torch.get_num_threads()
        try:
            set_torch_threads(self._threads_now)
            yield
        finally:
            self._threads_now = torch.get_num_threads()
            set_torch_threads(before)

    def _advance(self) -> None:
        with self._own_threads():
            super()._advance()

    def reset_prefix_cache(self) -> None:
        """Forget all cached blocks: a measurement then finds none. Unfinished requests keep their
        tokens and compute the rest again."""
        self._change(lambda: (self._settle(), self._collect(self.scheduler.reset())))

    @contextmanager
    def tracing(self, path=None):
        """Trace what is done inside: `with llm.tracing() as t: ...`, then t.page("run.html"). path:
        a file to write events to, by default they are kept in memory. Raises ValueError if there is
        a trace already."""
        room = needed("tracing")
        trace = room.make_trace(self, path)
        try:
            room.attach(self, trace)
            yield trace
        finally:
            try:
                self._change(lambda: (self._settle(), trace.close()))
            finally:
                trace.close()

    def _change(self, change):
        with on_device(self.device):
            super()._change(change)

    def _make_memory(self, *args):
        with fits("the KV cache", self.device):
            return super()._make_memory(*args)

    def _make_tables(self, blocks):
        with fits("rotary tables", self.device):
            super()._make_tables(blocks)

    def _check(self, prompt, params):
        if type(params) is sampler.SamplingParams:  # the core's own
            given = {f.name: getattr(params, f.name) for f in fields(params) if f.init}
            params = SamplingParams(**given)
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
        if name in PLACES:
            needed(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
