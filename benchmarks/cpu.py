"""The time of the parts of a step on a CPU, the perplexity of smaller weights, and the host time.

    python benchmarks/cpu.py             # all parts, with a small random model and the bundled one
    python benchmarks/cpu.py --parts profile --models bundled --sequences 1

profile: a number of sequences (--sequences) decode greedily, and each part of a step is timed. The
time of a part excludes the parts inside it. The numbers are medians over the steps in which all
sequences decode, and the time of the step is their sum, so disturbances in some steps do not count.
"python" is the part of a step outside the model and the sampler: planning, tensors for the plan,
reading the tokens, engine state, and the time of the measurement itself. All layers are one
compiled call, whose parts cannot be timed. So the same work runs once more with the slower loop
over layers of fused/model.py, which shows the parts.

perplexity: that of the answers to the bundled prompts, for the bundled model in some precisions
(--kinds).

host: the time of a step in the loop that runs ahead of a GPU, with a fake GPU that takes no time.
It has planning, filling the array to upload, reading tokens and updating the engine state, also in
steps with prompts. It does not have the calls to CUDA (launches, copies, pinned memory). It is
measured without filters and with top_k=50. As long as the GPU takes longer, this time is hidden.

The last line of the output has all results as JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # runs from a clone

import torch
from compare import BUNDLED, SHAPES, cores, find_model, processor, workload

from microvllm import LLM, SamplingParams
from microvllm.cli.bench import BUNDLED as PROMPTS
from microvllm.fused.linear import Linear

KINDS = {"float32": {}, "bfloat16": {"dtype": "bfloat16"}}
KINDS |= {word: {"quantization": word} for word in ("int8", "int6", "int5", "int4")}
PYTHON = ("schedule", "batch", "update", "other python")


class Clocks:
    """Seconds of each part of the current step."""

    def __init__(self):
        self.steps: list[tuple[int, Counter]] = []  # (rows, seconds by part)
        self.now, self.inside = Counter(), [0.0]

    def time_calls(self, owner: object, name: str, part: str) -> None:
        """Time every call of owner.name, excluding timed calls inside it."""
        call = getattr(owner, name)

        def timed(*args, **kwargs):
            self.inside.append(0.0)
            start = time.perf_counter()
            result = call(*args, **kwargs)
            seconds = time.perf_counter() - start
            self.now[part] += seconds - self.inside.pop()
            self.inside[-1] += seconds
            return result

        setattr(owner, name, timed)

    def watch(self, llm: LLM) -> Callable[[], None]:
        """Time each part of this engine. Returns a function that restores the engine."""
        kernels, runner, originals = llm.model.backend, llm.runner, []
        places = [
            (llm.loop, "advance", "other python"), (llm.scheduler, "schedule", "schedule"),
            (runner, "upload", "batch"),
            (llm.scheduler, "update", "update"), (runner, "sample", "sampler"),
            (llm.model, "forward", "model, the rest"), (kernels, "attend", "attention"),
            (kernels, "add_norm", "add_norm"), (kernels, "rope_store", "rope_store"),
            (kernels, "relu2", "relu2"), (Linear, "__call__", "products"),
            (llm.model, "logits", "model, the rest"),
        ]  # fmt: skip
        if llm.model.compiled:
            places.append((llm.model, "compiled", "all layers"))
        for owner, name, part in places:
            originals.append((owner, name, vars(owner).get(name)))
            self.time_calls(owner, name, part)

        def restore() -> None:
            for owner, name, old in originals:
                delattr(owner, name) if old is None else setattr(owner, name, old)

        return restore

    def step(self, rows: int) -> None:
        self.steps.append((rows, self.now))
        self.now, self.inside = Counter(), [0.0]


def profile(folder: str, vocab: int, sequences: int) -> dict:
    """Milliseconds of each part of a step, and the share of Python outside model and sampler."""
    with LLM(folder, device="cpu", max_batch_size=max(64, sequences)) as llm:
        llm.cache.data.zero_()  # memory is allocated when it is first written
        (steps, parts), loop = decode(llm, vocab, sequences), None
        if llm.model.compiled:
            llm.model.compiled = None
            loop = decode(llm, vocab, sequences)[1]
    total = sum(parts.values())
    share = sum(ms for n, ms in parts.items() if n in PYTHON) / total

    def ordered(times: dict) -> dict:
        return {n: round(ms, 3) for n, ms in sorted(times.items(), key=lambda x: -x[1])}

    return {
        "sequences": sequences, "steps": steps, "step_ms": round(total, 3),
        "parts_ms": ordered(parts), "loop_ms": loop and ordered(loop),
        "python_share": round(share, 4),
    }  # fmt: skip


def decode(llm: LLM, vocab: int, sequences: int) -> tuple[int, dict]:
    """(number of measured steps, milliseconds of each part)."""
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    clocks = Clocks()
    for turn in range(3):  # the first one loads the compiled kernels
        job = workload("W1", turn, vocab, 1)
        for prompt in job["prompts"][:sequences]:
            llm.add_request(prompt, params)
        restore = clocks.watch(llm) if turn else lambda: None
        while not llm.is_finished():
            before = llm.stats()["output_tokens"], llm.stats()["prefill_tokens"]
            llm.step()
            num_new, num_prompt = (
                llm.stats()[key] - old
                for key, old in zip(("output_tokens", "prefill_tokens"), before, strict=True)
            )
            clocks.step(0 if num_prompt else num_new)
        restore()
    full = [parts for rows, parts in clocks.steps if rows == sequences and parts]
    names = list(dict.fromkeys(name for parts in full for name in parts))
    return len(full), {n: 1000 * statistics.median(p[n] for p in full) for n in names}


def perplexity(count: int, options: dict) -> dict:
    """The perplexity of the answers to the first `count` bundled prompts that have an answer."""
    rows = [row for row in json.loads(PROMPTS.read_text()) if row["output"]][:count]
    with LLM(str(BUNDLED), **{"device": "cpu"} | options) as llm:
        prompts = []
        for row in rows:
            text = row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")
            prompts.append(llm.tokenizer.render_for_completion([{"role": "user", "content": text}]))
        scores = sum(llm.score(prompts, [row["output"] for row in rows]), [])
    return {"tokens": len(scores), "perplexity": round(math.exp(-sum(scores) / len(scores)), 4)}


def host(sequences: int, top_k: int, new: int = 64) -> float:
    """Milliseconds of a step with `sequences` sequences: the mean over decodes and prompts."""
    from microvllm.gpu.graphs import DecodeGraphs, GraphRunner
    from microvllm.loops.ahead import AheadLoop

    class Idle(DecodeGraphs):
        def record(self, *_):
            self.logits = torch.zeros(len(self.token_ids), 1)
            return SimpleNamespace(replay=lambda: None)

        def choose(self, size, graphs):
            pass

    def sample(logits, params, *_):
        return torch.full((len(params),), 5, dtype=torch.int32)

    options = {"max_batch_size": 512, "max_batched_tokens": 8192, "num_blocks": 7 * sequences + 1}
    params = SamplingParams(temperature=0.7, top_k=top_k, max_tokens=new, ignore_eos=True)
    empty, times = torch.empty, []
    with (
        LLM(str(BUNDLED), device="cpu", **options) as llm,
        mock.patch.object(torch.cuda, "graph_pool_handle", lambda: None),
        mock.patch.object(torch.cuda, "Stream", lambda device: None),
        mock.patch.object(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k)),
    ):
        llm.loop.inner_loop = AheadLoop(llm.loop.engine)
        llm.runner = GraphRunner(llm.model, llm.cache, llm.scheduler.blocks, llm.hooks, sample)
        limits = llm.max_batch_size, llm.max_model_len
        llm.runner.graphs = Idle(llm.model, llm.cache, *limits)
        llm.model.forward = lambda batch, cache: torch.zeros(len(batch.hidden_rows), 1)
        llm.model.logits = lambda h: h
        for turn in range(5):
            ids = torch.randint(10, 4000, (sequences, 23), generator=torch.manual_seed(turn))
            before, began = llm.stats()["steps"], time.perf_counter()
            llm.generate(ids.tolist(), params, use_tqdm=False)
            times.append((time.perf_counter() - began) / (llm.stats()["steps"] - before))
    return round(1000 * statistics.median(times), 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="profile,perplexity,host")
    text = f"models to profile, of {','.join(SHAPES)},bundled"
    parser.add_argument("--models", default="small,bundled", help=text)
    text = "number of sequences in the profile (default: %(default)s)"
    parser.add_argument("--sequences", type=int, default=64, help=text)
    text = "number of prompts for the perplexity (default: %(default)s)"
    parser.add_argument("--prompts", type=int, default=512, help=text)
    text = f"precisions for the perplexity, of {','.join(KINDS)} (default: %(default)s)"
    parser.add_argument("--kinds", default="float32,bfloat16,int8", help=text)
    args = parser.parse_args()
    result = {"benchmark": "cpu", "cpu": processor(), "cores": cores(),
              "threads": torch.get_num_threads(), "torch": torch.__version__}  # fmt: skip
    print(f"{processor()}, {cores()} cores, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, float32")  # fmt: skip
    if "profile" in args.parts:
        result["profile"] = {}
        for name in args.models.split(","):
            with tempfile.TemporaryDirectory() as scratch:
                choice = argparse.Namespace(model=name, models=None)
                folder, vocab = find_model(choice, Path(scratch))
                times = result["profile"][name] = profile(str(folder), vocab, args.sequences)
            print(f"\n{name}: a step of {times['sequences']} decodes, medians of {times['steps']} "
                  f"steps\n{'whole step':20}{times['step_ms']:9.3f} ms")  # fmt: skip
            for part, ms in times["parts_ms"].items():
                print(f"{part:20}{ms:9.3f} ms{ms / times['step_ms']:7.1%}")
            print(f"{'python':20}{'':12}{times['python_share']:7.1%}  ({', '.join(PYTHON)})")
            if loop := times["loop_ms"]:
                total = sum(loop.values())
                print(f"with the loop over the layers, {total:.3f} ms")
                for part, ms in loop.items():
                    print(f"  {part:18}{ms:9.3f} ms{ms / total:7.1%}")
    if "perplexity" in args.parts:
        result["perplexity"] = {
            kind: perplexity(args.prompts, KINDS[kind]) for kind in args.kinds.split(",")
        }
        exact = result["perplexity"]["float32"]["perplexity"]
        print(f"\nperplexity of {result['perplexity']['float32']['tokens']:,} tokens of answers")
        for kind, numbers in result["perplexity"].items():
            value = numbers["perplexity"]
            print(f"{kind:20}{value:9.4f}{value / exact - 1:+10.3%}")
    if "host" in args.parts and not importlib.util.find_spec("triton"):
        print("\nhost: skipped, because triton is not installed")
    elif "host" in args.parts:
        result["host_ms"] = {}
        print("\nhost time of a step")
        for sequences in (512, 64, 1):
            times = result["host_ms"][sequences] = [host(sequences, k) for k in (0, 50)]
            print(f"{sequences:4} sequences {times[0]:12.3f} ms, with top_k {times[1]:.3f} ms")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
