"""Which version of the weights drew a token, and samples that are too far behind."""

from functools import partial

import pytest
import torch
from helpers.full_engines import build, set_overlap
from helpers.goldens import ERAS
from helpers.standin import GPT, optimizers, train

from microvllm import LLM, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")
serve = partial(LLM, tokenizer_path=ERAS / "tokenizer", num_blocks=60, device="cpu", plain=True)

PROMPTS = [[5 * i % 300 for i in range(20)], [7 * i % 300 for i in range(9)]]
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True, seed=3)


def state(seed: int) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in GPT(seed=seed).state_dict().items()}


def finish(llm: LLM) -> dict[int, dict]:
    """Step until all requests have their outputs, by request id."""
    outputs = {}
    while not llm.is_finished():
        for output in llm.step():
            outputs[output.request_id] = output
    return outputs


def step(llm: LLM, num_tokens: int) -> None:
    """Step until the oldest request has this many tokens."""
    request = next(iter(llm.requests.values()))
    while len(request.sequences[0].output) < num_tokens:
        assert llm.step() == []


# counting -----------------------------------------------------------------------------------------


def test_versions_count_by_one_unless_a_number_is_given_and_never_fall():
    with serve(model=GPT()) as llm:
        assert llm.version == 0
        llm.update_weights(state(1))
        assert llm.version == 1
        llm.update_weights(state(2), version=7)
        llm.update_weights(state(2), version=7)  # the same once more
        assert llm.version == 7
        for wrong, error in (
            (6, ValueError),
            (-1, ValueError),
            (7.5, TypeError),
            (True, TypeError),
        ):
            with pytest.raises(error, match="version"):
                llm.update_weights(state(3), version=wrong)
        with pytest.raises(ValueError, match="0 tensors"):
            llm.update_weights({}, version=8)
        assert llm.version == 7
        llm.update_weights(state(3))
        (output,) = llm.generate([PROMPTS[0]], PARAMS, use_tqdm=False)
        assert llm.version == output.version == 8 and output.versions == [8] * 8


def test_a_live_module_counts_its_changes_by_itself():
    gpt = GPT()
    with serve(model=gpt) as llm:
        steps = optimizers(gpt)
        for version in range(3):
            outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
            assert [output.versions for output in outputs] == [[version] * 8] * 2
            train(gpt, steps, seed=version)
        llm.sleep()
        train(gpt, steps)
        assert llm.version == 2  # a step takes the changes over
        (output,) = llm.generate([PROMPTS[0]], PARAMS, use_tqdm=False)
        assert output.version == llm.version == 3
        gpt.lm_head = torch.nn.Linear(64, 320, bias=False)  # other memory
        llm.update_weights(gpt, version=20)
        assert llm.version == 20
        llm.sleep()
        llm.update_weights(GPT(seed=2), version=30)
        llm.wake()
        assert llm.version == 30
        llm.wake()
        assert llm.generate([PROMPTS[0]], PARAMS, use_tqdm=False)[0].version == 30
        llm.sleep()
        train(gpt, optimizers(gpt))
        assert llm.generate([PROMPTS[0]], PARAMS, use_tqdm=False)[0].version == 31


# which version drew a token -----------------------------------------------------------------------


@pytest.mark.parametrize("is_ahead", [False, True], ids=["plain", "ahead"])
def test_each_token_has_the_version_that_drew_it(is_ahead):
    """Tokens before a change are those of an engine without it, with the old version."""
    with serve(model=GPT()) as llm:
        (expected,) = llm.generate([PROMPTS[0]], PARAMS, use_tqdm=False)
    with serve(model=GPT()) as llm:
        if is_ahead:
            set_overlap(llm)
        first = llm.add_request(PROMPTS[0], PARAMS)
        step(llm, 3)
        late = llm.add_request(PROMPTS[1], PARAMS)  # waits when the weights change
        llm.update_weights(state(1), version=4)
        noted = len(next(iter(llm.requests.values())).sequences[0].output)
        assert noted == 3 + is_ahead  # a step in flight was finished with the old weights
        step(llm, 6)
        llm.update_weights(state(2))
        outputs = finish(llm)
    versions = outputs[first].versions
    assert versions[:noted] == [0] * noted and versions[noted] == 4
    assert versions == sorted(versions) and set(versions) == {0, 4, 5} and len(versions) == 8
    assert outputs[first].token_ids[:noted] == expected.token_ids[:noted]
    assert outputs[first].token_ids != expected.token_ids
    assert outputs[first].version == 5
    assert set(outputs[late].versions) == {4, 5} and outputs[late].versions[0] == 4


def test_forks_preempted_samples_and_an_error_keep_the_versions():
    params = SamplingParams(max_tokens=12, ignore_eos=True, seed=1, n=3)
    with serve(model=GPT(), num_blocks=8, block_size=4, enable_prefix_caching=False) as llm:
        ids = [llm.add_request(PROMPTS[1][:5], params), llm.add_request(PROMPTS[1][1:5], params)]
        step(llm, 9)
        assert llm.stats()["preemptions"] > 0
        llm.update_weights(state(1))
        llm.guard.perform(llm.recover)  # as after an exception
        before = [len(s.output) for r in llm.requests.values() for s in r.sequences]
        outputs = finish(llm)
    samples = [sample for i in ids for sample in outputs[i].samples]
    assert len(samples) == len(before) == 6
    for sample, num_old in zip(samples, before, strict=True):
        length = len(sample["token_ids"])
        assert sample["versions"] == [0] * num_old + [1] * (length - num_old)


def test_an_update_that_fails_half_way_loses_no_version(monkeypatch):
    with build(plain=True, num_blocks=60) as llm:
        weights = {name: w.detach().clone() for name, w in llm.model.state_dict().items()}
        request = llm.add_request(PROMPTS[0], PARAMS)
        step(llm, 2)

        def fail(state):
            monkeypatch.undo()
            raise MemoryError

        monkeypatch.setattr(llm.model, "load_state_dict", fail)
        with pytest.raises(MemoryError):
            llm.update_weights(weights, version=1)
        step(llm, 4)  # drawn by weights that may be a mixture: under the new number
        llm.update_weights(weights, version=1)
        assert finish(llm)[request].versions == [0] * 2 + [1] * 6


def test_a_batch_of_nanochats_has_a_list_of_versions():
    gpt = GPT()
    with serve(model=gpt) as llm:
        train(gpt, optimizers(gpt))
        sizes = {"num_samples": 2, "max_tokens": 5}
        sequences, masks, logprobs, versions = llm.generate_batch(
            PROMPTS, **sizes, logprobs=True, versions=True
        )
        for prompt, rows, others in zip(PROMPTS, sequences, versions, strict=True):
            for row, mine in zip(rows, others, strict=True):
                assert mine == [-1] * len(prompt) + [1] * (len(row) - len(prompt))
        assert len(llm.generate_batch(PROMPTS[0], **sizes, versions=True)) == 3
        assert llm.generate_batch(PROMPTS[0], max_tokens=0, versions=True)[2] == [[-1] * 20]


# samples that are too far behind ------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1, None])
def test_a_sample_ends_when_the_weights_are_too_many_versions_ahead(lag):
    with serve(model=GPT()) as llm:
        limited = llm.add_request(PROMPTS[0], PARAMS, max_version_lag=lag)
        free = llm.add_request(PROMPTS[1], PARAMS)
        step(llm, 2)
        waiting = llm.add_request(PROMPTS[1], PARAMS, max_version_lag=0)
        llm.update_weights(state(1))
        step(llm, 4 if lag != 0 else 0)
        llm.update_weights(state(2))
        outputs = finish(llm)
        llm.scheduler.blocks.check([])
    output = outputs[limited]
    if lag is None:
        assert output.finish_reason == "length" and len(output.token_ids) == 8
    else:
        assert (output.finish_reason, output.stop_reason) == ("abort", "max_version_lag")
        assert set(output.versions) == set(range(lag + 1))
        assert len(output.token_ids) == len(output.versions) >= 2
    assert outputs[free].finish_reason == "length"
    assert set(outputs[waiting].versions) <= {1} or set(outputs[waiting].versions) == {2}


def test_a_sample_that_ended_stays_so_after_an_error():
    """One of three samples is shorter: the others have finished, and the request lives on."""
    params = SamplingParams(max_tokens=8, ignore_eos=True, seed=1, n=2)
    with serve(model=GPT()) as llm:
        request = llm.add_request(PROMPTS[0], params, max_version_lag=0)
        step(llm, 2)
        second = next(iter(llm.requests.values())).sequences[1]
        llm.scheduler.preempt(second)
        del second.token_ids[second.num_prompt :]  # as if it had not begun
        llm.update_weights(state(1))
        assert len(llm.requests) == 1
        llm.guard.perform(llm.recover)
        first, other = finish(llm)[request].samples
        assert (first["stop_reason"], first["versions"]) == ("max_version_lag", [0, 0])
        assert (other["stop_reason"], other["versions"]) == ("max_tokens", [1] * 8)


def test_a_live_module_that_is_trained_ends_samples_also_over_a_sleep():
    gpt = GPT()
    with serve(model=gpt) as llm:
        for sleeps in (False, True):
            request = llm.add_request(PROMPTS[0], PARAMS, max_version_lag=0)
            step(llm, 2)
            if sleeps:
                llm.sleep()
            train(gpt, optimizers(gpt))
            assert finish(llm)[request].stop_reason == "max_version_lag"
            assert llm.is_finished()


@pytest.mark.parametrize(("lag", "error"), [(-1, ValueError), ("1", TypeError), (0.5, TypeError)])
def test_a_bad_lag_is_refused_by_name(lag, error):
    with serve(model=GPT()) as llm:
        with pytest.raises(error, match="max_version_lag"):
            llm.generate([PROMPTS[0]], PARAMS, max_version_lag=lag)
        assert llm.is_finished()
