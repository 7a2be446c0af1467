"""How much of a GPU's memory the KV cache may take."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import fields, replace

import torch

from ..attention import make_batch
from ..engine import EngineConfig
from ..environment import free_memory
from ..model import GPTConfig
from ..resources import fits
from ..runner import Runner
from ..sampler import SamplingParams
from ..scheduler import Chunk, Draw, DrawList, Plan, Sequence

# the parameters that take the most memory in a draw, if the class of parameters has them
ALL_FILTERS = {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1, "logprobs": 20}


UTILIZATION = 0.9  # the engine's share of the free memory
MAX_BATCH_SIZE = 512
MIN_BATCH_SIZE = 16
EDITED_LOGITS = 2**23  # as in features/logits.py, which this subpackage does not need
SEQUENCE_TOKENS = 256  # tokens for which each sequence of a full batch has memory


def token_bytes(shape: GPTConfig, itemsize: int) -> int:
    """Bytes of K and V of one token in all layers."""
    return 2 * shape.n_layer * shape.n_kv_head * shape.head_dim * itemsize


def forward_bytes(shape: GPTConfig, num_rows: int, itemsize: int) -> int:
    """Bytes of the activations of num_rows rows that exist at the same time: embeddings, residual
    stream, the output of the middle layer (era 5), norms, and the 4 C channels of the MLP."""
    return 12 * num_rows * shape.n_embd * itemsize


def draw_bytes(shape: GPTConfig, num_draws: int, itemsize: int) -> int:
    """Bytes of num_draws draws: the logits, and for the rows that are edited at once their copies
    in float32 and the indices of a sort."""
    num_edited = min(num_draws, max(1, EDITED_LOGITS // shape.vocab_size))
    return shape.vocab_size * (num_draws * itemsize + num_edited * 52)


def recorded_bytes(shape: GPTConfig, max_batch_size: int, itemsize: int) -> int:
    """Bytes that the recorded steps keep: activations and logits of the largest one."""
    logits = max_batch_size * shape.vocab_size * itemsize
    return forward_bytes(shape, max_batch_size, itemsize) + logits


def choose_batch_size(shape: GPTConfig, itemsize: int, max_batched_tokens: int, free: int) -> int:
    """The default of max_batch_size: the number of sequences with memory for SEQUENCE_TOKENS tokens
    each, from MIN_BATCH_SIZE to MAX_BATCH_SIZE. free: bytes beside weights and other programs."""
    num_tokens = expected_tokens(shape, itemsize, max_batched_tokens, MAX_BATCH_SIZE, free)
    num_sequences = num_tokens // SEQUENCE_TOKENS
    return min(max(num_sequences // 16 * 16, MIN_BATCH_SIZE), MAX_BATCH_SIZE)


def expected_tokens(
    shape: GPTConfig, itemsize: int, max_batched_tokens: int, max_batch_size: int, free: int
) -> int:
    """The number of tokens whose K and V fit into `free` bytes beside a step and the recorded
    steps."""
    left = int(free * UTILIZATION) - forward_bytes(shape, max_batched_tokens, itemsize)
    left -= draw_bytes(shape, max_batch_size, itemsize)
    left -= recorded_bytes(shape, max_batch_size, itemsize)
    return max(left // token_bytes(shape, itemsize), 0)


def gpu_cache_bytes(
    model,
    config: EngineConfig,
    utilization: float,
    *,
    make_memory: Callable,
    make_runner: Callable[..., Runner],
    params_class: type[SamplingParams],
    is_recorded: bool,
) -> int:
    """Bytes for the KV cache: a share of the free memory, without the memory of the largest step.
    That step is run once to measure it.

    utilization: the share; make_memory(model, config): returns the cache and its block manager;
    make_runner(cache, blocks): returns a runner; params_class: of requests; is_recorded: will there
    be recorded steps? Raises ValueError if there is no memory for the largest step.
    """
    config = config.with_defaults(model)
    device = model.device
    model.init_rotary(min(config.max_model_len, config.max_batched_tokens + 1))
    num_allocated = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    limits = (
        f"max_batched_tokens={config.max_batched_tokens} and max_batch_size={config.max_batch_size}"
    )
    with fits(f"steps of {limits}", device):
        cache, blocks = make_memory(model, replace(config, num_blocks=1))  # the null block alone
        warm_up(make_runner(cache, blocks), config, params_class)
    num_reserved = torch.cuda.max_memory_allocated(device) - num_allocated
    torch.cuda.empty_cache()
    if is_recorded:  # recorded steps have memory of their own
        itemsize = model.dtype.itemsize
        num_reserved += recorded_bytes(model.config, config.max_batch_size, itemsize)
    return int(free_memory(device) * utilization) - num_reserved


@torch.inference_mode()
def warm_up(runner: Runner, config: EngineConfig, params_class: type[SamplingParams]) -> None:
    """Run a short prompt and the largest step, and draw for full batches, without filters and with
    all of them. This compiles all kernels that a first request needs."""
    known = {field.name for field in fields(params_class)}
    filters = {name: value for name, value in ALL_FILTERS.items() if name in known}
    # a short prompt has its own kernel
    compute(runner, [2], params_class(seed=0), config.max_batch_size)
    compute(runner, largest_step(config), params_class(seed=0, **filters), config.max_batch_size)


def largest_step(config: EngineConfig) -> list[int]:
    """The length of each prompt in a step with the most tokens."""
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
    batch = runner.upload(make_batch(plan, runner.blocks))
    runner.draw(plan, batch, runner.forward(batch))
