"""Tensor parallel: several processes (ranks) share a model.

Each rank has a share of the heads, of the MLP's channels and of the vocabulary. All ranks run the
same scheduler on the same requests, so they plan the same steps. Ranks exchange two sums per layer
and the logits (Shoeybi et al. 2019, Megatron-LM). Then all ranks draw from identical logits with
the same uniform numbers.

    rank 0   plan | heads 0, 1 | sum | half of the MLP | sum | ... | half of the logits | gather
    rank 1   plan | heads 2, 3 | sum | half of the MLP | sum | ... | half of the logits | gather
"""

import atexit
import os
from array import array
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
import xxhash
from torch import Tensor

from ..devices import find_device
from ..engine import LLM
from ..model import GPTConfig
from ..runner import Extension
from ..scheduler import Plan
from .threads import ThreadGuard

# matrices whose rows are divided among ranks (heads, MLP channels); of others, columns are divided
ROW_SHARED = (".c_q.weight", ".c_k.weight", ".c_v.weight", ".c_fc.weight", ".ve_gate.weight")


def join_processes(size: int) -> None:
    """Connect to the other processes of torchrun, unless the program has done so. Raises ValueError
    if their number is not `size`."""
    if not dist.is_available():
        raise ValueError("tensor_parallel needs a torch with torch.distributed, which is missing")
    is_joined = dist.is_initialized()
    if is_joined:
        num_processes = dist.get_world_size()
    else:
        num_processes = int(os.environ.get("WORLD_SIZE", 1))
    if num_processes != size:
        raise ValueError(
            f"tensor_parallel={size} needs {size} processes, not {num_processes}: start the "
            f"program with torchrun --standalone --nproc-per-node {size}"
        )
    if not is_joined:
        dist.init_process_group(pick_library())
        atexit.register(leave_processes)


def leave_processes() -> None:
    """Close the connections: otherwise gloo's threads abort the process when it exits. After a
    failure NCCL's connections are not closed, since that could wait for a process that has
    ended."""
    has_failed = torch.cuda.is_initialized() and first_failure("")
    if dist.is_initialized() and not has_failed:
        dist.destroy_process_group()


def pick_library() -> str:
    """Return the libraries that exchange tensors between processes."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def first_failure(failure: str) -> str:
    """Return the first failure on any rank, which is `failure` if there was none before."""
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.compare_set("microvllm/failure", "", failure).decode()
    except (RuntimeError, ValueError):  # the store has ended with its rank
        return failure


class Ranks:
    """The ranks of one model, including this one. size: their number; device: this rank's; "auto"
    and "cuda" mean the GPU with the rank's local number. Raises ValueError like `join_processes`
    and `find_device`."""

    def __init__(self, size: int, device="auto"):
        join_processes(size)
        self.size = size
        self.rank = dist.get_rank()
        if str(device) in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}"
        self.device = find_device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # NCCL uses the current device of the process
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"tensor_parallel runs on cpu or cuda, but device is {self.device}")
        self.peers = dist.new_group(backend=pick_library())

    def check(self, quantization: str | None, deterministic: bool) -> None:
        """Raise ValueError for options that ranks do not support."""
        if quantization == "fp8" or (deterministic and self.size > 2):
            raise ValueError(
                "tensor_parallel does not support quantization='fp8', and deterministic=True only "
                "for 2 processes: the order of larger sums depends on the batch"
            )

    # this rank's share

    def local(self, config: GPTConfig) -> GPTConfig:
        """Return the config of one rank's attention, which is that of a narrower model. Raises
        ValueError if the kv heads, each with its query heads, cannot be divided."""
        num_kv_heads = config.n_kv_head
        if num_kv_heads % self.size:
            divisors = [str(n) for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0]
            raise ValueError(
                f"tensor_parallel={self.size} does not divide the model's {num_kv_heads} kv heads "
                f"(of {config.n_head} query heads): it can be {' or '.join(divisors)}"
            )
        return replace(
            config,
            n_embd=config.n_embd // self.size,
            n_head=config.n_head // self.size,
            n_kv_head=num_kv_heads // self.size,
        )

    def share(self, weights: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
        """Return this rank's part of a checkpoint's tensors. They are views, so only these parts of
        a memory-mapped file are read. Tensors of the residual stream are not divided."""
        shared = dict(weights)
        for name, weight in weights.items():
            if name == "lm_head.weight":  # without padding; the last rank may have fewer rows
                shared[name] = weight[: config.vocab_size].chunk(self.size)[self.rank]
            elif name.endswith(ROW_SHARED):
                shared[name] = weight.chunk(self.size)[self.rank]
            elif name.endswith(".c_proj.weight") or name.startswith("value_embeds."):
                shared[name] = weight.chunk(self.size, dim=1)[self.rank]
        return shared

    def complete(self, name: str, product: Callable, config: GPTConfig) -> Callable:
        """Return a product with a matrix of `share` that combines the results of all ranks."""
        if name.endswith(".c_proj"):
            return lambda x: self.sum(product(x))
        if name == "lm_head":
            width = -(-config.vocab_size // self.size)
            return lambda x: self.gather(product(x), width)[:, : config.vocab_size]
        return product

    # communication

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of all ranks' x, in place, with the same bits on all ranks."""
        x = x.contiguous()
        self.run_together(dist.all_reduce, x)
        return x

    def gather(self, x: Tensor, width: int) -> Tensor:
        """Return all ranks' x (R, at most width), padded to the width, side by side: (R, size *
        width)."""
        x = F.pad(x, (0, width - x.shape[1])).contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self.run_together(dist.all_gather, parts, x)
        return torch.cat(parts, dim=1)

    def least(self, num_bytes: int) -> int:
        """Return the bytes for each rank's cache: the least of all ranks, since equal numbers of
        blocks lead to equal plans. num_bytes: what this rank could allocate."""
        if self.device.type == "cpu":  # the ranks of one machine share its memory
            num_bytes //= int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        smallest = torch.tensor([num_bytes])
        self.run_together(dist.all_reduce, smallest, dist.ReduceOp.MIN)
        return int(smallest)

    def agree(self, subject: str, *data) -> None:
        """Raise RuntimeError unless all ranks have the same data (bytes or arrays). subject: what
        differs, for the message."""
        digest = xxhash.xxh3_64()
        for item in data:
            digest.update(item)
        own_digest = torch.tensor([digest.intdigest() >> 1])
        digests = [torch.empty_like(own_digest) for _ in range(self.size)]
        self.run_together(dist.all_gather, digests, own_digest)
        others = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if others:
            raise RuntimeError(
                f"tensor parallel: rank 0 and rank {others[0]} differ in {subject}. All ranks must "
                "get the same requests in the same order, and the caller's functions and calls "
                "(logits_processor, policies, abort) must not depend on a clock or on unseeded "
                "random numbers"
            )

    def fail(self, error: BaseException) -> None:
        """Report an error of this rank, so that the others, which wait for its part of the step,
        fail with it. The ranks cannot return to a common step, so they disconnect."""
        first_failure(f"rank {self.rank} failed: {type(error).__name__}: {error}")
        peers = self.peers
        self.peers = None
        # NCCL's connections end with the process, and torchrun notices it
        if peers is not None and self.device.type == "cpu":
            dist.destroy_process_group(peers)

    def run_together(self, collective: Callable, *args) -> None:
        """Call a collective function of torch.distributed on all ranks. Raises RuntimeError with
        the first failure of any rank."""
        if self.peers is None:
            raise RuntimeError("tensor parallel: the ranks disconnected after an error: restart")
        try:
            collective(*args, group=self.peers)
        except RuntimeError as error:
            first_line = str(error).splitlines()[0]
            failure = first_failure(f"another rank is gone ({first_line:.200})")
            raise RuntimeError(f"tensor parallel: {failure}") from None


class RankCheck(Extension):
    """Checks that all ranks have the same engine and run the same steps. It is the last extension,
    since others may change a plan. arguments: arguments of the engine that its config does
    not contain."""

    def __init__(self, ranks: Ranks, *arguments):
        self.ranks = ranks
        self.arguments = arguments

    def attach(self, engine: LLM) -> None:
        super().attach(engine)
        config = engine.config
        parts = [
            engine.model.config,
            engine.model.recipe,
            engine.model.dtype,
            engine.scheduler.blocks.num_blocks,
            config.block_size,
            config.enable_prefix_caching,
            config.max_batch_size,
            config.max_batched_tokens,
            config.max_model_len,
            config.seed,
            *self.arguments,
        ]
        self.ranks.agree("the model or its arguments", repr(parts).encode())

    def on_plan(self, plan: Plan) -> None:
        """A token that a rank drew differently shows in the tokens of its next step."""
        if not plan.chunks:
            return
        tokens = array("q")
        for seq, start, stop, draft in plan.chunks:
            tokens.extend((start, stop))
            tokens.extend(seq.token_ids[start:stop])
            tokens.extend(draft)
        draws = array("Q")
        for chunk, seq, position, _ in plan.draws:
            draws.extend((chunk, position, seq.seed))
        self.ranks.agree("what they want to compute next", tokens, draws)


class RankGuard(ThreadGuard):
    """A guard that reports an exception to the other ranks."""

    def __init__(
        self,
        recover: Callable[[], None],
        context: Callable[[], AbstractContextManager] = nullcontext,
        *,
        ranks: Ranks,
    ):
        super().__init__(recover, context)
        self.ranks = ranks

    def recover_from(self, error: BaseException) -> None:
        self.ranks.fail(error)
        super().recover_from(error)
