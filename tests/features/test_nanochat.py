"""nanochat's own `generate_batch`."""

import pytest
from helpers.full_engines import TOOL_GOLDENS, chain
from helpers.goldens import MODEL

from microvllm import LLM

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llm():
    with LLM(MODEL, num_blocks=400) as llm:
        yield llm


def test_generate_batch_is_nanochats(llm):
    turns = [{"role": "user", "content": "Who wrote Dracula?"}]
    prompt = llm.tokenizer.render_for_completion(turns)
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


def test_a_prompts_generate_batch_equals_nanochats_golden():
    with chain() as llm:
        for run in TOOL_GOLDENS["runs"]:
            sequences, masks = llm.generate_batch(
                run["prompt"], num_samples=2, max_tokens=60, temperature=0.0
            )
            results = run["generate_batch_2"]
            assert sequences == results["results"] and masks == results["masks"]
