"""torch.save's files: what torch reads is read, and what is more than its bytes is refused."""

import pickle
import resource
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch
from helpers.checkpoints import Checkpoint, refused
from helpers.goldens import ERAS, MODEL

from microvllm.loading import load_model
from microvllm.sources.strict import read_weights

BOTH = pytest.mark.parametrize("zipped", [True, False], ids=["archive", "old"])
FILES = sorted([*ERAS.rglob("model_*.pt"), *MODEL.glob("model_*.pt")])


@pytest.fixture
def checkpoint(tmp_path) -> Checkpoint:
    return Checkpoint(tmp_path)


@pytest.fixture(autouse=True)
def little_memory():
    """What a file of a few kilobytes takes, whatever it claims."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 400 << 10, f"{grown:,} KiB"


def refuse(checkpoint: Checkpoint, *words: str) -> None:
    with refused(ValueError, checkpoint.file, *words):
        load_model(checkpoint.directory)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.parent.parent.name)
@BOTH
def test_what_torch_reads_is_read_bit_for_bit(file, zipped, tmp_path):
    weights = torch.load(file, weights_only=True)
    if not zipped:
        file = tmp_path / "model.pt"
        torch.save(weights, file, _use_new_zipfile_serialization=False)
    ours = read_weights(file)
    assert list(ours) == [name.removeprefix("_orig_mod.") for name in weights]
    for weight, wanted in zip(ours.values(), weights.values(), strict=True):
        assert weight.dtype == wanted.dtype and weight.stride() == wanted.stride()
        assert torch.equal(weight, wanted)


@BOTH
def test_a_modules_state_dict_and_its_parameters(zipped, tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(torch.float64)
    transposed = {"a": torch.arange(12.0).view(3, 4).T, "b": torch.zeros(0, 3), "c": torch.ones(())}
    for kept in (module.state_dict(), dict(module.named_parameters()), transposed):
        torch.save(kept, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        found = read_weights(tmp_path / "a.pt")
        assert all(torch.equal(found[name], kept[name]) for name in kept)


# archives ----------------------------------------------------------------------------------------


def end_of(data: bytes) -> tuple[int, int, int]:
    """Where the directory of torch's archive begins, where it ends, where the last record is."""
    size, start = struct.unpack("<2L", data[-10:-2])
    return start, start + size, len(data) - 22


def two_directories(data: bytes) -> bytes:
    """Readers that go by the stated offset see the first, those that look before the end record
    the second."""
    start, stop, _ = end_of(data)
    return data[:stop] + data[start:stop] + data[stop:]


def another_end_record(data: bytes) -> bytes:
    """In 64 bits, and not where its locator says."""
    return data[:-98] + data[-98:-42] + data[-98:]


def twice(data: bytes, name: bytes) -> bytes:
    """The directory has its first record once more, with a name that ends so."""
    start, stop, _ = end_of(data)
    first = data[start : start + 46 + sum(struct.unpack("<3H", data[start + 28 : start + 34]))]
    body = data[:stop] + first.replace(b"data.pkl", name)
    count, size = struct.unpack("<H", data[-12:-10])[0] + 1, len(body) - start
    return body + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, start, 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data + b"PK\5\6",
        lambda data: data + data[-22:],
        lambda data: data + b"\0" * 22,
        lambda data: data[:-2] + b"\4\0more",  # a comment
        lambda data: data[:-1],
        lambda data: b"PK\3\4" + data,
        two_directories,
        another_end_record,
    ],
)
def test_an_archive_ends_with_its_one_end_record(checkpoint, change):
    """Or it would be checked as one file and read as another: 1.7 MB unfolded to 1.5 GB."""
    checkpoint.file.write_bytes(change(checkpoint.file.read_bytes()))
    refuse(checkpoint, "one end record")


@pytest.mark.parametrize("name", [b"data.pkl", b"data/999"], ids=["name", "place"])
def test_no_record_is_there_twice(checkpoint, name):
    checkpoint.file.write_bytes(twice(checkpoint.file.read_bytes(), name))
    refuse(checkpoint, "the same name or the same place")


def test_no_record_reaches_into_the_next(checkpoint):
    data = bytearray(checkpoint.file.read_bytes())
    start, _, _ = end_of(data)
    size = struct.unpack("<L", data[start + 24 : start + 28])[0] + 5000
    data[start + 20 : start + 28] = struct.pack("<2L", size, size)
    checkpoint.file.write_bytes(data)
    refuse(checkpoint, "overlaps the next one")


@pytest.mark.parametrize("name", ["data.pkl", "data/0", "version"])
def test_no_record_is_compressed(checkpoint, name):
    with zipfile.ZipFile(checkpoint.file) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    with zipfile.ZipFile(checkpoint.file, "w") as archive:
        for part, data in parts.items():
            archive.writestr(part, data, zipfile.ZIP_DEFLATED if part.endswith(name) else 0)
    refuse(checkpoint, "its records are compressed")


# pickles -----------------------------------------------------------------------------------------


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def with_program(checkpoint: Checkpoint, program: bytes, zipped: bool) -> None:
    """A checkpoint of that pickle."""
    if not zipped:
        torch.save({}, checkpoint.file, _use_new_zipfile_serialization=False)
        data = checkpoint.file.read_bytes()
        checkpoint.file.write_bytes(data.replace(pickle.dumps({}, 2), program, 1))
        return
    with zipfile.ZipFile(checkpoint.file) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    with zipfile.ZipFile(checkpoint.file, "w") as archive:
        for part, data in parts.items():
            archive.writestr(part, program if part.endswith("data.pkl") else data)


NEST = b")" + b"q\0h\0\x86" * 60  # 2**60 empty tuples, if they are hashed or shown
FLOATS, A = b"ctorch\nFloatStorage\n", b"X\1\0\0\0a"


@BOTH
@pytest.mark.parametrize(
    "program, words",
    [
        (pickle.dumps({"a": Call(bytearray, 2_000_000_000)}, 2), "bytearray"),
        (pickle.dumps({"a": Call(torch.Tensor, 2_000_000_000)}, 2), "era 1|0 rows|1 tensors"),
        (pickle.dumps({"a": Call(print, "run")}, 2), "print"),
        (pickle.dumps({"a": b"bytes"}, 2), "_codecs.encode"),
        (pickle.dumps({}, 4), "FRAME|pickle instruction"),
        (b"\x80\2}" + NEST + b"Ns.", "a name that is not a string"),
        (b"\x80\2}" + A + b"(N" + NEST + A + b"NK\1tQs.", "unsupported storages"),
        (b"\x80\2}" + A + b"(N" + FLOATS + NEST + b"NK\1tQs.", "unsupported storages"),
        (b"\x80\2}" + A + b"(N" + FLOATS + A + b"N" + NEST + b"tQs.", "unsupported storages"),
        (b"\x80\2" + b"}" * 300_000 + b".", "too large|exhausted"),
        (b"\x80\2" + NEST + b".", "no state dict"),
    ],
    ids=range(11),
)  # fmt: skip
def test_a_pickle_costs_no_more_than_its_bytes(checkpoint, program, words, zipped):
    with_program(checkpoint, program, zipped)
    with pytest.raises(ValueError, match=words) as error:
        load_model(checkpoint.directory)
    assert str(checkpoint.file) in str(error.value)


@BOTH
def test_a_storage_that_many_tensors_share(checkpoint, zipped):
    """4.3 MB became 2.9 GB, since every layer gets its own copy."""
    row = torch.zeros(1 << 18)
    weights = {f"transformer.h.{i}.mlp.c_fc.weight": row.view(512, 512) for i in range(200)}
    torch.save(weights, checkpoint.file, _use_new_zipfile_serialization=zipped)
    with refused(ValueError, checkpoint.file, "its tensors take 209,715,200 bytes", "has 1,0"):
        read_weights(checkpoint.file)
    tied = torch.randn(60, 50)
    torch.save({"a": tied, "b": tied}, checkpoint.file, _use_new_zipfile_serialization=zipped)
    with refused(ValueError, checkpoint.file, "24,000 bytes", "clone"):
        read_weights(checkpoint.file)


@BOTH
@pytest.mark.parametrize("numel", [b"K\x09", b"K\x07", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff"])
def test_a_storage_is_as_long_as_it_says(checkpoint, numel, zipped):
    torch.save({"a": torch.zeros(8)}, checkpoint.file, _use_new_zipfile_serialization=zipped)
    data = checkpoint.file.read_bytes()
    if zipped:
        with zipfile.ZipFile(checkpoint.file) as archive:
            (name,) = (part for part in archive.namelist() if part.endswith("data.pkl"))
            program = archive.read(name).replace(b"K\x08tq", numel + b"tq", 1)
        with_program(checkpoint, program, True)
    else:
        checkpoint.file.write_bytes(data.replace(b"K\x08Ntq", numel + b"Ntq", 1))
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        read_weights(checkpoint.file)


def test_an_attribute_of_a_dict_is_not_set(checkpoint):
    """A state dict whose `items` is no method."""
    weights = OrderedDict(checkpoint.weights)
    weights.xtems = torch.zeros(1)
    torch.save(weights, checkpoint.file)
    checkpoint.file.write_bytes(checkpoint.file.read_bytes().replace(b"xtems", b"items"))
    assert load_model(checkpoint.directory).config.n_layer == checkpoint.config["n_layer"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_another_layout_is_refused_by_name(checkpoint):
    layouts = {torch.strided: "not stored in full (lm_head.weight)", torch.jagged: "nothing in it"}
    for layout, words in layouts.items():
        rows = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=layout)
        torch.save(checkpoint.weights | {"lm_head.weight": rows}, checkpoint.file)
        refuse(checkpoint, words)


@pytest.mark.parametrize("kind", ["Int", "Bool", "ComplexFloat", "Byte"])
def test_a_dtype_that_no_checkpoint_has_is_refused_by_name(checkpoint, kind):
    dtypes = {"Int": torch.int32, "Bool": torch.bool, "ComplexFloat": torch.complex64}
    odd = torch.zeros(4).to(dtypes.get(kind, torch.uint8))
    torch.save(checkpoint.weights | {"lm_head.weight": odd}, checkpoint.file)
    refuse(checkpoint, f"it has a torch.{kind}Storage, and the dtypes known are float32, bfloat16")
