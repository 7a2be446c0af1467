"""Checkpoints and tokenizers read strictly: files may be hostile, and a mistake has a name.

The core's own readers refuse what is not whole, in few words. These check more (compressed records,
tensors that claim more than the file has, layouts of nanochat's experiments, patterns that lose
text) before anything is computed, and say which key, which tensor, which value is wrong.
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
_MAX_JSON_BYTES = 16 << 20  # nanochat's largest tokenizer.json takes about 5 MB, in memory 20 times
_MAX_TOKENIZER_BYTES = 8 << 20  # nanochat's own vocabularies (65,536 tokens at most) take about 1
_MAX_NAMES = 1 << 16  # characters of all special tokens' names: tiktoken takes 400 bytes for each
# nanochat's own pattern, whose time grows with the text: numbers are split into one to nine digits,
# in most versions two
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
PATTERNS = {PATTERN.replace("1,2", f"1,{most}") for most in range(1, 10)}
_MAX_BLANKS = 999_000  # in a row: tiktoken's pattern gives up, but not without a word on stderr

# the constants that are not the same in eras 1 to 5, and matter most
_TELLING = "qk_scale", "rope_base", "short_window"

# layouts that existed for days on branches of nanochat; named so that the refusal says what it saw
_UNSUPPORTED = {
    r"v0_lambdas": "an experiment of 2026-01-16 with v0_lambdas (ungated value embeddings)",
    r"bigram_lambdas": "the hashed bigram embeddings (engram) of 2026-01-25 to 01-28",
    r"\.moe\.": "a mixture of experts (branch moe)",
    r"\.mlp\.(router|experts|shared_expert)\.": "a mixture of experts (branch moe3)",
}


Checkpoint = tuple[GPTConfig, Recipe, dict[str, Tensor]]  # the weights are memory-mapped


def read_checkpoint(directory: Path, step: int) -> Checkpoint:
    """A step that `find_step` found, of any era. Raises ValueError naming the file and what is
    wrong with it."""
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
    """The JSON object in a file. Raises ValueError naming the file."""
    if (size := file.stat().st_size) > _MAX_JSON_BYTES:
        raise ValueError(f"{file} is not valid JSON for us: {size:,} bytes are far too many")
    try:
        found = json.loads(file.read_text(encoding="utf-8"), parse_int=_parse_int)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object: {found!r:.80}")
    return found


def _parse_int(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"a number has {len(digits)} digits")  # too many for a float
    return int(digits)


def make_config(model_config: object, source: str = "model_config") -> GPTConfig:
    """The config of a meta file's dict. Raises ValueError naming the source, key and value."""
    if not isinstance(model_config, dict):
        raise ValueError(f"{source}: model_config must be a JSON object, got {model_config!r:.80}")
    given = variants.without_experts(model_config)
    names = GPTConfig.__dataclass_fields__
    *sizes, _ = names  # all but window_pattern
    # what `question` compares with the tensors is no part of a GPTConfig
    given = {key: value for key, value in given.items() if key not in variants.KNOWN}
    if unknown := sorted(set(given) - set(names)):
        remedy = "delete those that change nothing in what the model computes"
        what = f"model_config has keys this engine does not know: {unknown!s:.400}; {remedy}"
        raise ValueError(f"{source}: {what}")
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
    """The state dict of a .pt file, memory-mapped; only tensors are ever built from it."""
    try:
        weights = read_pt(file)
    except Exception as error:  # a file can be broken in many ways
        why = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{file} is not a readable checkpoint (truncated, or no state dict of tensors): "
            f"{why.splitlines()[0]:.200}"
        ) from None
    if not isinstance(weights, dict) or not all(
        isinstance(k, str) and isinstance(w, Tensor) for k, w in weights.items()
    ):
        raise ValueError(f"{file} holds no state dict (names and tensors)")
    # a stored one may be shared, or spread over a matrix, which check_weights refuses
    total = sum(min(w.nbytes, w.untyped_storage().nbytes()) for w in weights.values())
    if total > (size := file.stat().st_size):
        raise ValueError(
            f"{file}: its tensors take {total:,} bytes, and the file has {size:,}: save clones of "
            "tensors that share memory"
        )
    return without_prefix(weights, file)


def without_prefix(weights: dict[str, Tensor], source) -> dict[str, Tensor]:
    """A compiled module's weights under their plain names; all have its prefix, or none has."""
    prefix = "_orig_mod."
    if len({key.startswith(prefix) for key in weights}) > 1:
        raise ValueError(f"{source}: some names begin with {prefix} and others do not")
    return {key.removeprefix(prefix): weight for key, weight in weights.items()}


def recognise_strictly(
    weights: dict[str, Tensor], config: GPTConfig, source, given: dict | None = None, live=False
) -> Recipe:
    """The recipe of a state dict that is complete and has nothing else; given: what the source has
    for a config, see `question`; live: a module, whose lambdas a training may not have changed yet.
    Raises ValueError naming the source and what is wrong."""
    try:
        for key in weights:
            for mark, what in _UNSUPPORTED.items():
                if re.search(mark, f".{key}."):
                    raise ValueError(f"unsupported checkpoint: {key!r} belongs to {what}")
        recipe = recognise(weights)
        check_weights(weights, config, recipe)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    filled = [] if live else variants.fillings(weights)
    return question(recipe, config, given or {}, source, filled)


@dataclasses.dataclass(frozen=True)
class Questionable(Recipe):
    """The recipe of tensors that are those of an era, in a model that may be of another."""

    why: str = ""


def question(
    recipe: Recipe, config: GPTConfig, given: dict, source, filled: list[str] = ()
) -> Recipe:
    """The recipe, with the constants that the config states; or a Questionable one that `replace`
    refuses, where config and tensors may be of two eras: computed with the constants of the wrong
    one, a model would write fluent nonsense.

    given: what the source has for a config; filled: see `variants.fillings`. Raises ValueError
    naming the source and a key that contradicts the tensors.
    """
    try:
        constants = {name: x.value for name, x in variants.stated(given).items()}
        found = replace(recipe, **constants)
        variants.check(given, config, found)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    pattern, why = given.get("window_pattern"), variants.doubts(given, recipe)
    if recipe.era == "1" and pattern:
        why.append(f"no code of era 1 wrote window_pattern {pattern!r:.40}")
    if filled:
        what = f"{', '.join(filled)}, as loaders fill them in for an older model"
        why.append(f"{what}, and no training leaves them so")
    if not why:
        return found
    why = (
        f"{source}: its tensors are those of era {recipe.era}, but {'; '.join(why)}. No file tells "
        "then what it computes: give rope_base=100000, qk_scale=1.2, short_window=512, "
        "round_rotary=False where that is as in era 5 (era 4: qk_scale=1.15, short_window=384; "
        "eras 2 and 3: rope_base=10000, qk_scale=1, short_window=2, round_rotary=True; era 1: the "
        "same with short_window=0; Hugging Face's NanoChat: its rope_base, qk_scale=1, "
        "short_window=0, round_rotary=False)"
    )
    return Questionable(**vars(found), why=why)


def replace(recipe: Recipe, **changes: float) -> Recipe:
    """A recipe with some constants changed. Raises TypeError for an unknown name, ValueError for a
    value that makes no sense, or for a Questionable recipe whose constants are not all given."""
    known = "eps", "gate_scale", *_TELLING, "round_rotary", "softcap"
    for name, value in changes.items():
        if name not in known:
            names = ", ".join(known)
            raise TypeError(f"unknown argument {name!r}; recipe overrides are {names}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        right, kind = number and 0 < value < 1e38, "a positive number"
        if name == "round_rotary":
            right, kind = isinstance(value, bool), "True or False"
        elif name == "short_window":
            right, kind = type(value) is int and 0 <= value < 2**31, "an integer, 0 or more"
        if not right:
            raise ValueError(f"{name} must be {kind}, got {value!r}")
    constants = vars(recipe) | changes
    if (why := constants.pop("why", None)) and not set(_TELLING) <= changes.keys():
        raise ValueError(why)
    return Recipe(**constants)


def check_weights(weights: dict[str, Tensor], config: GPTConfig, recipe: Recipe) -> None:
    """Strict: no missing, no extra, no misshapen tensor. Raises ValueError naming them."""
    if config.n_layer > len(weights):  # a million layers would take a while to list
        raise ValueError(f"n_layer is {config.n_layer}, but there are {len(weights)} tensors")
    stored = {name: weight for name, weight in weights.items() if _is_stored(weight)}
    wte = stored.get("transformer.wte.weight")
    rows = wte.shape[0] if wte is not None and wte.ndim == 2 else config.vocab_size
    if rows < config.vocab_size:
        raise ValueError(f"the embedding has {rows} rows, but vocab_size is {config.vocab_size}")
    expected = empty_model(config, recipe, rows).state_dict()
    there = [name for name in expected if name in stored]
    shapes = {name: (tuple(weights[name].shape), tuple(expected[name].shape)) for name in there}
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "misshapen": [f"{name} is {a}, not {b}" for name, (a, b) in shapes.items() if a != b],
        "of an unknown dtype": [
            f"{name} is {str(weights[name].dtype)[6:]}"
            for name in there
            if weights[name].dtype not in FLOATS
        ],
        "not stored in full": [name for name in weights if name not in stored],
    }
    found = [
        f"{len(names)} {what} ({', '.join(names[:3])}{' ...' * (len(names) > 3)})"
        for what, names in problems.items()
        if names
    ]
    if found:
        raise ValueError(f"not a complete checkpoint of era {recipe.era}: " + "; ".join(found))


def _is_stored(weight: Tensor) -> bool:
    """Not a sparse or nested one, one on the device "meta", or one number that claims to be a
    matrix."""
    if weight.layout != torch.strided or weight.is_meta or weight.is_nested:
        return False
    return weight.untyped_storage().nbytes() >= weight.numel() * weight.itemsize


def open_tokenizer(path: Path, trust: bool = False) -> Tokenizer:
    """nanochat's tokenizer.pkl, of a reasonable size; path: that file or the directory it is in;
    trust: also with a pattern that is not nanochat's. Raises ValueError or FileNotFoundError, see
    `load_tokenizer`."""
    file = path / "tokenizer.pkl" if path.is_dir() else path
    if file.is_file() and (size := file.stat().st_size) > _MAX_TOKENIZER_BYTES:
        raise ValueError(f"{file} is not a nanochat tokenizer: {size:,} bytes are far too many")
    return load_tokenizer(file, partial(StrictTokenizer, trust=trust))


class StrictTokenizer(Tokenizer):
    """A Tokenizer of a checked vocabulary and pattern; trust: of any pattern that loses no text.
    Raises ValueError saying what is wrong."""

    def __init__(
        self, name: str, pat_str: str, mergeable_ranks: dict, special_tokens: dict, *,
        trust: bool = False,
    ):  # fmt: skip
        _check_table("mergeable_ranks", mergeable_ranks, bytes, 0)
        _check_table("special_tokens", special_tokens, str, len(mergeable_ranks))
        if missing := [byte for byte in range(256) if bytes([byte]) not in mergeable_ranks]:
            raise ValueError(f"mergeable_ranks has no token for the single byte {missing[0]}")
        if "<|bos|>" not in special_tokens:
            raise ValueError("it has no <|bos|> token, with which every nanochat sequence starts")
        if not (isinstance(name, str) and isinstance(pat_str, str)):
            raise ValueError("name and pat_str must be strings")
        if (length := sum(map(len, special_tokens))) > _MAX_NAMES:
            raise ValueError(f"the names of its special tokens have {length:,} characters")
        if not trust:
            _check_pattern(pat_str)
        super().__init__(name, pat_str, mergeable_ranks, special_tokens)
        # a pattern may be well formed and still skip some characters, or match nothing at all
        probe = "Every 1 of these, isn't it?\n\n\té\u3000\u200b\x00 "
        if self.decode(self.encode(probe)) != probe:
            raise ValueError(f"pat_str loses text: {pat_str!r:.200}")

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of `text`, see Tokenizer.encode. Raises ValueError for a million blanks in a row."""
        if isinstance(text, str) and len(text) >= _MAX_BLANKS:
            if max(map(len, re.findall(r"[^\S\r\n]+", text)), default=0) >= _MAX_BLANKS:
                what = f"it has {_MAX_BLANKS:,} blanks in a row"
                raise ValueError(f"text of {len(text):,} characters cannot be split: {what}")
        return super().encode(text, bos)

    def render_conversation(self, messages: list[dict], max_tokens: int | None = 2048):
        """Ids of a conversation and its training mask (1: the model learns to predict this token),
        lists cut to `max_tokens`, as nanochat does for training (None: never). Raises ValueError or
        TypeError as render_for_completion does."""
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
        pairs = self._render(turns_of(messages))[:max_tokens]
        return [token for token, _ in pairs], [mask for _, mask in pairs]


def _check_pattern(pattern: str) -> None:
    """Raises ValueError for a pattern that is not one of nanochat's. No rule tells what another one
    costs: tiktoken's lookbehinds and repeats may take any memory, its backtracking any time
    (fancy-regex, https://docs.rs/fancy-regex), and a plain pattern that looks for a far end from
    each character the square of a text's length."""
    if pattern not in PATTERNS:
        raise ValueError(
            f"its pattern (pat_str) is none of nanochat's, and may take any time and memory: "
            f"{pattern[:200]!r}; if you trust its source, give trust_tokenizer=True (on the "
            "command line --trust-tokenizer)"
        )


def _check_table(what: str, table: dict, key_type: type, first: int) -> None:
    """A table must give its keys the ids first, first + 1, ... each once: ids index arrays."""
    if not isinstance(table, dict):
        raise ValueError(f"{what} is {type(table).__name__} where a dict was expected")
    if not all(type(key) is key_type and type(id_) is int for key, id_ in table.items()):
        raise ValueError(f"{what} must map {key_type.__name__} to int")
    if sorted(table.values()) != list(range(first, first + len(table))):
        raise ValueError(f"{what} must use each id from {first} to {first + len(table) - 1} once")
