"""The harness's own Hugging Face model gives the same numbers and texts, on the one NanoChat that
both can run: transformers has the first era."""

import pytest
import torch
from helpers.goldens import ERAS

from microvllm import LLM

for package in ("lm_eval", "transformers", "accelerate", "peft"):  # of the harness's model
    pytest.importorskip(package, reason=f"the harness's own model needs {package}")
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from test_harness import asks, enter_tasks  # noqa: E402
from transformers import NanoChatForCausalLM, PreTrainedTokenizer  # noqa: E402

from microvllm.evals import HarnessLM, evaluate, find_tasks  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
FOLDER, LENGTH = ERAS / "hf_era1_padded", 64
TEXTS = [
    "the quick brown fox", "a b c d e f g", "In the beginning was the word, ", "12 + 34 = ", "",
    "tab\tand newline\nand é – ü", "and then  ", "x " * 60, "lorem ipsum dolor sit amet " * 5,
]  # fmt: skip
TAILS = [" jumps", "h", " over the lazy dog", "46", "\n", "!", " the", "y z", " é"]


class HuggingTokenizer(PreTrainedTokenizer):
    """nanochat's tokenizer with Hugging Face's methods: tokens are written as their numbers."""

    def __init__(self, tokenizer, bos: bool):
        self.own, self.bos = tokenizer, bos
        self.names = {str(i): i for i in range(tokenizer.num_ordinary)} | tokenizer.special_tokens
        self.ids = {i: name for name, i in self.names.items()}
        super().__init__(bos_token="<|bos|>", eos_token="<|bos|>", pad_token="<|bos|>")

    vocab_size = property(lambda self: self.own.vocab_size)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.names)

    def _tokenize(self, text: str, **_) -> list[str]:
        return [str(i) for i in self.own.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.names[token]

    def _convert_id_to_token(self, token_id: int) -> str:
        return self.ids[token_id]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.own.decode([self.names[token] for token in tokens])

    def build_inputs_with_special_tokens(self, ids, *_) -> list[int]:
        return [self.bos_token_id] * self.bos + list(ids)


@pytest.fixture(scope="module")
def ours():
    """With a context in which some of the texts do not fit."""
    options = {"tokenizer_path": ERAS / "tokenizer", "device": "cpu", "num_blocks": 600}
    with LLM(FOLDER, max_model_len=LENGTH + 1, **options) as llm:
        yield HarnessLM(llm)


@pytest.fixture(scope="module")
def hugging(ours):
    """HFLM as (with BOS in front of each text, without)."""
    model = NanoChatForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    options = {"max_length": LENGTH, "batch_size": 4, "device": "cpu"}
    tokenizers = [HuggingTokenizer(ours.llm.tokenizer, bos) for bos in (True, False)]
    return [HFLM(model, tokenizer=x, add_bos_token=x.bos, **options) for x in tokenizers]


def test_the_tokens_are_those_of_hugging_face(ours, hugging):
    with_bos, _ = hugging
    for text in TEXTS[:4] + TAILS:
        assert with_bos.tok_encode(text) == ours.tok_encode(text)
        own = ours.tok_encode(text, add_special_tokens=False)
        assert with_bos.tok_encode(text, add_special_tokens=False) == own
    assert with_bos.prefix_token_id == ours.prefix_token_id
    assert with_bos.max_length == ours.max_length == LENGTH


def test_log_probabilities_and_greedy_answers_are_hugging_face_s(ours, hugging):
    pairs = [(text, tail) for text in TEXTS for tail in TAILS]
    # and what greedy decoding writes, so that not all are False
    requests = asks("generate_until", *((t, {"max_gen_toks": 4}) for t in TEXTS))
    pairs += zip(TEXTS, ours.generate_until(requests, disable_tqdm=True), strict=True)
    pairs = [(text, tail) for text, tail in pairs if "\ufffd" not in tail and tail]
    requests = asks("loglikelihood", *pairs)
    mine = ours.loglikelihood(requests, disable_tqdm=True)
    theirs = hugging[0].loglikelihood(requests, disable_tqdm=True)
    assert [p for p, _ in mine] == pytest.approx([p for p, _ in theirs], rel=1e-4, abs=1e-3)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]
    print(f"\n{len(mine)} continuations, {sum(greedy for _, greedy in mine)} of them greedy")


def test_rolling_log_probabilities_are_hugging_face_s(ours, hugging):
    """Without BOS in front of a text, since both begin at BOS."""
    requests = asks("loglikelihood_rolling", *((text,) for text in TEXTS))
    mine = ours.loglikelihood_rolling(requests, disable_tqdm=True)
    theirs = hugging[1].loglikelihood_rolling(requests, disable_tqdm=True)
    assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("until", [[], ["\n", "a"], ["e", " "]])
def test_texts_are_hugging_face_s(ours, hugging, until):
    given = {"max_gen_toks": 12, "until": until, "do_sample": False}
    requests = asks("generate_until", *((text, given) for text in TEXTS if text))
    mine = ours.generate_until(requests, disable_tqdm=True)
    assert any(mine) and mine == hugging[0].generate_until(requests, disable_tqdm=True)


def test_the_tasks_of_a_file_have_hugging_face_s_metrics(ours, hugging, monkeypatch, tmp_path):
    enter_tasks(monkeypatch, tmp_path)
    options = {"num_fewshot": 1, "bootstrap_iters": 10, "log_samples": False}
    compared = 0
    for name in ("books_choice", "books_word", "books_answer", "books_rolling"):
        lm = hugging[name == "books_rolling"]
        manager, tasks = find_tasks([name], ".")
        mine = evaluate(ours.llm, tasks, manager, **options)["results"][name]
        theirs = simple_evaluate(lm, tasks=tasks, task_manager=manager, **options)
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float) and "stderr" not in metric:
                assert mine[metric] == pytest.approx(value, rel=1e-4), (name, metric)
                print(name, metric, value)
                compared += 1
    assert compared == 7
