"""A trainable nanochat GPT: nanochat's config, names and mathematics in plain torch.

It computes whole sequences at once, without a KV cache. It supports the first and the last of
nanochat's eras: era 1, and era 5, the era of the bundled model. src/microvllm/model.py has
the same layers for inference, in all eras.
"""

from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microvllm.checkpoint import find_step, read_checkpoint

SMEAR_CHANNELS = 24  # input channels of the smear gate
VE_CHANNELS = 12  # input channels of the gate of a value embedding
SOFTCAP = 15
CONTEXTS = 10  # the rotary tables have this many times the context's length


@dataclass
class Config:
    """nanochat's `GPTConfig` of era 5. In era 1 there is no window_pattern."""

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
    def __init__(self, config, newest: bool, has_gate: bool):
        super().__init__()
        width = config.n_embd
        self.head_dim = width // config.n_head
        self.qk_scale = 1.2 if newest else 1.0
        kv_width = config.n_kv_head * self.head_dim
        self.c_q = matrix(width, width)
        self.c_k = matrix(width, kv_width)
        self.c_v = matrix(width, kv_width)
        self.c_proj = matrix(width, width)
        self.ve_gate = matrix(VE_CHANNELS, config.n_kv_head) if has_gate else None

    def forward(self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor, mask: Tensor):
        """x (B, T, C) normed; ve (B, T, Hkv D) or None; cos, sin (T, 1, D/2); mask (T, T)."""
        q = self.qk_scale * rotate(self.heads(self.c_q(x)), cos, sin)
        k = self.qk_scale * rotate(self.heads(self.c_k(x)), cos, sin)
        v = self.heads(self.c_v(x))
        if ve is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :VE_CHANNELS]))
            v = v + gate[..., None] * self.heads(ve)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, enable_gqa=True
        )
        return self.c_proj(y.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, H D) to (B, T, H, D)."""
        return x.unflatten(-1, (-1, self.head_dim))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, then a norm of each head."""
    a, b = x.chunk(2, -1)
    return norm(torch.cat([a * cos + b * sin, b * cos - a * sin], -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = matrix(config.n_embd, 4 * config.n_embd)
        self.c_proj = matrix(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config, newest: bool, has_gate: bool):
        super().__init__()
        self.attn = Attention(config, newest, has_gate)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *inputs) -> Tensor:
        x = x + self.attn(norm(x), *inputs)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """A trainable GPT. newest: era 5, else era 1; seed: of the random weights (no matrix is
    zero); pad_vocab_size_to: the embedding has a multiple of this number of rows."""

    def __init__(
        self, config=None, newest: bool = True, seed: int = 0, pad_vocab_size_to: int = 64
    ):
        super().__init__()
        self.config = config = copy(config or Config())
        self.newest = newest
        if not newest:
            del config.window_pattern
        num_rows = -(-config.vocab_size // pad_vocab_size_to) * pad_vocab_size_to
        num_layers = config.n_layer
        # every other layer, including the last one
        gated_layers = [i for i in range(num_layers) if newest and i % 2 == (num_layers - 1) % 2]
        blocks = nn.ModuleList(Block(config, newest, i in gated_layers) for i in range(num_layers))
        embedding = nn.Embedding(num_rows, config.n_embd)
        self.transformer = nn.ModuleDict({"wte": embedding, "h": blocks})
        self.lm_head = matrix(config.n_embd, num_rows)
        self.windows = [config.sequence_len * CONTEXTS] * num_layers
        if newest:
            self.add_newest(num_rows, gated_layers)
        generator = torch.Generator().manual_seed(seed)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=generator)
        self.add_rotary_tables()

    def add_newest(self, num_rows: int, gated_layers: list[int]) -> None:
        """Add the parameters of era 5 that era 1 does not have."""
        config = self.config
        num_layers = config.n_layer
        kv_width = config.n_kv_head * config.n_embd // config.n_head
        self.value_embeds = nn.ModuleDict(
            {str(i): nn.Embedding(num_rows, kv_width) for i in gated_layers}
        )
        self.resid_lambdas = nn.Parameter(torch.linspace(1.1, 0.9, num_layers))
        self.x0_lambdas = nn.Parameter(torch.linspace(0.2, 0.1, num_layers))
        self.smear_gate = matrix(SMEAR_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.full((1,), 0.5))
        self.backout_lambda = nn.Parameter(torch.full((1,), 0.2))
        short = 128 * -(-config.sequence_len // 512)
        kinds = (config.window_pattern * num_layers)[: num_layers - 1] + "L"
        self.windows = [short if kind == "S" else config.sequence_len for kind in kinds]

    def add_rotary_tables(self) -> None:
        config = self.config
        channels = torch.arange(0, config.n_embd // config.n_head, 2) * config.n_head
        speeds = (1e5 if self.newest else 1e4) ** -(channels / config.n_embd)
        positions = torch.arange(float(CONTEXTS) * config.sequence_len)
        angles = torch.outer(positions, speeds)[:, None]
        for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
            rounded = table if self.newest else table.bfloat16().float()
            self.register_buffer(name, rounded, persistent=False)

    def get_device(self) -> torch.device:
        return self.lm_head.weight.device

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """(B, T, vocab_size) logits of token ids (B, T), or the mean loss of targets (B, T), where
        -1 is ignored."""
        x = norm(self.transformer.wte(idx))
        if self.newest:
            gate = torch.sigmoid(self.smear_gate(x[:, 1:, :SMEAR_CHANNELS]))
            gate = self.smear_lambda * gate
            x = torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], 1)
        x0 = x
        middle = 0.0
        length = idx.shape[1]
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
        logits = SOFTCAP * torch.tanh(logits / SOFTCAP)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def load(directory) -> GPT:
    """Load the last checkpoint of a directory, with float32 weights. Raises FileNotFoundError or
    ValueError, which names the file or the directory."""
    directory = Path(directory)
    config, recipe, weights = read_checkpoint(directory, find_step(directory, None))
    if recipe.era not in ("1", "5"):
        raise ValueError(f"{directory} is of era {recipe.era}: give a checkpoint of era 1 or 5")
    num_rows = len(weights["transformer.wte.weight"])
    gpt = GPT(Config(**vars(config)), newest=recipe.era == "5", pad_vocab_size_to=num_rows)
    gpt.load_state_dict(weights)  # copies the weights and converts their dtype
    return gpt
