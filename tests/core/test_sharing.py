"""Blocks that several sequences have: found by their hash in the prefix cache, or shared by the
samples of one prompt until one of them writes."""

import pytest
from helpers.simulation import Params, Simulation, complete, text

from microvllm.blocks import least_recently_used
from microvllm.scheduler import Sequence

# the prefix cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "hit"), [(1, 0), (3, 0), (4, 0), (5, 4), (7, 4), (8, 4), (9, 8), (12, 8), (13, 12)]
)
def test_a_hit_covers_full_blocks_and_never_the_last_token(length, hit):
    sim = Simulation()
    prompt = text(13)
    sim.served(prompt)
    again = sim.add(prompt[:length], max_tokens=1)
    step = sim.step()
    assert again.num_cached == hit
    assert step.chunks == [(again, hit, length, ())]


def test_a_prompt_of_whole_blocks_that_is_fully_cached_computes_its_last_block():
    sim = Simulation()
    prompt = text(16)
    sim.served(prompt, 5)
    seq = sim.add(prompt, max_tokens=5)
    step = sim.step()
    assert step.chunks == [(seq, 12, 16, ())] and len(step.draws) == 1
    sim.drain()
    assert sim.finished[0].token_ids == sim.finished[1].token_ids


@pytest.mark.parametrize("ahead", [False, True])
def test_the_cache_outlives_its_requests_and_holds_what_they_generated(ahead):
    sim = Simulation()
    first = sim.add(text(6), max_tokens=7)
    sim.drain(ahead)
    follow_up = sim.add(first.token_ids + text(3, 1), max_tokens=2)
    sim.step()
    assert follow_up.num_cached == 12  # all of the 13 tokens but the last, which was never fed back
    sim.drain()


def test_the_same_prompt_twice_in_one_batch_shares_its_full_blocks():
    sim = Simulation()
    a, b = sim.add(text(10)), sim.add(text(10))
    step = sim.step()
    assert step.chunks == [(a, 0, 10, ()), (b, 8, 10, ())]
    assert a.block_table[:2] == b.block_table[:2] and a.block_table[2] != b.block_table[2]
    assert [sim.pool.ref_count[block] for block in a.block_table] == [2, 2, 1]
    sim.drain()


def test_the_same_short_prompt_twice_shares_nothing():
    sim = Simulation()
    a, b = sim.add(text(3)), sim.add(text(3))
    sim.step()
    assert not set(a.block_table) & set(b.block_table)
    sim.drain()


def test_a_block_that_is_not_computed_yet_is_not_found():
    sim = Simulation(max_batched_tokens=6)
    sim.add(text(12)), sim.add(text(12))
    sim.step()
    assert len(sim.pool.block_of) == 1  # six tokens: one block is full, the second is not
    sim.drain()


def test_equal_blocks_after_different_beginnings_are_different():
    sim = Simulation()
    tail = text(8, 5)
    sim.served(text(4, 1) + tail)
    seq = sim.add(text(4, 2) + tail, max_tokens=1)
    sim.step()
    assert seq.num_cached == 0
    sim.drain()
    # one that is there behind another beginning, too, is not found behind a beginning that is there
    sim.served(text(4, 3) + text(4, 6))
    seq = sim.add(text(4, 3) + tail, max_tokens=1)
    sim.drain()
    assert seq.num_cached == 4


def test_two_sequences_that_come_to_the_same_text_on_their_own_keep_one_of_two_blocks():
    sim = Simulation()
    prompt = text(5)
    output = complete(prompt, 8)
    sim.add(prompt, 8)
    sim.step()
    sim.add(prompt + output[:2], 6)  # no full block of it is computed beyond the first
    sim.drain()
    assert sim.finished[0].token_ids == sim.finished[1].token_ids
    assert len(sim.pool.cached) == 3  # 12 of 13 tokens computed, once
    assert len(sim.pool.blank) == sim.pool.num_usable - 3


def test_without_a_prefix_cache_nothing_is_shared_or_kept():
    sim = Simulation(caching=False)
    a, b = sim.add(text(10)), sim.add(text(10))
    sim.step()
    assert not set(a.block_table) & set(b.block_table)
    sim.drain()
    assert not sim.pool.cached and not sim.pool.block_of
    assert sim.served(text(10)).num_cached == 0


def test_the_least_recently_used_block_goes_first_and_the_end_of_a_text_before_its_beginning():
    sim = Simulation(usable=6)
    a, b = text(9, 1), text(9, 2)
    sim.served(a), sim.served(b)
    tables = {name: [sim.pool.block_of[h] for h in seq.block_hashes] for name, seq in
              zip("ab", sim.finished, strict=True)}  # fmt: skip
    assert list(sim.pool.cached) == tables["a"][::-1] + tables["b"][::-1]
    sim.served(a)  # used again: now b is the oldest
    assert list(sim.pool.cached) == tables["b"][::-1] + tables["a"][::-1]
    # two blocks are blank; a request that needs four takes the two oldest of the cached ones
    assert len(sim.pool.blank) == 2
    sim.served(text(15, 3))
    assert set(tables["a"]) <= sim.pool.hash_of.keys()
    assert not set(tables["b"]) & set(sim.blocks.find_prefix(sim.add(b)))
    assert sim.blocks.find_prefix(Sequence(9, a, Params())) == tables["a"]


def test_an_evicted_beginning_makes_the_rest_of_the_text_unfindable_but_not_wrong():
    sim = Simulation(usable=4)
    sim.served(text(13, 1))
    sim.served(text(4, 2))  # takes the blank block
    sim.served(text(8, 3))  # and evicts from the end of the first text
    again = sim.add(text(13, 1), max_tokens=1)
    sim.step()
    assert 0 < again.num_cached < 12
    sim.drain()


def test_what_follows_a_gap_is_not_found():
    sim = Simulation(usable=4)
    prompt = text(13, 1)
    sim.served(prompt)
    first, *_ = sim.blocks.find_prefix(Sequence(9, prompt, Params()))
    sim.pool.eviction = lambda pool: first
    sim.served(text(8, 2))  # takes the blank block and that one
    again = sim.add(prompt, max_tokens=1)
    sim.pool.eviction = least_recently_used
    sim.step()
    assert again.num_cached == 0
    sim.drain()


def test_a_reset_empties_the_table_and_loses_no_block():
    sim = Simulation()
    sim.served(text(12, 1))
    running = sim.add(text(12, 2), max_tokens=9)
    sim.step()
    assert sim.pool.cached and sim.pool.block_of
    assert sim.scheduler.reset() == [running]
    assert not sim.pool.cached and not sim.pool.block_of and not sim.pool.hash_of
    assert sim.pool.num_free == sim.pool.num_usable
    for seed in (1, 2):
        assert sim.blocks.find_prefix(Sequence(9, text(12, seed), Params())) == []
    sim.drain()
    assert running.finish_reason == "length"


# samples of one prompt ----------------------------------------------------------------------------


def test_samples_share_the_prompt_and_copy_its_part_filled_block_before_they_write():
    sim = Simulation()
    first = sim.add(text(6), max_tokens=5, n=3)
    sim.step()
    a, b, c = sim.scheduler.running
    assert a is first and [s.index for s in (a, b, c)] == [0, 1, 2]
    shared = a.block_table[1]
    assert a.block_table == b.block_table == c.block_table and sim.pool.ref_count[shared] == 3
    step = sim.step()
    # two copies are enough: the last one writes in place
    assert [source for source, _ in step.copies] == [shared, shared]
    assert len({s.block_table[1] for s in (a, b, c)}) == 3 and c.block_table[1] == shared
    assert a.block_table[0] == b.block_table[0] == c.block_table[0]
    sim.drain()
    assert len({tuple(seq.token_ids) for seq in sim.finished}) == 3


def test_samples_of_a_prompt_of_whole_blocks_need_no_copy():
    sim = Simulation()
    sim.add(text(8), max_tokens=5, n=3)
    copies = []
    while sim.scheduler.running or sim.scheduler.waiting:
        copies += sim.step().copies
    assert copies == []
    sim.drain()


@pytest.mark.parametrize("victim", [-1, 0])  # the last has no copy in the plan yet, the first may
@pytest.mark.parametrize("usable", [6, 7, 8, 9, 10])
@pytest.mark.parametrize("ahead", [False, True])
def test_samples_copy_rightly_when_memory_is_short(usable, ahead, victim):
    sim = Simulation(usable=usable, max_batch_size=6)
    sim.scheduler.victim = lambda scheduler, seq: scheduler.running[victim]
    sim.add(text(14, 1), max_tokens=9, n=4)
    sim.add(text(6, 2), max_tokens=9, n=2)
    sim.drain(ahead)
    assert len(sim.finished) == 6 and sim.scheduler.num_preemptions


def test_a_sample_that_is_the_last_to_hold_a_block_writes_in_place():
    sim = Simulation()
    sim.add(text(6), max_tokens=5, n=2)
    sim.step()
    a, b = sim.scheduler.running
    sim.abort(b)
    assert sim.step().copies == [] and len(a.block_table) == 2
    sim.drain()


def test_samples_finish_one_by_one():
    prompt = next(
        text(6, seed)
        for seed in range(100)
        if len({len(complete(text(6, seed), 12, i, {7})) for i in range(3)}) == 3
    )
    sim = Simulation()
    sim.add(prompt, max_tokens=12, n=3, stop={7})
    sim.drain()
    assert len({len(seq.token_ids) for seq in sim.finished}) == 3
