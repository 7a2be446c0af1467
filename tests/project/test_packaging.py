"""How microvllm is installed, and what texts say about it."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
from helpers.goldens import ROOT, SRC

from microvllm import environment
from microvllm.environment import how_to_install

# texts that a user reads, and the sources whose messages he reads
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/*.md")])
SOURCES = [
    file
    for folder in ("src", "lab", "course", "examples", "benchmarks", "tests")
    for file in sorted((ROOT / folder).rglob("*"))
    if file.suffix in (".py", ".sh", ".md", ".html") and file != Path(__file__)
]
# what a user writes, and the type that an editor shows for it
TYPES = {
    "LLM": "type[LLM]",
    "SamplingParams": "type[SamplingParams]",
    "llm": "LLM",
    "LLM.from_nanochat('sft', num_blocks=100)": "LLM",
    "params": "SamplingParams",
    "llm.generate(['hi'], params, use_tqdm=False, tools=True)": "list[RequestOutput]",
    "llm.chat([{'role': 'user', 'content': 'hi'}])": "list[RequestOutput]",
    "llm.score(['a'], ['b'])": "list[list[float]]",
    "llm.judge(['a'], ['b'])": "list[RequestOutput]",
    "llm.stats()": "dict[str, float]",
    "llm.add_request('a', params)": "int",
    "llm.step()": "list[RequestOutput]",
    "llm.partial_outputs()": "list[RequestOutput]",
    "next(llm.stream('hi', params))": "RequestOutput",
    "llm.tracing().__enter__()": "Trace",
    "llm.update_weights({})": "None",
    "llm.max_model_len": "int",
}
USE = """from microvllm import LLM, SamplingParams

params = SamplingParams(stop=["x"], max_tokens=4, seed=1, logprobs=2)
llm = LLM("model", num_blocks=100, prompt_lookup=4, num_threads=1, quantization="int8")
"""
# what no editor may let pass, and a word of its message
MISTAKES = {
    "SamplingParams(stopp='x')": "stopp",
    "LLM('model', num_threads='two')": "num_threads",
    "llm.generat('hi')": "generat",
}


def settings() -> dict:
    """pyproject.toml."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# a fresh environment ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """What of a clone an installation needs, in a folder named as `git clone` names it. So Python
    that starts beside it finds a folder `microvllm` that is no package."""
    folder = tmp_path_factory.mktemp("parent") / "microvllm"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(SRC, folder / "src", ignore=ignored)
    for name in "pyproject.toml setup.py README.md LICENSE MANIFEST.in".split():
        shutil.copy(ROOT / name, folder)
    return folder


def run(*command: str | Path, cwd: Path, fails: bool = False) -> str:
    """The output of a command that does not see this checkout. fails: whether its status is 1."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=env | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == int(fails), done.stdout + done.stderr
    return done.stdout


def install(folder: Path, *words: str | Path) -> Path:
    """The Python of a new environment in which pip has installed this. It has the packages of this
    Python too, but not what is installed here as editable."""
    builder = venv.EnvBuilder(symlinks=os.name == "posix")
    builder.create(folder)
    python = Path(builder.ensure_directories(folder).env_exe)
    packages = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    )
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    Path(packages.strip(), "zz_shared.pth").write_text("\n".join(shared))
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*pip, "install", "--no-deps", "--no-index", "--no-build-isolation", *words, cwd=folder)
    return python


def check_import_and_types(python: Path, parent: Path) -> Path:
    """Python and pyright that start in this folder find LLM; returns the package's folder."""
    pytest.importorskip("pyright", reason="needs pip install 'pyright[nodejs]'")
    code = "from microvllm import LLM; import microvllm; print(LLM.__name__, microvllm.__file__)"
    name, file = run(python, "-c", code, cwd=parent).split()
    assert name == "LLM"
    lines = [USE, *(f"reveal_type({text})" for text in TYPES), *MISTAKES]
    (parent / "use.py").write_text("\n".join(lines))
    words = ["--pythonpath", python, "--outputjson", "use.py"]
    found = json.loads(run(sys.executable, "-m", "pyright", *words, cwd=parent, fails=True))
    messages = [(d["severity"], d["message"]) for d in found["generalDiagnostics"]]
    shown = [text for severity, text in messages if severity == "information"]
    assert [text.rpartition(" is ")[2] for text in shown] == [f'"{t}"' for t in TYPES.values()]
    errors = [text for severity, text in messages if severity == "error"]
    assert len(errors) == len(MISTAKES), errors
    for text, word in zip(errors, MISTAKES.values(), strict=True):
        assert word in text
    return Path(file).parent


@pytest.mark.slow
def test_an_editable_installation_is_found_from_the_folder_beside_the_clone(clone, tmp_path):
    python = install(tmp_path / "venv", "-e", clone)
    assert check_import_and_types(python, clone.parent) == clone / "src" / "microvllm"


@pytest.mark.slow
def test_an_installed_wheel_is_found_from_the_folder_beside_the_clone(clone, tmp_path):
    copy = shutil.copytree(clone, tmp_path / "copy")  # a build leaves files behind
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation"]
    run(*pip, "-w", tmp_path, copy, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    python = install(tmp_path / "venv", wheel)
    assert tmp_path / "venv" in check_import_and_types(python, clone.parent).parents


# remedies -----------------------------------------------------------------------------------------


def test_no_text_takes_microvllm_from_an_index():
    """It is on none, and a stranger may take the name there."""
    pattern = re.compile(r"(pip install|force-reinstall)[^\n]*?(?<![/\w.])microvllm(?![/\w])")
    extra = re.compile(r"microvllm\[\w+\]")
    allowed = "in the clone of microvllm"
    for file in {*PAGES, *SOURCES}:
        text = file.read_text(encoding="utf-8").replace(allowed, "")
        for found in pattern.finditer(text):
            assert "pip install -e ." in found[0], (file, found[0])
        assert not extra.search(text), (file, extra.search(text)[0])
    sources = "".join(file.read_text(encoding="utf-8") for file in SOURCES)
    assert "--force-reinstall" not in sources


def test_every_extra_that_a_text_names_is_there():
    extras = settings()["project"]["optional-dependencies"]
    named: set[str] = set()
    for file in {*PAGES, *SOURCES}:
        text = file.read_text(encoding="utf-8")
        named |= set(re.findall(r"how_to_install\(['\"](\w+)['\"]\)", text))
        named |= set(re.findall(r"'\.\[(\w+)\]'", text))
    assert {"guided", "hf", "eval", "parquet", "ray", "watch", "lab"} <= named <= {*extras}


def test_messages_name_an_extra_in_one_way():
    """By how_to_install. So one line changes when the package is on an index."""
    assert how_to_install("hf") == "pip install -e '.[hf]' in the clone of microvllm"
    assert environment.REINSTALL.startswith("reinstall microvllm (pip install -e .")
    for file in [*(ROOT / "src").rglob("*.py"), *(ROOT / "lab").glob("*.py")]:
        if file.name not in ("environment.py", "flags.py"):  # help texts, which are short
            assert "pip install -e" not in file.read_text(encoding="utf-8"), file


def test_the_metadata_names_tested_versions_of_python():
    project = settings()["project"]
    begin = "Programming Language :: Python :: 3."
    minors = [int(c[len(begin) :]) for c in project["classifiers"] if c.startswith(begin)]
    assert minors == sorted(minors) and project["requires-python"] == f">=3.{minors[0]}"
    names = {re.split(r"[<>=\[ ]", text)[0] for text in project["dependencies"]}
    assert {"psutil", "torch", "numpy", "numba"} <= names
    for name in names:
        assert metadata.version(name)


def test_the_changes_and_the_ways_to_contribute_are_written_down():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## Unreleased" in changes
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for command in "pytest", "pytest -m slow", "ruff check", "ruff format":
        assert command in guide
