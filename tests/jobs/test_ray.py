"""A job on two replicas of Ray Data, one of whose nodes is killed; and what sorted rows are for.

A real cluster of two nodes on this machine, each with a loopback address of its own.
"""

import json
import subprocess
import sys

import pytest
from helpers.goldens import MODEL, ROOT

from microvllm import LLM, SamplingParams, cli
from microvllm.cli.commands import encode
from microvllm.jobs import Ask, Job, LLMPredictor, Outcome, answer, carry_out
from microvllm.jobs.ray import make_batches

sys.path.insert(0, str(ROOT / "benchmarks"))

from bulk import FakeLLM, prompts_with_prefixes

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
ENGINE = {"num_blocks": 200, "max_batch_size": 8, "device": "cpu"}
FLAGS = ["--num-blocks", "200", "--max-batch-size", "8", "--device", "cpu", "--max-tokens", "24"]


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each: (the cluster, the node that may die)."""
    pytest.importorskip("ray.data", reason="needs pip install -e '.[ray]'")
    if sys.platform != "linux":
        pytest.skip("127.0.0.2 is an address of this machine on Linux only")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80_000_000}
    # a node that does not answer is given up soon, not after 15 s; and replicas get their share of
    # a busy machine, where Ray's workers would let everybody else go first
    system = {"health_check_period_ms": 300, "health_check_failure_threshold": 3}
    system |= {"worker_niceness": 0}
    head = {"node_ip_address": "127.0.0.2", "include_dashboard": False, "_system_config": system}
    cluster = Cluster(initialize_head=True, head_node_args=node | head)
    try:
        yield cluster, cluster.add_node(node_ip_address="127.0.0.3", **node)
    finally:
        cluster.shutdown()


@pytest.fixture(scope="module")
def questions():
    rows = json.loads((ROOT / "models" / "prompts" / "oldbooks_instructions.json").read_text())
    return [row["instruction"] for row in rows[:96]]


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_node_is_killed_half_way_and_nothing_is_lost_or_twice(
    cluster, questions, tmp_path, monkeypatch
):
    import ray

    cluster, node = cluster
    source = tmp_path / "in.jsonl"
    rows = [{"id": f"row {i}", "prompt": text} for i, text in enumerate(questions)]
    rows.insert(50, {"id": "bad", "prompt": 1})
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write, written, engines = Job.write, [], []

    def write_and_kill(job, outcome: Outcome) -> bool:
        written.append(outcome.number)
        if len(written) == 12:  # of 97: the other engine has some under way, and more in its queue
            engines.append(2 - ray.available_resources().get("CPU", 0))
            cluster.remove_node(node, allow_graceful=False)
        return write(job, outcome)

    for where in ("alone", "cluster"):
        flags = ["batch", str(source), "-o", str(tmp_path / f"{where}.jsonl"), "--ordered", *FLAGS]
        if where == "cluster":
            monkeypatch.setattr(Job, "write", write_and_kill)
            flags += ["--ray", cluster.address, "--replicas", "2"]
        with pytest.raises(SystemExit) as stop:
            cli.main(flags)
        assert stop.value.code == 1, "there is a bad row"
    assert engines == [2] and not ray.is_initialized()
    assert (tmp_path / "cluster.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert len(read(tmp_path / "cluster.jsonl")) == 96
    assert [row["line"] for row in read(tmp_path / "cluster.jsonl.errors")] == [51]


def test_an_own_pipeline_and_a_refused_engine_on_the_node_that_is_left(
    cluster, questions, tmp_path, capsys
):
    import ray.data

    address = cluster[0].address
    ray.init(address, log_to_driver=False)
    try:
        rows = [{"key": i, "prompt": text, "text": "?"} for i, text in enumerate(questions[:20])]
        ask = {"id_column": "key", "params": {"temperature": 0, "max_tokens": 8}}
        found = ray.data.from_items([*rows, {"key": 20, "prompt": None, "text": "?"}]).map_batches(
            LLMPredictor, fn_constructor_kwargs={"model_path": str(MODEL), **ENGINE, **ask},
            batch_format="pyarrow", batch_size=16, compute=ray.data.ActorPoolStrategy(size=1),
        ).take_all()  # fmt: skip
    finally:
        ray.shutdown()
    answers = {row["key"]: row for row in found}
    assert len(found) == len(answers) == 21
    with LLM(MODEL, **ENGINE) as llm:
        prompts = [encode(llm, [row["prompt"]], raw=False)[0] for row in rows]
        wanted = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    for row, output in zip(rows, wanted, strict=True):
        assert list(answers[row["key"]]["token_ids"]) == output.token_ids
        assert answers[row["key"]]["text"] == output.text and not answers[row["key"]]["error"]
    assert "'prompt'" in answers[20]["error"] and answers[20]["text"] is None

    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out.jsonl"
    with pytest.raises(SystemExit) as stop:
        cli.main(["batch", str(source), "-o", str(output), "--ray", address, "--num-blocks", "1"])
    assert stop.value.code == 2 and not output.exists()
    assert "a replica: --num-blocks" in capsys.readouterr().err


LISTENERS = """
import json, os, sys
from contextlib import suppress
from pathlib import Path
from microvllm.jobs import Ask, Job
from microvllm.jobs.ray import answer_on_ray

job = Job(sys.argv[1], sys.argv[2], Ask("completion", params={"max_tokens": 1}), {})
options = {"model_path": sys.argv[3], "num_blocks": 40, "device": "cpu"}
outcomes = answer_on_ray(job, options, "local")
assert not next(outcomes).bad
parents = {}
for stat in Path("/proc").glob("[0-9]*/stat"):
    with suppress(OSError):  # it ended
        parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
ours = {os.getpid()}
while more := {child for child, parent in parents.items() if parent in ours} - ours:
    ours |= more
sockets = set()
for process in ours:
    for file in Path(f"/proc/{process}/fd").glob("*"):
        with suppress(OSError):  # it was closed
            kind, _, number = os.readlink(file).partition(":")
            if kind == "socket":  # a pipe's number may end like that of another process's socket
                sockets.add(number[1:-1])
found = []
for name in ("tcp", "tcp6"):
    for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
        _, place, _, state, *rest = line.split()
        if state == "0A" and rest[5] in sockets:
            found.append(place.split(":")[0])
print(json.dumps(found))
outcomes.close()
"""


def test_a_cluster_that_is_started_here_is_open_to_this_machine_alone(tmp_path):
    pytest.importorskip("ray.data", reason="needs pip install -e '.[ray]'")
    if sys.platform != "linux":
        pytest.skip("what listens is read from Linux's /proc")
    (tmp_path / "in.jsonl").write_text('{"prompt": "It was"}\n')
    words = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), str(MODEL)]
    command = [sys.executable, "-c", LISTENERS, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "0" * 24 + "01000000"}
    assert len(found) > 3 and set(found) <= loopback, found


# without Ray --------------------------------------------------------------------------------------


def make_job(folder, name: str, prompts: list, **params) -> Job:
    source = folder / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    ask = Ask("completion", params={"max_tokens": 1, "temperature": 0, **params})
    return Job(source, folder / f"{name}.jsonl", ask, {})


def test_batches_hold_each_row_once_and_neighbours_begin_alike(tmp_path):
    prompts = prompts_with_prefixes(groups=10, rows=8)
    job = make_job(tmp_path, "out", [*prompts, [1, 2], None])
    batches = list(make_batches(job, 8))
    numbers = [number for batch in batches for number, _ in batch]
    assert sorted(numbers) == list(range(1, 83)) and max(map(len, batches)) == 8
    groups = [{prompts[n - 1][:40] for n, _ in batch if n <= 80} for batch in batches]
    assert sum(map(len, groups)) <= 20, "ten groups of the size of a batch: two at most in each"
    unsorted = [number for batch in make_batches(job, 8, grouped=False) for number, _ in batch]
    assert unsorted == list(range(1, 83))
    # what a replica answers to the rows as they are sent is what one process answers
    found = [o for batch in batches for o in answer(FakeLLM(), batch, job.ask)]
    again = {o.number: o.row for o in answer(FakeLLM(), job.pending(), job.ask)}
    assert {outcome.number: outcome.row for outcome in found} == again
    carry_out(job, iter(found))
    assert list(make_batches(job, 8)) == []


def test_two_replicas_find_more_of_sorted_prompts_in_their_caches(tmp_path):
    """They get batches by turns, and have room for few of the prefixes."""
    prompts, hits, tokens = prompts_with_prefixes(groups=24, rows=8), {}, []
    for grouped in (True, False):
        job = make_job(tmp_path, str(grouped), prompts)
        engines = [LLM(MODEL, num_blocks=80, max_batch_size=4, device="cpu") for _ in range(2)]
        found = []
        for i, batch in enumerate(make_batches(job, 12, grouped)):
            found += answer(engines[i % 2], batch, job.ask)
        asked = sum(outcome.prompt_tokens for outcome in found)
        hits[grouped] = sum(outcome.cached_tokens for outcome in found) / asked
        tokens.append({outcome.number: outcome.row["token_ids"] for outcome in found})
    assert tokens[0] == tokens[1]
    assert hits[True] > 0.6 and hits[True] > 2 * hits[False], hits


def test_a_predictor_takes_columns_of_numpy_too():
    import numpy as np

    predictor = LLMPredictor(str(MODEL), **ENGINE, task="score", raw=True)
    batch = {"prompt": np.array(["It was", ""]), "continuation": np.array([" the best", " x"])}
    table = predictor({**batch, "place": np.arange(2)})
    assert table.column_names == ["prompt", "continuation", "place", "continuations", "error"]
    (scores,) = predictor.llm.score(["It was"], [" the best"])
    assert table["continuations"][0].as_py()[0]["logprobs"] == pytest.approx(scores, abs=1e-5)
    assert table["error"].to_pylist() == [None, None]
