"""What nanochat's own Engine does, under its names."""

from __future__ import annotations

import numpy as np

from ..engine import LLM


class NanochatLLM(LLM):
    """An engine with nanochat's `generate_batch`."""

    def generate_batch(
        self, tokens, num_samples=1, max_tokens=None, temperature=1.0, top_k=None, seed=42, **more
    ):
        """What nanochat's Engine.generate_batch does: (sequences, masks) of one prompt of token
        ids.

        A sequence is prompt plus output without the end token; its mask is 0 for the prompt and for
        tokens the calculator forced. A list of prompts gives (list of sequences, list of masks)
        with one list of num_samples each; prompt i is drawn with seed + i. max_tokens None: as many
        as the context has room for; `more` goes to SamplingParams.
        """
        listed = isinstance(tokens, (list, tuple)) and len(tokens) > 0
        several = listed and not isinstance(tokens[0], (int, np.integer))
        prompts = tokens if several else [tokens]
        params = [
            self.parts.params(
                temperature=temperature,
                max_tokens=self.max_model_len if max_tokens is None else max_tokens,
                top_k=top_k,
                n=num_samples,
                seed=seed + i,
                **more,
            )
            for i in range(len(prompts))
        ]
        tools = {"tools": True} if "tools" in self.request_options else {}
        sequences, masks = [], []
        for output in self.generate(prompts, params, use_tqdm=False, **tools):
            prompt = output["prompt_token_ids"]
            # without the end token, if there is one
            parts = [(s, -1 if s["finish_reason"] == "stop" else None) for s in output["samples"]]
            sequences.append([prompt + s["token_ids"][:stop] for s, stop in parts])
            ones = [s.get("mask", [1] * len(s["token_ids"])) for s, _ in parts]
            masks.append(
                [[0] * len(prompt) + m[:stop] for m, (_, stop) in zip(ones, parts, strict=True)]
            )
        return (sequences, masks) if several else (sequences[0], masks[0])


PARTS = {"llm": NanochatLLM}
