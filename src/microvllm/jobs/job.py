"""Bulk jobs: turn a file of prompts into a file of answers, and resume after any interruption.

    rows.read -> answer (keeps one engine full) -> Job.write

The output is its own journal. Each answer is appended in one write as soon as it is complete. It
starts with the number of its input line and a checksum of the rest, so a restarted job knows which
rows are missing. The seed of a row is derived from the job's seed and the row's id, so a row that
is computed again, or in another batch, gets the same tokens. A row takes one byte of memory, and 24
more while ids are compared or the output is sorted.
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

_HEAD = re.compile(rb'\{"line": (\d{1,18}), "crc": "([0-9a-f]{8})", ')  # of a journal line
_VERSION = {"microvllm job": 2}  # the start of OUTPUT.job; version 1 had no checksums
_OPEN, _TWICE, _DONE = range(3)


# from rows to answers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """How to answer rows, which are dicts. It is the same in one process and in all replicas.

    task: "chat" (the prompt is the user's text, or a list of messages), "completion" (a text) or
    "score" (either, with a continuation or a list of them); all accept token ids. None: chat if the
    model supports it, else completion. raw: treat prompts as plain text even if the model can chat;
    params: SamplingParams for rows without their own; seed: the job's seed. The other fields are
    column names. Without id_column, a row's id is its "id", or else its line number.
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
        """Return the id of the row on line `number`. Raises ValueError unless it is str or int."""
        column = self.id_column or "id"
        value = row.get(column)
        if value is None and self.id_column is None:
            return number
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise ValueError(f"its {column!r} must be a text or an integer, got {value!r:.80}")
        str(value).encode()  # raises for half of a surrogate pair, which UTF-8 cannot encode
        return value


class Outcome(NamedTuple):
    """The result of a row."""

    number: int  # its line, or its position in a Parquet file, from 1
    row: dict  # for the output or the errors; starts with line and, if known, id
    bad: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0


@dataclass
class _Work:
    """A row with requests in progress."""

    number: int
    id: str | int | None = None
    outputs: dict[int, dict | None] = field(default_factory=dict)  # by request; None: in progress


def answer(
    llm: LLM, rows: Iterable[tuple[int, object]], ask: Ask, tools: bool | list = True
) -> Iterator[Outcome]:
    """Answer rows of rows.read, and yield outcomes in the order of their completion.

    tools: for conversations, see `LLM.generate`; they are not among the job's settings, which a
    restart compares. Only as many rows are read as keep the engine full. Leaving the loop aborts
    unfinished rows. Raises ValueError if the model does not support the task.
    """
    chat = llm.tokenizer.has_chat and not ask.raw and ask.task != "completion"
    if ask.task == "chat" and not chat:
        raise ValueError("task chat needs a model with chat tokens, and raw=False: use completion")
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
    """Queue the requests of a row. tools: None if its prompt is plain text."""
    chat = tools is not None
    work.id = ask.row_id(row, work.number)
    prompt = row.get(ask.prompt_column)
    if prompt is None:
        raise ValueError(f"row has no {ask.prompt_column!r} field (found: {', '.join(row):.200})")
    if chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        if not chat:
            raise ValueError("a list of messages needs task chat, and a model with chat tokens")
        prompt = llm.tokenizer.render_for_completion(prompt)
    if ask.task != "score":
        params = _params(row.get(ask.params_column), ask, work.id)
        work.outputs[llm.add_request(prompt, params, tools=tools or False)] = None
        return
    tails, column = row.get(ask.continuation_column), ask.continuation_column
    tails = [tails] if isinstance(tails, str) else tails
    if not isinstance(tails, list) or not tails:
        raise ValueError(f"its {column!r} must be a text or a list of texts, got {tails!r:.80}")
    for tail in tails:
        work.outputs[llm.add_request(prompt, continuation=tail)] = None


def _params(row_params: object, ask: Ask, row_id: str | int) -> SamplingParams:
    """Return the SamplingParams of a row: the job's, updated with the row's own."""
    from .. import SamplingParams

    if not isinstance(row_params, (dict, type(None))):
        raise TypeError(f"its {ask.params_column!r} must be an object, got {row_params!r:.80}")
    values = ask.params | {k: v for k, v in (row_params or {}).items() if v is not None}
    known_names = {f.name for f in fields(SamplingParams) if f.init} - {"logits_processor"}
    if unknown := values.keys() - known_names:
        names = ", ".join(sorted(known_names))
        raise ValueError(f"unknown sampling parameter {min(unknown)!r}: there are {names}")
    if "seed" not in values:
        values["seed"] = xxhash.xxh3_64_intdigest(json.dumps([ask.seed, row_id]).encode())
    if isinstance(values.get("logit_bias"), dict):  # JSON keys are strings
        values["logit_bias"] = {int(k): v for k, v in values["logit_bias"].items()}
    return SamplingParams(**values)


def failed(number: int, error: object, row_id: str | int | None = None) -> Outcome:
    id_part = {} if row_id is None else {"id": row_id}
    return Outcome(number, {"line": number, **id_part, "error": str(error)}, bad=True)


def _outcome(work: _Work, ask: Ask) -> Outcome:
    """Return the outcome of a row whose requests are complete."""
    outputs = [*work.outputs.values()]  # one per continuation, or one for the prompt
    prompt_tokens = sum(len(output["prompt_token_ids"]) for output in outputs)
    cached_tokens = sum(output["num_cached_tokens"] for output in outputs)
    row = {"line": work.number, "id": work.id}
    if ask.task == "score":
        row["continuations"] = [
            {"total": sum(p), "per_token": sum(p) / len(p), "logprobs": p}
            for p in (output["logprobs"] for output in outputs)
        ]
        return Outcome(work.number, row, False, prompt_tokens, cached_tokens)
    shown = ("text", "token_ids", "finish_reason", "stop_reason", "logprobs")
    samples = [{k: s[k] for k in shown if k in s} for s in outputs[0]["samples"]]
    for sample, source in zip(samples, outputs[0]["samples"], strict=True):
        if source.get("tool_calls"):
            sample["tool_calls"] = source["tool_calls"]
    for sample in samples:
        if sample["finish_reason"] == "error":
            return failed(work.number, sample["stop_reason"], work.id)
        if "logprobs" in sample:  # JSON has no -Infinity, the value of an excluded token
            text = json.dumps(sample["logprobs"])
            sample["logprobs"] = json.loads(text, parse_constant=lambda _: None)
    row |= samples[0] | ({"samples": samples} if len(samples) > 1 else {})
    new_tokens = sum(len(sample["token_ids"]) for sample in samples)
    return Outcome(work.number, row, False, prompt_tokens, cached_tokens, new_tokens)


# from answers to files ----------------------------------------------------------------------------


def _seal(row: dict) -> bytes:
    """Return a row as a journal line. After its number comes a checksum of the rest."""
    head, rest = json.dumps(row).encode().split(b", ", 1)
    return b'%s, "crc": "%08x", %s\n' % (head, zlib.crc32(head + rest), rest)


def _sealed(line: bytes) -> int:
    """Return the number of a line that _seal wrote, or 0 for any other line."""
    head = _HEAD.match(line)
    if not head or line[-1:] != b"\n":
        return 0
    whole = zlib.crc32(line[: head.end(1)] + line[head.end() : -1]) == int(head[2], 16)
    return int(head[1]) if whole else 0


def _is_torn(line: bytes) -> bool:
    """Return whether one of our lines was cut off by a crash, which may leave zeros at its end.
    Lines with another start, and complete but changed lines, come from elsewhere."""
    if line[-1:] == b"\n":
        with suppress(ValueError):
            decode(line)
            return False
    return b'{"line": '.startswith(line.strip(b"\0")[:9])


class Job:
    """The files of a job: its input, its results so far, and its settings.

    source, output: .jsonl or .parquet; settings: everything that determines the answers, as JSON.
    Beside the output there are OUTPUT.errors (a JSON line per bad row: line, id, error), OUTPUT.job
    (the settings), and OUTPUT.journal for Parquet until the job is finished, since Parquet files
    cannot be appended to. No other input or output may have these names. num_done, num_bad: the
    rows with an answer or an error, and those with an error.

    Raises FileNotFoundError or ValueError, and changes nothing, if a file is a link, if it does not
    belong to this job with this input and these settings, or if another process uses it.
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
        self.errors, settings_path = Path(f"{self.output}.errors"), Path(f"{self.output}.job")
        files = [*dict.fromkeys((self.output, self.journal, self.errors, settings_path))]
        self.remedy = f"give another output, or start over: rm -f {' '.join(map(str, files))}"
        for path in files:
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise ValueError(f"{path} is a link, or not a file: give the file itself")
            if path.exists() and not settings_path.exists():
                raise ValueError(f"{path} exists and is not this job's: give another output")
        self.state = bytearray()  # state of each line: open, open with a duplicate id, or done
        self.num_rows = self.num_done = self.num_bad = 0
        self.integer_ids = True
        settings = json.dumps({**_VERSION, **settings, "input": self._survey()})
        text = json.dumps(json.loads(settings), sort_keys=True)
        self.mark = xxhash.xxh3_64_hexdigest(text.encode())  # identifies this job's files
        # stays open, since closing it would release the lock
        self.settings_file = self._own(settings_path)
        self._open(settings.encode())

    def _survey(self) -> str:
        """Read the input once: count its rows, find duplicate ids, and compute its hash."""
        ask, hashes, numbers, prompts = self.ask, array("Q"), array("q"), 0
        for number, raw in read(self.source, [ask.id_column or "id", ask.prompt_column]):
            try:
                row = parse(raw)
                prompts += ask.prompt_column in row
                row_id = ask.row_id(row, number)
                text = json.dumps(row_id)
                self.integer_ids &= isinstance(row_id, int) and abs(row_id) < 2**63
            except ValueError:
                text = f"bad {number}"  # different from the JSON of any id
            hashes.append(xxhash.xxh3_64_intdigest(text.encode()))
            numbers.append(number)
        if not prompts:
            column = ask.prompt_column
            raise ValueError(f"{self.source}: no row has {column!r}: give another prompt column")
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
        """Open a file of the job for reading and appending, and lock it until it is closed."""

        def opener(name: str, flags: int) -> int:
            return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)

        file = open(path, "a+b", opener=opener)
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends
        except ImportError:  # Windows
            pass
        except OSError:
            problem = f"another process is writing {self.output}: wait, or end it"
            raise ValueError(problem) from None
        return file

    def _open(self, settings: bytes) -> None:
        """Compare the settings with those at the start of the job, and read the finished rows."""
        self.whole = self.parquet and self.output.exists() and not self.journal.exists()
        paths = [path for path in (self.journal, self.errors) if path.exists()]
        self.files = {path == self.errors: self._own(path) for path in paths}
        self.settings_file.seek(0)
        text = self.settings_file.read()
        if text and not text.startswith(json.dumps(_VERSION).encode()[:-1]):
            problem = "exists, but is not from this version (earlier ones wrote no checksums)"
            raise ValueError(
                f"{self.settings_file.name} {problem}: move it away, or give another output"
            )
        if self.whole or any(path.stat().st_size for path in paths):
            try:
                old_settings, new_settings = json.loads(text), json.loads(settings)
            except ValueError:
                raise ValueError(f"{self.output} is not this job's: {self.remedy}") from None
            for name in sorted(new_settings.keys() | old_settings.keys()):
                if (old := old_settings.get(name)) != (new := new_settings.get(name)):
                    problem = f"{self.output} was started with {name}={old!r}, not {new!r}"
                    raise ValueError(f"{problem}: restore this setting; or {self.remedy}")
        else:
            self.settings_file.truncate(0)
            self.settings_file.write(settings + b"\n")
            self.settings_file.flush()
            os.fsync(self.settings_file.fileno())
        for path in paths:
            self._recall(path)
        if self.whole:
            self.state, self.num_done = bytearray([_DONE]) * len(self.state), self.num_rows
        self._check_output()
        self.synced = time.monotonic()

    def _check_output(self) -> None:
        """Raise FileExistsError if the output is a Parquet file that this job did not write. Its
        own file exists if the job was finished, or killed just before the end."""
        if self.parquet and self.output.exists():
            pq, mark = import_pyarrow().parquet, None
            with suppress(ValueError, OSError):  # not a Parquet file
                mark = (pq.read_metadata(self.output).metadata or {}).get(b"microvllm job")
            if mark != self.mark.encode():
                raise FileExistsError(f"{self.output} is not this job's: move it away")

    def _recall(self, path: Path) -> None:
        """Mark the rows of a journal as done. An incomplete last line is dropped, and its row is
        computed again."""
        file, size = self.files[path == self.errors], 0
        file.seek(0)
        for place, line in enumerate(file, 1):
            number = _sealed(line)
            if not number and _is_torn(line) and not file.read(1):
                break
            if not 0 < number < len(self.state) or self.state[number] == _DONE:
                problem = "not a line of this job, or damaged: delete it to compute its row again"
                raise ValueError(f"{path}, line {place}: {problem}; or {self.remedy}")
            self._mark(number, path == self.errors)
            size += len(line)
        file.truncate(size)

    def _file(self, bad: bool) -> BinaryIO:
        """Return the file of answers or of errors. It is created when it is needed."""
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
        """Yield the rows that are not done, in the form of rows.read."""
        ask = self.ask
        columns = ask.prompt_column, ask.continuation_column, ask.params_column
        for number, raw in read(self.source, [ask.id_column or "id", *columns]):
            if self.state[number] == _TWICE:
                row_id = ask.row_id(parse(raw), number)
                raw = ValueError(f"the id {row_id!r:.80} is an earlier row's: ids must be unique")
            if self.state[number] != _DONE:
                yield number, raw

    def write(self, outcome: Outcome) -> bool:
        """Append an outcome, which is stored from then on. Returns False if its row is done."""
        if self.state[outcome.number] == _DONE:
            return False
        file = self._file(outcome.bad)
        file.write(_seal(outcome.row))
        file.flush()  # a kill loses nothing that the system has; a power failure may
        if time.monotonic() - self.synced > 5:
            self._sync()
        self._mark(outcome.number, outcome.bad)
        return True

    def _sync(self) -> None:
        for file in self.files.values():
            os.fsync(file.fileno())
        if hasattr(os, "O_DIRECTORY"):  # not on Windows
            folder = os.open(self.output.parent, os.O_DIRECTORY)
            os.fsync(folder)  # stores the names of the files
            os.close(folder)
        self.synced = time.monotonic()

    def finish(self, ordered: bool = False) -> None:
        """Sort the answers in the order of the input (`ordered`), and write the Parquet file. Both
        write a new file that replaces the old one when it is complete."""
        if self.whole:  # finished before
            return
        self._file(bad=False)  # create it even if all rows are bad
        self._sync()
        if not ordered and not self.parquet:
            return
        new = Path(f"{self.output}.{self.mark}.tmp")
        with suppress(FileNotFoundError):
            os.unlink(new)  # left by a process that was killed here
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
        """Close the files, which releases their locks."""
        for file in (self.settings_file, *self.files.values()):
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
    """Write outcomes until every row has one, with a progress bar on a terminal. Then finish and
    close the job.

    Returns counts since this start. Raises RuntimeError if the outcomes end too early.
    """
    from tqdm import tqdm

    start_time = time.perf_counter()
    num_before = job.num_done
    num_answered = job.num_done - job.num_bad
    prompt_tokens = cached_tokens = new_tokens = 0
    name = "".join(c if c.isprintable() else "\ufffd" for c in job.output.name)
    bar = tqdm(
        total=job.num_rows, initial=num_before, desc=name, unit="row", disable=None,
        unit_scale=job.num_rows > 99999,
    )  # fmt: skip
    with bar:
        for outcome in filter(job.write, outcomes):
            prompt_tokens += outcome.prompt_tokens
            cached_tokens += outcome.cached_tokens
            new_tokens += outcome.new_tokens
            rate = new_tokens / (time.perf_counter() - start_time)
            hit_rate = cached_tokens / max(prompt_tokens, 1)
            bad = f", {job.num_bad} bad" if job.num_bad else ""
            bar.set_postfix_str(f"{rate:,.0f} tokens/s, {hit_rate:.0%} cached{bad}", refresh=False)
            bar.update()
    if num_left := job.num_rows - job.num_done:
        raise RuntimeError(f"{num_left} rows have no answer: start the job again")
    job.finish(ordered)
    job.close()
    return {
        "rows": job.num_rows, "answered_before": num_answered, "bad": job.num_bad,
        "prompt_tokens": prompt_tokens, "cached_tokens": cached_tokens, "new_tokens": new_tokens,
        "seconds": round(time.perf_counter() - start_time, 3),
    }  # fmt: skip
