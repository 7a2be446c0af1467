"""The GPU benchmark on a CPU, tiny: it runs, does the work it says, and its limits add up."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from microvllm import LLM, SamplingParams
from microvllm.model import GPTConfig

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts, which import one another

import checkpoint  # noqa: E402
import gpu  # noqa: E402

TINY = SimpleNamespace(
    depth=3, aspect=64, width=96, head_dim=32, kv_heads=1, vocab=500, sequence_len=256, seed=0
)


def ceilings(config: GPTConfig, era: str) -> gpu.Ceilings:
    """A card whose steps take 2 s a row and 0.25 s a sampled row, and that copies 1 kB/s."""
    card = gpu.Ceilings(config, era, torch.device("cpu"), torch.float32)
    card.body_times, card.head_times = {1: 2.0, 64: 128.0}, {1: 0.25, 64: 16.0}
    card.bandwidth = 1000.0
    return card


@pytest.mark.parametrize("era", ["1", "2", "3", "4", "5"])
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_a_random_checkpoint_of_each_era_loads_and_talks(tmp_path, era, storage):
    args = SimpleNamespace(**vars(TINY), era=era, storage=storage)
    path = str(checkpoint.make_checkpoint(tmp_path / "model", args, "cpu"))
    with LLM(path, tokenizer_path=path, device="cpu", num_blocks=32, attention="sdpa") as llm:
        assert llm.model.recipe.era == era
        assert llm.tokenizer.vocab_size == 500 and llm.tokenizer.has_chat
        greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        outputs = llm.generate([[5, 6, 7], "some text"], greedy, use_tqdm=False)
    # activations that overflow or die out end in one token for ever
    assert all(len(set(output["token_ids"])) > 3 for output in outputs)


def test_a_vocabulary_without_room_for_bytes_and_specials_is_refused():
    with pytest.raises(ValueError, match="--vocab must be 265 or more"):
        checkpoint.shape(SimpleNamespace(**vars(TINY) | {"vocab": 264}, era="1"))
    assert len(checkpoint.random_tokenizer(265)._mergeable_ranks) == 256


def test_the_shape_is_nanochats():
    d34 = SimpleNamespace(**vars(TINY) | {"depth": 34, "width": None, "head_dim": 128}, era="1")
    config = checkpoint.shape(d34)
    assert (config["n_embd"], config["n_head"], config["n_layer"]) == (2176, 17, 34)
    d33 = SimpleNamespace(**vars(d34) | {"depth": 33})
    assert checkpoint.shape(d33)["n_embd"] == 2176  # 2,112 is no whole number of heads


def test_the_limit_of_a_batch_adds_up_its_steps():
    card = ceilings(GPTConfig(256, 320, 2, 2, 1, 64), "1")
    token = 2 * 2 * 32 * 4  # bytes of one token: K and V of 2 layers, one head of 32, float32
    # one at a time: a prompt of 3, its second token at context 4, then a prompt of 5
    alone = (3 * 2 + 1 * 2 + 5 * 2) + 3 * 0.25 + token * (3 + 4 + 5) / 1000
    assert card.batch_seconds([(3, 2), (5, 1)], max_batch=1) == pytest.approx(alone)
    # together: both prompts in a step, then the first's second token
    both = (8 * 2 + 1 * 2) + 3 * 0.25 + token * (3 + 5 + 4) / 1000
    assert card.batch_seconds([(3, 2), (5, 1)], max_batch=2) == pytest.approx(both)
    weights = (2 * (4 * 64 * 64 + 64 * 64 * 8 - 2 * 64 * 32) + 320 * 64) * 4
    stream = (2 * weights + token * (3 + 4)) / 1000
    assert card.stream_seconds(3, 2) == pytest.approx(stream)


def test_times_between_and_beyond_the_measured_rows():
    times = {1: 1.0, 3: 2.0, 10: 4.0}
    assert gpu.between(times, 2) == 1.5
    assert gpu.between(times, 10) == 4.0
    assert gpu.between(times, 25) == 10.0


def test_windows_shorten_what_is_read_and_what_is_multiplied():
    card = ceilings(GPTConfig(512, 320, 4, 2, 2, 64, "SSSL"), "5")
    assert card.windows == {128: 3, 512: 1}
    assert card.kv_bytes(300) == (3 * 129 + 300) * 2 * 64 * 4
    pairs = sum(3 * min(p + 1, 129) + min(p + 1, 513) for p in range(300))
    products, attention = card.prefill_flops(300)
    assert attention == 4 * pairs * 64  # two products, a multiplication and an addition each
    assert products == 2 * (300 * 4 * 12 * 64 * 64 + 320 * 64)


@pytest.mark.parametrize("mean, sigma, low, high", [(23, 0.55, 6, 77), (306, 0.55, 1, 1024)])
def test_lengths_keep_their_mean_and_their_borders(mean, sigma, low, high):
    drawn = gpu.lengths(512, mean, sigma, low, high, seed=1)
    assert drawn == gpu.lengths(512, mean, sigma, low, high, seed=1)
    assert sum(drawn) / 512 == pytest.approx(mean, rel=0.01)
    assert low <= min(drawn) < max(drawn) <= high


def test_the_benchmark_runs_on_a_cpu():
    options = "--device cpu --depth 2 --width 64 --head-dim 32 --vocab 320 --shrink 32 --repeats 1"
    engine = "--num-blocks 512 --block-size 4 --max-batch-size 8 --attention sdpa"
    parts = "--only startup,headline,single,mixed,prefill,prefix"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", *f"{options} {engine} {parts}".split()],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["model"] | {"era": "1", "n_layer": 2, "n_embd": 64} == result["model"]
    startup = result["startup"]
    assert 0 < startup["cached_torch_s"] < startup["cached_first_s"] < startup["cached_more_s"]
    assert result["headline"]["new_tokens"] == 512 // 32 * (64 // 32)
    assert result["headline"]["prefill_tokens"] == result["headline"]["prompt_tokens"]
    assert result["single"]["new_tokens"] == 4
    for part in ("headline", "single", "mixed"):
        assert result[part]["tokens_per_s"] > 0 and result[part]["limit_tokens_per_s"] > 0
        assert result[part]["cached_tokens"] == 0  # fresh prompts, or it would flatter
    assert result["prefill"]["ms"] > 0
    # 4 prompts share 8 tokens: two blocks, which all four find once they were seen
    assert result["prefix"]["seen_cached_tokens"] == 4 * 8
