"""A pipeline of true size with random weights, made on the device that will run it: no download, no disk.

The arithmetic does not depend on the weights; a GPU's power, and its clocks at the power limit, do. They are drawn in fp32
with torch's own initial scale and then rounded, so that the same name and seed on the same device give one model in every
precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distill.models.architectures import find_architecture

if TYPE_CHECKING:
    import torch

SEED = 0


def random_pipeline(name: str, device: str, dtype: torch.dtype) -> Any:
    """A diffusers pipeline of an architecture of the catalogue. Raises UserError for an unknown name.

    The VAE says that it is safe in fp16, as the fixed one of the published figures does: weights of this scale are.
    """
    import diffusers
    import torch

    from distill.checkpoints.assemble import tokenizers_and_scheduler
    from distill.models.networks import make_network

    architecture = find_architecture(name)
    family = architecture.family
    configs = architecture.configs | {"vae": family.vae | {"force_upcast": False}}
    torch.manual_seed(SEED)
    with torch.device(device):
        networks = {part: make_network(part, config).to(dtype).eval() for part, config in configs.items()}
    kind = family.conditioning
    parts = {**networks, **tokenizers_and_scheduler(family), **kind.load_options}
    return getattr(diffusers, kind.pipeline)(**parts)
