"""The report of how far a rollout is from the training's forward pass."""

import sys

import numpy as np
import pytest
import torch
from helpers.goldens import ERAS
from helpers.standin import GPT, optimizers, train

from microvllm import LLM
from microvllm.rl import mismatch

pytestmark = pytest.mark.usefixtures("one_thread")

# two rows: a prompt of two tokens, answers of three tokens (one of them forced) and of one
MASKS = [[0, 0, 1, 0, 1], [0, 0, 1]]
ROLLOUT = [[0.0, 0.0, -1.0, 0.0, -2.0], [0.0, 0.0, -0.5]]
TRAINING = torch.tensor([[-9.0, -1.1, -9.0, -1.5], [-9.0, -0.5, -9.0, -9.0]])


def test_the_numbers_are_those_of_the_definitions():
    report = mismatch(TRAINING, ROLLOUT, MASKS)
    delta = np.array([-0.1, 0.5, 0.0])
    assert report.num_tokens == 3 and report.num_not_finite == 0
    assert report.mean == pytest.approx(0.2)
    assert report.largest == pytest.approx(0.5)
    assert report.share_outside == pytest.approx(1 / 3)
    assert report.kl == pytest.approx(np.mean(np.exp(delta) - 1 - delta))
    assert report.mean_ratio == pytest.approx(np.exp(delta).mean())
    assert report.counts.tolist() == [2, 0, 1]  # the forced token was not drawn
    np.testing.assert_allclose(report.mean_at, [0.05, np.nan, 0.5], atol=1e-7)
    np.testing.assert_allclose(report.largest_at, [0.1, np.nan, 0.5], atol=1e-7)
    line = str(report)
    assert line == repr(report) and "\n" not in line
    assert "3 tokens" in line and "33.33% of ratios" in line and "position 2" in line
    assert report.scalars().keys() >= {"mean", "largest", "kl", "share_outside", "num_tokens"}


def test_tensors_and_padded_rows_are_the_same_as_lists():
    padded = [torch.tensor(row + [0] * (5 - len(row))) for row in MASKS]
    rows = [torch.tensor(row + [0.0] * (5 - len(row))) for row in ROLLOUT]
    report = mismatch(TRAINING, torch.stack(rows), torch.stack(padded))
    assert str(report) == str(mismatch(TRAINING, ROLLOUT, MASKS))
    training = TRAINING.bfloat16().requires_grad_()
    assert mismatch(training, ROLLOUT, MASKS).num_tokens == 3


def test_equal_distributions_are_exactly_zero():
    report = mismatch([[-5.0, -1.0, -3.0, -2.0]], ROLLOUT[:1], MASKS[:1])
    assert (report.mean, report.largest, report.kl, report.share_outside) == (0, 0, 0, 0)
    assert report.mean_ratio == 1 and not report.is_cut


def test_filters_and_temperature_are_named():
    options = {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.1}
    line = str(mismatch(TRAINING, ROLLOUT, MASKS, **options))
    assert "temperature=0.7 top_k=50 top_p=0.9 min_p=0.1 draws from another distribution" in line
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert "another distribution" not in str(mismatch(TRAINING, ROLLOUT, MASKS, **off))
    assert "top_k=1 draws" in str(mismatch(TRAINING, ROLLOUT, MASKS, top_k=1))


def test_numbers_that_are_not_finite_are_counted_apart():
    training = TRAINING.clone()
    training[0, 1] = torch.nan
    training[1, 1] = -torch.inf
    report = mismatch(training, ROLLOUT, MASKS)
    assert report.num_not_finite == 2 and report.num_tokens == 1
    assert report.mean == pytest.approx(0.5)
    assert "2 more are NaN or infinite" in str(report)
    training[0, 3] = torch.nan
    assert "no tokens to compare; 3 more" in str(mismatch(training, ROLLOUT, MASKS))
    assert "no tokens" in str(mismatch([], [], []))
    huge = mismatch([[0.0, 800.0]], [[0.0, 0.0, -1.0]], [[0, 0, 1]])
    assert huge.largest == 801 and huge.kl == np.inf and "inf" in str(huge)


def test_infinite_numbers_give_no_warning(recwarn):
    both = mismatch([[-np.inf, -1.0]], [[0.0, -np.inf, -1.0]], [[0, 1, 1]])
    assert (both.num_tokens, both.num_not_finite) == (1, 1)
    assert mismatch([[1e308, 0.0]], [[0.0, -1e308, 0.0]], [[0, 1, 1]]).num_not_finite == 1
    huge = mismatch([[0.0, 0.0]], [[0.0, -800.0, 0.0]], [[0, 1, 1]])
    assert huge.mean_ratio == np.inf and not huge.is_cut
    assert not recwarn.list


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TRAINING, ROLLOUT, MASKS[:1]), "2 training_logprobs, 2 logprobs and 1 masks"),
        ((TRAINING, ROLLOUT, [MASKS[0], [0, 1]]), "row 1 of .* shapes"),
        ((TRAINING[:, :2], ROLLOUT, MASKS), "row 0: training_logprobs has 2 columns"),
        (([[0.0]], [[-1.0]], [[1]]), "row 0: .* column t is of token t"),
        (([[[0.0]]], [[0.0, -1.0]], [[0, 1]]), "row 0 of .* shapes"),
        (([[0.0, 0.0]], [[0.0, -1.0, -1.0]], [[0, np.nan, 1]]), "row 0 of masks has other values"),
        ((TRAINING, ROLLOUT, [MASKS[0], [0, 0, -1]]), "row 1 of masks has other values"),
        (([["a"]], [[0.0, -1.0]], [[0, 1]]), "row 0 of training_logprobs: could not convert"),
    ],
)
def test_rows_that_do_not_belong_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mismatch(*arguments)


@pytest.mark.parametrize("name", ["training_logprobs", "logprobs", "masks"])
def test_what_has_no_rows_is_named(name):
    arguments = {"training_logprobs": TRAINING, "logprobs": ROLLOUT, "masks": MASKS}
    with pytest.raises(TypeError, match=f"^{name} must be a tensor or a list of rows, got None"):
        mismatch(**arguments | {name: None})


def test_a_plot_is_drawn_where_there_is_matplotlib(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    report = mismatch(TRAINING, ROLLOUT, MASKS, top_k=5)
    report.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert "top_k=5" in report.plot().axes[0].get_title()
    for name in list(sys.modules):
        if name.partition(".")[0] == "matplotlib":
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="a plot needs matplotlib: pip install"):
        report.plot()


# beside an engine ---------------------------------------------------------------------------------


def forward(gpt: GPT, sequences: list[list[int]]) -> list[torch.Tensor]:
    """The module's log-probability of each token but the first."""
    rows = []
    with torch.no_grad():
        for sequence in sequences:
            ids = torch.tensor([sequence])
            logprobs = gpt(ids[:, :-1]).log_softmax(-1)
            rows.append(logprobs.gather(-1, ids[:, 1:, None])[0, :, 0])
    return rows


def test_rollouts_are_exact_until_the_module_is_trained_or_the_sampler_filters():
    gpt = GPT()
    prompt = [5 * i % 300 for i in range(12)]
    sizes = {"num_samples": 8, "max_tokens": 24, "logprobs": True}
    with LLM(model=gpt, tokenizer_path=ERAS / "tokenizer", plain=True, num_blocks=60) as llm:
        sequences, masks, logprobs = llm.generate_batch(prompt, **sizes)
        exact = mismatch(forward(gpt, sequences), logprobs, masks)
        assert exact.num_tokens > 100 and 0 < exact.largest < 1e-4 and exact.share_outside == 0
        assert not exact.is_cut and abs(exact.mean_ratio - 1) < 1e-4
        # a filter is seen in the numbers, and named if it is known
        sequences, masks, filtered = llm.generate_batch(prompt, top_k=5, **sizes)
        rows = forward(gpt, sequences)
        cut = mismatch(rows, filtered, masks)
        assert cut.is_cut and cut.mean_ratio < 0.9 and "(top_k?)" in str(cut)
        assert "top_k=5 draws from another" in str(mismatch(rows, filtered, masks, top_k=5))
        # rollouts of old weights
        train(gpt, optimizers(gpt))
        old = mismatch(forward(gpt, sequences), filtered, masks)
        assert old.mean > 0.1 and old.kl > 0.01
