"""Make a random nanochat checkpoint of any depth and era, so that benchmarks need no download.

    python benchmarks/checkpoint.py OUT --depth 34 --era 1 --vocab 65536

writes a flat directory, like published checkpoints: OUT/model_000000.pt, OUT/meta_000000.json and
OUT/tokenizer.pkl. With --hf (era 1 only) the model is OUT/config.json and OUT/model.safetensors, in
the format of transformers. The weights are random, scaled so that activations stay in range at any
depth. The tokenizer has the single bytes, random words and nanochat's nine special tokens. Its text
has no meaning, but takes the same time as real text.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import sys
import time
from itertools import chain, islice, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # runs from a clone

import tiktoken
import torch

from microvllm.checkpoint import empty_model
from microvllm.model import RECIPES, GPTConfig
from microvllm.sources import exports, huggingface
from microvllm.sources.strict import PATTERN, make_config

SPECIAL = (
    "bos", "user_start", "user_end", "assistant_start", "assistant_end",
    "python_start", "python_end", "output_start", "output_end",
)  # fmt: skip

# tensor -> (mean, standard deviation); random_weights computes those of the other tensors
SIZES = {
    "resid_lambdas": (1.0, 0.05),
    "x0_lambdas": (0.1, 0.02),
    "smear_lambda": (0.5, 0.0),
    "backout_lambda": (0.2, 0.0),
    "transformer.wte.weight": (0.0, 1.0),
}


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the model, which `shape` reads. The default is nanochat's d34."""
    group = parser.add_argument_group("shape of the model")
    group.add_argument("--depth", type=int, default=34, help="layers")
    group.add_argument("--aspect", type=int, default=64, help="width per layer of depth")
    group.add_argument("--width", type=int, help="channels, instead of depth * aspect")
    group.add_argument("--head-dim", type=int, default=128)
    group.add_argument(
        "--kv-heads", type=int, help="key and value heads (default: as many as query heads)"
    )
    group.add_argument("--vocab", type=int, default=65536)
    group.add_argument("--sequence-len", type=int, default=2048)
    group.add_argument("--era", choices=sorted(RECIPES), default="1", help="era of nanochat")
    group.add_argument(
        "--storage",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of the matrices in the file; nanochat's own is float32",
    )


def shape(args: argparse.Namespace) -> dict:
    """nanochat's `model_config` for the options. Raises ValueError if they are inconsistent."""
    if args.vocab < (least := 256 + len(SPECIAL)):
        raise ValueError(f"--vocab must be {least} or more (bytes and specials), got {args.vocab}")
    # as in nanochat, the width is rounded up to whole heads
    heads = math.ceil((args.width or args.depth * args.aspect) / args.head_dim)
    config = {
        "sequence_len": args.sequence_len,
        "vocab_size": args.vocab,
        "n_layer": args.depth,
        "n_head": heads,
        "n_kv_head": args.kv_heads or heads,
        "n_embd": heads * args.head_dim,
    }
    if args.era != "1":
        config["window_pattern"] = "SSSL"
    make_config(config, "the shape")  # raises ValueError
    return config


def random_weights(config: dict, era: str, device: str, storage: torch.dtype, seed: int) -> dict:
    """A random state dict on the CPU. It is drawn on `device`, because a GPU draws two billion
    numbers per second."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = math.ceil(config["vocab_size"] / 64) * 64  # nanochat pads the vocabulary to 64s
    weights = {}
    for name, empty in empty_model(GPTConfig(**config), RECIPES[era], rows).state_dict().items():
        size = empty.shape
        mean, std = SIZES.get(name, (0.0, size[-1] ** -0.5))  # products keep the scale of inputs
        dtype = storage if len(size) == 2 else torch.float32
        if name.endswith("c_proj.weight"):  # 2 * n_layer of them add up in the residual
            std *= (2 * config["n_layer"]) ** -0.5
        if name.startswith("value_embeds"):  # rows that are added to v
            std = 1.0
        if name.startswith(("value_embeds", "transformer.wte")):  # nanochat stores them so, too
            dtype = torch.bfloat16
        tensor = torch.randn(size, device=device, generator=generator).mul_(std).add_(mean)
        weights[name] = tensor.to(dtype).cpu()
    return weights


def random_tokenizer(vocab: int) -> tiktoken.Encoding:
    """A tokenizer of `vocab` tokens: single bytes, random words of two to five letters, and special
    tokens."""
    num_words = vocab - 256 - len(SPECIAL)
    letters = b"etaoinshrdlucmfwypvbgkjqxz"
    words = chain.from_iterable(product(letters, repeat=length) for length in (2, 3, 4, 5))
    tokens = [bytes([byte]) for byte in range(256)] + [bytes(w) for w in islice(words, num_words)]
    return tiktoken.Encoding(
        "rustbpe",
        pat_str=PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={f"<|{name}|>": len(tokens) + i for i, name in enumerate(SPECIAL)},
    )


def make_checkpoint(out: Path, args: argparse.Namespace, device: str) -> Path:
    """Write model, meta and tokenizer into the directory `out`; returns it."""
    config = shape(args)
    weights = random_weights(config, args.era, device, getattr(torch, args.storage), args.seed)
    tokenizer = random_tokenizer(args.vocab)
    out.mkdir(parents=True, exist_ok=True)
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # they take two thirds of the time
    torch.save(weights, out / "model_000000.pt")
    torch.serialization.set_crc32_options(checksums)
    (out / "tokenizer.pkl").write_bytes(pickle.dumps(tokenizer, protocol=4))
    meta = {
        "step": 0,
        "val_bpb": None,
        "model_config": config,
        "user_config": {"depth": args.depth},
    }
    (out / "meta_000000.json").write_text(json.dumps(meta, indent=2))
    return out


def make_hf_folder(out: Path, args: argparse.Namespace, device: str) -> Path:
    """Write a Hugging Face folder of NanoChat, and a tokenizer.pkl, into `out`; returns it.

    Raises ValueError for any era except the first, the only one that transformers supports.
    """
    if args.era != "1":
        raise ValueError(f"transformers has only nanochat's era 1, not --era {args.era}")
    from safetensors.torch import save_file

    config = shape(args)
    storage = getattr(torch, args.storage)
    weights = {}
    for name, tensor in random_weights(config, args.era, device, storage, args.seed).items():
        for hf_name, nanochat_name in exports.NAMES.items():
            name = name.replace(nanochat_name, hf_name)
        # in this format, padding rows of the vocabulary would be tokens
        padded = name.startswith(("lm_head", "model.embed_tokens"))
        tensor = tensor[: args.vocab] if padded else tensor
        weights[name] = tensor.to(storage).contiguous()
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    tokenizer = random_tokenizer(args.vocab)
    (out / "tokenizer.pkl").write_bytes(pickle.dumps(tokenizer, protocol=4))
    bos, end = (tokenizer._special_tokens[f"<|{name}|>"] for name in ("bos", "assistant_end"))
    settings = {hf_key: config[key] for key, hf_key in huggingface.SIZES.items()}
    settings |= {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "intermediate_size": 4 * config["n_embd"],
        "bos_token_id": bos,
        "eos_token_id": [end, bos],
        "pad_token_id": bos,
        "hidden_act": "relu2",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "final_logit_softcapping": 15.0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "dtype": args.storage,
    }
    (out / "config.json").write_text(json.dumps(settings, indent=2))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="directory to write into")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hf", action="store_true", help="write a Hugging Face folder")
    add_shape_arguments(parser)
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        (make_hf_folder if args.hf else make_checkpoint)(args.out, args, args.device)
    except ValueError as error:
        parser.error(str(error))
    name = "model.safetensors" if args.hf else "model_000000.pt"
    size = (args.out / name).stat().st_size
    print(f"{args.out}: era {args.era}, {size / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
