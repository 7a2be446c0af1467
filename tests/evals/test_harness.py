"""lm-evaluation-harness on this engine: its numbers are those of a plain forward."""

import json
import subprocess
import sys

import pytest
import torch
from helpers.batches import hand_made_batch
from helpers.goldens import ERAS, MODEL, SRC

from microvllm import LLM, cli
from microvllm.attention import PagedKVCache
from microvllm.checkpoint import load_model
from microvllm.sampler import cap_logits

pytest.importorskip("lm_eval", reason="lm-evaluation-harness: pip install -e '.[eval]'")
from helpers.harness_tasks import TASKS, asks, enter_tasks
from lm_eval.api.registry import get_model

from microvllm.evals import HarnessLM, evaluate, find_tasks

pytestmark = pytest.mark.usefixtures("one_thread")
STORY = "It was a dark and stormy night, and the rain fell in torrents. The old man looked up."


@pytest.fixture(scope="module")
def llm():
    with LLM(MODEL, device="cpu", num_blocks=600) as llm:
        yield llm


@pytest.fixture(scope="module")
def lm(llm):
    return HarnessLM(llm)


@pytest.fixture(scope="module")
def plain():
    """The core's own model."""
    return load_model(MODEL)


def plain_logits(model, ids: list[int]) -> torch.Tensor:
    """(T, V) logits of a plain forward of a whole text."""
    batch = hand_made_batch([(ids, 0, len(ids), range(1, 80))], 16)
    cache = PagedKVCache(model.config, 80, 16, model.dtype, model.device)
    with torch.inference_mode():
        return cap_logits(model.logits(model.forward(batch, cache)), model.recipe.softcap)


def plain_answer(model, context: list[int], tail: list[int]) -> tuple[float, bool]:
    """The log-probability of a continuation, and whether it is the argmax everywhere."""
    logits = plain_logits(model, context + tail)[len(context) - 1 : -1]
    total = logits.log_softmax(-1).gather(1, torch.tensor(tail)[:, None]).sum()
    return float(total), logits.argmax(-1).tolist() == tail


def assert_answers(found: list, wanted: list) -> None:
    assert [total for total, _ in found] == pytest.approx([t for t, _ in wanted], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


# log-probabilities --------------------------------------------------------------------------------


def test_a_continuation_is_what_the_whole_text_has_behind_its_context(lm, llm, plain):
    """Spaces at the end of a context belong to the continuation, and an empty context is BOS. Where
    a word is cut, the context keeps its own tokens, as in the harness's Hugging Face model."""
    encode = llm.tokenizer.encode
    greedy = llm.generate([STORY], llm.params_class(temperature=0, max_tokens=3))[0]
    pairs = [
        (STORY, " and the rain"), (STORY[:40] + "  ", "in"), ("", STORY), ("The cap", "tain went"),
        (STORY, greedy["text"]),
    ]  # fmt: skip
    wanted = []
    for context, tail in pairs:
        ids, head = encode(context + tail, bos=True), encode(context.rstrip(), bos=True)
        wanted.append(plain_answer(plain, head, ids[len(head) :]))
    found = lm.loglikelihood(asks("loglikelihood", *pairs), disable_tqdm=True)
    assert_answers(found, wanted)
    assert [is_greedy for _, is_greedy in found] == [False] * 4 + [True]


def test_what_is_too_long_is_cut_from_the_left(plain):
    with LLM(MODEL, device="cpu", num_blocks=40, max_model_len=17) as llm:
        lm = HarnessLM(llm)
        assert lm.max_length == 16
        ids = llm.tokenizer.encode(STORY, bos=True)
        assert len(ids) > 20
        tail = llm.tokenizer.encode(" and")
        found = lm.loglikelihood(asks("loglikelihood", (STORY, " and")), disable_tqdm=True)
        assert_answers(found, [plain_answer(plain, ids[-(17 - len(tail)) :], tail)])
        # a continuation of max_length tokens has one token before it; a longer one has none
        encoded = [((None, None), ids, list(range(5, 21))), ((None, None), [7], [8] * 17)]
        wanted = [plain_answer(plain, ids[-1:], list(range(5, 21)))]
        assert_answers(lm._loglikelihood_tokens(encoded[:1], disable_tqdm=True), wanted)
        for bad in (encoded[1], (("a", ""), [7], [])):
            with pytest.raises(ValueError, match=r"must have 1 to 16 \(max_length\)"):
                lm._loglikelihood_tokens([encoded[0], bad], disable_tqdm=True)


def test_each_token_of_a_rolled_text_is_predicted_once_with_all_the_context_that_fits(plain):
    with LLM(MODEL, device="cpu", num_blocks=60, max_model_len=12) as llm:
        lm, bos = HarnessLM(llm), llm.tokenizer.bos_id
        texts = [STORY, "Emma", "", STORY[:70]]
        wanted = []
        for text in texts:
            ids = llm.tokenizer.encode(text)
            total, done = 0.0, min(11, len(ids))  # the first stretch follows BOS
            if ids:
                total += plain_answer(plain, [bos], ids[:done])[0]
            while done < len(ids):  # the others go back as far as 11 tokens of input do
                stop = min(done + 11, len(ids))
                window = ids[stop - 12 : stop]
                new = stop - done
                total += plain_answer(plain, window[:-new], window[-new:])[0]
                done = stop
            wanted.append(total)
        requests = asks("loglikelihood_rolling", *((text,) for text in texts))
        found = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == pytest.approx(wanted, abs=1e-3) and found[2] == 0 > found[0]


def test_all_requests_are_one_batch_that_shares_its_prefixes(lm, llm):
    shots = "\n\n".join([STORY] * 4)
    pairs = [(f"{shots}\n\nQ{i}", f" {name}") for i in range(10) for name in ("Emma", "Dracula")]
    alone = [lm.loglikelihood(asks("loglikelihood", pair), disable_tqdm=True)[0] for pair in pairs]
    with LLM(MODEL, device="cpu", num_blocks=600) as fresh:
        requests = asks("loglikelihood", *pairs)
        found = HarnessLM(fresh).loglikelihood(requests, disable_tqdm=True)
        stats = fresh.stats()
    assert_answers(found, alone)
    length = len(fresh.tokenizer.encode(shots, bos=True))
    assert length > 64 and stats["prefill_tokens"] < 2 * length + 20 * 32
    assert stats["cached_tokens"] > 0.7 * stats["prompt_tokens"] and stats["steps"] < 5


# texts --------------------------------------------------------------------------------------------


def test_a_text_ends_before_the_first_of_its_stop_strings(lm, llm):
    params = llm.params_class(temperature=0, max_tokens=32)
    (whole,) = llm.generate([STORY], params, use_tqdm=False)
    words = whole["text"].split()
    given = {"max_gen_toks": 32, "do_sample": False}
    until = [words[5], words[3], ""]
    requests = asks(
        "generate_until",
        (STORY, {**given, "until": until}), (STORY, {**given, "until": words[4]}), (STORY, given),
        (STORY, {"max_new_tokens": 5, "until": [], "num_beams": 1, "temperature": 0.0}),
    )  # fmt: skip
    found = lm.generate_until(requests, disable_tqdm=True)
    text = whole["text"]
    cuts = min(text.index(words[3]), text.index(words[5])), text.index(words[4]), len(text)
    assert found[:3] == [text[:cut] for cut in cuts]
    assert found[3] == llm.tokenizer.decode(whole["token_ids"][:5])


def test_a_context_leaves_room_for_its_answer():
    with LLM(MODEL, device="cpu", num_blocks=40, max_model_len=33) as llm:
        lm, params = HarnessLM(llm), llm.params_class(temperature=0, max_tokens=20)
        ids = llm.tokenizer.encode(STORY, bos=True)
        (wanted,) = llm.generate([ids[-12:]], params, use_tqdm=False)
        requests = asks("generate_until", (STORY, {"max_gen_toks": 20, "until": []}))
        assert lm.generate_until(requests, disable_tqdm=True) == [wanted["text"]]
        requests = asks("generate_until", (STORY, {"until": []}))
        with pytest.raises(ValueError, match="max_gen_toks=256 leaves no space"):
            lm.generate_until(requests, disable_tqdm=True)


def test_a_bad_generation_argument_is_named(lm):
    for given, named in ({"num_beams": 4}, "num_beams"), ({"temperature": -1}, "temperature"):
        with pytest.raises((TypeError, ValueError), match=f"generation_kwargs .*{named}"):
            lm.generate_until(asks("generate_until", ("Once", given)), disable_tqdm=True)


def test_samples_of_a_repeated_request_differ_and_come_again_with_the_engine_s_seed():
    given = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "max_gen_toks": 8}
    texts = []
    for _ in range(2):
        with LLM(MODEL, device="cpu", num_blocks=40, seed=5) as llm:
            requests = asks("generate_until", *[("Once upon", given)] * 3)
            texts.append(HarnessLM(llm).generate_until(requests, disable_tqdm=True))
    assert texts[0] == texts[1] and len({*texts[0]}) == 3


def test_an_answer_that_the_model_cannot_give_is_no_empty_text(monkeypatch):
    with LLM(MODEL, device="cpu", num_blocks=40) as llm:
        with torch.inference_mode():
            llm.model.logits = lambda h: torch.full((len(h), 4096), torch.nan)
        requests = asks("generate_until", ("Once", {"max_gen_toks": 4}))
        with pytest.raises(RuntimeError, match="request 0: error, no token is left"):
            HarnessLM(llm).generate_until(requests, disable_tqdm=True)


# conversations ------------------------------------------------------------------------------------

TURNS = [
    {"role": "system", "content": "Be short."}, {"role": "user", "content": "Who wrote Emma?"},
    {"role": "assistant", "content": " Jane Austen. "}, {"role": "user", "content": "Who, again?"},
]  # fmt: skip


def test_the_chat_template_is_nanochat_s_prompt_as_a_text(lm, llm):
    tokenizer = llm.tokenizer
    for turns in (TURNS, TURNS[1:2]):
        text = lm.apply_chat_template(turns)
        assert lm.tok_encode(text) == tokenizer.render_for_completion(turns)
        assert lm.tok_encode(text, add_special_tokens=False) == lm.tok_encode(text)
    begun = [*TURNS, {"role": "assistant", "content": "It was Jane"}]
    text = lm.apply_chat_template(begun, add_generation_prompt=False)
    wanted = tokenizer.render_for_completion(TURNS) + tokenizer.encode("It was Jane")
    assert lm.tok_encode(text) == wanted
    # names of special tokens in a text without a template are letters
    assert not {*tokenizer.special_tokens.values()} & {*lm.tok_encode("a <|user_start|>")[1:]}
    assert lm.tok_encode("a", add_special_tokens=False) == tokenizer.encode("a")
    assert lm.tok_encode("") == [tokenizer.bos_id]


def test_a_conversation_is_scored_and_answered_like_chat(lm, llm, plain):
    text, tail = lm.apply_chat_template(TURNS[1:2]), "Emma was written by Jane Austen."
    answer = llm.chat(TURNS[1:2], llm.params_class(temperature=0, max_tokens=16), use_tqdm=False)
    requests = asks("generate_until", (text, {"max_gen_toks": 16}))
    assert lm.generate_until(requests, disable_tqdm=True) == [answer[0]["text"]]
    ids = llm.tokenizer.render_for_completion(TURNS[1:2]), llm.tokenizer.encode(tail)
    found = lm.loglikelihood(asks("loglikelihood", (text, tail)), disable_tqdm=True)
    assert_answers(found, [plain_answer(plain, *ids)])


def test_a_model_without_chat_tokens_says_so(llm, monkeypatch):
    with LLM(ERAS / "hf_era1_padded", tokenizer_path=ERAS / "tokenizer", num_blocks=9) as other:
        marks = {"<|bos|>": other.tokenizer.bos_id}
        monkeypatch.setattr(other.tokenizer, "special_tokens", marks)
        with pytest.raises(ValueError, match="no special token '<|user_start|>'"):
            HarnessLM(other).apply_chat_template(TURNS)


# the harness's own ways in ------------------------------------------------------------------------


def test_the_harness_finds_the_model_by_name_once_it_is_imported():
    assert get_model("microvllm") is HarnessLM
    assert get_model("dummy").__name__ == "DummyLM"  # its own are still there
    text = f"model_path={MODEL},num_blocks=20,max_model_len=50"
    added = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}  # what is there
    lm = HarnessLM.create_from_arg_string(text, added)
    with lm.llm:
        assert (lm.max_length, lm.rank, lm.world_size) == (49, 0, 1)
        assert lm.llm.scheduler.blocks.num_usable // lm.llm.scheduler.blocks.width == 19
        assert lm.tokenizer_name == "nanochat" and lm.chat_template(True) == ""
        assert lm.get_model_info()["model"] == "oldbooks-d6"


@pytest.mark.slow
def test_tasks_are_evaluated_and_their_cost_is_told(llm, monkeypatch, tmp_path):
    enter_tasks(monkeypatch, tmp_path)
    manager, tasks = find_tasks(["books_*"], ".")
    assert tasks == ["books_answer", "books_choice", "books_rolling", "books_word"]
    before = llm.stats()
    found = evaluate(llm, tasks, manager, num_fewshot=2, bootstrap_iters=10)
    stats, rows = llm.stats(), [json.loads(x) for x in (TASKS / "books.jsonl").open()]
    assert found["config"]["model"] == "oldbooks-d6"
    engine = found["engine"]
    for name in ("prompt_tokens", "cached_tokens", "output_tokens"):
        assert engine[name] == stats[name] - before[name] > 0
    assert engine["hit_rate"] == round(engine["cached_tokens"] / engine["prompt_tokens"], 4)
    assert engine["seconds"] > 0 < engine["tokens_per_second"]
    # the accuracy is that of the scores of the questions that the harness made
    right = []
    for sample in found["samples"]["books_choice"]:
        args = [(a["arg_0"], a["arg_1"]) if isinstance(a, dict) else a for a in sample["arguments"]]
        scores = llm.score(*map(list, zip(*args, strict=True)))
        totals = [sum(s) for s in scores]
        right.append(totals.index(max(totals)) == rows[sample["doc_id"]]["gold"])
    assert len(right) == 8 and found["results"]["books_choice"]["acc,none"] == sum(right) / 8
    with pytest.raises(ValueError, match="no task 'books_none'"):
        find_tasks(["books_answer", "books_none"], ".")
    with pytest.raises(ValueError, match="include_path 'nowhere' is not a folder"):
        find_tasks(["books_answer"], "nowhere")


@pytest.mark.slow
def test_the_command_evaluates_and_writes_its_results(monkeypatch, capsys, tmp_path):
    enter_tasks(monkeypatch, tmp_path)
    flags = ["eval", "--include-path", ".", "--num-blocks", "400", "--limit", "3", "--tasks"]
    file = tmp_path / "results.json"
    cli.main([*flags, "books_choice,books_answer", "--chat", "-o", str(file)])
    out, err = capsys.readouterr()
    assert "|books_choice|" in out and "prompt tokens cached" in err
    written = json.loads(file.read_text())
    assert written["engine"]["prompt_tokens"] > 0
    assert written["n-samples"]["books_answer"]["effective"] == 3
    cli.main([*flags, "books_choice", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["results"]["books_choice"].keys() >= {"acc,none", "acc_norm,none"}
    real = LLM.__init__

    def without_chat(self, *args, **options):
        real(self, *args, **options)
        self.tokenizer.has_chat = False

    monkeypatch.setattr(LLM, "__init__", without_chat)
    wrong = {"books_choice,books_none": "no task 'books_none'", "books_choice": "--chat: the token"}
    for tasks, named in wrong.items():
        with pytest.raises(SystemExit) as stop:
            cli.main([*flags, tasks, "--chat"])
        assert stop.value.code == 2 and named in capsys.readouterr().err


@pytest.mark.slow
def test_the_harness_s_own_command_line_runs_the_model(tmp_path):
    """By the line in the module's docstring."""
    code = "import microvllm.evals, lm_eval.__main__ as m; m.cli_evaluate()"
    args = f"model_path={MODEL},num_blocks=400"
    done = subprocess.run(
        [sys.executable, "-c", code, "--model", "microvllm", "--model_args", args, "--tasks",
         "books_choice", "--include_path", ".", "--output_path", str(tmp_path / "out.json")],
        cwd=TASKS, capture_output=True, text=True, timeout=300,
        env={"HF_HOME": str(tmp_path), "PYTHONPATH": str(SRC), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "|books_choice|" in done.stdout and list(tmp_path.glob("out*.json"))
