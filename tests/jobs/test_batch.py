"""Bulk jobs: every row is answered once, with the same tokens, however often the job is killed.

Twenty kills each are of a job whose engine is a stand-in, in a child process; two are of the whole
command with its real engine, which takes seconds to start.
"""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from helpers.full_engines import TOOL_GOLDENS as GOLDENS
from helpers.full_engines import chain
from helpers.goldens import MODEL, ROOT

from microvllm import LLM, SamplingParams, cli
from microvllm.features.tools import Tool
from microvllm.jobs import Ask, Job, answer, carry_out
from microvllm.jobs.rows import MAX_LINE

sys.path.insert(0, str(ROOT / "benchmarks"))

from bulk import FakeLLM, memory_curve

pytestmark = pytest.mark.usefixtures("one_thread")
PARAMS = {"max_tokens": 4}


def write(path: Path, rows: list) -> Path:
    """Rows as JSON lines; bytes as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def read(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(source: Path, output: Path, ordered=False, llm=None, settings=None, **ask) -> dict:
    """A whole job, by the stand-in unless an engine is given."""
    job = Job(source, output, Ask(**{"params": PARAMS, **ask}), settings or {})
    return carry_out(job, answer(llm or FakeLLM(), job.pending(), job.ask), ordered)


def errors(output: Path) -> dict[int, str]:
    return {row["line"]: row["error"] for row in read(Path(f"{output}.errors"))}


def texts(count: int, **more) -> list[dict]:
    return [{"id": f"row {i}", "prompt": f"prompt {i}", **more} for i in range(count)]


# killed -------------------------------------------------------------------------------------------


def killed(source: Path, output: Path, ordered: bool, delay: float) -> int:
    """Run the job in a child and kill it `delay` seconds after its first new answer. Returns how
    many bytes of answers there are then."""
    journal = output if output.suffix == ".jsonl" else Path(f"{output}.journal")
    before = journal.stat().st_size if journal.exists() else 0
    child = os.fork()
    if child == 0:
        try:
            run(source, output, ordered, FakeLLM(seconds=0.001))
        finally:
            os._exit(0)
    # the line that was cut goes first
    while not journal.exists() or journal.stat().st_size <= before:
        time.sleep(0.0005)
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            raise AssertionError("the job ended before it was killed")
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the job ended before it was killed"
    return journal.stat().st_size


@pytest.mark.parametrize("name", [
    "out.jsonl", pytest.param("ordered.jsonl", marks=pytest.mark.slow),
    pytest.param("out.parquet", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_job_killed_twenty_times_has_each_row_once_and_the_same_tokens(name, tmp_path):
    rows = texts(2000)
    for i in range(100, 2000, 100):
        rows[i]["prompt"] = "far too long " * 100
    source, ordered = write(tmp_path / "in.jsonl", rows), name.startswith("ordered")
    whole = tmp_path / f"whole-{name}"
    assert run(source, whole, ordered)["bad"] == 19
    output, sizes = tmp_path / name, set()
    for _ in range(20):
        sizes.add(killed(source, output, ordered, random.uniform(0, 0.01)))
    assert len(sizes) == 20
    found = run(source, output, ordered)
    assert found["bad"] == 19 and 0 < found["answered_before"] < 2000
    if ordered:
        assert output.read_bytes() == whole.read_bytes()
    by_line = {row["line"]: row for row in read(output)}
    assert by_line == {row["line"]: row for row in read(whole)}
    assert len(read(output)) == len(by_line) == 2000 - 19
    assert Counter(errors(output)) == Counter(errors(whole))
    assert len(read(Path(f"{output}.errors"))) == 19


@pytest.mark.slow
def test_the_command_killed_with_its_real_engine_gives_the_same_tokens(tmp_path, capsys):
    questions = json.loads((ROOT / "models" / "prompts" / "oldbooks_instructions.json").read_text())
    rows = [{"prompt": q["instruction"], "id": i} for i, q in enumerate(questions[:60])]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    flags = ["batch", str(source), "--num-blocks", "60", "--max-batch-size", "4"]
    flags += ["--max-tokens", "40", "--ordered", "-o"]
    for size in random.Random().sample(range(300, 4000), 2):
        job = subprocess.Popen([sys.executable, "-m", "microvllm", *flags, output], cwd=ROOT)
        before = output.stat().st_size if output.exists() else 0
        while not output.exists() or output.stat().st_size < before + size:
            assert job.poll() is None
            time.sleep(0.002)
        job.kill()
        job.wait()
    for path in (output, tmp_path / "whole.jsonl"):
        with pytest.raises(SystemExit) as stop:
            cli.main([*flags, str(path)])
        assert stop.value.code == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [row["id"] for row in read(output)] == list(range(60))
    capsys.readouterr()
    for flag in ("--deterministic", "--raw"):  # either may give other tokens
        with pytest.raises(SystemExit) as stop:
            cli.main([*flags, str(output), flag])
        assert stop.value.code == 2
        assert f"started with {flag}=False, not True" in capsys.readouterr().err


def test_wherever_the_last_write_was_torn_the_job_goes_on(tmp_path):
    source, output = write(tmp_path / "in.jsonl", texts(20)), tmp_path / "out.jsonl"
    run(source, output, ordered=True)
    whole = output.read_bytes()
    for size in [*range(1, 120, 3), len(whole) - 1]:
        output.write_bytes(whole[:size])
        found = run(source, output, ordered=True)
        assert found["answered_before"] == whole[:size].count(b"\n")
        assert output.read_bytes() == whole


def test_a_kill_while_the_output_is_put_in_order_costs_nothing(tmp_path, monkeypatch):
    source = write(tmp_path / "in.jsonl", texts(50))
    run(source, tmp_path / "whole.parquet", ordered=True)
    for where in ("replace", "unlink"):
        output = tmp_path / f"{where}.parquet"
        with monkeypatch.context() as patch:
            patch.setattr(os if where == "replace" else Path, where, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(source, output)
        assert run(source, output, ordered=True)["answered_before"] == 50
        assert read(output) == read(tmp_path / "whole.parquet")
        assert run(source, output)["answered_before"] == 50  # nothing is left to do
        assert sorted(p.name for p in tmp_path.glob(f"{where}*")) == [
            f"{where}.parquet", f"{where}.parquet.job",
        ]  # fmt: skip


# rows ---------------------------------------------------------------------------------------------


def test_a_bad_row_is_named_with_its_line_and_the_others_are_answered(tmp_path):
    rows = [
        b'\xef\xbb\xbf{"prompt": "behind a byte order mark"}\r',
        b"",
        b"  \r",
        {"prompt": "fine", "id": "twice", "params": {"max_tokens": 2}},
        {"prompt": "not fine", "id": "twice"},
        b'{"prompt": ',
        b'{"prompt": "\xff"}',
        b'["a", "list"]',
        {"question": "?"},
        {"prompt": 7},
        {"prompt": "a", "params": {"temprature": 1}},
        {"prompt": "b", "params": {"temperature": -1}},
        {"prompt": "c", "params": "hot"},
        {"prompt": "d", "params": {"logits_processor": "rm"}},
        {"prompt": "e" * 1001},
        {"prompt": "f", "id": 1.5},
        b'{"prompt": "' + b"g" * MAX_LINE + b'"}',
        b'{"prompt": "h", "id": "\\ud800"}',
        b"[" * 100000,
        {"prompt": [{"role": "user", "content": "a model without chat"}]},
        {"prompt": "the last, without an end of its line"},
    ]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    source.write_bytes(source.read_bytes()[:-1])
    found = run(source, output)
    assert [(row["line"], row["id"]) for row in sorted(read(output), key=lambda r: r["line"])] == [
        (1, 1), (4, "twice"), (21, 21),
    ]  # fmt: skip
    told = errors(output)
    assert sorted(told) == list(range(5, 21)) and found["bad"] == 16 and found["rows"] == 19
    named = {5: "'twice'", 6: "JSON", 7: "UTF-8", 8: "list", 9: "question", 11: "'temprature'"}
    named |= {12: "temperature", 13: "'hot'", 14: "'logits_processor'", 15: "max_model_len"}
    named |= {16: "1.5", 17: f"{MAX_LINE:,}", 18: "surrogates", 19: "JSON", 20: "chat"}
    for line, word in named.items():
        assert word in told[line], told[line]


ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
COSTLY = {"type": "integer", "multipleOf": 999_983}


@pytest.mark.parametrize(
    "schema, told",
    [
        (ENDLESS, "the guide is too complex here"),
        pytest.param(COSTLY, "it takes more than 1 s", marks=pytest.mark.slow),
    ],
)
def test_a_row_whose_guide_has_no_end_is_reported_and_the_job_goes_on(schema, told, tmp_path):
    """At the first start, which ends before all rows are done, and at the next ones."""
    pytest.importorskip("llguidance")
    bad = {"prompt": "b", "params": {"guide": {"json": schema}, "max_tokens": 60}}
    rows = [bad, *texts(3), bad, *texts(6)[3:]]
    rows = [row | {"id": i} for i, row in enumerate(rows)]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    ask = Ask(params={"max_tokens": 3})
    with LLM(MODEL, num_blocks=60, max_batch_size=2, device="cpu", plain=True) as llm:
        job = Job(source, output, ask, {})
        outcomes = answer(llm, job.pending(), ask)
        assert [job.write(outcome) for outcome in islice(outcomes, 4)] == [True] * 4
        outcomes.close()
        job.close()
        begun = errors(output)
        for _ in range(2):
            job = Job(source, output, ask, {})
            assert carry_out(job, answer(llm, job.pending(), ask))["bad"] == 2
    assert begun.keys() <= errors(output).keys() == {1, 5}
    assert all(told in error for error in errors(output).values())
    assert sorted(row["id"] for row in read(output)) == [1, 2, 3, 5, 6, 7]


def test_a_rows_own_parameters_go_before_the_jobs(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "a", "params": {"max_tokens": 7, "n": 2, "seed": None}}]
    rows += [{"prompt": "a", "params": {"seed": 5}}] * 2
    first, second, *same = (run_rows(tmp_path, rows)[i] for i in range(4))
    assert (len(first["token_ids"]), len(second["token_ids"]), len(second["samples"])) == (4, 7, 2)
    assert first["token_ids"] != second["token_ids"][:4], "rows have seeds of their own"
    assert same[0]["token_ids"] == same[1]["token_ids"] != first["token_ids"]


def run_rows(folder: Path, rows: list[dict], **options) -> list[dict]:
    source, output = write(folder / "rows.jsonl", rows), folder / "rows-out.jsonl"
    run(source, output, ordered=True, **options)
    return read(output)


def test_a_rows_tokens_follow_its_id_not_its_place(tmp_path):
    rows = texts(30)
    for name in "ab":
        (tmp_path / name).mkdir()
    first = {row["id"]: row["token_ids"] for row in run_rows(tmp_path / "a", rows)}
    again = {row["id"]: row["token_ids"] for row in run_rows(tmp_path / "b", rows[::-1])}
    assert first == again and len(set(map(str, first.values()))) == 30


def test_parquet_in_and_out_with_columns_by_other_names(tmp_path):
    import pyarrow
    import pyarrow.parquet

    source = tmp_path / "in.parquet"
    rows = [
        {"key": i, "text": f"prompt {i}", "own": {"max_tokens": 1 + i % 3}} for i in range(3000)
    ]
    rows[7]["text"], rows[8]["own"] = None, None
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    columns = {"prompt_column": "text", "id_column": "key", "params_column": "own"}
    output = tmp_path / "out.parquet"
    assert run(source, output, ordered=True, **columns)["bad"] == 1
    found = read(output)
    assert [row["id"] for row in found] == [i for i in range(3000) if i != 7]
    assert [len(row["token_ids"]) for row in found[:8]] == [1, 2, 3, 1, 2, 3, 1, 4]
    assert list(errors(output)) == [8]  # the first row is 1
    with pytest.raises(ValueError, match="no row has 'prompt'"):
        run(source, tmp_path / "other.parquet")


def test_messages_token_ids_and_scores_through_a_real_engine(tmp_path):
    asked = [{"role": "user", "content": "Who wrote Dracula?"}]
    with LLM(MODEL, num_blocks=60, device="cpu") as llm:
        ids = llm.tokenizer.render_for_completion(asked)
        wanted = llm.generate([ids], SamplingParams(temperature=0, max_tokens=8))[0]
        rows = [{"prompt": prompt} for prompt in (asked, asked[0]["content"], ids)]
        greedy = {"temperature": 0, "max_tokens": 8}
        for row in run_rows(tmp_path, rows, llm=llm, params=greedy):
            assert row["token_ids"] == wanted.token_ids and row["text"] == wanted.text
        (tmp_path / "score").mkdir()
        tails = [" Bram Stoker", " Mark Twain"]
        rows = [{"prompt": asked, "continuation": tails}, {"prompt": "", "continuation": ""}]
        rows += [{"prompt": "It was", "continuation": " the best of times"}]
        found = run_rows(tmp_path / "score", rows, llm=llm, task="score")
        expected = llm.score([ids] * 2, tails)
        assert [c["logprobs"] for c in found[0]["continuations"]] == [
            pytest.approx(scores, abs=1e-4) for scores in expected
        ]
        assert len(found) == 2 and list(errors(tmp_path / "score" / "rows-out.jsonl")) == [2]
        assert llm.is_finished()
        stop = {"prompt": "x", "params": {"allowed_token_ids": [5], "bad_words": [[5]]}}
        source = write(tmp_path / "none.jsonl", [stop])
        assert run(source, tmp_path / "none-out.jsonl", llm=llm)["bad"] == 1
        assert "no token is left" in errors(tmp_path / "none-out.jsonl")[1]


def test_no_more_rows_are_taken_than_keep_the_engine_full(tmp_path):
    taken, llm = [], FakeLLM(max_batch_size=8)

    def rows():
        for i in range(1, 1001):
            taken.append(i)
            yield i, {"prompt": "x"}

    for done, _ in enumerate(answer(llm, rows(), Ask(params=PARAMS)), 1):
        assert len(taken) - done <= 16


# files --------------------------------------------------------------------------------------------


def test_another_jobs_output_is_refused_with_the_remedy(tmp_path):
    source, output = write(tmp_path / "in.jsonl", texts(5)), tmp_path / "out.jsonl"
    run(source, output, settings={"model": "d6"})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match=r"started with model='d6', not 'd20'.*rm -f .*out.jsonl.job"
    ):
        run(source, output, settings={"model": "d20"})
    write(source, texts(6))
    with pytest.raises(ValueError, match="started with input="):
        run(source, output, settings={"model": "d6"})
    write(source, texts(5))
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    output.write_text(output.read_text() + output.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="line 6: not a line of this job"):
        run(source, output, settings={"model": "d6"})
    Path(f"{output}.job").unlink()
    with pytest.raises(ValueError, match="not this job's"):
        run(source, output, settings={"model": "d6"})
    with pytest.raises(ValueError, match="is the input"):
        run(source, source)


def test_two_processes_cannot_write_one_output(tmp_path):
    source, output = write(tmp_path / "in.jsonl", texts(5)), tmp_path / "out.jsonl"
    job = Job(source, output, Ask(params=PARAMS), {})
    with pytest.raises(ValueError, match="another process"):
        run(source, output)
    job.settings_file.close()
    run(source, output)


def test_a_job_begun_with_nothing_written_may_be_begun_otherwise(tmp_path):
    source, output = write(tmp_path / "in.jsonl", texts(5)), tmp_path / "out.jsonl"
    Job(source, output, Ask(), {"model": "d6"}).settings_file.close()
    assert run(source, output, settings={"model": "d20"})["rows"] == 5


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_files_that_are_not_the_jobs_are_left_as_they_are(name, tmp_path):
    source = write(tmp_path / "in.jsonl", texts(5))
    for suffix in (".job", ".errors", ".journal" if name.endswith("parquet") else "", ".tmp"):
        folder = tmp_path / f"with{suffix}"
        folder.mkdir()
        other = folder / f"{name}{suffix}"
        for content in (b'{"thesis": "the only copy"}\n', b"no newline at its end"):
            other.write_bytes(content)
            if suffix == ".tmp":  # which is not the name that a job takes
                run(source, folder / name, ordered=True)
                for path in set(folder.iterdir()) - {other}:
                    path.unlink()
            else:
                with pytest.raises(ValueError, match=f"{other} .*give another output"):
                    run(source, folder / name)
            assert other.read_bytes() == content and [*folder.iterdir()] == [other]


def test_a_file_that_comes_up_while_a_job_runs_is_kept(tmp_path):
    source, output = write(tmp_path / "in.jsonl", texts(5)), tmp_path / "out.parquet"
    job = Job(source, output, Ask(params=PARAMS), {})
    for path in (job.journal, job.output):
        path.write_bytes(b"another's")
        with pytest.raises(FileExistsError, match=f"{path} is not this job's"):
            carry_out(job, answer(FakeLLM(), job.pending(), job.ask))
        assert path.read_bytes() == b"another's"
        path.unlink()
    carry_out(job, answer(FakeLLM(), job.pending(), job.ask))
    assert len(read(output)) == 5


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
@pytest.mark.parametrize("there", [True, False])
def test_no_link_is_followed(name, there, tmp_path):
    source, other = write(tmp_path / "in.jsonl", texts(5)), tmp_path / "other.jsonl"
    if there:
        other.write_bytes(b"")
    for suffix in ("", ".job", ".errors", ".journal"):
        if name.endswith("l") and suffix == ".journal":
            continue
        link = tmp_path / f"{name}{suffix}"
        link.symlink_to(other)
        with pytest.raises(ValueError, match=f"{link} is a link"):
            run(source, tmp_path / name)
        assert (other.read_bytes() if there else other.exists()) in (b"", False)
        link.unlink()
    with pytest.raises(ValueError, match="is a link, or not a file"):
        (tmp_path / f"{name}.errors").mkdir()
        run(source, tmp_path / name)


def test_a_link_that_is_made_after_the_check_is_not_followed_either(tmp_path, monkeypatch):
    source, output = write(tmp_path / "in.jsonl", texts(5)), tmp_path / "out.jsonl"
    job = Job(source, output, Ask(params=PARAMS), {})
    output.symlink_to(tmp_path / "other.jsonl")
    with pytest.raises(OSError, match="out.jsonl"):
        carry_out(job, answer(FakeLLM(), job.pending(), job.ask))
    assert not (tmp_path / "other.jsonl").exists()


def test_two_outputs_that_are_one_file_are_one_jobs_at_a_time(tmp_path):
    source, (one, two) = write(tmp_path / "in.jsonl", texts(5)), (tmp_path / n for n in "ab")
    first, second = (
        Job(source, path.with_suffix(".jsonl"), Ask(params=PARAMS), {}) for path in (one, two)
    )
    outcomes = [*answer(FakeLLM(), first.pending(), first.ask)]
    first.write(outcomes[0])
    os.link(first.output, second.output)
    with pytest.raises(ValueError, match="another process"):
        second.write(outcomes[1])


def test_a_line_that_was_cut_is_not_taken_for_an_answer(tmp_path):
    source, output = write(tmp_path / "in.jsonl", texts(20)), tmp_path / "out.jsonl"
    run(source, output, ordered=True)
    lines = (whole := output.read_bytes()).splitlines(True)
    last = lines[-1]
    for torn in (
        last[:60] + b"\n",
        last[:60] + b"\0" * 50,
        b"\0" * 50,
        last[:40] + last,
        last[:-1],
    ):
        output.write_bytes(b"".join(lines[:-1]) + torn)
        assert run(source, output, ordered=True)["answered_before"] == 19
        assert output.read_bytes() == whole
    # not at the end, or by another hand: nothing is dropped
    other = b'{"line": 20, "id": "row 19", "text": "by hand"}\n'
    for at, line in [(4, lines[4][:60] + b"\n"), (4, b"\n"), (19, other), (19, b"a last word")]:
        damaged = b"".join([*lines[:at], line, *lines[at + 1 :]])
        output.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"line {at + 1}: not a line of this job, or damaged"):
            run(source, output, ordered=True)
        assert output.read_bytes() == damaged
        output.write_bytes(b"".join([*lines[:at], *lines[at + 1 :]]))  # as the error says
        assert run(source, output, ordered=True)["answered_before"] == 19
        assert output.read_bytes() == whole
    for at in range(0, len(whole) - len(last), 7):  # any other byte is noticed
        output.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="not a line of this job"):
            run(source, output, ordered=True)


def test_a_job_of_an_earlier_version_is_told_so(tmp_path):
    source, output = write(tmp_path / "in.jsonl", texts(5)), tmp_path / "out.jsonl"
    run(source, output)
    book = Path(f"{output}.job")
    book.write_text(book.read_text().replace('"microvllm job": 2, ', ""))
    with pytest.raises(ValueError, match=r"out.jsonl.job exists.*earlier ones wrote no check"):
        run(source, output)


def test_the_folder_has_the_new_name_before_the_old_file_goes(tmp_path, monkeypatch):
    source, output, done = write(tmp_path / "in.jsonl", texts(5)), tmp_path / "out.parquet", []
    replace, unlink, fsync = os.replace, Path.unlink, os.fsync

    def synced(number: int) -> None:
        folder = os.path.samestat(os.fstat(number), os.stat(tmp_path))
        done.append("sync folder" if folder else "sync")
        fsync(number)

    monkeypatch.setattr(os, "replace", lambda *a: (done.append("rename"), replace(*a)))
    monkeypatch.setattr(Path, "unlink", lambda *a: (done.append("unlink"), unlink(*a)))
    monkeypatch.setattr(os, "fsync", synced)
    run(source, output)
    named, gone = done.index("rename"), done.index("unlink")
    assert done[named - 1] == "sync" and "sync folder" in done[named:gone]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_rows(tmp_path):
    told = tmp_path / "curve.json"
    if (child := os.fork()) == 0:  # a process whose memory is its own, with torch imported
        try:
            told.write_text(json.dumps(memory_curve(20000, tmp_path / "out.jsonl")))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    at = dict(json.loads(told.read_text())[2:-1])
    assert max(at) == 20000 and len(at) == 20
    assert at[20000] - at[5000] < 2, "MB, for 15,000 more rows"


# the command --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["absent.jsonl", "-o", "out.jsonl"], "absent.jsonl"),
        (["{rows}", "-o", "out.txt"], ".parquet"),
        (["{rows}", "-o", "no/such/place/out.jsonl"], "no/such/place"),
        (["{rows}", "-o", "{rows}"], "is the input"),
        (["{rows}", "-o", "{out}", "--prompt-column", "question"], "'question'"),
        (["{rows}", "-o", "{out}", "--temperature", "-1"], "temperature"),
        (["{rows}", "-o", "{out}", "-m", "no/such/place"], "no/such/place"),
        (["{rows}", "-o", "{out}", "--num-blocks", "1"], ": --num-blocks must"),
        (["{rows}", "-o", "{out}", "--task", "chat", "--raw", "--num-blocks", "40"], "completion"),
        (["{rows}", "-o", "{out}", "--ray", "auto", "--trace", "t.jsonl"], "--trace"),
        (["{rows}", "-o", "{out}", "--replicas", "2"], "--ray"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, named, tmp_path, capsys):
    rows, out = write(tmp_path / "in.jsonl", texts(2)), tmp_path / "out.jsonl"
    with pytest.raises(SystemExit) as stop:
        cli.main(["batch", *[flag.format(rows=rows, out=out) for flag in flags]])
    told = capsys.readouterr()
    assert stop.value.code == 2 and told.out == "" and told.err.count("\n") == 1
    assert named in told.err and not out.exists()


def test_the_bar_shows_rate_eta_hits_and_bad_rows(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    source = write(tmp_path / "in.jsonl", [*texts(300), {"prompt": 1}])
    job = Job(source, tmp_path / "out.jsonl", Ask(params=PARAMS), {})
    carry_out(job, answer(FakeLLM(seconds=0.005), job.pending(), job.ask))
    shown = sys.stderr.getvalue()
    for part in ("301", "row/s", "tokens/s", "% cached", "1 bad", "<00:0"):
        assert part in shown, shown[-300:]


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_row_lists_what_the_calculator_was_asked(name, tmp_path):
    run_of = next(r for r in GOLDENS["runs"] if 0 in r["masks"])
    rows = [{"prompt": run_of["messages"]}, {"prompt": run_of["messages"], "params": {"n": 2}}]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / name
    with chain() as llm:
        run(source, output, ordered=True, llm=llm, params={"temperature": 0, "max_tokens": 60})
    called = [{"call": "7*6", "result": "42"}]
    one, two = read(output)
    assert one["tool_calls"] == called
    assert [sample["tool_calls"] for sample in two["samples"]] == [called] * 2


def test_a_job_may_have_tools_of_its_own(tmp_path):
    messages = next(r["messages"] for r in GOLDENS["runs"] if 0 in r["masks"])
    source = write(tmp_path / "in.jsonl", [{"prompt": messages}])
    job = Job(source, tmp_path / "out.jsonl", Ask(params={"temperature": 0}), {})
    with chain() as llm:
        tools = [Tool(name="echo", function=str.upper)]
        carry_out(job, answer(llm, job.pending(), job.ask, tools=tools))
    (row,) = read(job.output)
    assert row["tool_calls"] == [{"call": "7*6", "result": "7*6", "tool": "echo"}]
