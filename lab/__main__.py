"""`python -m lab`: list the programs of the lab, or run one."""

from __future__ import annotations

import importlib
import sys

# name of a program -> its module, and the function in it
NAMES = {name: (name, "main") for name in "demo fig02 fig12 fig15 fig16 fig18 policies".split()}
NAMES |= {name: (name, "main") for name in ("windows", "cost")}
NAMES |= {name: ("progress", name) for name in ("exercises", "start", "hint")}
NAMES["check"] = "check", "main"


def main(argv: list[str] | None = None) -> None:
    """Run the program named by the first argument with the other arguments, or list all."""
    from microvllm.cli import terminal

    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: microvllm lab NAME [--help]\n")
        for name, (module_name, function) in NAMES.items():
            module = importlib.import_module(f"lab.{module_name}")
            program = module if function == "main" else getattr(module, function)
            print(f"  {name:11}{program.__doc__.splitlines()[0]}")
        print("\nThe figures are those of the PagedAttention paper (Kwon et al., 2023).")
    elif argv[0] not in NAMES:
        parser = terminal.Parser(prog="microvllm lab")
        parser.error(f"no program {argv[0]!r}: choose from {', '.join(NAMES)}")
    else:
        with terminal.at_once():
            module_name, function = NAMES[argv[0]]
            program = getattr(importlib.import_module(f"lab.{module_name}"), function)
        program(argv[1:])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
