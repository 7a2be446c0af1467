"""Converts checkpoints between nanochat's format and Hugging Face folders, in both directions.

Tensors are copied bit for bit. An era 1 model becomes a folder for transformers'
NanoChatForCausalLM. That class has no padding of the vocabulary, so the padding is written to a
separate file, from which the opposite conversion restores it. transformers has no later eras; they
keep nanochat's names.
"""

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..lowbit.folder import Stored
from ..model import RECIPES, Recipe
from ..tokenizer import Tokenizer
from . import strict
from .huggingface import SIZES, import_safetensors, read_safetensors

# parts of a tensor's name in transformers -> nanochat's
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
_PADDING = "padding.safetensors"
_TABLES = "transformer.wte.weight", "lm_head.weight"  # era 1: a row for each token, and padding


@contextmanager
def converted(
    checkpoint: strict.Checkpoint, directory: Path, step: int | None, tokenizer: Tokenizer, output
) -> Iterator[Path]:
    """Write a checkpoint that was read from `directory` in the other format. step: None if it was
    in Hugging Face's format. Yields a new folder. It becomes `output` at the end, and is deleted
    after an exception. Raises ValueError if the other format cannot express the checkpoint, OSError
    if writing fails."""
    config, recipe, weights = checkpoint
    if any(isinstance(weight, Stored) for weight in weights.values()):
        raise ValueError(f"{directory} is quantised: convert the checkpoint that it was made from")
    if isinstance(recipe, strict.Questionable):
        raise ValueError(f"{directory} is in doubt (`microvllm info` says why): use it as it is")
    # rounding of tables and eps depend on the format; all other constants must be the era's
    format_constants = {"round_rotary": recipe.round_rotary, "eps": min(recipe.eps, 1e-5)}
    expected = vars(replace(RECIPES[recipe.era], **format_constants))
    if odd := [f"{key}={x}" for key, x in vars(recipe).items() if x != expected[key]]:
        problem = f"has {', '.join(odd)}, which the other format cannot express"
        raise ValueError(f"{directory} {problem}: use it as it is")
    with new_folder(output) as folder:
        try:
            if step is None:
                _to_nanochat(config, recipe.era, dict(weights), directory, folder)
            else:
                _to_huggingface(config, recipe, dict(weights), step, tokenizer, folder)
            (folder / "tokenizer.pkl").write_bytes(pickle.dumps(tokenizer._encoding, 4))
        except ImportError:
            raise
        except Exception as error:  # from torch, safetensors or the system
            problem = f"{type(error).__name__}: {error}"
            raise OSError(f"{directory} cannot be written to {output}: {problem}") from None
        yield folder


def differences(before: Recipe, after: Recipe) -> str:
    """Describe the constants that differ in the other format; "" if none do."""
    changes = []
    if before.eps != after.eps:
        changes.append(f"the norms' eps is {after.eps:.3g} (it was {before.eps:.3g})")
    if before.round_rotary != after.round_rotary:
        new_word, old_word = ("", " not") if after.round_rotary else (" not", "")
        changes.append(f"cos and sin are{new_word} rounded to bfloat16 (they were{old_word})")
    return " and ".join(changes)


@contextmanager
def new_folder(output) -> Iterator[Path]:
    """Yield a new folder next to `output`. It becomes `output` at the end, and is deleted after an
    exception. Raises OSError if `output` exists or cannot be created."""
    output = Path(os.path.abspath(os.path.expanduser(output)))
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output.parent} is not a directory: create it first")
    if os.path.lexists(output):
        if output.is_symlink() or not output.is_dir() or any(output.iterdir()):
            raise FileExistsError(f"{output} exists and is not an empty directory: give a new one")
    folder = output.with_name(f".{output.name}.{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        os.rename(folder, output)  # raises if `output` is not empty any more
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _to_huggingface(config, recipe, weights, step, tokenizer, folder) -> None:
    def save(tensors: dict[str, Tensor], name: str) -> None:
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        import_safetensors(folder).save_file(tensors, folder / name, {"format": "pt"})

    rows = len(weights[_TABLES[0]])
    config_json = {
        "model_type": "nanochat", "step": step, "dtype": str(weights[_TABLES[1]].dtype)[6:],
        "bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(tokenizer.eos_ids),
    }  # fmt: skip
    if recipe.era == "1":
        if rows > config.vocab_size:
            save({name: weights[name][config.vocab_size :] for name in _TABLES}, _PADDING)
        weights |= {name: weights[name][: config.vocab_size] for name in _TABLES}
        for hf_name, name_part in NAMES.items():
            weights = {name.replace(name_part, hf_name): tensor for name, tensor in weights.items()}
        sizes = {hf_name: getattr(config, name) for name, hf_name in SIZES.items()}
        config_json |= sizes | {
            "architectures": ["NanoChatForCausalLM"], "intermediate_size": 4 * config.n_embd,
            "hidden_act": "relu2", "attention_bias": False, "tie_word_embeddings": False,
            "rms_norm_eps": recipe.eps, "final_logit_softcapping": recipe.softcap,
            "rope_parameters": {"rope_type": "default", "rope_theta": recipe.rope_base},
        }  # fmt: skip
    else:
        weights = {f"model.{name}": tensor for name, tensor in weights.items()}
        config_json |= vars(config) | {"architectures": ["NanochatForCausalLM"]}
        config_json["padded_vocab_size"] = rows
    save(weights, "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_json, indent=2))
    for file in folder.glob("*.safetensors"):  # the package makes them readable for the owner only
        shutil.copymode(folder / "config.json", file)


def _to_nanochat(config, era, weights, directory, folder) -> None:
    step = strict.read_json(directory / "config.json").get("step")
    step = step if type(step) is int and 0 <= step < 10**9 else 0
    if (padding := directory / _PADDING).is_file():
        for name, rows in read_safetensors(padding).items():
            weights[name] = torch.cat([weights[name], rows])
    sizes = dict(vars(config))
    if era == "1":
        del sizes["window_pattern"]  # era 1 does not have it
    # clones, since torch.save writes the whole storage of a tensor
    clones = {name: tensor.clone() for name, tensor in weights.items()}
    torch.save(clones, folder / f"model_{step:06d}.pt")
    meta = json.dumps({"step": step, "model_config": sizes}, indent=2)
    (folder / f"meta_{step:06d}.json").write_text(meta)
