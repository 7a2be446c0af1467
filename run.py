"""A few prompts through the engine: python run.py --prompt "Who wrote Moby Dick?" """

import argparse

from microvllm import cli

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


def run(args: argparse.Namespace) -> None:
    params = cli.sampling_params(args)
    with cli.load(args) as llm:
        chat = llm.tokenizer.has_chat and not args.raw
        print(cli.answer(args, llm, args.prompt or (QUESTIONS if chat else BEGINNINGS), params))


def main() -> None:
    parser = cli.Parser(description="A few prompts through the engine.")
    parser.add_argument("--prompt", action="append", help="may be repeated (a few samples)")
    cli.engine_flags(parser)
    cli.sampling_flags(parser, max_tokens=128, temperature=0.8, top_k=50)
    parser.set_defaults(command=run, json=False)
    cli.execute(parser.parse_args())


if __name__ == "__main__":
    main()
