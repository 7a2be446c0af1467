"""Strings that end a text and are cut off."""

from __future__ import annotations

from dataclasses import dataclass

from ..engine import LLM, Request
from ..sampler import SamplingParams
from ..scheduler import Scheduler, Sequence
from ..tokenizer import Text
from . import check_list


def check_text(name: str, value: object) -> str:
    """The value if it is a string, else TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be strings, got {value!r:.80}")
    return value


@dataclass(frozen=True, kw_only=True)
class StopParams(SamplingParams):
    """Sampling parameters with stop strings."""

    stop: tuple[str, ...] = ()  # strings that end the text and are cut off

    def __post_init__(self):
        super().__post_init__()
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        self.put("stop", check_list("stop", stop, check_text))
        if not all(self.stop):
            raise ValueError(f"stop must not be empty, got {self.stop!r:.80}")


class StopText(Text):
    """A text that ends before the first stop string in it."""

    stop: str | None = None  # the one that ended it

    def react(self, seq: Sequence, token: int, scheduler: Scheduler) -> None:
        super().react(seq, token, scheduler)
        stops = seq.params.stop
        ends = [(i, s) for s in stops if (i := self.text.find(s, self.num_sent)) >= 0]
        if ends:
            at, self.stop = min(ends)
            self.text = self.text[:at]
            self.decoder.flush()  # what waits in it is behind the end
            del seq.tokens[seq.num_prompt + self.num_read :]
            if seq.finish_reason is None:
                scheduler.finish(seq, "stop")
            seq.finish_reason = "stop"

    def certain(self, seq: Sequence) -> int:
        """The beginning of a stop string waits until it is none."""
        if seq.finish_reason:
            return super().certain(seq)
        stops = seq.params.stop
        held = (k for s in stops for k in range(1, len(s)) if self.text.endswith(s[:k]))
        return max(super().certain(seq) - max(held, default=0), self.num_sent)


class StopLLM(LLM):
    """Requests with stop strings."""

    def watches(self, request: Request) -> bool:
        return bool(request.params.stop) or super().watches(request)

    def stop_reason(self, request: Request, seq: Sequence) -> int | str | None:
        text = request.texts.get(seq.sample_id)
        if seq.finish_reason == "stop" and text and text.stop is not None:
            return text.stop
        return super().stop_reason(request, seq)


PARTS = {"llm": StopLLM, "text": StopText, "params": StopParams}
