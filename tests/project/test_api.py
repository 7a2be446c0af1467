"""What a user sees of the API: signatures, docstrings, help."""

import inspect
import pydoc
import re

import pytest

import microvllm
from microvllm import LLM, RequestOutput, SamplingParams, engine

ARGUMENTS = (
    "model_path step tokenizer_path device num_blocks block_size max_batch_size dtype "
    "max_batched_tokens max_model_len enable_prefix_caching attention seed model tokenizer copy "
    "gpu_memory_utilization cuda_graphs quantization kv_cache_dtype deterministic prompt_lookup "
    "answer_lookup draft tensor_parallel trace victim admission eviction plain num_threads "
    "trust_tokenizer overrides"
).split()
METHODS = (
    "generate stream chat score judge embed stats reset_stats timing add_request step abort "
    "is_finished reset_prefix_cache tracing update_weights sleep wake agenerate astream achat "
    "serve_async warm branching partial_outputs generate_batch generate_columns "
    "agenerate_columns from_nanochat close"
).split()
PARAMETERS = (
    "temperature max_tokens seed n top_k top_p min_p ignore_eos stop_token_ids sample_index stop "
    "repetition_penalty presence_penalty frequency_penalty min_tokens logprobs logit_bias "
    "allowed_token_ids bad_words logits_processor guide"
).split()


def test_the_constructor_shows_all_arguments():
    parameters = inspect.signature(LLM).parameters
    assert list(parameters) == ARGUMENTS
    assert all(p.annotation is not inspect.Parameter.empty for p in parameters.values())
    for name in ARGUMENTS:
        assert re.search(rf"\b{name}\b", LLM.__doc__), f"{name} is not in LLM's docstring"


@pytest.mark.parametrize("name", METHODS)
def test_methods_have_types_and_docstrings(name):
    method = getattr(LLM, name)
    signature = inspect.signature(method)
    assert inspect.getdoc(method)
    assert signature.return_annotation is not inspect.Signature.empty
    own = [p for p in signature.parameters.values() if p.name not in ("self", "request_ids")]
    assert all(p.annotation is not inspect.Parameter.empty for p in own), signature


def test_help_has_the_arguments_and_the_methods():
    text = pydoc.plain(pydoc.render_doc(LLM))
    for name in [*ARGUMENTS, *METHODS]:
        assert re.search(rf"\b{name}\b", text), name


def test_the_parameters_of_a_request_are_fields_of_one_class():
    parameters = inspect.signature(SamplingParams).parameters
    assert set(parameters) == set(PARAMETERS)
    text = pydoc.plain(pydoc.render_doc(SamplingParams))
    for name in PARAMETERS:
        assert name in text


def test_the_package_gives_the_full_engine():
    assert microvllm.LLM is LLM and issubclass(LLM, engine.LLM)
    assert issubclass(RequestOutput, engine.RequestOutput)
    assert microvllm.__version__
    with pytest.raises(AttributeError, match="has no attribute 'Engine'"):
        microvllm.Engine  # noqa: B018
