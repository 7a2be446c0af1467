"""Checkpoint files: which era they are, where they are looked for, and how they are refused."""

import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ERAS, MODEL, Fixture, era_fixtures

from microvllm import LLM, SamplingParams
from microvllm.checkpoint import (
    check_weights,
    find_nanochat,
    find_tokenizer,
    load_model,
    pick_device,
    recognise,
)
from microvllm.model import GPTConfig

UNSUPPORTED = json.loads((ERAS / "unsupported_keys.json").read_text())["variants"]
FIXTURES = {name: Fixture(*entry) for name, entry in era_fixtures().items()}


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
        self.file, self.meta = (
            self.directory / "model_000007.pt",
            self.directory / "meta_000007.json",
        )
        self.write()

    def write(self, step: int = 7) -> None:
        torch.save(self.weights, self.directory / f"model_{step:06d}.pt")
        meta = {"step": step, "val_bpb": None, "model_config": self.config}
        (self.directory / f"meta_{step:06d}.json").write_text(json.dumps(meta))

    def load(self, **kwargs):
        return load_model(self.directory, **{"attention": "sdpa"} | kwargs)


@pytest.fixture
def checkpoint(tmp_path) -> Checkpoint:
    return Checkpoint(tmp_path)


@pytest.fixture
def no_base(tmp_path, monkeypatch):
    """Neither $NANOCHAT_BASE_DIR nor a home with anything in it."""
    monkeypatch.delenv("NANOCHAT_BASE_DIR", raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


# telling the eras apart --------------------------------------------------------------------------


def test_the_era_is_recognised_and_named_in_the_log(era, caplog):
    with caplog.at_level(logging.INFO, logger="microvllm"), LLM(
        era.directory, device="cpu", num_blocks=8, **era.overrides
    ) as llm:  # fmt: skip
        expected = era.json["era"].removesuffix("_late").removesuffix("b")  # 3b has the keys of 3
        assert llm.model.recipe.era == expected
        (line,) = [r.getMessage() for r in caplog.records if r.name == "microvllm"]
        assert f"era {expected}" in line and str(era.directory) in line


@pytest.mark.parametrize("name", ["era1_padded", "era2", "era3", "era3b", "era4", "era5"])
def test_the_prefix_of_a_compiled_module_makes_no_difference(name, tmp_path):
    checkpoint = Checkpoint(tmp_path, name)
    plain = checkpoint.load()
    checkpoint.weights = {f"_orig_mod.{key}": w for key, w in checkpoint.weights.items()}
    checkpoint.write()
    prefixed = checkpoint.load()
    assert prefixed.recipe == plain.recipe
    assert prefixed.weights.keys() == plain.weights.keys()
    for key, weight in plain.weights.items():
        assert torch.equal(weight, prefixed.weights[key])


def test_some_keys_with_the_prefix_and_some_without_are_refused(checkpoint):
    """Or one of two tensors of a name would be dropped without a word."""
    weights = checkpoint.weights
    name = "transformer.h.0.attn.c_q.weight"
    checkpoint.weights = weights | {f"_orig_mod.{name}": weights[name] * 2}
    checkpoint.write()
    with refused(ValueError, checkpoint.file, "_orig_mod."):
        checkpoint.load()


@pytest.mark.parametrize("variant", UNSUPPORTED, ids=lambda v: v["commit"])
def test_experimental_layouts_are_refused_by_name(variant, tmp_path):
    names = {
        "e3f58b8": "v0_lambdas",
        "0b58d70": "v0_lambdas",
        "9a88194": "v0_lambdas",
        "59e36cc": "bigram",
        "5422d3a": "mixture of experts",
        "3a76bb9": "mixture of experts",
    }
    # one number for all, expanded: the file stays small
    weights = {k: torch.zeros(1).expand(shape) for k, shape in variant["keys"].items()}
    with refused(ValueError, "unsupported checkpoint", names[variant["commit"]]) as info:
        recognise(weights)
    assert any(f"'{key}'" in str(info.value) for key in variant["telltale_keys"])
    # and so when it comes from a file, whatever its meta says about experts
    checkpoint = Checkpoint(tmp_path)
    checkpoint.weights = weights
    checkpoint.config = {
        k: v
        for k, v in variant["model_config"].items()
        if k not in ("num_experts", "num_shared_experts", "top_k")
    }
    checkpoint.write()
    with refused(ValueError, checkpoint.file, names[variant["commit"]]):
        checkpoint.load()


@pytest.mark.parametrize("variant", UNSUPPORTED, ids=lambda v: v["commit"])
def test_every_telltale_key_alone_is_enough_to_refuse(variant, checkpoint):
    whole = checkpoint.weights
    for key in variant["telltale_keys"]:
        checkpoint.weights = whole | {key: torch.zeros(1).expand(variant["keys"][key])}
        checkpoint.write()
        with refused(ValueError, checkpoint.file, key):
            checkpoint.load()


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


@pytest.mark.parametrize(
    "name, change, words",
    [
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
    ],
)
def test_mixtures_of_eras_are_refused(name, change, words):
    weights = state_dict(name)
    config = GPTConfig.from_meta(FIXTURES[name].json["model_config"])
    check_weights(weights, config, recognise(weights))
    change(weights)
    with refused(ValueError, *words):
        check_weights(weights, config, recognise(weights))


def test_smear_on_a_model_without_value_embeddings_is_refused():
    weights = state_dict("era2")
    weights |= {SMEAR[0]: torch.zeros(1, 24), SMEAR[1]: torch.ones(1), SMEAR[2]: torch.ones(1)}
    config = GPTConfig.from_meta(FIXTURES["era2"].json["model_config"])
    with refused(ValueError, "value_embeds.", "missing"):
        check_weights(weights, config, recognise(weights))


def test_value_embeddings_on_every_layer_are_refused():
    weights = state_dict("era3")
    weights["value_embeds.0.weight"] = weights[VE]
    weights["transformer.h.0.attn.ve_gate.weight"] = weights[GATE]
    config = GPTConfig.from_meta(FIXTURES["era3"].json["model_config"])
    with refused(ValueError, "unexpected", "value_embeds.0.weight"):
        check_weights(weights, config, recognise(weights))


# what the weights cannot tell --------------------------------------------------------------------


def test_overrides_change_the_recipe_and_nothing_else(checkpoint):
    plain = checkpoint.load()
    for name, value in {"softcap": 20, "round_rotary": True, "eps": 1e-6, "rope_base": 5e4}.items():
        changed = checkpoint.load(**{name: value})
        assert getattr(changed.recipe, name) == value
        assert changed.recipe.override(**{name: getattr(plain.recipe, name)}) == plain.recipe


@pytest.mark.parametrize("name", ["softcapp", "era", "smear", "gate_channels", "foo"])
def test_an_unknown_keyword_names_the_overrides(checkpoint, name):
    with refused(TypeError, f"'{name}'", "softcap", "round_rotary", "rope_base", "qk_scale", "eps"):
        LLM(checkpoint.directory, **{name: 1})


@pytest.mark.parametrize(
    "override",
    [
        {"softcap": 0}, {"softcap": -15.0}, {"softcap": float("nan")}, {"softcap": float("inf")},
        {"softcap": "20"}, {"softcap": True}, {"softcap": None}, {"round_rotary": 0},
        {"round_rotary": "no"}, {"rope_base": 0}, {"eps": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_an_override_that_makes_no_sense_is_refused(checkpoint, override):
    ((name, value),) = override.items()
    with refused(ValueError, name, repr(value)):
        checkpoint.load(**override)


def test_the_vocabulary_may_be_padded_to_any_height(tmp_path):
    checkpoint = Checkpoint(tmp_path, "era1_unpadded")
    assert checkpoint.load().lm_head.rows == 311
    for key in ("transformer.wte.weight", "lm_head.weight"):
        rows = checkpoint.weights[key]
        checkpoint.weights[key] = torch.cat([rows, torch.full((73, rows.shape[1]), 1e4)])
    checkpoint.write()
    model = checkpoint.load()
    assert model.config.vocab_size == model.lm_head.rows == 311  # nobody sees the padding
    with refused(ValueError, "384", "400"):
        checkpoint.config["vocab_size"] = 400
        checkpoint.write()
        checkpoint.load()


def test_embeddings_stored_in_bfloat16_become_float32(checkpoint):
    for dtype in (torch.bfloat16, torch.float16):
        whole = {key: w.to(dtype) for key, w in state_dict("era5").items()}
        checkpoint.weights = whole
        checkpoint.write()
        model = checkpoint.load()
        for key, weight in model.weights.items():
            assert weight.dtype == torch.float32 and torch.equal(weight, whole[key].float())


def test_dtypes_by_name_and_by_torchs_own(checkpoint):
    for dtype in ("float32", "bfloat16", "float16"):
        assert checkpoint.load(dtype=dtype).dtype == getattr(torch, dtype)
        assert checkpoint.load(dtype=getattr(torch, dtype)).wte.dtype == getattr(torch, dtype)
    assert checkpoint.load(dtype="auto").dtype == torch.float32
    for dtype in ("fp32", "float64", torch.float64, torch.int8, None, 32, ["float32"]):
        with refused(ValueError, "dtype", "'auto'", "'bfloat16'", repr(dtype)):
            checkpoint.load(dtype=dtype)


# broken directories and files --------------------------------------------------------------------


def test_a_missing_or_empty_directory(tmp_path):
    with refused(FileNotFoundError, tmp_path / "nowhere", "model_<step>.pt"):
        LLM(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with refused(FileNotFoundError, empty, "model_<step>.pt"):
        LLM(empty)
    (empty / "model_12.pt.tmp").touch()
    (empty / "model_last.pt").touch()
    (empty / "optim_000012.pt").touch()
    with refused(FileNotFoundError, empty, "model_<step>.pt"):
        LLM(str(empty))
    with refused(FileNotFoundError, empty / "model_last.pt"):
        LLM(empty / "model_last.pt")


@pytest.mark.parametrize("path", [None, 5, b"model", ["model"]], ids=str)
def test_a_path_that_is_none(path):
    with refused(TypeError, "model_path", "" if path is None else repr(path)):
        LLM(path)


def test_steps_are_compared_as_numbers(checkpoint):
    for step in (999_999, 1_000_000):
        checkpoint.weights["smear_lambda"].fill_(step)
        checkpoint.write(step)
    assert checkpoint.load().smear_lambda == 1_000_000
    assert checkpoint.load(step=999_999).smear_lambda == 999_999
    assert checkpoint.load(step=7).smear_lambda not in (999_999, 1_000_000)


def test_a_step_that_is_not_there(checkpoint):
    checkpoint.write(40)
    with refused(FileNotFoundError, "model_000030.pt", checkpoint.directory, "40"):
        LLM(checkpoint.directory, step=30)
    for step, error in [(-1, ValueError), ("40", TypeError), (40.0, TypeError), (True, TypeError)]:
        with refused(error, "step", repr(step)):
            LLM(checkpoint.directory, step=step)


def test_a_missing_meta(checkpoint):
    checkpoint.meta.unlink()
    with refused(FileNotFoundError, checkpoint.meta):
        LLM(checkpoint.directory)
    checkpoint.meta.mkdir()
    with refused(FileNotFoundError, checkpoint.meta):
        LLM(checkpoint.directory)


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"model_config": ', b"\xff\xfe\x00", b"[" * 100_000, b"{'a': 1}"]
)
def test_a_meta_that_is_no_json(checkpoint, content):
    checkpoint.meta.write_bytes(content)
    with refused(ValueError, checkpoint.meta, "JSON"):
        LLM(checkpoint.directory)


def test_a_meta_without_a_model_config(checkpoint):
    for content in ("[]", "null", "3", '"model_config"'):
        checkpoint.meta.write_text(content)
        with refused(ValueError, checkpoint.meta, "JSON object"):
            LLM(checkpoint.directory)
    for content in ("{}", '{"step": 7}'):
        checkpoint.meta.write_text(content)
        with refused(ValueError, checkpoint.meta, "model_config"):
            LLM(checkpoint.directory)


REQUIRED = ["sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_meta_that_lacks_a_number_or_has_nonsense_for_it(checkpoint, key):
    right = checkpoint.config.pop(key)
    checkpoint.write()
    with refused(ValueError, checkpoint.meta, key):
        LLM(checkpoint.directory)
    for value in (0, -1, 1.5, float(right), str(right), None, True, [right], 2**40, float("nan")):
        checkpoint.config[key] = value
        checkpoint.write()
        with refused(ValueError, checkpoint.meta, key, repr(value)):
            LLM(checkpoint.directory)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"n_embd": 65}, ["n_embd", "65", "4"]),  # does not split into 4 heads
        ({"n_embd": 60}, ["n_embd", "60"]),  # into heads of 15: no pairs to rotate
        ({"n_kv_head": 3}, ["4", "3", "kv heads"]),
        ({"n_kv_head": 8}, ["8", "kv heads"]),
        ({"window_pattern": "SLX"}, ["window_pattern", "'SLX'"]),
        ({"window_pattern": 3}, ["window_pattern", "3"]),
        ({"window_pattern": ["S", "L"]}, ["window_pattern"]),
        ({"rope_theta": 1e4}, ["rope_theta"]),
        ({"num_experts": 4, "top_k": 2}, ["num_experts", "top_k"]),
        ({"num_experts": 0, "top_k": 2, "num_shared_experts": 1}, ["num_shared_experts"]),
    ],
    ids=str,
)
def test_a_config_that_cannot_be(checkpoint, changes, words):
    checkpoint.config |= changes
    checkpoint.write()
    with refused(ValueError, checkpoint.meta, *words):
        LLM(checkpoint.directory)


def test_a_config_that_is_no_dict(checkpoint):
    for value in (None, [], "d4", 4):
        checkpoint.meta.write_text(json.dumps({"model_config": value}))
        with refused(ValueError, checkpoint.meta, "model_config"):
            LLM(checkpoint.directory)


def test_a_dense_model_of_the_experts_branch_loads(checkpoint):
    plain = checkpoint.load()
    checkpoint.config |= {"num_experts": 0, "top_k": 2}
    checkpoint.write()
    assert checkpoint.load().config == plain.config


@pytest.mark.parametrize(
    "key, smaller",
    [("n_layer", 3), ("n_layer", 1), ("n_head", 2), ("n_kv_head", 1), ("n_embd", 32)],
)
def test_a_config_of_another_model(checkpoint, key, smaller):
    for value in (smaller, checkpoint.config[key] * 2):
        with refused(ValueError, checkpoint.file, "era 5"):
            checkpoint.config |= {"n_head": 4, "n_kv_head": 2} | {key: value}
            if value == 8 and key == "n_head":
                checkpoint.config["n_kv_head"] = 4
            checkpoint.write()
            LLM(checkpoint.directory)


def test_a_number_of_layers_beyond_reason_is_refused_at_once(checkpoint):
    """Two thousand million layers would take all memory to list what is missing."""
    checkpoint.config["n_layer"] = 2**31 - 1
    checkpoint.write()
    with refused(ValueError, "n_layer", str(2**31 - 1)):
        LLM(checkpoint.directory)


@pytest.mark.parametrize("kept", [0, 1, 2, 100, 0.2, 0.5, 0.9, 0.999])
def test_a_truncated_file(checkpoint, kept):
    data = checkpoint.file.read_bytes()
    checkpoint.file.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with refused(ValueError, checkpoint.file, "truncated"):
        LLM(checkpoint.directory)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_of_the_old_format(checkpoint, kept):
    torch.save(checkpoint.weights, checkpoint.file, _use_new_zipfile_serialization=False)
    assert checkpoint.load().recipe.era == "5"
    data = checkpoint.file.read_bytes()
    checkpoint.file.write_bytes(data[: int(kept * len(data))])
    with refused(ValueError, checkpoint.file):
        LLM(checkpoint.directory)


class Hostile:
    """Unpickling it creates the file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False, None], ids=["torch", "torch old", "pickle"])
def test_a_hostile_pickle_is_not_executed(checkpoint, tmp_path, zipped):
    marker = tmp_path / "executed"
    poisoned = checkpoint.weights | {"lm_head.weight": Hostile(marker)}
    if zipped is None:
        plain = {"lm_head.weight": poisoned["lm_head.weight"]}
        checkpoint.file.write_bytes(pickle.dumps(plain, protocol=2))
    else:
        torch.save(poisoned, checkpoint.file, _use_new_zipfile_serialization=zipped)
    with refused(ValueError, checkpoint.file, "mkdir", "nothing of it was run") as info:
        LLM(checkpoint.directory)
    assert not marker.exists()
    assert "weights_only" not in str(info.value)  # torch's own advice is to trust the file
    # the test can fail: a loader that trusts the file does execute it
    torch.load(checkpoint.file, weights_only=False) if zipped is not None else pickle.loads(
        checkpoint.file.read_bytes()
    )
    assert marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(2)],
        torch.zeros(3),
        3,
        None,
        "weights",
        {"model": {"transformer.wte.weight": torch.zeros(2, 2)}},
        {"transformer.wte.weight": [[0.0]]},
        {1: torch.zeros(2)},
        {"step": 7, "lm_head.weight": torch.zeros(2)},
    ],
    ids=str,
)
def test_a_file_that_holds_something_else(checkpoint, content):
    torch.save(content, checkpoint.file)
    with refused(ValueError, checkpoint.file, "state dict"):
        LLM(checkpoint.directory)


def test_a_file_that_is_no_checkpoint_at_all(checkpoint):
    for content in (b"<!DOCTYPE html><title>404</title>", b"PK\x03\x04" + b"\0" * 50, b"\0" * 4096,
                    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"):  # fmt: skip
        checkpoint.file.write_bytes(content)
        with refused(ValueError, checkpoint.file, "not a readable checkpoint"):
            LLM(checkpoint.directory)
    shutil.make_archive(str(checkpoint.directory / "other"), "zip", checkpoint.tokenizer)
    (checkpoint.directory / "other.zip").replace(checkpoint.file)
    with refused(ValueError, checkpoint.file, "not a readable checkpoint"):
        LLM(checkpoint.directory)


def test_missing_extra_and_misshapen_tensors_are_all_named(checkpoint):
    weights = checkpoint.weights
    del weights["transformer.h.2.mlp.c_fc.weight"]
    weights["transformer.h.4.attn.c_q.weight"] = torch.zeros(64, 64)
    weights["transformer.h.3.attn.c_k.weight"] = torch.zeros(64, 64)
    weights["x0_lambdas"] = weights["x0_lambdas"].long()
    checkpoint.write()
    with refused(
        ValueError, checkpoint.file, "era 5",
        "1 missing (transformer.h.2.mlp.c_fc.weight)",
        "1 unexpected (transformer.h.4.attn.c_q.weight)",
        "1 misshapen (transformer.h.3.attn.c_k.weight is (64, 64), not (32, 64))",
        "1 not floating point (x0_lambdas)",
    ):  # fmt: skip
        LLM(checkpoint.directory)


@pytest.mark.parametrize("name", ["era1_padded", "era2", "era3", "era4", "era5"])
def test_no_tensor_may_be_missing_misshapen_or_whole_numbers(name):
    """Each in its turn. What tells the era may be taken for another era's, and is refused too."""
    config = GPTConfig.from_meta(FIXTURES[name].json["model_config"])
    whole = state_dict(name)
    for key, weight in whole.items():
        changes = {
            "missing": None,
            "flat": weight.flatten()[None, None],
            "longer": torch.cat([weight, weight]),
            "scalar": torch.tensor(1.0),
            "empty": torch.zeros(0),
            "int8": weight.to(torch.int8),
            "bool": weight > 0,
            "complex": weight.to(torch.complex64),
        }
        for change, value in changes.items():
            weights = dict(whole)
            if value is None:
                del weights[key]
            else:
                weights[key] = value
            with pytest.raises(ValueError) as error:
                check_weights(weights, config, recognise(weights))
            tells = key.endswith("ve_gate.weight") or key.startswith("value_embeds")
            assert key in str(error.value) or tells or "wte" in key, (key, change)


def test_an_empty_state_dict(checkpoint):
    checkpoint.weights = {}
    checkpoint.write()
    with refused(ValueError, checkpoint.file, "0 tensors"):
        LLM(checkpoint.directory)


# the tokenizer -----------------------------------------------------------------------------------


def test_a_vocabulary_that_does_not_match(checkpoint):
    with refused(ValueError, "311", "4096", "tokenizer_path"):
        LLM(checkpoint.directory, tokenizer_path=MODEL.parent / "tokenizer")


def test_a_missing_tokenizer_lists_the_places_that_were_tried(checkpoint, tmp_path, no_base):
    shutil.rmtree(checkpoint.tokenizer)
    home = no_base / ".cache/nanochat/tokenizer"
    with refused(FileNotFoundError, checkpoint.tokenizer, home, "tokenizer_path"):
        LLM(checkpoint.directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
        with refused(FileNotFoundError, tmp_path / "base/tokenizer", home, "tokenizer_path"):
            LLM(checkpoint.directory)
    with refused(FileNotFoundError, tmp_path / "elsewhere", "tokenizer_path"):
        LLM(checkpoint.directory, tokenizer_path=tmp_path / "elsewhere")


def test_a_hostile_or_foreign_tokenizer_is_refused_and_not_executed(checkpoint, tmp_path):
    marker = tmp_path / "executed"
    for content in (Hostile(marker), {"vocab": 3}, [1, 2]):
        (checkpoint.tokenizer / "tokenizer.pkl").write_bytes(pickle.dumps(content))
        with refused(ValueError, checkpoint.tokenizer / "tokenizer.pkl"):
            LLM(checkpoint.directory)
    assert not marker.exists()


def test_where_a_tokenizer_is_looked_for_and_in_which_order(tmp_path, monkeypatch, no_base):
    base, model = tmp_path / "base", tmp_path / "runs" / "model"
    model.mkdir(parents=True)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    places = [model.parent / "tokenizer", base / "tokenizer", no_base / ".cache/nanochat/tokenizer"]
    for place in places:
        place.mkdir(parents=True)  # an empty directory is no tokenizer
    with refused(FileNotFoundError, *places, "tokenizer_path"):
        find_tokenizer(model)
    spellings = [model, f"{model}/", f"{model}///", f"{model}/../model/.", os.path.relpath(model)]
    for place in reversed(places):  # each takes precedence over those that came before it
        (place / "tokenizer.pkl").touch()
        assert [find_tokenizer(spelled) for spelled in spellings] == [place] * len(spellings)
    assert find_tokenizer(model, tmp_path / "mine") == tmp_path / "mine"


def test_a_trailing_slash_changes_nothing(checkpoint, no_base, monkeypatch):
    for spelled in (f"{checkpoint.directory}/", f"{checkpoint.directory}//", checkpoint.directory):
        with LLM(spelled, device="cpu", num_blocks=4) as llm:
            assert llm.tokenizer.vocab_size == 311
    monkeypatch.chdir(checkpoint.directory)
    for spelled in (".", "./", "../model/"):
        with LLM(spelled, device="cpu", num_blocks=4) as llm:
            assert llm.tokenizer.vocab_size == 311


def test_a_flat_folder_as_published_has_its_tokenizer_inside(checkpoint, no_base):
    (checkpoint.tokenizer / "tokenizer.pkl").rename(checkpoint.directory / "tokenizer.pkl")
    assert find_tokenizer(checkpoint.directory) == checkpoint.directory


def test_a_tilde_is_the_home_directory(checkpoint, no_base):
    shutil.move(checkpoint.directory, no_base / "model")
    shutil.move(checkpoint.tokenizer, no_base / "tokenizer")
    with LLM("~/model", tokenizer_path="~/tokenizer", device="cpu", num_blocks=4) as llm:
        assert llm.tokenizer.vocab_size == 311


# as nanochat lays them out -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["era1_padded", "era2", "era3b", "era5"])
def test_a_base_directory_of_nanochat(name, monkeypatch):
    fixture = FIXTURES[name]
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(ERAS / name))
    wanted = fixture.json["checkpoint"]
    folder = find_nanochat(wanted["source"])
    assert folder == fixture.directory and folder.name == wanted["model_tag"]
    tag = wanted["model_tag"]
    for arguments in [
        {"source": wanted["source"]},
        {"source": wanted["source"], "model_tag": tag, "step": wanted["step"]},
    ]:
        with LLM.from_nanochat(
            **arguments, device="cpu", num_blocks=64, **fixture.overrides
        ) as llm:  # fmt: skip
            prompt = fixture.json["prompts"][4]
            params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
            (output,) = llm.generate([prompt["ids"]], params, use_tqdm=False)
            assert output["token_ids"] == prompt["greedy_tokens"]


def test_the_default_source_is_sft(monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(ERAS / "era5"))
    with LLM.from_nanochat(device="cpu", num_blocks=4) as llm:
        assert llm.model.recipe.era == "5"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(ERAS / "era4"))  # base only
    with refused(FileNotFoundError, "chatsft_checkpoints", "NANOCHAT_BASE_DIR"):
        LLM.from_nanochat()
    with refused(ValueError, "source", "'pretrain'", "base", "mid", "sft", "rl"):
        LLM.from_nanochat("pretrain")
    with refused(FileNotFoundError, "'d12'", "d6"):
        LLM.from_nanochat("base", "d12")
    with refused(FileNotFoundError, "model_000001.pt"):
        LLM.from_nanochat("base", step=1)


def test_the_default_tag_is_the_largest_number_else_the_newest(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    folder = tmp_path / "base_checkpoints"
    with refused(FileNotFoundError, folder, "NANOCHAT_BASE_DIR"):
        find_nanochat("base")
    folder.mkdir()
    (folder / "d99").touch()  # a file is no checkpoint
    with refused(FileNotFoundError, folder, "NANOCHAT_BASE_DIR"):
        find_nanochat("base")
    for age, tag in enumerate(["newest", "middle", "depth"]):
        (folder / tag).mkdir()
        os.utime(folder / tag, (1e9 - age, 1e9 - age))
    assert find_nanochat("base") == folder / "newest"
    for tag, expected in [("d4", "d4"), ("d20", "d20"), ("d9", "d20"), ("d32-long", "d32-long")]:
        (folder / tag).mkdir()
        assert find_nanochat("base") == folder / expected
    assert find_nanochat("base", "middle") == folder / "middle"
    for tag in ("../base_checkpoints", "", ".", "d99", "D4"):
        with refused(FileNotFoundError, repr(tag), "d20", "newest"):
            find_nanochat("base", tag)


def test_each_source_has_its_folder(tmp_path, monkeypatch, no_base):
    folders = {"base": "base", "mid": "mid", "sft": "chatsft", "rl": "chatrl"}
    for base in (tmp_path / "base", no_base / ".cache/nanochat"):
        for folder in folders.values():
            (base / f"{folder}_checkpoints" / "d4").mkdir(parents=True)
    for source, folder in folders.items():
        home = no_base / ".cache/nanochat"
        assert find_nanochat(source) == home / f"{folder}_checkpoints" / "d4"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
            expected = tmp_path / "base" / f"{folder}_checkpoints" / "d4"
            assert find_nanochat(source) == expected


# the machine -------------------------------------------------------------------------------------


def test_a_card_has_the_name_that_its_tensors_have(monkeypatch):
    """Or a live module's weights would be copied: torch.device("cuda") is not cuda:0."""
    numbers = {"is_available": True, "device_count": 2, "current_device": 1, "set_device": None}
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 1)


def test_devices_by_name():
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert pick_device("auto") == torch.device("cpu")
    for name in ("gpu", "", "cuda:x", None, 1.5, "xpu", "meta"):
        with refused(ValueError, "device", repr(name), "auto"):
            pick_device(name)
    if not torch.cuda.is_available():
        for name in ("cuda", "cuda:1"):
            with refused(ValueError, repr(name), "not available", "auto"):
                pick_device(name)
