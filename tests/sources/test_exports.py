"""Hugging Face folders with nanochat's own sizes, models that are not what their tensors say, and
conversion between the formats."""

import json
import os
import re
import shutil
import stat
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers.checkpoints import Checkpoint, refused, state_dict
from helpers.goldens import ERAS, FIXTURES, Fixture
from helpers.sources import live, tokenizer_json
from safetensors.torch import load_file, save_file

from microvllm import LLM, SamplingParams
from microvllm.features.live import from_module
from microvllm.loading import build_model, find_checkpoint, load_model, read_checkpoint
from microvllm.model import RECIPES
from microvllm.sources import exports, places, strict

pytestmark = pytest.mark.usefixtures("one_thread")
HF = ERAS / "hf_era1_padded"
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
# what transformers writes into every config.json, and exporters beside it
THEIRS = {
    "auto_map": {"AutoConfig": "configuration_nanochat.NanochatConfig"}, "bos_token_id": 302,
    "dtype": "bfloat16", "eos_token_id": 302, "hidden_size": 1, "id2label": {"0": "LABEL_0"},
    "is_encoder_decoder": False, "max_position_embeddings": 7, "model_type": "nanochat",
    "num_hidden_layers": 99, "pad_token_id": 302, "padded_vocab_size": 320,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True, "torch_dtype": "float32", "transformers_version": "5.24.0",
    "use_cache": True, "disable_value_embeds": False,
}  # fmt: skip


def export(
    folder: Path, fixture: Fixture, weights: dict | None = None, prefix="model.",
    architecture="NanochatForCausalLM", **changes,
) -> Path:  # fmt: skip
    """A folder as exporters of the later eras write it; a key of the config that is None is left
    out."""
    meta = json.loads(next(fixture.directory.glob("meta_*.json")).read_text())
    config = THEIRS | meta["model_config"] | {"architectures": [architecture]} | changes
    folder.mkdir()
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    if weights is None:
        weights = state_dict(fixture.entry["dir"])
    weights = {prefix + name: weight.contiguous() for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(fixture.tokenizer / "tokenizer.pkl", folder)
    return folder


def assert_same(found: tuple, expected: tuple) -> None:
    """Two checkpoints are one, bit for bit."""
    assert found[:2] == expected[:2] and found[2].keys() == expected[2].keys()
    for name, weight in expected[2].items():
        assert found[2][name].dtype == weight.dtype, name
        assert torch.equal(found[2][name], weight), name


def greedy(name, prompts: list[list[int]], **options) -> list[list[int]]:
    with LLM(name, device="cpu", num_blocks=200, max_model_len=500, **options) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    return [output["token_ids"] for output in outputs]


# folders with nanochat's sizes --------------------------------------------------------------------


def test_an_exported_folder_of_any_era_gives_nanochats_tokens(era, tmp_path):
    folder = export(tmp_path / "folder", era)
    prompts = era.json["prompts"]
    found = greedy(folder, [p["ids"] for p in prompts], **era.overrides)
    assert found == [p["greedy_tokens"] for p in prompts]


@pytest.mark.parametrize("prefix", ["model.", "gpt.", "", "model._orig_mod."])
@pytest.mark.parametrize("architecture", ["NanochatForCausalLM", "NanoChatForCausalLM"])
@pytest.mark.parametrize("name", ["era1_unpadded", "era5"])
def test_an_exported_folder_is_the_checkpoint_it_was_made_from(
    name, architecture, prefix, tmp_path
):
    folder = export(tmp_path / "folder", FIXTURES[name], None, prefix, architecture)
    expected = read_checkpoint(*find_checkpoint(FIXTURES[name].directory))
    assert_same(read_checkpoint(*find_checkpoint(folder)), expected)


def test_the_model_type_is_enough(tmp_path):
    folder = export(tmp_path / "folder", FIXTURES["era5"], architectures=None)
    assert load_model(folder).recipe.era == "5"


def test_an_exported_folder_may_be_sharded_and_all_in_bfloat16(tmp_path):
    halves = {name: weight.bfloat16() for name, weight in state_dict("era5").items()}
    folder = export(tmp_path / "folder", FIXTURES["era5"], halves)
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(whole)}
    for shard in set(shards.values()):
        save_file({n: w for n, w in whole.items() if shards[n] == shard}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    _, recipe, weights = read_checkpoint(*find_checkpoint(folder))
    assert recipe == RECIPES["5"] and weights.keys() == halves.keys()
    assert all(torch.equal(weights[name], halves[name]) for name in halves)
    checkpoint = Checkpoint(tmp_path, "era5")
    checkpoint.weights = halves
    checkpoint.write()
    prompts = [p["ids"] for p in FIXTURES["era5"].json["prompts"]]
    assert greedy(folder, prompts) == greedy(checkpoint.directory, prompts)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["config.json", "GPT2LMHeadModel"]),
        ({"num_hash_bits": 20.0}, ["config.json", "['num_hash_bits']", "delete"]),
        ({"num_experts": 8}, ["config.json", "num_experts"]),
        ({"n_kv_head": None}, ["config.json", "lacks ['n_kv_head']"]),
        ({"n_layer": 5}, ["missing", "transformer.h.4."]),
        ({"n_embd": "64"}, ["config.json", "n_embd must be a positive integer", "'64'"]),
        ({"window_pattern": "SSX"}, ["config.json", "window_pattern"]),
        ({"vocab_size": 400}, ["320 rows", "400"]),
    ],
)
def test_an_exported_config_that_is_not_right_is_refused_by_name(tmp_path, changes, words):
    with refused(ValueError, tmp_path / "folder", *words):
        changes = {"architecture": "", **changes} if "architectures" in changes else changes
        load_model(export(tmp_path / "folder", FIXTURES["era5"], **changes))


def test_the_tensors_of_an_exported_folder_are_checked_strictly(tmp_path):
    whole = state_dict("era5")
    cases = {
        "unexpected (more)": whole | {"more": torch.zeros(2)},
        "missing (lm_head.weight)": {n: w for n, w in whole.items() if n != "lm_head.weight"},
        "value_embeds.1.weight is (2, 2)": whole | {"value_embeds.1.weight": torch.zeros(2, 2)},
        "'v0_lambdas'": whole | {"v0_lambdas": torch.zeros(2)},
        "second tensor for lm_head.weight": whole | {"gpt.lm_head.weight": torch.zeros(2)},
    }
    for number, (words, weights) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        with refused(ValueError, folder, words):
            load_model(export(folder, FIXTURES["era5"], weights))


# tensors of era 1 that are of a later model -------------------------------------------------------

LATER = "lambda", "value_embeds", "ve_gate", "smear"  # in the names of what era 1 does not have


def stripped() -> dict[str, torch.Tensor]:
    """The weights of an era-5 model, but for those that era 1 does not know."""
    whole = state_dict("era5").items()
    return {name: weight for name, weight in whole if not any(part in name for part in LATER)}


def plain_checkpoint(directory: Path) -> Checkpoint:
    """An era-5 model that computes what its own weights without the later ones do: these add
    nothing."""
    checkpoint = Checkpoint(directory, "era5")
    for name, weight in checkpoint.weights.items():
        if any(part in name for part in LATER):
            weight.fill_(name == "resid_lambdas")
    checkpoint.write()
    return checkpoint


@pytest.fixture(params=["nanochat", "exported", "theirs"])
def fork(request, tmp_path) -> Path:
    """A stripped model in each format, with the trace that the later code left in its config."""
    if request.param == "exported":
        return export(tmp_path / "fork", FIXTURES["era5"], stripped())
    checkpoint = Checkpoint(tmp_path, "era5")
    checkpoint.weights = stripped()
    if request.param == "theirs":
        checkpoint.config.pop("window_pattern")
    checkpoint.write()
    if request.param == "nanochat":
        return checkpoint.directory
    found = read_checkpoint(*find_checkpoint(checkpoint.directory))
    tokenizer = places.open_tokenizer(checkpoint.directory)
    with exports.converted(found, checkpoint.directory, 7, tokenizer, tmp_path / "fork") as folder:
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = 100_000
        (folder / "config.json").write_text(json.dumps(config | {"window_pattern": "SSSL"}))
    return tmp_path / "fork"


def test_a_later_model_without_its_lambdas_is_refused_and_runs_as_the_refusal_says(fork, tmp_path):
    with refused(ValueError, fork, "era 1", "window_pattern 'SSSL'") as info:
        LLM(fork, device="cpu", num_blocks=4)
    # the first four are those of era 5, its own
    given = re.findall(r"(\w+)=([\w.]+)", str(info.value))[:4]
    given = {name: json.loads(value.lower()) for name, value in given}
    assert given.keys() == {"rope_base", "qk_scale", "short_window", "round_rotary"}
    if (fork / "config.json").is_file() and "hidden_size" in (fork / "config.json").read_text():
        given["eps"] = 2.0**-23  # of transformers' own form
    (tmp_path / "plain").mkdir()
    expected = plain_checkpoint(tmp_path / "plain").directory
    prompts = [p["ids"] for p in FIXTURES["era5"].json["prompts"]]
    assert max(map(len, prompts)) > 128  # a short window
    assert greedy(fork, prompts, **given) == greedy(expected, prompts, **given)


def test_a_part_of_the_constants_is_not_enough(fork):
    needed = {"rope_base": 1e5, "qk_scale": 1.2, "short_window": 512}
    for name in needed:
        with refused(ValueError, fork, "short_window=512"):
            load_model(fork, **{k: v for k, v in needed.items() if k != name})
    recipe = load_model(fork, **needed).recipe
    assert type(recipe) is type(RECIPES["1"]) and recipe.short_window == 512


def test_a_rotation_of_later_code_alone_is_enough_to_refuse(tmp_path):
    for key, changes in {
        "rope_parameters": {"rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"}},
        "rope_theta": {"rope_parameters": None, "rope_theta": 100_000},
    }.items():
        folder = shutil.copytree(HF, tmp_path / key)
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        with refused(ValueError, folder, "rope_theta 100000", "qk_scale=1.2"):
            load_model(folder)
        recipe = load_model(folder, rope_base=1e5, qk_scale=1, short_window=0).recipe
        assert recipe.rope_base == 1e5 and not recipe.short_window
    folder = export(tmp_path / "own", FIXTURES["era1_padded"], rope_theta=1e5, rope_parameters=None)
    with refused(ValueError, folder, "rope_theta 100000"):
        load_model(folder)


def test_a_live_module_is_asked_too():
    for pattern in (None, ""):
        found = from_module(live(FIXTURES["era1_padded"], window_pattern=pattern))
        assert found[1] == RECIPES["1"]
    found = from_module(live(FIXTURES["era1_padded"], window_pattern="L"))
    with refused(ValueError, "the module Live", "window_pattern 'L'", "qk_scale=1.2"):
        build_model(*found, torch.device("cpu"))
    options = {"rope_base": 1e5, "qk_scale": 1.2, "short_window": 512}
    assert build_model(*found, torch.device("cpu"), **options).recipe.qk_scale == 1.2


def test_nothing_is_in_doubt_that_nanochat_wrote(era):
    _, recipe, _ = read_checkpoint(*find_checkpoint(era.directory))
    assert type(recipe) is type(RECIPES["1"])


@pytest.mark.parametrize("value", [-1, 1.5, True, None, "512", 2**31])
def test_a_window_that_makes_no_sense_is_refused(value):
    with refused(ValueError, "short_window must be an integer, 0 or more", repr(value)):
        load_model(FIXTURES["era5"].directory, short_window=value)


# conversion ---------------------------------------------------------------------------------------


def convert(source: Path, output: Path, tokenizer_path=None) -> Path:
    found = find_checkpoint(source)
    tokenizer = places.open_tokenizer(source, tokenizer_path)
    with exports.converted(read_checkpoint(*found), *found, tokenizer, output):
        assert not output.exists() or not any(output.iterdir())
    return output


def test_there_and_back_every_bit_is_the_same(era, tmp_path):
    folder = convert(era.directory, tmp_path / "hf", era.tokenizer)
    back = convert(folder, tmp_path / "back")
    expected = read_checkpoint(*find_checkpoint(era.directory))
    assert_same(read_checkpoint(*find_checkpoint(back)), expected)
    assert find_checkpoint(back)[1] == era.json["checkpoint"]["step"]
    assert sorted(p.name[:4] for p in back.iterdir()) == ["meta", "mode", "toke"]
    prompts = era.json["prompts"]
    for name in (folder, back):
        found = greedy(name, [p["ids"] for p in prompts], **era.overrides)
        assert found == [p["greedy_tokens"] for p in prompts]
    config = json.loads((folder / "config.json").read_text())
    first = era.json["era"] == "1"
    assert config["architectures"] == ["NanoChatForCausalLM" if first else "NanochatForCausalLM"]
    assert ("hidden_size" if first else "n_embd") in config


def test_the_first_era_becomes_what_transformers_loads(tmp_path):
    """The fixture was made for transformers, of the same weights."""
    folder = convert(FIXTURES["era1_padded"].directory, tmp_path / "hf", ERAS / "tokenizer")
    found, expected = (load_file(f / "model.safetensors") for f in (folder, HF))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    found, expected = (json.loads((f / "config.json").read_text()) for f in (folder, HF))
    own = {"max_position_embeddings": 256, "rms_norm_eps": 2.0**-23, "eos_token_id": [302, 306]}
    for key in expected.keys() & found.keys():
        assert found[key] == own.get(key, expected[key]), key
    assert expected.keys() - found.keys() <= {
        "attention_dropout", "initializer_range", "pad_token_id", "transformers_version",
        "use_cache",
    }  # fmt: skip


def test_a_folder_of_hugging_face_becomes_nanochats_and_comes_back(tmp_path):
    folder = shutil.copytree(HF, tmp_path / "folder")
    shutil.copy(ERAS / "tokenizer" / "tokenizer.pkl", folder)
    config, recipe, weights = read_checkpoint(folder, None)
    back = convert(convert(folder, tmp_path / "nano"), tmp_path / "back")
    found = read_checkpoint(back, None)
    assert (tmp_path / "nano" / "model_000000.pt").is_file()
    # nanochat's eps is its own
    assert_same(found, (config, strict.replace(recipe, eps=2.0**-23), weights))


def test_the_tokenizer_comes_along(tmp_path):
    folder = shutil.copytree(HF, tmp_path / "folder")
    tokenizer_json(folder / "tokenizer.json")
    back = convert(convert(folder, tmp_path / "nano"), tmp_path / "back")
    expected = places.open_tokenizer(ERAS / "tokenizer")
    goldens = json.loads((ERAS / "tokenizer_goldens.json").read_text())
    for place in (tmp_path / "nano", back):
        assert (place / "tokenizer.pkl").is_file()
        found = places.open_tokenizer(place)
        assert found.special_tokens == expected.special_tokens
        assert [found.encode(c["text"]) for c in goldens["encode"]] == [
            case["ids"] for case in goldens["encode"]
        ]


def test_what_is_written_has_the_rights_of_any_new_file(tmp_path):
    (tmp_path / "any").touch()
    usual = stat.S_IMODE((tmp_path / "any").stat().st_mode)
    folder = convert(FIXTURES["era1_padded"].directory, tmp_path / "hf", ERAS / "tokenizer")
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {usual}


def test_nothing_is_overwritten(tmp_path):
    source = FIXTURES["era5"].directory
    (tmp_path / "empty").mkdir()
    assert convert(source, tmp_path / "empty", ERAS / "tokenizer").is_dir()  # which is filled
    (tmp_path / "file").touch()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").touch()
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    for name in ("empty", "file", "there", "link", "dangling"):
        with refused(FileExistsError, tmp_path / name, "give a new one"):
            convert(source, tmp_path / name, ERAS / "tokenizer")
    with refused(FileNotFoundError, tmp_path / "no", "create it first"):
        convert(source, tmp_path / "no" / "place", ERAS / "tokenizer")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_comes_up_meanwhile_is_kept(tmp_path):
    found = find_checkpoint(FIXTURES["era5"].directory)
    tokenizer, output = places.open_tokenizer(ERAS / "tokenizer"), tmp_path / "out"
    with pytest.raises(OSError):
        with exports.converted(read_checkpoint(*found), *found, tokenizer, output):
            output.mkdir()
            (output / "mine").write_text("kept")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (output / "mine").read_text() == "kept"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch, error):
    found = find_checkpoint(FIXTURES["era5"].directory)
    tokenizer, output = places.open_tokenizer(ERAS / "tokenizer"), tmp_path / "out"
    with pytest.raises(error):
        with exports.converted(read_checkpoint(*found), *found, tokenizer, output) as folder:
            assert folder.is_dir() and folder.parent == tmp_path
            raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["save_file", "save"])
def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path, monkeypatch, name):
    source = FIXTURES["era1_padded"].directory
    if name == "save":
        source = convert(source, tmp_path / "hf", ERAS / "tokenizer")

    def full(*_):
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(safetensors.torch if name == "save_file" else torch, name, full)
    (tmp_path / "new").mkdir()
    with refused(OSError, source, tmp_path / "new" / "out", "RuntimeError: no space left"):
        convert(source, tmp_path / "new" / "out", ERAS / "tokenizer")
    assert not list((tmp_path / "new").iterdir())


def test_what_the_other_format_cannot_say_is_not_converted(tmp_path, fork):
    folder = shutil.copytree(HF, tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    for key, value, words in (
        ("final_logit_softcapping", 20.0, "softcap=20.0"),
        ("rope_parameters", {"rope_theta": 5e5}, "rope_base=500000.0"),
        ("rms_norm_eps", 0.01, "eps=0.01"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        with refused(ValueError, folder, words):
            convert(folder, tmp_path / "out", ERAS / "tokenizer")
    with refused(ValueError, fork, "microvllm info"):
        convert(fork, tmp_path / "out", ERAS / "tokenizer")
    assert not (tmp_path / "out").exists()


def test_padding_that_does_not_fit_is_refused(tmp_path):
    folder = convert(FIXTURES["era1_padded"].directory, tmp_path / "hf", ERAS / "tokenizer")
    os.remove(folder / "padding.safetensors")
    assert len(read_checkpoint(*find_checkpoint(folder))[2]["lm_head.weight"]) == 311
    for tensors in ({"lm_head.weight": torch.zeros(9, 3)}, {"other": torch.zeros(2)}):
        save_file(tensors, folder / "padding.safetensors")
        with refused(OSError, folder, "cannot be written"):
            convert(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_without_safetensors_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with refused(ImportError, "pip install -e '.[hf]'"):
        convert(FIXTURES["era5"].directory, tmp_path / "hf", ERAS / "tokenizer")
    assert not list(tmp_path.iterdir())
