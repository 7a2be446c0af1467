"""The check of a GPU's kernels at an engine's first start, on the CPU: Triton's interpreter runs
the kernels. What is wrong on purpose has to be seen."""

import json
import os
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.broken_kernels import DeadlyBackend, EndlessBackend, NoBackend
from helpers.gpu_kernels import CUDA, DEVICE
from helpers.strikes import ALL
from triton import jit
from triton import language as tl

from microvllm.attention import sdpa_attention
from microvllm.fused.backend import Backend
from microvllm.fused.int8_cache import Int8Heads
from microvllm.gpu import attention, backend, elementwise, prefixes, sampler, self_check
from microvllm.gpu.backend import TritonBackend
from microvllm.gpu.self_check import check_here, forms_of
from microvllm.model import RECIPES, GPTConfig

ATTENTION = ["attention of decodes", "attention of prompts"]


@pytest.fixture(autouse=True)
def kernels_run_here(monkeypatch, tmp_path, one_thread):
    monkeypatch.setattr(backend, "has_triton", lambda device: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def shapes_for(made: Backend, era="5", n_head=2, n_kv_head=1, is_fp8=False):
    config = GPTConfig(64, 70, 2, n_head, n_kv_head, 16 * n_head)
    cache = made.kv_layout(config, made.dtype)
    return self_check.Shapes(config, config, RECIPES[era], cache, 4, is_fp8)


def check(made: Backend, *titles: str, **shapes) -> dict[str, str]:
    """What is wrong with forms of a backend, by default with all that it has."""
    shapes = shapes_for(made, **shapes)
    return check_here([*titles] or forms_of(made, shapes), made, shapes)


def test_the_forms_are_those_that_an_engine_uses():
    every = ["sum and norm", "relu^2", "rotary embedding, writing K and V", *ATTENTION, "draw"]
    few_rows = "products of a few rows"
    for deterministic, is_fp8, more in (
        (False, False, [few_rows]),
        (True, False, ["product with fixed tiles"]),
        (False, True, [few_rows, "rows in float8"]),
    ):
        made = TritonBackend(DEVICE, torch.float32, deterministic)
        assert forms_of(made, shapes_for(made, is_fp8=is_fp8)) == [*every, *more]
    of_torchs_attention = backend.GpuBackend(DEVICE, torch.float32)
    titles = forms_of(of_torchs_attention, shapes_for(of_torchs_attention))
    assert titles == [title for title in every if title not in ATTENTION]


def test_kernels_are_right_and_are_used():
    made = TritonBackend(DEVICE, torch.float32)
    results = check(made, "sum and norm", "relu^2", "rotary embedding, writing K and V")
    assert [*results.values()] == ["", "", ""]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.use_plain(results)
    assert made.relu2 is elementwise.relu2 and made.can_record and made.few_rows


ERAS = [("1", 2, 2, torch.float32), ("3", 4, 2, torch.float16), ("5", 2, 1, torch.float32)]
INT8 = [
    (2, 2, torch.float32, False), (2, 2, torch.float16, True),
    (4, 1, torch.float16, False), (4, 1, torch.float32, True),
]  # fmt: skip
if ALL:  # else each value of each column, in half of the combinations
    DTYPES = (torch.float32, torch.float16)
    ERAS = [(*era[:3], dtype) for era in ERAS for dtype in DTYPES]
    INT8 = [
        (*heads, dtype, x) for heads in [(2, 2), (4, 1)] for dtype in DTYPES for x in (False, True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("era, n_head, n_kv_head, dtype", ERAS)
def test_all_forms_are_right(era, n_head, n_kv_head, dtype):
    heads = {"era": era, "n_head": n_head, "n_kv_head": n_kv_head}
    for deterministic, is_fp8 in ((False, False), (True, False), (False, True)):
        results = check(TritonBackend(DEVICE, dtype, deterministic), **heads, is_fp8=is_fp8)
        assert len(results) == 7 + is_fp8 and not any(results.values()), results


def test_k_and_v_in_int8_are_written_and_read():
    made = backend.Int8TritonBackend(DEVICE, torch.float32)
    assert shapes_for(made).cache[1] == torch.int8
    titles = ["rotary embedding, writing K and V", "attention of decodes"]
    assert [*check(made, *titles, n_head=4, n_kv_head=1).values()] == ["", ""]


@pytest.mark.slow
@pytest.mark.parametrize("n_head, n_kv_head, dtype, deterministic", INT8)
def test_all_forms_are_right_in_int8(n_head, n_kv_head, dtype, deterministic):
    made = backend.Int8TritonBackend(DEVICE, dtype, deterministic)
    results = check(made, n_head=n_head, n_kv_head=n_kv_head)
    assert len(results) == 7 and not any(results.values()), results


def test_a_scale_that_is_wrong_is_found(monkeypatch):
    @jit
    def _scales(k, v, table, tile, stop, block_stride, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
                TILE: tl.constexpr):  # fmt: skip
        ones = tl.full((TILE,), 1.0, tl.float32)
        return ones, ones

    if CUDA:
        pytest.skip("a kernel that was compiled keeps the functions it calls")
    monkeypatch.setattr(attention, "_scales", _scales)
    monkeypatch.setattr(self_check, "WINDOWS", (-1,))
    made = backend.Int8TritonBackend(DEVICE, torch.float32)
    (wrong,) = check(made, "attention of decodes").values()
    assert "relative error" in wrong


def test_numbers_in_int8_are_those_of_the_plain_functions():
    """Bit for bit, also those between two numbers, zeros, NaN and infinities."""
    made = backend.Int8TritonBackend(DEVICE, torch.float32)
    shapes = shapes_for(made, n_head=2, n_kv_head=2)
    plain = self_check.plain_backend(shapes)
    v = torch.randn(6, 2, 16)
    v[1] = 0
    v[2, :, 0] = 127.0  # a scale of 1
    v[2, :, 1:] = torch.arange(15) + 0.5
    v[3, 0, 3] = torch.nan
    v[4, 1, 15] = -torch.inf
    v[5] *= 1e-35
    qkv = torch.cat([torch.randn(6, 64), v.flatten(1)], 1)
    batch = SimpleNamespace(
        token_ids=torch.zeros(6, dtype=torch.int32),
        positions=torch.arange(6, dtype=torch.int32),
        slots=torch.tensor([9, 4, 5, 7, 11, 6], dtype=torch.int32),
    )
    tables = torch.ones(6, 8), torch.zeros(6, 8)
    caches = []
    for each, device in ((made, DEVICE), (plain, torch.device("cpu"))):
        cache = torch.zeros(2, 3, 2, 4, 18, dtype=torch.int8, device=device)
        on_device = SimpleNamespace(**{n: x.to(device) for n, x in vars(batch).items()})
        arguments = [x.to(device) for x in (qkv, torch.zeros(6, 32))]
        tables_there = [x.to(device) for x in tables]
        each.rope_store(*arguments, None, None, *tables_there, on_device, *cache, 2, 1.0, 3.0, 1e-6)
        caches.append(Int8Heads(cache[1].cpu())[:])
    ours, theirs = caches
    assert torch.equal(ours.isnan(), theirs.isnan()) and ours.isnan().any(-1).sum() == 2
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


# kernels that are wrong ---------------------------------------------------------------------------


@jit(do_not_specialize=["n"])
def _square(x, n, BLOCK: tl.constexpr, PDL: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(x + i, i < n, 0.0).to(tl.float32)
    tl.store(x + i, z * z, i < n)


def test_a_kernel_that_is_wrong_is_found_and_plain_torch_computes(monkeypatch):
    monkeypatch.setattr(elementwise, "_relu2", _square)  # without the relu
    made = TritonBackend(DEVICE, torch.float32)
    results = check(made, "sum and norm", "relu^2")
    assert results["sum and norm"] == ""
    assert results["relu^2"].startswith("relu^2: a relative error of ")
    with pytest.warns(UserWarning) as warned:
        made.use_plain(results)
    assert len(warned) == 1
    message = str(warned[0].message)
    assert "relu^2 (relu^2: a relative error of" in message and "info --check" in message
    assert "sum and norm" not in message
    x = torch.tensor([[-2.0, 3.0]])
    assert made.relu2(x).tolist() == [[0.0, 9.0]]
    assert made.add_norm is elementwise.add_norm
    assert not made.can_record and made.few_rows


@jit
def _add_last_tile_only(score, value, value_scale, m, total, acc):
    # an online softmax that forgets to shrink what it has
    m_new = tl.maximum(m, tl.max(score, 1))
    weight = tl.exp2(score - m_new[:, None])
    total = total + tl.sum(weight, 1)
    return m_new, total, acc + tl.dot(weight.to(value.dtype), value)


@pytest.mark.skipif(CUDA, reason="a kernel that was compiled keeps the functions it calls")
@pytest.mark.slow
def test_a_wrong_line_of_attention_is_found(monkeypatch):
    monkeypatch.setattr(attention, "_add_tile", _add_last_tile_only)
    results = check(TritonBackend(DEVICE, torch.float32), *ATTENTION, n_head=4, n_kv_head=1)
    assert all("relative error" in results[title] for title in ATTENTION), results


@pytest.mark.slow
def test_a_wrong_draw_is_found(monkeypatch):
    monkeypatch.setattr(sampler, "SAMPLE_CHUNK", 32)  # so that there are several
    right = check(TritonBackend(DEVICE, torch.float32), "draw")
    assert right == {"draw": ""}

    @jit
    def _first(weight, index, target):
        running = tl.cumsum(weight, 0)
        found = tl.min(tl.where(running >= target / 2, index, 10**6), 0)
        return found, tl.sum(tl.where(index < found, weight, 0.0), 0)

    monkeypatch.setattr(sampler, "_first", _first)
    assert "drawn token" in check(TritonBackend(DEVICE, torch.float32), "draw")["draw"]


def test_shared_prefixes_are_checked_and_left_out_where_they_are_wrong(monkeypatch):
    monkeypatch.setenv("MICROVLLM_SHARED_PREFIXES", "1")
    title = "attention of shared prefixes"
    assert TritonBackend(DEVICE, torch.float32, deterministic=True).prefixes is None
    made = TritonBackend(DEVICE, torch.float32)
    shapes = shapes_for(made)
    assert title in forms_of(made, shapes)
    assert check(made, title) == {title: ""}
    find = prefixes.find_shared

    def find_more(tables, seq_lens, block_size, max_rows):
        num_shared, counts = find(tables, seq_lens, block_size, max_rows)
        assert counts.tolist() == [3, 0, 0, 0, 2, 0]
        return torch.stack([num_shared + block_size * (num_shared > 0), counts])

    monkeypatch.setattr(prefixes, "find_shared", find_more)
    results = check(made, title, ATTENTION[0])
    assert "relative error" in results[title] and results[ATTENTION[0]] == ""
    with pytest.warns(UserWarning, match=title):
        made.use_plain(results)
    assert made.attend.keywords["prefixes"] is None and made.can_record
    assert made.attend.func is attention.paged_attention


def attend_with(change, q, k, v, batch, window):
    """Plain attention, with something changed."""
    q, k, v, batch, window = change(q, k, v, batch, window)
    return sdpa_attention(q, k, v, batch, window)


def cut_table(q, k, v, batch, window):
    tables = batch.block_tables.clone()
    tables[:, -2] = 0
    return q, k, v, batch._replace(block_tables=tables), window


MISTAKES = {
    "a window that is one too long": lambda q, k, v, b, w: (q, k, v, b, w + (w >= 0)),
    "no window": lambda q, k, v, b, w: (q, k, v, b, -1),
    "a key less": lambda q, k, v, b, w: (q, k, v, b._replace(positions=b.positions - 1), w),
    "K for V": lambda q, k, v, b, w: (q, k, k, b, w),
    "the last block of a table": cut_table,
    "heads in another order": lambda q, k, v, b, w: (q.flip(1), k, v, b, w),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_attention_that_is_wrong_is_found(name):
    made = Backend(DEVICE, torch.float32)
    made.attend = partial(attend_with, MISTAKES[name])
    results = check(made, *ATTENTION)
    assert any(results.values()), name


def test_writing_to_another_slot_is_found():
    made = Backend(DEVICE, torch.float32)

    def rope_store(qkv, h, ve, ve_gate, cos, sin, batch, k, v, *constants):
        q = Backend.rope_store(
            made, qkv, h, ve, ve_gate, cos, sin, batch, k, v, *constants
        )  # fmt: skip
        v[-1, 0, -1, 0] += 0.5
        return q

    made.rope_store = rope_store
    assert check(made)["rotary embedding, writing K and V"].startswith("V: ")


def test_an_exception_is_a_difference_too():
    made = Backend(DEVICE, torch.float32)

    def relu2(x):
        raise RuntimeError("no kernel image is available")

    made.relu2 = relu2
    assert check(made) == {"relu^2": "RuntimeError: no kernel image is available"}
    made.relu2 = lambda x: x * torch.nan
    assert check(made) == {"relu^2": "relu^2: NaN or infinite"}


def test_deterministic_has_no_plain_function():
    made = TritonBackend(DEVICE, torch.float32, deterministic=True)
    made.use_plain({"draw": ""})
    with pytest.raises(ValueError, match="deterministic=True.*draw .number: .*info --check"):
        made.use_plain({"draw": "number: a relative error of 1.0e+00"})


def test_few_rows_and_float8_change_no_recorded_step():
    made = TritonBackend(DEVICE, torch.float32)
    with pytest.warns(UserWarning, match="products of a few rows"):
        made.use_plain({"products of a few rows": "wrong", "rows in float8": "wrong"})
    assert made.can_record and not made.few_rows
    assert made.fp8_rows is backend.fp8_rows


# another process, and the disk --------------------------------------------------------------------


@pytest.mark.slow
def test_a_form_that_ends_its_process_is_found(monkeypatch):
    made = DeadlyBackend(DEVICE, torch.float32)
    shapes = shapes_for(made)
    titles = forms_of(made, shapes)
    results = self_check.check_apart(titles, made, shapes)
    assert results.pop("relu^2") == "the process ended with status 7"
    assert len(results) == 3 and not any(results.values())
    monkeypatch.setattr(self_check, "TIMEOUT", 20)
    made = EndlessBackend(DEVICE, torch.float32)
    assert self_check.check_apart(["relu^2"], made, shapes) == {"relu^2": "no result after 20 s"}


@pytest.mark.slow
def test_without_a_second_process_the_check_is_made_in_this_one(monkeypatch):
    made = Backend(DEVICE, torch.float32)
    made.__class__ = NoBackend
    made.relu2 = lambda x: 2 * x
    titles = ["relu^2", "sum and norm"]
    results = self_check.check_apart(titles, made, shapes_for(made))
    assert "relative error" in results["relu^2"] and results["sum and norm"] == ""


def kept_check(monkeypatch) -> tuple[Backend, list]:
    """A backend, and a list that grows with each check that is made."""
    made = Backend(DEVICE, torch.float32)
    made.relu2 = lambda x: 2 * x
    checks = []

    def check_apart(titles, *_):
        checks.append(titles)
        return dict.fromkeys(titles, f"check {len(checks)}")

    monkeypatch.setattr(self_check, "check_apart", check_apart)
    return made, checks


def test_a_result_is_kept_for_its_setting(monkeypatch, tmp_path, capsys):
    made, checks = kept_check(monkeypatch)
    shapes = shapes_for(made)
    first = self_check.check_kernels(made, shapes)
    assert "once for this model" in capsys.readouterr().err
    assert self_check.check_kernels(made, shapes) == first == {"relu^2": "check 1"}
    assert len(checks) == 1 and capsys.readouterr().err == ""
    (file,) = (tmp_path / "microvllm").iterdir()
    assert file.stat().st_mode & 0o077 == 0 and json.loads(file.read_text())["results"] == first
    # other shapes, versions, backends; and a wish to see it again
    self_check.check_kernels(made, shapes_for(made, era="1"))
    monkeypatch.setattr(torch, "__version__", "9.9")
    self_check.check_kernels(made, shapes)
    self_check.check_kernels(made, shapes, fresh=True)
    assert len(checks) == 4
    assert self_check.check_kernels(made, shapes) == {"relu^2": "check 4"}


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"results": 3}', b"\xff\xfe", b'{"setting": 1, "results": {}}']
)
def test_a_damaged_result_is_made_again(monkeypatch, tmp_path, content):
    made, checks = kept_check(monkeypatch)
    shapes = shapes_for(made)
    self_check.check_kernels(made, shapes)
    (file,) = (tmp_path / "microvllm").iterdir()
    file.write_bytes(content)
    assert self_check.check_kernels(made, shapes) == {"relu^2": "check 2"}
    assert self_check.check_kernels(made, shapes) == {"relu^2": "check 2"}


@pytest.mark.skipif(os.name != "posix", reason="modes and links of POSIX")
def test_a_result_that_others_can_write_is_not_read(monkeypatch, tmp_path):
    made, checks = kept_check(monkeypatch)
    shapes = shapes_for(made)
    self_check.check_kernels(made, shapes)
    (file,) = (tmp_path / "microvllm").iterdir()
    file.chmod(0o666)
    self_check.check_kernels(made, shapes)
    assert len(checks) == 2
    # a link, a pipe, and a result of another card by this name
    other = tmp_path / "other"
    file.rename(other)
    file.symlink_to(other)
    self_check.check_kernels(made, shapes)
    assert len(checks) == 3 and not file.is_symlink()
    file.unlink()
    os.mkfifo(file)
    self_check.check_kernels(made, shapes)
    assert len(checks) == 4
    file.write_text(file.read_text().replace("no card", "a card"))
    self_check.check_kernels(made, shapes)
    assert len(checks) == 5


def test_a_folder_that_cannot_be_written_costs_a_check(monkeypatch, tmp_path):
    made, checks = kept_check(monkeypatch)
    (tmp_path / "microvllm").write_text("a file")
    for _ in range(2):
        self_check.check_kernels(made, shapes_for(made))
    assert len(checks) == 2


def test_what_fails_for_want_of_memory_is_not_kept(monkeypatch, tmp_path):
    made, _ = kept_check(monkeypatch)
    monkeypatch.setattr(
        self_check, "check_apart", lambda titles, *_: {"relu^2": "CUDA out of memory"}
    )
    self_check.check_kernels(made, shapes_for(made))
    assert not (tmp_path / "microvllm").exists()
