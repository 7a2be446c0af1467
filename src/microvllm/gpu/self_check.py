"""Compares the kernels of a backend with plain torch on this card.

The kernels may never have run on this combination of card, driver and version of Triton. So before
an engine uses them, each form is compared with the functions of fused.backend.Backend on small
random inputs: ragged lengths, windows, shared blocks, padding, and large numbers in each slot
without a token. The comparison runs in another process, because an illegal memory access or a crash
of the compiler can end it. Results are kept on disk for the card, the versions and the shapes of
the model. The engine uses most of the kernels that the comparison compiles.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..attention import Batch, make_batch
from ..fused.backend import Backend
from ..fused.int8_cache import Int8CacheBackend, Int8Heads
from ..model import GPTConfig, Recipe
from ..resources import on_device
from ..sampler import SamplingParams, cap_logits, drop_tokens
from ..scheduler import Chunk, Plan, Sequence
from . import say

CPU = torch.device("cpu")
TIMEOUT = 300  # seconds for all forms, with their compilation
# relative to the norm of a row: about twice the rounding errors of random numbers
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
UNWRITTEN = 0x44  # each byte of a slot without a token: as float16 4.3, as bfloat16 and float32 780


class Shapes(NamedTuple):
    """What the kernels of a model are compiled for. local: the config with the heads of this rank;
    cache: its kv_layout."""

    config: GPTConfig
    local: GPTConfig
    recipe: Recipe
    cache: tuple[GPTConfig, torch.dtype]
    block_size: int
    is_fp8: bool = False


class Pair(NamedTuple):
    """A kernel's result and that of plain torch, rows of numbers. tolerance: relative to the norm
    of a row, by default that of the dtype."""

    name: str
    result: Tensor
    expected: Tensor
    tolerance: float | None = None


class Inputs:
    """A backend, the plain backend, and random inputs, which are equal in each run."""

    def __init__(self, backend: Backend, plain: Backend, shapes: Shapes):
        self.backend = backend
        self.plain = plain
        self.shapes = shapes
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Random numbers in the dtype of the model."""
        x = torch.randn(shape, generator=self.generator)
        return x.to(self.backend.device, self.backend.dtype)

    def batch(self, sequences: list[tuple[int, int]]) -> Batch:
        """A step on the CPU. sequences: (rows, tokens in the cache after them), decodes first. Two
        of three sequences are forks: they share the blocks before their rows with the previous
        sequence. (1, 0) is a padding row of a recorded step: one token in the null block."""
        block_size = self.shapes.block_size
        seqs: list[Sequence] = []
        chunks = []
        num_blocks = sum(-(-num_tokens // block_size) for _, num_tokens in sequences)
        free = torch.randperm(num_blocks, generator=self.generator).add(1).tolist()
        for i, (num_rows, num_tokens) in enumerate(sequences):
            table = [free.pop() for _ in range(-(-num_tokens // block_size))] or [0]
            if i % 3:
                before = seqs[-1].block_table
                num_shared = min((num_tokens - num_rows) // block_size, len(before))
                table[: max(num_shared, 0)] = before[: max(num_shared, 0)]
            length = max(num_tokens, 1)
            ids = torch.randint(self.shapes.config.vocab_size, (length,), generator=self.generator)
            seqs.append(Sequence(i, ids.tolist(), SamplingParams()))
            seqs[-1].block_table = array("i", table)
            chunks.append(Chunk(seqs[-1], length - num_rows, length))
        width = max(len(seq.block_table) for seq in seqs) + 1  # with a column that is not used
        rows = [[*seq.block_table, *[0] * (width - len(seq.block_table))] for seq in seqs]
        tables = torch.tensor(rows, dtype=torch.int32).numpy()
        blocks = SimpleNamespace(block_size=block_size, block_tables=lambda seqs: tables)
        return make_batch(Plan(chunks=chunks), blocks).to(CPU)

    def rotary(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """cos and sin (positions, D/2)."""
        half = self.shapes.config.head_dim // 2
        angles = torch.linspace(0, 60, batch.max_seq_len * half).view(-1, half)
        return angles.cos(), angles.sin()

    def cache(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """K and V (N, Hkv, block_size, D) on the CPU, of all tokens up to the end of this step.
        Slots without a token have large numbers, except those of the null block."""
        layout, dtype = self.shapes.cache
        size = (2, int(batch.block_tables.max()) + 1, layout.n_kv_head, self.shapes.block_size)
        num_bytes = layout.head_dim * dtype.itemsize
        data = torch.full((*size, num_bytes), UNWRITTEN, dtype=torch.uint8).view(dtype)
        data[:, 0] = 0
        for table, length in zip(batch.block_tables, batch.seq_lens.tolist(), strict=True):
            positions = torch.arange(length, dtype=torch.int32)
            blocks = table[positions // self.shapes.block_size]
            slots = blocks * self.shapes.block_size + positions % self.shapes.block_size
            all_tokens = batch._replace(positions=positions, slots=slots)
            local = self.shapes.local
            heads = (local.n_head + 2 * local.n_kv_head) * local.head_dim
            qkv = floats(self.normal(length, heads))
            tables = self.rotary(batch)
            self.store(self.plain, qkv, None, None, None, *tables, all_tokens, *data)
        return data[0], data[1]

    def store(self, backend: Backend, *tensors) -> Tensor:
        """backend.rope_store with the constants of the model."""
        recipe = self.shapes.recipe
        constants = (self.shapes.local.n_head, recipe.qk_scale, recipe.gate_scale, recipe.eps)
        return backend.rope_store(*tensors, *constants)

    def on_device(self, batch: Batch) -> Batch:
        """The batch on the device of the kernels."""
        tensors = (x if isinstance(x, int) else x.to(self.backend.device) for x in batch)
        return Batch(*tensors)


def floats(x: Tensor | None) -> Tensor | None:
    """A copy of a tensor for the plain functions: float32 on the CPU."""
    return None if x is None else x.detach().to(CPU, torch.float32, copy=True)


# the forms ----------------------------------------------------------------------------------------

DECODES = [
    [(1, 1), (1, 17), (1, 40), (1, 0), (1, 33)],  # short: a program for each
    [(1, 200), (1, 203), (1, 0), (1, 64)],  # several programs share a context
]
PROMPTS = [
    [(1, 33), (2, 2), (5, 33), (17, 80), (7, 8), (3, 60)],
    [(1, 40), (150, 150), (70, 200), (2, 40)],
]
SHARED = [[(1, 200), (1, 150), (1, 203), (1, 0), (1, 80), (1, 130)]]
WINDOWS = (-1, 0, 20)


def check_add_norm(inputs: Inputs) -> Iterator[Pair]:
    x, y, x0 = (inputs.normal(5, inputs.shapes.config.n_embd) for _ in range(3))
    a, b = torch.tensor([0.7, -0.4], device=x.device)
    lambdas = [(None, None), (a, b)][: 1 + inputs.shapes.recipe.lambdas]
    for branch, mix in product((None, y), lambdas):
        arguments = (x, branch, x0, *mix)
        results = inputs.backend.add_norm(*arguments, inputs.shapes.recipe.eps)
        expected = inputs.plain.add_norm(*map(floats, arguments), inputs.shapes.recipe.eps)
        yield Pair("sum", results[0], expected[0])
        yield Pair("norm", results[1], expected[1])


def check_relu2(inputs: Inputs) -> Iterator[Pair]:
    x = inputs.normal(3, 4 * inputs.shapes.config.n_embd)
    expected = inputs.plain.relu2(floats(x))
    yield Pair("relu^2", inputs.backend.relu2(x), expected)


def check_rope_store(inputs: Inputs) -> Iterator[Pair]:
    local, recipe = inputs.shapes.local, inputs.shapes.recipe
    device = inputs.backend.device
    batch = inputs.batch(PROMPTS[0])
    num_rows = len(batch.token_ids)
    qkv = inputs.normal(num_rows, (local.n_head + 2 * local.n_kv_head) * local.head_dim)
    h = inputs.normal(num_rows, inputs.shapes.config.n_embd)
    tables = [table.to(device) for table in inputs.rotary(batch)]
    embeddings = [(None, None)]
    if recipe.gate_channels:
        ve = inputs.normal(inputs.shapes.config.vocab_size, local.n_kv_head * local.head_dim)
        embeddings.append((ve, inputs.normal(local.n_kv_head, recipe.gate_channels)))
    for ve, gate in embeddings:
        cache = inputs.cache(batch)
        on_card = [x.to(device, copy=True) for x in cache]
        arguments = (qkv, h, ve, gate, *tables)
        q = inputs.store(inputs.backend, *arguments, inputs.on_device(batch), *on_card)
        expected = inputs.store(inputs.plain, *map(floats, arguments), batch, *cache)
        yield Pair("q", q, expected)
        for name, result, plain in zip(("K", "V"), on_card, cache, strict=True):
            # the whole cache: a kernel must not write other slots
            if plain.dtype == torch.int8:  # some integers may differ by one
                result, plain = Int8Heads(result.cpu())[:], Int8Heads(plain)[:]
                yield Pair(name, result.flatten(0, 2), plain.flatten(0, 2), 1e-2)
            else:
                yield Pair(name, result.flatten(0, 2), plain.flatten(0, 2))


def check_attention(inputs: Inputs, steps: list, shared: bool = False) -> Iterator[Pair]:
    local = inputs.shapes.local
    attend = inputs.backend.attend
    if not shared and "prefixes" in vars(inputs.backend):  # shared prefixes are another form
        attend = partial(attend, prefixes=None)
    for sequences in steps:
        batch = inputs.batch(sequences)
        cache = inputs.cache(batch)
        on_card = [x.to(inputs.backend.device) for x in cache]
        q = inputs.normal(len(batch.token_ids), local.n_head, local.head_dim)
        for window in WINDOWS:
            out = attend(q, *on_card, inputs.on_device(batch), window)
            expected = inputs.plain.attend(floats(q), *cache, batch, window)
            yield Pair(f"window {window}", out, expected)


def check_sample(inputs: Inputs) -> Iterator[Pair]:
    filters = [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}]
    filters += [{"top_k": 50, "top_p": 0.9, "min_p": 0.01}, {"temperature": 0.0, "top_k": 3}]
    softcap = inputs.shapes.recipe.softcap
    for options in (filters[:2] * 4, filters * 2):
        params = [SamplingParams(**{"temperature": 0.8} | option) for option in options]
        logits = 4 * inputs.normal(len(params), inputs.shapes.config.vocab_size)
        uniform = torch.rand(len(params), generator=inputs.generator)
        temperature = torch.tensor([param.temperature for param in params])
        device = logits.device
        token_ids = inputs.backend.sample(
            logits, params, temperature.to(device), uniform.to(device), softcap
        )
        token_ids = token_ids.cpu().long()[:, None]
        greedy = floats(logits).gather(1, token_ids)
        scaled = cap_logits(floats(logits), softcap) / temperature.clamp(min=1e-3)[:, None]
        probs = torch.softmax(drop_tokens(scaled, params).double(), -1)
        # a row's uniform number lies between the sums of probabilities before and after its token
        ends = probs.cumsum(-1).gather(1, token_ids)
        starts = ends - probs.gather(1, token_ids)
        numbers = uniform[:, None].double()
        is_drawn = temperature > 0
        yield Pair("most likely token", greedy[~is_drawn], floats(logits).amax(1)[~is_drawn, None])
        clamped = torch.minimum(torch.maximum(numbers, starts), ends)
        yield Pair("drawn token", 1 + clamped[is_drawn], 1 + numbers[is_drawn], 1e-3)


def check_few_rows(inputs: Inputs) -> Iterator[Pair]:
    from .elementwise import linear_add, norm_linear

    width, eps = inputs.shapes.config.n_embd, inputs.shapes.recipe.eps
    lambdas = torch.tensor([0.7, -0.4], device=inputs.backend.device)
    mixes = [False, True][: 1 + inputs.shapes.recipe.lambdas]

    def weights(*shape: int) -> tuple[dict[str, Tensor], Tensor]:
        w = inputs.normal(*shape)
        if not inputs.shapes.is_fp8:
            return {"w": w}, floats(w)
        w, scales = type(inputs.backend).fp8_rows(w.float())  # the plain function
        return {"w": w, "scales": scales}, floats(w) * floats(scales)

    for num_rows, is_mixed in product((1, 2), mixes):
        x, x0 = inputs.normal(2, num_rows, width)
        mix = dict(zip(("x0", "a", "b"), (x0, *lambdas), strict=True)) if is_mixed else {}
        mixed = 0.7 * floats(x) - 0.4 * floats(x0) if is_mixed else floats(x)
        normed = F.rms_norm(mixed, (width,), eps=eps)
        w, exact = weights(64, width)
        expected = normed @ exact.T
        y, h = norm_linear(x, eps=eps, **w, **mix)
        yield Pair("norm and product", y, expected)
        yield Pair("norm", h, normed[:, : h.shape[1]])
        y, _ = norm_linear(x, eps=eps, relu2=True, **w, **mix)
        yield Pair("norm, product and relu^2", y, inputs.plain.relu2(expected))
        y = inputs.normal(num_rows, width)
        w, exact = weights(width, width)
        out = linear_add(y, stream=x, **w, **mix)
        yield Pair("product and sum", out, mixed + floats(y) @ exact.T)
        y = inputs.normal(num_rows, 4 * width)
        w, exact = weights(width, 4 * width)
        out = linear_add(y, stream=x, outputs=1, **w)  # as in graphs.py
        yield Pair("long product and sum", out, floats(x) + floats(y) @ exact.T)


def check_product(inputs: Inputs) -> Iterator[Pair]:
    width = inputs.shapes.config.n_embd
    for num_rows, num_outputs, num_inputs in ((1, 70, 4 * width), (70, 4200, width)):
        x, w = inputs.normal(num_rows, num_inputs), inputs.normal(num_outputs, num_inputs)
        yield Pair("product", inputs.backend.product(x, w), floats(x) @ floats(w).T)


def check_fp8_rows(inputs: Inputs) -> Iterator[Pair]:
    width = inputs.shapes.config.n_embd
    for num_channels in (width, 4 * width):
        x = inputs.normal(5, num_channels)
        x[1] = 0
        rows, scales = inputs.backend.fp8_rows(x)
        yield Pair("float8", floats(rows) * floats(scales), floats(x), 0.1)  # 4 bits of precision


class Form(NamedTuple):
    """A kernel, or one way to use it. attribute: the attribute of the backend that the kernel sets;
    check: yields pairs of results."""

    attribute: str
    check: Callable[..., Iterator[Pair]]
    arguments: tuple = ()


FORMS = {
    "sum and norm": Form("add_norm", check_add_norm),
    "relu^2": Form("relu2", check_relu2),
    "rotary embedding, writing K and V": Form("rope_store", check_rope_store),
    "attention of decodes": Form("attend", check_attention, (DECODES,)),
    "attention of prompts": Form("attend", check_attention, (PROMPTS,)),
    "attention of shared prefixes": Form("prefixes", check_attention, (SHARED, True)),
    "draw": Form("draw", check_sample),
    "products of a few rows": Form("few_rows", check_few_rows),
    "product with fixed tiles": Form("product", check_product),
    "rows in float8": Form("fp8_rows", check_fp8_rows),
}


def forms_of(backend: Backend, shapes: Shapes) -> list[str]:
    """The forms that an engine uses: the attributes that replace functions of the backend's
    class."""
    used = vars(backend).keys() - (set() if shapes.is_fp8 else {"fp8_rows"})
    return [title for title, form in FORMS.items() if form.attribute in used]


# checking them ------------------------------------------------------------------------------------


def difference(pair: Pair, dtype: torch.dtype) -> str:
    """A message about the difference of two results; "" if it is only rounding."""
    result, expected = floats(pair.result), floats(pair.expected)
    if not result.isfinite().all():
        return f"{pair.name}: NaN or infinite"
    errors = (result - expected).flatten(1).norm(dim=1)
    sizes = expected.flatten(1).norm(dim=1).clamp(min=1e-3)
    worst = float((errors / sizes).max())
    if worst > (pair.tolerance or TOLERANCE[dtype]):
        return f"{pair.name}: a relative error of {worst:.1e}"
    return ""


@torch.inference_mode()
def check_form(title: str, inputs: Inputs) -> str:
    """The error of a form, "" if it is right."""
    form = FORMS[title]
    device = inputs.backend.device
    try:
        with on_device(device):
            differences = [
                difference(pair, inputs.backend.dtype)
                for pair in form.check(inputs, *form.arguments)
            ]
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    except Exception as error:  # of the compiler or the driver
        return f"{type(error).__name__}: {error}"[:300]
    return next(filter(None, differences), "")


def check_here(titles: list[str], backend: Backend, shapes: Shapes) -> dict[str, str]:
    """The errors of forms, "" for those that are right."""
    plain = plain_backend(shapes)
    return {title: check_form(title, Inputs(backend, plain, shapes)) for title in titles}


def plain_backend(shapes: Shapes) -> Backend:
    """The functions that kernels are compared with."""
    is_int8 = shapes.cache[1] == torch.int8
    return (Int8CacheBackend if is_int8 else Backend)(CPU, torch.float32)


CHILD = """
import sys
sys.path[:] = {path!r}
from microvllm.gpu.self_check import answer
answer()
"""


def answer() -> None:
    """The work of the other process. It prints a line before each form, and one with its result."""
    backend_class, arguments, titles, shapes = pickle.load(sys.stdin.buffer)
    backend = backend_class(*arguments)
    torch.zeros(1, device=backend.device)  # fails here, and not in a form, if the card is in use
    for title in titles:
        print(json.dumps([title]), flush=True)
        print(json.dumps([title, check_here([title], backend, shapes)[title]]), flush=True)


def check_apart(titles: list[str], backend: Backend, shapes: Shapes) -> dict[str, str]:
    """The same as `check_here` in another process, and in a new one after a form that ends it."""
    results: dict[str, str] = {}
    while left := [title for title in titles if title not in results]:
        answers = run_child(left, backend, shapes)
        if not answers:  # a second process cannot use this card
            return results | check_here(left, backend, shapes)
        results |= answers
    return results


def run_child(titles: list[str], backend: Backend, shapes: Shapes) -> dict[str, str]:
    """The results that a process prints before it ends."""
    arguments = (backend.device, backend.dtype, backend.deterministic)
    job = pickle.dumps((type(backend), arguments, titles, shapes))
    command = [sys.executable or "python", "-c", CHILD.format(path=sys.path)]
    try:
        child = subprocess.run(command, input=job, capture_output=True, timeout=TIMEOUT)
        end = f"the process ended with status {child.returncode}"
        output = child.stdout
    except subprocess.TimeoutExpired as error:
        end = f"no result after {TIMEOUT} s"
        output = error.stdout or b""
    except OSError:
        return {}
    results = {}
    for line in output.decode(errors="replace").splitlines():
        with suppress(ValueError):  # a line that a library has printed
            title, wrong = [*json.loads(line), end][:2]
            results[title] = wrong
    return {title: results[title] for title in titles if title in results}


# results on disk ----------------------------------------------------------------------------------


def check_kernels(backend: Backend, shapes: Shapes, fresh: bool = False) -> dict[str, str]:
    """The error of each form that an engine uses, "" if it is right. Results on disk are used,
    unless `fresh`."""
    titles = forms_of(backend, shapes)
    setting = describe_setting(backend, shapes)
    digest = hashlib.sha256(json.dumps(setting).encode()).hexdigest()
    file = cache_folder() / f"kernels-{digest[:32]}.json"
    results = None if fresh else read(file, setting, titles)
    if results is None:
        say(
            f"compiling and checking the kernels for {setting['card']}, once for this model and "
            "these versions"
        )
        results = check_apart(titles, backend, shapes)
        # too little memory is not a property of the card
        if not any("out of memory" in wrong for wrong in results.values()):
            write(file, {"setting": setting, "results": results})
    return results


def describe_setting(backend: Backend, shapes: Shapes) -> dict:
    """Everything that a result depends on, for JSON."""
    card = "no card"
    if backend.device.type == "cuda":
        properties = torch.cuda.get_device_properties(backend.device)
        card = f"{properties.name}, {properties.major}.{properties.minor}"
    sources = sorted(Path(__file__).parent.glob("*.py"))
    versions = [torch.__version__, torch.version.cuda, torch.version.hip, triton.__version__]
    return {
        "card": card,
        "versions": [*map(str, versions)],
        "sources": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest(),
        "backend": f"{type(backend).__qualname__}, {backend.dtype}, {backend.deterministic}",
        "shapes": repr(shapes),
    }


def cache_folder() -> Path:
    """The folder of results, in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "microvllm"


def read(file: Path, setting: dict, titles: list[str]) -> dict[str, str] | None:
    """The results in a file. None if there are none, if they have other forms or another setting,
    or if other users can write the file."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        with open(os.open(file, flags), encoding="utf-8") as stream:
            status = os.fstat(stream.fileno())
            is_own = os.name != "posix" or status.st_uid == os.getuid()
            content = json.load(stream) if is_own and not status.st_mode & 0o022 else {}
        results = {title: content["results"][title] for title in titles}
        if content["setting"] == setting and all(isinstance(w, str) for w in results.values()):
            return results
    return None


def write(file: Path, content: dict) -> None:
    """Write results, if the folder is writable. Other processes see the complete file or none."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(
            "w", dir=file.parent, suffix=".part", delete=False, encoding="utf-8"
        ) as part:
            json.dump(content, part, indent=1)
        os.replace(part.name, file)
