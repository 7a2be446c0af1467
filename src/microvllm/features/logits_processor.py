"""Functions of the caller that change the logits of a sample, and what happens if they raise.

An Exception in one of them ends its own sample with finish_reason "error". Exceptions from outside
go to the caller of the step: those that a signal's handler raises meanwhile (a time limit, Ctrl-C),
and those that are no Exception, such as SystemExit.
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
MAX_INTERRUPTIONS = 1000  # that are remembered
MAX_ATTEMPTS = 2  # a sample whose processor was interrupted this often at one token ends


class LogitsProcessor(Protocol):
    """A logits_processor that keeps state: any object with a method `begin`, also without this
    class.

    Each sample of a request has a function of its own, which is called once for each of its tokens,
    in order, with all tokens so far: prompt and output. It begins with the sample's first token.
    After an exception in a step, and after new weights, another function begins, and the first
    tokens that it receives have output in them; a function that only reads `token_ids` needs no
    care.
    """

    # Does what a function returns follow from token_ids and logits alone? Then it is also called
    # for tokens that prompt lookup guesses, and maybe without them later.
    may_guess: bool = False

    def begin(self, prompt_ids: list[int]) -> Callable[[list[int], Tensor], Tensor]:
        """The function (token_ids, logits) -> logits of one sample, as a plain logits_processor."""
        ...


class Place(NamedTuple):
    """A token of a sample, the same after an error."""

    request_id: int
    index: int  # of the sample
    position: int  # of the token


class Interruption(NamedTuple):
    """An exception from outside that struck in a processor."""

    place: Place
    message: str


class ProcessorCalls:
    """Calls the logits_processors of an engine's samples."""

    def __init__(self) -> None:
        # the function that each sample has begun with
        self.functions: WeakKeyDictionary[Sequence, Callable] = WeakKeyDictionary()
        self.interruptions: deque[Interruption] = deque(maxlen=MAX_INTERRUPTIONS)

    def reset(self) -> None:
        """Begin again: a function may have seen a token that was never appended."""
        self.functions.clear()

    def change_row(
        self,
        seq: Sequence,
        token_ids: list[int],
        logits: Tensor,
        raised: list[BaseException],
    ) -> str | None:
        """Have a sample's processor change its row of logits (V,), in place. token_ids: prompt and
        output so far; raised: see `watched_handlers`. Returns the error of the processor, or None.

        After an interruption the next step calls the processor again. Where that happens twice at
        one token, it is an error: otherwise a processor that always exits, or never meets the
        caller's time limit, would hold up all other requests.
        """
        place = Place(seq.request_id, seq.index, len(token_ids))
        messages = [message for where, message in self.interruptions if where == place]
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
            raise raised[-1] from error  # the processor has made another exception of it

    def function_of(self, seq: Sequence, token_ids: list[int]) -> Callable:
        """The function of a sample, which begins with its first call."""
        if seq not in self.functions:
            processor = seq.params.logits_processor
            begin = getattr(processor, "begin", None)
            prompt_ids = token_ids[: seq.num_prompt]
            self.functions[seq] = processor if begin is None else begin(prompt_ids)
        return self.functions[seq]


def replace_row(logits: Tensor, new: object) -> None:
    """Write what a processor returned for a row: logits, or a mask. Raises TypeError."""
    if not isinstance(new, Tensor) or new.shape != logits.shape:
        got = tuple(new.shape) if isinstance(new, Tensor) else repr(new)
        expected = f"logits_processor must return logits of shape {tuple(logits.shape)}"
        raise TypeError(f"{expected}, got {got!s:.80}")
    if new.dtype == torch.bool:
        logits.masked_fill_(~new, -torch.inf)
    else:
        logits.copy_(new)


def describe(error: BaseException) -> str:
    """The type and the message of an error; to make a message may raise, too."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


class WatchedHandler:
    """A signal's handler that adds what it raises to a list."""

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
    """Provides a list of what signal handlers in Python raise inside: only this tells such an
    exception from one of the code in which it strikes. Python runs handlers in the main thread. A
    handler that is set inside belongs to the code that sets it, and stays."""
    raised: list[BaseException] = []
    watched: dict[int, WatchedHandler] = {}
    is_main_thread = threading.current_thread() is threading.main_thread()
    try:
        for number in SIGNALS if is_main_thread else ():
            handler = signal.getsignal(number)
            while isinstance(handler, WatchedHandler):  # an exception has left it here
                handler = handler.handler
            if callable(handler):
                watched[number] = WatchedHandler(handler, raised)
                signal.signal(number, watched[number])
        yield raised
    finally:
        for number, handler in watched.items():
            if signal.getsignal(number) is handler:
                signal.signal(number, handler.handler)
