"""All layers of a model in one compiled call.

A call from Python takes 30 to 100 microseconds between two products, since the weights that have
just gone through the caches have swept out what Python needs. fused/model.py's loop over the layers
has ten such calls in each; here is the same loop once more, compiled. The numbered comments are
those of model.py.
"""

from __future__ import annotations

from itertools import chain

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from .attention import attend_rows, tile
from .products import FAST, keep_compiled, one_at_a_time, threads_for
from .steps import add_norm_rows, array_of, product, rope_store_rows

_f32 = np.float32


@intrinsic
def _pointer(context, number, like):
    """A pointer from an address, to numbers such as the array `like` has."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(number, like), codegen


# in a layer's row of addresses: four weights of three parts each, then its value embeddings and
# their gate
VALUE_EMBEDDING = 12


@numba.njit(**FAST)
def _tensor(addresses, shapes, i, kind, like):
    shape = shapes[kind, 0], shapes[kind, 1], shapes[kind, 2]
    return numba.carray(_pointer(addresses[i, kind], like), shape)


@numba.njit(**FAST)
def _weight(addresses, shapes, i, kind, head):
    """The panels, offset and scale of layer i's qkv, proj, fc or mlp_proj, of the head's types."""
    w = _tensor(addresses, shapes, i, 3 * kind, head[0])
    offset = _tensor(addresses, shapes, i, 3 * kind + 1, head[1])
    return w, offset[0, 0], _tensor(addresses, shapes, i, 3 * kind + 2, head[2])[0, 0]


@numba.njit(**FAST)
def _layers(
    x0, ids, positions, cu_seqlens, seq_lens, logit_rows, slots, tables, cache, depths, groups,
    windows, addresses, shapes, head, wte, resid, first, backout, cos, sin, qk_scale, gate_scale,
    eps, rows, width, threads,
):  # fmt: skip
    T, C = x0.shape
    n_layer, n_kv_head, D = len(windows), cache.shape[3], cache.shape[5]
    n_head, mixes, smear = C // D, resid.size > 0, backout.size > 0
    few = min(threads, 1 + T // 8)  # waking one takes as long as a few rows
    x, spare, y, h, middle = x0.copy(), np.empty_like(x0), np.empty_like(x0), np.empty_like(x0), x0
    q, seen = np.empty((T, n_head, D), np.float32), np.empty((T, n_head, D), np.float32)
    qkv, wide = np.empty((T, C + 2 * n_kv_head * D), np.float32), np.empty((T, 4 * C), np.float32)
    scratch = np.empty((threads, rows * (n_head // n_kv_head) * (2 * D + width)), np.float32)
    one, none = _f32(1), _f32(0)
    # no constants, or numba would compile each kernel for them once more
    yes, no = threads > 0, threads < 0
    for i in range(n_layer):
        a, b = (resid[i], first[i]) if mixes else (one, none)
        add_norm_rows(x, y, x0, a, b, eps, i > 0, mixes, few, spare, h)
        if i > 0 or mixes:
            x, spare = spare, x
        proj = _weight(addresses, shapes, i, 1, head)
        fc = _weight(addresses, shapes, i, 2, head)
        product(h, _weight(addresses, shapes, i, 0, head), no, proj[0], threads, qkv)
        k, v, group = cache[depths[i], 0], cache[depths[i], 1], groups[i]
        gated = addresses[i, VALUE_EMBEDDING] != 0
        ve = _tensor(addresses, shapes, i, VALUE_EMBEDDING, wte)[0] if gated else wte
        ve_gate = _tensor(addresses, shapes, i, VALUE_EMBEDDING + 1, x0)[0] if gated else x0
        rope_store_rows(
            qkv.reshape(T, -1, D), h, ids, ve, ve_gate, gated, cos, sin, positions, slots[group],
            k, v, qk_scale, gate_scale, eps, few, q,
        )  # fmt: skip
        attend_rows(q, k, v, cu_seqlens, seq_lens, tables[group], windows[i], rows, scratch, seen)
        if i == n_layer - 1:
            T = len(logit_rows)
            if T == 0:
                return y[:0]
            few = min(threads, 1 + T // 8)
            x, seen = x[logit_rows], seen[logit_rows]
            spare, y, h = np.empty_like(x), np.empty_like(x), np.empty_like(x)
            wide = np.empty((T, 4 * C), np.float32)
            if smear and i > n_layer // 2:
                middle = middle[logit_rows]
        product(seen.reshape(T, C), proj, no, fc[0], threads, y)
        add_norm_rows(x, y, x, one, none, eps, yes, no, few, spare, h)
        x, spare = spare, x
        mlp_proj = _weight(addresses, shapes, i, 3, head)
        product(h, fc, yes, mlp_proj[0], threads, wide)
        # the head comes after the last
        following = head[0] if i == n_layer - 1 else _weight(addresses, shapes, i + 1, 0, head)[0]
        product(wide, mlp_proj, no, following, threads, y)
        if smear and i == n_layer // 2:
            middle = x + y
    add_norm_rows(x, y, x, one, none, eps, yes, no, few, spare, h)
    if smear:
        spare -= backout[0] * middle
        add_norm_rows(spare, y, x, one, none, eps, no, no, few, x, h)
    return h


def _parts(linear) -> tuple[Tensor, Tensor, Tensor]:
    """The panels, offset and scale of a weight."""
    w = linear.weight
    return w if isinstance(w, tuple) else (w, torch.empty(0, dtype=torch.int32), torch.empty(0))


class Layers:
    """All layers of a FusedGPT whose weights are in panels, on a batch: see FusedGPT.forward."""

    def __init__(self, model):
        recipe, kinds = model.recipe, []
        for layer in model.layers:
            linears = layer.qkv, layer.proj, layer.fc, layer.mlp_proj
            parts = chain.from_iterable(map(_parts, linears))
            kinds.append([*parts, layer.ve, layer.ve_gate])
        # the same for all layers, but that some have no value embeddings
        some = [next((x for x in kind if x is not None), None) for kind in zip(*kinds, strict=True)]
        shapes = [(0,) * 3 if x is None else (1,) * (3 - x.ndim) + x.shape for x in some]
        addresses = [[0 if x is None else x.data_ptr() for x in layer] for layer in kinds]
        self.weights = np.array(addresses, np.int64), np.array(shapes, np.int64)
        self.windows = np.array([layer.window for layer in model.layers])
        self.head = tuple(part.numpy() for part in _parts(model.lm_head))
        self.wte = array_of(model.wte)
        names, none = ("resid_lambdas", "x0_lambdas", "backout_lambda"), torch.empty(0)
        numbers = [model.tensors.get(name, none) for name in names]
        self.numbers = [x.numpy() for x in (*numbers, model.cos, model.sin)]
        self.scales = [_f32(x) for x in (recipe.qk_scale, recipe.gate_scale, recipe.eps)]
        self.cache = None  # the one that groups and depths are of
        self.group = model.config.n_head // model.config.n_kv_head

    def __call__(self, x: Tensor, batch, cache) -> Tensor:
        """x (T, C), the embeddings; returns (R, C), the normed rows of the head."""
        names = "ids", "positions", "cu_seqlens", "seq_lens", "logit_rows", "slots", "block_tables"
        *arrays, slots, tables = [getattr(batch, name).numpy() for name in names]
        if cache is not self.cache:  # each layer's group, and where in the cache's data it is
            places = getattr(cache, "places", [(0, i) for i in range(len(self.windows))])
            self.groups, self.depths = np.array(places).T.copy()
            self.cache = cache
        slots = slots.reshape(-1, len(x))
        tables = tables.reshape(len(slots), len(batch.seq_lens), -1)
        with one_at_a_time:
            threads = threads_for(len(self.head[0]))
            h = _layers(
                x.numpy(), *arrays, slots, tables, array_of(cache.data), self.depths,
                self.groups, self.windows, *self.weights, self.head, self.wte, *self.numbers,
                *self.scales, *tile(batch, self.group), threads,
            )  # fmt: skip
        return torch.from_numpy(h)


keep_compiled(_layers)
