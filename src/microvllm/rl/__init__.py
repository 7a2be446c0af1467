"""Checks for reinforcement learning: the difference between the log-probabilities of rollouts and
of the training, and whether transferred weights are intact. They need no engine."""

from .mismatch import Mismatch, mismatch
from .transfer import check_transfer, checksums

__all__ = ["Mismatch", "check_transfer", "checksums", "mismatch"]
