"""The memory of a checkpoint in each precision, and the speed limit of decoding: the roofline.

The limit is an estimate. A decode step reads every weight once, except the embedding tables, and
the K and V that its sequences attend to. It cannot read them faster than memory delivers them.
"""

from __future__ import annotations

import textwrap
import time
from itertools import groupby
from typing import NamedTuple


class Precision(NamedTuple):
    """The storage format of a model's numbers."""

    bits: float  # per weight of a layer's matrix, including the scales of groups
    row: int  # extra bytes per row of a matrix: its scale and the correction of its sums
    other: int  # bytes per number of the embedding tables, K and V
    device: str = ""  # the only device type with this format; "": all
    kv: str = "auto"  # "int8": one byte per number of K and V, and a scale of two bytes per head
    head: int = 0  # bits per weight of lm_head; 0: as in the layers


PRECISIONS = {
    "float32": Precision(32, 0, 4),
    "bfloat16": Precision(16, 0, 2),
    "float16": Precision(16, 0, 2, "cuda"),
    "int8": Precision(8, 8, 2, "cpu"),
    "int6": Precision(6, 8, 2, "cpu"),
    "int5": Precision(5, 8, 2, "cpu"),
    "int4": Precision(4.25, 8, 2, "cpu", head=6),
    "fp8": Precision(8, 4, 2, "cuda"),
}
BATCHES = 1, 8, 64  # sequences that decode together


def matrices(config) -> tuple[int, int]:
    """(numbers, rows) of the matrices that a step multiplies by: all layers and the head."""
    c, kv = config.n_embd, config.n_kv_head * config.head_dim
    numbers = config.n_layer * (10 * c * c + 2 * c * kv) + config.vocab_size * c
    return numbers, config.n_layer * (7 * c + 2 * kv) + config.vocab_size


def step_bytes(config, kind: Precision) -> int:
    """Bytes of the weights that a step reads."""
    numbers, rows = matrices(config)
    head = config.vocab_size * config.n_embd
    bits = (numbers - head) * kind.bits + head * (kind.head or kind.bits)
    return int(bits / 8) + rows * kind.row


def layer_bytes(config, kind: Precision) -> int:
    """Bytes of K and V of one token in one layer."""
    head = config.head_dim + 2 if kind.kv == "int8" else config.head_dim * kind.other
    return 2 * config.n_kv_head * head


def seen_bytes(config, windows: list[int], kind: Precision, context: int) -> int:
    """Bytes of the K and V that the last token of a context attends to, including its own."""
    seen = sum(min(context, w + 1) if w >= 0 else context for w in windows)
    return seen * layer_bytes(config, kind)


def describe(config, recipe, weights: dict, device, dtype="auto", kv_cache_dtype="auto") -> dict:
    """The architecture of a checkpoint and its memory needs on the device: in its dtype or stored
    bits, and in each precision that the device has. Speed limits are for sequences that have filled
    half of the context."""
    from ..checkpoint import pick_dtype
    from ..environment import free_memory
    from ..features.windows import group_layers, most_blocks
    from ..loading import stored_as
    from ..model import layer_windows

    on_gpu, dtype = device.type == "cuda", str(pick_dtype(dtype, device))[6:]
    length, windows = config.sequence_len, layer_windows(config, recipe)
    parameters, stored = sum(w.numel() for w in weights.values()), stored_as(weights)
    kinds = {
        name: kind._replace(kv=kv_cache_dtype)
        for name, kind in PRECISIONS.items()
        if kind.device in ("", device.type) and (kind.bits > 8 or stored in (None, name))
    }
    dtype = stored if stored in kinds and dtype == "float32" else dtype
    groups = group_layers(windows, length)  # in blocks of 16 tokens, equal numbers of layers
    blocks = most_blocks([window for window, _ in groups], 16, length)
    speed = bandwidth(device)

    def takes(kind: Precision) -> dict:
        read, seen = step_bytes(config, kind), seen_bytes(config, windows, kind, length // 2)
        limits = {n: round(n * speed / (read + n * seen), 1) for n in BATCHES}
        return {
            "weight_bytes": read + (parameters - matrices(config)[0]) * kind.other,
            "kv_bytes_per_token": config.n_layer * layer_bytes(config, kind),
            "decode_limits": limits,
        }

    own = PRECISIONS[dtype]._replace(kv=kv_cache_dtype)
    chosen, free = takes(own), free_memory(device)
    width = max(len(layers) for _, layers in groups)
    sequence_bytes = blocks * 16 * width * layer_bytes(config, own)
    # the largest cache: 0.9 of the free memory of a GPU, or half of it elsewhere. by default the
    # engine takes at most 4 GB of the latter
    cache_bytes = max(0, free - chosen["weight_bytes"]) * (0.9 if on_gpu else 0.5)
    return {
        "config": vars(config),
        "recipe": vars(recipe),
        "windows": windows,
        "parameters": parameters,
        "file_dtypes": sorted(
            {f"int{w.bits}" if hasattr(w, "bits") else str(w.dtype)[6:] for w in weights.values()}
        ),
        "file_bytes": sum(w.nbytes for w in weights.values()),
        "device": str(device),
        "dtype": dtype,
        **chosen,
        "kv_cache_dtype": dtype if kv_cache_dtype == "auto" else kv_cache_dtype,
        "kv_bytes_per_sequence": sequence_bytes,
        "free_bytes": free,
        "full_sequences_that_fit": int(cache_bytes // sequence_bytes),
        "bytes_per_second": round(speed),
        "precisions": {name: takes(kind) for name, kind in kinds.items()},
    }


def precision_of(llm) -> str:
    """The precision of an engine's weights: one of PRECISIONS, or another name."""
    return getattr(llm.model, "store", None) or str(llm.model.dtype)[6:]


def reading(llm, outputs: list, stats: dict, precision: str) -> dict:
    """How fast the decode steps of a run read memory, and the measured bandwidth. Each step reads
    the weights, and each token after a sample's first one reads the K and V that it attends to.
    Shared K and V count once per sample. Empty with tensor parallelism, or if nothing was
    decoded."""
    if llm.ranks or not stats["decode_seconds"] or precision not in PRECISIONS:
        return {}
    kind, config, windows = PRECISIONS[precision], llm.model.config, llm.model.windows
    kind = kind._replace(kv=str(llm.cache.data.dtype)[6:])
    read = stats["decode_steps"] * step_bytes(config, kind)
    for output in outputs:
        start = len(output["prompt_token_ids"])
        for sample in output["samples"]:
            stop = start + len(sample["token_ids"])
            read += sum(seen_bytes(config, windows, kind, n) for n in range(start + 1, stop))
    return {
        "decode_bytes_per_second": round(read / stats["decode_seconds"]),
        "bytes_per_second": round(bandwidth(llm.device)),
    }


def bandwidth(device) -> float:
    """Memory bandwidth of the device in bytes per second: reads on a CPU, reads and writes on a
    GPU. The best of a few passes over more data than the caches hold, in at most half a second."""
    import torch

    source = torch.ones(2**25, device=device)
    target = None if device.type == "cpu" else torch.zeros_like(source)
    wait, times = getattr(torch, source.device.type).synchronize, []
    while len(times) < 2 or (len(times) < 5 and sum(times) < 0.5):
        wait()
        start = time.perf_counter()
        source.sum() if target is None else target.copy_(source)
        wait()
        times.append(time.perf_counter() - start)
    return (1 if target is None else 2) * source.nbytes / min(times)


def description(found: dict) -> str:
    """The result of `describe` as text."""
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
KV cache  {found["kv_cache_dtype"]}, {found["kv_bytes_per_token"]:,} bytes per token, \
{size(found["kv_bytes_per_sequence"])} per sequence of {length:,} tokens
memory    {size(found["free_bytes"])} free: enough for the weights and about \
{found["full_sequences_that_fit"]:,} sequences of this length
roofline  an estimate: at the measured {size(found["bytes_per_second"])}/s, memory limits decoding \
to {", ".join(limits)} tokens/s for sequences that fill half of the context"""
    title = found["checkpoint"] + (f", step {found['step']}" if found["step"] is not None else "")
    for name, each in found["precisions"].items():
        most = [f"{n:,.0f}" for n in each["decode_limits"].values()]
        text += f"\n{name:9} weights {size(each['weight_bytes'])}, K and V "
        text += f"{each['kv_bytes_per_token']:,} bytes per token; "
        text += f"at most {' / '.join(most)} tokens/s"
    if "check" in found:
        check = found["check"]
        text += f"\nkernels   on {check['card']} ({', '.join(check['versions'])})"
        for title, wrong in check["kernels"].items():
            text += f"\n          {title}: {wrong or 'matches plain torch'}"
    wrapper = textwrap.TextWrapper(96, subsequent_indent=" " * 12, break_on_hyphens=False)
    return "\n".join([title, *(wrapper.fill(f"  {line}") for line in text.splitlines())])


def size(count: float) -> str:
    """A number of bytes with a unit."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB"
