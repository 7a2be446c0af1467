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
TARGETS = {  # tokens/s on one H100, from docs/PERFORMANCE.md
    "headline": 54_000,
    "single": 600,
    "mixed": 19_500,
}
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
        self.results: dict = {"error": "not finished"}
        out.mkdir(parents=True, exist_ok=True)

    def note(self, **results: object) -> None:
        """Add results: print them, and write all results to the files."""
        say(f"{self.name}: " + ", ".join(f"{k} {v}"[:300] for k, v in results.items()))
        self.results |= results
        (self.out / f"{self.name}.json").write_text(json.dumps(self.results, indent=1))
        (self.out / "report.md").write_text(report(self.out))

    def run(self, function: Callable) -> None:
        """Run the part, and note its results, warnings, seconds and, if it fails, the error."""
        began = time.perf_counter()
        with warnings.catch_warnings(record=True) as records:
            warnings.simplefilter("always")
            self.note()
            try:
                function(self)
                del self.results["error"]
            except BaseException as error:
                traceback.print_exc()
                self.results["error"] = f"{type(error).__name__}: {error}"[:2000]
        messages = sorted({str(record.message)[:500] for record in records})
        self.note(warnings=messages, seconds=round(time.perf_counter() - began, 1))

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
        """Run a program, and append its output to a file of the report. Returns (its exit code, or
        -1 if it reached the limit; its output)."""
        path = self.out / f"{self.name}.txt"
        env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        with open(path, "a") as file:
            first = file.tell()
            code = run_limited(list(words), limit, cwd=ROOT, stdout=file, stderr=file, env=env)
        return code, path.read_text()[first:]


def run_limited(words: list[str], limit: float, **options) -> int:
    """Run a program in its own process group, for at most `limit` seconds. Returns its exit code,
    or -1 if it reached the limit. Afterwards, all processes of the group have ended."""
    process = subprocess.Popen(words, start_new_session=True, **options)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # so that a part can end the processes that it started in other groups
        with suppress(subprocess.TimeoutExpired):
            process.wait(3)
        return -1
    finally:
        with suppress(ProcessLookupError):  # the group is empty
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, length), generator=generator).tolist()


# the parts ----------------------------------------------------------------------------------------


def output_of(*words: str) -> str:
    """The output of a program; "" if the program is not installed."""
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
    """Run the tests of the kernels (decodes first) and of the CUDA graphs."""
    files = ["tests/gpu/test_kernels_gpu.py", "tests/gpu/test_graphs.py"]
    if part.tiny:
        files = ["tests/gpu/test_kernels_gpu.py::test_relu2"]
    words = "-m pytest -v -p no:cacheprovider --maxfail 30 --tb short -n".split()
    words += ["0" if part.tiny else str(min(4, os.cpu_count() or 1)), "-m", "slow or not slow"]
    decodes = "split or padding or group"
    codes = []
    for selection, limit in ((decodes, 60), (f"not ({decodes})", 90)):
        if part.tiny and selection == decodes:
            continue
        code, text = part.command(sys.executable, *words, "-k", selection, *files, limit=limit)
        codes.append(code)
        failed = sorted(set(re.findall(r"(?:FAILED|ERROR) (\S+::\S+)", text)))
        old = part.results.get("failed", [])
        part.note(exit=codes, last=text.strip().splitlines()[-1:], failed=old + failed)
    if any(codes):
        raise RuntimeError(
            f"{len(part.results['failed'])} tests failed, exit codes {codes} (-1: the time limit): "
            "see tests.txt"
        )


def memcheck(part: Part) -> None:
    """Run a few attention tests with a check of every memory access."""
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        part.note(skipped="compute-sanitizer (part of the CUDA toolkit) is not installed")
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
    """Compare tokens with and without CUDA graphs. Tokens may differ where two logits are nearly
    equal, because the kernels for few rows do not round the norms. Two things are suspicious: a row
    whose first token differs, and a batch in which every row differs in its first half."""
    length, new = (40, 6) if part.tiny else (600, 24)  # in the newest era, windows have 512 tokens
    counts = (1, 3) if part.tiny else (1, 7, 8, 9, 40)
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    token_ids: dict[bool, list] = {}
    for on in True, False:
        with part.engine(12, "5", cuda_graphs=on, max_batch_size=64) as llm:
            if ways := recorded_ways(llm):
                part.note(ways=ways)
            token_ids[on] = []
            for count in counts:
                outputs = llm.generate(prompts(count, length, count), params, False)
                token_ids[on].append([output.token_ids for output in outputs])
    for count, with_graphs, without in zip(counts, token_ids[True], token_ids[False], strict=True):
        compare(part, f"{count} rows", with_graphs, without)


def compare(part: Part, name: str, some: list[list[int]], others: list[list[int]]) -> None:
    """Note for how many tokens the rows of two runs are equal."""
    new = len(some[0])
    pairs = [zip(a, b, strict=True) for a, b in zip(some, others, strict=True)]
    same = [[x == y for x, y in pair] for pair in pairs]
    first = [row.index(False) if False in row else new for row in same]
    part.note(**{name: f"equal for {min(first)} to {max(first)} of {new} tokens"})
    if min(first) == 0 or max(first) < new / 2:
        part.note(suspicious=f"{name}: {first}")


def prefixes(part: Part) -> None:
    """Time decodes that read shared blocks once for each sequence, or once for all. Only the second
    run of an engine counts, which has all prompts in the prefix cache."""
    count, length, new = (8, 80, 6) if part.tiny else (256, 1024, 64)
    (shared,) = prompts(1, length)
    requests = [shared + own for own in prompts(count, 16, 1)]
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    runs = []
    for name, flag in ("read_by_each", "0"), ("read_once", "1"):
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
    """Find the sampling features that make the host wait: torch raises an error for them."""
    waits = {}
    with part.engine(12, "5", max_batch_size=64) as llm:
        for mode in "default", "error":
            if part.device.type == "cuda":
                torch.cuda.set_sync_debug_mode(mode)
            try:
                for name, feature in FEATURES.items():
                    params = SamplingParams(**{"max_tokens": 6, "ignore_eos": True} | feature)
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
    part.note(waits=waits, features=[*FEATURES, "score"])


def make_bench(part: Part, scratch: Path) -> Bench:
    """benchmarks/gpu.py on the large model, without an engine."""
    path = part.checkpoint(34, "1")
    args = parse(TINY.split() if part.tiny else ["--repeats", "2"])
    shape = json.loads((path / "meta_000000.json").read_text())["model_config"]
    return Bench(args, GPTConfig(**shape), path, scratch)


def work(part: Part) -> None:
    """Measure the throughput, the waits of the device and the profile, all with one engine."""
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
    """Time the start of new processes, which have their own folder for kernels."""
    with tempfile.TemporaryDirectory() as scratch:
        bench = make_bench(part, Path(scratch))
        bench.attempt("startup")
        part.note(**bench.results)


def waits(part: Part, llm: LLM) -> None:
    """Count the steps whose tokens were ready before the host waited for them: after these, the
    device was idle."""
    count = 8 if part.tiny else 300
    mean_in, mean_out, most = (10, 12, 30) if part.tiny else (135, 306, 1024)
    sizes = lengths(count, mean_in, 0.9, 1, most, seed=2)
    new = lengths(count, mean_out, 0.55, 1, most, seed=3)
    requests = [row[:size] for row, size in zip(prompts(count, most, 1), sizes, strict=True)]
    params = [SamplingParams(temperature=0.7, max_tokens=n, ignore_eos=True) for n in new]
    with llm.tracing() as trace:
        llm.generate(requests, params, False)
    events = trace.events
    has_prompts = {e["step"]: bool(e["prefills"]) for e in events if e["e"] == "begin"}
    total, host_bound, steps = {}, Counter(), Counter()
    for event in events:
        if event["e"] == "end":
            kind = "with prompts" if has_prompts[event["step"]] else "decodes only"
            steps[kind] += 1
            host_bound[kind] += event["ms"].get("wait", 0) < 0.05
            for phase, ms in event["ms"].items():
                total.setdefault(kind, Counter())[phase] += ms
    mean = {k: {p: round(ms / steps[k], 3) for p, ms in v.items()} for k, v in total.items()}
    part.note(waits={"steps": steps, "host_bound_steps": host_bound, "mean_ms": mean})


def products(part: Part) -> None:
    width = 64 if part.tiny else 2176
    most = 16 if part.tiny else 4096
    dtype = torch.bfloat16 if part.device.type == "cuda" else torch.float32
    for name, n, k in (
        ("qkv", 3 * width, width),
        ("fc", 4 * width, width),
        ("mlp", width, 4 * width),
    ):
        w = (torch.randn(n, k, device=part.device) * k**-0.5).to(dtype)
        rows, times = 1, {}
        while rows <= most:
            x = torch.randn(rows, k, device=part.device).to(dtype)
            variants = {"plain": partial(F.linear, x, w)}
            if part.device.type == "cuda":
                a, b = (t.to(torch.float8_e4m3fn) for t in (x, w))
                one, other = (torch.ones(*size, device=part.device) for size in ((rows, 1), (1, n)))
                for fast in False, True:
                    variants["fp8, fast" if fast else "fp8"] = partial(
                        torch._scaled_mm, a, b.t(), one, other, out_dtype=dtype, use_fast_accum=fast
                    )
            for variant, run in variants.items():
                try:
                    us = 1e6 * median_seconds(run, part.device)
                    times.setdefault(variant, {})[rows] = round(us, 1)
                except Exception as error:
                    times[variant] = f"{type(error).__name__}: {error}"[:300]
            rows *= 8 if part.tiny else 4
        part.note(**{f"{name} {n} x {k}, us by rows": times})


def kernels(part: Part) -> None:
    code, text = part.command(
        sys.executable, "benchmarks/gpu_kernels.py", "--only", "decode,few-rows", limit=55
    )
    part.note(lines=[line for line in text.splitlines() if " us " in line] or text.splitlines())
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
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(5):
                llm.step()
            if part.device.type == "cuda":
                torch.cuda.synchronize(part.device)
        while not llm.is_finished():
            llm.step()
        times = Counter()
        for event in profiler.key_averages():
            name = "self_device_time_total" if len(activities) > 1 else "self_cpu_time_total"
            times[event.key] += getattr(event, name) / 5
        top = {name[:90]: round(us, 1) for name, us in times.most_common(25)}
        part.note(**{f"us per step, {count} sequences": top})


# part -> its time limit in seconds. The most informative parts come first
LIMITS = {
    "facts": 30, "work": 240, "tests": 155, "prefixes": 60, "graphs": 90, "startup": 80,
    "memcheck": 85, "sync": 45, "kernels": 60, "products": 40,
}  # fmt: skip
PARTS = {name: globals()[name] for name in LIMITS}


# the report ---------------------------------------------------------------------------------------


def report(out: Path) -> str:
    """The results in the folder as text: the card, failures, figures, and all other results."""
    parts = {
        name: json.loads((out / f"{name}.json").read_text())
        for name in PARTS if (out / f"{name}.json").exists()
    }  # fmt: skip
    card = parts.get("facts", {})
    lines = ["# First measurements of microvllm on a GPU", ""]
    lines += [f"- {k}: {v}" for k, v in card.items() if k not in ("warnings", "seconds")]
    lines += ["", "## Failures", ""]
    failures = [f"- {name}: {part['error']}" for name, part in parts.items() if "error" in part]
    failures += [f"- {name}: not run" for name in PARTS if name not in parts]
    failures += [f"- tests: {name}" for name in parts.get("tests", {}).get("failed", ())]
    failures += [f"- sync, {k}: {v}" for k, v in parts.get("sync", {}).get("waits", {}).items()]
    failures += [
        f"- {k}: {part['suspicious']}" for k, part in parts.items() if "suspicious" in part
    ]
    failures += [
        f"- {name}, {key}: {value['error']}"
        for name in ("work", "startup") for key, value in parts.get(name, {}).items()
        if isinstance(value, dict) and "error" in value
    ]  # fmt: skip
    lines += failures or ["none"]
    lines += ["", "## Figures", "", "| | tokens/s | target on one H100 | share of the limit |"]
    lines += ["|---|---|---|---|"]
    runs = parts.get("work", {})
    for name, target in TARGETS.items():
        rate, share = "not measured", ""
        if isinstance(run := runs.get(name), dict) and "tokens_per_s" in run:
            rate, share = f"{run['tokens_per_s']:,.0f}", f"{run['share']:.1%}"
        lines.append(f"| {name} | {rate} | {target:,} | {share} |")
    for name, part in parts.items():
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
    """Run each part in its own process, as long as time is left."""
    ends = time.monotonic() + SECONDS
    os.environ["TRITON_CACHE_DIR"] = str(work / "triton")  # for all parts
    for name in names:
        limit = min(LIMITS[name], ends - time.monotonic())
        if limit < 10:
            say(f"== {name}: skipped, no time is left")
            continue
        say(f"\n== {name}, at most {limit:.0f} s")
        words = [sys.executable, __file__, str(out), str(work), *["--tiny"] * tiny, "--part", name]
        code = run_limited(words, limit)
        if code:
            ending = "stopped at its time limit" if code == -1 else f"exit code {code}"
            say(f"== {name}: {ending}")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("parts", nargs="*", help=f"parts of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--part", choices=PARTS, help="run only this part, in this process")
    parser.add_argument("--tiny", action="store_true", help="only a test, with small models")
    args = parser.parse_intermixed_args(words)
    if not torch.cuda.is_available() and not args.tiny:
        parser.error("torch finds no CUDA device; use --tiny for a test")
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}: use {', '.join(PARTS)}")
    out, work = args.out.absolute(), args.work.absolute()
    if args.part:
        part = Part(args.part, out, work, args.tiny)
        part.run(PARTS[args.part])
        sys.exit("error" in part.results)
    out.mkdir(parents=True, exist_ok=True)
    run_all(args.parts or list(PARTS), out, work, args.tiny)
    (out / "report.md").write_text(report(out))
    say(f"wrote {out / 'report.md'}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped at its time limit"))
    main()
