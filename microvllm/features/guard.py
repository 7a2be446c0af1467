"""A Ctrl-C takes effect between steps, where the engine's books are in order, and leaves no request
that nobody waits for."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager

from ..engine import LLM


@contextmanager
def uninterrupted():
    """Let a Ctrl-C take effect only at the end."""
    handler, pressed = signal.getsignal(signal.SIGINT), []
    main = threading.current_thread() is threading.main_thread()
    ours = main and handler is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, handler)
    if pressed:
        raise KeyboardInterrupt


class GuardLLM(LLM):
    """An engine whose steps, arrivals and aborts are not interrupted by Ctrl-C."""

    @uninterrupted()
    def abort(self, *request_ids: int) -> None:
        super().abort(*request_ids)

    def _queue(self, checked: list[tuple], **options) -> list:
        first = self._next_id
        try:
            return super()._queue(checked, **options)
        except BaseException:  # a Ctrl-C among many
            self.abort(*range(first, self._next_id))
            raise

    @uninterrupted()
    def _add(self, *args, **options):
        return super()._add(*args, **options)

    @uninterrupted()
    def _advance(self) -> None:
        super()._advance()


PARTS = {"llm": GuardLLM}
