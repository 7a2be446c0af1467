"""benchmarks/first_card.sh without a card: its parts run, and its report says what failed."""

import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil
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
        first_card.main([str(out / "report"), str(out / "work"), "--tiny", "--part", name])
    found = json.loads((out / "report" / f"{name}.json").read_text())
    assert ended.value.code == ("error" in found)
    return found


@pytest.mark.slow
def test_each_part_leaves_its_findings(tmp_path, monkeypatch):
    monkeypatch.setenv("MICROVLLM_SHARED_PREFIXES", "")  # which a part changes
    facts = run(tmp_path, "facts")
    assert facts["torch"] == torch.__version__ and {"compiler", "python_header"} < facts.keys()
    found = run(tmp_path, "graphs")
    assert found["3 rows"] == "equal for 6 to 6 of 6 tokens" and "suspicious" not in found
    found = run(tmp_path, "prefixes")
    assert found["read_once"]["tokens_per_s"] > 0 and found["read_by_each"]["tokens_per_s"] > 0
    assert found["8 sequences that share 80 tokens"] == "equal for 6 to 6 of 6 tokens"
    found = run(tmp_path, "sync")
    assert found["waits"] == {} and set(found["features"]) > {"top_k", "allowed_token_ids", "score"}
    found = run(tmp_path, "work")
    assert all(found[name]["tokens_per_s"] > 0 for name in first_card.TARGETS)
    assert found["waits"]["steps"]["decodes only"] > 5
    assert found["waits"]["mean_ms"]["with prompts"]["forward"] > 0
    assert "aten::empty" in found["us per step, 4 sequences"]
    assert len(found := run(tmp_path, "products")) == 5 and not found["warnings"]
    if not shutil.which("compute-sanitizer"):
        assert "not installed" in run(tmp_path, "memcheck")["skipped"]
    report = (tmp_path / "report" / "report.md").read_text()
    assert "- startup: not run" in report and "- sync" not in report
    # models are not sent with the report
    assert not [path for path in (tmp_path / "report").iterdir() if path.is_dir()]


def test_a_part_that_fails_says_so_and_keeps_what_it_knew(tmp_path, monkeypatch):
    out = tmp_path / "report"

    def failing(part):
        part.note(tokens=7)
        written = json.loads((out / "graphs.json").read_text())
        assert written == {"error": "not finished", "tokens": 7}  # if it is killed
        assert "- graphs: not finished" in (out / "report.md").read_text()
        warnings.warn("no decode steps by 'few_rows' here", stacklevel=2)
        raise ValueError("something")

    monkeypatch.setitem(first_card.PARTS, "graphs", failing)
    found = run(tmp_path, "graphs")
    assert found["tokens"] == 7 and found["error"] == "ValueError: something"
    assert found["warnings"] == ["no decode steps by 'few_rows' here"]
    run_ = {"tokens_per_s": 51234.5, "share": 0.761}
    work = {"headline": run_, "single": {"error": "no memory"}, "seconds": 9}
    (out / "work.json").write_text(json.dumps(work))
    (out / "sync.json").write_text(json.dumps({"waits": {"top_k": "error: it synchronizes"}}))
    report = first_card.report(out)
    for line in (
        "- graphs: ValueError: something", "- work, single: no memory",
        "- sync, top_k: error: it synchronizes", "- startup: not run",
        "| headline | 51,234 | 54,000 | 76.1% |", "| single | not measured | 600 |  |",
        "- warning: no decode steps by 'few_rows' here",
    ):  # fmt: skip
        assert f"\n{line}\n" in report, line


@pytest.mark.slow
def test_what_a_stopped_part_started_is_stopped_too(tmp_path):
    """A child writes its number, and waits longer than any test."""
    number = tmp_path / "number"
    child = f"import os, time; open({str(number)!r}, 'w').write(str(os.getpid())); time.sleep(999)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert first_card.run_limited([sys.executable, "-c", parent], 3) == -1
    for _ in range(100):  # until the system has removed it
        if not psutil.pid_exists(int(number.read_text())):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("it is still there")
    assert first_card.run_limited([sys.executable, "-c", "raise SystemExit(3)"], 60) == 3


def test_the_parts_share_the_time_and_the_first_ones_come_first(tmp_path, monkeypatch):
    now, ran = [0.0], []

    def run_limited(words, limit):
        ran.append((words[-1], limit))
        now[0] += limit
        return -1

    monkeypatch.setattr(first_card, "run_limited", run_limited)
    monkeypatch.setattr(first_card.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("TRITON_CACHE_DIR", "another")
    first_card.run_all(list(first_card.PARTS), tmp_path, tmp_path / "work", tiny=True)
    assert ran[:2] == [("facts", 30), ("work", 240)]
    assert 590 < sum(limit for _, limit in ran) <= 600 and len(ran) < len(first_card.PARTS)
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "work" / "triton")


@pytest.mark.slow
def test_the_script_runs_the_parts_asked_for_and_writes_the_report(tmp_path):
    """With FUZZ all of them: start-up makes processes of its own."""
    names = [] if os.environ.get("FUZZ") else ["facts"]
    out = tmp_path / "report"
    places = {"FIRST_CARD_OUT": str(out), "FIRST_CARD_WORK": str(tmp_path / "work")}
    env = os.environ | places | {"PYTHON": sys.executable, "PYTHONPATH": SRC}
    script = [ROOT / "benchmarks" / "first_card.sh", "--tiny", *names]
    done = subprocess.run(script, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ran = sorted(path.stem for path in out.glob("*.json"))
    assert ran == (names or sorted(first_card.PARTS))
    report = (out / "report.md").read_text()
    assert "- torch: " in report and (names or "\n## Failures\n\nnone\n" in report)
