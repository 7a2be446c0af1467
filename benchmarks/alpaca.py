"""Throughput and start-up on a CPU: many prompts in one batch, compared with one at a time.

    python benchmarks/alpaca.py

Throughput: the engine generates 64 tokens for each of 512 instructions, as test_alpaca.py does. A
loop runs one prompt at a time through the same model, without a prefix cache. It runs every eighth
prompt, because its speed does not depend on their number. Start-up: the time from the start of the
process to the first token, for `python run.py` and for the loop. The engine and the loop run in
turns, so that changes of the machine's speed affect both. Each number is the median over the turns,
and each ratio is the median of the ratios of the turns.

The physical limit of the throughput is the time of the matrix products alone (measured here, for
the mean number of rows in a step), plus the time to read the K and V of the decodes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of the scripts
sys.path.insert(0, f"{sys.path[0]}/src")

import torch
from compare import cores, processor

from microvllm import LLM, SamplingParams
from microvllm.cli.bench import BUNDLED, read_prompts
from microvllm.cli.commands import MODEL_DIR, encode
from run import QUESTIONS

ROOT = Path(__file__).resolve().parent.parent

LOOP = f"""
from microvllm import LLM, SamplingParams
llm = LLM({str(MODEL_DIR)!r}, device="cpu", enable_prefix_caching=False)
for question in {QUESTIONS!r}:
    turn = [{{"role": "user", "content": question}}]
    prompt = llm.tokenizer.render_for_completion(turn)
    print(llm.generate([prompt], SamplingParams(max_tokens=1))[0]["text"])
"""


def best_seconds(work: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of the fastest of a few runs, which other programs disturb least."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def limit_seconds(llm: LLM, outputs: list[dict]) -> float:
    """The smallest possible time for the outputs: the matrix products of all steps, and one read of
    the K and V of the decodes."""
    model, stats = llm.model, llm.stats()
    # the last token of a request is never an input
    rows = stats["prefill_tokens"] + stats["output_tokens"] - len(outputs)
    count, width = rows // stats["steps"], model.config.n_embd
    narrow, wide = torch.zeros(count, width), torch.zeros(count, 4 * width)
    sampled = torch.zeros(stats["output_tokens"] // stats["steps"], width)

    def products() -> None:
        for layer in model.layers:
            layer.qkv(narrow), layer.proj(narrow), layer.fc(narrow), layer.mlp_proj(wide)
        model.lm_head(sampled)

    with torch.inference_mode():
        seconds = stats["steps"] * best_seconds(products)

    visible = 0  # keys that decodes attend to, over all layers
    for output in outputs:
        first = len(output["prompt_token_ids"])
        for position in range(first, first + len(output["token_ids"]) - 1):
            visible += sum(min(position, w) + 1 if w >= 0 else position + 1 for w in model.windows)
    kv_bytes = visible * 2 * model.config.n_kv_head * model.config.head_dim * 4
    data = torch.zeros(2**26) + 1  # 256 MB; ones, so that the memory is allocated
    bandwidth = data.nbytes / best_seconds(data.sum)
    return seconds + kv_bytes / bandwidth


def many_at_once(prompts: list[str], params: SamplingParams) -> dict:
    """Run the engine as test_alpaca.py does. Returns tokens/s, the share of the limit, and the size
    and use of the pool."""
    with LLM(MODEL_DIR, device="cpu") as llm:
        prompts = encode(llm, prompts, raw=False)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = sum(len(output["token_ids"]) for output in outputs)
        assert tokens == len(prompts) * params.max_tokens
        pool = {key: llm.stats()[key] for key in ("num_blocks", "block_size", "peak_blocks")}
        pool["pool_bytes"] = llm.cache.data.nbytes
        return {
            "speed": tokens / seconds,
            "share": limit_seconds(llm, outputs) / seconds,
            "pool": pool,
        }


def one_at_a_time(prompts: list[str], params: SamplingParams) -> float:
    """Tokens/s of the loop with the same model."""
    with LLM(MODEL_DIR, device="cpu", enable_prefix_caching=False) as llm:
        prompts = encode(llm, prompts, raw=False)
        start = time.perf_counter()
        outputs = [llm.generate([prompt], params, use_tqdm=False)[0] for prompt in prompts]
        seconds = time.perf_counter() - start
    tokens = sum(len(output["token_ids"]) for output in outputs)
    assert tokens == len(prompts) * params.max_tokens
    return tokens / seconds


def seconds_to_first_line(*arguments: str) -> float:
    """Seconds from the start of a Python process to its first printed line, the first token."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-u", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    line = process.stdout.readline()
    seconds = time.perf_counter() - start
    process.communicate()
    assert process.returncode == 0 and line
    return seconds


def spread(values: list[float], digits: int) -> str:
    """The median, the smallest and the largest of the values, as text."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:10,.{digits}f}  ({low:,.{digits}f} to {high:,.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Many prompts at once against one at a time.")
    parser.add_argument("--num-prompts", type=int, default=512, help="(default: %(default)s)")
    text = "new tokens for each prompt (default: %(default)s)"
    parser.add_argument("--max-tokens", type=int, default=64, help=text)
    parser.add_argument("--turns", type=int, default=5, help="(default: %(default)s)")
    args = parser.parse_args()

    params = SamplingParams(temperature=0.7, max_tokens=args.max_tokens, ignore_eos=True)
    prompts = read_prompts(BUNDLED)[: args.num_prompts]
    few = prompts[::8]
    engine, loop, engine_start, loop_start = [], [], [], []
    for turn in range(args.turns + 1):
        engine.append(many_at_once(prompts if turn else few, params))
        loop.append(one_at_a_time(few, params))
        engine_start.append(seconds_to_first_line("run.py", "--device", "cpu", "--max-tokens", "1"))
        loop_start.append(seconds_to_first_line("-c", LOOP))
        print(f"turn {turn} of {args.turns}", file=sys.stderr)
    for measured in (engine, loop, engine_start, loop_start):
        del measured[0]  # the first turn fills the file cache and numba's cache of kernels

    pool = engine[0]["pool"]
    speeds, shares = [e["speed"] for e in engine], [100 * e["share"] for e in engine]
    ratios = [e / one for e, one in zip(speeds, loop, strict=True)]
    start_ratios = [e / one for e, one in zip(engine_start, loop_start, strict=True)]
    print(f"""
{processor()}, {cores()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads, \
float32
KV budget: {pool["num_blocks"]} blocks of {pool["block_size"]} tokens, \
{pool["pool_bytes"] / 1e9:.2f} GB; {pool["peak_blocks"]} blocks used at peak

{len(prompts)} prompts x {args.max_tokens} tokens, median of {args.turns} turns (lowest to highest)
engine, tokens/s                {spread(speeds, 0)}
one prompt at a time, tokens/s  {spread(loop, 0)}
ratio                           {spread(ratios, 1)}
% of the physical limit         {spread(shares, 0)}

from the start of the process to the first token
python run.py, s                {spread(engine_start, 2)}
one prompt at a time, s         {spread(loop_start, 2)}
ratio                           {spread(start_ratios, 2)}
""")
    result = {
        "cpu": processor(),
        "cores": cores(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "prompts": len(prompts),
        "max_tokens": args.max_tokens,
        "turns": args.turns,
        **pool,
        "engine_tokens_per_second": round(statistics.median(speeds), 1),
        "loop_tokens_per_second": round(statistics.median(loop), 1),
        "throughput_ratio": round(statistics.median(ratios), 2),
        "share_of_limit": round(statistics.median(shares) / 100, 3),
        "engine_start_seconds": round(statistics.median(engine_start), 3),
        "loop_start_seconds": round(statistics.median(loop_start), 3),
        "start_ratio": round(statistics.median(start_ratios), 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
