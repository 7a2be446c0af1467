"""A tool with a session for each sample: a game in which the model guesses a number.

    python examples/tool_session.py --samples 4

Each sample has a session with its own secret number. The model calls the tool with a number, the
session answers "higher", "lower" or "right", and the model calls again. The answers are forced
tokens with mask 0, so that a policy gradient can exclude them, as in examples/grpo.py. The sessions
are slow, like a sandbox or a search engine. While one is busy, the other samples continue.

The bundled model was not trained to call tools, so a logits_processor allows only calls with
numbers. The model chooses the numbers. A reward could be higher for fewer calls.
"""

import argparse
import asyncio
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch

from microvllm import LLM, SamplingParams
from microvllm.features.tools import Tool, ToolRequest, ToolSession

MODEL = Path(__file__).resolve().parents[1] / "models" / "oldbooks-d6"
NUMBERS = range(1, 10)  # each is one token
QUESTION = "Guess my number. It is between 1 and 9."


class GuessTool(Tool):
    """Begins a session for each sample."""

    def begin(self, request: ToolRequest) -> ToolSession:
        return GuessSession(random.Random(f"{request.seed}/{request.sample}").choice(NUMBERS))


class GuessSession(ToolSession):
    """The session of one sample, with its secret number."""

    def __init__(self, number: int):
        self.number = number

    async def __call__(self, call: str) -> str:
        await asyncio.sleep(0.01)  # a real tool would do its work here
        guess = int(call)
        if guess == self.number:
            return "right"
        return "higher" if guess < self.number else "lower"


class GuessesOnly:
    """A logits_processor that allows only calls, until a guess is right, and no number twice."""

    def __init__(self, llm: LLM):
        encode_special = llm.tokenizer.encode_special
        self.start = encode_special("<|python_start|>")
        self.end = encode_special("<|python_end|>")
        self.stop = encode_special("<|assistant_end|>")
        self.right = [*llm.tokenizer.encode("right"), encode_special("<|output_end|>")]
        self.numbers = [llm.tokenizer.encode(str(number))[0] for number in NUMBERS]

    def begin(self, prompt_ids: list[int]):
        def allow(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            output = token_ids[len(prompt_ids) :]
            allowed = [self.start]
            if output[-len(self.right) :] == self.right:
                allowed = [self.stop]
            elif output[-1:] == [self.start]:
                allowed = [token_id for token_id in self.numbers if token_id not in output]
            elif output[-2:-1] == [self.start]:
                allowed = [self.end]
            mask = torch.zeros(len(logits), dtype=torch.bool)
            mask[allowed] = True
            return mask

        return allow


def play(llm: LLM, num_samples: int, seed: int) -> dict:
    """The output of a request whose samples each play a game."""
    tool = GuessTool(name="guess", timeout=5.0)
    params = SamplingParams(
        max_tokens=100, n=num_samples, seed=seed, logits_processor=GuessesOnly(llm)
    )
    message = {"role": "user", "content": QUESTION}
    (output,) = llm.chat([message], params, use_tqdm=False, tools=[tool])
    return output


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with LLM(MODEL, num_blocks=400) as llm:
        output = play(llm, args.samples, args.seed)
    for i, sample in enumerate(output["samples"]):
        num_drawn = sum(sample["mask"])
        num_forced = len(sample["mask"]) - num_drawn
        print(f"sample {i}: {sample['text']}")
        print(f"  {len(sample['tool_calls'])} calls, {num_drawn} tokens drawn, {num_forced} forced")


if __name__ == "__main__":
    main()
