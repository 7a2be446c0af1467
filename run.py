"""Answer a few prompts: python run.py --prompt "Who wrote Moby Dick?"

Change this program as you like: `run` has everything that an application needs.
"""

import argparse
import time

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
    with commands.starting(args, patient=False):
        from microvllm import LLM, SamplingParams  # here, because importing torch takes seconds

        # for example LLM("models/oldbooks-d6", num_blocks=200), SamplingParams(temperature=0.8)
        llm = LLM(**commands.engine_options(args))
        params = SamplingParams(**commands.sampling_options(args))
    commands.started(args, llm)

    with llm:
        is_chat = llm.tokenizer.has_chat and not args.raw
        prompts = args.prompt or (QUESTIONS if is_chat else BEGINNINGS)
        start = time.perf_counter()
        if is_chat:
            outputs = llm.chat([[{"role": "user", "content": text}] for text in prompts], params)
        else:
            outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - start

    for prompt, output in zip(prompts, outputs, strict=True):
        text = terminal.plain(output.text)  # without control characters of the terminal
        shown = f"> {prompt}\n{text.strip()}" if is_chat else f"{prompt}{text}"
        is_cut = output.finish_reason == "length"
        print(shown + (f"  [cut at {len(output.token_ids)} tokens]" if is_cut else "") + "\n")
    num_tokens = sum(len(output.token_ids) for output in outputs)
    speed = f"{num_tokens / seconds:.0f} tokens/s"
    print(f"{len(prompts)} prompts, {num_tokens} tokens in {seconds:.2f} s: {speed}")


def main() -> None:
    parser = terminal.Parser(description="Answer a few prompts.")
    parser.add_argument(
        "--prompt", action="append", help="text of a prompt; may be repeated (default: examples)"
    )
    flags.add_flags(parser, flags.ENGINE + flags.RAW + flags.sampling(128, 0.8, 50))
    parser.set_defaults(command=run)
    terminal.execute(parser.parse_args())


if __name__ == "__main__":
    main()
