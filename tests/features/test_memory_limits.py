"""Where memory ends while an engine is made, and what is left of the checkpoint's file after."""

import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MODEL, ROOT, Fixture, era_fixtures

from microvllm import LLM, full

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 1.00 MiB for an array"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"),
    ],
    ids=str,
)
def test_memory_that_is_refused_to_the_process_is_one_error(monkeypatch, error):
    def refuse(*args, **options):
        raise error

    monkeypatch.setattr(full.optional("fused.model"), "FusedGPT", refuse)
    with pytest.raises(ValueError, match=r"no memory for weights of [\d,]+ bytes .*ulimit -v"):
        LLM(MODEL, device="cpu", num_blocks=64)


def test_other_errors_stay_what_they_are():
    for error in (RuntimeError("shapes differ"), KeyError("x"), ValueError("no memory for it")):
        with pytest.raises(type(error)) as caught, full.fits("weights", CPU):
            raise error
        assert caught.value is error


SCRIPT = """
import re, resource, sys
from microvllm import LLM, full
full.optional("cpu.backend")  # libraries first: what they cannot load, they say themselves
size = int(re.search(r"VmSize:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[1]), resource.RLIM_INFINITY))
blocks = int(sys.argv[2]) or None
try:
    llm = LLM({model!r}, device="cpu", num_blocks=blocks)
    print(len(llm.generate(["Hello"] * 64)), llm.stats()["num_blocks"])
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, and RLIMIT_AS that is kept")
@pytest.mark.parametrize("room, blocks, said", [
    (40, 0, r"no memory for weights of .* bytes are free .*ulimit -v"),
    (400, 10_000, r"no memory for a KV cache of num_blocks=10000 .* bytes are free"),
    (1200, 0, r"64 \d+$"),  # the pool takes half of what the limit leaves, and steps have the rest
])  # fmt: skip
def test_a_limit_of_addresses_ends_in_our_error_or_in_a_smaller_pool(room, blocks, said):
    script = SCRIPT.format(model=str(MODEL))
    command = [sys.executable, "-c", script, str(room * 2**20), str(blocks)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert re.search(said, done.stdout.strip()), done


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
@pytest.mark.parametrize("options", [{}, {"attention": "sdpa"}, {"plain": True}], ids=str)
def test_nothing_of_the_file_is_mapped_once_the_engine_is_there(options):
    """So a checkpoint that is cut or overwritten later ends nothing in SIGBUS."""
    gc.collect()  # what other tests have left in circles is no concern of this one
    for name in era_fixtures():
        fixture = Fixture(*era_fixtures()[name])
        for dtype in ("float32", "bfloat16"):
            options = options | {"dtype": dtype, "tokenizer_path": fixture.tokenizer}
            with LLM(fixture.directory, device="cpu", num_blocks=16, **options):
                maps = Path("/proc/self/maps").read_text()
                assert str(fixture.directory) not in maps, (name, dtype)
