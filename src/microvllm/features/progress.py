"""A progress bar while `generate` works.

    generating  45%|████▌     | [00:03<00:04, 12/64 prompts, 1,834 tokens, 598 tokens/s]

The bar counts tokens: those of prompts, and all that may follow them. A sample that ends before its
max_tokens makes it jump, so it moves in every step and is full at the end.
"""

import builtins
import time
import warnings
from collections import deque
from collections.abc import Iterator
from functools import cache

from ..engine import LLM, Request
from ..scheduler import Sequence

SECONDS = 0.1  # between two looks at all requests
FORMAT = "{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"


def in_notebook() -> bool:
    """Is this code run by a kernel of Jupyter? IPython puts get_ipython among the builtins while it
    runs a cell."""
    get_ipython = getattr(builtins, "get_ipython", None)
    return bool(get_ipython) and "IPKernelApp" in getattr(get_ipython(), "config", ())


@cache
def bar_class(notebook: bool) -> type:
    """tqdm's bar: in a notebook with ipywidgets a widget, else a line of text."""
    if not notebook:
        from tqdm import tqdm

        return tqdm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without ipywidgets it warns, and draws a line of text
        from tqdm.auto import tqdm
    return tqdm


def reached(seq: Sequence) -> int:
    """The tokens of a sequence, prompt included, that are done."""
    if seq.finish_reason:
        return len(seq.tokens)
    if seq.num_computed < seq.num_prompt:
        return seq.num_computed
    # the last token of a sample is drawn, and not computed; of a text that is scored all are known
    return min(len(seq.tokens), seq.num_computed + 1)


def possible(request: Request) -> int:
    """The most tokens that a request can have: of its prompt once, of its samples all."""
    first = request.samples[0]
    return first.num_prompt + request.params.n * (first.max_length - first.num_prompt)


def new_tokens(request: Request) -> int:
    """The tokens that follow the prompt so far, in all samples."""
    return sum([max(0, reached(seq) - seq.num_prompt) for seq in request.samples])


def done(request: Request) -> int:
    """The part of `possible` that is done; a sample that ended counts as a whole."""
    if request.output is not None:
        return possible(request)
    count = 0
    for index, seq in enumerate(request.samples):
        last = seq.max_length if seq.finish_reason else reached(seq)
        count += max(0, last - seq.num_prompt)
        if index == 0:
            count += min(last, seq.num_prompt)
    return count


class Progress:
    """What a bar shows of some requests. Of a sample that is preempted nothing is computed any
    more; the bar does not go back."""

    def __init__(self, requests: list[Request], bar):
        self.requests, self.bar = requests, bar
        self.began, self.num_new = time.perf_counter(), 0
        self.next = 0.0  # when to look again

    def look(self, at_once: bool = False) -> None:
        """Show how far the requests are, unless that was done a moment ago."""
        now = time.perf_counter()
        if now < self.next and not at_once:
            return
        requests, bar = self.requests, self.bar
        self.num_new = max(self.num_new, sum(map(new_tokens, requests)))
        finished = sum([request.output is not None for request in requests])
        rate = self.num_new / max(now - self.began, 1e-9)
        bar.set_postfix_str(
            f"{finished:,}/{len(requests):,} prompts, {self.num_new:,} tokens, "
            f"{rate:,.0f} tokens/s", refresh=False,
        )  # fmt: skip
        bar.n = max(bar.n, sum(map(done, requests)))
        bar.refresh()
        self.next = time.perf_counter() + SECONDS


class ProgressLLM(LLM):
    """An engine that shows how far it is, on a terminal and in a notebook."""

    def _steps(self, requests: list[Request], use_tqdm=False) -> Iterator[deque[Request]]:
        if not use_tqdm:
            yield from super()._steps(requests)
            return
        notebook = in_notebook()
        hidden = False if notebook else None  # None: shown on a terminal only
        total = sum(map(possible, requests))
        bars = bar_class(notebook)
        with bars(total=total, desc="generating", bar_format=FORMAT, disable=hidden) as bar:
            progress = Progress(requests, bar)
            for pending in super()._steps(requests):
                if not bar.disable:
                    progress.look()
                yield pending
            if not bar.disable:
                progress.look(at_once=True)


PARTS = {"llm": ProgressLLM}
