"""The tasks of nanochat's chat_eval: ARC, MMLU, GSM8K and HumanEval, in nanochat's order and words.

A task is a list of conversations that end with the right answer, and a function that evaluates an
answer. It has the four members of nanochat's Task, so functions accept both:

    eval_type                           "categorical" (choose a letter) or "generative"
    len(task), task[i]                  {"messages": [...], ...}, as in nanochat
    task.evaluate(conversation, text)   whether the answer is right
"""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..checkpoint import nanochat_base
from ..environment import how_to_install
from ..jobs.rows import read_rows
from .execution import runs_without_error

SHUFFLE_SEED = 42  # nanochat's seed for the rows of each task
MMLU_LETTERS = ("A", "B", "C", "D")
ANSWER = re.compile(r"#### (-?[0-9.,]+)")  # the number at the end of a GSM8K solution
CALCULATION = re.compile(r"(<<[^>]+>>)")  # in GSM8K: <<12/60=0.2>>
SUFFIXES = (".parquet", ".jsonl")
CODE_BLOCK = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)


class ChatTask:
    """A task over the rows of a data set.

    name: its name in chat_eval; repo: the data set on the Hugging Face hub; subset: a subset of the
    data set; data: a folder, see `find_rows`. Raises FileNotFoundError, ConnectionError or
    ValueError.
    """

    eval_type = "generative"
    split = "test"
    runs_code = False

    def __init__(self, name: str, repo: str, subset: str, data: str | Path | None = None):
        self.name = name
        self.rows = find_rows(repo, subset, self.split, data)
        self.order = np.random.default_rng(SHUFFLE_SEED).permutation(len(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row_number = int(self.order[index])
        try:
            return self.converse(self.rows[row_number])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{self.name}, row {row_number}: {error!r}") from None

    def converse(self, row: dict) -> dict:
        """Return the conversation of a row."""
        raise NotImplementedError

    def evaluate(self, conversation: dict, answer: str) -> bool:
        """Return whether an answer is right."""
        raise NotImplementedError


class ChoiceTask(ChatTask):
    """One of a few letters is right. The conversation lists them under the key "letters"."""

    eval_type = "categorical"

    def make_conversation(self, question: str, letters, choices, answer: str) -> dict:
        """Make the conversation. Each letter follows its choice without a space, so that it is the
        same token as in the answer."""
        lines = [f"- {choice}={letter}" for letter, choice in zip(letters, choices, strict=False)]
        text = "\n".join([f"Multiple Choice question: {question}", *lines])
        text += "\n\nRespond only with the letter of the correct answer."
        if answer not in letters:
            raise ValueError(f"the answer {answer!r} is not one of {letters}")
        return {
            "messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": answer},
            ],
            "letters": letters,
        }

    def evaluate(self, conversation: dict, answer: str) -> bool:
        return answer == conversation["messages"][-1]["content"]


class ARC(ChoiceTask):
    """Questions of school exams (Clark et al. 2018)."""

    def converse(self, row: dict) -> dict:
        choices = row["choices"]
        question = row["question"]
        return self.make_conversation(question, choices["label"], choices["text"], row["answerKey"])


class MMLU(ChoiceTask):
    """Questions of 57 subjects (Hendrycks et al. 2020)."""

    def converse(self, row: dict) -> dict:
        if len(row["choices"]) != len(MMLU_LETTERS):
            raise ValueError(f"there are {len(row['choices'])} choices, not {len(MMLU_LETTERS)}")
        answer = MMLU_LETTERS[row["answer"]]
        conversation = self.make_conversation(row["question"], MMLU_LETTERS, row["choices"], answer)
        return conversation | {"subject": row["subject"]}


class GSM8K(ChatTask):
    """Word problems, solved in words with calculations (Cobbe et al. 2021)."""

    def converse(self, row: dict) -> dict:
        parts = []
        for text in CALCULATION.split(row["answer"]):
            if text.startswith("<<") and text.endswith(">>"):
                expression, equals, result = text[2:-2].rpartition("=")
                call = expression if equals else result
                parts.append({"type": "python", "text": call})
                parts.append({"type": "python_output", "text": result if equals else ""})
            else:
                parts.append({"type": "text", "text": text})
        return {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": parts},
            ]
        }

    def evaluate(self, conversation: dict, answer: str) -> bool:
        solution = conversation["messages"][-1]["content"][-1]["text"]
        return find_answer(answer) == find_answer(solution)


class HumanEval(ChatTask):
    """Functions to write, which unit tests then call (Chen et al. 2021). Answers are executed: see
    execution.py for the risks."""

    runs_code = True

    def converse(self, row: dict) -> dict:
        prompt = row["prompt"]
        return {
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": f"{prompt}\n{row['canonical_solution']}"},
            ],
            "entry_point": row["entry_point"],
            "test": row["test"],
        }

    def evaluate(self, conversation: dict, answer: str) -> bool:
        prompt = conversation["messages"][0]["content"]
        call = f"check({conversation['entry_point']})"
        parts = [find_imports(prompt), "", find_code(answer), "", conversation["test"], call]
        return runs_without_error("\n".join(parts))


# name: class, data set, subset, and the accuracy of random answers
TASKS: dict[str, tuple[Callable[..., ChatTask], str, str, float]] = {
    "ARC-Easy": (ARC, "allenai/ai2_arc", "ARC-Easy", 0.25),
    "ARC-Challenge": (ARC, "allenai/ai2_arc", "ARC-Challenge", 0.25),
    "MMLU": (MMLU, "cais/mmlu", "all", 0.25),
    "GSM8K": (GSM8K, "openai/gsm8k", "main", 0.0),
    "HumanEval": (HumanEval, "openai/openai_humaneval", "openai_humaneval", 0.0),
}


def load_task(name: str, data: str | Path | None = None) -> ChatTask:
    """Return a task of nanochat's chat_eval. name: a name in TASKS; data: a folder, see
    `find_rows`. Raises ValueError for an unknown name, and the errors of `find_rows`."""
    if name not in TASKS:
        raise ValueError(f"task_name must be one of {', '.join(TASKS)}, got {name!r:.80}")
    task_class, repo, subset, _ = TASKS[name]
    return task_class(name, repo, subset, data)


# parsing of texts


def find_answer(text: str) -> str | None:
    """Return the number after #### in a GSM8K solution, without commas, or None."""
    match = ANSWER.search(text)
    return match[1].strip().replace(",", "") if match else None


def find_code(text: str) -> str:
    """Return the first code block of an answer, or the whole answer if it has none."""
    match = CODE_BLOCK.search(text)
    return (match[1] if match else text).strip()


def find_imports(prompt: str) -> str:
    """Return the import lines at the start of a program, without comments and blank lines."""
    imports = []
    for line in prompt.split("\n"):
        line = line.strip()
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(imports)


# data


def find_rows(repo: str, subset: str, split: str, data: str | Path | None = None) -> list[dict]:
    """Return the rows of a data set, in its own order.

    Without `data`, the rows come from task_data in nanochat's base directory, or else from the
    Hugging Face hub's cache or the hub. data: a folder with nanochat's structure, or with clones of
    data sets, or with one file each, .parquet or .jsonl:

        openai--gsm8k/main/test/00000.parquet
        gsm8k/main/test-00000-of-00001.parquet
        gsm8k/main/test.jsonl

    Raises FileNotFoundError, ConnectionError, or ValueError for a damaged file.
    """
    if data is not None:
        paths = find_files(Path(data).expanduser(), repo, subset, split)
        if not paths:
            expected = f"{repo.split('/')[1]}/{subset}/{split}*.parquet or .jsonl"
            raise FileNotFoundError(f"data={str(data)!r} has no {expected}, nor nanochat's folders")
    else:
        paths = find_files(nanochat_base() / "task_data", repo, subset, split)
        paths = paths or fetch_files(repo, subset, split)
    return [row for path in paths for row in read_rows(path)]


def find_files(folder: Path, repo: str, subset: str, split: str) -> list[Path]:
    """Return the files of a split below a folder, sorted; [] if there are none."""
    places = [
        (folder / repo.replace("/", "--") / subset / split, "*"),
        (folder / repo.split("/")[1] / subset, f"{split}.*"),
        (folder / repo.split("/")[1] / subset, f"{split}-*"),
    ]
    for directory, pattern in places:
        paths = sorted(path for path in directory.glob(pattern) if path.suffix in SUFFIXES)
        if paths:
            return paths
    return []


def fetch_files(repo: str, subset: str, split: str) -> list[Path]:
    """Download the files of a split from the hub's Parquet export, once. Raises ConnectionError, or
    FileNotFoundError if the download package is missing."""
    remedy = "give data=, a folder with the rows"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        install = how_to_install("hf")
        raise FileNotFoundError(
            f"the rows of {repo} are not in {nanochat_base() / 'task_data'}; {remedy}, or install "
            f"the package that downloads them: {install}"
        ) from None
    try:
        cached = snapshot_download(
            repo,
            repo_type="dataset",
            revision="refs/convert/parquet",
            allow_patterns=f"{subset}/{split}/*.parquet",
        )
    except Exception as error:  # the type depends on the http library of the hub's version
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]:.200}"
        raise ConnectionError(
            f"{repo} cannot be fetched from the hub ({reason}): {remedy}"
        ) from None
    paths = sorted((Path(cached) / subset / split).glob("*.parquet"))
    if not paths:
        raise FileNotFoundError(
            f"the hub has no Parquet files of {repo}/{subset}/{split}: {remedy}"
        )
    return paths
