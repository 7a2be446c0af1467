"""The benchmarks, tiny: they run, do the work they say, and their limits add up."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from microvllm import LLM, SamplingParams
from microvllm.model import GPTConfig

pytestmark = pytest.mark.usefixtures("one_thread")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts, which import one another

import checkpoint  # noqa: E402
import compare  # noqa: E402
import gpu  # noqa: E402
import llama  # noqa: E402
import peers  # noqa: E402
import speculation  # noqa: E402

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
    assert gpu.interpolate(times, 2) == 1.5
    assert gpu.interpolate(times, 10) == 4.0
    assert gpu.interpolate(times, 25) == 10.0


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


@pytest.mark.slow
def test_the_benchmark_runs_on_a_cpu():
    options = "--device cpu --depth 2 --width 64 --head-dim 32 --vocab 320 --shrink 32 --repeats 1"
    engine = "--num-blocks 512 --block-size 4 --max-batch-size 8"
    done = subprocess.run(  # every part there is
        [sys.executable, BENCHMARKS / "gpu.py", *f"{options} {engine}".split()],
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
    for part in (
        "headline", "single", "filtered", "filtered single", "mixed", "deterministic headline",
        "deterministic single", "headline in int8", "single in int8",
    ):  # fmt: skip
        assert result[part]["tokens_per_s"] > 0 and result[part]["limit_tokens_per_s"] > 0
        assert result[part]["cached_tokens"] == 0  # fresh prompts, or it would flatter
    assert result["prefill"]["ms"] > 0
    # 4 prompts share 8 tokens: two blocks, which all four find once they were seen
    assert result["prefix"]["cached_prefix_cached_tokens"] == 4 * 8
    smaller = result["quantized"]
    assert (
        smaller["tokens"] > 100 and 0.9 < smaller["perplexity"] / smaller["plain_perplexity"] < 1.1
    )
    for part in ("single", "headline", "samples"):
        assert result["peers"][f"eager_{part}_tokens_per_s"] > 0
    if importlib.util.find_spec("transformers"):
        assert result["peers"]["transformers_generate_headline_tokens_per_s"] > 0
    assert set(gpu.PARTS) <= set(result)


def test_the_eager_loop_makes_what_one_pass_over_everything_would():
    torch.manual_seed(0)
    config = GPTConfig(64, 100, 2, 4, 2, 64)
    loop = gpu.EagerLoop(config, torch.device("cpu"), torch.float32)
    first, second = torch.zeros(2, 2, 2, 3, 2, 9, 16)  # two caches for three samples
    ids = torch.randint(100, (3, 9))
    with torch.inference_mode():
        whole = loop.forward(ids, first, 0)
        loop.forward(ids[:, :5], second, 0)
        for at in range(5, 9):
            logits = loop.forward(ids[:, at : at + 1], second, at)
        columns = loop.generate([1, 2, 3], samples=3, new=4)
    torch.testing.assert_close(logits, whole)
    torch.testing.assert_close(first, second)
    assert (len(columns), len(columns[0])) == (4, 3)


class FakeCard:
    """CUDA graphs and events: an event is when the work queued before it ended."""

    def __init__(self, monkeypatch):
        self.now, self.waiting, self.capturing, self.recorded = 0.0, 0, None, 0
        card = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                assert card.capturing is None
                self.at = card.now

            def elapsed_time(self, other):
                assert not card.waiting, "read before it is over"
                return 1000 * (other.at - self.at)

        class Graph:
            def replay(self):
                for seconds in self.work:
                    card.work(seconds)

        @contextmanager
        def capture(graph):
            assert not card.waiting, "synchronize before a capture"
            card.capturing = graph.work = []
            yield
            card.capturing, card.recorded = None, card.recorded + 1

        for name, fake in {"Event": Event, "CUDAGraph": Graph, "graph": capture}.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(card, "waiting", 0))

    def work(self, seconds: float) -> None:
        if self.capturing is not None:
            self.capturing.append(seconds)
        else:
            self.now, self.waiting = self.now + seconds, self.waiting + 1


@pytest.mark.parametrize("graph", [True, False])
def test_a_card_is_timed_by_its_events(monkeypatch, graph):
    card, runs = FakeCard(monkeypatch), []

    def run():
        runs.append(len(runs))
        card.work(0.25)
        card.work(0.5)

    seconds = gpu.median_seconds(run, torch.device("cuda"), graph)
    assert seconds == 0.75 and card.recorded == graph
    assert len(runs) == (4 if graph else 23)


def test_an_engines_run_is_timed_by_the_clock_and_by_events(monkeypatch):
    card = FakeCard(monkeypatch)

    def generate(prompts, params, use_tqdm):
        card.work(3.0)
        return [{"token_ids": [0] * p.max_tokens} for p in params]

    llm = SimpleNamespace(generate=generate, stats=lambda: dict.fromkeys(gpu.STATS, 0))
    bench = SimpleNamespace(llm=llm, device=torch.device("cuda"))
    seconds, stats = gpu.Bench.generate(bench, [[1], [2]], [4, 5])
    assert 0 < seconds < 1 and stats["card_seconds"] == 3.0


# compare.py: other engines on a CPU


def test_the_workloads_are_the_ones_that_it_says():
    first, second, *_, shared = (compare.workload(name, 1, 4096, 1) for name in compare.WORKLOADS)
    sizes = [len(prompt) for prompt in first["prompts"]]
    assert (len(sizes), sum(sizes)) == (64, 64 * 23) and 6 <= min(sizes) < max(sizes) <= 77
    assert first["new"] == [64] * 64 and len({*map(tuple, first["prompts"])}) == 64
    sizes = [len(prompt) for prompt in second["prompts"]]
    assert 20 <= min(sizes) < max(sizes) <= 512 and sum(second["new"]) == 8710
    assert 16 <= min(second["new"]) < max(second["new"]) <= 256
    assert len({tuple(prompt[:256]) for prompt in shared["prompts"]}) == 1
    assert len({tuple(prompt[256:]) for prompt in shared["prompts"]}) == 32
    # another turn: the same lengths, other tokens, or its prompts would lie in a prefix cache
    again = compare.workload("W2", 2, 4096, 1)
    assert [len(prompt) for prompt in again["prompts"]] == sizes and again["new"] == second["new"]
    assert not {tuple(p[:16]) for p in again["prompts"]} & {
        tuple(p[:16]) for p in second["prompts"]
    }
    assert max(max(prompt) for prompt in again["prompts"]) < 4096 - compare.SPECIAL


def test_agreement_counts_the_tokens_before_a_difference():
    ours = [list(range(10)), list(range(10))]
    late, early = [*range(9), 0], [0, 2, *range(2, 10)]
    assert compare.agreement(ours, ours) == (1, 1)
    assert compare.agreement(ours, [late, early]) == (0.5, 10 / 20)
    assert compare.agreement([[1, 2]], [[1, 2]]) == (1, 1)  # shorter than what has to agree


@pytest.mark.parametrize("era", ["1", "2", "3", "4", "5"])
def test_the_loop_that_stands_for_nanochat_makes_the_engines_tokens(tmp_path, era):
    # a context of 128: windows of 64 in eras 2 and 3, of 128 in 4 and 5, which the prompt passes
    args = SimpleNamespace(**vars(TINY) | {"sequence_len": 128}, era=era, storage="float32")
    path = str(checkpoint.make_checkpoint(tmp_path / "model", args, "cpu"))
    options = {
        "folder": path, "threads": 1, "dtype": "float32", "max_len": 256, "kv_gib": 1, "llm": {},
    }  # fmt: skip
    job = {"prompts": [list(range(5, 150)), [7, 8, 9], [7]], "new": [8, 12, 1], "shared": 0}
    threads = torch.get_num_threads()
    ours, theirs = (engine(options)(job)["tokens"] for engine in (peers.microvllm, peers.nanochat))
    torch.set_num_threads(threads)
    assert ours == theirs and [len(tokens) for tokens in ours] == job["new"]


def test_the_folder_for_transformers_is_the_checkpoint_under_other_names(tmp_path):
    args = SimpleNamespace(**vars(TINY), era="1", storage="float32")
    config, _, ours = peers.read_model(str(checkpoint.make_checkpoint(tmp_path / "a", args, "cpu")))
    found, recipe, theirs = peers.read_model(
        str(checkpoint.make_hf_folder(tmp_path / "b", args, "cpu"))
    )
    assert found == config and recipe.eps == 1e-6 and ours.keys() == theirs.keys()
    for name, tensor in theirs.items():  # 500 tokens: the padding to 512 rows is cut
        assert torch.equal(tensor, ours[name][: len(tensor)].float())
    assert len(theirs["lm_head.weight"]) == 500
    with pytest.raises(ValueError, match="only nanochat's era 1, not --era 5"):
        checkpoint.make_hf_folder(tmp_path, SimpleNamespace(**vars(args) | {"era": "5"}), "cpu")


# the Llama of equal matrices


def llama_tokens(folder: Path, prompt: list[int], new: int) -> list[int]:
    """What a Llama answers greedily, as Hugging Face's computes it, in float64."""
    config, stored = llama.read_folder(folder)
    weights = {name.removesuffix(".weight"): torch.tensor(w).double() for name, w in stored.items()}
    d, base = config["head_dim"], config["rope_theta"]
    tokens = list(prompt)
    for _ in range(new):
        angles = torch.outer(torch.arange(len(tokens)), base ** -(torch.arange(0, d, 2) / d))
        angles = angles.repeat(1, 2).double()
        x = weights["model.embed_tokens"][tokens]
        for i in range(config["num_hidden_layers"]):
            layer = {n.split(".")[-1]: w for n, w in weights.items() if f".layers.{i}." in n}
            h = F.rms_norm(x, x.shape[-1:], layer["input_layernorm"], config["rms_norm_eps"])
            q, k, v = (
                (h @ layer[f"{name}_proj"].T).view(len(h), -1, d).transpose(0, 1) for name in "qkv"
            )
            q, k = (
                z * angles.cos()
                + torch.cat((-z[..., d // 2 :], z[..., : d // 2]), -1) * angles.sin()
                for z in (q, k)
            )
            y = F.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, enable_gqa=True
            )
            x = x + y[0].transpose(0, 1).reshape(len(x), -1) @ layer["o_proj"].T
            last = layer["post_attention_layernorm"]
            h = F.rms_norm(x, x.shape[-1:], last, config["rms_norm_eps"])
            h = F.silu(h @ layer["gate_proj"].T) * (h @ layer["up_proj"].T)
            x = x + h @ layer["down_proj"].T
        final = F.rms_norm(x[-1], x.shape[-1:], weights["model.norm"], config["rms_norm_eps"])
        tokens.append(int((weights["lm_head"] @ final).argmax()))
    return tokens[len(prompt) :]


def test_the_llama_has_matrices_of_equal_size(tmp_path):
    assert [llama.feed_forward(width) for width in (768, 256)] == [2048, 672]
    d12 = llama.shape(12, 768, 128, None, 32768)
    ours = 12 * 12 * 768 * 768 + 32768 * 768
    assert llama.count_weights(d12) == ours
    args = SimpleNamespace(**vars(TINY), era="1", storage="float32")
    folder = checkpoint.make_hf_folder(tmp_path, args, "cpu")
    beside = llama.llama_for(json.loads((folder / "config.json").read_text()))
    assert (beside["num_attention_heads"], beside["num_key_value_heads"]) == (3, 1)
    # 2 * 4 * 96 * 96 numbers of the feed-forward here, 3 * 256 * 96 there
    assert compare.step_weights(folder) == llama.count_weights(beside)
    _, _, weights = peers.read_model(str(folder))
    sizes = {name: w.numel() for name, w in weights.items() if "wte" not in name and w.ndim == 2}
    assert sum(sizes.values()) == compare.step_weights(folder)
    for given in (64, 48, None), (96, 32, 2):
        with pytest.raises(ValueError, match="must be whole heads of --head-dim"):
            llama.shape(1, *given, 512)


def test_the_llamas_folder_reads_back_and_is_one_that_others_read(tmp_path):
    config = llama.shape(2, 64, 32, 1, 300)
    made = llama.make_folder(tmp_path / "a", config)
    found, weights = llama.read_folder(made)
    assert found == config and {name: w.shape for name, w in weights.items()} == llama.tensors(
        config
    )
    matrix = weights["model.layers.1.mlp.down_proj.weight"]
    assert (
        matrix.std() * 160**0.5 == pytest.approx(1, abs=0.05)
        and (weights["model.norm.weight"] == 1).all()
    )
    torch_file = pytest.importorskip("safetensors.torch").load_file(made / "model.safetensors")
    assert all(torch.equal(torch_file[name], torch.tensor(w)) for name, w in weights.items())
    again = llama.read_folder(llama.make_folder(tmp_path / "b", config))[1]
    assert all((again[name] == w).all() for name, w in weights.items())
    assert len({*llama_tokens(made, [1, 2, 3], 6)}) > 1
    with pytest.raises(ValueError, match="--precision int4: openvino supports float32, bfloat16,"):
        llama.convert(made, "openvino", "int4")


@pytest.mark.slow
@pytest.mark.parametrize("engine", sorted(compare.LLAMAS))
def test_the_other_engines_make_the_llamas_tokens(tmp_path, engine):
    pytest.importorskip(compare.ENGINES[engine])
    made = llama.make_folder(tmp_path, llama.shape(2, 64, 32, 1, 500))
    folder = llama.convert(made, compare.LLAMAS[engine], "float32")
    options = {"folder": str(folder), "threads": 1, "dtype": "float32", "kv_gib": 1}
    answer = getattr(peers, engine)(options)
    own = [[1, 2, 3, 4], [400, 7], list(range(40, 90))]
    for shared in ([], list(range(200, 264)), list(range(200, 217))):
        prompts = [shared + prompt for prompt in own]
        found = answer({"prompts": prompts, "new": [5, 1, 3], "shared": len(shared)})
        expected = [llama_tokens(made, p, n) for p, n in zip(prompts, [5, 1, 3], strict=True)]
        assert found["tokens"] == expected and found["seconds"] > 0


def parsed(monkeypatch, *words) -> SimpleNamespace:
    monkeypatch.setattr(sys, "argv", ["compare.py", *words])
    return compare.parse()


def test_each_engine_has_its_own_dtype(monkeypatch, capsys):
    python = f"llamacpp-q4={sys.executable}"
    flags = ["--engines", "openvino,llamacpp-q4", "--peer-python", python, "--peer-dtype", "int8"]
    args = parsed(monkeypatch, *flags, "--peer-dtype", "llamacpp-q4=int4")
    assert args.engines == ["microvllm", "openvino", "llamacpp-q4"]
    assert args.dtypes == {"openvino": "int8", "llamacpp-q4": "int4"}
    assert parsed(monkeypatch, "--engines", "vllm").dtypes == {"vllm": "float32"}
    for words, told in (
        (["--engines", "vllm", "--peer-dtype", "int8"], "vllm supports float32, bfloat16"),
        (
            ["--engines", "openvino", "--peer-dtype", "int4"],
            "openvino supports float32, bfloat16, int8",
        ),
        (["--peer-dtype", "other=int8"], "unknown other; use microvllm, nanochat"),
    ):
        with pytest.raises(SystemExit):
            parsed(monkeypatch, *words)
        assert told in capsys.readouterr().err


def test_the_table_says_which_engines_have_other_weights(tmp_path, monkeypatch):
    args = SimpleNamespace(**vars(TINY), era="1", storage="float32")
    folder = checkpoint.make_hf_folder(tmp_path, args, "cpu")
    args = parsed(monkeypatch, "--engines", "openvino", "--workloads", "W3", "--shrink", "32")
    run = compare.Comparison(args, folder, 500)
    tokens = {"microvllm": [1, 2, 3, 4], "openvino": [5, 6, 7, 8]}
    seconds = {"microvllm": 1.0, "openvino": 2.0}
    run.peers = [
        SimpleNamespace(
            name=name, engine=name,
            run=lambda job, name=name: {"tokens": [tokens[name]], "seconds": seconds[name]},
        )
        for name in tokens
    ]  # fmt: skip
    run.args.pause = 0
    run.turn(1)
    numbers = run.results()["W3"]["engines"]
    assert numbers["openvino"]["speedup"] == 2 and numbers["openvino"]["agree_first"] == 1
    run.facts = {
        "microvllm": {"version": "torch 2", "first_token_s": 1.0, "peak_gb": 1.0},
        "openvino": {"version": "openvino_genai 9", "dtype": "int8", "first_token_s": 1.0,
                     "peak_gb": 1.0, "model": "a Llama", "step_weights": 342912},
    }  # fmt: skip
    table = run.table({0: run.results()})
    assert "\nopenvino*  " in table and "openvino_genai 9, int8" in table
    assert "a step uses 342,912 weights,\n  and 342,912 in this engine" in table


def fake_peers(monkeypatch, seconds) -> list:
    """Engines without a process; seconds(engine, loops): how long a job takes beside them. Returns
    (engine, loops) of each job."""
    loops: list[int] = []
    jobs: list[tuple[str, int]] = []

    @contextmanager
    def load(count):
        loops.append(count)
        try:
            yield []
        finally:
            loops.pop()

    class Fake:
        def __init__(self, name, python, options):
            self.name = self.engine = name
            self.start = 0.0

        def run(self, job):
            count = loops[-1] if loops else 0
            jobs.append((self.name, count))
            took = seconds(self.name, count)
            tokens = [
                prompt[:1] * new for prompt, new in zip(job["prompts"], job["new"], strict=True)
            ]
            more = {"own_seconds": took, "products_seconds": took, "bandwidth_gb": 1.0}
            return {"seconds": took, "tokens": tokens} | (more if self.name == "limit" else {})

        def peak_bytes(self):
            return 10**9

        def close(self):
            assert not loops, "loops run while engines end"

    monkeypatch.setattr(compare, "Peer", Fake)
    monkeypatch.setattr(compare, "foreign_load", load)
    monkeypatch.setattr(compare, "version", lambda python, package: "1.0")
    args = SimpleNamespace(**vars(TINY), era="1", storage="float32")
    monkeypatch.setattr(
        compare, "find_model",
        lambda _, scratch: (checkpoint.make_hf_folder(scratch / "model", args, "cpu"), 500),
    )  # fmt: skip
    return jobs


def printed(capsys) -> tuple[str, dict]:
    """The table and the JSON that the comparison prints."""
    table, _, last = capsys.readouterr().out.rstrip().rpartition("\n")
    return table, json.loads(last)


def test_the_table_needs_no_folder_of_the_model_any_more(monkeypatch, capsys):
    # without --models the folder is a temporary one, and the table of an engine with a star, which
    # has the model's size, came after it was gone
    fake_peers(monkeypatch, lambda engine, loops: 1.0)
    monkeypatch.setattr(compare, "find_llama", lambda folder, *_: (folder, 4321))
    words = ["--model", "tiny", "--shrink", "16", "--turns", "1", "--pause", "0"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *words, "--engines", "openvino"])
    compare.main()
    table, result = printed(capsys)
    assert "a step uses 4,321 weights,\n  and 342,912 in this engine" in table
    assert result["engines"]["openvino"]["step_weights"] == 4321


def test_each_turn_is_run_beside_each_load_and_compared_with_the_idle_one(monkeypatch, capsys):
    def seconds(engine, loops):
        return {"limit": 1.0, "microvllm": 2.0 * (1 + loops), "nanochat": 4.0 * (1 + 3 * loops)}[
            engine
        ]

    jobs = fake_peers(monkeypatch, seconds)
    words = ["--model", "tiny", "--shrink", "16", "--turns", "2", "--pause", "0", "--workloads"]
    words += ["W3", "--engines", "nanochat", "--foreign-load", "0,1,2"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *words])
    compare.main()
    # the first tokens and the warm-up, then two turns, in which the loads follow each other
    assert [loops for engine, loops in jobs if engine == "microvllm"] == [0, 0, 0, 1, 2, 0, 1, 2]
    table, result = printed(capsys)
    assert "with 0, 1, 2 busy loops" in table.splitlines()[0]
    assert "\nW3 with 2 busy loops: 1 requests" in table
    assert result["foreign_load"] == [0, 1, 2]
    assert "of_idle" not in result["workloads"]["W3"]["engines"]["microvllm"]
    by_load = {load: found["W3"]["engines"] for load, found in result["under_load"].items()}
    assert by_load["1"]["microvllm"]["of_idle"] == 0.5
    assert by_load["2"]["nanochat"]["of_idle"] == round(1 / 7, 3)
    assert by_load["2"]["nanochat"]["speedup"] == round(28 / 6, 2)
    assert " 33%" in table  # ours beside two
    # other prompts, or one load would find those of another in a prefix cache
    ids = [tuple(compare.workload("W3", 1, 512, 1, 0, load)["prompts"][0]) for load in (0, 1, 2)]
    assert len({*ids}) == 3


@pytest.mark.parametrize("words", ["x", "-1", "1,1", "1,", "65", "1.5"])
def test_a_foreign_load_is_some_whole_numbers(monkeypatch, capsys, words):
    with pytest.raises(SystemExit):
        parsed(monkeypatch, f"--foreign-load={words}")
    assert "--foreign-load" in capsys.readouterr().err.splitlines()[-1]


def seconds_used(pid: int) -> float:
    """The time of a processor that a process took so far; 0.0 for one that has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return 0.0 if stat[0] == "Z" else (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def wait_until(is_so) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end, "it did not happen within a minute"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_busy_loops_compute_and_end_with_the_block_and_with_their_parent():
    with pytest.raises(KeyError):
        with compare.foreign_load(2) as loops:
            wait_until(lambda: all(seconds_used(loop.pid) > 0.1 for loop in loops))
            raise KeyError
    assert len(loops) == 2 and not any(seconds_used(loop.pid) for loop in loops)
    with compare.foreign_load(0) as loops:
        assert not loops
    code = "import compare, time\nwith compare.foreign_load(2) as loops:\n"
    code += "    print(*[loop.pid for loop in loops], flush=True)\n    time.sleep(600)"
    for number in signal.SIGTERM, signal.SIGKILL:
        parent = subprocess.Popen(
            [sys.executable, "-c", code], cwd=BENCHMARKS, stdout=subprocess.PIPE, text=True
        )
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        wait_until(lambda pids=pids: all(map(seconds_used, pids)))
        parent.send_signal(number)
        parent.communicate()
        wait_until(lambda pids=pids: not any(map(seconds_used, pids)))
        assert len(pids) == 2


def run_comparison(words: str) -> tuple[str, dict]:
    """What `python benchmarks/compare.py` prints, and its JSON."""
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "compare.py", *words.split()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["failed"], result["disagree"]) == ([], [])
    return done.stdout, result


@pytest.mark.slow
def test_the_default_command_of_the_comparison_runs():
    # every workload, every engine that there is, and no folder for the model
    told, result = run_comparison("--model tiny --shrink 16 --turns 1 --pause 0 --kv-gib 1")
    assert "median of 1 turns; with 0 busy loops" in told
    assert [*result["workloads"]] == [*compare.WORKLOADS] and result["under_load"] == {}
    for work in result["workloads"].values():
        assert {"microvllm", "nanochat"} <= work["engines"].keys()


@pytest.mark.slow
def test_the_comparison_runs_beside_busy_loops():
    words = "--model tiny --shrink 16 --turns 1 --pause 0 --kv-gib 1 --threads 1 --engines nanochat"
    told, result = run_comparison(f"{words} --workloads W1,W3 --foreign-load 0,1")
    assert "with 0, 1 busy loops" in told and "\nW3 with 1 busy loop: 1 requests" in told
    for name in "W1", "W3":
        idle, loaded = (found[name]["engines"] for found in (
            result["workloads"], result["under_load"]["1"]
        ))  # fmt: skip
        assert idle.keys() == loaded.keys()
        for engine, numbers in loaded.items():
            of_idle = numbers["tokens_per_s"] / idle[engine]["tokens_per_s"]
            assert numbers["of_idle"] == pytest.approx(of_idle, rel=0.01, abs=0.001)


@pytest.mark.slow
def test_the_comparison_runs(tmp_path):
    options = "--model tiny --shrink 16 --turns 2 --threads 1 --pause 0 --kv-gib 1"
    parts = "--workloads W1,W4 --engines nanochat"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "compare.py", *f"{options} {parts}".split()],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["failed"], result["disagree"]) == ([], [])
    assert list(result["workloads"]) == ["W1", "W4"]
    for work in result["workloads"].values():
        assert list(work["engines"]) == ["limit", "limit, own products", "microvllm", "nanochat"]
        for engine in ("microvllm", "nanochat"):
            numbers = work["engines"][engine]
            assert 0 < numbers["lowest"] <= numbers["tokens_per_s"] <= numbers["highest"]
            assert numbers["agree_first"] == 1 and numbers["share_of_limit"] > 0
        assert work["engines"]["microvllm"]["speedup"] == 1
    for fact in result["engines"].values():
        assert fact["first_token_s"] > 0 and (fact["peak_gb"] or 1) > 0.05  # Python with torch


@pytest.mark.slow
def test_a_profile_names_every_part_of_a_step_and_the_perplexity_of_each_kind_of_weights():
    options = "--models tiny --sequences 3 --prompts 9"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "cpu.py", *options.split()],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    found = result["profile"]["tiny"]
    assert (found["sequences"], found["steps"]) == (3, 2 * 63)  # the first step has the prompts
    assert abs(sum(found["parts_ms"].values()) - found["step_ms"]) < 0.01
    # all layers are one call where the processor has what it takes
    loop, parts = found["loop_ms"] or found["parts_ms"], {"products", "sampler", "batch"}
    assert parts | {"attention", "rope_store", "add_norm"} <= loop.keys() and min(loop.values()) > 0
    assert found["loop_ms"] is None or parts | {"all layers"} <= found["parts_ms"].keys()
    exact = result["perplexity"].pop("float32")
    for small in result["perplexity"].values():
        assert small["tokens"] == exact["tokens"] and small != exact
        assert abs(small["perplexity"] / exact["perplexity"] - 1) < 0.01
    if importlib.util.find_spec("triton"):
        assert list(result["host_ms"]) == ["512", "64", "1"]
        assert min(ms for found in result["host_ms"].values() for ms in found) > 0


def run_benchmark(name: str, flags: str) -> tuple[list[str], dict]:
    """The lines that a benchmark prints, and the last one's JSON."""
    done = subprocess.run(
        [sys.executable, BENCHMARKS / name, *flags.split()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    return lines, json.loads(last)


@pytest.mark.slow
def test_what_sampling_costs_is_told_beside_the_products():
    flags = "--rows 3,5 --vocab 99 --layers 1 --width 16 --turns 1 --device cpu"
    lines, found = run_benchmark("sampler.py", flags)
    times, guides = found["milliseconds"], found["guides"]
    assert times.keys() == {"3", "5"} and times["3"].keys() == times["5"].keys()
    assert len(lines) == 1 + 2 * len(times["3"]) + len(guides) and min(times["5"].values()) > 0
    assert all(min(cost.values()) > 0 for cost in guides.values())


@pytest.mark.slow
def test_rollouts_are_compared_and_a_look_at_the_weights_is_beside_a_decode():
    flags = "--groups 2 --samples 2 --tokens 4 --turns 1"
    _, found = run_benchmark("rollouts.py", flags)
    assert [*found["results"]] == ["one by one", "groups", "live", "copy"]
    assert all(speed > 0 for speed in found["results"].values())
    for times in found["seconds"].values():
        assert [*times] == ["check in a step", "thorough check", "decode of 1", "decode of 2"]
        assert min(times.values()) > 0


@pytest.mark.slow
def test_evaluations_of_all_problems_are_compared_with_one_by_one():
    flags = "--problems 6 --shots 1 --tokens 4 --turns 1"
    _, found = run_benchmark("evals.py", flags)
    seconds = found["seconds"]
    assert [*seconds] == ["categorical", "generative", "CORE"]
    for times in seconds.values():
        assert [*times] == ["one by one", "live", "copy"] and min(times.values()) > 0


@pytest.mark.slow
def test_speculation_is_compared_with_plain_steps():
    flags = (
        "--shape tiny --layers 1 --ways forced,cut,answers --acceptance 0,1 --tokens 40 --turns 1"
    )
    lines, found = run_benchmark("speculation.py", flags)
    found = found["results"]
    kinds = [f"forced {acceptance} {kind}" for acceptance in (0, 1) for kind in ("free", "paid")]
    assert [*found] == [*kinds, "cut to 1 layers", "answers"] and len(lines) == 1 + len(found)
    assert all(way["speed"] > 0 and way["same_texts"] == 1 for way in found.values())
    assert found["forced 0 free"]["accepted"] == 0 and found["forced 0 free"]["steps"] == 1
    assert found["answers"]["accepted"] == 1 and found["answers"]["steps"] < 0.3


@pytest.mark.slow
def test_a_model_that_is_cut_has_some_of_the_layers(tmp_path):
    folder = speculation.cut_layers(compare.BUNDLED, [0, 3, 4, 5], tmp_path / "cut")
    tokenizer = compare.BUNDLED.parent / "tokenizer"
    options = {"tokenizer_path": tokenizer, "device": "cpu", "num_blocks": 10, "plain": True}
    with LLM(compare.BUNDLED, **options) as model, LLM(folder, **options) as cut:
        assert cut.model.config.n_layer == 4
        pairs = zip(cut.model.transformer.h, [0, 3, 4, 5], strict=True)
        for layer, index in pairs:
            other = model.model.transformer.h[index].mlp.c_fc.weight
            assert torch.equal(layer.mlp.c_fc.weight, other)


@pytest.mark.slow
def test_an_engine_that_cannot_be_imported_or_dies_is_told():
    assert compare.version(sys.executable, "torch").startswith("2.")
    assert compare.version(sys.executable, "no_such_engine") is None
    peer = compare.Peer("nanochat", sys.executable, {"threads": 1})  # says no folder
    with pytest.raises(RuntimeError, match="process of nanochat ended(.|\n)*KeyError: 'dtype'"):
        peer.run({})
    peer.close()
