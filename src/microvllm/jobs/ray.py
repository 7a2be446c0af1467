"""Bulk jobs on replicas of the model, on one or many machines, with Ray Data."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from ..environment import how_to_install
from .job import Ask, Job, Outcome, answer, failed
from .rows import import_pyarrow, parse, schema, to_table

if TYPE_CHECKING:
    import pyarrow


class LLMPredictor:
    """An engine in an actor of Ray Data, which answers the rows of each batch:

        ds.map_batches(LLMPredictor, fn_constructor_kwargs={"model_path": "sft", "id_column": "id"},
                       compute=ray.data.ActorPoolStrategy(size=2), num_gpus=1, batch_size=1024)

    Its arguments are those of LLM and of Ask (task, params, prompt_column, ...). A row's tokens
    depend on its id. Without an id they depend on its position in its batch, which may differ in
    another run. A batch should have several times max_batch_size rows. `ds.sort("prompt")` puts
    rows with equal prefixes next to each other, so that they hit the prefix cache.
    """

    def __init__(self, model_path=None, **options):
        from .. import LLM

        self.ask = Ask(**{k: options.pop(k) for k in vars(Ask()) if k in options})
        self.llm = LLM(model_path, **options)

    def __call__(self, batch: pyarrow.Table | dict) -> pyarrow.Table:
        """Return the batch with columns for its answers (rows.schema without line and id) and error
        (null, or the problem of the row). They replace columns of the same name."""
        pa = import_pyarrow()
        if isinstance(batch, dict):
            batch = pa.table({name: list(values) for name, values in batch.items()})
        outcomes = answer(self.llm, enumerate(batch.to_pylist()), self.ask)
        rows = [outcome.row for outcome in sorted(outcomes, key=lambda outcome: outcome.number)]
        columns = schema(self.ask.task == "score").append(pa.field("error", pa.string()))
        answers = to_table(rows, columns).drop_columns(["line", "id"])
        return pa.table({name: t[name] for t in (batch, answers) for name in t.column_names})


class _Replica(LLMPredictor):
    """The same for a job: takes rows in the form of rows.read, and returns outcomes. Errors of the
    constructor are returned as well, since Ray treats an actor that raises as a broken machine."""

    def __init__(self, *args, **options):
        self.refused = None
        try:
            super().__init__(*args, **options)
        except (ValueError, TypeError, OSError, ImportError) as error:
            self.refused = str(error)

    def __call__(self, batch: pyarrow.Table) -> dict:
        if self.refused:
            return {"outcome": [json.dumps(self.refused)]}
        rows = zip(*(batch[name].to_pylist() for name in ("number", "row")), strict=True)
        return {"outcome": [json.dumps(outcome) for outcome in answer(self.llm, rows, self.ask)]}


def make_batches(job: Job, size: int, grouped: bool = True) -> Iterator[list[tuple] | Outcome]:
    """Yield the open rows of a job in batches of (number, row), one batch per engine call, and the
    outcomes of bad rows.

    grouped: sort rows by their prompts, 65,536 at a time, before cutting batches. Sorted texts are
    the leaves of their prefix tree from left to right, the order with the most prefix cache hits
    (Zheng et al., "SGLang", 2024, theorem 3.1).
    """
    pending = job.pending()
    while window := list(islice(pending, 2**16)):
        rows = []
        for number, raw in window:
            try:
                prompt = parse(raw).get(job.ask.prompt_column)
            except ValueError as error:
                yield failed(number, error)
                continue
            raw = raw if isinstance(raw, bytes) else json.dumps(raw, default=str).encode()
            rows.append((prompt if isinstance(prompt, str) else json.dumps(prompt), number, raw))
        if grouped:
            rows.sort()
        for start in range(0, len(rows), size):
            yield [row[1:] for row in rows[start : start + size]]


def answer_on_ray(
    job: Job, options: dict, address: str = "", replicas: int = 1, gpus: float = 0,
    grouped: bool = True,
) -> Iterator[Outcome]:  # fmt: skip
    """Answer the open rows of a job with `replicas` engines, each an actor in Ray Data's pool.

    options: LLM's arguments; address: the cluster's (default: the running one, or else a new local
    one; "local": always a new one). If this process imports Ray for it, a local cluster has ports
    only for this machine. gpus: GPUs per engine; 0: each engine has one CPU; grouped: see
    make_batches. If a node dies, another engine computes its batch again, and `Job.write` stores
    each row once. Raises ImportError without Ray, ValueError with the error of an engine.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    if address == "local" or not (address or os.environ.get("RAY_ADDRESS")):
        # read when Ray is imported. 0, the default on macOS and Windows, binds to loopback
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray.data
    except ImportError:
        raise ImportError(f"replicas need Ray: {how_to_install('ray')}") from None
    pa, blocks = import_pyarrow(), []
    for name in ("ray", "ray.data"):  # they would print plans over the job's progress bar
        logging.getLogger(name).setLevel(logging.ERROR)
    if started := not ray.is_initialized():
        ray.init(address or None, log_to_driver=False, logging_level=logging.ERROR)
    try:
        # at least four batches per engine, so that all engines finish at about the same time
        size = max(1, min(1024, (job.num_rows - job.num_done) // (4 * replicas)))
        for batch in make_batches(job, size, grouped):
            if isinstance(batch, Outcome):
                yield batch
            else:
                numbers, rows = zip(*batch, strict=True)
                blocks.append(ray.put(pa.table({"number": numbers, "row": rows})))
        if not blocks:
            return
        ray.data.DataContext.get_current().enable_progress_bars = False
        outcomes = ray.data.from_arrow_refs(blocks).map_batches(
            _Replica, fn_constructor_kwargs={**options, **vars(job.ask)}, batch_size=None,
            batch_format="pyarrow", compute=ray.data.ActorPoolStrategy(size=replicas),
            num_gpus=gpus or None, num_cpus=None if gpus else options.get("num_threads") or 1,
        )  # fmt: skip
        for batch in outcomes.iter_batches(batch_size=None, batch_format="pyarrow"):
            for text in batch["outcome"].to_pylist():
                outcome = json.loads(text)
                if isinstance(outcome, str):
                    raise ValueError(f"a replica: {outcome}")
                yield Outcome(*outcome)
    finally:
        if started:
            ray.shutdown()
