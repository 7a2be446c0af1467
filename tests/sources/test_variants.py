"""Checkpoints under names that are not nanochat's: what exporters, plugins and forks call its
tensors and the keys of its config; and models whose tensors do not prove their era."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import Checkpoint, refused, state_dict
from helpers.goldens import ERAS, FIXTURES
from helpers.sources import logits_of, tokenizer_json
from safetensors.torch import save_file

from microvllm import LLM, SamplingParams
from microvllm.checkpoint import make_model
from microvllm.features.live import from_module
from microvllm.model import GPT, RECIPES
from microvllm.sources import strict, variants
from microvllm.sources.places import find_checkpoint, read_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = next(p["ids"] for p in FIXTURES["era5"].json["prompts"] if p["name"] == "len130")
SIZES = {
    "sequence_len": "max_position_embeddings", "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size",
    "window_pattern": "window_pattern",
}  # fmt: skip
# nanochat's names -> those of transformers' NanoChat, and others' for the parts that it lacks
TRANSFORMERS = {
    r"^transformer\.wte\.": "model.embed_tokens.", r"^transformer\.h\.": "model.layers.",
    r"\.attn\.c_(q|k|v)\.": r".self_attn.\1_proj.", r"\.attn\.c_proj\.": ".self_attn.o_proj.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.", r"\.mlp\.c_proj\.": ".mlp.fc2.",
    r"\.attn\.ve_gate\.": ".self_attn.ve_gate.",
    r"^(?=value_embeds|resid|x0|smear|backout)": "model.",
}  # fmt: skip
WILDAI = TRANSFORMERS | {
    r"\.mlp\.c_fc\.": ".mlp.up_proj.", r"\.mlp\.c_proj\.": ".mlp.down_proj.",
    r"\.attn\.ve_gate\.": ".self_attn.value_embed_gate.",
    r"^model\.value_embeds\.(\d+)\.": r"model.layers.\1.self_attn.value_embed.",
}  # fmt: skip
# of each exporter: the names of its tensors, whether its sizes have transformers' names, its keys
EXPORTERS = {
    "wildai": (WILDAI, True, {
        "model_type": "wildai", "architectures": ["WildAIForCausalLM"], "rotary_base": 100000.0,
        "qk_scale": 1.2, "logit_softcap": 15.0, "value_embed_gate_channels": 12,
        "value_embed_gate_range": 3.0, "smear_channels": 24, "use_cache": True,
        "release": {"name": "19.9m-g900-ai-r0.5", "ai_ratio": 0.5},
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }),
    "nanochat_jp": (TRANSFORMERS, True, {
        "model_type": "nanochat_jp", "architectures": ["NanoChatJPForCausalLM"],
        "rope_theta": 100000.0, "final_logit_softcapping": 15.0, "qk_scalar": 1.2,
        "ve_gate_channels": 12, "smear_channels": 24, "layer_window_sizes": [128, 128, 128, 400],
        "intermediate_size": 256, "initializer_range": 0.02, "tie_word_embeddings": False,
    }),
    "nanoswe": ({}, True, {
        "model_type": "nanochat", "architectures": ["NanoChatForCausalLM"], "rope_theta": 100000.0,
        "qk_norm_scale": 1.2, "logit_softcap": 15.0, "ve_gate_channels": 12,
        "smear_gate_channels": 24, "padded_vocab_size": 320, "pad_vocab_to_multiple": 64,
        "head_dim": 16, "value_embed_layers": [1, 3], "n_experts": 0, "n_experts_active": 2,
        "n_shared_experts": 0, "expert_hidden_mult": 0.25, "expert_hidden": 0,
    }),
    "constants": ({"^": "model."}, False, {
        "model_type": "nanochat", "architectures": None, "rope_base": 100000.0,
        "logit_softcap": 15.0, "qk_scale": 1.2, "ve_gate_channels": 12, "ve_gate_scale": 3.0,
        "smear_gate_channels": 24, "rotary_overcompute": 10, "pad_vocab_size_to": 64,
        "bigram_value_embeds": False, "disable_value_embeds": False, "hidden_size": 64,
    }),
    "atlasion": ({"^": "model."}, False, {
        "model_type": "atlasion_nano", "architectures": ["AtlasionNanoForCausalLM"],
        "pad_vocab_size_to": 64, "ve_gate_channels": 12, "smear_gate_channels": 24,
    }),
    "padding counted": ({}, False, {
        "model_type": "nanochat", "architectures": ["NanochatForCausalLM"], "vocab_size": 320,
        "text_vocab_size": 311,
    }),
}  # fmt: skip


def renamed(weights: dict, names: dict) -> dict:
    found = {}
    for name, weight in weights.items():
        for ours, theirs in names.items():
            name = re.sub(ours, theirs, name)
        found[name] = weight.contiguous()
    return found


def exported(folder: Path, kind: str, era: str = "era5", weights=None, **changes) -> Path:
    """A checkpoint as an exporter writes it; a key that is None is left out."""
    names, is_theirs, keys = EXPORTERS[kind]
    config = dict(FIXTURES[era].json["model_config"])
    if is_theirs:
        config = {SIZES[key]: value for key, value in config.items()}
    config = {k: v for k, v in (config | keys | changes).items() if v is not None}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = renamed(state_dict(era) if weights is None else weights, names)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def load(place: Path, **constants) -> GPT:
    """The core's model of a checkpoint, checked as the full engine checks it."""
    config, recipe, weights = read_checkpoint(*find_checkpoint(place))
    return make_model(config, strict.replace(recipe, **constants), weights, max_len=400)


def assert_equal_logits(found, expected) -> None:
    assert np.array_equal(logits_of(found, PROMPT), logits_of(expected, PROMPT))


# names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EXPORTERS)
def test_an_exporters_names_give_the_logits_of_nanochats_own(kind, tmp_path):
    folder, own = exported(tmp_path / "it", kind), FIXTURES["era5"].directory
    config, recipe, weights = read_checkpoint(*find_checkpoint(folder))
    expected_config, expected_recipe, expected = read_checkpoint(*find_checkpoint(own))
    assert (config, recipe) == (expected_config, expected_recipe) and recipe.era == "5"
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert_equal_logits(load(folder), load(own))


def test_a_model_without_the_rows_of_padding_and_in_bfloat16(tmp_path):
    weights = {name: weight.bfloat16() for name, weight in state_dict("era5").items()}
    for name in weights:
        if name.startswith(("value_embeds", "transformer.wte", "lm_head")):
            weights[name] = weights[name][:311]
    (tmp_path / "own").mkdir()
    own = Checkpoint(tmp_path / "own")
    own.weights = weights
    own.write()
    for kind in "wildai", "nanochat_jp":
        folder = exported(tmp_path / kind, kind, weights=weights)
        assert_equal_logits(load(folder), load(own.directory))


def test_a_folder_of_transformers_that_was_patched_for_era_3(tmp_path):
    """Its epsilon is the one in the file, and its tables are not rounded."""
    patched = {
        "model_type": "nanochat", "architectures": ["NanoChatForCausalLM"], "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "hidden_act": "relu2",
        "final_logit_softcapping": 15.0, "use_resid_lambdas": True, "use_x0_lambdas": True,
        "use_value_embeddings": True, "ve_gate_channels": 32, "attention_bias": False,
        "rope_theta": None, "qk_scalar": None, "smear_channels": None, "layer_window_sizes": None,
    }  # fmt: skip
    folder = exported(tmp_path / "it", "nanochat_jp", "era3", **patched)
    recipe = load(folder).recipe
    assert recipe == strict.replace(RECIPES["3"], eps=1e-6, round_rotary=False)
    own = load(FIXTURES["era3"].directory, eps=1e-6, round_rotary=False)
    assert_equal_logits(load(folder), own)


def test_an_exporter_of_the_first_era(tmp_path):
    keys = {
        "rotary_dim": 16, "activation_function": "relu_squared", "use_rope": True,
        "use_qk_norm": True, "softcap": 15.0, "window_pattern": None, "rope_base": None,
        "logit_softcap": None, "qk_scale": None, "ve_gate_channels": None, "ve_gate_scale": None,
        "smear_gate_channels": None,
    }  # fmt: skip
    folder = exported(tmp_path / "it", "constants", "era1_padded", **keys)
    assert_equal_logits(load(folder), load(FIXTURES["era1_padded"].directory))


def test_a_constant_that_a_config_states_is_the_one_that_runs(tmp_path):
    folder = exported(tmp_path / "hf", "nanoswe", rope_theta=1e6, logit_softcap=30.0)
    own = Checkpoint(tmp_path)
    own.config |= {"rope_theta": 1e6, "logit_softcap": 30.0}
    own.write()
    for place in folder, own.directory:
        recipe = load(place).recipe
        assert (recipe.rope_base, recipe.softcap, recipe.qk_scale) == (1e6, 30.0, 1.2)
    assert_equal_logits(load(folder), load(FIXTURES["era5"].directory, rope_base=1e6,
                                                 softcap=30.0))  # fmt: skip
    assert load(folder, rope_base=2e6).recipe.rope_base == 2e6  # the caller's comes last


def test_a_meta_file_may_name_the_parts_of_the_recipe(tmp_path):
    own = Checkpoint(tmp_path)
    own.config |= {
        "mlp_act": "relu2", "qk_norm": True, "value_embeds": True, "smear": True, "backout": True,
        "layer_lambdas": True, "logit_softcap": True, "embed_norm": True, "init_style": "nanochat",
    }  # fmt: skip
    own.write()
    assert load(own.directory).recipe == RECIPES["5"]
    for key, words in {
        "smear": "there are tensors for it (smear)",
        "layer_lambdas": "there are tensors for it (lambdas)",
        "qk_norm": "nanochat's is True",
        "logit_softcap": "every nanochat has softcap",
    }.items():
        config = dict(own.config)
        own.config[key] = False
        own.write()
        with refused(ValueError, own.file, own.meta.name, f"{key} is False", words):
            load(own.directory)
        own.config = config


@pytest.mark.parametrize(
    "kind, changes, words",
    [
        ("wildai", {"value_embed_gate_channels": 32}, ["is 32", "reads 12"]),
        ("wildai", {"smear_channels": 12}, ["smear_channels is 12", "reads 24"]),
        ("wildai", {"rope_base": 5e5}, ["rotary_base is 100000.0 and rope_base", "keep one"]),
        ("wildai", {"qk_scale": -1}, ["qk_scale must be a positive number"]),
        ("wildai", {"logit_softcap": "15"}, ["softcap must be a positive number", "'15'"]),
        ("wildai", {"tie_word_embeddings": True}, ["tie_word_embeddings is True"]),
        ("wildai", {"hidden_act": "silu"}, ["hidden_act is 'silu'", "'relu2'"]),
        ("wildai", {"laplacian_heads": 2}, ["config.json", "['laplacian_heads']", "delete"]),
        ("wildai", {"num_hidden_layers": 3}, ["unexpected", "misshapen"]),
        ("wildai", {"architectures": ["WildAIForTextEmbedding"]}, ["WildAIForTextEmbedding"]),
        ("nanochat_jp", {"layer_window_sizes": [256] * 4}, ["[256, 256, 256, 256]", "128, 400]"]),
        ("nanoswe", {"n_experts": 4}, ["n_experts", "delete"]),
        ("nanoswe", {"head_dim": 32}, ["head_dim is 32", "16"]),
        ("constants", {"decode_mode": "soft"}, ["decode_mode is 'soft'", "'standard'"]),
        ("constants", {"rope_base": [1]}, ["rope_base must be a positive number"]),
        ("padding counted", {"text_vocab_size": 400}, ["320 rows", "400"]),
    ],
    ids=str,
)
def test_what_contradicts_the_tensors_is_refused_by_name(kind, changes, words, tmp_path):
    with refused(ValueError, tmp_path / "it", *words):
        load(exported(tmp_path / "it", kind, **changes))


def test_tensors_that_are_not_nanochats_are_refused_by_name(tmp_path):
    whole = state_dict("era5")
    for number, (words, more) in enumerate({
        "unexpected (transformer.h.0.mlp.gate_proj.weight)":
            {"transformer.h.0.mlp.gate_proj.weight": torch.ones(2, 2)},
        "unexpected (transformer.h.0.input_layernorm.weight)":
            {"transformer.h.0.input_layernorm.weight": torch.full((64,), 1.5)},
        "second tensor for value_embeds.1.weight":
            {"gpt.value_embeds.1.weight": torch.zeros(2)},
    }.items()):  # fmt: skip
        with refused(ValueError, words):
            load(exported(tmp_path / str(number), "wildai", weights=whole | more))


def test_norms_of_ones_change_nothing(tmp_path):
    more = {f"transformer.h.0.{name}.weight": torch.ones(64, dtype=torch.bfloat16) for name in
            ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm")}  # fmt: skip
    weights = state_dict("era5") | more | {"model.norm.weight": torch.ones(64)}
    folder = exported(tmp_path / "it", "wildai", weights=weights)
    assert_equal_logits(load(folder), load(FIXTURES["era5"].directory))


# models whose tensors do not prove their era ------------------------------------------------------

ERA1 = {"rope_base": 10_000, "qk_scale": 1, "short_window": 0, "round_rotary": True}
ERA5 = {"rope_base": 100_000, "qk_scale": 1.2, "short_window": 512, "round_rotary": False}


def filled(base: Path, parts: str) -> Checkpoint:
    """An era-1 checkpoint, with parts of later eras as loaders fill them in, in fresh folders."""
    base.mkdir()
    found = Checkpoint(base, "era1_padded")
    config, weights = found.config, found.weights
    layers, kv = config["n_layer"], config["n_embd"] // config["n_head"] * config["n_kv_head"]
    weights |= {"resid_lambdas": torch.ones(layers), "x0_lambdas": torch.zeros(layers)}
    channels = {"lambdas": 0, "era 3": 32, "era 5": 12}[parts]
    for layer in range((layers - 1) % 2, layers if channels else 0, 2):
        gate = torch.zeros(config["n_kv_head"], channels)
        weights[f"transformer.h.{layer}.attn.ve_gate.weight"] = gate
        weights[f"value_embeds.{layer}.weight"] = torch.zeros(320, kv)
    if parts == "era 5":
        weights |= {"smear_gate.weight": torch.zeros(1, 24), "smear_lambda": torch.zeros(1)}
        weights |= {"backout_lambda": torch.zeros(1)}
    found.write()
    return found


@pytest.mark.parametrize("parts", ["lambdas", "era 3", "era 5"])
def test_an_era_1_checkpoint_filled_with_zeros_is_refused_and_runs_as_said(parts, tmp_path):
    checkpoint = filled(tmp_path / "it", parts)
    era = {"lambdas": "2", "era 3": "3", "era 5": "5"}[parts]
    words = [f"those of era {era}", "resid_lambdas are all 1 and x0_lambdas all 0", "loaders fill"]
    if parts != "lambdas":
        words.append("value_embeds are all 0")
    if parts == "era 5":
        words.append("smear_lambda is 0")
    with refused(ValueError, checkpoint.file, *words) as info:
        load(checkpoint.directory)
    for name, value in ERA1.items():
        assert f"{name}={value}" in str(info.value)
    with refused(ValueError, checkpoint.file):  # a part of them is not enough
        load(checkpoint.directory, rope_base=10_000, qk_scale=1)
    own = load(FIXTURES["era1_padded"].directory)
    assert_equal_logits(load(checkpoint.directory, **ERA1), own)


def test_a_later_checkpoint_filled_with_a_smear_of_zero_is_refused(tmp_path):
    """Of era 4 then, whose queries and windows are not those of era 5."""
    checkpoint = Checkpoint(tmp_path, "era4")
    checkpoint.weights |= {"smear_gate.weight": torch.rand(1, 24), "smear_lambda": torch.zeros(1)}
    checkpoint.weights["backout_lambda"] = torch.zeros(1)
    checkpoint.write()
    with refused(ValueError, checkpoint.file, "smear_lambda is 0", "qk_scale=1.15"):
        load(checkpoint.directory)
    own = load(FIXTURES["era4"].directory)
    era4 = {"rope_base": 100_000, "qk_scale": 1.15, "short_window": 384}
    assert_equal_logits(load(checkpoint.directory, **era4), own)


def test_a_model_that_was_never_trained_is_in_no_doubt(tmp_path):
    checkpoint = filled(tmp_path / "it", "era 5")
    for name, weight in checkpoint.weights.items():
        if name.endswith("c_proj.weight"):
            weight.zero_()
    checkpoint.write()
    assert load(checkpoint.directory).recipe == RECIPES["5"]


def test_a_live_module_may_have_lambdas_as_they_began(tmp_path):
    model = load(filled(tmp_path / "it", "lambdas").directory, **ERA1)
    assert from_module(model)[1] == RECIPES["2"]


def test_a_hugging_face_folder_filled_with_zeros(tmp_path):
    weights = filled(tmp_path / "it", "lambdas").weights
    keys = dict.fromkeys(EXPORTERS["nanochat_jp"][2]) | {"architectures": ["NanoChatForCausalLM"]}
    folder = exported(tmp_path / "hf", "nanochat_jp", "era1_padded", weights, **keys)
    with refused(ValueError, folder, "era 2", "resid_lambdas are all 1"):
        load(folder)
    own = load(FIXTURES["era1_padded"].directory)
    assert_equal_logits(load(folder, **ERA1), own)


@pytest.mark.parametrize("pattern", ["L", None])
def test_an_hf_compatible_model_is_refused_and_runs_as_said(pattern, tmp_path):
    """Later code without the parts that transformers' NanoChat does not have."""
    checkpoint = Checkpoint(tmp_path, "era1_padded")
    own = load(checkpoint.directory, **ERA5 | {"short_window": 0})
    checkpoint.config |= {"hf_compatible": True, "window_pattern": pattern}
    checkpoint.write()
    with refused(ValueError, checkpoint.file, "hf_compatible", "rope_base=100000", "qk_scale=1.2"):
        load(checkpoint.directory)
    found = load(checkpoint.directory, **ERA5)
    assert found.recipe == strict.replace(RECIPES["1"], **ERA5)
    assert_equal_logits(found, own)  # no window is short, in a pattern without S
    checkpoint.config |= {"hf_compatible": False, "window_pattern": None}
    checkpoint.write()
    assert load(checkpoint.directory).recipe == RECIPES["1"]


def test_an_hf_compatible_model_in_hugging_faces_format(tmp_path):
    folder = shutil.copytree(ERAS / "hf_era1_padded", tmp_path / "it")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 100000.0}
    (folder / "config.json").write_text(json.dumps(config))
    with refused(ValueError, folder, "states rope_theta 100000, but era 1 has 10000"):
        load(folder)
    assert load(folder, **ERA5).recipe.qk_scale == 1.2


@pytest.mark.parametrize(
    "era, changes, words",
    [
        ("era4", {"use_smear": False}, ["era 4", "use_smear"]),
        ("era4", {"smear_gate_channels": 24, "qk_scale": 1.2}, ["smear_gate_channels", "1.2"]),
        ("era3", {"rope_base": 1e5}, ["rope_base 100000, but era 3 has 10000"]),
        ("era5", {"qk_scale": 1.15}, ["qk_scale 1.15, but era 5 has 1.2"]),
        ("era2", {"use_ve": False, "use_backout": False}, ["use_ve, use_backout"]),
        ("era1_padded", {"use_resid_lambdas": False}, ["use_resid_lambdas"]),
    ],
    ids=str,
)
def test_a_config_and_tensors_of_two_eras_are_in_doubt(era, changes, words, tmp_path):
    checkpoint = Checkpoint(tmp_path, era)
    checkpoint.config |= changes
    checkpoint.write()
    with refused(ValueError, checkpoint.file, "qk_scale=1.2, short_window=512", *words):
        load(checkpoint.directory)
    recipe = load(checkpoint.directory, **ERA5).recipe
    assert {name: getattr(recipe, name) for name in ERA5} == ERA5


def test_every_key_has_one_meaning():
    tables = [variants.CONSTANTS, variants.PART_OF, variants.FIXED]
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names)) and set(names) <= variants.KNOWN
    assert set(variants.CONSTANTS.values()) <= vars(RECIPES["5"]).keys()


# folders of many models ---------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path) -> Path:
    """A repository with a folder for each model, code and a tokenizer beside them."""
    root = tmp_path / "models"
    for name in "small-r0.5", "large-r0.5":
        tokenizer_json(exported(root / name, "wildai") / "tokenizer.json")
    for name in "README.md", "modeling_wildai.py", "tokenizer.json":
        (root / name).touch()
    (root / ".cache").mkdir()
    exported(root / ".cache" / "hidden", "wildai")
    return root


def test_a_folder_of_models_is_listed_and_each_of_them_loads(many):
    with refused(FileNotFoundError, many, "large-r0.5, small-r0.5;", many / "large-r0.5") as info:
        LLM(many, device="cpu")
    assert "hidden" not in str(info.value)
    prompt = FIXTURES["era5"].json["prompts"][4]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with LLM(many / "small-r0.5", device="cpu", plain=True, num_blocks=40) as llm:
        (output,) = llm.generate([prompt["ids"]], params, use_tqdm=False)
        assert output["token_ids"] == prompt["greedy_tokens"] and llm.model.recipe.era == "5"


def test_a_config_of_the_whole_repository_is_no_model(many):
    shutil.copy(many / "small-r0.5" / "config.json", many)
    with refused(FileNotFoundError, many, "large-r0.5, small-r0.5"):
        find_checkpoint(many)
    with refused(FileNotFoundError, "large-r0.5, small-r0.5"):
        find_checkpoint(many, 7)


def test_nanochats_own_folders_are_listed_too(tmp_path):
    for place in "base_checkpoints/d4", "experiments/mine/d6/sft", "a/b/c/d", "tokenizer":
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "model_000001.pt").touch()
    shutil.move(tmp_path / "tokenizer/model_000001.pt", tmp_path / "tokenizer/tokenizer.pkl")
    (tmp_path / "deep/a/b/c/d").mkdir(parents=True)
    (tmp_path / "deep/a/b/c/d/model_000001.pt").touch()
    with refused(FileNotFoundError, "nanochat's base directory", "give one of base:d4 and set"):
        find_checkpoint(tmp_path)
    with refused(FileNotFoundError, "have: b/c/d;"):
        find_checkpoint(tmp_path / "a")
    with refused(FileNotFoundError, "has no model_<step>.pt"):  # three levels, no more
        find_checkpoint(tmp_path / "deep")
    with refused(FileNotFoundError, "have: mine/d6/sft;"):
        find_checkpoint(tmp_path / "experiments")
    with refused(FileNotFoundError, "tokenizer has no model_<step>.pt"):
        find_checkpoint(tmp_path / "tokenizer")


def test_of_very_many_models_some_are_listed(tmp_path):
    for i in range(30):
        (tmp_path / f"m{i:02d}").mkdir()
        (tmp_path / f"m{i:02d}" / "model.safetensors").touch()
    with refused(FileNotFoundError, "m00, m01, ", "m19 and 10 more;"):
        find_checkpoint(tmp_path)


def test_a_loop_of_links_ends(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path)
    with refused(FileNotFoundError, "has no model_<step>.pt"):
        find_checkpoint(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "model_000001.pt").touch()
    with refused(FileNotFoundError, "there"):
        find_checkpoint(tmp_path)
