"""Prompts in groups, gpu/admission.py, with the scheduler alone."""

import random

import pytest

from microvllm import SamplingParams
from microvllm.gpu import admission
from microvllm.gpu.admission import GroupScheduler
from microvllm.scheduler import BlockManager, Plan, Scheduler, Sequence


@pytest.fixture(autouse=True)
def groups_of_a_fourth(monkeypatch):
    monkeypatch.setattr(admission, "GROUPS", 4)


def work(count: int, n: int = 1) -> list[Sequence]:
    draw = random.Random(0)
    params = [SamplingParams(max_tokens=draw.randint(2, 60), n=n) for _ in range(count)]
    return [Sequence(i, draw.choices(range(99), k=5), p) for i, p in enumerate(params)]


def serve(kind: type, sequences: list[Sequence], batch: int, num_blocks=5000) -> list[Plan]:
    """All plans until everything has ended."""
    scheduler = kind(BlockManager(num_blocks, 4), batch, 8 * batch)
    for seq in sequences:
        scheduler.add(seq)
    plans = []
    while scheduler.running or scheduler.waiting:
        plans.append(scheduler.schedule())
        assert plans[-1].chunks
        drawn = [7 * seq.request_id + seq.sample_id + at for _, seq, at in plans[-1].samples]
        scheduler.update(plans[-1], drawn)
        scheduler.blocks.check(scheduler.running)
    return plans


def with_prompts(plans: list[Plan]) -> int:
    """Steps that compute more than one token of a sequence."""
    return sum(any(stop - start > 1 for _, start, stop in plan.chunks) for plan in plans)


@pytest.mark.parametrize("n, num_blocks", [(1, 5000), (3, 5000), (1, 150)])
def test_a_full_batch_gets_its_prompts_in_groups(n, num_blocks):
    plain, grouped = work(120 // n, n), work(120 // n, n)
    one_by_one = serve(Scheduler, plain, 32, num_blocks)
    groups = serve(GroupScheduler, grouped, 32, num_blocks)
    for a, b in zip(plain, grouped, strict=True):
        assert [s.tokens for s in a.samples] == [s.tokens for s in b.samples]
    if num_blocks > 150:  # else memory says how many run
        assert with_prompts(groups) < 0.6 * with_prompts(one_by_one)
        assert len(groups) < 1.2 * len(one_by_one)


def test_nobody_waits_for_a_group_that_cannot_come_or_does_not_pay():
    scheduler = GroupScheduler(BlockManager(5000, 4), 32, 999)
    seqs = [Sequence(i, [i] * 5, SamplingParams(max_tokens=50)) for i in range(40)]

    def step(*new: Sequence, ends: Sequence) -> list[Sequence]:
        scheduler.abort(ends)
        for seq in new:
            scheduler.add(seq)
        plan = scheduler.schedule()
        scheduler.update(plan, [0] * len(plan.samples))
        return [seq for seq, *_ in plan.chunks]

    assert len(step(*seqs[:32], ends=seqs[39])) == 32
    assert step(seqs[33], ends=seqs[1])[-1] is seqs[33]  # it is all that waits
    assert len(step(*seqs[34:37], ends=seqs[2])) == 31  # one place for three: later
    assert len(step(ends=seqs[3])) == 30
    assert step(ends=seqs[4])[-3:] == seqs[34:37]
