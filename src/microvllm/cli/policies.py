"""Policies by name: `--eviction NAME|FILE:FUNCTION`, --victim and --admission."""

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
    """Load a Python file as a module that cannot be imported by name, so that Ray sends the code of
    its functions. Raises ValueError for a file that cannot be loaded."""
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    if file.suffix != ".py":
        raise ValueError(f"{file} is not a Python file: its name must end with .py")
    try:
        return learn.load(file)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's own code may raise anything, and call sys.exit
        told = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} cannot be loaded as a Python module: {told}") from None


def names(kind: str) -> dict[str, Callable]:
    """The named policies: the default of the core, and those of the lab if it is installed."""
    from ..blocks import least_recently_used  # imports numpy: too slow for --help
    from ..scheduler import first_come, youngest

    found = [p for p in (youngest, first_come, least_recently_used) if p.__name__ == KINDS[kind]]
    file = ROOT / "lab" / "policies.py"
    if file.is_file():
        found += load(file).OTHERS[kind]
    return {policy.__name__: policy for policy in found}


def find_policy(kind: str, text: str) -> Callable:
    """The policy for NAME or FILE:FUNCTION. Raises ValueError if there is none."""
    file, _, function = text.rpartition(":")
    try:
        known = vars(load(Path(os.path.expanduser(file)).absolute())) if file else names(kind)
    except ValueError as error:
        raise ValueError(f"--{kind} {text}: {error}") from None
    if not callable(policy := known.get(function)):
        where = f"{file} has no function" if file else "there is no policy"
        hint = "" if file else f": choose from {', '.join(known)}, or give FILE:FUNCTION"
        raise ValueError(f"--{kind} {text}: {where} {function!r}{hint}")
    return policy
