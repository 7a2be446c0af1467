"""Bulk jobs: answer the rows of a file, with one engine, or with many on Ray Data."""

from .job import Ask, Job, Outcome, answer, carry_out

__all__ = ["LLMPredictor", "Ask", "Job", "Outcome", "answer", "carry_out"]


def __getattr__(name: str):
    """Import LLMPredictor on first use, since it needs Ray."""
    if name != "LLMPredictor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .ray import LLMPredictor

    return LLMPredictor
