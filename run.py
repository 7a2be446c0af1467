"""A few prompts through the engine: python run.py --prompt "Who wrote Moby Dick?" """

import argparse

from microvllm.cli import commands, flags, terminal

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
    params = commands.sampling_params(args)
    with commands.load(args, patient=False) as llm:
        samples = QUESTIONS if commands.chats(llm, args.raw) else BEGINNINGS
        print(commands.answer(args, llm, args.prompt or samples, params))


def main() -> None:
    parser = terminal.Parser(description="A few prompts through the engine.")
    parser.add_argument("--prompt", action="append", help="may be repeated (a few samples)")
    flags.add_flags(parser, flags.ENGINE + flags.RAW + flags.sampling(128, 0.8, 50))
    parser.set_defaults(command=run, json=False)
    terminal.execute(parser.parse_args())


if __name__ == "__main__":
    main()
