"""What holds for any engine, for the full one: with compiled kernels, and with the core's model."""

from functools import partial

import pytest
from helpers.engine_cases import BundledCases, EngineCases, FailureCases, RequestCases, TextCases
from helpers.engines import MIXED, serve
from helpers.full_engines import build
from helpers.goldens import MODEL
from helpers.naive import assert_naive

from microvllm import LLM

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llm():
    with LLM(MODEL, num_blocks=400) as llm:
        yield llm


class TestFull(EngineCases, BundledCases, RequestCases, FailureCases):
    build = staticmethod(build)
    build_bundled = staticmethod(partial(LLM, MODEL, device="cpu"))


class TestTexts(TextCases):
    """See helpers/engine_cases.py."""


@pytest.mark.parametrize("options", [{"attention": "sdpa"}, {"plain": True}], ids=str)
def test_the_plainer_models(options):
    with build(**options) as llm:
        assert_naive(serve(llm, MIXED), MIXED)
