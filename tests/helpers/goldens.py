"""Where the project's files are, and what nanochat itself computed with a model of each era."""

import json
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src"
PACKAGE = SRC / "microvllm"
ERAS = ROOT / "tests" / "fixtures" / "nanochat_eras"
MODEL = ROOT / "models" / "oldbooks-d6"


class Fixture:
    """The folder of one era: where its checkpoint is, and nanochat's logits and greedy tokens."""

    def __init__(self, entry: dict, goldens: str):
        self.entry = entry
        self.directory = (ERAS / entry["checkpoint"]).parent
        self.tokenizer = ERAS / "tokenizer"
        folder = ERAS / entry["dir"]
        self.json = json.loads((folder / goldens).read_text())
        self.arrays = np.load(folder / goldens.replace(".json", ".npz"))
        names = {"logit_softcap": "softcap", "rope_cos_sin_rounded_to_bf16": "round_rotary"}
        needed = self.json.get("overrides_needed") or {}
        self.overrides = {names[key]: value for key, value in needed.items()}


def era_fixtures() -> dict[str, tuple[dict, str]]:
    """The arguments of Fixture for each era."""
    index = json.loads((ERAS / "index.json").read_text())
    found = {}
    for entry in index["fixtures"]:
        if entry["dir"].startswith("era"):
            found[entry["dir"]] = (entry, "goldens.json")
    found["era3b_late"] = (found["era3b"][0], "goldens_1076f97.json")
    return found


FIXTURES = {name: Fixture(*found) for name, found in era_fixtures().items()}
