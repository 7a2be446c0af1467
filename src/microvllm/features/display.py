"""How an engine and its outputs are displayed at a Python prompt and in a notebook.

An engine or a list of outputs prints as a few lines. IPython and Jupyter call `_repr_html_`, which
shows whole prompts and texts, up to a limit. They come from a model or from strangers, so all HTML
in them is escaped.
"""

import html
import re
import reprlib

import torch

from ..engine import LLM, RequestOutput
from ..tokenizer import Tokenizer

MAX_ROWS = 20  # outputs in the HTML of a list, and samples of each
CHARACTERS = 2000  # the most characters of one text in HTML
MAX_SHOWN = 3  # outputs in the repr of a list

short = reprlib.Repr()
short.maxlevel = 2
short.maxlist = 6
short.maxdict = 6
short.maxstring = 120
short.maxother = 120

# control characters except tab and newline, all that change the direction of a text, and
# surrogates, which a notebook file cannot store
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# these classes keep JupyterLab's MathJax from looking for formulas. Each text is a separate block,
# so that a right-to-left text does not affect others
PRE = (
    '<pre class="tex2jax_ignore mathjax_ignore" dir="auto" style="white-space: pre-wrap; '
    'overflow-wrap: anywhere; margin: 0; text-align: start">{}</pre>'
)
CELL = '<td style="text-align: left; vertical-align: top">{}</td>'
HEAD = '<th style="text-align: left">{}</th>'


class ShownOutput(RequestOutput):
    """An output with a short repr, and a table in a notebook."""

    def __repr__(self) -> str:
        # the first sample is also at the top level
        shown = {key: value for key, value in self.items() if key != "samples"}
        if len(self.get("samples", ())) > 1:
            shown["samples"] = self["samples"]
        parts = [f"{key}={short.repr(value)}" for key, value in shown.items()]
        return f"RequestOutput({', '.join(parts)})"

    def _repr_html_(self) -> str:
        return table_of([self])

    def __getstate__(self) -> None:
        """A pickle contains only the dict, without the tokenizer."""


class OutputList(list):
    """A list of outputs with a short repr, and a table in a notebook. Otherwise it is a list;
    slices have the same type."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return OutputList(item) if isinstance(index, slice) else item

    def __repr__(self) -> str:
        parts = [repr(output) for output in self[:MAX_SHOWN]]
        if len(self) > MAX_SHOWN:
            parts.append(f"... and {len(self) - MAX_SHOWN:,} more")
        return f"[{', '.join(parts)}]"

    def _repr_html_(self) -> str | None:
        # a list may contain other things; an empty list shows as "[]"
        is_table = len(self) > 0 and all(isinstance(output, dict) for output in self)
        return table_of(self) if is_table else None


def keep_tokenizer(output: RequestOutput, tokenizer: Tokenizer) -> None:
    """Let an output decode its prompt for display. The dict does not change."""
    vars(output)["_tokenizer"] = tokenizer


def describe(engine: LLM) -> str:
    """Return one line about an engine in any state. An engine that is closed, or whose constructor
    failed, may lack attributes."""
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
    """Return outputs as an HTML table with a row for each sample."""
    rows = [row_of(["prompt", "text", "finish reason", "tokens"], HEAD)]
    for output in outputs[:MAX_ROWS]:
        rows += rows_of(output, show_prompt(output))
    if len(outputs) > MAX_ROWS:
        rows.append(row_of([f"and {len(outputs) - MAX_ROWS:,} more outputs", "", "", ""]))
    return f"<table>{''.join(rows)}</table>"


def rows_of(output: RequestOutput, prompt: str) -> list[str]:
    """Return the HTML rows of an output, one per sample. The first one has the prompt."""
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
    """Return an HTML table row."""
    return f"<tr>{''.join([template.format(cell) for cell in cells])}</tr>"


def show_prompt(output: RequestOutput) -> str:
    """Return the prompt as HTML, or only its length if its tokenizer is unknown, as in an output
    that was pickled."""
    prompt_ids = output.get("prompt_token_ids", ())
    tokenizer = vars(output).get("_tokenizer")
    if tokenizer is None:
        return f"{len(prompt_ids):,} tokens" if prompt_ids else ""
    shown_ids = prompt_ids[:CHARACTERS]  # decode only what is shown
    text = tokenizer.decode(shown_ids)
    if len(shown_ids) < len(prompt_ids):
        text = text[:CHARACTERS] + f"\n[{len(prompt_ids):,} tokens in all]"
    return PRE.format(visible(text, len(text)))


def visible(text: str, limit: int = CHARACTERS) -> str:
    """Return a text as HTML: escaped, cut, with \ufffd for each INVISIBLE character."""
    shown = INVISIBLE.sub("\ufffd", text[:limit])
    cut = f"\n[{len(text):,} characters in all]" if len(text) > limit else ""
    return html.escape(shown + cut)
