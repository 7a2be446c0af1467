"""A few prompts through the engine: python run.py --prompt "Who wrote Moby Dick?" """

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:  # torch takes a second or two to import: only once the flags have made sense
    from microvllm import LLM

MODEL_DIR = Path(__file__).resolve().parent / "models" / "oldbooks-d6"
QUESTIONS = (
    "Who wrote Moby Dick?",
    "What is the capital of France?",
    "What is 7+8?",
    "Name a book by Jane Austen.",
    "Tell me a story in the manner of Charles Dickens.",
)
BEGINNINGS = (
    "It was a dark and stormy night, and",
    "The island was small, and we had",
    "There is nothing so pleasant as",
)


class Parser(argparse.ArgumentParser):
    """Tells a user's mistake in one line and leaves with exit status 2."""

    def error(self, message: object) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())}\n")


def make_parser(description: str, *, max_tokens: int, temperature: float, top_k: int) -> Parser:
    """The flags that run.py and test_alpaca.py share, with each script's own defaults."""
    parser = Parser(description=description)
    add = parser.add_argument
    add("--model-dir", default=str(MODEL_DIR), help="where model_*.pt is (the bundled model)")
    add("--tokenizer-dir", help="where tokenizer.pkl is (beside the model)")
    add("--step", type=int, help="training step of the checkpoint (the last one)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (%(default)s)")
    add("--max-tokens", type=int, default=max_tokens, help="new tokens, at most (%(default)s)")
    add("--temperature", type=float, default=temperature, help="0 is greedy (%(default)s)")
    add("--top-k", type=int, default=top_k, help="likeliest tokens to sample, 0: all (%(default)s)")
    add("--num-blocks", type=int, help="blocks of the KV cache (what fits in memory)")
    add("--max-batch-size", type=int, help="sequences that run at once, at most (the engine's)")
    add("--seed", type=int, default=0, help="the same seed gives the same answers (%(default)s)")
    add("--ignore-eos", action="store_true", help="go on past the end of an answer")
    add("--raw", action="store_true", help="complete plain text, also where the model can chat")
    return parser


def load(args: argparse.Namespace) -> "LLM":
    """The engine that the shared flags describe."""
    from microvllm import LLM

    return LLM(
        args.model_dir,
        step=args.step,
        tokenizer_path=args.tokenizer_dir,
        device=args.device,
        num_blocks=args.num_blocks,
        max_batch_size=args.max_batch_size,
        seed=args.seed,
    )


def encode(llm: "LLM", prompts: list[str], raw: bool) -> list[str] | list[list[int]]:
    """Each prompt as the user's turn of a conversation, or as it is: raw, or no chat tokens."""
    if raw or not llm.tokenizer.has_chat:
        return prompts
    return [
        llm.tokenizer.render_for_completion([{"role": "user", "content": prompt}])
        for prompt in prompts
    ]


def run(args: argparse.Namespace) -> None:
    from microvllm import SamplingParams

    params = SamplingParams(
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        top_k=args.top_k,
        ignore_eos=args.ignore_eos,
    )
    with load(args) as llm:
        chat = llm.tokenizer.has_chat and not args.raw
        texts = args.prompt or list(QUESTIONS if chat else BEGINNINGS)
        prompts = encode(llm, texts, args.raw)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - start

    for text, output in zip(texts, outputs, strict=True):
        cut = f"  [cut at {len(output['token_ids'])} tokens]"
        ending = cut if output["finish_reason"] == "length" else ""
        # a completion goes on where its prompt stops
        print(f"> {text}\n{output['text'].strip()}" if chat else f"{text}{output['text']}", end="")
        print(ending, end="\n\n")
    tokens = sum(len(output["token_ids"]) for output in outputs)
    speed = f"{tokens / seconds:.0f} tokens/s"
    print(f"{len(outputs)} prompts, {tokens} tokens in {seconds:.2f} s: {speed}")


def main() -> None:
    parser = make_parser(
        "A few prompts through the engine.", max_tokens=128, temperature=0.8, top_k=50
    )
    parser.add_argument("--prompt", action="append", help="may be repeated (a few samples)")
    args = parser.parse_args()
    try:
        run(args)
    except (ValueError, OSError) as error:  # what the engine raises for a user's mistake
        parser.error(error)


if __name__ == "__main__":
    main()
