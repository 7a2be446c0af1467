"""torch.save's files, read without running anything.

A .pt is a zip archive of a pickle and one record for each storage of tensors; in torch's old format
the storages follow five pickles. A pickle is a program for a stack machine. It is followed here
without an import, a call, or memory beyond its own size, and the tensors are parts of the file.
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

_MAX_BYTES = 1 << 18  # of pickles, and of an archive's directory: a tensor needs about 100 of each
_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file in the old format
_CONSTANTS = {"NONE": None, "NEWFALSE": False, "NEWTRUE": True, "EMPTY_TUPLE": ()}
_DTYPES = {
    "torch.FloatStorage": torch.float32, "torch.BFloat16Storage": torch.bfloat16,
    "torch.HalfStorage": torch.float16, "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64, "torch.CharStorage": torch.int8,
}  # fmt: skip


def read_pt(file: Path) -> object:
    """What a .pt holds; tensors are memory-mapped. What is no plain tensor of the CPU becomes an
    empty one on the device "meta". Raises ValueError, or whatever else damage leads to."""
    with open(file, "rb") as opened:
        memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)  # private: never written
        if memory[:4] != b"PK\3\4":  # as torch decides
            return _read_old(memory)
        records = _records(opened, memory)
    folder = next(iter(records)).split("/")[0]
    start, size = records.get(f"{folder}/byteorder", (0, 0))
    if memory[start : start + size] not in (b"", b"little"):
        raise ValueError("its numbers are big-endian")
    start, size = records[f"{folder}/data.pkl"]
    if size > _MAX_BYTES:
        raise ValueError(f"its pickle of {size:,} bytes is far too large")
    program = io.BytesIO(memory[start : start + size])
    places = {name.removeprefix(f"{folder}/data/"): place for name, place in records.items()}
    return _follow(program, lambda *storage: _row(memory, places, *storage))


def _records(opened, memory: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Where the bytes of each record of an archive begin, and how many there are."""
    # one end record, nothing behind it, the directory right before it: there is one way to read it
    end = len(memory) - 22
    size, start = struct.unpack("<2L", memory[end + 12 : end + 20])
    if memory[end - 76 : end - 72] == b"PK\6\6" and memory[end - 20 : end - 16] == b"PK\6\7":
        size, start = struct.unpack("<2Q", memory[end - 36 : end - 20])  # in 64 bits
        end -= 76
    if memory[-22:-18] + memory[-2:] != b"PK\5\6\0\0" or start + size != end or size > _MAX_BYTES:
        raise ValueError("its archive does not end with one directory and one end record")
    with zipfile.ZipFile(opened) as archive:
        found = archive.infolist()
    if any(record.compress_type or record.compress_size != record.file_size for record in found):
        raise ValueError("its records are compressed, and may have any size")
    records = {}
    after = dict(pairwise(sorted([*(record.header_offset for record in found), start])))
    if not len(found) == len(after) == len({record.filename for record in found}):
        raise ValueError("two of its records have one name or one place")
    for record in found:
        lengths = struct.unpack_from("<2H", memory, record.header_offset + 26)
        begin = record.header_offset + 30 + sum(lengths)
        if begin + record.file_size > after[record.header_offset]:
            raise ValueError(f"its record {record.filename!r:.80} reaches into the next")
        records[record.filename] = begin, record.file_size
    return records


def _read_old(memory: mmap.mmap) -> object:
    """The same of the old format, whose pickles do not say where the storages are."""
    program, rows, places = io.BytesIO(memory[:_MAX_BYTES]), {}, {}

    def learn(key: str, dtype: torch.dtype, numel: int) -> Tensor:
        return rows.setdefault(key, torch.empty(numel, dtype=dtype, device="meta"))

    magic, _, system = (_follow(program, learn) for _ in range(3))
    if magic != _MAGIC or not system["little_endian"]:
        raise ValueError("torch.save did not write it, or a big-endian machine did")
    start = program.tell()
    _, keys = (_follow(program, learn) for _ in range(2))
    if not all(type(key) is str for key in keys):
        raise ValueError("the keys of its storages are no text")
    end = program.tell()
    for key in keys:  # each behind its length
        places[key] = end + 8, rows[key].nbytes
        end += 8 + rows[key].nbytes
    program.seek(start)
    return _follow(program, lambda *storage: _row(memory, places, *storage))


def _row(memory: mmap.mmap, places: dict, key: str, dtype: torch.dtype, numel: int) -> Tensor:
    """A storage as a tensor of one dimension."""
    start, size = places[key]
    if size != numel * dtype.itemsize:
        raise ValueError(f"its storage {key!r:.80} has {size:,} bytes, not {numel:,} of {dtype}")
    if not numel:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=numel, offset=start)


def _follow(program: io.BytesIO, row: Callable[[str, torch.dtype, int], Tensor]) -> object:
    """What a pickle gives. Known are the instructions that torch.save needs, and of all that could
    be imported and called only what rebuilds tensors. Each instruction costs no more than its own
    items: no key is a tuple, since these nest, and their hash may take forever."""
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
                    raise ValueError("it holds a name that is no text")
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "GLOBAL":
                asked = arg.replace(" ", ".")
                if asked != "collections.OrderedDict" and not asked.startswith("torch."):
                    raise ValueError(f"it asks for {asked:.80}, nothing of it was run")
                stack.append(asked)
            case "BINPERSID":
                _, kind, key, _, numel, *view = stack.pop()
                types = [type(part) for part in (kind, key, numel)]
                if types != [str, str, int] or any(view):
                    raise ValueError("it has storages of another kind, or parts of them")
                if kind not in _DTYPES:
                    known = ", ".join(str(dtype)[6:] for dtype in _DTYPES.values())
                    raise ValueError(f"it has a {kind:.80}, and the dtypes known are {known}")
                stack.append(row(key, _DTYPES[kind], numel))
            case "REDUCE":
                stack.append(_call(*take(-2)))
            case "BUILD":  # the versions of a module's parts
                stack.pop()
            case _:
                what = f"it has the pickle instruction {op.name} at byte {position}"
                raise ValueError(f"{what}, which no checkpoint needs; nothing of it was run")
    return stack.pop()


def _call(function: object, arguments: object) -> object:
    """What a function would return; of one that is not known, a tensor that holds nothing."""
    match function, arguments:
        case "collections.OrderedDict", ():
            return {}
        case "torch._utils._rebuild_parameter", (value, _, _):
            return value
        case "torch._utils._rebuild_tensor_v2", (Tensor() as of, offset, size, stride, _, _):
            return of.as_strided(size, stride, offset)  # an error if it is too short
    return torch.empty(0, device="meta")
