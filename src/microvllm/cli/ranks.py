"""Run a command that torchrun started on every rank as if it were one process."""

from __future__ import annotations

import argparse
import io
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from ..features import parallel


class SharedInput(io.TextIOBase):
    """Standard input for all ranks: rank 0 reads each line and shares it."""

    def __init__(self, file):
        self.file, self.count = file, 0

    def isatty(self) -> bool:
        return self.file.isatty()

    def readline(self, size: int = -1) -> str:
        self.count += 1
        line = self.file.readline() if dist.get_rank() == 0 else ""
        return shared(f"line {self.count}", line)


def shared(name: str, value: str) -> str:
    """Rank 0's value. The wait has practically no limit: a person may be typing it."""
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        store.set(f"microvllm/{name}", value)
    store.wait([f"microvllm/{name}"], timedelta(days=300))
    return store.get(f"microvllm/{name}").decode()


@contextmanager
def one_voice(args: argparse.Namespace) -> Iterator[None]:
    """Run a command on all ranks as one: rank 0 reads and prints. If ranks fail, the first of them
    prints the error, since all usually fail for the same reason."""
    nowhere = open(os.devnull, "w")
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = sys.stderr = nowhere
    parallel.join_processes(args.tensor_parallel)
    sys.stdin = SharedInput(sys.stdin)
    if getattr(args, "seed", 0) is None:
        args.seed = int(shared("seed", str(random.getrandbits(31))))
    try:
        yield
    except BaseException as error:
        what = f"rank {dist.get_rank()} failed: {type(error).__name__}: {error}"
        sys.stderr = sys.__stderr__ if parallel.first_failure(what) == what else nowhere
        raise
