"""Branches: several continuations of a text, for beam search and tree search.

A branch is a sequence that stops after some tokens and keeps its blocks. A fork shares all blocks
of its source. The first of the two to write into the part-filled last block copies it (blocks.py):

    root     The island was            blocks 3 7
    fork a   The island was small      blocks 3 9        9 is a copy of 7
    fork b   The island was far away   blocks 3 7

While a branch does not grow, other sequences may take its blocks. When it grows again, it computes
the tokens that are no longer in the prefix cache.
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
    """One continuation of a prompt. `Branches` makes and changes it.

    token_ids: the output so far; logprobs: the model's log-probability of each output token, before
    temperature and filters, and 0.0 for a token that a tool wrote; alternatives: the last drawn
    token and others at its position, as (token_id, logprob), the most likely first.
    """

    def __init__(self, request: Request, logprobs: Iterable[float] = ()):
        self.request = request
        self.seq = request.sequences[0]
        self.logprobs = list(logprobs)
        self.alternatives: list[tuple[int, float]] = []
        self.target_length = len(self.seq.token_ids)  # it pauses at this length, with prompt
        self.is_queued = False

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.seq.token_ids[: self.seq.num_prompt]

    @property
    def token_ids(self) -> list[int]:
        return self.seq.output

    @property
    def logprob(self) -> float:
        """The log-probability of the output, the sum of `logprobs`."""
        return sum(self.logprobs)

    @property
    def text(self) -> str:
        """The output as text."""
        texts = self.request.texts
        return texts[self.seq.index].text if self.seq.index in texts else ""

    @property
    def finish_reason(self) -> str | None:
        """Why the branch cannot grow: "stop", "length", "error", or "abort" if it was dropped."""
        return self.seq.finish_reason


class Branching(Extension):
    """Pauses branches at their target length."""

    def watch(self, request: Request, seq: Sequence, text: TextStream) -> Watcher | None:
        branch = request.options.get("branch")
        return None if branch is None else BranchWatcher(branch, self.engine.scheduler)


class BranchWatcher(Watcher):
    """Pauses a branch at its target length."""

    def __init__(self, branch: Branch, scheduler: Scheduler):
        self.branch = branch
        self.scheduler = scheduler

    def on_token(self, seq: Sequence, token_id: int, new_text: str) -> None:
        has_ended = seq.finish_reason is not None or seq in self.scheduler.paused
        if len(seq.token_ids) >= self.branch.target_length and not has_ended:
            self.scheduler.pause(seq)


class Branches:
    """The branches of an engine: `with llm.branching() as branches:`. The end of the block drops
    all branches. Other requests run in the same steps; `llm.is_finished` is False as long as there
    are branches."""

    def __init__(self, engine: LLM):
        self.engine = engine
        self.live: list[Branch] = []
        self.sample_indices = count(2**30)  # of forks: no request has the same random numbers

    @property
    def num_blocks(self) -> int:
        """The number of distinct blocks of all branches."""
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
        sample; params: as in `start`, and max_tokens includes the tokens of the output. A stop
        token at the end of the output is removed. Raises ValueError or TypeError."""
        samples = output["samples"]
        source = samples[check_number("sample", sample, 0, len(samples) - 1)]
        token_ids = list(source["token_ids"])
        if source["finish_reason"] == "stop" and not isinstance(source["stop_reason"], str):
            token_ids.pop()
        prompt_ids, params = self.engine.check(output["prompt_token_ids"], params)
        if len(token_ids) >= params.max_tokens:
            has = f"the output has {len(token_ids)} tokens"
            raise ValueError(f"max_tokens={params.max_tokens}, and {has}: give a larger number")
        branch = self.make(prompt_ids, params)
        branch.seq.token_ids.extend(token_ids)
        for position, is_drawn in enumerate(source["mask"][: len(token_ids)], len(prompt_ids)):
            if not is_drawn:
                branch.seq.forced.add(position)
        branch.target_length = len(branch.seq.token_ids)
        if token_ids:  # else the branch is like one from `start`
            branch.logprobs = self.score(branch.seq)
            self.engine.guard.perform(partial(self.hold, branch, None))
        return branch

    def fork_request(self, request_id: int, k: int = 1, sample: int = 0) -> list[Branch]:
        """k branches that continue the present text of an unfinished request. The request also
        continues, and only the request calls tools. Raises KeyError if no such request is
        unfinished, ValueError if the sample has ended or has no token yet."""
        check_number("k", k, 1)
        branches: list[Branch] = []
        self.engine.guard.perform(partial(self.fork_now, request_id, k, sample, branches))
        logprobs = self.score(branches[0].seq)
        for branch in branches:
            branch.logprobs = list(logprobs)
        return branches

    def fork_now(self, request_id: int, k: int, sample: int, branches: list[Branch]) -> None:
        """`fork_request`, called with the guard."""
        self.engine.loop.drain()
        if request_id not in self.engine.requests:
            remedy = "pass the output of a finished request to `resume`"
            raise KeyError(f"there is no unfinished request {request_id}: {remedy}")
        request = self.engine.requests[request_id]
        sequences = {seq.index: seq for seq in request.sequences if seq.output}
        source = sequences.get(sample)
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
            raise ValueError(f"n={params.n}: a branch is one sample; fork the branch")
        params = replace(params, logprobs=params.logprobs or 0)
        params.set("allows_drafts", False)  # they could exceed the target length
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
        """A branch with the tokens of a sequence, and with its blocks. Called with the guard."""
        params = replace(params, sample_index=next(self.sample_indices))
        branch = self.make(prompt_ids, params, logprobs)
        branch.seq.seed = source.seed
        branch.seq.token_ids = list(source.token_ids)
        branch.seq.forced = set(source.forced)
        branch.target_length = len(source.token_ids)
        self.hold(branch, source)
        return branch

    def hold(self, branch: Branch, source: Sequence | None) -> None:
        """Queue a branch and pause it. It shares the blocks of `source`, unless the source has
        already computed the last token of the branch. Called with the guard."""
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
        """k new branches with the output of this branch, which remains. They draw with other random
        numbers. Raises ValueError if the branch has finished, or has no token yet."""
        check_number("k", k, 1)
        if branch.finish_reason is not None:
            reason = f"finish_reason {branch.finish_reason!r}"
            raise ValueError(f"a branch with {reason} cannot be forked: start another one")
        if not branch.token_ids:
            raise ValueError("a branch without tokens cannot be forked: grow it first")
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
        """Read the log-probabilities of new tokens from the engine."""
        entries = self.engine.make_sample_output(branch.request, branch.seq)["logprobs"]
        for entry in entries[len(branch.logprobs) :]:
            branch.logprobs.append(0.0 if entry is None else entry["logprob"])
            if entry is not None:
                others = [(token_id, logprob) for token_id, logprob, _ in entry["top"]]
                pairs = [(entry["token_id"], entry["logprob"]), *others]
                branch.alternatives = sorted(pairs, key=lambda pair: -pair[1])

    def spread(self, branches: Iterable[Branch], k: int) -> list[Branch]:
        """Continue each branch with its k most likely next tokens: k new branches replace it, in
        the order of `branches`. Finished branches do not change. Raises ValueError if a branch has
        logprobs < k in its params."""
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
        """A branch with another last token. Called with the guard."""
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
        """End branches, and free their unshared blocks. Their tokens can still be read."""
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
    """Is a branch unfinished and shorter than its target length?"""
    return branch.finish_reason is None and len(branch.seq.token_ids) < branch.target_length
