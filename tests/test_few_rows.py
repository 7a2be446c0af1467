"""benchmarks/gpu_kernels.py without a GPU: its experiment with products of a few rows computes what
it should, and each of its cases launches something that exists."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_kernels_gpu import CUDA, DEVICE, DTYPES, EPS, assert_close, compile_for_hopper, randn
from test_kernels_gpu import poisoned_outputs as poisoned_outputs  # runs before each test

from microvllm import model

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts, which import one another

import gpu_kernels  # noqa: E402


@DTYPES
@pytest.mark.parametrize("rows, K, N", [(1, 136, 50), (3, 600, 21), (8, 64, 7), (2, 4200, 9)])
@pytest.mark.parametrize("lambdas", [False, True])
def test_products_of_a_few_rows(dtype, rows, K, N, lambdas):
    """norm_linear and linear_add are add_norm, F.linear and relu2 in one."""
    a, b = (torch.tensor(z, device=DEVICE) if lambdas else None for z in (0.7, -0.4))
    x, w, x0 = randn(rows, K, dtype=dtype), randn(N, K, dtype=dtype), randn(rows, K, dtype=dtype)
    for relu2 in (False, True):
        y, h = gpu_kernels.norm_linear(x, w, EPS, x0, a, b, relu2)
        h_ref = model.add_norm(x.float(), None, x0.float(), a, b, EPS)[1]
        y_ref = F.linear(h_ref, w.float())
        assert y.dtype == h.dtype == dtype
        assert_close(h, h_ref[:, :32], dtype)
        assert_close(y, model.relu2(y_ref) if relu2 else y_ref, dtype)
    stream, x0 = randn(rows, N, dtype=dtype), randn(rows, N, dtype=dtype)
    out = gpu_kernels.linear_add(x, w, stream, x0, a, b)
    old = stream.float() if a is None else a * stream.float() + b * x0.float()
    assert_close(out, old + F.linear(x.float(), w.float()), dtype)


@pytest.mark.skipif(CUDA, reason="a real card has compiled the kernels for itself")
def test_they_compile_for_hopper_and_ask_for_weights_before_they_wait():
    kernels = compile_for_hopper("""
import sys
sys.path.insert(0, "benchmarks")
import gpu_kernels
x, w = bf16(1, 2176), bf16(64, 2176)
for one in torch.zeros(5)[:2]:  # a layer's lambdas
    gpu_kernels.norm_linear(x, w, 1e-7, x, one, one)
gpu_kernels.linear_add(x, w, bf16(1, 64))
""")
    ((name, variants, waits, early, later),) = {tuple(kernel) for kernel in kernels}
    assert (name, variants, waits, later) == ("_linear", "2", "True", "0") and int(early) > 0


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

    monkeypatch.setattr(type(gpu_kernels._linear), "run", run)
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
        "_linear", "_decode", "_combine", "_chunk", "_add_norm", "_relu2", "_rope_store",
        "_sample_chunks", "_sample_pick", "_truncate",
    }  # fmt: skip


@pytest.mark.skipif(CUDA, reason="there is a card")
def test_without_a_card_the_benchmark_says_so_in_one_line():
    command = [sys.executable, BENCHMARKS / "gpu_kernels.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert "needs a CUDA card" in done.stderr and done.stderr.count("\n") == 1
