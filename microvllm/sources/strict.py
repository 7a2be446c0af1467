"""Checkpoints and tokenizers read strictly: files may be hostile, and a mistake has a name.

The core's own readers refuse what is not whole, in few words. These check more before anything is
computed (compressed records, tensors that claim more than the file has, layouts of nanochat's
experiments, patterns that lose text) and say which key, which tensor, which value is wrong.
"""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import empty_model, recognise
from ..model import GPTConfig, Recipe
from ..tokenizer import Tokenizer, load_tokenizer

# the largest that anyone needs, the tokenizer.json of a large vocabulary, takes about 30 MB
_MAX_JSON_BYTES = 256 * 1024 * 1024
# nanochat's own vocabularies (65,536 tokens at most) take about 1 MB
_MAX_TOKENIZER_BYTES = 8 * 1024 * 1024
# so many blanks in a row, and tiktoken's pattern gives up, but not without a word on stderr
_MAX_BLANKS = 999_000

# layouts that existed for days on branches of nanochat; named so that the refusal says what it saw
_UNSUPPORTED = {
    "v0_lambdas": "an experiment of 2026-01-16 with v0_lambdas (ungated value embeddings)",
    "bigram_lambdas": "the hashed bigram embeddings (engram) of 2026-01-25 to 01-28",
    ".moe.": "a mixture of experts (branch moe)",
    ".mlp.router.": "a mixture of experts (branch moe3)",
    ".mlp.experts.": "a mixture of experts (branch moe3)",
    ".mlp.shared_expert.": "a mixture of experts (branch moe3)",
}


def read_checkpoint(directory: Path, step: int) -> tuple[GPTConfig, Recipe, dict[str, Tensor]]:
    """Config, recipe and weights (memory-mapped) of a step that `find_step` found, of any era.

    Raises ValueError naming the file and what is wrong with it.
    """
    meta_file = directory / f"meta_{step:06d}.json"
    meta = read_json(meta_file)
    if "model_config" not in meta:
        raise ValueError(f"{meta_file} has no model_config")
    config = make_config(meta["model_config"], str(meta_file))
    file = directory / f"model_{step:06d}.pt"
    weights = read_weights(file)
    return config, recognise_strictly(weights, config, file), weights


def read_json(file: Path) -> dict:
    """The JSON object in a file. Raises ValueError naming the file."""
    if (size := file.stat().st_size) > _MAX_JSON_BYTES:
        raise ValueError(f"{file} is not valid JSON for us: {size:,} bytes are far too many")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object: {found!r:.80}")
    return found


def make_config(model_config: object, source: str = "model_config") -> GPTConfig:
    """The config of a meta file's dict. Raises ValueError naming the source, the key and its
    value."""
    if not isinstance(model_config, dict):
        raise ValueError(f"{source}: model_config must be a JSON object, got {model_config!r:.80}")
    given = dict(model_config)
    if given.get("num_experts", 0) == 0:  # a dense model of the mixture-of-experts branch
        given = {k: v for k, v in given.items() if k not in ("num_experts", "top_k")}
    names = [field.name for field in fields(GPTConfig)]
    sizes = [name for name in names if name != "window_pattern"]
    if unknown := sorted(set(given) - set(names)):
        raise ValueError(f"{source}: model_config has keys this engine does not know: {unknown}")
    if missing := [name for name in sizes if name not in given]:
        raise ValueError(f"{source}: model_config lacks {missing}")
    for name in sizes:
        value = given[name]
        if type(value) is not int or not 0 < value < 2**31:
            raise ValueError(f"{source}: {name} must be a positive integer, got {value!r}")
    pattern = given.get("window_pattern") or "L"
    if not isinstance(pattern, str) or set(pattern.upper()) - set("SL"):
        raise ValueError(f"{source}: window_pattern must be letters S and L, got {pattern!r:.80}")
    width, heads, kv_heads = given["n_embd"], given["n_head"], given["n_kv_head"]
    if width % (2 * heads):
        raise ValueError(f"{source}: n_embd {width} does not split into {heads} even heads")
    if heads % kv_heads:
        raise ValueError(f"{source}: {heads} query heads do not share {kv_heads} kv heads")
    return GPTConfig.from_meta(given)


def read_weights(file: Path) -> dict[str, Tensor]:
    """The state dict of a .pt file, memory-mapped; only tensors are ever built from it
    (weights_only)."""
    try:
        if zipped := zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if any(record.compress_type for record in archive.infolist()):
                    raise ValueError("its records are compressed, and may have any size")
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises a different type for every way a file can be broken
        asked = re.search(r"GLOBAL (\S+)", str(error))
        # only its first sentence: the rest is advice to trust the file
        why = f"it asks for {asked[1]}, nothing of it was run" if asked else str(error)
        raise ValueError(
            f"{file} is not a readable checkpoint (truncated, or no state dict of tensors): "
            f"{why.splitlines()[0].split('. ')[0] if why else type(error).__name__:.200}"
        ) from None
    if not isinstance(weights, dict) or not all(
        isinstance(k, str) and isinstance(w, Tensor) for k, w in weights.items()
    ):
        raise ValueError(f"{file} holds no state dict (names and tensors)")
    return without_prefix(weights, file)


def without_prefix(weights: dict[str, Tensor], source) -> dict[str, Tensor]:
    """A compiled module's weights under their plain names; all have its prefix, or none has."""
    prefix = "_orig_mod."
    if len({key.startswith(prefix) for key in weights}) > 1:
        raise ValueError(f"{source}: some names begin with {prefix} and others do not")
    return {key.removeprefix(prefix): weight for key, weight in weights.items()}


def recognise_strictly(weights: dict[str, Tensor], config: GPTConfig, source) -> Recipe:
    """The recipe of a state dict that is complete and has nothing else. Raises ValueError naming
    the source, and what there is of a layout that no released nanochat had."""
    try:
        for key in weights:
            for mark, what in _UNSUPPORTED.items():
                if mark in f".{key}." or key == mark:
                    raise ValueError(f"unsupported checkpoint: {key!r} belongs to {what}")
        recipe = recognise(weights)
        check_weights(weights, config, recipe)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return recipe


def check_weights(weights: dict[str, Tensor], config: GPTConfig, recipe: Recipe) -> None:
    """Strict: no missing, no extra, no misshapen tensor. Raises ValueError naming them."""
    if config.n_layer > len(weights):  # a million layers would take a while to list
        raise ValueError(f"n_layer is {config.n_layer}, but there are {len(weights)} tensors")
    wte = weights.get("transformer.wte.weight")
    rows = wte.shape[0] if wte is not None and wte.ndim == 2 else config.vocab_size
    if rows < config.vocab_size:
        raise ValueError(f"the embedding has {rows} rows, but vocab_size is {config.vocab_size}")
    model = empty_model(config, recipe, rows)
    expected = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    there = {name: weights[name] for name in expected if name in weights}
    problems = {
        "missing": [k for k in expected if k not in weights],
        "unexpected": [k for k in weights if k not in expected],
        "misshapen": [
            f"{k} is {tuple(w.shape)}, not {expected[k]}"
            for k, w in there.items()
            if tuple(w.shape) != expected[k]
        ],
        "not floating point": [k for k, w in there.items() if not w.is_floating_point()],
        # a sparse one, one on the device "meta", or one number that claims to be a whole matrix
        "not stored in full": [
            k
            for k, w in weights.items()
            if w.layout != torch.strided
            or w.is_meta
            or w.untyped_storage().nbytes() < w.numel() * w.itemsize
        ],
    }
    found = [
        f"{len(v)} {what} ({', '.join(v[:3])}{' ...' * (len(v) > 3)})"
        for what, v in problems.items()
        if v
    ]
    if found:
        raise ValueError(f"not a complete checkpoint of era {recipe.era}: " + "; ".join(found))


def open_tokenizer(path: Path) -> Tokenizer:
    """nanochat's tokenizer.pkl, of a reasonable size; path: that file or the directory it is in.
    Raises ValueError or FileNotFoundError, see `load_tokenizer`."""
    file = path / "tokenizer.pkl" if path.is_dir() else path
    if file.is_file() and (size := file.stat().st_size) > _MAX_TOKENIZER_BYTES:
        raise ValueError(f"{file} is not a nanochat tokenizer: {size:,} bytes are far too many")
    return load_tokenizer(file, StrictTokenizer)


class StrictTokenizer(Tokenizer):
    """A Tokenizer of a vocabulary and a pattern that were checked. Raises ValueError saying what is
    wrong with them."""

    def __init__(self, name: str, pat_str: str, mergeable_ranks: dict, special_tokens: dict):
        _check_table("mergeable_ranks", mergeable_ranks, bytes, 0)
        _check_table("special_tokens", special_tokens, str, len(mergeable_ranks))
        if missing := [byte for byte in range(256) if bytes([byte]) not in mergeable_ranks]:
            raise ValueError(f"mergeable_ranks has no token for the single byte {missing[0]}")
        if "<|bos|>" not in special_tokens:
            raise ValueError("it has no <|bos|> token, with which every nanochat sequence starts")
        if not (isinstance(name, str) and isinstance(pat_str, str)):
            raise ValueError("name and pat_str must be strings")
        super().__init__(name, pat_str, mergeable_ranks, special_tokens)
        # a pattern may be well formed and still skip some characters, or match nothing at all
        probe = "Every 1 of these, isn't it?\n\n\té\u3000\u200b\x00 "
        if self.decode(self.encode(probe)) != probe:
            raise ValueError(f"pat_str loses text: {pat_str!r:.200}")

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of `text`, see Tokenizer.encode. Raises ValueError for a million blanks in a row."""
        if isinstance(text, str) and len(text) >= _MAX_BLANKS:
            if max(map(len, re.findall(r"[^\S\r\n]+", text)), default=0) >= _MAX_BLANKS:
                raise ValueError(
                    f"text of {len(text):,} characters cannot be split: it has {_MAX_BLANKS:,} "
                    "blanks in a row"
                )
        return super().encode(text, bos)


def _check_table(what: str, table: dict, key_type: type, first: int) -> None:
    """A table must give its keys the ids first, first + 1, ... each once: ids index arrays."""
    if not isinstance(table, dict):
        raise ValueError(f"{what} is {type(table).__name__} where a dict was expected")
    if not all(type(key) is key_type and type(id_) is int for key, id_ in table.items()):
        raise ValueError(f"{what} must map {key_type.__name__} to int")
    if sorted(table.values()) != list(range(first, first + len(table))):
        raise ValueError(f"{what} must use each id from {first} to {first + len(table) - 1} once")
