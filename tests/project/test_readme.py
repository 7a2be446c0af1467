"""What the README shows is what happens."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_of_the_readme_runs(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"^```python\n(.+?)^```", README, re.M | re.S)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.count("length 2") + printed.count("stop 2") >= 2
    assert "Bram Stoker" in printed


def test_every_subcommand_that_the_readme_names_has_a_help():
    line = re.search(r"On the command line: (.+)", README)[1]
    names = [name.split()[-1] for name in re.findall(r"`([^`]+)`", line) if "--" not in name]
    assert names == ["run", "chat", "batch", "bench", "score", "info", "lab", "trace"]
    for name in names:
        command = [sys.executable, "-m", "microvllm", name, "--help"]
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert told.returncode == 0 and "usage" in told.stdout


def test_the_commands_of_the_readme_run(tmp_path):
    """Those of the first block are what a newcomer, and .ci/run, begins with."""
    prompts = [json.dumps({"prompt": name}) for name in ("Who wrote Emma?", "What is 7+8?")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    first, *others = re.findall(r"^```bash\n(.+?)^```", README, re.M | re.S)
    assert first == "pip install -e . && python run.py\npip install -e '.[test]' && pytest\n"
    assert len(others) == 2
    here = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for block in others:
        told = subprocess.run(
            ["bash", "-ec", block], cwd=tmp_path, env=here, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip
        assert told.returncode == 0, told.stderr
    answers = (tmp_path / "answers.jsonl").read_text()
    assert "Jane Austen" in answers and len(answers.splitlines()) == 2
    assert "<title>" in (tmp_path / "run.html").read_text(encoding="utf-8")


def test_the_map_names_every_module():
    mapped = set(re.findall(r"`([\w/]+(?:\.py|/))`", README))
    package = ROOT / "microvllm"
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    unmapped = {name for name in modules - mapped if name.split("/")[0] + "/" not in mapped}
    assert unmapped == {"__init__.py", "__main__.py"}
