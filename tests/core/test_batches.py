"""A plan as arrays: every batch of a long life is compared with one that is spelled out row by
row."""

import numpy as np
import pytest
import torch
from conftest import hand_made_batch
from test_scheduler import Simulation, text

from microvllm.attention import PagedKVCache
from microvllm.engine import Batch
from microvllm.features.scoring import ScoringRunner
from microvllm.model import GPTConfig
from microvllm.sampler import noise


class Compared(Simulation):
    """A simulation that compares every batch."""

    def run(self, step):
        batch = ScoringRunner(None, None, self.blocks).batch(step)
        spelled = hand_made_batch(
            [(seq.tokens, start, stop, seq.table) for seq, start, stop in step.chunks],
            self.blocks.block_size,
        )
        ends = spelled.cu_seqlens[1:] - 1
        spelled.logit_rows = ends[[index for index, _, _ in step.samples]]
        for index, _, first, stop in step.scored:
            rows = torch.arange(first, stop) - step.chunks[index][1] + spelled.cu_seqlens[index]
            spelled.logit_rows = torch.cat([spelled.logit_rows, rows.int()])
        width = batch.block_tables.shape[1]
        # no column is missing; those that a shorter table leaves over are the sink's
        assert width == max(len(seq.table) for seq, _, _ in step.chunks)
        spelled.block_tables = spelled.block_tables[:, :width]
        for name, wanted in vars(spelled).items():
            found = getattr(batch, name)
            if isinstance(wanted, int):
                assert type(found) is int and found == wanted, name
            else:
                assert found.dtype == np.int32 and found.tolist() == wanted.tolist(), name
        places = [(s.params.seed, s.sample_id, position) for _, s, position in step.samples]
        wanted = noise(*zip(*places, strict=True)) if places else []
        assert batch.noise.tolist() == list(wanted)
        assert batch.temperature.tolist() == [s.params.temperature for _, s, _ in step.samples]
        assert batch.noise.dtype == batch.temperature.dtype == np.float32
        assert batch.prev_ids.min() >= 0, "the token before a token is always known"
        assert_uploads(batch)
        return super().run(step)


def assert_uploads(batch: Batch) -> None:
    """As tensors a batch has the same numbers, of the same types."""
    for there, here in zip(batch.to(torch.device("cpu")), batch, strict=True):
        if isinstance(here, int):
            assert there == here
        else:
            assert torch.equal(there, torch.from_numpy(here))


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "ahead"])
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_a_batch_is_its_plan(block_size, overlap):
    sim = Compared(
        usable=90 // block_size, block_size=block_size, max_batched_tokens=20, max_batch_size=5
    )
    for i in range(8):
        sim.add(text(1 + 5 * i % 23, i % 5), max_tokens=1 + 3 * i, n=1 + i % 3)
        sim.add(text(1 + 5 * i % 23, i % 5), targets=text(1 + i, i))
    sim.drain(ahead=overlap)


def test_copies_read_a_block_before_another_is_copied_to_it():
    config = GPTConfig(32, 99, 3, 2, 1, 16)
    cache = PagedKVCache(config, 5, 4, torch.float32, torch.device("cpu"))
    assert not cache.data.any()  # a NaN in a slot that nobody wrote would spread
    for block in range(5):
        cache.data[:, :, block] = block
    cache.copy_blocks([(1, 2), (1, 4), (3, 1)])
    for part in cache.data.flatten(0, 1):
        assert [part[block].unique().item() for block in range(5)] == [0, 3, 1, 3, 1]
