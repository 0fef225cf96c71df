"""A network of a checkpoint from its config: its class, and one with fresh weights."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from distill.models.conditioning import KINDS
from distill.models.unet_config import stated_unet

CONTROLNETS = ("controlnet", "controlnet_2", "controlnet_3")
"""Folders of the ControlNets beside a checkpoint that is exported with some."""
NETWORKS = {folder: network for kind in KINDS for folder, network in kind.networks.items()}
NETWORKS |= dict.fromkeys(CONTROLNETS, ("diffusers", "ControlNetModel"))
"""Library and class by folder, of every kind of pipeline."""


DEFAULTS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [64],
        "scaling_factor": 0.18215,
        "force_upcast": True,
    },
    "AutoencoderTiny": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "encoder_block_out_channels": [64] * 4,
        "decoder_block_out_channels": [64] * 4,
        "scaling_factor": 1.0,
    },
    "CLIPTextModel": {
        "vocab_size": 49408,
        "hidden_size": 512,
        "projection_dim": 512,
        "num_hidden_layers": 12,
        "max_position_embeddings": 77,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    },
}
DEFAULTS["ControlNetModel"] = {
    "in_channels": 4,
    "conditioning_channels": 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
}
DEFAULTS["CLIPTextModelWithProjection"] = DEFAULTS["CLIPTextModel"]
"""What diffusers and transformers take for a key that a config.json leaves out: those keys that are read here."""


def stated_config(component: str, config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """A network's config with the library's defaults for the keys it leaves out. Raises UserError for a UNet's values
    that cannot be, see `stated_unet`."""
    if component == "unet":
        return stated_unet(config, where)
    return DEFAULTS.get(_class_name(component, config), {}) | dict(config)


def _class_name(component: str, config: Mapping[str, Any]) -> Any:
    """A VAE may be an AutoencoderTiny too, and lie in a folder of any name."""
    stated = config.get("_class_name")
    return stated if stated == "AutoencoderTiny" or component not in NETWORKS else NETWORKS[component][1]


def network_class(component: str, config: Mapping[str, Any]) -> Any:
    """The class of the network whose config.json is `config`: a VAE may be an AutoencoderTiny too."""
    return getattr(import_module(NETWORKS[component][0]), _class_name(component, config))


def make_network(component: str, config: Mapping[str, Any]) -> Any:
    """The network of a config.json, with fresh weights on torch's default device."""
    kind = network_class(component, config)
    if NETWORKS[component][0] == "diffusers":
        return kind.from_config(dict(config))
    return kind(kind.config_class.from_dict(dict(config)))
