"""nanochat's Engine by another import: its signatures, results and leniency, on live modules."""

import gc
import inspect
import logging
import re
import subprocess
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

import numpy as np
import pytest
import torch
from helpers.full_engines import TOOL_GOLDENS, everything_is_free
from helpers.goldens import MODEL
from helpers.nanochat_engines import (
    BOOKS,
    CHAIN,
    PAGE,
    STORY,
    TOOLS,
    Methods,
    chain,
    code_blocks,
    rows_of,
)

from microvllm import LLM, SamplingParams
from microvllm.checkpoint import load_model
from microvllm.nanochat import Engine
from microvllm.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = {"max_tokens": 12, "temperature": 0.0}


@pytest.fixture(scope="module")
def books():
    """An Engine on the bundled model."""
    return Engine(load_model(MODEL), BOOKS, num_blocks=400)


# what nanochat's Engine does ----------------------------------------------------------------------


def test_the_signatures_are_nanochats():
    asked = "(self, tokens, num_samples=1, max_tokens=None, temperature=1.0, top_k=None, seed=42"
    assert str(inspect.signature(Engine.generate)).startswith(asked)
    assert (
        str(inspect.signature(Engine.generate_batch)) == "(self, tokens, num_samples=1, **kwargs)"
    )
    assert str(inspect.signature(Engine)) == "(model, tokenizer, **options)"


def test_greedy_tokens_on_a_live_module_of_every_era_are_nanochats(era):
    engine = Engine(load_model(era.directory), TOOLS, num_blocks=2000, **era.overrides)
    prompts = [p["ids"] for p in era.json["prompts"]]
    tokens = [p["greedy_tokens"] for p in era.json["prompts"]]
    assert len(prompts[-1]) > engine.model.config.sequence_len
    found, masks = engine.generate_batch(prompts, max_tokens=40, temperature=0.0)
    assert found == [[ids + new] for ids, new in zip(prompts, tokens, strict=True)]
    assert masks == [[[0] * len(ids) + [1] * 40] for ids in prompts]
    columns = [*engine.generate(prompts[-1], 3, max_tokens=40, temperature=0.0)]
    assert columns == [([token] * 3, [1] * 3) for token in tokens[-1]]


@pytest.mark.parametrize("tokenizer", [TOOLS, Methods(TOOLS)])
@pytest.mark.parametrize("num_samples", [1, 2])
def test_columns_masks_and_batches_with_the_calculator_are_nanochats(tokenizer, num_samples):
    engine = Engine(load_model(CHAIN), tokenizer)
    for run in TOOL_GOLDENS["runs"]:
        options = {"num_samples": num_samples, "max_tokens": 60, "temperature": 0.0}
        rows = rows_of([*engine.generate(run["prompt"], **options)])
        assert rows == [(run["tokens"], run["masks"])] * num_samples and 0 in run["masks"]
        golden = run["generate_batch_2"]
        expected = golden["results"][:num_samples], golden["masks"][:num_samples]
        assert engine.generate_batch(run["prompt"], **options) == expected


def test_forced_tokens_count_towards_max_tokens():
    run = TOOL_GOLDENS["runs"][0]
    first = run["masks"].index(0)
    for count in (first, first + 1, first + 3):
        (row,) = rows_of([*chain().generate(run["prompt"], 1, count, 0.0)])
        assert row == (run["tokens"][:count], run["masks"][:count])


def test_a_sample_that_has_ended_is_filled_until_the_last_one_ends(books):
    end = BOOKS.encode_special("<|assistant_end|>")
    prompt = BOOKS.render_for_completion([{"role": "user", "content": "Who wrote Emma?"}])
    options = {"num_samples": 6, "max_tokens": 30, "temperature": 2.0, "seed": 3}
    rows = rows_of([*books.generate(prompt, **options)])
    sequences, masks = books.generate_batch(prompt, **options)
    lengths = [len(ids) - len(prompt) for ids in sequences]
    assert len(set(lengths)) > 1
    # the end token of the last one to end is the last column, unless max_tokens cut it
    assert len(rows[0][0]) == min(30, max(lengths) + 1)
    for (tokens, theirs), ids, mask in zip(rows, sequences, masks, strict=True):
        count = len(ids) - len(prompt)
        assert tokens[:count] == ids[len(prompt) :] and theirs[:count] == mask[len(prompt) :]
        assert theirs[count : count + 1] == [1] * (count < 30)  # its end was drawn
        assert tokens[count] in BOOKS.eos_ids if count < 30 else True
        assert {*tokens[count + 1 :]} <= {end} and 1 not in theirs[count + 1 :]


def test_columns_come_while_the_samples_run_and_who_leaves_early_frees_them(books):
    columns = books.generate(STORY, 3, max_tokens=40)
    for _ in range(2):
        tokens, masks = next(columns)
        assert len(tokens) == 3 and masks == [1, 1, 1]
    running = books.llm.scheduler.running
    assert [len(seq.output) for seq in running] == [2, 2, 2]
    columns.close()
    assert everything_is_free(books.llm)


@pytest.mark.parametrize("options", [{"num_blocks": 9}, {"prompt_lookup": 4}, {"plain": True}])
def test_preemptions_guesses_and_the_plain_model_change_no_column(books, options):
    engine = Engine(books.model, BOOKS, **{"num_blocks": 400} | options)
    asked = {"num_samples": 5, "max_tokens": 40, "temperature": 0.8, "seed": 11}
    assert [*engine.generate(STORY * 3, **asked)] == [*books.generate(STORY * 3, **asked)]
    if "num_blocks" in options:
        assert engine.llm.scheduler.num_preemptions
    assert everything_is_free(engine.llm)


# its leniency -------------------------------------------------------------------------------------


def test_any_integer_is_a_seed(books):
    def draw(seed):
        batch, _ = books.generate_batch(STORY, 2, max_tokens=8, seed=seed)
        (first, _), (second, _) = rows_of([*books.generate(STORY, 2, 8, seed=seed)])
        assert batch == [STORY + first, STORY + second] and first != second
        return batch

    assert draw(-1) == draw(2**64 - 1) == draw(-1 - 2**80)
    assert draw(-(10**40)) and draw(10**40) != draw(42)
    assert draw(np.int64(42)) == draw(42) == books.generate_batch(STORY, 2, max_tokens=8)[0]
    for bad in (None, 1.5, "1"):
        with pytest.raises(TypeError, match="seed must be an integer"):
            books.generate_batch(STORY, seed=bad)
    # the last prompt of a list has the seed after the greatest one
    several, _ = books.generate_batch([STORY, STORY], max_tokens=8, seed=2**64 - 1)
    assert several[1] == books.generate_batch(STORY, max_tokens=8, seed=0)[0]


def test_top_k_of_nothing_or_of_more_than_the_vocabulary_is_off(books):
    def draw(top_k):
        (tokens, _), *_ = rows_of([*books.generate(STORY, 1, 12, 1.5, top_k, 5)])
        options = {"max_tokens": 12, "temperature": 1.5, "top_k": top_k, "seed": 5}
        assert books.generate_batch(STORY, **options)[0] == [STORY + tokens]
        return tokens

    free = draw(None)
    assert all(draw(top_k) == free for top_k in (0, -1, -(10**30), 4096, 5000, 10**30))
    assert draw(1) == rows_of([*books.generate(STORY, 1, 12, 0.0)])[0][0] != free
    with pytest.raises(TypeError, match="top_k"):
        draw(2.5)


def test_max_tokens_zero_gives_the_prompt_and_no_column(books):
    assert [*books.generate(STORY, 2, max_tokens=0)] == []
    assert books.generate_batch(STORY, 2, max_tokens=0) == ([STORY] * 2, [[0] * len(STORY)] * 2)
    sequences, masks, logprobs = books.generate_batch([STORY, [5]], max_tokens=0, logprobs=True)
    assert (sequences, masks) == ([[STORY], [[5]]], [[[0] * len(STORY)], [[0]]])
    assert logprobs == [[[0.0] * len(STORY)], [[0.0]]]
    for bad, what in (({"max_tokens": -1}, "max_tokens"), ({"temperature": -1.0}, "temperature")):
        with pytest.raises(ValueError, match=what):
            books.generate_batch(STORY, **bad)
        with pytest.raises(ValueError, match=what):
            next(books.generate(STORY, **bad))
    with pytest.raises(ValueError, match=r"prompts\[1\]: token id 9999"):  # here as well
        books.generate_batch([STORY, [9999]], max_tokens=0)


def test_without_max_tokens_the_context_is_the_end():
    engine = chain()
    context = engine.model.config.sequence_len
    # a sampled text of the untrained model that does not end by itself
    (sequence,), _ = engine.generate_batch([5] * (context - 9), ignore_eos=True)
    assert len(sequence) == context
    assert len([*engine.generate([5] * (context - 3), temperature=9.0)]) <= 3
    message = f"{context} tokens, but the context has {context}: give max_tok"
    with pytest.raises(ValueError, match=message):
        engine.generate_batch([5] * context)


def test_samples_beyond_the_batch_are_served_in_turns(books):
    engine = Engine(books.model, BOOKS, num_blocks=400, max_batch_size=2)
    options = {"num_samples": 7, "max_tokens": 8, "seed": 9}
    assert engine.generate_batch(STORY, **options) == books.generate_batch(STORY, **options)
    assert [*engine.generate(STORY, **options)] == [*books.generate(STORY, **options)]
    lists = [engine.generate_batch([STORY, [5]], **options) for engine in (engine, books)]
    assert lists[0] == lists[1] and [len(samples) for samples in lists[0][0]] == [7, 7]
    assert books.generate_batch(STORY, 0, max_tokens=8) == ([], [])
    assert [*books.generate(STORY, 0, max_tokens=8)] == []
    with pytest.raises(ValueError, match="num_samples"):
        books.generate_batch(STORY, -1)
    # errors of a list name the prompt, however many turns there are
    with pytest.raises(ValueError, match=r"prompts\[1\]"):
        engine.generate_batch([STORY, []], **options)


def test_prompt_and_output_may_have_ten_times_the_context(caplog):
    engine = chain()
    limit = 10 * engine.model.config.sequence_len
    (sequence,), _ = engine.generate_batch([5] * (limit - 4), max_tokens=3, ignore_eos=True)
    assert len(sequence) == limit - 1
    with pytest.raises(ValueError, match=f"max_model_len is {limit}: 1 too many"):
        engine.generate_batch([5] * limit, max_tokens=1)
    with caplog.at_level(logging.WARNING, "microvllm"):
        (sequence,), _ = engine.generate_batch([5] * (limit - 4), max_tokens=9, ignore_eos=True)
    assert len(sequence) == limit and f"cut at max_model_len={limit}" in caplog.text


# what nanochat's has not --------------------------------------------------------------------------


def test_a_stop_string_is_not_taken_for_an_end_token(books):
    options = {"max_tokens": 24, "temperature": 0.0}
    whole = books.llm.generate([STORY], SamplingParams(**options))[0]
    word = whole["text"].split()[3]
    (output,) = books.llm.generate([STORY], SamplingParams(stop=word, **options))
    assert output["stop_reason"] == word
    (sequence,), (mask,) = books.generate_batch(STORY, stop=word, **options)
    assert sequence == STORY + output["token_ids"] and len(mask) == len(sequence)
    # a stop token is one, as <|assistant_end|> is
    last = output["token_ids"][-1]
    (sequence,), _ = books.generate_batch(STORY, stop_token_ids=[last], **options)
    first = whole["token_ids"].index(last)
    assert sequence == STORY + whole["token_ids"][:first]


def test_log_probabilities_are_the_samplers_and_nothing_for_what_was_not_sampled(books):
    options = {"max_tokens": 12, "temperature": 0.7, "top_k": 5, "seed": 4}
    result = books.generate_batch([STORY, [5]], 2, logprobs=True, **options)
    sequences, masks, logprobs = result
    assert (sequences, masks) == books.generate_batch([STORY, [5]], 2, **options)
    for i, prompt in enumerate((STORY, [5])):
        params = SamplingParams(n=2, logprobs=0, **options | {"seed": 4 + i})
        (output,) = books.llm.generate([prompt], params)
        for k, sample in enumerate(output["samples"]):
            wanted = [entry["sampler_logprob"] for entry in sample["logprobs"]]
            count = len(sequences[i][k]) - len(prompt)
            assert logprobs[i][k][: len(prompt)] == [0.0] * len(prompt)
            # the batch is another one, and so is the rounding
            assert logprobs[i][k][len(prompt) :] == pytest.approx(wanted[:count], abs=1e-5)
            assert min(logprobs[i][k]) < -0.1
    *_, (greedy,) = books.generate_batch(STORY, logprobs=True, **PLAIN)
    assert greedy == [0.0] * (len(STORY) + 12)
    run = TOOL_GOLDENS["runs"][0]
    _, (mask,), (scores,) = chain().generate_batch(
        run["prompt"], logprobs=True, max_tokens=60, temperature=0.3, seed=1
    )
    assert len(mask) == len(scores) and mask.count(0) > len(run["prompt"])
    assert all(score == 0.0 for score, sampled in zip(scores, mask, strict=True) if not sampled)


# models and tokenizers ----------------------------------------------------------------------------


def test_the_text_of_a_tokenizer_that_has_only_methods_is_whole():
    with LLM(model=load_model(CHAIN), tokenizer=Methods(TOOLS)) as llm, chain().llm as own:
        assert llm.tokenizer.special_tokens == own.tokenizer.special_tokens
        assert (llm.tokenizer.vocab_size, llm.tokenizer.has_chat) == (
            own.tokenizer.vocab_size,
            True,
        )
        ids = TOOLS.encode("né – 中文 🙂 end") + [TOOLS.bos_id] + TOOLS.encode("é")
        decoder = llm.tokenizer.decoder()
        assert "".join(map(decoder.push, ids)) + decoder.flush() == TOOLS.decode(ids, True)
        cut = TOOLS.encode("🙂")[:-1]
        decoder = llm.tokenizer.decoder()
        assert "".join(map(decoder.push, cut)) == "" and "\ufffd" in decoder.flush()
        params = SamplingParams(temperature=5.0, max_tokens=30, seed=2, ignore_eos=True)
        outputs = [engine.generate(["a text", [5, 6]], params) for engine in (llm, own)]
        assert outputs[0] == outputs[1]


def test_a_tokenizer_without_nanochats_methods_is_refused_by_the_names_of_these():
    class Half:
        encode = decode = print

    engine = Engine(load_model(CHAIN), Half())
    with pytest.raises(TypeError, match="Half, which has no encode_special, get_bos_token_id"):
        engine.generate_batch([5])


def test_a_model_that_has_only_a_forward_is_refused_where_it_is_first_needed():
    class Mock:
        config = load_model(CHAIN).config

        def forward(self, ids, kv_cache=None):
            return torch.zeros(*ids.shape, 311)

    engine = Engine(Mock(), TOOLS)
    for ask in (lambda: engine.generate_batch([5]), lambda: [*engine.generate([5])]):
        with pytest.raises(TypeError, match="a forward alone .* got Mock"):
            ask()


def test_the_engine_underneath_is_made_once_and_when_it_is_needed(monkeypatch):
    made = []
    first = LLM.__init__

    def counted(self, *args, **options):
        made.append(options)
        first(self, *args, **options)

    monkeypatch.setattr(LLM, "__init__", counted)
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    model = load_model(CHAIN)
    model.get_device = lambda: torch.device("cpu")
    engine = Engine(model, TOOLS, max_batch_size=3)
    assert (engine.model, engine.tokenizer, made) == (model, TOOLS, [])
    prompt = TOOL_GOLDENS["runs"][0]["prompt"]
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda _: engine.generate_batch(prompt, **PLAIN), range(4))
        assert len({str(result) for result in results}) == 1
    (options,) = made
    assert options["device"] == torch.device("cpu") and options["dtype"] == "float32"
    assert options["max_batch_size"] == 3 and engine.llm.max_model_len == 1280
    monkeypatch.delenv("NANOCHAT_DTYPE")
    assert chain(max_model_len=50).llm.max_model_len == 50 and made[1]["dtype"] == "auto"


def test_an_engine_without_references_gives_its_memory_back_at_once():
    gc.collect()
    gc.disable()  # scripts make one after the other, and each has a pool
    try:
        engine = chain()
        for _ in engine.generate([5], 2, max_tokens=3):
            engine.generate_batch([6], max_tokens=2)
        kept = weakref.ref(engine.llm), weakref.ref(engine.llm.cache)
        del engine
        assert kept[0]() is kept[1]() is None
    finally:
        gc.enable()


def test_a_sample_that_fails_raises_and_leaves_nothing_behind():
    def fail(tokens, logits):
        raise OSError("no rules")

    engine = chain()
    with pytest.raises(RuntimeError, match="sample 0 of 2: logits_processor: OSError: no rules"):
        engine.generate_batch([[5], [6]], max_tokens=4, logits_processor=fail)
    assert everything_is_free(engine.llm)
    model = load_model(CHAIN)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="no token is left to draw"):
        [*Engine(model, TOOLS).generate([5], 2, max_tokens=4)]
    columns = engine.generate(TOOL_GOLDENS["runs"][0]["prompt"], 2, 60, 0.0)
    next(columns)
    engine.llm.abort(*engine.llm.requests)
    with pytest.raises(RuntimeError, match="aborted"):
        list(columns)


# the page -----------------------------------------------------------------------------------------


class NanochatTokenizer(Methods):
    """As nanochat has it: around a tiktoken.Encoding."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer)
        self.enc = tokenizer._encoding


def test_the_snippets_of_the_page_run(capsys):
    questions = ["Who wrote Dracula?", "What is the capital of France?"]
    given = {
        "model": load_model(MODEL), "tokenizer": NanochatTokenizer(BOOKS),
        "conversations": [{"messages": [{"role": "user", "content": q}]} for q in questions],
    }  # fmt: skip
    given["conversation"] = given["conversations"][0]
    snippets = code_blocks("python")
    assert len(snippets) == 11
    for snippet in snippets:
        exec(compile(snippet, "NANOCHAT.md", "exec"), given)
    printed = capsys.readouterr().out
    assert printed.startswith("Dracula was written by") and "The capital of France is" in printed
    assert given["completions"] and set(given["best"]) <= {0, 1, 2, 3}
    assert all(len(sample) == 2 for sample in zip_longest(given["sequences"], given["masks"]))
    # what several prompts give in a list is what each gives alone
    for i, prompt in enumerate(given["prompts"]):
        alone, _ = given["engine"].generate_batch(prompt, max_tokens=16, temperature=0)
        assert alone == given["results"][i]


def test_the_command_of_the_page_changes_the_one_line(tmp_path):
    (command,) = code_blocks("bash")
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    text = "import torch\n{}\nfrom nanochat.common import print0\n"
    (scripts / "a.py").write_text(text.format("from nanochat.engine import Engine"))
    subprocess.run(["bash", "-ec", command], cwd=tmp_path, check=True, timeout=60)
    assert (scripts / "a.py").read_text() == text.format(code_blocks("python")[0].split("  #")[0])
    names = re.findall(r"^\| `(\w+)` \|", PAGE, re.M)
    assert names == "chat_cli chat_eval chat_rl base_eval base_train chat_sft infer_bench".split()
