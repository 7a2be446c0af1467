"""CORE, the metric of base models: accuracy in 22 tasks, as nanochat measures it.

    evaluate_core(LLM("base"), read_bundle("~/.cache/nanochat/eval_bundle"))["core_metric"]

A task's accuracy is centred: 0 is guessing, 1 is perfect. CORE is the mean over the tasks (Li et
al. 2024, "DataComp-LM"). Each item comes behind num_fewshot solved ones, drawn at random from the
others, and is answered by log-probabilities:

    multiple_choice     one context, several endings     the ending with the best mean wins
    schema              several contexts, one ending     the context with the best mean wins
    language_modeling   one context, one ending          right if greedy decoding would write it

Where the ending begins is seen in the tokens: it is what the options do not share at the beginning
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

KINDS = "multiple_choice", "schema", "language_modeling"
FIELDS = "label", "task_type", "num_fewshot", "random_baseline", "rows"


def evaluate_core(llm, tasks: Iterable[dict]) -> dict:
    """Accuracies, the same centred, and CORE: {"results": {label: ...}, "centered_results": {label:
    ...}, "core_metric": ...}, the dict of nanochat's base_eval.

    tasks: as `read_bundle` gives them, each a dict with label, task_type (see above), num_fewshot,
    random_baseline (in percent), rows, and continuation_delimiter (by default a space) between the
    parts. A row has query, choices and gold (multiple_choice); context_options, continuation and
    gold (schema); or context and continuation. Raises ValueError, naming the task and the row, for
    one that cannot be asked, before anything is computed: nothing is cut, so llm needs a
    max_model_len for the longest.
    """
    results, centered = {}, {}
    for task, items in [(task, _items(llm, task)) for task in tasks]:
        accuracy = sum(_answers(llm, task, items)) / len(items)
        chance = 0.01 * task["random_baseline"]
        results[task["label"]] = accuracy
        centered[task["label"]] = (accuracy - chance) / (1 - chance)
    if not results:
        raise ValueError("evaluate_core needs at least one task")
    core = sum(centered.values()) / len(centered)
    return {"results": results, "centered_results": centered, "core_metric": core}


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
    for given in config["icl_tasks"]:
        with open(folder / "eval_data" / given["dataset_uri"], encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        random.Random(1337).shuffle(rows)
        tasks.append(
            {
                "label": given["label"],
                "task_type": given["icl_task_type"],
                "num_fewshot": given["num_fewshot"][0],
                "continuation_delimiter": given.get("continuation_delimiter", " "),
                "random_baseline": chances[given["label"]],
                "rows": rows[:max_per_task] if max_per_task > 0 else rows,
            }
        )
    return tasks


def _items(llm, task: dict) -> list[list[tuple[array, array]]]:
    """Of each row its options, (prompt, ending) in token ids; checked."""
    label, items = task.get("label"), []
    if missing := [name for name in FIELDS if name not in task]:
        raise ValueError(f"task {label}: it has no {', '.join(missing)}")
    kind, rows, count = task["task_type"], task["rows"], task["num_fewshot"]
    if kind not in KINDS:
        raise ValueError(f"task {label}: task_type is {kind!r}, not one of {', '.join(KINDS)}")
    if not 0 <= count < len(rows):
        raise ValueError(f"task {label}: {len(rows)} rows are too few for num_fewshot={count}")
    for i, row in enumerate(rows):
        others = random.Random(1234 + i).sample([*range(i), *range(i + 1, len(rows))], count)
        try:
            texts = _texts(task, row, [rows[j] for j in others])
            items.append(_split(kind, [llm.tokenizer.encode(text, bos=True) for text in texts]))
            longest = max(len(head) + len(tail) for head, tail in items[-1])
            if longest > llm.max_model_len:
                most = f"max_model_len is {llm.max_model_len}"
                raise ValueError(f"{longest} tokens, and {most}: give LLM(..., max_model_len=)")
        except KeyError as error:
            raise ValueError(f"task {label}, row {i}: it has no {error}") from None
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(f"task {label}, row {i}: {error}") from None
    return items


def _texts(task: dict, row: dict, examples: list[dict]) -> list[str]:
    """The full text of each option of a row; for language modeling the text without its ending and
    the one with it."""
    between, kind = task.get("continuation_delimiter", " "), task["task_type"]

    def options(row: dict) -> list[str]:
        if kind == "multiple_choice":
            return [f"{row['query']}{between}{choice}" for choice in row["choices"]]
        if kind == "schema":
            return [f"{x}{between}{row['continuation']}" for x in row["context_options"]]
        return [f"{str(row['context']).strip()}{between}{row['continuation']}"]

    gold = [example["gold"] if kind != KINDS[2] else 0 for example in examples]
    shots = [f"{options(x)[g]}\n\n" for x, g in zip(examples, gold, strict=True)]
    texts = ["".join([*shots, option]) for option in options(row)]
    if kind == "language_modeling":
        # without spaces at the end, which would be in one token with the word behind them
        texts.insert(0, "".join([*shots, f"{str(row['context']).strip()}{between}"]).strip())
    elif not 0 <= row["gold"] < len(texts):
        raise ValueError(f"gold is {row['gold']}, and there are {len(texts)} options")
    return texts


def _split(kind: str, options: list[list[int]]) -> list[tuple[array, array]]:
    """(prompt, ending) of the options, token ids; prompts that are equal are one object."""
    if kind == "schema":
        shared = len(commonprefix([ids[::-1] for ids in options]))
        starts = [len(ids) - shared for ids in options]
        return [
            (array("i", ids[:start]), array("i", ids[start:]))
            for ids, start in zip(options, starts, strict=True)
        ]
    head = commonprefix(options)
    if kind == "language_modeling":
        without, options = options[0], options[1:]
        if head != without or len(options[0]) == len(head):
            raise ValueError("the tokens of the context are no prefix of those with the ending")
    prompt = array("i", head)
    return [(prompt, array("i", ids[len(head) :])) for ids in options]


def _answers(llm, task: dict, items: list) -> list[bool]:
    """Is each item answered right? All are asked at once."""
    asked = [pair for options in items for pair in options if all(map(len, pair))]
    lists = {id(ids): ids.tolist() for pair in asked for ids in pair}  # one for equal prompts
    prompts, endings = ([lists[id(pair[part])] for pair in asked] for part in (0, 1))
    found, right = iter(llm.judge(prompts, endings, use_tqdm=True)), []
    for row, options in zip(task["rows"], items, strict=True):
        # an option that begins or ends another one leaves nothing to score: nanochat's mean is NaN
        outputs = [next(found) if all(map(len, pair)) else None for pair in options]
        if task["task_type"] == "language_modeling":
            right.append(all(outputs[0]["greedy"]))
            continue
        losses = [-sum(o["logprobs"]) / len(o["logprobs"]) if o else nan for o in outputs]
        right.append(losses.index(min(losses)) == row["gold"])
    return right
