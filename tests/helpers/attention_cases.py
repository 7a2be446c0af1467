"""Random queries over sequences in scattered blocks, attention computed from its definition, and
what every attention function must do."""

import numpy as np
import torch

from microvllm.attention import PagedKVCache, SequenceKVView
from microvllm.model import GPTConfig

from .batches import hand_made_batch, slots_of

CPU = torch.device("cpu")

# the shapes of heads: n_head, n_kv_head, head_dim
HEADS = [
    (4, 4, 16), (4, 1, 16), (6, 3, 8), (6, 2, 20), (1, 1, 64), (2, 1, 128), (10, 2, 6), (20, 1, 4),
]  # fmt: skip
# (rows, tokens in the cache after them): decodes, whole prompts, chunks; more than one of each
MIXED = [(1, 1), (1, 17), (1, 70), (1, 33), (2, 2), (40, 40), (5, 33), (17, 80), (7, 8)]
DECODES = [(1, n) for n in (1, 2, 15, 16, 17, 64, 65, 200)]


class Case:
    """Random queries, and sequences whose blocks lie scattered in the second layer of a cache."""

    def __init__(self, sequences, n_head=4, n_kv_head=2, head_dim=16, block_size=16, seed=0):
        self.random = np.random.default_rng(seed)
        shape = {"sequence_len": 256, "vocab_size": 9, "n_layer": 2}
        heads = {"n_head": n_head, "n_kv_head": n_kv_head, "n_embd": n_head * head_dim}
        needed = [-(-length // block_size) for _, length in sequences]
        num_blocks = sum(needed) + 4
        self.cache = PagedKVCache(
            GPTConfig(**shape, **heads), num_blocks, block_size, torch.float32, CPU
        )
        # what no sequence owns must not matter: large, so that a leak shows at once
        self.cache.data.copy_(torch.from_numpy(self.normal(*self.cache.data.shape) * 1e4))
        blocks = self.random.permutation(num_blocks - 1)[: sum(needed)] + 1
        tables = [part.tolist() for part in np.split(blocks, np.cumsum(needed)[:-1])]
        self.lengths = [length for _, length in sequences]
        self.rows = [rows for rows, _ in sequences]
        k, v = self.k, self.v = self.cache.data[1]
        self.views = [
            SequenceKVView(k, v, table, length)
            for table, length in zip(tables, self.lengths, strict=True)
        ]
        for view in self.views:
            for slot in slots_of(view):
                for x in (k, v):
                    x[slot // block_size, :, slot % block_size] = torch.from_numpy(
                        self.normal(n_kv_head, head_dim)
                    )
        chunks = [
            ([0] * length, length - rows, length, table)
            for (rows, length), table in zip(sequences, tables, strict=True)
        ]
        self.batch = hand_made_batch(chunks, block_size)
        self.q = torch.from_numpy(self.normal(sum(self.rows), n_head, head_dim))

    def normal(self, *shape):
        return self.random.standard_normal(shape).astype(np.float32)

    def run(self, attend, window):
        return attend(self.q, self.k, self.v, self.batch, window)

    def expected(self, window):
        """Row by row and head by head in float64, from the definition."""
        n_head, dim = self.q.shape[1:]
        out = []
        queries = iter(self.q.double().numpy())
        for view, rows, length in zip(self.views, self.rows, self.lengths, strict=True):
            k, v = (x.double().numpy() for x in view.gather())  # (Hkv, length, D)
            group = n_head // len(k)
            for p in range(length - rows, length):
                seen = [j for j in range(length) if j <= p and (window < 0 or p - j <= window)]
                q = next(queries)
                for head in range(n_head):
                    scores = k[head // group, seen] @ q[head] / np.sqrt(dim)
                    weights = np.exp(scores - scores.max())
                    out.append(weights / weights.sum() @ v[head // group, seen])
        return torch.from_numpy(np.array(out)).view(self.q.shape)

    def check(self, attend, window):
        out = self.run(attend, window)
        assert out.shape == self.q.shape and out.dtype == self.q.dtype
        torch.testing.assert_close(out.double(), self.expected(window), rtol=0, atol=2e-6)


def check_both_ends_of_the_window(attend) -> None:
    """w + 1 keys: the query itself and the w before it. Each value names its own position."""
    case = Case([(1, 30), (30, 30)], n_head=1, n_kv_head=1, head_dim=16, block_size=4)
    k, v = case.k, case.v
    k.zero_()  # so that all visible keys weigh the same
    for view in case.views:
        for p, slot in enumerate(slots_of(view)):
            v[slot // 4, :, slot % 4] = 2.0**p
    for window in (0, 3, 29, 30):
        out = case.run(attend, window)
        for row, p in enumerate([29, *range(30)]):
            seen = range(max(0, p - window), p + 1)
            expected = sum(2.0**j for j in seen) / len(seen)
            torch.testing.assert_close(out[row], torch.full((1, 16), expected), rtol=1e-6, atol=0)


def check_scores_of_any_size(attend) -> None:
    case = Case(MIXED, block_size=4)
    case.q *= 1000.0  # scores in the thousands: exp() of them is infinite
    out = case.run(attend, -1)
    assert out.isfinite().all()
    # the scores are themselves good to 1e-4 or so here, and one key takes nearly all the weight
    torch.testing.assert_close(out.double(), case.expected(-1), rtol=0, atol=5e-3)
    case.q *= 0.0  # equal weights
    case.check(attend, 5)


def check_sequences_alone_and_together(attend) -> None:
    case = Case(MIXED, block_size=4)
    together = case.run(attend, 25)
    first = 0
    for view, rows, length in zip(case.views, case.rows, case.lengths, strict=True):
        chunk = ([0] * length, length - rows, length, view.block_table.tolist())
        batch = hand_made_batch([chunk], 4)
        alone = attend(case.q[first : first + rows], case.k, case.v, batch, 25)
        torch.testing.assert_close(alone, together[first : first + rows], rtol=0, atol=1e-6)
        first += rows


def check_only_the_output_is_written(attend) -> None:
    case = Case(MIXED)
    before = case.cache.data.clone(), case.q.clone()
    case.run(attend, 9)
    assert torch.equal(case.cache.data, before[0]) and torch.equal(case.q, before[1])


def check_half_precision_softmax(attend) -> None:
    """300 equal keys: sums of weights of 1/300 would be off by a percent in bfloat16."""
    case = Case([(1, 300), (300, 300)])
    reference = case.run(attend, -1)
    k, v = case.k.bfloat16(), case.v.bfloat16()
    out = attend(case.q.bfloat16(), k, v, case.batch, -1)
    assert out.dtype == torch.bfloat16
    assert (out.float() - reference).norm() / reference.norm() < 8e-3
