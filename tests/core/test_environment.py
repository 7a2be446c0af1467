"""Free memory and processors on machines that are not this one: their files are invented."""

import os
import sys
from collections import namedtuple
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers.goldens import MODEL

from microvllm import environment
from microvllm.engine import LLM
from microvllm.environment import available_cpus, free_memory, limit_threads
from microvllm.sampler import SamplingParams

CPU = torch.device("cpu")
GB = 10**9
UNLIMITED = 9223372036854771712  # what version 1 says where there is no limit


class Machine:
    """A machine of 64 processors and 100 GB of memory. This process may run on 40 processors, and
    80 GB are free."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        monkeypatch.setattr(environment, "PROC", folder / "proc")
        monkeypatch.setattr(environment, "CGROUPS", folder / "cgroup")
        memory = namedtuple("svmem", "total available")(100 * GB, 80 * GB)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 64 if logical else 32)
        monkeypatch.setattr(os, "cpu_count", lambda: 64)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(40)}, raising=False)
        monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace())  # no limit of addresses

    def write(self, **files):
        """proc__self__cgroup="..." is the file proc/self/cgroup."""
        for name, content in files.items():
            file = self.folder / name.replace("__", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{content}\n")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


@pytest.fixture
def one_thread_more(monkeypatch):
    """torch's number of threads, which a test may change."""
    before = torch.get_num_threads()
    for name in "OMP_NUM_THREADS", "MKL_NUM_THREADS":
        monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(before)


def put(machine, folder: str, **files):
    """The files of one control group; a dot is written as two underscores."""
    place = machine.folder / "cgroup" / folder
    place.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (place / name.replace("__", ".")).write_text(f"{content}\n")


# memory -------------------------------------------------------------------------------------------


def test_without_limits_what_is_available_is_free(machine):
    assert free_memory(CPU) == 80 * GB
    machine.write(proc__self__cgroup="0::/")
    put(machine, "", memory__stat="file 12")
    assert free_memory(CPU) == 80 * GB


def test_the_limit_of_a_group_of_version_2_without_its_cached_files(machine):
    machine.write(proc__self__cgroup="0::/user.slice/job.service")
    place = "user.slice/job.service"
    put(machine, place, memory__max=10 * GB, memory__current=9 * GB)
    assert free_memory(CPU) == 1 * GB
    stat = f"anon {3 * GB}\nfile {6 * GB}\nshmem {GB}\ninactive_file {3 * GB}\nactive_file {2 * GB}"
    put(machine, place, memory__stat=stat)
    assert free_memory(CPU) == 6 * GB  # 9 - 5 are used, among them the one in tmpfs


def test_every_group_around_a_process_has_a_limit_that_holds(machine):
    machine.write(proc__self__cgroup="0::/user.slice/job.service")
    put(machine, "user.slice/job.service", memory__max=50 * GB, memory__current=10 * GB)
    put(machine, "user.slice", memory__max=30 * GB, memory__current=25 * GB)
    assert free_memory(CPU) == 5 * GB
    put(machine, "user.slice", memory__max="max")
    assert free_memory(CPU) == 40 * GB


@pytest.mark.parametrize("path", ["/docker/0123abcd", "/", "/../../elsewhere"])
def test_a_container_of_version_2_has_its_group_in_the_root(machine, path):
    """The path is the host's, and what lies beside the group of the container is not its own."""
    machine.write(proc__self__cgroup=f"0::{path}")
    put(machine, "", memory__max=8 * GB, memory__current=2 * GB)
    (machine.folder / "elsewhere").mkdir()
    (machine.folder / "elsewhere" / "memory.max").write_text("5")
    assert free_memory(CPU) == 6 * GB


@pytest.mark.parametrize("shown", ["memory/docker/01", "memory"])
def test_the_limit_of_a_group_of_version_1_without_its_cached_files(machine, shown):
    machine.write(proc__self__cgroup="5:cpu,cpuacct:/docker/01\n4:memory:/docker/01\n0::/\n")
    put(machine, "memory", memory__limit_in_bytes=UNLIMITED, memory__usage_in_bytes=70 * GB)
    put(machine, shown, memory__limit_in_bytes=16 * GB, memory__usage_in_bytes=15 * GB)
    assert free_memory(CPU) == 1 * GB
    stat = f"inactive_file 1\ntotal_inactive_file {5 * GB}\ntotal_active_file {4 * GB}"
    put(machine, shown, memory__stat=stat)
    assert free_memory(CPU) == 10 * GB


def test_no_group_s_limit_makes_more_memory_than_there_is(machine):
    machine.write(proc__self__cgroup="0::/")
    put(machine, "", memory__max=900 * GB, memory__current=0)
    assert free_memory(CPU) == 80 * GB
    put(machine, "", memory__max=1 * GB, memory__current=2 * GB)  # a limit that was lowered
    assert free_memory(CPU) == 0


def test_what_cannot_be_read_limits_nothing(machine):
    machine.write(proc__self__cgroup="0::/")
    put(machine, "", memory__max="a lot", memory__current=1)
    assert free_memory(CPU) == 80 * GB
    put(machine, "", memory__max=GB)  # and how much is used is not known
    (machine.folder / "cgroup" / "memory.current").unlink()
    assert free_memory(CPU) == 80 * GB


@pytest.mark.skipif(not hasattr(psutil.Process, "rlimit"), reason="the limits of Linux")
def test_a_limit_of_addresses_counts(monkeypatch):
    limit = 2**60 + psutil.Process().memory_info().vms
    monkeypatch.setattr(psutil.Process, "rlimit", lambda self, what: (limit, limit))
    memory = namedtuple("svmem", "available")(2**61)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(environment, "_free_in_cgroups", lambda: [])
    assert abs(free_memory(CPU) - 2**60) < 2**30


# processors ---------------------------------------------------------------------------------------


def test_processors_are_those_that_the_process_may_run_on(machine):
    assert available_cpus() == 40


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1), ("max 100000", 40),
     ("6400000 100000", 40), ("50000 25000", 2), ("", 40), ("200000", 40), ("0 100000", 40)],
)  # fmt: skip
def test_a_quota_of_version_2_counts_as_whole_processors(machine, quota, cpus):
    machine.write(proc__self__cgroup="0::/job")
    put(machine, "job", cpu__max=quota)
    assert available_cpus() == cpus


def test_the_least_quota_of_all_groups_around_a_process(machine):
    machine.write(proc__self__cgroup="0::/a/b")
    put(machine, "a/b", cpu__max="800000 100000")
    put(machine, "a", cpu__max="300000 100000")
    assert available_cpus() == 3


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
@pytest.mark.parametrize(
    ("quota", "period", "cpus"), [(250000, 100000, 3), (-1, 100000, 40), (1000, 100000, 1)]
)
def test_a_quota_of_version_1(machine, mount, quota, period, cpus):
    machine.write(proc__self__cgroup="6:memory:/job\n5:cpu,cpuacct:/job\n1:name=systemd:/")
    put(machine, f"{mount}/job", cpu__cfs_quota_us=quota, cpu__cfs_period_us=period)
    assert available_cpus() == cpus


def test_torch_computes_on_no_more_threads_than_the_quota_allows(machine, one_thread_more):
    machine.write(proc__self__cgroup="0::/")
    put(machine, "", cpu__max="200000 100000")
    for default in 64, 32, 40, 20:  # what torch may have counted: processors, or their cores
        torch.set_num_threads(default)
        limit_threads()
        assert torch.get_num_threads() == 2
    put(machine, "", cpu__max="max 100000")
    torch.set_num_threads(32)
    limit_threads()
    assert torch.get_num_threads() == 32


def test_a_number_of_threads_that_the_user_chose_stays(machine, one_thread_more, monkeypatch):
    machine.write(proc__self__cgroup="0::/")
    put(machine, "", cpu__max="200000 100000")
    for chosen in 1, 7:
        torch.set_num_threads(chosen)
        limit_threads()
        assert torch.get_num_threads() == chosen
    torch.set_num_threads(40)
    monkeypatch.setenv("OMP_NUM_THREADS", "40")
    limit_threads()
    assert torch.get_num_threads() == 40


def test_an_engine_begins_with_the_threads_that_it_may_use(machine, one_thread_more, monkeypatch):
    machine.write(proc__self__cgroup="0::/")
    put(machine, "", cpu__max="100000 100000")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    torch.set_num_threads(2)
    with LLM(MODEL, device="cpu", num_blocks=4):
        assert torch.get_num_threads() == 1


# other systems ------------------------------------------------------------------------------------


@pytest.fixture(params=["win32", "darwin"])
def elsewhere(request, machine, monkeypatch):
    """Windows, whose Python has no os.sysconf, or macOS: neither has /proc or control groups."""
    monkeypatch.setattr(sys, "platform", request.param)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    if request.param == "win32":
        monkeypatch.delattr(os, "sysconf", raising=False)
        process = SimpleNamespace(cpu_affinity=lambda: [0, 1, 2, 3, 4])
        monkeypatch.setattr(psutil, "Process", lambda: process)
    return request.param


def test_other_systems_say_what_is_available(elsewhere):
    assert free_memory(CPU) == 80 * GB  # and not the 100 that are there
    assert available_cpus() == (5 if elsewhere == "win32" else 64)


def test_an_engine_runs_on_other_systems(elsewhere):
    params = SamplingParams(temperature=0, max_tokens=4)
    with LLM(MODEL, device="cpu", num_blocks=20) as llm:
        (output,) = llm.generate(["The island was"], params)
    assert len(output["token_ids"]) == 4
