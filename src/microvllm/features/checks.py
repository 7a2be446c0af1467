"""What an engine is given, checked before anything is done: a mistake is named, with its value."""

import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cache
from numbers import Integral

import numpy as np
import torch

from ..engine import LLM, Request
from ..sampler import RANGES, SamplingParams
from ..scheduler import first_come, least_recently_used, youngest
from . import check_list, check_number, check_numbers

LEAST = {
    "block_size": 1, "seed": 0, "prompt_lookup": 0, "num_blocks": 2, "max_model_len": 2,
    "max_batch_size": 1, "max_batched_tokens": 1, "tensor_parallel": 1, "step": 0,
}  # fmt: skip
OPTIONAL = "num_blocks", "max_model_len", "max_batch_size", "max_batched_tokens", "step"
FLAGS = "enable_prefix_caching", "copy", "cuda_graphs", "deterministic", "plain", "trust_tokenizer"
# of a model's Recipe: what its tensors do not tell
CONSTANTS = "eps gate_scale qk_scale rope_base round_rotary short_window softcap".split()
# parameters of a request that None turns off, which is their default
OFF = (
    "stop stop_token_ids bad_words min_tokens top_p min_p "
    "repetition_penalty presence_penalty frequency_penalty"
).split()
NO_LIMIT = RANGES["max_tokens"][1]  # more tokens than any context has
MESSAGES = (
    "a message of a conversation, which is a dict: call llm.chat(messages), or give the token ids "
    "llm.tokenizer.render_for_completion(messages)"
)
POLICIES = {  # the default, and what another one must choose from
    "victim": (youngest, "scheduler.running"),
    "admission": (first_come, "scheduler.waiting"),
    "eviction": (least_recently_used, "blocks.cached"),
}


def check_arguments(given: dict) -> dict[str, Callable]:
    """Raises TypeError or ValueError for an argument of LLM that makes no sense; given: all, by
    name. Returns the policies, each but the defaults with a look at what it returns."""
    own = (given.keys() | CONSTANTS) - {"self", "overrides"}
    check_names(given["overrides"], own, words(given["self"].params_class))
    for name, least in LEAST.items():
        if given[name] is not None or name not in OPTIONAL:
            check_number(name, given[name], least)
    for name in FLAGS:
        if not isinstance(given[name], bool):
            raise TypeError(f"{name} must be True or False, got {given[name]!r:.80}")
    for name in POLICIES:
        if not callable(given[name]):
            raise TypeError(f"{name} must be a function, got {given[name]!r:.80}")
    if given["num_threads"] is not None:
        check_threads("num_threads", given["num_threads"])
    if given["gpu_memory_utilization"] is not None:
        check_number("gpu_memory_utilization", given["gpu_memory_utilization"], 0.01, 1.0)
    check_model(given)
    if (given["model_path"] is None) == (given["model"] is None):
        raise TypeError("give either model_path or model (a live nanochat GPT module)")
    if given["copy"] and given["model"] is None:
        raise TypeError("copy=True is for a live module: give model, or leave it out")
    if given["model"] is not None and given["tokenizer"] is None is given["tokenizer_path"]:
        raise TypeError("a live model needs its tokenizer: give tokenizer or tokenizer_path")
    check_device(given["device"])
    return {name: checked_policy(name, given[name]) for name in POLICIES}


def check_model(given: dict) -> None:
    """Raises TypeError for a path in place of a live module or of its tokenizer, and the other way
    round."""
    for name in ("model", "tokenizer"):
        if isinstance(value := given[name], (str, os.PathLike)):
            other = {"model": "a live nanochat GPT module", "tokenizer": "a tokenizer object"}[name]
            raise TypeError(
                f"{name}={str(value)!r:.80} is a path, and {name} takes {other}: for a path, "
                f"write {name}_path={str(value)!r:.80}"
            )
    if isinstance(module := given["model_path"], torch.nn.Module):
        raise TypeError(
            f"model_path is a live module ({type(module).__name__}), and not a path: write "
            "LLM(model=..., tokenizer=...)"
        )


@cache
def words(params_class: type[SamplingParams]) -> tuple[str, ...]:
    """The keywords with which it is made."""
    return tuple(f.name for f in fields(params_class) if f.init)


def check_names(given: Iterable[str], known: Collection[str], params: Collection[str] = ()) -> None:
    """Raises TypeError for a keyword that is not known, with the nearest and all that are. params:
    those of SamplingParams, for a call that does not take them itself."""
    for name in sorted({*given} - {*known}):
        hint = ""
        for near in get_close_matches(name, [*known, *params], 1):
            near = near if near in known else f"SamplingParams({near}=...)"
            hint = f" (did you mean {near}?)"
        raise TypeError(f"unknown argument {name!r}{hint}: there are {', '.join(sorted(known))}")


def as_list(ids: object) -> object:
    """An array or a tensor as a list, anything else as it is."""
    return ids.tolist() if isinstance(ids, (np.ndarray, torch.Tensor)) else ids


def checked_policy(name: str, policy: Callable) -> Callable:
    default, choice = POLICIES[name]
    attribute = choice.partition(".")[2]

    def checked(owner, *args):
        found = policy(owner, *args)
        if found not in getattr(owner, attribute):
            raise ValueError(f"{name} gave {found!r:.80}: return one of {choice}")
        return found

    return policy if policy is default else checked


def available_cpus() -> int:
    """How many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux: what taskset or a container's cpuset leaves
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_threads(name: str, count: object) -> None:
    """Raises TypeError or ValueError for a number of threads that is no integer, below 1, or above
    the number of CPUs: threads that share a CPU wait for each other after each operation."""
    check_number(name, count)
    cpus = available_cpus()
    if not 1 <= count <= cpus:
        raise ValueError(
            f"{name} must be between 1 and {cpus}, the CPUs that this process may use, got "
            f"{count}; without it there are {torch.get_num_threads()}, torch's number"
        )


def check_device(name: str | torch.device) -> None:
    """Raises ValueError for a device that torch does not know, or that is not here."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = {"cpu": True, "cuda": num_gpus, "mps": torch.backends.mps.is_available()}
    try:
        device = torch.device("cpu" if name == "auto" else name)
    except (RuntimeError, TypeError):
        names = "'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'"
        raise ValueError(f"device must be {names}, got {name!r}") from None
    if not here.get(device.type):
        hint = "device='auto' takes what there is"
        raise ValueError(f"device {name!r} is not available here; {hint}")
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise ValueError(f"device {name!r}: there are {num_gpus} GPUs")


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
    plain = prompt and set(map(type, prompt)) == {int} and 0 <= min(prompt) <= max(prompt)
    for token in () if plain and max(prompt) < vocab_size else prompt:  # one by one takes long
        if isinstance(token, bool) or not isinstance(token, Integral):
            got = MESSAGES if is_message(token) else f"{token!r:.80}"
            raise TypeError(f"a prompt of token ids must hold integers, got {got}")
        if not 0 <= token < vocab_size:
            raise ValueError(f"token id {token} is outside the vocabulary of {vocab_size}")
    if not len(prompt):
        raise ValueError("a prompt of token ids needs at least one (the text '' is BOS alone)")


@dataclass(frozen=True, kw_only=True)
class CheckedParams(SamplingParams):
    """Sampling parameters of the right kinds, numbers as Python has them. max_tokens=None is as
    many as the context has room for; None in place of a list, a filter or a penalty is none."""

    def __post_init__(self):
        for name in OFF:
            if getattr(self, name, ()) is None:
                self.put(name, getattr(type(self), name))
        if self.max_tokens is None:
            self.put("max_tokens", NO_LIMIT)
        check_numbers(self, RANGES)
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        self.put("stop_token_ids", check_list("stop_token_ids", self.stop_token_ids))
        super().__post_init__()

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError, naming the field, if a token id in it does not exist."""
        for name, ids in self.token_fields().items():
            if bad := [token for token in ids if token >= vocab_size]:
                raise ValueError(f"{name} {bad} are outside the vocabulary of {vocab_size}")


class CheckedLLM(LLM):
    """An engine that says what it was given in place of prompts and parameters."""

    def _check_options(self, options: dict) -> None:
        own = {"sampling_params", "use_tqdm", *self.request_options}
        check_names(options.keys() - {"streamed"}, own, words(self.params_class))
        super()._check_options(options)

    def _prepare(self, prompts, sampling_params, **options) -> list[Request]:
        """As in the core; a list of token ids is one prompt, and so is an array or a tensor of one
        dimension. One of two has a prompt in each row."""
        prompts = as_list(prompts)
        if isinstance(prompts, (list, tuple)) and prompts:
            prompts = [prompts] if all(isinstance(p, Integral) for p in prompts) else prompts
        if not isinstance(prompts, (str, list, tuple)):
            got = MESSAGES if is_message(prompts) else type(prompts).__name__
            raise TypeError(f"prompts must be a string or a list, got {got}")
        if not isinstance(sampling_params, (SamplingParams, list, tuple, type(None))):
            got = f"{sampling_params!r:.80}"
            raise TypeError(f"sampling_params must be SamplingParams or a list, got {got}")
        return super()._prepare(prompts, sampling_params, **options)

    def _check(self, prompt, params) -> tuple[list[int], SamplingParams]:
        """As in the core, saying by how much too many and what to do about it."""
        params = self.params_class() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams, got {type(params).__name__}")
        prompt = as_list(prompt)
        check_prompt(prompt, self.tokenizer.vocab_size)
        ids, limit = self.tokenizer.prompt_ids(prompt), self.max_model_len
        params.check_vocabulary(self.tokenizer.vocab_size)
        if params.n > self.max_batch_size:
            most = f"max_batch_size={self.max_batch_size}"
            raise ValueError(f"n={params.n} samples do not fit {most}")
        if len(ids) >= limit:
            most = 10 * self.model.config.sequence_len
            raised = f" (it may be raised to {most})" if len(ids) < most else ""
            raise ValueError(
                f"the prompt has {len(ids)} tokens and max_model_len is {limit}: "
                f"{len(ids) + 1 - limit} too many{raised}"
            )
        blocks, chunk = self.scheduler.blocks, self.max_batched_tokens
        slots = min(len(ids) + params.max_tokens, limit) - 1
        need, width = blocks.most_blocks(slots, chunk), blocks.width
        if need > blocks.num_usable:
            other = "" if width == 1 else ", or max_batched_tokens"
            most = None if params.max_tokens == NO_LIMIT else params.max_tokens
            excess = slots - blocks.longest(slots, chunk)
            raise ValueError(
                f"{len(ids)} prompt tokens with max_tokens={most} need "
                f"{-(-need // width)} blocks and the pool has {blocks.num_usable // width}: "
                f"{excess} tokens too many; raise num_blocks or lower max_tokens{other}"
            )
        return ids, params


PARTS = {"llm": CheckedLLM, "params": CheckedParams}
