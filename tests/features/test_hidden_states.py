"""Hidden states of prompts and answers, and embeddings."""

import threading
from functools import partial

import pytest
import torch
from helpers.full_engines import build, everything_is_free, set_overlap
from helpers.goldens import ERAS, FIXTURES, MODEL
from helpers.standin import GPT

from microvllm import LLM, SamplingParams
from microvllm.features.hidden_states import ShownSequence, load_hidden_states
from microvllm.runner import Extension

pytestmark = pytest.mark.usefixtures("one_thread")
serve = partial(LLM, tokenizer_path=ERAS / "tokenizer", num_blocks=60, device="cpu", plain=True)

PROMPTS = [[5 * i % 300 for i in range(40)], [7 * i % 300 for i in range(9)], [3]]
PARAMS = [
    SamplingParams(max_tokens=6, ignore_eos=True, seed=3, n=2),
    SamplingParams(max_tokens=9, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=1, ignore_eos=True, seed=1),
]


def hooked(gpt: GPT, token_ids: list[int], layers: tuple[int, ...]) -> torch.Tensor:
    """(T, layers, C) of forward hooks on a module's blocks, in one pass of plain torch."""
    states = {}
    handles = [
        block.register_forward_hook(partial(keep_output, states, i))
        for i, block in enumerate(gpt.transformer.h)
    ]
    with torch.no_grad():
        gpt(torch.tensor([token_ids]))
    for handle in handles:
        handle.remove()
    return torch.stack([states[layer] for layer in layers], dim=1)


def keep_output(states, layer, module, inputs, output) -> None:
    states[layer] = output[0].clone()


def assert_states(gpt: GPT, outputs: list, layers: tuple[int, ...]) -> None:
    for output in outputs:
        assert output.hidden_states is output.samples[0]["hidden_states"]
        for sample in output.samples:
            token_ids = output.prompt_token_ids + sample["token_ids"]
            found = sample["hidden_states"]
            assert found.dtype == torch.float32 and found.shape[0] == len(token_ids)
            expected = hooked(gpt, token_ids, layers)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# the numbers --------------------------------------------------------------------------------------

ENGINES = {
    "plain": {},
    "fused": {"plain": False, "attention": "sdpa"},
    "small steps": {"max_batched_tokens": 7},
    "no cache": {"enable_prefix_caching": False},
    "lookup": {"prompt_lookup": 3},
}


@pytest.mark.parametrize("newest", [True, False], ids=["era 5", "era 1"])
@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES)
def test_they_are_what_hooks_on_the_modules_blocks_see(options, newest):
    gpt = GPT(newest=newest)
    with serve(model=gpt, **options) as llm:
        for layers in ((1, 3), (3, 0, 2)):  # the second time with a warm prefix cache
            outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False, hidden_states=layers)
            assert_states(gpt, outputs, layers)
        plain = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        for with_states, without in zip(outputs, plain, strict=True):
            assert with_states.token_ids == without.token_ids
            assert "hidden_states" not in without
        assert everything_is_free(llm)


def test_they_are_the_same_one_step_ahead_and_after_preemptions():
    gpt = GPT()
    with serve(model=gpt) as llm:
        set_overlap(llm)
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False, hidden_states=-1)
        assert_states(gpt, outputs, (3,))
    with serve(model=gpt, block_size=4, max_batched_tokens=16) as llm:
        preempter = Preempter()
        llm.add_extension(preempter)
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False, hidden_states=(0, 3))
        assert preempter.num_left == 0
        assert_states(gpt, outputs, (0, 3))


class Preempter(Extension):
    """Preempts texts of the pass that are computed in part."""

    num_left = 3

    def on_step(self, plan):
        scheduler = self.engine.scheduler
        for seq in list(scheduler.running):
            if isinstance(seq, ShownSequence) and self.num_left > 0:
                scheduler.preempt(seq)
                self.num_left -= 1


@pytest.mark.parametrize("name", ["era2", "era3", "era4"])
def test_all_eras_have_them_and_the_fused_model_agrees(name):
    prompt = FIXTURES[name].json["prompts"][1]["ids"]
    found = []
    for options in ({"plain": True}, {"attention": "sdpa"}):
        with build(name, **options) as llm:
            (output,) = llm.generate([prompt], PARAMS[1], use_tqdm=False, hidden_states=(0, 2, -1))
            found.append(output.hidden_states)
            if options.get("plain"):
                module = llm.model
                last = module.logits(norm_of(module, output.hidden_states[-1:, -1]))
                if not module.recipe.smear:  # backout comes between the last layer and the head
                    (score,) = llm.score([prompt + output.token_ids], [[5]])
                    cap = module.recipe.softcap
                    logits = cap * torch.tanh(last / cap)
                    assert logits.log_softmax(-1)[0, 5].item() == pytest.approx(score[0], abs=1e-4)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def norm_of(module, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), eps=module.recipe.eps)


def test_kernels_and_the_models_own_dtype():
    """The bundled model with its kernels, beside requests that others make meanwhile."""
    prompt = "The island was small, and"
    params = SamplingParams(max_tokens=12, temperature=0)
    with LLM(MODEL, num_blocks=100, plain=True) as llm:
        (expected,) = llm.generate([prompt], params, use_tqdm=False, hidden_states=(2, 5))
    with LLM(MODEL, num_blocks=100) as llm:
        other = llm.add_request("My uncle", SamplingParams(max_tokens=40, seed=1, ignore_eos=True))
        wanted = {"layers": (2, 5), "dtype": "model"}
        (output,) = llm.generate([prompt], params, use_tqdm=False, hidden_states=wanted)
        assert output.token_ids == expected.token_ids
        assert output.hidden_states.dtype == llm.model.dtype
        torch.testing.assert_close(
            output.hidden_states.float(), expected.hidden_states, atol=1e-3, rtol=1e-3
        )
        while not llm.is_finished():
            for done in llm.step():
                assert done.request_id == other and len(done.token_ids) == 40


# scores, chats and embeddings ---------------------------------------------------------------------


def test_score_has_them_for_prompt_and_continuation():
    gpt = GPT()
    with serve(model=gpt) as llm:
        plain = llm.score(PROMPTS, [[1, 2, 3], [4], [5, 6]])
        scores, states = llm.score(PROMPTS, [[1, 2, 3], [4], [5, 6]], hidden_states=(2,))
        assert [[round(x, 4) for x in row] for row in scores] == [
            [round(x, 4) for x in row] for row in plain
        ]
        for prompt, ending, found in zip(PROMPTS, [[1, 2, 3], [4], [5, 6]], states, strict=True):
            expected = hooked(gpt, prompt + ending, (2,))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        (chat,) = llm.chat([{"role": "user", "content": "a"}], PARAMS[1], False, hidden_states=1)
        assert len(chat.hidden_states) == len(chat.prompt_token_ids) + len(chat.token_ids)


def test_embeddings_are_pooled_states():
    gpt = GPT()
    with serve(model=gpt) as llm:
        texts = [*PROMPTS, "a text"]
        ids = [llm.tokenizer.prompt_ids(text) for text in texts]
        states = [hooked(gpt, token_ids, (1, 3)) for token_ids in ids]
        bos = llm.tokenizer.bos_id
        means = [
            x[int(i[0] == bos and len(i) > 1) :].mean(0) for x, i in zip(states, ids, strict=True)
        ]
        found = llm.embed(texts)
        assert found.shape == (4, 64) and found.dtype == torch.float32 and ids[3][0] == bos
        close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)
        close(found, torch.stack(means)[:, 1])
        close(llm.embed(texts, "last", layer=1), torch.stack([x[-1, 0] for x in states]))
        largest = llm.embed(texts, lambda x: x.amax(0), layer=-1)
        close(largest, torch.stack([x[:, 1].amax(0) for x in states]))
        close(llm.embed("a text"), found[3:])
        assert llm.embed([]).shape == (0, 64)
        for wrong, error, message in (
            ({"pooling": "max"}, ValueError, "'mean' or 'last'"),
            ({"layer": 4}, ValueError, "between -4 and 3"),
            ({"layer": "x"}, TypeError, "^layer must be an integer, got 'x'"),
            ({"layer": (1, 2)}, TypeError, "^layer must be an integer"),
            ({"pooling": lambda states: states}, ValueError, r"pooling returned .*\(40, 64\) and"),
            ({"pooling": lambda states: "x"}, TypeError, "pooling must return a tensor, got 'x'"),
        ):
            with pytest.raises(error, match=message):
                llm.embed(texts, **wrong)
        with pytest.raises(ValueError, match=r"texts\[1\]"):
            llm.embed(["a", []])
        with pytest.raises(TypeError, match="texts must be a list"):
            llm.embed(5)
        assert everything_is_free(llm)
    with pytest.raises(RuntimeError, match="this LLM was closed"):
        llm.embed(texts)


# files --------------------------------------------------------------------------------------------


def test_a_file_holds_the_same_and_is_mapped(tmp_path):
    path = tmp_path / "states.bin"
    with serve(model=GPT()) as llm:
        wanted = {"layers": (0, 2), "path": path}
        expected = llm.generate(PROMPTS, PARAMS, use_tqdm=False, hidden_states=(0, 2))
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False, hidden_states=wanted)
    states, about = load_hidden_states(path)
    assert about["layers"] == [0, 2] and about["dtype"] == "float32"
    assert [(text["prompt"], text["sample"]) for text in about["texts"]] == [
        (0, 0), (0, 1), (1, 0), (2, 0),
    ]  # fmt: skip
    for output, other in zip(outputs, expected, strict=True):
        assert "hidden_states" not in output
        for sample, same in zip(output.samples, other.samples, strict=True):
            start, stop = sample["hidden_states_rows"]
            close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)
            close(states[start:stop], same["hidden_states"])
    assert len(states) == stop
    assert sorted(p.name for p in tmp_path.iterdir()) == ["states.bin", "states.bin.json"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"states.bin has [\d,]+ bytes"):
        load_hidden_states(path)


@pytest.mark.parametrize("dtype", ["float32", "model"])
def test_score_writes_a_file_that_holds_what_it_returns_without_one(tmp_path, dtype):
    path = tmp_path / "states.bin"
    endings = [[1, 2, 3], [4], [5, 6]]
    wanted = {"layers": (3, 1), "dtype": dtype}
    # the core's model is float32, the fused one can be bfloat16
    with serve(model=GPT(), dtype="bfloat16", plain=False, attention="sdpa") as llm:
        plain, expected = llm.score(PROMPTS, endings, hidden_states=wanted)
        scores, all_rows = llm.score(PROMPTS, endings, hidden_states=wanted | {"path": path})
        assert scores == plain
        for reader in (llm.score, llm.judge):
            with pytest.raises(ValueError, match="is a folder"):
                reader(PROMPTS, endings, hidden_states=wanted | {"path": tmp_path})
    states, about = load_hidden_states(path)
    assert about["dtype"] == ("float32" if dtype == "float32" else "bfloat16")
    assert about["layers"] == [3, 1] and about["shape"] == list(states.shape)
    assert [text["rows"] for text in about["texts"]] == [list(rows) for rows in all_rows]
    for prompt, ending, (start, stop), same in zip(
        PROMPTS, endings, all_rows, expected, strict=True
    ):
        assert stop - start == len(prompt) + len(ending)
        torch.testing.assert_close(states[start:stop], same)


def test_an_exception_leaves_no_file_and_the_texts(tmp_path, monkeypatch):
    path = tmp_path / "states.bin"
    wanted = {"layers": 1, "path": path}
    with serve(model=GPT()) as llm:
        count = iter(range(100))
        make = llm.hidden_states.on_results

        def interrupted(plan):
            make(plan)
            if plan.layers and next(count) == 1:
                raise KeyboardInterrupt

        llm.hooks.on_results = [
            interrupted if hook.__self__ is llm.hidden_states else hook
            for hook in llm.hooks.on_results
        ]
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS * 20, PARAMS * 20, use_tqdm=False, hidden_states=wanted)
        assert list(tmp_path.iterdir()) == []
        assert len(llm.partial_outputs()) == 60 and llm.partial_outputs()[0].token_ids
        assert everything_is_free(llm) and llm.is_finished()
        llm.generate(PROMPTS, PARAMS, use_tqdm=False, hidden_states=wanted)
        assert path.exists()


def test_threads_share_the_steps():
    gpt = GPT()
    found = {}

    def work(layer: int) -> None:
        found[layer] = llm.generate(PROMPTS, PARAMS, use_tqdm=False, hidden_states=layer)

    with serve(model=gpt) as llm:
        threads = [threading.Thread(target=work, args=(layer,)) for layer in range(4)]
        for thread in threads:
            thread.start()
        scores = llm.score(PROMPTS * 4, [[1, 2]] * 12)
        for thread in threads:
            thread.join()
        assert len(scores) == 12
    for layer, outputs in found.items():
        assert_states(gpt, outputs, (layer,))


# what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        ((0, 4), ValueError, "hidden_states must be between -4 and 3"),
        ((), ValueError, "give at least one layer, each only once"),
        ((1, -3), ValueError, "each only once"),
        ("all", TypeError, "hidden_states must be a list"),
        ((1.5,), TypeError, "hidden_states must be an integer"),
        ({"layer": 1}, ValueError, "keys layers, dtype, path, recompute"),
        ({"layers": 1, "dtype": "int8"}, ValueError, "'float32' or 'model'"),
        ({"layers": 1, "path": "/no/such/folder/x"}, FileNotFoundError, "no folder"),
    ],
)
def test_a_mistake_is_refused_before_any_work(wanted, error, message):
    with serve(model=GPT()) as llm:
        with pytest.raises(error, match=message):
            llm.generate(PROMPTS, PARAMS, use_tqdm=False, hidden_states=wanted)
        assert llm.stats()["steps"] == 0 and llm.is_finished()
        with pytest.raises(TypeError, match="hidden_states"):
            llm.add_request(PROMPTS[0], hidden_states=1)


def test_cached_positions_are_refused_where_they_may_not_be_computed_again():
    with serve(model=GPT()) as llm:
        wanted = {"layers": 1, "recompute": False}
        llm.generate(PROMPTS, PARAMS, use_tqdm=False, hidden_states=wanted)
        with pytest.raises(ValueError, match=r"prompts\[0\]: 32 positions are in the prefix cache"):
            llm.generate(PROMPTS, PARAMS, use_tqdm=False, hidden_states=wanted)
        llm.reset_prefix_cache()
        llm.generate(PROMPTS, PARAMS, use_tqdm=False, hidden_states=wanted)


def test_a_text_that_fills_the_pool_but_for_its_last_token_is_refused():
    params = SamplingParams(max_tokens=4, ignore_eos=True, seed=1)
    with serve(model=GPT(newest=False), num_blocks=4, block_size=4) as llm:
        llm.generate([[1] * 9], params, use_tqdm=False)  # 13 tokens, 12 of them computed
        with pytest.raises(ValueError, match=r"prompts\[0\]: 4 blocks are needed for hidden"):
            llm.generate([[1] * 9], params, use_tqdm=False, hidden_states=1)
        (output,) = llm.generate([[1] * 8], params, use_tqdm=False, hidden_states=1)
        assert len(output.hidden_states) == 12
    with serve(model=GPT(), max_model_len=16) as llm:  # rotary tables reach the last token
        (output,) = llm.generate([[1] * 12], params, use_tqdm=False, hidden_states=1)
        assert len(output.hidden_states) == 16


def test_more_than_memory_holds_is_refused_with_the_remedy(monkeypatch):
    from microvllm.features import hidden_states

    monkeypatch.setattr(hidden_states, "free_memory", lambda device: 1000)
    with serve(model=GPT()) as llm:
        with pytest.raises(
            ValueError, match="hidden states of .* tokens in 2 layers.*give .* path"
        ):
            llm.generate(PROMPTS, PARAMS, use_tqdm=False, hidden_states=(1, 2))
        assert llm.partial_outputs()[0].token_ids
