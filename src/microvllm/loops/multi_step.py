"""Computes several steps in one compiled call, because a step of a small model takes less time than
the Python code before and after it.

    one by one    Python | kernels | Python | kernels | Python | kernels | Python ...
    several       Python | kernels, kernels, kernels | Python, Python, Python | kernels, ...

This requires that each sequence has one token to compute, and that only its draw decides the next
token. Then one call (cpu/backend.py) computes steps that are not planned yet, until a sequence ends
or the time limit of the call is reached. Afterwards the plain loop plans the same steps one by one,
and takes the tokens that are computed already. So scheduler, texts and traces see single steps. If
a plan differs from the expected one, it is computed as usual, and the other computed steps are
dropped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as List
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..attention import PagedKVCache, make_batch
from ..blocks import BlockManager
from ..cpu import elementwise, team
from ..engine import Loop, Request
from ..fused.model import FusedGPT
from ..runner import Runner
from ..sampler import uniform_numbers
from ..scheduler import DraftProposer, Plan, Sequence

# Time limits of a call in seconds, because aborts and new requests wait until it ends. The second
# limit applies if text is streamed.
SECONDS = 0.04
STREAM_SECONDS = 0.014


class MultiStepLoop(Loop):
    """Runs several steps per call of `advance`, for `generate` and `stream`. It requires a
    MultiStepRunner."""

    def advance(self) -> None:
        runner = self.engine.runner
        runner.seconds = self.seconds_for_more()
        runner.proposer = self.engine.scheduler.proposer
        runner.computed.clear()  # an exception may have left some
        super().advance()
        for _ in range(len(runner.computed)):
            if runner.computed:  # they are dropped when a plan differs from the expected one
                super().advance()
        runner.free_blocks()

    def seconds_for_more(self) -> float:
        """Return the seconds for steps that are not planned yet. 0, if sequences are waiting, a
        caller runs the steps itself, or an extension sees each token: then compute none."""
        scheduler = self.engine.scheduler
        if scheduler.waiting:
            return 0.0
        request_ids = {seq.request_id for seq in scheduler.running}
        requests = [self.engine.requests[request_id] for request_id in request_ids]
        if not all(request.is_owned and not is_watched(request) for request in requests):
            return 0.0
        is_streamed = any(request.needs_text for request in requests)
        return STREAM_SECONDS if is_streamed else SECONDS

    def forget(self) -> None:
        """Drop the computed steps, and release the thread team's lock, which an exception may have
        left locked."""
        self.engine.runner.forget()
        team.give_back()


def is_watched(request: Request) -> bool:
    """Return whether an extension sees each token of the request. Texts are made at the first
    token, which is before the first step that is computed ahead of its plan."""
    return any(text.watchers for text in request.texts.values())


class ComputedStep(NamedTuple):
    """A step that is computed before it is planned."""

    starts: list[tuple[Sequence, int]]  # the chunks of the expected plan, of one token each
    token_ids: Tensor  # (chunks,)


class MultiStepRunner(Runner):
    """Computes steps before they are planned, if possible. model: a FusedGPT that its backend has
    compiled."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seconds = 0.0  # time for further steps in a launch
        self.proposer: DraftProposer | None = None
        self.computed: deque[ComputedStep] = deque()  # the next steps
        self.grown: list[Sequence] = []  # sequences that have blocks for the next steps
        # last measurement: rows of a step, and its seconds
        self.measured_rows = 0
        self.measured_seconds = 0.0

    def launch(self, plan: Plan) -> None:
        """See Runner. A step that is computed already only returns its tokens."""
        starts = starts_of(plan)
        if starts and self.seconds and not self.computed:
            self.compute_ahead(plan, starts)
        if self.computed and self.take_computed(plan, starts):
            return
        start_time = time.perf_counter()
        super().launch(plan)
        if starts:
            self.note_time(num_rows=len(starts), seconds=time.perf_counter() - start_time)

    def take_computed(self, plan: Plan, starts: list[tuple[Sequence, int]]) -> bool:
        """Give the plan the tokens of the next computed step. If the plan differs from the expected
        one, drop all computed steps and return False."""
        step = self.computed.popleft()
        if starts != step.starts or plan.copies:
            self.computed.clear()
            return False
        plan.results["token_ids"] = step.token_ids
        if not self.computed:  # free now, so that a trace shows it in the last step
            self.free_blocks()
        return True

    def compute_ahead(self, plan: Plan, starts: list[tuple[Sequence, int]]) -> None:
        """Compute the step of the plan and later steps, unless this would be fewer than two."""
        seqs = [seq for seq, _ in starts]
        num_steps = self.choose_num_steps(seqs)
        if num_steps < 2 or plan.copies:
            return
        for seq in seqs:
            start = len(seq.token_ids) - 1
            has_grown = self.blocks.grow(seq, start, start + num_steps)
            assert has_grown, (seq.block_table, num_steps, self.blocks.pool.num_free)
        self.grown = seqs
        start_time = time.perf_counter()
        token_ids = compute_steps(self.model, plan, self.cache, self.blocks, num_steps)
        self.note_time(len(seqs), (time.perf_counter() - start_time) / len(token_ids))
        for offset, row in enumerate(torch.from_numpy(token_ids)):
            expected = [(seq, start + offset) for seq, start in starts]
            self.computed.append(ComputedStep(expected, row))

    def choose_num_steps(self, seqs: list[Sequence]) -> int:
        """Return the number of steps for which time, the length limits of all sequences, and the
        pool are sufficient. 0 or 1: compute no further steps."""
        # a live module's new weights may be in a form that is not compiled
        is_able = self.model.compiled is not None and self.model.backend.is_ready()
        if (
            self.measured_rows == 0
            or not is_able
            or not all(seq.params.has_plain_logits for seq in seqs)
        ):
            return 0
        seconds = self.measured_seconds * max(1, len(seqs) / self.measured_rows)
        num_steps = int(self.seconds / seconds)
        if num_steps < 2:
            return 0
        num_steps = min([num_steps] + [seq.max_length - len(seq.token_ids) for seq in seqs])
        if self.proposer is not None:
            num_steps = min(num_steps, self.proposer.num_quiet_steps())
        while num_steps > 1 and self.num_new_blocks(seqs, num_steps) > self.blocks.pool.num_free:
            num_steps //= 2
        return num_steps

    def num_new_blocks(self, seqs: list[Sequence], num_steps: int) -> int:
        """Return how many blocks sequences need for num_steps steps, in addition to their own."""
        num_new_blocks = 0
        for seq in seqs:
            num_needed = self.blocks.blocks_for(len(seq.token_ids) + num_steps - 1)
            num_new_blocks += max(0, num_needed - len(seq.block_table))
        return num_new_blocks

    def note_time(self, num_rows: int, seconds: float) -> None:
        """Record the duration of a step."""
        self.measured_rows = num_rows
        self.measured_seconds = max(seconds, 1e-6)

    def free_blocks(self) -> None:
        """Free the blocks that were allocated for steps which are not used."""
        grown = self.grown
        self.grown = []
        for seq in grown:
            if len(seq.block_table) > self.blocks.blocks_for(seq.num_computed):
                self.blocks.truncate(seq, seq.num_computed)

    def forget(self) -> None:
        """Drop computed steps after an error, when all blocks are free."""
        self.computed.clear()
        self.grown = []


def compute_steps(
    model: FusedGPT, plan: Plan, cache: PagedKVCache, blocks: BlockManager, num_steps: int
) -> np.ndarray:
    """Compute a plan in which each sequence has one token and one draw, and the steps after it, for
    which blocks are allocated.

    Returns the token ids (steps, sequences) of at most num_steps steps, fewer if a sequence ends.
    """
    batch = make_batch(plan, blocks)
    seqs = plan.draws.seqs
    # random numbers as in make_batch
    positions = batch.seq_lens + np.arange(num_steps)[:, None]  # (steps, sequences)
    uniform = uniform_numbers(
        seeds=np.tile(np.array([seq.seed for seq in seqs], np.uint64), num_steps),
        sample_indices=np.tile([seq.params.sample_index + seq.index for seq in seqs], num_steps),
        positions=positions.ravel(),
    )
    scale, filters = elementwise.draw_values(plan.params, batch.temperature)
    return model.compiled.several(
        batch,
        cache,
        uniform=uniform.reshape(positions.shape),
        scale=scale,
        filters=filters,
        stops=stop_table(seqs, model.config.vocab_size),
        count=num_steps,
    )


def starts_of(plan: Plan) -> list[tuple[Sequence, int]]:
    """Return the sequence and the first position of each chunk; an empty list unless each chunk has
    one token and one draw."""
    starts = [(seq, start) for seq, start, _, _ in plan.chunks]
    return starts if len(starts) == len(plan.draws) == plan.num_tokens else []


def stop_table(seqs: List[Sequence], vocab_size: int) -> np.ndarray:
    """Return (sequences, n) int32: the stop tokens of each sequence, padded with -1."""
    rows = [[i for i in seq.stop_token_ids if i < vocab_size] for seq in seqs]
    table = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for row, stop_token_ids in zip(table, rows, strict=True):
        row[: len(stop_token_ids)] = stop_token_ids
    return table
