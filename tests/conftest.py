import json
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
ERAS = Path(__file__).parent / "fixtures" / "nanochat_eras"
MODEL = ROOT / "models" / "oldbooks-d6"

torch.set_num_threads(2)


class Fixture:
    """One era's folder: where its checkpoint lies, what nanochat computed with it."""

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
    index = json.loads((ERAS / "index.json").read_text())
    found = {}
    for entry in index["fixtures"]:
        if entry["dir"].startswith("era"):
            found[entry["dir"]] = (entry, "goldens.json")
    found["era3b_late"] = (found["era3b"][0], "goldens_1076f97.json")
    return found


@pytest.fixture(params=list(era_fixtures()))
def era(request) -> Fixture:
    return Fixture(*era_fixtures()[request.param])
