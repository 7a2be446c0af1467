"""Does each kernel compute on this card what plain torch computes?

A card, a driver and a version of Triton make a combination on which the kernels may never have run.
So before an engine uses them, each of its forms is compared with the plain functions, on small
random inputs: ragged lengths, windows, shared blocks, padding, NaN in each slot that has no token.
This is done in another process, which an illegal access to memory or a crash of the compiler may
end, and once: the result is kept on disk for the card, the versions and the shapes of the model.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import sdpa_attention
from ..fused.backend import Backend, filter_values
from ..resources import on_device
from ..sampler import SamplingParams, cap_logits, drop_tokens

SECONDS = 120  # for a form, of which most is compiled in less than two
# relative to the norm of a row: about twice what rounding makes of random numbers
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
CPU = torch.device("cpu")
PLAIN = Backend(CPU, torch.float32)


@dataclass(frozen=True)
class Shapes:
    """What the kernels of an engine are compiled for: a model, and how it is computed."""

    dtype: str  # of what is computed: float32, bfloat16 or float16
    n_embd: int
    n_head: int
    n_kv_head: int
    head_dim: int
    vocab_size: int
    block_size: int
    ve_channels: int  # inputs of the gates of value embeddings, 0: there are none
    has_lambdas: bool
    eps: float
    qk_scale: float
    gate_scale: float
    softcap: float
    has_attention: bool  # Triton's, not torch's
    deterministic: bool = False
    is_fp8: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


class Form(NamedTuple):
    """A kernel, or one way to use it. name: of the function of the backend that it computes, or
    few_rows; check(shapes, device) raises Differs where the kernel is wrong."""

    name: str
    check: Callable[[Shapes, torch.device], None]


class Differs(Exception):
    """A kernel's result is not that of plain torch."""


class Numbers:
    """Random inputs in the dtype of the model, the same in each run."""

    def __init__(self, shapes: Shapes, device: torch.device):
        self.generator = torch.Generator().manual_seed(0)
        self.dtype = shapes.torch_dtype
        self.device = device

    def normal(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.generator)
        return x.to(self.device, self.dtype)

    def integers(self, below: int, count: int) -> Tensor:
        x = torch.randint(below, (count,), generator=self.generator, dtype=torch.int32)
        return x.to(self.device)

    def order(self, count: int) -> list[int]:
        return torch.randperm(count, generator=self.generator).tolist()


def floats(x: Tensor | None) -> Tensor | None:
    """A tensor for the plain functions: what it is, as float32 on the CPU."""
    return None if x is None else x.detach().to(CPU, torch.float32, copy=True)


def compare(what: str, out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raises Differs if a row of `out` is not that of `expected`, but for the rounding of dtype."""
    out = floats(out)
    if not out.isfinite().all():
        raise Differs(f"{what}: NaN or infinite")
    errors = (out - expected).flatten(1).norm(dim=1)
    sizes = expected.flatten(1).norm(dim=1).clamp(min=1e-3)
    worst = float((errors / sizes).max())
    if worst > TOLERANCE[dtype]:
        raise Differs(f"{what}: a relative error of {worst:.1e}")


# the forms ----------------------------------------------------------------------------------------


def check_add_norm(shapes: Shapes, device: torch.device) -> None:
    from . import steps

    numbers = Numbers(shapes, device)
    x, y, x0 = (numbers.normal(5, shapes.n_embd) for _ in range(3))
    a, b = torch.tensor([0.7, -0.4], device=device)
    cases = [(None, None, None), (y, None, None)]
    if shapes.has_lambdas:
        cases += [(None, a, b), (y, a, b)]
    for branch, resid, first in cases:
        results = steps.add_norm(x, branch, x0, resid, first, shapes.eps)
        inputs = map(floats, (x, branch, x0, resid, first))
        expected = PLAIN.add_norm(*inputs, shapes.eps)
        for what, result, wanted in zip(("sum", "norm"), results, expected, strict=True):
            compare(what, result, wanted, shapes.torch_dtype)


def check_relu2(shapes: Shapes, device: torch.device) -> None:
    from . import steps

    x = Numbers(shapes, device).normal(3, 4 * shapes.n_embd)
    expected = PLAIN.relu2(floats(x))
    compare("relu2", steps.relu2(x), expected, shapes.torch_dtype)


def check_rope_store(shapes: Shapes, device: torch.device) -> None:
    from . import steps

    numbers = Numbers(shapes, device)
    num_rows, num_blocks, num_positions, dim = 9, 4, 50, shapes.head_dim
    n_head, n_kv = shapes.n_head, shapes.n_kv_head
    num_slots = num_blocks * shapes.block_size
    num_rows = min(num_rows, num_slots)
    batch = SimpleNamespace(
        token_ids=numbers.integers(11, num_rows),
        positions=numbers.integers(num_positions, num_rows),
        slots=torch.tensor(numbers.order(num_slots)[:num_rows], dtype=torch.int32, device=device),
    )
    qkv = numbers.normal(num_rows, (n_head + 2 * n_kv) * dim)
    h = numbers.normal(num_rows, shapes.n_embd)
    angles = torch.linspace(0, 60, num_positions * (dim // 2), device=device).view(num_positions, -1)
    tables = (angles.cos(), angles.sin())
    constants = (n_head, shapes.qk_scale, shapes.gate_scale, shapes.eps)
    embeddings = [(None, None)]
    if shapes.ve_channels:
        gate = numbers.normal(n_kv, shapes.ve_channels)
        embeddings.append((numbers.normal(11, n_kv * dim), gate))
    for ve, ve_gate in embeddings:
        k, v = numbers.normal(2, num_blocks, n_kv, shapes.block_size, dim)
        k_plain, v_plain = floats(k), floats(v)
        q = steps.rope_store(qkv, h, ve, ve_gate, *tables, batch, k, v, *constants)
        inputs = map(floats, (qkv, h, ve, ve_gate, *tables))
        on_cpu = SimpleNamespace(**{name: x.cpu() for name, x in vars(batch).items()})
        expected = PLAIN.rope_store(*inputs, on_cpu, k_plain, v_plain, *constants)
        compare("q", q, expected, shapes.torch_dtype)
        # the whole cache: nothing else may have been written
        compare("k", k.flatten(0, 2), k_plain.flatten(0, 2), shapes.torch_dtype)
        compare("v", v.flatten(0, 2), v_plain.flatten(0, 2), shapes.torch_dtype)


# (rows, tokens in the cache after them); decodes come first. (1, 0) is a padding row of a recorded
# step: one token in the null block
DECODES = [(1, 1), (1, 17), (1, 200), (1, 0), (1, 203), (1, 64)]
SHORT = [(1, 33), (1, 70), (2, 2), (5, 33), (17, 80), (7, 8)]
LONG = [(1, 40), (150, 150), (70, 200), (2, 40)]
WINDOWS = (-1, 0, 20)


def attention_case(sequences: list[tuple[int, int]], shapes: Shapes, device: torch.device):
    """Queries, K and V of sequences in scattered blocks, and their batch. The second of two long
    sequences shares the first one's full blocks as far as it has them."""
    numbers = Numbers(shapes, device)
    size = shapes.block_size
    counts = [-(-length // size) for _, length in sequences]
    free = [1 + block for block in numbers.order(sum(counts) + 2)]  # block 0 is the null block
    tables = torch.zeros(len(sequences), max(counts) + 1, dtype=torch.int32)
    data = torch.full((2, len(free) + 1, shapes.n_kv_head, size, shapes.head_dim), torch.nan)
    data[:, 0] = 0
    for i, (rows, length) in enumerate(sequences):
        blocks = [free.pop() for _ in range(counts[i])]
        shared = (length - rows) // size
        if shared >= 10 // size + 1 and i > 0 and counts[i - 1] > shared:
            blocks[:shared] = tables[i - 1, :shared].tolist()
        tables[i, : counts[i]] = torch.tensor(blocks)
        for first, block in enumerate(blocks):
            filled = min(length - first * size, size)
            shape = (2, shapes.n_kv_head, filled, shapes.head_dim)
            data[:, block, :, :filled] = torch.randn(shape, generator=numbers.generator)
    num_rows = [rows for rows, _ in sequences]
    lengths = [max(length, 1) for _, length in sequences]
    columns = zip(num_rows, lengths, strict=True)
    positions = [p for rows, length in columns for p in range(length - rows, length)]
    ends = torch.tensor([0, *num_rows]).cumsum(0)
    on_cpu = SimpleNamespace(
        positions=torch.tensor(positions, dtype=torch.int32),
        cu_seqlens=ends.to(torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_tables=tables,
        num_decodes=num_rows.count(1),
        max_query_len=max(num_rows),
        max_seq_len=max(lengths),
    )
    k, v = data.to(device, shapes.torch_dtype)
    q = numbers.normal(len(positions), shapes.n_head, shapes.head_dim)
    return q, k, v, on_cpu


def check_attention(
    sequences: list[tuple[int, int]], shapes: Shapes, device: torch.device, **options
) -> None:
    from . import attention

    q, k, v, on_cpu = attention_case(sequences, shapes, device)
    batch = SimpleNamespace(**vars(on_cpu))
    for name in ("positions", "cu_seqlens", "seq_lens", "block_tables"):
        setattr(batch, name, vars(on_cpu)[name].to(device))
    for window in WINDOWS:
        fixed = shapes.deterministic
        out = attention.paged_attention(q, k, v, batch, window, fixed=fixed, **options)
        expected = sdpa_attention(floats(q), floats(k), floats(v), on_cpu, window)
        compare(f"window {window}", out, expected, shapes.torch_dtype)


def check_decodes(shapes: Shapes, device: torch.device) -> None:
    from . import attention

    counts = attention.make_counts(device)
    for num_splits in (None, 1, 3, 3):  # the last finds what the one before has left in counts
        check_attention(DECODES, shapes, device, num_splits=num_splits, counts=counts)


def check_prompts(shapes: Shapes, device: torch.device) -> None:
    for sequences in (SHORT, LONG):
        check_attention(sequences, shapes, device)


def check_sample(shapes: Shapes, device: torch.device) -> None:
    from . import sampler

    numbers = Numbers(shapes, device)
    filters = [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}]
    filters += [{"top_k": 50, "top_p": 0.9, "min_p": 0.01}, {"temperature": 0.0, "top_k": 3}]
    for kinds in (filters[:2] * 8, filters * 3):
        params = [SamplingParams(**{"temperature": 0.8} | kind) for kind in kinds]
        logits = 4 * numbers.normal(len(params), shapes.vocab_size)
        uniform = torch.rand(len(params), generator=numbers.generator)
        temperature = torch.tensor([p.temperature for p in params])
        values = filter_values(params)
        columns = None
        if values is not None:
            columns = torch.tensor(values.T, dtype=torch.float32, device=device).contiguous()
        inputs = (logits, temperature.to(device), uniform.to(device), shapes.softcap, columns)
        token_ids = sampler.sample(*inputs).tolist()
        check_draws(token_ids, logits.float().cpu(), params, uniform, shapes.softcap)


def check_draws(token_ids: list[int], logits: Tensor, params, uniform: Tensor, softcap) -> None:
    """Raises Differs unless each uniform number lies in its token's part of the distribution."""
    for row, token_id in enumerate(token_ids):
        param = params[row]
        if param.temperature == 0:
            if token_id != int(logits[row].argmax()):
                raise Differs(f"row {row}: not the likeliest token")
            continue
        scaled = cap_logits(logits[row : row + 1], softcap) / param.temperature
        probs = torch.softmax(drop_tokens(scaled, [param]).double(), -1)[0]
        if not 0 <= token_id < len(probs) or probs[token_id] == 0:
            raise Differs(f"row {row}: {param} rules the token {token_id} out")
        end = float(probs[: token_id + 1].sum())
        start = end - float(probs[token_id])
        if not start - 1e-3 <= float(uniform[row]) <= end + 1e-3:
            raise Differs(f"row {row}: another token than the uniform number says")


def check_few_rows(shapes: Shapes, device: torch.device) -> None:
    from .steps import linear_add, norm_linear

    numbers = Numbers(shapes, device)
    width, dtype = shapes.n_embd, shapes.torch_dtype
    lambdas = (torch.tensor(0.7, device=device), torch.tensor(-0.4, device=device))
    for rows in (1, 2):
        x, x0 = numbers.normal(2, rows, width)
        mixes = [()]
        if shapes.has_lambdas:
            mixes.append((x0, *lambdas))
        for mix in mixes:
            mixed = floats(x)
            if mix:
                mixed = floats(lambdas[0] * x.float() + lambdas[1] * x0.float())
            normed = F.rms_norm(mixed, (width,), eps=shapes.eps)
            for relu2 in (False, True):
                w = numbers.normal(64, width)
                y, h = norm_linear(x, w, shapes.eps, *mix, relu2=relu2)
                expected = normed @ floats(w).T
                if relu2:
                    expected = PLAIN.relu2(expected)
                compare("norm and product", y, expected, dtype)
                compare("norm", h, normed[:, :32], dtype)
            for inputs in (width, 4 * width):
                y, w = numbers.normal(rows, inputs), numbers.normal(width, inputs)
                out = linear_add(y, w, x, *mix)
                compare("product and sum", out, mixed + floats(y) @ floats(w).T, dtype)


def check_product(shapes: Shapes, device: torch.device) -> None:
    from . import steps

    numbers = Numbers(shapes, device)
    for rows, outputs, inputs in ((1, 70, 4 * shapes.n_embd), (70, 4200, shapes.n_embd)):
        x, w = numbers.normal(rows, inputs), numbers.normal(outputs, inputs)
        expected = floats(x) @ floats(w).T
        y = steps.linear(x, w)
        compare("product", y, expected, shapes.torch_dtype)
        if not torch.equal(steps.linear(x[-1:], w), y[-1:]):
            raise Differs("product: a row depends on its batch")


def check_fp8_rows(shapes: Shapes, device: torch.device) -> None:
    from . import steps

    numbers = Numbers(shapes, device)
    for channels in (shapes.n_embd, 4 * shapes.n_embd):
        x = numbers.normal(5, channels)
        x[1] = 0
        rows, scales = steps.fp8_rows(x)
        # a float8 has 4 bits: an error of 1/16 of each number, and 3 % of a row
        errors = (floats(rows) * floats(scales) - floats(x)).norm(dim=1)
        if not (errors <= 0.05 * floats(x).norm(dim=1)).all():
            raise Differs("float8: not the row")


FORMS = {
    "sum and norm": Form("add_norm", check_add_norm),
    "relu^2": Form("relu2", check_relu2),
    "rotary, and writing K and V": Form("rope_store", check_rope_store),
    "attention of decodes": Form("attend", check_decodes),
    "attention of prompts": Form("attend", check_prompts),
    "draw": Form("draw", check_sample),
    "products of a few rows": Form("few_rows", check_few_rows),
    "product with fixed tiles": Form("product", check_product),
    "rows in float8": Form("fp8_rows", check_fp8_rows),
}


def forms_of(shapes: Shapes) -> list[str]:
    """The forms that an engine of these shapes uses."""
    unused = set()
    if not shapes.has_attention:
        unused |= {"attend", "few_rows", "product"}
    if shapes.deterministic or shapes.is_fp8:
        unused.add("few_rows")
    if not shapes.deterministic:
        unused.add("product")
    if not shapes.is_fp8:
        unused.add("fp8_rows")
    return [title for title, form in FORMS.items() if form.name not in unused]


# checking them ------------------------------------------------------------------------------------


@torch.inference_mode()
def check_form(title: str, shapes: Shapes, device: torch.device) -> str:
    """What is wrong with a form, "" if nothing is."""
    try:
        with on_device(device):
            FORMS[title].check(shapes, device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    except Differs as error:
        return str(error)
    except Exception as error:  # the compiler's, the driver's, or a mistake in here
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def check_here(titles: list[str], shapes: Shapes, device: torch.device) -> dict[str, str]:
    """The forms, and what is wrong with each."""
    return {title: check_form(title, shapes, device) for title in titles}


CHILD = """
import json, sys
job = json.loads(sys.argv[1])
sys.path[:] = job["path"]
from microvllm.gpu.self_check import answer
answer(job)
"""


def answer(job: dict) -> None:
    """The work of the other process: a line before each form, and one with what is wrong."""
    device = torch.device(job["device"])
    shapes = Shapes(**job["shapes"])
    torch.zeros(1, device=device)  # else the card is not to be had, which is no form's mistake
    for title in job["titles"]:
        print(json.dumps([title]), flush=True)
        print(json.dumps([title, check_form(title, shapes, device)]), flush=True)


def check_apart(titles: list[str], shapes: Shapes, device: torch.device) -> dict[str, str]:
    """The same in a process of its own, and in another one where a form has ended it."""
    found: dict[str, str] = {}
    while left := [title for title in titles if title not in found]:
        answered = ask_child(left, shapes, device)
        if not answered:  # no second process may use this card
            return found | check_here(left, shapes, device)
        found |= answered
    return found


def ask_child(titles: list[str], shapes: Shapes, device: torch.device) -> dict[str, str]:
    """What a process says of the forms, as far as it comes."""
    job = {"device": str(device), "shapes": asdict(shapes), "titles": titles, "path": sys.path}
    command = [sys.executable or "python", "-c", CHILD, json.dumps(job)]
    try:
        child = subprocess.run(command, capture_output=True, timeout=SECONDS * len(titles))
        ended = f"it ended the process, with status {child.returncode}"
        output = child.stdout
    except subprocess.TimeoutExpired as error:
        ended = "it came to no end"
        output = error.stdout or b""
    except OSError:
        return {}
    found = {}
    for line in output.decode(errors="replace").splitlines():
        with suppress(ValueError):  # what a library has printed
            title, wrong = [*json.loads(line), ended][:2]
            found[title] = wrong
    return {title: found[title] for title in titles if title in found}


# what is known ------------------------------------------------------------------------------------

_known: dict[str, dict[str, str]] = {}  # of this process, by the name of the file


def check_kernels(shapes: Shapes, device: torch.device, fresh: bool = False) -> dict[str, str]:
    """What is wrong with each form that an engine of these shapes uses, "" if nothing is. From disk
    where that is known, unless `fresh`."""
    key = describe_setting(shapes, device)
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    file = cache_folder() / f"kernels-{name}.json"
    titles = forms_of(shapes)
    found = None if fresh else _known.get(name) or read(file, titles)
    if found is None:
        print(
            f"microvllm: compiling and checking the kernels for {key['card']}, once for this model "
            "and these versions: about half a minute",
            file=sys.stderr,
            flush=True,
        )
        found = check_apart(titles, shapes, device)
        # what another program's memory has prevented is no property of the card
        if not any("out of memory" in wrong for wrong in found.values()):
            write(file, key | {"forms": found})
    _known[name] = found
    return found


def describe_setting(shapes: Shapes, device: torch.device) -> dict:
    """On what a result depends."""
    import triton

    card, capability = "no card", None
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        capability = torch.cuda.get_device_capability(device)
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return {
        "card": card,
        "capability": capability,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": triton.__version__,
        "sources": digest,
        "shapes": asdict(shapes),
    }


def cache_folder() -> Path:
    """Where results are kept: the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "microvllm"


def read(file: Path, titles: list[str]) -> dict[str, str] | None:
    """The result that a file has; None if there is none, or not of these forms."""
    try:
        forms = json.loads(file.read_text(encoding="utf-8"))["forms"]
        found = {title: forms[title] for title in titles}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if all(isinstance(wrong, str) for wrong in found.values()) else None


def write(file: Path, result: dict) -> None:
    """Keep a result, if the folder can be written. Another process sees all of the file or none."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=file.parent, suffix=".part", delete=False, encoding="utf-8"
        ) as part:
            json.dump(result, part, indent=1)
        os.replace(part.name, file)


def table(found: dict[str, str]) -> str:
    """A line for each form, for people."""
    width = max(map(len, found))
    return "\n".join(f"{title:{width}}  {wrong or 'as plain torch'}" for title, wrong in found.items())
