"""How do prompts become tokens? The story of a request (R samples, C channels):

LLM.generate          text becomes token ids, and a Sequence that waits
  Scheduler.schedule  which tokens of which sequences, in which blocks        -> Plan
  make_batch          the plan as arrays, all sequences in one flat batch     -> Batch
  GPT.forward         writes K and V into the PagedKVCache, attends           -> (R, C)
  sample              logits and noise                                        -> (R,) tokens
  Scheduler.update    appends the tokens, ends what is done, frees blocks
... again, until every sequence has finished                                  -> RequestOutput
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import Batch, PagedKVCache, SequenceKVView, make_batch
from .checkpoint import _find_last_step, find_tokenizer, free_memory, load_model, pick_device
from .sampler import SamplingParams, sample
from .scheduler import BlockManager, Plan, Scheduler, Sequence, least_recently_used
from .tokenizer import Text, load_tokenizer

__all__ = [
    "LLM", "BlockManager", "PagedKVCache", "RequestOutput", "SamplingParams", "Scheduler",
    "SequenceKVView", "_find_last_step", "load_model",
]  # fmt: skip


class Runner:
    """Runs plans on the device.

    Seam: subclasses override any of its methods, and each step of `launch` is one for that reason.
    `launch` may leave a step in flight: only `read` waits for what it puts into `plan.results`.
    """

    rows_at_once: int | None = None  # rows of logits that a feature works on at once; None: all

    def __init__(self, model, cache: PagedKVCache, blocks: BlockManager):
        self.model, self.cache, self.blocks = model, cache, blocks

    def launch(self, plan: Plan) -> None:
        """Start a step: make the batch, copy shared blocks, upload, forward, draw."""
        events, batch = self.blocks.events, self.batch(plan)
        events.lap("batch")
        self.copy(plan.copies)
        batch = self.upload(batch)
        h = self.forward(batch)
        events.lap("forward")
        plan.results["tokens"] = self.draw(plan, batch, h)
        events.lap("sample")

    def batch(self, plan: Plan) -> Batch:
        """The plan as arrays."""
        return make_batch(plan, self.blocks)

    def copy(self, copies: list[tuple[int, int]]) -> None:
        """Make the plan's copies of shared blocks, before `forward` writes to them."""
        self.cache.copy_blocks(copies)

    def upload(self, batch: Batch) -> Batch:
        """The arrays as tensors on the device."""
        return batch.to(self.model.device)

    def forward(self, batch: Batch) -> Tensor:
        """The final hidden states (R, C) of the R rows that are sampled, see GPT.forward."""
        return self.model.forward(batch, self.cache)

    def draw(self, plan: Plan, batch: Batch, h: Tensor) -> Tensor | None:
        """(R,) tokens of hidden states (R, C); None if none. Features may need no tokens."""
        if not plan.samples:
            return None
        return self.pick(plan, self.model.logits(h), batch.temperature, batch.noise)

    def pick(self, plan: Plan, logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
        """(R,) tokens of logits (R, V) before the softcap; features change logits here."""
        softcap = self.model.recipe.softcap
        return self.sample(logits, plan.params, temperature, uniform, softcap)

    def sample(self, logits, params, temperature, uniform, softcap: float) -> Tensor:
        """See sampler.sample; other kernels may compute the same."""
        return sample(logits, params, temperature, uniform, softcap)

    def read(self, plan: Plan) -> list[int]:
        """Wait for the tokens of a step that was launched."""
        tokens = plan.results["tokens"]
        token_ids = [] if tokens is None else tokens.tolist()
        self.blocks.events.lap("wait")
        return token_ids


class RequestOutput(dict):
    """The result of a request: a dict, its keys are attributes too.

    text (without special tokens and the stop token), token_ids (all that were generated, the stop
    token too), prompt_token_ids, finish_reason ("stop" | "length" | "abort" | "error"), stop_reason
    (the stop token's id, "max_tokens" | "max_model_len", the error; None after an abort),
    num_cached_tokens (of the prompt), request_id, and samples: a dict for each of the n samples,
    the first of which is also at the top level. Features add keys.
    """

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass
class Request:
    """A request from its arrival to its output."""

    id: int
    prompt: list[int]
    params: SamplingParams
    owned: bool  # generate or stream waits for the output; otherwise step() returns it
    events: deque | None  # pieces of text for stream (not the Events of scheduler.py)
    options: dict  # keyword arguments of `generate` that belong to features
    watched: bool = False  # is its text needed token by token?
    done: list[Sequence] = field(default_factory=list)  # finished samples
    texts: dict[int, Text] = field(default_factory=dict)  # by sample_id, if the request is watched
    errors: list[str] = field(default_factory=list)  # of the tokenizer, or of a user's function
    output: RequestOutput | None = None


class Parts(NamedTuple):
    """Seam: the classes that an LLM is made of. A feature may replace each by a subclass."""

    scheduler: type[Scheduler] = Scheduler
    runner: type[Runner] = Runner
    text: type[Text] = Text
    params: type[SamplingParams] = SamplingParams


class LLM(AbstractContextManager):
    """A nanochat model ready to generate.

    model_path, step, dtype: see load_model; tokenizer_path: by default looked for next to the
    model; device: "auto" is cuda, then mps, then cpu; num_blocks, block_size: of the KV cache, by
    default as many as memory allows, of 16 tokens each; max_batch_size: sequences that run at once;
    max_batched_tokens: tokens of one step; max_model_len: prompt plus output of a request, by
    default the checkpoint's context; seed: source of seeds for requests without one; options:
    victim, admission, eviction, the policies of scheduler.py, and any constant of model.Recipe
    (softcap=20 for era 3b). Raises FileNotFoundError, ValueError or TypeError with the cause.
    """

    parts = Parts()
    request_options: frozenset[str] = frozenset()  # keywords of `generate` that features add

    def __init__(
        self, model_path, step=None, tokenizer_path=None, device="auto", num_blocks=None,
        block_size=16, max_batch_size=None, *, dtype="auto", max_batched_tokens=None,
        max_model_len=None, enable_prefix_caching=True, seed=0, **options,
    ):  # fmt: skip
        policies = {k: options.pop(k) for k in options.keys() & {"victim", "admission", "eviction"}}
        device = pick_device(device)
        model = load_model(model_path, step, device, dtype, max_len=max_model_len, **options)
        tokenizer = load_tokenizer(find_tokenizer(model_path, tokenizer_path))
        self._assemble(
            model, tokenizer, max_batch_size, max_batched_tokens, max_model_len, num_blocks,
            block_size, enable_prefix_caching, seed, **policies,
        )  # fmt: skip

    def _assemble(
        self, model, tokenizer, max_batch_size, max_batched_tokens, max_model_len, num_blocks,
        block_size, enable_prefix_caching, seed, eviction=least_recently_used, **policies,
    ) -> None:  # fmt: skip
        """Set the limits, then make the KV cache, the scheduler and the runner."""
        self.model, self.tokenizer, self.device = model, tokenizer, model.device
        if tokenizer.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model "
                f"{model.config.vocab_size}: they do not belong together; give tokenizer_path"
            )
        cuda = self.device.type == "cuda"
        self.max_model_len = max_model_len or model.config.sequence_len
        self.max_batch_size = max_batch_size or (512 if cuda else 256)
        self.max_batched_tokens = max_batched_tokens or (8192 if cuda else 1024)
        caching = enable_prefix_caching, eviction
        self.cache, blocks = self._make_memory(num_blocks, block_size, *caching)
        limits = self.max_batch_size, self.max_batched_tokens
        self.scheduler = self.parts.scheduler(blocks, *limits, **policies)
        self.runner = self.parts.runner(model, self.cache, blocks)
        self._seeds, self._next_id = random.Random(seed), 0
        self._clock = 0.0  # time.perf_counter() when `_advance` began, for statistics
        self._requests: dict[int, Request] = {}  # the unfinished ones
        self._finished: list[RequestOutput] = []  # outputs that no step() has returned yet
        counters = "requests prompt_tokens output_tokens cached_tokens prefill_tokens steps"
        self._stats: dict[str, float] = dict.fromkeys(counters.split(), 0)

    def _make_memory(
        self, num_blocks: int | None, block_size: int, *caching
    ) -> tuple[PagedKVCache, BlockManager]:
        """The KV cache and its BlockManager. Seam: features with another layout of K and V."""
        config, dtype = self.model.kv_layout
        num_values = 2 * config.n_layer * config.n_kv_head * config.head_dim * block_size
        wanted = self.max_batch_size * -(-self.max_model_len // block_size) + 1  # and the sink
        num_blocks = self._pool_size(num_blocks, wanted, block_size, num_values * dtype.itemsize)
        cache = PagedKVCache(config, num_blocks, block_size, dtype, self.device)
        return cache, BlockManager(num_blocks, block_size, *caching)

    def _pool_size(self, num_blocks: int | None, wanted: int, block_size: int, block_bytes: int):
        """The number of blocks, checked before they are allocated. By default `wanted`, enough for
        max_batch_size sequences of max_model_len tokens, or as many as memory has room for."""
        if num_blocks is None:
            if (free := self._free_for_cache(block_size)) >= 2 * block_bytes:  # sink + 1
                return min(wanted, free // block_bytes)
            raise ValueError(
                f"no memory for a KV cache: {free:,} bytes are left and a block of {block_size} "
                f"tokens takes {block_bytes:,}; lower max_batched_tokens or use a smaller model"
            )
        if num_blocks * block_bytes > (free := free_memory(self.device)):
            raise ValueError(
                f"num_blocks={num_blocks} blocks of {block_size} tokens are more than this machine "
                f"can hold: {free:,} bytes are free; lower it"
            )
        return num_blocks

    def _free_for_cache(self, block_size: int) -> int:
        """Bytes: half of what is free, 4 GB at most."""
        return min(free_memory(self.device) // 2, 2**32)

    # requests

    def generate(
        self, prompts, sampling_params=None, use_tqdm: bool = True, **options
    ) -> list[RequestOutput]:
        """Complete the prompts: one string, or a list of strings and lists of token ids.
        sampling_params: one for all, or a list with one per prompt; use_tqdm, options: for
        features. A bad prompt is refused before any work is done."""
        requests = self._submit(prompts, sampling_params, **options)
        self._run(requests, use_tqdm)
        return [request.output for request in requests]

    def _run(self, requests: list[Request], use_tqdm: bool = False, progress=None) -> None:
        """Step until all of the requests have their output; if a step raises, abort them.
        progress: a function to call after each step."""
        pending = deque(requests)
        try:
            while pending:
                self._advance()
                while pending and pending[0].output is not None:
                    pending.popleft()
                if progress:
                    progress()
        finally:
            self.abort(*[request.id for request in pending])

    def stream(self, prompts, sampling_params=None, **options) -> Iterator[RequestOutput]:
        """Generate, and yield each piece of text as soon as nothing can change it: a dict of index
        (of the prompt), sample, text and token_ids (only the new ones), finish_reason (None until
        the sample's last event) and stop_reason. The texts of a sample, joined, are the text of
        generate. To leave the loop early aborts all unfinished requests."""
        events: deque = deque()
        requests = self._submit(prompts, sampling_params, events=events, **options)
        prompt_index = {request.id: i for i, request in enumerate(requests)}
        try:
            while events or any(request.output is None for request in requests):
                if not events:
                    self._advance()
                while events:
                    event = events.popleft()
                    yield RequestOutput(index=prompt_index[event.pop("request_id")], **event)
        finally:
            self.abort(*prompt_index)  # ids of finished requests are ignored

    def chat(
        self, messages, sampling_params=None, use_tqdm: bool = True, **options
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list of conversations: [{"role": "system" | "user" |
        "assistant", "content": ...}, ...], rendered as nanochat does, the user's turn last."""
        if not isinstance(messages, (list, tuple)) or dict in map(type, messages):
            messages = [messages]  # a list with dicts in it is one conversation
        render = self.tokenizer.render_for_completion
        prompts = name_errors("conversation {}", render, [(m,) for m in messages])
        return self.generate(prompts, sampling_params, use_tqdm, **options)

    def add_request(self, prompt, sampling_params: SamplingParams | None = None, **options) -> int:
        """Queue one prompt (a string or token ids); returns the id its output will carry."""
        self._check_options(options)
        return self._add(*self._check(prompt, sampling_params), **options).id

    def step(self) -> list[RequestOutput]:
        """Run the model once; returns the requests that finished. If that fails (out of memory, for
        example), all requests wait again, and further steps generate the same tokens."""
        self._advance()
        finished, self._finished = self._finished, []
        return finished

    def is_finished(self) -> bool:
        """True when no request is queued or running and every output was returned by step()."""
        return not self._requests and not self._finished

    def abort(self, *request_ids: int) -> None:
        """End requests now; their outputs say "abort". Unknown ids are ignored."""
        requests = {i: self._requests[i] for i in request_ids if i in self._requests}
        if requests:
            self._collect(self.scheduler.abort(*requests))
            for request in requests.values():
                if request.output is None:  # it has samples that were not forked yet
                    self._finish(request)

    def _submit(self, prompts, sampling_params, **options) -> list[Request]:
        """Check all prompts, then queue them. Raises TypeError or ValueError naming the prompt."""
        self._check_options(options)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(sampling_params)} sampling_params")
        pairs = zip(prompts, sampling_params, strict=True)
        return self._queue(name_errors("prompts[{}]", self._check, pairs), **options)

    def _queue(self, checked: list[tuple], **options) -> list[Request]:
        """Queue requests of `generate` or `stream`. Seam: if one fails, none is queued."""
        return [self._add(*request, owned=True, **options) for request in checked]

    def _check_options(self, options: dict) -> None:
        """Raises TypeError for a keyword that neither `stream` (events) nor a feature takes."""
        if unknown := options.keys() - self.request_options - {"events"}:
            known = ", ".join(sorted(self.request_options)) or "none"
            raise TypeError(f"unknown argument {min(unknown)!r}: there are {known}")

    def _check(self, prompt, params: SamplingParams | None) -> tuple[list[int], SamplingParams]:
        """Token ids and params of a request. Raises ValueError if it can never be served."""
        params = self.parts.params() if params is None else params
        ids = self.tokenizer.prompt_ids(prompt)
        # the last token is not an input of the model, so it needs no slot
        slots = min(len(ids) + params.max_tokens, self.max_model_len) - 1
        blocks = self.scheduler.blocks
        need = -(-blocks.most_blocks(slots, self.max_batched_tokens) // blocks.width)
        for number, limit, what in (
            (params.n, self.max_batch_size, "samples, and max_batch_size is"),
            (len(ids), self.max_model_len - 1, "prompt tokens, and max_model_len allows"),
            (need, blocks.num_usable // blocks.width, "blocks are needed, and the pool has"),
        ):
            if number > limit:
                raise ValueError(f"{number} {what} {limit}")
        return ids, params

    def _add(self, ids, params, *, owned=False, events=None, **options) -> Request:
        """Queue a request that was checked."""
        if params.seed is None:
            params = replace(params, seed=self._seeds.getrandbits(63))
        request = Request(self._next_id, ids, params, owned, events, options)
        request.watched = self.watches(request)
        self._next_id += 1
        self._requests[request.id] = request
        self.scheduler.add(self._make_sequence(request))
        self._stats["prompt_tokens"] += len(ids)
        return request

    def _make_sequence(self, request: Request) -> Sequence:
        """The request's first sample."""
        ids, params = request.prompt, request.params
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self.tokenizer.eos_ids
        max_length = min(len(ids) + params.max_tokens, self.max_model_len)
        return Sequence(request.id, ids, params, max_length, stop_ids)

    # the loop

    @torch.inference_mode()
    def _advance(self) -> None:
        """One turn of the loop: plan a step, run it, read its tokens. Seam: a loop with a step in
        flight launches the next step before it reads the tokens of this one."""
        self._clock = time.perf_counter()
        self.scheduler.blocks.events.lap("outside")
        try:
            plan = self.scheduler.schedule()
            if plan.chunks:
                self.runner.launch(plan)
                self._land(plan)
        except BaseException as error:
            self._recover(error)
            raise

    def _recover(self, error: BaseException) -> None:
        """After a step that failed: all sequences wait again."""
        self.scheduler.reset()

    def _land(self, plan: Plan) -> None:
        """Read a step's tokens, give them to the scheduler, collect the requests that are done."""
        token_ids = self.runner.read(plan)
        before = self.scheduler.num_tokens
        changed = self.scheduler.update(plan, token_ids)
        # nothing may raise from here on: `_recover` finds only sequences that have not finished
        self._count(plan, self.scheduler.num_tokens - before)
        self._collect(changed)
        self.scheduler.blocks.events.end()

    def _settle(self) -> None:
        """Seam: a loop with a step in flight waits for it here and reads its tokens."""

    def watches(self, request: Request) -> bool:
        """Is a request's text needed token by token? Seam: features that react to text."""
        return request.events is not None

    def _collect(self, changed: list[Sequence]) -> None:
        """For samples with new tokens: update watched texts, finish requests that are done."""
        for seq in changed:
            request = self._requests[seq.request_id]
            if request.watched:
                self._watch(request, seq)
            if seq.finish_reason:
                request.done.append(seq)
                if len(request.done) == request.params.n:
                    self._finish(request)

    def _watch(self, request: Request, seq: Sequence) -> None:
        """Decode a sample's new tokens, and append an event to its stream."""
        if seq.sample_id not in request.texts:
            request.texts[seq.sample_id] = self.parts.text(self.tokenizer, request)
        text, num_before = request.texts[seq.sample_id], len(seq.tokens)
        with self.isolated(request, seq):
            text.read(seq, self.scheduler)
        self._stats["output_tokens"] += len(seq.tokens) - num_before  # by a feature
        if request.events is not None and (event := text.event(seq)):
            event |= {"request_id": request.id, "stop_reason": self.stop_reason(request, seq)}
            request.events.append(event)

    @contextmanager
    def isolated(self, request: Request, seq: Sequence) -> Iterator[None]:
        """An exception inside (its text cannot be decoded) ends this sample, and no other one."""
        try:
            yield
        except Exception as error:
            if seq.finish_reason is None:
                self.scheduler.finish(seq, "error")
            request.errors.insert(0, f"tokenizer: {type(error).__name__}: {error}")  # shown first
            seq.finish_reason = "error"

    def _finish(self, request: Request) -> None:
        """Make the output of a request of which no sample is left to run."""
        request.output = RequestOutput(self.output(request))
        del self._requests[request.id]
        self._stats["cached_tokens"] += request.output["num_cached_tokens"]
        self._stats["requests"] += 1
        if not request.owned:
            self._finished.append(request.output)

    def output(self, request: Request) -> dict:
        """The keys and values of a request's RequestOutput."""
        done = sorted(request.done, key=lambda seq: seq.sample_id)
        samples = [self.sample_output(request, seq) for seq in done]
        return samples[0] | {
            "request_id": request.id, "prompt_token_ids": request.prompt,
            "num_cached_tokens": request.done[0].num_cached or 0, "samples": samples,
        }  # fmt: skip

    def sample_output(self, request: Request, seq: Sequence) -> dict:
        """The keys and values of one sample in it. Seam: features add keys."""
        if seq.sample_id in request.texts:
            text = request.texts[seq.sample_id].text
        else:
            text, shown = "", seq.output[:-1] if seq.finish_reason == "stop" else seq.output
            with self.isolated(request, seq):
                text = self.tokenizer.decode(shown, skip_special=True)
        return {
            "text": text, "token_ids": seq.output, "finish_reason": seq.finish_reason,
            "stop_reason": self.stop_reason(request, seq),
        }  # fmt: skip

    def stop_reason(self, request: Request, seq: Sequence) -> int | str | None:
        """What ended a sample: a token id, the limit's name, or the error. Seam: more reasons."""
        if seq.finish_reason == "stop":
            return seq.tokens[-1]
        if seq.finish_reason == "length":
            return "max_tokens" if len(seq.output) == seq.params.max_tokens else "max_model_len"
        if seq.finish_reason == "error":
            return request.errors[0] if request.errors else "no token is left to draw"
        return None

    def _count(self, plan: Plan, num_new: int) -> None:
        """Add a step to the counters of `stats`. Seam: features have more counters."""
        prompts = [(s, start, stop) for s, start, stop in plan.chunks if start < s.num_prompt]
        self._stats["steps"] += 1
        self._stats["output_tokens"] += num_new
        self._stats["prefill_tokens"] += sum(min(stop, s.num_prompt) - a for s, a, stop in prompts)

    def stats(self) -> dict:
        """Counters since the start (of the prompts' tokens, cached_tokens came from the prefix
        cache and prefill_tokens were computed), and the present state of the pool, without the
        sink."""
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        return self._stats | {
            "preemptions": scheduler.num_preemptions, "block_size": blocks.block_size,
            "num_blocks": blocks.num_usable // blocks.width,
            "free_blocks": blocks.num_free // blocks.width,
            "running": len(scheduler.running), "waiting": len(scheduler.waiting),
        }  # fmt: skip

    def close(self) -> None:
        """Abort all unfinished requests, and drop the weights and the cache."""
        self.abort(*self._requests)
        self.model = self.cache = self.runner = None

    def __exit__(self, *_) -> None:
        self.close()


def name_errors(where: str, check: Callable, arguments: Iterable[tuple]) -> list:
    """[check(*args) for args in arguments]; an error's message begins with the index: `where`."""
    results = []
    for i, args in enumerate(arguments):
        try:
            results.append(check(*args))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where.format(i)}: {error}") from None
    return results
