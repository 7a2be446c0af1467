"""The log-probabilities of given continuations."""

from types import SimpleNamespace

import pytest
import torch
from helpers.batches import hand_made_batch
from helpers.full_engines import everything_is_free
from helpers.goldens import MODEL

from microvllm import LLM, SamplingParams
from microvllm.attention import PagedKVCache
from microvllm.checkpoint import load_model
from microvllm.features.scoring import Scoring
from microvllm.sampler import cap_logits

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llm():
    with LLM(MODEL, num_blocks=400) as llm:
        yield llm


def test_scores_are_computed_in_slices_of_64_mb_of_logits():
    """Of a vocabulary of 4 million, that is; the numbers themselves are few."""
    hidden, targets, sizes = torch.randn(10, 7), (torch.arange(10) % 7).tolist(), []

    def logits(rows):
        sizes.append(len(rows))
        return rows

    config, recipe = SimpleNamespace(vocab_size=2**22), SimpleNamespace(softcap=0)
    model = SimpleNamespace(config=config, recipe=recipe, logits=logits)
    scoring = Scoring()
    scoring.attach(SimpleNamespace(model=model))
    logprobs, is_greedy = scoring.score(hidden, targets)
    assert sizes == [4, 4, 2]
    torch.testing.assert_close(logprobs, hidden.log_softmax(-1)[range(10), targets])
    assert is_greedy.tolist() == [i == t for i, t in zip(hidden.argmax(-1), targets, strict=True)]
    recipe.softcap = 15.0  # by which two of these are made equal
    _, is_greedy = scoring.score(torch.tensor([[200.0, 201.0]] * 2), [0, 1])
    assert is_greedy.tolist() == [False, True]
    sizes.clear()
    one_by_one = Scoring(rows_at_once=1)
    one_by_one.attach(SimpleNamespace(model=model))
    one_by_one.score(hidden, targets)
    assert sizes == [1] * 10


def test_a_multiple_choice_question_is_answered_by_scores(llm):
    names = ["Charles Dickens", "Bram Stoker", "Jane Austen", "Mark Twain"]
    # the conversation is long enough to fill a block, which the four continuations share
    turn = {"role": "user", "content": "Who wrote Emma?"}, {"role": "assistant", "content": "Jane."}
    prompt = llm.tokenizer.render_for_completion(
        [*turn, {"role": "user", "content": "Who wrote Dracula?"}]
    )
    before = llm.stats()["prefill_tokens"]
    scores = llm.score([prompt] * 4, [f"Dracula was written by {name}" for name in names])
    totals = [sum(s) for s in scores]
    assert names[totals.index(max(totals))] == "Bram Stoker"
    assert len(prompt) > 16 and llm.stats()["prefill_tokens"] - before <= 4 * len(prompt) - 3 * 16
    assert everything_is_free(llm)


@pytest.mark.parametrize("budget", [1, 5, 1000])
def test_scores_are_the_log_softmax_of_a_plain_forward(budget):
    model = load_model(MODEL)
    with LLM(MODEL, num_blocks=60, max_batched_tokens=budget) as llm:
        prompts = ["It was the best of times,", "It was the best of", [7]]
        tails = [" it was the worst of times", " x", [9]]
        scores = llm.score(prompts, tails)
        for prompt, tail, got in zip(prompts, tails, scores, strict=True):
            ids = llm.tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else prompt
            tail = llm.tokenizer.encode(tail) if isinstance(tail, str) else tail
            tokens = ids + tail
            batch = hand_made_batch([(tokens, 0, len(tokens), range(1, 9))], 16)
            cache = PagedKVCache(model.config, 9, 16, model.dtype, model.device)
            logits = cap_logits(model.logits(model.forward(batch, cache)), model.recipe.softcap)
            wanted = torch.log_softmax(logits, -1)[range(len(ids) - 1, len(tokens) - 1), tail]
            assert torch.tensor(got).sub(wanted).abs().max() < 1e-4
            assert len(got) == len(tail)


@pytest.mark.parametrize("budget", [3, 1000])
def test_a_continuation_that_temperature_0_writes_is_judged_greedy_to_its_last_token(budget):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(MODEL, num_blocks=60, max_batched_tokens=budget) as llm:
        prompts = ["It was the best of times,", "My uncle"]
        written = [o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)]
        other = [[*ids[:5], ids[5] ^ 1, *ids[6:]] for ids in written]
        found = llm.judge(prompts * 2, written + other)
        scores = llm.score(prompts * 2, written + other)
    assert [o["logprobs"] for o in found] == [pytest.approx(s, abs=1e-5) for s in scores]
    assert [o["greedy"] for o in found[:2]] == [[True] * 12] * 2
    for output in found[2:]:
        assert output["greedy"][:6] == [True] * 5 + [False]


def test_a_prompt_whose_every_block_is_cached_is_still_judged_from_its_last_token(llm):
    cold, warm = [llm.score([[8] * 32], [[6, 7]])[0] for _ in range(2)]
    assert warm == pytest.approx(cold, abs=1e-5) and max(warm) < 0


def test_scoring_runs_beside_generation_and_refuses_what_does_not_fit(llm):
    params = SamplingParams(temperature=0.8, max_tokens=20, seed=2)
    alone = llm.generate(["Once"], params)[0]["token_ids"]
    request = llm.add_request("Once", params)
    llm.step()
    assert llm.score(["a"], ["b"])[0][0] < 0
    (output,) = [o for _ in range(25) for o in llm.step()]
    assert (output["request_id"], output["token_ids"]) == (request, alone)
    with pytest.raises(ValueError, match="continuations"):
        llm.score(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="max_model_len"):
        llm.score([[5] * 600], [[5] * 600])
    with pytest.raises(ValueError, match="at least one"):
        llm.score(["a"], [[]])


def test_step_returns_the_scores_of_a_queued_continuation_and_counts_its_hits(llm):
    pairs = [("It was the best of times, it was the", " worst of times"), ([5] * 40, [6, 7])]
    wanted = llm.score(*zip(*pairs, strict=True))
    before = llm.stats()
    ids = [llm.add_request(prompt, continuation=tail) for prompt, tail in pairs]
    found = {}
    while not llm.is_finished():
        found |= {output.request_id: output for output in llm.step()}
    for request, scores in zip(ids, wanted, strict=True):
        assert found[request].logprobs == pytest.approx(scores, abs=1e-5)
    assert found[ids[1]].num_cached_tokens == 32 and found[ids[1]].finish_reason == "length"
    assert llm.stats()["requests"] - before["requests"] == 2
    with pytest.raises(ValueError, match="max_model_len"):
        llm.add_request([5] * 600, continuation=[5] * 600)


def test_what_was_not_judged_has_no_log_probability(llm):
    # 0.0 would say that the model was certain
    number = llm.add_request([5] * 20, continuation=[6] * 30)
    llm.abort(number)
    (output,) = llm.step()
    assert output["finish_reason"] == "abort" and output["logprobs"] == [None] * 30
    assert output["greedy"] == [None] * 30


def test_an_empty_continuation_is_named(llm):
    for empty in ("", []):
        with pytest.raises(ValueError, match=r"continuations\[0\]: the continuation is empty"):
            llm.score(["a"], [empty])
    with pytest.raises(TypeError, match="unknown argument 'tool'"):
        llm.add_request("a", continuation="b", tool=True)
