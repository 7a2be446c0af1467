"""A bulk job among replicas of the model on many machines, with Ray Data."""

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
    """An engine in an actor of Ray Data, which answers the rows of each batch that comes by:

        ds.map_batches(LLMPredictor, fn_constructor_kwargs={"model_path": "sft", "id_column": "id"},
                       compute=ray.data.ActorPoolStrategy(size=2), num_gpus=1, batch_size=1024)

    Its arguments are those of LLM and of Ask (task, params, prompt_column, ...). A row's tokens
    follow from its id; without one, from its place in its batch, which may be another the next
    time. Let a batch have some times max_batch_size rows, and `ds.sort("prompt")`, so that rows
    which begin alike find in the cache what was computed for the first of them.
    """

    def __init__(self, model_path=None, **options):
        from .. import LLM

        self.ask = Ask(**{k: options.pop(k) for k in vars(Ask()) if k in options})
        self.llm = LLM(model_path, **options)

    def __call__(self, batch: pyarrow.Table | dict) -> pyarrow.Table:
        """The batch, with the columns of its answers (rows.schema, without line and id) and error:
        null, or what is wrong with the row. They replace columns of the same name."""
        pa = import_pyarrow()
        if isinstance(batch, dict):
            batch = pa.table({name: list(values) for name, values in batch.items()})
        outcomes = answer(self.llm, enumerate(batch.to_pylist()), self.ask)
        rows = [outcome.row for outcome in sorted(outcomes, key=lambda outcome: outcome.number)]
        columns = schema(self.ask.task == "score").append(pa.field("error", pa.string()))
        found = to_table(rows, columns).drop_columns(["line", "id"])
        return pa.table({name: t[name] for t in (batch, found) for name in t.column_names})


class _Replica(LLMPredictor):
    """The same for a job: rows come in as rows.read gives them, outcomes go out. What is refused
    does so too, for Ray takes an actor that raises for a machine that broke."""

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
    """What is left of a job, in batches of (number, row), each for one engine; bad rows' outcomes.

    grouped: rows, 65,536 at a time, are sorted by their prompts before they are cut. Sorted texts
    are the leaves of the tree of their prefixes from left to right, the order in which a prefix
    cache loses least (Zheng et al., "SGLang", 2024, theorem 3.1).
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
    """Answer what is left of a job with `replicas` engines, each an actor of Ray Data's pool.

    options: LLM's arguments; address: of the cluster, by default the one that runs, else ("local":
    always) a new one here, with ports for this machine alone if this process imports Ray;
    gpus: of each engine, which without has one CPU; grouped: see make_batches. A batch whose node
    dies is computed again by another engine, and `Job.write` takes a row once. Raises ImportError
    without Ray, ValueError with what an engine refuses.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent
    if address == "local" or not (address or os.environ.get("RAY_ADDRESS")):
        # Ray reads this when it is imported. 0, its default on macOS and Windows, binds to loopback
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray.data
    except ImportError:
        raise ImportError(f"replicas need Ray: {how_to_install('ray')}") from None
    pa, blocks = import_pyarrow(), []
    for name in ("ray", "ray.data"):  # which tells its plans, where a job has its bar
        logging.getLogger(name).setLevel(logging.ERROR)
    if started := not ray.is_initialized():
        ray.init(address or None, log_to_driver=False, logging_level=logging.ERROR)
    try:
        # four batches for each engine at least, so that they are done at about the same time
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
