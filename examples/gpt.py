"""A nanochat GPT that one can train: nanochat's config, names and mathematics in plain torch.

It computes whole sequences at once, without a KV cache, in the two eras at the ends of nanochat's
history: era 1, and era 5, which the bundled model has. src/microvllm/model.py has the same layers
for inference, in all eras.
"""

from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microvllm.checkpoint import find_step, read_checkpoint


@dataclass
class Config:
    """nanochat's `GPTConfig` of the newest era; the first one's has no window_pattern."""

    sequence_len: int = 256
    vocab_size: int = 311
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 2
    n_embd: int = 64
    window_pattern: str = "SSSL"


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=2.0**-23)


def matrix(width: int, rows: int) -> nn.Linear:
    return nn.Linear(width, rows, bias=False)


class Attention(nn.Module):
    def __init__(self, config, newest: bool, gated: bool):
        super().__init__()
        self.head_dim, self.newest = config.n_embd // config.n_head, newest
        width, kv = config.n_embd, config.n_kv_head * self.head_dim
        self.c_q, self.c_k, self.c_v = matrix(width, width), matrix(width, kv), matrix(width, kv)
        self.c_proj = matrix(width, width)
        self.ve_gate = matrix(12, config.n_kv_head) if gated else None

    def forward(self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor, mask: Tensor):
        """x (B, T, C) normed; ve (B, T, Hkv D) or None; cos, sin (T, 1, D/2); mask (T, T)."""
        q, k, v = (c(x).unflatten(-1, (-1, self.head_dim)) for c in (self.c_q, self.c_k, self.c_v))
        if ve is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :12]))
            v = v + gate[..., None] * ve.view_as(v)

        def rotated(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return norm(torch.cat([a * cos + b * sin, b * cos - a * sin], -1))

        scale = 1.2 if self.newest else 1.0
        q, k, v = (y.transpose(1, 2) for y in (scale * rotated(q), scale * rotated(k), v))
        y = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = matrix(config.n_embd, 4 * config.n_embd)
        self.c_proj = matrix(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config, newest: bool, gated: bool):
        super().__init__()
        self.attn, self.mlp = Attention(config, newest, gated), MLP(config)

    def forward(self, x: Tensor, *inputs) -> Tensor:
        x = x + self.attn(norm(x), *inputs)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """A trainable GPT. newest: of era 5, else of era 1; seed: of its random weights, all of which
    matter; pad_vocab_size_to: the vocabulary's rows are a multiple of it."""

    def __init__(
        self, config=None, newest: bool = True, seed: int = 0, pad_vocab_size_to: int = 64
    ):
        super().__init__()
        self.config, self.newest = copy(config or Config()), newest
        c = self.config
        if not newest:
            del c.window_pattern
        rows = -(-c.vocab_size // pad_vocab_size_to) * pad_vocab_size_to
        n, kv = c.n_layer, c.n_kv_head * c.n_embd // c.n_head
        gated = [i for i in range(n) if newest and i % 2 == (n - 1) % 2]
        blocks = nn.ModuleList(Block(c, newest, i in gated) for i in range(n))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(rows, c.n_embd), "h": blocks})
        self.lm_head = matrix(c.n_embd, rows)
        self.windows = [c.sequence_len * 10] * n
        if newest:
            self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(rows, kv) for i in gated})
            self.resid_lambdas = nn.Parameter(torch.linspace(1.1, 0.9, n))
            self.x0_lambdas = nn.Parameter(torch.linspace(0.2, 0.1, n))
            self.smear_gate = matrix(24, 1)
            self.smear_lambda = nn.Parameter(torch.full((1,), 0.5))
            self.backout_lambda = nn.Parameter(torch.full((1,), 0.2))
            short, long = 128 * -(-c.sequence_len // 512), c.sequence_len
            kinds = (c.window_pattern * n)[: n - 1] + "L"
            self.windows = [short if kind == "S" else long for kind in kinds]
        generator = torch.Generator().manual_seed(seed)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=generator)
        channels = torch.arange(0, c.n_embd // c.n_head, 2) * c.n_head / c.n_embd
        speeds = (1e5 if newest else 1e4) ** -channels
        angles = torch.outer(torch.arange(10.0 * c.sequence_len), speeds)[:, None]
        for name, table in ("cos", angles.cos()), ("sin", angles.sin()):
            table = table if newest else table.bfloat16().float()
            self.register_buffer(name, table, persistent=False)

    def get_device(self) -> torch.device:
        return self.lm_head.weight.device

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """(B, T, vocab_size) logits of token ids (B, T), or the mean loss of targets (B, T), of
        which -1 is ignored."""
        x = norm(self.transformer.wte(idx))
        if self.newest:
            gate = self.smear_lambda * torch.sigmoid(self.smear_gate(x[:, 1:, :24]))
            x = torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], 1)
        x0, middle, length = x, 0.0, idx.shape[1]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        for i, block in enumerate(self.transformer.h):
            ve = None
            if self.newest:
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
                ve = self.value_embeds[str(i)](idx) if str(i) in self.value_embeds else None
            mask = (distance >= 0) & (distance <= self.windows[i])
            x = block(x, ve, self.cos[:length], self.sin[:length], mask.to(x.device))
            if i == self.config.n_layer // 2:
                middle = x
        if self.newest:
            x = x - self.backout_lambda * middle
        logits = self.lm_head(norm(x))[..., : self.config.vocab_size].float()
        logits = 15 * torch.tanh(logits / 15)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def load(directory) -> GPT:
    """The last checkpoint in a directory, with float32 weights. Raises FileNotFoundError or
    ValueError, naming the file or the directory."""
    directory = Path(directory)
    config, recipe, weights = read_checkpoint(directory, find_step(directory, None))
    if recipe.era not in ("1", "5"):
        raise ValueError(f"{directory} is of era {recipe.era}: give a checkpoint of era 1 or 5")
    rows = len(weights["transformer.wte.weight"])
    gpt = GPT(Config(**vars(config)), newest=recipe.era == "5", pad_vocab_size_to=rows)
    gpt.load_state_dict(weights)  # which copies them into its own dtype
    return gpt
