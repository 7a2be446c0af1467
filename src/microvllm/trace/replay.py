"""The format of a trace, and Replay: the pool and all sequences rebuilt from the events alone. They
may come from a file that others made: schema.py says of which types they are, and here is checked
what can happen."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .schema import check_event

VERSION = 2

# a fork copies its parent's table: so many blocks in all, and more of them for each that is told
MAX_COPIES, COPIES_EACH = 2**23, 64

# who shows a trace has arrays as long as the largest number in it. blocks are handed out from the
# first on, and sequences are numbered one by one: there are so many of them, and a few for each
# that is told of
MAX_BLOCKS, BLOCKS_EACH = 2**20, 16
MAX_SEQS, SEQS_EACH = 2**10, 2

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
                event = json.loads(line, parse_float=_finite, parse_constant=_finite)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: line {number}: {error}") from None
            replay.follow(event, path, number)
            events.append(event)
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

    def follow(self, event: dict, source, number: int) -> None:
        """`apply`; an error begins with the source and the number of its line."""
        try:
            self.apply(event)
        except ValueError as error:
            raise ValueError(f"{source}: line {number}: {error}") from None

    def apply(self, event: dict) -> None:
        """Follow one more event. Raises ValueError naming the field that cannot be."""
        try:
            check_event(event)
            if (event["e"] == "pool") is bool(self.num_blocks):
                raise ValueError("`pool` comes first, and once")
            self.time = event.get("t", self.time)
            self._before(event)
            self._follow(event["e"], event)
            self._after(event)
        except ValueError as error:
            raise ValueError(f"not an event of a trace: {error}") from None

    def _before(self, event: dict) -> None:
        """Called with each event that was checked, before it is followed."""

    def _after(self, event: dict) -> None:
        """Called with each event that was followed. A subclass makes pictures here."""

    def state(self, block: int) -> str:
        """ "sink", "used" (by one sequence), "shared", "cached" or "blank"."""
        if block == 0:
            return "sink"
        if self.ref_count[block]:
            return "shared" if self.ref_count[block] > 1 else "used"
        return "cached" if block in self.cached else "blank"

    def _check_blocks(self, blocks: Iterable[int], field: str) -> None:
        """Raises ValueError for a block that the pool has not, or that cannot be in use yet."""
        end = MAX_BLOCKS + BLOCKS_EACH * (self.num_told + len(self.hash_of))
        for block in blocks:
            if not 0 < block < self.num_blocks:
                raise ValueError(f"field {field!r}: there is no block {block}")
            if block >= end:
                raise ValueError(f"field {field!r}: no event before has blocks near {block}")

    def _life(self, number: int, field: str = "seq") -> Life:
        """The sequence of this number. Raises ValueError naming the field if there is none."""
        if number not in self.seqs:
            raise ValueError(f"field {field!r}: there is no sequence {number}")
        return self.seqs[number]

    def _begin(self, number: int, life: Life) -> None:
        """One more sequence, or one that arrives again."""
        if number > MAX_SEQS + SEQS_EACH * len(self.seqs):
            raise ValueError(f"field 'seq': no event before has sequences near {number}")
        self.seqs[number] = life

    def _hold(self, blocks: list[int], field: str) -> None:
        """Count one more holder of these blocks, the sink left out."""
        blocks = [block for block in blocks if block]
        self._check_blocks(blocks, field)
        for block in blocks:
            self.cached.pop(block, None)
            self.num_used += self.ref_count[block] == 0
            self.ref_count[block] += 1

    def _release(self, block: int, field: str = "blocks") -> None:
        if self.ref_count[block] < 1:
            raise ValueError(f"field {field!r}: no table has block {block}")
        self.ref_count[block] -= 1
        if self.ref_count[block] == 0:
            self.num_used -= 1
            if block in self.hash_of:
                self.cached[block] = None

    def _extend(self, life: Life, blocks: list[int], field: str) -> None:
        """Put blocks at the end of a sequence's table."""
        self.num_told += len(blocks)
        self._hold(blocks, field)
        life.table += blocks

    def _become(self, number: int, state: str) -> Life:
        life = self._life(number)
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
                    raise ValueError(f"field 'version': {VERSION} is wanted, not {e['version']}")
                self.num_blocks, self.block_size = e["blocks"], e["block_size"]
                self.groups = len(e.get("windows") or [-1])
                self.hash_of = {int(block): named for block, named in e["hashes"].items()}
                self.cached = dict.fromkeys(e["cached"])
                self._check_blocks(self.hash_of, "hashes")
                self._check_blocks(self.cached, "cached")
            case "text":
                self.words.update((int(token), text) for token, text in e["ids"].items())
            case "arrive":
                number, tokens = e["seq"], list(e["tokens"])
                if again := number in self.seqs:
                    if self._become(number, "").table:
                        raise ValueError("it is here already")
                    self.states[""] -= 1
                self._begin(number, Life(e["request"], e["sample"], e["prompt"], tokens))
                self._become(number, "preempted" if again else "waiting")
            case "resume":
                self._follow("admit", e)
                self._extend(self._life(e["seq"]), e["table"], "table")
            case "admit":
                self._become(e["seq"], "running").computed = e["computed"]
            case "hit" | "allocate":
                self._extend(self._life(e["seq"]), e["blocks"], "blocks")
            case "evict":
                if e["block"] not in self.cached or e["block"] not in self.hash_of:
                    raise ValueError(f"field 'block': {e['block']} is not cached")
                del self.cached[e["block"]], self.hash_of[e["block"]]
            case "copy":
                table = self._life(e["seq"]).table
                if e["index"] >= len(table):
                    raise ValueError(f"field 'index': its table has {len(table)} blocks")
                self.num_told += 1
                if not e["target"]:
                    raise ValueError("field 'target': the sink is not written to")
                self._hold([e["target"]], "target")
                table[e["index"]] = e["target"]
                self._release(e["source"], "source")
            case "publish":
                self._life(e["seq"])
                self._check_blocks([e["block"]], "block")
                self.hash_of[e["block"]] = e["hash"]
            case "fork":
                of = self._life(e["parent"], "parent")
                self.num_copies += len(of.table)
                if self.num_copies > MAX_COPIES + COPIES_EACH * self.num_told:
                    raise ValueError("too many copies of long tables")
                self._hold(of.table, "parent")
                life = Life(of.request, e["sample"], of.prompt, [], of, of.num_tokens)
                self._begin(e["seq"], life)
                life.table = of.table.copy()
                self._become(e["seq"], "running").computed = e["computed"]
            case "begin":
                self.step = e["step"]
                for number in unspan(e["decodes"]):
                    self._life(number, "decodes").computed += 1
                for number, _, stop in e["prefills"]:
                    self._life(number, "prefills").computed = stop
            case "reject":
                life, blocks = self._life(e["seq"]), e["blocks"]
                if life.table[len(life.table) - len(blocks) :] != blocks:
                    raise ValueError("field 'blocks': they are not the last of its table")
                for _ in blocks:
                    self._release(life.table.pop())
                life.computed = e["computed"]
            case "tokens":
                numbers = unspan(e["seqs"])
                for token in e["tokens"]:
                    if (number := next(numbers, None)) is None:
                        raise ValueError("field 'tokens': there are more than seqs")
                    self._life(number, "seqs").new.append(token)
                if next(numbers, None) is not None:
                    raise ValueError("field 'tokens': there are fewer than seqs")
            case "force":
                self._life(e["seq"]).new += e["tokens"]
            case "free":
                life = self._life(e["seq"])
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
                table = self._life(e["seq"]).table
                for block in filter(None, e["blocks"]):
                    if block not in table:
                        raise ValueError(f"field 'blocks': {block} is not in its table")
                    table[table.index(block)] = 0
                    self._release(block)
            case "end":
                pass
            case "miss":
                self._life(e["seq"])
            case _:
                raise ValueError("there is no event of this name")
