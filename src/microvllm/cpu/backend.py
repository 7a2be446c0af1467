"""What a CPU with numba offers to the fused model, and that model's loop over the layers, compiled.

A call from Python takes 30 to 100 microseconds between two products, since the weights that have
just gone through the caches have swept out what Python needs; the loop has ten of them in a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import overload
from torch import Tensor

from ..fused.backend import Backend
from . import first, products, steps
from .attention import attend_rows, paged_attention, tile
from .fewbits import FEW, class_of
from .packed import BITS
from .products import HalfPanels, Int8, Int8Panels, Panels, product, workspace
from .steps import add_norm_rows, array_of, back_out, embed_rows, rope_store_rows
from .vectors import EXACT, check_process, kept, one_at_a_time, row_threads, threads_for, vectorised

_f32 = np.float32
# kinds of which there are kernels of several steps (crew.py), and for how many rows
SEVERAL = dict.fromkeys(("float32-layers", "bfloat16-layers", "int8-layers"), 1 << 30)
SEVERAL |= dict.fromkeys(("int6-layers", "int5-layers", "int4-layers"), FEW)
PLAIN = "attend", "add_norm", "rope_store", "sample"  # what Backend has in plain torch as well


class CpuBackend(Backend):
    """Kernels in numba, float32 in and out; matrices, tables, K and V may be in bfloat16."""

    name = "numba"
    kind: str | None = None  # of kernels, as first.py has them
    waits = False  # have no steps in plain torch the same result? then kernels are waited for
    awaited: str | None = None  # the kind of kernels, while they are being compiled: see first.py
    attend = staticmethod(paged_attention)
    add_norm = staticmethod(steps.add_norm)
    rope_store = staticmethod(steps.rope_store)
    sample = staticmethod(steps.sample)

    def check(self) -> None:
        check_process()
        if self.device.type != "cpu" or self.dtype == torch.float16:
            raise ValueError(
                "attention='numba' runs in float32 and bfloat16 on a CPU, not "
                f"{self.dtype} on {self.device}"
            )

    def check_quantization(self, quantization: str, config) -> None:
        if quantization not in BITS or self.dtype != torch.float32:
            super().check_quantization(quantization, config)
        if quantization == "int8" and not self.has_int8(config.n_embd):
            raise ValueError("quantization='int8' needs a torch with oneDNN, which this one lacks")

    @staticmethod
    def has_int8(width: int) -> bool:
        panels = products.PANEL8 and width % 4 == 0
        return bool(panels or hasattr(torch.ops.onednn, "qlinear_pointwise"))

    def takes(self, quantization: str) -> bool:
        return self.dtype == torch.float32 and (quantization != "int8" or self.has_int8(1))

    def linear_class(
        self, quantization: str | None, shared: bool, width: int, dtype, head: bool = False
    ) -> type:
        self.waits = self.waits or bool(quantization)
        if quantization == "int8":
            return Int8Panels if products.PANEL8 and width % 4 == 0 else Int8
        if quantization:
            return class_of(BITS[quantization][head])
        if not shared and products.PANEL_FLOAT and dtype == torch.float32:
            return Panels
        if not shared and products.PANEL_FLOAT and dtype == torch.bfloat16 and width % 2 == 0:
            return HalfPanels
        return super().linear_class(quantization, shared, width, dtype, head)

    def compile(self, model) -> Callable | None:
        """One call, if all weights are in panels, whole ones where outputs lie side by side."""
        layers = [w for x in model.layers for w in (x.qkv, x.proj, x.fc, x.mlp_proj)]
        fit = all(isinstance(w, Panels) for w in (*layers, model.lm_head))
        fit = fit and all(sum(w.sizes) % products.PANEL == 0 for w in layers)
        return Layers(model) if fit else None

    def prepare(self, model) -> None:
        """Have the kernels of such a model on disk, or compute in plain torch until they are."""
        kind = model.store or "float32"
        kind += "-int8_cache" if model.kv_layout[1] == torch.int8 else ""
        kind += "-layers" if model.compiled else ""
        self.kind = kind
        # ranks draw the same tokens, so all of them have to compute in the same way
        waits = self.waits or self.deterministic or model.ranks is not None
        if not first.begin(CpuBackend, kind, waits):
            self.awaited = kind
            # the helper needs a core: threads that share one with it wait for each other at the end
            # of each operation, and a step takes 30 times as long
            self.num_threads = torch.get_num_threads()
            torch.set_num_threads(max(1, self.num_threads - 1))
            for name in PLAIN:
                setattr(self, name, getattr(super(), name))

    def is_ready(self) -> bool:
        if self.awaited and first.poll(CpuBackend, self.awaited):
            self.awaited = None
            torch.set_num_threads(self.num_threads)
            for name in PLAIN:
                delattr(self, name)
        return self.awaited is None

    def has_several(self, rows: int) -> bool:
        """Can several steps of so many rows be computed in one call? Not before somebody else has
        compiled it."""
        fit = rows <= SEVERAL.get(self.kind, 0)
        return fit and first.offers(CpuBackend, self.kind + first.SEVERAL)


@vectorised(types.voidptr)
def _pointer(b, number):
    return b.inttoptr(number, b.i8.as_pointer())


@numba.njit(**EXACT)
def _tensor(weights, i, kind, like):
    """The tensor at a place of layer i, of numbers such as `like` has."""
    place = weights[i, kind]
    return numba.carray(_pointer(place[0]), (place[1], place[2], place[3]), like.dtype)


@numba.njit(**EXACT)
def _parts(weights, i, kind, like):
    """The panels, offset and scale of layer i's qkv, proj, fc or mlp_proj."""
    w = _tensor(weights, i, 3 * kind, like[0])
    offset = _tensor(weights, i, 3 * kind + 1, like[1])
    return w, offset[0, 0], _tensor(weights, i, 3 * kind + 2, like[2])[0, 0]


def _weight(weights, i, kind, like):
    """The same, of the type that `like` has, which tells `product` how they are packed."""


@overload(_weight, jit_options=EXACT)
def _weight_of(weights, i, kind, like):
    made = getattr(like, "instance_class", None)

    def few_bits(weights, i, kind, like):
        w, offset, scale = _parts(weights, i, kind, like)
        return made(w, offset, scale)

    return few_bits if made else lambda weights, i, kind, like: _parts(weights, i, kind, like)


_VE = 12  # after those four weights: the value embeddings, and their gate


@kept(**EXACT)
def _layers(
    x0, ids, positions, cu_seqlens, seq_lens, logit_rows, slots, tables, cache, depths, groups,
    windows, weights, like, head, wte, resid, first, backout, cos, sin, qk_scale, gate_scale, eps,
    rows, spare, other, y, h, q, seen, qkv, wide, scratch,
):  # fmt: skip
    """FusedGPT.forward after its step (1), with the same numbers. The last line's are workspace."""
    (T, C), threads, n_layer = x0.shape, len(scratch), len(windows)
    mixes, smear = resid.size > 0, backout.size > 0
    few, x, middle = row_threads(T, threads), x0, x0
    one, none = _f32(1), _f32(0)
    # no constants, or numba would compile each kernel for them once more
    yes, no = threads > 0, threads < 0
    for i in range(n_layer):
        a, b = (resid[i], first[i]) if mixes else (one, none)  # (2), and the norm before (3)
        add_norm_rows(x, y, x0, a, b, eps, i > 0, mixes, few, spare, h)
        if i > 0 or mixes:
            x, spare = spare, x if i > 0 else other  # x0 is mixed in again
        # (3) project, (4) rotate and norm, (5) write K and V, then attend
        proj, fc = _weight(weights, i, 1, like), _weight(weights, i, 2, like)
        product(h, _weight(weights, i, 0, like), no, proj[0], threads, qkv)
        k, v, group = cache[depths[i], 0], cache[depths[i], 1], groups[i]
        gated = weights[i, _VE, 0] != 0
        ve = _tensor(weights, i, _VE, wte)[0] if gated else wte
        ve_gate = _tensor(weights, i, _VE + 1, x0)[0] if gated else x0
        rope_store_rows(
            qkv.reshape(T, -1, q.shape[2]), h, ids, ve, ve_gate, gated, cos, sin, positions,
            slots[group], k, v, qk_scale, gate_scale, eps, few, q,
        )  # fmt: skip
        if i == n_layer - 1 and len(logit_rows) == 0:
            return y[:0]
        attend_rows(q, k, v, cu_seqlens, seq_lens, tables[group], windows[i], rows, scratch, seen)
        if i == n_layer - 1:
            T = len(logit_rows)
            few = row_threads(T, threads)
            x, seen = x[logit_rows], seen[logit_rows]
            spare, y, h = np.empty_like(x), np.empty_like(x), np.empty_like(x)
            wide = np.empty((T, 4 * C), np.float32)
            if smear and i > n_layer // 2:
                middle = middle[logit_rows]
        product(seen.reshape(T, C), proj, no, fc[0], threads, y)
        add_norm_rows(x, y, x, one, none, eps, yes, no, few, spare, h)
        x, spare = spare, x
        mlp_proj = _weight(weights, i, 3, like)  # (6)
        product(h, fc, yes, mlp_proj[0], threads, wide)
        # the head comes after the last
        following = head[0] if i == n_layer - 1 else _weight(weights, i + 1, 0, like)[0]
        product(wide, mlp_proj, no, following, threads, y)
        if smear and i == n_layer // 2:
            middle = x + y
    add_norm_rows(x, y, x, one, none, eps, yes, no, few, spare, h)
    if smear:  # (7)
        back_out(spare, backout[0], middle)
        add_norm_rows(spare, y, x, one, none, eps, no, no, few, x, h)
    return h


class Layers:
    """All layers of a FusedGPT whose weights are in panels, on a batch: see FusedGPT.forward."""

    def __init__(self, model):
        config, recipe, places, none = model.config, model.recipe, [], torch.empty(0)
        for layer in model.layers:
            linears = layer.qkv, layer.proj, layer.fc, layer.mlp_proj
            embeddings = (none, none) if layer.ve is None else (layer.ve, layer.ve_gate)
            tensors = *chain(*(linear.weight for linear in linears)), *embeddings
            # addresses, and three dimensions
            places.append([(x.data_ptr(), *(1,) * (3 - x.ndim), *x.shape) for x in tensors])
        self.weights, self.windows = np.array(places, np.int64), np.array(model.windows)
        self.like = model.layers[0].qkv.arrays
        self.head, self.wte = model.lm_head.arrays, array_of(model.wte)
        names = "resid_lambdas", "x0_lambdas", "backout_lambda"
        numbers = [model.tensors.get(name, none) for name in names]
        self.numbers = [x.numpy() for x in (*numbers, model.cos, model.sin)]
        smear = model.tensors.get("smear_gate.weight", none.view(0, 0))
        self.smear = [smear.numpy(), model.tensors.get("smear_lambda", none).numpy()]
        self.scales = [_f32(x) for x in (recipe.qk_scale, recipe.gate_scale, recipe.eps)]
        self.cache = None  # the one that groups and depths are of
        C, D, self.group = config.n_embd, config.head_dim, config.n_head // config.n_kv_head
        # of a row's spare, other, y, h, q, seen, qkv and wide
        self.shapes = *[(C,)] * 4, *[(C // D, D)] * 2, (C + 2 * C // self.group,), (4 * C,)

    def locate(self, cache) -> None:
        """Set each layer's group, and where in the cache's data it is."""
        if cache is not self.cache:
            places = getattr(cache, "places", [(0, i) for i in range(len(self.windows))])
            self.groups, self.depths = np.array(places).T.copy()
            self.cache, self.member = cache, None  # and crew.py's kernel for it

    def __call__(self, batch, cache) -> Tensor:
        """(R, C), the normed rows of the head."""
        names = "ids", "positions", "cu_seqlens", "seq_lens", "logit_rows", "slots", "block_tables"
        *arrays, slots, tables = [getattr(batch, name).numpy() for name in names]
        self.locate(cache)
        T = len(arrays[0])
        x, slots = np.empty((T, *self.shapes[0]), np.float32), slots.reshape(-1, T)
        tables = tables.reshape(len(slots), len(batch.seq_lens), -1)
        with one_at_a_time:
            threads = threads_for(1 + T // 8)  # (1)
            ids, prev_ids, eps = arrays[0], batch.prev_ids.numpy(), self.scales[2]
            embed_rows(ids, prev_ids, arrays[1], self.wte, *self.smear, eps, threads, x)
            rows, size = tile(batch, self.group, self.shapes[4][1])
            scratch = threads_for(len(self.head[0])), size
            h = _layers(
                x, *arrays, slots, tables, array_of(cache.data), self.depths,
                self.groups, self.windows, self.weights, self.like, self.head, self.wte,
                *self.numbers, *self.scales, rows,
                *workspace(*[(T, *shape) for shape in self.shapes], scratch),
            )  # fmt: skip
        return torch.from_numpy(h)
