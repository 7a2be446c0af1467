"""Your copy of the exercises, what of it is solved, and the hints that you have seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

from microvllm.cli import learn, terminal
from microvllm.cli.terminal import Parser, positive

from . import hints

HERE = Path(__file__).parent


def state_file() -> Path:
    return learn.state_file().with_name("lab.json")


def read_state() -> dict:
    """{"folder": the reader's, "solved": exercises, "hints": {exercise: how many were seen}}; a
    file that is missing or damaged is an empty one."""
    try:
        found = json.loads(state_file().read_text(encoding="utf-8"))
        return {
            "folder": str(found["folder"]),
            "solved": [int(number) for number in found["solved"]],
            "hints": {str(int(key)): int(count) for key, count in found["hints"].items()},
        }
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {"folder": "", "solved": [], "hints": {}}


def write_state(**changes) -> None:
    """Keep what changed, or say why not."""
    file = state_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(read_state() | changes), encoding="utf-8")
    except OSError as error:
        terminal.note(f"your progress is not kept: {error}")


def note(number: int, solved: bool) -> None:
    """An exercise was judged."""
    before = {*read_state()["solved"]}
    after = before | {number} if solved else before - {number}
    if after != before:
        write_state(solved=sorted(after))


def load() -> ModuleType:
    """The reader's exercises. Raises ValueError if there are none, or if they cannot be loaded."""
    folder = read_state()["folder"]
    file = Path(folder, "exercises.py")
    if not folder or not file.is_file():
        gone = f"{file} is gone" if folder else "there is no copy of the exercises"
        raise ValueError(f"{gone}: make one with `microvllm lab start DIR`")
    try:
        return learn.load(file)
    except Exception as error:  # the reader's own code may raise anything
        raise ValueError(f"{file} cannot be loaded: {type(error).__name__}: {error}") from None


def titles() -> dict[int, tuple[str, str]]:
    """(name of the function, title) of each exercise, as the sheet has them."""
    found = {}
    for line in (HERE / "EXERCISES.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and "**" in line:
            _, number, told, *_ = line.split("|")
            title, text = told.split("**")[1:]
            found[int(number)] = text.split("`")[1], title.rstrip(".")
    return found


# programs of `microvllm lab` ----------------------------------------------------------------------


def start(argv: list[str]) -> None:
    """Start: copy the exercises to a folder of yours, and the trace page of the 13th."""
    parser = Parser(prog="microvllm lab start", description=start.__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path)
    folder = parser.parse_args(argv).folder.expanduser().absolute()
    with terminal.user_errors(parser.parse_args(argv)):
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "exercises.py"
        if file.exists():
            terminal.note(f"{file} is there already, and stays as it is")
        else:
            shutil.copy(HERE / "exercises.py", file)
        if not (folder / "exercise-13.html").exists():
            from . import scenes

            try:
                with terminal.at_once():
                    scenes.record(13, folder)
            except (ImportError, ValueError) as error:  # no torch, or no bundled model
                terminal.note(f"exercises 11 to 13 need what is not here: {error}")
    write_state(folder=str(folder))
    sheet = HERE / "EXERCISES.md"
    terminal.say(f"write your solutions into {file}. What is asked: {sheet}")
    terminal.say("`microvllm lab check 1` judges the first, `microvllm lab hint 1` gives a hint")


def exercises(argv: list[str]) -> None:
    """Exercises: list them, what is solved, and how many hints were seen."""
    Parser(prog="microvllm lab exercises", description=exercises.__doc__).parse_args(argv)
    state = read_state()
    for number, (name, title) in titles().items():
        seen = state["hints"].get(str(number), 0)
        marks = ["solved"] * (number in state["solved"]) + [f"{seen} of 3 hints"] * bool(seen)
        terminal.say(f"{number:2}  {title:12}{name:26}{', '.join(marks)}".rstrip())
    where = state["folder"] or "nowhere yet: `microvllm lab start DIR` copies them"
    terminal.say(f"\nyour copy: {where}\nwhat is asked: {HERE / 'EXERCISES.md'}")


def hint(argv: list[str]) -> None:
    """Hint: the next of the three hints of an exercise; all that were seen with --again."""
    parser = Parser(prog="microvllm lab hint", description=hint.__doc__)
    parser.add_argument("number", type=positive, metavar="N")
    parser.add_argument("--again", action="store_true", help="those that you have seen, no new one")
    args = parser.parse_args(argv)
    if args.number > len(hints.HINTS):
        parser.error(f"the exercises are 1 to {len(hints.HINTS)}")
    state, key = read_state(), str(args.number)
    told = hints.HINTS[args.number]
    before = min(state["hints"].get(key, 0), len(told))
    seen = before if args.again else min(before + 1, len(told))
    if seen > before:
        write_state(hints=state["hints"] | {key: seen})
    elif not args.again:
        terminal.note("you have seen all three; the solution is in lab/solutions.py")
    for place in range(0 if args.again else seen - 1, seen):
        terminal.say(f"{place + 1} of {len(told)}: {told[place]}")
