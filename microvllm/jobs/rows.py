"""Files of rows: read from JSON, JSON lines and Parquet, written to Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

MAX_LINE = 2**24  # bytes of a row; what is longer is no prompt
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class UnreadableFile(ValueError, OSError):
    """A file that is damaged, or of another format than its name says."""


def read(path: str | Path, columns: Iterable[str] | None = None) -> Iterator[tuple[int, object]]:
    """(number, row) of a .jsonl, .parquet or .json file (a list), numbered from 1.

    A row is what `decode` takes: of .jsonl a line's bytes, or the error of a line that is too long;
    blank lines are counted and left out. columns: of a .parquet file, by default all. Raises
    ValueError or OSError naming the file, ImportError without pyarrow.
    """
    path = Path(path)
    match path.suffix.lower():
        case ".jsonl":
            yield from _lines(path)
        case ".parquet":
            yield from enumerate(_parquet_rows(path, columns), 1)
        case ".json":
            try:
                rows = decode(path.read_bytes().removeprefix(_BYTE_ORDER_MARK))
            except ValueError as error:
                raise ValueError(f"{path}: it is {error}") from None
            if not isinstance(rows, list):
                raise ValueError(f"{path}: expected a list of rows, not {type(rows).__name__}")
            yield from enumerate(rows, 1)
        case _:
            raise ValueError(f"{path}: expected a file named .json, .jsonl or .parquet")


def read_rows(path: str | Path) -> list:
    """All rows of such a file, parsed. Raises ValueError naming the file (and line) at fault."""
    rows = []
    for number, raw in read(path):
        try:
            rows.append(decode(raw))
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is {error}") from None
    if not rows:
        raise ValueError(f"{path}: no rows in it")
    return rows


def decode(raw: object) -> object:
    """What `read` found, parsed. Raises ValueError saying what it is instead of JSON."""
    if isinstance(raw, ValueError):
        raise raw
    if not isinstance(raw, bytes):
        return raw
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None


def parse(raw: object) -> dict:
    """What `read` found as a dict. Raises ValueError if it is none."""
    row = decode(raw)
    if not isinstance(row, dict):
        raise ValueError(f'expected an object such as {{"prompt": "..."}}, not {row!r:.40}')
    return row


def _lines(path: Path) -> Iterator[tuple[int, bytes | ValueError]]:
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE and line[-1:] != b"\n":
                while (rest := file.readline(MAX_LINE)) and rest[-1:] != b"\n":
                    pass
                yield number, ValueError(f"longer than {MAX_LINE:,} bytes")
                continue
            line = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            if line.strip():
                yield number, line


# Parquet ------------------------------------------------------------------------------------------


def import_pyarrow():
    """pyarrow with its parquet. Raises ImportError that says what to install."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError("Parquet needs pyarrow: pip install 'microvllm[parquet]'") from None
    return pyarrow


def _parquet_rows(path: Path, columns: Iterable[str] | None) -> Iterator[dict]:
    pyarrow = import_pyarrow()
    with open(path, "rb") as source:
        try:
            file = pyarrow.parquet.ParquetFile(source)
            there = file.schema_arrow.names
            names = there if columns is None else [name for name in columns if name in there]
            for batch in file.iter_batches(1024, columns=names):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UnreadableFile(f"{path}: not a Parquet file that can be read: {error}") from None


def schema(score: bool, integer_ids: bool = False):
    """The columns of an answer in Parquet."""
    pa = import_pyarrow()
    text, integer, real = pa.string(), pa.int64(), pa.float64()
    head = [("line", integer), ("id", integer if integer_ids else text)]
    if score:
        scores = pa.struct([("total", real), ("per_token", real), ("logprobs", pa.list_(real))])
        return pa.schema([*head, ("continuations", pa.list_(scores))])
    numbers = [("token_id", integer), ("logprob", real), ("sampler_logprob", real)]
    logprobs = pa.list_(pa.struct([*numbers, ("top", pa.list_(pa.list_(real)))]))
    texts = [(name, text) for name in ("text", "finish_reason", "stop_reason")]
    sample = [*texts, ("token_ids", pa.list_(integer)), ("logprobs", logprobs)]
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
