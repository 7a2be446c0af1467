"""nanochat's Engine methods, under nanochat's names and as tolerant as nanochat.

The functions are methods of LLM, which passes itself as `engine`. Their arguments:

num_samples: more than max_batch_size are run one batch after the other; max_tokens: may be 0; None:
until the model ends the text, or the training context (sequence_len) is full; seed: any integer, of
which the low 64 bits are used; params: fields of SamplingParams; top_k: None, 0 and less disable
it; tools: default: the calculator. They raise TypeError or ValueError for invalid values, and
RuntimeError if a sample fails.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import NamedTuple

import numpy as np

from ..engine import LLM, Request, naming
from ..params import SamplingParams
from ..scheduler import Sequence
from . import check_number

log = logging.getLogger("microvllm")

Column = tuple[list[int], list[int]]  # the next token of each sample, and its mask


class PromptRequests(NamedTuple):
    """A prompt and the requests for its samples: at most max_batch_size per request, and no request
    for max_tokens=0."""

    prompt_ids: list[int]
    requests: list[Request]


class SampleRow(NamedTuple):
    """A sample in the form of generate_batch, without its end token: four lists of equal length."""

    token_ids: list[int]  # prompt and output
    mask: list[int]  # 0 for the prompt and for forced tokens
    logprobs: list[float]
    versions: list[int]  # versions of the weights; -1 for the prompt


def generate_columns(
    engine: LLM, tokens, num_samples=1, max_tokens=None, seed=42, **params
) -> Iterator[Column]:
    """Like nanochat's Engine.generate for a prompt's token ids: yield (column, masks), with one
    value per sample, as soon as every sample has one more token. A mask is 0 for forced tokens of
    the calculator. A finished sample continues with <|assistant_end|> and mask 0 while others run;
    in nanochat it continues past its end."""
    ((_, requests),) = make_requests(engine, [tokens], num_samples, max_tokens, seed, params)
    reader = ColumnReader(engine, requests, num_samples)
    for _ in engine.serve(requests):
        yield from reader.read()
    check_endings(engine, requests)


async def agenerate_columns(
    engine: LLM, tokens, num_samples=1, max_tokens=None, seed=42, **params
) -> AsyncIterator[Column]:
    """`generate_columns` for event loops, see features/async_api.py."""
    arguments = ([tokens], num_samples, max_tokens, seed, params)
    ((_, requests),) = await asyncio.to_thread(make_requests, engine, *arguments)
    reader = ColumnReader(engine, requests, num_samples)
    with engine.serve_async(requests, reader.read) as call:
        async for column in call:
            yield column
    check_endings(engine, requests)


def generate_batch(
    engine: LLM,
    tokens,
    num_samples=1,
    max_tokens=None,
    seed=42,
    logprobs=False,
    versions=False,
    **params,
):
    """Like nanochat's Engine.generate_batch: return (sequences, masks) for a prompt's token ids.

    A sequence is prompt plus output without the end token. Its mask is 0 for the prompt and for
    tokens that the calculator forced. A list of prompts gives (list of sequences, list of masks)
    with one list of num_samples each; prompt i is drawn with seed + i. logprobs: return a third
    list, in the form of the masks, with the log-probability of each token in the distribution that
    it was drawn from, after temperature and filters: 0.0 at temperature 0, and where the mask is 0.
    versions: return another list, the last one, with the version of the weights that drew each
    token, and -1 in the prompt.
    """
    if isinstance(tokens, (int, np.integer)):  # a list of one would be a prompt
        raise TypeError(f"tokens must be a list of token ids, got {type(tokens).__name__}")
    is_list = isinstance(tokens, (list, tuple)) and len(tokens) > 0
    has_several = is_list and not isinstance(tokens[0], (int, np.integer))
    prompts = tokens if has_several else [tokens]
    if logprobs:
        params["logprobs"] = 0
    groups = make_requests(engine, prompts, num_samples, max_tokens, seed, params)
    requests = [request for group in groups for request in group.requests]
    for _ in engine.serve(requests):
        pass
    check_endings(engine, requests)
    rows_of_prompts = [make_rows(group, num_samples) for group in groups]
    results = []
    is_wanted = SampleRow(token_ids=True, mask=True, logprobs=logprobs, versions=versions)
    for column in [index for index, wanted in enumerate(is_wanted) if wanted]:
        lists = [[row[column] for row in rows] for rows in rows_of_prompts]
        results.append(lists if has_several else lists[0])
    return tuple(results)


# requests


def make_requests(
    engine: LLM, prompts, num_samples, max_tokens, seed, params: dict
) -> list[PromptRequests]:
    """Check all arguments, then make the requests for each prompt."""
    num_samples = check_number("num_samples", num_samples)
    params = dict(params)
    options = {"tools": params.pop("tools", True)}  # default: the calculator
    if not isinstance(seed, Integral):
        raise TypeError(f"seed must be an integer, got {seed!r:.80}")
    common_params = make_params(engine, max_tokens, params)
    checked = []
    for i, prompt in enumerate(prompts):
        prompt_params = replace(common_params, seed=(int(seed) + i) % 2**64)
        with naming(f"prompts[{i}]"):
            if max_tokens is None:
                prompt_params = fill_context(engine, prompt, prompt_params)
            checked.append(engine.check(prompt, prompt_params))
    num_wanted = 0 if max_tokens == 0 else num_samples
    return [
        PromptRequests(
            prompt_ids, make_turns(engine, prompt_ids, prompt_params, num_wanted, options)
        )
        for prompt_ids, prompt_params in checked
    ]


def make_params(engine: LLM, max_tokens: int | None, params: dict) -> SamplingParams:
    """Return the parameters of one sample of any prompt. max_tokens: None gives the whole context,
    0 gives 1, since there will be no request."""
    limit = engine.model.config.sequence_len if max_tokens is None else max_tokens or 1
    top_k = params.get("top_k")
    if isinstance(top_k, Integral):
        top_k = min(top_k, engine.tokenizer.vocab_size) if top_k > 0 else None
    return engine.params_class(**{**params, "n": 1, "max_tokens": limit, "top_k": top_k})


def fill_context(engine: LLM, prompt, params: SamplingParams) -> SamplingParams:
    """Return params with max_tokens reduced by the length of the prompt."""
    prompt_ids, _ = engine.check(prompt, engine.params_class(max_tokens=1))
    context = params.max_tokens
    if len(prompt_ids) >= context:
        problem = f"the prompt has {len(prompt_ids)} tokens, but the context has {context}"
        raise ValueError(f"{problem}: give max_tokens, since None fills the context")
    return replace(params, max_tokens=context - len(prompt_ids))


def make_turns(
    engine: LLM, prompt_ids: list[int], params: SamplingParams, num_samples: int, options: dict
) -> list[Request]:
    """Make requests for a prompt's samples, at most max_batch_size each. options: for all
    requests."""
    requests = []
    for first in range(0, num_samples, engine.max_batch_size):
        turn_params = replace(
            params,
            n=min(engine.max_batch_size, num_samples - first),
            sample_index=params.sample_index + first,
        )
        requests.append(
            engine.make_request(prompt_ids, turn_params, is_owned=True, options=options)
        )
    return requests


# results


class ColumnReader:
    """Reads the tokens of all samples column by column."""

    def __init__(self, engine: LLM, requests: list[Request], num_samples: int):
        self.engine = engine
        self.requests = requests
        self.num_samples = num_samples
        self.num_read = 0  # number of columns so far
        special_tokens = engine.tokenizer.special_tokens
        self.end_id = special_tokens.get("<|assistant_end|>", engine.tokenizer.bos_id)

    def read(self) -> list[Column]:
        """Return the columns that were completed since the last call."""
        columns: list[Column] = []
        # performed as a change of state, so that no other thread adds tokens in the meantime
        self.engine.guard.perform(partial(self.append_new, columns))
        self.num_read += len(columns)
        return columns

    def append_new(self, columns: list[Column]) -> None:
        sequences = [seq for request in self.requests for seq in request.sequences]
        if len(sequences) < self.num_samples:  # some are not forked yet
            return
        lengths = [len(seq.token_ids) - seq.num_prompt for seq in sequences]
        unfinished = [
            length
            for seq, length in zip(sequences, lengths, strict=True)
            if seq.finish_reason is None
        ]
        num_complete = min(unfinished, default=max(lengths))
        for index in range(self.num_read, num_complete):
            columns.append(self.column_at(index, sequences))

    def column_at(self, index: int, sequences: list[Sequence]) -> Column:
        """Return the output token at an index of each sample, and its mask."""
        token_ids = []
        mask = []
        for seq in sequences:
            position = seq.num_prompt + index
            has_ended = position >= len(seq.token_ids)
            token_ids.append(self.end_id if has_ended else seq.token_ids[position])
            mask.append(int(not has_ended and position not in seq.forced))
        return token_ids, mask


def check_endings(engine: LLM, requests: list[Request]) -> None:
    """Raise RuntimeError if a sample failed. Warn if some were cut short."""
    sequences = [seq for request in requests for seq in request.sequences]
    for i, seq in enumerate(sequences):
        if seq.finish_reason not in ("stop", "length"):
            reason = seq.stop_reason or "it was aborted"
            raise RuntimeError(f"sample {i} of {len(sequences)}: {reason}")
    num_cut = [seq.stop_reason for seq in sequences].count("max_model_len")
    if num_cut > 0:
        limit = engine.max_model_len
        log.warning("%d samples were cut at max_model_len=%d", num_cut, limit)


def make_rows(group: PromptRequests, num_samples: int) -> list[SampleRow]:
    """Return the samples of a prompt."""
    if not group.requests:  # max_tokens=0, or no samples
        empty = {"token_ids": [], "mask": [], "finish_reason": "length"}
        return [make_row(group.prompt_ids, empty) for _ in range(num_samples)]
    samples = [sample for request in group.requests for sample in request.output["samples"]]
    return [make_row(group.prompt_ids, sample) for sample in samples]


def make_row(prompt_ids: list[int], sample: dict) -> SampleRow:
    token_ids = sample["token_ids"]
    mask = sample["mask"]
    entries = sample.get("logprobs", ())
    logprobs = [0.0 if entry is None else entry["sampler_logprob"] for entry in entries]
    versions = sample.get("versions", [])
    # a stop string also ends a text, but is not a token
    if sample["finish_reason"] == "stop" and not isinstance(sample["stop_reason"], str):
        token_ids = token_ids[:-1]
        mask = mask[:-1]
        logprobs = logprobs[:-1]
        versions = versions[:-1]
    return SampleRow(
        token_ids=prompt_ids + token_ids,
        mask=[0] * len(prompt_ids) + mask,
        logprobs=[0.0] * len(prompt_ids) + logprobs,
        versions=[-1] * len(prompt_ids) + versions,
    )
