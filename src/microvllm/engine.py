"""How do prompts become tokens? The story of a request (R samples, C channels):

LLM.generate          text becomes token ids, and a Sequence that waits
  Scheduler.schedule  which tokens of which sequences, in which blocks        -> Plan
  make_batch          the plan as arrays, all sequences in one flat batch     -> Batch
  GPT.forward         writes K and V into the PagedKVCache, attends           -> (R, C)
  sample              logits and noise                                        -> (R,) tokens
  Scheduler.update    appends the tokens, ends what is done, frees blocks
... again, until every sequence has finished                                  -> RequestOutput
"""

import operator
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from itertools import count, takewhile

import torch
from torch import Tensor

from .attention import Batch, PagedKVCache, SequenceKVView, make_batch
from .checkpoint import (
    _find_last_step,
    find_tokenizer,
    load_model,
    pick_device,
    require_memory,
)
from .environment import free_memory, limit_threads
from .model import rotary_bytes
from .sampler import SamplingParams, sample
from .scheduler import BlockManager, Plan, Scheduler, Sequence, least_recently_used
from .tokenizer import Text, load_tokenizer

__all__ = [
    "LLM", "BlockManager", "PagedKVCache", "RequestOutput", "SamplingParams", "Scheduler",
    "SequenceKVView", "_find_last_step", "load_model",
]  # fmt: skip


class Runner:
    """Runs plans on the device. Seam: subclasses override any method. `launch` may leave a step in
    flight: only `read` waits for what it puts into `plan.results`."""

    rows_at_once: int | None = None  # rows of logits that a feature works on at once; None: all
    sample = staticmethod(sample)  # other kernels may compute the same

    def __init__(self, model, cache: PagedKVCache, blocks: BlockManager):
        self.model, self.cache, self.blocks = model, cache, blocks

    def launch(self, plan: Plan) -> None:
        """Start a step: make the batch, copy shared blocks, upload, forward, draw."""
        events, batch = self.blocks.events, self.batch(plan)
        events.lap("batch")
        self.cache.copy_blocks(plan.copies)
        batch = self.upload(batch)
        h = self.forward(batch)
        events.lap("forward")
        plan.results["tokens"] = self.draw(plan, batch, h)
        events.lap("sample")

    def batch(self, plan: Plan) -> Batch:
        """The plan as arrays."""
        return make_batch(plan, self.blocks)

    def upload(self, batch: Batch) -> Batch:
        """The arrays as tensors on the device."""
        return batch.to(self.model.device)

    def forward(self, batch: Batch) -> Tensor:
        """The final hidden states (R, C) of the R rows that are sampled, see GPT.forward."""
        return self.model.forward(batch, self.cache)

    def draw(self, plan: Plan, batch: Batch, h: Tensor) -> Tensor | None:
        """(R,) tokens of hidden states (R, C); None where a step samples none."""
        if not plan.samples:
            return None
        return self.pick(plan, self.model.logits(h), batch.temperature, batch.noise)

    def pick(self, plan: Plan, logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
        """(R,) tokens of logits (R, V) before the softcap; features change logits here."""
        softcap = self.model.recipe.softcap
        return self.sample(logits, plan.params, temperature, uniform, softcap)

    def read(self, plan: Plan) -> list[int]:
        """Wait for the tokens of a step that was launched."""
        tokens = plan.results["tokens"]
        token_ids = [] if tokens is None else tokens.tolist()
        self.blocks.events.lap("wait")
        return token_ids


class RequestOutput(dict):
    """The result of a request, a dict; its keys are attributes too: text (without special tokens
    and the stop token), token_ids (with it), prompt_token_ids, finish_reason ("stop" | "length" |
    "abort" | "error"), stop_reason (the stop token's id, "max_tokens" | "max_model_len", the error,
    or None), num_cached_tokens (of the prompt), request_id, and samples: a dict for each of the n
    samples, the first of which is also at the top level. Features add keys."""

    def __getattr__(self, name: str):
        if name in self:
            return self[name]
        hint = ". The text of sample i is output.samples[i]['text']" if "samples" in self else ""
        raise AttributeError(
            f"RequestOutput has no attribute {name!r}: it has {', '.join(self)}{hint}"
        )


@dataclass
class Request:
    """A request from its arrival to its output."""

    id: int
    prompt: list[int]
    params: SamplingParams
    owned: bool  # generate or stream waits for the output; otherwise step() returns it
    watched: bool  # is its text needed token by token?
    options: dict  # keyword arguments of `generate` that belong to features
    samples: list[Sequence] = field(default_factory=list)  # made so far, see Sequence.samples
    num_done: int = 0  # finished samples
    texts: dict[int, Text] = field(default_factory=dict)  # by sample_id, if the request is watched
    output: RequestOutput | None = None


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

    # seam: the classes that an LLM is made of, each of which features may replace by a subclass
    scheduler_class, runner_class = Scheduler, Runner
    text_class, params_class = Text, SamplingParams
    output_class, list_class = RequestOutput, list  # of an output, of what `generate` returns
    request_options: frozenset[str] = frozenset()  # keywords of `generate` that features add

    def __init__(
        self, model_path, step=None, tokenizer_path=None, device="auto", num_blocks=None,
        block_size=16, max_batch_size=None, *, dtype="auto", max_batched_tokens=None,
        max_model_len=None, enable_prefix_caching=True, seed=0, **options,
    ):  # fmt: skip
        policies = {k: options.pop(k) for k in options.keys() & {"victim", "admission", "eviction"}}
        device = pick_device(device)
        if device.type == "cpu":
            limit_threads()
        model = load_model(model_path, step, device, dtype, max_len=1, **options)
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
        self._make_tables(blocks)
        self.scheduler = self.scheduler_class(blocks, *limits, **policies)
        self.runner = self.runner_class(model, self.cache, blocks)
        self._seeds, self._ids = random.Random(seed), count()
        self._requests: dict[int, Request] = {}  # the unfinished ones, in the order of arrival
        self._finished: dict[int, RequestOutput] = {}  # outputs that no step() has returned yet

    def _make_memory(self, num_blocks: int | None, block_size: int, *caching) -> tuple:
        """The KV cache and its BlockManager. Seam: features with another layout of K and V."""
        config, dtype = self.model.kv_layout
        num_values = 2 * config.n_layer * config.n_kv_head * config.head_dim * block_size
        # for max_batch_size sequences of max_model_len tokens, and the sink
        wanted = self.max_batch_size * -(-self.max_model_len // block_size) + 1
        num_blocks = self._pool_size(num_blocks, wanted, block_size, num_values * dtype.itemsize)
        cache = PagedKVCache(config, num_blocks, block_size, dtype, self.device)
        return cache, BlockManager(num_blocks, block_size, *caching)

    def _pool_size(
        self, num_blocks: int | None, wanted: int, block_size: int, block_bytes: int,
        reach: int | None = None,
    ) -> int:  # fmt: skip
        """How many blocks, by default `wanted`, or what fits, compared with what is free before
        they or the rotary tables are made. reach: tokens by which each block may make the longest
        sequence longer, by default block_size."""
        free = free_memory(self.device) if num_blocks else self._free_for_cache(block_size)
        reach = reach or block_size
        each = block_bytes + 48  # K and V of a block, and its entries in lists
        angles = rotary_bytes(self.model.config, 1)  # of one position
        # the tables are of all positions, or of those that the pool can hold
        of_all = (free - angles * self.max_model_len) // each
        of_some = (free - angles) // (each + angles * reach)
        # at least the sink and one to use; a slot is an int32
        fit = max(2, of_all, of_some)
        count = num_blocks or min(wanted, fit, 2**31 // block_size)
        what = f"a KV cache of num_blocks={count} times {block_bytes:,} bytes"
        remedy = "lower num_blocks, max_model_len or max_batched_tokens"
        if count * block_size > 2**31:
            raise ValueError(f"{what} has more than 2**31 slots; {remedy}")
        tables = angles * min(self.max_model_len, count * reach + 1)
        require_memory(f"{what}, and rotary tables", count * each + tables, free, remedy)
        return count

    def _make_tables(self, blocks: BlockManager) -> None:
        """Make the model's rotary tables: no longer than a sequence that the pool can hold, and the
        token that it ends with. Seam: what is said where the system gives no memory."""
        longest = blocks.longest(self.max_model_len - 1, self.max_batched_tokens)
        self.max_positions = longest + 1  # of any request
        if self.max_positions * self.model.config.head_dim >= 2**31:
            raise ValueError(
                f"rotary tables of {self.max_positions} positions have more than 2**31 numbers; "
                "give a smaller max_model_len"
            )
        self.model.init_rotary(self.max_positions)

    def _free_for_cache(self, block_size: int) -> int:
        """Bytes: half of what is free, 4 GB at most."""
        return min(free_memory(self.device) // 2, 2**32)

    def generate(
        self, prompts, sampling_params=None, use_tqdm: bool = True, **options
    ) -> list[RequestOutput]:
        """Complete the prompts: one string, or a list of strings and lists of token ids.
        sampling_params: one for all, or a list with one per prompt; use_tqdm, options: for
        features. A bad prompt is refused before any work is done."""
        requests = self._prepare(prompts, sampling_params, **options)
        return self._run(requests, use_tqdm)

    def _run(self, requests: list[Request], use_tqdm: bool = False) -> list[RequestOutput]:
        """Step until all requests have their outputs. Seam: what is kept of a call that fails."""
        deque(self._steps(requests, use_tqdm), maxlen=0)  # only their outputs are of interest
        return self.list_class([request.output for request in requests])

    def _steps(self, requests: list[Request], use_tqdm=False) -> Iterator[deque[Request]]:
        """Queue requests; after each step, yield the first unfinished one and all that follow. What
        is unfinished is aborted if a step raises, or nobody wants more. Seam: a progress bar."""
        pending = deque(requests)
        try:
            self._queue(requests)
            while pending:
                self._step(pending[0])
                # those that are done now are yielded once more, for the last events of a stream
                num_done = len([*takewhile(lambda request: request.output, pending)])
                yield pending
                for _ in range(num_done):
                    pending.popleft()
        finally:
            self.abort(*[request.id for request in pending])

    def stream(self, prompts, sampling_params=None, **options) -> Iterator[RequestOutput]:
        """Generate, and yield each piece of text as soon as nothing can change it: index (of the
        prompt), sample, text and token_ids (only the new ones), finish_reason (None until the
        sample's last event), stop_reason. To leave the loop early aborts what is unfinished."""
        requests = self._prepare(prompts, sampling_params, streamed=True, **options)
        index = {request.id: i for i, request in enumerate(requests)}
        for pending in self._steps(requests):
            for request, event in self._news(pending):
                yield self.output_class(index=index[request.id], **event)

    def _news(self, requests: Iterable[Request]) -> list[tuple[Request, dict]]:
        """The events of streamed requests since the last call."""
        texts = [(r, seq, r.texts.get(seq.sample_id)) for r in requests for seq in r.samples]
        events = [(request, text.event(seq)) for request, seq, text in texts if text]
        return [(request, event) for request, event in events if event]

    def chat(self, messages, sampling_params=None, use_tqdm=True, **options) -> list[RequestOutput]:
        """Answer a conversation, or each of a list of conversations: [{"role": "system" | "user" |
        "assistant", "content": ...}, ...], rendered as nanochat does, the user's turn last."""
        return self.generate(self._render(messages), sampling_params, use_tqdm, **options)

    def _render(self, messages) -> list[list[int]]:
        """The token ids of a conversation, or of each of a list of conversations: see `chat`."""
        if not isinstance(messages, (list, tuple)) or dict in map(type, messages):
            messages = [messages]  # a list with dicts in it is one conversation
        render = self.tokenizer.render_for_completion
        return name_errors("conversation {}", render, [(m,) for m in messages])

    def add_request(self, prompt, sampling_params: SamplingParams | None = None, **options) -> int:
        """Queue one prompt (a string or token ids); returns the id its output will carry."""
        self._check_options(options)
        request = self._request(*self._check(prompt, sampling_params), **options)
        self._queue([request])
        return request.id

    def step(self) -> list[RequestOutput]:
        """Run the model once; returns the requests that finished. If that fails (out of memory, for
        example), all requests wait again, and further steps generate the same tokens."""
        self._step()
        finished, self._finished = self._finished, {}
        return [*finished.values()]

    def is_finished(self) -> bool:
        """True when no request is queued or running and every output was returned by step()."""
        return not self._requests and not self._finished

    def abort(self, *request_ids: int) -> None:
        """End requests now; their outputs say "abort". Unknown ids are ignored. Raises TypeError,
        and aborts nothing, if one of them is no integer."""
        request_ids = check_request_ids(request_ids)
        requests = {i: self._requests[i] for i in request_ids if i in self._requests}
        if requests:
            samples = [seq for request in requests.values() for seq in request.samples]
            self._collect(self.scheduler.abort(*samples))
            for request in requests.values():
                if request.output is None:  # it has samples that were not forked yet
                    self._finish(request)

    def _prepare(self, prompts, sampling_params, **options) -> list[Request]:
        """Requests for prompts; TypeError or ValueError names the one that cannot be served."""
        self._check_options(options)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(sampling_params)} sampling_params")
        pairs = zip(prompts, sampling_params, strict=True)
        checked = name_errors("prompts[{}]", self._check, pairs)
        return [self._request(*request, owned=True, **options) for request in checked]

    def _check_options(self, options: dict) -> None:
        """Raises TypeError for a keyword that neither `stream` (streamed) nor a feature takes."""
        if unknown := options.keys() - self.request_options - {"streamed"}:
            known = ", ".join(sorted(self.request_options)) or "none"
            raise TypeError(f"unknown argument {min(unknown)!r}: there are {known}")

    def _check(self, prompt, params: SamplingParams | None) -> tuple[list[int], SamplingParams]:
        """Token ids and params of a request. Raises ValueError if it can never be served."""
        params = self.params_class() if params is None else params
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

    def _request(self, ids, params, *, owned=False, streamed=False, **options) -> Request:
        """A request for what was checked, and its first sample."""
        if params.seed is None:
            params = copy(params)  # `replace` would check every field again
            params.put("seed", self._seeds.getrandbits(63))
        request = Request(next(self._ids), ids, params, owned, streamed, options)
        request.watched = streamed or self.watches(request)
        request.samples = self._make_sequence(request).samples
        return request

    def _queue(self, requests: list[Request]) -> None:
        """Let requests wait for their turn. Seam: those that come while a step is under way."""
        for request in requests:
            self._requests[request.id] = request
            self.scheduler.add(request.samples[0])

    def _make_sequence(self, request: Request) -> Sequence:
        """The request's first sample."""
        ids, params = request.prompt, request.params
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self.tokenizer.eos_ids
        max_length = min(len(ids) + params.max_tokens, self.max_model_len)
        return Sequence(request.id, ids, params, max_length, stop_ids)

    def _step(self, request: Request | None = None) -> None:
        """One turn of the loop, for whoever waits for the request. Seam: several may wait."""
        self._change(self._advance)

    def _change(self, change: Callable[[], object]) -> None:
        """Change the books, and recover if that fails. Seam: threads, calls inside of others."""
        try:
            change()
        except BaseException as error:
            self._recover(error)
            raise

    @torch.inference_mode()
    def _advance(self) -> None:
        """Plan a step, run it, read its tokens. Seam: a loop with a step in flight."""
        self.scheduler.blocks.events.lap("outside")
        plan = self.scheduler.schedule()
        if plan.chunks:
            self.runner.launch(plan)
            self._land(plan)

    def _recover(self, error: BaseException | None = None) -> None:
        """After an exception at any line: make all books again from prompts and tokens."""
        sequences: list[Sequence] = []
        for request in [*self._requests.values()]:
            if request.output is not None:
                self._finish(request)
                continue
            first = request.samples[0]
            if not first.output:  # nor has another sample a token: it will fork again
                del request.samples[1:]
                first.forks = request.params.n - 1
            request.num_done = 0
            for text in request.texts.values():
                text.restart()
            sequences += request.samples
        self._collect(self.scheduler.reset(sequences))

    def _land(self, plan: Plan) -> None:
        """Read a step's tokens, give them to the scheduler, collect the requests that are done."""
        self._collect(self.scheduler.update(plan, self.runner.read(plan)))
        self.scheduler.blocks.events.end()

    def _settle(self) -> None:
        """Seam: a loop with a step in flight waits for it here and reads its tokens."""

    def watches(self, request: Request) -> bool:
        """Is a request's text needed token by token? Seam: features that react to text."""
        return False

    def _collect(self, changed: Iterable[Sequence]) -> None:
        """For samples with new tokens: update watched texts, finish requests that are done."""
        for seq in changed:
            request = self._requests[seq.request_id]
            if request.watched:
                self._watch(request, seq)
            if seq.finish_reason:
                request.num_done += 1
                if request.num_done == request.params.n:
                    self._finish(request)

    def _watch(self, request: Request, seq: Sequence) -> None:
        """Decode a sample's new tokens."""
        if seq.sample_id not in request.texts:
            request.texts[seq.sample_id] = self.text_class(self.tokenizer, request)
        text = request.texts[seq.sample_id]
        self._isolate(seq, partial(text.read, seq, self.scheduler), text.restart)

    def _isolate(self, seq: Sequence, decode: Callable, restart: Callable = lambda: None):
        """decode(), or None: an exception in it, which the tokenizer raises again when it is asked
        again, ends this sample and no other one. Any other is from outside, such as a signal."""
        try:
            return decode()
        except Exception:
            try:
                restart()
                decode()
            except Exception as error:
                ending = "error", f"tokenizer: {type(error).__name__}: {error}"
                if seq.finish_reason is None:
                    self.scheduler.finish(seq, *ending)
                seq.finish_reason, seq.stop_reason = ending
                return None
            raise

    def _finish(self, request: Request) -> None:
        """Make the output of a request of which no sample is left to run, once."""
        request.output = request.output or self.output_class(self.output(request))
        if not request.owned:
            self._finished[request.id] = request.output
        del self._requests[request.id]
        for seq in request.samples:
            seq.samples = []  # it is in this list: a cycle, which would keep its memory for a while

    def output(self, request: Request) -> dict:
        """The keys and values of a request's RequestOutput."""
        samples = [self.sample_output(request, seq) for seq in request.samples]
        return samples[0] | {
            "request_id": request.id, "prompt_token_ids": request.prompt,
            "num_cached_tokens": request.samples[0].num_cached or 0, "samples": samples,
        }  # fmt: skip

    def sample_output(self, request: Request, seq: Sequence) -> dict:
        """The keys and values of one sample in it. Seam: features add keys."""
        if seq.sample_id in request.texts:
            text = request.texts[seq.sample_id].text
        else:
            shown = seq.output[:-1] if seq.finish_reason == "stop" else seq.output
            text = self._isolate(seq, partial(self.tokenizer.decode, shown, True)) or ""
        return {
            "text": text, "token_ids": seq.output, "finish_reason": seq.finish_reason,
            "stop_reason": seq.stop_reason,
        }  # fmt: skip

    def close(self) -> None:
        """Abort all unfinished requests, and drop the weights and the cache."""
        self.abort(*self._requests)
        self.model = self.cache = self.runner = None

    def __exit__(self, *_) -> None:
        self.close()


def check_request_ids(request_ids: Iterable[object]) -> tuple[int, ...]:
    """The ids of requests as integers. Raises TypeError for what is none, such as a list of ids."""
    try:
        return tuple(map(operator.index, request_ids))
    except TypeError:
        raise TypeError(
            "request ids are integers, given one by one, as in abort(3, 4) or abort(*request_ids): "
            f"got {request_ids!r:.200}"
        ) from None


def name_errors(where: str, check: Callable, arguments: Iterable[tuple]) -> list:
    """[check(*args) for args in arguments]; an error's message begins with the index: `where`."""
    results = []
    for i, args in enumerate(arguments):
        try:
            results.append(check(*args))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where.format(i)}: {error}") from None
    return results
