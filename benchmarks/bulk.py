"""The overhead of a batch job, and the gain from sorted prompts.

    python benchmarks/bulk.py memory --rows 1000000
    python benchmarks/bulk.py routing --groups 48 --rows 16 --replicas 2

memory: the memory of a process that reads rows, answers them, writes the answers and finally sorts
them. A fake engine answers at once, so that only the job is measured.

routing: the share of prompt tokens that Ray's replicas find in their prefix caches, for rows sorted
by prompt and for rows in file order. Groups of prompts share prefixes, the file is shuffled, and
the pools are too small for all prefixes.
"""

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

from microvllm.jobs import Ask, Job, answer, carry_out

ROOT = Path(__file__).resolve().parent.parent


class FakeLLM:
    """A fake engine. Its tokens are a function of prompt and seed. A few requests end in each step,
    in random order. seconds: duration of a step."""

    tokenizer = SimpleNamespace(has_chat=False)

    def __init__(self, max_batch_size: int = 32, seconds: float = 0.0):
        self.max_batch_size, self.seconds = max_batch_size, seconds
        self.queue, self.count, self.order = deque(), 0, random.Random()

    def add_request(self, prompt, params=None, *, tools=False, continuation=None) -> int:
        if len(prompt) > 1000:
            raise ValueError(f"the prompt has {len(prompt)} tokens and max_model_len is 1000")
        self.count += 1
        self.queue.append((self.count, prompt, params, continuation))
        return self.count

    def step(self) -> list[dict]:
        time.sleep(self.seconds)
        self.queue.rotate(self.order.randrange(len(self.queue)))
        return [self._output(*self.queue.popleft()) for _ in range(min(4, len(self.queue)))]

    def _output(self, request, prompt, params, continuation) -> dict:
        output = {"request_id": request, "prompt_token_ids": prompt, "num_cached_tokens": 1}
        if continuation is not None:
            return output | {"logprobs": [-float(len(prompt)), -float(len(continuation))]}
        draw = random.Random(f"{prompt} {params.seed}")
        tokens = [draw.randrange(1000) for _ in range(params.max_tokens)]
        ends = {"finish_reason": "length", "stop_reason": "max_tokens"}
        sample = {"text": f"{tokens}", "token_ids": tokens, **ends}
        return output | sample | {"samples": [sample] * params.n}

    def abort(self, *requests: int) -> None:
        self.queue = deque(r for r in self.queue if r[0] not in requests)


def resident() -> float:
    """Memory of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1e3
    raise OSError("this benchmark needs Linux: /proc/self/status is missing")


def memory_curve(rows: int, output: Path, points: int = 20) -> list[tuple[int, float]]:
    """(finished rows, MB) at some points of a job of `rows` rows, and once more after sorting."""
    source = output.with_suffix(".in.jsonl")
    with open(source, "w") as file:
        for i in range(rows):
            file.write(
                json.dumps({"id": f"row {i}", "prompt": f"the prompt of row {i} " * 4}) + "\n"
            )
    import torch  # noqa: F401, so that its memory is not counted

    curve = [(0, resident())]
    job = Job(source, output, Ask(params={"max_tokens": 16}), {})
    curve.append((0, resident()))

    def outcomes():
        for outcome in answer(FakeLLM(), job.pending(), job.ask):
            yield outcome
            if job.num_done % (rows // points) == 0:
                curve.append((job.num_done, resident()))

    carry_out(job, outcomes(), ordered=True)
    return [*curve, (rows, resident())]


def prompts_with_prefixes(groups: int, rows: int) -> list[str]:
    """Prompts in random order. The prompts of a group share their first sixty words."""
    words = (ROOT / "models" / "README.md").read_text().split()
    draw, prompts = random.Random(0), []
    for _ in range(groups):
        prefix = " ".join(draw.choice(words) for _ in range(60))
        prompts += [f"{prefix} {draw.choice(words)} {i}" for i in range(rows)]
    draw.shuffle(prompts)
    return prompts


def routing(groups: int, rows: int, replicas: int, folder: Path) -> dict[str, dict]:
    """The counts of a job with sorted rows and of one in file order. "hit_rate" is the share of
    prompt tokens that the replicas find in their prefix caches."""
    from microvllm.jobs.ray import answer_on_ray

    prompts, results = prompts_with_prefixes(groups, rows), {}
    source = folder / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    ask = Ask("completion", params={"max_tokens": 8, "temperature": 0.8, "ignore_eos": True})
    options = {"model_path": str(ROOT / "models" / "oldbooks-d6"), "device": "cpu"}
    options |= {"num_blocks": 400, "max_batch_size": 16}
    for name, grouped in (("sorted", True), ("in file order", False)):
        job = Job(source, folder / f"{name}.jsonl", ask, options)
        outcomes = answer_on_ray(job, options, "local", replicas, grouped=grouped)
        counts = results[name] = carry_out(job, outcomes, ordered=True)
        counts["hit_rate"] = counts["cached_tokens"] / counts["prompt_tokens"]
    tokens = [
        [json.loads(line)["token_ids"] for line in open(folder / f"{name}.jsonl")]
        for name in results
    ]
    assert tokens[0] == tokens[1], "the order of rows changes the output"
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", choices=["memory", "routing"])
    text = "memory: number of rows (default: 1,000,000); routing: rows per group (default: 16)"
    parser.add_argument("--rows", type=int, help=text)
    parser.add_argument("--groups", type=int, default=48)
    parser.add_argument("--replicas", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.benchmark == "memory":
            began = time.perf_counter()
            curve = memory_curve(args.rows or 10**6, Path(folder) / "out.jsonl")
            for rows, megabytes in curve:
                print(f"{rows:12,} rows {megabytes:8.1f} MB", file=sys.stderr)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # kB on Linux
            print(f"{'peak':>12}      {peak:8.1f} MB", file=sys.stderr)
            seconds = round(time.perf_counter() - began, 1)
            print(json.dumps({"seconds": seconds, "peak": peak, "curve": curve}))
        else:
            print(json.dumps(routing(args.groups, args.rows or 16, args.replicas, Path(folder))))


if __name__ == "__main__":
    main()
