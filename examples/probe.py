"""Linear probes on hidden states: what does the model know before its answer begins?

    python examples/probe.py            # less than a minute on two cores

The questions are "What is a+b?". A probe is a linear function of the hidden state at the last token
of the question. One probe for each layer is fitted by ridge regression on two thirds of the
questions, and tested on the other third. The column "majority" is the accuracy of always giving the
more frequent answer. One property of the sum can be read from every layer. Its parity can be read
from no layer, although the model answers some of these questions: a linear probe does not find all
information in the states.

Try the tokens of the answer (the states include them), or another property. For a sparse
autoencoder, write the states of all tokens to a file: hidden_states={"layers": (3,), "path":
"states.bin"}.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # runs from a clone

import torch
from torch import Tensor

from microvllm import LLM, SamplingParams

MODELS = Path(__file__).resolve().parents[1] / "models"
LARGEST = 30
RIDGE = 10.0  # factor of the squared weights; the features have variance 1
PROPERTIES = {
    "a+b > 30": lambda a, b: a + b > LARGEST,
    "a+b is odd": lambda a, b: (a + b) % 2 == 1,
}


def read_states(llm: LLM, pairs: list[tuple[int, int]]) -> Tensor:
    """The hidden states (N, layers, C) of the last token of each question."""
    prompts = []
    for a, b in pairs:
        question = {"role": "user", "content": f"What is {a}+{b}?"}
        prompts.append(llm.tokenizer.render_for_completion([question]))
    layers = range(llm.model.config.n_layer)
    params = SamplingParams(temperature=0, max_tokens=1)
    outputs = llm.generate(prompts, params, use_tqdm=False, hidden_states=layers)
    # the rows of hidden_states are the tokens of prompt and answer
    states = [output.hidden_states[len(output.prompt_token_ids) - 1] for output in outputs]
    return torch.stack(states)


def fit(x: Tensor, y: Tensor) -> Tensor:
    """The weights (C + 1,) of a ridge regression of y (N,), which is 1 or -1, on x (N, C + 1)."""
    penalty = RIDGE * torch.eye(x.shape[1])
    return torch.linalg.solve(x.T @ x + penalty, x.T @ y)


def held_out_accuracy(states: Tensor, has_property: Tensor) -> float:
    """The accuracy on the last third of the rows (N, C) of a probe fitted on the others."""
    num_train = 2 * len(states) // 3
    scaled = (states - states[:num_train].mean(0)) / (states[:num_train].std(0) + 1e-6)
    x = torch.cat([scaled, torch.ones(len(scaled), 1)], 1)
    y = 2.0 * has_property - 1
    weights = fit(x[:num_train], y[:num_train])
    is_right = (x[num_train:] @ weights > 0) == has_property[num_train:]
    return is_right.float().mean().item()


def majority_accuracy(has_property: Tensor) -> float:
    """The accuracy on the last third of the answer that is more frequent in the first two."""
    num_train = 2 * len(has_property) // 3
    majority = has_property[:num_train].float().mean() > 0.5
    return (has_property[num_train:] == majority).float().mean().item()


def main() -> None:
    pairs = [(a, b) for a in range(1, LARGEST + 1) for b in range(1, LARGEST + 1)]
    random.Random(0).shuffle(pairs)
    with LLM(MODELS / "oldbooks-d6", device="cpu") as llm:
        states = read_states(llm, pairs)
    print(f"{len(pairs)} questions; accuracy on the third that was not used to fit the probes")
    layers = range(states.shape[1])
    print("layer".ljust(12), *(f"{layer:6}" for layer in layers), "  majority")
    for name, function in PROPERTIES.items():
        has_property = torch.tensor([function(a, b) for a, b in pairs])
        accuracies = [held_out_accuracy(states[:, layer], has_property) for layer in layers]
        majority = majority_accuracy(has_property)
        print(name.ljust(12), *(f"{accuracy:6.1%}" for accuracy in accuracies), f"{majority:9.1%}")


if __name__ == "__main__":
    main()
