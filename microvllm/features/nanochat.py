"""What nanochat's own Engine does, under its names."""

import numpy as np

from ..engine import LLM


class NanochatLLM(LLM):
    """An engine with nanochat's `generate_batch`."""

    def generate_batch(
        self, tokens, num_samples=1, max_tokens=None, temperature=1.0, top_k=None, seed=42, **more
    ):
        """What nanochat's Engine.generate_batch does: (sequences, masks) of a prompt's token ids.

        A sequence is prompt plus output without the end token; its mask is 0 for the prompt and for
        tokens the calculator forced. A list of prompts gives (list of sequences, list of masks)
        with one list of num_samples each; prompt i is drawn with seed + i. max_tokens None: as many
        as the context has room for; `more` goes to SamplingParams.
        """
        listed = isinstance(tokens, (list, tuple)) and len(tokens) > 0
        several = listed and not isinstance(tokens[0], (int, np.integer))
        prompts = tokens if several else [tokens]
        max_tokens = self.max_model_len if max_tokens is None else max_tokens
        more |= {"temperature": temperature, "max_tokens": max_tokens, "top_k": top_k}
        params = [
            self.params_class(n=num_samples, seed=seed + i, **more) for i in range(len(prompts))
        ]
        tools = {"tools": True} if "tools" in self.request_options else {}
        sequences, masks = [], []
        for output in self.generate(prompts, params, use_tqdm=False, **tools):
            prompt = output["prompt_token_ids"]
            sequences.append([])
            masks.append([])
            for sample in output["samples"]:
                ids = sample["token_ids"]
                mask = sample.get("mask", [1] * len(ids))
                stop = -1 if sample["finish_reason"] == "stop" else None  # without the end token
                sequences[-1].append(prompt + ids[:stop])
                masks[-1].append([0] * len(prompt) + mask[:stop])
        return (sequences, masks) if several else (sequences[0], masks[0])


PARTS = {"llm": NanochatLLM}
