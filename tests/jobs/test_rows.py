"""Files of rows: one reader of JSON, JSON lines and Parquet, for jobs and for the command line."""

import json
import subprocess
import sys

import pytest
from helpers.goldens import ROOT

from microvllm.jobs import rows

ROWS = [{"prompt": "a", "n": 1}, {"prompt": "b\u2028c", "n": 2}]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet", "ROWS.JSONL"])
def test_the_formats_hold_the_same_rows(name, tmp_path):
    file = tmp_path / name
    if name.endswith(".parquet"):
        pyarrow = rows.import_pyarrow()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    elif name.endswith(".json"):
        file.write_text(json.dumps(ROWS), encoding="utf-8-sig")
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
        file.write_text("\n".join(lines), encoding="utf-8-sig")
    assert rows.read_rows(file) == ROWS
    assert [(number, rows.parse(raw)) for number, raw in rows.read(file)] == [*enumerate(ROWS, 1)]


def test_of_parquet_only_the_columns_that_are_wanted_are_read(tmp_path):
    pyarrow, file = rows.import_pyarrow(), tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    assert list(rows.read(file, ["n", "absent"])) == [(1, {"n": 1}), (2, {"n": 2})]


def test_a_line_that_is_no_row_is_found_when_it_is_parsed(tmp_path):
    """So that a job can name it and go on."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\n\n{"a"\n\xff\n"a"\n' + b"x" * rows.MAX_LINE + b"\n[2]")
    found = dict(rows.read(file))
    assert list(found) == [1, 3, 4, 5, 6, 7] and rows.parse(found[1]) == {"a": 1}
    said = {3: "not JSON", 4: "not UTF-8", 5: "expected an object", 6: f"{rows.MAX_LINE:,} bytes"}
    for number, words in said.items():
        with pytest.raises(ValueError, match=words):
            rows.parse(found[number])
    assert rows.decode(found[7]) == [2]
    with pytest.raises(ValueError, match=f"^{file}: line 3 is not JSON: "):
        rows.read_rows(file)


def test_a_damaged_parquet_file_is_named(tmp_path):
    pyarrow, file = rows.import_pyarrow(), tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS * 1000), file)
    whole = file.read_bytes()
    for damaged in (whole[:-9], whole[:100] + b"\xff" * 200 + whole[300:], b""):
        file.write_bytes(damaged)
        with pytest.raises(rows.UnreadableFile, match=f"^{file}: not a Parquet file"):
            rows.read_rows(file)
    with pytest.raises(FileNotFoundError, match="absent"):
        rows.read_rows(tmp_path / "absent.parquet")


def many_of_one_text(path, nested: bool):
    """A few hundred bytes in which 1,024 rows, or as many items of one row, are one text of 1.5
    MB."""
    pa = rows.import_pyarrow()
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 1024, "int32"), pa.array(["a" * 1500000]))
    if nested:
        items = pa.StructArray.from_arrays([texts, texts], ["role", "content"])
        texts = pa.ListArray.from_arrays(pa.array([0, 1024], "int32"), items)
    table = pa.table({"prompt": texts})
    pa.parquet.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 1000
    return path


@pytest.mark.parametrize("nested", [False, True])
def test_a_text_that_many_rows_of_parquet_name_is_there_once(nested, tmp_path):
    pytest.importorskip("resource")
    code = "import resource, sys; from microvllm.jobs import rows; rows.import_pyarrow()\n"
    code += "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    code += "before = peak(); found = [type(r).__name__ for _, r in rows.read(sys.argv[1])]\n"
    code += "print((peak() - before) // 1000, len(found), *set(found))"
    path = many_of_one_text(tmp_path / "rows.parquet", nested)
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True)
    megabytes, count, kind = done.stdout.decode().split()
    assert (count, kind) == (("1", "ValueError") if nested else ("1024", "dict"))
    assert int(megabytes) < 200


def test_pages_of_parquet_that_unfold_without_end_are_refused(tmp_path):
    pa, file = rows.import_pyarrow(), tmp_path / "rows.parquet"
    zeros = pa.nulls(40_000_000, "int64")
    lists = pa.ListArray.from_arrays(pa.array([0, len(zeros)], "int32"), zeros)
    pa.parquet.write_table(pa.table({"prompt": lists, "id": [1]}), file, compression="zstd")
    assert file.stat().st_size < 10000
    with pytest.raises(ValueError, match=f"^{file}: .*smaller row groups"):
        rows.read_rows(file)
    assert [row for _, row in rows.read(file, ["id"])] == [{"id": 1}], "it is not looked at"
    lie(file, varint(40_000_000), varint(4))
    with pytest.raises(ValueError, match=f"^{file}: .*smaller row groups"):
        rows.read_rows(file)


def varint(number: int) -> bytes:
    """A number as Thrift writes it."""
    number, parts = 2 * number, []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def lie(file, true: bytes, told: bytes, where: str = "footer") -> None:
    """Put other bytes into a Parquet file's footer, or as many of them into its pages."""
    data = file.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    pages, footer = data[:start], data[start:-8]
    if where == "footer":
        footer, before = footer.replace(true, told), footer
        assert footer != before
    else:
        assert true in pages and len(true) == len(told)
        pages = pages.replace(true, told, 1)
    file.write_bytes(pages + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def test_sizes_in_a_footer_of_parquet_are_not_believed(tmp_path, monkeypatch):
    pa, file = rows.import_pyarrow(), tmp_path / "rows.parquet"
    monkeypatch.setattr(rows, "MAX_UNFOLDED", 2**20)

    def write(column, **options):
        table = pa.table({"prompt": column})
        pa.parquet.write_table(table, file, compression="zstd", store_schema=False, **options)
        with open(file, "rb") as source:
            return rows._row_groups(source)[0][1][0]

    size = write(["a" * 3_000_000], write_statistics=False)[6]
    lie(file, varint(size), varint(1000))
    with pytest.raises(ValueError, match=f"^{file}: .* bytes expand to 3,000,0.*smaller row"):
        rows.read_rows(file)
    # a dictionary, for which there would be memory before it is read
    write(pa.array(range(12345)))
    assert len(rows.read_rows(file)) == 12345
    lie(file, varint(12345), varint(2**20 - 1), "pages")
    with pytest.raises(ValueError, match=f"^{file}: .*smaller row groups"):
        rows.read_rows(file)
    # endless rows, without reading a column
    write(pa.array(range(12345)))
    assert len([*rows.read(file, ["absent"])]) == 12345
    lie(file, varint(12345), varint(10**12))
    with pytest.raises(ValueError, match=f"^{file}: it claims 1,000,000,000,000 rows"):
        next(rows.read(file, ["absent"]))


def test_decimals_of_any_length_are_refused(tmp_path):
    """As texts of a dictionary are there once, but these are not read as a dictionary."""
    path = many_of_one_text(tmp_path / "rows.parquet", nested=False)
    # UTF8, STRING; DECIMAL of scale 0 and precision 9
    lie(path, b"\x25\x00\x4c\x1c\x00\x00\x00", b"\x25\x0a\x15\x00\x15\x12\x00")
    with pytest.raises(ValueError, match=f"^{path}: prompt has decimals of any length"):
        rows.read_rows(path)


def test_a_row_of_parquet_has_a_limit_as_a_line_has(tmp_path, monkeypatch):
    pa, file = rows.import_pyarrow(), tmp_path / "rows.parquet"
    row = {"text": "x" * 40, "list": [["y" * 20], ["z" * 20]], "none": None, "ids": [1, 2]}
    row |= {"struct": {"a": "x", "b": 1}, "map": [("key", "value"), ("other", None)]}
    kind = pa.map_(pa.string(), pa.string())
    table = pa.Table.from_pylist([row] * 5).drop_columns("map")
    table = table.append_column("map", pa.array([row["map"]] * 5, kind))
    table = table.set_column(0, "text", pa.array(["x" * 40, "x", "x" * 3000, "x" * 40, None]))
    pa.parquet.write_table(table, file)
    whole = [found for _, found in rows.read(file)]
    assert whole == table.to_pylist()
    monkeypatch.setattr(rows, "MAX_LINE", 1000)
    found = [found for _, found in rows.read(file)]
    assert isinstance(found[2], ValueError) and "longer than 1,000 bytes" in str(found[2])
    assert found[:2] + found[3:] == whole[:2] + whole[3:]
    with pytest.raises(ValueError, match="line 3 is longer than"):
        rows.read_rows(file)


def test_a_byte_order_mark_alone_is_a_line(tmp_path):
    """What a job can neither answer nor report would be lost."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf\n{"prompt": "a"}\n')
    (one, raw), two = rows.read(file)
    assert one == 1 and two[0] == 2 and rows.parse(two[1]) == {"prompt": "a"}
    with pytest.raises(ValueError, match="not JSON"):
        rows.parse(raw)


def test_a_name_is_imported_when_it_is_asked_for():
    code = "import sys; from microvllm import jobs; jobs.Ask, jobs.Job, jobs.answer, jobs.carry_out"
    code += "; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "microvllm.jobs.job" in done.stdout.split()
    assert not {"ray", "pyarrow", "torch", "microvllm.jobs.ray"} & set(done.stdout.split())
    from microvllm import jobs

    assert jobs.LLMPredictor.__module__ == "microvllm.jobs.ray"
    with pytest.raises(AttributeError, match="no attribute 'Jbo'"):
        jobs.Jbo  # noqa: B018


def test_a_damaged_footer_does_not_end_the_process(tmp_path):
    """pyarrow's own reader of a column's sizes aborts: each byte of a footer is changed here."""
    pa, file = rows.import_pyarrow(), tmp_path / "rows.parquet"
    pa.parquet.write_table(pa.table({"prompt": ["a", "b"]}), file)
    data = file.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    met = 0
    for at in range(start, len(data) - 8):
        for delta in (1, 16, 255):
            damaged = bytearray(data)
            damaged[at] = (damaged[at] + delta) % 256
            file.write_bytes(damaged)
            try:
                assert len(rows.read_rows(file)) <= 2
            except ValueError as error:
                assert str(error).startswith(f"{file}: ")
                met += 1
    assert met > 100
