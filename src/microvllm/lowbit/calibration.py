"""Text that the model writes itself, and what the inputs of its matrices are like on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Batch, LayerKV
from ..checkpoint import empty_model
from ..model import Rotation, norm, rotary
from .gptq import DAMPING
from .packing import Quantised, dequantised, rotate

# parts of a layer with the same inputs, in the order in which they are computed
STAGES = ("attn.c_q", "attn.c_k", "attn.c_v"), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)
_TOKENS = 4096  # in a batch, about
_LENGTH = 512  # tokens of a text, at most
_SHARE = 0.5  # of what was lost before a matrix, that it makes up for: some is chance of the texts
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
    lengths = [len(text) for text in texts]
    size = max(lengths)  # of a block: each text has one
    positions = [position for length in lengths for position in range(length)]
    slots = [b * size + position for b, length in enumerate(lengths) for position in range(length)]
    return Batch(
        token_ids=_ints([token_id for text in texts for token_id in text]),
        prev_token_ids=_ints([token_id for text in texts for token_id in [0, *text[:-1]]]),
        positions=_ints(positions),
        slots=_ints(slots),
        cu_seqlens=_ints([0, *accumulate(lengths)]),
        seq_lens=_ints(lengths),
        block_tables=_ints(range(len(texts)))[:, None],
        hidden_rows=_ints(range(len(positions))),
        temperature=torch.empty(0),
        uniform=torch.empty(0),
        num_decodes=lengths.count(1),
        max_query_len=size,
        max_seq_len=size,
    )


def _ints(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


class LayerByLayer:
    """The model's natural form (model.py), with one layer's weights at a time in memory, on texts.

    They compute with rounded matrices, and beside them once more with the exact ones: what was lost
    in the layers before, the present one sees, and makes up for a part of it (cf. Li et al. 2025,
    GPTAQ). weights: a checked state dict.
    """

    def __init__(self, config, recipe, weights: dict[str, Tensor], texts: list[list[int]]):
        self.config, self.recipe, self.weights = config, recipe, weights
        self.batches = make_batches(texts)
        rows = len(weights["transformer.wte.weight"])
        self.model = empty_model(config, recipe, rows).requires_grad_(False)
        longest = max(map(len, texts))
        self.tables = rotary(config, recipe, longest, torch.float32, "cpu")
        most = max(len(b.seq_lens) * b.max_seq_len for b in self.batches)
        self.kv = torch.zeros(2, most * config.n_kv_head * config.head_dim)

    def _weight(self, name: str) -> Tensor:
        return self.weights[name].detach().to(torch.float32)

    @torch.no_grad()
    def round(self, matrix: Callable[[str, Tensor, Tensor], Quantised]) -> Iterator[tuple]:
        """Of each matrix its name and what matrix(name, weight, moments) makes of it. weight: what
        it should be, with its present inputs; moments: their second moments, (in, in), over all
        tokens."""
        model, recipe, config = self.model, self.recipe, self.config
        own = [name for name in self.weights if not name.startswith(("transformer.h.", "lm_head."))]
        small = {name: self._weight(name) for name in own if not name.startswith("value_embeds.")}
        model.load_state_dict(small, strict=False, assign=True)
        first = [model.embed(batch) for batch in self.batches]  # (1)
        states, middle = (list(first), list(first)), None  # after rounded layers, and exact ones
        small.pop("transformer.wte.weight")
        model.transformer.wte.to("meta")
        for i, block in enumerate(model.transformer.h):
            place = f"transformer.h.{i}."
            names = [name for name in self.weights if name.startswith(place)]
            held = {name.removeprefix(place): self._weight(name) for name in names}
            block.load_state_dict(held, assign=True)
            blocks = block, copy.deepcopy(block)
            if recipe.lambdas:  # (2)
                a, b = model.resid_lambdas[i], model.x0_lambdas[i]
                states = [[a * x + b * x0 for x, x0 in zip(s, first, strict=True)] for s in states]
            ve = self.weights.get(f"value_embeds.{i}.weight")
            for stage in STAGES:
                found, moved, lost = self._moments(blocks, stage[0], states, ve)
                for name in stage:
                    linear = block.get_submodule(name)
                    made = matrix(place + name, made_up(linear.weight, found, moved, lost), found)
                    linear.weight.copy_(natural(made))
                    yield place + name, made
            states = [
                [self._run(own, x, batch, ve) for x, batch in zip(s, self.batches, strict=True)]
                for own, s in zip(blocks, states, strict=True)
            ]
            del blocks
            block.to("meta")
            if i == config.n_layer // 2:
                middle = states
        if recipe.smear:  # (7)
            back = model.backout_lambda
            states = [
                [x - back * m for x, m in zip(s, mid, strict=True)]
                for s, mid in zip(states, middle, strict=True)
            ]
        found, moved = torch.zeros(2, config.n_embd, config.n_embd)
        for pair in zip(*states, strict=True):
            h, exact = (norm(x, recipe.eps) for x in pair)
            found.addmm_(h.T, h)
            moved.addmm_((exact - h).T, h)
        weight = made_up(self._weight("lm_head.weight"), found, moved, None)
        yield "lm_head", matrix("lm_head", weight, found)

    def _run(self, block, x: Tensor, batch: Batch, ve) -> Tensor:
        cos, sin = self.tables
        rotation = Rotation(cos[batch.positions, None], sin[batch.positions, None])
        config = self.config
        shape = (len(batch.seq_lens), config.n_kv_head, batch.max_seq_len, config.head_dim)
        k, v = (part[: torch.Size(shape).numel()].view(shape) for part in self.kv)
        embedding = None
        if ve is not None:
            embedding = F.embedding(batch.token_ids, ve).to(torch.float32)
        return block(x, embedding, rotation, LayerKV(k, v, batch))

    def _moments(self, blocks, name: str, states, ve) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of the inputs x of this part of a layer, and x + d of the exact layer: the sums of x^T x
        and of d^T x. And of what is added to the residual stream, where that lacks r: of r^T x."""
        parts, inputs = [own.get_submodule(name) for own in blocks], {}
        hooks = [
            part.register_forward_pre_hook(lambda part, given: inputs.update({part: given[0]}))
            for part in parts
        ]
        found, moved = torch.zeros(2, parts[0].in_features, parts[0].in_features)
        lost = torch.zeros(parts[0].weight.shape) if name.endswith("c_proj") else None
        for *pair, batch in zip(*states, self.batches, strict=True):
            after = [self._run(own, x, batch, ve) for own, x in zip(blocks, pair, strict=True)]
            x, exact = (inputs[part] for part in parts)
            found.addmm_(x.T, x)
            moved.addmm_((exact - x).T, x)
            if name == "attn.c_proj":
                lost.addmm_((pair[1] - pair[0]).T, x)
            elif name == "mlp.c_proj":  # what is there after it, without its own part
                lost.addmm_((after[1] - after[0] - (exact - x) @ parts[1].weight.T).T, x)
        for hook in hooks:
            hook.remove()
        return found, moved, lost


def made_up(weight: Tensor, found: Tensor, moved: Tensor, lost: Tensor | None) -> Tensor:
    """A weight (rows, in) that makes up, in its products, for _SHARE of what its inputs have lost,
    and the residual stream with them; the rest as LayerByLayer._moments has it."""
    goal = weight @ moved if lost is None else weight @ moved + lost
    damped = found.to(torch.float64)
    damped.diagonal().add_(DAMPING * damped.diagonal().mean() + 1e-30)
    change = torch.linalg.solve(damped, goal.T.to(torch.float64)).T
    return weight + _SHARE * change.to(torch.float32)


def natural(found: Quantised) -> Tensor:
    """The matrix (rows, in) float32 of inputs that are not rotated."""
    return rotate(dequantised(found))
