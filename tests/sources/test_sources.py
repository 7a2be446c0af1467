"""Where models come from: directories, nanochat's tree, Hugging Face's folders and hub, live
modules."""

import fnmatch
import json
import re
import shutil
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.goldens import ERAS
from helpers.sources import Live, live, logits_of, tokenizer_json
from safetensors.torch import load_file, save_file

from microvllm import LLM, SamplingParams
from microvllm.checkpoint import find_tokenizer, make_model
from microvllm.features.live import from_module
from microvllm.fused.linear import Shared
from microvllm.loading import build_model
from microvllm.model import GPT
from microvllm.sources import hub as hub_module
from microvllm.sources.places import find_checkpoint, open_tokenizer, read_checkpoint
from microvllm.tokenizer import load_tokenizer

HF = ERAS / "hf_era1_padded"
NAMES = "tokenizer.pkl", "tokenizer.json"
GOLDENS = json.loads((ERAS / "tokenizer_goldens.json").read_text())


def checkpoint(directory: Path, *steps: int) -> Path:
    """A directory with the files of a checkpoint's name, and nothing in them."""
    directory.mkdir(parents=True, exist_ok=True)
    for step in steps:
        (directory / f"model_{step:06d}.pt").touch()
        (directory / f"meta_{step:06d}.json").touch()
    return directory


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    """nanochat's base directory, with checkpoints of three sources."""
    base = tmp_path / "nanochat"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.chdir(tmp_path)
    checkpoint(base / "base_checkpoints" / "d4", 300)
    checkpoint(base / "base_checkpoints" / "d20", 100, 21400)
    checkpoint(base / "chatsft_checkpoints" / "d20", 650)
    checkpoint(base / "chatrl_checkpoints" / "d20", 60, 466)
    checkpoint(base / "chatrl_checkpoints" / "mine", 5)
    return base


def load(name, step: int | None = None, **options) -> GPT:
    """The core's model of any checkpoint that find_checkpoint finds."""
    return make_model(*read_checkpoint(*find_checkpoint(name, step)), **options)


def assert_near(logits: np.ndarray, golden: np.ndarray) -> None:
    assert logits.shape == golden.shape
    assert np.abs(logits - golden).max() < 1e-4  # as far as nanochat's own two paths differ


# nanochat's own tree -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, step, place, expected",
    [
        ("sft", None, "chatsft_checkpoints/d20", 650),
        (
            "base",
            None,
            "base_checkpoints/d20",
            21400,
        ),  # the largest d, not the last in the alphabet
        ("base:d4", None, "base_checkpoints/d4", 300),
        ("base", 100, "base_checkpoints/d20", 100),
        ("rl:d20:60", None, "chatrl_checkpoints/d20", 60),
        ("rl:d20:60", 60, "chatrl_checkpoints/d20", 60),
        ("rl::60", None, "chatrl_checkpoints/d20", 60),
        ("rl:mine", None, "chatrl_checkpoints/mine", 5),
    ],
)
def test_a_place_in_nanochats_tree(base, name, step, place, expected):
    assert find_checkpoint(name, step) == (base / place, expected)


@pytest.mark.parametrize(
    "name, step, error, words",
    [
        ("mid", None, FileNotFoundError, ["mid_checkpoints", "NANOCHAT_BASE_DIR"]),
        ("base:d12", None, FileNotFoundError, ["'d12'", "d20, d4"]),
        ("base:../base_checkpoints/d4", None, FileNotFoundError, ["has no", "d20, d4"]),
        ("base:d20:7", None, FileNotFoundError, ["model_000007.pt", "21400"]),
        ("base:d20:100", 21400, ValueError, ["'base:d20:100'", "step=21400", "one of them"]),
        ("base:d20:last", None, FileNotFoundError, ["base:d20:last", "rl:d20:650", "owner/name"]),
        ("chatsft", None, FileNotFoundError, ["chatsft", "sft, base:d20", "owner/name"]),
    ],
)
def test_a_place_that_is_not_there(base, name, step, error, words):
    with pytest.raises(error) as raised:
        find_checkpoint(name, step)
    assert all(word in str(raised.value) for word in words), raised.value


def test_a_directory_that_exists_wins_over_the_other_meanings_of_its_name(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for name in ("sft", "owner/name", "base:d4"):
        directory = checkpoint(base.parent / name, 1, 2)
        assert find_checkpoint(name) == (directory, 2)


def test_a_path_is_never_another_kind_of_name(base):
    with pytest.raises(FileNotFoundError, match="sft is not a directory"):
        find_checkpoint(Path("sft"))


def test_a_file_is_no_checkpoint(base):
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        find_checkpoint("nanochat/base_checkpoints/d4/model_000300.pt")


# Hugging Face's folders --------------------------------------------------------------------------


def hf_folder(directory: Path, **changes) -> Path:
    """A copy of the fixture with another config.json; a key that is None is left out."""
    shutil.copytree(HF, directory)
    config = json.loads((HF / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_a_hugging_face_folder_gives_hugging_faces_logits():
    prompts = json.loads((HF / "goldens.json").read_text())["prompts"]
    model = load(HF, max_len=400)
    rows = np.stack([logits_of(model, prompt["ids"])[-1] for prompt in prompts])
    assert_near(rows, np.load(HF / "goldens.npz")["last_logits"])


def test_a_hugging_face_folder_gives_hugging_faces_greedy_tokens():
    prompts = json.loads((HF / "goldens.json").read_text())["prompts"]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with LLM(HF, tokenizer_path=ERAS / "tokenizer", device="cpu", num_blocks=100) as llm:
        outputs = llm.generate([p["ids"] for p in prompts], params, use_tqdm=False)
    for output, prompt in zip(outputs, prompts, strict=True):
        assert output["token_ids"] == prompt["greedy_tokens"], prompt["name"]


def test_the_constants_are_those_of_config_json(tmp_path):
    _, recipe, _ = read_checkpoint(*find_checkpoint(HF))
    assert (recipe.era, recipe.round_rotary, recipe.short_window) == ("1", False, 0)
    assert (recipe.eps, recipe.softcap, recipe.rope_base) == (1e-6, 15.0, 10_000.0)
    newer = {"rms_norm_eps": 1e-5, "final_logit_softcapping": 20.0}
    newer["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "default"}
    _, recipe, _ = read_checkpoint(*find_checkpoint(hf_folder(tmp_path / "new", **newer)))
    assert (recipe.eps, recipe.softcap, recipe.rope_base) == (1e-5, 20.0, 5e5)
    older = {"rope_parameters": None, "rope_theta": 2e4, "num_key_value_heads": 1}
    _, recipe, _ = read_checkpoint(*find_checkpoint(hf_folder(tmp_path / "old", **older)))
    assert recipe.rope_base == 2e4
    model = load(HF, softcap=30.0)  # what the caller says comes last
    assert model.recipe.softcap == 30.0 and model.config.sequence_len == 2560


def test_sharded_weights_are_the_same_weights(tmp_path):
    folder = hf_folder(tmp_path / "sharded")
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(whole)}
    for shard in set(places.values()):
        part = {name: tensor for name, tensor in whole.items() if places[name] == shard}
        save_file(part, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    expected, found = load(HF).state_dict(), load(folder).state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    (missing := folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"names the file '{missing.name}', which is not"):
        load(folder)


NO_FILES = (
    "a" * 300,
    "a\0b",
    "\ud800",
    "..",
    ".",
    "",
    "/",
    "a/" * 3000,
    "é" * 200,
    "x\n.safetensors",
)


@pytest.mark.parametrize("name", NO_FILES, ids=lambda name: ascii(name)[:20])
def test_an_index_with_a_name_that_no_file_can_have_is_refused(tmp_path, name):
    folder = hf_folder(tmp_path / "sharded")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = folder / "model.safetensors.index.json"
    places = dict.fromkeys(tensors, "part.safetensors") | {"lm_head.weight": name}
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(
        FileNotFoundError, match="index.json names the file .* not next to"
    ) as error:
        load(folder)
    assert str(index) in str(error.value) and len(str(error.value)) < 400
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "x/../part.safetensors")}))
    assert load(folder).config.n_layer == load(HF).config.n_layer


DTYPES = "F4 F8_E4M3 F8_E5M2 F8_E8M0 I64 I32 I16 U16 U32 U64 BOOL C64 X7".split()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_that_is_unknown_here_is_refused_by_name(tmp_path, dtype):
    """Of some of them torch makes floating-point tensors with which nothing can be computed."""
    folder = hf_folder(tmp_path / "it")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    name = next(key for key in header if key.endswith("q_proj.weight"))
    start, _ = header[name]["data_offsets"]
    bits = int(re.search(r"\d+", dtype.removeprefix("BOOL") or "8")[0])
    # as many numbers as fit into the place of a matrix
    count = (header[name]["data_offsets"][1] - start) * 8 // bits
    header[name] |= {"dtype": dtype, "shape": [count]}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    with pytest.raises(ValueError) as error:
        load(folder)
    assert str(file) in str(error.value) and dtype in str(error.value)
    if dtype != "X7":  # which the package does not know either
        assert f"{name} of dtype {dtype}: known are BF16, F16" in str(error.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"architectures": ["LlamaForCausalLM"]}, ["LlamaForCausalLM", "NanoChatForCausalLM"]),
        ({"architectures": None, "model_type": "gpt2"}, ["gpt2", "NanoChatForCausalLM"]),
        ({"hidden_act": "silu"}, ["hidden_act is 'silu'", "'relu2'"]),
        ({"attention_bias": True}, ["attention_bias is True"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings is True"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, ["rope_type is 'yarn'"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, ["rope_type is 'linear'"]),
        ({"rope_parameters": 7}, ["rope_type is 7"]),
        ({"rope_parameters": {"rope_theta": -1}}, ["rope_base", "positive", "-1"]),
        ({"final_logit_softcapping": 0}, ["softcap", "positive"]),
        ({"num_hidden_layers": None, "hidden_size": None}, ["num_hidden_layers, hidden_size"]),
        ({"num_hidden_layers": 4}, ["6 unexpected", "transformer.h.4."]),
        ({"num_hidden_layers": 6}, ["6 missing", "transformer.h.5."]),
        ({"vocab_size": 400}, ["311 rows", "400"]),
    ],
)
def test_a_folder_that_is_no_nanochat_is_refused_by_name(tmp_path, changes, words):
    folder = hf_folder(tmp_path / "folder", **changes)
    with pytest.raises(ValueError) as raised:
        load(folder)
    assert all(word in str(raised.value) for word in [*words, str(folder)]), raised.value


@pytest.mark.parametrize("number", ["1" + "0" * 400, "-1" + "0" * 400, "1e400", "NaN", "[1]"])
@pytest.mark.parametrize(
    "key", ["rms_norm_eps", "rope_theta", "final_logit_softcapping", "max_position_embeddings"]
)
def test_a_number_that_is_none_is_refused(tmp_path, key, number):
    folder = hf_folder(tmp_path / "it", rope_parameters=None, rope_scaling=None, **{key: 77777})
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("77777", number))
    with pytest.raises(ValueError, match="it") as raised:
        load(folder)
    assert str(folder) in str(raised.value)


def test_a_folder_that_is_broken_is_refused_by_name(tmp_path, monkeypatch):
    folder = hf_folder(tmp_path / "folder")
    with pytest.raises(ValueError, match="without steps: step=3"):
        load(folder, step=3)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="model.safetensors is not a readable safetensors file"):
        load(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        load(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config.json holds no JSON object: \[1\]"):
        load(folder)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[hf\]'"):
        load(HF)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("source", ["pt", "safetensors"])
def test_nothing_keeps_the_file_mapped(tmp_path, source):
    """Else the page cache could never let go of it, and deleting it would free no disk."""
    folder, step = hf_folder(tmp_path / "folder"), None
    if source == "pt":
        found, step = find_checkpoint(ERAS / "era5" / "chatsft_checkpoints" / "d4")
        folder = shutil.copytree(found, tmp_path / "nano")
    config, recipe, weights = read_checkpoint(folder, step)
    assert str(folder) in Path("/proc/self/maps").read_text()
    del weights
    model = load(folder)
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert model.config == config and model.recipe == recipe


# tokenizer.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize("every_split", [True, False])
def test_a_tokenizer_json_is_read_as_the_tokenizer_it_was_made_from(tmp_path, every_split):
    file = tokenizer_json(tmp_path / "tokenizer.json", every_split)
    found = open_tokenizer(tmp_path)
    toy = load_tokenizer(ERAS / "tokenizer")
    for case in GOLDENS["encode"]:
        assert found.encode(case["text"]) == case["ids"]
        assert found.encode(case["text"], bos=True) == case["ids_bos"]
    for case in GOLDENS["decode"]:
        assert found.decode(case["ids"]) == case["text"]
    assert found.special_tokens == toy.special_tokens and found.eos_ids == toy.eos_ids
    every = range(toy.vocab_size)
    assert [found.token_bytes(i) for i in every] == [toy.token_bytes(i) for i in every]
    assert open_tokenizer("elsewhere", file).vocab_size == toy.vocab_size
    assert open_tokenizer("elsewhere", tmp_path).vocab_size == toy.vocab_size


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"normalizer": {"type": "NFC"}}, "NFC"),
        ({"pre_tokenizer": {"type": "ByteLevel", "use_regex": True}}, "pretokenizers"),
        ({"model": {"type": "Unigram", "vocab": []}}, "Unigram"),
        ({"added_tokens": []}, "<|bos|>"),
        ({"added_tokens": [{"id": 0, "content": "<|bos|>"}]}, "special_tokens must use each id"),
    ],
)
def test_a_tokenizer_json_of_another_kind_is_refused(tmp_path, changes, words):
    tokenizer_json(tmp_path / "tokenizer.json", **changes)
    with pytest.raises(ValueError) as raised:
        open_tokenizer(tmp_path)
    assert words in str(raised.value) and "give tokenizer_path" in str(raised.value)


def test_a_tokenizer_json_that_merges_in_another_order_is_refused(tmp_path):
    """Its ids are no ranks: the same vocabulary would split words differently here."""
    file = tokenizer_json(tmp_path / "tokenizer.json")
    written = json.loads(file.read_text(encoding="utf-8"))
    written["model"]["merges"].reverse()
    file.write_text(json.dumps(written))
    with pytest.raises(ValueError, match="merges are not in the order"):
        open_tokenizer(tmp_path)


def test_which_tokenizer_a_checkpoint_gets(tmp_path, monkeypatch):
    """The one beside the weights comes first, then the places above and nanochat's own; of two in
    one place, nanochat's."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "nanochat"))
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tmp_path / "checkpoints" / "model"
    model.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="give tokenizer_path"):
        open_tokenizer(model)
    places = [tmp_path / "nanochat" / "tokenizer", tmp_path / "tokenizer"]
    for place in [*places, tmp_path / "checkpoints" / "tokenizer", model]:
        tokenizer_json(place / "tokenizer.json")
        assert find_tokenizer(model, names=NAMES) == place
        assert open_tokenizer(model)._encoding.name == "tokenizer.json"
        shutil.copy(ERAS / "tokenizer" / "tokenizer.pkl", place)
        assert open_tokenizer(model)._encoding.name == "rustbpe"


# the hub -----------------------------------------------------------------------------------------


class Hub:
    """A huggingface_hub that serves one repository and writes down what it was asked for."""

    def __init__(self, root: Path, names: list[str]):
        self.names, self.cache, self.online, self.asked = names, root / "cache", True, []
        self.remote = root / "remote"
        for name in names:
            self.put(name, b"")

    def put(self, name: str, data: bytes) -> None:
        file = self.remote / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        self.names = sorted({*self.names, name})

    def list_repo_files(self, repo_id):
        if not self.online:
            raise NoRoute("no route to host")
        if repo_id != "owner/name":
            raise RepositoryNotFoundError("401 Client Error")
        return self.names

    def snapshot_download(self, repo_id, *, allow_patterns=None, local_files_only=False):
        if local_files_only:
            if not self.cache.exists():
                raise NoRoute("not in the cache\nand a second line")
            return str(self.cache)
        if not self.online:
            raise NoRoute("connection lost")
        names = [n for n in self.names if any(fnmatch.fnmatch(n, p) for p in allow_patterns)]
        self.asked.append(names)
        for name in names:
            (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.remote / name, self.cache / name)
        return str(self.cache)


class NoRoute(Exception):
    """What the http library raises is no OSError."""


class RepositoryNotFoundError(Exception):
    pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """serve(*names) puts a hub with these files in the place of huggingface_hub."""

    def serve(*names: str) -> Hub:
        hub = Hub(tmp_path, list(names))
        module, utils = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.utils")
        module.list_repo_files = lambda repo_id: hub.list_repo_files(repo_id)
        module.snapshot_download = lambda *args, **kwargs: hub.snapshot_download(*args, **kwargs)
        utils.RepositoryNotFoundError = RepositoryNotFoundError
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)
        monkeypatch.setitem(sys.modules, "huggingface_hub.utils", utils)
        return hub

    monkeypatch.setattr(hub_module, "hub_answers", lambda: True)
    monkeypatch.chdir(tmp_path)
    return serve


NANOCHAT_REPOSITORY = [
    "README.md", "config.json", "meta_000100.json", "meta_000650.json", "meta_001000.json",
    "model.safetensors", "model_000100.pt", "model_000650.pt", "optim_000650_rank0.pt",
    "token_bytes.pt", "tokenizer.json", "tokenizer.pkl",
]  # fmt: skip
TREE = [
    "base_checkpoints/d20/meta_000300.json", "base_checkpoints/d20/model_000300.pt",
    "base_checkpoints/d20/optim_000300_rank0.pt", "chatsft_checkpoints/d20/meta_000065.json",
    "chatsft_checkpoints/d20/model_000065.pt", "report.md", "tokenizer/token_bytes.pt",
    "tokenizer/tokenizer.pkl",
]  # fmt: skip


def test_of_a_nanochat_repository_only_one_step_and_the_tokenizer_are_fetched(hub):
    server = hub(*NANOCHAT_REPOSITORY)
    assert find_checkpoint("owner/name") == (server.cache, 650)
    assert server.asked == [["meta_000650.json", "model_000650.pt", "tokenizer.pkl"]]
    assert find_checkpoint("owner/name", 100) == (server.cache, 100)
    assert server.asked[1:] == [["meta_000100.json", "model_000100.pt", "tokenizer.pkl"]]
    assert find_tokenizer(server.cache) == server.cache


def test_of_a_repository_with_folders_one_is_named(hub):
    server = hub(*TREE)
    folder = server.cache / "base_checkpoints" / "d20"
    assert find_checkpoint("owner/name/base_checkpoints/d20") == (folder, 300)
    assert server.asked == [[*TREE[:2], "tokenizer/tokenizer.pkl"]]
    assert find_tokenizer(folder) == server.cache / "tokenizer"
    with pytest.raises(FileNotFoundError, match="base_checkpoints/d20, chatsft_checkpoints/d20"):
        find_checkpoint("owner/name")
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "weights",
    [
        ["model.safetensors"],
        [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
        ],
    ],
)
def test_of_a_hugging_face_repository_the_safetensors_the_config_and_the_tokenizer(hub, weights):
    others = ["README.md", "consolidated.safetensors", "generation_config.json", "onnx/model.onnx"]
    others += ["pytorch_model.bin", "tokenizer_config.json", "training_args.bin"]
    server = hub(*weights, *others, "config.json", "tokenizer.json")
    assert find_checkpoint("owner/name") == (server.cache, None)
    assert server.asked == [sorted([*weights, "config.json", "tokenizer.json"])]


def test_what_a_repository_does_not_have_is_said_before_anything_is_fetched(hub):
    server = hub(*NANOCHAT_REPOSITORY)
    with pytest.raises(FileNotFoundError, match="no step 7 in its root, only 100, 650"):
        find_checkpoint("owner/name", 7)
    with pytest.raises(FileNotFoundError, match="no directory owner/other, and no repository"):
        find_checkpoint("owner/other")
    server.names = ["config.json", "pytorch_model.bin"]
    with pytest.raises(FileNotFoundError, match="neither model_<step>.pt nor model.safetensors"):
        find_checkpoint("owner/name")
    with pytest.raises(FileNotFoundError, match="no step 7 .* only a model without steps"):
        find_checkpoint("owner/name", 7)
    assert server.asked == []


def test_without_a_network_the_cache_serves_what_it_has(hub):
    server = hub(*NANOCHAT_REPOSITORY)
    find_checkpoint("owner/name")
    server.online = False
    assert find_checkpoint("owner/name") == (server.cache, 650)
    with pytest.raises(FileNotFoundError, match=r"model_000100.pt is missing \(the last step"):
        find_checkpoint("owner/name", 100)


def test_without_a_network_and_a_cache_the_error_says_what_to_do(hub):
    server = hub(*NANOCHAT_REPOSITORY)
    server.online = False
    with pytest.raises(ConnectionError) as raised:
        find_checkpoint("owner/name")
    text = str(raised.value)
    assert "owner/name cannot be fetched" in text and "(NoRoute: no route to host)" in text
    assert "HF_HUB_OFFLINE" in text and "give their directory" in text and "\n" not in text


def test_a_connection_that_breaks_is_an_error_too(hub, monkeypatch):
    server = hub(*NANOCHAT_REPOSITORY)

    def names_and_then_nothing(repo_id):
        server.online = False
        return server.names

    monkeypatch.setattr(server, "list_repo_files", names_and_then_nothing)
    with pytest.raises(ConnectionError, match="NoRoute: connection lost"):
        find_checkpoint("owner/name")


def test_a_gated_repository_says_how_to_get_in(hub, monkeypatch):
    """Everybody may read its list of files, and only some the files."""
    server = hub(*NANOCHAT_REPOSITORY)

    def closed(repo_id, **kwargs):
        raise RepositoryNotFoundError("403 Client Error")

    monkeypatch.setattr(server, "snapshot_download", closed)
    with pytest.raises(FileNotFoundError, match="owner/name .*`hf auth login`"):
        find_checkpoint("owner/name")


def test_without_huggingface_hub_the_error_says_what_to_install(base, monkeypatch):
    """And that there is no such directory: more often than not, that is what was meant."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"no directory a/b;.*install -e '\.\[hf\]'"):
        find_checkpoint("a/b")


# every name, through the engine ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["place", "folder", "repository"])
def test_the_engine_takes_any_of_these_names(hub, monkeypatch, kind):
    """With the tokenizer that belongs to it, and the tokens of the goldens."""
    base = ERAS / "era1_padded"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    name, goldens = "sft:d5", base / "goldens.json"
    if kind == "folder":
        name, goldens = str(hf_folder(Path("folder").absolute())), HF / "goldens.json"
        tokenizer_json(Path("folder/tokenizer.json"))
    if kind == "repository":
        name, server = "owner/name", hub()
        for file in (base / "chatsft_checkpoints" / "d5").iterdir():
            server.put(file.name, file.read_bytes())
        server.put("tokenizer.pkl", (ERAS / "tokenizer" / "tokenizer.pkl").read_bytes())
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(ERAS / "nowhere"))
    prompts = json.loads(goldens.read_text())["prompts"][:6]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with LLM(name, device="cpu", num_blocks=100) as llm:
        outputs = llm.generate([p["ids"] for p in prompts], params, use_tqdm=False)
    for output, prompt in zip(outputs, prompts, strict=True):
        assert output["token_ids"] == prompt["greedy_tokens"], prompt["name"]


# a live module -----------------------------------------------------------------------------------


def wrap(module: Live):
    """The engine's model on the weights of a live module."""
    return build_model(*from_module(module), torch.device("cpu"), share=True, max_len=500)


def copied(model, module: Live) -> list[str]:
    """Names of the weights that the model does not share with the module."""
    held = dict(model.tensors)
    for names, linear in model.linears.items():
        parts = linear.weight if isinstance(linear, Shared) else [None] * len(names)
        held |= zip([f"{name}.weight" for name in names], parts, strict=True)
    state = module.state_dict()
    assert held.keys() == state.keys()
    return [n for n in state if held[n] is None or held[n].data_ptr() != state[n].data_ptr()]


def test_a_live_module_of_any_era_is_what_its_checkpoint_is(era):
    config, recipe, weights = from_module(live(era))  # era 4's is compiled: _orig_mod. in its keys
    expected = read_checkpoint(*find_checkpoint(era.directory))
    assert (config, recipe) == expected[:2]
    assert weights.keys() == expected[2].keys()
    assert all(torch.equal(weights[name], expected[2][name]) for name in weights)


@pytest.mark.parametrize("era", ["era5"], indirect=True)
def test_a_wrapped_module_shares_its_weights(era):
    module = live(era)
    model = wrap(module)
    assert copied(model, module) == []
    assert_near(logits_of(model, era.json["prompts"][5]["ids"]), era.arrays["all_logits_len033"])


@pytest.mark.parametrize("era", ["era3"], indirect=True)
def test_only_what_has_another_dtype_is_copied(era):
    module = live(era)
    state = module.state_dict()
    halves = [name for name in state if state[name].dtype == torch.bfloat16]
    assert copied(wrap(module), module) == halves
    assert 0 < len(halves) < len(state)


@pytest.mark.parametrize("era", ["era5"], indirect=True)
@pytest.mark.parametrize("halves", ["nothing", "lm_head", "lm_head .c_", ".c_", ".c_k"])
def test_a_module_of_two_dtypes_in_another_order_is_read_right(era, halves):
    """Some of it is copied, some shared; and kernels take shared weights by their address."""
    module = live(era)
    for name, parameter in module.named_parameters():
        half = any(part in name for part in halves.split())
        if parameter.ndim == 2:
            parameter.data = parameter.data.T.contiguous().T
            parameter.data = parameter.data.bfloat16() if half else parameter.data
    logits = logits_of(wrap(module), era.json["prompts"][5]["ids"])
    expected = era.arrays["all_logits_len033"]
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert error < (1e-5 if halves == "nothing" else 0.02)  # bfloat16 has 8 bits


@pytest.mark.parametrize("era", ["era5"], indirect=True)
def test_what_is_no_nanochat_module_is_refused_by_name(era):
    for other in (torch.nn.Linear(2, 2), Live(SimpleNamespace(hidden_size=4), {}), {}, "sft"):
        with pytest.raises(TypeError, match=f"nanochat GPT module .*, got {type(other).__name__}"):
            from_module(other)
    with pytest.raises(ValueError, match="the module Live: .*num_experts"):
        from_module(live(era, num_experts=8, top_k=2))
    module = live(era)
    del module.lm_head
    with pytest.raises(ValueError, match="the module Live: .*1 missing .lm_head.weight"):
        from_module(module)
