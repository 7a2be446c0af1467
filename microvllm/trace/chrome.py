"""A trace as a timeline of steps and requests, for Chrome and Perfetto."""

from __future__ import annotations

from pathlib import Path

from .replay import Replay, encode, unspan

ENGINE, REQUESTS = 1, 2  # the two processes that the viewer shows
LAUNCH, RESULTS = 1, 2  # the tracks of the engine


def write_chrome(events: list[dict], path: str | Path) -> None:
    """A trace in the Trace Event Format of Chrome's trace viewer, which ui.perfetto.dev opens.

    The engine has a track for what the host does to launch a step and one for its results, and
    counters; every sequence has a track of its own: waiting, prefill, decode, preempted.
    """
    timeline = Timeline()
    for event in events:
        timeline.apply(event)
    timeline.finish()
    Path(path).write_text(encode({"traceEvents": timeline.entries, "displayTimeUnit": "ms"}))


class Timeline:
    """The entries of Chrome's format, made from the events one by one. Times are whole
    microseconds."""

    def __init__(self):
        self.entries: list[dict] = []
        self.replay = Replay()
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

    def apply(self, event: dict) -> None:
        """Follow one event. Raises ValueError, as Replay does, if it cannot be."""
        self.replay.apply(event)
        self.now = round(1e6 * self.replay.time)
        if follow := getattr(self, f"on_{event['e']}", None):
            follow(event)

    def finish(self) -> None:
        """End what the sequences do at the last event."""
        for number in list(self.doing):
            self.turn(number, None)

    # entries

    def add(self, kind: str, name: str, pid: int, tid: int, ts: int, **fields) -> None:
        self.entries.append({"ph": kind, "name": name, "pid": pid, "tid": tid, "ts": ts, **fields})

    def label(self, pid: int, tid: int, what: str, name: str) -> None:
        self.add("M", what, pid, tid, 0, args={"name": name})

    def count(self, name: str, **values) -> None:
        self.add("C", name, ENGINE, 0, self.now, args=values)

    def mark(self, name: str, pid: int, tid: int, scope: str = "t") -> None:
        self.add("i", name, pid, tid, self.now, s=scope)

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

    # events

    def on_arrive(self, event: dict) -> None:
        number, first = event["seq"], event["e"] == "arrive"
        life = self.replay.seqs[number]
        sample = f", sample {life.sample}" if life.sample or not first else ""
        self.label(REQUESTS, number + 1, "thread_name", f"request {life.request}{sample}")
        self.turn(number, "waiting" if first else "decode")

    on_fork = on_arrive

    def on_begin(self, event: dict) -> None:
        replay, decodes = self.replay, list(unspan(event["decodes"]))
        for number in decodes:
            self.turn(number, "decode")
        rows = 0
        for number, start, stop in event["prefills"]:
            guesses = stop > len(replay.seqs[number].tokens)
            self.turn(number, "decode" if guesses else f"prefill {start}-{stop}")
            rows += stop - start
        self.begins[event["step"]] = self.now
        used, cached, states = replay.num_used, len(replay.cached), replay.states
        blank = replay.num_blocks - 1 - used - cached
        self.count("blocks", used=used, cached=cached, blank=blank)
        self.count("batch", decode=len(decodes), prefill=rows)
        waiting = states["waiting"] + states["preempted"]
        self.count("sequences", running=states["running"], waiting=waiting)

    def on_tokens(self, event: dict) -> None:
        self.num_new = len(event["tokens"])

    def on_end(self, event: dict) -> None:
        ms, step = event["ms"], event["step"]
        launch = self.begins.pop(step, self.now) - round(1000 * ms.get("schedule", 0))
        self.slices(LAUNCH, f"step {step}", "schedule batch forward sample", ms, launch)
        results = self.now - round(1000 * (ms.get("wait", 0) + ms.get("update", 0)))
        self.slices(RESULTS, f"step {step}", "wait update", ms, results)
        rate = 1e6 * self.num_new / max(self.now - self.last_end, 1)
        self.count("tokens per second", **{"tokens/s": round(rate, 1)})
        self.last_end = self.now

    def on_preempt(self, event: dict) -> None:
        self.turn(event["seq"], "preempted")

    def on_finish(self, event: dict) -> None:
        self.turn(event["seq"], None)

    on_abort = on_finish

    def on_copy(self, event: dict) -> None:
        what = f"copy block {event['source']} to {event['target']}"
        self.mark(what, REQUESTS, event["seq"] + 1)

    def on_evict(self, event: dict) -> None:
        self.mark(f"evict block {event['block']}", ENGINE, LAUNCH)

    def on_reset(self, event: dict) -> None:
        self.begins.clear()
        self.mark("reset", ENGINE, LAUNCH, "g")
