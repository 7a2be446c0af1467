"""A smaller model drafts tokens, and the engine's model verifies several in one step.

Speculative decoding (Leviathan et al. 2023; Chen et al. 2023) with a model of the same tokenizer:
`LLM("sft:d20", draft="base:d6")`. The draft model is an engine of its own, with a small KV cache.
It draws with the parameters, the seed and so the uniform random numbers of the request: where both
models have nearly the same distribution, one number chooses the same token in both. A draft token
counts only if it is what the engine draws itself, so the tokens are those without a draft model.

Drafting has to pay. `DraftLength` measures how many draft tokens are right and how long drafts and
steps take, and chooses how many tokens to draft next, perhaps none:

    tokens of a step with k draft tokens, of which a share a is right    1 + a + ... + a^k
    its time                                                             k d + s(k)

    d: of drafting a token; s(k): of a step that verifies k tokens
"""

from __future__ import annotations

from collections.abc import Callable, Set
from collections.abc import Sequence as List
from os import PathLike
from time import perf_counter
from types import SimpleNamespace
from typing import NamedTuple
from weakref import WeakKeyDictionary

from ..engine import LLM
from ..runner import Extension
from ..scheduler import DraftProposer, Sequence

MAX_ROWS = 8  # a step of so many rows takes little longer than one of a single row
ACCEPTANCE = 0.7  # is expected before it was measured
NUM_MEASURED = 64  # tokens of the prompt that is computed to measure the draft model
# a text is expected to continue for this many tokens, or as many as it has, if max_tokens allows
NUM_EXPECTED = 64
# what the latest measurement weighs in an average, and what an earlier trial in the acceptance
WEIGHT = 0.1
DECAY = 0.95
PLAIN_EVERY = 64  # steps, one of which has no drafts, so that its time stays known
LOSS_SHARE = 0.02  # of the time may be lost by trials of drafts that do not pay


class Average:
    """A mean of seconds that follows changes. A single value far above it counts as twice it: the
    process may have been stopped for a while."""

    def __init__(self):
        self.seconds = 0.0
        self.num_values = 0

    def add(self, seconds: float) -> None:
        """Add a measurement."""
        self.num_values += 1
        if self.num_values > 1:
            seconds = min(seconds, 2 * self.seconds)
        weight = max(WEIGHT, 1 / self.num_values)
        self.seconds += weight * (seconds - self.seconds)


class Averages:
    """An average for each key, of which some may have no value yet."""

    def __init__(self):
        self.by_key: dict[tuple[int, ...], Average] = {}

    def add(self, key: tuple[int, ...], seconds: float) -> None:
        """Add a measurement."""
        self.by_key.setdefault(key, Average()).add(seconds)

    def get(self, key: tuple[int, ...], default: float) -> float:
        """The seconds of a key, or the default if there are none."""
        return self.by_key[key].seconds if key in self.by_key else default

    def count(self, key: tuple[int, ...]) -> int:
        """The number of measurements."""
        return self.by_key[key].num_values if key in self.by_key else 0


class DraftLength:
    """Chooses how many tokens to draft for each of n sequences. limit: at most."""

    def __init__(self, limit: int):
        self.limit = limit
        self.num_tried = 2.0  # draft tokens that were compared, earlier ones less and less
        self.num_right = ACCEPTANCE * self.num_tried
        self.step_seconds = Averages()  # by (n, draft tokens of each)
        self.draft_seconds = Averages()  # to draft a token for each, by (n,)
        self.catch_up_seconds = Averages()  # to compute an earlier token, by ()
        self.num_steps = 0
        self.seconds = 0.0  # of all steps that were measured
        self.lost_seconds = 0.0  # by drafts that did not pay

    @property
    def acceptance(self) -> float:
        """The share of draft tokens that are right, given that those before them are."""
        return self.num_right / self.num_tried

    def choose(self, num_seqs: int, most: int, num_behind: int, num_left: int) -> int:
        """How many tokens to draft for each of num_seqs sequences, at most `most`. num_behind:
        tokens of theirs that the draft model has not computed; num_left: tokens that each of them
        is expected to grow by."""
        self.num_steps += 1
        if self.step_seconds.count((num_seqs, 0)) < 2 or self.num_steps % PLAIN_EVERY == 0:
            return 0
        plain = self.step_seconds.get((num_seqs, 0), 0.0)
        catch_up = num_behind * self.catch_up_seconds.get((), 0.0)
        lengths = range(1, min(self.limit, most) + 1)
        times = {length: self.seconds_per_token(num_seqs, length) for length in lengths}
        best = min(times, key=times.__getitem__, default=0)
        if best == 0 or (plain - times[best]) * num_left > catch_up:
            return best
        cost = catch_up + self.seconds_per_token(num_seqs, 1)
        if self.lost_seconds + cost < LOSS_SHARE * self.seconds:
            return 1  # a trial: the text may have become easier
        return 0

    def seconds_per_token(self, num_seqs: int, length: int) -> float:
        """The time in which each sequence grows by a token if `length` tokens are drafted."""
        plain = self.step_seconds.get((num_seqs, 0), 0.0)
        step = plain
        for shorter in range(1, length + 1):  # what was not measured takes as long as less work
            step = self.step_seconds.get((num_seqs, shorter), step)
        draft = self.draft_seconds.get((num_seqs,), self.draft_seconds.get((1,), 0.0))
        num_tokens = sum([self.acceptance**i for i in range(length + 1)])
        return (length * draft + step) / num_tokens

    def add_draft(self, num_seqs: int, length: int, num_behind: int, seconds: float) -> None:
        """Drafting `length` tokens for each of some sequences took this long."""
        if num_behind <= num_seqs * MAX_ROWS:  # those of the last step
            self.draft_seconds.add((num_seqs,), seconds / length)
            return
        draft = self.draft_seconds.get((num_seqs,), self.draft_seconds.get((1,), 0.0))
        self.catch_up_seconds.add((), max(0.0, seconds - length * draft) / num_behind)

    def add_step(
        self, num_seqs: int, length: int, seconds: float, draft_seconds: float, num_tokens: float
    ) -> None:
        """A step with `length` draft tokens of each sequence took this long, after drafting them
        had taken draft_seconds, and each sequence grew by num_tokens on average."""
        self.step_seconds.add((num_seqs, length), seconds)
        self.seconds += seconds + draft_seconds
        if length > 0:
            plain = self.step_seconds.get((num_seqs, 0), 0.0)
            lost = seconds + draft_seconds - num_tokens * plain
            self.lost_seconds = max(0.0, self.lost_seconds + lost)

    def add_verified(self, num_proposed: int, num_accepted: int) -> None:
        """Of a draft, the first num_accepted tokens were right."""
        self.num_tried = DECAY * self.num_tried + min(num_accepted + 1, num_proposed)
        self.num_right = DECAY * self.num_right + num_accepted


class Step(NamedTuple):
    """A step that is being computed: when it began, after the drafts were made, and with what."""

    began: float
    seqs: list[Sequence]
    num_tokens: int  # of all of them
    length: int  # draft tokens of each
    draft_seconds: float


class DraftModel(DraftProposer):
    """A DraftProposer: the tokens that a draft model's engine generates.

    llm: that engine; never: ids that are not proposed, since what
    comes after them is not drawn (the answer of a tool); clock: seconds.
    """

    max_rows = MAX_ROWS

    def __init__(
        self,
        llm: LLM,
        never: Set[int] = frozenset(),
        clock: Callable[[], float] = perf_counter,
    ):
        self.llm = llm
        self.never = never
        self.clock = clock
        self.drafts: dict[Sequence, list[int]] = {}  # of the step that is being planned
        self.num_known: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()  # computed tokens
        self.step: Step | None = None
        self.num_accepted = 0  # draft tokens that were right in this step
        self.longest = min(llm.max_model_len, llm.max_positions) - 1  # text that can be drafted for
        self.measure()

    def measure(self) -> None:
        """Measure what the draft model takes for a token, and for one of a prompt, so that a draft
        model that is too slow never begins."""
        num_prompt = max(1, min(NUM_MEASURED, self.longest - MAX_ROWS))
        for token_id in (0, 1):  # the first time loads kernels
            before = DraftLength(MAX_ROWS - 1)
            for length, num_behind in ((MAX_ROWS - 1, 1), (1, num_prompt)):
                prompt = [token_id] * num_behind
                params = self.llm.params_class(temperature=0, max_tokens=length, ignore_eos=True)
                began = self.clock()
                self.llm.generate([prompt], params, use_tqdm=False)
                before.add_draft(1, length, num_behind, self.clock() - began)
        self.length = before

    def prepare(self, seqs: list[Sequence], num_rows: int) -> None:
        """Draft tokens for all sequences at once, if it pays."""
        self.finish_step(seqs)
        self.drafts = {}
        chosen = [seq for seq in seqs if self.can_draft(seq)]
        length = 0
        draft_seconds = 0.0
        if chosen:
            num_behind = sum([len(seq.token_ids) - self.num_known.get(seq, 0) for seq in chosen])
            num_left = min([num_expected(seq) for seq in chosen])
            length = self.length.choose(len(seqs), num_rows // len(seqs), num_behind, num_left)
        if length > 0:
            began = self.clock()
            self.drafts = dict(zip(chosen, self.draft(chosen, length), strict=True))
            draft_seconds = self.clock() - began
            self.length.add_draft(len(seqs), length, num_behind, draft_seconds)
            self.num_known.update({seq: len(seq.token_ids) for seq in chosen})
        self.num_accepted = 0
        num_tokens = count_tokens(seqs)
        self.step = Step(self.clock(), seqs, num_tokens, length, draft_seconds)

    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        return self.drafts.pop(seq, [])[:max_tokens]

    def learn(self, seq: Sequence, draft: List[int], num_accepted: int) -> None:
        self.num_accepted += num_accepted
        self.length.add_verified(len(draft), num_accepted)

    def finish_step(self, seqs: list[Sequence]) -> None:
        """Note how long the last step took, unless other sequences came in, or some have ended, or
        it was not a single step."""
        step = self.step
        if step is None or step.seqs != seqs:
            return
        num_new = count_tokens(seqs) - step.num_tokens
        if num_new == len(seqs) + self.num_accepted:
            seconds = self.clock() - step.began
            num_tokens = num_new / len(seqs)
            self.length.add_step(
                len(seqs), step.length, seconds, step.draft_seconds, num_tokens=num_tokens
            )

    def can_draft(self, seq: Sequence) -> bool:
        """May a sequence have draft tokens, and has the draft model room for it?"""
        is_short = len(seq.token_ids) + MAX_ROWS <= self.longest
        return is_short and seq.params.allows_drafts and num_expected(seq) > 0

    def draft(self, seqs: list[Sequence], length: int) -> list[list[int]]:
        """At most `length` tokens for each sequence, drawn as the engine draws its own."""
        params = [
            self.llm.params_class(
                temperature=seq.params.temperature,
                top_k=seq.params.top_k,
                top_p=seq.params.top_p,
                min_p=seq.params.min_p,
                seed=seq.seed,
                sample_index=seq.params.sample_index + seq.index,
                max_tokens=min(length, num_expected(seq)),
                ignore_eos=True,
                stop_token_ids=tuple(seq.stop_token_ids | self.never),
            )
            for seq in seqs
        ]
        outputs = self.llm.generate([seq.token_ids for seq in seqs], params, use_tqdm=False)
        return [drop_end(output) for output in outputs]


class DraftEngine(Extension):
    """Closes the engine of a draft model with the one that it drafts for."""

    def __init__(self, llm: LLM):
        self.llm = llm

    def on_close(self) -> None:
        self.llm.close()


def num_expected(seq: Sequence) -> int:
    """Draft tokens that a text may still have use for: the last token is never computed."""
    most = seq.max_length - 1 - len(seq.token_ids)
    return max(0, min(most, NUM_EXPECTED + len(seq.output)))


def count_tokens(seqs: list[Sequence]) -> int:
    """The tokens of all sequences."""
    return sum([len(seq.token_ids) for seq in seqs])


def drop_end(output: dict) -> list[int]:
    """The tokens of an output without a stop token."""
    token_ids = output["token_ids"]
    return token_ids[:-1] if output["finish_reason"] == "stop" else token_ids


def open_draft(
    draft: str | PathLike | LLM, llm_class: type[LLM], tokenizer, arguments: SimpleNamespace
) -> LLM:
    """The engine of a draft model. draft: a model as LLM takes it, which is then computed as the
    target is (its quantization left out), or an engine; tokenizer, arguments: of the target. Raises
    ValueError if the models have different tokens, and what LLM raises."""
    if not isinstance(draft, LLM):
        return llm_class(
            draft,
            device=arguments.device,
            tokenizer=tokenizer,
            block_size=arguments.block_size,
            max_batch_size=MAX_ROWS,
            max_model_len=arguments.max_model_len,
            dtype=arguments.dtype,
            attention=arguments.attention,
            num_threads=arguments.num_threads,
            plain=arguments.plain,
        )
    if draft.tokenizer.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"draft={draft!r} has {draft.tokenizer.vocab_size} tokens and the model "
            f"{tokenizer.vocab_size}: give a model of the same tokenizer"
        )
    return draft
