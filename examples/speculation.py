"""Speculative decoding: verify several draft tokens in one step, with the same text as without.

    python examples/speculation.py

The bundled model generates a few texts in three ways: without draft tokens; with its int8 version
as the draft model; and with draft tokens from earlier answers to the same prompts, as in the epochs
of reinforcement learning. A draft model helps only if it is much faster than the model. No draft
model is much faster than this small model: the engine measures this, and drafts little or nothing.
Draft tokens from earlier answers need no computation.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # runs from a clone

from microvllm import LLM, SamplingParams

MODEL = Path(__file__).resolve().parents[1] / "models" / "oldbooks-d6"
PROMPTS = ["It was a dark and stormy night, and", "The island was small", "My dear Watson,"]
PARAMS = SamplingParams(temperature=0.7, seed=1, max_tokens=120)
OPTIONS = {"device": "cpu", "num_blocks": 100}


def write(name: str, llm: LLM) -> list[list[int]]:
    """Generate the texts one after the other, and print steps, time and draft tokens."""
    llm.reset_stats()
    start = time.perf_counter()
    outputs = [llm.generate(prompt, PARAMS, use_tqdm=False)[0] for prompt in PROMPTS]
    seconds = time.perf_counter() - start
    stats = llm.stats()
    print(
        f"{name:28s} {stats['output_tokens']} tokens, {stats['steps']} steps, {seconds:.2f} s; "
        f"{stats['accepted_tokens']} of {stats['guessed_tokens']} draft tokens were right"
    )
    return [output["token_ids"] for output in outputs]


def main() -> None:
    with LLM(MODEL, **OPTIONS) as llm:
        expected = write("no draft tokens", llm)
        expected = write("no draft tokens, again", llm)
    texts = []
    with LLM(MODEL, quantization="int8", **OPTIONS) as small:
        with LLM(MODEL, draft=small, **OPTIONS) as llm:
            texts += write("draft model in int8", llm)
    with LLM(MODEL, answer_lookup=8, **OPTIONS) as llm:
        texts += write("earlier answers, epoch 1", llm)
        texts += write("earlier answers, epoch 2", llm)
    same = sum(text == again for text, again in zip(expected * 3, texts, strict=True))
    print(f"{same} of {len(texts)} texts are equal to those without draft tokens")


if __name__ == "__main__":
    main()
