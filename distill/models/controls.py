"""What a ControlNet adds to a UNet: one residual to each of its skip connections, and one to its middle.

A ControlNet (arXiv 2302.05543) is the way down of a UNet with a picture beside its latents. Its outputs are called as the
UNet's inputs that they go into, those of diffusers with a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill.models.conditioning import Config, TensorSpec, latent_size, unet_inputs, unet_multiple
from distill.models.resolution import Resolution

DOWN, MIDDLE = "down_block_additional_residuals", "mid_block_additional_residual"
CONTROL_PICTURE = "controlnet_cond"
TAKES_RESIDUALS = "takes_residuals"
"""In the config of an exported UNet: that it has these inputs."""


def residual_specs(config: Config, resolution: Resolution, batch: int, dtype: str, scale: int) -> list[TensorSpec]:
    """(batch, channels, height, width) of each skip connection from the first on, then of the middle; `scale` is pixels of
    the picture per latent pixel. `config` is that of the UNet or of the ControlNet, which must agree."""
    height, width = latent_size(resolution, scale, unet_multiple(config))
    channels = config["block_out_channels"]
    layers = config["layers_per_block"]
    layers = [layers] * len(channels) if isinstance(layers, int) else layers
    levels = [(channels[0], 0)]
    for level, (number, width_of) in enumerate(zip(layers, channels, strict=True)):
        levels += [(width_of, level)] * number
        if level < len(channels) - 1:
            levels.append((width_of, level + 1))

    def spec(name: str, width_of: int, level: int) -> TensorSpec:
        shape, part = (batch, width_of, height >> level, width >> level), f" / {1 << level}" if level else ""
        return TensorSpec(name, dtype, shape, ("batch", None, f"height{part}", f"width{part}"))

    down = [spec(f"{DOWN}.{index}", *place) for index, place in enumerate(levels)]
    return [*down, spec(MIDDLE, channels[-1], len(channels) - 1)]


def residual_names(config: Config) -> list[str]:
    side = unet_multiple(config)
    return [spec.name for spec in residual_specs(config, Resolution(side, side), 1, "float32", 1)]


def gathered(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What diffusers' UNet takes for the residuals among `inputs`, by name: a tuple and a tensor, or nothing."""
    down = tuple(value for name, value in inputs.items() if name.startswith(f"{DOWN}."))
    return {DOWN: down, MIDDLE: inputs[MIDDLE]} if down else {}


def controlnet_inputs(
    config: Config, resolution: Resolution, batch: int, dtype: str, *, tokens: int, vae_scale_factor: int
) -> list[TensorSpec]:
    """Those of its UNet, and last the picture (batch, 3, height, width), from 0 to 1, as large as what is drawn."""
    shape = (batch, config["conditioning_channels"], resolution.height, resolution.width)
    axes = ("batch", None, f"{vae_scale_factor} * height", f"{vae_scale_factor} * width")
    sizes = {"tokens": tokens, "vae_scale_factor": vae_scale_factor}
    return [*unet_inputs(config, resolution, batch, dtype, **sizes), TensorSpec(CONTROL_PICTURE, dtype, shape, axes)]
