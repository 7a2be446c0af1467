"""The block manager on its own: its books, and what its operations cost."""

import subprocess
import sys

import pytest
from test_scheduler import Params, Simulation, served, text

from microvllm import scheduler
from microvllm.scheduler import BlockManager, Scheduler, Sequence

# the block manager on its own ---------------------------------------------------------------------


def test_the_sink_is_never_handed_out():
    sim = Simulation(usable=5)
    seq = sim.add(text(20), max_tokens=1)
    sim.step()
    assert sim.blocks.num_free == 5 and seq.finish_reason == "length"
    blocks = BlockManager(6, 4)
    whole = Sequence(0, text(20), Params())
    assert blocks.admit(whole, [], 20) and sorted(whole.table) == [1, 2, 3, 4, 5]


def test_an_allocation_that_fails_changes_nothing():
    blocks = BlockManager(6, 4)
    a, b = Sequence(0, text(12, 1), Params()), Sequence(1, text(12, 2), Params())
    assert blocks.admit(a, [], 12)
    blank, counts = list(blocks.blank), list(blocks.ref_count)
    assert not blocks.admit(b, [], 12)
    assert not blocks.admit(b, [], 8, reserve=1)
    assert not blocks.grow(a, 12, 24)
    assert blocks.blank == blank and blocks.ref_count == counts
    assert not b.table and b.num_computed == 0 and len(a.table) == 3 and not blocks.copies
    blocks.check([a, b])


def test_a_hit_is_not_counted_as_a_free_block_twice():
    # three cached blocks that are hits, and one blank: a prompt of five blocks does not fit
    blocks = BlockManager(5, 4)
    a = Sequence(0, text(12, 1), Params())
    assert blocks.admit(a, [], 12)
    blocks.publish(a, 12)
    blocks.free(a)
    b = Sequence(1, text(12, 1) + text(8, 2), Params())
    hits = blocks.match(b, 19)
    assert len(hits) == 3
    assert not blocks.admit(b, hits, 20)
    assert blocks.num_free == 4 and not b.table
    assert blocks.admit(b, hits, 16) and list(b.table[:3]) == hits
    blocks.check([b])


@pytest.mark.parametrize(
    "damage",
    [
        lambda blocks, seq: blocks.blank.append(seq.table[0]),
        lambda blocks, seq: blocks.blank.pop(),
        lambda blocks, seq: blocks.blank.append(0),
        lambda blocks, seq: blocks.ref_count.__setitem__(seq.table[0], 3),
        lambda blocks, seq: seq.table.pop(),
        lambda blocks, seq: blocks.hash_of.popitem(),
        lambda blocks, seq: blocks.block_of.popitem(),
        lambda blocks, seq: blocks.cached.popitem(),
        lambda blocks, seq: blocks.cached.__setitem__(seq.table[0], None),
        lambda blocks, seq: seq.table.append(0),
        lambda blocks, seq: seq.tokens.__setitem__(2, 99),
    ],
)
def test_check_sees_damage(damage):
    sim = Simulation()
    served(sim, text(12, 1))
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
    seq.num_writable = 8
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


def lines_run(function) -> int:
    """Lines of scheduler.py that a call executes: its operations, counted."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if frame.f_code.co_filename != scheduler.__file__:
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
        blocks = BlockManager(num_blocks + 1, 4)
        filler = Sequence(0, [7] * (4 * num_blocks), Params())
        filler.hashes = [i.to_bytes(4, "big") for i in range(num_blocks)]
        assert blocks.admit(filler, [], 4 * num_blocks)
        blocks.publish(filler, 4 * num_blocks)
        blocks.free(filler)
        assert len(blocks.cached) == num_blocks and not blocks.blank
        blocks.blank = Stack()
        seq, again = (Sequence(i, text(10), Params()) for i in (1, 2))
        twins = []
        calls = [
            lambda: blocks.match(seq, 9),
            lambda: blocks.admit(seq, [], 10),
            lambda: blocks.publish(seq, 10),
            lambda: twins.append(blocks.fork(seq, 1)),
            lambda: blocks.grow(seq, 10, 13),
            lambda: blocks.admit(again, blocks.match(again, 9), 10),
            lambda: blocks.free(seq),
            lambda: blocks.free(twins[0]),
            lambda: blocks.free(again),
        ]
        counts = [lines_run(call) for call in calls]
        assert again.tokens == seq.tokens and blocks.num_free == num_blocks
        return counts

    small, large = life(100), life(100_000)
    assert small == large and all(small)


def test_a_step_takes_the_same_time_whatever_waits_and_however_large_the_pool():
    def steps(waiting: int, num_blocks: int) -> list[int]:
        """Lines run by a few steps of eight sequences that decode."""
        lab = Scheduler(BlockManager(num_blocks, 4), 8, 64)
        for i in range(8 + waiting):
            lab.add(Sequence(i, [i], Params(max_tokens=99)))
        lab.blocks.blank = Stack(lab.blocks.blank)
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
    blocks = BlockManager(10, 4)
    assert type(blocks.blank) is list and type(blocks.cached).__name__ == "OrderedDict"


def test_the_decisions_need_no_torch():
    code = "import sys; sys.modules.update(torch=None); import microvllm.scheduler"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
