"""Files of rows: one reader of JSON, JSON lines and Parquet, for jobs and for the command line."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

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
