"""Several steps of a model in one compiled call, for several.py: see backend._run."""

from __future__ import annotations

import numpy as np

from ..attention import make_batch
from ..sampler import noise
from . import steps


def compute(model, plan, cache, blocks, count: int) -> np.ndarray:
    """Compute a plan in which each sequence has one token and a sample, and what comes after it, up
    to `count` steps, for which the blocks are there: (steps, T) tokens, fewer steps if a sequence
    ends. model: a FusedGPT."""
    batch, params = make_batch(plan, blocks), plan.params
    seqs = [seq for _, seq, _ in plan.samples]
    # all that is random, as in make_batch
    samples = [seq.params.sample_index + seq.sample_id for seq in seqs]
    drawn = (batch.seq_lens + np.arange(count)[:, None]).ravel()
    seeds = np.array([p.seed for p in params], np.uint64)
    uniform = noise(np.tile(seeds, count), np.tile(samples, count), drawn)
    known = [[i for i in seq.stop_ids if i < model.config.vocab_size] for seq in seqs]
    width = max(map(len, known))
    stops = np.array([[*row, *[-1] * (width - len(row))] for row in known], np.int32)
    scale, filters = steps.draw_values(params, batch.temperature)
    uniform = uniform.reshape(count, len(seqs))
    return model.compiled.several(batch, cache, uniform, scale, filters, stops, count)
