"""Evaluations: run tasks of lm-evaluation-harness on this engine."""

from .harness import HarnessLM, evaluate, find_tasks

__all__ = ["HarnessLM", "evaluate", "find_tasks"]
