"""What the kernels stand on: folders that others can write, and processes that are forks."""

import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numba
import pytest
from conftest import MODEL, SRC

from microvllm.cpu import vectors

SOURCE = """
from microvllm.cpu.vectors import EXACT, kept

@kept(**EXACT)
def double(x):
    return 2 * x
"""
posix = pytest.mark.skipif(os.name != "posix", reason="no such permissions, no fork")


def kernel(folder: Path):
    """A kernel whose source lies there, as in a process of its own."""
    vectors.trusted.cache_clear()
    (folder / "source.py").write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("source", folder / "source.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.double


@posix
@pytest.mark.parametrize("place", ["folder", "index", "kernel"])
def test_kernels_that_others_can_write_are_not_read(tmp_path, monkeypatch, caplog, place):
    monkeypatch.setattr("numba.config.CACHE_DIR", "")
    assert kernel(tmp_path)(3) == 6  # compiled, and kept
    again = kernel(tmp_path)
    assert again(3) == 6 and sum(again.stats.cache_hits.values()) == 1 and not caplog.text
    folder, ran = tmp_path / "__pycache__", tmp_path / "ran"
    (index,), (data,) = folder.glob("*.nbi"), folder.glob("*.nbc")

    class Evil:
        def __reduce__(self):
            return Path.touch, (ran,)

    index.write_bytes(pickle.dumps(Evil()))
    kernel(tmp_path)(3.0)  # who can write there can run code:
    assert ran.exists()
    ran.unlink()
    index.write_bytes(pickle.dumps(Evil()))
    {"folder": folder, "index": index, "kernel": data}[place].chmod(0o777)
    before = {file: file.read_bytes() for file in (index, data)}
    last = kernel(tmp_path)
    assert last(3) == 6 and not ran.exists() and not last.stats.cache_hits
    assert before == {file: file.read_bytes() for file in (index, data)}, "nor written"
    assert "may be written by others" in caplog.text and f"chmod -R go-w {folder}" in caplog.text


@posix
def test_who_may_write_kernels(tmp_path, monkeypatch):
    trusted = vectors.trusted.__wrapped__
    real, (uid, gid) = os.stat, (os.getuid(), os.getgid())

    def about(mode: int, owner: int = uid, group: int = gid):
        fields = [*real(tmp_path)]
        fields[0], fields[4], fields[5] = 0o040000 | mode, owner, group
        monkeypatch.setattr(Path, "stat", lambda self: os.stat_result(fields))
        monkeypatch.setattr(Path, "glob", lambda self, pattern: [])
        return trusted(str(tmp_path))

    assert about(0o755) and about(0o700) and about(0o755, 0)
    assert about(0o775, uid, uid)  # the user's own group, with umask 002
    assert not about(0o775, uid, uid + 7) and not about(0o777) and not about(0o757, uid, uid)
    assert not about(0o755, uid + 12345)


FORK = """
import os, sys, torch
from microvllm import LLM
parent, threads, *children = sys.argv[1:]
torch.set_num_threads(int(threads))

def answer(attention):
    with LLM({model!r}, device="cpu", num_blocks=64, attention=attention) as llm:
        return llm.generate(["My uncle"], use_tqdm=False)[0]["text"]

want = answer(parent)
for child in children:
    if not (pid := os.fork()):
        child, own = child.split()
        if int(own):
            torch.set_num_threads(int(own))
        try:
            print("right" if answer(child) == want else "wrong", end=", ", flush=True)
        except RuntimeError as error:
            print(error, end=", ", flush=True)
        os._exit(0)
    print("status", os.waitpid(pid, 0)[1], flush=True)
"""
GONE = "whose threads a fork does not have: start processes with 'spawn'"


@posix
@pytest.mark.slow
@pytest.mark.parametrize(
    "parent, threads, children",  # these: backend and threads of its own, 0: the parent's
    [
        # those with two threads waited for ever, the one with the parent's one OpenMP ended
        ("numba", 2, {"numba 0": GONE, "numba 1": GONE}),
        ("numba", 1, {"numba 0": GONE}),
        ("sdpa", 2, {"sdpa 0": GONE, "numba 0": GONE, "sdpa 1": "right"}),
        ("sdpa", 1, {"sdpa 0": "right"}),
    ],
    ids=str,
)
def test_a_new_engine_in_a_fork_works_or_says_why_not(parent, threads, children):
    script = FORK.format(model=str(MODEL))
    command = [sys.executable, "-c", script, parent, str(threads), *children]
    env = os.environ | {"NUMBA_THREADING_LAYER": "omp", "PYTHONPATH": str(SRC)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    lines = done.stdout.splitlines()
    assert len(lines) == len(children), done
    for line, told in zip(lines, children.values(), strict=True):
        assert told in line and line.endswith("status 0"), done


@posix
def test_a_fork_is_told_before_it_asks_for_a_kernel(monkeypatch):
    monkeypatch.setattr(vectors, "PROCESS", os.getpid() + 1)
    monkeypatch.setattr("numba.threading_layer", lambda: "omp")
    with pytest.raises(RuntimeError, match=GONE):
        vectors.threads_for(4)


def test_no_step_takes_the_lock_of_all_processes(monkeypatch):
    """An exception from outside that struck inside that lock left it taken: the thread that had it
    went on, all others waited for ever."""

    class Struck:
        def __enter__(self):
            raise AssertionError("it was taken")

        def __exit__(self, *_): ...

    with monkeypatch.context() as patch:
        patch.setattr("numba.np.ufunc.parallel._backend_init_process_lock", Struck())
        with pytest.raises(AssertionError, match="it was taken"):
            numba.get_num_threads()
        assert vectors.threads_for(1) == 1
    assert numba.get_num_threads() == 1
