"""Decode steps as CUDA graphs: one launch instead of some three hundred.

A step in which every sequence computes one token has the same kernels each time; only the numbers
in its batch differ. So it is recorded once per batch size, and replayed after the new numbers were
copied to where the recorded kernels read them. Rows that pad a batch to a recorded size are
sequences of one token in block 0, the sink.

A step of a few rows is little more than reading the weights once. For these there are matrix-vector
kernels with norm, residual add and relu^2 fused into them. They are timed beside the library's when
the engine starts, and the fastest are kept.
"""

from __future__ import annotations

import gc
import statistics
import warnings
from functools import partial
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine import Batch
from ..fused.linear import Linear
from ..sampler import filter_values
from . import kernels as kernels_gpu

# fields of a row beside its slots and block tables; cu_seqlens never changes
FIELDS = 9  # ids, prev_ids, positions, seq_lens, temperature, noise, top_k, top_p, min_p
FEW_ROWS = 8  # the largest batch for which `few_rows` is tried
OUTPUTS = 2, 4  # per program of its products, both are tried
TRIALS = 8  # timed replays of each way


def few_rows(model, batch: Batch, cache, outputs: int) -> Tensor:
    """The logits (R, V) of a few rows that decode: what model.forward and model.logits make of
    them, in two thirds of the kernels. The norms are not rounded before the products. outputs: per
    program of a product."""
    norm_linear = partial(kernels_gpu.norm_linear, outputs=outputs)
    linear_add = partial(kernels_gpu.linear_add, outputs=outputs)
    recipe, x, middle = model.recipe, model.embed(batch), None
    x0, eps, backout = x, recipe.eps, (None, None, None)
    for i, layer in enumerate(model.layers):
        k, v = cache.layer(i)
        group = batch.group(cache.group_of[i])
        scaled = x0, layer.resid_lambda, layer.x0_lambda
        qkv, h = norm_linear(x, layer.qkv.weight, eps, *scaled)
        q = kernels_gpu.rope_store(
            qkv, h, layer.ve, layer.ve_gate, model.cos, model.sin, group, k, v,
            model.config.n_head, recipe.qk_scale, recipe.gate_scale, eps,
        )  # fmt: skip
        y = model.attend(q, k, v, group, layer.window)
        x = linear_add(y.flatten(1), layer.proj.weight, x, *scaled)
        y, _ = norm_linear(x, layer.fc.weight, eps, relu2=True)
        x = linear_add(y, layer.mlp_proj.weight, x)
        if recipe.smear and i == model.config.n_layer // 2:
            middle = x
    if middle is not None:
        minus = -model.backout_lambda.float()
        backout = middle, torch.ones_like(minus), minus
    head = model.lm_head.weight[: model.config.vocab_size]
    return norm_linear(x, head, eps, *backout)[0]


def takes_few_rows(model) -> bool:
    """Can a GPT's steps be `few_rows`? On NVIDIA's cards, from triton 3.4 on, and if each matrix is
    one tensor with torch's product: not a live module's parts, float8, or deterministic=True."""
    plain = all(type(w) is Linear and w.product is F.linear for w in model.linears.values())
    return plain and kernels_gpu.TRITON_34 and torch.version.hip is None


def fastest(times: dict[str, list[float]]) -> str:
    """Whose median is the least."""
    return min(times, key=lambda way: statistics.median(times[way]))


class DecodeGraphs:
    """Recorded decode steps for batch sizes 1, 2, 4, 8, the multiples of 16, and the largest.

    model, cache: whose weights and blocks the graphs read, at their present addresses;
    max_batch_size: largest batch; max_model_len: longest sequence in tokens. `ways` says how the
    steps of a few rows run, by size.
    """

    def __init__(self, model, cache, max_batch_size: int, max_model_len: int):
        device, sizes = model.device, (1, 2, 4, 8, *range(16, max_batch_size, 16))
        self.sizes = [size for size in sizes if size < max_batch_size] + [max_batch_size]
        self.columns = -(-max_model_len // cache.block_size)  # of the block tables
        self.groups = cache.num_groups  # each with a slot and a table of its own
        self.width = FIELDS + self.groups * (1 + self.columns)  # of a row
        # where the recorded kernels read; zeros are sequences of no token, whose row goes to the
        # sink. a smaller size has its fields and tables nearer to the beginning
        ints = {"dtype": torch.int32, "device": device}
        self.inputs = torch.zeros(max_batch_size * self.width, **ints)
        self.cu_seqlens = torch.arange(max_batch_size + 1, **ints)
        self.last = torch.zeros(max_batch_size, **ints)  # the newest tokens
        self.logits: Tensor | None = None  # and what they were drawn from
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.ways: dict[int, str] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.model, self.cache, self.max_model_len = model, cache, max_model_len
        gc.freeze()  # older versions of torch collect garbage before every capture: leave them none
        try:
            # up to torch 2.10 all graphs of a process share the generator's tensors, and those made
            # in inference_mode nobody may change outside it: a user's own capture would fail
            with torch.no_grad():
                for size in reversed(self.sizes):  # the largest first: the others reuse its memory
                    self.graphs[size] = self._record(size)
                    if size <= FEW_ROWS and takes_few_rows(model):
                        self._choose(size)
        finally:
            gc.unfreeze()

    def _record(self, size: int, outputs: int = 0) -> torch.cuda.CUDAGraph:
        """Run the step once, so that all kernels are compiled and loaded, then capture it.
        outputs: per program of the products of `few_rows`, 0 for the library's."""
        self._decode(size, outputs)
        torch.cuda.synchronize(self.model.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self._decode(size, outputs)
        return graph

    def _choose(self, size: int) -> None:
        """Keep the fastest way to run a step of so many rows: all are timed, in turns."""
        graphs = {"library": self.graphs[size]}
        can = kernels_gpu.can_start_early(self.model.device)
        for outputs, early in product(OUTPUTS, (False, True)[: 1 + can]):
            way = f"few_rows, {outputs}" + ", early" * early
            try:
                with kernels_gpu.early_start(early):
                    graphs[way] = self._record(size, outputs)
            except Exception as error:  # the compiler's, or no memory: the library's is there
                warnings.warn(f"no decode steps by {way!r} here: {error!r:.300}", stacklevel=2)
        times, logits = {way: [] for way in graphs}, {way: [] for way in graphs}
        fields, _ = self._split(self.inputs, size)
        for token in range(min(TRIALS, self.model.config.vocab_size)):
            fields[0], fields[3] = token, 1  # sequences of one token, in the sink
            for way, graph in graphs.items():
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record(), graph.replay(), last.record()
                logits[way].append(self.logits[:size].view(torch.uint8).clone())  # NaN is NaN
                torch.cuda.synchronize(self.model.device)
                times[way].append(first.elapsed_time(last))
        self.inputs.zero_()
        # early or not, the sums are the same; where they are not, a kernel did not wait
        for way in [way for way in graphs if way.endswith("early")]:
            plain = logits.get(way.removesuffix(", early"))
            if plain is None or not all(map(torch.equal, logits[way], plain)):
                warnings.warn("kernels that start early err on this card: unused", stacklevel=2)
                del times[way]
        self.ways[size] = fastest(times)
        self.graphs[size] = graphs[self.ways[size]]

    def fits(self, batch: Batch, params) -> bool:
        """Is it a step that was recorded: one row per sequence, each sampled once?"""
        return (
            batch.max_query == 1
            and len(params) == len(batch.ids)
            and np.array_equal(batch.logit_rows, batch.cu_seqlens[:-1])
        )

    def replay(self, batch: Batch, params, last: Tensor | None) -> tuple[Tensor, ...]:
        """Run a batch (numpy). Returns, on the device, its (R,) tokens, as they are where all rows
        are plain, and what others are made from: logits (R, V), temperature and noise (R,).

        params: the SamplingParams of its rows; last: the tokens of the step before, for ids that
        are ~row. What is returned is memory that the next replay writes to: copies are to be queued
        on the same stream before it.
        """
        if last is not None and last.data_ptr() != self.last.data_ptr():
            self.last[: len(last)].copy_(last)  # they come from a step that was no graph
        rows = len(batch.ids)
        size = next(size for size in self.sizes if size >= rows)
        # pinned, so that the copy takes its place in the stream and the host goes on. torch keeps
        # the memory until the copy is done and hands it out again after that
        count = size * self.width
        pinned = torch.empty(count, dtype=torch.int32, pin_memory=True)
        fields, tables = self._split(pinned.numpy(), size)
        fields[:4, :rows] = batch.ids, batch.prev_ids, batch.positions, batch.seq_lens
        floats = fields[:, :rows].view(np.float32)
        floats[4], floats[5] = batch.temperature, batch.noise
        floats[6:9] = np.array(filter_values(params) or [(0, 1, 0)]).T
        fields[FIELDS:, :rows] = batch.slots
        fields[:, rows:] = 0
        fields[3, rows:] = 1  # a padding row is a sequence of one token
        used = batch.block_tables.shape[2]
        tables[:, :rows, :used] = batch.block_tables
        tables[:, :rows, used:] = 0
        tables[:, rows:] = 0
        self.inputs[:count].copy_(pinned, non_blocking=True)
        self.graphs[size].replay()
        temperature, noise = self._split(self.inputs, size)[0][4:6, :rows].view(torch.float32)
        return self.last[:rows], self.logits[:rows], temperature, noise

    def _split(self, flat, size: int):
        """The inputs of a batch of `size` rows as (FIELDS + groups, size) and (groups, size,
        columns), array or tensor."""
        rows = FIELDS + self.groups
        fields, tables = flat[: rows * size], flat[rows * size : self.width * size]
        return fields.reshape(rows, size), tables.reshape(self.groups, size, self.columns)

    def _decode(self, size: int, outputs: int) -> None:
        """What is recorded: read the inputs, forward, sample, leave the tokens in `last`, and the
        logits for rows that are not plain: a copy (67 MB of 512 rows and 65,536 ids), since what
        the graphs compute in is used again by the next."""
        model, cache = self.model, self.cache
        fields, tables = self._split(self.inputs, size)
        ids, prev_ids, positions, seq_lens = fields[:4]
        temperature, noise, *filters = fields[4:FIELDS].view(torch.float32)
        cu_seqlens = self.cu_seqlens[: size + 1]
        ids = torch.where(ids < 0, self.last[(~ids).clamp(min=0)], ids)
        batch = Batch(
            ids, prev_ids, positions, fields[FIELDS:], cu_seqlens, seq_lens, tables,
            cu_seqlens[:-1], temperature, noise,
            num_decodes=size, max_query=1, max_seq=self.max_model_len,
        )  # fmt: skip
        if outputs:
            logits = few_rows(model, batch, cache, outputs)
        else:
            logits = model.logits(model.forward(batch, cache))
        tokens = kernels_gpu.sample(logits, temperature, noise, model.recipe.softcap, filters)
        self.last[:size].copy_(tokens)
        if self.logits is None:  # the largest step's
            self.logits = torch.empty_like(logits)
        self.logits[:size].copy_(logits)
