"""The format of a trace, and Replay: the pool and all sequences rebuilt from the events alone. They
may come from a file that others made, so each is checked before it is believed."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

VERSION = 2

# fields that are a whole number in any event
COUNTS = (
    "seq request sample samples prompt limit score computed parent block index source target count "
    "step block_size"
).split()

# a fork copies its parent's table: so many blocks in all, and more of them for each that is told
MAX_COPIES, COPIES_EACH = 2**23, 64

# without NaN, which is no JSON
encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def spans(numbers: Iterable[int]) -> str:
    """0, 1, 2, 3, 7 as "0-3 7", in their order."""
    parts, first, last = [], None, None
    for number in [*numbers, None]:  # None ends the last span
        if last is None or number != last + 1:
            if last is not None:
                parts.append(f"{first}-{last}" if first != last else f"{first}")
            first = number
        last = number
    return " ".join(parts)


def unspan(text: str) -> Iterator[int]:
    """What `spans` was given."""
    for part in text.split():
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def read(path: str | Path) -> list[dict]:
    """The events of a trace, without what a run that was killed left of its last line. Raises
    FileNotFoundError, or ValueError with the file's name and the line for what is no trace."""
    events, replay = [], Replay()
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                break
            try:
                events.append(json.loads(line, parse_float=_finite, parse_constant=_finite))
                replay.apply(events[-1])
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: line {number}: {error}") from None
    if not events:
        raise ValueError(f"{path}: no trace: it has no whole line")
    return events


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text:.20} is no number")
    return number


@dataclass
class Life:
    """A sequence as the events tell of it."""

    request: int
    sample: int
    prompt: int  # how many of the tokens are the prompt
    new: list[int]  # its tokens, without those that it began with
    parent: "Life | None" = None  # of a fork, which began with so many of its tokens
    num_old: int = 0
    state: str = ""  # "waiting", "running", "preempted", "done"
    table: list[int] = field(default_factory=list)
    computed: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_old + len(self.new)

    @property
    def tokens(self) -> list[int]:
        """All of them. Forks share them: a thousand of a long prompt take little more than one."""
        parts, life, stop = [], self, self.num_tokens
        while life:
            parts.append(life.new[: stop - life.num_old])
            life, stop = life.parent, life.num_old
        return [token for part in reversed(parts) for token in part]


class Replay:
    """The pool and all sequences after the events that were applied. Raises ValueError for an event
    that is unknown, lacks a field, or cannot happen now."""

    def __init__(self, events: Iterable[dict] = ()):
        self.num_blocks = self.block_size = 0
        self.ref_count: Counter[int] = Counter()  # of the blocks that were ever in use
        self.cached: dict[int, None] = {}  # free and findable, the next to be evicted first
        self.hash_of: dict[int, str] = {}
        self.num_used = 0  # blocks with a holder
        self.seqs: dict[int, Life] = {}
        self.recent: set[int] = set()  # numbers of those that changed since the last reset
        self.states: Counter[str] = Counter()  # how many sequences are waiting, running, ...
        self.words: dict[int, str] = {}  # texts of token ids
        self.num_copies, self.num_told = 0, 0  # blocks in tables: copied by forks, told by events
        self.step = 0
        self.time = 0.0  # seconds
        for event in events:
            self.apply(event)

    def apply(self, event: dict) -> None:
        """Follow one more event."""
        try:
            name, self.time = event["e"], event.get("t", self.time)
            times = [self.time, *event.get("ms", {}).values()]
            counts = [event[key] for key in COUNTS if key in event]
            if not all(0 <= x < 1e12 for x in times) or not all(0 <= x < 2**53 for x in counts):
                raise ValueError("a number is out of range")
            if not all(type(x) is int for x in counts):
                raise ValueError("a number is none")
            if (name == "pool") is bool(self.num_blocks):
                raise ValueError("`pool` comes first, and once")
            self._follow(name, event)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not an event of a trace: {event!r:.200} ({error!r})") from None

    def state(self, block: int) -> str:
        """ "sink", "used" (by one sequence), "shared", "cached" or "blank"."""
        if block == 0:
            return "sink"
        if self.ref_count[block]:
            return "shared" if self.ref_count[block] > 1 else "used"
        return "cached" if block in self.cached else "blank"

    def _hold(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if not 0 < block < self.num_blocks:
                raise ValueError(f"there is no block {block}")
            self.cached.pop(block, None)
            self.num_used += self.ref_count[block] == 0
            self.ref_count[block] += 1

    def _release(self, block: int) -> None:
        if self.ref_count[block] < 1:
            raise ValueError(f"nobody has block {block}")
        self.ref_count[block] -= 1
        if self.ref_count[block] == 0:
            self.num_used -= 1
            if block in self.hash_of:
                self.cached[block] = None

    def _become(self, number: int, state: str) -> Life:
        life = self.seqs[number]
        self.recent.add(number)
        self.states[life.state] -= 1
        self.states[state] += 1
        life.state = state
        return life

    def _follow(self, name: str, e: dict) -> None:
        """What each event means; docs/TRACE.md says it in words."""
        match name:
            case "pool":
                if e["version"] != VERSION:
                    raise ValueError(f"version {VERSION} is wanted")
                self.num_blocks, self.block_size = e["blocks"], e["block_size"]
                if type(self.num_blocks) is not int or not 0 < self.num_blocks <= 2**24:
                    raise ValueError("a pool has 1 to 16,777,216 blocks")
                self.groups = len(e.get("windows") or [-1])
                self.hash_of = {int(block): named for block, named in e["hashes"].items()}
                self.cached = dict.fromkeys(e["cached"])
            case "text":
                if not all(isinstance(text, str) for text in e["ids"].values()):
                    raise ValueError("a token's text is none")
                self.words.update((int(token), text) for token, text in e["ids"].items())
            case "arrive":
                number, tokens = e["seq"], list(e["tokens"])
                if again := number in self.seqs:
                    if self._become(number, "").table:
                        raise ValueError("it is here already")
                    self.states[""] -= 1
                self.seqs[number] = Life(e["request"], e["sample"], e["prompt"], tokens)
                self._become(number, "preempted" if again else "waiting")
            case "resume":
                self._follow("admit", e)
                self._follow("allocate", {"seq": e["seq"], "blocks": e["table"]})
            case "admit":
                self._become(e["seq"], "running").computed = e["computed"]
            case "hit" | "allocate":
                self._hold(filter(None, e["blocks"]))
                self.seqs[e["seq"]].table += e["blocks"]
                self.num_told += len(e["blocks"])
            case "evict":
                del self.cached[e["block"]], self.hash_of[e["block"]]
            case "copy":
                self._hold([e["target"]])
                self.seqs[e["seq"]].table[e["index"]] = e["target"]
                self._release(e["source"])
            case "publish":
                self.hash_of[e["block"]] = e["hash"]
            case "fork":
                of = self.seqs[e["parent"]]
                self.num_copies += len(of.table)
                if self.num_copies > MAX_COPIES + COPIES_EACH * self.num_told:
                    raise ValueError("too many copies of long tables")
                self._hold(filter(None, of.table))
                life = Life(of.request, e["sample"], of.prompt, [], of, of.num_tokens)
                self.seqs[e["seq"]], life.table = life, of.table.copy()
                self._become(e["seq"], "running").computed = e["computed"]
            case "begin":
                self.step = e["step"]
                for number in unspan(e["decodes"]):
                    self.seqs[number].computed += 1
                for number, start, stop in e["prefills"]:
                    if not 0 <= start < stop < 2**53:
                        raise ValueError("a chunk without tokens")
                    self.seqs[number].computed = stop
            case "reject":
                life, blocks = self.seqs[e["seq"]], e["blocks"]
                if life.table[len(life.table) - len(blocks) :] != blocks:
                    raise ValueError("these blocks are not its last")
                for _ in blocks:
                    self._release(life.table.pop())
                life.computed = e["computed"]
            case "tokens":
                for number, token in zip(unspan(e["seqs"]), e["tokens"], strict=True):
                    self.seqs[number].new.append(token)
            case "end":
                if not e.keys() >= {"t", "step", "ms"}:
                    raise ValueError("it lacks t, step or ms")
            case "force":
                self.seqs[e["seq"]].new += e["tokens"]
            case "free":
                life = self.seqs[e["seq"]]
                for block in filter(None, reversed(life.table)):
                    self._release(block)
                life.table, life.computed = [], 0
            case "preempt":
                self._become(e["seq"], "preempted")
            case "finish" | "abort":
                self._become(e["seq"], "done")
            case "reset":
                for number in [*self.recent]:
                    life = self._become(number, "done")
                    life.table, life.computed = [], 0
                for kept in self.recent, self.ref_count, self.cached, self.hash_of:
                    kept.clear()
                self.num_used = 0
            case "window":
                table = self.seqs[e["seq"]].table
                for block in filter(None, e["blocks"]):
                    table[table.index(block)] = 0
                    self._release(block)
            case "miss":
                pass  # nothing that is kept here changes
            case _:
                raise ValueError("there is no event of this name")
