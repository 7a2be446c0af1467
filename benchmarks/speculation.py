"""The gain from draft models, and from earlier answers to the same prompts, on a CPU.

    python benchmarks/speculation.py                                    # the bundled model
    python benchmarks/speculation.py --shape d12 --ways forced          # random weights
    python benchmarks/speculation.py --model /tmp/models/d12 --draft /tmp/models/d6
    python benchmarks/speculation.py --shape tiny --tokens 16 --turns 1     # only a test

Nothing is trained. An engine with draft tokens and one without generate the same texts, in turns,
in this process. A number is the median over the turns of the ratio of their tokens per second.
Variants:

    forced      The texts are known, and each draft token is correct with the probability
                --acceptance. With "free", drafting takes no time. With "paid", a draft model of
                --layers layers also runs, and its tokens are replaced.
    cut         The draft model consists of the first layers of the model (--layers).
    quantized   The draft model is the model itself in 4 bits.
    draft       --draft, another model with the same tokenizer.
    answers     answer_lookup: the texts are those of the previous turn.

With --batch n, n texts are generated at once. "accepted" is the share of accepted draft tokens, and
"steps" the number of steps relative to the engine without draft tokens. The last line of the output
has all results as JSON.
"""

from __future__ import annotations

import argparse
import json
import operator
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the folder of the benchmarks
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # runs from a clone

import checkpoint
import torch
from compare import BUNDLED, SHAPES

from microvllm import LLM, SamplingParams
from microvllm.features.draft import DraftModel
from microvllm.sources.places import find_checkpoint, read_checkpoint

NUM_PROMPT = 64  # tokens


class Way(NamedTuple):
    """An engine with draft tokens, and its name."""

    name: str
    llm: LLM
    forced: ForcedDrafts | None = None  # needs to know the texts
    repeats: bool = False  # are the texts the same in each turn?


class ForcedDrafts:
    """Drafts of known texts. Each draft token is correct with the probability `acceptance`.

    proposer: that of the engine; with is_paid it runs too, so that its time is measured.
    """

    def __init__(self, proposer: DraftModel, acceptance: float, is_paid: bool):
        self.run_draft_model = proposer.draft
        self.acceptance = acceptance
        self.is_paid = is_paid
        self.texts: dict[tuple[int, ...], list[int]] = {}  # prompt -> its text
        self.vocab_size = proposer.llm.tokenizer.num_ordinary
        self.rng = random.Random(0)

    def draft(self, seqs: list, length: int) -> list[list[int]]:
        """A replacement for DraftModel.draft."""
        if self.is_paid:
            self.run_draft_model(seqs, length)
        return [self.draft_text(seq, length) for seq in seqs]

    def draft_text(self, seq, length: int) -> list[int]:
        """The next tokens of a text, some of them wrong."""
        text = self.texts.get(tuple(seq.token_ids[: seq.num_prompt]), [])
        start = len(seq.token_ids) - seq.num_prompt
        following = text[start : start + length]
        return [
            token_id
            if self.rng.random() < self.acceptance
            else (token_id + 1 + self.rng.randrange(self.vocab_size - 1)) % self.vocab_size
            for token_id in following
        ]


def cut_layers(source: Path, layers: list[int], folder: Path) -> Path:
    """Write a checkpoint with some layers of a model into the folder. If the model has value
    embeddings, every second layer has one, counted back from the last. `layers` must keep that."""
    config, recipe, weights = read_checkpoint(*find_checkpoint(source))
    tensors = {}
    for name, weight in weights.items():
        numbered = re.match(r"(transformer\.h|value_embeds)\.(\d+)\.(.*)", name)
        if numbered is None:
            tensors[name] = weight[layers] if name in ("resid_lambdas", "x0_lambdas") else weight
        elif int(numbered[2]) in layers:
            tensors[f"{numbered[1]}.{layers.index(int(numbered[2]))}.{numbered[3]}"] = weight
    folder.mkdir()
    torch.save(
        {name: weight.clone() for name, weight in tensors.items()}, folder / "model_000000.pt"
    )
    shape = asdict(config) | {"n_layer": len(layers)}
    if recipe.era == "1":
        del shape["window_pattern"]
    meta = {"step": 0, "model_config": shape}
    (folder / "meta_000000.json").write_text(json.dumps(meta))
    return folder


def open_ways(args: argparse.Namespace, model: Path, folder: Path) -> Iterator[Way]:
    """The engines with draft tokens. model: folder of the target model; folder: for
    checkpoints."""
    options = engine_options(args, model)
    ways = args.ways.split(",")
    if {"forced", "cut"} & {*ways}:
        config = read_checkpoint(*find_checkpoint(model))[0]
        layers = [0, *range(config.n_layer - args.layers + 1, config.n_layer)]
        cut = cut_layers(model, layers, folder / "cut")
    if "forced" in ways:
        for acceptance in map(float, args.acceptance.split(",")):
            for kind in ("free", "paid"):
                llm = LLM(model, draft=LLM(cut, **options), **options)
                proposer = llm.scheduler.proposer
                forced = ForcedDrafts(proposer, acceptance, is_paid=kind == "paid")
                proposer.draft = forced.draft
                yield Way(f"forced {acceptance:g} {kind}", llm, forced)
    if "cut" in ways:
        yield Way(f"cut to {args.layers} layers", LLM(model, draft=LLM(cut, **options), **options))
    if "quantized" in ways:
        draft = LLM(model, **options | {"quantization": "int4"})
        yield Way("quantized", LLM(model, draft=draft, **options))
    if "draft" in ways:
        yield Way(f"draft {args.draft}", LLM(model, draft=LLM(args.draft, **options), **options))
    if "answers" in ways:
        yield Way("answers", LLM(model, answer_lookup=8, **options), repeats=True)


def make_model(shape: str, folder: Path) -> Path:
    """A checkpoint of random weights."""
    parser = argparse.ArgumentParser()
    checkpoint.add_shape_arguments(parser)
    args = parser.parse_args(SHAPES[shape].split())
    args.seed = 0
    checkpoint.make_checkpoint(folder, args, "cpu")
    return folder


def engine_options(args: argparse.Namespace, model: Path) -> dict:
    """Arguments of all engines."""
    tokenizer_path = model if (model / "tokenizer.pkl").exists() else model.parent / "tokenizer"
    return {
        "tokenizer_path": tokenizer_path,
        "device": "cpu",
        "num_blocks": 1 + args.batch * -(-(NUM_PROMPT + args.tokens) // 16) + 16,
        "max_model_len": NUM_PROMPT + args.tokens + 16,
        "quantization": args.quantization,
        "num_threads": args.threads,
    }


def write(llm: LLM, prompts: list[list[int]], args: argparse.Namespace) -> tuple[float, list]:
    """(seconds to generate the texts, their tokens)."""
    params = SamplingParams(
        temperature=args.temperature, seed=1, max_tokens=args.tokens, ignore_eos=True
    )
    llm.reset_stats()
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - began, [output["token_ids"] for output in outputs]


def compare(plain: LLM, way: Way, args: argparse.Namespace) -> dict[str, float]:
    """The gain of a variant, in turns with the plain engine."""
    rng = random.Random(1)
    ratios = []
    accepted = drafted = steps = plain_steps = same = 0
    for turn in range(-1, args.turns):  # in the first turn, kernels are loaded and times measured
        if turn < 0 or not way.repeats:
            prompts = [
                [rng.randrange(plain.tokenizer.num_ordinary) for _ in range(NUM_PROMPT)]
                for _ in range(args.batch)
            ]
        plain.reset_prefix_cache()
        way.llm.reset_prefix_cache()
        seconds, texts = write(plain, prompts, args)
        if way.forced is not None:
            way.forced.texts = {
                tuple(prompt): text for prompt, text in zip(prompts, texts, strict=True)
            }
        way_seconds, way_texts = write(way.llm, prompts, args)
        if turn >= 0:
            ratios.append(seconds / way_seconds)
            stats = way.llm.stats()
            accepted += stats["accepted_tokens"]
            drafted += stats["guessed_tokens"]
            steps += stats["steps"]
            plain_steps += plain.stats()["steps"]
            same += sum(map(operator.eq, texts, way_texts))
    return {
        "speed": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "accepted": accepted / drafted if drafted else 0.0,
        "drafted": drafted,
        "steps": steps / plain_steps,
        "same_texts": same / (args.turns * args.batch),
    }


def describe(name: str, result: dict[str, float]) -> str:
    """A line of the table."""
    spread = f"({result['lowest']:.2f} to {result['highest']:.2f})"
    speed = f"{result['speed']:5.2f} times as fast {spread}"
    drafts = f"{result['accepted']:.2f} of {result['drafted']:,} draft tokens accepted"
    return f"{name:20s} {speed}, {drafts}, {result['steps']:.2f} of the steps"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape")
    parser.add_argument("--ways", default="forced,cut,quantized,answers")
    text = "acceptance probabilities of forced drafts"
    parser.add_argument("--acceptance", default="0,0.5,0.7,0.9", help=text)
    text = "number of layers of the cut draft model"
    parser.add_argument("--layers", type=int, default=2, help=text)
    parser.add_argument("--draft", help="a draft model, for the variant `draft`")
    parser.add_argument("--quantization", help="format of the target and of cut draft models")
    parser.add_argument("--batch", type=int, default=1, help="number of texts generated at once")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens for each text")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, help="number of threads of all engines")
    args = parser.parse_args()
    if args.draft and "draft" not in args.ways.split(","):
        args.ways += ",draft"
    facts = {"hardware": platform.machine(), "threads": torch.get_num_threads(), **vars(args)}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if args.shape:
            model = make_model(args.shape, Path(folder) / "random")
        with LLM(model, **engine_options(args, model)) as plain:
            for way in open_ways(args, model, Path(folder)):
                result = results[way.name] = compare(plain, way, args)
                print(describe(way.name, result), flush=True)
                way.llm.close()
    print(json.dumps({**facts, "results": results}, default=str))


if __name__ == "__main__":
    main()
