"""Tensor parallel: a model shared among processes.

Every rank has a share of the heads, of the MLP's channels and of the vocabulary, and runs the same
scheduler on the same requests, so it plans the same steps. Two sums a layer and the logits cross
(Shoeybi et al. 2019, Megatron-LM); all ranks then draw from the same bits with the same noise.
"""

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
    """Meet the other processes that torchrun started, if the program has not done so itself. Raises
    ValueError if there are not `size` of them."""
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
    """This rank and the others of one model, `size` in all. device: of this rank, "auto" and "cuda"
    are the GPU of its number on its machine. Raises ValueError as `join` and `pick_device` do."""

    def __init__(self, size: int, device="auto"):
        join(size)
        self.size, self.rank = size, dist.get_rank()
        if str(device) in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}"
        self.device = pick_device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a process has one card, and NCCL asks for it
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
        width, query_heads = config.n_embd // size, config.n_head // size
        return replace(config, n_embd=width, n_head=query_heads, n_kv_head=heads // size)

    def share(self, weights: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
        """A checkpoint's tensors as this rank has them: views, so that of a memory-mapped file only
        these are read. What makes the residual stream is needed whole."""
        rows = ".c_q.weight", ".c_k.weight", ".c_v.weight", ".c_fc.weight", ".ve_gate.weight"
        found = dict(weights)
        for name, weight in weights.items():
            if name == "lm_head.weight":  # without padding; the last rank may have fewer rows
                found[name] = weight[: config.vocab_size].chunk(self.size)[self.rank]
            elif name.endswith(rows):
                found[name] = weight.chunk(self.size)[self.rank]
            elif name.endswith(".c_proj.weight") or name.startswith("value_embeds."):
                found[name] = weight.chunk(self.size, 1)[self.rank]
        return found

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
        """Bytes for each rank's cache: with as many blocks as the others they all plan the same."""
        if self.device.type == "cpu":  # the ranks of one machine share its memory
            free //= int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        found = torch.tensor([free])
        self._together(dist.all_reduce, found, dist.ReduceOp.MIN)
        return int(found)

    def agree(self, what: str, *data) -> None:
        """Raises RuntimeError unless all ranks have the same data (strings, bytes or arrays)."""
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

    def fail(self, error: BaseException) -> None:
        """Let the others, who wait for this rank's part of a step, fail with its error. There is
        no way back to the same step, so they part."""
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
    """A Runner of one of several ranks, which makes sure that all run the same step."""

    ranks: Ranks

    def batch(self, plan: Plan):
        batch = super().batch(plan)
        # a token that one has drawn otherwise is among the ids of its next step
        step = batch.ids, batch.prev_ids, batch.positions, batch.logit_rows, batch.noise
        self.ranks.agree("what they want to compute next", *step)
        return batch


class ParallelLLM(LLM):
    """An engine that may be one of several ranks."""

    ranks: Ranks | None = None

    def _assemble(self, *args, **policies) -> None:
        super()._assemble(*args, **policies)
        if self.ranks:
            self.runner.ranks = self.ranks
            model, blocks, seed = self.model, self.scheduler.blocks, args[-1]
            made = [model.config, model.recipe, model.dtype, seed, self.max_model_len]
            made += [blocks.num_blocks, blocks.block_size, blocks.enable_prefix_caching]
            made += [self.max_batch_size, self.max_batched_tokens, self.prompt_lookup]
            self.ranks.agree("the model or its arguments", repr(made).encode())

    def _free_for_cache(self, block_size: int) -> int:
        free = super()._free_for_cache(block_size)
        return self.ranks.least(free) if self.ranks else free

    def _recover(self, error: BaseException | None = None) -> None:
        if self.ranks and error:
            self.ranks.fail(error)
        super()._recover(error)


PARTS = {"llm": ParallelLLM, "rank": ParallelRunner}
