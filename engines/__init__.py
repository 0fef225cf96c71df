"""What runs: engines of every component, the bundle that holds them, and the diffusers pipeline around a bundle."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "building.build": ["build_bundle"],
        "bundle": ["Manifest", "read_manifest", "verify_bundle"],
        "gpus": ["GPUS"],
        "pipeline": ["load", "refit"],
    },
)
