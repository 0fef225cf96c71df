"""How a prompt, a size and a timestep reach the UNet: its inputs by name, and what fills them.

A UNet's config alone says which inputs it has: SDXL's takes the pooled text of its second encoder and six size numbers
beside the hidden states (arXiv 2307.01952, section 2.2), that of SD 1.x and 2.x the hidden states alone. Training,
counting, tracing, engines and the roofline take names and shapes from here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from distill.common.errors import UserError
from distill.models.resolution import Resolution

if TYPE_CHECKING:
    import torch

Config = Mapping[str, Any]
TEXT_INPUTS = ("encoder_hidden_states", "text_embeds")
"""Those inputs of a UNet that stand for the prompt: what caption dropout and guidance exchange."""
SIZES = "time_ids"
"""The input of a UNet that stands for a picture's sizes: whole numbers, up to the largest side."""
TOKENS = {"text_encoder": "input_ids", "text_encoder_2": "input_ids_2"}
"""By its text encoder, what a caption is called as tokens (n, tokens)."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. `axes` names the dimensions that a dynamic graph leaves open; None is a fixed one."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """A kind of pipeline by how it conditions its UNet.

    `pipeline` and `onnx_pipeline` are the classes of diffusers and of optimum; `networks` maps each folder of a
    checkpoint to its library and class, as model_index.json states them; `encoders` are the text encoders' folders in
    order, `pad_tokens` what their tokenizers pad with; `hidden_state` says which of their hidden states the UNet reads,
    counted as transformers counts `hidden_states` (-2: before the last layer), or None for the last one after the final
    norm; `pooled_from` is the encoder whose pooled output goes in too, with the size numbers. `vae_overflows` says that its
    own VAE does in fp16, and so its pipeline obeys a VAE's `force_upcast`, which others ignore. `size_numbers` is how many
    numbers stand for a picture's sizes. `options` are the entries
    of model_index.json beside the parts, for checkpoints made here; `load_options` are further arguments of
    `from_pretrained`.
    """

    pipeline: str
    onnx_pipeline: str
    networks: dict[str, tuple[str, str]]
    encoders: tuple[str, ...]
    pad_tokens: tuple[str, ...]
    hidden_state: int | None
    pooled_from: str | None
    vae_overflows: bool
    size_numbers: int
    options: dict[str, Any]
    load_options: dict[str, Any]

    @property
    def parts(self) -> tuple[str, ...]:
        """The folders of a checkpoint beside its networks."""
        return (*self.tokenizers, "scheduler")

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Their folders, in the order of the encoders."""
        return tuple(encoder.replace("text_encoder", "tokenizer") for encoder in self.encoders)

    def encoder_outputs(self, encoder: str, config: Config) -> tuple[str, ...]:
        """Names of the outputs that the pipeline reads of a text encoder, as optimum names them."""
        hidden = (
            "last_hidden_state"
            if self.hidden_state is None
            else f"hidden_states.{config['num_hidden_layers'] + 1 + self.hidden_state}"
        )
        return (hidden, "text_embeds") if encoder == self.pooled_from else (hidden,)

    def tokenize(self, pipe: Any, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Captions as `TOKENS` (n, tokens), cut to what the encoders read and padded to it, as the pipeline does."""
        return {
            TOKENS[encoder]: getattr(pipe, tokenizer)(
                list(captions),
                padding="max_length",
                max_length=getattr(pipe, tokenizer).model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids.int()
            for encoder, tokenizer in zip(self.encoders, self.tokenizers, strict=True)
        }

    def encode_tokens(self, networks: Mapping[str, Any], tokens: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The UNet's text inputs for `TOKENS`: `encoder_hidden_states` (n, tokens, dim) and, of SDXL, `text_embeds`
        (n, dim), by the text encoders that `networks` holds under their names."""
        import torch

        hidden, pooled = [], {}
        for encoder in self.encoders:
            encoded = networks[encoder](tokens[TOKENS[encoder]], output_hidden_states=self.hidden_state is not None)
            last = self.hidden_state is None
            hidden.append(encoded.last_hidden_state if last else encoded.hidden_states[self.hidden_state])
            if encoder == self.pooled_from:
                pooled = {"text_embeds": encoded.text_embeds}
        return {"encoder_hidden_states": torch.cat(hidden, dim=-1), **pooled}

    def encode(self, pipe: Any, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """The UNet's text inputs for captions, as `encode_tokens` gives them."""
        tokens = {name: ids.to(pipe._execution_device) for name, ids in self.tokenize(pipe, captions).items()}
        return self.encode_tokens(pipe.components, tokens)

    def unconditional(self, pipe: Any) -> dict[str, torch.Tensor]:
        """The UNet's text inputs for no prompt, as `encode` gives them for one: zeros where the checkpoint says
        `force_zeros_for_empty_prompt` (SDXL's own), else the encoding of the empty caption."""
        encoded = self.encode(pipe, [""])
        if getattr(pipe.config, "force_zeros_for_empty_prompt", False):
            return {name: value * 0 for name, value in encoded.items()}
        return encoded

    @property
    def takes_sizes(self) -> bool:
        """Whether the UNet is told a picture's original size and crop."""
        return self.size_numbers > 0

    @property
    def stem(self) -> str:
        """How the names of diffusers' pipelines for it begin."""
        return self.pipeline.removesuffix("Pipeline").removesuffix("Img2Img")

    @property
    def draws_from_text(self) -> bool:
        """Whether it begins a picture; a refiner only goes on with one."""
        return self.pipeline == f"{self.stem}Pipeline"

    def require_drawing_from_text(self, model: object) -> None:
        """Raises UserError for a refiner."""
        if not self.draws_from_text:
            raise UserError(f"{model} is SDXL's refiner, which finishes another model's pictures; give the base model")

    def size_inputs(
        self,
        original_sizes: Sequence[tuple[int, int]],
        crops_top_left: Sequence[tuple[int, int]],
        resolutions: Sequence[Resolution],
    ) -> dict[str, torch.Tensor]:
        """The UNet's size inputs for pictures: `time_ids` (n, 6) as (original height, width, crop top, left, target
        height, width), or none. Sizes and corners are (height, width) and (top, left) in pixels."""
        import torch

        if not self.takes_sizes:
            return {}
        rows = zip(original_sizes, crops_top_left, resolutions, strict=True)
        numbers = [(*original, *crop, target.height, target.width) for original, crop, target in rows]
        return {SIZES: torch.tensor(numbers, dtype=torch.int32)}


_UNET_AND_VAE = {"unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL")}
SDXL = Conditioning(
    pipeline="StableDiffusionXLPipeline",
    onnx_pipeline="ORTStableDiffusionXLPipeline",
    networks=_UNET_AND_VAE
    | {
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    },
    encoders=("text_encoder", "text_encoder_2"),
    pad_tokens=("<|endoftext|>", "!"),
    hidden_state=-2,
    pooled_from="text_encoder_2",
    vae_overflows=True,
    size_numbers=6,
    options={"force_zeros_for_empty_prompt": True},
    load_options={"add_watermarker": False},
)
SD = Conditioning(
    pipeline="StableDiffusionPipeline",
    onnx_pipeline="ORTStableDiffusionPipeline",
    networks=_UNET_AND_VAE | {"text_encoder": ("transformers", "CLIPTextModel")},
    encoders=("text_encoder",),
    pad_tokens=("<|endoftext|>",),
    hidden_state=None,
    pooled_from=None,
    vae_overflows=False,
    size_numbers=0,
    options={"safety_checker": (None, None), "feature_extractor": (None, None), "requires_safety_checker": False},
    load_options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
)

REFINER = replace(
    SDXL,
    pipeline="StableDiffusionXLImg2ImgPipeline",
    onnx_pipeline="ORTStableDiffusionXLImg2ImgPipeline",
    networks={name: kind for name, kind in SDXL.networks.items() if name != "text_encoder"},
    encoders=SDXL.encoders[1:],
    pad_tokens=SDXL.pad_tokens[1:],
    size_numbers=5,
    options={"text_encoder": (None, None), "tokenizer": (None, None), "requires_aesthetics_score": True}
    | {"force_zeros_for_empty_prompt": False},
    load_options=SDXL.load_options | {"text_encoder": None, "tokenizer": None},
)
"""SDXL's second model (arXiv 2307.01952, section 2.5), which finishes pictures of the first: the large text encoder alone,
and a score of their beauty in place of their size."""

KINDS = (SDXL, REFINER, SD)


def conditioning_of(config: Config, model: object = "the model") -> Conditioning:
    """How the UNet of a config is conditioned; `model` is its name in messages. Raises UserError for a kind that is not
    known here."""
    kind = config.get("addition_embed_type")
    others = [
        name
        for name in ("class_embed_type", "encoder_hid_dim_type", "num_class_embeds")
        if config.get(name) is not None
    ]
    if others:
        raise UserError(
            f"{model}: its UNet is not supported: it takes more than text ({others[0]} {config[others[0]]!r})"
        )
    if kind == "text_time":
        width, each = (
            config.get(key) or 0 for key in ("projection_class_embeddings_input_dim", "addition_time_embed_dim")
        )
        reads_pooled_encoder_alone = width - REFINER.size_numbers * each == context_width(config)
        return REFINER if reads_pooled_encoder_alone and len(config["block_out_channels"]) == 4 else SDXL
    if kind is None:
        return SD
    raise UserError(
        f"{model}: its UNet has addition_embed_type {kind!r}; supported are 'text_time' (SDXL) and none (SD 1.x, 2.x)"
    )


def conditioning_named(pipeline: str) -> Conditioning:
    """The conditioning of a pipeline class, whatever its task; a class that a kind calls its own is that kind's. Raises
    UserError for another kind of pipeline."""
    exact = [kind for kind in KINDS if kind.pipeline == pipeline]
    suffix = r"(Img2Img|Inpaint|Adapter|ControlNet\w*)?Pipeline"
    if found := exact or [kind for kind in KINDS if re.fullmatch(kind.stem + suffix, pipeline)]:
        return found[0]
    raise UserError(f"{pipeline!r} is no pipeline of Stable Diffusion 1.x, 2.x or XL")


def latent_size(resolution: Resolution, scale: int, multiple: int) -> tuple[int, int]:
    """(height, width) in latent pixels. Raises UserError where a side is no multiple of scale · multiple pixels."""
    step = scale * multiple
    if resolution.width % step or resolution.height % step or min(resolution.width, resolution.height) < step:
        raise UserError(f"resolution {resolution}: both sides must be multiples of {step} pixels for this model")
    return resolution.height // scale, resolution.width // scale


def unet_multiple(config: Config) -> int:
    """What the sides of a UNet's latents must be a multiple of, so that skip connections meet without padding."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def context_width(config: Config) -> int:
    """The width of the hidden states that a UNet reads; a config may state it once, or for each level."""
    width = config["cross_attention_dim"]
    return width if isinstance(width, int) else width[0]


def unet_inputs(
    config: Config, resolution: Resolution, batch: int, dtype: str = "float32", *, tokens: int, vae_scale_factor: int
) -> list[TensorSpec]:
    """The inputs of a UNet in the order of its graph; `batch` is its own: twice the number of images under guidance. The
    number of tokens is open where the config states several `text_lengths`.

    Raises UserError for a resolution that the model cannot take.
    """
    height, width = latent_size(resolution, vae_scale_factor, unet_multiple(config))
    of_text = "tokens" if config.get("text_lengths") else None
    specs = [
        TensorSpec("sample", dtype, (batch, config["in_channels"], height, width), ("batch", None, "height", "width")),
        TensorSpec("timestep", "float32", (1,), (None,)),  # no scalar: Triton's TensorRT backend takes none
        TensorSpec("encoder_hidden_states", dtype, (batch, tokens, context_width(config)), ("batch", of_text, None)),
    ]
    if config.get("addition_embed_type") == "text_time":
        # float32 in every precision: diffusers concatenates them with a float32 sinusoidal embedding before it casts
        numbers = conditioning_of(config).size_numbers
        pooled = config["projection_class_embeddings_input_dim"] - numbers * config["addition_time_embed_dim"]
        specs.append(TensorSpec("text_embeds", "float32", (batch, pooled), ("batch", None)))
        specs.append(TensorSpec(SIZES, "float32", (batch, numbers), ("batch", None)))
    if config.get("time_cond_proj_dim"):
        specs.append(TensorSpec("timestep_cond", dtype, (batch, config["time_cond_proj_dim"]), ("batch", None)))
    return specs


def unet_input_names(config: Config) -> tuple[str, ...]:
    """Those of `unet_inputs`, in order."""
    side = unet_multiple(config)
    specs = unet_inputs(config, Resolution(side, side), 1, tokens=1, vae_scale_factor=1)
    return tuple(spec.name for spec in specs)


def call_unet(unet: Any, inputs: Mapping[str, Any], **more: Any) -> torch.Tensor:
    """The noise_pred (batch, channels, height, width) of diffusers' UNet, see `call_network`."""
    return call_network(unet, inputs, **more)[0]


def call_network(network: Any, inputs: Mapping[str, Any], **more: Any) -> tuple[Any, ...]:
    """All that diffusers' UNet or ControlNet gives for `unet_inputs` by name; what else `inputs` holds is left alone, and
    what else the network is to have is `more`."""
    added = {name: inputs[name] for name in ("text_embeds", SIZES) if name in inputs}
    return network(
        inputs["sample"],
        inputs["timestep"],
        inputs["encoder_hidden_states"],
        timestep_cond=inputs.get("timestep_cond"),
        added_cond_kwargs=added or None,
        return_dict=False,
        **more,
    )
