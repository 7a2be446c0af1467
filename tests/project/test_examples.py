"""The examples: the module to train is the engine's, and the lesson teaches."""

import math
import re
import sys

import pytest
import torch
from helpers.goldens import ERAS, FIXTURES, MODEL, ROOT
from torch import nn

from examples import gpt, grpo, speculation
from microvllm import LLM

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "It was a dark and stormy night, and the captain said that he had never seen such a sea."
SMALL = {"group": 4, "max_tokens": 12, "seed": 0}


@pytest.fixture(scope="module")
def module():
    return gpt.load(MODEL)


@pytest.fixture(scope="module")
def llm(module):
    with LLM(model=module, tokenizer_path=MODEL.parent / "tokenizer", copy=True) as llm:
        yield llm


# the module ---------------------------------------------------------------------------------------


def test_the_bundled_model_to_train_computes_what_its_file_does_in_the_engine(module):
    with LLM(MODEL, device="cpu", num_blocks=100) as llm, torch.no_grad():
        ids = llm.tokenizer.encode(TEXT * 8, bos=True)  # longer than a short window
        assert len(ids) > 160
        (scores,) = llm.score([ids[:1]], [ids[1:]])
    logprobs = module(torch.tensor([ids]))[0].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    torch.testing.assert_close(logprobs, torch.tensor(scores), atol=1e-3, rtol=0)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("name", ["era1_padded", "era1_unpadded", "era5"])
def test_a_checkpoint_of_the_first_and_of_the_last_era_computes_what_nanochat_did(name):
    era = FIXTURES[name]
    found = gpt.load(era.directory)
    last_logits = era.arrays["last_logits"][1:]
    for prompt, logits in zip(era.json["prompts"][1:], last_logits, strict=True):
        mine = found(torch.tensor([prompt["ids"]]))[0, -1]
        torch.testing.assert_close(mine, torch.tensor(logits), atol=1e-4, rtol=0)


def test_a_checkpoint_of_another_era_is_refused_by_name():
    directory = FIXTURES["era3"].directory
    with pytest.raises(ValueError, match=f"{directory} is of era 3: give .* era 1 or 5"):
        gpt.load(directory)
    with pytest.raises(FileNotFoundError, match="no model_<step>.pt"):
        gpt.load(ERAS)


# rewards and the loss -----------------------------------------------------------------------------


def test_only_an_answer_that_ends_with_the_sum_is_rewarded():
    right = ["12+7 is 19.", "12+719 12+7 is 19."]  # the second has asked a calculator
    wrong = ["", "12+7 is 9.", "12+7 is 119.", "12+7 is 19", "12+7 is 19. No", "19."]
    assert [grpo.reward((12, 7), x) for x in right + wrong] == [1] * 2 + [0] * 6


def test_a_rollout_has_a_row_for_each_answer_and_its_group_is_scored_by_its_own_question(llm):
    pairs = [(2, 3), (4, 4)]  # which the model knows
    rollouts = grpo.roll_out(llm, pairs, **SMALL)
    assert rollouts.rewards.tolist() == [[1] * 4] * 2
    assert len(rollouts.ids) == len(rollouts.mask) == len(rollouts.logprobs) == 8
    for i, (ids, mask) in enumerate(zip(rollouts.ids, rollouts.mask, strict=True)):
        a, b = pairs[i // 4]
        assert llm.tokenizer.decode(ids[mask == 1].tolist()) == f"{a}+{b} is {a + b}."
    assert not rollouts.logprobs[rollouts.mask == 0].any()


def test_the_engines_log_probabilities_are_those_of_the_module(llm, module):
    rollouts = grpo.roll_out(llm, [(12, 11), (14, 9)], **SMALL)
    assert rollouts.logprobs.min() < -0.1
    loss, difference = grpo.policy_loss(module, rollouts)
    assert 0 < difference < 1e-3
    away = rollouts._replace(logprobs=rollouts.logprobs - 1.0 * rollouts.mask)
    assert grpo.policy_loss(module, away)[1] == pytest.approx(1, abs=1e-3)


class Table(nn.Module):
    """A module whose logits are its parameter: (B, T, 9)."""

    def __init__(self, rows: int, length: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(rows, length, 9))

    def forward(self, ids):
        return self.logits


def test_better_answers_become_more_probable_and_forced_tokens_teach_nothing():
    ids = torch.tensor([[1, 2, 3, 4, 5]] * 4)
    mask = torch.tensor([[0, 1, 1, 0, 1], [0, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    logprobs = torch.full((4, 5), torch.tensor(1 / 9).log()) * mask
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0]])  # the second group is all right
    table = Table(4, 4)
    loss, difference = grpo.policy_loss(table, grpo.Rollouts(ids, mask, logprobs, rewards))
    assert difference < 1e-6
    loss.backward()
    own = table.logits.grad.gather(-1, ids[:, 1:, None])[..., 0]
    assert own.sign().tolist() == [[-1, -1, 0, -1], [1, 1, 0, 0], [0] * 4, [0] * 4]
    # a token that was drawn when it was half as probable counts twice
    first = own[0, 0].item()
    halved = grpo.Rollouts(ids, mask, logprobs - math.log(2) * mask, rewards)
    table.zero_grad()
    grpo.policy_loss(table, halved)[0].backward()
    assert table.logits.grad[0, 0, 2].item() == pytest.approx(2 * first)
    # answers without a token, all of them, leave the weights as they are
    table.zero_grad()
    grpo.policy_loss(table, grpo.Rollouts(ids, 0 * mask, 0 * logprobs, rewards))[0].backward()
    assert table.logits.grad.eq(0).all()


# the lesson ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_reward_of_a_few_sums_rises(capsys):
    module = gpt.load(MODEL)
    with LLM(model=module, tokenizer_path=MODEL.parent / "tokenizer", copy=True) as llm:
        sizes = SMALL | {"group": 8, "steps": 20, "prompts": 3, "lr": 2e-4}
        pairs = [(10, 14), (11, 12), (4, 11)]
        curve, *seconds = grpo.train(module, llm, pairs, grpo.Settings(**sizes))
    assert len(curve) == 20 and min(seconds) > 0
    assert sum(curve[-4:]) / 4 > sum(curve[:4]) / 4 + 0.2, curve
    assert capsys.readouterr().out.count("reward") == 20


@pytest.mark.slow
def test_the_program_tells_what_it_has_done_and_draws_it(tmp_path, capsys, monkeypatch):
    tiny = "--steps 2 --group 2 --prompts 2 --max-tokens 12 --out".split()
    grpo.main([*tiny, str(tmp_path / "new" / "folder")])
    told = capsys.readouterr().out
    first, last = re.search(r"never trained on: ([\d.]+) at .*, ([\d.]+) at the end", told).groups()
    assert 0.2 < float(first) < 0.6 and 0.2 < float(last) < 0.6
    assert re.search(r"rollouts by the engine: .* \d+% of the time", told)
    assert re.search(r"rollouts one at a time .* \d+% of the time", told)
    differences = re.findall(r"differ by at most (\S+)", told)
    assert len(differences) == 2 and max(map(float, differences)) < 1e-3
    assert (tmp_path / "new/folder/grpo.png").read_bytes()[:4] == b"\x89PNG"
    # without matplotlib the bars that were printed are the curve
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    grpo.main([*tiny, str(tmp_path)])
    assert "needs matplotlib: pip install" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--group", "1"], "--group 1: .* give 2 or more"),
        (["--steps", "0"], "--steps: give 1 or more, not '0'"),
        (["--lr", "fast"], "--lr: invalid float"),
        (["--lr", "-1"], "--lr -1.0: .* between 0 and 1"),
        (["--lr", "nan"], "--lr nan: .* between 0 and 1"),
        (["--out", str(ROOT / "README.md")], "README.md"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(flags, told, capsys, monkeypatch):
    monkeypatch.setattr(grpo, "load", None)
    with pytest.raises(SystemExit) as error:
        grpo.main(flags)
    printed = capsys.readouterr().err
    assert error.value.code == 2 and printed.startswith("grpo.py: error: ")
    assert printed.count("\n") == 1 and re.search(told, printed)


def test_plain_sampling_draws_from_the_same_distribution(llm, module):
    """For a question to which the answer is certain."""
    end = llm.tokenizer.encode_special("<|assistant_end|>")
    asked = grpo.prompt(llm, (2, 3))
    ids = grpo.sample_plainly(module, asked, 12, end)
    assert llm.tokenizer.decode(ids[len(asked) :]) == "2+3 is 5."
    assert grpo.sample_plainly(module, asked, 2, end) == ids[: len(asked) + 2]


@pytest.mark.slow
def test_speculation_takes_fewer_steps_for_the_same_texts(capsys):
    speculation.main()
    printed = capsys.readouterr().out
    steps = [int(number) for number in re.findall(r"tokens, (\d+) steps", printed)]
    tokens = [int(number) for number in re.findall(r"(\d+) tokens, ", printed)]
    assert len({*tokens}) == 1 and len(steps) == 5 and 3 * steps[-1] < steps[0]
    assert "9 of 9 texts are equal to those without draft tokens" in printed
