"""nanochat's GPT over a flat batch of tokens, every era of it.

A *recipe* is the set of constants that differ between nanochat's eras and that no shape reveals:
the rope base, the softcap, the scale on q and k. One wrong constant gives fluent nonsense, so the
era is recognised from the state dict and never assumed. The forward pass keeps no state but the KV
cache: everything else a token needs (smear, value embeddings, x0) follows from its own id and the
one before.

The small steps between the matrix products (`add_norm`, `rope_store`, `relu2`) are written here in
plain torch. kernels_cpu.py and kernels_gpu.py have the same functions, fused; the model picks by
device. On most CPUs its loop over the layers is one call besides, `compiled`, that does the same.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import has_triton
from .fused.linear import Int8Panels, Linear, Panels, in_slices, pick
from .sampler import cap_logits, on


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a checkpoint, as nanochat's meta file has it under `model_config`."""

    sequence_len: int  # context length of the training
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
    def from_meta(cls, model_config: object, source: str = "model_config") -> GPTConfig:
        """Check and build from a meta file's dict. Raises ValueError naming the key and its
        value."""
        if not isinstance(model_config, dict):
            raise ValueError(
                f"{source}: model_config must be a JSON object, got {model_config!r:.80}"
            )
        given = dict(model_config)
        if given.get("num_experts", 0) == 0:  # a dense model of the mixture-of-experts branch
            given.pop("num_experts", None), given.pop("top_k", None)
        names = [f.name for f in fields(cls)]
        if unknown := sorted(set(given) - set(names)):
            raise ValueError(
                f"{source}: model_config has keys this engine does not know: {unknown}"
            )
        if missing := [n for n in names if n not in given and n != "window_pattern"]:
            raise ValueError(f"{source}: model_config lacks {missing}")
        for name in names[:-1]:
            value = given[name]
            if type(value) is not int or not 0 < value < 2**31:
                raise ValueError(f"{source}: {name} must be a positive integer, got {value!r}")
        pattern = given.get("window_pattern") or "L"
        if not isinstance(pattern, str) or set(pattern.upper()) - set("SL"):
            raise ValueError(
                f"{source}: window_pattern must be letters S and L, got {pattern!r:.80}"
            )
        config = cls(**{**given, "window_pattern": pattern.upper()})
        if config.n_embd % config.n_head or config.head_dim % 2:
            raise ValueError(
                f"{source}: n_embd {config.n_embd} does not split into {config.n_head} even heads"
            )
        if config.n_head % config.n_kv_head:
            raise ValueError(
                f"{source}: {config.n_head} query heads do not share {config.n_kv_head} kv heads"
            )
        return config


@dataclass(frozen=True)
class Recipe:
    """What an era of nanochat computes, beyond the shapes. Any number may be overridden by
    keyword."""

    era: str
    softcap: float = 15.0  # logits = softcap * tanh(logits / softcap)
    rope_base: float = 10_000.0
    round_rotary: bool = True  # cos and sin rounded to bfloat16, in float32 runs too
    qk_scale: float = 1.0  # q and k are multiplied by it after their norm
    gate_scale: float = 2.0  # value-embedding gate = gate_scale * sigmoid(...)
    gate_channels: int = 0  # channels the gate reads; 0: the era has no value embeddings
    short_window: int = 0  # 0: no windows at all; 2: L // 2; else n: 128 * ceil(L / n)
    lambdas: bool = False  # resid_lambdas and x0_lambdas
    smear: bool = False  # smear of the previous embedding, and backout
    eps: float = 2.0**-23  # of every rms norm: float32's machine epsilon, torch's default

    def override(self, **changes: float) -> Recipe:
        """A copy with some constants changed. Raises TypeError for a name that is no constant."""
        allowed = {"softcap", "rope_base", "round_rotary", "qk_scale", "gate_scale", "eps"}
        for name, value in changes.items():
            if name not in allowed:
                raise TypeError(
                    f"unknown argument {name!r}; recipe overrides are {', '.join(sorted(allowed))}"
                )
            flag, number = name == "round_rotary", isinstance(value, (int, float))
            positive = number and not isinstance(value, bool) and 0 < value < math.inf
            if not (isinstance(value, bool) if flag else positive):
                raise ValueError(
                    f"{name} must be {'True or False' if flag else 'a positive number'}, "
                    f"got {value!r}"
                )
        return replace(self, **changes)


_ERA3 = Recipe("3", gate_channels=32, short_window=2, lambdas=True)
_ERA4 = replace(
    _ERA3, era="4", gate_scale=3.0, gate_channels=12, short_window=384, rope_base=100_000.0,
    round_rotary=False, qk_scale=1.15,
)  # fmt: skip
RECIPES = {
    "1": Recipe("1"),
    "2": Recipe("2", short_window=2, lambdas=True),
    "3": _ERA3,  # 3b has the same keys and softcap=20: only the user can tell
    "4": _ERA4,
    "5": replace(_ERA4, era="5", short_window=512, qk_scale=1.2, smear=True),
}


def layer_windows(config: GPTConfig, recipe: Recipe) -> list[int]:
    """How many tokens back each layer sees; -1 is no limit. w means w + 1 visible keys."""
    if not recipe.short_window:
        return [-1] * config.n_layer
    long = config.sequence_len
    short = long // 2 if recipe.short_window == 2 else 128 * math.ceil(long / recipe.short_window)
    pattern = config.window_pattern
    kinds = [pattern[i % len(pattern)] for i in range(config.n_layer)]
    kinds[-1] = "L"  # whatever the pattern says
    return [short if kind == "S" else long for kind in kinds]


# the steps between the matrix products, in plain torch
# ---------------------------------------------


def rms(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, without a weight."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def add_norm(
    x: Tensor, y: Tensor | None, x0: Tensor | None, a: Tensor | None, b: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and norm it for the next one.

    x, y, x0 (T, C); a, b: the layer's resid and x0 lambdas (0-dim) or None.
    Returns x = a * (x + y) + b * x0, or x + y without lambdas, and rms(x).
    """
    if y is not None:
        x = x + y
    if a is not None:
        x = a * x + b * x0
    return x, rms(x, eps)


def rope_store(
    qkv, h, ve, ve_gate, cos, sin, batch, k, v, n_head, qk_scale, gate_scale, eps
) -> Tensor:
    """Rotate, norm and scale q and k, mix the value embedding into v, write k and v to their slots.

    qkv (T, (H + 2 Hkv) D): query, key and value heads side by side; h (T, C) what they were
    computed from (the gate reads its first channels); ve (V, Hkv D) and ve_gate (Hkv, channels) or
    None; cos, sin (positions, D/2); k, v (N, Hkv, block_size, D): the layer's cache. Returns q (T,
    H, D).
    """
    block_size, dim = k.shape[2:]
    qkv = qkv.view(len(qkv), -1, dim)
    n_kv_head = (qkv.shape[1] - n_head) // 2
    qk, new_v = qkv[:, : n_head + n_kv_head], qkv[:, n_head + n_kv_head :]
    c, s = cos[batch.positions, None], sin[batch.positions, None]
    left, right = qk.chunk(2, dim=-1)
    # minus the usual angle: nanochat's sign, and with trained weights it matters. norm comes after.
    qk = torch.cat((left * c + right * s, right * c - left * s), dim=-1).to(qkv.dtype)
    qk = rms(qk, eps)
    if qk_scale != 1.0:
        qk = qk * qk_scale
    if ve is not None:
        gate = gate_scale * torch.sigmoid(F.linear(h[:, : ve_gate.shape[1]], ve_gate))
        new_v = new_v + gate[:, :, None] * F.embedding(batch.ids, ve).view_as(new_v).to(h.dtype)
    blocks, offsets = batch.slots // block_size, batch.slots % block_size
    k[blocks, :, offsets] = qk[:, n_head:].to(k.dtype)
    v[blocks, :, offsets] = new_v.to(v.dtype)
    return qk[:, :n_head]


def relu2(x: Tensor) -> Tensor:
    """relu(x)^2, in place."""
    return x.relu_().square_()


@dataclass
class Layer:
    """The weights of one block."""

    qkv: Linear  # ((H + 2 Hkv) D, C)
    proj: Linear  # (C, C)
    fc: Linear  # (4C, C), and relu2
    mlp_proj: Linear  # (C, 4C)
    window: int  # tokens back that are visible, -1 all
    ve: Tensor | None = None  # (V, Hkv D) value embedding
    ve_gate: Tensor | None = None  # (Hkv, channels)
    resid_lambda: Tensor | None = None  # 0-dim float32
    x0_lambda: Tensor | None = None  # 0-dim float32


class GPT:
    """A nanochat model: weights and the forward pass over a flat batch.

    weights: a state dict that checkpoint.check_weights has passed; attend: a backend of
    attention.py; max_len: positions the rotary tables cover; share: do not copy given tensors whose
    device, dtype and strides are as they should be; store: less than `dtype` for what is read
    most, on a CPU: bfloat16 for matrices, tables and the cache, or int8 for the matrices and
    bfloat16 for the others; on a GPU float8_e4m3fn for the matrices; deterministic: a row's bits
    follow from its sequence alone (`attend` has to play its part); ranks: those that share the
    model, a parallel.Ranks.
    """

    def __init__(
        self, config: GPTConfig, recipe: Recipe, weights: dict[str, Tensor], attend,
        device="cpu", dtype=torch.float32, max_len: int | None = None, share: bool = False,
        store: torch.dtype | None = None, deterministic: bool = False, ranks=None,
    ):  # fmt: skip
        self.config, self.recipe, self.attend, self.ranks = config, recipe, attend, ranks
        self.local = config  # as far as attention goes: with the heads that are here
        if ranks:
            self.local, weights, share = ranks.local(config), ranks.share(weights, config), False
        self.device, self.dtype = torch.device(device), dtype
        self.windows = layer_windows(config, recipe)
        self.ops, self.product = sys.modules[__name__], F.linear
        self.sliced = deterministic and self.device.type == "cpu"
        self.at_once = 1 if self.sliced else None  # rows that log-probabilities are made of
        if has_triton(self.device):
            from .gpu import kernels as kernels_gpu

            self.ops = kernels_gpu
            self.product = kernels_gpu.linear if deterministic else F.linear
        elif attend.__module__.endswith("cpu.kernels"):
            self.ops = sys.modules[attend.__module__]
        self.cache_dtype = torch.bfloat16 if store else dtype  # of K and V
        self.linears: dict[tuple[str, ...], Linear] = {}  # by the names in the checkpoint
        self.tensors: dict[str, Tensor] = {}
        kept = torch.bfloat16 if store == torch.bfloat16 else dtype

        # one at a time: the file is memory-mapped, and only what is made here stays
        def linear(*names: str, rows: int | None = None) -> Linear:
            parts = [weights[f"{name}.weight"].detach() for name in names]
            same = share and all((p.device, p.dtype) == (self.device, kept) for p in parts)
            kind = pick(self.device, kept, store, same, parts[0].shape[1], self.ops)
            made = kind(
                parts, self.device, kept, rows=rows, squared=names[0].endswith("mlp.c_fc"),
                ops=self.ops, product=self.product, sliced=self.sliced,
            )  # fmt: skip
            self.linears[names] = made
            return ranks.complete(names[0], made, config) if ranks else made

        def take(name: str, dtype: torch.dtype = dtype) -> Tensor:
            given = weights[name].detach()
            same = share and given.device == self.device and given.dtype == dtype
            if not same or not given.is_contiguous():  # kernels read it by its address
                dense = torch.contiguous_format
                given = given.to(self.device, dtype, copy=True, memory_format=dense)
            self.tensors[name] = given
            return given

        self.wte = take("transformer.wte.weight", self.cache_dtype)
        # padding rows of the vocabulary end here, so that no one downstream can see them
        self.lm_head = linear("lm_head", rows=config.vocab_size)
        if recipe.lambdas:
            resid_lambdas = take("resid_lambdas", torch.float32)
            x0_lambdas = take("x0_lambdas", torch.float32)
        self.layers = []
        for i in range(config.n_layer):
            attn, mlp = f"transformer.h.{i}.attn.", f"transformer.h.{i}.mlp."
            layer = Layer(
                qkv=linear(attn + "c_q", attn + "c_k", attn + "c_v"),
                proj=linear(attn + "c_proj"),
                fc=linear(mlp + "c_fc"),
                mlp_proj=linear(mlp + "c_proj"),
                window=self.windows[i],
            )
            if f"value_embeds.{i}.weight" in weights:
                layer.ve = take(f"value_embeds.{i}.weight", self.cache_dtype)
                layer.ve_gate = take(attn + "ve_gate.weight")
            if recipe.lambdas:
                layer.resid_lambda, layer.x0_lambda = resid_lambdas[i], x0_lambdas[i]
            self.layers.append(layer)
        if recipe.smear:
            self.smear_gate = take("smear_gate.weight")
            self.smear_lambda = take("smear_lambda")
            self.backout_lambda = take("backout_lambda")
        max_len = max_len or config.sequence_len
        try:
            self.cos, self.sin = self._rotary(max_len)
        except RuntimeError:  # torch's word for too little memory
            raise ValueError(
                f"no memory for rotary tables of {max_len} positions: give a smaller max_model_len"
            ) from None

        self.compiled = None  # all layers in one call
        if not ranks:  # of whom each has to wait for the others in every layer
            kinds = Panels, Int8Panels
            linears = [w for x in self.layers for w in (x.qkv, x.proj, x.fc, x.mlp_proj)]
            panels = all(isinstance(w, kinds) for w in (*linears, self.lm_head))
            if panels and all(sum(w.sizes) % self.ops.PANEL == 0 for w in linears):
                self.compiled = self.ops.Layers(self)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights under their names in a checkpoint; copies, where the layout is our own.
        With ranks, those of this rank."""
        found = dict(self.tensors)
        for names, linear in self.linears.items():
            found.update({f"{n}.weight": w for n, w in zip(names, linear.dense(), strict=True)})
        return found

    @torch.no_grad()
    def update(self, weights: dict[str, Tensor]) -> None:
        """Write new weights, checked as those of the constructor, over the old ones, in place."""
        weights = self.ranks.share(weights, self.config) if self.ranks else weights
        for name, tensor in self.tensors.items():
            if weights[name].data_ptr() != tensor.data_ptr():
                tensor.copy_(weights[name])
        for names, linear in self.linears.items():
            linear.load([weights[f"{name}.weight"].detach() for name in names])

    def _rotary(self, max_len: int) -> tuple[Tensor, Tensor]:
        """cos and sin (max_len, D/2) of position * base^(-2j/D), in float32 as nanochat computes
        them."""
        dim = self.config.head_dim
        pair = torch.arange(0, dim, 2, dtype=torch.float32, device=self.device)
        frequency = 1.0 / (self.recipe.rope_base ** (pair / dim))
        angle = torch.outer(
            torch.arange(max_len, dtype=torch.float32, device=self.device), frequency
        )
        # the older eras round them to bfloat16 always, the later ones to the dtype of the run
        rounded = torch.bfloat16 if self.recipe.round_rotary else self.dtype
        return angle.cos().to(rounded).float(), angle.sin().to(rounded).float()

    def embed(self, batch) -> Tensor:
        """(T, C) normed embeddings; the newest era smears the previous token's into the present
        one."""
        x = self.norm(F.embedding(batch.ids, self.wte).to(self.dtype))
        if not self.recipe.smear:
            return x
        previous = self.norm(F.embedding(batch.prev_ids, self.wte).to(self.dtype))

        def gate(x: Tensor) -> Tensor:
            return self.smear_lambda * torch.sigmoid(self.product(x, self.smear_gate))

        first = x[:, :24]
        gate = in_slices(gate, first) if self.sliced else gate(first)
        return x + gate * (batch.positions > 0)[:, None] * previous  # position 0 has no neighbour

    def norm(self, x: Tensor) -> Tensor:
        """x (T, C), its rows normed."""
        return self.ops.add_norm(x, None, None, None, None, self.recipe.eps)[1]

    def forward(self, batch, cache) -> Tensor:
        """Run the batch, write its K and V into the cache, return (R, C): the normed rows of the
        head."""
        ops, recipe, n_head = self.ops, self.recipe, self.local.n_head
        x, y, middle = self.embed(batch), None, None
        if self.compiled:  # all of the following in one call
            return self.compiled(x, batch, cache)
        x0, groups = x, [batch.group(g) for g in range(cache.num_groups)]
        for i, layer in enumerate(self.layers):
            k, v = cache.layer(i)
            batch = groups[cache.group_of[i]]
            x, h = ops.add_norm(x, y, x0, layer.resid_lambda, layer.x0_lambda, recipe.eps)
            q = ops.rope_store(
                layer.qkv(h), h, layer.ve, layer.ve_gate, self.cos, self.sin, batch, k, v,
                n_head, recipe.qk_scale, recipe.gate_scale, recipe.eps,
            )  # fmt: skip
            y = self.attend(q, k, v, batch, layer.window)
            if layer is self.layers[-1]:  # all K and V are written: only the head's rows go on
                x, y = x[batch.logit_rows], y[batch.logit_rows]
                if not len(x):
                    return x
                middle = None if middle is None else middle[batch.logit_rows]
            y = layer.proj(y.flatten(1))
            x, h = ops.add_norm(x, y, None, None, None, recipe.eps)
            y = layer.mlp_proj(layer.fc(h))
            if recipe.smear and i == self.config.n_layer // 2:
                middle = x + y
        x = x + y
        if middle is not None:
            x = x - self.backout_lambda * middle
        return self.norm(x)

    def logits(self, h: Tensor) -> Tensor:
        """(R, C) rows of `forward` to (R, vocab_size) raw logits; the softcap is yet to come."""
        return self.lm_head(h)

    def head(self, h: Tensor) -> Tensor:
        """(R, C) rows of `forward` to (R, vocab_size) capped float32 logits."""
        return cap_logits(self.logits(h), self.recipe.softcap)

    def logprobs(self, h: Tensor, targets: list[int]) -> Tensor:
        """(R, C) rows of `forward` to (R,) the log-probability of each row's target, in slices of
        64 MB of logits."""
        size = self.at_once or max(1, 2**24 // self.config.vocab_size)
        return torch.cat(
            [
                -F.cross_entropy(self.head(rows), wanted, reduction="none")
                for rows, wanted in zip(
                    h.split(size), on(h.device, targets).split(size), strict=True
                )
            ]
        )
