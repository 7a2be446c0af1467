"""A plan as arrays: each batch of a long simulation is compared with one that is spelled out by
hand."""

import numpy as np
import pytest
import torch
from helpers.batches import hand_made_batch
from helpers.simulation import Simulation, text

from microvllm.attention import HostBatch, PagedKVCache, make_batch
from microvllm.model import GPTConfig
from microvllm.sampler import uniform_numbers
from microvllm.scheduler import Span


class Compared(Simulation):
    """A simulation that compares every batch; some batches request hidden states."""

    def on_plan(self, plan):
        for index, chunk in enumerate(plan.chunks):
            if chunk.num_tokens > 2 and chunk.seq.request_id % 2 == 0:
                plan.extra_rows.append(Span(index, chunk.start + 1, chunk.stop))

    def run(self, plan):
        batch = make_batch(plan, self.blocks)
        spelled = self.spell_out(plan)
        # no column is missing; those that a shorter table leaves over are the null block's
        width = max(len(chunk.seq.block_table) for chunk in plan.chunks)
        assert batch.block_tables.shape[1] == width
        spelled.block_tables = spelled.block_tables[:, :width]
        for name, wanted in vars(spelled).items():
            found = getattr(batch, name)
            if isinstance(wanted, int):
                assert type(found) is int and found == wanted, name
            else:
                assert found.dtype == np.int32 and found.tolist() == wanted.tolist(), name
        places = [(draw.seq.seed, draw.seq.index, draw.position) for draw in plan.draws]
        wanted = uniform_numbers(*zip(*places, strict=True)) if places else []
        assert batch.uniform.tolist() == list(wanted)
        temperatures = [draw.seq.params.temperature for draw in plan.draws]
        assert batch.temperature.tolist() == temperatures
        assert batch.uniform.dtype == batch.temperature.dtype == np.float32
        assert batch.prev_token_ids.min() >= 0, "the token before a token is always known"
        assert_uploads(batch)
        return super().run(plan)

    def spell_out(self, plan):
        chunks = []
        for seq, start, stop, draft in plan.chunks:
            chunks.append((seq.token_ids + list(draft), start, stop, seq.block_table))
        spelled = hand_made_batch(chunks, self.blocks.block_size)
        rows = []
        for index, _, position, _ in plan.draws:
            rows.append(spelled.cu_seqlens[index] + position - 1 - plan.chunks[index].start)
        for index, start, stop in plan.extra_rows:
            first = spelled.cu_seqlens[index] - plan.chunks[index].start
            rows += [first + position for position in range(start, stop)]
        spelled.hidden_rows = torch.tensor([int(row) for row in rows], dtype=torch.int32)
        return spelled


def assert_uploads(batch: HostBatch) -> None:
    """As tensors a batch has the same numbers, of the same types."""
    for there, here in zip(batch.to(torch.device("cpu")), batch, strict=True):
        if isinstance(here, int):
            assert there == here
        else:
            assert torch.equal(there, torch.from_numpy(here))


@pytest.mark.parametrize("kind", ["plain", "ahead", "drafts"])
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_a_batch_is_its_plan(block_size, kind):
    sim = Compared(
        usable=90 // block_size,
        block_size=block_size,
        max_batched_tokens=20,
        max_batch_size=5,
        guesses=kind == "drafts",
    )
    for i in range(8):
        sim.add(text(1 + 5 * i % 23, i % 5), max_tokens=1 + 3 * i, n=1 + i % 3)
        sim.add(text(1 + 5 * i % 23, i % 5), max_tokens=1 + i)
    sim.drain(ahead=kind == "ahead")


def test_copies_read_a_block_before_another_is_copied_to_it():
    config = GPTConfig(32, 99, 3, 2, 1, 16)
    cache = PagedKVCache(config, 5, 4, torch.float32, torch.device("cpu"))
    assert not cache.data.any()  # a NaN in a slot that was never written would spread
    for block in range(5):
        cache.data[:, :, block] = block
    cache.copy_blocks([(1, 2), (1, 4), (3, 1)])
    for part in cache.data.flatten(0, 1):
        assert [part[block].unique().item() for block in range(5)] == [0, 3, 1, 3, 1]
