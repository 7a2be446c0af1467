"""Calibration: texts that the model itself writes, and the statistics of its matrices' inputs."""

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

# parts of a layer that have the same inputs, in the order of computation
STAGES = ("attn.c_q", "attn.c_k", "attn.c_v"), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)
_TOKENS = 4096  # approximate number of tokens in a batch
_LENGTH = 512  # maximum number of tokens in a text
# the share of the loss of earlier layers that a matrix compensates for. Part of the loss is chance,
# because the texts are few
_SHARE = 0.5
# user turns for half of the conversations; in the other half, the model writes this turn itself
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
    """Return about `count` tokens of texts that the model samples at temperature 1.

    chats: the model writes conversations, and in half of them also the user's turn (Xu et al. 2024,
    Magpie); otherwise it writes plain text. The same seed gives the same texts."""
    from tqdm import tqdm

    bos, prompts = llm.tokenizer.bos_id, []
    if chats:
        render = llm.tokenizer.render_for_completion
        for prompt in PROMPTS:
            prompts.append(render([{"role": "user", "content": prompt}]))
            prompts.append([bos, llm.tokenizer.encode_special("<|user_start|>")])
    longest = min(_LENGTH, llm.max_model_len)
    prompts = [prompt for prompt in prompts if len(prompt) < longest] or [[bos]] * 48
    texts, num_tokens = [], 0
    with tqdm(total=count, desc="sampling", unit="token", disable=None) as bar:
        while num_tokens < count:
            first_seed = seed + len(texts)
            params = [
                llm.params_class(
                    temperature=1.0,
                    max_tokens=longest - len(prompt),
                    seed=(first_seed + i) % 2**31,
                )
                for i, prompt in enumerate(prompts)
            ]
            for output in llm.generate(prompts, params, use_tqdm=False):
                if num_tokens < count:
                    texts.append(output["prompt_token_ids"] + output["token_ids"])
                    num_tokens += len(texts[-1])
                    bar.update(min(len(texts[-1]), count - bar.n))
    return texts


def split_text(ids: list[int], bos: int, count: int, longest: int) -> list[list[int]]:
    """Return the first `count` tokens of a text in parts that begin with a BOS, as in training."""
    ids, size = ids[:count], max(1, min(_LENGTH, longest) - 1)
    return [[bos, *ids[start : start + size]] for start in range(0, len(ids), size)]


def make_batches(texts: list[list[int]]) -> list[Batch]:
    """Return batches of whole texts. A text is one block of the cache."""
    batches, texts = [], sorted(texts, key=len)
    while texts:
        count = max(1, _TOKENS // len(texts[-1]))
        batches.append(_make_batch(texts[-count:]))
        texts = texts[:-count]
    return batches


def _make_batch(texts: list[list[int]]) -> Batch:
    lengths = [len(text) for text in texts]
    size = max(lengths)  # block size: each text has one block
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
    """Computes texts with the plain model (model.py), with one layer's weights in memory.

    The texts are computed twice, with the rounded matrices and with the exact ones. The difference
    is the loss of earlier layers. Each layer compensates for part of it (compare Li et al. 2025,
    GPTAQ).

    weights: a checked state dict; texts: token ids.
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
        """Round all matrices in order. Yield the name and the result of
        matrix(name, weight, moments) for each.

        weight: the matrix to round, which already compensates for the loss in its inputs; moments
        (in, in): second moments of these inputs over all tokens."""
        model, recipe, config = self.model, self.recipe, self.config
        excluded = ("transformer.h.", "lm_head.", "value_embeds.")
        others = {
            name: self._weight(name) for name in self.weights if not name.startswith(excluded)
        }
        model.load_state_dict(others, strict=False, assign=True)
        first = [model.embed(batch) for batch in self.batches]  # (1)
        states, middle = (list(first), list(first)), None  # of the rounded and the exact layers
        others.pop("transformer.wte.weight")
        model.transformer.wte.to("meta")
        for i, block in enumerate(model.transformer.h):
            prefix = f"transformer.h.{i}."
            names = [name for name in self.weights if name.startswith(prefix)]
            tensors = {name.removeprefix(prefix): self._weight(name) for name in names}
            block.load_state_dict(tensors, assign=True)
            blocks = block, copy.deepcopy(block)
            if recipe.lambdas:  # (2)
                a, b = model.resid_lambdas[i], model.x0_lambdas[i]
                states = [[a * x + b * x0 for x, x0 in zip(s, first, strict=True)] for s in states]
            ve = self.weights.get(f"value_embeds.{i}.weight")
            for stage in STAGES:
                moments, shift, loss = self._moments(blocks, stage[0], states, ve)
                for name in stage:
                    linear = block.get_submodule(name)
                    weight = compensate(linear.weight, moments, shift, loss)
                    rounded = matrix(prefix + name, weight, moments)
                    linear.weight.copy_(to_dense(rounded))
                    yield prefix + name, rounded
            states = [
                [self._run(layer, x, batch, ve) for x, batch in zip(s, self.batches, strict=True)]
                for layer, s in zip(blocks, states, strict=True)
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
        moments, shift = torch.zeros(2, config.n_embd, config.n_embd)
        for pair in zip(*states, strict=True):
            h, exact = (norm(x, recipe.eps) for x in pair)
            moments.addmm_(h.T, h)
            shift.addmm_((exact - h).T, h)
        weight = compensate(self._weight("lm_head.weight"), moments, shift, None)
        yield "lm_head", matrix("lm_head", weight, moments)

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
        """Sum the moments of part `name` of a layer over all tokens.

        Return the sums of x^T x ("moments"), of d^T x ("shift"), and, for a part that adds to the
        residual stream, of r^T x ("loss", else None). x: inputs of the part; x + d: its inputs in
        the exact layer; r: the residual stream of the exact layer minus that of the rounded one."""
        parts, inputs = [layer.get_submodule(name) for layer in blocks], {}
        hooks = [
            part.register_forward_pre_hook(lambda part, args: inputs.update({part: args[0]}))
            for part in parts
        ]
        moments, shift = torch.zeros(2, parts[0].in_features, parts[0].in_features)
        loss = torch.zeros(parts[0].weight.shape) if name.endswith("c_proj") else None
        for *pair, batch in zip(*states, self.batches, strict=True):
            after = [self._run(layer, x, batch, ve) for layer, x in zip(blocks, pair, strict=True)]
            x, exact = (inputs[part] for part in parts)
            moments.addmm_(x.T, x)
            shift.addmm_((exact - x).T, x)
            if name == "attn.c_proj":
                loss.addmm_((pair[1] - pair[0]).T, x)
            elif name == "mlp.c_proj":  # the stream after the part, without the part's own change
                loss.addmm_((after[1] - after[0] - (exact - x) @ parts[1].weight.T).T, x)
        for hook in hooks:
            hook.remove()
        return moments, shift, loss


def compensate(weight: Tensor, moments: Tensor, shift: Tensor, loss: Tensor | None) -> Tensor:
    """Return a weight (rows, in) whose products compensate for _SHARE of the loss in its inputs and
    in the residual stream. The other arguments are those that LayerByLayer._moments returns."""
    goal = weight @ shift if loss is None else weight @ shift + loss
    damped = moments.to(torch.float64)
    damped.diagonal().add_(DAMPING * damped.diagonal().mean() + 1e-30)
    change = torch.linalg.solve(damped, goal.T.to(torch.float64)).T
    return weight + _SHARE * change.to(torch.float32)


def to_dense(matrix: Quantised) -> Tensor:
    """Return the matrix (rows, in) in float32, for inputs that are not rotated."""
    return rotate(dequantised(matrix))
