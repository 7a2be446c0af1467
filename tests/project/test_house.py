"""The house stands as docs/DESIGN.md has it: the core runs alone, whatever else can be deleted,
imports point one way, and everything is of a size that one can read."""

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
from conftest import ERAS, MODEL, PACKAGE, ROOT, SRC, Fixture, era_fixtures, hand_made_batch

from microvllm import LLM, SamplingParams, attention, engine, full, model
from microvllm.sampler import cap_logits, noise, truncate

CORE = "__init__ engine scheduler model attention sampler tokenizer checkpoint environment".split()
ROOMS = "features fused cpu gpu sources quantize trace jobs evals nanochat cli".split()
FEATURES = sorted(p.stem for p in (PACKAGE / "features").glob("*.py") if p.stem != "__init__")
HIDDEN = ["numba", "llvmlite", "triton", "tqdm"]  # what no core needs


def run_alone(**job) -> dict:
    """What alone.py says of a copy of the package."""
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
    margin: float  # how far the noise is from the next token's share


def draw(llm: LLM, text: list[int], params: SamplingParams, sample_id: int) -> Row:
    """The token that follows a text, drawn once more by the plain model, all of it in one go."""
    table = range(1, 2 + len(text) // 16)
    batch = hand_made_batch([(text, 0, len(text), table)], 16)
    batch.logit_rows = batch.logit_rows[-1:]
    cache = engine.PagedKVCache(llm.model.config, 1 + len(table), 16, torch.float32, "cpu")
    with torch.inference_mode():
        logits = llm.model.logits(llm.model.forward(batch, cache))
    if not params.temperature:
        top = logits[0].topk(2)
        return Row(int(top.indices[0]), float(top.values[0] - top.values[1]))
    capped = cap_logits(logits, llm.model.recipe.softcap) / params.temperature
    cdf = truncate(capped, [params]).double().softmax(-1).cumsum(-1)[0].numpy()
    (uniform,) = noise([params.seed], [sample_id], [len(text)])
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
    """Nine files in an empty folder, and the packages that they import: nanochat's tokens for every
    era, the full engine's seeded tokens, and everything that alone.tour checks."""
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


# features and rooms can be deleted ----------------------------------------------------------------


class Gone(NamedTuple):
    """What asks for something that was deleted."""

    place: str  # that the error names
    asks: list[str]  # python
    commands: list[list[str]] = []  # words of `microvllm`


LOGITS = {
    "repetition_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": 0.1, "min_tokens": 2,
    "logprobs": 1, "logit_bias": {5: 1.0}, "allowed_token_ids": [5], "bad_words": ["no"],
}  # fmt: skip
RUN = ["run", "-m", str(MODEL), "--temperature", "0", "--max-tokens", "4", "Who?", "Where?"]
GONE = {
    "features/async_api.py": Gone(
        "features/async_api",
        ["llm.astream(['1+1'])", "llm.agenerate(['1+1'])", "llm.achat([])", "llm.warm()",
         "llm.serve_async([])", "llm.agenerate_columns([1, 2]).__anext__().send(None)"],
    ),
    "features/calculator.py": Gone(
        "features/calculator", ["llm.generate('1+1', use_tqdm=False, tools=True)",
                                "llm.chat([{'role': 'user', 'content': '1+1'}], tools=True)"]
    ),
    "features/foreign.py": Gone("features/foreign", ["LLM(MODEL, tokenizer=object())"]),
    "features/guided.py": Gone(
        "features/guided", ["SamplingParams(guide={'choices': ['yes', 'no']})"],
        [[*RUN, "--guide", str(ROOT / "models" / "prompts" / "oldbooks_instructions.json")]],
    ),
    "features/live.py": Gone(
        "features/live", ["LLM(model=object(), tokenizer=object())", "llm.update_weights({})",
                          "LLM(model=object(), tokenizer=object(), copy=True)",
                          "llm.sleep()", "llm.wake()"]
    ),
    "features/logits.py": Gone(
        "features/logits",
        [*(f"SamplingParams({name}={value!r})" for name, value in LOGITS.items()),
         "SamplingParams(logits_processor=lambda tokens, logits: logits)",
         "llm.generate('1+1', SamplingParams(guide={'choices': ['yes', 'no']}))"],
        [[*RUN, "--repetition-penalty", "1.2"]],
    ),
    "features/lookup.py": Gone(
        "features/lookup", ["LLM(MODEL, device='cpu', prompt_lookup=4)"],
        [[*RUN, "--prompt-lookup", "4"]],
    ),
    "features/matching.py": Gone(
        "features/matching", ["SamplingParams(guide={'choices': ['yes', 'no']})"],
        [[*RUN, "--guide", str(ROOT / "models" / "prompts" / "oldbooks_instructions.json")]],
    ),
    "features/nanochat.py": Gone(
        "features/nanochat", ["llm.generate_batch([1, 2])", "llm.generate_columns([1, 2])",
                              "llm.agenerate_columns([1, 2])"]
    ),
    "features/parallel.py": Gone(
        "features/parallel", ["LLM(MODEL, device='cpu', tensor_parallel=2)"],
        [[*RUN, "--tensor-parallel", "2"]],
    ),
    "features/scoring.py": Gone(
        "features/scoring", ["llm.score(['1+1='], ['2'])", "llm.judge(['1+1='], ['2'])"],
        [["score", "-m", str(MODEL), "Who?", "I"]],
    ),
    "features/stop_strings.py": Gone(
        "features/stop_strings", ["SamplingParams(stop='x')"], [[*RUN, "--stop", "x"]]
    ),
    "features/windows.py": Gone("features/windows", [], [["info", str(MODEL)]]),
    "features/guard.py": Gone("features/guard", ["llm.partial_outputs()"]),
    # nothing asks for these: without them there is no bar, no count, no check and no table
    "features/checks.py": Gone("", []),
    "features/display.py": Gone("", []),
    "features/progress.py": Gone("", []),
    "features/stats.py": Gone(
        "features/stats", ["llm.stats()"], [["bench", "-m", str(MODEL), "--random-input-len", "8"]]
    ),
    "features": Gone(
        "features/",
        ["LLM(MODEL, device='cpu', prompt_lookup=4)", "llm.score(['1+1='], ['2'])",
         "llm.generate('1+1', tools=True)", "SamplingParams(stop='x')"],
        [[*RUN, "--tensor-parallel", "2"]],
    ),
    "fused": Gone(
        "fused/",
        ["LLM(MODEL, device='cpu', attention='sdpa')", "LLM(MODEL, attention='numba')",
         "LLM(MODEL, device='cpu', deterministic=True)",
         "LLM(MODEL, device='cpu', quantization='int8')",
         "LLM(MODEL, device='cpu', kv_cache_dtype='int8')"],
        [[*RUN, "--deterministic"], [*RUN, "--kv-cache-dtype", "int8"]],
    ),
    "cpu": Gone(
        "cpu/backend",
        ["LLM(MODEL, device='cpu', attention='numba')",
         *(f"LLM(MODEL, device='cpu', quantization='int{bits}')" for bits in (8, 6, 5, 4))],
        [[*RUN, "--quantization", "int8"], [*RUN, "--quantization", "int4"]],
    ),
    "gpu": Gone(
        "gpu/",
        ["LLM(MODEL, attention='triton')", "LLM(MODEL, attention='flash')",
         "LLM(MODEL, quantization='fp8')"],
        [[*RUN, "--quantization", "fp8"]],
    ),
    "sources": Gone(
        "sources", ["LLM.from_nanochat()", "LLM('sft')", "LLM('owner/name')", "LLM(HF)",
                    "LLM(model=object(), tokenizer=object())", "llm.update_weights({})"],
        [[*RUN[:2], "sft", *RUN[3:]], ["convert", str(MODEL), "-o", "out"]],
    ),
    "trace": Gone(
        "trace", ["LLM(MODEL, trace='run.jsonl')", "llm.tracing().__enter__()"],
        [["trace", str(MODEL / "meta_011414.json")], [*RUN, "--watch"]],
    ),
    "jobs": Gone(
        "jobs", ["from microvllm.jobs import Job"],
        [["batch", "rows.jsonl", "-o", "out.jsonl", "-m", str(MODEL)],
         ["bench", "-m", str(MODEL), "--prompts-file", "rows.jsonl"]],
    ),
    "evals": Gone(
        "evals", ["from microvllm.evals import HarnessLM"],
        [["eval", "-m", str(MODEL), "--tasks", "arc_easy"]],
    ),
    "quantize": Gone(
        "quantize", ["from microvllm.quantize import quantize"],
        [["quantize", str(MODEL), "-o", "out", "--bits", "4"]],
    ),
    "cli": Gone("cli", ["import microvllm.cli"], [RUN]),
    "nanochat": Gone("nanochat", ["from microvllm.nanochat import Engine"]),
    "full.py": Gone("", []),
}  # fmt: skip
FAST = ("features",)  # the largest of them
# small, with all that a model can have, and windows; the core alone is asked with MODEL too
ERA = ERAS / "era5" / "chatsft_checkpoints" / "d4"


@pytest.fixture(scope="module")
def expected(fork_alone) -> dict:
    """What alone.tour gives with everything in place but numba."""
    return fork_alone(folder=SRC, hidden=HIDDEN[:2], model=ERA)["tour"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in GONE]
)
def test_each_feature_and_room_can_be_deleted(name, tmp_path, fork_alone, expected):
    """The rest goes on to the same tokens, and what is asked for in vain is named, with the
    remedy."""
    folder = tmp_path / "microvllm"
    shutil.copytree(PACKAGE, folder)  # with what python compiled, which is of no use without source
    place = folder / name
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    place, asks, commands = GONE[name]
    hf = str(ROOT / "tests/fixtures/nanochat_eras/hf_era1_padded")
    works = [RUN] if name not in ("cli", "full.py") else []
    found = fork_alone(
        folder=tmp_path, hidden=HIDDEN[:2], model=ERA, commands=[*works, *commands],
        asks=[code.replace("HF", repr(hf)) for code in asks],
    )  # fmt: skip
    assert found["class"] == ("microvllm.engine" if name == "full.py" else "microvllm.full")
    assert found["tour"] == expected
    # python itself says that a room is not there; what asks by another name is told the remedy too
    error, remedy = "ImportError: ", "reinstall microvllm"
    for code, told in zip(asks, found["told"], strict=True):
        if code.startswith(("from ", "import ")):
            assert told == f"ModuleNotFoundError: No module named 'microvllm.{place}'"
        else:
            assert told.startswith(error) and told.count("\n") == 0, (code, told)
            assert f"microvllm/{place}" in told and remedy in told, (code, told)
    for told in found["commands"][: len(works)]:
        assert told["status"] == 0 and told["out"], told
    for told in found["commands"][len(works) :]:
        assert told["status"] == (1 if name == "cli" else 2), told
        assert told["err"].count("\n") == 1, told
        assert f"microvllm/{place}" in told["err"] and remedy in told["err"], told


def test_the_list_of_what_can_be_deleted_is_whole():
    """Each feature and room is in it, and all that full.py can be asked for in vain."""
    files = {f"features/{name}.py" for name in FEATURES}
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name[0] != "_"}
    assert set(GONE) == files | rooms | {"full.py"} and rooms == set(ROOMS)
    for name, place in full.PLACES.items():
        room, _, file = place.partition(".")
        asks = GONE[f"features/{file}.py" if room == "features" else room].asks
        assert any(name in code for code in asks), name


# imports point one way ----------------------------------------------------------------------------

# arrows that are no arrow to the core, each with its reason
ALLOWED = {
    ("core", "full"): "__init__ gives the full engine where it is there",
    ("full", "features"): "parts are put together there",
    ("full", "fused"): "parts are put together there",
    ("full", "cpu"): "parts are put together there",
    ("full", "gpu"): "parts are put together there",
    ("full", "sources"): "parts are put together there",
    ("full", "trace"): "parts are put together there",
    ("features", "sources"): "a live module is checked as strictly as a file: sources/strict.py",
    ("cpu", "fused"): "its kernels and layouts fill in the fused model's Backend and Linear",
    ("gpu", "fused"): "its kernels and layouts fill in the fused model's Backend and Linear",
    ("__main__", "cli"): "python -m microvllm",
    ("cli", "full"): "info and batch look at a checkpoint without making an engine",
    ("cli", "features"): "info counts the blocks of layer groups; torchrun's processes speak once",
    ("cli", "jobs"): "batch; score and bench read rows",
    ("cli", "sources"): "bench asks whether the hub answers; convert",
    ("cli", "evals"): "the command eval",
    ("cli", "quantize"): "the command of that name",
    ("quantize", "cpu"): "what is rounded is what the products of few bits multiply by",
    ("sources", "cpu"): "a quantised folder becomes what the products of few bits multiply by",
    ("cli", "trace"): "--watch, and the command of that name",
}


class Arrow(NamedTuple):
    """One file imports another."""

    source: str  # such as cli/bench.py
    target: str
    kind: str  # "top", "inside" a function, "typing" (never run)
    names: tuple[str, ...] = ()  # what of the target

    @property
    def rooms(self) -> tuple[str, str]:
        return room(self.source), room(self.target)


def room(file: str) -> str:
    """Where a file of the package lies: a room, "core", or its own name."""
    top = file.partition("/")[0].removesuffix(".py")
    return "core" if top in CORE else top


def resolve(parts: list[str]) -> str | None:
    """The file of a module of the package; None if it is none."""
    path = PACKAGE.joinpath(*parts)
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if parts and file.is_file():
            return file.relative_to(PACKAGE).as_posix()
    return None if parts else "__init__.py"


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

    for path in sorted(PACKAGE.rglob("*.py")):
        walk(
            ast.parse(path.read_text(encoding="utf-8")), path.relative_to(PACKAGE).as_posix(), "top"
        )
    return [*dict.fromkeys(found)]


def named_in_full() -> set[str]:
    """The files that full.py imports by their names in strings."""
    tree = ast.parse((PACKAGE / "full.py").read_text(encoding="utf-8"))
    strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    words = {word for text in strings if isinstance(text, str) for word in text.split()}
    gpu = {f"gpu.{word}" for word in words if word.isidentifier()}
    features = {f"features.{word}" for word in words if word.isidentifier()}
    words -= {*full.FEATURES}  # a room may have the name of a feature
    names = {word for word in words | gpu | features if word.partition(".")[0] in ROOMS}
    return {file for name in names if (file := resolve(name.split(".")))}


def test_imports_point_one_way():
    """Rooms import the core, the core imports no room; what else there is, is in ALLOWED."""
    seen = {arrow.rooms for arrow in arrows()} | {("full", room(file)) for file in named_in_full()}
    beyond = []
    for arrow in arrows():
        source, target = arrow.rooms
        if source == target or arrow.kind == "typing" or (source, target) in ALLOWED:
            continue
        if target != "core":
            beyond.append(arrow)
        elif arrow.target == "__init__.py" and arrow.kind == "top":
            # the engine itself is imported where it is needed: it takes its parts from the rooms
            if arrow.names != ("__version__",):
                beyond.append(arrow)
    assert not beyond, "\n".join(["", *map(str, beyond)])
    assert not set(ALLOWED) - seen, "these arrows are gone"
    # the only arrow out of the core
    out = {a for a in arrows() if room(a.source) == "core" and room(a.target) != "core"}
    assert {(a.source, a.target) for a in out} == {("__init__.py", "full.py")}
    # full.py is asked for the engine by the package's own name
    users = {a.source for a in arrows() if a.target == "full.py" and a.kind != "typing"}
    assert {room(user) for user in users - {"__init__.py"}} <= {"cli"}
    # no arrow is hidden in a string, but for two files that import what is asked for; the third
    # looks for other packages, the last is a process, which imports its own room
    for path in PACKAGE.rglob("*.py"):
        if "import_module" in path.read_text(encoding="utf-8"):
            file = path.relative_to(PACKAGE).as_posix()
            users = "full.py", "jobs/__init__.py", "gpu/flash.py", "cpu/helper.py"
            assert file in users, file


def test_no_circle():
    """No file imports, by way of others, itself: not inside functions either."""
    graph: dict[str, set[str]] = {}
    for arrow in arrows():
        if arrow.kind != "typing":
            graph.setdefault(arrow.source, set()).add(arrow.target)
    graph["full.py"] |= named_in_full()
    graph["jobs/__init__.py"] = {"jobs/job.py", "jobs/ray.py"}
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


def test_no_dispatch_by_accident():
    """No class is picked by the name of its module, nothing is looked up in sys.modules, no
    docstring is a message, and no NamedTuple is cut by positions."""
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree, file = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(PACKAGE)
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
            # a class that is made of others takes the docstring of one of them
            if text and (str(file), text) != ("full.py", ".__doc__"):
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
def test_a_wheel_has_all_rooms(tmp_path):
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
    rooms = {f"microvllm.{name}" for name in ROOMS} | {"microvllm.full"}
    if not importlib.util.find_spec("lm_eval"):
        rooms.remove("microvllm.evals")  # which is imported with the package that it serves
    assert rooms <= set(found["loaded"])
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
