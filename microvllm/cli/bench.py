"""How fast it is, and how fast it could be: prompts to measure with, a report, and the roofline.

The prompts are those of Alpaca's instructions (Taori et al., 2023) or any file in their format.
"""

from __future__ import annotations

import importlib.util
import os
import random
import textwrap
import time
from itertools import groupby
from pathlib import Path

DATASET = "tatsu-lab/alpaca"
PACKAGE = Path(__file__).resolve().parents[1]
# where the lab, the course and the bundled model are: a wheel has them in the package's share/, a
# clone of the project beside the package
ROOT = PACKAGE / "share" if (PACKAGE / "share").is_dir() else PACKAGE.parent
MODELS = ROOT / "models"
BUNDLED = MODELS / "prompts" / "oldbooks_instructions.json"


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


# the report ---------------------------------------------------------------------------------------


def rate(count: int, seconds: float) -> float:
    """Count per second; nothing was done in no time."""
    return round(count / seconds, 1) if seconds else 0.0


def counters(llm) -> dict[str, float]:
    """What llm.stats() says, or zeros where that feature is not installed."""
    from ..full import optional

    return llm.stats() if optional("features.stats") else {"prompt_tokens": 0, "cached_tokens": 0}


def guesses(stats: dict) -> str:
    """How many guesses of prompt lookup were right, where there were any, after other words."""
    right, of = stats.get("accepted_tokens"), stats.get("guessed_tokens")
    return f"; {right} of {of} guesses right ({right / of:.0%})" if of else ""


def results(outputs: list, seconds: float, stats: dict) -> dict:
    """What a benchmark is about, and the engine's own counters."""
    tokens = sum(len(output["token_ids"]) for output in outputs)
    # the first token of a request comes out of the step that ends its prompt
    decoded = tokens - len(outputs)
    return {
        "total_prompts": len(outputs),
        "total_output_tokens": tokens,
        "total_seconds": round(seconds, 3),
        "tokens_per_second": rate(tokens, seconds),
        "seconds_per_request": round(seconds / len(outputs), 5),
        "prefill_tokens_per_second": rate(stats["prefill_tokens"], stats["prefill_seconds"]),
        "decode_tokens_per_second": rate(decoded, stats["decode_seconds"]),
        **stats,
    }


def report(found: dict) -> str:
    """The results for people."""
    decoded = found["total_output_tokens"] - found["total_prompts"]
    return f"""
Total prompts: {found["total_prompts"]}
Total output tokens: {found["total_output_tokens"]}
Total time: {found["total_seconds"]:.2f} s
Throughput: {found["tokens_per_second"]} tokens/s
Latency per request: {1000 * found["seconds_per_request"]:.1f} ms (total time / prompts)

Prefill: {found["prefill_tokens"]} tokens, {found["prefill_tokens_per_second"]} tokens/s
Decode: {decoded} tokens, {found["decode_tokens_per_second"]} tokens/s{guesses(found)}
Prefix-cache hits: {found["cached_tokens"]} of {found["prompt_tokens"]} prompt tokens
Preemptions: {found["preemptions"]}
KV blocks used at peak: {found["peak_blocks"]} of {found["num_blocks"]}, of \
{found["block_size"]} tokens each
"""


# what a checkpoint takes --------------------------------------------------------------------------


def describe(config, recipe, weights: dict, device, dtype: str = "auto") -> dict:
    """What a checkpoint is and what running it on the device takes.

    The roofline is an estimate: a decode step reads, no faster than the memory can, every weight
    but the embedding tables once, and the K and V that its sequences see (here: each half way
    through the context).
    """
    from ..checkpoint import free_memory, pick_dtype
    from ..features.windows import group_layers, most_blocks
    from ..model import layer_windows

    on_gpu, dtype = device.type == "cuda", pick_dtype(dtype, device)
    length, windows = config.sequence_len, layer_windows(config, recipe)
    parameters = sum(w.numel() for w in weights.values())
    tables = sum(w.numel() for key, w in weights.items() if "wte" in key or "value_embeds" in key)
    layer_bytes = 2 * config.n_kv_head * config.head_dim * dtype.itemsize  # K and V of a token
    groups = group_layers(windows, length)  # in blocks of 16 tokens, as many layers in each
    blocks = most_blocks([window for window, _ in groups], 16, length)
    sequence_bytes = blocks * 16 * max(len(layers) for _, layers in groups) * layer_bytes
    free = free_memory(device)
    # what the cache may have: nearly all of a GPU, or half of what is free elsewhere. unasked the
    # engine takes 4 GB of the latter at most
    room = max(0, free - parameters * dtype.itemsize) * (0.9 if on_gpu else 0.5)
    bandwidth = copy_bandwidth(device)
    seen = layer_bytes * sum(min(length // 2, w + 1 if w >= 0 else length) for w in windows)
    read = (parameters - tables) * dtype.itemsize
    return {
        "config": vars(config),
        "recipe": vars(recipe),
        "windows": windows,
        "parameters": parameters,
        "file_dtypes": sorted({str(w.dtype)[6:] for w in weights.values()}),
        "file_bytes": sum(w.nbytes for w in weights.values()),
        "device": str(device),
        "dtype": str(dtype)[6:],
        "weight_bytes": parameters * dtype.itemsize,
        "kv_bytes_per_token": config.n_layer * layer_bytes,
        "kv_bytes_per_sequence": sequence_bytes,
        "free_bytes": free,
        "full_sequences_that_fit": int(room // sequence_bytes),
        "bytes_per_second": round(bandwidth),
        "decode_limits": {n: round(n * bandwidth / (read + n * seen), 1) for n in (1, 8, 64)},
    }


def copy_bandwidth(device) -> float:
    """Bytes that the device's memory reads and writes in a second, by the best of a few copies."""
    import torch

    source = torch.ones(2**25, device=device)  # 128 MB
    target, times = torch.zeros_like(source), []
    wait = getattr(torch, source.device.type).synchronize
    for _ in range(5):
        wait()
        start = time.perf_counter()
        target.copy_(source)
        wait()
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)


def description(found: dict) -> str:
    """What `describe` found, for people."""
    config, recipe = found["config"], dict(found["recipe"])
    era, length = recipe.pop("era"), config["sequence_len"]
    constants = [f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in recipe.items()]
    windows = ((w, len(list(layers))) for w, layers in groupby(found["windows"]))
    windows = [f"{n} x {'all' if w < 0 else w}" for w, n in windows]
    limits = [f"{limit:,.0f} (batch of {n})" for n, limit in found["decode_limits"].items()]
    text = f"""\
era       {era}: {", ".join(constants)}
shape     {config["n_layer"]} layers of {config["n_embd"]} channels, {config["n_head"]} query and \
{config["n_kv_head"]} kv heads, vocabulary {config["vocab_size"]:,}
context   {length:,} tokens
windows   {", ".join(windows)} (layers x tokens back)
weights   {found["parameters"]:,} parameters; {size(found["file_bytes"])} of \
{" and ".join(found["file_dtypes"])} on disk, {size(found["weight_bytes"])} of {found["dtype"]} on \
{found["device"]}
KV cache  {found["kv_bytes_per_token"]:,} bytes a token, {size(found["kv_bytes_per_sequence"])} a \
sequence of {length:,}
memory    {size(found["free_bytes"])} free: room for about {found["full_sequences_that_fit"]:,} \
such sequences beside the weights
roofline  an estimate, from {size(found["bytes_per_second"])}/s measured by a copy: decoding is \
bound by memory to {", ".join(limits)} tokens/s, half way through the context"""
    title = found["checkpoint"] + (f", step {found['step']}" if found["step"] is not None else "")
    wrapper = textwrap.TextWrapper(96, subsequent_indent=" " * 12, break_on_hyphens=False)
    return "\n".join([title, *(wrapper.fill(f"  {line}") for line in text.splitlines())])


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB"
