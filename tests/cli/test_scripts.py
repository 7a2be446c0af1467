"""The scripts as a newcomer meets them, and the commands that the README promises."""

import http.server
import json
import re
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

import run
import test_alpaca
from microvllm.cli import bench
from microvllm.sources import hub

ROOT = Path(__file__).resolve().parents[2]

ROWS = [
    {"instruction": "Who wrote Moby Dick?", "input": "", "output": "Herman Melville"},
    {"instruction": "Continue:", "input": "It was\u2028a dark night", "output": ""},
    {"instruction": "What is 2+2?"},
]
PROMPTS = ["Who wrote Moby Dick?", "Continue:\n\nIt was\u2028a dark night", "What is 2+2?"]


pytestmark = pytest.mark.usefixtures("one_thread")


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """A Python process of its own, in a directory that is not the project's."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def mistake(module: types.ModuleType, capsys, monkeypatch, *flags: str) -> str:
    """The one line that a script says to a mistake, having left with exit status 2."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *flags])
    with pytest.raises(SystemExit) as stop:
        module.main()
    line = capsys.readouterr().err
    assert stop.value.code == 2
    assert line.startswith(f"{module.__name__}.py: error: ")
    assert line.index("\n") == len(line) - 1
    return line


def write(path: Path, rows: list) -> Path:
    """An Alpaca-format file of these rows, in the format that its name tells."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("\n".join(lines), encoding="utf-8")  # blank lines between them
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path


# the README and CI --------------------------------------------------------------------------------


def test_ci_runs_the_commands_of_the_readme():
    block = re.search(r"^```\w*\n(.+?)^```", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    commands = [line for line in block.splitlines() if line.startswith("pip ")]
    steps = re.findall(r'^step "(.*)"$', (ROOT / ".ci" / "run").read_text(), re.M)
    assert len(commands) == 2
    assert steps[:2] == commands


# both scripts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["run.py", "test_alpaca.py"])
def test_help_does_not_wait_for_torch(script, tmp_path):
    process = python("-X", "importtime", str(ROOT / script), "--help", cwd=tmp_path)
    assert process.returncode == 0 and "--max-batch-size" in process.stdout
    imported = {line.split("|")[-1].strip() for line in process.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "numpy", "numba"}


@pytest.mark.parametrize("module", [run, test_alpaca])
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model-dir", "no/such/place"], "no/such/place"),
        (["--tokenizer-dir", "no/such/place"], "no/such/place"),
        (["--step", "7"], "7"),
        (["--device", "abacus"], "abacus"),
        (["--max-tokens", "0"], ": --max-tokens must"),
        (["--max-tokens", "many"], "--max-tokens"),
        (["--temperature", "-1"], ": --temperature must"),
        (["--temperature", "nan"], ": --temperature must"),
        (["--top-k", "-1"], ": --top-k must"),
        (["--num-blocks", "0"], ": --num-blocks must"),
        (["--num-blocks", "2"], "block"),  # one of them the null block: no prompt fits
        (["--max-batch-size", "0"], ": --max-batch-size must"),
        (["--seed", "-1"], ": --seed must"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(module, flags, named, capsys, monkeypatch):
    assert named in mistake(module, capsys, monkeypatch, *flags)


def test_a_mistake_leaves_no_traceback(tmp_path):
    process = python(str(ROOT / "run.py"), "--model-dir", "nowhere", cwd=tmp_path)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.count("\n") == 1 and "nowhere" in process.stderr


# run.py -------------------------------------------------------------------------------------------


def test_run_answers_its_sample_questions_without_arguments(tmp_path):
    process = python(str(ROOT / "run.py"), cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert [line[2:] for line in lines if line.startswith("> ")] == list(run.QUESTIONS)
    assert re.fullmatch(r"5 prompts, \d+ tokens in [\d.]+ s: \d+ tokens/s", lines[-1])


def ask(capsys, monkeypatch, *flags: str) -> str:
    monkeypatch.setattr(sys, "argv", ["run.py", "--num-blocks", "32", *flags])
    run.main()
    return capsys.readouterr().out


def test_run_asks_in_chat_form(capsys, monkeypatch):
    questions = ["--prompt", "Who wrote Moby Dick?", "--prompt", "What is the capital of France?"]
    out = ask(capsys, monkeypatch, *questions, "--temperature", "0")
    first, second, last = out.strip().split("\n\n")
    assert first.startswith("> Who wrote Moby Dick?\n") and "Herman Melville" in first
    assert second.startswith("> What is the capital of France?\n") and "Paris" in second
    assert last.startswith("2 prompts, ")
    assert "[cut at" not in out


def test_run_says_where_an_answer_was_cut(capsys, monkeypatch):
    flags = ["--prompt", "Tell me a story.", "--max-tokens", "5", "--ignore-eos"]
    assert "  [cut at 5 tokens]\n" in ask(capsys, monkeypatch, *flags)


def test_run_completes_plain_text_when_raw(capsys, monkeypatch):
    out = ask(capsys, monkeypatch, "--raw", "--prompt", "It was a dark", "--max-tokens", "8")
    assert out.startswith("It was a dark") and not out.startswith("It was a dark\n")
    assert ">" not in out


def test_run_repeats_itself_with_the_same_seed_only(capsys, monkeypatch):
    def story(seed: str) -> str:
        flags = ["--prompt", "Tell me a story.", "--max-tokens", "30", "--temperature", "1"]
        return ask(capsys, monkeypatch, *flags, "--seed", seed).rsplit("\n\n", 1)[0]

    assert story("1") == story("1") != story("2")


# test_alpaca.py -----------------------------------------------------------------------------------


def test_alpaca_prints_the_results_for_people_or_as_json(tmp_path):
    file = write(tmp_path / "rows.jsonl", ROWS * 2)
    flags = ["--prompts-file", str(file), "--num-prompts", "5", "--max-tokens", "4", "--ignore-eos"]
    process = python(str(ROOT / "test_alpaca.py"), *flags, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[0] == f"5 prompts from {file}"
    shown = dict(line.split(": ", 1) for line in lines if ": " in line)
    assert list(shown) == [
        "Load",
        "Warm-up",
        "Total prompts",
        "Total output tokens",
        "Total time",
        "Throughput",
        "Time to first token",
        "Time between tokens",
        "Prefill",
        "Decode",
        "Prefix-cache hits",
        "Preemptions",
        "KV blocks used at peak",
    ]
    assert "Latency" not in process.stdout and "{" not in process.stdout
    assert shown["Total prompts"] == "5" and shown["Total output tokens"] == "20"
    assert shown["Preemptions"] == "0" and shown["Decode"].startswith("15 tokens in ")

    process = python(str(ROOT / "test_alpaca.py"), *flags, "--json", cwd=tmp_path)
    result = json.loads(process.stdout)  # and nothing else
    assert result["total_prompts"] == 5 and result["decode_tokens"] == 15
    assert "seconds_per_request" not in result
    # the seconds are rounded to milliseconds
    low, high = result["total_seconds"] - 0.0006, result["total_seconds"] + 0.0006
    assert 20 / high - 0.1 <= result["tokens_per_second"] <= 20 / low + 0.1
    # rows 4 and 5 repeat rows 1 and 2: what is computed and what is found add up to the prompts
    assert result["cached_tokens"] + result["prefill_tokens"] == result["prompt_tokens"]
    assert 0 < result["peak_blocks"] < result["num_blocks"]


def test_alpaca_asks_in_chat_form_unless_raw(tmp_path, capsys, monkeypatch):
    file = write(tmp_path / "rows.json", ROWS[:1])

    def prompt_tokens(*flags: str) -> int:
        arguments = ["test_alpaca.py", "--prompts-file", str(file), "--max-tokens", "1", "--json"]
        monkeypatch.setattr(sys, "argv", [*arguments, "--num-blocks", "32", *flags])
        test_alpaca.main()
        return json.loads(capsys.readouterr().out)["prompt_tokens"]

    # both begin with bos; chat adds user_start, user_end and assistant_start
    assert prompt_tokens() == prompt_tokens("--raw") + 3


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_alpaca_reads_each_format(suffix, tmp_path):
    # Parquet fills the fields that a row lacks with nulls
    assert bench.read_prompts(write(tmp_path / f"rows{suffix}", ROWS)) == PROMPTS


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", '[{"instruction": "x"}', "not JSON"),
        ("a.json", '{"instruction": "x"}', "expected a list"),
        ("a.json", "[]", "no rows"),
        ("a.json", '[{"instruction": "x"}, {"input": "y"}]', "row 2: 'instruction'"),
        ("a.json", '[{"instruction": "x"}, {"instruction": " "}]', "row 2: 'instruction'"),
        ("a.json", '[{"instruction": "x", "input": 3}]', "row 1: 'input'"),
        ("a.json", '["x"]', "row 1: expected an object"),
        ("a.json", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", '{"instruction": "x"}\n{"instruction"\n', "line 2 is not JSON"),
        ("a.jsonl", '{"instruction": "x"}\n\n{"input": ""}\n', "row 2: 'instruction'"),
        ("a.jsonl", "\n", "no rows"),
        ("a.parquet", "no table", "not a Parquet file"),
        ("a.csv", "instruction\nx\n", "expected a file named .json, .jsonl or .parquet"),
    ],
)
def test_alpaca_names_the_file_and_row_at_fault(name, content, said, tmp_path, capsys, monkeypatch):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = mistake(test_alpaca, capsys, monkeypatch, "--prompts-file", str(file))
    assert f"{file}: " in line and said in line


def test_alpaca_says_what_parquet_needs(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # as if it were not installed
    file = tmp_path / "rows.parquet"
    line = mistake(test_alpaca, capsys, monkeypatch, "--prompts-file", str(file))
    assert "pip install -e '.[parquet]'" in line


@pytest.mark.parametrize(
    ("flags", "named"),
    [(["--prompts-file", "absent.json"], "absent.json"), (["--num-prompts", "0"], "--num-prompts")],
)
def test_alpaca_has_mistakes_of_its_own(flags, named, capsys, monkeypatch):
    assert named in mistake(test_alpaca, capsys, monkeypatch, *flags)


def test_the_data_set_is_preferred_where_it_can_be_had(monkeypatch):
    datasets = types.ModuleType("datasets")
    datasets.__spec__ = types.SimpleNamespace()
    calls = []
    datasets.load_dataset = lambda name, split: calls.append((name, split)) or ROWS
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    assert bench.find_prompts(None, 3) == (PROMPTS, "tatsu-lab/alpaca")
    assert calls == [("tatsu-lab/alpaca", "train[:3]")]


def test_the_bundled_prompts_serve_where_the_data_set_cannot_be_had(monkeypatch):
    datasets = types.ModuleType("datasets")
    datasets.__spec__ = types.SimpleNamespace()
    offline = {}

    def load_dataset(name, split):
        offline.update(HF_HUB_OFFLINE=bench.os.environ.get("HF_HUB_OFFLINE"))
        raise ConnectionError("no network")

    datasets.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # so that it is put back afterwards
    prompts, source = bench.find_prompts(None, 2)
    assert offline == {"HF_HUB_OFFLINE": "1"}
    assert prompts == bench.read_prompts(bench.BUNDLED)[:2]
    assert "bundled" in source and "ConnectionError" in source

    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    prompts, source = bench.find_prompts(None, 1000)
    assert len(prompts) == 512 and "bundled" in source and "pip install datasets" in source


def test_a_silent_hub_is_given_up_soon(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listening:  # takes the call and says nothing
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        start = time.perf_counter()
        assert not hub.hub_answers(timeout=0.3)
        assert time.perf_counter() - start < 5
    assert not hub.hub_answers()  # the port is closed now


def test_a_hub_that_answers_is_heard(monkeypatch):
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub.hub_answers()
        thread.join()


@pytest.mark.slow
def test_the_benchmark_compares_equal_work(tmp_path):
    flags = ["--num-prompts", "9", "--max-tokens", "2", "--turns", "1"]
    process = python(str(ROOT / "benchmarks" / "alpaca.py"), *flags, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    speeds = result["engine_tokens_per_second"], result["loop_tokens_per_second"]
    rounded = {"rel": 0.02, "abs": 0.005}  # the ratios have two decimals
    assert result["throughput_ratio"] == pytest.approx(speeds[0] / speeds[1], **rounded)
    starts = result["engine_start_seconds"], result["loop_start_seconds"]
    assert result["start_ratio"] == pytest.approx(starts[0] / starts[1], **rounded)
    assert 0 < result["share_of_limit"] < 1
    assert result["pool_bytes"] > result["num_blocks"] * result["block_size"] * 6144
