"""A smaller model drafts tokens, and the engine's model verifies several in one step.

Speculative decoding (Leviathan et al. 2023; Chen et al. 2023) with a model of the same tokenizer:
`LLM("sft:d20", draft="base:d6")`. The draft model is an engine of its own, and its prefix cache
contains the texts so far. It draws with the temperature, the filters and the seed of the request,
so with the same uniform random numbers: where the distributions of both models are similar, the
same number usually selects the same token. A draft token is accepted only if the engine draws it,
too, so the output is the same as without a draft model.

Drafts must save time. `DraftLength` measures how many draft tokens are right and how long drafts
and steps take, and chooses how many tokens to draft next, perhaps none:

    tokens of a step with k draft tokens, if a share a of them is right    1 + a + ... + a^k
    its time                                                               k d + s(k)

    d: time to draft a token; s(k): time of a step that verifies k tokens

While drafts save no time, trials may take 1 % of it: the text may have become easier.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from collections.abc import Sequence as List
from math import ceil
from os import PathLike
from time import perf_counter
from types import SimpleNamespace
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

from ..engine import LLM
from ..runner import Extension
from ..sampler import SamplingParams
from ..scheduler import DraftProposer, Sequence
from ..tokenizer import Tokenizer

MAX_ROWS = 12  # up to this number of rows, a step reads the weights once (cpu/gemm.py)
ACCEPTANCE = 0.7  # assumed until it is measured
NUM_MEASURED = 64  # tokens of the prompt that is computed to measure the draft model
# a text is expected to grow by this number plus its number of output tokens, if max_tokens allows
NUM_EXPECTED = 64
# the weight of the latest measurement in an average, and the factor of earlier drafts in the
# acceptance
WEIGHT = 0.1
DECAY = 0.95
NUM_PLAIN = 8  # steps without drafts, to measure their time: several may be one call
PLAIN_EVERY = 256  # every 256th choice measures that time again
TRIAL_SHARE = 0.01  # share of the time that trials of drafts may lose
MAX_TRIALS = 4  # one after the other
MAX_IDLE = 256  # steps without drafts before the next choice


class Average:
    """A mean of seconds that follows changes. A larger value than twice the mean counts as
    twice the mean, because the process may have been stopped for a while."""

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
    """An average for each key. A key may have no value yet."""

    def __init__(self):
        self.by_key: dict[tuple[int, ...], Average] = {}

    def add(self, key: tuple[int, ...], seconds: float) -> None:
        """Add a measurement."""
        self.by_key.setdefault(key, Average()).add(seconds)

    def get(self, key: tuple[int, ...], default: float) -> float:
        """The seconds of a key, or the default if there are none."""
        return self.by_key[key].seconds if key in self.by_key else default


class Choice(NamedTuple):
    """`length` draft tokens for each sequence, in each of `num_steps` steps."""

    length: int
    num_steps: int = 1


class DraftLength:
    """Chooses how many tokens to draft for each of n sequences. limit: the largest number."""

    def __init__(self, limit: int):
        self.limit = limit
        self.num_tried = 2.0  # verified draft tokens; earlier ones count less
        self.num_right = ACCEPTANCE * self.num_tried
        self.step_seconds = Averages()  # by (n, draft tokens of each)
        self.draft_seconds = Averages()  # to draft a token for each, by (n,)
        self.catch_up_seconds = Averages()  # to compute a missing token, by ()
        self.num_choices = 0
        self.trial_seconds = 0.0  # that trials may take

    @property
    def acceptance(self) -> float:
        """The share of correct draft tokens among those that follow only correct ones."""
        return self.num_right / self.num_tried

    def choose(self, num_seqs: int, most: int, num_behind: int, num_left: int) -> Choice:
        """Choose how many tokens to draft for each of num_seqs sequences, at most `most`.
        num_behind: the number of their tokens that the draft model has not computed; num_left: the
        number of tokens by which each of them is expected to grow."""
        self.num_choices += 1
        plain = self.step_seconds.get((num_seqs, 0), 0.0)
        if plain == 0 or self.num_choices % PLAIN_EVERY == 0:
            return Choice(0, NUM_PLAIN)
        catch_up = num_behind * self.catch_up_seconds.get((), 0.0)
        lengths = range(1, min(self.limit, most) + 1)
        times = {length: self.seconds_per_token(num_seqs, length) for length in lengths}
        best = min(times, key=times.__getitem__, default=0)
        if best == 0:
            return Choice(0)
        if (plain - times[best]) * num_left > catch_up:
            return Choice(best)
        loss = catch_up + max(0.0, self.seconds(num_seqs, 1) - plain)  # at most, by a trial
        self.trial_seconds = min(self.trial_seconds, MAX_TRIALS * loss)
        missing = loss - self.trial_seconds
        if missing <= 0:
            return Choice(1)
        return Choice(0, min(MAX_IDLE, ceil(missing / (TRIAL_SHARE * plain))))

    def seconds(self, num_seqs: int, length: int) -> float:
        """The time of a step with `length` draft tokens for each sequence, and of drafting them.
        A step that was not measured is assumed to take as long as one with fewer draft tokens."""
        step = self.step_seconds.get((num_seqs, 0), 0.0)
        for shorter in range(1, length + 1):
            step = self.step_seconds.get((num_seqs, shorter), step)
        draft = self.draft_seconds.get((num_seqs,), self.draft_seconds.get((1,), 0.0))
        return length * draft + step

    def seconds_per_token(self, num_seqs: int, length: int) -> float:
        """The time in which each sequence grows by a token if `length` tokens are drafted."""
        num_tokens = sum([self.acceptance**i for i in range(length + 1)])
        return self.seconds(num_seqs, length) / num_tokens

    def add_draft(self, num_seqs: int, length: int, num_behind: int, seconds: float) -> None:
        """Record the time to draft `length` tokens for each of num_seqs sequences."""
        if num_behind <= num_seqs * MAX_ROWS:  # only the tokens of the last step
            self.draft_seconds.add((num_seqs,), seconds / length)
            return
        draft = self.draft_seconds.get((num_seqs,), self.draft_seconds.get((1,), 0.0))
        self.catch_up_seconds.add((), max(0.0, seconds - length * draft) / num_behind)

    def add_steps(self, num_seqs: int, choice: Choice, seconds: float) -> None:
        """Record the time of the steps of a choice, without drafting."""
        self.step_seconds.add((num_seqs, choice.length), seconds / choice.num_steps)
        self.trial_seconds += TRIAL_SHARE * seconds

    def add_loss(self, num_seqs: int, seconds: float, num_tokens: float) -> None:
        """Record the time of a step with its drafts, in which each sequence grew by num_tokens on
        average. If steps without drafts are faster, subtract the loss from the time for trials."""
        lost = seconds - num_tokens * self.step_seconds.get((num_seqs, 0), 0.0)
        self.trial_seconds -= max(0.0, lost)

    def add_verified(self, num_proposed: int, num_accepted: int) -> None:
        """Record that the first num_accepted tokens of a draft were right."""
        self.num_tried = DECAY * self.num_tried + min(num_accepted + 1, num_proposed)
        self.num_right = DECAY * self.num_right + num_accepted


class Steps(NamedTuple):
    """The steps of a choice, while they are computed."""

    began: float  # clock seconds, after drafting
    seqs: tuple[ref[Sequence], ...]
    num_tokens: int  # of all of them
    choice: Choice
    draft_seconds: float


class DraftModel(DraftProposer):
    """Proposes tokens that a draft model generates.

    llm: the engine of the draft model; never: token ids that are not proposed, because the result
    of a tool follows them; clock: returns seconds.
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
        self.steps: Steps | None = None
        self.num_planned = 0  # of self.steps, the number of planned steps
        self.num_accepted = 0  # draft tokens that were right in them
        self.longest = llm.max_positions - 1  # text for which it can draft
        self.length = DraftLength(MAX_ROWS - 1)
        self.measure()

    def measure(self) -> None:
        """Measure the time of the draft model for an output token and for a prompt token, so that a
        draft model that is too slow is not used at all."""
        num_prompt = max(1, min(NUM_MEASURED, self.longest - MAX_ROWS))
        for token_id in (0, 1):  # the first round loads kernels
            draft_length = DraftLength(MAX_ROWS - 1)
            for length, num_behind in ((MAX_ROWS - 1, 1), (1, num_prompt)):
                prompt = [token_id] * num_behind
                params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
                start = self.clock()
                self.llm.generate([prompt], params, use_tqdm=False)
                draft_length.add_draft(1, length, num_behind, self.clock() - start)
        self.length = draft_length

    def prepare(self, seqs: list[Sequence], num_rows: int) -> None:
        """Draft tokens for all sequences at once, if that saves time."""
        self.drafts = {}
        refs = tuple(map(ref, seqs))
        steps = self.steps
        if steps is not None and steps.seqs == refs:
            if self.num_planned < steps.choice.num_steps:
                self.num_planned += 1
                return
            self.measure_steps(steps, seqs)
        self.steps = None  # after an exception, nothing is measured
        draftable = [seq for seq in seqs if self.can_draft(seq)]
        choice = Choice(0)
        draft_seconds = 0.0
        if draftable:
            num_behind = sum([len(seq.token_ids) - self.num_known.get(seq, 0) for seq in draftable])
            num_left = min([num_expected(seq) for seq in draftable])
            choice = self.length.choose(len(seqs), num_rows // len(seqs), num_behind, num_left)
        if choice.length > 0:
            start = self.clock()
            drafts = self.draft(draftable, choice.length)
            draft_seconds = self.clock() - start
            self.length.add_draft(len(draftable), choice.length, num_behind, draft_seconds)
            self.num_known.update({seq: len(seq.token_ids) for seq in draftable})
            self.drafts = dict(zip(draftable, drafts, strict=True))
        self.num_planned = 1
        self.num_accepted = 0
        self.steps = Steps(self.clock(), refs, count_tokens(seqs), choice, draft_seconds)

    def num_quiet_steps(self) -> int:
        if self.steps is None or self.steps.choice.length > 0:
            return 0
        return self.steps.choice.num_steps - self.num_planned + 1

    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        return self.drafts.pop(seq, [])[:max_tokens]

    def learn(self, seq: Sequence, draft: List[int], num_accepted: int) -> None:
        self.num_accepted += num_accepted
        self.length.add_verified(len(draft), num_accepted)

    def measure_steps(self, steps: Steps, seqs: list[Sequence]) -> None:
        """Record the time of steps, unless other steps came between them."""
        num_new = count_tokens(seqs) - steps.num_tokens
        if num_new != len(seqs) * steps.choice.num_steps + self.num_accepted:
            return
        seconds = self.clock() - steps.began
        self.length.add_steps(len(seqs), steps.choice, seconds)
        if steps.choice.length > 0:
            seconds += steps.draft_seconds
            self.length.add_loss(len(seqs), seconds, num_tokens=num_new / len(seqs))

    def can_draft(self, seq: Sequence) -> bool:
        """Can a sequence use draft tokens, and does its text fit into the draft model's context?"""
        has_space = len(seq.token_ids) + MAX_ROWS <= self.longest and not self.llm.guard.is_closed
        return has_space and seq.params.allows_drafts and num_expected(seq) > 0

    def draft(self, seqs: list[Sequence], length: int) -> list[list[int]]:
        """At most `length` tokens for each sequence, drawn as the engine draws its own."""
        params = [
            SamplingParams(
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
    """Closes the engine of a draft model when the main engine closes."""

    def __init__(self, llm: LLM):
        self.llm = llm

    def on_close(self) -> None:
        self.llm.close()


def num_expected(seq: Sequence) -> int:
    """The number of draft tokens that a text can still use. The last token of a text is never an
    input, so it needs no draft."""
    most = seq.max_length - 1 - len(seq.token_ids)
    return max(0, min(most, NUM_EXPECTED + len(seq.token_ids) - seq.num_prompt))


def count_tokens(seqs: list[Sequence]) -> int:
    """The tokens of all sequences."""
    return sum([len(seq.token_ids) for seq in seqs])


def drop_end(output: dict) -> list[int]:
    """The tokens of an output without a stop token."""
    token_ids = output["token_ids"]
    return token_ids[:-1] if output["finish_reason"] == "stop" else token_ids


def open_draft(
    llm_class: type[LLM], model, tokenizer: Tokenizer, arguments: SimpleNamespace
) -> LLM:
    """Open the engine of the draft model arguments.draft: an engine, or a model in any form that
    LLM accepts. Such a model runs with the arguments of the target, without quantization.

    llm_class: of the new engine; model, tokenizer, arguments: of the target. Raises ValueError if
    the draft model has other tokens or a shorter context, and the errors of LLM.
    """
    draft = arguments.draft
    if not isinstance(draft, LLM):
        draft = llm_class(
            draft,
            tokenizer_path=arguments.tokenizer_path,
            tokenizer=None if arguments.tokenizer is None else tokenizer,
            trust_tokenizer=arguments.trust_tokenizer,
            device=arguments.device,
            block_size=arguments.block_size,
            max_batch_size=MAX_ROWS,
            dtype=arguments.dtype,
            attention=arguments.attention,
            num_threads=arguments.num_threads,
            plain=arguments.plain,
        )
    check_tokens(arguments.draft, draft.tokenizer, tokenizer)
    max_model_len = arguments.max_model_len or model.config.sequence_len
    if draft.max_model_len < max_model_len:
        raise ValueError(
            f"draft={arguments.draft!r} has a context of {draft.max_model_len} tokens, which is "
            f"shorter than the model's, {max_model_len}: give max_model_len={draft.max_model_len} "
            f"for both, or draft=LLM(..., max_model_len={max_model_len})"
        )
    return draft


def check_tokens(draft: str | PathLike | LLM, tokenizer: Tokenizer, expected: Tokenizer) -> None:
    """Raises ValueError if a draft model's tokenizer is not the expected one, the target's."""
    remedy = "give a draft model of the same tokenizer"
    if tokenizer.vocab_size != expected.vocab_size:
        raise ValueError(
            f"draft={draft!r} has {tokenizer.vocab_size} tokens and the model "
            f"{expected.vocab_size}: {remedy}"
        )
    if tokenizer is expected:
        return
    for token_id in range(expected.vocab_size):
        token = tokenizer.token_bytes(token_id)
        if token != expected.token_bytes(token_id):
            raise ValueError(
                f"draft={draft!r} has another tokenizer: token {token_id} is {token!r} there and "
                f"{expected.token_bytes(token_id)!r} for the model; {remedy}"
            )
