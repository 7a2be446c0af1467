"""Blocks that several sequences have: found by their hash in the prefix cache, or shared by the
samples of one prompt until one of them writes."""

import pytest
from test_scheduler import Params, Simulation, complete, served, text

from microvllm.scheduler import Sequence, least_recently_used

# the prefix cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "hit"), [(1, 0), (3, 0), (4, 0), (5, 4), (7, 4), (8, 4), (9, 8), (12, 8), (13, 12)]
)
def test_a_hit_covers_full_blocks_and_never_the_last_token(length, hit):
    sim = Simulation()
    prompt = text(13)
    served(sim, prompt)
    again = sim.add(prompt[:length], max_tokens=1)
    step = sim.step()
    assert again.num_cached == hit
    assert step.chunks == [(again, hit, length)]


def test_a_prompt_of_whole_blocks_that_is_fully_cached_computes_its_last_block():
    sim = Simulation()
    prompt = text(16)
    served(sim, prompt, 5)
    seq = sim.add(prompt, max_tokens=5)
    step = sim.step()
    assert step.chunks == [(seq, 12, 16)] and len(step.samples) == 1
    sim.drain()
    assert sim.finished[0].tokens == sim.finished[1].tokens


@pytest.mark.parametrize("ahead", [False, True])
def test_the_cache_outlives_its_requests_and_holds_what_they_generated(ahead):
    sim = Simulation()
    first = sim.add(text(6), max_tokens=7)
    sim.drain(ahead)
    follow_up = sim.add(first.tokens + text(3, 1), max_tokens=2)
    sim.step()
    assert follow_up.num_cached == 12  # all of the 13 tokens but the last, which was never fed back
    sim.drain()


def test_the_same_prompt_twice_in_one_batch_shares_its_full_blocks():
    sim = Simulation()
    a, b = sim.add(text(10)), sim.add(text(10))
    step = sim.step()
    assert step.chunks == [(a, 0, 10), (b, 8, 10)]
    assert a.table[:2] == b.table[:2] and a.table[2] != b.table[2]
    assert [sim.blocks.ref_count[block] for block in a.table] == [2, 2, 1]
    sim.drain()


def test_the_same_short_prompt_twice_shares_nothing():
    sim = Simulation()
    a, b = sim.add(text(3)), sim.add(text(3))
    sim.step()
    assert not set(a.table) & set(b.table)
    sim.drain()


def test_a_block_that_is_not_computed_yet_is_not_found():
    sim = Simulation(max_batched_tokens=6)
    sim.add(text(12)), sim.add(text(12))
    sim.step()
    assert len(sim.blocks.block_of) == 1  # six tokens: one block is full, the second is not
    sim.drain()


def test_equal_blocks_after_different_beginnings_are_different():
    sim = Simulation()
    tail = text(8, 5)
    served(sim, text(4, 1) + tail)
    seq = sim.add(text(4, 2) + tail, max_tokens=1)
    sim.step()
    assert seq.num_cached == 0
    sim.drain()
    # one that is there behind another beginning, too, is not found behind a beginning that is there
    served(sim, text(4, 3) + text(4, 6))
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
    assert sim.finished[0].tokens == sim.finished[1].tokens
    assert len(sim.blocks.cached) == 3  # 12 of 13 tokens computed, once
    assert len(sim.blocks.blank) == sim.blocks.num_usable - 3


def test_without_a_prefix_cache_nothing_is_shared_or_kept():
    sim = Simulation(caching=False)
    a, b = sim.add(text(10)), sim.add(text(10))
    sim.step()
    assert not set(a.table) & set(b.table)
    sim.drain()
    assert not sim.blocks.cached and not sim.blocks.block_of
    assert served(sim, text(10)).num_cached == 0


def test_the_least_recently_used_block_goes_first_and_the_end_of_a_text_before_its_beginning():
    sim = Simulation(usable=6)
    a, b = text(9, 1), text(9, 2)
    served(sim, a), served(sim, b)
    tables = {name: [sim.blocks.block_of[h] for h in seq.hashes] for name, seq in
              zip("ab", sim.finished, strict=True)}  # fmt: skip
    assert list(sim.blocks.cached) == tables["a"][::-1] + tables["b"][::-1]
    served(sim, a)  # used again: now b is the oldest
    assert list(sim.blocks.cached) == tables["b"][::-1] + tables["a"][::-1]
    # two blocks are blank; a request that needs four takes the two oldest of the cached ones
    assert len(sim.blocks.blank) == 2
    served(sim, text(15, 3))
    assert set(tables["a"]) <= sim.blocks.hash_of.keys()
    assert not set(tables["b"]) & set(sim.blocks.match(sim.add(b), 8))
    assert sim.blocks.match(Sequence(9, a, Params()), 8) == tables["a"]


def test_an_evicted_beginning_makes_the_rest_of_the_text_unfindable_but_not_wrong():
    sim = Simulation(usable=4)
    served(sim, text(13, 1))
    served(sim, text(4, 2))  # takes the blank block
    served(sim, text(8, 3))  # and evicts from the end of the first text
    again = sim.add(text(13, 1), max_tokens=1)
    sim.step()
    assert 0 < again.num_cached < 12
    sim.drain()


def test_what_follows_a_gap_is_not_found():
    sim = Simulation(usable=4)
    prompt = text(13, 1)
    served(sim, prompt)
    first, *_ = sim.blocks.match(Sequence(9, prompt, Params()), 12)
    sim.blocks.eviction = lambda blocks: first
    served(sim, text(8, 2))  # takes the blank block and that one
    again = sim.add(prompt, max_tokens=1)
    sim.blocks.eviction = least_recently_used
    sim.step()
    assert again.num_cached == 0
    sim.drain()


def test_a_reset_empties_the_table_and_loses_no_block():
    sim = Simulation()
    served(sim, text(12, 1))
    running = sim.add(text(12, 2), max_tokens=9)
    sim.step()
    assert sim.blocks.cached and sim.blocks.block_of
    assert sim.scheduler.reset() == [running]
    assert not sim.blocks.cached and not sim.blocks.block_of and not sim.blocks.hash_of
    assert sim.blocks.num_free == sim.blocks.num_usable
    for seed in (1, 2):
        assert sim.blocks.match(Sequence(9, text(12, seed), Params()), 12) == []
    sim.drain()
    assert running.finish_reason == "length"


# samples of one prompt ----------------------------------------------------------------------------


def test_samples_share_the_prompt_and_copy_its_part_filled_block_before_they_write():
    sim = Simulation()
    first = sim.add(text(6), max_tokens=5, n=3)
    sim.step()
    a, b, c = sim.scheduler.running
    assert a is first and [s.sample_id for s in (a, b, c)] == [0, 1, 2]
    shared = a.table[1]
    assert a.table == b.table == c.table and sim.blocks.ref_count[shared] == 3
    step = sim.step()
    # two copies are enough: the last one writes in place
    assert [source for source, _ in step.copies] == [shared, shared]
    assert len({s.table[1] for s in (a, b, c)}) == 3 and c.table[1] == shared
    assert a.table[0] == b.table[0] == c.table[0]
    sim.drain()
    assert len({tuple(seq.tokens) for seq in sim.finished}) == 3


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
    sim.scheduler.finish(b, "abort")
    assert sim.step().copies == [] and len(a.table) == 2
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
    assert len({len(seq.tokens) for seq in sim.finished}) == 3
