"""Data that is damaged or invented, from a seed: some 10 us a case, where hypothesis takes 5 ms."""

import json
import math
from random import Random

TEXTS = "", "a", "<b>", "../x", "\x1b[2J", "é\u2028", "\ud800", "9" * 25, "\0", "~x/y", "__class__"
NUMBERS = 0, 1, -1, 2**31, 2**63, 10**30, 1e308, 0.5, -0.0, math.nan, math.inf, 10**400
ATOMS = None, True, False, *TEXTS, *NUMBERS


def value(rng: Random, deep: int = 3) -> object:
    """Anything that JSON can say."""
    how = rng.random()
    if deep and how < 0.2:
        return [value(rng, deep - 1) for _ in range(rng.randrange(4))]
    if deep and how < 0.4:
        return {rng.choice(TEXTS): value(rng, deep - 1) for _ in range(rng.randrange(4))}
    return rng.randrange(-9, 300) if how < 0.5 else rng.choice(ATOMS)


def changed(rng: Random, given: object) -> object:
    """A JSON value like this one, with something in it replaced, left out or added."""
    if isinstance(given, dict) and given and rng.random() < 0.9:
        key, how = rng.choice([*given]), rng.random()
        if how < 0.2:
            return {k: v for k, v in given.items() if k != key}
        if how < 0.3:
            return {**given, rng.choice(TEXTS): value(rng)}
        return {**given, key: changed(rng, given[key])}
    if isinstance(given, list) and given and rng.random() < 0.9:
        at, how = rng.randrange(len(given)), rng.random()
        if how < 0.4:
            return given[:at] + given[at : at + 1] * (2 if how < 0.2 else 0) + given[at + 1 :]
        return [*given[:at], changed(rng, given[at]), *given[at + 1 :]]
    if type(given) in (int, float) and rng.random() < 0.6:
        return rng.choice([given + 1, -given, 2 * given, str(given), *NUMBERS])
    if isinstance(given, str) and rng.random() < 0.4:
        return damaged(rng, given.encode()).decode(errors="surrogateescape")
    return value(rng)


def text(rng: Random, given: object) -> bytes:
    """The JSON of a value like this one; of every other one damaged, and some nested too deep."""
    how = rng.random()
    made = json.dumps(given if how < 0.3 else changed(rng, given)).encode()
    if how > 0.98:
        return made[:-1] + b',"a":' * (made[:1] == b"{") + b"[" * 100_000
    return damaged(rng, made) if how < 0.5 else made


def damaged(rng: Random, data: bytes, ends: int = 4096) -> bytes:
    """The bytes with a few changed, cut out, doubled or put in, most of them near either end, where
    the headers of a format are."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not data:
            break
        near = rng.randrange(min(ends, len(data)))
        at = rng.choice((near, len(data) - 1 - near, rng.randrange(len(data))))
        match rng.randrange(9):
            case 0 | 1:
                data[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
            case 2 | 3:
                data[at] ^= 1 << rng.randrange(8)
            case 4:
                del data[at:]
            case 5:
                data[at:at] = rng.randbytes(rng.randint(1, 9))
            case 6:
                data[at : at + 8] = bytes(len(data[at : at + 8]))
            case how:
                length = rng.randint(1, 64)
                data[at : at + length] = data[at : at + length] * (2 if how == 7 else 0)
    return bytes(data)


def program(rng: Random, words: list[bytes]) -> bytes:
    """Of a stack machine."""
    return b"".join(rng.choices(words, k=rng.randrange(40)))
