"""Branches: texts that are continued in several ways share their blocks."""

import pytest
from helpers.full_engines import (
    TOOL_GOLDENS,
    build,
    chain,
    everything_is_free,
    ids,
    sampled,
)
from helpers.traces import compare

from microvllm import LLM, SamplingParams
from microvllm.trace import Replay

pytestmark = pytest.mark.usefixtures("one_thread")

SLOW = pytest.mark.slow
PROMPT = ids(9, 1)
PARAMS = sampled(20, seed=3, logprobs=5)


def check(llm: LLM) -> None:
    """Paused sequences have blocks, too."""
    llm.scheduler.blocks.check([*llm.scheduler.running, *llm.scheduler.paused])


def assert_logprobs(llm: LLM, branches: list) -> None:
    """They are those that the model gives to the whole text at once."""
    prompts = [branch.prompt_token_ids for branch in branches]
    scores = llm.score(prompts, [branch.token_ids for branch in branches])
    for branch, logprobs in zip(branches, scores, strict=True):
        assert branch.logprobs == pytest.approx(logprobs, abs=1e-3)
        assert branch.logprob == pytest.approx(sum(logprobs), abs=1e-2)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("block_size", [4, *[pytest.param(n, marks=SLOW) for n in (1, 16)]])
def test_a_branch_that_stops_and_goes_on_has_the_tokens_of_a_request(overlap, block_size):
    with build(plain=True, overlap=overlap, block_size=block_size) as llm:
        (expected,) = llm.generate([PROMPT], PARAMS, use_tqdm=False)
        with llm.branching() as branches:
            root = branches.start(PROMPT, PARAMS)
            for num_tokens in (1, 5, 4, 100):
                branches.grow([root], num_tokens)
                check(llm)
                assert root.token_ids == expected["token_ids"][: len(root.token_ids)]
            assert root.token_ids == expected["token_ids"] and root.text == expected["text"]
            assert root.finish_reason == "length"
            assert_logprobs(llm, [root])
        assert everything_is_free(llm)


@pytest.mark.parametrize("overlap", [False, True])
def test_forks_continue_the_same_text_in_other_ways(overlap):
    with build(plain=True, overlap=overlap, block_size=4) as llm:
        with llm.branching() as branches:
            root = branches.start(PROMPT, PARAMS)
            branches.grow([root], 6)
            beginning = root.token_ids
            forks = branches.fork(root, 3)
            assert [fork.token_ids for fork in forks] == [beginning] * 3
            branches.grow(forks, 5)
            check(llm)
            assert [fork.token_ids[:6] for fork in forks] == [beginning] * 3
            assert len({tuple(fork.token_ids) for fork in forks}) == 3
            assert root.token_ids == beginning
            assert_logprobs(llm, [root, *forks])
            branches.grow([root, *forks], 2)
            assert [len(branch.token_ids) for branch in (root, *forks)] == [8, 13, 13, 13]
            assert_logprobs(llm, [root, *forks])
        assert everything_is_free(llm)


def test_blocks_are_shared_until_they_are_written():
    """era1 has no windows: a block a place of the table."""
    with build("era1_padded", plain=True, block_size=4) as llm:
        with llm.branching() as branches:
            root = branches.start(PROMPT, PARAMS)
            branches.grow([root], 6)  # 9 + 6 tokens; 14 are computed
            assert branches.num_blocks == 4
            forks = branches.fork(root, 3)
            assert branches.num_blocks == 4
            branches.grow(forks, 1)  # each writes token 15 into a block of its own
            assert branches.num_blocks == 4 + 3
            branches.drop(*forks[:2])
            assert branches.num_blocks == 4 + 1
            branches.drop(root)
            assert branches.num_blocks == 4
            check(llm)
            assert forks[0].finish_reason == "abort" and len(forks[0].token_ids) == 7
        assert branches.num_blocks == 0
        assert everything_is_free(llm)


@pytest.mark.parametrize("overlap", [False, pytest.param(True, marks=SLOW)])
def test_a_spread_has_the_most_likely_next_tokens(overlap):
    with build(plain=True, overlap=overlap, block_size=4) as llm:
        with llm.branching() as branches:
            root = branches.start(PROMPT, PARAMS)
            children = branches.spread([root], 5)
            vocabulary = range(llm.tokenizer.vocab_size)
            scores = llm.score([PROMPT] * len(vocabulary), [[i] for i in vocabulary])
            likely = sorted(vocabulary, key=lambda i: -scores[i][0])[:5]
            assert [child.token_ids for child in children] == [[i] for i in likely]
            grandchildren = branches.spread(children, 3)
            assert [c.token_ids[0] for c in grandchildren] == [i for i in likely for _ in range(3)]
            check(llm)
            branches.grow(grandchildren, 4)
            check(llm)
            assert_logprobs(llm, grandchildren)
        assert everything_is_free(llm)


def test_a_stop_token_among_the_next_tokens_ends_its_branch():
    with build(plain=True) as llm:
        with llm.branching() as branches:
            (first, second) = branches.spread([branches.start(PROMPT, PARAMS)], 2)
            params = SamplingParams(
                temperature=0, max_tokens=5, logprobs=2, stop_token_ids=second.token_ids
            )
            one, two = branches.spread([branches.start(PROMPT, params)], 2)
            assert (one.token_ids, one.finish_reason) == (first.token_ids, None)
            assert (two.token_ids, two.finish_reason) == (second.token_ids, "stop")
            assert branches.spread([two], 2) == [two]
            branches.grow([one, two], 10)
            assert len(one.token_ids) == 5 and two.token_ids == second.token_ids
        assert everything_is_free(llm)


def test_requests_run_beside_branches_and_take_their_blocks():
    """A pool for one text at a time: branches compute again what they have lost."""
    with build("era1_padded", plain=True, block_size=4, num_blocks=9) as llm:
        (expected,) = llm.generate([PROMPT], PARAMS, use_tqdm=False)
        with llm.branching() as branches:
            root = branches.start(PROMPT, PARAMS)
            branches.grow([root], 9)
            (fork,) = branches.fork(root)
            branches.grow([fork], 9)
            work = sampled(20, seed=8)
            (beside,) = llm.generate([ids(9, 2)], work, use_tqdm=False)
            check(llm)
            branches.grow([root, fork], 100)
            check(llm)
            assert root.token_ids == expected["token_ids"]
            assert_logprobs(llm, [root, fork])
        (alone,) = llm.generate([ids(9, 2)], work, use_tqdm=False)
        assert beside["token_ids"] == alone["token_ids"]
        assert everything_is_free(llm)


def test_more_branches_than_run_at_once():
    with build(plain=True, max_batch_size=2) as llm, llm.branching() as branches:
        root = branches.start(PROMPT, PARAMS)
        branches.grow([root])
        forks = branches.fork(root, 5)
        branches.grow(forks, 3)
        assert [len(fork.token_ids) for fork in forks] == [4] * 5
        assert_logprobs(llm, forks)


@pytest.mark.parametrize("overlap", [pytest.param(False, marks=SLOW), True])
def test_branches_outlive_an_error_and_new_weights(overlap):
    with build(plain=True, overlap=overlap, block_size=4) as llm:
        (expected,) = llm.generate([PROMPT], PARAMS, use_tqdm=False)
        with llm.branching() as branches:
            root = branches.start(PROMPT, PARAMS)
            branches.grow([root], 6)
            forks = branches.fork(root, 2)
            llm.guard.perform(llm.recover)
            check(llm)
            assert len(llm.scheduler.paused) == 3 and not llm.scheduler.running
            branches.grow([root, *forks], 3)
            llm.reset_prefix_cache()
            branches.grow([root, *forks], 100)
            assert root.token_ids == expected["token_ids"]
            assert_logprobs(llm, [root, *forks])
        assert everything_is_free(llm)


# finished and running requests --------------------------------------------------------------------


def test_a_finished_request_is_continued():
    with build(plain=True) as llm:
        (whole,) = llm.generate([PROMPT], PARAMS, use_tqdm=False)
        short = sampled(8, seed=3, n=2)
        (output,) = llm.generate([PROMPT], short, use_tqdm=False)
        with llm.branching() as branches:
            root = branches.resume(output, PARAMS)
            assert root.token_ids == whole["token_ids"][:8]
            assert_logprobs(llm, [root])
            forks = branches.fork(root, 2)
            branches.grow([root, *forks], 100)
            check(llm)
            assert root.token_ids == whole["token_ids"] and root.text == whole["text"]
            assert [fork.token_ids[:8] for fork in forks] == [root.token_ids[:8]] * 2
            assert_logprobs(llm, [root, *forks])
            other = branches.resume(output, PARAMS, sample=1)
            assert other.token_ids == output["samples"][1]["token_ids"]
            with pytest.raises(ValueError, match="max_tokens=8, and the output has 8 tokens"):
                branches.resume(output, sampled(8, seed=3))
        assert everything_is_free(llm)


@pytest.mark.parametrize("overlap", [pytest.param(False, marks=SLOW), True])
def test_a_running_request_is_forked_and_runs_on(overlap):
    with build(plain=True, overlap=overlap, block_size=4) as llm:
        (expected,) = llm.generate([PROMPT], PARAMS, use_tqdm=False)
        number = llm.add_request(PROMPT, sampled(20, seed=3))
        with llm.branching() as branches:
            with pytest.raises(ValueError, match="has no token yet"):
                branches.fork_request(number)
        for _ in range(7):
            llm.step()
        with llm.branching() as branches:
            forks = branches.fork_request(number, 2)
            check(llm)
            beginning = forks[0].token_ids
            assert 4 < len(beginning) < 10 and beginning == forks[1].token_ids
            assert beginning == expected["token_ids"][: len(beginning)]
            branches.grow(forks, 4)
            check(llm)
            assert len({tuple(fork.token_ids) for fork in forks}) == 2
            assert_logprobs(llm, forks)
            outputs = []
            while not outputs:
                outputs = llm.step()
            assert outputs[0]["token_ids"] == expected["token_ids"]
            with pytest.raises(KeyError, match="no unfinished request"):
                branches.fork_request(number)
        assert everything_is_free(llm)


def test_a_sample_that_has_ended_is_not_forked():
    with build(plain=True) as llm, llm.branching() as branches:
        number = llm.add_request(PROMPT, sampled(20, seed=3, n=2))
        llm.step()
        llm.step()
        (request,) = [llm.requests[number]]
        llm.guard.perform(lambda: llm.scheduler.finish(request.sequences[1], "length", None))
        with pytest.raises(ValueError, match="sample 1 of request .* has ended"):
            branches.fork_request(number, sample=1)
        (branch,) = branches.fork_request(number, sample=0)
        llm.abort(number)  # the branch has its own blocks
        branches.grow([branch], 3)
        check(llm)
        assert_logprobs(llm, [branch])
        with pytest.raises(KeyError, match="no unfinished request"):
            branches.fork_request(number)
        branches.drop(branch, branch)
        with pytest.raises(ValueError, match="'abort' cannot be forked"):
            branches.fork(branch)


def test_what_a_tool_wrote_has_no_probability_in_a_branch():
    run = next(run for run in TOOL_GOLDENS["runs"] if 0 in run["masks"])
    params = SamplingParams(temperature=0, max_tokens=60)
    with chain(plain=True) as llm:
        (output,) = llm.generate([run["prompt"]], params, use_tqdm=False, tools=True)
        with llm.branching() as branches:
            branch = branches.resume(output, params)
            for logprob, is_drawn in zip(branch.logprobs, output["mask"], strict=False):
                assert (logprob < 0) == bool(is_drawn)
            branches.grow([branch], 1)
            assert branch.finish_reason == "stop"  # as the request
        assert everything_is_free(llm)


@pytest.mark.parametrize("num_blocks", [200, 20])
def test_a_trace_tells_of_branches(num_blocks):
    with build("era1_padded", plain=True, block_size=4, num_blocks=num_blocks) as llm:
        with llm.branching() as branches:
            root = branches.start(PROMPT, PARAMS)
            branches.grow([root], 5)
            with llm.tracing() as trace:
                replay = Replay()
                num_replayed = 0

                def follow():
                    nonlocal num_replayed
                    for event in trace.events[num_replayed:]:
                        replay.apply(event)
                        num_replayed += 1
                    compare(replay, llm.scheduler)

                follow()
                forks = branches.fork(root, 2)
                follow()
                branches.grow([root], 2)
                follow()
                children = branches.spread(forks, 3)
                follow()
                llm.generate([ids(9, 2)] * 3, sampled(20, seed=8), use_tqdm=False)
                follow()
                branches.grow(children, 4)
                follow()
                branches.drop(*children)
                follow()


def test_mistakes_are_refused_with_a_remedy():
    with build(plain=True) as llm, llm.branching() as branches:
        with pytest.raises(ValueError, match="n=2: a branch is one sample"):
            branches.start(PROMPT, sampled(4, seed=1, n=2))
        root = branches.start(PROMPT, sampled(4, seed=1, logprobs=2))
        with pytest.raises(ValueError, match="without tokens cannot be forked"):
            branches.fork(root)
        with pytest.raises(ValueError, match=r"spread\(k=3\) needs branches with logprobs=3"):
            branches.spread([root], 3)
        for number, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError)):
            with pytest.raises(error, match="^num_tokens must be"):
                branches.grow([root], number)
            for method, argument in ((branches.fork, root), (branches.spread, [root])):
                with pytest.raises(error, match="^k must be"):
                    method(argument, number)
            with pytest.raises(error, match="^k must be"):
                branches.fork_request(0, number)
        assert root in branches.live and not root.token_ids
        (output,) = llm.generate([PROMPT], sampled(3, seed=1), use_tqdm=False)
        with pytest.raises(ValueError, match="^sample must be between 0 and 0, got 1"):
            branches.resume(output, sampled(9, seed=1), sample=1)
        branches.grow([root], 4)
        with pytest.raises(ValueError, match="'length' cannot be forked"):
            branches.fork(root)
