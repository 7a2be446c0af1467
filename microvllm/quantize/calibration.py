"""Text that the model writes itself, and what the inputs of its matrices are like on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Batch
from ..checkpoint import empty_model
from ..cpu.packed import Quantised, dequantised, rotate
from ..model import norm, rotary

# parts of a layer with the same inputs, in the order in which they are computed
STAGES = ("attn.c_q", "attn.c_k", "attn.c_v"), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)
_TOKENS = 4096  # in a batch, about
_LENGTH = 512  # tokens of a text, at most
# what a user may ask; the other half of the conversations the model begins itself
PROMPTS = (
    "What is the capital of France?", "Tell me a story about a dog.", "Why is the sky blue?",
    "Write a short poem about the sea.", "Who wrote Hamlet?", "What is 12 + 30?",
    "Explain how a steam engine works.", "Give me three tips for sleeping well.",
    "Translate 'good morning' into French.", "What happened in the year 1815?",
    "Describe a walk through an old town.", "How do I bake bread?",
    "What is the difference between a comet and a planet?", "Name five animals of the forest.",
    "Write a letter to a friend who has moved away.", "What does the word 'gallant' mean?",
    "Summarize the plot of a famous novel.", "How many legs do three spiders have?",
    "Is it better to live in a city or in the country?", "Who was Napoleon?",
    "Continue this text: It was late in the evening when", "Give a definition of justice.",
    "Write a function that reverses a list in Python.", "What are the seasons of the year?",
)  # fmt: skip


def write_texts(llm, count: int, seed: int, chats: bool) -> list[list[int]]:
    """About `count` tokens of texts that the model of an LLM samples at temperature 1: of one that
    chats conversations, to half of which it makes up the user's turn as well (Xu et al. 2024,
    Magpie), of others plain text. The same seed gives the same texts."""
    from tqdm import tqdm

    bos, prompts = llm.tokenizer.bos_id, []
    if chats:
        render = llm.tokenizer.render_for_completion
        for prompt in PROMPTS:
            prompts.append(render([{"role": "user", "content": prompt}]))
            prompts.append([bos, llm.tokenizer.encode_special("<|user_start|>")])
    longest = min(_LENGTH, llm.max_model_len)
    prompts = [prompt for prompt in prompts if len(prompt) < longest] or [[bos]] * 48
    texts, made = [], 0
    with tqdm(total=count, desc="sampling", unit="token", disable=None) as bar:
        while made < count:
            seeds = [(seed + len(texts) + i) % 2**31 for i in range(len(prompts))]
            params = [
                llm.params_class(temperature=1.0, max_tokens=longest - len(prompt), seed=own)
                for prompt, own in zip(prompts, seeds, strict=True)
            ]
            for output in llm.generate(prompts, params, use_tqdm=False):
                if made < count:
                    texts.append(output["prompt_token_ids"] + output["token_ids"])
                    made += len(texts[-1])
                    bar.update(min(len(texts[-1]), count - bar.n))
    return texts


def split_text(ids: list[int], bos: int, count: int, longest: int) -> list[list[int]]:
    """The first `count` tokens of a given text in parts that begin with a BOS, as in training."""
    ids, size = ids[:count], max(1, min(_LENGTH, longest) - 1)
    return [[bos, *ids[start : start + size]] for start in range(0, len(ids), size)]


def make_batches(texts: list[list[int]]) -> list[Batch]:
    """Batches of whole texts; a text is one block of the cache."""
    batches, texts = [], sorted(texts, key=len)
    while texts:
        count = max(1, _TOKENS // len(texts[-1]))
        batches.append(_make_batch(texts[-count:]))
        texts = texts[:-count]
    return batches


def _make_batch(texts: list[list[int]]) -> Batch:
    def ints(values) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32)

    lengths, size = [len(text) for text in texts], max(map(len, texts))
    places = [(b, p) for b, length in enumerate(lengths) for p in range(length)]
    return Batch(
        ints(texts[b][p] for b, p in places), ints(texts[b][p - 1] if p else 0 for b, p in places),
        ints(p for _, p in places), ints(b * size + p for b, p in places),
        ints([0, *torch.tensor(lengths).cumsum(0).tolist()]), ints(lengths),
        ints(range(len(texts)))[:, None], ints(range(len(places))), torch.empty(0), torch.empty(0),
        lengths.count(1), size, size,
    )  # fmt: skip


class LayerByLayer:
    """The model's natural form (model.py), with one layer's weights at a time in memory, on texts.

    The layers before the present one compute with rounded matrices: what they have lost the later
    ones see, and make up for. weights: a checked state dict.
    """

    def __init__(self, config, recipe, weights: dict[str, Tensor], texts: list[list[int]]):
        self.config, self.recipe, self.weights = config, recipe, weights
        self.batches = make_batches(texts)
        rows = len(weights["transformer.wte.weight"])
        self.model = empty_model(config, recipe, rows).requires_grad_(False)
        longest = max(map(len, texts))
        self.tables = rotary(config, recipe, longest, torch.float32, "cpu")
        most = max(len(b.seq_lens) * b.max_seq for b in self.batches)
        self.kv = torch.zeros(2, most * config.n_kv_head * config.head_dim)

    def _weight(self, name: str) -> Tensor:
        return self.weights[name].detach().to(torch.float32)

    @torch.no_grad()
    def round(self, matrix: Callable[[str, Tensor, Tensor], Quantised]) -> Iterator[tuple]:
        """Of each matrix its name and what matrix(name, weight, moments) makes of it; moments: the
        second moments of its inputs, (in, in), over all tokens."""
        model, recipe, config = self.model, self.recipe, self.config
        own = [name for name in self.weights if not name.startswith(("transformer.h.", "lm_head."))]
        small = {name: self._weight(name) for name in own if not name.startswith("value_embeds.")}
        model.load_state_dict(small, strict=False, assign=True)
        first = [model.embed(batch) for batch in self.batches]  # (1)
        state, middle = list(first), None
        small.pop("transformer.wte.weight")
        model.transformer.wte.to("meta")
        for i, block in enumerate(model.transformer.h):
            place = f"transformer.h.{i}."
            names = [name for name in self.weights if name.startswith(place)]
            held = {name.removeprefix(place): self._weight(name) for name in names}
            block.load_state_dict(held, assign=True)
            if recipe.lambdas:  # (2)
                a, b = model.resid_lambdas[i], model.x0_lambdas[i]
                state = [a * x + b * x0 for x, x0 in zip(state, first, strict=True)]
            ve = self.weights.get(f"value_embeds.{i}.weight")
            for stage in STAGES:
                found = self._moments(block, stage[0], state, ve)
                for name in stage:
                    linear = block.get_submodule(name)
                    made = matrix(place + name, linear.weight, found)
                    linear.weight.copy_(natural(made))
                    yield place + name, made
            pairs = zip(state, self.batches, strict=True)
            state = [self._run(block, x, batch, ve) for x, batch in pairs]
            block.to("meta")
            if i == config.n_layer // 2:
                middle = state
        if recipe.smear:  # (7)
            state = [x - model.backout_lambda * m for x, m in zip(state, middle, strict=True)]
        moments = torch.zeros(config.n_embd, config.n_embd)
        for x in state:
            h = norm(x, recipe.eps)
            moments.addmm_(h.T, h)
        yield "lm_head", matrix("lm_head", self._weight("lm_head.weight"), moments)

    def _run(self, block, x: Tensor, batch: Batch, ve) -> Tensor:
        cos, sin = (table[batch.positions, None] for table in self.tables)
        shape = len(batch.seq_lens), self.config.n_kv_head, batch.max_seq, self.config.head_dim
        k, v = (part[: torch.Size(shape).numel()].view(shape) for part in self.kv)
        given = None if ve is None else F.embedding(batch.ids, ve).to(torch.float32)
        return block(x, given, cos, sin, k, v, batch)

    def _moments(self, block, name: str, state: list[Tensor], ve) -> Tensor:
        """Of the inputs of this part of a layer: the sum of x^T x."""
        linear = block.get_submodule(name)
        found = torch.zeros(linear.in_features, linear.in_features)

        def add(module, inputs):
            found.addmm_(inputs[0].T, inputs[0])

        hook = linear.register_forward_pre_hook(add)
        for x, batch in zip(state, self.batches, strict=True):
            self._run(block, x, batch, ve)
        hook.remove()
        return found


def natural(found: Quantised) -> Tensor:
    """The matrix (rows, in) float32 of inputs that are not rotated."""
    return rotate(dequantised(found))
