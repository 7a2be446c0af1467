"""Demo: a web page of a small pool with prefix hits, copies, evictions and a preemption.

The bundled model serves five requests in a pool of 21 blocks. It runs in the core's own engine:
plain torch, one block table for each sequence, no compilation.

    most prompts have several samples               copies on write
    three prompts begin with the same sentences     prefix hits
    two tales need more blocks than are blank       evictions
    all requests grow until the pool is full        a preemption

Lengths are fixed and no text ends early, so these events are the same on every machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import webbrowser
from collections.abc import Iterator
from pathlib import Path

from microvllm.blocks import BlockManager, BlockPool
from microvllm.cli import terminal

BLOCKS = 22  # including the null block
BOOK = "The white whale swam before him as the wild thing that all men of the sea feared. He had "
BOOK += "followed it through three oceans, and he would follow it until one of them was dead. "
# (the step in which it arrives, prompt, samples, new tokens)
SCENE = [
    (0, BOOK + "The captain said:", 3, 20),
    (4, BOOK + "The oldest of the sailors said:", 3, 20),
    (
        12,
        "It was a dark and stormy night, and two travellers came to the door of an inn",
        2,
        71,
    ),
    (16, "Once upon a time there was a miller who had a daughter and a mill by the river.", 2, 66),
    (40, BOOK + "The captain's wife said:", 1, 12),
]
KINDS = {
    "hit": "a prefix hit: a prompt begins with text that is already in the pool",
    "copy": "a copy on write: samples share a block, and one of them writes into it",
    "evict": "an eviction: no block is blank, so a cached one is used for another text",
    "preempt": "a preemption: no block is free, so a request goes back to the queue",
}


def play(llm, scene: list[tuple] = SCENE) -> None:
    """Serve all requests of a scene with the core's LLM. A prompt is a text, or (text, number of
    its tokens to use)."""
    from microvllm.sampler import SamplingParams

    pending = sorted(scene)
    step = 0
    while pending or not llm.is_finished():
        while pending and pending[0][0] <= step:
            _, prompt, n, new = pending.pop(0)
            if isinstance(prompt, tuple):
                prompt = llm.tokenizer.encode(prompt[0])[: prompt[1]]
            params = SamplingParams(0.8, new, 50, ignore_eos=True, n=n, seed=7)
            llm.add_request(prompt, params)
        llm.step()
        step += 1


def record(
    path: Path,
    scene: list[tuple] = SCENE,
    blocks: int = BLOCKS,
    budget: int = 64,
    pool_class: type[BlockPool] = BlockPool,
) -> list[dict]:
    """Run a scene and write its trace to `path`; returns the events. blocks: size of the pool,
    including the null block; budget: largest number of tokens in a step; pool_class: class of the
    pool."""
    from microvllm.cli.commands import MODEL_DIR
    from microvllm.engine import LLM
    from microvllm.trace import Trace, attach, detach, read

    if not MODEL_DIR.is_dir():
        raise ValueError(f"the demo needs the bundled model, which is missing: {MODEL_DIR}")
    with LLM(MODEL_DIR, device="cpu", num_blocks=blocks, max_batched_tokens=budget) as llm:
        if pool_class is not BlockPool:
            manager: BlockManager = llm.scheduler.blocks
            manager.pool = pool_class(manager.pool.num_blocks)
        token_bytes = llm.tokenizer.token_bytes
        trace = Trace(
            path,
            decode=lambda token_id: token_bytes(token_id).decode("utf-8", "surrogateescape"),
            model=MODEL_DIR.name,
        )
        attach(llm, trace)
        try:
            play(llm, scene)
        finally:
            detach(llm, trace)
    return read(path)


def numbered(events: list[dict]) -> Iterator[tuple[int, dict]]:
    """(step, event) for each event, with the step numbers of the page. The events while a step is
    planned have the number of this step."""
    step = 1
    for event in events:
        yield step, event
        step += event["e"] == "begin"


def first_steps(events: list[dict]) -> dict[str, int]:
    """For each of KINDS, the number of the first step with such an event."""
    steps: dict[str, int] = {}
    for step, event in numbered(events):
        if event["e"] in KINDS:
            steps.setdefault(event["e"], step)
    return steps


def take_picture(page: Path, picture: Path, step: int, theme: str) -> None:
    """Write a PNG of the page at a step with the system's Chromium. Raises ValueError if
    Chromium is missing or fails."""
    names = "chromium", "chromium-browser", "google-chrome", "chrome"
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        raise ValueError("--picture needs Chromium: install it (Debian: apt install chromium)")
    flags = "headless no-sandbox disable-gpu hide-scrollbars force-device-scale-factor=1"
    result = subprocess.run(
        [chromium, *(f"--{flag}" for flag in flags.split()), "--window-size=1400,830",
         f"--screenshot={picture.absolute()}", f"{page.absolute().as_uri()}#{step},{theme}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if result.returncode or not picture.is_file():
        raise ValueError(f"{chromium} wrote no picture: {result.stderr.strip()[-200:]}")


def has_screen() -> bool:
    """Is the program in a terminal with a display, so that a browser can open a window?"""
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return sys.stdout.isatty() and bool(display or sys.platform in ("darwin", "win32"))


def main(argv: list[str] | None = None) -> None:
    parser = terminal.Parser(prog="microvllm lab demo", description=__doc__)
    add = parser.add_argument
    help_text = "folder for demo.jsonl and demo.html (default: %(default)s)"
    add("--out", type=Path, default=Path("lab-results"), metavar="DIR", help=help_text)
    add("--no-open", action="store_true", help="print the address of the page, do not open it")
    help_text = "also write pictures of the page at the first preemption, X.png and X-dark.png; "
    help_text += "needs Chromium"
    add("--picture", type=Path, metavar="X.png", help=help_text)
    args = parser.parse_args(argv)
    trace, page = args.out / "demo.jsonl", args.out / "demo.html"
    with terminal.user_errors(args):
        args.out.mkdir(parents=True, exist_ok=True)
        with terminal.at_once():
            from microvllm.trace import write_page
        events = record(trace)
        write_page(events, page)
        steps = first_steps(events)
        if args.picture:
            dark = args.picture.with_name(f"{args.picture.stem}-dark{args.picture.suffix}")
            for picture, theme in ((args.picture, "light"), (dark, "dark")):
                take_picture(page, picture, steps["preempt"], theme)
    count = sum(event["e"] == "begin" for event in events)
    print(f"{count} steps in a pool of {BLOCKS - 1} blocks. The first step with each event:")
    for kind, step in sorted(steps.items(), key=lambda item: item[1]):
        print(f"  {step:4}  {KINDS[kind]}")
    print(f"\nwritten: {trace}, {page}")
    if not args.no_open and has_screen() and webbrowser.open(page.absolute().as_uri()):
        return
    print(f"open the page in a browser: {page.absolute().as_uri()}")
