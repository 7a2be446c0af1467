"""CORE, the metric of base models: accuracy in 22 tasks, measured as in nanochat.

    evaluate_core(LLM("base"), read_bundle("~/.cache/nanochat/eval_bundle"))["core_metric"]

A task's accuracy is centred: 0 is random, 1 is perfect. CORE is the mean over the tasks (Li et al.
2024, "DataComp-LM"). Each item follows num_fewshot solved items, drawn at random from the others,
and is answered by log-probabilities:

    multiple_choice     one context, several endings     the ending with the best mean wins
    schema              several contexts, one ending     the context with the best mean wins
    language_modeling   one context, one ending          right if greedy decoding would write it

The tokens determine where the ending starts: after the common prefix of the options
(multiple_choice), or at the start of their common suffix (schema).
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
SHUFFLE_SEED = 1337  # nanochat's seeds, for the rows of a task and the examples of a row
EXAMPLES_SEED = 1234


class Option(NamedTuple):
    """An answer to score: the token ids before it, and its own."""

    prompt: array
    ending: array

    @property
    def can_be_scored(self) -> bool:
        """False if an option is a prefix or suffix of another one, so that a part is empty."""
        return len(self.prompt) > 0 and len(self.ending) > 0


def evaluate_core(llm, tasks: Iterable[dict]) -> dict:
    """Return accuracies, centred accuracies and CORE: {"results": {label: ...}, "centered_results":
    {label: ...}, "core_metric": ...}, the dict of nanochat's base_eval.

    tasks: from `read_bundle`; each is a dict with label, task_type (see above), num_fewshot,
    random_baseline (in percent), rows, and continuation_delimiter (default: a space) between the
    parts. A row has query, choices and gold (multiple_choice); context_options, continuation and
    gold (schema); or context and continuation. Raises ValueError that names a task and a row which
    cannot be scored, before anything is computed. Nothing is truncated, so llm needs a
    max_model_len for the longest row.
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
    """Like nanochat.core_eval.evaluate_task: return the accuracy of a live module in one task. The
    items are one batch. Under torch.distributed each process has a share of them, and all return
    the accuracy over all items.

    model, tokenizer: nanochat's; data: the rows; device: no effect, the module's is used;
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
    """Return the tasks of nanochat's eval_bundle: core.yaml, eval_meta_data.csv and eval_data/. The
    rows are shuffled as in nanochat, even if all are used, since the examples of an item depend on
    its position. max_per_task: the most rows of each task; -1: all."""
    try:
        import yaml
    except ModuleNotFoundError as error:
        message = "read_bundle needs the package yaml: pip install pyyaml"
        raise ModuleNotFoundError(message, name=error.name) from None
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
    """Return the options of all rows, or of those at `indices`. Raises ValueError, see
    `evaluate_core`."""
    check_task(task)
    rows = task["rows"]
    items = []
    for i in range(len(rows)) if indices is None else indices:
        row = rows[i]
        others = [*range(i), *range(i + 1, len(rows))]
        chosen = random.Random(EXAMPLES_SEED + i).sample(others, task["num_fewshot"])
        place = f"task {task['label']}, row {i}"
        try:
            texts = render_options(task, row, [rows[j] for j in chosen])
            token_ids = [llm.tokenizer.encode(text, bos=True) for text in texts]
            options = split_options(task["task_type"], token_ids)
            check_lengths(options, llm.max_model_len)
        except KeyError as error:
            raise ValueError(f"{place}: it has no {error}") from None
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{place}: {error}") from None
        items.append(options)
    return items


def check_task(task: dict) -> None:
    """Raise ValueError for a task with a missing or invalid field."""
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
    """Raise ValueError if an option is too long."""
    longest = max(len(option.prompt) + len(option.ending) for option in options)
    if longest > max_model_len:
        limit = f"max_model_len is {max_model_len}"
        raise ValueError(f"{longest} tokens, but {limit}: give LLM(..., max_model_len=)")


def render_options(task: dict, row: dict, examples: list[dict]) -> list[str]:
    """Return the full text of each option of a row. For language modeling, return the text without
    its ending and the text with it."""
    kind = task["task_type"]
    delimiter = task.get("continuation_delimiter", " ")
    shots = ""
    for example in examples:
        gold = 0 if kind == "language_modeling" else example["gold"]
        shots += f"{render_row(kind, delimiter, example)[gold]}\n\n"
    texts = [f"{shots}{text}" for text in render_row(kind, delimiter, row)]
    if kind == "language_modeling":
        # a space at the end would belong to the same token as the next word
        texts.insert(0, f"{shots}{str(row['context']).strip()}{delimiter}".strip())
    elif not 0 <= row["gold"] < len(texts):
        raise ValueError(f"gold is {row['gold']}, but there are {len(texts)} options")
    return texts


def render_row(kind: str, delimiter: str, row: dict) -> list[str]:
    """Return the text of each option of a row, without examples."""
    if kind == "multiple_choice":
        return [f"{row['query']}{delimiter}{choice}" for choice in row["choices"]]
    if kind == "schema":
        contexts = row["context_options"]
        return [f"{context}{delimiter}{row['continuation']}" for context in contexts]
    return [f"{str(row['context']).strip()}{delimiter}{row['continuation']}"]


def split_options(kind: str, token_ids: list[list[int]]) -> list[Option]:
    """Split texts into options. Equal prompts are one object."""
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
            raise ValueError("the tokens of the context are not a prefix of those with the ending")
    prompt = array("i", shared)
    return [Option(prompt, array("i", ids[len(shared) :])) for ids in token_ids]


# answers


def find_right(llm, task: dict, items: list[list[Option]]) -> list[bool]:
    """Return for each item whether the answer is right. All items are one batch."""
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
    """Return the output of LLM.judge for each option, None for options that cannot be scored."""
    scored = [option for option in options if option.can_be_scored]
    lists = {id(ids): ids.tolist() for option in scored for ids in option}  # one per prompt
    prompts = [lists[id(option.prompt)] for option in scored]
    endings = [lists[id(option.ending)] for option in scored]
    outputs = iter(llm.judge(prompts, endings, use_tqdm=True))
    return [next(outputs) if option.can_be_scored else None for option in options]


def mean_loss(output: dict | None) -> float:
    """Return the mean loss over an ending's tokens, or NaN if there are none, as in nanochat."""
    return nan if output is None else -sum(output["logprobs"]) / len(output["logprobs"])
