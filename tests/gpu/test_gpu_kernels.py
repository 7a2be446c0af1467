"""benchmarks/gpu_kernels.py without a GPU: each of its cases launches something that exists."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.gpu_kernels import CUDA

from microvllm.gpu.elementwise import _few_rows

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts, which import one another

import gpu_kernels  # noqa: E402


@pytest.mark.skipif(CUDA, reason="it takes minutes, and a card can run the benchmark itself")
def test_each_case_launches_a_kernel_with_the_arguments_it_takes(monkeypatch):
    """Not run, not even interpreted: only the arguments are looked at. A tiny model."""
    launched = set()

    def run(self, *args, grid, warmup, **kwargs):
        parameters = inspect.signature(self.fn).parameters
        options = {"num_warps", "num_stages"} | parameters.keys()
        assert kwargs.keys() <= options, kwargs
        inspect.signature(self.fn).bind(*args, **{k: kwargs[k] for k in kwargs if k in parameters})
        assert all(n > 0 for n in grid)
        launched.add(self.fn.__name__)

    monkeypatch.setattr(type(_few_rows), "run", run)
    monkeypatch.setattr(gpu_kernels, "device", lambda: torch.device("cpu"))
    sizes = {"LAYERS": 2, "WIDTH": 64, "HEADS": 2, "DIM": 32, "VOCAB": 300, "BEYOND_CACHE": 10_000}
    for name, value in sizes.items():
        monkeypatch.setattr(gpu_kernels, name, value)
    for part, cases in gpu_kernels.PARTS.items():
        names = []
        for case in cases():
            case.launch(0), case.launch(case.launches)
            assert case.amount > 0 and case.unit in ("TB/s", "TFLOP/s")
            names.append(case.name)
        assert len(set(names)) == len(names) > 5, part
    assert launched == {
        "_few_rows", "_decode", "_chunk", "_add_norm", "_relu2", "_rope_store",
        "_sample_chunks", "_sample_pick", "_truncate",
    }  # fmt: skip


@pytest.mark.skipif(CUDA, reason="there is a card")
def test_without_a_card_the_benchmark_says_so_in_one_line():
    command = [sys.executable, BENCHMARKS / "gpu_kernels.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert "needs a CUDA device" in done.stderr and done.stderr.count("\n") == 1
