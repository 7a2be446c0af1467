"""What does nanochat's GPT compute, in each of its eras?

An era is a span of versions that compute alike. Its Recipe holds the constants that no tensor shape
reveals; a wrong one gives fluent nonsense, so checkpoint.py finds the era by the state dict, whose
names the modules have. The only state is the KV cache: x0, smear (a part of the previous token's
embedding) and value embeddings (a second table, added to V) need only the ids of a token and the
one before. Backout subtracts the middle layer's x.

    ids -> (1) embed, smear -> x0       each layer: (2) mix x with x0  (3) project  (4) rotate, norm
    -> layers -> (7) backout, norm                  (5) write K and V, attend  (6) MLP
    -> logits of the sampled rows       T tokens, C = n_embd, D = head_dim, Hkv = n_kv_head, R rows
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import sdpa_attention, store

linear = partial(nn.Linear, bias=False)


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a checkpoint, as nanochat's meta file has it under `model_config`."""

    sequence_len: int  # context length in training
    vocab_size: int  # tokens of the tokenizer; the weights may have more rows (padding)
    n_layer: int
    n_head: int  # query heads
    n_kv_head: int  # key and value heads; each serves n_head // n_kv_head query heads
    n_embd: int
    window_pattern: str = "L"  # S(hort) and L(ong), tiled over the layers; the last is always L

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @classmethod
    def from_meta(cls, model_config: dict) -> "GPTConfig":
        """The shape in a meta file. Raises TypeError for bad keys, ValueError for bad values."""
        pattern = str(model_config.get("window_pattern") or "L").upper()
        config = cls(**{**model_config, "window_pattern": pattern})
        *sizes, _ = vars(config).values()  # all fields but window_pattern
        right = all(type(n) is int and 0 < n < 2**31 for n in sizes) and set(pattern) <= set("SL")
        if not right or config.n_embd % (2 * config.n_head) or config.n_head % config.n_kv_head:
            raise ValueError(f"no GPT has this shape: {vars(config)!s:.400}")
        return config


@dataclass(frozen=True)
class Recipe:
    """The constants of an era, which the shapes do not tell."""

    era: str
    softcap: float = 15.0  # logits = softcap * tanh(logits / softcap)
    rope_base: float = 10_000.0
    round_rotary: bool = True  # cos and sin rounded to bfloat16, in float32 runs too
    qk_scale: float = 1.0  # q and k are multiplied by it after their norm
    gate_scale: float = 2.0  # value-embedding gate = gate_scale * sigmoid(...)
    gate_channels: int = 0  # channels the gate reads; 0: the era has no value embeddings
    short_window: int = 0  # 0: no windows; 2: half the context; else see layer_windows
    lambdas: bool = False  # (2): x = resid_lambda * x + x0_lambda * x0
    smear: bool = False  # smear and backout
    eps: float = 2.0**-23  # of every rms norm: float32's machine epsilon, torch's default


_ERA3 = Recipe("3", gate_channels=32, short_window=2, lambdas=True)
_ERA4 = replace(
    _ERA3, era="4", gate_scale=3.0, gate_channels=12, short_window=384, rope_base=100_000.0,
    round_rotary=False, qk_scale=1.15,
)  # fmt: skip
RECIPES = {
    "1": Recipe("1"),
    "2": Recipe("2", short_window=2, lambdas=True),
    "3": _ERA3,  # 3b differs only in softcap=20, so the user has to give it
    "4": _ERA4,
    "5": replace(_ERA4, era="5", short_window=512, qk_scale=1.2, smear=True),
}


def layer_windows(config: GPTConfig, recipe: Recipe) -> list[int]:
    """How many tokens back each layer sees; -1 is no limit. With w a query sees w + 1 keys."""
    n, long = config.n_layer, config.sequence_len
    if not recipe.short_window:
        return [-1] * n
    short = long // 2 if recipe.short_window == 2 else 128 * math.ceil(long / recipe.short_window)
    pattern = config.window_pattern
    kinds = [pattern[i % len(pattern)] for i in range(n - 1)] + ["L"]  # the last is always long
    return [short if kind == "S" else long for kind in kinds]


def rotary(config: GPTConfig, recipe: Recipe, max_len: int, dtype, device) -> tuple[Tensor, Tensor]:
    """cos and sin (max_len, D/2) of position * base^(-2j/D), in float32 as nanochat has them."""
    float32 = {"dtype": torch.float32, "device": device}
    exponent = torch.arange(0, config.head_dim, 2, **float32) / config.head_dim
    angle = torch.outer(torch.arange(max_len, **float32), 1.0 / recipe.rope_base**exponent)
    # eras 1 to 3 always round them to bfloat16, eras 4 and 5 to the dtype of the weights
    rounded = torch.bfloat16 if recipe.round_rotary else dtype
    return angle.cos().to(rounded).float(), angle.sin().to(rounded).float()


def rotary_bytes(config: GPTConfig, max_len: int) -> int:
    """What `rotary` takes at most while it works: angles, cosines and sines in float32, two of them
    rounded for a while."""
    return 10 * max_len * config.head_dim


def norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, without a weight."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, heads, D) rotated by the angles of its positions, cos and sin (T, 1, D/2). The sign is
    nanochat's, the opposite of the usual one, and its weights were trained with it."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos + right * sin, right * cos - left * sin), dim=-1).to(x.dtype)


class CausalSelfAttention(nn.Module):
    """Attention of one layer, over the KV cache. gated: has it value embeddings, with a gate?"""

    def __init__(self, config: GPTConfig, recipe: Recipe, window: int, attend: Callable, gated):
        super().__init__()
        self.config, self.recipe, self.window, self.attend = config, recipe, window, attend
        c, kv = config.n_embd, config.n_kv_head * config.head_dim
        self.c_q, self.c_proj = linear(c, c), linear(c, c)
        self.c_k, self.c_v = linear(c, kv), linear(c, kv)
        if gated:
            self.ve_gate = linear(recipe.gate_channels, config.n_kv_head)

    def forward(self, x, ve, cos, sin, k_cache, v_cache, batch) -> Tensor:
        """x (T, C) normed; ve (T, Hkv * D) value embeddings or None; k_cache, v_cache (N, Hkv,
        block_size, D): the layer's blocks. Gives (T, C)."""
        recipe, dim = self.recipe, self.config.head_dim
        # (3) project
        q, k, v = (c(x).view(len(x), -1, dim) for c in (self.c_q, self.c_k, self.c_v))
        if ve is not None:
            gate = torch.sigmoid(self.ve_gate(x[:, : recipe.gate_channels]))
            v = v + recipe.gate_scale * gate[:, :, None] * ve.view_as(v)
        # (4) rotate, then norm
        q, k = norm(rotate(q, cos, sin), recipe.eps), norm(rotate(k, cos, sin), recipe.eps)
        if recipe.qk_scale != 1.0:
            q, k = q * recipe.qk_scale, k * recipe.qk_scale
        # (5) write K and V to their slots, then attend over all keys of each sequence
        store(k_cache, v_cache, k, v, batch.slots)
        y = self.attend(q, k_cache, v_cache, batch, self.window)
        return self.c_proj(y.flatten(1))


class MLP(nn.Module):
    """(T, C): a linear layer to 4C channels, relu(x)^2, and a linear layer back to C."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """One layer (nanochat's name; no block of the KV cache): x plus attention, then plus MLP."""

    def __init__(self, config: GPTConfig, recipe: Recipe, *options):
        super().__init__()
        self.eps = recipe.eps
        self.attn = CausalSelfAttention(config, recipe, *options)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *inputs) -> Tensor:
        x = x + self.attn(norm(x, self.eps), *inputs)  # (3) to (5)
        return x + self.mlp(norm(x, self.eps))  # (6)


class GPT(nn.Module):
    """A nanochat model. rows: of the tables, vocab_size and padding; attend: see attention.py."""

    def __init__(self, config: GPTConfig, recipe: Recipe, rows: int, attend=sdpa_attention):
        super().__init__()
        self.config, self.recipe = config, recipe
        self.windows = layer_windows(config, recipe)
        n, c, kv = config.n_layer, config.n_embd, config.n_kv_head * config.head_dim
        # value embeddings are in every second layer, counted back from the last
        gated = [i for i in range(n) if recipe.gate_channels and i % 2 == (n - 1) % 2]
        blocks = [Block(config, recipe, self.windows[i], attend, i in gated) for i in range(n)]
        table = nn.Embedding.from_pretrained  # to draw initial values imports torch's compiler, 1 s
        wte = table(torch.empty(rows, c))
        self.transformer = nn.ModuleDict({"wte": wte, "h": nn.ModuleList(blocks)})
        self.value_embeds = nn.ModuleDict({str(i): table(torch.empty(rows, kv)) for i in gated})
        self.lm_head = linear(c, rows)
        if recipe.lambdas:
            self.resid_lambdas = nn.Parameter(torch.empty(n))
            self.x0_lambdas = nn.Parameter(torch.empty(n))
        if recipe.smear:
            self.smear_gate = linear(24, 1)  # it reads the first 24 channels
            self.smear_lambda = nn.Parameter(torch.empty(1))
            self.backout_lambda = nn.Parameter(torch.empty(1))

    device = property(lambda self: self.lm_head.weight.device)
    dtype = property(lambda self: self.lm_head.weight.dtype)
    kv_layout = property(lambda self: (self.config, self.dtype))  # the shape and dtype of K and V

    def init_rotary(self, max_len: int) -> None:
        """Make the rotary tables, for positions below max_len."""
        self.cos, self.sin = rotary(self.config, self.recipe, max_len, self.dtype, self.device)

    def embed(self, batch) -> Tensor:
        """(T, C) normed embeddings; era 5 adds a gated part of the previous token's (smear)."""
        eps = self.recipe.eps
        x = norm(self.transformer.wte(batch.ids), eps)
        if self.recipe.smear:
            gate = self.smear_lambda * torch.sigmoid(self.smear_gate(x[:, :24]))
            has_previous = (batch.positions > 0)[:, None]
            x = x + gate * has_previous * norm(self.transformer.wte(batch.prev_ids), eps)
        return x

    def forward(self, batch, cache) -> Tensor:
        """Compute the batch's T tokens and write their K and V into the cache; returns (R, C), the
        normed hidden states of the rows from which a token is sampled."""
        x = x0 = self.embed(batch)  # (1)
        cos, sin = self.cos[batch.positions, None], self.sin[batch.positions, None]
        layers = zip(self.transformer.h, cache.layers(batch), strict=True)
        for i, (block, (k, v, view)) in enumerate(layers):
            if self.recipe.lambdas:  # (2)
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            ve = self.value_embeds[str(i)](batch.ids) if str(i) in self.value_embeds else None
            x = block(x, ve, cos, sin, k, v, view)  # (3) to (6)
            if i == self.config.n_layer // 2:
                middle = x
        if self.recipe.smear:  # (7)
            x = x - self.backout_lambda * middle
        return norm(x[batch.logit_rows], self.recipe.eps)

    def logits(self, h: Tensor) -> Tensor:
        """(R, vocab_size) logits of hidden states (R, C); sampler.py applies the softcap."""
        return self.lm_head(h)[:, : self.config.vocab_size]
