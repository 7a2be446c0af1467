"""The `microvllm` command. A user's mistake prints one line, and the exit status is 2. Importing
torch takes seconds, so each command imports it after its flags were checked."""

from __future__ import annotations


def main(argv: list[str] | None = None) -> None:
    """The entry point of the console script."""
    try:
        from .flags import make_parser
        from .terminal import execute

        execute(make_parser().parse_args(argv))
    except KeyboardInterrupt:  # before a command runs
        raise SystemExit(130) from None
