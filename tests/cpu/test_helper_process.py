"""Helper processes as the system sees them, and their locks; what they compile is made up here."""

import json
import os
import subprocess
import sys
import time

import pytest

from microvllm.cpu import compilation, helper_process, process_lock

if sys.platform != "linux":
    pytest.skip("reads /proc", allow_module_level=True)
fcntl = pytest.importorskip("fcntl")

# a package in which nothing is compiled: it tells what it runs as, and waits for a file
SERVE = """
import os, resource, threading, time
from pathlib import Path

def serve(backend, kind, said):
    folder = Path(__file__).parent.parent
    said.update(done=3, now="a kernel")
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    (folder / "seen").write_text(f"{kind} {os.getcwd()} {limit}")
    while not (folder / "go").exists():
        time.sleep(0.02)
    (folder / "done").touch()
    os._exit(0)
"""


def wait_for(condition, seconds=120.0):
    """What the condition gives, once it is true. Where other programs are busy, a helper of the
    lowest priority waits for a core."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the made-up package and the locks are."""
    package = tmp_path / "invented"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "backend.py").write_text("CpuBackend = None")
    (package / "compilation.py").write_text(SERVE)
    monkeypatch.setattr(compilation, "__package__", "invented")
    monkeypatch.setattr(compilation, "place", lambda kind: tmp_path / f"kernels-{kind}.txt")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("MICROVLLM_HELPER", raising=False)
    yield tmp_path
    (tmp_path / "go").touch()
    wait_for(lambda: not compilation.running_helpers())


def start(folder, role=compilation.BACKGROUND) -> subprocess.Popen:
    """A helper that has begun its work."""
    process = compilation.start("float32", role)
    wait_for((folder / "seen").exists)
    wait_for((folder / "seen").read_text)
    return process


def policies(process) -> set[tuple[int, int]]:
    """(scheduling policy, niceness) of each thread."""
    threads = map(int, os.listdir(f"/proc/{process.pid}/task"))
    return {(os.sched_getscheduler(t), os.getpriority(os.PRIO_PROCESS, t)) for t in threads}


def test_a_helper_in_the_background(folder):
    process = start(folder)
    assert policies(process) == {(os.SCHED_IDLE, 19)}
    assert os.getsid(process.pid) == process.pid != os.getsid(0), "no terminal sends it signals"
    lock = str(folder / "kernels-background.lock")
    places = f"/proc/{process.pid}/fd"
    held = {os.readlink(f"{places}/{number}") for number in os.listdir(places)}
    assert held == {os.devnull, lock}, "nor does any pipe wait for it"
    assert (folder / "seen").read_text() == f"float32 / {helper_process.BYTES}"
    with open(f"/proc/{process.pid}/oom_score_adj") as file:
        assert file.read() == "1000\n"
    (said,) = wait_for(lambda: [said for said in compilation.running_helpers() if said.get("done")])
    assert said["pid"] == process.pid and said["kind"] == "float32" and said["now"] == "a kernel"
    assert said["role"] == compilation.BACKGROUND and time.time() - said["since"] < 60
    assert os.stat(lock).st_mode & 0o777 == 0o600


def test_one_helper_at_a_time_and_no_zombie(folder):
    process = start(folder)
    assert compilation.start("bfloat16", compilation.BACKGROUND) is None
    (folder / "go").touch()
    wait_for(lambda: not os.path.exists(f"/proc/{process.pid}"))  # though nothing polls it
    wait_for(lambda: process.returncode is not None)
    assert process.returncode == 0 and compilation.running_helpers() == []
    second = compilation.start("float32", compilation.BACKGROUND)
    assert second and second.wait(30) == 0


def test_a_helper_that_an_engine_waits_for(folder):
    """It has the engine's priority, beside another one; without the engine it is like all others,
    in each of its threads."""
    background = start(folder)
    process = start(folder, compilation.FOREGROUND)
    usual = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)
    assert policies(process) == {usual} and process.pid != background.pid
    wait_for(
        lambda: (
            sorted(helper.get("role", "") for helper in compilation.running_helpers())
            == ["background", "foreground"]
        )
    )
    process.stdin.close()
    wait_for(lambda: policies(process) == {(os.SCHED_IDLE, 19)})
    wait_for(lambda: [s.get("role") for s in compilation.running_helpers()] == ["background"] * 2)


def test_a_helper_that_is_attached_ends_with_its_engine(folder, monkeypatch):
    monkeypatch.setenv("MICROVLLM_HELPER", "attached")
    process = start(folder)
    process.stdin.close()
    assert process.wait(30) == 1 and not (folder / "done").exists()


@pytest.mark.slow
def test_a_helper_outlives_the_process_that_started_it(folder):
    """Which a reader of its output does not wait for."""
    code = """
import pathlib, sys
from microvllm.cpu import compilation
compilation.__package__ = "invented"
compilation.place = lambda kind: pathlib.Path(sys.argv[1]) / kind
print(compilation.start("float32", compilation.BACKGROUND).pid)
"""
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and not done.stderr
    wait_for((folder / "seen").exists)
    (said,) = wait_for(compilation.running_helpers)
    assert said["pid"] == int(done.stdout)
    (folder / "go").touch()
    wait_for((folder / "done").exists)


def test_a_helper_ends_after_its_time(folder):
    """Also one that does nothing of its own accord."""
    with open(helper_process.__file__) as file:
        source = file.read()
    (folder / "brief.py").write_text(source.replace("SECONDS = 15 * 60", "SECONDS = 2"))
    arguments = {"path": [str(folder), *sys.path], "package": "invented", "kind": "float32"}
    # of the usual priority: one of the lowest might not have begun by then
    arguments |= {"lock": None, "role": helper_process.FOREGROUND}
    command = [sys.executable, "-I", folder / "brief.py", json.dumps(arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.wait(60) == 1
    assert (folder / "seen").exists()


def test_a_helper_whose_package_is_removed(folder):
    """It ends, and nothing of it comes back."""
    process = compilation.start("float32", compilation.BACKGROUND)
    for path in (folder / "invented").iterdir():
        if path.is_file():
            path.unlink()
    wait_for(lambda: process.poll() is not None or (folder / "seen").exists())
    if process.poll() is None:  # it had imported all
        (folder / "go").touch()
    process.wait(30)
    assert not [path for path in (folder / "invented").iterdir() if path.is_file()]


# locks --------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some.lock"


def hold(path, mode=0o600, age=0.0) -> int:
    """A descriptor through which another process has the lock, by reading alone."""
    if not path.exists():
        path.write_text('{"pid": 5}')
    path.chmod(mode)
    os.utime(path, (time.time() - age,) * 2)
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def test_a_lock_is_held_until_all_copies_are_closed(path):
    assert process_lock.holder(path) is None
    mine = process_lock.take(path)
    assert process_lock.take(path) is None and process_lock.holder(path) == {}
    helper_process.write_description(mine, {"pid": 12345, "kind": "a longer text"})
    helper_process.write_description(mine, {"pid": 1})
    assert process_lock.holder(path) == {"pid": 1}
    copy = os.dup(mine)
    os.close(mine)
    assert process_lock.take(path) is None
    os.close(copy)
    assert process_lock.holder(path) is None, "what a dead process has written counts no more"
    os.utime(path, (0, 0))
    again = process_lock.take(path)
    assert process_lock.take(path) is None and process_lock.holder(path) == {"pid": 1}
    os.close(again)


def test_a_lock_of_another_process_delays_no_engine(path):
    """A file that they can read is one that they can lock."""
    theirs = hold(path, mode=0o644)
    assert process_lock.holder(path) is None
    mine = process_lock.take(path)
    assert mine is not None and path.stat().st_mode & 0o777 == 0o600
    assert process_lock.take(path) is None
    os.close(mine)
    os.close(theirs)


def test_a_process_that_hangs_holds_a_lock_for_a_minute(path):
    for age, counts in (0.9 * process_lock.TIMEOUT, True), (1.1 * process_lock.TIMEOUT, False):
        theirs = hold(path, age=age)
        assert (process_lock.holder(path) is not None) == counts
        mine = process_lock.take(path)
        assert (mine is None) == counts
        os.close(theirs)
    os.close(mine)


def test_a_lock_is_no_link_to_another_file(path, tmp_path):
    other = tmp_path / "other"
    other.write_text("mine")
    path.symlink_to(other)
    with pytest.raises(OSError):
        process_lock.take(path)
    assert process_lock.holder(path) is None and other.read_text() == "mine"


@pytest.mark.parametrize("said", [b"", b"{", b"\xff", b"[1]", b"{}" * 5000])
def test_a_description_of_any_content(path, said):
    path.write_bytes(said)
    theirs = hold(path)
    assert process_lock.holder(path) == {}
    os.close(theirs)


def test_where_files_have_no_modes_or_locks(path, monkeypatch):
    """The lock is had at once; two helpers at a time do no harm."""
    theirs = hold(path)
    monkeypatch.setattr(process_lock, "fcntl", None)
    os.close(process_lock.take(path))
    assert process_lock.holder(path) is None
    monkeypatch.setattr(process_lock, "fcntl", fcntl)
    monkeypatch.setattr(process_lock, "_is_private", lambda _: False)
    os.close(theirs)
    os.close(process_lock.take(path))
