"""Failures on purpose, in the core engine; and memory that is counted before it is taken."""

import pytest
from helpers.engine_cases import FailureCases
from helpers.engines import build

from microvllm import engine
from microvllm.model import rotary_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


class TestCore(FailureCases):
    build = staticmethod(build)


def test_a_pool_beyond_the_free_memory_is_refused_at_the_start_with_the_numbers(monkeypatch):
    # a CPU gave the addresses, and the system ended the process when they were written to
    with build(num_blocks=100) as llm:
        size = llm.cache.data.nbytes
    monkeypatch.setattr(engine, "free_memory", lambda device: size - 1)
    with pytest.raises(ValueError, match=f"num_blocks=100 .*, but {size - 1:,} are free"):
        build(num_blocks=100)
    with build(num_blocks=None) as llm:  # the default is made to fit, and half is left
        tables = rotary_bytes(llm.model.config, llm.max_model_len)
        assert size // 2 - size // 50 - tables < llm.cache.data.nbytes <= size // 2 - tables
    monkeypatch.setattr(engine, "free_memory", lambda device: 2**60)  # slots are counted in int32
    with pytest.raises(ValueError, match=f"num_blocks={2**27 + 1} .* more than 2..31 slots"):
        build(num_blocks=2**27 + 1, block_size=16)
    monkeypatch.setattr(engine, "free_memory", lambda device: 100)
    with pytest.raises(
        ValueError, match="not enough memory for a KV cache of num_blocks=2 .*but 50 are free"
    ):
        build(num_blocks=None)
