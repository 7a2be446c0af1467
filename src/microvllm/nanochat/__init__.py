"""What nanochat's scripts import from nanochat, on this engine: see docs/NANOCHAT.md."""

from .core_metric import evaluate_core, read_bundle
from .engine import Engine

__all__ = ["Engine", "evaluate_core", "read_bundle"]
