"""Engines in the shape of the torch modules that diffusers expects: the same calls, the same configs, no weights."""

from __future__ import annotations

import warnings
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from distill.common.errors import UserError
from distill.models.families import vae_scale_factor
from engines.bundle import Engine, Profile
from engines.flavors import LoadedEngine

TORCH_DTYPES = {
    name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
}


class EngineComponent:
    """All loaded engines of one component; picks the engine and profile for what it is given.

    A batch larger than any profile's is run in pieces, so that every batch works with every bundle.
    """

    def __init__(self, engines: list[tuple[Engine, LoadedEngine]], device: str) -> None:
        self.device = torch.device(device)
        self.engines = engines
        self._choices: dict[tuple[str | None, int], tuple[LoadedEngine, Profile, int]] = {}
        first = engines[0][0]
        self.name = first.component
        self.inputs = {tensor.name: tensor for tensor in first.inputs}
        self.outputs = {tensor.name: tensor for tensor in first.outputs}
        self._batched = [name for name in self.inputs if name != "timestep"]  # one timestep is for all rows

    @property
    def resolutions(self) -> list[str]:
        return list(dict.fromkeys(text for engine, _ in self.engines for text in engine.resolutions))

    def dtype(self, name: str) -> torch.dtype:
        """Of an input or output."""
        return TORCH_DTYPES[(self.inputs.get(name) or self.outputs[name]).dtype]

    def run(self, inputs: dict[str, torch.Tensor], resolution: str | None = None) -> dict[str, torch.Tensor]:
        """`inputs` have any float type and the engine's names; rows are the first dimension of all but the timestep.

        `resolution` is the image size for components that see it. Raises UserError where the bundle lacks it.
        """
        ready = {name: tensor.to(self.device, self.dtype(name)).contiguous() for name, tensor in inputs.items()}
        rows = ready[self._batched[0]].shape[0]
        if (choice := self._choices.get((resolution, rows))) is None:
            choice = self._choices[resolution, rows] = self._choose(resolution, rows)
        loaded, profile, most = choice
        least = self._least_rows(profile)
        if rows < least:
            _warn_of_padding(self.name)
            padded = {
                name: torch.cat([tensor, tensor[-1:].expand(least - rows, *tensor.shape[1:])])
                if name in self._batched
                else tensor
                for name, tensor in ready.items()
            }
            return {name: tensor[:rows] for name, tensor in loaded.run(padded, profile).items()}
        if rows <= most:
            return loaded.run(ready, profile)
        pieces = []
        for start in range(0, rows, most):
            chunk = {name: ready[name][start : start + most] for name in self._batched}
            pieces.append(self.run(ready | chunk, resolution))
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

    def _choose(self, resolution: str | None, rows: int) -> tuple[LoadedEngine, Profile, int]:
        """The profile that takes the fewest rows beyond `rows`, else the one that takes the most at once."""
        found = [
            (loaded, profile, self._most_rows(profile))
            for engine, loaded in self.engines
            for profile in engine.profiles
            if resolution is None or resolution in profile.resolutions
        ]
        if not found:
            raise UserError(
                f"resolution {resolution} is not in the bundle's {self.name}: it has {', '.join(self.resolutions)}; "
                "ask for one of them; a size that the model has is added by building into the same bundle with --resolutions"
            )
        enough = [choice for choice in found if choice[2] >= rows]

        def waste(choice: tuple[LoadedEngine, Profile, int]) -> tuple[int, int]:
            return max(0, self._least_rows(choice[1]) - rows), choice[2]

        return min(enough, key=waste) if enough else max(found, key=lambda choice: choice[2])

    def _most_rows(self, profile: Profile) -> int:
        return max(shape.max[0] for shape in profile.shapes.values())

    def _least_rows(self, profile: Profile) -> int:
        return max(shape.min[0] for shape in profile.shapes.values())


@cache
def _warn_of_padding(component: str) -> None:
    """Once for each component."""
    warnings.warn(
        f"the {component} plan was built for a larger batch: this call is padded. For sampling without guidance build with "
        "--guidance never (or any); for fewer images at once, with --batches",
        stacklevel=2,
    )


def _is_same(asked: torch.device, device: torch.device) -> bool:
    """Where one has no index, it is not compared: "cuda" is whichever."""
    return (asked.type == device.type and None in (asked.index, device.index)) or asked == device


class _EngineModule(torch.nn.Module):
    """What diffusers asks of any component: a config, a device, a dtype; and `to`, which an engine cannot obey."""

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
        self.add_embedding = SimpleNamespace(
            linear_1=SimpleNamespace(in_features=config["projection_class_embeddings_input_dim"])
        )
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
        """Nothing to do: a batch larger than the engine's is decoded in pieces as it is."""

    def disable_slicing(self) -> None:
        """As `enable_slicing`."""

    def enable_tiling(self, *args: Any, **kwargs: Any) -> None:
        raise UserError(
            "the VAE engine decodes whole pictures of the bundle's sizes: tiling needs the checkpoint in torch"
        )


class _TextOutput(tuple[torch.Tensor, ...]):
    """What the pipeline reads of a text encoder: item 0, and `hidden_states[-2]`."""

    hidden_states: _HiddenStates


class _HiddenStates:
    """Only the penultimate hidden state exists in an engine."""

    def __init__(self, penultimate: torch.Tensor) -> None:
        self._penultimate = penultimate

    def __getitem__(self, index: int) -> torch.Tensor:
        if index != -2:
            raise UserError(
                f"clip_skip asks for hidden state {index}, the text encoder engine has only the penultimate one (-2); "
                "leave clip_skip unset"
            )
        return self._penultimate


class EngineTextEncoder(_EngineModule):
    """Called like transformers' CLIPTextModel and CLIPTextModelWithProjection."""

    def __init__(self, component: EngineComponent, config: dict[str, Any]) -> None:
        hidden = next(name for name in component.outputs if name.startswith("hidden_states"))
        super().__init__(component, config, component.dtype(hidden))
        self._hidden = hidden

    def forward(self, input_ids: torch.Tensor, output_hidden_states: bool = True, **_: Any) -> _TextOutput:
        """`input_ids` (rows, tokens) -> item 0: pooled embedding (rows, projection_dim) where the encoder has one, else
        the penultimate hidden state; `hidden_states[-2]` (rows, tokens, hidden_size)."""
        outputs = self.component.run({"input_ids": input_ids})
        hidden = outputs[self._hidden]
        result = _TextOutput((outputs.get("text_embeds", hidden),))
        result.hidden_states = _HiddenStates(hidden)
        return result

    def get_input_embeddings(self) -> None:
        """What textual inversion would extend."""
        raise UserError("an engine's vocabulary is fixed: textual inversion needs the checkpoint in torch")
