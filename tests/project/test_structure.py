"""The structure is that of docs/DESIGN.md: the core runs alone, each feature can be removed,
imports point one way, and an engine is made of plain objects."""

import ast
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers.batches import hand_made_batch
from helpers.goldens import ERAS, MODEL, PACKAGE, ROOT, SRC, Fixture, era_fixtures
from helpers.removal import remove

from microvllm import LLM, SamplingParams, attention, engine, model
from microvllm.sampler import cap_logits, drop_tokens, uniform_numbers

CORE = (
    "__init__ blocks scheduler attention runner engine model sampler tokenizer tokenizer_file "
    "checkpoint environment"
).split()
# the files beside the core that put the full engine together
TOP = "full parts params loading resources devices __main__".split()
SUBPACKAGES = (
    "features loops fused cpu gpu sources lowbit trace jobs evals nanochat rl cli"
).split()
FEATURES = sorted(
    f"features/{path.name}"
    for path in (PACKAGE / "features").glob("*.py")
    if path.name != "__init__.py"
)
HIDDEN = ["numba", "llvmlite", "triton", "tqdm"]  # packages that the core does not need


def run_alone(**job) -> dict:
    """What alone.py returns for a copy of the package."""
    script = Path(__file__).parent / "alone.py"
    done = subprocess.run(
        [sys.executable, "-I", script], input=json.dumps(job, default=str), text=True,
        capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def fork_alone():
    """run_alone, by forks of one process where they are safe: torch is imported once."""
    if sys.platform != "linux":
        yield run_alone
        return
    command = [sys.executable, "-I", Path(__file__).parent / "alone.py", "forks"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as server:

        def run(**job) -> dict:
            server.stdin.write(json.dumps(job, default=str) + "\n")
            server.stdin.flush()
            found = "[]"
            while not found.startswith(('{"', '"')):  # what is printed before the answer
                found = server.stdout.readline()
                assert found, "the process has ended"
            assert found[0] == "{", json.loads(found)
            return json.loads(found)

        yield run


def environment(*names: str) -> list[str]:
    """The top-level modules of these installed distributions and of all that they require."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: set[str] = set()
    todo = [*names]
    while todo:
        name = canonicalize_name(todo.pop())
        if name not in found:
            try:
                requires = metadata.requires(name) or ()
            except metadata.PackageNotFoundError:  # one that this platform does not need
                continue
            found.add(name)
            needs = [Requirement(text) for text in requires]
            todo += [n.name for n in needs if not n.marker or n.marker.evaluate({"extra": ""})]
    owners = metadata.packages_distributions().items()
    return [top for top, given in owners if found & {canonicalize_name(name) for name in given}]


# the core runs alone ------------------------------------------------------------------------------

# requests with seeds, on which the full engine's kernels and the core must agree
SEEDED = [
    {"temperature": 0.0, "max_tokens": 24},
    {"temperature": 1.0, "max_tokens": 24, "seed": 1, "n": 2},
    {"temperature": 0.7, "max_tokens": 24, "seed": 2, "top_k": 20},
    {"temperature": 0.9, "max_tokens": 24, "seed": 3, "top_p": 0.9},
    {"temperature": 1.2, "max_tokens": 24, "seed": 4, "min_p": 0.05, "ignore_eos": True},
]
PROMPTS = ["It was a dark and stormy night, and", "The island was small", "Once upon a time"]


class Row(NamedTuple):
    """Where the draw of a token fell."""

    token: int
    margin: float  # how far the uniform number is from the next token's share


def draw(llm: LLM, text: list[int], params: SamplingParams, sample_id: int) -> Row:
    """The token that follows a text, drawn once more by the plain model, all of it in one go."""
    table = range(1, 2 + len(text) // 16)
    batch = hand_made_batch([(text, 0, len(text), table)], 16)
    batch = batch._replace(hidden_rows=batch.hidden_rows[-1:])
    cache = engine.PagedKVCache(llm.model.config, 1 + len(table), 16, torch.float32, "cpu")
    with torch.inference_mode():
        logits = llm.model.logits(llm.model.forward(batch, cache))
    if not params.temperature:
        top = logits[0].topk(2)
        return Row(int(top.indices[0]), float(top.values[0] - top.values[1]))
    capped = cap_logits(logits, llm.model.recipe.softcap) / params.temperature
    cdf = drop_tokens(capped, [params]).double().softmax(-1).cumsum(-1)[0].numpy()
    (uniform,) = uniform_numbers([params.seed], [sample_id], [len(text)])
    return Row(int(np.searchsorted(cdf, uniform, side="right")), np.abs(cdf - uniform).min())


def assert_same(ours: list, theirs: list, requests: list) -> list[str]:
    """Each sample has the same tokens, or they part at a draw on which a rounding decides; returns
    these, described."""
    ties = []
    with LLM(MODEL, device="cpu", num_blocks=10, plain=True) as llm:
        for (prompt, params), mine, other in zip(requests, ours, theirs, strict=True):
            ids = llm.tokenizer.prompt_ids(prompt)
            for k, (a, b) in enumerate(zip(mine, other, strict=True)):
                if a != b:
                    pairs = enumerate(zip(a, b, strict=False))
                    first = next((i for i, pair in pairs if len({*pair}) > 1), None)
                    assert first is not None, (prompt, params, a, b)
                    row = draw(llm, ids + a[:first], params, k)
                    ties.append(f"{prompt!r}, {params}, sample {k}, token {first}: {row}")
                    assert row.margin < 1e-5, ties[-1]
    return ties


def era_jobs() -> list[dict]:
    """The fixtures, as alone.py wants them."""
    jobs = []
    for name, found in era_fixtures().items():
        fixture = Fixture(*found)
        prompts = fixture.json["prompts"]
        jobs.append(
            {
                "name": name,
                "directory": fixture.directory,
                "overrides": fixture.overrides,
                "prompts": [p["ids"] for p in prompts],
                "tokens": [p["greedy_tokens"] for p in prompts],
            }  # fmt: skip
        )
    return jobs


@pytest.mark.slow
def test_the_core_runs_alone(tmp_path):
    """The core's files in an empty folder, and the packages that they import: nanochat's tokens for
    every era, the full engine's seeded tokens, and everything that alone.tour checks."""
    folder = tmp_path / "microvllm"
    folder.mkdir()
    for name in CORE:
        shutil.copy(PACKAGE / f"{name}.py", folder)
    packages = environment("torch", "numpy", "tiktoken", "xxhash", "psutil")
    allowed = {*packages} - {*HIDDEN, "microvllm"}
    found = run_alone(
        folder=tmp_path, allowed=sorted(allowed), hidden=HIDDEN, model=MODEL, eras=era_jobs(),
        seeded={"prompts": PROMPTS, "params": SEEDED},
    )  # fmt: skip
    assert found["class"] == "microvllm.engine"
    assert set(found["loaded"]) == {"microvllm", *(f"microvllm.{name}" for name in CORE[1:])}
    assert found["wrong"] == []

    requests = [(prompt, SamplingParams(**given)) for prompt in PROMPTS for given in SEEDED]
    with LLM(MODEL, device="cpu", num_blocks=600) as llm:
        assert llm.model.backend.name in ("numba", "sdpa")
        outputs = llm.generate(*map(list, zip(*requests, strict=True)), use_tqdm=False)
    full = [[sample["token_ids"] for sample in output["samples"]] for output in outputs]
    ties = assert_same(found["seeded"], full, requests)
    print(f"{len(ties)} ties within rounding", *ties, sep="\n")
    assert len(ties) <= 1


# each feature can be removed ----------------------------------------------------------------------

QUICK = ("features/stats.py",)
# small, with all that a model can have, and windows
ERA = ERAS / "era5" / "chatsft_checkpoints" / "d4"


@pytest.fixture(scope="module")
def expected(fork_alone) -> dict:
    """What alone.tour gives with everything in place but numba."""
    return fork_alone(folder=SRC, hidden=HIDDEN[:2], model=ERA)["tour"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FEATURES]
)
def test_each_feature_can_be_removed(name, tmp_path, fork_alone, expected):
    """With its file, its imports and what is marked, the feature is gone, and the rest gives the
    same tokens."""
    folder = tmp_path / "microvllm"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    gone = remove(folder, name)
    found = fork_alone(folder=tmp_path, hidden=HIDDEN[:2], model=ERA)
    assert found["class"] == "microvllm.full"
    assert found["tour"] == expected
    modules = {path.removesuffix(".py").replace("/", ".") for path in gone}
    assert not {f"microvllm.{module}" for module in modules} & {*found["loaded"]}


@pytest.mark.slow
def test_all_features_can_be_removed_at_once(tmp_path, fork_alone, expected):
    """Then the full engine is the core with the fused model, and the tests of the core pass."""
    shutil.copytree(SRC, tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    remove(tmp_path / "src" / "microvllm", *FEATURES)
    found = fork_alone(folder=tmp_path / "src", hidden=HIDDEN[:2], model=ERA)
    assert found["class"] == "microvllm.full" and found["tour"] == expected
    for name in ("tests", "models", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    words = ["-q", "-n", "0", "-p", "no:cacheprovider", "-x", "tests/core"]
    command = [sys.executable, "-c", RUN_TESTS, str(tmp_path / "src"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


# tests that import the package from a folder, whichever is installed
RUN_TESTS = """
import sys
sys.path.insert(0, sys.argv[1])
import microvllm
assert microvllm.__file__.startswith(sys.argv[1]), microvllm.__file__
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


# imports point one way ----------------------------------------------------------------------------

# arrows that are no arrow to the core, each with its reason
ALLOWED = {
    ("core", "full"): "__init__ gives the full engine where it is there",
    ("__main__", "cli"): "python -m microvllm",
    # the full engine is put together
    ("full", "parts"): "which loop, runner, guard and memory",
    ("full", "loading"): "which model, with which kernels",
    ("full", "params"): "the parameters of a request",
    ("full", "resources"): "threads, devices, memory",
    ("full", "devices"): "the device, if this torch computes on it",
    ("full", "features"): "the list of extensions, and what LLM's methods call",
    ("full", "fused"): "the draw of a fused model is its backend's",
    ("full", "sources"): "places of checkpoints and tokenizers",
    ("full", "trace"): "LLM(trace=...), llm.tracing()",
    ("parts", "features"): "guards, proposers, memory in groups",
    ("parts", "fused"): "a compiled model runs several steps at once",
    ("parts", "gpu"): "recorded steps, and the memory that is left for the cache",
    ("parts", "loops"): "the loops are chosen there",
    ("parts", "params"): "the largest step is measured with parameters of all kinds",
    ("parts", "resources"): "errors where there is no memory for the cache",
    ("loading", "fused"): "the model",
    ("loading", "cpu"): "kernels",
    ("loading", "gpu"): "kernels",
    ("loading", "resources"): "errors where there is no memory, or no package",
    ("loading", "sources"): "checkpoints of all kinds",
    ("params", "features"): "guides are compiled when parameters are made; names are checked",
    # features, loops and kernels
    ("features", "devices"): "what is wrong with a device that is not there; the device of a rank",
    ("features", "sources"): "a live module is checked as strictly as a file: sources/strict.py",
    ("features", "params"): "nanochat's arguments become the parameters of a request",
    ("loops", "cpu"): "several steps in one compiled call",
    ("loops", "fused"): "it is the compiled model that computes several steps at once",
    ("cpu", "fused"): "its kernels and layouts fill in the fused model's Backend and Linear",
    ("features", "resources"): "an engine that sleeps gives the system the memory",
    ("fused", "resources"): "the memory of a checkpoint's file",
    ("gpu", "fused"): "its kernels and layouts fill in the fused model's Backend and Linear",
    ("gpu", "loops"): "recorded steps are launched by the runner that is one step ahead",
    ("gpu", "features"): "a recorded step has the block tables of each group of layers",
    ("gpu", "resources"): "errors where there is no memory for the largest step",
    ("trace", "features"): "block tables of groups of layers, continuations that are scored",
    # the command line
    ("cli", "devices"): "info looks at a device without making an engine",
    ("cli", "features"): "info counts the blocks of layer groups; torchrun's processes speak once",
    ("cli", "loading"): "info and warmup look at a model without making an engine",
    ("cli", "resources"): "warmup names the package that it needs",
    ("cli", "cpu"): "warmup compiles kernels; others say that kernels are compiled",
    ("cli", "jobs"): "batch; score and bench read rows",
    ("cli", "sources"): "places of checkpoints; convert",
    ("cli", "evals"): "the command eval",
    ("cli", "lowbit"): "the command quantize",
    ("cli", "trace"): "--watch, and the command of that name",
    # nanochat's tasks
    ("nanochat", "jobs"): "rows of tasks are read like rows of prompts",
    # low-bit weights
    ("cpu", "lowbit"): "kernels multiply weights in the layout of lowbit/packing.py",
    ("sources", "lowbit"): "a folder of low-bit weights is a checkpoint",
    ("lowbit", "sources"): "a low-bit folder is read as strictly as a Hugging Face folder",
}


class Arrow(NamedTuple):
    """One file imports another."""

    source: str  # such as cli/bench.py
    target: str
    kind: str  # "top", "inside" a function, "typing" (never run)
    names: tuple[str, ...] = ()  # what of the target

    @property
    def places(self) -> tuple[str, str]:
        return place(self.source), place(self.target)


def place(file: str) -> str:
    """Where a file of the package lies: a subpackage, "core", or its own name."""
    top = file.partition("/")[0].removesuffix(".py")
    return "core" if top in CORE else top


def resolve(parts: list[str]) -> str | None:
    """The file of a module of the package; None if it is none."""
    path = PACKAGE.joinpath(*parts)
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if parts and file.is_file():
            return file.relative_to(PACKAGE).as_posix()
    return None if parts else "__init__.py"


def sources() -> list[tuple[str, ast.Module]]:
    """Each file of the package, and what is in it."""
    return [
        (path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8")))
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


@functools.cache
def arrows() -> list[Arrow]:
    """Every import of the package from the package."""
    found = []

    def walk(node: ast.AST, file: str, kind: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = kind
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inner = "typing"
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                inner = "inside" if kind == "top" else kind
            if isinstance(child, ast.ImportFrom):
                follow(child, file, kind)
            elif isinstance(child, ast.Import):
                for name in (alias.name for alias in child.names):
                    assert name.partition(".")[0] != "microvllm", f"{file}: import {name}"
            walk(child, file, inner)

    def follow(node: ast.ImportFrom, file: str, kind: str) -> None:
        if not node.level:
            top = (node.module or "").partition(".")[0]
            assert top != "microvllm", f"{file} imports {node.module}: say it relatively"
            return
        package = file.split("/")[:-1]
        base = package[: len(package) + 1 - node.level] + (node.module or "").split(".")
        base = [part for part in base if part]
        for alias in node.names:
            target = resolve([*base, alias.name]) or resolve(base)
            assert target, f"{file}: from {'.' * node.level}{node.module} import {alias.name}"
            found.append(Arrow(file, target, kind, (alias.name,)))

    for file, tree in sources():
        walk(tree, file, "top")
    return [*dict.fromkeys(found)]


def test_the_list_of_files_is_whole():
    """What lies in the package is of the core, beside it, or in a subpackage."""
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert files == {*CORE, *TOP}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name[0] != "_"}
    assert folders == {*SUBPACKAGES}


def test_imports_point_one_way():
    """Subpackages import the core, the core imports none; what else there is, is in ALLOWED."""
    beyond = []
    for arrow in arrows():
        source, target = arrow.places
        if source == target or arrow.kind == "typing" or (source, target) in ALLOWED:
            continue
        if target != "core":
            beyond.append(arrow)
        elif arrow.target == "__init__.py" and arrow.kind == "top":
            # the engine itself is imported where it is needed: it takes parts from subpackages
            if arrow.names != ("__version__",):
                beyond.append(arrow)
    assert not beyond, "\n".join(["", *map(str, beyond)])
    seen = {arrow.places for arrow in arrows() if arrow.kind != "typing"}
    assert not set(ALLOWED) - seen, "these arrows are gone"
    # the only arrow out of the core
    out = {a for a in arrows() if place(a.source) == "core" and place(a.target) != "core"}
    assert {(a.source, a.target) for a in out} == {("__init__.py", "full.py")}
    # other modules get the engine of full.py by the package's own name
    users = {a.source for a in arrows() if a.target == "full.py" and a.kind != "typing"}
    assert users == {"__init__.py"}
    # no arrow is hidden in a string. cpu/helper_process.py is a process, which imports its own
    # subpackage
    for path in PACKAGE.rglob("*.py"):
        if "import_module" in path.read_text(encoding="utf-8"):
            file = path.relative_to(PACKAGE).as_posix()
            assert file == "cpu/helper_process.py", file


def test_no_circle():
    """No file imports, by way of others, itself: not inside functions either."""
    graph: dict[str, set[str]] = {}
    for arrow in arrows():
        if arrow.kind != "typing":
            graph.setdefault(arrow.source, set()).add(arrow.target)
    done: set[str] = set()

    def visit(file: str, way: tuple[str, ...]) -> None:
        assert file not in way, " -> ".join((*way[way.index(file) :], file))
        if file not in done:
            for target in graph.get(file, ()):
                visit(target, (*way, file))
            done.add(file)

    for file in [*graph]:
        visit(file, ())
    typing = sorted(f"{a.source} -> {a.target}" for a in arrows() if a.kind == "typing")
    print("for type checkers only:", *dict.fromkeys(typing), sep="\n  ")


# an engine is made of plain objects ---------------------------------------------------------------

MEET = ("core", "full", "parts", "params", "loading", "features", "loops", "fused", "gpu")
# names of a machinery that puts classes together at run time
FORBIDDEN = {"PARTS", "PLACES", "NAMES", "FEATURES", "optional", "needed", "compose"}
# files that make a class of a class that is given, each with its reason
MADE_CLASSES = {"fused/int8_cache.py": "a backend of any kind, with K and V in 8 bits"}
# files in which getattr or hasattr asks what an object has, each with its reason
DUCKS = {
    "__init__.py": "the name that is imported",
    "sampler.py": "the fields of a dataclass",
    "features/calculator.py": "the few methods that nanochat's calculator knows",
    "features/matching.py": "what an operating system has; the kinds of guides",
    "runner.py": "Hooks: which methods an extension overrides",
    "loading.py": "ModelBuilder: the fields of a dataclass",
    "full.py": "the fields of a dataclass",
    "params.py": "the fields of a dataclass",
    "environment.py": "what an operating system has",
    "features/live.py": "a user's module",
    "features/foreign.py": "a user's tokenizer",
    "features/progress.py": "IPython among the builtins",
    "features/checks.py": "the fields of a dataclass; what an operating system has",
    "features/logits_processor.py": "a user's function",
}


def test_no_machinery_of_strings():
    """Parts are imported by name, where an editor finds them."""
    wrong = []
    for file, tree in sources():
        if place(file) not in MEET:
            continue
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Name):
                names = [node.id]
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names = [node.name]
            wrong += [f"{file}:{node.lineno}: {name}" for name in FORBIDDEN & {*names}]
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "type":
                if len(node.args) == 3 and file not in MADE_CLASSES:
                    wrong.append(f"{file}:{node.lineno}: a class made at run time")
            if isinstance(node, ast.FunctionDef) and node.name == "__getattr__":
                if file not in ("__init__.py", "engine.py", "jobs/__init__.py"):
                    wrong.append(f"{file}:{node.lineno}: __getattr__")
    assert not wrong, "\n".join(["", *wrong])


def test_no_feature_looks_for_another_one():
    """Where the engine's parts meet, no code tests which attributes an object has."""
    wrong, seen = [], set()
    for file, tree in sources():
        if place(file) not in MEET or place(file) == "gpu":  # gpu/ tests torch, triton
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
                seen.add(file)
                if file not in DUCKS:
                    wrong.append(f"{file}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong, "\n".join(["", *wrong])
    assert not set(DUCKS) - seen, "these ask for nothing any more"


def test_no_class_has_more_than_two_bases():
    for file, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                assert len(node.bases) <= 2, f"{file}: {node.name}"


def test_a_running_engine_is_made_of_plain_objects():
    """From each object's class to `object`, in one line: no mixins."""
    with LLM(MODEL, device="cpu", num_blocks=20) as llm:
        blocks = llm.scheduler.blocks
        parts = [llm, llm.scheduler, llm.runner, llm.loop, llm.guard, blocks, blocks.pool]
        for part in [*parts, *llm.extensions]:
            line = type(part).__mro__
            for cls, base in zip(line, line[1:], strict=False):
                assert cls.__bases__ == (base,), (type(part), cls.__bases__)
            assert len(line) <= 4, line


def test_no_dispatch_by_accident():
    """No class is picked by the name of its module, nothing is looked up in sys.modules, no
    docstring is a message, and no NamedTuple is cut by positions."""
    wrong = []
    for file, tree in sources():
        for node in ast.walk(tree):
            text = ""
            if isinstance(node, ast.Attribute) and node.attr in ("__module__", "__doc__"):
                text = f".{node.attr}"
            elif isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.modules":
                text = "sys.modules"
            elif isinstance(node, ast.ClassDef) and "NamedTuple" in map(ast.unparse, node.bases):
                slices = [n for n in ast.walk(node) if isinstance(n, ast.Subscript)]
                slices = [n for n in slices if isinstance(n.slice, ast.Slice)]
                text = ", ".join(s for s in map(ast.unparse, slices) if s.startswith("self["))
            if text:
                wrong.append(f"{file}:{node.lineno}: {text}")
    assert not wrong, "\n".join(["", *wrong])


# names, and the plain engine ----------------------------------------------------------------------


def test_the_names_of_the_description_import():
    """What the project's description asks for is in microvllm.engine, and in use."""
    from microvllm.engine import (
        LLM,
        BlockManager,
        PagedKVCache,
        Scheduler,
        SequenceKVView,
        _find_last_step,
        load_model,
    )

    assert _find_last_step(MODEL) == 11414
    assert isinstance(load_model(MODEL), model.GPT)
    with LLM(MODEL, device="cpu", num_blocks=20) as llm:
        assert type(llm.cache) is PagedKVCache
        assert type(llm.scheduler) is Scheduler and type(llm.scheduler.blocks) is BlockManager
    assert SequenceKVView is attention.SequenceKVView


def test_the_plain_engine_runs_the_core(monkeypatch):
    """A breakpoint in model.GPT.forward, or where SequenceKVView gathers, is reached by the plain
    engine, which gives the fast one's tokens."""
    calls = {"forward": 0, "gather": 0}

    def counted(cls, name: str):
        inner = getattr(cls, name)

        def method(self, *args):
            calls[name] += 1
            return inner(self, *args)

        monkeypatch.setattr(cls, name, method)

    counted(model.GPT, "forward")
    counted(attention.SequenceKVView, "gather")
    params = SamplingParams(temperature=0, max_tokens=12)
    found = {}
    for plain in (False, True):
        with LLM(MODEL, device="cpu", num_blocks=100, plain=plain) as llm:
            found[plain] = [o["token_ids"] for o in llm.generate(PROMPTS, params, use_tqdm=False)]
        if not plain:
            assert calls == {"forward": 0, "gather": 0}
    assert found[True] == found[False]
    layers = json.loads((MODEL / "meta_011414.json").read_text())["model_config"]["n_layer"]
    assert calls == {"forward": 12, "gather": 12 * layers * len(PROMPTS)}


# a wheel ------------------------------------------------------------------------------------------


def pip(*words) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *words],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_wheel_has_all_subpackages(tmp_path):
    """What pip builds of the checkout has every file of the package, and every module of it can be
    imported elsewhere."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    share = [name for name in ("lab", "course", "models") if (ROOT / name).is_dir()]
    for name in ("src", *share):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    # with what is installed, where that is new enough; else pip fetches what builds it
    here = metadata.packages_distributions().get("setuptools")
    new = here and int(metadata.version("setuptools").split(".")[0]) >= 77
    pip("wheel", source, "--no-deps", "-w", tmp_path, *["--no-build-isolation"] * bool(new))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("microvllm/")}
    files = {path for path in PACKAGE.rglob("*") if path.is_file()}
    files = {path for path in files if "__pycache__" not in path.parts}
    beside = {p for name in share for p in (ROOT / name).rglob("*") if p.is_file()}
    beside = {f"share/{p.relative_to(ROOT).as_posix()}" for p in beside if p.suffix != ".pyc"}
    inside = {path.relative_to(PACKAGE).as_posix() for path in files}
    assert packed == {f"microvllm/{name}" for name in inside | beside}

    target = tmp_path / "site"
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    modules = [path.relative_to(SRC).with_suffix("") for path in files if path.suffix == ".py"]
    names = sorted(".".join(path.parts).removesuffix(".__init__") for path in modules)
    names.remove("microvllm.__main__")
    found = run_alone(
        folder=target, hidden=[], modules=names,
        optional=["triton", "ray", "pyarrow", "rich", "lm_eval"],
        commands=[["--version"]],
    )  # fmt: skip
    subpackages = {f"microvllm.{name}" for name in SUBPACKAGES} | {"microvllm.full"}
    if not importlib.util.find_spec("lm_eval"):
        subpackages.remove("microvllm.evals")  # which is imported with the package that it serves
    assert subpackages <= set(found["loaded"])
    assert found["commands"][0]["out"].startswith("microvllm ")

    # the bundled model, the lab and the course came along. without numba nothing is compiled
    def command(*words: str, typed: str = "") -> str:
        code = "import sys; sys.modules['numba'] = None; from microvllm.cli import bench, main; "
        code += "assert sys.argv[1] in bench.__file__, bench.__file__; main(sys.argv[2:])"
        done = subprocess.run(
            [sys.executable, "-c", code, str(target), *words], cwd=tmp_path, input=typed,
            env=os.environ | {"PYTHONPATH": str(target), "XDG_STATE_HOME": str(tmp_path)},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    greedy = "--temperature", "0", "--max-tokens", "16"
    assert "Bram Stoker" in command("chat", *greedy, typed="Who wrote Dracula?\n")
    assert "a preemption" in command("lab", "demo", "--no-open")
    assert (tmp_path / "lab-results" / "demo.html").is_file()
    if (PACKAGE / "cli" / "learn.py").is_file():
        assert command("learn", "1")
