"""A conversation in the terminal: the user's input and commands, and the turns so far."""

from __future__ import annotations

import json
import os
import re
import select
import sys
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from .terminal import live, note, path_problem, say

if TYPE_CHECKING:
    from .. import LLM, SamplingParams

HELP = """\
/clear        start over (or: clear)
/system TEXT  set the system prompt; without TEXT, remove it
/save FILE    write the conversation to a new file, as JSON
/exit         leave (or: exit, quit, Ctrl-D)
/help         show this list
Lines that are pasted together are one turn. Ctrl-C stops an answer."""
COMMANDS = re.findall(r"^/(\w+)", HELP, re.M)
# the type of a message part that follows each special token
_PARTS = {
    "python_start": "python", "python_end": "text", "output_start": "python_output",
    "output_end": "text",
}  # fmt: skip


def command_of(line: str) -> tuple[str, str] | None:
    """(name, rest of the line) if a line is a command and not for the model, else None."""
    if line.lower() in ("exit", "quit", "clear"):  # as in nanochat's chat_cli
        return line.lower().replace("quit", "exit"), ""
    if found := re.fullmatch(r"/(\w+)(?:[ \t]+(.*))?", line, re.S):
        # a text may begin with a slash, too. it is a command if it is one word or close to a name
        if found[2] is None or get_close_matches(found[1], COMMANDS, 1):
            return found[1], found[2] or ""
    return None


def read_turn() -> str | None:
    """The user's next turn; None at the end (Ctrl-D). On a terminal, Ctrl-C only discards the line,
    and lines that are pasted together are one turn. readline returns a bracketed paste as one text.
    On a terminal without bracketed paste, the next pasted line is available at once."""
    terminal = sys.stdin.isatty()
    while True:
        try:
            # input() without a prompt writes nothing, so that a full disk cannot make it fail
            lines = [input("> ") if terminal and sys.stdout.isatty() else input()]
            with suppress(EOFError):
                while terminal and not command_of(lines[0].strip()) and is_typed():
                    lines.append(input())
            return "\n".join(lines).strip()
        except EOFError:
            if terminal:
                note("")
            return None
        except KeyboardInterrupt:
            if not terminal:
                raise
            note("\n(to leave, press Ctrl-D or type /exit)")


def is_typed() -> bool:
    """Does the terminal have more input already?"""
    with suppress(OSError, ValueError):  # stdin has no file descriptor, or this is Windows
        return bool(select.select([sys.stdin], [], [], 0.05)[0])
    return False


class Conversation:
    """The turns so far. Answers are kept as token ids, with tool outputs, so that the prompt of the
    next turn begins with tokens that the prefix cache has. max_prompt: the largest number of tokens
    in a prompt. Raises ValueError for a tokenizer without chat tokens."""

    def __init__(self, tokenizer, max_prompt: int):
        self.tokenizer = tokenizer
        self.max_prompt = max_prompt
        names = ("user_start", "user_end", "assistant_start", "assistant_end")
        self.user_start, *self.asks, self.end = (
            tokenizer.encode_special(f"<|{name}|>") for name in names
        )
        self.system = ""  # the system prompt, put before the first turn that the model sees
        self.clear()

    def clear(self) -> None:
        """Start over."""
        self.turns: list[tuple[str, list[int]]] = []  # (user's text, token ids of the answer)
        self.num_forgotten = 0  # the first turns that the model no longer sees

    def add(self, line: str, ids: list[int]) -> None:
        """Add a turn after its answer is complete."""
        self.turns.append((line, ids + [self.end] * (ids[-1] != self.end)))

    def render(self, line: str, first: int) -> list[int]:
        """The prompt of a line. It includes the turns from number `first` on."""
        ids, lead = [self.tokenizer.bos_id], self.system and f"{self.system}\n\n"
        for said, answer in [*self.turns[first:], (line, [])]:
            ids += [self.user_start, *self.tokenizer.encode(lead + said), *self.asks, *answer]
            lead = ""
        return ids

    def prompt(self, line: str) -> list[int]:
        """The prompt of a line. If not all turns fit, the older half of them is dropped. It is not
        one turn at a time, because after each drop the remaining turns are computed again. Raises
        ValueError, and drops nothing, for a line that does not fit or cannot be encoded."""
        least = len(self.render(line, len(self.turns)))
        if least > self.max_prompt:
            raise ValueError(f"{least} tokens, but a prompt may have at most {self.max_prompt}")
        while len(ids := self.render(line, self.num_forgotten)) > self.max_prompt:
            self.num_forgotten += (len(self.turns) - self.num_forgotten + 1) // 2
        return ids

    def messages(self) -> list[dict]:
        """The conversation as `LLM.chat` takes it. An answer with a tool call is split in parts."""
        special = self.tokenizer.special_tokens
        kinds = {special[f"<|{m}|>"]: kind for m, kind in _PARTS.items() if f"<|{m}|>" in special}
        found = [{"role": "system", "content": self.system}] if self.system else []
        for said, ids in self.turns:
            pieces: list[tuple[str, list[int]]] = [("text", [])]
            for token in ids:
                if token in kinds:
                    pieces.append((kinds[token], []))
                else:
                    pieces[-1][1].append(token)
            texts = [(kind, self.tokenizer.decode(piece, True)) for kind, piece in pieces]
            content = [{"type": kind, "text": text} for kind, text in texts if text]
            if all(part["type"] == "text" for part in content):
                content = "".join(part["text"] for part in content)
            found.append({"role": "user", "content": said})
            found.append({"role": "assistant", "content": content})
        return found

    def save(self, name: str) -> str:
        """Write the conversation to a new file as JSON; returns a message for the user."""
        path, text = Path(os.path.expanduser(name)), json.dumps(self.messages(), indent=2) + "\n"
        try:
            with open(path, "x", encoding="utf-8") as file:
                try:
                    file.write(text)
                    file.flush()
                except OSError:
                    path.unlink()  # leave no partial file
                    raise
        except FileExistsError:
            return f"not saved: {name} exists already, give another name"
        except OSError as error:
            return f"not saved: {path_problem(error)}"
        except ValueError as error:  # a character that no file name may contain
            return f"not saved: {error}"
        return f"saved to {name}"


def order(conversation: Conversation, name: str, rest: str, writes: bool) -> str:
    """Execute a command; returns a message for the user. writes: may this process write files?"""
    match name:
        case "clear":
            conversation.clear()
            return "(a new conversation)"
        case "help":
            return HELP
        case "system":
            conversation.system = rest
            return "(system prompt set)" if rest else "(system prompt removed)"
        case "save" if not rest:
            return "(name a file: /save FILE)"
        case "save":
            return f"({conversation.save(rest)})" if writes else ""
    near = "".join(f"did you mean /{x}? " for x in get_close_matches(name, COMMANDS, 1))
    return f"(there is no command /{name}: {near}/help lists them)"


def converse(llm: LLM, params: SamplingParams, as_json: bool, title: str = "") -> None:
    """Hold a conversation with one turn per line, as in nanochat's chat_cli, and a few commands.
    title: name of the model, to show on a terminal."""
    with suppress(ImportError):
        import readline  # noqa: F401, gives input() a history, arrow keys and bracketed paste
    limit = llm.max_positions  # also limited by the pool
    llm.config = replace(llm.config, max_model_len=limit)
    # a prompt leaves space in the context for the answer
    talk = Conversation(llm.tokenizer, limit - min(params.max_tokens, limit // 4))
    if sys.stdin.isatty():
        note(f"{title}: context of {limit:,} tokens. /help lists the commands, /exit leaves")
    while (line := read_turn()) is not None:
        if command := command_of(line):
            if command[0] == "exit":
                return
            note(order(talk, *command, writes=llm.ranks is None or llm.ranks.rank == 0))
            continue
        if not line:
            continue
        forgotten, count = talk.num_forgotten, len(talk.turns) - talk.num_forgotten
        try:
            prompt = talk.prompt(line)
        except ValueError as error:
            note(f"(not sent: {error})")
            continue
        if forgotten := talk.num_forgotten - forgotten:
            oldest = f"the oldest {forgotten} of {count} turns are dropped"
            note(f"(the context of {limit} tokens is full: {oldest})")
        answer = live(llm, prompt, params, chat=True, show=not as_json, context=limit)
        if as_json:
            say(json.dumps({"prompt": line, **answer}))
        if answer["token_ids"]:
            talk.add(line, answer["token_ids"])
