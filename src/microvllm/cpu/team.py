"""The thread team of the CPU kernels: one thread leads, workers take parts of its work.

    leader   publishes a job of 8 parts: takes 0, 1, 2, ... then waits until all 8 are done
    worker   spins ... takes 4, 5, 6, ... ................. spins, and after a while sleeps

A part belongs to the first thread that claims it, and a job is done when all of its parts are done,
not when all threads have arrived. So a worker that the system runs late, because other programs use
the same cores, takes fewer parts, and the others take more.

A worker that the system stops in the middle of a part would hold up all others. Linux does that at
a timer tick, often 4 ms apart, when another program waits for the core. So a worker offers its core
between two parts (sched_yield) before that: after TURN_NS.

No thread spins for long. A worker without work sleeps after SPIN_NS. A leader that waits for a
worker's last part sleeps after WAIT_NS: then its core is idle, and the system moves the waiting
worker there.

The parts of a job are in runs, one for each thread. A thread takes the parts of its own run first,
so that it reads weights which lie side by side in memory; then it takes those of the other runs.
"""

from __future__ import annotations

import atexit
import os
import platform
import sys
import threading

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic

from .vectors import EXACT, kept, vectorised

MAX_THREADS, MAX_PARTS = 256, 2**15
SPIN_NS, WAIT_NS, TURN_NS = 200_000, 50_000, 700_000

# Places in a team's array of int64. Those that several threads write have a cache line each.
SIZE = 0  # threads, with the leader
JOB = 8  # the job's number and, in the low 16 bits, its runs
FUNCTION, DATA, PARTS = 9, 10, 11  # in the same line: the job's code, arguments, number of parts
DONE = 16  # parts of the job that workers have done
SLEEPERS = 24  # workers that went to sleep since the leader last woke them
EPOCH = 32  # changes when workers are woken
LEADER = 40  # 1 while the leader sleeps
RUNS = 48  # for each run a line: the job's number, the run's end and its next part
_LINE, _BITS, _MASK = 8, 16, 0xFFFF
_STOP = -1  # as JOB: workers end

_LINUX = sys.platform == "linux"
_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine()) if _LINUX else None
_FUTEX_WAIT, _FUTEX_WAKE = 128, 129  # FUTEX_PRIVATE_FLAG is in both
_CLOCK_MONOTONIC = 6 if sys.platform == "darwin" else 1

# A kernel runs for one Python thread at a time. Like all locks that a step takes this is one of C,
# taken by `with`: the interpreter lets no exception strike between the lock and the block.
one_at_a_time = threading.RLock()


# what the threads have in common ------------------------------------------------------------------


@vectorised(types.int64)
def _add(b, team, place, value):
    """Add to team[place] atomically; returns what was there before."""
    return b.atomic_rmw("add", b.at(team.data, place), value, "seq_cst")


@vectorised(types.int64)
def _swap(b, team, place, value):
    return b.atomic_rmw("xchg", b.at(team.data, place), value, "seq_cst")


@vectorised(types.int64)
def _peek(b, team, place):
    return b.load_atomic(b.at(team.data, place), "seq_cst", 8)


@vectorised()
def _put(b, team, place, value):
    """Write after all that was written before; a later read may come first."""
    b.store_atomic(value, b.at(team.data, place), "release", 8)


@vectorised()
def _pause(b):
    """Tell the processor that this thread spins."""
    machine = platform.machine()
    if machine in ("x86_64", "AMD64"):
        b.ask("llvm.x86.sse2.pause", ir.VoidType())
    elif machine in ("aarch64", "arm64"):
        b.ask("llvm.aarch64.hint", ir.VoidType(), b.i32(1))


def _c_function(b, name: str, result, *kinds):
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(result, kinds), name)


@vectorised(types.int64)
def _now(b):
    """Nanoseconds of a clock that never goes back."""
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
    """Sleep until _wake is called for team[place], unless its value has changed already. Systems
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
    """Compute a part of the job whose code and arguments are at these addresses."""
    pointer = b.i8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, b.i64, b.i64, b.i64])
    function = b.inttoptr(function, kind.as_pointer())
    b.call(function, [b.inttoptr(data, pointer), worker, part, parts])


@numba.njit(**EXACT)
def _claim(team, run):
    """The next part of a run, or -1 if all of them are claimed. The count cannot overflow: a thread
    adds to it only after it has seen that there is a part left."""
    place = RUNS + _LINE * run
    claim = _peek(team, place)
    if claim & _MASK >= (claim >> _BITS) & _MASK:
        return -1
    claim = _add(team, place, 1)
    part = claim & _MASK
    return part if part < (claim >> _BITS) & _MASK else -1


@numba.njit(**EXACT)
def _spin(spins, began, limit):
    """Wait for a moment. Returns the count of such moments, when the first ones were (0: not known
    yet), and whether that is longer ago than `limit` nanoseconds."""
    _pause()
    spins += 1
    if spins % 64:  # to read the clock takes as long as some of them
        return spins, began, False
    now = _now()
    if began == 0:
        return spins, now, False
    return spins, began, now - began > limit


# the leader ---------------------------------------------------------------------------------------


@kept(**EXACT)
def _lead(team, function, data, runs, parts):
    """Publish a job, take parts of it, and return when all parts are done."""
    _put(team, FUNCTION, function)
    _put(team, DATA, data)
    _put(team, PARTS, parts)
    _put(team, DONE, 0)
    number = (_peek(team, JOB) >> _BITS) + 1 & 0x3FFFFFFF
    for run in range(runs):
        first, end = parts * run // runs, parts * (run + 1) // runs
        _put(team, RUNS + _LINE * run, number << 2 * _BITS | end << _BITS | first)
    _put(team, JOB, number << _BITS | runs)
    sleepers = _swap(team, SLEEPERS, 0)
    if sleepers:
        woken = min(sleepers, parts - 1)  # more would find nothing to do
        _add(team, SLEEPERS, sleepers - woken)
        _add(team, EPOCH, 1)
        _wake(team, EPOCH, woken)
    own = 0
    for run in range(runs):
        part = _claim(team, run)
        while part >= 0:
            _call(function, data, 0, part, parts)
            own += 1
            part = _claim(team, run)
    _await_workers(team, parts - own)


@numba.njit(**EXACT)
def _await_workers(team, due):
    """Return when workers have done `due` parts."""
    spins, began = 0, 0
    while _peek(team, DONE) < due:
        spins, began, is_over = _spin(spins, began, WAIT_NS)
        if is_over:
            _swap(team, LEADER, 1)
            done = _peek(team, DONE)
            if done < due:
                _sleep(team, DONE, done)
            _put(team, LEADER, 0)


# the workers --------------------------------------------------------------------------------------


@kept(**EXACT)
def _work(team, worker):
    """What a worker does until the team is stopped."""
    job, resumed = 0, _now()
    while True:
        if _peek(team, JOB) == job:
            resumed = _await_job(team, job, resumed)
        job = _peek(team, JOB)
        if job == _STOP:
            break
        runs = job & _MASK
        for i in range(runs):
            run = (worker + i) % runs
            part = _claim(team, run)
            while part >= 0:
                # the job that the part is of cannot end before the part is done
                function, data, parts = _peek(team, FUNCTION), _peek(team, DATA), _peek(team, PARTS)
                _call(function, data, worker, part, parts)
                _add(team, DONE, 1)
                if _peek(team, LEADER):
                    _wake(team, DONE, 1)
                if _now() - resumed > TURN_NS:
                    _offer_core()
                    resumed = _now()
                part = _claim(team, run)


@numba.njit(**EXACT)
def _await_job(team, job, resumed):
    """Return when there is another job; the time since when this thread has run without a pause."""
    spins, began = 0, 0
    while _peek(team, JOB) == job:
        spins, began, is_over = _spin(spins, began, SPIN_NS)
        if is_over:
            _add(team, SLEEPERS, 1)
            epoch = _peek(team, EPOCH)
            if _peek(team, JOB) == job:
                _sleep(team, EPOCH, epoch)
            resumed, began = _now(), 0
    return resumed


# what kernels call --------------------------------------------------------------------------------


def job(body):
    """A decorator of a compiled function body(worker, part, parts, *arguments), which returns and
    raises nothing. It becomes one of (team, runs, parts, arguments), for kernels, that calls body
    for each part from 0 on, in the team's threads.

    team: the array of `team_of`; runs: threads for which parts lie side by side; parts: a multiple
    of runs, at most MAX_PARTS; worker: which thread it is, less than team[SIZE].
    """

    @intrinsic
    def addresses(context, arguments):
        """Of code that takes a part, and of the arguments: valid until the caller returns."""
        kinds = types.int64, types.int64, types.int64, *map(types.unliteral, arguments.types)
        context.resolve_function_type(types.Dispatcher(body), kinds, {})

        def codegen(context, builder, signature, values):
            compiled = body.overloads[kinds]
            context.active_code_library.add_linking_library(compiled.library)
            place = cgutils.alloca_once_value(builder, values[0])
            number, pointer = ir.IntType(64), ir.IntType(8).as_pointer()
            kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
            name = builder.module.get_unique_name(f"{body.__name__}_of_job")
            function = ir.Function(builder.module, kind, name)
            function.linkage = "internal"
            inner = ir.IRBuilder(function.append_basic_block())
            packed = inner.load(inner.bitcast(function.args[0], values[0].type.as_pointer()))
            given = *function.args[1:], *cgutils.unpack_tuple(inner, packed)
            callee = context.declare_function(builder.module, compiled.fndesc)
            context.call_conv.call_function(inner, callee, types.none, kinds, given)
            inner.ret_void()
            found = [builder.ptrtoint(each, number) for each in (function, place)]
            return context.make_tuple(builder, signature.return_type, found)

        return types.UniTuple(types.int64, 2)(arguments), codegen

    def fork(team, runs, parts, arguments):
        code, data = addresses(arguments)
        if parts == 1 or team[SIZE] == 1:
            for part in range(parts):
                _call(code, data, 0, part, parts)
        else:
            _lead(team, code, data, runs, parts)

    # kernels that were compiled in different processes are linked by their names
    fork.__name__ = body.__name__
    fork.__qualname__ = f"fork_{body.__qualname__}"
    return numba.njit(**EXACT)(fork)


# the threads --------------------------------------------------------------------------------------


def _new_team(size: int) -> np.ndarray:
    """The array of a team; it begins at a cache line."""
    count = RUNS + _LINE * MAX_THREADS
    whole = np.zeros(count + _LINE, np.int64)
    start = -whole.ctypes.data % 64 // 8
    team = whole[start : start + count]
    team[SIZE] = size
    return team


_ALONE = _new_team(1)
_teams: dict[int, tuple[np.ndarray, list[threading.Thread]]] = {}  # by size, with their workers
_process = os.getpid()


def team_of(size: int | None = None) -> np.ndarray:
    """The team whose threads compute the next kernels: as many as torch has, or `size` of them.
    Call it with one_at_a_time held. Raises RuntimeError in a fork, which has no threads."""
    check_process()
    size = min(size or torch.get_num_threads(), MAX_THREADS)
    if size == 1:
        return _ALONE
    team, threads = _teams.get(size, (None, []))
    if len(threads) != size - 1:  # an exception may have struck in here
        _stop(size)
        _work.compile((types.int64[::1], types.int64))
        team, threads = _teams[size] = _new_team(size), []
        for worker in range(1, size):
            thread = threading.Thread(
                target=_work, args=(team, worker), name=f"microvllm-{worker}", daemon=True
            )
            thread.start()
            threads.append(thread)
    return team


def _stop(size: int) -> None:
    """End the workers of a team."""
    if size in _teams and os.getpid() == _process:
        team, threads = _teams.pop(size)
        _stop_workers(team)
        for thread in threads:
            thread.join(1)


@atexit.register
def _stop_all() -> None:
    """End all workers, before the interpreter unloads their code."""
    for size in [*_teams]:
        _stop(size)


@kept(**EXACT)
def _stop_workers(team):
    _put(team, JOB, _STOP)
    _add(team, EPOCH, 1)
    _wake(team, EPOCH, MAX_THREADS)


def check_process() -> None:
    """Raises RuntimeError in a fork of a process that has a team."""
    if os.getpid() != _process:
        raise RuntimeError(
            f"attention='numba' began in process {_process}, whose threads a fork does not have: "
            "start processes with 'spawn' or 'forkserver' (multiprocessing.get_context)"
        )


def give_back() -> None:
    """Release what an exception has left taken by this thread: numba's lock, which has an __enter__
    of Python and is taken as a kernel is loaded; and ours, where a trace has struck."""
    for lock in one_at_a_time, global_compiler_lock._lock:
        while lock._is_owned():
            lock.release()
