"""A progress bar while `generate` works."""

from __future__ import annotations

import time

from ..engine import LLM, Request


class ProgressLLM(LLM):
    """An engine that shows how far it is, on a terminal."""

    def _run(self, requests: list[Request], use_tqdm: bool = False, progress=None) -> None:
        from tqdm import tqdm

        began, before = time.perf_counter(), self._stats["output_tokens"]
        hidden = None if use_tqdm else True  # None: shown on a terminal only
        with tqdm(total=len(requests), desc="generating", unit="prompt", disable=hidden) as bar:

            def show() -> None:
                rate = (self._stats["output_tokens"] - before) / (time.perf_counter() - began)
                bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
                bar.update(sum(r.output is not None for r in requests) - bar.n)

            super()._run(requests, use_tqdm, None if bar.disable else show)


PARTS = {"llm": ProgressLLM}
