"""What an engine counts, and the times of its samples."""

import time

import pytest
from helpers.full_engines import build, check, greedy, ids, sampled

pytestmark = pytest.mark.usefixtures("one_thread")

KEYS = (
    "requests aborted_requests prompt_tokens cached_tokens prefill_tokens steps peak_blocks "
    "prefill_seconds decode_seconds decode_steps output_tokens preemptions guessed_tokens "
    "accepted_tokens block_size num_blocks free_blocks running waiting cache_bytes"
).split()


@pytest.mark.parametrize("overlap", [False, True])
def test_tokens_steps_and_blocks_are_counted(overlap):
    with build(overlap=overlap, plain=True, num_blocks=101) as llm:
        assert sorted(llm.stats()) == sorted(KEYS)
        assert llm.stats()["num_blocks"] == llm.stats()["free_blocks"] == 100
        assert llm.stats()["cache_bytes"] == llm.cache.data.nbytes
        llm.generate([ids(40, 1), ids(40, 1), ids(9, 2)], greedy(5), use_tqdm=False)
        stats = llm.stats()
        assert (stats["requests"], stats["aborted_requests"]) == (3, 0)
        assert (stats["prompt_tokens"], stats["output_tokens"]) == (89, 15)
        # the equal prompt shares two full blocks
        assert stats["cached_tokens"] == 32 and stats["prefill_tokens"] == 89 - 32
        assert stats["steps"] == 5 and stats["decode_steps"] == pytest.approx(4)
        # 3 blocks for the first, 1 of its own for the second, 1 for the last
        assert stats["peak_blocks"] == 5 and stats["free_blocks"] == 100
        assert (stats["running"], stats["waiting"], stats["preemptions"]) == (0, 0, 0)
        assert stats["guessed_tokens"] == stats["accepted_tokens"] == 0


def test_the_seconds_of_steps_are_split_between_prefill_and_decode():
    with build(plain=True) as llm:
        began = time.perf_counter()
        llm.generate([ids(200)], greedy(1), use_tqdm=False)
        stats = llm.stats()
        assert 0 < stats["prefill_seconds"] < time.perf_counter() - began
        assert stats["decode_seconds"] == 0 and stats["decode_steps"] == 0
        time.sleep(0.2)  # between two steps: no step's time
        llm.generate([ids(200)], greedy(9), use_tqdm=False)
        after = llm.stats()
        seconds = after["prefill_seconds"] + after["decode_seconds"]
        assert after["decode_seconds"] > 0
        assert seconds - stats["prefill_seconds"] < time.perf_counter() - began - 0.2


def test_a_reset_begins_at_zero_and_keeps_what_is_so():
    with build(plain=True) as llm:
        llm.generate([ids(40)], greedy(5), use_tqdm=False)
        number = llm.add_request(ids(20, 2), greedy(5))
        llm.step()
        llm.reset_stats()
        stats = llm.stats()
        assert stats["running"] == 1
        for name in KEYS[:14]:
            assert stats[name] == 0, name
        llm.abort(number)
        assert [output.finish_reason for output in llm.step()] == ["abort"]
        assert (llm.stats()["requests"], llm.stats()["aborted_requests"]) == (1, 1)
        assert llm.stats()["prompt_tokens"] == 0


def test_preemptions_are_counted_and_make_no_hits():
    with build(plain=True, num_blocks=14, block_size=4) as llm:
        llm.generate([ids(8, n) for n in range(6)], greedy(20), use_tqdm=False)
        stats = llm.stats()
        assert stats["preemptions"] == llm.scheduler.num_preemptions > 0
        assert stats["output_tokens"] == 120 and stats["cached_tokens"] == 0
        assert stats["peak_blocks"] <= stats["num_blocks"] == 13


def test_guessed_and_accepted_tokens_are_those_of_the_drafts():
    with build(plain=True, prompt_lookup=4) as llm:
        llm.generate([[7, 8, 9] * 12], greedy(60), use_tqdm=False)
        stats = llm.stats()
        assert 0 < stats["accepted_tokens"] <= stats["guessed_tokens"]
        assert stats["steps"] <= 60 - stats["accepted_tokens"]
        assert stats["output_tokens"] == 60


def test_a_step_that_fails_leaves_the_counters_usable():
    with build(plain=True, overlap=True) as llm:
        number = llm.add_request(ids(30), greedy(6))
        llm.step()
        launch = llm.runner.launch
        llm.runner.launch = lambda plan: 1 / 0
        with pytest.raises(ZeroDivisionError):
            llm.step()
        llm.runner.launch = launch
        outputs = []
        while not llm.is_finished():
            outputs += llm.step()
            check(llm)
        assert [output.request_id for output in outputs] == [number]
        stats = llm.stats()
        assert (stats["requests"], stats["output_tokens"]) == (1, 6)
        assert stats["prefill_seconds"] > 0 and stats["decode_seconds"] > 0


def test_samples_are_measured_while_timing_lasts():
    with build(plain=True) as llm:
        early = llm.add_request(ids(5, 9), greedy(30))
        llm.step()
        with llm.timing() as times:
            began = time.perf_counter()
            llm.generate([ids(5), ids(6)], [sampled(4, seed=1, n=2), greedy(7)], use_tqdm=False)
            ended = time.perf_counter()
            assert sorted(sample.num_tokens for sample in times) == [4, 4, 7]
            for sample in times:
                assert began < sample.queued < sample.first < sample.last < ended
            number = llm.add_request(ids(4), greedy(50))
            llm.step()
            llm.step()
            llm.abort(number)
            assert times[-1].num_tokens == 2 and len(times) == 4
            llm.generate([ids(4)], greedy(1), use_tqdm=False)
            assert times[-1].num_tokens == 1 and times[-1].first == times[-1].last
        llm.generate([ids(5)], greedy(3), use_tqdm=False)
        llm.abort(early)
        assert len(times) == 5


def test_samples_that_end_at_different_steps_have_their_own_last_times():
    with build(plain=True) as llm:
        (whole,) = llm.generate([ids(5)], sampled(40, seed=3, n=3), use_tqdm=False)
        tokens = [sample["token_ids"] for sample in whole["samples"]]
        ends = tokens[0][5]
        params = sampled(40, seed=3, n=3, stop_token_ids=[ends])
        with llm.timing() as times:
            (output,) = llm.generate([ids(5)], params, use_tqdm=False)
        lengths = [len(sample["token_ids"]) for sample in output["samples"]]
        assert min(lengths) <= 6 and len(set(lengths)) > 1
        assert sorted(sample.num_tokens for sample in times) == sorted(lengths)
        by_length = sorted(times, key=lambda sample: sample.num_tokens)
        assert by_length[0].last < by_length[-1].last


def test_a_closed_engine_still_says_what_it_did():
    llm = build(plain=True)
    llm.generate([ids(5)], greedy(3), use_tqdm=False)
    llm.close()
    stats = llm.stats()
    assert stats["output_tokens"] == 3 and stats["running"] == stats["waiting"] == 0
    assert stats["cache_bytes"] == 0
