"""An engine that tasks of event loops call: one thread steps for all of them, nothing of theirs is
lost, and what they leave is aborted."""

import ast
import asyncio
import gc
import inspect
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from contextlib import aclosing, nullcontext

import pytest
from helpers.concurrency import is_stepping, listed, run, run_threads, settled, until
from helpers.full_engines import (
    TOOL_GOLDENS,
    build,
    chain,
    everything_is_free,
    greedy,
    ids,
    sampled,
)
from helpers.goldens import ROOT

from microvllm import LLM, SamplingParams
from microvllm.features import async_api

pytestmark = pytest.mark.usefixtures("one_thread")
LONG = greedy(400)


@pytest.fixture
def llm():
    with build(plain=True, num_blocks=400) as llm:
        yield llm


def tokens(outputs: list) -> list:
    return [[sample["token_ids"] for sample in output["samples"]] for output in outputs]


async def collected(events) -> dict:
    """Text and tokens of each sample of a stream, whose pieces are joined."""
    found: dict = {}
    ended = set()
    async for event in events:
        key = event["index"], event["sample"]
        assert key not in ended, "an event after the last"
        text, token_ids = found.get(key, ("", []))
        found[key] = text + event["text"], token_ids + event["token_ids"]
        if event["finish_reason"]:
            ended.add(key)
    assert ended == found.keys()
    return found


def pieces(outputs: list) -> dict:
    """What `collected` gives for a stream of the same requests."""
    return {
        (i, k): (sample["text"], sample["token_ids"])
        for i, output in enumerate(outputs)
        for k, sample in enumerate(output["samples"])
    }


def noted_rows(llm) -> list[int]:
    """A list that gets the number of chunks of each step."""
    rows: list[int] = []
    launch = llm.runner.launch
    llm.runner.launch = lambda plan: (rows.append(len(plan.chunks)), launch(plan))
    return rows


# the same results ---------------------------------------------------------------------------------


def test_tasks_get_what_generate_and_stream_give(llm):
    prompts, params = [ids(9, 1), ids(20, 2)], [sampled(12, seed=1, n=2), greedy(7)]
    expected = llm.generate(prompts, params, use_tqdm=False)

    async def main():
        outputs = await llm.agenerate(prompts, params)
        assert tokens(outputs) == tokens(expected)
        assert [output.keys() for output in outputs] == [output.keys() for output in expected]
        assert await collected(llm.astream(prompts, params)) == pieces(expected)
        # the events are those of `stream`
        events = await listed(llm.astream(prompts, params))
        assert {*events[0]} == {*next(iter(llm.stream(prompts, params)))}
        assert await llm.agenerate([]) == [] == await listed(llm.astream([]))

    run(main())
    settled(llm)


def test_the_arguments_are_those_of_the_methods_for_threads():
    for name in "generate", "chat", "stream":
        ours = [*inspect.signature(getattr(LLM, f"a{name}")).parameters]
        theirs = [*inspect.signature(getattr(LLM, name)).parameters]
        # tools pass through the options; hidden states need a pass of their own after the text
        assert ours == [x for x in theirs if x not in ("use_tqdm", "tools", "hidden_states")]


def test_a_conversation_is_answered_with_the_calculator_as_chat_does():
    golden = next(run for run in TOOL_GOLDENS["runs"] if 0 in run["masks"])
    params = SamplingParams(temperature=0, max_tokens=60)
    with chain(plain=True) as llm:
        (answer,) = run(llm.achat(golden["messages"], params))
        assert (answer["token_ids"], answer["mask"]) == (golden["tokens"], golden["masks"])
        assert answer["text"] == "So:`7*6` = 42  yes!"
        (without,) = run(llm.achat([golden["messages"]], params, tools=False))
        assert without["tool_calls"] == [] and "`" not in without["text"]
        with pytest.raises(ValueError, match="conversation 0: .*nobody"):
            run(llm.achat([{"role": "nobody", "content": ""}]))


def test_a_bad_prompt_or_argument_is_refused_before_any_work(llm):
    async def main():
        with pytest.raises(ValueError, match=r"prompts\[1\]"):
            await llm.agenerate([ids(3), [99999]])
        with pytest.raises(TypeError, match="unknown argument 'colour'"):
            await llm.agenerate([ids(3)], colour=1)
        with pytest.raises(TypeError, match="'hidden_states'"):
            await llm.agenerate([ids(3)], hidden_states=[0])
        with pytest.raises(ValueError, match=r"prompts\[0\]"):
            await anext(llm.astream([[99999]]))

    run(main())
    assert llm.is_finished() and not is_stepping()


# one batch ----------------------------------------------------------------------------------------


def test_tasks_of_several_loops_and_threads_share_one_batch(llm):
    expected = {n: tokens(llm.generate([ids(7, n)], greedy(40), use_tqdm=False)) for n in range(9)}
    rows = noted_rows(llm)

    async def several(numbers):
        outputs = await asyncio.gather(*[llm.agenerate([ids(7, n)], greedy(40)) for n in numbers])
        return {n: tokens(found) for n, found in zip(numbers, outputs, strict=True)}

    async def streamed(n):
        found = await collected(llm.astream([ids(7, n)], greedy(40)))
        return {n: [[found[0, 0][1]]]}

    jobs = [
        lambda: run(several([0, 1, 2])), lambda: run(several([3, 4])), lambda: run(streamed(5)),
        lambda: {6: tokens(llm.generate([ids(7, 6)], greedy(40), use_tqdm=False))},
        lambda: {7: [[sum([e["token_ids"] for e in llm.stream([ids(7, 7)], greedy(40))], [])]]},
        lambda: run(streamed(8)),
    ]  # fmt: skip
    found: dict = {}
    for result in run_threads(jobs):
        if isinstance(result, BaseException):
            raise result
        found |= result
    assert found == expected
    assert max(rows) > 4, rows
    settled(llm)


def test_one_thread_steps_for_all_tasks_and_ends_with_the_last(llm):
    seen, plan_step = set(), llm.plan_step

    def noted():
        seen.add(threading.get_ident())
        return plan_step()

    llm.plan_step = noted

    async def main():
        assert not is_stepping()
        calls = [llm.agenerate([ids(5, n)], greedy(20 + n)) for n in range(5)]
        task = asyncio.gather(*calls)
        await until(is_stepping)
        assert sum(t.name == "microvllm steps" for t in threading.enumerate()) == 1
        (thread,) = [t for t in threading.enumerate() if t.name == "microvllm steps"]
        assert thread.daemon
        await task
        assert threading.get_ident() not in seen

    run(main())
    settled(llm)
    run(main())  # by another thread
    settled(llm)
    assert len(seen) <= 2


def test_a_step_that_takes_long_holds_up_no_loop(llm):
    # the loop adds requests, takes events and cancels tasks while a step is under way
    inside, gate = threading.Event(), threading.Event()

    def wait(tokens, logits):
        inside.set()
        assert gate.wait(30), "the loop waits for this step"
        return logits

    async def main():
        held = asyncio.create_task(llm.agenerate([ids(5)], greedy(2, logits_processor=wait)))
        await until(inside.is_set)
        other = asyncio.create_task(llm.agenerate([ids(6)], greedy(3)))
        stream = llm.astream([ids(7)], LONG)
        event = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.05)
        event.cancel()
        with pytest.raises(asyncio.CancelledError):
            await event
        await stream.aclose()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(llm.agenerate([ids(8)], LONG), 0.05)
        assert not held.done() and not other.done()
        gate.set()
        (first,), (second,) = await asyncio.gather(held, other)
        assert len(first["token_ids"]) == 2 and len(second["token_ids"]) == 3

    run(main())
    settled(llm)


def test_awaiting_works_in_a_loop_that_runs_already_as_in_a_notebook(llm):
    # a notebook compiles a cell in this way, and runs it in its own loop
    cell = "output = (await llm.agenerate([[1, 2, 3]], params))[0]\n"
    cell += "texts = [event['text'] async for event in llm.astream([[1, 2, 3]], params)]"
    code = compile(cell, "cell", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    names = {"llm": llm, "params": sampled(6, seed=1)}

    async def notebook():
        await eval(code, names)
        llm.generate([ids(3)], greedy(2), use_tqdm=False)  # also from a cell without await

    run(notebook())
    assert "".join(names["texts"]) == names["output"]["text"]
    settled(llm)


# leaving early ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["cancel", "timeout", "aclose", "break", "error", "kept"])
def test_what_is_left_early_is_aborted_and_nothing_else(llm, way):
    (expected,) = llm.generate([ids(9, 1)], greedy(60), use_tqdm=False)

    async def leave():
        if way == "cancel":
            task = asyncio.create_task(llm.agenerate([ids(5), ids(6)], LONG))
            await until(lambda: llm.stats()["running"] == 3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif way == "timeout":
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(llm.agenerate([ids(5)], LONG), 0.1)
        elif way == "aclose":
            events = llm.astream([ids(5), ids(6)], LONG)
            await anext(events)
            await events.aclose()
        elif way == "kept":  # the generator lives on, closed at the end of the block
            async with aclosing(llm.astream([ids(5)], LONG)) as events:
                async for _ in events:
                    break
        else:
            with pytest.raises(KeyError) if way == "error" else nullcontext():
                async for event in llm.astream([ids(5), ids(6)], LONG):
                    if way == "break":
                        break
                    event["nothing of this name"]

    async def main():
        other = asyncio.create_task(llm.agenerate([ids(9, 1)], greedy(60)))
        await until(is_stepping)
        await leave()
        # at the end of the step that is under way, long before they have their tokens
        await until(lambda: llm.stats()["running"] + llm.stats()["waiting"] <= 1)
        (output,) = await other
        assert output["token_ids"] == expected["token_ids"]

    run(main())
    settled(llm)
    stats = llm.stats()
    assert stats["aborted_requests"] >= 1 and stats["output_tokens"] < 400


def test_a_loop_that_is_closed_meanwhile_leaves_nothing_behind(llm):
    loop = asyncio.new_event_loop()

    async def begin():
        events = llm.astream([ids(5)], greedy(300))
        await anext(events)
        return events, asyncio.ensure_future(llm.agenerate([ids(6)], greedy(300)))

    kept = loop.run_until_complete(begin())
    loop.run_until_complete(until(lambda: llm.stats()["running"] == 2))
    loop.close()  # with both half way, as a program that ends in a hurry does
    settled(llm)
    assert llm.stats()["aborted_requests"] >= 1
    del kept
    gc.collect()


def test_a_coroutine_that_ends_without_a_loop_aborts_its_request(llm):
    async def main():
        call = llm.agenerate([ids(5)], LONG)
        await until(call.send(None).done)  # the requests are prepared
        call.send(None)
        await until(lambda: llm.stats()["running"] == 1)
        del call  # as the garbage collector would do it
        await until(llm.is_finished)

    run(main())
    settled(llm)
    assert llm.stats()["aborted_requests"] == 1


# slow consumers -----------------------------------------------------------------------------------


def test_a_slow_consumer_gets_all_in_a_few_events_and_no_other_waits(llm, monkeypatch):
    prompts, params = [ids(5, 1), ids(6, 2)], sampled(100, seed=1, n=2)
    expected = pieces(llm.generate(prompts, params, use_tqdm=False))
    lengths = []
    deliver = async_api.Call.deliver

    def noted(call):
        deliver(call)
        lengths.append(len(call.items))

    monkeypatch.setattr(async_api.Call, "deliver", noted)

    async def slow(events):
        yield await anext(events)
        await until(llm.is_finished)  # nothing is read until all of it is done
        async for event in events:
            yield event

    async def main():
        async with aclosing(llm.astream(prompts, params)) as events:
            task = asyncio.create_task(collected(slow(events)))
            (other,) = await llm.agenerate([ids(7)], greedy(20))
            assert len(other["token_ids"]) == 20 and not task.done()
            assert await task == expected

    run(main())
    # one step's events are four, and so are the last ones
    assert async_api.MAX_ITEMS <= max(lengths) <= async_api.MAX_ITEMS + 3 + 4
    settled(llm)


def test_a_loop_that_is_blocked_gets_one_wake_up_for_many_steps(llm, monkeypatch):
    async def main():
        loop, calls = asyncio.get_running_loop(), []
        real = loop.call_soon_threadsafe

        def counted(callback, *args, **more):
            calls.append(callback)
            return real(callback, *args, **more)

        async with aclosing(llm.astream([ids(5)], greedy(80))) as events:
            first = await anext(events)
            monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
            while not llm.is_finished():  # the loop is blocked
                time.sleep(0.001)
            assert len(calls) <= 1
            rest = [event async for event in events]
        assert len(first["token_ids"]) + sum(len(e["token_ids"]) for e in rest) == 80

    run(main())
    settled(llm)


# failures -----------------------------------------------------------------------------------------


def test_an_exception_of_a_step_reaches_each_waiting_task_once(llm, monkeypatch):
    (expected,) = llm.generate([ids(9, 1)], sampled(30, seed=2), use_tqdm=False)
    forward = llm.model.forward
    is_struck = threading.Event()

    def fail(batch, cache):
        if threading.current_thread().name == "microvllm steps" and not is_struck.is_set():
            if len(batch.seq_lens) == 4:
                is_struck.set()
                raise MemoryError("none is left")
        return forward(batch, cache)

    async def streamed(seen):
        async for event in llm.astream([ids(6)], greedy(300)):
            seen.append(event)

    async def main():
        seen: list = []
        calls = [llm.agenerate([ids(5, n)], greedy(300)) for n in range(2)]
        tasks = [asyncio.create_task(call) for call in (*calls, streamed(seen))]
        await until(lambda: llm.stats()["running"] == 3 and len(seen) > 2)
        # a thread's request survives: the exception came to others
        outputs: list = []

        def work():
            outputs.extend(llm.generate([ids(9, 1)], sampled(30, seed=2), use_tqdm=False))

        thread = asyncio.create_task(asyncio.to_thread(work))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [MemoryError] * 3
        await thread
        assert outputs[0]["token_ids"] == expected["token_ids"]
        # a later request is served
        (again,) = await llm.agenerate([ids(9, 1)], sampled(30, seed=2))
        assert again["token_ids"] == expected["token_ids"]

    monkeypatch.setattr(llm.model, "forward", fail)
    run(main())
    settled(llm)


def test_an_exception_of_a_threads_own_step_leaves_tasks_alone(llm, monkeypatch):
    (expected,) = llm.generate([ids(9, 1)], greedy(60), use_tqdm=False)
    forward = llm.model.forward

    def fail(batch, cache):
        if threading.current_thread().name == "unlucky":
            raise MemoryError("none is left")
        return forward(batch, cache)

    def work(raised: list):
        try:
            llm.generate([ids(5)], greedy(5), use_tqdm=False)
        except MemoryError as error:
            raised.append(error)

    async def main():
        raised: list = []
        events = collected(llm.astream([ids(9, 1)], greedy(60)))
        task = asyncio.create_task(events)
        await until(lambda: llm.stats()["running"] == 1)
        thread = threading.Thread(target=work, args=(raised,), name="unlucky")
        thread.start()
        found = await task
        await asyncio.to_thread(thread.join)
        assert len(raised) == 1 and found == pieces([expected])

    monkeypatch.setattr(llm.model, "forward", fail)
    run(main())
    settled(llm)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, StopIteration])
def test_no_exception_ends_the_thread_for_later_tasks(llm, monkeypatch, kind):
    async def main():
        def fail(plan):
            raise kind("stop")

        with monkeypatch.context() as patch:
            patch.setattr(llm.runner, "launch", fail)
            call = asyncio.create_task(caught(llm.agenerate([ids(5)], greedy(9))))
            assert kind in (type(await call), type((await call).__cause__))
        assert len((await llm.agenerate([ids(5)], greedy(9)))[0]["token_ids"]) == 9

    async def caught(call):
        try:
            return await call
        except BaseException as error:
            return error

    run(main())
    settled(llm)


def test_a_thread_that_cannot_be_started_is_one_error_and_nothing_waits(llm, monkeypatch):
    async def main():
        requests = llm.make_requests([ids(5)], greedy(9))

        def refuse(thread):
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                with llm.serve_async(requests):
                    pass
        assert llm.is_finished()
        assert len((await llm.agenerate([ids(5)], greedy(9)))[0]["token_ids"]) == 9

    run(main())
    settled(llm)


# the end ------------------------------------------------------------------------------------------


def test_a_closed_engine_ends_what_waits_and_refuses_what_comes():
    async def main():
        with build(plain=True) as llm:
            whole = asyncio.create_task(llm.agenerate([ids(5)], LONG))
            stream = asyncio.create_task(listed(llm.astream([ids(6)], LONG)))
            await until(lambda: llm.stats()["running"] == 2)
        assert not is_stepping()
        (output,) = await whole  # as `generate` in another thread
        assert output["finish_reason"] == "abort" and len(output["token_ids"]) < 400
        events = await stream
        assert events[-1]["finish_reason"] == "abort"
        assert sum(len(event["token_ids"]) for event in events) < 400
        with pytest.raises(RuntimeError, match="this LLM was closed"):
            await llm.agenerate([ids(5)], LONG)
        with pytest.raises(RuntimeError, match="this LLM was closed"):
            await anext(llm.astream([ids(5)], LONG))

    run(main())


def test_an_engine_that_no_task_has_any_more_is_freed_at_once():
    llm = build(plain=True)
    run(llm.agenerate([ids(5)], greedy(5)))
    run(until(lambda: not is_stepping()))
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(llm.cache)
        del llm
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_program_may_end_in_the_midst_of_a_step():
    # it was ended by SIGABRT: "terminate called without an active exception"
    code = """
        import asyncio, threading, time
        from microvllm import LLM, SamplingParams
        llm = LLM("models/oldbooks-d6", plain=True, num_blocks=400)
        call = lambda: llm.agenerate(["Once"] * 8, SamplingParams(max_tokens=900, ignore_eos=True))
        threading.Thread(target=lambda: asyncio.run(call()), daemon=True).start()
        while llm.stats()["steps"] < 3:
            time.sleep(0.01)
        print("the end")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, text=True, timeout=120,
        capture_output=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "the end\n"), done.stderr


# warm ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {}, {"num_blocks": 2, "block_size": 1}, {"num_blocks": 2, "block_size": 2},
        {"max_model_len": 2}, {"max_batch_size": 1, "max_batched_tokens": 1},
        {"enable_prefix_caching": False},
    ],
)  # fmt: skip
def test_warm_runs_a_step_in_any_pool_and_changes_no_token(options):
    free = SamplingParams(max_tokens=2 if "max_model_len" not in options else 1)
    with build("era1_padded", plain=True, **options) as cold:
        room = cold.scheduler.blocks.pool.num_usable * cold.scheduler.blocks.block_size
        free = free if room > 1 else SamplingParams(max_tokens=1)
        expected = tokens(cold.generate([[5]], free, use_tqdm=False))
    with build("era1_padded", plain=True, **options) as llm:
        llm.warm()
        assert llm.stats()["steps"] > 0 and everything_is_free(llm)
        # without a seed of its own, too: the engine's source of seeds was not used
        assert tokens(llm.generate([[5]], free, use_tqdm=False)) == expected
    with pytest.raises(RuntimeError, match="this LLM was closed"):
        llm.warm()


def test_warm_computes_a_prompt_and_a_token_greedily_and_drawn(llm):
    seen, launch = [], llm.runner.launch

    def noted(plan):
        seen.extend(
            (stop - start > 1, seq.params.temperature > 0) for seq, start, stop, _ in plan.chunks
        )
        launch(plan)

    llm.runner.launch = noted
    llm.warm()
    assert {*seen} == {(True, True), (True, False), (False, True), (False, False)}
