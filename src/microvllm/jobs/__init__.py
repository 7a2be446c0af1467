"""Bulk jobs: rows of a file are answered by one engine, or by many with Ray Data."""

from .job import Ask, Job, Outcome, answer, carry_out

__all__ = ["LLMPredictor", "Ask", "Job", "Outcome", "answer", "carry_out"]


def __getattr__(name: str):
    """LLMPredictor is imported where it is used: it needs Ray."""
    if name != "LLMPredictor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .ray import LLMPredictor

    return LLMPredictor
