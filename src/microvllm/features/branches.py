"""Branches: a text is continued in several ways, for beam search, best-of-n and tree search.

A branch is a sequence that stops after some tokens and keeps its blocks. A fork of it shares all of
them, and the first of both that writes into the last, part-filled block copies it (blocks.py):

    root     The island was            blocks 3 7
    fork a   The island was small      blocks 3 9        9 is a copy of 7
    fork b   The island was far away   blocks 3 7

A branch that does not grow loses its blocks where other sequences need them. When it grows again,
it computes what the prefix cache does not have.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as List
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from ..engine import LLM, Request
from ..runner import Extension, Watcher
from ..scheduler import Scheduler, Sequence
from ..tokenizer import TextStream
from . import check_number

if TYPE_CHECKING:
    from ..params import SamplingParams


class Branch:
    """One way to continue a prompt. `Branches` makes and changes it.

    token_ids: of the output so far; logprobs: the model's log-probability of each of them, before
    temperature and filters, 0.0 of one that a tool wrote; alternatives: of the last token that was
    drawn, itself and others, as (token_id, logprob), the most likely first.
    """

    def __init__(self, request: Request, logprobs: Iterable[float] = ()):
        self.request = request
        self.seq = request.sequences[0]
        self.logprobs = list(logprobs)
        self.alternatives: list[tuple[int, float]] = []
        self.target_length = len(self.seq.token_ids)  # tokens, the prompt's too, at which it stops
        self.is_queued = False

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.seq.token_ids[: self.seq.num_prompt]

    @property
    def token_ids(self) -> list[int]:
        return self.seq.output

    @property
    def logprob(self) -> float:
        """The log-probability of the output: a sum."""
        return sum(self.logprobs)

    @property
    def text(self) -> str:
        """The output as text."""
        texts = self.request.texts
        return texts[self.seq.index].text if self.seq.index in texts else ""

    @property
    def finish_reason(self) -> str | None:
        """Why it can not grow: "stop", "length", "error", or "abort" if it was dropped."""
        return self.seq.finish_reason


class Branching(Extension):
    """Pauses branches that have grown enough."""

    def watch(self, request: Request, seq: Sequence, text: TextStream) -> Watcher | None:
        branch = request.options.get("branch")
        return None if branch is None else BranchWatcher(branch, self.engine.scheduler)


class BranchWatcher(Watcher):
    """Pauses a branch that has as many tokens as it should get."""

    def __init__(self, branch: Branch, scheduler: Scheduler):
        self.branch = branch
        self.scheduler = scheduler

    def on_token(self, seq: Sequence, token_id: int, new_text: str) -> None:
        has_ended = seq.finish_reason is not None or seq in self.scheduler.paused
        if len(seq.token_ids) >= self.branch.target_length and not has_ended:
            self.scheduler.pause(seq)


class Branches:
    """The branches of an engine: `with llm.branching() as branches:`. What is left at the end of
    the block is dropped. Other requests run in the same steps; `llm.is_finished` is False as long
    as there are branches."""

    def __init__(self, engine: LLM):
        self.engine = engine
        self.live: list[Branch] = []
        self.sample_indices = count(2**30)  # of forks: they draw other tokens than any request

    @property
    def num_blocks(self) -> int:
        """Different blocks that the branches hold."""
        return len({block for branch in self.live for block in branch.seq.block_table} - {0})

    # branches begin

    def start(self, prompt, params: SamplingParams | None = None) -> Branch:
        """A branch without output. prompt: a text or token ids; params: as for `generate`, with
        n=1; max_tokens limits the whole output; logprobs is the number of alternatives of each
        token. Raises ValueError or TypeError."""
        prompt_ids, params = self.engine.check(prompt, params)
        return self.make(prompt_ids, params)

    def resume(self, output: dict, params: SamplingParams, sample: int = 0) -> Branch:
        """A branch that continues a finished request. output: of `generate`; sample: index of the
        sample; params: as in `start`, max_tokens includes what the output has. A stop token at its
        end is removed. Raises ValueError or TypeError."""
        samples = output["samples"]
        made = samples[check_number("sample", sample, 0, len(samples) - 1)]
        token_ids = list(made["token_ids"])
        if made["finish_reason"] == "stop" and not isinstance(made["stop_reason"], str):
            token_ids.pop()
        prompt_ids, params = self.engine.check(output["prompt_token_ids"], params)
        if len(token_ids) >= params.max_tokens:
            has = f"the output has {len(token_ids)} tokens"
            raise ValueError(f"max_tokens={params.max_tokens}, and {has}: give a larger number")
        branch = self.make(prompt_ids, params)
        branch.seq.token_ids.extend(token_ids)
        for position, is_drawn in enumerate(made["mask"][: len(token_ids)], len(prompt_ids)):
            if not is_drawn:
                branch.seq.forced.add(position)
        branch.target_length = len(branch.seq.token_ids)
        if token_ids:  # else it is as one that was started
            branch.logprobs = self.score(branch.seq)
            self.engine.guard.perform(partial(self.hold, branch, None))
        return branch

    def fork_request(self, request_id: int, k: int = 1, sample: int = 0) -> list[Branch]:
        """k branches that continue an unfinished request as it is now. The request itself continues
        too, and only it calls tools. Raises KeyError if there is none, ValueError if the sample has
        ended or has no token yet."""
        check_number("k", k, 1)
        branches: list[Branch] = []
        self.engine.guard.perform(partial(self.fork_now, request_id, k, sample, branches))
        logprobs = self.score(branches[0].seq)
        for branch in branches:
            branch.logprobs = list(logprobs)
        return branches

    def fork_now(self, request_id: int, k: int, sample: int, branches: list[Branch]) -> None:
        """`fork_request`, under the guard."""
        self.engine.loop.drain()
        if request_id not in self.engine.requests:
            raise KeyError(f"request {request_id} is not unfinished: `resume` takes its output")
        request = self.engine.requests[request_id]
        begun = {seq.index: seq for seq in request.sequences if seq.output}
        source = begun.get(sample)
        if source is None or source.finish_reason is not None:
            state = "has ended" if source is not None else "has no token yet"
            raise ValueError(f"sample {sample} of request {request_id} {state}")
        params = replace(request.params, n=1)
        for _ in range(k):
            branches.append(self.copy(request.prompt, params, source, []))

    def score(self, seq: Sequence) -> list[float]:
        """The log-probabilities of a sequence's output, computed from its tokens."""
        (logprobs,) = self.engine.score([seq.token_ids[: seq.num_prompt]], [seq.output])
        positions = range(seq.num_prompt, len(seq.token_ids))
        pairs = zip(positions, logprobs, strict=True)
        return [0.0 if position in seq.forced else logprob for position, logprob in pairs]

    def make(
        self, prompt_ids: List[int], params: SamplingParams, logprobs: Iterable[float] = ()
    ) -> Branch:
        """A branch, not queued yet."""
        if params.n != 1:
            raise ValueError(f"n={params.n}: a branch is one sample; fork it")
        params = replace(params, logprobs=params.logprobs or 0)
        params.set("allows_drafts", False)  # it would get more tokens than it should
        request = self.engine.make_request(
            list(prompt_ids), params, is_owned=True, needs_text=True, options={}
        )
        branch = Branch(request, logprobs)
        request.options["branch"] = branch
        self.live.append(branch)
        return branch

    def copy(
        self, prompt_ids: List[int], params: SamplingParams, source: Sequence, logprobs: List[float]
    ) -> Branch:
        """A branch with the tokens of a sequence, whose blocks it shares. Under the guard."""
        params = replace(params, sample_index=next(self.sample_indices))
        branch = self.make(prompt_ids, params, logprobs)
        branch.seq.seed = source.seed
        branch.seq.token_ids = list(source.token_ids)
        branch.seq.forced = set(source.forced)
        branch.target_length = len(source.token_ids)
        self.hold(branch, source)
        return branch

    def hold(self, branch: Branch, source: Sequence | None) -> None:
        """Queue a branch and pause it, with the blocks of `source` if they end before the last
        token. Under the guard."""
        scheduler = self.engine.scheduler
        seq = branch.seq
        branch.is_queued = True
        self.engine.submit_requests_now([branch.request])
        scheduler.pause(seq)
        if source is not None and 0 < source.num_computed < len(seq.token_ids):
            scheduler.blocks.share_table(source, seq)
            seq.num_computed = source.num_computed
            seq.num_published = source.num_published
            seq.block_hashes = list(source.block_hashes)
        self.engine.find_or_open_text(seq).read(seq)

    # branches grow, and end

    def fork(self, branch: Branch, k: int = 1) -> list[Branch]:
        """k more branches with the output of this one, which stays. They draw other tokens. Raises
        ValueError if the branch has finished, or has no token yet."""
        check_number("k", k, 1)
        if branch.finish_reason is not None or not branch.token_ids:
            state = branch.finish_reason or "no tokens"
            raise ValueError(f"a branch with {state!r} cannot be forked: start another one")
        self.read_logprobs(branch)  # an exception may have interrupted `grow`
        forks: list[Branch] = []

        def add() -> None:
            for _ in range(k):
                request = branch.request
                forks.append(self.copy(request.prompt, request.params, branch.seq, branch.logprobs))

        self.engine.guard.perform(add)
        return forks

    def grow(self, branches: Iterable[Branch], num_tokens: int = 1) -> None:
        """Let branches grow by num_tokens, or until they finish, all in one batch."""
        num_tokens = check_number("num_tokens", num_tokens, 1)
        growing = [branch for branch in branches if branch.finish_reason is None]
        engine = self.engine

        def begin() -> None:
            for branch in growing:
                branch.target_length = len(branch.seq.token_ids) + num_tokens
                if not branch.is_queued:
                    branch.is_queued = True
                    engine.submit_requests_now([branch.request])
                elif branch.seq in engine.scheduler.paused:
                    engine.scheduler.resume(branch.seq)

        engine.guard.perform(begin)
        while any(is_growing(branch) for branch in growing):
            engine.guard.perform(engine.loop.advance)
        engine.guard.perform(engine.loop.drain)
        for branch in growing:
            self.read_logprobs(branch)

    def read_logprobs(self, branch: Branch) -> None:
        """Take over the log-probabilities of new tokens."""
        entries = self.engine.make_sample_output(branch.request, branch.seq)["logprobs"]
        for entry in entries[len(branch.logprobs) :]:
            branch.logprobs.append(0.0 if entry is None else entry["logprob"])
            if entry is not None:
                others = [(token_id, logprob) for token_id, logprob, _ in entry["top"]]
                pairs = [(entry["token_id"], entry["logprob"]), *others]
                branch.alternatives = sorted(pairs, key=lambda pair: -pair[1])

    def spread(self, branches: Iterable[Branch], k: int) -> list[Branch]:
        """Continue each branch by its k most likely next tokens: k new branches take the place of
        each, in their order; finished ones stay as they are. Raises ValueError unless the branches
        were started with logprobs=k at least."""
        check_number("k", k, 1)
        branches = list(branches)
        for branch in branches:
            if (branch.request.params.logprobs or 0) < k:
                raise ValueError(f"spread(k={k}) needs branches with logprobs={k} in their params")
        growing = [branch for branch in branches if branch.finish_reason is None]
        self.grow(growing)
        children: list[Branch] = []

        def replace_last() -> None:
            for branch in branches:
                if branch not in growing:
                    children.append(branch)
                    continue
                for token_id, logprob in branch.alternatives[:k]:
                    children.append(self.sibling(branch, token_id, logprob))

        self.engine.guard.perform(replace_last)
        self.drop(*growing)
        return children

    def sibling(self, branch: Branch, token_id: int, logprob: float) -> Branch:
        """A branch that differs in its last token. Under the guard."""
        request = branch.request
        source = branch.seq
        params = replace(request.params, sample_index=next(self.sample_indices))
        child = self.make(request.prompt, params, [*branch.logprobs[:-1], logprob])
        child.seq.seed = source.seed
        child.seq.token_ids = [*source.token_ids[:-1], token_id]
        child.seq.forced = set(source.forced)
        child.target_length = len(source.token_ids)
        self.hold(child, source)
        self.engine.scheduler.finish_if_done(child.seq)
        self.engine.collect_finished()
        return child

    def drop(self, *branches: Branch) -> None:
        """End branches, and free the blocks that no other one has. Their tokens stay readable."""
        self.engine.abort(*[branch.request.id for branch in branches if branch.is_queued])
        for branch in branches:
            if branch.finish_reason is None:
                branch.seq.finish_reason = "abort"
        dropped = set(branches)
        self.live = [branch for branch in self.live if branch not in dropped]

    def __enter__(self) -> Branches:
        return self

    def __exit__(self, *_) -> None:
        if not self.engine.guard.is_closed:
            self.drop(*self.live)


def is_growing(branch: Branch) -> bool:
    """Has a branch fewer tokens than it should get?"""
    return branch.finish_reason is None and len(branch.seq.token_ids) < branch.target_length
