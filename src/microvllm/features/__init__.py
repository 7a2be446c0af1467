"""Features of the full engine, one file for each. full.py lists them; params.py has the parameters
of a request that they honour. This file checks values of users."""

from collections.abc import Callable, Iterable
from numbers import Integral, Real


def check_number(
    name: str, value: object, least: float = 0, most: float = 2**31 - 1
) -> int | float:
    """The value as an int, if `least` is an int, else as a float: numpy's small integers would
    overflow when they are added to a length. Raises TypeError or ValueError, which name the
    argument, unless least <= value <= most."""
    is_integer = isinstance(least, int)
    python_type = int if is_integer else float
    if type(value) is not python_type:  # the other checks take long
        number_type = Integral if is_integer else Real
        if isinstance(value, bool) or not isinstance(value, number_type):
            expected = "an integer" if is_integer else "a number"
            raise TypeError(f"{name} must be {expected}, got {value!r:.80}")
    if not least <= value <= most:  # a NaN fails both comparisons
        limits = f"{least} and {most}" if is_integer else f"{least:g} and {most:g}"
        must_be = "must be between" if is_integer else "must be finite and between"
        raise ValueError(f"{name} {must_be} {limits}, got {value!s:.80}")
    return python_type(value)


def check_text(name: str, value: object) -> str:
    """The value, if it is a string. Raises TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be strings, got {value!r:.80}")
    return value


def check_list(name: str, values: object, check: Callable = check_number) -> tuple:
    """The values of a list, as check(name, value) returns them. Raises TypeError if it is none."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list, got {values!r:.80}")
    return tuple(check(name, value) for value in values)
