"""The scheduler, driven without a model: which sequences run, and which are preempted."""

import random

import pytest
from helpers.simulation import Simulation, crowded, text

# running sequences --------------------------------------------------------------------------------


def test_requests_start_in_the_order_they_came():
    sim = Simulation(max_batch_size=2)
    for i in range(6):
        sim.add(text(5 + i, i), max_tokens=3 + i)
    sim.drain()
    assert sim.started == list(range(6))


def test_a_small_request_does_not_overtake_a_large_one_that_waits_for_room():
    sim = Simulation(usable=12)
    sim.add(text(20, 1), max_tokens=8)
    sim.step()
    large, small = sim.add(text(30, 2), max_tokens=2), sim.add(text(2, 3), max_tokens=2)
    sim.step()
    assert list(sim.scheduler.waiting) == [large, small]  # though `small` would fit
    sim.drain()
    assert sim.started == [0, 1, 2]


def test_a_steady_stream_of_requests_starves_no_sequence():
    sim = Simulation(usable=10, max_batch_size=3, max_batched_tokens=6)
    first = sim.add(text(30, 0), max_tokens=9)
    for i in range(1, 40):
        sim.add(text(1 + i % 7, i), max_tokens=1 + i % 5)
        sim.step()
    assert first.finish_reason == "length"
    sim.drain()


def test_a_long_prompt_shares_its_steps_with_those_that_decode():
    sim = Simulation(max_batched_tokens=8)
    old = sim.add(text(3, 1), max_tokens=9)
    sim.step()
    long = sim.add(text(20, 2))
    shares = []
    while long.num_computed < 20:
        step = sim.step()
        shares.append([(seq is long, stop - start) for seq, start, stop, _ in step.chunks])
    # seven rows a step for the prompt, one for the sequence that goes on generating beside it
    assert shares == [[(False, 1), (True, 7)]] * 2 + [[(False, 1), (True, 6)]]
    assert len(old.token_ids) == 3 + 4


def test_one_token_chunks_come_first_even_if_they_are_the_youngest():
    sim = Simulation(max_batched_tokens=8)
    long, short = sim.add(text(10, 1)), sim.add(text(1, 2))
    sim.step()
    assert long.num_computed == 8 and short in sim.scheduler.waiting
    assert [chunk.seq for chunk in sim.step().chunks] == [short, long]


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 64])
def test_no_step_has_more_tokens_than_its_budget(budget):
    sim = Simulation(max_batched_tokens=budget)
    for i in range(5):
        sim.add(text(4 * i + 1, i), max_tokens=3, n=1 + i % 2)
    sizes = []
    while sim.scheduler.running or sim.scheduler.waiting:
        sizes.append(sim.step().num_tokens)
    assert max(sizes) == min(budget, sum(4 * i + 1 for i in range(5)))
    sim.drain()


@pytest.mark.parametrize("max_batch_size", [1, 2, 3])
def test_never_more_sequences_run_than_max_batch_size(max_batch_size):
    sim = Simulation(max_batch_size=max_batch_size)
    for i in range(8):
        sim.add(text(3, i), max_tokens=4)
    running = []
    while sim.scheduler.running or sim.scheduler.waiting:
        running.append(len(sim.step().chunks))
    assert max(running) == max_batch_size
    sim.drain()


def test_the_samples_a_prompt_will_split_into_have_their_seats_from_the_start():
    sim = Simulation(max_batch_size=4, max_batched_tokens=4)
    three, two = sim.add(text(6, 1), n=3), sim.add(text(2, 2), n=2)
    sim.step()
    assert sim.scheduler.running == [three] and list(sim.scheduler.waiting) == [two]
    sim.step()  # the prompt is done: three seats are taken, one is left, and `two` needs two
    assert len(sim.scheduler.running) == 3 and list(sim.scheduler.waiting) == [two]
    sim.drain()
    assert len(sim.finished) == 5
    sim = Simulation(max_batch_size=4)  # whose step has tokens left for `two`, and no seats
    sim.add(text(6, 1), n=3)
    two = sim.add(text(2, 2), n=2)
    sim.step()
    assert len(sim.scheduler.running) == 3 and list(sim.scheduler.waiting) == [two]


@pytest.mark.parametrize(("usable", "room"), [(9, False), (10, True)])
def test_a_new_sequence_leaves_blocks_for_the_running_ones(usable, room):
    sim = Simulation(usable=usable)
    old = sim.add(text(8, 1), max_tokens=20)
    sim.step()
    assert sim.pool.num_free == usable - 2
    # it takes 3 blocks, the other one its third: 3 would be left of 9, and 16 tokens are 4
    young = sim.add(text(9, 2), max_tokens=2)
    sim.step()
    assert (young in sim.scheduler.running) == room
    sim.drain()
    assert sim.scheduler.num_preemptions == 0 and old.finish_reason == young.finish_reason


# preemption ---------------------------------------------------------------------------------------


def test_the_youngest_makes_room_and_comes_back_first():
    sim, (a, b, c) = crowded()
    sim.step()
    assert sim.scheduler.running == [a, b, c]
    d = sim.add(text(3, 9))
    while not sim.scheduler.num_preemptions:
        sim.step()
    assert sim.scheduler.running == [a, b] and list(sim.scheduler.waiting) == [c, d]
    generated = c.token_ids[8:]
    assert len(generated) > 1  # it had begun, and keeps what it has
    while c in sim.scheduler.waiting:
        assert d in sim.scheduler.waiting
        sim.step()
    assert c.token_ids[8 : 8 + len(generated)] == generated
    sim.drain()


def test_several_victims_come_back_oldest_first():
    sim = Simulation(usable=12, block_size=2, max_batch_size=4, max_batched_tokens=4)
    seqs = [sim.add(text(1, i), max_tokens=20) for i in range(4)]
    orders = set()
    while sim.scheduler.running or sim.scheduler.waiting:
        sim.step()
        waiting = [seqs.index(seq) for seq in sim.scheduler.waiting]
        assert waiting == sorted(waiting)
        orders.add(tuple(waiting))
    assert max(map(len, orders)) >= 2
    sim.drain()


def test_no_sequence_is_admitted_in_a_step_with_a_preemption():
    # with 8 tokens a step the first part of the victim would fit at once, and be sent away again
    sim = Simulation(usable=14, max_batched_tokens=8, caching=False)
    old, young = sim.add(text(8, 1), max_tokens=40), sim.add(text(36, 2))
    while not sim.scheduler.num_preemptions:
        step = sim.step()
    assert list(sim.scheduler.waiting) == [young] and sim.pool.num_free > 8
    assert step.chunks == [(old, old.num_computed - 1, old.num_computed, ())]
    sim.drain()


def test_a_preempted_sequence_finds_its_own_blocks_again():
    sim = Simulation()
    seq = sim.add(text(9), max_tokens=10)
    for _ in range(6):
        sim.step()
    sim.scheduler.preempt(seq)
    held = len(seq.token_ids)
    assert held == 9 + 6
    step = sim.step()
    assert step.chunks == [(seq, 12, held, ())]
    assert seq.num_cached == 0  # what the prompt found when it came, not what it finds again
    sim.drain()


@pytest.mark.parametrize("ahead", [False, True])
def test_preempted_sequences_go_on_with_the_same_tokens(ahead):
    sim, seqs = crowded()
    sim.drain(ahead)
    assert sim.scheduler.num_preemptions and len(sim.finished) == len(seqs)


def test_a_preempted_sequence_without_a_cache_is_computed_again_from_the_start():
    sim, _ = crowded(caching=False)
    sim.drain()
    assert sim.scheduler.num_preemptions and len(sim.finished) == 3


def test_the_last_one_standing_always_fits():
    # two samples and one request more, in a pool that just holds one sample's whole length
    sim = Simulation(usable=5, block_size=4)
    sim.add(text(10, 1), max_tokens=11, n=3)
    sim.add(text(10, 2), max_tokens=11)
    sim.drain()
    assert len(sim.finished) == 4 and sim.scheduler.num_preemptions


# forced tokens ------------------------------------------------------------------------------------


def test_a_sample_has_forced_positions_of_its_own():
    sim = Simulation()
    sim.add(text(6), max_tokens=9, n=2)
    sim.step()
    first, fork = sim.scheduler.running
    sim.scheduler.force(first, [7, 8])
    assert first.mask(6, 9) == [1, 0, 0]
    assert fork.mask(6, 9) == [1, 1, 1] and not fork.forced


def test_a_forced_stop_token_does_not_end_a_sequence_and_the_limit_does():
    sim = Simulation()
    seq = sim.add(text(6), max_tokens=4)
    sim.step()
    seq.stop_token_ids = frozenset({7})
    sim.scheduler.force(seq, [7])
    assert seq.finish_reason is None
    sim.scheduler.force(seq, [5, 7, 5])
    assert (seq.finish_reason, seq.stop_reason) == ("length", "max_tokens")
    assert len(seq.token_ids) == 6 + 4


def test_tokens_that_are_cut_off_are_not_counted():
    sim = Simulation()
    seq = sim.add(text(6), max_tokens=9)
    sim.step()
    sim.scheduler.force(seq, [1, 2, 3])
    assert sim.scheduler.num_output_tokens == 4
    sim.scheduler.cut(seq, 6 + 2)
    assert sim.scheduler.num_output_tokens == 2 == len(seq.output)


# pausing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("usable", [9, 40])
@pytest.mark.parametrize("ahead", [False, True])
def test_sequences_that_pause_now_and_then_have_the_same_tokens(ahead, usable, caching):
    rng = random.Random(usable)
    sim = Simulation(usable=usable, caching=caching)
    scheduler = sim.scheduler
    for i in range(8):
        sim.add(text(4 + i, i), max_tokens=12, n=1 + i % 2, tools=i % 3 == 0)
    num_pauses = 0
    while sim.is_busy() or scheduler.paused or sim.in_flight:
        (sim.step_ahead if ahead else sim.step)()
        for seq in list(scheduler.paused):
            if rng.random() < 0.3:
                scheduler.resume(seq)
        for seq in [*scheduler.running, *scheduler.waiting]:
            if rng.random() < 0.2 and seq.output:
                scheduler.pause(seq)
                num_pauses += 1
        sim.check()
    assert num_pauses > 15 and len(sim.finished) == 12
    for seq in sim.finished:
        assert seq.output == sim.wanted(seq)
    assert sim.pool.num_free == sim.pool.num_usable


def test_a_paused_sequence_keeps_its_blocks_until_others_need_them():
    sim = Simulation(usable=6)
    paused = sim.add(text(9, 1), max_tokens=8)
    sim.step()
    sim.scheduler.pause(paused)
    table = list(paused.block_table)
    other = sim.add(text(5, 2), max_tokens=3)
    sim.step()
    assert list(paused.block_table) == table == [1, 2, 3]
    sim.scheduler.resume(paused)
    assert list(paused.block_table) == table and paused in sim.scheduler.running
    sim.scheduler.pause(paused)
    large = sim.add(text(10, 3), max_tokens=8)
    while large.finish_reason is None:
        sim.step()
    assert not paused.block_table and other.finish_reason == "length"
    sim.scheduler.resume(paused)
    sim.drain()
    assert paused.output == sim.wanted(paused)


def test_a_paused_sequence_can_be_aborted_and_reset():
    sim = Simulation()
    one = sim.add(text(9, 1))
    two = sim.add(text(9, 2))
    sim.step()
    sim.scheduler.pause(one)
    sim.scheduler.pause(two)
    assert sim.abort(one) == [one] and list(sim.scheduler.paused) == [two]
    sim.scheduler.reset()
    assert list(sim.scheduler.waiting) == [two] and not sim.scheduler.paused
    sim.slots.clear()
    sim.drain()
    assert two.output == sim.wanted(two)
