"""docs/DESIGN.md describes the code as it is."""

import inspect
import re
import sys
from types import ModuleType

import pytest
from helpers.goldens import ROOT

from microvllm import (
    attention,
    blocks,
    checkpoint,
    engine,
    environment,
    model,
    runner,
    sampler,
    scheduler,
    tokenizer,
)
from microvllm.fused import backend

DESIGN = (ROOT / "docs" / "DESIGN.md").read_text(encoding="utf-8")
MODULES = [
    engine,
    runner,
    scheduler,
    blocks,
    attention,
    sampler,
    tokenizer,
    model,
    checkpoint,
    environment,
    backend,
]
ERRORS = {"FileNotFoundError", "TypeError", "ValueError"}
NOT_FUNCTIONS = {"assert", "generate", "num_x", "is_x", "has_x", "lab", "microvllm", "plain"}


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.+?)^```", DESIGN, re.M | re.S)


def parts_of(cls: type) -> set[str]:
    """Methods, fields, and what its methods set on self."""
    attributes = re.findall(r"\bself\.(\w+)", inspect.getsource(cls))
    return {*dir(cls), *attributes, *getattr(cls, "__annotations__", ())}


def test_the_names_of_the_design_exist():
    classes = re.findall(r"`([A-Z]\w+)(?:\.(\w+))?`", DESIGN)
    assert len(classes) > 60
    for name, part in classes:
        if name in ERRORS:
            continue
        homes = [module for module in MODULES if hasattr(module, name)]
        assert homes, name
        if part:
            assert part in parts_of(getattr(homes[0], name)), f"{name}.{part}"
    for name in set(re.findall(r"`([a-z]\w+)`", DESIGN)) - NOT_FUNCTIONS:
        assert any(f"def {name}(" in inspect.getsource(module) for module in MODULES), name


def test_the_files_of_the_design_exist():
    package = ROOT / "src" / "microvllm"
    names = set(re.findall(r"`([\w/]+\.py)`", DESIGN)) - {"src/microvllm/features/max_lines.py"}
    assert len(names) > 15
    for name in names:
        assert (package / name).exists() or (ROOT / name).exists(), name
    for name in set(re.findall(r"(?<!/)\b([a-z]+)/(?= )", DESIGN)):
        assert (package / name).is_dir() or (ROOT / name).is_dir(), name


def test_the_step_of_the_design_is_that_of_the_engine():
    def statements(text: str) -> list[str]:
        lines = [line.split("#")[0].strip() for line in text.splitlines()]
        return [line for line in lines if line and not line.startswith(("class", "def", '"""'))]

    (shown,) = [block for block in code_blocks("python") if block.startswith("class Loop")]
    assert statements(shown) == statements(inspect.getsource(engine.Loop.advance))


def test_all_hooks_are_in_the_design_with_their_signatures():
    shown = dict(re.findall(r"^\| `(\w+)\((.*?)\)` \|", DESIGN, re.M))
    hooks = {
        name: ", ".join(list(inspect.signature(method).parameters)[1:])
        for name, method in vars(runner.Extension).items()
        if inspect.isfunction(method)
    }
    assert shown == hooks


@pytest.mark.usefixtures("one_thread")
def test_the_feature_of_the_design_runs(monkeypatch, capsys):
    feature, example = code_blocks("python")[-2:]
    assert feature.count("\n") <= 50
    name = "microvllm.features.max_lines"
    module = ModuleType(name)
    module.__package__ = "microvllm.features"
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(feature, name, "exec"), vars(module))
    monkeypatch.chdir(ROOT)
    names = {}
    exec(compile(example, "DESIGN.md", "exec"), names)
    names["llm"].close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["1", "max_lines"], ["2", "max_lines"]]
    first, second = [line.split(maxsplit=2)[2].strip("'\"") for line in lines]
    assert second.startswith(first) and second != first
