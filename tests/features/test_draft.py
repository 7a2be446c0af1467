"""A draft model makes steps fewer and changes nothing else."""

import random
import re
from contextlib import contextmanager

import pytest
import torch
from helpers.checkpoints import state_dict
from helpers.engine_cases import run_work
from helpers.engines import check, ids, serve
from helpers.failures import PLACES
from helpers.full_engines import TOOL_GOLDENS, assert_idle, build, chain, greedy, sampled
from helpers.goldens import MODEL
from helpers.naive import assert_naive
from helpers.speculation import AGAIN, TEXTS, WAYS, shorn, streamed
from helpers.windows import WINDOWED, beyond

from microvllm import LLM, SamplingParams, full
from microvllm.features import draft
from microvllm.features.draft import Choice, DraftLength, DraftModel

pytestmark = pytest.mark.usefixtures("one_thread")


def force(llm: LLM, share: float = 0.7, length: int = 4) -> LLM:
    """Let an engine draft whatever it costs, and be right with this probability."""
    proposer = llm.scheduler.proposer
    rng = random.Random(1)
    draft = proposer.draft

    def choose(num_seqs: int, most: int, num_behind: int, num_left: int) -> Choice:
        return Choice(min(length, most))

    def draft_some_wrong(seqs, length):
        return [
            [token_id if rng.random() < share else rng.randrange(200) for token_id in tokens]
            for tokens in draft(seqs, length)
        ]

    proposer.length.choose = choose
    proposer.draft = draft_some_wrong
    return llm


@contextmanager
def drafting(name: str = "era5", share: float = 0.7, length: int = 4, **options):
    """An engine that drafts for itself, and whose drafts were partly right in the end."""
    with build(name, plain=True) as other, build(name, draft=other, **options) as llm:
        yield force(llm, share, length)
        stats = llm.stats()
        assert 0 < stats["accepted_tokens"]
        assert share == 1 or stats["accepted_tokens"] < stats["guessed_tokens"]
        assert_idle(other)


# how many tokens are drafted ----------------------------------------------------------------------


def measured(
    plain: float = 1.0, draft: float = 0.1, row: float = 0.02, num_seqs: int = 1
) -> DraftLength:
    """What to choose where steps and drafts take this long; row: a further row of a step."""
    length = DraftLength(7)
    length.draft_seconds.add((num_seqs,), draft)
    length.catch_up_seconds.add((), draft / 10)
    for num_drafts in range(8):
        seconds = plain + num_seqs * num_drafts * row
        length.add_steps(num_seqs, Choice(num_drafts), seconds)
    length.trial_seconds = 0.0
    return length


def learn(length: DraftLength, acceptance: float, num_drafts: int = 400) -> None:
    rng = random.Random(0)
    for _ in range(num_drafts):
        right = 0
        while right < 4 and rng.random() < acceptance:
            right += 1
        length.add_verified(4, right)


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_the_share_of_right_tokens_is_measured(acceptance):
    length = DraftLength(7)
    learn(length, acceptance)
    assert abs(length.acceptance - acceptance) < 0.15


def test_more_is_drafted_where_more_is_right():
    lengths = []
    for acceptance in (0.0, 0.3, 0.6, 0.9, 1.0):
        length = measured()
        learn(length, acceptance)
        lengths.append(length.choose(1, 7, 1, 100).length)
    assert lengths[0] == 0 and lengths[-1] == 7 and lengths == sorted(lengths)
    assert 0 < lengths[1] < lengths[3]


def test_nothing_is_drafted_where_it_takes_longer():
    for costs in ({"draft": 0.9}, {"row": 0.9}, {"draft": 0.5, "row": 0.5}):
        length = measured(**costs)
        learn(length, 0.7)
        assert length.choose(1, 7, 1, 100).length == 0
    length = measured(plain=1.0, row=0.2, num_seqs=4)
    learn(length, 0.5)
    assert length.choose(4, 1, 4, 100).length == 0
    assert measured(num_seqs=4).choose(4, 1, 4, 100).length == 1
    assert measured().choose(1, 0, 1, 100).length == 0  # there is no row for a draft token


def test_a_text_that_soon_ends_is_not_worth_a_long_prompt():
    assert measured().choose(1, 7, num_behind=200, num_left=100).length > 0
    assert measured().choose(1, 7, num_behind=200, num_left=2).length == 0


def test_steps_without_drafts_are_measured_first_and_now_and_then():
    assert DraftLength(7).choose(1, 7, 1, 100) == Choice(0, draft.NUM_PLAIN)
    length = measured()
    lengths = [length.choose(1, 7, 1, 100).length for _ in range(200)]
    assert lengths.count(0) == 200 // draft.PLAIN_EVERY


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_trials_take_a_small_share_of_the_time(share):
    length = measured(draft=0.5)
    learn(length, share)
    rng = random.Random(1)
    seconds = num_tokens = num_trials = 0
    while num_tokens < 5000:
        choice = length.choose(1, 7, 1, 100)
        step = choice.num_steps * (1 + 0.02 * choice.length)
        length.add_steps(1, choice, step)
        num_new = choice.num_steps
        if choice.length:
            right = int(rng.random() < share)
            num_new += right
            num_trials += 1
            length.add_verified(choice.length, right)
            step += 0.5 * choice.length
            length.add_loss(1, step, num_new)
        seconds += step
        num_tokens += num_new
    assert 5 < num_trials
    assert num_tokens <= seconds < 1.025 * num_tokens


def test_drafts_begin_again_where_they_have_become_right():
    length = measured(draft=0.3)
    learn(length, 0.0)
    num_choices = 0
    while True:
        num_choices += 1
        choice = length.choose(1, 7, 1, 100)
        length.add_steps(1, choice, choice.num_steps * 1.0)
        if choice.length > 1:
            break
        if choice.length:
            length.add_verified(choice.length, choice.length)
            length.add_loss(1, 1.3, 2)
    assert 2 < num_choices < 100


def test_a_pause_of_the_process_is_no_long_step():
    length = measured()
    learn(length, 0.9)
    before = length.choose(1, 7, 1, 100).length
    length.add_steps(1, Choice(before), 1000.0)
    length.add_steps(1, Choice(0), 1000.0)
    assert abs(length.choose(1, 7, 1, 100).length - before) <= 2


# the same output ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    """An engine without draft tokens and one with them; of equal texts they have equal bits."""
    options = {"device": "cpu", "num_blocks": 100, "max_model_len": 400}
    with (
        LLM(MODEL, **options, deterministic=True) as plain,
        LLM(MODEL, **options) as other,
        LLM(MODEL, **options, deterministic=True, draft=other) as drafting,
    ):
        yield plain, force(drafting)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_token_for_token_and_log_probability_for_log_probability(way, pair):
    params = SamplingParams(
        **{"max_tokens": 48, "ignore_eos": True, "seed": 3, "logprobs": 2} | WAYS[way]
    )
    found = []
    for llm in pair:
        before = llm.stats()
        outputs = llm.generate(TEXTS, params, use_tqdm=False)
        alone = llm.generate(TEXTS[:1], params, use_tqdm=False)
        found.append(shorn(outputs + alone))
        assert_idle(llm)
        made, steps, guessed, accepted = (
            llm.stats()[name] - before[name]
            for name in ("output_tokens", "steps", "guessed_tokens", "accepted_tokens")
        )
    assert found[0] == found[1]
    if way in ("processor", "max_tokens 1", "max_tokens 2"):
        assert guessed == 0
    elif way in ("greedy", "sampled", "top_p", "top_k and min_p", "three samples", "min_tokens"):
        assert guessed > accepted > 0 and steps < made


@pytest.mark.slow
def test_a_stream_has_all_pieces(pair):
    params = SamplingParams(temperature=0.3, max_tokens=60, seed=1, stop=["zzz", "four, one"], n=2)
    found = []
    for llm in pair:
        pieces = streamed(llm, params)
        found.append(pieces)
    assert found[0] == found[1]


@pytest.mark.slow
def test_guided_texts(pair):
    guide = {"json": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    params = SamplingParams(temperature=0.8, max_tokens=40, seed=2, guide=guide)
    plain, drafts = [shorn(llm.generate(TEXTS, params, use_tqdm=False)) for llm in pair]
    assert plain == drafts


def test_a_calculator_answers_in_time():
    prompt = [run["prompt"] for run in TOOL_GOLDENS["runs"]]
    params = SamplingParams(temperature=0, max_tokens=60)
    found = []
    with chain(device="cpu", num_blocks=80) as other:
        for options in ({}, {"draft": other}):
            with chain(device="cpu", num_blocks=80, **options) as llm:
                if options:
                    force(llm, share=1)
                found.append(shorn(llm.generate(prompt, params, use_tqdm=False, tools=True)))
                assert (llm.stats()["accepted_tokens"] > 0) == bool(options)
    assert found[0] == found[1] and all(0 in output["mask"] for output in found[0])


# whatever the pool, the budget and the cache do ---------------------------------------------------

WORK = [*AGAIN, (ids(5, 3) * 4, greedy(30)), (ids(4, 4) * 5, sampled(20, seed=2, n=2))]


@pytest.mark.slow
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("block_size", [1, 16])
def test_block_sizes_with_a_cold_and_a_warm_cache(block_size, caching):
    options = {"block_size": block_size, "num_blocks": 1 + 400 // block_size}
    with drafting(**options, enable_prefix_caching=caching) as llm:
        for _ in range(2):
            assert_naive(serve(llm, AGAIN), AGAIN)
        assert llm.stats()["steps"] < 24 * 2


@pytest.mark.slow
@pytest.mark.parametrize("budget", [2, 3, 7])
def test_token_budgets(budget):
    with drafting(max_batched_tokens=budget) as llm:
        assert_naive(serve(llm, AGAIN), AGAIN)


@pytest.mark.parametrize(
    ("block_size", "num_blocks"),
    [
        (4, 16),
        pytest.param(1, 60, marks=pytest.mark.slow),
        pytest.param(16, 5, marks=pytest.mark.slow),
    ],
)
def test_pools_so_small_that_sequences_are_preempted(block_size, num_blocks):
    with drafting(block_size=block_size, num_blocks=num_blocks) as llm:
        assert_naive(serve(llm, WORK), WORK)
        assert llm.stats()["preemptions"] > 0


def test_a_draft_model_with_a_small_pool_drafts_for_short_texts_only():
    work = [(ids(3, 1), greedy(24))]
    with build(plain=True, num_blocks=2, block_size=16, max_model_len=64) as other:
        assert other.max_positions < 20
        with build(draft=other, max_model_len=64) as llm:
            force(llm, share=1)
            assert_naive(serve(llm, work), work)
            assert 0 < llm.stats()["accepted_tokens"] < 10


@pytest.mark.slow
@pytest.mark.parametrize("name", WINDOWED)
def test_sliding_windows(name):
    start = beyond(name)[0][0]
    work = [(start + start[:20], greedy(40)), (start, sampled(30, seed=4, temperature=0.3))]
    with drafting(name, block_size=4, max_batched_tokens=50, num_blocks=400) as llm:
        assert llm.scheduler.blocks.num_groups > 1
        assert_naive(serve(llm, work), work, name)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_step_fails_all_get_the_right_tokens(place):
    options = {"block_size": 4, "num_blocks": 22, "max_batched_tokens": 16}
    with build(plain=True) as other:
        with build(**options, draft=other) as llm:
            count, _ = run_work(force(llm), place, None)
            assert llm.stats()["guessed_tokens"] > 0
        for at in {0, count // 2, count - 1}:
            with build(**options, draft=other) as llm:
                run_work(force(llm), place, at, MemoryError() if at else None)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_draft_that_fails_fails_its_step_and_leaves_nothing(error):
    with drafting() as llm:
        llm.add_request(*AGAIN[0])
        for _ in range(3):
            llm.step()
        proposer = llm.scheduler.proposer
        forward = proposer.llm.model.forward
        proposer.llm.model.forward = lambda *_: (_ for _ in ()).throw(error())
        with pytest.raises(error):
            while True:
                llm.step()
        check(llm)
        check(proposer.llm)
        proposer.llm.model.forward = forward
        outputs = []
        while not llm.is_finished():
            outputs += llm.step()
        assert_naive(outputs, AGAIN[:1])


def test_aborted_texts_leave_nothing_in_either_engine():
    with drafting() as llm:
        first, second = [llm.add_request(*work) for work in AGAIN]
        for _ in range(5):
            llm.step()
        llm.abort(first)
        outputs = []
        while not llm.is_finished():
            outputs += llm.step()
        outputs = {output["request_id"]: output for output in outputs}
        assert outputs[first]["finish_reason"] == "abort"
        assert_naive([outputs[second]], AGAIN[1:])
        assert_idle(llm)


def test_new_weights_are_drafted_for_by_the_same_draft_model():
    weights = state_dict("era5")
    changed = weights | {"lm_head.weight": weights["lm_head.weight"].roll(1, 0)}
    with drafting() as llm, build() as plain:
        for each in (weights, changed):
            for engine in (llm, plain):
                engine.update_weights(each)
            found = [[o["token_ids"] for o in serve(engine, AGAIN)] for engine in (llm, plain)]
            assert found[0] == found[1]


# refusals -----------------------------------------------------------------------------------------


def test_it_is_refused_where_the_loop_is_a_step_ahead(monkeypatch):
    monkeypatch.setattr(full, "find_device", lambda _: torch.device("cuda"))
    with pytest.raises(ValueError, match="draft='base:d6' .* on cuda, .* leave it"):
        LLM(MODEL, draft="base:d6")


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"draft": 5}, TypeError, "draft must be a path or an LLM, got 5"),
        ({"draft": "/nowhere/at/all"}, FileNotFoundError, "/nowhere/at/all"),
        (
            {"draft": MODEL, "prompt_lookup": 3},
            ValueError,
            "prompt_lookup and draft cannot be combined: give one source of draft tokens",
        ),
        ({"draft": MODEL}, ValueError, "tokens and the model"),
    ],
)
def test_what_is_no_draft_model_is_refused(options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        build(**options)


def test_a_shorter_context_is_refused():
    with build(plain=True, max_model_len=40) as other:
        with pytest.raises(ValueError, match="has a context of 40 tokens.* max_model_len=40"):
            build(draft=other)
        with build(draft=other, max_model_len=40):
            pass


def test_another_tokenizer_of_the_same_size_is_refused():
    with build(plain=True) as other:
        other.tokenizer._token_bytes[97:99] = [b"b", b"a"]
        with pytest.raises(ValueError, match="another tokenizer: token 97 is b'b' there and"):
            build(draft=other)


def test_a_draft_engine_that_was_closed_drafts_nothing():
    with build(plain=True) as other, build(draft=other) as llm:
        force(llm)
        other.close()
        assert_naive(serve(llm, AGAIN), AGAIN)
        assert llm.stats()["guessed_tokens"] == 0


def test_an_engine_closes_the_draft_engine_that_it_has_made_and_no_other():
    with build(plain=True) as other:
        with build(draft=other):
            pass
        assert not other.guard.is_closed
    with LLM(MODEL, device="cpu", num_blocks=10, plain=True, draft=MODEL) as llm:
        proposer = llm.scheduler.proposer
        assert isinstance(proposer, DraftModel) and proposer.llm.model.__class__.__name__ == "GPT"
    assert proposer.llm.guard.is_closed
