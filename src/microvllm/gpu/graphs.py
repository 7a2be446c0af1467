"""Decode steps as CUDA graphs: one launch instead of some three hundred.

A step in which every sequence computes one token always has the same kernels; only the numbers in
its batch differ. The step is recorded once for each batch size. To replay it, the new numbers are
copied to the memory that the recorded kernels read. Rows that pad a batch to a recorded size are
sequences of one token in the null block.

Steps of one or two rows can use products with norm, residual add and relu^2 fused into them. The
engine times them and the library's products when it starts, and keeps the faster ones.
"""

import gc
import statistics
import warnings
from contextlib import suppress
from itertools import product

import numpy as np
import torch
from torch import Tensor

from ..attention import Batch, HostBatch, PagedKVCache, make_batch
from ..checkpoint import require_memory
from ..environment import free_memory
from ..features.windows import GroupedKVCache
from ..fused.backend import NO_FILTERS, filter_values
from ..fused.linear import Linear
from ..fused.model import FusedGPT
from ..loops.ahead import AheadRunner
from ..resources import fits
from ..sampler import SamplingParams
from ..scheduler import Plan
from . import launch, say
from .backend import Float8
from .elementwise import linear_add, norm_linear
from .sampler import sample

# Fields of a row beside its slots and block tables; cu_seqlens never changes: token_ids,
# prev_token_ids, positions, seq_lens, temperature, uniform, top_k, top_p, min_p
NUM_FIELDS = 9
POSITIONS = 2
SEQ_LENS = 3
TEMPERATURE = 4
UNIFORM = 5
FILTERS = slice(6, 9)
MAX_FEW_ROWS = 2  # the largest batch for which `few_rows_step` is timed
FEW_ROWS = "few_rows"  # the ways to run a step are these two and "library"
EARLY = "few_rows, early"
FAILED: list[torch.cuda.CUDAGraph] = []  # kept, because destroying a failed capture can fail, too
TRIALS = 8  # timed replays of each way, with different tokens and contexts
LONGEST_TRIAL = 512  # tokens of the longest context among them


def few_rows_step(
    model: FusedGPT, batch: Batch, cache: PagedKVCache, out: Tensor | None = None
) -> Tensor:
    """The logits (R, V) of a few decoding rows: model.forward and model.logits with two thirds of
    the kernels, and norms that are not rounded. out: the tensor for the logits."""
    recipe = model.recipe
    backend = model.backend
    eps = recipe.eps
    x = model.embed(batch)  # (1)
    x0 = x
    backout = {}
    for i, (layer, kv) in enumerate(zip(model.layers, cache.layers(batch), strict=True)):
        # (2), the norm and (3) project; (4) rotate and norm, (5) write K and V, then attend
        # without lambdas there is no x0, so that no second variant of each kernel is compiled
        mix = {}
        if recipe.lambdas:
            mix = {"x0": x0, "a": layer.resid_lambda, "b": layer.x0_lambda}
        qkv, h = norm_linear(x, eps=eps, **weights_of(layer.qkv), **mix)
        q = backend.rope_store(
            qkv, h, layer.ve, layer.ve_gate, model.cos, model.sin, kv.batch, kv.k, kv.v,
            model.config.n_head, recipe.qk_scale, recipe.gate_scale, eps,
        )  # fmt: skip
        y = backend.attend(q, kv.k, kv.v, kv.batch, layer.window)
        x = linear_add(y.flatten(1), stream=x, **weights_of(layer.proj), **mix)
        y, _ = norm_linear(x, eps=eps, relu2=True, **weights_of(layer.fc))  # (6)
        # rows are four times as long, so with one output a program reads as many weights
        x = linear_add(y, stream=x, outputs=1, **weights_of(layer.mlp_proj))
        if recipe.smear and i == model.config.n_layer // 2:  # (7)
            minus = -model.backout_lambda.float()
            backout = {"x0": x, "a": torch.ones_like(minus), "b": minus}
    logits, _ = norm_linear(x, eps=eps, out=out, **weights_of(model.lm_head), **backout)
    return logits


def weights_of(linear: Linear) -> dict[str, Tensor]:
    """Arguments of `norm_linear` and `linear_add`: weights without padding, and their scales."""
    weights = {"w": linear.weight[: linear.rows]}
    if type(linear) is Float8:
        weights["scales"] = linear.scale[: linear.rows]
    return weights


def takes_few_rows(model: FusedGPT) -> bool:
    """Can `few_rows_step` run a model? The backend must have its kernels, and each matrix must be
    one tensor with torch's product. This excludes live modules and deterministic=True."""
    has_whole_weights = all(type(linear) in (Linear, Float8) for linear in model.linears.values())
    return model.backend.few_rows and has_whole_weights and has_torchs_product(model)


def has_torchs_product(model: FusedGPT) -> bool:
    """Are a model's products torch's own?"""
    return model.backend.product is torch.nn.functional.linear


def fastest(times: dict[str, list[float]]) -> str:
    """The way with the lowest median."""
    return min(times, key=lambda way: statistics.median(times[way]))


class DecodeGraphs:
    """Recorded decode steps for batch sizes 1, 2, 4, 8, the multiples of 16, and the largest.

    model, cache: the steps read their weights and blocks at the present addresses; max_batch_size:
    sequences of the largest step; max_positions: the most tokens of a sequence. `ways` has the
    fastest way to run a step of each small size. Raises ValueError if there is not enough memory
    for the inputs.
    """

    def __init__(
        self,
        model: FusedGPT,
        cache: PagedKVCache,
        max_batch_size: int,
        max_positions: int,
    ):
        self.model = model
        self.cache = cache
        self.max_positions = max_positions
        sizes = [size for size in (1, 2, 4, 8) if size < max_batch_size]
        self.sizes = [*sizes, *range(16, max_batch_size, 16), max_batch_size]
        self.num_columns = -(-max_positions // cache.block_size)  # of the block tables
        # groups of layers, each with its own slots and tables. a plain cache has one
        self.num_groups = cache.num_groups if isinstance(cache, GroupedKVCache) else 1
        self.row_len = NUM_FIELDS + self.num_groups * (1 + self.num_columns)  # numbers of a row
        self.allocate(max_batch_size)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.ways: dict[int, str] = {}
        self.pool = torch.cuda.graph_pool_handle()
        # torch's capture stream is global, on the device that was current when it was made
        self.stream = torch.cuda.Stream(model.device)
        self.is_broken = False  # has a capture failed? then there are no more captures
        gc.freeze()  # older versions of torch collect garbage before each capture
        try:
            # up to torch 2.10 all graphs of a process share the tensors of the random generator. if
            # they were made in inference_mode, a capture by the user would fail
            with torch.no_grad():
                self.record_all()
        finally:
            gc.unfreeze()

    def allocate(self, max_batch_size: int) -> None:
        """Make the tensors that the recorded kernels read and write."""
        device = self.model.device
        require_memory(
            f"the inputs of recorded steps, with tables of {self.num_columns} blocks",
            4 * max_batch_size * self.row_len,
            free_memory(device),
            "lower max_model_len or max_batch_size, or pass cuda_graphs=False",
        )
        # smaller sizes use the beginning
        self.inputs = torch.zeros(max_batch_size * self.row_len, dtype=torch.int32, device=device)
        self.cu_seqlens = torch.arange(max_batch_size + 1, dtype=torch.int32, device=device)
        # the tokens of the latest step
        self.token_ids = torch.zeros(max_batch_size, dtype=torch.int32, device=device)
        # the logits: 67 MB for 512 rows and 65,536 ids. all graphs share this memory
        shape = (max_batch_size, self.model.config.vocab_size)
        self.logits = torch.empty(shape, dtype=self.model.dtype, device=device)

    def record_all(self) -> None:
        """Record the steps of all sizes, and those of a few rows in the fastest way."""
        descending = self.sizes[::-1]  # the largest first, whose memory the others reuse
        for size in descending:
            self.graphs[size] = self.record(size)
        if takes_few_rows(self.model):
            few = [size for size in descending if size <= MAX_FEW_ROWS]
            for size, graphs in self.record_few_rows(few).items():
                self.choose(size, graphs)

    def record(self, size: int, few_rows: bool = False) -> torch.cuda.CUDAGraph:
        """Run the step once, so that all kernels are compiled and loaded, then capture it.
        few_rows: use `few_rows_step` instead of the library's products."""
        self.clear_inputs(size)
        self.decode(size, few_rows)
        torch.cuda.synchronize(self.model.device)
        return self.capture(size, few_rows)

    def clear_inputs(self, size: int) -> Tensor:
        """Write inputs of sequences of one token in the null block. Returns the fields
        (NUM_FIELDS + groups, size)."""
        self.inputs.zero_()
        fields, _ = self.split(self.inputs, size)
        fields[SEQ_LENS] = 1
        return fields

    def capture(self, size: int, few_rows: bool) -> torch.cuda.CUDAGraph:
        """Capture a step. If this fails, torch leaves the thread on the capture stream, and older
        versions leave the allocator in the pool: both are restored."""
        device = self.model.device
        graph = torch.cuda.CUDAGraph()
        stream_before = torch.cuda.current_stream(device)
        try:
            # in the default mode a CUDA call by another thread ends the capture
            with torch.cuda.graph(
                graph,
                pool=self.pool,
                stream=self.stream,
                capture_error_mode="thread_local",
            ):
                self.decode(size, few_rows)
        except BaseException:
            self.is_broken = True
            FAILED.append(graph)
            torch.cuda.set_stream(stream_before)
            with suppress(Exception):  # torch did so itself, or is an older version
                torch._C._cuda_endAllocateToPool(device.index, self.pool)
            raise
        return graph

    def record_few_rows(self, sizes: list[int]) -> dict[int, dict[str, torch.cuda.CUDAGraph]]:
        """Record steps of these sizes in all ways. Returns graphs by size and way. The ways that
        may fail come last, because there is no capture after a failed one."""
        graphs = {size: {"library": self.graphs[size]} for size in sizes}
        ways = {FEW_ROWS: False}
        if launch.TRIES_EARLY_START and launch.can_start_early(self.model.device):
            ways[EARLY] = True
        for way, size in product(ways, sizes):
            try:
                with launch.early_start(ways[way]):
                    graphs[size][way] = self.record(size, few_rows=True)
            except Exception as error:  # of the compiler or of memory; "library" remains
                warnings.warn(
                    f"decode steps of {size} rows cannot use {way!r} here: {error!r:.300}",
                    stacklevel=2,
                )
                if self.is_broken:
                    break
        return graphs

    def choose(self, size: int, graphs: dict[str, torch.cuda.CUDAGraph]) -> None:
        """Time all ways to run a step of `size` rows in turns, at contexts of several lengths in
        the null block, and keep the fastest."""
        fields = self.clear_inputs(size)
        longest = min(self.max_positions, LONGEST_TRIAL)
        events = {way: [] for way in graphs}
        logits = {way: {} for way in graphs}  # by token, as bytes: a NaN is equal to itself
        num_trials = min(TRIALS, self.model.config.vocab_size)
        # all are queued before the first ends, so that the times do not include launches
        for trial in range(num_trials):
            for turn, (way, graph) in enumerate(graphs.items()):
                # another token than in the previous run, whose results are still in the buffers
                token = (trial - turn) % num_trials
                fields[0] = token
                fields[POSITIONS] = token * (longest - 1) // max(num_trials - 1, 1)
                fields[SEQ_LENS] = fields[POSITIONS] + 1
                start = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                start.record()
                graph.replay()
                end.record()
                events[way].append((start, end))
                logits[way][token] = self.logits[:size].view(torch.uint8).clone()
        torch.cuda.synchronize(self.model.device)
        times = {}
        for way, pairs in events.items():
            times[way] = [start.elapsed_time(end) for start, end in pairs]
        self.inputs.zero_()
        if EARLY in logits and not are_equal(logits[EARLY], logits.get(FEW_ROWS)):
            warnings.warn(
                "kernels that start early compute wrong results on this card, so they are not used",
                stacklevel=2,
            )
            del times[EARLY]
        self.ways[size] = fastest(times)
        self.graphs[size] = graphs[self.ways[size]]

    def replay(
        self,
        batch: HostBatch,
        params: list[SamplingParams],
        last_token_ids: Tensor | None,
    ) -> tuple[Batch, Tensor, Tensor]:
        """Run a step.

        params: of the batch's rows; last_token_ids: the tokens of the previous step, for token ids
        that are ~row. Returns the batch with the temperature and the uniform numbers on the device,
        the logits (R, V), and the token ids (R,). The next replay overwrites them: queue copies on
        its stream before.
        """
        if last_token_ids is not None and last_token_ids.data_ptr() != self.token_ids.data_ptr():
            # they come from a step without a graph, where -1 means that no token could be drawn
            self.token_ids[: len(last_token_ids)].copy_(last_token_ids.clamp(min=0))
        num_rows = len(batch.token_ids)
        size = next(size for size in self.sizes if size >= num_rows)
        # pinned, so that the host does not wait. torch keeps the memory until the copy is done
        pinned = torch.empty(size * self.row_len, dtype=torch.int32, pin_memory=True)
        self.write_inputs(pinned.numpy(), size, batch, params)
        self.inputs[: len(pinned)].copy_(pinned, non_blocking=True)
        self.graphs[size].replay()
        fields, _ = self.split(self.inputs, size)
        floats = fields[:, :num_rows].view(torch.float32)
        # other fields remain numpy arrays, because no extension reads them (Extension.on_sampled)
        on_device = Batch._make(batch)
        on_device = on_device._replace(temperature=floats[TEMPERATURE], uniform=floats[UNIFORM])
        return on_device, self.logits[:num_rows], self.token_ids[:num_rows]

    def write_inputs(
        self, flat: np.ndarray, size: int, batch: HostBatch, params: list[SamplingParams]
    ) -> None:
        """Write a batch into the inputs of `size` rows. A padding row is a sequence of one token
        in the null block."""
        num_rows = len(batch.token_ids)
        num_columns = batch.block_tables.shape[-1]
        fields, tables = self.split(flat, size)
        integers = [batch.token_ids, batch.prev_token_ids, batch.positions, batch.seq_lens]
        fields[: len(integers), :num_rows] = integers
        floats = fields[:, :num_rows].view(np.float32)
        floats[TEMPERATURE] = batch.temperature
        floats[UNIFORM] = batch.uniform
        filters = filter_values(params)
        floats[FILTERS] = np.array([NO_FILTERS] if filters is None else filters).T
        fields[NUM_FIELDS:, :num_rows] = batch.slots
        fields[:, num_rows:] = 0
        fields[SEQ_LENS, num_rows:] = 1
        tables[:, :num_rows, :num_columns] = batch.block_tables
        tables[:, :num_rows, num_columns:] = 0
        tables[:, num_rows:] = 0

    def split(self, flat, size: int):
        """The inputs of `size` rows: fields (NUM_FIELDS + groups, size), the slots of each group
        last, and block tables (groups, size, columns)."""
        num_fields = NUM_FIELDS + self.num_groups
        fields = flat[: num_fields * size]
        tables = flat[num_fields * size : self.row_len * size]
        shape = (self.num_groups, size, self.num_columns)
        return fields.reshape(num_fields, size), tables.reshape(shape)

    def decode(self, size: int, few_rows: bool) -> None:
        """The recorded step: read the inputs, forward, sample; write the tokens to `token_ids` and
        the logits to `logits`."""
        model = self.model
        batch, filters = self.input_batch(size)
        logits = self.logits[:size]
        head = model.lm_head
        if few_rows:
            few_rows_step(model, batch, self.cache, logits)
        elif type(head) is Linear and has_torchs_product(model):  # without a copy of the logits
            hidden = model.forward(batch, self.cache)
            torch.mm(hidden.to(head.dtype), head.weight[: head.rows].t(), out=logits)
        else:
            logits.copy_(model.logits(model.forward(batch, self.cache)))
        softcap = model.recipe.softcap
        drawn = sample(logits, batch.temperature, batch.uniform, softcap, filters)
        self.token_ids[:size].copy_(drawn)

    def input_batch(self, size: int) -> tuple[Batch, list[Tensor]]:
        """The inputs of `size` rows as a batch, and top_k, top_p and min_p, each (size,)."""
        fields, tables = self.split(self.inputs, size)
        token_ids, prev_token_ids, positions, seq_lens = fields[:TEMPERATURE]
        temperature, uniform, *filters = fields[TEMPERATURE:NUM_FIELDS].view(torch.float32)
        last_token_ids = self.token_ids[(~token_ids).clamp(min=0)].clamp(min=0)
        slots = fields[NUM_FIELDS:]
        if not isinstance(self.cache, GroupedKVCache):
            slots = slots[0]
            tables = tables[0]
        cu_seqlens = self.cu_seqlens[: size + 1]
        batch = Batch(
            token_ids=torch.where(token_ids < 0, last_token_ids, token_ids),
            prev_token_ids=prev_token_ids,
            positions=positions,
            slots=slots,
            cu_seqlens=cu_seqlens,
            seq_lens=seq_lens,
            block_tables=tables,
            hidden_rows=cu_seqlens[:-1],
            temperature=temperature,
            uniform=uniform,
            num_decodes=size,
            max_query_len=1,
            max_seq_len=self.max_positions,
        )
        return batch, filters


def are_equal(logits: dict[int, Tensor], expected: dict[int, Tensor] | None) -> bool:
    """Are the logits of each token equal to those of the same kernels without an early start? If
    not, a kernel did not wait."""
    if expected is None:
        return False
    return all(torch.equal(logits[token], expected[token]) for token in logits)


def can_replay(plan: Plan) -> bool:
    """Is there a recorded step for this plan? It must have one row for each sequence, and one draw
    from each row."""
    longest = plan.chunks[-1]  # longer chunks come last
    has_decodes_alone = longest.num_tokens == 1 and not plan.extra_rows
    return has_decodes_alone and plan.draws.chunk_indices == list(range(len(plan.chunks)))


class GraphRunner(AheadRunner):
    """Replays recorded steps, and runs all others."""

    graphs: DecodeGraphs | None = None
    limits: tuple[int, int] | None = None  # of `record`

    def record(self, max_batch_size: int, max_positions: int) -> None:
        """Record the steps of up to max_batch_size sequences of up to max_positions tokens."""
        self.limits = (max_batch_size, max_positions)
        say("recording decode steps; kernels that are not on disk are compiled first")
        with fits("recorded steps (cuda_graphs=False records none)", self.model.device):
            self.graphs = DecodeGraphs(self.model, self.cache, max_batch_size, max_positions)

    def bind(self, model, cache: PagedKVCache | None) -> None:
        """As in Runner. Steps are recorded again, because the old ones read the former
        addresses."""
        super().bind(model, cache)
        self.graphs = None
        self.last_token_ids = None
        if self.limits is not None and cache is not None:
            self.record(*self.limits)

    @torch.inference_mode()
    def launch(self, plan: Plan) -> None:
        if self.graphs is not None and can_replay(plan):
            self.replay(plan, self.graphs)
            self.fetch_results(plan)
        else:
            super().launch(plan)

    def replay(self, plan: Plan, graphs: DecodeGraphs) -> None:
        """Run a recorded step. No hook sees hidden states, because the plan requests none."""
        arrays = make_batch(plan, self.blocks)
        for on_batch in self.hooks.on_batch:
            on_batch(plan, arrays)
        self.cache.copy_blocks(plan.copies)
        batch, logits, token_ids = graphs.replay(arrays, plan.params, self.last_token_ids)
        for on_sampled in self.hooks.on_sampled:
            on_sampled(plan, batch, logits, token_ids)
        plan.results["token_ids"] = token_ids
