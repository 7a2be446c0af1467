"""The examples of searches, against exhaustive search on a tiny vocabulary, and of tools."""

import re
from itertools import product

import pytest
import torch
from helpers.goldens import MODEL, ROOT

from examples import beam_search, best_of_n, gpt, tool_session, tree_search
from microvllm import LLM, SamplingParams
from microvllm.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

LETTERS = "abcde"
NUM_TOKENS = 4
PROMPT = [5, 0, 3]  # <|bos|>ad


@pytest.fixture(scope="module")
def llm():
    """An engine of a random model that knows five letters and an end token."""
    tokenizer = Tokenizer(
        name="letters",
        pat_str=r"\s+|\S+",
        mergeable_ranks={letter.encode(): i for i, letter in enumerate(LETTERS)},
        special_tokens={"<|bos|>": len(LETTERS)},
    )
    module = gpt.GPT(gpt.Config(sequence_len=32, vocab_size=6, n_layer=2), seed=8)
    with LLM(model=module, tokenizer=tokenizer, plain=True, block_size=4, num_blocks=500) as llm:
        yield llm


@pytest.fixture(scope="module")
def texts(llm) -> dict[tuple[int, ...], float]:
    """The log-probability of every text: NUM_TOKENS tokens, or fewer and an end token."""
    end = len(LETTERS)
    all_texts = []
    for length in range(NUM_TOKENS):
        for letters in product(range(end), repeat=length):
            all_texts.append((*letters, end))
    all_texts += product(range(end), repeat=NUM_TOKENS)
    scores = llm.score([PROMPT] * len(all_texts), [list(text) for text in all_texts])
    found = {text: sum(logprobs) for text, logprobs in zip(all_texts, scores, strict=True)}
    total = sum(torch.tensor(list(found.values())).exp())
    assert len(found) == 5**4 + 5**3 + 5**2 + 5 + 1 and abs(total - 1) < 1e-4
    return found


def best(texts: dict[tuple[int, ...], float], count: int) -> list[tuple[int, ...]]:
    return sorted(texts, key=lambda text: -texts[text])[:count]


# searches -----------------------------------------------------------------------------------------


def test_a_beam_that_loses_nothing_finds_the_most_likely_texts(llm, texts):
    beam = beam_search.beam_search(llm, PROMPT, width=200, max_tokens=NUM_TOKENS)
    found = [tuple(branch.token_ids) for branch in beam]
    assert found[:50] == best(texts, 50)
    for branch in beam:
        assert branch.logprob == pytest.approx(texts[tuple(branch.token_ids)], abs=1e-4)


@pytest.mark.parametrize("width", [2, *[pytest.param(n, marks=pytest.mark.slow) for n in (1, 3)]])
def test_a_narrow_beam_is_the_one_of_the_definition(llm, texts, width):
    end = len(LETTERS)
    beam = [((), 0.0)]
    for _ in range(NUM_TOKENS):
        children = [pair for pair in beam if pair[0][-1:] == (end,)]
        prefixes = [pair for pair in beam if pair[0][-1:] != (end,)]
        for prefix, logprob in prefixes:
            scores = llm.score([[*PROMPT, *prefix]] * 6, [[i] for i in range(6)])
            children += [((*prefix, i), logprob + scores[i][0]) for i in range(6)]
        beam = sorted(children, key=lambda pair: -pair[1])[:width]
    found = beam_search.beam_search(llm, PROMPT, width=width, max_tokens=NUM_TOKENS)
    assert [tuple(branch.token_ids) for branch in found] == [text for text, _ in beam]


def test_a_tree_search_finds_the_most_likely_text(llm, texts):
    (expected,) = best(texts, 1)
    found, num_continued = tree_search.tree_search(llm, PROMPT, NUM_TOKENS, k=6, max_open=1000)
    assert tuple(found.token_ids) == expected
    assert found.logprob == pytest.approx(texts[expected], abs=1e-4)
    num_inner = sum(5**length for length in range(NUM_TOKENS))
    assert NUM_TOKENS <= num_continued < num_inner / 2  # most texts are never looked at
    narrow, _ = tree_search.tree_search(llm, PROMPT, NUM_TOKENS, k=6, max_open=1)
    assert narrow.logprob <= found.logprob + 1e-4


def test_the_best_of_many_is_the_best_of_all(llm, texts):
    """There are few texts of two letters: all of them are among the samples."""

    def judge(answers: list[str]) -> list[float]:
        return [answer.count("b") - answer.count("a") for answer in answers]

    params = SamplingParams(temperature=3.0, max_tokens=2, n=256, seed=1, ignore_eos=True)
    found = best_of_n.best_of_n(llm, PROMPT, params, judge)
    assert found[0] == (2, "bb")
    assert [value for value, _ in found] == sorted([value for value, _ in found], reverse=True)
    # an end token is no text
    assert {text for _, text in found} >= {a + b for a in LETTERS for b in LETTERS}


def test_nothing_is_left_behind(llm):
    pool = llm.scheduler.blocks.pool
    assert llm.is_finished() and pool.num_free == pool.num_usable and not llm.scheduler.paused


# on the bundled model -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_searches_run_on_the_bundled_model(capsys):
    beam_search.main(["--max-tokens", "8", "--width", "3"])
    tree_search.main(["--max-tokens", "4", "--k", "3"])
    printed = capsys.readouterr().out
    rows = re.findall(r"^(greedy|beam|best) +(-[\d.]+)", printed, re.M)
    names = [name for name, _ in rows]
    values = [float(value) for _, value in rows]
    assert names == ["greedy", "beam", "beam", "beam", "greedy", "best"]
    assert values[1] >= values[2] >= values[3] and values[5] >= values[4]
    best_of_n.main(["Who wrote Dracula?", "--n", "4"])
    assert "Bram Stoker" in capsys.readouterr().out


def test_each_search_has_80_lines_at_most_and_is_in_the_documents():
    pages = [ROOT / "docs" / "FEATURES.md", ROOT / "examples" / "README.md"]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    for name in ("beam_search", "best_of_n", "tree_search", "tool_session"):
        assert all(f"examples/{name}.py" in text for text in texts)
        if name != "tool_session":
            code = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
            assert len(code.splitlines()) <= 80


# tools with a session -----------------------------------------------------------------------------


@pytest.mark.slow
def test_each_sample_plays_its_own_game():
    with LLM(MODEL, device="cpu", num_blocks=400, plain=True) as llm:
        output = tool_session.play(llm, num_samples=3, seed=0)
    numbers = set()
    for sample in output["samples"]:
        calls = [(int(entry["call"]), entry["result"]) for entry in sample["tool_calls"]]
        number, last = calls[-1]
        assert last == "right" and sample["finish_reason"] == "stop"
        for guess, result in calls[:-1]:
            assert result == ("higher" if guess < number else "lower")
        numbers.add(number)
        ids = sample["token_ids"]
        forced = [i for i, is_drawn in zip(ids, sample["mask"], strict=True) if not is_drawn]
        words = llm.tokenizer.decode(forced, skip_special=True)
        assert words == "".join(result for _, result in calls)
    assert len(numbers) > 1


@pytest.mark.slow
def test_the_example_of_tools_prints_a_line_for_each_sample(capsys):
    tool_session.main(["--samples", "2"])
    assert len(re.findall(r"^sample \d: `\d` = .* right", capsys.readouterr().out, re.M)) == 2
