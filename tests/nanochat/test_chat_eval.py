"""chat_eval is what nanochat's script computes: its conversations, its letters, its answers."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.goldens import ERAS, MODEL
from helpers.nanochat_engines import BOOKS, CHAIN, Methods

from examples.gpt import load
from microvllm import LLM
from microvllm.checkpoint import load_model
from microvllm.nanochat import Engine, __main__, evaluate_chat, load_task, run_chat_eval, shares
from microvllm.nanochat import tasks as tasks_module
from microvllm.nanochat.execution import runs_without_error
from microvllm.nanochat.tasks import find_answer, find_code, find_imports, find_rows

pytestmark = pytest.mark.usefixtures("one_thread")

ARC_ROWS = [
    {
        "question": f"Which is {word}?",
        "choices": {"text": ["sea", "king", "book", "a war"][:count], "label": list(labels)},
        "answerKey": labels[count // 2],
    }
    for word, count, labels in [("wet", 4, "ABCD"), ("old", 3, "123"), ("red", 4, "ABCD")]
    for _ in range(3)
]
MMLU_ROWS = [
    {"question": f"{i}?", "subject": "law", "choices": list("wxyz"), "answer": i} for i in range(4)
]
GSM8K_ROWS = [
    {
        "question": f"What is {a}+{b}?",
        "answer": f"It is {a}+{b} = <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}",
    }
    for a, b in [(2, 3), (4, 4), (600, 800)]
]
HUMAN_EVAL_ROWS = [
    {
        "prompt": "import math\n\ndef double(x):\n",
        "canonical_solution": "    return 2 * x\n",
        "entry_point": "double",
        "test": "def check(f):\n    assert f(4) == 8",
    }
]
FILES = {
    "ai2_arc/ARC-Easy/test.jsonl": ARC_ROWS,
    "mmlu/all/test.jsonl": MMLU_ROWS,
    "gsm8k/main/test.jsonl": GSM8K_ROWS,
    "openai_humaneval/openai_humaneval/test.jsonl": HUMAN_EVAL_ROWS,
}


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, rows in FILES.items():
        write_rows(folder / name, rows)
    return folder


@pytest.fixture(scope="module")
def llm():
    with LLM(MODEL, device="cpu", num_blocks=300, attention="sdpa") as llm:
        yield llm


def conversations(name: str, data: Path) -> list[dict]:
    task = load_task(name, data)
    return [task[i] for i in range(len(task))]


# conversations ------------------------------------------------------------------------------------


def test_a_question_with_choices_has_each_letter_behind_its_choice(data):
    (found,) = {
        json.dumps(c) for c in conversations("ARC-Easy", data) if "old" in json.dumps(c)
    }  # fmt: skip
    assert json.loads(found) == {
        "messages": [
            {
                "role": "user",
                "content": "Multiple Choice question: Which is old?\n"
                "- sea=1\n- king=2\n- book=3\n\n"
                "Respond only with the letter of the correct answer.",
            },
            {"role": "assistant", "content": "2"},
        ],
        "letters": ["1", "2", "3"],
    }
    by_question = {c["messages"][0]["content"][:27]: c for c in conversations("MMLU", data)}
    found = by_question["Multiple Choice question: 2"]
    assert found["letters"] == ("A", "B", "C", "D") and found["subject"] == "law"
    assert found["messages"][1]["content"] == "C"


def test_a_solution_is_split_at_its_calculations(data):
    (found,) = [c for c in conversations("GSM8K", data) if "600" in c["messages"][0]["content"]]
    assert found["messages"][1]["content"] == [
        {"type": "text", "text": "It is 600+800 = "},
        {"type": "python", "text": "600+800"},
        {"type": "python_output", "text": "1400"},
        {"type": "text", "text": "1400.\n#### 1400"},
    ]
    task = load_task("GSM8K", data)
    assert task.evaluate(found, "so\n#### 1,400") and not task.evaluate(found, "1400")
    assert find_answer("#### -3.5 #### 4") == "-3.5" and find_answer("####4") is None


def test_the_rows_are_in_nanochats_order(data):
    order = np.random.default_rng(42).permutation(len(GSM8K_ROWS))
    found = [c["messages"][0]["content"] for c in conversations("GSM8K", data)]
    assert found == [GSM8K_ROWS[i]["question"] for i in order]


@pytest.mark.slow
def test_a_program_is_made_of_imports_answer_and_tests(data):
    task = load_task("HumanEval", data)
    (problem,) = conversations("HumanEval", data)
    good = "Here:\n```python\ndef double(x):\n    return x + int(math.sqrt(x * x))\n```\nbye"
    assert task.evaluate(problem, good)
    assert task.evaluate(problem, problem["messages"][1]["content"])
    assert not task.evaluate(problem, good.replace("+", "-"))
    assert not task.evaluate(problem, "def double(x)") and not task.evaluate(problem, "\0")
    assert find_imports("# a\n\nimport os\n from re import sub\nx = 1\nimport sys") == (
        "import os\nfrom re import sub"
    )
    assert find_code("a\n```\nx\n```\n```python\ny\n```") == "x" and find_code(" z ") == "z"


@pytest.mark.slow
def test_a_program_has_limits(tmp_path):
    assert runs_without_error("print('x' * 10**6)\nassert __name__ == '__main__'")
    assert not runs_without_error("raise SystemExit(3)")
    assert not runs_without_error("while True: pass", seconds=0.5)
    assert not runs_without_error("import os\nos.system('true')")
    if sys.platform == "linux":
        assert not runs_without_error("x = bytearray(2**29)")
        assert not runs_without_error("open('big', 'wb').write(bytes(2**27))")
    target = tmp_path / "there"
    assert not runs_without_error(f"import os\nopen({str(target)!r}, 'w')\nos.remove('there')")


# where the rows are -------------------------------------------------------------------------------


def test_rows_are_found_in_nanochats_folders_and_in_clones(tmp_path, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = arrow.Table.from_pylist(GSM8K_ROWS)
    for name in ("openai--gsm8k/main/test/00000.parquet", "gsm8k/main/test-00000-of-1.parquet"):
        path = tmp_path / name.split("/")[0] / "task_data" / name
        path.parent.mkdir(parents=True)
        pyarrow.parquet.write_table(table, path)
        (path.parent / "manifest.json").write_text("[]")
        assert find_rows("openai/gsm8k", "main", "test", path.parents[3 - (name[0] == "g")]) == (
            GSM8K_ROWS
        )
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "openai--gsm8k"))
    assert find_rows("openai/gsm8k", "main", "test") == GSM8K_ROWS


def test_rows_that_are_nowhere_come_from_the_hub(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    calls = []

    def snapshot_download(repo, **options):
        calls.append((repo, options["repo_type"], options["revision"], options["allow_patterns"]))
        if repo == "cais/mmlu":
            raise OSError("no route\nto host")
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match="no Parquet files of openai/gsm8k/main/test: give"):
        load_task("GSM8K")
    pattern = "main/test/*.parquet"
    assert calls == [("openai/gsm8k", "dataset", "refs/convert/parquet", pattern)]
    with pytest.raises(ConnectionError, match="cais/mmlu .*OSError: no route.: give data="):
        load_task("MMLU")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="give data=.*pip install"):
        load_task("MMLU")


def test_what_cannot_be_evaluated_is_refused_before_any_work(data, llm, tmp_path, monkeypatch):
    monkeypatch.setattr(llm, "generate", None)
    monkeypatch.setattr(llm, "generate_batch", None)
    with pytest.raises(ValueError, match="task_name must be one of ARC-Easy, .* got 'ARC'"):
        evaluate_chat(llm, ["GSM8K", "ARC"], data=data)
    with pytest.raises(FileNotFoundError, match="has no ai2_arc/ARC-Challenge/test"):
        evaluate_chat(llm, data=data)
    with pytest.raises(ValueError, match="HumanEval runs programs .*run_code=True"):
        evaluate_chat(llm, ["HumanEval"], data=data)
    with pytest.raises(ValueError, match="at least one task"):
        evaluate_chat(llm, [], data=data)
    with pytest.raises(ValueError, match="max_problems must be"):
        evaluate_chat(llm, "GSM8K", data=data, max_problems=0)
    with pytest.raises(ValueError, match="give LLM.*max_model_len=10"):
        evaluate_chat(llm, ["GSM8K"], data=data, max_new_tokens=1020)
    with pytest.raises(TypeError, match="top_p"):
        evaluate_chat(llm, ["GSM8K"], data=data, top_p=1)
    for name, wrong in [("answerKey", "E"), ("choices", 3)]:
        write_rows(tmp_path / "ai2_arc/ARC-Easy/test.jsonl", [ARC_ROWS[0] | {name: wrong}])
        with pytest.raises(ValueError, match="ARC-Easy, row 0"):
            evaluate_chat(llm, ["ARC-Easy"], data=tmp_path)


# answers ------------------------------------------------------------------------------------------


def test_the_letters_are_those_of_a_plain_module_in_padded_batches(data, llm):
    """As nanochat's own loop: rows of different length, BOS behind them, the largest logit among
    the letters. The module is another implementation than the engine's."""
    module = load(MODEL)
    bos_id = llm.tokenizer.bos_id
    found = evaluate_chat(llm, ["ARC-Easy", "MMLU"], data=data)
    num_all_right = 0
    for name in ("ARC-Easy", "MMLU"):
        num_right = 0
        problems = conversations(name, data)
        for start in range(0, len(problems), 4):
            batch = problems[start : start + 4]
            prompts = [llm.tokenizer.render_for_completion(p["messages"]) for p in batch]
            longest = max(map(len, prompts))
            padded = [ids + [bos_id] * (longest - len(ids)) for ids in prompts]
            with torch.no_grad():
                logits = module(torch.tensor(padded))
            for row, (problem, prompt) in enumerate(zip(batch, prompts, strict=True)):
                letters = problem["letters"]
                columns = [llm.tokenizer.encode(letter)[0] for letter in letters]
                best = letters[logits[row, len(prompt) - 1, columns].argmax()]
                num_right += best == problem["messages"][1]["content"]
        num_all_right += num_right
        assert found["results"][name] == num_right / len(problems)
        centered = found["centered_results"][name]
        assert centered == pytest.approx((num_right / len(problems) - 0.25) / 0.75)
    assert 0 < num_all_right < len(ARC_ROWS + MMLU_ROWS)
    mean = sum(found["centered_results"].values()) / 2
    assert found["chatcore_metric"] == pytest.approx(mean)


def answers_seen(monkeypatch, task_class) -> list[str]:
    """The answers that the task evaluates from now on."""
    seen: list[str] = []
    inner = task_class.evaluate

    def evaluate(self, conversation, answer):
        seen.append(answer)
        return inner(self, conversation, answer)

    monkeypatch.setattr(task_class, "evaluate", evaluate)
    return seen


def test_answers_are_those_of_one_problem_at_a_time(data, llm, monkeypatch):
    seen = answers_seen(monkeypatch, tasks_module.GSM8K)
    evaluate_chat(llm, "GSM8K", data=data, max_new_tokens=12)
    expected = []
    for problem in conversations("GSM8K", data):
        prompt = llm.tokenizer.render_for_completion(problem["messages"])
        ((sequence,), _) = llm.generate_batch(prompt, max_tokens=12, temperature=0)
        expected.append(llm.tokenizer.decode(sequence[len(prompt) :]))
    assert sorted(seen) == sorted(expected) and len({*expected}) == 3


def test_one_right_answer_of_several_is_enough(llm):
    class Task:
        """Says which of its texts are right, as nanochat's objects do."""

        eval_type = "generative"

        def __len__(self):
            return 2

        def __getitem__(self, index):
            question = {"role": "user", "content": f"Tell me of {index}"}
            return {"messages": [question, right_answer]}

        def evaluate(self, conversation, answer):
            texts.append(answer)
            return int(len(texts) == 3)

    texts: list[str] = []
    right_answer = {"role": "assistant", "content": "it is"}
    engine = Engine(load_model(MODEL), Methods(BOOKS), num_blocks=100, attention="sdpa")
    with engine.llm:
        found = run_chat_eval(
            Task(), engine.model, engine.tokenizer, engine,
            num_samples=3, max_new_tokens=6, temperature=3.0,
        )  # fmt: skip
    assert found == 0.5 and len(texts) == 6 and len({*texts}) > 2


@pytest.mark.slow
def test_a_live_module_is_evaluated_without_an_engine_of_ours(data, llm, monkeypatch):
    monkeypatch.setattr(tasks_module, "nanochat_base", lambda: data.parent)
    (data.parent / "task_data").symlink_to(data)
    module = load_model(MODEL)
    found = run_chat_eval("ARC-Easy", module, Methods(BOOKS), None, batch_size=8, max_problems=5)
    expected = evaluate_chat(llm, ["ARC-Easy"], data=data, max_problems=5)
    assert found == expected["results"]["ARC-Easy"]


def test_processes_share_the_problems(data, llm, monkeypatch):
    class Process:
        """torch.distributed in one of three processes."""

        counts = np.zeros(2, int)

        def __init__(self, rank):
            self.rank = rank

        is_available = is_initialized = lambda self: True
        get_rank = lambda self: self.rank  # noqa: E731
        get_world_size = lambda self: 3  # noqa: E731

        def all_reduce(self, counts):
            Process.counts += counts.numpy()

    whole = evaluate_chat(llm, ["ARC-Easy", "GSM8K"], data=data, max_new_tokens=4)["results"]
    for name, total in (("ARC-Easy", 9), ("GSM8K", 3)):
        Process.counts = np.zeros(2, int)
        for rank in range(3):
            monkeypatch.setattr(shares, "dist", Process(rank))
            evaluate_chat(llm, [name], data=data, max_new_tokens=4)
        solved, problems = Process.counts
        assert problems == total and solved / problems == whole[name]


# the command --------------------------------------------------------------------------------------


def test_the_command_prints_nanochats_lines(data, tmp_path, monkeypatch, capsys):
    base = tmp_path / "base"
    (base / "chatsft_checkpoints").mkdir(parents=True)
    (base / "chatsft_checkpoints" / "d6").symlink_to(MODEL)
    (base / "tokenizer").symlink_to(MODEL.parent / "tokenizer")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    words = ["-i", "sft", "-a", "MMLU|GSM8K", "-m", "4", "-x", "2", "--data", str(data)]
    __main__.main(words)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["MMLU accuracy", "GSM8K accuracy"]
    assert all(math.isfinite(float(line.split()[-1][:-1])) for line in lines)
    for wrong, message in [("HumanEval", "run_code=True"), ("ARC", "must be one of")]:
        with pytest.raises(SystemExit):
            __main__.main(["-i", "sft", "-a", wrong, "--data", str(data)])
        assert message in capsys.readouterr().err


def test_the_chain_of_the_fixture_calls_its_calculator_in_an_answer(monkeypatch, tmp_path):
    """What nanochat's Engine forces into an answer is in the text that is judged."""
    write_rows(tmp_path / "gsm8k/main/test.jsonl", GSM8K_ROWS)
    seen = answers_seen(monkeypatch, tasks_module.GSM8K)
    with LLM(CHAIN, tokenizer_path=ERAS / "tool_chain" / "tokenizer", max_model_len=300) as chain:
        evaluate_chat(chain, "GSM8K", data=tmp_path, max_new_tokens=40)
    assert len(seen) == 3
    assert any("<|output_start|>" in text for text in seen)
