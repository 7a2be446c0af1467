"""nanochat's Engine on top of LLM, so that a script changes only its import."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .. import LLM

CONTEXTS = 10  # max_model_len in training contexts: the length of nanochat's rotary tables


class Engine:
    """Generates from a live nanochat module, with nanochat's arguments and results.

    model: a GPT module of any nanochat era, compiled or not; its weights are shared if device and
    dtype allow it; tokenizer: nanochat's, or any object with its methods encode, decode,
    encode_special and get_bos_token_id; options: arguments of `LLM`. Defaults: the module's device,
    the dtype in $NANOCHAT_DTYPE if set, and ten times the context (as long as nanochat's rotary
    tables). A seed gives other tokens than in nanochat.

    As in nanochat, this constructor allocates no memory: scripts build an Engine before an
    optimiser, and some never generate. The LLM (`llm`) is made at its first use. A module that is
    not a nanochat GPT raises an error then (TypeError, ValueError).
    """

    def __init__(self, model, tokenizer, **options):
        self.model = model
        self.tokenizer = tokenizer
        self._options = options
        self._lock = Lock()
        self._llm: LLM | None = None

    @property
    def llm(self) -> LLM:
        """The underlying LLM, with `score`, `chat`, `stats` and its other methods."""
        from .. import LLM

        with self._lock:
            if self._llm is None:
                options = self._default_options() | self._options
                self._llm = LLM(model=self.model, tokenizer=self.tokenizer, **options)
            return self._llm

    def _default_options(self) -> dict:
        """Return arguments of LLM. If the module lacks an attribute, LLM raises an error for it."""
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
        """Yield (tokens, masks) with one token of every sample, see `LLM.generate_columns`. tools:
        True for the calculator, False, or a list of tools (features/tools.py)."""
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
        share the engine's steps. Leaving the loop early, or cancelling the task, aborts the
        samples."""
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
        """Create the LLM and its kernels, and answer a tiny request: see `LLM.warm`. A server calls
        it before its event loop starts, since the first use takes seconds."""
        self.llm.warm()

    def generate_batch(self, tokens, num_samples=1, **kwargs):
        """Return (sequences, masks) of a prompt's samples, or of a list of prompts, see
        `LLM.generate_batch`."""
        return self.llm.generate_batch(tokens, num_samples, **kwargs)
