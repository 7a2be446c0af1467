"""A progress bar while `generate` works."""

import time
from collections import deque
from collections.abc import Iterator

from ..engine import LLM, Request


class ProgressLLM(LLM):
    """An engine that shows how far it is, on a terminal."""

    def _steps(self, requests: list[Request], use_tqdm=False) -> Iterator[deque[Request]]:
        from tqdm import tqdm

        began, before = time.perf_counter(), self.scheduler.num_tokens
        hidden = None if use_tqdm else True  # None: shown on a terminal only
        with tqdm(total=len(requests), desc="generating", unit="prompt", disable=hidden) as bar:
            for pending in super()._steps(requests):
                if not bar.disable:
                    rate = (self.scheduler.num_tokens - before) / (time.perf_counter() - began)
                    bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
                    bar.update(sum(r.output is not None for r in requests) - bar.n)
                yield pending


PARTS = {"llm": ProgressLLM}
