"""How much of a GPU's memory the KV cache may take."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import fields, replace

import torch

from ..engine import EngineConfig
from ..environment import free_memory
from ..resources import fits
from ..runner import Runner
from ..sampler import SamplingParams
from ..scheduler import Chunk, Draw, DrawList, Plan, Sequence

# what takes the most memory in a draw, as far as the parameters have it
ALL_FILTERS = {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1, "logprobs": 20}


def gpu_cache_bytes(
    model,
    config: EngineConfig,
    utilization: float,
    *,
    make_memory: Callable,
    make_runner: Callable[..., Runner],
    params_class: type[SamplingParams],
) -> int:
    """Bytes for the KV cache: the largest step is run once, to see what activations take, and the
    cache gets a share of the rest.

    utilization: this share; make_memory(model, config): the cache and its block manager;
    make_runner(cache, blocks): a runner; params_class: of requests. Raises ValueError where there
    is no memory for that step.
    """
    config = config.with_defaults(model)
    device = model.device
    model.init_rotary(min(config.max_model_len, config.max_batched_tokens + 1))
    num_allocated = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with fits(f"steps of max_batched_tokens={config.max_batched_tokens}", device):
        cache, blocks = make_memory(model, replace(config, num_blocks=1))  # the null block alone
        warm_up(make_runner(cache, blocks), config, params_class)
    activations = torch.cuda.max_memory_allocated(device) - num_allocated
    torch.cuda.empty_cache()
    # twice: the memory of the recorded steps is their own
    return int(free_memory(device) * utilization) - 2 * activations


@torch.inference_mode()
def warm_up(runner: Runner, config: EngineConfig, params_class: type[SamplingParams]) -> None:
    """Run a short prompt and the largest step, and draw for full batches, without filters and with
    all of them: what a first request compiles is compiled then."""
    known = {field.name for field in fields(params_class)}
    filters = {name: value for name, value in ALL_FILTERS.items() if name in known}
    # a short prompt has a kernel of its own
    compute(runner, [2], params_class(seed=0), config.max_batch_size)
    compute(runner, largest_step(config), params_class(seed=0, **filters), config.max_batch_size)


def largest_step(config: EngineConfig) -> list[int]:
    """Tokens of each prompt in a step of as many tokens as are possible."""
    longest = config.max_model_len - 1
    num_full, rest = divmod(config.max_batched_tokens, longest)
    lengths = [longest] * num_full
    if rest > 0:
        lengths.insert(0, rest)
    return lengths[-config.max_batch_size :]


def compute(runner: Runner, lengths: list[int], params: SamplingParams, num_draws: int) -> None:
    """Compute prompts of these lengths, whose K and V go to the null block, and draw tokens."""
    chunks = []
    for request_id, num_tokens in enumerate(lengths):
        seq = Sequence(request_id, [0] * num_tokens, params)
        seq.block_table = array("i", [0] * runner.blocks.blocks_for(num_tokens))
        chunks.append(Chunk(seq, 0, num_tokens))
    draw = Draw(0, chunks[0].seq, lengths[0])
    plan = Plan(chunks=chunks, draws=DrawList([draw] * num_draws))
    batch = runner.prepare(plan)
    runner.draw(plan, batch, runner.forward(batch))
