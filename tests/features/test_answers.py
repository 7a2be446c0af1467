"""Answer lookup: earlier answers to the same prompt make steps fewer and change nothing else."""

import random
import re
import threading
from contextlib import contextmanager

import pytest
from helpers.checkpoints import state_dict
from helpers.engine_cases import run_work
from helpers.engines import check, ids, serve
from helpers.failures import PLACES
from helpers.full_engines import assert_idle, build, greedy, sampled
from helpers.goldens import MODEL
from helpers.naive import assert_naive
from helpers.speculation import AGAIN, TEXTS, WAYS, shorn

from microvllm import LLM, SamplingParams
from microvllm.features.answers import (
    ANSWERS_OF_PROMPT,
    AnswerTable,
    EarlierAnswers,
)
from microvllm.features.lookup import NgramTable

pytestmark = pytest.mark.usefixtures("one_thread")

# nothing in them repeats itself, so that only earlier answers can be right
ONCE = [(ids(9, 8), greedy(24)), (ids(11, 9), sampled(24, seed=5))]


# the draft tokens themselves ----------------------------------------------------------------------


def propose(output: list[int], *answers: list[int], limit: int = 4, most: int = 9) -> list[int]:
    prompt = [100, 101]
    return AnswerTable(limit, {0}, len(prompt), answers).propose(prompt + output, most)


def test_a_text_that_began_as_an_answer_did_is_expected_to_continue_as_it_did():
    assert propose([], [1, 2, 3, 4, 5]) == [1, 2, 3, 4]
    assert propose([1, 2], [1, 2, 3, 4, 5]) == [3, 4, 5]
    assert propose([1], [1, 2, 3], [1, 4, 5], [6, 7]) == [4, 5]  # the latest
    assert propose([1, 2], [1, 2, 3], [1, 4, 5]) == [3]
    assert propose([1], [1, 2, 3], most=1) == [2]


def test_no_end_is_proposed_and_nothing_behind_the_answers():
    assert propose([1], [1, 2, 0, 3]) == [2]
    assert propose([1], [1, 0]) == []
    assert propose([1, 2], [1, 2]) == []


def test_a_text_that_has_parted_from_the_answers_continues_as_words_in_them_did():
    assert propose([9, 2, 3], [1, 2, 3, 4, 5, 6, 7]) == [4, 5, 6, 7]
    assert propose([9, 2, 3], [1, 2, 3, 4], [5, 2, 3, 8, 7, 6]) == [8, 7, 6]
    assert propose([2, 3, 5, 2, 3], [1, 2, 3, 4, 4, 4]) == [5, 2, 3, 5]  # the text itself is later
    assert propose([7], [1, 2, 3]) == []


def test_proposals_are_those_of_a_new_table_for_the_same_text():
    rng = random.Random(3)
    answers = [rng.choices(range(1, 5), k=30) for _ in range(3)]
    table = AnswerTable(4, {0}, 2, answers)
    text = [100, 101]
    for token_id in answers[1][:12] + rng.choices(range(1, 5), k=30):
        text.append(token_id)
        table.num_next = 4
        assert table.propose(text, 9) == AnswerTable(4, {0}, 2, answers).propose(text, 9)


def test_a_shorter_text_after_an_error_is_compared_anew():
    answers = [[1, 2, 3, 4, 5]]
    table = AnswerTable(4, {0}, 2, answers)
    assert table.propose([100, 101, 1, 9], 9) == NgramTable(4).propose([1, 2, 3, 4, 5, 1, 9], 9)
    assert table.propose([100, 101, 1], 9) == [2, 3, 4, 5]


# which answers are kept ---------------------------------------------------------------------------


def test_the_latest_answers_to_each_prompt_are_kept():
    earlier = EarlierAnswers()
    for number in range(ANSWERS_OF_PROMPT + 3):
        earlier.add([1, 2], [number, number])
        earlier.add([1], [2, number])
    answers = earlier.get([1, 2])
    assert answers == [[n, n] for n in range(3, ANSWERS_OF_PROMPT + 3)]
    assert earlier.get([1])[-1] == [2, ANSWERS_OF_PROMPT + 2] and earlier.get([3]) == []
    earlier.add([1, 2], [5, 5])  # it is the latest now
    assert earlier.get([1, 2]) == [answer for answer in answers if answer != [5, 5]] + [[5, 5]]


def test_memory_is_bounded_and_the_prompts_longest_unused_are_dropped():
    earlier = EarlierAnswers(max_tokens=100)
    for number in range(50):
        earlier.add([number] * 5, [1] * 10)
        earlier.get([48] * 5)
        assert earlier.num_tokens <= 100
        kept = sum(5 + sum(map(len, answers)) for answers in earlier.by_prompt.values())
        assert earlier.num_tokens == kept
    assert earlier.get([49] * 5) and earlier.get([48] * 5) and not earlier.get([0] * 5)
    earlier.add([7], [1] * 1000)  # too long for all
    assert earlier.num_tokens == 0 and not earlier.by_prompt


# the same output ----------------------------------------------------------------------------------


@contextmanager
def answering(name: str = "era5", **options):
    """An engine that proposes from earlier answers, and was right in the end."""
    with build(name, **{"answer_lookup": 5} | options) as llm:
        yield llm
        assert llm.stats()["accepted_tokens"] > 0


def test_the_second_time_takes_fewer_steps_and_gives_the_same():
    with answering() as llm:
        steps = []
        for _ in range(3):
            before = llm.stats()["steps"]
            assert_naive(serve(llm, ONCE), ONCE)
            steps.append(llm.stats()["steps"] - before)
        assert steps[0] > 20 and steps[1] < 12 and steps[2] <= steps[1]


def test_new_weights_keep_the_answers_and_change_the_tokens():
    weights = state_dict("era5")
    changed = weights | {"lm_head.weight": weights["lm_head.weight"].roll(1, 0)}
    with answering() as llm, build() as plain:
        for each in (weights, changed, weights):
            for engine in (llm, plain):
                engine.update_weights(each)
            found = [[o["token_ids"] for o in serve(engine, ONCE)] for engine in (llm, plain)]
            assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_token_for_token_and_log_probability_for_log_probability(way):
    params = SamplingParams(
        **{"max_tokens": 48, "ignore_eos": True, "seed": 3, "logprobs": 2} | WAYS[way]
    )
    options = {"device": "cpu", "num_blocks": 100, "deterministic": True, "max_model_len": 400}
    with LLM(MODEL, **options) as plain, LLM(MODEL, **options, answer_lookup=6) as llm:
        expected = shorn(plain.generate(TEXTS, params, use_tqdm=False))
        for _ in range(3):
            assert shorn(llm.generate(TEXTS, params, use_tqdm=False)) == expected
        assert_idle(llm)
        stats = llm.stats()
        if way in ("processor", "max_tokens 1"):
            assert stats["guessed_tokens"] == 0
        elif "max_tokens" not in WAYS[way] and "stop" not in WAYS[way]:
            assert stats["accepted_tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("block_size", "num_blocks"), [(1, 60), (4, 16), (16, 5)])
def test_pools_so_small_that_sequences_are_preempted(block_size, num_blocks):
    work = [*AGAIN, (ids(5, 3) * 4, greedy(30)), (ids(4, 4) * 5, sampled(20, seed=2, n=2))]
    with answering(block_size=block_size, num_blocks=num_blocks) as llm:
        for _ in range(3):
            assert_naive(serve(llm, work), work)
        assert llm.stats()["preemptions"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_step_fails_all_get_the_right_tokens(place):
    options = {"block_size": 4, "num_blocks": 22, "max_batched_tokens": 16, "answer_lookup": 5}
    with build(**options) as llm:
        run_work(llm, place, None)
        count, _ = run_work(llm, place, None)
        assert llm.stats()["guessed_tokens"] > 0
        for at in {0, count // 2, count - 1}:
            run_work(llm, place, at, MemoryError() if at else None)
            check(llm)


def test_threads_share_the_answers():
    with answering() as llm:
        outputs = {}

        def work(number: int) -> None:
            for turn in range(2):
                outputs[number, turn] = llm.generate(*map(list, zip(*ONCE, strict=True)), False)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for found in outputs.values():
            assert_naive(found, ONCE)
        assert len(outputs) == 6


def test_aborted_answers_are_not_kept():
    with build(answer_lookup=5) as llm:
        request_id = llm.add_request(*ONCE[0])
        for _ in range(5):
            llm.step()
        llm.abort(request_id)
        llm.step()
        earlier = llm.scheduler.proposer.earlier
        assert not earlier.by_prompt
        serve(llm, ONCE[:1])
        assert len(earlier.get(ONCE[0][0])) == 1


# refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"answer_lookup": -1}, ValueError, "answer_lookup must be between 0 and"),
        ({"answer_lookup": True}, TypeError, "answer_lookup must be an integer, got True"),
        (
            {"answer_lookup": 3, "prompt_lookup": 3},
            ValueError,
            "prompt_lookup and answer_lookup cannot be combined: give one source of draft tokens",
        ),
    ],
)
def test_it_is_a_number_of_tokens(options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        build(**options)
