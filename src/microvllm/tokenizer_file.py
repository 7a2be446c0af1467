"""Reads nanochat's tokenizer.pkl without executing code from the file.

The file is a pickle of one tiktoken.Encoding. A pickle is a program for a small stack machine. Two
kinds of its instructions are dangerous: those that import a function, and those that call one. An
Encoding needs only the few instructions below (pickle protocol 4). This reader runs them without an
import or a call, and rejects all others.

Each instruction costs time in proportion to its own items. The reader makes no tuples, so dict keys
cannot nest; hashing a nested key could take forever.
"""

import pickletools
from typing import Any

import tiktoken

FIELDS = {"name", "pat_str", "mergeable_ranks", "special_tokens"}
# NEWOBJ would call the class on the stack with the tuple of EMPTY_TUPLE. Both are skipped: the
# class, pushed by STACK_GLOBAL, represents its object, and BUILD stores the object's state.
IGNORED = {"PROTO", "FRAME", "EMPTY_TUPLE", "NEWOBJ", "STOP"}
CONSTANTS = {
    *("BININT", "BININT1", "BININT2"),
    *("BINBYTES", "SHORT_BINBYTES"),
    *("BINUNICODE", "SHORT_BINUNICODE"),
}


def read_encoding(data: bytes) -> dict:
    """Return the four arguments of the tiktoken.Encoding in a pickle. Raises ValueError, TypeError,
    IndexError or AttributeError if the pickle is malformed or contains anything else."""
    machine = StackMachine()
    for instruction, argument, position in pickletools.genops(data):
        machine.run(instruction.name, argument, position)
    state = machine.state
    if machine.stack != [tiktoken.Encoding] or not isinstance(state, dict):
        value = machine.stack[-1] if state is None else state
        kind = type(value).__name__
        raise ValueError(f"it holds {kind}, not a tiktoken.Encoding with its vocabulary")
    if set(state) != FIELDS:
        raise ValueError(f"its Encoding has the fields {', '.join(map(str, state)):.200}")
    return state


class StackMachine:
    """The part of pickle's machine that an Encoding needs."""

    def __init__(self):
        self.stack: list = []
        self.memo: list = []  # values that the pickle reuses, by number
        self.marks: list[int] = []  # heights of the stack
        self.state: object = None  # the state of the Encoding

    def run(self, name: str, argument: Any, position: int | None) -> None:
        """Run the instruction at a position of the file. Raises ValueError for an instruction that
        tokenizers do not need."""
        if name in IGNORED:
            return
        if name in CONSTANTS:
            self.stack.append(argument)
        elif name == "EMPTY_DICT":
            self.stack.append({})
        elif name == "MEMOIZE":
            self.memo.append(self.stack[-1])
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name == "SETITEMS":
            self.set_items(self.marks.pop())
        elif name == "SETITEM":
            self.set_items(len(self.stack) - 2)
        elif name == "STACK_GLOBAL":
            self.push_class()
        elif name == "BUILD":
            self.state = self.stack.pop()
        else:
            refuse(name, argument, position)

    def set_items(self, start: int) -> None:
        """Move the keys and values from index `start` on into the dict below them."""
        items = self.stack[start:]
        del self.stack[start:]
        pairs = zip(items[::2], items[1::2], strict=True)
        self.stack[-1].update(pairs)

    def push_class(self) -> None:
        """Push the class whose module and name are on the stack, if it is tiktoken's Encoding."""
        name = self.stack.pop()
        module = self.stack.pop()
        path = ".".join((module, name))  # a TypeError unless both are strings
        if path != "tiktoken.core.Encoding":
            raise ValueError(f"it imports {path:.80}; nothing in it was executed")
        self.stack.append(tiktoken.Encoding)


def refuse(name: str, argument: Any, position: int | None) -> None:
    """Raise ValueError that names the instruction and its position."""
    shown = name if argument is None else f"{name} {argument!r:.80}"
    raise ValueError(
        f"it has the pickle instruction {shown} at byte {position}, which no tokenizer needs; "
        "nothing in it was executed"
    )
