"""The format of a trace, and Replay, which rebuilds the pool and all sequences from its events.

Events may come from a file that a stranger made. schema.py checks their types, and Replay checks
that they are possible.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .schema import check_event

VERSION = 2

# limits against hostile files. a fork copies its parent's table: at most this number of blocks may
# be copied, and more for each block that an event names
MAX_COPIES = 2**23
COPIES_EACH = 64

# programs that show a trace have arrays as long as the largest number in it. blocks are allocated
# from the first on, and sequences are numbered one by one. so a number has this limit, which grows
# with each block or sequence that was named before
MAX_BLOCKS = 2**20
BLOCKS_EACH = 16
MAX_SEQS = 2**10
SEQS_EACH = 2

# without NaN, which is not JSON
encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def spans(numbers: Iterable[int]) -> str:
    """Write numbers as text, in order: 0, 1, 2, 3, 7 as "0-3 7"."""
    parts = []
    first = None
    last = None
    for number in [*numbers, None]:  # None ends the last span
        if last is None or number != last + 1:
            if last is not None:
                parts.append(f"{first}-{last}" if first != last else f"{first}")
            first = number
        last = number
    return " ".join(parts)


def unspan(text: str) -> Iterator[int]:
    """The numbers in a text from `spans`."""
    for part in text.split():
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def read(path: str | Path) -> list[dict]:
    """Read the events of a trace. An incomplete last line, as of a killed run, is ignored. Raises
    FileNotFoundError, or ValueError with file name and line for a file that is not a trace."""
    events = []
    replay = Replay()
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                break
            try:
                event = json.loads(line, parse_float=finite, parse_constant=finite)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: line {number}: {error}") from None
            replay.follow(event, path, number)
            events.append(event)
    if not events:
        raise ValueError(f"{path}: not a trace: it has no complete line")
    return events


def finite(text: str) -> float:
    """Parse a number of a JSON file. Raises ValueError for NaN and infinities."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.20} is not a finite number")
    return number


@dataclass
class Life:
    """A sequence as the events describe it."""

    request: int
    sample: int
    prompt: int  # number of prompt tokens
    new: list[int]  # its tokens, without those of its parent
    parent: "Life | None" = None  # for a fork: it began with the first tokens of its parent
    num_old: int = 0
    state: str = ""  # "waiting", "running", "preempted", "done"
    table: list[int] = field(default_factory=list)
    computed: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_old + len(self.new)

    @property
    def tokens(self) -> list[int]:
        """All tokens. Forks share them, so a thousand forks of a long prompt take little memory."""
        parts = []
        life: Life | None = self
        stop = self.num_tokens
        while life:
            parts.append(life.new[: stop - life.num_old])
            stop = life.num_old
            life = life.parent
        return [token for part in reversed(parts) for token in part]


class Replay:
    """The pool and all sequences after the applied events. Raises ValueError for an event that is
    unknown, lacks a field, or is impossible in the current state."""

    def __init__(self, events: Iterable[dict] = ()):
        self.num_blocks = 0
        self.block_size = 0
        self.num_groups = 1  # groups of layers, each with its own block table
        self.ref_count: Counter[int] = Counter()  # for blocks that were ever in use
        self.cached: dict[int, None] = {}  # free and findable, the next to be evicted first
        self.hash_of: dict[int, str] = {}
        self.num_used = 0  # blocks in a table
        self.seqs: dict[int, Life] = {}
        self.recent: set[int] = set()  # numbers of sequences that changed since the last reset
        self.states: Counter[str] = Counter()  # number of sequences waiting, running, ...
        self.words: dict[int, str] = {}  # texts of token ids
        self.num_copies = 0  # blocks in the tables of forks
        self.num_named = 0  # blocks that events have put into tables
        self.step = 0
        self.time = 0.0  # seconds
        for event in events:
            self.apply(event)

    def follow(self, event: dict, source, number: int) -> None:
        """Apply an event. An error begins with the source and the line number."""
        try:
            self.apply(event)
        except ValueError as error:
            raise ValueError(f"{source}: line {number}: {error}") from None

    def apply(self, event: dict) -> None:
        """Apply one more event. Raises ValueError that names the impossible field."""
        try:
            check_event(event)
            is_first = self.num_blocks == 0
            if (event["e"] == "pool") is not is_first:
                raise ValueError("`pool` comes first, and once")
            self.time = event.get("t", self.time)
            self.before(event)
            self.change(event)
            self.after(event)
        except ValueError as error:
            raise ValueError(f"not an event of a trace: {error}") from None

    def before(self, event: dict) -> None:
        """Called with each event after its check, before it is applied."""

    def after(self, event: dict) -> None:
        """Called with each event after it was applied. A subclass makes pictures here."""

    def state(self, block: int) -> str:
        """ "null", "used" (by one sequence), "shared", "cached" or "blank"."""
        if block == 0:
            return "null"
        if self.ref_count[block]:
            return "shared" if self.ref_count[block] > 1 else "used"
        return "cached" if block in self.cached else "blank"

    # events. docs/TRACE.md describes them

    def change(self, e: dict) -> None:
        """Change the state as an event says."""
        match e["e"]:
            case "pool":
                self.begin_pool(e)
            case "text":
                self.words.update((int(token), text) for token, text in e["ids"].items())
            case "arrive":
                self.arrive(e)
            case "resume":
                self.become(e["seq"], "running").computed = e["computed"]
                self.extend(self.life(e["seq"]), e["table"], "table")
            case "admit":
                self.become(e["seq"], "running").computed = e["computed"]
            case "hit" | "allocate":
                self.extend(self.life(e["seq"]), e["blocks"], "blocks")
            case "miss":
                self.life(e["seq"])
            case "evict":
                self.evict(e["block"])
            case "copy":
                self.copy(e)
            case "publish":
                self.life(e["seq"])
                self.check_blocks([e["block"]], "block")
                self.hash_of[e["block"]] = e["hash"]
            case "fork":
                self.fork(e)
            case "begin":
                self.begin_step(e)
            case "reject":
                self.reject(e)
            case "tokens":
                self.add_tokens(e)
            case "end":
                pass
            case "force":
                self.life(e["seq"]).new += e["tokens"]
            case "free":
                self.free(self.life(e["seq"]))
            case "preempt":
                self.become(e["seq"], "preempted")
            case "finish" | "abort":
                self.become(e["seq"], "done")
            case "reset":
                self.reset()
            case "window":
                self.leave_window(e)

    def begin_pool(self, e: dict) -> None:
        if e["version"] != VERSION:
            raise ValueError(f"field 'version': expected {VERSION}, got {e['version']}")
        self.num_blocks = e["blocks"]
        self.block_size = e["block_size"]
        self.num_groups = len(e.get("windows") or [-1])
        self.hash_of = {int(block): content_hash for block, content_hash in e["hashes"].items()}
        self.cached = dict.fromkeys(e["cached"])
        self.check_blocks(self.hash_of, "hashes")
        self.check_blocks(self.cached, "cached")

    def arrive(self, e: dict) -> None:
        """A sequence is queued, for the first time or after a reset."""
        number = e["seq"]
        is_back = number in self.seqs
        if is_back:
            if self.become(number, "").table:
                raise ValueError(f"field 'seq': {number} is running already")
            self.states[""] -= 1
        self.add_life(number, Life(e["request"], e["sample"], e["prompt"], list(e["tokens"])))
        self.become(number, "preempted" if is_back else "waiting")

    def evict(self, block: int) -> None:
        if block not in self.cached or block not in self.hash_of:
            raise ValueError(f"field 'block': {block} is not cached")
        del self.cached[block]
        del self.hash_of[block]

    def copy(self, e: dict) -> None:
        table = self.life(e["seq"]).table
        if e["index"] >= len(table):
            raise ValueError(f"field 'index': its table has {len(table)} blocks")
        self.num_named += 1
        if not e["target"]:
            raise ValueError("field 'target': the null block is not written to")
        self.hold([e["target"]], "target")
        table[e["index"]] = e["target"]
        self.release(e["source"], "source")

    def fork(self, e: dict) -> None:
        parent = self.life(e["parent"], "parent")
        self.num_copies += len(parent.table)
        if self.num_copies > MAX_COPIES + COPIES_EACH * self.num_named:
            raise ValueError("too many copies of long tables")
        self.hold(parent.table, "parent")
        life = Life(parent.request, e["sample"], parent.prompt, [], parent, parent.num_tokens)
        self.add_life(e["seq"], life)
        life.table = parent.table.copy()
        self.become(e["seq"], "running").computed = e["computed"]

    def begin_step(self, e: dict) -> None:
        self.step = e["step"]
        for number in unspan(e["decodes"]):
            self.life(number, "decodes").computed += 1
        for number, _, stop in e["prefills"]:
            self.life(number, "prefills").computed = stop

    def reject(self, e: dict) -> None:
        life = self.life(e["seq"])
        blocks = e["blocks"]
        if life.table[len(life.table) - len(blocks) :] != blocks:
            raise ValueError("field 'blocks': they are not the last of its table")
        for _ in blocks:
            self.release(life.table.pop())
        life.computed = e["computed"]

    def add_tokens(self, e: dict) -> None:
        numbers = unspan(e["seqs"])
        for token in e["tokens"]:
            number = next(numbers, None)
            if number is None:
                raise ValueError("field 'tokens': there are more than seqs")
            self.life(number, "seqs").new.append(token)
        if next(numbers, None) is not None:
            raise ValueError("field 'tokens': there are fewer than seqs")

    def free(self, life: Life) -> None:
        for block in reversed(life.table):
            self.release(block)
        life.table = []
        life.computed = 0

    def reset(self) -> None:
        for number in [*self.recent]:
            life = self.become(number, "done")
            life.table = []
            life.computed = 0
        self.recent.clear()
        self.ref_count.clear()
        self.cached.clear()
        self.hash_of.clear()
        self.num_used = 0

    def leave_window(self, e: dict) -> None:
        table = self.life(e["seq"]).table
        for block in filter(None, e["blocks"]):
            if block not in table:
                raise ValueError(f"field 'blocks': {block} is not in its table")
            table[table.index(block)] = 0
            self.release(block)

    # sequences and blocks

    def life(self, number: int, field: str = "seq") -> Life:
        """The sequence with this number. Raises ValueError that names the field if there is
        none."""
        if number not in self.seqs:
            raise ValueError(f"field {field!r}: there is no sequence {number}")
        return self.seqs[number]

    def add_life(self, number: int, life: Life) -> None:
        """Add a sequence, or replace one that arrives again."""
        if number > MAX_SEQS + SEQS_EACH * len(self.seqs):
            raise ValueError(f"field 'seq': no event before has sequences near {number}")
        self.seqs[number] = life

    def become(self, number: int, state: str) -> Life:
        """Change the state of a sequence."""
        life = self.life(number)
        self.recent.add(number)
        self.states[life.state] -= 1
        self.states[state] += 1
        life.state = state
        return life

    def check_blocks(self, blocks: Iterable[int], field: str) -> None:
        """Raise ValueError for a block that the pool does not have or that cannot be in use yet."""
        end = MAX_BLOCKS + BLOCKS_EACH * (self.num_named + len(self.hash_of))
        for block in blocks:
            if not 0 < block < self.num_blocks:
                raise ValueError(f"field {field!r}: there is no block {block}")
            if block >= end:
                raise ValueError(f"field {field!r}: no event before has blocks near {block}")

    def extend(self, life: Life, blocks: list[int], field: str) -> None:
        """Append blocks to the table of a sequence."""
        self.num_named += len(blocks)
        self.hold(blocks, field)
        life.table += blocks

    def hold(self, blocks: list[int], field: str) -> None:
        """Count one more table with these blocks, except the null block."""
        blocks = [block for block in blocks if block]
        self.check_blocks(blocks, field)
        for block in blocks:
            self.cached.pop(block, None)
            self.num_used += self.ref_count[block] == 0
            self.ref_count[block] += 1

    def release(self, block: int, field: str = "blocks") -> None:
        """Count one table less with this block."""
        if block == 0 and field == "blocks":
            return
        if self.ref_count[block] < 1:
            raise ValueError(f"field {field!r}: no table has block {block}")
        self.ref_count[block] -= 1
        if self.ref_count[block] == 0:
            self.num_used -= 1
            if block in self.hash_of:
                self.cached[block] = None
