"""Tensor parallel: two processes that share a model write what one process writes."""

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from helpers.batches import hand_made_batch
from helpers.goldens import ERAS, FIXTURES, MODEL, ROOT

from microvllm import LLM, SamplingParams
from microvllm.attention import PagedKVCache
from microvllm.checkpoint import empty_model, find_step, read_checkpoint
from microvllm.fused.backend import Backend
from microvllm.fused.model import FusedGPT
from microvllm.model import RECIPES, GPTConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
PATIENCE = 120  # seconds that nothing here may take, however busy the machine is


class Pair:
    """Two processes that have met over a file, and call what the test sends."""

    def __init__(self, directory):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(2):
            ours, theirs = context.Pipe()
            given = rank, str(directory / "store"), theirs
            self.processes.append(context.Process(target=call_what_comes, args=given, daemon=True))
            self.pipes.append(ours)
            self.processes[-1].start()
            theirs.close()

    def send(self, function, *args, ranks=(0, 1)) -> None:
        for rank in ranks:
            self.pipes[rank].send((function, args))

    def answer(self, rank: int):
        """What came of it on a rank, an exception perhaps."""
        assert self.pipes[rank].poll(PATIENCE), f"rank {rank} hangs"
        return self.pipes[rank].recv()

    def __call__(self, function, *args) -> list:
        """What function(rank, *args) gives on each of them."""
        self.send(function, *args)
        found = [self.answer(rank) for rank in range(2)]
        for answer in found:
            if isinstance(answer, Exception):
                raise answer
        return found

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(PATIENCE)


def call_what_comes(rank: int, store: str, pipe) -> None:
    """What a rank does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    with contextlib.suppress(EOFError):
        while True:
            function, args = pipe.recv()
            try:
                pipe.send(function(rank, *args))
            except Exception as error:
                pipe.send(error)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    both = Pair(tmp_path_factory.mktemp("ranks"))
    yield both
    both.end()


def build(name: str, tensor_parallel: int = 1, **kwargs) -> LLM:
    kwargs = {"num_blocks": 60, "device": "cpu", "tensor_parallel": tensor_parallel} | kwargs
    if name == "bundled":
        return LLM(MODEL, **kwargs)
    fixture = FIXTURES[name]
    kwargs = fixture.overrides | kwargs
    return LLM(fixture.directory, tokenizer_path=fixture.tokenizer, **kwargs)


# the same as one ----------------------------------------------------------------------------------

PROMPTS = [[7 * i % 256 for i in range(n)] for n in (1, 16, 33, 140)]
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


def work(rank: int, name: str, size: int, options: dict, max_tokens: int = 16) -> tuple:
    """Greedy rows among sampled ones, several samples, log-probabilities, a score."""
    greedy = replace(GREEDY, max_tokens=max_tokens)
    with build(name, size, **options) as llm:
        params = [greedy] * len(PROMPTS)
        params += [replace(greedy, temperature=0.8, top_k=20, n=3), replace(greedy, logprobs=2)]
        ids = [
            llm.add_request(prompt, p)
            for prompt, p in zip([*PROMPTS, PROMPTS[2], PROMPTS[1]], params, strict=True)
        ]
        found = {}
        while not llm.is_finished():
            found.update((output.request_id, output) for output in llm.step())
            llm.scheduler.blocks.check(llm.scheduler.running)
        tokens = [[s["token_ids"] for s in found[i].samples] for i in ids]
        scores = llm.score([PROMPTS[2], PROMPTS[3]], [[3, 5, 7], [11] * 20])
        return tokens, found[ids[-1]].logprobs, scores, llm.stats()["preemptions"]


@functools.cache
def alone(name: str, **options) -> tuple:
    return work(0, name, 1, options)


def logprobs(found: tuple) -> list[float]:
    _, listed, scores, _ = found
    return [entry["logprob"] for entry in listed] + sum(scores, [])


@pytest.mark.parametrize("name", ["era1_unpadded", "era3", "era5", "bundled"])
def test_two_ranks_write_the_tokens_of_one(ranks, name):
    first, second = ranks(work, name, 2, {})
    assert first == second  # to the last bit
    assert first[0] == alone(name)[0]
    assert logprobs(first) == pytest.approx(logprobs(alone(name)), abs=1e-4)


def test_preempted_sequences_too(ranks):
    first, second = ranks(work, "era5", 2, {"num_blocks": 16, "max_batched_tokens": 50}, 48)
    assert first == second and first[-1] > 0
    assert first[0] == work(0, "era5", 1, {}, 48)[0]


def drafting(rank: int, size: int) -> tuple:
    params = [replace(GREEDY, max_tokens=80), replace(GREEDY, temperature=0.8, seed=1)]
    with build("bundled", size, prompt_lookup=4) as llm:
        outputs = llm.generate([PROMPTS[1] * 3, PROMPTS[2]], params, False)
        return [output["token_ids"] for output in outputs], llm.stats()["accepted_tokens"]


def test_all_ranks_draft_the_same(ranks):
    first, second = ranks(drafting, 2)
    assert first == second == drafting(0, 1) and first[1] > 0


@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"dtype": "bfloat16"}], ids=str)
def test_smaller_weights_are_shared_out_like_others(ranks, options):
    first, second = ranks(work, "bundled", 2, options)
    assert first == second
    assert sum(first[2][1]) == pytest.approx(sum(alone("bundled", **options)[2][1]), rel=0.02)


def random_model(era: str, ranks=None) -> FusedGPT:
    """A model of an era with 2 query heads to each of 2 kv heads, and an odd vocabulary."""
    config = GPTConfig(64, 301, 4, 4, 2, 64, "SL")
    recipe, draw = RECIPES[era], torch.Generator().manual_seed(int(era))
    weights = {
        name: torch.randn(weight.shape, generator=draw) / 5
        for name, weight in empty_model(config, recipe, 320).state_dict().items()
    }
    return FusedGPT(
        config, recipe, weights, Backend(torch.device("cpu"), torch.float32), ranks=ranks
    )


@torch.inference_mode()
def random_logits(rank: int, era: str, size: int) -> tuple:
    from microvllm.features.parallel import Ranks

    model = random_model(era, Ranks(size, "cpu") if size > 1 else None)
    cache = PagedKVCache(model.local, 8, 16, model.dtype, "cpu")
    text = [5 * i % 301 for i in range(40)]
    batch = hand_made_batch([(text[:17], 16, 17, [4, 5]), (text, 0, 40, [1, 2, 3])], 16)
    logits = model.logits(model.forward(batch, cache))
    sizes = {name: tensor.numel() for name, tensor in model.tensors.items()}
    # a matrix, or three: as many numbers as the parts that this rank was given
    sizes |= {names: sum(w.sizes) * w.width for names, w in model.linears.items()}
    return logits, sizes


@pytest.mark.parametrize("era", list(RECIPES))
def test_every_era_is_shared_out(ranks, era):
    (first, mine), (second, theirs) = ranks(random_logits, era, 2)
    whole, sizes = random_logits(0, era, 1)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, whole, atol=1e-4, rtol=1e-4)
    # each matrix is there once: half of it here, half of it there
    kept = {"transformer.wte.weight", "resid_lambdas", "x0_lambdas", "smear_gate.weight"}
    kept |= {"smear_lambda", "backout_lambda"}
    for name, size in sizes.items():
        if name == ("lm_head",):  # 301 tokens: 151 and 150, and no padding
            assert (mine[name], theirs[name]) == (151 * 64, 150 * 64)
        else:
            assert [mine[name], theirs[name]] == [size // (1 if name in kept else 2)] * 2, name


# new weights, pools, traces -----------------------------------------------------------------------


def swap(rank: int, size: int) -> list:
    with build("era5", size) as llm:
        old = llm.generate(PROMPTS, GREEDY)
        directory = FIXTURES["era5"].directory
        state = read_checkpoint(directory, find_step(directory, None))[2]
        draw = torch.Generator().manual_seed(1)
        new = {n: w + 0.2 * torch.randn(w.shape, generator=draw) for n, w in state.items()}
        llm.update_weights(new)
        found = [llm.generate(PROMPTS, GREEDY)]
        with pytest.raises(ValueError, match="there are 0 tensors"):
            llm.update_weights({})
        llm.update_weights(state)
        found += [llm.generate(PROMPTS, GREEDY), old]
        return [[output.token_ids for output in outputs] for outputs in found]


def test_each_rank_takes_its_part_of_new_weights(ranks):
    first, second = ranks(swap, 2)
    assert first == second == swap(0, 1)
    assert first[1] == first[2] != first[0]


def trace(rank: int, directory: str) -> tuple:
    def free_memory(device):
        return [9_000_000, 5_000_000][rank]

    from microvllm import engine, parts

    before = engine.free_memory
    engine.free_memory = parts.free_memory = free_memory
    try:
        path = f"{directory}/{rank}.jsonl"
        with build("era5", 2, num_blocks=None, trace=path) as llm:
            llm.generate([PROMPTS[0]], GREEDY)
            return llm.stats()["num_blocks"], os.path.exists(path)
    finally:
        engine.free_memory = parts.free_memory = before


def test_the_smallest_memory_decides_the_pool_and_one_rank_writes_the_trace(ranks, tmp_path):
    (blocks, written), (others, more) = ranks(trace, str(tmp_path))
    assert blocks == others
    # 5 MB, half of them for caches, of two ranks; 4 layers of 1 head of 16, K and V, float32
    tables = 10 * 16 * 400  # bytes of the context's positions
    assert blocks + 1 == (5_000_000 // 2 // 2 - tables) // (4 * 2 * 16 * 16 * 4 + 48)  # and lists
    assert (written, more) == (True, False)


# what cannot be, and what goes wrong --------------------------------------------------------------


def test_the_error_of_a_process_alone_says_how_to_start():
    with pytest.raises(ValueError, match="tensor_parallel=2 needs 2 processes, not 1: .*torchrun"):
        build("era5", 2)
    with pytest.raises(ValueError, match="tensor_parallel must be between 1"):
        build("era5", 0)


def test_heads_that_do_not_divide_are_refused_with_the_numbers(ranks):
    with pytest.raises(ValueError, match=r"=2 does not divide .* 1 kv heads \(of 2 query heads\)"):
        ranks(work, "era4", 2, {})
    with pytest.raises(ValueError, match="tensor_parallel=3 needs 3 processes, not 2"):
        ranks(work, "era5", 3, {})
    assert ranks(work, "era5", 2, {})[0][0] == alone("era5")[0]  # nothing has happened


def outcome(call) -> str:
    with pytest.raises(RuntimeError) as caught:
        call()
    return str(caught.value)


def forget(rank: int) -> None:
    """The failure of an earlier test."""
    if rank == 0:
        torch.distributed.distributed_c10d._get_default_store().set("microvllm/failure", "")


def go_apart(rank: int) -> list[str]:
    """Each rank is given another prompt."""
    with build("era5", 2) as llm:
        found = [outcome(lambda: llm.generate([PROMPTS[0] + [rank]], GREEDY))]
        return found + [outcome(lambda: llm.generate(PROMPTS, GREEDY))]


def test_ranks_that_are_given_different_prompts_find_out(ranks):
    for first, again in ranks(go_apart):
        assert "rank 0 and rank 1 differ in what they want to compute next" in first
        assert "restart" in again  # nothing is computed with half of a model


def stumble(rank: int) -> str:
    """A step fails on one of them."""
    with build("era5", 2) as llm:
        product, calls = llm.model.layers[2].fc, []

        def fails(x):
            calls.append(x)
            if rank == 1 and len(calls) == 3:
                raise RuntimeError("out of luck")
            return product(x)

        llm.model.layers[2].fc = fails
        return outcome(lambda: llm.generate(PROMPTS, GREEDY))


def test_a_step_that_fails_on_one_rank_ends_the_others_with_its_error(ranks):
    ranks(forget)
    first, second = ranks(stumble)
    assert second == "out of luck"
    assert first == "tensor parallel: rank 1 failed: RuntimeError: out of luck"


def endless(rank: int) -> str:
    with build("era5", 2) as llm:
        while True:
            llm.generate(PROMPTS, GREEDY)


def test_a_rank_that_is_killed_ends_the_others(tmp_path):
    both = Pair(tmp_path)
    try:
        both(work, "era5", 2, {})
        both.send(endless)
        time.sleep(0.5)
        os.kill(both.processes[1].pid, signal.SIGKILL)
        error = both.answer(0)
        assert isinstance(error, RuntimeError) and "another rank is gone" in str(error)
    finally:
        both.end()


# the command line ---------------------------------------------------------------------------------


def torchrun(*words, stdin: str = "") -> subprocess.CompletedProcess:
    """A free port is torchrun's own affair."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*start, *words], cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=PATIENCE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_the_command_reads_and_prints_once():
    words = ["-m", "microvllm", "run", "--json", "--tensor-parallel", "2", "--temperature", "0"]
    words += ["--num-blocks", "60", "--max-tokens", "8", "--raw"]
    done = torchrun(*words, stdin="Once upon a time\nThe island\n")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["Once upon a time", "The island"]
    with build("bundled") as llm:
        alone = llm.generate([row["prompt"] for row in rows], replace(GREEDY, max_tokens=8))
    assert [row["token_ids"] for row in rows] == [output.token_ids for output in alone]


def test_a_mistake_is_reported_once():
    era4 = ERAS / "era4" / "base_checkpoints" / "d6"
    words = ["run.py", "--tensor-parallel", "2", "--model", str(era4)]
    words += ["--tokenizer-dir", str(ERAS / "tokenizer"), "--num-blocks", "60"]
    done = torchrun(*words)
    assert done.returncode and not done.stdout
    (line,) = [line for line in done.stderr.splitlines() if "run.py: error:" in line]
    assert "does not divide the model's 1 kv heads" in line
    assert "exitcode  : 2" in done.stderr  # as torchrun has it
