"""The table of docs/DETERMINISM.md: every row is a condition, and logits are compared bit for bit.

One record holds the logits of every text that any engine of a dtype was asked to continue. It
begins with each request alone, cold, on one thread; all else must add the same bytes.
"""

import itertools
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.goldens import MODEL, ROOT, Fixture, era_fixtures
from helpers.records import Record

from microvllm import LLM, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = bool(os.environ.get("FUZZ"))  # all sizes and dtypes; else a part
DTYPES = {"float32": {}, "bfloat16": {"dtype": "bfloat16"}, "int8": {"quantization": "int8"}}
# whose kernels compile for minutes
RARE = {bits: {"quantization": bits} for bits in ("int6", "int5", "int4")}
RARE |= {f"{name}, K and V int8": DTYPES[name] | {"kv_cache_dtype": "int8"} for name in DTYPES}
WAYS = {
    "rows": (1, 2, 64, 300), "cache": ("cold", "warm"), "budget": (1, 7, 64, 1024),
    "preempted": (False, True), "lookup": (0, 6), "samples": (1, 3), "threads": (1, 2, 3),
}  # fmt: skip
TINY = Fixture(*era_fixtures()["era5"])
PLACES = {
    "tiny": {"model_path": TINY.directory, "tokenizer_path": TINY.tokenizer, "block_size": 4},
    "bundled": {"model_path": MODEL},
}


def jobs(rows: int, vocabulary: int) -> list[tuple[list[int], SamplingParams]]:
    """Requests: most share a prefix, and some repeat themselves."""
    random = np.random.default_rng(5)
    common, found = random.integers(vocabulary, size=24).tolist(), []
    for i in range(rows):
        own = random.integers(vocabulary, size=1 + i % 9).tolist()
        prompt = [own[:2] * 6, common[: 8 + i % 16] + own, own][i % 3]
        temperature = (0, 0.8)[i // 3 % 2]
        params = SamplingParams(temperature=temperature, seed=i, max_tokens=6, ignore_eos=True)
        if i % 3 == 0:  # words that come again, which lookup finds
            params = replace(params, allowed_token_ids=own[:2])
        found.append((prompt, params))
    return found


class Matrix:
    """Engines of one model and dtype, their common record, and what each request gets alone."""

    def __init__(self, place: str, dtype: str, rows: int):
        self.options = {"device": "cpu", "num_blocks": 4000, "max_batch_size": 300}
        self.options |= PLACES[place] | (DTYPES | RARE)[dtype]
        self.record = Record()
        self.engines: dict[tuple[int, int], LLM] = {}
        self.num_preemptions = 0
        self.num_cached = 0
        self.num_accepted = 0  # draft tokens
        torch.set_num_threads(1)
        llm = self.engine(1024, 0)
        self.jobs = jobs(rows, llm.model.config.vocab_size)
        self.alone = []
        for prompt, params in self.jobs:
            ways = [replace(params, sample_index=i) for i in range(3)]
            found = []
            for way in ways[: 3 if len(self.alone) < 64 else 1]:
                llm.reset_prefix_cache()
                found += (llm.generate([prompt], way, False)[0]["token_ids"],)
            self.alone.append(found)
        self.known = len(self.record.bits)

    def engine(self, budget: int, lookup: int, deterministic: bool = True) -> LLM:
        key = budget, lookup
        if key not in self.engines:
            options = {"max_batched_tokens": budget, "prompt_lookup": lookup} | self.options
            llm = LLM(**options, deterministic=deterministic)
            self.engines[key] = self.record.watch(llm)
        return self.engines[key]

    def check(self, rows, cache, budget, preempted, lookup, samples, threads) -> None:
        torch.set_num_threads(threads)
        llm, part = self.engine(budget, lookup), self.jobs[:rows]
        if cache == "cold":
            llm.reset_prefix_cache()
        else:
            llm.generate([p for p, _ in part], [replace(q, max_tokens=1) for _, q in part], False)
        sent = [llm.add_request(p, replace(q, n=samples)) for p, q in part]
        outputs, due = {}, {1, 2, 4, 7} if preempted else set()
        before, steps = llm.stats(), 0
        while not llm.is_finished():
            steps += 1
            if steps in due and llm.scheduler.running:
                llm.scheduler.preempt(llm.scheduler.running[-1])
            outputs |= {output["request_id"]: output for output in llm.step()}
        for number, want in zip(sent, self.alone, strict=False):
            got = [sample["token_ids"] for sample in outputs[number]["samples"]]
            assert got[: len(want)] == want[:samples]
        after = llm.stats()
        self.num_preemptions += after["preemptions"] - before["preemptions"]
        self.num_cached += after["cached_tokens"] - before["cached_tokens"]
        self.num_accepted += llm.scheduler.num_accepted_tokens

    def close(self) -> None:
        for llm in self.engines.values():
            llm.close()
        torch.set_num_threads(1)
        # the conditions were met, and no text but those with wrong draft tokens was new
        assert self.num_preemptions and self.num_cached and self.num_accepted
        assert self.record.num_seen > self.known


def product(ways: dict[str, tuple]) -> list[dict]:
    return [dict(zip(ways, values, strict=True)) for values in itertools.product(*ways.values())]


def covering(ways: dict[str, tuple], most: int = 1000) -> list[dict]:
    """Few cells of the matrix, in which every two values of two conditions meet, where they can in
    a cell of about 20 * `most` steps."""
    cells = [c for c in product(ways) if c["rows"] * c["samples"] <= most * c["budget"]]
    pairs = [{(a, c[a], b, c[b]) for a, b in itertools.combinations(ways, 2)} for c in cells]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(cells)), key=lambda i: len(pairs[i] & missing))
        chosen.append(cells[best])
        missing -= pairs[best]
    return chosen


def go(place: str, dtype: str, cells: list[dict]) -> None:
    matrix = Matrix(place, dtype, max(cell["rows"] for cell in cells))
    for cell in cells:
        try:
            matrix.check(**cell)
        except AssertionError as error:
            raise AssertionError(f"{place}, {dtype}, {cell}: {error}") from error
    matrix.close()


SMALL = WAYS | {"rows": (1, 2, 9)}


@pytest.mark.parametrize("dtype", [
    pytest.param(dtype, marks=() if dtype == "float32" else pytest.mark.slow)
    for dtype in (*DTYPES, *(RARE if ALL else ()))
])  # fmt: skip
def test_every_two_conditions_together(dtype):
    if dtype in DTYPES:
        go("tiny", dtype, covering(SMALL))
    go("bundled", dtype, covering(SMALL | {"budget": (7, 64), "threads": (1, 3)}))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_matrix_of_few_rows(dtype):
    rows = (1, 2) if ALL or dtype == "float32" else (2,)
    go("tiny", dtype, product(SMALL | {"rows": rows}))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES if ALL else ["float32"])
def test_many_rows(dtype):
    """Every two conditions, with up to 300 sequences at once."""
    go("tiny", dtype, covering(WAYS | {"rows": (64, 300)}, 300))
    # three threads would wait for each other on two cores
    rows = (64, 300) if ALL else (64,)
    go("bundled", dtype, covering(WAYS | {"rows": rows, "threads": (1, 2)}, 10))


def test_the_record_sees_a_bit():
    """A matrix that could not fail would say nothing: one bit of one row of one step is found."""
    matrix = Matrix("tiny", "float32", 2)
    llm = matrix.engine(1024, 0)
    logits = llm.model.logits

    def wrong(h):
        found = logits(h)
        if len(found) > 1:
            found.view(torch.int32)[1, 5] ^= 1
        return found

    llm.model.logits = wrong
    with pytest.raises(AssertionError, match="other logits"):
        matrix.check(2, "cold", 1024, False, 0, 1, 1)


def test_the_table_names_what_is_tested():
    text = (ROOT / "docs" / "DETERMINISM.md").read_text()
    ways = "1, 2, 64 or 300", "1, 7, 64, 1,024", "1, 2 or 3", "prompt_lookup", "kv_cache_dtype"
    for name in (*ways, *DTYPES, "int6", "int5", "int4"):
        assert name in text, name
