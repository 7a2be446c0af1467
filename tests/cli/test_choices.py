"""Policies on the command line: by name and from a file, with the tokens that there are without."""

import json

import pytest

from microvllm.cli import policies

pytestmark = pytest.mark.usefixtures("one_thread")
MINE = """
asked = []

def last(scheduler):
    asked.append(scheduler)
    return scheduler.waiting[-1]

def none(blocks): ...

number = 3
"""


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


def test_names_are_the_defaults_and_the_labs():
    for kind, default in policies.KINDS.items():
        assert [*policies.names(kind)][0] == default
        for name, policy in policies.names(kind).items():
            assert policies.find_policy(kind, name) is policy and policy.__name__ == name
    assert {"dueling", "aged_frequency", "cost_aware"} < {*policies.names("eviction")}


WORDS = "--temperature 0 --max-tokens 40 --num-blocks 14 --json --raw".split()
PROMPTS = ["It was a dark and stormy night", "Once upon a time", "Call me Ishmael", "She had"]


def test_what_a_policy_must_not_return_is_told(mine, command):
    with pytest.raises(ValueError, match="eviction returned None"):
        command("run", *WORDS, "--eviction", f"{mine}:none", "--ignore-eos", "-n", "3", *PROMPTS)


def test_run_batch_and_bench_take_them(mine, command, tmp_path):
    flags = ["--eviction", "dueling", "--victim", "cheapest", "--admission", f"{mine}:last"]
    words, prompts = WORDS, PROMPTS
    plain, _ = command("run", *words, *prompts)
    chosen, _ = command("run", *words, *flags, *prompts)
    assert chosen == plain
    module = policies.load(mine)
    assert module.asked
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    before = len(module.asked)
    with pytest.raises(SystemExit) as stop:
        command("batch", rows, "-o", out, *words, *flags)
    assert stop.value.code == 0
    assert len(module.asked) > before and len(out.read_text().splitlines()) == 4
    before = len(module.asked)
    sizes = "--num-prompts 3 --random-input-len 20 --random-output-len 4".split()
    command("bench", *words, *sizes, *flags)
    assert len(module.asked) > before


def test_mistakes_are_told_before_a_model_is_loaded(mine, mistake, tmp_path, monkeypatch):
    broken, text, leaves = (tmp_path / name for name in ("broken.py", "notes.txt", "leaves.py"))
    broken.write_text("1 / 0")
    text.write_text("def f(scheduler, seq): ...")
    leaves.write_text("import sys; sys.exit(0)")
    (tmp_path / "binary.py").write_bytes(b"\x7fELF\0\xff")
    cases = [
        (
            ["--victim", f"{text}:f"],
            f"--victim {text}:f: {text} is not a Python file: its name must",
        ),
        (["--victim", f"{leaves}:f"], "leaves.py cannot be loaded as a Python module: SystemExit"),
        (["--victim", f"{tmp_path}/binary.py:f"], "binary.py cannot be loaded as a Python module"),
        (["--victim", f"{tmp_path}:f"], f"there is no file {tmp_path}"),
        (["--eviction", "~nobody-of-this-name/x.py:f"], "there is no file"),
        (["--eviction", "lru"], "no policy 'lru': choose from least_recently_used, most_"),
        (["--victim", "dueling"], "choose from youngest, largest"),
        (["--admission", f"{mine}:first"], f"{mine} has no function 'first'"),
        (["--admission", f"{mine}:number"], f"{mine} has no function 'number'"),
        (["--eviction", f"{tmp_path}/no.py:x"], f"there is no file {tmp_path}/no.py"),
        (["--eviction", f"{broken}:x"], "ZeroDivisionError"),
    ]
    for flags, told in cases:
        assert told in mistake("run", *flags, "hi")
    monkeypatch.setattr(policies, "ROOT", tmp_path)  # a lab that is not installed
    assert "choose from youngest, or give" in mistake("run", "--victim", "largest", "hi")


def test_ray_sends_a_function_of_a_file_whole(mine):
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    for kind, name in (("admission", f"{mine}:last"), ("eviction", "dueling")):
        sent = cloudpickle.dumps(policies.find_policy(kind, name))
        assert b"asked" in sent or b"Dueling" in sent
        assert cloudpickle.loads(sent) is not policies.find_policy(kind, name)
