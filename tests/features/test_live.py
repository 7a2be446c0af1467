"""Engines on live modules, and new weights for an engine that runs."""

import copy
import gc
import os
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.goldens import ERAS, FIXTURES, MODEL, ROOT, SRC
from helpers.standin import GPT, Config, optimizers, train
from helpers.strikes import ALL, Strike
from torch import nn

from microvllm import LLM, SamplingParams, engine, parts
from microvllm.checkpoint import load_model
from microvllm.model import rotary_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
serve = partial(LLM, tokenizer_path=ERAS / "tokenizer", num_blocks=60, device="cpu")

GREEDY = SamplingParams(temperature=0, max_tokens=24)
PROMPTS = [[5 * i % 300 for i in range(40)], [7 * i % 300 for i in range(21)], "Who?"]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=0.9, max_tokens=12, ignore_eos=True, seed=3, n=3, logprobs=2),
    SamplingParams(temperature=0.7, top_k=20, max_tokens=12, ignore_eos=True, seed=4, logprobs=0),
]


def samples(llm: LLM) -> list:
    """Tokens and log-probabilities of all samples of PROMPTS."""
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    return [(s["token_ids"], s["logprobs"]) for output in outputs for s in output["samples"]]


def assert_close(some: list, others: list) -> None:
    """The same tokens, and log-probabilities up to the rounding of another batch."""
    for (tokens, values), (other_tokens, other_values) in zip(some, others, strict=True):
        assert tokens == other_tokens
        expected = [value["logprob"] for value in other_values]
        assert [value["logprob"] for value in values] == pytest.approx(expected, abs=1e-5)


def fresh(gpt, **options) -> list:
    """What an engine gives that has never seen other weights."""
    with serve(model=copy.deepcopy(gpt), **options) as llm:
        return samples(llm)


# how weights change ---------------------------------------------------------------------------


@torch.no_grad()
def seen_by_autograd(gpt):
    for p in gpt.parameters():
        p.add_(0.1 * p.sin())


@torch.no_grad()
def seen_by_autograd_alone(gpt):
    """No first number of a tensor or a row changes."""
    gpt.transformer.h[1].mlp.c_fc.weight[1:, 1:] += 0.1


def hidden(gpt):
    for p in gpt.parameters():
        p.data.add_(0.1 * p.data.sin())


def hidden_in_one_row(gpt):
    gpt.transformer.wte.weight.data[PROMPTS[0][1]] += 1


def by_numpy(gpt):
    gpt.transformer.h[0].attn.c_k.weight.detach().numpy()[:] *= -1


@torch.inference_mode()
def in_inference_mode(gpt):
    for p in gpt.parameters():
        p.mul_(0.9)


def other_data(gpt):
    for p in gpt.parameters():
        p.data = p.data * 0.9


def other_data_twice(gpt):
    # the second one may lie where the engine saw the first
    for p in gpt.parameters():
        p.data = p.data + 1
    for p in gpt.parameters():
        p.data = (p.data - 1) * 0.9


def other_strides(gpt):
    for p in gpt.parameters():
        if p.ndim == 2:
            p.data = (0.9 * p.data.T).contiguous().T


def loaded(gpt):
    gpt.load_state_dict(GPT(newest=gpt.newest, seed=1).state_dict())


def assigned(gpt):
    gpt.load_state_dict(GPT(newest=gpt.newest, seed=1).state_dict(), assign=True)


def another_parameter(gpt):
    gpt.lm_head.weight = nn.Parameter(gpt.lm_head.weight.detach().flip(0))


def another_block(gpt):
    gpt.transformer.h[0] = GPT(newest=gpt.newest, seed=1).transformer.h[0]


def another_dtype(gpt):
    gpt.to(torch.bfloat16)


def trained(gpt):
    steps = optimizers(gpt)
    train(gpt, steps)
    train(gpt, steps, seed=1)


def trained_through_data(gpt):
    train(gpt, optimizers(gpt, write="data"))


def trained_by_a_fused_optimizer(gpt):
    train(gpt, [torch.optim.AdamW(gpt.parameters(), fused=True)])


def trained_unseen(gpt):
    """No first number of a tensor changes, and a fused step counts no version."""
    weight = gpt.transformer.h[1].mlp.c_fc.weight
    weight.grad = torch.ones_like(weight)
    weight.grad[0] = 0
    version = weight._version
    torch.optim.AdamW([weight], lr=0.1, weight_decay=0, fused=True).step()
    assert weight._version == version


CHANGES = [
    seen_by_autograd, seen_by_autograd_alone, hidden, hidden_in_one_row, by_numpy,
    in_inference_mode, other_data, other_data_twice, other_strides, loaded, assigned,
    another_parameter, another_block, another_dtype, trained, trained_through_data,
    trained_by_a_fused_optimizer,
]  # fmt: skip
ENGINES = {
    "shared": {},
    "copy": {"copy": True},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4", "copy": True},
    "lookup": {"prompt_lookup": 4, "copy": True},
    "sdpa": {"attention": "sdpa", "copy": True},
    "plain": {"plain": True},
}


def slowly(name: str) -> list:
    """It compiles kernels of its own."""
    heavy = [pytest.mark.skipif(not ALL, reason="compiles for long: set FUZZ")]
    heavy = heavy if name == "int4" else []
    return [pytest.mark.slow, *heavy] if name in ("int4", "int8", "bfloat16") else []


COPIES = {name: options for name, options in ENGINES.items() if name in ("shared", "copy")}


@pytest.mark.parametrize(
    ("change", "options"),
    [
        pytest.param(
            change, options, id=f"{change.__name__}-{name}",
            marks=slowly(name),
        )
        for name, options in ENGINES.items()
        for change in (CHANGES if name in COPIES else [another_block, trained])
        if ALL or name != "copy" or change in (hidden, hidden_in_one_row, loaded, trained)
    ],
)  # fmt: skip
def test_after_a_change_all_samples_are_those_of_a_fresh_engine(change, options):
    gpt = GPT()
    with serve(model=gpt, **options) as llm:
        before = samples(llm)
        assert before == fresh(gpt, **options)
        change(gpt)
        after = samples(llm)
        assert after == fresh(gpt, **options) != before


@pytest.mark.parametrize("options", COPIES.values(), ids=COPIES)
def test_a_module_of_the_first_era_is_followed_as_well(options):
    gpt = GPT(newest=False)
    with serve(model=gpt, **options) as llm:
        before = samples(llm)
        for change in trained, hidden, another_block:
            change(gpt)
            assert samples(llm) == fresh(gpt, **options) != before


@pytest.mark.parametrize("options", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(
    "change",
    [seen_by_autograd_alone, hidden, other_data, another_block, trained_unseen],
)
def test_running_requests_go_on_with_the_new_weights(change, options):
    """Forks too: what comes after a change is what a fresh engine adds to the text before it."""
    gpt = GPT()
    with serve(model=gpt, **options) as llm:
        for prompt, params in zip(PROMPTS, PARAMS, strict=True):
            llm.add_request(prompt, params)
        for _ in range(5):
            assert llm.step() == []
        sequences = list(llm.scheduler.running)
        texts = [seq.token_ids[:] for seq in sequences]
        assert len(texts) == 5 and all(seq.output for seq in sequences)
        change(gpt)
        outputs = {}
        while not llm.is_finished():
            outputs |= {output["request_id"]: output["samples"] for output in llm.step()}
            llm.scheduler.blocks.check(llm.scheduler.running)
    with serve(model=gpt, **options) as llm:
        for seq, text in zip(sequences, texts, strict=True):
            rest = seq.num_prompt + 12 - len(text)
            params = replace(seq.params, n=1, sample_index=seq.index, max_tokens=rest)
            (output,) = llm.generate([text], params, use_tqdm=False)
            found = outputs[seq.request_id][seq.index]
            assert_close(
                [(found["token_ids"][-rest:], found["logprobs"][-rest:])],
                [(output["token_ids"], output["logprobs"])],
            )


@pytest.mark.parametrize(
    "options", [pytest.param(o, id=n, marks=slowly(n)) for n, o in ENGINES.items()]
)
def test_where_nothing_changes_the_prefix_cache_is_kept(options, monkeypatch):
    gpt, other = GPT(), GPT(seed=1)
    with serve(model=gpt, **options) as llm:
        samples(llm)
        monkeypatch.setattr(llm.live, "follow", None)  # an error, if it were called
        again = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert [output["num_cached_tokens"] for output in again] == [32, 16, 0]
        trained(other)  # is not ours
        gpt.train(), gpt.eval(), gpt(torch.tensor([[1, 2]])).sum().backward()
        gpt.zero_grad()
        again = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert [output["num_cached_tokens"] for output in again] == [32, 16, 0]


# what a change meets --------------------------------------------------------------------------


def test_memory_that_the_module_had_before_is_never_written():
    """An average of the weights is put in their place for an evaluation, and taken out again."""
    gpt = GPT()
    with serve(model=gpt) as llm:
        first, own = samples(llm), [p.data for p in gpt.parameters()]
        copies = [p.clone() for p in own]
        for p in gpt.parameters():
            p.data = p.data * 0.9
        assert samples(llm) == fresh(gpt) != first
        assert all(map(torch.equal, own, copies))
        for p, data in zip(gpt.parameters(), own, strict=True):
            p.data = data
        assert samples(llm) == first


@torch.inference_mode()
def make_for_inference() -> GPT:
    return GPT()


@pytest.mark.parametrize("options", COPIES.values(), ids=COPIES)
def test_weights_made_in_inference_mode_are_followed(options):
    gpt = make_for_inference()
    with serve(model=gpt, **options) as llm:
        first = samples(llm)
        in_inference_mode(gpt)
        assert samples(llm) == fresh(gpt, **options) != first


def test_an_engine_made_and_used_in_inference_mode_is_like_any_other():
    gpt = GPT()
    with torch.inference_mode(), serve(model=gpt, copy=True) as llm:
        first = samples(llm)
        for change in in_inference_mode, other_data:
            change(gpt)
            assert samples(llm) == fresh(gpt, copy=True) != first
    gpt = GPT()
    with torch.inference_mode():
        llm = serve(model=gpt, copy=True)
    with llm:
        for change in trained, another_block, trained:
            change(gpt)
            assert samples(llm) == fresh(gpt, copy=True)
            assert not llm.cache.data.is_inference() or change is not another_block
    gpt = GPT()
    with serve(model=gpt, copy=True) as llm:
        for change in trained, another_block, trained:
            change(gpt)
            with torch.inference_mode():
                assert samples(llm) == fresh(gpt, copy=True)
            change(gpt)
            assert samples(llm) == fresh(gpt, copy=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", COPIES.values(), ids=COPIES)
def test_a_compiled_module_is_followed(options):
    gpt = GPT()
    with serve(model=torch.compile(gpt), **options) as llm:
        first = samples(llm)
        trained(gpt)
        assert samples(llm) == fresh(gpt, **options) != first
        another_block(gpt)
        assert samples(llm) == fresh(gpt, **options)


@pytest.mark.parametrize("options", COPIES.values(), ids=COPIES)
def test_weights_that_another_thread_trains_are_never_stale_afterwards(options):
    gpt = GPT()

    def loop():
        steps = optimizers(gpt, lr=0.01)
        for seed in range(12):
            train(gpt, steps, seed)

    with serve(model=gpt, **options) as llm:
        first, trainer = samples(llm), threading.Thread(target=loop)
        trainer.start()
        while trainer.is_alive():
            samples(llm)
        trainer.join()
        last = fresh(gpt, **options)
        assert_close(samples(llm), last)
        assert last != first


def test_a_module_that_no_longer_fits_is_an_error_until_it_does_again():
    gpt = GPT()
    with serve(model=gpt) as llm:
        first = samples(llm)
        request = llm.add_request(PROMPTS[0], PARAMS[0])
        llm.step()
        whole = gpt.lm_head
        gpt.lm_head = nn.Linear(64, 5, bias=False)
        for _ in range(2):
            with pytest.raises(
                ValueError, match=r"module GPT.*misshapen \(lm_head.weight is \(5, 64"
            ):
                llm.step()
        gpt.lm_head = whole
        while not (outputs := llm.step()):
            pass
        assert outputs[0]["request_id"] == request
        assert outputs[0]["token_ids"] == first[0][0]
        assert_close(samples(llm), first)  # the prompts are cached: other batches


def test_what_is_written_while_the_weights_are_taken_over_is_seen_by_the_next_step(monkeypatch):
    gpt = GPT()
    with serve(model=gpt, copy=True) as llm:
        samples(llm)
        load = llm.model.load_state_dict

        def overtaken(state):
            load(state)
            monkeypatch.undo()
            seen_by_autograd(gpt)  # as another thread may

        monkeypatch.setattr(llm.model, "load_state_dict", overtaken)
        hidden(gpt)
        llm.generate("Who?", GREEDY)
        assert samples(llm) == fresh(gpt, copy=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_change_is_taken_over_again_if_that_was_interrupted(error, monkeypatch):
    gpt = GPT()
    with serve(model=gpt, copy=True) as llm:
        request = llm.add_request(PROMPTS[0], PARAMS[0])
        llm.step()
        load = llm.model.load_state_dict

        def interrupted(state):
            load({name: torch.zeros_like(weight) for name, weight in state.items()})
            monkeypatch.undo()
            raise error

        monkeypatch.setattr(llm.model, "load_state_dict", interrupted)
        hidden(gpt)
        with pytest.raises(error):
            llm.step()
        while not (outputs := llm.step()):
            pass
        assert outputs[0]["request_id"] == request
        assert samples(llm) == fresh(gpt, copy=True)


def test_update_weights_of_a_live_engine_writes_into_its_module():
    gpt, other = GPT(), GPT(seed=1)
    with serve(model=gpt, copy=True) as llm:
        samples(llm)
        llm.update_weights(other)
        assert samples(llm) == fresh(other, copy=True)
        assert all(map(torch.equal, gpt.state_dict().values(), other.state_dict().values()))
        # a change that nothing shows
        gpt.lm_head.weight.data[5, 7:] = 9
        llm.update_weights(gpt)
        assert samples(llm) == fresh(gpt, copy=True)
        warm = samples(llm)
        with pytest.raises(ValueError, match="misshapen"):
            llm.update_weights(GPT(Config(n_embd=32)))
        assert samples(llm) == warm


def test_a_copy_shares_nothing_and_is_for_live_modules():
    gpt = GPT()
    with serve(model=gpt, copy=True) as llm:
        own = {p.data_ptr() for p in gpt.parameters()}
        assert own.isdisjoint(w.data_ptr() for w in llm.model.tensors.values())
        if llm.model.backend.name == "numba":
            assert llm.model.compiled or not hasattr(llm.model.lm_head, "arrays")
    with pytest.raises(TypeError, match="copy=True is for a live module"):
        LLM(MODEL, copy=True)
    with pytest.raises(TypeError, match="copy must be True or False"):
        serve(model=gpt, copy=1)


def limit_memory(monkeypatch, num_bytes: int) -> None:
    """Let no more than this be free."""
    for module in engine, parts:
        monkeypatch.setattr(module, "free_memory", lambda device: num_bytes)


def test_a_live_engine_leaves_the_memory_to_the_training(monkeypatch):
    """By default, the pool has a quarter of the size in another engine."""
    limit_memory(monkeypatch, 1 << 22)
    sizes = {}
    era5 = FIXTURES["era5"].directory
    for name, source in ("live", {"model": GPT()}), ("file", {"model_path": era5}):
        for given in {}, {"gpu_memory_utilization": 0.9}:
            with serve(num_blocks=None, **source, **given) as llm:
                tables = rotary_bytes(llm.model.config, llm.max_positions)
                sizes[name, bool(given)] = llm.cache.data.nbytes + tables
    assert sizes["live", False] == pytest.approx(2**19, rel=0.1)
    others = {size for key, size in sizes.items() if key != ("live", False)}
    assert min(others) == pytest.approx(2**21, rel=0.1)


def test_what_a_closed_engine_served_is_given_back():
    gpt = GPT()
    llm = serve(model=gpt)
    samples(llm)
    hooks = sys.modules["torch.optim.optimizer"]._global_optimizer_post_hooks
    assert hooks
    llm.close()
    gc.collect()
    assert not hooks and llm.live.module is None


# sleep ------------------------------------------------------------------------------------------


RESIDENT = """
from helpers.standin import GPT, Config
from microvllm import LLM, SamplingParams

def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])

gpt = GPT(Config(vocab_size=4096, n_embd=512, n_head=8))
with LLM(model=gpt, tokenizer_path={tokenizer!r}, copy=True, num_blocks=1000) as llm:
    wanted = 0.9 * (sum(p.nbytes for p in gpt.parameters()) + llm.cache.data.nbytes)
    for _ in range(3):
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4))
        llm.cache.data.fill_(0)  # a page is the system's until it is written
        awake = resident()
        llm.sleep()
        asleep = resident()
        assert wanted > 100e6 and awake - asleep > wanted, (wanted, awake, asleep)
"""


# with which glibc keeps all freed memory; by itself it does so after some patterns of allocation
KEEPING = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**25)}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("malloc", [{}, KEEPING], ids=["default", "keeping"])
def test_sleep_gives_the_memory_of_the_pool_and_of_the_copy_back(malloc):
    script = RESIDENT.format(tokenizer=str(MODEL.parent / "tokenizer"))
    path = os.pathsep.join(map(str, (SRC, ROOT / "tests")))
    env = {**os.environ, **malloc, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", script], check=True, env=env)


KINDS = {
    "shared": lambda: serve(model=GPT()),
    "copy": lambda: serve(model=GPT(), copy=True),
    "int8": lambda: serve(model=GPT(), quantization="int8"),
    "plain": lambda: serve(model=GPT(), plain=True),
    "file": lambda: serve(FIXTURES["era5"].directory),
}


@pytest.fixture(
    params=[pytest.param(make, id=name, marks=slowly(name)) for name, make in KINDS.items()]
)
def sleeper(request):
    with request.param() as llm:
        yield llm


def test_requests_survive_a_sleep_and_any_step_wakes(sleeper):
    llm = sleeper
    expected = samples(llm)
    for prompt, params in zip(PROMPTS, PARAMS, strict=True):
        llm.add_request(prompt, params)
    outputs = []
    for turn in range(40):
        if turn % 3 == 2:
            llm.sleep()
            llm.sleep()
            assert llm.cache.data.nbytes == 0
        if turn % 6 == 5:
            llm.wake()
            llm.wake()
            assert llm.cache.data.nbytes > 0
        outputs += llm.step()
        llm.scheduler.blocks.check(llm.scheduler.running)
    assert llm.is_finished()
    found = {output["request_id"]: output["samples"] for output in outputs}
    found = [sample for _, request in sorted(found.items()) for sample in request]
    assert [sample["token_ids"] for sample in found] == [tokens for tokens, _ in expected]
    talk = [{"role": "user", "content": "Who?"}]
    for call in (
        lambda: [output["token_ids"] for output in llm.generate("Who?", GREEDY)],
        lambda: [output["token_ids"] for output in llm.chat(talk, GREEDY)],
        # an event has the tokens of one turn of the loop, which may be several steps
        lambda: [i for event in llm.stream(["Who?"], GREEDY) for i in event["token_ids"]],
        lambda: [round(x, 4) for scores in llm.score([[1, 2]], [[3]]) for x in scores],
        lambda: llm.generate_batch([1, 2], max_tokens=3),
    ):
        awake = call()
        llm.sleep()
        assert call() == awake
        assert llm.cache.data.nbytes > 0
    assert samples(llm) == expected


def test_without_a_step_an_engine_sleeps_on(sleeper):
    llm = sleeper
    llm.sleep()
    kept = llm.add_request(PROMPTS[0], PARAMS[0])
    gone = llm.add_request(PROMPTS[1], PARAMS[1])
    llm.abort(gone)
    assert not llm.is_finished() and llm.stats()
    with pytest.raises(ValueError, match="max_model_len"):
        llm.add_request([1] * 5000)
    assert llm.cache.data.nbytes == 0
    outputs = []
    while not llm.is_finished():
        outputs += llm.step()
    reasons = {output["request_id"]: output["finish_reason"] for output in outputs}
    assert reasons == {kept: "length", gone: "abort"}
    llm.sleep()
    llm.close()
    for call in llm.sleep, llm.wake:
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_weights_that_change_during_a_sleep_are_taken_when_it_ends():
    gpt = GPT()
    with serve(model=gpt, copy=True) as llm:
        for change in trained, hidden, trained_unseen, another_block:
            samples(llm)
            llm.sleep()
            change(gpt)
            assert samples(llm) == fresh(gpt, copy=True)
        llm.sleep()
        llm.update_weights(GPT(seed=1))
        assert llm.cache.data.nbytes == 0
        assert samples(llm) == fresh(gpt, copy=True) == fresh(GPT(seed=1), copy=True)


def test_new_weights_for_a_sleeping_engine_of_a_file():
    other = GPT(Config(sequence_len=400), seed=1)
    with KINDS["file"]() as llm:
        llm.sleep()
        llm.update_weights(other)
        assert llm.cache.data.nbytes == 0
        assert samples(llm) == fresh(other, copy=True)


def test_an_engine_that_cannot_wake_sleeps_on_and_loses_nothing(monkeypatch):
    gpt = GPT()
    with serve(model=gpt, copy=True) as llm:
        expected = samples(llm)
        llm.add_request(PROMPTS[0], PARAMS[0])
        llm.step()
        llm.sleep()
        limit_memory(monkeypatch, 1000)
        for call in llm.wake, llm.step:
            with pytest.raises(
                ValueError, match="cannot wake.*not enough memory for a KV cache.*1,000 are free"
            ):
                call()
        assert llm.cache.data.nbytes == 0 and not hasattr(llm.model, "tensors")
        monkeypatch.undo()
        while not (outputs := llm.step()):
            pass
        assert outputs[0]["token_ids"] == expected[0][0]


def interrupted(call: Strike, scenario: str) -> list[list[int]]:
    """Tokens of requests that a change, or a sleep, comes between; `call` strikes it."""
    gpt = GPT()
    with serve(model=gpt, copy=True) as llm:
        for prompt, params in zip(PROMPTS, PARAMS, strict=True):
            llm.add_request(prompt, params)
        llm.step(), llm.step()
        if scenario in CHANGES_BY_NAME:
            CHANGES_BY_NAME[scenario](gpt)
            outputs = call(llm.step)
        else:
            if scenario == "wake":
                llm.sleep()
            outputs = call(getattr(llm, scenario)) or []
        while not llm.is_finished():
            outputs += llm.step()
            llm.scheduler.blocks.check(llm.scheduler.running)
        assert_close(samples(llm), fresh(gpt, copy=True))
    outputs.sort(key=lambda output: output["request_id"])
    return [sample["token_ids"] for output in outputs for sample in output["samples"]]


CHANGES_BY_NAME = {"trained": trained, "another_block": another_block}


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["trained", "another_block", "sleep", "wake"])
def test_an_exception_at_any_line_of_a_change_or_a_sleep_loses_nothing(scenario):
    whole = Strike()
    expected = interrupted(whole, scenario)
    lines = [line for line in whole.lines if "live.py" in line[0] or "fused" in line[0]]
    assert len(lines) > 10
    for line in lines[:: 1 if ALL else 5]:
        strike = Strike(at=line)
        assert interrupted(strike, scenario) == expected, line
        assert strike.struck


def test_a_step_cannot_put_its_engine_to_sleep():
    with serve(model=GPT()) as llm:
        params = SamplingParams(max_tokens=3, logits_processor=lambda *_: llm.sleep())
        (output,) = llm.generate([PROMPTS[0]], params)
        assert output["finish_reason"] == "error" and "inside a step" in output["stop_reason"]
        assert len(samples(llm)) == 5


def test_a_trace_follows_through_changes_and_sleep(tmp_path):
    gpt = GPT()
    with serve(model=gpt, copy=True) as llm, llm.tracing() as trace:
        for change in trained, another_block:
            llm.add_request(PROMPTS[0], PARAMS[0])
            llm.step()
            change(gpt)
            samples(llm)
            llm.sleep()
        samples(llm)
        trace.page(str(tmp_path / "run.html"))


# the bundled model ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm():
    with LLM(MODEL, num_blocks=400) as llm:
        yield llm


def test_a_live_module_is_wrapped_without_copying_its_weights(llm):
    module = load_model(MODEL).requires_grad_()
    with LLM(model=module, tokenizer=llm.tokenizer, num_blocks=100) as live:
        used = {name: w.data_ptr() for name, w in live.model.tensors.items()}
        for names, linear in live.model.linears.items():
            for name, part in zip(names, linear.weight, strict=True):
                used[f"{name}.weight"] = part.data_ptr()
        assert used == {name: w.data_ptr() for name, w in module.state_dict().items()}
        messages = [{"role": "user", "content": "Who wrote Dracula?"}]
        prompt = llm.tokenizer.render_for_completion(messages)
        assert live.generate([prompt], GREEDY) == [
            {**llm.generate([prompt], GREEDY)[0], "request_id": 0, "num_cached_tokens": 0}
        ]
    for other in torch.nn.Linear(2, 2), 5:
        with pytest.raises(TypeError, match="GPT"):
            LLM(model=other, tokenizer=llm.tokenizer)
    with pytest.raises(TypeError, match="either"):
        LLM(MODEL, model=module)


def test_new_weights_leave_no_stale_keys_and_values():
    prompt = list(range(5, 60))
    with LLM(MODEL, num_blocks=100) as llm:
        old = load_model(MODEL).state_dict()
        new = {name: w * 1.1 if "attn" in name else w for name, w in old.items()}
        first = llm.generate([prompt], GREEDY)[0]
        assert llm.generate([prompt], GREEDY)[0]["num_cached_tokens"] > 0
        llm.update_weights(new)
        second = llm.generate([prompt], GREEDY)[0]
        assert second["num_cached_tokens"] == 0
        with pytest.raises(ValueError, match="missing"):
            llm.update_weights({n: w for n, w in new.items() if n != "lm_head.weight"})
        # in the middle of a request: what it has is recomputed with the new weights
        request = llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=40))
        for _ in range(10):
            llm.step()
        llm.update_weights(old)
        assert llm.generate([prompt], GREEDY)[0]["token_ids"] == first["token_ids"]
        assert request is not None
    with LLM(MODEL, num_blocks=100) as fresh:
        fresh.update_weights(new)
        assert fresh.generate([prompt], GREEDY)[0]["token_ids"] == second["token_ids"]
