"""A trace says everything: from its events alone the pool and all sequences can be rebuilt."""

import io
import json
import random
import re
from collections import Counter, deque
from html.parser import HTMLParser

import pytest
from helpers.full_engines import set_overlap
from helpers.goldens import MODEL, ROOT
from helpers.lives import Life, long_life
from helpers.traces import compare
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from microvllm import LLM, SamplingParams
from microvllm.trace import (
    Replay,
    Trace,
    current_trace,
    picture,
    read,
    spans,
    unspan,
    watching,
    write_chrome,
    write_page,
)
from microvllm.trace.log import TIMED
from microvllm.trace.schema import FIELDS

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def test_lists_of_numbers_are_written_as_spans():
    assert spans([]) == "" and list(unspan("")) == []
    assert spans([4, 5, 6, 2, 9, 9, 10, 0]) == "4-6 2 9 9-10 0"
    for seed in range(20):
        numbers = random.Random(seed).choices(range(12), k=seed)
        assert list(unspan(spans(numbers))) == numbers


def test_the_events_of_the_document_are_those_that_there_are():
    page = (ROOT / "docs" / "TRACE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|[^|]+\| ([^|]+) \|$", page, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(FIELDS)
    assert {name for name, fields in rows if fields.split(", ")[0] == "t"} == TIMED


def test_whatever_happens_the_trace_replays():
    run_state_machine_as_test(
        Life, settings=settings(max_examples=60, stateful_step_count=30, deadline=None)
    )


def test_every_event_is_met_and_replays():
    # proof that the test above does get to the hard places
    met = Counter()
    for seed in range(12):
        met += long_life(seed, guesses=seed >= 8).sim.met
    wanted = "arrive admit hit miss evict allocate copy publish fork begin tokens force free"
    wanted += " preempt finish abort reset window reject"
    assert all(met[name] > 5 for name in wanted.split()), met


# an engine ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_llm():
    sizes = {"num_blocks": 24, "max_batched_tokens": 48}
    with LLM(MODEL, device="cpu", max_model_len=256, **sizes) as llm:  # no longer than any window
        yield llm


@pytest.fixture
def llm(shared_llm):
    """A pool of 23 blocks, nothing in it. A test may call `set_overlap`."""
    runner = shared_llm.runner
    inner_loop = shared_llm.loop.inner_loop
    yield shared_llm
    shared_llm.loop.drain()
    shared_llm.runner = runner
    shared_llm.loop.inner_loop = inner_loop
    shared_llm.reset_prefix_cache()


@pytest.fixture
def follow(llm):
    """A callback for `tracing` that replays the trace so far and compares it with the engine."""
    replay = Replay()
    num_replayed = 0

    def look() -> None:
        nonlocal num_replayed
        trace = current_trace(llm)
        trace.recorder.catch_up()
        lines = [*trace.log.lines]
        for line in lines[num_replayed:]:
            replay.apply(json.loads(line))
        num_replayed = len(lines)
        compare(replay, llm.scheduler)

    look.replay = replay
    return look


PROMPTS = [f"It was a dark and stormy night in the {name} of" for name in "old new far big".split()]
SAMPLED = SamplingParams(n=3, max_tokens=40, temperature=1.0, ignore_eos=True, seed=5)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_engines_trace_replays_step_by_step(llm, follow, overlap):
    wanted = llm.generate(PROMPTS, SAMPLED, use_tqdm=False)
    llm.reset_prefix_cache()
    set_overlap(llm, overlap)
    before = llm.stats()
    with llm.tracing() as trace:
        trace.after_step = follow
        outputs = llm.generate(PROMPTS, SAMPLED, use_tqdm=False)
        follow()
        assert [o["samples"] for o in outputs] == [o["samples"] for o in wanted]
    met = Counter(event["e"] for event in trace.events)
    assert met["preempt"] == llm.stats()["preemptions"] - before["preemptions"] > 0
    assert met["begin"] == met["tokens"] == met["end"] == llm.stats()["steps"] - before["steps"]
    assert met["fork"] == 2 * met["finish"] / 3 == 8 and met["copy"] and met["hit"] and met["evict"]
    lives = sorted(follow.replay.seqs.values(), key=lambda life: (life.request, life.sample))
    samples = [sample for output in outputs for sample in output["samples"]]
    for life, sample in zip(lives, samples, strict=True):
        assert life.state == "done" and life.tokens[life.prompt :] == sample["token_ids"]
    words = follow.replay.words
    assert "".join(words[token] for token in lives[0].tokens) == "<|bos|>" + PROMPTS[0] + "".join(
        words[token] for token in samples[0]["token_ids"]
    )


def test_a_step_has_its_milliseconds_by_phase(llm):
    with llm.tracing() as trace:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    ends = [event for event in trace.events if event["e"] == "end"]
    begins = [event for event in trace.events if event["e"] == "begin"]
    phases = {"outside", "schedule", "batch", "forward", "sample", "wait", "update"}
    for begin, end in zip(begins, ends, strict=True):
        assert end["ms"].keys() == phases and min(end["ms"].values()) >= 0
        # the moment of `begin` lies between two phases: another process may run at that point
        took = sum(ms for name, ms in end["ms"].items() if name != "outside")
        assert took >= 1000 * (end["t"] - begin["t"]) - 1
    assert [end["step"] for end in ends] == list(range(1, len(ends) + 1))
    rows = sum(len(list(unspan(b["decodes"]))) for b in begins)
    rows += sum(stop - start for b in begins for _, start, stop in b["prefills"])
    prompts = [event["prompt"] for event in trace.events if event["e"] == "arrive"]
    assert rows == sum(prompts) + len(PROMPTS) * (GREEDY.max_tokens - 1)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_trace_may_begin_and_end_in_the_middle(llm, follow, overlap):
    llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False)  # its blocks stay findable
    set_overlap(llm, overlap)
    for prompt in 2 * PROMPTS:
        llm.add_request(prompt, SAMPLED)
    for _ in range(3):
        llm.step()
    assert llm.scheduler.running and llm.scheduler.waiting
    with llm.tracing() as trace:
        trace.after_step = follow
        follow()
        for _ in range(30):
            llm.step()
        follow()
        llm.abort(next(iter(llm.requests)))
        follow()
    assert current_trace(llm) is None
    while not llm.is_finished():
        llm.step()


def test_a_failed_step_is_followed(llm, follow, monkeypatch):
    broken = iter([False] * 6 + [True])
    forward = llm.model.forward

    def sometimes(batch, cache):
        if next(broken, False):
            raise RuntimeError("out of luck")
        return forward(batch, cache)

    monkeypatch.setattr(llm.model, "forward", sometimes)
    set_overlap(llm)
    with llm.tracing() as trace:
        trace.after_step = follow
        ids = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS]
        with pytest.raises(RuntimeError, match="out of luck"):
            while True:
                llm.step()
        follow()
        assert follow.replay.num_used == len(follow.replay.cached) == 0
        while not llm.is_finished():
            llm.step()
    met = Counter(event["e"] for event in trace.events)
    assert met["reset"] == 1 and met["finish"] == len(ids)


def test_a_calculator_and_scores_are_in_the_trace(llm, follow):
    with llm.tracing() as trace:
        trace.after_step = follow
        llm.score(["1 + 1 ="], [" 2 and so on"])
        llm.chat([{"role": "user", "content": "What is 12*3?"}], GREEDY, use_tqdm=False)
    assert next(e for e in trace.events if e["e"] == "arrive")["score"] > 3


def test_a_file_is_whole_after_every_step_and_after_close(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    with LLM(MODEL, device="cpu", num_blocks=24, trace=path) as llm:
        llm.add_request("Once upon a time", GREEDY)
        for _ in range(4):
            llm.step()
        assert read(path)[-1]["e"] == "end" and read(path)[-1]["step"] == 4
    events = read(path)
    assert [e["e"] for e in events[-2:]] == ["free", "abort"]
    assert events[0]["model"] == MODEL.name and str(tmp_path) not in path.read_text()
    assert Replay(events).num_used == 0
    # killed in the middle of a line
    path.write_bytes(path.read_bytes()[:-7])
    assert read(path) == events[:-1]


def test_mistakes_are_errors(llm, tmp_path):
    with pytest.raises(TypeError, match="path"):
        LLM(MODEL, device="cpu", num_blocks=24, trace=7)
    with llm.tracing(), pytest.raises(ValueError, match="already"):
        with llm.tracing():
            pass
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent.jsonl")
    bad = tmp_path / "bad.jsonl"
    pool = json.dumps(
        {"e": "pool", "version": 2, "blocks": 4, "block_size": 2, "hashes": {}, "cached": []}
    )
    for lines, what in (
        ("", "no complete line"),
        ("{}\n", "line 1"),
        ("[1]\n", "line 1"),
        ("{\n", "line 1"),
        (pool.replace('"version": 2', '"version": 9') + "\n", "version"),
        (f"{pool}\n{pool}\n", "line 2"),
        (pool + '\n{"e": "free", "seq": 3}\n', "line 2"),
        (pool + '\n{"e": "apply", "seq": 3}\n', "line 2"),
        (pool + '\n{"e": "evict", "block": 7}\n', "line 2"),
    ):
        bad.write_text(lines)
        with pytest.raises(ValueError, match=what) as error:
            read(bad)
        assert "bad.jsonl" in str(error.value)


# other formats ------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_chromes_format_has_a_track_per_request_and_counters(llm, tmp_path, overlap):
    set_overlap(llm, overlap)
    with llm.tracing() as trace:
        llm.generate(PROMPTS, SAMPLED, use_tqdm=False)
    trace.chrome(tmp_path / "run.json")
    found = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in found if e["name"] == "thread_name"}
    first = trace.events[0]["e"] == "pool" and min(
        e["request"] for e in trace.events if e["e"] == "arrive"
    )
    wanted = {f"request {first + i}, sample {k}" for i in range(4) for k in (1, 2)}
    wanted |= {f"request {first + i}" for i in range(4)} | {"launch", "results"}
    assert set(names.values()) == wanted

    slices = {}
    for event in found:
        assert isinstance(event["ts"], int) and event["ts"] >= 0 and event["name"]
        if event["ph"] == "X":
            slices.setdefault((event["pid"], event["tid"]), []).append(event)
        else:
            assert event["ph"] in "MCi"
    assert slices.keys() == names.keys()
    for track in slices.values():  # nested or apart
        ends = []
        for event in track if track[0]["pid"] == 1 else sorted(track, key=lambda e: e["ts"]):
            while ends and ends[-1] <= event["ts"]:
                ends.pop()
            assert event["dur"] >= 0 and (not ends or event["ts"] + event["dur"] <= ends[-1])
            ends.append(event["ts"] + event["dur"])
    requests = {
        name
        for key, track in slices.items()
        if key[0] == 2
        for name in {event["name"].split()[0] for event in track}
    }
    assert requests == {"waiting", "prefill", "decode", "preempted"}
    lives = [event for event in trace.events if event["e"] == "begin"]
    decodes = sum(e["args"]["steps"] for e in found if e["ph"] == "X" and e["name"] == "decode")
    assert decodes == sum(len(list(unspan(event["decodes"]))) for event in lives) + 8  # forks

    counters = [e["args"] for e in found if e["ph"] == "C" and e["name"] == "blocks"]
    replay, expected = Replay(), []
    for event in trace.events:
        replay.apply(event)
        if event["e"] == "begin":
            used, cached = replay.num_used, len(replay.cached)
            expected.append({"used": used, "cached": cached, "blank": 23 - used - cached})
    assert counters == expected
    assert {e["name"] for e in found if e["ph"] == "C"} == {
        "blocks", "batch", "sequences", "tokens per second"
    }  # fmt: skip


def test_the_picture_in_the_terminal_counts_what_there_is(llm):
    console_of = pytest.importorskip("rich.console", reason="needs pip install rich").Console
    for prompt in 2 * PROMPTS:
        llm.add_request(prompt, SAMPLED)
    past = deque([(0.0, llm.stats())])
    for _ in range(20):
        llm.step()
    past.append((2.0, llm.stats()))
    console = console_of(width=60, height=12, record=True, file=io.StringIO())
    console.print(picture(llm, past, 60, 12))
    shown = console.export_text()
    pool = llm.scheduler.blocks.pool
    grid = "".join(
        line.strip("│ ")
        for line in shown.splitlines()
        if set(line) & set("■□·") and "in use" not in line
    )
    used = [block for block in range(1, 24) if pool.ref_count[block]]
    assert grid.count("■") + grid.count("▣") == len(used)
    assert grid.count("▣") == sum(pool.ref_count[block] > 1 for block in used)
    assert grid.count("□") == len(pool.cached)
    assert f"in use {len(used)} " in shown and f"cached {len(pool.cached)} " in shown
    stats = llm.stats()
    assert f"running {stats['running']} " in shown and f"waiting {stats['waiting']} " in shown
    assert "10.0 steps/s" in shown
    # a terminal with fewer cells than the pool has blocks
    small = console_of(width=12, height=8, record=True, file=io.StringIO(), no_color=True)
    small.print(picture(llm, past, 12, 8))
    assert "3 blocks" in small.export_text()


def test_watching_draws_and_leaves_the_tokens_alone(llm):
    console_of = pytest.importorskip("rich.console", reason="needs pip install rich").Console
    llm.generate(PROMPTS, SAMPLED, use_tqdm=False)
    plain = llm.generate(PROMPTS, SAMPLED, use_tqdm=False)
    shown = io.StringIO()
    with watching(llm, console_of(file=shown, force_terminal=True, width=80, height=20)):
        assert isinstance(current_trace(llm), Trace)
        watched = llm.generate(PROMPTS, SAMPLED, use_tqdm=False)
    assert current_trace(llm) is None
    assert [o["samples"] for o in watched] == [o["samples"] for o in plain]
    assert shown.getvalue().count("the pool: 23 blocks") >= 2
    with llm.tracing() as trace, watching(llm, console_of(file=shown)):  # both at once
        llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    assert Counter(event["e"] for event in trace.events)["finish"] == 1


def test_what_was_aborted_is_not_counted_as_done(llm):
    console_of = pytest.importorskip("rich.console", reason="needs pip install rich").Console
    before = llm.stats()
    numbers = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS]
    llm.step()
    llm.abort(*numbers[1:])
    while not llm.is_finished():
        llm.step()
    stats = llm.stats()
    assert stats["requests"] - before["requests"] == len(PROMPTS)
    assert stats["aborted_requests"] - before["aborted_requests"] == len(PROMPTS) - 1
    console = console_of(width=80, height=20, record=True, file=io.StringIO())
    console.print(picture(llm, deque([(0.0, before), (1.0, stats)]), 80, 20))
    done = stats["requests"] - stats["aborted_requests"]
    assert f"done {done}  aborted {stats['aborted_requests']} " in console.export_text()


def test_the_line_below_the_picture_is_empty(llm):
    """A terminal shows ^C there: on the picture's last line it would move the next picture."""
    console_of = pytest.importorskip("rich.console", reason="needs pip install rich").Console
    shown = io.StringIO()
    with watching(llm, console_of(file=shown, force_terminal=True, width=80, height=20)):
        llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    ends = re.findall(
        r"╯(.*?)(?:\r|$)", re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown.getvalue()), re.S
    )
    assert ends and all(end.startswith("\n") and not end.strip() for end in ends)


# traces that mean harm ----------------------------------------------------------------------------

POOL = {"e": "pool", "version": 2, "blocks": 1 << 24, "block_size": 1, "hashes": {}, "cached": []}
FACTS = {"e": "arrive", "t": 0, "seq": 0, "request": 0, "sample": 0, "prompt": 1}


def forks(count: int) -> list[dict]:
    """Each of the sequence before it."""
    numbers = range(1, count + 1)
    return [{"e": "fork", "seq": n, "parent": n - 1, "sample": n, "computed": 0} for n in numbers]


def test_forks_share_the_tokens_that_they_began_with():
    """A thousand copies of a long prompt took 1.2 GB, from 291 KB."""
    prompt = list(range(300))
    replay = Replay([POOL, {**FACTS, "tokens": prompt}, *forks(2000)])
    for number in (0, 7, 2000):
        told = {"e": "tokens", "step": 1, "seqs": f"{number} {number}", "tokens": [number, 5]}
        replay.apply(told)
    replay.apply({"e": "fork", "seq": 2001, "parent": 7, "sample": 9, "computed": 0})
    replay.apply({"e": "force", "seq": 2001, "tokens": [8]})
    for number, new in {0: [0, 5], 1: [], 7: [7, 5], 8: [], 2000: [2000, 5]}.items():
        assert replay.seqs[number].tokens == prompt + new
        assert replay.seqs[number].num_tokens == len(prompt + new)
    assert replay.seqs[2001].tokens == [*prompt, 7, 5, 8]
    assert sum(len(life.new) for life in replay.seqs.values()) == 307


@pytest.mark.slow
def test_forks_copy_no_more_blocks_than_a_pool_could_mean():
    table = {"e": "allocate", "seq": 0, "blocks": [*range(1, 1001)]}
    start = [POOL, {**FACTS, "tokens": [1]}, table]
    assert Replay([*start, *forks(1000)]).ref_count[1000] == 1001  # a thousand samples
    with pytest.raises(ValueError, match="too many copies of long tables"):
        Replay([*start, *forks(10_000)])


def test_a_pool_takes_memory_for_the_blocks_that_are_used():
    replay = Replay([POOL])
    assert replay.num_blocks == 1 << 24 and not replay.ref_count
    assert replay.state(5) == replay.state((1 << 24) - 1) == "blank"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize(
    "line",
    [
        '{"e": "text", "ids": {"1": X}}',  # broke the page
        '{"e": "text", "ids": {"1": "a"}, "more": [[X]]}',
        '{"e": "force", "seq": 0, "tokens": [X]}',
        '{"e": "reset", "t": X}',
    ],
)
def test_a_number_that_is_none_is_refused_with_its_line(tmp_path, line, number):
    file = tmp_path / "run.jsonl"
    known = [json.dumps(event) for event in (POOL, {**FACTS, "tokens": [1]})]
    file.write_text(
        "\n".join([*known, line.replace("X", "1" if "text" not in line else '"a"')]) + "\n"
    )
    assert len(read(file)) == 3
    file.write_text("\n".join([*known, line.replace("X", number)]) + "\n")
    with pytest.raises(ValueError, match=r"run.jsonl: line 3: .* is not a finite number"):
        read(file)


@pytest.mark.parametrize("event", [
    {"e": "text", "ids": {"1": 5}},
    {"e": "text", "ids": {"1": None}},
    {"e": "text", "ids": {"1": float("nan")}},
    {"e": "copy", "seq": 0, "index": 0, "source": 3, "target": 2},
    {"e": "copy", "seq": 0, "index": 0, "source": 2**40, "target": 2},
])  # fmt: skip
def test_what_cannot_be_is_no_event(event):
    replay = Replay([POOL, {**FACTS, "tokens": [1]}, {"e": "allocate", "seq": 0, "blocks": [1]}])
    with pytest.raises(ValueError, match="not an event of a trace"):
        replay.apply(event)


def test_no_page_is_made_of_a_number_that_is_none(tmp_path):
    for write in (write_page, write_chrome):
        with pytest.raises(ValueError):
            write([POOL, {**FACTS, "tokens": [float("nan")]}, {"e": "reset", "t": float("nan")}],
                  tmp_path / "page")  # fmt: skip
        assert not (tmp_path / "page").exists()


class Frame(HTMLParser):
    """The elements of what a notebook shows of a trace."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("to_a_file", [False, True])
def test_a_notebook_shows_a_trace_in_a_sandbox_and_a_large_one_not_at_all(
    llm, tmp_path, monkeypatch, to_a_file
):
    hostile = '"></iframe><script>hit()</script>'
    with llm.tracing(tmp_path / "run.jsonl" if to_a_file else None) as trace:
        llm.generate([hostile], GREEDY, use_tqdm=False)
        shown = trace._repr_html_()  # also while it is written
        assert Frame(shown).found[0][0] == "iframe"
    shown = trace._repr_html_()
    trace.page(tmp_path / "run.html")
    ((tag, attributes),) = Frame(shown).found
    assert tag == "iframe" and attributes["sandbox"] == "allow-scripts"
    assert attributes["srcdoc"] == (tmp_path / "run.html").read_text(encoding="utf-8")
    # each notebook keeps what it shows in its own file
    monkeypatch.setattr("microvllm.trace.extension.MAX_NOTEBOOK_BYTES", 1000)
    monkeypatch.setattr(type(trace), "events", property(lambda self: pytest.fail("it was read")))
    hint = trace._repr_html_()
    assert len(hint) < 500 and "iframe" not in hint
    assert ".page(&quot;run.html&quot;)" in hint and "at most 1,000" in hint
