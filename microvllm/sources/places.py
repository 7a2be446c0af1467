"""Where a model comes from: a directory, a place in nanochat's tree, or the Hugging Face hub."""

import os
import re
from pathlib import Path

from .. import checkpoint
from ..tokenizer import Tokenizer
from . import hub, huggingface, quantised, strict


def find_checkpoint(name, step: int | None = None) -> tuple[Path, int | None]:
    """The directory and the step of a checkpoint; the step is None in Hugging Face's format.

    name: a directory with model_<step>.pt and meta_<step>.json, or with config.json and
    model.safetensors; or, where there is none, source[:tag[:step]] in nanochat's own tree, see
    find_nanochat, or owner/name[/folder] on the Hugging Face hub. step: by default the last one.
    Raises FileNotFoundError or ValueError naming what is not there, ConnectionError without a hub.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(f"model_path must be a string or a path, got {name!r:.80}")
    directory = Path(os.path.abspath(os.path.expanduser(name)))
    if isinstance(name, str) and not directory.exists():
        if place := re.fullmatch(r"(base|mid|sft|rl)(?::([^:]*)(?::(\d+))?)?", name):
            directory = find_nanochat(place[1], place[2] or None)
            if place[3] and step not in (None, int(place[3])):
                raise ValueError(f"{name!r} and step={step} ask for two steps, give one of them")
            step = int(place[3]) if place[3] else step
        elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)+", name):
            directory = hub.fetch(name, step)
    if (directory / "config.json").is_file() and not any(directory.glob("model_*.pt")):
        if step is not None:
            raise ValueError(f"{directory} is in Hugging Face's format, without steps: {step=}")
        return directory, None
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is not a directory: give one with model_<step>.pt in it, a place in "
            "nanochat's tree (sft, base:d20, rl:d20:650), or owner/name on the Hugging Face hub"
        )
    return directory, checkpoint.find_step(directory, step)


def find_nanochat(source: str, model_tag: str | None = None) -> Path:
    """The checkpoint directory as nanochat lays them out: <source>_checkpoints/<tag> in its base
    directory or, where NANOCHAT_EXPERIMENT names one, <tag>/<source> in an experiment's. model_tag:
    by default the largest d<number>, else the newest. Raises ValueError or FileNotFoundError naming
    what there is."""
    folders = {"base": "base", "mid": "mid", "sft": "chatsft", "rl": "chatrl"}
    if source not in folders:
        raise ValueError(f"source must be one of {', '.join(folders)}, got {source!r}")
    base = checkpoint.nanochat_base()
    directory, below = base / f"{folders[source]}_checkpoints", "*"
    remedy = "NANOCHAT_BASE_DIR names the base directory"
    if experiment := os.environ.get("NANOCHAT_EXPERIMENT"):
        remedy = f"NANOCHAT_EXPERIMENT names the experiment: unset it for those in {directory}"
        root = Path(os.environ.get("NANOCHAT_EXPERIMENTS_DIR") or base / "experiments")
        directory, below = root / experiment, f"*/{source}"
    places = [place for place in directory.glob(below) if place.is_dir()]
    tags = {place.relative_to(directory).parts[0]: place for place in places}
    if not tags:
        raise FileNotFoundError(f"{directory} has no {source} checkpoints ({remedy})")
    if model_tag is None:
        numbered = [(int(m[1]), tag) for tag in tags if (m := re.match(r"d(\d+)", tag))]
        newest = max(tags, key=lambda tag: tags[tag].stat().st_mtime)
        return tags[max(numbered)[1] if numbered else newest]
    if model_tag not in tags:
        raise FileNotFoundError(f"{directory} has no {model_tag!r}, only {', '.join(sorted(tags))}")
    return tags[model_tag]


def is_base(directory: Path, step: int | None) -> bool:
    """Was a checkpoint that find_checkpoint found only pretrained, and never trained to chat?
    nanochat keeps those in base_checkpoints, and of its programs only base_train writes a
    device_batch_size beside the model_config. Hugging Face's format does not tell; a quantised
    folder does. Raises ValueError for a file that cannot be read."""
    if step is None and (told := quantised.facts(directory)):
        return told["base"]
    if step is None or directory.parent.name == "base_checkpoints":
        return step is not None
    return "device_batch_size" in strict.read_json(directory / f"meta_{step:06d}.json")


def read_checkpoint(directory: Path, step: int | None) -> strict.Checkpoint:
    """What find_checkpoint found, of any format. Raises ValueError naming the file and what is
    wrong with it."""
    if step is None:
        room = quantised if quantised.facts(directory) else huggingface
        return room.read_folder(directory)
    return strict.read_checkpoint(directory, step)


def open_tokenizer(directory, tokenizer_path=None, trust: bool = False) -> Tokenizer:
    """The tokenizer of the checkpoint in `directory`, or at tokenizer_path: tokenizer.pkl, else
    tokenizer.json; trust: also with a pattern that is not nanochat's. Raises FileNotFoundError
    listing every place that was tried, ValueError for a file that is none."""
    names = "tokenizer.pkl", "tokenizer.json"
    place = checkpoint.find_tokenizer(directory, tokenizer_path, names)
    file = next((place / name for name in names if (place / name).is_file()), place)
    if file.suffix == ".json" and file.is_file():
        return huggingface.read_tokenizer(file, trust)
    return strict.open_tokenizer(file, trust)
