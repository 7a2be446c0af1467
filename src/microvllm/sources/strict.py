"""Reads checkpoints and tokenizers strictly, since files may be hostile, with precise errors.

The core's readers reject incomplete files with short messages. These readers check more before
anything is computed: compressed records, tensors that claim more than the file has, layouts of
nanochat's experiments, and patterns that lose text. Errors name the key, the tensor and the value.
"""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import empty_model, recognise
from ..model import GPTConfig, Recipe
from ..tokenizer import Tokenizer, load_tokenizer, turns_of
from . import variants
from .pt import read_pt

FLOATS = torch.float64, torch.float32, torch.float16, torch.bfloat16  # dtypes of weights
_MAX_JSON_BYTES = 16 << 20  # nanochat's largest tokenizer.json: 5 MB, and 20 times that in memory
_MAX_TOKENIZER_BYTES = 8 << 20  # nanochat's vocabularies (up to 65,536 tokens) take about 1 MB
_MAX_NAMES = 1 << 16  # total length of special tokens' names: tiktoken takes 400 bytes a character
# nanochat's pattern, whose time is linear in the text. Numbers are split into groups of one to nine
# digits, in most versions up to two
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
PATTERNS = {PATTERN.replace("1,2", f"1,{most}") for most in range(1, 10)}
_MAX_BLANKS = 999_000  # in a row; beyond it tiktoken's pattern fails and prints to stderr

# the most important constants that differ between eras 1 to 5
_TELLING = "qk_scale", "rope_base", "short_window"

# layouts that existed for days on branches of nanochat, named so that the error can identify them
_UNSUPPORTED = {
    r"v0_lambdas": "an experiment of 2026-01-16 with v0_lambdas (ungated value embeddings)",
    r"bigram_lambdas": "the hashed bigram embeddings (engram) of 2026-01-25 to 01-28",
    r"\.moe\.": "a mixture of experts (branch moe)",
    r"\.mlp\.(router|experts|shared_expert)\.": "a mixture of experts (branch moe3)",
}


Checkpoint = tuple[GPTConfig, Recipe, dict[str, Tensor]]  # the weights are memory-mapped


def read_checkpoint(directory: Path, step: int) -> Checkpoint:
    """Read a step that `find_step` returned, of any era. Raises ValueError that names the file and
    the problem."""
    meta_file = directory / f"meta_{step:06d}.json"
    meta = read_json(meta_file)
    if "model_config" not in meta:
        raise ValueError(f"{meta_file} has no model_config")
    config = make_config(meta["model_config"], str(meta_file))
    file = directory / f"model_{step:06d}.pt"
    weights = read_weights(file)
    source = f"{file} (with {meta_file.name})"
    return config, recognise_strictly(weights, config, source, meta["model_config"]), weights


def read_json(file: Path) -> dict:
    """Return the JSON object in a file. Raises ValueError that names the file."""
    if (size := file.stat().st_size) > _MAX_JSON_BYTES:
        raise ValueError(f"{file} is not a valid JSON file here: {size:,} bytes are too many")
    try:
        value = json.loads(file.read_text(encoding="utf-8"), parse_int=_parse_int)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds no JSON object: {value!r:.80}")
    return value


def _parse_int(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"a number has {len(digits)} digits")  # beyond the range of a float
    return int(digits)


def make_config(model_config: object, source: str = "model_config") -> GPTConfig:
    """Return the config of a meta file's dict. Raises ValueError with the source, key and value."""
    if not isinstance(model_config, dict):
        raise ValueError(f"{source}: model_config must be a JSON object, got {model_config!r:.80}")
    values = variants.without_experts(model_config)
    names = GPTConfig.__dataclass_fields__
    *sizes, _ = names  # all but window_pattern
    # `question` compares these keys with the tensors; they are not part of a GPTConfig
    values = {key: value for key, value in values.items() if key not in variants.KNOWN}
    if unknown := sorted(set(values) - set(names)):
        remedy = "delete those that do not change what the model computes"
        problem = f"model_config has keys this engine does not know: {unknown!s:.400}; {remedy}"
        raise ValueError(f"{source}: {problem}")
    if missing := [name for name in sizes if name not in values]:
        raise ValueError(f"{source}: model_config lacks {missing}")
    for name in sizes:
        value = values[name]
        if type(value) is not int or not 0 < value < 2**31:
            raise ValueError(f"{source}: {name} must be a positive integer, got {value!r}")
    pattern = values.get("window_pattern") or "L"
    if not isinstance(pattern, str) or set(pattern.upper()) - set("SL"):
        raise ValueError(f"{source}: window_pattern must be letters S and L, got {pattern!r:.80}")
    width, heads, kv_heads = values["n_embd"], values["n_head"], values["n_kv_head"]
    if width % (2 * heads):
        raise ValueError(f"{source}: n_embd {width} does not split into {heads} even heads")
    if heads % kv_heads:
        raise ValueError(f"{source}: {heads} query heads cannot share {kv_heads} kv heads")
    return GPTConfig.from_meta(values)


def read_weights(file: Path) -> dict[str, Tensor]:
    """Return the memory-mapped state dict of a .pt file. Only tensors are built from it."""
    try:
        weights = read_pt(file)
    except Exception as error:  # damaged files raise many types
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{file} is not a readable checkpoint (truncated, or no state dict of tensors): "
            f"{reason.splitlines()[0]:.200}"
        ) from None
    if not isinstance(weights, dict) or not all(
        isinstance(k, str) and isinstance(w, Tensor) for k, w in weights.items()
    ):
        raise ValueError(f"{file} holds no state dict (names and tensors)")
    # counts each storage at most once per tensor; check_weights rejects views that are not stored
    total = sum(min(w.nbytes, w.untyped_storage().nbytes()) for w in weights.values())
    if total > (size := file.stat().st_size):
        raise ValueError(
            f"{file}: its tensors take {total:,} bytes, but the file has {size:,}: save clones of "
            "tensors that share memory"
        )
    return without_prefix(weights, file)


def without_prefix(weights: dict[str, Tensor], source) -> dict[str, Tensor]:
    """Remove the prefix of a compiled module. Either all names have it, or none."""
    prefix = "_orig_mod."
    if len({key.startswith(prefix) for key in weights}) > 1:
        raise ValueError(f"{source}: some names begin with {prefix} and others do not")
    return {key.removeprefix(prefix): weight for key, weight in weights.items()}


def recognise_strictly(
    weights: dict[str, Tensor],
    config: GPTConfig,
    source,
    raw_config: dict | None = None,
    live=False,
) -> Recipe:
    """Return the recipe of a state dict that is complete and has no other tensors. raw_config: the
    source's config, see `question`; live: True for a module, whose lambdas training may not have
    changed yet. Raises ValueError that names the source and the problem."""
    try:
        for key in weights:
            for mark, layout in _UNSUPPORTED.items():
                if re.search(mark, f".{key}."):
                    raise ValueError(f"unsupported checkpoint: {key!r} belongs to {layout}")
        recipe = recognise(weights)
        check_weights(weights, config, recipe)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    filled = [] if live else variants.fillings(weights)
    return question(recipe, config, raw_config or {}, source, filled)


@dataclasses.dataclass(frozen=True)
class Questionable(Recipe):
    """A recipe whose tensors belong to one era, while other signs suggest another era."""

    why: str = ""


def question(
    recipe: Recipe, config: GPTConfig, raw_config: dict, source, filled: list[str] = ()
) -> Recipe:
    """Return the recipe with the constants that the config states. If config and tensors may be of
    two eras, return a Questionable recipe, which `replace` rejects: with the constants of the wrong
    era, a model would write fluent nonsense.

    raw_config: the source's config; filled: see `variants.fillings`. Raises ValueError that names
    the source and a key that contradicts the tensors.
    """
    try:
        constants = {name: x.value for name, x in variants.stated(raw_config).items()}
        stated_recipe = replace(recipe, **constants)
        variants.check(raw_config, config, stated_recipe)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    pattern, why = raw_config.get("window_pattern"), variants.doubts(raw_config, recipe)
    if recipe.era == "1" and pattern:
        why.append(f"no code of era 1 wrote window_pattern {pattern!r:.40}")
    if filled:
        values = f"{', '.join(filled)}, the values that loaders fill in for an older model"
        why.append(f"{values}, and training does not leave such values")
    if not why:
        return stated_recipe
    why = (
        f"{source}: its tensors are those of era {recipe.era}, but {'; '.join(why)}. The files do "
        "not say which constants it uses. Give them as arguments: rope_base=100000, qk_scale=1.2, "
        "short_window=512, round_rotary=False for era 5 (era 4: qk_scale=1.15, short_window=384; "
        "eras 2 and 3: rope_base=10000, qk_scale=1, short_window=2, round_rotary=True; era 1: the "
        "same with short_window=0; Hugging Face's NanoChat: its rope_base, qk_scale=1, "
        "short_window=0, round_rotary=False)"
    )
    return Questionable(**vars(stated_recipe), why=why)


def replace(recipe: Recipe, **changes: float) -> Recipe:
    """Return a recipe with some constants changed. Raises TypeError for an unknown name, ValueError
    for an invalid value, or for a Questionable recipe if a constant of _TELLING is missing."""
    known_names = "eps", "gate_scale", *_TELLING, "round_rotary", "softcap"
    for name, value in changes.items():
        if name not in known_names:
            names = ", ".join(known_names)
            raise TypeError(f"unknown argument {name!r}; recipe overrides are {names}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        is_valid, expected = number and 0 < value < 1e38, "a positive number"
        if name == "round_rotary":
            is_valid, expected = isinstance(value, bool), "True or False"
        elif name == "short_window":
            is_valid, expected = type(value) is int and 0 <= value < 2**31, "an integer, 0 or more"
        if not is_valid:
            raise ValueError(f"{name} must be {expected}, got {value!r}")
    constants = vars(recipe) | changes
    if (doubt := constants.pop("why", None)) and not set(_TELLING) <= changes.keys():
        raise ValueError(doubt)
    return Recipe(**constants)


def check_weights(weights: dict[str, Tensor], config: GPTConfig, recipe: Recipe) -> None:
    """Check for missing, unexpected and misshapen tensors. Raises ValueError that names them."""
    if config.n_layer > len(weights):  # listing a million missing layers would take a while
        raise ValueError(f"n_layer is {config.n_layer}, but there are {len(weights)} tensors")
    stored = {name: weight for name, weight in weights.items() if _is_stored(weight)}
    wte = stored.get("transformer.wte.weight")
    rows = wte.shape[0] if wte is not None and wte.ndim == 2 else config.vocab_size
    if rows < config.vocab_size:
        raise ValueError(f"the embedding has {rows} rows, but vocab_size is {config.vocab_size}")
    expected = empty_model(config, recipe, rows).state_dict()
    present = [name for name in expected if name in stored]
    shapes = {name: (tuple(weights[name].shape), tuple(expected[name].shape)) for name in present}
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "misshapen": [f"{name} is {a}, not {b}" for name, (a, b) in shapes.items() if a != b],
        "of an unknown dtype": [
            f"{name} is {str(weights[name].dtype)[6:]}"
            for name in present
            if weights[name].dtype not in FLOATS
        ],
        "not stored in full": [name for name in weights if name not in stored],
    }
    descriptions = [
        f"{len(names)} {problem} ({', '.join(names[:3])}{' ...' * (len(names) > 3)})"
        for problem, names in problems.items()
        if names
    ]
    if descriptions:
        raise ValueError(
            f"not a complete checkpoint of era {recipe.era}: " + "; ".join(descriptions)
        )


def _is_stored(weight: Tensor) -> bool:
    """Return whether a tensor's numbers are all in memory. False for sparse and nested tensors, for
    the device "meta", and for one number that is expanded to a matrix."""
    if weight.layout != torch.strided or weight.is_meta or weight.is_nested:
        return False
    return weight.untyped_storage().nbytes() >= weight.numel() * weight.itemsize


def open_tokenizer(path: Path, trust: bool = False) -> Tokenizer:
    """Open nanochat's tokenizer.pkl and check its size. path: the file or its directory; trust:
    accept a pattern that is not nanochat's. Raises ValueError or FileNotFoundError, see
    `load_tokenizer`."""
    file = path / "tokenizer.pkl" if path.is_dir() else path
    if file.is_file() and (size := file.stat().st_size) > _MAX_TOKENIZER_BYTES:
        raise ValueError(f"{file} is not a nanochat tokenizer: {size:,} bytes are too many")
    return load_tokenizer(file, partial(StrictTokenizer, trust=trust))


class StrictTokenizer(Tokenizer):
    """A Tokenizer that checks vocabulary and pattern. trust: accept any pattern that loses no text.
    Raises ValueError with the problem."""

    def __init__(
        self, name: str, pat_str: str, mergeable_ranks: dict, special_tokens: dict, *,
        trust: bool = False,
    ):  # fmt: skip
        _check_table("mergeable_ranks", mergeable_ranks, bytes, 0)
        _check_table("special_tokens", special_tokens, str, len(mergeable_ranks))
        if missing := [byte for byte in range(256) if bytes([byte]) not in mergeable_ranks]:
            raise ValueError(f"mergeable_ranks has no token for the single byte {missing[0]}")
        if "<|bos|>" not in special_tokens:
            raise ValueError("it has no <|bos|> token, which starts every nanochat sequence")
        if not (isinstance(name, str) and isinstance(pat_str, str)):
            raise ValueError("name and pat_str must be strings")
        if (length := sum(map(len, special_tokens))) > _MAX_NAMES:
            raise ValueError(f"the names of its special tokens have {length:,} characters")
        if not trust:
            _check_pattern(pat_str)
        super().__init__(name, pat_str, mergeable_ranks, special_tokens)
        # a valid pattern may still skip some characters, or match nothing
        probe = "Every 1 of these, isn't it?\n\n\té\u3000\u200b\x00 "
        if self.decode(self.encode(probe)) != probe:
            raise ValueError(f"pat_str loses text: {pat_str!r:.200}")

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """See Tokenizer.encode. Raises ValueError for a million blanks in a row."""
        if isinstance(text, str) and len(text) >= _MAX_BLANKS:
            if max(map(len, re.findall(r"[^\S\r\n]+", text)), default=0) >= _MAX_BLANKS:
                problem = f"it has {_MAX_BLANKS:,} blanks in a row"
                raise ValueError(f"text of {len(text):,} characters cannot be split: {problem}")
        return super().encode(text, bos)

    def render_conversation(self, messages: list[dict], max_tokens: int | None = 2048):
        """Return the ids of a conversation and its training mask (1: the model learns to predict
        the token). Both are cut to `max_tokens`, as in nanochat's training (None: not cut). Raises
        ValueError or TypeError like render_for_completion."""
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
        pairs = self._render(turns_of(messages))[:max_tokens]
        return [token for token, _ in pairs], [mask for _, mask in pairs]


def _check_pattern(pattern: str) -> None:
    """Raise ValueError for a pattern that is not one of nanochat's. The cost of other patterns has
    no known bound: tiktoken's lookbehinds and repeats may take any memory, and its backtracking any
    time (fancy-regex, https://docs.rs/fancy-regex). A pattern that searches far ahead from each
    character takes quadratic time."""
    if pattern not in PATTERNS:
        raise ValueError(
            f"its pattern (pat_str) is not one of nanochat's, and may take any time and memory: "
            f"{pattern[:200]!r}; if you trust its source, give trust_tokenizer=True (on the "
            "command line --trust-tokenizer)"
        )


def _check_table(name: str, table: dict, key_type: type, first: int) -> None:
    """Raise ValueError unless a table assigns the ids first, first + 1, ... once each, since ids
    index arrays."""
    if not isinstance(table, dict):
        raise ValueError(f"{name} is {type(table).__name__} where a dict was expected")
    if not all(type(key) is key_type and type(id_) is int for key, id_ in table.items()):
        raise ValueError(f"{name} must map {key_type.__name__} to int")
    if sorted(table.values()) != list(range(first, first + len(table))):
        raise ValueError(f"{name} must use each id from {first} to {first + len(table) - 1} once")
