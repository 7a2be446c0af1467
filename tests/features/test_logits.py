"""What a request may ask of its logits: against a naive loop over one row, by the frequencies of
the draws, and mixed; then through an engine."""

import math
import operator
import re
from dataclasses import replace
from functools import lru_cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.engines import finish, question, serve
from helpers.failures import PLACES, Fault, failing
from helpers.full_engines import (
    assert_idle,
    build,
    everything_is_free,
    greedy,
    ids,
    sampled,
    set_overlap,
)
from helpers.goldens import FIXTURES, MODEL
from helpers.sampling import (
    FILTERS,
    History,
    V,
    assert_fair,
    assert_naive_frequencies,
    ban_even,
    favour_the_last,
    logits_of,
    naive_edits,
    naive_probabilities,
    refuse,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from microvllm import LLM, SamplingParams, sampler
from microvllm.checkpoint import load_model
from microvllm.features import logits as feature
from microvllm.features.logits import LogitsExtension, unpack_logprobs
from microvllm.loading import pick_backend
from microvllm.sampler import to_device, uniform_numbers
from microvllm.scheduler import Chunk, Plan, Sequence

pytestmark = pytest.mark.usefixtures("one_thread")

STOP_IDS = frozenset({7, 8})
GREEDY = SamplingParams(temperature=0, max_tokens=24)
both_loops = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "ahead"])


@pytest.fixture(params=["numba", pytest.param("sdpa", marks=pytest.mark.slow)])
def backend(request):
    """What a CPU does, and the plain torch of other devices."""
    return request.param


def history_of(rows: int, seed: int = 0, num_prompt: int = 6, length: int = 16) -> list[History]:
    """Texts with many repetitions, and behind each what must not be looked at."""
    rng = np.random.default_rng(seed)
    texts = rng.integers(0, 12, (rows, length)).tolist()
    return [History([*text, ~0], num_prompt, length, STOP_IDS) for text in texts]


def pick(plan: Plan, logits, temperature, uniform, softcap, backend: str) -> torch.Tensor:
    """(R,) tokens, as the runner and the extension draw them."""
    kernels = pick_backend(backend, torch.device("cpu"), torch.float32)
    model = SimpleNamespace(recipe=SimpleNamespace(softcap=softcap))
    extension = LogitsExtension()
    extension.attach(SimpleNamespace(model=model, runner=SimpleNamespace(sample=kernels.sample)))
    tokens = kernels.sample(logits, plan.params, temperature, uniform, softcap)
    batch = SimpleNamespace(temperature=temperature, uniform=uniform)
    extension.on_sampled(plan, batch, logits, tokens)
    return tokens


def planned(params, history=None) -> Plan:
    """A plan that draws a token for each of these parameters."""
    plan = Plan()
    for p, h in zip(params, history or history_of(len(params)), strict=True):
        seq = Sequence(len(plan.draws), h.tokens[: h.num_prompt], p, stop_token_ids=h.stop_ids)
        seq.token_ids = h.tokens
        plan.draws.append(len(plan.chunks), seq, h.position)
        plan.chunks.append(Chunk(seq, h.position - 1, h.position, ()))
    return plan


def run(logits, params, uniform, history=None, softcap=0.0, backend="numba"):
    """The tokens and, by row, the log-probabilities."""
    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float32)
    uniform = torch.as_tensor(uniform, dtype=torch.float32)
    plan, before = planned(params, history), logits.clone()
    tokens = pick(plan, logits, temperature, uniform, softcap, backend)
    assert torch.equal(before, logits), "the model's logits were changed"
    if "logprobs" not in plan.results:
        return tokens, {}
    scored = [i for i, p in enumerate(params) if p.logprobs is not None]
    packed = plan.results["logprobs"].numpy()
    entries = {
        i: unpack_logprobs(bits, params[i].logprobs) for i, bits in zip(scored, packed, strict=True)
    }
    return tokens, entries


def flat(scores: dict) -> list[float]:
    row = (scores["token_id"], scores["logprob"], scores["sampler_logprob"])
    return [number for entry in (row, *scores["top"]) for number in entry]


# a row, the slow and obvious way ------------------------------------------------------------------

WORDS = ((3,), (1, 4), (2, 0, 5))
EDITS = {
    "allowed": {"allowed_token_ids": (5, 9, 11, 30, 59)},
    "bias": {"logit_bias": {0: 3.5, 59: 2.0, 17: -100.0}},
    "bad words": {"bad_words": WORDS},
    "min_tokens": {"min_tokens": 11},
    "enough tokens": {"min_tokens": 10},
    "repetition": {"repetition_penalty": 1.8},
    "reward of repetition": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.8},
    "processor": {"logits_processor": ban_even},
    "processor that looks": {"logits_processor": favour_the_last},
    "everything": {
        "temperature": 1.2, "top_k": 25, "top_p": 0.93, "min_p": 0.01, "repetition_penalty": 1.2,
        "presence_penalty": -0.4, "frequency_penalty": 0.3, "min_tokens": 12,
        "logit_bias": {4: 2.0, 8: 50.0}, "allowed_token_ids": tuple(range(0, 60, 3)) + (4, 7, 8),
        "bad_words": WORDS, "logits_processor": favour_the_last,
    },
}  # fmt: skip
ALL = FILTERS | EDITS


def naive(logits: list[float], p: SamplingParams, h: History) -> np.ndarray:
    return naive_probabilities(naive_edits(logits, p, h), p)


@pytest.mark.parametrize("name", EDITS)
def test_each_edit_gives_the_frequencies_of_a_naive_row(backend, name):
    params = SamplingParams(**EDITS[name])
    for seed in range(2):
        logits, history = logits_of(1, seed=seed), history_of(1, seed=seed)

        def draw(logits, uniform, history=history):
            count = len(logits)
            return run(logits, [params] * count, uniform, history * count, backend=backend)[0]

        expected = naive(logits[0].double().tolist(), params, history[0])
        assert_naive_frequencies(draw, logits, expected)
    assert_fair(draw, logits, expected, 8000)


def test_rows_with_different_filters_are_as_they_are_alone(backend):
    """All of them twice in one batch, shuffled, greedy ones among them: no row sees another."""
    params = [SamplingParams(**given) for given in ALL.values()] * 2
    params += [replace(p, temperature=0.0) for p in params]
    params += [replace(p, logprobs=2) for p in params[::3]]
    order = np.random.default_rng(1).permutation(len(params))
    params = [params[i] for i in order]
    logits, history = logits_of(len(params)), history_of(len(params))
    uniform = uniform_numbers(range(len(params)), [0] * len(params), [3] * len(params))
    together, scores = run(logits, params, uniform, history, 15.0, backend)
    assert scores.keys() == {i for i, p in enumerate(params) if p.logprobs == 2}
    for i, p in enumerate(params):
        row = slice(i, i + 1)
        alone, own = run(logits[row], [p], uniform[row], history[row], 15.0, backend)
        assert alone.tolist() == [together[i]]
        if p.logprobs is not None:
            assert flat(own[0]) == pytest.approx(flat(scores[i]), abs=1e-5)


def test_both_backends_draw_the_same():
    params = [SamplingParams(**given) for given in ALL.values()] * 20
    logits, history = logits_of(len(params), seed=9), history_of(len(params), seed=9)
    uniform = uniform_numbers(range(len(params)), [1] * len(params), [4] * len(params))
    numba, _ = run(logits, params, uniform, history, 15.0, "numba")
    assert torch.equal(numba, run(logits, params, uniform, history, 15.0, "sdpa")[0])


def test_asking_for_log_probabilities_does_not_change_the_tokens(backend):
    params = [SamplingParams(**given) for given in ALL.values()]
    params += [replace(p, temperature=0.0) for p in params]
    logits, history = logits_of(len(params)), history_of(len(params))
    uniform = uniform_numbers(range(len(params)), [0] * len(params), [8] * len(params))
    tokens, _ = run(logits, params, uniform, history, 15.0, backend)
    asking = [replace(p, logprobs=0) for p in params]
    assert torch.equal(run(logits, asking, uniform, history, 15.0, backend)[0], tokens)


@pytest.mark.parametrize("name", ALL)
def test_greedy_is_the_argmax_after_the_edits(backend, name):
    params = replace(SamplingParams(**ALL[name]), temperature=0.0)
    logits, history = logits_of(20), history_of(20)
    logits[:, 50] = logits[:, 10] = logits.max(-1).values  # the lowest id of equals
    tokens = run(logits, [params] * 20, torch.rand(20), history, backend=backend)[0].tolist()
    expected = [naive_edits(x.tolist(), params, h) for x, h in zip(logits, history, strict=True)]
    assert tokens == [int(np.argmax(np.array(x, np.float32))) for x in expected]


def test_greedy_rows_tell_logits_apart_that_the_cap_makes_equal(backend):
    """Among rows that are edited or scored as when all are greedy."""
    logits = logits_of(4)
    logits[:, 20], logits[:, 40] = 200.0, 201.0  # tanh is 1 for both
    greedy, score = SamplingParams(temperature=0), SamplingParams(temperature=0, logprobs=1)
    hot, biased = SamplingParams(temperature=5.0), SamplingParams(logit_bias={3: 1.0})
    params = [greedy, hot, score, biased]
    mixed, _ = run(logits, params, [0.9] * 4, softcap=15.0, backend=backend)
    assert mixed[[0, 2]].tolist() == [40, 40]


# what is not used ---------------------------------------------------------------------------------


def test_plain_rows_go_through_no_filter(monkeypatch):
    """Nor do greedy ones whose argmax survives them, and no history is needed."""
    monkeypatch.setattr(LogitsExtension, "sample_again", refuse)
    monkeypatch.setattr(Plan, "text_before", refuse)
    params = [SamplingParams(), SamplingParams(temperature=0, top_k=3), SamplingParams(top_p=0.5)]
    pick(planned(params), logits_of(3), torch.tensor([1.0, 0.0, 1.0]), torch.rand(3), 15.0, "numba")


@pytest.mark.parametrize("uses", [("bad_words", "min_tokens"), ("logits_processor",)])
def test_an_edit_that_no_row_uses_does_not_run(monkeypatch, uses):
    calls = []
    forbid, watched_handlers = feature.forbid, feature.watched_handlers

    def seen_forbid(logits, forbidden):
        if "bad_words" in uses:
            calls.extend(filter(None, forbidden.values()))
        forbid(logits, forbidden)

    def seen_handlers():
        if "logits_processor" in uses:
            calls.append("processors")
        return watched_handlers()

    monkeypatch.setattr(feature, "forbid", seen_forbid)
    monkeypatch.setattr(feature, "watched_handlers", seen_handlers)
    others = [given for given in ALL.values() if not given.keys() & set(uses)]
    params = [SamplingParams(**given) for given in others]
    run(logits_of(len(params)), params, [0.5] * len(params))
    assert not calls
    params[0] = SamplingParams(**EDITS["everything"])
    run(logits_of(len(params)), params, [0.5] * len(params))
    assert len(calls) == 1


def test_what_a_step_asks_of_each_row_is_known_beforehand():
    def flags(**given):
        p = SamplingParams(**given)
        return "".join(
            letter
            for letter, flag in zip(
                "pehT",
                (p.has_plain_logits, p.edits_logits, p.needs_history, p.drops_tokens),
                strict=True,
            )
            if flag
        )

    neutral = {"top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "logit_bias": {}}
    assert flags() == flags(**neutral) == flags(bad_words=[], presence_penalty=0.0) == "p"
    assert flags(stop="x", stop_token_ids=[3], n=4, seed=1, ignore_eos=True) == "p"
    assert flags(temperature=0, top_k=5, top_p=0.5, min_p=0.5) == "p"
    assert flags(top_k=5) == flags(top_p=0.5) == flags(min_p=0.5) == "pT"
    assert flags(logprobs=0) == ""
    assert flags(logit_bias={1: 1}) == flags(allowed_token_ids=[1]) == flags(min_tokens=1) == "e"
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert flags(**{name: 0.5}) == "eh"
    assert flags(bad_words=["a"]) == flags(logits_processor=ban_even) == "eh"
    assert flags(min_tokens=1, allowed_token_ids=[1]) == "eh"  # no token may be left


# nothing left -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"allowed_token_ids": [3], "bad_words": [[3]]},
        {"allowed_token_ids": [7, 8], "min_tokens": 100},
        {"logits_processor": lambda tokens, logits: torch.full_like(logits, -torch.inf)},
        {"logits_processor": lambda tokens, logits: logits * torch.nan},
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_any_token_gets_minus_one_and_the_others_theirs(backend, given, temperature):
    params = [SamplingParams(), SamplingParams(temperature, **given), SamplingParams(0.0)]
    logits, history = logits_of(3), history_of(3)
    tokens = run(logits, params, [0.5] * 3, history, backend=backend)[0].tolist()
    alone = [run(logits[i : i + 1], [params[i]], [0.5], backend=backend)[0].item() for i in (0, 2)]
    assert tokens == [alone[0], -1, alone[1]]
    scored = [replace(p, logprobs=1) for p in params]
    assert run(logits, scored, [0.5] * 3, history, backend=backend)[0].tolist() == tokens


def test_a_processor_that_returns_no_logits_is_named():
    for result, words in [(None, "None"), (torch.zeros(3), r"\(3,\)"), ([0.0] * V, "0.0")]:
        params = SamplingParams(logits_processor=lambda tokens, logits, result=result: result)
        plan = planned([params], history_of(1))
        given = plan, logits_of(1), torch.ones(1), torch.tensor([0.5]), 0.0, "numba"
        assert pick(*given).tolist() == [-1]
        error = plan.errors[0]
        wanted = rf"logits_processor: TypeError: logits_processor must return .*\({V},\).*{words}"
        assert re.match(wanted, error)


def test_a_processor_may_return_a_mask():
    # True and False were taken for logits of 1 and 0
    def odd(tokens, logits):
        return torch.arange(len(logits)) % 2 == 1

    logits = logits_of(20)
    params = [SamplingParams(temperature=0, logits_processor=odd)] * 20
    tokens, _ = run(logits, params, [0.5] * 20)
    wanted = logits.clone()
    wanted[:, ::2] = -torch.inf
    assert tokens.tolist() == wanted.argmax(-1).tolist()


def test_a_tiny_temperature_has_log_probabilities():
    # logits of 1e12 divided by 1e-29 are infinite, and were NaN after the softmax
    logits = logits_of(1) * 1e12
    params = SamplingParams(temperature=1e-29, logprobs=2)
    tokens, rows = run(logits, [params], [0.5])
    assert tokens.tolist() == [int(logits.argmax())] and rows[0]["sampler_logprob"] == 0.0
    assert [other[2] for other in rows[0]["top"]] == [-math.inf] * 2


def test_too_many_bad_words_are_refused():
    words = [[i % V, i % 7] for i in range(10_001)]
    assert len(SamplingParams(bad_words=words[:-1]).bad_words) == 10_000
    with pytest.raises(ValueError, match="at most 10,000 bad_words, got 10,001"):
        SamplingParams(bad_words=words)


def test_a_processor_sees_the_tokens_so_far_and_float32_logits():
    seen = []

    def look(tokens, logits):
        seen.append((tokens, logits.clone()))
        return logits

    history = history_of(2)
    logits = logits_of(2).bfloat16()
    params = [SamplingParams(logits_processor=look), SamplingParams(logits_processor=look)]
    run(logits, params, [0.5] * 2, history, softcap=15.0)
    for (tokens, given), h, row in zip(seen, history, logits, strict=True):
        assert tokens == h.tokens[:16] and isinstance(tokens, list)
        torch.testing.assert_close(given, 15 * torch.tanh(row.float() / 15), rtol=0, atol=5e-6)


def test_bad_words_span_prompt_and_output():
    """The first token of a word may be the prompt's last; a word longer than the text is none."""
    params = SamplingParams(temperature=0, bad_words=[[1, 2], [9] * 9])
    logits = torch.zeros(1, V)
    logits[0, 2] = 5.0
    assert run(logits, [params], [0.5], [History([0, 1], 2, 2)])[0].tolist() == [0]
    assert run(logits, [params], [0.5], [History([1, 0], 2, 2)])[0].tolist() == [2]
    logits[0, 9] = 6.0
    assert run(logits, [params], [0.5], [History([9] * 7, 2, 7)])[0].tolist() == [9]
    assert run(logits, [params], [0.5], [History([9] * 8, 2, 8)])[0].tolist() == [2]


# log-probabilities --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_log_probabilities_of_the_model_and_of_the_sampler(backend, name, temperature):
    params = replace(SamplingParams(**ALL[name]), temperature=temperature, logprobs=4)
    logits, history = logits_of(6), history_of(6)
    tokens, listed = run(logits, [params] * 6, torch.rand(6), history, 15.0, backend)
    capped = 15 * torch.tanh(logits.double() / 15)
    model = torch.log_softmax(capped, -1)
    assert list(listed) == list(range(6))
    for i, row in listed.items():
        token, top = row["token_id"], row["top"]
        assert token == tokens[i]
        with np.errstate(divide="ignore"):
            drawn = np.log(naive(capped[i].tolist(), params, history[i]))
        likely = [int(t) for t in model[i].argsort(descending=True) if t != token][:4]
        assert [t for t, _, _ in top] == likely
        for t, logprob, sampler_logprob in [(token, row["logprob"], row["sampler_logprob"]), *top]:
            assert logprob == pytest.approx(float(model[i, t]), abs=1e-5)
            assert sampler_logprob == pytest.approx(drawn[t], abs=2e-5)
        assert temperature > 0 or row["sampler_logprob"] == 0


def test_each_row_gets_as_many_alternatives_as_it_asks_for():
    params = [SamplingParams(logprobs=k) for k in (0, None, 3, 1, 2**31 - 1)]
    _, listed = run(logits_of(5), params, [0.5] * 5)
    assert {row: len(entry["top"]) for row, entry in listed.items()} == {0: 0, 2: 3, 3: 1, 4: V - 1}
    ids = [t for t, _, _ in listed[4]["top"]]
    assert sorted([*ids, listed[4]["token_id"]]) == list(range(V))
    total = sum(math.exp(lp) for _, lp, _ in listed[4]["top"]) + math.exp(listed[4]["logprob"])
    assert total == pytest.approx(1, abs=1e-5)
    assert run(logits_of(1), [SamplingParams()], [0.5])[1] == {}


def test_a_device_is_never_waited_for(monkeypatch):
    """On the device "meta", which has no numbers: to read one, or to ask how many are true, is an
    error there. And whatever goes up, goes through `to_device`, from pinned memory."""
    sent, uploads = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            devices = [t.device.type for t in tree_leaves((args, out)) if torch.is_tensor(t)]
            uploads.extend([func] * ("cpu" in devices and "meta" in devices))
            return out

    assign = torch.Tensor.__setitem__

    def assigned(self, index, value):
        # on CUDA alone torch makes a number a tensor on the CPU, and waits for its copy
        by_tensors = any(map(torch.is_tensor, tree_leaves(index)))
        assert torch.is_tensor(value) or not by_tensors, "a number, by an index of tensors"
        assign(self, index, value)

    monkeypatch.setattr(torch.Tensor, "__setitem__", assigned)
    for module in sampler, feature:
        monkeypatch.setattr(
            module, "to_device", lambda *args: sent.append(args) or to_device(*args)
        )
    params = [
        SamplingParams(),
        SamplingParams(top_k=3, top_p=0.5, min_p=0.1, logprobs=2, logit_bias={3: 1.0}),
        SamplingParams(repetition_penalty=1.2, presence_penalty=0.1, frequency_penalty=0.2),
        SamplingParams(bad_words=((3, 4),), min_tokens=5, allowed_token_ids=[1, 2], logprobs=1),
        SamplingParams(temperature=0, logits_processor=lambda token_ids, logits: 2 * logits),
    ]
    plan = planned(params, [History([1, 2, 3, 4, 5], 2, 5, (7,))] * len(params))
    numbers = torch.empty(len(params), device="meta")
    logits = torch.empty(len(params), 90, device="meta")
    with Watch():
        tokens = pick(plan, logits, numbers, numbers, 15.0, "sdpa")
    assert tokens.shape == (5,) and plan.results["logprobs"].shape == (2, 3, 4)
    assert len(uploads) == len(sent) > 20
    with pytest.raises(NotImplementedError):
        numbers[numbers > 0]


# through the engine -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm():
    with LLM(MODEL, num_blocks=400) as llm:
        yield llm


def test_log_probabilities_of_greedy_tokens_are_those_that_score_gives(llm):
    prompt = question(llm, "Who wrote Dracula?")
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=2)
    output = llm.generate([prompt], params)[0]
    (scores,) = llm.score([prompt], [output["token_ids"]])
    entries = output["logprobs"]
    assert [e["token_id"] for e in entries] == output["token_ids"]
    assert max(abs(e["logprob"] - s) for e, s in zip(entries, scores, strict=True)) < 1e-4
    assert all(e["sampler_logprob"] == 0 and len(e["top"]) == 2 for e in entries)
    assert "logprobs" not in llm.generate([prompt], GREEDY)[0]


@pytest.mark.parametrize("overlap", [False, True])
def test_filters_are_kept_by_the_engine_in_a_mixed_batch(overlap):
    with LLM(MODEL, num_blocks=200) as llm:
        set_overlap(llm, overlap)
        prompt = question(llm, "Who wrote Dracula?")
        plain = llm.generate([prompt], GREEDY)[0]
        end = llm.tokenizer.special_tokens["<|assistant_end|>"]
        seen = []

        def only_fives(token_ids, logits):
            seen.append(list(token_ids))
            return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor([5]), 0.0)

        params = [
            SamplingParams(temperature=0, max_tokens=24, bad_words=["Bram"]),
            SamplingParams(temperature=0, max_tokens=24, min_tokens=20),
            SamplingParams(temperature=0.9, max_tokens=12, allowed_token_ids=[7, 8], seed=1),
            SamplingParams(temperature=0, max_tokens=4, logit_bias={9: 1e5}),
            SamplingParams(temperature=0, max_tokens=6, frequency_penalty=1e5),
            SamplingParams(temperature=0, max_tokens=5, logits_processor=only_fives),
            SamplingParams(temperature=0.8, max_tokens=9, logprobs=0, n=2, top_p=0.9, seed=3),
            GREEDY,
        ]
        outputs = llm.generate([prompt] * len(params), params)
        assert "Bram" not in outputs[0]["text"] and "Bram" in plain["text"]
        assert end not in outputs[1]["token_ids"][:20] and end in plain["token_ids"]
        assert set(outputs[2]["token_ids"]) == {7, 8}
        assert outputs[3]["token_ids"] == [9] * 4
        assert len(set(outputs[4]["token_ids"])) == 6
        assert outputs[5]["token_ids"] == [5] * 5
        assert seen == [prompt + [5] * k for k in range(5)]
        assert [len(s["logprobs"]) for s in outputs[6]["samples"]] == [9, 9]
        assert all(e["sampler_logprob"] >= e["logprob"] - 3 for e in outputs[6]["logprobs"])
        assert outputs[7]["token_ids"] == plain["token_ids"]
        assert everything_is_free(llm)


def test_a_row_with_nothing_left_to_draw_ends_alone(llm):
    stuck = SamplingParams(
        temperature=0, max_tokens=9, logits_processor=lambda ids, x: x * torch.nan
    )
    failed, fine = llm.generate(["Once", "Once"], [stuck, GREEDY])
    assert (failed["finish_reason"], failed["token_ids"]) == ("error", [])
    assert fine["token_ids"] == llm.generate(["Once"], GREEDY)[0]["token_ids"]
    assert everything_is_free(llm)


def test_a_stream_says_that_a_sample_ended_before_its_first_token(llm):
    stuck = replace(GREEDY, n=2, logits_processor=lambda ids, x: x * torch.nan)
    events = [event for event in llm.stream(["Once", "Once"], [stuck, GREEDY]) if not event.index]
    assert [(event.sample, event.text, event.token_ids) for event in events] == [
        (0, "", []),
        (1, "", []),
    ]
    assert {event.finish_reason for event in events} == {"error"}
    assert everything_is_free(llm)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_logits_processor_that_raises_ends_its_request_alone(overlap):
    def third_time_fails(token_ids, logits):
        if len(token_ids) - len(prompt) == 2:
            raise KeyError("no rule for this")
        return logits

    def too_short(token_ids, logits):
        return logits[:3]

    with LLM(MODEL, num_blocks=100) as llm:
        set_overlap(llm, overlap)
        prompt = llm.tokenizer.encode("Once upon a time", bos=True)
        greedy = SamplingParams(temperature=0, max_tokens=9)
        plain = llm.generate([prompt], greedy)[0]["token_ids"]
        params = [
            SamplingParams(temperature=0, max_tokens=9, logits_processor=third_time_fails),
            SamplingParams(temperature=0, max_tokens=9, logits_processor=too_short),
            greedy,
        ]
        ids = [llm.add_request(prompt, p) for p in params]
        outputs = {}
        while not llm.is_finished():
            outputs |= {output["request_id"]: output for output in llm.step()}
            llm.scheduler.blocks.check(llm.scheduler.running)
        late, bad, fine = (outputs[i] for i in ids)
        assert (late["finish_reason"], late["token_ids"]) == ("error", plain[:2])
        assert late["stop_reason"] == "logits_processor: KeyError: 'no rule for this'"
        assert bad["finish_reason"] == "error" and bad["token_ids"] == []
        assert "must return logits of shape" in bad["stop_reason"]
        assert fine["token_ids"] == plain
        assert everything_is_free(llm)


class Flaky:
    """A server that answers every other time."""

    def __init__(self):
        self.calls = 0

    def answer(self, tokens, logits):
        self.calls += 1
        if self.calls % 2:
            raise ConnectionError("no answer")
        return logits

    __call__ = answer


def mute(tokens, logits):
    class Mute(Exception):
        def __str__(self):
            raise ValueError

    raise Mute


# callables that have no frame of their own, or not where a traceback of theirs begins
CALLABLES = {
    "function": lambda: calling(Flaky().answer),
    "method": lambda: Flaky().answer,
    "object": Flaky,
    "partial": lambda: partial(Flaky.answer, Flaky()),
    "cached": lambda: CachedCall(),
    "of C": lambda: operator.methodcaller("nothing"),
    "begun": lambda: begins_partial(Flaky()),
    "begin of C": lambda: Begins(operator.itemgetter(10**6)),
    "not a message": lambda: mute,
    "another shape": lambda: lambda tokens, logits: logits[:3],
    "a tensor without data": lambda: lambda tokens, logits: logits.to("meta"),
}


def calling(function):
    return lambda tokens, logits: function(tokens, logits)


def begins_partial(flaky: Flaky):
    return Begins(lambda prompt: partial(Flaky.answer, flaky))


class CachedCall:
    """It goes through lru_cache, which is of C."""

    def __init__(self):
        self.ask = lru_cache(Flaky().answer)

    def __call__(self, tokens, logits):
        return self.ask(tuple(tokens), logits)


@pytest.mark.parametrize("name", CALLABLES)
def test_any_callable_that_fails_ends_its_own_request_and_no_step(name):
    with build() as llm:
        good = llm.add_request(ids(9, 2), sampled(9, seed=4))
        bad = llm.add_request(ids(18), sampled(9, seed=1, logits_processor=CALLABLES[name]()))
        outputs = finish(llm)
        assert_idle(llm)
    assert outputs[good]["finish_reason"] == "length"
    assert (outputs[bad]["finish_reason"], outputs[bad]["token_ids"]) == ("error", [])
    assert outputs[bad]["stop_reason"].startswith("logits_processor: ")


# with state ---------------------------------------------------------------------------------------


class NoneTwice:
    """No sample has a token of its output twice. What it has is state of the sample."""

    def __init__(self):
        self.asked: list[list[int]] = []  # of each function that was begun, the lengths it got

    def begin(self, prompt_ids):
        used, lengths = set(), []
        self.asked.append(lengths)

        def ban(token_ids, logits):
            used.update(token_ids[lengths[-1] if lengths else len(prompt_ids) :])  # the new ones
            lengths.append(len(token_ids))
            logits[list(used)] = -torch.inf
            return logits

        return ban


def no_token_twice(token_ids, logits, num_prompt):
    """The same without state."""
    logits[token_ids[num_prompt:]] = -torch.inf
    return logits


# greedy, of a model that repeats itself; sampled; samples that split; and one without a processor
STATEFUL = [
    (ids(18, 1), sampled(9, seed=3, n=3, temperature=0.2)),
    (ids(18, 1), sampled(12, seed=0, temperature=0)),
    (ids(26, 3), sampled(6, seed=1, n=2)),
]


def with_processors(*processors) -> list:
    pairs = zip(STATEFUL, processors, strict=True)
    work = [(prompt, replace(params, logits_processor=f)) for (prompt, params), f in pairs]
    return [*work, (ids(9, 2), sampled(9, seed=4))]


def stateful() -> list:
    return with_processors(*[NoneTwice() for _ in STATEFUL])


def begun(work) -> list[list[list[int]]]:
    return [params.logits_processor.asked for _, params in work[:-1]]


def token_lists(outputs) -> list:
    return [[sample["token_ids"] for sample in output["samples"]] for output in outputs]


@pytest.fixture(scope="module")
def wanted():
    """What the processors without state give."""
    functions = [partial(no_token_twice, num_prompt=len(prompt)) for prompt, _ in STATEFUL]
    with build() as llm:
        found = token_lists(serve(llm, with_processors(*functions)))
        assert found != token_lists(serve(llm, [*STATEFUL, (ids(9, 2), sampled(9, seed=4))]))
    return found


@both_loops
def test_each_sample_has_a_state_of_its_own_and_is_asked_once_for_each_token(wanted, overlap):
    work = stateful()
    with build(overlap=overlap) as llm:
        assert token_lists(serve(llm, work)) == wanted
    for (prompt, params), asked in zip(work, begun(work), strict=False):
        once = list(range(len(prompt), len(prompt) + params.max_tokens))
        assert asked == [once] * params.n


@both_loops
def test_a_state_outlives_a_preemption(wanted, overlap):
    work = stateful()
    with build(overlap=overlap, block_size=4, num_blocks=20, max_batched_tokens=16) as llm:
        assert token_lists(serve(llm, work)) == wanted
        assert llm.stats()["preemptions"] > 0
    for (prompt, params), asked in zip(work, begun(work), strict=False):
        once = list(range(len(prompt), len(prompt) + params.max_tokens))
        assert asked == [once] * params.n


def live(work, overlap: bool, place: str, at: int | None = None) -> tuple[list, int]:
    """The tokens of all samples, with one failure; and how often its place was called."""
    with build(overlap=overlap, block_size=4, num_blocks=22, max_batched_tokens=16) as llm:
        with failing(llm, place, at) as calls:
            requests, outputs, failed = [llm.add_request(*request) for request in work], {}, 0
            while not llm.is_finished():
                try:
                    outputs |= {output["request_id"]: output for output in llm.step()}
                except Fault:
                    failed += 1
        assert failed == (at is not None)
        assert_idle(llm)
    return token_lists([outputs[i] for i in requests]), calls[0]


@both_loops
@pytest.mark.parametrize("place", [name for name in PLACES if name != "make_batch"])  # see upload
def test_a_state_is_begun_anew_after_a_step_that_failed(wanted, place, overlap):
    _, count = live(stateful(), overlap, place)
    work = stateful()
    assert live(work, overlap, place, count // 2)[0] == wanted
    for asked in begun(work):
        for lengths in asked:  # each of them in order, without a gap
            assert lengths == list(range(lengths[0], lengths[0] + len(lengths)))
    assert sum(map(len, begun(work))) > sum(params.n for _, params in STATEFUL)


def test_a_state_is_begun_anew_with_new_weights():
    work = [(ids(18, 1), sampled(9, seed=3, temperature=0, logits_processor=NoneTwice()))]
    with build() as llm:
        (request,) = [llm.add_request(*request) for request in work]
        for _ in range(4):
            llm.step()
        llm.update_weights(load_model(FIXTURES["era5"].directory).state_dict())
        (output,) = finish(llm)[request]["samples"]
    assert len(set(output["token_ids"])) == 9
    first, second = work[0][1].logits_processor.asked
    assert first + second == list(range(18, 27)) and len(first) == 4


class Begins:
    """A processor with state, made of a function."""

    def __init__(self, begin, may_guess=False):
        self.begin, self.may_guess = begin, may_guess


def fails_once(state: list, token_ids, logits):
    """It raises at a token that it has not seen, and has seen it then."""
    new = token_ids[len(state) :]
    state += new
    if len(state) == 20 and new:
        raise KeyError("new to me")
    return logits


@pytest.mark.parametrize(
    ("begin", "told", "count"),
    [
        (lambda prompt: {}[3], "KeyError: 3", 0),
        (lambda prompt: None, "TypeError: 'NoneType' object is not callable", 0),
        (lambda prompt: lambda tokens, logits: None, "TypeError: logits_processor must return", 0),
        # it has no frame of its own
        (lambda prompt: partial(fails_once, []), "KeyError: 'new to me'", 2),
    ],
)
def test_a_processor_with_state_that_fails_ends_its_request_alone(begin, told, count):
    params = sampled(9, seed=1, logits_processor=Begins(begin))
    with build() as llm:
        plain, bad = serve(llm, [(ids(18), sampled(9, seed=1)), (ids(18), params)])
    assert plain["finish_reason"] == "length"
    assert (bad["finish_reason"], bad["token_ids"]) == ("error", plain["token_ids"][:count])
    assert bad["stop_reason"].startswith(f"logits_processor: {told}")


def test_what_is_no_processor_is_refused():
    for wrong in (3, "f", object(), Begins(None), Begins(5)):
        with pytest.raises(TypeError, match="logits_processor must be callable, or have a method"):
            SamplingParams(logits_processor=wrong)


def test_a_processor_that_allows_drafts_sees_them_and_the_tokens_stay():
    prompt, seen = ids(7, 1) * 4, []

    def look(token_ids, logits):
        seen.append(len(token_ids))
        return logits.index_fill(0, torch.tensor([3]), -torch.inf)

    found = []
    for may_guess in (False, True):
        seen.clear()
        processor = Begins(lambda prompt: look, may_guess)
        params = sampled(24, 1, temperature=0, logits_processor=processor)
        with build(prompt_lookup=5) as llm:
            found.append(token_lists(serve(llm, [(prompt, params)])))
            assert (llm.stats()["accepted_tokens"] > 0) == may_guess
        assert may_guess or seen == list(range(28, 28 + 24))
    assert found[0] == found[1]


def test_an_error_about_a_rejected_draft_token_ends_nothing():
    prompt, wrong = ids(7, 1) * 4, []
    with build() as llm:
        (plain,) = serve(llm, [(prompt, sampled(24, 1, temperature=0))])

    def strict(token_ids, logits):
        if token_ids[28:] != plain["token_ids"][: len(token_ids) - 28]:
            wrong.append(token_ids)
            raise KeyError("no such text")
        return logits

    params = sampled(24, 1, temperature=0, logits_processor=Begins(lambda prompt: strict, True))
    with build(prompt_lookup=5) as llm:
        events = list(llm.stream([prompt], params))
    assert wrong and sum([event["token_ids"] for event in events], []) == plain["token_ids"]
    assert {event["stop_reason"] for event in events[:-1]} == {None}


def test_each_request_of_an_engine_gets_as_many_alternatives_as_it_asks_for():
    with build(plain=True) as llm:
        params = [greedy(3, logprobs=number) for number in (1, 4, 0)]
        outputs = llm.generate([ids(5, n) for n in range(3)], params, use_tqdm=False)
        found = [[len(entry["top"]) for entry in output["logprobs"]] for output in outputs]
        assert found == [[1] * 3, [4] * 3, [0] * 3]
