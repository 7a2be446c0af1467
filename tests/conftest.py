"""Fixtures for all tests, and the order in which the files run. Shared helpers are in helpers/."""

import os

import pytest
import torch

pytest.register_assert_rewrite("helpers")  # before anything of it is imported

from helpers.batches import hand_made_batch, slots_of  # noqa: E402
from helpers.browsers import browser  # noqa: E402, a fixture
from helpers.commands import command, mistake  # noqa: E402, fixtures
from helpers.goldens import ERAS, MODEL, PACKAGE, ROOT, SRC, Fixture, era_fixtures  # noqa: E402

__all__ = [
    "ERAS",
    "MODEL",
    "PACKAGE",
    "ROOT",
    "SRC",
    "Fixture",
    "browser",
    "command",
    "era_fixtures",
    "hand_made_batch",
    "mistake",
    "slots_of",
]

# a helper that compiles kernels ends with the test that started it, also in commands of tests
os.environ["MICROVLLM_HELPER"] = "attached"
# processes that a test starts import this checkout, whichever one is installed
others = [path for path in [os.environ.get("PYTHONPATH")] if path]
os.environ["PYTHONPATH"] = os.pathsep.join([str(SRC), *others])

torch.set_num_threads(1)  # two processes run side by side; a test of threads asks for more


# The files run in this order, the others after them: first some that need no kernels of the CPU,
# which are compiled meanwhile, then those of many seconds, of these the ones that need more kernels
# last. Short ones come at the end, so that neither process waits for the other.
EARLY = (
    "test_kernels_gpu test_graphs test_deterministic_gpu test_flash test_float8 test_lab "
    "test_tokenizer test_scheduler test_pt test_strict_tokenizer test_state_machine"
).split()
ORDER = [*EARLY, *(
    "test_structure test_readme test_benchmarks test_ray test_parallel test_soak "
    "test_interruptions test_streams test_scripts test_batch test_examples test_conversation "
    "test_model test_fuzz test_trace test_trace_page test_cli test_logits test_policies "
    "test_engine test_kernels_cpu test_gemm test_determinism_matrix test_live "
    "test_low_bit_gemm test_compilation test_int8_cache test_simd test_memory_limits "
    "test_quantize"
).split()]  # fmt: skip
KINDS = "float32-layers", "float32-shared-layers", "float32"  # of kernels
SLOW = "bfloat16-layers", "int8-layers"  # those that only slow tests need


def pytest_collection_modifyitems(items):
    places = {name: i for i, name in enumerate(ORDER)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="module", autouse=True)
def kernels(request):
    """The usual kernels, on disk before a test begins: a command that finds none says so. For the
    other files, and for the kinds that come later, one process has a helper compile them. Tests of
    the core need none."""
    if request.path.parent.name == "core":
        return
    from microvllm.cpu import backend, compilation

    alone = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0"
    for kind in KINDS if request.config.option.markexpr == "not slow" else KINDS + SLOW:
        waits = kind in KINDS and request.path.stem not in EARLY
        if compilation.compiled(kind):
            continue
        if not waits and (not alone or kind in compilation._helpers or not compilation.place(kind)):
            return
        with compilation.reporting(compilation.tell, waits):
            if not compilation.begin(backend.CpuBackend, kind, waits):
                return  # one kind at a time, and each once


@pytest.fixture(scope="session", autouse=True)
def interpreter():
    """Triton's interpreter patches triton.language for each launch, and for each call of a function
    inside a kernel, which is most of its time: patch it once."""
    if not os.environ.get("TRITON_INTERPRET"):  # the tests of kernels set it where there is no card
        return
    from triton.runtime import interpreter

    if hasattr(interpreter, "_LangPatchScope"):  # else another triton
        patch, done = interpreter._patch_lang, set()

        def once(fn):  # for each module, since not all import the same parts of it
            if id(fn.__globals__) not in done:
                done.add(id(fn.__globals__))
                patch(fn)
            return interpreter._LangPatchScope()  # with nothing to undo

        interpreter._patch_lang = once


@pytest.fixture(params=list(era_fixtures()))
def era(request) -> Fixture:
    return Fixture(*era_fixtures()[request.param])


@pytest.fixture
def two_threads():
    """Threads that share the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """For modules of thousands of tiny steps: two threads would wait for each other most of the
    time, and for seconds where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
