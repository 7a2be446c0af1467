"""A person's side of the command line: mistakes, and answers as they are written.

Answers go to stdout by `say`, what is said about them to stderr by `note`, and nothing past these
two; colours and live lines are for terminals.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..environment import REINSTALL
from .bench import counters, drafts

if TYPE_CHECKING:
    from .. import LLM, SamplingParams

_ENDS = {
    "abort": "; stopped",
    "max_tokens": "; cut by --max-tokens",
    "max_model_len": "; cut, the context is full",
}
# arguments whose flag has another name
_FLAGS = {"model_path": "model", "tokenizer_path": "tokenizer_dir", "num_threads": "threads"}
# what to do where the system refuses a path
_REMEDIES = {
    errno.ENOENT: "there is no such file; check its name",
    errno.EISDIR: "this is a folder; give the path of a file",
    errno.ENOTDIR: "a part of this path is a file and no folder; check the path",
    errno.EEXIST: "this exists already; give another path",
    errno.EACCES: "permission denied; give a path that you may read or write",
    errno.EPERM: "permission denied; give a path that you may read or write",
    errno.EROFS: "this file system can only be read; give a path on another one",
    errno.ENOSPC: "the disk is full; free space on it, or give a path on another one",
    errno.EDQUOT: "your quota of the disk is used up; free space, or give a path on another one",
    errno.ENAMETOOLONG: "the name is too long; give a shorter one",
    errno.ELOOP: "its symbolic links lead back to itself; give another path",
}
# C0 (but tab and newline) and C1, by which a terminal takes orders, and all that have the property
# Bidi_Control, by which a text is shown in another order than it has (Boucher and Anderson,
# "Trojan Source", 2021)
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


# what every command needs -------------------------------------------------------------------------


def path_problem(error: OSError) -> str:
    """What an error of the system means, in words: the path, what is wrong with it and what to do.
    An error that has no number, since it was raised with a message of our own, is that message."""
    if error.errno is None:
        return str(error)
    told = _REMEDIES.get(error.errno, error.strerror)
    if not isinstance(error.filename, (str, bytes, os.PathLike)):  # of a file that is open
        return told
    path = os.fsdecode(error.filename)
    folder = Path(path).absolute().parent
    if error.errno == errno.ENOENT and not folder.is_dir():
        told = f"the folder {folder} does not exist; create it, or check the path"
    return f"{path}: {told}"


class Parser(argparse.ArgumentParser):
    """Tells a user's mistake in one line and leaves with exit status 2."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.set_defaults(error=self.tell, begun=lambda: False)

    def format_help(self) -> str:
        """As in argparse, but the usage has no list of all options, which follows anyway."""
        self.usage = self.usage or self.short_usage()
        return re.sub(" +$", "", super().format_help(), flags=re.M)

    def short_usage(self) -> str:
        """What has to be given, and that there are options."""
        required, positional = [], []
        marks = {"?": "[{}]", "*": "[{} ...]", "...": "[{} ...]"}
        for action in self._actions:
            takes = action.metavar or "|".join(map(str, action.choices or ()))
            if not action.option_strings:
                positional.append(marks.get(action.nargs, "{}").format(takes))
            elif action.required:
                required.append(f"{action.option_strings[0]} {takes}")
        return " ".join(["%(prog)s", *required, "[options]", *positional])

    def parse_known_args(self, args=None, namespace=None):
        """As in argparse, but the message about an unknown flag names the nearest one."""
        found, rest = super().parse_known_args(args, namespace)
        for word in rest:
            if near := get_close_matches(word.partition("=")[0], self._option_string_actions, 1):
                self.error(f"unrecognized arguments: {' '.join(rest)} (did you mean {near[0]}?)")
        return found, rest

    def error(self, message: object) -> NoReturn:
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK") != "0":
            self.exit(2)  # all that torchrun started were given these flags
        self.tell(message)

    def _print_message(self, message: str, file=None) -> None:
        """Help and version go where all goes: argparse does not see that a disk is full."""
        if file is None or file is not sys.stdout:
            return super()._print_message(message, file)
        try:
            say(message, end="")
        except (BrokenPipeError, Unwritable) as error:
            leave(error, self.tell)

    def tell(self, message: object) -> NoReturn:
        if isinstance(message, ModuleNotFoundError) and str(message.name).startswith("microvllm."):
            place = message.name.replace(".", "/")
            message = f"this command needs {place}, which is not there: {REINSTALL}"
        elif isinstance(message, OSError):
            message = self.name_flags(path_problem(message))
        elif isinstance(message, Exception):
            message = self.name_flags(str(message))
        self.exit(2, f"{self.prog}: error: {plain(' '.join(str(message).split()))}\n")

    def name_flags(self, message: str) -> str:
        """An error of the engine with flags in place of the arguments that they become. A name of
        one word may be an English word, and is an argument before a value or "must"."""
        given = {action.dest: action.option_strings for action in self._actions}
        for name in [*given, *_FLAGS]:
            if names := given.get(_FLAGS.get(name, name)):
                flag = next((x for x in names if x.startswith("--")), names[0])
                value = r"(=True\b)?" if "_" in name else r"(=True\b|(?==| must\b))"
                # it is no part of another word or of a path
                pattern = rf"(?<![\w./'\"-]){name}(?![\w/-]|\.\w){value}"
                message = re.sub(pattern, flag, message)
        return message


def positive(text: str) -> int:
    """An integer of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"give 1 or more, not {text!r}")
    return int(text)


@contextmanager
def user_errors(args: argparse.Namespace) -> Iterator[None]:
    """What a command refuses is the user's mistake, which is one line without a traceback. What is
    raised when args.begun() is a bug, and shows itself as one."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError) or args.begun():
            raise
        args.error(error)


def execute(args: argparse.Namespace) -> None:
    """Run args.command. Ctrl-C ends it with exit status 130, a reader that goes away with 141, a
    stdout that takes no more, as on a full disk, with a line and 2."""
    open_streams()
    try:
        for stream in (sys.stdin, sys.stdout):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # what its encoding lacks is a ?, no crash
        with user_errors(args), ExitStack() as stack:
            if getattr(args, "tensor_parallel", 1) > 1:
                from .ranks import one_voice

                stack.enter_context(one_voice(args))
            args.command(args)
        say(end="")  # what a library has left
    except KeyboardInterrupt:
        sys.exit(130)
    except (BrokenPipeError, Unwritable) as error:
        leave(error, args.error)


def leave(error: Exception, tell: Callable[[Exception], object]) -> NoReturn:
    """End after `| head`, or where a disk is full."""
    # python flushes once more at its end, which may not fail too
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, Unwritable):
        tell(error)
    sys.exit(141)


@contextmanager
def at_once() -> Iterator[None]:
    """Let Ctrl-C end the process at once, with exit status 130: what is raised in the midst of an
    import may get lost there, or be shown with a traceback. A handler of others is left alone."""
    main = threading.current_thread() is threading.main_thread()
    ours = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def open_streams() -> None:
    """Lead a standard stream that is closed nowhere: stdin ends at once, and what is written is
    dropped. Else the next file that is opened gets its number, and a library's warnings with it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # as they are numbered
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, errors="replace"))


def plain(text: str) -> str:
    """The text with a \ufffd for each character by which it could steer a terminal: a model, a
    prompt, or the names in a file may say anything."""
    return _CONTROLS.sub("\ufffd", text)


class Unwritable(Exception):
    """What cannot be printed, because stdout takes no more."""


def say(text: str = "", end: str = "\n") -> None:
    """Print to stdout: plain on a terminal, as it is for a file or a program."""
    try:
        if text or end:
            print(plain(text) if sys.stdout.isatty() else text, end=end)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Unwritable(f"stdout cannot be written: {error.strerror}") from None


_held: list[str] | None = None  # notes, while an answer is written


@contextmanager
def notes_later() -> Iterator[None]:
    """Hold notes back until what is printed inside is whole."""
    global _held
    if _held is not None:
        yield
        return
    _held = []
    try:
        yield
    finally:
        held, _held = _held, None
        for text in held:
            note(text)


def note(text: str, live: bool = False, end: str = "\n") -> None:
    """Say something that is no answer: on stderr, in grey where there are colours; live: in place
    of the line that is there."""
    if _held is not None:
        _held.append(text)
        return
    say(end="")
    text = plain(text)
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        text = f"\033[2m{text}\033[0m"
    with suppress(OSError):  # there is nowhere to write
        print(f"\r\033[K{text}" if live else text, end=end, file=sys.stderr, flush=True)


def progress(text: str, last: bool = False) -> None:
    """Show how far a command is, on stderr: on a terminal in one line that changes, elsewhere the
    last state alone."""
    if sys.stderr.isatty():
        note(text, live=True, end="\n" if last else "")
    elif last:
        note(text)


# answers ------------------------------------------------------------------------------------------


def live(
    llm: LLM, prompt, params: SamplingParams, *, chat: bool, show: bool = True, lead: str = "",
    context: int = 0,
) -> dict:  # fmt: skip
    """Stream the answer to one prompt (a text or token ids), and say how fast it was.

    show: print it, after `lead`; chat: with the calculator; context: say how many of these tokens
    prompt (token ids) and answer take. Returns its text, token_ids,
    finish_reason, stop_reason, tokens_per_second, prompt_tokens and how many of them were
    cached_tokens. Ctrl-C ends the answer alone: its finish_reason is "abort".
    """
    before, start = counters(llm), time.perf_counter()
    answer = {"text": "", "token_ids": [], "finish_reason": "abort", "stop_reason": "abort"}
    with notes_later():
        with (
            suppress(KeyboardInterrupt),
            closing(llm.stream([prompt], params, tools=chat)) as events,
        ):
            for event in events:
                answer["text"] += event.text
                answer["token_ids"] += event.token_ids
                if reason := event.finish_reason:
                    answer |= {"finish_reason": reason, "stop_reason": event.stop_reason}
                if show:
                    say(lead + event.text, end="")
                    lead = ""
        if show:
            say()
    count, after = len(answer["token_ids"]), counters(llm)
    now = {name: after[name] - before[name] for name in before if name.endswith("_tokens")}
    answer["tokens_per_second"] = speed = round(count / (time.perf_counter() - start), 1)
    answer |= {name: now[name] for name in ("prompt_tokens", "cached_tokens")}
    if show and sys.stderr.isatty():
        end = "" if answer["finish_reason"] == "stop" else _ENDS.get(answer["stop_reason"], "")
        hits = f"{now['cached_tokens']} of {now['prompt_tokens']} prompt tokens cached"
        used = f"; {len(prompt) + count:,} of {context:,} in the context" if context else ""
        note(f"[{count} tokens, {speed} tokens/s{used}; {hits}{drafts(now)}{end}]")
    return answer


def show_all(
    texts: list[str], outputs: list, params: SamplingParams, chat: bool, as_json: bool
) -> int:
    """Print the outputs of prompts: answers, completions (no chat) or JSON. Returns how many tokens
    they have."""
    for text, output in zip(texts, outputs, strict=True):
        if as_json:
            shown = {k: v for k, v in output.items() if k != "samples" or params.n > 1}
            say(json.dumps({"prompt": text, **shown}))
            continue
        for sample in output["samples"]:
            said, cut = sample["text"], ""
            if sample["finish_reason"] == "length":
                cut = f"  [cut at {len(sample['token_ids'])} tokens]"
            say(f"> {text}\n{said.strip()}{cut}\n" if chat else f"{text}{said}{cut}\n")
    return sum(len(sample["token_ids"]) for output in outputs for sample in output["samples"])


def show_ranking(prompt: str, ranked: list[dict]) -> None:
    """Print the continuations of a prompt, best total first, and how they rank by the token."""
    means = sorted((r["per_token"] for r in ranked), reverse=True)
    say(f"> {prompt}\n      total       per token   tokens")
    for rank, r in enumerate(ranked, 1):
        mean = f"{r['per_token']:8.3f} #{means.index(r['per_token']) + 1:<3}"
        say(f"{r['total']:10.2f} #{rank:<3}{mean}  {len(r['logprobs']):6}  {r['text']}")
    say()
