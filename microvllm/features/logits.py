"""What a request may ask of its logits: changes before the draw, log-probabilities after it.

What a row's parameters ask for is done to its logits in this order: allowed_token_ids, logit_bias,
bad_words and min_tokens, repetition_penalty, presence_penalty, frequency_penalty, logits_processor;
then what the core does (temperature, top_k, top_p, min_p, the draw). It works on the rows that use
it, and what no row uses does not run.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..engine import LLM, Request, Runner
from ..sampler import SamplingParams, cap_logits, on, truncate
from ..scheduler import Plan, Scheduler, Sequence
from . import check_list, check_number

RANGES = {
    "repetition_penalty": (1e-6, 1e6), "presence_penalty": (-1e6, 1e6),
    "frequency_penalty": (-1e6, 1e6), "min_tokens": (0, 2**31 - 1),
}  # fmt: skip


def check_word(name: str, word: object) -> str | tuple[int, ...]:
    """A text, or a list of ids as a tuple. Raises TypeError for anything else."""
    return word if isinstance(word, str) else check_list(name, word)


@dataclass(frozen=True, kw_only=True)
class LogitsParams(SamplingParams):
    """Sampling parameters that change a row's logits or ask for probabilities."""

    repetition_penalty: float = 1.0  # for prompt and output: logits above 0 / it, others * it
    presence_penalty: float = 0.0  # taken off the logits of tokens that are in the output
    frequency_penalty: float = 0.0  # taken off once for each time that they are in it
    min_tokens: int = 0  # no stop token before so many new ones
    logprobs: int | None = None  # log-probabilities of the token and of so many alternatives
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)  # added to logits
    allowed_token_ids: tuple[int, ...] | None = None  # nothing but these
    # texts, or lists of ids, whose last token must not follow the others. the engine makes them ids
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    # constrained decoding: gets the tokens so far and their (V,) float32 logits, returns logits, in
    # which -inf rules a token out. if it raises, its request ends with that error, no other
    logits_processor: Callable[[list[int], Tensor], Tensor] | None = None
    # worked out here once, since every step asks every row
    edited: bool = field(init=False, repr=False, compare=False)  # are its logits changed?
    needs_history: bool = field(init=False, repr=False, compare=False)  # do earlier tokens matter?
    plain: bool = field(init=False, repr=False, compare=False)  # neither edited, nor logprobs

    def __post_init__(self):
        super().__post_init__()
        for name, limits in RANGES.items():
            self.put(name, check_number(name, getattr(self, name), *limits))
        if self.logprobs is not None:
            self.put("logprobs", check_number("logprobs", self.logprobs, 0, 2**31 - 1))
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        self.put("bad_words", check_list("bad_words", self.bad_words, check_word))
        if not all(self.bad_words):
            raise ValueError(f"bad_words must not be empty, got {self.bad_words!r:.80}")
        if self.allowed_token_ids is not None:
            allowed = check_list("allowed_token_ids", self.allowed_token_ids)
            self.put("allowed_token_ids", allowed)
            if not allowed:
                raise ValueError("allowed_token_ids must not be empty, got (); None allows all")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise TypeError(f"logit_bias must be a dict, got {self.logit_bias!r:.80}")
            ids = check_list("logit_bias", self.logit_bias)
            values = self.logit_bias.values()
            values = [check_number("logit_bias", x, -1e6, 1e6) for x in values]
            self.put("logit_bias", dict(zip(ids, values, strict=True)))
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise TypeError(f"logits_processor must be callable, got {self.logits_processor!r:.80}")

        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        # the last two together may leave no token, which must be known before the next step
        stuck = self.min_tokens and self.allowed_token_ids
        history = penalties or self.bad_words or self.logits_processor or stuck
        self.put("needs_history", bool(history))
        others = self.min_tokens or self.allowed_token_ids or self.logit_bias
        self.put("edited", bool(self.needs_history or others))
        self.put("plain", not self.edited and self.logprobs is None)

    def token_fields(self) -> dict[str, Iterable[int]]:
        words = [word for word in self.bad_words if not isinstance(word, str)]
        return super().token_fields() | {
            "allowed_token_ids": self.allowed_token_ids or (),
            "logit_bias": self.logit_bias or (),
            "bad_words": list(chain.from_iterable(words)),
        }


class History(NamedTuple):
    """What edits may ask of a row's sequence."""

    tokens: Seq[int]  # prompt and output; from `position` on they are not looked at
    num_prompt: int
    position: int  # of the token to be sampled
    stop_ids: Iterable[int] = ()  # that may not come before min_tokens
    errors: list[str] | None = None  # where to put what a logits_processor raises


class Sampled(NamedTuple):
    """Log-probabilities of the rows that asked, on the device."""

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


def sample_special(
    tokens: Tensor, logits: Tensor, params: Seq[LogitsParams], temperature: Tensor,
    uniform: Tensor, softcap: float, history: Seq[History], draw: Callable, size: int | None = None,
) -> Sampled | None:  # fmt: skip
    """Draw again, into tokens (R,), for the rows whose logits are edited, and return the
    log-probabilities of those that asked, if any did.

    logits (R, V), to be capped at +-softcap unless it is 0; temperature, uniform (R,); draw: of
    (logits, params, temperature, uniform), uncapped; size: how many rows are worked on at once, by
    default what a CPU's cache holds, or all. A row for which nothing is left (the only allowed
    token is a bad word, say, or a logits_processor returned NaN) gets -1.
    """
    special = [i for i, p in enumerate(params) if not p.plain]
    asked = [(i, params[i].logprobs) for i in special if params[i].logprobs is not None]
    most = max((k for _, k in asked), default=0)
    # a CPU takes some rows at a time, so that what is made of them stays in its cache
    cpu = logits.device.type == "cpu"
    size = size or (max(1, 2**19 // logits.shape[1]) if cpu else len(params))
    packed = []
    for start in range(0, len(special), size):
        rows = special[start : start + size]
        at = on(logits.device, rows)
        own, theirs = cap_logits(logits[at], softcap), [params[i] for i in rows]
        new, past = tokens[at], [history[i] for i in rows]
        packed += finish(own, theirs, temperature[at], uniform[at], past, new, most, draw)
        tokens[at] = new
    return Sampled(asked, torch.cat(packed)) if asked else None


def finish(logits, params, temperature, uniform, history, tokens, most, draw) -> list[Tensor]:
    """What is left to do for rows (R, V) whose logits are edited or that ask for log-probabilities.

    logits, capped, and tokens are changed in place; most: alternatives of whoever wants most; draw:
    of (logits, params, temperature, uniform). Returns a list of the rows' part of `Sampled.packed`,
    if any.
    """
    asking = [i for i, p in enumerate(params) if p.logprobs is not None]
    if asking:
        ask = on(logits.device, asking)
        model = torch.log_softmax(logits[ask], -1)
    if edited := [i for i, p in enumerate(params) if p.edited]:
        edit(logits, params, history)
        at, theirs = on(logits.device, edited), [params[i] for i in edited]
        own = logits[at]
        drawn = draw(own, theirs, temperature[at], uniform[at]).to(tokens.dtype)
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


def edit(logits: Tensor, params: Seq[SamplingParams], history: Seq[History]) -> None:
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


class LogitsRunner(Runner):
    """Rows that are not plain are drawn again, or looked at once more."""

    def pick(self, plan: Plan, logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
        tokens, params = super().pick(plan, logits, temperature, uniform), plan.params
        if False not in [p.plain for p in params]:
            return tokens
        history = [
            History(s.tokens, s.num_prompt, position, s.stop_ids, s.errors)
            for _, s, position in plan.samples
        ]
        softcap = self.model.recipe.softcap

        def draw(*args) -> Tensor:
            return self.sample(*args, 0.0)

        given = tokens, logits, params, temperature, uniform, softcap, history, draw
        if sampled := sample_special(*given, self.rows_at_once):
            plan.asked, plan.results["logprobs"] = sampled
        return tokens

    def read(self, plan: Plan) -> list[int]:
        token_ids = super().read(plan)
        if "logprobs" in plan.results:
            listed = Sampled(plan.asked, plan.results.pop("logprobs")).logprobs()
            rows = [(*plan.samples[row][1:], entry) for row, entry in listed.items()]
            plan.results["logprobs"] = rows  # (sequence, position, entry)
        return token_ids


class LogitsScheduler(Scheduler):
    """Log-probabilities are kept of the tokens that were appended."""

    def update(self, plan: Plan, token_ids: list[int]) -> list[Sequence]:
        listed = plan.results.get("logprobs", ())
        before = {seq: len(seq.tokens) for seq, _, _ in listed}
        changed = super().update(plan, token_ids)
        for seq, position, entry in listed:
            # else a tool wrote there, or a guess before it was wrong
            if before[seq] <= position < len(seq.tokens):
                seq.entries[seq.sample_id, position] = entry
        return changed


class LogitsLLM(LLM):
    """Requests with edits and log-probabilities."""

    def _add(self, ids, params, *args, **options) -> Request:
        if any(isinstance(word, str) for word in params.bad_words):
            encode = self.tokenizer.encode  # a word has other tokens at the beginning of a text
            words = [(w, " " + w) if isinstance(w, str) else (w,) for w in params.bad_words]
            banned = [w if isinstance(w, tuple) else tuple(encode(w)) for w in chain(*words)]
            params = replace(params, bad_words=tuple(banned))
        return super()._add(ids, params, *args, **options)

    def _make_sequence(self, request: Request) -> Sequence:
        seq = super()._make_sequence(request)
        seq.errors = request.errors
        seq.entries = {}  # of all samples of the request, by (sample, position)
        # a logits_processor would be asked about texts that nobody writes: it may keep books
        if request.params.logits_processor:
            seq.may_guess = False
        return seq

    def sample_output(self, request: Request, seq: Sequence) -> dict:
        found = super().sample_output(request, seq)
        if request.params.logprobs is not None:
            positions = range(seq.num_prompt, len(seq.tokens))
            found["logprobs"] = [seq.entries.get((seq.sample_id, p)) for p in positions]
        return found


PARTS = {
    "llm": LogitsLLM, "runner": LogitsRunner, "scheduler": LogitsScheduler, "params": LogitsParams,
}  # fmt: skip
