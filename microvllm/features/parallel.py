"""Tensor parallel: a model shared among processes.

Every rank has a share of the heads, of the MLP's channels and of the vocabulary,
and runs the same scheduler on the same requests, so it plans the same steps. Two sums a layer and
the logits cross (Shoeybi et al. 2019, Megatron-LM); all ranks then draw from the same bits with the
same noise.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
import xxhash
from torch import Tensor

from ..checkpoint import pick_device
from ..engine import LLM, Runner
from ..model import GPTConfig
from ..scheduler import Plan


def join(size: int) -> None:
    """Meet the other processes that torchrun started, if the program has not done so itself.

    Raises ValueError if there are not `size` of them.
    """
    if not dist.is_available():
        raise ValueError("tensor_parallel needs a torch with torch.distributed, which this is not")
    joined = dist.is_initialized()
    world = dist.get_world_size() if joined else int(os.environ.get("WORLD_SIZE", 1))
    if world != size:
        raise ValueError(
            f"tensor_parallel={size} takes {size} processes, not {world}: start the program with "
            f"torchrun --standalone --nproc-per-node {size}"
        )
    if not joined:
        dist.init_process_group(_backend())
        atexit.register(_leave)


def _leave() -> None:
    """End the connections, or gloo's threads abort the process at its end. NCCL's are left alone
    after a failure: they might wait for someone who is gone."""
    failed = torch.cuda.is_initialized() and first_failure("")
    if dist.is_initialized() and not failed:
        dist.destroy_process_group()


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def first_failure(what: str) -> str:
    """Of all that failed on any rank the first; `what`, if there was nothing before."""
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.compare_set("microvllm/failure", "", what).decode()
    except (RuntimeError, ValueError):  # the store went with the rank that kept it
        return what


class Ranks:
    """This rank and the others of one model.

    size: how many; device: of this rank, "auto" and "cuda" are the GPU of its number on its
    machine. Raises ValueError as `join` and `pick_device` do.
    """

    def __init__(self, size: int, device="auto"):
        join(size)
        self.size, self.rank = size, dist.get_rank()
        if str(device) in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}"
        self.device = pick_device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"tensor_parallel runs on cpu or cuda, and device is {self.device}")
        self.peers = dist.new_group(backend=_backend())

    def check(self, quantization: str | None, deterministic: bool) -> None:
        """Raises ValueError for what ranks cannot do."""
        if quantization == "fp8" or (deterministic and self.size > 2):
            raise ValueError(
                "tensor_parallel has no quantization='fp8' yet, and deterministic=True for 2 "
                "processes at most: in which order the sums of more are made depends on the batch"
            )

    def local(self, config: GPTConfig) -> GPTConfig:
        """The attention of one rank: that of a narrower model. Raises ValueError if the kv heads,
        each with its query heads, cannot be shared out."""
        size, heads = self.size, config.n_kv_head
        if heads % size:
            fit = [str(n) for n in range(1, heads + 1) if heads % n == 0]
            raise ValueError(
                f"tensor_parallel={size} does not divide the model's {heads} kv heads (of "
                f"{config.n_head} query heads): it can be {' or '.join(fit)}"
            )
        return replace(
            config, n_head=config.n_head // size, n_kv_head=heads // size,
            n_embd=config.n_embd // size,
        )  # fmt: skip

    def share(self, weights: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
        """A checkpoint's tensors as this rank has them: views, so that of a memory-mapped file only
        these are read."""

        def part(name: str, weight: Tensor) -> Tensor:
            if name == "lm_head.weight":  # without padding; the last rank may have fewer rows
                return weight[: config.vocab_size].chunk(self.size)[self.rank]
            if name.endswith((".c_q.weight", ".c_k.weight", ".c_v.weight", ".c_fc.weight")):
                return weight.chunk(self.size)[self.rank]
            if name.endswith(".ve_gate.weight"):  # a row for each kv head
                return weight.chunk(self.size)[self.rank]
            if name.endswith(".c_proj.weight") or name.startswith("value_embeds."):
                return weight.chunk(self.size, 1)[self.rank]
            return weight  # what makes the residual stream is needed whole

        return {name: part(name, weight) for name, weight in weights.items()}

    def complete(self, name: str, product: Callable, config: GPTConfig) -> Callable:
        """The product with a matrix of `share`, made whole where that takes all ranks."""
        if name.endswith(".c_proj"):
            return lambda x: self.sum(product(x))
        if name == "lm_head":
            width = -(-config.vocab_size // self.size)
            return lambda x: self.gather(product(x), width)[:, : config.vocab_size]
        return product

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, in place: of the same bits everywhere."""
        x = x.contiguous()
        self._together(dist.all_reduce, x)
        return x

    def gather(self, x: Tensor, width: int) -> Tensor:
        """All ranks' x (R, at most width), padded to the width, side by side: (R, size * width)."""
        x = F.pad(x, (0, width - x.shape[1])).contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._together(dist.all_gather, parts, x)
        return torch.cat(parts, 1)

    def least(self, free: int) -> int:
        """Bytes for each rank's cache: the least of all, given how many are free on its device. The
        ranks of one machine share its memory."""
        if self.device.type == "cpu":
            free //= int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        found = torch.tensor([free])
        self._together(dist.all_reduce, found, dist.ReduceOp.MIN)
        return int(found)

    def agree(self, what: str, *data) -> None:
        """Raises RuntimeError unless all ranks have the same data (strings, bytes or arrays): else
        they would go on with sums of things that do not belong together."""
        digest = xxhash.xxh3_64()
        for item in data:
            digest.update(item)
        mine = torch.tensor([digest.intdigest() >> 1])
        found = [torch.empty_like(mine) for _ in range(self.size)]
        self._together(dist.all_gather, found, mine)
        if others := [rank for rank, theirs in enumerate(found) if theirs != found[0]]:
            raise RuntimeError(
                f"tensor parallel: rank 0 and rank {others[0]} differ in {what}. All ranks must be "
                "given the same, in the same order, and what a caller adds (logits_processor, "
                "policies, abort) must not depend on a clock or an unseeded random number"
            )

    def same_step(self, batch) -> None:
        """Raises RuntimeError unless all ranks are about to compute the same (numpy) batch. Their
        blocks may differ; a token that one has drawn otherwise is among the ids of its next step.
        """
        step = batch.ids, batch.prev_ids, batch.positions, batch.logit_rows, batch.noise
        self.agree("what they want to compute next", *step)

    def same_engine(self, llm, seed: int) -> None:
        """Raises RuntimeError unless all ranks made the same engine."""
        model, blocks = llm.model, llm.scheduler.blocks
        made = [model.config, model.recipe, model.dtype, seed, llm.max_model_len, blocks.num_blocks]
        made += [blocks.block_size, blocks.enable_prefix_caching]
        made += [llm.max_batch_size, llm.max_batched_tokens, llm.prompt_lookup]
        self.agree("the model or its arguments", repr(made).encode())

    def fail(self, error: BaseException) -> None:
        """A step failed on this rank: let the others, who wait for its part, fail with its error.
        There is no way back to the same step, so they part."""
        first_failure(f"rank {self.rank} failed: {type(error).__name__}: {error}")
        peers, self.peers = self.peers, None
        if peers and self.device.type == "cpu":  # NCCL's end with the process, and torchrun sees it
            dist.destroy_process_group(peers)

    def _together(self, collective: Callable, *args) -> None:
        if self.peers is None:
            raise RuntimeError("tensor parallel: a step failed, and the ranks have parted: restart")
        try:
            collective(*args, group=self.peers)
        except RuntimeError as error:
            gone = f"another rank is gone ({str(error).splitlines()[0]:.200})"
            raise RuntimeError(f"tensor parallel: {first_failure(gone)}") from None


class ParallelRunner(Runner):
    """A Runner that makes sure that all ranks run the same step."""

    ranks: Ranks | None = None

    def batch(self, plan: Plan):
        batch = super().batch(plan)
        if self.ranks:
            self.ranks.same_step(batch)
        return batch


class ParallelLLM(LLM):
    """An engine that may be one of several ranks."""

    ranks: Ranks | None = None

    def _assemble(self, *args, **policies) -> None:
        super()._assemble(*args, **policies)
        if self.ranks:
            self.runner.ranks = self.ranks
            self.ranks.same_engine(self, args[-1])

    def _free_for_cache(self, block_size: int) -> int:
        free = super()._free_for_cache(block_size)
        # with as many blocks as the others they all plan the same
        return self.ranks.least(free) if self.ranks else free

    def _recover(self, error: BaseException) -> None:
        if self.ranks:
            self.ranks.fail(error)
        super()._recover(error)


PARTS = {"llm": ParallelLLM, "runner": ParallelRunner}
