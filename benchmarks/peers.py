"""One engine in its own process, for compare.py.

    python benchmarks/peers.py ENGINE OPTIONS

ENGINE is a function of this file, and OPTIONS are its arguments as JSON. The function loads the
model. Then the process reads jobs from stdin, one JSON object per line, and answers each with a
line of JSON on stdout. Between two jobs it is blocked in a read and does not disturb the other
engines. Output of the engine itself goes to stderr.

The top of this file imports only the standard library, because it may run in any interpreter.

job     prompts: lists of token ids; new: number of tokens to generate for each, greedily, without
        end tokens; shared: length of the common prefix (only the limit uses it)
answer  seconds; tokens: the new tokens of each prompt (not from `limit`, which has other fields)
"""

from __future__ import annotations

import bisect
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # for microvllm

BATCH = 2048  # largest number of tokens in a batch of openvino and llamacpp
Generate = Callable[[list[list[int]], list[int]], list[list[int]]]


def timed(generate: Generate) -> Callable[[dict], dict]:
    """Answer jobs with the result of `generate(prompts, new)` and its seconds."""

    def answer(job: dict) -> dict:
        start = time.perf_counter()
        tokens = generate(job["prompts"], job["new"])
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    return answer


# engines ------------------------------------------------------------------------------------------
#
# options. folder: of the model; threads; dtype: "float32" or "bfloat16"; max_len: length of prompt
# and answer together; kv_gib: size of the pool for K and V, if the engine has one; llm: more
# arguments of LLM, only for microvllm


def microvllm(options: dict) -> Callable[[dict], dict]:
    """This engine."""
    import torch

    from microvllm import LLM, SamplingParams

    torch.set_num_threads(options["threads"])
    block_size, settings = 16, options["llm"]
    config = read_model(options["folder"])[0]
    itemsize = 2 if settings.get("dtype") == "bfloat16" else 4
    token_bytes = 2 * config.n_layer * config.n_kv_head * config.head_dim * itemsize
    blocks = options["kv_gib"] * 2**30 // (token_bytes * block_size)
    llm = LLM(
        options["folder"], device="cpu", num_blocks=blocks, block_size=block_size,
        max_model_len=options["max_len"], trust_tokenizer=True, **settings,
    )  # fmt: skip
    llm.cache.data.zero_()  # allocate the pool by writing to it, as vLLM does at its start

    def generate(prompts: list[list[int]], new: list[int]) -> list[list[int]]:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in new]
        return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]

    return timed(generate)


def nanochat(options: dict) -> Callable[[dict], dict]:
    """A stand-in for nanochat's Engine: plain torch, one prompt at a time, contiguous K and V.

    It supports the models of all eras. A prompt is one forward pass, and each new token another.
    """
    import torch
    import torch.nn.functional as F

    from microvllm.model import layer_windows

    torch.set_num_threads(options["threads"])
    dtype = getattr(torch, options["dtype"])
    config, recipe, stored = read_model(options["folder"])
    weights = {name: w.to(dtype) if w.ndim == 2 else w.float() for name, w in stored.items()}
    d, windows = config.head_dim, layer_windows(config, recipe)
    wte, head = weights["transformer.wte.weight"], weights["lm_head.weight"][: config.vocab_size]
    resid, first = weights.get("resid_lambdas"), weights.get("x0_lambdas")
    exponent = torch.arange(0, d, 2, dtype=torch.float32) / d
    positions = torch.arange(options["max_len"], dtype=torch.float32)
    angles = torch.outer(positions, 1 / recipe.rope_base**exponent)
    tables = angles.cos(), angles.sin()
    if recipe.round_rotary:
        tables = tuple(table.bfloat16() for table in tables)
    cos, sin = (table.to(dtype) for table in tables)

    def rms(x):
        return F.rms_norm(x, (x.shape[-1],), eps=recipe.eps)

    def rotated(x, start):  # (T, heads, D)
        left, right = x.chunk(2, dim=-1)
        c, s = cos[start : start + len(x), None], sin[start : start + len(x), None]
        return rms(torch.cat((left * c + right * s, right * c - left * s), dim=-1))

    def forward(tokens: list[int], start: int, cache) -> torch.Tensor:
        """Logits (V,) after the tokens; K and V of those before `start` are in the cache."""
        ids = torch.tensor(tokens[start:])
        T, end = len(ids), len(tokens)
        x = rms(F.embedding(ids, wte))
        if recipe.smear:
            before = rms(F.embedding(torch.tensor([0, *tokens])[start:end], wte))
            gate = torch.sigmoid(F.linear(x[:, :24], weights["smear_gate.weight"]))
            gate = gate * weights["smear_lambda"].to(dtype)
            gate[: max(0, 1 - start)] = 0  # nothing comes before the first token
            x = x + gate * before
        x0 = x
        for i, (keys, values) in enumerate(cache):
            part = f"transformer.h.{i}."
            if recipe.lambdas:
                x = resid[i].to(dtype) * x + first[i].to(dtype) * x0
            h = rms(x)
            q, k, v = (
                F.linear(h, weights[f"{part}attn.c_{name}.weight"]).view(T, -1, d) for name in "qkv"
            )
            q, k = (rotated(t, start) * recipe.qk_scale for t in (q, k))
            if f"value_embeds.{i}.weight" in weights:
                gate = F.linear(h[:, : recipe.gate_channels], weights[f"{part}attn.ve_gate.weight"])
                gate = recipe.gate_scale * torch.sigmoid(gate)
                embedded = F.embedding(ids, weights[f"value_embeds.{i}.weight"])
                v = v + gate[..., None] * embedded.view_as(v)
            keys[:, start:end], values[:, start:end] = k.transpose(0, 1), v.transpose(0, 1)
            low, mask = 0, None
            if 0 <= windows[i] < end - 1:
                low = max(0, start - windows[i])
                distance = torch.arange(start, end)[:, None] - torch.arange(low, end)
                mask = (distance >= 0) & (distance <= windows[i])
            y = F.scaled_dot_product_attention(
                q.transpose(0, 1)[None], keys[None, :, low:end], values[None, :, low:end], mask,
                is_causal=mask is None and T > 1, enable_gqa=True,
            )  # fmt: skip
            y = y[0].transpose(0, 1).reshape(T, -1)
            x = x + F.linear(y, weights[f"{part}attn.c_proj.weight"])
            h = F.relu(F.linear(rms(x), weights[f"{part}mlp.c_fc.weight"])).square()
            x = x + F.linear(h, weights[f"{part}mlp.c_proj.weight"])
            if recipe.smear and i == config.n_layer // 2:
                middle = x
        if recipe.smear:
            x = x - weights["backout_lambda"].to(dtype) * middle
        logits = F.linear(rms(x[-1]), head).float()
        return recipe.softcap * torch.tanh(logits / recipe.softcap)

    @torch.inference_mode()
    def generate(prompts: list[list[int]], new: list[int]) -> list[list[int]]:
        answers = []
        for prompt, count in zip(prompts, new, strict=True):
            size = (config.n_layer, 2, config.n_kv_head, len(prompt) + count, d)
            cache, tokens, start = torch.zeros(size, dtype=dtype), list(prompt), 0
            for _ in range(count):
                logits = forward(tokens, start, cache)
                start = len(tokens)
                tokens.append(int(logits.argmax()))
            answers.append(tokens[len(prompt) :])
        return answers

    return timed(generate)


def transformers(options: dict) -> Callable[[dict], dict]:
    """Hugging Face's `generate`: one batch, padded on the left. All rows run until the longest
    output is complete."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options["threads"])
    dtype = getattr(torch, options["dtype"])
    model = AutoModelForCausalLM.from_pretrained(options["folder"], dtype=dtype).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], new: list[int]) -> list[list[int]]:
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        ids = [[0] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
        out = model.generate(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=max(new),
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        rows = out[:, longest:].tolist()
        return [row[:count] for row, count in zip(rows, new, strict=True)]

    return timed(generate)


def vllm(options: dict) -> Callable[[dict], dict]:
    """vLLM for CPU, which runs NanoChat through its Transformers backend."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(options["kv_gib"])
    from vllm import LLM, SamplingParams

    llm = LLM(
        options["folder"], dtype=options["dtype"], skip_tokenizer_init=True,
        max_model_len=options["max_len"],
    )  # fmt: skip

    def generate(prompts: list[list[int]], new: list[int]) -> list[list[int]]:
        params = [
            SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
            for n in new
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return timed(generate)


# engines that run a Llama in their own format, see llama.py. `folder` has this format, and dtype
# may also be "int8" or "int4"


def openvino(options: dict) -> Callable[[dict], dict]:
    """OpenVINO GenAI's pipeline with continuous batching and prefix cache.

    K and V have the dtype; with int8 weights, OpenVINO chooses the types of activations, K and V.
    """
    import numpy as np
    import openvino
    import openvino_genai as genai

    settings, kind = {"INFERENCE_NUM_THREADS": options["threads"]}, options["dtype"]
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if kind == "bfloat16" and "BF16" not in capabilities:
        raise RuntimeError(
            "OpenVINO has no bfloat16 on this processor: use --peer-dtype float32 or int8"
        )
    if kind != "int8":
        short = {"float32": "f32", "bfloat16": "bf16"}[kind]
        settings |= {"INFERENCE_PRECISION_HINT": short, "KV_CACHE_PRECISION": short}
    plan = genai.SchedulerConfig()
    plan.cache_size, plan.enable_prefix_caching = options["kv_gib"], True
    plan.max_num_batched_tokens = BATCH
    pipe = genai.ContinuousBatchingPipeline(options["folder"], plan, "CPU", settings)

    def generate(prompts: list[list[int]], new: list[int]) -> list[list[int]]:
        params = [
            genai.GenerationConfig(max_new_tokens=n, ignore_eos=True, do_sample=False) for n in new
        ]
        inputs = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        return [list(result.m_generation_ids[0]) for result in pipe.generate(inputs, params)]

    def answer(job: dict) -> dict:
        start = time.perf_counter()
        # OpenVINO looks for a prefix when a request arrives, so the prefix must be computed before.
        # Only full blocks: requests that find the same part-filled block overwrite it (2026.4)
        if num_shared := job["shared"] // 32 * 32:
            generate([job["prompts"][0][:num_shared]], [1])
        tokens = generate(job["prompts"], job["new"])
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    return answer


def llamacpp(options: dict) -> Callable[[dict], dict]:
    """llama.cpp through the functions of llama-cpp-python, with a loop around them.

    All requests of a job run from its start. A shared prefix is computed once and copied. numpy
    computes the argmax. K and V are f16, and llama.cpp chooses whether to use flash attention. Each
    sequence has its own stream for K and V. All use one stream if they share a prefix, or if kv_gib
    is too small. The context of a job is made and written to before its time starts.
    """
    import ctypes

    import llama_cpp as api
    import numpy as np

    api.llama_backend_init()
    path = str(Path(options["folder"]) / "model.gguf").encode()
    model = api.llama_model_load_from_file(path, api.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path.decode()}")
    vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    query_heads, kv_heads = api.llama_model_n_head(model), api.llama_model_n_head_kv(model)
    token_bytes = 2 * 2 * api.llama_model_n_layer(model) * api.llama_model_n_embd(model)
    token_bytes = token_bytes * kv_heads // query_heads
    contexts = {}  # properties -> context, only for the latest one

    # a batch: for each row the token, its position, the number of its sequences (one), a pointer to
    # their numbers, and whether to compute its logits
    owners = np.zeros(BATCH, np.int32)
    fields = {
        "token": np.zeros(BATCH, np.int32),
        "pos": np.zeros(BATCH, np.int32),
        "n_seq_id": np.ones(BATCH, np.int32),
        "seq_id": owners.ctypes.data + 4 * np.arange(BATCH, dtype=np.uint64),
        "logits": np.zeros(BATCH, np.int8),
    }
    batch, kinds = api.llama_batch(), dict(api.llama_batch._fields_)
    for field, array in fields.items():
        setattr(batch, field, ctypes.cast(array.ctypes.data, kinds[field]))
    columns = fields["token"], fields["pos"], owners, fields["logits"]  # for a row in `step`

    def context(job: dict):
        """A context that is large enough for the job."""
        sizes = [len(prompt) + n for prompt, n in zip(job["prompts"], job["new"], strict=True)]
        stream = -(-max(sizes) // 256) * 256
        streams = stream * len(sizes)
        together = job["shared"] > 0 or streams * token_bytes > options["kv_gib"] * 2**30
        cells = -(-sum(sizes) // 256) * 256 if together else streams
        key = together, cells, len(sizes)
        if key not in contexts:
            for old in contexts.values():
                api.llama_free(old)
            contexts.clear()
            params = api.llama_context_default_params()
            params.n_ctx, params.n_seq_max, params.kv_unified = cells, len(sizes), together
            params.n_batch, params.n_ubatch = BATCH, 512
            params.n_threads = params.n_threads_batch = options["threads"]
            params.no_perf = True
            new = api.llama_init_from_model(model, params)
            if not new:
                raise RuntimeError(f"llama.cpp cannot make a context of {cells} tokens")
            contexts[key] = new
        memory = api.llama_get_memory(contexts[key])
        api.llama_memory_clear(memory, True)
        return contexts[key], memory

    def step(ctx, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute rows (token, position, sequence, has_logits). Returns the next tokens of the rows
        with logits."""
        next_tokens = []
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            batch.n_tokens = size = len(part)
            for array, column in zip(columns, zip(*part, strict=True), strict=True):
                array[:size] = column
            if failed := api.llama_decode(ctx, batch):
                raise RuntimeError(f"llama_decode returned {failed} for {size} tokens")
            if count := int(fields["logits"][:size].sum()):
                logits = np.ctypeslib.as_array(api.llama_get_logits(ctx), (count, vocab))
                next_tokens += logits.argmax(-1).tolist()
        return next_tokens

    def answer(job: dict) -> dict:
        (ctx, memory), shared = context(job), job["shared"]
        prompts, new = job["prompts"], job["new"]
        start = time.perf_counter()
        rows = []
        if shared:
            step(ctx, [(token, i, 0, False) for i, token in enumerate(prompts[0][:shared])])
            for s in range(1, len(prompts)):
                api.llama_memory_seq_cp(memory, 0, s, -1, -1)
        for s, prompt in enumerate(prompts):
            last = len(prompt) - 1
            rows += [(prompt[i], i, s, i == last) for i in range(shared, len(prompt))]
        tokens = [[token] for token in step(ctx, rows)]
        running = range(len(prompts))
        while True:
            for s in running:
                if len(tokens[s]) == new[s]:
                    api.llama_memory_seq_rm(memory, s, -1, -1)
            running = [s for s in running if len(tokens[s]) < new[s]]
            if not running:
                break
            rows = [(tokens[s][-1], len(prompts[s]) + len(tokens[s]) - 1, s, True) for s in running]
            for s, token in zip(running, step(ctx, rows), strict=True):
                tokens[s].append(token)
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    return answer


# the limit ----------------------------------------------------------------------------------------

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # numbers of rows whose products may be timed


def limit(options: dict) -> Callable[[dict], dict]:
    """Not an engine: the smallest possible time of a job on this processor.

    A step of r rows, s of them sampled, takes the time of its matrix products, body(r) + head(s),
    plus the bytes of K and V that its sequences attend to divided by the read bandwidth. The first
    step computes all prompts, with their shared prefix once. Then all sequences advance until their
    last token. Shared K and V count for each sequence, so an engine that keeps them in the
    processor's cache can exceed this limit. Products are timed in plain form, with weights in
    oneDNN's layout, and in int8 with torch's quantization; the fastest for each number of rows
    counts. Other numbers of rows are interpolated linearly. `seconds` is the limit of an engine
    that uses a library's products. `own_seconds` also considers this engine's own products, if it
    has any on this processor.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F

    from microvllm.model import layer_windows

    try:
        from microvllm.cpu import backend as cpu
    except ImportError:
        cpu = None
    torch.set_num_threads(options["threads"])
    config, recipe, _ = read_model(options["folder"])
    dtype = torch.bfloat16 if options["llm"].get("dtype") == "bfloat16" else torch.float32
    quantization = options["llm"].get("quantization")
    int8 = quantization is not None  # torch has no products with fewer bits
    kv_itemsize = 2 if int8 else dtype.itemsize  # bytes of a number of K and V
    has_own = cpu is not None and bool(cpu.gemm.INT8_TILE if int8 else cpu.gemm.TILE)
    if has_own:
        backend = cpu.CpuBackend(torch.device("cpu"), torch.float32)
    c, kv = config.n_embd, config.n_kv_head * config.head_dim
    windows = layer_windows(config, recipe)

    def layouts(out: int, into: int) -> list[Callable]:
        """The product with one weight matrix, in each available layout."""
        weight = (torch.randn(out, into) * into**-0.5).to(dtype)
        products = [lambda x: F.linear(x, weight)]
        if int8:
            linear = torch.nn.Linear(into, out, bias=False)
            quantized = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(linear))
            products.append(quantized[0])
        if torch.ops.mkldnn._is_mkldnn_bf16_supported() or dtype == torch.float32:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
            products.append(
                lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
            )
        if has_own:
            linear_class = backend.linear_class(quantization, False, into, dtype)
            own = linear_class([weight], backend, dtype)
            products.append(lambda x: own(x.float()))
        return products

    # each layer has its own weights; shared ones would be in the cache
    sizes = [(c + 2 * kv, c), (c, c), (4 * c, c), (c, 4 * c)]
    layers = [[layouts(*size) for size in sizes] for _ in range(config.n_layer)]
    head = layouts(config.vocab_size, c)
    data = torch.ones(2**26)  # 256 MB

    def fastest(run: Callable) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    def least(times: list[float]) -> tuple[float, float]:
        """(time of a library's fastest layout, time of the fastest layout of all)."""
        return min(times[: len(times) - has_own]), min(times)

    def body_seconds(rows: int) -> tuple[float, float]:
        x, wide = torch.randn(rows, c).to(dtype), torch.randn(rows, 4 * c).to(dtype)

        def run(layout: int) -> None:
            for *narrow, down in layers:
                for products in narrow:
                    products[layout](x)
                down[layout](wide)

        return least([fastest(partial(run, layout)) for layout in range(len(head))])

    def head_seconds(rows: int) -> tuple[float, float]:
        x = torch.randn(rows, c).to(dtype)
        return least([fastest(partial(product, x)) for product in head])

    def interpolate(seconds: Callable[[int], tuple], row_counts: list[int]) -> np.ndarray:
        """(2, n) seconds for n numbers of rows: with a library's products, and with the fastest."""
        neighbours = set()
        for rows in set(row_counts):
            at = min(bisect.bisect_left(ROWS, rows), len(ROWS) - 1)
            neighbours |= {ROWS[at], ROWS[max(0, at - (ROWS[at] > rows))]}
        measured = {rows: seconds(rows) for rows in sorted(neighbours)}
        beyond = np.maximum(1, np.array(row_counts) / max(measured))
        columns = zip(*measured.values(), strict=True)
        return beyond * np.array(
            [np.interp(row_counts, list(measured), times) for times in columns]
        )

    def context_bytes(context: int) -> int:
        tokens = sum(context if w < 0 else min(context, w + 1) for w in windows)
        return tokens * 2 * kv * kv_itemsize

    @torch.inference_mode()
    def answer(job: dict) -> dict:
        lengths, shared, new = [len(p) for p in job["prompts"]], job["shared"], job["new"]
        rows = [shared + sum(length - shared for length in lengths)]
        sampled, read = [len(lengths)], [sum(map(context_bytes, lengths))]
        for step in range(1, max(new)):
            running = [n + step for n, last in zip(lengths, new, strict=True) if step < last]
            rows.append(len(running))
            sampled.append(len(running))
            read.append(sum(map(context_bytes, running)))
        products = interpolate(body_seconds, rows).sum(1)
        products += interpolate(head_seconds, sampled).sum(1)
        bandwidth = data.nbytes / fastest(data.sum)
        seconds, own_seconds = products + sum(read) / bandwidth
        return {
            "seconds": seconds,
            "own_seconds": own_seconds,
            "products_seconds": products[0],
            "bandwidth_gb": bandwidth / 1e9,
        }

    return answer


def read_model(folder: str) -> tuple:
    """Config, recipe and weights (memory-mapped) of a checkpoint of any kind."""
    from microvllm.loading import find_checkpoint, read_checkpoint

    return read_checkpoint(*find_checkpoint(folder, None))


def main() -> None:
    engine, options = sys.argv[1], json.loads(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # engines and their child processes print to stdout
    answer = globals()[engine](options)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=replies)


if __name__ == "__main__":  # vLLM's processes import this file again
    main()
