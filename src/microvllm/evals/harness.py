"""A model class for lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

    from lm_eval import simple_evaluate
    from microvllm import LLM
    from microvllm.evals import HarnessLM

    simple_evaluate(HarnessLM(LLM("sft")), tasks=["arc_easy"])

The harness passes all requests of a kind at once, as texts. They are encoded as in its Hugging Face
model, and one call of the engine batches them and computes shared prefixes once. The harness does
not search other packages for models. Importing this module registers "microvllm", also for the
harness's command line:

    python -c "import microvllm.evals, lm_eval.__main__ as m; m.cli_evaluate()" \\
        --model microvllm --model_args model_path=sft --tasks arc_easy
"""

import re
from pathlib import Path

from ..environment import how_to_install

try:
    import lm_eval.models  # noqa: F401, which the harness leaves out once one model is registered
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import (
        get_rolling_token_windows,
        make_disjoint_window,
        simple_parse_args_string,
    )
except ImportError as error:
    message = f"evaluations need lm-eval 0.4.10 or later ({error}): {how_to_install('eval')}"
    raise ModuleNotFoundError(message, name=error.name) from None

COUNTERS = (
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "prefill_seconds",
    "decode_seconds",
)


@register_model("microvllm")
class HarnessLM(TemplateLM):
    """An LLM in the form of a model of the harness.

    llm: the engine, which this class does not close; max_gen_toks: the most new tokens if a task
    does not set it. A context starts with BOS, and an empty context is BOS alone. Longer inputs are
    cut on the left to `max_length` tokens. The engine's max_model_len also counts the last token,
    which is only predicted. To use a model's whole context, as the harness's Hugging Face model
    does, give LLM(..., max_model_len=) one more than the context.
    """

    def __init__(self, llm, max_gen_toks: int = 256):
        super().__init__()
        self.llm = llm
        self.max_gen_toks = max_gen_toks
        self.max_length = llm.max_model_len - 1
        names = map(re.escape, llm.tokenizer.special_tokens)
        self._special_names = re.compile(f"({'|'.join(names)})")

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None):
        """Create the model from the harness's --model_args, which are arguments of LLM, such as
        model_path. Of the harness's additions, the batch size is not used (the scheduler has its
        own limits), and cuda:0 also means the best device."""
        from .. import LLM

        additional_config = additional_config or {}
        options = {name: value for name, value in additional_config.items() if value is not None}
        options.pop("batch_size", None)
        if options.get("device") == "cuda:0":
            options["device"] = "auto"
        return cls(LLM(**options | arg_dict))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None):
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # text

    @property
    def eot_token_id(self) -> int:
        return self.llm.tokenizer.bos_id  # it starts nanochat's documents; there is no end token

    @property
    def tokenizer_name(self) -> str:
        return "nanochat"  # the name of the chat template, which the harness uses for caching

    def get_model_info(self) -> dict:
        """Return the facts about the model for the results."""
        model = self.llm.model
        return {"model": self.llm.name, "model_dtype": str(model.dtype), "era": model.recipe.era}

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """Return the token ids of a text, with BOS in front unless add_special_tokens is False. If
        the text starts with the name of BOS, as the chat template's texts do, names of special
        tokens are encoded as these tokens."""
        tokenizer = self.llm.tokenizer
        if not string.startswith("<|bos|>"):
            return tokenizer.encode(string, bos=add_special_tokens is not False)
        ids: list[int] = []
        for part in self._special_names.split(string):
            special_id = tokenizer.special_tokens.get(part)
            ids += tokenizer.encode(part) if special_id is None else [special_id]
        return ids

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt=True) -> str:
        """Return the text of a conversation for `tok_encode`. Without add_generation_prompt, the
        last message is the start of an answer that the model continues."""
        tokenizer = self.llm.tokenizer
        text = tokenizer.decode(tokenizer.render_for_completion(chat_history))
        return text if add_generation_prompt else text + chat_history[-1]["content"]

    # requests

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs):
        """Return for each (texts, context's ids, continuation's ids) the log-probability of the
        continuation, and whether greedy decoding would write it."""
        prompts = []
        continuations = []
        for texts, context, continuation in requests:
            num_tokens = len(continuation)
            if not 0 < num_tokens <= self.max_length:
                raise ValueError(
                    f"a continuation of {num_tokens} tokens after a context of {len(context)}, but "
                    f"it must have 1 to {self.max_length} (max_length): {texts!r:.200}"
                )
            prompts.append(context[num_tokens - self.max_length - 1 :])
            continuations.append(continuation)
        outputs = self.llm.judge(prompts, continuations, use_tqdm=not disable_tqdm)
        return [(sum(output["logprobs"]), all(output["greedy"])) for output in outputs]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text after BOS. A text is split into windows of at
        most max_length tokens, each with as much preceding context as fits."""
        windows = []  # (index of the text, context's ids, predicted ids)
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            rolled = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            windows += [(i, *make_disjoint_window(window)) for window in rolled]
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm)
        for (i, _, _), (logprob, _) in zip(windows, answers, strict=True):
            totals[i] += logprob
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Return the text after each context, up to the first string in `until` or the end of the
        answer. Other generation_kwargs are those of SamplingParams; greedy by default."""
        prompts = []
        params = []
        for context, gen_kwargs in [request.args for request in requests]:
            options = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
            max_prompt = self.max_length - options["max_gen_toks"]
            if max_prompt < 1:
                raise ValueError(
                    f"max_gen_toks={options['max_gen_toks']} leaves no space for a prompt: both "
                    f"must fit into {self.max_length} tokens (max_length); give a lower one"
                )
            try:
                params.append(self._make_params(options))
            except (TypeError, ValueError) as error:
                raise type(error)(f"generation_kwargs {gen_kwargs}: {error}") from None
            prompts.append(self.tok_encode(context)[-max_prompt:])
        outputs = self.llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        for i, output in enumerate(outputs):
            if output["finish_reason"] not in ("stop", "length"):
                raise RuntimeError(f"request {i}: {output['finish_reason']}, {output.stop_reason}")
        return [output["text"] for output in outputs]

    def _make_params(self, options: dict):
        """Make SamplingParams of normalised generation_kwargs. Raises TypeError or ValueError."""
        options = {"temperature": 0.0, **options}
        options["max_tokens"] = options.pop("max_gen_toks")
        until = [text for text in options.pop("until") if text]
        if until:
            options["stop"] = until
        del options["do_sample"]  # the temperature determines it
        if options.get("num_beams") == 1:  # no beam search
            del options["num_beams"]
        return self.llm.params_class(**options)


def find_tasks(names: list[str], include_path: str | Path | None = None):
    """Return the harness's TaskManager, and the tasks, groups and tags that match `names`, which
    may contain *. include_path: a folder with further tasks (YAML files that may name Python
    functions, which the harness runs). Raises ValueError for an unknown name or folder."""
    from lm_eval.tasks import TaskManager

    if include_path and not Path(include_path).is_dir():
        raise ValueError(f"include_path {str(include_path)!r} is not a folder")
    manager = TaskManager(include_path=include_path)
    for name in names:
        if not manager.match_tasks([name]):
            remark = f"the harness knows {len(manager.all_tasks)}: `lm_eval ls tasks` lists its own"
            raise ValueError(f"there is no task {name!r}; {remark}, include_path adds others")
    return manager, manager.match_tasks(names)


def evaluate(llm, tasks: list[str], task_manager=None, **options) -> dict | None:
    """Return the result of lm_eval.simple_evaluate for these tasks (None on all ranks but the
    first). Its key "engine" has the costs: prompt_tokens; cached_tokens (prompt tokens from the
    prefix cache) and hit_rate (their share); output_tokens; seconds in the engine;
    tokens_per_second of prompt and output. options: arguments of simple_evaluate, such as
    num_fewshot and limit."""
    from lm_eval import simple_evaluate

    before = llm.stats()
    results = simple_evaluate(HarnessLM(llm), tasks=tasks, task_manager=task_manager, **options)
    if results is not None:
        after = llm.stats()
        results["engine"] = summarise({name: after[name] - before[name] for name in COUNTERS})
    return results


def summarise(counters: dict[str, float]) -> dict[str, float]:
    """Return the costs for `evaluate` from the differences of COUNTERS."""
    seconds = counters["prefill_seconds"] + counters["decode_seconds"]
    num_tokens = counters["prompt_tokens"] + counters["output_tokens"]
    hit_rate = counters["cached_tokens"] / max(1, counters["prompt_tokens"])
    return {
        "prompt_tokens": counters["prompt_tokens"],
        "cached_tokens": counters["cached_tokens"],
        "output_tokens": counters["output_tokens"],
        "hit_rate": round(hit_rate, 4),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(num_tokens / seconds, 1) if seconds else 0.0,
    }
