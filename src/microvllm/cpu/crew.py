"""Several steps of a model in one compiled call, for several.py: embed, layers, head, draw, append.

Its threads are started once for all steps, and wait for each other by spinning, which takes a tenth
of what OpenMP takes for each kernel: every one of them runs `_member`, does its share of what there
is to do, and then waits until all have come there (`_wait`). What it calls for its rows is what the
kernels of single steps call, with the same bits: see vectors.EXACT.
"""

from __future__ import annotations

import os

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload

from ..attention import make_batch
from ..sampler import noise
from . import amx, first, products, steps
from .attention import attend_tile, scratch_size
from .backend import _VE, _tensor, _weight
from .fewbits import few_rows, round_rows
from .packed import STEP
from .products import PANEL, _multiply_panels, workspace
from .vectors import EXACT, VIEWS, apart, kept, one_at_a_time, share, threads_for, vectorised

_f32 = np.float32
FEW = 8  # rows below which each thread norms all of them by itself, rather than wait for others
# times a thread looks: then it lets others run; then those who have come are the team
_SPINS, _PATIENCE = 2_000, 200_000
_CLOSED = 2**40  # members of a team that nobody can join any more
# places in a team, in a cache line each
_ARRIVED, _MEMBERS, _MET, _ENDED, _DONE = 0, 8, 16, 24, 25


@vectorised(types.int64)
def _add(b, a, i, value):
    return b.atomic_rmw("add", b.at(a.data, i), value, "seq_cst")


@vectorised(types.int64)
def _swap(b, a, i, value):
    return b.atomic_rmw("xchg", b.at(a.data, i), value, "seq_cst")


@vectorised(types.int64)
def _peek(b, a, i):
    return b.load_atomic(b.at(a.data, i), "seq_cst", 8)


@vectorised()
def _let_others_run(b):
    if os.name == "posix":
        kind = ir.FunctionType(b.i32, [])
        b.call(cgutils.get_or_insert_function(b.module, kind, "sched_yield"), [])


@numba.njit(**EXACT)
def _join(team, threads):
    """[its number, members, times it has waited] of a thread; no members: it came too late. So a
    team is of the threads that run, however many there are, and no one waits for the others."""
    me, members, spins = _add(team, _ARRIVED, 1), 0, 0
    if me == 0:
        while _peek(team, _ARRIVED) < threads and spins < _PATIENCE:
            spins += 1
            if spins % _SPINS == 0:
                _let_others_run()
        members = _swap(team, _ARRIVED, _CLOSED)
        _swap(team, _MEMBERS, members)
    elif me < _CLOSED:
        while members == 0:
            members = _peek(team, _MEMBERS)
    crew = np.zeros(3, np.int64)
    crew[0], crew[1] = me, members
    return crew


@numba.njit(**EXACT)
def _wait(team, crew):
    """Until all members have called it so often."""
    crew[2] += 1
    spins, due = 0, crew[1] * crew[2]
    if _add(team, _MET, 1) + 1 < due:
        while _peek(team, _MET) < due:
            spins += 1
            if spins > _SPINS:
                _let_others_run()


@numba.njit(**EXACT)
def _share(count, crew):
    return share(count, crew[0], crew[1])


@numba.njit(**VIEWS)
def _attend(q, k, v, tables, positions, window, crew, scratch, seen):
    """A member's share of what attend_rows does, with a row of each sequence."""
    apart()
    n_kv_head = k.shape[1]
    for job in range(crew[0], len(q) * n_kv_head, crew[1]):
        t, head = job // n_kv_head, job % n_kv_head
        row = slice(t, t + 1)
        attend_tile(q[row], k, v, head, tables[t], positions[t], window, scratch, seen[row])


def _product(x, weight, square, following, own, team, crew, q, scale, y):
    """A member's share of products.product, and waiting for the others'. q (T, 8C), scale (T, 1):
    for rounded inputs; own: each member rounds all of them."""


@numba.njit(**EXACT)
def _multiply(x, w, scaling, square, following, team, crew, y):
    apart()
    first, end = _share(len(w), crew)
    ahead = _share(len(following), crew)[0] * following.shape[1] * PANEL
    if amx.fits(x, w):
        amx.multiply_panels(x, w, scaling, square, first, end, following, ahead, y)
    else:
        _multiply_panels(x, w, scaling, square, first, end, following, ahead, y)
    _wait(team, crew)


@overload(_product, jit_options=EXACT)
def _product_of(x, weight, square, following, own, team, crew, q, scale, y):
    def floats(x, weight, square, following, own, team, crew, q, scale, y):
        w, offset, w_scale = weight
        _multiply(x, w, (offset, w_scale, w_scale), square, following, team, crew, y)

    def integers(x, weight, square, following, own, team, crew, q, scale, y):
        w, offset, w_scale = weight
        T, C = x.shape
        levels = q.reshape(-1)[: T * C].reshape(T, C)
        rows, xt = (0, T) if own else _share(T, crew), np.empty(C, np.float32)
        products.quantize_some(x, _f32(127), rows, xt, levels, scale)
        if not own:
            _wait(team, crew)
        scaling = offset, w_scale, scale.reshape(T)
        _multiply(levels.view(np.int32), w, scaling, square, following, team, crew, y)

    def halves(x, weight, square, following, own, team, crew, q, scale, y):
        w, offset, w_scale = weight
        T, C = x.shape
        near = q.reshape(-1)[: 2 * T * C].view(np.uint16).reshape(T, C)
        products.round_some(x, (0, T) if own else _share(T, crew), near)
        if not own:
            _wait(team, crew)
        scaling = offset, w_scale, w_scale
        _multiply(near.view(np.int32), w, scaling, square, following, team, crew, y)

    if isinstance(weight, types.BaseNamedTuple):
        return few_bits(weight.instance_class)
    if weight[0].dtype == types.int32:
        return integers
    return halves if weight[0].dtype == types.uint16 and products.TWO_HALVES else floats


def few_bits(kind: type):
    """Of weights in a few bits, for few rows, all of which each member rounds."""
    multiply, top, groups = few_rows(kind)

    def product(x, weight, square, following, own, team, crew, q, scale, y):
        apart()
        w, offset, w_scale = weight
        T, steps = len(x), w.shape[1]
        levels = q.reshape(-1)[: T * steps * STEP].reshape(T, steps * STEP)
        start, x_scale = np.empty((T, steps if groups else 1), np.int32), scale.reshape(T)
        round_rows(x, top, levels, x_scale, start)
        first, end = _share(len(w), crew)
        multiply(levels.view(np.int32), start, w, first, end, square, w_scale, x_scale, y)
        _wait(team, crew)

    return product


@kept(**EXACT)
def _member(
    team, threads, rows, rounded, scales, scratch, y, q, seen, qkv, wide, logits, tokens, ids,
    prev_ids, positions, slots, tables, uniform, scale, filters, stops, V, softcap, cache, depths,
    groups, windows, weights, like, head, wte, smear_gate, smear_lambda, resid, first, backout, cos,
    sin, qk_scale, gate_scale, eps,
):  # fmt: skip
    """What a thread does in all steps: FusedGPT.forward with the same numbers, and the draw. tokens
    (steps, T); like: the weights of some layer, for their types."""
    crew = _join(team, threads)
    if crew[1] == 0:
        return
    T, n_head, D = q.shape
    size, C, n_layer = cache.shape[4], n_head * D, len(windows)
    mixes, smears = resid.size > 0, backout.size > 0
    own, part = T < FEW, _share(T, crew)
    # the rows that a member norms: all, in arrays of its own, or its share of those that all use
    (a, b), (normed, mine) = part, ((0, T), crew[0]) if own else (part, 0)
    a0, b0 = normed
    x0, unused, other, h, middle = rows[mine]
    previous, space = np.empty(C, np.float32), steps.draw_space(V)
    q8, s8 = rounded[mine], scales[mine]
    one, none = _f32(1), _f32(0)
    yes, no = threads > 0, threads < 0
    for step in range(len(tokens)):
        steps.embed_some(  # (1)
            ids, prev_ids, positions, wte, smear_gate, smear_lambda, eps, normed, previous, x0
        )
        x, spare = x0, unused
        for i in range(n_layer):
            c0, c1 = (resid[i], first[i]) if mixes else (one, none)  # (2), and the norm before (3)
            steps.add_norm_some(x, y, x0, c0, c1, eps, i > 0, mixes, normed, spare, h)
            if i > 0 or mixes:
                x, spare = spare, x if i > 0 else other  # x0 is mixed in again
            if not own:
                _wait(team, crew)
            # (3) project, (4) rotate and norm, (5) write K and V, then attend
            proj, fc = _weight(weights, i, 1, like), _weight(weights, i, 2, like)
            _product(h, _weight(weights, i, 0, like), no, proj[0], own, team, crew, q8, s8, qkv)
            k, v, g = cache[depths[i], 0], cache[depths[i], 1], groups[i]
            gated = weights[i, _VE, 0] != 0
            ve = _tensor(weights, i, _VE, wte)[0] if gated else wte
            ve_gate = _tensor(weights, i, _VE + 1, x0)[0] if gated else x0
            steps.rope_store_some(
                qkv.reshape(T, -1, D), h, ids, ve, ve_gate, gated, cos, sin, positions, slots[g],
                k, v, qk_scale, gate_scale, eps, part, previous[:D], q,
            )  # fmt: skip
            _wait(team, crew)
            _attend(q, k, v, tables[g], positions, windows[i], crew, scratch[crew[0]], seen)
            _wait(team, crew)
            _product(seen.reshape(T, C), proj, no, fc[0], own, team, crew, q8, s8, y)
            steps.add_norm_some(x, y, x, one, none, eps, yes, no, normed, spare, h)
            x, spare = spare, x
            if not own:
                _wait(team, crew)
            mlp_proj = _weight(weights, i, 3, like)  # (6)
            _product(h, fc, yes, mlp_proj[0], own, team, crew, q8, s8, wide)
            following = head[0] if i == n_layer - 1 else _weight(weights, i + 1, 0, like)[0]
            _product(wide, mlp_proj, no, following, own, team, crew, q8, s8, y)
            if smears and i == n_layer // 2:
                for t in range(a0, b0):
                    for c in range(C):
                        middle[t, c] = x[t, c] + y[t, c]
        steps.add_norm_some(x, y, x, one, none, eps, yes, no, normed, spare, h)
        if smears:  # (7)
            steps.back_out(spare[a0:b0], backout[0], middle[a0:b0])
            steps.add_norm_some(spare, y, x, one, none, eps, no, no, normed, x, h)
        if not own:
            _wait(team, crew)
        first_weights = _weight(weights, 0, 0, like)[0]
        _product(h, head, no, first_weights, own, team, crew, q8, s8, logits)
        stride, flat = logits.shape[1], logits.reshape(-1)
        steps.sample_some(
            flat, V, stride, uniform[step], scale, softcap, filters, (a, b, 1), space, tokens[step]
        )
        for t in range(a, b):
            token, position = tokens[step, t], positions[t] + 1
            ends = token < 0
            for stop in stops[t]:
                ends |= token == stop
            if ends:
                _swap(team, _ENDED, 1)
            prev_ids[t], ids[t], positions[t] = ids[t], max(token, 0), position
            if step + 1 < len(tokens):
                for g in range(len(slots)):
                    slots[g, t] = tables[g, t, position // size] * size + position % size
        team[_DONE] = step + 1  # all write the same
        _wait(team, crew)
        if _peek(team, _ENDED):
            break


@intrinsic
def _call(context, address, arguments):
    """Call the kernel at an address, which returns nothing."""

    def codegen(context, builder, signature, values):
        kinds = signature.args[1].types
        kind = context.call_conv.get_function_type(types.none, kinds)
        kernel = builder.inttoptr(values[0], kind.as_pointer())
        given = cgutils.unpack_tuple(builder, values[1])
        context.call_conv.call_function(builder, kernel, types.none, kinds, given)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), codegen


@kept(parallel=True, **EXACT)
def _start(address, threads, arguments):
    """Call a kernel in each thread. By its address: a kernel that is called by its name becomes a
    part of the caller, which is compiled three times for its threads, for a third of a minute."""
    for _ in numba.prange(threads):
        _call(address, arguments)


def address_of(kernel, kinds: tuple) -> int:
    """Where a kernel is for arguments of these types; compiles it if need be."""
    if kinds not in kernel.overloads:
        kernel.compile(kinds)
    found = kernel.overloads[kinds]
    return found.library.get_pointer_to_function(found.fndesc.llvm_func_name)


def compute(model, plan, cache, blocks, count: int) -> np.ndarray:
    """Compute a plan in which each sequence has one token and a sample, and what comes after it, up
    to `count` steps, for which the blocks are there: (steps, T) tokens, fewer steps if a sequence
    ends. model: a FusedGPT."""
    layers, batch, params = model.compiled, make_batch(plan, blocks), plan.params
    seqs, T = [seq for _, seq, _ in plan.samples], len(params)
    slots = batch.slots.reshape(-1, T)
    tables = batch.block_tables.reshape(len(slots), T, -1)
    # all that is random, as in make_batch
    samples = [seq.params.sample_index + seq.sample_id for seq in seqs]
    drawn = (batch.seq_lens + np.arange(count)[:, None]).ravel()
    seeds = np.array([p.seed for p in params], np.uint64)
    uniform = noise(np.tile(seeds, count), np.tile(samples, count), drawn).reshape(count, T)
    known = [[i for i in seq.stop_ids if i < model.config.vocab_size] for seq in seqs]
    width = max(map(len, known))
    stops = np.array([[*row, *[-1] * (width - len(row))] for row in known], np.int32)
    layers.locate(cache)
    num_panels = len(layers.head[0])
    tokens, team = np.empty((count, T), np.int64), np.zeros(32, np.int64)
    with one_at_a_time:
        threads = threads_for(num_panels)
        y, _, q, seen, qkv, wide = [(T, *shape) for shape in layers.shapes[2:]]
        rows, rounded, *others = workspace(
            (threads, 5, *y), (threads, T, 2 * y[1]), (threads, T, 1),
            (threads, scratch_size(layers.group, q[2])), y, q, seen, qkv, wide,
            (T, num_panels * PANEL),
        )  # fmt: skip
        before = (
            team, threads, rows, rounded.view(np.uint8), *others, tokens, *batch[:3], slots, tables,
            uniform, *steps.draw_values(params, batch.temperature), stops, model.config.vocab_size,
            _f32(model.recipe.softcap), steps.array_of(cache.data),
            layers.depths, layers.groups, layers.windows, layers.weights,
        )  # fmt: skip
        after = layers.wte, *layers.smear, *layers.numbers, *layers.scales
        if not layers.member:
            # numba takes a millisecond to find out their types, which are always the same
            kinds = numba.typeof((*before, layers.like, layers.head, *after)).types
            layers.member = address_of(_member, kinds)
        # a parallel loop takes no tuples within a tuple; to a kernel it is the same without them
        _start(layers.member, threads, (*before, *layers.like, *layers.head, *after))
    return tokens[: team[_DONE]]


first.several = compute  # a tiny model's run, too
