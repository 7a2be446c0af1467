"""Downloads a checkpoint and its tokenizer from the Hugging Face hub into the hub's cache."""

import os
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path

from ..environment import how_to_install


def hub_answers(timeout: float = 3.0) -> bool:
    """Return whether the hub is reachable. The hub's packages would retry for half a minute."""
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answers = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=timeout).close()
        except urllib.error.HTTPError:
            pass  # the hub answered, although with an error
        except (OSError, ValueError):  # no network, a refusal, or an invalid HF_ENDPOINT
            return
        answers.append(True)

    # in a thread, since a name lookup has no time limit
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(answers)


def fetch(name: str, step: int | None) -> Path:
    """Download a checkpoint and its tokenizer, and no other files. Returns their folder in the
    hub's cache. name: owner/name or owner/name/folder; step: None is the last. Raises
    FileNotFoundError if they do not exist, ConnectionError without a network."""
    try:
        from huggingface_hub import list_repo_files, snapshot_download
        from huggingface_hub.utils import RepositoryNotFoundError
    except ImportError:
        raise FileNotFoundError(
            f"there is no directory {name}; if it is a repository on the Hugging Face hub, the "
            f"package that downloads it is missing: {how_to_install('hf')}"
        ) from None
    repo, folder = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    not_found = FileNotFoundError(
        f"there is no directory {name}, and no repository {repo} on the Hugging Face hub that you "
        "may read (if it is private or gated: `hf auth login`, and ask for access on its page)"
    )
    names, reason = None, "the hub does not answer"
    try:
        if hub_answers():
            names = list_repo_files(repo)
    except RepositoryNotFoundError:
        raise not_found from None
    except Exception as error:  # the type depends on the http library of the hub's version
        reason = f"{type(error).__name__}: {error}"
    # without a network, the files may be in the cache
    file_names = None if names is None else _choose(repo, folder, names, step)
    try:
        cached = snapshot_download(repo, allow_patterns=file_names, local_files_only=names is None)
    except RepositoryNotFoundError:  # the list of files of a gated repository is public
        raise not_found from None
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
    """Return the files of a repository for the checkpoint in `folder` and its tokenizer."""
    prefix = f"{folder}/" if folder else ""
    paths = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    steps = sorted(int(m[1]) for name in paths if (m := re.fullmatch(r"model_(\d+)\.pt", name)))
    if step is not None and step not in steps:
        only = ", ".join(map(str, steps)) or "a model without steps"
        raise FileNotFoundError(f"{repo} has no step {step} in {folder or 'its root'}, only {only}")
    if steps:
        step = steps[-1] if step is None else step
        pattern = rf"(model|meta)_{step:06d}\.(pt|json)"
    else:
        pattern = r"(config|tokenizer)\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
    file_names = [paths[name] for name in paths if re.fullmatch(pattern, name)]
    if not any(name.endswith((".pt", ".safetensors")) for name in file_names):
        folders = {m[1] for n in names if (m := re.match(r"(.+)/model.*\.(pt|safetensors)$", n))}
        raise FileNotFoundError(
            f"{repo} has neither model_<step>.pt nor model.safetensors in {folder or 'its root'}; "
            f"folders that have: {', '.join(sorted(folders)) or 'none'} (give owner/name/folder)"
        )
    # the tokenizer is next to the weights, or in a folder above, as in nanochat's directories
    return file_names + [name for name in names if name.split("/")[-1] == "tokenizer.pkl"]
