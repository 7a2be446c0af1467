"""Decode steps as CUDA graphs: one launch instead of some three hundred.

A step in which every sequence computes one token has the same kernels each time; only the numbers
in its batch differ. So it is recorded once per batch size, and replayed after the new numbers were
copied to where the recorded kernels read them. Rows that pad a batch to a recorded size are
sequences of one token in block 0, the sink.

For a step of a few rows there are products with norm, residual add and relu^2 fused into them. They
are timed beside the library's when the engine starts, and the fastest are kept.
"""

import gc
import statistics
import warnings
from contextlib import suppress
from itertools import product

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import free_memory, require_memory
from ..engine import Batch, Runner
from ..fused.backend import NO_FILTERS, filter_values
from ..fused.linear import Linear
from ..scheduler import Plan
from . import launch
from .sampler import sample
from .steps import linear_add, norm_linear

# fields of a row beside its slots and block tables; cu_seqlens never changes
FIELDS = 9  # ids, prev_ids, positions, seq_lens, temperature, noise, top_k, top_p, min_p
MAX_FEW_ROWS = 8  # the largest batch for which `few_rows_step` is tried
OUTPUTS = (2, 1), (4, 1), (4, 4)  # of a program in `few_rows_step`, all are tried
FAILED: list[torch.cuda.CUDAGraph] = []  # kept: to destroy one whose capture failed can fail, too
TRIALS = 8  # timed replays of each way, each with another token; more than there are ways


def few_rows_step(
    model, batch: Batch, cache, outputs: tuple[int, int], out: Tensor | None = None
) -> Tensor:
    """The logits (R, V) of a few rows that decode: model.forward and model.logits in two thirds of
    the kernels, with norms that are not rounded. outputs: that a program of a product computes, and
    one of the MLP's second, whose rows are four times as long; out: where the logits go."""
    recipe, backend = model.recipe, model.backend
    tiles, long = ({"outputs": n} for n in outputs)
    x = x0 = model.embed(batch)  # (1)
    eps, backout = recipe.eps, ()
    for i, (layer, (k, v, view)) in enumerate(zip(model.layers, cache.layers(batch), strict=True)):
        # (2), the norm and (3) project; (4) rotate and norm, (5) write K and V, then attend
        scaled = x0, layer.resid_lambda, layer.x0_lambda
        qkv, h = norm_linear(x, layer.qkv.weight, eps, *scaled, **tiles)
        q = backend.rope_store(
            qkv, h, layer.ve, layer.ve_gate, model.cos, model.sin, view, k, v,
            model.config.n_head, recipe.qk_scale, recipe.gate_scale, eps,
        )  # fmt: skip
        y = backend.attend(q, k, v, view, layer.window)
        x = linear_add(y.flatten(1), layer.proj.weight, x, *scaled, **tiles)
        y, _ = norm_linear(x, layer.fc.weight, eps, relu2=True, **tiles)  # (6)
        x = linear_add(y, layer.mlp_proj.weight, x, **long)
        if recipe.smear and i == model.config.n_layer // 2:  # (7)
            minus = -model.backout_lambda.float()
            backout = x, torch.ones_like(minus), minus
    head = model.lm_head.weight[: model.config.vocab_size]
    return norm_linear(x, head, eps, *backout, out=out, **tiles)[0]


def takes_few_rows(model) -> bool:
    """Does `few_rows_step` fit a model? On NVIDIA cards, from triton 3.4 on, and if each matrix is
    one tensor with torch's product: not a live module's parts, float8, or deterministic=True."""
    plain = all(type(w) is Linear for w in model.linears.values()) and has_torchs_product(model)
    return plain and launch.TRITON_34 and torch.version.hip is None


def has_torchs_product(model) -> bool:
    """Are a model's products torch's own?"""
    return model.backend.product is torch.nn.functional.linear


def fastest(times: dict[str, list[float]]) -> str:
    """Whose median is the least."""
    return min(times, key=lambda way: statistics.median(times[way]))


class DecodeGraphs:
    """Recorded decode steps for batch sizes 1, 2, 4, 8, the multiples of 16, and the largest. They
    read the weights of `model` and the blocks of `cache` at their present addresses. `ways` says
    how the steps of a few rows run, by size."""

    def __init__(self, model, cache, max_batch_size: int, max_model_len: int):
        self.model, self.cache, self.max_model_len = model, cache, max_model_len
        sizes = 1, 2, 4, 8, *range(16, max_batch_size, 16)
        self.sizes = [size for size in sizes if size < max_batch_size] + [max_batch_size]
        self.columns = -(-max_model_len // cache.block_size)  # of the block tables
        # of layers, each with a slot and a table of its own; a plain cache knows no groups
        self.groups = getattr(cache, "num_groups", 1)
        self.width = FIELDS + self.groups * (1 + self.columns)  # of a row
        what = f"the inputs of recorded steps, with tables of {self.columns} blocks"
        remedy = "lower max_model_len or max_batch_size, or give cuda_graphs=False"
        free = free_memory(model.device)
        require_memory(what, 4 * max_batch_size * self.width, free, remedy)
        # where the recorded kernels read: those of a smaller size nearer to the beginning
        ints = {"dtype": torch.int32, "device": model.device}
        self.inputs = torch.zeros(max_batch_size * self.width, **ints)
        self.cu_seqlens = torch.arange(max_batch_size + 1, **ints)
        self.last = torch.zeros(max_batch_size, **ints)  # the newest tokens
        # and what they were drawn from, 67 MB of 512 rows and 65,536 ids: graphs share their memory
        shape, kind = (max_batch_size, model.config.vocab_size), {"dtype": model.dtype}
        self.logits = torch.empty(shape, device=model.device, **kind)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.ways: dict[int, str] = {}
        self.pool = torch.cuda.graph_pool_handle()
        # torch's own is one of a process, on the device that was the current one at first
        self.stream = torch.cuda.Stream(model.device)
        self.broken = False  # has a capture failed? then there is no other
        gc.freeze()  # older versions of torch collect garbage before every capture: leave them none
        try:
            # up to torch 2.10 all graphs of a process share the generator's tensors, and those made
            # in inference_mode nobody may change outside it: a user's own capture would fail
            with torch.no_grad():
                for size in reversed(self.sizes):  # the largest first: the others reuse its memory
                    self.graphs[size] = self._record(size)
                few = [
                    n for n in reversed(self.sizes) if n <= MAX_FEW_ROWS and takes_few_rows(model)
                ]
                for size, graphs in self._record_few_rows(few).items():
                    self._choose(size, graphs)
        finally:
            gc.unfreeze()

    def _record(self, size: int, outputs: tuple = ()) -> torch.cuda.CUDAGraph:
        """Run the step once, so that all kernels are compiled and loaded, then capture it.
        outputs: of `few_rows_step`, () for the library's products."""
        self.inputs.zero_()
        self._split(self.inputs, size)[0][3] = 1  # sequences of one token, in the sink
        self._decode(size, outputs)
        torch.cuda.synchronize(self.model.device)
        return self._capture(size, outputs)

    def _capture(self, size: int, outputs: tuple) -> torch.cuda.CUDAGraph:
        """Capture a step. Where that fails, torch leaves the thread on the stream of the capture,
        and older ones the allocator in the pool: both are put back."""
        device, graph = self.model.device, torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(device)
        how = {"pool": self.pool, "stream": self.stream}
        try:
            # in the default mode a call of CUDA by any other thread ends the capture
            with torch.cuda.graph(graph, capture_error_mode="thread_local", **how):
                self._decode(size, outputs)
        except BaseException:
            self.broken = True
            FAILED.append(graph)
            torch.cuda.set_stream(before)
            with suppress(Exception):  # it did so itself, or is an older torch
                torch._C._cuda_endAllocateToPool(device.index, self.pool)
            raise
        return graph

    def _record_few_rows(self, sizes: list[int]) -> dict[int, dict[str, torch.cuda.CUDAGraph]]:
        """All ways to run steps of these sizes. What is likelier to fail comes later, and after a
        failed capture there is no other."""
        found = {size: {"library": self.graphs[size]} for size in sizes}
        can = launch.can_start_early(self.model.device)
        for early, size, outputs in product((False, True)[: 1 + can], sizes, OUTPUTS):
            way = f"few_rows, {outputs}" + ", early" * early
            try:
                with launch.early_start(early):
                    found[size][way] = self._record(size, outputs)
            except Exception as error:  # the compiler's, or no memory: the library's is there
                what = f"no decode steps of {size} rows by {way!r} here: {error!r:.300}"
                warnings.warn(what, stacklevel=2)
                if self.broken:
                    break
        return found

    def _choose(self, size: int, graphs: dict[str, torch.cuda.CUDAGraph]) -> None:
        """Keep the fastest way to run a step of so many rows: all are timed, in turns."""
        self.inputs.zero_()
        fields, _ = self._split(self.inputs, size)
        fields[3] = 1  # sequences of one token, in the sink
        events, logits = {way: [] for way in graphs}, {way: {} for way in graphs}
        trials = min(TRIALS, self.model.config.vocab_size)
        # all are queued before the first ends: the time of the launches is not in that of the runs
        for trial in range(trials):
            for turn, (way, graph) in enumerate(graphs.items()):
                # never the token of the run before: what that one left in the buffers is wrong here
                fields[0] = token = (trial - turn) % trials
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record(), graph.replay(), last.record()
                events[way].append((first, last))
                logits[way][token] = self.logits[:size].view(torch.uint8).clone()  # NaN is NaN
        torch.cuda.synchronize(self.model.device)
        times = {way: [a.elapsed_time(b) for a, b in pairs] for way, pairs in events.items()}
        self.inputs.zero_()
        # early or not, the sums are the same; where they are not, a kernel did not wait
        for way in [way for way in graphs if way.endswith("early")]:
            plain = logits.get(way.removesuffix(", early"))
            if not plain or not all(torch.equal(x, plain[t]) for t, x in logits[way].items()):
                warnings.warn("kernels that start early err on this card: unused", stacklevel=2)
                del times[way]
        self.ways[size] = fastest(times)
        self.graphs[size] = graphs[self.ways[size]]

    def replay(self, batch: Batch, params, last: Tensor | None) -> tuple[Tensor, ...]:
        """Run a batch (numpy), params being its rows' SamplingParams, and last the tokens of the
        step before, for ids that are ~row. Returns, on the device, (R,) tokens, as they are where
        all rows are plain, and what others are made from: logits (R, V), temperature and noise
        (R,). The next replay writes there: copies are to be queued on its stream before it."""
        if last is not None and last.data_ptr() != self.last.data_ptr():
            # they come from a step that was no graph, where -1 says that nothing could be drawn
            self.last[: len(last)].copy_(last.clamp(min=0))
        rows = len(batch.ids)
        size = next(size for size in self.sizes if size >= rows)
        # pinned, so that the host goes on: torch keeps the memory until the copy is done
        pinned = torch.empty(size * self.width, dtype=torch.int32, pin_memory=True)
        fields, tables = self._split(pinned.numpy(), size)
        fields[:4, :rows] = batch.ids, batch.prev_ids, batch.positions, batch.seq_lens
        floats = fields[:, :rows].view(np.float32)
        floats[4], floats[5] = batch.temperature, batch.noise
        filters = filter_values(params)
        floats[6:9] = np.array([NO_FILTERS] if filters is None else filters).T
        fields[FIELDS:, :rows] = batch.slots
        fields[:, rows:] = 0
        fields[3, rows:] = 1  # a padding row is a sequence of one token
        used = batch.block_tables.shape[-1]
        tables[:, :rows, :used] = batch.block_tables
        tables[:, :rows, used:] = tables[:, rows:] = 0
        self.inputs[: len(pinned)].copy_(pinned, non_blocking=True)
        self.graphs[size].replay()
        temperature, noise = self._split(self.inputs, size)[0][4:6, :rows].view(torch.float32)
        return self.last[:rows], self.logits[:rows], temperature, noise

    def _split(self, flat, size: int):
        """The inputs of so many rows as (FIELDS + groups, size) and (groups, size, columns)."""
        rows = FIELDS + self.groups
        fields, tables = flat[: rows * size], flat[rows * size : self.width * size]
        return fields.reshape(rows, size), tables.reshape(self.groups, size, self.columns)

    def _decode(self, size: int, outputs: tuple) -> None:
        """What is recorded: read the inputs, forward, sample, leave the tokens in `last` and what
        they were drawn from in `logits`."""
        model, cache = self.model, self.cache
        fields, tables = self._split(self.inputs, size)
        ids, prev_ids, positions, seq_lens = fields[:4]
        temperature, noise, *filters = fields[4:FIELDS].view(torch.float32)
        cu_seqlens, slots = self.cu_seqlens[: size + 1], fields[FIELDS:]
        ids = torch.where(ids < 0, self.last[(~ids).clamp(min=0)].clamp(min=0), ids)
        if not hasattr(cache, "num_groups"):
            slots, tables = slots[0], tables[0]
        batch = Batch(
            ids, prev_ids, positions, slots, cu_seqlens, seq_lens, tables, cu_seqlens[:-1],
            temperature, noise, num_decodes=size, max_query=1, max_seq=self.max_model_len,
        )  # fmt: skip
        logits, head = self.logits[:size], model.lm_head
        if outputs:
            few_rows_step(model, batch, cache, outputs, logits)
        elif type(head) is Linear and has_torchs_product(model):  # without a copy of the logits
            h = model.forward(batch, cache)
            torch.mm(h.to(head.dtype), head.weight[: head.rows].t(), out=logits)
        else:
            logits.copy_(model.logits(model.forward(batch, cache)))
        self.last[:size].copy_(sample(logits, temperature, noise, model.recipe.softcap, filters))


def can_replay(plan: Plan) -> bool:
    """Is it a step that was recorded: one row per sequence, each sampled once?"""
    _, start, stop = plan.chunks[-1]  # longer chunks come last
    owners = [index for index, _, _ in plan.samples]
    return stop - start == 1 and owners == list(range(len(plan.chunks)))


class GraphRunner(Runner):
    """Replays the steps that were recorded, and runs all others."""

    graphs: DecodeGraphs | None = None
    last: Tensor | None = None  # (R,) tokens of the step before, see AheadRunner

    def record(self, max_batch_size: int, max_model_len: int) -> None:
        """Record the steps of up to so many sequences of up to so many tokens."""
        self.graphs = DecodeGraphs(self.model, self.cache, max_batch_size, max_model_len)

    def launch(self, plan: Plan) -> None:
        if self.graphs is None or not can_replay(plan):
            return super().launch(plan)
        events, batch = self.blocks.events, self.batch(plan)
        events.lap("batch")
        self.cache.copy_blocks(plan.copies)
        tokens, *drawn_from = self.graphs.replay(batch, plan.params, self.last)
        # where a feature changes logits or looks at them; else the draw is in the graph
        if False in [getattr(p, "plain", True) for p in plan.params]:
            events.lap("forward")
            tokens = self.pick(plan, *drawn_from)
        plan.results["tokens"] = tokens
        events.lap("sample")
