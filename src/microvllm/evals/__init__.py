"""Evaluations: lm-evaluation-harness runs its tasks on this engine."""

from .harness import HarnessLM, evaluate, find_tasks

__all__ = ["HarnessLM", "evaluate", "find_tasks"]
