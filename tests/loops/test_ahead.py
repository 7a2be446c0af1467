"""The loop one step ahead, its runner, and on which device they work. That its tokens are those of
the plain loop, whatever fails or ends, is in the cases at the end."""

from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.engine_cases import EngineCases, FailureCases, RequestCases
from helpers.full_engines import build, set_overlap
from helpers.goldens import MODEL
from helpers.simulation import make_blocks

from microvllm import LLM, SamplingParams, attention, loading, resources
from microvllm.attention import PagedKVCache, make_batch
from microvllm.checkpoint import find_step, read_checkpoint
from microvllm.loops.ahead import AheadRunner, placeholders, upload
from microvllm.model import GPTConfig
from microvllm.runner import Hooks
from microvllm.scheduler import Chunk, Draw, DrawList, Plan, Sequence


def sequence(num_tokens: int, max_tokens: int = 9) -> Sequence:
    seq = Sequence(0, list(range(num_tokens)), SamplingParams(max_tokens=max_tokens, seed=0))
    seq.block_table.extend(range(1, 9))
    return seq


def step_of(*seqs: Sequence) -> Plan:
    """A step that computes the last token of each and draws the next."""
    lengths = [len(seq.token_ids) for seq in seqs]
    pairs = list(zip(seqs, lengths, strict=True))
    return Plan(
        chunks=[Chunk(seq, length - 1, length) for seq, length in pairs],
        draws=DrawList(Draw(i, seq, length) for i, (seq, length) in enumerate(pairs)),
    )


@pytest.fixture
def llm():
    with LLM(MODEL, device="cpu", num_blocks=60) as llm:
        yield set_overlap(llm)


def test_a_step_is_launched_before_the_last_ones_tokens_are_read(llm, monkeypatch):
    order, visible = [], []
    launch, wait = llm.runner.launch, llm.runner.wait

    def launched(plan):
        order.append("launch")
        visible.append([chunk.seq.token_ids[-1] for chunk in plan.chunks])
        launch(plan)

    def was_read(plan):
        order.append("read")
        assert all(token >= 0 for draw in plan.draws for token in draw.seq.token_ids)
        return wait(plan)

    monkeypatch.setattr(llm.runner, "launch", launched)
    monkeypatch.setattr(llm.runner, "wait", was_read)
    prompt, params = [5, 6, 7], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    llm.generate([prompt], params, False)
    assert order == ["launch", *["launch", "read"] * 3, "read"]
    assert visible == [[7], [-1], [-1], [-1]]
    order.clear()
    # a penalty wants to know the last token before the next is drawn
    penalised = SamplingParams(max_tokens=3, seed=0, repetition_penalty=1.2, ignore_eos=True)
    llm.generate([prompt], penalised, False)
    assert order == ["launch", "read"] * 3


def test_a_sequence_that_has_ended_is_in_one_step_more_and_its_token_is_dropped(llm):
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    (free,) = llm.generate(["Once upon a time"], params, False)
    steps = llm.stats()["steps"]
    stopped = SamplingParams(temperature=0, max_tokens=6, stop_token_ids=[free.token_ids[2]])
    (output,) = llm.generate(["Once upon a time"], stopped, False)
    assert output.token_ids == free.token_ids[:3] and output.finish_reason == "stop"
    assert llm.stats()["steps"] - steps == 3
    loop = llm.loop.inner_loop
    assert loop.in_flight  # the one by mistake
    llm.loop.drain()
    assert llm.stats()["steps"] - steps == 4 and loop.in_flight is None
    pool = llm.scheduler.blocks.pool
    assert pool.num_free == pool.num_usable


def test_placeholders_are_there_while_a_step_is_planned_and_only_where_a_token_is_due():
    seqs = going, over, written, last = sequence(3), sequence(4), sequence(5), sequence(6, 1)
    plan = step_of(*seqs)
    over.finish_reason = "stop"
    written.token_ids += [41, 42]  # by a tool
    with pytest.raises(KeyboardInterrupt), placeholders(plan):
        assert [seq.token_ids[-1] for seq in seqs] == [~0, 3, 42, 5]
        raise KeyboardInterrupt
    assert [len(seq.token_ids) for seq in seqs] == [3, 4, 7, 6]
    with placeholders(None):
        pass


def test_ids_of_the_last_step_are_taken_from_the_device():
    """The row says which; where nothing could be drawn any id does."""
    seqs = [sequence(3), sequence(4), sequence(2)]
    last = step_of(*seqs)
    blocks = make_blocks(8, 4)
    runner = AheadRunner(SimpleNamespace(device=torch.device("cpu")), None, blocks, Hooks())
    runner.last_token_ids = torch.tensor([70, -1, 72])
    with placeholders(last):
        plan = step_of(*seqs[:2])
        batch = make_batch(plan, blocks)
        there = runner.upload(batch)
    assert batch.token_ids.tolist() == [-1, -2]
    assert there.token_ids.tolist() == [70, 0] and there.token_ids.dtype == torch.int32
    uploaded = upload(batch, torch.device("cpu"))
    for name, array in batch._asdict().items():
        if isinstance(array, np.ndarray):
            assert np.array_equal(getattr(uploaded, name).numpy(), array), name
            assert name == "token_ids" or np.array_equal(getattr(there, name).numpy(), array), name
    seqs[0].token_ids += [~0, 5]
    with pytest.raises(AssertionError, match="after an unknown token"):
        runner.upload(make_batch(step_of(seqs[0]), blocks))


def test_blocks_are_copied_in_parts(monkeypatch):
    config = GPTConfig(64, 9, 3, 2, 1, 16)
    mine, theirs = (PagedKVCache(config, 9, 4, torch.float32, "cpu") for _ in range(2))
    mine.data.copy_(torch.randn(mine.data.shape)), theirs.data.copy_(mine.data)
    copies = [(1, 2), (3, 4), (2, 5), (6, 7), (7, 1)]  # in this order
    monkeypatch.setattr(attention, "COPY_BYTES", 1)  # one at a time
    mine.copy_blocks(copies), mine.copy_blocks([])
    for source, target in copies:
        theirs.data[:, :, target] = theirs.data[:, :, source]
    assert torch.equal(mine.data, theirs.data)
    monkeypatch.setattr(attention, "COPY_BYTES", 2**28)
    mine.copy_blocks([(1, 3), (2, 4)])
    for source, target in ((1, 3), (2, 4)):
        theirs.data[:, :, target] = theirs.data[:, :, source]
    assert torch.equal(mine.data, theirs.data)


def test_all_work_is_done_on_the_engines_own_device(monkeypatch):
    """And nowhere else is it the current one: a user may have other cards, and other engines."""
    current, seen = [], []

    @contextmanager
    def on_device(device):
        current.append(device)
        yield
        current.pop()

    def watched(owner, name: str):
        inner = getattr(owner, name)

        def call(*args, **kwargs):
            seen.append((name, bool(current)))
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    monkeypatch.setattr(resources, "on_device", on_device)
    watched(loading.ModelBuilder, "build")
    watched(LLM, "allocate")
    with LLM(MODEL, device="cpu", num_blocks=60) as llm:
        set_overlap(llm)
        watched(llm.runner, "launch")
        watched(llm.runner, "wait")
        watched(llm.model, "load_state_dict")
        llm.generate(["a"], SamplingParams(max_tokens=2, ignore_eos=True), False)
        for event in llm.stream(["b"], SamplingParams(max_tokens=2, ignore_eos=True)):
            assert not current and event
        llm.add_request("c", SamplingParams(max_tokens=2, ignore_eos=True))
        while not llm.is_finished():
            llm.step()
        llm.score(["d"], ["e f"])
        llm.update_weights(read_checkpoint(MODEL, find_step(MODEL, None))[2])
        llm.sleep()
        llm.wake()
    assert not current and all(there for _, there in seen)
    names = {"build", "allocate", "launch", "wait", "load_state_dict"}
    assert {name for name, _ in seen} == names


def test_a_card_is_the_current_one_only_while_it_is_needed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: f"on {device}")
    assert resources.on_device(torch.device("cuda", 1)) == "on cuda:1"
    assert isinstance(resources.on_device(torch.device("cpu")), nullcontext)


class TestAhead(EngineCases, RequestCases, FailureCases):
    """What holds for any engine."""

    build = staticmethod(partial(build, overlap=True))
    lag = 1
