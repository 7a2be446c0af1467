"""Hugging Face's formats: NanoChat folders and tokenizer.json.

transformers' NanoChat is nanochat's first era under other names. It differs in two constants: the
rotary tables are not rounded, and the epsilon of the norms is written in config.json. Folders of
the later eras, which exporters write with classes of their own, have nanochat's names and sizes, or
transformers', or names of their own, see variants.py.
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
# keys of transformers and of exporters beside nanochat's own, by which nothing is computed: the era
# is recognised by the tensors, and the rest is said again, or is about training and sampling
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
# of tensors in a file; the last two are those of a folder of `microvllm quantize`
_DTYPES = {"F64", "F32", "F16", "BF16", "I8", "U8"}


def read_folder(directory: Path) -> Checkpoint:
    """A NanoChat folder: config.json and model.safetensors, or model.safetensors.index.json and its
    shards. Raises ValueError or FileNotFoundError naming the file and what is wrong with it."""
    file = directory / "config.json"
    given = variants.without_experts(read_json(file))
    kinds = given.get("architectures") or [given.get("model_type")]
    if not isinstance(kinds, list) or not all(isinstance(k, str) for k in kinds):
        kinds = [repr(kinds)]
    if not variants.KINDS & set(kinds):
        raise ValueError(
            f"{file}: the architecture is {kinds!s:.200}, and only NanoChatForCausalLM runs, and "
            "what exporters of nanochat call it; if its code computes what nanochat's does, write "
            '"architectures": ["NanochatForCausalLM"]'
        )
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    # transformers writes this number by itself, for classes too that never read it
    if (theta := rope.get("rope_theta", 10_000)) != 10_000 and given.get("rope_theta") is None:
        given["rope_theta"] = theta
    # what is false or empty is a part of other models that this one does not have
    own = GPTConfig.__dataclass_fields__
    rest = {k: v for k, v in given.items() if k in own or v and k not in _IGNORED | variants.KNOWN}
    has_own_sizes = "n_embd" in given
    if has_own_sizes:
        sizes = rest
        if "text_vocab_size" in sizes:  # beside a vocab_size that counts the padding
            sizes["vocab_size"] = sizes.pop("text_vocab_size")
    else:
        sizes = _sizes(given, file, rope.get("rope_type") or rope.get("type") or "default")
    config, weights = strict.make_config(sizes, str(file)), _read_tensors(directory)
    recipe = strict.recognise_strictly(weights, config, directory, given)
    if has_own_sizes:
        return config, recipe, weights
    unknown = sorted(rest.keys() - {"vocab_size", "window_pattern"})
    if recipe.era == "1":  # transformers' own class, which has keys of its own
        if given.get("rms_norm_eps") is None:
            recipe = dataclasses.replace(recipe, eps=1e-6)
    elif unknown:
        remedy = "delete those that change nothing in what the model computes"
        raise ValueError(f"{file} has keys this engine does not know: {unknown!s:.400}; {remedy}")
    return config, dataclasses.replace(recipe, round_rotary=False), weights


def _sizes(given: dict, file: Path, rope_type: object) -> dict:
    """nanochat's sizes of a config that has them under transformers' names. Raises ValueError for
    one that is missing, or for what no nanochat has."""
    if rope_type != "default":
        raise ValueError(f"{file}: rope_type is {rope_type!r:.80}, and nanochat's is 'default'")
    if given.get("tie_word_embeddings"):
        raise ValueError(f"{file}: tie_word_embeddings is True, and nanochat's is False")
    sizes = {ours: given.get(theirs) for ours, theirs in SIZES.items()}
    sizes["n_kv_head"] = sizes["n_kv_head"] or sizes["n_head"]
    if missing := [SIZES[ours] for ours, value in sizes.items() if value is None]:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    return sizes | {"window_pattern": given.get("window_pattern")}


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of a folder by nanochat's names; names it does not have stay as they are."""
    files = [directory / "model.safetensors"]
    if not files[0].is_file() and (index := directory / "model.safetensors.index.json").is_file():
        files = _shards(index)
    weights = {}
    for file in files:
        for theirs, tensor in read_safetensors(file).items():
            name = variants.plain_name(theirs)
            if name in weights:
                raise ValueError(f"{file} has a second tensor for {name:.80}: keep one of them")
            if not variants.is_unit_norm(name, tensor):
                weights[name] = tensor
    return weights


def _shards(index: Path) -> list[Path]:
    """The files that an index names. Their names are only compared with those that are there: no
    name goes to the system, which may refuse it in its own way, or find it elsewhere. Raises
    ValueError or FileNotFoundError naming the index."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files")
    there = {file.name: file for file in index.parent.iterdir() if file.is_file()}
    names = sorted({PurePosixPath(shard).name for shard in shards.values()})
    if missing := [name for name in names if name not in there]:
        what = f"{missing[0]!r:.120}" + f" and {len(missing) - 1} more" * (len(missing) > 1)
        raise FileNotFoundError(f"{index} names the file {what}, which is not beside it")
    return [there[name] for name in names]


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors in a file, memory-mapped. Raises FileNotFoundError or ValueError naming it."""
    package = import_safetensors(file.parent)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing (of the weights, only safetensors are read)")
    try:
        with package.safe_open(file, "pt") as opened:
            kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
        tensors = package.load_file(file) if set(kinds.values()) <= _DTYPES else {}
    except Exception as error:  # safetensors' own error, or the system's
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from None
    if unknown := sorted(name for name, kind in kinds.items() if kind not in _DTYPES):
        what = f"the tensor {unknown[0]:.80} of dtype {kinds[unknown[0]]}"
        what += f" and {len(unknown) - 1} more" * (len(unknown) > 1)
        raise ValueError(f"{file} has {what}: known are {', '.join(sorted(_DTYPES))}")
    return tensors


def import_safetensors(directory: Path) -> ModuleType:
    """safetensors.torch. Raises ImportError with the remedy for a folder that needs it."""
    try:
        import safetensors.torch
    except ImportError:
        why = f"{directory} is in Hugging Face's format, which needs safetensors"
        raise ImportError(f"{why}: {how_to_install('hf')}") from None
    return safetensors.torch


def read_tokenizer(file: Path, trust: bool = False) -> Tokenizer:
    """A tokenizer.json (of the `tokenizers` package) as nanochat's tokenizer. Only a byte-level BPE
    that is split by one pattern and merged in the order of its ids has the same meaning there and
    here. trust: see StrictTokenizer. Raises ValueError for any other."""
    given = read_json(file)
    # each byte is spelt as one printable character: itself, or the next free one from U+0100 on
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelt = {chr(byte): byte for byte in printable}
    spelt |= {chr(0x100 + i): byte for i, byte in enumerate(others)}
    try:
        model, (split, level) = given["model"], given["pre_tokenizer"]["pretokenizers"]
        pattern = split["pattern"]["Regex"]
        same = [given["normalizer"], split["behavior"], split["invert"], level["type"]]
        same += [level["use_regex"], level["add_prefix_space"], model["type"]]
        if same != [None, "Isolated", False, "ByteLevel", False, False, "BPE"]:
            raise ValueError(f"its normalizer, pre_tokenizer or model is another kind: {same}")
        special = {token["content"]: token["id"] for token in given["added_tokens"]}
        ids = {token: id_ for token, id_ in model["vocab"].items() if token not in special}
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        merged = [ids["".join(pair)] for pair in pairs]
        if merged != sorted(merged):
            raise ValueError("its merges are not in the order of their ids")
        ranks = {bytes(spelt[c] for c in token): id_ for token, id_ in ids.items()}
        return StrictTokenizer(file.name, pattern, ranks, special, trust=trust)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{file} is no byte-level BPE of nanochat's kind ({type(error).__name__}: {error}): "
            "give tokenizer_path, a directory with nanochat's tokenizer.pkl"
        ) from None
