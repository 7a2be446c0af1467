"""CORE, the metric of base models: accuracy in 22 tasks, as nanochat measures it.

    evaluate_core(LLM("base"), read_bundle("~/.cache/nanochat/eval_bundle"))["core_metric"]

A task's accuracy is centred: 0 is guessing, 1 is perfect. CORE is the mean over the tasks (Li et
al. 2024, "DataComp-LM"). Each item comes behind num_fewshot solved ones, drawn at random from the
others, and is answered by log-probabilities:

    multiple_choice     one context, several endings     the ending with the best mean wins
    schema              several contexts, one ending     the context with the best mean wins
    language_modeling   one context, one ending          right if greedy decoding would write it

The tokens tell where the ending begins: it is what the options do not share at the beginning
(multiple_choice), or what they share at the end (schema).
"""

import csv
import json
import random
from array import array
from collections.abc import Iterable
from math import nan
from os.path import commonprefix, expanduser
from pathlib import Path
from typing import NamedTuple

from .shares import llm_of, own_share, share_solved

KINDS = ("multiple_choice", "schema", "language_modeling")
FIELDS = ("label", "task_type", "num_fewshot", "random_baseline", "rows")
SHUFFLE_SEED = 1337  # of a task's rows, and of the examples of each, as nanochat has them
EXAMPLES_SEED = 1234


class Option(NamedTuple):
    """An answer that is scored: token ids of what comes before it, and its own."""

    prompt: array
    ending: array

    @property
    def can_be_scored(self) -> bool:
        """False where an option begins or ends another one: nothing is left of it."""
        return len(self.prompt) > 0 and len(self.ending) > 0


def evaluate_core(llm, tasks: Iterable[dict]) -> dict:
    """Accuracies, the same centred, and CORE: {"results": {label: ...}, "centered_results": {label:
    ...}, "core_metric": ...}, the dict of nanochat's base_eval.

    tasks: as `read_bundle` gives them, each a dict with label, task_type (see above), num_fewshot,
    random_baseline (in percent), rows, and continuation_delimiter (by default a space) between the
    parts. A row has query, choices and gold (multiple_choice); context_options, continuation and
    gold (schema); or context and continuation. Raises ValueError, which names the task and the row,
    for one that cannot be scored, before anything is computed: nothing is cut, so llm needs a
    max_model_len for the longest.
    """
    results = {}
    centered = {}
    for task, items in [(task, make_items(llm, task)) for task in tasks]:
        accuracy = sum(find_right(llm, task, items)) / len(items)
        chance = 0.01 * task["random_baseline"]
        results[task["label"]] = accuracy
        centered[task["label"]] = (accuracy - chance) / (1 - chance)
    if not results:
        raise ValueError("evaluate_core needs at least one task")
    core = sum(centered.values()) / len(centered)
    return {"results": results, "centered_results": centered, "core_metric": core}


def evaluate_task(model, tokenizer, data: list[dict], device, task_meta: dict) -> float:
    """What nanochat.core_eval.evaluate_task does: the accuracy of a live module in one task. The
    items are one batch. Under torch.distributed each process has its share of them, and all return
    the accuracy of the whole.

    model, tokenizer: nanochat's; data: the rows; device: has no effect, it is the module's;
    task_meta: task_type, num_fewshot and continuation_delimiter. Raises ValueError, see
    `evaluate_core`.
    """
    task = {"label": "of task_meta", "random_baseline": 0.0} | task_meta | {"rows": data}
    with llm_of(model, tokenizer) as llm:
        indices = own_share(llm, len(data))
        items = make_items(llm, task, indices)
        own_task = task | {"rows": [data[i] for i in indices]}
        return share_solved(llm, find_right(llm, own_task, items))


def read_bundle(directory: str | Path, max_per_task: int = -1) -> list[dict]:
    """The tasks of nanochat's eval_bundle: core.yaml, eval_meta_data.csv and eval_data/. The rows
    are shuffled as nanochat does, also where all are taken: which examples an item gets depends on
    its place. max_per_task: that many rows of each task; -1: all."""
    try:
        import yaml
    except ModuleNotFoundError as error:
        what = "read_bundle needs the package yaml: pip install pyyaml"
        raise ModuleNotFoundError(what, name=error.name) from None
    folder = Path(expanduser(directory))
    config = yaml.safe_load((folder / "core.yaml").read_text(encoding="utf-8"))
    with open(folder / "eval_meta_data.csv", encoding="utf-8", newline="") as file:
        chances = {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(file)}
    tasks = []
    for entry in config["icl_tasks"]:
        with open(folder / "eval_data" / entry["dataset_uri"], encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        random.Random(SHUFFLE_SEED).shuffle(rows)
        tasks.append(
            {
                "label": entry["label"],
                "task_type": entry["icl_task_type"],
                "num_fewshot": entry["num_fewshot"][0],
                "continuation_delimiter": entry.get("continuation_delimiter", " "),
                "random_baseline": chances[entry["label"]],
                "rows": rows[:max_per_task] if max_per_task > 0 else rows,
            }
        )
    return tasks


# an item: a row of a task with its examples, as token ids


def make_items(llm, task: dict, indices: Iterable[int] | None = None) -> list[list[Option]]:
    """The options of each row, or of those at `indices`. Raises ValueError, see `evaluate_core`."""
    check_task(task)
    rows = task["rows"]
    items = []
    for i in range(len(rows)) if indices is None else indices:
        row = rows[i]
        others = [*range(i), *range(i + 1, len(rows))]
        chosen = random.Random(EXAMPLES_SEED + i).sample(others, task["num_fewshot"])
        where = f"task {task['label']}, row {i}"
        try:
            texts = render_options(task, row, [rows[j] for j in chosen])
            token_ids = [llm.tokenizer.encode(text, bos=True) for text in texts]
            options = split_options(task["task_type"], token_ids)
            check_lengths(options, llm.max_model_len)
        except KeyError as error:
            raise ValueError(f"{where}: it has no {error}") from None
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{where}: {error}") from None
        items.append(options)
    return items


def check_task(task: dict) -> None:
    """Raises ValueError for a task with a field that is missing or makes no sense."""
    label = task.get("label")
    missing = [name for name in FIELDS if name not in task]
    if missing:
        raise ValueError(f"task {label}: it has no {', '.join(missing)}")
    kind = task["task_type"]
    if kind not in KINDS:
        raise ValueError(f"task {label}: task_type is {kind!r}, not one of {', '.join(KINDS)}")
    num_rows = len(task["rows"])
    num_fewshot = task["num_fewshot"]
    if not 0 <= num_fewshot < num_rows:
        raise ValueError(f"task {label}: {num_rows} rows are too few for num_fewshot={num_fewshot}")


def check_lengths(options: list[Option], max_model_len: int) -> None:
    """Raises ValueError if an option is too long."""
    longest = max(len(option.prompt) + len(option.ending) for option in options)
    if longest > max_model_len:
        limit = f"max_model_len is {max_model_len}"
        raise ValueError(f"{longest} tokens, and {limit}: give LLM(..., max_model_len=)")


def render_options(task: dict, row: dict, examples: list[dict]) -> list[str]:
    """The full text of each option of a row; for language modeling the text without its ending and
    the one with it."""
    kind = task["task_type"]
    delimiter = task.get("continuation_delimiter", " ")
    shots = ""
    for example in examples:
        gold = 0 if kind == "language_modeling" else example["gold"]
        shots += f"{render_row(kind, delimiter, example)[gold]}\n\n"
    texts = [f"{shots}{text}" for text in render_row(kind, delimiter, row)]
    if kind == "language_modeling":
        # without spaces at the end, which would be in one token with the word behind them
        texts.insert(0, f"{shots}{str(row['context']).strip()}{delimiter}".strip())
    elif not 0 <= row["gold"] < len(texts):
        raise ValueError(f"gold is {row['gold']}, and there are {len(texts)} options")
    return texts


def render_row(kind: str, delimiter: str, row: dict) -> list[str]:
    """The text of each option of a row, without examples."""
    if kind == "multiple_choice":
        return [f"{row['query']}{delimiter}{choice}" for choice in row["choices"]]
    if kind == "schema":
        contexts = row["context_options"]
        return [f"{context}{delimiter}{row['continuation']}" for context in contexts]
    return [f"{str(row['context']).strip()}{delimiter}{row['continuation']}"]


def split_options(kind: str, token_ids: list[list[int]]) -> list[Option]:
    """The options of these texts; prompts that are equal are one object."""
    if kind == "schema":
        num_shared = len(commonprefix([ids[::-1] for ids in token_ids]))
        starts = [len(ids) - num_shared for ids in token_ids]
        return [
            Option(array("i", ids[:start]), array("i", ids[start:]))
            for ids, start in zip(token_ids, starts, strict=True)
        ]
    shared = commonprefix(token_ids)
    if kind == "language_modeling":
        without_ending, *token_ids = token_ids
        if shared != without_ending or len(token_ids[0]) == len(shared):
            raise ValueError("the tokens of the context are no prefix of those with the ending")
    prompt = array("i", shared)
    return [Option(prompt, array("i", ids[len(shared) :])) for ids in token_ids]


# answers


def find_right(llm, task: dict, items: list[list[Option]]) -> list[bool]:
    """Is each item answered right? All are computed at once."""
    outputs = iter(judge_options(llm, [option for options in items for option in options]))
    is_right = []
    for row, options in zip(task["rows"], items, strict=True):
        option_outputs = [next(outputs) for _ in options]
        if task["task_type"] == "language_modeling":
            is_right.append(all(option_outputs[0]["greedy"]))
        else:
            losses = [mean_loss(output) for output in option_outputs]
            is_right.append(losses.index(min(losses)) == row["gold"])
    return is_right


def judge_options(llm, options: list[Option]) -> list[dict | None]:
    """The output of LLM.judge for each option, None for those that cannot be scored."""
    scored = [option for option in options if option.can_be_scored]
    lists = {id(ids): ids.tolist() for option in scored for ids in option}  # one for equal prompts
    prompts = [lists[id(option.prompt)] for option in scored]
    endings = [lists[id(option.ending)] for option in scored]
    outputs = iter(llm.judge(prompts, endings, use_tqdm=True))
    return [next(outputs) if option.can_be_scored else None for option in options]


def mean_loss(output: dict | None) -> float:
    """The mean over an ending's tokens; NaN where there are none, as in nanochat."""
    return nan if output is None else -sum(output["logprobs"]) / len(output["logprobs"])
