"""From logits to tokens: SamplingParams, the noise, and `sample`, each parameter next to its line.

The noise of a row is one number in [0, 1), a function of (seed, sample index, position) and of
nothing else. So a request with a seed gives the same tokens alone, in a full batch, after a
preemption, and as sample i of n. The token is the first whose cumulative probability exceeds the
noise: one number a row is all the randomness there is, made on the host and uploaded with the
batch.

What a row's parameters ask for is done to its logits in this order: allowed_token_ids, logit_bias,
bad_words and min_tokens, repetition_penalty, presence_penalty, frequency_penalty, logits_processor;
then temperature; then top_k, top_p (of what top_k left) and min_p; then the draw. A filter works on
the rows that use it, and one that no row uses does not run (in a CUDA graph: it returns at once).
"""

from __future__ import annotations

import importlib.util
import math
from array import array
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import KW_ONLY, dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .attention import has_triton

# the least and the most that a number may be, which is an integer if they are
RANGES = {
    "temperature": (0.0, 1e38), "top_p": (1e-6, 1.0), "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-6, 1e6), "presence_penalty": (-1e6, 1e6),
    "frequency_penalty": (-1e6, 1e6), "logit_bias": (-1e6, 1e6),
    "max_tokens": (1, 2**31 - 1), "n": (1, 2**31 - 1), "min_tokens": (0, 2**31 - 1),
    "top_k": (0, 2**31 - 1), "logprobs": (0, 2**31 - 1), "seed": (0, 2**64 - 1),
    "sample_index": (0, 2**31 - 1),
}  # fmt: skip


def check_int(name: str, value: object, least: int = 0, most: int = 2**31 - 1) -> int:
    """The value as an int. Raises TypeError or ValueError, naming the argument, unless it is an
    integer in range."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r:.80}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be between {least} and {most}, got {value}")
    return int(value)  # numpy's small integers would overflow when they are added to a length


def check_number(name: str, value: object, least: float, most: float) -> float:
    """The same for a number, as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {value!r:.80}")
    if not least <= value <= most:  # a NaN fails both
        limits = f"finite and between {least:g} and {most:g}"
        raise ValueError(f"{name} must be {limits}, got {value!r:.80}")
    return float(value)


def check_text(name: str, value: object) -> str:
    """The same for a string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be strings, got {value!r:.80}")
    return value


def check_list(name: str, values: object, check: Callable = check_int) -> tuple:
    """The same for a list, by the check of its items, as a tuple."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list, got {values!r:.80}")
    return tuple(check(name, value) for value in values)


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Raises ValueError or TypeError when built with a value that makes
    no sense."""

    temperature: float = 1.0  # 0 is greedy: exact argmax, the lowest id of equals
    max_tokens: int = 256  # new tokens at most
    top_k: int | None = None  # sample among the k largest logits; None or 0 is off
    ignore_eos: bool = False  # do not stop at the tokenizer's end tokens
    _: KW_ONLY
    n: int = 1  # samples of the prompt; the prefill is done once and shared
    top_p: float = 1.0  # sample among the likeliest tokens that together hold this probability
    min_p: float = 0.0  # drop what is less likely than this times the likeliest
    repetition_penalty: float = 1.0  # for prompt and output: logits above 0 / it, others * it
    presence_penalty: float = 0.0  # taken off the logits of tokens that are in the output
    frequency_penalty: float = 0.0  # taken off once for each time that they are in it
    min_tokens: int = 0  # no stop token before so many new ones
    stop: tuple[str, ...] = ()  # strings that end the text and are cut off
    stop_token_ids: tuple[int, ...] = ()  # further tokens that end the text, also with ignore_eos
    seed: int | None = None  # None: the engine draws one
    sample_index: int = 0  # of the first sample: with i it is what sample i of n would have been
    logprobs: int | None = None  # log-probabilities of the token and of so many alternatives
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)  # added to logits
    allowed_token_ids: tuple[int, ...] | None = None  # nothing but these
    # texts, or lists of ids, whose last token must not follow the others. the engine makes them ids
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    # constrained decoding: gets the tokens so far and their (V,) float32 logits, returns logits, in
    # which -inf rules a token out. if it raises, its request ends with that error, no other
    logits_processor: Callable[[list[int], Tensor], Tensor] | None = None
    # worked out here once, since every step asks every row
    plain: bool = field(init=False, repr=False, compare=False)  # not edited, no logprobs
    edited: bool = field(init=False, repr=False, compare=False)  # do logits change before it?
    truncated: bool = field(init=False, repr=False, compare=False)  # are tokens dropped after it?
    needs_history: bool = field(init=False, repr=False, compare=False)  # do earlier tokens matter?

    def __post_init__(self):
        def put(name, value):
            object.__setattr__(self, name, value)

        def check_word(name, word):
            return check_text(name, word) if isinstance(word, str) else check_list(name, word)

        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            optional = value is None and name in ("top_k", "logprobs", "seed")
            if not optional and name != "logit_bias":
                check = check_int if isinstance(least, int) else check_number
                put(name, check(name, value, least, most))
        # below what float32 can divide by it is greedy, for every row and on every device
        put("temperature", self.temperature if self.temperature >= 1e-30 else 0.0)
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        put("stop", check_list("stop", stop, check_text))
        put("stop_token_ids", check_list("stop_token_ids", self.stop_token_ids))
        put("bad_words", check_list("bad_words", self.bad_words, check_word))
        for name in ("stop", "bad_words"):
            if not all(getattr(self, name)):
                raise ValueError(f"{name} must not be empty, got {getattr(self, name)!r:.80}")
        if self.allowed_token_ids is not None:
            put("allowed_token_ids", check_list("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids must not be empty, got (); None allows all")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise TypeError(f"logit_bias must be a dict, got {self.logit_bias!r:.80}")
            ids, limits = check_list("logit_bias", self.logit_bias), RANGES["logit_bias"]
            values = [check_number("logit_bias", x, *limits) for x in self.logit_bias.values()]
            put("logit_bias", dict(zip(ids, values, strict=True)))
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise TypeError(f"logits_processor must be callable, got {self.logits_processor!r:.80}")

        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        # the last two together may leave no token, which must be known before the next step
        stuck = self.min_tokens and self.allowed_token_ids
        put("needs_history", bool(penalties or self.bad_words or self.logits_processor or stuck))
        others = self.min_tokens or self.allowed_token_ids or self.logit_bias
        put("edited", bool(self.needs_history or others))
        truncated = self.top_k or self.top_p < 1 or self.min_p  # the argmax survives all of these
        put("truncated", bool(truncated and self.temperature))
        put("plain", not self.edited and self.logprobs is None)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError, naming the field, if a token id in it does not exist."""
        words = [word for word in self.bad_words if not isinstance(word, str)]
        for name, ids in {
            "stop_token_ids": self.stop_token_ids,
            "allowed_token_ids": self.allowed_token_ids or (),
            "logit_bias": self.logit_bias or (),
            "bad_words": chain.from_iterable(words),
        }.items():
            if bad := [token for token in ids if token >= vocab_size]:
                raise ValueError(f"{name} {bad} are outside the vocabulary of {vocab_size}")


class History(NamedTuple):
    """What filters may ask of a row's sequence."""

    tokens: Seq[int]  # prompt and output; from `position` on they are not looked at
    num_prompt: int
    position: int  # of the token to be sampled
    stop_ids: Iterable[int] = ()  # that may not come before min_tokens
    errors: list[str] | None = None  # where to put what a logits_processor raises


class Sampled(NamedTuple):
    """Tokens and, since some row asked for them, log-probabilities; all of it on the device."""

    tokens: Tensor  # (R,)
    asked: list[tuple[int, int]]  # (row, its number of alternatives) of the n rows that asked
    # (n, 3, m) int32, to be read in one go: token ids, the bits of the model's and of the sampler's
    # log-probabilities; first the token that was drawn, then the m - 1 that the model likes best
    packed: Tensor

    def logprobs(self) -> dict[int, dict]:
        """For each row that asked: token_id; logprob, the model's (softmax of its logits);
        sampler_logprob, that of the draw itself (after all filters and temperature: -inf for what
        could not be drawn, 0 for the argmax at temperature 0); top, the other tokens that the model
        likes best, as (token_id, logprob, sampler_logprob)."""
        listed = {}
        for (row, k), bits in zip(self.asked, self.packed.cpu().numpy(), strict=True):
            ids, (model, sampler) = bits[0].tolist(), bits[1:].view(np.float32).tolist()
            chosen, *others = zip(ids, model, sampler, strict=True)
            listed[row] = dict(zip(("token_id", "logprob", "sampler_logprob"), chosen, strict=True))
            listed[row]["top"] = [other for other in others if other[0] != chosen[0]][:k]
        return listed


def noise(seeds: Seq[int], samples: Seq[int], positions: Seq[int]) -> np.ndarray:
    """(R,) float32 in [0, 1), one per row, from the row's seed, sample index and position alone.

    Each of the three goes through a round of splitmix64 (Steele, Lea and Flood, 2014), so
    neighbouring values share nothing. The top 24 bits are kept: all a float32 below 1 can hold
    evenly.
    """
    x = np.zeros(len(seeds), np.uint64)
    for part in (seeds, samples, positions):
        x = (x ^ np.array(part, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def on(device: torch.device, values) -> Tensor:
    """A list or an array as a tensor on the device, for which the host does not wait."""
    values = torch.as_tensor(values)
    if device.type == "cuda":  # from pinned memory, or torch waits for all that runs there
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def is_plain(params: Seq[SamplingParams]) -> bool:
    """Do temperature, top_k, top_p and min_p alone decide, in all rows?"""
    return False not in [p.plain for p in params]


def filter_values(params: Seq[SamplingParams]) -> list[tuple[int, float, float]] | None:
    """top_k, top_p and min_p of each row, 0, 1 and 0 being off; None if all are."""
    if True in [p.truncated for p in params]:
        return [(p.top_k or 0, p.top_p, p.min_p) for p in params]
    return None


def sample(
    logits: Tensor,
    params: Seq[SamplingParams],
    temperature: Tensor,
    uniform: Tensor,
    softcap: float = 0.0,
    history: Seq[History | None] | None = None,
    size: int | None = None,
) -> Tensor | Sampled:
    """Pick a token for each row.

    logits (R, V), to be capped at +-softcap unless it is 0; temperature, uniform (R,) float32, on
    the device: params[i].temperature and the row's noise; history: one for each row, None for one
    without penalties, bad_words, min_tokens and logits_processor; size: how many rows with edits or
    log-probabilities are worked on at once, by default what a CPU's cache holds, or all. Returns
    (R,) integers, or Sampled if some row asks for log-probabilities. A row for which nothing is
    left (the only allowed token is a bad word, say, or a logits_processor returned NaN) gets -1.
    """
    tokens = pick(logits, params, temperature, uniform, softcap)
    special = [i for i, p in enumerate(params) if p.edited or p.logprobs is not None]
    asked = [(i, params[i].logprobs) for i in special if params[i].logprobs is not None]
    most = max((k for _, k in asked), default=0)
    # a CPU takes some rows at a time, so that what is made of them stays in its cache
    cpu = logits.device.type == "cpu"
    size = size or (max(1, 2**19 // logits.shape[1]) if cpu else len(params))
    scores = []
    for start in range(0, len(special), size):
        rows = special[start : start + size]
        at = on(logits.device, rows)
        own, theirs = cap_logits(logits[at], softcap), [params[i] for i in rows]
        past = [history[i] if history else None for i in rows]
        new = tokens[at]
        scores += finish(own, theirs, temperature[at], uniform[at], past, new, most)
        tokens[at] = new
    return Sampled(tokens, asked, torch.cat(scores)) if asked else tokens


def finish(logits, params, temperature, uniform, history, tokens, most) -> list[Tensor]:
    """The rest of `sample` for rows whose logits are edited or that ask for log-probabilities.

    logits, capped, and tokens are changed in place; most: alternatives of whoever wants most.
    Returns a list of the rows' part of `Sampled.packed`, if any.
    """
    asking = [i for i, p in enumerate(params) if p.logprobs is not None]
    if asking:
        ask = on(logits.device, asking)
        model = torch.log_softmax(logits[ask], -1)
    if edited := [i for i, p in enumerate(params) if p.edited]:
        edit(logits, params, history)
        at, theirs = on(logits.device, edited), [params[i] for i in edited]
        own = logits[at]
        drawn = pick(own, theirs, temperature[at], uniform[at], 0.0).to(tokens.dtype)
        tokens[at] = torch.where(own.amax(-1) > -torch.inf, drawn, -1)
    if not asking:
        return []
    chosen, temperature = tokens[ask, None].long().clamp(min=0), temperature[ask, None]
    # one more than asked for, since the token itself may be among them
    ids = torch.cat([chosen, model.topk(min(most + 1, model.shape[1])).indices], 1)
    scaled = logits[ask].div_(temperature.clamp(min=1e-30))
    sampler = torch.log_softmax(truncate(scaled, [params[i] for i in asking]), -1).gather(1, ids)
    greedy = torch.where(ids == chosen, 0.0, -torch.inf)
    sampler = torch.where(temperature > 0, sampler, greedy)
    bits = [x.view(torch.int32) for x in (model.gather(1, ids), sampler)]
    return [torch.stack([ids.int(), *bits], 1)]


def pick(logits: Tensor, params, temperature: Tensor, uniform: Tensor, softcap: float) -> Tensor:
    """`sample` for what is left when the logits have been edited: (R,) tokens."""
    if has_triton(logits.device):
        from .gpu import kernels as kernels_gpu

        if filters := filter_values(params):
            filters = on(logits.device, np.array(filters, np.float32).T.copy())
        return kernels_gpu.sample(logits, temperature, uniform, softcap, filters)
    if logits.device.type == "cpu" and importlib.util.find_spec("numba"):
        from .cpu import kernels as kernels_cpu

        filters = filter_values(params)
        return kernels_cpu.sample(logits.float(), temperature, uniform, softcap, filters)
    # greedy rows are the argmax of the logits themselves: no cap (which keeps their order, but may
    # make them equal), no division, no noise
    largest = logits.argmax(-1)
    if not any(p.temperature for p in params):
        return largest
    scaled = cap_logits(logits, softcap) / temperature.clamp(min=1e-30)[:, None]
    return torch.where(temperature > 0, draw(truncate(scaled, params), uniform), largest)


def cap_logits(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap) in float32 and in new memory; 0 is no cap.

    tanh(x) is 2 sigmoid(2x) - 1, and torch's sigmoid takes a CPU a fifth of its tanh's time; the
    difference is below 4e-6.
    """
    if not softcap:
        return logits.to(torch.float32, copy=True)
    return torch.sigmoid(logits.float() * (2 / softcap)).mul_(2 * softcap).sub_(softcap)


def edit(logits: Tensor, params: Seq[SamplingParams], history: Seq[History | None]) -> None:
    """Do to the logits, in place, all that comes before temperature."""

    def index(rows, lists):
        """All (row, id) of the lists of ids as an index of logits, and which list each is from."""
        owner = np.repeat(np.arange(len(rows)), [len(ids) for ids in lists])
        ids = np.frombuffer(b"".join([array("q", ids) for ids in lists]), np.int64)
        flat = np.stack([np.array(rows)[owner], ids, owner])
        row, ids, owner = on(logits.device, flat)
        return (row, ids), owner

    def values(rows, name, owner):
        return on(logits.device, [getattr(params[i], name) for i in rows])[owner]

    if rows := [i for i, p in enumerate(params) if p.allowed_token_ids]:
        at, _ = index(rows, [params[i].allowed_token_ids for i in rows])
        allowed = logits[at]
        logits[on(logits.device, rows)] = -torch.inf
        logits[at] = allowed
    if rows := [i for i, p in enumerate(params) if p.logit_bias]:
        at, _ = index(rows, [params[i].logit_bias for i in rows])
        bias = [value for i in rows for value in params[i].logit_bias.values()]
        logits[at] += on(logits.device, bias)
    if rows := [i for i, p in enumerate(params) if p.bad_words or p.min_tokens]:
        at, _ = index(rows, [banned(params[i], history[i]) for i in rows])
        logits[at] = -torch.inf
    if rows := [i for i, p in enumerate(params) if p.repetition_penalty != 1]:
        at, owner = index(rows, [history[i].tokens[: history[i].position] for i in rows])
        old, penalty = logits[at], values(rows, "repetition_penalty", owner)
        # an id that is there often is changed once: all write the same
        logits[at] = torch.where(old > 0, old / penalty, old * penalty)
    if rows := [i for i, p in enumerate(params) if p.presence_penalty or p.frequency_penalty]:
        output = [history[i].tokens[history[i].num_prompt : history[i].position] for i in rows]
        at, owner = index(rows, output)
        logits[at] = logits[at] - values(rows, "presence_penalty", owner)  # once, as above
        # and as often as it is there
        logits.index_put_(at, -values(rows, "frequency_penalty", owner), accumulate=True)
    for i in [i for i, p in enumerate(params) if p.logits_processor]:
        try:
            logits[i] = processed(params[i].logits_processor, history[i], logits[i])
        except Exception as error:  # the caller's code: others in the batch are not to suffer
            if history[i].errors is None:
                raise
            history[i].errors.append(f"logits_processor: {type(error).__name__}: {error}")
            logits[i] = torch.nan  # nothing can be drawn from it


def processed(processor: Callable, history: History, logits: Tensor) -> Tensor:
    """What a logits_processor makes of its row. Raises what it raises, and TypeError for a result
    that is no row of logits."""
    new = processor(list(history.tokens[: history.position]), logits)
    if not isinstance(new, Tensor) or new.shape != logits.shape:
        got = tuple(new.shape) if isinstance(new, Tensor) else repr(new)
        want = tuple(logits.shape)
        raise TypeError(f"logits_processor must return logits of shape {want}, got {got!s:.80}")
    return new


def banned(params: SamplingParams, history: History) -> list[int]:
    """The tokens that bad_words and min_tokens rule out."""
    tokens, position = history.tokens, history.position
    ids = []
    for *start, last in params.bad_words:
        if tokens[position - len(start) : position] == start:  # a longer start is no part of them
            ids.append(last)
    if position - history.num_prompt < params.min_tokens:
        ids.extend(history.stop_ids)
    return ids


def truncate(logits: Tensor, params: Seq[SamplingParams]) -> Tensor:
    """What comes after temperature: -inf for the tokens that top_k, top_p and min_p drop."""
    odd = [i for i, p in enumerate(params) if p.truncated]
    if rows := [i for i in odd if params[i].top_k]:
        at = on(logits.device, rows)
        logits[at] = keep_top_k(logits[at], [params[i].top_k for i in rows])
    if rows := [i for i in odd if params[i].top_p < 1]:
        at = on(logits.device, rows)
        logits[at] = keep_top_p(logits[at], [params[i].top_p for i in rows])
    if rows := [i for i in odd if params[i].min_p]:
        at = on(logits.device, rows)
        logits[at] = keep_min_p(logits[at], [params[i].min_p for i in rows])
    return logits


def keep_top_k(logits: Tensor, top_k: list[int]) -> Tensor:
    """The k largest logits of each row. Ties with the k-th stay."""
    ks = [min(k, logits.shape[1]) for k in top_k]
    kth = on(logits.device, ks)[:, None] - 1
    return logits.masked_fill(logits < logits.topk(max(ks)).values.gather(1, kth), -torch.inf)


def keep_top_p(logits: Tensor, top_p: list[float]) -> Tensor:
    """The tokens for which all likelier ones together hold less than p (Holtzman et al. 2020), of
    what is left. Ties stay."""
    weights = torch.softmax(logits, -1)
    ordered = weights.sort(-1, descending=True).values
    likelier = ordered.cumsum(-1) - ordered
    count = (likelier < on(logits.device, top_p)[:, None]).sum(-1, keepdim=True)
    last = (count - 1).clamp(min=0)  # a row without any token is all NaN, and has no first either
    return logits.masked_fill(weights < ordered.gather(1, last), -torch.inf)


def keep_min_p(logits: Tensor, min_p: list[float]) -> Tensor:
    """The tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024)."""
    below = on(logits.device, [math.log(p) for p in min_p])[:, None]
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + below, -torch.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Invert the CDF in the order of token ids: (R,) the first id with cumulative probability >
    uniform."""
    cdf = torch.softmax(logits, -1).cumsum(-1)
    # the last value is 1 only up to rounding: scale the noise by it, so that a token of probability
    # 0 can not be reached. cdf > target holds first at a token that raised it.
    target = uniform[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)
