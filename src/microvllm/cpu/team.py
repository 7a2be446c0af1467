"""The thread team of the CPU kernels: threads that compute a list of jobs together.

    leader   records jobs 0 to 99 with their arguments, then computes parts of them like a worker
    worker   spins ... job 0, part 4 | job 1, part 6 | ...

One thread is the leader, which records a list of jobs. Afterwards all threads are equal: each takes
parts of the current job, and the thread that finishes a job's last part makes the next job current.
So if another program takes the leader's core in the middle of a list, the other threads continue.

A part belongs to the first thread that claims it. A job is done when all its parts are done, even
if some threads took none. So if the system delays a thread because other programs use its core,
this thread takes fewer parts and the others take more.

If the system stops a thread in the middle of a part, all others have to wait. Linux does this at
timer ticks, which are often 4 ms apart, if another program waits for the core. So after TURN_NS a
thread offers its core to other programs between two parts (sched_yield).

No thread spins for long. A thread that finds no part goes to sleep. If a job is still being
computed, it does so after WAIT_NS, because the system can then move a delayed thread of the team to
the free core. If the list is done, it does so after SPIN_NS.

The parts of a job are divided into runs, one for each thread. A thread takes the parts of its own
run first, so that it reads weights that are adjacent in memory; then it takes parts of other runs.
"""

from __future__ import annotations

import atexit
import os
import platform
import sys
import threading
from typing import NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic

from .simd import EXACT, VIEWS, kept, vectorised

MAX_THREADS, MAX_PARTS, MAX_JOBS = 256, 2**15, 2**12
SPIN_NS, WAIT_NS, TURN_NS = 200_000, 50_000, 2_800_000

# Indices of a team's int64 array. Those that several threads write have a cache line each.
SIZE = 0  # number of threads, including the leader
IS_RECORDING = 1  # whether the leader is recording a list; otherwise each job is computed at once
COUNT, NEXT = 2, 3  # number of jobs recorded so far; address of the next job's arguments
SCRATCH, ARGUMENTS = 4, 5  # addresses of the scratch memory and of the first job's arguments
BASE, LENGTH = 8, 9  # number of the list's first job, and number of jobs in the list
END = 10  # number after that of the last job to compute; a list may be computed several times
IS_STOPPED = 11  # whether the workers have to end
JOB = 16  # number of the current job; numbers are never reused
DONE = 24  # number of finished parts of the current job
SLEEPERS = 32  # workers that went to sleep since the others were last woken
EPOCH = 40  # changes when workers are woken
LEADER = 48  # 1 while the leader sleeps
RUNS = 56  # one line per run: the number of a job, and in the low 16 bits its next part
_LINE, _BITS, _MASK = 8, 16, 0xFFFF
_ENTRIES = RUNS + _LINE * MAX_THREADS  # for each recorded job: function, arguments, runs, parts
_ARGUMENTS_SIZE = 2**10  # maximum size of a job's arguments in bytes

_LINUX = sys.platform == "linux"
_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine()) if _LINUX else None
_FUTEX_WAIT, _FUTEX_WAKE = 128, 129  # FUTEX_PRIVATE_FLAG is in both
_CLOCK_MONOTONIC = 6 if sys.platform == "darwin" else 1

# Only one Python thread runs kernels at a time. Like all locks that a step takes, this one is
# implemented in C and taken by `with`: the interpreter cannot raise a signal handler's exception
# between the lock and the block.
one_at_a_time = threading.RLock()


# atomic operations and system calls ---------------------------------------------------------------


@vectorised(types.int64)
def _add(b, team, place, value):
    """Add to team[place] atomically. Return the previous value."""
    return b.atomic_rmw("add", b.at(team.data, place), value, "seq_cst")


@vectorised(types.int64)
def _swap(b, team, place, value):
    return b.atomic_rmw("xchg", b.at(team.data, place), value, "seq_cst")


@vectorised(types.int64)
def _replace(b, team, place, old, new):
    """Set team[place] = new atomically if it equals `old`. Return the previous value."""
    pair = b.cmpxchg(b.at(team.data, place), old, new, "seq_cst", "seq_cst")
    return b.extract_value(pair, 0)


@vectorised(types.int64)
def _peek(b, team, place):
    """Read team[place] atomically."""
    return b.load_atomic(b.at(team.data, place), "seq_cst", 8)


@vectorised()
def _put(b, team, place, value):
    """Write team[place] after all earlier writes. Later reads may be executed before it."""
    b.store_atomic(value, b.at(team.data, place), "release", 8)


@vectorised()
def _pause(b):
    """Hint to the processor that this thread spins."""
    machine = platform.machine()
    if machine in ("x86_64", "AMD64"):
        b.call_intrinsic("llvm.x86.sse2.pause", ir.VoidType())
    elif machine in ("aarch64", "arm64"):
        b.call_intrinsic("llvm.aarch64.hint", ir.VoidType(), b.i32(1))


def _c_function(b, name: str, result, *kinds):
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(result, kinds), name)


@vectorised(types.int64)
def _now(b):
    """Return nanoseconds of a monotonic clock."""
    if os.name != "posix":
        return b.mul(b.call(_c_function(b, "GetTickCount64", b.i64), []), b.i64(1_000_000))
    time = cgutils.alloca_once(b, ir.ArrayType(b.i64, 2))
    function = _c_function(b, "clock_gettime", b.i32, b.i32, time.type)
    b.call(function, [b.i32(_CLOCK_MONOTONIC), time])
    seconds, rest = (b.extract_value(b.load(time), i) for i in (0, 1))
    return b.add(b.mul(seconds, b.i64(1_000_000_000)), rest)


@vectorised()
def _offer_core(b):
    """Let another program that waits for this core run first."""
    if os.name == "posix":
        b.call(_c_function(b, "sched_yield", b.i32), [])
    else:
        b.call(_c_function(b, "SwitchToThread", b.i32), [])


def _futex(b, place, operation: int, value) -> None:
    kinds = b.i64, place.type, b.i64, b.i64, b.i64, b.i64, b.i64
    values = b.i64(_FUTEX), place, b.i64(operation), value, b.i64(0), b.i64(0), b.i64(0)
    b.call(_c_function(b, "syscall", b.i64, *kinds), values)


@vectorised()
def _sleep(b, team, place, value):
    """Sleep until _wake is called for team[place], unless its value is no longer `value`. Systems
    without futexes sleep for a tenth of a millisecond instead."""
    if _FUTEX:
        low = b.and_(value, b.i64(0xFFFFFFFF))
        _futex(b, b.at(team.data, place), _FUTEX_WAIT, low)
    elif os.name == "posix":
        b.call(_c_function(b, "usleep", b.i32, b.i32), [b.i32(100)])
    else:
        b.call(_c_function(b, "Sleep", ir.VoidType(), b.i32), [b.i32(0)])


@vectorised()
def _wake(b, team, place, count):
    """Wake at most `count` threads that sleep at team[place]."""
    if _FUTEX:
        _futex(b, b.at(team.data, place), _FUTEX_WAKE, count)


@vectorised()
def _call(b, function, data, worker, part, parts):
    """Compute a part of the job with its code and its arguments at these addresses."""
    pointer = b.i8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, b.i64, b.i64, b.i64])
    function = b.inttoptr(function, kind.as_pointer())
    b.call(function, [b.inttoptr(data, pointer), worker, part, parts])


@numba.njit(**EXACT)
def _claim(team, job, run, first, end):
    """Claim the next part of a run of the current job; the run has the parts from `first` to `end`.
    Return the part, or -1 if all are claimed or if the job is no longer the current one."""
    place = RUNS + _LINE * run
    claim = _peek(team, place)
    while True:
        claimed = claim >> _BITS
        part = first if claimed < job else claim & _MASK
        if claimed > job or part >= end:
            return -1
        before = claim
        claim = _replace(team, place, before, job << _BITS | part + 1)
        if claim == before:
            return part


@numba.njit(**EXACT)
def _spin(spins, began, limit):
    """Wait for a moment. Return the number of spins, the time at which spinning began (0: not
    measured yet), and whether more than `limit` nanoseconds have passed since then."""
    _pause()
    spins += 1
    if spins % 64:  # reading the clock takes as long as several spins
        return spins, began, False
    now = _now()
    if began == 0:
        return spins, now, False
    return spins, began, now - began > limit


# computing a list ---------------------------------------------------------------------------------


@kept(**EXACT)
def begin(team):
    """Record the jobs that are called from now on, until `compute`."""
    team[IS_RECORDING] = 1
    team[COUNT] = 0
    team[NEXT] = team[ARGUMENTS]


@kept(**EXACT)
def compute(team, times):
    """Compute the recorded jobs in order, `times` times, or until one of them calls `end_list`. The
    arrays of their arguments must exist until this returns."""
    team[IS_RECORDING] = 0
    job = _peek(team, JOB)
    _put(team, BASE, job)
    _put(team, LENGTH, team[COUNT])
    _swap(team, END, job + team[COUNT] * times)
    _wake_workers(team, job)
    _take_jobs(team, 0)


@numba.njit(**VIEWS)
def end_list(team):
    """End the list with the current job. Called in a job that has only one part."""
    _put(team, END, _peek(team, JOB) + 1)


@numba.njit(**EXACT)
def _take_jobs(team, worker):
    """Take parts of jobs: the leader until the list is done, a worker until the team stops."""
    last_pause = _now()
    while True:
        job = _peek(team, JOB)
        is_done = job >= _peek(team, END)
        if not is_done:
            last_pause = _take_parts(team, worker, job, last_pause)
        elif worker == 0 or _peek(team, IS_STOPPED):
            return
        if _peek(team, JOB) == job:
            last_pause = _await_job(team, worker, job, is_done, last_pause)


@numba.njit(**EXACT)
def _take_parts(team, worker, job, last_pause):
    """Take parts of the current job. Return the time of this thread's last pause."""
    entry = _ENTRIES + 4 * ((job - _peek(team, BASE)) % _peek(team, LENGTH))
    function = _peek(team, entry)
    arguments = _peek(team, entry + 1)
    runs = _peek(team, entry + 2)
    parts = _peek(team, entry + 3)
    if _peek(team, JOB) != job:  # the entry may already belong to another list
        return last_pause
    for i in range(runs):
        run = (worker + i) % runs
        first, end = parts * run // runs, parts * (run + 1) // runs
        part = _claim(team, job, run, first, end)
        while part >= 0:
            _call(function, arguments, worker, part, parts)
            if parts == 1 or _add(team, DONE, 1) + 1 == parts:
                _put(team, DONE, 0)
                _finish_job(team, job)
                part = -1
            if team[SIZE] > 1 and _now() - last_pause > TURN_NS:
                _offer_core()
                last_pause = _now()
            if part >= 0:
                part = _claim(team, job, run, first, end)
    return last_pause


@numba.njit(**EXACT)
def _finish_job(team, job):
    """Make the next job the current one."""
    _swap(team, JOB, job + 1)
    if _peek(team, LEADER):
        _wake(team, JOB, 1)
    if job + 1 < _peek(team, END):
        _wake_workers(team, job + 1)


@numba.njit(**EXACT)
def _wake_workers(team, job):
    """Wake sleeping workers, at most as many as can find a part of this job."""
    if _peek(team, SLEEPERS) == 0:
        return
    parts = _peek(team, _ENTRIES + 4 * ((job - _peek(team, BASE)) % _peek(team, LENGTH)) + 3)
    if parts > 1:
        sleepers = _swap(team, SLEEPERS, 0)
        woken = min(sleepers, parts - 1)
        _add(team, SLEEPERS, sleepers - woken)
        _add(team, EPOCH, 1)
        _wake(team, EPOCH, woken)


@numba.njit(**EXACT)
def _await_job(team, worker, job, is_done, last_pause):
    """Wait until another job is current or, if the list is done, until there is another list.
    Return the time of this thread's last pause."""
    spins, began, limit = 0, 0, SPIN_NS if is_done else WAIT_NS
    while _is_same(team, job, is_done):
        spins, began, is_over = _spin(spins, began, limit)
        if not is_over:
            continue
        if worker == 0:
            _swap(team, LEADER, 1)
            if _is_same(team, job, is_done):
                _sleep(team, JOB, job)
            _put(team, LEADER, 0)
        else:
            _add(team, SLEEPERS, 1)
            epoch = _peek(team, EPOCH)
            if _is_same(team, job, is_done):
                _sleep(team, EPOCH, epoch)
        last_pause, began = _now(), 0
    return last_pause


@numba.njit(**EXACT)
def _is_same(team, job, is_done):
    """Return whether `job` is still the current job or, if the list is done, whether there is still
    no new list."""
    if _peek(team, JOB) != job or _peek(team, IS_STOPPED):
        return False
    return not is_done or job >= _peek(team, END)


@kept(**EXACT)
def _work(team, worker):
    """Run a worker until the team stops."""
    _take_jobs(team, worker)


# interface for kernels ----------------------------------------------------------------------------


def job(body):
    """Turn a compiled function body(worker, part, parts, *arguments) into a job for kernels. `body`
    must not return a value or raise.

    The result is a function of (team, runs, parts, arguments) that computes `body` for each part
    from 0 on, in the team's threads. Between `begin` and `compute` it only records the job. In
    this case the arrays of the arguments must exist until `compute` returns.

    team: the array of `team_of`; runs: number of threads that have adjacent parts; parts: a
    multiple of runs, at most MAX_PARTS; worker: index of the thread, less than team[SIZE].
    """

    @intrinsic
    def stored(context, place, arguments):
        """Write the arguments to an address. Return the address of code that computes a part with
        them, and their size in bytes."""
        kinds = types.int64, types.int64, types.int64, *map(types.unliteral, arguments.types)
        context.resolve_function_type(types.Dispatcher(body), kinds, {})

        def codegen(context, builder, signature, values):
            place, value = values
            builder.store(value, builder.inttoptr(place, value.type.as_pointer()))
            compiled = body.overloads[kinds]
            context.active_code_library.add_linking_library(compiled.library)
            number, pointer = ir.IntType(64), ir.IntType(8).as_pointer()
            kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
            name = builder.module.get_unique_name(f"{body.__name__}_of_job")
            function = ir.Function(builder.module, kind, name)
            function.linkage = "internal"
            inner = ir.IRBuilder(function.append_basic_block())
            packed = inner.load(inner.bitcast(function.args[0], value.type.as_pointer()))
            arguments = *function.args[1:], *cgutils.unpack_tuple(inner, packed)
            callee = context.declare_function(builder.module, compiled.fndesc)
            context.call_conv.call_function(inner, callee, types.none, kinds, arguments)
            inner.ret_void()
            size = context.get_abi_sizeof(value.type)
            assert size <= _ARGUMENTS_SIZE, (name, size)
            values = [builder.ptrtoint(function, number), number(size)]
            return context.make_tuple(builder, signature.return_type, values)

        return types.UniTuple(types.int64, 2)(place, arguments), codegen

    def fork(team, runs, parts, arguments):
        is_alone = team[IS_RECORDING] == 0
        if is_alone:
            begin(team)
        code, size = stored(team[NEXT], arguments)
        entry = _ENTRIES + 4 * team[COUNT]
        _put(team, entry, code)
        _put(team, entry + 1, team[NEXT])
        _put(team, entry + 2, runs)
        _put(team, entry + 3, parts)
        team[COUNT] += 1
        team[NEXT] += (size + 63) // 64 * 64
        if is_alone:
            compute(team, 1)

    # kernels compiled in different processes are linked by name
    fork.__name__ = body.__name__
    fork.__qualname__ = f"fork_{body.__qualname__}"
    return numba.njit(inline="always", **EXACT)(fork)


@vectorised(types.voidptr)
def pointer(b, number):
    return b.inttoptr(number, b.i8.as_pointer())


@numba.njit(**EXACT)
def scratch_array(team, start, shape, dtype):
    """Return an array in the team's scratch memory, starting at byte `start`.

    A job may pass data to later jobs in this memory. `team_of` sets its size."""
    return numba.carray(pointer(team[SCRATCH] + start), shape, dtype)


@numba.njit(**EXACT)
def start_after(start, array):
    """Return the first byte, at a cache line, after a scratch array that begins at `start`."""
    return (start + array.nbytes + 63) // 64 * 64


# the threads --------------------------------------------------------------------------------------


def _lined_up(size: int) -> np.ndarray:
    """Return `size` bytes of new, zeroed memory that begins at a cache line."""
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


class _Team(NamedTuple):
    array: np.ndarray  # int64, with the indices above
    arguments: np.ndarray  # bytes for the arguments of recorded jobs
    threads: list[threading.Thread]


def _new_team(size: int) -> _Team:
    """Return a team without threads."""
    array = _lined_up(8 * (_ENTRIES + 4 * MAX_JOBS)).view(np.int64)
    arguments = _lined_up(_ARGUMENTS_SIZE * MAX_JOBS)
    array[SIZE] = size
    array[LENGTH] = 1
    array[JOB] = array[END] = 1  # above the job number in the runs
    array[ARGUMENTS] = arguments.ctypes.data
    return _Team(array, arguments, [])


_teams: dict[int, _Team] = {}  # by size
_scratch = _lined_up(0)
_scratch_address = _scratch.ctypes.data  # stored, because numpy takes long to find it
_process = os.getpid()


def team_of(size: int | None = None, scratch: int = 0) -> np.ndarray:
    """Return the array of the team that computes the next kernels. The caller holds one_at_a_time.

    size: number of threads (default: as many as torch uses); scratch: bytes of scratch memory that
    the kernels need, see scratch_array. Raises RuntimeError in a fork, which has no threads."""
    global _scratch, _scratch_address
    check_process()
    size = min(size or torch.get_num_threads(), MAX_THREADS)
    team = _teams.get(size)
    if team is None or len(team.threads) != size - 1:  # an exception may have interrupted the start
        _stop(size)
        _work.compile((types.int64[::1], types.int64))
        team = _teams[size] = _new_team(size)
        for worker in range(1, size):
            thread = threading.Thread(
                target=_work,
                args=(team.array, worker),
                name=f"microvllm-{worker}",
                daemon=True,
            )
            thread.start()
            team.threads.append(thread)
    if scratch > len(_scratch):
        _scratch = _lined_up(scratch)
        _scratch_address = _scratch.ctypes.data
    team.array[SCRATCH] = _scratch_address
    team.array[IS_RECORDING] = 0  # a kernel that failed may have left it set
    return team.array


def _stop(size: int) -> None:
    """End the workers of a team."""
    if size in _teams and os.getpid() == _process:
        team = _teams.pop(size)
        if team.threads:
            _stop_workers(team.array)
        for thread in team.threads:
            thread.join(1)


@atexit.register
def _stop_all() -> None:
    """End all workers before the interpreter unloads their code."""
    for size in [*_teams]:
        _stop(size)


@kept(**EXACT)
def _stop_workers(team):
    _swap(team, IS_STOPPED, 1)
    _add(team, EPOCH, 1)
    _wake(team, EPOCH, MAX_THREADS)


def check_process() -> None:
    """Raise RuntimeError in a fork of a process that has a team."""
    if os.getpid() != _process:
        raise RuntimeError(
            f"attention='numba' started in process {_process}, whose threads a fork does not have: "
            "start processes with 'spawn' or 'forkserver' (multiprocessing.get_context)"
        )


def give_back() -> None:
    """Release the locks that this thread still holds after an exception: numba's lock, which is
    taken while a kernel is loaded and whose __enter__ is Python code; and one_at_a_time, if a trace
    function raised between the lock and its block."""
    for lock in one_at_a_time, global_compiler_lock._lock:
        while lock._is_owned():
            lock.release()
