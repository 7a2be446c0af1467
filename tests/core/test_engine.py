"""The engine against a naive loop over the same model: whatever the pool, the budget, the batch and
the cache do, every request gets the tokens it would get alone."""

import functools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import MODEL, Fixture, era_fixtures, hand_made_batch

from microvllm import LLM, SamplingParams, engine
from microvllm.checkpoint import load_model
from microvllm.engine import PagedKVCache
from microvllm.full import compose
from microvllm.gpu.ahead import AheadRunner
from microvllm.sampler import cap_logits, noise

FIXTURES = {name: Fixture(*found) for name, found in era_fixtures().items()}

pytestmark = pytest.mark.usefixtures("one_thread")


class TooClose(AssertionError):
    """No test may hang on a rounding: this one needs another prompt or seed."""


def capped(model, h: torch.Tensor) -> torch.Tensor:
    """(R, C) rows of a model's forward to (R, V) capped logits."""
    return cap_logits(model.logits(h), model.recipe.softcap)


class Naive:
    """One sequence at a time, all of it computed again for every token, sampled in float64."""

    def __init__(self, directory, overrides=None):
        self.model = load_model(directory, **(overrides or {}))
        self.known: dict[tuple, np.ndarray] = {}  # text -> logits of what follows

    def logits(self, tokens: list[int]) -> np.ndarray:
        """(V,) float64, of the token after these."""
        key = tuple(tokens)
        if key not in self.known:
            table = range(1, 2 + len(tokens) // 16)
            batch = hand_made_batch([(tokens, 0, len(tokens), table)], 16)
            batch.logit_rows = batch.logit_rows[-1:]
            model = self.model
            cache = PagedKVCache(model.config, 1 + len(table), 16, model.dtype, model.device)
            with torch.inference_mode():
                row = capped(model, model.forward(batch, cache))[0]
            self.known[key] = row.double().numpy()
        return self.known[key]

    def follow(self, tokens: list[int]) -> None:
        """Know the logits that follow every beginning of these tokens, from one plain forward."""
        table = range(1, 2 + len(tokens) // 16)
        model = self.model
        cache = PagedKVCache(model.config, 1 + len(table), 16, model.dtype, model.device)
        with torch.inference_mode():
            batch = hand_made_batch([(tokens, 0, len(tokens), table)], 16)
            rows = capped(model, model.forward(batch, cache)).double().numpy()
        self.known |= {tuple(tokens[: i + 1]): row for i, row in enumerate(rows)}

    def pick(self, logits: np.ndarray, params: SamplingParams, uniform: float) -> int:
        """The next token, by the definition of each parameter."""
        keep = 1 if params.temperature == 0 else params.top_k or len(logits)
        ranked = [*np.sort(logits)[::-1], -np.inf]
        if ranked[keep - 1] - ranked[keep] < 1e-4:
            raise TooClose
        if keep == 1:
            return int(logits.argmax())
        logits = np.where(logits < ranked[keep - 1], -np.inf, logits)
        p = np.exp((logits - logits.max()) / params.temperature)
        cdf = p.cumsum() / p.sum()
        if np.abs(cdf - uniform).min() < 1e-6:
            raise TooClose
        return int(np.searchsorted(cdf, uniform, side="right"))

    def complete(self, prompt, params: SamplingParams, sample_id=0, stop=frozenset()) -> list[int]:
        """The tokens that follow, up to and with the first one of `stop`."""
        tokens = list(prompt)
        stop = stop | {*params.stop_token_ids}
        limit = min(len(tokens) + params.max_tokens, self.model.config.sequence_len)
        while len(tokens) < limit:
            (uniform,) = noise([params.seed or 0], [sample_id], [len(tokens)])
            tokens.append(self.pick(self.logits(tokens), params, float(uniform)))
            if tokens[-1] in stop:
                break
        return tokens[len(prompt) :]


@functools.cache
def naive(name: str) -> Naive:
    return Naive(FIXTURES[name].directory, FIXTURES[name].overrides)


def set_overlap(llm: LLM, overlap: bool = True) -> LLM:
    """Turn on the loop of a GPU, one step ahead of what the host has read; nothing in it needs a
    GPU."""
    if overlap:
        llm.runner.__class__ = compose(AheadRunner, type(llm.runner))
    assert hasattr(llm, "overlap")
    llm.overlap = overlap
    return llm


def build(name: str = "era5", overlap: bool = False, **kwargs) -> LLM:
    """An engine over a fixture. overlap: see `set_overlap`."""
    fixture = FIXTURES[name]
    kwargs = {"num_blocks": 200, "device": "cpu"} | fixture.overrides | kwargs
    return set_overlap(LLM(fixture.directory, tokenizer_path=fixture.tokenizer, **kwargs), overlap)


def check(llm: LLM) -> None:
    """What holds after every step."""
    scheduler = llm.scheduler
    scheduler.blocks.check(scheduler.running)
    assert len(scheduler.running) <= llm.max_batch_size
    assert not any(len(seq.table) for seq in scheduler.waiting)


def assert_idle(llm: LLM) -> None:
    """Nobody is left and every block is free again."""
    blocks = llm.scheduler.blocks
    assert llm.is_finished() and not llm.scheduler.running and not llm.scheduler.waiting
    assert blocks.num_free == blocks.num_usable and not any(blocks.ref_count)
    if hasattr(llm, "stats"):  # the core alone has no statistics
        stats = llm.stats()
        assert stats["free_blocks"] == stats["num_blocks"] and stats["running"] == 0


def finish(llm: LLM) -> dict[int, dict]:
    """Step until all requests are done, checking each step. Outputs by request id."""
    outputs, turns = {}, 0
    while not llm.is_finished():
        for output in llm.step():
            outputs[output["request_id"]] = output
        check(llm)
        turns += 1
        assert turns < 5000, "no end in sight"
    assert_idle(llm)
    return outputs


def serve(llm: LLM, work: list[tuple[list[int], SamplingParams]]) -> list[dict]:
    """All requests at once, step by step."""
    ids = [llm.add_request(prompt, params) for prompt, params in work]
    outputs = finish(llm)
    return [outputs[request_id] for request_id in ids]


def assert_naive(outputs: list[dict], work, name: str = "era5", eos=frozenset()) -> None:
    for output, (prompt, params) in zip(outputs, work, strict=True):
        assert output["prompt_token_ids"] == prompt
        assert len(output["samples"]) == params.n
        stop = frozenset() if params.ignore_eos else eos
        for i, sample in enumerate(output["samples"]):
            wanted = naive(name).complete(prompt, params, i, stop)
            assert sample["token_ids"] == wanted, (len(prompt), params, i)
            ended = wanted[-1] in stop | {*params.stop_token_ids}
            assert sample["finish_reason"] == ("stop" if ended else "length")


def ids(length: int, seed: int = 0) -> list[int]:
    """A prompt of so many token ids, another one for each seed."""
    return random.Random(seed).choices(range(256), k=length)


def greedy(max_tokens: int, **kwargs) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **kwargs)


def sampled(max_tokens: int, seed: int, **kwargs) -> SamplingParams:
    kwargs = {"temperature": 1.0, "ignore_eos": True} | kwargs
    return SamplingParams(max_tokens=max_tokens, seed=seed, **kwargs)


# prompts shorter and longer than a block and than the short window, greedy rows among sampled ones
MIXED = [
    (ids(1, 1), greedy(12)),
    (ids(2, 2), sampled(12, seed=5)),
    (ids(3, 3), greedy(1)),
    (ids(15, 4), greedy(9)),
    (ids(16, 5), sampled(5, seed=6, temperature=0.7, top_k=5)),
    (ids(17, 6), greedy(17)),
    (ids(33, 7), sampled(1, seed=7)),
    (ids(48, 8), greedy(2)),
    (ids(64, 9), sampled(14, seed=8, top_k=20)),
    (ids(140, 10), greedy(10)),
    (ids(127, 11), sampled(6, seed=9, temperature=1.5)),
]
# beginnings in common, one prompt twice, one that ends where a block ends
SHARED = [
    (ids(40, 1), greedy(9)),
    (ids(40, 1), greedy(9)),
    (ids(40, 1)[:32], greedy(12)),
    (ids(40, 1)[:32] + ids(7, 2), sampled(9, seed=1)),
    (ids(40, 1)[:17] + ids(20, 3), greedy(9)),
    (ids(64, 4), greedy(4)),
    (ids(64, 4), sampled(4, seed=2)),
]


def growing(shortest: int) -> list:
    """Many that grow, for pools that do not hold them all."""
    lengths = range(shortest, shortest + 28, 4)
    return [
        (ids(n, 20 + i), greedy(40) if i % 2 else sampled(36, seed=i))
        for i, n in enumerate(lengths)
    ]


GROWING = growing(3)

both_loops = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "ahead"])


# the same tokens as the naive loop ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["era1_padded", "era3", "era5"])
def test_the_naive_loop_itself_gives_nanochats_tokens(name):
    prompt = next(p for p in FIXTURES[name].json["prompts"] if p["length"] == 17)
    tokens = naive(name).complete(prompt["ids"], greedy(12))
    assert tokens == prompt["greedy_tokens"][:12]


@pytest.mark.parametrize(
    ("name", "overlap"), [("era1_padded", True), ("era3", False), ("era5", False), ("era5", True)]
)
def test_mixed_lengths(name, overlap):
    with build(name, overlap) as llm:
        assert_naive(serve(llm, MIXED), MIXED, name)


@pytest.mark.parametrize("given", [{"attention": "sdpa"}, {"plain": True}], ids=str)
def test_the_plainer_models(given):
    with build(**given) as llm:
        assert_naive(serve(llm, MIXED), MIXED)


def test_the_core_alone():
    fixture, more = FIXTURES["era5"], {"block_size": 4, "num_blocks": 50, "max_batched_tokens": 16}
    more |= {"tokenizer_path": fixture.tokenizer, "device": "cpu", **fixture.overrides}
    with engine.LLM(fixture.directory, **more) as llm:
        outputs = []
        for work in (SHARED, MIXED[:6], GROWING, SHARED):
            outputs += serve(llm, work)
            assert_naive(outputs[-len(work) :], work)
        assert llm.scheduler.num_preemptions > 0
        assert any(output["num_cached_tokens"] for output in outputs)


def test_the_core_counts_its_blocks_to_the_last():
    fixture = FIXTURES["era5"]
    more = {"tokenizer_path": fixture.tokenizer, "device": "cpu", **fixture.overrides}
    more |= {"block_size": 4, "max_batch_size": 2, "max_model_len": 19}
    with engine.LLM(fixture.directory, **more) as llm:
        assert llm.scheduler.blocks.num_usable == 2 * 5  # two of 19 tokens
    with engine.LLM(fixture.directory, num_blocks=5, **more) as llm:  # 4 and the sink
        work = [(ids(7), greedy(10))]  # 16 slots: the last token is never fed back
        assert_naive(serve(llm, work), work)
        with pytest.raises(ValueError, match="5 blocks are needed, and the pool has 4"):
            llm.add_request(ids(7), greedy(11))


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("block_size", [1, 4, 16, 64])
def test_block_sizes_with_a_cold_and_a_warm_cache(block_size, caching):
    with build(
        block_size=block_size, num_blocks=1024 // block_size, enable_prefix_caching=caching
    ) as llm:
        for turn in range(2):
            for work in (SHARED, MIXED):
                outputs = serve(llm, work)
                assert_naive(outputs, work)
                for output, (prompt, _) in zip(outputs, work, strict=True):
                    hit = (len(prompt) - 1) // block_size * block_size if turn and caching else 0
                    assert output["num_cached_tokens"] >= hit
                    assert caching or output["num_cached_tokens"] == 0


@both_loops
@pytest.mark.parametrize("budget", [1, 7, None])
def test_token_budgets(budget, overlap, monkeypatch):
    work = SHARED + MIXED[:9]
    with build(max_batched_tokens=budget, overlap=overlap) as llm:
        forward, rows = llm.model.forward, []
        monkeypatch.setattr(
            llm.model,
            "forward",
            lambda batch, kv: rows.append(len(batch.ids)) or forward(batch, kv),
        )
        assert_naive(serve(llm, work), work)
        assert max(rows) == min(budget or 1024, llm.stats()["prefill_tokens"])


@both_loops
@pytest.mark.parametrize(
    ("block_size", "num_blocks", "caching"),
    [(1, 70, True), (4, 19, True), (4, 19, False), (16, 6, True), (64, 4, False)],
)
def test_pools_so_small_that_sequences_make_room(block_size, num_blocks, caching, overlap):
    with build(
        block_size=block_size,
        num_blocks=num_blocks,
        enable_prefix_caching=caching,
        overlap=overlap,
    ) as llm:
        work = growing(3 if block_size < 64 else 36)
        for _ in range(2):
            assert_naive(serve(llm, work), work)
        assert llm.stats()["preemptions"] > 0
        assert llm.stats()["peak_blocks"] == num_blocks - 1


@both_loops
@pytest.mark.parametrize("max_batch_size", [1, 3])
def test_never_more_than_max_batch_size_run_at_once(max_batch_size, overlap):
    most = 0
    with build(max_batch_size=max_batch_size, overlap=overlap) as llm:
        for prompt, params in MIXED[:8]:
            llm.add_request(prompt, params)
        outputs = []
        while not llm.is_finished():
            outputs += llm.step()
            check(llm)
            most = max(most, llm.stats()["running"])
        assert_naive(sorted(outputs, key=lambda o: o["request_id"]), MIXED[:8])
    assert most == max_batch_size


@both_loops
def test_everything_at_once(overlap):
    work = [
        (ids(18, 1), sampled(9, seed=3, n=3)),
        (ids(18, 1), greedy(20)),
        *GROWING[:4],
        (ids(18, 1)[:16], sampled(20, seed=4, n=2)),
    ]
    with build(
        block_size=4, num_blocks=20, max_batched_tokens=7, max_batch_size=5, overlap=overlap
    ) as llm:
        for _ in range(2):
            assert_naive(serve(llm, work), work)
        assert llm.stats()["preemptions"] > 0 and llm.stats()["cached_tokens"] > 0


@both_loops
def test_the_bundled_model(overlap):
    with LLM(MODEL, device="cpu", num_blocks=30, max_batched_tokens=16) as llm:
        set_overlap(llm, overlap)
        prompts = ["Who wrote Moby Dick?", "The capital of France", ""]
        work = [(llm.tokenizer.encode(p, bos=True), greedy(10)) for p in prompts]
        outputs = llm.generate(prompts, greedy(10))
        check(llm)
        assert_idle(llm)
    loop = Naive(MODEL)
    for output, (prompt, params) in zip(outputs, work, strict=True):
        assert output["token_ids"] == loop.complete(prompt, params)
        assert output["prompt_token_ids"] == prompt


# sampling -----------------------------------------------------------------------------------------

SAMPLED = [(ids(5 + 6 * i, 40 + i), sampled(24, seed=i, temperature=1 + i / 5)) for i in range(5)]


@both_loops
def test_a_seed_gives_the_same_tokens_in_any_company(overlap):
    with build(overlap=overlap) as llm:
        together = serve(llm, SAMPLED)
        assert_naive(together, SAMPLED)
        wanted = [output["token_ids"] for output in together]
        # now with a warm cache, and in the other order
        assert [o["token_ids"] for o in serve(llm, SAMPLED[::-1])] == wanted[::-1]
        assert llm.stats()["cached_tokens"] > 0
        # alone
        assert [serve(llm, [request])[0]["token_ids"] for request in SAMPLED] == wanted
    # sent away and computed again
    with build(overlap=overlap, block_size=4, num_blocks=15) as llm:
        assert [o["token_ids"] for o in serve(llm, SAMPLED)] == wanted
        assert llm.stats()["preemptions"] > 0
    # in pieces
    with build(overlap=overlap, max_batched_tokens=3) as llm:
        assert [o["token_ids"] for o in serve(llm, SAMPLED)] == wanted


def test_samples_of_a_prompt_are_computed_from_one_prefill():
    prompt, params = ids(21, 1), sampled(9, seed=7, n=4)
    with build() as llm:
        (output,) = serve(llm, [(prompt, params)])
        assert_naive([output], [(prompt, params)])
        assert llm.stats()["prefill_tokens"] == 21
    samples = [sample["token_ids"] for sample in output["samples"]]
    assert len({tuple(tokens) for tokens in samples}) == 4
    assert output["token_ids"] == samples[0]  # the first is also at the top level


def test_a_sample_depends_on_its_seed_and_index_and_on_nothing_else():
    prompt = ids(21, 1)
    work = [
        (prompt, sampled(9, seed=7, n=3)),
        (prompt, sampled(9, seed=7)),
        (prompt, sampled(9, seed=8, n=3)),
        (prompt, sampled(9, seed=7, n=2)),
    ]
    with build() as llm:
        outputs = serve(llm, work)
    a, b, c, d = ([sample["token_ids"] for sample in output["samples"]] for output in outputs)
    assert b == a[:1] and d == a[:2]  # the same seed and index: the same tokens
    assert len({tuple(tokens) for tokens in a + c}) == 6  # another seed or index: others


def test_greedy_samples_are_all_the_same():
    with build(block_size=4) as llm:
        (output,) = serve(llm, [(ids(6, 1), greedy(9, n=3))])
    assert len({tuple(sample["token_ids"]) for sample in output["samples"]}) == 1
    assert_naive([output], [(ids(6, 1), greedy(9, n=3))])


@pytest.mark.parametrize("num_blocks", [8, 9, 11, 14])
@both_loops
def test_samples_under_memory_pressure(num_blocks, overlap):
    work = [(ids(6, 1), sampled(20, seed=1, n=4)), (ids(9, 2), sampled(12, seed=2, n=2))]
    with build(block_size=4, num_blocks=num_blocks, overlap=overlap) as llm:
        assert_naive(serve(llm, work), work)
        assert llm.stats()["preemptions"] > 0


def test_top_k_1_is_greedy_at_any_temperature():
    with build() as llm:
        a, b = serve(llm, [(ids(9), greedy(9)), (ids(9), sampled(9, 1, top_k=1, temperature=9.0))])
    assert a["token_ids"] == b["token_ids"]


def test_the_order_of_temperatures_in_a_batch_is_kept():
    work = [(ids(9, i), sampled(6, seed=i, temperature=t)) for i, t in enumerate([0, 2.0, 0, 0.1])]
    with build() as llm:
        assert_naive(serve(llm, work), work)


# how requests end ---------------------------------------------------------------------------------


def ending(prompt: list[int], index: int, eos: frozenset[int], **kwargs) -> SamplingParams:
    """Params whose seed makes the naive loop sample its first end token as token `index`."""
    for seed in range(5000):
        params = sampled(20, seed, temperature=3.0, ignore_eos=False, **kwargs)
        try:
            tokens = naive("era5").complete(prompt, replace(params, max_tokens=index + 1), stop=eos)
        except TooClose:
            continue
        if len(tokens) == index + 1 and tokens[-1] in eos:
            return params
    raise AssertionError("no seed")


@both_loops
def test_an_end_token_ends_a_request_unless_told_otherwise(overlap):
    prompt = ids(9, 3)
    with build(overlap=overlap) as llm:
        eos = llm.tokenizer.eos_ids
        params = ending(prompt, 1, eos)
        work = [(prompt, params), (prompt, replace(params, ignore_eos=True)), MIXED[3]]
        outputs = serve(llm, work)
        assert_naive(outputs, work, eos=eos)
        stopped, ignored, _ = outputs
    assert len(stopped["token_ids"]) == 2 and stopped["finish_reason"] == "stop"
    assert stopped["stop_reason"] == stopped["token_ids"][-1] in eos
    assert len(ignored["token_ids"]) == 20 and ignored["finish_reason"] == "length"
    assert ignored["token_ids"][:2] == stopped["token_ids"]
    assert ignored["stop_reason"] == "max_tokens"


@both_loops
def test_an_end_token_in_the_prompt_ends_nothing(overlap):
    with build(overlap=overlap) as llm:
        eos = llm.tokenizer.eos_ids
        prompt = [*ids(5), *eos, *ids(5, 1), *eos]
        params = SamplingParams(temperature=0, max_tokens=6)
        outputs = serve(llm, [(prompt, params)])
        assert_naive(outputs, [(prompt, params)], eos=eos)
        assert len(outputs[0]["token_ids"]) == 6


@both_loops
def test_stop_token_ids_end_a_request_with_ignore_eos_too(overlap):
    prompt = ids(9, 3)
    tokens = naive("era5").complete(prompt, sampled(12, 1))
    stop = next(t for i, t in enumerate(tokens) if i > 3 and t not in tokens[:i])
    params = sampled(12, 1, stop_token_ids=(stop,))
    work = [(prompt, params), *MIXED[:4]]
    with build(overlap=overlap) as llm:
        outputs = serve(llm, work)
        assert_naive(outputs, work)
    assert outputs[0]["token_ids"] == tokens[: tokens.index(stop) + 1]
    assert outputs[0]["stop_reason"] == stop


@both_loops
@pytest.mark.parametrize("length", [1, 15, 16, 17])
def test_max_tokens_1(length, overlap):
    work = [(ids(length, i), params) for i, params in enumerate([greedy(1), sampled(1, seed=3)])]
    with build(overlap=overlap) as llm:
        outputs = serve(llm, work)
        assert_naive(outputs, work)
        assert llm.stats()["output_tokens"] == 2
        assert llm.stats()["peak_blocks"] == 2 * -(-length // 16)


@both_loops
def test_the_context_ends_at_max_model_len(overlap):
    with build(max_model_len=40, overlap=overlap) as llm:
        work = [(ids(length, length), greedy(30)) for length in (1, 30, 39)]
        outputs = serve(llm, work)
        assert [len(o["token_ids"]) for o in outputs] == [30, 10, 1]
        assert [o["finish_reason"] for o in outputs] == ["length"] * 3
        assert [o["stop_reason"] for o in outputs] == ["max_tokens"] + ["max_model_len"] * 2
        with pytest.raises(ValueError, match="40 tokens and max_model_len is 40: 1 too many"):
            llm.add_request(ids(40))
        assert_idle(llm)


def test_a_context_longer_than_the_checkpoints():
    with build(max_model_len=600) as llm:  # 400 in the checkpoint
        (output,) = serve(llm, [(ids(390), greedy(30))])
        assert len(output["token_ids"]) == 30
