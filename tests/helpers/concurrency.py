"""Threads and event loops of tests, in which nothing waits forever."""

import asyncio
import threading

from .full_engines import assert_idle


def run_threads(jobs: list) -> list:
    """Each job in a thread of its own, all begun at once; their results, or what they raised."""
    results: list = [None] * len(jobs)
    ready = threading.Barrier(len(jobs))

    def work(i: int) -> None:
        ready.wait()
        try:
            results[i] = jobs[i]()
        except BaseException as error:  # the test shows it
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a thread waits forever"
    return results


def run(main):
    """The result of a coroutine in a loop of its own; what waits forever fails instead."""
    return asyncio.run(asyncio.wait_for(main, 60))


def is_stepping() -> bool:
    """Is there a thread that runs steps for event loops?"""
    return any(thread.name == "microvllm steps" for thread in threading.enumerate())


async def until(condition) -> None:
    """Wait until this is true."""
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came true")


def settled(llm) -> None:
    """The stepping thread ends by itself, with nothing left behind."""
    run(until(lambda: not is_stepping()))
    assert_idle(llm)


async def listed(events) -> list:
    return [event async for event in events]
