"""Several steps in one compiled call: a step of a small model takes less time than Python needs
before and after it.

    one by one    Python | kernels | Python | kernels | Python | kernels | Python ...
    several       Python | kernels, kernels, kernels | Python, Python, Python | kernels, ...

Where each sequence has one token to compute, and nothing but its draw decides about the next one,
steps are computed that are not planned yet, in one call (cpu/backend.py), until a row ends or the
time of the call is over. Then the plain loop makes the same steps, one at a time, and finds the
tokens of each plan there already: scheduler, texts and traces are those of single steps. A plan
that differs from what was expected is computed as usual, and the other computed steps are dropped.
"""

from __future__ import annotations

import time
from collections import deque
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
from ..scheduler import Plan, Sequence

# A call takes about this long: aborts and new requests wait for its end. The second is for requests
# whose text is streamed.
SECONDS = 0.04
STREAM_SECONDS = 0.014


class MultiStepLoop(Loop):
    """Makes several steps in a turn, for `generate` and `stream`. The engine's runner must be a
    MultiStepRunner."""

    def advance(self) -> None:
        runner = self.engine.runner
        runner.seconds = self.seconds_for_more()
        runner.computed.clear()  # of a turn that an exception has left
        super().advance()
        for _ in range(len(runner.computed)):
            if runner.computed:  # they are dropped when a plan is not the expected one
                super().advance()
        runner.free_blocks()

    def seconds_for_more(self) -> float:
        """Seconds for steps that are not planned yet. 0: none are computed, because sequences wait,
        or the caller counts steps, or an extension watches each token."""
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
        """Drop the computed steps. The exception may have struck while the thread team was
        locked."""
        self.engine.runner.forget()
        team.give_back()


def is_watched(request: Request) -> bool:
    """Does an extension see each token of the request? Its text is there from the first token on,
    and steps that are not planned yet begin after that."""
    return any(text.watchers for text in request.texts.values())


class ComputedStep(NamedTuple):
    """A step that was computed before it was planned."""

    starts: list[tuple[Sequence, int]]  # the chunks that its plan has, of one token each
    token_ids: Tensor  # (chunks,)


class MultiStepRunner(Runner):
    """Computes steps before they are planned, where it may, and knows what they will be. model: a
    FusedGPT whose backend has compiled it."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seconds = 0.0  # that a launch may take for more than its own step
        self.computed: deque[ComputedStep] = deque()  # the next steps
        self.grown: list[Sequence] = []  # these have blocks for the next steps
        # as measured last: rows of a step, and its seconds
        self.measured_rows = 0
        self.measured_seconds = 0.0

    def launch(self, plan: Plan) -> None:
        """As in Runner. A step that was computed before has its tokens already."""
        starts = [(seq, start) for seq, start, _, _ in plan.chunks]
        is_decode = len(starts) == len(plan.draws) == plan.num_tokens
        if self.seconds and is_decode and not self.computed:
            self.compute_ahead(plan, starts)
        if self.computed:
            step = self.computed.popleft()
            if is_decode and starts == step.starts and not plan.copies:
                plan.results["token_ids"] = step.token_ids
                if not self.computed:  # before the last step ends: a trace shows it there
                    self.free_blocks()
                return
            self.computed.clear()
        began = time.perf_counter()
        super().launch(plan)
        if is_decode:
            self.measure(num_rows=len(starts), seconds=time.perf_counter() - began)

    def compute_ahead(self, plan: Plan, starts: list[tuple[Sequence, int]]) -> None:
        """Compute a step and those after it, unless there are too few of them to be worth it."""
        seqs = [seq for seq, _ in starts]
        num_steps = self.choose_num_steps(seqs)
        if num_steps < 2 or plan.copies:
            return
        for seq in seqs:
            start = len(seq.token_ids) - 1
            has_grown = self.blocks.grow(seq, start, start + num_steps)
            assert has_grown, (seq.block_table, num_steps, self.blocks.pool.num_free)
        self.grown = seqs
        began = time.perf_counter()
        token_ids = compute_steps(self.model, plan, self.cache, self.blocks, num_steps)
        self.measure(len(seqs), (time.perf_counter() - began) / len(token_ids))
        for offset, row in enumerate(torch.from_numpy(token_ids)):
            expected = [(seq, start + offset) for seq, start in starts]
            self.computed.append(ComputedStep(expected, row))

    def choose_num_steps(self, seqs: list[Sequence]) -> int:
        """Steps that fit in the time, in all texts, and in the pool. 0 or 1: it is no use."""
        # a live module's weights may have changed to what is not compiled
        is_able = self.model.compiled is not None and self.model.backend.is_ready()
        if self.measured_rows == 0 or not is_able or not all(seq.params.is_plain for seq in seqs):
            return 0
        seconds = self.measured_seconds * max(1, len(seqs) / self.measured_rows)
        num_steps = int(self.seconds / seconds)
        if num_steps < 2:
            return 0
        num_steps = min([num_steps] + [seq.max_length - len(seq.token_ids) for seq in seqs])
        while num_steps > 1 and self.num_new_blocks(seqs, num_steps) > self.blocks.pool.num_free:
            num_steps //= 2
        return num_steps

    def num_new_blocks(self, seqs: list[Sequence], num_steps: int) -> int:
        """Blocks that sequences need for num_steps steps, beside those that they have."""
        num_new_blocks = 0
        for seq in seqs:
            num_needed = self.blocks.blocks_for(len(seq.token_ids) + num_steps - 1)
            num_new_blocks += max(0, num_needed - len(seq.block_table))
        return num_new_blocks

    def measure(self, num_rows: int, seconds: float) -> None:
        """Note how long a step has taken."""
        self.measured_rows = num_rows
        self.measured_seconds = max(seconds, 1e-6)

    def free_blocks(self) -> None:
        """Free the blocks for steps that were computed and do not come."""
        grown = self.grown
        self.grown = []
        for seq in grown:
            if len(seq.block_table) > self.blocks.blocks_for(seq.num_computed):
                self.blocks.truncate(seq, seq.num_computed)

    def forget(self) -> None:
        """Drop what was computed, after an error: all blocks are free then."""
        self.computed.clear()
        self.grown = []


def compute_steps(
    model: FusedGPT, plan: Plan, cache: PagedKVCache, blocks: BlockManager, num_steps: int
) -> np.ndarray:
    """Compute a plan in which each sequence has one token and a draw, and what comes after it, for
    which the blocks are there.

    Returns the token ids (steps, sequences): of at most num_steps steps, fewer if a sequence ends.
    """
    batch = make_batch(plan, blocks)
    seqs = plan.draws.seqs
    # all that is random, as in make_batch
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


def stop_table(seqs: tuple[Sequence, ...], vocab_size: int) -> np.ndarray:
    """(sequences, n) int32: the stop tokens of each, and -1 where it has fewer."""
    rows = [[i for i in seq.stop_token_ids if i < vocab_size] for seq in seqs]
    table = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for row, stop_token_ids in zip(table, rows, strict=True):
        row[: len(stop_token_ids)] = stop_token_ids
    return table
