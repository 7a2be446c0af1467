"""What the README and the documents show is what happens."""

import ast
import inspect
import io
import json
import os
import pdb
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers.goldens import MODEL, PACKAGE, ROOT

from microvllm import engine

README = (ROOT / "README.md").read_text(encoding="utf-8")
DESIGN = (ROOT / "docs" / "DESIGN.md").read_text(encoding="utf-8")
FEATURES = (ROOT / "docs" / "FEATURES.md").read_text(encoding="utf-8")
CORE = (
    "__init__ attention blocks checkpoint engine environment model runner sampler scheduler "
    "tokenizer tokenizer_file"
).split()


def blocks(language: str, text: str = README) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.+?)^```", text, re.M | re.S)


@pytest.mark.usefixtures("one_thread")
def test_the_example_of_the_readme_runs(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    example, *_ = blocks("python")
    assert example.count("\n") <= 10
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.count("length 2") + printed.count("stop 2") >= 2
    assert "Bram Stoker" in printed


@pytest.mark.usefixtures("one_thread")
def test_a_breakpoint_in_the_plain_model_is_reached(monkeypatch):
    monkeypatch.chdir(ROOT)
    (example,) = [block for block in blocks("python", DESIGN) if "breakpoint()" in block]
    typed = [
        line
        for block in blocks("text", DESIGN)
        for line in re.findall(r"^\(Pdb\) (.+)", block, re.M)
    ]
    assert typed[0] == "break GPT.forward"
    shown = io.StringIO()
    keys = io.StringIO("\n".join([*typed, "clear 1", "continue", ""]))
    debugger = pdb.Pdb(stdin=keys, stdout=shown, nosigint=True, readrc=False)
    monkeypatch.setattr(sys, "breakpointhook", lambda: debugger.set_trace(sys._getframe(1)))
    exec(compile(example, "DESIGN.md", "exec"), {})
    assert f"Breakpoint 1 at {PACKAGE / 'model.py'}" in shown.getvalue()
    stops, *printed = shown.getvalue().split("forward()")[1:]
    assert "(1)" in stops  # the first line of GPT.forward, with its step's number
    assert printed[-1].count("tensor(") == 4  # ids, positions, block tables and slots
    assert "***" not in shown.getvalue()  # how pdb begins an error


def test_every_subcommand_that_the_documents_name_has_a_help():
    line = re.search(r"^## On the command line\n\n(.+)", FEATURES, re.M)[1]
    names = [name.split()[-1] for name in re.findall(r"`([^`]+)`", line) if "--" not in name]
    commands = "run chat batch bench score eval info warmup convert quantize lab learn trace"
    assert names == commands.split()
    for name in names:
        command = [sys.executable, "-m", "microvllm", name, "--help"]
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert told.returncode == 0 and "usage" in told.stdout


def test_the_readme_is_short():
    assert len(README.split()) <= 1300
    assert 100 <= len(README.splitlines()) <= 150


def test_the_readme_begins_with_the_commands_of_a_newcomer():
    """Which .ci/run runs, behind the clone."""
    clone, *pip = blocks("bash")[0].splitlines()
    assert clone.startswith("git clone ") and clone.endswith(" microvllm && cd microvllm")
    assert pip == ["pip install -e . && python run.py", "pip install -e '.[test]' && pytest"]


def run_blocks(text: str, folder: Path) -> None:
    """Run the commands of a page as a user with a trained nanochat does, in a folder."""
    prompts = [json.dumps({"prompt": name}) for name in ("Who wrote Emma?", "What is 7+8?")]
    (folder / "prompts.jsonl").write_text("\n".join(prompts))
    base = folder / "nanochat"  # as a user's own training leaves it
    for place in "base_checkpoints/d20", "chatsft_checkpoints/d20":
        (base / place).parent.mkdir(parents=True)
        (base / place).symlink_to(MODEL)
    (base / "tokenizer").symlink_to(MODEL.parent / "tokenizer")
    here = os.environ | {"NANOCHAT_BASE_DIR": str(base)}
    here |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for block in blocks("bash", text):
        if block.startswith("git clone"):
            continue
        block = block.replace("lab fig15", "lab fig15 --requests 30")  # of 300, which are slow
        done = subprocess.run(
            ["bash", "-ec", block], cwd=folder, env=here, capture_output=True, text=True,
            timeout=600, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "count", "written"),
    [
        ("README.md", 4, ["answers.jsonl", "lab-results/demo.html"]),
        ("docs/BATCH.md", 1, ["answers.jsonl"]),
        ("docs/TRACE.md", 2, ["run.html", "diff.html", "lab-results/demo.html"]),
    ],
)
def test_the_commands_of_a_page_run(page, count, written, tmp_path):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(blocks("bash", text)) == count
    run_blocks(text, tmp_path)
    for name in written:
        made = (tmp_path / name).read_text(encoding="utf-8")
        if name == "answers.jsonl":
            assert "Jane Austen" in made and len(made.splitlines()) == 2
        else:
            assert "<title>" in made


def test_no_page_has_commands_that_no_test_runs():
    """sed of docs/NANOCHAT.md runs in tests/nanochat, those of the lab and of CONTRIBUTING.md are
    what tests/lab and .ci/run do."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/*.md")]
    shown = {
        page.relative_to(ROOT).as_posix()
        for page in pages
        if blocks("bash", page.read_text(encoding="utf-8"))
    }
    run = {"README.md", "docs/BATCH.md", "docs/TRACE.md"}
    assert shown == run | {"CONTRIBUTING.md", "docs/NANOCHAT.md", "lab/EXERCISES.md"}


def test_pytest_leaves_out_what_the_readme_says():
    settings = (ROOT / "pyproject.toml").read_text()
    assert '`-m "not slow"` is the default' in README and "not slow" in settings
    assert re.search(r'"slow: ', settings)
    assert "slow" in (ROOT / ".ci" / "run").read_text()  # which runs all


def test_the_loop_that_the_readme_shows_is_the_engines():
    """Its statements, without comments."""
    (shown,) = [block for block in blocks("python") if block.startswith("class Loop")]
    (loop,) = ast.parse(shown).body
    source = inspect.getsource(engine.Loop.advance)
    (method,) = ast.parse(textwrap.dedent(source)).body
    assert ast.unparse(loop.body[0].body) == ast.unparse(method.body[1:])


def test_the_map_of_the_core_is_right():
    """Its files, and the names that may be skipped."""
    rows = re.findall(r"^\| \d+ \| `(\w+)\.py` \|.+\|(.*)\|$", DESIGN, re.M)
    assert sorted(name for name, _ in rows) == sorted(CORE)
    for name, skipped in rows:
        source = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
        for part in re.findall(r"`(\w+)`", skipped):
            assert re.search(rf"(def|class) {part}\b", source), f"{name}.py has no {part}"


def test_the_map_names_every_module():
    mapped = set(re.findall(r"`([\w/]+(?:\.py|/))`", DESIGN))
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    unmapped = {name for name in modules - mapped if name.split("/")[0] + "/" not in mapped}
    assert unmapped == {"__main__.py"}


@pytest.mark.parametrize(
    "page",
    ["README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md"]
    + [f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))],
)
def test_the_files_that_a_page_names_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r'(?:\]\(|src="|srcset=")([\w./-]+)[)"]', text)
    assert all(((ROOT / page).parent / link).exists() for link in links), links
    quoted = " ".join(re.findall(r"`([^`]+)`", re.sub(r"^```.+?^```", "", text, flags=re.M | re.S)))
    named = set(re.findall(r"(?<![\w/.])((?:\w+/)*\w+\.(?:py|md)|(?:\w+/)+)(?![\w.])", quoted))
    named -= {"src/microvllm/features/max_lines.py", "src/microvllm/features/NAME.py"}
    named -= {"site/", "tests/test_engine.py"}  # what mkdocs writes; nanochat's own
    homes = ROOT, PACKAGE, (ROOT / page).parent
    missing = [name for name in named if not any((home / name).exists() for home in homes)]
    assert named or page != "docs/DESIGN.md"
    assert not missing, missing
