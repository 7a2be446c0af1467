"""What is Hugging Face's: NanoChat folders, tokenizer.json, and the hub.

transformers' NanoChat is nanochat's first era under other names. It differs in two constants: the
rotary tables are not rounded, and the epsilon of the norms is written in config.json.
"""

from __future__ import annotations

import os
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path

from torch import Tensor

from ..checkpoint import check_weights, read_json
from ..model import RECIPES, GPTConfig, Recipe
from ..tokenizer import Tokenizer

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


def read_folder(directory: Path) -> tuple[GPTConfig, Recipe, dict[str, Tensor]]:
    """Config, recipe and weights (memory-mapped) of a NanoChat folder, checked strictly.

    directory: has config.json and model.safetensors, or model.safetensors.index.json and its
    shards. Raises ValueError or FileNotFoundError naming the file and what is wrong with it.
    """
    file = directory / "config.json"
    given = read_json(file)
    kind = given.get("architectures") or [given.get("model_type")]
    if kind not in (["NanoChatForCausalLM"], ["nanochat"]):
        raise ValueError(f"{file}: the architecture is {kind}, and only NanoChatForCausalLM runs")
    # older files have rope_theta on its own, beside a rope_scaling that is null
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    rope_type = rope if not isinstance(rope, dict) else rope.get("rope_type", rope.get("type"))
    found = {**given, "rope_type": rope_type or "default"}
    for key, value in _FIXED.items():
        if found.get(key, value) != value:
            raise ValueError(f"{file}: {key} is {found[key]!r}, and nanochat's is {value!r}")
    sizes = {ours: given.get(theirs) for ours, theirs in SIZES.items()}
    sizes["n_kv_head"] = sizes["n_kv_head"] or sizes["n_head"]
    if missing := [SIZES[ours] for ours, value in sizes.items() if value is None]:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    config, weights = GPTConfig.from_meta(sizes, str(file)), _read_tensors(directory)
    try:
        recipe = RECIPES["1"].override(
            round_rotary=False,
            eps=given.get("rms_norm_eps", 1e-6),
            softcap=given.get("final_logit_softcapping", 15.0),
            rope_base=rope.get("rope_theta", given.get("rope_theta", 10_000.0)),
        )
        check_weights(weights, config, recipe)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    return config, recipe, weights


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of a folder by nanochat's names; names it does not have stay as they are."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError(
            f"{directory} is in Hugging Face's format: pip install 'microvllm[hf]' to read it"
        ) from None
    files = [directory / "model.safetensors"]
    if not files[0].is_file() and (index := directory / "model.safetensors.index.json").is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise ValueError(f"{index} has no weight_map from tensors to files")
        files = [directory / Path(shard).name for shard in sorted(set(shards.values()))]
    weights = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing (of the weights, only safetensors are read)"
            )
        try:
            tensors = load_file(file)
        except Exception as error:  # safetensors' own error, or the system's
            raise ValueError(f"{file} is not a readable safetensors file: {error}") from None
        for name, tensor in tensors.items():
            for theirs, ours in NAMES.items():
                name = name.replace(theirs, ours)
            weights[name] = tensor
    return weights


def read_tokenizer(file: Path) -> Tokenizer:
    """A tokenizer.json (of the `tokenizers` package) as nanochat's tokenizer.

    Only a byte-level BPE that is split by one pattern and merged in the order of its ids, as
    nanochat's are once converted, has the same meaning there and here. Raises ValueError for any
    other.
    """
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
        return Tokenizer(file.name, pattern, ranks, special)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{file} is no byte-level BPE of nanochat's kind ({type(error).__name__}: {error}): "
            "give tokenizer_path, a directory with nanochat's tokenizer.pkl"
        ) from None


# the hub
# -----------------------------------------------------------------------------


def hub_answers(timeout: float = 3.0) -> bool:
    """Whether the hub is there. Its own packages would retry for half a minute."""
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answers = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=timeout).close()
            answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)  # someone said no, but someone is there
        except (OSError, ValueError):  # no network, a refusal; an HF_ENDPOINT that is no address
            pass

    # in a thread, since looking up a name has no time limit of its own
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(answers)


def fetch(name: str, step: int | None) -> Path:
    """Fetch a checkpoint and its tokenizer from the hub; returns where they lie in its cache.

    name: owner/name or owner/name/folder; step: None is the last. Other steps, optimizer states and
    whatever else is in the repository stay there. The hub shows the progress, and what was fetched
    once is not fetched again.
    Raises FileNotFoundError for what is not there, ConnectionError without a network.
    """
    try:
        from huggingface_hub import list_repo_files, snapshot_download
        from huggingface_hub.utils import RepositoryNotFoundError
    except ImportError:
        raise FileNotFoundError(
            f"there is no directory {name}; if it is a repository on the Hugging Face hub, "
            "pip install 'microvllm[hf]' to fetch it"
        ) from None
    repo, folder = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    denied = FileNotFoundError(
        f"there is no directory {name}, and no repository {repo} on the Hugging Face hub that you "
        "may read (if it is private or gated: `hf auth login`, and ask for access on its page)"
    )
    names = None  # without a network the cache may have it
    try:
        names = list_repo_files(repo) if hub_answers() else None
    except RepositoryNotFoundError:
        raise denied from None
    except Exception as error:  # whatever the http library of the hub's version raises
        reason = f"{type(error).__name__}: {error}"
    else:
        reason = "the hub does not answer"
    wanted = None if names is None else _choose(repo, folder, names, step)
    try:
        cached = snapshot_download(repo, allow_patterns=wanted, local_files_only=names is None)
    except RepositoryNotFoundError:  # a gated one shows its list of files to everybody
        raise denied from None
    except Exception as error:
        if names is not None:
            reason = f"{type(error).__name__}: {error}"
        raise ConnectionError(
            f"there is no directory {name}, and {repo} cannot be fetched from the Hugging Face hub "
            f"nor is it in its cache ({reason.splitlines()[0]:.200}): try again with a network "
            "and without HF_HUB_OFFLINE, or download its files elsewhere and give their directory"
        ) from None
    return Path(cached) / folder


def _choose(repo: str, folder: str, names: list[str], step: int | None) -> list[str]:
    """Which files of a repository are the checkpoint in `folder` and its tokenizer."""
    prefix = f"{folder}/" if folder else ""
    here = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    steps = sorted(int(m[1]) for name in here if (m := re.fullmatch(r"model_(\d+)\.pt", name)))
    if step is not None and step not in steps:
        only = ", ".join(map(str, steps)) or "a model without steps"
        raise FileNotFoundError(f"{repo} has no step {step} in {folder or 'its root'}, only {only}")
    if steps:
        step = steps[-1] if step is None else step
        pattern = rf"(model|meta)_{step:06d}\.(pt|json)"
    else:
        pattern = r"(config|tokenizer)\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
    wanted = [here[name] for name in here if re.fullmatch(pattern, name)]
    if not any(name.endswith((".pt", ".safetensors")) for name in wanted):
        folders = {m[1] for n in names if (m := re.match(r"(.+)/model.*\.(pt|safetensors)$", n))}
        raise FileNotFoundError(
            f"{repo} has neither model_<step>.pt nor model.safetensors in {folder or 'its root'}; "
            f"folders that have: {', '.join(sorted(folders)) or 'none'} (give owner/name/folder)"
        )
    # the tokenizer lies beside the weights, or above them as in nanochat's own tree
    return wanted + [name for name in names if name.split("/")[-1] == "tokenizer.pkl"]
