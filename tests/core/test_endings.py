"""How a sequence ends: by its length, a stop token, an abort; and what a failed step leaves."""

import random
from collections import deque

import pytest
from helpers.simulation import (
    TOOL,
    Params,
    Simulation,
    complete,
    crowded,
    make_blocks,
    next_token,
    text,
)

from microvllm.scheduler import Scheduler, Sequence, WaitingQueue

# how a sequence ends ------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [False, True])
def test_one_that_finishes_does_not_shift_the_tokens_of_the_others(ahead):
    sim = Simulation()
    for i, max_tokens in enumerate([9, 1, 9, 2, 2, 9, 3]):
        sim.add(text(5, i), max_tokens=max_tokens)
    sim.drain(ahead)
    lengths = {seq.request_id: len(seq.token_ids) - 5 for seq in sim.finished}
    assert [lengths[i] for i in range(7)] == [9, 1, 9, 2, 2, 9, 3]


@pytest.mark.parametrize("ahead", [False, True])
def test_max_tokens_1_gives_one_token(ahead):
    sim = Simulation()
    seq = sim.add(text(8), max_tokens=1)
    sim.drain(ahead)
    assert len(seq.token_ids) == 9 and seq.finish_reason == "length"


@pytest.mark.parametrize("ahead", [False, True])
def test_a_stop_token_ends_a_sequence_at_its_first_token_too_but_not_in_the_prompt(ahead):
    prompt = next(p for p in map(text, [8] * 99, range(99)) if next_token(p, 0) in p)
    stop = next_token(prompt, 0)
    sim = Simulation()
    seq = sim.add(prompt, stop={stop})
    sim.drain(ahead)
    assert seq.token_ids == [*prompt, stop] and seq.finish_reason == "stop"


def test_a_sequence_takes_no_block_for_its_last_token():
    # 6 + 3 tokens; the last one is never an input: two blocks of four
    for ahead in (False, True):
        sim = Simulation(usable=2)
        sim.add(text(6), max_tokens=3)
        sim.drain(ahead)
        assert len(sim.finished) == 1


def test_one_step_ahead_the_token_after_the_end_is_dropped():
    prompt = text(8)
    output = complete(prompt, 8)
    stop = next(t for i, t in enumerate(output) if 1 < i < 6 and t not in output[:i])
    sim = Simulation()
    seq, other = sim.add(prompt, stop={stop}), sim.add(text(5, 1), max_tokens=9)
    extra = 0
    while not seq.finish_reason:
        step = sim.step_ahead()
        extra = sum(chunk.seq is seq for chunk in step.chunks)
    assert extra == 1 and sim.in_flight  # it is in the step that runs already
    assert seq.token_ids == prompt + output[: output.index(stop) + 1]
    assert not seq.block_table
    sim.land()
    assert seq.token_ids == prompt + output[: output.index(stop) + 1]
    sim.drain(ahead=True)
    assert other.finish_reason == "length"


def test_one_step_ahead_no_sequence_is_planned_beyond_max_tokens():
    sim = Simulation()
    sim.add(text(5), max_tokens=3)
    rows = []
    while sim.scheduler.running or sim.scheduler.waiting or sim.in_flight:
        rows.append(sim.step_ahead().num_tokens)
    assert rows == [5, 1, 1, 0]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_sequence_sent_away_with_its_last_token_under_way_still_ends(ahead):
    for usable in range(4, 12):
        sim = Simulation(usable=usable, block_size=2, max_batch_size=4)
        for i in range(4):
            sim.add(text(2, i), max_tokens=5 + i % 2, stop={7})
        sim.drain(ahead)
        assert len(sim.finished) == 4


# tokens that are not sampled ----------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("usable", [8, 9, 40])
def test_a_tool_writes_into_the_sequence_that_called_it(usable, ahead):
    sim = Simulation(usable=usable, max_batch_size=4)
    for i in range(6):
        sim.add(text(5, i), max_tokens=5 + 3 * i, tools=True)
    sim.drain(ahead)
    assert sum(TOOL in seq.token_ids[5:] for seq in sim.finished) > 2
    assert (sim.scheduler.num_preemptions > 0) == (usable < 40)


# aborts and failures ------------------------------------------------------------------------------


def stages(ahead: bool):
    """Simulations with request 0 in every stage of its life, one of them with two samples."""
    names = ["waiting", "prefill", "decoding", "forked", "preempted"]
    for name in names:
        sim = Simulation(usable=14, max_batched_tokens=6, max_batch_size=3)
        target = sim.add(text(10), max_tokens=16, n=2 if name == "forked" else 1)
        others = [sim.add(text(7, 1), max_tokens=9)]
        step = sim.step_ahead if ahead else sim.step
        count = {"waiting": 0, "prefill": 1, "decoding": 5, "forked": 4, "preempted": 4}[name]
        for _ in range(count):
            step()
        if name == "preempted":
            while sim.scheduler.running:
                sim.scheduler.preempt(sim.scheduler.running[-1])
        yield name, sim, target, others


@pytest.mark.parametrize("ahead", [False, True])
def test_a_request_may_be_aborted_at_any_stage(ahead):
    seen = set()
    for name, sim, target, others in stages(ahead):
        seen.add((name, bool(target.block_table), len(target.token_ids) > 10))
        victims = sim.abort(*sim.samples[0])
        assert len(victims) == (2 if name == "forked" else 1)
        for seq in victims:
            assert seq.finish_reason == "abort" and not seq.block_table
            output = seq.token_ids[10:]
            assert output == complete(text(10), 16, seq.index)[: len(output)]
            assert seq not in sim.scheduler.running and seq not in sim.scheduler.waiting
        sim.check()
        sim.drain(ahead)
        assert [seq.request_id for seq in sim.finished] == [seq.request_id for seq in others]
    assert len({name for name, _, _ in seen}) == 5
    assert {(running, begun) for _, running, begun in seen} == {
        (False, False), (True, False), (True, True), (False, True)
    }  # fmt: skip


def test_an_abort_takes_the_same_time_however_many_wait():
    """A walk over the queue for each would be felt: a hundred thousand squared."""

    class Queue(WaitingQueue):
        walks = 0

        def __iter__(self):
            Queue.walks += 1
            return super().__iter__()

    scheduler = Scheduler(make_blocks(19), 8, 64)
    seqs = [Sequence(i, text(5), Params()) for i in range(300)]
    for seq in seqs:
        scheduler.add(seq)
    scheduler.schedule()
    scheduler.waiting = Queue(scheduler.waiting)
    Queue.walks = 0
    for seq in seqs[10:]:
        scheduler.abort([seq, seq])
    scheduler.abort(seqs[10:])
    assert scheduler.finished == seqs[10:]
    assert Queue.walks == 0
    assert [*scheduler.running, *scheduler.waiting] == seqs[:10]
    scheduler.blocks.check(scheduler.running)


def test_a_queue_keeps_its_order_and_finds_its_items_as_a_deque_does():
    rng, names = random.Random(1), range(40)
    seqs = [Sequence(i, text(1), Params()) for i in names]
    queue, plain = WaitingQueue(seqs[:5]), deque(seqs[:5])
    for _ in range(500):
        seq = rng.choice(seqs)
        assert (seq in queue) == (seq in plain)
        if seq in plain:
            queue.remove(seq), plain.remove(seq)
        elif rng.random() < 0.5:
            queue.append(seq), plain.append(seq)
        else:
            queue.appendleft(seq), plain.appendleft(seq)
        assert [*queue] == [*plain] and len(queue) == len(plain) and bool(queue) == bool(plain)
        for i in range(len(plain)):
            assert queue[i] is plain[i] and queue[-i - 1] is plain[-i - 1]
    for index in (len(plain), -len(plain) - 1):
        with pytest.raises(IndexError, match=f"waiting.{index}. is out of range: {len(plain)} "):
            queue[index]
    with pytest.raises(KeyError):
        WaitingQueue().remove(seqs[0])


@pytest.mark.parametrize("ahead", [False, True])
def test_after_a_failed_step_everyone_goes_on_from_the_tokens_they_have(ahead):
    for _, sim, target, _ in stages(ahead):
        known = list(target.token_ids)
        queue = [*sim.scheduler.running, *sim.scheduler.waiting]
        sim.reset()
        assert list(sim.scheduler.waiting) == queue
        assert not sim.scheduler.running and sim.pool.num_free == sim.pool.num_usable
        assert not sim.pool.cached and not sim.blocks.copies
        assert target.token_ids == known
        sim.drain(ahead)
        assert {seq.request_id for seq in sim.finished} == {0, 1}


def test_the_draft_tokens_of_a_failed_step_are_gone_with_it():
    num_drafts = 0
    for seed in range(9):
        sim = Simulation(guesses=True)
        seqs = [sim.add(text(5, seed), max_tokens=30), sim.add(text(7, seed), max_tokens=30)]
        for _ in range(4):
            sim.step()
        known = [list(seq.token_ids) for seq in seqs]
        num_drafts += sum([len(chunk.draft) > 0 for chunk in sim.plan().chunks])
        sim.reset()
        assert [seq.token_ids for seq in seqs] == known
        sim.drain()
    assert num_drafts > 9


def test_a_failed_step_that_sent_someone_away_leaves_no_token_awaited():
    sim, _ = crowded()
    while not sim.scheduler.num_preemptions:
        sim.step_ahead()
    assert sim.in_flight
    sim.reset()
    sim.drain(ahead=True)
    assert len(sim.finished) == 3


def test_a_step_that_fails_right_after_it_sent_someone_away():
    sim, _ = crowded()
    while True:
        with sim.placeholders():
            step = sim.plan()
            if sim.scheduler.num_preemptions:
                assert any(seq.token_ids[-1] < 0 for seq in sim.scheduler.waiting)
                break
            flight, sim.in_flight = sim.in_flight, (step, sim.run(step))
        if flight:
            sim.read(*flight)
    sim.reset()  # planned, never run; and the one before it never read
    assert all(min(seq.token_ids) >= 0 for seq in sim.scheduler.waiting)
    sim.drain()
    assert len(sim.finished) == 3
