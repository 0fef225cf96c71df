"""What a checkpoint's folder holds, read from its configs: its networks, family and architecture, and a hash of it all."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.checkpoints.tensors import component_tensors, component_weights
from distill.common.errors import UserError
from distill.common.files import read_object, sha256_file_once, sha256_json, write_json
from distill.common.progress import say
from distill.models.architectures import Architecture, architecture_at
from distill.models.conditioning import Conditioning, conditioning_of
from distill.models.depth import Depth
from distill.models.families import Family, check_fit, family_of
from distill.models.networks import stated_config

if TYPE_CHECKING:
    import torch

FORMS = "a Hugging Face id, a diffusers folder, a single .safetensors file, random:NAME, mini:sdxl or mini:sd"
"""Of a model, as every command takes it."""


def read_config(folder: Path, component: str) -> dict[str, Any]:
    """config.json of a component, with the library's defaults for what it leaves out. Raises UserError where it is
    missing or no JSON object, and for a UNet that is not expressible here."""
    path = folder / component / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is no checkpoint: {component}/config.json is missing; allowed are {FORMS}")
    return stated_config(component, read_object(path), path)


def check_checkpoint(folder: Path) -> None:
    """Raises UserError, with what is missing, where `folder` is no whole diffusers pipeline of a known kind."""
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is no checkpoint: it has no model_index.json; allowed are {FORMS}")
    read_object(folder / "model_index.json")
    unet = read_config(folder, "unet")
    conditioning = require_text_to_image(unet, folder)
    Depth.from_config(unet, folder)
    check_fit({component: read_config(folder, component) for component in conditioning.networks}, folder)
    for component in conditioning.networks:
        component_tensors(folder / component)


def network_folders(folder: Path) -> tuple[str, ...]:
    """The folders of a checkpoint's networks."""
    return tuple(conditioning_of(read_config(folder, "unet"), folder).networks)


def left_out(folder: Path) -> list[str]:
    """Parts that model_index.json names and slimxl does not use, as a safety checker."""
    conditioning = conditioning_of(read_config(folder, "unet"), folder)
    used = (*conditioning.networks, *conditioning.parts)
    stated = read_object(folder / "model_index.json").items()
    return [name for name, value in stated if isinstance(value, list) and any(value) and name not in used]


def copy_index(folder: Path, to: Path) -> None:
    """Copies model_index.json to the file `to`, without what is `left_out`, and says so."""
    index, left = read_object(folder / "model_index.json"), left_out(folder)
    if not left:
        shutil.copyfile(folder / "model_index.json", to)
        return
    say(f"{folder}: its {' and '.join(left)} are left out")
    needless = {"requires_safety_checker": False} if "requires_safety_checker" in index else {}
    write_json(to, index | {name: [None, None] for name in left} | needless)


def find_family(folder: Path) -> Family:
    """The family of a checkpoint folder. Raises UserError for networks that are of none."""
    return family_of({component: read_config(folder, component) for component in network_folders(folder)}, folder)


def require_text_to_image(config: Mapping[str, Any], model: object) -> Conditioning:
    """How a UNet of this config is conditioned. Raises UserError for that of another kind of model."""
    channels = config.get("in_channels", 4), config.get("out_channels", 4)
    if channels != (4, 4):
        raise UserError(
            f"{model} is no text-to-image checkpoint: its UNet has {channels[0]} channels in and {channels[1]} out, not 4 "
            "(9 are for inpainting, 8 for instructed edits)"
        )
    return conditioning_of(config, model)


def prediction_type_of(folder: Path) -> str:
    """What a checkpoint's UNet predicts: `epsilon`, the noise, as a rule."""
    return read_object(folder / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")


def alphas_cumprod_of(checkpoint: Path) -> torch.Tensor:
    """Signal variance per timestep, from a checkpoint's own scheduler config. Raises UserError where it states none."""
    from diffusers import DDPMScheduler

    config = read_object(checkpoint / "scheduler" / "scheduler_config.json")
    betas = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    if not {"beta_schedule", "trained_betas"} & config.keys():
        raise UserError(
            f"teacher {checkpoint}: its scheduler ({config.get('_class_name')}) states no noise levels (beta_schedule), "
            "and so it cannot be distilled"
        )
    names = ("num_train_timesteps", *betas)
    return DDPMScheduler(**{name: config[name] for name in names if name in config}).alphas_cumprod.float()


def file_hashes(folder: Path, components: Collection[str] | None = None) -> dict[str, str]:
    """sha256 of every config and weights file of its networks, or of some, by its path inside the checkpoint; where it
    has weights for fp16 and others, of both."""
    files = {
        f"{component}/{path.name}": path
        for component in (network_folders(folder) if components is None else components)
        for precision in ("fp32", "fp16")
        for path in [folder / component / "config.json", *component_weights(folder / component, precision)]
    }
    return {name: sha256_file_once(path) for name, path in files.items()}


def checkpoint_hash(folder: Path) -> str:
    """sha256 over `file_hashes`: equal content, equal hash, whatever the file dates."""
    return sha256_json(file_hashes(folder))


def find_architecture_of(folder: Path) -> Architecture:
    """The catalogue's architecture whose UNet config matches the checkpoint's; a custom one where it has none."""
    return architecture_at(find_family(folder), Depth.from_config(read_config(folder, "unet")))
