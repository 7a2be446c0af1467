"""The faults of the engine that this project began as, one test each.

They were found by running it, and are numbered as in the list that was made of them. Each test says
what went wrong, and does what showed it.
"""

import pytest
import torch
from helpers.engines import (
    GROWING,
    Counters,
    assert_idle,
    build,
    check,
    finish,
    greedy,
    ids,
    sampled,
    serve,
)
from helpers.goldens import FIXTURES, MODEL
from helpers.naive import assert_naive, ending, naive

from microvllm.checkpoint import load_model
from microvllm.engine import LLM, SamplingParams
from microvllm.sampler import uniform_numbers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def damaged(tmp_path):
    """damaged(name, change): the directory of a copy of a fixture's checkpoint, changed."""

    def write(name: str, change):
        source = FIXTURES[name].directory
        (weights,) = source.glob("model_*.pt")
        state = torch.load(weights, map_location="cpu", weights_only=True)
        change(state)
        torch.save(state, tmp_path / weights.name)
        meta = weights.name.replace("model_", "meta_").replace(".pt", ".json")
        (tmp_path / meta).write_text((source / meta).read_text())
        return tmp_path

    return write


@pytest.mark.parametrize("name", ["era1_unpadded", "era1_padded", "era2", "era3", "era4", "era5"])
def test_fault_01_every_era_loads_strictly_and_always_gives_the_same_text(name):
    # strict=False left an older checkpoint's value embeddings at random, and two loads gave two
    # texts; a current checkpoint did not load at all
    prompt = next(p for p in FIXTURES[name].json["prompts"] if p["length"] == 7)
    for _ in range(2):
        with build(name) as llm:
            (output,) = serve(llm, [(prompt["ids"], greedy(16))])
            assert output["token_ids"] == prompt["greedy_tokens"][:16]


def test_fault_01_a_missing_tensor_is_not_filled_with_random_numbers(damaged):
    key = "value_embeds.3.weight"
    with pytest.raises(ValueError, match=key):
        load_model(damaged("era3", lambda state: state.pop(key)))


def test_fault_01_a_tensor_that_no_layer_reads_is_refused(damaged):
    def add(state):
        state["transformer.h.0.attn.c_q.bias"] = torch.zeros(64)

    with pytest.raises(ValueError, match=r"c_q\.bias"):
        load_model(damaged("era5", add))


@pytest.mark.parametrize(
    ("a", "b"),
    [(ids(16) + ids(9, 1), ids(16) + ids(9, 2)), (ids(3), ids(3)), (ids(16), ids(16))],
    ids=["16 tokens in common", "the same 3 tokens", "the same block"],
)
def test_fault_02_prompts_that_share_their_beginning(a, b):
    # UnboundLocalError, as soon as a block was found in the cache
    work = [(a, greedy(12)), (b, greedy(12))]
    with build() as llm:
        assert_naive(serve(llm, work), work)
        assert_naive(serve(llm, work), work)


@pytest.mark.parametrize("length", [3, 15, 16, 17, 20])
def test_fault_03_a_greedy_row_does_not_depend_on_a_sampled_one(length):
    # part-filled blocks were hashed and shared, and both rows wrote their tokens into them
    prompt = ids(length, 5)
    work = [(prompt, sampled(20, seed=1, temperature=2.0)), (prompt, greedy(20))]
    with build() as llm:
        for order in (work, work[::-1]):
            assert_naive(serve(llm, order), order)


def test_fault_04_the_cache_outlives_its_requests_and_saves_their_computation():
    # hashes vanished with their last user, and a hit would have been computed again anyway
    prompt = ids(100, 1)
    with build() as llm:
        counters = Counters.of(llm)
        (first,) = serve(llm, [(prompt, greedy(4))])
        computed = counters.num_prefill_tokens
        (second,) = serve(llm, [(prompt, greedy(4))])
        assert (first["num_cached_tokens"], second["num_cached_tokens"]) == (0, 96)
        assert (computed, counters.num_prefill_tokens) == (100, 100 + 4)
        assert first["token_ids"] == second["token_ids"]


@pytest.mark.parametrize("caching", [True, False])
def test_fault_05_five_equal_requests_leave_the_pool_as_they_found_it(caching):
    # blocks taken while decoding were never given back: 62, 60, 58, 56, 54 of 64 were left, later
    # answers were cut short, and in the end generate did not return
    with build(num_blocks=65, enable_prefix_caching=caching) as llm:
        free = []
        for _ in range(5):
            (output,) = llm.generate([ids(20, 1)], greedy(40))
            assert len(output["token_ids"]) == 40
            free.append(llm.scheduler.blocks.pool.num_free)
        assert free == [64] * 5
        assert_idle(llm)


def test_fault_06_a_prompt_larger_than_the_pool_is_refused_and_takes_nothing():
    # the blocks it had already taken were lost
    with build(num_blocks=5) as llm:
        with pytest.raises(ValueError, match="blocks"):
            llm.generate([ids(10), ids(65)], greedy(1))
        assert_idle(llm)
        assert_naive(serve(llm, [(ids(60), greedy(5))]), [(ids(60), greedy(5))])


def test_fault_06_a_second_request_that_does_not_fit_yet_waits_and_takes_nothing():
    with build(num_blocks=5) as llm:
        work = [(ids(40, 1), greedy(9)), (ids(40, 2), greedy(9))]
        for request in work:
            llm.add_request(*request)
        llm.step()
        check(llm)
        assert (len(llm.scheduler.running), len(llm.scheduler.waiting)) == (1, 1)
        assert llm.scheduler.blocks.pool.num_free == 1
        outputs = finish(llm)
        assert_naive([outputs[0], outputs[1]], work)


def test_fault_07_when_the_pool_runs_out_no_sequence_gets_the_tokens_of_another():
    # rows that had no block left were skipped, and the tokens were dealt out to all rows
    with build(block_size=4, num_blocks=21) as llm:
        assert_naive(serve(llm, GROWING), GROWING)
        assert llm.scheduler.num_preemptions > 0


def test_fault_07_its_benchmark_at_an_eighth_of_the_size_in_an_eighth_of_the_pool():
    # it died of an IndexError. here: 16 requests, and blocks for about four of them
    lengths = [12 + 29 * i % 48 for i in range(16)]
    work = [(ids(n, 200 + i), greedy(24 + 7 * n % 24)) for i, n in enumerate(lengths)]
    with build(block_size=8, num_blocks=34) as llm:
        assert_naive(serve(llm, work), work)
        assert llm.scheduler.num_preemptions > 0


def test_fault_08_max_tokens_1_gives_one_token_and_0_is_refused():
    # both gave two
    with build() as llm:
        (output,) = llm.generate([ids(5)], greedy(1))
        assert output["token_ids"] == naive("era5").complete(ids(5), greedy(1))
        assert output["finish_reason"] == "length"
        with pytest.raises(ValueError, match="max_tokens"):
            SamplingParams(max_tokens=0)


def test_fault_08_a_stop_token_that_is_sampled_first_ends_the_answer():
    # the token that came out of the prefill was not looked at
    with build() as llm:
        eos = llm.tokenizer.eos_ids
        params = ending(ids(9, 3), 0, eos)
        (output,) = serve(llm, [(ids(9, 3), params)])
        assert len(output["token_ids"]) == 1 and output["token_ids"][0] in eos
        assert output["finish_reason"] == "stop" and output["text"] == ""


def test_fault_09_ignore_eos_is_read_and_an_answer_says_why_it_ended():
    # it was never read; the stop token's text was part of the answer; there was no reason
    prompt = ids(9, 3)
    with build() as llm:
        eos, decode = llm.tokenizer.eos_ids, llm.tokenizer.decode
        params = ending(prompt, 1, eos)
        ignoring = SamplingParams(
            temperature=params.temperature, max_tokens=20, seed=params.seed, ignore_eos=True
        )
        stopped, ignored = serve(llm, [(prompt, params), (prompt, ignoring)])
    assert len(stopped["token_ids"]) == 2 and stopped["token_ids"][-1] in eos
    assert stopped["text"] == decode(stopped["token_ids"][:-1])
    assert (stopped["finish_reason"], ignored["finish_reason"]) == ("stop", "length")
    assert len(ignored["token_ids"]) == 20


def test_fault_10_max_batch_size_bounds_what_runs_and_not_one_call():
    # ten ran where two were asked
    with build(max_batch_size=2) as llm:
        for i in range(10):
            llm.add_request(ids(5, i), greedy(6))
        running = []
        while not llm.is_finished():
            llm.step()
            running.append(len(llm.scheduler.running))
        assert max(running) == 2


def test_fault_11_neighbours_do_not_share_their_random_numbers():
    # it came from 42 + id + length: request 1 at length 6 had that of request 0 at length 7
    seeds, samples, positions = zip(
        *[(s, i, p) for s in range(20) for i in range(5) for p in range(100)], strict=True
    )
    values = uniform_numbers(seeds, samples, positions)
    # 10,000 of 2^24 values: by chance three pairs are equal, and not a diagonal of them
    assert len(set(values.tolist())) > 9_980
    prompt = ids(7)
    with build() as llm:
        outputs = serve(llm, [(prompt, sampled(12, seed)) for seed in range(6)])
    assert len({tuple(output["token_ids"]) for output in outputs}) == 6


def test_fault_11_no_counter_of_the_process_decides_the_random_numbers():
    unseeded = SamplingParams(max_tokens=12, ignore_eos=True)

    def texts(**kwargs):
        with build(**kwargs) as llm:
            return [o["token_ids"] for o in llm.generate([ids(7)] * 3, unseeded)]

    first = texts(seed=3)
    assert len({tuple(tokens) for tokens in first}) == 3
    with build() as other:
        other.generate([ids(9)] * 5, sampled(3, seed=1))
    assert texts(seed=3) == first
    assert texts(seed=4) != first


def test_fault_12_no_block_is_taken_before_a_token_needs_it():
    # 30 tokens and 3 new ones in 2 blocks of 16 gave 2: the third is never fed back
    with build(num_blocks=3) as llm:
        (output,) = serve(llm, [(ids(30), greedy(3))])
        assert output["token_ids"] == naive("era5").complete(ids(30), greedy(3))
        with pytest.raises(ValueError, match="3 blocks are needed, but the pool has 2"):
            llm.add_request(ids(30), greedy(4))


def test_fault_13_the_length_of_the_context_is_checked():
    with build() as llm:  # 400 tokens
        with pytest.raises(ValueError, match="400 prompt tokens, but max_model_len allows 399"):
            llm.generate([ids(400)], greedy(1))
        (output,) = serve(llm, [(ids(398), greedy(50))])
        assert len(output["token_ids"]) == 2 and output["finish_reason"] == "length"


def test_fault_13_an_empty_prompt_is_bos_alone_or_refused():
    # it raised an IndexError
    with build() as llm:
        (output,) = llm.generate([""], greedy(3))
        assert output["prompt_token_ids"] == [llm.tokenizer.bos_id]
        assert len(output["token_ids"]) == 3
        with pytest.raises(ValueError, match="a prompt needs ids"):
            llm.generate([[]], greedy(3))


def test_fault_14_the_last_step_is_the_highest_number(tmp_path):
    # compared as strings, 999999 beat 1000000
    source = FIXTURES["era1_padded"].directory
    for step, name in ((999_999, "era5"), (1_000_000, "era1_padded")):
        source = FIXTURES[name].directory
        for kind, suffix in (("model", "pt"), ("meta", "json")):
            (file,) = source.glob(f"{kind}_*.{suffix}")
            (tmp_path / f"{kind}_{step:06d}.{suffix}").write_bytes(file.read_bytes())
    assert load_model(tmp_path).recipe.era == "1"
    assert load_model(tmp_path, 999_999).recipe.era == "5"


def test_fault_14_a_trailing_slash_changes_nothing():
    # it changed where the tokenizer was looked for
    params = greedy(5)
    with LLM(str(MODEL), device="cpu", num_blocks=20) as plain:
        wanted = plain.generate("Who wrote", params)[0]["token_ids"]
    with LLM(f"{MODEL}/", device="cpu", num_blocks=20) as slash:
        assert slash.generate("Who wrote", params)[0]["token_ids"] == wanted
