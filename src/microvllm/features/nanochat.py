"""What nanochat's own Engine does, under its names, and as lenient as it is."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from numbers import Integral

import numpy as np

from ..engine import LLM, Request, name_errors
from ..sampler import SamplingParams
from . import check_number

log = logging.getLogger("microvllm")


class NanochatLLM(LLM):
    """An engine with the two methods of nanochat's, and the first one for event loops. What their
    arguments may be:

    num_samples: beyond max_batch_size they are served in turns; max_tokens: 0 too; None: until the
    model ends the text, or the context of its training (sequence_len) is full; top_k: None, 0 and
    less are off; seed: any integer, of which the last 64 bits count; more: fields of
    SamplingParams. The calculator is on. Raises TypeError or ValueError for what makes no sense,
    RuntimeError if a sample fails.
    """

    def generate_columns(
        self, tokens, num_samples=1, max_tokens=None, temperature=1.0, top_k=None, seed=42, **more
    ) -> Iterator[tuple[list[int], list[int]]]:
        """What nanochat's Engine.generate does for a prompt's token ids: yield (column, masks) as
        soon as each sample has one more token, lists with a value for each. A mask is 0 for what
        the calculator forced. While others go on, a sample that has ended has <|assistant_end|>
        with mask 0; nanochat's goes on past its end."""
        more |= {"temperature": temperature, "top_k": top_k}
        ((_, requests),) = self._ask([tokens], num_samples, max_tokens, seed, more)
        read = self._column_reader(requests, num_samples)
        for _ in self._steps(requests):
            yield from read()
        self._check_endings(requests)

    async def agenerate_columns(
        self, tokens, num_samples=1, max_tokens=None, temperature=1.0, top_k=None, seed=42, **more
    ) -> AsyncIterator[tuple[list[int], list[int]]]:
        """`generate_columns` for event loops: see features/async_api.py."""
        serve = self.serve_async
        more |= {"temperature": temperature, "top_k": top_k}
        ask = partial(self._ask, [tokens], num_samples, max_tokens, seed, more)
        ((_, requests),) = await asyncio.to_thread(ask)
        read = self._column_reader(requests, num_samples)
        with serve(requests, lambda pending: read()) as call:
            async for column in call:
                yield column
        self._check_endings(requests)

    def generate_batch(
        self, tokens, num_samples=1, max_tokens=None, temperature=1.0, top_k=None, seed=42,
        logprobs=False, **more,
    ):  # fmt: skip
        """What nanochat's Engine.generate_batch does: (sequences, masks) of a prompt's token ids.

        A sequence is prompt plus output without the end token; its mask is 0 for the prompt and for
        tokens the calculator forced. A list of prompts gives (list of sequences, list of masks)
        with one list of num_samples each; prompt i is drawn with seed + i. logprobs: return a third
        list, like the masks, with the log-probability of each token in the distribution that it was
        drawn from, after temperature and filters: 0.0 at temperature 0, and where the mask is 0.
        """
        listed = isinstance(tokens, (list, tuple)) and len(tokens) > 0
        several = listed and not isinstance(tokens[0], (int, np.integer))
        more |= {"temperature": temperature, "top_k": top_k}
        if logprobs:
            more["logprobs"] = 0
        if isinstance(tokens, (int, np.integer)):  # in a list it would be a prompt
            raise TypeError(f"tokens must be a list of token ids, got {type(tokens).__name__}")
        prompts = tokens if several else [tokens]
        asked = self._ask(prompts, num_samples, max_tokens, seed, more)
        requests = [*chain(*(theirs for _, theirs in asked))]
        deque(self._steps(requests), maxlen=0)
        self._check_endings(requests)
        nothing = {"token_ids": [], "finish_reason": "length"}  # what max_tokens=0 gives
        rows = []  # for each prompt, of each sample: sequence, mask, log-probabilities
        for prompt, theirs in asked:
            samples = [*chain(*(request.output["samples"] for request in theirs))]
            rows.append([cut(prompt, s) for s in samples or [nothing] * num_samples])
        parts = range(3 if logprobs else 2)
        results = [[[row[part] for row in samples] for samples in rows] for part in parts]
        return tuple(results if several else [result[0] for result in results])

    def _ask(
        self, prompts, num_samples, max_tokens, seed, more: dict
    ) -> list[tuple[list[int], list[Request]]]:
        """The token ids of each prompt, and the requests for its samples, of max_batch_size at
        most; none for max_tokens=0."""
        count, top_k = check_number("num_samples", num_samples), more["top_k"]
        if not isinstance(seed, Integral):
            raise TypeError(f"seed must be an integer, got {seed!r:.80}")
        if isinstance(top_k, Integral):
            more["top_k"] = min(top_k, self.tokenizer.vocab_size) if top_k > 0 else None
        most = self.model.config.sequence_len if max_tokens is None else max_tokens or 1
        params = self.params_class(n=1, max_tokens=most, **more)
        seeds = [(int(seed) + i) % 2**64 for i in range(len(prompts))]
        given = zip(prompts, [replace(params, seed=seed) for seed in seeds], strict=True)
        check = self._fill if max_tokens is None else self._check
        tools = {"tools": True} if "tools" in self.request_options else {}
        size, first = self.max_batch_size, params.sample_index
        starts = range(0, 0 if max_tokens == 0 else count, size)
        asked = []
        for ids, own in name_errors("prompts[{}]", check, given):
            turns = [replace(own, n=min(size, count - i), sample_index=first + i) for i in starts]
            asked.append((ids, [self._request(ids, turn, owned=True, **tools) for turn in turns]))
        return asked

    def _fill(self, prompt, params: SamplingParams) -> tuple[list[int], SamplingParams]:
        """`_check`, with as many tokens as max_tokens, the context, leaves to the prompt."""
        ids, _ = self._check(prompt, self.params_class(max_tokens=1))
        context = params.max_tokens
        if len(ids) >= context:
            what = f"the prompt has {len(ids)} tokens, and the context {context}"
            raise ValueError(f"{what}: give max_tokens, None is as many as fit into it")
        return self._check(ids, replace(params, max_tokens=context - len(ids)))

    def _column_reader(self, requests: list[Request], num_samples: int) -> Callable[[], list]:
        """A function that gives the columns which are known since it was called last."""
        num_read = 0

        def read() -> list[tuple]:
            nonlocal num_read
            columns: list[tuple] = []
            self._change(partial(self._read, requests, num_samples, num_read, columns))
            num_read += len(columns)
            return columns

        return read

    def _read(self, requests, num_samples: int, start: int, columns: list) -> None:
        """Append the columns from `start` on that are known by now."""
        rows = [  # of each sample: its tokens from there on, which are forced, whether it goes on
            (
                seq.tokens[seq.num_prompt + start :],
                getattr(request.texts.get(seq.sample_id), "forced", ()),
                seq.finish_reason is None,
            )
            for request in requests
            for seq in request.samples
        ]
        if len(rows) < num_samples:  # some are not forked yet
            return
        end = self.tokenizer.special_tokens.get("<|assistant_end|>", self.tokenizer.bos_id)
        going = [len(tokens) for tokens, _, goes_on in rows if goes_on]
        for i in range(min(going, default=max([len(tokens) for tokens, *_ in rows]))):
            column = [tokens[i] if i < len(tokens) else end for tokens, *_ in rows]
            masks = [int(i < len(row[0]) and start + i not in row[1]) for row in rows]
            columns.append((column, masks))

    def _check_endings(self, requests: list[Request]) -> None:
        """Raises RuntimeError if a sample failed; tells if some are cut short."""
        seqs = [seq for request in requests for seq in request.samples]
        for i, seq in enumerate(seqs):
            if seq.finish_reason not in ("stop", "length"):
                why = seq.stop_reason or "it was aborted"
                raise RuntimeError(f"sample {i} of {len(seqs)}: {why}")
        if cut := [seq.stop_reason for seq in seqs].count("max_model_len"):
            log.warning("%d samples were cut at max_model_len=%d", cut, self.max_model_len)


def cut(prompt: list[int], sample: dict) -> tuple[list[int], list[int], list[float]]:
    """Sequence, mask and log-probabilities of a sample, without its end token."""
    ids = sample["token_ids"]
    mask, entries = sample.get("mask", [1] * len(ids)), sample.get("logprobs", ())
    logprobs = [entry["sampler_logprob"] if entry else 0.0 for entry in entries]
    # a stop string ends a text, too, and is no token
    if sample["finish_reason"] == "stop" and not isinstance(sample["stop_reason"], str):
        ids, mask, logprobs = ids[:-1], mask[:-1], logprobs[:-1]
    return prompt + ids, [0] * len(prompt) + mask, [0.0] * len(prompt) + logprobs


PARTS = {"llm": NanochatLLM}
