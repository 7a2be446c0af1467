"""Guided text: it matches a JSON schema or a regular expression, or is one of several choices.

A grammar (package llguidance) determines the tokens that may follow. All other tokens get the logit
-inf, and so do end tokens until the text is complete. Generation stops when nothing may follow. The
remaining tokens are drawn with the request's own temperature, filters and random numbers.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..runner import Extension
from ..sampler import to_device
from ..tokenizer import Tokenizer
from . import check_list, check_text
from .logits_processor import LogitsProcessor
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

if TYPE_CHECKING:
    from ..params import SamplingParams

MAX_LENGTH = 2**18  # characters of a guide
NUM_KEPT = 16  # compiled guides to keep, since many requests have the same guide
# one line, in Python's style: if whitespace is free, a small model may write nothing else
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def compile_guide(guide: object) -> tuple[str, bool]:
    """Return the grammar of a guide, and whether the guide is small. Raises TypeError or ValueError
    with the guide and the problem, ImportError without the package llguidance."""
    try:
        with panics_named():
            grammar = grammar_of(guide)
        has_small_guide = is_small(guide, grammar)
        check_grammar(grammar, has_small_guide)
    except (ValueError, TypeError, RecursionError) as error:
        error_type = TypeError if isinstance(error, TypeError) else ValueError
        raise error_type(f"guide {reprlib.repr(guide)}: {error}") from None
    return grammar, has_small_guide


def grammar_of(guide: object) -> str:
    """Return the grammar that llguidance compiles for a guide. Raises TypeError or ValueError for
    an invalid form, ImportError without the package."""
    form = 'it must be a dict: {"json": schema}, {"regex": "..."} or {"choices": ["...", ...]}'
    if not isinstance(guide, Mapping):
        raise TypeError(form)
    matcher = llguidance().LLMatcher
    match {kind: value for kind, value in guide.items() if value is not None}:
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
            "".join(choices).encode()  # raises for half of a surrogate pair, which has no UTF-8
            texts = " | ".join(map(json.dumps, choices))
            grammar = matcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}")
        case _:
            raise TypeError(form)
    check_length(grammar)
    return grammar


def check_length(text: str) -> None:
    """Raise ValueError for a guide of more than MAX_LENGTH characters."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"it has {len(text):,} characters, but {MAX_LENGTH:,} are allowed")


@lru_cache(NUM_KEPT)
def check_grammar(grammar: str, is_small: bool) -> None:
    """Raise ValueError with the problem of a grammar, if it has one. A helper process does the
    check unless the guide is small."""
    if is_small:
        check(grammar)
    else:
        helper_for_requests(os.getpid()).ask(("check", 0, grammar))


@lru_cache(1)
def helper_for_requests(pid: int) -> Helper:
    """Return this process's helper for guides of new requests. Engines have other helpers for their
    steps, so that steps do not wait for new requests."""
    return Helper()


# small guides -------------------------------------------------------------------------------------

SMALL = 1_000  # weight up to which a grammar and each mask take some milliseconds at most
UNKNOWN = float("inf")  # the weight of guides that may not be small

# supported elements of an expression; with others, its weight is UNKNOWN
ATOM = re.compile(
    r"(?P<repeat>[?*+]|\{(?P<low>\d{1,4})(?P<comma>,(?P<high>\d{0,4}))?\})"
    r"|(?P<open>\((?:\?:)?)(?!\?)|(?P<close>\))|(?P<either>\|)"
    r"|(?P<one>\[\^?(?:[^\[\]\\]|\\[^pPxuU])+\]|\\[^pPxuU\dbBAzZ<]|[^\\\[\](){}|?*+])"
)


def regex_weight(pattern: str) -> float:
    """Return the length of an expression with all repetitions written out. A character class counts
    by the characters in its text, at least 10. Returns UNKNOWN if it has unusual elements."""
    groups = [0.0]  # weights of the open groups
    last = 0.0  # weight of the last atom
    position = 0
    while position < len(pattern):
        atom = ATOM.match(pattern, position)
        if atom is None:
            return UNKNOWN
        position = atom.end()
        if atom["open"]:
            groups.append(1)
            last = 0
        elif atom["close"]:
            if len(groups) == 1:
                return UNKNOWN
            last = groups.pop()
            groups[-1] += last
        elif atom["repeat"]:
            times = max(int(atom["low"] or 1), int(atom["high"] or 1)) + 1
            groups[-1] += last * times
            last *= times + 1
        else:
            length = len(atom[0])
            last = 1 if length == 1 else max(10, length)
            groups[-1] += last
        if groups[-1] > SMALL:
            return UNKNOWN
    return groups[0] if len(groups) == 1 else UNKNOWN


NO_WEIGHT = {"title", "description", "$schema", "default", "examples"}  # llguidance ignores these
# valid targets of $ref: parts of the schema that are weighed
WEIGHED = re.compile(r"#(?:/(?:\$defs|definitions|properties)/[^/%~]+)*")
BOUNDS = {
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
}


def schema_weight(schema: object) -> float:
    """Return the length of a JSON schema, in which patterns and multipleOf count with the size of
    their expansion. Returns UNKNOWN with keywords that combine schemas, or with unusual ones."""
    if isinstance(schema, bool):
        return 1
    if not isinstance(schema, dict):
        return UNKNOWN
    keywords = schema.keys() - NO_WEIGHT
    rules = keywords - {"$defs", "definitions"}
    if rules & {"$ref", "anyOf"} and len(rules) > 1:  # these combine with all other keywords
        return UNKNOWN
    has_bounds = bool(keywords & BOUNDS)
    return 10.0 + sum([keyword_weight(name, schema[name], has_bounds) for name in keywords])


def keyword_weight(name: str, value: object, has_bounds: bool) -> float:
    """Return the weight of one keyword of a schema. has_bounds: the schema has one of BOUNDS."""
    match name:
        case "type" | "required" | "enum" | "const":
            return len(json.dumps(value))
        case "$ref" if isinstance(value, str) and WEIGHED.fullmatch(value):
            return len(value)
        case "format":
            return 50
        case "pattern" if isinstance(value, str):
            return regex_weight(value)
        case "multipleOf" if isinstance(value, Real) and not has_bounds:
            is_small = 1 <= value <= 100 and int(value) == value
            return float(value) if is_small else UNKNOWN
        case "properties" | "$defs" | "definitions" if isinstance(value, dict):
            return sum([len(key) + schema_weight(part) for key, part in value.items()])
        case "items" | "additionalProperties":
            return schema_weight(value)
        case "prefixItems" | "anyOf" if isinstance(value, list):
            return sum([schema_weight(part) for part in value])
        case _ if name in BOUNDS and isinstance(value, Real):
            return len(str(value)) if abs(value) < 1e9 else UNKNOWN
        case _:
            return UNKNOWN


def is_small(guide: Mapping, grammar: str) -> bool:
    """Return whether all work of llguidance for a guide is known to be cheap."""
    pattern = guide.get("regex")
    if pattern:
        return regex_weight(pattern) <= SMALL
    if guide.get("choices") is not None:
        return len(grammar) <= 10 * SMALL  # choices have no repetitions
    schema = guide.get("json") or {}
    if isinstance(schema, str):
        schema = json.loads(schema) if len(schema) <= 10 * SMALL else None
    try:
        return schema_weight(schema) <= SMALL
    except RecursionError:
        return False


# masks of tokens ----------------------------------------------------------------------------------


class Vocabulary:
    """A Tokenizer in llguidance's form. Raises ValueError if the tokens cannot spell every text."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = list(tokenizer.special_tokens.values())
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_id = tokenizer.bos_id
        self.encode = tokenizer.encode
        ordinary = set(self.tokens[: tokenizer.num_ordinary])
        missing = [byte for byte in range(256) if bytes([byte]) not in ordinary]
        if missing:
            raise ValueError(f"guide needs a token for each byte, but there is none for {missing}")

    def __call__(self, text: str) -> list[int]:
        return self.encode(text)


class Guide(LogitsProcessor):
    """The logits_processor of a grammar.

    open_reader: makes a reader for a new text; num_ordinary: tokens before the special ones.
    """

    may_guess = True

    def __init__(self, open_reader: Callable[[], Reader | RemoteReader], num_ordinary: int):
        self.open_reader = open_reader
        self.num_ordinary = num_ordinary

    def begin(self, prompt_ids: list[int]) -> GuidedSample:
        """Return the function of a new sample."""
        return GuidedSample(self.open_reader(), len(prompt_ids), self.num_ordinary)


class GuidedSample:
    """The function of one sample. Tokens that do not match its guide get the logit -inf."""

    def __init__(self, reader: Reader | RemoteReader, num_prompt: int, num_ordinary: int):
        self.reader = reader
        self.num_prompt = num_prompt
        self.num_ordinary = num_ordinary

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        """Return logits (V,), with -inf for tokens that may not follow. Raises ValueError if the
        grammar exceeds the limits at this point of the text."""
        output = token_ids[self.num_prompt :]
        num_read, mask = self.reader.allowed(output)
        if num_read < len(output):  # a draft token does not match: later draws do not count
            return logits
        bits = np.frombuffer(mask, np.uint8)
        is_allowed = np.unpackbits(bits, count=len(logits), bitorder="little").view(bool)
        if not is_allowed[: self.num_ordinary].any():  # the text ends, even before min_tokens
            logits = logits.clamp(min=-1e6)
        return logits.masked_fill(to_device(~is_allowed, logits.device), -torch.inf)


class Guides:
    """Makes the Guides of grammars for one tokenizer, and keeps the latest ones."""

    def __init__(self, tokenizer: Tokenizer):
        self.vocabulary = Vocabulary(tokenizer)
        self.num_ordinary = tokenizer.num_ordinary
        self.eos_ids = sorted(tokenizer.eos_ids)
        self.number = next(numbers)  # identifies the vocabulary in helpers
        self.helper = Helper()  # only for steps
        self.guide = lru_cache(NUM_KEPT)(self.make)
        forget = helper_for_requests(os.getpid()).dropped.append
        weakref.finalize(self, forget, self.number).atexit = False

    @cached_property
    def tokenizer(self):
        """llguidance's tokenizer, for small guides."""
        wrapper = llguidance().TokenizerWrapper(self.vocabulary)
        return llguidance().LLTokenizer(wrapper, eos_token=self.eos_ids)

    def make(self, grammar: str, is_small: bool) -> Guide:
        """Make a Guide. Raises ValueError if no text matches the grammar or it is too complex."""
        if is_small:
            start = open_grammar(self.tokenizer, grammar).start
            return Guide(lambda: Reader(start), self.num_ordinary)
        return self.make_remote(grammar)

    def make_remote(self, grammar: str) -> Guide:
        """Make a Guide whose grammar runs in a helper process."""
        vocabulary = self.vocabulary_message()
        number = next(numbers)
        opening = ("grammar", number, self.number, grammar)
        encode = self.vocabulary.encode
        checker = helper_for_requests(os.getpid())
        try:
            checker.ask(opening, (vocabulary,), encode)
        finally:
            checker.dropped.append(number)
        helper = self.helper
        parts = (vocabulary, opening)
        guide = Guide(lambda: RemoteReader(helper, number, parts, encode), self.num_ordinary)
        weakref.finalize(guide, helper.dropped.append, number).atexit = False
        return guide

    def vocabulary_message(self) -> tuple:
        """Return the message that sends the vocabulary to a helper."""
        vocabulary = self.vocabulary
        tokens = [token.hex() for token in vocabulary.tokens]
        special = vocabulary.special_token_ids
        return ("vocabulary", self.number, tokens, special, vocabulary.bos_token_id, self.eos_ids)


class GuidedText(Extension):
    """Replaces guides by logits_processors. Stops its helper process when the engine closes."""

    guides: Guides | None = None  # created for the first guide

    def prepare(self, params: SamplingParams) -> SamplingParams:
        """Return the parameters with the logits_processor of their guide. Raises ValueError for a
        guide that no text matches, or that is too complex. Called before any request is queued."""
        if params.grammar is None:
            return params
        if self.guides is None:
            self.guides = Guides(self.engine.tokenizer)
        processor = self.guides.guide(params.grammar, params.has_small_guide)
        return replace(params, guide=None, logits_processor=processor)

    def on_close(self) -> None:
        if self.guides is not None:
            self.guides.helper.stop()
            self.guides = None
