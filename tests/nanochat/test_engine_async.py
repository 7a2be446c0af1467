"""nanochat's Engine in event loops: `agenerate` is `generate`, and `warm` makes all of it ready."""

import asyncio
import inspect
import threading
from contextlib import aclosing

import pytest
from helpers.concurrency import listed, run, settled, until
from helpers.full_engines import TOOL_GOLDENS
from helpers.goldens import MODEL
from helpers.nanochat_engines import BOOKS, PAGE, STORY, chain, rows_of

from microvllm import LLM
from microvllm.checkpoint import load_model
from microvllm.nanochat import Engine

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def books():
    return Engine(load_model(MODEL), BOOKS, num_blocks=400, plain=True)


def test_the_signature_is_that_of_generate():
    ours, theirs = (inspect.signature(m).parameters for m in (Engine.agenerate, Engine.generate))
    assert [*map(str, ours.values())] == [*map(str, theirs.values())]


@pytest.mark.parametrize("num_samples", [1, 2])
def test_columns_and_masks_with_the_calculator_are_nanochats(num_samples):
    engine = chain(plain=True)
    for golden in TOOL_GOLDENS["runs"]:
        columns = run(listed(engine.agenerate(golden["prompt"], num_samples, 60, 0.0)))
        assert rows_of(columns) == [(golden["tokens"], golden["masks"])] * num_samples
    settled(engine.llm)


def test_many_tasks_get_the_columns_of_generate_in_one_batch(books):
    calls = [
        (STORY, {"num_samples": 1 + i % 3, "max_tokens": 12, "temperature": 0.8, "seed": i})
        for i in range(6)
    ]
    calls += [(STORY, {"max_tokens": 0}), (STORY, {"num_samples": 0})]
    expected = [[*books.generate(tokens, **options)] for tokens, options in calls]
    rows, launch = [], books.llm.runner.launch
    books.llm.runner.launch = lambda plan: (rows.append(len(plan.chunks)), launch(plan))

    async def main():
        tasks = [listed(books.agenerate(tokens, **options)) for tokens, options in calls]
        return await asyncio.gather(*tasks)

    try:
        assert run(main()) == expected
    finally:
        del books.llm.runner.launch
    assert max(rows) == 2 * (1 + 2 + 3)
    settled(books.llm)


def test_a_slow_consumer_gets_every_column(books):
    options = {"num_samples": 2, "max_tokens": 30, "temperature": 0.0, "seed": 1}
    expected = [*books.generate(STORY, **options)]

    async def main():
        columns = books.agenerate(STORY, **options)
        found = [await anext(columns)]
        await until(books.llm.is_finished)
        return found + await listed(columns)

    assert run(main()) == expected
    settled(books.llm)


@pytest.mark.parametrize("way", ["cancel", "aclose", "break"])
def test_columns_that_are_left_early_are_aborted(books, way):
    before = books.llm.stats()["aborted_requests"]

    async def main():
        if way == "cancel":
            task = asyncio.create_task(listed(books.agenerate(STORY, 2, max_tokens=400)))
            await until(lambda: books.llm.stats()["running"] == 2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif way == "aclose":
            async with aclosing(books.agenerate(STORY, 2, max_tokens=400)) as columns:
                await anext(columns)
        else:
            async for _ in books.agenerate(STORY, 2, max_tokens=400):
                break
        await until(books.llm.is_finished)

    run(main())
    settled(books.llm)
    assert books.llm.stats()["aborted_requests"] == before + 1


def test_errors_are_those_of_generate(books):
    def ask(**options):
        run(listed(books.agenerate(STORY, **options)))

    with pytest.raises(TypeError, match="seed must be an integer"):
        ask(seed=1.5)
    with pytest.raises(ValueError, match="num_samples"):
        ask(num_samples=-1)
    engine = chain(plain=True)

    async def main():
        columns = engine.agenerate(TOOL_GOLDENS["runs"][0]["prompt"], 2, 60, 0.0)
        await anext(columns)
        engine.llm.abort(*engine.llm.requests)
        await listed(columns)

    with pytest.raises(RuntimeError, match="aborted"):
        run(main())


# the first use ------------------------------------------------------------------------------------


def test_the_first_use_in_a_loop_makes_the_engine_in_another_thread(monkeypatch):
    threads, init = [], LLM.__init__

    def noted(self, *args, **options):
        threads.append(threading.get_ident())
        init(self, *args, **options)

    monkeypatch.setattr(LLM, "__init__", noted)
    engine = chain(plain=True)
    run(listed(engine.agenerate([5], max_tokens=2)))
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_warm_makes_the_engine_and_runs_a_step_and_later_samples_are_the_same():
    cold = [*chain(plain=True).generate([5], 2, 9, seed=3)]
    engine = chain(plain=True)
    assert engine._llm is None
    engine.warm()
    assert engine._llm is not None and engine.llm.stats()["steps"] > 0
    assert [*engine.generate([5], 2, 9, seed=3)] == cold
    engine = chain(plain=True)

    async def main():
        await asyncio.to_thread(engine.warm)
        return await listed(engine.agenerate([5], 2, 9, seed=3))

    assert run(main()) == cold


# the page -----------------------------------------------------------------------------------------


def test_the_page_says_why_nanochats_own_tests_fail():
    class MockModel:
        """As nanochat's tests of its Engine hand one in."""

        config = load_model(MODEL).config

        def forward(self, ids, kv_cache=None): ...

    (told,) = [line for line in PAGE.split("`") if line.startswith("TypeError: model must be")]
    engine = Engine(MockModel(), BOOKS)
    for ask in (engine.warm, lambda: run(listed(engine.agenerate([5])))):
        with pytest.raises(TypeError) as error:
            ask()
        assert f"TypeError: {error.value}".startswith(told.removesuffix(" ..."))
