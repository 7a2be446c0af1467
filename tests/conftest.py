import json
import os
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src"
PACKAGE = SRC / "microvllm"
ERAS = Path(__file__).parent / "fixtures" / "nanochat_eras"
MODEL = ROOT / "models" / "oldbooks-d6"

# a helper that compiles kernels ends with the test that started it, also in commands of tests
os.environ["MICROVLLM_HELPER"] = "attached"
# processes that a test starts import this checkout, whichever one is installed
others = [path for path in [os.environ.get("PYTHONPATH")] if path]
os.environ["PYTHONPATH"] = os.pathsep.join([str(SRC), *others])

torch.set_num_threads(1)  # two processes run side by side; a test of threads asks for more


# In this order files are begun, the others after them: first some that need no kernels of the CPU,
# which are compiled meanwhile, then those of many seconds, of these the ones that need more kernels
# last. The short ones come at the end, lest one process waits for the other.
EARLY = (
    "test_kernels_gpu test_graphs test_deterministic_gpu test_flash test_float8 test_lab "
    "test_tokenizer test_scheduler test_pt test_strict_tokenizer test_state_machine"
).split()
ORDER = [*EARLY, *(
    "test_house test_readme test_benchmarks test_ray test_parallel test_soak "
    "test_interruptions test_streams test_scripts test_batch test_examples test_conversation "
    "test_model test_fuzz test_trace test_trace_page test_cli test_logits test_policies "
    "test_engine test_kernels_cpu test_products_cpu test_determinism_matrix test_live "
    "test_fewbits_cpu test_first test_int8_cache test_vectors_cpu test_memory_limits "
    "test_quantize"
).split()]  # fmt: skip
KINDS = "float32-layers", "float32"  # of kernels
SLOW = "bfloat16-layers", "int8-layers"  # those that only slow tests need


def pytest_collection_modifyitems(items):
    places = {name: i for i, name in enumerate(ORDER)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="module", autouse=True)
def kernels(request):
    """The usual kernels, on disk before a test begins: a command that finds none says so. For the
    other files, and for the kinds that come later, one process has a helper compile them."""
    from microvllm.cpu import backend, first

    alone = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0"
    for kind in KINDS if request.config.option.markexpr == "not slow" else KINDS + SLOW:
        waits = kind in KINDS and request.path.stem not in EARLY
        if first.compiled(kind):
            continue
        if not waits and (not alone or kind in first._helpers or not first.place(kind)):
            return
        with first.told(first.tell, waits):
            if not first.begin(backend.CpuBackend, kind, waits):
                return  # one kind at a time, and each once


@pytest.fixture(scope="session", autouse=True)
def interpreter():
    """Triton's interpreter changes triton.language anew for each launch, and for each call of a
    function inside a kernel, which is most of its time: once will do."""
    if not os.environ.get("TRITON_INTERPRET"):  # the tests of kernels set it where there is no card
        return
    from triton.runtime import interpreter

    if hasattr(interpreter, "_LangPatchScope"):  # else another triton
        patch, done = interpreter._patch_lang, set()

        def once(fn):  # for each module, since not all import the same parts of it
            if id(fn.__globals__) not in done:
                done.add(id(fn.__globals__))
                patch(fn)
            return interpreter._LangPatchScope()  # with nothing to take back

        interpreter._patch_lang = once


class Fixture:
    """One era's folder: where its checkpoint lies, what nanochat computed with it."""

    def __init__(self, entry: dict, goldens: str):
        self.entry = entry
        self.directory = (ERAS / entry["checkpoint"]).parent
        self.tokenizer = ERAS / "tokenizer"
        folder = ERAS / entry["dir"]
        self.json = json.loads((folder / goldens).read_text())
        self.arrays = np.load(folder / goldens.replace(".json", ".npz"))
        names = {"logit_softcap": "softcap", "rope_cos_sin_rounded_to_bf16": "round_rotary"}
        needed = self.json.get("overrides_needed") or {}
        self.overrides = {names[key]: value for key, value in needed.items()}


def era_fixtures() -> dict[str, tuple[dict, str]]:
    index = json.loads((ERAS / "index.json").read_text())
    found = {}
    for entry in index["fixtures"]:
        if entry["dir"].startswith("era"):
            found[entry["dir"]] = (entry, "goldens.json")
    found["era3b_late"] = (found["era3b"][0], "goldens_1076f97.json")
    return found


@pytest.fixture(params=list(era_fixtures()))
def era(request) -> Fixture:
    return Fixture(*era_fixtures()[request.param])


class HandMade(SimpleNamespace):
    """A batch that no engine made."""

    def _replace(self, **changes):
        return HandMade(**{**vars(self), **changes})


def hand_made_batch(chunks: list[tuple], block_size: int) -> HandMade:
    """What make_batch would give all layers of one group, spelled out row by row, with the logits
    of every row.

    chunks: (ids, start, stop, table) each: the tokens [start, stop) of a sequence; single rows
    first.
    """

    def ints(values):
        return torch.tensor(list(values), dtype=torch.int32)

    lengths = [stop - start for _, start, stop, _ in chunks]
    assert lengths == sorted(lengths, key=lambda n: n > 1), "decodes come first"
    rows = [(ids, p, table) for ids, start, stop, table in chunks for p in range(start, stop)]
    width = 1 + max(len(table) for *_, table in chunks)  # a column that nobody uses, at least
    return HandMade(
        ids=ints(ids[p] for ids, p, _ in rows),
        prev_ids=ints(ids[p - 1] if p else 0 for ids, p, _ in rows),
        positions=ints(p for _, p, _ in rows),
        slots=ints(table[p // block_size] * block_size + p % block_size for _, p, table in rows),
        cu_seqlens=ints(accumulate(lengths, initial=0)),
        seq_lens=ints(stop for _, _, stop, _ in chunks),
        block_tables=ints([*table, *[0] * (width - len(table))] for *_, table in chunks),
        logit_rows=ints(range(len(rows))),
        num_decodes=lengths.count(1),
        max_query=max(lengths),
        max_seq=max(stop for _, _, stop, _ in chunks),
    )


def slots_of(view) -> list[int]:
    """Of each token of a SequenceKVView, where its K and V are: block * block_size + offset."""
    size, table = view.k.shape[2], view.table.tolist()
    return [table[p // size] * size + p % size for p in range(view.num_tokens)]


@pytest.fixture(scope="module")
def one_thread():
    """For modules of thousands of tiny steps: two threads would wait for each other most of the
    time, and for seconds where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
