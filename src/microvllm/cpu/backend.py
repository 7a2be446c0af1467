"""The CPU backend of the fused model, in numba, and its compiled loop over the layers.

A call from Python is slow between two matrix products, because the weights that were just read have
evicted Python's data from the caches. Each layer has ten of these calls.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

from ..fused.backend import Backend
from ..lowbit.packing import BITS
from . import compilation, elementwise, gemm
from .attention import attend_tiles, cut_tiles, paged_attention, tile
from .attention_tiles import fits
from .elementwise import (
    add_norm_rows,
    add_rows,
    advance_rows,
    array_of,
    back_out,
    draw_space,
    embed_rows,
    rope_store_rows,
    sample_rows,
    take_rows,
)
from .gemm import (
    Dense,
    Int8,
    PackedBfloat16,
    PackedInt8,
    PackedLinear,
    SharedFloat32,
    product,
    scratch_bytes,
    workspace,
)
from .low_bit_gemm import class_of
from .simd import EXACT, kept
from .team import (
    MAX_JOBS,
    MAX_THREADS,
    SIZE,
    begin,
    check_process,
    compute,
    one_at_a_time,
    pointer,
    team_of,
)

_f32 = np.float32
PLAIN = "attend", "add_norm", "rope_store", "sample"  # functions that Backend has in plain torch


def kinds_for(kind: str) -> list[str]:
    """Return all kinds of kernels that engines of one checkpoint call in one precision.

    `kind` comes first. Then come the kinds for live modules, whose weights are shared and therefore
    not packed, and for engines that compute layer by layer."""
    start = kind.removesuffix("-layers")
    store = start.partition("-")[0]
    if start == kind or store not in ("float32", "bfloat16"):
        return [kind]
    shared = [f"{start}-shared-layers"] if store == "float32" else []
    return [kind, *shared, start]


class CpuBackend(Backend):
    """Kernels in numba, float32 in and out. Matrices, tables, K and V may be in bfloat16."""

    name = "numba"
    kind: str | None = None  # kind of kernels, as in compilation.py
    # whether to wait for the kernels, because steps in plain torch would give other results
    waits = False
    awaited: str | None = None  # kind of kernels that are being compiled, see compilation.py
    attend = staticmethod(paged_attention)
    add_norm = staticmethod(elementwise.add_norm)
    rope_store = staticmethod(elementwise.rope_store)
    sample = staticmethod(elementwise.sample)

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
        has_kernel = gemm.INT8_TILE and width % 4 == 0
        return bool(has_kernel or hasattr(torch.ops.onednn, "qlinear_pointwise"))

    def takes(self, quantization: str) -> bool:
        return self.dtype == torch.float32 and (quantization != "int8" or self.has_int8(1))

    def linear_class(
        self, quantization: str | None, shared: bool, width: int, dtype, head: bool = False
    ) -> type:
        self.waits = self.waits or bool(quantization)
        if quantization == "int8":
            return PackedInt8 if gemm.INT8_TILE and width % 4 == 0 else Int8
        if quantization:
            return class_of(BITS[quantization][head])
        if shared and gemm.FLOAT_TILE and dtype == torch.float32:
            return SharedFloat32
        if not shared and gemm.FLOAT_TILE and dtype == torch.float32:
            return PackedLinear
        if not shared and gemm.FLOAT_TILE and dtype == torch.bfloat16 and width % 2 == 0:
            return PackedBfloat16
        return super().linear_class(quantization, shared, width, dtype, head)

    def compile(self, model) -> Callable | None:
        """Return `Layers` if all weights are shared, or all packed in full tiles (padding between
        outputs is not supported); else None."""
        layers = [w for x in model.layers for w in (x.qkv, x.proj, x.fc, x.mlp_proj)]
        linears = *layers, model.lm_head
        is_packed = all(isinstance(w, PackedLinear) for w in linears)
        is_packed = is_packed and all(sum(w.sizes) % gemm.TILE == 0 for w in layers)
        is_shared = all(isinstance(w, SharedFloat32) and w.is_supported for w in linears)
        return Layers(model) if is_packed or is_shared else None

    def prepare(self, model) -> None:
        """Have the model's kernels on disk, or compute in plain torch until they are ready."""
        kind = model.store or "float32"
        kind += "-int8_cache" if model.kv_layout[1] == torch.int8 else ""
        if model.compiled:
            is_shared = isinstance(model.lm_head, SharedFloat32)
            kind += "-shared-layers" if is_shared else "-layers"
        self.kind = kind
        # all ranks must draw the same tokens, so they must compute in the same way
        waits = self.waits or self.deterministic or model.ranks is not None
        if not compilation.begin(CpuBackend, kind, waits):
            self.awaited = kind
            # leave one core to the helper. If a thread shares its core with the helper, all other
            # threads wait for it at the end of each operation, and steps are many times slower
            self.num_threads = torch.get_num_threads()
            torch.set_num_threads(max(1, self.num_threads - 1))
            for name in PLAIN:
                setattr(self, name, getattr(super(), name))

    def is_ready(self) -> bool:
        if self.awaited and compilation.poll(CpuBackend, self.awaited):
            self.awaited = None
            torch.set_num_threads(self.num_threads)
            for name in PLAIN:
                delattr(self, name)
        return self.awaited is None


@numba.njit(**EXACT)
def _tensor(weights, i, kind, like):
    """Return the tensor at a place of layer i, with the dtype of `like`."""
    place = weights[i, kind]
    return numba.carray(pointer(place[0]), (place[1], place[2], place[3]), like.dtype)


@numba.njit(**EXACT)
def _parts(weights, i, kind, like):
    """Return the weight tiles, offset and scale of layer i's qkv, proj, fc or mlp_proj."""
    w = _tensor(weights, i, 3 * kind, like[0])
    offset = _tensor(weights, i, 3 * kind + 1, like[1])
    return w, offset[0, 0], _tensor(weights, i, 3 * kind + 2, like[2])[0, 0]


def _weight(weights, i, kind, like):
    """Return the weight as an object of the type of `like`. `product` chooses its kernel by this
    type."""


@overload(_weight, jit_options=EXACT)
def _weight_of(weights, i, kind, like):
    weight_class = getattr(like, "instance_class", None)

    def low_bit(weights, i, kind, like):
        w, offset, scale = _parts(weights, i, kind, like)
        return weight_class(w, offset, scale)

    def dense(weights, i, kind, like):
        return Dense(
            _tensor(weights, i, 3 * kind, like.first)[0],
            _tensor(weights, i, 3 * kind + 1, like.second)[0],
            _tensor(weights, i, 3 * kind + 2, like.third)[0],
        )

    if weight_class is Dense:
        return dense
    if weight_class:
        return low_bit
    return lambda weights, i, kind, like: _parts(weights, i, kind, like)


_VE = 12  # index after these four weights: the value embeddings, then their gate


@kept(**EXACT)
def _run(
    team, ids, prev_ids, positions, cu_seqlens, seq_lens, hidden_rows, slots, tables,
    cache, depths, groups, windows, tilings, weights, like, head, wte, smear_gate,
    smear_lambda, resid, first, backout, cos, sin, qk_scale, gate_scale, eps,
    rows, tiles, x0, unused, other, y, h, half, head_x, head_next, q, attention, qkv, wide, scratch,
    hidden, logits, V, uniform, scale, softcap, filters, stops, w, sums, step, tokens,
):  # fmt: skip
    """Compute FusedGPT.forward, with the same numbers. `hidden` (R, C) receives the normed
    hidden states that the head reads.

    With tokens (steps, R), where each sequence has one row, this also computes the following steps:
    the head, the draw, and the next step with the drawn token, until a sequence draws one of its
    `stops`. step[0] receives the number of steps done, and the batch's arrays become those of the
    next step.

    All jobs are recorded first and then computed (team.py), so no array that this function
    creates may be an argument of a job. The argument lines are: a batch (attention.py), the model,
    workspace, and the arguments of a draw.
    """
    n_layer, size = len(windows), cache.shape[4]
    mixes, smears = resid.size > 0, backout.size > 0
    one, none = _f32(1), _f32(0)
    T, R = len(ids), len(hidden_rows)
    has_all_rows = R == T  # whether all rows are inputs of the head, in order
    for t in range(R if has_all_rows else 0):
        has_all_rows &= hidden_rows[t] == t
    # arguments instead of constants: numba would compile each kernel again for constants
    yes, no = n_layer > 0, n_layer < 0
    n_kv_head = cache.shape[3]
    counts = np.zeros(len(tiles), np.int64)
    for i in range(n_layer):  # layers with the same window and block table have the same tiles
        kind = tilings[i]
        if counts[kind] == 0:
            group = q.shape[1] // n_kv_head
            cut = cut_tiles(
                cu_seqlens, seq_lens, tables[groups[i]], size, windows[i], n_kv_head, group, rows,
                team[SIZE], fits(cache[0, 0], q.shape[2]),
            )  # fmt: skip
            counts[kind] = len(cut)
            tiles[kind, : len(cut)] = cut
    begin(team)
    # several draws may read the same row, so the workspace has max(T, R) rows
    x0, unused, other, qkv = x0[:T], unused[:T], other[:T], qkv[:T]
    embed_rows(ids, prev_ids, positions, wte, smear_gate, smear_lambda, eps, team, x0)  # (1)
    x, spare, z, normed, inner, middle = x0, unused, y[:T], h[:T], wide[:T], half[:T]
    queries, attended = q[:T], attention[:T]
    for i in range(n_layer):
        is_last = i == n_layer - 1
        a, b = (resid[i], first[i]) if mixes else (one, none)  # (2), and the norm before (3)
        add_norm_rows(x, z, x0, a, b, eps, i > 0, mixes, team, spare, normed)
        if i > 0 or mixes:
            x, spare = spare, x if i > 0 else other  # x0 is mixed in again
        # (3) project, (4) rotate and norm, (5) write K and V, then attend
        proj, fc = _weight(weights, i, 1, like), _weight(weights, i, 2, like)
        product(normed, _weight(weights, i, 0, like), no, proj[0], team, qkv)
        k, v, group = cache[depths[i], 0], cache[depths[i], 1], groups[i]
        gated = weights[i, _VE, 0] != 0
        ve = _tensor(weights, i, _VE, wte)[0] if gated else wte
        ve_gate = _tensor(weights, i, _VE + 1, x0)[0] if gated else x0
        rope_store_rows(
            qkv.reshape(T, -1, q.shape[2]), normed, ids, ve, ve_gate, gated, cos, sin,
            positions, slots[group], k, v, qk_scale, gate_scale, eps, team, queries,
        )  # fmt: skip
        if is_last and R == 0:
            break
        kind = tilings[i]
        attend_tiles(
            tiles[kind, : counts[kind]], queries, k, v, cu_seqlens, seq_lens, tables[group],
            windows[i], team, scratch, attended,
        )  # fmt: skip
        if is_last and not has_all_rows:  # K and V are written: continue only with the head's rows
            take_rows(x, hidden_rows, team, head_x[:R])
            x, spare, z, normed, inner = head_x[:R], head_next[:R], y[:R], h[:R], wide[:R]
            take_rows(attended.reshape(T, -1), hidden_rows, team, q[:R].reshape(R, -1))
            attended = q[:R]
            if smears and i > n_layer // 2:
                take_rows(middle, hidden_rows, team, attention[:R].reshape(R, -1))
                middle = attention[:R].reshape(R, -1)
            elif smears:
                middle = half[:R]
        product(attended.reshape(len(x), -1), proj, no, fc[0], team, z)
        add_norm_rows(x, z, x, one, none, eps, yes, no, team, spare, normed)
        x, spare = spare, x
        mlp_proj = _weight(weights, i, 3, like)  # (6)
        product(normed, fc, yes, mlp_proj[0], team, inner)
        # the head follows the last layer
        following = head[0] if is_last else _weight(weights, i + 1, 0, like)[0]
        product(inner, mlp_proj, no, following, team, z)
        if smears and i == n_layer // 2:
            add_rows(x, z, team, middle)
    if R > 0:
        last = hidden if len(tokens) == 0 else normed
        add_norm_rows(x, z, x, one, none, eps, yes, no, team, spare, last)
        if smears:  # (7)
            back_out(spare, backout[0], middle, team)
            add_norm_rows(spare, z, x, one, none, eps, no, no, team, x, last)
    if len(tokens) > 0:
        product(normed, head, no, _weight(weights, 0, 0, like)[0], team, logits)
        stride, flat = logits.shape[1], logits.reshape(-1)
        sample_rows(
            flat, V, stride, uniform, scale, softcap, filters, w, sums, step, team, tokens
        )  # fmt: skip
        advance_rows(
            ids, prev_ids, positions, seq_lens, slots, tables, size, stops, step, team, tokens
        )  # fmt: skip
    compute(team, max(1, len(tokens)))


class Layers:
    """All layers of a FusedGPT whose weights are packed, or all shared with a live module, computed
    on a batch. See FusedGPT.forward."""

    def __init__(self, model):
        config, recipe, places, none = model.config, model.recipe, [], torch.empty(0)
        for layer in model.layers:
            linears = layer.qkv, layer.proj, layer.fc, layer.mlp_proj
            embeddings = (none, none) if layer.ve is None else (layer.ve, layer.ve_gate)
            tensors = *map(torch.from_numpy, chain(*(x.arrays for x in linears))), *embeddings
            # the address and three dimensions
            places.append([(x.data_ptr(), *(1,) * (3 - x.ndim), *x.shape) for x in tensors])
        self.weights, self.windows = np.array(places, np.int64), np.array(model.windows)
        assert 20 * len(places) + 20 < MAX_JOBS, f"{len(places)} layers"
        self.like = model.layers[0].qkv.arrays
        self.head, self.wte = model.lm_head.arrays, array_of(model.wte)
        self.num_columns = model.lm_head.num_columns
        names = "resid_lambdas", "x0_lambdas", "backout_lambda"
        numbers = [model.tensors.get(name, none) for name in names]
        self.numbers = [x.numpy() for x in (*numbers, model.cos, model.sin)]
        smear = model.tensors.get("smear_gate.weight", none.view(0, 0))
        self.smear = [smear.numpy(), model.tensors.get("smear_lambda", none).numpy()]
        self.scales = [_f32(x) for x in (recipe.qk_scale, recipe.gate_scale, recipe.eps)]
        self.vocab_size, self.softcap = config.vocab_size, _f32(recipe.softcap)
        self.cache = None  # the cache that `groups` and `depths` belong to
        C, D, self.group = config.n_embd, config.head_dim, config.n_head // config.n_kv_head
        # row shapes of x0, unused, other, y, h, half, head_x, head_next, q, attention, qkv and wide
        self.shapes = *[(C,)] * 8, *[(C // D, D)] * 2, (C + 2 * C // self.group,), (4 * C,)
        self.draw_space = draw_space(config.vocab_size, 1)

    def __call__(self, batch, cache) -> Tensor:
        """Return the normed hidden states that the head reads, (R, C)."""
        rows = len(batch.hidden_rows)
        hidden, nothing = np.empty((rows, self.wte.shape[1]), np.float32), np.empty(0, np.float32)
        draws = (
            nothing.reshape(1, 0), nothing.reshape(1, 0), nothing, np.empty((0, 3)),
            np.empty((0, 0), np.int32), np.empty((0, 0), np.int64),
        )  # fmt: skip
        self.run(batch, cache, hidden, *draws)
        return torch.from_numpy(hidden)

    def several(self, batch, cache, uniform, scale, filters, stops, count: int) -> np.ndarray:
        """Compute several steps of a batch with one row for each sequence. Return the tokens
        (steps, T).

        count: maximum number of steps; fewer are done if a sequence ends. uniform (count, T):
        random numbers in [0, 1); scale, filters: see elementwise.draw_values; stops (T, n): stop
        tokens, padded with -1."""
        rows = len(batch.hidden_rows)
        logits = np.empty((rows, self.num_columns), np.float32)
        tokens = np.empty((count, rows), np.int64)
        hidden = np.empty((0, self.wte.shape[1]), np.float32)
        done = self.run(batch, cache, hidden, logits, uniform, scale, filters, stops, tokens)
        return tokens[:done]

    def run(self, batch, cache, hidden, logits, uniform, scale, filters, stops, tokens) -> int:
        """Call the kernel. Return the number of steps done."""
        names = "token_ids", "prev_token_ids", "positions", "cu_seqlens", "seq_lens", "hidden_rows"
        arrays = [np.asarray(getattr(batch, name)) for name in names]
        slots, tables = np.asarray(batch.slots), np.asarray(batch.block_tables)
        if cache is not self.cache:
            self.groups, self.depths = np.array(cache.layer_indices).T.copy()
            pairs = np.stack([self.windows, self.groups])
            self.tilings = np.unique(pairs, axis=1, return_inverse=True)[1].ravel()
            self.cache = cache
        T, R = len(arrays[0]), len(arrays[5])
        slots = slots.reshape(-1, T)
        tables = tables.reshape(len(slots), len(arrays[4]), -1)
        step = np.zeros(1, np.int64)  # number of steps done
        with one_at_a_time:
            team = team_of(scratch=scratch_bytes(max(T, R), self.shapes[-1][0], MAX_THREADS))
            threads = int(team[SIZE])
            if len(self.draw_space[0]) != threads and len(tokens):
                self.draw_space = draw_space(self.vocab_size, threads)
            rows, size = tile(batch, self.group, self.shapes[8][1])
            shapes = *[(max(T, R), *shape) for shape in self.shapes], (threads, size)
            tiles = np.empty((int(self.tilings.max()) + 1, T, 4), np.int64)
            _run(
                team, *arrays, slots, tables, array_of(cache.data), self.depths, self.groups,
                self.windows, self.tilings, self.weights, self.like, self.head, self.wte,
                *self.smear, *self.numbers, *self.scales, rows, tiles, *workspace(*shapes), hidden,
                logits, self.vocab_size, uniform, scale, self.softcap, filters, stops,
                *self.draw_space, step, tokens,
            )  # fmt: skip
        return int(step[0])
