"""A ControlNet engine, called like diffusers' ControlNetModel."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.models.controlnets.controlnet import ControlNetOutput

from distill.common.errors import UserError
from distill.models.controls import CONTROL_PICTURE
from engines.component import EngineComponent
from engines.modules.base import EngineModule, run
from engines.modules.unet import one_timestep


class EngineControlNet(EngineModule):
    """See `forward`. `isinstance` takes it for a ControlNetModel, which diffusers' pipelines insist on."""

    def __init__(self, component: EngineComponent, config: dict[str, Any], image_scale: int) -> None:
        """`image_scale` is image pixels per latent pixel."""
        super().__init__(component, config, component.dtype("sample"))
        self.image_scale = image_scale
        # diffusers finds the dtype of several at once by what they hold
        self.register_buffer("_of_dtype", torch.empty(0, dtype=self.dtype), persistent=False)

    @property
    def __class__(self) -> type:
        return ControlNetModel

    @__class__.setter
    def __class__(self, kind: type) -> None:
        raise TypeError("an engine is of one class")

    @torch.compiler.disable
    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        conditioning_scale: float = 1.0,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> Any:
        """`sample` (rows, channels, height / 8, width / 8) and the picture `controlnet_cond` (rows, 3, height, width), 0 to
        1 -> one residual for each skip connection of the UNet, and one for its middle, times `conditioning_scale`; in
        `guess_mode` the first get less, from a tenth on.

        Raises UserError for a size the bundle lacks, for timesteps that differ, and for inputs that the engine lacks.
        """
        passed = {
            "class_labels": class_labels,
            "timestep_cond": timestep_cond,
            "attention_mask": attention_mask,
            "cross_attention_kwargs": cross_attention_kwargs or None,
        }
        if unknown := [name for name, value in passed.items() if value is not None]:
            raise UserError(f"this ControlNet engine was compiled without {', '.join(unknown)}; leave it out")
        inputs = {
            "sample": sample,
            "timestep": one_timestep(timestep, self.device),
            "encoder_hidden_states": encoder_hidden_states,
            **(added_cond_kwargs or {}),
            CONTROL_PICTURE: controlnet_cond,
        }
        height, width = (side * self.image_scale for side in sample.shape[-2:])
        outputs = run(self.component, inputs, f"{width}x{height}").values()
        scales = torch.full((len(outputs),), float(conditioning_scale))
        if guess_mode:
            scales *= torch.logspace(-1, 0, len(outputs))
        *down, middle = (
            residual.to(sample.dtype) * scale for residual, scale in zip(outputs, scales.tolist(), strict=True)
        )
        if not return_dict:
            return (down, middle)
        return ControlNetOutput(down_block_res_samples=tuple(down), mid_block_res_sample=middle)
