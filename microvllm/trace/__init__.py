"""See the memory: what happens to every block and request, as events, and pictures made of them.

    LLM(path, trace="run.jsonl"), `--trace run.jsonl` on the command line, or

    with llm.tracing() as trace:
        llm.generate(prompts)
    trace.page("run.html")

A trace is a text file with one JSON object, an event, a line. From the events alone every block's
state can be rebuilt at any time: `Replay` does it here, trace.html once more in a browser. `e` is
the event's name, `t` seconds since the trace began, `seq` the number of a sequence, given on
arrival. A list of such numbers is written "0-3 7", which is 0, 1, 2, 3, 7.

    event     what it means                      beside `e`
    pool      always the first: the pool as      version, blocks (block 0, the sink, included),
              it is now                          block_size, caching (is the prefix cache on),
                                                 max_batch_size, max_batched_tokens, hashes {block:
                                                 hash}, cached [block...] the next to be evicted
                                                 first; windows [tokens...] of each group of layers
                                                 with blocks of its own, -1 is none (the entries of
                                                 a table are theirs in turn); model, device, where
                                                 an engine is traced
    text      the first of these tokens follow   ids {token id: its text}; \\udce2 for a byte e2
                                                 that is a part of a character
    arrive    a request waits in the queue       t, seq, request, sample (of the request), samples
                                                 (it will fork into so many), tokens, prompt (how
                                                 many of the tokens are that), limit (it ends at so
                                                 many), score (so many tokens are scored, and none
                                                 written)
    resume    it was running already when the    seq, table [block...], computed
              trace began
    admit     it leaves the queue; its table is  t, seq, computed (tokens that the prefix cache had)
              empty and it gets:
    hit       blocks of the prefix cache, put    seq, blocks (0 for one that its window would
              at the table's end                 have left already)
    miss      the prefix cache had no more       seq, count (full blocks that were looked for and
                                                 not found)
    evict     a cached block is the oldest and   block
              is needed: its hash is forgotten
    allocate  blank blocks, put at the table's   seq, blocks
              end
    copy      copy-on-write: another sample      seq, index (in the table), source, target
              also holds the block it is about
              to write, so it gets a copy
    publish   a block is full, and findable      seq, block, hash
              from now on
    fork      another sample of a request        seq, parent, sample, computed (how many tokens,
              begins: same tokens, same table    with the prompt's last, whose step begins next)
    begin     a step is planned and starts.      t, step (1, 2, ...), decodes "seqs" one token each,
              `computed` of all its sequences    prefills [[seq, start, stop]...] chunks of prompts,
              moves on                           of what has to be computed once more, or of a token
                                                 and guesses, where stop is beyond what is known
    reject    it had guessed wrongly: it goes    seq, computed, blocks
              back to fewer computed tokens, and
              so many blocks less at its table's
              end
    tokens    a step's new tokens are known      step, seqs "seqs", tokens [token id...] one for one
    end       the step is over                   t, step, ms {phase: milliseconds of the host}:
                                                 outside (between steps), schedule, batch (arrays),
                                                 forward, sample, wait (for the device), update
    force     a tool wrote these tokens          seq, tokens
    free      its blocks are given back: one     seq
              holder less each, the table's
              last block first. who has none
              left is cached if it has a hash,
              else blank
    preempt   it was sent back to the queue to   t, seq
              make room, or by a reset
    finish    it is done                         t, seq, reason ("stop", "length", "error")
    abort     it was ended from outside          t, seq
    reset     a step failed, or the weights      t
              changed: steps under way are void
    forget    the prefix cache is emptied        -
    window    blocks have left the window of     seq, blocks
              their layers: one holder less
              each, and 0 stands in the table

A GPU's loop is one step ahead: `begin` of step 8 comes before `tokens` and `end` of step 7, whose
finished sequences are in step 8 by mistake. Scheduler and BlockManager tell most events themselves,
so one without a model can be traced as well, by `Trace.attach`; it has no `end`.
"""

from __future__ import annotations

import colorsys
import json
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from ..engine import LLM
    from ..scheduler import Scheduler, Sequence

log = logging.getLogger("microvllm")

VERSION = 1
TEMPLATE = Path(__file__).with_name("trace.html")

# fields that are a whole number in any event
_COUNTS = (
    "seq request sample samples prompt limit score computed parent block index source target count "
    "step block_size"
).split()

_encode = json.JSONEncoder(separators=(",", ":")).encode


def spans(numbers: Iterable[int]) -> str:
    """0, 1, 2, 3, 7 as "0-3 7", in their order."""
    parts, first, last = [], None, None
    for number in numbers:
        if number - 1 != last:
            if first is not None:
                parts.append(f"{first}-{last}" if first != last else f"{first}")
            first = number
        last = number
    if first is not None:
        parts.append(f"{first}-{last}" if first != last else f"{first}")
    return " ".join(parts)


def unspan(text: str) -> Iterator[int]:
    """What `spans` was given."""
    for part in text.split():
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


# events in ----------------------------------------------------------------------------------------


class Trace:
    """Writes down what a scheduler and its blocks do, from `attach` to `close`.

    path: file to write, whole at the end of every step, so that the trace of a run that was killed
    can be read; None: kept in memory. decode: the text of a token id. Set `on_step` to a function
    and it is called at the end of every step. Raises OSError if the file cannot be opened; if it
    cannot be written later on, as on a full disk, the trace ends there with a warning, and the run
    goes on.
    """

    def __init__(self, path: str | Path | None = None, decode: Callable[[int], str] | None = None):
        if path is not None and not isinstance(path, (str, Path)):
            raise TypeError(f"a trace is written to a file's path, not to {path!r:.80}")
        self.path = path
        self._file = None
        self.on_step: Callable[[], None] | None = None
        self._decode = decode
        self._lines: list[str] = []  # not in the file yet, or all there are
        self._seen: set[int] = set()  # token ids whose text was told
        self._seqs: dict[Sequence, list[int]] = {}  # its number, and how many tokens were told
        self._next = 0  # number of the next sequence
        self._gone: list[Sequence] = []  # ended; the step that ended them may still tell tokens
        self._steps = 0
        self._under_way: deque[tuple[int, dict]] = deque()  # number and ms of steps without tokens
        self._landed: tuple[int, dict] = (0, {})  # of the step whose tokens came last
        self._start = self._clock = time.perf_counter()
        self._outside = 0.0  # ms before the step that is planned now
        self._scheduler: Scheduler | None = None

    def attach(self, scheduler: Scheduler, **facts) -> None:
        """Begin with the scheduler and pool as they are; facts: what else the first event tells.
        No step may be under way."""
        blocks = scheduler.blocks
        if blocks.trace:
            raise ValueError(f"there is a trace already, to {blocks.trace.path or 'memory'}")
        if self.path is not None:
            self._file = open(self.path, "w", encoding="ascii")
        self._scheduler, blocks.trace = scheduler, self
        self._tell(
            "pool",
            version=VERSION,
            blocks=blocks.num_blocks,
            block_size=blocks.block_size,
            caching=blocks.enable_prefix_caching,
            max_batch_size=scheduler.max_batch_size,
            max_batched_tokens=scheduler.max_batched_tokens,
            windows=blocks.windows,
            hashes={block: h.hex() for block, h in blocks.hash_of.items()},
            cached=list(blocks.cached),
            **facts,
        )
        for seq in scheduler.running:
            self.arrive(seq)
            self._tell(
                "resume",
                seq=self._number(seq),
                table=seq.table.tolist(),
                computed=seq.num_computed,
            )
        for seq in scheduler.waiting:
            self.arrive(seq)

    def close(self) -> None:
        """Write what is left and let go of the scheduler. Harmless when done already."""
        if self._scheduler and self._scheduler.blocks.trace is self:
            self._scheduler.blocks.trace = None
        self._flush()
        if self._file:
            self._file.close()
            self._file = None

    @property
    def events(self) -> list[dict]:
        """All events so far."""
        if self.path is None:
            return list(map(json.loads, self._lines))
        self._flush()
        return read(self.path)

    def page(self, path: str | Path) -> None:
        """Write the web page that shows it."""
        write_page(self.events, path)

    def chrome(self, path: str | Path) -> None:
        """Write it in the format of Chrome's trace viewer, which Perfetto opens."""
        write_chrome(self.events, path)

    # told by the engine: how long things take

    def lap(self, phase: str) -> None:
        """The time since the last lap was spent on this phase of the newest step."""
        milliseconds = self._lap()
        if phase == "outside":
            self._outside = milliseconds
        else:
            self._under_way[-1][1][phase] = milliseconds

    def wait(self) -> None:
        """The time since the last lap was spent waiting for the oldest step."""
        self._under_way[0][1]["wait"] = self._lap()

    def end(self) -> None:
        """The step whose tokens were told last is over."""
        number, ms = self._landed
        ms["update"] = self._lap()
        self._tell("end", t=self._now(), step=number, ms=ms)
        self._flush()
        if self.on_step:
            self.on_step()

    # told by the scheduler and the block manager

    def arrive(self, seq: Sequence) -> None:
        self._seqs[seq] = [self._next, seq.num_known]
        self._next += 1
        tokens = seq.tokens[: seq.num_known]
        self._spell(tokens)
        self._tell(
            "arrive", t=self._now(), seq=self._next - 1, request=seq.request_id,
            sample=seq.sample_id, samples=1 + seq.forks, tokens=tokens, prompt=seq.num_prompt,
            limit=seq.max_length, score=len(seq.targets or ()),
        )  # fmt: skip

    def admit(self, seq: Sequence, num_hits: int) -> None:
        number, blocks = self._number(seq), self._scheduler.blocks
        self._tell("admit", t=self._now(), seq=number, computed=seq.num_computed)
        if num_hits:
            self._tell("hit", seq=number, blocks=seq.table[:num_hits].tolist())
        length = len(seq.tokens) if seq.targets is None else seq.num_prompt  # see `match`
        missing = (length - 1) // blocks.block_size * blocks.num_groups - num_hits
        if blocks.enable_prefix_caching and missing:
            self._tell("miss", seq=number, count=missing)
        if len(seq.table) > num_hits:
            self.allocate(seq, len(seq.table) - num_hits)

    def allocate(self, seq: Sequence, count: int) -> None:
        self._tell("allocate", seq=self._number(seq), blocks=seq.table[-count:].tolist())

    def copy(self, seq: Sequence, index: int, source: int) -> None:
        number, target = self._number(seq), seq.table[index]
        self._tell("copy", seq=number, index=index, source=source, target=target)

    def evict(self, block: int) -> None:
        self._tell("evict", block=block)

    def window(self, seq: Sequence, gone: list[int]) -> None:
        self._tell("window", seq=self._number(seq), blocks=gone)

    def reject(self, seq: Sequence, gone: list[int]) -> None:
        self._tell("reject", seq=self._number(seq), computed=seq.num_computed, blocks=gone)

    def publish(self, seq: Sequence, block: int) -> None:
        named = self._scheduler.blocks.hash_of[block].hex()
        self._tell("publish", seq=self._number(seq), block=block, hash=named)

    def fork(self, seq: Sequence, twin: Sequence) -> None:
        parent, told = self._seqs[seq]
        self._seqs[twin] = [self._next, told]
        self._tell(
            "fork", seq=self._next, parent=parent, sample=twin.sample_id, computed=twin.num_computed
        )
        self._next += 1

    def begin(self, chunks: list[tuple[Sequence, int, int]]) -> None:
        for seq in self._gone:
            self._seqs.pop(seq, None)
        self._gone.clear()
        decodes, prefills = [], []
        for seq, start, stop in chunks:
            if stop - start == 1 and start >= seq.num_prompt:
                decodes.append(self._seqs[seq][0])
            else:
                prefills.append((self._seqs[seq][0], start, stop))
        self._steps += 1
        ms = {"outside": self._outside, "schedule": self._lap()}
        self._under_way.append((self._steps, ms))
        self._tell(
            "begin", t=self._now(), step=self._steps, decodes=spans(decodes), prefills=prefills
        )

    def tokens(self, changed: list[Sequence]) -> None:
        numbers, tokens = [], []
        for seq in changed:
            entry = self._seqs[seq]
            number, told = entry
            entry[1] = known = seq.num_known
            tokens += seq.tokens[told:known]
            numbers += [number] * (known - told)
        self._landed = self._under_way.popleft()
        self._spell(tokens)
        self._tell("tokens", step=self._landed[0], seqs=spans(numbers), tokens=tokens)

    def force(self, seq: Sequence) -> None:
        entry = self._seqs[seq]
        told, entry[1] = entry[1], len(seq.tokens)
        self._spell(seq.tokens[told:])
        self._tell("force", seq=entry[0], tokens=seq.tokens[told:])

    def free(self, seq: Sequence) -> None:
        self._tell("free", seq=self._number(seq))

    def preempt(self, seq: Sequence) -> None:
        self._tell("preempt", t=self._now(), seq=self._number(seq))

    def finish(self, seq: Sequence) -> None:
        number = self._number(seq)
        self._gone.append(seq)
        if seq.finish_reason == "abort":
            self._tell("abort", t=self._now(), seq=number)
        else:
            self._tell("finish", t=self._now(), seq=number, reason=seq.finish_reason)

    def reset(self) -> None:
        self._under_way.clear()
        self._tell("reset", t=self._now())

    def forget(self) -> None:
        self._tell("forget")

    # how it is written

    def _tell(self, name: str, **fields) -> None:
        self._lines.append(_encode({"e": name, **fields}) + "\n")

    def _number(self, seq: Sequence) -> int:
        if seq not in self._seqs:  # blocks may be managed without a scheduler
            self.arrive(seq)
        return self._seqs[seq][0]

    def _spell(self, tokens: list[int]) -> None:
        """Tell the text of tokens that were not seen before."""
        if self._decode and (new := set(tokens) - self._seen):
            self._seen |= new
            self._tell("text", ids={token: self._decode(token) for token in sorted(new)})

    def _now(self) -> float:
        return round(time.perf_counter() - self._start, 6)

    def _lap(self) -> float:
        last, self._clock = self._clock, time.perf_counter()
        return round(1000 * (self._clock - last), 3)

    def _flush(self) -> None:
        if self._file:
            try:
                self._file.write("".join(self._lines))
                self._file.flush()
            except OSError as error:
                log.warning("the trace %s ends here: %s", self.path, error)
                with suppress(OSError):  # it tries once more to write
                    self._file.close()
                self._file = None
                self.close()
            self._lines.clear()


# events out ---------------------------------------------------------------------------------------


@dataclass
class Life:
    """A sequence as the events tell of it."""

    request: int
    sample: int
    prompt: int  # how many of the tokens are the prompt
    tokens: list[int]
    state: str = ""  # "waiting", "running", "preempted", "done"
    table: list[int] = field(default_factory=list)
    computed: int = 0


class Replay:
    """The pool and all sequences after the events that were applied.

    Raises ValueError for an event that is unknown, lacks a field, or cannot happen now.
    """

    def __init__(self, events: Iterable[dict] = ()):
        self.num_blocks = self.block_size = 0
        self.ref_count: list[int] = []
        self.cached: dict[int, None] = {}  # free and findable, the next to be evicted first
        self.hash_of: dict[int, str] = {}
        self.num_used = 0  # blocks with a holder
        self.seqs: dict[int, Life] = {}
        self.states: Counter[str] = Counter()  # how many sequences are waiting, running, ...
        self.words: dict[int, str] = {}  # texts of token ids
        self.step = 0
        self.time = 0.0  # seconds
        for event in events:
            self.apply(event)

    def apply(self, event: dict) -> None:
        try:
            name, self.time = event["e"], event.get("t", self.time)
            times = [self.time, *event.get("ms", {}).values()]
            counts = [event[key] for key in _COUNTS if key in event]
            if not all(0 <= x < 1e12 for x in times) or not all(0 <= x < 2**53 for x in counts):
                raise ValueError("a number is out of range")
            if not all(type(x) is int for x in counts):
                raise ValueError("a number is none")
            if (name == "pool") is bool(self.num_blocks):
                raise ValueError("`pool` comes first, and once")
            getattr(self, f"_on_{name}")(event)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not an event of a trace: {event!r:.200} ({error!r})") from None

    def state(self, block: int) -> str:
        """ "sink", "used" (by one sequence), "shared", "cached" or "blank"."""
        if block == 0:
            return "sink"
        if self.ref_count[block]:
            return "shared" if self.ref_count[block] > 1 else "used"
        return "cached" if block in self.cached else "blank"

    def num_filled(self) -> int:
        """Slots of used blocks that hold a token: the rest is internal fragmentation."""
        fill: dict[int, int] = {}
        for life in self.seqs.values():
            for i, block in enumerate(life.table):
                held = min(self.block_size, life.computed - i // self.groups * self.block_size)
                fill[block] = max(fill.get(block, 0), held) if block else 0
        return sum(fill.values())

    def _hold(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if not 0 < block < self.num_blocks:
                raise ValueError(f"there is no block {block}")
            self.cached.pop(block, None)
            self.num_used += self.ref_count[block] == 0
            self.ref_count[block] += 1

    def _release(self, block: int) -> None:
        self.ref_count[block] -= 1
        if self.ref_count[block] == 0:
            self.num_used -= 1
            if block in self.hash_of:
                self.cached[block] = None

    def _become(self, number: int, state: str) -> Life:
        life = self.seqs[number]
        self.states[life.state] -= 1
        self.states[state] += 1
        life.state = state
        return life

    def _on_pool(self, e: dict) -> None:
        if e["version"] != VERSION:
            raise ValueError(f"version {VERSION} is wanted")
        self.num_blocks, self.block_size = e["blocks"], e["block_size"]
        if type(self.num_blocks) is not int or not 0 < self.num_blocks <= 2**24:
            raise ValueError("a pool has 1 to 16,777,216 blocks")
        self.groups = len(e.get("windows") or [-1])
        self.ref_count = [0] * self.num_blocks
        self.hash_of = {int(block): named for block, named in e["hashes"].items()}
        self.cached = dict.fromkeys(e["cached"])

    def _on_text(self, e: dict) -> None:
        self.words.update((int(token), text) for token, text in e["ids"].items())

    def _on_arrive(self, e: dict) -> None:
        self.seqs[e["seq"]] = Life(e["request"], e["sample"], e["prompt"], list(e["tokens"]))
        self._become(e["seq"], "waiting")

    def _on_resume(self, e: dict) -> None:
        self._on_admit(e)
        self._on_allocate({"seq": e["seq"], "blocks": e["table"]})

    def _on_admit(self, e: dict) -> None:
        self._become(e["seq"], "running").computed = e["computed"]

    def _on_allocate(self, e: dict) -> None:
        self._hold(filter(None, e["blocks"]))
        self.seqs[e["seq"]].table += e["blocks"]

    _on_hit = _on_allocate

    def _on_miss(self, e: dict) -> None:
        pass

    def _on_evict(self, e: dict) -> None:
        del self.cached[e["block"]], self.hash_of[e["block"]]

    def _on_copy(self, e: dict) -> None:
        self._hold([e["target"]])
        self.seqs[e["seq"]].table[e["index"]] = e["target"]
        self._release(e["source"])

    def _on_window(self, e: dict) -> None:
        table = self.seqs[e["seq"]].table
        for block in filter(None, e["blocks"]):
            table[table.index(block)] = 0
            self._release(block)

    def _on_reject(self, e: dict) -> None:
        life, blocks = self.seqs[e["seq"]], e["blocks"]
        if life.table[len(life.table) - len(blocks) :] != blocks:
            raise ValueError("these blocks are not its last")
        for _ in blocks:
            self._release(life.table.pop())
        life.computed = e["computed"]

    def _on_publish(self, e: dict) -> None:
        self.hash_of[e["block"]] = e["hash"]

    def _on_fork(self, e: dict) -> None:
        of = self.seqs[e["parent"]]
        self._hold(filter(None, of.table))
        tokens, table = of.tokens.copy(), of.table.copy()
        self.seqs[e["seq"]] = Life(of.request, e["sample"], of.prompt, tokens, "", table)
        self._become(e["seq"], "running").computed = e["computed"]

    def _on_begin(self, e: dict) -> None:
        self.step = e["step"]
        for number in unspan(e["decodes"]):
            self.seqs[number].computed += 1
        for number, start, stop in e["prefills"]:
            if not 0 <= start < stop < 2**53:
                raise ValueError("a chunk without tokens")
            self.seqs[number].computed = stop

    def _on_tokens(self, e: dict) -> None:
        for number, token in zip(unspan(e["seqs"]), e["tokens"], strict=True):
            self.seqs[number].tokens.append(token)

    def _on_end(self, e: dict) -> None:
        if not e.keys() >= {"t", "step", "ms"}:
            raise ValueError("it lacks t, step or ms")

    def _on_force(self, e: dict) -> None:
        self.seqs[e["seq"]].tokens += e["tokens"]

    def _on_free(self, e: dict) -> None:
        life = self.seqs[e["seq"]]
        for block in filter(None, reversed(life.table)):
            self._release(block)
        life.table, life.computed = [], 0

    def _on_preempt(self, e: dict) -> None:
        self._become(e["seq"], "preempted")

    def _on_finish(self, e: dict) -> None:
        self._become(e["seq"], "done")

    _on_abort = _on_finish

    def _on_reset(self, e: dict) -> None:
        pass

    def _on_forget(self, e: dict) -> None:
        self.cached.clear()
        self.hash_of.clear()


def attach(llm: LLM, path: str | Path | None) -> Trace:
    """Begin a trace of an engine. Of the ranks that share a model one writes the file."""

    def decode(token: int) -> str:
        return llm.tokenizer.token_bytes(token).decode("utf-8", "surrogateescape")

    llm._settle()
    trace = Trace(os.devnull if path and llm.ranks and llm.ranks.rank else path, decode)
    trace.attach(llm.scheduler, model=llm._name, device=str(llm.device))
    return trace


def read(path: str | Path) -> list[dict]:
    """The events of a trace. What a run that was killed left of its last line is dropped.

    Raises FileNotFoundError, or ValueError with the file's name and the line for what is no trace.
    """
    events, replay = [], Replay()
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                break
            try:
                events.append(json.loads(line))
                replay.apply(events[-1])
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: line {number}: {error}") from None
    if not events:
        raise ValueError(f"{path}: no trace: it has no whole line")
    return events


def write_page(events: list[dict], path: str | Path) -> None:
    """One HTML file that shows a trace and needs nothing else, not even a network."""
    # a `<` would let a prompt end the script element that holds it
    data = ",\n".join(map(_encode, events)).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8")
    Path(path).write_text(page.replace("/*events*/", data), encoding="utf-8")


def write_chrome(events: list[dict], path: str | Path) -> None:
    """A trace in the Trace Event Format of Chrome's trace viewer, which ui.perfetto.dev opens.

    The engine has a track for what the host does to launch a step and one for its results, and
    counters; every sequence has a track of its own: waiting, prefill, decode, preempted.
    """
    found: list[dict] = []
    replay = Replay()
    doing: dict[int, list] = {}  # of each sequence: what, since when, for how many steps
    begins: dict[int, int] = {}  # of each step that is under way; times are whole microseconds
    idle = {1: 0, 2: 0}  # from when on the engine's tracks are: their slices may not overlap
    last_end, new_tokens = 0, 0

    def add(phase: str, name: str, pid: int, tid: int, ts: int, **fields) -> None:
        found.append({"ph": phase, "name": name, "pid": pid, "tid": tid, "ts": ts, **fields})

    def label(pid: int, tid: int, what: str, name: str) -> None:
        add("M", what, pid, tid, 0, args={"name": name})

    def turn(number: int, what: str | None, now: int) -> None:
        """The sequence does something else from now on."""
        old, since, steps = doing.pop(number, ("", now, 0))
        if old == what == "decode":
            doing[number] = [old, since, steps + 1]
            return
        if old:
            add("X", old, 2, number + 1, since, dur=now - since, args={"steps": steps})
        if what:
            doing[number] = [what, now, 1]

    def phases(tid: int, title: str, names: str, ms: dict, start: int) -> None:
        """A slice, and in it one after the other what it was made of."""
        parts = [(name, round(1000 * ms[name])) for name in names.split() if name in ms]
        start, total = max(start, idle[tid]), sum(long for _, long in parts)
        idle[tid] = start + total
        add("X", title, 1, tid, start, dur=total, args=ms)
        for name, long in parts:
            add("X", name, 1, tid, start, dur=long, args={})
            start += long

    label(1, 0, "process_name", "engine")
    label(1, 1, "thread_name", "launch")
    label(1, 2, "thread_name", "results")
    label(2, 0, "process_name", "requests")
    for event in events:
        replay.apply(event)
        name, number = event["e"], event.get("seq", -1)
        now = round(1e6 * replay.time)
        if name in ("arrive", "fork"):
            life = replay.seqs[number]
            sample = f", sample {life.sample}" if life.sample or name == "fork" else ""
            label(2, number + 1, "thread_name", f"request {life.request}{sample}")
            turn(number, "waiting" if name == "arrive" else "decode", now)
        elif name == "begin":
            decodes = list(unspan(event["decodes"]))
            for number in decodes:
                turn(number, "decode", now)
            for number, start, stop in event["prefills"]:
                guesses = stop > len(replay.seqs[number].tokens)
                turn(number, "decode" if guesses else f"prefill {start}-{stop}", now)
            begins[event["step"]] = now
            free = replay.num_blocks - 1 - replay.num_used
            cached, states = len(replay.cached), replay.states
            waiting = states["waiting"] + states["preempted"]
            rows = sum(stop - start for _, start, stop in event["prefills"])
            counts = {"used": replay.num_used, "cached": cached, "blank": free - cached}
            add("C", "blocks", 1, 0, now, args=counts)
            add("C", "batch", 1, 0, now, args={"decode": len(decodes), "prefill": rows})
            counts = {"running": states["running"], "waiting": waiting}
            add("C", "sequences", 1, 0, now, args=counts)
        elif name == "tokens":
            new_tokens = len(event["tokens"])
        elif name == "end":
            ms, began, title = event["ms"], begins.pop(event["step"], now), f"step {event['step']}"
            launch = began - round(1000 * ms.get("schedule", 0))
            phases(1, title, "schedule batch forward sample", ms, launch)
            results = now - round(1000 * (ms.get("wait", 0) + ms.get("update", 0)))
            phases(2, title, "wait update", ms, results)
            rate = 1e6 * new_tokens / max(now - last_end, 1)
            add("C", "tokens per second", 1, 0, now, args={"tokens/s": round(rate, 1)})
            last_end = now
        elif name == "preempt":
            turn(number, "preempted", now)
        elif name in ("finish", "abort"):
            turn(number, None, now)
        elif name == "copy":
            what = f"copy block {event['source']} to {event['target']}"
            add("i", what, 2, number + 1, now, s="t")
        elif name == "evict":
            add("i", f"evict block {event['block']}", 1, 1, now, s="t")
        elif name == "reset":
            begins.clear()
            add("i", "reset", 1, 1, now, s="g")
    for number in list(doing):
        turn(number, None, now)
    Path(path).write_text(_encode({"traceEvents": found, "displayTimeUnit": "ms"}))


# in the terminal ----------------------------------------------------------------------------------


@contextmanager
def watching(llm: LLM, console: Console | None = None) -> Iterator[None]:
    """Draw the pool, the queue and the rates while the engine works, on stderr unless told where.

    Raises ImportError without the package `rich`.
    """
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        raise ImportError("the picture is drawn by rich: pip install 'microvllm[watch]'") from None

    console = console or Console(stderr=True)
    drawn, past = 0.0, deque([(time.perf_counter(), llm.stats())], 16)

    def draw(now: bool = False) -> None:
        nonlocal drawn
        if now or time.perf_counter() - drawn > 0.125:
            past.append((time.perf_counter(), llm.stats()))
            live.update(picture(llm, past, console.width, console.height), refresh=True)
            drawn = time.perf_counter()

    running = llm.scheduler.blocks.trace
    with nullcontext(running) if running else llm.tracing(os.devnull) as trace:
        with Live(console=console, auto_refresh=False) as live:
            trace.on_step = draw
            try:
                yield
            finally:
                trace.on_step = None
                draw(now=True)


def picture(llm: LLM, past: deque[tuple[float, dict]], width: int, height: int) -> RenderableType:
    """The engine as it is, for a terminal of that size; past: moments and what stats() said."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    blocks, stats = llm.scheduler.blocks, past[-1][1]
    seqs = llm.scheduler.running
    owner = {block: seq.request_id for seq in seqs for block in seq.table if block}
    # blank blocks are handed out from the front: behind the last that was touched they all are
    last = max(chain(owner, blocks.hash_of, [stats["peak_blocks"] * blocks.num_groups]))
    columns, rows = max(8, width - 4), max(1, height - 7)
    each = -(-(last + 1) // (columns * rows))  # blocks in a cell: the first in use stands for them
    cells = Text()
    for cell in range(0, last + 1, each):
        group = range(cell, min(cell + each, last + 1))
        used = next((block for block in group if block in owner), None)
        if used is not None:
            hue = owner[used] * 0.382 % 1
            red, green, blue = (int(255 * x) for x in colorsys.hls_to_rgb(hue, 0.55, 0.6))
            mark = "▣" if blocks.ref_count[used] > 1 else "■"
            cells.append(mark, f"rgb({red},{green},{blue})")
        else:
            cells.append("□" if any(block in blocks.cached for block in group) else "·", "dim")
    used, cached = blocks.num_usable - blocks.num_free, len(blocks.cached)
    per_cell = f", {each} blocks a cell" if each > 1 else ""
    key = (
        f"■ in use {used:,}  ▣ shared  □ cached {cached:,}  · blank {len(blocks.blank):,}{per_cell}"
    )
    (then, before), (now, _) = past[0], past[-1]
    span = max(now - then, 1e-6)
    rates = {name: (stats[name] - before[name]) / span for name in ("output_tokens", "steps")}
    rates["prefill_tokens"] = (stats["prefill_tokens"] - before["prefill_tokens"]) / span
    lines = (
        f"running {stats['running']:,}  waiting {stats['waiting']:,}  "
        f"preemptions {stats['preemptions']:,}  done {stats['requests']:,}",
        f"{rates['output_tokens']:,.0f} tokens/s  {rates['prefill_tokens']:,.0f} prompt tokens/s  "
        f"{rates['steps']:,.1f} steps/s  {stats['output_tokens']:,} tokens in all",
    )
    groups, size = blocks.num_groups, blocks.block_size
    title = f"the pool: {blocks.num_usable // groups:,} blocks of {size} tokens"
    title += f" for each of {groups} groups of layers" if groups > 1 else ""
    return Panel(Group(cells, Text(key, "bold"), *map(Text, lines)), title=title, height=None)
