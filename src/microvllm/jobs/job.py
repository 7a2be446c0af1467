"""Bulk jobs: a file of prompts becomes a file of answers, whatever happens in between.

    rows.read -> answer (keeps one engine full) -> Job.write

The output is its own journal: an answer is appended, in one write, as soon as it is there, and
begins with the number of its input line and a checksum of the line. So a job that was killed knows
what is left. A row's seed follows from the job's seed and the row's id, hence a row that is
computed again, or in other company, gets the same tokens. What is kept of a row is one byte, and 24
more for the moments in which ids are compared or the output is sorted.
"""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import xxhash

from .rows import decode, import_pyarrow, parse, read, schema, to_table

if TYPE_CHECKING:
    from .. import LLM, SamplingParams

_HEAD = re.compile(rb'\{"line": (\d{1,18}), "crc": "([0-9a-f]{8})", ')  # of a journal's line
_BOOK = {"microvllm job": 2}  # what OUTPUT.job begins with; those of 1 had no checksums
_OPEN, _TWICE, _DONE = range(3)


# rows become answers ------------------------------------------------------------------------------


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
        """The id of the row on line `number`. Raises ValueError for no text and no integer."""
        column = self.id_column or "id"
        found = row.get(column)
        if found is None and self.id_column is None:
            return number
        if isinstance(found, bool) or not isinstance(found, (str, int)):
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


@dataclass
class _Work:
    """A row whose requests are under way."""

    number: int
    id: str | int | None = None
    outputs: dict[int, dict | None] = field(default_factory=dict)  # by request, None: not yet


def answer(
    llm: LLM, rows: Iterable[tuple[int, object]], ask: Ask, tools: bool | list = True
) -> Iterator[Outcome]:
    """Answer rows, as rows.read gives them, in the order in which they are done.

    tools: of conversations, see `LLM.generate`; no part of the job's settings, which a later start
    compares. No more rows are taken than keep the engine full. Leaving the loop aborts what is
    unfinished. Raises ValueError if the model cannot do the task.
    """
    chat = llm.tokenizer.has_chat and not ask.raw and ask.task != "completion"
    if ask.task == "chat" and not chat:
        raise ValueError("no chat with raw, or with a model that has no chat tokens: do completion")
    rows, waiting = iter(rows), {}
    try:
        while True:
            for number, raw in islice(rows, max(0, 2 * llm.max_batch_size - len(waiting))):
                work = _Work(number)
                try:
                    _submit(llm, work, parse(raw), ask, tools if chat else None)
                except (ValueError, TypeError) as error:
                    llm.abort(*work.outputs)
                    yield failed(number, error, work.id)
                else:
                    waiting |= dict.fromkeys(work.outputs, work)
            if not waiting:
                return
            for output in llm.step():
                if work := waiting.pop(output["request_id"], None):
                    work.outputs[output["request_id"]] = output
                    if all(work.outputs.values()):
                        yield _outcome(work, ask)
    finally:
        llm.abort(*waiting)


def _submit(llm: LLM, work: _Work, row: dict, ask: Ask, tools: bool | list | None) -> None:
    """Queue what the row asks for; tools: None unless its prompt is a conversation, or a user's
    turn."""
    chat = tools is not None
    work.id = ask.row_id(row, work.number)
    prompt = row.get(ask.prompt_column)
    if prompt is None:
        raise ValueError(f"no {ask.prompt_column!r} in it, which has {', '.join(row):.200}")
    if chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        if not chat:
            raise ValueError("a list of messages is for task chat, and for a model that has it")
        prompt = llm.tokenizer.render_for_completion(prompt)
    if ask.task != "score":
        params = _params(row.get(ask.params_column), ask, work.id)
        work.outputs[llm.add_request(prompt, params, tools=tools or False)] = None
        return
    tails, column = row.get(ask.continuation_column), ask.continuation_column
    tails = [tails] if isinstance(tails, str) else tails
    if not isinstance(tails, list) or not tails:
        raise ValueError(f"its {column!r} must be a text or a list of them, got {tails!r:.80}")
    for tail in tails:
        work.outputs[llm.add_request(prompt, continuation=tail)] = None


def _params(own: object, ask: Ask, row_id: str | int) -> SamplingParams:
    """The SamplingParams of a row: the job's, changed by its own."""
    from .. import SamplingParams

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
    known = {} if row_id is None else {"id": row_id}
    return Outcome(number, {"line": number, **known, "error": str(error)}, bad=True)


def _outcome(work: _Work, ask: Ask) -> Outcome:
    """What the output says of a row whose requests are done."""
    outputs = [*work.outputs.values()]  # of several continuations, or of one prompt
    asked = sum(len(output["prompt_token_ids"]) for output in outputs)
    cached = sum(output["num_cached_tokens"] for output in outputs)
    row = {"line": work.number, "id": work.id}
    if ask.task == "score":
        row["continuations"] = [
            {"total": sum(p), "per_token": sum(p) / len(p), "logprobs": p}
            for p in (output["logprobs"] for output in outputs)
        ]
        return Outcome(work.number, row, False, asked, cached)
    shown = ("text", "token_ids", "finish_reason", "stop_reason", "logprobs")
    samples = [{k: s[k] for k in shown if k in s} for s in outputs[0]["samples"]]
    for sample, made in zip(samples, outputs[0]["samples"], strict=True):
        if made.get("tool_calls"):
            sample["tool_calls"] = made["tool_calls"]
    for sample in samples:
        if sample["finish_reason"] == "error":
            return failed(work.number, sample["stop_reason"], work.id)
        if "logprobs" in sample:  # JSON has no -Infinity, which is what could not be drawn
            text = json.dumps(sample["logprobs"])
            sample["logprobs"] = json.loads(text, parse_constant=lambda _: None)
    row |= samples[0] | ({"samples": samples} if len(samples) > 1 else {})
    new = sum(len(sample["token_ids"]) for sample in samples)
    return Outcome(work.number, row, False, asked, cached, new)


# answers become files -----------------------------------------------------------------------------


def _seal(row: dict) -> bytes:
    """A row as a line of a journal: behind its number is a checksum of all the rest."""
    head, rest = json.dumps(row).encode().split(b", ", 1)
    return b'%s, "crc": "%08x", %s\n' % (head, zlib.crc32(head + rest), rest)


def _sealed(line: bytes) -> int:
    """The number of a line that is as _seal wrote it, 0 of any other."""
    head = _HEAD.match(line)
    if not head or line[-1:] != b"\n":
        return 0
    whole = zlib.crc32(line[: head.end(1)] + line[head.end() : -1]) == int(head[2], 16)
    return int(head[1]) if whole else 0


def _is_torn(line: bytes) -> bool:
    """Was a line of ours cut off by a crash, which may leave zeros where the rest should be? What
    begins otherwise, or is whole but changed, somebody else wrote."""
    if line[-1:] == b"\n":
        with suppress(ValueError):
            decode(line)
            return False
    return b'{"line": '.startswith(line.strip(b"\0")[:9])


class Job:
    """The files of a job: its input, what is done of it, and how it was begun.

    source, output: .jsonl or .parquet; settings: whatever decides the answers, JSON. Beside the
    output are OUTPUT.errors (a JSON line per bad row: line, id, error), OUTPUT.job (the settings),
    and for Parquet, which cannot be appended to, OUTPUT.journal until all is done: names that no
    input and no other output can have. num_done, num_bad: rows with an answer or an error, and with
    an error.

    Raises FileNotFoundError or ValueError, and touches nothing, if one of these is a link or not
    this job's, or this one's with another input or other settings, or if another process is at it.
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
        self.journal = Path(f"{self.output}.journal") if self.parquet else self.output
        self.errors, book = Path(f"{self.output}.errors"), Path(f"{self.output}.job")
        files = [*dict.fromkeys((self.output, self.journal, self.errors, book))]
        self.remedy = f"give another output, or start over: rm -f {' '.join(map(str, files))}"
        for path in files:
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise ValueError(f"{path} is a link, or no file: give the file itself")
            if path.exists() and not book.exists():
                raise ValueError(f"{path} exists and is not this job's: give another output")
        self.state = bytearray()  # of each line: to do, to do but its id is taken, or done
        self.num_rows = self.num_done = self.num_bad = 0
        self.integer_ids = True
        settings = json.dumps({**_BOOK, **settings, "input": self._survey()})
        text = json.dumps(json.loads(settings), sort_keys=True)
        self.mark = xxhash.xxh3_64_hexdigest(text.encode())  # in what no other job makes
        self.book = self._own(book)  # kept open, for as long as it is we hold the lock
        self._open(settings.encode())

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

    def _own(self, path: Path) -> BinaryIO:
        """Open a file of the job to read and to append, and lock it until it is closed."""

        def opener(name: str, flags: int) -> int:
            return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)

        file = open(path, "a+b", opener=opener)
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
        except ImportError:  # Windows
            pass
        except OSError:
            told = f"another process is writing {self.output}: wait, or end it"
            raise ValueError(told) from None
        return file

    def _open(self, settings: bytes) -> None:
        """Compare with how the job was begun, and read what it has."""
        self.whole = self.parquet and self.output.exists() and not self.journal.exists()
        found = [path for path in (self.journal, self.errors) if path.exists()]
        self.files = {path == self.errors: self._own(path) for path in found}
        self.book.seek(0)
        text = self.book.read()
        if text and not text.startswith(json.dumps(_BOOK).encode()[:-1]):
            told = "is there, and no job's of this version (an earlier one wrote no checksums)"
            raise ValueError(f"{self.book.name} {told}: move it away, or give another output")
        if self.whole or any(path.stat().st_size for path in found):
            try:
                begun, wanted = json.loads(text), json.loads(settings)
            except ValueError:
                raise ValueError(f"{self.output} is not this job's: {self.remedy}") from None
            for name in sorted(wanted.keys() | begun.keys()):
                if (old := begun.get(name)) != (new := wanted.get(name)):
                    told = f"{self.output} was begun with {name}={old!r}, not {new!r}"
                    raise ValueError(f"{told}: give that again; or {self.remedy}")
        else:
            self.book.truncate(0)
            self.book.write(settings + b"\n")
            self.book.flush()
            os.fsync(self.book.fileno())
        for path in found:
            self._recall(path)
        if self.whole:
            self.state, self.num_done = bytearray([_DONE]) * len(self.state), self.num_rows
        self._check_output()
        self.synced = time.monotonic()

    def _check_output(self) -> None:
        """Raises FileExistsError for a Parquet file in our output's place that this job did not
        make: ours is there when it was finished, or killed just before it was."""
        if self.parquet and self.output.exists():
            pq, own = import_pyarrow().parquet, None
            with suppress(ValueError, OSError):  # no Parquet at all
                own = (pq.read_metadata(self.output).metadata or {}).get(b"microvllm job")
            if own != self.mark.encode():
                raise FileExistsError(f"{self.output} is not this job's: move it away")

    def _recall(self, path: Path) -> None:
        """See which rows a journal has. A torn last line is dropped, its row computed again."""
        file, size = self.files[path == self.errors], 0
        file.seek(0)
        for place, line in enumerate(file, 1):
            number = _sealed(line)
            if not number and _is_torn(line) and not file.read(1):
                break
            if not 0 < number < len(self.state) or self.state[number] == _DONE:
                told = "not a line of this job, or damaged: delete it, its row is computed again"
                raise ValueError(f"{path}, line {place}: {told}; or {self.remedy}")
            self._mark(number, path == self.errors)
            size += len(line)
        file.truncate(size)

    def _file(self, bad: bool) -> BinaryIO:
        """The file of answers, or of errors, which is made when it is needed."""
        if bad not in self.files:
            path = self.errors if bad else self.journal
            file = self._own(path)
            if file.tell():
                raise FileExistsError(f"{path} is not this job's: move it away")
            self.files[bad] = file
        return self.files[bad]

    def _mark(self, number: int, bad: bool) -> None:
        self.state[number] = _DONE
        self.num_done += 1
        self.num_bad += bad

    def pending(self) -> Iterator[tuple[int, object]]:
        """The rows that are left, as rows.read gives them."""
        ask = self.ask
        columns = ask.prompt_column, ask.continuation_column, ask.params_column
        for number, raw in read(self.source, [ask.id_column or "id", *columns]):
            if self.state[number] == _TWICE:
                row_id = ask.row_id(parse(raw), number)
                raw = ValueError(f"the id {row_id!r:.80} is an earlier row's: ids must be unique")
            if self.state[number] != _DONE:
                yield number, raw

    def write(self, outcome: Outcome) -> bool:
        """Append an outcome, which is safe from then on. False if its row is there already."""
        if self.state[outcome.number] == _DONE:
            return False
        file = self._file(outcome.bad)
        file.write(_seal(outcome.row))
        file.flush()  # a kill takes nothing from the system's hands; a loss of power might
        if time.monotonic() - self.synced > 5:
            self._sync()
        self._mark(outcome.number, outcome.bad)
        return True

    def _sync(self) -> None:
        for file in self.files.values():
            os.fsync(file.fileno())
        if hasattr(os, "O_DIRECTORY"):  # not on Windows
            folder = os.open(self.output.parent, os.O_DIRECTORY)
            os.fsync(folder)  # which has the names of the files
            os.close(folder)
        self.synced = time.monotonic()

    def finish(self, ordered: bool = False) -> None:
        """Put the answers in the input's order, make the Parquet. Either is a new file that takes
        the old one's place when it is complete."""
        if self.whole:  # it was finished
            return
        self._file(bad=False)  # all rows may be bad ones
        self._sync()
        if not ordered and not self.parquet:
            return
        new = Path(f"{self.output}.{self.mark}.tmp")
        with suppress(FileNotFoundError):
            os.unlink(new)  # a start was killed here
        with open(new, "xb") as file:
            lines = self._lines(ordered)
            if self.parquet:
                columns = schema(self.ask.task == "score", self.integer_ids)
                columns = columns.with_metadata({"microvllm job": self.mark})
                with import_pyarrow().parquet.ParquetWriter(file, columns) as writer:
                    while rows := [json.loads(line) for line in islice(lines, 4096)]:
                        writer.write_table(to_table(rows, columns))
            else:
                file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        self._check_output()
        os.replace(new, self.output)
        self._sync()
        if self.parquet:
            self.journal.unlink()

    def close(self) -> None:
        """Let go of the files: another start may lock them."""
        for file in (self.book, *self.files.values()):
            file.close()

    def _lines(self, ordered: bool) -> Iterator[bytes]:
        with open(self.journal, "rb") as file:
            if not ordered:
                yield from file
                return
            numbers, starts, size = array("q"), array("q"), 0
            for line in file:
                numbers.append(int(_HEAD.match(line)[1]))
                starts.append(size)
                size += len(line)
            for i in np.argsort(np.frombuffer(numbers, np.int64)):
                file.seek(starts[i])
                yield file.readline()


def carry_out(job: Job, outcomes: Iterator[Outcome], ordered: bool = False) -> dict:
    """Write outcomes until every row has one, with a bar on a terminal, then finish the job.

    Returns what was counted since this start. The job is closed then. Raises RuntimeError if the
    outcomes end too early.
    """
    from tqdm import tqdm

    began, before, answered = time.perf_counter(), job.num_done, job.num_done - job.num_bad
    asked = cached = new = 0
    name = "".join(c if c.isprintable() else "\ufffd" for c in job.output.name)
    bar = tqdm(
        total=job.num_rows, initial=before, desc=name, unit="row", disable=None,
        unit_scale=job.num_rows > 99999,
    )  # fmt: skip
    with bar:
        for outcome in filter(job.write, outcomes):
            asked, cached = asked + outcome.prompt_tokens, cached + outcome.cached_tokens
            new += outcome.new_tokens
            rate, hits = new / (time.perf_counter() - began), cached / max(asked, 1)
            bad = f", {job.num_bad} bad" if job.num_bad else ""
            bar.set_postfix_str(f"{rate:,.0f} tokens/s, {hits:.0%} cached{bad}", refresh=False)
            bar.update()
    if left := job.num_rows - job.num_done:
        raise RuntimeError(f"{left} rows have no answer: start the job again")
    job.finish(ordered)
    job.close()
    return {
        "rows": job.num_rows, "answered_before": answered, "bad": job.num_bad,
        "prompt_tokens": asked, "cached_tokens": cached, "new_tokens": new,
        "seconds": round(time.perf_counter() - began, 3),
    }  # fmt: skip
