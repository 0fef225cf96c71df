"""What a UNet's config.json means: diffusers' defaults for what it leaves out, and which values are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from distill.common.errors import UserError

UNET_DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "attention_head_dim": 8,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "sample_size": None,
}
"""What diffusers takes for a key that a UNet's config.json leaves out: those keys that are read here."""
BLOCK_TYPES = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn", None),
}
MOST = 1_000_000
"""The largest number that a config may state: what is far beyond any network would only fill the memory."""
MOST_LAYERS = 1000
"""Each is a module, and takes its time to be made."""
PER_LEVEL = (
    "block_out_channels",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "only_cross_attention",
)
"""Keys that may hold a list with an entry for each level."""


def stated_unet(config: Mapping[str, Any], model: object = "the model") -> dict[str, Any]:
    """A UNet's config with diffusers' defaults for the keys it leaves out. Raises UserError, which names the key, for
    values that no UNet can have and for blocks that are not read."""
    stated = UNET_DEFAULTS | dict(config)

    def refuse(key: str, wanted: str) -> UserError:
        return UserError(f"{model}: its UNet's {key} is {json.dumps(stated[key])}; {wanted}")

    for key, known in BLOCK_TYPES.items():
        is_list = key != "mid_block_type"
        if is_list and (not isinstance(stated[key], list | tuple) or not stated[key]):
            raise refuse(key, "it must be a list with a block for each level")
        for kind in stated[key] if is_list else [stated[key]]:
            if kind not in known:
                raise refuse(key, f"read are {', '.join(map(json.dumps, known))}")
    levels = len(stated["down_block_types"])
    if len(stated["up_block_types"]) != levels:
        raise refuse("up_block_types", f"there must be as many as down_block_types, {levels}")
    widths = stated["block_out_channels"]
    if not isinstance(widths, list | tuple) or len(widths) != levels or not all(map(is_count, widths)):
        raise refuse(
            "block_out_channels", f"it must be a list of {levels} numbers from 1 to {MOST}, one for each level"
        )
    for key in (
        "in_channels",
        "out_channels",
        "layers_per_block",
        "cross_attention_dim",
        "transformer_layers_per_block",
    ):
        if not _holds_counts(stated[key]):
            raise refuse(key, f"numbers from 1 to {MOST} are needed")
    optional = ("addition_time_embed_dim", "projection_class_embeddings_input_dim", "sample_size")
    for key in (*optional, "attention_head_dim", "num_attention_heads", "norm_num_groups"):
        if stated.get(key) is not None and not _holds_counts(stated[key]):
            raise refuse(key, f"a number from 1 to {MOST} is needed")
    reverse = stated["reverse_transformer_layers_per_block"]
    if reverse is not None and not _holds_counts(reverse):
        raise refuse("reverse_transformer_layers_per_block", f"numbers from 1 to {MOST}, or null, are needed")
    per_level = stated["transformer_layers_per_block"]
    if reverse is None and isinstance(per_level, list | tuple) and any(isinstance(n, list | tuple) for n in per_level):
        raise refuse(
            "transformer_layers_per_block",
            "where a level has a list, reverse_transformer_layers_per_block is needed too",
        )
    for key in PER_LEVEL:
        if isinstance(stated.get(key), list | tuple) and len(stated[key]) != levels:
            raise refuse(key, f"the UNet has {levels} levels")
    if isinstance(stated["cross_attention_dim"], list | tuple) and len(set(stated["cross_attention_dim"])) != 1:
        raise refuse("cross_attention_dim", "all levels read the same text, so they must be alike")
    return stated


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 1 to MOST."""
    return type(value) is int and 1 <= value <= MOST


def _holds_counts(value: Any) -> bool:
    """Whether it is a number from 1 to MOST, or a list of such, or of lists of such."""
    return is_count(value) or (isinstance(value, list | tuple) and bool(value) and all(map(_holds_counts, value)))


def per_level(key: str, config: Mapping[str, Any], model: object) -> list[Any]:
    value, levels = config[key], len(config["down_block_types"])
    if not isinstance(value, int) and len(value) != levels:
        raise UserError(f"{model}: its UNet's {key} is {json.dumps(value)}; the UNet has {levels} levels")
    return [value] * levels if isinstance(value, int) else list(value)
