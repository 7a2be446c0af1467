"""How fast it is: prompts to measure with, and a report.

The prompts are those of Alpaca's instructions (Taori et al., 2023) or any file in their format.
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
# where the lab, the course and the bundled model are: a wheel has them in the package's share/, a
# clone of the project beside src/
ROOT = PACKAGE / "share" if (PACKAGE / "share").is_dir() else PACKAGE.parents[1]
MODELS = ROOT / "models"
BUNDLED = MODELS / "prompts" / "oldbooks_instructions.json"
# how many prompts at most are run before a measurement, how long they are, and their new tokens
WARM_UP_BATCH, WARM_UP_PROMPT, WARM_UP_TOKENS = 16, 24, 8


# prompts ------------------------------------------------------------------------------------------


def alpaca_prompts(rows: list, source: str) -> list[str]:
    """Of each row the instruction and, where there is an input, a blank line and the input. Raises
    ValueError, beginning with the source and the row, for one that has no such fields."""
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
    """All prompts of an Alpaca-format file. Raises ValueError naming the file and the row."""
    from ..jobs.rows import read_rows

    return alpaca_prompts(read_rows(path), str(path))


def check_choices(rows: list, source: str) -> None:
    """Raises ValueError, naming the row, unless each has a prompt and continuations of it."""
    for number, row in enumerate(rows, 1):
        texts = row.get("continuations") if isinstance(row, dict) else None
        good = isinstance(texts, list) and bool(texts) and all(texts)
        if not good or not all(isinstance(text, str) for text in [row.get("prompt"), *texts]):
            wanted = '{"prompt": "...", "continuations": ["...", ...]}, no continuation empty'
            raise ValueError(f"{source}: row {number}: expected {wanted}, not {row!r:.80}")


def find_prompts(path: str | None, count: int) -> tuple[list[str], str]:
    """(the first `count` prompts, or as many as there are, and where they come from): the file
    `path`, else Alpaca's data set if the `datasets` package can reach it, else the bundled file."""
    if path is not None:
        return read_prompts(path)[:count], path
    reason = f"`pip install datasets` for {DATASET}"
    if importlib.util.find_spec("datasets") is not None:
        from ..sources.hub import hub_answers

        if not hub_answers():
            os.environ["HF_HUB_OFFLINE"] = "1"  # read on import: its local copy, or an error now
        try:
            from datasets import load_dataset

            rows = list(load_dataset(DATASET, split=f"train[:{count}]"))
            return alpaca_prompts(rows, DATASET), DATASET
        except Exception as error:  # whatever went wrong out there, there are prompts here
            reason = f"no {DATASET}: {type(error).__name__}"
    if not BUNDLED.is_file():
        raise ValueError(f"no prompts here ({reason}): give --prompts-file or --random-input-len")
    return read_prompts(BUNDLED)[:count], f"the bundled {BUNDLED.name} ({reason})"


def random_prompts(count, length, shared, vocabulary, seed) -> list[list[int]]:
    """`count` prompts of `shared` token ids that are the same in all, and `length` of their own."""
    draw = random.Random(seed)
    prefix = draw.choices(range(vocabulary), k=shared)
    return [prefix + draw.choices(range(vocabulary), k=length) for _ in range(count)]


def warm_up(llm, params, num_prompts: int) -> float:
    """Run a few short prompts, so that what a process does once (to read kernels from the disk, to
    start threads) is in no figure; then forget them. Gives the seconds that this took.

    params: of the benchmark, since they decide which kernels a step needs; num_prompts: as many as
    the benchmark has at most. In a pool that is too small for a prompt nothing is done.
    """
    start = time.perf_counter()
    longest = min(llm.max_positions - 1, llm.max_model_len)
    new = min(WARM_UP_TOKENS, params.max_tokens, longest - 1)
    length = min(WARM_UP_PROMPT, longest - new)
    if new < 1 or length < 1:
        return 0.0
    # a seed of their own: the engine's next one is for the benchmark
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
    """Count per second; nothing was done in no time."""
    return round(count / seconds, 1) if seconds else 0.0


def counters(llm) -> dict[str, float]:
    """What the engine counts."""
    return llm.stats()


def drafts(stats: dict) -> str:
    """How many draft tokens were accepted, where there were any, after other words."""
    num_accepted = stats.get("accepted_tokens")
    num_drafted = stats.get("guessed_tokens")
    if not num_drafted:
        return ""
    share = num_accepted / num_drafted
    return f"; {num_accepted} of {num_drafted} draft tokens accepted ({share:.0%})"


def share(found: dict) -> str:
    """How much of the memory's bandwidth decoding used, where that was measured."""
    if not found.get("decode_bytes_per_second"):
        return ""
    used, most = found["decode_bytes_per_second"], found["bytes_per_second"]
    return f", reading {used / 1e9:.3g} GB/s of {most / 1e9:.3g} measured ({used / most:.0%})"


def results(outputs: list, seconds: float, stats: dict, times: list) -> dict:
    """What a benchmark is about, and the engine's own counters.

    seconds: from the arrival of all prompts to the last token; stats: LLM.stats() of that time;
    times: the SampleTimes of each sample (features/stats.py).
    """
    tokens = sum(len(output["token_ids"]) for output in outputs)
    # the first token of a request comes out of the step that ends its prompt
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
    """Medians over the samples, in seconds: from the arrival of a request to its first token, and
    from each token to the next one, which is a sample's mean. None where there is nothing to
    measure."""
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
    """A time for people."""
    return "not measured" if seconds is None else f"{1000 * seconds:,.1f} ms"


def report(found: dict) -> str:
    """The results for people."""
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
(the time of a step that does both is divided by its tokens)
Prefix-cache hits: {found["cached_tokens"]} of {found["prompt_tokens"]} prompt tokens
Preemptions: {found["preemptions"]}
KV blocks used at peak: {found["peak_blocks"]} of {found["num_blocks"]}, of \
{found["block_size"]} tokens each
"""
