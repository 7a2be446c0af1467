"""Random inputs for a GPU's kernels, which Triton's interpreter runs where there is no card.

Import this before anything that imports triton.
"""

import os
from types import SimpleNamespace

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton", reason="the GPU kernels need triton (pip install triton)")

# an interpreter has everything
CAPABILITY = torch.cuda.get_device_capability() if CUDA else (9, 0)
if CAPABILITY < (8, 0):
    pytest.skip("the kernels are for compute capability 8.0 and newer", allow_module_level=True)

DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def attention_case(sequences, n_head, n_kv, dim, block_size, dtype, forks=()):
    """sequences: (rows, tokens in the cache) each, decodes first; forks: (sequence, blocks), the
    first ones, which are those of the sequence before it. Returns q, a clean k and v for the
    reference, a k and v with NaN wherever no sequence has a token, and the batch."""
    blocks = [-(-length // block_size) for _, length in sequences]
    k, v = randn(2, sum(blocks) + 3, n_kv, block_size, dim, dtype=dtype)
    order = (torch.randperm(sum(blocks) + 2) + 1).tolist()  # block 0 is the null block
    tables = torch.zeros(len(sequences), max(blocks) + 1, dtype=torch.int32)
    owned = torch.zeros(len(k), block_size, dtype=torch.bool)
    for b, (_, length) in enumerate(sequences):
        tables[b, : blocks[b]] = torch.tensor([order.pop() for _ in range(blocks[b])])
        same = dict(forks).get(b, 0)
        tables[b, :same] = tables[b - 1, :same]
        for p in range(length):
            owned[tables[b, p // block_size], p % block_size] = True
    rows = [r for r, _ in sequences]
    batch = SimpleNamespace(
        positions=ints([p for r, n in sequences for p in range(n - r, n)]),
        cu_seqlens=ints([sum(rows[:i]) for i in range(len(rows) + 1)]),
        seq_lens=ints([n for _, n in sequences]),
        block_tables=tables.to(DEVICE),
        num_decodes=next((i for i, r in enumerate(rows) if r > 1), len(rows)),
        max_query_len=max(rows),
        max_seq_len=max(n for _, n in sequences),
    )
    q = randn(sum(rows), n_head, dim, dtype=dtype)
    unowned = ~owned[:, None, :, None].to(DEVICE)
    return q, (k, v), (k.masked_fill(unowned, torch.nan), v.masked_fill(unowned, torch.nan)), batch


def chunk_of(batch, b, start, stop):
    """The batch of rows start .. stop of one sequence's chunk, alone."""
    rows = int(batch.cu_seqlens[b + 1] - batch.cu_seqlens[b])
    return SimpleNamespace(
        cu_seqlens=ints([0, stop - start]), seq_lens=batch.seq_lens[b : b + 1] - (rows - stop),
        block_tables=batch.block_tables[b : b + 1], max_query_len=stop - start, max_seq_len=10_000,
        num_decodes=int(stop - start == 1),
    )  # fmt: skip
