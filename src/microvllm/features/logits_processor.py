"""User functions that change the logits of a sample, and the handling of their exceptions.

An Exception in a function ends its own sample with finish_reason "error". Exceptions from outside
are raised in the step's caller: those of signal handlers that run in the meantime (a time limit,
Ctrl-C), and those that do not inherit from Exception, such as SystemExit.
"""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..scheduler import Sequence

SIGNALS = sorted(signal.valid_signals())
MAX_INTERRUPTIONS = 1000  # number of remembered interruptions
MAX_ATTEMPTS = 2  # interruptions of a processor at one token, before its sample ends


class LogitsProcessor(Protocol):
    """A logits_processor with state: any object with a method `begin`. It need not inherit from
    this class.

    Each sample of a request has its own function. It is called once for each of the sample's
    tokens, in order, with all tokens so far (prompt and output), starting with the first token.
    After an exception in a step, and after new weights, `begin` is called again, and the tokens of
    the first call then include output. This makes no difference to a function that only reads
    `token_ids`.
    """

    # True if the function's result depends only on token_ids and logits. Then it is also called for
    # tokens that prompt lookup proposes, and may be called without them later.
    may_guess: bool = False

    def begin(self, prompt_ids: list[int]) -> Callable[[list[int], Tensor], Tensor]:
        """Return the function (token_ids, logits) -> logits of one sample."""
        ...


class Place(NamedTuple):
    """A token of a sample. It stays the same after an error."""

    request_id: int
    index: int  # number of the sample
    position: int  # position of the token


class Interruption(NamedTuple):
    """An exception from outside that occurred in a processor."""

    place: Place
    message: str


class ProcessorCalls:
    """Calls the logits_processors of an engine's samples."""

    def __init__(self) -> None:
        # the function of each sample
        self.functions: WeakKeyDictionary[Sequence, Callable] = WeakKeyDictionary()
        self.interruptions: deque[Interruption] = deque(maxlen=MAX_INTERRUPTIONS)

    def reset(self) -> None:
        """Start all functions again, since one may have seen a token that was never appended."""
        self.functions.clear()

    def change_row(
        self,
        seq: Sequence,
        token_ids: list[int],
        logits: Tensor,
        raised: list[BaseException],
    ) -> str | None:
        """Let a sample's processor change its row of logits (V,), in place. token_ids: prompt and
        output so far; raised: see `watched_handlers`. Returns the processor's error, or None.

        After an interruption the next step calls the processor again. A second one at the same
        token is an error. Otherwise a processor that always exits, or never meets the caller's time
        limit, would block all other requests.
        """
        place = Place(seq.request_id, seq.index, len(token_ids))
        messages = [message for other_place, message in self.interruptions if other_place == place]
        if len(messages) >= MAX_ATTEMPTS:
            return messages[-1]
        raised.clear()
        try:
            function = self.function_of(seq, token_ids)
            replace_row(logits, function(list(token_ids), logits))
            return None
        except BaseException as error:
            is_own = isinstance(error, Exception) and not raised
            message = describe(error)
            if is_own:
                return message
            self.interruptions.append(Interruption(place, message))
            if not raised or error is raised[-1]:
                raise
            raise raised[-1] from error  # the processor converted it to another exception

    def function_of(self, seq: Sequence, token_ids: list[int]) -> Callable:
        """Return the function of a sample. The first call starts it."""
        if seq not in self.functions:
            processor = seq.params.logits_processor
            begin = getattr(processor, "begin", None)
            prompt_ids = token_ids[: seq.num_prompt]
            self.functions[seq] = processor if begin is None else begin(prompt_ids)
        return self.functions[seq]


def replace_row(logits: Tensor, new: object) -> None:
    """Write a processor's result for a row: logits, or a mask. Raises TypeError."""
    if not isinstance(new, Tensor) or new.shape != logits.shape:
        description = tuple(new.shape) if isinstance(new, Tensor) else repr(new)
        expected = f"logits_processor must return logits of shape {tuple(logits.shape)}"
        raise TypeError(f"{expected}, got {description!s:.80}")
    if new.dtype == torch.bool:
        logits.masked_fill_(~new, -torch.inf)
    else:
        logits.copy_(new)


def describe(error: BaseException) -> str:
    """Return the type and the message of an error. Formatting the message may raise as well."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


class WatchedHandler:
    """A signal handler that adds the exceptions it raises to a list."""

    def __init__(self, handler: Callable, raised: list[BaseException]):
        self.handler = handler
        self.raised = raised

    def __call__(self, number: int, frame: FrameType | None) -> object:
        try:
            return self.handler(number, frame)
        except BaseException as error:
            self.raised.append(error)
            raise


@contextmanager
def watched_handlers() -> Iterator[list[BaseException]]:
    """Yield a list of the exceptions that Python signal handlers raise in the block. Only this
    distinguishes such an exception from one of the interrupted code. Python runs handlers in the
    main thread. A handler that is set in the block belongs to the code that sets it, and stays."""
    raised: list[BaseException] = []
    watched: dict[int, WatchedHandler] = {}
    is_main_thread = threading.current_thread() is threading.main_thread()
    try:
        for number in SIGNALS if is_main_thread else ():
            handler = signal.getsignal(number)
            while isinstance(handler, WatchedHandler):  # left here by an exception
                handler = handler.handler
            if callable(handler):
                watched[number] = WatchedHandler(handler, raised)
                signal.signal(number, watched[number])
        yield raised
    finally:
        for number, handler in watched.items():
            if signal.getsignal(number) is handler:
                signal.signal(number, handler.handler)
