"""The pool, the queue and the rates, drawn in the terminal while the engine works."""

import colorsys
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain

from ..engine import LLM
from ..environment import how_to_install
from ..scheduler import Scheduler
from .events import Trace


@contextmanager
def watching(llm: LLM, console=None) -> Iterator[None]:
    """Draw the pool, the queue and the rates while the engine works, on a Console of the package
    `rich`, by default on stderr. Raises ImportError without the package."""
    try:
        from rich.console import Console, Group
        from rich.live import Live
    except ImportError:
        raise ImportError(f"the picture is drawn by rich: {how_to_install('watch')}") from None

    console = console or Console(stderr=True)
    drawn, past = 0.0, deque([(time.perf_counter(), llm.stats())], 16)

    def draw(now: bool = False) -> None:
        nonlocal drawn
        if now or time.perf_counter() - drawn > 0.125:
            past.append((time.perf_counter(), llm.stats()))
            drawing = picture(llm, past, console.width, console.height - 1)
            # below it is an empty line for the ^C that a terminal shows: in the last line of the
            # picture it would begin another one, and the next picture would begin a line too low
            live.update(Group(drawing, ""), refresh=True)
            drawn = time.perf_counter()

    events = llm.scheduler.blocks.events
    tracing = nullcontext(events) if isinstance(events, Trace) else llm.tracing(os.devnull)
    with tracing as trace, Live(console=console, auto_refresh=False) as live:
        trace.on_step = draw
        try:
            yield
        finally:
            trace.on_step = None
            draw(now=True)


def picture(llm: LLM, past: deque[tuple[float, dict]], width: int, height: int):
    """The engine as it is, as a Panel of rich's, for a terminal of that size; past: moments and
    what stats() said."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    blocks, (then, before), (now, stats) = llm.scheduler.blocks, past[0], past[-1]
    groups = blocks.width
    peak = stats.get("peak_blocks", stats["num_blocks"]) * groups
    cells, each = draw_pool(llm.scheduler, peak, max(8, width - 4) * max(1, height - 7))
    # blocks as the user counts them; a cell of the picture is the part of one group of layers
    counts = blocks.num_usable - blocks.num_free, len(blocks.cached), len(blocks.blank)
    used, cached, blank = (f"{n / groups:,.1f}".removesuffix(".0") for n in counts)
    key = f"■ in use {used}  ▣ shared  □ cached {cached}  · blank {blank}"
    key += f", {round(each / groups, 1):g} blocks a cell" if each > 1 else ""
    span = max(now - then, 1e-6)
    names = "output_tokens", "prefill_tokens", "steps"
    tokens, prefill, steps = ((stats[name] - before[name]) / span for name in names)
    aborted = stats["aborted_requests"]
    lines = (
        f"running {stats['running']:,}  waiting {stats['waiting']:,}  "
        f"preemptions {stats['preemptions']:,}  done {stats['requests'] - aborted:,}"
        + (f"  aborted {aborted:,}" if aborted else ""),
        f"{tokens:,.0f} tokens/s  {prefill:,.0f} prompt tokens/s  {steps:,.1f} steps/s  "
        f"{stats['output_tokens']:,} tokens in all",
    )
    title = f"the pool: {blocks.num_usable // groups:,} blocks of {blocks.block_size} tokens"
    title += f", {groups} cells each, for groups of layers" if groups > 1 and each == 1 else ""
    return Panel(Group(cells, Text(key, "bold"), *map(Text, lines)), title=title)


def draw_pool(scheduler: Scheduler, peak: int, room: int) -> tuple:
    """The pool as a Text of rich's of at most `room` cells, and how many blocks each stands for.
    peak: the most blocks that were ever in use: blank ones are handed out from the front, so what
    lies behind it, and behind all that is in use or cached, is blank and left out."""
    from rich.text import Text

    blocks, cells = scheduler.blocks, Text()
    owner = {block: seq.request_id for seq in scheduler.running for block in seq.table if block}
    last = max(chain(owner, blocks.hash_of, [peak]))
    each = -(-(last + 1) // room)
    for cell in range(0, last + 1, each):
        group = range(cell, min(cell + each, last + 1))
        used = next((block for block in group if block in owner), None)  # stands for all of them
        if used is None:
            cells.append("□" if any(block in blocks.cached for block in group) else "·", "dim")
        else:
            rgb = colorsys.hls_to_rgb(owner[used] * 0.382 % 1, 0.55, 0.6)
            red, green, blue = (int(255 * x) for x in rgb)
            mark = "▣" if blocks.ref_count[used] > 1 else "■"
            cells.append(mark, f"rgb({red},{green},{blue})")
    return cells, each
