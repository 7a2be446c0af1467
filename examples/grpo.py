"""Reinforcement learning with an engine: a model learns to add.

    python examples/grpo.py             # about four minutes on two cores

The bundled model knows sums of single digits, and few sums of larger numbers. A training step has
three parts:

    (1) roll out   the engine answers some questions, each of them several times (a group)
    (2) reward     a right answer gets 1, a wrong answer 0; there are no worked examples
    (3) learn      tokens of answers above the mean reward of their group become more probable,
                   tokens of answers below it less probable: the policy gradient of GRPO (Shao et
                   al., "DeepSeekMath", 2024); as in nanochat, only the mean is subtracted

Then the engine samples again, and detects the new weights by itself. Before and after the training,
the model answers sums that the training does not contain: does it memorise sums, or learn to add?

Try another reward. Some answers of a group must get the reward from the start, because training
reinforces only answers that occur. For example, this model opens nanochat's calculator with a
probability of exp(-24), so this training cannot teach it to use the calculator.
"""

import argparse
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of examples/
sys.path.insert(0, f"{sys.path[0]}/src")

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from examples.gpt import GPT, load
from microvllm import LLM
from microvllm.cli import terminal
from microvllm.environment import how_to_install
from microvllm.tokenizer import load_tokenizer

MODELS = Path(__file__).resolve().parents[1] / "models"
SUMS = [(a, b) for a in range(1, 16) for b in range(1, 16)]


def prompt(llm: LLM, pair: tuple[int, int]) -> list[int]:
    """The token ids of the question, up to the start of the answer."""
    question = {"role": "user", "content": "What is {}+{}?".format(*pair)}
    return llm.tokenizer.render_for_completion([question])


def reward(pair: tuple[int, int], answer: str) -> float:
    return float(answer.endswith(f" is {sum(pair)}."))


class Settings(NamedTuple):
    """The flags of the program, see `main`."""

    steps: int
    prompts: int
    group: int
    max_tokens: int
    lr: float
    seed: int


class Rollouts(NamedTuple):
    """P questions with G answers each. A row is a question and one of its answers, padded."""

    ids: Tensor  # (P G, T) token ids
    mask: Tensor  # (P G, T) 1 for sampled tokens; 0 for questions, padding and tool output
    logprobs: Tensor  # (P G, T) in the distribution from which the engine drew the token
    rewards: Tensor  # (P, G)


def roll_out(llm: LLM, pairs: list, group: int, max_tokens: int, seed: int) -> Rollouts:
    """Parts (1) and (2). All answers run in one batch, and the answers of a group share the blocks
    of their question in the KV cache. Question i has the seed `seed + i`."""
    prompts = [prompt(llm, pair) for pair in pairs]
    # at temperature 1 and without filters, the engine draws from the distribution of the module
    sequences, masks, logprobs = llm.generate_batch(
        prompts, num_samples=group, max_tokens=max_tokens, temperature=1.0, seed=seed, logprobs=True
    )
    rewards = []
    for pair, question, rows in zip(pairs, prompts, sequences, strict=True):
        answers = [llm.tokenizer.decode(ids[len(question) :], skip_special=True) for ids in rows]
        rewards.append([reward(pair, answer) for answer in answers])
    return Rollouts(pad(sequences), pad(masks), pad(logprobs), torch.tensor(rewards))


def pad(groups: list[list[list]]) -> Tensor:
    """All rows of all groups as one tensor, padded to the longest row."""
    rows = [torch.tensor(row) for group in groups for row in group]
    return pad_sequence(rows, batch_first=True)


def policy_loss(gpt: GPT, rollouts: Rollouts) -> tuple[Tensor, float]:
    """Part (3). The loss, and the largest difference between the log-probabilities of the module
    and of the engine."""
    targets = rollouts.ids[:, 1:]
    mask = rollouts.mask[:, 1:]
    logprobs = gpt(rollouts.ids[:, :-1]).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    # the mask also excludes tokens that a tool forced, because the model did not choose them
    difference = (logprobs - rollouts.logprobs[:, 1:]) * mask
    # an answer is compared with its group. if all answers of a group are right, or all are wrong,
    # the group has no effect
    advantages = rollouts.rewards - rollouts.rewards.mean(1, keepdim=True)
    # the importance ratio is a token's present probability divided by its probability at the draw.
    # a batch is used once here, so the ratio is 1 up to rounding, and its gradient is that of
    # logprobs. with several steps on a batch, the ratio must be clipped, as in PPO
    ratio = difference.exp()
    loss = -(ratio * advantages.view(-1, 1) * mask).sum() / mask.sum().clamp(min=1)
    return loss, difference.abs().max().item()


def train(gpt: GPT, llm: LLM, pairs: list, settings: Settings) -> tuple[list[float], float, float]:
    """Train the module that the engine serves. Returns the mean reward of each step, the seconds of
    all rollouts, and the seconds of the learning."""
    optimizer = torch.optim.AdamW(gpt.parameters(), settings.lr, betas=(0.9, 0.95), weight_decay=0)
    rng = random.Random(settings.seed)
    curve = []
    sampling = 0.0
    learning = 0.0
    for step in range(settings.steps):
        start = time.perf_counter()
        questions = rng.choices(pairs, k=settings.prompts)
        seed = settings.seed + step * settings.prompts
        rollouts = roll_out(llm, questions, settings.group, settings.max_tokens, seed)
        middle = time.perf_counter()
        loss, difference = policy_loss(gpt, rollouts)
        loss.backward()
        optimizer.step()  # the engine uses the new weights when it samples next
        optimizer.zero_grad()
        end = time.perf_counter()
        sampling += middle - start
        learning += end - middle
        curve.append(rollouts.rewards.mean().item())
        print(
            f"{step + 1:4}  reward {curve[-1]:.2f} {'#' * round(30 * curve[-1]):30}  "
            f"log-probabilities differ by at most {difference:.0e}  "
            f"rollouts {middle - start:.2f} s, learning {end - middle:.2f} s",
            flush=True,
        )
    return curve, sampling, learning


@torch.no_grad()
def sample_plainly(gpt: GPT, ids: list[int], max_tokens: int, end: int) -> list[int]:
    """One answer of the module without an engine. It computes the whole text again for each
    token."""
    for _ in range(max_tokens):
        token = torch.multinomial(gpt(torch.tensor([ids]))[0, -1].softmax(-1), 1).item()
        if token == end:
            break
        ids = [*ids, token]
    return ids


def draw(curve: list[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no window
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2))
    steps = range(1, len(curve) + 1)
    last = [curve[max(0, i - 10) : i] for i in steps]
    axes.plot(steps, curve, ".", color="#AAAAAA", label="one step")
    axes.plot(steps, [sum(x) / len(x) for x in last], color="#0072B2", label="mean of ten")
    axes.set(xlabel="step", ylabel="reward", ylim=(0, 1.02))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    print(f"written: {path}")


def run(args: argparse.Namespace) -> None:
    if args.group < 2:
        raise ValueError("--group 1: answers of a group are compared, so give 2 or more")
    if not 0 < args.lr < 1:
        raise ValueError(f"--lr {args.lr}: give a number between 0 and 1")
    args.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(**{name: getattr(args, name) for name in Settings._fields})
    pairs = random.Random(args.seed).sample(SUMS, len(SUMS))
    held_out = pairs[:45]
    pairs = pairs[45:]
    gpt = load(MODELS / "oldbooks-d6")
    tokenizer = load_tokenizer(MODELS / "tokenizer")
    # a copy of the weights can have the layout that is fastest for the engine
    with LLM(model=gpt, tokenizer=tokenizer, copy=True, device="cpu") as llm:
        exam = {"group": 8, "max_tokens": args.max_tokens, "seed": args.seed}
        first = roll_out(llm, held_out, **exam).rewards.mean()
        curve, sampling, learning = train(gpt, llm, pairs, settings)
        last = roll_out(llm, held_out, **exam).rewards.mean()
        end_id = tokenizer.encode_special("<|assistant_end|>")
        start = time.perf_counter()
        for pair in pairs[:16]:
            sample_plainly(gpt, prompt(llm, pair), args.max_tokens, end_id)
        seconds_each = (time.perf_counter() - start) / 16
        plain = seconds_each * args.steps * args.prompts * args.group
    print(f"\nreward of sums never trained on: {first:.2f} at the beginning, {last:.2f} at the end")
    ways = (
        ("by the engine", sampling),
        ("one at a time without it (estimated from 16 answers)", plain),
    )
    for name, seconds in ways:
        print(f"rollouts {name}: {seconds:.1f} s, {seconds / (seconds + learning):.0%} of the time")
    try:
        draw(curve, args.out / "grpo.png")
    except ImportError:
        print(f"a plot needs matplotlib: {how_to_install('lab')}")


def main(argv: list[str] | None = None) -> None:
    parser = terminal.Parser(prog="grpo.py", description=__doc__)
    for name, kind, default, meaning in (
        ("steps", terminal.positive, 50, "training steps"),
        ("group", terminal.positive, 8, "answers to each question"),
        ("prompts", terminal.positive, 16, "questions per step"),
        ("max-tokens", terminal.positive, 16, "maximum number of tokens of an answer"),
        ("lr", float, 1e-4, "learning rate"),
        ("seed", int, 0, "random seed of questions and answers"),
        ("out", Path, "lab-results", "folder for grpo.png"),
    ):
        help_text = f"{meaning} (default: %(default)s)"
        parser.add_argument(f"--{name}", type=kind, default=default, help=help_text)
    parser.set_defaults(command=run)
    terminal.execute(parser.parse_args(argv))


if __name__ == "__main__":
    main()
