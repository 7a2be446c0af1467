"""The microvllm command, run in a test's own process, and what is said to it."""

import io
import json
import sys

import pytest

from microvllm import cli

from .goldens import ERAS

SMALL = ["--num-blocks", "40"]  # a pool that any machine has room for
CALCULATOR = ["-m", str(ERAS / "tool_chain" / "chatsft_checkpoints" / "d1")]
CALCULATOR += ["--tokenizer-dir", str(ERAS / "tool_chain" / "tokenizer")]


class Terminal(io.StringIO):
    """Typed or shown text that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def command(capsys, monkeypatch):
    """Run the command in this process; returns (its output, what it says beside it)."""

    def call(*flags: str, stdin: str = "") -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        cli.main([str(flag) for flag in flags])
        return capsys.readouterr()

    return call


@pytest.fixture
def mistake(command, capsys):
    """The one line of a user's mistake, with exit status 2."""

    def call(*flags: str, stdin: str = "") -> str:
        with pytest.raises(SystemExit) as stop:
            command(*flags, stdin=stdin)
        out, err = capsys.readouterr()
        assert (stop.value.code, out) == (2, "")
        assert err.startswith("microvllm") and err.index("\n") == len(err) - 1
        assert "Errno" not in err  # words, and no number of the system's
        return err

    return call


def talk(command, *flags: str, lines: list[str]) -> list[dict]:
    """The turns of a conversation, greedy."""
    flags = ["--json", "--temperature", "0", *flags]
    out, _ = command("chat", *flags, stdin="".join(line + "\n" for line in lines))
    return [json.loads(line) for line in out.splitlines()]
