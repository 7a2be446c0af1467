"""The pool, the queue and the rates, drawn in the terminal while the engine works."""

import colorsys
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING

from ..engine import LLM
from ..environment import how_to_install
from ..scheduler import Scheduler
from .extension import current_trace, tracing

if TYPE_CHECKING:
    from rich.panel import Panel
    from rich.text import Text

SECONDS_BETWEEN_PICTURES = 0.125
NUM_MOMENTS = 16  # number of pictures over which rates are averaged


@contextmanager
def watching(llm: LLM, console=None) -> Iterator[None]:
    """Draw the pool, the queue and the rates while the body runs. console: a Console of the package
    `rich`, by default on stderr. Raises ImportError without the package."""
    try:
        from rich.console import Console, Group
        from rich.live import Live
    except ImportError:
        raise ImportError(f"the picture needs rich: {how_to_install('watch')}") from None

    console = console or Console(stderr=True)
    drawn_at = 0.0
    moments = deque([(time.perf_counter(), llm.stats())], NUM_MOMENTS)

    def draw() -> None:
        nonlocal drawn_at
        moments.append((time.perf_counter(), llm.stats()))
        drawing = picture(llm, moments, console.width, console.height - 1)
        # an empty line below the picture for the ^C that a terminal prints: after the last line of
        # the picture it would add a line, and the next picture would begin one line too low
        live.update(Group(drawing, ""), refresh=True)
        drawn_at = time.perf_counter()

    def draw_if_due() -> None:
        if time.perf_counter() - drawn_at > SECONDS_BETWEEN_PICTURES:
            draw()

    present = current_trace(llm)
    context = tracing(llm, os.devnull) if present is None else nullcontext(present)
    with context as trace, Live(console=console, auto_refresh=False) as live:
        trace.after_step = draw_if_due
        try:
            yield
        finally:
            trace.after_step = None
            draw()


def picture(llm: LLM, moments: deque[tuple[float, dict]], width: int, height: int) -> "Panel":
    """The current state of the engine, for a terminal of this size. moments: (time, stats())."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    blocks = llm.scheduler.blocks
    pool = blocks.pool
    num_groups = blocks.blocks_for(1)
    then, before = moments[0]
    now, stats = moments[-1]
    peak = stats["peak_blocks"] * num_groups
    max_cells = max(8, width - 4) * max(1, height - 7)
    cells, blocks_per_cell = draw_pool(llm.scheduler, peak, max_cells)

    def count(num_blocks: int) -> str:
        # whole blocks; a cell of the picture is the part of one group of layers
        return f"{num_blocks / num_groups:,.1f}".removesuffix(".0")

    used = count(pool.num_usable - pool.num_free)
    key = f"■ in use {used}  ▣ shared  □ cached {count(len(pool.cached))}"
    key += f"  · blank {count(len(pool.blank))}"
    if blocks_per_cell > 1:
        key += f", {round(blocks_per_cell / num_groups, 1):g} blocks per cell"
    seconds = max(now - then, 1e-6)
    tokens = (stats["output_tokens"] - before["output_tokens"]) / seconds
    prefill = (stats["prefill_tokens"] - before["prefill_tokens"]) / seconds
    steps = (stats["steps"] - before["steps"]) / seconds
    num_aborted = stats["aborted_requests"]
    requests = (
        f"running {stats['running']:,}  waiting {stats['waiting']:,}  "
        f"preemptions {stats['preemptions']:,}  done {stats['requests'] - num_aborted:,}"
    )
    if num_aborted:
        requests += f"  aborted {num_aborted:,}"
    rates = (
        f"{tokens:,.0f} tokens/s  {prefill:,.0f} prompt tokens/s  {steps:,.1f} steps/s  "
        f"{stats['output_tokens']:,} tokens in total"
    )
    title = f"the pool: {count(pool.num_usable)} blocks of {blocks.block_size} tokens"
    if num_groups > 1 and blocks_per_cell == 1:
        title += f", {num_groups} cells per block, one for each group of layers"
    return Panel(Group(cells, Text(key, "bold"), Text(requests), Text(rates)), title=title)


def draw_pool(scheduler: Scheduler, peak: int, max_cells: int) -> "tuple[Text, int]":
    """(the pool in at most `max_cells` cells, number of blocks per cell). peak: the largest number
    of blocks that were ever in use. Blank blocks are allocated from the front, so blocks after the
    peak that are neither in use nor cached are blank; they are not shown."""
    from rich.text import Text

    pool = scheduler.blocks.pool
    cells = Text()
    sequences = [*scheduler.running, *scheduler.paused]
    request_of = {block: seq.request_id for seq in sequences for block in seq.block_table if block}
    last = max(chain(request_of, pool.hash_of, [peak]))
    blocks_per_cell = -(-(last + 1) // max_cells)
    for start in range(0, last + 1, blocks_per_cell):
        group = range(start, min(start + blocks_per_cell, last + 1))
        used = next((block for block in group if block in request_of), None)  # shown for all
        if used is None:
            is_cached = any(block in pool.cached for block in group)
            cells.append("□" if is_cached else "·", "dim")
        else:
            mark = "▣" if pool.ref_count[used] > 1 else "■"
            cells.append(mark, color_of(request_of[used]))
    return cells, blocks_per_cell


def color_of(request_id: int) -> str:
    """A color for rich. Requests with neighboring numbers have different colors."""
    hue = request_id * 0.382 % 1
    red, green, blue = colorsys.hls_to_rgb(hue, 0.55, 0.6)
    return f"rgb({int(255 * red)},{int(255 * green)},{int(255 * blue)})"
