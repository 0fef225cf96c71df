"""The UNet engine, called like diffusers' UNet2DConditionModel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from distill.common.errors import UserError
from distill.models.conditioning import unet_multiple
from distill.models.controls import DOWN, MIDDLE, TAKES_RESIDUALS, residual_specs
from distill.models.resolution import Resolution
from engines.component import EngineComponent
from engines.modules.base import EngineModule, run


class EngineUNet(EngineModule):
    """See `forward`."""

    def __init__(self, component: EngineComponent, config: dict[str, Any], image_scale: int) -> None:
        """`image_scale` is image pixels per latent pixel."""
        super().__init__(component, config, component.dtype("sample"))
        if added := config.get(
            "projection_class_embeddings_input_dim"
        ):  # what SDXL's pipeline checks its sizes against
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=added))
        self.image_scale = image_scale
        self._multiple = unet_multiple(config)

    @torch.compiler.disable
    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        down_block_additional_residuals: tuple[torch.Tensor, ...] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        down_intrablock_additional_residuals: tuple[torch.Tensor, ...] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """`sample` (rows, channels, height / 8, width / 8) -> noise_pred of its size and dtype. `timestep` is one number, or
        (rows,) of the same number; `timestep_cond` (rows, time_cond_proj_dim) is for models that are told their guidance.

        Raises UserError for a size the bundle lacks, for timesteps that differ, and for inputs that the engine lacks or
        misses.
        """
        passed = {
            "sample": sample,
            "timestep": one_timestep(timestep, self.device),
            "encoder_hidden_states": encoder_hidden_states,
            "class_labels": class_labels,
            "timestep_cond": timestep_cond,
            "attention_mask": attention_mask,
            "cross_attention_kwargs": cross_attention_kwargs or None,
            **(added_cond_kwargs or {}),
            **self._residuals(sample, down_block_additional_residuals, mid_block_additional_residual),
            "down_intrablock_additional_residuals": down_intrablock_additional_residuals,
            "encoder_attention_mask": encoder_attention_mask,
        }
        inputs: dict[str, Any] = {name: value for name, value in passed.items() if value is not None}
        unknown = [name for name in inputs if name not in self.component.inputs]
        missing = [name for name in self.component.inputs if name not in inputs]
        if "cross_attention_kwargs" in unknown:
            raise UserError(
                "this UNet engine was compiled without cross_attention_kwargs; the weight of a LoRA is set by "
                "pipe.set_adapters(name, weight), anything else runs in torch"
            )
        if unknown or missing:
            raise UserError(
                f"this UNet engine was compiled {'without' if unknown else 'with'} {', '.join(unknown or missing)}; use a "
                f"pipeline that {'does not pass' if unknown else 'passes'} it, or run the checkpoint in torch"
            )
        height, width = (side * self.image_scale for side in sample.shape[-2:])
        if height % (step := self._multiple * self.image_scale) or width % step:
            raise UserError(
                f"resolution {width}x{height}: both sides must be multiples of {step} pixels for this model"
            )
        noise_pred = run(self.component, inputs, f"{width}x{height}")["out_sample"].to(sample.dtype)
        return UNet2DConditionOutput(sample=noise_pred) if return_dict else (noise_pred,)

    def _residuals(
        self, sample: torch.Tensor, down: tuple[torch.Tensor, ...] | None, middle: torch.Tensor | None
    ) -> dict[str, torch.Tensor | None]:
        """By name; zeros, which change nothing, for an engine that takes some where none are passed."""
        if not self.config.get(TAKES_RESIDUALS):
            if down is not None or middle is not None:
                raise UserError(
                    "this UNet engine was compiled without a ControlNet's residuals; export it with python -m export onnx "
                    "--controlnet FOLDER, or run the checkpoint in torch"
                )
            return {}
        if down is not None:
            return {f"{DOWN}.{index}": residual for index, residual in enumerate(down)} | {MIDDLE: middle}
        rows, _, height, width = sample.shape
        specs = residual_specs(self.config, Resolution(width, height), rows, "", 1)
        return {spec.name: sample.new_zeros(spec.shape) for spec in specs}

    def load_lora_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise UserError(
            "LoRAs are loaded by the pipeline that engines.load gave, this is another one; what is loaded there is in the "
            "engine, for all pipelines that share it"
        )

    def disable_freeu(self) -> None:
        """An engine has none."""


def one_timestep(timestep: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """(1,). Of several the host must wait for the comparison; no pipeline of diffusers passes several."""
    steps = torch.as_tensor(timestep, device=device).reshape(-1)
    if len(steps) > 1 and not bool((steps == steps[0]).all()):
        shown = ", ".join(f"{step:g}" for step in steps.tolist()[:4])
        raise UserError(f"an engine takes one timestep for all rows, got {shown}; call it once for each")
    return steps[:1]
