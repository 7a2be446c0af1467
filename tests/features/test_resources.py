"""The threads of a full engine, and the memory of a checkpoint's file."""

import os
import sys

import pytest
import torch
from helpers.goldens import MODEL

from microvllm import LLM, environment, resources
from microvllm.resources import FilePages, clean_file_mapping


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


# the memory of a file that tensors are mapped from


def mapped_tensor(file) -> torch.Tensor:
    """A tensor that is mapped from a file, with all of it in memory."""
    numbers = torch.arange(2**20, dtype=torch.float32)
    numbers.numpy().tofile(file)
    tensor = torch.from_file(str(file), shared=False, size=len(numbers))
    assert torch.equal(tensor, numbers)
    return tensor


def resident_kib(tensor: torch.Tensor) -> int:
    """What the mapping around a tensor has in memory."""
    is_inside = False
    with open("/proc/self/smaps", encoding="utf-8") as lines:
        for line in lines:
            name, *fields = line.split()
            if "-" in name:
                first, last = (int(part, 16) for part in name.split("-"))
                is_inside = first <= tensor.data_ptr() < last
            elif is_inside and name == "Rss:":
                return int(fields[0])
    raise AssertionError("no such mapping")


@pytest.fixture
def released_at_once(monkeypatch):
    if sys.platform != "linux":
        pytest.skip("memory of files is released on Linux alone")
    monkeypatch.setattr(resources, "RELEASED_BYTES", 0)


def test_the_memory_of_a_mapped_file_is_released_and_read_again(released_at_once, tmp_path):
    tensor = mapped_tensor(tmp_path / "numbers")
    assert resident_kib(tensor) >= 4096
    FilePages().done_with(tensor[5:])
    assert resident_kib(tensor) < 512  # the first kilobytes may have been read with others
    assert torch.equal(tensor, torch.arange(2**20, dtype=torch.float32))


def test_a_mapping_that_was_written_to_is_kept(released_at_once, tmp_path):
    tensor = mapped_tensor(tmp_path / "numbers")
    tensor[7] = -1  # in this process alone: the file does not change
    assert clean_file_mapping(tensor.data_ptr()) == (0, 0)
    FilePages().done_with(tensor)
    assert tensor[7] == -1 and tensor[8] == 8


def test_a_tensor_of_no_file_is_kept(released_at_once):
    tensor = torch.ones(2**20)
    assert clean_file_mapping(tensor.data_ptr()) == (0, 0)
    FilePages().done_with(tensor)
    assert tensor.eq(1).all()


def test_tensors_of_several_files_are_released_together(monkeypatch, released_at_once, tmp_path):
    monkeypatch.setattr(resources, "RELEASED_BYTES", 2**23)
    tensors = [mapped_tensor(tmp_path / f"numbers{i}") for i in range(2)]
    pages = FilePages()
    pages.done_with(tensors[0])
    assert resident_kib(tensors[0]) >= 4096  # too little to release
    pages.done_with(tensors[1])
    assert max(resident_kib(tensor) for tensor in tensors) < 512
