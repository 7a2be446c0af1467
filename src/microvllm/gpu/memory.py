"""How much of a GPU's memory the cache may take."""

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch

from ..engine import LLM, Request, make_batch
from ..environment import free_memory
from ..scheduler import Plan


@contextmanager
def fits(what: str, device: torch.device) -> Iterator[None]:
    """Raises ValueError with the numbers if there is no memory for what is made inside."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise ValueError(
            f"no memory for {what}: {free_memory(device):,} bytes are free on {device}; lower "
            "max_batched_tokens or num_blocks, or use a smaller model"
        ) from None


class GpuMemory(LLM):
    """An LLM that measures what steps take on a GPU, and gives the cache a share of the rest."""

    gpu_memory_utilization = 0.9  # of what is free

    def _free_for_cache(self, block_size: int) -> int:
        """Bytes: the largest step is run once to see what activations take."""
        if self.device.type != "cuda":
            return super()._free_for_cache(block_size)
        self.model.init_rotary(min(self.max_model_len, self.max_batched_tokens + 1))
        taken = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        with fits(f"steps of max_batched_tokens={self.max_batched_tokens}", self.device):
            self._warm_up(block_size)
        activations = torch.cuda.max_memory_allocated(self.device) - taken
        torch.cuda.empty_cache()
        # twice: the memory of the recorded steps is their own
        return int(free_memory(self.device) * self.gpu_memory_utilization) - 2 * activations

    @torch.inference_mode()
    def _warm_up(self, block_size: int) -> None:
        """Run a short prompt and the largest step on a cache of the sink alone, and draw for full
        batches, without filters and with all: what a first request compiles is compiled then."""
        wanted = {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1, "logprobs": 20}
        known = {field.name for field in fields(self.params_class)}
        all_on = self.params_class(seed=0, **{k: v for k, v in wanted.items() if k in known})
        cache, blocks = self._make_memory(1, block_size)
        runner = self.runner_class(self.model, cache, blocks)
        full, rest = divmod(self.max_batched_tokens, self.max_model_len - 1)
        longest = ([rest] * (rest > 0) + [self.max_model_len - 1] * full)[-self.max_batch_size :]
        # a short prompt has a kernel of its own
        for lengths, params in ([2], self.params_class(seed=0)), (longest, all_on):
            chunks = []
            for i, n in enumerate(lengths):
                seq = self._make_sequence(Request(i, [0] * n, params, False, None, {}))
                seq.table = array("i", [0] * blocks.blocks_for(n))
                chunks.append((seq, 0, n))
            samples = [(0, chunks[0][0], lengths[0])] * self.max_batch_size
            plan = Plan(chunks, samples, [])
            batch = runner.upload(make_batch(plan, blocks))
            logits = self.model.logits(runner.forward(batch))
            runner.pick(plan, logits, batch.temperature, batch.noise)


PARTS = {"llm": GpuMemory}
