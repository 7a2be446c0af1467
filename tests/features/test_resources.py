"""The threads of a full engine."""

import os

import pytest
import torch
from helpers.goldens import MODEL

from microvllm import LLM, environment


@pytest.fixture
def two_threads(monkeypatch):
    """torch's own number of threads, where two processors are allowed."""
    for name in "OMP_NUM_THREADS", "MKL_NUM_THREADS":
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_an_engine_begins_with_the_threads_that_it_may_use(two_threads, monkeypatch):
    monkeypatch.setattr(environment, "available_cpus", lambda: 1)
    with LLM(MODEL, device="cpu", num_blocks=4, plain=True):
        assert torch.get_num_threads() == 1
