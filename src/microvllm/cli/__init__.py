"""The `microvllm` command. A user's mistake is one line and exit status 2. torch takes seconds to
import, so that is done where it is needed, once the flags make sense."""

from __future__ import annotations


def main(argv: list[str] | None = None) -> None:
    """The console script."""
    try:
        from .flags import make_parser
        from .terminal import execute

        execute(make_parser().parse_args(argv))
    except KeyboardInterrupt:  # before a command runs
        raise SystemExit(130) from None
