"""A trainer in its own process sends weights to the engine, which verifies them.

    python examples/two_processes.py                   # some seconds

    the trainer's process                      the engine's process
    trains, computes checksums    ---------->  receives names, shapes, checksums
    sends the tensors, one by one ---------->  receives them (torch.distributed, gloo)
                                  <----------  check_transfer: accepts, or names wrong tensors
    next version, or same again                update_weights(version=)

In the second round, the trainer makes a common mistake: its optimizer changes the weights before
they are sent. The checksums find the changed tensors, the engine keeps its version, and the trainer
sends again. With NCCL the tensors would go from GPU to GPU; the rest would be the same.
"""

import multiprocessing
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of examples/
sys.path.insert(0, f"{sys.path[0]}/src")

import torch
import torch.distributed as dist
from torch import Tensor

from examples.gpt import load
from microvllm import LLM, SamplingParams
from microvllm.rl import check_transfer, checksums

MODELS = Path(__file__).resolve().parents[1] / "models"
QUESTION = [{"role": "user", "content": "What is the name of the ship?"}]
ANSWER = "The ship is called the Pequod."
NUM_VERSIONS = 4
BAD_VERSION = 2
ENGINE = 0  # ranks
TRAINER = 1
TIMEOUT = timedelta(minutes=5)


def connect(rank: int, store: str) -> None:
    """Connect the two processes. Calls raise an error after TIMEOUT if the other one has ended."""
    place = {"init_method": f"file://{store}", "rank": rank, "world_size": 2}
    dist.init_process_group("gloo", timeout=TIMEOUT, **place)


def send(value: object, receiver: int) -> None:
    """Send any Python object as a pickle; use this only between your own processes."""
    dist.send_object_list([value], dst=receiver)


def receive(sender: int) -> object:
    values = [None]
    dist.recv_object_list(values, src=sender)
    return values[0]


def run_trainer(store: str, token_ids: list[int], num_prompt: int) -> None:
    """The trainer's process: trains the model to memorise the answer, and sends each version."""
    connect(TRAINER, store)
    gpt = load(MODELS / "oldbooks-d6")
    optimizer = torch.optim.SGD(gpt.parameters(), 0.02)
    ids = torch.tensor([token_ids])
    targets = ids[:, 1:].clone()
    targets[:, : num_prompt - 1] = -1  # the loss ignores the question
    for version in range(1, NUM_VERSIONS + 1):
        gpt(ids[:, :-1], targets).backward()
        optimizer.step()
        is_right = False
        makes_mistake = version == BAD_VERSION
        while not is_right:
            weights = gpt.state_dict()
            shapes = {name: (weight.shape, weight.dtype) for name, weight in weights.items()}
            send((version, shapes, checksums(weights)), ENGINE)
            if makes_mistake:
                optimizer.step()  # the checksums are of the weights before this step
                makes_mistake = False
            for weight in weights.values():
                dist.send(weight, dst=ENGINE)
            is_right = receive(ENGINE)
        optimizer.zero_grad()
    send(None, ENGINE)
    dist.destroy_process_group()


def receive_weights(shapes: dict) -> dict[str, Tensor]:
    """Receive the tensors of a state dict, in the order of sending."""
    weights = {}
    for name, (shape, dtype) in shapes.items():
        weights[name] = torch.empty(shape, dtype=dtype)
        dist.recv(weights[name], src=TRAINER)
    return weights


def serve(llm: LLM, prompt: list[int], answer: list[int]) -> None:
    """The engine's process, until the trainer has finished."""
    while (message := receive(TRAINER)) is not None:
        version, shapes, sums = message
        weights = receive_weights(shapes)
        try:
            check_transfer(weights, sums)
        except ValueError as error:
            print(f"version {version} is rejected, version {llm.version} stays: {error}")
            send(False, TRAINER)
            continue
        llm.update_weights(weights, version=version)
        send(True, TRAINER)
        ((*scores,),) = llm.score([prompt], [answer])
        params = SamplingParams(temperature=0, max_tokens=16)
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        logprob = sum(scores) / len(scores)
        print(f"version {output.version}: log-probability {logprob:.2f} per token, {output.text!r}")


def main() -> None:
    with LLM(MODELS / "oldbooks-d6", device="cpu") as llm, tempfile.TemporaryDirectory() as folder:
        prompt = llm.tokenizer.render_for_completion(QUESTION)
        answer = [*llm.tokenizer.encode(ANSWER), llm.tokenizer.encode_special("<|assistant_end|>")]
        store = f"{folder}/store"
        arguments = (store, prompt + answer, len(prompt))
        context = multiprocessing.get_context("spawn")
        trainer = context.Process(target=run_trainer, args=arguments, daemon=True)
        trainer.start()
        connect(ENGINE, store)
        serve(llm, prompt, answer)
        dist.destroy_process_group()
        trainer.join()


if __name__ == "__main__":
    main()
