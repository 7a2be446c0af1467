"""Strings that end a text and are cut off."""

from dataclasses import dataclass

from ..engine import LLM, Request
from ..sampler import SamplingParams
from ..scheduler import Scheduler, Sequence
from ..tokenizer import Text
from . import check_list, check_text

MOST, LONGEST = 100, 1000  # each token is compared with all of them


@dataclass(frozen=True, kw_only=True)
class StopParams(SamplingParams):
    """Sampling parameters with stop strings. They are searched in the text as the output shows it,
    of which what tools wrote is a part."""

    stop: tuple[str, ...] = ()  # strings that end the text and are cut off

    def __post_init__(self):
        super().__post_init__()
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        self.put("stop", check_list("stop", stop, check_text))
        if not all(self.stop):
            raise ValueError(f"stop must not be empty, got {self.stop!r:.80}")
        if len(self.stop) > MOST or max(map(len, self.stop), default=0) > LONGEST:
            limits = f"{MOST} strings of at most {LONGEST:,} characters"
            raise ValueError(f"stop may have {limits}, got {len(self.stop):,}: {self.stop!r:.80}")


class StopText(Text):
    """A text that ends before the first stop string in it."""

    def restart(self) -> None:
        super().restart()
        self.searched = 0  # characters in which no stop string ends

    def react(self, seq: Sequence, token: int, scheduler: Scheduler) -> None:
        super().react(seq, token, scheduler)
        found = []
        if self.num_read > getattr(seq.params, "min_tokens", 0):
            found = [(self.text.find(s, self.start(s)), s) for s in seq.params.stop]
        if ends := [(at, s) for at, s in found if at >= 0]:
            at, stop = min(ends)
            self.text = self.text[:at]
            self.decoder.flush()  # what waits in it is behind the end
            scheduler.num_tokens -= len(seq.output) - self.num_read
            del seq.tokens[seq.num_prompt + self.num_read :]
            if seq.finish_reason is None:
                scheduler.finish(seq, "stop", stop)
            seq.finish_reason, seq.stop_reason = "stop", stop
        self.searched = len(self.text)

    def start(self, stop: str) -> int:
        """Where a stop string may begin that was not found before."""
        return max(0, self.searched - len(stop) + 1)

    def certain(self, seq: Sequence) -> int:
        """The beginning of a stop string waits until it is none."""
        certain = super().certain(seq)
        if not seq.finish_reason:
            for stop in seq.params.stop:
                at = self.text.find(stop[0], self.start(stop))
                while at >= 0 and not stop.startswith(self.text[at:]):
                    at = self.text.find(stop[0], at + 1)
                certain = min(certain, at) if at >= 0 else certain
        return max(certain, self.num_sent)


class StopLLM(LLM):
    """Requests with stop strings."""

    def watches(self, request: Request) -> bool:
        return bool(request.params.stop) or super().watches(request)


PARTS = {"llm": StopLLM, "text": StopText, "params": StopParams}
