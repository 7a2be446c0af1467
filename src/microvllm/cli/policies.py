"""`--eviction NAME|FILE:FUNCTION`, and --victim and --admission: policies by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

from . import learn
from .bench import ROOT

KINDS = {"victim": "youngest", "admission": "first_come", "eviction": "least_recently_used"}


@cache
def load(file: Path) -> ModuleType:
    """A Python file as a module, which has no name to import it by: Ray sends its functions whole.
    Raises ValueError for one that cannot be loaded."""
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    try:
        return learn.load(file)
    except Exception as error:  # the user's own code may raise anything
        raise ValueError(f"{file} cannot be loaded: {type(error).__name__}: {error}") from None


def names(kind: str) -> dict[str, Callable]:
    """The policies that have names: the core's default, and the lab's where it is installed."""
    from .. import scheduler  # which imports numpy: too slow for --help

    found, file = [getattr(scheduler, KINDS[kind])], ROOT / "lab" / "policies.py"
    if file.is_file():
        found += load(file).OTHERS[kind]
    return {policy.__name__: policy for policy in found}


def find_policy(kind: str, text: str) -> Callable:
    """The policy of a kind that NAME or FILE:FUNCTION means. Raises ValueError if there is none."""
    file, _, function = text.rpartition(":")
    known = vars(load(Path(os.path.expanduser(file)).absolute())) if file else names(kind)
    if not callable(policy := known.get(function)):
        where = f"{file} has no function" if file else "there is no policy"
        hint = "" if file else f": choose from {', '.join(known)}, or give FILE:FUNCTION"
        raise ValueError(f"--{kind} {text}: {where} {function!r}{hint}")
    return policy
