"""The thread team: each part of a job once, whichever threads come, and no core used while idle."""

import os
import sys
import time

import numba
import numpy as np
import pytest

from microvllm.cpu import team
from microvllm.cpu.simd import EXACT, VIEWS

pytestmark = pytest.mark.slow  # its kernels are compiled


@team.job
@numba.njit(**VIEWS)
def add_one(worker, part, parts, counts, work):
    x = 1.0
    for _ in range(work[part]):
        x = x * 1.0000001 + 0.1
    counts[part] += 1 if x > 0 else 0
    counts[parts + worker] += 1


@numba.njit(**EXACT)
def run(team, jobs, runs, parts, work):
    """How often each part was computed in all jobs, then how many parts each thread computed."""
    counts = np.zeros(parts + team[0], np.int64)
    for _ in range(jobs):
        add_one(team, runs, parts, (counts, work))
    return counts


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("runs", "parts"), [(1, 1), (1, 7), (2, 8), (4, 64)])
def test_each_part_of_each_job_is_computed_once(threads, runs, parts):
    """Short and long parts; more threads than there are cores."""
    work = np.random.default_rng(parts).integers(0, 2000, parts)
    with team.one_at_a_time:
        counts = run(team.team_of(threads), 500, runs, parts, work)
    assert counts[:parts].tolist() == [500] * parts
    assert counts[parts:].sum() == 500 * parts and len(counts) == parts + threads


def test_a_team_whose_workers_never_come_is_its_leader_alone():
    alone = team._new_team(3)  # it must exist as long as its array's addresses are used
    counts = run(alone.array, 50, 2, 8, np.zeros(8, np.int64))
    assert counts.tolist() == [50] * 8 + [400, 0, 0]


def test_workers_take_parts_and_come_back_after_a_sleep():
    work = np.full(16, 20_000)
    with team.one_at_a_time:
        members = team.team_of(2)
        for _ in range(3):
            for _ in range(100):  # the worker may be late where other programs run
                if run(members, 20, 2, 16, work)[17]:
                    break
            else:
                pytest.fail("the worker never came")
            time.sleep(0.01)  # it sleeps after a fifth of a millisecond


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers look again now and then")
def test_threads_that_have_nothing_to_do_take_no_time():
    with team.one_at_a_time:
        run(team.team_of(4), 10, 2, 8, np.zeros(8, np.int64))
        time.sleep(0.1)
        before = os.times()
        time.sleep(1)
        after = os.times()
    assert after.user - before.user < 0.05, "a thread that spins would take a second"


def test_another_number_of_threads_is_another_team_and_stopped_ones_end():
    with team.one_at_a_time:
        first, second = team.team_of(3), team.team_of(2)
        assert team.team_of(3) is first and team.team_of(2) is second
        threads = team._teams[3].threads
        team._stop(3)
        assert not any(thread.is_alive() for thread in threads)
        counts = run(team.team_of(3), 20, 3, 9, np.zeros(9, np.int64))
    assert counts[:9].tolist() == [20] * 9


@team.job
@numba.njit(**VIEWS)
def append(worker, part, parts, team_array, last, log, count):
    """Note the number of jobs so far; the list ends when that is `last`."""
    log[count[0]] = count[0]
    count[0] += 1
    if count[0] == last:
        team.end_list(team_array)


@numba.njit(**EXACT)
def run_list(team_array, times, last, counts, work, log, count):
    """A list of three jobs of many parts and one that may end it."""
    team.begin(team_array)
    for _ in range(3):
        add_one(team_array, 2, len(work), (counts, work))
    append(team_array, 1, 1, (team_array, last, log, count))
    team.compute(team_array, times)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_recorded_list_is_computed_as_often_as_asked_or_until_a_job_ends_it(threads):
    work = np.random.default_rng(1).integers(0, 500, 16)
    for _ in range(200):
        for times, last, done in (7, 0, 7), (7, 3, 3), (1, 1, 1):
            counts, log, count = np.zeros(16 + threads, np.int64), np.zeros(8), np.zeros(1, int)
            with team.one_at_a_time:
                run_list(team.team_of(threads), times, last, counts, work, log, count)
            assert counts[:16].tolist() == [3 * done] * 16, (times, last)
            assert count[0] == done and log[:done].tolist() == [*range(done)]
