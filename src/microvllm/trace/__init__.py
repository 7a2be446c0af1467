"""See the memory: what happens to every block and request, as events, and pictures made of them.

    LLM(path, trace="run.jsonl"), `--trace run.jsonl` on the command line, or

    with llm.tracing() as trace:
        llm.generate(prompts)
    trace.page("run.html")

A trace is a text file with one JSON object, an event, a line; docs/TRACE.md lists all events. From
them alone every block's state can be rebuilt at any time.

    extension.py  Trace, an extension of an engine; `make_trace`, `attach` and `tracing`
    recorder.py   Recorder, which compares states and finds the events
    log.py        EventLog, the lines in memory or in a file
    schema.py     which fields an event has, and what types they have
    replay.py     the format, and Replay, which rebuilds the pool and all sequences from the events
    formats.py    one HTML file that shows a trace, and a file for Chrome and Perfetto
    compare.py    one HTML file that shows two traces of the same traffic side by side
    watch.py      the pool drawn in the terminal while the engine works
"""

from .compare import write_comparison
from .extension import Trace, attach, current_trace, detach, make_trace, tracing
from .formats import TEMPLATE, write_chrome, write_page
from .replay import Life, Replay, read, spans, unspan
from .watch import picture, watching

__all__ = [
    "TEMPLATE", "Life", "Replay", "Trace", "attach", "current_trace", "detach", "make_trace",
    "picture", "read", "spans", "tracing", "unspan", "watching", "write_chrome",
    "write_comparison", "write_page",
]  # fmt: skip
