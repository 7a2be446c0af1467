"""Replacements for modules that nanochat's scripts import (docs/NANOCHAT.md)."""

from .chat_eval import evaluate_chat, run_chat_eval
from .core_metric import evaluate_core, evaluate_task, read_bundle
from .engine import Engine
from .tasks import load_task

__all__ = [
    "Engine",
    "evaluate_chat",
    "evaluate_core",
    "evaluate_task",
    "load_task",
    "read_bundle",
    "run_chat_eval",
]
