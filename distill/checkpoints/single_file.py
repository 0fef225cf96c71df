"""A single-file checkpoint (Stability's LDM/SGM layout, as ZavyChromaXL, JuggernautXL and SD 1.5 ship) into a folder.

diffusers' own `from_single_file(config=FOLDER)` does the same where memory holds the whole pipeline and a folder with
the right configs and tokenizers is at hand. What it cannot do, and this does: read the depth from the file's own
tensors (SSD-1B, Vega, any student); take the same memory at any size, since bytes are copied from file to file; ask no
hub for configs and tokenizers; refuse a file that lacks tensors, has others, or was trained on EDM's noise levels,
where diffusers warns at most.

The layout differs from diffusers' in names alone, but for an OpenCLIP text encoder: its query, key and value lie in one
tensor, and its projection is transposed. Names as in diffusers' `scripts/convert_diffusers_to_original_sdxl.py`. Averaged
copies of the weights (`model_ema.`) and whatever else no pipeline has are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from distill.checkpoints.assemble import assemble, component_shapes, meta_components
from distill.checkpoints.tensors import (
    MadeTensor,
    TensorRecord,
    check_stored,
    read_metadata,
    read_safetensors_header,
    transposed,
)
from distill.common.errors import UserError
from distill.common.progress import say
from distill.models.architectures import Architecture, architecture_at
from distill.models.conditioning import SD, SDXL, Conditioning, context_width
from distill.models.depth import Depth
from distill.models.families import FAMILIES

UNET = "model.diffusion_model."


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the networks of a kind of checkpoint lie in its single file: folder -> start of the tensors' names.
    `open_clip` is the text encoder that has OpenCLIP's own names, `unread` a pattern of its tensors that are not read."""

    name: str
    conditioning: Conditioning
    encoders: Mapping[str, str]
    open_clip: str | None
    unread: str = "$."

    @property
    def prefixes(self) -> dict[str, str]:
        return {"unet": UNET, "vae": "first_stage_model.", **self.encoders}


LAYOUTS = (
    Layout(
        name="SDXL",
        conditioning=SDXL,
        encoders={
            "text_encoder": "conditioner.embedders.0.transformer.",
            "text_encoder_2": "conditioner.embedders.1.model.",
        },
        open_clip="text_encoder_2",
    ),
    Layout(
        name="SD 1.x",
        conditioning=SD,
        encoders={"text_encoder": "cond_stage_model.transformer."},
        open_clip=None,
    ),
    Layout(
        name="SD 2.x",
        conditioning=SD,
        encoders={"text_encoder": "cond_stage_model.model."},
        open_clip="text_encoder",
        unread=r"transformer\.resblocks\.23\.|text_projection$",  # after the hidden state that the UNet reads
    ),
)
PREDICTION_KEYS = ("modelspec.prediction_type", "prediction_type")
"""In a file's metadata: `epsilon` or `v` (https://github.com/Stability-AI/ModelSpec)."""
CONSTANTS = ("position_ids", "logit_scale", "attn_mask")  # buffers that diffusers' networks do not keep

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = (
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("layer_norm1.", "ln_1."),
    ("layer_norm2.", "ln_2."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
    ("self_attn.", "attn."),
    ("text_projection.weight", "text_projection"),
)


def _unet_name(key: str, depth: Depth) -> str:
    module, _, leaf = key.rpartition(".")
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{leaf}"
    match = re.fullmatch(
        r"(down|mid|up)_blocks?\.(?:(\d)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", key
    )
    if not match:
        raise ValueError(f"no UNet has a tensor {key}")
    side, block, kind, index, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnets":
        part, _, leaf = rest.rpartition(".")
        rest = f"{_RESNET[part]}.{leaf}"
    if side == "mid":
        return f"middle_block.{2 * index if kind == 'resnets' else 1}.{rest}"
    layers = len(depth.up[0])  # of an up level, and of a down level with its sampler
    if kind == "downsamplers":
        return f"input_blocks.{layers * (block + 1)}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{layers * (block + 1) - 1}.{1 + any(depth.up[block])}.{rest}"
    first = layers * block + index + (side == "down")
    return f"{'input' if side == 'down' else 'output'}_blocks.{first}.{int(kind == 'attentions')}.{rest}"


def _vae_name(key: str, levels: int) -> str:
    def level(match: re.Match[str]) -> str:
        side, index = match[1], int(match[2])
        return f"{side}.{index if side == 'down' else levels - 1 - index}."

    key = re.sub(r"(down|up)_blocks\.(\d)\.", level, key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", key)
    key = re.sub(r"mid_block\.attentions\.0\.(.*)\.", lambda match: f"mid.attn_1.{_VAE_ATTENTION[match[1]]}.", key)
    key = re.sub(r"resnets\.(\d)", r"block.\1", key).replace("conv_shortcut", "nin_shortcut")
    return re.sub(r"(down|up)samplers\.0", r"\1sample", key).replace("conv_norm_out", "norm_out")


def _open_clip_name(key: str) -> str:
    for ours, theirs in _OPEN_CLIP:
        key = key.replace(ours, theirs)
    return key


def find_layout(records: Mapping[str, TensorRecord], path: Path) -> Layout:
    """Raises UserError, with what is missing named, for a file that is no whole checkpoint of any layout."""

    def missing(layout: Layout) -> list[str]:
        return [name for name, prefix in layout.prefixes.items() if not any(key.startswith(prefix) for key in records)]

    layout = min(LAYOUTS, key=lambda layout: len(missing(layout)))
    if missing(layout) == ["vae"]:
        raise UserError(
            f"{path} has no VAE in it: add one with diffusers, {layout.conditioning.pipeline}.from_single_file(FILE, vae="
            "AutoencoderKL.from_pretrained(VAE)).save_pretrained(FOLDER), and give the folder"
        )
    if missing(layout):
        raise UserError(
            f"{path} is no {layout.name} single-file checkpoint: it has no {' and no '.join(missing(layout))}"
        )
    return layout


def find_single_file_architecture(records: Mapping[str, TensorRecord], path: Path) -> Architecture:
    """The catalogue's architecture of a file, or a custom depth. Raises UserError, with the difference named, for a
    file that is no whole checkpoint of a known family."""
    layout = find_layout(records, path)
    predicted = _scheduler_of(records, path).get("prediction_type", "epsilon")

    def number(place: str, axis: int) -> int | None:
        record = records.get(f"{UNET}{place}.weight")
        return record.shape[axis] if record and len(record.shape) > axis else None

    samplers = [int(match[1]) for key in records if (match := re.match(rf"{UNET}input_blocks\.(\d+)\.0\.op\.w", key))]
    if not samplers:
        raise UserError(f"{path} is no {layout.name} checkpoint: its UNet has one level")
    layers, levels = min(samplers), len(samplers) + 1  # the ResNets of a down level and its sampler
    widths = [number(f"input_blocks.{layers * i + 1}.0.out_layers.3", 0) for i in range(levels)]
    reads = next((key for key in records if key.startswith(UNET) and key.endswith(".attn2.to_k.weight")), "")
    text = number(reads.removeprefix(UNET).removesuffix(".weight"), 1)
    known = [family for family in FAMILIES.values() if family.conditioning is layout.conditioning]
    fitting = [
        family
        for family in known
        if [*family.unet["block_out_channels"]][:levels] == widths and context_width(family.unet) == text
    ]
    if not fitting:
        names = "; ".join(f"{f.name}'s {list(f.unet['block_out_channels'])}, {context_width(f.unet)}" for f in known)
        raise UserError(
            f"{path}: its UNet's widths are {widths} and its text's {text}, {names}; a single file does not say how many "
            "heads others have: give a diffusers folder, whose config.json does"
        )
    blocks = {match[1] for key in records if (match := re.match(rf"{UNET}(.+?\.1\.transformer_blocks\.\d+)\.", key))}

    def depth(place: str) -> int:
        return sum(block.startswith(f"{place}.1.") for block in blocks)

    found = Depth(
        down=tuple(tuple(depth(f"input_blocks.{layers * i + j}") for j in range(1, layers)) for i in range(levels)),
        mid=depth("middle_block") if any(key.startswith(f"{UNET}middle_block.") for key in records) else None,
        up=tuple(tuple(depth(f"output_blocks.{layers * i + j}") for j in range(layers)) for i in range(levels)),
    )
    found.check()
    family = next((family for family in fitting if family.prediction_type == predicted), fitting[0])
    return architecture_at(family, found)


def _open_clip_tensor(key: str, take: Callable[[str], TensorRecord]) -> TensorRecord | MadeTensor:
    packed = re.fullmatch(r"(.*self_attn)\.([qkv])_proj\.(weight|bias)", key)
    if packed:
        return take(f"{_open_clip_name(packed[1] + '.')}in_proj_{packed[3]}").part("qkv".index(packed[2]), 3)
    record = take(_open_clip_name(key))
    return transposed(record) if key == "text_projection.weight" else record


def _scheduler_of(records: Mapping[str, TensorRecord], path: Path) -> dict[str, Any]:
    """In what the scheduler differs from SDXL's: as empty tensors say by their names (v_pred, ztsnr; ComfyUI's), or the
    file's metadata by the ModelSpec standard, or, in a file of SD 2.x that says nothing, as `_seems_768_v`.

    Zero terminal SNR needs `trailing` timesteps, or the last is never asked for (arXiv 2305.08891, section 3.3).
    Raises UserError for the names of EDM's noise levels (Playground v2.5, CosXL).
    """
    if edm := [key for key in records if key.startswith("edm_")]:
        raise UserError(f"{path} was trained on EDM's noise levels (it holds {edm[0]}), not on SDXL's: it is not read")
    said = _stated_prediction(path)
    predicts_v = said in ("v", "v_prediction", "v-prediction") if said else _seems_768_v(records, path)
    if "v_pred" not in records and not predicts_v:
        return {}
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if "ztsnr" in records else {}
    return {"prediction_type": "v_prediction"} | zero_snr


def _stated_prediction(path: Path) -> str:
    """What the file's metadata say that it predicts; empty where they say nothing."""
    about = read_metadata(path)
    return next((about[key].lower() for key in PREDICTION_KEYS if key in about), "")


def _seems_768_v(records: Mapping[str, TensorRecord], path: Path) -> bool:
    """Whether a file is of SD 2.x and was taught to predict v, as its 768-pixel models were. Their tensors are called and
    shaped as those of the 512-pixel ones, which predict the noise; ComfyUI's `SD20.model_type` tells them by how far the
    biases of the last transformer's first norm are spread, and so does this."""
    if find_layout(records, path).name != "SD 2.x":
        return False
    biases = [key for key in records if re.fullmatch(rf"{UNET}output_blocks\.\d+\.1\..*\.0\.norm1\.bias", key)]
    last = max(biases, key=lambda key: int(key.removeprefix(UNET).split(".")[1]), default=None)
    if last is None:
        return False
    with safe_open(path, "pt") as file:
        return bool(file.get_tensor(last).float().std(correction=0) > 0.09)


def read_single_file(
    path: Path,
) -> tuple[Architecture, dict[str, dict[str, TensorRecord | MadeTensor]], dict[str, Any]]:
    """What `assemble` needs: the architecture, the tensors of each network, and in what its scheduler is not SDXL's.

    Raises UserError for a file that is no whole checkpoint, lacks a tensor, has one of another shape or in a format that
    is not read, or holds tensors that no network of its kind has.
    """
    records = read_safetensors_header(path)
    scheduler = _scheduler_of(records, path)
    architecture, layout = find_single_file_architecture(records, path), find_layout(records, path)
    if layout.name == "SD 2.x" and not _stated_prediction(path) and "v_pred" not in records:
        meant = "v, as SD 2's 768 pixel models" if scheduler else "the noise, as SD 2's base models"
        say(
            f"{path} does not say what it predicts: by its weights it predicts {meant} do; if that is wrong, write "
            f"prediction_type epsilon or v into its metadata"
        )
    levels, prefixes = len(architecture.family.vae["block_out_channels"]), layout.prefixes
    names: dict[str, Callable[[str], str]] = {
        "unet": lambda key: _unet_name(key, architecture.depth),
        "vae": lambda key: _vae_name(key, levels),
    }
    used: set[str] = set()

    def take(name: str) -> TensorRecord:
        if name not in records:
            raise UserError(f"{path} lacks the tensor {name}")
        used.add(name)
        return check_stored(name, records[name])

    def find(component: str, key: str) -> TensorRecord | MadeTensor:
        prefix = prefixes[component]
        if component == layout.open_clip:
            return _open_clip_tensor(key, lambda name: take(prefix + name))
        return take(prefix + names.get(component, str)(key))

    tensors: dict[str, dict[str, TensorRecord | MadeTensor]] = {}
    for component, module in meta_components(architecture).items():
        tensors[component] = {}
        for key, shape in component_shapes(component, module).items():
            tensor = find(component, key)
            if math.prod(tensor.shape) != math.prod(shape):
                raise UserError(
                    f"{path}: {component} {key} has shape {list(tensor.shape)}, {layout.name}'s is {list(shape)}"
                )
            tensors[component][key] = replace(tensor, shape=shape)
    own = {key for key in records if key.startswith(tuple(prefixes.values())) and not key.endswith(CONSTANTS)}
    unread = re.compile(re.escape(prefixes.get(layout.open_clip or "", "")) + f"(?:{layout.unread})")
    if foreign := sorted(key for key in own - used if not unread.match(key)):
        raise UserError(
            f"{path} is no {layout.name} checkpoint: it has {len(foreign)} tensors too many, e.g. {foreign[0]}"
        )
    return architecture, tensors, scheduler


def convert_single_file(path: Path, folder: Path) -> None:
    """Writes the diffusers pipeline folder of a single-file checkpoint. Raises UserError, see `read_single_file`."""
    architecture, tensors, scheduler = read_single_file(path)
    assemble(folder, architecture, tensors, **scheduler)
