"""nanochat's chat_eval: accuracies of a model on ARC, MMLU, GSM8K and HumanEval.

    evaluate_chat(LLM("sft"), run_code=True)["chatcore_metric"]
    python -m microvllm.nanochat -i sft -a "ARC-Easy|GSM8K"

All problems of a task are one batch. The results are those of nanochat's own code: the same tokens
at temperature 0, and the letter with the largest logit in categorical tasks.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..environment import available_cpus
from .shares import llm_of, own_share, share_solved
from .tasks import TASKS, ChatTask, load_task

if TYPE_CHECKING:
    from .. import LLM

MAX_PROMPT = 2048  # nanochat cuts longer conversations here


class Sampling(NamedTuple):
    """Settings of generative tasks, with nanochat's names and defaults. A problem is solved if one
    of num_samples answers is right."""

    num_samples: int = 1
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int | None = 50


class Problems(NamedTuple):
    """The problems of a task that this process solves."""

    task: ChatTask
    conversations: list[dict]
    prompts: list[list[int]]


class TokenizerOfEngine:
    """The methods of nanochat's tokenizer that are needed here, for an engine's tokenizer."""

    def __init__(self, llm: LLM):
        self.encode = llm.tokenizer.encode
        self.decode = llm.tokenizer.decode
        self.render = llm.tokenizer.render_for_completion

    def render_for_completion(self, conversation: dict) -> list[int]:
        *prompt, assistant_start = self.render(conversation["messages"])
        return [*prompt[:MAX_PROMPT], assistant_start]


def evaluate_chat(
    llm: LLM,
    tasks: Iterable[str] = tuple(TASKS),
    *,
    data: str | Path | None = None,
    max_problems: int | None = None,
    run_code: bool = False,
    **sampling: Any,
) -> dict:
    """Return the accuracies of nanochat's tasks: {"results": {name: ...}, "centered_results":
    {name: ...}, "chatcore_metric": ...}. A centered accuracy is 0 for random answers and 1 for
    right ones. The metric is the mean over the tasks; for all five tasks it is nanochat's ChatCORE.

    tasks: names, see tasks.TASKS; data: a folder with their rows, see tasks.find_rows (default:
    nanochat's own); max_problems: the most problems of each task; run_code: allow HumanEval to run
    what the model writes, see execution.py (False: reject HumanEval); sampling: fields of Sampling.
    Raises ValueError, FileNotFoundError or ConnectionError before anything is computed.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise ValueError("evaluate_chat needs at least one task")
    loaded = [load_task(name, data) for name in names]
    for task in loaded:
        if task.runs_code and not run_code:
            raise ValueError(
                f"{task.name} runs programs that the model writes: give run_code=True if they can "
                "do no harm, or tasks= without it"
            )
    chosen = Sampling(**sampling)
    tokenizer = TokenizerOfEngine(llm)
    problems = [read_problems(llm, tokenizer, task, chosen, max_problems) for task in loaded]
    results = {}
    centered = {}
    for name, problem in zip(names, problems, strict=True):
        chance = TASKS[name][-1]
        results[name] = find_accuracy(llm, tokenizer, problem, chosen)
        centered[name] = (results[name] - chance) / (1 - chance)
    metric = sum(centered.values()) / len(centered)
    return {"results": results, "centered_results": centered, "chatcore_metric": metric}


def run_chat_eval(
    task_name: str | ChatTask,
    model,
    tokenizer,
    engine,
    batch_size: int | None = None,
    max_problems: int | None = None,
    **sampling: Any,
) -> float:
    """Like nanochat's scripts.chat_eval.run_chat_eval: return the accuracy of a live module.

    task_name: a name in TASKS, or a task object of nanochat; model, tokenizer: nanochat's; engine:
    this package's Engine of the two, or any other object; batch_size: no effect, since all problems
    are one batch; sampling: fields of Sampling. As in nanochat, HumanEval runs what the model
    writes. Under torch.distributed each process solves its share, and all return the accuracy over
    all problems.
    """
    task = load_task(task_name) if isinstance(task_name, str) else task_name
    chosen = Sampling(**sampling)
    with llm_of(model, tokenizer, engine) as llm:
        problems = read_problems(llm, tokenizer, task, chosen, max_problems)
        return find_accuracy(llm, tokenizer, problems, chosen)


# problems


def read_problems(
    llm: LLM, tokenizer, task: ChatTask, sampling: Sampling, max_problems: int | None
) -> Problems:
    """Return this process's share of the problems of a task. Raises ValueError if there are none,
    or if one is too long."""
    if max_problems is not None and max_problems < 1:
        raise ValueError(f"max_problems must be None or at least 1, got {max_problems}")
    num_problems = len(task) if max_problems is None else min(len(task), max_problems)
    if num_problems == 0:
        raise ValueError(f"the task {task!r:.80} has no problems")
    conversations = [task[i] for i in own_share(llm, num_problems)]
    prompts = [tokenizer.render_for_completion(conversation) for conversation in conversations]
    num_new = 1 if task.eval_type == "categorical" else sampling.max_new_tokens
    longest = max(map(len, prompts), default=0)
    if longest + num_new > llm.max_model_len:
        raise ValueError(
            f"a prompt of {longest} tokens and {num_new} new ones exceed max_model_len="
            f"{llm.max_model_len}: give LLM(..., max_model_len={longest + num_new})"
        )
    return Problems(task, conversations, prompts)


def find_accuracy(llm: LLM, tokenizer, problems: Problems, sampling: Sampling) -> float:
    """Return the share of solved problems of a task, over all processes."""
    if problems.task.eval_type == "categorical":
        is_solved = choose_letters(llm, tokenizer, problems)
    elif problems.task.eval_type == "generative":
        is_solved = write_answers(llm, tokenizer, problems, sampling)
    else:
        raise ValueError(f"eval_type is {problems.task.eval_type!r}, not categorical or generative")
    return share_solved(llm, is_solved)


def choose_letters(llm: LLM, tokenizer, problems: Problems) -> list[bool]:
    """For each problem, let the model choose a letter greedily. Returns whether it is right."""
    letter_lists = [conversation["letters"] for conversation in problems.conversations]
    token_ids = {
        letter: letter_token(tokenizer, letter)
        for letter in {letter for letters in letter_lists for letter in letters}
    }
    params = [
        llm.params_class(
            temperature=0,
            max_tokens=1,
            ignore_eos=True,
            allowed_token_ids=[token_ids[letter] for letter in letters],
        )
        for letters in letter_lists
    ]
    outputs = llm.generate(problems.prompts, params, use_tqdm=False)
    is_right = []
    for conversation, output in zip(problems.conversations, outputs, strict=True):
        (token_id,) = output["token_ids"]
        letters = [x for x in conversation["letters"] if token_ids[x] == token_id]
        is_right.append(bool(problems.task.evaluate(conversation, letters[0])))
    return is_right


def letter_token(tokenizer, letter: str) -> int:
    """Return the token of a letter. Raises ValueError if it is not a single token."""
    token_ids = tokenizer.encode(letter)
    if len(token_ids) != 1:
        raise ValueError(f"the letter {letter!r} is {len(token_ids)} tokens, not one")
    return token_ids[0]


def write_answers(llm: LLM, tokenizer, problems: Problems, sampling: Sampling) -> list[bool]:
    """For each problem, let the model write answers. Returns whether one of them is right."""
    if not problems.prompts:
        return []
    results, _ = llm.generate_batch(
        problems.prompts,
        num_samples=sampling.num_samples,
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
    )
    answers = [
        [tokenizer.decode(sequence[len(prompt) :]) for sequence in sequences]
        for prompt, sequences in zip(problems.prompts, results, strict=True)
    ]

    def is_solved(conversation: dict, texts: list[str]) -> bool:
        outcomes = [problems.task.evaluate(conversation, text) for text in texts]
        return any(outcomes)

    # threads, since tasks run programs in processes of their own
    with ThreadPoolExecutor(available_cpus()) as pool:
        return list(pool.map(is_solved, problems.conversations, answers))
