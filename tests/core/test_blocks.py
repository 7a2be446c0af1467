"""The block manager: what it hands out and takes back, and what its operations cost."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.simulation import Params, Simulation, make_blocks, text

from microvllm import scheduler
from microvllm.scheduler import Scheduler, Sequence

# the block manager on its own ---------------------------------------------------------------------


def test_the_null_block_is_never_handed_out():
    sim = Simulation(usable=5)
    seq = sim.add(text(20), max_tokens=1)
    sim.step()
    assert sim.pool.num_free == 5 and seq.finish_reason == "length"
    blocks = make_blocks(5)
    whole = Sequence(0, text(20), Params())
    assert blocks.admit(whole, 20) and sorted(whole.block_table) == [1, 2, 3, 4, 5]


def test_an_allocation_that_fails_changes_nothing():
    blocks = make_blocks(5)
    a, b = Sequence(0, text(12, 1), Params()), Sequence(1, text(12, 2), Params())
    assert blocks.admit(a, 12)
    blank, counts = list(blocks.pool.blank), list(blocks.pool.ref_count)
    assert not blocks.admit(b, 12)
    assert not blocks.admit(b, 8, reserve_tokens=1)
    assert not blocks.grow(a, 12, 24)
    assert blocks.pool.blank == blank and blocks.pool.ref_count == counts
    assert not b.block_table and b.num_computed == 0
    assert len(a.block_table) == 3 and not blocks.copies
    blocks.check([a, b])


def test_a_hit_is_not_counted_as_a_free_block_twice():
    # three cached blocks that are hits, and one blank: a prompt of five blocks does not fit
    blocks = make_blocks(4)
    a = Sequence(0, text(12, 1), Params())
    assert blocks.admit(a, 12)
    blocks.publish(a, 12)
    blocks.free(a)
    b = Sequence(1, text(12, 1) + text(8, 2), Params())
    hits = blocks.find_prefix(b)
    assert len(hits) == 3
    assert not blocks.admit(b, 8)
    assert blocks.pool.num_free == 4 and not b.block_table
    assert blocks.admit(b, 4) and list(b.block_table[:3]) == hits
    blocks.check([b])


def test_the_longest_sequence_that_fits():
    blocks = make_blocks(5)
    assert blocks.longest(limit=99, max_chunk=8) == 20
    assert blocks.longest(limit=19, max_chunk=8) == 19


def test_truncation_frees_whole_blocks_and_the_next_write_asks_again():
    blocks = make_blocks(5)
    seq = Sequence(0, text(6), Params())
    assert blocks.admit(seq, 6) and blocks.grow(seq, 6, 15)
    assert len(seq.block_table) == 4 and seq.capacity == 16
    blocks.truncate(seq, 7)
    seq.num_computed = 7
    assert len(seq.block_table) == 2 and blocks.pool.num_free == 3 and seq.capacity == 0
    blocks.check([seq])


@pytest.mark.parametrize(
    "damage",
    [
        lambda blocks, seq: blocks.pool.blank.append(seq.block_table[0]),
        lambda blocks, seq: blocks.pool.blank.pop(),
        lambda blocks, seq: blocks.pool.blank.append(0),
        lambda blocks, seq: blocks.pool.ref_count.__setitem__(seq.block_table[0], 3),
        lambda blocks, seq: seq.block_table.pop(),
        lambda blocks, seq: blocks.pool.hash_of.popitem(),
        lambda blocks, seq: blocks.pool.block_of.popitem(),
        lambda blocks, seq: blocks.pool.cached.popitem(),
        lambda blocks, seq: blocks.pool.cached.__setitem__(seq.block_table[0], None),
        lambda blocks, seq: seq.block_table.append(0),
        lambda blocks, seq: seq.token_ids.__setitem__(2, 99),
    ],
)
def test_check_sees_damage(damage):
    sim = Simulation()
    sim.served(text(12, 1))
    seq, _ = sim.add(text(12, 2)), sim.add(text(12, 2))  # they share two blocks
    sim.step()
    sim.check()
    damage(sim.blocks, seq)
    with pytest.raises(AssertionError):
        sim.blocks.check(sim.scheduler.running)


def test_check_sees_that_a_sample_would_write_where_another_reads():
    sim = Simulation()
    seq = sim.add(text(6), n=2)
    sim.step()
    seq.capacity = 8
    with pytest.raises(AssertionError):
        sim.check()


class Stack(list):
    """A list that only does what takes the same time at any length."""

    def _slow(self, *_):
        raise AssertionError("an operation that takes longer in a larger pool")

    remove = insert = index = count = sort = reverse = copy = _slow
    __iter__ = __contains__ = __delitem__ = __reversed__ = _slow

    def pop(self):
        return super().pop()


CORE = {str(Path(scheduler.__file__).with_name(f"{name}.py")) for name in ("scheduler", "blocks")}


def lines_run(function) -> int:
    """Lines of scheduler.py and blocks.py that a call executes: its operations, counted."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if frame.f_code.co_filename not in CORE:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def test_operations_take_the_same_time_in_a_pool_of_a_hundred_thousand_blocks():
    def life(num_blocks: int) -> list[int]:
        """Lines run by each call in a sequence's life, in a pool whose blocks are all cached."""
        blocks = make_blocks(num_blocks)
        filler = Sequence(0, [7] * (4 * num_blocks), Params())
        filler.block_hashes = [i.to_bytes(4, "big") for i in range(num_blocks)]
        filler.num_computed = 4 * num_blocks
        blocks.enable_prefix_caching = False  # so that it finds nothing
        assert blocks.admit(filler, 4 * num_blocks)
        blocks.enable_prefix_caching = True
        blocks.publish(filler, 4 * num_blocks)
        blocks.free(filler)
        assert len(blocks.pool.cached) == num_blocks and not blocks.pool.blank
        blocks.pool.blank = Stack()
        seq, again = (Sequence(i, text(10), Params()) for i in (1, 2))
        fork = seq.fork(1)
        calls = [
            lambda: blocks.find_prefix(seq),
            lambda: blocks.admit(seq, 10),
            lambda: blocks.publish(seq, 10),
            lambda: blocks.share_table(seq, fork),
            lambda: blocks.grow(seq, 10, 13),
            lambda: blocks.admit(again, 2),
            lambda: blocks.truncate(again, 8),
            lambda: blocks.free(seq),
            lambda: blocks.free(fork),
            lambda: blocks.free(again),
        ]
        counts = [lines_run(call) for call in calls]
        assert again.num_published == 0 and blocks.pool.num_free == num_blocks
        return counts

    small, large = life(100), life(100_000)
    assert small == large and all(small)


def test_a_step_takes_the_same_time_whatever_waits_and_however_large_the_pool():
    def steps(waiting: int, num_blocks: int) -> list[int]:
        """Lines run by a few steps of eight sequences that decode."""
        lab = Scheduler(make_blocks(num_blocks - 1), 8, 64)
        for i in range(8 + waiting):
            lab.add(Sequence(i, [i], Params(max_tokens=99)))
        lab.blocks.pool.blank = Stack(lab.blocks.pool.blank)
        counts = []
        for _ in range(9):
            plans = []
            counts.append(lines_run(lambda: plans.append(lab.schedule())))  # noqa: B023
            counts.append(lines_run(lambda: lab.update(plans[0], [3] * 8)))  # noqa: B023
        assert len(lab.running) == 8 and len(lab.waiting) == waiting
        return counts

    assert steps(1, 100) == steps(100_000, 100) == steps(1, 1_000_000)


def test_the_free_lists_are_a_stack_and_an_ordered_dict():
    # a plain dict finds its first key by walking over all the deleted ones before it
    pool = make_blocks(9).pool
    assert type(pool.blank) is list and type(pool.cached).__name__ == "OrderedDict"


def test_the_scheduler_needs_no_torch():
    code = "import sys; sys.modules.update(torch=None); import microvllm.scheduler"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_after_a_reset_no_copies_are_due():
    blocks = make_blocks(9)
    seq = Sequence(0, text(6), Params(n=2))
    assert blocks.admit(seq, 6)
    seq.num_computed = 6
    fork = seq.fork(1)
    blocks.share_table(seq, fork)
    fork.token_ids.append(1)
    assert blocks.grow(fork, 6, 7) and blocks.copies
    blocks.clear()
    assert blocks.take_copies() == []
