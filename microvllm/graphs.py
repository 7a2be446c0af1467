"""Decode steps as CUDA graphs: one launch instead of some three hundred.

A step in which every sequence computes one token has the same kernels each time; only the numbers
in its batch differ. So it is recorded once per batch size, and replayed after the new numbers were
copied to where the recorded kernels read them. Rows that pad a batch to a recorded size are
sequences of one token in block 0, the sink.
"""

from __future__ import annotations

import gc

import numpy as np
import torch
from torch import Tensor

from . import kernels_gpu
from .engine import Batch
from .sampler import filters

# fields of a row beside its slots and block tables; cu_seqlens never changes
FIELDS = 9  # ids, prev_ids, positions, seq_lens, temperature, noise, top_k, top_p, min_p


class DecodeGraphs:
    """Recorded decode steps for batch sizes 1, 2, 4, 8, the multiples of 16, and the largest.

    model, cache: whose weights and blocks the graphs read, at their present addresses;
    max_batch_size: largest batch; max_model_len: longest sequence in tokens.
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
        self._record(model, cache, max_model_len)

    def _record(self, model, cache, max_model_len: int) -> None:
        device, pool = model.device, torch.cuda.graph_pool_handle()
        gc.freeze()  # older versions of torch collect garbage before every capture: leave them none
        try:
            # up to torch 2.10 all graphs of a process share the generator's tensors, and those made
            # in inference_mode nobody may change outside it: a user's own capture would fail
            with torch.no_grad():
                for size in reversed(self.sizes):  # the largest first: the others reuse its memory
                    self._decode(model, cache, size, max_model_len)  # no kernel loads in a graph
                    torch.cuda.synchronize(device)
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool):
                        self._decode(model, cache, size, max_model_len)
                    self.graphs[size] = graph
        finally:
            gc.unfreeze()

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
        floats[6:9] = np.array(filters(params) or [(0, 1, 0)]).T
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

    def _decode(self, model, cache, size: int, max_model_len: int) -> None:
        """What is recorded: read the inputs, forward, sample, leave the tokens in `last`, and the
        logits for rows that are not plain."""
        fields, tables = self._split(self.inputs, size)
        ids, prev_ids, positions, seq_lens = fields[:4]
        temperature, noise, *drop = fields[4:FIELDS].view(torch.float32)
        cu_seqlens = self.cu_seqlens[: size + 1]
        ids = torch.where(ids < 0, self.last[(~ids).clamp(min=0)], ids)
        batch = Batch(
            ids, prev_ids, positions, fields[FIELDS:], cu_seqlens, seq_lens, tables,
            cu_seqlens[:-1], temperature, noise,
            num_decodes=size, max_query=1, max_seq=max_model_len,
        )  # fmt: skip
        logits = model.logits(model.forward(batch, cache))
        tokens = kernels_gpu.sample(logits, temperature, noise, model.recipe.softcap, drop)
        self.last[:size].copy_(tokens)
        if self.logits is None:  # the largest step's
            self.logits = torch.empty_like(logits)
        self.logits[:size].copy_(logits)
