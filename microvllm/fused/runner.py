"""Runs plans on a FusedGPT: the draw is the backend's."""

from __future__ import annotations

from torch import Tensor

from ..engine import Runner


class FusedRunner(Runner):
    """A Runner for FusedGPT."""

    def __init__(self, model, *args):
        super().__init__(model, *args)
        self.rows_at_once = 1 if model.backend.sliced else None

    def sample(self, *args) -> Tensor:
        return self.model.backend.sample(*args)
