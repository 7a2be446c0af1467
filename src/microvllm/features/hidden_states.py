"""Hidden states of prompts and answers: for probes, sparse autoencoders, embeddings.

The hidden states of layer i are the residual stream after it, as a forward hook on
`model.transformer.h[i]` receives it in PyTorch. Texts are generated first, as without this feature.
Then a separate pass computes all positions again, in large chunks, and keeps the output of the
requested layers:

    generate     prompt, one token, one token, ...      kernels, graphs and drafts as usual
    the pass     prompt and answer at once              nothing comes from the prefix cache

So generation is as fast as without hidden states, a preempted or forked sample has no gaps, and the
states are those that produced the tokens, up to rounding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from ..checkpoint import require_memory
from ..engine import Request, check_limit, naming
from ..environment import free_memory
from ..runner import Extension
from ..sampler import SamplingParams
from ..scheduler import Plan, Sequence
from . import ReadSequence, check_list, check_number, read_spans, request_rows

KEYS = ("layers", "dtype", "path", "recompute")
POOLINGS = ("mean", "last")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of files


@dataclass(frozen=True)
class Selection:
    """Which hidden states are kept, and where: the checked argument hidden_states."""

    layers: tuple[int, ...]  # from 0
    dtype: torch.dtype
    path: Path | None = None  # a file, for states that do not fit into memory
    recompute: bool = True  # False: reject a prompt that has a prefix in the cache


class Reading(NamedTuple):
    """An option of a request: compute its hidden states when it has finished."""

    selection: Selection
    ending: list[int]  # tokens after those of its sequence: the last token of a continuation


class ShownSequence(ReadSequence):
    """A text that is computed for the hidden states of all its positions."""

    def __init__(
        self, request_id: int, token_ids: list[int], params: SamplingParams, selection: Selection
    ):
        super().__init__(request_id, token_ids, params, token_ids=token_ids, first_row=0)
        self.selection = selection
        self.states: Tensor | None = None  # (T, layers, C), from the first chunk on


class HiddenStates(Extension):
    """Keeps hidden states, for `generate(hidden_states=)`, `judge`, `score` and `embed`."""

    def __init__(self):
        self.sequences: WeakSet[ShownSequence] = WeakSet()  # of requests that are not forgotten

    # arguments

    def check(self, hidden_states: object) -> Selection:
        """The argument hidden_states: layers, or a dict of layers, dtype, path and recompute.
        Raises TypeError or ValueError."""
        is_dict = isinstance(hidden_states, dict)
        settings = hidden_states if is_dict else {"layers": hidden_states}
        if settings.keys() - {*KEYS} or "layers" not in settings:
            raise ValueError(f"hidden_states has the keys {', '.join(KEYS)}, got {settings!r:.200}")
        dtype = settings.get("dtype", "float32")
        if dtype not in ("float32", "model"):
            raise ValueError(f"dtype of hidden_states must be 'float32' or 'model', got {dtype!r}")
        path = settings.get("path")
        if path is not None and not Path(path).parent.is_dir():
            raise FileNotFoundError(f"path of hidden_states: {Path(path).parent} is no folder")
        if path is not None and Path(path).is_dir():
            raise ValueError(
                f"path of hidden_states: {path} is a folder, give a file in the folder"
            )
        return Selection(
            layers=self.check_layers(settings["layers"]),
            dtype=torch.float32 if dtype == "float32" else self.engine.model.dtype,
            path=None if path is None else Path(path),
            recompute=bool(settings.get("recompute", True)),
        )

    def check_layers(self, layers: object) -> tuple[int, ...]:
        """Layers as numbers from 0. Raises TypeError or ValueError."""
        num_layers = self.engine.model.config.n_layer
        limits = {"least": -num_layers, "most": num_layers - 1}
        layers = [layers] if isinstance(layers, Integral) else layers
        numbers = check_list("hidden_states", layers, partial(check_number, **limits))
        layer_indices = tuple([number % num_layers for number in numbers])
        if not layer_indices or len(set(layer_indices)) < len(layer_indices):
            raise ValueError(f"hidden_states={numbers}: give at least one layer, each only once")
        return layer_indices

    def request(
        self, requests: list[Request], hidden_states: object, endings: List[list[int]] = ()
    ) -> None:
        """Request hidden states of these requests, before any work. hidden_states: see `check`;
        None for no states. endings: for each request, tokens after those of its sequence. Raises
        the errors of `check`, and ValueError for a text that does not fit into the pool or that,
        without recompute, has a prefix in the cache."""
        if hidden_states is None:
            return
        selection = self.check(hidden_states)
        endings = endings or [[]] * len(requests)
        for i, (request, ending) in enumerate(zip(requests, endings, strict=True)):
            with naming(f"prompts[{i}]"):
                self.check_length(request.sequences[0].max_length)
                if not selection.recompute:
                    self.engine.guard.perform(partial(self.refuse_cached, request.sequences[0]))
            request.options["hidden_states"] = Reading(selection, ending)

    def check_length(self, num_tokens: int) -> None:
        """Raises ValueError if the pool cannot hold K and V of num_tokens tokens."""
        blocks = self.engine.scheduler.blocks
        num_needed = blocks.max_blocks(num_tokens, self.engine.config.max_batched_tokens)
        words = "blocks are needed for hidden states of all tokens, and the pool has"
        check_limit(num_needed, blocks.pool.num_usable, words)

    def refuse_cached(self, seq: Sequence) -> None:
        """Raises ValueError if a prefix of a sequence is in the cache."""
        blocks = self.engine.scheduler.blocks
        # a table has an entry per place and group of layers (features/windows.py)
        num_places = len(blocks.find_prefix(seq)) // blocks.blocks_for(1)
        num_cached = num_places * blocks.block_size
        if num_cached > 0:
            raise ValueError(
                f"{num_cached} positions are in the prefix cache, which has no hidden states: give "
                "recompute=True, or reset_prefix_cache() first"
            )

    # the pass

    def follow(self, steps: Iterator[None], requests: list[Request]) -> Iterator[None]:
        """Run the iterator `steps`, which serves these requests. Then run the pass for those that
        request hidden states, and add the states to their outputs."""
        yield from steps
        readings = [request.options.get("hidden_states") for request in requests]
        samples = []
        for prompt, (request, reading) in enumerate(zip(requests, readings, strict=True)):
            if reading is not None:
                for seq in request.sequences:
                    token_ids = seq.token_ids + reading.ending
                    samples.append(Sample(prompt, seq.index, token_ids, request))
        if not samples:
            return
        selection = next(reading.selection for reading in readings if reading is not None)
        texts = [sample.token_ids for sample in samples]
        if selection.path is None:
            self.require_memory(sum(map(len, texts)), selection)
            yield from self.read(texts, selection, partial(keep_in_output, samples))
        else:
            with StatesWriter(selection) as writer:
                yield from self.read(texts, selection, partial(writer.write, samples))

    def require_memory(self, num_tokens: int, selection: Selection) -> None:
        """Raises ValueError if memory cannot hold the states of num_tokens tokens."""
        width = self.engine.model.config.n_embd
        num_bytes = num_tokens * len(selection.layers) * width * selection.dtype.itemsize
        what = f"hidden states of {num_tokens:,} tokens in {len(selection.layers)} layers"
        remedy = "give hidden_states a path, fewer layers, or fewer prompts at once"
        require_memory(what, num_bytes, free_memory(torch.device("cpu")), remedy)

    def read(
        self, texts: list[list[int]], selection: Selection, keep: Callable[[int, Tensor], None]
    ) -> Iterator[None]:
        """Compute texts, and call keep(index, states (T, layers, C)) for each in order, between the
        steps. Raises RuntimeError if another thread has aborted a text."""
        requests = [self.make_request(token_ids, selection) for token_ids in texts]
        num_kept = 0
        for _ in self.engine.serve(requests):
            yield
            while num_kept < len(requests) and requests[num_kept].output is not None:
                keep(num_kept, take_states(requests[num_kept], num_kept))
                num_kept += 1
        for index in range(num_kept, len(requests)):  # finished by steps of other threads
            keep(index, take_states(requests[index], index))

    def make_request(self, token_ids: list[int], selection: Selection) -> Request:
        """A request to compute a text."""
        params = self.engine.params_class(max_tokens=1, seed=0)
        request = self.engine.make_request(token_ids, params, is_owned=True)
        seq = ShownSequence(request.id, token_ids, params, selection)
        self.sequences.add(seq)
        request.sequences = [seq]
        return request

    def on_plan(self, plan: Plan) -> None:
        """Request the rows of these sequences after the selected layers."""
        if self.sequences and request_rows(plan, ShownSequence):
            for chunk in plan.chunks:
                if isinstance(chunk.seq, ShownSequence):
                    plan.layers.update(chunk.seq.selection.layers)

    def on_layer(self, plan: Plan, layer: int, hidden: Tensor) -> None:
        plan.results[f"layer {layer}"] = hidden

    def on_results(self, plan: Plan) -> None:
        if not plan.layers:
            return
        for seq, span, rows in read_spans(plan, ShownSequence):
            selection = seq.selection
            if seq.states is None:
                shape = (len(seq.token_ids), len(selection.layers), self.engine.model.config.n_embd)
                seq.states = torch.empty(shape, dtype=selection.dtype)
            for column, layer in enumerate(selection.layers):
                hidden = plan.results[f"layer {layer}"]
                seq.states[span.start : span.stop, column] = hidden[rows].to(selection.dtype)
            if span.stop == len(seq.token_ids) and seq.finish_reason is None:
                self.engine.scheduler.finish(seq, "length", None)

    # embeddings

    def embed(self, texts: object, pooling: object, layer: int) -> Tensor:
        """See LLM.embed."""
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, (list, tuple)):
            raise TypeError(f"texts must be a list, got {texts!r:.80}")
        if pooling not in POOLINGS and not callable(pooling):
            expected = f"{' or '.join(map(repr, POOLINGS))}, or a function"
            raise ValueError(f"pooling must be {expected}, got {pooling!r:.80}")
        self.engine.guard.check_open()
        num_layers = self.engine.model.config.n_layer
        layer = check_number("layer", layer, -num_layers, num_layers - 1)
        selection = Selection((layer % num_layers,), torch.float32)
        prompts = []
        for i, text in enumerate(texts):
            with naming(f"texts[{i}]"):
                token_ids, _ = self.engine.check(text, self.engine.params_class(max_tokens=1))
                self.check_length(len(token_ids))
                prompts.append(token_ids)
        rows: list[Tensor] = []

        def keep(index: int, states: Tensor) -> None:
            row = self.pool(states[:, 0], prompts[index], pooling)
            if rows and row.shape != rows[0].shape:
                shapes = f"{tuple(rows[0].shape)} and {tuple(row.shape)}"
                raise ValueError(f"pooling returned shapes {shapes}: all texts need the same shape")
            rows.append(row)

        for _ in self.read(prompts, selection, keep):
            pass
        return torch.stack(rows) if rows else torch.empty(0, self.engine.model.config.n_embd)

    def pool(self, states: Tensor, token_ids: list[int], pooling: object) -> Tensor:
        """(C,) of the states (T, C) of a text."""
        if pooling == "last":
            return states[-1].clone()
        if pooling == "mean":
            # the state of BOS is large, and the same for all texts
            has_more = token_ids[0] == self.engine.tokenizer.bos_id and len(token_ids) > 1
            return states[int(has_more) :].mean(0)
        row = pooling(states)
        try:
            return torch.as_tensor(row)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"pooling must return a tensor, got {row!r:.80}") from None


def take_states(request: Request, index: int) -> Tensor:
    """Return the states (T, layers, C) of a finished request, and remove them from it."""
    seq = request.sequences[0]
    if seq.finish_reason != "length":
        raise RuntimeError(f"the hidden states of text {index} were aborted")
    states = seq.states
    seq.states = None
    return states


class Sample(NamedTuple):
    """A sample whose hidden states are computed."""

    prompt: int  # index in the call
    index: int  # of the sample
    token_ids: list[int]  # all tokens to compute
    request: Request


def add_to_output(sample: Sample, key: str, value: object) -> None:
    """Add a key to the output of a sample; for sample 0 also at the top level."""
    output = sample.request.output
    if "samples" in output:  # a scored continuation has no samples
        output["samples"][sample.index][key] = value
    if sample.index == 0:
        output[key] = value


def keep_in_output(samples: list[Sample], position: int, states: Tensor) -> None:
    """Put the states of a sample into its output."""
    add_to_output(samples[position], "hidden_states", states)


class StatesWriter:
    """Writes hidden states to a file of raw numbers (tokens, layers, C), and their positions to a
    JSON file beside it. Both appear when all is written; after an exception, neither does."""

    def __init__(self, selection: Selection):
        self.selection = selection
        self.unfinished = Path(f"{selection.path}.partial")
        self.num_tokens = 0
        self.width = 0
        self.texts: list[dict] = []

    def __enter__(self) -> StatesWriter:
        self.file = open(self.unfinished, "wb")
        return self

    def write(self, samples: list[Sample], position: int, states: Tensor) -> None:
        """Append the states of a sample, and add their rows in the file to its output."""
        sample = samples[position]
        states.contiguous().view(torch.uint8).numpy().tofile(self.file)
        start = self.num_tokens
        self.num_tokens += len(states)
        self.width = states.shape[2]
        rows = (start, self.num_tokens)
        self.texts.append({"prompt": sample.prompt, "sample": sample.index, "rows": rows})
        add_to_output(sample, "hidden_states_rows", rows)

    def __exit__(self, error_type: type | None, *_) -> None:
        self.file.close()
        if error_type is not None:
            self.unfinished.unlink(missing_ok=True)
            return
        metadata = {
            "shape": [self.num_tokens, len(self.selection.layers), self.width],
            "layers": list(self.selection.layers),
            "dtype": str(self.selection.dtype).removeprefix("torch."),
            "texts": self.texts,
        }
        Path(f"{self.selection.path}.json").write_text(json.dumps(metadata), encoding="utf-8")
        os.replace(self.unfinished, self.selection.path)


def load_hidden_states(path: str | Path) -> tuple[Tensor, dict]:
    """Load what `hidden_states={"path": path, ...}` has written. Returns the states (tokens,
    layers, C), memory-mapped, and a dict with layers, dtype and texts, each with prompt, sample and
    rows. Raises FileNotFoundError, or ValueError for files that do not belong together."""
    path = Path(path)
    metadata = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
    shape = metadata["shape"]
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    if metadata["dtype"] not in dtypes or len(shape) != 3:
        raise ValueError(f"{path}.json describes no hidden states: {metadata!r:.200}")
    dtype = dtypes[metadata["dtype"]]
    num_numbers = shape[0] * shape[1] * shape[2]
    if path.stat().st_size != num_numbers * dtype.itemsize:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, which do not match {path}.json: {shape}"
        )
    if num_numbers == 0:
        return torch.empty(shape, dtype=dtype), metadata
    flat = torch.from_file(str(path), shared=False, size=num_numbers, dtype=dtype)
    return flat.view(shape), metadata
