"""Chooses the loop, runner, guard, memory and proposer of an engine. full.py assembles them.

See full.py for the comments that are paths of features.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import replace
from functools import partial
from os import PathLike
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import torch

from . import engine, sampler
from .engine import EngineConfig, Loop
from .environment import free_memory
from .features.answers import AnswerLookup, EarlierAnswers
from .features.draft import DraftModel, open_draft
from .features.live import LiveWeights
from .features.logits import LogitsExtension
from .features.lookup import PromptLookup
from .features.threads import ThreadGuard
from .features.windows import make_memory as make_grouped_memory
from .fused.model import FusedGPT
from .loops.ahead import AheadLoop, AheadRunner
from .loops.live import FollowingLoop
from .params import SamplingParams
from .resources import fits
from .runner import Hooks, Runner
from .scheduler import at_once

if TYPE_CHECKING:
    from .features.parallel import Ranks


class Steps(NamedTuple):
    """The parts that run an engine's steps."""

    loop_class: Callable[[engine.LLM], Loop]
    runner_class: Callable[..., Runner]
    may_admit: Callable[..., bool] = at_once  # whether waiting sequences may enter this step
    is_recorded: bool = False  # whether the runner records steps once and replays them


def choose_loop(model, ranks: Ranks | None, cuda_graphs: bool) -> Steps:
    """Return the loop and the runner for a model:

    device    model                                   loop             runner
    cuda      with recorded steps                     AheadLoop        GraphRunner
    cuda      others                                  AheadLoop        AheadRunner
    cpu       compiled, no ranks                      MultiStepLoop    MultiStepRunner
    others    others                                  Loop             Runner
    """
    is_fused = isinstance(model, FusedGPT)
    if model.device.type == "cuda":
        if cuda_graphs and ranks is None and is_fused and model.backend.can_record:
            from .gpu.admission import in_groups
            from .gpu.graphs import GraphRunner

            return Steps(AheadLoop, GraphRunner, may_admit=in_groups, is_recorded=True)
        return Steps(AheadLoop, AheadRunner)
    if is_fused and model.compiled is not None and ranks is None:
        from .loops.multi_step import MultiStepLoop, MultiStepRunner

        return Steps(MultiStepLoop, MultiStepRunner)
    return Steps(Loop, Runner)


def make_runner(model, runner_class: Callable[..., Runner], cache, blocks) -> Runner:
    """Return a runner without an engine, to measure steps."""
    hooks = Hooks()
    runner = runner_class(model, cache, blocks, hooks, choose_sampler(model))
    # features/logits.py
    logits = LogitsExtension()
    logits.attach(SimpleNamespace(model=model, runner=runner))
    hooks.set_extensions([logits])

    return runner


def choose_sampler(model) -> Callable[..., torch.Tensor]:
    """Return the function that draws tokens: the one of the model's kernels, or the core's."""
    return model.backend.sample if isinstance(model, FusedGPT) else sampler.sample


# features/live.py
def follow_weights(
    loop_class: Callable[[engine.LLM], Loop], live: LiveWeights, llm: engine.LLM
) -> FollowingLoop:
    """Return a loop that follows live weights, and wakes the engine when it needs a step."""
    return FollowingLoop(loop_class(llm), live)


def choose_guard(ranks: Ranks | None, context: Callable) -> Callable[..., engine.Guard]:
    """Return the guard class of an engine. Later features replace the class of earlier ones.
    context: makes a context manager for everything that the engine computes."""
    guard_class: Callable[..., engine.Guard] = engine.Guard
    # features/threads.py
    guard_class = partial(ThreadGuard, context=context)

    # features/parallel.py
    if ranks is not None:
        from .features.parallel import RankGuard

        guard_class = partial(RankGuard, ranks=ranks, context=context)

    return guard_class


def choose_proposer(
    prompt_lookup: int, never: Set[int] = frozenset()
) -> engine.DraftProposer | None:
    """Return the proposer of draft tokens, if any. never: ids that are never draft tokens."""
    proposer = None
    # features/lookup.py
    if prompt_lookup:
        proposer = PromptLookup(prompt_lookup, never=never)

    return proposer


# features/answers.py
def make_answer_lookup(answer_lookup: int, never: Set[int]) -> AnswerLookup:
    """Return a proposer of tokens from earlier answers."""
    return AnswerLookup(answer_lookup, EarlierAnswers(), never=never)


# features/draft.py
def make_draft_model(
    llm_class: type[engine.LLM], model, tokenizer, arguments: SimpleNamespace, never: Set[int]
) -> DraftModel:
    """Return a proposer with a draft model and its engine."""
    draft = open_draft(llm_class, model, tokenizer, arguments)
    return DraftModel(draft, never=never)


def check_drafts(arguments: SimpleNamespace, device: torch.device) -> None:
    """Raise ValueError if draft tokens are not supported here or have several sources, TypeError
    for an invalid draft model."""
    if not isinstance(arguments.draft, (str, PathLike, engine.LLM, type(None))):
        raise TypeError(f"draft must be a path or an LLM, got {arguments.draft!r:.80}")
    names = ("prompt_lookup", "answer_lookup", "draft")
    sources = {name: value for name in names if (value := vars(arguments)[name]) not in (0, None)}
    if len(sources) > 1:
        raise ValueError(
            f"{' and '.join(sources)} cannot be combined: give one source of draft tokens "
            "(answer_lookup searches the prompt as well)"
        )
    for name, value in sources.items():
        if device.type == "cuda":
            raise ValueError(
                f"{name}={value!r} is not supported on {device}, where steps are planned before "
                "the tokens of the previous step are known: leave it out, or give device='cpu'"
            )
    if arguments.draft is not None and arguments.tensor_parallel > 1:
        raise ValueError(
            f"draft={arguments.draft!r} depends on measured times, but the processes of "
            f"tensor_parallel={arguments.tensor_parallel} must run the same steps: give "
            "prompt_lookup instead"
        )


def check_block_size(block_size: int, model) -> None:
    """Raise ValueError for a block size that the kernels cannot read."""
    if isinstance(model, FusedGPT) and block_size % model.backend.block_step:
        raise ValueError(f"block_size={block_size}: {model.backend.block_step_reason}")


def make_ranks(tensor_parallel: int, device: str | torch.device) -> Ranks | None:
    """Return the processes that share a model, including this one, or None."""
    # features/parallel.py
    if tensor_parallel > 1:
        from .features.parallel import Ranks

        return Ranks(tensor_parallel, device)

    return None


def make_memory(model, config: EngineConfig) -> tuple:
    """Allocate the KV cache and its block manager. Raises ValueError with the numbers if memory is
    insufficient."""
    make = engine.make_memory
    # features/windows.py
    make = make_grouped_memory

    with fits("the KV cache", model.device):
        return make(model, config)


def choose_batch_size(model, config: EngineConfig, ranks: Ranks | None) -> EngineConfig:
    """Return a copy of config. A max_batch_size of None is set to fit the memory of a GPU."""
    if config.max_batch_size or model.device.type != "cuda":
        return config
    from .gpu import memory

    shape, dtype = model.kv_layout
    num_tokens = config.with_defaults(model).max_batched_tokens
    free = free_memory(model.device)
    size = memory.choose_batch_size(shape, dtype.itemsize, num_tokens, free)
    return replace(config, max_batch_size=size if ranks is None else ranks.least(size))


def choose_cache_bytes(
    model,
    config: EngineConfig,
    steps: Steps,
    ranks: Ranks | None,
    *,
    utilization: float | None,
    is_live: bool,
) -> int | None:
    """Return the bytes for the KV cache; None if the number of blocks is given, or the core
    decides.

    utilization: the share of a GPU's free memory. A live module gets a quarter of what an engine
    alone would get. A training script makes its engine first. Later come gradients and optimizer
    state, each as large as the weights or twice as large, and then activations, which are the
    largest.
    """
    if config.num_blocks is not None:
        return None
    if model.device.type == "cuda":
        from .gpu.memory import UTILIZATION, gpu_cache_bytes

        num_bytes = gpu_cache_bytes(
            model,
            config.with_defaults(model),
            utilization or UTILIZATION,
            make_memory=make_memory,
            make_runner=partial(make_runner, model, steps.runner_class),
            params_class=SamplingParams,
            is_recorded=steps.is_recorded,
        )
    elif is_live or ranks is not None:
        num_bytes = min(free_memory(model.device) // 2, 2**32)  # as in the core
    else:
        return None
    if is_live and utilization is None:
        num_bytes //= 4
    return num_bytes if ranks is None else ranks.least(num_bytes)
