"""The first run: engines in plain torch until a helper process has compiled their kernels."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers.goldens import MODEL, ROOT, SRC

from microvllm import LLM, SamplingParams
from microvllm.cpu import compilation
from microvllm.cpu.backend import PLAIN, CpuBackend

PROMPTS = ["Who wrote Moby Dick?", "It was a dark and stormy night, and", "The island"]
posix = pytest.mark.skipif(os.name != "posix", reason="no such signals, no such links")
ENDS = "import sys; sys.exit(1)"
WAITS = "import sys; sys.stdin.read()"
WRITES = "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"


class Helpers:
    """Stand-ins for helper processes, in a folder where no kernels are."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.does, self.lines, self.tiny = folder, WAITS, [], []
        monkeypatch.setattr(compilation, "place", lambda kind: self.folder and self.folder / kind)
        monkeypatch.setattr(compilation, "start", self.start)
        monkeypatch.setattr(compilation, "run_tiny", lambda _, kind: self.tiny.append(kind))
        monkeypatch.setattr(compilation, "tell", self.lines.append)
        monkeypatch.setattr(compilation, "patient", False)
        monkeypatch.setattr(compilation.kernel_cache, "used", set())
        monkeypatch.setattr(compilation.kernel_cache, "store_error", None)
        self.started, self.roles = {}, []
        names = {"_ready": set(), "_printed_lines": set(), "_due": {}, "_helpers": self.started}
        names["_listeners"] = {}
        for name, empty in names.items():
            monkeypatch.setattr(compilation, name, empty)

    def start(self, kind, role):
        command = [
            sys.executable,
            "-S",
            "-c",
            self.does,
            self.folder / kind,
            compilation.contents({}),
        ]
        self.roles.append(role)
        return subprocess.Popen(command, stdin=subprocess.PIPE)

    def finish(self, kind):
        """The helper has compiled all, and ends."""
        (self.folder / kind).write_text(compilation.contents({}))
        self.end(kind)

    def end(self, kind):
        helper = self.started[kind][-1]
        if not helper.stdin.closed:
            helper.stdin.close()
        helper.wait()


@pytest.fixture
def helpers(tmp_path, monkeypatch):
    helpers = Helpers(tmp_path, monkeypatch)
    yield helpers
    for helper in sum(helpers.started.values(), []):
        helper.kill()
        helper.wait()


def answers(llm, **options):
    params = SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **options})
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return [sample["token_ids"] for output in outputs for sample in output["samples"]]


@pytest.mark.parametrize("options", [
    {}, {"prompt_lookup": 3}, pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.slow),
])  # fmt: skip
def test_steps_are_in_plain_torch_until_the_kernels_are_there(options, helpers):
    """And the tokens are those of the kernels, wherever the change falls, also of samples."""
    kind = options.get("dtype", "float32")
    sampled = {"temperature": 0.8, "seed": 5, "n": 2, "top_k": 40}
    with LLM(MODEL, device="cpu", num_blocks=100, **options) as llm:
        backend = llm.model.backend
        if llm.model.compiled:
            kind += "-layers"
        assert backend.awaited == kind and [*helpers.started] == [kind]
        assert backend.sample is not CpuBackend.sample and {*PLAIN} <= vars(backend).keys()
        before = answers(llm), answers(llm, **sampled)
        ids = []
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        for event in llm.stream(PROMPTS[0], params):
            ids += event["token_ids"]
            if backend.awaited and len(ids) >= 5 and helpers.started[kind][0].poll() is None:
                helpers.finish(kind)
        assert backend.awaited is None and not {*PLAIN} & vars(backend).keys()
        assert helpers.tiny == [kind], "they are loaded once"
        assert ids == before[0][0]
        after = answers(llm), answers(llm, **sampled)
    if "dtype" not in options:  # bfloat16 has ties, see docs/DETERMINISM.md
        assert before == after
    assert before[0][0] == after[0][0]
    assert len(helpers.lines) == 1 and "answers are slower" in helpers.lines[0]
    # another engine of this process has them at once, and says nothing
    with LLM(MODEL, device="cpu", num_blocks=100, **options) as llm:
        assert llm.model.backend.awaited is None
        assert answers(llm) == after[0]
    assert len(helpers.started[kind]) == 1 and len(helpers.lines) == 1


def test_scores_and_other_features_need_no_kernels(helpers):
    """Nor do new weights."""
    state = torch.load(next(MODEL.glob("model_*.pt")), weights_only=True)

    def everything(llm) -> list:
        params = SamplingParams(temperature=0, max_tokens=6, repetition_penalty=1.2, logprobs=0)
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        tokens = [output["token_ids"] for output in outputs]
        numbers = [p for output in outputs for p in output["samples"][0]["logprobs"]]
        return [tokens, [p["logprob"] for p in numbers], *llm.score(["1 + 1 ="] * 2, [" 2", " 3"])]

    with LLM(MODEL, device="cpu", num_blocks=100) as llm:
        before = everything(llm)
        llm.update_weights({name: 2 * weight for name, weight in state.items()})
        other = everything(llm)
        llm.update_weights(state)
        assert llm.model.backend.awaited and everything(llm)[0] == before[0] != other[0]
        helpers.finish(llm.model.backend.awaited)
        tokens, *numbers = everything(llm)
        assert llm.model.backend.awaited is None and tokens == before[0]
        for found, wanted in zip(numbers, before[1:], strict=True):
            assert found == pytest.approx(wanted, abs=1e-3)


def test_a_live_module_is_served_before_and_after(helpers):
    """Its weights are shared, and followed; an engine that wakes looks for its kernels again."""
    from microvllm.engine import load_model

    gpt = load_model(MODEL)
    with LLM(MODEL, device="cpu", num_blocks=100, plain=True) as llm:
        tokenizer, want = llm.tokenizer, answers(llm)
    with LLM(model=gpt, tokenizer=tokenizer, device="cpu", num_blocks=100) as llm:
        kind = "float32-shared-layers" if llm.model.compiled else "float32"
        assert llm.model.backend.awaited == kind and answers(llm) == want
        with torch.no_grad():
            gpt.lm_head.weight.mul_(-1)
        assert answers(llm) != want
        with torch.no_grad():
            gpt.lm_head.weight.mul_(-1)
        assert answers(llm) == want
        llm.sleep()
        helpers.finish(kind)
        assert answers(llm) == want and llm.model.backend.awaited is None


@pytest.mark.parametrize(
    "options", [{"deterministic": True}, {"quantization": "int8"}, {"patient": True}]
)
def test_what_has_no_plain_form_waits(options, helpers, monkeypatch):
    """And a library's engines do, whose tokens then depend on no clock."""
    helpers.does = WRITES
    if options.pop("patient", None):
        monkeypatch.setattr(compilation, "patient", True)
    with LLM(MODEL, device="cpu", num_blocks=20, **options) as llm:
        ((kind, (helper,)),) = helpers.started.items()
        assert helper.wait() == 0 and llm.model.backend.awaited is None
        assert helpers.roles == [compilation.FOREGROUND]
        assert not helpers.tiny, "they are loaded where they are called"
    (line,) = helpers.lines
    assert "slower" not in line and str(helpers.folder) in line
    assert compilation.warmup(kind) in line and "15 to 60 seconds" in line


def test_ranks_wait(helpers):
    """One could draw from the kernels' logits, and another from torch's."""
    helpers.does = WRITES
    backend = CpuBackend(torch.device("cpu"), torch.float32)
    model = {"store": None, "compiled": None, "ranks": object(), "kv_layout": (None, None)}
    backend.prepare(SimpleNamespace(**model))
    assert backend.awaited is None and helpers.started["float32"][0].wait() == 0


def test_where_nothing_can_be_kept_the_engine_compiles_by_itself(helpers, monkeypatch):
    """No helper could hand anything over; and where none can start it is no other. A line says what
    that costs, and what would help."""
    folder, helpers.folder = helpers.folder, None
    monkeypatch.setattr(compilation.kernel_cache, "store_error", "/here cannot be written")
    with LLM(MODEL, device="cpu", num_blocks=20) as llm:
        assert llm.model.backend.awaited is None and not helpers.started.get("float32-layers")
        assert len(helpers.tiny) == len(helpers.lines) == 1
    assert "do so again, because /here cannot be written: set NUMBA_" in helpers.lines.pop()
    helpers.folder = folder
    monkeypatch.setattr(compilation.kernel_cache, "store_error", None)

    def refuse(kind, role):
        raise OSError("no processes")

    monkeypatch.setattr(compilation, "start", refuse)
    compilation._ready.clear()
    with LLM(MODEL, device="cpu", num_blocks=20) as llm:
        assert llm.model.backend.awaited is None and len(helpers.tiny) == 2
    assert "No helper" in helpers.lines[0] and str(folder) in helpers.lines[0]


def test_an_engine_whose_helpers_die_goes_on(helpers):
    """A second one is tried, since the first one's kernels are on disk; then it stays as it is. One
    that waits compiles by itself."""
    with LLM(MODEL, device="cpu", num_blocks=60) as llm:
        kind = llm.model.backend.awaited
        whole = answers(llm)
        helpers.started[kind][0].send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        helpers.started[kind][0].wait()
        assert answers(llm) == whole and len(helpers.started[kind]) == compilation.TRIES == 2
        helpers.end(kind)
        assert answers(llm) == whole and answers(llm) == whole
        assert len(helpers.started[kind]) == 2 and llm.model.backend.awaited
        assert len(helpers.lines) == 2 and "continues without them" in helpers.lines[1]
        # another process may have compiled them
        (helpers.folder / kind).write_text(compilation.contents({}))
        assert answers(llm) == whole and llm.model.backend.awaited is None
    compilation._ready.clear()
    (helpers.folder / kind).unlink()
    helpers.tiny.clear()
    helpers.does = ENDS
    with LLM(MODEL, device="cpu", num_blocks=20, deterministic=True) as llm:
        assert helpers.tiny == [kind] and helpers.started[kind][-1].returncode == 1
    assert (helpers.folder / kind).read_text() == compilation.contents({})


def test_the_file_is_of_these_sources_and_this_processor(helpers, monkeypatch):
    marker = helpers.folder / "float32"
    assert not compilation.compiled("float32")
    marker.write_text(compilation.contents({}))
    assert compilation.compiled("float32") and not compilation.compiled("bfloat16")
    monkeypatch.setattr(compilation, "CPU", [*compilation.CPU, "+another"])
    assert not compilation.compiled("float32")
    for content in b"", b"\xff\xfe", b"[]", b"5", b"[1, 2]", b"[1, {}]", b'{"a": 1, "b": 2}':
        marker.write_bytes(content)
        assert not compilation.compiled("float32")


def test_a_file_that_is_cut_empty_or_gone_is_not_compiled(helpers):
    """The engine then has a helper compile, as in a first run."""
    kernel = helpers.folder / "kernel.nbc"
    kernel.write_bytes(b"12345")
    compilation.kernel_cache.used.update([kernel, helpers.folder.parent / "of another folder"])
    compilation.compile_here(CpuBackend, "float32")
    assert compilation.compiled("float32")
    for content in b"1234", b"":
        kernel.write_bytes(content)
        assert not compilation.compiled("float32")
    kernel.unlink()
    assert not compilation.compiled("float32")
    kernel.write_bytes(b"54321")  # of this size: KernelFiles reads it, and looks
    assert compilation.compiled("float32")
    compilation.kernel_cache.store_error = "a full disk"
    (helpers.folder / "float32").unlink()
    compilation.compile_here(CpuBackend, "float32")
    assert not compilation.compiled("float32")


def test_a_program_that_is_no_python_starts_no_helper(monkeypatch):
    """It would start itself again."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(OSError, match="not Python"):
        compilation.start("float32", compilation.BACKGROUND)
    monkeypatch.delattr(sys, "frozen")
    monkeypatch.setenv("MICROVLLM_HELPER", "none")
    with pytest.raises(OSError, match="MICROVLLM_HELPER=none"):
        compilation.start("float32", compilation.BACKGROUND)


@posix
def test_a_helper_imports_the_same_package(tmp_path, monkeypatch):
    """Also one that is linked to, or in the current folder; numba keeps kernels by its path."""
    link = tmp_path / "link"
    link.symlink_to(ROOT, target_is_directory=True)
    monkeypatch.setattr(compilation, "__file__", f"{link}/microvllm/cpu/compilation.py")
    monkeypatch.setattr(sys, "path", ["/lib", "", "lib"])
    monkeypatch.chdir(tmp_path)
    assert compilation.sources() == ["/lib", f"{tmp_path}/lib", str(link)]
    monkeypatch.chdir(ROOT)
    assert compilation.sources() == ["/lib", str(link), f"{ROOT}/lib"]


def test_weight_tiles_multiply_without_kernels_too():
    """In plain torch, on the same memory: odd sizes, no rows, and relu2."""
    from microvllm.cpu import gemm

    if not gemm.TILE:
        pytest.skip("this processor has no kernel of packed weights")
    backend = CpuBackend(torch.device("cpu"), torch.float32)
    for rows, width, relu2 in ((gemm.TILE, 8, False), (70, 20, True), (3, 5, False)):
        weight = torch.randn(rows, width)
        linear = gemm.PackedLinear([weight], backend, torch.float32, rows=rows, relu2=relu2)
        for T in (0, 1, 7, 40):
            x = torch.randn(T, width)
            backend.awaited = None
            want = linear(x) if T else torch.empty(0, rows)
            backend.awaited = "float32"
            torch.testing.assert_close(linear(x), want, rtol=1e-5, atol=1e-5)


def test_an_engine_waits_a_minute_for_a_helper_that_may_get_no_time(helpers, monkeypatch):
    """Then it has its own, beside that one. For one that another engine waits for it waits on."""
    helpers.does = WRITES
    other = {"pid": 77, "kind": "float32", "role": compilation.BACKGROUND, "since": 0.0}
    working, looks = [other], []

    def running_helpers():
        looks.append(len(helpers.roles))
        return working[: 1 if len(looks) < 7 else None]

    monkeypatch.setattr(compilation, "running_helpers", running_helpers)
    monkeypatch.setattr(compilation, "PATIENCE", 0.25)
    assert compilation.begin(CpuBackend, "float32", waits=True)
    assert helpers.roles == [compilation.FOREGROUND] and looks[:3] == [0, 0, 0]
    (line,) = helpers.lines
    assert "by process 77. This happens once" in line
    # the other one is of a kind of its own: nothing is gained by waiting
    assert compilation.begin(CpuBackend, "bfloat16", waits=True) and len(helpers.roles) == 2
    looks.clear()
    other["role"] = compilation.FOREGROUND
    working[:] = [other]
    monkeypatch.setattr(
        compilation.time, "sleep", lambda _: working.clear() if len(looks) == 6 else None
    )
    assert compilation.begin(CpuBackend, "int8", waits=True)
    assert looks[5] == 2 and len(helpers.roles) == 3, "it waits until the other one is done"


def test_an_engine_that_goes_on_starts_no_second_helper(helpers, monkeypatch):
    """Beside that of another process, whichever kind it compiles; later it may."""
    other = {"pid": 77, "kind": "float32", "role": compilation.BACKGROUND, "since": 0.0}
    working = [other]
    monkeypatch.setattr(compilation, "running_helpers", lambda: working)
    for kind in "float32", "bfloat16":
        assert not compilation.begin(CpuBackend, kind, waits=False)
        assert not compilation.poll(CpuBackend, kind)
    assert "being compiled by process 77" in helpers.lines[0]
    assert "after those of process 77" in helpers.lines[1]
    assert (
        "in advance, run `microvllm warmup --dtype bfloat16`" in helpers.lines[1]
        and not helpers.roles
    )
    working.clear()
    compilation._due.clear()
    assert not compilation.poll(CpuBackend, "bfloat16") and helpers.roles == [
        compilation.BACKGROUND
    ]
    (helpers.folder / "float32").write_text(compilation.contents({}))
    assert compilation.poll(CpuBackend, "float32")


@pytest.mark.parametrize("waits", [True, False])
def test_a_helper_that_can_write_nothing(waits, helpers):
    helpers.does = f"import sys; sys.exit({compilation.NOT_STORED})"
    begun = compilation.begin(CpuBackend, "float32", waits)
    (helper,) = helpers.started["float32"]
    helper.wait()
    assert begun == waits == compilation.poll(CpuBackend, "float32")
    assert len(helpers.roles) == 1, "another one could not either"
    assert f"{helpers.folder} cannot be written" in helpers.lines[1]
    assert "set NUMBA_CACHE_DIR to a folder of your own" in helpers.lines[1]


def test_an_end_of_the_waiting_leaves_a_helper_without_an_engine(helpers, monkeypatch):
    def interrupt(_):
        raise TimeoutError

    monkeypatch.setattr(compilation.time, "sleep", interrupt)
    with pytest.raises(TimeoutError):
        compilation.begin(CpuBackend, "float32", waits=True)
    (helper,) = helpers.started["float32"]
    assert helper.stdin.closed, "so it hears of it"
    assert not compilation._ready and not helpers.tiny


def test_a_library_hears_one_line_on_stderr(helpers, monkeypatch, capsys):
    helpers.does = WRITES
    monkeypatch.setattr(compilation, "tell", compilation.to_stderr)
    for kind in "int4-int8_cache-layers", "int4-int8_cache-layers":
        assert compilation.begin(CpuBackend, kind, waits=True)
    out, err = capsys.readouterr()
    assert err.startswith("microvllm: ") and err.count("\n") == 1 and not out
    assert "`microvllm warmup --quantization int4 --kv-cache-dtype int8`" in err
    monkeypatch.setattr(sys, "stderr", None)
    compilation.to_stderr("a line without a reader")


# real helpers -------------------------------------------------------------------------------------


@posix
@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--quantization", "int8"]])
def test_ctrl_c_ends_a_run_that_compiles(words, tmp_path):
    """On an empty cache: the first token comes before the kernels do, or a line says why not. The
    helper goes on, unless it is attached to the run, and holds none of its pipes."""
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{SRC}:{tmp_path}"}
    if not words:
        del env["MICROVLLM_HELPER"]
    command = [sys.executable, "-m", "microvllm", "run", "--raw", "--ignore-eos", *words, "It was"]
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        if words:
            told = child.stderr.readline()
        else:
            assert child.stdout.read(1)
        assert not [*tmp_path.rglob("kernels-*.txt")], "these are there when all are compiled"
        time.sleep(0.5)
        pressed = time.perf_counter()
        child.send_signal(signal.SIGINT)
        _, rest = child.communicate(timeout=60)
        seconds = time.perf_counter() - pressed
    told = told if words else rest
    assert child.returncode == 130 and told.count(b"\n") == 1 and b"This happens once" in told
    assert not (words and rest) and seconds < 10  # it is far less, where the cores are free
    for _ in range(100):  # it hears of it between two parts of a kernel
        helpers = helpers_in(tmp_path)
        if not helpers or not words:
            break
        time.sleep(0.1)
    for helper in helpers:
        os.kill(helper, signal.SIGKILL)
    assert len(helpers) == (0 if words else 1)


def helpers_in(folder) -> list[int]:
    """Processes whose arguments name the folder: a helper's have the paths where packages are."""
    command = ["ps", "-ww", "-e", "-o", "pid=", "-o", "args="]
    shown = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout
    return [int(line.split()[0]) for line in shown.splitlines() if f"{folder}" in line]


@posix
@pytest.mark.slow
def test_the_second_run_finds_the_kernels(tmp_path):
    """Though the first one ends long before they are compiled."""
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{SRC}:{tmp_path}"}
    del env["MICROVLLM_HELPER"]
    command = [sys.executable, ROOT / "run.py", "--max-tokens", "4", "--prompt", "It was"]
    told = []
    for _ in range(3):
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told.append(done.stderr)
        helpers = helpers_in(tmp_path)
        if len(told) == 2:
            while helpers_in(tmp_path):  # each ends after a quarter of an hour at most
                time.sleep(0.2)
    assert "are being compiled. This happens once" in told[0]
    assert f"are being compiled by process {helpers[0] if helpers else ''}" in told[1]
    assert told[2] == "" and len([*tmp_path.rglob("kernels-float32*.txt")]) == 1


ENGINES = """
import os, sys
from microvllm import LLM, SamplingParams
from microvllm.cpu import attention, backend, compilation, gemm, elementwise
from microvllm.engine import load_model
from microvllm.loops import multi_step
live = load_model(sys.argv[1])
kernels = [
    x for module in (attention, backend, gemm, elementwise) for x in vars(module).values()
    if hasattr(x, "nopython_signatures")
]
def known():
    return {(x.py_func.__qualname__, str(s)) for x in kernels for s in x.nopython_signatures}
calls, compute, multi_step.SECONDS = [], multi_step.compute_steps, 1.0  # as if steps took no time
multi_step.compute_steps = lambda *args, **kw: calls.append(args) or compute(*args, **kw)
compile = backend.CpuBackend.compile
for kind, options in (
    ("float32-layers", {}), ("float32", {}), ("bfloat16-layers", {"dtype": "bfloat16"}),
    ("bfloat16", {"dtype": "bfloat16"}), ("float32-shared-layers", {"model": live}),
):
    # a model whose weight tiles are not whole has no function of all layers
    backend.CpuBackend.compile = compile if "-" in kind else lambda *_: None
    compilation._ready.add(kind)
    options |= {} if "model" in options else {"model_path": sys.argv[1]}
    options |= {"tokenizer_path": sys.argv[2]}
    with LLM(device="cpu", num_blocks=60, **options) as llm:
        kind = kind if llm.model.compiled else kind.partition("-")[0]
        compilation.run_tiny(backend.CpuBackend, kind)
        before = known()
        calls.clear()
        params = SamplingParams(max_tokens=4, n=2, top_k=5, seed=1, ignore_eos=True)
        llm.generate([[1, 2, 3, 4, 5], [3]], params, use_tqdm=False)
        params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
        llm.generate([[7] * 30], params, use_tqdm=False)
        assert known() == before, (kind, known() - before)
        assert bool(calls) == ("-" in kind), "several steps in one call"
"""


@pytest.mark.slow
def test_a_tiny_model_compiles_what_an_engine_calls():
    """Types, and so what is compiled, are the same: nothing is left for an engine's first steps."""
    command = [sys.executable, "-c", ENGINES, MODEL, MODEL.parent / "tokenizer"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
