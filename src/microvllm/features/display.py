"""How an engine and its outputs look at a prompt of Python's and in a notebook.

An engine and a list of outputs are a few lines wherever they are printed. IPython and Jupyter call
`_repr_html_`, which shows prompts and texts in full length, up to a bound. All of it is text that a
model or a stranger wrote: it is escaped, and no more than text.
"""

import html
import re
import reprlib

import torch

from ..engine import LLM, RequestOutput
from ..tokenizer import Tokenizer

MAX_ROWS = 20  # outputs, and samples of each, in the HTML of a list
CHARACTERS = 2000  # of a text in HTML
MAX_SHOWN = 3  # outputs in the repr of a list

short = reprlib.Repr()
short.maxlevel = 2
short.maxlist = 6
short.maxdict = 6
short.maxstring = 120
short.maxother = 120

# controls but tab and newline, all that turn the direction of a text, and halves of characters,
# which no notebook's file can hold
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# JupyterLab lets MathJax look for formulas, but not in these; blocks of their own keep a text that
# runs from right to left to itself
PRE = (
    '<pre class="tex2jax_ignore mathjax_ignore" dir="auto" style="white-space: pre-wrap; '
    'overflow-wrap: anywhere; margin: 0; text-align: start">{}</pre>'
)
CELL = '<td style="text-align: left; vertical-align: top">{}</td>'
HEAD = '<th style="text-align: left">{}</th>'


class ShownOutput(RequestOutput):
    """An output that is short where it is printed, and a table in a notebook."""

    def __repr__(self) -> str:
        # the first sample is at the top level, too
        shown = {key: value for key, value in self.items() if key != "samples"}
        if len(self.get("samples", ())) > 1:
            shown["samples"] = self["samples"]
        parts = [f"{key}={short.repr(value)}" for key, value in shown.items()]
        return f"RequestOutput({', '.join(parts)})"

    def _repr_html_(self) -> str:
        return table_of([self])

    def __getstate__(self) -> None:
        """A pickle has the dict alone, without the tokenizer."""


class OutputList(list):
    """A list of outputs that is short where it is printed, and a table in a notebook. In all else
    it is a list; its slices are of the same kind."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return OutputList(item) if isinstance(index, slice) else item

    def __repr__(self) -> str:
        parts = [repr(output) for output in self[:MAX_SHOWN]]
        if len(self) > MAX_SHOWN:
            parts.append(f"... and {len(self) - MAX_SHOWN:,} more")
        return f"[{', '.join(parts)}]"

    def _repr_html_(self) -> str | None:
        # other things may have been put in; an empty list is "[]"
        is_table = len(self) > 0 and all(isinstance(output, dict) for output in self)
        return table_of(self) if is_table else None


def keep_tokenizer(output: RequestOutput, tokenizer: Tokenizer) -> None:
    """Let an output decode its prompt when it is shown. It is an attribute, and no item."""
    vars(output)["_tokenizer"] = tokenizer


def describe(engine: LLM) -> str:
    """One line about an engine in any state: also one that was closed, or that could not be made,
    which has none of these attributes."""
    attributes = vars(engine)
    name = attributes.get("name", "")
    scheduler = attributes.get("scheduler")
    model = attributes.get("model")
    if scheduler is None or model is None:
        state = "not made" if scheduler is None else "closed"
        return f"<LLM {name!r:.80}: {state}>"
    blocks = scheduler.blocks
    num_threads = torch.get_num_threads()
    return (
        f"<LLM {name!r:.80}: era {model.recipe.era}, {str(model.dtype).removeprefix('torch.')} on "
        f"{model.device}, {blocks.num_blocks:,} blocks of {blocks.block_size} tokens, "
        f"{num_threads} thread{'s' * (num_threads != 1)}>"
    )


# HTML


def table_of(outputs: list) -> str:
    """Outputs as HTML, a row for each sample."""
    rows = [row_of(["prompt", "text", "finish reason", "tokens"], HEAD)]
    for output in outputs[:MAX_ROWS]:
        rows += rows_of(output, show_prompt(output))
    if len(outputs) > MAX_ROWS:
        rows.append(row_of([f"and {len(outputs) - MAX_ROWS:,} more outputs", "", "", ""]))
    return f"<table>{''.join(rows)}</table>"


def rows_of(output: RequestOutput, prompt: str) -> list[str]:
    """The rows of an output, one a sample; the prompt is in the first."""
    samples = output.get("samples") or [output]
    rows = []
    for sample in samples[:MAX_ROWS]:
        reason = str(sample.get("finish_reason") or "")
        stop_reason = sample.get("stop_reason")
        if isinstance(stop_reason, str) and stop_reason not in ("", reason):
            reason = f"{reason}: {stop_reason}"
        num_tokens = len(sample.get("token_ids", sample.get("logprobs")) or ())
        text = PRE.format(visible(sample.get("text", "")))
        rows.append(row_of([prompt, text, visible(reason, 200), f"{num_tokens:,}"]))
        prompt = ""
    if len(samples) > MAX_ROWS:
        rows.append(row_of(["", f"and {len(samples) - MAX_ROWS:,} more samples", "", ""]))
    return rows


def row_of(cells: list[str], template: str = CELL) -> str:
    """A table's row of cells in HTML."""
    return f"<tr>{''.join([template.format(cell) for cell in cells])}</tr>"


def show_prompt(output: RequestOutput) -> str:
    """The prompt as HTML; only its length where its tokenizer is not known, as in an output that
    was pickled."""
    prompt_ids = output.get("prompt_token_ids", ())
    tokenizer = vars(output).get("_tokenizer")
    if tokenizer is None:
        return f"{len(prompt_ids):,} tokens" if prompt_ids else ""
    shown_ids = prompt_ids[:CHARACTERS]  # no text is decoded that is not shown
    text = tokenizer.decode(shown_ids)
    if len(shown_ids) < len(prompt_ids):
        text = text[:CHARACTERS] + f"\n[{len(prompt_ids):,} tokens in all]"
    return PRE.format(visible(text, len(text)))


def visible(text: str, limit: int = CHARACTERS) -> str:
    """The text as HTML: escaped, cut, with a \ufffd for each character that is INVISIBLE."""
    shown = INVISIBLE.sub("\ufffd", text[:limit])
    cut = f"\n[{len(text):,} characters in all]" if len(text) > limit else ""
    return html.escape(shown + cut)
