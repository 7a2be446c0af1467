"""Reads torch.save's files without executing code.

A .pt file is a zip archive with a pickle, and one record for each storage of tensors. In torch's
old format the storages follow five pickles. A pickle is a program for a stack machine. This reader
interprets it without imports, calls, or memory beyond its own size. Tensors are views of the file.
"""

import io
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

_MAX_BYTES = 1 << 18  # of pickles and archive directories; both need about 100 bytes per tensor
_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file in the old format
_CONSTANTS = {"NONE": None, "NEWFALSE": False, "NEWTRUE": True, "EMPTY_TUPLE": ()}
_DTYPES = {
    "torch.FloatStorage": torch.float32, "torch.BFloat16Storage": torch.bfloat16,
    "torch.HalfStorage": torch.float16, "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64, "torch.CharStorage": torch.int8,
}  # fmt: skip


def read_pt(file: Path) -> object:
    """Return the content of a .pt file, with memory-mapped tensors. Anything but a plain CPU tensor
    becomes an empty tensor on "meta". Raises ValueError, or other errors for damaged files."""
    with open(file, "rb") as opened:
        memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)  # private: never written
        if memory[:4] != b"PK\3\4":  # torch's own criterion
            return _read_old(memory)
        records = _records(opened, memory)
    folder = next(iter(records)).split("/")[0]
    start, size = records.get(f"{folder}/byteorder", (0, 0))
    if memory[start : start + size] not in (b"", b"little"):
        raise ValueError("its numbers are big-endian")
    start, size = records[f"{folder}/data.pkl"]
    if size > _MAX_BYTES:
        raise ValueError(f"its pickle of {size:,} bytes is too large")
    program = io.BytesIO(memory[start : start + size])
    places = {name.removeprefix(f"{folder}/data/"): place for name, place in records.items()}
    return _follow(program, lambda *storage: _row(memory, places, *storage))


def _records(opened, memory: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Return the start and the size of each record of an archive."""
    # one end record at the very end, right after the directory: so there is only one reading
    end = len(memory) - 22
    size, start = struct.unpack("<2L", memory[end + 12 : end + 20])
    if memory[end - 76 : end - 72] == b"PK\6\6" and memory[end - 20 : end - 16] == b"PK\6\7":
        size, start = struct.unpack("<2Q", memory[end - 36 : end - 20])  # the 64-bit form
        end -= 76
    if memory[-22:-18] + memory[-2:] != b"PK\5\6\0\0" or start + size != end or size > _MAX_BYTES:
        raise ValueError("its archive does not end with one directory and one end record")
    with zipfile.ZipFile(opened) as archive:
        infos = archive.infolist()
    if any(record.compress_type or record.compress_size != record.file_size for record in infos):
        raise ValueError("its records are compressed, so they may expand to any size")
    records = {}
    after = dict(pairwise(sorted([*(record.header_offset for record in infos), start])))
    if not len(infos) == len(after) == len({record.filename for record in infos}):
        raise ValueError("two of its records have the same name or the same place")
    for record in infos:
        lengths = struct.unpack_from("<2H", memory, record.header_offset + 26)
        begin = record.header_offset + 30 + sum(lengths)
        if begin + record.file_size > after[record.header_offset]:
            raise ValueError(f"its record {record.filename!r:.80} overlaps the next one")
        records[record.filename] = begin, record.file_size
    return records


def _read_old(memory: mmap.mmap) -> object:
    """`read_pt` for the old format, whose pickles do not contain the positions of the storages."""
    program, rows, places = io.BytesIO(memory[:_MAX_BYTES]), {}, {}

    def learn(key: str, dtype: torch.dtype, numel: int) -> Tensor:
        return rows.setdefault(key, torch.empty(numel, dtype=dtype, device="meta"))

    magic, _, system = (_follow(program, learn) for _ in range(3))
    if magic != _MAGIC or not system["little_endian"]:
        raise ValueError("torch.save did not write it, or a big-endian machine did")
    start = program.tell()
    _, keys = (_follow(program, learn) for _ in range(2))
    if not all(type(key) is str for key in keys):
        raise ValueError("the keys of its storages are not strings")
    end = program.tell()
    for key in keys:  # each storage follows its length
        places[key] = end + 8, rows[key].nbytes
        end += 8 + rows[key].nbytes
    program.seek(start)
    return _follow(program, lambda *storage: _row(memory, places, *storage))


def _row(memory: mmap.mmap, places: dict, key: str, dtype: torch.dtype, numel: int) -> Tensor:
    """Return a storage as a one-dimensional tensor."""
    start, size = places[key]
    if size != numel * dtype.itemsize:
        raise ValueError(f"its storage {key!r:.80} has {size:,} bytes, not {numel:,} of {dtype}")
    if not numel:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=numel, offset=start)


def _read_storage(storage: tuple, row: Callable[[str, torch.dtype, int], Tensor]) -> Tensor:
    """Return the numbers of a storage, which a pickle names by its type, key and size."""
    _, kind, key, _, numel, *view = storage
    types = [type(part) for part in (kind, key, numel)]
    if types != [str, str, int] or any(view):
        raise ValueError("it has unsupported storages, or views of storages")
    if kind not in _DTYPES:
        dtype_names = ", ".join(str(dtype)[6:] for dtype in _DTYPES.values())
        raise ValueError(f"it has a {kind:.80}, and the dtypes known are {dtype_names}")
    return row(key, _DTYPES[kind], numel)


def _follow(program: io.BytesIO, row: Callable[[str, torch.dtype, int], Tensor]) -> object:
    """Return the value of a pickle. Only the instructions that torch.save needs are supported, and
    only the functions that rebuild tensors. Each instruction costs time in proportion to its items.
    Keys cannot be tuples, since tuples nest, and hashing a nested key could take forever."""
    stack, marks, memo = [], [], {}

    def take(start: int) -> tuple:
        items = tuple(stack[start:])
        del stack[start:]
        return items

    for op, arg, position in pickletools.genops(program):
        match op.name:
            case "PROTO" | "STOP":
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE":
                stack.append(arg)
            case "NONE" | "NEWFALSE" | "NEWTRUE" | "EMPTY_TUPLE":
                stack.append(_CONSTANTS[op.name])
            case "EMPTY_DICT" | "EMPTY_LIST":
                stack.append({} if op.name == "EMPTY_DICT" else [])
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "MARK":
                marks.append(len(stack))
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(take(-int(op.name[5:]) if op.name[5:] else marks.pop()))
            case "APPEND" | "APPENDS":
                items = take(-1 if op.name == "APPEND" else marks.pop())
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = take(-2 if op.name == "SETITEM" else marks.pop())
                if not all(type(key) in (str, int) for key in items[::2]):
                    raise ValueError("it holds a name that is not a string")
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "GLOBAL":
                path = arg.replace(" ", ".")
                if path != "collections.OrderedDict" and not path.startswith("torch."):
                    raise ValueError(f"it imports {path:.80}; nothing in it was executed")
                stack.append(path)
            case "BINPERSID":
                stack.append(_read_storage(stack.pop(), row))
            case "REDUCE":
                stack.append(_call(*take(-2)))
            case "BUILD":  # version numbers of a module's parts
                stack.pop()
            case _:
                problem = f"it has the pickle instruction {op.name} at byte {position}"
                raise ValueError(
                    f"{problem}, which no checkpoint needs; nothing in it was executed"
                )
    return stack.pop()


def _call(function: object, arguments: object) -> object:
    """Return the result of a known function. For an unknown one, return an empty tensor."""
    match function, arguments:
        case "collections.OrderedDict", ():
            return {}
        case "torch._utils._rebuild_parameter", (value, _, _):
            return value
        case "torch._utils._rebuild_tensor_v2", (Tensor() as of, offset, size, stride, _, _):
            return of.as_strided(size, stride, offset)  # raises if the storage is too short
    return torch.empty(0, device="meta")
