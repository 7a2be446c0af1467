"""What the command prints, and where: no text steers a terminal, and any stream may be closed."""

import ast
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import SMALL, Terminal
from helpers.goldens import PACKAGE, ROOT

from microvllm import cli
from microvllm.cli import terminal

pytestmark = pytest.mark.usefixtures("one_thread")
HOSTILE = "\x1b]0;title\x07\x1b[31m\x9b2J\x7f\rabc\u202edef\u2066\u061c\u200f"


def test_all_that_is_printed_goes_one_way():
    """So that what is said of one `print` is true of all."""
    for file in (PACKAGE / "cli").glob("*.py"):
        tree = ast.parse(file.read_text())
        own = [n for n in ast.walk(tree) if getattr(n, "name", "") in ("say", "note")]
        allowed = {id(node) for function in own for node in ast.walk(function)}
        for node in ast.walk(tree):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            printed = re.fullmatch(r"print|sys\.(__)?std(out|err)(__)?\.write", called)
            assert not printed or id(node) in allowed, f"{file.name}:{node.lineno}"


@pytest.mark.parametrize("on_terminal", [True, False])
@pytest.mark.parametrize(
    "flags",
    [
        ["run", "--raw"],
        ["run", "--raw", "{text}"],
        ["run", "-n", "2", "{text}"],
        ["run", "--json"],
        ["score", "--file", "{file}"],
        ["score", "{text}", "{text}"],
        ["chat"],
    ],
)
def test_no_prompt_and_no_row_steers_the_terminal(flags, on_terminal, monkeypatch, tmp_path):
    shown, file = Terminal() if on_terminal else io.StringIO(), tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": HOSTILE, "continuations": [f" {HOSTILE}"]}) + "\n")
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", said := io.StringIO())
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{HOSTILE}\n/\u202e{HOSTILE}\n" * 2))
    more = [] if flags[0] == "score" else ["--max-tokens", "2"]
    cli.main([flag.format(text=HOSTILE, file=file) for flag in flags] + SMALL + more)
    if on_terminal:
        steers = re.compile(
            "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
        )
        assert not steers.search(shown.getvalue() + said.getvalue())
        assert flags[0] == "chat" or "abc" in shown.getvalue()
    elif flags[0] == "score":
        assert HOSTILE in shown.getvalue(), "a file gets the text as it is"


def test_a_note_steers_no_terminal_and_letters_of_any_script_stay(capsys):
    terminal.note("a\u202e\x1b[2J")
    assert capsys.readouterr().err == "a\ufffd\ufffd[2J\n"
    assert terminal.plain("שלום \u200d é\t\n") == "שלום \u200d é\t\n"


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_a_closed_stream_leads_nowhere(name, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO("Who wrote Emma?\n"))
        patch.setattr(sys, name, None)
        flags = ["--temperature", "0", *SMALL, "Who wrote Emma?", "Who wrote Moby Dick?"]
        cli.main(["run", *flags])
        cli.main(["chat", *flags[:4]])
        for text in flags[4:]:
            cli.main(["run", *flags[:4], text])
        if name == "stdin":
            with pytest.raises(SystemExit) as stop:
                cli.main(["run", *SMALL])
            assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert ("Jane Austen" in out) is (name != "stdout")
    assert ("no prompt: give one" in err) is (name == "stdin")


@pytest.mark.slow
@pytest.mark.parametrize(
    "closed, commands",
    [("<&-", ["run"]), (">&-", ["chat"]), ("2>&-", ["run"]), ("<&- >&- 2>&-", ["run", "chat"])],
)
def test_a_shell_may_close_any_stream(closed, commands, tmp_path):
    """And no file that is opened later takes its number, with what a library writes there."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Who wrote Emma?"}\n')
    batch = f"batch {source} -o {output} --num-blocks 40"
    lines = {"run": "run --num-blocks 40 hi", "chat": "chat"}
    for line in (batch, *map(lines.get, commands)):
        shell = f"{sys.executable} -m microvllm {line} {closed}"
        done = subprocess.run(shell, shell=True, cwd=ROOT, capture_output=True, stdin=-3)
        assert (done.returncode, done.stderr) == (0, b""), line
        assert bool(done.stdout) == (line[:3] == "run" and ">&-" not in closed.split())
    assert len(output.read_text().splitlines()) == 1


FULL = [["--help"], ["run", "--help"], ["--version"], ["learn"], ["chat", *SMALL]]
LOADED = [[*line.split(), *SMALL, "--max-tokens", "2"] for line in ("run a", "run a b --json")]
LOADED += [["bench", "--num-prompts", "1", *LOADED[0][2:]], ["score", "a", "b", "c", *SMALL]]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("lines", "unbuffered"),
    [(FULL, True), pytest.param([*FULL, *LOADED, ["info"]], False, marks=pytest.mark.slow)],
    ids=["as with PYTHONUNBUFFERED", "buffered"],
)
def test_every_command_tells_in_one_line_that_the_disk_is_full(
    lines, unbuffered, monkeypatch, capsys
):
    for flags in lines:
        with open("/dev/full", "wb", buffering=0 if unbuffered else -1) as full:
            stdout = io.TextIOWrapper(full, write_through=unbuffered)
            monkeypatch.setattr(sys, "stdout", stdout)
            monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
            with pytest.raises(SystemExit) as stop:
                cli.main(flags)
            stdout.close()  # what is left in it leads nowhere now
        said = capsys.readouterr().err
        assert (stop.value.code, said.count("\n")) == (2, 1), (flags, said)
        assert "error: stdout cannot be written: No space left on device" in said, flags


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_in_one_line():
    shell = f"{sys.executable} -m microvllm run hi > /dev/full"
    done = subprocess.run(shell, shell=True, cwd=ROOT, capture_output=True, stdin=-3)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1, done.stderr
    assert b"error: stdout cannot be written: No space left on device" in done.stderr
    shell = f"{sys.executable} -m microvllm run hi 2> /dev/full"
    done = subprocess.run(shell, shell=True, cwd=ROOT, capture_output=True, stdin=-3)
    assert done.returncode == 0 and done.stdout
