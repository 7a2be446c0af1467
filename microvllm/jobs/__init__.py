"""Bulk jobs: rows of a file are answered by one engine, or by many with Ray Data."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .answers import Ask, Outcome, answer
    from .job import Job, carry_out
    from .ray import LLMPredictor

_WHERE = {
    "Ask": "answers", "Outcome": "answers", "answer": "answers", "Job": "job", "carry_out": "job",
    "LLMPredictor": "ray",
}  # fmt: skip
__all__ = ["LLMPredictor", "Ask", "Job", "Outcome", "answer", "carry_out"]


def __getattr__(name: str):
    """Import what a name needs when it is asked for."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
