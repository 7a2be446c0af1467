"""benchmarks/first_card.sh without a card: its parts run, and its report says what failed."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers.gpu_kernels import CUDA

ROOT = Path(__file__).resolve().parents[2]
SRC = str(ROOT / "src")
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts, which import one another

import first_card  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(CUDA, reason="a card can run the script itself"),
]


def run(out: Path, name: str) -> dict:
    with pytest.raises(SystemExit) as ended:
        first_card.main([name, str(out), "--tiny"])
    found = json.loads((out / f"{name}.json").read_text())
    assert ended.value.code == ("error" in found)
    return found


@pytest.mark.slow
def test_each_part_leaves_its_findings(tmp_path):
    assert run(tmp_path, "facts")["torch"] == torch.__version__
    found = run(tmp_path, "graphs")
    assert found["3 rows"] == "equal for 6 to 6 of 6 tokens" and "suspicious" not in found
    found = run(tmp_path, "sync")
    assert found["waits"] == {} and set(found["asked"]) > {"top_k", "allowed_token_ids", "score"}
    found = run(tmp_path, "waits")
    assert found["steps"]["decodes alone"] > 5 and found["mean_ms"]["with prompts"]["forward"] > 0
    assert len(found := run(tmp_path, "products")) == 5 and not found["warnings"]
    assert "aten::empty" in run(tmp_path, "profile")["us a step, 4 sequences"]
    report = (tmp_path / "report.md").read_text()
    assert "- headline: it was not run" in report and "- sync" not in report


def test_a_part_that_fails_says_so_and_keeps_what_it_knew(tmp_path, monkeypatch):
    def failing(part):
        part.note(tokens=7)
        written = json.loads((tmp_path / "graphs.json").read_text())
        assert written == {"error": "it did not come to its end", "tokens": 7}  # if it is killed
        warnings.warn("no decode steps by 'few_rows, 2' here", stacklevel=2)
        raise ValueError("something")

    monkeypatch.setitem(first_card.PARTS, "graphs", failing)
    found = run(tmp_path, "graphs")
    assert found["tokens"] == 7 and found["error"] == "ValueError: something"
    assert found["warnings"] == ["no decode steps by 'few_rows, 2' here"]
    run_ = {"tokens_per_s": 51234.5, "share": 0.761}
    headline = {"headline": run_, "single": {"error": "no memory"}, "seconds": 9}
    (tmp_path / "headline.json").write_text(json.dumps(headline))
    (tmp_path / "sync.json").write_text(json.dumps({"waits": {"top_k": "error: it synchronizes"}}))
    report = first_card.report(tmp_path)
    for line in (
        "- graphs: ValueError: something", "- headline, single: no memory",
        "- sync, top_k: error: it synchronizes", "- mixed: it was not run",
        "| headline | 51,234 | 54,000 | 76.1% |", "| single | not measured | 600 |  |",
        "- warning: no decode steps by 'few_rows, 2' here",
    ):  # fmt: skip
        assert f"\n{line}\n" in report, line


@pytest.mark.slow
def test_the_script_runs_the_parts_asked_for_and_writes_the_report(tmp_path):
    """With FUZZ all of them: start-up and headline make processes of their own."""
    names = [] if os.environ.get("FUZZ") else ["facts"]
    env = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable, "PYTHONPATH": SRC}
    script = [ROOT / "benchmarks" / "first_card.sh", "--tiny", *names]
    done = subprocess.run(script, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ran = sorted(path.stem for path in tmp_path.glob("*.json"))
    assert ran == (names or sorted(first_card.PARTS))
    report = (tmp_path / "report.md").read_text()
    assert "- torch: " in report and (names or "\n## Failures\n\nnone\n" in report)
