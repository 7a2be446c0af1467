"""Finds and opens models: in a directory, in nanochat's tree, or on the Hugging Face hub."""

import os
import re
from itertools import islice
from pathlib import Path

from .. import checkpoint
from ..lowbit import folder as lowbit_folder
from ..tokenizer import Tokenizer
from . import hub, huggingface, strict

# limits of the search for models in nested folders, and of the list in an error message
_MAX_DEPTH, _MAX_ENTRIES, _MAX_LISTED = 3, 5000, 20
# source -> the prefix of nanochat's <prefix>_checkpoints
FOLDERS = {"base": "base", "mid": "mid", "sft": "chatsft", "rl": "chatrl"}


def find_checkpoint(name, step: int | None = None) -> tuple[Path, int | None]:
    """Return the directory and the step of a checkpoint; the step is None in Hugging Face's format.

    name: a directory with model_<step>.pt and meta_<step>.json, or with config.json and
    model.safetensors. If these files are in folders below it, the error lists the folders. If there
    is no such directory: source[:tag[:step]] in nanochat's tree, see find_nanochat, or
    owner/name[/folder] on the Hugging Face hub. step: default: the last. Raises FileNotFoundError
    or ValueError that names what is missing, ConnectionError if the hub is not reachable.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(f"model_path must be a string or a path, got {name!r:.80}")
    directory = Path(os.path.abspath(os.path.expanduser(name)))
    if isinstance(name, str) and not directory.exists():
        if place := re.fullmatch(r"(base|mid|sft|rl)(?::([^:]*)(?::(\d+))?)?", name):
            directory = find_nanochat(place[1], place[2] or None)
            if place[3] and step not in (None, int(place[3])):
                raise ValueError(f"{name!r} and step={step} are different steps: give one of them")
            step = int(place[3]) if place[3] else step
        elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)+", name):
            directory = hub.fetch(name, step)
    if not _has_model(directory):
        _refuse_base(directory)
    if not _has_model(directory) and (folders := model_folders(directory)):
        listed = ", ".join(map(str, folders[:_MAX_LISTED]))
        more = f" and {len(folders) - _MAX_LISTED} more" * (len(folders) > _MAX_LISTED)
        raise FileNotFoundError(
            f"{directory} has no checkpoint of its own, but these folders in it have: {listed}"
            f"{more}; give one of them, such as {directory / folders[0]}"
        )
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


def _is_model(file: str) -> bool:
    """Return whether a file name is one of a weights file, in any format."""
    return bool(re.fullmatch(r"model_\d+\.pt|model(-\d+-of-\d+)?\.safetensors", file))


def _has_model(directory: Path) -> bool:
    """Return whether the directory itself contains weights."""
    try:
        return any(map(_is_model, os.listdir(directory)))
    except OSError:  # no directory, or one that may not be read
        return False


def model_folders(directory: Path) -> list[Path]:
    """Return the folders below a directory that contain weights, sorted and relative to it. There
    are several in a repository of many models, in nanochat's base directory, or in an experiment.
    The search is limited to three levels and some thousand entries."""
    folders_with_models, queue, num_left = [], [(directory, 0)], _MAX_ENTRIES
    for folder, depth in queue:  # the loop appends to it
        try:
            with os.scandir(folder) as entries:
                entries = [*islice(entries, num_left)]
            folders = [e.name for e in entries if not e.name.startswith(".") and e.is_dir()]
        except OSError:  # not a directory, or not readable
            continue
        num_left -= len(entries)
        if depth and any(_is_model(entry.name) for entry in entries):
            folders_with_models.append(folder.relative_to(directory))
        elif depth < _MAX_DEPTH:
            queue += [(folder / name, depth + 1) for name in sorted(folders)]
    return sorted(folders_with_models)


def _experiment(base: Path, source_folder: Path) -> tuple[Path, str] | None:
    """Return the folder of nanochat's experiments and the name of the selected one. Returns None if
    the checkpoints are in the base directory, as before nanochat had experiments.

    nanochat's rule: the experiment is NANOCHAT_EXPERIMENT, or else "default". It is in
    NANOCHAT_EXPERIMENTS_DIR, or else in "experiments" in the base directory.
    """
    experiments_dir = os.environ.get("NANOCHAT_EXPERIMENTS_DIR")
    root = Path(os.path.expanduser(experiments_dir)) if experiments_dir else base / "experiments"
    if name := os.environ.get("NANOCHAT_EXPERIMENT"):
        return root, name
    is_default = (root / "default").is_dir() and (experiments_dir or not source_folder.is_dir())
    return (root, "default") if is_default else None


def _refuse_base(directory: Path) -> None:
    """Raise FileNotFoundError with the checkpoints' names for nanochat's base directory."""
    tags_of = {
        source: [path.name for path in model_folders(directory / f"{folder}_checkpoints")]
        for source, folder in FOLDERS.items()
    }
    names = [f"{source}:{tag}" for source, tags in tags_of.items() for tag in tags]
    if names:
        is_base_dir = (
            directory.samefile(base) if (base := checkpoint.nanochat_base()).is_dir() else False
        )
        remedy = "" if is_base_dir else f" and set NANOCHAT_BASE_DIR={directory}"
        short = ", ".join(source for source, tags in tags_of.items() if tags)
        raise FileNotFoundError(
            f"{directory} is nanochat's base directory and not a checkpoint: give one of "
            f"{', '.join(names[:_MAX_LISTED])}{remedy}; {short} alone is the largest model of that "
            "source"
        )


def find_nanochat(source: str, model_tag: str | None = None) -> Path:
    """Return a checkpoint directory of nanochat: <source>_checkpoints/<tag> in its base directory,
    or, if NANOCHAT_EXPERIMENT is set, <tag>/<source> in the experiment's directory. model_tag: the
    default is the largest d<number>, or else the newest. Raises ValueError or FileNotFoundError
    with the names of existing ones."""
    if source not in FOLDERS:
        raise ValueError(f"source must be one of {', '.join(FOLDERS)}, got {source!r}")
    base = checkpoint.nanochat_base()
    directory, below = base / f"{FOLDERS[source]}_checkpoints", "*"
    remedy = "NANOCHAT_BASE_DIR names the base directory"
    if experiment := _experiment(base, directory):
        root, name = experiment
        remedy = f"NANOCHAT_EXPERIMENT names the experiment: unset it for those in {directory}"
        others = sorted(p.parent.relative_to(root) for p in root.glob(f"*/*/{source}"))
        if names := sorted({str(other.parent) for other in others} - {name}):
            remedy += f"; experiments that have some: {', '.join(names[:_MAX_LISTED])}"
        directory, below = root / name, f"*/{source}"
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
    """Return whether a checkpoint of find_checkpoint was only pretrained, and not trained to chat.
    nanochat keeps these in base_checkpoints, and only its base_train writes a device_batch_size
    next to model_config. Hugging Face folders do not say it, but quantised folders do. Raises
    ValueError for a file that cannot be read."""
    if step is None and (facts := lowbit_folder.facts(directory)):
        return facts["base"]
    if step is None or directory.parent.name == "base_checkpoints":
        return step is not None
    return "device_batch_size" in strict.read_json(directory / f"meta_{step:06d}.json")


def read_checkpoint(directory: Path, step: int | None) -> strict.Checkpoint:
    """Read a checkpoint of find_checkpoint, of any format. Raises ValueError that names the file
    and the problem."""
    if step is None:
        if lowbit_folder.facts(directory):
            return lowbit_folder.read_folder(directory)
        return huggingface.read_folder(directory)
    return strict.read_checkpoint(directory, step)


def open_tokenizer(directory, tokenizer_path=None, trust: bool = False) -> Tokenizer:
    """Open the tokenizer of the checkpoint in `directory`, or at tokenizer_path: tokenizer.pkl, or
    else tokenizer.json. trust: accept a pattern that is not nanochat's. Raises FileNotFoundError
    with all searched places, ValueError for an invalid file."""
    names = "tokenizer.pkl", "tokenizer.json"
    place = checkpoint.find_tokenizer(directory, tokenizer_path, names)
    file = next((place / name for name in names if (place / name).is_file()), place)
    if file.suffix == ".json" and file.is_file():
        return huggingface.read_tokenizer(file, trust)
    return strict.open_tokenizer(file, trust)
