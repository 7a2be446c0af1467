"""Bulk jobs: a file of prompts becomes a file of answers, whatever happens in between.

    read -> answer (keeps one engine full) -> Job.write

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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xxhash

if TYPE_CHECKING:
    from .. import LLM

MAX_LINE = 2**24  # bytes of a row; what is longer is no prompt
_NUMBER = re.compile(rb'\{"line": (\d+), ')  # what every line of a journal begins with
_OPEN, _TWICE, _DONE = range(3)


@dataclass(frozen=True)
class Ask:
    """What is wanted of the rows, which are dicts; the same in one process and in every replica.

    task: "chat" (the prompt is a text, the user's, or a list of messages), "completion" (a text) or
    "score" (either, with a continuation or a list of them); all take token ids. None is chat where
    the model can, else completion. raw: plain text, also where the model can chat; params: of
    SamplingParams, for rows without their own; seed: the job's. The rest are names of columns:
    without an id_column a row's id is its "id", or where it has none its line number.
    """

    task: str | None = None
    raw: bool = False
    params: dict = field(default_factory=dict)
    seed: int = 0
    prompt_column: str = "prompt"
    id_column: str | None = None
    continuation_column: str = "continuation"
    params_column: str = "params"

    def __post_init__(self):
        if self.task not in (None, "chat", "completion", "score"):
            raise ValueError(f"task must be chat, completion or score, got {self.task!r:.80}")

    def row_id(self, row: dict, number: int) -> str | int:
        """The id of the row on line `number`. Raises ValueError where it is neither a text nor an
        integer."""
        found = row.get(self.id_column or "id")
        if found is None and self.id_column is None:
            return number
        if isinstance(found, bool) or not isinstance(found, (str, int)):
            column = self.id_column or "id"
            raise ValueError(f"its {column!r} must be a text or an integer, got {found!r:.80}")
        str(found).encode()  # half a surrogate pair has no UTF-8
        return found


class Outcome(NamedTuple):
    """What became of a row."""

    number: int  # its line, or its place in a Parquet file, from 1
    row: dict  # for the output, or for the errors: beginning with line and, if it is known, id
    bad: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0


# rows ---------------------------------------------------------------------------------------------


def read(path: Path, columns: list[str]) -> Iterator[tuple[int, bytes | dict | ValueError]]:
    """(number, row) of a .jsonl file, as bytes yet to be parsed, or of these columns of a .parquet
    file. Blank lines are counted and left out; a line that is too long is its error."""
    if path.suffix == ".parquet":
        yield from enumerate(_parquet_rows(path, columns), 1)
        return
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE and line[-1:] != b"\n":
                while (rest := file.readline(MAX_LINE)) and rest[-1:] != b"\n":
                    pass
                yield number, ValueError(f"the line is longer than {MAX_LINE:,} bytes")
                continue
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, line


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[dict]:
    pyarrow = import_pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(1024, columns=names):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise OSError(f"{path}: not a Parquet file that can be read: {error}") from None


def import_pyarrow():
    """pyarrow with its parquet. Raises ImportError that says what to install."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError("Parquet needs pyarrow: pip install 'microvllm[parquet]'") from None
    return pyarrow


def parse(raw: bytes | dict | ValueError) -> dict:
    """The row that `read` found. Raises ValueError if it is none."""
    if isinstance(raw, dict):
        return raw
    if isinstance(raw, ValueError):
        raise raw
    try:
        row = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON in UTF-8: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f'expected an object such as {{"prompt": "..."}}, not {row!r:.40}')
    return row


# one engine ---------------------------------------------------------------------------------------


@dataclass
class _Work:
    """A row whose requests are under way."""

    number: int
    id: str | int
    requests: list[int] = field(default_factory=list)
    outputs: dict[int, dict] = field(default_factory=dict)  # by request


def answer(llm: LLM, rows: Iterable[tuple[int, object]], ask: Ask) -> Iterator[Outcome]:
    """Answer rows, as `read` gives them, in the order in which they are done.

    As many are taken as keep the engine full, no more. A bad row's outcome says so. Leaving the
    loop aborts what is unfinished. Raises ValueError if the model cannot do the task.
    """
    if ask.task == "chat" and (ask.raw or not llm.tokenizer.has_chat):
        raise ValueError("no chat with raw, or with a model that has no chat tokens: do completion")
    rows, waiting = iter(rows), {}
    try:
        while True:
            for number, raw in islice(rows, max(0, 2 * llm.max_batch_size - len(waiting))):
                work = _Work(number, None)
                try:
                    _submit(llm, work, parse(raw), ask)
                except (ValueError, TypeError) as error:
                    llm.abort(*work.requests)
                    yield failed(number, error, work.id)
                else:
                    waiting.update(dict.fromkeys(work.requests, work))
            if not waiting:
                return
            for output in llm.step():
                if work := waiting.pop(output["request_id"], None):
                    work.outputs[output["request_id"]] = output
                    if len(work.outputs) == len(work.requests):
                        yield _outcome(work, ask)
    finally:
        llm.abort(*waiting)


def _submit(llm: LLM, work: _Work, row: dict, ask: Ask) -> None:
    """Queue what the row asks for. Raises ValueError or TypeError that names what is wrong."""
    work.id = ask.row_id(row, work.number)
    prompt = row.get(ask.prompt_column)
    if prompt is None:
        raise ValueError(f"no {ask.prompt_column!r} in it, which has {', '.join(row):.200}")
    chat = llm.tokenizer.has_chat and not ask.raw and ask.task != "completion"
    if chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        if not chat:
            raise ValueError("a list of messages is for task chat, and for a model that has it")
        prompt = llm.tokenizer.render_for_completion(prompt)
    if ask.task == "score":
        tails = row.get(ask.continuation_column)
        tails = [tails] if isinstance(tails, str) else tails
        if not isinstance(tails, list) or not tails:
            column = ask.continuation_column
            raise ValueError(f"its {column!r} must be a text or a list of them, got {tails!r:.80}")
        for tail in tails:
            work.requests.append(llm.add_request(prompt, continuation=tail))
    else:
        params = _params(row.get(ask.params_column), ask, work.id)
        work.requests.append(llm.add_request(prompt, params, tools=chat))


def _params(own: object, ask: Ask, row_id: str | int):
    """The SamplingParams of a row: the job's, changed by its own."""
    from ..sampler import SamplingParams

    if not isinstance(own, (dict, type(None))):
        raise TypeError(f"its {ask.params_column!r} must be an object, got {own!r:.80}")
    given = ask.params | {k: v for k, v in (own or {}).items() if v is not None}
    known = {f.name for f in fields(SamplingParams) if f.init} - {"logits_processor"}
    if unknown := given.keys() - known:
        names = ", ".join(sorted(known))
        raise ValueError(f"unknown sampling parameter {min(unknown)!r}: there are {names}")
    if "seed" not in given:
        given["seed"] = xxhash.xxh3_64_intdigest(json.dumps([ask.seed, row_id]).encode())
    if isinstance(given.get("logit_bias"), dict):  # JSON's keys are texts
        given["logit_bias"] = {int(k): v for k, v in given["logit_bias"].items()}
    return SamplingParams(**given)


def failed(number: int, error: object, row_id: str | int | None = None) -> Outcome:
    """The outcome of a bad row."""
    known = {} if row_id is None else {"id": row_id}
    return Outcome(number, {"line": number, **known, "error": str(error)}, bad=True)


def _outcome(work: _Work, ask: Ask) -> Outcome:
    outputs = [work.outputs[i] for i in work.requests]  # several continuations, or one prompt
    asked = sum(len(o["prompt_token_ids"]) for o in outputs)
    cached, row = sum(o["num_cached_tokens"] for o in outputs), {"line": work.number, "id": work.id}
    if ask.task == "score":
        row["continuations"] = [
            {"total": sum(p), "per_token": sum(p) / len(p), "logprobs": p}
            for p in (output["logprobs"] for output in outputs)
        ]
        return Outcome(work.number, row, False, asked, cached)
    shown = ("text", "token_ids", "finish_reason", "stop_reason", "logprobs")
    samples = [{k: s[k] for k in shown if k in s} for s in outputs[0]["samples"]]
    for sample in samples:
        if sample["finish_reason"] == "error":
            return failed(work.number, sample["stop_reason"], work.id)
        if "logprobs" in sample:  # JSON has no -Infinity, which is what could not be drawn
            text = json.dumps(sample["logprobs"])
            sample["logprobs"] = json.loads(text, parse_constant=lambda _: None)
    row |= samples[0] | ({"samples": samples} if len(samples) > 1 else {})
    new = sum(len(sample["token_ids"]) for sample in samples)
    return Outcome(work.number, row, False, asked, cached, new)


# the job ------------------------------------------------------------------------------------------


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

    def pending(self) -> Iterator[tuple[int, bytes | dict | ValueError]]:
        """The rows that are left, as `read` gives them."""
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


def schema(score: bool, integer_ids: bool = False):
    """The columns of an answer in Parquet."""
    pa = import_pyarrow()
    row_id = pa.int64() if integer_ids else pa.string()
    head = [("line", pa.int64()), ("id", row_id)]
    if score:
        numbers = [("total", pa.float64()), ("per_token", pa.float64())]
        scores = pa.struct([*numbers, ("logprobs", pa.list_(pa.float64()))])
        return pa.schema([*head, ("continuations", pa.list_(scores))])
    numbers = [("logprob", pa.float64()), ("sampler_logprob", pa.float64())]
    top = ("top", pa.list_(pa.list_(pa.float64())))
    logprobs = pa.struct([("token_id", pa.int64()), *numbers, top])
    texts = [(name, pa.string()) for name in ("text", "finish_reason", "stop_reason")]
    sample = [*texts, ("token_ids", pa.list_(pa.int64())), ("logprobs", pa.list_(logprobs))]
    return pa.schema([*head, *sample, ("samples", pa.list_(pa.struct(sample)))])


def to_table(rows: list[dict], columns):
    """Rows of the output as an Arrow table; what may be a number or a text becomes a text."""
    pa = import_pyarrow()
    for row in rows:
        for part in (row, *row.get("samples", ())):
            for name in ("id", "stop_reason"):
                if part.get(name) is not None and columns.field(name).type == pa.string():
                    part[name] = str(part[name])
    return pa.Table.from_pylist(rows, columns)


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
