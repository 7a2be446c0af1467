"""Live nanochat modules: an engine that follows the weights of a GPT while it is trained. Also new
weights for any engine that runs, and an engine that sleeps while others need its memory.

How a change is seen at the beginning of a step:

    what is done                              what shows it                      looked at
    p.add_(x), load_state_dict, foreach       Tensor._version                    in every step
    p.data = x, to(dtype), a new Parameter    the object, the address            in every step
    optimizer.step(), fused ones as well      a hook that torch calls after it   in every step
    p.data.add_(x), numpy, other libraries    the first number of each tensor    in every step, CPU
                                              the first number of each row       if nothing runs

For what even these miss, such as one number that is written behind autograd's back, there is
`update_weights(gpt)`. A step during which another thread writes may draw from a mixture of old and
new weights; the next one computes everything again.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..checkpoint import empty_model
from ..engine import LLM
from ..model import GPTConfig, Recipe
from ..sources import strict


def from_module(module) -> tuple[GPTConfig, Recipe, dict[str, Tensor]]:
    """Config, recipe and weights (not copied) of a live nanochat GPT, compiled or not. Raises
    TypeError for what is no nanochat GPT, ValueError for one of an unknown era."""
    config = getattr(module, "config", None)
    given = vars(config) if hasattr(config, "__dict__") else {}
    # other families' modules have a config too
    if not isinstance(module, torch.nn.Module) or "n_embd" not in given:
        what = "with its config and weights (a forward alone has no K and V to page)"
        raise TypeError(f"model must be a nanochat GPT module {what}, got {type(module).__name__}")
    source = f"the module {type(module).__name__}"
    config, weights = strict.make_config(given, source), weights_of(module)
    told = {} if isinstance(module.config, GPTConfig) else given  # ours has a pattern in any era
    recipe = strict.recognise_strictly(weights, config, source, told, live=True)
    return config, recipe, weights


def weights_of(module) -> dict[str, Tensor]:
    """A module's state dict, not copied, compiled or not."""
    return strict.without_prefix(module.state_dict(), f"the module {type(module).__name__}")


class Snapshot:
    """A module's weights as they were when this was made; `differs` looks whether they still are.
    It keeps no copy, but their memory: at an address that is free again another tensor may lie."""

    def __init__(self, module):
        # where the module and its parts have their parts and their parameters
        tables = [x for m in module.modules() for x in (m._modules, m._parameters)]
        self.slots = [(table, name) for table in tables for name in table]
        self.values = [table[name] for table, name in self.slots]
        self.tensors = [value for value in self.values if isinstance(value, Tensor)]
        # before anything is read: what changes from here on is seen
        self.versions, self.stepped = self._versions(), False
        self.stored = [tensor.data for tensor in self.tensors]
        near = [x.as_strided((1,), (1,)) for x in self.stored if x.is_cpu]
        self.samples = [near, [x[..., 0] if x.ndim > 1 else x for x in self.stored]]
        self.bits = [*map(bits, self.samples)]
        ids, this = {*map(id, self.tensors)}, weakref.ref(self)

        def note(optimizer, *_) -> None:
            given = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if (snapshot := this()) and not ids.isdisjoint(given):
                snapshot.stepped = True

        weakref.finalize(self, register_optimizer_step_post_hook(note).remove)

    def _versions(self) -> list[int]:
        """Of each tensor; those that were made in inference mode have none."""
        return [0 if x.is_inference() else x._version for x in self.tensors]

    def moved(self) -> bool:
        """Is one of the tensors, or of the parts, another object, or in other memory?"""
        values = [table.get(name) for table, name in self.slots]
        if [*map(id, values)] != [*map(id, self.values)]:
            return True
        return [x.data_ptr() for x in self.tensors] != [x.data_ptr() for x in self.stored]

    def differs(self, closely: bool) -> bool:
        """Has a weight changed? closely: look into each row, and wait for a GPU to do so."""
        if self.stepped or self.moved() or self._versions() != self.versions:
            return True
        return not torch.equal(bits(self.samples[closely]), self.bits[closely])


def bits(parts: list[Tensor]) -> Tensor:
    """Copies of one-dimensional tensors, as bytes: a NaN is equal to itself."""
    return torch.cat(parts or [torch.empty(0)]).view(torch.uint8)


class LiveLLM(LLM):
    """An engine that follows the weights of a live module; one whose weights can be swapped; and
    one that can sleep."""

    modest = False  # is the pool to leave room for a training?
    _module: torch.nn.Module | None = None
    _taken: Snapshot | None = None  # the module's weights, as the model has them
    _asleep = False

    def _serve(self, module, build: Callable):
        """The model that build(config, recipe, weights) makes of a live module, to be followed."""
        from_module(module)  # raises for what is none
        self._module, self._build = module, build
        return self._take()

    def _take(self):
        taken = Snapshot(self._module)
        model = self._build(*from_module(self._module))
        self._taken = taken
        return model

    def _free_for_cache(self, block_size: int) -> int:
        """Bytes: for a live module a quarter of what an engine alone would take. A training script
        makes its engine first, then gradients and the state of optimizers, each as large as the
        weights or twice that, and then activations, which take the most."""
        free = super()._free_for_cache(block_size)
        return free // 4 if self.modest else free

    def _advance(self) -> None:
        if self._asleep:
            self._wake()
        elif self._taken and self._taken.differs(closely=not self.scheduler.running):
            self._follow()
        super()._advance()

    @torch.inference_mode()  # it may write to tensors that were made in this mode
    def _follow(self) -> None:
        """Take over the module's weights; K and V of all requests are computed again."""
        self._settle()
        if self._taken.moved():  # what shares its tensors, or has recorded their addresses
            self._fall_asleep()
            self._wake()
            return
        taken = Snapshot(self._module)
        self.model.load_state_dict(weights_of(self._module))
        self.scheduler.reset()
        self._taken = taken

    def update_weights(self, weights) -> None:
        """Swap the weights in place: a state dict of the same shapes, or a module that has one. The
        prefix cache is emptied and running requests recompute what they have. The weights of a live
        module are its own: they are written there. Raises ValueError, and changes nothing, if a
        tensor is missing or misshapen."""
        self._change(self._settle)
        state = weights.state_dict() if hasattr(weights, "state_dict") else weights
        if not isinstance(state, dict) or not all(isinstance(w, Tensor) for w in state.values()):
            raise TypeError(f"weights must be a state dict, or a module, got {weights!r:.80}")
        state = {k.removeprefix("_orig_mod."): w for k, w in state.items()}
        strict.check_weights(state, self.model.config, self.model.recipe)

        @torch.inference_mode()
        def swap() -> None:
            self._settle()
            if self._module is None:
                self.model.load_state_dict(state)
                self.scheduler.reset()
                return
            for name, weight in weights_of(self._module).items():
                if weight.data_ptr() != state[name].data_ptr():
                    weight.copy_(state[name])
            if not self._asleep:
                self._follow()

        self._change(swap)

    def sleep(self) -> None:
        """Give back the memory of the KV cache, and that of weights which a live module has as
        well, until `wake`, or a call that needs a step. Unfinished requests keep their tokens and
        recompute the rest."""
        self._change(self._fall_asleep)

    def wake(self) -> None:
        """Take the memory that `sleep` gave back, and the live module's present weights. Raises
        ValueError if there is too little; the engine then sleeps on."""
        self._change(self._wake)

    def _fall_asleep(self) -> None:
        if not self._asleep:
            self._settle()
            self._asleep = True
            self.scheduler.reset()
            self._drop()

    def _drop(self) -> None:
        self.runner.graphs = None  # a GPU's recorded steps
        self.cache.data, self.cache.kv = None, []  # compiled layers have the cache, too
        if self._module is not None:
            self._taken = None
            # a prompt is checked by the model's config, without a step
            config, recipe = self.model.config, self.model.recipe
            self.model = self.runner.model = empty_model(config, recipe, config.vocab_size)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode(False)  # these stay, and a GPU's recorded steps want ordinary tensors
    def _wake(self) -> None:
        if not self._asleep:
            return
        blocks = self.scheduler.blocks
        try:
            if self._module is not None:
                self.model = self.runner.model = self._take()
            pool = blocks.num_usable // blocks.width + 1, blocks.block_size
            self.cache = self.runner.cache = self._make_memory(*pool)[0]
            self._make_tables(blocks)
            if hasattr(self.runner, "record"):
                self.runner.record(self.max_batch_size, self.max_positions)
        except BaseException as error:
            self._drop()
            if isinstance(error, ValueError):
                raise ValueError(f"the engine is asleep and cannot wake: {error}") from None
            raise
        self._asleep = False

    def close(self) -> None:
        """As in the core."""
        super().close()
        self._module = self._build = self._taken = None


PARTS = {"llm": LiveLLM}
