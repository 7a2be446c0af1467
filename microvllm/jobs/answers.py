"""Rows become answers: what is asked of a row, and one engine that is kept full of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from .rows import parse

if TYPE_CHECKING:
    from .. import LLM, SamplingParams


@dataclass(frozen=True)
class Ask:
    """What is wanted of the rows, which are dicts; the same in one process and in every replica.

    task: "chat" (the prompt is a text, the user's, or a list of messages), "completion" (a text) or
    "score" (either, with a continuation or a list of them); all take token ids. None is chat where
    the model can, else completion. raw: plain text, also where the model can chat; params: of
    SamplingParams, for rows without their own; seed: the job's. The rest are names of columns:
    without an id_column a row's id is its "id", or where it has none its line number.
    """

    task: str | None = None
    raw: bool = False
    params: dict = field(default_factory=dict)
    seed: int = 0
    prompt_column: str = "prompt"
    id_column: str | None = None
    continuation_column: str = "continuation"
    params_column: str = "params"

    def __post_init__(self):
        if self.task not in (None, "chat", "completion", "score"):
            raise ValueError(f"task must be chat, completion or score, got {self.task!r:.80}")

    def row_id(self, row: dict, number: int) -> str | int:
        """The id of the row on line `number`. Raises ValueError where it is neither a text nor an
        integer."""
        found = row.get(self.id_column or "id")
        if found is None and self.id_column is None:
            return number
        if isinstance(found, bool) or not isinstance(found, (str, int)):
            column = self.id_column or "id"
            raise ValueError(f"its {column!r} must be a text or an integer, got {found!r:.80}")
        str(found).encode()  # half a surrogate pair has no UTF-8
        return found


class Outcome(NamedTuple):
    """What became of a row."""

    number: int  # its line, or its place in a Parquet file, from 1
    row: dict  # for the output, or for the errors: beginning with line and, if it is known, id
    bad: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0


@dataclass
class _Work:
    """A row whose requests are under way."""

    number: int
    id: str | int
    requests: list[int] = field(default_factory=list)
    outputs: dict[int, dict] = field(default_factory=dict)  # by request


def answer(llm: LLM, rows: Iterable[tuple[int, object]], ask: Ask) -> Iterator[Outcome]:
    """Answer rows, as rows.read gives them, in the order in which they are done.

    As many are taken as keep the engine full, no more. A bad row's outcome says so. Leaving the
    loop aborts what is unfinished. Raises ValueError if the model cannot do the task.
    """
    chat = llm.tokenizer.has_chat and not ask.raw and ask.task != "completion"
    if ask.task == "chat" and not chat:
        raise ValueError("no chat with raw, or with a model that has no chat tokens: do completion")
    rows, waiting = iter(rows), {}
    try:
        while True:
            for number, raw in islice(rows, max(0, 2 * llm.max_batch_size - len(waiting))):
                work = _Work(number, None)
                try:
                    _submit(llm, work, parse(raw), ask, chat)
                except (ValueError, TypeError) as error:
                    llm.abort(*work.requests)
                    yield failed(number, error, work.id)
                else:
                    waiting.update(dict.fromkeys(work.requests, work))
            if not waiting:
                return
            for output in llm.step():
                if work := waiting.pop(output["request_id"], None):
                    work.outputs[output["request_id"]] = output
                    if len(work.outputs) == len(work.requests):
                        yield _outcome(work, ask)
    finally:
        llm.abort(*waiting)


def _submit(llm: LLM, work: _Work, row: dict, ask: Ask, chat: bool) -> None:
    """Queue what the row asks for; chat: its prompt is a conversation, or the user's turn of one.
    Raises ValueError or TypeError that names what is wrong."""
    work.id = ask.row_id(row, work.number)
    prompt = row.get(ask.prompt_column)
    if prompt is None:
        raise ValueError(f"no {ask.prompt_column!r} in it, which has {', '.join(row):.200}")
    if chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        if not chat:
            raise ValueError("a list of messages is for task chat, and for a model that has it")
        prompt = llm.tokenizer.render_for_completion(prompt)
    if ask.task == "score":
        tails = row.get(ask.continuation_column)
        tails = [tails] if isinstance(tails, str) else tails
        if not isinstance(tails, list) or not tails:
            column = ask.continuation_column
            raise ValueError(f"its {column!r} must be a text or a list of them, got {tails!r:.80}")
        for tail in tails:
            work.requests.append(llm.add_request(prompt, continuation=tail))
    else:
        params = _params(row.get(ask.params_column), ask, work.id)
        tools = {"tools": True} if chat and "tools" in llm.request_options else {}
        work.requests.append(llm.add_request(prompt, params, **tools))


def _params(own: object, ask: Ask, row_id: str | int) -> SamplingParams:
    """The SamplingParams of a row: the job's, changed by its own."""
    from .. import SamplingParams

    if not isinstance(own, (dict, type(None))):
        raise TypeError(f"its {ask.params_column!r} must be an object, got {own!r:.80}")
    given = ask.params | {k: v for k, v in (own or {}).items() if v is not None}
    known = {f.name for f in fields(SamplingParams) if f.init} - {"logits_processor"}
    if unknown := given.keys() - known:
        names = ", ".join(sorted(known))
        raise ValueError(f"unknown sampling parameter {min(unknown)!r}: there are {names}")
    if "seed" not in given:
        given["seed"] = xxhash.xxh3_64_intdigest(json.dumps([ask.seed, row_id]).encode())
    if isinstance(given.get("logit_bias"), dict):  # JSON's keys are texts
        given["logit_bias"] = {int(k): v for k, v in given["logit_bias"].items()}
    return SamplingParams(**given)


def failed(number: int, error: object, row_id: str | int | None = None) -> Outcome:
    """The outcome of a bad row."""
    known = {} if row_id is None else {"id": row_id}
    return Outcome(number, {"line": number, **known, "error": str(error)}, bad=True)


def _outcome(work: _Work, ask: Ask) -> Outcome:
    """What the output says of a row whose requests are done."""
    outputs = [work.outputs[i] for i in work.requests]  # several continuations, or one prompt
    asked = sum(len(o["prompt_token_ids"]) for o in outputs)
    cached, row = sum(o["num_cached_tokens"] for o in outputs), {"line": work.number, "id": work.id}
    if ask.task == "score":
        row["continuations"] = [
            {"total": sum(p), "per_token": sum(p) / len(p), "logprobs": p}
            for p in (output["logprobs"] for output in outputs)
        ]
        return Outcome(work.number, row, False, asked, cached)
    shown = ("text", "token_ids", "finish_reason", "stop_reason", "logprobs")
    samples = [{k: s[k] for k in shown if k in s} for s in outputs[0]["samples"]]
    for sample in samples:
        if sample["finish_reason"] == "error":
            return failed(work.number, sample["stop_reason"], work.id)
        if "logprobs" in sample:  # JSON has no -Infinity, which is what could not be drawn
            text = json.dumps(sample["logprobs"])
            sample["logprobs"] = json.loads(text, parse_constant=lambda _: None)
    row |= samples[0] | ({"samples": samples} if len(samples) > 1 else {})
    new = sum(len(sample["token_ids"]) for sample in samples)
    return Outcome(work.number, row, False, asked, cached, new)
