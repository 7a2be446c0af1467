"""`microvllm learn`: the course's steps, where the reader is, and the check of an exercise."""

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


def state_file() -> Path:
    """Where the reader's progress is kept: XDG's place for state, which may be deleted."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "microvllm" / "learn.json"


def read_state() -> dict:
    """{"ran": steps, "solved": exercises, "folder": the reader's, or None}; a file that is missing
    or damaged is an empty one."""
    state = {"ran": [], "solved": [], "folder": None}
    try:
        found = json.loads(state_file().read_text(encoding="utf-8"))
        right = {k: v for k, v in found.items() if isinstance(v, (list, str)) and k in state}
        return state | right
    except (OSError, ValueError, AttributeError):
        return state


def write_state(state: dict) -> None:
    """Keep the progress, or say why not: a step has run even where nothing can be written."""
    file = state_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(state), encoding="utf-8")
    except OSError as error:
        terminal.note(f"your progress is not kept: {error}")


def steps() -> list[tuple[Path, Path, str]]:
    """(script, page, title) of each step."""
    scripts = sorted(COURSE.glob("step[0-9][0-9]_*.py"))
    if not scripts:
        raise ValueError(f"the course is not in this install: there is no {COURSE}")
    pages = [COURSE / f"{s.stem[4:].replace('_', '-')}.md" for s in scripts]
    titles = [page.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ") for page in pages]
    return list(zip(scripts, pages, titles, strict=True))


def load(file: Path) -> ModuleType:
    """A Python file as a module, whatever its folder is called."""
    spec = importlib.util.spec_from_file_location(f"course_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(folder: str, state: dict) -> None:
    """Copy the exercises to a folder of the reader's."""
    target = Path(folder).expanduser().absolute()
    target.mkdir(parents=True, exist_ok=True)
    file = target / "exercises.py"
    if file.exists():
        terminal.note(f"{file} is there already, and stays as it is")
    else:
        shutil.copy(COURSE / "exercises.py", file)
    write_state(state | {"folder": str(target)})
    terminal.say(f"write your solutions into {file}; `microvllm learn 1 --check` judges the first")


def check(number: int, state: dict) -> None:
    """Say whether an exercise is solved; the exit status is 0 if it is."""
    file = Path(state["folder"] or "", "exercises.py")
    if not state["folder"] or not file.is_file():
        gone = f"{file} is gone" if state["folder"] else "there is no copy of the exercises"
        raise ValueError(f"{gone}: make one with `microvllm learn --start DIR`")
    try:
        work = load(file)
    except Exception as error:  # the reader's own code may raise anything
        raise ValueError(f"{file} cannot be loaded: {type(error).__name__}: {error}") from None
    wrong = load(COURSE / "check.py").verdict(number, work)
    if wrong is None:
        write_state(state | {"solved": sorted({*state["solved"], number})})
    terminal.say(f"exercise {number}: " + ("solved" if wrong is None else f"not yet: {wrong}"))
    sys.exit(wrong is not None)


def learn(args: argparse.Namespace) -> None:
    """List the steps, run one, or check its exercise."""
    state, found = read_state(), steps()
    if args.start:
        return start(args.start, state)
    if args.number is None:
        if args.check:
            raise ValueError("--check wants the number of a step: `microvllm learn 1 --check`")
        for number, (_, page, title) in enumerate(found, 1):
            marks = ["run"] * (number in state["ran"]) + ["solved"] * (number in state["solved"])
            terminal.say(f"{title:58}{', '.join(marks):12}{page}")
        ahead = [n for n in range(1, len(found) + 1) if n not in state["ran"]]
        terminal.say(f"\nnext: microvllm learn {ahead[0]}" if ahead else "\nyou have run them all")
        return None
    if args.number > len(found):
        raise ValueError(f"there is no step {args.number}: the steps are 1 to {len(found)}")
    if args.check:
        return check(args.number, state)
    script, page, title = found[args.number - 1]
    terminal.say(f"{title}. The page: {page}\n")
    sys.stdout.flush()
    done = subprocess.run([sys.executable, str(script)])
    if done.returncode:
        sys.exit(done.returncode)
    write_state(state | {"ran": sorted({*state["ran"], args.number})})
