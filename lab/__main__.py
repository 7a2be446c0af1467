"""`python -m lab`: list the labs, or run one."""

from __future__ import annotations

import importlib
import sys

NAMES = "demo fig02 fig12 fig15 fig16 fig18 policies windows cost check".split()


def main(argv: list[str] | None = None) -> None:
    """Run the lab that the first argument names, with the others; without any, list them all."""
    from microvllm.cli import terminal

    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: microvllm lab NAME [--help]\n")
        for name in NAMES:
            told = importlib.import_module(f"lab.{name}").__doc__
            print(f"  {name:10}{told.splitlines()[0]}")
    elif argv[0] not in NAMES:
        parser = terminal.Parser(prog="microvllm lab")
        parser.error(f"no lab {argv[0]!r}: choose from {', '.join(NAMES)}")
    else:
        with terminal.at_once():
            program = importlib.import_module(f"lab.{argv[0]}")
        program.main(argv[1:])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
