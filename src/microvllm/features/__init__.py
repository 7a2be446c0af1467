"""One file a feature. Each names in `PARTS` the classes that it adds to an engine (see full.py): a
class overrides methods of a core class and calls super(), so that any set of them goes together.
Here is what several of them need to look at what they were given."""

from collections.abc import Callable, Iterable
from numbers import Integral, Real

from ..sampler import SamplingParams


def check_number(name: str, value: object, least=0, most=2**31 - 1) -> int | float:
    """The value as an int if `least` is one, else as a float: numpy's small integers would overflow
    when they are added to a length. Raises TypeError or ValueError naming the argument."""
    whole = isinstance(least, int)
    plain, kind = (int, Integral) if whole else (float, Real)  # `kind` takes long to ask
    if type(value) is not plain and (isinstance(value, bool) or not isinstance(value, kind)):
        what = "an integer" if whole else "a number"
        raise TypeError(f"{name} must be {what}, got {value!r:.80}")
    if not least <= value <= most:  # a NaN fails both
        limits = f"{least} and {most}" if whole else f"{least:g} and {most:g}"
        must = "must be between" if whole else "must be finite and between"
        raise ValueError(f"{name} {must} {limits}, got {value!s:.80}")
    return int(value) if whole else float(value)


def check_numbers(params: SamplingParams, ranges: dict[str, tuple]) -> None:
    """`check_number` for fields; None stays where it is the default."""
    for name, limits in ranges.items():
        value = getattr(params, name)
        if value is not None or getattr(type(params), name) is not None:
            params.put(name, check_number(name, value, *limits))


def check_text(name: str, value: object) -> str:
    """The value if it is a string, else TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be strings, got {value!r:.80}")
    return value


def check_list(name: str, values: object, check: Callable = check_number) -> tuple:
    """The values of a list, each as its check gives it. Raises TypeError if there is no list."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list, got {values!r:.80}")
    return tuple(check(name, value) for value in values)
