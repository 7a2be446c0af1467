"""Matrix products of the CPU's own making against float64, and all layers in one call against the
loop that it stands for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.batches import hand_made_batch
from helpers.cpu_kernels import (
    BACKEND,
    CPU,
    check_int8_tiles,
    check_rows_of_bfloat16,
    check_rows_of_int8,
    halves,
    has_int8,
    has_tiles,
    int8,
    packed_linear,
    random,
    run,
    unpacked_weight,
    weights_of,
)
from helpers.goldens import MODEL

from microvllm.attention import PagedKVCache
from microvllm.cpu import amx, attention, gemm, simd, team
from microvllm.cpu.backend import _run
from microvllm.cpu.gemm import (
    INT8_TILE,
    TILE,
    UNPACKED_ROWS,
    PackedBfloat16,
    PackedInt8,
    PackedLinear,
    SharedFloat32,
)
from microvllm.fused.model import FusedGPT
from microvllm.loading import load_model
from microvllm.lowbit import packing
from microvllm.model import GPTConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def poisoned(monkeypatch):
    """New memory is NaN, so that what a kernel forgets to write is seen."""
    empty = torch.empty

    def poison(*args, **kwargs):
        new = empty(*args, **kwargs)
        return new.fill_(torch.nan if new.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poison)


@has_tiles
@pytest.mark.parametrize("inputs", [1, 3, 100, 1024, 1025, 2300])
@pytest.mark.parametrize("outputs", [1, 32, 130])
def test_a_product_is_that_of_float64(inputs, outputs, poisoned):
    """Rows for every tile, for two tiles at once, for several blocks of rows; whole tiles, and
    some that are not."""
    weight = random(outputs, inputs, seed=1)
    packed, squared = packed_linear(weight), packed_linear(weight, relu2=True)
    for rows in (*range(1, 26), 64, 127, 128, 133, 241, 490):
        x = random(rows, inputs, seed=100 + rows)
        want = x.double() @ weight.double().T
        got = packed(x)
        assert got.shape == (rows, outputs) and got.is_contiguous()
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2.5e-7 * inputs + 1e-6)
        assert torch.equal(squared(x), BACKEND.relu2(got.clone()))


@has_tiles
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_bits_of_a_row_follow_from_that_row(threads):
    """Alone, in a tile of any size, in two tiles at once: always the same sums in the same order,
    whatever the other rows are, and by however many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        packed, x = packed_linear(random(200, 1500)), random(250, 1500, seed=2)
        alone = torch.cat([packed(x[i : i + 1]) for i in range(250)])
        for rows in (2, 7, 12, 13, 64, 127, 128, 250):
            assert torch.equal(packed(x[:rows]), alone[:rows]), rows
        x[1::2] = torch.nan
        assert torch.equal(packed(x)[::2], alone[::2])
    finally:
        torch.set_num_threads(before)


@has_tiles
@pytest.mark.parametrize("inputs", [2, 64, 100, 1600, 2304])
@pytest.mark.parametrize("outputs", [1, 33, 130])
def test_a_bfloat16_product_is_that_of_float64(inputs, outputs, poisoned):
    """Widths of whole tiles, and others; rows that fill one tile, two, or parts of them; several
    blocks of rows."""
    weight = random(outputs, inputs, seed=1)
    packed, squared = halves(weight), halves(weight, relu2=True)
    for rows in (1, 2, 6, 12, 15, 16, 17, 31, 32, 33, 48, 64, 130, 300, 1100):
        x = random(rows, inputs, seed=100 + rows)
        rounded = x.bfloat16() if gemm.TWO_HALVES else x
        want = rounded.double() @ weight.bfloat16().double().T
        got = packed(x)
        assert got.shape == (rows, outputs) and got.is_contiguous()
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2.5e-7 * inputs + 1e-6)
        assert torch.equal(squared(x), BACKEND.relu2(got.clone()))
    where = packed.weight[0].data_ptr()
    packed.load([weight + 1])
    assert packed.weight[0].data_ptr() == where
    assert torch.equal(packed.plain(torch.eye(inputs))[:, :outputs], (weight + 1).bfloat16().T)


@has_tiles
@pytest.mark.parametrize("inputs", [1500, 1536])
def test_the_bits_of_a_bfloat16_row_follow_from_that_row(inputs):
    check_rows_of_bfloat16(inputs)


def pieces(tiles: int, rows: int, threads: int, least: int) -> list[int]:
    """How much of a product each run of parts has, in rows of a tile, as `multiply` cuts it."""
    cuts = simd.row_cuts(tiles, rows, least, threads)
    runs, parts = simd.piece_parts(tiles * cuts, threads)
    each, dealt = parts // runs, [0] * runs
    assert parts == runs * each and runs <= threads and each <= 4
    for part in range(parts):
        first, end = simd.share(tiles * cuts, part, parts)
        assert end > first  # a thread that has nothing is not woken
        own = [simd.share(rows, piece // tiles, cuts) for piece in range(first, end)]
        dealt[part // each] += sum(t1 - t0 for t0, t1 in own)
    assert sum(dealt) == tiles * rows
    return dealt


# tiles of the four matrices of a d12's layer and of its head, in 16 or 32 outputs
D12 = {width: [outputs // width for outputs in (2304, 768, 3072, 768, 32768)] for width in (16, 32)}
# where whole tiles are too few: of few rows, (outputs of a tile, threads) -> tiles
TOO_FEW = {(16, 32): {48}, (32, 16): {24}, (32, 32): {24, 72}}


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("threads", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("least", [gemm._ROWS, amx.ROWS // 2])
def test_no_thread_has_much_more_than_its_share_of_a_d12s_products(width, threads, least):
    for tiles in D12[width]:
        for rows in (1, 8, 64):
            dealt = pieces(tiles, rows, threads, least)
            assert max(dealt) <= 1.2 * sum(dealt) / len(dealt)  # of those that are woken
            most = max(dealt) * threads / sum(dealt)  # of all that there are
            if rows < 64 and tiles in TOO_FEW.get((width, threads), ()):
                assert most == pytest.approx(4 / 3)
            else:
                assert most <= 1.2, (tiles, rows, threads)


def test_two_cores_cut_no_rows_of_whole_weight_tiles():
    """What was dealt evenly is dealt as before."""
    for tiles in (1, 2, 8, 24, 1024):
        assert [simd.row_cuts(tiles, rows, 6, 1) for rows in (0, 1, 64)] == [1, 1, 1]
    assert [simd.row_cuts(p, 64, 6, 2) for p in (2, 8, 24, 48)] == [1] * 4


@pytest.mark.parametrize("threads", [1, 2, 4, 8, 16, 32])
def test_rows_that_are_normed_rotated_or_rounded_are_shared_evenly(threads):
    for rows in (0, 1, 7, 8, 17, 64, 65, 512):
        runs, parts = simd.row_parts(rows, threads)
        assert parts % runs == 0 and (parts == 1 or rows // parts >= 4)
        dealt = [simd.share(rows, run, runs) for run in range(runs)]
        assert [0, *(end for _, end in dealt)] == [*(first for first, _ in dealt), rows]
        sizes = [end - first for first, end in dealt]
        # none has more than the busiest of as many as are worth to wake; the mean is of the woken
        assert 1 <= runs <= min(threads, 1 + rows // 8)
        assert max(sizes) == -(-rows // min(threads, 1 + rows // 8))
        if rows in (1, 8, 64):
            assert max(sizes) <= 1.2 * rows / runs


@pytest.mark.parametrize("rows, keys", [(1, 3), (8, 3), (64, 3), (1, 200)])
def test_attention_has_the_same_bits_with_any_number_of_threads(rows, keys):
    """Decodes, or one prompt, in a model of six heads."""
    config, blocks = GPTConfig(256, 64, 1, 6, 6, 48), -(-keys // 16)
    cache = PagedKVCache(config, 1 + rows * blocks, 16, torch.float32, CPU)
    first = 0 if keys > 3 else keys - 1
    tables = [range(1 + b * blocks, 1 + (b + 1) * blocks) for b in range(rows)]
    batch = hand_made_batch([([1] * keys, first, keys, table) for table in tables], 16)
    torch.nn.init.normal_(cache.data)
    q = random(len(batch.token_ids), 6, 8).numpy()
    tables = [getattr(batch, n).numpy() for n in ("cu_seqlens", "seq_lens", "block_tables")]
    k, v = cache.data[0, 0].numpy(), cache.data[0, 1].numpy()
    count, size = attention.tile(batch, 1, 8)

    def run(threads: int) -> torch.Tensor:
        scratch, out = torch.zeros(threads, size), torch.full(q.shape, torch.nan)
        with team.one_at_a_time:
            arrays = team.team_of(threads), scratch.numpy(), out.numpy()
            attention.attend_rows(q, k, v, *tables, -1, count, *arrays)
        return out

    whole = run(1)
    assert not whole.isnan().any() and all(torch.equal(run(n), whole) for n in (2, 3, 8))


# (rows in this step, tokens in the cache after it) of each sequence
LONG = [[(512, 512)], [(1000, 1000)], [(3072, 3072)], [(512, 3072)]]
LONG += [[(300, 300), (50, 50), (20, 900), (600, 600)]]
STEP = [*((1, 20 + 37 * i) for i in range(60)), (452, 452)]


@pytest.mark.parametrize("window", [-1, 512])
@pytest.mark.parametrize("threads", [1, 2, 4, 8, 16, 32])
def test_no_thread_has_much_more_than_its_share_of_a_d12s_attention(threads, window):
    """A row of a prompt sees more keys the later it comes. And of decodes the keys' way from memory
    counts, so that threads which have them have fewer products. Here each part is taken by the
    thread that is ready first. Not within 1.2: 8 decodes or 64 rows on 32 threads, whole heads and
    tiles of 12 queries being too large for it."""
    for chunks in (*LONG, STEP):
        counts, lengths = map(list, zip(*chunks, strict=True))
        starts = np.cumsum([0, *counts])
        tables = np.arange(len(lengths) * 256, dtype=np.int32).reshape(len(lengths), 256)
        rows = min(192, max(counts))
        tiles = attention.cut_tiles(
            starts, np.array(lengths), tables, 16, window, 6, 1, rows, threads, False
        ).tolist()
        done, work, jobs = np.zeros((starts[-1], 6)), np.zeros(threads), []
        for b, first, end, _ in tiles:
            position = lengths[b] - starts[b + 1] + first
            done[first:end] += 1
            jobs += [attention._work(end - first, position, window, 1)] * 6
        parts = attention.num_parts(len(tiles), 6, threads)
        for part in range(parts):
            first, end = simd.share(len(jobs), part, parts)
            work[work.argmin()] += sum(jobs[first:end])
        assert (done == 1).all() and work.max() <= 1.2 * work.mean(), chunks


@has_tiles
@pytest.mark.parametrize("kind", [PackedLinear, PackedBfloat16, PackedInt8])
def test_any_number_of_threads_gives_the_same_bits(kind):
    """Tiles that no number of threads divides, rows that are cut, and more threads than work."""
    if kind is PackedInt8 and not INT8_TILE:
        pytest.skip("this processor has no such instructions")
    made = kind([random(3 * TILE, 128)], BACKEND, torch.float32)
    for rows in (0, 1, 8, 64, 131):
        x = random(rows, 128, seed=rows).numpy()
        found = []
        for threads in (1, 2, 3, 4, 5, 16, 32):
            y = torch.full((rows, 3 * TILE), torch.nan)
            with team.one_at_a_time:
                gemm._linear(x, made.arrays, False, team.team_of(threads), y.numpy())
            found.append(y)
        assert all(torch.equal(y, found[0]) for y in found) and not found[0].isnan().any()


SIXTEEN = """
import json, sys
import torch
from microvllm.cpu import team
torch.set_num_threads(int(sys.argv[2]))
from microvllm import LLM, SamplingParams
prompts = [[1, *range(300, 300 + n)] for n in (1, 5, 40, 90)]
params = SamplingParams(temperature=0.8, seed=3, max_tokens=4, ignore_eos=True)
with LLM(sys.argv[1], device="cpu", num_blocks=60) as llm:
    found = llm.generate(prompts, params, use_tqdm=False)
print(json.dumps([max(team._teams, default=1), [output["token_ids"] for output in found]]))
"""


@pytest.mark.slow
@has_tiles
def test_sixteen_threads_on_fewer_cores():
    """Real threads, more than there are cores: the tokens of one."""
    found = []
    for threads in ("16", "1"):
        done = subprocess.run(
            [sys.executable, "-c", SIXTEEN, MODEL, threads], capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert [each[0] for each in found] == [16, 1] and found[0][1] == found[1][1]


@has_int8
@pytest.mark.parametrize("inputs", [64, 100, 2300, 8704])
@pytest.mark.parametrize("outputs", [1, 33, 130])
def test_an_int8_product_is_that_of_its_integers(inputs, outputs, poisoned):
    """Sums of integers are exact: what is left is rounding three factors."""
    weight = random(outputs, inputs, seed=1)
    made, squared = int8([weight]), int8([weight], relu2=True)
    whole, _, scale = made.weight
    integers = whole.transpose(1, 2).flatten(0, 1).contiguous().view(torch.int8)[:outputs]
    for rows in (1, 2, 11, 12, 13, 64, 127, 128, 301):
        x = random(rows, inputs, seed=100 + rows)
        q, x_scale = gemm.quantize_rows(x, 127)
        exact = (q.double() - 128) @ integers.double().T * scale[:outputs] * x_scale
        y = made(x)
        assert y.shape == (rows, outputs)
        torch.testing.assert_close(y, exact.float(), rtol=3e-7, atol=1e-30)
        assert torch.equal(squared(x), BACKEND.relu2(y.clone()))


@has_int8
def test_the_bits_of_an_int8_row_follow_from_that_row():
    check_rows_of_int8()


@has_int8
def test_int8_weight_tiles_hold_what_onednns_layout_holds():
    check_int8_tiles()


@has_tiles
def test_a_nan_comes_out_as_one_and_what_is_negative_as_nothing():
    x = torch.tensor([[torch.nan, 1.0], [-2.0, 1.0], [3.0, -1.0], [torch.inf, 0.0]])
    y = packed_linear(torch.eye(2), relu2=True)(x)
    assert torch.isnan(y[0]).tolist() == [True, True]  # 0 times NaN is one, too
    assert y[1:3].tolist() == [[0, 1], [9, 0]]


@has_tiles
def test_weights_in_weight_tiles_are_replaced_where_they_are():
    """Other kernels know their address."""
    parts = [random(40, 64), random(24, 64, seed=1)]
    made = PackedLinear(parts, BACKEND, torch.float32, rows=50)
    assert made(random(3, 64)).shape == (3, 50)
    assert torch.equal(unpacked_weight(made.weight[0], 64), torch.cat(parts))
    where = made.weight[0].data_ptr()
    assert where % 64 == 0  # else each vector of weights is in two lines of the cache
    parts = [part + 1 for part in parts]
    made.load(parts)
    assert made.weight[0].data_ptr() == where
    assert torch.equal(unpacked_weight(made.weight[0], 64), torch.cat(parts))


KINDS = [  # the latter two compile kernels that no test of the fast ones needs
    pytest.param(None, marks=has_tiles),
    pytest.param("bfloat16", marks=[has_tiles, pytest.mark.slow]),
    pytest.param("int8", marks=[has_int8, pytest.mark.slow]),
]


def compiled(folder, store=None) -> FusedGPT:
    """The model, or none of it where no tiles fit its matrices."""
    kind = {"attention": "numba", "quantization": store if store == "int8" else None}
    dtype = "bfloat16" if store == "bfloat16" else "auto"
    model = load_model(folder, None, CPU, dtype, **kind)
    sizes = [sum(w.sizes) for x in model.layers for w in (x.qkv, x.proj, x.fc, x.mlp_proj)]
    assert bool(model.compiled) == all(size % TILE == 0 for size in sizes)
    if not model.compiled:
        pytest.skip(f"outputs of {sizes} are no multiples of {TILE}")
    return model


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("store", KINDS)
def test_all_layers_in_one_call_are_the_loop_over_them(era, store):
    """Decodes and chunks; rows that samples share, more of them than there are, none at all."""
    model = compiled(era.directory, store)
    ids = random(3, 40).mul(1000).long().abs().remainder(model.config.vocab_size).tolist()
    chunks = [(ids[0], 0, 1, [1]), (ids[1], 0, 1, [2]), (ids[2], 0, 38, [3, 4, 5])]
    wanted = None, [0], [5, 5, 5, 0], [7] * 40, []
    found = [run(model, chunks, hidden_rows=rows) for rows in wanted]
    model.compiled = None
    for got, rows in zip(found, wanted, strict=True):
        for ours, loop in zip(got, run(model, chunks, hidden_rows=rows), strict=True):
            torch.testing.assert_close(ours, loop, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("store", KINDS)
def test_new_weights_are_seen_in_the_one_call(era, store):
    model = compiled(era.directory, store)
    ids = list(range(1, 20))
    old = run(model, [(ids, 0, 19, [1, 2])])[0]
    model.load_state_dict({name: w * 1.1 for name, w in weights_of(era).items()})
    got = run(model, [(ids, 0, 19, [1, 2])])[0]
    model.compiled = None
    assert not torch.allclose(got, old, atol=1e-3)
    torch.testing.assert_close(got, run(model, [(ids, 0, 19, [1, 2])])[0], atol=2e-5, rtol=2e-5)


@has_tiles
def test_weights_that_lie_column_by_column_are_read_right(era):
    model = compiled(era.directory)
    weights = weights_of(era)
    odd = {name: w.T.contiguous().T if w.ndim == 2 else w for name, w in weights.items()}
    other = FusedGPT(model.config, model.recipe, odd, BACKEND)
    assert other.compiled
    chunk = [(list(range(1, 20)), 0, 19, [1, 2])]
    assert torch.equal(run(other, chunk)[0], run(model, chunk)[0])


@pytest.mark.parametrize("store", KINDS)
def test_the_bundled_model_is_compiled(store):
    assert compiled(MODEL, store)


def test_a_processor_without_weight_tiles_takes_the_loop(monkeypatch):
    monkeypatch.setattr(gemm, "FLOAT_TILE", 0)
    model = load_model(MODEL, None, CPU, "auto", attention="numba")
    assert not model.compiled and not isinstance(model.layers[0].fc, PackedLinear)


HEAVY = pytest.mark.skipif(not os.environ.get("FUZZ"), reason="compiles for long: set FUZZ")
OTHER = """
import os, sys
from llvmlite import binding

found = binding.get_host_cpu_features()
for name in sys.argv[1].split():
    found[name] = False
binding.get_host_cpu_features = lambda: found
sys.path.append("tests")

import torch
from helpers import cpu_kernels
from microvllm.cpu import gemm

print(gemm.LANES, gemm.TILE)
cpu_kernels.check_attention(cpu_kernels.MIXED, -1, head_dim=44)
cpu_kernels.check_attention(cpu_kernels.MIXED, 9, torch.bfloat16, n_head=6, n_kv_head=2)
if gemm.TILE:
    weight = cpu_kernels.random(70, 1100)
    for rows in (*range(1, 14), 128, 300):
        x = cpu_kernels.random(rows, 1100, seed=rows)
        got = cpu_kernels.packed_linear(weight)(x).double()
        torch.testing.assert_close(got, x.double() @ weight.double().T, rtol=0, atol=2e-4)
    for inputs in 1100, 1536:
        cpu_kernels.check_rows_of_bfloat16(inputs)
        weight, x = (cpu_kernels.random(n, inputs, seed=n) for n in (70, 33))
        x = x.bfloat16().float()  # as some processors round it
        want = x.double() @ weight.bfloat16().double().T
        got = cpu_kernels.halves(weight)(x).double()
        torch.testing.assert_close(got, want, rtol=0, atol=2e-4)
if gemm.INT8_TILE:
    cpu_kernels.check_rows_of_int8()
    cpu_kernels.check_int8_tiles()
if os.environ.get("FUZZ"):  # minutes of compiling
    cpu_kernels.check_low_bit()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "without, said",
    [
        pytest.param("avx512bf16", "16 32", marks=HEAVY),
        pytest.param("avx512f", "8 16", marks=HEAVY),
        # a generic processor has registers of that size too, below
        pytest.param("avx512f avx2", "4 0", marks=HEAVY),
    ],
)
def test_processors_with_smaller_registers(without, said, tmp_path):
    """Their vectors run here as well, as halves and quarters of this one's; and 16 bits become 32
    where no instruction multiplies them."""
    if int(said.split()[1]) > TILE:
        pytest.skip("this processor has no such registers")
    root = Path(__file__).resolve().parents[2]
    # what numba keeps on disk is for a processor, and that is what we lie about
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", OTHER, without]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == said


@pytest.mark.slow
def test_no_instructions_are_used_that_numba_must_not_use(tmp_path):
    """The compiler would end the process if code used an instruction that it does not have."""
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_CPU_NAME": "generic"}
    command = [sys.executable, "-c", OTHER, ""]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "4 0"


def test_what_is_kept_on_disk_is_of_these_very_sources():
    """A kernel is compiled again when any of the files changes that it is made of, not its own
    alone."""
    stamp = simd.STAMP
    files = [*sorted(Path(gemm.__file__).parent.glob("*.py")), Path(packing.__file__)]
    assert [size for _, size in stamp] == [file.stat().st_size for file in files]
    for kernel in (_run, attention.attend_rows, gemm.multiply):
        assert kernel._cache._cache_file._source_stamp == (stamp, simd.AMX)


# weights that are not packed: a live module's


def shared_linear(parts: list[torch.Tensor], **options) -> SharedFloat32:
    return SharedFloat32(parts, BACKEND, torch.float32, **options)


@has_tiles
@pytest.mark.parametrize("relu2", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 17, UNPACKED_ROWS, UNPACKED_ROWS + 1, 130])
def test_shared_weights_multiply_as_float64(two_threads, poisoned, rows, relu2):
    # tiles alone, none, tiles and other outputs, and more inputs than are packed at once
    for sizes, K in [((96, 32, 32), 64), ((4,), 16), ((20,), 192), ((100, 36), 1040)]:
        parts = [random(size, K, seed=i) * 8 / K**0.5 for i, size in enumerate(sizes)]
        x = random(rows, K, seed=9)
        exact = x.double() @ torch.cat(parts).double().T
        exact = exact.relu().square() if relu2 else exact
        assert torch.allclose(shared_linear(parts, relu2=relu2)(x).double(), exact, atol=1e-4)


@has_tiles
def test_a_row_of_few_has_the_same_bits_beside_others():
    linear = shared_linear([random(20, 64), random(8, 64, seed=1)])
    x = random(23, 64, seed=2)
    together = linear(x)
    for first in range(len(x)):
        assert torch.equal(linear(x[first : first + 3]), together[first : first + 3])


@has_tiles
@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([random(20, 65)], id="inputs"),
        pytest.param([random(20, 64), random(5, 64)], id="outputs"),
        pytest.param([random(64, 20).T], id="transposed"),
    ],
)
def test_shared_weights_of_other_forms_are_multiplied_by_torch(parts):
    linear = shared_linear(parts)
    x = random(3, parts[0].shape[1], seed=3)
    assert not linear.is_supported
    # part by part: torch's product of a contiguous copy may have other bits
    products = [torch.nn.functional.linear(x, part) for part in parts]
    assert torch.equal(linear(x), torch.cat(products, dim=1))


@has_tiles
def test_shared_weights_are_read_at_each_product():
    weight = torch.nn.Parameter(random(8, 64))
    linear = shared_linear([weight])
    x = random(2, 64, seed=4)
    before = linear(x)
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(linear(x), 2 * before)
