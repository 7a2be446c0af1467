"""What nanochat's scripts import from nanochat, on this engine: see docs/NANOCHAT.md."""

from .engine import Engine as Engine
