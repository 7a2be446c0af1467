"""Checks of arguments before anything is done: an error names the argument and its value. full.py
calls these functions; params.py calls `suggest_names`."""

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
# constants of a model's Recipe that its tensors do not reveal
CONSTANTS = (
    "eps",
    "gate_scale",
    "qk_scale",
    "rope_base",
    "round_rotary",
    "short_window",
    "softcap",
)
POLICIES = {  # name: the default, and the list that a policy chooses from
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
    """Return the keywords of a class of sampling parameters."""
    return tuple(parameter.name for parameter in fields(params_class) if parameter.init)


def check_names(
    names: Iterable[str],
    known_names: Collection[str],
    params_class: type[SamplingParams] | None = None,
) -> None:
    """Raise TypeError for an unknown keyword, with the nearest known name and all known names.
    params_class: sampling parameters, whose keywords the call itself does not accept."""
    of_params = () if params_class is None else parameter_names(params_class)
    for name in sorted(set(names) - set(known_names)):
        hint = ""
        for close_name in get_close_matches(name, [*known_names, *of_params], 1):
            suggestion = (
                close_name if close_name in known_names else f"SamplingParams({close_name}=...)"
            )
            hint = f" (did you mean {suggestion}?)"
        raise TypeError(
            f"unknown argument {name!r}{hint}: there are {', '.join(sorted(known_names))}"
        )


def suggest_names(params_class: type[Params]) -> type[Params]:
    """Make a dataclass check its keywords with `check_names`."""
    init = params_class.__init__
    known_names = set(parameter_names(params_class))

    @wraps(init)  # keeps the signature
    def checked_init(self, *args, **keywords):
        if not keywords.keys() <= known_names:
            check_names(keywords, known_names)
        init(self, *args, **keywords)

    params_class.__init__ = checked_init
    return params_class


# arguments of LLM ---------------------------------------------------------------------------------


def check_arguments(
    arguments: Mapping[str, object], params_class: type[SamplingParams]
) -> dict[str, Callable]:
    """Raise TypeError or ValueError for an invalid argument of LLM. arguments: all of them by name,
    unknown ones in "overrides". Returns the policies. Each one that is not the default checks its
    results."""
    known_names = (arguments.keys() | set(CONSTANTS)) - {"overrides"}
    check_names(arguments["overrides"], known_names, params_class)
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
    """Raise TypeError unless there is either a path, or a live module with its tokenizer."""
    refuse_path("model", arguments["model"], MODULE)
    refuse_path("tokenizer", arguments["tokenizer"], "a tokenizer object")
    path = arguments["model_path"]
    if isinstance(path, torch.nn.Module):
        raise TypeError(
            f"model_path is a live module ({type(path).__name__}), not a path: write "
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
    """Raise TypeError for a path in place of an object."""
    if isinstance(value, (str, os.PathLike)):
        path = str(value)
        raise TypeError(
            f"{name}={path!r:.80} is a path, but {name} takes {expected}: for a path, "
            f"write {name}_path={path!r:.80}"
        )


def checked_policy(name: str, policy: Callable) -> Callable:
    """Return a policy that raises ValueError for an invalid choice. The default is not wrapped."""
    default, choices = POLICIES[name]
    attribute = choices.partition(".")[2]

    def checked(owner, *args):
        choice = policy(owner, *args)
        if choice not in getattr(owner, attribute):
            raise ValueError(f"{name} returned {choice!r:.80}: it must return one of {choices}")
        return choice

    return policy if policy is default else checked


def allowed_cpus() -> int:
    """Return the number of CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux, within the limits of taskset or a cpuset
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_threads(name: str, count: object) -> None:
    """Raise TypeError or ValueError for a number of threads that is not an integer from 1 to the
    number of CPUs. Threads that share a CPU wait for each other after each operation."""
    check_number(name, count)
    num_cpus = allowed_cpus()
    if not 1 <= count <= num_cpus:
        raise ValueError(
            f"{name} must be between 1 and {num_cpus}, the CPUs that this process may use, got "
            f"{count}; the default is {torch.get_num_threads()}, torch's number"
        )


def check_device(name: str | torch.device) -> None:
    """Raise ValueError for a device that torch does not know or that is not available."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    is_here = {"cpu": True, "cuda": num_gpus > 0, "mps": torch.backends.mps.is_available()}
    try:
        device = torch.device("cpu" if name == "auto" else name)
    except (RuntimeError, TypeError):
        names = "'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'"
        raise ValueError(f"device must be {names}, got {name!r}") from None
    if not is_here.get(device.type, False):
        problem = cuda_problem() if device.type == "cuda" else None
        hint = problem or "device='auto' takes an available one"
        raise ValueError(f"device {name!r} is not available here; {hint}")
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise ValueError(f"device {name!r}: there are {num_gpus} GPUs")


# requests -----------------------------------------------------------------------------------------


def check_prompts(prompts: object, sampling_params: object) -> object:
    """Return prompts as a list of prompts. A list of token ids is one prompt, and so is a
    one-dimensional array or tensor. A two-dimensional one has a prompt in each row. Raises
    TypeError for other types."""
    prompts = as_list(prompts)
    if isinstance(prompts, (list, tuple)) and prompts:
        is_one_prompt = all(isinstance(prompt, Integral) for prompt in prompts)
        prompts = [prompts] if is_one_prompt else prompts
    if not isinstance(prompts, (str, list, tuple)):
        description = MESSAGES if is_message(prompts) else type(prompts).__name__
        raise TypeError(f"prompts must be a string or a list, got {description}")
    if not isinstance(sampling_params, (SamplingParams, list, tuple, type(None))):
        description = f"{sampling_params!r:.80}"
        raise TypeError(f"sampling_params must be SamplingParams or a list, got {description}")
    return prompts


def check_request(
    engine: "LLM", prompt: object, params: "full_params.SamplingParams | None"
) -> tuple[list[int], "full_params.SamplingParams"]:
    """Return the token ids and the parameters of a request. Raises TypeError or ValueError if it
    cannot be served, with the number of excess tokens and a remedy."""
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
    """Raise ValueError for a prompt that leaves no space for a new token in max_model_len."""
    limit = engine.max_model_len
    if num_prompt < limit:
        return
    largest = 10 * engine.model.config.sequence_len
    remedy = f" (it may be raised to {largest})" if num_prompt < largest else ""
    raise ValueError(
        f"the prompt has {num_prompt} tokens, but max_model_len is {limit}: "
        f"{num_prompt + 1 - limit} too many{remedy}"
    )


def check_blocks(engine: "LLM", num_prompt: int, max_tokens: int) -> None:
    """Raise ValueError if a prompt and max_tokens need more blocks than the pool has."""
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
        f"{-(-num_needed // num_groups)} blocks, but the pool has "
        f"{blocks.pool.num_usable // num_groups}: {excess} tokens too many; "
        f"raise num_blocks or lower max_tokens{or_less}"
    )


def as_list(values: object) -> object:
    """Convert an array or a tensor to a list. Other values are returned unchanged."""
    return values.tolist() if isinstance(values, (np.ndarray, torch.Tensor)) else values


def is_message(value: object) -> bool:
    """Return whether a value is a message of a conversation."""
    return isinstance(value, dict) and ("role" in value or "content" in value)


def check_prompt(prompt: object, vocab_size: int) -> None:
    """Raise TypeError or ValueError for a prompt that is neither a text nor a list of token ids, is
    empty, or has an invalid id."""
    if isinstance(prompt, str):
        return
    if not isinstance(prompt, (list, tuple)):
        description = MESSAGES if is_message(prompt) else type(prompt).__name__
        raise TypeError(f"a prompt is a string or a list of token ids, got {description}")
    if not prompt:
        raise ValueError("a prompt of token ids needs at least one (the text '' is BOS alone)")
    has_ints = set(map(type, prompt)) == {int}  # checking them one by one is slow
    if not has_ints or min(prompt) < 0 or max(prompt) >= vocab_size:
        for token_id in prompt:
            check_token(token_id, vocab_size)


def check_token(token_id: object, vocab_size: int) -> None:
    """Raise TypeError or ValueError for a value that is not a token id."""
    if isinstance(token_id, bool) or not isinstance(token_id, Integral):
        description = MESSAGES if is_message(token_id) else f"{token_id!r:.80}"
        raise TypeError(f"a prompt of token ids must hold integers, got {description}")
    if not 0 <= token_id < vocab_size:
        raise ValueError(f"token id {token_id} is outside the vocabulary of {vocab_size}")
