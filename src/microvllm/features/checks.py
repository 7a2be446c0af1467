"""Checks of what an engine is given, before anything is done: an error names the mistake and its
value. full.py calls these functions, params.py `suggest_names`."""

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from functools import cache, wraps
from numbers import Integral
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from ..blocks import least_recently_used
from ..devices import cuda_problem
from ..sampler import RANGES, SamplingParams
from ..scheduler import first_come, youngest
from . import check_number

if TYPE_CHECKING:
    from .. import params as full_params
    from ..engine import LLM

Params = TypeVar("Params")

LEAST = {
    "block_size": 1,
    "seed": 0,
    "prompt_lookup": 0,
    "answer_lookup": 0,
    "num_blocks": 2,
    "max_model_len": 2,
    "max_batch_size": 1,
    "max_batched_tokens": 1,
    "tensor_parallel": 1,
    "step": 0,
}
OPTIONAL = ("num_blocks", "max_model_len", "max_batch_size", "max_batched_tokens", "step")
FLAGS = (
    "enable_prefix_caching",
    "copy",
    "cuda_graphs",
    "deterministic",
    "plain",
    "trust_tokenizer",
)
# of a model's Recipe: what its tensors do not tell
CONSTANTS = (
    "eps",
    "gate_scale",
    "qk_scale",
    "rope_base",
    "round_rotary",
    "short_window",
    "softcap",
)
POLICIES = {  # the default, and what another one chooses from
    "victim": (youngest, "scheduler.running"),
    "admission": (first_come, "scheduler.waiting"),
    "eviction": (least_recently_used, "pool.cached"),
}
MODULE = "a live nanochat GPT module"
MESSAGES = (
    "a message of a conversation, which is a dict: call llm.chat(messages), or give the token ids "
    "llm.tokenizer.render_for_completion(messages)"
)


# names --------------------------------------------------------------------------------------------


@cache
def parameter_names(params_class: type[SamplingParams]) -> tuple[str, ...]:
    """The keywords of a class of sampling parameters."""
    return tuple(parameter.name for parameter in fields(params_class) if parameter.init)


def check_names(
    names: Iterable[str],
    known: Collection[str],
    params_class: type[SamplingParams] | None = None,
) -> None:
    """Raises TypeError for a keyword that is not known, with the nearest and all that are.
    params_class: sampling parameters, whose keywords the call does not take itself."""
    of_params = () if params_class is None else parameter_names(params_class)
    for name in sorted(set(names) - set(known)):
        hint = ""
        for near in get_close_matches(name, [*known, *of_params], 1):
            meant = near if near in known else f"SamplingParams({near}=...)"
            hint = f" (did you mean {meant}?)"
        raise TypeError(f"unknown argument {name!r}{hint}: there are {', '.join(sorted(known))}")


def suggest_names(params_class: type[Params]) -> type[Params]:
    """Have a dataclass check its keywords with `check_names`."""
    init = params_class.__init__
    known = set(parameter_names(params_class))

    @wraps(init)  # it keeps its signature
    def checked_init(self, *args, **keywords):
        if not keywords.keys() <= known:
            check_names(keywords, known)
        init(self, *args, **keywords)

    params_class.__init__ = checked_init
    return params_class


# arguments of LLM ---------------------------------------------------------------------------------


def check_arguments(
    arguments: Mapping[str, object], params_class: type[SamplingParams]
) -> dict[str, Callable]:
    """Raises TypeError or ValueError for an argument of LLM that makes no sense. arguments: all of
    them by name, with the others in "overrides". Returns the policies, each but the defaults with a
    check of what it returns."""
    known = (arguments.keys() | set(CONSTANTS)) - {"overrides"}
    check_names(arguments["overrides"], known, params_class)
    for name, least in LEAST.items():
        if arguments[name] is not None or name not in OPTIONAL:
            check_number(name, arguments[name], least)
    for name in FLAGS:
        if not isinstance(arguments[name], bool):
            raise TypeError(f"{name} must be True or False, got {arguments[name]!r:.80}")
    for name in POLICIES:
        if not callable(arguments[name]):
            raise TypeError(f"{name} must be a function, got {arguments[name]!r:.80}")
    if arguments["num_threads"] is not None:
        check_threads("num_threads", arguments["num_threads"])
    utilization = arguments["gpu_memory_utilization"]
    if utilization is not None:
        check_number("gpu_memory_utilization", utilization, 0.01, 1.0)
    check_model(arguments)
    check_device(arguments["device"])
    return {name: checked_policy(name, arguments[name]) for name in POLICIES}


def check_model(arguments: Mapping[str, object]) -> None:
    """Raises TypeError unless there is either a path or a live module with its tokenizer."""
    refuse_path("model", arguments["model"], MODULE)
    refuse_path("tokenizer", arguments["tokenizer"], "a tokenizer object")
    path = arguments["model_path"]
    if isinstance(path, torch.nn.Module):
        raise TypeError(
            f"model_path is a live module ({type(path).__name__}), and not a path: write "
            "LLM(model=..., tokenizer=...)"
        )
    has_module = arguments["model"] is not None
    has_tokenizer = arguments["tokenizer"] is not None or arguments["tokenizer_path"] is not None
    if has_module == (path is not None):
        raise TypeError(f"give either model_path or model ({MODULE})")
    if arguments["copy"] and not has_module:
        raise TypeError("copy=True is for a live module: give model, or leave it out")
    if has_module and not has_tokenizer:
        raise TypeError("a live model needs its tokenizer: give tokenizer or tokenizer_path")


def refuse_path(name: str, value: object, expected: str) -> None:
    """Raises TypeError for a path in place of an object."""
    if isinstance(value, (str, os.PathLike)):
        path = str(value)
        raise TypeError(
            f"{name}={path!r:.80} is a path, and {name} takes {expected}: for a path, "
            f"write {name}_path={path!r:.80}"
        )


def checked_policy(name: str, policy: Callable) -> Callable:
    """A policy that raises ValueError if it returns what is no choice; the default as it is."""
    default, choices = POLICIES[name]
    attribute = choices.partition(".")[2]

    def checked(owner, *args):
        choice = policy(owner, *args)
        if choice not in getattr(owner, attribute):
            raise ValueError(f"{name} gave {choice!r:.80}: return one of {choices}")
        return choice

    return policy if policy is default else checked


def allowed_cpus() -> int:
    """The number of CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux: what taskset or a container's cpuset leaves
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_threads(name: str, count: object) -> None:
    """Raises TypeError or ValueError for a number of threads that is no integer, below 1, or above
    the number of CPUs: threads that share a CPU wait for each other after each operation."""
    check_number(name, count)
    num_cpus = allowed_cpus()
    if not 1 <= count <= num_cpus:
        raise ValueError(
            f"{name} must be between 1 and {num_cpus}, the CPUs that this process may use, got "
            f"{count}; without it there are {torch.get_num_threads()}, torch's number"
        )


def check_device(name: str | torch.device) -> None:
    """Raises ValueError for a device that torch does not know, or that is not here."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    is_here = {"cpu": True, "cuda": num_gpus > 0, "mps": torch.backends.mps.is_available()}
    try:
        device = torch.device("cpu" if name == "auto" else name)
    except (RuntimeError, TypeError):
        names = "'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'"
        raise ValueError(f"device must be {names}, got {name!r}") from None
    if not is_here.get(device.type, False):
        problem = cuda_problem() if device.type == "cuda" else None
        hint = problem or "device='auto' takes what there is"
        raise ValueError(f"device {name!r} is not available here; {hint}")
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise ValueError(f"device {name!r}: there are {num_gpus} GPUs")


# requests -----------------------------------------------------------------------------------------


def check_prompts(prompts: object, sampling_params: object) -> object:
    """Prompts as a list of prompts: a list of token ids is one prompt, and so is an array or a
    tensor of one dimension. One of two dimensions has a prompt in each row. Raises TypeError for
    what is no list."""
    prompts = as_list(prompts)
    if isinstance(prompts, (list, tuple)) and prompts:
        is_one_prompt = all(isinstance(prompt, Integral) for prompt in prompts)
        prompts = [prompts] if is_one_prompt else prompts
    if not isinstance(prompts, (str, list, tuple)):
        got = MESSAGES if is_message(prompts) else type(prompts).__name__
        raise TypeError(f"prompts must be a string or a list, got {got}")
    if not isinstance(sampling_params, (SamplingParams, list, tuple, type(None))):
        got = f"{sampling_params!r:.80}"
        raise TypeError(f"sampling_params must be SamplingParams or a list, got {got}")
    return prompts


def check_request(
    engine: "LLM", prompt: object, params: "full_params.SamplingParams | None"
) -> tuple[list[int], "full_params.SamplingParams"]:
    """The token ids and the parameters of a request. Raises TypeError or ValueError if it can not
    be served, with the number of tokens that are too many and a remedy."""
    engine.guard.check_open()
    params = engine.params_class() if params is None else params
    if not isinstance(params, SamplingParams):
        raise TypeError(f"sampling_params must be SamplingParams, got {type(params).__name__}")
    prompt = as_list(prompt)
    check_prompt(prompt, engine.tokenizer.vocab_size)
    prompt_ids = engine.tokenizer.prompt_ids(prompt)
    params.check_vocabulary(engine.tokenizer.vocab_size)
    if params.n > engine.max_batch_size:
        limit = f"max_batch_size={engine.max_batch_size}"
        raise ValueError(f"n={params.n} samples do not fit {limit}")
    check_length(engine, len(prompt_ids))
    check_blocks(engine, len(prompt_ids), params.max_tokens)
    return prompt_ids, params


def check_length(engine: "LLM", num_prompt: int) -> None:
    """Raises ValueError for a prompt that leaves no room for a token in max_model_len."""
    limit = engine.max_model_len
    if num_prompt < limit:
        return
    largest = 10 * engine.model.config.sequence_len
    remedy = f" (it may be raised to {largest})" if num_prompt < largest else ""
    raise ValueError(
        f"the prompt has {num_prompt} tokens and max_model_len is {limit}: "
        f"{num_prompt + 1 - limit} too many{remedy}"
    )


def check_blocks(engine: "LLM", num_prompt: int, max_tokens: int) -> None:
    """Raises ValueError if a prompt and max_tokens need more blocks than the pool has."""
    blocks = engine.scheduler.blocks
    # the last token is never computed, so it needs no slot
    num_slots = min(num_prompt + max_tokens, engine.max_model_len) - 1
    num_needed = blocks.max_blocks(num_slots, engine.max_batched_tokens)
    if num_needed <= blocks.pool.num_usable:
        return
    num_groups = blocks.blocks_for(1)
    excess = num_slots - blocks.longest(num_slots, engine.max_batched_tokens)
    has_limit = max_tokens < RANGES["max_tokens"][1]
    or_less = "" if num_groups == 1 else ", or max_batched_tokens"
    raise ValueError(
        f"{num_prompt} prompt tokens with max_tokens={max_tokens if has_limit else None} need "
        f"{-(-num_needed // num_groups)} blocks and the pool has "
        f"{blocks.pool.num_usable // num_groups}: {excess} tokens too many; "
        f"raise num_blocks or lower max_tokens{or_less}"
    )


def as_list(values: object) -> object:
    """An array or a tensor as a list, anything else as it is."""
    return values.tolist() if isinstance(values, (np.ndarray, torch.Tensor)) else values


def is_message(value: object) -> bool:
    """Is it a turn of a conversation?"""
    return isinstance(value, dict) and ("role" in value or "content" in value)


def check_prompt(prompt: object, vocab_size: int) -> None:
    """Raises TypeError or ValueError for what is neither a text nor a list of token ids, is empty,
    or has an id that does not exist."""
    if isinstance(prompt, str):
        return
    if not isinstance(prompt, (list, tuple)):
        got = MESSAGES if is_message(prompt) else type(prompt).__name__
        raise TypeError(f"a prompt is a string or a list of token ids, got {got}")
    if not prompt:
        raise ValueError("a prompt of token ids needs at least one (the text '' is BOS alone)")
    has_ints = set(map(type, prompt)) == {int}  # to look at them one by one takes long
    if not has_ints or min(prompt) < 0 or max(prompt) >= vocab_size:
        for token_id in prompt:
            check_token(token_id, vocab_size)


def check_token(token_id: object, vocab_size: int) -> None:
    """Raises TypeError or ValueError for what is no token id."""
    if isinstance(token_id, bool) or not isinstance(token_id, Integral):
        got = MESSAGES if is_message(token_id) else f"{token_id!r:.80}"
        raise TypeError(f"a prompt of token ids must hold integers, got {got}")
    if not 0 <= token_id < vocab_size:
        raise ValueError(f"token id {token_id} is outside the vocabulary of {vocab_size}")
