"""Traces: the events of every block and request, and pages that show them.

    LLM(path, trace="run.jsonl"), `--trace run.jsonl` on the command line, or

    with llm.tracing() as trace:
        llm.generate(prompts)
    trace.page("run.html")

A trace is a text file with one event, a JSON object, on each line; docs/TRACE.md lists all events.
The state of every block at any time can be rebuilt from them.

    extension.py  Trace, an extension of an engine; `make_trace`, `attach` and `tracing`
    recorder.py   Recorder, which compares states and finds the events
    releases.py   the order in which blocks were given back
    log.py        EventLog, the lines in memory or in a file
    schema.py     the fields of events and their types
    replay.py     the format, and Replay, which rebuilds the pool and all sequences from the events
    formats.py    an HTML file that shows a trace, and a file for Chrome and Perfetto
    compare.py    an HTML file that compares two traces of the same traffic
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
