"""What a GPU's first start finds: a compiler that does not work, a kernel that errs. On the CPU."""

import subprocess
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers.gpu_kernels import CUDA, DEVICE

from microvllm import gpu, loading
from microvllm.gpu import backend, graphs, launch, self_check
from microvllm.model import RECIPES, GPTConfig

CARD = torch.device("cuda", 0)


def test_the_compiler_is_tried():
    assert gpu.compiler_problem.__wrapped__(DEVICE) is None


@pytest.mark.parametrize(
    "error, reason",
    [
        (subprocess.CalledProcessError(1, ["gcc", "x.c"]), "the C compiler failed with status 1"),
        (RuntimeError("Failed to find C compiler"), "RuntimeError: Failed to find C compiler"),
        (ImportError("libcuda.so"), "ImportError: libcuda.so"),
    ],
)
def test_without_a_compiler_auto_warns_and_triton_says_what_to_install(monkeypatch, error, reason):
    def try_compiler(device):
        raise error

    problem = gpu.compiler_problem.__wrapped__
    monkeypatch.setattr(launch, "try_compiler", try_compiler)
    monkeypatch.setattr(gpu, "takes_triton", lambda device: True)
    monkeypatch.setattr(backend, "takes_triton", lambda device: True)
    monkeypatch.setattr(gpu, "compiler_problem", problem)
    monkeypatch.setattr(backend, "compiler_problem", problem)
    gpu.warn_of_compiler.cache_clear()
    with pytest.warns(UserWarning, match="apt-get install gcc python3-dev") as warned:
        assert loading.fastest_backend(DEVICE, torch.float32) != "triton"
        assert loading.pick_backend("auto", CARD, torch.float32).name == "sdpa"
    assert len(warned) == 1 and reason in str(warned[0].message)
    with pytest.raises(
        ValueError, match="attention='triton': .*gcc.*python3-dev.*'auto'"
    ) as raised:
        loading.pick_backend("triton", CARD, torch.float32)
    assert reason in str(raised.value)


def test_a_compiler_that_writes_something_else_is_none(monkeypatch):
    class Nothing:
        def __getitem__(self, grid):
            return lambda x: None

    monkeypatch.setattr(launch, "_write_seven", Nothing())
    assert "has written 0" in gpu.compiler_problem.__wrapped__(DEVICE)


class Model:
    """What the check reads of a model."""

    config = local = GPTConfig(64, 70, 2, 2, 1, 32)
    recipe = RECIPES["5"]
    kv_layout = (config, torch.float32)
    store = None


@pytest.mark.skipif(CUDA, reason="with a stand-in for the device")
def test_an_engine_uses_no_kernel_that_the_check_has_refused(monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda device: True)
    made = backend.TritonBackend(DEVICE, torch.float32)
    model = Model()
    model.backend = made
    made.prepare(model)  # no card: nothing to check
    made.device = CARD
    made.block_size = 8
    seen = []

    def check_kernels(checked, shapes):
        seen.append((checked, shapes))
        return {"attention of decodes": "wrong", "draw": "", "products of a few rows": ""}

    monkeypatch.setattr(self_check, "check_kernels", check_kernels)
    with pytest.warns(UserWarning, match=r"on cuda:0.*: attention of decodes \(wrong\); please"):
        made.prepare(model)
    shapes = self_check.Shapes(model.config, model.local, model.recipe, model.kv_layout, 8)
    assert seen == [(made, shapes)]
    assert "attend" not in vars(made) and made.draw is not None and not made.can_record
    made.block_step = 256  # blocks of 8 are refused where the engine is made
    made.prepare(model)
    assert len(seen) == 1


@pytest.mark.skipif(CUDA, reason="with a stand-in for the device")
def test_info_compares_the_kernels_now(monkeypatch):
    arguments = (Model.config, Model.recipe)
    with pytest.raises(ValueError, match="the kernels of a GPU, but the device is cpu"):
        loading.compare_kernels(*arguments, DEVICE, "auto", "auto")
    monkeypatch.setattr(gpu, "has_triton", lambda device: False)
    with pytest.raises(ValueError, match="no kernels run on cuda:0"):
        loading.compare_kernels(*arguments, CARD, "auto", "auto")
    monkeypatch.setattr(gpu, "has_triton", lambda device: True)
    made = backend.Backend(DEVICE, torch.float32)
    made.relu2 = lambda x: 2 * x
    monkeypatch.setattr(loading, "pick_backend", lambda *args, **kwargs: made)
    monkeypatch.setattr(self_check, "check_apart", self_check.check_here)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = loading.compare_kernels(*arguments, CARD, "float32", "auto")
        assert "relative error" in found["kernels"]["relu^2"]
        assert found["card"] == "no card" and torch.__version__ in found["versions"]


@pytest.mark.parametrize("kind", [torch.cuda.OutOfMemoryError, RuntimeError])
def test_steps_are_recorded_with_a_line_and_their_memory_is_named(monkeypatch, capsys, kind):
    runner = object.__new__(graphs.GraphRunner)
    runner.model = SimpleNamespace(device=torch.device("cpu"))
    runner.cache = None
    monkeypatch.setattr(graphs, "DecodeGraphs", lambda *_: "recorded")
    runner.record(4, 64)
    assert runner.graphs == "recorded" and "recording decode steps" in capsys.readouterr().err

    def fail(*_):
        raise kind("CUDA error: out of memory")

    monkeypatch.setattr(graphs, "DecodeGraphs", fail)
    with pytest.raises(ValueError, match=r"enough memory for recorded steps \(cuda_graphs=False"):
        runner.record(4, 64)
