"""Helpers for an evaluation during training: the engine of a live module, and the share of the
problems of each process, as in nanochat's scripts under torchrun."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from .engine import Engine

if TYPE_CHECKING:
    from .. import LLM


@contextmanager
def llm_of(model, tokenizer, engine=None) -> Iterator[LLM]:
    """The LLM of an Engine. For any other object, a new LLM, which is closed afterwards."""
    if isinstance(engine, Engine):
        yield engine.llm
    else:
        with Engine(model, tokenizer, cuda_graphs=False).llm as llm:
            yield llm


def own_share(llm: LLM, num_problems: int) -> range:
    """Return the indices of the problems that this process solves."""
    if is_shared(llm):
        return range(dist.get_rank(), num_problems, dist.get_world_size())
    return range(num_problems)


def share_solved(llm: LLM, is_solved: list[bool]) -> float:
    """Return the share of solved problems over all processes. is_solved: for this process's
    problems."""
    counts = torch.tensor([sum(is_solved), len(is_solved)], device=llm.device)
    if is_shared(llm):
        dist.all_reduce(counts)
    num_solved, num_problems = counts.tolist()
    return num_solved / num_problems


def is_shared(llm: LLM) -> bool:
    """Return whether several processes, each with its own model, share the problems."""
    return dist.is_available() and dist.is_initialized() and llm.ranks is None
