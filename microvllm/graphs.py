"""Decode steps as CUDA graphs: one launch instead of some three hundred.

A step in which every sequence computes one token has the same kernels each time; only the numbers
in its batch differ. So it is recorded once per batch size, and replayed after the new numbers were
copied to where the recorded kernels read them. Rows that pad a batch to a recorded size are
sequences of one token in block 0, the sink.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import kernels_gpu
from .sampler import is_plain


class DecodeGraphs:
    """Recorded decode steps for batch sizes 1, 2, 4, 8 and all multiples of 16.

    model, cache: whose weights and blocks the graphs read, at their present addresses;
    max_batch_size: largest batch; max_model_len: longest sequence in tokens.
    """

    def __init__(self, model, cache, max_batch_size: int, max_model_len: int):
        self.block_size = cache.block_size
        self.columns = -(-max_model_len // cache.block_size)  # of the block table
        sizes = [s for s in (1, 2, 4, 8) if s < max_batch_size]
        self.sizes = sizes + list(range(16, max_batch_size + 15, 16))
        device = model.device
        # one row is id, prev_id, position, slot, cu_seqlen, seq_len, temperature, noise and a table
        self.inputs = torch.zeros(
            self.sizes[-1] * (8 + self.columns) + 1, dtype=torch.int32, device=device
        )
        self.last = torch.zeros(self.sizes[-1], dtype=torch.int32, device=device)  # newest tokens
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode():
            for size in reversed(self.sizes):  # the largest first: the others reuse its memory
                self._write(self._pad(None, size))
                self._decode(model, cache, size, max_model_len)  # kernels may not load in a graph
                torch.cuda.synchronize(device)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    self._decode(model, cache, size, max_model_len)
                self.graphs[size] = graph

    def fits(self, batch, params) -> bool:
        """Is it a step that was recorded: one token per sequence, each of them sampled plainly?"""
        size = len(batch.ids)
        return (
            batch.max_query == 1
            and size == len(params) == len(batch.logit_rows) <= self.sizes[-1]
            and (size < 2 or bool((np.diff(batch.logit_rows) == 1).all()))
            and is_plain(params)
        )

    def replay(self, batch, last: Tensor | None) -> Tensor:
        """Run a batch (numpy); `last` are the tokens of the step before, for ids that are ~row.
        Returns (R,) tokens on the device, valid until the replay after the next."""
        size = len(batch.ids)
        if last is not None and last.data_ptr() != self.last.data_ptr():
            self.last[: len(last)].copy_(last)
        padded = next(s for s in self.sizes if s >= size)
        self._write(self._pad(batch, padded))
        self.graphs[padded].replay()
        return self.last[:size]

    def _pad(self, batch, size: int) -> np.ndarray:
        """The batch as one array: eight columns of `size`, then the tables."""
        flat = np.zeros(size * (8 + self.columns) + 1, np.int32)
        columns = flat[: 7 * size].reshape(7, size)
        columns[4] = 1  # a padding row is a sequence of one token
        flat[7 * size : 8 * size + 1] = np.arange(size + 1)
        if batch is not None:
            n = len(batch.ids)
            fields = (batch.ids, batch.prev_ids, batch.positions, batch.slots, batch.seq_lens)
            for column, values in zip(columns, fields, strict=False):
                column[:n] = values
            columns[5, :n] = batch.temperature.view(np.int32)
            columns[6, :n] = batch.noise.view(np.int32)
            tables = flat[8 * size + 1 :].reshape(size, self.columns)
            tables[:n, : batch.block_tables.shape[1]] = batch.block_tables
        return flat

    def _write(self, flat: np.ndarray) -> None:
        # pinned, so that the copy takes its place in the stream and the host goes on
        self.inputs[: len(flat)].copy_(torch.from_numpy(flat).pin_memory(), non_blocking=True)

    def _decode(self, model, cache, size: int, max_model_len: int) -> None:
        """What is recorded: read the inputs, forward, sample, leave the tokens in `last`."""
        from .engine import Batch

        ids, prev_ids, positions, slots, seq_lens, temperature, noise = self.inputs[
            : 7 * size
        ].view(7, size)
        cu_seqlens = self.inputs[7 * size : 8 * size + 1]
        tables = self.inputs[8 * size + 1 : size * (8 + self.columns) + 1].view(size, self.columns)
        known = self.last[(~ids).clamp(min=0)]
        batch = Batch(
            torch.where(ids < 0, known, ids), prev_ids, positions, slots, cu_seqlens, seq_lens,
            tables, cu_seqlens[:-1], temperature.view(torch.float32), noise.view(torch.float32),
            num_decodes=size, max_query=1, max_seq=max_model_len,
        )  # fmt: skip
        logits = model.logits(model.forward(batch, cache))
        softcap = model.recipe.softcap
        tokens = kernels_gpu.sample(logits, batch.temperature, batch.noise, softcap)
        self.last[:size].copy_(tokens)
