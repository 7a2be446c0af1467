"""Convert a trace to a web page, or to a timeline of steps and requests for Chrome and Perfetto."""

import html
from pathlib import Path

from .replay import Replay, encode, unspan

TEMPLATE = Path(__file__).with_name("trace.html")
ENGINE, REQUESTS = 1, 2  # the two processes that Chrome's viewer shows
LAUNCH, RESULTS = 1, 2  # the tracks of the engine
LAUNCH_PHASES = ("schedule", "batch", "forward", "sample")
RESULT_PHASES = ("wait", "update")


def make_page(events: list[dict]) -> str:
    """A self-contained HTML page that shows a trace. It needs no network."""
    # a `<` would let a prompt end the script element that holds it
    data = ",\n".join(map(encode, events)).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("/*events*/", data)


def make_frame(events: list[dict], height: int = 760) -> str:
    """The page as an element of another page, such as a notebook. It cannot read or change that
    page. height: in pixels."""
    # only scripts are allowed, so the frame has its own origin; the page itself forbids requests
    return (
        f'<iframe sandbox="allow-scripts" title="trace" style="width: 100%; height: {height}px; '
        f'border: 1px solid #8888" srcdoc="{html.escape(make_page(events))}"></iframe>'
    )


def write_page(events: list[dict], path: str | Path) -> None:
    """Write the result of `make_page` to a file."""
    Path(path).write_text(make_page(events), encoding="utf-8")


def write_chrome(events: list[dict], path: str | Path) -> None:
    """Write a trace in the Trace Event Format of Chrome's trace viewer, which ui.perfetto.dev
    opens. The engine has counters, and one track each for the launch and the results of steps.
    Every sequence has a track: waiting, prefill, decode, preempted. Raises ValueError, as Replay
    does, for an impossible event."""
    timeline = Timeline()
    for number, event in enumerate(events, 1):
        timeline.follow(event, "trace", number)
    for number in list(timeline.doing):  # the last event ends all slices
        timeline.turn(number, None)
    Path(path).write_text(encode({"traceEvents": timeline.entries, "displayTimeUnit": "ms"}))


class Timeline(Replay):
    """A Replay that makes entries of Chrome's format. Times are whole microseconds."""

    def __init__(self):
        super().__init__()
        self.entries: list[dict] = []
        self.now = 0
        # for each sequence: its activity, the time of its begin, its number of steps
        self.doing: dict[int, tuple[str, int, int]] = {}
        self.begins: dict[int, int] = {}  # step in flight -> time of its begin
        # the end of the last slice of each track of the engine: slices must not overlap
        self.last_stop = {LAUNCH: 0, RESULTS: 0}
        self.last_end = 0  # the time when the last step ended
        self.num_new = 0  # new tokens of the current step
        self.label(ENGINE, 0, "process_name", "engine")
        self.label(ENGINE, LAUNCH, "thread_name", "launch")
        self.label(ENGINE, RESULTS, "thread_name", "results")
        self.label(REQUESTS, 0, "process_name", "requests")

    def after(self, event: dict) -> None:
        self.now = round(1e6 * self.time)
        match event:
            case {"e": "arrive" | "fork", "seq": number}:
                self.begin_track(number, is_fork=event["e"] == "fork")
            case {"e": "begin"}:
                self.show_begin(event)
            case {"e": "tokens", "tokens": tokens}:
                self.num_new = len(tokens)
            case {"e": "end"}:
                self.show_end(event)
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

    def begin_track(self, number: int, is_fork: bool) -> None:
        """Begin the track of a sequence that has arrived, or begins as a fork."""
        life = self.seqs[number]
        sample = f", sample {life.sample}" if life.sample or is_fork else ""
        self.label(REQUESTS, number + 1, "thread_name", f"request {life.request}{sample}")
        if is_fork:
            self.turn(number, "decode")
        else:
            self.turn(number, "preempted" if life.state == "preempted" else "waiting")

    def show_begin(self, event: dict) -> None:
        """Show the activities of the sequences of a step, and the counters."""
        numbers = list(unspan(event["decodes"]))
        for number in numbers:
            self.turn(number, "decode")
        num_prefilled = 0
        for number, start, stop in event["prefills"]:
            has_draft = stop > self.seqs[number].num_tokens
            self.turn(number, "decode" if has_draft else f"prefill {start}-{stop}")
            num_prefilled += stop - start
        self.begins[event["step"]] = self.now
        num_cached = len(self.cached)
        num_blank = self.num_blocks - 1 - self.num_used - num_cached
        self.count("blocks", used=self.num_used, cached=num_cached, blank=num_blank)
        self.count("batch", decode=len(numbers), prefill=num_prefilled)
        num_waiting = self.states["waiting"] + self.states["preempted"]
        self.count("sequences", running=self.states["running"], waiting=num_waiting)

    def show_end(self, event: dict) -> None:
        """Show the phases of a step, and its tokens per second."""
        step = event["step"]
        ms = event["ms"]
        launch = self.begins.pop(step, self.now) - round(1000 * ms.get("schedule", 0))
        self.add_slices(LAUNCH, f"step {step}", LAUNCH_PHASES, ms, launch)
        results = self.now - round(1000 * (ms.get("wait", 0) + ms.get("update", 0)))
        self.add_slices(RESULTS, f"step {step}", RESULT_PHASES, ms, results)
        rate = 1e6 * self.num_new / max(self.now - self.last_end, 1)
        self.count("tokens per second", **{"tokens/s": round(rate, 1)})
        self.last_end = self.now

    def turn(self, number: int, name: str | None) -> None:
        """Change the activity of a sequence. Consecutive decodes are one slice."""
        old, since, num_steps = self.doing.pop(number, ("", self.now, 0))
        if old == name == "decode":
            self.doing[number] = (old, since, num_steps + 1)
            return
        if old:
            args = {"steps": num_steps}
            self.add("X", old, REQUESTS, number + 1, since, dur=self.now - since, args=args)
        if name:
            self.doing[number] = (name, self.now, 1)

    def add_slices(
        self, track: int, title: str, phases: tuple[str, ...], ms: dict[str, float], start: int
    ) -> None:
        """Add a slice, and inside it the slices of its phases."""
        parts = [(name, round(1000 * ms[name])) for name in phases if name in ms]
        total = sum(duration for _, duration in parts)
        start = max(start, self.last_stop[track])
        self.last_stop[track] = start + total
        self.add("X", title, ENGINE, track, start, dur=total, args=ms)
        for name, duration in parts:
            self.add("X", name, ENGINE, track, start, dur=duration, args={})
            start += duration

    def label(self, process: int, track: int, kind: str, name: str) -> None:
        self.add("M", kind, process, track, 0, args={"name": name})

    def count(self, name: str, **values) -> None:
        self.add("C", name, ENGINE, 0, self.now, args=values)

    def mark(self, name: str, process: int, track: int, scope: str = "t") -> None:
        self.add("i", name, process, track, self.now, s=scope)

    def add(self, kind: str, name: str, process: int, track: int, time: int, **fields) -> None:
        entry = {"ph": kind, "name": name, "pid": process, "tid": track, "ts": time}
        self.entries.append(entry | fields)
