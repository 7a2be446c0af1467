"""A person's side of the command line: mistakes, answers as they are written, a conversation.

Answers go to stdout by `say`, what is said about them to stderr by `note`, and nothing past these
two; colours and live lines are for terminals.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import chain
from typing import TYPE_CHECKING, NoReturn

from .bench import counters, guesses

if TYPE_CHECKING:
    from .. import LLM, SamplingParams

_CALCULATOR = {"python_start": "`", "python_end": "`", "output_start": " = ", "output_end": " "}
_ENDS = {
    "abort": "; stopped",
    "max_tokens": "; cut by --max-tokens",
    "max_model_len": "; cut, the context is full",
}
# C0 (but tab and newline) and C1, by which a terminal takes orders, and all that have the property
# Bidi_Control, by which a text is shown in another order than it has (Boucher and Anderson,
# "Trojan Source", 2021)
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


# what every command needs -------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Tells a user's mistake in one line and leaves with exit status 2."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.set_defaults(error=self.tell, begun=lambda: False)

    def error(self, message: object) -> NoReturn:
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK") != "0":
            self.exit(2)  # all that torchrun started were given these flags
        self.tell(message)

    def tell(self, message: object) -> NoReturn:
        if isinstance(message, ModuleNotFoundError) and str(message.name).startswith("microvllm."):
            place = message.name.replace(".", "/")
            remedy = "reinstall microvllm (pip install --force-reinstall microvllm)"
            message = f"this command needs {place}, which is not there: {remedy}"
        self.exit(2, f"{self.prog}: error: {plain(' '.join(str(message).split()))}\n")


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
    """Run args.command. Ctrl-C ends it with exit status 130, a reader who goes away with 141, a
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
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except (BrokenPipeError, Unwritable) as error:  # `| head`, or a full disk
        # python flushes once more at its end, which may not fail too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, Unwritable):
            args.error(error)
        sys.exit(141)


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
        print(plain(text) if sys.stdout.isatty() else text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Unwritable(f"stdout cannot be written: {error.strerror}") from None


def note(text: str) -> None:
    """Say something that is no answer: on stderr, in grey where there are colours."""
    sys.stdout.flush()
    text = plain(text)
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        text = f"\033[2m{text}\033[0m"
    with suppress(OSError):  # nobody can be told
        print(text, file=sys.stderr, flush=True)


# answers ------------------------------------------------------------------------------------------


def reader(llm: LLM, params: SamplingParams) -> Callable[[str, list[int]], str]:
    """What to print of a piece of an answer, by its text and its token ids: the calculator's part
    reads `12*3` = 36. But a stop string cuts the text, and the ids do not know."""
    special = llm.tokenizer.special_tokens
    marks = {special.get(f"<|{name}|>"): mark for name, mark in _CALCULATOR.items()}
    push = llm.tokenizer.decoder().push

    def read(text: str, ids: list[int]) -> str:
        if not getattr(params, "stop", ()):  # which are a feature
            text = "".join(marks[i] if i in marks else push(i) for i in ids)
        return text

    return read


def tools(llm: LLM, chat: bool) -> dict[str, bool]:
    """What `generate` takes for a conversation: the calculator, where it is installed."""
    return {"tools": True} if chat and "tools" in llm.request_options else {}


def live(
    llm: LLM, prompt, params: SamplingParams, *, chat: bool, show: bool = True, lead: str = ""
) -> dict:
    """Stream the answer to one prompt (a text or token ids), and say how fast it was.

    show: print it, after `lead`; chat: with the calculator. Returns its text, token_ids,
    finish_reason, stop_reason, tokens_per_second, prompt_tokens and how many of them were
    cached_tokens. Ctrl-C ends the answer alone: its finish_reason is "abort".
    """
    read, before, start = reader(llm, params), counters(llm), time.perf_counter()
    answer = {"text": "", "token_ids": [], "finish_reason": "abort", "stop_reason": "abort"}
    options = tools(llm, chat)
    with suppress(KeyboardInterrupt), closing(llm.stream([prompt], params, **options)) as events:
        for event in events:
            answer["text"] += event.text
            answer["token_ids"] += event.token_ids
            if event.finish_reason:
                answer |= {"finish_reason": event.finish_reason, "stop_reason": event.stop_reason}
            if show:
                say(lead + read(event.text, event.token_ids), end="")
                lead = ""
    count, after = len(answer["token_ids"]), counters(llm)
    now = {name: after[name] - before[name] for name in before if name.endswith("_tokens")}
    answer["tokens_per_second"] = speed = round(count / (time.perf_counter() - start), 1)
    answer |= {name: now[name] for name in ("prompt_tokens", "cached_tokens")}
    if show:
        say()
    if show and sys.stderr.isatty():
        end = "" if answer["finish_reason"] == "stop" else _ENDS.get(answer["stop_reason"], "")
        hits = f"{now['cached_tokens']} of {now['prompt_tokens']} prompt tokens cached"
        note(f"[{count} tokens, {speed} tokens/s; {hits}{guesses(now)}{end}]")
    return answer


def show_all(
    llm: LLM, texts: list[str], outputs: list, params: SamplingParams, chat: bool, as_json: bool
) -> int:
    """Print the outputs of prompts: answers, completions (no chat) or JSON. Returns how many tokens
    they have."""
    for text, output in zip(texts, outputs, strict=True):
        if as_json:
            shown = {k: v for k, v in output.items() if k != "samples" or params.n > 1}
            say(json.dumps({"prompt": text, **shown}))
            continue
        for sample in output["samples"]:
            ids, cut = sample["token_ids"], ""
            if sample["finish_reason"] == "length":
                cut = f"  [cut at {len(ids)} tokens]"
            said = reader(llm, params)(sample["text"], ids)
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


# a conversation -----------------------------------------------------------------------------------


def read_line() -> str | None:
    """The user's next line, None at the end (Ctrl-D). On a terminal Ctrl-C only drops the line."""
    terminal = sys.stdin.isatty()
    while True:
        try:
            return input("> " if terminal and sys.stdout.isatty() else "").strip()
        except EOFError:
            if terminal:
                note("")
            return None
        except KeyboardInterrupt:
            if not terminal:
                raise
            note("\n(Ctrl-D or /exit leaves)")


def converse(llm: LLM, params: SamplingParams, as_json: bool) -> None:
    """A conversation, a line a turn, as nanochat's chat_cli has it.

    The token ids of all turns are kept as they were written, tool outputs and all, so the prompt of
    each turn begins with what the cache already has. When the context is full, the older half of
    the turns is forgotten: not turn by turn, since what moves to the front is computed anew.
    """
    with suppress(ImportError):
        import readline  # noqa: F401, now input() has a history and arrow keys
    with suppress(ImportError):
        from ..features.checks import longest

        room = longest(llm.scheduler.blocks, llm.max_batched_tokens)
        llm.max_model_len = min(llm.max_model_len, room + 1)
    tokenizer = llm.tokenizer
    names = ("user_start", "user_end", "assistant_start", "assistant_end")
    user_start, *asks, end = (tokenizer.encode_special(f"<|{name}|>") for name in names)
    limit = llm.max_model_len
    room = limit - min(params.max_tokens, limit // 4)  # for the prompt; the rest is the answer's
    if sys.stdin.isatty():
        note("Ctrl-C stops an answer, /clear starts over, /exit or Ctrl-D leaves")
    turns: list[list[int]] = []
    while (line := read_line()) not in (None, "/exit"):
        if re.fullmatch(r"(/\w+)?", line):
            if line == "/clear":
                turns.clear()
                note("(a new conversation)")
            elif line:
                note(f"({line} is no command: /clear starts over, /exit leaves)")
            continue
        try:
            turn = [user_start, *tokenizer.encode(line), *asks]
        except ValueError as error:
            note(f"(not sent: {error})")
            continue
        if 1 + len(turn) > room:
            note(f"(not sent: {1 + len(turn)} tokens, and the context has room for {room})")
            continue
        count = len(turns)
        while 1 + sum(map(len, turns)) + len(turn) > room:
            del turns[: (len(turns) + 1) // 2]
        if forgotten := count - len(turns):
            oldest = f"the oldest {forgotten} of {count} turns are forgotten"
            note(f"(the context of {limit} tokens is full: {oldest})")
        prompt = [tokenizer.bos_id, *chain(*turns), *turn]
        answer = live(llm, prompt, params, chat=True, show=not as_json)
        if as_json:
            say(json.dumps({"prompt": line, **answer}))
        if ids := answer["token_ids"]:
            turns.append(turn + ids + [end] * (ids[-1] != end))
