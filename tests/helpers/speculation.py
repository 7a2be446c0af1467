"""Texts, requests and parameters with which engines that propose draft tokens are tested."""

from microvllm import LLM, SamplingParams

from .engines import ids
from .full_engines import greedy, sampled
from .sampling import ban_even

TEXTS = [
    "It was a dark night, and the rain fell. It was a dark night, and the rain",
    "one, two, three, four, one, two, three, four, one, two,",
]
AGAIN = [(ids(7, 1) * 4, greedy(24)), (ids(3, 2) * 9, sampled(24, seed=5, temperature=0.5))]


def shorn(outputs: list[dict]) -> list[dict]:
    """Outputs without what depends on the cache."""
    return [
        {k: v for k, v in o.items() if k not in ("request_id", "num_cached_tokens")}
        for o in outputs
    ]


def streamed(llm: LLM, params: SamplingParams) -> dict[tuple[int, int], list]:
    """What a stream of TEXTS has for each (prompt, sample): text, token ids, and both reasons."""
    pieces: dict[tuple[int, int], list] = {}
    for event in llm.stream(TEXTS, params):
        piece = pieces.setdefault((event.index, event.sample), ["", [], 0])
        piece[0] += event.text
        piece[1] += event.token_ids
        piece[2] = event.finish_reason, event.stop_reason
    return pieces


WAYS = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.8},
    "top_p": {"temperature": 0.7, "top_p": 0.8},
    "top_k and min_p": {"temperature": 0.7, "top_k": 9, "min_p": 0.05},
    "penalties": {"temperature": 0.3, "repetition_penalty": 1.1, "presence_penalty": 0.1},
    "frequency": {"temperature": 0, "frequency_penalty": 0.02},
    "three samples": {"temperature": 0.4, "n": 3},
    "stop string": {"temperature": 0, "stop": ["ell", "hree"]},
    "stop string of several tokens": {"temperature": 0, "stop": ["night, and", "two, three, four"]},
    "stop tokens": {"temperature": 0, "stop_token_ids": [257, 300, 11]},
    "an end in time": {"temperature": 0, "ignore_eos": False},
    "min_tokens": {"temperature": 0.3, "min_tokens": 12, "ignore_eos": False},
    "bad words": {"temperature": 0, "bad_words": ["rain", "two"]},
    "bias": {"temperature": 0.4, "logit_bias": {300: 2, 301: -5}},
    "only these": {"temperature": 0.5, "allowed_token_ids": [40, 41, 42, 43]},
    "processor": {"temperature": 0, "logits_processor": ban_even},
} | {f"max_tokens {n}": {"temperature": 0, "max_tokens": n} for n in (1, 2, 3, 4, 5)}
