"""Bulk jobs: a file of prompts becomes a file of answers, whatever happens in between.

    rows.read -> answers.answer (keeps one engine full) -> Job.write

The output is its own journal. An answer is appended, in one write, as soon as it is there, and
begins with the number of its input line; so a job that was killed knows what is left by reading
what it has. A row's seed follows from the job's seed and the row's id, hence a row that is computed
again, or in other company, gets the same tokens. What is kept of a row is one byte, and 24 more for
the moments in which ids are compared or the output is sorted.
"""

from __future__ import annotations

import json
import os
import re
import time
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import xxhash

from .answers import Ask, Outcome
from .rows import import_pyarrow, parse, read, schema, to_table

_NUMBER = re.compile(rb'\{"line": (\d+), ')  # what every line of a journal begins with
_OPEN, _TWICE, _DONE = range(3)


class Job:
    """The files of a job: its input, what is done of it, and how it was begun.

    source, output: .jsonl or .parquet; settings: whatever decides the answers, JSON. Beside the
    output are OUTPUT.errors (a JSON line per bad row: line, id, error), OUTPUT.job (the settings),
    and for Parquet, which cannot be appended to, OUTPUT.jsonl until all is done. num_rows,
    num_done, num_bad: of the input, of these with an answer or an error, of these with an error.

    Raises FileNotFoundError or ValueError, and touches nothing, if the output is another job's, or
    this one's with another input or other settings, or if another process is at it.
    """

    def __init__(self, source: str | Path, output: str | Path, ask: Ask, settings: dict):
        self.source, self.output, self.ask = Path(source), Path(output), ask
        for path in (self.source, self.output):
            if path.suffix not in (".jsonl", ".parquet"):
                raise ValueError(f"{path}: expected a file named .jsonl or .parquet")
        if not self.source.is_file():
            raise FileNotFoundError(f"there is no file {self.source}")
        if not self.output.parent.is_dir():
            raise FileNotFoundError(f"there is no directory {self.output.parent}")
        if self.output.exists() and self.output.samefile(self.source):
            raise ValueError(f"{self.output} is the input: give another output")
        self.parquet = self.output.suffix == ".parquet"
        if self.parquet or self.source.suffix == ".parquet":
            import_pyarrow()
        names = [f"{self.output}.{end}" for end in ("jsonl", "errors", "job")]
        self.journal = Path(names[0]) if self.parquet else self.output
        self.errors, book = Path(names[1]), Path(names[2])
        self.remedy = "give another output, or start over: rm -f " + " ".join(
            str(path) for path in {self.output: 0, self.journal: 0, self.errors: 0, book: 0}
        )
        if self.output.exists() and not book.exists():
            raise ValueError(f"{self.output} exists and is not this job's: give another output")
        self.state = bytearray()  # of each line: to do, to do but its id is taken, or done
        self.num_rows = self.num_done = self.num_bad = 0
        self.integer_ids = True
        settings = {**settings, "input": self._survey()}
        self.book = open(book, "a+b")  # kept open, for as long as it is we hold the lock
        _lock(self.book, self.output)
        self._open(settings)

    def _survey(self) -> str:
        """Read the input once: count its rows, find ids that are there twice, fingerprint it."""
        ask, hashes, numbers, prompts = self.ask, array("Q"), array("q"), 0
        for number, raw in read(self.source, [ask.id_column or "id", ask.prompt_column]):
            try:
                row = parse(raw)
                prompts += ask.prompt_column in row
                row_id = ask.row_id(row, number)
                text = json.dumps(row_id)
                self.integer_ids &= isinstance(row_id, int) and abs(row_id) < 2**63
            except ValueError:
                text = f"bad {number}"  # which no id's JSON is
            hashes.append(xxhash.xxh3_64_intdigest(text.encode()))
            numbers.append(number)
        if not prompts:
            column = ask.prompt_column
            raise ValueError(f"{self.source}: no row has {column!r}, name another prompt column")
        self.num_rows, self.state = len(numbers), bytearray(numbers[-1] + 1)
        order = np.argsort(np.frombuffer(hashes, np.uint64), kind="stable")
        ordered = np.frombuffer(hashes, np.uint64)[order]
        for i in order[1:][ordered[1:] == ordered[:-1]]:
            self.state[numbers[i]] = _TWICE
        digest = xxhash.xxh3_128()
        with open(self.source, "rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
        return f"{self.source.stat().st_size:,} bytes, xxh3 {digest.hexdigest()}"

    def _open(self, settings: dict) -> None:
        """Compare with how the job was begun, and read what it has."""
        whole = self.parquet and self.output.exists() and not self.journal.exists()
        self.files = None if whole else {}  # of answers (False) and errors (True), once there are
        found = [path for path in (self.journal, self.errors) if path.exists()]
        if whole or any(path.stat().st_size for path in found):
            self.book.seek(0)
            try:
                begun = json.loads(self.book.read())
            except ValueError:
                raise ValueError(f"{self.output} is not this job's: {self.remedy}") from None
            settings = json.loads(json.dumps(settings))
            for name in sorted(settings.keys() | begun.keys()):
                if (old := begun.get(name)) != (new := settings.get(name)):
                    raise ValueError(
                        f"{self.output} was begun with {name}={old!r}, not {new!r}: "
                        f"give that again; or {self.remedy}"
                    )
        else:
            self.book.truncate(0)
            self.book.write(json.dumps(settings).encode() + b"\n")
            self.book.flush()
            os.fsync(self.book.fileno())
        for path in found:
            self._recall(path)
        if whole:
            self.state, self.num_done = bytearray([_DONE]) * len(self.state), self.num_rows
        self.synced = time.monotonic()

    def _recall(self, path: Path) -> None:
        """See which rows a journal has. A last line without its end was cut off with the process
        that wrote it, and is dropped."""
        with open(path, "r+b") as file:
            size = 0
            for place, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                found = _NUMBER.match(line)
                number = int(found[1]) if found else 0
                if not 0 < number < len(self.state) or self.state[number] == _DONE:
                    raise ValueError(f"{path}, line {place}: not a line of this job; {self.remedy}")
                self._mark(number, path == self.errors)
                size += len(line)
            file.truncate(size)

    def _mark(self, number: int, bad: bool) -> None:
        self.state[number] = _DONE
        self.num_done += 1
        self.num_bad += bad

    def pending(self) -> Iterator[tuple[int, object]]:
        """The rows that are left, as rows.read gives them."""
        ask = self.ask
        columns = [ask.id_column or "id", ask.prompt_column, ask.continuation_column]
        for number, raw in read(self.source, [*columns, ask.params_column]):
            if self.state[number] == _TWICE:
                row_id = ask.row_id(parse(raw), number)
                raw = ValueError(f"the id {row_id!r:.80} is an earlier row's: ids must be unique")
            if self.state[number] != _DONE:
                yield number, raw

    def write(self, outcome: Outcome) -> bool:
        """Append an outcome, which is safe from then on. False, and nothing done, if its row is
        there."""
        if self.state[outcome.number] == _DONE:
            return False
        if outcome.bad not in self.files:
            self.files[outcome.bad] = open(self.errors if outcome.bad else self.journal, "ab")
        file = self.files[outcome.bad]
        file.write(json.dumps(outcome.row).encode() + b"\n")
        file.flush()  # a kill takes nothing from the system's hands; a loss of power might
        if time.monotonic() - self.synced > 5:
            self._sync()
        self._mark(outcome.number, outcome.bad)
        return True

    def _sync(self) -> None:
        for file in self.files.values():
            os.fsync(file.fileno())
        self.synced = time.monotonic()

    def finish(self, ordered: bool = False) -> None:
        """All rows are done: put the answers in the input's order if that is wanted, make the
        Parquet. Either is a new file that takes the old one's place when it is complete."""
        if self.files is None:  # it was finished
            return
        self._sync()
        self.journal.touch()  # all rows may be bad ones
        if ordered or self.parquet:
            new = Path(f"{self.output}.tmp")
            with open(new, "wb") as file:
                if self.parquet:
                    self._write_parquet(file, ordered)
                else:
                    file.writelines(self._lines(ordered))
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self.output)
            if self.parquet:
                self.journal.unlink()

    def _lines(self, ordered: bool) -> Iterator[bytes]:
        """The lines of the journal, as they are or in the input's order."""
        with open(self.journal, "rb") as file:
            if not ordered:
                yield from file
                return
            numbers, starts, size = array("q"), array("q"), 0
            for line in file:
                numbers.append(int(_NUMBER.match(line)[1]))
                starts.append(size)
                size += len(line)
            for i in np.argsort(np.frombuffer(numbers, np.int64)):
                file.seek(starts[i])
                yield file.readline()

    def _write_parquet(self, file, ordered: bool) -> None:
        pyarrow, lines = import_pyarrow(), self._lines(ordered)
        columns = schema(self.ask.task == "score", self.integer_ids)
        with pyarrow.parquet.ParquetWriter(file, columns) as writer:
            while rows := [json.loads(line) for line in islice(lines, 4096)]:
                writer.write_table(to_table(rows, columns))


def _lock(file, output: Path) -> None:
    """One process at a time. The lock ends with its process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"another process is writing {output}: wait, or end it") from None


def carry_out(job: Job, outcomes: Iterator[Outcome], ordered: bool = False) -> dict:
    """Write outcomes until every row has one, with a bar on a terminal, then finish the job.

    Returns what was counted since this start. Raises RuntimeError if the outcomes end too early.
    """
    from tqdm import tqdm

    began, before = time.perf_counter(), job.num_done
    asked = cached = new = 0
    bar = tqdm(
        total=job.num_rows, initial=before, desc=job.output.name, unit="row", disable=None,
        unit_scale=job.num_rows > 99999,
    )  # fmt: skip
    with bar:
        for outcome in outcomes:
            if not job.write(outcome):
                continue
            asked, cached = asked + outcome.prompt_tokens, cached + outcome.cached_tokens
            new += outcome.new_tokens
            rate, hits = new / (time.perf_counter() - began), cached / max(asked, 1)
            bad = f", {job.num_bad} bad" if job.num_bad else ""
            bar.set_postfix_str(f"{rate:,.0f} tokens/s, {hits:.0%} cached{bad}", refresh=False)
            bar.update()
    if left := job.num_rows - job.num_done:
        raise RuntimeError(f"{left} rows have no answer: start the job again")
    job.finish(ordered)
    return {
        "rows": job.num_rows, "answered_before": before, "bad": job.num_bad,
        "prompt_tokens": asked, "cached_tokens": cached, "new_tokens": new,
        "seconds": round(time.perf_counter() - began, 3),
    }  # fmt: skip
