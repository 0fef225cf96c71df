"""A network of a checkpoint from its config: its class, and one with fresh weights."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from distill.models.conditioning import SDXL

NETWORKS = SDXL.networks
"""Library and class by folder: those of every family, since no other has one that SDXL lacks."""


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
