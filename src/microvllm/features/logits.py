"""What a request may ask of its logits: changes before the draw, log-probabilities after it.

A row's logits go through these in turn: allowed_token_ids, logit_bias, bad_words and min_tokens,
repetition_penalty, presence_penalty, frequency_penalty, logits_processor; then what the core does
(temperature, top_k, top_p, min_p, the draw). What no row uses does not run.
"""

import signal
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..engine import LLM, Request, Runner
from ..sampler import SamplingParams, cap_logits, on, truncate
from ..scheduler import Plan, Scheduler, Sequence
from . import check_list, check_number, check_numbers

Samples = list[tuple[int, Sequence, int]]  # some of Plan.samples

MOST_WORDS = 10_000  # of bad_words: a step looks at those that follow its last token

RANGES = {
    "repetition_penalty": (1e-6, 1e6), "presence_penalty": (-1e6, 1e6),
    "frequency_penalty": (-1e6, 1e6), "min_tokens": (0, 2**31 - 1), "logprobs": (0, 2**31 - 1),
}  # fmt: skip


class LogitsProcessor(Protocol):
    """A logits_processor that keeps state: whatever has a method `begin`, also without this class.

    Each sample of a request has a function of its own, which is asked once for each of its tokens,
    in order, with all tokens so far: prompt and output. It is begun with the sample's first token.
    After an exception in a step, and after new weights, another one is begun, and the first tokens
    that it gets have output in them; one that only reads `token_ids` needs no care.
    """

    # does what a function returns follow from token_ids and logits alone? then it is asked about
    # tokens that prompt lookup guesses, too, and maybe without them later
    may_guess: bool = False

    def begin(self, prompt_ids: list[int]) -> Callable[[list[int], Tensor], Tensor]:
        """The function (token_ids, logits) -> logits of one sample, as a plain logits_processor."""
        ...


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
    # which -inf rules a token out, or a mask (V,) of those that may be drawn; or something that
    # begins such a function for each sample. if it raises, its request ends with that error, no
    # other; what a signal's handler raises in it goes to the caller (see `process`)
    logits_processor: Callable[[list[int], Tensor], Tensor] | LogitsProcessor | None = None
    # worked out here once, since every step asks every row
    edited: bool = field(init=False, repr=False, compare=False)  # are its logits changed?
    needs_history: bool = field(init=False, repr=False, compare=False)  # do earlier tokens matter?
    plain: bool = field(init=False, repr=False, compare=False)  # neither edited, nor logprobs

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, RANGES)
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        self.put("bad_words", check_list("bad_words", self.bad_words, check_word))
        if not all(self.bad_words):
            raise ValueError(f"bad_words must not be empty, got {self.bad_words!r:.80}")
        if len(self.bad_words) > MOST_WORDS:
            what = f"got {len(self.bad_words):,}; single tokens may be in logit_bias"
            raise ValueError(f"bad_words may be {MOST_WORDS:,}, {what}")
        if self.allowed_token_ids is not None:
            self.put("allowed_token_ids", check_list("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids must not be empty, got (); None allows all")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise TypeError(f"logit_bias must be a dict, got {self.logit_bias!r:.80}")
            ids = check_list("logit_bias", self.logit_bias)
            values = [check_number("logit_bias", x, -1e6, 1e6) for x in self.logit_bias.values()]
            self.put("logit_bias", dict(zip(ids, values, strict=True)))
        processor = self.logits_processor
        if not (processor is None or callable(getattr(processor, "begin", processor))):
            what = "callable, or have a method begin"
            raise TypeError(f"logits_processor must be {what}, got {processor!r:.80}")
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        # the last two together may leave no token, which must be known before the next step
        stuck = self.min_tokens and self.allowed_token_ids
        history = penalties or self.bad_words or processor is not None or stuck
        others = self.min_tokens or self.allowed_token_ids or self.logit_bias
        self.put("needs_history", bool(history))
        self.put("edited", bool(history or others))
        self.put("plain", not self.edited and self.logprobs is None)

    @cached_property
    def words_after(self) -> dict[int | None, list[tuple[list[int], int]]]:
        """bad_words of ids, (start, last), by the end of the start; those of one id under None."""
        found = {}
        for *start, last in self.bad_words:
            found.setdefault(start[-1] if start else None, []).append((start, last))
        return found

    def token_fields(self) -> dict[str, Iterable[int]]:
        words = [word for word in self.bad_words if not isinstance(word, str)]
        return super().token_fields() | {
            "allowed_token_ids": self.allowed_token_ids or (),
            "logit_bias": self.logit_bias or (), "bad_words": [*chain(*words)],
        }  # fmt: skip


class Sampled(NamedTuple):
    """Log-probabilities of the n rows that asked."""

    asked: list[tuple[int, int]]  # (row, its number of alternatives) of each
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


class LogitsRunner(Runner):
    """Rows that are not plain are drawn again, or looked at once more."""

    def pick(self, plan: Plan, logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
        tokens = super().pick(plan, logits, temperature, uniform)
        if False in [p.plain for p in plan.params]:
            self.pick_again(plan, logits, temperature, uniform, tokens)
        return tokens

    def pick_again(self, plan: Plan, logits, temperature, uniform, tokens: Tensor) -> None:
        """Draw again, into tokens (R,), for the rows whose logits (R, V) are edited, and put the
        log-probabilities of those that asked into the results of the plan. A row for which nothing
        is left (the only allowed token is a bad word, say, or a logits_processor returned NaN) gets
        -1."""
        special = [i for i, p in enumerate(plan.params) if not p.plain]
        most = max([p.logprobs or 0 for p in plan.params])
        # a CPU takes some rows at a time, so that what is made of them stays in its cache
        cached = 2**19 // logits.shape[1] if logits.device.type == "cpu" else len(special)
        size = self.rows_at_once or max(1, cached)
        packed = []
        for start in range(0, len(special), size):
            rows = special[start : start + size]
            at, samples = on(logits.device, rows), [plan.samples[i] for i in rows]
            capped, new = cap_logits(logits[at], self.model.recipe.softcap), tokens[at]
            packed += self.redraw(samples, capped, temperature[at], uniform[at], new, most)
            tokens[at] = new
        if packed:
            plan.results["logprobs"] = torch.cat(packed)

    def redraw(self, samples: Samples, logits, temperature, uniform, tokens, most) -> list[Tensor]:
        """Edit capped logits and draw again, both in place, for these rows of a plan. Returns a
        list of their part of `Sampled.packed`, if any asked; most: alternatives of each."""
        params = [seq.params for _, seq, _ in samples]
        asking = [i for i, p in enumerate(params) if p.logprobs is not None]
        if asking:
            ask = on(logits.device, asking)
            model = torch.log_softmax(logits[ask], -1)
        if edited := [i for i, p in enumerate(params) if p.edited]:
            edit(logits, samples)
            at, changed = on(logits.device, edited), [params[i] for i in edited]
            drawn = self.sample(logits[at], changed, temperature[at], uniform[at], 0.0)
            tokens[at] = drawn.to(tokens.dtype)
        if not asking:
            return []
        chosen, temperature = tokens[ask, None].long().clamp(min=0), temperature[ask, None]
        # one more than asked for, since the token itself may be among them
        ids = torch.cat([chosen, model.topk(min(most + 1, model.shape[1])).indices], 1)
        # less the largest, which is infinite divided by a tiny temperature
        scaled = (logits[ask] - logits[ask].amax(-1, True)).div_(temperature.clamp(min=1e-30))
        drawn = truncate(scaled, [params[i] for i in asking]).log_softmax(-1).gather(1, ids)
        greedy = torch.where(ids == chosen, 0.0, -torch.inf)
        sampler = torch.where(temperature > 0, drawn, greedy)
        bits = [x.view(torch.int32) for x in (model.gather(1, ids), sampler)]
        return [torch.stack([ids.int(), *bits], 1)]

    def read(self, plan: Plan) -> list[int]:
        token_ids = super().read(plan)
        if "logprobs" in plan.results:
            asked = [(i, p.logprobs) for i, p in enumerate(plan.params) if p.logprobs is not None]
            listed = Sampled(asked, plan.results.pop("logprobs")).logprobs()
            rows = [(*plan.samples[row][1:], entry) for row, entry in listed.items()]
            plan.results["logprobs"] = rows  # (sequence, position, entry)
        return token_ids


def edit(logits: Tensor, samples: Samples) -> None:
    """Do to the logits of samples, in place, all that comes before temperature. Never
    logits[index] = number: torch copies the number to a GPU, and the host waits for that."""

    def index(lists: dict[int, Seq[int]]) -> tuple[Tensor, Tensor]:
        """All (row, id) of the lists of ids, each under its row, as an index of logits."""
        rows = np.repeat([*lists], [len(ids) for ids in lists.values()])
        ids = np.frombuffer(b"".join([array("q", ids) for ids in lists.values()]), np.int64)
        row, ids = on(logits.device, np.stack([rows, ids]))
        return row, ids

    def each(name: str, at: tuple[Tensor, Tensor]) -> Tensor:
        """A parameter, for each entry of an index."""
        return on(logits.device, [getattr(p, name) for _, p, _, _ in rows])[at[0]]

    # of each: params, sequence, and the position to be sampled, from which on nothing is looked at
    rows = [(i, seq.params, seq, stop) for i, (_, seq, stop) in enumerate(samples)]
    if lists := {i: p.allowed_token_ids for i, p, _, _ in rows if p.allowed_token_ids}:
        at = index(lists)
        allowed = logits[at]
        logits.index_fill_(0, on(logits.device, [*lists]), -torch.inf)
        logits[at] = allowed
    if lists := {i: p.logit_bias for i, p, _, _ in rows if p.logit_bias}:
        bias = [value for biases in lists.values() for value in biases.values()]
        logits[index(lists)] += on(logits.device, bias)
    if lists := {i: banned(seq, stop) for i, p, seq, stop in rows if p.bad_words or p.min_tokens}:
        logits.index_put_(index(lists), logits.new_full((), -torch.inf))
    if lists := {i: seq.tokens[:stop] for i, p, seq, stop in rows if p.repetition_penalty != 1}:
        at = index(lists)
        old, penalty = logits[at], each("repetition_penalty", at)
        # an id that is there often is changed once: all write the same
        logits[at] = torch.where(old > 0, old / penalty, old * penalty)
    penalised = [row for row in rows if row[1].presence_penalty or row[1].frequency_penalty]
    if lists := {i: seq.tokens[seq.num_prompt : stop] for i, _, seq, stop in penalised}:
        at = index(lists)
        logits[at] = logits[at] - each("presence_penalty", at)  # once, as above
        # and as often as it is there
        logits.index_put_(at, -each("frequency_penalty", at), accumulate=True)
    asking = [(i, seq, stop) for i, p, seq, stop in rows if p.logits_processor is not None]
    if asking:
        with marked_handlers() as raised:
            for i, seq, stop in asking:
                process(seq, stop, logits[i], raised)


def process(seq: Sequence, position: int, logits: Tensor, raised: list[BaseException]) -> None:
    """Let a sample's logits_processor change its row, (V,), in place.

    An Exception in it, whatever callable it is, ends its sample: `stop_reason` says which, and the
    row becomes NaN, so that nothing is drawn. From outside come what a signal's handler raised
    meanwhile (`raised`, see marked_handlers) and what is no Exception, such as SystemExit: they go
    to the caller of the step, and the next step asks the processor again. Where that happens twice
    at one token the sample ends at the next step: otherwise a processor that always exits, or never
    meets the caller's time limit, would hold up all other requests.
    """
    processor, tokens, key = seq.params.logits_processor, seq.tokens[:position], seq.sample_id
    strikes = [error for place, error in seq.strikes if place == (key, position)]
    raised.clear()
    try:
        if len(strikes) > 1:
            error = strikes[-1]
        else:
            if seq.processor is None:
                begin = getattr(processor, "begin", None)
                seq.processor = begin(tokens[: seq.num_prompt]) if begin else processor
            change_row(logits, seq.processor(list(tokens), logits))
            return
    except BaseException as found:
        error = describe(found)
        if raised or not isinstance(found, Exception):
            seq.strikes.append(((key, position), error))
            if not raised or found is raised[-1]:
                raise
            raise raised[-1] from found  # the processor, or what it called, made another one of it
    seq.stop_reason = f"logits_processor: {error}"
    logits.fill_(torch.nan)


def change_row(logits: Tensor, new: object) -> None:
    """Make a row what a logits_processor returned for it: logits, or a mask. Raises TypeError."""
    if not isinstance(new, Tensor) or new.shape != logits.shape:
        got = tuple(new.shape) if isinstance(new, Tensor) else repr(new)
        want = f"logits_processor must return logits of shape {tuple(logits.shape)}"
        raise TypeError(f"{want}, got {got!s:.80}")
    if new.dtype == torch.bool:
        logits.masked_fill_(~new, -torch.inf)
    else:
        logits.copy_(new)


def describe(error: BaseException) -> str:
    """Its type and what it says; a message may raise, too."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


SIGNALS = sorted(signal.valid_signals())


class MarkedHandler:
    """A signal's handler that notes in a list what it raises."""

    def __init__(self, handler: Callable, raised: list[BaseException]):
        self.handler, self.raised = handler, raised

    def __call__(self, number, frame):
        try:
            return self.handler(number, frame)
        except BaseException as error:
            self.raised.append(error)
            raise


@contextmanager
def marked_handlers() -> Iterator[list[BaseException]]:
    """Gives a list to which is added what a signal's handler in Python raises inside: only this
    tells such an exception from one of the code in which it strikes. Python runs handlers in the
    main thread. A handler that is set inside belongs to the code that sets it, and stays."""
    raised: list[BaseException] = []
    marked: dict[int, MarkedHandler] = {}
    try:
        for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
            handler = signal.getsignal(number)
            while isinstance(handler, MarkedHandler):  # an exception left it here
                handler = handler.handler
            if callable(handler):
                marked[number] = MarkedHandler(handler, raised)
                signal.signal(number, marked[number])
        yield raised
    finally:
        for number, mark in marked.items():
            if signal.getsignal(number) is mark:
                signal.signal(number, mark.handler)


def banned(seq: Sequence, position: int) -> list[int]:
    """The tokens that bad_words and min_tokens rule out."""
    words = seq.params.words_after
    ids = [last for _, last in words.get(None, ())]
    for start, last in words.get(seq.tokens[position - 1], ()):
        # a start that is longer than the text is no part of it
        if seq.tokens[position - len(start) : position] == start:
            ids.append(last)
    if position - seq.num_prompt < seq.params.min_tokens:
        ids.extend(seq.stop_ids)
    return ids


class LogitsScheduler(Scheduler):
    """Log-probabilities are kept of the tokens that were appended."""

    def update(self, plan: Plan, token_ids: list[int]) -> list[Sequence]:
        listed = plan.results.get("logprobs", ())
        new = [row for row in listed if row[1] >= len(row[0].tokens)]  # else a tool wrote there
        for seq, position, entry in new:  # first, for the token alone tells that a step was done
            seq.entries[seq.sample_id, position] = entry
        changed = super().update(plan, token_ids)
        for seq, position, _ in new:
            if position >= len(seq.tokens):  # a guess before it was wrong
                del seq.entries[seq.sample_id, position]
        return changed

    def reset(self, sequences=None) -> list[Sequence]:
        found = super().reset(sequences)
        for seq in found:
            seq.processor = None  # it may have seen a token that was never appended
            for sample_id, position in [*getattr(seq, "entries", ())]:
                if sample_id == seq.sample_id and position >= len(seq.tokens):
                    del seq.entries[sample_id, position]
        return found


class LogitsLLM(LLM):
    """Requests with edits and log-probabilities."""

    def _request(self, ids, params, *args, **options) -> Request:
        if any(isinstance(word, str) for word in params.bad_words):
            encode = self.tokenizer.encode  # a word has other tokens at the beginning of a text
            words = [(w, " " + w) if isinstance(w, str) else (w,) for w in params.bad_words]
            banned = [w if isinstance(w, tuple) else tuple(encode(w)) for w in chain(*words)]
            params = replace(params, bad_words=tuple(banned))
        return super()._request(ids, params, *args, **options)

    def _make_sequence(self, request: Request) -> Sequence:
        seq = super()._make_sequence(request)
        seq.entries = {}  # of all samples of the request, by (sample, position)
        seq.processor = None  # the logits_processor of this sample, once it has begun
        # exceptions from outside in logits_processors of the request: ((sample, position), text)
        seq.strikes = []
        if request.params.logits_processor is not None:
            # it may keep books, and would see what nobody writes
            seq.may_guess = getattr(request.params.logits_processor, "may_guess", False)
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
