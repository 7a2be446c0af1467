"""Reads rows from JSON, JSON lines and Parquet, and writes Parquet."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from ..environment import how_to_install

MAX_LINE = 2**24  # bytes of a row; longer ones are not prompts
MAX_UNFOLDED = 2**28  # bytes of an expanded row group, or 64 times its compressed size
MAX_ROWS = 2**22  # per Parquet file, plus 64 per byte, since null columns take no memory
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class UnreadableFile(ValueError, OSError):
    """A file that is damaged, or whose format does not match its name."""


def read(path: str | Path, columns: Iterable[str] | None = None) -> Iterator[tuple[int, object]]:
    """Yield (number, row) of a .jsonl, .parquet or .json file (a list), numbered from 1.

    A row has the form that `decode` accepts. For .jsonl it is the bytes of a line, or the error of
    a row that is too long; blank lines are counted and skipped. columns: columns to read of a
    .parquet file (default: all). Raises ValueError or OSError that names the file, ImportError
    without pyarrow.
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
    """Return all rows of a file, parsed. Raises ValueError that names the file and the line."""
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
    """Parse a row of `read`. Raises ValueError with the reason if it is not valid JSON."""
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
    """Parse a row of `read` to a dict. Raises ValueError if it is not a dict."""
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
            if line.strip():  # a line with only a byte order mark is not blank
                yield number, line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line


# Parquet ------------------------------------------------------------------------------------------


def import_pyarrow():
    """Return pyarrow with pyarrow.parquet. Raises ImportError with the install command."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"Parquet needs pyarrow: {how_to_install('parquet')}") from None
    return pyarrow


def _parquet_rows(path: Path, columns: Iterable[str] | None) -> Iterator[dict | ValueError]:
    """Yield the rows of a Parquet file. A text that many rows share is stored once in the file and,
    as a dictionary, in a batch. Only Python objects take its size for each row."""
    pyarrow = import_pyarrow()
    with open(path, "rb") as source:
        try:
            file = pyarrow.parquet.ParquetFile(source)
            leaves = [file.schema.column(i) for i in range(len(file.schema))]
            texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"
                     and leaf.logical_type.type != "DECIMAL"]  # fmt: skip
            file = pyarrow.parquet.ParquetFile(source, read_dictionary=texts)
            file_columns = file.schema_arrow.names
            names = file_columns
            if columns is not None:
                names = [name for name in columns if name in file_columns]
            groups = _row_groups(source)
            most = MAX_ROWS + 64 * os.fstat(source.fileno()).st_size
            if (num_rows := sum(count for count, _ in groups)) > most:
                raise ValueError(f"{path}: it claims {num_rows:,} rows, more than it can have")
            for i, (_, group_columns) in enumerate(groups):
                _check_group(source, group_columns, leaves, names, path)
                for batch in file.iter_batches(1024, row_groups=[i], columns=names):
                    yield from _unfold(batch)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UnreadableFile(f"{path}: not a Parquet file that can be read: {error}") from None


def _check_group(
    source: BinaryIO, columns: list[dict], leaves: list, names: list[str], path: Path
) -> None:
    """Raise ValueError for pages that expand far beyond their size, or for values of unlimited
    length. The sizes come from the pages, since the footer may lie."""
    if len(columns) != len(leaves):
        raise OSError(f"its footer is damaged: {len(columns)} columns of {len(leaves)}")
    small = size = 0
    for column, leaf in zip(columns, leaves, strict=True):
        if leaf.path.split(".")[0] in names:
            if leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type == "DECIMAL":
                raise ValueError(f"{path}: {leaf.path} has decimals of any length: give texts")
            num_values, unfolded = _pages(source, column)
            small += column[7]
            size += max(unfolded, num_values * max(16, leaf.length or 0))
    if size > max(MAX_UNFOLDED, 64 * small):
        problem = f"{small:,} bytes expand to {size:,}: write it in smaller row groups"
        raise ValueError(f"{path}: {problem}")


@contextmanager
def _damage(part: str) -> Iterator[None]:
    """Convert parsing errors in the block to an OSError: the data is not valid Thrift."""
    try:
        yield
    except (LookupError, TypeError, ValueError, RecursionError, StopIteration) as error:
        raise OSError(f"its {part} is damaged ({type(error).__name__})") from None


def _row_groups(source: BinaryIO) -> list[tuple[int, list[dict]]]:
    """Return for each row group its number of rows, and the values of its columns by field number
    of Parquet's ColumnMetaData. pyarrow returns them as well, but a damaged footer can crash its
    process."""
    source.seek(-8, os.SEEK_END)
    length = int.from_bytes(source.read(4), "little")
    source.seek(-8 - length, os.SEEK_END)
    with _damage("footer"):
        groups = _thrift(iter(source.read(length)), 12)[4]
        return [(group[3] + 0, [column[3] for column in group[1]]) for group in groups]


def _pages(source: BinaryIO, column: dict) -> tuple[int, int]:
    """Return the number of values and the uncompressed bytes of a column in a row group, from its
    pages."""
    with _damage("footer"):
        start = min([column[9], *filter(None, [column.get(11)])])  # its dictionary comes first
        stop, most = start + column[7], 1000 + column[5]
        source.seek(start)
    # read byte by byte, so that the position after a header is the start of its page
    data = (byte for chunk in iter(partial(source.read, 1), b"") for byte in chunk)
    num_values = unfolded = num_pages = 0
    with _damage("page"):
        while source.tell() < stop:
            page, num_pages = _thrift(data, 12), num_pages + 1
            # data page version 1 or 2, or dictionary page
            values = (page.get(5) or page.get(8) or page.get(7) or {1: 0})[1]
            if min(page[2], page[3], values) < 0 or num_pages > most:
                raise ValueError
            source.seek(page[3], os.SEEK_CUR)
            num_values, unfolded = num_values + values, unfolded + page[2]
    return num_values, unfolded


def _thrift(data: Iterator[int], kind: int) -> Any:
    """Read the next value of Thrift's compact protocol, the format of a footer. A struct becomes a
    dict keyed by field number. Raises LookupError or StopIteration for invalid data."""
    match kind:
        case 1 | 2:  # a boolean field: its kind is its value
            return kind == 1
        case 3:
            return next(data)
        case 4 | 5 | 6:
            number = _varint(data)
            return number >> 1 ^ -(number & 1)
        case 7 | 8:
            return bytes(islice(data, 8 if kind == 7 else _varint(data)))
        case 9 | 10:
            head = next(data)
            count = _varint(data) if head >> 4 == 15 else head >> 4
            return [_thrift(data, max(head & 15, 3)) for _ in range(count)]
        case 11:
            count = _varint(data)
            kinds = divmod(next(data), 16) if count else ()
            return [[_thrift(data, max(kind, 3)) for kind in kinds] for _ in range(count)]
        case 12:
            fields, field = {}, 0
            while head := next(data):
                field = field + (head >> 4) if head >> 4 else _thrift(data, 4)
                fields[field] = _thrift(data, head & 15)
            return fields
    raise LookupError(kind)


def _varint(data: Iterator[int]) -> int:
    number = 0
    for shift in range(0, 64, 7):
        byte = next(data)
        number |= (byte & 127) << shift
        if byte < 128:
            return number
    raise LookupError("a number without end")


def _unfold(batch) -> Iterator[dict | ValueError]:
    """Yield the rows of a batch as dicts, at most MAX_LINE bytes at a time. A larger row, or a row
    that Python cannot represent (invalid UTF-8, a year beyond 9999), becomes an error."""
    half, error = batch.num_rows // 2, ValueError(f"longer than {MAX_LINE:,} bytes")
    if sum(map(_weight, batch.columns)) <= MAX_LINE:
        try:
            yield from batch.to_pylist()
            return
        except (ValueError, OverflowError) as caught:
            error = ValueError(f"not readable: {caught}")
    if half:
        yield from _unfold(batch[:half])
        yield from _unfold(batch[half:])
    else:
        yield error


def _weight(array) -> int:
    """Return the bytes of an Arrow array, counting a dictionary's texts once for each use."""
    import pyarrow.compute as pc

    if hasattr(array, "dictionary"):
        return pc.sum(pc.binary_length(array.dictionary).take(array.indices)).as_py() or 0
    if hasattr(array, "keys"):  # a map
        start, stop = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return _weight(array.keys[start:stop]) + _weight(array.items[start:stop])
    if hasattr(array, "flatten"):  # a list, or a struct
        parts = array.flatten()
        return sum(map(_weight, parts if isinstance(parts, list) else [parts]))
    return array.nbytes


def schema(score: bool, integer_ids: bool = False):
    """Return the Parquet columns of an answer."""
    pa = import_pyarrow()
    text, integer, real = pa.string(), pa.int64(), pa.float64()
    head = [("line", integer), ("id", integer if integer_ids else text)]
    if score:
        scores = pa.struct([("total", real), ("per_token", real), ("logprobs", pa.list_(real))])
        return pa.schema([*head, ("continuations", pa.list_(scores))])
    numbers = [("token_id", integer), ("logprob", real), ("sampler_logprob", real)]
    logprobs = pa.list_(pa.struct([*numbers, ("top", pa.list_(pa.list_(real)))]))
    texts = [(name, text) for name in ("text", "finish_reason", "stop_reason")]
    calls = pa.list_(pa.struct([("call", text), ("result", text)]))
    lists = ("token_ids", pa.list_(integer)), ("logprobs", logprobs), ("tool_calls", calls)
    sample = [*texts, *lists]
    return pa.schema([*head, *sample, ("samples", pa.list_(pa.struct(sample)))])


def to_table(rows: list[dict], columns):
    """Convert output rows to an Arrow table. Values that may be numbers or texts become texts."""
    pa = import_pyarrow()
    for row in rows:
        for part in (row, *row.get("samples", ())):
            for name in ("id", "stop_reason"):
                if part.get(name) is not None and columns.field(name).type == pa.string():
                    part[name] = str(part[name])
    return pa.Table.from_pylist(rows, columns)
