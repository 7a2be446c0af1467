"""A trace as one web page, and as a timeline of steps and requests for Chrome and Perfetto."""

import html
from pathlib import Path

from .replay import Replay, encode, unspan

TEMPLATE = Path(__file__).with_name("trace.html")
ENGINE, REQUESTS = 1, 2  # the two processes that Chrome's viewer shows
LAUNCH, RESULTS = 1, 2  # the tracks of the engine


def make_page(events: list[dict]) -> str:
    """One page of HTML that shows a trace and needs nothing else, not even a network."""
    # a `<` would let a prompt end the script element that holds it
    data = ",\n".join(map(encode, events)).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("/*events*/", data)


def make_frame(events: list[dict], height: int = 760) -> str:
    """The page as an element of another page, such as a notebook, of which it can read and change
    nothing. height: in pixels."""
    # scripts alone are allowed, so it has an origin of its own; the page itself forbids requests
    return (
        f'<iframe sandbox="allow-scripts" title="trace" style="width: 100%; height: {height}px; '
        f'border: 1px solid #8888" srcdoc="{html.escape(make_page(events))}"></iframe>'
    )


def write_page(events: list[dict], path: str | Path) -> None:
    """`make_page` in a file."""
    Path(path).write_text(make_page(events), encoding="utf-8")


def write_chrome(events: list[dict], path: str | Path) -> None:
    """A trace in the Trace Event Format of Chrome's trace viewer, which ui.perfetto.dev opens. The
    engine has a track for what the host does to launch a step and one for its results, and
    counters; every sequence has a track of its own: waiting, prefill, decode, preempted.
    Raises ValueError, as Replay does, for an event that cannot be followed."""
    timeline = Timeline()
    for number, event in enumerate(events, 1):
        timeline.follow(event, "trace", number)
    for number in list(timeline.doing):  # what was going on ends with the last event
        timeline.turn(number, None)
    Path(path).write_text(encode({"traceEvents": timeline.entries, "displayTimeUnit": "ms"}))


class Timeline(Replay):
    """A Replay that makes entries of Chrome's format. Times are whole microseconds."""

    def __init__(self):
        super().__init__()
        self.entries: list[dict] = []
        self.now = 0
        # what each sequence does, since when, for how many steps
        self.doing: dict[int, tuple[str, int, int]] = {}
        self.begins: dict[int, int] = {}  # of each step that is under way
        # when the last slice of each of the engine's tracks ends: they may not overlap
        self.idle = {LAUNCH: 0, RESULTS: 0}
        self.last_end = self.num_new = 0  # when the last step ended, the tokens of this one
        self.label(ENGINE, 0, "process_name", "engine")
        self.label(ENGINE, LAUNCH, "thread_name", "launch")
        self.label(ENGINE, RESULTS, "thread_name", "results")
        self.label(REQUESTS, 0, "process_name", "requests")

    def _after(self, event: dict) -> None:
        self.now = round(1e6 * self.time)
        match event:
            case {"e": "arrive" | "fork" as name, "seq": number}:
                life, is_fork = self.seqs[number], name == "fork"
                sample = f", sample {life.sample}" if life.sample or is_fork else ""
                self.label(REQUESTS, number + 1, "thread_name", f"request {life.request}{sample}")
                again = life.state == "preempted"
                self.turn(number, "decode" if is_fork else "preempted" if again else "waiting")
            case {"e": "begin", "step": step, "decodes": decodes, "prefills": chunks}:
                numbers = list(unspan(decodes))
                for number in numbers:
                    self.turn(number, "decode")
                for number, start, stop in chunks:
                    guesses = stop > self.seqs[number].num_tokens
                    self.turn(number, "decode" if guesses else f"prefill {start}-{stop}")
                self.begins[step] = self.now
                used, cached = self.num_used, len(self.cached)
                blank = self.num_blocks - 1 - used - cached
                self.count("blocks", used=used, cached=cached, blank=blank)
                rows = sum(stop - start for _, start, stop in chunks)
                self.count("batch", decode=len(numbers), prefill=rows)
                waiting = self.states["waiting"] + self.states["preempted"]
                self.count("sequences", running=self.states["running"], waiting=waiting)
            case {"e": "tokens", "tokens": tokens}:
                self.num_new = len(tokens)
            case {"e": "end", "step": step, "ms": ms}:
                launch = self.begins.pop(step, self.now) - round(1000 * ms.get("schedule", 0))
                self.slices(LAUNCH, f"step {step}", "schedule batch forward sample", ms, launch)
                results = self.now - round(1000 * (ms.get("wait", 0) + ms.get("update", 0)))
                self.slices(RESULTS, f"step {step}", "wait update", ms, results)
                rate = 1e6 * self.num_new / max(self.now - self.last_end, 1)
                self.count("tokens per second", **{"tokens/s": round(rate, 1)})
                self.last_end = self.now
            case {"e": "preempt", "seq": number}:
                self.turn(number, "preempted")
            case {"e": "finish" | "abort", "seq": number}:
                self.turn(number, None)
            case {"e": "copy", "seq": number, "source": source, "target": target}:
                self.mark(f"copy block {source} to {target}", REQUESTS, number + 1)
            case {"e": "evict", "block": block}:
                self.mark(f"evict block {block}", ENGINE, LAUNCH)
            case {"e": "reset"}:
                self.begins.clear()
                for number in list(self.doing):
                    self.turn(number, None)
                self.mark("reset", ENGINE, LAUNCH, "g")

    def turn(self, number: int, what: str | None) -> None:
        """The sequence does something else from now on; decodes in a row are one slice."""
        old, since, steps = self.doing.pop(number, ("", self.now, 0))
        if old == what == "decode":
            self.doing[number] = old, since, steps + 1
            return
        if old:
            long, args = self.now - since, {"steps": steps}
            self.add("X", old, REQUESTS, number + 1, since, dur=long, args=args)
        if what:
            self.doing[number] = what, self.now, 1

    def slices(self, tid: int, title: str, names: str, ms: dict, start: int) -> None:
        """A slice, and in it one after the other what it was made of."""
        parts = [(name, round(1000 * ms[name])) for name in names.split() if name in ms]
        start, total = max(start, self.idle[tid]), sum(long for _, long in parts)
        self.idle[tid] = start + total
        self.add("X", title, ENGINE, tid, start, dur=total, args=ms)
        for name, long in parts:
            self.add("X", name, ENGINE, tid, start, dur=long, args={})
            start += long

    def label(self, pid: int, tid: int, what: str, name: str) -> None:
        self.add("M", what, pid, tid, 0, args={"name": name})

    def count(self, name: str, **values) -> None:
        self.add("C", name, ENGINE, 0, self.now, args=values)

    def mark(self, name: str, pid: int, tid: int, scope: str = "t") -> None:
        self.add("i", name, pid, tid, self.now, s=scope)

    def add(self, kind: str, name: str, pid: int, tid: int, ts: int, **fields) -> None:
        self.entries.append({"ph": kind, "name": name, "pid": pid, "tid": tid, "ts": ts, **fields})
