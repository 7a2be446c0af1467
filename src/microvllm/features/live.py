"""Live nanochat modules: an engine follows the weights of a GPT during training. Also new weights
for any running engine, and an engine that sleeps while other code needs its memory.

How a change is detected at the start of a step, or of a call of several steps:

    change                                    detected by                        checked
    p.add_(x), load_state_dict, foreach       Tensor._version                    in every step
    p.data = x, to(dtype), a new Parameter    the object, the address            in every step
    optimizer.step(), also fused ones         a hook that torch calls after it   in every step
    p.data.add_(x), numpy, other libraries    the first number of each tensor    in every step, CPU
                                              the first number of each row       if nothing runs

Other changes, such as a single number that is written without autograd, need
`update_weights(gpt)`. If another thread writes during a step, this step may use a mixture of old
and new weights; the next step computes everything again.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..checkpoint import empty_model
from ..engine import LLM
from ..model import GPTConfig, Recipe
from ..resources import release_freed_memory
from ..sources import strict


def from_module(module) -> tuple[GPTConfig, Recipe, dict[str, Tensor]]:
    """Return config, recipe and weights (not copied) of a live nanochat GPT, compiled or not.
    Raises TypeError for another object, ValueError for an unknown era."""
    config = getattr(module, "config", None)
    fields = vars(config) if hasattr(config, "__dict__") else {}
    # modules of other families have a config too
    if not isinstance(module, torch.nn.Module) or "n_embd" not in fields:
        requirement = "with its config and weights (a forward alone has no K and V to page)"
        raise TypeError(
            f"model must be a nanochat GPT module {requirement}, got {type(module).__name__}"
        )
    source = f"the module {type(module).__name__}"
    config = strict.make_config(fields, source)
    weights = weights_of(module)
    # this package's GPTConfig has a window pattern in all eras, so it does not indicate the era
    is_ours = isinstance(module.config, GPTConfig)
    meta = {} if is_ours else fields
    recipe = strict.recognise_strictly(weights, config, source, meta, live=True)
    return config, recipe, weights


def weights_of(module) -> dict[str, Tensor]:
    """Return the state dict of a module, compiled or not, without a copy."""
    return strict.without_prefix(module.state_dict(), f"the module {type(module).__name__}")


class Snapshot:
    """The state of a module's weights at one moment; `differs` checks for changes. It has no
    copies, but holds the tensors' memory, since another tensor could get a freed address."""

    def __init__(self, module):
        # all tables of the module and its parts, with their parts and parameters
        tables = []
        for part in module.modules():
            tables += [part._modules, part._parameters]
        self.slots = [(table, name) for table in tables for name in table]
        self.values = [table[name] for table, name in self.slots]
        self.tensors = [value for value in self.values if isinstance(value, Tensor)]
        # read first, so that later changes are detected
        self.versions = self.read_versions()
        self.is_stepped = False  # whether an optimizer has changed the weights
        self.stored = [tensor.data for tensor in self.tensors]
        first_numbers = [x.as_strided((1,), (1,)) for x in self.stored if x.is_cpu]
        first_columns = [x[..., 0] if x.ndim > 1 else x for x in self.stored]
        self.samples = {False: first_numbers, True: first_columns}  # keyed by `closely`
        self.sample_bytes = {closely: to_bytes(x) for closely, x in self.samples.items()}
        self.watch_optimizers()

    def watch_optimizers(self) -> None:
        """Detect steps of optimizers that have one of the tensors, for the life of this object."""
        tensor_ids = {id(tensor) for tensor in self.tensors}
        get_snapshot = weakref.ref(self)

        def after_step(optimizer, *_) -> None:
            snapshot = get_snapshot()
            for group in optimizer.param_groups:
                if snapshot is not None and not tensor_ids.isdisjoint(map(id, group["params"])):
                    snapshot.is_stepped = True

        handle = register_optimizer_step_post_hook(after_step)
        weakref.finalize(self, handle.remove)

    def read_versions(self) -> list[int]:
        """Return the version of each tensor. Tensors made in inference mode have none."""
        return [0 if x.is_inference() else x._version for x in self.tensors]

    def is_moved(self) -> bool:
        """Return whether a tensor or a part was replaced, or has moved in memory."""
        values = [table.get(name) for table, name in self.slots]
        if list(map(id, values)) != list(map(id, self.values)):
            return True
        addresses = [x.data_ptr() for x in self.tensors]
        return addresses != [x.data_ptr() for x in self.stored]

    def differs(self, closely: bool) -> bool:
        """Return whether a weight has changed. closely: compare a number of each row, which waits
        for a GPU."""
        if self.is_stepped or self.is_moved() or self.read_versions() != self.versions:
            return True
        return not torch.equal(to_bytes(self.samples[closely]), self.sample_bytes[closely])


def to_bytes(parts: list[Tensor]) -> Tensor:
    """Return copies of one-dimensional tensors as bytes, so that a NaN equals itself."""
    return torch.cat(parts or [torch.empty(0)]).view(torch.uint8)


class LiveWeights:
    """An engine's weights: follows those of a live module, replaces weights, and implements sleep.

    module: a live nanochat GPT, or None for an engine of a file; build(config, recipe, weights):
    makes the engine's model from the module's weights.
    """

    engine: LLM

    def __init__(self, module=None, build: Callable | None = None):
        self.module = module
        self.build = build
        self.snapshot: Snapshot | None = None  # the module's weights that the engine has
        self.is_asleep = False
        self.next_version: int | None = None  # version of weights set during sleep

    def attach(self, engine: LLM) -> None:
        """Called by the engine's loop (loops/live.py) when it is created."""
        self.engine = engine

    def take(self):
        """Build a model of the module's present weights, and follow them from now on. Raises
        TypeError or ValueError like `from_module`."""
        from_module(self.module)  # raises for an unsupported module
        snapshot = Snapshot(self.module)  # taken before the weights are read
        model = self.build(*from_module(self.module))
        self.snapshot = snapshot
        return model

    def refresh(self) -> None:
        """Before a step: wake, or apply changed weights."""
        if self.is_asleep:
            self.wake_now()
        elif self.snapshot is not None:
            if self.snapshot.differs(closely=not self.engine.scheduler.running):
                self.follow()

    def follow(self, version: int | None = None) -> None:
        """Apply the module's weights, and compute K and V of all requests again."""
        engine = self.engine
        engine.loop.drain()
        if self.snapshot.is_moved():  # shared tensors and recorded addresses are invalid
            self.sleep_now()
            self.next_version = version
            self.wake_now()
            return
        snapshot = Snapshot(self.module)
        self.announce(version)
        with torch.inference_mode():  # the model's tensors may have been made in this mode
            engine.model.load_state_dict(weights_of(self.module))
        engine.reset()
        self.snapshot = snapshot

    def announce(self, version: int | None) -> None:
        """Notify the extensions of new weights. Launched steps must have finished."""
        for on_weights in self.engine.hooks.on_weights:
            on_weights(version)

    def update_weights(self, weights, version: int | None = None) -> None:
        """Replace the weights in place. weights: a state dict of the same shapes, or a module. The
        prefix cache is emptied, and running requests recompute their K and V. For a live module the
        weights are written to the module. version: the version of the weights, for extensions.
        Raises ValueError, and changes nothing, if a tensor is missing or has the wrong shape."""
        engine = self.engine
        engine.guard.check_open()
        state = weights.state_dict() if hasattr(weights, "state_dict") else weights
        if not isinstance(state, dict) or not all(isinstance(w, Tensor) for w in state.values()):
            raise TypeError(f"weights must be a state dict, or a module, got {weights!r:.80}")
        state = {name.removeprefix("_orig_mod."): weight for name, weight in state.items()}
        strict.check_weights(state, engine.model.config, engine.model.recipe)
        engine.guard.perform(lambda: self.write_weights(state, version))

    def write_weights(self, state: dict[str, Tensor], version: int | None) -> None:
        """`update_weights` with a checked state dict."""
        engine = self.engine
        engine.loop.drain()
        if self.module is None:
            self.announce(version)
            with torch.inference_mode():
                engine.model.load_state_dict(state)
            engine.reset()
            return
        with torch.inference_mode():
            for name, weight in weights_of(self.module).items():
                if weight.data_ptr() != state[name].data_ptr():
                    weight.copy_(state[name])
        if self.is_asleep:
            self.next_version = version
        else:
            self.follow(version)

    def sleep(self) -> None:
        """Free the memory of the KV cache, and of weights that a live module also has, until `wake`
        or a call that needs a step. Unfinished requests keep their tokens and recompute K and V."""
        self.engine.guard.perform(self.sleep_now)

    def wake(self) -> None:
        """Allocate the memory that `sleep` freed, and load the live module's present weights.
        Raises ValueError if memory is insufficient; the engine then stays asleep."""
        self.engine.guard.perform(self.wake_now)

    def sleep_now(self) -> None:
        """`sleep`, called with the guard."""
        if self.is_asleep:
            return
        self.engine.loop.drain()
        self.is_asleep = True
        self.engine.reset()
        self.drop_memory()

    @torch.inference_mode(False)  # CUDA graphs cannot use inference tensors
    def wake_now(self) -> None:
        """`wake`, called with the guard."""
        if not self.is_asleep:
            return
        engine = self.engine
        try:
            if self.module is not None:
                engine.model = self.take()
            engine.allocate()
            engine.runner.bind(engine.model, engine.cache)
            if self.module is not None:  # it may have been trained in the meantime
                self.announce(self.next_version)
                engine.reset()
        except BaseException as error:
            self.drop_memory()
            if isinstance(error, ValueError):
                raise ValueError(f"the engine is asleep and cannot wake: {error}") from None
            raise
        self.next_version = None
        self.is_asleep = False

    def drop_memory(self) -> None:
        """Free the KV cache, and the model if the module has its weights."""
        engine = self.engine
        if self.module is not None:
            self.snapshot = None
            # requests are checked with the model's config, even without a step
            config = engine.model.config
            engine.model = empty_model(config, engine.model.recipe, config.vocab_size)
        engine.cache.release()
        engine.runner.bind(engine.model, None)
        release_freed_memory(engine.device)

    def close(self) -> None:
        """Release the module, after the engine was closed."""
        self.module = None
        self.build = None
        self.snapshot = None
