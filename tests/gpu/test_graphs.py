"""CUDA-graph decode steps, also where there is no card.

Without a GPU a graph is a tape: the operations and kernel launches of a step, written down with the
memory they work on by the first `replay`, and done again by all others, as CUDA does it. Triton's
interpreter runs the kernels. On a machine with a GPU the same tests use the real ones.
"""

import gc
import os
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers.batches import hand_made_batch
from helpers.goldens import FIXTURES as ERAS
from helpers.gpu_kernels import CUDA
from helpers.simulation import make_blocks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from microvllm import LLM, SamplingParams, model
from microvllm.attention import PagedKVCache, make_batch
from microvllm.checkpoint import find_step, read_checkpoint
from microvllm.fused.linear import Packed
from microvllm.gpu import elementwise, graphs, launch, prefixes
from microvllm.gpu.backend import Float8, TritonBackend, fp8_rows
from microvllm.gpu.graphs import DecodeGraphs, GraphRunner, can_replay, few_rows_step
from microvllm.loops.ahead import AheadLoop, AheadRunner
from microvllm.runner import Hooks
from microvllm.scheduler import Chunk, Draw, DrawList, Plan, Sequence

pytestmark = pytest.mark.usefixtures("one_thread")


class Tape(TorchDispatchMode):
    """Runs what happens inside and writes it down."""

    def __init__(self, graph):
        super().__init__()
        self.calls, self.launching = graph.calls, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a value"
        out = func(*args, **(kwargs or {}))
        if not self.launching:
            self.calls.append(partial(self.again, partial(func, *args, **(kwargs or {})), out))
        return out

    @staticmethod
    def again(func, out):
        """Do it again, and put the result where it was put the first time."""
        for old, new in zip(tree_leaves(out), tree_leaves(func()), strict=True):
            if old.data_ptr() != new.data_ptr():  # a view, or done in place: it is there
                old.copy_(new)

    def launch(self, executor, *args, **kwargs):
        """A Triton kernel: its launch is one entry, not what the interpreter does."""
        self.launching = True
        executor(*args, **kwargs)
        self.launching = False
        self.calls.append(partial(executor, *args, **kwargs))


class FakeGraph:
    """A step of `DecodeGraphs`: captured by the first replay, and done again by all others."""

    clock = 0.0  # of all of them

    def __init__(self, graphs, size: int, few_rows: bool = False):
        self.step, self.calls = partial(graphs.decode, size, few_rows), []

    def replay(self):
        if not self.calls:
            with Tape(self) as tape:
                tapes.append(tape)
                self.step()
            tapes.pop()
            return
        for call in self.calls:
            call()


tapes: list[Tape] = []  # the one that is written


class FakeEvent:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeGraph.clock

    def elapsed_time(self, other):
        return other.at - self.at


def with_many_outputs(product, *args, **options):
    return product(*args, **options | {"outputs": 128})


@contextmanager
def no_card():
    """torch.cuda's graphs, and its pinned memory, on the CPU."""
    execute, empty = GridExecutor.__call__, torch.empty

    def launch(self, *args, **kwargs):
        run = partial(execute, self)
        tapes[-1].launch(run, *args, **kwargs) if tapes else run(*args, **kwargs)

    def pinned(*args, pin_memory=False, **kwargs):
        return empty(*args, **kwargs).fill_(-99) if pin_memory else empty(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", launch)
        patch.setattr(torch, "empty", pinned)
        # weights as they are on a GPU, and not in an order that a CPU likes better
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        patch.setattr("microvllm.gpu.backend.has_triton", lambda device: True)
        for name in "norm_linear", "linear_add":  # an interpreter likes few programs
            product = getattr(elementwise, name)
            patch.setattr(graphs, name, partial(with_many_outputs, product))
        patch.setattr(torch.cuda, "Event", FakeEvent)
        patch.setattr(torch.cuda, "Stream", lambda device: "theirs")
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        patch.setattr(torch.cuda, "synchronize", lambda device: None)
        # an interpreter is slow: a step is captured when it is first wanted, and nothing is timed
        patch.setattr(DecodeGraphs, "record", lambda *args, **kw: FakeGraph(*args, **kw))
        yield


@pytest.fixture(scope="module", autouse=True)
def card():
    with nullcontext() if CUDA else no_card():
        yield


def build(name: str, recorded: bool, **kwargs) -> LLM:
    """recorded: the kernels and the loop of a GPU, with graphs; else the plain loop on the CPU."""
    fixture = ERAS[name]
    device = "cuda" if CUDA and recorded else "cpu"
    options = {"num_blocks": 60, "block_size": 4, "max_batch_size": 4, "max_model_len": 62}
    options |= {"device": device, "dtype": "float32", "tokenizer_path": fixture.tokenizer}
    if not recorded:
        return LLM(fixture.directory, **{"attention": "sdpa"} | options | kwargs)
    llm = LLM(fixture.directory, attention="triton", **options | kwargs)
    if not CUDA:
        old = llm.runner
        llm.runner = GraphRunner(old.model, old.cache, old.blocks, old.hooks, old.sample)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graphs, "TRIALS", 1)  # of each way and size: there is no clock
            llm.runner.record(llm.max_batch_size, llm.max_model_len)
        llm.loop.inner_loop = AheadLoop(llm.loop.engine)
    llm.cache.data[:, :, 1:] = torch.nan  # a kernel that reads a slot before it is written shows it
    watch(llm)
    return llm


class Launch(NamedTuple):
    """What was seen of a step."""

    graph: bool
    rows: int  # of the plan
    waits: list[tuple[int, int]]  # (row, row of the last step whose token it is)


def watch(llm: LLM) -> None:
    """Write each launch to llm.seen, and check what a replay reads and writes."""
    llm.seen = []
    launch, replay = llm.runner.launch, llm.runner.graphs.replay

    def checked_launch(plan):
        firsts = [(i, chunk.seq.token_ids[chunk.start]) for i, chunk in enumerate(plan.chunks)]
        waits = [(i, ~token) for i, token in firsts if token < 0]
        llm.seen.append(Launch(False, plan.num_tokens, waits))
        launch(plan)

    def checked_replay(batch, params, last):
        llm.seen[-1] = llm.seen[-1]._replace(graph=True)
        before = llm.cache.data.clone()
        results = replay(batch, params, last)
        graphs = llm.runner.graphs
        size = next(size for size in graphs.sizes if size >= len(batch.token_ids))
        _, tables = graphs.split(graphs.inputs.cpu().numpy(), size)
        wanted = np.zeros((graphs.num_groups, size, -(-llm.max_model_len // 4)), np.int32)
        wanted[:, : len(batch.token_ids), : batch.block_tables.shape[-1]] = batch.block_tables
        assert np.array_equal(tables, wanted)
        # compared as bits: a NaN is equal to itself
        changed = (llm.cache.data.view(torch.int32) != before.view(torch.int32)).cpu()
        blocks, slots = changed.any(0).any(0).any(1).any(-1).nonzero().T.tolist()
        written = {4 * block + slot for block, slot in zip(blocks, slots, strict=True)}
        slots = set(batch.slots.ravel().tolist())
        assert {slot for slot in written if slot >= 4} == slots  # 0-3: the null block
        return results

    llm.runner.launch, llm.runner.graphs.replay = checked_launch, checked_replay


def sampling(max_tokens: int, temperature: float, seed: int = 0, **kwargs) -> SamplingParams:
    kwargs = {"temperature": temperature, "ignore_eos": True} | kwargs
    return SamplingParams(max_tokens=max_tokens, seed=seed, **kwargs)


def serve(llm: LLM, work: list[tuple[list[int], SamplingParams]]) -> list:
    prompts, params = zip(*work, strict=True)
    outputs = llm.generate(list(prompts), list(params), use_tqdm=False)
    return [[sample["token_ids"] for sample in output["samples"]] for output in outputs]


WAYS = ["library", graphs.FEW_ROWS]
if CUDA and launch.can_start_early(torch.device("cuda", 0)):
    WAYS.append(graphs.EARLY)


# the interpreter is slow: without a card the one with all of our kernels, with FUZZ the others too
@pytest.fixture(scope="module", params=WAYS if CUDA or os.environ.get("FUZZ") else WAYS[-1:])
def pair(request) -> tuple[LLM, LLM]:
    """An engine with graphs and one without, of the era that has most in it; once for each way to
    run a step of a few rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "fastest", lambda times: request.param)
        patch.setattr(launch, "TRIES_EARLY_START", request.param == graphs.EARLY)
        if not CUDA:
            patch.setattr(DecodeGraphs, "choose", lambda self, size, graphs: self.graphs.update(
                {size: graphs[request.param]}))  # fmt: skip
        return build("era5", True), build("era5", False)


@pytest.mark.slow
def test_graphs_and_eager_steps_give_the_same_tokens(pair):
    """Rows leave, by length and by a stop token that is seen one step late, others move up and new
    ones come; greedy among sampled; so a step's tokens are found by the next wherever they are."""
    llm, plain = pair
    work = [
        ([1, 2, 3], sampling(3, 0.0)),
        ([70, 7], sampling(4, 1.2, seed=2)),
        ([40, 41, 42, 43, 44], sampling(9, 0.9, seed=1)),
        ([9] * 11, sampling(12, 0.0)),
        ([1, 2, 3, 4], sampling(3, 0.8, seed=3, top_k=5)),
        ([9] * 11 + [4, 5, 6], sampling(3, 0.0)),
    ]
    late = serve(plain, work[2:3])[0][0][5]
    work[2] = (work[2][0], sampling(9, 0.9, seed=1, stop_token_ids=(late,)))
    seen = []
    for longest in (1, 3):  # of the first: with one token it leaves after an eager step
        work[0] = ([1, 2, 3], sampling(longest, 0.0))
        del llm.seen[:]
        assert serve(llm, work) == serve(plain, work)
        seen += llm.seen
    assert {step.rows for step in seen if step.graph} >= {1, 2, 3, 4}
    steps = list(zip(seen, seen[1:], strict=False))
    moved = {(a.graph, b.graph) for a, b in steps if any(row != old for row, old in b.waits)}
    assert moved >= {(False, True), (True, False), (True, True)}


@pytest.mark.slow
def test_filters_work_on_the_logits_that_a_graph_leaves(pair):
    llm, plain = pair
    filters = {"top_k": 5}, {"min_p": 0.2}, {"repetition_penalty": 1.5, "logprobs": 2}
    prompts = [[5, 6, 7], [70, 7], [9] * 11, [1, 2]]
    params = [sampling(6, 0.9, seed=i, **f) for i, f in enumerate([*filters, {}])]
    del llm.seen[:]
    ours, theirs = (x.generate(prompts, params, use_tqdm=False) for x in pair)
    for a, b in zip(ours, theirs, strict=True):
        assert a["token_ids"] == b["token_ids"]
    asked = [output["samples"][0]["logprobs"] for output in (ours[2], theirs[2])]
    for a, b in zip(*asked, strict=True):
        assert a["sampler_logprob"] == pytest.approx(b["sampler_logprob"], abs=1e-3)
    assert [step.graph for step in llm.seen].count(False) == 1


@pytest.mark.slow
def test_samples_of_one_prompt_fork_in_an_eager_step_and_go_on_in_graphs(pair):
    llm, plain = pair
    work = [([5, 6, 7, 8, 9, 10], sampling(4, 1.0, seed=5, n=3)), ([30], sampling(6, 1.0))]
    del llm.seen[:]
    assert serve(llm, work) == serve(plain, work)
    assert [step.graph for step in llm.seen].count(False) == 1
    assert {step.rows for step in llm.seen if step.graph} == {4, 1}


@pytest.mark.slow
def test_samples_in_a_graph_read_their_shared_blocks_together(monkeypatch):
    """Alone, and in a step with other sequences."""
    monkeypatch.setenv("MICROVLLM_SHARED_PREFIXES", "1")
    monkeypatch.setattr(prefixes, "LEAST", 8)
    llm, plain = build("era5", True), build("era5", False)
    tiles = []
    find = prefixes.find_shared

    def watched(tables, *more):
        shared = find(tables, *more)
        tiles.append(shared[1])  # written again by each replay
        return shared

    monkeypatch.setattr(prefixes, "find_shared", watched)
    work = [([*range(5, 19)], sampling(6, 1.0, seed=5, n=3)), ([30], sampling(3, 1.0))]
    for requests in (work[:1], work):
        assert serve(llm, requests) == serve(plain, requests)
        assert tiles and max(int(num_rows) for tile in tiles for num_rows in tile) in (2, 3)
    assert {step.rows for step in llm.seen if step.graph} == {3, 4}


@pytest.mark.slow
def test_new_weights_are_in_the_graphs_at_once(pair):
    llm, plain = pair
    work = [([5, 6, 7], sampling(4, 0.0))]
    before = serve(plain, work)
    directory = ERAS["era5"].directory
    *_, weights = read_checkpoint(directory, find_step(directory, None))
    changed = {name: w.clone() for name, w in weights.items()}
    changed["lm_head.weight"] = changed["lm_head.weight"].roll(1, 0)
    changed["transformer.wte.weight"] = changed["transformer.wte.weight"].roll(1, 0)
    for engine in pair:
        engine.update_weights(changed)
    after = serve(plain, work)
    assert after != before
    assert serve(llm, work) == after


@pytest.mark.slow
def test_a_sequence_that_was_sent_away_comes_back_to_the_graphs():
    # 8 blocks of 4 tokens: enough until both are 9 tokens longer. contexts are split in two here
    work = [([1] * 12, sampling(11, 0.5, seed=1)), ([2] * 4, sampling(13, 0.5, seed=2))]
    llm = build("era1_padded", True, num_blocks=9, max_batch_size=2, max_model_len=70)
    assert serve(llm, work) == serve(build("era1_padded", False), work)
    assert llm.stats()["preemptions"] == 1
    assert [step.rows for step in llm.seen if step.graph] == [2] * 8 + [1, 1] + [1, 1, 1]


@pytest.mark.slow
def test_in_a_graph_too_layers_of_a_window_have_blocks_of_their_own(monkeypatch):
    """What has left the window of 8 is freed, and its place in the table is the null block's."""
    windows = model.layer_windows
    monkeypatch.setattr(
        "microvllm.fused.model.layer_windows",
        lambda *of: [8 if i % 2 else w for i, w in enumerate(windows(*of))],
    )
    work = [
        ([1, 2, 3], sampling(4, 0.0)),
        ([9] * 21, sampling(7, 0.7, seed=1)),
        ([40, 41, 42, 43, 44], sampling(12, 0.9, seed=2)),
    ]
    llm, plain = build("era5", True), build("era5", False)
    assert llm.runner.graphs.num_groups == llm.cache.num_groups > 1
    seen, replay = [], llm.runner.graphs.replay

    def watched(batch, params, last):
        seen.append(batch.block_tables[:, :, 0].any(1).all())  # first blocks that are still there
        return replay(batch, params, last)

    llm.runner.graphs.replay = watched
    assert serve(llm, work) == serve(plain, work)
    assert len(seen) > 9 and not all(seen)


# steps of a few rows ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(e, marks=[pytest.mark.slow] * (e != "era5")) for e in ERAS]
)
def test_few_rows_are_what_the_model_makes_of_them(name, monkeypatch):
    """The logits, and what is written to the cache; contexts within the windows and beyond. Each
    kernel more is compiled at every first start: two products with a norm, two with an addition."""
    kernel, variants = elementwise._few_rows, set()

    class Spy:
        def __getitem__(self, grid):
            def launch(*args, **options):
                variants.add((*(x is None for x in args[:9]), *args[12:]))
                kernel[grid](*args, **options)

            return launch

    monkeypatch.setattr(elementwise, "_few_rows", Spy())
    llm = build(name, False, device="cuda" if CUDA else "cpu", max_model_len=150)
    kv = PagedKVCache(llm.model.config, 60, 4, torch.float32, llm.device)
    vocab, tables = llm.model.config.vocab_size, ([1, 2], [3], list(range(4, 40)))
    chunks = [
        ([7 * i % vocab for i in range(1, 1 + n)], 0, n, table)
        for n, table in zip((6, 1, 141), tables, strict=True)
    ]
    with torch.device(llm.device), torch.inference_mode():
        prompts = [(ids, 0, n - 1, table) for ids, _, n, table in chunks if n > 1]
        llm.model.forward(hand_made_batch(prompts, 4), kv)
        batch = hand_made_batch([(ids, n - 1, n, table) for ids, _, n, table in chunks], 4)
        before = kv.data.clone()
        expected = llm.model.logits(llm.model.forward(batch, kv))
        after = kv.data.clone()
        llm.model.backend = TritonBackend(llm.device, torch.float32)
        can = launch.can_start_early(llm.device)
        for early in (False, True)[: 1 + can]:
            kv.data.copy_(before)
            with launch.early_start(early):
                logits = few_rows_step(llm.model, batch, kv)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(kv.data, after, rtol=1e-4, atol=1e-4)
    assert not torch.equal(before, after)
    recipe = llm.model.recipe  # its head has lambdas as a layer has, or neither has any
    assert len(variants) == (4 if recipe.smear or not recipe.lambdas else 5)


def test_few_rows_with_weights_in_float8_are_what_the_rounded_weights_give():
    """Activations stay as they are, so the logits are those of a model with these weights."""
    made = [build("era5", False, device="cuda" if CUDA else "cpu").model for _ in range(2)]
    for linears in zip(*(one.linears.values() for one in made), strict=True):
        weight, scale = fp8_rows(linears[0].weight.float())
        padding = torch.zeros(-len(weight) % 16, weight.shape[1])  # as Float8 has it
        dense = weight.float() * scale
        rounded = object.__new__(Float8)
        vars(rounded).update(vars(linears[1]))
        rounded.weight = torch.cat([weight.float(), padding.to(dense)]).to(weight.dtype)
        rounded.scale = torch.cat([scale, padding[:, :1].to(scale)])
        linears[0].weight.copy_(dense)
        linears[1].rounded = rounded
    exact, few = made
    for layer in few.layers:
        for name in ("qkv", "proj", "fc", "mlp_proj"):
            setattr(layer, name, getattr(layer, name).rounded)
    few.lm_head = few.lm_head.rounded
    few.backend = TritonBackend(few.device, torch.float32)
    ids = list(range(1, 8))
    logits = []
    for computed in made:
        kv = PagedKVCache(computed.config, 9, 4, torch.float32, computed.device)
        with torch.device(computed.device), torch.inference_mode():
            exact.forward(hand_made_batch([(ids, 0, 6, [1, 2])], 4), kv)
            batch = hand_made_batch([(ids, 6, 7, [1, 2])], 4)
            if computed is few:
                logits.append(few_rows_step(few, batch, kv))
            else:
                logits.append(exact.logits(exact.forward(batch, kv)))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


class Recorder(DecodeGraphs):
    """Chooses for one row among graphs that only say what they would do; numbers are tokens.
    waits: do those that start early wait for the others? If not, they read what is left in the
    buffer of the run before, in a context of more than a block."""

    is_broken, buffer = False, 0.0

    def __init__(self, seconds: dict[str, float], logits=0.0, waits=True):
        config = SimpleNamespace(vocab_size=50)
        self.model = SimpleNamespace(device=torch.device("cpu"), config=config)
        self.num_groups, self.num_columns, self.row_len = 1, 1, 11
        self.inputs, self.logits = torch.zeros(11, dtype=torch.int32), torch.zeros(1, 50)
        self.seconds, self.ways, self.added, self.waits = seconds, {}, logits, waits
        self.recorded, self.graphs, self.max_positions, self.contexts = [], {}, 300, set()
        self.graphs[1] = self.record(1)
        self.choose(1, self.record_few_rows([1])[1])

    def record(self, size, few_rows=False):
        early = launch.starts_early.get()
        way = graphs.EARLY if early else graphs.FEW_ROWS if few_rows else "library"
        self.recorded.append(way)

        def replay():
            FakeGraph.clock += self.seconds[way]
            token, position, length = (int(self.inputs[i]) for i in (0, 2, 3))
            assert length == position + 1
            self.contexts.add(length)
            is_late = early and not self.waits and length > 16
            self.logits[:] = self.added + (self.buffer if is_late else token)
            self.buffer = token

        return SimpleNamespace(way=way, replay=replay)


NAMES = ["library", graphs.FEW_ROWS, graphs.EARLY]


@pytest.fixture
def early(monkeypatch):
    monkeypatch.setattr(launch, "can_start_early", lambda device: True)
    monkeypatch.setattr(launch, "TRIES_EARLY_START", True)


@pytest.mark.skipif(CUDA, reason="a card has its own opinion")
@pytest.mark.parametrize("wins", NAMES)
def test_the_fastest_way_is_kept(wins, early):
    chosen = Recorder(dict.fromkeys(NAMES, 3.0) | {wins: 2.0})
    assert chosen.ways[1] == chosen.graphs[1].way == wins
    assert chosen.recorded == NAMES  # what is likelier to fail comes later
    assert chosen.contexts == {1 + i * 299 // 7 for i in range(8)}
    assert not chosen.inputs.any()


@pytest.mark.skipif(CUDA, reason="a card has its own opinion")
def test_kernels_that_start_early_and_err_are_not_kept(early):
    seconds = dict.fromkeys(NAMES, 3.0) | {graphs.FEW_ROWS: 2.0, graphs.EARLY: 1.0}
    for logits in 0.0, torch.nan:  # the same, also where they are no numbers
        assert Recorder(seconds, logits=logits).ways == {1: graphs.EARLY}
    # the run before had another token: its numbers are not taken for the right ones
    with pytest.warns(UserWarning, match="start early"):
        assert Recorder(seconds, waits=False).ways == {1: graphs.FEW_ROWS}


@pytest.mark.skipif(CUDA, reason="a card has its own opinion")
def test_a_way_that_cannot_be_recorded_is_not_kept(early, monkeypatch):
    record = Recorder.record

    def failing(self, size, few_rows=False):
        if few_rows:
            raise RuntimeError("out of registers")
        return record(self, size)

    monkeypatch.setattr(Recorder, "record", failing)
    with pytest.warns(UserWarning, match="'few_rows(, early)?' here: .*out of registers"):
        assert Recorder({"library": 3.0}).ways == {1: "library"}


@pytest.mark.skipif(CUDA, reason="a card has its own opinion")
def test_nothing_starts_early_unless_the_environment_says_so(monkeypatch):
    monkeypatch.setattr(launch, "can_start_early", lambda device: True)
    assert Recorder(dict.fromkeys(NAMES, 3.0)).recorded == NAMES[:2]


class Captures:
    """torch's capture, which fails at the `last` one as it does on a card: the thread stays on the
    stream of the capture."""

    def __init__(self, last: int, patch):
        self.last, self.seen, self.current, self.ended = last, [], "ours", []
        patch.setattr(DecodeGraphs, "record", RECORD)
        patch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
        patch.setattr(torch.cuda, "graph", self.capture)
        patch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        patch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "current", stream))
        ended = lambda *pool: self.ended.append(pool)  # noqa: E731
        patch.setattr(torch._C, "_cuda_endAllocateToPool", ended, raising=False)
        patch.setattr(graphs, "FAILED", [])
        patch.setattr(graphs, "takes_few_rows", lambda model: True)
        patch.setattr(DecodeGraphs, "choose", lambda self, size, ways: self.ways.update(
            {size: list(ways)}))  # fmt: skip
        self.ran: list[tuple] = []
        ran = lambda made, size, few_rows: self.ran.append((size, few_rows))  # noqa: E731
        patch.setattr(DecodeGraphs, "decode", ran)

    @contextmanager
    def capture(self, graph, pool, stream, capture_error_mode):
        assert (pool, stream, capture_error_mode) == ("pool", "theirs", "thread_local")
        self.current = stream
        self.seen.append(graph)
        yield
        if len(self.seen) == self.last:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.current = "ours"

    def make(self, max_batch_size: int) -> DecodeGraphs:
        config = SimpleNamespace(vocab_size=9)
        model = SimpleNamespace(device=torch.device("cpu"), config=config, dtype=torch.float32)
        cache = SimpleNamespace(block_size=16)
        return DecodeGraphs(model, cache, max_batch_size, 33)


RECORD, DECODE = DecodeGraphs.record, DecodeGraphs.decode


@pytest.mark.skipif(CUDA, reason="a card has its own captures")
def test_a_capture_that_fails_is_the_last_one(early, monkeypatch):
    captures = Captures(4, monkeypatch)
    with pytest.warns(UserWarning, match=r"1 rows cannot use 'few_rows' here: .*not permitted"):
        made = captures.make(2)
    assert len(captures.seen) == 4 and graphs.FAILED == captures.seen[-1:]
    assert captures.current == "ours" and captures.ended == [(None, "pool")]
    assert made.ways == {2: ["library", graphs.FEW_ROWS], 1: ["library"]}
    captures = Captures(2, monkeypatch)
    with pytest.raises(RuntimeError, match="not permitted"):  # without it there are no graphs
        captures.make(2)
    assert captures.current == "ours" and len(graphs.FAILED) == 1


@pytest.mark.parametrize("kind", ["plain", "float8", "deterministic", "of another layout", "wrong"])
def test_few_rows_take_whole_matrices(kind):
    llm = build("era5", False, device="cuda" if CUDA else "cpu")
    linears = llm.model.linears
    llm.model.backend.few_rows = kind != "wrong"  # as the self-check says
    if kind == "deterministic":  # as it is on a GPU
        llm.model.backend.product = elementwise.linear
    if kind == "of another layout":
        linears[next(iter(linears))] = object.__new__(Packed)
    if kind == "float8":
        linears[next(iter(linears))] = object.__new__(Float8)
    assert graphs.takes_few_rows(llm.model) == (kind in ("plain", "float8"))


@pytest.mark.skipif(CUDA, reason="with a stand-in for the device")
def test_a_token_that_could_not_be_drawn_is_an_id_like_any_other(monkeypatch):
    """-1 of a row of NaN must not reach the embedding: on a card the process would be lost."""
    made, seen = Captures(0, monkeypatch).make(2), []
    made.model.lm_head, made.model.recipe = None, SimpleNamespace(softcap=0.0)
    made.model.forward = lambda batch, cache: seen.append(batch.token_ids.tolist())
    made.model.logits = lambda h: torch.full((2, 9), torch.nan)
    drawn = torch.tensor([7, -1], dtype=torch.int32)
    monkeypatch.setattr(graphs, "sample", lambda *args: drawn)
    for ids in [3, 4], [~1, ~0]:
        made.split(made.inputs, 2)[0][0] = torch.tensor(ids)
        DECODE(made, 2, False)
    assert seen == [[3, 4], [0, 7]] and made.token_ids.tolist() == [7, -1]


# which steps fit ----------------------------------------------------------------------------------


def planned(chunks: list[tuple[int, int]], draws: list[int], **kwargs) -> Plan:
    """chunks: (start, stop) of sequences of as many tokens; draws: chunks that are drawn from;
    kwargs: of all parameters."""
    params = sampling(4, 0.5, **kwargs)
    seqs = [Sequence(i, list(range(stop)), params) for i, (_, stop) in enumerate(chunks)]
    for seq in seqs:
        seq.block_table.extend(range(1, 2 + len(seq.token_ids) // 4))
    return Plan(
        chunks=[Chunk(seq, *chunk) for seq, chunk in zip(seqs, chunks, strict=True)],
        draws=DrawList(Draw(i, seqs[i], chunks[i][1]) for i in draws),
    )


@pytest.mark.parametrize(
    "fits, plan",
    {
        "decodes": (True, planned([(4, 5), (9, 10), (2, 3)], [0, 1, 2])),
        "a prompt of one token": (True, planned([(4, 5), (0, 1)], [0, 1])),
        "a chunk": (False, planned([(4, 5), (0, 2)], [0, 1])),
        "a fork": (False, planned([(4, 5)], [0, 0])),
        "a fork, and a row that is not sampled": (False, planned([(4, 5), (0, 1)], [0, 0])),
        "a prompt that has more to come": (False, planned([(4, 5), (0, 1)], [0])),
        "a score": (False, planned([(4, 5), (6, 7)], [0])),
        "a filter": (True, planned([(4, 5), (9, 10)], [0, 1], top_k=3)),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_was_recorded_is_replayed_and_nothing_else(fits, plan):
    expected, plan = plan
    assert can_replay(plan) == expected


def test_a_step_that_is_no_graph_is_one_upload_from_pinned_memory(monkeypatch):
    plan = planned([(4, 5), (9, 10), (0, 6)], [0, 1, 2])
    blocks = make_blocks(8, 4)
    batch = make_batch(plan, blocks)
    pinned, moved = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t) or t)
    monkeypatch.setattr(torch.Tensor, "to", lambda t, device, **how: moved.append((t, how)) or t)
    card = SimpleNamespace(device=torch.device("cuda", 0))
    there = AheadRunner(card, None, blocks, Hooks()).upload(batch)
    assert len(pinned) == 1
    assert [t is pinned[0] for t, _ in moved] == [True] and moved[0][1] == {"non_blocking": True}
    assert {t.untyped_storage().data_ptr() for t in there[:10]} == {pinned[0].data_ptr()}
    for found, given in zip(there[:10], batch[:10], strict=True):
        assert np.array_equal(found.numpy(), given) and found.numpy().dtype == given.dtype


@pytest.mark.parametrize(
    "max_batch_size, sizes",
    [
        (1, [1]),
        (2, [1, 2]),
        (5, [1, 2, 4, 5]),
        (16, [1, 2, 4, 8, 16]),
        (33, [1, 2, 4, 8, 16, 32, 33]),
        (512, [1, 2, 4, 8, *range(16, 513, 16)]),
    ],
)
def test_sizes_go_up_to_the_largest_batch_and_not_beyond(max_batch_size, sizes, monkeypatch):
    with no_card():
        captures = Captures(0, monkeypatch)
        made = captures.make(max_batch_size)
    assert made.sizes == sizes == sorted(made.graphs)
    few = [size for size in reversed(sizes) if size <= 2]
    assert made.ways == {size: ["library", graphs.FEW_ROWS] for size in few}
    # the library's first; each is run, then recorded
    recorded = [(size, False) for size in reversed(sizes)] + [(size, True) for size in few]
    assert captures.ran == [one for one in recorded for _ in range(2)]
    assert made.num_columns == 3 and gc.get_freeze_count() == 0
    if max_batch_size == 512:
        assert len(captures.seen) == 38
