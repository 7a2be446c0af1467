"""What the kernels stand on: folders that others can write, and processes that are forks."""

import errno
import importlib.util
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.goldens import MODEL, SRC

from microvllm.cpu import kernel_cache, simd, team

SOURCE = """
from microvllm.cpu.simd import EXACT, kept

@kept(**EXACT)
def double(x):
    return 2 * x
"""
posix = pytest.mark.skipif(os.name != "posix", reason="no such permissions, no fork")


def kernel(folder: Path):
    """A kernel whose source lies there, as in a process of its own."""
    simd.trusted.cache_clear()
    (folder / "source.py").write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("source", folder / "source.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.double


@posix
@pytest.mark.parametrize("place", ["folder", "index", "kernel"])
def test_kernels_that_others_can_write_are_not_read(tmp_path, monkeypatch, caplog, place):
    monkeypatch.setattr("numba.config.CACHE_DIR", "")
    monkeypatch.setattr(kernel_cache, "store_error", None)
    caplog.set_level(logging.INFO)
    assert kernel(tmp_path)(3) == 6  # compiled, and kept
    again = kernel(tmp_path)
    assert again(3) == 6 and sum(again.stats.cache_hits.values()) == 1 and not caplog.text
    folder, ran = tmp_path / "__pycache__", tmp_path / "ran"
    (index,) = folder.glob("*.nbi")

    class Evil:
        def __reduce__(self):
            return Path.touch, (ran,)

    index.write_bytes(pickle.dumps(Evil()))
    kernel(tmp_path)(3.0)  # a process that can write there can run code:
    assert ran.exists()
    ran.unlink()
    (data,) = folder.glob("*.nbc")
    index.write_bytes(pickle.dumps(Evil()))
    {"folder": folder, "index": index, "kernel": data}[place].chmod(0o777)
    before = {file: file.read_bytes() for file in (index, data)}
    last = kernel(tmp_path)
    assert last(3) == 6 and not ran.exists() and not last.stats.cache_hits
    assert before == {file: file.read_bytes() for file in (index, data)}, "nor written"
    assert "can be written by other users" in caplog.text
    assert f"chmod -R go-w {folder}" in caplog.text
    assert kernel_cache.store_error in caplog.text, "an engine tells a person"


class Raises:
    """A pickle whose reading fails in a way of its own."""

    def __init__(self, *error):
        self.error = error

    def __reduce__(self):
        return eval, (f"(_ for _ in ()).throw({self.error[0]})",)


DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "zeros": lambda content: b"\0" * len(content),
    "zeros inside": lambda content: content[:99] + b"\0" * 400 + content[499:],
    "other": lambda content: b"no pickle at all",
    "long": lambda content: content + b"more",
    "KeyError": lambda content: pickle.dumps(Raises("KeyError(5)")),
    "MemoryError": lambda content: pickle.dumps(Raises("MemoryError()")),
    "an older one": lambda content: pickle.dumps("0.1") + content,
}


@pytest.fixture
def keeps(tmp_path, monkeypatch):
    """(kernel(), in a folder that has one on disk; its index; its file)"""
    monkeypatch.setattr("numba.config.CACHE_DIR", "")
    monkeypatch.setattr(kernel_cache, "store_error", None)
    monkeypatch.setattr(kernel_cache, "used", set())
    assert kernel(tmp_path)(3) == 6
    (index,), (data,) = tmp_path.glob("*/*.nbi"), tmp_path.glob("*/*.nbc")
    return lambda: kernel(tmp_path), index, data


def hits(function) -> int:
    """Whether its kernel was on disk."""
    assert function(3) == 6
    return sum(function.stats.cache_hits.values())


@pytest.mark.parametrize("place", ["index", "kernel"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_kernel_is_compiled_again(damage, place, keeps):
    """Whatever error it would raise; later processes find a whole one."""
    again, index, data = keeps
    assert hits(again()) == 1
    file = index if place == "index" else data
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    if (damage, place) in (("long", "index"), ("zeros inside", "index")):
        hits(again())  # the index has no checksum, and may be readable
    else:
        assert hits(again()) == 0
    assert hits(again()) == 1
    assert sorted(index.parent.glob("*.nb*")) == [data, index], "and nothing else is left there"


def test_a_kernel_that_is_gone_is_compiled_again(keeps):
    again, index, data = keeps
    for file in data, index:
        file.unlink()
        assert hits(again()) == 0 and hits(again()) == 1 and data.exists() and index.exists()


def test_a_kernel_of_other_sources_is_no_kernel(keeps, monkeypatch):
    """Also one in the place of a new one that was named and not written yet: of a process that
    lost its power between the two."""
    again, index, data = keeps
    old = data.read_bytes()
    monkeypatch.setattr(simd, "STAMP", "of another version")
    assert hits(again()) == 0 and hits(again()) == 1
    assert [*index.parent.glob("*.nbc")] == [data]
    data.write_bytes(old)
    assert hits(again()) == 0 and hits(again()) == 1


def test_two_processes_that_compile_at_once_take_no_kernel_for_another(keeps):
    """Each has read the index before the other one wrote to it. numba would number both files 1."""
    again, index, _ = keeps
    kernel_cache.KernelFiles(str(index.parent), index.stem, None).remove()
    assert not [*index.parent.glob("*.nb*")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_cache.KernelFiles, "_load_index", lambda self: {})
        patch.setattr(kernel_cache.KernelFiles, "remove", lambda self: None)
        assert again()(3) == 6 and again()(1.5) == 3.0
    assert len([*index.parent.glob("*.nbc")]) == 2
    function = again()
    assert function(3) == 6 and function(1.5) == 3.0
    assert sum(function.stats.cache_hits.values()) == 1, "the index has lost one of them"


def test_what_a_handler_raises_while_a_kernel_is_read_goes_out(keeps, monkeypatch):
    """And the file stays: an error of a file would come again."""
    again, index, data = keeps
    load, struck = kernel_cache.KernelFiles._load_index, []

    def strike(self):
        if not struck:
            struck.append(1)
            raise TimeoutError("a limit of time")
        return load(self)

    monkeypatch.setattr(kernel_cache.KernelFiles, "_load_index", strike)
    with pytest.raises(TimeoutError, match="a limit of time"):
        again()(3)
    assert data.exists() and hits(again()) == 1


def test_a_disk_that_takes_no_kernel(keeps, monkeypatch):
    """It is in memory, and works."""
    again, index, data = keeps
    data.unlink()

    def full(self, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(kernel_cache.KernelFiles, "_open_for_write", full)
        assert hits(again()) == 0
    assert kernel_cache.store_error == f"{index.parent} cannot be written: No space left on device"
    assert hits(again()) == 0 and hits(again()) == 1


def test_a_folder_that_is_removed_does_not_come_back(keeps, tmp_path):
    again, index, data = keeps
    function = again()
    for file in index.parent.iterdir():
        file.unlink()
    index.parent.rmdir()
    assert function(3) == 6 and not index.parent.exists()
    assert kernel_cache.store_error == f"{index.parent} was removed"


@posix
def test_who_may_write_kernels(tmp_path, monkeypatch):
    trusted = simd.trusted.__wrapped__
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
        # those with two threads waited for ever
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
    env = os.environ | {"PYTHONPATH": str(SRC)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    lines = done.stdout.splitlines()
    assert len(lines) == len(children), done
    for line, told in zip(lines, children.values(), strict=True):
        assert told in line and line.endswith("status 0"), done


@posix
def test_a_fork_is_told_before_it_asks_for_a_kernel(monkeypatch):
    monkeypatch.setattr(team, "_process", os.getpid() + 1)
    with pytest.raises(RuntimeError, match=GONE):
        team.team_of(4)
