"""What a user asks of generation beyond plain completions, with the bundled model."""

import json
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import ERAS, MODEL

from microvllm import LLM, SamplingParams
from microvllm.checkpoint import load_model

GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def llm():
    with LLM(MODEL, num_blocks=400) as llm:
        yield llm


def question(llm, text):
    return llm.tokenizer.render_for_completion([{"role": "user", "content": text}])


def everything_is_free(llm):
    blocks = llm.scheduler.blocks
    blocks.check(llm.scheduler.running)
    return blocks.num_free == blocks.num_usable and llm.is_finished()


# streaming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [(), ("the",), (" t", "and the"), ("\ufffd",)])
def test_the_pieces_of_a_stream_joined_are_the_text_of_generate(llm, stop):
    prompts = [question(llm, "Tell me a story in the manner of Charles Dickens."), "Once", ""]
    params = [
        SamplingParams(temperature=0.9, max_tokens=40, seed=seed, n=2, stop=stop)
        for seed in (3, 4, 5)
    ]
    whole = llm.generate(prompts, params)
    texts, tokens, reasons = {}, {}, {}
    for event in llm.stream(prompts, params):
        key = event["index"], event["sample"]
        assert key not in reasons, "an event after the last"
        texts[key] = texts.get(key, "") + event["text"]
        tokens[key] = tokens.get(key, []) + event["token_ids"]
        if event["finish_reason"]:
            reasons[key] = event["finish_reason"], event["stop_reason"]
    for i, output in enumerate(whole):
        for k, sample in enumerate(output["samples"]):
            assert texts[i, k] == sample["text"]
            assert tokens[i, k] == sample["token_ids"]
            assert reasons[i, k] == (sample["finish_reason"], sample["stop_reason"])
    assert everything_is_free(llm)


def test_a_stream_that_is_left_early_gives_its_blocks_back(llm):
    for event in llm.stream(["Once upon a time", "Then"], SamplingParams(max_tokens=50, seed=1)):
        assert event["text"] is not None
        break
    assert everything_is_free(llm)


def test_two_streams_and_a_request_of_its_own_can_interleave(llm):
    params = SamplingParams(temperature=0.8, max_tokens=20, seed=9)
    alone = [llm.generate([p], params)[0]["text"] for p in ("One", "Two", "Three")]
    own = llm.add_request("Three", params)
    streams = [llm.stream([p], params) for p in ("One", "Two")]
    texts = ["", ""]
    while streams != [None, None]:
        for i, stream in enumerate(streams):
            event = next(stream, None) if stream else None
            if event is None:
                streams[i] = None
            else:
                texts[i] += event["text"]
    outputs = []
    while not llm.is_finished():
        outputs += llm.step()
    assert texts == alone[:2]
    assert [(o["request_id"], o["text"]) for o in outputs] == [(own, alone[2])]


# stop strings ---------------------------------------------------------------------------------


def test_a_stop_string_may_straddle_tokens_and_is_cut_off(llm):
    prompt = question(llm, "Who wrote Dracula?")
    text = llm.generate([prompt], GREEDY)[0]["text"]
    assert text == "Dracula was written by Bram Stoker."
    for stop in ("ula w", "Stok", "by Bram S", "."):
        params = SamplingParams(temperature=0, max_tokens=24, stop=stop)
        output = llm.generate([prompt], params)[0]
        assert output["text"] == text[: text.index(stop)]
        assert (output["finish_reason"], output["stop_reason"]) == ("stop", stop)
        shown = llm.tokenizer.decode(output["token_ids"])
        assert stop in shown and not llm.tokenizer.decode(output["token_ids"][:-1]).count(stop)
        # nor does a stream let the beginning of a stop string out
        assert "".join(e["text"] for e in llm.stream([prompt], params)) == output["text"]


def test_of_several_stop_strings_the_first_in_the_text_ends_it(llm):
    prompt = question(llm, "Who wrote Dracula?")
    # " written" is one token, and completes all of these at once
    for stops, ends in ((("tt", "ri"), "ri"), (("en", "s wr", "it"), "s wr")):
        params = SamplingParams(temperature=0, max_tokens=24, stop=stops)
        assert llm.generate([prompt], params)[0]["stop_reason"] == ends, stops


def test_a_stop_token_is_in_the_ids_and_not_in_the_text(llm):
    prompt = question(llm, "Who wrote Dracula?")
    plain = llm.generate([prompt], GREEDY)[0]
    token = plain["token_ids"][4]
    params = SamplingParams(temperature=0, max_tokens=24, stop_token_ids=(token,))
    output = llm.generate([prompt], params)[0]
    assert output["token_ids"] == plain["token_ids"][:5]
    assert output["text"] == llm.tokenizer.decode(plain["token_ids"][:4])
    assert (output["finish_reason"], output["stop_reason"]) == ("stop", token)


# interruption ---------------------------------------------------------------------------------


def test_ctrl_c_in_generate_leaves_the_engine_clean_and_usable(llm):
    before = llm.generate(["Hello"], GREEDY)[0]["token_ids"]
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["Once upon a time"] * 8, SamplingParams(max_tokens=900, ignore_eos=True))
    timer.join()
    assert everything_is_free(llm)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert llm.generate(["Hello"], GREEDY)[0]["token_ids"] == before


def test_an_aborted_request_says_so_and_frees_its_blocks(llm):
    request = llm.add_request("Once upon", SamplingParams(max_tokens=100, ignore_eos=True, n=2))
    for _ in range(5):
        assert llm.step() == []
    llm.abort(request)
    (output,) = llm.step()
    assert output["finish_reason"] == "abort"
    assert [len(s["token_ids"]) for s in output["samples"]] == [5, 5]
    assert everything_is_free(llm)


# the loop one step ahead ----------------------------------------------------------------------


def test_the_loop_that_runs_one_step_ahead_makes_the_same_tokens():
    prompts = ["Once upon a time", "The", "A ship", "Whence", "I saw"]
    params = [
        SamplingParams(temperature=t, max_tokens=m, seed=7, n=n, stop=stop)
        for t, m, n, stop in [
            (0.9, 30, 1, ()),
            (0, 1, 1, ()),
            (0.7, 17, 3, ()),
            (1, 25, 1, ("e",)),
            (0, 30, 1, ()),
        ]
    ]
    outputs = []
    for overlap in (False, True):
        for num_blocks in (400, 7):
            with LLM(MODEL, num_blocks=num_blocks, max_batch_size=4) as llm:
                llm.overlap = overlap
                outputs.append([o["samples"] for o in llm.generate(prompts, params)])
                assert everything_is_free(llm)
                assert (llm.stats()["preemptions"] > 0) == (num_blocks == 7)
    assert all(o == outputs[0] for o in outputs[1:])


# scores ---------------------------------------------------------------------------------------


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
    from microvllm.engine import Sequence, Step, make_batch

    with LLM(MODEL, num_blocks=60, max_batched_tokens=budget) as llm:
        prompts = ["It was the best of times,", "It was the best of", [7]]
        tails = [" it was the worst of times", " x", [9]]
        scores = llm.score(prompts, tails)
        for prompt, tail, got in zip(prompts, tails, scores, strict=True):
            ids = llm.tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else prompt
            tail = llm.tokenizer.encode(tail) if isinstance(tail, str) else tail
            seq = Sequence(0, ids + tail, SamplingParams(seed=0))
            groups = llm.cache.num_groups
            seq.table.extend(range(1, 1 + 8 * groups))
            batch = make_batch(Step([(seq, 0, len(seq.tokens))], [], []), 16, groups)
            batch = batch.upload(llm.device)._replace(logit_rows=torch.arange(len(seq.tokens)))
            with torch.inference_mode():
                logits = llm.model.head(llm.model.forward(batch, llm.cache))
            wanted = torch.log_softmax(logits, -1)[range(len(ids) - 1, len(seq.tokens) - 1), tail]
            assert torch.tensor(got).sub(wanted).abs().max() < 1e-4
            assert len(got) == len(tail)


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


# chat, nanochat's scripts, live weights --------------------------------------------------------


def test_chat_renders_the_conversation_and_stops_at_the_end_of_the_turn(llm):
    messages = [
        {"role": "system", "content": "Who wrote Emma?"},
        {"role": "user", "content": "Who wrote Dracula?"},
    ]
    (output,) = llm.chat(messages, GREEDY)
    assert output["prompt_token_ids"] == llm.tokenizer.render_for_completion(messages)
    assert output["token_ids"][-1] == llm.tokenizer.special_tokens["<|assistant_end|>"]
    assert output["text"] == llm.tokenizer.decode(output["token_ids"][:-1])
    both = llm.chat([messages, messages[1:]], GREEDY)
    assert both[0]["token_ids"] == output["token_ids"] and len(both) == 2


def test_generate_batch_is_nanochats(llm):
    prompt = question(llm, "Who wrote Dracula?")
    sequences, masks = llm.generate_batch(prompt, num_samples=2, max_tokens=30, temperature=0.0)
    answer = llm.tokenizer.encode("Dracula was written by Bram Stoker.")
    assert sequences[0][: len(prompt)] == prompt and sequences[0] == sequences[1]
    assert llm.tokenizer.decode(sequences[0][len(prompt) :]) == llm.tokenizer.decode(answer)
    assert masks[0] == [0] * len(prompt) + [1] * (len(sequences[0]) - len(prompt))
    several, their_masks = llm.generate_batch([prompt, [5, 6]], max_tokens=4, temperature=0.0)
    assert [len(s) for s in several] == [1, 1] and len(their_masks[1][0]) == len(several[1][0])
    assert several[0][0] == sequences[0][: len(prompt) + 4]
    # equal prompts are not drawn alike: each has the seed after the one before
    twice, _ = llm.generate_batch([[5, 6]] * 2, num_samples=2, max_tokens=8, seed=3)
    assert twice[0] != twice[1]
    assert twice[1] == llm.generate_batch([5, 6], num_samples=2, max_tokens=8, seed=4)[0]


class LiveModule(torch.nn.Module):
    """Stands in for nanochat's GPT: a config, and parameters under nanochat's names."""

    def __init__(self):
        super().__init__()
        source = load_model(MODEL)
        self.config = SimpleNamespace(**vars(source.config))
        for name, tensor in source.weights.items():
            self.register_parameter(name.replace(".", "/"), torch.nn.Parameter(tensor.clone()))

    def state_dict(self):
        return {name.replace("/", "."): p.detach() for name, p in self.named_parameters()}


def test_a_live_module_is_wrapped_without_copying_its_weights(llm):
    module = LiveModule()
    with LLM(model=module, tokenizer=llm.tokenizer, num_blocks=100) as live:
        state = module.state_dict()
        assert all(live.model.weights[name].data_ptr() == w.data_ptr() for name, w in state.items())
        prompt = question(llm, "Who wrote Dracula?")
        assert live.generate([prompt], GREEDY) == [
            {**llm.generate([prompt], GREEDY)[0], "request_id": 0, "num_cached_tokens": 0}
        ]
    with pytest.raises(TypeError, match="GPT"):
        LLM(model=torch.nn.Linear(2, 2), tokenizer=llm.tokenizer)
    with pytest.raises(TypeError, match="either"):
        LLM(MODEL, model=module)


def test_new_weights_leave_no_stale_keys_and_values():
    prompt = list(range(5, 60))
    with LLM(MODEL, num_blocks=100) as llm:
        old = {name: w.clone() for name, w in llm.model.weights.items()}
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


# the calculator in the loop --------------------------------------------------------------------


def chain(**kwargs):
    """nanochat's fixture whose next token is a function of the present one: it calls the tool."""
    folder = ERAS / "tool_chain"
    return LLM(folder / "chatsft_checkpoints" / "d1", tokenizer_path=folder / "tokenizer", **kwargs)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_batched_tokens": 3}, {"num_blocks": 9}])
def test_the_calculator_answers_inside_the_loop_as_nanochats_does(overlap, options):
    goldens = json.loads((ERAS / "tool_chain" / "goldens.json").read_text())
    with chain(**options) as llm:
        llm.overlap = overlap
        prompts = [run["prompt"] for run in goldens["runs"]]
        params = SamplingParams(temperature=0, max_tokens=60)
        outputs = llm.generate(prompts, params, tools=True)
        for run, output in zip(goldens["runs"], outputs, strict=True):
            assert output["token_ids"] == run["tokens"]
            assert output["mask"] == run["masks"] and 0 in output["mask"]
        plain = llm.generate(prompts, params)
        assert all(0 not in output["mask"] for output in plain)
        assert plain[0]["token_ids"] != outputs[0]["token_ids"]
        assert llm.scheduler.blocks.num_free == llm.scheduler.blocks.num_usable


def test_chat_calls_the_calculator_unless_it_is_told_not_to():
    goldens = json.loads((ERAS / "tool_chain" / "goldens.json").read_text())
    params = SamplingParams(temperature=0, max_tokens=60)
    with chain() as llm:
        for run in goldens["runs"]:
            (answer,) = llm.chat(run["messages"], params)
            assert (answer["token_ids"], answer["mask"]) == (run["tokens"], run["masks"])
            (plain,) = llm.chat(run["messages"], params, tools=False)
            assert plain["token_ids"] != answer["token_ids"] and 0 not in plain["mask"]
            # nor where the text is looked at for another reason
            pieces = [e["token_ids"] for e in llm.stream([run["prompt"]], params)]
            assert sum(pieces, []) == plain["token_ids"]


def test_forced_tokens_count_towards_max_tokens_and_are_cut_by_it():
    goldens = json.loads((ERAS / "tool_chain" / "goldens.json").read_text())
    run = next(r for r in goldens["runs"] if 0 in r["masks"])
    first = run["masks"].index(0)
    with chain() as llm:
        for more in range(3):
            params = SamplingParams(temperature=0, max_tokens=first + more)
            (output,) = llm.generate([run["prompt"]], params, tools=True)
            assert output["token_ids"] == run["tokens"][: first + more]
            assert output["mask"] == run["masks"][: first + more]
            assert output["finish_reason"] == "length"


def test_a_prompts_generate_batch_equals_nanochats_golden():
    goldens = json.loads((ERAS / "tool_chain" / "goldens.json").read_text())
    with chain() as llm:
        for run in goldens["runs"]:
            sequences, masks = llm.generate_batch(
                run["prompt"], num_samples=2, max_tokens=60, temperature=0.0
            )
            results = run["generate_batch_2"]
            assert sequences == results["results"] and masks == results["masks"]


# every sampling control, through the engine -----------------------------------------------------


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
        llm.overlap = overlap
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


@pytest.mark.parametrize("overlap", [False, True])
def test_a_logits_processor_that_raises_ends_its_request_alone(overlap):
    def third_time_fails(token_ids, logits):
        if len(token_ids) - len(prompt) == 2:
            raise KeyError("no rule for this")
        return logits

    def too_short(token_ids, logits):
        return logits[:3]

    with LLM(MODEL, num_blocks=100) as llm:
        llm.overlap = overlap
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


def test_sample_i_of_n_can_be_asked_for_on_its_own(llm):
    def draw(**kwargs):
        params = SamplingParams(max_tokens=8, temperature=1.0, seed=11, **kwargs)
        return [s["token_ids"] for s in llm.generate(["The sea was"], params)[0]["samples"]]

    together = draw(n=4)
    assert len(set(map(tuple, together))) > 1
    assert [draw(sample_index=i)[0] for i in range(4)] == together
    assert draw(sample_index=1, n=3) == together[1:]


# memory on a GPU ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "max_batched_tokens, max_model_len, max_batch_size, rows",
    [(100, 31, 9, 100), (100, 61, 9, 100), (61, 31, 9, 61), (20, 61, 9, 20), (100, 31, 2, 60)],
)
def test_the_largest_step_is_tried_and_no_larger_one(
    max_batched_tokens, max_model_len, max_batch_size, rows
):
    with LLM(
        MODEL, num_blocks=20, device="cpu", max_batched_tokens=max_batched_tokens,
        max_model_len=max_model_len, max_batch_size=max_batch_size,
    ) as llm:  # fmt: skip
        seen, forward = [], llm.model.forward
        llm.model.forward = lambda batch, cache: seen.append(batch) or forward(batch, cache)
        llm._warm_up(16)
        short, batch = seen
        assert len(short.ids) == 2
        assert len(batch.ids) == rows and len(batch.logit_rows) == max_batch_size
        lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()
        assert max(lengths) < max_model_len and 1 not in lengths[batch.num_decodes :]


def test_the_cache_takes_what_the_largest_step_leaves(monkeypatch):
    """Of a card with so much free, 0.9 is for us; 3 MB is what activations took, and the recorded
    steps have as much again."""
    with LLM(MODEL, num_blocks=20, device="cpu", max_batch_size=400) as llm:
        # a block of all layers is three of two layers each
        free, block = 200_000_000, 3 * llm.cache.data.nbytes // llm.cache.num_blocks
        # 1,024 tokens are in 64 blocks, of the layers with a window of 256 in 17 twice
        wanted = -(-400 * (64 + 2 * 17) // 3) + 1
        llm.device = torch.device("cuda", 0)  # from here on only its numbers
        monkeypatch.setattr(llm, "_warm_up", lambda block_size: None)
        for name, value in {
            "memory_allocated": 7_000_000, "max_memory_allocated": 10_000_000,
            "reset_peak_memory_stats": None, "empty_cache": None, "mem_get_info": (free, 0),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        assert llm._blocks_that_fit(16, 0.9) == (180_000_000 - 6_000_000) // block < wanted
        with pytest.raises(ValueError, match="-4,000,000 bytes are left and a block of 16 tokens"):
            llm._blocks_that_fit(16, 0.01)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2 * wanted * block, 0))
        assert llm._blocks_that_fit(16, 0.9) == wanted  # no more than all sequences can fill

        def full(block_size):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

        monkeypatch.setattr(llm, "_warm_up", full)
        with pytest.raises(ValueError, match="no memory for steps of max_batched_tokens=1024: .*"):
            llm._blocks_that_fit(16, 0.9)
        llm.device = torch.device("cpu")


def test_weights_that_do_not_fit_are_told_in_bytes(monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr("microvllm.checkpoint.GPT", full)
    with pytest.raises(
        ValueError,
        match=r"no memory for weights of [\d,]{9,} bytes in torch.float32: [\d,]{6,} bytes are",
    ):
        LLM(MODEL, device="cpu")
