"""What the README shows is what happens."""

import re
import subprocess
import sys

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
    assert names == ["run", "chat", "bench", "score", "info"]
    for name in names:
        command = [sys.executable, "-m", "microvllm", name, "--help"]
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert told.returncode == 0 and "usage" in told.stdout


def test_the_map_names_every_module():
    mapped = set(re.findall(r"`(\w+\.py)`", README))
    modules = {path.name for path in (ROOT / "microvllm").glob("*.py")}
    assert modules - mapped == {"__init__.py", "__main__.py"}
