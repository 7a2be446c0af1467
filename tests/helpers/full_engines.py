"""Full engines on small models, requests for them, and what holds for any engine."""

import json

from microvllm import LLM, SamplingParams
from microvllm.loops.ahead import AheadLoop, AheadRunner

from . import engines
from .engines import check as check
from .engines import ids as ids
from .goldens import ERAS, FIXTURES

TOOL_CHAIN = ERAS / "tool_chain"
TOOL_GOLDENS = json.loads((TOOL_CHAIN / "goldens.json").read_text())


def set_overlap(llm: LLM, overlap: bool = True) -> LLM:
    """Give an engine the loop of a GPU, one step ahead of what the host has read; nothing in it
    needs a GPU."""
    if overlap:
        old = llm.runner
        llm.runner = AheadRunner(old.model, old.cache, old.blocks, old.hooks, old.sample)
        llm.loop.inner_loop = AheadLoop(llm.loop.engine)
    return llm


def build(name: str = "era5", overlap: bool = False, **options) -> LLM:
    """An engine over the fixture of an era. overlap: see `set_overlap`."""
    fixture = FIXTURES[name]
    options = {"num_blocks": 200, "device": "cpu"} | fixture.overrides | options
    return set_overlap(LLM(fixture.directory, tokenizer_path=fixture.tokenizer, **options), overlap)


def chain(**options) -> LLM:
    """An engine over the fixture whose next token is a function of the present one: it calls the
    calculator, as TOOL_GOLDENS says."""
    model = TOOL_CHAIN / "chatsft_checkpoints" / "d1"
    return LLM(model, tokenizer_path=TOOL_CHAIN / "tokenizer", **options)


def greedy(max_tokens: int, **options) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **options)


def sampled(max_tokens: int, seed: int, **options) -> SamplingParams:
    options = {"temperature": 1.0, "ignore_eos": True} | options
    return SamplingParams(max_tokens=max_tokens, seed=seed, **options)


def everything_is_free(llm: LLM) -> bool:
    """Is no request left, and is every block free?"""
    pool = llm.scheduler.blocks.pool
    llm.scheduler.blocks.check(llm.scheduler.running)
    return pool.num_free == pool.num_usable and llm.is_finished()


def assert_idle(llm: LLM) -> None:
    """No request is left, and every block is free again."""
    engines.assert_idle(llm)
    stats = llm.stats()
    assert stats["free_blocks"] == stats["num_blocks"] and stats["running"] == 0
