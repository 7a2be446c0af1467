"""Other projects' names for the parts of nanochat: tensor names, and keys of a config.

Models of late eras are published under many names: by exporters to Hugging Face, plugins of vLLM,
and forks with switches for the parts. They compute the same as nanochat, so names are mapped, and
the config is compared with the tensors. A constant in the config overrides the era's. The model is
in doubt if config and tensors do not belong to one era, or if tensors have the values that loaders
fill in (`strict.question`).
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor

from ..model import RECIPES, GPTConfig, Recipe, layer_windows

# architectures and model types whose code computes the same as nanochat's
KINDS = set("""
    NanoChatForCausalLM NanochatForCausalLM nanochat NanoChatHFForCausalLM nanochat_gpt
    NanoChatJPForCausalLM nanochat_jp WildAIForCausalLM wildai AtlasionNanoForCausalLM atlasion_nano
    nanoswe
""".split())  # fmt: skip
# parts of a tensor's name -> nanochat's, applied in this order
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
    # prefixes of wrappers and of torch.compile
    r"^(model\.|gpt\.|_orig_mod\.)+": "",
    r"^transformer\.h\.(\d+)\.self_attn\.value_embed\.": r"value_embeds.\1.",
    r"^transformer\.(?=value_embeds\.|resid_lambdas$|x0_lambdas$)": "",
}
# norms that have a weight elsewhere; nanochat's have none, which equals a weight of ones
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
# keys that switch a part on or off, or set the number of channels of its gate -> the part
_PARTS = {
    "value embeddings": "value_embeds use_ve use_value_embeddings ve_gate_channels "
    "value_embed_gate_channels",
    "smear": "smear use_smear smear_gate_channels smear_channels",
    "backout": "backout use_backout",
    "lambdas": "layer_lambdas use_resid_lambdas use_x0 use_x0_lambdas",
}
PART_OF = {key: part for part, keys in _PARTS.items() for key in keys.split()}
_CHANNELS = {key for key in PART_OF if key.endswith("_channels")}
# keys with one value in every nanochat; the first value is nanochat's own word
FIXED = {
    "hidden_act": ("relu2",), "activation_function": ("relu2", "relu_squared"),
    "mlp_act": ("relu2", "relu_squared"), "attention_bias": (False,), "qkv_bias": (False,),
    "use_rope": (True,), "qk_norm": (True,), "use_qk_norm": (True,), "embed_norm": (True,),
    "decode_mode": ("standard",),
}  # fmt: skip
# keys that repeat the sizes in other words -> the value they must have
_DERIVED = {
    "head_dim": lambda config, recipe: config.head_dim,
    "rotary_dim": lambda config, recipe: config.head_dim,
    "backout_layer": lambda config, recipe: config.n_layer // 2,
    "layer_window_sizes": layer_windows,
}
# keys that do not change the computation: initialisation, padding, release notes, and layers that
# the tensors name anyway
_NOTES = set("""
    init_style pad_vocab_size_to pad_vocab_to_multiple padded_vocab_size release rotary_overcompute
    value_embed_layers
""".split())  # fmt: skip
# further keys of a mixture of experts, without meaning if there are no experts
_EXPERTS = set("top_k n_experts_active n_shared_experts expert_hidden expert_hidden_mult".split())
KNOWN = {*CONSTANTS, *PART_OF, *FIXED, *_DERIVED, *_NOTES, "hf_compatible"}


def plain_name(name: str) -> str:
    """Return nanochat's name of a tensor. Unknown names are returned unchanged."""
    for pattern, replacement in _NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def is_unit_norm(name: str, weight: Tensor) -> bool:
    """Return whether a tensor is the weight of a norm, by nanochat's name, and all ones, so that it
    has no effect."""
    return bool(re.fullmatch(_NORMS, name)) and weight.ndim == 1 and _is_all(weight, 1)


def without_experts(raw_config: dict) -> dict:
    """Return a config without the keys of a mixture of experts, if it has no experts."""
    number = {"num_experts", "n_experts"}
    if any(raw_config.get(key, 0) != 0 for key in number):
        return raw_config
    dropped = _EXPERTS if number & raw_config.keys() else set()
    return {key: value for key, value in raw_config.items() if key not in number | dropped}


class Constant(NamedTuple):
    """A constant of a recipe that a config states."""

    key: str  # the key in the config
    value: object


def stated(raw_config: dict) -> dict[str, Constant]:
    """Return the constants that a config states, by the recipe's names. Raises ValueError if two
    keys disagree, or if a key is switched off."""
    constants = {}
    for key, name in CONSTANTS.items():
        value = raw_config.get(key)
        if value is False:
            raise ValueError(f"{key} is False, but every nanochat has {name}")
        if value is None or value is True:  # True is a switch: the era's value
            continue
        if name in constants and constants[name].value != value:
            other, other_value = constants[name]
            raise ValueError(f"{other} is {other_value!r:.40} and {key} is {value!r:.40}: keep one")
        constants[name] = Constant(key, value)
    return constants


def check(raw_config: dict, config: GPTConfig, recipe: Recipe) -> None:
    """Raise ValueError that names a config key which contradicts the tensors of this recipe, or
    which asks for something that no nanochat computes."""
    for key, values in FIXED.items():
        if key in raw_config and raw_config[key] not in (None, *values):
            raise ValueError(f"{key} is {raw_config[key]!r:.80}, but nanochat's is {values[0]!r}")
    for key, derive in _DERIVED.items():
        expected = derive(config, recipe)
        if raw_config.get(key) is not None and raw_config[key] != expected:
            raise ValueError(f"{key} is {raw_config[key]!r:.80}, but nanochat's is {expected!r}")
    channels = {"value embeddings": recipe.gate_channels, "smear": 24 * recipe.smear}
    for key, part in PART_OF.items():
        if raw_config.get(key) is None or not _has(recipe, part):
            continue
        if raw_config[key] is False:
            remedy = "remove its tensors, or set the key to True"
            raise ValueError(f"{key} is False, but there are tensors for it ({part}): {remedy}")
        if key in _CHANNELS and raw_config[key] != channels[part]:
            contradiction = f"but the gate of its tensors reads {channels[part]}"
            raise ValueError(f"{key} is {raw_config[key]!r:.40}, {contradiction}")


def doubts(raw_config: dict, recipe: Recipe) -> list[str]:
    """Return the reasons why a config and the tensors of a recipe may be of different eras."""
    era, reasons = recipe.era, []
    if raw_config.get("hf_compatible"):
        reasons.append("hf_compatible means that parts unknown to era 1 were left out")
    absent = [key for key, part in PART_OF.items() if not _has(recipe, part)]
    if keys := [key for key in absent if raw_config.get(key) is not None]:
        reasons.append(f"its config has {', '.join(keys)}, which era {era} does not have")
    for name, (key, value) in stated(raw_config).items():
        era_value = getattr(recipe, name)
        all_values = {getattr(other, name) for other in RECIPES.values()}
        if value != era_value and value in all_values:
            reasons.append(f"its config states {key} {value:g}, but era {era} has {era_value:g}")
    return reasons


def fillings(weights: dict[str, Tensor]) -> list[str]:
    """Return which tensors have exactly the neutral values that a loader fills in to load an older
    model. A trained model does not have them: training starts from other values, or changes them in
    its first step. Models that were never trained, whose projections are zero, do not count."""
    descriptions = []
    if "resid_lambdas" in weights:
        if _is_all(weights["resid_lambdas"], 1) and _is_all(weights["x0_lambdas"], 0):
            descriptions.append("resid_lambdas are all 1 and x0_lambdas all 0")
    if "smear_lambda" in weights and _is_all(weights["smear_lambda"], 0):
        descriptions.append("smear_lambda is 0")
    tables = [weight for name, weight in weights.items() if name.startswith("value_embeds.")]
    if tables and all(_is_all(table[0], 0) and _is_all(table, 0) for table in tables):
        descriptions.append("value_embeds are all 0")
    if not descriptions:  # skip the projections, which are large
        return []
    projections = [weight for name, weight in weights.items() if name.endswith(".c_proj.weight")]
    return descriptions if any(not _is_all(weight, 0) for weight in projections) else []


def _is_all(weight: Tensor, value: float) -> bool:
    # a file may have dtypes that torch cannot compare
    return weight.dtype in _COMPARED and not weight.is_meta and bool((weight == value).all())


def _has(recipe: Recipe, part: str) -> bool:
    """Return whether models of this recipe have the part."""
    if part == "value embeddings":
        return recipe.gate_channels > 0
    return recipe.lambdas if part == "lambdas" else recipe.smear
