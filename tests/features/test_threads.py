"""An engine that several threads call, that is called from inside its own steps, interrupted by
Ctrl-C, closed, or inherited by a fork."""

import gc
import os
import random
import signal
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from helpers.concurrency import run_threads
from helpers.full_engines import (
    assert_idle,
    build,
    check,
    everything_is_free,
    greedy,
    ids,
    sampled,
)
from helpers.goldens import FIXTURES, MODEL

from microvllm import LLM, SamplingParams
from microvllm.trace import Replay

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def llm():
    with LLM(MODEL, num_blocks=400) as llm:
        yield llm


def test_ctrl_c_in_generate_leaves_the_engine_clean_and_usable(llm):
    before = llm.generate(["Hello"], GREEDY)[0]["token_ids"]
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["Once upon a time"] * 8, SamplingParams(max_tokens=900, ignore_eos=True))
    timer.join()
    assert everything_is_free(llm)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert llm.generate(["Hello"], GREEDY)[0]["token_ids"] == before


# threads ------------------------------------------------------------------------------------------


def job(llm, number: int):
    """One of many different calls, and how to make its result comparable."""
    prompts = [ids(5 + (number * k) % 17, number + k) for k in range(3)]
    match number % 4:
        case 0:
            outputs = llm.generate(prompts, sampled(9, seed=number, n=2, top_k=30), use_tqdm=False)
            return [[s["token_ids"] for s in output["samples"]] for output in outputs]
        case 1:
            scores = llm.score(prompts, [ids(6, number)] * 3)
            return pytest.approx(sum(scores, []), abs=1e-4)  # a batch may round otherwise
        case 2:
            texts = {}
            for event in llm.stream(prompts, sampled(11, seed=number)):
                text, tokens, _ = texts.get(event["index"], ("", [], None))
                reason = event["finish_reason"]
                texts[event["index"]] = text + event["text"], tokens + event["token_ids"], reason
            return texts
        case _:
            (output,) = llm.generate(prompts[:1], greedy(12, logprobs=1), use_tqdm=False)
            return output["token_ids"], [e["token_id"] for e in output["logprobs"]]


def unwrapped(result):
    """Numbers as they are, to be compared with approximate ones."""
    return getattr(result, "expected", result)


def test_eight_threads_get_what_one_thread_gets():
    # two threads in `score` got 5 of 12 results wrong, and the prefix cache stayed wrong
    with build(num_blocks=120, block_size=4, max_batched_tokens=48) as alone:
        expected = [job(alone, number) for number in range(48)]
    with build(num_blocks=120, block_size=4, max_batched_tokens=48) as llm:
        numbers = list(range(48))
        random.Random(1).shuffle(numbers)

        def several(part: list[int]):
            return {number: job(llm, number) for number in part}

        found: dict = {}
        for result in run_threads([lambda k=k: several(numbers[k::8]) for k in range(8)]):
            if isinstance(result, BaseException):
                raise result
            found |= result
        assert [unwrapped(found[number]) for number in range(48)] == expected
        assert_idle(llm)
        again = [unwrapped(job(llm, number)) for number in range(48)]
        assert again == expected  # the cache is right, too


def test_requests_and_aborts_of_other_threads_join_the_steps_that_run():
    with build(num_blocks=200, block_size=4, max_batch_size=8) as llm:
        expected = {n: llm.generate([ids(7, n)], greedy(20), use_tqdm=False) for n in range(24)}
        outputs, done = {}, threading.Event()

        def driver():
            while not done.is_set() or not llm.is_finished():
                for output in llm.step():
                    outputs[output["request_id"]] = output
                with llm.guard.lock:  # others change the state while it is looked at
                    check(llm)

        def client(k: int):
            found = []
            for n in range(k, 24, 6):
                number = llm.add_request(ids(7, n), greedy(20))
                stray = llm.add_request(ids(9, n), greedy(500))
                llm.abort(stray)
                found.append((n, number, stray))
            return found

        def clients():
            results = run_threads([lambda k=k: client(k) for k in range(6)])
            done.set()
            return results

        driven, results = run_threads([driver, clients])
        assert driven is None
        for n, number, stray in sum(results, []):
            assert outputs[number]["token_ids"] == expected[n][0]["token_ids"]
            assert outputs[stray]["finish_reason"] == "abort"
        assert len(outputs) == 48
        assert_idle(llm)


def test_one_batch_serves_several_threads():
    with build(num_blocks=200) as llm:
        rows, launch = [], llm.runner.launch
        llm.runner.launch = lambda plan: (rows.append(len(plan.chunks)), launch(plan))
        deadline = time.monotonic() + 60

        def client(n):
            # One call may be over before the next thread has started, on a fast machine.
            while max(rows, default=0) < 2 and time.monotonic() < deadline:
                llm.generate([ids(6, n)], greedy(40), use_tqdm=False)

        run_threads([lambda n=n: client(n) for n in range(4)])
        assert max(rows) > 1, rows


def test_new_weights_of_another_thread_come_between_two_steps():
    with build() as llm:
        old = {name: w.clone() for name, w in weights(llm).items()}
        new = {name: w * 1.01 for name, w in old.items()}
        prompt, params = ids(30, 3), greedy(8)
        results = []
        for state in (old, new):
            llm.update_weights(state)
            results.append(llm.generate([prompt], params, use_tqdm=False)[0]["token_ids"])

        def swap():
            for i in range(20):
                llm.update_weights((old, new)[i % 2])

        def ask():
            return [llm.generate([prompt], params, use_tqdm=False)[0] for _ in range(20)]

        found = run_threads([swap, ask, ask])
        assert found[0] is None and all(len(outputs) == 20 for outputs in found[1:])
        for state, tokens in zip((old, new), results, strict=True):  # nothing stale is left
            llm.update_weights(state)
            assert llm.generate([prompt], params, use_tqdm=False)[0]["token_ids"] == tokens
        assert_idle(llm)


def test_a_trace_begins_and_ends_between_steps_of_other_threads():
    # half a trace was attached, and steps failed
    with build() as llm:
        expected = llm.generate([ids(9)], greedy(8), use_tqdm=False)[0]["token_ids"]

        def ask():
            return [llm.generate([ids(9)], greedy(8), use_tqdm=False)[0] for _ in range(30)]

        def trace():
            for _ in range(30):
                with llm.tracing() as found:
                    pass
                Replay(found.events)

        for result in run_threads([ask, ask, trace])[:2]:
            assert [output["token_ids"] for output in result] == [expected] * 30


def test_an_abort_does_not_wait_for_the_step_of_another_thread():
    # the garbage collector aborts streams under any lock, for which that step may wait
    with build() as llm:
        inside, gate = threading.Event(), threading.Event()

        def judge(tokens, logits):
            inside.set()
            assert gate.wait(30), "the abort waits for this step"
            return logits

        def ask():
            return llm.generate([ids(5)], greedy(2, logits_processor=judge), use_tqdm=False)[0]

        def abort():
            assert inside.wait(30)
            number = llm.add_request(ids(4), greedy(50))
            llm.abort(number)
            gate.set()
            return number

        asked, number = run_threads([ask, abort])
        assert len(asked["token_ids"]) == 2
        outputs = []
        while not llm.is_finished():
            outputs += llm.step()
        (output,) = outputs
        assert (output["request_id"], output["finish_reason"]) == (number, "abort")
        assert_idle(llm)


def test_an_engine_to_which_a_request_is_on_its_way_is_not_finished():
    numbers, outputs = [], []
    with build() as llm:

        def change():
            assert llm.is_finished()
            numbers.extend(run_threads([lambda: llm.add_request(ids(4), greedy(2))]))
            assert not llm.is_finished()

        llm.guard.perform(change)
        while not llm.is_finished():
            outputs += llm.step()
        assert [output["request_id"] for output in outputs] == numbers


def weights(llm) -> dict[str, torch.Tensor]:
    (file,) = FIXTURES["era5"].directory.glob("model_*.pt")
    return torch.load(file, map_location="cpu", weights_only=True)


# failures -----------------------------------------------------------------------------------------


def test_ctrl_c_in_a_step_that_fails_is_not_kept_for_another(llm, monkeypatch):
    before = llm.generate(["Hello"], GREEDY)[0]["token_ids"]

    def forward(*_):
        os.kill(os.getpid(), signal.SIGINT)
        raise MemoryError

    monkeypatch.setattr(llm.model, "forward", forward)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["Hello"], GREEDY)
    monkeypatch.undo()
    assert llm.generate(["Hello"], GREEDY)[0]["token_ids"] == before


@pytest.mark.parametrize("place", ["reset", "finish"])
def test_a_failure_on_the_way_back_is_made_good_before_the_next_step(place, monkeypatch):
    with build(block_size=4) as llm:
        expected = llm.generate([ids(9), ids(9, 1)], sampled(9, seed=1, n=2), use_tqdm=False)
        expected = [[s["token_ids"] for s in output["samples"]] for output in expected]
        params = sampled(9, seed=1, n=2)
        numbers = [llm.add_request(prompt, params) for prompt in (ids(9), ids(9, 1))]
        for _ in range(3):
            llm.step()
        for owner, name in ((llm.model, "forward"), (llm.scheduler, place)):

            def fail(*_):
                raise MemoryError

            monkeypatch.setattr(owner, name, fail)
        with pytest.raises(MemoryError):
            llm.step()
        monkeypatch.undo()
        outputs = {}
        while not llm.is_finished():
            outputs |= {output["request_id"]: output for output in llm.step()}
            check(llm)
        found = [[s["token_ids"] for s in outputs[number]["samples"]] for number in numbers]
        assert found == expected
        assert_idle(llm)


# calls from inside a step -------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["generate", "step", "stream", "score", "update_weights"])
def test_a_step_inside_a_step_ends_the_request_that_asks_for_it(call):
    # it looped for ever
    with build() as llm:
        state = weights(llm)
        calls = {
            "generate": lambda: llm.generate([ids(3)], greedy(2), use_tqdm=False),
            "step": llm.step, "stream": lambda: list(llm.stream([ids(3)], greedy(2))),
            "score": lambda: llm.score([ids(3)], [ids(2)]),
            "update_weights": lambda: llm.update_weights(state),
        }  # fmt: skip

        def judge(tokens, logits):
            calls[call]()
            return logits

        params = [greedy(4, logits_processor=judge), greedy(4)]
        alone = llm.generate([ids(8, 2)], greedy(4), use_tqdm=False)[0]["token_ids"]
        bad, good = llm.generate([ids(8), ids(8, 2)], params, use_tqdm=False)
        assert good["token_ids"] == alone and good["finish_reason"] == "length"
        assert bad["finish_reason"] == "error" and bad["token_ids"] == []
        assert "a step cannot be requested inside a step" in bad["stop_reason"]
        assert_idle(llm)


def test_requests_aborts_and_stats_are_possible_inside_a_step():
    with build() as llm:
        late, seen = [], []

        def judge(tokens, logits):
            if not late:
                late.append(llm.add_request(ids(5), greedy(3)))
                llm.abort(victim)
                seen.append((llm.is_finished(), llm.stats()["running"]))
            return logits

        first = llm.add_request(ids(8), greedy(4, logits_processor=judge))
        victim = llm.add_request(ids(8, 2), greedy(50))
        outputs = {}
        while not llm.is_finished():
            outputs |= {output["request_id"]: output for output in llm.step()}
            check(llm)
        assert seen == [(False, 2)]
        assert outputs[victim]["finish_reason"] == "abort"
        assert len(outputs[late[0]]["token_ids"]) == 3 and len(outputs[first]["token_ids"]) == 4
        assert_idle(llm)


def test_a_stream_that_is_collected_while_a_step_is_planned_loses_no_block():
    # 10 of 13 blocks were lost for good
    for where in ("find_prefix", "allocate", "release"):
        with build("era1_padded", num_blocks=14, block_size=4, max_batch_size=1) as llm:
            llm.generate([[k] * 40 for k in range(1, 4)], greedy(4))
            params = [greedy(1), greedy(4)]
            stream = llm.stream([[40, 41], list(range(100, 140))], params)
            while next(stream)["finish_reason"] is None:
                pass
            number = llm.add_request([1, 2, 3], greedy(4))
            box = [stream]
            box.append(box)  # a cycle: only the collector finds it
            gone = weakref.ref(stream)
            del box, stream
            blocks, calls = llm.scheduler.blocks, []
            owner = blocks if where == "find_prefix" else blocks.pool
            real = getattr(owner, where)

            def collect(*args, real=real, calls=calls):
                if not calls:
                    calls.append(gc.collect())
                return real(*args)

            setattr(owner, where, collect)
            outputs = []
            while not llm.is_finished():
                outputs += llm.step()
                check(llm)
            assert calls and gone() is None
            assert [output["request_id"] for output in outputs] == [number]
            assert_idle(llm)


# items that fail ----------------------------------------------------------------------------------

NO_IDS = [[3]], ["3"], [None], [1, 2.5], [{}], [3, b"x"], [np.array([1, 2])]


@pytest.mark.parametrize("wrong", NO_IDS)
def test_an_abort_of_what_is_no_id_is_refused_and_leaves_nothing_in_the_inbox(wrong):
    with build(plain=True) as llm:
        number = llm.add_request(ids(9), greedy(3))
        with pytest.raises(TypeError, match="request ids are integers.*abort\\(.request_ids\\)"):
            llm.abort(*wrong)
        assert not llm.guard.inbox
        (output,) = llm.generate([ids(5)], greedy(2), use_tqdm=False)
        assert output["finish_reason"] == "length"
        llm.abort(np.int64(number))
        (aborted,) = llm.step()
        assert (aborted["request_id"], aborted["finish_reason"]) == (number, "abort")
        assert_idle(llm)


def test_an_abort_that_always_fails_is_dropped(monkeypatch):
    with build(plain=True) as llm:
        number = llm.add_request(ids(9), greedy(3))
        with monkeypatch.context() as patch:
            patch.setattr(llm.scheduler, "abort", lambda seqs: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                llm.abort(number)
            assert not llm.guard.inbox
            outputs = []
            while not llm.is_finished():
                outputs += llm.step()
            assert [(o["request_id"], o["finish_reason"]) for o in outputs] == [(number, "length")]
        assert_idle(llm)


def test_an_abort_that_fails_once_is_done_and_the_error_is_seen(monkeypatch):
    with build(plain=True) as llm:
        number, real, calls = llm.add_request(ids(9), greedy(3)), llm.scheduler.abort, []

        def abort(seqs):
            calls.append(seqs)
            if len(calls) == 1:
                raise TimeoutError("from outside")
            return real(seqs)

        monkeypatch.setattr(llm.scheduler, "abort", abort)
        with pytest.raises(TimeoutError, match="from outside"):
            llm.abort(number)
        assert len(calls) == 2 and not llm.guard.inbox
        assert [output["finish_reason"] for output in llm.step()] == ["abort"]
        assert_idle(llm)


@pytest.mark.parametrize("how", ["add_request", "generate", "stream"])
def test_a_request_that_cannot_be_queued_is_an_error_and_harms_no_other(how, monkeypatch):
    with build(plain=True) as llm:
        expected = llm.generate([ids(5)], greedy(4), use_tqdm=False)[0]["token_ids"]
        other = llm.add_request(ids(5), greedy(4))
        with monkeypatch.context() as patch:
            patch.setattr(llm.scheduler, "add", lambda seq: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                if how == "add_request":
                    llm.add_request(ids(9), greedy(3))
                elif how == "generate":
                    llm.generate([ids(9)], greedy(3), use_tqdm=False)
                else:
                    list(llm.stream([ids(9)], greedy(3)))
            assert not llm.guard.inbox
        outputs = {}
        while not llm.is_finished():
            outputs |= {output["request_id"]: output for output in llm.step()}
        assert outputs[other]["token_ids"] == expected
        assert_idle(llm)


# the end ------------------------------------------------------------------------------------------


def test_a_closed_engine_says_so():
    llm = build()
    llm.add_request(ids(4), greedy(4))
    llm.close()
    llm.close()
    for call in (
        lambda: llm.generate([ids(3)], greedy(2)),
        lambda: list(llm.stream([ids(3)], greedy(2))),
        lambda: llm.chat([{"role": "user", "content": "Hello"}], greedy(2)),
        lambda: llm.score([ids(3)], [ids(2)]),
        lambda: llm.add_request(ids(3), greedy(2)),
        lambda: llm.generate_batch(ids(3), max_tokens=2),
        lambda: llm.update_weights({}),
        llm.step,
    ):
        with pytest.raises(RuntimeError, match="this LLM was closed: create a new one"):
            call()
    llm.abort(1)
    assert llm.stats()["running"] == llm.stats()["waiting"] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_says_that_the_engine_is_not_its_own():
    with build() as llm:
        llm.generate([ids(5)], greedy(2), use_tqdm=False)
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:  # nothing but this: the threads of the parent are gone
            told = []
            for call in (llm.step, lambda: llm.generate([ids(3)], greedy(2), use_tqdm=False)):
                try:
                    told.append(f"gave {call()}")
                except BaseException as error:
                    told.append(f"{type(error).__name__}: {error}")
            os.write(writer, "\n".join(told).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            lines = pipe.read().splitlines()
        assert os.waitpid(child, 0)[1] == 0
        assert len(lines) == 2
        for line in lines:
            assert line.startswith(f"RuntimeError: this LLM was made by process {os.getpid()}")
        assert len(llm.generate([ids(5)], greedy(2), use_tqdm=False)[0]["token_ids"]) == 2


# what a call had made when it was interrupted


def press_ctrl_c_at(count: int):
    """A logits_processor that presses Ctrl-C once, when a sample has this number of tokens."""
    pressed = []

    def judge(tokens, logits):
        if len(tokens) >= count and not pressed:
            pressed.append(tokens)
            signal.raise_signal(signal.SIGINT)
        return logits

    return judge


def test_an_interrupted_call_leaves_what_it_had_made():
    prompts = [ids(7, n) for n in range(3)]
    params = [greedy(3), greedy(40), sampled(40, seed=2, n=2)]
    with build(plain=True) as llm:
        assert llm.partial_outputs() == []
        whole = llm.generate(prompts, params, use_tqdm=False)
        assert llm.partial_outputs() == []  # the call returned all of it
        params[1] = greedy(40, logits_processor=press_ctrl_c_at(7 + 12))
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts, params, use_tqdm=False)
        assert_idle(llm)
        found = llm.partial_outputs()
        assert [output["finish_reason"] for output in found] == ["length", "abort", "abort"]
        assert found[0]["samples"] == whole[0]["samples"]
        for output, expected in zip(found[1:], whole[1:], strict=True):
            assert len(output["samples"]) == len(expected["samples"])
            for sample, all_of_it in zip(output["samples"], expected["samples"], strict=True):
                tokens = sample["token_ids"]
                assert len(tokens) >= 12 and tokens == all_of_it["token_ids"][: len(tokens)]
                assert sample["text"] and all_of_it["text"].startswith(sample["text"].rstrip("�"))
        # they are there until the next call: neither a look nor a refused call takes them
        with pytest.raises(ValueError):
            llm.generate([[]], greedy(3), use_tqdm=False)
        assert llm.partial_outputs() == found
        again = llm.generate(prompts[:1], greedy(3), use_tqdm=False)
        assert again[0]["token_ids"] == whole[0]["token_ids"] and llm.partial_outputs() == []


def test_partial_outputs_are_those_of_a_threads_own_call_and_outlive_the_engine():
    with build(plain=True) as llm:
        judge = press_ctrl_c_at(7 + 4)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([ids(7)], greedy(30, logits_processor=judge), use_tqdm=False)
        found = llm.partial_outputs()
        assert found[0]["finish_reason"] == "abort" and found[0]["token_ids"]

        def other():
            llm.generate([ids(7)], greedy(3), use_tqdm=False)
            return llm.partial_outputs()

        assert run_threads([other]) == [[]]
        assert llm.partial_outputs() == found
    assert llm.partial_outputs() == found


def test_partial_outputs_may_be_read_while_the_call_runs():
    seen = []

    def handler(*_):
        seen.append(llm.partial_outputs())

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with build(plain=True) as llm:
            serve = llm.serve

            def signalled(requests):
                for step in serve(requests):
                    signal.raise_signal(signal.SIGALRM)
                    yield step

            llm.serve = signalled
            (output,) = llm.generate([ids(7)], greedy(5), use_tqdm=False)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert [part["token_ids"] for (part,) in seen] == [output["token_ids"][:n] for n in range(1, 6)]
    assert [part["finish_reason"] for (part,) in seen] == [None] * 4 + ["length"]


def test_what_was_never_queued_is_an_empty_beginning(monkeypatch):
    with build(plain=True) as llm:

        def struck(*_):
            raise MemoryError

        monkeypatch.setattr(llm, "submit_requests", struck)
        with pytest.raises(MemoryError):
            llm.generate([ids(7), ids(8)], greedy(3), use_tqdm=False)
        found = llm.partial_outputs()
        assert [(o["finish_reason"], o["token_ids"], o["text"]) for o in found] == [
            ("abort", [], ""), ("abort", [], ""),
        ]  # fmt: skip
        assert_idle(llm)
