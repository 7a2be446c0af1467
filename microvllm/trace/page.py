"""The web page of a trace: trace.html, which replays the events, with the events in it."""

from __future__ import annotations

from pathlib import Path

from .replay import encode

TEMPLATE = Path(__file__).with_name("trace.html")


def write_page(events: list[dict], path: str | Path) -> None:
    """One HTML file that shows a trace and needs nothing else, not even a network."""
    # a `<` would let a prompt end the script element that holds it
    data = ",\n".join(map(encode, events)).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8")
    Path(path).write_text(page.replace("/*events*/", data), encoding="utf-8")
