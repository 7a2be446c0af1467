"""Speculation: several draft tokens are verified in one step, and the text stays the same.

    python examples/speculation.py

The bundled model writes a few texts in three ways: alone; with itself in int8 as the draft model;
and with earlier answers to the same prompt, as the epochs of a reinforcement learning have them.
A draft model pays if it takes a small part of the model's time, which no draft model of this small
model does: the engine measures that, and drafts little or nothing. Earlier answers cost nothing.
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
    """Write the texts one after the other, and print what it took."""
    llm.reset_stats()
    began = time.perf_counter()
    outputs = [llm.generate(prompt, PARAMS, use_tqdm=False)[0] for prompt in PROMPTS]
    seconds = time.perf_counter() - began
    stats = llm.stats()
    print(
        f"{name:28s} {stats['output_tokens']} tokens, {stats['steps']} steps, {seconds:.2f} s; "
        f"{stats['accepted_tokens']} of {stats['guessed_tokens']} draft tokens were right"
    )
    return [output["token_ids"] for output in outputs]


def main() -> None:
    with LLM(MODEL, **OPTIONS) as llm:
        expected = write("alone", llm)
        expected = write("alone, once more", llm)
    texts = []
    with LLM(MODEL, quantization="int8", **OPTIONS) as small:
        with LLM(MODEL, draft=small, **OPTIONS) as llm:
            texts += write("int8 draft", llm)
    with LLM(MODEL, answer_lookup=8, **OPTIONS) as llm:
        texts += write("earlier answers, epoch 1", llm)
        texts += write("earlier answers, epoch 2", llm)
    same = sum(text == again for text, again in zip(expected * 3, texts, strict=True))
    print(f"{same} of {len(texts)} texts are those that the model writes alone")


if __name__ == "__main__":
    main()
