"""The checkpoint that is really exported: with another VAE, with LoRAs fused, and whole.

Both changes make a new diffusers folder, whose unchanged parts are links to the old one, so everything after this
knows only plain checkpoints.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.checkpoints.folder import file_hashes, network_folders, read_config
from distill.checkpoints.load import load_pipeline
from distill.checkpoints.sampling import Sampling, sampling_of
from distill.checkpoints.sources import make_checkpoint
from distill.checkpoints.tensors import component_tensors, component_weights
from distill.common.errors import UserError
from distill.common.files import read_json, read_object, require_free_disk, sha256_file, sha256_json
from distill.common.hub import explaining_hub
from distill.models.conditioning import REFINER, SD, SDXL, conditioning_of, unet_inputs, unet_multiple
from distill.models.controls import residual_specs
from distill.models.networks import CONTROLNETS, stated_config
from distill.models.resolution import Resolution
from export.checkpoint.lora import Lora, check_lora, load_lora

VAE_SOURCES = {
    SDXL.pipeline: {"fp16-fix": "madebyollin/sdxl-vae-fp16-fix", "tiny": "madebyollin/taesdxl"},
    SD.pipeline: {"tiny": "madebyollin/taesd"},
}
VAE_SOURCES[REFINER.pipeline] = VAE_SOURCES[SDXL.pipeline]
"""Hub ids of the VAEs with a name, by the kind of pipeline whose latents they read."""
VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")


def vae_sources(checkpoint: Path) -> dict[str, str]:
    """The VAEs with a name that fit a checkpoint."""
    return VAE_SOURCES[conditioning_of(read_config(checkpoint, "unet")).pipeline]


def vae_folder(vae: str, sources: Mapping[str, str]) -> Path:
    """The local folder of `--vae`: one of `sources` is fetched from the Hugging Face hub, anything else is a folder.

    Raises UserError where it cannot be had or is no VAE.
    """
    folder = Path(vae)
    if vae in sources:
        from huggingface_hub import snapshot_download

        patterns = ["config.json", "diffusion_pytorch_model.safetensors"]
        with explaining_hub(f"the VAE {vae} is {sources[vae]}, which"):
            folder = Path(snapshot_download(sources[vae], allow_patterns=patterns))
    if not (folder / "config.json").is_file():
        raise UserError(
            f"there is no VAE {vae!r} for this model: allowed are stock, {', '.join(sources)}, or a folder with config.json"
        )
    kind = read_object(folder / "config.json").get("_class_name")
    if kind not in VAE_CLASSES:
        raise UserError(f"the VAE {vae}: its config.json says {kind!r}, allowed are {', '.join(VAE_CLASSES)}")
    component_weights(folder)
    return folder


def _link(checkpoint: Path, folder: Path, without: Sequence[str]) -> None:
    """Everything of a checkpoint but some parts, in a new folder."""
    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.is_dir() and path.name not in without:
            (folder / path.name).symlink_to(path.resolve())
    shutil.copyfile(checkpoint / "model_index.json", folder / "model_index.json")


def with_vae(checkpoint: Path, vae: str, workdir: Path) -> Path:
    """`checkpoint` with the VAE that `vae` names. Raises UserError where that is of another latent space."""
    if vae == "stock":
        return checkpoint
    source = vae_folder(vae, vae_sources(checkpoint)).resolve()
    config, wanted = read_config(source.parent, source.name), read_config(checkpoint, "unet")["out_channels"]
    if (channels := config.get("latent_channels", 4)) != wanted:
        raise UserError(
            f"the VAE {vae} has {channels} latent channels, the UNet of {checkpoint.name} {wanted}; give one "
            "made for this kind of model"
        )
    content = file_hashes(source.parent, [source.name])
    digest = sha256_json([str(checkpoint.resolve()), str(source), content])

    def make(folder: Path) -> None:
        _link(checkpoint, folder, ["vae"])
        (folder / "vae").symlink_to(source)
        index = read_json(checkpoint / "model_index.json") | {"vae": ["diffusers", config["_class_name"]]}
        (folder / "model_index.json").write_text(json.dumps(index, indent=1))

    return make_checkpoint(workdir / f"{checkpoint.name}-vae-{digest[:12]}", make)


def with_controlnets(checkpoint: Path, controlnets: Sequence[str], workdir: Path) -> Path:
    """`checkpoint` with ControlNets, see `controlnet_folder`, beside its networks. Raises UserError for more than there are
    places for, and for one that was made for another UNet."""
    if not controlnets:
        return checkpoint
    if len(controlnets) > len(CONTROLNETS):
        raise UserError(f"{len(controlnets)} ControlNets are given, {len(CONTROLNETS)} can be exported together")
    sources = [controlnet_folder(controlnet) for controlnet in controlnets]
    for source in sources:
        _check_controlnet(source, checkpoint)
    hashes = [file_hashes(source.parent, [source.name]) for source in sources]
    digest = sha256_json([str(checkpoint.resolve()), *map(str, sources), *hashes])

    def make(folder: Path) -> None:
        _link(checkpoint, folder, CONTROLNETS)
        for name, source in zip(CONTROLNETS, sources, strict=False):
            (folder / name).symlink_to(source)

    return make_checkpoint(workdir / f"{checkpoint.name}-controlnet-{digest[:12]}", make)


def controlnet_folder(controlnet: str) -> Path:
    """The local folder of `--controlnet`: a folder, or an id of the Hugging Face hub. Raises UserError where it cannot be
    had or is no ControlNet."""
    folder = Path(controlnet)
    if not folder.is_dir() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", controlnet):
        from huggingface_hub import snapshot_download

        with explaining_hub(f"the ControlNet {controlnet!r}"):
            patterns = ["config.json", "diffusion_pytorch_model*.safetensors*"]
            folder = Path(snapshot_download(controlnet, allow_patterns=patterns))
    if not (folder / "config.json").is_file():
        raise UserError(f"there is no ControlNet {controlnet!r}: allowed are a folder with config.json, or a hub id")
    kind = read_object(folder / "config.json").get("_class_name")
    if kind != "ControlNetModel":
        raise UserError(f"the ControlNet {controlnet}: its config.json says {kind!r}, allowed is 'ControlNetModel'")
    component_weights(folder)
    return folder.resolve()


def _check_controlnet(source: Path, checkpoint: Path) -> None:
    config = stated_config("controlnet", read_object(source / "config.json"), source)
    unet = read_config(checkpoint, "unet")
    if config.get("global_pool_conditions"):
        raise UserError(
            f"the ControlNet {source} pools its residuals, for which an engine has no input: run it in torch"
        )

    def fits(of: Mapping[str, Any]) -> list[object]:
        side = unet_multiple(of)
        inputs = unet_inputs(of, Resolution(side, side), 1, tokens=1, vae_scale_factor=1)
        return [*inputs, *residual_specs(of, Resolution(side, side), 1, "float32", 1)]

    if fits(config) != fits(unet):
        raise UserError(
            f"the ControlNet {source} was made for another UNet than that of {checkpoint.name}: it reads other text, or "
            "has other levels, layers or channels; give one for this model"
        )


def drawn_as(checkpoint: Path, loras: Sequence[Lora]) -> Sampling | None:
    """How `checkpoint` is drawn with once the LoRAs are fused: as the last of those says which were taught here, in the
    slimxl.json beside it, else as before."""
    stated = (sampling_of(folder) for folder in (*(path.parent for path, _ in reversed(loras)), checkpoint))
    return next(filter(None, stated), None)


def with_loras(checkpoint: Path, sha256: str, loras: Sequence[Lora], workdir: Path) -> Path:
    """`checkpoint`, of this hash, with LoRAs fused in the given order, computed in float32 and kept in float16 where the
    checkpoint is, else in float32: bfloat16 would round a good part of a LoRA away.

    The UNet and the text encoders are changed, in diffusers' and in kohya's naming, and the scheduler to one that a LoRA
    was taught for. Raises UserError for a file that is
    no LoRA, or of another architecture.
    """
    if not loras:
        return checkpoint
    for path, scale in loras:
        check_lora(path, scale)
    sampling = drawn_as(checkpoint, loras)
    recipe: list[object] = [str(checkpoint.resolve()), sha256, *((sha256_file(path), scale) for path, scale in loras)]
    recipe += [asdict(sampling)] if sampling else []
    folder = workdir / f"{checkpoint.name}-lora-{sha256_json(recipe)[:12]}"
    return make_checkpoint(folder, lambda temporary: _fuse(checkpoint, loras, sampling, temporary))


def _fuse(checkpoint: Path, loras: Sequence[Lora], sampling: Sampling | None, folder: Path) -> None:
    import torch

    dtypes, needed_bytes = {}, 0
    for name in [name for name in network_folders(checkpoint) if name != "vae"]:
        records = component_tensors(checkpoint / name).values()
        dtypes[name] = torch.float16 if any(record.dtype == "F16" for record in records) else torch.float32
        needed_bytes += sum(math.prod(record.shape) for record in records) * dtypes[name].itemsize
    require_free_disk(folder.parent, needed_bytes, f"{checkpoint.name} with its LoRAs", "--workdir")
    pipe = load_pipeline(checkpoint, torch.float32, without=("vae",))
    parts: dict[str, Any] = {name: getattr(pipe, name) for name in dtypes}
    for index, (path, scale) in enumerate(loras):
        name = f"lora_{index}"
        fused = load_lora(pipe, path, name, checkpoint.name)
        pipe.fuse_lora(components=fused, lora_scale=scale, adapter_names=[name])
        pipe.unload_lora_weights()
    _link(checkpoint, folder, [*parts, "scheduler"])
    shutil.copytree(checkpoint / "scheduler", folder / "scheduler")
    if sampling:
        sampling.write_scheduler(folder)
    for name, part in parts.items():
        part.to(dtypes[name]).save_pretrained(folder / name, safe_serialization=True)


def prepare(
    checkpoint: Path,
    hashes: dict[str, str],
    vae: str,
    loras: Sequence[Lora],
    controlnets: Sequence[str],
    workdir: Path,
) -> tuple[Path, dict[str, str]]:
    """The folder to export, LoRAs first, then the VAE, then ControlNets, and its `file_hashes`; `hashes` are those of
    `checkpoint`, whose own files are not read again. Raises UserError."""
    folder = with_vae(with_loras(checkpoint, sha256_json(hashes), loras, workdir), vae, workdir)
    folder = with_controlnets(folder, controlnets, workdir)
    parts = (*network_folders(folder), *CONTROLNETS[: len(controlnets)])
    changed = [part for part in parts if (folder / part).resolve() != (checkpoint / part).resolve()]
    kept = {name: digest for name, digest in hashes.items() if name.partition("/")[0] not in changed}
    return folder, kept | file_hashes(folder, changed)
