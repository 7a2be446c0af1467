"""Tree search: find the most likely text, with a guarantee.

    python examples/tree_search.py "Once upon a time" --max-tokens 6

Another token never makes a text more likely. So the search always extends the most likely text so
far (best first, as in Dijkstra's shortest path). When the most likely text is complete, it is the
result: every other text is already less likely. Greedy decoding and a narrow beam may miss it.
The guarantee is for texts whose tokens are each among the k most likely ones.
"""

import argparse
import heapq
import sys
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from microvllm import LLM, SamplingParams
from microvllm.features.branches import Branch

MODEL = Path(__file__).resolve().parents[1] / "models" / "oldbooks-d6"


def tree_search(
    llm: LLM, prompt, max_tokens: int, k: int, max_open: int = 200
) -> tuple[Branch, int]:
    """The most likely continuation whose tokens are each among the k most likely ones, and the
    number of texts that were extended. It ends with an end token or has max_tokens tokens.
    max_open: the largest number of texts to keep. Beyond it, the least likely are dropped, and the
    guarantee is lost."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=k)
    order = count()  # of two equally likely texts, the older one first
    with llm.branching() as branches:
        heap = [(0.0, next(order), branches.start(prompt, params))]
        for num_continued in count():
            _, _, best = heapq.heappop(heap)
            if best.finish_reason is not None:
                return best, num_continued
            for child in branches.spread([best], k):
                heapq.heappush(heap, (-child.logprob, next(order), child))
            if len(heap) > max_open:
                heap.sort()
                branches.drop(*[branch for _, _, branch in heap[max_open:]])
                del heap[max_open:]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", nargs="?", default="Once upon a time")
    parser.add_argument("--max-tokens", type=int, default=6)
    parser.add_argument("--k", type=int, default=4)
    args = parser.parse_args(argv)
    with LLM(MODEL, num_blocks=1000) as llm:
        params = SamplingParams(temperature=0, max_tokens=args.max_tokens, logprobs=0)
        (greedy,) = llm.generate([args.prompt], params, use_tqdm=False)
        logprob = sum(entry["logprob"] for entry in greedy["logprobs"])
        print(f"greedy  {logprob:8.3f}  {greedy['text']!r}")
        best, num_continued = tree_search(llm, args.prompt, args.max_tokens, args.k)
        print(f"best    {best.logprob:8.3f}  {best.text!r}, {num_continued} texts were extended")


if __name__ == "__main__":
    main()
