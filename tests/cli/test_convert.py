"""`microvllm convert`, and what the command line says of a model whose constants no file tells."""

import json
import os
import re
from pathlib import Path

import pytest
from helpers.checkpoints import Checkpoint
from helpers.goldens import ERAS, FIXTURES, MODEL

from microvllm import LLM

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = ["--tokenizer-dir", str(ERAS / "tokenizer")]


def test_convert_there_and_back(command, tmp_path):
    out, err = command("convert", MODEL, "-o", tmp_path / "hf")
    told = f"{tmp_path}/hf: era 5, the same 16 greedy tokens as {MODEL}, exact: no constant and no "
    assert out == told + "log-probability differs\n" and err == ""
    found = json.loads(command("convert", "--json", tmp_path / "hf", "-o", tmp_path / "nano")[0])
    assert found == {
        "checkpoint": str(tmp_path / "hf"), "step": None, "output": str(tmp_path / "nano"),
        "era": "5", "greedy_tokens": found["greedy_tokens"], "differs": "",
        "largest_logprob_difference": 0.0,
    }  # fmt: skip
    assert len(found["greedy_tokens"]) == 16
    assert sorted(os.listdir(tmp_path)) == ["hf", "nano"]
    for name in ("hf", "nano"):
        flags = ["--num-blocks", "40", "--temperature", "0", "-m", tmp_path / name]
        out, _ = command("run", *flags, "Who wrote Moby Dick?")
        assert out == "Moby Dick was written by Herman Melville.\n"


@pytest.mark.parametrize("name", FIXTURES)
def test_convert_takes_every_era_and_a_relative_path(name, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fixture = FIXTURES[name]
    for source, output in ((fixture.directory, "hf"), ("hf", "nano")):
        flags = TOKENIZER if output == "hf" else []
        told = json.loads(command("convert", source, "-o", output, "--json", *flags)[0])
        assert told["era"] == fixture.json["era"].removesuffix("_late").removesuffix("b")
    assert Path("nano").is_dir() and len(os.listdir()) == 2


def test_convert_says_what_the_other_formats_constants_change(command, tmp_path):
    """Rounded tables move this fixture's logits by about 1e-2, and its epsilon by 2e-5."""
    hf = ERAS / "hf_era1_padded"
    rounded = "cos and sin are rounded to bfloat16 (they were not)"
    unrounded = "cos and sin are not rounded to bfloat16 (they were)"
    eps = "the norms' eps is 1.19e-07 (it was 1e-06)"
    for source, output, differs in (
        (FIXTURES["era1_padded"].directory, "a", unrounded),
        (tmp_path / "a", "b", rounded),
        (hf, "c", f"{eps} and {rounded}"),
    ):
        out, _ = command("convert", source, "-o", tmp_path / output, *TOKENIZER)
        start, end = out.split(f"with the same constants; in this format {differs}, which changes ")
        assert start == f"{tmp_path / output}: era 1, the same 16 greedy tokens as {source} "
        number = re.fullmatch(r"31 log-probabilities by at most ([\d.]+)\n", end)
        assert 1e-3 < float(number[1]) < 3e-2
    told = json.loads(command("convert", hf, "-o", tmp_path / "d", "--json", *TOKENIZER)[0])
    assert told["differs"] == f"{eps} and {rounded}"
    assert 1e-3 < told["largest_logprob_difference"] < 3e-2
    # what is measured is what a user would see
    prompt = [*range(0, 311, 1 + 311 // 16)]
    pair = [prompt[:1]], [prompt[1:] + told["greedy_tokens"]]
    scores = []
    for place in hf, tmp_path / "d":
        with LLM(place, tokenizer_path=ERAS / "tokenizer", device="cpu", plain=True) as llm:
            scores += llm.score(*pair)
    most = max(abs(x - y) for x, y in zip(*scores, strict=True))
    assert told["largest_logprob_difference"] == pytest.approx(most, abs=1e-5)


def test_convert_takes_a_model_with_a_short_context_and_odd_windows(command, tmp_path):
    """The check needs room for 32 tokens, whatever groups the layers are in."""
    checkpoint = Checkpoint(tmp_path)
    checkpoint.config |= {"sequence_len": 4, "window_pattern": "SLLS"}
    checkpoint.write()
    assert "era 5" in command("convert", checkpoint.directory, "-o", tmp_path / "hf")[0]


def test_a_result_that_gives_other_tokens_is_not_kept(mistake, tmp_path, monkeypatch):
    real, seen = LLM.generate, []

    def other(self, prompts, *args, **kwargs):
        outputs = real(self, prompts, *args, **kwargs)
        seen.append(self.name)
        if len(seen) == 2:
            outputs[0]["token_ids"][-1] += 1
        return outputs

    monkeypatch.setattr(LLM, "generate", other)
    said = mistake("convert", FIXTURES["era5"].directory, "-o", tmp_path / "out", *TOKENIZER)
    assert "would produce the tokens" in said and f"{tmp_path}/out" in said
    assert len(seen) == 2 and not os.listdir(tmp_path)


def test_another_models_tokenizer_is_refused_and_nothing_is_left(mistake, tmp_path):
    flags = ["-o", tmp_path / "out", "--tokenizer-dir", MODEL.parent / "tokenizer"]
    assert "do not belong together" in mistake("convert", FIXTURES["era5"].directory, *flags)
    assert not os.listdir(tmp_path)


def test_ctrl_c_leaves_nothing(command, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        assert len(os.listdir(tmp_path)) == 1  # the folder that would be renamed
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "generate", interrupted)
    with pytest.raises(SystemExit) as stop:
        command("convert", FIXTURES["era5"].directory, "-o", tmp_path / "out", *TOKENIZER)
    assert stop.value.code == 130 and not os.listdir(tmp_path)


def test_a_model_in_doubt_is_described_once_its_constants_are_given(command, mistake, tmp_path):
    checkpoint = Checkpoint(tmp_path, "era1_unpadded")
    checkpoint.config |= {"window_pattern": "SL"}
    checkpoint.write()
    said = mistake("info", checkpoint.directory)
    assert str(checkpoint.file) in said and "short_window=512" in said
    said = mistake("convert", checkpoint.directory, "-o", tmp_path / "out")
    assert "microvllm info" in said and not (tmp_path / "out").exists()
    recipe = ["rope_base=100000", "qk_scale=1.2", "short_window=512", "round_rotary=False"]
    flags = [word for item in recipe for word in ("--recipe", item)]
    found = json.loads(command("info", checkpoint.directory, "--json", *flags)[0])
    assert found["windows"] == [128, 256, 128, 256] and "why" not in found["recipe"]
    out, _ = command("run", "-m", checkpoint.directory, "--num-blocks", "20", "--json", *flags, "a")
    assert json.loads(out)["token_ids"]
