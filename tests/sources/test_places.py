"""Where nanochat keeps its checkpoints, and which of them is meant."""

import os
import shutil

import pytest
from helpers.checkpoints import refused
from helpers.goldens import ERAS, FIXTURES

from microvllm import LLM, SamplingParams
from microvllm.sources.places import find_checkpoint, find_nanochat

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["era1_padded", "era3b", "era5"])
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


def test_each_source_has_its_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("NANOCHAT_BASE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    home = tmp_path / "home/.cache/nanochat"
    folders = {"base": "base", "mid": "mid", "sft": "chatsft", "rl": "chatrl"}
    for base in (tmp_path / "base", home):
        for folder in folders.values():
            (base / f"{folder}_checkpoints" / "d4").mkdir(parents=True)
    for source, folder in folders.items():
        assert find_nanochat(source) == home / f"{folder}_checkpoints" / "d4"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
            expected = tmp_path / "base" / f"{folder}_checkpoints" / "d4"
            assert find_nanochat(source) == expected


@pytest.mark.parametrize("where", ["base", "its own directory"])
def test_an_experiment_has_its_checkpoints_and_its_tokenizer(where, tmp_path, monkeypatch):
    """<tag>/<source> in place of <source>_checkpoints/<tag>; another tokenizer is in the base."""
    fixture = FIXTURES["era5"]
    root, base = tmp_path / "base" / "experiments", tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setenv("NANOCHAT_EXPERIMENT", "mine")
    if where != "base":
        root = tmp_path / "elsewhere"
        monkeypatch.setenv("NANOCHAT_EXPERIMENTS_DIR", str(root))
    for tag in ("d6", "d20", "flops1e18_d12"):
        (root / "mine" / tag / "base").mkdir(parents=True)
    shutil.copytree(fixture.directory, root / "mine" / "d4" / "sft")
    shutil.copytree(fixture.tokenizer, root / "mine" / "tokenizer")
    shutil.copytree(ERAS.parents[2] / "models" / "tokenizer", base / "tokenizer")
    (base / "chatsft_checkpoints" / "d32").mkdir(parents=True)
    assert find_nanochat("base") == root / "mine" / "d20" / "base"
    assert find_nanochat("base", "d6") == root / "mine" / "d6" / "base"
    assert find_nanochat("base", "flops1e18_d12") == root / "mine" / "flops1e18_d12" / "base"
    step = fixture.json["checkpoint"]["step"]
    for name in ("sft", "sft:d4", f"sft:d4:{step}"):
        assert find_checkpoint(name) == (root / "mine" / "d4" / "sft", step)
    prompt = fixture.json["prompts"][4]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with LLM("sft", device="cpu", num_blocks=64) as llm:
        (output,) = llm.generate([prompt["ids"]], params, use_tqdm=False)
    assert output["token_ids"] == prompt["greedy_tokens"]
    for name, words in {
        "rl": ["has no rl checkpoints", "NANOCHAT_EXPERIMENT", "unset"],
        "sft:d20": ["has no 'd20', only d4"],
        "base:d4": ["has no 'd4', only d20, d6, flops1e18_d12"],
        "base:../mine/d6": ["has no"],
    }.items():
        with refused(FileNotFoundError, root / "mine", *words):
            find_checkpoint(name)
    monkeypatch.setenv("NANOCHAT_EXPERIMENT", "")  # as if it were not set
    assert find_nanochat("sft") == base / "chatsft_checkpoints" / "d32"


def test_of_an_experiment_without_numbers_the_newest_checkpoint_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_EXPERIMENTS_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_EXPERIMENT", "mine")
    for age, tag in enumerate(["newest", "older"]):
        folder = tmp_path / "mine" / tag / "rl"
        folder.mkdir(parents=True)
        os.utime(folder, (1e9 - age, 1e9 - age))
    assert find_nanochat("rl") == tmp_path / "mine" / "newest" / "rl"


def test_the_experiment_that_is_meant_where_none_is_named(tmp_path, monkeypatch):
    """nanochat's is called "default"; before there were experiments, there was none."""
    monkeypatch.delenv("NANOCHAT_EXPERIMENT", raising=False)
    monkeypatch.delenv("NANOCHAT_EXPERIMENTS_DIR", raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with refused(FileNotFoundError, tmp_path / "base_checkpoints", "NANOCHAT_BASE_DIR"):
        find_nanochat("base")
    (tmp_path / "experiments" / "default" / "d4" / "base").mkdir(parents=True)
    assert find_nanochat("base") == tmp_path / "experiments" / "default" / "d4" / "base"
    (tmp_path / "base_checkpoints" / "d6").mkdir(parents=True)
    assert find_nanochat("base") == tmp_path / "base_checkpoints" / "d6"
    (tmp_path / "elsewhere" / "mine" / "d20" / "base").mkdir(parents=True)
    monkeypatch.setenv("NANOCHAT_EXPERIMENTS_DIR", str(tmp_path / "elsewhere"))
    assert find_nanochat("base") == tmp_path / "base_checkpoints" / "d6"
    (tmp_path / "elsewhere" / "default" / "d8" / "base").mkdir(parents=True)
    assert find_nanochat("base") == tmp_path / "elsewhere" / "default" / "d8" / "base"
    with refused(FileNotFoundError, tmp_path / "elsewhere" / "default", "has no sft checkpoints"):
        find_nanochat("sft")
    monkeypatch.setenv("NANOCHAT_EXPERIMENT", "other")
    with refused(FileNotFoundError, "experiments that have some: default, mine"):
        find_nanochat("base")
