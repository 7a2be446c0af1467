"""The speed of nanochat's evaluations on this engine, beside nanochat's own loops.

    python benchmarks/evals.py                            # the bundled model, without nanochat
    python benchmarks/evals.py --nanochat ~/nanochat      # with nanochat's code and module
    python benchmarks/evals.py --problems 6 --shots 1 --tokens 4 --turns 1  # only a test

There are three evaluations of random texts in nanochat's formats. "categorical" is like ARC, with
four choices. "generative" is like GSM8K, with greedy answers of --tokens tokens. Both have
--problems problems. "CORE" has one task of each of its three kinds. Each of these tasks has a third
as many items, after --shots solved examples. Variants:

    nanochat     nanochat's module with the same weights, and its functions: run_categorical_eval
                 (batches of 8, as in its script), run_generative_eval with its Engine, and
                 core_eval.evaluate_task. Only with --nanochat, a checkout. Its packages must be
                 installed
    one by one   this engine on the live module, one problem in each call
    live         the same engine, all problems in one call of run_chat_eval or evaluate_core
    copy         the same with copy=True: the engine has its own weights, like LLM(path)

All variants compute in float32. The benchmark fails unless all answers are equal: the letter of
each question, the text of each solution, and the number of right items of each task. The variants
run in turns. A number is the median of --turns, in seconds, after one turn that compiles kernels.
The prefix cache is empty when a variant starts. The last line of the output has all results as
JSON. The model must be of era 5.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the examples are
sys.path.insert(0, f"{sys.path[0]}/src")

import torch

from examples.gpt import load
from microvllm.nanochat import Engine, evaluate_core, load_task, run_chat_eval
from microvllm.nanochat.chat_eval import TokenizerOfEngine
from microvllm.nanochat.core_metric import KINDS, find_right, make_items
from microvllm.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
WORDS = "the old king went to a small town and saw his ship on cold water with two men".split()
BATCH_SIZE = 8  # of nanochat's chat_eval


class Recorder:
    """A task of chat_eval that records the answers that it judges. indices: problems to use; None
    means all."""

    def __init__(self, task, answers: dict[int, object], indices: range | None = None):
        self.task = task
        self.answers = answers
        self.indices = range(len(task)) if indices is None else indices
        self.eval_type = task.eval_type

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict:
        index = self.indices[i]
        return {**self.task[index], "index": index}

    def evaluate(self, conversation: dict, answer: str) -> bool:
        self.answers[conversation["index"]] = answer
        return self.task.evaluate(conversation, answer)


# problems


def make_chat_tasks(num_problems: int, draw: random.Random) -> dict:
    """A categorical and a generative task, from files as nanochat's data sets have them."""
    arc = [
        {
            "question": sentence(draw, 40),
            "choices": {"text": [sentence(draw, 8) for _ in "ABCD"], "label": list("ABCD")},
            "answerKey": draw.choice("ABCD"),
        }
        for _ in range(num_problems)
    ]
    gsm8k = [
        {"question": sentence(draw, 60), "answer": f"<<{i}+{i}={2 * i}>>.\n#### {2 * i}"}
        for i in range(num_problems)
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in (("ai2_arc/ARC-Easy", arc), ("gsm8k/main", gsm8k)):
            path = Path(folder, name, "test.jsonl")
            path.parent.mkdir(parents=True)
            path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return {
            "categorical": load_task("ARC-Easy", folder),
            "generative": load_task("GSM8K", folder),
        }


def make_core_tasks(num_problems: int, num_shots: int, draw: random.Random) -> list[dict]:
    """A task of each kind of CORE."""
    num_rows = max(num_problems, num_shots + 1)
    rows = {
        "multiple_choice": [
            {
                "query": sentence(draw, 30),
                "choices": [sentence(draw, 6) for _ in range(4)],
                "gold": draw.randrange(4),
            }
            for _ in range(num_rows)
        ],
        "schema": [
            {
                "context_options": [sentence(draw, 20) for _ in range(2)],
                "continuation": sentence(draw, 8),
                "gold": draw.randrange(2),
            }
            for _ in range(num_rows)
        ],
        "language_modeling": [
            {"context": sentence(draw, 40), "continuation": sentence(draw, 1)}
            for _ in range(num_rows)
        ],
    }
    return [
        {
            "label": kind,
            "task_type": kind,
            "num_fewshot": num_shots,
            "random_baseline": 0.0,
            "continuation_delimiter": " ",
            "rows": rows[kind],
        }
        for kind in KINDS
    ]


def sentence(draw: random.Random, num_words: int) -> str:
    return " ".join(draw.choices(WORDS, k=num_words))


# variants: functions that run the tasks of an evaluation and return the answers


def at_once(engine: Engine, options: dict, tasks) -> dict:
    """All problems in one call."""
    if isinstance(tasks, list):
        accuracies = evaluate_core(engine.llm, tasks)["results"]
        return {task["label"]: count_right(task, accuracies[task["label"]]) for task in tasks}
    answers: dict = {}
    task = Recorder(tasks, answers)
    run_chat_eval(task, engine.model, TokenizerOfEngine(engine.llm), engine, **options)
    return answers


def count_right(task: dict, accuracy: float) -> int:
    """The number of right items: nanochat's accuracies are rounded to float32."""
    return round(accuracy * len(task["rows"]))


def one_by_one(engine: Engine, options: dict, tasks) -> dict:
    """One problem in each call."""
    answers: dict = {}
    if isinstance(tasks, list):
        for task in tasks:
            num_right = 0
            for i, row in enumerate(task["rows"]):
                items = make_items(engine.llm, task, [i])
                num_right += sum(find_right(engine.llm, task | {"rows": [row]}, items))
            answers[task["label"]] = num_right
        return answers
    for i in range(len(tasks)):
        task = Recorder(tasks, answers, range(i, i + 1))
        run_chat_eval(task, engine.model, TokenizerOfEngine(engine.llm), engine, **options)
    return answers


def in_nanochat(code: SimpleNamespace, module, tokenizer, options: dict, tasks) -> dict:
    """nanochat's own loops. code: what `import_nanochat` returns."""
    answers: dict = {}
    if isinstance(tasks, list):
        for task in tasks:
            accuracy = code.evaluate_task(module, tokenizer, task["rows"], "cpu", task)
            answers[task["label"]] = count_right(task, accuracy)
        return answers
    task = Recorder(tasks, answers)
    with redirect_stdout(StringIO()):
        if task.eval_type == "categorical":
            code.run_categorical_eval(task, tokenizer, module, BATCH_SIZE)
        else:
            engine = code.Engine(module, tokenizer)
            code.run_generative_eval(
                task, tokenizer, module, engine, num_samples=1, temperature=0.0, top_k=50, **options
            )
    return answers


def import_nanochat(checkout: Path) -> SimpleNamespace:
    """Return nanochat's functions and classes for evaluations."""
    sys.path.insert(0, str(checkout.expanduser()))
    from nanochat.core_eval import evaluate_task
    from nanochat.engine import Engine as NanochatEngine
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.tokenizer import RustBPETokenizer
    from scripts.chat_eval import run_categorical_eval, run_generative_eval

    return SimpleNamespace(
        evaluate_task=evaluate_task,
        Engine=NanochatEngine,
        GPT=GPT,
        GPTConfig=GPTConfig,
        Tokenizer=RustBPETokenizer,
        run_categorical_eval=run_categorical_eval,
        run_generative_eval=run_generative_eval,
    )


def make_variants(args: argparse.Namespace) -> dict[str, Callable]:
    """Return the variants by name."""
    path = Path(args.model)
    tokenizer_path = path if (path / "tokenizer.pkl").exists() else path.parent / "tokenizer"
    module = load(path).eval()
    tokenizer = load_tokenizer(tokenizer_path)
    options = {"max_new_tokens": args.tokens}
    variants: dict[str, Callable] = {}
    if args.nanochat:
        code = import_nanochat(args.nanochat)
        weights = module.state_dict()
        with torch.device("meta"):
            module = code.GPT(code.GPTConfig(**vars(module.config)))
        module.to_empty(device="cpu")
        module.init_weights()
        module.load_state_dict(weights)
        module = module.float().eval()
        tokenizer = code.Tokenizer.from_directory(str(tokenizer_path))
        variants["nanochat"] = partial(in_nanochat, code, module, tokenizer, options)
    live = Engine(module, tokenizer)
    copied = Engine(module, tokenizer, copy=True)
    variants["one by one"] = partial(one_by_one, live, options)
    variants["live"] = partial(at_once, live, options)
    variants["copy"] = partial(at_once, copied, options)
    for engine in (live, copied):
        engine.warm()
    resets = [live.llm.reset_prefix_cache, copied.llm.reset_prefix_cache]
    return {name: partial(run_from_cold, resets, variant) for name, variant in variants.items()}


def run_from_cold(resets: list[Callable], variant: Callable, tasks) -> tuple[dict, float]:
    """Return (answers, seconds) of a variant with an empty prefix cache."""
    for reset in resets:
        reset()
    start = time.perf_counter()
    answers = variant(tasks)
    return answers, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT / "models" / "oldbooks-d6"))
    parser.add_argument("--nanochat", type=Path, help="a checkout of nanochat")
    parser.add_argument("--problems", type=int, default=30)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    os.environ["NANOCHAT_DTYPE"] = "float32"  # for nanochat's module and for the Engine
    draw = random.Random(0)
    evaluations = make_chat_tasks(args.problems, draw)
    evaluations["CORE"] = make_core_tasks(args.problems // 3, args.shots, draw)
    facts = {"hardware": platform.machine(), "threads": torch.get_num_threads(), **vars(args)}
    facts["nanochat"] = str(args.nanochat or "")
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    variants = make_variants(args)
    results: dict[str, dict[str, float]] = {}
    for evaluation, tasks in evaluations.items():
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        all_answers = {}
        for turn in range(-1, args.turns):  # the first turn compiles kernels
            for name, variant in variants.items():
                all_answers[name], duration = variant(tasks)
                if turn >= 0:
                    seconds[name].append(duration)
        first, *others = variants
        for name in others:
            if all_answers[name] != all_answers[first]:
                sys.exit(f"{evaluation}: {name} and {first} have different answers: {all_answers}")
        results[evaluation] = {name: statistics.median(turns) for name, turns in seconds.items()}
        for name, duration in results[evaluation].items():
            speedup = results[evaluation][first] / duration
            print(f"{evaluation:12s} {name:10s} {duration:8.2f} s ({speedup:5.1f} times {first})")
    print(json.dumps({**facts, "seconds": results}))


if __name__ == "__main__":
    main()
