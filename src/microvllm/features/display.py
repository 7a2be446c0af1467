"""How an engine and its outputs look at a prompt of Python's and in a notebook.

An engine and a list of outputs are a few lines wherever they are printed. IPython and Jupyter call
`_repr_html_`, which shows prompts and texts in full length, up to a bound. All of it is text that a
model or a stranger wrote: it is escaped, and no more than text.
"""

import html
import re
import reprlib

import torch

from ..engine import LLM, Request, RequestOutput

ROWS, CHARACTERS = 20, 2000  # that HTML shows of a list, and of a text
SHOWN = 3  # outputs that the repr of a list shows

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxdict = 2, 6, 6
_short.maxstring = _short.maxother = 120

# controls but tab and newline, all that turn the direction of a text, and halves of characters,
# which no notebook's file can hold
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# JupyterLab lets MathJax look for formulas, but not in these; blocks of their own keep a text that
# runs from right to left to itself
_PRE = (
    '<pre class="tex2jax_ignore mathjax_ignore" dir="auto" style="white-space: pre-wrap; '
    'overflow-wrap: anywhere; margin: 0; text-align: start">{}</pre>'
)
_CELL = '<td style="text-align: left; vertical-align: top">{}</td>'
_HEAD = '<th style="text-align: left">{}</th>'


def describe(llm: LLM) -> str:
    """One line about an engine in any state: also one that was closed, or never came to be."""
    facts = vars(llm)
    name, model, scheduler = facts.get("name", ""), facts.get("model"), facts.get("scheduler")
    if model is None or scheduler is None:
        return f"<LLM {name!r:.80}: {'not made' if scheduler is None else 'closed'}>"
    blocks = scheduler.blocks
    count, threads = blocks.num_usable // blocks.width + 1, torch.get_num_threads()
    return (
        f"<LLM {name!r:.80}: era {model.recipe.era}, {str(model.dtype).removeprefix('torch.')} on "
        f"{model.device}, {count:,} blocks of {blocks.block_size} tokens, "
        f"{threads} thread{'s' * (threads != 1)}>"
    )


def visible(text: str, limit: int = CHARACTERS) -> str:
    """The text as HTML: escaped, cut, with a \ufffd for each character of _UNSEEN."""
    shown = _UNSEEN.sub("\ufffd", text[:limit])
    cut = f"\n[{len(text):,} characters in all]" if len(text) > limit else ""
    return html.escape(shown + cut)


def row(cells: list[str], kind: str = _CELL) -> str:
    """A table's row of cells in HTML."""
    return f"<tr>{''.join([kind.format(cell) for cell in cells])}</tr>"


def prompt_of(output: RequestOutput) -> str:
    """The prompt as HTML; only its length where its tokenizer is not known, as in an output that
    was pickled."""
    ids = output.get("prompt_token_ids", ())
    tokenizer = vars(output).get("_tokenizer")
    if not tokenizer:
        return f"{len(ids):,} tokens" if ids else ""
    beginning = ids[:CHARACTERS]  # no text is decoded that is not shown
    text = tokenizer.decode(beginning)
    if len(beginning) < len(ids):
        text = text[:CHARACTERS] + f"\n[{len(ids):,} tokens in all]"
    return _PRE.format(visible(text, len(text)))


def rows_of(output: RequestOutput, prompt: str) -> list[str]:
    """The rows of an output, one a sample."""
    samples = output.get("samples") or [output]
    rows = []
    for sample in samples[:ROWS]:
        reason = str(sample.get("finish_reason") or "")
        if isinstance(cause := sample.get("stop_reason"), str) and cause not in ("", reason):
            reason = f"{reason}: {cause}"
        count = len(sample.get("token_ids", sample.get("logprobs")) or ())
        text = _PRE.format(visible(sample.get("text", "")))
        rows.append(row([prompt, text, visible(reason, 200), f"{count:,}"]))
        prompt = ""
    if len(samples) > ROWS:
        rows.append(row(["", f"and {len(samples) - ROWS:,} more samples", "", ""]))
    return rows


def table(outputs: list) -> str:
    """Outputs as HTML, a row for each sample."""
    rows = [row(["prompt", "text", "finish reason", "tokens"], _HEAD)]
    for output in outputs[:ROWS]:
        rows += rows_of(output, prompt_of(output))
    if len(outputs) > ROWS:
        rows.append(row([f"and {len(outputs) - ROWS:,} more outputs", "", "", ""]))
    return f"<table>{''.join(rows)}</table>"


class ShownOutput(RequestOutput):
    """An output that is short where it is printed, and a table in a notebook."""

    def __repr__(self) -> str:
        # the first sample is at the top level, too
        facts = {key: value for key, value in self.items() if key != "samples"}
        if len(self.get("samples", ())) > 1:
            facts["samples"] = self["samples"]
        parts = [f"{key}={_short.repr(value)}" for key, value in facts.items()]
        return f"RequestOutput({', '.join(parts)})"

    def _repr_html_(self) -> str:
        return table([self])

    def __getstate__(self) -> None:
        """A pickle has the dict alone, without the tokenizer."""


class Outputs(list):
    """A list of outputs that is short where it is printed, and a table in a notebook. In all else
    it is a list; its slices are of the same kind."""

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return Outputs(found) if isinstance(index, slice) else found

    def __repr__(self) -> str:
        parts = [repr(output) for output in self[:SHOWN]]
        if len(self) > SHOWN:
            parts.append(f"... and {len(self) - SHOWN:,} more")
        return f"[{', '.join(parts)}]"

    def _repr_html_(self) -> str | None:
        # other things may have been put in; an empty list is "[]"
        shown = len(self) > 0 and all(isinstance(output, dict) for output in self)
        return table(self) if shown else None


class DisplayLLM(LLM):
    """An engine that says in one line what it is."""

    list_class = Outputs

    def __repr__(self) -> str:
        return describe(self)

    def _finish(self, request: Request) -> None:
        super()._finish(request)
        vars(request.output)["_tokenizer"] = self.tokenizer  # decodes a prompt when it is shown


PARTS = {"llm": DisplayLLM, "output": ShownOutput}
