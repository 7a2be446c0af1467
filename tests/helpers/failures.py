"""Failures on purpose, at places where a step can fail."""

from contextlib import contextmanager
from unittest import mock

from microvllm import runner


def fail_once(llm, monkeypatch, at: int, error: BaseException) -> None:
    """Let forward number `at` leave rubbish all over the cache, and raise."""
    forward, calls = llm.model.forward, []

    def failing(batch, cache):
        calls.append(batch)
        if len(calls) == at:
            cache.data.fill_(7.0)
            raise error
        return forward(batch, cache)

    monkeypatch.setattr(llm.model, "forward", failing)


class Fault(Exception):
    """What an injected failure raises."""


# where a step can fail: the owner of a function, and its name, which is looked up at every call
PLACES = {
    "schedule": lambda llm: (llm.scheduler, "mark_computed_and_plan_draws"),
    "allocate": lambda llm: (llm.scheduler.blocks.pool, "allocate"),
    "hash": lambda llm: (llm.scheduler.blocks, "hashes"),
    "make_batch": lambda llm: (runner, "make_batch"),
    "upload": lambda llm: (llm.runner, "upload"),
    "copy": lambda llm: (llm.cache, "copy_blocks"),
    "forward": lambda llm: (llm.model, "forward"),
    "sample": lambda llm: (llm.runner, "sample"),
    "wait": lambda llm: (llm.runner, "wait"),
    "update": lambda llm: (llm.scheduler, "update"),
}


@contextmanager
def failing(llm, place: str, at: int | None, error: BaseException | None = None, places=PLACES):
    """Inside, call number `at` (from 0) of a place raises a Fault, or `error`. Yields how often the
    place was called, as a list of one number."""
    owner, name = places[place](llm)
    real, calls = getattr(owner, name), [0]

    def call(*args, **kwargs):
        calls[0] += 1
        if calls[0] - 1 == at:
            raise error or Fault(place)
        return real(*args, **kwargs)

    with mock.patch.object(owner, name, call):
        yield calls
