"""Checkpoints that a test may break, and how they are refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from microvllm.checkpoint import load_model

from .goldens import ERAS, FIXTURES


def refused(error: type, *words: str, **kwargs):
    """A context in which `error` must be raised with a text that has all the words in it."""

    class Refusal:
        def __enter__(self):
            self.raises = pytest.raises(error, **kwargs)
            self.info = self.raises.__enter__()
            return self.info

        def __exit__(self, *exc):
            done = self.raises.__exit__(*exc)
            for word in words:
                assert str(word) in str(self.info.value), f"{word!r} is not in: {self.info.value}"
            return done

    return Refusal()


def state_dict(name: str) -> dict[str, torch.Tensor]:
    """The weights of an era's fixture, without the prefix."""
    (file,) = FIXTURES[name].directory.glob("model_*.pt")
    weights = torch.load(file, weights_only=True)
    return {key.removeprefix("_orig_mod."): weight for key, weight in weights.items()}


class Checkpoint:
    """A directory that a test may break: <tmp>/model with a step 7, <tmp>/tokenizer beside it."""

    def __init__(self, base: Path, name: str = "era5"):
        self.directory, self.tokenizer = base / "model", base / "tokenizer"
        self.directory.mkdir()
        shutil.copytree(ERAS / "tokenizer", self.tokenizer)
        self.weights = state_dict(name)
        self.config = dict(FIXTURES[name].json["model_config"])
        self.file = self.directory / "model_000007.pt"
        self.meta = self.directory / "meta_000007.json"
        self.write()

    def write(self, step: int = 7) -> None:
        torch.save(self.weights, self.directory / f"model_{step:06d}.pt")
        meta = {"step": step, "val_bpb": None, "model_config": self.config}
        (self.directory / f"meta_{step:06d}.json").write_text(json.dumps(meta))

    def load(self, **kwargs):
        return load_model(self.directory, **kwargs)


class Hostile:
    """Unpickling it creates the file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


# weights that belong to no era -------------------------------------------------------------------


def without(*keys):
    return lambda weights: [weights.pop(key) for key in keys]


def moved(source, target):
    def change(weights):
        weights[target] = weights.pop(source)

    return change


def narrower(width):
    def change(weights):
        for key in weights:
            if key.endswith("ve_gate.weight"):
                weights[key] = torch.zeros(2, width)

    return change


GATE, VE = "transformer.h.1.attn.ve_gate.weight", "value_embeds.1.weight"
SMEAR = ["smear_gate.weight", "smear_lambda", "backout_lambda"]


def drop_value_embeddings(weights):
    for key in list(weights):
        if key.startswith("value_embeds.") or key.endswith("ve_gate.weight"):
            del weights[key]


def one_gate_of_32(weights):
    weights[GATE] = torch.zeros(2, 32)


MIXTURES = [
    ("era5", drop_value_embeddings, ["value_embeds.1.weight", "missing"]),
    ("era5", without("resid_lambdas"), ["resid_lambdas", "missing"]),
    ("era5", without("x0_lambdas"), ["x0_lambdas", "missing"]),
    ("era2", without("resid_lambdas"), ["resid_lambdas", "missing"]),
    ("era2", without("x0_lambdas"), ["x0_lambdas", "missing"]),
    ("era3", without("resid_lambdas", "x0_lambdas"), ["resid_lambdas", "missing"]),
    ("era5", without(SMEAR[0]), [SMEAR[0], "missing"]),
    ("era5", without(SMEAR[1]), [SMEAR[1], "missing"]),
    ("era5", without(SMEAR[2]), [SMEAR[2], "missing"]),
    ("era5", without(SMEAR[0], SMEAR[1]), [SMEAR[0], SMEAR[1], "missing"]),
    ("era3", narrower(20), ["20", "12", "32"]),
    ("era4", narrower(20), ["20", "12", "32"]),
    ("era5", narrower(20), ["20", "12"]),
    ("era5", narrower(32), ["32", "12"]),  # smear with the gates of era 3
    ("era5", one_gate_of_32, ["(2, 32)", "(2, 12)", GATE]),
    ("era3", narrower(0), ["0"]),
    ("era3", without(GATE), [GATE, "missing"]),
    ("era3", without(VE), [VE, "missing"]),
    ("era3", moved(VE, "value_embeds.0.weight"), ["value_embeds.0.weight", "unexpected"]),
    ("era5", moved(VE, "value_embeds.2.weight"), ["value_embeds.2.weight", "unexpected"]),
    ("era3", moved(VE, "value_embeds.9.weight"), ["value_embeds.9.weight", "unexpected"]),
    ("era3", moved(VE, "value_embeds.weight"), ["value_embeds.weight", "unexpected"]),
    (
        "era3",
        moved(GATE, "transformer.h.2.attn.ve_gate.weight"),
        ["transformer.h.2.attn.ve_gate.weight", "unexpected"],
    ),
]
