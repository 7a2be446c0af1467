"""docs/DESIGN.md speaks of the code as it is."""

import ast
import inspect
import re
import sys
from types import ModuleType

import pytest
from conftest import ROOT
from test_readme import CORE, PACKAGE, blocks

import microvllm
from microvllm import attention, checkpoint, engine, full, model, sampler, scheduler, tokenizer
from microvllm.fused import backend

DESIGN = (ROOT / "docs" / "DESIGN.md").read_text(encoding="utf-8")
HOMES = [engine, scheduler, attention, sampler, tokenizer, model, checkpoint, backend]


def parts_of(cls: type) -> set[str]:
    """Methods, fields, and what its methods set on self."""
    return {*dir(cls), *re.findall(r"\bself\.(\w+)", inspect.getsource(cls))} | set(
        getattr(cls, "__annotations__", ())
    )


def test_the_names_of_the_design_exist():
    named = re.findall(r"`([A-Z]\w+)(?:\.(\w+))?`", DESIGN)
    assert len(named) > 60
    classes = {name for name, _ in named if not name.isupper()} - {"TypeError", "ValueError"}
    for name in classes - {"FileNotFoundError"}:
        assert any(hasattr(home, name) for home in HOMES), name
    for name, part in named:
        if part:
            cls = next(getattr(home, name) for home in HOMES if hasattr(home, name))
            assert part in parts_of(cls), f"{name}.{part}"
    others = {"assert", "num_x", "scoring", "tools", "x_id"}
    for name in set(re.findall(r"`([a-z]\w+)`", DESIGN)) - others:  # functions and methods
        assert any(f"def {name}(" in inspect.getsource(home) for home in HOMES), name


def marked_seams() -> list[str]:
    """Functions and classes of the core whose docstrings say that they are seams."""
    found = []
    for name in CORE:
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and "Seam:" in (
                ast.get_docstring(node) or ""
            ):
                found.append(node.name)
    return found


def test_every_seam_of_the_core_is_in_the_design():
    seams = marked_seams()
    assert len(seams) > 12
    assert not [name for name in seams if not re.search(rf"[`.]{name}`", DESIGN)]


def test_the_order_of_the_features_is_that_of_the_design():
    assert any(block.split() == list(full.FEATURES) for block in blocks("text", DESIGN))


@pytest.fixture
def full_with(monkeypatch):
    """The full engine's module, built once more with a feature of this source in FEATURES."""

    def build(source: str, name: str, before: str) -> ModuleType:
        code = (PACKAGE / "full.py").read_text(encoding="utf-8")
        (words,) = re.findall(rf"\b{before}\b(?= )", code[: code.index("PLACES = ")])
        made = {
            f"microvllm.features.{name}": source,
            "microvllm.full_with": code.replace(words, f"{name} {before}", 1),
        }
        for path, text in made.items():
            module = ModuleType(path)
            module.__package__ = path.rpartition(".")[0]
            monkeypatch.setitem(sys.modules, path, module)
            exec(compile(text, path, "exec"), vars(module))
        return module

    return build


@pytest.mark.usefixtures("one_thread")
def test_the_feature_of_the_design_runs(full_with, monkeypatch, capsys):
    feature, example = blocks("python", DESIGN)
    assert feature.count("\n") <= 35
    before = full.FEATURES[full.FEATURES.index("scoring") - 1]
    module = full_with(feature, "preemptions", before)
    monkeypatch.chdir(ROOT)
    printed = []
    for home in module, full:
        for name in ("LLM", "SamplingParams"):
            monkeypatch.setattr(microvllm, name, getattr(home, name), raising=False)
        given = {}
        plain = example.replace('output["num_preemptions"]', "0") if home is full else example
        exec(compile(plain, "DESIGN.md", "exec"), given)
        printed.append(capsys.readouterr().out)
        given["llm"].close()
    counts = re.findall(r"^(\d) ", printed[0], re.M)
    assert sorted(counts) == ["0", "1"]
    # the text is that of an engine without the feature
    assert re.sub(r"^1 ", "0 ", printed[0], flags=re.M) == printed[1]
