"""Output of the command line: errors, notes and streamed answers.

Answers go to stdout by `say`, and notes about them to stderr by `note`. Nothing is printed in
another way. Colours and lines that change are used on terminals only.
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
# arguments that have a flag of another name
_FLAGS = {"model_path": "model", "tokenizer_path": "tokenizer_dir", "num_threads": "threads"}
# remedies for errors of the system about a path
_REMEDIES = {
    errno.ENOENT: "there is no such file; check its name",
    errno.EISDIR: "this is a folder; give the path of a file",
    errno.ENOTDIR: "a part of this path is a file, not a folder; check the path",
    errno.EEXIST: "this exists already; give another path",
    errno.EACCES: "permission denied; give a path that you may read or write",
    errno.EPERM: "permission denied; give a path that you may read or write",
    errno.EROFS: "this file system is read-only; give a path on another one",
    errno.ENOSPC: "the disk is full; free space on it, or give a path on another one",
    errno.EDQUOT: "your disk quota is used up; free space, or give a path on another disk",
    errno.ENAMETOOLONG: "the name is too long; give a shorter one",
    errno.ELOOP: "its symbolic links lead back to itself; give another path",
}
# control characters of a terminal (C0 except tab and newline, and C1), and characters with the
# property Bidi_Control, which change the order in which a text is shown (Boucher and Anderson,
# "Trojan Source", 2021)
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


# for every command --------------------------------------------------------------------------------


def path_problem(error: OSError) -> str:
    """Describe an error of the system: the path, the problem and the remedy. An error without a
    number was raised with a message of our own, which is returned."""
    if error.errno is None:
        return str(error)
    told = _REMEDIES.get(error.errno, error.strerror)
    if not isinstance(error.filename, (str, bytes, os.PathLike)):  # the error is about an open file
        return told
    path = os.fsdecode(error.filename)
    folder = Path(path).absolute().parent
    if error.errno == errno.ENOENT and not folder.is_dir():
        told = f"the folder {folder} does not exist; create it, or check the path"
    return f"{path}: {told}"


class Parser(argparse.ArgumentParser):
    """A parser that reports a user's mistake in one line and exits with status 2."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.set_defaults(error=self.tell, begun=lambda: False)

    def format_help(self) -> str:
        """As in argparse, but without all options in the usage, since their list follows."""
        self.usage = self.usage or self.short_usage()
        return re.sub(" +$", "", super().format_help(), flags=re.M)

    def short_usage(self) -> str:
        """A usage line with the required arguments and "[options]"."""
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
        """As in argparse, but the message about an unknown flag suggests the closest one."""
        found, rest = super().parse_known_args(args, namespace)
        for word in rest:
            if near := get_close_matches(word.partition("=")[0], self._option_string_actions, 1):
                self.error(f"unrecognized arguments: {' '.join(rest)} (did you mean {near[0]}?)")
        return found, rest

    def error(self, message: object) -> NoReturn:
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK") != "0":
            self.exit(2)  # every rank received these flags, and rank 0 reports the mistake
        self.tell(message)

    def _print_message(self, message: str, file=None) -> None:
        """Print help and version by `say`, since argparse ignores a full disk."""
        if file is None or file is not sys.stdout:
            return super()._print_message(message, file)
        try:
            say(message, end="")
        except (BrokenPipeError, Unwritable) as error:
            leave(error, self.tell)

    def tell(self, message: object) -> NoReturn:
        if isinstance(message, ModuleNotFoundError) and str(message.name).startswith("microvllm."):
            place = message.name.replace(".", "/")
            message = f"this command needs {place}, which is missing: {REINSTALL}"
        elif isinstance(message, OSError):
            message = self.name_flags(path_problem(message))
        elif isinstance(message, Exception):
            message = self.name_flags(str(message))
        self.exit(2, f"{self.prog}: error: {plain(' '.join(str(message).split()))}\n")

    def name_flags(self, message: str) -> str:
        """Replace argument names in an error of the engine by their flags. A name of one word may
        be an English word, so it is replaced only before a value or "must"."""
        given = {action.dest: action.option_strings for action in self._actions}
        for name in [*given, *_FLAGS]:
            if names := given.get(_FLAGS.get(name, name)):
                flag = next((x for x in names if x.startswith("--")), names[0])
                value = r"(=True\b)?" if "_" in name else r"(=True\b|(?==| must\b))"
                # not as a part of another word or of a path
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
    """Report errors before args.begun() as the user's mistakes, in one line without a traceback.
    Later errors are bugs and keep their traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError) or args.begun():
            raise
        args.error(error)


def execute(args: argparse.Namespace) -> None:
    """Run args.command. The exit status is 130 after Ctrl-C and 141 after a closed pipe. If stdout
    cannot be written, as on a full disk, it is 2, with one line on stderr."""
    open_streams()
    try:
        for stream in (sys.stdin, sys.stdout):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # print ? for what the encoding lacks
        with user_errors(args), ExitStack() as stack:
            if getattr(args, "tensor_parallel", 1) > 1:
                from .ranks import one_voice

                stack.enter_context(one_voice(args))
            args.command(args)
        say(end="")  # flush output of libraries
    except KeyboardInterrupt:
        sys.exit(130)
    except (BrokenPipeError, Unwritable) as error:
        leave(error, args.error)


def leave(error: Exception, tell: Callable[[Exception], object]) -> NoReturn:
    """Exit after a closed pipe, as with `| head`, or on a full disk."""
    # Python flushes stdout once more when it exits, and that must not fail again
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, Unwritable):
        tell(error)
    sys.exit(141)


@contextmanager
def at_once() -> Iterator[None]:
    """Let Ctrl-C end the process at once, with exit status 130. KeyboardInterrupt during an import
    may get lost, or be shown with a traceback. A handler set by other code is kept."""
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
    """Open standard streams that are closed on the null device. Otherwise the next file that is
    opened gets the stream's number, and warnings of libraries would be written into it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # 0, 1 and 2
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, errors="replace"))


def plain(text: str) -> str:
    """The text with \ufffd for each control character of a terminal: the output of a model, a
    prompt, or names in a file may contain any character."""
    return _CONTROLS.sub("\ufffd", text)


class Unwritable(Exception):
    """stdout cannot be written."""


def say(text: str = "", end: str = "\n") -> None:
    """Print to stdout: without control characters on a terminal, unchanged to a file or pipe."""
    try:
        if text or end:
            print(plain(text) if sys.stdout.isatty() else text, end=end)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Unwritable(f"stdout cannot be written: {error.strerror}") from None


_held: list[str] | None = None  # notes that wait until an answer is complete


@contextmanager
def notes_later() -> Iterator[None]:
    """Hold notes back until the body has printed its text."""
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
    """Print a note on stderr, in grey if the terminal has colours. live: replace the current
    line."""
    if _held is not None:
        _held.append(text)
        return
    say(end="")
    text = plain(text)
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        text = f"\033[2m{text}\033[0m"
    with suppress(OSError):  # stderr cannot be written
        print(f"\r\033[K{text}" if live else text, end=end, file=sys.stderr, flush=True)


def progress(text: str, last: bool = False) -> None:
    """Show the progress of a command on stderr: on a terminal as one line that changes, elsewhere
    only the last state."""
    if sys.stderr.isatty():
        note(text, live=True, end="\n" if last else "")
    elif last:
        note(text)


# answers ------------------------------------------------------------------------------------------


def live(
    llm: LLM, prompt, params: SamplingParams, *, chat: bool, show: bool = True, lead: str = "",
    context: int = 0,
) -> dict:  # fmt: skip
    """Stream the answer to one prompt (a text or token ids), and note its speed.

    show: print the answer, after `lead`; chat: use the calculator; context: size of the context in
    tokens, to show how much of it the prompt (token ids) and the answer fill. Returns a dict with
    text, token_ids, finish_reason, stop_reason, tokens_per_second, prompt_tokens and
    cached_tokens. Ctrl-C ends only the answer: its finish_reason is then "abort".
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
    """Print the outputs of prompts as answers, completions (no chat) or JSON. Returns their number
    of tokens."""
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
    """Print the continuations of a prompt, best total first, and their ranks per token."""
    means = sorted((r["per_token"] for r in ranked), reverse=True)
    say(f"> {prompt}\n      total       per token   tokens")
    for rank, r in enumerate(ranked, 1):
        mean = f"{r['per_token']:8.3f} #{means.index(r['per_token']) + 1:<3}"
        say(f"{r['total']:10.2f} #{rank:<3}{mean}  {len(r['logprobs']):6}  {r['text']}")
    say()
