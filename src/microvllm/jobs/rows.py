"""Files of rows: read from JSON, JSON lines and Parquet, written to Parquet."""

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

MAX_LINE = 2**24  # bytes of a row; what is longer is no prompt
MAX_UNFOLDED = 2**28  # bytes of a row group, or 64 times what it is compressed
MAX_ROWS = 2**22  # and 64 for each byte, of Parquet: a column of nulls takes no memory
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class UnreadableFile(ValueError, OSError):
    """A file that is damaged, or of another format than its name says."""


def read(path: str | Path, columns: Iterable[str] | None = None) -> Iterator[tuple[int, object]]:
    """(number, row) of a .jsonl, .parquet or .json file (a list), numbered from 1.

    A row is what `decode` takes: of .jsonl a line's bytes, or the error of a row that is too long;
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
            if line.strip():  # a byte order mark and nothing else is no blank line
                yield number, line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line


# Parquet ------------------------------------------------------------------------------------------


def import_pyarrow():
    """pyarrow with its parquet. Raises ImportError that says what to install."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"Parquet needs pyarrow: {how_to_install('parquet')}") from None
    return pyarrow


def _parquet_rows(path: Path, columns: Iterable[str] | None) -> Iterator[dict | ValueError]:
    """A text that many rows have is there once, in the file and, as a dictionary, in a batch; only
    as Python's objects does it take its size for each of them."""
    pyarrow = import_pyarrow()
    with open(path, "rb") as source:
        try:
            file = pyarrow.parquet.ParquetFile(source)
            leaves = [file.schema.column(i) for i in range(len(file.schema))]
            texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"
                     and leaf.logical_type.type != "DECIMAL"]  # fmt: skip
            file = pyarrow.parquet.ParquetFile(source, read_dictionary=texts)
            there = file.schema_arrow.names
            names = there if columns is None else [name for name in columns if name in there]
            groups = _row_groups(source)
            most = MAX_ROWS + 64 * os.fstat(source.fileno()).st_size
            if (num_rows := sum(count for count, _ in groups)) > most:
                raise ValueError(f"{path}: it says it has {num_rows:,} rows, more than it can have")
            for i, (_, columns_there) in enumerate(groups):
                _check_group(source, columns_there, leaves, names, path)
                for batch in file.iter_batches(1024, row_groups=[i], columns=names):
                    yield from _unfold(batch)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UnreadableFile(f"{path}: not a Parquet file that can be read: {error}") from None


def _check_group(
    source: BinaryIO, columns: list[dict], leaves: list, names: list[str], path: Path
) -> None:
    """Raises ValueError for pages that unfold to far more than they are, or values without end.
    What the footer says of that is not believed: it may lie, and the pages are what is read."""
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
        told = f"{small:,} bytes unfold to {size:,}: write it in smaller row groups"
        raise ValueError(f"{path}: {told}")


@contextmanager
def _damage(what: str) -> Iterator[None]:
    """Raises OSError for what is no Thrift inside."""
    try:
        yield
    except (LookupError, TypeError, ValueError, RecursionError, StopIteration) as error:
        raise OSError(f"its {what} is damaged ({type(error).__name__})") from None


def _row_groups(source: BinaryIO) -> list[tuple[int, list[dict]]]:
    """The number of rows of each row group, and the facts of its columns by their numbers in
    Parquet's ColumnMetaData. pyarrow can tell them as well, but a damaged footer then ends the
    process."""
    source.seek(-8, os.SEEK_END)
    length = int.from_bytes(source.read(4), "little")
    source.seek(-8 - length, os.SEEK_END)
    with _damage("footer"):
        groups = _thrift(iter(source.read(length)), 12)[4]
        return [(group[3] + 0, [column[3] for column in group[1]]) for group in groups]


def _pages(source: BinaryIO, column: dict) -> tuple[int, int]:
    """Values, and bytes without compression, of a column in a row group, as its pages have them."""
    with _damage("footer"):
        start = min([column[9], *filter(None, [column.get(11)])])  # where its dictionary is
        stop, most = start + column[7], 1000 + column[5]
        source.seek(start)
    # byte by byte, so that the page begins where its header ends
    data = (byte for chunk in iter(partial(source.read, 1), b"") for byte in chunk)
    num_values = unfolded = num_pages = 0
    with _damage("page"):
        while source.tell() < stop:
            page, num_pages = _thrift(data, 12), num_pages + 1
            # of data, version 1 or 2, or of a dictionary
            values = (page.get(5) or page.get(8) or page.get(7) or {1: 0})[1]
            if min(page[2], page[3], values) < 0 or num_pages > most:
                raise ValueError
            source.seek(page[3], os.SEEK_CUR)
            num_values, unfolded = num_values + values, unfolded + page[2]
    return num_values, unfolded


def _thrift(data: Iterator[int], kind: int) -> Any:
    """The next value of Thrift's compact protocol, in which a footer is written; a struct is a dict
    by the numbers of its fields. Raises LookupError or StopIteration for what is none."""
    match kind:
        case 1 | 2:  # a field that is true, or false, by its kind
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
    """A batch as dicts, no more than MAX_LINE bytes at once; of a row above that, or of one that
    Python cannot have (no UTF-8, a year beyond 9999), the error."""
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
    """Bytes of an Arrow array, with a dictionary's texts once for each row that has them."""
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
    calls = pa.list_(pa.struct([("call", text), ("result", text)]))
    lists = ("token_ids", pa.list_(integer)), ("logprobs", logprobs), ("tool_calls", calls)
    sample = [*texts, *lists]
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
