"""Guided text: it fits a JSON schema or a regular expression, or is one of some choices.

A grammar (package llguidance) says which tokens may follow those that are there. All others get the
logit -inf, the end tokens too until the text is complete; where it can only end, it does. What is
drawn among the rest follows the model, with the request's temperature, filters and noise.
"""

import json
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from ..engine import LLM
from ..environment import how_to_install
from ..sampler import SamplingParams, on
from ..tokenizer import Tokenizer
from . import check_list, check_text

MOST, KEPT = 2**18, 16  # characters of a guide; guides that stay compiled: rows often have the same
# on one line, as Python writes it: where blanks are free, a small model writes nothing else
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def llguidance():
    """The package. Raises ImportError that says what to install."""
    try:
        import llguidance
    except ModuleNotFoundError:
        what = f"guide needs the package llguidance: {how_to_install('guided')}"
        raise ImportError(what) from None
    return llguidance


def grammar_of(guide: object) -> str:
    """What llguidance compiles for a guide. Raises TypeError or ValueError for one of another form,
    ImportError without the package."""
    form = 'it must be a dict: {"json": schema}, {"regex": "..."} or {"choices": ["...", ...]}'
    if not isinstance(guide, Mapping):
        raise TypeError(form)
    given = {kind: value for kind, value in guide.items() if value is not None}
    matcher = llguidance().LLMatcher
    match given:
        case {"json": dict() | str() as schema, **rest} if not rest:
            text = schema if isinstance(schema, str) else json.dumps(schema)
            grammar = matcher.grammar_from_json_schema(text, defaults=JSON_STYLE)
        case {"regex": str() as pattern, **rest} if not rest:
            grammar = matcher.grammar_from_regex(pattern)
        case {"choices": choices, **rest} if not rest:
            choices = check_list("choices", choices, check_text)
            if not choices:
                raise ValueError("choices must not be empty")
            "".join(choices).encode()  # half a surrogate pair has no UTF-8
            texts = " | ".join(map(json.dumps, choices))
            grammar = matcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}")
        case _:
            raise TypeError(form)
    if len(grammar) > MOST:
        raise ValueError(f"it has {len(grammar):,} characters, and {MOST:,} are allowed")
    return grammar


@lru_cache(KEPT)
def check_grammar(grammar: str) -> None:
    """Raises ValueError saying what is wrong with a grammar."""
    failed, told = llguidance().LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        raise ValueError(first_line(told[0]))


def first_line(told: str) -> str:
    """What an error of llguidance says; of a regular expression's, below a drawing of the place."""
    error = re.search(r"^error: (.*)", told, re.M)
    return error[1] if error else told.partition("\n")[0]


@dataclass(frozen=True, kw_only=True)
class GuidedParams(SamplingParams):
    """Sampling parameters with a guide."""

    # what the text must be: {"json": a schema, as a dict or a text}, {"regex": an expression of
    # Rust's regex, for all of the text} or {"choices": [texts, ...]}. if max_tokens or a stop
    # string cuts it, it is a beginning of that: give bounds to numbers, strings, repetitions
    guide: Mapping | None = field(default=None, hash=False)
    grammar: str | None = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        super().__post_init__()
        self.put("grammar", None)
        if self.guide is None:
            return
        try:
            self.put("grammar", grammar_of(self.guide))
            check_grammar(self.grammar)
        except (ValueError, TypeError, RecursionError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"guide {reprlib.repr(self.guide)}: {error}") from None
        if self.ignore_eos:
            raise ValueError("a guided text ends with an end token: leave ignore_eos out")
        if getattr(self, "logits_processor", None) is not None:
            raise ValueError("guide is a logits_processor itself: give one of the two")


class Vocabulary:
    """A Tokenizer as llguidance wants it. Raises ValueError for one that cannot spell any text."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = [*tokenizer.special_tokens.values()]
        self.bos_token_id = self.eos_token_id = tokenizer.bos_id
        self.encode = tokenizer.encode
        ordinary = {*self.tokens[: tokenizer.num_ordinary]}
        if missing := [byte for byte in range(256) if bytes([byte]) not in ordinary]:
            raise ValueError(f"guide needs a token for each byte, and there is none for {missing}")

    def __call__(self, text: str) -> list[int]:
        return self.encode(text)


class Guide:
    """A logits_processor with state, see features/logits.py. tokenizer: llguidance's; num_ordinary:
    tokens before the special ones. Raises ValueError for a grammar that no text fits."""

    may_guess = True

    def __init__(self, tokenizer, num_ordinary: int, grammar: str):
        self.matcher = llguidance().LLMatcher(tokenizer, grammar, log_level=0)
        self.num_ordinary, self.tokenizer = num_ordinary, tokenizer
        GuidedSample(self, 0).next_tokens(tokenizer.vocab_size)

    def begin(self, prompt_ids: list[int]) -> "GuidedSample":
        """For a new sample."""
        return GuidedSample(self, len(prompt_ids))


class GuidedSample:
    """Where in a grammar a sample is."""

    def __init__(self, guide: Guide, num_prompt: int):
        self.guide, self.num_prompt = guide, num_prompt
        self.restart()

    def restart(self) -> None:
        """Be before the first token."""
        self.matcher = self.guide.matcher.deep_copy()
        self.read: list[int] = []  # output that the matcher has

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        """(V,) logits, -inf for what may not follow the tokens. Raises ValueError if the grammar is
        more complex here than llguidance's limits allow."""
        output, kept = token_ids[self.num_prompt :], len(self.read)
        while self.read[:kept] != output[:kept]:  # prompt lookup took a guess back
            kept -= 1
        self.matcher.rollback(len(self.read) - kept)
        self.read = output[: kept + self.matcher.try_consume_tokens(output[kept:])]
        allowed = self.next_tokens(len(logits))
        if len(self.read) < len(output):  # a guess that does not fit, so nothing after it counts
            return logits
        if not allowed[: self.guide.num_ordinary].any():  # it ends, whatever min_tokens says
            logits = logits.clamp(min=-1e6)
        return logits.masked_fill(on(logits.device, ~allowed), -torch.inf)

    def next_tokens(self, vocab_size: int) -> np.ndarray:
        """(V,) bool: what may come next. Raises ValueError if nothing can."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        if error := self.matcher.get_error():
            self.restart()  # the matcher is of no use any more, and this may have been a guess
            if error.startswith("NoExtension"):
                raise ValueError("no text fits the guide")
            raise ValueError(f"the guide is too complex here: {first_line(error)}")
        return np.unpackbits(bits, count=vocab_size, bitorder="little").view(bool)


class GuidedLLM(LLM):
    """An engine that takes a guide."""

    @cached_property
    def _guide(self) -> Callable[[str], Guide]:
        """Gives the Guide of a grammar."""
        wrapped = llguidance().TokenizerWrapper(Vocabulary(self.tokenizer))
        ends = sorted(self.tokenizer.eos_ids)
        tokenizer = llguidance().LLTokenizer(wrapped, eos_token=ends)
        return lru_cache(KEPT)(partial(Guide, tokenizer, self.tokenizer.num_ordinary))

    def _check(self, prompt, params) -> tuple[list[int], SamplingParams]:
        ids, params = super()._check(prompt, params)
        if params.grammar is not None:
            processor = self._guide(params.grammar)
            params = replace(params, guide=None, logits_processor=processor)
        return ids, params


PARTS = {"llm": GuidedLLM, "params": GuidedParams}
