"""Other programs that gpu.py times on its workloads, with random weights of the same shape."""

from __future__ import annotations

import time
from types import ModuleType

import torch
import torch.nn.functional as F

from microvllm.model import GPTConfig

TEMPERATURE = 0.7


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Transformers:
    """The model in transformers, and its two ways to serve a batch. Each returns (number of new
    tokens, seconds)."""

    def __init__(
        self, transformers: ModuleType, c: GPTConfig, device: torch.device, dtype: torch.dtype
    ):
        config = transformers.NanoChatConfig(
            vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=4 * c.n_embd,
            num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
            num_key_value_heads=c.n_kv_head, max_position_embeddings=c.sequence_len,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        # no end token and no top-k, as in this engine's runs
        self.sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0,
                         "eos_token_id": None, "pad_token_id": 0}  # fmt: skip
        with torch.device(device):
            self.model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa"
            ).eval()
        self.transformers, self.device = transformers, device

    def padded(self, prompts: list[list[int]], new: int) -> tuple[int, float]:
        """`generate` with prompts padded on the left."""
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        ids = [[0] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
        synchronize(self.device)
        start = time.perf_counter()
        out = self.model.generate(
            input_ids=torch.tensor(ids, device=self.device),
            attention_mask=torch.tensor(mask, device=self.device),
            max_new_tokens=new,
            **self.sampling,
        )
        synchronize(self.device)
        return (out.shape[1] - longest) * len(prompts), time.perf_counter() - start

    def paged(self, prompts: list[list[int]], new: int) -> tuple[int, float]:
        """`generate_batch`. Its manager is kept, so a second call has no set-up."""
        settings = self.transformers.GenerationConfig(max_new_tokens=new, **self.sampling)
        start = time.perf_counter()
        outputs = self.model.generate_batch(
            prompts, generation_config=settings, persistent_manager=True
        )
        seconds = time.perf_counter() - start
        return sum(len(output.generated_tokens) for output in outputs.values()), seconds

    def close(self) -> None:
        self.model.destroy_cached_continuous_batching_manager()


def transformers_peer(bench, transformers: ModuleType) -> None:
    """Time transformers with the workloads of a gpu.Bench, and report the results there."""
    model = Transformers(transformers, bench.config, bench.device, bench.dtype)
    requests, stream = bench.headline_requests(), bench.shrunk(128)
    many, new = [length for length, _ in requests], requests[0][1]
    for run, name, part, prompt_lengths, count, warm_up in (
        (model.padded, "transformers_generate", "single", [stream], stream, 2),
        (model.padded, "transformers_generate", "headline", many, new, 2),
        # the warm-up is a full run, because the manager of generate_batch chooses its sizes from it
        (model.paged, "transformers_generate_batch", "headline", many, new, new),
    ):
        run([bench.prompt(length) for length in prompt_lengths], warm_up)
        tokens, seconds = run([bench.prompt(length) for length in prompt_lengths], count)
        # generate_batch returns nothing, and raises no error, when its thread dies
        if tokens == count * len(prompt_lengths):
            bench.peer(name, part, tokens, seconds)
        else:
            print(f"peers: {name}, {part}: not counted, {tokens} tokens were made", flush=True)
    model.close()


class EagerLoop:
    """A stand-in for nanochat's Engine: plain torch, contiguous K and V, SDPA, kernel by kernel.

    Unlike the original, it does not cast float32 weights to bfloat16 at each use.
    """

    def __init__(self, config: GPTConfig, device: torch.device, dtype: torch.dtype):
        c, kv = config.n_embd, config.n_kv_head * config.head_dim
        with torch.device(device):
            self.embedding = torch.nn.Embedding(config.vocab_size, c, dtype=dtype)
            sizes = [(c, c), (c, kv), (c, kv), (c, c), (c, 4 * c), (4 * c, c)]
            self.layers = [
                [torch.nn.Linear(*s, bias=False, dtype=dtype) for s in sizes]
                for _ in range(config.n_layer)
            ]
            self.head = torch.nn.Linear(c, config.vocab_size, bias=False, dtype=dtype)
            steps = torch.arange(config.head_dim // 2) * (-2 / config.head_dim)
            angles = torch.outer(torch.arange(config.sequence_len), 10_000.0**steps)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self.config, self.device, self.dtype = config, device, dtype

    def forward(self, ids: torch.Tensor, cache: torch.Tensor, start: int) -> torch.Tensor:
        """Logits (B, V) after ids (B, T) at positions `start` on.

        cache: (layers, k and v, B, kv heads, positions, D), filled before `start`.
        """
        (batch, count), d = ids.shape, self.config.head_dim
        cos, sin = self.cos[start : start + count], self.sin[start : start + count]
        x = rms(self.embedding(ids))
        for (to_q, to_k, to_v, proj, up, down), (k_cache, v_cache) in zip(
            self.layers, cache, strict=True
        ):
            h = rms(x)
            q, k, v = (to(h).view(batch, count, -1, d).transpose(1, 2) for to in (to_q, to_k, to_v))
            q, k = (rms(rotate(t, cos, sin)) for t in (q, k))
            k_cache[:, :, start : start + count], v_cache[:, :, start : start + count] = k, v
            k, v = k_cache[:, :, : start + count], v_cache[:, :, : start + count]
            y = F.scaled_dot_product_attention(
                q, k, v, is_causal=count > 1, enable_gqa=k.shape[1] != q.shape[1]
            )
            x = x + proj(y.transpose(1, 2).reshape(batch, count, -1))
            x = x + down(F.relu(up(rms(x))).square())
        logits = self.head(rms(x[:, -1])).float()
        return 15 * torch.tanh(logits / 15)

    def generate(self, prompt: list[int], samples: int, new: int) -> list[list[int]]:
        """`new` tokens for each of `samples` rows; each step copies one column to the host."""
        c = self.config
        size = (c.n_layer, 2, samples, c.n_kv_head, len(prompt) + new, c.head_dim)
        cache = torch.empty(size, device=self.device, dtype=self.dtype)
        # one prefill, copied to all rows
        logits = self.forward(torch.tensor([prompt], device=self.device), cache[:, :, :1], 0)
        cache[:, :, 1:, :, : len(prompt)] = cache[:, :, :1, :, : len(prompt)]
        logits = logits.expand(samples, -1)
        columns = []
        for start in range(len(prompt), len(prompt) + new):
            ids = torch.multinomial(torch.softmax(logits / TEMPERATURE, dim=-1), 1)
            columns.append(ids[:, 0].tolist())
            if len(columns) < new:
                logits = self.forward(ids, cache, start)
        return columns


def rms(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
