"""Several steps at once: a step of a small model takes less time than Python before and after it.

    one by one    Python | kernels | Python | kernels | Python | kernels | Python ...
    several       Python | kernels, kernels, kernels | Python, Python, Python | kernels, ...

Where each sequence has one token to compute, and nothing but its draw decides about the next one,
steps are computed that are not planned yet, in one compiled call (multi_step.py), until a row ends
or its time is over. Then the plain loop goes through the same steps, one at a time, and finds the
tokens of each plan there already: books, traces and counts are those of single steps. A plan that
is another one than was foreseen is computed as usual, and what was foreseen is dropped.
"""

from __future__ import annotations

import time
from collections import deque

import torch
from torch import Tensor

from ..engine import LLM, Runner
from ..scheduler import Plan, Sequence

# a call takes, about, and where somebody reads a stream; aborts and new requests wait for its end
SECONDS, STREAMED = 0.04, 0.014


class SeveralLLM(LLM):
    """An LLM that takes several steps in a turn of its loop, for `generate` and `stream`; its
    Runner must be a SeveralRunner."""

    def _advance(self) -> None:
        runner, scheduler = self.runner, self.scheduler
        if not isinstance(runner, SeveralRunner):
            super()._advance()
            return
        requests = [self._requests[i] for i in {seq.request_id for seq in scheduler.running}]
        # nobody waits, nobody counts steps, and no feature looks at each token
        alone = not scheduler.waiting and not getattr(self, "overlap", False)
        alone = alone and all(r.owned and not self.watches(r) for r in requests)
        seconds = STREAMED if any(r.watched for r in requests) else SECONDS
        runner.seconds = seconds if alone else 0.0
        runner.foreseen.clear()  # of a turn that was left by an exception
        super()._advance()
        for _ in range(len(runner.foreseen)):
            if runner.foreseen:  # none, once a step was another one
                super()._advance()
        runner.take_back()

    def _recover(self, error: BaseException | None = None) -> None:
        """As in the core; the exception may have struck in a lock."""
        if isinstance(self.runner, SeveralRunner):
            self.runner.give_back()
        super()._recover(error)


class SeveralRunner(Runner):
    """A Runner that computes steps before they are planned, where it may and can foresee them."""

    seconds = 0.0  # that a launch may take for more than its own step

    def __init__(self, *args):
        super().__init__(*args)
        from . import multi_step, team  # which need numba

        self.multi_step, self.give_back = multi_step, team.give_back
        self.foreseen: deque[tuple[list, Tensor]] = deque()  # chunks and tokens of next steps
        self.granted: list[Sequence] = []  # got blocks for these
        self.pace = 0, 0.0  # rows, and the seconds of a step of so many, as measured last

    def launch(self, plan: Plan) -> None:
        chunks = [(seq, start) for seq, start, _ in plan.chunks]
        decodes = len(chunks) == len(plan.samples) == sum([c[2] - c[1] for c in plan.chunks])
        if not self.foreseen and self.seconds and decodes:
            self.foresee(plan)
        if self.foreseen:
            expected, tokens = self.foreseen.popleft()
            if decodes and chunks == expected and not plan.copies:
                plan.results["tokens"] = tokens
                if not self.foreseen:  # a trace shows it with the last step
                    self.take_back()
                for phase in "batch", "forward", "sample":
                    self.blocks.events.lap(phase)
                return
            self.foreseen.clear()
        began = time.perf_counter()
        super().launch(plan)
        if decodes:
            self.pace = len(chunks), max(time.perf_counter() - began, 1e-6)

    def foresee(self, plan: Plan) -> None:
        """Compute the step, and what comes after it, unless that is too little to be worth it."""
        seqs, blocks = [seq for _, seq, _ in plan.samples], self.blocks
        count = self.how_many(seqs)
        if count < 2 or plan.copies:
            return
        for seq in seqs:
            grown = blocks.grow(seq, len(seq.tokens) - 1, len(seq.tokens) + count - 1)
            assert grown, (seq.table, count, blocks.num_free)
        self.granted = seqs
        began = time.perf_counter()
        tokens = self.multi_step.compute(self.model, plan, self.cache, blocks, count)
        self.pace = len(seqs), max(time.perf_counter() - began, 1e-6) / len(tokens)
        for i, row in enumerate(torch.from_numpy(tokens)):
            self.foreseen.append(([(seq, start + i) for seq, start, _ in plan.chunks], row))

    def how_many(self, seqs: list[Sequence]) -> int:
        """Steps that fit in the time, in all texts, and in the pool."""
        model, blocks, (rows, seconds) = self.model, self.blocks, self.pace
        ready = rows and model.backend.is_ready()
        if not ready or not all(getattr(seq.params, "plain", True) for seq in seqs):
            return 0
        count = int(self.seconds / (seconds * max(1, len(seqs) / rows)))
        if count < 2:
            return 0
        count = min([count] + [seq.max_length - len(seq.tokens) for seq in seqs])
        while count > 1:
            stops = [(seq, len(seq.tokens) + count - 1) for seq in seqs]
            wanted = [max(0, blocks.blocks_for(stop) - len(seq.table)) for seq, stop in stops]
            if sum(wanted) <= blocks.num_free:
                break
            count //= 2
        return count

    def take_back(self) -> None:
        """Give back the blocks of steps that were foreseen and did not come."""
        blocks, granted, self.granted = self.blocks, self.granted, []
        for seq in granted:
            count = blocks.blocks_for(seq.num_computed)
            if gone := seq.table[count:].tolist():
                del seq.table[count:]
                seq.num_writable = 0
                for block in reversed(gone):
                    blocks.release(block)
                blocks.events.note("reject", seq, gone)


PARTS = {"llm": SeveralLLM, "runner": SeveralRunner}
