"""A Ctrl-C while an engine works."""

import os
import signal
import threading

import pytest
from conftest import MODEL
from test_llm import GREEDY, everything_is_free

from microvllm import LLM, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llm():
    with LLM(MODEL, num_blocks=400) as llm:
        yield llm


def test_ctrl_c_in_generate_leaves_the_engine_clean_and_usable(llm):
    before = llm.generate(["Hello"], GREEDY)[0]["token_ids"]
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["Once upon a time"] * 8, SamplingParams(max_tokens=900, ignore_eos=True))
    timer.join()
    assert everything_is_free(llm)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert llm.generate(["Hello"], GREEDY)[0]["token_ids"] == before
