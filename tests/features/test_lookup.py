"""Prompt lookup: draft tokens make steps fewer and change nothing else."""

import json
import re
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from helpers.engine_cases import run_work
from helpers.engines import check, ids, serve
from helpers.failures import PLACES
from helpers.full_engines import assert_idle, build, greedy, sampled
from helpers.goldens import ERAS, MODEL
from helpers.naive import assert_naive
from helpers.records import Record
from helpers.simulation import Simulation, make_blocks, text
from helpers.speculation import AGAIN, TEXTS, WAYS, shorn, streamed
from helpers.traces import compare
from helpers.windows import WINDOWED, beyond

from microvllm import LLM, SamplingParams, cli, full
from microvllm.features.lookup import NgramTable, PromptLookup
from microvllm.scheduler import Scheduler, Sequence
from microvllm.trace import Replay

pytestmark = pytest.mark.usefixtures("one_thread")


MAX_ROWS = PromptLookup.max_rows


# the draft tokens themselves ----------------------------------------------------------------------


def test_what_followed_the_last_tokens_before_is_guessed_to_follow_again():
    assert NgramTable(4).propose([1, 2, 3, 4, 5, 6, 1, 2, 3], 9) == [4, 5, 6, 1]
    assert NgramTable(4).propose([1, 2, 3, 4, 5, 6, 1, 2, 3], 2) == [4, 5]
    assert NgramTable(4).propose([1, 2, 3, 4, 5, 6, 1, 2, 3], 0) == []
    assert NgramTable(4).propose([1, 2, 3], 4) == NgramTable(4).propose([7], 4) == []


def test_the_longest_match_counts_and_of_equal_ones_the_last():
    assert NgramTable(1).propose([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 1) == [4]
    assert NgramTable(1).propose([2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 1) == [5]
    assert NgramTable(1).propose([3, 4, 9, 3, 5, 1, 3], 1) == [5]


def test_a_text_that_repeats_itself_is_guessed_to_go_on_so():
    assert NgramTable(8).propose([5, 1, 1], 5) == [1] * 5
    assert NgramTable(8).propose([9, 1, 2, 3, 1, 2, 3], 8) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_no_end_is_guessed():
    assert NgramTable(8, {4}).propose([1, 2, 3, 4, 5, 1, 2], 8) == [3]
    assert NgramTable(8, {3}).propose([1, 2, 3, 4, 5, 1, 2], 8) == []


def test_the_index_is_brought_up_to_date_with_new_tokens_only():
    table = NgramTable(3)
    tokens = ids(200)

    class Looked(list):
        def __getitem__(self, at):
            looked.append(at)
            return super().__getitem__(at)

    for token in ids(50, 1):
        tokens.append(token)
        looked = []
        found = table.propose(Looked(tokens), 3)
        assert found == NgramTable(3).propose(tokens, 3)
        assert len(looked) <= 7 or len(tokens) == 201
    assert table.propose(tokens[:40], 3) == NgramTable(3).propose(
        tokens[:40], 3
    )  # some are cut off


def test_more_is_guessed_while_it_goes_well():
    table = NgramTable(8)
    counts = []
    for accepted in (False, False, False, False, True, True, True, True, False):
        counts.append(len(table.propose([1] * 20, 99)))
        table.learn(counts[-1], counts[-1] if accepted else 0)
    assert counts == [8, 4, 2, 1, 1, 2, 4, 8, 8]
    assert len(table.propose([1] * 20, 99)) == 4


# which sequences have drafts, and at what price --------------------------------------------------


class LookupParams(NamedTuple):
    """What scheduler and proposer read of SamplingParams."""

    max_tokens: int = 20
    n: int = 1
    allows_drafts: bool = True


def decoding(
    usable: int, *prompts: list[int], size: int = 4, budget: int = 64, max_tokens=20, n=1
) -> tuple[Scheduler, list[Sequence]]:
    """A scheduler whose sequences have got their first token, which is a 1."""
    blocks = make_blocks(usable, size)
    scheduler = Scheduler(blocks, 16, budget, proposer=PromptLookup(8))
    for i, prompt in enumerate(prompts):
        scheduler.add(Sequence(i, prompt, LookupParams(max_tokens, n)))
    plan = scheduler.schedule()
    scheduler.update(plan, [1] * len(plan.draws))
    return scheduler, list(scheduler.running)


def lengths(plan) -> list[int]:
    return [chunk.num_tokens for chunk in plan.chunks]


def test_a_step_of_few_rows_is_filled_up_with_guesses():
    for count in range(1, 10):
        scheduler, _ = decoding(90, *[[1] * 5] * count)
        plan = scheduler.schedule()
        assert sum(lengths(plan)) == max(MAX_ROWS, count)
        assert max(lengths(plan)) - min(lengths(plan)) <= 1 or count > MAX_ROWS  # fairly
        drafts = [len(chunk.draft) for chunk in plan.chunks if chunk.draft]
        assert sorted(drafts) == [n - 1 for n in lengths(plan) if n > 1]


def test_no_guess_goes_beyond_the_token_budget_or_the_length():
    scheduler, (seq,) = decoding(90, [1] * 5, budget=5)
    assert lengths(scheduler.schedule()) == [5]
    for max_tokens in range(2, 9):
        scheduler, (seq,) = decoding(90, [1] * 5, max_tokens=max_tokens)
        plan = scheduler.schedule()
        assert lengths(plan) == [min(max_tokens - 1, MAX_ROWS)]
        assert plan.draws.positions[-1] == min(5 + max_tokens - 1, 6 + MAX_ROWS - 1)
        scheduler.update(plan, [1] * len(plan.draws))
        assert seq.token_ids == [1] * min(5 + max_tokens, 6 + MAX_ROWS)
        assert (seq.finish_reason == "length") == (len(seq.token_ids) == 5 + max_tokens)


def test_nothing_makes_room_for_a_guess_and_what_was_wrong_is_given_back():
    # two samples of 7 tokens: two blocks, and a copy of the second. one block is left
    scheduler, (first, second) = decoding(4, [1] * 7, n=2)
    plan = scheduler.schedule()
    assert [(chunk.seq, chunk.num_tokens) for chunk in plan.chunks] == [(second, 1), (first, 4)]
    scheduler.blocks.check(scheduler.running)
    scheduler.update(plan, [2, 1, 1, 3, 1])
    assert second.token_ids == [1] * 8 + [2] and first.token_ids == [1] * 10 + [3]
    assert (first.num_computed, second.num_computed) == (10, 8)
    assert (scheduler.num_draft_tokens, scheduler.num_accepted_tokens) == (3, 2)
    assert scheduler.num_preemptions == 0
    scheduler.blocks.check(scheduler.running)


def test_all_blocks_of_a_wrong_guess_are_free_again_and_none_was_findable():
    scheduler, (seq,) = decoding(40, [1] * 3, size=1)
    scheduler.update(scheduler.schedule(), [2] + [1] * 7)
    assert seq.token_ids == [1, 1, 1, 1, 2] and len(seq.block_table) == seq.num_computed == 4
    pool = scheduler.blocks.pool
    assert pool.num_free == 36 and len(pool.hash_of) == 4
    scheduler.blocks.check(scheduler.running)


@pytest.mark.parametrize("how", ["reset", "abort", "finish"])
def test_guesses_are_gone_with_their_step(how):
    scheduler, (seq,) = decoding(40, [1] * 3, size=1)
    plan = scheduler.schedule()
    assert 3 + len(plan.draws) == 11
    if how == "reset":
        scheduler.reset()
    elif how == "abort":
        scheduler.abort([seq])
    else:
        scheduler.finish(seq, "error", None)
    assert seq.token_ids == [1] * 4
    pool = scheduler.blocks.pool
    assert pool.num_free == 40 and not seq.block_table
    assert len(pool.hash_of) <= 4  # of known tokens
    if how != "reset":
        assert not scheduler.update(plan, [1] * 8) and seq.token_ids == [1] * 4


def test_several_samples_guess_once_they_have_split():
    sim = Simulation(60, 4, guesses=True)
    sim.add(text(9), max_tokens=12, n=3)
    assert not sim.step().num_draft_tokens
    assert any(sim.step().num_draft_tokens for _ in range(3))
    sim.drain()
    assert sim.scheduler.num_accepted_tokens > 0
    scheduler, samples = decoding(90, [1] * 5, n=3)
    plan = scheduler.schedule()
    tables = {id(scheduler.proposer.table(seq)) for seq in samples}
    assert len(tables) == len([chunk for chunk in plan.chunks if chunk.draft]) == 3


# the same output ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    """An engine without draft tokens and one with them; of equal texts they have equal bits."""
    options = {"device": "cpu", "num_blocks": 100, "deterministic": True, "max_model_len": 400}
    with LLM(MODEL, **options) as plain, LLM(MODEL, **options, prompt_lookup=6) as guessing:
        yield plain, guessing


def test_the_blocks_of_guesses_are_in_the_cache_when_a_text_ends_with_them():
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in range(20, 28)]
    with LLM(MODEL, device="cpu", num_blocks=100, block_size=4, prompt_lookup=6) as llm:
        for each in params:
            (output,) = llm.generate(TEXTS[:1], each, use_tqdm=False)
            text = llm.tokenizer.encode(TEXTS[0], bos=True) + output["token_ids"]
            (after,) = llm.generate([[*text, 5]], SamplingParams(max_tokens=1), use_tqdm=False)
            # the last token was never fed back
            assert after["num_cached_tokens"] == (len(text) - 1) // 4 * 4
            llm.scheduler.reset()
        assert llm.stats()["accepted_tokens"]


@pytest.mark.parametrize("way", WAYS)
def test_token_for_token_and_log_probability_for_log_probability(way, pair):
    given = {"max_tokens": 48, "ignore_eos": True, "seed": 3, "logprobs": 2} | WAYS[way]
    params, found = SamplingParams(**given), []
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
        samples = [sample for output in outputs + alone for sample in output["samples"]]
        assert made == sum(len(sample["token_ids"]) for sample in samples)
        for sample in samples:
            assert [e["token_id"] for e in sample["logprobs"]] == sample["token_ids"]
    assert found[0] == found[1]
    if way in ("processor", "max_tokens 1"):
        assert guessed == 0
    elif given["temperature"] == 0 and made > 60 and way != "bad words":
        assert guessed >= accepted > 0 and steps < made


def test_logits_are_the_same_to_the_bit(pair):
    plain, guessing = pair
    record = Record()
    for llm in pair:
        llm.scheduler.reset()
        record.watch(llm)
        num_seen = record.num_seen
        llm.generate(TEXTS, greedy(60), use_tqdm=False)
        assert record.num_seen - num_seen >= 120
        llm.remove_extension(record)
    assert guessing.stats()["accepted_tokens"] > 0


def test_a_stream_has_all_pieces(pair):
    params = SamplingParams(temperature=0.3, max_tokens=60, seed=1, stop=["zzz", "four, one"], n=2)
    found = []
    for llm in pair:
        pieces = streamed(llm, params)
        outputs = llm.generate(TEXTS, params, use_tqdm=False)
        for (i, k), piece in pieces.items():
            sample = outputs[i]["samples"][k]
            assert piece[:2] == [sample["text"], sample["token_ids"]]
        found.append(pieces)
    assert found[0] == found[1]


def test_a_calculator_gets_its_word_in():
    folder, found = ERAS / "tool_chain", []
    runs = json.loads((folder / "goldens.json").read_text())["runs"]
    # the question was asked and answered before
    prompts = [run["prompt"] + run["tokens"] + run["prompt"] for run in runs]
    params = SamplingParams(temperature=0, max_tokens=60)
    for limit in (0, 8):
        sizes = {"device": "cpu", "num_blocks": 80, "prompt_lookup": limit}
        given = {"tokenizer_path": folder / "tokenizer"} | sizes
        with LLM(folder / "chatsft_checkpoints" / "d1", **given) as llm:
            outputs = [llm.generate([p], params, False, tools=True)[0] for p in prompts]
            found.append(shorn(outputs))
            assert llm.stats()["output_tokens"] == sum(len(o["token_ids"]) for o in outputs)
            assert (llm.stats()["accepted_tokens"] > 0) == bool(limit)
    assert found[0] == found[1] and all(0 in output["mask"] for output in found[0])


# whatever the pool, the budget and the cache do ---------------------------------------------------


@contextmanager
def guessing(name: str = "era5", **options):
    """An engine that guesses, and did in the end."""
    with build(name, **{"prompt_lookup": 5} | options) as llm:
        yield llm
        assert llm.stats()["accepted_tokens"] > 0


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
def test_block_sizes_with_a_cold_and_a_warm_cache(block_size, caching):
    options = {"block_size": block_size, "num_blocks": 1 + 400 // block_size}
    with guessing(**options, enable_prefix_caching=caching) as llm:
        for _ in range(2):
            assert_naive(serve(llm, AGAIN), AGAIN)
        assert llm.stats()["steps"] < 24 * 2


@pytest.mark.parametrize("budget", [2, 3, 7])
def test_token_budgets(budget):
    with guessing(max_batched_tokens=budget) as llm:
        assert_naive(serve(llm, AGAIN), AGAIN)


@pytest.mark.parametrize(("block_size", "num_blocks"), [(1, 60), (4, 16), (16, 5)])
def test_pools_so_small_that_sequences_make_room(block_size, num_blocks):
    work = AGAIN + [(ids(5, 3) * 4, greedy(30)), (ids(4, 4) * 5, sampled(20, seed=2, n=2))]
    with guessing(block_size=block_size, num_blocks=num_blocks) as llm:
        for _ in range(2):
            assert_naive(serve(llm, work), work)
        assert llm.stats()["preemptions"] > 0


@pytest.mark.parametrize("name", WINDOWED)
def test_sliding_windows(name):
    start = beyond(name)[0][0]
    work = [(start + start[:20], greedy(40)), (start, sampled(30, seed=4, temperature=0.3))]
    with guessing(name, block_size=4, max_batched_tokens=50, num_blocks=400) as llm:
        assert llm.scheduler.blocks.num_groups > 1
        for _ in range(2):
            assert_naive(serve(llm, work), work, name)


@pytest.mark.parametrize("attention", ["sdpa", "numba"])
def test_both_backends(attention):
    with guessing(attention=attention, prompt_lookup=100) as llm:
        assert_naive(serve(llm, AGAIN), AGAIN)


@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_step_fails_all_get_the_right_tokens(place):
    options = {"block_size": 4, "num_blocks": 22, "max_batched_tokens": 16, "prompt_lookup": 5}
    with build(**options) as llm:
        count, _ = run_work(llm, place, None)
        assert llm.stats()["guessed_tokens"] > 0
    for at in {0, count // 2, count - 1}:
        with build(**options) as llm:
            run_work(llm, place, at, MemoryError() if at else None)


def test_a_step_with_guesses_fails_or_is_interrupted_and_they_are_forgotten(monkeypatch):
    with guessing() as llm:
        forward, broken = llm.model.forward, []

        def fails(batch, cache):
            if batch.max_query_len > 1 and batch.num_decodes < len(batch.seq_lens) and broken:
                raise broken.pop()
            return forward(batch, cache)

        monkeypatch.setattr(llm.model, "forward", fails)
        request = llm.add_request(*AGAIN[0])
        llm.step()
        for error in (MemoryError(), KeyboardInterrupt()):
            while not (llm.scheduler.running and llm.scheduler.running[0].num_computed > 28):
                llm.step()
            broken.append(error)
            with pytest.raises(type(error)):
                while True:
                    llm.step()
            (seq,) = llm.scheduler.waiting
            assert min(seq.token_ids) >= 0 and not seq.block_table
            check(llm)
        outputs = []
        while not llm.is_finished():
            outputs += llm.step()
        assert outputs[0]["request_id"] == request
        assert_naive(outputs, AGAIN[:1])


def test_a_trace_of_guesses_replays(tmp_path):
    with guessing(block_size=2) as llm:
        replay, told = Replay(), [0]

        def follow() -> None:
            lines = [*trace.log.lines]
            for line in lines[told[0] :]:
                replay.apply(json.loads(line))
            told[0] = len(lines)
            compare(replay, llm.scheduler)

        with llm.tracing() as trace:
            trace.after_step = follow
            outputs = [llm.generate([prompt], params, False)[0] for prompt, params in AGAIN]
            follow()
        lives = sorted(replay.seqs.values(), key=lambda life: life.request)
        for life, output in zip(lives, outputs, strict=True):
            assert life.tokens[life.prompt :] == output["token_ids"]
        assert any(event["e"] == "reject" for event in trace.events)
        trace.chrome(tmp_path / "run.json")
        found = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
        prefills = [e for e in found if e["ph"] == "X" and e["name"].startswith("prefill")]
        assert len(prefills) == 2  # steps with guesses are decodes


# refusals, the command line -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, error, words",
    [
        (-1, ValueError, "prompt_lookup must be between 0 and"),
        (True, TypeError, "prompt_lookup must be an integer, got True"),
        (2.5, TypeError, "prompt_lookup must be an integer, got 2.5"),
    ],
)
def test_it_is_a_number_of_tokens(value, error, words):
    with pytest.raises(error, match=re.escape(words)):
        build(prompt_lookup=value)


def test_it_is_refused_where_the_loop_is_a_step_ahead(monkeypatch):
    monkeypatch.setattr(full, "find_device", lambda _: torch.device("cuda"))
    with pytest.raises(ValueError, match="prompt_lookup=3 .* on cuda, .* leave it out"):
        LLM(MODEL, prompt_lookup=3)


def test_the_commands_have_it_and_say_how_often_it_was_right(capsys):
    prompt = ["--raw", "--temperature", "0", "--max-tokens", "40", "--ignore-eos", TEXTS[1]]
    answers = []
    for flags in ([], ["--prompt-lookup", "6"]):
        cli.main(["run", "--json", *flags, *prompt])
        answers.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert answers[0] == answers[1]
    flags = ["--random-input-len", "20", "--random-output-len", "60", "--temperature", "0"]
    flags = ["bench", "--num-prompts", "1", "--prompt-lookup", "6", *flags]
    cli.main(flags)
    out = capsys.readouterr().out
    told = re.search(
        r"Decode: 59 tokens .* tokens/s.*; (\d+) of (\d+) draft tokens accepted \(\d+%\)", out
    )
    cli.main([*flags, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [int(n) for n in told.groups()] == [found["accepted_tokens"], found["guessed_tokens"]]
