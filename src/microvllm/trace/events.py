"""Trace: listens to a scheduler, its block manager and the engine, and writes what they tell."""

import itertools
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..engine import LLM
from ..scheduler import BlockManager, Events, Plan, Scheduler, Sequence
from .formats import make_frame, write_chrome, write_page
from .replay import VERSION, encode, read, spans

log = logging.getLogger("microvllm")
LARGEST = 2**22  # bytes of events that a notebook shows: it keeps them in its own file
# events that tell their time
TIMED = {"arrive", "admit", "begin", "end", "preempt", "finish", "abort", "reset"}


class Trace(Events):
    """Writes down what a scheduler and its blocks do, from `attach` to `close`.

    path: file to write, whole at the end of every step, so that the trace of a run that was killed
    can be read; None: kept in memory. decode: the text of a token id. `on_step`, if set, is called
    at the end of every step. Raises OSError if the file cannot be opened; if it cannot be written
    later on, as on a full disk, the trace ends there with a warning, and the run goes on.
    """

    def __init__(self, path: str | Path | None = None, decode: Callable[[int], str] | None = None):
        if path is not None and not isinstance(path, (str, Path)):
            raise TypeError(f"a trace is written to a file's path, not to {path!r:.80}")
        self.path, self._decode = path, decode
        self.on_step: Callable[[], None] | None = None
        self._file = None
        self._lines: deque[str] = deque()  # not in the file yet, or all there are
        self._seen: set[int] = set()  # token ids whose text was told
        self._seqs: dict[Sequence, list[int]] = {}  # its number, and how many tokens were told
        self._numbers = itertools.count()  # of the next sequences
        self._gone: list[Sequence] = []  # ended; the step that ended them may still tell tokens
        self._steps = itertools.count(1)  # numbers of the next steps
        # {step: number, ms: {phase: ms}} of the steps whose tokens are not known: two, if the loop
        # is one step ahead; and of the step whose tokens came last
        self._under_way: deque[dict] = deque()
        self._landed: dict = {"step": 0, "ms": {}}
        self._start = self._clock = time.perf_counter()
        self._outside = 0.0  # ms before the step that is planned now
        self._scheduler: Scheduler | None = None

    def attach(self, scheduler: Scheduler, **facts) -> None:
        """Begin with the scheduler and pool as they are; facts: what else the first event tells.
        No step may be under way. Raises ValueError if there is a trace already."""
        blocks = scheduler.blocks
        refuse_second(blocks)
        if self.path is not None:
            self._file = open(self.path, "w", encoding="ascii")
        self._scheduler, blocks.events = scheduler, self
        self._tell(
            "pool", version=VERSION, blocks=blocks.num_blocks, block_size=blocks.block_size,
            caching=blocks.enable_prefix_caching, max_batch_size=scheduler.max_batch_size,
            max_batched_tokens=scheduler.max_batched_tokens,
            windows=list(getattr(blocks, "windows", (-1,))),
            hashes={block: h.hex() for block, h in blocks.hash_of.items()},
            cached=list(blocks.cached), **facts,
        )  # fmt: skip
        for seq in scheduler.running:
            self.arrive(seq)
            self._tell("resume", seq, table=seq.table.tolist(), computed=seq.num_computed)
        for seq in scheduler.waiting:
            self.arrive(seq)

    def close(self) -> None:
        """Write what is left and let go of the scheduler. Harmless when done already."""
        if self._scheduler and self._scheduler.blocks.events is self:
            self._scheduler.blocks.events = Events()
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

    def _repr_html_(self) -> str:
        """The page, in a frame; of a large trace, how to write the page to a file."""
        if self.path is None:
            size = sum(map(len, [*self._lines]))
        else:
            self._flush()
            size = os.path.getsize(self.path)
        if size > LARGEST:
            return (
                f"<p>This trace has {size:,} bytes, more than the {LARGEST:,} that are shown in a "
                "notebook. Write its page to a file with <code>.page(&quot;run.html&quot;)</code> "
                "and open that in a browser.</p>"
            )
        return make_frame(self.events)

    def page(self, path: str | Path) -> None:
        """Write the web page that shows it."""
        write_page(self.events, path)

    def chrome(self, path: str | Path) -> None:
        """Write it in the format of Chrome's trace viewer, which Perfetto opens."""
        write_chrome(self.events, path)

    # told by the engine: how long things take

    def lap(self, phase: str) -> None:
        """The time since the last lap was spent on this phase: waiting is for the oldest step under
        way, the time outside belongs to the step that is planned next, all else to the newest."""
        milliseconds = self._lap()
        if phase == "outside":
            self._outside = milliseconds
        else:
            self._under_way[0 if phase == "wait" else -1]["ms"][phase] = milliseconds

    def end(self) -> None:
        """The step whose tokens were told last is over."""
        self._landed["ms"]["update"] = self._lap()
        self._tell("end", **self._landed)
        self._flush()
        if self.on_step:
            self.on_step()

    # told by the scheduler, the block manager and features

    def arrive(self, seq: Sequence) -> None:
        tokens = list(seq.tokens)
        number = self._seqs[seq][0] if seq in self._seqs else next(self._numbers)
        self._seqs[seq] = [number, len(tokens)]
        self._spell(tokens)
        self._tell(
            "arrive", seq, request=seq.request_id, sample=seq.sample_id, samples=1 + seq.forks,
            tokens=tokens, prompt=seq.num_prompt, limit=seq.max_length,
            score=len(getattr(seq, "targets", None) or ()),
        )  # fmt: skip

    def admit(self, seq: Sequence, num_hits: int) -> None:
        self._tell("admit", seq, computed=seq.num_computed)
        if num_hits:
            self._tell("hit", seq, blocks=seq.table[:num_hits].tolist())
        blocks = self._scheduler.blocks
        missing = seq.cacheable // blocks.block_size * blocks.width - num_hits
        if blocks.enable_prefix_caching and missing:
            self._tell("miss", seq, count=missing)
        if len(seq.table) > num_hits:
            self.allocate(seq, len(seq.table) - num_hits)

    def allocate(self, seq: Sequence, count: int) -> None:
        self._tell("allocate", seq, blocks=seq.table[-count:].tolist())

    def copy(self, seq: Sequence, index: int, source: int) -> None:
        self._tell("copy", seq, index=index, source=source, target=seq.table[index])

    def evict(self, block: int) -> None:
        self._tell("evict", block=block)

    def publish(self, seq: Sequence, block: int) -> None:
        self._tell("publish", seq, block=block, hash=self._scheduler.blocks.hash_of[block].hex())

    def fork(self, seq: Sequence, twin: Sequence) -> None:
        parent, told = self._seqs[seq]
        self._seqs[twin] = [next(self._numbers), told]
        self._tell("fork", twin, parent=parent, sample=twin.sample_id, computed=twin.num_computed)

    def plan(self, plan: Plan) -> None:
        """A step begins, if the plan has any work."""
        if not plan.chunks:
            return
        for seq in self._gone:
            self._seqs.pop(seq, None)
        self._gone.clear()
        decodes, prefills = [], []
        for seq, start, stop in plan.chunks:
            if stop - start == 1 and start >= seq.num_prompt:
                decodes.append(self._seqs[seq][0])
            else:
                prefills.append((self._seqs[seq][0], start, stop))
        step, ms = next(self._steps), {"outside": self._outside, "schedule": self._lap()}
        self._under_way.append({"step": step, "ms": ms})
        self._tell("begin", step=step, decodes=spans(decodes), prefills=prefills)

    def update(self, plan: Plan, changed: list[Sequence]) -> None:
        """The tokens of the oldest step under way, as far as they were not told."""
        if not plan.chunks:
            return
        numbers, tokens = [], []
        for seq in changed:
            number, new = self._untold(seq)
            tokens += new
            numbers += [number] * len(new)
        self._landed = self._under_way.popleft()
        self._spell(tokens)
        self._tell("tokens", step=self._landed["step"], seqs=spans(numbers), tokens=tokens)

    def force(self, seq: Sequence) -> None:
        _, tokens = self._untold(seq)
        self._spell(tokens)
        self._tell("force", seq, tokens=tokens)

    def note(self, name: str, seq: Sequence, blocks: list[int]) -> None:
        """What a feature tells: "window" or "reject"."""
        facts = {"computed": seq.num_computed} if name == "reject" else {}
        self._tell(name, seq, **facts, blocks=blocks)

    def free(self, seq: Sequence) -> None:
        self._tell("free", seq)

    def preempt(self, seq: Sequence) -> None:
        self._tell("preempt", seq)

    def finish(self, seq: Sequence) -> None:
        self._gone.append(seq)
        if seq.finish_reason == "abort":
            self._tell("abort", seq)
        else:
            self._tell("finish", seq, reason=seq.finish_reason)

    def reset(self) -> None:
        """The pool is blank, and all that is unfinished arrives once more. Nothing that was told
        before is relied upon: an exception may have come between a change and its event."""
        waiting = [*self._scheduler.waiting]
        self._under_way.clear()
        self._gone.clear()
        self._seqs = {seq: self._seqs[seq] for seq in waiting if seq in self._seqs}
        self._tell("reset")
        for seq in waiting:
            self.arrive(seq)

    def _tell(self, name: str, seq: Sequence | None = None, **facts) -> None:
        now = {"t": round(time.perf_counter() - self._start, 6)} if name in TIMED else {}
        number = {} if seq is None else {"seq": self._seqs[seq][0]}
        self._lines.append(encode({"e": name, **now, **number, **facts}) + "\n")

    def _untold(self, seq: Sequence) -> tuple[int, list[int]]:
        """The sequence's number, and its tokens that were not told, which from now on they are."""
        entry = self._seqs[seq]
        number, told = entry
        entry[1] = len(seq.tokens)
        return number, seq.tokens[told:]

    def _spell(self, tokens: list[int]) -> None:
        """Tell the text of tokens that were not seen before."""
        if self._decode and (new := set(tokens) - self._seen):
            self._tell("text", ids={token: self._decode(token) for token in sorted(new)})
            self._seen |= new

    def _lap(self) -> float:
        last, self._clock = self._clock, time.perf_counter()
        return round(1000 * (self._clock - last), 3)

    def _flush(self) -> None:
        if self._file:
            try:
                while self._lines:  # each is written and dropped in one call, not to be cut in two
                    self._lines.append("")
                    self._file.writelines(iter(self._lines.popleft, ""))
                self._file.flush()
            except OSError as error:
                log.warning("the trace %s ends here: %s", self.path, error)
                with suppress(OSError):  # it tries once more to write
                    self._file.close()
                self._file = None
                self.close()
            self._lines.clear()


def refuse_second(blocks: BlockManager) -> None:
    """Raises ValueError if there is a trace already."""
    if isinstance(blocks.events, Trace):
        raise ValueError(f"there is a trace already, to {blocks.events.path or 'memory'}")


def make_trace(llm: LLM, path: str | Path | None) -> Trace:
    """A trace of an engine that has not begun. Of ranks that share a model one writes the file."""
    token_bytes, ranks = llm.tokenizer.token_bytes, getattr(llm, "ranks", None)
    file = os.devnull if path and ranks and ranks.rank else path
    return Trace(file, lambda token: token_bytes(token).decode("utf-8", "surrogateescape"))


def attach(llm: LLM, trace: Trace) -> None:
    """Begin a trace of an engine. Raises ValueError if it has one already."""

    def begin() -> None:
        llm._settle()
        trace.attach(llm.scheduler, model=llm.name, device=str(llm.device))

    refuse_second(llm.scheduler.blocks)
    llm._change(begin)
