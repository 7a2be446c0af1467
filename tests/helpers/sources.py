"""Models of other formats and live modules: their logits, tokenizer.json, a module's stand-in."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from microvllm.attention import PagedKVCache
from microvllm.sampler import cap_logits
from microvllm.tokenizer import load_tokenizer

from .batches import hand_made_batch
from .goldens import ERAS


def logits_of(model, ids: list[int]) -> np.ndarray:
    """(T, V) logits at every position of a prompt, computed in one step."""
    count = -(-len(ids) // 16)
    cache = PagedKVCache(model.config, 1 + count, 16, model.dtype, "cpu")
    batch = hand_made_batch([(ids, 0, len(ids), range(1, 1 + count))], 16)
    with torch.inference_mode():
        logits = model.logits(model.forward(batch, cache))
    return cap_logits(logits, model.recipe.softcap).numpy()


def spell() -> dict[int, str]:
    """byte -> character, as GPT-2's vocabulary writes it: a space is U+0120, a newline U+010A."""
    kept = [b for b in range(256) if chr(b).isprintable() and chr(b) != " " and b != 0xAD]
    rest = [b for b in range(256) if b not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(rest)}


def tokenizer_json(file: Path, every_split: bool = True, **changes) -> Path:
    """The toy tokenizer as `tokenizers` would save it: with every split of a token as a merge, as
    converters write them, or with one for each token, as trainers do."""
    toy = load_tokenizer(ERAS / "tokenizer")._encoding
    ranks, letters = toy._mergeable_ranks, spell()
    assert (letters[ord(" ")], letters[ord("\n")], letters[0xFF]) == ("Ġ", "Ċ", "ÿ")

    def spelt(token: bytes) -> str:
        return "".join(letters[b] for b in token)

    merges = []
    for token in sorted(ranks, key=ranks.get):
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        splits = [[spelt(a), spelt(b)] for a, b in splits if a in ranks and b in ranks]
        assert splits or len(token) == 1
        merges += splits if every_split else [" ".join(pair) for pair in splits[-1:]]
    split = {"type": "Split", "pattern": {"Regex": toy._pat_str}}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    written = {
        "version": "1.0",
        "added_tokens": [
            {"id": id_, "content": name, "special": True}
            for name, id_ in toy._special_tokens.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                split | {"behavior": "Isolated", "invert": False},
                level | {"use_regex": False},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": {spelt(token): id_ for token, id_ in ranks.items()},
            "merges": merges,
        },
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(written | changes), encoding="utf-8")
    return file


class Live(torch.nn.Module):
    """A module with the parameters of a state dict and the config of a nanochat GPT."""

    def __init__(self, config: object, weights: dict):
        super().__init__()
        self.config = config
        for name, weight in weights.items():
            *path, leaf = name.split(".")
            node = self
            for part in path:
                if part not in node._modules:
                    node.add_module(part, torch.nn.Module())
                node = node._modules[part]
            node.register_parameter(leaf, torch.nn.Parameter(weight.clone()))


def live(era, **changes) -> Live:
    step = era.json["checkpoint"]["step"]
    weights = torch.load(era.directory / f"model_{step:06d}.pt")
    meta = json.loads((era.directory / f"meta_{step:06d}.json").read_text())
    return Live(SimpleNamespace(**(meta["model_config"] | changes)), weights)
