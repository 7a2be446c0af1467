"""Best of n: sample several answers, and let a judge rank them.

    python examples/best_of_n.py "What is a good name for a ship?" --n 8

A judge is a function that returns a number for each answer. The judge below uses the model itself:
how likely is the question after the answer? An unrelated answer makes the question unlikely. All
samples share the blocks of the question, and all answers are scored in one batch.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from microvllm import LLM, SamplingParams

MODEL = Path(__file__).resolve().parents[1] / "models" / "oldbooks-d6"
Judge = Callable[[list[str]], list[float]]


def best_of_n(llm: LLM, prompt, params: SamplingParams, judge: Judge) -> list[tuple[float, str]]:
    """The distinct answers among params.n samples with their values, the best first."""
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    texts = list(dict.fromkeys(sample["text"] for sample in output["samples"]))
    values = judge(texts)
    return sorted(zip(values, texts, strict=True), reverse=True)


def question_judge(llm: LLM, question: str) -> Judge:
    """A judge whose value is the mean log-probability of the question's tokens after an answer."""

    def judge(texts: list[str]) -> list[float]:
        scores = llm.score([f"{text} " for text in texts], [question] * len(texts))
        return [sum(logprobs) / len(logprobs) for logprobs in scores]

    return judge


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", nargs="?", default="What is a good name for a ship?")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with LLM(MODEL, num_blocks=400) as llm:
        message = {"role": "user", "content": args.question}
        prompt = llm.tokenizer.render_for_completion([message])
        params = SamplingParams(temperature=1.0, max_tokens=32, n=args.n, seed=args.seed)
        judge = question_judge(llm, args.question)
        for value, text in best_of_n(llm, prompt, params, judge):
            print(f"{value:8.3f}  {text!r}")


if __name__ == "__main__":
    main()
