"""The fused form of model.GPT: the same computation in fewer, larger steps.

Weights are in the layout in which a device multiplies them best, q, k and v are one product, the
residual add and the norm after it one step, and what is only wanted of the sampled rows is computed
for these alone. The numbered comments are those of model.py; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine import Runner
from ..model import GPTConfig, Recipe, layer_windows, rotary
from .backend import Backend
from .linear import Linear, in_slices


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


class FusedGPT:
    """A nanochat model: weights and the forward pass over a flat batch.

    weights: a state dict that was checked; backend: of the device; dtype: of what is computed;
    max_len: positions the rotary tables cover; share: do not copy given tensors whose device, dtype
    and strides are as they should be; store: less than `dtype` for what is read most: "bfloat16"
    for matrices, tables and the cache, or a backend's quantization of the matrices, with tables and
    cache in bfloat16; ranks: those that share the model, see features/parallel.py.
    """

    def __init__(
        self, config: GPTConfig, recipe: Recipe, weights: dict[str, Tensor], backend: Backend,
        dtype=torch.float32, max_len: int | None = None, share: bool = False,
        store: str | None = None, ranks=None,
    ):  # fmt: skip
        self.config, self.recipe, self.backend, self.ranks = config, recipe, backend, ranks
        self.store = store
        self.local = config  # as far as attention goes: with the heads that are here
        if ranks:
            self.local, weights, share = ranks.local(config), ranks.share(weights, config), False
        self.device, self.dtype = backend.device, dtype
        self.windows = layer_windows(config, recipe)
        self.cache_dtype = torch.bfloat16 if store else dtype  # of tables, K and V
        self.kv_layout = backend.kv_layout(self.local, self.cache_dtype)
        self.linears: dict[tuple[str, ...], Linear] = {}  # by the names in the checkpoint
        self.tensors: dict[str, Tensor] = {}
        kept = torch.bfloat16 if store == "bfloat16" else dtype
        quantization = None if store == "bfloat16" else store

        # one at a time: the file is memory-mapped, and only what is made here stays
        def linear(*names: str, rows: int | None = None) -> Linear:
            parts = [weights[f"{name}.weight"] for name in names]
            same = share and all((p.device, p.dtype) == (self.device, kept) for p in parts)
            head, width = names == ("lm_head",), parts[0].shape[1]
            kind = backend.linear_class(quantization, same, width, kept, head)
            parts = [self._part(part, quantization) for part in parts]
            made = kind(parts, backend, kept, rows=rows, relu2=names[0].endswith("mlp.c_fc"))
            self.linears[names] = made
            return ranks.complete(names[0], made, config) if ranks else made

        def take(name: str, dtype: torch.dtype = dtype) -> Tensor:
            given = weights[name].detach()
            same = share and given.device == self.device and given.dtype == dtype
            if not same or not given.is_contiguous():  # kernels read it by its address
                made = torch.empty(given.shape, dtype=dtype, device=self.device)
                backend.fill(made, given)
                given = made
            self.tensors[name] = given
            return given

        self.wte = take("transformer.wte.weight", self.cache_dtype)
        # padding rows of the vocabulary end here, so that no one downstream can see them
        self.lm_head = linear("lm_head", rows=config.vocab_size)
        if recipe.lambdas:
            names = "resid_lambdas", "x0_lambdas"
            resid_lambdas, x0_lambdas = (take(name, torch.float32) for name in names)
        self.layers: list[Layer] = []
        for i in range(config.n_layer):
            attn, mlp = f"transformer.h.{i}.attn.", f"transformer.h.{i}.mlp."
            layer = Layer(
                linear(attn + "c_q", attn + "c_k", attn + "c_v"), linear(attn + "c_proj"),
                linear(mlp + "c_fc"), linear(mlp + "c_proj"), self.windows[i],
            )  # fmt: skip
            if f"value_embeds.{i}.weight" in weights:
                layer.ve = take(f"value_embeds.{i}.weight", self.cache_dtype)
                layer.ve_gate = take(attn + "ve_gate.weight")
            if recipe.lambdas:
                layer.resid_lambda, layer.x0_lambda = resid_lambdas[i], x0_lambdas[i]
            self.layers.append(layer)
        if recipe.smear:
            self.smear_gate = take("smear_gate.weight")
            self.smear_lambda, self.backout_lambda = take("smear_lambda"), take("backout_lambda")
        self.init_rotary(max_len or config.sequence_len)
        backend.prepare(self)

    def init_rotary(self, max_len: int) -> None:
        """Make the rotary tables, for positions below max_len, and the call that reads them."""
        self.cos, self.sin = rotary(self.config, self.recipe, max_len, self.dtype, self.device)
        # all layers in one call; ranks have to wait for each other in every layer
        self.compiled = None if self.ranks else self.backend.compile(self)

    @staticmethod
    def _part(weight, quantization: str | None):
        """A matrix as a Linear takes it; one of a quantised folder as what is asked for."""
        if isinstance(weight, Tensor):
            return weight.detach()
        return weight.quantised() if quantization else weight.dense()

    @torch.no_grad()
    def load_state_dict(self, weights: dict[str, Tensor]) -> None:
        """Write new weights, checked as those of the constructor, over the old ones, in place."""
        weights = self.ranks.share(weights, self.config) if self.ranks else weights
        for name, tensor in self.tensors.items():
            if weights[name].data_ptr() != tensor.data_ptr():
                self.backend.fill(tensor, weights[name])
        for names, linear in self.linears.items():
            linear.load([weights[f"{name}.weight"].detach() for name in names])

    def embed(self, batch) -> Tensor:
        """(T, C) normed embeddings; the newest era smears the previous token's into each."""
        x = self.norm(F.embedding(batch.ids, self.wte).to(self.dtype))
        if not self.recipe.smear:
            return x
        previous = self.norm(F.embedding(batch.prev_ids, self.wte).to(self.dtype))

        def gate(x: Tensor) -> Tensor:
            return self.smear_lambda * torch.sigmoid(self.backend.product(x, self.smear_gate))

        first = x[:, :24]
        gate = in_slices(gate, first) if self.backend.sliced else gate(first)
        return x + gate * (batch.positions > 0)[:, None] * previous  # position 0 has no neighbour

    def norm(self, x: Tensor) -> Tensor:
        """x (T, C), its rows normed."""
        return self.backend.add_norm(x, None, None, None, None, self.recipe.eps)[1]

    def forward(self, batch, cache) -> Tensor:
        """Run the batch, write its K and V into the cache, return (R, C), the rows of the head."""
        kernels, recipe, n_head = self.backend, self.recipe, self.local.n_head
        compiled = self.compiled if kernels.is_ready() else None
        if compiled:  # all of the following in one call
            return compiled(batch, cache)
        x, y, middle = self.embed(batch), None, None  # (1)
        x0, layers = x, zip(self.layers, cache.layers(batch), strict=True)
        for i, (layer, (k, v, view)) in enumerate(layers):
            # (2), and the norm before (3)
            x, h = kernels.add_norm(x, y, x0, layer.resid_lambda, layer.x0_lambda, recipe.eps)
            # (3) project, (4) rotate and norm, (5) write K and V, then attend
            q = kernels.rope_store(
                layer.qkv(h), h, layer.ve, layer.ve_gate, self.cos, self.sin, view, k, v,
                n_head, recipe.qk_scale, recipe.gate_scale, recipe.eps,
            )  # fmt: skip
            y = kernels.attend(q, k, v, view, layer.window)
            if layer is self.layers[-1]:  # all K and V are written: only the head's rows go on
                x, y = x[batch.logit_rows], y[batch.logit_rows]
                if not len(x):
                    return x
                middle = None if middle is None else middle[batch.logit_rows]
            y = layer.proj(y.flatten(1))
            x, h = kernels.add_norm(x, y, None, None, None, recipe.eps)
            y = layer.mlp_proj(layer.fc(h))  # (6)
            if recipe.smear and i == self.config.n_layer // 2:
                middle = x + y
        x = x + y
        if middle is not None:  # (7)
            x = x - self.backout_lambda * middle
        return self.norm(x)

    def logits(self, h: Tensor) -> Tensor:
        """(R, C) rows of `forward` to (R, vocab_size) raw logits; the softcap is yet to come."""
        return self.lm_head(h)


class FusedRunner(Runner):
    """A Runner for FusedGPT: the draw is the backend's."""

    def __init__(self, model, *args):
        super().__init__(model, *args)
        self.rows_at_once = 1 if model.backend.sliced else None

    def sample(self, *args) -> Tensor:
        return self.model.backend.sample(*args)
