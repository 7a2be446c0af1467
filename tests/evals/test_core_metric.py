"""CORE is what its definition says, computed item by item from the logits of the core's model."""

import csv
import functools
import json
import math
import random
from itertools import takewhile

import pytest
import torch
from helpers.batches import hand_made_batch
from helpers.goldens import MODEL
from helpers.nanochat_engines import Methods

from microvllm import LLM
from microvllm.attention import PagedKVCache
from microvllm.checkpoint import load_model
from microvllm.nanochat import evaluate_core, evaluate_task, read_bundle
from microvllm.sampler import cap_logits

pytestmark = pytest.mark.usefixtures("one_thread")
BOOKS = {
    "Dracula": "Bram Stoker", "Emma": "Jane Austen", "Moby Dick": "Herman Melville",
    "Oliver Twist": "Charles Dickens", "Frankenstein": "Mary Shelley", "Ivanhoe": "Walter Scott",
}  # fmt: skip


def choice_rows() -> list[dict]:
    """Endings of several lengths; some begin others, so that nothing of them is left to score."""
    names, draw, rows = [*BOOKS.values()], random.Random(0), []
    for book, author in BOOKS.items():
        choices = draw.sample([name for name in names if name != author], 3)
        choices.insert(gold := draw.randrange(4), author)
        rows.append({"query": f"Who wrote {book}? It was", "choices": choices, "gold": gold})
    rows.append({"query": "He wrote", "choices": ["Emma and Persuasion", "Emma"], "gold": 1})
    rows.append({"query": "Two and two are", "choices": [4, 5], "gold": 0})
    return rows


def schema_rows() -> list[dict]:
    rows = [
        {
            "context_options": [f"{author} wrote {book}, and", f"A cat wrote {book}, and"],
            "continuation": f"{author} was a famous author.",
            "gold": 0,
        }
        for book, author in BOOKS.items()
    ]
    rows.append({"context_options": ["The sea", "The sea"], "continuation": "is deep", "gold": 1})
    return rows


def language_rows() -> list[dict]:
    """The first are what the model writes."""
    with LLM(MODEL, device="cpu", num_blocks=40) as llm:
        params = llm.params_class(temperature=0, max_tokens=3)
        texts = ["It was the best of", "The old man looked at the", "She did not know what to"]
        outputs = llm.generate(texts, params, use_tqdm=False)
    rows = [
        {"context": f" {text}  ", "continuation": output["text"].lstrip()}
        for text, output in zip(texts, outputs, strict=True)
    ]
    return [*rows, {"context": "Once upon a", "continuation": "xylophone"}]


def task(kind: str, rows: list[dict], **given) -> dict:
    return {
        "label": f"my {kind}", "task_type": kind, "num_fewshot": 2, "random_baseline": 25.0,
        "continuation_delimiter": " ", "rows": rows,
    } | given  # fmt: skip


@pytest.fixture(scope="module")
def llm():
    with LLM(MODEL, device="cpu", num_blocks=600) as llm:
        yield llm


def shared(sequences: list[list[int]]) -> int:
    """How many tokens all begin with."""
    return len([*takewhile(lambda column: len({*column}) == 1, zip(*sequences, strict=False))])


@functools.cache
def plain():
    """The core's own model."""
    return load_model(MODEL)


def by_definition(llm, task: dict) -> list[bool]:
    """Each item of a task, one text at a time."""
    model, encode, rows = plain(), llm.tokenizer.encode, task["rows"]
    delimiter, kind = task["continuation_delimiter"], task["task_type"]

    def solved(row):
        if kind == "multiple_choice":
            return f"{row['query']}{delimiter}{row['choices'][row['gold']]}"
        if kind == "schema":
            return f"{row['context_options'][row['gold']]}{delimiter}{row['continuation']}"
        return f"{row['context'].strip()}{delimiter}{row['continuation']}"

    def logits(ids):
        batch = hand_made_batch([(ids, 0, len(ids), range(1, 80))], 16)
        cache = PagedKVCache(model.config, 80, 16, model.dtype, model.device)
        with torch.inference_mode():
            return cap_logits(model.logits(model.forward(batch, cache)), model.recipe.softcap)

    right = []
    for i, row in enumerate(rows):
        rest = [j for j in range(len(rows)) if j != i]
        drawn = random.Random(1234 + i).sample(rest, task["num_fewshot"])
        shots = "".join(f"{solved(rows[j])}\n\n" for j in drawn)
        if kind == "language_modeling":
            text = f"{shots}{row['context'].strip()}{delimiter}"
            head = encode(text.strip(), bos=True)
            ids = encode(text + row["continuation"], bos=True)
            wanted = ids[len(head) :]
            right.append(logits(ids).argmax(-1)[len(head) - 1 : -1].tolist() == wanted)
            continue
        if kind == "multiple_choice":
            texts = [f"{shots}{row['query']}{delimiter}{choice}" for choice in row["choices"]]
        else:
            tail = f"{delimiter}{row['continuation']}"
            texts = [f"{shots}{context}{tail}" for context in row["context_options"]]
        options, losses = [encode(text, bos=True) for text in texts], []
        for ids in options:
            start = shared(options)
            if kind == "schema":
                start = len(ids) - shared([option[::-1] for option in options])
            scores = logits(ids).log_softmax(-1)[range(len(ids) - 1), ids[1:]][start - 1 :]
            losses.append(float(-scores.mean()) if 0 < start < len(ids) else math.nan)
        right.append(losses.index(min(losses)) == row["gold"])
    return right


ROWS = {"multiple_choice": choice_rows, "schema": schema_rows, "language_modeling": language_rows}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("count", [0, 2])
def test_accuracies_are_those_of_the_definition(llm, kind, count):
    mine = task(kind, ROWS[kind](), num_fewshot=count)
    wanted = by_definition(llm, mine)
    assert evaluate_core(llm, [mine])["results"] == {mine["label"]: sum(wanted) / len(wanted)}
    print(kind, count, sum(wanted), "of", len(wanted))
    if count == 0 and kind != "schema":
        assert 0 < sum(wanted) < len(wanted)


def test_core_is_the_mean_of_the_centred_accuracies(llm):
    kinds = enumerate(ROWS.items())
    tasks = [task(kind, rows(), random_baseline=10.0 * i) for i, (kind, rows) in kinds]
    found = evaluate_core(llm, tasks)
    for i, (label, accuracy) in enumerate(found["results"].items()):
        centred = (accuracy - i / 10) / (1 - i / 10)
        assert found["centered_results"][label] == pytest.approx(centred)
    mean = sum(found["centered_results"].values()) / 3
    assert found["core_metric"] == pytest.approx(mean) and len(found["results"]) == 3


def test_the_examples_in_front_are_computed_once_for_all_options(llm):
    mine = task("multiple_choice", choice_rows()[:6], num_fewshot=5)
    before = llm.stats()
    evaluate_core(llm, [mine])
    stats = {name: count - before[name] for name, count in llm.stats().items()}
    assert stats["requests"] == 24 and stats["cached_tokens"] > stats["prompt_tokens"] / 2
    assert stats["steps"] < 6


def test_nanochat_s_bundle_is_read_as_nanochat_shuffles_it(llm, tmp_path):
    rows = choice_rows()
    (tmp_path / "eval_data" / "books").mkdir(parents=True)
    data = tmp_path / "eval_data" / "books" / "choice.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "core.yaml").write_text(
        "icl_tasks:\n- label: books\n  dataset_uri: books/choice.jsonl\n  num_fewshot: [3]\n"
        '  icl_task_type: multiple_choice\n  continuation_delimiter: "\\nAnswer: "\n'
        "- label: again\n  dataset_uri: books/choice.jsonl\n  num_fewshot: [0]\n"
        "  icl_task_type: multiple_choice\n"
    )
    with open(tmp_path / "eval_meta_data.csv", "w", newline="") as file:
        names = ["Eval Task", "Task Category", "Random baseline"]
        csv.writer(file).writerows([names, ["again", "", "50"], ["books", "", "25.0"]])
    first, second = read_bundle(tmp_path)
    random.Random(1337).shuffle(rows)
    assert first == task(
        "multiple_choice", rows, label="books", num_fewshot=3, continuation_delimiter="\nAnswer: "
    )
    assert second == task(
        "multiple_choice", rows, label="again", num_fewshot=0, random_baseline=50.0
    )
    assert [len(x["rows"]) for x in read_bundle(str(tmp_path), max_per_task=5)] == [5, 5]
    found = evaluate_core(llm, read_bundle(tmp_path, max_per_task=4))
    wanted = [by_definition(llm, x) for x in read_bundle(tmp_path, max_per_task=4)]
    assert [*found["results"].values()] == [sum(w) / 4 for w in wanted]
    with pytest.raises(FileNotFoundError, match="core.yaml"):
        read_bundle(tmp_path / "absent")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"task_type": "essay"}, "task_type is 'essay'"),
        ({"num_fewshot": 8}, "8 rows are too few for num_fewshot=8"),
        ({"rows": []}, "0 rows are too few"),
        ({"rows": [{"query": "a", "choices": ["b", "c"]}]}, "row 0: it has no 'gold'"),
        ({"rows": [{"query": "a", "choices": ["b", "c"], "gold": 2}]}, "there are 2 options"),
        ({"rows": [{"query": "a " * 2000, "choices": ["b"], "gold": 0}]}, "max_model_len is 1024"),
        ({"task_type": "language_modeling", "continuation_delimiter": "",
          "rows": [{"context": "The cap", "continuation": "tain"}]}, "row 0: the tokens of the"),
        ({"rows": None}, "it has no rows"),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_asked_is_named_before_anything_is_computed(llm, change, named):
    count = 0 if "rows" in change else 2
    bad = task("multiple_choice", choice_rows(), label="bad", num_fewshot=count) | change
    if bad["rows"] is None:
        del bad["rows"]
    before = llm.stats()["steps"]
    with pytest.raises(ValueError, match=f"task bad.*{named}"):
        evaluate_core(llm, [task("schema", schema_rows()), bad])
    assert llm.stats()["steps"] == before
    with pytest.raises(ValueError, match="at least one task"):
        evaluate_core(llm, [])


@pytest.mark.parametrize("kind", ROWS)
def test_nanochats_function_for_a_task_gives_the_same_accuracy(kind, llm):
    rows = ROWS[kind]()
    meta = {"task_type": kind, "num_fewshot": 1, "continuation_delimiter": " "}
    expected = evaluate_core(llm, [task(kind, rows, num_fewshot=1)])["results"][f"my {kind}"]
    assert evaluate_task(plain(), Methods(llm.tokenizer), rows, "cpu", meta) == expected
