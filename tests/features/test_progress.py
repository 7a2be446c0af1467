"""The progress bar of `generate`."""

import re
import warnings

import pytest
from helpers.full_engines import build, greedy, ids, sampled

from microvllm.features import progress

pytestmark = pytest.mark.usefixtures("one_thread")


def test_progress_is_shown_on_a_terminal_only(capsys, monkeypatch):
    with build() as llm:
        llm.generate([ids(5)], greedy(2))
        assert capsys.readouterr().err == ""  # not a terminal
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        llm.generate([ids(5)], greedy(2), use_tqdm=False)
        assert capsys.readouterr().err == ""
        llm.generate([ids(5)], greedy(2))
        assert "tokens/s" in capsys.readouterr().err


@pytest.fixture
def shown(monkeypatch):
    """What each bar shows, and how far it is: (n, total, text) of each step."""
    found = []

    class Bar(progress.bar_class(False)):
        def refresh(self, *args, **kwargs):
            if self.postfix:  # else nothing was done yet
                found.append((self.n, self.total, str(self)))

    monkeypatch.setattr(progress, "bar_class", lambda is_notebook: Bar)
    monkeypatch.setattr(progress, "SECONDS", 0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    return found


def test_the_bar_counts_tokens_and_moves_in_every_step(shown):
    prompts = [ids(40, 1), ids(30, 2), ids(3, 3)]
    params = [greedy(4), sampled(6, seed=1, n=3), greedy(50, stop_token_ids=())]
    with build(plain=True, max_batched_tokens=32) as llm:
        outputs = llm.generate(prompts, params)
    places = [n for n, *_ in shown]
    total = 40 + 4 + 30 + 3 * 6 + 3 + 50
    assert {total for _, total, _ in shown} == {total}
    # the first step reads 32 tokens of the first prompt, and no request is finished
    assert places[0] == 32 and "0/3 prompts, 0 tokens, 0 tokens/s" in shown[0][2]
    assert len(places) > 50 and places == sorted(places) and places[-1] == total
    assert all(b > a for a, b in zip(places[:-2], places[1:-1], strict=True)), places
    new = sum(len(sample["token_ids"]) for output in outputs for sample in output["samples"])
    assert f"3/3 prompts, {new} tokens, " in shown[-1][2]
    told = [int(re.search(r"([\d,]+) tokens,", text)[1].replace(",", "")) for *_, text in shown]
    assert told == sorted(told) and told[-1] == new == 4 + 18 + 50


def test_a_sample_that_ends_early_makes_the_bar_jump(shown):
    with build(plain=True) as llm:
        (whole,) = llm.generate([ids(5)], greedy(9), use_tqdm=False)
        stop = [whole["token_ids"][2]]
        (output,) = llm.generate([ids(5)], greedy(300, stop_token_ids=stop))
    assert len(output["token_ids"]) <= 3
    assert shown[0][0] < 10 and shown[-1][:2] == (305, 305) and " 100%|" in shown[-1][2]


def test_the_bar_does_not_go_back_where_sequences_are_preempted(shown):
    with build(plain=True, num_blocks=14, block_size=4) as llm:
        llm.generate([ids(8, n) for n in range(6)], greedy(20))
        assert llm.scheduler.num_preemptions > 0
    places = [n for n, *_ in shown]
    assert places == sorted(places) and places[-1] == 6 * 28


def test_texts_that_are_scored_are_counted_as_they_are_read(shown):
    with build(plain=True, max_batched_tokens=16) as llm:
        llm.judge([ids(10), ids(20)], [ids(40), ids(30)], use_tqdm=True)
    assert shown[0][0] in (16, 17) and "0/2 prompts, " in shown[0][2]
    assert shown[-1][:2] == (100, 100)


def test_the_bar_of_a_notebook_comes_without_a_warning(monkeypatch):
    class Shell:
        config = {"IPKernelApp": {}}

    assert not progress.in_notebook()
    monkeypatch.setattr("builtins.get_ipython", Shell, raising=False)
    assert progress.in_notebook()
    Shell.config = {"TerminalIPythonApp": {}}
    assert not progress.in_notebook()
    progress.bar_class.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert issubclass(progress.bar_class(True), progress.bar_class(False))
