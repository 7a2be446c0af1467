"""Engines on live modules, and new weights for an engine that runs."""

import pytest
import torch
from conftest import MODEL
from test_llm import GREEDY, question

from microvllm import LLM, SamplingParams
from microvllm.checkpoint import load_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llm():
    with LLM(MODEL, num_blocks=400) as llm:
        yield llm


def test_a_live_module_is_wrapped_without_copying_its_weights(llm):
    module = load_model(MODEL).requires_grad_()
    with LLM(model=module, tokenizer=llm.tokenizer, num_blocks=100) as live:
        used = {name: w.data_ptr() for name, w in live.model.tensors.items()}
        for names, linear in live.model.linears.items():
            for name, part in zip(names, linear.weight, strict=True):
                used[f"{name}.weight"] = part.data_ptr()
        assert used == {name: w.data_ptr() for name, w in module.state_dict().items()}
        prompt = question(llm, "Who wrote Dracula?")
        assert live.generate([prompt], GREEDY) == [
            {**llm.generate([prompt], GREEDY)[0], "request_id": 0, "num_cached_tokens": 0}
        ]
    with pytest.raises(TypeError, match="GPT"):
        LLM(model=torch.nn.Linear(2, 2), tokenizer=llm.tokenizer)
    with pytest.raises(TypeError, match="either"):
        LLM(MODEL, model=module)


def test_new_weights_leave_no_stale_keys_and_values():
    prompt = list(range(5, 60))
    with LLM(MODEL, num_blocks=100) as llm:
        old = load_model(MODEL).state_dict()
        new = {name: w * 1.1 if "attn" in name else w for name, w in old.items()}
        first = llm.generate([prompt], GREEDY)[0]
        assert llm.generate([prompt], GREEDY)[0]["num_cached_tokens"] > 0
        llm.update_weights(new)
        second = llm.generate([prompt], GREEDY)[0]
        assert second["num_cached_tokens"] == 0
        with pytest.raises(ValueError, match="missing"):
            llm.update_weights({n: w for n, w in new.items() if n != "lm_head.weight"})
        # in the middle of a request: what it has is recomputed with the new weights
        request = llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=40))
        for _ in range(10):
            llm.step()
        llm.update_weights(old)
        assert llm.generate([prompt], GREEDY)[0]["token_ids"] == first["token_ids"]
        assert request is not None
    with LLM(MODEL, num_blocks=100) as fresh:
        fresh.update_weights(new)
        assert fresh.generate([prompt], GREEDY)[0]["token_ids"] == second["token_ids"]
