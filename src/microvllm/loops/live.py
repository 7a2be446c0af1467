"""A loop for an engine whose weights may change between two steps, or that may sleep.

Before each step, or each call of several steps, it checks whether the weights have changed:

    step 1 | check: unchanged | step 2 | check: changed, apply | step 3 computes K and V again
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engine import Loop

if TYPE_CHECKING:
    from ..features.live import LiveWeights


class FollowingLoop(Loop):
    """Wraps another loop. Before each step it wakes a sleeping engine and applies new weights."""

    def __init__(self, inner_loop: Loop, live_weights: LiveWeights):
        super().__init__(inner_loop.engine)
        self.inner_loop = inner_loop
        self.live_weights = live_weights
        live_weights.attach(self.engine)

    def advance(self) -> None:
        self.live_weights.refresh()
        self.inner_loop.advance()

    def drain(self) -> None:
        self.inner_loop.drain()

    def forget(self) -> None:
        self.inner_loop.forget()
