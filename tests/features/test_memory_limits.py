"""Where memory ends while an engine is made, and what is left of the checkpoint's file after."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.goldens import MODEL, SRC, Fixture, era_fixtures

from microvllm import LLM, SamplingParams, checkpoint, engine, loading
from microvllm.cli.roofline import PRECISIONS, layer_bytes
from microvllm.model import rotary_bytes
from microvllm.resources import fits

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

    monkeypatch.setattr(loading, "FusedGPT", refuse)
    with pytest.raises(ValueError, match=r"enough memory for weights of [\d,]+ bytes .*ulimit -v"):
        LLM(MODEL, device="cpu", num_blocks=64)


def test_other_errors_stay_what_they_are():
    for error in (RuntimeError("shapes differ"), KeyError("x"), ValueError("no memory for it")):
        with pytest.raises(type(error)) as caught, fits("weights", CPU):
            raise error
        assert caught.value is error


# a context that a file claims ---------------------------------------------------------------------

CONTEXT = 200_000_000
CORE, PLAIN, FUSED, GROUPED = "core", "plain", "fused", "grouped"


def claiming(folder: Path, name: str, context: int) -> Path:
    """A copy of a fixture whose meta file claims this context."""
    copy = folder / f"{name}-{context}"
    shutil.copytree(Fixture(*era_fixtures()[name]).directory, copy)
    (meta,) = copy.glob("meta_*.json")
    given = json.loads(meta.read_text())
    given["model_config"]["sequence_len"] = context
    meta.write_text(json.dumps(given))
    return copy


def serve(folder: Path, how: str, **options):
    """An engine of the core alone, or one whose kernels need not be compiled."""
    made, own = (engine.LLM, {}) if how == CORE else (LLM, {"attention": "sdpa"})
    own = {"plain": True} if how == PLAIN else own
    tokenizer = Fixture(*era_fixtures()["era1_padded"]).tokenizer
    return made(folder, tokenizer_path=tokenizer, device="cpu", **own, **options)


@pytest.mark.parametrize("how", [CORE, PLAIN, FUSED, GROUPED])
def test_rotary_tables_are_no_longer_than_the_pool_can_hold(tmp_path, how):
    """A file of kilobytes claims two hundred million positions."""
    name = "era5" if how == GROUPED else "era1_padded"
    claim, greedy = claiming(tmp_path, name, CONTEXT), {"temperature": 0, "ignore_eos": True}
    made = []
    for folder in claim, claiming(tmp_path, name, 10_000):
        with serve(folder, how, num_blocks=21, block_size=4) as llm:
            longest = llm.max_positions
            assert len(llm.model.cos) == len(llm.model.sin) == longest == 20 * 4 + 1
            params = llm.params_class(**greedy, max_tokens=longest - 5)
            made.append(llm.generate([[7, 8, 9, 10, 11]], params)[0]["token_ids"])
            params = llm.params_class(**greedy, max_tokens=longest - 4)
            with pytest.raises(ValueError, match="blocks"):
                llm.generate([[7, 8, 9, 10, 11]], params)
    assert made[0] == made[1] and len(made[0]) == longest - 5


@pytest.mark.parametrize("how", [CORE, FUSED, GROUPED])
def test_what_the_default_pool_and_its_tables_take_is_within_what_is_free(
    tmp_path, how, monkeypatch
):
    name = "era5" if how == GROUPED else "era1_padded"
    folder = claiming(tmp_path, name, CONTEXT)
    monkeypatch.setattr(engine, "free_memory", lambda device: 2**23)
    with serve(folder, how) as llm:
        blocks = llm.scheduler.blocks
        taken = llm.cache.data.nbytes + rotary_bytes(llm.model.config, llm.max_positions)
        taken += 48 * blocks.num_blocks
        # in groups, where positions are counted that a window may free, less
        assert (0.7 if how == GROUPED else 0.99) * 2**22 < taken <= 2**22
        assert llm.max_positions <= blocks.pool.num_blocks * blocks.block_size
    with pytest.raises(ValueError, match="num_blocks=100000 .*rotary tables: .*8,388,608 are free"):
        serve(folder, how, num_blocks=100_000)


def test_weights_that_are_more_than_is_free_are_refused_before_any_is_made(monkeypatch):
    for module in checkpoint, loading:
        monkeypatch.setattr(module, "free_memory", lambda device: 10**7)
    monkeypatch.setattr(torch.Tensor, "to", None)
    monkeypatch.setattr(loading, "FusedGPT", None)
    for make in engine.LLM, LLM:
        with pytest.raises(
            ValueError, match="enough memory for weights.*10,000,000 are free; use a"
        ):
            make(MODEL, device="cpu")


SCRIPT = """
import re, resource, sys
from microvllm import LLM, full
from microvllm.cpu import backend  # libraries first: what they cannot load, they say themselves
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
@pytest.mark.parametrize("num_megabytes, blocks, words", [
    (40, 0, r"not enough memory for weights of .* are free"),
    (400, 10_000, r"not enough memory for a KV cache of num_blocks=10000 .* are free"),
    (1200, 0, r"64 \d+$"),  # the pool takes half of what the limit leaves, and steps have the rest
])  # fmt: skip
def test_a_limit_of_addresses_ends_in_our_error_or_in_a_smaller_pool(num_megabytes, blocks, words):
    script = SCRIPT.format(model=str(MODEL))
    command = [sys.executable, "-c", script, str(num_megabytes * 2**20), str(blocks)]
    env = os.environ | {"PYTHONPATH": str(SRC)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert re.search(words, done.stdout.strip()), done


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
@pytest.mark.parametrize("options", [{}, {"attention": "sdpa"}, {"plain": True}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_nothing_of_the_file_is_mapped_once_the_engine_is_there(options, dtype):
    """So a checkpoint that is cut or overwritten later ends nothing in SIGBUS."""
    gc.collect()  # what other tests have left in circles is no concern of this one
    for name in era_fixtures():
        fixture = Fixture(*era_fixtures()[name])
        options = options | {"dtype": dtype, "tokenizer_path": fixture.tokenizer}
        with LLM(fixture.directory, device="cpu", num_blocks=16, **options):
            maps = Path("/proc/self/maps").read_text()
            assert str(fixture.directory) not in maps, name


@pytest.mark.skipif(not os.environ.get("FUZZ"), reason="takes half a minute: set FUZZ")
@pytest.mark.parametrize(
    "kv, dtype", [("auto", "float32"), ("auto", "bfloat16"), ("int8", "float32")]
)
def test_a_context_of_16384_tokens_takes_what_was_computed(tmp_path, kv, dtype):
    """One that was trained for 2,048, raised as far as that; a token more is refused."""
    fixture = Fixture(*era_fixtures()["era1_padded"])
    folder = shutil.copytree(fixture.directory, tmp_path / fixture.directory.name)
    (meta,) = folder.glob("meta_*.json")
    about = json.loads(meta.read_text())
    about["model_config"]["sequence_len"] = 2048
    meta.write_text(json.dumps(about))
    ids = torch.randint(256, (16_380,), generator=torch.Generator().manual_seed(0)).tolist()
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)

    def run(**options) -> list[int]:
        with LLM(
            folder, device="cpu", num_blocks=1025, block_size=16, max_model_len=16_384, dtype=dtype,
            tokenizer_path=fixture.tokenizer, **fixture.overrides, **options,
        ) as llm:  # fmt: skip
            config, kind = llm.model.config, PRECISIONS[dtype]._replace(kv=kv)
            assert llm.cache.data.nbytes == 1025 * 16 * config.n_layer * layer_bytes(config, kind)
            with pytest.raises(ValueError, match="max_model_len"):
                llm.generate([[*ids, *ids[:4]]], params)
            (output,) = llm.generate([ids], params)
            assert llm.scheduler.blocks.pool.num_free == 1024  # all were taken, and are back
            return output["token_ids"]

    found = run(kv_cache_dtype=kv)
    assert len(found) == 4
    if dtype == "float32" and kv == "auto":
        assert found == run(attention="sdpa")
