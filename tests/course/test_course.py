"""The course: each step's tokens are those of the step before, its page tells the truth, and its
exercise can be solved."""

import difflib
import importlib
import inspect
import json
import os
import re
import sys
from pathlib import Path

import pytest
from helpers import course_solutions as solutions
from helpers.goldens import ROOT

import microvllm.cli.learn as learn
from microvllm.cli import main

COURSE = ROOT / "course"
SCRIPTS = sorted(COURSE.glob("step*.py"))
NAMES = [script.stem for script in SCRIPTS]
PAGES = [COURSE / f"{name[4:].replace('_', '-')}.md" for name in NAMES]
CORE = "blocks", "scheduler", "attention", "engine"
EARLY = NAMES[:9]  # the tenth is the engine, whose samples are drawn with other random numbers


@pytest.fixture(scope="module")
def common():
    sys.path.insert(0, str(COURSE))  # as `python course/step01_naive.py` has it
    try:
        yield importlib.import_module("common")
    finally:
        sys.path.remove(str(COURSE))


@pytest.fixture(scope="module")
def model(common):
    return common.Model()


def serve(common, model, name, requests, **limits):
    return common.run(importlib.import_module(name).serve, model, requests, **limits)


def test_all_steps_make_the_same_tokens(common, model):
    """Greedy and drawn ones, in the same order of nothing but their own text."""
    requests = common.ask(model, [("Who wrote Emma?", 10), ("Hello!", 5), ("My", 1)], n=2)
    found = {name: serve(common, model, name, requests) for name in EARLY}
    first = found[NAMES[0]].outputs
    assert len(first) == 6 and {len(tokens) for tokens in first.values()} >= {1, 5}
    for name, meter in found.items():
        assert meter.outputs == first, name
    rows = {name: meter.counts["rows computed"] for name, meter in found.items()}
    assert rows[NAMES[0]] > rows[NAMES[1]] > rows[NAMES[5]] == rows[NAMES[7]]
    # one for each prompt, whose n is 2, but the last: its samples end with their first token
    assert found[NAMES[5]].counts["blocks copied"] == 2


def test_a_tiny_pool_changes_no_token(common, model):
    """Steps 8 and 9 preempt, with samples that share blocks; the steps before stop."""
    requests = common.ask(model, [("Hello!", 10), ("Describe the sea.", 12)], n=2)
    wanted = serve(common, model, NAMES[6], requests).outputs
    for name in NAMES[7:9]:
        meter = serve(common, model, name, requests, memory=48)
        assert meter.counts["preemptions"] and meter.outputs == wanted, name
    with pytest.raises(common.PoolFull):
        serve(common, model, NAMES[6], requests, memory=48)
    for name in NAMES[3:9]:  # a request that can never fit is an error, not a loop without end
        with pytest.raises(common.PoolFull):
            serve(common, model, name, requests, memory=16)


def test_no_requests_at_all(common, model):
    for name in EARLY:
        assert serve(common, model, name, []).outputs == {}


def test_sizes():
    """A step is a file of at most 150 lines, and at most 90 of them are changed ones. So is what a
    reader should know of all steps."""
    assert len(SCRIPTS) == len(PAGES) == 10
    assert len((COURSE / "common.py").read_text(encoding="utf-8").splitlines()) <= 150
    for script, page in zip(SCRIPTS, PAGES, strict=True):
        code, text = (p.read_text(encoding="utf-8").splitlines() for p in (script, page))
        assert len(code) <= 150, script
        assert len(text) <= 110 and max(map(len, text)) <= 160, page
        assert text[0].startswith(f"# Step {int(script.stem[4:6])}: ")
        assert page.name in "\n".join(code[:3])
        drawings = re.findall(r"^```text\n(.+?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
        assert max(map(len, "".join(drawings).splitlines())) <= 84, page  # the book's column
    for before, script in zip(SCRIPTS, SCRIPTS[1:], strict=False):
        a, b = (p.read_text(encoding="utf-8").splitlines() for p in (before, script))
        codes = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
        parts = [(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in codes if kind != "equal"]
        changed, new = sum(map(max, parts)), sum(j for _, j in parts)
        print(f"{script.stem:22} {changed} lines changed, {new} of them to read")
        # in the tenth the engine takes the place of all that was: only what is new counts
        assert (new if script is SCRIPTS[-1] else changed) <= 90, script


def test_the_names_of_the_engine_exist():
    """Each page says where its idea lives: `name` in `src/microvllm/file.py`, and it is there."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        part = text[text.index("**In the engine.**" if page != PAGES[-1] else "**Where the id") :]
        places = dict.fromkeys(re.findall(r"`src/(microvllm/[\w/]+\.py)`", part))
        assert places, page
        files = [importlib.import_module(p[:-3].replace("/", ".")) for p in places]
        names = re.findall(r"`([A-Za-z_]+(?:\.\w+)?)`", part)
        assert names, page
        for name in set(names) - {"cu_seqlens", "num_computed"}:
            owner, _, member = name.partition(".")
            holders = [getattr(file, owner, None) for file in files]
            assert any(h is not None and (not member or hasattr(h, member)) for h in holders), (
                page.name, name,
            )  # fmt: skip


def test_the_words_of_the_engine_exist():
    """The table of step 1: names of the course in its steps, names of the engine in the core."""
    page = PAGES[0].read_text(encoding="utf-8")
    part = page[page.index("**The words of the engine.**") : page.index("**A question")]
    rows = re.findall(r"^\| (.+?) \| (.+?) \|", part, re.M)[1:]
    assert len(rows) == 7
    core = [importlib.import_module(f"microvllm.{name}") for name in CORE]
    steps = "".join(
        script.read_text(encoding="utf-8") for script in [*SCRIPTS, COURSE / "common.py"]
    )
    for ours, theirs in rows:
        for name in re.findall(r"`(\w+)`", ours):
            assert re.search(rf"(def|class|self\.) ?{name}\b", steps), name
        for name in re.findall(r"`([\w.]+)`", theirs):
            owner, _, member = name.partition(".")
            holders = [getattr(module, owner) for module in core if hasattr(module, owner)]
            known = [*dir(holders[0]), *vars(holders[0]).get("__slots__", ())]
            source = inspect.getsource(holders[0])
            assert not member or member in known or f"self.{member}" in source, name


def test_the_figure_of_a_d20_is_right():
    page = PAGES[1].read_text(encoding="utf-8")
    size = solutions.kv_bytes(20, 10, 128, 1, 2)
    weights = 2 * (
        2 * 65_536 * 1_280 + 20 * 12 * 1_280**2
    )  # two embeddings, twelve squares a layer
    for number in size, 2_048 * size, weights, 16 * 2_048 * size:
        (line,) = [x for x in page.splitlines() if f" {number:,}" in x]
        assert line.count("#") == round(number / 100e6)


def test_the_pages_have_all_parts():
    for number, page in enumerate(PAGES, 1):
        text = page.read_text(encoding="utf-8")
        for part in ("The problem", "What it gains", "What it costs", f"Exercise {number}"):
            assert f"**{part}.**" in text or f"**{part}**" in text, (page.name, part)
        assert "question" in text and "```text" in text and "@@" not in text
        for link in re.findall(r"\]\((\w[^):]*)\)", text):
            assert (COURSE / link).exists(), (page.name, link)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("FUZZ"), reason="takes half a minute: set FUZZ")
def test_the_pages_have_the_figures_of_a_run(common, model, monkeypatch, capsys, tmp_path):
    """Every step runs as a reader runs it, and its page has the counts that it prints."""
    figures = importlib.import_module("figures")
    inner, known = figures.run, {}
    monkeypatch.chdir(tmp_path)

    def run(serve, model, requests, **limits):  # each run once: two steps compare with it
        memory = limits.get("memory", common.MEMORY)
        key = serve.__module__, json.dumps([[r.prompt, r.n] for r in requests]), memory
        if key not in known:
            known[key] = inner(serve, model, requests, **limits)
        return known[key]

    monkeypatch.setattr(figures, "run", run)
    for name, page in zip(NAMES, PAGES, strict=True):
        old, new = importlib.import_module(name).main(model=model)
        printed, text = capsys.readouterr().out, page.read_text(encoding="utf-8")
        assert printed.startswith("The problem: ") and "{" not in printed.split("\n")[0]
        for line in common.counts(old, new):
            assert line in text, (page.name, line)
    assert '"e":"preempt"' in (tmp_path / "lab-results" / "step10.html").read_text("utf-8")


def test_exercises(monkeypatch):
    """Each check accepts a solution, and says of the empty exercises that they are empty."""
    check = learn.load(COURSE / "check.py")
    empty = learn.load(COURSE / "exercises.py")
    for number in range(1, 11):
        assert check.verdict(number, solutions) is None, number
        assert check.verdict(number, empty) == "you haven't implemented this yet"
    for name in [name for name, value in vars(solutions).items() if callable(value)]:
        for wrong in (lambda *_: None, lambda *_: 0, lambda first, *_: first, lambda *_: [[0]]):
            monkeypatch.setattr(solutions, name, wrong)
            number = [c.__name__ for c in check.CHECKS].index(name) + 1
            assert check.verdict(number, solutions), name


def test_every_exercise_has_three_hints():
    hints = learn.load(COURSE / "hints.py").HINTS
    assert [*hints] == [*range(1, 11)]
    assert all(len(texts) == len({*texts}) == 3 for texts in hints.values())


@pytest.fixture
def mine(common):
    """course/mine.py, which runs a step with the reader's function in it."""
    return importlib.import_module("mine")


@pytest.mark.slow
@pytest.mark.parametrize("number", [6, 8, 9])
def test_a_step_runs_with_the_readers_function(number, mine, common, model, monkeypatch, capsys):
    """It is called, makes the same tokens, and is gone again after the run."""
    name, calls = mine.STEPS[number][1], []
    inner = getattr(solutions, name)

    def counted(*words):
        calls.append(words)
        return inner(*words)

    monkeypatch.setattr(solutions, name, counted)
    old, new = mine.run(number, solutions, model=model)
    assert calls and old.outputs == new.outputs
    assert "The same tokens as the step before" in capsys.readouterr().out
    assert not any(vars(common.mine).values())


@pytest.mark.slow
def test_a_wrong_function_of_the_reader_is_one_line(mine, common, model, monkeypatch):
    empty = learn.load(COURSE / "exercises.py")
    with pytest.raises(ValueError, match="you haven't implemented `write` yet"):
        mine.run(6, empty, model=model)
    monkeypatch.setattr(empty, "write", lambda *_: 1 / 0)
    before = importlib.import_module(NAMES[5]).Pool.grow
    with pytest.raises(ValueError, match="your `write` raised ZeroDivisionError"):
        mine.run(6, empty, model=model)
    assert importlib.import_module(NAMES[5]).Pool.grow is before
    monkeypatch.setattr(empty, "victim", lambda running: len(running))
    with pytest.raises(ValueError, match="your `victim` raised IndexError"):
        mine.run(8, empty, model=model)
    assert not any(vars(common.mine).values())


DAMAGED = ("", "[]", "[" * 100_000, '{"ran": 1}', '{"ran": [[]], "solved": [], "folder": null}',
           '{"ran": [1e999], "solved": [], "folder": null}', '"ran"', "\xff")  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_progress_is_none(text, tmp_path, monkeypatch):
    # a number without end, and what nests without end, were tracebacks
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    learn.state_file().parent.mkdir()
    learn.state_file().write_bytes(text.encode("latin-1"))
    assert learn.read_state() == {"folder": "", "ran": [], "solved": [], "hints": {}}
    learn.write_state(ran=[1], solved=[2], folder="here")
    assert learn.read_state() == {"folder": "here", "ran": [1], "solved": [2], "hints": {}}


def test_learn(tmp_path, monkeypatch, capsys):
    """The list, a copy, a check, a run; mistakes are one line."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    work = tmp_path / "mine"

    def told(*words, status=None):
        if status is None:
            main(["learn", *words])
        else:
            with pytest.raises(SystemExit) as ended:
                main(["learn", *words])
            assert ended.value.code == status, capsys.readouterr()
        out = capsys.readouterr()
        return out.out + out.err

    assert told().count("Step ") == 10
    assert "learn --start DIR" in told("1", "--check", status=2)
    for flag in "--check", "--hint", "--mine":
        assert "needs the number" in told(flag, status=2)
    assert "1 to 10" in told("11", status=2)
    told("--start", str(work))
    assert "haven't implemented this yet" in told("1", "--check", status=1)
    (work / "exercises.py").write_text(Path(solutions.__file__).read_text())
    assert "was not changed" in told("--start", str(work))
    assert "steps 6, 8 and 9, not 7" in told("7", "--mine", status=2)
    hints = learn.load(COURSE / "hints.py").HINTS
    for place, text in enumerate(hints[3], 1):
        assert told("3", "--hint") == f"{place} of 3: {text}\n"
    assert told("3", "--hint").count(" of 3: ") == 3  # all of them, once more
    assert told("4", "--hint").startswith("1 of 3")
    assert "exercise 1: solved" in told("1", "--check", status=0)
    (work / "exercises.py").write_text("def (")
    assert "cannot be loaded" in told("1", "--check", status=2)
    (work / "exercises.py").unlink()
    assert "is missing" in told("1", "--check", status=2)

    class Done:
        returncode = 0

    monkeypatch.setattr(learn.subprocess, "run", lambda words: ran.append(words[-1]) or Done())
    ran = []
    told("2")
    assert ran == [str(SCRIPTS[1])]
    listed = told().splitlines()
    assert "solved" in listed[0] and " run" in listed[1] and listed[-1].endswith("learn 1")
    told("1")
    assert told().splitlines()[-1].startswith("next: exercise 2, microvllm learn 2 --check")
    learn.write_state(solved=[1, 2])
    assert told().splitlines()[-1] == "next: microvllm learn 3"
    learn.write_state(ran=[*range(1, 11)], solved=[*range(1, 11)])
    assert told().splitlines()[-1] == "you have run all steps and solved all exercises"
    learn.write_state(ran=[2], solved=[1])
    learn.state_file().write_text("{")  # damaged: as if it were not there
    assert "solved" not in told()
    for damaged in '{"ran": 5, "folder": 7}', '{"ran": ["x"]}', '{"hints": [3]}', "[1]":
        learn.state_file().write_text(damaged)
        assert told().count("Step ") == 10
    learn.state_file().write_text('{"ran": [2], "solved": [], "folder": null}')  # an older one
    assert " run" in told().splitlines()[1]
    monkeypatch.setattr(learn, "COURSE", tmp_path)
    assert "not in this install" in told(status=2)
