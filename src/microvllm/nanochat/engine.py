"""nanochat's Engine, on the paged one: a script changes its import and nothing else."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .. import LLM


class Engine:
    """Generates from a live nanochat module, with nanochat's arguments and results.

    model: a GPT module of any era of nanochat, compiled or not, whose weights are shared where
    device and dtype allow it; tokenizer: nanochat's own, or any object with its methods encode,
    decode, encode_special and get_bos_token_id; options: of `LLM`, by default the module's device,
    the dtype in $NANOCHAT_DTYPE, if there is one, and ten times the context (as long as nanochat's
    rotary tables). The seed of a request chooses other tokens than nanochat's does.

    Like nanochat's, this constructor takes no memory: scripts build an Engine before they build an
    optimiser, some without ever generating. `llm`, the LLM underneath, is made at its first use,
    which is also when a module that is no nanochat GPT is refused (TypeError, ValueError).
    """

    def __init__(self, model, tokenizer, **options):
        self.model, self.tokenizer = model, tokenizer
        self._options, self._lock, self._llm = options, Lock(), None

    @property
    def llm(self) -> "LLM":
        """The LLM underneath, with `score`, `chat`, `stats` and all else that it can do."""
        from .. import LLM

        with self._lock:
            if self._llm is None:
                length = getattr(getattr(self.model, "config", None), "sequence_len", 0)
                defaults = {
                    "device": getattr(self.model, "get_device", lambda: "auto")(),
                    "dtype": os.environ.get("NANOCHAT_DTYPE", "auto"),
                    "max_model_len": 10 * length or None,
                }
                options = defaults | self._options
                self._llm = LLM(model=self.model, tokenizer=self.tokenizer, **options)
            return self._llm

    def generate(
        self, tokens, num_samples=1, max_tokens=None, temperature=1.0, top_k=None, seed=42
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yield (tokens, masks) of all samples, a token each, see `LLM.generate_columns`."""
        options = num_samples, max_tokens, temperature, top_k, seed
        return self.llm.generate_columns(tokens, *options)

    async def agenerate(
        self, tokens, num_samples=1, max_tokens=None, temperature=1.0, top_k=None, seed=42
    ) -> AsyncIterator[tuple[list[int], list[int]]]:
        """`generate` for event loops: `async for column, masks in engine.agenerate(...)`. All tasks
        that iterate share the engine's steps. To leave the loop early, or to cancel the task,
        aborts the samples."""
        options = num_samples, max_tokens, temperature, top_k, seed
        llm = await asyncio.to_thread(lambda: self.llm)
        async with aclosing(llm.agenerate_columns(tokens, *options)) as columns:
            async for column in columns:
                yield column

    def warm(self) -> None:
        """Make the LLM underneath, and its kernels, and answer a tiny request: see `LLM.warm`. A
        server calls it before its event loop starts, since the first use takes seconds."""
        self.llm.warm()

    def generate_batch(self, tokens, num_samples=1, **kwargs):
        """(sequences, masks) of a prompt's samples, or of a list of prompts, see
        `LLM.generate_batch`."""
        return self.llm.generate_batch(tokens, num_samples, **kwargs)
