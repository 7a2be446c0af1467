"""`microvllm quantize`: the folder that it writes, how that is read, and what it costs."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.cpu_kernels import perplexity
from helpers.goldens import FIXTURES, MODEL
from safetensors.torch import load_file, save_file

from microvllm import LLM, SamplingParams
from microvllm.loading import build_model, find_checkpoint, read_checkpoint
from microvllm.lowbit import folder as lowbit_folder
from microvllm.lowbit.packing import Quantised, round_plainly
from microvllm.sources import places

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
TOLD = {
    "version": "0", "command": "none", "source": "a test", "calibration": "none", "seed": 0,
    "tokens": 0, "base": False,
}  # fmt: skip
HEAD, PROJ = "lm_head", "transformer.h.0.attn.c_proj"


def folder_of(directory: Path, folder: Path, bits: int, tokenizer=None, **told) -> Path:
    """A checkpoint rounded plainly, in a new folder."""
    config, recipe, weights = checkpoint = read_checkpoint(*find_checkpoint(directory))
    parts = [name.removesuffix(".weight") for name in weights]
    made = {
        part: round_plainly(weights[f"{part}.weight"], lowbit_folder.bits_of(part, bits))
        for part in filter(lowbit_folder.is_matrix, parts)
    }
    folder.mkdir()
    told = {**TOLD, "bits": bits, **told}
    tokenizer = places.open_tokenizer(directory, tokenizer)
    lowbit_folder.write_folder(checkpoint, made, tokenizer, told, folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, Path]:
    """The bundled model in each number of bits."""
    base = tmp_path_factory.mktemp("folders")
    return {bits: folder_of(MODEL, base / str(bits), bits) for bits in lowbit_folder.BITS}


# the folder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", lowbit_folder.BITS)
def test_what_is_packed_is_unpacked(bits):
    low, high = (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    torch.manual_seed(0)
    integers = torch.randint(low, high + 1, (3, 64), dtype=torch.int8)
    integers[0, :2] = torch.tensor([low, high])
    planes = lowbit_folder.pack(integers, bits)
    assert sum(plane.nbytes for plane in planes.values()) == 3 * 64 * bits // 8
    assert torch.equal(lowbit_folder.unpack(planes, bits), integers)
    assert lowbit_folder.unpack(lowbit_folder.pack(integers[:0], bits), bits).shape == (0, 64)


@pytest.mark.parametrize("bits", lowbit_folder.BITS)
def test_a_folder_gives_what_was_written_and_nothing_else_changes(bits, folders):
    config, recipe, weights = read_checkpoint(*find_checkpoint(MODEL))
    found = read_checkpoint(*find_checkpoint(folders[bits]))
    assert found[:2] == (config, recipe) and found[2].keys() == weights.keys()
    for name, weight in found[2].items():
        part, exact = name.removesuffix(".weight"), weights[name]
        assert weight.shape == exact.shape
        if not lowbit_folder.is_matrix(part):
            assert weight.dtype == exact.dtype and torch.equal(weight, exact)
            continue
        made, expected = weight.quantised(), round_plainly(exact, lowbit_folder.bits_of(part, bits))
        assert isinstance(made, Quantised) and made.bits == expected.bits
        assert torch.equal(made.integers, expected.integers)
        assert torch.equal(made.scale, expected.scale)
        assert made.factors is expected.factors or torch.equal(made.factors, expected.factors)
        error = (weight.dense() - exact.float()).norm() / exact.float().norm()
        assert error < {8: 0.02, 6: 0.06, 5: 0.11, 4: 0.13}[bits]
    stored = [w for w in found[2].values() if isinstance(w, lowbit_folder.Stored)]
    each = 8 * sum(w.nbytes for w in stored) / sum(w.numel() for w in stored)
    assert each < {8: 8.15, 6: 6.15, 5: 5.15, 4: 5}[bits]


HEAVY = pytest.mark.skipif(not os.environ.get("FUZZ"), reason="compiles for long: set FUZZ")
# kernels of their own
SLOW = [pytest.param(bits, marks=[pytest.mark.slow, HEAVY]) for bits in (6, 5, 4)]


@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.slow), *SLOW])
def test_a_folder_gives_the_tokens_of_the_dense_model(bits, folders):
    prompts = ["Who wrote Moby Dick?", "Once upon a time"]
    config, recipe, weights = read_checkpoint(*find_checkpoint(folders[bits]))
    with LLM(folders[bits], num_blocks=60, device="cpu", plain=True) as llm:
        params = replace(GREEDY, logprobs=4)
        expected = [o["samples"][0]["logprobs"] for o in llm.generate(prompts, params)]
        for name, w in llm.model.state_dict().items():
            stored = weights[name]
            assert torch.equal(w, stored.dense() if hasattr(stored, "dense") else stored.float())
    with LLM(folders[bits], num_blocks=60, device="cpu") as llm:
        found = [o["token_ids"] for o in llm.generate(prompts, GREEDY, use_tqdm=False)]
    for wanted, tokens in zip(expected, found, strict=True):
        for own, token in zip(wanted, tokens, strict=True):
            if token != own["token_id"]:  # a tie, within what inputs rounded to int8 change
                (other,) = [logprob for i, logprob, _ in own["top"] if i == token]
                assert own["logprob"] - other < 0.1
                break  # another text from here on


@pytest.mark.slow
def test_int8_runs_on_the_integers_of_the_folder(folders):
    found = read_checkpoint(*find_checkpoint(folders[8]))
    model = build_model(*found, torch.device("cpu"))
    plain = build_model(
        *read_checkpoint(*find_checkpoint(MODEL)), torch.device("cpu"), quantization="int8"
    )
    x = torch.randn(5, model.config.n_embd)
    for names, linear in model.linears.items():
        assert type(linear) is type(plain.linears[names])
        if linear.width == x.shape[1]:
            torch.testing.assert_close(linear(x), plain.linears[names](x), rtol=0, atol=0)


def test_another_word_is_refused_and_the_own_one_is_not(folders, monkeypatch):
    monkeypatch.setattr("microvllm.cpu.compilation.begin", lambda *_: True)  # no kernel is called
    with pytest.raises(ValueError, match="quantization='fp8', but the folder has int8"):
        LLM(folders[8], quantization="fp8", num_blocks=20)
    with pytest.raises(ValueError, match="quantization='int8', but the folder has int4"):
        LLM(folders[4], quantization="int8", num_blocks=20)
    for bits in (8, 4):
        LLM(folders[bits], quantization=f"int{bits}", num_blocks=20, device="cpu").close()


@pytest.mark.slow
def test_weights_of_a_folder_can_be_swapped(folders):
    state = {name: w.float() for name, w in read_checkpoint(*find_checkpoint(MODEL))[2].items()}
    with LLM(folders[8], num_blocks=40, device="cpu") as llm:
        before = llm.generate("Once upon a time", GREEDY)[0]["token_ids"]
        llm.update_weights({name: w.roll(1, 0) for name, w in state.items()})
        assert llm.generate("Once upon a time", GREEDY)[0]["token_ids"] != before
        llm.update_weights(state)
        assert llm.generate("Once upon a time", GREEDY)[0]["token_ids"] == before


@pytest.mark.parametrize("name", FIXTURES)
def test_every_era_keeps_its_constants(name, tmp_path):
    fixture = FIXTURES[name]
    folder = folder_of(fixture.directory, tmp_path / "q", 8, fixture.tokenizer, base=True)
    expected = read_checkpoint(*find_checkpoint(fixture.directory))
    assert read_checkpoint(*find_checkpoint(folder))[:2] == expected[:2]
    assert places.is_base(folder, None)


# damage -------------------------------------------------------------------------------------------


def without(tensors: dict, name: str) -> None:
    del tensors[name]


DAMAGE = {
    f"{HEAD}.low is missing": lambda t: without(t, f"{HEAD}.low"),
    "value_embeds.1.weight is missing": lambda t: without(t, "value_embeds.1.weight"),
    f"{PROJ}.scale is missing": lambda t: without(t, f"{PROJ}.scale"),
    "the tensor spare does not belong to this model": lambda t: t.update(spare=torch.zeros(1)),
    "lm_head.weight does not belong to": lambda t: t.update(
        {"lm_head.weight": torch.zeros(4096, 256)}
    ),
    f"{PROJ}.low is .256, 127., not .256, 128.": lambda t: t.update(
        {f"{PROJ}.low": t[f"{PROJ}.low"][:, 1:].contiguous()}
    ),
    f"{PROJ}.low is int8, not uint8": lambda t: t.update(
        {f"{PROJ}.low": t[f"{PROJ}.low"].view(torch.int8)}
    ),
    f"{PROJ}.scale is bfloat16, not float32": lambda t: t.update(
        {f"{PROJ}.scale": t[f"{PROJ}.scale"].bfloat16()}
    ),
    f"{PROJ}.factors is .256, 4., not .256, 8.": lambda t: t.update(
        {f"{PROJ}.factors": t[f"{PROJ}.factors"][:, ::2].contiguous()}
    ),
    f"{PROJ}.factors has numbers from -16": lambda t: t[f"{PROJ}.factors"].fill_(-16),
    f"{HEAD}.scale has a number that is NaN": lambda t: t[f"{HEAD}.scale"].fill_(torch.nan),
    f"{PROJ}.scale has a number that is NaN or inf": lambda t: t[f"{PROJ}.scale"].fill_(torch.inf),
    "the tensor resid_lambdas of dtype I32": lambda t: t.update(
        resid_lambdas=torch.zeros(6, dtype=torch.int32)
    ),
    "the embedding has 4000 rows": lambda t: t.update(
        {"transformer.wte.weight": torch.zeros(4000, 256)}
    ),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_damaged_tensors_are_refused_by_name(words, folders, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(folders[4], folder)
    tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    DAMAGE[words](tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=words) as raised:
        read_checkpoint(*find_checkpoint(folder))
    assert str(folder / "model.safetensors") in str(raised.value)


def test_minus_128_and_a_file_cut_short_are_refused(folders, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(folders[8], folder)
    file = folder / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    tensors[f"{PROJ}.integers"][3, 4] = -128
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"{PROJ}.integers has numbers from -128 to"):
        read_checkpoint(*find_checkpoint(folder))
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_checkpoint(*find_checkpoint(folder))
    file.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        read_checkpoint(*find_checkpoint(folder))


@pytest.mark.parametrize(
    "part, change, words",
    [
        ("quantization", {"format": 2}, "format 2, but this version reads 1"),
        ("quantization", {"bits": 3}, "bits=3"),
        ("quantization", {"bits": True}, "bits=True"),
        ("quantization", {"seed": "x"}, "seed='x'"),
        ("quantization", None, "format None"),
        ("recipe", {"era": "9"}, "era='9'"),
        ("recipe", {"era": []}, r"era=\[\]"),
        ("recipe", {"softcap": -1}, "softcap must be a positive number, got -1"),
        ("recipe", {"lambdas": 1}, "recipe must have era, eps"),
        ("recipe", None, "recipe must have era"),
    ],
)
def test_a_damaged_config_is_refused_by_name(part, change, words, folders, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(folders[4], folder)
    config = json.loads((folder / "config.json").read_text())
    config[part] = [] if change is None else config[part] | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        read_checkpoint(*find_checkpoint(folder))


def test_more_bits_than_the_tensors_have(folders, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(folders[4], folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"]["bits"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="integers is missing"):
        read_checkpoint(*find_checkpoint(folder))


# the command --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_on_a_tiny_model(command, mistake, tmp_path):
    fixture, out = FIXTURES["era5"], tmp_path / "q"
    flags = ["--tokenizer-dir", fixture.tokenizer, "--tokens", 100, "--json"]
    told = json.loads(command("quantize", fixture.directory, "-o", out, "--bits", 8, *flags)[0])
    assert told["bits"] == 8 and 8 < told["bits_per_weight"] < 9 and told["tokens"] >= 100
    made = json.loads((out / "config.json").read_text())["quantization"]
    assert told.items() >= {k: v for k, v in made.items() if k != "format"}.items()
    assert made["source"] == str(fixture.directory) and "--bits 8 --seed 0" in made["command"]
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", "tokenizer.pkl"]
    assert os.listdir(tmp_path) == ["q"]
    # it runs, is described, and is no source of another
    assert command("run", "--raw", "-m", out, "--num-blocks", 20, "--max-tokens", 4, "a")[0]
    assert json.loads(command("info", out, "--json")[0])["file_dtypes"] == ["float32", "int8"]
    for words in (["convert"], ["quantize", "--bits", "8"]):
        said = mistake(words[0], out, "-o", tmp_path / "no", *words[1:])
        assert f"{out} is quantised" in said and os.listdir(tmp_path) == ["q"]


@HEAVY
@pytest.mark.slow
def test_a_given_text_and_the_same_folder_twice(command, mistake, tmp_path):
    fixture, text = FIXTURES["era1_padded"], tmp_path / "text.txt"
    text.write_text("It was a dark and stormy night. " * 40)
    flags = ["--bits", 8, "--tokenizer-dir", fixture.tokenizer, "--calibration", text]
    for name in ("a", "b"):
        out, _ = command("quantize", fixture.directory, "-o", tmp_path / name, *flags)
        assert out.startswith(f"{tmp_path / name}: matrices of 8.")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    text.write_text("")
    said = mistake("quantize", fixture.directory, "-o", tmp_path / "c", *flags)
    assert "text.txt is empty" in said and not (tmp_path / "c").exists()
    assert "a is there" in mistake("quantize", fixture.directory, "-o", tmp_path / "a", *flags)


def test_a_model_with_broken_weights_is_refused(tmp_path):
    from microvllm.lowbit.quantize import quantize

    config, recipe, weights = read_checkpoint(*find_checkpoint(FIXTURES["era2"].directory))
    name = "transformer.h.1.mlp.c_fc"
    broken = {**weights, f"{name}.weight": weights[f"{name}.weight"] * torch.nan}
    with pytest.raises(ValueError, match=f"{name} or its inputs are NaN or infinite"):
        quantize(config, recipe, broken, [[0, 1, 2, 3]], lambda name: 8)


@HEAVY
@pytest.mark.slow
def test_the_bundled_model_in_four_bits(command, tmp_path):
    out = tmp_path / "q"
    command("quantize", MODEL, "-o", out, "--bits", 4, "--tokens", 2000)
    plain = folder_of(MODEL, tmp_path / "plain", 4)
    change, simple = (perplexity(str(x)) / perplexity(str(MODEL)) - 1 for x in (out, plain))
    assert 0 < change < 0.09 and change < 0.6 * simple, (change, simple)
    said, _ = command("run", "--num-blocks", 40, "--temperature", 0, "-m", out, "Who wrote Emma?")
    assert "Jane Austen" in said
