"""Exceptions from outside, at any line: a signal's handler, a time limit, no memory. Whatever was
half done, the engine's state is consistent before the next step, and all requests get the same
tokens."""

import ctypes
import json
import random
import signal
import sys
import threading
import time
from functools import partial

import pytest
from helpers.full_engines import (
    TOOL_GOLDENS,
    assert_idle,
    build,
    chain,
    check,
    greedy,
    ids,
    sampled,
)
from helpers.strikes import ALL, SIGNAL, Strike, Struck, release_lock
from helpers.traces import compare

from microvllm import SamplingParams
from microvllm.cpu import team
from microvllm.features.logits_processor import WatchedHandler, watched_handlers
from microvllm.trace import Replay

pytestmark = pytest.mark.usefixtures("one_thread")


def bias(tokens, logits):
    return logits + 0.01 * (len(tokens) % 3)


NAME = {"regex": "[A-Z][a-z]{3,9}"}
# samples that split and copy blocks, chunks, log-probabilities, edits, stops, a tool, a guide, a
# score
WORK = [
    (ids(18, 1), {"sampling_params": sampled(7, seed=3, n=3)}),
    (ids(18, 1), {"sampling_params": greedy(9, logprobs=2)}),
    (ids(9, 2), {"sampling_params": sampled(12, seed=4, top_k=20, repetition_penalty=1.1)}),
    (ids(12, 3), {"sampling_params": greedy(5, logits_processor=bias)}),
    (ids(11, 5), {"sampling_params": sampled(44, seed=6), "tools": True}),
    (ids(8, 8), {"sampling_params": SamplingParams(max_tokens=20, seed=7, n=2, guide=NAME)}),
    (ids(10, 6), {"continuation": ids(9, 7)}),
]


def add(llm, stop: tuple[str, ...]) -> dict[int, int]:
    """WORK, and one request with stop strings; returns the number of each by its id."""
    params = sampled(44, seed=5, stop=stop)
    work = [*WORK, (ids(13, 4), {"sampling_params": params})]
    return {llm.add_request(prompt, **more): i for i, (prompt, more) in enumerate(work)}


def work(llm, call: Strike, stop: tuple[str, ...] = ()) -> dict:
    """All of it, step by step; returns outputs without what may change: what was cached."""
    numbers, extra = add(llm, stop), llm.add_request(ids(30, 4), greedy(20))
    outputs: dict = {}
    for turn in range(300):
        if turn == 5:
            call(llm.abort, extra)
        if llm.is_finished():
            break
        for output in call(llm.step):
            outputs[output["request_id"]] = output
        check(llm)
    else:
        raise AssertionError("a thread waits forever")
    # the abort itself may have been struck before anything was noted
    assert outputs.pop(extra)["finish_reason"] in ("abort", "length")
    assert outputs.keys() == numbers.keys(), "an output was lost, or came twice"
    return {numbers[i]: plain(output) for i, output in outputs.items()}


def plain(output):
    """An output without ids and counts of the cache; log-probabilities rounded."""
    if isinstance(output, dict):
        gone = ("num_cached_tokens", "request_id")
        return {key: plain(value) for key, value in output.items() if key not in gone}
    if isinstance(output, (list, tuple)):
        return [plain(value) for value in output]
    return round(output, 3) if isinstance(output, float) else output


def engine(**options):
    """A small pool, so that sequences are preempted."""
    return build(**{"block_size": 4, "num_blocks": 22, "max_batched_tokens": 24} | options)


def start_anew(llm) -> None:
    """Forget all K and V, so that each run computes the same."""
    llm.guard.perform(llm.reset)


def prepare(llm) -> tuple[tuple[str, ...], dict]:
    """A stop string that is met, and the outputs of an undisturbed run."""
    text = work(llm, Strike())[len(WORK)]["text"]
    stop = (text[len(text) // 2 :][:3],)
    start_anew(llm)
    expected = work(llm, Strike(), stop)
    assert expected[len(WORK)]["finish_reason"] == "stop"
    assert expected[len(WORK)]["stop_reason"] == stop[0]
    assert llm.scheduler.num_preemptions > 0
    return stop, expected


def strike(llm, stop, expected, at, **options) -> bool:
    """One run with one exception; was it raised?"""
    start_anew(llm)
    found = Strike(at, **options)
    assert work(llm, found, stop) == expected, at
    assert_idle(llm)
    release_lock(llm)
    return found.struck


def lines_of(llm, stop, expected) -> list[tuple[str, int]]:
    """The lines of the package that an undisturbed run reaches inside steps and aborts."""
    start_anew(llm)
    found = Strike()
    assert work(llm, found, stop) == expected
    return [*found.lines]


def test_an_exception_at_some_lines_of_a_step_changes_no_token():
    with engine() as llm:
        stop, expected = prepare(llm)
        lines = lines_of(llm, stop, expected)
        assert all(strike(llm, stop, expected, line) for line in lines[::40])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, files",
    [({}, ""), ({"prompt_lookup": 4}, "features/lookup.py"), ({"overlap": True}, "loops/ahead.py")],
    ids=["plain", "lookup", "ahead"],
)
def test_an_exception_at_any_line_of_a_step_changes_no_token(options, files):
    with engine(**options) as llm:
        stop, expected = prepare(llm)
        lines = [line for line in lines_of(llm, stop, expected) if line[0].startswith(files)]
        assert len(lines) > (20 if files else 500)
        if not ALL:
            lines = lines[1::7] + [line for line in lines if line[0] == "tokenizer.py"]
        missed = [line for line in lines if not strike(llm, stop, expected, line)]
    assert not missed, f"{options}: {len(missed)} of {len(lines)} lines were not reached again"


class Follower(Strike):
    """Follows the engine's trace after each call, and compares it with the engine."""

    def __init__(self, llm, trace, at=None):
        super().__init__(at)
        self.llm, self.trace_of_it, self.replay, self.num_replayed = llm, trace, Replay(), 0

    def __call__(self, function, *args):
        result = super().__call__(function, *args)
        if self.llm.guard.changing is None:  # else the next step makes the state again first
            self.llm.loop.drain()
            self.trace_of_it.recorder.catch_up()
            lines = [*self.trace_of_it.log.lines]
            for line in lines[self.num_replayed :]:
                self.replay.apply(json.loads(line))
            self.num_replayed = len(lines)
            compare(self.replay, self.llm.scheduler)
        return result


def followed(llm, stop, expected, at=None) -> Follower:
    """One run with a trace and, maybe, one exception: the trace tells what the engine has."""
    start_anew(llm)
    with llm.tracing() as trace:
        found = Follower(llm, trace, at)
        assert work(llm, found, stop) == expected, at
        tokens = sorted(life.tokens for life in found.replay.seqs.values() if life.state == "done")
    samples = [s for output in expected.values() for s in output.get("samples", ())]
    assert len(samples) > 6
    for told in [sample["token_ids"] for sample in samples]:
        assert any(life[len(life) - len(told) :] == told for life in tokens), at
    release_lock(llm)
    return found


@pytest.mark.slow
def test_a_trace_tells_the_truth_after_an_exception_at_any_line():
    with engine() as llm:
        stop, expected = prepare(llm)
        lines = [*followed(llm, stop, expected).lines]
        # changes, and how a trace finds them
        files = "scheduler.py", "blocks.py", "features/windows.py"
        files += "trace/recorder.py", "trace/releases.py", "trace/extension.py", "trace/log.py"
        lines = [line for line in lines if line[0] in files]
        assert len(lines) > 200
        lines = lines if ALL else lines[1::7]
        hit = sum(followed(llm, stop, expected, line).struck for line in lines)
    print(f"with a trace: {hit} of {len(lines)} lines")
    assert hit == len(lines)


def test_an_exception_in_a_tools_call_is_not_the_tools():
    """The calculator, asked once more, has the answer that it would have had."""
    with chain() as llm:
        (run, *_) = (run for run in TOOL_GOLDENS["runs"] if 0 in run["masks"])

        def call():
            params = SamplingParams(temperature=0, max_tokens=60)
            number = llm.add_request(run["prompt"], params, tools=True)
            outputs = {}
            while not llm.is_finished():
                outputs |= {output["request_id"]: output for output in found(llm.step)}
            return outputs[number]["token_ids"], outputs[number]["mask"]

        found = Strike()
        expected = call()
        assert expected == (run["tokens"], run["masks"])
        files = "features/calculator.py", "features/tools.py"
        lines = [line for line in found.lines if line[0] in files]
        assert len(lines) > 40
        for line in lines:
            start_anew(llm)
            found = Strike(line)
            assert call() == expected, line
            assert found.struck
            release_lock(llm)


class Limit:
    """A time limit."""

    def strike(self, number, frame):
        raise Struck


def judged(judge) -> tuple[list, list]:
    """(the outputs of two requests, the errors of steps). The first request has this
    logits_processor."""
    struck = []
    with build() as llm:
        work = (ids(9, 1), greedy(5, logits_processor=judge)), (ids(9, 2), greedy(5))
        numbers, outputs = [llm.add_request(*request) for request in work], {}
        while not llm.is_finished():
            try:
                outputs |= {output["request_id"]: output for output in llm.step()}
            except Struck as error:
                struck.append(error)
            check(llm)
        assert_idle(llm)
    return [plain(outputs[number]) for number in numbers], struck


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize(
    "handler",
    [Limit().strike, partial(Limit.strike, None), None],
    ids=["method", "partial", "any arguments"],
)
def test_a_signal_inside_a_logits_processor_is_not_the_processors_error(handler, depth):
    def deeper(left: int) -> None:
        if left:
            return deeper(left - 1)
        signal.raise_signal(signal.SIGINT)

    def judge(tokens, logits):
        if len(tokens) == 11 and not asked:
            asked.append(tokens)
            deeper(depth)
        return logits

    def strike(*_):
        raise Struck

    asked, before = [ids(11)], signal.signal(signal.SIGINT, handler or strike)
    try:
        expected, struck = judged(judge)
        assert not struck
        asked.clear()
        found, struck = judged(judge)
    finally:
        signal.signal(signal.SIGINT, before)
    assert found == expected and len(struck) == len(asked) == 1


@pytest.mark.parametrize("kept", [True, False], ids=["as it is", "as another exception"])
def test_a_time_limit_is_not_lost_in_a_processor_that_catches_it(kept):
    """What the processor makes of it is not its own exception. One that catches it for good, since
    the limit is its own, goes on."""
    asked: list = []

    def judge(tokens, logits):
        if len(tokens) == 11 and not asked:
            asked.append(tokens)
            try:
                signal.raise_signal(SIGNAL)
            except Struck as error:
                if not kept:
                    raise KeyError("no rule") from error
        return logits

    def strike(*_):
        raise Struck

    before = signal.signal(SIGNAL, strike)
    try:
        (first, second), struck = judged(judge)
        assert signal.getsignal(SIGNAL) is strike
    finally:
        signal.signal(SIGNAL, before)
    assert first["finish_reason"] == second["finish_reason"] == "length"
    assert len(struck) == (not kept) and len(asked) == 1


def test_a_time_limit_of_the_processors_own_is_its_own():
    """It sets the handler itself."""

    def judge(tokens, logits):
        def strike(*_):
            raise Struck("my own")

        before = signal.signal(SIGNAL, strike)
        try:
            signal.raise_signal(SIGNAL)
        finally:
            signal.signal(SIGNAL, before)

    before = signal.signal(SIGNAL, lambda *_: None)
    try:
        (bad, good), struck = judged(judge)
    finally:
        signal.signal(SIGNAL, before)
    assert bad["stop_reason"] == "logits_processor: Struck: my own"
    assert good["finish_reason"] == "length" and not struck


@pytest.mark.parametrize("kind", [SystemExit, GeneratorExit, Struck])
def test_a_processor_that_is_struck_twice_at_a_token_starves_no_other_request(kind):
    """It always exits, or it never meets the caller's time limit."""

    def judge(tokens, logits):
        if len(tokens) < 11:
            return logits
        if kind is Struck:
            signal.raise_signal(SIGNAL)
        raise kind("again")

    def strike(*_):
        raise Struck("too long")

    before, struck = signal.signal(SIGNAL, strike), []
    try:
        with build() as llm:
            params = [greedy(5, logits_processor=judge), greedy(5)]
            first, second = [llm.add_request(ids(9, i), p) for i, p in enumerate(params, 1)]
            outputs = {}
            for _ in range(20):
                try:
                    outputs |= {output["request_id"]: output for output in llm.step()}
                except (kind, Struck) as error:
                    struck.append(error)
                check(llm)
            assert llm.is_finished()
            assert_idle(llm)
            outputs[None] = llm.generate([ids(9, 2)], greedy(5), use_tqdm=False)[0]
    finally:
        signal.signal(SIGNAL, before)
    assert len(struck) == 2 and outputs[first]["finish_reason"] == "error"
    assert outputs[first]["stop_reason"].startswith(f"logits_processor: {kind.__name__}: ")
    assert len(outputs[first]["token_ids"]) == 2
    assert outputs[second]["token_ids"] == outputs[None]["token_ids"]


def test_handlers_that_were_left_watched_are_put_back_by_the_next_step():
    def handler(*_):
        raise Struck

    before = signal.signal(SIGNAL, WatchedHandler(WatchedHandler(handler, []), []))
    try:
        with watched_handlers() as raised:
            with pytest.raises(Struck):
                signal.raise_signal(SIGNAL)
        assert len(raised) == 1 and signal.getsignal(SIGNAL) is handler
    finally:
        signal.signal(SIGNAL, before)


def test_what_another_thread_raises_inside_a_logits_processor_counts_as_the_processors():
    """Nothing tells it from an exception of the processor itself."""
    raised = ctypes.pythonapi.PyThreadState_SetAsyncExc
    me = ctypes.c_ulong(threading.get_ident())

    def judge(tokens, logits):
        raised(me, ctypes.py_object(Struck))
        while True:
            pass

    (bad, good), struck = judged(judge)
    assert (bad["finish_reason"], bad["token_ids"], struck) == ("error", [], [])
    assert bad["stop_reason"].startswith("logits_processor: Struck")
    assert good["finish_reason"] == "length"


def test_no_exception_leaves_a_lock_taken():
    """Between a lock of C's and the block of its `with` nothing can strike, on both sides of it; an
    __enter__ or __exit__ of Python's would be left half done in every second of these rounds."""
    raised, usual = ctypes.pythonapi.PyThreadState_SetAsyncExc, sys.getswitchinterval()
    with engine() as llm:
        locks, rounds, left = [llm.guard.lock, team.one_at_a_time], [], []

        def take(lock) -> None:
            while len(rounds) < 400:
                try:
                    ready.set()
                    while True:
                        with lock:
                            pass
                except Struck:
                    pass
                rounds.append(lock)
                while lock._is_owned():
                    left.append(lock)
                    lock.release()

        try:
            sys.setswitchinterval(1e-5)
            for lock in locks:
                rounds.clear()
                ready = threading.Event()
                thread = threading.Thread(target=take, args=[lock])
                thread.start()
                while thread.is_alive():
                    if ready.wait(0.001):
                        ready.clear()
                        time.sleep(random.random() * 1e-4)
                        raised(ctypes.c_ulong(thread.ident), ctypes.py_object(Struck))
                assert len(rounds) == 400
        finally:
            sys.setswitchinterval(usual)
    assert not left, f"{len(left)} of 800"


def test_a_lock_that_a_step_leaves_taken_is_given_back(monkeypatch):
    """numba's, for one, whose __enter__ is Python's."""
    locks = [team.one_at_a_time, team.global_compiler_lock._lock]
    with engine() as llm:

        def struck(plan):
            for lock in locks:
                lock.acquire()
            raise Struck

        with monkeypatch.context() as patch:
            patch.setattr(llm.runner, "launch", struck)
            llm.add_request(ids(8), greedy(4))
            with pytest.raises(Struck):
                llm.step()
        assert not any(lock._is_owned() for lock in locks)
        while not llm.is_finished():
            llm.step()


@pytest.mark.slow
def test_an_exception_at_any_instruction_changes_no_token():
    with engine() as llm:
        stop, expected = prepare(llm)
        start_anew(llm)
        found = Strike(opcodes=True)
        assert work(llm, found, stop) == expected
        numbers = random.Random(5).sample(range(1, found.count), 40 if ALL else 20)
        hit = sum(strike(llm, stop, expected, number, opcodes=True) for number in numbers)
    print(f"{hit} of {found.count:,} instructions")
    assert hit == len(numbers)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["generate", "stream"])
def test_what_leaves_a_call_by_an_exception_leaves_nothing_behind(how, monkeypatch):
    with engine() as llm:
        # how many steps fit in one call is measured, so some lines would be reached or not by the
        # clock: one step
        monkeypatch.setattr(llm.runner, "how_many_steps", lambda seqs: 1, raising=False)
        prompts, params = [ids(9, 1), ids(9, 2)], [sampled(6, seed=1, n=2), greedy(5)]

        def call():
            if how == "generate":
                return plain(llm.generate(prompts, params, use_tqdm=False))
            pieces: dict = {}
            for event in llm.stream(prompts, params):
                key = event["index"], event["sample"]
                text, tokens = pieces.get(key, ("", []))
                pieces[key] = text + event["text"], tokens + event["token_ids"]
            return pieces

        expected, found = call(), Strike()
        start_anew(llm)
        found(call)
        ends = "engine.py", "features/threads.py"
        for line in [line for i, line in enumerate(found.lines) if line[0] in ends or i % 9 == 0]:
            start_anew(llm)
            struck = Strike(line)
            assert struck(call) in ([], expected) and struck.struck, line
            release_lock(llm)
            assert_idle(llm)
        assert call() == expected


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_a_struck_call_had_made_can_be_fetched():
    """At whatever line: an output for each prompt, whose tokens the whole answer begins with."""
    prompts, params = [ids(9, 1), ids(9, 2)], [sampled(6, seed=1, n=2), greedy(5)]

    def tokens(outputs):
        return [[sample["token_ids"] for sample in output["samples"]] for output in outputs]

    with engine(plain=True) as llm:
        found = Strike()
        expected = tokens(found(llm.generate, prompts, params, False))
        ends, called = ("engine.py", "features/threads.py"), 0
        for line in [line for i, line in enumerate(found.lines) if line[0] in ends or i % 9 == 0]:
            start_anew(llm)
            llm.latest_calls.requests = []
            struck = Strike(line)
            returned = tokens(struck(llm.generate, prompts, params, False))
            release_lock(llm)
            partial = tokens(llm.partial_outputs())
            assert_idle(llm)
            # nothing was begun, or all was returned, or there is a beginning for each prompt
            assert len(partial) == 2 or returned in ([], expected), line
            called += len(partial) == 2
            for samples, whole in zip(partial, expected, strict=False):
                for k, sample in enumerate(samples):
                    assert sample == whole[k][: len(sample)], line
        assert called > 100


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_a_stream_leaves_behind_is_aborted_even_if_the_abort_is_struck():
    with engine() as llm:
        lines: set = set()
        for line in [None, *range(100)]:
            stream = llm.stream([ids(9, 1), ids(9, 2)], sampled(30, seed=1, n=2, ignore_eos=True))
            next(stream)
            struck = Strike(sorted(lines)[line] if line is not None else None)
            struck(stream.close)
            lines |= {*struck.lines} if line is None else set()
            del stream
            release_lock(llm)
            llm.guard.deliver()
            assert_idle(llm)
            if line == len(lines) - 1:
                break
    assert len(lines) > 15 and any(name == "engine.py" for name, _ in lines)


def test_an_output_that_a_struck_step_did_not_return_comes_with_the_next():
    with engine() as llm:
        found = Strike()
        number = llm.add_request(ids(9, 1), greedy(1))
        assert [o["request_id"] for o in found(llm.step)] == [number]
        own = [line for line in found.lines if line[0] == "features/threads.py"]
        for line in own:
            number, outputs = llm.add_request(ids(9, 1), greedy(1)), []
            outputs += Strike(line)(llm.step)
            while not llm.is_finished():
                outputs += llm.step()
            assert [output["request_id"] for output in outputs] == [number], line
            release_lock(llm)


def test_signals_at_any_moment_lose_nothing():
    """A time limit by SIGALRM, as an evaluation has it, at moments of its own choice."""
    if not hasattr(signal, "setitimer"):
        pytest.skip("no timers on this system")

    def strike(*_):
        raise Struck

    before, rng, struck = signal.signal(signal.SIGALRM, strike), random.Random(3), 0
    try:
        with build(num_blocks=30, block_size=4) as llm:
            work = [(ids(5, 1), greedy(3)), (ids(2, 2), greedy(3)), (ids(1, 3), greedy(3))]
            expected = [llm.generate([p], q, use_tqdm=False)[0]["token_ids"] for p, q in work]
            for _ in range(150):
                numbers, outputs = [llm.add_request(*request) for request in work], {}
                for turn in range(100):
                    if llm.is_finished():
                        break
                    done = []
                    try:
                        if turn < 9:  # if all are interrupted there is no progress
                            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 2e-3))
                        done = llm.step()
                        signal.setitimer(signal.ITIMER_REAL, 0)
                    except Struck:
                        struck += 1
                    outputs |= {output["request_id"]: output for output in done}
                    check(llm)
                signal.setitimer(signal.ITIMER_REAL, 0)
                # an output that step() had returned when the signal came is the caller's to lose
                for number, tokens in zip(numbers, expected, strict=True):
                    assert number not in outputs or outputs[number]["token_ids"] == tokens
                assert_idle(llm)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert struck > 30
