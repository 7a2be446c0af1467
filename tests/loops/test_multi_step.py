"""Several steps in one compiled call: the tokens, states and traces of single steps."""

import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers.cpu_kernels import KINDS, has_tiles
from helpers.engines import check, ids
from helpers.full_engines import assert_idle, build, greedy, sampled
from helpers.goldens import FIXTURES
from helpers.strikes import ALL, Strike, release_lock
from helpers.traces import compare

from microvllm import LLM
from microvllm.checkpoint import load_model
from microvllm.cpu import team
from microvllm.loops import multi_step
from microvllm.scheduler import DraftProposer
from microvllm.trace import Replay

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]  # for its kernels
NAME = "era5"  # smears, mixes, gates and has windows
STORES = [*KINDS, "int6", "int5", "int4"] if ALL else KINDS[:1]  # each compiles for half a minute


@pytest.fixture
def calls(monkeypatch):
    """(sequences, steps allowed, steps done) of each call; steps seem to take no time."""
    found, real = [], multi_step.compute_steps

    def compute_steps(model, plan, cache, blocks, num_steps):
        token_ids = real(model, plan, cache, blocks, num_steps)
        found.append((len(plan.draws), num_steps, len(token_ids)))
        return token_ids

    monkeypatch.setattr(multi_step, "compute_steps", compute_steps)
    monkeypatch.setattr(multi_step, "SECONDS", 1.0)
    monkeypatch.setattr(multi_step, "STREAM_SECONDS", 0.9)
    return found


# greedy, filters, a fork, one that ends early, lengths that differ
WORK = [
    (ids(18, 1), greedy(25)), (ids(9, 2), sampled(40, seed=4, top_k=20, top_p=0.9)),
    (ids(30, 3), sampled(17, seed=5, n=3)), (ids(1, 4), sampled(33, seed=6, min_p=0.05)),
]  # fmt: skip


def plain(outputs) -> list:
    return [[(s["token_ids"], s["finish_reason"]) for s in o["samples"]] for o in outputs]


def one_by_one(llm, work) -> list:
    """The outputs of step(), which takes single steps."""
    numbers, found = [llm.add_request(*request) for request in work], {}
    while not llm.is_finished():
        found |= {o["request_id"]: o for o in llm.step()}
    return [found[i] for i in numbers]


def at_once(llm, work) -> list:
    return llm.generate([p for p, _ in work], [q for _, q in work], use_tqdm=False)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["era1_unpadded", "era3", "era5"])
def test_the_tokens_are_those_of_single_steps(name, threads, store, calls):
    torch.set_num_threads(threads)
    options = {"dtype": store} if store == "bfloat16" else {"quantization": store}
    try:
        with build(name, **options, num_blocks=400, block_size=4) as llm:
            if not llm.model.compiled:
                pytest.skip("its weight tiles are not whole")
            work = WORK * 3  # enough rows for a job of several parts
            want = plain(one_by_one(llm, work))
            assert not calls
            llm.scheduler.reset()
            steps, tokens = llm.stats()["steps"], sum(len(t) for r in want for t, _ in r)
            assert plain(at_once(llm, work)) == want
            assert plain(at_once(llm, work[-1:])) == want[-1:]
            assert max(rows for rows, _, _ in calls) >= 16
            assert sum(rows * done for rows, _, done in calls) > tokens // 2
            assert llm.stats()["steps"] > steps + 40, "each step is counted"
            assert_idle(llm)
    finally:
        torch.set_num_threads(1)


@has_tiles
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("rows", [3, 20])  # the leader norms all of few rows, or its share
@pytest.mark.parametrize("name", ["era1_unpadded", "era3", "era5"])
def test_the_logits_are_those_of_single_steps_bit_for_bit(name, rows, store, calls, monkeypatch):
    options = {"dtype": store} if store == "bfloat16" else {"quantization": store}
    with build(name, **options, num_blocks=400, deterministic=rows < 8) as llm:
        work, found = [(ids(9 + i, i), greedy(20)) for i in range(rows)], []
        logits = llm.model.logits
        monkeypatch.setattr(llm.model, "logits", lambda h: found.append(logits(h)) or found[-1])
        one_by_one(llm, work)
        want, run = found[-1], llm.model.compiled.run

        def seen(batch, cache, hidden, logits, *draws):
            done = run(batch, cache, hidden, logits, *draws)
            found.append(logits)
            return done

        monkeypatch.setattr(llm.model.compiled, "run", seen)
        llm.scheduler.reset()
        at_once(llm, work)
        assert calls[-1][0] == rows and isinstance(found[-1], np.ndarray)
        assert torch.equal(torch.from_numpy(found[-1][:, : want.shape[1]]), want)


@has_tiles
def test_a_worker_that_comes_late_leaves_the_work_to_the_others(calls, monkeypatch):
    """The workers of this team have not started at all: the leader does what there is."""
    late = team._new_team(3)
    with build(NAME, num_blocks=60) as llm:
        want = plain(one_by_one(llm, WORK[:2]))
        llm.scheduler.reset()
        monkeypatch.setattr("microvllm.cpu.backend.team_of", lambda scratch: late.array)
        assert plain(at_once(llm, WORK[:2])) == want and calls


@has_tiles
def test_texts_end_at_their_stop_tokens(calls):
    with build(NAME, num_blocks=60) as llm:
        prompt, params = WORK[1]
        (whole,) = one_by_one(llm, [(prompt, params)])
        tokens = whole["token_ids"]
        ends = replace(params, stop_token_ids=(tokens[20], tokens[30]))
        want = plain(one_by_one(llm, [(prompt, ends), WORK[0]]))
        assert want[0][0][1] == "stop" and len(want[0][0][0]) <= 21
        llm.scheduler.reset()
        assert plain(at_once(llm, [(prompt, ends), WORK[0]])) == want
        assert calls[0][2] < calls[0][1], "the call goes on until a row ends, and no further"
        assert_idle(llm)


@has_tiles
def test_blocks_are_granted_ahead_and_taken_back(calls):
    """In a pool that is small, and with windows: no sequence is preempted for a step that may not
    come, and what was granted for steps that did not come is free again."""
    with build(NAME, num_blocks=21, block_size=4) as llm:
        work = [(ids(9, i), sampled(14 + i, seed=i)) for i in range(4)]
        want = plain(one_by_one(llm, work))
        llm.scheduler.reset()
        before = llm.scheduler.num_preemptions
        assert plain(at_once(llm, work)) == want and calls
        assert llm.scheduler.num_preemptions - before < 4
        tokens = want[1][0][0]
        ends = replace(work[1][1], stop_token_ids=(tokens[9],))
        llm.scheduler.reset()
        for _ in llm.stream([work[0][0], work[1][0]], [work[0][1], ends]):
            check(llm)
            for seq in llm.scheduler.running:
                assert len(seq.block_table) <= llm.scheduler.blocks.blocks_for(len(seq.token_ids))
        assert_idle(llm)


@has_tiles
def test_a_trace_shows_each_step(calls):
    def events(generate) -> list:
        llm.scheduler.reset()
        with llm.tracing() as trace:
            generate(llm, work)
            replay = Replay(trace.events)
            compare(replay, llm.scheduler)
        return trace.events

    with build(NAME, num_blocks=60, block_size=4) as llm:
        prompt, params = WORK[1]
        (whole,) = one_by_one(llm, [WORK[1]])  # that text now ends before what was foreseen
        work = [WORK[0], (prompt, replace(params, stop_token_ids=(whole["token_ids"][12],)))]
        single, several_ = events(one_by_one), events(at_once)
        kinds = "begin", "tokens", "publish", "finish"
        timeless = [
            [{**e, "t": 0, "block": 0} for e in found if e["e"] in kinds]
            for found in (single, several_)
        ]
        assert timeless[0] == timeless[1] and len(calls) < len(timeless[0]) / 4
        order = [e["e"] for e in several_ if e["e"] in ("begin", "reject", "end")]
        pairs = [*zip(order, order[1:], strict=False)]
        assert ("begin", "reject") in pairs and ("end", "reject") not in pairs
        ends = [e["ms"] for e in several_ if e["e"] == "end"]
        assert all({"schedule", "batch", "forward", "sample", "update"} <= ms.keys() for ms in ends)


@has_tiles
def test_a_feature_that_sees_each_token_gets_single_steps(calls):
    prompt = ids(9, 2)
    with build(NAME, num_blocks=60) as llm:
        for params in (
            greedy(9, stop=("no such text",)), greedy(9, logprobs=1), greedy(9, min_tokens=2),
            greedy(9, repetition_penalty=1.1), greedy(9, logits_processor=lambda _, x: x),
        ):  # fmt: skip
            llm.generate([prompt], params, use_tqdm=False)
        llm.generate([prompt], greedy(9), use_tqdm=False, tools=True)
        one_by_one(llm, [(prompt, greedy(9))])
        llm.add_request(prompt, greedy(30))  # whose owner may call step()
        llm.generate([prompt], greedy(9), use_tqdm=False)
        assert not calls
        llm.abort(*llm.requests)
        llm.generate([prompt], greedy(9), use_tqdm=False)
        assert calls
    calls.clear()
    for options in {"prompt_lookup": 4}, {"attention": "sdpa"}, {"overlap": True}:
        with build(NAME, num_blocks=60, **options) as llm:
            llm.generate([prompt], greedy(9), use_tqdm=False)
    assert not calls


@has_tiles
def test_streams_aborts_and_new_requests_wait_for_one_call(calls, monkeypatch):
    with build(NAME, num_blocks=200) as llm:
        want = plain(one_by_one(llm, WORK[:2]))
        llm.scheduler.reset()
        monkeypatch.setattr(llm.runner, "choose_num_steps", lambda seqs: 4)
        pieces, late = [], None
        for event in llm.stream([WORK[0][0]], WORK[0][1]):
            pieces.append(event["token_ids"])
            assert llm.runner.seconds == (0 if late else multi_step.STREAM_SECONDS)
            if len(pieces) == 3:
                late = llm.add_request(*WORK[1])
        assert sum(pieces, []) == want[0][0][0] and max(map(len, pieces)) <= 5
        outputs = []
        while not llm.is_finished():
            outputs += llm.step()
        assert plain(outputs) == want[1:] and outputs[0]["request_id"] == late
        stream = llm.stream([WORK[0][0]], WORK[0][1])
        next(stream), next(stream)
        stream.close()
        at_once(llm, WORK[:1])
        assert llm.runner.seconds == multi_step.SECONDS
        assert_idle(llm)


@has_tiles
def test_new_weights_are_used_at_once(calls):
    with build(NAME, num_blocks=60) as llm:
        weights = FIXTURES[NAME]
        state = load_model(weights.directory).state_dict()
        old = plain(at_once(llm, WORK[:2]))
        llm.update_weights({name: w * 1.1 for name, w in state.items()})
        new = plain(at_once(llm, WORK[:2]))
        llm.scheduler.reset()
        assert old != new == plain(one_by_one(llm, WORK[:2])) and calls


class Quiet(DraftProposer):
    """Proposes nothing, and says for how many steps."""

    max_rows = 8

    def __init__(self, num_steps: int):
        self.num_steps = num_steps

    def num_quiet_steps(self) -> int:
        return self.num_steps

    def propose(self, seq, max_tokens):
        return []


@has_tiles
def test_steps_are_computed_ahead_while_no_tokens_are_drafted(calls):
    with build(NAME, num_blocks=60) as llm:
        want = plain(one_by_one(llm, WORK))
        llm.scheduler.proposer = Quiet(0)
        assert plain(at_once(llm, WORK)) == want and not calls
        llm.scheduler.proposer = Quiet(5)
        assert plain(at_once(llm, WORK)) == want
        assert {most for _, most, _ in calls} <= {2, 3, 4, 5} and len(calls) > 3


@has_tiles
def test_a_live_module_has_several_steps_in_one_call(calls):
    """A change is seen before the next call. Weights of other strides are multiplied by torch."""
    fixture = FIXTURES[NAME]
    gpt = load_model(fixture.directory)
    options = {"tokenizer_path": fixture.tokenizer, "device": "cpu", "num_blocks": 60}
    with LLM(model=gpt, **options) as llm:
        assert llm.live.snapshot and llm.model.compiled
        old = plain(one_by_one(llm, WORK))
        assert not calls
        assert plain(at_once(llm, WORK)) == old and calls
        with torch.no_grad():
            for p in gpt.parameters():
                p.mul_(1.1)
        calls.clear()
        new = plain(at_once(llm, WORK))
        assert new != old and calls
        assert plain(one_by_one(llm, WORK)) == new
        calls.clear()
        for p in gpt.parameters():
            if p.ndim == 2:
                p.data = p.data.T.contiguous().T
        assert plain(at_once(llm, WORK)) == new
        assert llm.model.compiled is None and not calls
        for p in gpt.parameters():
            p.data = p.data.contiguous()
        assert plain(at_once(llm, WORK)) == new and calls


@has_tiles
def test_an_exception_at_any_line_changes_no_token(calls):
    """Of a turn of several steps, or, with a fork and a text that ends first, of several turns."""
    with build(NAME, num_blocks=14, block_size=4) as llm:
        work = [(ids(6, 1), greedy(8)), (ids(5, 9), sampled(7, seed=2, n=2))]

        def run(strike=None):
            """All of it, over and over until nothing is struck."""
            llm.scheduler.reset()
            requests = [llm.make_requests([p], q)[0] for p, q in work]
            llm.submit_requests(requests)
            while not all(request.output for request in requests):
                request = next(r for r in requests if not r.output)
                step = partial(llm.guard.perform, partial(llm.serve_now, request))
                strike(step) if strike else step()
                check(llm)
            assert_idle(llm)
            release_lock(llm)
            return plain([request.output for request in requests])

        want, found, every = run(), Strike(), Strike(opcodes=True)
        assert run(found) == run(every) == want and calls
        own = [line for line in found.lines if line[0] in ("loops/multi_step.py",)]
        assert len(own) > 50
        others = [line for line in found.lines if line not in own]
        for line in own[:: 1 if ALL else 6] + others[:: 1 if ALL else 60]:
            struck = Strike(line)
            assert run(struck) == want and struck.struck, line
        numbers = random.Random(5).sample(range(1, every.count), 400 if ALL else 5)
        for number in numbers:
            struck = Strike(number, opcodes=True)
            assert run(struck) == want and struck.struck, number


@has_tiles
def test_more_samples_than_tokens_of_a_prompt():
    """Several rows of the head are one row of the step."""
    with build(NAME, num_blocks=60) as llm:
        prompt = ids(2, 1)
        params = [sampled(6, seed=i) for i in range(5)]
        want = [llm.generate([prompt], p)[0]["token_ids"] for p in params]
        several = replace(sampled(6, seed=3), n=5)
        found = [s["token_ids"] for s in llm.generate([prompt], several)[0]["samples"]]
        assert found[0] == want[3] and len({*map(tuple, found)}) > 1
        alone = [replace(several, n=1, sample_index=i) for i in range(5)]
        assert found == [llm.generate([prompt], p)[0]["token_ids"] for p in alone]
