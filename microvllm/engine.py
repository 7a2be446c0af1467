"""The story of a request: how prompts become tokens through a paged KV cache.

    LLM.generate -> Scheduler.schedule -> make_batch -> GPT.forward -> sample -> Scheduler.update

scheduler.py decides which tokens of which sequences are computed in a step, and in which blocks;
here the plan becomes tensors, the model runs over the PagedKVCache, and the tokens go back to the
scheduler.
"""

from __future__ import annotations

import logging
import random
import signal
import threading
import time
from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .attention import PagedKVCache
from .checkpoint import (
    check_weights,
    find_checkpoint,
    find_nanochat,
    fits,
    free_memory,
    load_model,
    open_tokenizer,
    pick_devices,
    wrap_model,
)
from .request import Request, RequestOutput, naming, prompt_ids
from .sampler import (
    History,
    Sampled,
    SamplingParams,
    check_int,
    check_number,
    is_plain,
    noise,
    sample,
)
from .scheduler import (
    BlockManager,
    Scheduler,
    Sequence,
    Step,
    first_come,
    group_layers,
    least_recently_used,
    most_blocks,
    youngest,
)
from .tokenizer import wrap_tokenizer

if TYPE_CHECKING:
    from .trace import Trace

log = logging.getLogger("microvllm")


class Batch(NamedTuple):
    """A step as arrays: T rows (tokens) of B sequences, R of them sampled, on the blocks of G
    groups of layers. numpy as `make_batch` has it, tensors once it was uploaded."""

    ids: Tensor  # (T,) int32 token ids; sequences with one row first
    prev_ids: Tensor  # (T,) int32 the id one position earlier (0 at position 0), for the smear
    positions: Tensor  # (T,) int32
    slots: Tensor  # (G, T) int32 block * block_size + offset, where K and V of the row go
    cu_seqlens: Tensor  # (B + 1,) int32 first row of each sequence
    seq_lens: Tensor  # (B,) int32 tokens of each sequence in the cache after this step
    block_tables: Tensor  # (G, B, M) int32, unused columns are 0, the sink
    logit_rows: Tensor  # (R + S,) int32 rows that reach the head: the sampled, then the scored
    temperature: Tensor  # (R,) float32
    noise: Tensor  # (R,) float32 in [0, 1)
    num_decodes: int  # the first so many sequences have one row each
    max_query: int  # rows of the longest sequence
    max_seq: int  # largest of seq_lens

    def group(self, g: int) -> Batch:
        """What one group's layers see: slots (T,) and block_tables (B, M)."""
        return self._replace(slots=self.slots[g], block_tables=self.block_tables[g])

    def upload(self, device: torch.device) -> Batch:
        """The batch as tensors on the device: one array, one copy, then views into it."""
        arrays = self[:10]
        flat = torch.from_numpy(np.concatenate([a.ravel().view(np.int32) for a in arrays]))
        if device.type == "cuda":  # pinned, so that the host need not wait for the copy
            flat = flat.pin_memory().to(device, non_blocking=True)
        views = [
            t.view(a.shape)
            for t, a in zip(flat.to(device).split([a.size for a in arrays]), arrays, strict=True)
        ]
        views[8:] = [t.view(torch.float32) for t in views[8:]]
        return Batch(*views, *self[10:])


def make_batch(step: Step, block_size: int, num_groups: int = 1) -> Batch:
    """Turn a plan into a batch of numpy arrays."""
    seqs = [seq for seq, _, _ in step.chunks]
    starts = np.array([start for _, start, _ in step.chunks], np.int32)
    stops = np.array([stop for _, _, stop in step.chunks], np.int32)
    rows = stops - starts
    num_rows = int(rows.sum())
    cu_seqlens = np.zeros(len(seqs) + 1, np.int32)
    np.cumsum(rows, out=cu_seqlens[1:])
    firsts = cu_seqlens[:-1]
    owner = np.repeat(np.arange(len(seqs)), rows)
    positions = (np.arange(num_rows, dtype=np.int32) - firsts[owner]) + starts[owner]
    ids = np.fromiter(
        chain.from_iterable([seq.tokens[start:stop] for seq, start, stop in step.chunks]),
        np.int32,
        num_rows,
    )
    for index, _, guesses in step.guessed:
        ids[cu_seqlens[index + 1] - len(guesses) : cu_seqlens[index + 1]] = guesses
    prev_ids = np.empty_like(ids)
    prev_ids[1:] = ids[:-1]
    prev_ids[firsts] = [seq.tokens[start - 1] if start else 0 for seq, start, _ in step.chunks]
    # tables are of unequal length: laid end to end, then dealt out to the rows of a padded matrix
    lengths = np.array([len(seq.table) for seq in seqs])
    tables = np.zeros((len(seqs), int(lengths.max())), np.int32)
    tables[np.arange(tables.shape[1]) < lengths[:, None]] = np.frombuffer(
        b"".join([seq.table for seq in seqs]), np.int32
    )
    tables = tables.reshape(len(seqs), -1, num_groups).transpose(2, 0, 1)
    slots = tables[:, owner, positions // block_size] * block_size + positions % block_size
    owners = np.array([index for index, _, _ in step.samples], np.int32)
    places = np.array([position for _, _, position in step.samples], np.int32)
    # what is sampled at a position follows from the row before it
    logit_rows = (firsts[owners] + places - 1 - starts[owners]).tolist()
    for index, _, first, stop in step.scored:
        end = cu_seqlens[index + 1]
        logit_rows.extend(range(end - (stop - first), end))
    params = [seq.params for _, seq, _ in step.samples]
    return Batch(
        ids, prev_ids, positions, slots.astype(np.int32), cu_seqlens, stops, tables,
        np.array(logit_rows, np.int32),
        np.array([p.temperature for p in params], np.float32),
        noise(
            [p.seed for p in params],
            [s.params.sample_index + s.sample_id for _, s, _ in step.samples],
            places,
        ),
        int((rows == 1).sum()), int(rows.max()), int(stops.max()),
    )  # fmt: skip


class Flight(NamedTuple):
    """A step under way: its plan, and its tokens as the device will have them."""

    plan: Step
    tokens: Tensor | None  # (R,) on the device, which the next step may read before the host does
    on_host: list[Tensor | None]  # the same, scores, log-probabilities: on their way to the host
    sampled: Sampled | None  # where some row asked for log-probabilities
    event: torch.cuda.Event | None  # when they have arrived


@contextmanager
def _uninterrupted():
    """Let a Ctrl-C take effect only at the end, where the engine's books are in order."""
    handler, pressed = signal.getsignal(signal.SIGINT), []
    main = threading.current_thread() is threading.main_thread()
    ours = main and handler is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, handler)
    if pressed:
        raise KeyboardInterrupt


class LLM:
    """A nanochat model ready to generate.

    model_path: directory with model_<step>.pt and meta_<step>.json (step: None is the last one), a
    place in nanochat's tree ("sft", "base:d20", "rl:d20:650"), a Hugging Face folder, or owner/name
    on its hub; tokenizer_path: directory or tokenizer.pkl, by default looked for next to the model
    and in nanochat's base directory; device: "auto" is cuda, then mps, then cpu; num_blocks,
    block_size: the KV pool, by default what memory allows, in blocks of 16 tokens; max_batch_size:
    sequences that run at once; dtype: "auto" is float32 on a CPU and bfloat16 on CUDA;
    max_batched_tokens: tokens of one step; max_model_len: prompt plus output of a request, by
    default the checkpoint's context, at most ten times that; attention: a backend of attention.py;
    seed: of requests that bring none; model, tokenizer: a live nanochat GPT module, whose weights
    are shared where device and dtype allow it, and its tokenizer, instead of paths;
    gpu_memory_utilization: share of the free GPU memory for the cache; cuda_graphs: replay decode
    steps; quantization: on a CPU "int8", of the matrices and the inputs of all products (K and V
    are bfloat16), on a GPU "fp8"; deterministic: logits, and so tokens, bit for bit the same alone
    or in a batch, cold or warm, slower where the products are a library's; prompt_lookup: on a CPU,
    tokens that a sequence's text lets guess, at most so many a step, and kept if they are what is
    drawn: the same output, sooner where it repeats itself and few run (lookup.py); tensor_parallel:
    torchrun's processes, which share the model and all do the same; trace: a file to write events
    to, see trace.py; victim, admission, eviction: policies, such as those in scheduler.py; any
    constant of model.Recipe may be overridden by name (softcap=20 for a checkpoint of era 3b).

    Raises FileNotFoundError, ValueError or TypeError, naming what is wrong and what to do.
    """

    def __init__(
        self, model_path=None, step=None, tokenizer_path=None, device="auto", num_blocks=None,
        block_size=16, max_batch_size=None, *, dtype="auto", max_batched_tokens=None,
        max_model_len=None, enable_prefix_caching=True, attention="auto", seed=0, model=None,
        tokenizer=None, gpu_memory_utilization=0.9, cuda_graphs=True, quantization=None,
        deterministic=False, prompt_lookup=0, tensor_parallel=1, trace=None, victim=youngest,
        admission=first_come, eviction=least_recently_used, **overrides,
    ):  # fmt: skip
        check_int("block_size", block_size, 1)
        check_int("seed", seed, 0)
        check_int("prompt_lookup", prompt_lookup, 0)
        for name, value, least in (
            ("num_blocks", num_blocks, 2),
            ("max_model_len", max_model_len, 2),
            ("max_batch_size", max_batch_size, 1),
            ("max_batched_tokens", max_batched_tokens, 1),
        ):
            if value is not None:
                check_int(name, value, least)
        flags = {"enable_prefix_caching": enable_prefix_caching, "cuda_graphs": cuda_graphs}
        for name, value in (flags | {"deterministic": deterministic}).items():
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r:.80}")
        for name, value in (("victim", victim), ("admission", admission), ("eviction", eviction)):
            if not callable(value):
                raise TypeError(f"{name} must be a function, got {value!r:.80}")
        check_number("gpu_memory_utilization", gpu_memory_utilization, 0.01, 1.0)
        if (model_path is None) == (model is None):
            raise TypeError("give either model_path or model (a live nanochat GPT module)")
        if model is not None and tokenizer is None and tokenizer_path is None:
            raise TypeError("a live model needs its tokenizer: give tokenizer or tokenizer_path")
        self.device, self.ranks = pick_devices(device, tensor_parallel)
        if prompt_lookup and self.device.type == "cuda":
            raise ValueError(
                f"prompt_lookup={prompt_lookup} is for the loop of a CPU: on {self.device} a step "
                "is planned before the last one's tokens are known, and there is nothing to guess "
                "from; leave it 0, or give device='cpu'"
            )
        options = {"attention": attention, "max_len": max_model_len, "ranks": self.ranks}
        options |= {"quantization": quantization, "deterministic": deterministic}
        if model is None:
            model_path, step = find_checkpoint(model_path, step)
            self.model = load_model(model_path, step, self.device, dtype, **options, **overrides)
        else:
            self.model = wrap_model(model, self.device, dtype, **options, **overrides)
        config = self.model.config
        if block_size % getattr(self.model.attend, "block_step", 1):
            raise ValueError(f"block_size={block_size}: {self.model.attend.__doc__}")
        if tokenizer is not None:
            self.tokenizer = wrap_tokenizer(tokenizer)
        else:
            self.tokenizer = open_tokenizer(model_path, tokenizer_path)
        if self.tokenizer.vocab_size != config.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens and the model "
                f"{config.vocab_size}: they do not belong together; give tokenizer_path"
            )
        cuda = self.device.type == "cuda"
        self.max_model_len = max_model_len or config.sequence_len
        self.max_batch_size = max_batch_size or (512 if cuda else 256)
        self.max_batched_tokens = max_batched_tokens or (8192 if cuda else 1024)
        self.prompt_lookup = int(prompt_lookup)
        self.graphs, self.groups = None, group_layers(self.model.windows, self.max_model_len)
        if num_blocks is None:
            num_blocks = self._blocks_that_fit(block_size, gpu_memory_utilization)
        # what the user calls a block, of all layers, is one of each group and as much memory
        windows = [window for window, _ in self.groups]
        parts = (num_blocks - 1) * len(windows) + 1
        try:
            kind = self.model.cache_dtype, self.device, self.groups
            self.cache = PagedKVCache(self.model.local, parts, block_size, *kind)
            # a CPU's pages are taken as they are written: too late to say that there are none
            if self.device.type == "cpu" and self.cache.data.nbytes > free_memory(self.device):
                raise MemoryError
        except (MemoryError, RuntimeError, ValueError):  # numpy and torch each have their own
            raise ValueError(
                f"num_blocks={num_blocks} blocks of {block_size} tokens are more than this machine "
                f"can hold: {free_memory(self.device):,} bytes are free; lower it"
            ) from None
        self.overlap = cuda
        cuda_graphs = cuda_graphs and not self.ranks  # graphs of collectives are not measured
        if cuda and cuda_graphs and self.model.attend.__module__.endswith("gpu.kernels"):
            from .gpu.graphs import DecodeGraphs

            self.graphs = DecodeGraphs(
                self.model, self.cache, self.max_batch_size, self.max_model_len
            )
        blocks = BlockManager(parts, block_size, enable_prefix_caching, eviction, windows)
        self.scheduler = Scheduler(
            blocks, self.max_batch_size, self.max_batched_tokens, victim, admission
        )
        self._seeds = random.Random(seed)
        self._next_id = 0
        self._requests: dict[int, Request] = {}  # the unfinished ones
        self._finished: list[RequestOutput] = []  # outputs that no step() has returned yet
        self._flight: Flight | None = None  # the step that was launched and not yet read
        self._clock = 0.0  # when the last step was read
        counters = "requests prompt_tokens output_tokens cached_tokens prefill_tokens steps"
        counters += " peak_blocks"
        self._stats = dict.fromkeys(counters.split(), 0)
        self._stats.update(prefill_seconds=0.0, decode_seconds=0.0)
        self._name = Path(model_path).name if model_path else type(model).__name__
        if self.ranks:
            self.ranks.same_engine(self, seed)
        if trace is not None:
            from .trace import attach

            attach(self, trace)
        log.info(
            "%s: era %s, %d layers, %s on %s; %d blocks of %d tokens (%.1f MB)", model_path,
            self.model.recipe.era, config.n_layer, str(self.model.dtype)[6:], self.device,
            num_blocks, block_size, self.cache.data.nbytes / 1e6,
        )  # fmt: skip

    @classmethod
    def from_nanochat(
        cls, source: str = "sft", model_tag: str | None = None, step: int | None = None, **kwargs
    ):
        """Find a checkpoint the way nanochat lays them out under $NANOCHAT_BASE_DIR
        (~/.cache/nanochat). source: "base", "mid", "sft" or "rl"; model_tag: see find_nanochat."""
        return cls(find_nanochat(source, model_tag), step, **kwargs)

    def _blocks_that_fit(self, block_size: int, utilization: float) -> int:
        """How many blocks memory has room for, up to all sequences at full length at once.

        On a GPU the largest step is run once to see what activations take; of the rest,
        `utilization` is for it. On a CPU it is half of what is free, 4 GB at most.
        """
        config, dtype = self.model.local, self.model.cache_dtype
        windows, dims = [window for window, _ in self.groups], config.n_kv_head * config.head_dim
        places = len(windows) * max(len(layers) for _, layers in self.groups)
        block_bytes = 2 * places * dims * dtype.itemsize * block_size
        longest = most_blocks(windows, block_size, self.max_model_len)
        wanted = -(-self.max_batch_size * longest // len(windows)) + 1
        if self.device.type == "cuda":
            taken = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            with fits(f"steps of max_batched_tokens={self.max_batched_tokens}", self.device):
                self._warm_up(block_size)
            activations = torch.cuda.max_memory_allocated(self.device) - taken
            torch.cuda.empty_cache()
            # twice: the memory of the recorded steps is their own
            free = int(free_memory(self.device) * utilization) - 2 * activations
        else:
            free = min(free_memory(self.device) // 2, 2**32)
        if self.ranks:  # with as many blocks as the others they all plan the same
            free = self.ranks.least(free)
        if free < 2 * block_bytes:
            raise ValueError(
                f"no memory for a KV cache: {free:,} bytes are left and a block of {block_size} "
                f"tokens takes {block_bytes:,}; lower max_batched_tokens or use a smaller model"
            )
        return min(wanted, free // block_bytes)

    @torch.inference_mode()
    def _warm_up(self, block_size: int) -> None:
        """Run a short prompt and the largest step on a cache of the sink alone, all filters on."""
        kind = self.model.dtype, self.device, self.groups
        cache = PagedKVCache(self.model.local, 1, block_size, *kind)
        full, rest = divmod(self.max_batched_tokens, self.max_model_len - 1)
        longest = ([rest] * (rest > 0) + [self.max_model_len - 1] * full)[-self.max_batch_size :]
        for lengths in [2], longest:  # a short prompt has a kernel of its own on a GPU
            chunks = [(Sequence(0, [0] * n, SamplingParams(seed=0)), 0, n) for n in lengths]
            for seq, _, n in chunks:
                seq.table = array("i", [0] * -(-n // block_size) * cache.num_groups)
            plan = Step(chunks, [(0, seq, n)], [])
            batch = make_batch(plan, block_size, cache.num_groups).upload(self.device)
            rows = batch.logit_rows.repeat(self.max_batch_size)[: self.max_batch_size]
            logits = self.model.logits(self.model.forward(batch._replace(logit_rows=rows), cache))
        params = SamplingParams(seed=0, top_k=50, top_p=0.9, repetition_penalty=1.1, logprobs=20)
        history, ones = History(seq.tokens, 1, n), torch.ones_like(logits[:, 0]).float()
        sample(logits, [params] * len(rows), ones, ones / 2, 1.0, [history] * len(rows))

    # requests ------------------------------------------------------------------------------------

    def generate(
        self, prompts, sampling_params=None, use_tqdm: bool = True, *, tools: bool = False
    ) -> list[RequestOutput]:
        """Complete the prompts: one string, or a list of strings and lists of token ids.

        sampling_params: one SamplingParams for all, or a list with one per prompt; tools: run
        nanochat's calculator when the model calls it. Returns one RequestOutput per prompt, in
        order. A bad prompt is refused before any work is done.
        """
        from tqdm import tqdm

        requests = self._submit(prompts, sampling_params, tools=tools)
        began, before = time.perf_counter(), self._stats["output_tokens"]
        hidden = None if use_tqdm else True  # None: shown on a terminal only
        with tqdm(total=len(requests), desc="generating", unit="prompt", disable=hidden) as bar:

            def progress() -> None:
                rate = (self._stats["output_tokens"] - before) / (time.perf_counter() - began)
                bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
                bar.update(sum(r.output is not None for r in requests) - bar.n)

            self._run(requests, None if bar.disable else progress)
        return [request.output for request in requests]

    def _run(self, requests: list[Request], progress=None) -> None:
        """Step until all of the requests have their output; if anything goes wrong, abort them."""
        waiting = deque(requests)
        try:
            while waiting:
                self._advance()
                while waiting and waiting[0].output is not None:
                    waiting.popleft()
                if progress:
                    progress()
        finally:
            self.abort(*[request.id for request in waiting])

    def stream(
        self, prompts, sampling_params=None, *, tools: bool = False
    ) -> Iterator[RequestOutput]:
        """Generate, and yield each piece of text as soon as it is certain.

        An event reads as a dict: index (of the prompt), sample, text (the new piece; the pieces of
        a sample joined are generate's text), token_ids (the new ones), finish_reason (None until
        the sample's last event) and stop_reason. Leaving the loop early aborts what is unfinished.
        """
        events: deque = deque()
        requests = self._submit(prompts, sampling_params, tools=tools, events=events)
        index = {request.id: i for i, request in enumerate(requests)}
        try:
            while events or any(r.output is None for r in requests):
                if not events:
                    self._advance()
                while events:
                    event = events.popleft()
                    yield RequestOutput(index=index[event.pop("request_id")], **event)
        finally:
            self.abort(*[request.id for request in requests])

    def chat(
        self, messages, sampling_params=None, use_tqdm: bool = True, *, tools: bool = True
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list of conversations.

        messages: [{"role": "system" | "user" | "assistant", "content": ...}, ...], ending with the
        user's turn. Rendered as nanochat does; an answer ends at <|assistant_end|>.
        """
        if not isinstance(messages, (list, tuple)) or dict in map(type, messages):
            messages = [messages]  # one conversation
        prompts = []
        for i, conversation in enumerate(messages):
            with naming(f"conversation {i}"):
                prompts.append(self.tokenizer.render_for_completion(conversation))
        return self.generate(prompts, sampling_params, use_tqdm, tools=tools)

    def generate_batch(
        self, tokens, num_samples=1, max_tokens=None, temperature=1.0, top_k=None, seed=42, **more
    ):
        """What nanochat's Engine.generate_batch does: (sequences, masks) of one prompt of token
        ids.

        A sequence is prompt plus output without the end token; its mask is 0 for the prompt and for
        tokens the calculator forced. A list of prompts gives (list of sequences, list of masks)
        with one list of num_samples each; prompt i is drawn with seed + i. max_tokens None: as many
        as the context has room for; `more` goes to SamplingParams.
        """
        listed = isinstance(tokens, (list, tuple)) and len(tokens) > 0
        several = listed and not isinstance(tokens[0], (int, np.integer))
        prompts = tokens if several else [tokens]
        params = [
            SamplingParams(
                temperature=temperature,
                max_tokens=self.max_model_len if max_tokens is None else max_tokens,
                top_k=top_k,
                n=num_samples,
                seed=seed + i,
                **more,
            )
            for i in range(len(prompts))
        ]
        sequences, masks = [], []
        for output in self.generate(prompts, params, use_tqdm=False, tools=True):
            prompt = output["prompt_token_ids"]
            # without the end token, if there is one
            parts = [(s, -1 if s["finish_reason"] == "stop" else None) for s in output["samples"]]
            sequences.append([prompt + s["token_ids"][:stop] for s, stop in parts])
            masks.append([[0] * len(prompt) + s["mask"][:stop] for s, stop in parts])
        return (sequences, masks) if several else (sequences[0], masks[0])

    def score(self, prompts, continuations) -> list[list[float]]:
        """The model's log-probability of each token of continuations[i] after prompts[i].

        Both are lists of strings or of lists of token ids; a continuation's text is encoded on its
        own, without BOS. Prompts that are equal, or begin equally, share their blocks and are
        computed once. Long ones are computed in chunks of the token budget, and their logits in
        slices, so memory does not grow with the lengths.
        """
        for name, texts in ("prompts", prompts), ("continuations", continuations):
            if not isinstance(texts, (list, tuple)):
                raise TypeError(f"{name} must be a list, got {texts!r:.80}")
        if len(prompts) != len(continuations):
            raise ValueError(f"{len(prompts)} prompts but {len(continuations)} continuations")
        checked = []
        for i, pair in enumerate(zip(prompts, continuations, strict=True)):
            with naming(f"prompts[{i}], continuations[{i}]"):
                checked.append(self._check_pair(*pair))
        requests = self._queue(checked)
        self._run(requests)
        return [request.output["logprobs"] for request in requests]

    def _check_pair(self, prompt, tail) -> tuple[list[int], SamplingParams, list[int]]:
        """Token ids, params and targets of a continuation to score; raises as _check does."""
        tail = self.tokenizer.encode(tail) if isinstance(tail, str) else tail
        tail, params = self._check(tail, SamplingParams(max_tokens=1))
        ids, params = self._check(prompt, SamplingParams(max_tokens=len(tail), seed=0))
        if len(ids) + len(tail) > self.max_model_len:
            limit = f"max_model_len, {self.max_model_len}"
            raise ValueError(f"{len(ids)} tokens and {len(tail)} more are beyond {limit}")
        return ids, params, tail

    def update_weights(self, weights) -> None:
        """Swap the weights in place: a state dict of the same shapes, or a module that has one.

        The prefix cache is emptied and running requests recompute what they have, so nothing old
        is ever read. Raises ValueError, and changes nothing, if a tensor is missing or misshapen.
        """
        state = weights.state_dict() if hasattr(weights, "state_dict") else weights
        if not isinstance(state, dict) or not all(isinstance(w, Tensor) for w in state.values()):
            raise TypeError(f"weights must be a state dict, or a module, got {weights!r:.80}")
        state = {k.removeprefix("_orig_mod."): w for k, w in state.items()}
        check_weights(state, self.model.config, self.model.recipe)
        self.model.update(state)
        try:
            self._settle()
        finally:
            self.scheduler.reset()

    @contextmanager
    def tracing(self, path=None) -> Iterator[Trace]:
        """Trace what is done inside: `with llm.tracing() as t: ...`, then t.page("run.html").

        path: a file to write events to, by default they are kept in memory. Raises ValueError if
        there is a trace already.
        """
        from .trace import attach

        trace = attach(self, path)
        try:
            yield trace
        finally:
            try:
                self._settle()
            finally:
                trace.close()

    def _settle(self) -> None:
        """Read the step that is under way, if one is; if that fails it never was."""
        if self._flight:
            flight, self._flight = self._flight, None
            try:
                self._land(flight)
            except BaseException:
                self.scheduler.reset()
                raise

    def add_request(
        self, prompt, sampling_params: SamplingParams | None = None, *, tools: bool = False,
        continuation=None,
    ) -> int:  # fmt: skip
        """Queue one prompt (a string or token ids) and return the id its output will carry. With a
        continuation (text or ids) nothing is written: the output has its logprobs, as in score."""
        if continuation is not None:
            return self._add(*self._check_pair(prompt, continuation)).id
        return self._add(*self._check(prompt, sampling_params), tools=tools).id

    @_uninterrupted()
    def abort(self, *request_ids: int) -> None:
        """End requests now; their outputs say "abort". Unknown ids are ignored."""
        requests = {i: self._requests[i] for i in request_ids if i in self._requests}
        if not requests:
            return
        for seq in self.scheduler.abort(*requests):
            self._collect(requests[seq.request_id], seq)
        for request in requests.values():
            if request.output is None:  # samples that had not split off yet are not listed
                self._finish(request)

    def is_finished(self) -> bool:
        """True when no request is queued or running and every output was returned by step()."""
        return not self._requests and not self._finished

    def _submit(self, prompts, sampling_params, *, tools=False, events=None) -> list[Request]:
        """Check all prompts, then queue them. Raises TypeError or ValueError naming the prompt."""
        if isinstance(prompts, str):
            prompts = [prompts]
        if not isinstance(prompts, (list, tuple)):
            raise TypeError(f"prompts must be a string or a list, got {type(prompts).__name__}")
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if not isinstance(sampling_params, (list, tuple)):
            raise TypeError(
                f"sampling_params must be SamplingParams or a list, got {sampling_params!r:.80}"
            )
        if len(sampling_params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(sampling_params)} sampling_params")
        checked = []
        for i, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
            with naming(f"prompts[{i}]"):
                checked.append(self._check(prompt, params))
        return self._queue(checked, tools=tools, events=events)

    def _queue(self, checked: list[tuple], **options) -> list[Request]:
        """Queue requests that someone waits for: all of them or, if that fails, none."""
        first = self._next_id
        try:
            return [self._add(*request, owned=True, **options) for request in checked]
        except BaseException:  # a Ctrl-C among many
            self.abort(*range(first, self._next_id))
            raise

    def _check(self, prompt, params: SamplingParams | None) -> tuple[list[int], SamplingParams]:
        """Token ids and params of a request. Raises TypeError or ValueError if it cannot be."""
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams, got {type(params).__name__}")
        ids = prompt_ids(prompt, self.tokenizer)
        params.check_vocabulary(self.tokenizer.vocab_size)
        if params.n > self.max_batch_size:
            raise ValueError(
                f"n={params.n} samples do not fit max_batch_size={self.max_batch_size}"
            )
        if len(ids) >= self.max_model_len:
            limit = 10 * self.model.config.sequence_len
            raised = f" (it may be raised to {limit})" if len(ids) < limit else ""
            raise ValueError(
                f"the prompt has {len(ids)} tokens and max_model_len is {self.max_model_len}: "
                f"{len(ids) + 1 - self.max_model_len} too many{raised}"
            )
        blocks = self.scheduler.blocks
        # the last token is never fed back, so it needs no slot
        slots = min(len(ids) + params.max_tokens, self.max_model_len) - 1
        chunk, groups = self.max_batched_tokens, blocks.num_groups
        need = most_blocks(blocks.windows, blocks.block_size, slots, chunk)
        if need > blocks.num_usable:
            lower = "max_tokens" if groups == 1 else "max_tokens, or max_batched_tokens"
            raise ValueError(
                f"{len(ids)} prompt tokens with max_tokens={params.max_tokens} need "
                f"{-(-need // groups)} blocks and the pool has {blocks.num_usable // groups}: "
                f"{slots - blocks.longest(chunk)} tokens too many; raise num_blocks or lower "
                f"{lower}"
            )
        return ids, params

    @_uninterrupted()
    def _add(self, ids, params, targets=None, *, tools=False, owned=False, events=None) -> Request:
        if params.seed is None:
            params = replace(params, seed=self._seeds.getrandbits(63))
        if any(isinstance(word, str) for word in params.bad_words):
            encode = self.tokenizer.encode  # a word has other tokens at the beginning of a text
            words = [(w, " " + w) if isinstance(w, str) else (w,) for w in params.bad_words]
            banned = [w if isinstance(w, tuple) else tuple(encode(w)) for w in chain(*words)]
            params = replace(params, bad_words=tuple(banned))
        request = Request(self._next_id, ids, params, tools, owned, events, targets is not None)
        self._next_id += 1
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self.tokenizer.eos_ids
        max_length = min(len(ids) + params.max_tokens, self.max_model_len)
        self._requests[request.id] = request
        lookup = None
        # a logits_processor would be asked about texts that nobody writes: it may keep books
        if self.prompt_lookup and targets is None and not params.logits_processor:
            from .features.lookup import Lookup

            tool_calls = {self.tokenizer.special_tokens.get("<|python_end|>")} if tools else set()
            lookup = Lookup(self.prompt_lookup, stop_ids | tool_calls)
        seq = Sequence(request.id, ids, params, max_length, stop_ids, targets, lookup)
        self.scheduler.add(seq)
        self._stats["prompt_tokens"] += len(ids)
        return request

    # the loop ------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Run the model once over whatever is due; returns the requests that finished.

        If that fails (no memory is left, say), the exception gets out and no request is lost: all
        wait again, and the next step goes on to the same tokens. Whoever failed in `generate`,
        `stream` or `score` ends its own requests. What fails for one request alone, its
        logits_processor or its text, ends it with finish_reason "error", and nobody else.
        """
        self._advance()
        finished, self._finished = self._finished, []
        return finished

    @torch.inference_mode()
    @_uninterrupted()
    def _advance(self) -> None:
        """One turn of the loop.

        The plain loop plans a step, runs it and reads its tokens. On a GPU (`overlap`) the loop is
        one step ahead: it plans and launches the next step, and only then reads the last one's
        tokens, so that the device never waits for the host. A sequence that turns out to have
        ended is in the next step by mistake; `Scheduler.update` drops its token there.
        """
        flight, trace = None, self.scheduler.blocks.trace
        if self._flight is None:
            self._clock = time.perf_counter()
        if trace:
            trace.lap("outside")
        try:
            samples = self._flight.plan.samples if self._flight else ()
            if any(seq.params.needs_history for _, seq, _ in samples):
                self._settle()  # a filter wants to know the last token before the next
            if self.scheduler.waiting or self.scheduler.running:
                plan = self.scheduler.schedule()
                blocks, stats = self.scheduler.blocks, self._stats
                used = blocks.num_usable - blocks.num_free  # before those that end give theirs back
                stats["peak_blocks"] = max(stats["peak_blocks"], used)
                if plan.chunks:
                    flight = self._launch(plan)
            if self.overlap:
                flight, self._flight = self._flight, flight
            if flight:
                self._land(flight)
        except BaseException as error:
            if self.ranks:
                self.ranks.fail(error)
            self.scheduler.reset()
            self._flight = None
            raise

    def _launch(self, plan: Step) -> Flight:
        """Start a step: upload, copy shared blocks, forward, sample. A GPU does not wait for it."""
        trace = self.scheduler.blocks.trace
        batch = make_batch(plan, self.cache.block_size, self.cache.num_groups)
        if self.ranks:
            self.ranks.same_step(batch)
        if trace:
            trace.lap("batch")
        if plan.copies:
            self.cache.copy_blocks(plan.copies)
        params = [seq.params for _, seq, _ in plan.samples]
        last = self._flight.tokens if self._flight else None
        tokens = scores = sampled = None
        if recorded := self.graphs and self.graphs.fits(batch, params):
            tokens, logits, temperature, noise = self.graphs.replay(batch, params, last)
        else:
            pending = batch.ids.min() < 0
            batch = batch.upload(self.device)
            if pending:  # an id that is ~row of the last step's tokens: only the device knows it
                known = last[(~batch.ids).clamp(min=0)].to(torch.int32)
                batch = batch._replace(ids=torch.where(batch.ids < 0, known, batch.ids))
            h = self.model.forward(batch, self.cache)
            logits = self.model.logits(h[: len(params)]) if params else None
            temperature, noise = batch.temperature, batch.noise
        drawn = recorded and is_plain(params)  # in the graph, so that it is one phase of a trace
        if trace and not drawn:
            trace.lap("forward")
        if params and not drawn:
            tokens = self._draw(plan, logits, params, temperature, noise)
            if isinstance(tokens, Sampled):
                sampled, tokens = tokens, tokens.tokens
        if plan.scored:
            targets = [
                token
                for _, seq, first, stop in plan.scored
                for token in seq.targets[first - seq.num_prompt + 1 : stop - seq.num_prompt + 1]
            ]
            scores = self.model.logprobs(h[len(params) :], targets)
        if trace:
            trace.lap("sample")
        on_host, event = [tokens, scores, sampled and sampled.packed], None
        if self.device.type == "cuda":
            on_host = [t if t is None else t.to("cpu", non_blocking=True) for t in on_host]
            event = torch.cuda.Event()
            event.record()
        return Flight(plan, tokens, on_host, sampled, event)

    def _draw(self, plan: Step, logits, params, temperature, noise) -> Tensor | Sampled:
        """The (R,) tokens of a step, from logits (R, V), temperature and noise (R,)."""
        history = None
        if any(p.edited for p in params):
            texts = {}  # those that end with guesses
            for index, _, guesses in plan.guessed:
                seq, start, _ = plan.chunks[index]
                texts[index] = seq.tokens[: start + 1] + guesses
            history = [
                History(
                    texts.get(index, seq.tokens), seq.num_prompt, position, seq.stop_ids,
                    self._requests[seq.request_id].errors,
                )
                for index, seq, position in plan.samples
            ]  # fmt: skip
        cap, at_once = self.model.recipe.softcap, self.model.at_once
        return sample(logits, params, temperature, noise, cap, history, at_once)

    def _land(self, flight: Flight) -> None:
        """Read a step's tokens, hand them to the scheduler, collect the requests that are done."""
        if flight.event:
            flight.event.synchronize()
        tokens, scores, packed = flight.on_host
        token_ids, scores = ([] if t is None else t.tolist() for t in (tokens, scores))
        trace = self.scheduler.blocks.trace
        if trace:
            trace.wait()
        listed = flight.sampled._replace(packed=packed).logprobs() if flight.sampled else {}
        before = self.scheduler.num_accepted
        changed = self.scheduler.update(flight.plan, token_ids, scores)
        # nothing may fail from here on: whoever has ended is in no queue any more
        self._count(flight.plan, len(changed) + self.scheduler.num_accepted - before)
        news = set(map(id, changed))
        for row, entry in listed.items():
            _, seq, position = flight.plan.samples[row]
            if id(seq) in news and position < len(seq.tokens):  # else it was guessed in vain
                self._requests[seq.request_id].logprobs[seq.sample_id, position] = entry
        for seq in changed:
            request = self._requests[seq.request_id]
            if request.watched:
                added = request.watch(seq, self.scheduler, self.tokenizer)
                self._stats["output_tokens"] += added
            if seq.finish_reason:
                self._collect(request, seq)
        if trace:
            trace.end()

    def _collect(self, request: Request, seq: Sequence) -> None:
        """A sample is over; with the last of them the request is."""
        if request.watched and seq.finish_reason == "abort":
            request.watch(seq, self.scheduler, self.tokenizer)
        request.done.append(seq)
        if len(request.done) == request.params.n:
            self._finish(request)

    def _count(self, plan: Step, new_tokens: int) -> None:
        """Keep the books. A step's time is split between prefill and decode by their rows."""
        stats = self._stats
        # steps overlap on a GPU: each is given the time since the one before it was read
        began, self._clock = self._clock, time.perf_counter()
        seconds = self._clock - began
        stats["steps"] += 1
        stats["output_tokens"] += new_tokens
        prefill = sum(max(0, min(stop, s.num_prompt) - start) for s, start, stop in plan.chunks)
        stats["prefill_tokens"] += prefill
        share = prefill / sum(stop - start for _, start, stop in plan.chunks)
        stats["prefill_seconds"] += seconds * share
        stats["decode_seconds"] += seconds * (1 - share)

    def _finish(self, request: Request) -> None:
        """The last sample of a request is over: make its output."""
        request.output = request.make_output(self.tokenizer)
        del self._requests[request.id]
        self._stats["cached_tokens"] += request.output["num_cached_tokens"]
        self._stats["requests"] += 1
        if not request.owned:
            self._finished.append(request.output)

    def stats(self) -> dict:
        """Counters since the start: tokens, seconds, preemptions, and the pool as it is now.

        requests finished, prompt_tokens asked, output_tokens made, cached_tokens of prompts that
        the prefix cache served (of finished requests), prefill_tokens computed (again after a
        preemption), steps, preemptions, guessed_tokens and those of them that were right,
        accepted_tokens, prefill_seconds and decode_seconds (a step's time is split by its rows),
        peak_blocks in use, num_blocks and free_blocks (no sink), block_size, running, waiting.
        """
        blocks, groups = self.scheduler.blocks, len(self.groups)
        return {
            **self._stats,
            "peak_blocks": -(-self._stats["peak_blocks"] // groups),
            "preemptions": self.scheduler.num_preemptions,
            "guessed_tokens": self.scheduler.num_guessed,
            "accepted_tokens": self.scheduler.num_accepted,
            "num_blocks": blocks.num_usable // groups,
            "free_blocks": blocks.num_free // groups,
            "block_size": blocks.block_size,
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
        }

    def close(self) -> None:
        """Drop the weights and the cache; whatever is unfinished is aborted."""
        self.abort(*self._requests)
        self.model = self.cache = self.graphs = self._flight = None
        if self.scheduler.blocks.trace:
            self.scheduler.blocks.trace.close()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_) -> None:
        self.close()
