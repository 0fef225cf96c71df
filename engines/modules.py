"""Engines as the torch modules that diffusers expects: the same calls and configs, no weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from distill.common.errors import UserError
from distill.models.families import vae_scale_factor
from engines.component import EngineComponent


def _is_same(asked: torch.device, device: torch.device) -> bool:
    """A device without an index, as "cuda", is the same as any of its type."""
    return (asked.type == device.type and None in (asked.index, device.index)) or asked == device


class _EngineModule(torch.nn.Module):
    """What diffusers asks of every network: a config, a device, a dtype, and `to`, though an engine cannot move."""

    def __init__(self, component: EngineComponent, config: dict[str, Any], dtype: torch.dtype) -> None:
        super().__init__()
        self.component = component
        self.config = FrozenDict(config)
        self._dtype = dtype
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.component.device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """An engine stays where it was loaded and keeps its precision. Raises UserError for another device."""
        device = kwargs.get("device", next((a for a in args if isinstance(a, (str, torch.device, int))), None))
        if device is not None and not _is_same(torch.device(device), self.device):
            raise UserError(
                f"the {self.component.name} engine is on {self.device} and cannot move to {device}; "
                f"load it there: engines.load(bundle, device={str(device)!r})"
            )
        return self

    def load_lora_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise UserError(
            "an engine's weights are fixed: merge the LoRA before compiling (python -m export onnx --lora FILE), "
            "or build with --refit and use engines.refit"
        )


class EngineUNet(_EngineModule):
    """Called like diffusers' UNet2DConditionModel."""

    def __init__(self, component: EngineComponent, config: dict[str, Any], image_scale: int) -> None:
        """`image_scale` is image pixels per latent pixel."""
        super().__init__(component, config, component.dtype("sample"))
        if added := config.get(
            "projection_class_embeddings_input_dim"
        ):  # what SDXL's pipeline checks its sizes against
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=added))
        self.image_scale = image_scale

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        timestep_cond: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        **unsupported: Any,
    ) -> Any:
        """`sample` (rows, 4, height / 8, width / 8) -> noise_pred of the same shape and dtype. `timestep` is one number;
        `timestep_cond` (rows, time_cond_proj_dim) is for models that are told their guidance (LCM).

        Raises UserError for a size the bundle lacks, and for inputs that the engine lacks or misses.
        """
        passed = {
            "sample": sample,
            "timestep": torch.as_tensor(timestep, device=self.device).reshape(-1),
            "encoder_hidden_states": encoder_hidden_states,
            "timestep_cond": timestep_cond,
            "cross_attention_kwargs": cross_attention_kwargs or None,
            **(added_cond_kwargs or {}),
            **unsupported,
        }
        inputs = {name: value for name, value in passed.items() if value is not None}
        unknown = [name for name in inputs if name not in self.component.inputs]
        missing = [name for name in self.component.inputs if name not in inputs]
        if unknown or missing:
            raise UserError(
                f"this UNet engine was compiled {'without' if unknown else 'with'} {', '.join(unknown or missing)}; use a "
                f"pipeline that {'does not pass' if unknown else 'passes'} it, or run the checkpoint in torch"
            )
        size = f"{sample.shape[-1] * self.image_scale}x{sample.shape[-2] * self.image_scale}"
        noise_pred = self.component.run(inputs, size)["out_sample"].to(sample.dtype)
        return UNet2DConditionOutput(sample=noise_pred) if return_dict else (noise_pred,)

    def _load_ip_adapter_weights(self, *args: Any, **kwargs: Any) -> None:
        raise UserError("an engine's weights are fixed: IP-Adapters run with the checkpoint in torch only")


class EngineVAE(_EngineModule):
    """Called like diffusers' AutoencoderKL, for decoding."""

    def __init__(self, component: EngineComponent, config: dict[str, Any]) -> None:
        # the engine has its own precision, so the pipeline must not try to upcast it
        super().__init__(component, config | {"force_upcast": False}, component.dtype("latent_sample"))
        self.image_scale = vae_scale_factor(config)

    def decode(self, latents: torch.Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """`latents` (rows, 4, height / 8, width / 8), already divided by the scaling factor -> images in [-1, 1],
        (rows, 3, height, width)."""
        size = f"{latents.shape[-1] * self.image_scale}x{latents.shape[-2] * self.image_scale}"
        images = self.component.run({"latent_sample": latents}, size)["sample"]
        return DecoderOutput(sample=images) if return_dict else (images,)

    def encode(self, *args: Any, **kwargs: Any) -> None:
        raise UserError("the VAE engine decodes only: image-to-image and inpainting need the checkpoint in torch")

    def enable_slicing(self) -> None:
        """Does nothing: a batch larger than the engine's is decoded in pieces anyway."""

    def disable_slicing(self) -> None:
        """As `enable_slicing`."""

    def enable_tiling(self, *args: Any, **kwargs: Any) -> None:
        raise UserError(
            "the VAE engine decodes whole pictures of the bundle's sizes: tiling needs the checkpoint in torch"
        )


class _TextOutput(tuple[torch.Tensor, ...]):
    """What a pipeline reads of a text encoder: item 0, and one of its `hidden_states`."""

    hidden_states: _HiddenStates


class _HiddenStates:
    """An engine has one hidden state: that of `index`, counted from the end, or the last after the final norm (None)."""

    def __init__(self, hidden: torch.Tensor, index: int | None) -> None:
        self._hidden, self._index = hidden, index

    def __getitem__(self, index: int) -> torch.Tensor:
        if index != self._index:
            held = "the last one, after its norm" if self._index is None else f"number {self._index}"
            raise UserError(
                f"clip_skip asks for hidden state {index}, the text encoder engine has only {held}; leave clip_skip unset"
            )
        return self._hidden


class EngineTextEncoder(_EngineModule):
    """Called like transformers' CLIPTextModel and CLIPTextModelWithProjection."""

    def __init__(self, component: EngineComponent, config: dict[str, Any], hidden_state: int | None) -> None:
        """`hidden_state` is the one that the engine gives, as `Conditioning` counts it."""
        hidden = next(name for name in component.outputs if "hidden_state" in name)
        super().__init__(component, config, component.dtype(hidden))
        self._hidden, self._hidden_state = hidden, hidden_state

    def forward(self, input_ids: torch.Tensor, output_hidden_states: bool = True, **_: Any) -> _TextOutput:
        """`input_ids` (rows, tokens) -> item 0: pooled embedding (rows, projection_dim) where the encoder has one, else
        the hidden state that the pipeline reads; it is in `hidden_states` too, (rows, tokens, hidden_size)."""
        outputs = self.component.run({"input_ids": input_ids})
        hidden = outputs[self._hidden]
        result = _TextOutput((outputs.get("text_embeds", hidden),))
        result.hidden_states = _HiddenStates(hidden, self._hidden_state)
        return result

    def get_input_embeddings(self) -> None:
        """What textual inversion would extend."""
        raise UserError("an engine's vocabulary is fixed: textual inversion needs the checkpoint in torch")
