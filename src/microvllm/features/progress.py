"""A progress bar for `generate`, on a terminal and in a notebook.

    generating  45%|████▌     | [00:03<00:04, 12/64 prompts, 1,834 tokens, 598 tokens/s]

The bar counts the tokens of prompts, and the most tokens that may follow them. When a sample ends
before max_tokens, the bar jumps. So it moves in every step and is full at the end.
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
    """Wrap the steps of LLM.serve with a bar that shows the progress of these requests."""
    if not use_tqdm:
        yield from steps
        return
    is_notebook = in_notebook()
    bar = bar_class(is_notebook)(
        total=sum(map(count_possible, requests)),
        desc="generating",
        bar_format=FORMAT,
        disable=False if is_notebook else None,  # None: only on a terminal
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
    """Return whether a Jupyter kernel runs this code. IPython adds get_ipython to the builtins
    while it runs a cell."""
    get_ipython = getattr(builtins, "get_ipython", None)
    return bool(get_ipython) and "IPKernelApp" in getattr(get_ipython(), "config", ())


@cache
def bar_class(is_notebook: bool) -> type:
    """Return tqdm's class: in a notebook with ipywidgets a widget, otherwise a line of text."""
    if not is_notebook:
        from tqdm import tqdm

        return tqdm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without ipywidgets it warns, and shows a line of text
        from tqdm.auto import tqdm
    return tqdm


class Progress:
    """Updates a bar for some requests. A preempted sample loses its computed tokens, but the bar
    does not go back."""

    def __init__(self, requests: list[Request], bar):
        self.requests = requests
        self.bar = bar
        self.start_time = time.perf_counter()
        self.num_new = 0  # number of tokens after the prompts
        self.next_update = 0.0  # a time, since checking all requests is slow

    def update(self) -> None:
        """Show the progress, unless that was done a moment ago."""
        if time.perf_counter() >= self.next_update:
            self.show()

    def show(self) -> None:
        """Show the progress."""
        requests = self.requests
        bar = self.bar
        self.num_new = max(self.num_new, sum(map(count_new, requests)))
        num_finished = sum([request.output is not None for request in requests])
        rate = self.num_new / max(time.perf_counter() - self.start_time, 1e-9)
        bar.set_postfix_str(
            f"{num_finished:,}/{len(requests):,} prompts, {self.num_new:,} tokens, "
            f"{rate:,.0f} tokens/s",
            refresh=False,
        )
        bar.n = max(bar.n, sum(map(count_done, requests)))
        bar.refresh()
        self.next_update = time.perf_counter() + SECONDS


def count_reached(seq: Sequence) -> int:
    """Return the number of finished tokens of a sequence, including the prompt."""
    if seq.finish_reason is not None:
        return len(seq.token_ids)
    if seq.num_computed < seq.num_prompt:
        return seq.num_computed
    # the last token of a sample is drawn but not computed; a scored text has all its tokens already
    return min(len(seq.token_ids), seq.num_computed + 1)


def count_possible(request: Request) -> int:
    """Return the most tokens of a request: its prompt once, and all samples."""
    first = request.sequences[0]
    return first.num_prompt + request.params.n * (first.max_length - first.num_prompt)


def count_new(request: Request) -> int:
    """Return the number of tokens after the prompt so far, in all samples."""
    return sum([max(0, count_reached(seq) - seq.num_prompt) for seq in request.sequences])


def count_done(request: Request) -> int:
    """Return the finished part of count_possible. A finished sample counts with max_length."""
    if request.output is not None:
        return count_possible(request)
    num_done = 0
    for index, seq in enumerate(request.sequences):
        length = count_reached(seq) if seq.finish_reason is None else seq.max_length
        num_done += max(0, length - seq.num_prompt)
        if index == 0:
            num_done += min(length, seq.num_prompt)
    return num_done
