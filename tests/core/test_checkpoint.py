"""Checkpoints: their era, broken files, where the tokenizer is. What the full engine says of each
mistake is in tests/sources/test_strict.py and tests/sources/test_loading.py."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers.batches import hand_made_batch
from helpers.checkpoints import MIXTURES, Checkpoint, Hostile, refused, state_dict
from helpers.goldens import MODEL, ROOT

from microvllm import checkpoint as checkpoints
from microvllm.attention import PagedKVCache
from microvllm.checkpoint import find_tokenizer, load_model, pick_device
from microvllm.engine import LLM

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_the_era_is_recognised(era):
    expected = era.json["era"].removesuffix("_late").removesuffix("b")  # 3b has the keys of 3
    assert load_model(era.directory).recipe.era == expected


@pytest.mark.parametrize("name", ["era1_padded", "era2", "era3", "era3b", "era4", "era5"])
def test_the_prefix_of_a_compiled_module_makes_no_difference(name, tmp_path):
    checkpoint = Checkpoint(tmp_path, name)
    plain = checkpoint.load()
    checkpoint.weights = {f"_orig_mod.{key}": w for key, w in checkpoint.weights.items()}
    checkpoint.write()
    prefixed = checkpoint.load()
    assert prefixed.recipe == plain.recipe
    found, expected = prefixed.state_dict(), plain.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())


@pytest.mark.parametrize("name, change, words", MIXTURES)
def test_a_mixture_of_eras_is_refused(name, change, words, tmp_path):
    checkpoint = Checkpoint(tmp_path, name)
    change(checkpoint.weights)
    checkpoint.write()
    with refused(ValueError, checkpoint.file):
        checkpoint.load()


@pytest.mark.parametrize("name", ["era1_padded", "era3", "era5"])
def test_no_tensor_may_be_missing_or_misshapen_and_none_may_be_there_besides(name, tmp_path):
    checkpoint = Checkpoint(tmp_path, name)
    whole = checkpoint.weights
    wrong = [whole | {"transformer.h.0.attn.bias": torch.zeros(2)}, {}]
    for key, weight in whole.items():
        wrong.append({k: w for k, w in whole.items() if k != key})
        wrong.append(whole | {key: torch.cat([weight, weight])})
    for checkpoint.weights in wrong:
        checkpoint.write()
        with refused(ValueError, checkpoint.file):
            checkpoint.load()


# what the weights cannot tell --------------------------------------------------------------------


def test_overrides_change_the_recipe_and_nothing_else(checkpoint):
    plain = checkpoint.load()
    for name, value in {"softcap": 20, "round_rotary": True, "eps": 1e-6, "rope_base": 5e4}.items():
        changed = checkpoint.load(**{name: value})
        assert getattr(changed.recipe, name) == value
        assert replace(changed.recipe, **{name: getattr(plain.recipe, name)}) == plain.recipe


def test_the_vocabulary_may_be_padded_to_any_height(tmp_path):
    checkpoint = Checkpoint(tmp_path, "era1_unpadded")
    ids = hand_made_batch([(list(range(9)), 0, 9, [1])], 16)

    def logits(model):
        cache = PagedKVCache(model.config, 2, 16, torch.float32, "cpu")
        return model.logits(model.forward(ids, cache))

    plain = logits(checkpoint.load())
    for key in ("transformer.wte.weight", "lm_head.weight"):
        rows = checkpoint.weights[key]
        checkpoint.weights[key] = torch.cat([rows, torch.full((73, rows.shape[1]), 1e4)])
    checkpoint.write()
    model = checkpoint.load()
    padded = logits(model)
    assert padded.shape[1] == model.config.vocab_size == 311  # without the padding
    torch.testing.assert_close(padded, plain, rtol=0, atol=1e-4)
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
        for key, weight in model.state_dict().items():
            assert weight.dtype == torch.float32 and torch.equal(weight, whole[key].float())


def test_dtypes_by_name_and_by_torchs_own(checkpoint):
    for dtype in ("float32", "bfloat16", "float16"):
        assert checkpoint.load(dtype=dtype).dtype == getattr(torch, dtype)
        model = checkpoint.load(dtype=getattr(torch, dtype))
        assert model.transformer.wte.weight.dtype == getattr(torch, dtype)
        assert {model.resid_lambdas.dtype, model.x0_lambdas.dtype} == {torch.float32}
    assert checkpoint.load(dtype="auto").dtype == torch.float32
    for dtype in ("fp32", "float64", torch.float64, torch.int8, None, 32, ["float32"]):
        with refused(ValueError, "dtype", "'auto'", "'bfloat16'", repr(dtype)):
            checkpoint.load(dtype=dtype)


# broken directories and files --------------------------------------------------------------------


def test_steps_are_compared_as_numbers(checkpoint):
    for step in (999_999, 1_000_000):
        checkpoint.weights["smear_lambda"].fill_(step)
        checkpoint.write(step)
    assert checkpoint.load().smear_lambda == 1_000_000
    assert checkpoint.load(step=999_999).smear_lambda == 999_999
    assert checkpoint.load(step=7).smear_lambda not in (999_999, 1_000_000)


def test_files_that_are_not_there(checkpoint, tmp_path):
    checkpoint.write(40)
    with refused(FileNotFoundError, "model_000030.pt", checkpoint.directory, "40"):
        checkpoint.load(step=30)
    checkpoint.meta.unlink()
    with refused(FileNotFoundError, checkpoint.meta):
        checkpoint.load(step=7)
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in ("model_12.pt.tmp", "model_last.pt", "optim_000012.pt"):
        (empty / name).touch()
    for directory in (empty, empty / "model_last.pt", tmp_path / "nowhere"):
        with refused(FileNotFoundError, directory, "model_<step>.pt"):
            load_model(directory)


def test_a_file_that_is_no_checkpoint_is_refused_by_its_name(checkpoint):
    whole = checkpoint.file.read_bytes()
    contents = [whole[: int(len(whole) * share)] for share in (0, 0.2, 0.5, 0.9, 0.999)]
    contents += [b"<!DOCTYPE html><title>404</title>", b"PK\x03\x04" + bytes(50), bytes(4096)]
    for content in contents:
        checkpoint.file.write_bytes(content)
        with refused(ValueError, checkpoint.file):
            checkpoint.load()
    for content in ([torch.zeros(2)], torch.zeros(3), None, "weights", {1: torch.zeros(2)}, {}):
        torch.save(content, checkpoint.file)
        with refused(ValueError, checkpoint.file):
            checkpoint.load()


def test_a_meta_that_makes_no_sense_is_refused_by_its_name(checkpoint):
    right = dict(checkpoint.config)
    names = right.keys() - {"window_pattern"}
    wrong = [right | {name: value} for name in names for value in (None, 0, -1, 1.5, "x", 2**40)]
    wrong += [{k: v for k, v in right.items() if k != name} for name in names]
    changes = {"n_embd": 60}, {"n_kv_head": 3}, {"n_layer": 2**31 - 1}, {"n_head": 2}, {"rope": 1}
    wrong += [right | change for change in (*changes, {"window_pattern": "SLX"})] + [None, [], "d4"]
    for config in wrong:
        checkpoint.meta.write_text(json.dumps({"model_config": config}))
        with refused(ValueError, checkpoint.directory):
            checkpoint.load()
    for content in (b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"[]", b"{}"):
        checkpoint.meta.write_bytes(content)
        with refused(ValueError, checkpoint.meta):
            checkpoint.load()


@pytest.mark.parametrize("zipped", [True, False, None], ids=["torch", "torch old", "pickle"])
def test_nothing_in_a_file_is_run(checkpoint, tmp_path, zipped):
    marker = tmp_path / "executed"
    poisoned = checkpoint.weights | {"lm_head.weight": Hostile(marker)}
    if zipped is None:
        checkpoint.file.write_bytes(pickle.dumps({"lm_head.weight": Hostile(marker)}, protocol=2))
    else:
        torch.save(poisoned, checkpoint.file, _use_new_zipfile_serialization=zipped)
    with refused(ValueError, checkpoint.file):
        checkpoint.load()
    assert not marker.exists()
    # the test can fail: a loader that trusts the file does run it
    if zipped is None:
        pickle.loads(checkpoint.file.read_bytes())
    else:
        torch.load(checkpoint.file, weights_only=False)
    assert marker.exists()


def test_the_core_refuses_tensors_that_the_file_does_not_hold(checkpoint):
    one = torch.zeros(1)
    for name, weight in checkpoint.weights.items():
        checkpoint.weights[name] = one.expand(weight.shape)
    checkpoint.write()
    with refused(ValueError, checkpoint.file, "larger than the file"):
        checkpoint.load()


def test_a_model_beyond_the_free_memory_is_refused_with_the_numbers(checkpoint, monkeypatch):
    """Before anything of it is made."""
    wanted = 4 * sum(weight.numel() for weight in checkpoint.weights.values())
    wanted += checkpoints.rotary_bytes(checkpoint.load().config, 100)
    monkeypatch.setattr(checkpoints, "free_memory", lambda device: wanted - 1)
    monkeypatch.setattr(checkpoints.GPT, "init_rotary", lambda *_: pytest.fail("it was made"))
    with refused(ValueError, f"{wanted:,}", f"{wanted - 1:,}", "100 positions", "max_model_len"):
        checkpoint.load(max_len=100)


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


# the machine -------------------------------------------------------------------------------------


def test_a_card_has_the_name_that_its_tensors_have(monkeypatch):
    """Or a live module's weights would be copied: torch.device("cuda") is not cuda:0. Which card is
    the current one is the user's own."""
    numbers = {"is_available": True, "device_count": 2, "current_device": 1}
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail("it was set"))
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 1)
    assert pick_device("cuda:0") == torch.device("cuda", 0)


def test_devices_by_name():
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert pick_device("auto") == torch.device("cpu")


def test_loading_does_not_import_torchs_compiler():
    """Which takes a second: first values drawn for a model without memory would."""
    script = f"""
import sys
from microvllm.checkpoint import load_model
load_model({str(MODEL)!r})
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_end_requests_with_an_error(checkpoint, number):
    # they gave token 0 for ever
    name = "transformer.h.0.attn.c_q.weight"
    checkpoint.weights[name] = checkpoint.weights[name].clone()
    checkpoint.weights[name][0, 0] = number
    torch.save(checkpoint.weights, checkpoint.file)
    llm = LLM(checkpoint.directory, num_blocks=20, device="cpu")
    (output,) = llm.generate([[5, 6, 7]])
    assert output["finish_reason"] == "error" and output["token_ids"] == []
    assert output["stop_reason"] == "no token is left to draw"
