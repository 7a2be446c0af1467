"""Hugging Face's formats: NanoChat folders and tokenizer.json.

transformers' NanoChat is nanochat's first era under other names. Two constants differ: the rotary
tables are not rounded, and config.json contains the epsilon of the norms. Folders of later eras
come from exporters with their own classes. They use nanochat's names and sizes, or transformers',
or their own (variants.py).
"""

import dataclasses
from pathlib import Path, PurePosixPath
from types import ModuleType

from torch import Tensor

from ..environment import how_to_install
from ..model import GPTConfig
from ..tokenizer import Tokenizer
from . import strict, variants
from .strict import Checkpoint, StrictTokenizer, read_json

# nanochat's model_config -> config.json
SIZES = {
    "sequence_len": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
}
# Ignored keys of transformers and exporters. They do not change the computation: the era is
# recognised by the tensors, and these keys repeat it, or concern training and sampling
_IGNORED = set("""
    _attn_implementation _name_or_path architectures attention_dropout auto_map bos_token_id
    chunk_size_feed_forward dtype eos_token_id hidden_size id2label initializer_range
    intermediate_size is_decoder is_encoder_decoder label2id length_penalty max_length
    max_position_embeddings model_type num_attention_heads num_beam_groups num_beams
    num_hidden_layers num_key_value_heads num_return_sequences output_attentions
    output_hidden_states pad_token_id problem_type repetition_penalty return_dict rope_parameters
    rope_scaling step temperature tie_encoder_decoder tie_word_embeddings tokenizer_class top_k
    top_p torch_dtype transformers_version typical_p use_cache
""".split())  # fmt: skip
# dtypes of tensors in a file; the last two are for folders of `microvllm quantize`
_DTYPES = {"F64", "F32", "F16", "BF16", "I8", "U8"}


def read_folder(directory: Path) -> Checkpoint:
    """Read a NanoChat folder: config.json, and model.safetensors or model.safetensors.index.json
    with its shards. Raises ValueError or FileNotFoundError that names the file and the problem."""
    file = directory / "config.json"
    raw_config = variants.without_experts(read_json(file))
    kinds = raw_config.get("architectures") or [raw_config.get("model_type")]
    if not isinstance(kinds, list) or not all(isinstance(k, str) for k in kinds):
        kinds = [repr(kinds)]
    if not variants.KINDS & set(kinds):
        raise ValueError(
            f"{file}: the architecture is {kinds!s:.200}, but only NanoChatForCausalLM and the "
            "names that exporters of nanochat use are supported; if its code computes what "
            'nanochat\'s does, write "architectures": ["NanochatForCausalLM"]'
        )
    rope = raw_config.get("rope_parameters") or raw_config.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    # transformers writes this number by default, even for classes that never read it
    if (theta := rope.get("rope_theta", 10_000)) != 10_000 and raw_config.get("rope_theta") is None:
        raw_config["rope_theta"] = theta
    # false and empty values stand for parts of other models
    own_names = GPTConfig.__dataclass_fields__
    rest = {
        k: v
        for k, v in raw_config.items()
        if k in own_names or v and k not in _IGNORED | variants.KNOWN
    }
    has_own_sizes = "n_embd" in raw_config
    if has_own_sizes:
        sizes = rest
        if "text_vocab_size" in sizes:  # here vocab_size includes the padding
            sizes["vocab_size"] = sizes.pop("text_vocab_size")
    else:
        sizes = _sizes(raw_config, file, rope.get("rope_type") or rope.get("type") or "default")
    config, weights = strict.make_config(sizes, str(file)), _read_tensors(directory)
    recipe = strict.recognise_strictly(weights, config, directory, raw_config)
    if has_own_sizes:
        return config, recipe, weights
    unknown = sorted(rest.keys() - {"vocab_size", "window_pattern"})
    if recipe.era == "1":  # transformers' own class, with further keys of its own
        if raw_config.get("rms_norm_eps") is None:
            recipe = dataclasses.replace(recipe, eps=1e-6)
    elif unknown:
        remedy = "delete those that do not change what the model computes"
        raise ValueError(f"{file} has keys this engine does not know: {unknown!s:.400}; {remedy}")
    return config, dataclasses.replace(recipe, round_rotary=False), weights


def _sizes(raw_config: dict, file: Path, rope_type: object) -> dict:
    """Return nanochat's sizes of a config with transformers' names. Raises ValueError for a missing
    size, or for values that no nanochat has."""
    if rope_type != "default":
        raise ValueError(f"{file}: rope_type is {rope_type!r:.80}, but nanochat's is 'default'")
    if raw_config.get("tie_word_embeddings"):
        raise ValueError(f"{file}: tie_word_embeddings is True, but nanochat's is False")
    sizes = {size: raw_config.get(hf_name) for size, hf_name in SIZES.items()}
    sizes["n_kv_head"] = sizes["n_kv_head"] or sizes["n_head"]
    if missing := [SIZES[size] for size, value in sizes.items() if value is None]:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    return sizes | {"window_pattern": raw_config.get("window_pattern")}


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder by nanochat's names. Unknown names are not changed."""
    files = [directory / "model.safetensors"]
    if not files[0].is_file() and (index := directory / "model.safetensors.index.json").is_file():
        files = _shards(index)
    weights = {}
    for file in files:
        for hf_name, tensor in read_safetensors(file).items():
            name = variants.plain_name(hf_name)
            if name in weights:
                raise ValueError(f"{file} has a second tensor for {name:.80}: keep one of them")
            if not variants.is_unit_norm(name, tensor):
                weights[name] = tensor
    return weights


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names. The names are compared with existing files, and never
    passed to the system, which might resolve them to other places. Raises ValueError or
    FileNotFoundError that names the index."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files")
    files_by_name = {file.name: file for file in index.parent.iterdir() if file.is_file()}
    names = sorted({PurePosixPath(shard).name for shard in shards.values()})
    if missing := [name for name in names if name not in files_by_name]:
        shown = f"{missing[0]!r:.120}" + f" and {len(missing) - 1} more" * (len(missing) > 1)
        raise FileNotFoundError(f"{index} names the file {shown}, which is not next to it")
    return [files_by_name[name] for name in names]


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Return the memory-mapped tensors of a file. Raises FileNotFoundError or ValueError."""
    package = import_safetensors(file.parent)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing (weights are read only from safetensors)")
    try:
        with package.safe_open(file, "pt") as opened:
            kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
        tensors = package.load_file(file) if set(kinds.values()) <= _DTYPES else {}
    except Exception as error:  # from safetensors or the system
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from None
    if unknown := sorted(name for name, kind in kinds.items() if kind not in _DTYPES):
        shown = f"the tensor {unknown[0]:.80} of dtype {kinds[unknown[0]]}"
        shown += f" and {len(unknown) - 1} more" * (len(unknown) > 1)
        raise ValueError(f"{file} has {shown}: known are {', '.join(sorted(_DTYPES))}")
    return tensors


def import_safetensors(directory: Path) -> ModuleType:
    """Return safetensors.torch. Raises ImportError with the remedy for a folder that needs it."""
    try:
        import safetensors.torch
    except ImportError:
        reason = f"{directory} is in Hugging Face's format, which needs safetensors"
        raise ImportError(f"{reason}: {how_to_install('hf')}") from None
    return safetensors.torch


def read_tokenizer(file: Path, trust: bool = False) -> Tokenizer:
    """Read a tokenizer.json (of the `tokenizers` package) as nanochat's tokenizer. trust: see
    StrictTokenizer. Only a byte-level BPE with one split pattern and merges in the order of their
    ids has the same meaning in both. Raises ValueError for any other."""
    data = read_json(file)
    # each byte is written as one printable character: itself, or the next free one from U+0100 on
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(0x100 + i): byte for i, byte in enumerate(others)}
    try:
        model, (split, level) = data["model"], data["pre_tokenizer"]["pretokenizers"]
        pattern = split["pattern"]["Regex"]
        settings = [data["normalizer"], split["behavior"], split["invert"], level["type"]]
        settings += [level["use_regex"], level["add_prefix_space"], model["type"]]
        if settings != [None, "Isolated", False, "ByteLevel", False, False, "BPE"]:
            raise ValueError(f"its normalizer, pre_tokenizer or model is another kind: {settings}")
        special = {token["content"]: token["id"] for token in data["added_tokens"]}
        ids = {token: id_ for token, id_ in model["vocab"].items() if token not in special}
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        merged = [ids["".join(pair)] for pair in pairs]
        if merged != sorted(merged):
            raise ValueError("its merges are not in the order of their ids")
        ranks = {bytes(byte_of[c] for c in token): id_ for token, id_ in ids.items()}
        return StrictTokenizer(file.name, pattern, ranks, special, trust=trust)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{file} is not a byte-level BPE like nanochat's ({type(error).__name__}: {error}): "
            "give tokenizer_path, a directory with nanochat's tokenizer.pkl"
        ) from None
