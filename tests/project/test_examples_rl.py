"""The examples for RL and research: each shows what it says."""

import random
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers.goldens import MODEL, ROOT

from examples import gpt, probe, rl
from microvllm import LLM

pytestmark = pytest.mark.usefixtures("one_thread")
serve = partial(LLM, tokenizer_path=MODEL.parent / "tokenizer", device="cpu", plain=True)


# probe --------------------------------------------------------------------------------------------


def test_a_probe_finds_what_is_there_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(600, 20, generator=generator)
    direction = torch.randn(20, generator=generator)
    is_there = states @ direction > 0.5
    assert probe.held_out_accuracy(states, is_there) > 0.9
    assert 0.5 < probe.majority_accuracy(is_there) < 0.7
    is_unrelated = torch.rand(600, generator=generator) > 0.5
    assert probe.held_out_accuracy(states, is_unrelated) < 0.65


def test_the_states_are_those_of_the_last_token_of_each_question():
    with serve(MODEL) as llm:
        states = probe.read_states(llm, [(2, 3), (12, 7)])
        question = [{"role": "user", "content": "What is 12+7?"}]
        expected = llm.embed([llm.tokenizer.render_for_completion(question)], "last", layer=4)
    assert states.shape == (2, 6, 256)
    torch.testing.assert_close(states[1:, 4], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_sum_can_be_read_and_its_parity_cannot(capsys):
    probe.main()
    printed = capsys.readouterr().out
    (large,) = re.findall(r"a\+b > 30 (.*)", printed)
    (odd,) = re.findall(r"a\+b is odd (.*)", printed)
    *large, majority = [float(x[:-1]) for x in large.split()]
    assert len(large) == 6 and min(large) > 85 and majority < 60
    *odd, majority = [float(x[:-1]) for x in odd.split()]
    assert max(odd) < 65 and majority < 60


# rl -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 1])
def test_samples_are_of_few_versions_and_the_report_sees_the_change(lag, capsys):
    module = gpt.load(MODEL)
    with serve(model=module) as llm:
        reports = rl.train(module, llm, 3, lag)
    assert reports[0].largest < 1e-3 < reports[1].largest
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for step, line in enumerate(lines):
        oldest, newest = re.search(r"versions (\d+) to (\d+);", line).groups()
        assert int(newest) == step and int(oldest) <= step
        assert "|delta logp| mean" in line


def test_samples_that_fell_behind_are_left_out_and_groups_have_their_own_mean():
    pairs: dict = {}
    with serve(MODEL) as llm:
        rows = rl.collect(llm, random.Random(1), pairs, lag=0)
        assert 0 < len(pairs) < rl.IN_FLIGHT
        assert {*rows[0].versions, *rows[-1].versions} == {0}
        assert sum(row.advantage for row in rows) == pytest.approx(0, abs=1e-6)
        for row in rows:
            assert len(row.ids) == len(row.mask) == len(row.logprobs)
            drawn = [logprob for logprob, mask in zip(row.logprobs, row.mask, strict=True) if mask]
            assert max(drawn) <= 0 and not any(row.logprobs[: row.mask.index(1)])
        llm.update_weights(gpt.load(MODEL).state_dict())
        rows = rl.collect(llm, random.Random(2), pairs, lag=0)
        # those of version 0 had ended before, and each sample is of one version
        assert {frozenset(row.versions) for row in rows} == {frozenset({0}), frozenset({1})}


# two processes ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_wrong_transfer_is_rejected_and_sent_again():
    command = [sys.executable, ROOT / "examples" / "two_processes.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "version 1",
        "version 2 is rejected, version 1 stays",
        "version 2",
        "version 3",
        "version 4",
    ]
    assert "different: resid_lambdas" in lines[1]
    logprobs = [float(x) for x in re.findall(r"log-probability (\S+)", done.stdout)]
    assert logprobs == sorted(logprobs) and logprobs[-1] > -0.5
