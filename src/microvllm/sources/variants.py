"""What others call the parts of nanochat: names of tensors, and keys of a config.

A model of a late era is published under many names: exporters to Hugging Face, plugins of vLLM,
forks with switches for the parts. What they compute is nanochat's, so the names are mapped, what a
config says is compared with the tensors, and a constant that it states is the one that runs. Where
config and tensors do not belong to one era, or where tensors are as a loader fills them in, the
model is in doubt, see `strict.question`.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor

from ..model import RECIPES, GPTConfig, Recipe, layer_windows

# architectures and model types whose code computes what nanochat's does
KINDS = set("""
    NanoChatForCausalLM NanochatForCausalLM nanochat NanoChatHFForCausalLM nanochat_gpt
    NanoChatJPForCausalLM nanochat_jp WildAIForCausalLM wildai AtlasionNanoForCausalLM atlasion_nano
    nanoswe
""".split())  # fmt: skip
# parts of a tensor's name -> nanochat's, in the order in which they are applied
_NAMES = {
    r"\bmodel\.embed_tokens\.": "transformer.wte.",
    r"\bmodel\.layers\.": "transformer.h.",
    r"\.self_attn\.q_proj\.": ".attn.c_q.",
    r"\.self_attn\.k_proj\.": ".attn.c_k.",
    r"\.self_attn\.v_proj\.": ".attn.c_v.",
    r"\.self_attn\.o_proj\.": ".attn.c_proj.",
    r"\.self_attn\.(ve_gate|value_embed_gate)\.": ".attn.ve_gate.",
    r"\.mlp\.(fc1|up_proj)\.": ".mlp.c_fc.",
    r"\.mlp\.(fc2|down_proj)\.": ".mlp.c_proj.",
    # what a wrapper, or torch.compile, puts before the names of the module inside
    r"^(model\.|gpt\.|_orig_mod\.)+": "",
    r"^transformer\.h\.(\d+)\.self_attn\.value_embed\.": r"value_embeds.\1.",
    r"^transformer\.(?=value_embeds\.|resid_lambdas$|x0_lambdas$)": "",
}
# norms that have a weight elsewhere; nanochat's have none, which is the same as one of ones
_NORMS = (
    r"norm\.weight"
    r"|transformer\.h\.\d+\.(input_layernorm|post_attention_layernorm|self_attn\.[qk]_norm)\.weight"
)

_COMPARED = torch.float32, torch.bfloat16, torch.float16, torch.float64

# keys of a config -> the constant of the recipe that they state
CONSTANTS = {
    "qk_scale": "qk_scale", "qk_scalar": "qk_scale", "qk_norm_scale": "qk_scale",
    "rotary_base": "rope_base", "rope_base": "rope_base", "rope_theta": "rope_base",
    "softcap": "softcap", "logit_softcap": "softcap", "final_logit_softcapping": "softcap",
    "ve_gate_scale": "gate_scale", "value_embed_gate_range": "gate_scale", "rms_norm_eps": "eps",
}  # fmt: skip
# keys that switch a part on or off, or say how many channels its gate reads -> the part
_PARTS = {
    "value embeddings": "value_embeds use_ve use_value_embeddings ve_gate_channels "
    "value_embed_gate_channels",
    "smear": "smear use_smear smear_gate_channels smear_channels",
    "backout": "backout use_backout",
    "lambdas": "layer_lambdas use_resid_lambdas use_x0 use_x0_lambdas",
}
PART_OF = {key: part for part, keys in _PARTS.items() for key in keys.split()}
_CHANNELS = {key for key in PART_OF if key.endswith("_channels")}
# keys that have one value in every nanochat; the first of the values is nanochat's own word
FIXED = {
    "hidden_act": ("relu2",), "activation_function": ("relu2", "relu_squared"),
    "mlp_act": ("relu2", "relu_squared"), "attention_bias": (False,), "qkv_bias": (False,),
    "use_rope": (True,), "qk_norm": (True,), "use_qk_norm": (True,), "embed_norm": (True,),
    "decode_mode": ("standard",),
}  # fmt: skip
# keys that say what the sizes say too, in other words -> what they must be
_DERIVED = {
    "head_dim": lambda config, recipe: config.head_dim,
    "rotary_dim": lambda config, recipe: config.head_dim,
    "backout_layer": lambda config, recipe: config.n_layer // 2,
    "layer_window_sizes": layer_windows,
}
# keys by which nothing is computed: how weights began, how rows are padded, notes of a release, the
# layers that the tensors name anyway
_NOTES = set("""
    init_style pad_vocab_size_to pad_vocab_to_multiple padded_vocab_size release rotary_overcompute
    value_embed_layers
""".split())  # fmt: skip
# what a mixture of experts has beside their number; without experts they mean nothing
_EXPERTS = set("top_k n_experts_active n_shared_experts expert_hidden expert_hidden_mult".split())
KNOWN = {*CONSTANTS, *PART_OF, *FIXED, *_DERIVED, *_NOTES, "hf_compatible"}


def plain_name(name: str) -> str:
    """nanochat's name of a tensor; one that has none stays as it is."""
    for pattern, ours in _NAMES.items():
        name = re.sub(pattern, ours, name)
    return name


def is_unit_norm(name: str, weight: Tensor) -> bool:
    """Is it the weight of a norm, by nanochat's name, and all ones? It changes nothing."""
    return bool(re.fullmatch(_NORMS, name)) and weight.ndim == 1 and _is_all(weight, 1)


def without_experts(given: dict) -> dict:
    """A config without the keys of a mixture of experts, if it is said to have no experts."""
    number = {"num_experts", "n_experts"}
    if any(given.get(key, 0) != 0 for key in number):
        return given
    dropped = _EXPERTS if number & given.keys() else set()
    return {key: value for key, value in given.items() if key not in number | dropped}


class Constant(NamedTuple):
    """A constant of a recipe that a config states."""

    key: str  # of the config
    value: object


def stated(given: dict) -> dict[str, Constant]:
    """The constants that a config states, by the recipe's names. Raises ValueError for two keys
    that disagree, or for one that is switched off."""
    found = {}
    for key, name in CONSTANTS.items():
        value = given.get(key)
        if value is False:
            raise ValueError(f"{key} is False, and every nanochat has {name}")
        if value is None or value is True:  # a switch: as the era has it
            continue
        if name in found and found[name].value != value:
            other, theirs = found[name]
            raise ValueError(f"{other} is {theirs!r:.40} and {key} is {value!r:.40}: keep one")
        found[name] = Constant(key, value)
    return found


def check(given: dict, config: GPTConfig, recipe: Recipe) -> None:
    """Raises ValueError naming a key of a config that contradicts the tensors, whose recipe this
    is, or that asks for what no nanochat computes."""
    for key, values in FIXED.items():
        if key in given and given[key] not in (None, *values):
            raise ValueError(f"{key} is {given[key]!r:.80}, and nanochat's is {values[0]!r}")
    for key, derive in _DERIVED.items():
        wanted = derive(config, recipe)
        if given.get(key) is not None and given[key] != wanted:
            raise ValueError(f"{key} is {given[key]!r:.80}, and nanochat's is {wanted!r}")
    channels = {"value embeddings": recipe.gate_channels, "smear": 24 * recipe.smear}
    for key, part in PART_OF.items():
        if given.get(key) is None or not _has(recipe, part):
            continue
        if given[key] is False:
            what = "take its tensors out, or say that the model has it"
            raise ValueError(f"{key} is False, but there are tensors for it ({part}): {what}")
        if key in _CHANNELS and given[key] != channels[part]:
            what = f"and the gate of its tensors reads {channels[part]}"
            raise ValueError(f"{key} is {given[key]!r:.40}, {what}")


def doubts(given: dict, recipe: Recipe) -> list[str]:
    """Why a config and the tensors of a recipe may not be of one era."""
    era, found = recipe.era, []
    if given.get("hf_compatible"):
        found.append("hf_compatible says that a later model left out what era 1 does not know")
    absent = [key for key, part in PART_OF.items() if not _has(recipe, part)]
    if keys := [key for key in absent if given.get(key) is not None]:
        found.append(f"its config has {', '.join(keys)}, which era {era} does not have")
    for name, (key, value) in stated(given).items():
        own, others = getattr(recipe, name), {getattr(other, name) for other in RECIPES.values()}
        if value != own and value in others:
            found.append(f"its config states {key} {value:g}, and era {era} has {own:g}")
    return found


def fillings(weights: dict[str, Tensor]) -> list[str]:
    """What of the tensors is as a loader fills it in, to load an older model: it adds nothing, and
    is exactly so. A training, which begins elsewhere or changes it in its first step, leaves no
    such value; a model that was never trained, whose projections are zero, is not meant."""
    found = []
    if "resid_lambdas" in weights:
        if _is_all(weights["resid_lambdas"], 1) and _is_all(weights["x0_lambdas"], 0):
            found.append("resid_lambdas are all 1 and x0_lambdas all 0")
    if "smear_lambda" in weights and _is_all(weights["smear_lambda"], 0):
        found.append("smear_lambda is 0")
    tables = [weight for name, weight in weights.items() if name.startswith("value_embeds.")]
    if tables and all(_is_all(table[0], 0) and _is_all(table, 0) for table in tables):
        found.append("value_embeds are all 0")
    if not found:  # the projections are large
        return []
    projections = [weight for name, weight in weights.items() if name.endswith(".c_proj.weight")]
    return found if any(not _is_all(weight, 0) for weight in projections) else []


def _is_all(weight: Tensor, value: float) -> bool:
    # not of a type that a file may have and torch cannot compare
    return weight.dtype in _COMPARED and not weight.is_meta and bool((weight == value).all())


def _has(recipe: Recipe, part: str) -> bool:
    """Has a model of this recipe the part?"""
    if part == "value embeddings":
        return recipe.gate_channels > 0
    return recipe.lambdas if part == "lambdas" else recipe.smear
