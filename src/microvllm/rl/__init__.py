"""For reinforcement learning beside an engine: how far rollouts are from the training's own
log-probabilities, and whether weights arrived as they were sent. Nothing here needs an engine."""

from .mismatch import Mismatch, mismatch
from .transfer import check_transfer, checksums

__all__ = ["Mismatch", "check_transfer", "checksums", "mismatch"]
