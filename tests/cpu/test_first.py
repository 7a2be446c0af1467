"""The first run: engines in plain torch until a helper process has compiled their kernels."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import MODEL, ROOT, SRC

from microvllm import LLM, SamplingParams
from microvllm.cpu import first
from microvllm.cpu.backend import PLAIN, CpuBackend

PROMPTS = ["Who wrote Moby Dick?", "It was a dark and stormy night, and", "The island"]
ENDS = "import sys; sys.exit(3)"
WAITS = "import sys; sys.stdin.read()"
WRITES = "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"


class Helpers:
    """Stand-ins for helper processes, in a folder where no kernels are."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.does, self.lines, self.tiny = folder, WAITS, [], []
        monkeypatch.setattr(first, "place", lambda kind: self.folder and self.folder / kind)
        monkeypatch.setattr(first, "start", self.start)
        monkeypatch.setattr(first, "run_tiny", lambda _, kind: self.tiny.append(kind))
        monkeypatch.setattr(first, "tell", self.lines.append)
        monkeypatch.setattr(first, "patient", False)
        self.started = {}
        names = {"_ready": set(), "_told": set(), "_due": {}, "_helpers": self.started}
        for name, empty in names.items():
            monkeypatch.setattr(first, name, empty)

    def start(self, kind):
        command = [sys.executable, "-S", "-c", self.does, self.folder / kind, first.contents()]
        helper = subprocess.Popen(command, stdin=subprocess.PIPE)
        self.started.setdefault(kind, []).append(helper)

    def finish(self, kind):
        """The helper has compiled all, and ends."""
        (self.folder / kind).write_text(first.contents())
        self.end(kind)

    def end(self, kind):
        helper = self.started[kind][-1]
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
    assert len(helpers.lines) == 1 and "answers come more slowly" in helpers.lines[0]
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
        assert llm.model.backend.awaited == "float32" and answers(llm) == want
        with torch.no_grad():
            gpt.lm_head.weight.mul_(-1)
        assert answers(llm) != want
        with torch.no_grad():
            gpt.lm_head.weight.mul_(-1)
        assert answers(llm) == want
        llm.sleep()
        helpers.finish("float32")
        assert answers(llm) == want and llm.model.backend.awaited is None


@pytest.mark.parametrize(
    "options", [{"deterministic": True}, {"quantization": "int8"}, {"patient": True}]
)
def test_what_has_no_plain_form_waits(options, helpers, monkeypatch):
    """And a library's engines do, whose tokens then depend on no clock."""
    helpers.does = WRITES
    if options.pop("patient", None):
        monkeypatch.setattr(first, "patient", True)
    with LLM(MODEL, device="cpu", num_blocks=20, **options) as llm:
        (started,) = helpers.started.values()
        assert started[0].returncode == 0 and llm.model.backend.awaited is None
        assert not helpers.tiny, "they are loaded where they are called"
    assert len(helpers.lines) == 1 and "more slowly" not in helpers.lines[0]


def test_ranks_wait(helpers):
    """One could draw from the kernels' logits, and another from torch's."""
    helpers.does = WRITES
    backend = CpuBackend(torch.device("cpu"), torch.float32)
    model = {"store": None, "compiled": None, "ranks": object(), "kv_layout": (None, None)}
    backend.prepare(SimpleNamespace(**model))
    assert backend.awaited is None and helpers.started["float32"][0].returncode == 0


def test_where_nothing_can_be_kept_the_engine_compiles_by_itself(helpers, monkeypatch):
    """No helper could hand anything over; and where none can start it is no other."""
    folder, helpers.folder = helpers.folder, None
    with LLM(MODEL, device="cpu", num_blocks=20) as llm:
        assert llm.model.backend.awaited is None and not helpers.started.get("float32-layers")
        assert len(helpers.tiny) == len(helpers.lines) == 1
    helpers.folder = folder

    def refuse(kind):
        raise OSError("no processes")

    monkeypatch.setattr(first, "start", refuse)
    first._ready.clear()
    with LLM(MODEL, device="cpu", num_blocks=20) as llm:
        assert llm.model.backend.awaited is None and len(helpers.tiny) == 2


def test_an_engine_whose_helpers_die_goes_on(helpers, caplog):
    """A second one is tried, since the first one's kernels are on disk; then it stays as it is. One
    that waits compiles by itself."""
    with LLM(MODEL, device="cpu", num_blocks=60) as llm:
        kind = llm.model.backend.awaited
        whole = answers(llm)
        helpers.started[kind][0].send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        helpers.started[kind][0].wait()
        assert answers(llm) == whole and len(helpers.started[kind]) == first.TRIES == 2
        helpers.end(kind)
        assert answers(llm) == whole and answers(llm) == whole
        assert len(helpers.started[kind]) == 2 and llm.model.backend.awaited
        assert len(helpers.lines) == 1 and caplog.text.count("goes on without them") == 1
        # another process may have compiled them
        (helpers.folder / kind).write_text(first.contents())
        assert answers(llm) == whole and llm.model.backend.awaited is None
    first._ready.clear()
    (helpers.folder / kind).unlink()
    helpers.tiny.clear()
    helpers.does = ENDS
    with LLM(MODEL, device="cpu", num_blocks=20, deterministic=True) as llm:
        assert helpers.tiny == [kind] and helpers.started[kind][-1].returncode == 3
    assert (helpers.folder / kind).read_text() == first.contents()


def test_the_file_is_of_these_sources_and_this_processor(helpers, monkeypatch):
    assert not first.compiled("float32")
    (helpers.folder / "float32").write_text(first.contents())
    assert first.compiled("float32") and not first.compiled("bfloat16")
    monkeypatch.setattr(first, "CPU", [*first.CPU, "+another"])
    assert not first.compiled("float32")
    (helpers.folder / "float32").write_bytes(b"\xff\xfe")
    assert not first.compiled("float32")


def test_one_process_at_a_time_compiles(helpers):
    pytest.importorskip("fcntl")
    order = []

    def other():
        with first.alone():
            order.append("other")

    thread = threading.Thread(target=other)
    with first.alone():
        thread.start()
        time.sleep(0.05)
        order.append("this")
    thread.join()
    assert order == ["this", "other"]


def test_nobody_waits_for_several_steps(helpers, monkeypatch):
    """A helper compiles them, later; they are looked for now and then, and never compiled here."""
    times, looks = iter((100.0, 100.5, 104.9, 105.1, 105.2, 106.0, 106.2)), []
    monkeypatch.setattr(first, "time", SimpleNamespace(monotonic=lambda: next(times)))
    monkeypatch.setattr(first, "LATER", 5)
    compiled = first.compiled
    monkeypatch.setattr(first, "compiled", lambda kind: looks.append(kind) or compiled(kind))
    backend = CpuBackend(torch.device("cpu"), torch.float32)
    for backend.kind in "float32", "float32-int8_cache-layers", "int4", None:
        assert not backend.has_several(4) and not looks, "there are none"
    backend.kind = "int4-layers"
    assert not backend.has_several(7) and not looks, "there are none for more than a few rows"
    backend.kind, kind = "float32-layers", "float32-layers-several"
    assert not backend.has_several(4) and len(looks) == 1
    for _ in range(6):
        assert not backend.has_several(4)
    assert [*helpers.started] == [kind] and len(helpers.started[kind]) == 1
    assert len(looks) == 3, "a second apart"
    helpers.end(kind)  # it dies, and a second one
    times = iter((110.0, 111.0, 112.0, 113.0, 113.5, 114.1))
    for _ in range(4):
        assert not backend.has_several(4)
        helpers.end(kind)
    assert len(helpers.started[kind]) == first.TRIES
    helpers.finish(kind)
    assert not backend.has_several(4) and not helpers.tiny
    assert backend.has_several(4) and helpers.tiny == [kind]
    assert backend.has_several(4) and len(helpers.tiny) == 1 and not helpers.lines


def test_where_no_helper_can_be_there_are_single_steps(helpers, monkeypatch):
    monkeypatch.setattr(first, "LATER", 0)
    monkeypatch.setattr(first, "time", SimpleNamespace(monotonic=iter(range(99)).__next__))
    folder, helpers.folder = helpers.folder, None
    kind = "float32-layers-several"
    for _ in range(4):
        assert not first.offers(CpuBackend, kind)
    helpers.folder, started = folder, []

    def refuse(kind):
        started.append(kind)
        raise OSError("no processes")

    monkeypatch.setattr(first, "start", refuse)
    for _ in range(4):
        assert not first.offers(CpuBackend, kind)
    assert started and not helpers.started.get(kind) and not helpers.tiny


def test_a_program_that_is_no_python_starts_no_helper(monkeypatch):
    """It would start itself again."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(OSError, match="no Python"):
        first.start("float32")


def test_panels_multiply_without_kernels_too():
    """In plain torch, on the same memory: odd sizes, no rows, and relu2."""
    from microvllm.cpu import products

    if not products.PANEL:
        pytest.skip("this processor has no panels")
    backend = CpuBackend(torch.device("cpu"), torch.float32)
    for rows, width, relu2 in ((products.PANEL, 8, False), (70, 20, True), (3, 5, False)):
        weight = torch.randn(rows, width)
        linear = products.Panels([weight], backend, torch.float32, rows=rows, relu2=relu2)
        for T in (0, 1, 7, 40):
            x = torch.randn(T, width)
            backend.awaited = None
            want = linear(x) if T else torch.empty(0, rows)
            backend.awaited = "float32"
            torch.testing.assert_close(linear(x), want, rtol=1e-5, atol=1e-5)


# real helpers -------------------------------------------------------------------------------------

posix = pytest.mark.skipif(os.name != "posix", reason="no such signals")


@posix
@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--quantization", "int8"]])
def test_ctrl_c_ends_a_run_that_compiles(words, tmp_path):
    """On an empty cache: the first token comes before the kernels do, or a line says why not; and
    the helper ends with the run."""
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{SRC}:{tmp_path}"}
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
    assert child.returncode == 130 and told.count(b"\n") == 1 and b"compiled, once" in told
    assert not (words and rest) and seconds < 10  # it is far less, where the cores are free
    for _ in range(100):  # it hears of it between two parts of a kernel
        shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        helpers = [line for line in shown.splitlines() if f"{tmp_path}" in line]
        if not helpers:
            break
        time.sleep(0.1)
    assert not helpers, "its arguments have the paths where packages are"


SLOW = """
import pathlib, sys, time
sys.path[:] = {path!r}
from microvllm.cpu import backend, first
first.place = lambda kind: pathlib.Path({folder!r}) / f"{{kind}}.txt"

def run_tiny(*_):
    with open({folder!r} + "/log", "a") as file:
        file.write("x")
    time.sleep(0.5)

first.run_tiny = run_tiny
first.serve(backend.CpuBackend, "float32")
"""


@posix
@pytest.mark.slow
def test_two_helpers_compile_once(tmp_path):
    script = SLOW.format(path=[str(SRC), *sys.path], folder=str(tmp_path))
    both = [
        subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) for _ in range(2)
    ]
    assert [helper.wait(60) for helper in both] == [0, 0]
    assert (tmp_path / "log").read_text() == "x" and (tmp_path / "float32.txt").exists()


ENGINES = """
import os, sys
from microvllm import LLM, SamplingParams
from microvllm.cpu import attention, backend, crew, first, products, several, steps
kernels = [
    x for room in (attention, backend, crew, products, steps) for x in vars(room).values()
    if hasattr(x, "nopython_signatures")
]
def known():
    return {(x.py_func.__qualname__, str(s)) for x in kernels for s in x.nopython_signatures}
calls, compute, several.SECONDS = [], crew.compute, 1.0  # steps seem to take no time
crew.compute = lambda *args: calls.append(args) or compute(*args)
compile = backend.CpuBackend.compile
for kind, options in (
    ("float32-layers", {}), ("float32", {}), ("bfloat16-layers", {"dtype": "bfloat16"}),
    ("bfloat16", {"dtype": "bfloat16"}),
):
    # a model of which panels are not whole has no function of all layers
    backend.CpuBackend.compile = compile if "-" in kind else lambda *_: None
    first._ready.add(kind)
    with LLM(sys.argv[1], device="cpu", num_blocks=60, **options) as llm:
        kind = kind if llm.model.compiled else kind.partition("-")[0]
        first.run_tiny(backend.CpuBackend, kind)
        at_once = kind in [*backend.SEVERAL][: 3 if "FUZZ" in os.environ else 1]  # for want of time
        if at_once:
            with first.alone(first.SEVERAL):
                first.compile_here(backend.CpuBackend, kind + first.SEVERAL)
            first._ready.add(kind + first.SEVERAL)
        before = known()
        calls.clear()
        params = SamplingParams(max_tokens=4, n=2, top_k=5, seed=1, ignore_eos=True)
        llm.generate([[1, 2, 3, 4, 5], [3]], params, use_tqdm=False)
        params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
        llm.generate([[7] * 30], params, use_tqdm=False)
        assert known() == before, (kind, known() - before)
        assert at_once == bool(calls), "several steps in one call"
"""


@pytest.mark.slow
def test_a_tiny_model_compiles_what_an_engine_calls():
    """Types, and so what is compiled, are the same: nothing is left for an engine's first steps."""
    command = [sys.executable, "-c", ENGINES, MODEL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
