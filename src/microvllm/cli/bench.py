"""The benchmark: prompts, a warm-up, and a report of the results.

The prompts are Alpaca's instructions (Taori et al., 2023) or any file in their format.
"""

from __future__ import annotations

import importlib.util
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

DATASET = "tatsu-lab/alpaca"
PACKAGE = Path(__file__).resolve().parents[1]
# the folder of the lab, the course and the bundled model: share/ in an installed package, the
# parent of src/ in a clone
ROOT = PACKAGE / "share" if (PACKAGE / "share").is_dir() else PACKAGE.parents[1]
MODELS = ROOT / "models"
BUNDLED = MODELS / "prompts" / "oldbooks_instructions.json"
# warm-up: the largest number of prompts, prompt tokens of each, and new tokens of each
WARM_UP_BATCH, WARM_UP_PROMPT, WARM_UP_TOKENS = 16, 24, 8


# prompts ------------------------------------------------------------------------------------------


def alpaca_prompts(rows: list, source: str) -> list[str]:
    """The instruction of each row and, if the row has an input, a blank line and the input. Raises
    ValueError, with the source and the row, for a row without these fields."""
    prompts = []
    for number, row in enumerate(rows, 1):
        where = f"{source}: row {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with 'instruction', not {row!r:.40}")
        instruction, context = row.get("instruction"), row.get("input") or ""
        if not isinstance(instruction, str) or not instruction.strip():
            raise ValueError(f"{where}: 'instruction' must be a text, not {instruction!r:.40}")
        if not isinstance(context, str):
            raise ValueError(f"{where}: 'input' must be a text, not {context!r:.40}")
        prompts.append(f"{instruction}\n\n{context}" if context else instruction)
    return prompts


def read_prompts(path: str | Path) -> list[str]:
    """All prompts of a file in Alpaca's format. Raises ValueError that names the file and row."""
    from ..jobs.rows import read_rows

    return alpaca_prompts(read_rows(path), str(path))


def check_choices(rows: list, source: str) -> None:
    """Raise ValueError, which names the row, unless each row has a prompt and continuations."""
    for number, row in enumerate(rows, 1):
        texts = row.get("continuations") if isinstance(row, dict) else None
        good = isinstance(texts, list) and bool(texts) and all(texts)
        if not good or not all(isinstance(text, str) for text in [row.get("prompt"), *texts]):
            wanted = '{"prompt": "...", "continuations": ["...", ...]}, no continuation empty'
            raise ValueError(f"{source}: row {number}: expected {wanted}, not {row!r:.80}")


def find_prompts(path: str | None, count: int) -> tuple[list[str], str]:
    """(at most `count` prompts, their source). The source is the file `path`, else Alpaca's data
    set if the `datasets` package can download it, else the bundled file."""
    if path is not None:
        return read_prompts(path)[:count], path
    reason = f"`pip install datasets` for {DATASET}"
    if importlib.util.find_spec("datasets") is not None:
        from ..sources.hub import hub_answers

        if not hub_answers():
            os.environ["HF_HUB_OFFLINE"] = "1"  # read on import: use the local copy or fail now
        try:
            from datasets import load_dataset

            rows = list(load_dataset(DATASET, split=f"train[:{count}]"))
            return alpaca_prompts(rows, DATASET), DATASET
        except Exception as error:  # any failure of the download: use the bundled prompts
            reason = f"no {DATASET}: {type(error).__name__}"
    if not BUNDLED.is_file():
        raise ValueError(f"no prompts found ({reason}): give --prompts-file or --random-input-len")
    return read_prompts(BUNDLED)[:count], f"the bundled {BUNDLED.name} ({reason})"


def random_prompts(count, length, shared, vocabulary, seed) -> list[list[int]]:
    """`count` prompts. Each has a common prefix of `shared` token ids, then `length` of its own."""
    draw = random.Random(seed)
    prefix = draw.choices(range(vocabulary), k=shared)
    return [prefix + draw.choices(range(vocabulary), k=length) for _ in range(count)]


def warm_up(llm, params, num_prompts: int) -> float:
    """Run a few short prompts, so that the figures exclude work that a process does once: reading
    kernels from the disk and starting threads. The prefix cache and counters are reset after it.
    Returns the duration in seconds.

    params: those of the benchmark, since they decide which kernels a step needs; num_prompts: the
    number of prompts of the benchmark. Does nothing if the pool is too small for a prompt.
    """
    start = time.perf_counter()
    longest = llm.max_positions - 1
    new = min(WARM_UP_TOKENS, params.max_tokens, longest - 1)
    length = min(WARM_UP_PROMPT, longest - new)
    if new < 1 or length < 1:
        return 0.0
    # with a seed, so that the engine's next seed is left for the benchmark
    params = replace(params, max_tokens=new, ignore_eos=True, seed=0)
    vocabulary = llm.tokenizer.num_ordinary
    for count in {min(num_prompts, WARM_UP_BATCH), 1}:  # kernels for many rows, and for one
        prompts = random_prompts(count, length, 0, vocabulary, seed=count)
        llm.generate(prompts, params, use_tqdm=False)
    llm.reset_prefix_cache()
    llm.reset_stats()
    return time.perf_counter() - start


# the report ---------------------------------------------------------------------------------------


def rate(count: int, seconds: float) -> float:
    """Count per second; 0 if no time has passed."""
    return round(count / seconds, 1) if seconds else 0.0


def counters(llm) -> dict[str, float]:
    """The engine's counters."""
    return llm.stats()


def drafts(stats: dict) -> str:
    """The number of accepted draft tokens, to append to a line; "" if there were no drafts."""
    num_accepted = stats.get("accepted_tokens")
    num_drafted = stats.get("guessed_tokens")
    if not num_drafted:
        return ""
    share = num_accepted / num_drafted
    return f"; {num_accepted} of {num_drafted} draft tokens accepted ({share:.0%})"


def share(found: dict) -> str:
    """The share of the memory bandwidth that decoding used, if it was measured."""
    if not found.get("decode_bytes_per_second"):
        return ""
    used, most = found["decode_bytes_per_second"], found["bytes_per_second"]
    return f", reading {used / 1e9:.3g} GB/s of {most / 1e9:.3g} measured ({used / most:.0%})"


def results(outputs: list, seconds: float, stats: dict, times: list) -> dict:
    """The results of a benchmark, and the engine's counters.

    seconds: from the arrival of all prompts to the last token; stats: LLM.stats() for that time;
    times: the SampleTimes of each sample (features/stats.py).
    """
    tokens = sum(len(output["token_ids"]) for output in outputs)
    # the first token of a request comes from the step that ends its prefill
    decoded = tokens - len(outputs)
    return {
        "total_prompts": len(outputs),
        "total_output_tokens": tokens,
        "total_seconds": round(seconds, 3),
        "tokens_per_second": rate(tokens, seconds),
        **latencies(times),
        "prefill_tokens_per_second": rate(stats["prefill_tokens"], stats["prefill_seconds"]),
        "decode_tokens": decoded,
        "decode_tokens_per_second": rate(decoded, stats["decode_seconds"]),
        **stats,
    }


def latencies(times: list) -> dict[str, float | None]:
    """Medians over the samples, in seconds: the time to the first token since the request arrived,
    and the mean time between tokens of a sample. None if there is nothing to measure."""
    firsts = [sample.first - sample.queued for sample in times]
    gaps = [
        (sample.last - sample.first) / (sample.num_tokens - 1)
        for sample in times
        if sample.num_tokens > 1
    ]
    return {
        "median_seconds_to_first_token": round(median(firsts), 5) if firsts else None,
        "median_seconds_between_tokens": round(median(gaps), 5) if gaps else None,
    }


def milliseconds(seconds: float | None) -> str:
    """A time as text."""
    return "not measured" if seconds is None else f"{1000 * seconds:,.1f} ms"


def report(found: dict) -> str:
    """The results as text."""
    first = milliseconds(found["median_seconds_to_first_token"])
    gap = milliseconds(found["median_seconds_between_tokens"])
    warm = f"{found['warmup_seconds']:.2f} s"
    if not found["warmup_seconds"]:
        warm = "none, so the first steps include the loading of kernels"
    return f"""
Load: {found["load_seconds"]:.2f} s for the model and its kernels
Warm-up: {warm}
Total prompts: {found["total_prompts"]}
Total output tokens: {found["total_output_tokens"]}
Total time: {found["total_seconds"]:.2f} s for all prompts, without load and warm-up
Throughput: {found["tokens_per_second"]} tokens/s
Time to first token: {first} (median; all prompts arrive at once)
Time between tokens: {gap} (median of each prompt's mean)

Prefill: {found["prefill_tokens"]} tokens in {found["prefill_seconds"]:.2f} s, \
{found["prefill_tokens_per_second"]} tokens/s
Decode: {found["decode_tokens"]} tokens in {found["decode_seconds"]:.2f} s, \
{found["decode_tokens_per_second"]} tokens/s{share(found)}{drafts(found)}
(the time of a step with both is split in proportion to their tokens)
Prefix-cache hits: {found["cached_tokens"]} of {found["prompt_tokens"]} prompt tokens
Preemptions: {found["preemptions"]}
KV blocks used at peak: {found["peak_blocks"]} of {found["num_blocks"]}, {found["block_size"]} \
tokens each
"""
