"""nanochat's Engine, on the paged one: a script changes its import and nothing else."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .. import LLM

CONTEXTS = 10  # max_model_len in contexts of the training, as long as nanochat's rotary tables


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
        self.model = model
        self.tokenizer = tokenizer
        self._options = options
        self._lock = Lock()
        self._llm: LLM | None = None

    @property
    def llm(self) -> LLM:
        """The LLM underneath, with `score`, `chat`, `stats` and all else that it can do."""
        from .. import LLM

        with self._lock:
            if self._llm is None:
                options = self._default_options() | self._options
                self._llm = LLM(model=self.model, tokenizer=self.tokenizer, **options)
            return self._llm

    def _default_options(self) -> dict:
        """Arguments of LLM. A module that lacks an attribute is refused by LLM, with the reason."""
        config = getattr(self.model, "config", None)
        get_device = getattr(self.model, "get_device", lambda: "auto")
        return {
            "device": get_device(),
            "dtype": os.environ.get("NANOCHAT_DTYPE", "auto"),
            "max_model_len": CONTEXTS * getattr(config, "sequence_len", 0) or None,
        }

    def generate(
        self,
        tokens,
        num_samples=1,
        max_tokens=None,
        temperature=1.0,
        top_k=None,
        seed=42,
        tools=True,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yield (tokens, masks) of all samples, a token each, see `LLM.generate_columns`. tools:
        True, the calculator, False, or a list of tools (features/tools.py)."""
        return self.llm.generate_columns(
            tokens,
            num_samples=num_samples,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            tools=tools,
        )

    async def agenerate(
        self,
        tokens,
        num_samples=1,
        max_tokens=None,
        temperature=1.0,
        top_k=None,
        seed=42,
        tools=True,
    ) -> AsyncIterator[tuple[list[int], list[int]]]:
        """`generate` for event loops: `async for column, masks in engine.agenerate(...)`. All tasks
        that iterate share the engine's steps. Leaving the loop early, or cancelling the task,
        aborts the samples."""
        llm = await asyncio.to_thread(lambda: self.llm)
        all_columns = llm.agenerate_columns(
            tokens,
            num_samples=num_samples,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            tools=tools,
        )
        async with aclosing(all_columns) as columns:
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
