"""Beam search: in each step, keep the few texts with the highest total probability.

    python examples/beam_search.py "Once upon a time" --width 4 --max-tokens 16

Each step extends each text by its most likely next tokens, all in one batch. Texts share the blocks
of their common prefix in the KV cache, so a new text costs at most one more block.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from microvllm import LLM, SamplingParams
from microvllm.features.branches import Branch

MODEL = Path(__file__).resolve().parents[1] / "models" / "oldbooks-d6"


def beam_search(llm: LLM, prompt, width: int, max_tokens: int) -> list[Branch]:
    """The `width` best continuations that a beam of this width finds, the most likely first. Each
    ends with an end token or has max_tokens tokens."""
    num_next = min(width, llm.tokenizer.vocab_size)
    params = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=num_next)
    with llm.branching() as branches:
        beam = [branches.start(prompt, params)]
        while any(branch.finish_reason is None for branch in beam):
            children = branches.spread(beam, num_next)
            children.sort(key=lambda branch: branch.logprob, reverse=True)
            branches.drop(*children[width:])
            beam = children[:width]
    return beam


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", nargs="?", default="Once upon a time")
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=16)
    args = parser.parse_args(argv)
    with LLM(MODEL, num_blocks=400) as llm:
        params = SamplingParams(temperature=0, max_tokens=args.max_tokens, logprobs=0)
        (greedy,) = llm.generate([args.prompt], params, use_tqdm=False)
        logprob = sum(entry["logprob"] for entry in greedy["logprobs"])
        print(f"greedy  {logprob:8.3f}  {greedy['text']!r}")
        for branch in beam_search(llm, args.prompt, args.width, args.max_tokens):
            print(f"beam    {branch.logprob:8.3f}  {branch.text!r}")


if __name__ == "__main__":
    main()
