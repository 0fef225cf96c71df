"""The four networks of a checkpoint, each under the name of its folder: its class, and one made from its config."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

NETWORKS = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}
"""Library and class, as model_index.json states them."""


def network_class(component: str, config: Mapping[str, Any]) -> Any:
    """The class of the network whose config.json is `config`: a VAE may be an AutoencoderTiny too."""
    library, name = NETWORKS[component]
    return getattr(
        import_module(library), "AutoencoderTiny" if config.get("_class_name") == "AutoencoderTiny" else name
    )


def make_network(component: str, config: Mapping[str, Any]) -> Any:
    """The network of a config.json, with fresh weights on torch's default device."""
    kind = network_class(component, config)
    if NETWORKS[component][0] == "diffusers":
        return kind.from_config(dict(config))
    return kind(kind.config_class.from_dict(dict(config)))
