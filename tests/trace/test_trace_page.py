"""The trace page in a real browser: it shows what the trace says, and runs nothing else.

Needs playwright (`pip install -e '.[browser]'`) and a chromium of the system's.
"""

import json
import re
from pathlib import Path

import pytest
from helpers.browsers import HOSTILE
from helpers.goldens import MODEL, ROOT
from helpers.lives import long_life
from helpers.traces import filled

from microvllm import LLM, SamplingParams
from microvllm.trace import TEMPLATE, Replay, write_comparison, write_page
from microvllm.trace.formats import make_frame

KINDS = ("hit", "copy", "preempt", "evict")
COUNTS = ("used", "part", "shared", "cached", "blank", "running", "waiting")

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]  # a browser


@pytest.fixture
def show(browser, tmp_path):
    """Open the page of some events; nothing may be fetched, nothing may go wrong."""
    troubles = []

    def call(events: list[dict], scheme: str = "light"):
        path = tmp_path / "run.html"
        write_page(events, path)
        page = browser.new_page(
            viewport={"width": 1400, "height": 900}, color_scheme=scheme, device_scale_factor=1
        )
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda asked: asked.url == path.as_uri() or troubles.append(asked.url))
        page.goto(path.as_uri())
        return page

    yield call
    for context in browser.contexts:
        context.close()
    assert not troubles


@pytest.fixture(scope="module")
def events():
    """A run in a small pool: hits, copies, preemptions, evictions, and a prompt that means harm."""
    sampled = SamplingParams(n=3, max_tokens=40, temperature=1.0, ignore_eos=True, seed=5)
    prompts = [f"It was a dark and stormy night in the {name} of" for name in "ab"] + [HOSTILE]
    sizes = {"num_blocks": 24, "max_batched_tokens": 48, "max_model_len": 256}
    with LLM(MODEL, device="cpu", **sizes) as llm:
        with llm.tracing() as trace:
            llm.generate([*prompts, prompts[0] + " its sons"], sampled, use_tqdm=False)
        return trace.events


def marks_of(events: list[dict], kind: str) -> list[int]:
    """The frames in which this happens."""
    marks, begun = [], 0
    for event in events:
        if event["e"] == kind and begun not in marks:
            marks.append(begun)
        begun += event["e"] == "begin"
    return marks


def frames(events: list[dict]) -> list[dict]:
    """What the page must show for each step, and for the end: the pool while the step runs."""
    found, replay = [], Replay()

    def whole(n: int, name: str) -> str:  # squares as blocks, to one digit
        tenths = (20 * n + replay.num_groups) // (2 * replay.num_groups)
        return f"{n:,}" if name in ("running", "waiting") else f"{tenths / 10:,g}"

    def look() -> None:
        size, blocks = replay.block_size, range(1, replay.num_blocks)
        states = [replay.state(block) for block in blocks]
        ends = filled(replay)
        counts = {
            "used": states.count("used") + states.count("shared"),
            "part": sum(held < size for held in ends.values()),
            "shared": states.count("shared"),
            "cached": states.count("cached"),
            "blank": states.count("blank"),
            "running": replay.states["running"],
            "waiting": replay.states["waiting"] + replay.states["preempted"],
        }
        found.append(
            {
                "counts": {name: whole(counts[name], name) for name in COUNTS},
                "ref": [replay.ref_count[b] for b in range(replay.num_blocks)],
                "cached": list(replay.cached),
                "hashes": {str(block): named for block, named in replay.hash_of.items()},
                "tables": {
                    str(s): life.table.copy()
                    for s, life in replay.seqs.items()
                    if life.state == "running"
                },
                "fill": {str(block): held for block, held in ends.items() if held},
            }
        )

    for event in events:
        replay.apply(event)
        if event["e"] == "begin":
            look()
    look()
    return found


STATE = """order => order.map(f => {
  go(f);
  return {
    counts: Object.fromEntries(NAMES.map(name => [name, $(`n-${name}`).textContent])),
    ref: [...state.ref],
    cached: [...state.cached],
    hashes: Object.fromEntries([...state.hash].map((n, b) => [b, hashes[n]]).filter(x => x[1])),
    tables: Object.fromEntries([...state.tables].map(([s, table]) => [s, [...table]])),
    fill: Object.fromEntries([...fill].map((n, b) => [b, n]).filter(([b, n]) => n && state.ref[b])),
  };
})""".replace("NAMES", json.dumps(COUNTS))


def test_the_page_is_small_and_names_no_other_place():
    text = TEMPLATE.read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert "http:" not in text and "https:" not in text and "innerHTML" not in text


def test_every_step_shows_what_the_trace_says(show, events):
    page, wanted = show(events), frames(events)
    last = len(wanted) - 1
    assert page.evaluate("LAST") == last > 48, "one key frame is not enough to test"
    order = [*range(last + 1), *range(last, -1, -7), *((f * 37) % (last + 1) for f in range(60))]
    for f, found in zip(order, page.evaluate(STATE, order), strict=True):
        assert found == wanted[f], f
    used = [sum(count > 0 for count in w["ref"]) for w in wanted]  # some have no token yet
    assert page.evaluate("[...series.used]") == used
    empty = [
        100 * (1 - sum(w["fill"].values()) / (16 * count)) if count else 0
        for w, count in zip(wanted, used, strict=True)
    ]
    assert page.evaluate("[...series.waste]") == pytest.approx(empty)
    made = sum(len(event["tokens"]) for event in events if event["e"] == "tokens")
    assert page.evaluate("series.tokens.reduce((a, b) => a + b)") == made
    for kind in KINDS:
        total = sum(event["e"] == kind for event in events)
        assert total and page.inner_text(f"[data-jump={kind}] b") == str(total)


@pytest.mark.parametrize("guesses", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_forks_failures_drafts_and_a_loop_that_runs_ahead(show, seed, guesses):
    said = long_life(seed, guesses).sim.trace.events
    wanted = frames(said)
    assert show(said).evaluate(STATE, list(range(len(wanted)))) == wanted


def test_the_slider_moves_the_grid_and_the_keyboard_works(show, events):
    page = show(events)

    def grid() -> str:
        return page.evaluate("$('grid').toDataURL()")

    def at() -> int:
        return page.evaluate("frame")

    def press(*keys: str) -> int:
        for key in keys:
            page.keyboard.press(key)
        return at()

    page.locator("#slider").fill("3")
    assert at() == 3 and "Step 4" in page.inner_text("#where")
    before = grid()
    page.locator("#slider").fill("20")
    assert at() == 20 and grid() != before and "Step 21" in page.inner_text("#where")
    page.locator("#slider").fill("3")
    assert grid() == before
    page.focus("#slider")  # its own arrow keys must not add to the page's
    assert press("ArrowRight") == 4 and press("Shift+ArrowRight") == 14
    assert press("ArrowLeft") == 13 and press("Home") == 0 and press("ArrowLeft") == 0
    last = page.evaluate("LAST")
    assert press("End") == last and press("ArrowRight") == last
    for key, kind in zip("hcpe", KINDS, strict=True):
        marks = marks_of(events, kind)
        press("End")  # the jumps go round
        assert [press(key) for _ in range(len(marks) + 1)] == [*marks, marks[0]]
        assert press(f"Shift+{key.upper()}") == marks[-1]
    press("Home")
    page.select_option("#speed", "8")  # slow enough not to come to the end meanwhile
    page.locator("body").press(" ")
    while at() <= 2:  # it goes on by itself
        page.wait_for_timeout(20)
    assert page.inner_text("#play") == "Pause"
    page.locator("body").press(" ")
    assert page.inner_text("#play") == "Play"
    press("?")
    assert page.is_visible("#guide") and "block table" in page.inner_text("#guide")
    press("?")
    assert not page.is_visible("#guide")
    selected = page.evaluate("selected")
    press("?", "Escape")
    assert not page.is_visible("#guide") and page.evaluate("selected") == selected is not None


def test_it_opens_where_something_happens_or_at_the_step_of_the_address(show, events):
    page = show(events)
    assert page.evaluate("frame") == min(marks_of(events, kind)[0] for kind in KINDS)
    assert page.evaluate("state.tables.has(selected)")
    first, url = page.evaluate("frame"), page.url
    for part, frame, theme in (("7", 6, "light"), ("9,dark", 8, "dark"), ("x,y", first, "light")):
        page.goto(f"{url}#{part}")
        page.reload()
        assert page.evaluate("frame") == frame
        assert page.evaluate("document.documentElement.dataset.theme") == theme


def test_the_story_is_told_in_the_order_in_which_it_happened(show, events):
    page = show(events)
    names = "finish arrive admit hit copy fork preempt evict begin"
    marks = dict(zip("✓+→=⇉Y▼✕▤", names.split(), strict=True))
    said, step = [[]], 0
    for event in events:
        if event["e"] in marks.values() and said[step][-1:] != [event["e"]]:
            said[step].append(event["e"])
        if event["e"] == "begin":
            step += 1
            said.append([])
    for f, names in enumerate(said):
        page.evaluate(f"go({f})")
        shown = page.evaluate("[...$('story').children].map(li => li.dataset.mark)")
        shown = [marks[mark] for mark in shown if mark in marks]
        assert [a for a, b in zip(shown, [None, *shown], strict=False) if a != b] == names, f
    assert any({"evict", "preempt"} <= {*names} for names in said)


def test_without_a_mouse_a_block_is_described_and_a_request_is_chosen(show, events):
    page, wanted = show(events), frames(events)
    f = next(i for i, w in enumerate(wanted) if max(w["ref"]) > 1 and w["cached"])
    page.evaluate(f"go({f})")
    here, size = wanted[f], page.evaluate("grid.columns")
    page.focus("#slider")
    page.focus("#gridscroll")

    def value(what: str = "text", of: str = "#gridscroll") -> str:
        return page.get_attribute(of, f"aria-value{what}")

    page.keyboard.press("Home")
    assert value("now") == "0" and "the null block" in value()
    page.keyboard.press("ArrowDown")
    assert value("now") == str(size) and page.evaluate("frame") == f
    page.keyboard.press("ArrowUp")
    shared = here["ref"].index(max(here["ref"]))
    for _ in range(shared):
        page.keyboard.press("ArrowRight")
    said = value()
    assert f"Block {shared}: shared by {max(here['ref'])}" in said
    for words in ("line", "Allocated in step", here["hashes"].get(str(shared), "no hash")):
        assert words in said
    assert page.is_visible("#tip") and f"Block {shared}" in page.inner_text("#tip")
    page.keyboard.press("Enter")
    assert shared in page.evaluate("state.tables.get(selected)")
    page.keyboard.press("End")
    assert value("now") == value("max") == str(len(here["ref"]) - 1)
    page.focus("#lanescroll")
    assert not page.is_visible("#tip")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("selected === lanes[1]")
    assert page.evaluate("nameOf(selected)") in value(of="#lanescroll")
    page.keyboard.press("ArrowLeft")  # a step, as elsewhere
    assert page.evaluate("frame") == f - 1
    # what is said aloud: the step and its story, but not while it plays
    said = page.evaluate("$('spoken').textContent")
    assert f"Step {f}" in said and "A batch of" in said
    page.keyboard.press(" ")
    while page.evaluate("frame") <= f + 1:
        page.wait_for_timeout(20)
    assert page.evaluate("playing ? $('spoken').textContent : null") in (said, None)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_to_mend(show, events, scheme, tmp_path):
    """In the page, in that of two traces, and in the course's book."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs its package")
    page = show(events, scheme)
    page.keyboard.press("?")
    page.evaluate("go(20)")
    write_comparison([events, events], ["a", "b"], tmp_path / "diff.html")
    for other in (None, tmp_path / "diff.html", ROOT / "course" / "book.html"):
        if other:
            page = page.context.browser.new_page(color_scheme=scheme)
            page.goto(other.as_uri())
        found = axe.Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21aa"]}).response
        wrong = [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in found["violations"]]
        assert not wrong, (other, wrong)


def test_where_layers_are_in_groups_blocks_are_counted_whole(show):
    with LLM(MODEL, device="cpu", num_blocks=24) as llm:
        groups = llm.scheduler.blocks.num_groups
        with llm.tracing() as trace:
            llm.generate(["Once upon a time"] * 2, SamplingParams(n=2), use_tqdm=False)
        shown = trace.events
    assert groups > 1
    page = show(shown)
    assert "square below is a part of a block" in page.inner_text(".lede")
    copies = sum(event["e"] == "copy" for event in shown)
    assert copies and page.inner_text("[data-jump=copy] b") == f"{copies // groups}"
    assert "gets square" in page.inner_text("#story") and "says square" in page.inner_text("#sum")
    for node in ("#side", "#gridscroll"):  # a number names a square, and a block is never one
        said = page.inner_text(node) + (page.get_attribute(node, "aria-valuetext") or "")
        assert not re.search(r"\bblocks? \d", said), said
    assert f"23 blocks of 16 tokens · {groups} squares are a block" in page.inner_text("#facts")
    page.keyboard.press("Home")
    used = page.evaluate("state.used")
    numbers = [page.inner_text(f"#n-{kind}") for kind in ("used", "cached", "blank")]
    assert numbers[0] == f"{round(used / groups, 1):g}"
    assert sum(map(float, numbers)) == pytest.approx(23, abs=0.2)


def block_at(page, block: int) -> None:
    """Put the mouse on a block."""
    page.locator("#gridscroll").scroll_into_view_if_needed()
    x, y = page.evaluate(f"place({block})")
    box, half = page.locator("#gridscroll").bounding_box(), page.evaluate("grid.cell") / 2
    page.mouse.move(box["x"] + x + half - 1, box["y"] + y + half - 1)


def test_hovering_tells_what_a_block_is_and_why(show, events):
    page, wanted = show(events), frames(events)
    said = Replay(events)  # texts and tokens
    f = next(i for i, w in enumerate(wanted) if max(w["ref"]) > 1 and w["cached"])
    page.evaluate(f"go({f})")
    here = wanted[f]
    shared = here["ref"].index(max(here["ref"]))
    block_at(page, shared)
    tip = page.inner_text("#tip")
    assert f"Block {shared}: shared by {max(here['ref'])}" in tip
    assert f"reference count {max(here['ref'])}" in tip and "Allocated in step" in tip
    assert here["hashes"].get(str(shared), "no hash") in tip
    holders = [(s, t.index(shared)) for s, t in here["tables"].items() if shared in t]
    for s, line in holders[:4]:
        life = said.seqs[int(s)]
        assert f"request {life.request}, sample {life.sample}: line {line} of its table" in tip
    life, line = said.seqs[int(holders[0][0])], holders[0][1]
    ids = life.tokens[line * 16 : line * 16 + here["fill"][str(shared)]]
    shown = page.locator("#tip .tokens").evaluate("node => node.textContent")
    assert shown == "".join(said.words[token] for token in ids).replace("\n", "⏎")

    block_at(page, here["cached"][0])
    tip = page.inner_text("#tip")
    assert f"Number 1 of {len(here['cached'])} to be evicted" in tip and "reference count 0" in tip
    block_at(page, 0)
    assert "the null block" in page.inner_text("#tip")
    page.mouse.move(2, 2)
    assert not page.is_visible("#tip")

    copy = next(e for e in events if e["e"] == "copy")
    page.evaluate(f"go({sum(e['e'] == 'begin' for e in events[: events.index(copy)])})")
    block_at(page, copy["target"])
    assert f"Copied from block {copy['source']}" in page.inner_text("#tip")


def test_a_selected_request_shows_its_block_table_and_its_life(show, events):
    page, wanted = show(events), frames(events)
    sent = next(event["seq"] for event in events if event["e"] == "preempt")
    page.evaluate(f"select({sent})")
    said = Replay(events)
    for f in (3, len(wanted) // 2, len(wanted) - 1):
        page.evaluate(f"go({f})")
        rows = page.locator("#rows tr")
        table = wanted[f]["tables"].get(str(sent), [])
        assert [row.split("\t")[0] for row in rows.all_inner_texts()] == list(
            map(str, range(len(table)))
        )
        blocks = page.evaluate("[...$('rows').rows].map(r => +r.cells[2].textContent)")
        assert blocks == table
    life = said.seqs[sent]
    assert f"Request {life.request}, sample {life.sample} is done (length)" in page.inner_text(
        "#rname"
    )
    words = page.inner_text("#life")
    for what in ("leaves the queue", "is preempted", "is done", "40 tokens generated"):
        assert what in words
    page.click("#life button:has-text('is preempted')")
    assert f"request {life.request}, sample {life.sample}" in page.inner_text("#story")
    assert "preempted" in page.inner_text("#story")
    page.keyboard.press("ArrowLeft")
    p = page.evaluate(f"state.computed[{sent}]") - 1
    f = page.evaluate("frame")
    block = wanted[f]["tables"][str(sent)][p // 16]
    said = f"{p} = {p // 16} × 16 + {p % 16}, and line {p // 16} says block {block}"
    assert said in page.inner_text("#sum")

    page.keyboard.press("Escape")
    assert page.locator("#rows").count() == 0
    page.keyboard.press("]")
    assert "Request 0" in page.inner_text("#rname")
    # a click on a line of the timeline
    box = page.locator("#lanescroll").bounding_box()
    page.locator("#lanescroll").click(position={"x": box["width"] / 3, "y": 15 * 4 + 8})
    assert page.evaluate("selected === lanes[4]")
    # and on a block
    used = next(int(b) for b in wanted[page.evaluate("frame")]["fill"])
    block_at(page, used)
    page.mouse.down()
    page.mouse.up()
    assert used in page.evaluate("state.tables.get(selected)")


def test_a_prompt_that_means_harm_is_only_text(show, events):
    page = show(events)
    assert HOSTILE.split("'")[0] not in Path(page.url.removeprefix("file://")).read_text()
    seq = next(
        e["seq"] for e in events if e["e"] == "arrive" and e["request"] == 2 and e["sample"] == 0
    )
    page.evaluate(f"go(1); select({seq})")
    texts = page.evaluate("[...$('rows').rows].map(r => r.cells[3].textContent).join('')")
    assert "</script><img src=x onerror=" in texts
    for f in range(0, page.evaluate("LAST"), 5):
        page.evaluate(f"go({f})")
        for block in page.evaluate("[...state.ref.keys()].filter(b => state.ref[b])"):
            page.evaluate(f"showTip({{clientX: 9, clientY: 9}}, describe({block}))")
    assert page.locator("img").count() == page.locator("b:has-text('bold')").count() == 0
    assert page.evaluate("window.hit") is None


def test_light_and_dark(show, events):
    light, dark = show(events), show(events, "dark")
    for page, theme in ((light, "light"), (dark, "dark")):
        assert page.evaluate("document.documentElement.dataset.theme") == theme
    seen = [page.evaluate("$('grid').toDataURL()") for page in (light, dark)]
    assert seen[0] != seen[1]
    dark.click("#theme")
    assert dark.evaluate("$('grid').toDataURL()") == seen[0]


def test_states_differ_without_colour(show, events):
    # drawn in one colour, no two kinds of block have the same picture
    pictures = show(events).evaluate("""() => {
      const kinds = [["used", 1, 1], ["used", .5, 1], ["used", 1, 2], ["cached", 1, 0],
                     ["blank", 1, 0], ["null", 1, 0]];
      for (const name of Object.keys(css)) if (name !== "panel") css[name] = "#000";
      return [16, 7].map(side => kinds.map(([kind, part, holders]) => {
        const canvas = document.createElement("canvas");
        const g = fit(canvas, side, side);
        paint(g, 0, 0, side, kind, "#000", part, holders);
        return canvas.toDataURL();
      }));
    }""")
    assert all(len(set(side)) == 6 for side in pictures)


def test_two_traces_stand_side_by_side(browser, events, tmp_path):
    sampled = SamplingParams(n=3, max_tokens=12, temperature=1.0, ignore_eos=True, seed=5)
    with LLM(MODEL, device="cpu", num_blocks=40, max_model_len=256) as llm, llm.tracing() as trace:
        llm.generate([HOSTILE], sampled, use_tqdm=False)
    other, path, troubles = trace.events, tmp_path / "diff.html", []
    write_comparison([events, other], ["small", HOSTILE], path)
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.goto(path.as_uri())
    assert "</script><img src=x onerror=" in page.inner_text("#nb")
    assert page.locator("img").count() == 0 and page.evaluate("window.hit") is None
    assert "did not serve the same prompts" in page.inner_text("header")
    wanted = [frames(events), frames(other)]
    assert page.evaluate("LAST") == len(wanted[0]) - 1 > len(wanted[1])
    for f in (5, 3, len(wanted[0]) - 1):
        page.locator("#slider").fill(str(f))
        for k in (0, 1):
            here = wanted[k][min(f, len(wanted[k]) - 1)]
            for row, name in (
                (1, "running"),
                (2, "waiting"),
                (3, "used"),
                (4, "cached"),
                (5, "blank"),
            ):
                shown = page.evaluate(f"$('rows').rows[{row}].cells[{k + 1}].textContent")
                assert shown == here["counts"][name], (f, k, name)
            looks = page.evaluate(f"[...runs[{k}].look]")
            cached = {*here["cached"]}
            for b, look in enumerate(looks):
                assert (look == 1) == (b in cached) and (abs(look) > 1) == (here["ref"][b] > 0)
                assert (look < 0) == (here["ref"][b] > 1)
        differs = page.evaluate("$('rows').rows[3].className") == "differs"
        numbers = [w[min(f, len(w) - 1)]["counts"]["used"] for w in wanted]
        assert differs == (numbers[0] != numbers[1])
    page.keyboard.press("Home")
    page.keyboard.press("d")
    assert page.evaluate("frame") > 0
    last = page.evaluate("LAST")
    for name, at in ("first", 0), ("forward", 1), ("forward", 2), ("back", 1), ("last", last):
        page.click(f"#{name}")
        assert page.evaluate("frame") == at, name
    assert page.is_disabled("#forward") and not page.is_disabled("#back")
    assert not troubles
    page.context.close()


def test_two_traces_on_a_narrow_screen_and_in_both_themes(browser, events, tmp_path):
    path = tmp_path / "diff.html"
    write_comparison([events, events], ["small", "a/folder/with_a_long_name.jsonl"], path)
    page = browser.new_page(viewport={"width": 420, "height": 800}, color_scheme="light")
    page.goto(path.as_uri())
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) <= 420  # nothing is beside the screen
    for name in "first", "back", "play", "forward", "last", "differs", "theme", "slider":
        box = page.locator(f"#{name}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 420, name
    assert page.locator("#slider").bounding_box()["width"] > 300
    colour = "getComputedStyle(document.body).backgroundColor"
    light, drawn = page.evaluate(colour), page.evaluate("runs[0].canvas.toDataURL()")
    page.click("#theme")
    assert page.evaluate(colour) != light
    assert page.evaluate("runs[0].canvas.toDataURL()") != drawn
    page.click("#theme")
    assert page.evaluate(colour) == light
    page.emulate_media(color_scheme="dark")  # the event comes later
    while page.evaluate(colour) == light:
        page.wait_for_timeout(20)
    page.context.close()


def test_the_next_preemption_selects_its_victim(show, events):
    page = show(events)
    page.keyboard.press("Escape")
    assert page.evaluate("selected") is None
    for _ in range(2):
        page.keyboard.press("p")
        here = page.evaluate("events.slice(frame ? position[frame - 1] : 0, position[frame])")
        assert page.evaluate("selected") in [e["seq"] for e in here if e["e"] == "preempt"]


def test_a_run_that_did_nothing_and_one_that_was_killed(show, events):
    for said in (events[:1], events[:4], events[: len(events) // 2]):
        page = show(said)
        assert page.evaluate("LAST") == sum(event["e"] == "begin" for event in said)
        page.keyboard.press("End")
        page.keyboard.press("]")
        page.locator("body").press(" ")


def test_characters_of_several_tokens_are_put_together(show):
    text = "« été » 雪 🙂 \\xe2"
    with LLM(MODEL, device="cpu", num_blocks=24, max_model_len=256) as llm:
        with llm.tracing() as trace:
            llm.generate([text], SamplingParams(max_tokens=1), use_tqdm=False)
        pieces = [llm.tokenizer.token_bytes(i) for i in llm.tokenizer.encode(text)]
    assert any("\ufffd" in piece.decode(errors="replace") for piece in pieces), "none is cut"
    page = show(trace.events)
    page.evaluate("go(0); select(0)")
    shown = page.evaluate("[...$('rows').rows].map(r => r.cells[3].textContent).join('')")
    assert shown.replace("\ufffd", "") in f"<|bos|>{text}" and "été » 雪" in shown
    tokens = page.evaluate("[...tokensOf(0, 0, 16).children].map(n => n.textContent)")
    assert tokens[1:] == [p.decode("utf-8", "backslashreplace") for p in pieces[:15]]


@pytest.mark.parametrize("style", ["display: none", "width: 0; height: 0", "width: 60px"])
def test_the_page_in_a_frame_without_room_is_drawn_when_it_gets_some(
    browser, events, tmp_path, style
):
    # it went on for ever, and with it whatever had the frame, such as a notebook's folded cell
    frame = make_frame(events)
    assert "width: 100%" in frame
    path = tmp_path / "cell.html"
    head = "<!DOCTYPE html><meta charset=utf-8>"
    path.write_text(head + frame.replace("width: 100%", style), encoding="utf-8")
    page, troubles = browser.new_page(viewport={"width": 1200, "height": 900}), []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.goto(path.as_uri())
    page.eval_on_selector("iframe", "e => e.style = 'display: block; width: 1000px; height: 700px'")
    inside = page.frame_locator("iframe")
    inside.locator("#last").click()
    assert inside.locator("#where").inner_text().startswith("After the last step")
    # the drawing has the new width
    frame = page.frames[1]
    frame.wait_for_function("document.querySelector('#grid').clientWidth > 400")
    page.close()
    assert not troubles
