"""The engine in Jupyter: cells are run by a real kernel and interrupted, and what they show is
looked at in a real browser.

Needs nbclient, ipykernel and playwright (`pip install -e '.[browser]'`) and a chromium of the
system's.
"""

import html
import os
import signal
import threading
import time

import pytest
from helpers.browsers import HOSTILE
from helpers.goldens import MODEL

pytestmark = pytest.mark.slow  # processes, a browser
nbclient = pytest.importorskip("nbclient", reason="needs pip install nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel", reason="needs pip install ipykernel")

START = f"""
import torch
torch.set_num_threads(1)
from microvllm import LLM, SamplingParams
llm = LLM({str(MODEL)!r}, device="cpu", num_blocks=400, plain=True)
"""
LONG = "SamplingParams(max_tokens=900, ignore_eos=True, temperature=0)"


class Notebook:
    """A kernel and the cells that it ran."""

    def __init__(self, folder):
        self.notebook = nbformat.v4.new_notebook()
        resources = {"metadata": {"path": str(folder)}}
        self.client = nbclient.NotebookClient(
            self.notebook, timeout=300, allow_errors=True, kernel_name="python3",
            resources=resources,
        )  # fmt: skip

    def run(self, code: str) -> list[dict]:
        """What a cell shows."""
        cell = nbformat.v4.new_code_cell(code)
        self.notebook.cells.append(cell)
        self.client.execute_cell(cell, len(self.notebook.cells) - 1)
        return cell.outputs

    def run_and_interrupt(self, code: str, started) -> list[dict]:
        """The same, interrupted as soon as the file `started` is there."""

        def press() -> None:
            while not started.exists():
                time.sleep(0.01)
            time.sleep(0.3)
            os.kill(self.client.km.provisioner.pid, signal.SIGINT)

        thread = threading.Thread(target=press)
        thread.start()
        try:
            return self.run(code)
        finally:
            thread.join(60)


def texts(outputs: list[dict], kind: str = "text/plain") -> str:
    """What was printed or returned, as text; no cell may have failed."""
    assert not [o for o in outputs if o["output_type"] == "error"], outputs
    shown = [o.get("text") or o.get("data", {}).get(kind, "") for o in outputs]
    return "".join(shown)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    found = Notebook(folder)
    found.folder = folder
    with found.client.setup_kernel():
        texts(found.run(START))
        yield found


def test_a_kernel_that_is_interrupted_goes_on_with_a_usable_engine(notebook):
    ask = "llm.generate('One', SamplingParams(max_tokens=5, temperature=0), False)[0].text"
    before = texts(notebook.run(ask))
    started = notebook.folder / "started"
    code = f"""
from pathlib import Path
short = SamplingParams(max_tokens=3, ignore_eos=True, temperature=0)
def begun(tokens, logits):
    if len(tokens) > 30:
        Path({str(started)!r}).touch()
    return logits
long = SamplingParams(
    max_tokens=900, ignore_eos=True, temperature=0, logits_processor=begun)
llm.generate(["One", "Two", "Three"], [short, long, long])
"""
    outputs = notebook.run_and_interrupt(code, started)
    (error,) = [output for output in outputs if output["output_type"] == "error"]
    assert error["ename"] == "KeyboardInterrupt"
    shown = texts(
        notebook.run(
            "found = llm.partial_outputs()\n"
            "[(o.finish_reason, len(o.token_ids) > 20, len(o.token_ids) < 900) for o in found], "
            "llm.is_finished()"
        )
    )
    aborted = "('abort', True, True)"
    assert shown == f"([('length', False, True), {aborted}, {aborted}], True)"
    assert texts(notebook.run(f"{ask}, llm.partial_outputs()")) == f"({before}, [])"


def test_the_bar_of_a_cell_is_shown_and_brings_no_warning(notebook):
    outputs = notebook.run(f"outputs = llm.generate(['One'] * 3, {LONG.replace('900', '60')})")
    shown = texts(outputs)
    assert "Warning" not in shown
    # with ipywidgets the bar is a widget, whose state is kept apart; its spaces have a width
    state = str([*notebook.client.widget_state.values()]).replace(r"\u2007", " ")
    assert "generating" in shown and "3/3 prompts, 180 tokens, " in shown + state


def test_nothing_that_a_cell_returns_is_long(notebook):
    outputs = notebook.run(
        f"many = llm.generate(['One'] * 300, {LONG.replace('900', '20')}, use_tqdm=False)\nmany"
    )
    (shown,) = outputs
    assert shown["data"]["text/plain"].endswith("... and 297 more]")
    assert len(shown["data"]["text/plain"]) < 3000 and len(shown["data"]["text/html"]) < 20_000
    assert texts(notebook.run("llm")).startswith("<LLM 'oldbooks-d6': era 5, float32 on cpu, 400")
    (tuple_of_them,) = notebook.run("many, 3")
    assert len(tuple_of_them["data"]["text/plain"]) < 3000


@pytest.fixture
def show(browser, tmp_path):
    """Open the HTML of an output as a notebook shows it; nothing may be fetched."""
    troubles = []

    def call(fragment: str):
        path = tmp_path / "cell.html"
        path.write_text(
            "<!DOCTYPE html><meta charset=utf-8><title>cell</title><h1>cell</h1>" + fragment,
            encoding="utf-8",
        )
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))

        def asked(request):
            if request.url not in (path.as_uri(), "about:srcdoc"):
                troubles.append(request.url)

        page.on("request", asked)
        page.goto(path.as_uri(), wait_until="domcontentloaded")
        return page

    yield call
    for context in browser.contexts:
        context.close()
    assert not troubles


def picture(page, name: str) -> None:
    """A picture to look at, where NOTEBOOK_PICTURES names a folder."""
    if folder := os.environ.get("NOTEBOOK_PICTURES"):
        page.screenshot(path=f"{folder}/{name}.png")


def test_a_browser_shows_outputs_as_text(notebook, show):
    code = f"hostile = {HOSTILE!r}\nllm.generate([hostile, 'One'], {LONG.replace('900', '12')})"
    data = notebook.run(code)[-1]["data"]
    page = show(data["text/html"])
    assert page.locator("td").nth(0).inner_text() == f"<|bos|>{HOSTILE}"
    assert page.evaluate("window.hit") is None and page.locator("img, script, b").count() == 0
    assert page.locator("tr").count() == 3
    picture(page, "outputs")


def test_a_browser_shows_a_trace_in_a_frame_of_its_own(notebook, show):
    code = f"with llm.tracing() as t:\n    llm.generate([{HOSTILE!r}, 'Two'], "
    texts(notebook.run(code + LONG.replace("900", "40") + ", use_tqdm=False)"))
    (shown,) = notebook.run("t")
    page = show(shown["data"]["text/html"])
    page.frame_locator("iframe").get_by_text("The pool of blocks").wait_for()
    frame = page.frames[1]
    assert frame.evaluate("window.hit") is None and frame.evaluate("window.origin") == "null"
    with pytest.raises(Exception, match="cross-origin|SecurityError"):
        frame.evaluate("parent.document.title")
    assert frame.locator("text=step").count() > 0
    picture(page, "trace")
    html_of_it = shown["data"]["text/html"]
    assert html_of_it.count("<") == 2  # the frame's own tags
    assert "<img" not in html.unescape(html_of_it).partition("srcdoc=")[2]
