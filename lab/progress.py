"""The reader's progress: the copy of the exercises, the solved exercises, and the seen hints."""

from __future__ import annotations

from pathlib import Path

from microvllm.cli import learn, terminal
from microvllm.cli.terminal import Parser, positive

from . import hints

HERE = Path(__file__).parent


def titles() -> dict[int, tuple[str, str]]:
    """(name of the function, title) of each exercise, from EXERCISES.md."""
    names = {}
    for line in (HERE / "EXERCISES.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and "**" in line:
            _, number, task, *_ = line.split("|")
            title, text = task.split("**")[1:]
            names[int(number)] = text.split("`")[1], title.rstrip(".")
    return names


# programs of `microvllm lab` ----------------------------------------------------------------------


def start(argv: list[str]) -> None:
    """Start: copy the exercises to a folder, and write the trace page of exercise 13."""
    parser = Parser(prog="microvllm lab start", description=start.__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path)
    args = parser.parse_args(argv)
    with terminal.user_errors(args):
        file = learn.copy_exercises("lab", HERE, args.folder)
        if not file.with_name("exercise-13.html").exists():
            from . import scenes

            try:
                with terminal.at_once():
                    scenes.record(13, file.parent)
            except (ImportError, ValueError) as error:  # no torch, or no bundled model
                terminal.note(f"exercises 11 to 13 cannot run here: {error}")
    sheet = HERE / "EXERCISES.md"
    terminal.say(f"write your solutions into {file}. The exercises: {sheet}")
    terminal.say("`microvllm lab check 1` checks the first, `microvllm lab hint 1` shows a hint")


def exercises(argv: list[str]) -> None:
    """Exercises: list all exercises, with those solved and the number of hints seen."""
    Parser(prog="microvllm lab exercises", description=exercises.__doc__).parse_args(argv)
    state = learn.read_state("lab")
    for number, (name, title) in titles().items():
        num_seen = state["hints"].get(str(number), 0)
        marks = ["solved"] if number in state["solved"] else []
        if num_seen > 0:
            marks.append(f"{num_seen} of 3 hints")
        terminal.say(f"{number:2}  {title:12}{name:26}{', '.join(marks)}".rstrip())
    folder = state["folder"] or "none yet: `microvllm lab start DIR` makes one"
    terminal.say(f"\nyour copy: {folder}\nthe exercises: {HERE / 'EXERCISES.md'}")


def hint(argv: list[str]) -> None:
    """Hint: show the next of three hints for an exercise; with --again, all seen so far."""
    parser = Parser(prog="microvllm lab hint", description=hint.__doc__)
    parser.add_argument("number", type=positive, metavar="N")
    parser.add_argument("--again", action="store_true", help="show only the hints seen so far")
    args = parser.parse_args(argv)
    if args.number > len(hints.HINTS):
        parser.error(f"the exercises are 1 to {len(hints.HINTS)}")
    state, key = learn.read_state("lab"), str(args.number)
    texts = hints.HINTS[args.number]
    num_seen = min(state["hints"].get(key, 0), len(texts))
    num_shown = num_seen if args.again else min(num_seen + 1, len(texts))
    if num_shown > num_seen:
        learn.write_state("lab", hints=state["hints"] | {key: num_shown})
    elif not args.again:
        terminal.note("you have seen all three hints; the solution is in lab/solutions.py")
    for i in range(0 if args.again else num_shown - 1, num_shown):
        terminal.say(f"{i + 1} of {len(texts)}: {texts[i]}")
