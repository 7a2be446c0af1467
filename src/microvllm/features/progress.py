"""A progress bar while `generate` works, on a terminal and in a notebook.

    generating  45%|████▌     | [00:03<00:04, 12/64 prompts, 1,834 tokens, 598 tokens/s]

The bar counts tokens: those of prompts, and all that may follow them. A sample that ends before its
max_tokens makes it jump, so it moves in every step and is full at the end.
"""

import builtins
import time
import warnings
from collections.abc import Iterator
from contextlib import closing
from functools import cache

from ..engine import Request
from ..scheduler import Sequence

SECONDS = 0.1  # between two updates of the bar
FORMAT = "{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"


def with_progress(steps: Iterator[None], requests: list[Request], use_tqdm: bool) -> Iterator[None]:
    """The same steps (of LLM.serve), with a bar that shows how far these requests are."""
    if not use_tqdm:
        yield from steps
        return
    is_notebook = in_notebook()
    bar = bar_class(is_notebook)(
        total=sum(map(count_possible, requests)),
        desc="generating",
        bar_format=FORMAT,
        disable=False if is_notebook else None,  # None: shown on a terminal only
    )
    with closing(steps), bar:
        progress = Progress(requests, bar)
        for step in steps:
            if not bar.disable:
                progress.update()
            yield step
        if not bar.disable:
            progress.show()


def in_notebook() -> bool:
    """Is this code run by a kernel of Jupyter? IPython puts get_ipython among the builtins while it
    runs a cell."""
    get_ipython = getattr(builtins, "get_ipython", None)
    return bool(get_ipython) and "IPKernelApp" in getattr(get_ipython(), "config", ())


@cache
def bar_class(is_notebook: bool) -> type:
    """tqdm's bar: in a notebook with ipywidgets a widget, else a line of text."""
    if not is_notebook:
        from tqdm import tqdm

        return tqdm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without ipywidgets it warns, and draws a line of text
        from tqdm.auto import tqdm
    return tqdm


class Progress:
    """What a bar shows of some requests. Of a preempted sample nothing is computed any more, but
    the bar does not go back."""

    def __init__(self, requests: list[Request], bar):
        self.requests = requests
        self.bar = bar
        self.began = time.perf_counter()
        self.num_new = 0  # tokens that followed the prompts
        self.next_update = 0.0  # a time: to look at all requests takes a while

    def update(self) -> None:
        """Show how far the requests are, unless that was done a moment ago."""
        if time.perf_counter() >= self.next_update:
            self.show()

    def show(self) -> None:
        """Show how far the requests are."""
        requests = self.requests
        bar = self.bar
        self.num_new = max(self.num_new, sum(map(count_new, requests)))
        num_finished = sum([request.output is not None for request in requests])
        rate = self.num_new / max(time.perf_counter() - self.began, 1e-9)
        bar.set_postfix_str(
            f"{num_finished:,}/{len(requests):,} prompts, {self.num_new:,} tokens, "
            f"{rate:,.0f} tokens/s",
            refresh=False,
        )
        bar.n = max(bar.n, sum(map(count_done, requests)))
        bar.refresh()
        self.next_update = time.perf_counter() + SECONDS


def count_reached(seq: Sequence) -> int:
    """The tokens of a sequence, prompt included, that are done."""
    if seq.finish_reason is not None:
        return len(seq.token_ids)
    if seq.num_computed < seq.num_prompt:
        return seq.num_computed
    # the last token of a sample is drawn, and not computed; of a text that is scored all are known
    return min(len(seq.token_ids), seq.num_computed + 1)


def count_possible(request: Request) -> int:
    """The most tokens that a request can have: of its prompt once, of its samples all."""
    first = request.sequences[0]
    return first.num_prompt + request.params.n * (first.max_length - first.num_prompt)


def count_new(request: Request) -> int:
    """The tokens that follow the prompt so far, in all samples."""
    return sum([max(0, count_reached(seq) - seq.num_prompt) for seq in request.sequences])


def count_done(request: Request) -> int:
    """The part of count_possible that is done; a sample that has ended counts as a whole."""
    if request.output is not None:
        return count_possible(request)
    num_done = 0
    for index, seq in enumerate(request.sequences):
        length = count_reached(seq) if seq.finish_reason is None else seq.max_length
        num_done += max(0, length - seq.num_prompt)
        if index == 0:
            num_done += min(length, seq.num_prompt)
    return num_done
