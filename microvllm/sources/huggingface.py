"""Hugging Face's formats: NanoChat folders and tokenizer.json.

transformers' NanoChat is nanochat's first era under other names. It differs in two constants: the
rotary tables are not rounded, and the epsilon of the norms is written in config.json. Folders of
the later eras, which exporters write with a class of their own, keep nanochat's names and sizes.
"""

import re
from pathlib import Path, PurePosixPath
from types import ModuleType

from torch import Tensor

from ..model import RECIPES
from ..tokenizer import Tokenizer
from . import strict
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
# what config.json could say otherwise, and no nanochat does
_FIXED = {
    "hidden_act": "relu2",
    "attention_bias": False,
    "qkv_bias": False,
    "tie_word_embeddings": False,
    "rope_type": "default",
}
# keys of transformers and of exporters beside nanochat's own, by which nothing is computed: the era
# is recognised by the tensors, and the rest is said again
_IGNORED = set("""
    _attn_implementation _name_or_path architectures attention_dropout auto_map bos_token_id
    chunk_size_feed_forward dtype eos_token_id hidden_size id2label initializer_range
    intermediate_size is_decoder is_encoder_decoder label2id max_position_embeddings model_type
    num_attention_heads num_hidden_layers num_key_value_heads output_attentions
    output_hidden_states pad_token_id padded_vocab_size problem_type return_dict rope_parameters
    rope_scaling rope_theta step tie_word_embeddings tokenizer_class torch_dtype
    transformers_version use_cache
""".split())  # fmt: skip
# of tensors in a file; the last two are those of a folder of `microvllm quantize`
_DTYPES = {"F64", "F32", "F16", "BF16", "I8", "U8"}
# parts of a tensor's name -> nanochat's
NAMES = {
    "model.embed_tokens.": "transformer.wte.",
    "model.layers.": "transformer.h.",
    ".self_attn.q_proj.": ".attn.c_q.",
    ".self_attn.k_proj.": ".attn.c_k.",
    ".self_attn.v_proj.": ".attn.c_v.",
    ".self_attn.o_proj.": ".attn.c_proj.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}


def read_folder(directory: Path) -> Checkpoint:
    """A NanoChat folder: config.json and model.safetensors, or model.safetensors.index.json and its
    shards. Raises ValueError or FileNotFoundError naming the file and what is wrong with it."""
    file = directory / "config.json"
    given = read_json(file)
    kind = given.get("architectures") or [given.get("model_type")]
    if kind not in (["NanoChatForCausalLM"], ["NanochatForCausalLM"], ["nanochat"]):
        raise ValueError(f"{file}: the architecture is {kind}, and only NanoChatForCausalLM runs")
    # older files have rope_theta on its own, beside a rope_scaling that is null
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    found = given | {"rope_type": rope.get("rope_type") or rope.get("type") or "default"}
    found["rope_theta"] = rope.get("rope_theta", given.get("rope_theta", 10_000.0))
    if "n_embd" in given:
        # what is false is a part of other models that this one does not have
        own = {k: v for k, v in given.items() if k not in _IGNORED and v is not False}
        config, weights = strict.make_config(own, str(file)), _read_tensors(directory)
        return config, strict.recognise_strictly(weights, config, directory, found), weights
    for key, value in _FIXED.items():
        if found.get(key, value) != value:
            raise ValueError(f"{file}: {key} is {found[key]!r}, and nanochat's is {value!r}")
    sizes = {ours: given.get(theirs) for ours, theirs in SIZES.items()}
    sizes["n_kv_head"] = sizes["n_kv_head"] or sizes["n_head"]
    if missing := [SIZES[ours] for ours, value in sizes.items() if value is None]:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    sizes["window_pattern"] = given.get("window_pattern")
    config, weights = strict.make_config(sizes, str(file)), _read_tensors(directory)
    try:
        recipe = strict.replace(
            RECIPES["1"],
            round_rotary=False,
            eps=given.get("rms_norm_eps", 1e-6),
            softcap=given.get("final_logit_softcapping", 15.0),
            rope_base=found["rope_theta"],
        )
        strict.check_weights(weights, config, recipe)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    return config, strict.question(recipe, found, directory), weights


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of a folder by nanochat's names; names it does not have stay as they are."""
    files = [directory / "model.safetensors"]
    if not files[0].is_file() and (index := directory / "model.safetensors.index.json").is_file():
        files = _shards(index)
    weights = {}
    for file in files:
        for name, tensor in read_safetensors(file).items():
            for theirs, ours in NAMES.items():
                name = name.replace(theirs, ours)
            # what a wrapper, or torch.compile, puts before the names of the module inside
            name = re.sub(r"^(model\.|gpt\.|_orig_mod\.)+", "", name)
            if name in weights:
                raise ValueError(f"{file} has a second tensor for {name:.80}: keep one of them")
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
        remedy = "pip install 'microvllm[hf]', which has safetensors"
        raise ImportError(f"{directory} is in Hugging Face's format: {remedy}") from None
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
