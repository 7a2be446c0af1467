"""Asynchronous reinforcement learning: train the model while it generates other samples.

    python examples/rl.py                              # less than a minute on two cores
    python examples/rl.py --lag 0 --plot mismatch.png

examples/grpo.py waits for the answers to all questions of a step. Here some questions are always in
flight. As soon as enough of them are answered, the module is trained. The engine, which serves this
module, continues the other questions with the new weights. Each step prints a line with:

    versions          each token has the version of the weights that drew it
    max_version_lag   a sample ends when the weights are too many versions ahead (--lag); a finished
                      sample that waits for its group may be older
    mismatch          the difference between the log-probabilities of the engine and of the loss: in
                      the first step only rounding, later also weights that changed after the draw
"""

import argparse
import random
import sys
from pathlib import Path
from statistics import mean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of examples/
sys.path.insert(0, f"{sys.path[0]}/src")

import torch
from torch.nn.utils.rnn import pad_sequence

from examples.gpt import GPT, load
from examples.grpo import MODELS, SUMS, prompt, reward
from microvllm import LLM, SamplingParams
from microvllm.engine import RequestOutput
from microvllm.rl import Mismatch, mismatch

GROUP = 8  # samples per question
QUESTIONS = 8  # answered questions per step
IN_FLIGHT = 12  # questions in flight
MOST_RATIO = 2.0  # largest importance weight: truncated importance sampling


class Row(NamedTuple):
    """A sample: its question and the drawn tokens."""

    ids: list[int]
    mask: list[int]  # 1 for drawn tokens
    logprobs: list[float]  # at the draw
    reward: float
    advantage: float  # reward minus the mean of the group
    versions: list[int]  # for each drawn token, the version of the weights


def read_group(output: RequestOutput, pair: tuple[int, int]) -> list[Row]:
    """The samples of a question, except those that max_version_lag has ended."""
    samples = [sample for sample in output.samples if sample["finish_reason"] != "abort"]
    rewards = [reward(pair, sample["text"]) for sample in samples]
    question = output.prompt_token_ids
    zeros = [0] * len(question)
    rows = []
    for sample, sample_reward in zip(samples, rewards, strict=True):
        logprobs = [entry["sampler_logprob"] if entry else 0.0 for entry in sample["logprobs"]]
        rows.append(
            Row(
                ids=question + sample["token_ids"],
                mask=zeros + sample["mask"],
                logprobs=zeros + logprobs,
                reward=sample_reward,
                advantage=sample_reward - mean(rewards),
                versions=sample["versions"],
            )
        )
    return rows


def collect(llm: LLM, rng: random.Random, pairs: dict, lag: int) -> list[Row]:
    """The samples of the next answered questions. pairs: the numbers of each question in flight, by
    the id of its request."""
    rows = []
    num_answered = 0
    while num_answered < QUESTIONS or not rows:
        while len(pairs) < IN_FLIGHT:
            pair = rng.choice(SUMS)
            params = SamplingParams(n=GROUP, max_tokens=16, seed=rng.getrandbits(32), logprobs=0)
            pairs[llm.add_request(prompt(llm, pair), params, max_version_lag=lag)] = pair
        for output in llm.step():
            rows += read_group(output, pairs.pop(output.request_id))
            num_answered += 1
    return rows


def learn(gpt: GPT, optimizer: torch.optim.Optimizer, rows: list[Row]) -> Mismatch:
    """One step of the policy gradient. Returns the mismatch between loss and rollouts."""
    ids = pad([row.ids for row in rows])
    mask = pad([row.mask for row in rows])
    rollout_logprobs = pad([row.logprobs for row in rows])
    advantages = torch.tensor([row.advantage for row in rows])[:, None]
    logp = gpt(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    # a token that has become less probable since its draw counts less, and vice versa
    ratio = (logp.detach() - rollout_logprobs[:, 1:]).exp().clamp(max=MOST_RATIO)
    loss = -(ratio * advantages * logp * mask[:, 1:]).sum() / mask.sum()
    loss.backward()
    optimizer.step()  # the engine uses the new weights in its next step, as a new version
    optimizer.zero_grad()
    return mismatch(logp, rollout_logprobs, mask)


def pad(rows: list[list]) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def train(gpt: GPT, llm: LLM, num_steps: int, lag: int) -> list[Mismatch]:
    """Train the module that the engine serves. Returns the report of each step."""
    optimizer = torch.optim.AdamW(gpt.parameters(), 5e-5, betas=(0.9, 0.95), weight_decay=0)
    rng = random.Random(0)
    pairs: dict[int, tuple[int, int]] = {}
    reports = []
    for step in range(num_steps):
        rows = collect(llm, rng, pairs, lag)
        reports.append(learn(gpt, optimizer, rows))
        oldest = min(row.versions[0] for row in rows)
        print(
            f"{step + 1:3}  {len(rows)} samples, reward {mean(row.reward for row in rows):.2f}, "
            f"versions {oldest} to {llm.version}; {reports[-1]}",
            flush=True,
        )
    return reports


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="rl.py")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--lag", type=int, default=1, help="max_version_lag (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="file for a plot of the last |delta logp|")
    args = parser.parse_args(argv)
    gpt = load(MODELS / "oldbooks-d6")
    with LLM(model=gpt, tokenizer_path=MODELS / "tokenizer", copy=True, device="cpu") as llm:
        reports = train(gpt, llm, args.steps, args.lag)
    if args.plot is not None:
        reports[-1].plot(args.plot)


if __name__ == "__main__":
    main()
