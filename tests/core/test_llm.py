"""What a user does with the core engine beyond plain completions, with the bundled model."""

import pytest
from helpers.engine_cases import TextCases
from helpers.goldens import MODEL

from microvllm import engine

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llm():
    with engine.LLM(MODEL, num_blocks=400) as llm:
        yield llm


class TestCore(TextCases):
    """See helpers/engine_cases.py."""
