"""The demo shows all four things that can happen to a block, soon, and leads to the page."""

import json
import re
from pathlib import Path

import pytest

from lab import demo
from microvllm.cli import commands
from microvllm.trace import Replay, read

COURSE = Path(__file__).parents[2] / "course"

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_hit_a_copy_a_preemption_and_an_eviction_within_100_steps(tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr(demo.webbrowser, "open", lambda url: opened.append(url) or True)
    demo.main(["--out", str(tmp_path)])
    told = capsys.readouterr().out
    assert not opened, "stdout is no terminal"
    assert all(words in told for words in demo.KINDS.values()) and "demo.html" in told
    events = read(tmp_path / "demo.jsonl")
    steps = demo.first_steps(events)
    assert set(steps) == {"hit", "copy", "preempt", "evict"}
    assert sum(event["e"] == "begin" for event in events) <= 100
    assert max(steps.values()) < 100
    # the pages of the course send their readers to these steps
    for name, kind in (
        ("06-sharing", "copy"),
        ("07-prefix-cache", "hit"),
        ("08-preemption", "preempt"),
    ):
        seen = (COURSE / f"{name}.md").read_text(encoding="utf-8").split("**See it.**")[1]
        assert int(re.search(r"[Ss]tep (\d+)", seen)[1]) == steps[kind], name
    # what was found by its hash was computed once, and a preempted sequence lost nothing
    replay = Replay(events)
    assert {life.state for life in replay.seqs.values()} == {"done"}
    found = sorted(len(life.tokens) - life.prompt for life in replay.seqs.values())
    assert found == sorted(new for _, _, n, new in demo.SCENE for _ in range(n))
    assert replay.num_groups == 1 and replay.num_used == 0
    page = (tmp_path / "demo.html").read_text(encoding="utf-8")
    assert json.loads(page.split('type="application/json">')[1].split("</script>")[0]) == events


@pytest.mark.parametrize(
    ("tty", "display", "opens"), [(True, ":0", True), (True, "", False), (False, ":0", False)]
)
def test_a_browser_is_opened_only_where_a_person_sees_it(monkeypatch, tty, display, opens):
    monkeypatch.setattr(demo.sys.stdout, "isatty", lambda: tty, raising=False)
    monkeypatch.setattr(demo.sys, "platform", "linux")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("DISPLAY", display)
    assert demo.has_screen() is opens


def test_mistakes_are_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "record", lambda path: [{"e": "preempt"}])
    monkeypatch.setattr(demo.shutil, "which", lambda name: None)
    cases = [["--picture", str(tmp_path / "x.png"), "--out", str(tmp_path)], ["--out", "/dev/null"]]
    for flags, told in zip(cases, ("chromium", "/dev/null"), strict=True):
        with pytest.raises(SystemExit) as stop:
            demo.main(flags)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and told in err and err.count("\n") == 1
    monkeypatch.undo()
    monkeypatch.setattr(commands, "MODEL_DIR", tmp_path / "nowhere")
    with pytest.raises(SystemExit):
        demo.main(["--out", str(tmp_path)])
    assert "nowhere" in capsys.readouterr().err
