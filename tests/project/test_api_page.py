"""docs/API.md is what docs/make_api.py makes of the sources, and has every public name."""

import importlib.util
import inspect
import re

import pytest
from helpers.goldens import ROOT

import microvllm
from microvllm import LLM, SamplingParams, nanochat, rl, trace

SPEC = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
make_api = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_api)
PAGE = (ROOT / "docs" / "API.md").read_text(encoding="utf-8")


def test_the_page_is_that_of_the_sources():
    assert make_api.make_page() == PAGE, "run `python docs/make_api.py`"


def test_every_public_name_has_a_heading():
    headings = set(re.findall(r"^### `(\w+)`$", PAGE, re.M))
    for module in microvllm, nanochat, rl, trace:
        assert set(module.__all__) <= headings
    assert {"Extension", "LogitsProcessor", "HarnessLM", "LLMPredictor", "Job"} <= headings


@pytest.mark.parametrize("name", [name for name in dir(LLM) if not name.startswith("_")])
def test_every_method_of_the_engine_is_shown_or_internal(name):
    member = inspect.getattr_static(LLM, name)
    is_method = callable(member) or isinstance(member, (property, classmethod))
    if is_method and not isinstance(member, type):
        assert (f"#### `LLM.{name}`" in PAGE) != make_api.is_internal(name)


def test_signatures_are_those_of_python():
    """Names, order and defaults, which the page reads from the text of the sources."""
    for function in LLM, LLM.generate, LLM.score, nanochat.evaluate_chat, rl.mismatch:
        name = "LLM." * ("LLM." in function.__qualname__) + function.__name__
        (shown,) = re.findall(
            rf"^```python\n{re.escape(name)}\((.*?)\)(?: ->.*)?\n```", PAGE, re.M | re.S
        )
        parts = [part.strip() for part in make_api.split_arguments(shown)]
        named = [re.match(r"\**(\w+)", part)[1] for part in parts if part not in ("*", "/")]
        parameters = inspect.signature(function).parameters
        assert named == [name for name in parameters if name != "self"]
    for name in inspect.signature(SamplingParams).parameters:
        assert re.search(rf"^    {name}: ", PAGE, re.M)
