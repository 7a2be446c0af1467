"""The soak itself: some of its stories, and proof that it finds what is wrong."""

import json
import subprocess
import sys

import pytest
from helpers.goldens import ROOT

from benchmarks import soak
from microvllm import attention

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def test_some_stories_end_well_and_meet_what_there_is_to_meet():
    met = soak.soak(seed=1, seconds=300, first=3, cases=6)  # of these numbers, since they do
    assert "failure" not in met
    wanted = "requests tokens preemptions cached_tokens faults streams ahead plain forced_tokens"
    wanted += " guessed_tokens accepted_tokens"
    assert all(met[name.replace("forced_", "forced ")] for name in wanted.split()), met


def test_a_wrong_token_is_found_and_its_story_cut_down(monkeypatch):
    real = attention.uniform_numbers

    def wrong(seeds, samples, positions):  # two rows of a large batch have each other's numbers
        values = real(seeds, samples, positions)
        if len(values) > 2:
            values[[0, 1]] = values[[1, 0]]
        return values

    monkeypatch.setattr(attention, "uniform_numbers", wrong)
    said = []
    found = soak.soak(seed=3, seconds=60, shrink=5, say=said.append)
    failure = found["failure"]
    whole = soak.make_story(f"3:{failure['case']}")["events"]
    assert len(failure["story"]["events"]) < len(whole)
    assert f"--seed 3 --case {failure['case']}" in said[-1]
    monkeypatch.undo()
    soak.run_story(failure["story"], {}, soak.Counter())  # it was nothing but that


def test_a_story_is_told_again_from_its_number():
    script = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--seed", "1", "--case", "2"]
    lines = subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines()
    found = json.loads(lines[-1])
    assert found["cases"] == 1 and found["seed"] == 1 and "failure" not in found
    assert found["requests"] == soak.soak(seed=1, seconds=60, first=2, cases=1)["requests"]
