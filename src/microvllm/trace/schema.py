"""The fields of the events of a trace, and their types.

A trace may come from a file that a stranger made. Each event is compared with this table before its
use, so other code can rely on the types. docs/TRACE.md describes the fields.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

MAX_COUNT = 2**53  # smaller numbers are exact in a browser, too
MAX_POOL = 2**24  # blocks
MAX_GROUPS = 256  # groups of layers
MAX_SECONDS = 1e12


class Kind(NamedTuple):
    """A type of a field: its description, and a function that checks a value."""

    words: str
    fits: Callable[[object], bool]


def is_count(x: object) -> bool:
    """Is it a whole number? True is not, although it equals 1."""
    return type(x) is int and 0 <= x < MAX_COUNT


def are_counts(x: object) -> bool:
    return type(x) is list and not {*map(type, x)} - {int} and in_range(x, 0, MAX_COUNT)


def in_range(numbers: list, least: int, end: int) -> bool:
    return not numbers or (least <= min(numbers) and max(numbers) < end)


def is_time(x: object) -> bool:
    return type(x) in (int, float) and 0 <= x < MAX_SECONDS


def are_spans(x: object) -> bool:
    """Are they numbers in the format of `spans`?"""
    return type(x) is str and all(
        re.fullmatch(r"[0-9]{1,15}(-[0-9]{1,15})?", part) for part in x.split()
    )


def are_chunks(x: object) -> bool:
    if type(x) is not list or not all(are_counts(chunk) and len(chunk) == 3 for chunk in x):
        return False
    return all(start < stop for _, start, stop in x)


def are_named(x: object) -> bool:
    """Is it a dict from numbers, which are strings in JSON, to texts?"""
    if type(x) is not dict or not all(type(text) is str for text in x.values()):
        return False
    return all(re.fullmatch("[0-9]{1,15}", str(key)) for key in x)


def are_times(x: object) -> bool:
    if type(x) is not dict or not all(type(name) is str for name in x):
        return False
    return all(map(is_time, x.values()))


COUNT = Kind("a whole number, 0 or more", is_count)
COUNTS = Kind("a list of whole numbers, 0 or more", are_counts)
SIZE = Kind("a whole number from 1 on", lambda x: is_count(x) and x > 0)
POOL = Kind(f"from 1 to {MAX_POOL:,} blocks", lambda x: is_count(x) and 0 < x <= MAX_POOL)
WINDOWS = Kind(
    f"a list of 1 to {MAX_GROUPS} windows, -1 or more",
    lambda x: (
        type(x) is list
        and {*map(type, x)} == {int}
        and len(x) <= MAX_GROUPS
        and in_range(x, -1, MAX_COUNT)
    ),
)
FLAG = Kind("true or false", lambda x: type(x) is bool)
TEXT = Kind("a text", lambda x: type(x) is str)
TIME = Kind("a number, 0 or more", is_time)
TIMES = Kind("an object of numbers, 0 or more", are_times)
SPANS = Kind('numbers such as "0-3 7"', are_spans)
CHUNKS = Kind("a list of [sequence, start, stop], start before stop", are_chunks)
NAMED = Kind("an object of numbers and their texts", are_named)

# fields of every event; for each kind, its required and its optional fields
ANY = {"e": TEXT, "t": TIME}
FIELDS: dict[str, tuple[dict[str, Kind], dict[str, Kind]]] = {
    "pool": (
        {"version": COUNT, "blocks": POOL, "block_size": SIZE, "hashes": NAMED, "cached": COUNTS},
        {
            "caching": FLAG, "max_batch_size": COUNT, "max_batched_tokens": COUNT,
            "windows": WINDOWS, "model": TEXT, "device": TEXT,
        },
    ),
    "text": ({"ids": NAMED}, {}),
    "arrive": (
        {"seq": COUNT, "request": COUNT, "sample": COUNT, "tokens": COUNTS, "prompt": COUNT},
        {"samples": COUNT, "limit": COUNT, "score": COUNT},
    ),
    "resume": ({"seq": COUNT, "table": COUNTS, "computed": COUNT}, {}),
    "admit": ({"seq": COUNT, "computed": COUNT}, {}),
    "hit": ({"seq": COUNT, "blocks": COUNTS}, {}),
    "miss": ({"seq": COUNT, "count": COUNT}, {}),
    "evict": ({"block": COUNT}, {}),
    "allocate": ({"seq": COUNT, "blocks": COUNTS}, {}),
    "copy": ({"seq": COUNT, "index": COUNT, "source": COUNT, "target": COUNT}, {}),
    "publish": ({"seq": COUNT, "block": COUNT, "hash": TEXT}, {}),
    "fork": ({"seq": COUNT, "parent": COUNT, "sample": COUNT, "computed": COUNT}, {}),
    "begin": ({"step": COUNT, "decodes": SPANS, "prefills": CHUNKS}, {}),
    "reject": ({"seq": COUNT, "computed": COUNT, "blocks": COUNTS}, {}),
    "tokens": ({"step": COUNT, "seqs": SPANS, "tokens": COUNTS}, {}),
    "end": ({"t": TIME, "step": COUNT, "ms": TIMES}, {}),
    "force": ({"seq": COUNT, "tokens": COUNTS}, {}),
    "free": ({"seq": COUNT}, {}),
    "preempt": ({"seq": COUNT}, {}),
    "finish": ({"seq": COUNT}, {"reason": TEXT}),
    "abort": ({"seq": COUNT}, {}),
    "reset": ({}, {}),
    "window": ({"seq": COUNT, "blocks": COUNTS}, {}),
}  # fmt: skip


def check_event(event: object) -> None:
    """Raise ValueError that names the field if an event does not match the table. Unknown fields
    are ignored, because newer versions may add them."""
    if type(event) is not dict:
        raise ValueError("an event must be a JSON object")
    name = event.get("e")
    if type(name) is not str or name not in FIELDS:
        raise ValueError(f"field 'e': there is no event with this name: {name!r:.80}")
    required, optional = FIELDS[name]
    for field in required:
        if field not in event:
            raise ValueError(f"{name}: field {field!r} is missing")
    for kinds in (ANY, required, optional):
        for field, kind in kinds.items():
            if field in event and not kind.fits(event[field]):
                what = f"must be {kind.words}, not {brief(event[field])}"
                raise ValueError(f"{name}: field {field!r} {what}")


def brief(value: object) -> str:
    """A short description of a value: its repr may be as long as the file, or nested too deep."""
    if type(value) in (dict, list):
        return f"a {type(value).__name__} of {len(value):,}"
    if type(value) is str:
        value = value[:80]
    if type(value) is int and value.bit_length() > 256:
        return f"a number of {value.bit_length():,} bits"
    return f"{value!r:.80}"
