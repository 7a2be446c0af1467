"""Compare this engine with other engines on a CPU, on the same workloads.

    python benchmarks/compare.py                             # shape d12, all importable engines
    python benchmarks/compare.py --model small --workloads W1,W3 --turns 5
    python benchmarks/compare.py --peer-python vllm=/opt/vllm/bin/python    # with its own torch
    python benchmarks/compare.py --quantization int8 --engines microvllm,vllm
    python benchmarks/compare.py --quantization int8 --engines microvllm,openvino,llamacpp \
        --peer-python openvino=/opt/peers/bin/python --peer-python llamacpp=/opt/peers/bin/python \
        --peer-dtype int8 --peer-dtype llamacpp=int4
    python benchmarks/compare.py --foreign-load 0,1,2       # with other programs that compute
    python benchmarks/compare.py --model tiny --shrink 16 --turns 1         # only a test

This program installs nothing. It uses each engine that can be imported by this interpreter, or by
the interpreter of --peer-python. Each engine is loaded once in its own process (peers.py). Then the
engines run each workload in turns, A B C A B C, and while one works, the others are blocked in a
read. So changes of the machine's speed affect all engines. Ratios are medians of the ratios of the
turns.

The workloads use greedy decoding and ignore end tokens. Lengths are drawn once. Token ids are drawn
again for each turn, so that no turn finds its prompts in a prefix cache:

    W1  64 prompts of 6 to 77 tokens (mean 23), 64 new tokens each
    W2  64 requests, 20 to 512 tokens in (mean 100), 16 to 256 out, 8,710 in all
    W3  one prompt of 128 tokens, 128 new
    W4  32 prompts of 256 shared and 16 own tokens, 32 new each
    W5  one prompt of 3,072 tokens, one new token
    W6  16 prompts of 1,024 shared tokens and 1 own, 64 new each, like samples of one prompt
    W7  64 prompts of 1,024 shared and 16 own tokens, 32 new each, like a few-shot evaluation

W5, W6 and W7 run only if --workloads names them, because not every engine accepts sequences of this
length.

An engine that would take minutes runs only some of the requests (EVERY_NTH, below). Tokens per
second count only the requested new tokens (for W5, the prompt tokens). "agree" compares the tokens
with those of this engine: the share of requests whose first 8 tokens are the same, and the share of
all tokens before the first difference. In float32 all engines that support nanochat compute the
same model, so tokens differ only where two logits are equal up to rounding. If fewer than nine of
ten requests agree, the run fails. With another dtype, the agreement is only reported. "speedup" is
the speed of this engine divided by that of the other.

With --foreign-load N, N other processes compute while an engine works (`while True: pass`, at the
same priority), but not while engines are loaded. With several numbers, such as 0,1,2, each turn
runs once with each of them. "of idle" is the median over the turns of an engine's speed divided by
its speed without load.

The limit is measured in the same turns (see `limit` in peers.py). It assumes the matrix products of
a library, and "of limit" is the share of this limit. The row "limit, own products" also considers
this engine's own products. They are faster for a few rows, so this engine can exceed the first
limit. Both limits count shared K and V once for each sequence. An engine that reads them once for
all sequences can exceed the limits, too.

Peak memory is the sum over all processes of an engine, including weights and pool. In engines with
a pool, its size is --kv-gib, and it is written to before measurements start. "first token" is the
time from the start of the process to the first token of its first request, with the compilation
caches that earlier runs of this user have left.

openvino and llamacpp do not support nanochat. They run a Llama with random weights, which llama.py
makes. Its matrices have as many weights as this model's ("step_weights" in the JSON), but it makes
other tokens. So "agree" compares these engines with each other. They are marked with a star. Their
--peer-dtype may also be int8, and for llamacpp int4. The docstrings of `openvino` and `llamacpp` in
peers.py describe the type of K and V, and what is timed.

By default, vLLM leaves one core free and runs three processes. On two cores it is faster with other
settings. For example, pass a script as its interpreter. The script sets
VLLM_ENABLE_V1_MULTIPROCESSING=0, VLLM_CPU_OMP_THREADS_BIND=0-1, and LD_PRELOAD to tcmalloc and
libiomp5.so, and then starts python. To measure an engine with and without such settings, name it
twice with different suffixes: --peer-python vllm=... --peer-python vllm-tuned=...
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import llama

HERE = Path(__file__).resolve().parent

# shapes of random checkpoints of the first era, the only one that other engines support
SHAPES = {
    "d12": "--depth 12 --vocab 32768",
    "small": "--depth 4 --width 256 --head-dim 64 --kv-heads 2 --vocab 4096",
    "tiny": "--depth 2 --width 64 --head-dim 32 --vocab 512",
}
BUNDLED = HERE.parent / "models" / "oldbooks-d6"
# engine -> the module it needs; engine -> the packages to install, if their names differ
ENGINES = {
    "microvllm": "torch",
    "nanochat": "torch",
    "transformers": "transformers",
    "vllm": "vllm",
    "openvino": "openvino_genai",
    "llamacpp": "llama_cpp",
}
INSTALL = {"openvino": "openvino-genai", "llamacpp": "llama-cpp-python gguf"}
# engines that run a Llama instead -> its format, see llama.py
LLAMAS = {"openvino": "openvino", "llamacpp": "gguf"}
# engines that run only every n-th request of a workload. With one request at a time, the speed does
# not depend on their number; transformers copies its whole cache, padded to the longest request, at
# each step
EVERY_NTH = {"nanochat": {"W1": 8, "W2": 8, "W4": 8, "W6": 8, "W7": 8}, "transformers": {"W2": 8}}
WORKLOADS = ("W1", "W2", "W3", "W4")
LONG = ("W5", "W6", "W7")
SHARED = {"W4": (32, 256, 16, 32), "W6": (16, 1024, 1, 64), "W7": (64, 1024, 16, 32)}
FIRST = 8  # tokens of a request that have to agree
SPECIAL = 9  # special tokens, the last ids of a vocabulary
MAX_LEN, LONG_LEN = 1024, 4096

# another program that computes; it ends when the pipe on its stdin closes, so that it never
# remains, even if this process is killed
BUSY_LOOP = """
import os, sys, threading

def end_with_the_parent():
    sys.stdin.buffer.read()
    os._exit(0)

threading.Thread(target=end_with_the_parent, daemon=True).start()
while True: pass
"""

# print the version of a module; runs in the interpreter of an engine
VERSION = """
import sys, importlib.metadata as metadata, importlib.util
if importlib.util.find_spec(sys.argv[1]) is None: sys.exit(3)
print(metadata.version(metadata.packages_distributions()[sys.argv[1]][0]))
"""


# the work -----------------------------------------------------------------------------------------


def lengths(rng: random.Random, count: int, total: int, sigma: float, low: int, high: int):
    """`count` log-normal whole numbers from low to high, whose sum is `total`."""
    draws = [rng.lognormvariate(0.0, sigma) for _ in range(count)]

    def scaled(scale: float) -> list[int]:
        return [min(high, max(low, int(draw * scale))) for draw in draws]

    assert count * low <= total <= count * high, (count, total, low, high)
    few, many = 0.0, 1e6
    for _ in range(60):  # the largest scale whose sum does not exceed the total
        middle = (few + many) / 2
        few, many = (middle, many) if sum(scaled(middle)) <= total else (few, middle)
    sizes = scaled(few)
    for i in cycle(range(count)):
        if sum(sizes) == total:
            return sizes
        sizes[i] += sizes[i] < high


def workload(name: str, turn: int, vocab: int, shrink: int, seed: int = 0, load: int = 0) -> dict:
    """A job for peers.py: prompts (token ids), new (tokens of each), shared (length of the common
    prefix).

    shrink: divides counts and lengths; turn, seed, load: the ids depend on them.
    """
    rng = random.Random(f"lengths of {name}")

    def less(number: int) -> int:
        return max(1, number // shrink)

    count, shared = {"W1": less(64), "W2": less(64)}.get(name, 1), 0
    if name == "W1":
        sizes = lengths(rng, count, count * less(23), 0.55, less(6), less(77))
        new = [less(64)] * count
    elif name == "W2":
        sizes = lengths(rng, count, count * less(100), 0.9, less(20), less(512))
        new = lengths(rng, count, count * 8710 // 64 // shrink, 0.8, less(16), less(256))
    elif name == "W3":
        sizes, new = [less(128)], [less(128)]
    elif name == "W5":
        sizes, new = [less(3072)], [1]
    else:
        count, shared, own, answer = map(less, SHARED[name])
        sizes, new = [shared + own] * count, [answer] * count
    beside = f", load {load}" if load else ""
    rng = random.Random(f"ids of {name}, turn {turn}, seed {seed}{beside}")
    ids = [[rng.randrange(vocab - SPECIAL) for _ in range(size)] for size in sizes]
    prompts = [ids[0][:shared] + own[shared:] for own in ids]
    return {"prompts": prompts, "new": new, "shared": shared}


def part(job: dict, every: int) -> dict:
    """A job with every n-th request, where n is `every`."""
    return job | {"prompts": job["prompts"][::every], "new": job["new"][::every]}


def count_tokens(name: str, job: dict) -> int:
    """The number of tokens that count for the speed of a job."""
    return sum(map(len, job["prompts"])) if name == "W5" else sum(job["new"])


def agreement(expected: list[list[int]], tokens: list[list[int]]) -> tuple[float, float]:
    """(share of requests whose first tokens are equal, share of tokens before a difference)."""
    same = []
    for a, b in zip(expected, tokens, strict=True):
        assert len(a) == len(b), "an engine generated a wrong number of tokens"
        same.append(
            next((i for i, pair in enumerate(zip(a, b, strict=True)) if len({*pair}) > 1), len(a))
        )
    requests = zip(same, expected, strict=True)
    first = sum(n >= min(FIRST, len(a)) for n, a in requests) / len(expected)
    return first, sum(same) / sum(map(len, expected))


# the engines --------------------------------------------------------------------------------------


class Peer:
    """An engine in its own process, which is loaded once and then runs jobs."""

    def __init__(self, name: str, python: str, options: dict):
        self.name, self.engine = name, name.split("-")[0]
        self.log = tempfile.TemporaryFile("w+")
        self.start = time.perf_counter()
        self.process = subprocess.Popen(
            [python, HERE / "peers.py", self.engine, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(options["threads"])},
        )

    def run(self, job: dict) -> dict:
        """Run a job in the process. Raises RuntimeError with its last output if it has ended."""
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"the process of {self.name} ended: ...{self.log.read()[-3000:]}")
        return json.loads(line)

    def peak_bytes(self) -> int:
        """The sum of the peak memory of the engine's processes.

        0 on systems without /proc. The maxrss of getrusage would include the memory of the parent
        at the fork.
        """
        peak, children = 0, defaultdict(list)
        for process in Path("/proc").glob("[0-9]*"):
            try:
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:  # the process has ended
                continue
            children[int(parent)].append(int(process.name))
        waiting = [self.process.pid]
        while waiting:
            pid = waiting.pop()
            waiting += children[pid]
            status = Path(f"/proc/{pid}/status")
            for line in status.read_text().splitlines() if status.exists() else ():
                peak += 1024 * int(line.split()[1]) if line.startswith("VmHWM:") else 0
        return peak

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process.stdout.close(), self.log.close()


@contextmanager
def foreign_load(count: int) -> Iterator[list[subprocess.Popen]]:
    """Run other processes that compute during the body."""
    loops: list[subprocess.Popen] = []
    try:
        for _ in range(count):
            command = [sys.executable, "-I", "-S", "-c", BUSY_LOOP]
            loops.append(subprocess.Popen(command, stdin=subprocess.PIPE))
        yield loops
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()
            loop.stdin.close()


def version(python: str, package: str) -> str | None:
    """The version of a package in an interpreter; None if it cannot be imported."""
    done = subprocess.run([python, "-c", VERSION, package], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


class Comparison:
    """Engines, turns, and measurements."""

    def __init__(self, args: argparse.Namespace, folder: Path, vocab: int):
        self.args, self.vocab = args, vocab
        max_len = LONG_LEN if {*LONG} & {*args.workloads} else MAX_LEN
        self.options = {
            "folder": str(folder), "threads": args.threads, "max_len": max_len,
            "dtype": "float32", "kv_gib": args.kv_gib, "llm": args.llm,
        }  # fmt: skip
        self.peers: list[Peer] = []
        self.failed: list[str] = []
        self.facts: dict[str, dict] = {}  # engine -> version, start and memory
        # (workload, foreign load) -> engine -> tokens/s, and two shares of equal tokens, by turn
        self.speeds = defaultdict(lambda: defaultdict(list))
        self.agreed = defaultdict(lambda: defaultdict(list))
        self.limits = defaultdict(list)  # (workload, foreign load) -> answers of the limit
        # facts for the table: the folder of the model may be deleted by then
        hugging_face = (folder / "config.json").exists()
        self.step_weights = step_weights(folder) if hugging_face else 0

    def load(self, name: str, python: str) -> None:
        """Start an engine while no other one works, and time its first token."""
        options = self.options | {"dtype": self.args.dtypes.get(name, "float32")}
        if kind := LLAMAS.get(name.split("-")[0]):
            try:
                folder, numbers = find_llama(
                    Path(options["folder"]), kind, options["dtype"], python
                )
            except subprocess.CalledProcessError as error:
                say(f"{name}: cannot make its model, {error.stderr.strip()[-1000:]}")
                self.failed.append(name)
                return
            options |= {"folder": str(folder)}
            self.facts[name] |= {"model": "a Llama", "step_weights": numbers}
        peer = Peer(name, python, options)
        if name == "limit":
            self.peers.append(peer)
            return
        job = workload("W3", 0, self.vocab, max(8, self.args.shrink)) | {"new": [1]}
        if self.run_job(peer, job):
            self.facts[name] |= {"first_token_s": round(time.perf_counter() - peer.start, 2)}
            self.peers.append(peer)
            say(f"{name} {self.facts[name]['version']}: first token after "
                f"{self.facts[name]['first_token_s']} s")  # fmt: skip

    def run_job(self, peer: Peer, job: dict) -> dict | None:
        """Run a job. If the engine fails, report it and continue without this engine."""
        time.sleep(self.args.pause)  # threads of the previous engine may spin for a while
        try:
            return peer.run(job)
        except RuntimeError as error:
            say(str(error))
            self.failed.append(peer.name)
            self.peers = [other for other in self.peers if other is not peer]
            return None

    def turn(self, turn: int, load: int = 0) -> None:
        """Run all workloads on all engines, with `load` busy loops. Turn 0 is short and not
        counted."""
        args = self.args
        for name in args.workloads:
            full_job = workload(name, turn, self.vocab, args.shrink, args.seed, load)
            answers, key = {}, (name, load)
            if turn == 0:
                full_job = part(full_job, 8) | {"new": [min(n, 4) for n in full_job["new"][::8]]}
            for peer in list(self.peers):
                every = EVERY_NTH.get(peer.engine, {}).get(name, 1) if turn else 1
                job = part(full_job, every)
                answer = self.run_job(peer, job)
                if answer is None or turn == 0:
                    continue
                speed = count_tokens(name, job) / answer["seconds"]
                self.speeds[key][peer.name].append(speed)
                if peer.name == "limit":
                    self.limits[key].append(answer)
                    own = count_tokens(name, job) / answer["own_seconds"]
                    self.speeds[key]["limit, own products"].append(own)
                    continue
                llamas = peer.engine in LLAMAS  # their tokens are compared with each other
                if llamas or peer.name == "microvllm":
                    answers.setdefault(llamas, answer["tokens"])
                if first := answers.get(llamas):
                    same = agreement(first[::every], answer["tokens"])
                    self.agreed[key][peer.name].append(same)
            done = ", ".join(f"{n} {s[-1]:,.1f}" for n, s in self.speeds[key].items())
            say(f"turn {turn}, {name}{beside(load)}: {done}" if turn else f"warmed up for {name}")

    def results(self, load: int = 0) -> dict:
        """For each workload and engine: tokens/s with this load, and comparisons."""
        results = {}
        for name in self.args.workloads:
            key = name, load
            job = workload(name, 1, self.vocab, self.args.shrink)
            results[name] = {
                "requests": len(job["new"]),
                "prompt_tokens": sum(map(len, job["prompts"])),
                "new_tokens": sum(job["new"]),
            }
            if limits := self.limits[key]:
                products = statistics.median(x["products_seconds"] / x["seconds"] for x in limits)
                gb = statistics.median(x["bandwidth_gb"] for x in limits)
                results[name] |= {
                    "limit_products_share": round(products, 3),
                    "read_gb_per_s": round(gb, 1),
                }
            engines = results[name]["engines"] = {}
            limits, own_speeds = (self.speeds[key].get(of, []) for of in ("limit", "microvllm"))
            for engine, speeds in self.speeds[key].items():
                numbers = engines[engine] = {
                    "tokens_per_s": round(statistics.median(speeds), 1),
                    "lowest": round(min(speeds), 1), "highest": round(max(speeds), 1),
                }  # fmt: skip
                idle = self.speeds[name, 0].get(engine, []) if load else []
                if idle and len(idle) == len(speeds):
                    numbers["of_idle"] = round(median_ratio(speeds, idle), 3)
                if len(limits) == len(speeds):
                    numbers["share_of_limit"] = round(median_ratio(speeds, limits), 3)
                if not engine.startswith("limit") and len(own_speeds) == len(speeds):
                    numbers["speedup"] = round(median_ratio(own_speeds, speeds), 2)
                if pairs := self.agreed[key][engine]:
                    first, tokens = (statistics.mean(column) for column in zip(*pairs, strict=True))
                    numbers |= {"agree_first": round(first, 3), "agree_tokens": round(tokens, 3)}
        return results

    def table(self, by_load: dict[int, dict]) -> str:
        """`results` of each load, as text."""
        lines = []
        rows = [(name, load) for name in self.args.workloads for load in by_load]
        for name, load in rows:
            work = by_load[load][name]
            lines.append(
                f"\n{name}{beside(load)}: {work['requests']} requests, "
                f"{work['prompt_tokens']:,} tokens in, {work['new_tokens']:,} out\n"
                f"{'':20}{'tokens/s':>36}{'of idle':>9}{'of limit':>10}{'speedup':>9}"
                f"{'agree: first':>14}{'all':>7}"
            )
            for engine, n in work["engines"].items():
                low, high = n["lowest"], n["highest"]
                star = "*" * ("model" in self.facts.get(engine, ()))
                span = f"({low:,.1f}-{high:,.1f})"
                line = f"{engine + star:20}{n['tokens_per_s']:>12,.1f}{span:>24}"
                shares = (("of_idle", 9, ".0%"), ("share_of_limit", 10, ".0%"),
                          ("speedup", 9, ".2f"), ("agree_first", 14, ".0%"),
                          ("agree_tokens", 7, ".1%"))  # fmt: skip
                for key, width, kind in shares:
                    line += f"{format(n[key], kind) if key in n else '-':>{width}}"
                lines.append(line)
        lines.append(f"\n{'':20}{'first token':>12}{'peak memory':>13}")
        for engine, fact in self.facts.items():
            if "peak_gb" in fact:
                start, peak = f"{fact['first_token_s']:.1f} s", f"{fact['peak_gb']:.2f} GB"
                version = f"{fact['version']}" + (f", {fact['dtype']}" if "dtype" in fact else "")
                lines.append(f"{engine:20}{start:>12}{peak:>13}  {version}")
        if numbers := [fact["step_weights"] for fact in self.facts.values() if "model" in fact]:
            lines.append(
                f"\n* a Llama with random weights: a step uses {numbers[0]:,} weights,\n"
                f"  and {self.step_weights:,} in this engine; the tokens are compared with those "
                "of the first engine with a star"
            )
        return "\n".join(lines)


def median_ratio(speeds: list[float], others: list[float]) -> float:
    """The median over the turns of the ratio of two measurements."""
    return statistics.median(a / b for a, b in zip(speeds, others, strict=True))


def beside(load: int) -> str:
    """The load as text; "" without load."""
    return f" with {load} busy loop{'s' * (load > 1)}" if load else ""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def processor() -> str:
    """The name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=[*SHAPES, "bundled"], default="d12")
    parser.add_argument("--models", type=Path, help="folder to keep random models for later runs")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    text = f"engines of {','.join(ENGINES)} (default: all that can be imported)"
    parser.add_argument("--engines", help=text)
    parser.add_argument(
        "--peer-python", action="append", default=[], metavar="NAME=PATH",
        help="the interpreter of an engine; NAME is ENGINE or ENGINE-LABEL",
    )  # fmt: skip
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=cores())
    text = "GiB for K and V (default: %(default)s)"
    parser.add_argument("--kv-gib", type=int, default=2, help=text)
    parser.add_argument(
        "--foreign-load", default="0", metavar="N[,N...]",
        help="number of busy loops during a run; several numbers: a run with each (default: 0)",
    )  # fmt: skip
    parser.add_argument("--pause", type=float, default=0.5, help="seconds before each run")
    parser.add_argument("--shrink", type=int, default=1, help="divide counts and lengths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", help="dtype of this engine, as in LLM")
    parser.add_argument("--quantization", help="quantization of this engine, as in LLM")
    parser.add_argument(
        "--peer-dtype", action="append", default=[], metavar="[NAME=]DTYPE",
        help="dtype of the other engines, or of one of them (default: float32)",
    )  # fmt: skip
    args = parser.parse_args()
    args.workloads = args.workloads.split(",")
    if unknown := {*args.workloads} - {*WORKLOADS, *LONG}:
        known = ", ".join(WORKLOADS + LONG)
        parser.error(f"--workloads: unknown {', '.join(sorted(unknown))}; use {known}")
    loads = args.foreign_load.split(",")
    if len({*loads}) < len(loads) or not all(n.isascii() and n.isdigit() for n in loads):
        parser.error(f"--foreign-load {args.foreign_load}: expected different numbers, as in 0,1,2")
    args.foreign_load = [int(load) for load in loads]
    if max(args.foreign_load) > 64:
        parser.error(f"--foreign-load {max(args.foreign_load)}: at most 64 busy loops")
    args.pythons = {}
    for word in args.peer_python:
        name, _, python = word.partition("=")
        if name.split("-")[0] not in ENGINES or not Path(python).is_file():
            parser.error(f"--peer-python {word}: expected ENGINE=/path/to/python")
        args.pythons[name] = python
    named = {name.split("-")[0] for name in args.pythons}
    args.pythons |= {name: sys.executable for name in ENGINES if name not in named}
    names = args.engines.split(",") if args.engines else list(args.pythons)
    if unknown := set(names) - set(args.pythons):
        parser.error(
            f"--engines: unknown {', '.join(sorted(unknown))}; use {', '.join(args.pythons)}"
        )
    # this engine is always included and first, as the reference
    args.engines = sorted({"microvllm", *names}, key=["microvllm", *names].index)
    dtypes = dict(word.rpartition("=")[::2] for word in args.peer_dtype)
    if unknown := set(dtypes) - {"", *args.pythons}:
        parser.error(
            f"--peer-dtype: unknown {', '.join(sorted(unknown))}; use {', '.join(args.pythons)}"
        )
    args.peer_dtype = dtypes.get("", "float32")
    args.dtypes = {name: dtypes.get(name, args.peer_dtype) for name in args.engines[1:]}
    for name, dtype in args.dtypes.items():
        kind = LLAMAS.get(name.split("-")[0])
        known = llama.PRECISIONS[kind] if kind else ("float32", "bfloat16")
        if dtype not in known:
            parser.error(
                f"--peer-dtype {dtype}: {name} supports {', '.join(known)}; use --peer-dtype "
                f"{name}=DTYPE, or leave it out of --engines"
            )
    options = {"dtype": args.dtype, "quantization": args.quantization}
    args.llm = {key: value for key, value in options.items() if value is not None}
    return args


def find_model(args: argparse.Namespace, scratch: Path) -> tuple[Path, int]:
    """(folder of the model, which is made if it is missing; size of its vocabulary)."""
    if args.model == "bundled":
        (meta,) = BUNDLED.glob("meta_*.json")
        return BUNDLED, json.loads(meta.read_text())["model_config"]["vocab_size"]
    folder = (args.models or scratch) / args.model
    if not (folder / "config.json").exists():
        maker = [sys.executable, HERE / "checkpoint.py", folder, "--hf", "--device", "cpu"]
        subprocess.run([*maker, *SHAPES[args.model].split()], check=True, stdout=sys.stderr)
    return folder, json.loads((folder / "config.json").read_text())["vocab_size"]


def find_llama(folder: Path, to: str, precision: str, python: str) -> tuple[Path, int]:
    """(folder of the Llama that corresponds to the model in `folder`, number of weights that a step
    reads). If it does not exist in this format and precision, the interpreter `python` makes it."""
    config = llama.llama_for(json.loads((folder / "config.json").read_text()))
    out = folder / "llama"
    if not (out / "config.json").exists():
        llama.make_folder(out, config)
    script = [python, HERE / "llama.py", out, "--to", to, "--precision", precision]
    done = subprocess.run(script, check=True, capture_output=True, text=True)
    return Path(done.stdout.splitlines()[-1]), llama.count_weights(config)


def step_weights(folder: Path) -> int:
    """The number of weights in the matrices of a nanochat in Hugging Face's format, without the
    embedding."""
    config = json.loads((folder / "config.json").read_text())
    c, heads = config["hidden_size"], config["num_attention_heads"]
    kv = c // heads * config["num_key_value_heads"]
    layer = 2 * c * c + 2 * c * kv + 2 * c * config["intermediate_size"]
    return config["num_hidden_layers"] * layer + config["vocab_size"] * c


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as scratch:
        folder, vocab = find_model(args, Path(scratch))
        run = Comparison(args, folder, vocab)
        try:
            run.load("limit", sys.executable)
            for name in args.engines:
                engine, python = name.split("-")[0], args.pythons[name]
                if args.model == "bundled" and engine in ("transformers", "vllm", *LLAMAS):
                    say(f"{name} does not support this era of nanochat")
                elif number := version(python, ENGINES[engine]):
                    run.facts[name] = {"version": f"{ENGINES[engine]} {number}"}
                    if name != "microvllm":
                        run.facts[name] |= {"dtype": args.dtypes[name]}
                    run.load(name, python)
                else:
                    package = INSTALL.get(engine, ENGINES[engine])
                    say(f"{python} cannot import {name}: run {python} -m pip install {package}")
            if "microvllm" in run.failed:
                sys.exit("microvllm failed, so there is nothing to compare the others with")
            run.turn(0)
            for turn in range(1, args.turns + 1):
                for load in args.foreign_load:
                    with foreign_load(load):
                        run.turn(turn, load)
            for peer in run.peers:
                if peer.name != "limit":
                    run.facts[peer.name]["peak_gb"] = round(peer.peak_bytes() / 1e9, 2)
        finally:
            for peer in run.peers:
                peer.close()
    by_load = {load: run.results(load) for load in args.foreign_load}
    ours = ", ".join(f"{key} {value}" for key, value in args.llm.items()) or "float32"
    others = ", ".join(sorted({*args.dtypes.values()})) or "nothing"
    print(
        f"{processor()}, {args.threads} of {cores()} cores; {args.model}; microvllm in {ours}, the "
        f"others in {others}; {args.kv_gib} GiB for K and V; median of {args.turns} turns; with "
        f"{', '.join(map(str, args.foreign_load))} busy loops\n{run.table(by_load)}\n"
    )
    exact = {name for name, dtype in args.dtypes.items() if dtype == "float32" and not args.llm}
    exact -= {name for name in exact if name.split("-")[0] in LLAMAS}  # K and V may have fewer bits
    wrong = [
        f"{engine} ({name}{beside(load)})"
        for load, results in by_load.items()
        for name, work in results.items()
        for engine, numbers in work["engines"].items()
        if engine in exact and numbers.get("agree_first", 1) < 0.9
    ]
    first_load, *more_loads = args.foreign_load
    result = {
        "benchmark": "compare", "cpu": processor(), "cores": cores(), "threads": args.threads,
        "model": args.model, "llm": args.llm, "peer_dtype": args.peer_dtype,
        "peer_dtypes": args.dtypes, "kv_gib": args.kv_gib, "turns": args.turns,
        "shrink": args.shrink, "foreign_load": args.foreign_load,
        "workloads": by_load[first_load], "under_load": {str(n): by_load[n] for n in more_loads},
        "engines": run.facts, "failed": run.failed, "disagree": wrong,
    }  # fmt: skip
    print(json.dumps(result))
    if run.failed or wrong:
        sys.exit(
            f"failed: {', '.join(run.failed) or 'none'}; disagree: {', '.join(wrong) or 'none'}"
        )


if __name__ == "__main__":
    main()
