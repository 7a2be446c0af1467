"""What the caller sees of a request: its samples' text while they grow, and its output.

The scheduler knows tokens only. What depends on text lives here: stop strings, the pieces of a
stream, the calculator, which answers to text that the model writes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from .sampler import SamplingParams
from .scheduler import Scheduler, Sequence
from .tokenizer import IncrementalDecoder, Tokenizer


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Say which of many arguments a user's mistake is in."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None


class RequestOutput(dict):
    """What became of a request; reads as a dict, and its keys as attributes too.

    text (special tokens and what ended it not shown), token_ids (as generated, with the stop token
    if it ended there), mask (0 for the tokens that a tool forced, else 1), prompt_token_ids,
    finish_reason ("stop" | "length" | "abort" | "error": the filters left no token to draw, or a
    logits_processor or the tokenizer raised), stop_reason (the stop token's id, the stop string,
    which limit was met: "max_tokens" | "max_model_len", or the error), logprobs where asked for
    (one dict per token of token_id, logprob: the model's, sampler_logprob: after temperature and
    filters, top: alternatives; None for forced tokens), num_cached_tokens (of the prompt, found in
    the prefix cache), request_id, and samples: such a dict for each of the n samples, the first of
    which is also at the top level.
    """

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Answer:
    """One sample's text while it grows; kept only where someone looks before it is done."""

    def __init__(self, tokenizer: Tokenizer, tools: bool):
        self.decoder: IncrementalDecoder = tokenizer.decoder()
        self.calculator = None
        if tools:
            from .features.calculator import Calculator

            self.calculator = Calculator(tokenizer)
        self.text = ""
        self.seen = 0  # output tokens that are in the text
        self.told = 0  # characters that a stream has had
        self.told_tokens = 0  # tokens that a stream has had
        self.forced: list[int] = []  # indices of the output tokens that a tool wrote
        self.stop: str | None = None  # the stop string that ended it

    def read(self, seq: Sequence, scheduler: Scheduler) -> None:
        """Bring the text up to the sequence's tokens: let the calculator write, end the sequence
        at a stop string."""
        stops = seq.params.stop
        while self.stop is None and self.seen < seq.num_known - seq.num_prompt:
            token = seq.tokens[seq.num_prompt + self.seen]
            self.seen += 1
            last = seq.num_prompt + self.seen == len(seq.tokens)
            if seq.finish_reason == "stop" and last:
                break  # the stop token's text is not shown
            self.text += self.decoder.push(token)
            if self.calculator and (forced := self.calculator.push(token)):
                if seq.finish_reason is None:
                    count = scheduler.force(seq, forced)
                    self.forced.extend(range(self.seen, self.seen + count))
            ends = [(i, s) for s in stops if (i := self.text.find(s, self.told)) >= 0]
            if ends:
                at, self.stop = min(ends)
                self.text = self.text[:at]
                del seq.tokens[seq.num_prompt + self.seen :]
                if seq.finish_reason is None:
                    scheduler.finish(seq, "stop")
                seq.finish_reason = "stop"
        if seq.finish_reason and self.stop is None:
            self.text += self.decoder.flush()

    def tell(self, seq: Sequence) -> dict | None:
        """What a stream has not had yet, as an event; None if there is nothing certain."""
        safe = len(self.text)
        if not seq.finish_reason:  # the beginning of a stop string waits until it is none
            stops = seq.params.stop
            held = (k for s in stops for k in range(1, len(s)) if self.text.endswith(s[:k]))
            safe = max(safe - max(held, default=0), self.told)
        if safe == self.told and not seq.finish_reason:
            return None
        output = seq.tokens[seq.num_prompt : seq.num_known]
        event = {
            "sample": seq.sample_id,
            "text": self.text[self.told : safe],
            "token_ids": output[self.told_tokens :],
            "finish_reason": seq.finish_reason,
        }
        self.told, self.told_tokens = safe, len(output)
        return event


def prompt_ids(prompt, tokenizer: Tokenizer) -> list[int]:
    """The token ids of a prompt: of a text, behind BOS, or of a list of ids, as they are. Raises
    TypeError or ValueError for what is neither, is empty, or has an id that does not exist."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, bos=True)
    if not isinstance(prompt, (list, tuple, np.ndarray)):
        raise TypeError(f"a prompt is a string or a list of token ids, got {type(prompt).__name__}")
    vocab = tokenizer.vocab_size
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
            raise TypeError(f"a prompt of token ids must hold integers, got {token!r:.80}")
        if not 0 <= token < vocab:
            raise ValueError(f"token id {token} is outside the vocabulary of {vocab}")
    if not len(prompt):
        raise ValueError("a prompt of token ids needs at least one (the text '' is BOS alone)")
    return [int(token) for token in prompt]


@dataclass
class Request:
    """A request from its arrival to its output."""

    id: int
    prompt: list[int]
    params: SamplingParams
    tools: bool  # run the calculator
    owned: bool  # generate or stream waits for the output; otherwise step() returns it
    events: deque | None  # pieces of text for stream
    scored: bool  # it wants the log-probabilities of a continuation and writes nothing
    done: list[Sequence] = field(default_factory=list)  # finished samples
    answers: dict[int, Answer] = field(default_factory=dict)  # by sample index
    logprobs: dict[tuple[int, int], dict] = field(default_factory=dict)  # (sample, position)
    errors: list[str] = field(default_factory=list)  # of its logits_processor, or of the tokenizer
    output: RequestOutput | None = None

    @property
    def watched(self) -> bool:
        """Is its text needed token by token?"""
        return self.tools or bool(self.params.stop) or self.events is not None

    def watch(self, seq: Sequence, scheduler: Scheduler, tokenizer: Tokenizer) -> int:
        """Follow a sample that has new tokens or is over. Returns how many more it has afterwards:
        a tool may write, and what is behind a stop string is cut off."""
        answer = self.answers.get(seq.sample_id)
        if answer is None:
            answer = self.answers[seq.sample_id] = Answer(tokenizer, self.tools)
        before = seq.num_known
        try:
            answer.read(seq, scheduler)
        except Exception as error:  # of the tokenizer: others in the batch are not to suffer
            if seq.finish_reason is None:
                scheduler.finish(seq, "error")
            self._break(seq, error)
        if self.events is not None and (event := answer.tell(seq)):
            event |= {"request_id": self.id, "stop_reason": self._stop_reason(seq)}
            self.events.append(event)
        return seq.num_known - before

    def _break(self, seq: Sequence, error: Exception) -> None:
        """A sample whose text cannot be made has failed, however it ended."""
        self.errors.insert(0, f"tokenizer: {type(error).__name__}: {error}")
        seq.finish_reason = "error"

    def _stop_reason(self, seq: Sequence) -> int | str | None:
        """What ended a sample: a stop string, a token id, the name of the limit, or the error."""
        if seq.finish_reason == "stop":
            answer = self.answers.get(seq.sample_id)
            return answer.stop if answer and answer.stop is not None else seq.tokens[-1]
        if seq.finish_reason == "length":
            full = len(seq.tokens) - seq.num_prompt == seq.params.max_tokens
            return "max_tokens" if full else "max_model_len"
        if seq.finish_reason == "error":
            return self.errors[0] if self.errors else "no token is left to draw"
        return None

    def make_output(self, tokenizer: Tokenizer) -> RequestOutput:
        """What the finished samples amount to."""
        found = {"request_id": self.id, "prompt_token_ids": self.prompt}
        found["num_cached_tokens"] = self.done[0].num_cached or 0
        if self.scored:
            seq = self.done[0]
            return RequestOutput(found, finish_reason=seq.finish_reason, logprobs=seq.scores)
        done = sorted(self.done, key=lambda seq: seq.sample_id)
        samples = [self._sample(seq, tokenizer) for seq in done]
        return RequestOutput(samples[0], **found, samples=samples)

    def _sample(self, seq: Sequence, tokenizer: Tokenizer) -> dict:
        answer = self.answers.get(seq.sample_id)
        token_ids = seq.tokens[seq.num_prompt :]
        mask = [1] * len(token_ids)
        if answer:
            text = answer.text
            for i in answer.forced:
                if i < len(mask):
                    mask[i] = 0
        else:
            shown = token_ids[:-1] if seq.finish_reason == "stop" else token_ids
            try:
                text = tokenizer.decode(shown, skip_special=True)
            except Exception as error:
                text = ""
                self._break(seq, error)
        sample = {
            "text": text,
            "token_ids": token_ids,
            "mask": mask,
            "finish_reason": seq.finish_reason,
            "stop_reason": self._stop_reason(seq),
        }
        if self.params.logprobs is not None:
            positions = range(seq.num_prompt, len(seq.tokens))
            sample["logprobs"] = [self.logprobs.get((seq.sample_id, p)) for p in positions]
        return sample
