"""Which model the full engine loads, and what it says of recipes and weights."""

import pickle

import pytest
import torch
from helpers.batches import hand_made_batch
from helpers.checkpoints import Checkpoint, Hostile, refused

from microvllm import LLM
from microvllm.attention import PagedKVCache
from microvllm.loading import load_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def checkpoint(tmp_path) -> Checkpoint:
    return Checkpoint(tmp_path)


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
        load_model(checkpoint.directory, **override)


def test_float16_is_loaded_with_a_warning(checkpoint, caplog):
    assert load_model(checkpoint.directory, dtype="float16").dtype == torch.float16
    assert "float16 ends at 65,504" in caplog.text


def test_the_padding_of_the_vocabulary_has_no_logits(tmp_path):
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
    model = load_model(checkpoint.directory)
    padded = logits(model)
    assert padded.shape[1] == model.config.vocab_size == 311
    torch.testing.assert_close(padded, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("zipped", [True, False, None], ids=["torch", "torch old", "pickle"])
def test_nothing_in_a_file_is_run(checkpoint, tmp_path, zipped):
    """test_checkpoint.py shows that such files run code if they are trusted."""
    marker = tmp_path / "executed"
    if zipped is None:
        checkpoint.file.write_bytes(pickle.dumps({"lm_head.weight": Hostile(marker)}, protocol=2))
    else:
        poisoned = checkpoint.weights | {"lm_head.weight": Hostile(marker)}
        torch.save(poisoned, checkpoint.file, _use_new_zipfile_serialization=zipped)
    with refused(ValueError, checkpoint.file):
        load_model(checkpoint.directory)
    assert not marker.exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named_and_end_requests_with_an_error(
    checkpoint, number, caplog
):
    # they gave token 0 for ever
    name = "transformer.h.0.attn.c_q.weight"
    checkpoint.weights[name] = checkpoint.weights[name].clone()
    checkpoint.weights[name][0, 0] = number
    torch.save(checkpoint.weights, checkpoint.file)
    for options in ({"attention": "numba"}, {"attention": "sdpa"}, {"plain": True}):
        caplog.clear()
        llm = LLM(checkpoint.directory, num_blocks=20, device="cpu", **options)
        if "plain" not in options:
            assert f"NaN or infinite weights: {name}" in caplog.text
        (output,) = llm.generate([[5, 6, 7]], use_tqdm=False)
        assert output["finish_reason"] == "error" and output["token_ids"] == []
        assert output["stop_reason"] == "no token is left to draw"
