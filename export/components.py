"""What goes into and comes out of each component: names, dtypes and shapes, as functions of resolution and batch.

The UNet's inputs stand in `distill.models.conditioning`; the rest is known here alone. `config` is always the config.json
of the exported component, which is the source's own plus, for the UNet, sizes that only the whole pipeline knows:
`text_length`, `vae_scale_factor` and, where it takes longer prompts, all its `text_lengths`. Names are optimum's, so that
its ONNX Runtime pipelines read the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from distill.common.errors import UserError
from distill.models.conditioning import KINDS, Conditioning, Config, TensorSpec, latent_size, unet_inputs, unet_multiple
from distill.models.controls import TAKES_RESIDUALS, controlnet_inputs, residual_specs
from distill.models.families import vae_scale_factor
from distill.models.networks import CONTROLNETS
from distill.models.resolution import Resolution

FLOAT_DTYPES = {"fp16": "float16", "fp32": "float32"}
TEXT_ENCODERS = tuple(dict.fromkeys(name for kind in KINDS for name in kind.encoders))
"""Components that see no picture: one graph, and one engine, serves every size."""


@dataclass(frozen=True)
class Component:
    """`source` is the folder of the checkpoint that holds its weights; `size_multiple` gives, for a config, what the
    open height and width of the first input must be a multiple of; `unused` is how the names of weights begin that the
    source holds for another component."""

    name: str
    source: str
    _inputs: Callable[[Config, Resolution, int, str], list[TensorSpec]]
    _outputs: Callable[[Config, Resolution, int, str], list[TensorSpec]]
    size_multiple: Callable[[Config], int]
    unused: tuple[str, ...] = ()

    def inputs(self, config: Config, resolution: Resolution, batch: int, precision: str = "fp16") -> list[TensorSpec]:
        """`batch` is the component's own: a UNet under guidance gets twice the number of images.

        Raises UserError for an unknown precision or a resolution the model cannot take.
        """
        return self._inputs(config, resolution, batch, _dtype(precision))

    def outputs(self, config: Config, resolution: Resolution, batch: int, precision: str = "fp16") -> list[TensorSpec]:
        """As `inputs`."""
        return self._outputs(config, resolution, batch, _dtype(precision))


def _dtype(precision: str) -> str:
    if precision not in FLOAT_DTYPES:
        raise UserError(f"unknown precision {precision!r}: allowed are {', '.join(FLOAT_DTYPES)}")
    return FLOAT_DTYPES[precision]


PIPELINE_SIZES = ("text_length", "vae_scale_factor", "text_lengths", TAKES_RESIDUALS)
"""What `unet_config` adds to a UNet's or a ControlNet's own config."""
GUIDED = ("unet", *CONTROLNETS)
"""Components that see each picture twice under guidance."""


def unet_config(
    config: Config, *, vae_config: Config, text_config: Config, tokens: Sequence[int] = (), controlled: bool = False
) -> dict[str, Any]:
    """The config.json of the UNet, or of a ControlNet, with the sizes of the pipeline around it. `tokens` are the lengths of
    prompts that it is to take, its own among them; `controlled` says that it takes residuals. Raises UserError for a
    length that is no multiple of its own."""
    length = text_config["max_position_embeddings"]
    if odd := next((number for number in tokens if number % length), None):
        raise UserError(
            f"--tokens {odd}: a longer prompt is read in parts of {length} tokens; give multiples of {length}, e.g. "
            f"--tokens {length},{2 * length}"
        )
    sizes = {"text_length": length, "vae_scale_factor": vae_scale_factor(vae_config)}
    lengths = sorted({length, *tokens})
    longer = {"text_lengths": lengths} if len(lengths) > 1 else {}
    return {**config, **sizes, **longer, **({TAKES_RESIDUALS: True} if controlled else {})}


def _sizes(config: Config) -> dict[str, int]:
    return {"tokens": config["text_length"], "vae_scale_factor": config["vae_scale_factor"]}


def _unet_inputs(config: Config, resolution: Resolution, batch: int, dtype: str) -> list[TensorSpec]:
    specs = unet_inputs(config, resolution, batch, dtype, **_sizes(config))
    return [*specs, *_residuals(config, resolution, batch, dtype)] if config.get(TAKES_RESIDUALS) else specs


def _residuals(config: Config, resolution: Resolution, batch: int, dtype: str) -> list[TensorSpec]:
    return residual_specs(config, resolution, batch, dtype, config["vae_scale_factor"])


def _controlnet_inputs(config: Config, resolution: Resolution, batch: int, dtype: str) -> list[TensorSpec]:
    return controlnet_inputs(config, resolution, batch, dtype, **_sizes(config))


def _unet_outputs(config: Config, resolution: Resolution, batch: int, dtype: str) -> list[TensorSpec]:
    height, width = latent_size(resolution, config["vae_scale_factor"], unet_multiple(config))
    shape = (batch, config["out_channels"], height, width)
    return [TensorSpec("out_sample", dtype, shape, ("batch", None, "height", "width"))]


def _is_tiny(config: Config) -> bool:
    return config.get("_class_name") == "AutoencoderTiny"


def _vae_latent(
    name: str, config: Config, resolution: Resolution, batch: int, dtype: str, copies: int = 1
) -> TensorSpec:
    height, width = latent_size(resolution, vae_scale_factor(config), 1)
    shape = (batch, copies * config["latent_channels"], height, width)
    return TensorSpec(name, dtype, shape, ("batch", None, "height", "width"))


def _vae_image(config: Config, resolution: Resolution, batch: int, dtype: str, channels: int) -> TensorSpec:
    latent_size(resolution, vae_scale_factor(config), 1)
    shape = (batch, channels, resolution.height, resolution.width)
    return TensorSpec("sample", dtype, shape, ("batch", None, "height", "width"))


def _decoder_inputs(config: Config, resolution: Resolution, batch: int, dtype: str) -> list[TensorSpec]:
    return [_vae_latent("latent_sample", config, resolution, batch, dtype)]


def _decoder_outputs(config: Config, resolution: Resolution, batch: int, dtype: str) -> list[TensorSpec]:
    return [_vae_image(config, resolution, batch, dtype, config["out_channels"])]


def _encoder_inputs(config: Config, resolution: Resolution, batch: int, dtype: str) -> list[TensorSpec]:
    return [_vae_image(config, resolution, batch, dtype, config["in_channels"])]


def _encoder_outputs(config: Config, resolution: Resolution, batch: int, dtype: str) -> list[TensorSpec]:
    if _is_tiny(config):  # deterministic: its latents themselves
        return [_vae_latent("latent_sample", config, resolution, batch, dtype)]
    return [_vae_latent("latent_parameters", config, resolution, batch, dtype, copies=2)]  # mean and log variance


def _text_inputs(config: Config, resolution: Resolution, batch: int, dtype: str) -> list[TensorSpec]:
    return [TensorSpec("input_ids", "int64", (batch, config["max_position_embeddings"]), ("batch", None))]


def _hidden_states(config: Config, batch: int, dtype: str) -> list[TensorSpec]:
    """The last one after the final norm, the embeddings, and the output of every layer but the last: a pipeline reads one
    of them."""
    shape = (batch, config["max_position_embeddings"], config["hidden_size"])
    names = [f"hidden_states.{index}" for index in range(config["num_hidden_layers"])]
    return [TensorSpec(name, dtype, shape, ("batch", None, None)) for name in ["last_hidden_state", *names]]


def _text_outputs(config: Config, resolution: Resolution, batch: int, dtype: str) -> list[TensorSpec]:
    last, *hidden = _hidden_states(config, batch, dtype)
    return [last, TensorSpec("pooler_output", dtype, (batch, config["hidden_size"]), ("batch", None)), *hidden]


def _projected_text_outputs(config: Config, resolution: Resolution, batch: int, dtype: str) -> list[TensorSpec]:
    pooled = TensorSpec("text_embeds", dtype, (batch, config["projection_dim"]), ("batch", None))
    return [pooled, *_hidden_states(config, batch, dtype)]


def required_components(kind: Conditioning) -> tuple[str, ...]:
    """What a text-to-image pipeline cannot do without."""
    return ("unet", "vae_decoder", *kind.encoders)


_POOLED_FROM = {kind.pooled_from for kind in KINDS}
_ENCODER_KEYS, _DECODER_KEYS = ("encoder.", "quant_conv."), ("decoder.", "post_quant_conv.")
COMPONENTS = {
    component.name: component
    for component in (
        Component("unet", "unet", _unet_inputs, _unet_outputs, unet_multiple),
        *(Component(name, name, _controlnet_inputs, _residuals, unet_multiple) for name in CONTROLNETS),
        Component("vae_decoder", "vae", _decoder_inputs, _decoder_outputs, lambda config: 1, _ENCODER_KEYS),
        Component("vae_encoder", "vae", _encoder_inputs, _encoder_outputs, vae_scale_factor, _DECODER_KEYS),
        *(
            Component(
                name,
                name,
                _text_inputs,
                _projected_text_outputs if name in _POOLED_FROM else _text_outputs,
                lambda config: 1,
            )
            for name in TEXT_ENCODERS
        ),
    )
}
