"""The parts of first_card.sh, which describes them.

    python benchmarks/first_card.py OUT WORK [--tiny] [PART ...]

runs the parts, in at most SECONDS in total. Each part runs in its own process group, which is
killed at its time limit. OUT/PART.json and OUT/report.md are updated after each result. WORK keeps
random models and Triton's kernels for later runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # runs from a clone

import torch
import torch.nn.functional as F
from checkpoint import make_checkpoint
from gpu import Bench, describe, lengths, median_seconds, parse, recorded_ways, say

from microvllm import LLM, SamplingParams
from microvllm.model import GPTConfig

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 600  # for all parts
TINY = "--device cpu --depth 2 --width 64 --head-dim 32 --vocab 512 --shrink 32 --num-blocks 512"
AIMS = {
    "headline": 54_000,
    "single": 600,
    "mixed": 19_500,
}  # tokens/s on one H100, docs/PERFORMANCE.md
FEATURES = {  # features of the sampler
    "greedy": {"temperature": 0.0}, "temperature": {}, "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8}, "min_p": {"min_p": 0.1}, "logprobs": {"logprobs": 3},
    "logit_bias": {"logit_bias": {3: 1.5}}, "allowed_token_ids": {"allowed_token_ids": [3, 4, 5]},
    "bad_words": {"bad_words": [[3], [4, 5]]}, "min_tokens": {"min_tokens": 3},
    "repetition_penalty": {"repetition_penalty": 1.2}, "presence_penalty": {"presence_penalty": 1},
    "frequency_penalty": {"frequency_penalty": 1.0}, "n": {"n": 3}, "stop": {"stop": ["zzz"]},
    "logits_processor": {"logits_processor": lambda token_ids, logits: logits},
}  # fmt: skip


class Part:
    """The inputs of a part, and its results."""

    def __init__(self, name: str, out: Path, work: Path, tiny: bool):
        self.name, self.out, self.work, self.tiny = name, out, work, tiny
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.found: dict = {"error": "it did not finish"}
        out.mkdir(parents=True, exist_ok=True)

    def note(self, **found: object) -> None:
        """Add results: print them, and write all results to the files."""
        say(f"{self.name}: " + ", ".join(f"{k} {v}"[:300] for k, v in found.items()))
        self.found |= found
        (self.out / f"{self.name}.json").write_text(json.dumps(self.found, indent=1))
        (self.out / "report.md").write_text(report(self.out))

    def run(self, function: Callable) -> None:
        """Run the part, and note its results, warnings, seconds and, if it fails, the error."""
        began = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.note()
            try:
                function(self)
                del self.found["error"]
            except BaseException as error:
                traceback.print_exc()
                self.found["error"] = f"{type(error).__name__}: {error}"[:2000]
        told = sorted({str(w.message)[:500] for w in caught})
        self.note(warnings=told, seconds=round(time.perf_counter() - began, 1))

    def checkpoint(self, depth: int, era: str) -> Path:
        """The folder of a random model, which is made if it is missing."""
        sizes = {"depth": depth, "aspect": 64, "width": None, "head_dim": 128, "vocab": 65536}
        if self.tiny:
            sizes = {"depth": 2, "aspect": 64, "width": 64, "head_dim": 32, "vocab": 512}
        path = self.work / f"d{depth}_era{era}{'_tiny' * self.tiny}"
        if not (path / "meta_000000.json").exists():
            rest = {"kv_heads": None, "sequence_len": 2048, "storage": "float32", "seed": 0}
            args = argparse.Namespace(**sizes, **rest, era=era)
            make_checkpoint(path, args, str(self.device))
        return path

    def engine(self, depth: int, era: str, **options) -> LLM:
        """An engine on a random model."""
        options = {"max_model_len": 2048, "device": str(self.device)} | options
        if self.tiny:
            options |= {"num_blocks": 4000}
        return LLM(str(self.checkpoint(depth, era)), **options)

    def command(self, *words: str, limit: float) -> tuple[int, str]:
        """Run a program, and keep its output in the folder. Returns its exit code, or -1 if it was
        stopped, and its output."""
        path = self.out / f"{self.name}.txt"
        env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        with open(path, "a") as file:
            first = file.tell()
            code = run_limited(list(words), limit, cwd=ROOT, stdout=file, stderr=file, env=env)
        return code, path.read_text()[first:]


def run_limited(words: list[str], limit: float, **options) -> int:
    """Run a program in its own process group. Returns its exit code, or -1 if it was stopped.
    Afterwards, all its processes have ended."""
    process = subprocess.Popen(words, start_new_session=True, **options)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # a part ends its processes in other groups
        with suppress(subprocess.TimeoutExpired):
            process.wait(3)
        return -1
    finally:
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, length), generator=generator).tolist()


# the parts ----------------------------------------------------------------------------------------


def output_of(*words: str) -> str:
    """The output of a program, "" if it is not installed."""
    if shutil.which(words[0]) is None:
        return ""
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def facts(part: Part) -> None:
    part.note(**describe(part.device), python=sys.version.split()[0], cuda=torch.version.cuda)
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    compiler = output_of("cc", "--version").partition("\n")[0] or "none"
    part.note(compiler=compiler, python_header=header.exists())
    query = "--query-gpu=driver_version,power.limit,clocks.max.sm,clocks.max.mem"
    if part.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(part.device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(part.device)))
        part.note(capability=capability, free_gb=round(free / 1e9, 2), total_gb=total / 1e9)
        part.note(smi=output_of("nvidia-smi", query, "--format=csv,noheader"))
        apps = "--query-compute-apps=pid,used_memory"
        part.note(other_processes=output_of("nvidia-smi", apps, "--format=csv,noheader"))


def tests(part: Part) -> None:
    """The tests of the kernels, decodes first, and of the graphs."""
    files = ["tests/gpu/test_kernels_gpu.py", "tests/gpu/test_graphs.py"]
    if part.tiny:
        files = ["tests/gpu/test_kernels_gpu.py::test_relu2"]
    words = "-m pytest -v -p no:cacheprovider --maxfail 30 --tb short -n".split()
    words += ["0" if part.tiny else str(min(4, os.cpu_count() or 1)), "-m", "slow or not slow"]
    decodes = "split or padding or group"
    codes = []
    for chosen, limit in ((decodes, 60), (f"not ({decodes})", 90)):
        if part.tiny and chosen == decodes:
            continue
        code, text = part.command(sys.executable, *words, "-k", chosen, *files, limit=limit)
        codes.append(code)
        failed = sorted(set(re.findall(r"(?:FAILED|ERROR) (\S+::\S+)", text)))
        old = part.found.get("failed", [])
        part.note(exit=codes, last=text.strip().splitlines()[-1:], failed=old + failed)
    if any(codes):
        raise RuntimeError(
            f"{len(part.found['failed'])} tests failed, or they were stopped: tests.txt"
        )


def memcheck(part: Part) -> None:
    """A few attention tests, with a check of every memory access."""
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        part.note(skipped="compute-sanitizer, of the CUDA toolkit, is not installed")
        return
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor has its own allocation
    words = "-m pytest -q -n 0 -p no:cacheprovider tests/gpu/test_kernels_gpu.py -k".split()
    code, text = part.command(
        checker, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, *words,
        "padding or (mixed_batch and 16)", limit=80,
    )  # fmt: skip
    errors = [line for line in text.splitlines() if line.startswith("=========")]
    part.note(exit=code, errors=errors[:40])
    if code:
        raise RuntimeError(f"exit {code}: see memcheck.txt")


def graphs(part: Part) -> None:
    """Compare tokens with and without graphs. Tokens may differ where two logits are nearly equal,
    because norms are not rounded for few rows. A row that differs from its first tokens on is a
    mistake, and so are differences in all rows of one size."""
    length, new = (40, 6) if part.tiny else (600, 24)  # in the newest era, windows have 512 tokens
    counts = (1, 3) if part.tiny else (1, 7, 8, 9, 40)
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    found: dict[bool, list] = {}
    for on in True, False:
        with part.engine(12, "5", cuda_graphs=on, max_batch_size=64) as llm:
            if ways := recorded_ways(llm):
                part.note(ways=ways)
            found[on] = []
            for count in counts:
                outputs = llm.generate(prompts(count, length, count), params, False)
                found[on].append([output.token_ids for output in outputs])
    for count, with_graphs, without in zip(counts, found[True], found[False], strict=True):
        compare(part, f"{count} rows", with_graphs, without)


def compare(part: Part, name: str, some: list[list[int]], others: list[list[int]]) -> None:
    """For how many tokens are the rows of two runs equal?"""
    new = len(some[0])
    pairs = [zip(a, b, strict=True) for a, b in zip(some, others, strict=True)]
    same = [[x == y for x, y in pair] for pair in pairs]
    first = [row.index(False) if False in row else new for row in same]
    part.note(**{name: f"equal for {min(first)} to {max(first)} of {new} tokens"})
    if min(first) == 0 or max(first) < new / 2:
        part.note(suspicious=f"{name}: {first}")


def prefixes(part: Part) -> None:
    """Shared blocks read once for all sequences, and by each one. The second run of each engine has
    all prompts in the prefix cache."""
    count, length, new = (8, 80, 6) if part.tiny else (256, 1024, 64)
    (shared,) = prompts(1, length)
    requests = [shared + own for own in prompts(count, 16, 1)]
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    runs = []
    for name, flag in ("apart", "0"), ("together", "1"):
        os.environ["MICROVLLM_SHARED_PREFIXES"] = flag
        with part.engine(34, "1", max_batch_size=count) as llm:
            llm.generate(requests, params, False)
            began = time.perf_counter()
            outputs = llm.generate(requests, params, False)
            rate = count * new / (time.perf_counter() - began)
        part.note(**{name: {"tokens_per_s": round(rate)}})
        runs.append([output.token_ids for output in outputs])
    compare(part, f"{count} sequences that share {length} tokens", *runs)


def sync(part: Part) -> None:
    waits = {}
    with part.engine(12, "5", max_batch_size=64) as llm:
        for mode in "default", "error":
            if part.device.type == "cuda":
                torch.cuda.set_sync_debug_mode(mode)
            try:
                for name, asked in FEATURES.items():
                    params = SamplingParams(**{"max_tokens": 6, "ignore_eos": True} | asked)
                    try:
                        llm.generate(prompts(2, 9), params, False)
                    except Exception as error:
                        waits[name] = f"{mode}: {type(error).__name__}: {error}"[:500]
                try:
                    llm.score(prompts(2, 9), prompts(2, 4, 1))
                except Exception as error:
                    waits["score"] = f"{mode}: {type(error).__name__}: {error}"[:500]
            finally:
                if part.device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
    part.note(waits=waits, asked=[*FEATURES, "score"])


def make_bench(part: Part, scratch: Path) -> Bench:
    """benchmarks/gpu.py on the large model, without an engine."""
    path = part.checkpoint(34, "1")
    args = parse(TINY.split() if part.tiny else ["--repeats", "2"])
    shape = json.loads((path / "meta_000000.json").read_text())["model_config"]
    return Bench(args, GPTConfig(**shape), path, scratch)


def work(part: Part) -> None:
    """The throughput, the waits of the device and the profile, all with one engine."""
    bench = make_bench(part, part.work)
    part.note(ceilings=bench.ceilings.measure())
    bench.start_engine()
    part.note(**bench.results)
    for name in "single", "headline", "mixed":
        bench.attempt(name)
        part.note(**{name: bench.results[name]})
    for name, run in ("waits", waits), ("profile", profile):
        try:
            run(part, bench.llm)
        except Exception as error:
            traceback.print_exc()
            part.note(**{name: {"error": f"{type(error).__name__}: {error}"[:500]}})
    bench.stop_engine()


def startup(part: Part) -> None:
    """The start of new processes, with their own folders for kernels."""
    with tempfile.TemporaryDirectory() as scratch:
        bench = make_bench(part, Path(scratch))
        bench.attempt("startup")
        part.note(**bench.results)


def waits(part: Part, llm: LLM) -> None:
    """Count steps that had finished before the host asked for their tokens: in these, the device
    was idle."""
    count = 8 if part.tiny else 300
    mean_in, mean_out, most = (10, 12, 30) if part.tiny else (135, 306, 1024)
    asked = lengths(count, mean_in, 0.9, 1, most, seed=2)
    told = lengths(count, mean_out, 0.55, 1, most, seed=3)
    given = [row[:n] for row, n in zip(prompts(count, most, 1), asked, strict=True)]
    params = [SamplingParams(temperature=0.7, max_tokens=n, ignore_eos=True) for n in told]
    with llm.tracing() as trace:
        llm.generate(given, params, False)
    events = trace.events
    kinds = {e["step"]: bool(e["prefills"]) for e in events if e["e"] == "begin"}
    spent, bound, steps = {}, Counter(), Counter()
    for event in events:
        if event["e"] == "end":
            prefill = "with prompts" if kinds[event["step"]] else "decodes alone"
            steps[prefill] += 1
            bound[prefill] += event["ms"].get("wait", 0) < 0.05
            for phase, ms in event["ms"].items():
                where = spent.setdefault(prefill, Counter())
                where[phase] += ms
    mean = {k: {p: round(ms / steps[k], 3) for p, ms in v.items()} for k, v in spent.items()}
    part.note(waits={"steps": steps, "host_bound_steps": bound, "mean_ms": mean})


def products(part: Part) -> None:
    width = 64 if part.tiny else 2176
    most = 16 if part.tiny else 8192
    dtype = torch.bfloat16 if part.device.type == "cuda" else torch.float32
    for name, n, k in (
        ("qkv", 3 * width, width),
        ("fc", 4 * width, width),
        ("mlp", width, 4 * width),
    ):
        w = (torch.randn(n, k, device=part.device) * k**-0.5).to(dtype)
        rows, found = 1, {}
        while rows <= most:
            x = torch.randn(rows, k, device=part.device).to(dtype)
            ways = {"plain": partial(F.linear, x, w)}
            if part.device.type == "cuda":
                a, b = (t.to(torch.float8_e4m3fn) for t in (x, w))
                one, other = (torch.ones(*size, device=part.device) for size in ((rows, 1), (1, n)))
                for fast in False, True:
                    ways["fp8, fast" if fast else "fp8"] = partial(
                        torch._scaled_mm, a, b.t(), one, other, out_dtype=dtype, use_fast_accum=fast
                    )
            for way, run in ways.items():
                try:
                    us = 1e6 * median_seconds(run, part.device)
                    found.setdefault(way, {})[rows] = round(us, 1)
                except Exception as error:
                    found[way] = f"{type(error).__name__}: {error}"[:300]
            rows *= 8 if part.tiny else 4
        part.note(**{f"{name} {n} x {k}, us by rows": found})


def kernels(part: Part) -> None:
    code, told = part.command(
        sys.executable, "benchmarks/gpu_kernels.py", "--only", "decode,few-rows", limit=55
    )
    part.note(lines=[line for line in told.splitlines() if " us " in line] or told.splitlines())
    if code not in (0, -1) and part.device.type == "cuda":
        raise RuntimeError(f"exit {code}: see kernels.txt")


def profile(part: Part, llm: LLM) -> None:
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU]
    if part.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    params = SamplingParams(max_tokens=64, ignore_eos=True)
    for count in (1, 4) if part.tiny else (1, 512):
        for prompt in prompts(count, 16, count):
            llm.add_request(prompt, params)
        for _ in range(4):
            llm.step()
        with torch.profiler.profile(activities=activities) as seen:
            for _ in range(5):
                llm.step()
            if part.device.type == "cuda":
                torch.cuda.synchronize(part.device)
        while not llm.is_finished():
            llm.step()
        spent = Counter()
        for event in seen.key_averages():
            name = "self_device_time_total" if len(activities) > 1 else "self_cpu_time_total"
            spent[event.key] += getattr(event, name) / 5
        top = {name[:90]: round(us, 1) for name, us in spent.most_common(25)}
        part.note(**{f"us a step, {count} sequences": top})


# time limit of each part in seconds. the most informative parts come first
LIMITS = {
    "facts": 30, "work": 240, "tests": 155, "prefixes": 60, "graphs": 90, "startup": 80,
    "memcheck": 85, "sync": 45, "kernels": 60, "products": 40,
}  # fmt: skip
PARTS = {name: globals()[name] for name in LIMITS}


# the report ---------------------------------------------------------------------------------------


def report(out: Path) -> str:
    """The results in the folder as text: the card, failures, figures, and all other results."""
    found = {
        name: json.loads((out / f"{name}.json").read_text())
        for name in PARTS if (out / f"{name}.json").exists()
    }  # fmt: skip
    told = found.get("facts", {})
    lines = ["# microvllm's first minutes on a card", ""]
    lines += [f"- {k}: {v}" for k, v in told.items() if k not in ("warnings", "seconds")]
    lines += ["", "## Failures", ""]
    wrong = [f"- {name}: {part['error']}" for name, part in found.items() if "error" in part]
    wrong += [f"- {name}: it was not run" for name in PARTS if name not in found]
    wrong += [f"- tests: {name}" for name in found.get("tests", {}).get("failed", ())]
    wrong += [f"- sync, {k}: {v}" for k, v in found.get("sync", {}).get("waits", {}).items()]
    wrong += [f"- {k}: {part['suspicious']}" for k, part in found.items() if "suspicious" in part]
    wrong += [
        f"- {name}, {key}: {value['error']}"
        for name in ("work", "startup") for key, value in found.get(name, {}).items()
        if isinstance(value, dict) and "error" in value
    ]  # fmt: skip
    lines += wrong or ["none"]
    lines += ["", "## Figures", "", "| | tokens/s | aim on one H100 | share of the limit |"]
    lines += ["|---|---|---|---|"]
    runs = found.get("work", {})
    for name, aim in AIMS.items():
        rate, share = "not measured", ""
        if isinstance(run := runs.get(name), dict) and "tokens_per_s" in run:
            rate, share = f"{run['tokens_per_s']:,.0f}", f"{run['share']:.1%}"
        lines.append(f"| {name} | {rate} | {aim:,} | {share} |")
    for name, part in found.items():
        lines += ["", f"## {name}, {part.get('seconds', '?')} s", ""]
        lines += [f"- warning: {text}" for text in part.get("warnings", ())]
        for key, value in part.items():
            if key in ("warnings", "seconds", "error") or name == "facts":
                continue
            if isinstance(value, (dict, list)) and len(json.dumps(value)) > 80:
                text = json.dumps(value, indent=1)
                lines += [f"- {key}:", "", "```", text, "```", ""]
            else:
                lines.append(f"- {key}: {value if isinstance(value, str) else json.dumps(value)}")
    return "\n".join(lines) + "\n"


def run_all(names: list[str], out: Path, work: Path, tiny: bool) -> None:
    """Run each part in a process, until the time is over."""
    ends = time.monotonic() + SECONDS
    os.environ["TRITON_CACHE_DIR"] = str(work / "triton")  # for all parts
    for name in names:
        limit = min(LIMITS[name], ends - time.monotonic())
        if limit < 10:
            say(f"== {name}: no time is left")
            continue
        say(f"\n== {name}, at most {limit:.0f} s")
        words = [sys.executable, __file__, str(out), str(work), *["--tiny"] * tiny, "--part", name]
        code = run_limited(words, limit)
        if code:
            say(f"== {name}: " + ("stopped at its limit" if code == -1 else f"ended with {code}"))


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--part", choices=PARTS, help="run only this part, in this process")
    parser.add_argument("--tiny", action="store_true", help="only a test, with small models")
    args = parser.parse_intermixed_args(words)
    if not torch.cuda.is_available() and not args.tiny:
        parser.error("torch finds no CUDA device; use --tiny for a test")
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"the parts are {', '.join(PARTS)}; not {', '.join(sorted(unknown))}")
    out, work = args.out.absolute(), args.work.absolute()
    if args.part:
        part = Part(args.part, out, work, args.tiny)
        part.run(PARTS[args.part])
        sys.exit("error" in part.found)
    out.mkdir(parents=True, exist_ok=True)
    run_all(args.parts or list(PARTS), out, work, args.tiny)
    (out / "report.md").write_text(report(out))
    say(f"wrote {out / 'report.md'}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped at its limit"))
    main()
