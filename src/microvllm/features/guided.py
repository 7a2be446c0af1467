"""Guided text: it fits a JSON schema or a regular expression, or is one of some choices.

A grammar (package llguidance) says which tokens may follow those that are there. All others get the
logit -inf, the end tokens too until the text is complete; where it can only end, it does. What is
drawn among the rest follows the model, with the request's temperature, filters and noise.
"""

import json
import os
import re
import reprlib
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from ..engine import LLM
from ..sampler import SamplingParams, on
from ..tokenizer import Tokenizer
from . import check_list, check_text
from .matching import (
    Helper,
    Reader,
    RemoteReader,
    check,
    llguidance,
    numbers,
    open_grammar,
    panics_named,
)

MOST, KEPT = 2**18, 16  # characters of a guide; guides that stay compiled: rows often have the same
# on one line, as Python writes it: where blanks are free, a small model writes nothing else
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


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
            check_length(text)
            grammar = matcher.grammar_from_json_schema(text, defaults=JSON_STYLE)
        case {"regex": str() as pattern, **rest} if not rest:
            check_length(pattern)
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
    check_length(grammar)
    return grammar


def check_length(text: str) -> None:
    """Raises ValueError for a guide of more than MOST characters."""
    if len(text) > MOST:
        raise ValueError(f"it has {len(text):,} characters, and {MOST:,} are allowed")


@lru_cache(KEPT)
def check_grammar(grammar: str, small: bool) -> None:
    """Raises ValueError saying what is wrong with a grammar; in a helper unless it is small."""
    if small:
        check(grammar)
    else:
        arrivals(os.getpid()).ask(("check", 0, grammar))


@lru_cache(1)
def arrivals(pid: int) -> Helper:
    """This process's helper for guides that arrive, so that steps do not wait for these."""
    return Helper()


# which guides are small ---------------------------------------------------------------------------

SMALL = 1_000  # weight; below it a grammar and each mask take some milliseconds at most
UNKNOWN = float("inf")  # the weight of what is not known to be small

# what an expression is made of; anything else is not known to be small
ATOM = re.compile(
    r"(?P<repeat>[?*+]|\{(?P<low>\d{1,4})(?P<comma>,(?P<high>\d{0,4}))?\})"
    r"|(?P<open>\((?:\?:)?)(?!\?)|(?P<close>\))|(?P<either>\|)"
    r"|(?P<one>\[\^?(?:[^\[\]\\]|\\[^pPxuU])+\]|\\[^pPxuU\dbBAzZ<]|[^\\\[\](){}|?*+])"
)


def regex_weight(pattern: str) -> float:
    """The length of an expression in which each repetition is written out; a class counts for the
    characters that it names, at least 10. UNKNOWN with anything unusual in it."""
    groups, last, place = [0.0], 0.0, 0  # weights of the open groups, and of the last atom
    while place < len(pattern):
        found = ATOM.match(pattern, place)
        if not found:
            return UNKNOWN
        place, kind = found.end(), found.lastgroup
        if found["open"]:
            groups.append(1)
            last = 0
        elif found["close"]:
            if len(groups) == 1:
                return UNKNOWN
            last = groups.pop()
            groups[-1] += last
        elif found["repeat"]:
            times = max(int(found["low"] or 1), int(found["high"] or 1)) + 1
            groups[-1] += last * times
            last *= times + 1
        else:
            last = 1 if found["either"] or len(found[kind]) == 1 else max(10, len(found[kind]))
            groups[-1] += last
        if groups[-1] > SMALL:
            return UNKNOWN
    return groups[0] if len(groups) == 1 else UNKNOWN


NO_WEIGHT = {"title", "description", "$schema", "default", "examples"}  # it does not read them
# where $ref may lead: to no part that was not weighed
WEIGHED = re.compile(r"#(?:/(?:\$defs|definitions|properties)/[^/%~]+)*")
BOUNDS = {
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength",
    "minItems", "maxItems",
}  # fmt: skip


def schema_weight(schema: object) -> float:
    """The length of a JSON schema in which patterns and multipleOf count for what they become.
    UNKNOWN with a keyword that combines schemas, or anything else unusual."""
    if isinstance(schema, bool):
        return 1
    if not isinstance(schema, dict):
        return UNKNOWN
    own = schema.keys() - NO_WEIGHT
    rules = own - {"$defs", "definitions"}
    if rules & {"$ref", "anyOf"} and len(rules) > 1:  # each is combined with what is beside it
        return UNKNOWN
    total = 10.0
    for name in own:
        value = schema[name]
        match name:
            case "type" | "required" | "enum" | "const":
                total += len(json.dumps(value))
            case "$ref" if isinstance(value, str) and WEIGHED.fullmatch(value):
                total += len(value)
            case "format":
                total += 50
            case "pattern" if isinstance(value, str):
                total += regex_weight(value)
            case "multipleOf" if isinstance(value, Real) and not BOUNDS & own:
                total += value if 1 <= value <= 100 and int(value) == value else UNKNOWN
            case "properties" | "$defs" | "definitions" if isinstance(value, dict):
                total += sum(len(key) + schema_weight(part) for key, part in value.items())
            case "items" | "additionalProperties":
                total += schema_weight(value)
            case "prefixItems" | "anyOf" if isinstance(value, list):
                total += sum(map(schema_weight, value))
            case _ if name in BOUNDS and isinstance(value, Real):
                total += len(str(value)) if abs(value) < 1e9 else UNKNOWN
            case _:
                return UNKNOWN
    return total


def is_small(guide: Mapping, grammar: str) -> bool:
    """Is all that llguidance does for a guide known to be cheap? In doubt it is not."""
    if pattern := guide.get("regex"):
        return regex_weight(pattern) <= SMALL
    if guide.get("choices") is not None:
        return len(grammar) <= 10 * SMALL  # nothing in it is repeated
    schema = guide.get("json") or {}
    if isinstance(schema, str):
        schema = json.loads(schema) if len(schema) <= 10 * SMALL else None
    try:
        return schema_weight(schema) <= SMALL
    except RecursionError:
        return False


@dataclass(frozen=True, kw_only=True)
class GuidedParams(SamplingParams):
    """Sampling parameters with a guide."""

    # what the text must be: {"json": a schema, as a dict or a text}, {"regex": an expression of
    # Rust's regex, for all of the text} or {"choices": [texts, ...]}. if max_tokens or a stop
    # string cuts it, it is a beginning of that: give bounds to numbers, strings, repetitions
    guide: Mapping | None = field(default=None, hash=False)
    grammar: str | None = field(init=False, repr=False, compare=False)
    small_guide: bool = field(init=False, repr=False, compare=False)  # else a helper works it out

    def __post_init__(self):
        super().__post_init__()
        self.put("grammar", None)
        self.put("small_guide", True)
        if self.guide is None:
            return
        try:
            with panics_named():
                self.put("grammar", grammar_of(self.guide))
            self.put("small_guide", is_small(self.guide, self.grammar))
            check_grammar(self.grammar, self.small_guide)
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
    """A logits_processor with state, see features/logits.py. read: gives a reader of a new text;
    num_ordinary: tokens before the special ones."""

    may_guess = True

    def __init__(self, read: Callable[[], Reader | RemoteReader], num_ordinary: int):
        self.read, self.num_ordinary = read, num_ordinary

    def begin(self, prompt_ids: list[int]) -> "GuidedSample":
        """For a new sample."""
        return GuidedSample(self.read(), len(prompt_ids), self.num_ordinary)


class GuidedSample:
    """The function of one sample: what does not fit its guide gets the logit -inf."""

    def __init__(self, reader: Reader | RemoteReader, num_prompt: int, num_ordinary: int):
        self.reader, self.num_prompt, self.num_ordinary = reader, num_prompt, num_ordinary

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        """(V,) logits, -inf for what may not follow the tokens. Raises ValueError if the grammar is
        more complex here than the limits allow."""
        output = token_ids[self.num_prompt :]
        num_read, mask = self.reader.allowed(output)
        if num_read < len(output):  # a guess that does not fit, so nothing after it counts
            return logits
        bits = np.frombuffer(mask, np.uint8)
        allowed = np.unpackbits(bits, count=len(logits), bitorder="little").view(bool)
        if not allowed[: self.num_ordinary].any():  # it ends, whatever min_tokens says
            logits = logits.clamp(min=-1e6)
        return logits.masked_fill(on(logits.device, ~allowed), -torch.inf)


class Guides:
    """Makes the Guide of a grammar, for one tokenizer; keeps the last ones."""

    def __init__(self, tokenizer: Tokenizer):
        self.vocabulary, self.num_ordinary = Vocabulary(tokenizer), tokenizer.num_ordinary
        self.ends = sorted(tokenizer.eos_ids)
        self.number, self.steps = next(numbers), Helper()  # of the vocabulary, of steps alone
        self.guide = lru_cache(KEPT)(self.make)
        weakref.finalize(self, arrivals(os.getpid()).dropped.append, self.number).atexit = False

    @cached_property
    def tokenizer(self):
        """llguidance's, for what is small."""
        wrapped = llguidance().TokenizerWrapper(self.vocabulary)
        return llguidance().LLTokenizer(wrapped, eos_token=self.ends)

    def make(self, grammar: str, small: bool) -> Guide:
        """Raises ValueError for a grammar that no text fits, or that is too complex."""
        if small:
            start = open_grammar(self.tokenizer, grammar).start
            return Guide(lambda: Reader(start), self.num_ordinary)
        words, encode = self.vocabulary, self.vocabulary.encode
        tokens = [token.hex() for token in words.tokens]
        about = tokens, words.special_token_ids, words.bos_token_id, self.ends
        vocabulary = "vocabulary", self.number, *about
        opened = "grammar", next(numbers), self.number, grammar
        helper = arrivals(os.getpid())
        try:
            helper.ask(opened, (vocabulary,), encode)
        finally:
            helper.dropped.append(opened[1])
        parts, steps = (vocabulary, opened), self.steps
        guide = Guide(lambda: RemoteReader(steps, opened[1], parts, encode), self.num_ordinary)
        weakref.finalize(guide, steps.dropped.append, opened[1]).atexit = False
        return guide


class GuidedLLM(LLM):
    """An engine that takes a guide."""

    @cached_property
    def _guides(self) -> Guides:
        return Guides(self.tokenizer)

    def _check(self, prompt, params) -> tuple[list[int], SamplingParams]:
        ids, params = super()._check(prompt, params)
        if params.grammar is not None:
            processor = self._guides.guide(params.grammar, params.small_guide)
            params = replace(params, guide=None, logits_processor=processor)
        return ids, params

    def close(self) -> None:
        """As in the core; its helper ends."""
        super().close()
        if "_guides" in vars(self):
            self._guides.steps.stop()
            del self._guides


PARTS = {"llm": GuidedLLM, "params": GuidedParams}
