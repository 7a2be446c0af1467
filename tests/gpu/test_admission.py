"""Prompts in groups, gpu/admission.py, with the scheduler alone."""

import random

import pytest
from helpers.simulation import make_blocks

from microvllm import SamplingParams
from microvllm.gpu import admission
from microvllm.gpu.admission import in_groups
from microvllm.scheduler import Plan, Scheduler, Sequence, at_once


@pytest.fixture(autouse=True)
def groups_of_a_fourth(monkeypatch):
    monkeypatch.setattr(admission, "GROUPS", 4)


def work(count: int, n: int = 1) -> list[Sequence]:
    draw = random.Random(0)
    params = [SamplingParams(max_tokens=draw.randint(2, 60), n=n) for _ in range(count)]
    return [Sequence(i, draw.choices(range(99), k=5), p) for i, p in enumerate(params)]


def serve(
    may_admit, sequences: list[Sequence], batch: int, num_blocks=5000
) -> tuple[list[Plan], dict]:
    """All plans, and the samples of each request, until everything has ended."""
    scheduler = Scheduler(make_blocks(num_blocks - 1, 4), batch, 8 * batch, may_admit=may_admit)
    samples = {seq.request_id: [seq] for seq in sequences}
    for seq in sequences:
        scheduler.add(seq)
    plans = []
    while scheduler.running or scheduler.waiting:
        plans.append(scheduler.schedule())
        assert plans[-1].chunks
        for fork in plans[-1].forks:
            samples[fork.request_id].append(fork)
        drawn = [
            7 * draw.seq.request_id + draw.seq.index + draw.position for draw in plans[-1].draws
        ]
        scheduler.update(plans[-1], drawn)
        scheduler.blocks.check(scheduler.running)
    return plans, samples


def with_prompts(plans: list[Plan]) -> int:
    """Steps that compute more than one token of a sequence."""
    return sum(any(chunk.num_tokens > 1 for chunk in plan.chunks) for plan in plans)


@pytest.mark.parametrize("n, num_blocks", [(1, 5000), (3, 5000), (1, 150)])
def test_a_full_batch_gets_its_prompts_in_groups(n, num_blocks):
    plain, grouped = work(120 // n, n), work(120 // n, n)
    one_by_one, samples = serve(at_once, plain, 32, num_blocks)
    groups, grouped_samples = serve(in_groups, grouped, 32, num_blocks)
    for i in samples:
        assert len(samples[i]) == n
        assert [s.token_ids for s in samples[i]] == [s.token_ids for s in grouped_samples[i]]
    if num_blocks > 150:  # else memory says how many run
        assert with_prompts(groups) < 0.6 * with_prompts(one_by_one)
        assert len(groups) < 1.2 * len(one_by_one)


def test_nothing_waits_for_a_group_that_cannot_come_or_does_not_pay():
    scheduler = Scheduler(make_blocks(4999, 4), 32, 999, may_admit=in_groups)
    seqs = [Sequence(i, [i] * 5, SamplingParams(max_tokens=50)) for i in range(40)]

    def step(*new: Sequence, ends: Sequence) -> list[Sequence]:
        scheduler.abort([ends])
        for seq in new:
            scheduler.add(seq)
        plan = scheduler.schedule()
        scheduler.update(plan, [0] * len(plan.draws))
        return [chunk.seq for chunk in plan.chunks]

    assert len(step(*seqs[:32], ends=seqs[39])) == 32
    assert step(seqs[33], ends=seqs[1])[-1] is seqs[33]  # it is all that waits
    assert len(step(*seqs[34:37], ends=seqs[2])) == 31  # one place for three: later
    assert len(step(ends=seqs[3])) == 30
    assert step(ends=seqs[4])[-3:] == seqs[34:37]
