"""A tool with a session for each sample: the model guesses a number, the tool knows it.

    python examples/tool_session.py --samples 4

Each sample has a session with a number of its own. The model writes a guess as the call of a tool,
the session answers "higher", "lower" or "right", and the model guesses again. Answers are forced
tokens with mask 0: a policy gradient leaves them out, as examples/grpo.py does. The sessions are
slow, as a sandbox or a search engine is; while one is busy the other samples go on.

The bundled model was never trained to call a tool, so a logits_processor lets it write nothing but
guesses. Which ones is its own choice: the reward of a sample could be how few it needs.
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
    """Knows the number of one sample."""

    def __init__(self, number: int):
        self.number = number

    async def __call__(self, call: str) -> str:
        await asyncio.sleep(0.01)  # a real tool waits for something here
        guess = int(call)
        if guess == self.number:
            return "right"
        return "higher" if guess < self.number else "lower"


class GuessesOnly:
    """A logits_processor: a call after the other until one is right, no number twice."""

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
    """The output of a request with a game in each of its samples."""
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
