"""`microvllm learn`: the steps of the course, the reader's progress, and checks of exercises."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from . import terminal
from .bench import ROOT

COURSE = ROOT / "course"
START = {"learn": "microvllm learn --start DIR", "lab": "microvllm lab start DIR"}
WITH_MINE = 6, 8, 9  # steps that can run the reader's function: course/mine.py
# errors from a damaged state file: missing, not JSON, wrong types, infinite or nested too deep
DAMAGE = OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError


# the reader's progress and copy of the exercises, for the course ("learn") and the lab ("lab") ----


def state_file(of: str = "learn") -> Path:
    """The file with the reader's progress, in XDG's state folder. It may be deleted."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "microvllm" / f"{of}.json"


def read_state(of: str = "learn") -> dict:
    """{"folder": of the exercises, "ran": steps, "solved": exercises, "hints": {exercise: number
    seen}}. A file that is missing or damaged counts as empty."""
    empty = {"folder": "", "ran": [], "solved": [], "hints": {}}
    try:
        found = empty | json.loads(state_file(of).read_text(encoding="utf-8"))
        hints = {str(int(number)): int(count) for number, count in found["hints"].items()}
        ran, solved = ([int(number) for number in found[name]] for name in ("ran", "solved"))
        return {"folder": str(found["folder"] or ""), "ran": ran, "solved": solved, "hints": hints}
    except DAMAGE:
        return empty


def write_state(of: str = "learn", **changes) -> None:
    """Save the changed entries. If the file cannot be written, print a note and continue."""
    file = state_file(of)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(read_state(of) | changes), encoding="utf-8")
    except OSError as error:
        terminal.note(f"your progress is not saved: {terminal.path_problem(error)}")


def mark(of: str, name: str, number: int, done: bool = True) -> None:
    """Note that a step was run, or whether an exercise is solved."""
    before = {*read_state(of)[name]}
    after = before | {number} if done else before - {number}
    if after != before:
        write_state(of, **{name: sorted(after)})


def copy_exercises(of: str, source: Path, folder: str | Path) -> Path:
    """Copy the exercises to the reader's folder, and save its path. Returns the copy."""
    target = Path(os.path.expanduser(folder)).absolute()
    target.mkdir(parents=True, exist_ok=True)
    file = target / "exercises.py"
    if file.exists():
        terminal.note(f"{file} exists already and was not changed")
    else:
        shutil.copy(source / "exercises.py", file)
    write_state(of, folder=str(target))
    return file


def load_exercises(of: str) -> ModuleType:
    """The reader's exercises. Raises ValueError if they are missing or cannot be loaded."""
    folder = read_state(of)["folder"]
    file = Path(folder, "exercises.py")
    if not folder or not file.is_file():
        gone = f"{file} is missing" if folder else "there is no copy of the exercises"
        raise ValueError(f"{gone}: make one with `{START[of]}`")
    try:
        return load(file)
    except Exception as error:  # the reader's own code may raise anything
        raise ValueError(f"{file} cannot be loaded: {type(error).__name__}: {error}") from None


def load(file: Path) -> ModuleType:
    """Load a Python file as a module; its folder may have any name."""
    spec = importlib.util.spec_from_file_location(f"course_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# the course ---------------------------------------------------------------------------------------


def steps() -> list[tuple[Path, Path, str]]:
    """(script, page, title) of each step."""
    scripts = sorted(COURSE.glob("step[0-9][0-9]_*.py"))
    if not scripts:
        raise ValueError(f"the course is not in this install: there is no {COURSE}")
    pages = [COURSE / f"{s.stem[4:].replace('_', '-')}.md" for s in scripts]
    titles = [page.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ") for page in pages]
    return list(zip(scripts, pages, titles, strict=True))


def check(number: int) -> None:
    """Report whether an exercise is solved; the exit status is 0 if it is."""
    work = load_exercises("learn")
    wrong = load(COURSE / "check.py").verdict(number, work)
    mark("learn", "solved", number, wrong is None)
    terminal.say(f"exercise {number}: " + ("solved" if wrong is None else f"not yet: {wrong}"))
    sys.exit(wrong is not None)


def hint(number: int) -> None:
    """Show the next hint for an exercise."""
    texts = load(COURSE / "hints.py").HINTS[number]
    state, key = read_state(), str(number)
    seen = min(state["hints"].get(key, 0), len(texts))
    if seen == len(texts):
        terminal.note("these are all the hints")
        first = 0
    else:
        first, seen = seen, seen + 1
        write_state(hints=state["hints"] | {key: seen})
    for place in range(first, seen):
        terminal.say(f"{place + 1} of {len(texts)}: {texts[place]}")


def next_thing(number_of_steps: int, state: dict) -> str:
    """The reader's next task: the first step not run, or the first exercise not solved."""
    for number in range(1, number_of_steps + 1):
        if number not in state["ran"]:
            return f"next: microvllm learn {number}"
        if number not in state["solved"]:
            start = "" if state["folder"] else f"; first copy the exercises: {START['learn']}"
            return f"next: exercise {number}, microvllm learn {number} --check (or --hint){start}"
    return "you have run all steps and solved all exercises"


def command_of(number: int, script: Path, is_mine: bool) -> list[str]:
    """The command that runs a step, or runs it with the reader's function."""
    if not is_mine:
        return [sys.executable, str(script)]
    if number not in WITH_MINE:
        raise ValueError(f"--mine works with steps 6, 8 and 9, not {number}")
    load_exercises("learn")  # raises ValueError for a mistake in them
    exercises = Path(read_state()["folder"], "exercises.py")
    return [sys.executable, str(COURSE / "mine.py"), str(number), str(exercises)]


def learn(args: argparse.Namespace) -> None:
    """List the steps, run one, or check its exercise."""
    state, found = read_state(), steps()
    if args.start:
        file, first = copy_exercises("learn", COURSE, args.start), "`microvllm learn 1 --check`"
        return terminal.say(f"write your solutions into {file}; {first} checks the first")
    if args.number is None:
        for flag in "check", "hint", "mine":
            if getattr(args, flag):
                raise ValueError(
                    f"--{flag} needs the number of a step: `microvllm learn 6 --{flag}`"
                )
        for number, (_, page, title) in enumerate(found, 1):
            marks = ["run"] * (number in state["ran"]) + ["solved"] * (number in state["solved"])
            terminal.say(f"{title:58}{', '.join(marks):12}{page}")
        terminal.say(f"\n{next_thing(len(found), state)}")
        return None
    if args.number > len(found):
        raise ValueError(f"there is no step {args.number}: the steps are 1 to {len(found)}")
    if args.check:
        return check(args.number)
    if args.hint:
        return hint(args.number)
    script, page, title = found[args.number - 1]
    command = command_of(args.number, script, args.mine)
    terminal.say(f"{title}. The page: {page}\n")
    done = subprocess.run(command)
    if done.returncode:
        sys.exit(done.returncode)
    mark("learn", "ran", args.number)
