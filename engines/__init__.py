"""Engines of every component, the bundle that holds them, and a bundle as a diffusers pipeline."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "building.build": ["build_bundle"],
        "bundle": ["Manifest", "read_manifest"],
        "gpus": ["GPUS"],
        "integrity": ["verify_bundle"],
        "pipeline": ["load", "refit"],
    },
)
